"""ATOD: annealed turn-aware on-policy distillation of a small agent (arXiv 2606.27814), from rollout to update.

for step s = 1, 2, ...
    roll out    the student acts: groups of trajectories of the same task
    score       teacher and student score every token the student produced
    weigh       T-DUR turn weights w from disagreement and uncertainty; group advantages from rewards
    learn       A_t = kappa(s) w_k(t) [log pi_T - log pi_old] + rho(s) A_RL, clipped surrogate, one pass
    resync      the trained weights go back to the rollout engine

python -m atod_fast.train                                              one process, the embedded demo
torchrun --nproc_per_node 2 -m atod_fast.train                         two, on a CPU
torchrun --nproc_per_node 8 -m atod_fast.train --preset alfworld-1.7b  eight GPUs, the paper's setting
"""

from __future__ import annotations

import sys

from atod_fast import cli

if __name__ == "__main__":
    cli.answer_early(cli.parse)

import io
import json
import resource
import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext, redirect_stdout
from functools import partial

import torch
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import record

from atod_fast import files, objective, plan, preflight, ranks, rundir
from atod_fast.batches import TurnTable, rows, turn_table
from atod_fast.config import Config
from atod_fast.errors import EngineFailure, GuardError, RankLost, UserError
from atod_fast.interrupt import Interrupt, Interrupted, last_word
from atod_fast.models import dtype_of, stop_ids
from atod_fast.observe import provenance, transcripts
from atod_fast.observe.advice import Advice
from atod_fast.observe.console import Console
from atod_fast.observe.metrics import Clock, MetricsLog
from atod_fast.policy import checkpoint
from atod_fast.policy.export import export
from atod_fast.policy.learner import Learner
from atod_fast.policy.resync import stream_weights
from atod_fast.records import Trajectory, outcomes, success_by_type
from atod_fast.rollout import player
from atod_fast.rollout.actor import Actor, dated, engine_kind, make_engine
from atod_fast.rollout.duration import limit
from atod_fast.rollout.engine import Engine
from atod_fast.settings import check_engines, demo_values_warning, same_tasks, to_toml

# Above these the rollout engine does not hold the trainer's weights: mean |log-prob difference| by compute precision.
LOGPROB_GAP = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
# Task types whose success metrics.jsonl tells apart; where there are more, a type is the name of a task or two.
MOST_TYPES = 20
FEW_ACTIONS = 32  # of which most may be the same by chance


