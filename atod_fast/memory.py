"""What a rank holds in memory, by phase of a step, and with that how much room its rollout engine gets.

Sizes are upper bounds by formula (each stated where it is computed), without allocator slack and CUDA context.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from atod_kernels import MIXTURES
from atod_kernels.problem import TILE
from transformers import PreTrainedModel

from atod_fast.config import Config
from atod_fast.models import Attention, attention_shape
from atod_fast.objective import FULL_VOCABULARY
from atod_fast.policy.layout import find_layout
from atod_fast.policy.sharding import RESHARD_PARAMETERS
from atod_fast.rollout.engines.protocol import Room
from atod_fast.rollout.engines.vllm import limits
from atod_fast.runtime import Runtime

PHASES = ("teacher's eval", "rollout", "score", "update")
CACHE = "rollout engine, KV cache"


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


# Of a GPU's memory, what the plan may fill: the rest is for the CUDA context, nccl's buffers and fragmentation.
FILLED = 0.85
# Of the cache that an engine could have if it slept, what must be left for it to stay awake. Typical sequences are much
# shorter than the greatest length, for which the cache is sized.
ENOUGH = 0.5
# An estimate, not measured yet: what vLLM's captured CUDA graphs hold, also while it sleeps.
GRAPHS = 1.5 * 2**30  # bytes


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
    """Yield what a rank holds and when. P parameters and c bytes per element of student or teacher, W ranks.

    teacher: None if it neither scores nor plays.

    Masters 4P/W, gradients 4P/W, AdamW 8P/W; the frozen teacher cP/W. The head's op adds the fp32 gradients of the
    hidden states [A, H] and of its weight [V, H] to its tiles, A being the action tokens of a micro-batch; if lean, it
    keeps no logits and rounds the weight's gradient slice by slice. For the rollout engine see `engine_memory`.
    """
    ranks, device = runtime.ranks, runtime.device
    c, ct = runtime.student_dtype.itemsize, runtime.teacher_dtype.itemsize
    step, rollout, objective = step_bounds(config), config.rollout, config.objective
    scores, plays = config.teacher_scores, config.teacher_plays
    exact_loss = scores and objective.divergence in FULL_VOCABULARY
    exact = exact_loss or (scores and config.turns.disagreement == "exact")
    mixture = scores and objective.divergence in MIXTURES
    share = -(-step.action_tokens // ranks)
    micro = min(max(config.train.microbatch_tokens, rollout.longest), -(-step.tokens // ranks))
    phases = PHASES if plays else PHASES[1:]

    yield Item("student, fp32 masters", 4 * student.parameters / ranks, phases)
    yield Item("student, AdamW moments", 8 * student.parameters / ranks, PHASES[1:])
    yield Item("student, gradients", 4 * student.parameters / ranks, ("update",))
    yield Item("student, gathered", gathered(student, c), ("score", "update"))
    yield Item("student, gradients to reduce", min(student.parameters, student.root + student.block) * c, ("update",))
    if teacher is not None and scores:
        if not config.teacher.offload:
            yield Item("teacher, shard", ct * teacher.parameters / ranks, phases)
        yield Item("teacher, gathered", gathered(teacher, ct), ("score",))
        if exact_loss:
            yield Item("teacher, head", teacher.root * ct, ("update",))
        if exact:
            held = ("score", "update") if exact_loss else ("score",)
            yield Item("teacher, final hidden states", share * teacher.hidden * ct, held)

    yield from engine_memory(config, student, runtime, phases)
    if teacher is not None and plays:
        tokens = runtime.teacher_room.concurrency * rollout.longest
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


def engine_memory(config: Config, model: Shape, runtime: Runtime, phases: tuple[str, ...]) -> Iterator[Item]:
    """Yield what the rollout engine of `model` holds in `phases`.

    Asleep, vLLM holds neither weights nor cache, and the transformers engine no cache. On CUDA vLLM also holds CUDA
    graphs, and in a rollout the fp32 logits of all sequences four times (as they come, masked, as log-probs, with
    noise) and one batch's activations in the widest part of a block.
    """
    c, room, rollout = runtime.student_dtype.itemsize, runtime.room, config.rollout
    awake = ("rollout",) if room.sleeps else phases
    if runtime.engine != "vllm":
        yield Item("rollout engine, weights", model.parameters * c, phases)
        yield Item(CACHE, room.concurrency * rollout.longest * cache_line(model, c), awake)
        return
    together = rollout.tensor_parallel
    yield Item("rollout engine, weights", model.parameters * c / together, awake)
    yield Item(CACHE, room.cache_bytes, awake)
    if runtime.device.type == "cuda":
        if not rollout.enforce_eager:
            yield Item("rollout engine, CUDA graphs", GRAPHS, phases)
        batch = limits.batch_tokens(runtime.device, rollout.longest, room.concurrency)
        widest = 4 * model.hidden + 3 * model.intermediate / together
        workspace = 4 * 4 * room.concurrency * model.vocabulary + batch * widest * c
        yield Item("rollout engine, workspace", workspace, ("rollout",))


def totals(items: Iterable[Item]) -> dict[str, float]:
    """Return the bytes held in each phase."""
    found: dict[str, float] = {phase: 0.0 for phase in PHASES}
    for item in items:
        for phase in item.phases:
            found[phase] += item.size
    return found


def device_bytes(device: torch.device) -> int | None:
    """Return the memory of a GPU in bytes, None for a CPU."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def room_beside(config: Config, student: Shape, teacher: Shape | None, runtime: Runtime) -> Room:
    """Return the room that a training run has for its rollout engine on this rank's device.

    On a GPU the cache gets what the plan leaves at most, unless `rollout.kv_cache_gib` gives its size. With
    `rollout.sleep=auto` the engine sleeps only if it does not fit beside the trainer's largest phase, with at least
    half of the cache that it would have otherwise.
    """
    return _fitted(config, student, runtime, lambda room: memory(config, student, teacher, replace(runtime, room=room)))


def room_alone(config: Config, model: Shape, runtime: Runtime) -> Room:
    """Return the room of an engine without a trainer: an evaluation's, which does not sleep."""
    runtime = replace(runtime, room=replace(runtime.room, sleeps=False))
    phases = ("rollout",)
    return _fitted(
        config, model, runtime, lambda room: engine_memory(config, model, replace(runtime, room=room), phases)
    )


def _fitted(config: Config, model: Shape, runtime: Runtime, items: Callable[[Room], Iterable[Item]]) -> Room:
    room, size = runtime.room, device_bytes(runtime.device)
    if size is None:
        return room
    heads = Attention(model.layers, model.heads, model.kv_heads, model.head_dim)
    least = limits.cache_bytes(config, heads, runtime.student_dtype, 1)

    def bounded(room: Room) -> Room:
        if not room.cache_bytes or config.rollout.kv_cache_gib:
            return room
        others = list(items(replace(room, cache_bytes=0)))
        phases = next(item.phases for item in others if item.name == CACHE)
        left = FILLED * size - max(totals(others)[phase] for phase in phases)
        return replace(room, cache_bytes=int(min(room.cache_bytes, max(left, least))))

    room, awake = bounded(room), bounded(replace(room, sleeps=False))
    fits = max(totals(items(awake)).values()) <= FILLED * size and awake.cache_bytes >= ENOUGH * room.cache_bytes
    return awake if config.rollout.sleep == "auto" and fits else room
