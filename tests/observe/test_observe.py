"""What a user sees: advice, the console line, transcripts of training and held-out episodes, an evaluation's output."""

import json

import pytest
import torch

from atod_fast import evaluate
from atod_fast.config.settings import load
from atod_fast.observe import console, transcripts
from atod_fast.observe.advice import STEPS, Advice, advise, invalid_response
from atod_fast.records import Trajectory
from helpers.chatml import END, START, TOKENIZER, make_turn
from helpers.runs import run

HEALTHY = {
    "rollout/invalid_actions": 0.4,
    "rollout/cut_off": 0.1,
    "rollout/same_action": 0.2,
    "rollout/turns": 6.0,
    "turns/flat_groups": 0.5,
    "train/success": 0.3,
    "schedule/kappa": 0.9,
    "schedule/rho": 1.1,
    "profile/weight": [0.5] * 8,
}
# What is wrong -> (metrics, words of its line).
FAULTS = {
    "invalid": ({"rollout/invalid_actions": 0.97}, ["97%", "invalid", "'take the mug'"]),
    "cut off": ({"rollout/cut_off": 0.8, "rollout/invalid_actions": 0.97}, ["80%", "rollout.response_tokens=9"]),
    "flat": (
        {"turns/flat_groups": 1.0, "train/success": 0.0},
        ["success 0%", "easier tasks", "imitation alone", "train.group_size=8"],
    ),
    "collapse": (
        {"rollout/same_action": 0.96, "train/success": 0.1},
        ["96%", "20% at first", "30%, now 10%", "learning_rate=0.0007"],
    ),
    "unweighted": (
        {"profile/weight": [1.0], "rollout/turns": 1.0},
        ["turns.min_turns=3", "1.0 turns", "turns.scope=batch", "turns.fuse=uniform"],
    ),
}


def told(*changes, settings=(), first=()):
    """Return {cause: line} for steps with the given changes to a healthy one; `first` changes the run's first step."""
    steps = [HEALTHY | change for change in changes]
    return dict(advise(steps, load(overrides=settings), "take the mug", HEALTHY | dict(first)))


@pytest.mark.parametrize("cause", FAULTS)
def test_what_cannot_teach_is_told_with_cause_and_remedy(cause):
    change, words = FAULTS[cause]
    found = told(*[change] * STEPS)
    assert found.keys() == {cause} and all(word in found[cause] for word in words), found
    assert told(change, {}, change) == {}, "one good step is enough"


def test_thresholds_are_passed_not_met():
    for change in (
        {"rollout/invalid_actions": 0.9},
        {"rollout/cut_off": 0.5},
        {"rollout/same_action": 0.9},
        {"turns/flat_groups": 0.99},
        {"profile/weight": [1.0] * 3},
    ):
        assert told(*[change] * STEPS) == {}, change


@pytest.mark.parametrize(
    ("cause", "change", "settings"),
    [
        ("flat", {"schedule/rho": 0.0}, ()),  # no reward is used
        ("unweighted", {"schedule/kappa": 0.0}, ()),  # nothing is imitated
        ("unweighted", {}, ["turns.fuse=uniform"]),  # asked for
        ("unweighted", {}, ["turns.min_turns=1"]),
    ],
)
def test_what_is_meant_is_not_told(cause, change, settings):
    assert told(*[FAULTS[cause][0] | change] * STEPS, settings=settings) == {}


def test_one_action_is_no_collapse_where_it_is_right_or_the_only_one():
    same = {"rollout/same_action": 0.97}
    assert told(*[same] * STEPS).keys() == {"collapse"}
    assert told(*[same | {"train/success": 0.4}] * STEPS) == {}, "it is right more often than not"
    assert told(*[same] * STEPS, first=same) == {}, "nothing else was ever said"
    for cause in ("invalid", "cut off"):
        assert told(*[same | FAULTS[cause][0]] * STEPS).keys() == {cause}, "answers of no form are read alike"
    assert told(*[{"rollout/same_action": float("nan")}] * STEPS) == {}, "too few to tell"


