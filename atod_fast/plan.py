"""`--dry-run`: whether the run would start, the resolved settings, and the tokens and memory of a step.

The output is TOML with the plan in comments: `--dry-run > my.toml` is a start for your own settings file. Memory is an
upper bound by formula (each stated where it is computed), without allocator slack, CUDA context and kernels'
workspaces.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from atod_kernels import MIXTURES
from atod_kernels.problem import TILE
from transformers import PreTrainedModel

from atod_fast import preflight
from atod_fast.config import Config
from atod_fast.config.settings import demo_values_warning, same_tasks, to_toml
from atod_fast.models import attention_shape
from atod_fast.objective import FULL_VOCABULARY
from atod_fast.policy.layout import find_layout
from atod_fast.policy.sharding import RESHARD_PARAMETERS
from atod_fast.runtime import Runtime, used_models

PHASES = ("teacher's eval", "rollout", "score", "update")


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of one causal language model. Parameters are counted once where they are shared."""

    parameters: int
    block: int  # parameters of the largest block
    root: int  # parameters outside the blocks: embedding, last norm, head
    layers: int
    hidden: int
    intermediate: int  # of the feed-forward parts one token passes through
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int


@dataclass(frozen=True, slots=True)
class Step:
    """Upper bounds of one training step over all ranks."""

    trajectories: int
    turns: int
    rows: int
    tokens: int
    action_tokens: int
    updates: int


@dataclass(frozen=True, slots=True)
class Item:
    """One use of memory on a rank, and the phases that hold it."""

    name: str
    size: float  # bytes
    phases: tuple[str, ...]


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
    lines += _attention(config, found)
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
    lines = [*same_tasks(config), *lines]
    return to_toml(config) + "\n" + "\n".join(f"# {line}".rstrip() for line in lines)


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


def shape_of(model: PreTrainedModel) -> Shape:
    """Return the sizes of a model, which may be on the meta device. Raises UserError if its layout is unknown."""
    config = model.config
    blocks = [sum(p.numel() for p in block.parameters()) for block in find_layout(model).parts(model).blocks]
    text = config.get_text_config(decoder=True)
    parameters = sum(p.numel() for p in model.parameters())
    return Shape(
        parameters=parameters,
        block=max(blocks),
        root=parameters - sum(blocks),
        hidden=text.hidden_size,
        intermediate=_intermediate(text),
        **attention_shape(config)._asdict(),
        vocabulary=text.vocab_size,
    )


def _intermediate(text) -> int:
    """Return the width of the feed-forward parts that one token passes through: all its experts, or the only one.

    Four times the hidden size if the configuration does not say.
    """
    names = ("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner")
    width = next((value for name in names if (value := getattr(text, name, None)) is not None), 4 * text.hidden_size)
    experts = getattr(text, "num_experts_per_tok", None)
    if experts:
        return experts * (getattr(text, "moe_intermediate_size", None) or width)
    return max(width) if isinstance(width, list | tuple) else width


