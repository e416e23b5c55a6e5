"""Inject faults into the method, one at a time, and find the test that notices each.

    python bench/mutants.py                     # all, about half an hour; writes bench/results/mutants.md
    python bench/mutants.py --list
    python bench/mutants.py --only warm-up-late

Each mutant changes one place in atod_fast/. It is made in a temporary copy of the tree, where the test files nearest
to it run until one fails. It is an error if the place of a mutant is not found exactly once, or if tests fail without
any mutant. Exit 1 if a mutant survives and the list gives no reason.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results" / "mutants.md"
LIMIT = 300  # seconds for a mutant's tests; a mutant that makes them hang counts as noticed
NOTICED, LIVES = 1, 0  # pytest's exit codes

LEARNER = ("policy/test_learner_reference.py", "policy/test_policy.py")
LOOP = ("run/test_loop_reference.py",)
SWITCHES = ("objective/test_switches.py", "policy/test_learner_reference.py")
TESTS = {  # nearest first
    "objective/advantage.py": ("objective/test_advantage.py",),
    "objective/loss.py": ("objective/test_loss.py", "objective/test_streams.py", *SWITCHES),
    "schedules.py": ("run/test_schedule.py",),
    "objective/streams.py": ("objective/test_streams.py", "objective/test_loss.py", *SWITCHES),
    "objective/turns.py": ("objective/test_turn_weights.py", "objective/test_streams.py", *SWITCHES),
    "objective/responses.py": SWITCHES,
    "policy/learner.py": (*LEARNER, "policy/test_skipped_updates.py"),
    "policy/packing.py": ("policy/test_packing.py", *LEARNER),
    "policy/teacher/local.py": LEARNER,
    "rollout/actor.py": ("rollout/test_actor.py", *LOOP),
    "rollout/resampling.py": ("rollout/test_resampling.py",),
    "rollout/agent.py": ("rollout/test_rollout.py", "rollout/test_rollout_failures.py", *LOOP),
    "train.py": LOOP,
    "batches.py": (*LOOP, "policy/test_learner_reference.py"),
    "records.py": (*LOOP, "policy/test_learner_reference.py"),
    "envs/alfworld/env.py": LOOP,
}


class Mutant(NamedTuple):
    name: str
    meaning: str
    old: str  # occurs once in its file
    new: str
    why: str = ""  # why no test notices it


MUTANTS = {  # by file below atod_fast/
    "schedules.py": [
        Mutant(
            "schedule-late", "the slide begins a step late", "(step - self.slide.hold)", "(step - 1 - self.slide.hold)"
        ),
        Mutant("hold-ignored", "schedule.*.hold is ignored", "(step - self.slide.hold)", "step"),
        Mutant(
            "warm-up-late",
            "the warm-up is off by one",
            "step / train.warmup_steps)",
            "(step - 1) / train.warmup_steps)",
        ),
        Mutant("rate-never-falls", "final_learning_rate is ignored", "1 - (1 - final) * step / train.steps", "1.0"),
        Mutant(
            "kappa-rises",
            "the adaptive kappa may rise again",
            "min(self._kappa, self.slide",
            "min(self.slide.start, self.slide",
        ),
        Mutant("lag-of-one", "the adaptive kappa sees one evaluation", "WINDOW = 5", "WINDOW = 1"),
    ],
    "objective/turns.py": [
        Mutant(
            "signed-d", "d without its absolute value", "(old_logp - teacher_logp).abs()", "(old_logp - teacher_logp)"
        ),
        Mutant("h-always-sampled", "turns.uncertainty is ignored", 'if config.uncertainty == "exact"', "if False"),
        Mutant("d-always-sampled", "turns.disagreement is ignored", 'if config.disagreement == "exact"', "if False"),
        Mutant("scope-ignored", "turns.scope is ignored", "scope=config.scope", 'scope="trajectory"'),
        Mutant("min-turns-ignored", "short trajectories are weighted", "min_turns=config.min_turns", "min_turns=1"),
        Mutant(
            "agreeing-weighted",
            "min_disagreement is ignored",
            "min_disagreement=config.min_disagreement",
            "min_disagreement=0.0",
        ),
        Mutant(
            "budget-by-turns",
            "mean1 counts turns, not tokens",
            "turn_lengths=table.length[acted]",
            "turn_lengths=torch.ones_like(table.length[acted])",
        ),
    ],
    "objective/advantage.py": [
        Mutant("valid-punished", "the penalty falls on valid turns", "(~right)", "right"),
        Mutant("invalid-ignored", "form alone is looked at", 'if objective.invalid == "form" else table.valid', ""),
        Mutant(
            "biased-std", "std divides by n", "(square / (count - 1).clamp(min=1))", "(square / count.clamp(min=1))"
        ),
        Mutant("std-ignored", "normalise_std is ignored", "if not objective.normalise_std:", "if False:"),
        Mutant(
            "flat-explodes",
            "groups without variance are divided",
            "torch.where(self.flat[group], 0.0, ",
            "torch.add(0.0, ",
        ),
        Mutant("baseline-ignored", "always over trajectories", 'if objective.baseline == "rows":', "if False:"),
        Mutant(
            "rloo-with-itself",
            "rloo compares with the mean of all",
            "(self.mean[group] * count - value) / (count - 1).clamp(min=1)",
            "self.mean[group]",
        ),
        Mutant("no-discount", "gigpo_gamma is ignored", "objective.gigpo_gamma)", "1.0)"),
        Mutant("omega-ignored", "gigpo_omega is ignored", "objective.gigpo_omega * ", ""),
        Mutant(
            "free-return", "GiGPO's return has no penalty", "objective.gigpo_gamma) - penalty", "objective.gigpo_gamma)"
        ),
        Mutant(
            "groups-cross",
            "GiGPO compares across tasks",
            "torch.stack([turn_group, table.anchor]",
            "torch.stack([table.anchor, table.anchor]",
        ),
    ],
    "objective/responses.py": [
        Mutant(
            "one-sided-mask", "a ratio below the bound's inverse stays", "mismatch.abs() <= math", "mismatch <= math"
        ),
        Mutant(
            "summed-response", "d, h and a response's ratio are sums over tokens", '"mean"), tokens', '"sum"), tokens'
        ),
    ],
    "objective/streams.py": [
        Mutant("masked-imitated", "a turn left out is imitated", "if divergence_weight is not None:", "if False:"),
        Mutant(
            "weights-on-reward",
            "T-DUR's weights touch the reward term",
            "rho * rl_advantage.to(old_logp)[turn]",
            "rho * (turn_weight * rl_advantage).to(old_logp)[turn]",
        ),
        Mutant("rho-ignored", "rho is 1", "rho * rl_advantage", "rl_advantage"),
        Mutant("kappa-ignored", "kappa is 1 while it is above 0", "kappa * turn_weight", "turn_weight"),
        Mutant(
            "away-from-teacher",
            "k1 with its sign turned",
            "log_ratio = teacher_logp - old_logp",
            "log_ratio = old_logp - teacher_logp",
        ),
        Mutant("log-ratio-unbounded", "log_ratio_clip is ignored", "if objective.log_ratio_clip > 0:", "if False:"),
        Mutant(
            "tis-turned",
            "importance of the engine against the trainer",
            "(old_logp - rollout_logp).exp()",
            "(rollout_logp - old_logp).exp()",
        ),
        Mutant("tis-uncapped", "tis_cap is only a switch", ".clamp(max=objective.tis_cap)", ""),
        Mutant(
            "micro-mean",
            "the loss is a mean over micro-batches",
            "tokens.turn, table, turns)",
            "tokens.turn, table, tokens.turn.unique())",
        ),
        Mutant(
            "mean-of-all-trajectories",
            "aggregation divides by all trajectories",
            "(per_trajectory > 0).sum()",
            "len(table.reward)",
        ),
    ],
    "objective/loss.py": [
        Mutant(
            "no-upper-clip",
            "a good token's ratio has no bound",
            "ratio.clamp(max=1 + (objective.clip_high or objective.clip))",
            "ratio",
        ),
        Mutant(
            "clip-high-ignored", "clip_high is ignored", "(objective.clip_high or objective.clip)", "objective.clip"
        ),
        Mutant(
            "response-without-gradient",
            "no gradient goes through a response's ratio",
            "(stats.logp - stats.logp.detach())",
            "0.0 * stats.logp",
        ),
        Mutant(
            "no-lower-clip",
            "a bad token's ratio has no lower bound",
            "ratio.clamp(1 - objective.clip,",
            "ratio.clamp(0.0,",
        ),
        Mutant("no-dual-clip", "dual_clip is ignored", "objective.dual_clip or None", "None"),
        Mutant(
            "entropy-punished",
            "the entropy bonus is a cost",
            "bounded - streams.entropy_weight",
            "bounded + streams.entropy_weight",
        ),
        Mutant(
            "tis-ignored",
            "the importance weight is not used",
            "-streams.policy_weight * streams.advantage",
            "-streams.advantage",
        ),
        Mutant(
            "k3-turned",
            "k3 of the reverse ratio",
            "streams.teacher_logp - stats.logp",
            "stats.logp - streams.teacher_logp",
        ),
    ],
    "policy/learner.py": [
        Mutant("trainer-at-1", "the trainer scores at temperature 1", "self.config.rollout.temperature", "1.0"),
        Mutant("alpha-fixed", "objective.alpha is ignored", "alpha=self.config.objective.alpha", "alpha=0.5"),
        Mutant(
            "all-columns",
            "banned ids share the softmax",
            "self.config.rollout.temperature, self.valid_columns",
            "self.config.rollout.temperature, None",
        ),
        Mutant("no-weight-decay", "weight decay is off", "weight_decay=config.train.weight_decay", "weight_decay=0.0"),
        Mutant("torch-betas", "train.betas is ignored", "betas=config.train.betas,", ""),
        Mutant("no-clipping", "gradient clipping is off", "self.config.train.grad_clip)", 'float("inf"))'),
        Mutant("rate-never-set", "the learning rate of the step is ignored", 'group["lr"] = learning_rate', "pass"),
        Mutant("one-epoch", "train.epochs is ignored", "range(self.config.train.epochs)", "range(1)"),
        Mutant(
            "gradients-pile-up",
            "a mini-batch keeps the gradient of the one before",
            "self.optimizer.zero_grad(set_to_none=True)\n        for number",
            "for number",
        ),
        Mutant(
            "partition-of-step-0",
            "every step has the same mini-batches",
            "default_rng([train.seed, step])",
            "default_rng([train.seed, 0])",
        ),
        Mutant(
            "first-signals",
            "d and h are swapped",
            "signals[line, numbers",
            "signals[1 - line, numbers",
        ),
        Mutant(
            "stale-response",
            "a response's ratio stays 1",
            "moved=self.updates > scored_at",
            "moved=False",
        ),
        Mutant(
            "never-in-a-row",
            "an update applied does not end a row",
            "self.updates + 1, 0\n",
            "self.updates + 1, self.skipped\n",
        ),
        Mutant("forward-signal", "d is the forward KL", '("reverse_kl" if config', '("forward_kl" if config'),
        Mutant(
            "averaged-ranks",
            "the loss is divided by the number of ranks",
            "(loss * ranks.world_size()).backward()",
            "loss.backward()",
        ),
    ],
    "policy/packing.py": [
        Mutant(
            "shifted-index",
            "hidden states of the token itself",
            "np.arange(start + first - 1, start + last - 1)",
            "np.arange(start + first, start + last)",
        ),
        Mutant(
            "positions-run-on",
            "packed rows count positions on",
            "np.arange(starts[-1]) - np.repeat(starts[:-1], widths)",
            "np.arange(starts[-1])",
        ),
        Mutant("budget-ignored", "microbatch_tokens is ignored", "if batches and grown <= budget:", "if batches:"),
        Mutant(
            "larger-minibatches",
            "more rows than minibatch_rows",
            "-(-len(rows) // minibatch_rows)",
            "len(rows) // minibatch_rows",
        ),
    ],
    "policy/teacher/local.py": [
        Mutant(
            "teacher-at-1",
            "the teacher scores at temperature 1",
            "self.policy(batch, job).logp",
            "self.policy(batch, job._replace(temperature=1.0)).logp",
        ),
    ],
    "rollout/agent.py": [
        Mutant(
            "engine-at-1",
            "the rollout's temperature is ignored",
            "settings.temperature if temperature is None else temperature",
            "1.0",
        ),
        Mutant("form-ignored", "a malformed answer is well formed", "bool(well_formed)", "True"),
        Mutant("refusal-ignored", "a refused action is accepted", 'answer.info.get("is_action_valid", True)', "True"),
        Mutant(
            "one-stream",
            "every turn draws the same numbers",
            "(self.episode.seed, len(turns))",
            "(self.episode.seed, 0)",
        ),
        Mutant("first-turn-paid", "rewards go to the first turn", "turns[-1].reward = ", "turns[0].reward = "),
        Mutant(
            "one-turn-more",
            "env.max_turns is exceeded",
            "len(turns) == self.config.env.max_turns",
            "len(turns) > self.config.env.max_turns",
        ),
    ],
    "rollout/actor.py": [
        Mutant(
            "train-at-1",
            "training plays at temperature 1",
            "episodes, self.config.rollout.temperature",
            "episodes, 1.0",
        ),
        Mutant(
            "eval-as-training",
            "eval.temperature is ignored",
            "self.config.eval.temperature",
            "self.config.rollout.temperature",
        ),
        Mutant(
            "group-of-copies",
            "members of a group share their seed",
            "_seed(*place, member, *again)",
            "_seed(*place, *again)",
        ),
        Mutant("same-tasks", "every step plays the same tasks", "(step - 1) * train.tasks_per_step + group", "group"),
        Mutant(
            "one-order", "all epochs and seeds have one order", "default_rng([train.seed, epoch])", "default_rng(0)"
        ),
        Mutant(
            "own-worlds", "members of a group get different worlds", '"env_seed": world}', '"env_seed": world + member}'
        ),
    ],
    "rollout/resampling.py": [
        Mutant("flat-for-flat", "a flat group gives way to another", " - set(flat_groups(fresh))", ""),
        Mutant(
            "failures-differ", "failed trajectories make a group differ", "if trajectory.failure is None:", "if True:"
        ),
    ],
    "train.py": [
        Mutant(
            "weights-of-one",
            "T-DUR's weights are replaced by ones",
            "turn_weight=weights.weight,",
            "turn_weight=torch.ones_like(weights.weight),",
        ),
        Mutant(
            "no-reward", "A_RL is 0", "rl_advantage=advantages.turn,", "rl_advantage=torch.zeros_like(advantages.turn),"
        ),
        Mutant(
            "failed-trained",
            "failed trajectories are trained on",
            "[t for t in everyone if t.failure is None]\n",
            "list(everyone)\n",
        ),
        Mutant("kappa-late", "kappa of the step before", "run.kappa.value(step)", "run.kappa.value(step - 1)"),
        Mutant("rho-is-kappa", "rho follows kappa's schedule", "run.rho.value(step)", "run.kappa.value(step)"),
        Mutant(
            "rate-of-step-1",
            "the learning rate stays the first step's",
            "run.learning_rate.value(step)",
            "run.learning_rate.value(1)",
        ),
        Mutant(
            "shuffled-once",
            "turns.fuse=shuffled draws the same each step",
            "manual_seed(config.train.seed + step)",
            "manual_seed(0)",
        ),
    ],
    "batches.py": [
        Mutant(
            "anchor-of-action", "GiGPO's anchor is the action", "_anchor(turn.observation)", "_anchor(turn.command)"
        ),
    ],
    "records.py": [
        Mutant(
            "last-reward",
            "a trajectory earns its last turn's reward",
            "sum(turn.reward for turn in self.turns)",
            "self.turns[-1].reward",
        ),
    ],
    "envs/alfworld/env.py": [
        Mutant("reward-of-1", "ALFWorld pays 1", "reward: float = 10.0", "reward: float = 1.0"),
    ],
}


def mutated(file: str, mutant: Mutant) -> str:
    """Return the file's text with the mutant in it. Exit if its place is not found exactly once."""
    text = (ROOT / "atod_fast" / file).read_text(encoding="utf-8")
    if (found := text.count(mutant.old)) != 1:
        where = f"{mutant.old!r} occurs {found} times in atod_fast/{file}"
        raise SystemExit(f"mutant {mutant.name}: {where}; bring the list up to date")
    return text.replace(mutant.old, mutant.new)