def test_a_collapse_is_told_by_the_run_s_first_step():
    advice, fallen = Advice(load()), HEALTHY | FAULTS["collapse"][0]
    assert [len(advice.after(step, [])) for step in (HEALTHY, fallen, fallen, fallen, fallen)] == [0, 0, 0, 1, 0]
    late = Advice(load())
    few = HEALTHY | {"rollout/same_action": float("nan")}
    assert [len(late.after(step, [])) for step in (few, HEALTHY, fallen, fallen, fallen)] == [0, 0, 0, 0, 1]
    always = Advice(load())
    assert not any(always.after(fallen, []) for _ in range(5))


def test_remedies_fit_the_case():
    assert "turns.min_turns=2," in told(*[{"profile/weight": [1.0, 1.0]}] * STEPS)["unweighted"]
    solved = told(*[{"turns/flat_groups": 1.0, "train/success": 1.0, "schedule/kappa": 0.0}] * STEPS)["flat"]
    assert "harder tasks" in solved and "nothing is learnt" in solved
    assert (
        "rollout.thinking=false" in told(*[FAULTS["cut off"][0]] * STEPS, settings=["rollout.thinking=true"])["cut off"]
    )


def test_each_thing_is_told_once_after_three_steps_in_a_row():
    advice, wrong = Advice(load()), HEALTHY | FAULTS["invalid"][0]
    episode = Trajectory(0, 0, 0, "full", [make_turn(START, "fly")])
    episode.turns[0].well_formed = False
    steps = [wrong, wrong, HEALTHY, wrong, wrong, wrong, wrong, wrong | FAULTS["flat"][0]]
    lines = [advice.after(step, [episode]) for step in steps]
    assert [len(found) for found in lines] == [0, 0, 0, 0, 0, 1, 0, 0] and "<action>fly</action>" in lines[5][0]


def test_an_example_is_an_invalid_response_and_short():
    good, bad = make_turn(START, "look"), make_turn(START, "x" * 500)
    bad.well_formed = False
    assert invalid_response([Trajectory(0, 0, 0, "full", [good])]) == ""
    found = invalid_response([Trajectory(0, 0, 0, "full", [good, bad])])
    assert found.startswith("<action>xxx") and len(found) < 150


def test_a_step_is_one_narrow_line_with_what_ends_attempts(capsys):
    shown = console.Console(speaks=True)
    shown.step(
        {
            "step": 12345,
            "rollout/invalid_actions": 0.972,
            "turns/flat_groups": 1.0,
            "turns/disagreement": float("nan"),
            "train/success": 1.0,
        }
    )
    heading, line = capsys.readouterr().out.splitlines()
    cells = dict(zip(heading.split(), line.split(), strict=True))
    assert (cells["invalid"], cells["flat"], cells["d"], cells["held-out"]) == ("97%", "100%", "-", "-")
    assert len(heading) == len(line) <= 110

    shown.splits = "eval", "dev"
    shown.lines = 0
    shown.step({"step": 1, "eval/success": 0.25, "dev/success": 0.5})
    heading, line = capsys.readouterr().out.splitlines()
    assert "dev" not in cells and list(zip(heading.split(), line.split(), strict=True))[2:4] == [
        ("held-out", "25.0%"),
        ("dev", "50.0%"),
    ]


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_transcript_holds_what_the_model_saw_mark_for_mark(tmp_path):
    text = "<|im_start|>user\nput a mug on the desk<|im_end|>\n<|im_start|>assistant\n"
    turn, lost = make_turn(START, stopped=False), make_turn("half a pair: \ud83d")
    turn.prompt, turn.stopped = TOKENIZER(text)["input_ids"], False
    played = [
        Trajectory(0, 0, 0, "window", [turn]),
        Trajectory(1, 0, 1, "window", [lost], failure="hung"),
        Trajectory(2, 0, 2, "window", [make_turn(START)]),
    ]
    transcripts.write(tmp_path / "a" / "step.jsonl", played, TOKENIZER, {"weight": torch.tensor([0.25, 0.75])})
    first, failed, last = read(tmp_path / "a" / "step.jsonl")
    assert (
        first["turns"][0]["prompt"] == text
        and first["turns"][0]["stopped"] is False
        and last["turns"][0]["stopped"] is True
    )
    assert last["turns"][0]["action"][-1] == END
    assert (first["turns"][0]["weight"], last["turns"][0]["weight"]) == (0.25, 0.75), (
        "a failed trajectory has no part in the signals"
    )
    assert "weight" not in failed["turns"][0] and failed["turns"][0]["observation"] == "half a pair: \ud83d"
    transcripts.write(tmp_path / "plain.jsonl", played)
    assert all("prompt" not in turn for record in read(tmp_path / "plain.jsonl") for turn in record["turns"])


