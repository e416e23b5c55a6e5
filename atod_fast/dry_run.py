"""`--dry-run`: whether the run would start, the resolved settings, and the tokens and memory of a step.

The output is TOML with the plan in comments: `--dry-run > my.toml` is a start for your own settings file.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from atod_fast import preflight
from atod_fast.config import Config
from atod_fast.config.settings import demo_values_warning, same_tasks, to_toml
from atod_fast.plan.memory import memory, table
from atod_fast.plan.room import FILLED
from atod_fast.plan.shapes import shape_of
from atod_fast.plan.tokens import step_bounds
from atod_fast.runtime import Runtime, slow_engine, used_models


def describe(config: Config, ranks: int, node: int | None = None) -> str:
    """Return the text of `--dry-run` for a run of `ranks` processes on this machine's kind of device.

    node: ranks on a node; None: all.

    Raises:
        UserError: the run would be refused at its start.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = preflight.look(config, ranks, device, node=node, offline=True)
    preflight.look_at_tasks(config, found)
    shapes = {role: shape_of(model.body) for role, model in found.models.items()}
    lines = [f"plan for {ranks} {'rank' if ranks == 1 else 'ranks'} on {device.type}, at most:"]
    if node is not None and node < ranks:
        lines.append(_sharding(found.runtime, nodes=-(-ranks // node)))
    lines += [f"{role} {found.models[role].path}: {shape.parameters:,} parameters" for role, shape in shapes.items()]
    if not config.teacher_scores:
        played = ", which is evaluated before training alone" if config.teacher_plays else ""
        lines.append(f"schedule.kappa is 0 throughout: no teacher scores{played}")
    step = step_bounds(config)
    lines += [
        f"a step: {config.train.tasks_per_step} tasks x {config.train.group_size} = "
        f"{step.trajectories:,} trajectories of {step.turns:,} turns",
        f"        {step.rows:,} rows of {step.tokens:,} tokens, "
        f"{step.action_tokens:,} of them actions, in {step.updates:,} updates",
    ]
    if rounds := config.train.resample_flat:
        lines.append(f"        up to {rounds * step.trajectories:,} more trajectories are played for flat groups")
    lines += [_engine(found.runtime), *_attention(config, found)]
    if all(role in shapes for role in used_models(config)):
        lines += ["", *table(list(memory(config, shapes["student"], shapes.get("teacher"), found.runtime)))]
    else:
        lines.append("memory: known once the models' config.json files are here")
    lines += [
        "",
        "not checked:",
        *(f"  {line}" for line in found.unchecked),
        "  the weights' values: a dry run reads none",
    ]
    if "student" in shapes and (warning := demo_values_warning(config, shapes["student"].parameters)):
        lines = [warning, *lines]
    lines = [*slow_engine(config, found.runtime), *same_tasks(config), *lines]
    return to_toml(config) + "\n" + "\n".join(f"# {line}".rstrip() for line in lines)


def _engine(runtime: Runtime) -> str:
    """Return a line about the rollout engine: its name, what it plays at a time, and whether it sleeps."""
    room, size = runtime.room, runtime.memory
    plays = f"rollouts by {runtime.engine}, {room.concurrency} trajectories at a time"
    if size is None:
        return plays
    kept = f"{FILLED:.0%} of this GPU's {size / 2**30:.0f} GiB"
    why = f"it would not fit beside the trainer into {kept}, or rollout.sleep=on" if room.sleeps else f"within {kept}"
    return f"{plays}; the engine {'sleeps between rollouts' if room.sleeps else 'keeps its memory'} ({why})"


def _sharding(runtime: Runtime, nodes: int) -> str:
    """Say how parameters lie on several nodes."""
    if runtime.shards == runtime.ranks:
        return f"parameters sharded over all ranks of {nodes} nodes (train.shard=all)"
    return f"parameters sharded over the {runtime.shards} ranks of a node, a copy on each of {nodes} (train.shard=node)"


def _attention(config: Config, found: preflight.Found) -> Iterator[str]:
    """Yield a line about the attention of the models that learn and score, and whether it packs rows."""
    computes = {"student": found.runtime.student, "teacher": found.runtime.teacher}
    known = {role: compute.attention for role, compute in computes.items() if compute and role in found.models}
    if len(known) < 1 + config.teacher_scores:
        return
    padded = [role for role in known if not found.models[role].packs]
    how = f"padded, as the {padded[0]}'s does not pack them" if padded else "packed without padding"
    names = " and ".join(f"{role} {name}" for role, name in known.items())
    yield f"attention: {names}; rows are {how}"
