"""The command that collects conversations, from experts and from models."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
from pathlib import Path

import pytest

from atod_fast import cli, collect
from atod_fast.config import Config
from atod_fast.envs import make
from atod_fast.errors import EngineFailure
from atod_fast.models import load_tokenizer
from atod_fast.renderers import make_renderer
from atod_fast.rollout.actor import Actor
from helpers.chat_models import save_chat_model
from helpers.gloo import run_ranks
from helpers.guess import BLOCKS
from helpers.paths import ROOT
from helpers.worlds import Rooms

ALFWORLD = ["env.name=alfworld", "env.max_turns=50", "env.train={generate=20, scene='full'}"]
WEBSHOP = ["env.name=webshop", "env.max_turns=15", "env.train={generate=60, nouns='heuristic'}"]
SEARCHQA = ["env.name=searchqa", "env.max_turns=4", "env.train={generate=40}"]
WORLDS = {"alfworld": ALFWORLD, "webshop": WEBSHOP, "searchqa": SEARCHQA}
OWN = ["expert", "--preset", "own"]


class Led(Rooms):
    """Rooms with an expert, who says what wins except in task 3, and fails in task 4."""

    def __init__(self, *, tasks: int = 20) -> None:
        super().__init__(tasks=tasks)

    def clone(self) -> Led:
        return Led(tasks=self.tasks)

    def expert(self) -> Led:
        return self

    def act(self, observation: str, info: dict) -> str:
        if self.task == 4:
            raise KeyError("lost")
        return "no" if self.task == 3 else "Take The Mug"


LED = [*OWN, "student.path=", f"env.name={__name__}:Led", "env.train={tasks=6}"]


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> str:
    return save_chat_model(tmp_path_factory.mktemp("student"))


def collected(out: Path, *arguments: str, code: int = 0) -> list[dict]:
    assert collect.main([*arguments, "--out", str(out)]) == code
    return [json.loads(line) for line in out.read_text().splitlines()] if code == 0 else []


@pytest.mark.parametrize("context", ["full", "window"])
@pytest.mark.parametrize("world", WORLDS)
def test_an_expert_s_messages_have_the_tokens_of_the_rollout(world, context, student, tmp_path):
    settings = [*WORLDS[world], f"rollout.context={context}", "rollout.prompt_tokens=12000", f"student.path={student}"]
    settings += ["rollout.thinking=true", "rollout.response_tokens=512"]
    found = collected(tmp_path / "demos.jsonl", *OWN, *settings, "n=6")
    assert found and all(line["success"] and all(line["valid"]) and all(line["stopped"]) for line in found)
    _, config = cli.parse_collection([*OWN, *settings, "--out", "x"], None)
    tokenizer = load_tokenizer(student)
    env = make(config.env.name, **config.env.train)
    renderer = make_renderer(config, tokenizer, len(tokenizer) + 6, env)
    for line in found:
        assert renderer.tokens(line["messages"]) == list(zip(line["prompt_ids"], line["response_ids"], strict=True))
        for message, ids in zip(line["messages"][1::2], line["response_ids"], strict=True):
            text, _, valid = renderer.parse(ids, True, {})
            assert text == message["content"] and valid and "<think>" in text
    by_episode: dict[int, list[int]] = {}
    for line in found:
        by_episode.setdefault(line["episode"], []).append(line["turn"])
        assert len(line["messages"]) == 2 * len(line["valid"])
    turns = {line["episode"]: line["turns"] for line in found}
    for episode, numbers in by_episode.items():
        assert numbers == (list(range(turns[episode])) if context == "window" else [0])


def test_the_demos_models_get_the_demos_words(tmp_path):
    for preset, name in (("demo", "alfworld"), ("demo-webshop", "webshop"), ("demo-searchqa", "searchqa")):
        found = collected(tmp_path / f"{name}.jsonl", "expert", "--preset", preset, "n=20")
        assert len(found) >= 18
        _, config = cli.parse_collection(["expert", "--preset", preset, "--out", "x"], None)
        tokenizer = load_tokenizer(config.student.path)
        env = make(config.env.name, **(config.env.options | config.env.train))
        renderer = make_renderer(config, tokenizer, len(tokenizer), env)
        for line in found:
            assert renderer.tokens(line["messages"]) == list(zip(line["prompt_ids"], line["response_ids"], strict=True))


def test_a_model_s_episodes_are_kept_with_their_sampled_tokens(tmp_path):
    found = collected(tmp_path / "all.jsonl", "demo:teacher", "n=30", "--all")
    won = collected(tmp_path / "won.jsonl", "demo:teacher", "n=30")
    assert [line["episode"] for line in found] == list(range(30))
    assert won == [line for line in found if line["success"]] and 0 < len(won) < 30
    assert all((line["reward"] > 0) == line["success"] for line in found)
    tokenizer = load_tokenizer("demo:teacher")
    for line in found:
        for message, ids in zip(line["messages"][1::2], line["response_ids"], strict=True):
            assert tokenizer.decode(ids).removesuffix("<eoa>").strip() == message["content"]


def test_more_episodes_than_tasks_begin_anew_with_other_seeds(tmp_path):
    found = collected(tmp_path / "all.jsonl", "demo:teacher", "env.train={generate=6}", "n=15", "--all")
    tasks = [line["task"] for line in found]
    assert sorted(tasks[:6]) == sorted(tasks[6:12]) == list(range(6)) and tasks[:6] != tasks[6:12]
    by_task = {task: {str(line["response_ids"]) for line in found if line["task"] == task} for task in range(6)}
    assert any(len(played) > 1 for played in by_task.values())


def test_the_same_seed_gives_the_same_file_on_one_rank_and_on_two_and_in_parts(tmp_path, monkeypatch):
    files = [tmp_path / name for name in ("one", "two", "parts", "other")]
    asked = ["demo:teacher", "n=14", "--all"]
    collected(files[0], *asked)
    assert run_ranks(2, collect.main, [*asked, "--out", str(files[1])]) == [0, 0]
    monkeypatch.setattr(collect, "AT_ONCE", 5)
    collected(files[2], *asked)
    collected(files[3], *asked, "train.seed=5")
    one, two, parts, other = (file.read_text() for file in files)
    assert one == two == parts != other
    expert = ["expert", "n=9"]
    collected(tmp_path / "expert", *expert)
    assert run_ranks(2, collect.main, [*expert, "--out", str(tmp_path / "experts")]) == [0, 0]
    assert (tmp_path / "expert").read_text() == (tmp_path / "experts").read_text()


def test_an_expert_of_one_s_own_and_messages_without_a_tokenizer(tmp_path, capsys):
    found = collected(tmp_path / "demos.jsonl", *LED, "rollout.context=full")
    assert sorted(line["task"] for line in found) == [0, 1, 2, 5]
    line = found[0]
    assert "prompt_ids" not in line and line["messages"][0]["content"].startswith("Say something.\n\ntask ")
    assert line["messages"][1] == {"role": "assistant", "content": "<action>Take The Mug</action>"}
    assert line["task_type"] == "walk" and line["task_id"] == f"corridor-{line['task']}"
    said = capsys.readouterr().out
    assert "success 66.7% in 6 episodes" in said and "1 environments failed" in said
    everyone = collected(tmp_path / "all.jsonl", *LED, "rollout.context=full", "--all")
    assert sorted(line["task"] for line in everyone) == [0, 1, 2, 3, 5]
    window = collected(tmp_path / "window.jsonl", *LED)
    assert [line["turn"] for line in window] == [n for line in found for n in range(line["turns"])]


def test_the_page_s_expert_and_commands(tmp_path, monkeypatch):
    page = (ROOT / "docs" / "collect.md").read_text(encoding="utf-8")
    (expert,) = re.findall("```python\n(.*?)```", page, re.DOTALL)
    method = "\n    def expert(self):\n        return Halving()\n\n    def clone("
    world = BLOCKS["python"][0].replace("\n    def clone(", method)
    assert method in world
    (tmp_path / "halved.py").write_text(f"{world}\n\n{expert}")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    own = ["student.path=", "env.name=halved:Guess", "env.train={tasks=30, seed=0}", "env.max_turns=8"]
    assert len(collected(tmp_path / "guesses.jsonl", *OWN, *own, "rollout.context=full")) == 30
    lines = [
        shlex.split(line) for block in re.findall("```sh\n(.*?)```", page, re.DOTALL) for line in block.splitlines()
    ]
    runnable = [line[3:] for line in lines if "expert" in line and "alfworld-1.7b" not in line]
    assert len(runnable) == 2
    for arguments in runnable:
        assert collect.main([*arguments, "--overwrite"]) == 0


REFUSED = {
    "unknown preset": (["expert", "--preset", "nowhere"], "nowhere"),
    "no expert": ([*OWN, "student.path=", "env.name=helpers.worlds:Rooms"], "has no expert"),
    "no environment": ([*OWN, "student.path="], "env.name"),
    "n=0": ([*LED, "n=0"], "n=0 must be a whole number of at least 1"),
    "n of words": ([*LED, "n=many"], "n=many must be"),
    "n beyond the tasks": ([*LED, "n=7"], "n=7 exceeds the 6 tasks of env.train"),
    "unknown key": ([*LED, "rollout.temprature=1"], "rollout.temperature"),
    "no model": (["./nowhere"], "./nowhere"),
    "no student": ([*OWN, *ALFWORLD, "student.path=./nowhere"], "student.path= writes messages without tokens"),
    "none succeeds": ([*LED, "env.max_turns=1"], "none of 6 episodes succeeded"),
    "option": (["expert", "env.train={generates=3}"], "generate"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_collected_is_refused_in_one_line_and_leaves_nothing(case, tmp_path, capsys):
    arguments, message = REFUSED[case]
    collected(tmp_path / "demos.jsonl", *arguments, code=2)
    said = capsys.readouterr().err.strip().splitlines()
    assert len([line for line in said if line.startswith("atod_fast: ")]) == 1 and message in said[-1]
    assert not list(tmp_path.iterdir())


def test_a_file_is_not_replaced_unasked_and_never_half(tmp_path, capsys):
    out = tmp_path / "demos.jsonl"
    out.write_text("mine")
    collected(out, *LED, code=2)
    assert out.read_text() == "mine" and "--overwrite" in capsys.readouterr().err
    collected(out, *LED, "env.max_turns=1", "--overwrite", code=2)
    assert out.read_text() == "mine"
    assert len(collected(out, *LED, "--overwrite")) > 4
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_a_place_that_cannot_be_written_is_refused_before_anything_is_played(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Actor, "collect", lambda *_: pytest.fail("played"))
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "demos.jsonl", Path("/proc/demos.jsonl")):
        assert collect.main([*LED, "--out", str(out)]) == 2
        assert f"--out {out}: " in capsys.readouterr().err
    assert collect.main([*LED, "--out", str(tmp_path), "--overwrite"]) == 2
    assert collect.main(LED) == 2


def test_an_interruption_keeps_the_episodes_before_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(collect, "AT_ONCE", 3)
    real, calls = Actor.collect, []

    def play(self, *arguments):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, *arguments)

    monkeypatch.setattr(Actor, "collect", play)
    out = tmp_path / "demos.jsonl"
    assert collect.main(["expert", "n=9", "--out", str(out)]) == 130
    assert [json.loads(line)["episode"] for line in out.read_text().splitlines()] == [0, 1, 2]
    assert "interrupted after 3 of 9 episodes" in capsys.readouterr().out


def test_an_engine_that_breaks_down_leaves_nothing(tmp_path, monkeypatch):
    def broken(*_):
        raise EngineFailure("down")

    monkeypatch.setattr(Actor, "collect", broken)
    assert collect.main(["demo:teacher", "n=3", "--out", str(tmp_path / "demos.jsonl")]) == 3
    assert not list(tmp_path.iterdir())


def test_settings_of_a_collection_name_no_other_model():
    arguments, config = cli.parse_collection(["expert", "--out", "x"], None)
    assert isinstance(config, Config) and not arguments.plain and arguments.n is None
    arguments, _ = cli.parse_collection([*LED, "n=4", "--out", "x"], None)
    assert arguments.plain and arguments.n == 4
