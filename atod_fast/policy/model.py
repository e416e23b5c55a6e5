"""A transformers causal language model as the trainer uses it: a backbone, and a head that sees only action tokens.

`CausalPolicy.forward` is the only entry point: calling the backbone directly would bypass the root's FSDP hooks.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from atod_kernels import TokenDivergence, TokenLogprob, linear_divergence, linear_logprob, linear_token_loss
from torch import Tensor, nn
from transformers import PreTrainedModel

from atod_fast.batches import Batch
from atod_fast.models import VARLEN, reaches, recurrent
from atod_fast.policy.attention import row_options, told_of_rows
from atod_fast.policy.layout import Logits, find_layout, find_logits


class TeacherHead(NamedTuple):
    """The teacher's head as plain, unsharded tensors: custom operators take no mix of DTensors and tensors."""

    weight: Tensor  # [V_t, H_t]
    bias: Tensor | None = None  # [V_t]
    softcap: float | None = None  # of the unscaled logits
    scale: float = 1.0


class Comparison(NamedTuple):
    """The teacher's whole distribution at A action tokens, and the divergence from it that is wanted."""

    hidden: Tensor  # [A, H_t]
    head: TeacherHead
    divergence: str = "reverse_kl"  # of atod_kernels.linear_divergence
    alpha: float = 0.5


class Loss(NamedTuple):
    """A loss whose gradients the head forms in its forward pass."""

    function: Callable[..., Tensor]  # (statistics, **inputs) -> [A], each token by itself
    inputs: Mapping[str, Tensor]  # [A] each
    schedule: str = "auto"  # this and `check` are linear_token_loss's
    check: bool = False


class HeadJob(NamedTuple):
    """What the head computes for A action tokens: log-probs and entropies, and what else is asked for."""

    target: Tensor  # [A] int64
    temperature: float
    valid_columns: Tensor | None = None  # bool [V], of the student
    teacher: Comparison | None = None
    loss: Loss | None = None


HeadOutput = TokenDivergence | TokenLogprob | tuple[Tensor, TokenDivergence | TokenLogprob]


class Head(nn.Module):
    """The language-model head. Its forward is the fused operator, which makes no [tokens, vocabulary] matrix.

    Logits are softcap * tanh(scale * (weight @ hidden + bias) / softcap), as the model's own. The operator has no
    scale: it gets the temperature and the softcap divided by it. As this is a module's own forward, FSDP2 unshards the
    weight before it and reduces its gradient after it. Do not checkpoint its activations: that would form a loss's
    gradients twice.
    """

    def __init__(self, linear: nn.Linear, logits: Logits):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.scale = logits.scale
        self.softcap = None if logits.softcap is None else logits.softcap / logits.scale

    def forward(self, hidden: Tensor, job: HeadJob) -> HeadOutput:
        """Return fp32 statistics [A] of the next-token distributions at hidden [A, H], at the job's temperature.

        With a loss, return its sum over the tokens and the statistics. Its gradients are formed here; the statistics
        carry none.
        """
        options: dict[str, Any] = {"temperature": job.temperature / self.scale, "softcap": self.softcap}
        options |= {"target": job.target, "valid_columns": job.valid_columns}
        if job.teacher is None and job.loss is None:
            # The mask has the student's width; the columns by which a padded teacher differs hold no token.
            if job.valid_columns is not None and (missing := self.weight.shape[0] - len(job.valid_columns)):
                options["valid_columns"] = nn.functional.pad(job.valid_columns, (0, missing))
            return linear_logprob(hidden, self.weight, bias=self.bias, **options)
        options["student_bias"] = self.bias
        if job.teacher is not None:
            teacher_hidden, head, divergence, alpha = job.teacher
            options |= {"teacher_hidden": teacher_hidden, "teacher_weight": head.weight, "teacher_bias": head.bias}
            options |= {"teacher_softcap": head.softcap, "teacher_scale": head.scale / self.scale}
            options |= {"divergence": divergence, "alpha": alpha}
        if job.loss is None:
            return linear_divergence(hidden, self.weight, **options)
        function, inputs, schedule, check = job.loss
        return linear_token_loss(
            function, hidden, self.weight, inputs=inputs, schedule=schedule, check=check, **options
        )


class CausalPolicy(nn.Module):
    """Backbone and head; parameter names are those of the Hugging Face checkpoint."""

    def __init__(self, source: PreTrainedModel):
        """Raise UserError for a model whose parts or logits are not supported."""
        super().__init__()
        self.config, self.generation_config = source.config, source.generation_config
        self.layout = find_layout(source)
        logits, linear = find_logits(source, self.layout), self.layout.parts(source).head
        for name, child in source.named_children():
            self.add_module(name, Head(linear, logits) if child is linear else child)
        self.parts = self.layout.parts(self, Head)
        self.tied = self.layout.tied
        self.compute_dtype = self.parts.head.weight.dtype  # until `shard` says otherwise
        self.recurrent = recurrent(source)
        # Models without an argument for positions count them themselves, or need none.
        self.takes_positions = "position_ids" in inspect.signature(type(self.parts.backbone).forward).parameters
        # Chunks count from a row's start.
        chunked = any(reach.kind == "chunked_attention" for reach in reaches(self.config))
        # Rows may be packed end to end if every layer is an attention that skips other rows' tokens at no cost.
        skips = self.config._attn_implementation in (VARLEN, "flash_attention_2")
        self.packs = skips and not self.recurrent and not chunked and self.takes_positions and told_of_rows(source)

    def train(self, mode: bool = True) -> CausalPolicy:
        """Keep evaluation mode, so that scoring and update compute alike: no dropout, no router noise.

        Only modules that recompute activations in the backward pass are put in training mode.
        """
        super().train(False)
        for module in self.modules():
            if mode and getattr(module, "gradient_checkpointing", False):
                module.training = True
        return self

    def forward(self, batch: Batch, job: HeadJob | None) -> HeadOutput | Tensor:
        """Return the head's output for the action tokens, or without a job their final hidden states [A, H]."""
        options = {"position_ids": batch.position_ids} if self.takes_positions else {}
        if self.packs:  # without them, flash_attention_2 would look for rows in the positions, in every layer
            options |= row_options(batch.row_starts, batch.longest)
        hidden = self.parts.backbone(input_ids=batch.input_ids, use_cache=False, **options).last_hidden_state
        # Some families keep their residual stream, and so these hidden states, in fp32.
        hidden = hidden.flatten(0, 1).index_select(0, batch.index).to(self.compute_dtype)
        return hidden if job is None else self.parts.head(hidden, job)
