"""Runs of three steps that several tests look at and none changes."""

import shutil
from pathlib import Path

import pytest
import torch

from atod_fast import train
from helpers.runs import QUICK, run


@pytest.fixture(scope="session")
def three_steps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return folder, run(folder, "train.steps=3", "checkpoint.every=2")


@pytest.fixture(scope="session")
def three(tmp_path_factory):
    """A finished run of three steps, each with its checkpoint."""
    folder = tmp_path_factory.mktemp("three") / "run"
    assert (
        train.main(
            [
                *QUICK,
                "train.steps=3",
                "checkpoint.every=1",
                "checkpoint.keep=3",
                "observe.trajectories_every=1",
                "--run-dir",
                str(folder),
            ]
        )
        == 0
    )
    return folder


@pytest.fixture
def copy(three, tmp_path):
    return Path(shutil.copytree(three, tmp_path / "copy"))


@pytest.fixture
def learned():
    """What a checkpoint holds, as small as can be: a policy and its optimiser."""
    policy = torch.nn.Linear(1, 1)
    return policy, torch.optim.AdamW(policy.parameters())