def test_a_transcript_is_whole_or_the_one_before(tmp_path):
    path = tmp_path / "step.jsonl"
    played = [Trajectory(0, 0, 0, "window", [make_turn(START)])]
    transcripts.write(path, played)
    before = path.read_text()
    with pytest.raises(IndexError):
        transcripts.write(path, played * 2, signals={"weight": torch.ones(1)})
    assert path.read_text() == before


def test_a_run_records_its_evaluations_and_tells_of_responses_cut_off(tmp_path, capsys):
    lines = run(tmp_path, "train.steps=4", "rollout.response_tokens=3")
    names = sorted(path.name for path in (tmp_path / "trajectories").iterdir())
    assert names == [f"eval_{n}.jsonl" for n in ("000000", "000000_teacher", "000002", "000004")] + [
        "step_000002.jsonl",
        "step_000004.jsonl",
    ]
    for step in (2, 4):
        episodes = read(tmp_path / f"trajectories/eval_{step:06d}.jsonl")
        assert (
            len(episodes) == 10 and sum(episode["success"] for episode in episodes) / 10 == lines[step]["eval/success"]
        )
        assert all(turn["prompt"] and "weight" not in turn for episode in episodes for turn in episode["turns"])
        turns = [
            turn for episode in read(tmp_path / f"trajectories/step_{step:06d}.jsonl") for turn in episode["turns"]
        ]
        assert all(len(turn["action"]) == 3 for turn in turns if not turn["stopped"])
        assert lines[step]["rollout/cut_off"] == pytest.approx(sum(not turn["stopped"] for turn in turns) / len(turns))
    assert (
        sum(episode["success"] for episode in read(tmp_path / "trajectories/eval_000000_teacher.jsonl")) / 10
        == lines[0]["eval/teacher_success"]
    )
    assert (
        min(line["rollout/cut_off"] for line in lines[1:]) > 0.5
        and capsys.readouterr().out.count("cut off at rollout.response_tokens=3") == 1
    )


def test_transcripts_are_switched_off_whole_or_without_prompts(tmp_path):
    settings = "train.steps=1", "eval.teacher=false", "eval.tasks=2"
    run(tmp_path / "none", *settings, "observe.trajectories_every=0")
    assert not (tmp_path / "none" / "trajectories").exists()
    run(tmp_path / "lean", *settings, "observe.trajectories_every=1", "observe.prompts=false")
    for name in ("eval_000001", "step_000001"):
        assert all(
            "prompt" not in turn
            for record in read(tmp_path / "lean" / "trajectories" / f"{name}.jsonl")
            for turn in record["turns"]
        )


def test_an_evaluation_names_its_tasks_and_writes_their_episodes(tmp_path):
    out, episodes = tmp_path / "new" / "evaluation.json", tmp_path / "episodes.jsonl"
    assert evaluate.main(["demo:teacher", "eval.tasks=10", "--out", str(out), "--transcripts", str(episodes)]) == 0
    found = json.loads(out.read_text())
    assert [episode["task"] for episode in found["episodes"]] == sorted(
        {episode["task"] for episode in found["episodes"]}
    )
    assert "".join(str(int(episode["success"])) for episode in found["episodes"]) == found["outcomes"]
    assert found["turns"] == pytest.approx(sum(episode["turns"] for episode in found["episodes"]) / 10)
    for episode, record in zip(found["episodes"], read(episodes), strict=True):
        assert episode.pop("turns") == len(record["turns"]) and episode.items() <= record.items()
        assert episode["task_id"] and record["turns"][0]["prompt"].startswith("<bos>")


@pytest.mark.parametrize("option", ["--out", "--transcripts"])
def test_an_evaluation_that_could_not_be_written_is_not_played(tmp_path, capsys, monkeypatch, option):
    monkeypatch.setattr(evaluate, "evaluate", lambda *_: pytest.fail("played"))
    assert evaluate.main(["demo:teacher", option, str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert option in line and str(tmp_path) in line


def test_the_console_prints_what_it_is_given(capsys):
    console.Console(speaks=True).say("the model says :smile: and [bold]")
    assert ":smile: and [bold]" in capsys.readouterr().out
