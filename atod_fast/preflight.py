"""Check everything that can refuse a run, before any weight's values are read: for the run and for `--dry-run`.

A run stops at the first error. A dry run fetches nothing and lists what is not on this machine as not checked.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field

import torch
from torch.distributed.device_mesh import DeviceMesh
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from atod_fast.config import Config
from atod_fast.config.settings import check_env, check_model, check_ranks
from atod_fast.errors import NotHere, UserError
from atod_fast.machines import Machines
from atod_fast.models import (
    VARLEN,
    check_quantised,
    compare_tokenizers,
    is_here,
    load_config,
    load_tokenizer,
    open_weights,
    skeleton,
    stop_ids,
)
from atod_fast.plan import fit
from atod_fast.plan.choices import choose
from atod_fast.plan.fit import Plan
from atod_fast.plan.memory import memory
from atod_fast.plan.shapes import shape_of
from atod_fast.policy.model import CausalPolicy
from atod_fast.published import CONFIGS
from atod_fast.ranks import everyones
from atod_fast.renderers import make_renderer
from atod_fast.rollout.actor import open_split
from atod_fast.rollout.engines import ENGINES
from atod_fast.runtime import Runtime, used_models
from atod_fast.weights import WEIGHT_FILES

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")


@dataclass(frozen=True)
class Model:
    """A student or a teacher without its weights."""

    path: str
    config: PretrainedConfig
    body: PreTrainedModel  # on the meta device
    packs: bool  # it scores packed rows as it would each alone
    tokenizer: PreTrainedTokenizerBase | None  # None: not on this machine, in a dry run

    @property
    def parameters(self) -> int:
        """Number of parameters; shared ones count once."""
        return sum(parameter.numel() for parameter in self.body.parameters())

    @property
    def columns(self) -> int:
        """Number of columns of the head's logits."""
        return self.config.get_text_config().vocab_size


@dataclass
class Found:
    """What `look` found: how the run computes, and its models."""

    runtime: Runtime
    models: dict[str, Model] = field(default_factory=dict)  # by role; in a dry run those whose shape is known
    unchecked: list[str] = field(default_factory=list)  # what a dry run could not look at, and why
    plan: Plan | None = None  # memory of a rank under other settings of the same models; None: a model is unknown
    files: dict[str, dict[str, str]] = field(default_factory=dict)  # `model_files` by key and path

    def tight(self, config: Config) -> list[str]:
        """Return a warning if the run fills more of the GPU's memory than a plan should, else nothing."""
        return fit.tight(self.plan(config), self.runtime.memory) if self.plan and self.runtime.memory else []


def look(
    config: Config,
    ranks: int,
    device: torch.device,
    *,
    node: int | None = None,
    mesh: DeviceMesh | None = None,
    offline: bool = False,
    elsewhere: Machines | None = None,
) -> Found:
    """Return how a run of `ranks` processes computes on `device`, and its models without their weights.

    node: ranks on a node; None: all. offline: fetch nothing, and note what is not on this machine (a dry run).
    elsewhere: the machines that a dry run plans for, if not this one.

    Raises:
        UserError: settings contradict each other, an environment's options are wrong, or a model cannot be used so.
    """
    shards = check_ranks(config, ranks, node)
    check_env(config)  # first, so that no model is fetched for a wrong environment
    sources, unchecked = {}, []
    for role, path in used_models(config).items():
        if offline:
            model = None
            with _noting(unchecked, f"{role}.path"):
                model = _offline(role, path, unchecked)
        else:
            model = load_config(path), load_tokenizer(path)
        if model is not None:
            check_model(config, path, model[0].to_dict())
            sources[role] = (path, *model)
    shapes = {role: shape for role, (_, shape, _) in sources.items()}
    runtime = Runtime.of(config, device, shapes=shapes, mesh=mesh, ranks=ranks, shards=shards, elsewhere=elsewhere)
    found = Found(runtime, unchecked=unchecked)
    for role, (path, shape, tokenizer) in sources.items():
        found.models[role] = Model(path, shape, *_body(config, role, path, shape, runtime), tokenizer)
    student, teacher = found.models.get("student"), found.models.get("teacher")
    if student and all(role in found.models for role in used_models(config)):
        sizes = {role: shape_of(model.body) for role, model in found.models.items()}
        models = sizes["student"], sizes.get("teacher")
        packed = (student, teacher) if teacher and config.teacher_scores else (student,)
        facts = {
            "recomputes": student.body.supports_gradient_checkpointing,
            "packs": all(model.packs for model in packed),
        }

        def chosen(config: Config) -> Runtime:
            made = Runtime.of(config, device, shapes=shapes, mesh=mesh, ranks=ranks, shards=shards, elsewhere=elsewhere)
            return choose(config, *models, made, **facts)

        found.runtime = runtime = chosen(config)
        found.plan = lambda config: list(memory(config, *models, chosen(config)))
        if runtime.memory:
            fit.check(config, found.plan, runtime.memory)
    kind = ENGINES[runtime.engine]
    kind.check(config, student and student.config, runtime.student_dtype, device)
    if elsewhere is None:
        kind.check_installed()
    if student and teacher and student.tokenizer is not None:
        if teacher.tokenizer is not None:
            compare_tokenizers(student.tokenizer, teacher.tokenizer)
        last = max(i for i in student.tokenizer.get_vocab().values() if i < student.columns)
        if last >= teacher.columns:
            raise UserError(
                f"teacher.path={teacher.path!r} has {teacher.columns} columns, "
                f"too few for token {last} of student.path={student.path!r}; "
                "use a teacher of the student's family"
            )
    for role, model in found.models.items():  # last: this may fetch them
        if not offline or is_here(model.path, *WEIGHT_FILES):
            with _noting(unchecked, f"{role}.path") if offline else nullcontext():
                found.files[f"{role}.path={model.path!r}"] = model_files(model.path, model.body, offline=offline)
    return found


