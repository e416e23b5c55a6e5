"""Count the bytes that a transformers Qwen3 block moves between its operations, and the kernels that it launches.

    python bench/traffic.py

Every operation of a forward and a backward pass counts its inputs and outputs once, views and allocations apart; what
grows with tokens is told from what does not by two sizes, a block from the rest by one and two layers. Prints bytes a
token and layer, as multiples of what `plan.shapes.block_activations` says is kept: `FORWARD` and `BACKWARD` of
atod_fast/plan/seconds.py.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, Qwen3Config

from atod_fast.plan.shapes import block_activations, shape_of

NO_TRAFFIC = ("empty", "detach", "_unsafe_view", "alias")  # in operators' names


class Traffic(TorchDispatchMode):
    """Counts the bytes that each operator reads and writes, and its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.calls = Counter(), Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        out = operator(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
        if not operator.is_view and not any(name in str(operator) for name in NO_TRAFFIC):
            self.bytes[str(operator)] += sum(map(stored, tensors))
            self.calls[str(operator)] += 1
        return out


def stored(tensor: torch.Tensor) -> int:
    """Return the bytes of a tensor; dimensions it is expanded over count once."""
    size = tensor.element_size()
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        size *= length if stride else 1
    return size


def count(config: Qwen3Config, dtype: torch.dtype, rows: int) -> tuple[Traffic, Traffic]:
    """Return the traffic of a forward and of a backward pass of `rows` rows of 64 tokens."""
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").model
    ids, positions = torch.zeros(rows, 64, dtype=torch.int64), torch.arange(64).expand(rows, -1)
    with Traffic() as forward:
        hidden = model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
    with Traffic() as backward:
        hidden.backward(torch.ones_like(hidden))
    return forward, backward


def main() -> None:
    torch.set_num_threads(1)
    sizes = {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 64}
    print("| hidden | dtype | pass | bytes | times what is kept | launches |\n|---|---|---|---|---|---|")
    for hidden in (1024, 2048):
        for dtype in (torch.bfloat16, torch.float32):
            found = {}
            for layers in (1, 2):
                config = Qwen3Config(
                    hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers, **sizes
                )
                found |= {(layers, rows): count(config, dtype, rows) for rows in (2, 4)}
            with torch.device("meta"):
                shape = shape_of(AutoModelForCausalLM.from_config(config))
            kept = block_activations(shape, dtype.itemsize)
            for number, name in enumerate(("forward", "backward")):
                total = {key: passes[number].bytes.total() for key, passes in found.items()}
                moved = (total[2, 4] - total[1, 4] - total[2, 2] + total[1, 2]) / 128
                calls = found[2, 2][number].calls.total() - found[1, 2][number].calls.total()
                print(f"| {hidden} | {dtype} | {name} | {moved:,.0f} | {moved / kept:.2f} | {calls} |", flush=True)


if __name__ == "__main__":
    main()
