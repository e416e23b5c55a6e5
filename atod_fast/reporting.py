"""Compute a step's metrics, and write metrics.jsonl, trajectories, curves and console lines."""

from __future__ import annotations

import resource
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from atod_fast import ranks
from atod_fast.batches import TurnTable
from atod_fast.config import Config
from atod_fast.objective import Advantages, WeighedTurns, profile
from atod_fast.observe import transcripts
from atod_fast.observe.advice import Advice
from atod_fast.observe.console import Console
from atod_fast.observe.metrics import Clock, MetricsLog
from atod_fast.records import Trajectory, outcomes, success_by_part, success_by_type

# Most task types for which metrics.jsonl has a success rate each; if there are more, a type has only a task or two.
MOST_TYPES = 20
FEW_ACTIONS = 32  # of fewer, most may be the same by chance


class Callback:
    """Called with the metrics and trajectories of a run. Subclass it and override what you need.

    Only rank 0 calls it, right after writing its files. It must not communicate with other ranks, nor change its
    arguments. An exception stops the run on all ranks, after a checkpoint is saved.
    """

    def on_step(self, metrics: Mapping[str, Any]) -> None:
        """Called after each step with its line of metrics.jsonl, which includes the evaluation of that step."""

    def on_evaluation(self, metrics: Mapping[str, Any], trajectories: Sequence[Trajectory]) -> None:
        """Called after each evaluation, those before the first step included, with all ranks' trajectories.

        The metrics are `step` and the outcomes: `eval/success` on env.eval, `dev/success` on env.dev,
        `eval/teacher_success` of the teacher, ...
        """


class Reporter:
    """Writes the files of a run folder, prints lines on the console and calls the callbacks, all on rank 0 only."""

    def __init__(
        self,
        run_dir: Path,
        config: Config,
        console: Console,
        tokenizer: PreTrainedTokenizerBase,
        callbacks: Sequence[Callback] = (),
    ):
        self.run_dir, self.config, self.console, self.tokenizer = run_dir, config, console, tokenizer
        self.callbacks = callbacks if ranks.rank() == 0 else ()
        self.log = MetricsLog(run_dir / "metrics.jsonl")
        self.advice = Advice(config)

    def write(self, metrics: dict) -> None:
        """Append one line to metrics.jsonl."""
        if ranks.rank() == 0:
            self.log.write(metrics)

    def trajectories(
        self,
        name: str,
        trajectories: Sequence[Trajectory],
        signals: Mapping[str, Tensor] = transcripts.NONE,
    ) -> None:
        """Write trajectories/`name`.jsonl; `signals` are values of their turns, [K] by name."""
        observe = self.config.observe
        if ranks.rank() == 0 and observe.trajectories_every:
            tokenizer = self.tokenizer if observe.prompts else None
            transcripts.write(self.run_dir / "trajectories" / f"{name}.jsonl", trajectories, tokenizer, signals)

    def step(self, metrics: dict, trajectories: Sequence[Trajectory], signals: Mapping[str, Tensor]) -> None:
        """Write a step's metrics and, when due, its trajectories; print its line and any advice."""
        step, every = metrics["step"], self.config.observe.trajectories_every
        self.write(metrics)
        self.console.step(metrics)
        if skipped := metrics.get("policy/skipped_updates"):
            line = f"warning: step {step}: {skipped} updates skipped, whose gradient was not finite"
            self.console.say(line, style="yellow")
        for line in self.advice.after(metrics, trajectories):
            self.console.say(f"warning: {line}", style="yellow")
        if every and step % every == 0:
            self.trajectories(f"step_{step:06d}", trajectories, signals)
        for callback in self.callbacks:
            callback.on_step(metrics)

    def evaluation(self, name: str, step: int, metrics: Mapping[str, Any], trajectories: Sequence[Trajectory]) -> None:
        """Write the trajectories of an evaluation after `step` as trajectories/`name`.jsonl."""
        self.trajectories(name, trajectories)
        for callback in self.callbacks:
            callback.on_evaluation({"step": step, **metrics}, trajectories)

    def draw(self) -> bool:
        """Draw curves.png. Returns whether that worked; a failure is printed and does not stop the run."""
        path = self.run_dir / "curves.png"
        try:
            from atod_fast.observe import curves

            curves.draw(self.log.read(), path)
        except Exception as error:
            self.console.say(f"{path} could not be drawn ({type(error).__name__}: {error})")
            return False
        return True


