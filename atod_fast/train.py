"""ATOD: annealed turn-aware on-policy distillation of a small agent (arXiv 2606.27814), from rollout to update.

for step s = 1, 2, ...
    roll out    the student acts: groups of trajectories of the same task
    score       teacher and student score every token the student produced
    weigh       T-DUR turn weights w from disagreement and uncertainty, group advantages from rewards
    learn       A_t = kappa(s) w_k(t) [log pi_T - log pi_old] + rho(s) A_RL, clipped surrogate, one pass
    resync      the trained weights go back to the rollout engine
    evaluate and save, when due

python -m atod_fast.train                                              one process, the embedded demo
torchrun --nproc_per_node 2 -m atod_fast.train                         two, on a CPU
torchrun --nproc_per_node 8 -m atod_fast.train --preset alfworld-1.7b  eight GPUs, the paper's setting
"""

from __future__ import annotations

import sys

from atod_fast import cli

if __name__ == "__main__":
    cli.answer_early(cli.parse)

from collections.abc import Sequence
from pathlib import Path

import torch
from torch.distributed.elastic.multiprocessing.errors import record

from atod_fast import dry_run, entry, objective, ranks, reporting, rundir
from atod_fast.batches import rows, turn_table
from atod_fast.interrupt import Interrupt
from atod_fast.run import Run


def train(run: Run) -> None:
    """Train from the step after `run.done` to `train.steps`, then export the model.

    Raises:
        Exception: the error that ends the run early. Its notes say what was saved and how to resume.
    """
    config, learner = run.config, run.learner
    with run.saved_if_stopped():
        for step in range(run.done + 1, config.train.steps + 1):
            clock = reporting.Clock(lambda phase, step=step: ranks.doing(f"{phase} of step {step}"))
            kappa, rho = run.kappa.value(step), run.rho.value(step)
            imitates = objective.needs_teacher(kappa)

            with clock("rollout"):
                everyone, rounds = run.roll_out(step=step)
                trajectories = [t for t in everyone if t.failure is None]
                sequences = rows(trajectories)
            minibatches, minibatch_turns = learner.partition(sequences, step=step)

            with clock("teacher"):
                taught = learner.score_teacher(minibatches) if imitates else None
            with clock("score"):
                scored = learner.score_student(minibatches, taught)
                gap = run.checked_gap(scored, step=step)
                count = sum(len(t.turns) for t in trajectories)
                disagreement, uncertainty = learner.turn_signals(scored, turns=count)
                table = turn_table(trajectories, disagreement=disagreement, uncertainty=uncertainty)

            with clock("weigh"):
                generator = torch.Generator().manual_seed(config.train.seed + step)
                weights = objective.weigh_turns(table, config.turns, generator=generator)
                advantages = objective.rl_advantages(table, config.objective)
                kept = None
                if config.objective.mismatch_mask:
                    kept = objective.kept_turns(learner.mismatch(scored, turns=count), config.objective)
                streams = objective.step_streams(
                    config.objective,
                    [[micro.tokens for micro in minibatch] for minibatch in scored],
                    minibatch_turns,
                    table=table,
                    kappa=kappa,
                    rho=rho,
                    turn_weight=weights.weight,
                    rl_advantage=advantages.turn,
                    kept=kept,
                )

            with clock("train"):
                learned = learner.update(scored, streams, learning_rate=run.learning_rate.value(step))
                del scored  # with the teacher's hidden states, before the engine wakes up
                run.learnt(step=step)
            with clock("resync"):
                sent = run.resync()

            metrics = {"step": step, "schedule/kappa": kappa, "schedule/rho": rho, "sync/bytes": sent, **gap}
            metrics |= reporting.rollout_metrics(everyone, table) | rounds | reporting.policy_metrics(learned)
            metrics |= reporting.turn_metrics(table, weights, advantages, with_teacher=imitates, kept=kept)
            metrics |= reporting.cost_metrics(clock, tokens=int(table.length.sum()), device=run.runtime.device)
            with run.reported(
                metrics,
                trajectories=everyone,
                signals=reporting.turn_signals(table, weights, advantages),
            ):
                run.evaluate_when_due(step=step, metrics=metrics)
            run.save_when_due(step=step)
        run.finish()


def train_run(options: cli.Options, interrupt: Interrupt, callbacks: Sequence[reporting.Callback] = ()) -> Path:
    """Set a run up and train it. Returns its folder, also if the run was finished already."""
    try:
        run = Run(options, interrupt, callbacks)
    except rundir.Finished as finished:
        if ranks.rank() == 0:
            print(finished)
        return finished.run_dir
    train(run)
    return run.run_dir


def start(options: cli.Options, interrupt: Interrupt) -> None:
    """Do what the command line asks for: print the plan of a dry run, or train."""
    if not options.dry_run:
        train_run(options, interrupt)
    elif ranks.rank() == 0:
        config = rundir.resumed_config(options, rundir.choose(options).resume)
        print(dry_run.describe(config, ranks.world_size(), ranks.node_size(), options.on))


@record
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's own) and return the exit code.

    0 done, 1 an unexpected error, 2 bad usage or input, 3 a guard stopped the run, 130 interrupted. A checkpoint
    is saved first.
    """
    return entry.run(
        lambda: cli.parse(sys.argv[1:] if argv is None else argv),
        start,
        interrupted="interrupted before a step was done; there is nothing to save",
        killed="stopped at once, without saving",
    )


if __name__ == "__main__":
    sys.exit(main())
