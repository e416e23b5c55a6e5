"""Reads a checkpoint's weights: the files, the names and shapes in them, and values, of a shard alone if it is one.

The only file that calls the loader inside transformers, which no release promises to keep: the pin of transformers and
`tests/policy/test_loading.py` hold it in place.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from logging import getLogger
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol
from zipfile import is_zipfile

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.distributed.sharding_utils import DtensorShardOperation
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils.hub import cached_file
from transformers.utils.loading_report import LoadStateDictInfo

from atod_fast.errors import NotHere, UserError

logger = getLogger(__name__)

# In the order in which transformers looks for them.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
INDEX = ".index.json"
CHUNK = 1 << 24  # elements that are compared at a time
BATCH = 1 << 23  # bytes that are converted before freed memory is given back


class Slice(Protocol):
    """A stored tensor, of which indexing reads a part."""

    def get_shape(self) -> Sequence[int]: ...

    def __getitem__(self, index: Any) -> Tensor: ...


class _Pickled:
    """A `Slice` of a tensor that torch has mapped into memory."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def get_shape(self) -> Sequence[int]:
        return self._tensor.shape

    def __getitem__(self, index: Any) -> Tensor:
        return self._tensor[index]


class _Copied:
    """A `Slice` whose parts are copies. Others' are views of a file, which stays mapped as long as they live."""

    def __init__(self, stored: Slice) -> None:
        self._stored, self.get_shape = stored, stored.get_shape

    def __getitem__(self, index: Any) -> Tensor:
        return self._stored[index].clone()


def weight_files(folder: str, name: str | None = None, *, offline: bool = False) -> list[Path]:
    """Return the files that hold the weights of a model folder or hub name; those of the hub are fetched.

    name: the file of the weights or their index; None: the first of `WEIGHT_FILES`. offline: fetch nothing.

    Raises:
        UserError: there is no such file, or an index names a file that is not there (NotHere: of a hub name).
        OSError: the hub cannot be reached, or refuses.
    """
    names = (name,) if name else WEIGHT_FILES
    found = next((file for each in names if (file := _file(folder, each, offline))), None)
    if found is None:
        raise UserError(
            f"model path {folder!r} holds no weights ({', '.join(names)}); give a folder that save_pretrained() wrote"
        )
    if not found.name.endswith(INDEX):
        return [found]
    try:
        shards = sorted(set(json.loads(found.read_text(encoding="utf-8"))["weight_map"].values()))
        files = {shard: _file(folder, shard, offline) for shard in shards}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{found}: not an index of weights; get the model's files anew") from None
    if missing := [shard for shard, file in files.items() if file is None]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise (UserError if os.path.isdir(folder) else NotHere)(
            f"model path {folder!r} lacks {missing[0]}{more}, named in {found.name}; get the model's files anew"
        )
    return [file for file in files.values() if file is not None]


def _file(folder: str, name: str, offline: bool) -> Path | None:
    if os.path.isdir(folder):
        file = Path(folder) / name
        return file if file.is_file() else None
    found = cached_file(folder, name, local_files_only=offline, _raise_exceptions_for_missing_entries=False)
    return Path(found) if found else None


class Weights:
    """The tensors of weight files, by name. None is read before it is indexed."""

    def __init__(self, files: Iterable[Path]) -> None:
        """Open the files.

        Raises:
            UserError: a .bin file holds something else than tensors by name.
            OSError, SafetensorError, RuntimeError: a file is damaged.
        """
        self.files = [*files]
        self.tensors: dict[str, Slice] = {}
        for file in self.files:
            if file.suffix == ".safetensors":
                stored = safe_open(file, framework="pt", device="cpu")
                self.tensors |= {name: stored.get_slice(name) for name in stored.keys()}  # noqa: SIM118 (no mapping)
            else:
                self.tensors |= {name: _Pickled(tensor) for name, tensor in _pickled(file).items()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor."""
        return {name: tuple(stored.get_shape()) for name, stored in self.tensors.items()}

    def facts(self) -> dict[str, str]:
        """Return what tells two copies of a checkpoint apart: files' sizes, a digest of tensors' names and shapes."""
        shapes = json.dumps(sorted(self.shapes().items()))
        sizes = {file.name: f"{file.stat().st_size} bytes" for file in self.files}
        return sizes | {"the weights' names and shapes": hashlib.sha256(shapes.encode()).hexdigest()[:8]}


def _pickled(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a file that torch.save wrote, mapped into memory unless its format is too old for that."""
    mapped = is_zipfile(file)
    try:
        held = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except (UnpicklingError, EOFError):
        held = None
    if not isinstance(held, Mapping) or not all(isinstance(value, Tensor) for value in held.values()):
        raise UserError(f"{file}: not weights by name, as torch.save writes a state_dict; get the model's files anew")
    if not mapped:
        logger.warning("%s is of an old format, which every rank reads whole; save the model as safetensors", file)
    return dict(held)


@dataclass
class Fit:
    """How a checkpoint fits a model."""

    missing: list[str]  # tensors of the model that it lacks
    unexpected: list[str]  # tensors that the model has no place for
    misshapen: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)  # (held, expected)
    failed: dict[str, str] = field(default_factory=dict)  # tensors that could not be made of those held, and why
    untied: list[tuple[str, str]] = field(default_factory=list)  # held with two values that the model takes for one


