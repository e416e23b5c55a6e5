"""The method in plain fp64, one token and one turn at a time, from the paper's formulas.

Of the product it knows the data (trajectories, an `Objective`) and none of the code: models are transformers' own
forward, one sequence at a time, and everything else is written out here.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

# For each trajectory (group, turns), where a turn is (reward, verdict, anchor): the verdict "valid", "refused" or
# "malformed"; turns with equal anchors saw the same observation.
Episodes = Sequence[tuple[int, Sequence[tuple[float, str, object]]]]
INVALID = {"form": ["malformed"], "accepted": ["malformed", "refused"]}  # by objective.invalid


def model_of(path: str) -> torch.nn.Module:
    """Load a model in fp64. Its buffers of position codes stay as they are made, in fp32."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval()


Turns = list[Tensor | None]  # an entry a turn


def distributions(
    model,
    trajectories,
    temperature: float,
    columns: Tensor,
    part: Collection[int] | None = None,
) -> Turns:
    """Return log softmax(logits / temperature) over the token ids `columns`: for each turn [L, C], or None outside
    `part`."""
    found: Turns = []
    for trajectory in trajectories:
        ids: list[int] = []
        spans: list[tuple[list[int], int, int]] = []  # (ids that the model reads, start and end of the action in them)
        for turn in trajectory.turns:
            ids = [*(ids if trajectory.context == "full" else []), *turn.prompt, *turn.action]
            spans.append((ids, len(ids) - len(turn.action), len(ids)))
        if trajectory.context == "full":
            spans = [(ids, first, last) for _, first, last in spans]
        read: dict[int, Tensor] = {}  # id(sequence): its logits
        for sequence, first, last in spans:
            if part is not None and len(found) not in part:
                found.append(None)
                continue
            if id(sequence) not in read:
                read[id(sequence)] = model(torch.tensor([sequence])).logits[0]
            logits = read[id(sequence)][first - 1 : last - 1, columns]
            found.append(torch.log_softmax(logits / temperature, -1))
    return found


def of_actions(logp: Turns, trajectories, columns: Tensor) -> Turns:
    """Return the log-probs of the sampled tokens: [L] a turn."""
    place = {column: i for i, column in enumerate(columns.tolist())}
    actions = [[place[i] for i in turn.action] for trajectory in trajectories for turn in trajectory.turns]
    return [None if lines is None else lines[range(len(ids)), ids] for lines, ids in zip(logp, actions, strict=True)]


def entropy(logp: Tensor) -> Tensor:
    return -(logp.exp() * logp).sum(-1)


def divergence(kind: str, alpha: float, student: Tensor, teacher: Tensor) -> Tensor:
    """Return the divergence of whole distributions, given by their log-probs [L, C]."""

    def kl(one: Tensor, other: Tensor) -> Tensor:
        return (one.exp() * (one - other)).sum(-1)

    def mixture(weight: float, one: Tensor, other: Tensor) -> Tensor:
        return (weight * one.exp() + (1 - weight) * other.exp()).log()

    match kind:
        case "reverse_kl":
            return kl(student, teacher)
        case "forward_kl":
            return kl(teacher, student)
        case "jsd":
            middle = mixture(alpha, teacher, student)
            return alpha * kl(teacher, middle) + (1 - alpha) * kl(student, middle)
        case "skew_reverse_kl":
            return kl(student, mixture(alpha, student, teacher))
        case "skew_forward_kl":
            return kl(teacher, mixture(alpha, teacher, student))
    raise ValueError(kind)


def turn_weights(d: Sequence[float], h: Sequence[float], sizes: Sequence[int]) -> list[float]:
    """Return T-DUR's turn weights: the paper's soft-OR of min-max signals, in trajectories of `sizes` turns."""

    def between(values: Sequence[float]) -> list[float]:
        low, high = min(values), max(values)
        return [0.5 if high - low < 1e-8 else (value - low) / (high - low) for value in values]

    weights, first = [], 0
    for size in sizes:
        own = slice(first, first + size)
        first += size
        if size < 3 or max(d[own]) < 0.01:
            weights += [1.0] * size
        else:
            weights += [1 - (1 - a) * (1 - b) for a, b in zip(between(d[own]), between(h[own]), strict=True)]
    return weights


