"""Writes trajectories as JSONL, one object each: what the model saw and said, turn by turn."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from atod_fast.records import Trajectory

FACTS = ("task", "group", "member", "task_id", "task_type", "reward", "success", "score", "truncated", "failure")
TURN = ("observation", "text", "command", "well_formed", "accepted", "valid", "stopped", "reward", "action")
NONE: Mapping[str, Tensor] = {}


def write(
    path: Path,
    trajectories: Sequence[Trajectory],
    tokenizer: PreTrainedTokenizerBase | None = None,
    signals: Mapping[str, Tensor] = NONE,
) -> None:
    """Write `trajectories` to `path`, which appears only when complete.

    With a `tokenizer`, each turn holds its `prompt` as the model saw it, special tokens included: in context `window`
    all of it, in context `full` what was added since the previous action. `signals` are per-turn values, [K] by name;
    failed trajectories are not counted in K and get none.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    values = {name: signal.tolist() for name, signal in signals.items()}
    number = 0
    unfinished = path.with_suffix(".unfinished")
    # Half a surrogate pair, which UTF-8 cannot hold, becomes JSON's own escape.
    with unfinished.open("w", encoding="utf-8", errors="backslashreplace") as file:
        for trajectory in trajectories:
            turns = []
            for turn in trajectory.turns:
                facts = {key: getattr(turn, key) for key in TURN} | {"action": np.asarray(turn.action).tolist()}
                if tokenizer is not None:
                    prompt = tokenizer.decode(
                        np.asarray(turn.prompt).tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False
                    )
                    facts = {"prompt": prompt} | facts
                if trajectory.failure is None:
                    facts |= {name: round(signal[number], 6) for name, signal in values.items()}
                    number += 1
                turns.append(facts)
            facts = {key: getattr(trajectory, key) for key in FACTS}
            file.write(json.dumps(facts | {"turns": turns}, ensure_ascii=False) + "\n")
    unfinished.replace(path)
