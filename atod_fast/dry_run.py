"""`--dry-run`: whether the run would start, the resolved settings, and the tokens, memory and seconds of a step.

The output is TOML with the plan in comments: `--dry-run > my.toml` is a start for your own settings file.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from atod_fast import preflight
from atod_fast.config import Config
from atod_fast.config.settings import demo_values_warning, same_tasks, to_toml
from atod_fast.envs import usual_of
from atod_fast.errors import UserError
from atod_fast.machines import Machines
from atod_fast.plan.fit import longest_prompt
from atod_fast.plan.memory import memory, table
from atod_fast.plan.room import FILLED
from atod_fast.plan.seconds import seconds
from atod_fast.plan.shapes import Shape, shape_of
from atod_fast.plan.tokens import step_bounds, usual_step
from atod_fast.runtime import Runtime, slow_engine, used_models


def describe(config: Config, ranks: int, node: int | None = None, on: Machines | None = None) -> str:
    """Return the text of `--dry-run` for a run of `ranks` processes on this machine's kind of device.

    node: ranks on a node; None: all. on: machines to plan for instead, with a rank on each of their GPUs.

    Raises:
        UserError: the run would be refused at its start.
    """
    device = torch.device("cuda" if on or torch.cuda.is_available() else "cpu")
    if on:
        if ranks not in (1, on.ranks):
            raise UserError(f"--on {on} has {on.ranks} GPUs, and WORLD_SIZE={ranks}; leave WORLD_SIZE out")
        ranks, node = on.ranks, on.per_node
    found = preflight.look(config, ranks, device, node=node, offline=True, elsewhere=on)
    preflight.look_at_tasks(config, found)
    shapes = {role: shape_of(model.body) for role, model in found.models.items()}
    where = str(on) if on else f"{ranks} {'rank' if ranks == 1 else 'ranks'} on {device.type}"
    lines = [f"plan for {where}, at most:"]
    if node is not None and node < ranks:
        lines.append(_sharding(found.runtime, nodes=-(-ranks // node)))
    lines += [f"{role} {found.models[role].path}: {shape.parameters:,} parameters" for role, shape in shapes.items()]
    if not config.teacher_scores:
        played = ", which is evaluated before training alone" if config.teacher_plays else ""
        lines.append(f"schedule.kappa is 0 throughout: no teacher scores{played}")
    step = step_bounds(config)
    lines += [
        f"a step: {config.train.tasks_per_step} tasks x {config.train.group_size} = "
        f"{step.trajectories:,} trajectories with {step.turns:,} turns in all",
        f"        {step.rows:,} rows with {step.tokens:,} tokens in all, "
        f"{step.action_tokens:,} of them actions, in {step.updates:,} updates",
    ]
    if rounds := config.train.resample_flat:
        lines.append(f"        up to {rounds * step.trajectories:,} more trajectories are played for flat groups")
    lines += [_engine(found.runtime), *_attention(config, found), *_memory_choices(config, found)]
    if all(role in shapes for role in used_models(config)):
        models = shapes["student"], shapes.get("teacher")
        lines += ["", *table(list(memory(config, *models, found.runtime)))]
        lines += _longest(config, found)
        if on:
            lines += ["", *_seconds(config, *models, found.runtime, on)]
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
    lines = [*slow_engine(config, found.runtime), *found.tight(config), *same_tasks(config), *lines]
    return to_toml(config) + "\n" + "\n".join(f"# {line}".rstrip() for line in lines)


def _longest(config: Config, found: preflight.Found) -> Iterator[str]:
    """Yield a line with the greatest prompt that the models and the GPU's memory allow."""
    size, plan = found.runtime.memory, found.plan
    texts = [model.config.get_text_config() for model in found.models.values()]
    most = min(getattr(text, "max_position_embeddings", None) or 2**20 for text in texts)
    most -= config.rollout.response_tokens if config.rollout.context == "window" else 0
    if size is None or plan is None:
        return
    longest = longest_prompt(config, plan, FILLED * size, most)
    limit = "the models' positions" if longest == most else f"{FILLED:.0%} of the GPU's memory"
    yield f"rollout.prompt_tokens can be up to {longest:,} ({limit})"


def _seconds(config: Config, student: Shape, teacher: Shape | None, runtime: Runtime, on: Machines) -> Iterator[str]:
    """Yield a table of the predicted seconds of a step by phase, of a usual step and of the largest there can be."""
    usual = usual_of(config.env.name, config.env.options | config.env.train)
    steps = {"usual": usual and usual_step(config, usual), "largest": step_bounds(config)}
    scoring = teacher if config.teacher_scores else None
    found = {name: seconds(config, student, scoring, runtime, on, step) for name, step in steps.items() if step}
    yield f"{f'seconds of a step on {on}':30}" + "".join(f"{name:>16}" for name in found)
    for phase in found["largest"]:
        yield f"{phase:30}" + "".join(f"{column[phase]:16.1f}" for column in found.values())
    yield f"{'total':30}" + "".join(f"{sum(column.values()):16.1f}" for column in found.values())
    if usual and "usual" in found:
        yield (
            f"usual: {usual.turns:g} turns of a prompt of {usual.prompt_tokens:g} tokens and a response of "
            f"{usual.response_tokens:g}"
        )
    yield "an estimate (docs/gpus.md); not counted: the environment's own time, evaluations, checkpoints"


def _engine(runtime: Runtime) -> str:
    """Return a line about the rollout engine: its name, what it plays at a time, and whether it sleeps."""
    room, size = runtime.room, runtime.memory
    plays = f"rollouts by {runtime.engine}, {room.concurrency} trajectories at a time"
    if size is None:
        return plays
    kept = f"{FILLED:.0%} of the GPU's {size / 2**30:.0f} GiB"
    why = f"it would not fit beside the trainer into {kept}, or rollout.sleep=on" if room.sleeps else f"within {kept}"
    return f"{plays}; the engine {'sleeps between rollouts' if room.sleeps else 'keeps its memory'} ({why})"


def _memory_choices(config: Config, found: preflight.Found) -> Iterator[str]:
    """Yield a line about what the student and the teacher do to fit the memory of a GPU; none on a CPU."""
    runtime, asked = found.runtime, config.student.gradient_checkpointing
    if runtime.memory is None or found.plan is None:
        return
    why = f"student.gradient_checkpointing={str(asked).lower()}"
    if asked == "auto" and runtime.checkpointing:
        why = "it would not fit otherwise"
    elif asked == "auto":
        why = "it fits without" if found.models["student"].body.supports_gradient_checkpointing else "it cannot"
    line = f"memory: the student {'recomputes' if runtime.checkpointing else 'keeps'} its activations ({why})"
    if config.teacher_scores:
        how = "gathered once a step" if runtime.gathered else "gathered block by block, as it does not fit whole,"
        line += f"; the teacher is {how} and scores {runtime.joined} of the student's micro-batches at a time"
    yield line


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