def evaluation_metrics(everyone: Sequence[Trajectory], prefix: str) -> dict[str, float]:
    """Return the outcomes of an evaluation, keys prefixed by `prefix`; success by task type and by part too, if few."""
    found = outcomes(everyone)
    types = {kind: success for kind, success in success_by_type(everyone).items() if kind}
    for kinds in (types, success_by_part(everyone)):
        if 1 < len(kinds) <= MOST_TYPES:
            found |= {f"success/{kind}": success for kind, success in kinds.items()}
    return {prefix + key: value for key, value in found.items()}


def rollout_metrics(everyone: Sequence[Trajectory], table: TurnTable) -> dict[str, float]:
    """Return the metrics of a step's rollout.

    everyone: all trajectories. table: those whose environment did not fail.
    """
    sizes = table.offsets.diff()
    found = outcomes(everyone)
    turns = [turn for trajectory in everyone if trajectory.failure is None for turn in trajectory.turns]
    some = {"train/score": found["score"]} if "score" in found else {}
    some |= {f"train/success/{part}": success for part, success in success_by_part(everyone).items()}
    return some | {
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
    """Return the share of the most frequent command; NaN for fewer than `FEW_ACTIONS`."""
    return Counter(commands).most_common(1)[0][1] / len(commands) if len(commands) >= FEW_ACTIONS else float("nan")


def policy_metrics(learned: dict[str, float]) -> dict[str, float]:
    """Return the metrics of a step's updates.

    KL is that of the policy before the updates against the policy during them; losses are in nats per token.
    """
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
        "policy/skipped_updates": learned["skipped"],
    }


def turn_metrics(
    table: TurnTable,
    weights: WeighedTurns,
    advantages: Advantages,
    *,
    with_teacher: bool,
    kept: Tensor | None = None,
) -> dict[str, float | list[float]]:
    """Return means of the turns' signals and weights, and their profiles by turn index.

    kept: bool [K], the turns that stay in the loss, if objective.mismatch_mask is in use.
    """
    masked = {} if kept is None else {"turns/masked": float((~kept).double().mean())}
    return masked | {
        "turns/disagreement": float(table.disagreement.mean()) if with_teacher else float("nan"),
        "turns/uncertainty": float(table.uncertainty.mean()),
        "turns/weight_mean": float(weights.weight.mean()),
        "turns/weight_min": float(weights.weight.min()),
        "turns/weight_max": float(weights.weight.max()),
        "turns/unweighted": weights.unweighted,
        "turns/budget_fallbacks": weights.fallbacks,
        "turns/flat_groups": advantages.flat_groups,
        "profile/disagreement": profile(table.disagreement, table.offsets),
        "profile/uncertainty": profile(table.uncertainty, table.offsets),
        "profile/weight": profile(weights.weight, table.offsets),
    }


def turn_signals(table: TurnTable, weights: WeighedTurns, advantages: Advantages) -> dict[str, Tensor]:
    """Return the values that a transcript shows of each turn, [K] by name."""
    return {
        "disagreement": table.disagreement,
        "uncertainty": table.uncertainty,
        "weight": weights.weight,
        "advantage": advantages.turn,
    }


def cost_metrics(clock: Clock, tokens: int, device: torch.device) -> dict[str, float]:
    """Return the seconds of a step by phase, action tokens trained on per second, and this rank's peak memory."""
    return clock.seconds | {
        "time/step": clock.total,
        "perf/tokens_per_second": tokens / clock.total,
        "memory/peak_gib": peak_memory(device),
    }


def peak_memory(device: torch.device) -> float:
    """Return this rank's peak memory in GiB: allocations on CUDA, else the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
