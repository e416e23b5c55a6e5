"""The pool of environments: as many as are needed, and answers that come late or never."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest

from atod_fast.rollout.pool import Pool
from helpers.agent import make_config, play
from helpers.paths import ROOT
from helpers.worlds import Corridor


@pytest.mark.parametrize("instant", [True, False])
def test_as_many_worlds_as_trajectories_in_flight_all_closed_at_the_end(instant):
    env = Corridor(instant=instant)
    play(env, range(12))
    assert len(env.family) == 4 and all(world.closed for world in env.family) and not env.closed


def test_no_more_worlds_at_work_than_workers():
    at_work, most, lock = 0, 0, threading.Lock()

    class Counted(Corridor):
        def clone(self):
            return Counted(instant=False)

        def step(self, action):
            nonlocal at_work, most
            with lock:
                at_work += 1
                most = max(most, at_work)
            time.sleep(0.005)
            with lock:
                at_work -= 1
            return super().step(action)

    play(Counted(instant=False), range(8), make_config(env={"workers": 3}), slots=8)
    assert 1 < most <= 3


def test_an_answer_that_comes_too_late_is_not_heard():
    late = threading.Event()
    env = Corridor(instant=False, faults={4: late.wait})
    pool = Pool(env, workers=1, timeout=1.0)
    pool.reset(0, seed=0, task=4)
    assert [answer.failure for answer in pool.ready(wait=True)] == [None]
    for _ in range(2):
        pool.step(0, "go")
        answers = pool.ready(wait=True)
    assert [answer.key for answer in answers] == [0] and answers[0].failure
    late.set()
    pool.reset(0, seed=0, task=5)  # the worker is free again, the key stands for another world
    heard = pool.ready(wait=True)
    assert [(answer.observation, answer.failure) for answer in heard] == [("task 5 seed 0 start", None)]
    pool.close()
    assert pool.ready(wait=False) == [] and len(env.family) == 2


def test_a_world_that_hangs_does_not_keep_the_process_from_ending():
    program = """
import threading
from atod_fast.rollout.pool import Pool

class Hanging:
    instant = False
    def clone(self): return Hanging()
    def reset(self, seed, task): threading.Event().wait()
    def close(self): threading.Event().wait()

pool = Pool(Hanging(), workers=1, timeout=1.0)
pool.reset(0, 0, 0)
print(pool.ready(wait=True)[0].failure)
pool.close()
"""
    root = str(ROOT)
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "no answer" in done.stdout, done.stderr
