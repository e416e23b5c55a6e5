"""Logits in fp32 of a model that computes in 16 bits, as the trainer computes them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

ROWS = 8192  # rows of the weight that are held in fp32 at a time, where a product cannot accumulate into fp32


class _Exact(nn.Linear):
    """A linear layer whose products of 16-bit operands are accumulated and returned in fp32."""

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        if weight.dtype == torch.float32:
            return super().forward(input)
        if input.is_cuda:
            flat = input.flatten(0, -2)
            logits = torch.mm(flat, weight.t(), out_dtype=torch.float32).unflatten(0, input.shape[:-1])
        else:
            parts = [nn.functional.linear(input.float(), part.float()) for part in weight.split(ROWS)]
            logits = torch.cat(parts, -1)
        return logits if bias is None else logits + bias.float()


def compute_logits_in_fp32(model: PreTrainedModel) -> None:
    """Make the model's head return fp32 logits, from products of its 16-bit weight accumulated in fp32.

    A head in fp32, or one that is more than a linear layer, computes what it did.
    """
    head = model.get_output_embeddings()
    if isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward:
        head.__class__ = _Exact  # a function in its place would keep the head alive after the model
