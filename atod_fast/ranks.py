"""Ranks: one process under plain `python -m`, N under torchrun; the same code for both."""

from __future__ import annotations

import json
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from itertools import count
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.rendezvous import rendezvous

from atod_fast import errors
from atod_fast.errors import Ending, RankLost, Unexpected, UserError
from atod_fast.interrupt import Interrupted
from atod_fast.records import Trajectory, Turn

# Collectives take far less; for rollouts, which may take longer, ranks wait in `wait`.
COLLECTIVE = timedelta(minutes=30)
STOPPING = timedelta(seconds=30)  # ranks that stop for the same reason reach `all_stop` well within it

_starts = count(1)
_before_stop: list[Callable[[], object]] = []
_waiting: dist.ProcessGroup | None = None  # of `wait`
# Of `all_stop`: a rank that stops must not be mistaken for one whose rollout is over.
_stopping: dist.ProcessGroup | None = None
_limit = COLLECTIVE
_doing = "starting"


def rank() -> int:
    """Return the number of this rank."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """Return the number of ranks."""
    return int(os.environ.get("WORLD_SIZE", 1))


def node_size() -> int:
    """Return the number of ranks on this node: LOCAL_WORLD_SIZE, which torchrun sets; without it, of all ranks."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or world_size())


def leads_node() -> bool:
    """Return whether this rank is the first of its node."""
    return int(os.environ.get("LOCAL_RANK", rank())) == 0


def start() -> tuple[torch.device, DeviceMesh]:
    """Return this rank's device and the mesh of all ranks: nccl on CUDA, gloo on a CPU; also for a single process."""
    if torch.cuda.is_available():
        here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
        if here > gpus:
            raise UserError(
                f"--nproc_per_node {here} exceeds the {gpus} GPUs of this machine; "
                f"use {gpus}, or CUDA_VISIBLE_DEVICES= for the CPU"
            )
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    else:
        device, backend = torch.device("cpu"), "gloo"
    if not dist.is_initialized():
        if "RANK" in os.environ:
            # torchrun's store outlives `stop`: a second start must not find what the first one left in it.
            store, number, size = next(rendezvous("env://", timeout=COLLECTIVE))
            store = dist.distributed_c10d.PrefixStore(f"start{next(_starts)}", store)
            dist.init_process_group(backend, store=store, rank=number, world_size=size, timeout=COLLECTIVE)
        else:
            store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
            dist.init_process_group(backend, store=store, rank=0, world_size=1)
    return device, init_device_mesh(device.type, (dist.get_world_size(),))


def mesh(device: torch.device, shard: str) -> DeviceMesh:
    """Return the mesh over which `train.shard` shards parameters. Collective.

    It has all ranks in one dimension if `shard` is "all" or there is one node, else the dimensions `replicate`, over
    the nodes, and `shard`, over the ranks of a node.

    Raises:
        UserError: on every rank, if the nodes have different numbers of ranks.
    """
    first = rank() - int(os.environ.get("LOCAL_RANK", rank()))
    places = [json.loads(text) for text in _all_gather_bytes(json.dumps([node_size(), first]).encode())]
    size, everyone = places[0][0], dist.get_world_size()
    if shard == "all" or all(node >= everyone for node, _ in places):
        return init_device_mesh(device.type, (everyone,))
    if everyone % size or places != [[size, number - number % size] for number in range(everyone)]:
        told = ", ".join(str(node) for node in {first: node for node, first in places}.values())
        raise UserError(
            f"train.shard='node' needs the same number of ranks on every node, and they have {told}; "
            "start torchrun with the same --nproc_per_node everywhere, or set train.shard=all"
        )
    table = torch.arange(everyone).view(-1, size)
    # DeviceMesh's own groups would have nccl's default limit, a third of that of all ranks.
    made = [dist.new_subgroups_by_enumeration(part.tolist(), timeout=COLLECTIVE)[0] for part in (table.T, table)]
    groups = [_of_mine(group) for group in made]
    return DeviceMesh.from_group(groups, device.type, table, mesh_dim_names=("replicate", "shard"))


def before_stop(action: Callable[[], object]) -> None:
    """Register an action that `stop` calls before it destroys the process groups, the last registered first."""
    _before_stop.append(action)


def stop() -> None:
    """Call the actions of `before_stop`, then destroy the process groups."""
    global _waiting, _stopping
    while _before_stop:
        with suppress(Exception):  # the process ends, whatever state an error left it in
            _before_stop.pop()()
    _waiting = _stopping = None
    if dist.is_initialized():
        dist.destroy_process_group()


def doing(what: str) -> None:
    """Note what this rank is about to do, for the message of RankLost."""
    global _doing
    _doing = what