class Run:
    """One training run on this rank: `__init__` puts it together, `train` is the algorithm."""

    def __init__(self, options: cli.Options, interrupt: Interrupt):
        self.interrupt = interrupt
        self.device, mesh = ranks.start()
        self.console = Console(speaks=ranks.rank() == 0)
        place = rundir.agree(options)
        self.run_dir, resume, finished = place
        config = rundir.resumed_config(options, resume)
        self.config = config = dated(config, checkpoint.read_state(resume).get("date", "") if resume else "")
        if finished:
            raise rundir.Finished(f"{self.run_dir} is finished: {config.train.steps} steps, model {self.run_dir / 'hf'}; give more train.steps to go on")
        if options.resume == "auto" and not resume:
            self.console.say(f"--resume auto: {self.run_dir} holds no checkpoint; this is a new run")
        self.advice = Advice(config)
        with ranks.together():
            models = preflight.look(config, ranks.world_size(), self.device).models  # before anything is loaded or opened
        torch.manual_seed(config.train.seed)

        for line in same_tasks(config):
            self.console.say(line)
        student = models["student"]
        if warning := demo_values_warning(config, student.parameters):
            self.console.say(warning, style="bold yellow")
        self.tokenizer = student.tokenizer
        with ranks.together():  # its files may be missing on one machine alone
            stops = stop_ids(config.student.path)
            self.actor = Actor(config, self.tokenizer, student.columns, stops, rank=ranks.rank(), ranks=ranks.world_size())
            for split in (*config.evaluated, "train"):  # what is wrong with one is said before anything is played
                self.actor.world(split)
        engines = check_engines(config, ranks.world_size())
        ranks.be_patient(limit(config, engines, instant=self.actor.world("eval").instant))
        # Before the trainer's models: vLLM needs its memory once while it is built, then leaves it to them until the first sync.
        self.engine = make_engine(config, config.student.path, self.device, filled=False, say=self.console.say)
        with ranks.together():
            self.learner = Learner(config, mesh, self.device, self.actor.renderer.valid_columns)

        self.done = 0  # steps
        self.before: dict[str, float] = {}  # evaluations before training: the student's, and the teacher's
        self.after: float | None = None  # the student's, when all steps are done
        self.adaptive: objective.AdaptiveKappa | None = None
        state = checkpoint.load(resume, self.learner.student, self.learner.optimizer) if resume else {}
        if resume:
            self.done, self.before = state["step"], state["before"]
            self.console.say(f"resumed from {resume}")
        self.whole_at = self.learner.updates  # weights are those after step `done` as long as there are no more
        self.saved = self.done if place.here else 0  # the newest step with a checkpoint in the run folder
        self.best: checkpoint.Best | None = None  # of the checkpoints there, with checkpoint.keep_best
        with ranks.together():
            if ranks.rank() == 0:
                self.open_folder(options.command, self.done if place.here else -1)
        if config.checkpoint.keep_best and place.here:
            self.best = self.kept_best(state.get("best"))
        self.console.say(f"run folder {self.run_dir}, rollouts by {engine_kind(config, self.device)}")
        self.resync()
        if not resume:
            self.before = self.evaluate_before()
            self.write({"step": 0, **self.before})
        if config.schedule.kappa.kind == "adaptive":
            self.adaptive = objective.AdaptiveKappa(config.schedule.kappa, self.before["dev/teacher_success"])
            if resume:
                self.adaptive.load_state_dict(state["adaptive"])

    def open_folder(self, command: str, done: int) -> None:
        """Set aside what the run folder holds beyond step `done`, and write down what runs here.

        Raises:
            UserError: the folder cannot be written, or a file there that has to be read is damaged.
        """
        settings, history = to_toml(self.config), self.run_dir / "environment.json"
        try:
            starts = provenance.entries(history)  # where it is damaged, before anything is moved
            self.run_dir.mkdir(parents=True, exist_ok=True)
            if aside := rundir.set_aside(self.run_dir, done, settings):
                self.console.say(f"moved to {aside}: {rundir.contents(aside, done)}")
            files.write(self.run_dir / "config.toml", settings)
            provenance.record(history, starts, command, ranks.world_size(), self.device, self.done)
        except OSError as error:
            raise UserError(f"--run-dir {self.run_dir} cannot be written ({checkpoint.reason(error)}); make room there, or give another folder") from None
        self.log = MetricsLog(self.run_dir / "metrics.jsonl")

    def kept_best(self, told: list | None) -> checkpoint.Best | None:
        """The best step that the resumed checkpoint knows of, if its own checkpoint is there still. The same on every rank."""
        found = checkpoint.Best(*told) if told else None
        if ranks.rank() == 0:
            if found and not checkpoint.is_complete(checkpoint.folder(self.run_dir, found.step)):
                found = None
            checkpoint.name_best(self.run_dir, found)
        told = json.loads(ranks.from_first(json.dumps(found)))
        return checkpoint.Best(*told) if told else None

    def train(self) -> None:
        """Roll out, score, weigh, learn, resync; evaluate and save when due. What ends it early is raised, with a note that says what is saved."""
        config, learner = self.config, self.learner
        try:
            for step in range(self.done + 1, config.train.steps + 1):
                clock = Clock(lambda phase, step=step: ranks.doing(f"{phase} of step {step}"))
                kappa = self.adaptive.value(step) if self.adaptive else objective.value(config.schedule.kappa, step)
                rho = objective.value(config.schedule.rho, step)

                with clock("rollout"):
                    everyone = self.play(f"step {step}", partial(self.actor.train, self.engine, step))
                    self.engine.sleep()
                    trajectories = [t for t in everyone if t.failure is None]
                    sequences = rows(trajectories)

                minibatches, members = learner.plan(sequences, step)
                imitate = objective.needs_teacher(kappa)
                with clock("teacher"):
                    if imitate:
                        learner.score_teacher(minibatches)
                with clock("score"):
                    learner.score_student(minibatches, with_teacher=imitate)
                    gap = self.checked_gap(learner.logprob_gap(minibatches))
                    table = turn_table(trajectories, *learner.turn_signals(minibatches, sum(len(t.turns) for t in trajectories)))

                with clock("weigh"):
                    weights = objective.weigh_turns(table, config.turns, torch.Generator().manual_seed(config.train.seed + step))
                    advantages = objective.rl_advantages(table, config.objective)
                    # A mini-batch is a mean over the tokens of all its rows, on whichever rank they are.
                    turns = [torch.tensor([turn for row in part for turn in sequences[row].turns]) for part in members]
                    mean = partial(objective.token_weights, config.objective.aggregation, table=table)
                    hybrid = partial(objective.make_streams, config.objective, kappa, rho, turn_weight=weights.weight, rl_advantage=advantages.turn)
                    streams = [
                        [hybrid(*scored.facts, token_weight=mean(scored.batch.turn, minibatch_turns=part)) for scored in minibatch]
                        for minibatch, part in zip(minibatches, turns, strict=True)
                    ]

                with clock("train"):
                    learned = learner.update(minibatches, streams, learning_rate(config, step))
                self.done, self.whole_at = step, learner.updates
                with clock("resync"):
                    sent = self.resync()

                metrics = {"step": step, "schedule/kappa": kappa, "schedule/rho": rho, "sync/bytes": sent, **gap} | policy_metrics(learned)
                metrics |= rollout_metrics(everyone, table) | turn_metrics(table, weights, advantages, imitate) | clock.seconds
                metrics |= {"time/step": clock.total, "perf/tokens_per_second": float(table.length.sum()) / clock.total}
                metrics |= {"memory/peak_gib": peak_memory(self.device)}
                signals = {"disagreement": table.disagreement, "uncertainty": table.uncertainty, "weight": weights.weight, "advantage": advantages.turn}
                self.finish_step(metrics, everyone, signals)
            self.finish_run()
        except (Exception, SystemExit) as error:
            stopped = ranks.understood(error)
            if self.done:  # a checkpoint of no step would not be the start: an optimiser has no state before it
                stopped.add_note(self.rescue(stopped))
            raise stopped from None

    def rescue(self, stopped: Exception) -> str:
        """Save what was trained, where it can be, and draw the curves; a line that says what is saved and how to go on.

        Saving takes all ranks, and weights that are those of a whole step: an update that was stopped between two
        mini-batches leaves half a step, from which a run cannot be continued exactly.
        """
        why = ""
        if isinstance(stopped, RankLost):
            why = "without the other ranks nothing can be saved"
        elif not ranks.all_stop(whole := self.learner.updates == self.whole_at):
            why = (
                "another rank was still working and could not join in saving" if whole else f"step {self.done + 1}'s update was only half done and is discarded"
            )
        else:
            try:
                self.save()
            except Exception as failure:
                why = f"it could not be saved: {ranks.understood(failure)}"
        self.interrupt.ending()
        if ranks.rank() == 0:
            self.draw()
        line = f"{'interrupted' if isinstance(stopped, Interrupted) else 'stopped' if why else 'saved'} after step {self.done}"
        if why:
            line += f"; {why}; " + (f"the last checkpoint is of step {self.saved}" if self.saved else "there is no checkpoint")
        if self.saved:
            run = shlex.quote(str(self.run_dir))
            line += f"; go on with --run-dir {run} --resume auto; for a model of it: python -m atod_fast.export {run} --out DIR"
        return line

    def play(self, label: str, act: Callable[..., list[Trajectory]]) -> list[Trajectory]:
        """All ranks' trajectories, on every rank. An engine that broke down is made anew, once, and the same episodes are
        played from their beginning: what half a rollout left is not used.
        """
        try:
            return player.play(act, label, self.config, self.console, self.interrupt)
        except EngineFailure as failure:
            self.console.say(f"{label}: the rollout engine broke down ({failure}); it gets its weights anew, and the episodes begin again")
        try:
            self.resync()
        except RuntimeError as failure:  # the device itself may be lost, on this rank alone
            raise GuardError(f"{label}: the rollout engine did not take its weights anew ({failure})") from failure
        try:
            return player.play(act, label, self.config, self.console, self.interrupt)
        except EngineFailure as failure:
            raise GuardError(f"{label}: the rollout engine broke down twice ({failure})") from failure

    def evaluate(self, engine: Engine, label: str, split: str = "eval", teacher: bool = False) -> dict[str, float]:
        """What comes of the tasks of env.`split` at `eval.temperature`, with the student (or the teacher) in `engine`."""
        label += " on env.dev" * (split == "dev")
        ranks.doing(label)
        everyone = self.play(label, partial(self.actor.evaluate, engine, split))
        with ranks.together():
            self.record(f"{split}_{self.done:06d}" + "_teacher" * teacher, everyone)
        prefix, found = f"{split}/" + "teacher_" * teacher, outcomes(everyone)
        types = {kind: success for kind, success in success_by_type(everyone).items() if kind}
        if 1 < len(types) <= MOST_TYPES:
            found |= {f"success/{kind}": success for kind, success in types.items()}
        if lost := found["failed_environments"]:
            self.console.say(f"{label}: {lost} of {self.config.eval.tasks} environments failed, and count as not solved")
        return {prefix + key: value for key, value in found.items()}

    def evaluate_before(self) -> dict[str, float]:
        """The student's and, with eval.teacher and a teacher, the teacher's outcomes before any training: on the held-out
        tasks, and on those of env.dev where something looks at them.
        """
        found: dict[str, float] = {}
        for split in self.config.evaluated:
            found |= self.evaluate(self.engine, "evaluating the student", split)
        if self.config.teacher_plays:
            # With transformers: a second vLLM in the process could not be taken down without the first one's process groups.
            self.engine.sleep()
            teacher = make_engine(self.config, self.config.teacher.path, self.device, "transformers", say=self.console.say)
            for split in self.config.evaluated if self.config.schedule.kappa.kind == "adaptive" else ("eval",):
                found |= self.evaluate(teacher, "evaluating the teacher", split, teacher=True)
            del teacher
            self.resync()
        overall = {key: value for key, value in found.items() if key.endswith(("/success", "/teacher_success"))}
        self.console.say("before training: " + ", ".join(f"{key} {value:.1%}" for key, value in overall.items()))
        return found

    def resync(self) -> int:
        """The student's weights to the rollout engine, which wakes for them; bytes sent."""
        sent = 0

        def counted() -> Iterator[tuple[str, Tensor]]:
            nonlocal sent
            for name, weight in stream_weights(self.learner.student):
                sent += weight.nbytes
                yield name, weight

        self.learner.make_room()
        self.engine.load_weights(counted())
        return sent

    def checked_gap(self, gap: tuple[float, float]) -> dict[str, float]:
        limit = self.config.guard.logprob_gap or LOGPROB_GAP[dtype_of(self.config.student.compute_dtype, self.device)]
        if not gap[0] <= limit:
            raise GuardError(
                f"step {self.done + 1}: rollout and trainer log-probs differ by {gap[0]:.2g} on average (limit {limit:g}): the engine does not hold the "
                "trainer's weights, or computes otherwise; check rollout.engine and student.compute_dtype, or raise guard.logprob_gap"
            )
        return {"sync/logprob_gap": gap[0], "sync/logprob_gap_max": gap[1]}

    def record(self, name: str, trajectories: Sequence[Trajectory], signals: Mapping[str, Tensor] = transcripts.NONE) -> None:
        """`trajectories` to a file of the run, with their turns' `signals` by name."""
        observe = self.config.observe
        if ranks.rank() == 0 and observe.trajectories_every:
            transcripts.write(self.run_dir / "trajectories" / f"{name}.jsonl", trajectories, self.tokenizer if observe.prompts else None, signals)

    def finish_step(self, metrics: dict, everyone: Sequence[Trajectory], signals: Mapping[str, Tensor]) -> None:
        """Evaluate, write down and save, each when due. An evaluation that is stopped loses itself only."""
        config, step, last = self.config, self.done, self.done == self.config.train.steps
        stopped: Exception | None = None
        better = False
        if last or (config.eval.every and step % config.eval.every == 0):
            try:
                for split in config.evaluated:
                    metrics |= self.evaluate(self.engine, "evaluating", split)
                self.after = metrics["eval/success"] if last else None
                if self.adaptive:
                    self.adaptive.observe(metrics["dev/success"])
                if config.checkpoint.keep_best:
                    success = metrics["dev/success"]
                    better = self.best is None or success > self.best.success
                    self.best = checkpoint.Best(step, success) if better else self.best
            except RankLost:
                raise
            except Exception as stop:
                stopped = stop
        ranks.doing(f"writing down step {step}")
        with ranks.together():
            self.write(metrics)
            self.console.step(metrics)
            for line in self.advice.after(metrics, everyone):
                self.console.say(f"warning: {line}", style="yellow")
            if config.observe.trajectories_every and step % config.observe.trajectories_every == 0:
                self.record(f"step_{step:06d}", everyone, signals)
        if stopped:
            raise stopped
        if last or better or (config.checkpoint.every and step % config.checkpoint.every == 0):
            self.save()

    def save(self) -> None:
        """This step's checkpoint, unless it is there."""
        if self.saved == self.done:
            return
        ranks.doing(f"saving step {self.done}")
        state = {"before": self.before, "adaptive": self.adaptive.state_dict() if self.adaptive else None, "best": self.best}
        state |= {"stop_ids": sorted(self.actor.renderer.stop_ids), "date": self.config.rollout.date}
        parts = self.run_dir, self.done, self.learner.student, self.learner.optimizer, state
        checkpoint.save(*parts, keep=self.config.checkpoint.keep, best=self.best)
        self.saved = self.done

    def write(self, metrics: dict) -> None:
        if ranks.rank() == 0:
            self.log.write(metrics)

    def finish_run(self) -> None:
        """Export for transformers, draw the curves, say what was gained."""
        if self.after is None:  # resumed with every step done
            self.after = self.evaluate(self.engine, "evaluating")["eval/success"]
        ranks.doing("exporting the model")
        for line in export(self.run_dir / "hf", self.learner.student, self.config.student.path, self.tokenizer, self.actor.renderer.stop_ids):
            self.console.say(line)
        if ranks.rank() != 0:
            return
        words = [f"student before {self.before['eval/success']:.1%}", f"student after {self.after:.1%}"]
        if "eval/teacher_success" in self.before:
            words.append(f"teacher {self.before['eval/teacher_success']:.1%}")
        self.console.say(f"held-out success at temperature {self.config.eval.temperature:g} on {self.config.eval.tasks} tasks: " + ", ".join(words))
        if self.best:
            kept = checkpoint.folder(self.run_dir, self.best.step)
            self.console.say(f"best success on env.dev {self.best.success:.1%} after step {self.best.step}, kept in {kept}")
        self.console.say(f"model {self.run_dir / 'hf'}" + (f", curves {self.run_dir / 'curves.png'}" if self.draw() else ""))

    def draw(self) -> bool:
        """Whether the curves could be drawn. What is missing there ends no run."""
        path = self.run_dir / "curves.png"
        try:
            from atod_fast.observe import curves

            curves.draw(self.log.read(), path)
        except Exception as error:
            self.console.say(f"{path} could not be drawn ({type(error).__name__}: {error})")
            return False
        return True