def step_bounds(config: Config) -> Step:
    """Return a step's upper bounds: all turns are played, all prompts and responses have the greatest length."""
    train, rollout = config.train, config.rollout
    trajectories = train.tasks_per_step * train.group_size
    turns = trajectories * config.env.max_turns
    rows = turns if rollout.context == "window" else trajectories
    tokens = rows * rollout.longest
    updates = -(-rows // train.minibatch_rows) if train.minibatch_rows else 1
    return Step(trajectories, turns, rows, tokens, min(tokens, turns * rollout.response_tokens), updates * train.epochs)


def block_activations(shape: Shape, bytes_: int) -> int:
    """Return the bytes per token that a block keeps for its backward pass: transformers' Qwen3 block without liger.

    With c bytes an element, H hidden, I intermediate, N + K query and key heads of D:

        2 H (4 + 2c)          two RMSNorms: input in fp32, normalised, scaled
        (N + K) D (4 + 3c)    query and key norm likewise, rotated; attention's output and value
        4 c I                 gate, its SiLU, up, their product
        4 (2N + K + 2)        the norms' and the softmax's fp32 normalisers
    """
    heads, kv = shape.heads, shape.kv_heads
    return (
        2 * shape.hidden * (4 + 2 * bytes_)
        + (heads + kv) * shape.head_dim * (4 + 3 * bytes_)
        + 4 * bytes_ * shape.intermediate
        + 4 * (2 * heads + kv + 2)
    )


def activations(shape: Shape, bytes_: int, checkpointing: bool) -> int:
    """Return the bytes per token that a forward pass keeps: the last norm and all blocks.

    With checkpointing: the last norm, every block's input and one block.
    """
    block = block_activations(shape, bytes_)
    kept = shape.layers * bytes_ * shape.hidden + block if checkpointing else shape.layers * block
    return kept + shape.hidden * (4 + bytes_)


def gathered(shape: Shape, bytes_: int) -> int:
    """Return the bytes of the parameters that FSDP2 gathers: root and two blocks, or all of a small model."""
    whole = (
        shape.parameters
        if shape.parameters <= RESHARD_PARAMETERS
        else min(shape.parameters, shape.root + 2 * shape.block)
    )
    return whole * bytes_


def cache_line(shape: Shape, bytes_: int) -> int:
    """Return the bytes of key/value cache per token: key and value of every layer."""
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * bytes_


def head_tiles(shape: Shape, kept: int, device: torch.device) -> int:
    """Return the bytes of logits held at a time: four fp32 tiles, and whole rows of `kept` models.

    kept: how many models' logits are needed twice.
    """
    rows, columns = TILE["cpu" if device.type == "cpu" else "accelerator"]
    return 4 * rows * (4 * columns + kept * max(columns, shape.vocabulary))


def memory(config: Config, student: Shape, teacher: Shape | None, runtime: Runtime) -> Iterator[Item]:
    """Yield what a rank holds and when. P parameters and c bytes per element of student or teacher, W ranks that
    share a copy of the parameters.

    teacher: None if it neither scores nor plays.

    Masters 4P/W, gradients 4P/W, AdamW 8P/W; the frozen teacher cP/W. The head's op adds the fp32 gradients of the
    hidden states [A, H] and of its weight [V, H] to its tiles, A being the action tokens of a micro-batch; if lean, it
    keeps no logits and rounds the weight's gradient slice by slice. On CUDA an engine sleeps in scoring and updates:
    vLLM frees weights and cache, the transformers engine its cache.
    """
    ranks, shards, device = runtime.ranks, runtime.shards, runtime.device
    c, ct = runtime.student_dtype.itemsize, runtime.teacher_dtype.itemsize
    step, rollout, objective = step_bounds(config), config.rollout, config.objective
    scores, plays = config.teacher_scores, config.teacher_plays
    exact_loss = scores and objective.divergence in FULL_VOCABULARY
    exact = exact_loss or (scores and config.turns.disagreement == "exact")
    mixture = scores and objective.divergence in MIXTURES
    share = -(-step.action_tokens // ranks)
    micro = min(max(config.train.microbatch_tokens, rollout.longest), -(-step.tokens // ranks))
    phases = PHASES if plays else PHASES[1:]

    yield Item("student, fp32 masters", 4 * student.parameters / shards, phases)
    yield Item("student, AdamW moments", 8 * student.parameters / shards, PHASES[1:])
    yield Item("student, gradients", 4 * student.parameters / shards, ("update",))
    yield Item("student, gathered", gathered(student, c), ("score", "update"))
    yield Item("student, gradients to reduce", min(student.parameters, student.root + student.block) * c, ("update",))
    if teacher is not None and scores:
        if not config.teacher.offload:
            yield Item("teacher, shard", ct * teacher.parameters / shards, phases)
        yield Item("teacher, gathered", gathered(teacher, ct), ("score",))
        if exact_loss:
            yield Item("teacher, head", teacher.root * ct, ("update",))
        if exact:
            held = ("score", "update") if exact_loss else ("score",)
            yield Item("teacher, final hidden states", share * teacher.hidden * ct, held)

    tokens = rollout.concurrency * rollout.longest
    cache = tokens * cache_line(student, c)
    vllm, together = runtime.engine == "vllm", rollout.tensor_parallel
    if vllm:
        cache = rollout.kv_cache_gib * 2**30 or cache / together
    awake = ("rollout",) if device.type == "cuda" else phases
    yield Item("rollout engine, weights", student.parameters * c / together, awake if vllm else phases)
    yield Item("rollout engine, KV cache", cache, awake)
    if teacher is not None and plays:
        yield Item("teacher's engine", teacher.parameters * c + tokens * cache_line(teacher, c), PHASES[:1])

    yield Item("activations", micro * block_activations(student, c), ("score",))
    yield Item("activations", micro * activations(student, c, config.student.gradient_checkpointing), ("update",))
    lean = config.student.head == "lean"
    yield Item("head, logit tiles", head_tiles(student, 2 * mixture, device), ("score",))
    yield Item("head, logit tiles", head_tiles(student, 0 if lean else 1 + exact_loss, device), ("update",))
    yield Item(
        "head, fp32 gradients",
        4 * student.hidden * (min(micro, share) + (0 if lean else student.vocabulary)),
        ("update",),
    )


def _table(items: list[Item]) -> Iterator[str]:
    """Yield a table with a line per name and a column per phase."""
    cells: dict[str, dict[str, float]] = {}
    for item in items:
        for phase in item.phases:
            cells.setdefault(item.name, {})[phase] = item.size
    phases = [phase for phase in PHASES if any(phase in line for line in cells.values())]
    cells["total"] = {phase: sum(line.get(phase, 0.0) for line in cells.values()) for phase in phases}
    unit, name = (2**30, "GiB") if max(cells["total"].values()) >= 2**30 else (2**20, "MiB")
    yield f"{f'memory of a rank, {name}':30}" + "".join(f"{phase:>16}" for phase in phases)
    for title, line in cells.items():
        yield f"{title:30}" + "".join(f"{line[phase] / unit:16.2f}" if phase in line else " " * 16 for phase in phases)
