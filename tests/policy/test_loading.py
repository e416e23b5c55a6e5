"""Sharded loading: what transformers loads whole, bit for bit, with the memory of a shard; what cannot be loaded."""

from __future__ import annotations

import inspect
import json
import logging
import shutil
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from architectures import FAMILIES, make
from loading import Peak
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Chunk, WeightConverter, convert_and_load_state_dict_in_model
from transformers.core_model_loading import rename_source_key as rename
from transformers.distributed.sharding_utils import DtensorShardOperation
from transformers.modeling_utils import LoadStateDictConfig

from atod_fast import models, preflight, ranks, train, weights
from atod_fast.errors import UserError
from atod_fast.models import Compute, load_config, load_model, round_buffers, skeleton
from atod_fast.policy.loading import load_student, load_teacher
from atod_fast.policy.model import CausalPolicy
from atod_fast.policy.packing import collate
from atod_fast.policy.resync import stream_weights
from atod_fast.policy.sharding import shard
from helpers.gloo import run_ranks
from helpers.tiny import random_rows, save_model

NAMES = {family.name: family for family in FAMILIES}


def test_the_loader_inside_transformers_is_as_it_was():
    """What weights.py calls there is no public interface: a version that moves it must fail here, not in a run."""
    called = {
        convert_and_load_state_dict_in_model: ["model", "state_dict", "load_config", "disk_offload_index"],
        rename: [
            "source_key",
            "weight_renamings",
            "weight_converters",
            "base_model_prefix",
            "meta_state_dict",
            "reverse",
        ],
        DtensorShardOperation.shard_tensor: ["self", "source", "tensor_idx", "device", "dtype"],
        PreTrainedModel._move_missing_keys_from_meta_to_device: [
            "self",
            "missing_keys",
            "device_map",
            "device_mesh",
            "hf_quantizer",
        ],
        PreTrainedModel._adjust_missing_and_unexpected_keys: ["self", "loading_info"],
        PreTrainedModel._get_dtype_plan: ["self", "dtype"],
        PreTrainedModel.initialize_weights: ["self"],
    }
    assert {function: [*inspect.signature(function).parameters] for function in called} == called
    assert {"device_map", "weight_mapping", "dtype", "dtype_plan"} <= {f.name for f in fields(LoadStateDictConfig)}
    source = inspect.getsource(weights)
    assert "convert_and_load_state_dict_in_model(root" in source
    others = [file for file in Path(weights.__file__).parent.rglob("*.py") if file.name != "weights.py"]
    assert not [file for file in others if "convert_and_load" in file.read_text(encoding="utf-8")]


def tensors(module) -> dict[str, torch.Tensor]:
    return {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers())}


def local(tensor):
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def differences(whole: CausalPolicy, found: CausalPolicy) -> list[str]:
    """Return the names of what differs between two sharded policies: tensors, outputs, gradients, weights sent."""
    ours, theirs = tensors(found), tensors(whole)
    if [*ours] != [*theirs]:
        return ["names"]
    out = [
        name
        for name, tensor in theirs.items()
        if (tensor.dtype, tensor.shape, tensor.requires_grad, type(tensor))
        != (ours[name].dtype, ours[name].shape, ours[name].requires_grad, type(ours[name]))
        or not torch.equal(local(tensor), local(ours[name]))
    ]
    heads = [(p.tied, p.packs, p.parts.head.scale, p.parts.head.softcap) for p in (whole, found)]
    out += ["head"] if heads[0] != heads[1] else []
    sent = [{name: tensor.clone() for name, tensor in stream_weights(policy)} for policy in (whole, found)]
    if [*sent[0]] != [*sent[1]] or not all(torch.equal(sent[0][name], sent[1][name]) for name in sent[0]):
        out.append("weights sent")
    batch = collate(random_rows(2, seed=ranks.rank()), packed=False)
    hidden = [policy.train()(batch, None) for policy in (whole, found)]
    if not torch.equal(*hidden):
        out.append("hidden")
    if hidden[0].requires_grad:
        for states in hidden:
            states.float().square().mean().backward()
        for name, parameter in whole.named_parameters():
            pair = parameter.grad, found.get_parameter(name).grad
            if (pair[0] is None) != (pair[1] is None) or (pair[0] is not None and not torch.equal(*map(local, pair))):
                out.append(f"gradient of {name}")
    return out


