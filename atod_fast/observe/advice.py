"""Warns of a run that cannot learn: three such steps in a row give one line with cause and remedy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import isnan
from typing import Any

from atod_fast.config import Config
from atod_fast.records import Trajectory

STEPS = 3  # in a row; a single step may be chance
# Share of actions: the remaining ones are too few to compare within a group; a warm start brings it far below this.
INVALID = 0.9
CUT_OFF = 0.5  # share of responses: most never reach their action
SAME = 0.9  # share of actions with one and the same text: differences that remain are chance

Metrics = Mapping[str, Any]


class Advice:
    """Gives advice after each step; each piece only once."""

    def __init__(self, config: Config):
        self.config = config
        self.first: Metrics | None = None
        self.recent: list[Metrics] = []
        self.said: set[str] = set()

    def after(self, metrics: Metrics, trajectories: Sequence[Trajectory]) -> list[str]:
        """Return the new lines of advice after a step; an example comes from the step's trajectories."""
        if self.first is None and not isnan(metrics["rollout/same_action"]):
            self.first = metrics
        self.recent = [*self.recent, metrics][-STEPS:]
        found = {}
        if len(self.recent) == STEPS:
            example = invalid_response(trajectories)
            found = dict(advise(self.recent, self.config, example, self.first))
            found = {cause: line for cause, line in found.items() if cause not in self.said}
        self.said |= found.keys()
        return list(found.values())


def advise(steps: Sequence[Metrics], config: Config, example: str, first: Metrics | None) -> Iterator[tuple[str, str]]:
    """Yield (cause, line) for each problem that all `steps` have.

    `example` is a response whose action is invalid; `first` the metrics of the first step with enough actions to detect
    a collapse by comparison. Responses that are cut off are invalid too: only the line on cutting comes. Responses
    without a valid form may all be read as the same empty action, which is no collapse. Nor is it one if a model
    repeats an action from the start, or succeeds more often: that action may be right, or the only one.
    """

    def lowest(key: str) -> float:
        return min(step[key] for step in steps)

    last = steps[-1]
    success = sum(step["train/success"] for step in steps) / len(steps)
    same = all(step["rollout/same_action"] > SAME for step in steps)  # False for NaN
    if lowest("rollout/cut_off") > CUT_OFF:
        share, limit = last["rollout/cut_off"], config.rollout.response_tokens
        thinking = ", or set rollout.thinking=false" if config.rollout.thinking else ""
        yield (
            "cut off",
            f"{share:.0%} of responses are cut off at rollout.response_tokens={limit} before their end; "
            f"raise it{thinking}",
        )
    elif lowest("rollout/invalid_actions") > INVALID:
        shown = f" (it said {example!r})" if example else ""
        where = "; trajectories/ holds prompts and responses" if config.observe.trajectories_every else ""
        yield (
            "invalid",
            f"{last['rollout/invalid_actions']:.0%} of actions are invalid: "
            "the model does not keep the response's form, or the environment knows no such action"
            f"{shown}; take a model that was trained to answer so, or say in the prompt how to{where}",
        )
    elif same and first and first["rollout/same_action"] <= SAME and success <= first["train/success"]:
        yield (
            "collapse",
            f"{last['rollout/same_action']:.0%} of actions are one and the same, {first['rollout/same_action']:.0%} at "
            f"first, and success has not risen ({first['train/success']:.0%}, now {success:.0%}): "
            "the model has come down to one answer; "
            f"begin anew with a lower train.learning_rate={config.train.learning_rate:g} or a higher "
            f"objective.entropy_bonus={config.objective.entropy_bonus:g}",
        )
    if lowest("turns/flat_groups") == 1 and lowest("schedule/rho") > 0:
        success = last["train/success"]
        teaches = "imitation alone teaches" if last["schedule/kappa"] > 0 else "nothing is learnt"
        remedy = {0: "take easier tasks or a warm start", 1: "take harder tasks"}.get(
            success, "give rewards that tell episodes apart"
        )
        yield (
            "flat",
            f"no group of trajectories differed in reward in {len(steps)} steps (success {success:.0%}): "
            f"reward gives no signal, {teaches}; "
            f"{remedy}, or raise train.group_size={config.train.group_size}",
        )
    longest, least = max(len(step["profile/weight"]) for step in steps), config.turns.min_turns
    if longest < least and lowest("schedule/kappa") > 0 and config.turns.fuse != "uniform":
        remedy = (
            f"turns.min_turns={longest}"
            if longest > 1
            else "turns.min_turns=1 and turns.scope=batch to compare turns of different episodes"
        )
        yield (
            "unweighted",
            f"turns.min_turns={least} leaves every trajectory unweighted, "
            f"as episodes have {last['rollout/turns']:.1f} turns: T-DUR does nothing; "
            f"set {remedy}, or turns.fuse=uniform to say so",
        )


def invalid_response(trajectories: Sequence[Trajectory], longest: int = 120) -> str:
    """Return the beginning of the first response whose action is invalid; "" without one."""
    text = next((turn.text for t in trajectories for turn in t.turns if not turn.valid), "")
    return text if len(text) <= longest else text[:longest] + "..."