def be_patient(seconds: float) -> None:
    """Set how long `wait` waits. Collective."""
    global _waiting, _stopping, _limit
    _limit = timedelta(seconds=seconds)
    if world_size() > 1:
        # Rank 0 knows who is missing and must report it first: the other ranks wait longer.
        _waiting = _of_mine(dist.new_group(backend="gloo", timeout=_limit + STOPPING))
        _stopping = _of_mine(dist.new_group(backend="gloo", timeout=STOPPING))


def wait() -> None:
    """Wait for all ranks after a rollout, whose length differs from rank to rank.

    Raises:
        RankLost: a rank has ended, or has not arrived within the limit of `be_patient`.
    """
    if _waiting is None:
        return
    start = time.monotonic()
    try:
        dist.monitored_barrier(_waiting, timeout=_limit, wait_all_ranks=True)
    except RuntimeError as error:
        missing = re.search(r"Ranks? ([\d, ]+) failed to pass", str(error))
        who = f"rank {missing[1]}" if missing else "rank 0" if rank() else "another rank"
        waited = time.monotonic() - start
        if waited < _limit.total_seconds() or "Connection" in str(error):
            raise RankLost(_gone(who)) from None
        raise RankLost(
            f"rank {rank()} waited {waited / 60:.2g} min for {who} in {_doing!r}: "
            "see what holds it up there, or raise guard.wait_minutes"
        ) from None


def all_stop(whole: bool) -> bool:
    """Return whether every rank is stopping with `whole` weights, so that they can save together.

    Waits `STOPPING` for them. A rank that failed alone waits in vain: the others are in a collective it never joins.
    """
    if _stopping is not None:
        try:
            dist.monitored_barrier(_stopping, timeout=STOPPING)
        except RuntimeError:
            return False
    return not any_rank(not whole)


def _gone(who: str) -> str:
    return f"{who} is gone (seen by rank {rank()} in {_doing!r}); what it last said tells why"


def understood(error: BaseException) -> Ending:
    """Return the error to report for `error`, with a message of one line.

    It is `error` itself if it is one of this package's, RankLost for a failed collective, else Unexpected, after the
    traceback is printed.
    """
    if isinstance(error, Ending):
        return error
    text = str(error)
    if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in text):
        late = "imed out" in text
        return RankLost(
            f"rank {rank()} waited in vain for another rank in {_doing!r}" if late else _gone("another rank")
        )
    traceback.print_exception(error)
    first = text.strip().splitlines()[0][:300] if text.strip() else ""
    return Unexpected(
        f"{type(error).__name__}: {first}" if world_size() == 1 else f"rank {rank()}: {type(error).__name__}: {first}"
    )


def ending(error: BaseException) -> tuple[Ending, str]:
    """Return the error that ends this process, as `understood`, and its message on one line.

    A non-zero rank prints the line itself if rank 0 may never learn of the error. Call it before `stop`.
    """
    stopped = understood(error)
    line = " ".join(str(stopped).split())
    if dist.is_initialized() and not isinstance(stopped, Interrupted) and not getattr(stopped, "told", False):
        speak_alone(line)
    return stopped, line


@contextmanager
def together() -> Iterator[None]:
    """Raise an error of the block on all ranks, at its end. The block must not contain collectives."""
    failure = None
    try:
        yield
    except Exception as error:
        failure = understood(error)
    raise_together(failure)


def total(values: Tensor) -> Tensor:
    """Return the sum over ranks, on the CPU."""
    values = values.detach().cpu()
    dist.all_reduce(values)
    return values


def largest(value: float) -> float:
    """Return the largest of the ranks' values; NaN if one is NaN."""
    return max(_everyone(value), key=lambda v: (v != v, v))


def _everyone(value: float) -> list[float]:
    values = torch.zeros(dist.get_world_size(), dtype=torch.float64)
    values[dist.get_rank()] = value
    return total(values).tolist()


def any_rank(flag: bool) -> bool:
    """Return, on every rank, whether `flag` is true on any rank."""
    return bool(total(torch.tensor(int(flag))))


def where(flag: bool) -> list[int]:
    """Return, on every rank, the ranks where `flag` is true."""
    return [number for number, value in enumerate(_everyone(float(flag))) if value]


def speak_alone(line: str) -> None:
    """Print a fatal error from a non-zero rank; rank 0 may never learn of it."""
    if rank():
        print(f"atod_fast: rank {rank()}: {line}", file=sys.stderr, flush=True)


_SHARED = {name: kind for name, kind in vars(errors).items() if isinstance(kind, type)}


def raise_together(error: Exception | None) -> None:
    """Raise the error of the lowest rank that has one on every rank, as one of atod_fast.errors.

    A rank that stopped alone would leave the others waiting. The error is marked as `told`: rank 0 prints it.
    """
    known = next((kind.__name__ for kind in type(error).__mro__ if _SHARED.get(kind.__name__) is kind), "Unexpected")
    text = "" if error is None else f"{known}:{error}"
    mine = text.encode(errors="replace")
    for found in _all_gather_bytes(mine) if dist.is_initialized() else [mine]:
        if found:
            kind, _, message = found.decode().partition(":")
            shared = _SHARED[kind](message)
            shared.told = True
            raise shared