def compare(paths: list[str], shape: tuple[int, ...], map_fused: bool = False) -> dict[str, list[str]]:
    """Load every model sharded and whole, as student and teacher, in fp32 and bf16; return what differs."""
    if map_fused:
        fused_projections()
    ranks.start()
    names = ("replicate", "shard")[-len(shape) :]
    mesh, out = init_device_mesh("cpu", shape, mesh_dim_names=names), {}
    for path in paths:
        for dtype in (torch.float32, torch.bfloat16):
            compute = Compute(path, dtype, "eager")
            found = load_student(compute, mesh, liger=False, checkpointing=True)
            model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
            round_buffers(model, dtype)
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            out[f"{path} student {dtype}"] = differences(shard(CausalPolicy(model), mesh, dtype), found)
            found = load_teacher(compute, mesh, offload=False)
            model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="eager")
            whole = shard(CausalPolicy(model.requires_grad_(False)), mesh, dtype)
            out[f"{path} teacher {dtype}"] = differences(whole, found)
    return out


def save(folder: Path, name: str, *, tied: bool = False, file_size: str = "50GB", **options) -> str:
    family = NAMES[name]
    model = make(replace(family, options=family.options | options), tied)
    model.save_pretrained(folder, max_shard_size=file_size)
    return str(folder)


def change(path: str, edit) -> str:
    """Write the weights that `edit` makes of those at `path`."""
    file = Path(path) / "model.safetensors"
    save_file(edit(load_file(file)), file, metadata={"format": "pt"})
    return path


def pickled(path: str, **options) -> str:
    """Write the weights of a folder as pytorch_model.bin instead; a tied head is in it, as in old checkpoints."""
    model = AutoModelForCausalLM.from_pretrained(path)
    torch.save(model.state_dict(), Path(path) / "pytorch_model.bin", **options)
    (Path(path) / "model.safetensors").unlink()
    return path


def test_shards_are_those_of_the_whole_model(tmp_path):
    """Four ranks; 3 and 6 experts leave ranks with fewer experts than others, or without any."""
    paths = [
        save(tmp_path / "tied", "Qwen3", tied=True),
        save(tmp_path / "files", "Qwen3", file_size="20KB"),
        save(tmp_path / "experts", "Qwen3 MoE", file_size="40KB", num_experts=6),
        save(tmp_path / "few", "Qwen3 MoE", tied=True, num_experts=3),
        save(tmp_path / "buffers", "DeepSeek V3"),
        save(tmp_path / "softcap", "Gemma 2", tied=True),
        save(tmp_path / "scale", "Granite"),
        pickled(save(tmp_path / "bin", "Qwen3", tied=True)),
        pickled(save(tmp_path / "old", "Qwen3"), _use_new_zipfile_serialization=False),
        change(
            save(tmp_path / "head", "Qwen3", tied=True),
            lambda held: {name.replace("model.embed_tokens", "lm_head"): value for name, value in held.items()},
        ),
        change(
            save(tmp_path / "both", "Qwen3", tied=True),
            lambda held: held | {"lm_head.weight": held["model.embed_tokens.weight"].clone()},
        ),
    ]
    assert len([*Path(paths[1]).glob("*.safetensors")]) > 3
    for found in run_ranks(4, compare, paths, (4,)):
        assert len(found) == 4 * len(paths) and not any(found.values()), {k: v for k, v in found.items() if v}


def test_shards_of_a_mesh_that_also_replicates(tmp_path):
    paths = [save(tmp_path / "tied", "Qwen3", tied=True), save(tmp_path / "experts", "Qwen3 MoE")]
    for found in run_ranks(4, compare, paths, (2, 2)):
        assert found and not any(found.values()), found


def fused_projections() -> None:
    """Let checkpoints of Qwen3 hold q, k and v as one: a shard of the whole is no shard of its parts."""
    parts = [f"self_attn.{part}_proj.weight" for part in "qkv"]
    rule = WeightConverter("self_attn.qkv.weight", parts, operations=[Chunk(dim=0)])
    register_checkpoint_conversion_mapping("qwen3", [rule], overwrite=True)


