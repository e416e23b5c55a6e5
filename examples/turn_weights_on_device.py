"""Compute T-DUR turn weights for a trainer of your own, on the device that holds its tensors.

A trainer has a student's and a teacher's log-probs of packed action tokens. It wants a weight per token that is high
in turns where the two disagree or the student is unsure (ATOD, arXiv 2606.27814). Offsets delimit turns and
trajectories: turn k is tokens turn_offsets[k]:turn_offsets[k + 1], trajectory n is turns
trajectory_offsets[n]:trajectory_offsets[n + 1].

On a GPU, Triton kernels compute the reductions and the weights without synchronisation; `expand_turns` synchronises
once, to learn the number of tokens. On a CPU the same calls run in torch.

python examples/turn_weights_on_device.py
"""

import torch
from atod_kernels import expand_turns, turn_reduce, turn_weights


def token_weights(logp, teacher_logp, turn_offsets, trajectory_offsets) -> torch.Tensor:
    """Return the T-DUR weights of the tokens, [T]. logp, teacher_logp: [T] fp32; turn_offsets: [K + 1];
    trajectory_offsets: [N + 1]."""
    disagreement = turn_reduce((logp - teacher_logp).abs(), turn_offsets)  # [K]
    uncertainty = turn_reduce(-logp, turn_offsets)  # [K]
    return expand_turns(turn_weights(disagreement, uncertainty, trajectory_offsets), turn_offsets)


def imitation_loss(logp, teacher_logp, turn_offsets, trajectory_offsets) -> torch.Tensor:
    """Return the paper's imitation term as a scalar surrogate loss, -mean_t w_t [log pi_T - log pi_old] log pi,
    differentiable in logp."""
    old_logp = logp.detach()
    weight = token_weights(old_logp, teacher_logp, turn_offsets, trajectory_offsets)
    return -(weight * (teacher_logp - old_logp) * logp).mean()


def main() -> torch.Tensor:
    """Return the token weights of a made-up batch: one trajectory of four turns and one of two."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lengths = torch.tensor([3, 5, 2, 4, 6, 1], device=device)  # tokens of each turn
    turn_offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    trajectory_offsets = torch.tensor([0, 4, 6], device=device)
    generator = torch.Generator().manual_seed(0)
    logp = -torch.rand(21, generator=generator).to(device)
    teacher_logp = -2 * torch.rand(21, generator=generator).to(device)

    leaf = logp.requires_grad_()
    imitation_loss(leaf, teacher_logp, turn_offsets, trajectory_offsets).backward()
    weights = token_weights(logp.detach(), teacher_logp, turn_offsets, trajectory_offsets)
    # Trajectories of fewer than three turns keep weight 1.
    print(f"on {device}: weight of each turn {[round(w, 2) for w in weights[turn_offsets[:-1]].tolist()]}")
    return weights


if __name__ == "__main__":
    main()