class First:
    """A pytest plugin that keeps the name of the first failed test."""

    def __init__(self) -> None:
        self.failed = ""

    def pytest_runtest_logreport(self, report) -> None:
        if report.failed and not self.failed:
            self.failed = report.nodeid


def work(tree: str, tests: list[str], told) -> None:
    """Run `tests` in `tree` in this child process; send pytest's exit code and the first failed test."""
    import pytest

    os.chdir(tree)
    sys.path[:0] = [tree, f"{tree}/kernels"]
    os.environ["PYTHONPATH"] = f"{tree}:{tree}/kernels"  # for the processes that tests start
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 1)
        os.dup2(nothing.fileno(), 2)
    first = First()
    code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *(f"tests/{name}" for name in tests)], plugins=[first])
    told.send((int(code), first.failed))
    told.close()
    os._exit(0)


def run(tree: Path, tests: tuple[str, ...]) -> tuple[int, str]:
    """Return pytest's exit code and the first failed test. A time-out or a killed process counts as noticed."""
    here, there = multiprocessing.Pipe(duplex=False)
    worker = multiprocessing.get_context("fork").Process(target=work, args=(str(tree), list(tests), there))
    worker.start()
    there.close()
    try:
        said = here.recv() if here.poll(LIMIT) else (NOTICED, f"no end within {LIMIT} s")
    except EOFError:
        said = NOTICED, "the process died"
    worker.kill()
    worker.join()
    return said