def barrier() -> None:
    """Wait until all ranks are here (an all-reduce on the CPU: nccl's own barrier would pick a device)."""
    any_rank(False)


def from_first(text: str) -> str:
    """Return rank 0's text on every rank."""
    return _all_gather_bytes(text.encode())[0].decode() if dist.is_initialized() else text


def by_first(make: Callable[[], Any]) -> Any:
    """Return, on every rank, the JSON value that `make` returns on rank 0; an error there is raised on all."""
    text = ""
    with together():
        if rank() == 0:
            text = json.dumps(make())
    return json.loads(from_first(text))


def everyones(text: str) -> list[str]:
    """Return the ranks' texts, in order of rank."""
    return [data.decode() for data in _all_gather_bytes(text.encode())]


def tell(text: str | None, group: dist.ProcessGroup) -> str:
    """Return, on every rank of `group`, the text of its first rank; the others pass None."""
    size = torch.tensor([len(text.encode()) if text is not None else 0])
    dist.broadcast(size, group=group, group_src=0)
    data = (
        torch.zeros(int(size), dtype=torch.uint8)
        if text is None
        else torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    )
    dist.broadcast(data, group=group, group_src=0)
    return data.numpy().tobytes().decode()


def neighbours(size: int) -> dist.ProcessGroup:
    """Return the process group of `size` consecutive ranks that this one is in, on the CPU. Collective over all ranks.

    Its time-out is the limit of `be_patient`.
    """
    return _of_mine(dist.new_subgroups(size, backend="gloo", timeout=_limit)[0])


def _of_mine(group: object) -> dist.ProcessGroup:
    """Return a new process group, which this rank is in; torch returns a number where it is not."""
    assert isinstance(group, dist.ProcessGroup)
    return group


def gather_trajectories(mine: Sequence[Trajectory]) -> list[Trajectory]:
    """Return all ranks' trajectories on every rank, ordered by group and member. Nothing is pickled."""
    parts = [_all_gather(array.view(np.uint8)) for array in _pack(mine)]
    everyone: list[Trajectory] = []
    for head, ids, values in zip(*parts, strict=True):
        everyone += _unpack(head, ids.view(np.int32), values.view(np.float32))
    return sorted(everyone, key=lambda t: (t.group, t.member))


def _pack(trajectories: Sequence[Trajectory]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the facts as JSON, and ids and log-probs end to end; the JSON holds their lengths."""
    facts, tokens, logprobs = [], [np.zeros(0, np.int32)], [np.zeros(0, np.float32)]
    for trajectory in trajectories:
        turns = []
        for turn in trajectory.turns:
            tokens += np.asarray(turn.prompt, np.int32), np.asarray(turn.action, np.int32)
            logprobs.append(np.asarray(turn.logprobs, np.float32))
            turns.append(
                _facts(turn, "prompt", "action", "logprobs") | {"lengths": (len(turn.prompt), len(turn.action))}
            )
        facts.append(_facts(trajectory, "turns") | {"turns": turns})
    return np.frombuffer(json.dumps(facts).encode(), np.uint8), np.concatenate(tokens), np.concatenate(logprobs)


def _facts(item: Turn | Trajectory, *without: str) -> dict:
    return {name: getattr(item, name) for name in item.__slots__ if name not in without}


def _unpack(facts: np.ndarray, tokens: np.ndarray, logprobs: np.ndarray) -> list[Trajectory]:
    """Return the trajectories of `_pack`; ids and log-probs are views of the arrays."""
    out, at, scored = [], 0, 0
    for fact in json.loads(facts.tobytes()):
        turns = []
        for turn in fact.pop("turns"):
            prompt, action = turn.pop("lengths")
            turns.append(
                Turn(
                    tokens[at : at + prompt],
                    tokens[at + prompt : at + prompt + action],
                    logprobs[scored : scored + action],
                    **turn,
                )
            )
            at, scored = at + prompt + action, scored + action
        out.append(Trajectory(turns=turns, **fact))
    return out


def _all_gather_bytes(data: bytes) -> list[bytes]:
    return [part.tobytes() for part in _all_gather(np.frombuffer(data, np.uint8))]


def _all_gather(data: np.ndarray) -> list[np.ndarray]:
    """Return every rank's `data`, uint8 [n] with an n of its own."""
    size = torch.tensor([len(data)])
    sizes = [torch.zeros_like(size) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, size)
    most = max(int(s) for s in sizes)
    mine = torch.from_numpy(np.pad(data, (0, most - len(data))))
    everyone = [torch.empty(most, dtype=torch.uint8) for _ in sizes]
    dist.all_gather(everyone, mine)
    return [part.numpy()[: int(s)] for part, s in zip(everyone, sizes, strict=True)]
