"""Predicts the seconds of a training step by phase on named GPUs, from sizes alone.

A phase is matrix products at a share of the GPU's peak, plus the memory traffic of everything between them, or what
FSDP2 gathers meanwhile if that takes longer. docs/gpus.md compares the prediction with measured steps.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil

from atod_fast.config import Config
from atod_fast.machines import GPU, Machines
from atod_fast.objective import FULL_VOCABULARY
from atod_fast.plan.shapes import RESHARD_PARAMETERS, Shape, block_activations, cache_line
from atod_fast.plan.tokens import Step
from atod_fast.runtime import Runtime

# Bytes that transformers' eager Qwen3 block moves for each byte that it keeps for a backward pass, counted operation by
# operation (bench/traffic.py). liger-kernel's norms, rotations and gates move less: assumed half.
FORWARD, BACKWARD, LIGER = 4.84, 10.75, 0.5
VLLM_STEP = 2e-3  # seconds a decode step of vLLM takes beside reading weights and cache: assumed
HOST = 2.1e-7  # seconds a token on the host, on a loaded CPU (bench/results/host_side.md)


@dataclass(frozen=True, slots=True)
class _Work:
    """What one rank does with one model."""

    shape: Shape
    bytes: int  # of an element of the compute dtype
    gpu: GPU
    context: float  # mean tokens of a row
    shards: int  # ranks that a parameter is spread over
    traffic: float = 1.0  # relative to transformers' eager blocks

    def products(self, tokens: float) -> float:
        """Return the seconds of the blocks' matrix products in a forward pass."""
        attention = 2 * self.shape.heads * self.shape.head_dim * self.context
        return tokens * self.shape.layers * 2 * (self.shape.active + attention) / self.gpu.products

    def between(self, tokens: float, factor: float) -> float:
        """Return the seconds of the blocks' other operations, which move `factor` times the bytes they keep."""
        kept = self.shape.layers * block_activations(self.shape, self.bytes)
        return tokens * kept * factor * self.traffic / self.gpu.bandwidth

    def head(self, tokens: float, products: int, moved: int) -> float:
        """Return the seconds of a head: `products` products, and `moved` bytes a logit."""
        logits = tokens * self.shape.vocabulary
        seconds = 2 * products * logits * self.shape.hidden / self.gpu.products
        return seconds + moved * logits / self.gpu.bandwidth

    def gather(self, passes: float) -> float:
        """Return the seconds in which FSDP2 gathers (or, at another width, reduces) all parameters `passes` times."""
        sent = self.bytes * self.shape.parameters * (self.shards - 1) / self.shards
        return passes * sent / self.gpu.link

    def forward(self, tokens: float, passes: int) -> float:
        """Return the seconds of a forward pass of the backbone in `passes` micro-batches."""
        passes = passes if self.shape.parameters > RESHARD_PARAMETERS else 1
        return max(self.products(tokens) + self.between(tokens, FORWARD), self.gather(passes))


def seconds(
    config: Config, student: Shape, teacher: Shape | None, runtime: Runtime, machines: Machines, step: Step
) -> dict[str, float]:
    """Return the predicted seconds of each phase of a step with the rows and tokens of `step`.

    Not counted: the environments' own time, an engine's falling asleep and waking up, further rounds for flat groups,
    evaluations and checkpoints.
    """
    gpu, ranks = machines.gpu, machines.ranks
    tokens, actions = step.tokens / ranks, step.action_tokens / ranks
    context = step.tokens / max(1, step.rows)
    epochs = config.train.epochs
    updates = step.updates // epochs  # of an epoch
    passes = max(updates, ceil(tokens / config.train.microbatch_tokens))
    c = runtime.student_dtype.itemsize
    own = _Work(student, c, gpu, context, runtime.shards, _traffic(student, c, runtime))
    found = {"rollout": _rollout(config, own, runtime, step, ranks)}
    exact_loss = teacher is not None and config.objective.divergence in FULL_VOCABULARY
    exact = exact_loss or (teacher is not None and config.turns.disagreement == "exact")
    if teacher is not None:
        ct = runtime.teacher_dtype.itemsize
        theirs = _Work(teacher, ct, gpu, context, runtime.shards, _traffic(teacher, ct, runtime))
        gathers = 1 if runtime.gathered else -(-passes // runtime.joined)
        found["teacher"] = theirs.forward(tokens, gathers) + (0 if exact else theirs.head(actions, 1, 8))
    found["score"] = own.forward(tokens, passes) + own.head(actions, 1, 8)
    if exact:
        found["score"] += theirs.head(actions, 1, 8)
    again = runtime.checkpointing
    computed = own.products(tokens) * (3 + again) + own.between(tokens, FORWARD * (1 + again) + BACKWARD)
    reduced = own.gather(passes) * 4 / own.bytes  # gradients in fp32
    between_nodes = 0.0
    if runtime.shards < ranks:  # their shards' sum over the nodes, once an update, there and back
        between_nodes = step.updates * 2 * 4 * student.parameters / runtime.shards / gpu.network
    epoch = max(computed, own.gather(2 * passes) + reduced) + own.head(actions, 3, 18)
    if exact_loss:
        epoch += theirs.head(actions, 1, 18)
    found["update"] = epochs * epoch + between_nodes
    if config.objective.ratio == "sequence":  # a forward pass before every update but the first
        found["update"] += (epochs - 1 / updates) * (own.forward(tokens, passes) + own.head(actions, 1, 8))
    # AdamW reads and writes master, two moments and gradient, the clipping reads and scales the gradient.
    found["optimiser"] = step.updates * 40 * student.parameters / runtime.shards / gpu.bandwidth
    found["resync"] = own.gather(1) + 2 * own.bytes * student.parameters / gpu.bandwidth
    found["host"] = step.tokens * HOST
    return found


def _traffic(shape: Shape, bytes_: int, runtime: Runtime) -> float:
    """Return the bytes that a model's blocks move, relative to transformers' eager ones."""
    if runtime.compiled:  # the compiler joins the same operations as liger-kernel, and more
        return LIGER
    if not runtime.liger:
        return 1.0
    stays = shape.intermediate * 4 + shape.hidden * 2 * shape.routed if shape.routed else 0  # liger has no experts
    return 1 - (1 - LIGER) * (1 - stays * bytes_ / block_activations(shape, bytes_))


def _rollout(config: Config, own: _Work, runtime: Runtime, step: Step, ranks: int) -> float:
    """Return the seconds of a rollout whose trajectories all take the same number of turns and tokens."""
    shape, gpu, together = own.shape, own.gpu, config.rollout.tensor_parallel
    share = step.trajectories * together / ranks
    at_once = min(share, runtime.room.concurrency)
    waves = -(-share // at_once)
    decode_steps = waves * step.action_tokens / step.trajectories
    prompts = (step.tokens - step.action_tokens) / ranks
    if runtime.engine != "vllm":
        return decode_steps * shape.layers * gpu.decode_layer + own.products(prompts) + own.between(prompts, FORWARD)
    read = shape.root + shape.layers * min(shape.block, shape.active * at_once)  # of experts, those that are used
    read = own.bytes * read + at_once * own.context * cache_line(shape, own.bytes)
    each = read / together / gpu.bandwidth + VLLM_STEP
    joined = replace(own, traffic=LIGER)  # vLLM's own kernels, about as liger-kernel's
    return decode_steps * each + joined.products(prompts) + joined.between(prompts, FORWARD)