class Verdict(NamedTuple):
    file: str
    mutant: Mutant
    killer: str  # the test that failed; '' if the mutant survived
    seconds: float


def report(found: list[Verdict]) -> str:
    import torch

    lived = [one.mutant for one in found if not one.killer]
    minutes = sum(one.seconds for one in found) / 60
    survivors = [f"- `{mutant.name}` ({mutant.meaning}): {mutant.why or '**not explained**'}" for mutant in lived]
    lines = [
        "# Do the tests notice?",
        "",
        "`python bench/mutants.py`: faults put into the method one at a time, and the first test that fails for each.",
        "A mutant that no test notices lives.",
        "",
        f"{len(found)} mutants: {len(found) - len(lived)} noticed, {len(lived)} live. "
        f"{minutes:.0f} minutes, one after the other; Python {platform.python_version()}, torch {torch.__version__}.",
        "",
        "## Survivors",
        "",
        *(survivors or ["None."]),
        "",
        "## All",
        "",
        "| file | mutant | what it does | noticed by | seconds |",
        "|---|---|---|---|---|",
    ]
    for file, mutant, killer, seconds in found:
        by = f"`{killer}`" if killer else "**lives**"
        lines.append(f"| {file} | `{mutant.name}` | {mutant.meaning} | {by} | {seconds:.0f} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="NAME",
        help="this mutant; may be given again. Nothing is written",
    )
    parser.add_argument("--list", action="store_true")
    args = parser.parse_args()
    everyone = [(file, mutant) for file, mutants in MUTANTS.items() for mutant in mutants]
    chosen = [(file, mutant) for file, mutant in everyone if not args.only or mutant.name in args.only]
    if unknown := set(args.only) - {mutant.name for _, mutant in everyone}:
        raise SystemExit(f"no mutant by the name of {', '.join(sorted(unknown))}; see --list")
    if args.list:
        for file, mutant in everyone:
            print(f"{mutant.name:26}{file:26}{mutant.meaning}")
        return 0
    texts = [mutated(file, mutant) for file, mutant in chosen]

    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "TRITON_INTERPRET": "1"}
    sys.dont_write_bytecode = True  # else a mutant of the same size and second runs the previous one's bytecode
    import transformers  # noqa: F401  once for all forked processes; it imports nothing from the tree

    found = []
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        left_out = shutil.ignore_patterns(".git", "__pycache__", "results", "runs", ".hypothesis")
        shutil.copytree(ROOT, tree, ignore=left_out)
        for name in dict.fromkeys(name for file, _ in chosen for name in TESTS[file]):
            code, failed = run(tree, (name,))
            if code != LIVES:
                raise SystemExit(f"without any mutant: {failed or f'pytest ends with {code} in {name}'}")
        for (file, mutant), text in zip(chosen, texts, strict=True):
            start, path = time.time(), tree / "atod_fast" / file
            path.write_text(text, encoding="utf-8")
            code, killer = run(tree, TESTS[file])
            shutil.copy(ROOT / "atod_fast" / file, path)
            if code not in (NOTICED, LIVES):
                raise SystemExit(f"mutant {mutant.name}: pytest ends with {code}; is it importable?")
            found.append(Verdict(file, mutant, re.sub(r"^tests/(\w+/)*", "", killer), time.time() - start))
            print(f"{mutant.name:26}{found[-1].seconds:4.0f} s  {killer or 'LIVES'}", flush=True)
    if not args.only:
        RESULTS.write_text(report(found), encoding="utf-8")
    return int(any(not one.killer and not one.mutant.why for one in found))


if __name__ == "__main__":
    sys.exit(main())
