"""Logits in fp32 of a model that computes in 16 bits, as the trainer computes them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

ROWS = 8192  # rows of the weight that are held in fp32 at a time, where a product cannot accumulate into fp32


def compute_logits_in_fp32(model: PreTrainedModel) -> None:
    """Make the model's head return fp32 logits, from products of its 16-bit weight accumulated in fp32.

    A head in fp32, or one that is more than a linear layer, computes what it did.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        return
    plain = head.forward

    def forward(input: Tensor) -> Tensor:
        weight, bias = head.weight, head.bias
        if weight.dtype == torch.float32:
            return plain(input)
        if input.is_cuda:
            flat = input.flatten(0, -2)
            logits = torch.mm(flat, weight.t(), out_dtype=torch.float32).unflatten(0, input.shape[:-1])
        else:
            parts = [nn.functional.linear(input.float(), part.float()) for part in weight.split(ROWS)]
            logits = torch.cat(parts, -1)
        return logits if bias is None else logits + bias.float()

    head.forward = forward
