"""Short runs of the trainer, and what they leave in their folder."""

import hashlib
import json
import sys

from atod_fast import cli, rundir, train
from atod_fast.rollout.actor import Actor

SMALL = [
    "train.tasks_per_step=2",
    "train.group_size=4",
    "train.minibatch_rows=4",
    "eval.tasks=10",
    "eval.every=2",
    "observe.trajectories_every=2",
]


def run(folder, *settings, code=0):
    assert train.main([*SMALL, *settings, "--run-dir", str(folder)]) == code
    return read(folder) if code == 0 else []


def torchrun(ranks, *settings):
    """Return the command that starts a run on so many ranks."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks)]
    return [*launcher, "-m", "atod_fast.train", *settings]


def read(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def untimed(lines):
    return [{k: v for k, v in line.items() if not k.startswith(("time/", "perf/", "memory/"))} for line in lines]


QUICK = [*SMALL, "eval.teacher=false", "eval.tasks=4", "eval.every=0"]


def tree(folder):
    """Contents of all files below, by name."""
    return {
        str(p.relative_to(folder)): hashlib.md5(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def checkpoints(folder):
    return sorted(int(p.name.removeprefix("step_")) for p in (folder / "checkpoints").glob("step_*"))


def failing(monkeypatch, error, step=2, times=1000):
    """Make the rollout of a step fail."""
    real, left = Actor.train, [times]

    def play(self, engine, at, progress=None):
        if at == step and left[0]:
            left[0] -= 1
            raise error
        return real(self, engine, at, progress)

    monkeypatch.setattr(Actor, "train", play)


def choose(*argv):
    return rundir.choose(cli.parse([*map(str, argv)]))
