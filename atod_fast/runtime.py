"""Resolves settings on this machine, once: device, number of ranks, precisions, attention, rollout engine.

Nothing else in the package reads a setting that may be `auto`.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.distributed.device_mesh import DeviceMesh
from transformers import PretrainedConfig

from atod_fast.config import Config
from atod_fast.errors import UserError
from atod_fast.machines import Machines
from atod_fast.models import VARLEN, Compute, load_config, model_class
from atod_fast.policy import attention
from atod_fast.rollout.engines import ENGINES
from atod_fast.rollout.engines.protocol import Room
from atod_fast.rollout.engines.vllm import limits


@dataclass(frozen=True, slots=True)
class Runtime:
    """How this rank computes. In a dry run the attention of a model that is not on this machine stays as it is set."""

    device: torch.device
    memory: int | None  # bytes of a GPU; None on a CPU
    ranks: int
    shards: int  # ranks that one copy of the parameters is sharded over
    mesh: DeviceMesh | None  # of all ranks, as `ranks.mesh` makes it; None in a dry run
    engine: str  # a name in rollout.engines.ENGINES
    engines: int  # over all ranks
    room: Room  # of this rank's engine
    teacher_room: Room  # of the engine in which the teacher is evaluated
    student_dtype: torch.dtype  # of forward and backward passes, and of every rollout; masters are fp32
    teacher_dtype: torch.dtype  # of scoring
    liger: bool  # student and teacher compute with liger-kernel's modules
    compiled: bool  # and their blocks are compiled
    checkpointing: bool  # the student recomputes each block's activations; `auto` is off until `plan.choices` decides
    gathered: bool  # the teacher stays gathered while it scores, as `plan.choices` decides
    joined: int  # micro-batches in one of the teacher's forward passes; `auto` is 1 until `plan.choices` decides
    student: Compute  # for training, and for rollouts in the rollout engine
    teacher: Compute | None  # for scoring; None if no step uses it
    playing_teacher: Compute | None  # for its evaluation; None if there is none

    @staticmethod
    def of(
        config: Config,
        device: torch.device,
        *,
        shapes: Mapping[str, PretrainedConfig] | None = None,
        mesh: DeviceMesh | None = None,
        ranks: int = 1,
        shards: int | None = None,
        elsewhere: Machines | None = None,
    ) -> Runtime:
        """Return what `config` means on `device`.

        shapes: the models' transformers configurations by role; None reads them. shards: None: all ranks.
        elsewhere: the machines of a dry run's plan, on which vLLM and liger-kernel are taken to be installed.

        Raises:
            UserError: a model cannot be read or lacks the attention, or liger-kernel cannot be used here.
        """
        if shapes is None:
            shapes = {role: load_config(path) for role, path in used_models(config).items()}
        student_dtype = dtype_of(config.student.compute_dtype, device)
        teacher_dtype = dtype_of(config.teacher.compute_dtype, device)

        def compute(role: str, path: str, dtype: torch.dtype) -> Compute:
            attention = config.student.attention
            if role in shapes:
                attention = attention_of(attention, device, dtype, shapes[role], here=elsewhere is None)
            return Compute(path, dtype, attention)

        engine = engine_of(config.rollout.engine, device) if elsewhere is None else wanted_engine(config)
        engines = ranks // config.rollout.tensor_parallel
        room = ENGINES[engine].room(config, shapes.get("student"), student_dtype, device, engines)
        return Runtime(
            device=device,
            memory=elsewhere.gpu.memory if elsewhere else bytes_of(device),
            ranks=ranks,
            shards=shards or ranks,
            mesh=mesh,
            engine=engine,
            engines=engines,
            room=room,
            teacher_room=ENGINES["transformers"].room(config, None, student_dtype, device, ranks),
            student_dtype=student_dtype,
            teacher_dtype=teacher_dtype,
            liger=uses_liger(config, device, here=elsewhere is None),
            compiled=uses_compiler(config, device, here=elsewhere is None),
            checkpointing=config.student.gradient_checkpointing is True,
            gathered=False,
            joined=max(1, config.teacher.microbatch_tokens // config.train.microbatch_tokens),
            student=compute("student", config.student.path, student_dtype),
            teacher=compute("teacher", config.teacher.path, teacher_dtype) if config.teacher_scores else None,
            playing_teacher=compute("teacher", config.teacher.path, student_dtype) if config.teacher_plays else None,
        )


def used_models(config: Config) -> dict[str, str]:
    """Return the paths of the models that a run loads, by role."""
    used = {"student": config.student.path}
    if config.teacher_scores or config.teacher_plays:
        used["teacher"] = config.teacher.path
    return used


def bytes_of(device: torch.device) -> int | None:
    """Return the memory of a GPU of this machine in bytes; None for a CPU."""
    here = device.type == "cuda" and torch.cuda.is_available()
    return torch.cuda.get_device_properties(device).total_memory if here else None


def dtype_of(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of a `compute_dtype`. auto: bf16 on an accelerator, fp32 on a CPU, where bf16 is slower."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[name]


def attention_of(name: str, device: torch.device, dtype: torch.dtype, config, *, here: bool = True) -> str:
    """Return the attention implementation for a model of the transformers configuration `config`.

    On CUDA in 16 bits `auto` is varlen if it computes all of the model's attention, else flash-attn if it is installed
    and does; elsewhere sdpa, else eager. Eager also replaces sdpa if attention scores have a softcap, which sdpa would
    leave out. Flash attention supports neither ALiBi nor every model's sinks. here: what this machine lacks counts.

    Raises:
        UserError: `name` is an attention that leaves out something of the model's, or that this machine cannot run.
    """
    capped = getattr(config.get_text_config(decoder=True), "attn_logit_softcapping", None) is not None
    if name == "sdpa" and capped:
        model = f"a {config.model_type} model's scores"
        raise UserError(f"student.attention='sdpa' leaves out the softcap of {model}; use auto or eager")
    if name == VARLEN and (lacking := attention.lacks(config)):
        model = f"a {config.model_type} model's {lacking}"
        raise UserError(f"student.attention='varlen' does not compute {model}; use auto")
    if name == VARLEN and here and (lacking := attention.missing(device)):
        raise UserError(f"student.attention='varlen' needs {lacking}; use auto or sdpa")
    if name != "auto":
        return name
    in_16_bits = device.type == "cuda" and dtype != torch.float32
    if in_16_bits and not attention.lacks(config) and not (here and attention.missing(device)):
        return VARLEN
    model = model_class(config)
    implementations = model._compatible_flash_implementations or ["flash_attention_2"]
    flash = model._supports_flash_attn and "flash_attention_2" in implementations
    # ALiBi: flash attention has no argument for a bias of scores.
    flash = flash and not getattr(config.get_text_config(decoder=True), "alibi", False)
    if flash and in_16_bits and importlib.util.find_spec("flash_attn"):
        return "flash_attention_2"
    return "sdpa" if model._supports_sdpa and not capped else "eager"


def engine_of(name: str, device: torch.device) -> str:
    """Return the name of the rollout engine on this device; auto is the first that suits it."""
    return name if name != "auto" else next(name for name, kind in ENGINES.items() if kind.suits(device))


def wanted_engine(config: Config) -> str:
    """Return the name of the rollout engine on GPUs where vLLM is installed."""
    return "vllm" if config.rollout.engine == "auto" else config.rollout.engine


def slow_engine(config: Config, runtime: Runtime) -> list[str]:
    """Return a warning if several GPUs would generate without vLLM because it is not installed, else nothing."""
    chosen = config.rollout.engine == "auto" and runtime.engine == "transformers"
    if not chosen or runtime.device.type != "cuda" or runtime.ranks == 1:
        return []
    found = limits.installed()
    return [
        f"ROLLOUTS WILL BE SLOW: vLLM {limits.SUPPORTED} is not installed{f' ({found} is)' if found else ''}, and "
        f"transformers generates many times slower on {runtime.ranks} GPUs. "
        f"Install it: pip install 'vllm=={limits.SUPPORTED}.*'; or set rollout.engine=transformers to accept this"
    ]


def uses_liger(config: Config, device: torch.device, *, here: bool = True) -> bool:
    """Return whether to use liger-kernel on this device, of this machine if `here`.

    Raises:
        UserError: it is `on` where it cannot be used.
    """
    mode = config.student.liger
    present = device.type == "cuda" and (not here or importlib.util.find_spec("liger_kernel") is not None)
    if mode == "on" and not present:
        remedy = "pip install 'atod_fast[cuda]' or set student.liger=auto"
        raise UserError(f"student.liger='on' needs CUDA and liger-kernel; {remedy}")
    return present and (mode == "on" or (mode == "auto" and not config.student.compile))


def uses_compiler(config: Config, device: torch.device, *, here: bool = True) -> bool:
    """Return whether to compile blocks. Raises UserError if this machine (if `here`) lacks what torch.compile needs."""
    if config.student.compile and here:
        compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
        missing = None
        if device.type == "cpu" and shutil.which(compiler) is None:
            missing = f"a C++ compiler, and there is no {compiler} here"
        if device.type == "cuda" and importlib.util.find_spec("triton") is None:
            missing = "Triton, which is not installed"
        if missing:
            raise UserError(f"student.compile=true needs {missing}; install it, or set student.compile=false")
    return config.student.compile
