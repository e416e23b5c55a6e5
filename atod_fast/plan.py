"""`--dry-run`: whether the run would start, the resolved settings, and the tokens and memory of a step.

The output is TOML with the plan in comments: `--dry-run > my.toml` is a start for your own settings file.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from atod_fast import preflight
from atod_fast.config import Config
from atod_fast.config.settings import demo_values_warning, same_tasks, to_toml
from atod_fast.memory import FILLED, PHASES, Item, device_bytes, memory, shape_of, step_bounds, totals
from atod_fast.runtime import Runtime, slow_engine, used_models


def describe(config: Config, ranks: int) -> str:
    """Return the text of `--dry-run` for a run of `ranks` processes on this machine's kind of device.

    Raises:
        UserError: the run would be refused at its start.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = preflight.look(config, ranks, device, offline=True)
    preflight.look_at_tasks(config, found)
    shapes = {role: shape_of(model.body) for role, model in found.models.items()}
    lines = [f"plan for {ranks} {'rank' if ranks == 1 else 'ranks'} on {device.type}, at most:"]
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
    lines.append(_engine(found.runtime))
    if all(role in shapes for role in used_models(config)):
        lines += ["", *_table(list(memory(config, shapes["student"], shapes.get("teacher"), found.runtime)))]
    else:
        lines.append("memory: known once the models' config.json files are here")
    lines += [
        "",
        "not checked:",
        *(f"  {line}" for line in found.unchecked),
        "  the weights themselves: a dry run reads none",
    ]
    if "student" in shapes and (warning := demo_values_warning(config, shapes["student"].parameters)):
        lines = [warning, *lines]
    lines = [*slow_engine(config, found.runtime), *same_tasks(config), *lines]
    return to_toml(config) + "\n" + "\n".join(f"# {line}".rstrip() for line in lines)


def _engine(runtime: Runtime) -> str:
    """Return a line about the rollout engine: its name, what it plays at a time, and whether it sleeps."""
    room, size = runtime.room, device_bytes(runtime.device)
    plays = f"rollouts by {runtime.engine}, {room.concurrency} trajectories at a time"
    if size is None:
        return plays
    kept = f"{FILLED:.0%} of this GPU's {size / 2**30:.0f} GiB"
    why = f"it would not fit beside the trainer into {kept}, or rollout.sleep=on" if room.sleeps else f"within {kept}"
    return f"{plays}; the engine {'sleeps between rollouts' if room.sleeps else 'keeps its memory'} ({why})"


def _table(items: list[Item]) -> Iterator[str]:
    """Yield a table with a line per name and a column per phase."""
    cells: dict[str, dict[str, float]] = {}
    for item in items:
        for phase in item.phases:
            cells.setdefault(item.name, {})[phase] = item.size
    phases = [phase for phase in PHASES if any(phase in line for line in cells.values())]
    cells["total"] = {phase: totals(items)[phase] for phase in phases}
    unit, name = (2**30, "GiB") if max(cells["total"].values()) >= 2**30 else (2**20, "MiB")
    yield f"{f'memory of a rank, {name}':30}" + "".join(f"{phase:>16}" for phase in phases)
    for title, line in cells.items():
        yield f"{title:30}" + "".join(f"{line[phase] / unit:16.2f}" if phase in line else " " * 16 for phase in phases)