def learning_rate(config: Config, step: int) -> float:
    """Linear warm-up, then linearly to `final_learning_rate` of the peak at the last step. `step` counts from 1."""
    train = config.train
    warm = min(1.0, step / train.warmup_steps) if train.warmup_steps else 1.0
    return train.learning_rate * warm * (1 - (1 - train.final_learning_rate) * step / train.steps)


def rollout_metrics(everyone: Sequence[Trajectory], table: TurnTable) -> dict[str, float]:
    sizes = table.offsets.diff()
    found = outcomes(everyone)
    turns = [turn for trajectory in everyone if trajectory.failure is None for turn in trajectory.turns]
    scores = {"train/score": found["score"]} if "score" in found else {}
    return scores | {
        "train/success": found["success"],
        "train/reward": float(table.reward.mean()),
        "rollout/failed_environments": found["failed_environments"],
        "rollout/truncated": sum(t.truncated for t in everyone) / len(everyone),
        "rollout/turns": float(sizes.double().mean()),
        "rollout/response_tokens": float(table.length.double().mean()),
        "rollout/same_action": same_action([turn.command for turn in turns]),
        "rollout/invalid_actions": float((~table.valid).double().mean()),
        "rollout/malformed_actions": float((~table.well_formed).double().mean()),
        "rollout/cut_off": 1 - sum(turn.stopped for turn in turns) / len(turns) if turns else float("nan"),
    }


