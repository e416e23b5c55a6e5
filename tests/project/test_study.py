"""The demo's study: its bootstrap against closed forms, and the README's table against its result."""

import json

import demo_study
import demo_worlds
import numpy as np
import pytest

from helpers.paths import ROOT


def interval(drawn: np.ndarray) -> tuple[float, float]:
    found = demo_study.estimate(0.0, drawn)
    return found["low"], found["high"]


def test_one_model_s_interval_is_the_binomial_s():
    drawn = demo_study.bootstrap({"one": np.repeat([[0, 1]], [1400, 600], axis=1)})["one"]
    half = 1.96 * np.sqrt(0.3 * 0.7 / 2000)
    assert interval(drawn) == pytest.approx((0.3 - half, 0.3 + half), abs=0.001)


def test_differences_are_paired_by_game():
    """Equal outcomes: no difference in any draw. Opposite ones: a difference twice as wide as one model's success."""
    games = np.repeat([[0, 1]], 1000, axis=1)
    drawn = demo_study.bootstrap({"one": games, "same": games, "opposite": 1 - games})
    assert interval(drawn["one"] - drawn["same"]) == (0, 0)
    half = 2 * 1.96 * np.sqrt(0.25 / 2000)
    assert interval(drawn["one"] - drawn["opposite"]) == pytest.approx((-half, half), abs=0.002)


def test_seeds_are_drawn_too_and_for_each_method_by_themselves():
    """Seeds that win no game, and all: a draw of three wins 0, 1/3, 2/3 or all, by chances of 1, 6, 12 and 8 in 27."""
    seeds = np.repeat([[0], [1], [1]], 50, axis=1)
    drawn = demo_study.bootstrap({"one": seeds, "other": seeds})
    values, counts = np.unique(drawn["one"].round(6), return_counts=True)
    assert values == pytest.approx([0, 1 / 3, 2 / 3, 1], abs=1e-6)
    assert counts / counts.sum() == pytest.approx(np.array([1, 6, 12, 8]) / 27, abs=0.02)
    assert abs(np.corrcoef(drawn["one"], drawn["other"])[0, 1]) < 0.05


def test_a_work_folder_of_another_commit_is_refused(tmp_path):
    made = {"commit": "a", "changed": [], "steps": None, "games": 40}
    demo_study.claim(tmp_path / "work", made)
    demo_study.claim(tmp_path / "work", made)
    for other in ({"commit": "b"}, {"games": 50}, {"changed": ["atod_fast/train.py"]}):
        with pytest.raises(SystemExit, match="give a new folder"):
            demo_study.claim(tmp_path / "work", made | other)


def test_the_readme_s_table_is_the_result_s():
    result = json.loads((demo_study.RESULTS / "demo_study.json").read_text())
    assert demo_study.readme_table(result) in (ROOT / "README.md").read_text(encoding="utf-8")
    assert demo_study.report(result) == (demo_study.RESULTS / "demo_study.md").read_text(encoding="utf-8")


def test_the_quickstart_s_table_of_the_other_demos_is_the_result_s():
    runs = json.loads((demo_worlds.RESULTS / "demo_worlds.json").read_text())["runs"]
    others = {preset: run for preset, run in runs.items() if preset != "demo"}
    assert demo_worlds.readme_table(others) in (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")