def advantages(episodes: Episodes, objective) -> list[float]:
    """Return A_RL of every turn: its reward, less a penalty if it is invalid, compared with its group; plus GiGPO's
    equations 3 and 5 to 8 (arXiv 2505.10978)."""

    def mean(values: Sequence[float]) -> float:
        return math.fsum(values) / len(values)

    def score(value: float, values: Sequence[float]) -> float:
        middle, others = mean(values), len(values) - 1
        if not objective.normalise_std:
            return value - middle
        std = math.sqrt(math.fsum((each - middle) ** 2 for each in values) / others) if others else 0.0
        return 0.0 if std < 1e-6 else (value - middle) / (std + objective.std_epsilon)

    rows = []
    for number, (group, turns) in enumerate(episodes):
        total = math.fsum(reward for reward, _, _ in turns)
        for k, (_, verdict, seen) in enumerate(turns):
            penalty = objective.invalid_penalty if verdict in INVALID[objective.invalid] else 0.0
            later = math.fsum(objective.gigpo_gamma**j * turns[k + j][0] for j in range(len(turns) - k))
            row = SimpleNamespace(group=group, of=number, total=total, seen=seen)
            row.reward, row.later = total - penalty, later - penalty
            rows.append(row)
    found = []
    for me in rows:
        group = [row for row in rows if row.group == me.group]
        if objective.baseline == "rows":
            own, peers = me.reward, [row.reward for row in group]
            others = [row.reward for row in group if row is not me]
        else:
            totals = {row.of: row.total for row in group}
            own, peers = me.total, list(totals.values())
            others = [total for number, total in totals.items() if number != me.of]
        if objective.advantage == "rloo":
            found.append(me.reward - (mean(others) if others else own))
            continue
        advantage = score(me.reward, peers)
        if objective.advantage == "gigpo":
            advantage += objective.gigpo_omega * score(me.later, [row.later for row in group if row.seen == me.seen])
        found.append(advantage)
    return found


def episodes_of(trajectories) -> Episodes:
    def verdict(turn) -> str:
        return "malformed" if not turn.well_formed else "valid" if turn.accepted else "refused"

    return [(t.group, [(turn.reward, verdict(turn), turn.observation) for turn in t.turns]) for t in trajectories]


def token_weights(aggregation: str, trajectories, part: Sequence[int]) -> dict[int, float]:
    """Return the weight of a turn's tokens in a mini-batch of the turns `part`, for each turn."""
    turns = [(number, len(turn.action)) for number, trajectory in enumerate(trajectories) for turn in trajectory.turns]
    tokens = {n: sum(turns[k][1] for k in part if turns[k][0] == n) for n in {turns[k][0] for k in part}}
    match aggregation:
        case "token":
            return {k: 1 / sum(tokens.values()) for k in part}
        case "turn":
            return {k: 1 / (len(part) * turns[k][1]) for k in part}
        case "trajectory":
            return {k: 1 / (len(tokens) * tokens[turns[k][0]]) for k in part}
    raise ValueError(aggregation)


@dataclass
class Step:
    """Facts of a step's tokens before its first update; each list has one entry per turn."""

    old: list[Tensor]  # [L] each: log pi_old of the sampled tokens
    entropy: list[Tensor]
    teacher: list[Tensor] | None  # log pi_T of them
    d: list[float]
    h: list[float]
    weight: list[float]  # T-DUR's w
    rl: list[float]  # A_RL
    advantage: list[Tensor]  # A_t: with k1 the hybrid, else rho A_RL
    imitation: list[float] | None  # kappa w, where imitation is a loss
    importance: list[Tensor]  # truncated pi_old / pi of the rollout
    inside: list[bool]  # the turn stays in the loss


@torch.no_grad()
def look(
    config, kappa: float, rho: float, trajectories, student: Turns, teacher: Turns | None, columns: Tensor
) -> Step:
    """Return the facts of a step, computed from its distributions."""
    o, turns = config.objective, [turn for trajectory in trajectories for turn in trajectory.turns]
    old = of_actions(student, trajectories, columns)
    h = [entropy(a) for a in student] if config.turns.uncertainty == "exact" else [-a for a in old]
    d, taught = [torch.zeros(1)] * len(old), None
    if teacher is not None:
        taught = of_actions(teacher, trajectories, columns)
        if config.turns.disagreement == "sampled":
            d = [(a - b).abs() for a, b in zip(old, taught, strict=True)]
        else:
            kind = o.divergence if o.divergence not in ("k1", "k2", "k3") else "reverse_kl"
            d = [divergence(kind, o.alpha, a, b) for a, b in zip(student, teacher, strict=True)]
    d, h = ([float(values.mean()) for values in lines] for lines in (d, h))
    sizes = [len(trajectory.turns) for trajectory in trajectories]
    weight = turn_weights(d, h, sizes) if config.turns.fuse == "softor" else [1.0] * len(turns)
    rl = advantages(episodes_of(trajectories), o)
    advantage = [torch.full_like(a, rho * r) for a, r in zip(old, rl, strict=True)]
    if taught is not None and o.divergence == "k1":
        bound = o.log_ratio_clip or math.inf
        bracket = [(t - p).clamp(-bound, bound) for t, p in zip(taught, old, strict=True)]
        advantage = [a + kappa * w * b for a, w, b in zip(advantage, weight, bracket, strict=True)]
    played = [torch.tensor(turn.logprobs, dtype=torch.float64) for turn in turns]
    importance = [(a - b).exp().clamp(max=o.tis_cap) for a, b in zip(old, played, strict=True)]
    if not o.tis_cap:
        importance = [torch.ones_like(a) for a in old]
    imitation = [kappa * w for w in weight] if taught is not None and o.divergence != "k1" else None
    between = [math.exp(float((a - b).mean())) for a, b in zip(old, played, strict=True)]
    bound = o.mismatch_mask or math.inf
    inside = [1 / bound <= mean <= bound for mean in between]
    return Step(old, [entropy(a) for a in student], taught, d, h, weight, rl, advantage, imitation, importance, inside)


