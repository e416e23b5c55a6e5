"""Refusals at the start of a run: the dry run gives the same line, but goes on without what is on another machine."""

from __future__ import annotations

import json
import shutil
import socket
import sys
from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config

from atod_fast import dry_run, models, preflight, train
from atod_fast.config import settings
from atod_fast.config.settings import load
from atod_fast.errors import NotHere, UserError
from helpers.chatml import make_tokenizer
from helpers.tiny import save_model

SMALL = ["train.steps=1", "train.tasks_per_step=2", "train.group_size=2", "eval.tasks=10"]
WORLD = """
class Counted:
    instant = True

    def __init__(self, *, tasks: int = 5, names: list[str] | None = None, share: float = 0.5, easy: bool = True, \
        fail: str = ""):
        if fail:
            raise {"file": FileNotFoundError, "value": ValueError, "server": ConnectionRefusedError}[fail]("no\\nluck")
        self.tasks = tasks

    def __len__(self):
        return self.tasks

    def reset(self, seed, task): ...

    def step(self, action): ...

    def clone(self): ...

    def close(self): ...

    def prompt(self, thinking, history):
        from atod_fast.envs.prompt import PlainPrompt

        return PlainPrompt(thinking, history)
"""


@pytest.fixture
def chat(tmp_path) -> str:
    """A chat model."""
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path / "chat")
    return save_model(tmp_path / "chat", vocabulary=len(tokenizer) + 3, positions=1024)


@pytest.fixture
def counted(tmp_path, monkeypatch) -> None:
    """The module `counted`, which holds an environment of one's own."""
    (tmp_path / "counted.py").write_text(WORLD)
    (tmp_path / "broken.py").write_text("def\n")
    monkeypatch.syspath_prepend(tmp_path)