def model_files(path: str, body: PreTrainedModel, *, offline: bool = False) -> dict[str, str]:
    """Return facts that tell two copies of a model's files apart. Raises UserError unless the weights fit `body`."""
    weights = open_weights(path, body, offline=offline)
    facts = {name: value for name, value in body.config.to_dict().items() if name != "_name_or_path"}
    config = json.dumps(facts, sort_keys=True, default=str)
    return {"config.json": hashlib.sha256(config.encode()).hexdigest()[:8]} | weights.facts()


def check_alike(files: dict[str, dict[str, str]]) -> None:
    """Raise UserError, on every rank, unless all ranks found the same `files`, as in `Found`. Collective."""
    first, *others = map(json.loads, everyones(json.dumps(files)))
    for number, other in enumerate(others, 1):
        for model, facts in first.items():
            told = other.get(model, {})
            for name in sorted(facts.keys() | told.keys()):
                here, there = facts.get(name, "not there"), told.get(name, "not there")
                if here != there:
                    raise UserError(
                        f"{model} is not the same on all ranks: {name}: {here} on rank 0, {there} on rank {number}; "
                        "give every machine the same files"
                    )


def look_at_tasks(config: Config, found: Found) -> None:
    """Open the splits in use, as a run does before it plays, and make the renderer of the student's prompts."""
    student = found.models.get("student")
    for split in (*config.evaluated, "train"):
        with _noting(found.unchecked, f"env.{split}"):
            env = open_split(config, split)
            if split == "eval" and student and student.tokenizer is not None:
                make_renderer(config, student.tokenizer, student.columns, env, stop_ids(student.path, offline=True))
            with suppress(Exception):
                env.close()


@contextmanager
def _noting(unchecked: list[str], key: str) -> Iterator[None]:
    """Add a NotHere that the block raises to `unchecked`, as a line."""
    try:
        yield
    except NotHere as error:
        unchecked.append(f"{key}: {error}")


def _offline(
    role: str, path: str, unchecked: list[str]
) -> tuple[PretrainedConfig, PreTrainedTokenizerBase | None] | None:
    """Return configuration and tokenizer from this machine, or the published configuration; None without either."""
    missing = [] if is_here(path, *WEIGHT_FILES) else ["weights"]
    tokenizer = None
    if is_here(path, *TOKENIZER_FILES):
        tokenizer = load_tokenizer(path, offline=True)
    else:
        missing.insert(0, "tokenizer")
    shape = load_config(path, offline=True) if is_here(path, "config.json") else None
    remark = ""
    if shape is None:
        missing.insert(0, "config.json")
        facts = CONFIGS.get(path)
        shape = AutoConfig.for_model(**facts) if facts else None
        remark = ", planned as published" if shape else f"; for its part of the plan: hf download {path} config.json"
    if missing:
        unchecked.append(f"{role}.path={path!r}: {', '.join(missing)} not on this machine{remark}")
    return (shape, tokenizer) if shape else None


def _body(config: Config, role: str, path: str, shape, runtime: Runtime) -> tuple[PreTrainedModel, bool]:
    """Return the model without its weights, and whether it packs rows.

    Raises:
        UserError: it cannot act, score or learn as configured.
    """
    check_quantised(path, shape)
    compute = runtime.student if role == "student" else runtime.teacher or runtime.playing_teacher
    assert compute is not None, f"{role} is not used"
    by_flash = compute.attention == "flash_attention_2" or (
        compute.attention == VARLEN and runtime.device.type == "cuda"
    )
    if by_flash and compute.dtype == torch.float32:
        key = f"{role}.compute_dtype={(config.student if role == 'student' else config.teacher).compute_dtype}"
        raise UserError(
            f"student.attention={compute.attention} computes in 16 bits, and {key} is fp32 here; set it to bf16"
        )
    body = skeleton(shape, path, compute.attention)
    packs = (role == "student" or config.teacher_scores) and CausalPolicy(body).packs
    if role == "student":
        ENGINES[runtime.engine].check_model(config, body)
    elif config.teacher_plays:
        ENGINES["transformers"].check_model(config, body)
    return body, packs