def loss_of(
    objective,
    step: Step,
    logp: list[Tensor],
    teacher: list[Tensor] | None,
    sampled: list[Tensor],
    weight: dict[int, float],
) -> Tensor:
    """Return the loss of a mini-batch of the turns in `weight`; `logp` are distributions under the current weights."""
    o, total = objective, torch.zeros((), dtype=torch.float64)
    for k, share in weight.items():
        if not step.inside[k]:
            continue
        ratio, advantage = (sampled[k] - step.old[k]).exp(), step.advantage[k]
        if o.ratio == "sequence":
            alike = len(set((advantage * step.importance[k]).tolist())) == 1
            ratio = response_ratio(sampled[k], step.old[k], exact=alike)
        surrogate = torch.minimum(ratio * advantage, ratio.clamp(1 - o.clip, 1 + (o.clip_high or o.clip)) * advantage)
        if o.dual_clip:
            surrogate = torch.where(advantage < 0, torch.maximum(surrogate, o.dual_clip * advantage), surrogate)
        loss = -step.importance[k] * surrogate - o.entropy_bonus * entropy(logp[k])
        if step.imitation is not None:
            if o.divergence in ("k2", "k3"):
                gap = step.teacher[k] - sampled[k]
                cost = gap**2 / 2 if o.divergence == "k2" else gap.exp() - 1 - gap
            else:
                cost = divergence(o.divergence, o.alpha, logp[k], teacher[k])
            loss = loss + step.imitation[k] * cost
        total = total + share * loss.sum()
    return total


def response_ratio(logp: Tensor, old: Tensor, *, exact: bool) -> Tensor:
    """Return the ratio of a response at each of its tokens (arXiv 2507.18071): exact, GSPO's, which all tokens share
    and whose gradient goes through all of them; else GSPO-token's."""
    gspo = ((logp - old).sum() / len(logp)).exp().expand(len(logp))
    return gspo if exact else gspo.detach() * logp.exp() / logp.exp().detach()


class AdamW:
    """Decoupled weight decay (arXiv 1711.05101, algorithm 2), on clipped gradients."""

    def __init__(self, model, betas: tuple[float, float], decay: float, clip: float, eps: float = 1e-8):
        self.parameters = dict(model.named_parameters())
        self.betas, self.decay, self.clip, self.eps, self.steps = betas, decay, clip, eps, 0
        self.moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self, loss: Tensor, learning_rate: float) -> tuple[float, dict[str, Tensor]]:
        """Take one step down `loss`; return the gradient's norm, and the gradient after clipping."""
        gradients = dict(zip(self.parameters, torch.autograd.grad(loss, list(self.parameters.values())), strict=True))
        norm = math.sqrt(sum(float((g**2).sum()) for g in gradients.values()))
        gradients = {name: g * min(1.0, self.clip / norm) for name, g in gradients.items()}
        self.steps += 1
        for name, g in gradients.items():
            mean, square = self.moments[name]
            mean.mul_(self.betas[0]).add_((1 - self.betas[0]) * g)
            square.mul_(self.betas[1]).add_((1 - self.betas[1]) * g**2)
            p = self.parameters[name]
            p -= learning_rate * self.decay * p
            mean, square = (m / (1 - beta**self.steps) for m, beta in zip((mean, square), self.betas, strict=True))
            p -= learning_rate * mean / (square.sqrt() + self.eps)
        return norm, gradients
