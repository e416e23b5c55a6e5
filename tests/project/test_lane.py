"""The script for a GPU: its parts on a CPU, its limits of time, and the table made of its results."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import gpu_lane
import lane_table
import pytest
from gpu_lane import PARTS, Part
from lane import EXPECTED, Lane

# Only a GPU has memory to measure, and only vLLM's part with its own logits their gap.
NOT_DRY = ("memory", "sleep", "model logits")


def lane(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["gpu_lane.py", *arguments])
    return gpu_lane.main()


def dry(monkeypatch, folder: Path, parts: str) -> dict:
    code = lane(monkeypatch, "--dry", "--parts", parts, "--out", str(folder / "lane.json"))
    record = json.loads((folder / "lane.json").read_text())
    found = {
        name: (part["status"], part.get("failures"), part.get("skipped")) for name, part in record["parts"].items()
    }
    assert found == dict.fromkeys(parts.split(","), ("passed", [], [])) and code == 0
    return record["parts"]


def names(parts: dict) -> set[str]:
    return {line["name"] for part in parts.values() for line in part["measures"]}


def expected(*parts: str) -> set[str]:
    return {name for name in EXPECTED if name.startswith(parts) and not name.endswith(NOT_DRY)}


@pytest.mark.slow
def test_every_part_runs_on_a_cpu_and_measures_what_is_expected(monkeypatch, tmp_path):
    parts = dry(monkeypatch, tmp_path, "kernels,varlen,decode,step,questions")
    assert all(part["checks"] for part in parts.values())
    assert expected("varlen", "decode", "questions") <= names(parts)
    assert {"step: rollout", "step: teacher", "step: score", "step: update"} <= names(parts)
    assert all(line["expected"] is None for part in parts.values() for line in part["measures"])


@pytest.mark.vllm
def test_the_parts_of_vllm_run_on_a_cpu(monkeypatch, tmp_path):
    pytest.importorskip("vllm", reason="vLLM is not installed: see .ci/run")
    parts = dry(monkeypatch, tmp_path, "vllm,vllm-model-logits,vllm-engine")
    assert [len(part["checks"]) for part in parts.values()] == [3, 3, 1]
    assert expected("vllm") | {"vllm: log-prob gap, model logits"} == names(parts)


SCRIPT = """
import json, os, sys, time
sys.path.insert(0, {bench!r})
from lane import Lane
from pathlib import Path
import torch
lane = Lane(torch.device("cpu"), 0.0, Path(sys.argv[sys.argv.index("--out") + 1]))
lane.check("early", True, "found before the end")
{end}
"""


@pytest.mark.slow
def test_a_part_that_hangs_or_dies_loses_only_itself(monkeypatch, tmp_path):
    ends = {"hangs": "time.sleep(600)", "dies": "os.abort()", "fails": "sys.exit(1)", "ends": "sys.exit(lane.finish())"}
    parts = []
    for name, end in ends.items():
        (tmp_path / f"{name}.py").write_text(SCRIPT.format(bench=str(gpu_lane.BENCH), end=end))
        parts.append(Part(name, (str(tmp_path / f"{name}.py"),), 60, name))
    monkeypatch.setattr(gpu_lane, "PARTS", tuple(parts))
    monkeypatch.setattr(gpu_lane, "DRY", 20)
    assert lane(monkeypatch, "--dry", "--parts", ",".join(ends), "--out", str(tmp_path / "out.json")) == 1
    found = json.loads((tmp_path / "out.json").read_text())["parts"]
    assert {name: part["status"] for name, part in found.items()} == {
        "hangs": "timed out",
        "dies": "ended with -6",
        "fails": "failed",
        "ends": "passed",
    }
    assert all(
        part["checks"] == [{"check": "early", "passed": True, "detail": "found before the end"}]
        for part in found.values()
    )


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(gpu_lane.torch.cuda, "is_available", lambda: False)
    assert lane(monkeypatch) == 2 and "or with --dry" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="--parts: 'vlm' is none of vllm"):
        lane(monkeypatch, "--dry", "--parts", "vlm")


def test_parts_fit_into_the_time_with_some_left_for_the_last():
    assert sum(part.limit for part in PARTS[:-1]) < 640 and PARTS[-1].name == "times"
    assert all((gpu_lane.BENCH / part.command[0]).is_file() for part in PARTS)


def test_an_error_of_a_step_is_a_failure_and_the_next_runs(tmp_path):
    report = Lane(gpu_lane.torch.device("cpu"), 0.0, tmp_path / "out.json")
    with report.step("one"):
        raise ValueError("no")
    with report.step("two"):
        raise ImportError("no vLLM")
    report.measure("vllm: build", 50.0, "s")
    assert report.finish() == 1 and not report.ready("three")
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["failures"] == ["one: ValueError: no"]
    assert found["skipped"] == ["two: no vLLM", "three: no time left"]
    assert found["measures"][0]["expected"] == EXPECTED["vllm: build"].value
    with pytest.raises(ValueError, match="expected in s, measured in ms"):
        report.measure("vllm: build", 50.0, "ms")


def record(dry: bool) -> dict:
    about = {"dry": dry, "gpus": ["H100"], "processor": "p", "cores": 16, "python": "3", "packages": {"torch": "2"}}
    measure = {"name": "vllm: build", "value": 51.0, "unit": "s", "expected": 45, "why": "w"}
    time = {"pass": "forward", "contender": "ours", "role": "ours", "milliseconds": 3.0, "peak_mib": 7}
    floor = time | {"contender": "products", "role": "floor", "milliseconds": 2.0}
    parts = {
        "vllm": {"status": "passed", "seconds": 60.0, "checks": [{"passed": True}], "measures": [measure]},
        "times": {"status": "failed", "seconds": 9.0, "failures": ["x: no"], "times": [time, floor]},
    }
    return {"machine": about | {"commit": "c" * 40, "started": "now"}, "seconds": 70.0, "parts": parts}


def test_the_table_shows_what_was_measured_beside_what_was_expected():
    text = "\n".join(lane_table.results(record(dry=False)))
    for line in (
        "| vllm | passed | 60 | 1 of 1 |",
        "| decode | not asked for | | |",
        "- x: no",
        "| vllm: build | 45 | 51 | s | w |",
        "| ours | 3.0 | 1.50 | 7 |",
    ):
        assert line in text.splitlines(), line
    assert "| vllm: load | 0.6 | not measured |" in text
    with pytest.raises(SystemExit, match="this was a dry run"):
        lane_table.results(record(dry=True))


def test_the_page_holds_the_table_of_the_last_run_or_the_expected_numbers():
    page = lane_table.PAGE.read_text()
    written = lane_table.PAGE.with_suffix(".json")
    lines = lane_table.results(json.loads(written.read_text())) if written.exists() else lane_table.expected()
    assert lane_table.insert(page, lines) == page
    assert "fast, triton | 74.4" in page, "earlier results stay"