@pytest.fixture
def nothing_here(tmp_path, monkeypatch) -> None:
    """A machine without models and data, and without network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ALFWORLD_DATA", raising=False)
    monkeypatch.setattr(models, "try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("a dry run reached for the network"))


def counted_with(model: str) -> list[str]:
    """Return the arguments of a run in the environment `counted` with `model` as student and teacher."""
    own = ["--preset", "own", "env.name=counted:Counted", "rollout.prompt_tokens=512"]
    return [*own, f"student.path={model}", f"teacher.path={model}"]


def refusal(capsys, tmp_path, *given: str) -> str:
    """Return the line with which both the dry run and the run refuse."""
    said = []
    for how in (["--dry-run"], ["--run-dir", str(tmp_path / "run")]):
        assert train.main([*given, *how]) == 2
        said.append(capsys.readouterr().err.splitlines())
    assert said[0][-1] == said[1][-1]
    assert not (tmp_path / "run").exists()
    return said[0][-1]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("env.eval.generate=9", "eval.tasks=10 exceeds the 9 tasks of env.eval"),
        ("checkpoint.keep_best=true env.dev.generate=9", "eval.tasks=10 exceeds the 9 tasks of env.dev"),
        ("checkpoint.keep_best=true env.dev.sead=9", "has no option 'sead'; did you mean seed?"),
        ("env.train={generate='many'}", "generate='many' must be a whole number"),
        (
            "env.name=counted:Counted env.options={tasks='many'}",
            "env.name='counted:Counted': tasks='many' must be a whole number; correct env.options",
        ),
        (
            "env.name=counted:Counted env.eval={tasks=10, fail='value'}",
            "fail='value': ValueError: no luck (counted.py:7)",
        ),
        ("env.name=broken:World", "env.name='broken:World' cannot be loaded"),
        ("teacher.path=demo:webshop/teacher", "student.path and teacher.path have different tokenizers"),
        ("env.name=searchqa env.options={generate=10}", "the demo's model speaks of alfworld only"),
        (
            "student.attention=flash_attention_2",
            "student.attention=flash_attention_2 computes in 16 bits, and student.compute_dtype=auto is fp32 here",
        ),
        (
            "student.attention=flash_attention_2 student.compute_dtype=bf16 teacher.compute_dtype=bf16",
            "student.attention: flash_attention_2 is not to be had",
        ),
        ("student.liger=on", "student.liger='on' needs CUDA"),
        ("rollout.prompt_tokens=100000", "exceeds the"),
        ("rollout.engine=vllm eval.temperature=3", "eval.temperature=3: vLLM samples at"),
        ("student.path=other", "'other' holds a 't5' model"),
        ("student.path=.", "'.' holds no config.json"),
        ("student.path=far/too/deep", "'far/too/deep' is neither a folder"),
        ("rollout.context=window", "rollout.context='window' needs a chat model"),
        ("student.path=quantised", "'quantised' holds quantised weights (bnb)"),
    ],
)
def test_run_and_dry_run_refuse_alike(given, words, counted, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("other", "quantised"):
        shutil.copytree(models.resolve("demo:student"), tmp_path / name)
        config = json.loads((tmp_path / name / "config.json").read_text())
        new = (
            {"model_type": "t5", "architectures": []}
            if name == "other"
            else {"quantization_config": {"quant_method": "bnb"}}
        )
        (tmp_path / name / "config.json").write_text(json.dumps(config | new))
    line = refusal(capsys, tmp_path, *SMALL, *given.split(" ") if "{" not in given else tables(given))
    assert words in line


def tables(text: str) -> list[str]:
    """Arguments whose tables hold blanks."""
    out: list[str] = []
    for word in text.split(" "):
        if out and out[-1].count("{") > out[-1].count("}"):
            out[-1] += " " + word
        else:
            out.append(word)
    return out


def test_what_a_chat_model_and_its_environment_are_asked(chat, counted, tmp_path, capsys):
    own = [*counted_with(chat), "eval.tasks=5"]
    assert train.main([*own, "--dry-run"]) == 0
    assert "# total" in capsys.readouterr().out
    assert "env.train holds no tasks" in refusal(capsys, tmp_path, *own, "env.train.tasks=0")
    (Path(chat) / "chat_template.jinja").unlink()
    assert "has no chat template" in refusal(capsys, tmp_path, *own)


def test_a_folder_that_holds_a_run_refuses_its_dry_run_too(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").touch()
    for how in ([], ["--dry-run"]):
        assert train.main([*SMALL, "--run-dir", str(tmp_path / "run"), *how]) == 2
        assert "already holds a run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("preset", "data"),
    [("alfworld-4b", "$ALFWORLD_DATA"), ("webshop-1.7b", "items_ins_v2_1000.json"), ("searchqa-0.6b", "test.jsonl")],
)
def test_a_shipped_preset_is_planned_on_a_machine_without_anything(preset, data, nothing_here):
    config = load(preset)
    text = dry_run.describe(config, 8)
    assert "# total" in text and "parameters" in text
    unchecked = text.partition("# not checked:\n")[2]
    for name in (config.student.path, config.teacher.path):
        assert f"{name!r}: config.json, tokenizer, weights not on this machine, planned as published" in unchecked
    assert data in unchecked and "env.eval: " in unchecked and "env.train: " in unchecked


def test_a_config_json_that_is_here_wins_over_the_published_one(nothing_here, tmp_path):
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
    }
    for name in ("Qwen3-0.6B", "Qwen3-4B"):
        Qwen3Config(vocab_size=100, **sizes).save_pretrained(tmp_path / "Qwen" / name)
    text = dry_run.describe(load("alfworld-0.6b", None, ["rollout.prompt_tokens=1024"]), 1)
    assert "student Qwen/Qwen3-0.6B: 596" not in text and "student Qwen/Qwen3-0.6B: " in text
    assert "student.path='Qwen/Qwen3-0.6B': tokenizer, weights not on this machine\n" in text


@pytest.mark.parametrize("fail", ["file", "server"])
def test_a_file_or_a_server_that_is_not_here_is_listed(fail, counted, chat, capsys):
    own = counted_with(chat)
    assert train.main([*own, f"env.options.fail={fail}", "--dry-run"]) == 0
    assert "env.train: env.name='counted:Counted' cannot be made with fail=" in capsys.readouterr().out


def test_no_teacher_is_planned_where_none_is_needed(chat, counted, tmp_path):
    own = [
        "env.name=counted:Counted",
        "eval.tasks=5",
        "rollout.prompt_tokens=512",
        f"student.path={chat}",
        "objective.preset=grpo",
    ]
    bare = dry_run.describe(load("own", None, [*own, "teacher.path="]), 1)
    table = bare.partition("# memory of a rank")[2]
    assert "no teacher scores" in bare and "teacher" not in table.partition("# not checked")[0]
    played = (
        dry_run.describe(load("own", None, [*own, f"teacher.path={chat}"]), 1)
        .partition("# memory of a rank")[2]
        .partition("# not checked")[0]
    )
    assert "teacher's engine" in played and "teacher, " not in played
    assert dry_run.describe(load("own", None, [*own, "teacher.path=./absent", "eval.teacher=false"]), 1), (
        "a teacher that is not used is not looked for"
    )


def test_a_folder_that_is_not_on_this_machine_is_not_checked(capsys):
    """Such as /models/..., which exists on the machine with the GPUs."""
    settings = [*SMALL, "teacher.path=/no/such/teacher"]
    assert train.main([*settings, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "#   teacher.path: model path '/no/such/teacher' does not exist here" in out and "memory: known once" in out
    assert train.main(settings) == 2
    assert "'/no/such/teacher' does not exist here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"prompt": lambda self, thinking, history: None},
            "returns NoneType, which lacks message, first, following, project",
        ),
        ({"prompt": lambda self, thinking, history: 1 / 0}, "prompt(thinking, history) fails: ZeroDivisionError"),
        ({"__len__": lambda self: "many"}, "__len__ fails: TypeError"),
        ({"__init__": lambda self: sys.exit(3)}, "cannot be made with no options: SystemExit: 3"),
    ],
)
def test_an_environment_that_cannot_be_used_is_one_line(chat, counted, change, words, capsys, monkeypatch):
    import counted as module

    for name, value in change.items():
        monkeypatch.setattr(module.Counted, name, value)
    own = [*counted_with(chat), "eval.tasks=5"]
    for arguments in (["--dry-run"], []):
        assert train.main([*own, *arguments]) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("atod_fast:")]
        assert words in line


def test_an_environment_whose_close_fails_can_be_planned(chat, counted, monkeypatch):
    import counted as module

    monkeypatch.setattr(module.Counted, "close", lambda self: 1 / 0)
    own = [*counted_with(chat), "eval.tasks=5"]
    assert train.main([*own, "--dry-run"]) == 0


def test_the_demo_s_values_beside_a_larger_model_are_warned_of(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(settings, "LARGEST_TINY", 1000)
    shutil.copytree(models.resolve("demo:student"), tmp_path / "mine")
    larger = [*SMALL, "eval.teacher=false", f"student.path={tmp_path / 'mine'}"]
    assert train.main([*larger, "--dry-run"]) == 0
    assert "\n# WARNING: train.learning_rate=0.0007" in capsys.readouterr().out
    assert train.main([*larger, "--run-dir", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out.startswith("WARNING: train.learning_rate=0.0007")


@pytest.mark.parametrize(
    ("options", "must"),
    [
        ({"tasks": 3.0}, "a whole number"),
        ({"tasks": True}, "a whole number"),
        ({"names": "a"}, "a list"),
        ({"share": "half"}, "a number"),
        ({"share": False}, "a number"),
        ({"easy": 1}, "true or false"),
        ({"fail": 3}, "text"),
        ({"tasks": 3, "names": ["a"], "share": 1, "easy": False, "fail": ""}, None),
        ({"names": None}, None),
    ],
)
def test_options_are_what_they_are_annotated_as(options, must, counted):
    from atod_fast.envs import check

    if must is None:
        check("counted:Counted", options)
        return
    ((name, value),) = options.items()
    with pytest.raises(UserError, match=f"{name}={value!r} must be {must};"):
        check("counted:Counted", options)


def test_annotations_that_say_nothing_are_not_checked(tmp_path, monkeypatch):
    (tmp_path / "loose.py").write_text(
        "from __future__ import annotations\n"
        "from collections.abc import Callable\n"
        "class Odd:\n    def __init__(self, a: Nowhere = 1, b: 'int' = 2, **more: int): ...\n"
        "class Wide:\n    def __init__(self, a: Callable | int, b: list[int] | str, c, **more: int): ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    from atod_fast.envs import check

    check("loose:Odd", {"a": "x", "b": "y"})
    check("loose:Wide", {"a": "x", "b": "y", "c": 3, "d": "z"})
    with pytest.raises(UserError, match="b=3 must be a list or text"):
        check("loose:Wide", {"a": "x", "b": 3, "c": 3})


def test_what_a_constructor_raises_is_one_line(counted):
    from atod_fast.envs import make

    with pytest.raises(
        UserError,
        match=(
            r"^env.name='counted:Counted' cannot be made with fail='value': "
            r"ValueError: no luck \(counted.py:7\); [^\n]*$"
        ),
    ):
        make("counted:Counted", fail="value")
    with pytest.raises(NotHere, match="FileNotFoundError"):
        make("counted:Counted", fail="file")


def test_on_cuda_varlen_computes_in_16_bits_only():
    config = load(None, None, ["student.attention=varlen", "teacher.compute_dtype=fp32"])
    assert preflight.look(config, 1, torch.device("cpu"), offline=True).models["teacher"].packs
    with pytest.raises(UserError, match="student.attention=varlen computes in 16 bits, and teacher.compute_dtype=fp32"):
        preflight.look(config, 1, torch.device("cuda"), offline=True)