def same_action(commands: Sequence[str]) -> float:
    """Share of the most frequent one; NaN where there are too few to tell."""
    return Counter(commands).most_common(1)[0][1] / len(commands) if len(commands) >= FEW_ACTIONS else float("nan")


def policy_metrics(learned: dict[str, float]) -> dict[str, float]:
    """KL is that of the policy before the step's updates against the policy in them; the losses are nats a token."""
    return {
        "loss/total": learned["loss"],
        "loss/imitation_size": learned["opd"],
        "loss/reward_size": learned["rl"],
        "loss/imitation_to_reward": learned["opd"] / learned["rl"] if learned["rl"] else float("nan"),
        "policy/kl": learned["approx_kl"],
        "policy/entropy": learned["entropy"],
        "policy/clip_fraction": learned["clip_fraction"],
        "policy/gradient_norm": learned["gradient_norm"],
        "policy/importance_weight": learned["importance"],
    }


def turn_metrics(table: TurnTable, weights: objective.TurnWeights, advantages: objective.Advantages, with_teacher: bool) -> dict[str, float | list[float]]:
    return {
        "turns/disagreement": float(table.disagreement.mean()) if with_teacher else float("nan"),
        "turns/uncertainty": float(table.uncertainty.mean()),
        "turns/weight_mean": float(weights.weight.mean()),
        "turns/weight_min": float(weights.weight.min()),
        "turns/weight_max": float(weights.weight.max()),
        "turns/unweighted": weights.unweighted,
        "turns/budget_fallbacks": weights.fallbacks,
        "turns/flat_groups": advantages.flat_groups,
        "profile/disagreement": objective.profile(table.disagreement, table.offsets),
        "profile/uncertainty": objective.profile(table.uncertainty, table.offsets),
        "profile/weight": objective.profile(weights.weight, table.offsets),
    }