def fuse(held: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    for name in [name for name in held if ".q_proj" in name]:
        parts = [held.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        held[name.replace("q_proj", "qkv")] = torch.cat(parts)
    return held


def test_a_conversion_that_no_shard_can_do_alone_is_done_on_whole_tensors(tmp_path):
    path = change(save(tmp_path / "fused", "Qwen3", num_key_value_heads=4), fuse)
    for found in run_ranks(3, compare, [path], (3,), True):
        assert found and not any(found.values()), found


def test_one_process_holds_what_from_pretrained_holds(tmp_path):
    for name, tied in (("Qwen3", True), ("Qwen3 MoE", False), ("Llama 4, text", False), ("gpt-oss", False)):
        path = save(tmp_path / name, name, tied=tied)
        for dtype in (torch.float32, torch.bfloat16):
            before = torch.random.get_rng_state()
            found = load_model(path, dtype, "eager")
            assert torch.equal(before, torch.random.get_rng_state())
            whole = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="eager")
            ours, theirs = tensors(found), tensors(whole)
            assert [*ours] == [*theirs]
            for key, tensor in theirs.items():
                assert ours[key].dtype == tensor.dtype and torch.equal(ours[key], tensor), key


def peak(path: str, sharded: bool) -> tuple[int, int]:
    """Return the bytes of this rank's memory beyond its shards while a model is loaded, and of its largest tensor."""
    _, mesh = ranks.start()
    compute = Compute(path, torch.float32, "eager")
    shard(CausalPolicy(skeleton(load_config(path))), mesh, torch.float32)  # imports all that is needed
    with Peak() as found:
        if sharded:
            policy = load_student(compute, mesh, liger=False, checkpointing=False)
        else:
            whole = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
            policy = shard(CausalPolicy(whole), mesh, torch.float32)
    sizes = [(4 * p.numel(), 4 * p.to_local().numel()) for p in policy.parameters()]
    return found.own - sum(mine for _, mine in sizes), max(whole for whole, _ in sizes)


@pytest.mark.parametrize("name", ["Qwen3", "Qwen3 MoE"])
def test_a_rank_holds_its_shards_and_one_tensor(tmp_path, name):
    sizes = {"hidden_size": 512, "num_hidden_layers": 8, "intermediate_size": 2048, "num_attention_heads": 8}
    sizes |= {"num_experts": 8, "moe_intermediate_size": 512, "vocab_size": 4096}
    path = save(tmp_path / "model", name, **sizes)
    AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).save_pretrained(path)
    for beyond, tensor in run_ranks(4, peak, path, True):
        assert beyond < tensor + weights.BATCH, f"{beyond / 2**20:.1f} MiB beyond the shards"
    for beyond, tensor in run_ranks(4, peak, path, False):
        assert beyond > 3 * tensor, "the measurement sees a whole model"


# Bad input


def lose(path: Path) -> None:
    next(path.glob("model-00002-*")).unlink()


def reshape(path: Path) -> None:
    facts = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(facts | {"intermediate_size": 64}))


def untie(path: Path) -> None:
    facts = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(facts | {"tie_word_embeddings": True}))


def cut_short(path: Path) -> None:
    file = next(path.glob("model-00001-*"))
    file.write_bytes(file.read_bytes()[:-100])


def no_index(path: Path) -> None:
    (path / "model.safetensors.index.json").write_text("[]")


def no_weights(path: Path) -> None:
    (path / "model.safetensors.index.json").unlink()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lose, "lacks model-00002-of-.*safetensors, named in model.safetensors.index.json; get the model's files anew"),
        (
            reshape,
            r"model.layers.0.mlp.down_proj.weight of shape \[32, 48\], and its config.json says \[32, 64\]; give",
        ),
        (untie, "two different weights .*and its config.json says that they are one; set tie_word_embeddings to false"),
        (cut_short, "cannot be loaded .*; give"),
        (no_index, "not an index of weights; get the model's files anew"),
        (no_weights, "holds no weights .*; give"),
    ],
)
def test_a_damaged_checkpoint_is_one_line_before_anything_is_read(tmp_path, capsys, monkeypatch, damage, words):
    for module in (weights, models):
        monkeypatch.setattr(module, "read", None)
    source = Path(models.resolve("demo:teacher"))
    folder = tmp_path / "teacher"
    model = AutoModelForCausalLM.from_pretrained(source)
    if damage is untie:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight + 1)
        model.config.tie_word_embeddings = False
    if damage is reshape:
        model = Qwen3ForCausalLM(
            Qwen3Config(**json.loads((Path(save_model(tmp_path / "x")) / "config.json").read_text()))
        )
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    model.save_pretrained(folder, max_shard_size="20KB")
    damage(folder)
    with pytest.raises(UserError, match=words) as error:
        models.load_model(str(folder), torch.float32)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=words):
        models.check_weights(str(folder))
    if damage is not reshape:  # which is no model of the demo's tokens
        command = [f"teacher.path={folder}", "train.steps=1", "eval.teacher=false", "--run-dir", str(tmp_path / "run")]
        assert train.main(command) == 2
        told = capsys.readouterr().err
        assert len(told.splitlines()) == 1 and str(error.value) in told