class _Rules:
    """Which stored tensors become which tensors of a model, by transformers' rules."""

    def __init__(self, model: PreTrainedModel, like: Mapping[str, Tensor]) -> None:
        self.model, self.like = model, like
        rules = get_model_conversion_mapping(model)
        self._renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        self._converters = converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        self._by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
        self._expected: dict[str, Any] = dict(like)

    def target(self, name: str) -> tuple[str, WeightConverter | None]:
        """Return the (first) tensor of the model that a stored one becomes, and the conversion if there is one."""
        prefix = self.model.base_model_prefix
        renamed, pattern = rename_source_key(name, self._renamings, self._converters, prefix, self._expected)
        if renamed not in self.like and name in self.like:
            renamed, pattern = rename_source_key(name, [], [], prefix, self._expected)
        return renamed, None if pattern is None else self._by_pattern[pattern]

    def convert(
        self, stored: Mapping[str, Any], like: Mapping[str, Tensor], device: torch.device | str
    ) -> tuple[dict[str, Tensor], LoadStateDictInfo]:
        """Return the tensors of `like` that are made of `stored`, on `device`, and transformers' account of it."""
        settings = LoadStateDictConfig(device_map={"": device}, weight_mapping=[*self._renamings, *self._converters])
        root = _StandIn(self.model, like)
        with _one_at_a_time():
            info, _ = convert_and_load_state_dict_in_model(root, dict(stored), settings)  # pyright: ignore[reportArgumentType]
        values = root.state_dict(keep_vars=True)
        return {name: value for name, value in values.items() if name not in info.missing_keys}, info


@contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Keep transformers from reading ahead in threads, which would hold every part before it is put in place."""
    name = "HF_DEACTIVATE_ASYNC_LOAD"
    given = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if given is None:
            del os.environ[name]
        else:
            os.environ[name] = given


class _StandIn(nn.Module):
    """Holds the tensors of `like` under their names, and what the loader asks of `model`."""

    def __init__(self, model: PreTrainedModel, like: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.base_model_prefix: str = model.base_model_prefix
        self.config: PretrainedConfig = model.config
        for name, tensor in like.items():
            *path, leaf = name.split(".")
            module: nn.Module = self
            for part in path:
                if part not in module._modules:
                    module.add_module(part, nn.Module())
                module = module.get_submodule(part)
            if isinstance(tensor, nn.Parameter):
                module.register_parameter(leaf, tensor)
            else:
                module.register_buffer(leaf, tensor)


def _shared(like: Mapping[str, Tensor]) -> dict[int, list[str]]:
    """Return the names of every tensor of `like`, by its id: a tied one has several."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, tensor in like.items():
        names[id(tensor)].append(name)
    return names


def inspect(model: PreTrainedModel, weights: Weights) -> Fit:
    """Return how a checkpoint fits `model`, which may be on the meta device.

    Names and shapes alone are read; values only where the checkpoint holds two tensors that are one in the model.
    """
    given = model.state_dict(keep_vars=True)
    like = _unsharded(given)
    rules = _Rules(model, like)
    stored = {name: torch.empty(shape, device="meta") for name, shape in weights.shapes().items()}
    _, info = rules.convert(stored, like, "meta")
    model._adjust_missing_and_unexpected_keys(info)
    bad = {name for name, *_ in info.mismatched_keys} | info.conversion_errors.keys()
    misshapen = {name: (tuple(held), tuple(wanted)) for name, held, wanted in sorted(info.mismatched_keys)}
    held = {name: key for key in stored for name, rule in [rules.target(key)] if rule is None}
    absent = set(info.missing_keys) - bad
    untied = []
    for names in _shared(given).values():
        there = [name for name in names if name not in info.missing_keys]
        absent -= set(names) if there else set()
        for other in there[1:]:
            if not _equal(weights.tensors[held[there[0]]], weights.tensors[held[other]]):
                untied.append((there[0], other))
    failed = {name: text.strip().splitlines()[-1] for name, text in info.conversion_errors.items()}
    return Fit(sorted(absent), sorted(info.unexpected_keys), misshapen, failed, untied)


