"""Distil a model in a plain training loop, with `atod_kernels` and transformers but without the trainer.

The loss is the exact reverse KL over the full vocabulary. It is computed from the last hidden states, so that no
[tokens, vocabulary] matrix of logits is made. To use your own models, load them by
`AutoModelForCausalLM.from_pretrained`.

python examples/kernels_in_a_training_loop.py      two small random models, on a GPU if there is one
"""

import torch
from atod_kernels import linear_token_loss
from transformers import Qwen3Config, Qwen3ForCausalLM


def small_model(seed: int, hidden: int) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": 2, "vocab_size": 1000}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "initializer_range": 0.1}
    return Qwen3ForCausalLM(Qwen3Config(**sizes, **heads, dtype="float32"))


def distil(student, teacher, ids, mask) -> torch.Tensor:
    """Return the mean reverse KL (student to teacher), a scalar, over the tokens of ids [B, L] that `mask` [B, L]
    marks."""
    with torch.no_grad():
        teacher_hidden = teacher.model(ids).last_hidden_state[:, :-1].flatten(0, 1)
    hidden = student.model(ids).last_hidden_state[:, :-1].flatten(0, 1)
    target = ids[:, 1:].masked_fill(~mask[:, 1:], -100).flatten()  # tokens of -100 are ignored
    count = (target != -100).sum().clamp(min=1)
    heads = hidden, student.lm_head.weight, teacher_hidden, teacher.lm_head.weight
    return linear_token_loss(lambda token, count: token.divergence / count, *heads, target, inputs={"count": count})[0]


def main(steps: int = 20) -> list[float]:
    """Train for some steps; return the loss of each."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    teacher, student = (small_model(seed, hidden).to(device) for seed, hidden in ((0, 64), (1, 32)))
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    losses = []
    for step in range(steps):
        ids = torch.randint(0, 1000, (8, 32), generator=torch.Generator().manual_seed(step)).to(device)
        mask = torch.arange(32, device=device).expand_as(ids) >= 8  # the first 8 tokens are a prompt
        loss = distil(student, teacher, ids, mask)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(f"reverse KL {losses[0]:.3f} at first, {losses[-1]:.3f} after {steps} steps, on {device}")
    return losses


if __name__ == "__main__":
    main()