@pytest.mark.parametrize(
    "write",
    [
        lambda file: file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
        lambda file: file.write_bytes(b""),
        lambda file: torch.save({"state_dict": {"a": torch.zeros(2)}}, file),
        lambda file: torch.save([torch.zeros(2)], file),
        lambda file: torch.save({"a": Path("x")}, file),
    ],
    ids=["a pointer of git-lfs", "empty", "nested", "a list", "an object"],
)
def test_a_file_of_torch_that_holds_no_weights_is_one_line(tmp_path, write, caplog):
    path = Path(save_model(tmp_path / "model"))
    (path / "model.safetensors").unlink()
    write(path / "pytorch_model.bin")
    with pytest.raises(UserError, match="pytorch_model.bin: not weights by name, .*; get the model's files anew"):
        load_model(str(path), torch.float32)
    assert "old format" not in caplog.text


def alike(paths: list[str]) -> str:
    ranks.start()
    path = paths[ranks.rank()]
    try:
        preflight.check_alike({"student.path='m'": preflight.model_files(path, skeleton(load_config(path)))})
    except UserError as error:
        return str(error)
    return ""


def test_ranks_that_have_other_files_are_told(tmp_path):
    one = save(tmp_path / "one", "Qwen3")
    same = str(shutil.copytree(one, tmp_path / "same"))
    wider = save(tmp_path / "wider", "Qwen3", intermediate_size=64)
    longer = str(shutil.copytree(one, tmp_path / "longer"))
    change(longer, lambda held: held | {"model.extra": torch.zeros(3)})
    assert run_ranks(2, alike, [one, same]) == ["", ""]
    for paths, words in (
        ([one, one, wider], "config.json: "),
        ([one, longer], "model.safetensors: "),
        ([save(tmp_path / "cut", "Qwen3", file_size="20KB"), one], "model-00001"),
    ):
        told = run_ranks(len(paths), alike, paths)
        assert len(set(told)) == 1 and words in told[0] and "\n" not in told[0]
        assert told[0].startswith("student.path='m' is not the same on all ranks: ")
        assert " on rank 0, " in told[0] and told[0].endswith(
            f"on rank {len(paths) - 1}; give every machine the same files"
        )


def test_weights_of_an_old_format_are_read_whole_and_say_so(tmp_path, caplog):
    new, old = (
        pickled(save(tmp_path / name, "Qwen3"), _use_new_zipfile_serialization=name == "new") for name in ("new", "old")
    )
    with caplog.at_level(logging.WARNING):
        first = load_model(new, torch.float32)
        assert not caplog.text
        second = load_model(old, torch.float32)
    assert "old format" in caplog.text and "safetensors" in caplog.text
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_files_of_a_hub_name_are_found_in_the_cache(tmp_path, monkeypatch):
    """The index, then the files that it names; one that is not there may be fetched, but not offline."""
    folder = Path(save(tmp_path / "m", "Qwen3", file_size="20KB"))
    asked = []

    def cached(name, file, **options):
        asked.append((name, file, options["local_files_only"]))
        return str(folder / file) if (folder / file).is_file() else None

    monkeypatch.setattr(weights, "cached_file", cached)
    found = weights.weight_files("someone/model", offline=True)
    assert [file.name for file in found] == sorted(file.name for file in folder.glob("*.safetensors"))
    assert {name for name, _, _ in asked} == {"someone/model"} and all(offline for *_, offline in asked)
    assert [file for _, file, _ in asked][:2] == ["model.safetensors", "model.safetensors.index.json"]
    lose(folder)
    with pytest.raises(UserError, match="lacks model-00002"):
        weights.weight_files("someone/model", offline=True)
