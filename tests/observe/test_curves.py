import os
import subprocess
import sys

from matplotlib.axes import Axes

from atod_fast.observe import curves

LINES = [
    {"step": step, "train/success": 0.1 * step, "eval/success": None if step % 2 else 0.2, "schedule/kappa": 1.0}
    for step in range(4)
]


def test_curves_are_drawn_whatever_backend_a_notebook_asks_for(tmp_path):
    """In a process of its own: matplotlib is imported once."""
    code = (
        f"from pathlib import Path; from atod_fast.observe import curves; "
        f"curves.draw({LINES}, Path({str(tmp_path / 'a.png')!r}))"
    )
    environment = os.environ | {"MPLBACKEND": "module://no_such_module.backend_inline"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_success_on_the_tasks_that_choose_is_drawn_where_there_is_one(tmp_path, monkeypatch):
    drawn, real = [], Axes.plot
    monkeypatch.setattr(
        Axes, "plot", lambda self, x, y, **style: drawn.append((style["label"], y)) or real(self, x, y, **style)
    )
    curves.draw(LINES, tmp_path / "a.png")
    assert "student, tasks to choose by" not in dict(drawn)
    curves.draw([line | {"dev/success": 0.3} for line in LINES], tmp_path / "a.png")
    assert dict(drawn)["student, tasks to choose by"] == (0.3,) * 4


def test_drawing_leaves_the_environment_as_it_was(tmp_path, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")
    curves.draw(LINES, tmp_path / "a.png")
    assert os.environ["MPLBACKEND"] == "agg"
