"""A transformers causal language model as the trainer uses it: backbone, then a head fed only the action tokens.

`CausalPolicy.forward` is the only entry: calling the backbone by itself would bypass the root's FSDP hooks.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from atod_kernels import TokenDivergence, TokenLogprob, linear_divergence, linear_logprob, linear_token_loss
from torch import Tensor, nn
from transformers import PreTrainedModel

from atod_fast.config import Student, Teacher
from atod_fast.errors import UserError
from atod_fast.models import attention_of, dtype_of, load_model
from atod_fast.trajectory import Batch


class HeadJob(NamedTuple):
    """What the head computes for A action tokens. With hidden states of the teacher, divergences from it too."""

    target: Tensor  # [A] int64
    temperature: float
    valid_columns: Tensor | None = None  # bool [V], of the student
    divergence: str = "reverse_kl"  # of atod_kernels.linear_divergence
    alpha: float = 0.5
    teacher_hidden: Tensor | None = None  # [A, H_t]
    teacher_weight: Tensor | None = None  # [V_t, H_t]
    teacher_bias: Tensor | None = None  # [V_t]
    teacher_softcap: float | None = None
    loss: Callable[..., Tensor] | None = None  # loss(statistics, **inputs) -> [A], token by token; None: statistics alone
    inputs: Mapping[str, Tensor] = {}  # [A] each
    schedule: str = "auto"  # of atod_kernels.linear_token_loss, as `check`
    check: bool = False


HeadOutput = TokenDivergence | TokenLogprob | tuple[Tensor, TokenDivergence | TokenLogprob]


class Head(nn.Module):
    """The language-model head whose forward is the fused operator: no [tokens, vocabulary] matrix is made.

    As the module's own forward, FSDP2 unshards the weight before it and reduces its gradient after it. Activation
    checkpointing must stay outside: it would form the gradients of a loss twice.
    """

    def __init__(self, linear: nn.Linear, softcap: float | None):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.softcap = softcap

    def forward(self, hidden: Tensor, job: HeadJob) -> HeadOutput:
        """hidden [A, H] -> fp32 statistics [A] of the next-token distributions, at the job's temperature.

        With a loss: its sum over the tokens and the statistics. Its gradients are formed here, the statistics carry none.
        """
        options = {"temperature": job.temperature, "softcap": self.softcap, "valid_columns": job.valid_columns}
        if job.loss is None and job.teacher_hidden is None:
            # The mask is the student's; a teacher padded to another width has no token in the columns it lacks.
            missing = self.weight.shape[0] - len(job.valid_columns) if job.valid_columns is not None else 0
            options["valid_columns"] = nn.functional.pad(job.valid_columns, (0, missing)) if missing else job.valid_columns
            return linear_logprob(hidden, self.weight, job.target, bias=self.bias, **options)
        options |= {"student_bias": self.bias, "teacher_bias": job.teacher_bias, "teacher_softcap": job.teacher_softcap}
        options |= {"divergence": job.divergence, "alpha": job.alpha}
        operands = hidden, self.weight, job.teacher_hidden, job.teacher_weight, job.target
        if job.loss is None:
            return linear_divergence(*operands, **options)
        return linear_token_loss(job.loss, *operands, inputs=job.inputs, schedule=job.schedule, check=job.check, **options)


class CausalPolicy(nn.Module):
    """Backbone and head; parameter names are those of the Hugging Face checkpoint."""

    def __init__(self, source: PreTrainedModel):
        super().__init__()
        config = source.config
        for key in ("logit_scale", "logits_scaling"):
            if getattr(config, key, None) not in (None, 1, 1.0):
                raise UserError(f"model type {config.model_type!r} scales its logits ({key}), which the head does not support; use another model")
        if not (hasattr(source, "model") and isinstance(getattr(source, "lm_head", None), nn.Linear)):
            raise UserError(f"model type {config.model_type!r} is not a backbone `model` with a linear `lm_head`; use a decoder-only causal language model")
        self.config, self.generation_config = config, source.generation_config
        self.model = source.model
        self.lm_head = Head(source.lm_head, getattr(config, "final_logit_softcapping", None))
        self.tied = source.lm_head.weight is source.get_input_embeddings().weight

    def forward(self, batch: Batch, job: HeadJob | None) -> HeadOutput | Tensor:
        """What the head makes of the action tokens, or with no job their final hidden states [A, H]."""
        hidden = self.model(input_ids=batch.input_ids, position_ids=batch.position_ids, attention_mask=None, use_cache=False).last_hidden_state
        hidden = hidden.flatten(0, 1).index_select(0, batch.index)
        return hidden if job is None else self.lm_head(hidden, job)


def uses_liger(mode: str, device: torch.device) -> bool:
    """Whether `student.liger` means yes on this device; UserError for `on` where it cannot be."""
    present = device.type == "cuda" and importlib.util.find_spec("liger_kernel") is not None
    if mode == "on" and not present:
        raise UserError("student.liger='on' needs CUDA and liger-kernel; pip install 'atod_fast[cuda]' or set student.liger=auto")
    return mode != "off" and present


def apply_liger(model: PreTrainedModel, mode: str, device: torch.device) -> None:
    """liger-kernel's RMSNorm, RoPE and SwiGLU in place of transformers' (its loss heads are not used)."""
    if not uses_liger(mode, device):
        return
    from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance

    _apply_liger_kernel_to_instance(model=model, rope=True, rms_norm=True, swiglu=True, cross_entropy=False, fused_linear_cross_entropy=False)


def build_student(config: Student, device: torch.device) -> CausalPolicy:
    """fp32 masters whatever the checkpoint holds: AdamW at 1e-6 leaves bf16 weights unchanged."""
    model = load_model(config.path, torch.float32, attention_of(config.attention, device, dtype_of(config.compute_dtype, device)))
    apply_liger(model, config.liger, device)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    return CausalPolicy(model)


def build_teacher(config: Teacher, attention: str, device: torch.device) -> CausalPolicy:
    """Frozen, in its compute precision."""
    dtype = dtype_of(config.compute_dtype, device)
    model = load_model(config.path, dtype, attention_of(attention, device, dtype))
    return CausalPolicy(model.eval().requires_grad_(False))
