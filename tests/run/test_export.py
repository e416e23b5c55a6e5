"""Models out of checkpoints, with their tokenizer, configuration and generation settings."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from atod_fast import export, train
from atod_fast.models import load_model, load_tokenizer
from atod_fast.policy.export import write
from helpers.chatml import make_tokenizer
from helpers.runs import QUICK, tree
from helpers.tiny import save_model


def test_any_checkpoint_becomes_a_model(three, tmp_path, capsys):
    assert export.main([str(three), "--out", str(tmp_path / "last")]) == 0
    assert tree(tmp_path / "last") == tree(three / "hf")
    assert "checkpoints/step_000003" in capsys.readouterr().out
    assert export.main([str(three / "checkpoints/step_000002"), "--out", str(tmp_path / "second")]) == 0
    second, last = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("second", "last"))
    assert any(not torch.equal(second[name], last[name]) for name in last)
    assert AutoTokenizer.from_pretrained(tmp_path / "second").get_vocab() == load_tokenizer("demo:student").get_vocab()


def test_what_cannot_be_exported_is_one_line(three, copy, tmp_path, capsys):
    def refused(*arguments):
        assert export.main([*map(str, arguments)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert "is there already and not empty" in refused(three, "--out", three)
    assert "neither a checkpoint nor a run" in refused(tmp_path, "--out", tmp_path / "model")
    assert "checkpoint.keep_best=true" in refused(three, "--best", "--out", tmp_path / "model")
    assert "--best goes with a run" in refused(three / "checkpoints/step_000001", "--best", "--out", tmp_path / "model")
    assert "model.embed_tokens.weight is missing or of another shape" in refused(
        three, "--student", save_model(tmp_path / "s"), "--out", tmp_path / "m"
    )
    assert "required: --out" in refused(three)
    settings = (copy / "config.toml").read_text()
    (copy / "config.toml").write_text(settings.replace("demo:student", str(tmp_path / "moved")))
    assert "moved" in refused(copy, "--out", tmp_path / "model")
    assert export.main([str(copy), "--student", "demo:student", "--out", str(tmp_path / "model")]) == 0
    (copy / "config.toml").unlink()
    assert "name it with --student" in refused(copy, "--out", tmp_path / "other")
    for part in (copy / "checkpoints/step_000003").glob("*.distcp"):
        part.write_bytes(part.read_bytes()[:1000])
    assert "is damaged" in refused(copy, "--student", "demo:student", "--out", tmp_path / "other")


def test_help_needs_no_torch():
    code = (
        "import sys; from atod_fast import export\ntry: export.main(['--help'])\n"
        "except SystemExit: print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.endswith(
        "False\n"
    )


@pytest.fixture
def source(tmp_path):
    save_model(tmp_path / "source", vocabulary=len(make_tokenizer()) + 3)
    make_tokenizer().save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def written(source, out, tokenizer=None, stop_ids=(7, 1)):
    weights = load_model(str(source), torch.float32).state_dict()
    return write(out, weights, str(source), tokenizer or load_tokenizer(str(source)), stop_ids)


@pytest.mark.parametrize("given", [{"temperature": 0.9, "top_p": 0.6}, {"do_sample": False, "temperature": 0.6}])
def test_a_generation_config_is_copied_even_where_transformers_would_not_write_it(source, tmp_path, given):
    (source / "generation_config.json").write_text(json.dumps(given | {"eos_token_id": 5, "of its own": [1]}))
    assert written(source, tmp_path / "out") == []
    assert json.loads((tmp_path / "out/generation_config.json").read_text()) == given | {
        "eos_token_id": [1, 7],
        "of its own": [1],
    }
    assert written(source, tmp_path / "as it was", stop_ids=None) == []
    assert json.loads((tmp_path / "as it was/generation_config.json").read_text())["eos_token_id"] == 5
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").generation_config.eos_token_id == [1, 7]


def test_without_a_generation_config_the_models_own_is_written(source, tmp_path):
    (source / "generation_config.json").unlink()
    assert written(source, tmp_path / "out") == []
    found = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert found["eos_token_id"] == [1, 7] and found["bos_token_id"] == 2 and found["pad_token_id"] == 0


def test_an_optional_file_that_cannot_be_written_is_a_line_and_the_weights_are_there(source, tmp_path):
    class Broken:
        def save_pretrained(self, path):
            raise RuntimeError("no such class\nand more")

    (source / "generation_config.json").write_text("{")
    # As what made it would find it: transformers itself would not load the model.
    weights = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source)).state_dict()
    lines = write(tmp_path / "out", weights, str(source), Broken(), [1])
    assert [line.partition(" could not")[0] for line in lines] == [
        f"the tokenizer of {tmp_path}/out",
        f"generation_config.json of {tmp_path}/out",
    ]
    assert "(RuntimeError: no such class)" in lines[0] and "copy it from" in lines[0]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).state_dict()
    assert all(torch.equal(loaded[name], weights[name]) for name in loaded)


def test_the_configuration_written_is_the_sources(tmp_path):
    save_model(tmp_path / "source")
    facts = json.loads((tmp_path / "source/config.json").read_text()) | {"attention_dropout": 0.25, "dtype": "bfloat16"}
    (tmp_path / "source/config.json").write_text(json.dumps(facts))
    model = load_model(str(tmp_path / "source"), torch.float32)
    model.config.attention_dropout = 0.0
    assert write(tmp_path / "out", model.state_dict(), str(tmp_path / "source"), make_tokenizer(), [1]) == []
    assert json.loads((tmp_path / "out/config.json").read_text()) == facts
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_curves_that_cannot_be_drawn_end_no_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "atod_fast.observe.curves", raising=False)
    assert train.main([*QUICK, "train.steps=1", "--run-dir", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert (
        "curves.png could not be drawn (ModuleNotFoundError" in out
        and "held-out success" in out
        and (tmp_path / "run/hf/config.json").is_file()
    )