def _unsharded(like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors on the meta device with the shapes and dtypes of `like`."""
    bare = {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in like.items()}
    return {
        name: nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
        if isinstance(like[name], nn.Parameter)
        else tensor
        for name, tensor in bare.items()
    }


def _equal(one: Slice, other: Slice) -> bool:
    """Return whether two stored tensors of the same shape hold the same values."""
    shape = one.get_shape()
    rows = max(1, CHUNK // max(1, int(torch.Size(shape[1:]).numel())))
    return all(torch.equal(one[at : at + rows], other[at : at + rows]) for at in range(0, shape[0], rows))


def read(model: PreTrainedModel, into: nn.Module, weights: Weights, device: torch.device | str) -> None:
    """Give every parameter and saved buffer of `into` the checkpoint's values, on `device`, in its own dtype.

    into: `model`, or a module with the same names whose parameters may be DTensors; of them this rank's shards alone
    are read. Meanwhile memory holds one tensor more, as the model has it: a layer's experts are one. The checkpoint
    must fit, as `inspect` says.
    """
    like = into.state_dict(keep_vars=True)
    rules, names = _Rules(model, like), _shared(like)
    sources: dict[str, dict[str, Slice]] = defaultdict(dict)  # by the first tensor made of them
    converters: dict[str, WeightConverter | None] = {}
    taken: set[int] = set()
    for name, stored in weights.tensors.items():
        target, converter = rules.target(name)
        if target not in like or (converter is None and id(like[target]) in taken):
            continue  # without a place, or the second name of a shared parameter
        taken.add(id(like[target]))
        sources[target][name], converters[target] = stored, converter
    for batch in _batches(sources, like):
        values: dict[str, Tensor] = {}
        at_once: dict[str, Slice] = {}
        for target in batch:
            kind, converter, parts = like[target], converters[target], sources[target]
            if not isinstance(kind, DTensor):
                at_once |= parts
            elif converter is None:
                at_once |= {name: _own(stored, kind.dtype) for name, stored in parts.items()}
            elif not _by_rows(converter):
                whole, _ = rules.convert(parts, _unsharded(like), "cpu")
                values |= {name: _cut(value.detach(), like[name], device) for name, value in whole.items()}
            elif kind.to_local().numel():
                at_once |= parts
            else:  # transformers would stack no experts
                values[target] = _sharded(torch.empty(kind.to_local().shape, dtype=kind.dtype, device=device), kind)
        simple = all(rule is None or _by_rows(rule) for rule in map(converters.get, batch))  # each makes one tensor
        made = {target: like[target] for target in batch} if simple else like
        values |= rules.convert(at_once, made, device)[0] if at_once else {}
        for name in [*values]:
            _set(into, names[id(like[name])], values.pop(name), like[name])
        _trim()


def _batches(targets: Iterable[str], like: Mapping[str, Tensor]) -> Iterator[list[str]]:
    """Yield `targets` in batches of at most `BATCH` bytes on this rank; a larger one is alone."""
    batch, size = [], 0
    for target in targets:
        kind = like[target]
        local = kind.to_local() if isinstance(kind, DTensor) else kind
        more = local.numel() * local.element_size()
        if batch and size + more > BATCH:
            yield batch
            batch, size = [], 0
        batch.append(target)
        size += more
    if batch:
        yield batch


def _own(stored: Slice, dtype: torch.dtype) -> Slice:
    """Return a stored tensor whose parts, once cast to `dtype`, are copies and no views of its file."""
    return _Copied(stored) if stored[...].dtype == dtype else stored


def _trim() -> None:
    """Give freed memory back to the system: glibc keeps what lies between tensors that live on."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


def _by_rows(converter: WeightConverter) -> bool:
    """Return whether a conversion of parts, each cut like the whole along dimension 0, gives the whole's cut.

    transformers reads a shard's own experts alone, which is right if experts are stacked and joined within.
    """
    stack, *others = converter.operations
    return (
        isinstance(stack, MergeModulelist)
        and stack.dim == 0
        and all(isinstance(other, Concatenate) and other.dim > 0 for other in others)
    )


def _cut(value: Tensor, like: Tensor, device: torch.device | str) -> Tensor:
    if not isinstance(like, DTensor):
        return value.to(device=device, dtype=like.dtype)
    local = DtensorShardOperation(like).shard_tensor(value, device=device, dtype=like.dtype)
    assert local is not None  # which it is for a part of a stack alone
    return _sharded(local.clone(), like)


def _sharded(local: Tensor, like: DTensor) -> DTensor:
    return DTensor.from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def _set(module: nn.Module, names: Iterable[str], value: Tensor, like: Tensor) -> None:
    """Put `value` in the place of `like`, which has these names."""
    if isinstance(like, nn.Parameter) and not isinstance(value, nn.Parameter):
        value = nn.Parameter(value, requires_grad=like.requires_grad)
    for name in names:
        path, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(path), leaf, value.requires_grad_(like.requires_grad))


def keep_dtypes(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Make fp32 what a model on the meta device keeps in fp32 although it is computed in `dtype`."""
    kept = model._get_dtype_plan(dtype)
    if not kept:
        return
    pattern, names, _ = build_glob_alternation([*kept])
    for name, tensor in model.state_dict(keep_vars=True).items():
        if (match := pattern.search(name)) and match.lastgroup:
            _set(model, [name], tensor.detach().to(kept[names[match.lastgroup]]), tensor)


def make_buffers(model: PreTrainedModel, device: torch.device | str) -> None:
    """Compute the buffers that checkpoints leave out, as rotary frequencies, on `device`. `model` is on meta."""
    for tensor in model.state_dict(keep_vars=True).values():
        tensor._is_hf_initialized = True  # pyright: ignore[reportAttributeAccessIssue] (transformers skips those)
    model._move_missing_keys_from_meta_to_device(set(), {"": device}, None, None)  # pyright: ignore[reportArgumentType]
    model.initialize_weights()
