"""Time what a rank's CPU does between a rollout and the first forward pass: gather trajectories, make rows, collate.

    torchrun --nproc_per_node 2 bench/host_side.py [--trajectories 128] [--turns 50] [--tokens 1500] [--actions 100]

Trajectories are made up: `--trajectories` over all ranks, each of `--turns` turns of `--tokens` tokens, the last
`--actions` of them sampled, with an observation of `--characters` characters. Each rank holds its share, as after a
rollout, and brings it to micro-batches as a training step does. Seconds are the slowest rank's; the median, least and
greatest of `--rounds` rounds after one that is not timed. Bytes are those that a rank gets from all ranks, itself
included. Last come two ways to send the tokens alone: to every rank (the trainer's), and to the one that trains on
them, if every rank trained on the same share of every other's. Writes nothing: bench/results/host_side.md is kept by
hand.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.distributed as dist
from machine import processor

from atod_fast import ranks
from atod_fast.batches import rows
from atod_fast.policy.packing import collate, partition
from atod_fast.records import Trajectory, Turn

VOCABULARY = 151_000
Seconds = dict[str, float]


def played(options: argparse.Namespace) -> list[Trajectory]:
    """Return this rank's share of the trajectories, as an agent leaves them."""
    draw = np.random.default_rng(ranks.rank())
    share = range(ranks.rank(), options.trajectories, ranks.world_size())
    return [Trajectory(number, number // 8, number % 8, "window", _turns(draw, options)) for number in share]


def _turns(draw: np.random.Generator, options: argparse.Namespace) -> list[Turn]:
    turns = []
    for _ in range(options.turns):
        ids = draw.integers(0, VOCABULARY, options.tokens).tolist()
        prompt, action = ids[: -options.actions], ids[-options.actions :]
        logprobs = draw.uniform(-3, 0, options.actions).tolist()
        seen = "".join(map(chr, draw.integers(97, 123, options.characters)))
        turns.append(Turn(prompt, action, logprobs, seen, "<action>look</action>", "look", True))
    return turns


@contextmanager
def timed(seconds: Seconds, name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start


def within(seconds: Seconds, name: str, function: Callable) -> Callable:
    """Return `function`, its calls timed under `name`."""

    def called(*arguments, **options):
        with timed(seconds, name):
            return function(*arguments, **options)

    return called


def received(count: list[int]) -> Callable:
    """Return `dist.all_gather`, the bytes it brings added to `count`."""
    gather = dist.all_gather

    def counted(out, mine, *rest, **options):
        count[0] += sum(part.nbytes for part in out)
        return gather(out, mine, *rest, **options)

    return counted


def once(mine: list[Trajectory], packed: bool) -> tuple[Seconds, int]:
    """Return the seconds of each phase on this rank, and the bytes it gets."""
    seconds: Seconds = {}
    count = [0]
    pack, unpack, gather = ranks._pack, ranks._unpack, dist.all_gather
    ranks._pack = within(seconds, "gather: pack", pack)
    ranks._unpack = within(seconds, "gather: unpack", unpack)
    dist.all_gather = received(count)
    ranks.barrier()
    try:
        with timed(seconds, "gather: exchange"):
            everyone = ranks.gather_trajectories(mine)
    finally:
        ranks._pack, ranks._unpack, dist.all_gather = pack, unpack, gather
    seconds["gather: exchange"] -= seconds["gather: pack"] + seconds["gather: unpack"]
    with timed(seconds, "rows"):
        sequences = rows(everyone)
    with timed(seconds, "partition"):
        (whole,) = partition(
            sequences,
            ranks=ranks.world_size(),
            minibatch_rows=0,
            budget=16_384,
            packed=packed,
            rng=np.random.default_rng(0),
        )
    with timed(seconds, "collate"):
        made = [collate([sequences[r] for r in micro], packed=packed) for micro in whole[ranks.rank()]]
    assert sum(batch.tokens for batch in made) > 0
    return seconds, count[0]


def ways(tokens: int) -> Seconds:
    """Return the seconds to send this rank's tokens to every rank, and a share of them to each."""
    mine = torch.zeros(tokens // ranks.world_size(), dtype=torch.int32)
    everyone = [torch.empty_like(mine) for _ in range(ranks.world_size())]
    seconds: Seconds = {}
    for name, send in {
        "tokens alone, to every rank": lambda: dist.all_gather(everyone, mine),
        "tokens alone, to their owners": lambda: dist.all_to_all_single(torch.empty_like(mine), mine),
    }.items():
        ranks.barrier()
        with timed(seconds, name):
            send()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("trajectories", 128), ("turns", 50), ("tokens", 1500), ("actions", 100)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--characters", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--padded", action="store_true", help="collate padded batches (default: packed)")
    options = parser.parse_args()
    ranks.start()
    torch.set_num_threads(1)
    mine = played(options)
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tokens = options.trajectories * options.turns * options.tokens
    found = []
    for _ in range(options.rounds + 1):
        seconds, count = once(mine, not options.padded)
        seconds |= {"all": sum(seconds.values())} | ways(tokens)
        found.append({name: ranks.largest(value) for name, value in seconds.items()})
    more = ranks.largest(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held)
    if ranks.rank() == 0:
        print(f"{ranks.world_size()} gloo ranks, {processor()}, torch {torch.__version__}, {tokens:,} tokens\n")
        print("| phase | seconds |\n|---|---|")
        for name in found[0]:
            values = [line[name] for line in found[1:]]
            print(f"| {name} | {statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f}) |")
        print(f"\nreceived by a rank: {count / 2**20:.1f} MiB; peak memory beyond that: {more / 2**10:.0f} MiB")
    ranks.stop()


if __name__ == "__main__":
    main()