def peak_memory(device: torch.device) -> float:
    """GiB: the accelerator's allocations of this rank, or the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


@record
def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 done, 1 an unexpected error, 2 bad usage or input, 3 a guard stopped the run, 130 interrupted. What was trained is saved first."""
    speaks, started = ranks.rank() == 0, False
    with Interrupt() as interrupt:
        try:
            with nullcontext() if speaks else redirect_stdout(io.StringIO()):  # --help is printed once
                options = cli.parse(sys.argv[1:] if argv is None else argv)
            started = True
            if options.dry_run:
                if speaks:
                    print(plan.describe(rundir.resumed_config(options, rundir.choose(options).resume), ranks.world_size()))
                return 0
            Run(options, interrupt).train()
            return 0
        except rundir.Finished as finished:
            if speaks:
                print(finished)
            return 0
        except KeyboardInterrupt:  # the second
            if speaks:
                print("atod_fast: stopped at once, without saving", file=sys.stderr)
            return 130
        except (Exception, SystemExit) as error:
            if not started and isinstance(error, SystemExit):  # --help
                raise
            stopped, line = ranks.ending(error)
        finally:
            ranks.stop()
        notes = getattr(stopped, "__notes__", [])
        if speaks:
            if not isinstance(stopped, Interrupted):
                print(f"atod_fast: {line}", file=sys.stderr, flush=True)
            elif not notes:
                print("atod_fast: interrupted before a step was done; there is nothing to save", file=sys.stderr)
            for line in notes:
                last_word(line)
        return stopped.exit_code


if __name__ == "__main__":
    sys.exit(main())
