"""Train with an objective of your own: the trainer's loss reads streams, a few numbers per token, from any source.

Here the student imitates only where the teacher is sure: if the teacher gives a token a probability below `floor`, the
imitation term is left out, and the reward term stays:

    A_t = kappa * [p_T(a_t) >= floor] * [log pi_T(a_t) - log pi_old(a_t)] + A_RL

python examples/own_objective.py      on a made-up batch: tokens the teacher is sure of become likely, the others stay

In the trainer `atod_fast/objective/streams.py` makes the streams: add a variant there, next to the paper's.
"""

import torch
from atod_kernels import linear_logprob, linear_token_loss

from atod_fast.config import Objective
from atod_fast.objective import Streams, loss_function


def sure_streams(old_logp, teacher_logp, reward_advantage, *, kappa: float, floor: float) -> Streams:
    """Return the streams of A tokens; the loss is the mean over them. The first three arguments are [A], fp32."""
    sure = (teacher_logp.exp() >= floor).to(old_logp)
    return Streams(
        advantage=kappa * sure * (teacher_logp - old_logp) + reward_advantage,
        reward_advantage=reward_advantage,
        entropy_weight=torch.zeros_like(old_logp),
        old_logp=old_logp,
        policy_weight=torch.ones_like(old_logp),
        weight=torch.full_like(old_logp, 1 / len(old_logp)),
    )


def loss(hidden, head, tokens, streams: Streams, objective: Objective):
    """Return the scalar loss, differentiable in hidden [A, H] and head [V, H]; no [A, V] matrix is made."""
    return linear_token_loss(loss_function(objective), hidden, head, target=tokens, inputs=streams.tensors())[0]


def main(steps: int = 30) -> tuple[torch.Tensor, torch.Tensor]:
    """Train; return which tokens the teacher is sure of [A], and by how much each token's log-prob rose [A]."""
    torch.manual_seed(0)
    objective = Objective(clip=0.2)
    tokens = torch.randint(0, 100, (64,))
    hidden, head = torch.randn(64, 32, requires_grad=True), torch.randn(100, 32) / 32**0.5
    teacher_logp = torch.where(torch.arange(64) % 2 == 0, -0.1, -3.0)
    optimizer = torch.optim.Adam([hidden], lr=0.05)

    before = linear_logprob(hidden.detach(), head, tokens).logp
    for _ in range(steps):  # on-policy: each step's old log-probs come from the step before
        old_logp = linear_logprob(hidden.detach(), head, tokens).logp
        streams = sure_streams(old_logp, teacher_logp, torch.zeros(64), kappa=1.0, floor=0.5)
        optimizer.zero_grad()
        loss(hidden, head, tokens, streams, objective).backward()
        optimizer.step()
    sure, rise = teacher_logp.exp() >= 0.5, linear_logprob(hidden.detach(), head, tokens).logp - before
    print(f"log-probs rose by {rise[sure].mean():.2f} where the teacher is sure, by {rise[~sure].mean():.2f} elsewhere")
    return sure, rise


if __name__ == "__main__":
    main()
