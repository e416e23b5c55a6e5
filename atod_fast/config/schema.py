"""The configuration: one typed tree, every key with its default, range and meaning.

The defaults are those of the embedded demo. `settings.py` makes a Config from presets, files and overrides; `--help`
prints the keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from atod_fast.config.methods import OBJECTIVES, nest
from atod_fast.schedules import RateShape, SlideShape

Decay = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Student(Section):
    path: str = Field(
        default="demo:student",
        description="Hugging Face model folder or hub name; the tiny models shipped with atod_fast are demo:student, "
        "demo:webshop/student, ...",
    )
    compute_dtype: Literal["auto", "fp32", "bf16"] = Field(
        default="auto",
        description="precision of forward and backward passes (master weights: fp32); auto = bf16 on CUDA, else fp32",
    )
    attention: Literal["auto", "varlen", "flash_attention_2", "sdpa", "eager"] = Field(
        default="auto",
        description="attention implementation of student and teacher; varlen (torch's own, no build) and "
        "flash_attention_2 (flash-attn) pack rows without padding, in 16 bits; auto = on CUDA varlen, else "
        "flash_attention_2 if it is installed, where the model supports them, else sdpa, else eager",
    )
    gradient_checkpointing: Literal["auto"] | bool = Field(
        default="auto",
        description="recompute the activations of each block in the backward pass; auto = on a GPU, if the memory plan "
        "needs it",
    )
    head: Literal["auto", "fast", "lean"] = Field(
        default="auto",
        description="how an update computes logits: fast computes those of a chunk once and the gradient right after; "
        "lean computes them twice, tile by tile, and needs the least memory; auto = fast",
    )
    liger: Literal["auto", "on", "off"] = Field(
        default="auto",
        description="compute student and teacher with RMSNorm, RoPE and SwiGLU of liger-kernel (a mixture of experts "
        "without its SwiGLU); auto = on CUDA if it is installed, without student.compile",
    )
    compile: bool = Field(
        default=False, description="compile the blocks of student and teacher with torch.compile, for any shape"
    )


class Teacher(Section):
    path: str = Field(
        default="demo:teacher",
        description="Hugging Face model folder or hub name; the tiny models shipped with atod_fast are demo:teacher, "
        'demo:webshop/teacher, ...; "" = no teacher, possible if kappa is 0 in every step (objective.preset=grpo)',
    )
    compute_dtype: Literal["auto", "fp32", "bf16"] = Field(default="auto", description="as student.compute_dtype")
    offload: bool = Field(
        default=False, description="keep the teacher's sharded weights in CPU memory while it is not used"
    )
    microbatch_tokens: int = Field(
        default=0,
        ge=0,
        description="most tokens of the teacher's forward pass on a rank, made of whole micro-batches of packed rows; "
        "0 = up to 8 of train.microbatch_tokens, as many as the memory plan allows on a GPU, and one on a CPU",
    )


class Env(Section):
    name: str = Field(
        default="alfworld",
        description="environment: alfworld, webshop, searchqa, gymnasium, openenv, a mix of several, an entry point of "
        "group atod_fast.envs, or module:Class",
    )
    max_turns: int = Field(default=12, ge=1, description="most turns of an episode, which ends after them")
    options: dict[str, Any] = Field(
        default={}, description="options that the environment of every split is constructed with"
    )
    train: dict[str, Any] = Field(
        default={"generate": 1500, "seed": 0}, description="further options for the training tasks"
    )
    eval: dict[str, Any] = Field(
        default={"generate": 2400, "seed": 1},
        description="further options for the held-out tasks, whose success is reported",
    )
    # Games of odd seeds are never training games; none of this seed's games is one of eval's either.
    dev: dict[str, Any] = Field(
        default={"generate": 2400, "seed": 5},
        description="further options for the tasks whose success schedule.kappa.kind=adaptive and checkpoint.keep_best "
        "use; without these settings the tasks are not opened; if env.train or env.eval is replaced and env.dev is "
        "not, env.dev is empty",
    )
    workers: int = Field(default=8, ge=1, description="threads that step environments which do not answer at once")
    step_timeout: float = Field(
        default=60.0,
        gt=0,
        description="most seconds for one step of an environment; a slower step fails its trajectory",
    )

    @model_validator(mode="before")
    @classmethod
    def _new_tasks(cls, given: Any) -> Any:
        """Empty the default env.dev if env.train or env.eval is replaced: it is separate from their defaults only."""
        replaced = isinstance(given, Mapping) and ("train" in given or "eval" in given)
        return {"dev": {}, **given} if replaced else given


class Rollout(Section):
    engine: Literal["auto", "vllm", "transformers"] = Field(
        default="auto",
        description="rollout engine: vllm (on the training GPUs), or transformers with atod_fast's decode loop; "
        "auto = vllm on CUDA if a supported version is installed, else transformers",
    )
    tensor_parallel: int = Field(default=1, ge=1, description="consecutive ranks that share one vLLM engine")
    kv_cache_gib: float = Field(
        default=0.0,
        ge=0,
        description="GiB of vLLM's key/value cache on each rank; 0 = room for rollout.concurrency sequences of the "
        "greatest length, on CUDA at most what the memory plan leaves",
    )
    sleep: Literal["auto", "on", "off"] = Field(
        default="auto",
        description="free the engine's memory on the GPU between rollouts (on: needs CUDA); off: keep it, and copy new "
        "weights in place; auto = off where the memory plan says that engine and trainer fit together",
    )
    head_dtype: Literal["fp32", "model"] = Field(
        default="fp32",
        description="precision of the engine's logits: fp32, as the trainer's, or the model's compute precision",
    )
    enforce_eager: bool = Field(
        default=False, description="generate without CUDA graphs, and with vLLM without torch.compile"
    )
    async_scheduling: Literal["auto", "on", "off"] = Field(
        default="auto", description="schedule vLLM's next step while one runs; auto = vLLM's own choice (vLLM only)"
    )
    context: Literal["window", "full"] = Field(
        default="full",
        description="window: each turn has a new prompt with the last rollout.history turns and is one training row "
        "(paper); full: a trajectory is one growing sequence and one row",
    )
    temperature: float = Field(
        default=1.0, gt=0, description="sampling temperature; all log-probs and divergences are computed at it"
    )
    prompt_tokens: int = Field(
        default=384, ge=8, description="most tokens of a prompt (rollout.context=full: of the whole sequence)"
    )
    response_tokens: int = Field(default=9, ge=1, description="most tokens of the response in one turn")
    history: int = Field(default=2, ge=0, description="past turns that a prompt shows with rollout.context=window")
    thinking: bool = Field(
        default=False, description="turn on the model's thinking mode, and require <think>...</think>"
    )
    date: str = Field(
        default="",
        description="YYYY-MM-DD, the date shown by chat templates that write one; empty = the day the run starts, "
        "also after it is resumed",
    )
    concurrency: int = Field(
        default=0,
        ge=0,
        description="trajectories that one engine plays at the same time; each holds a slot of the transformers "
        "engine's key/value cache; 0 = all that fall to the engine in a step (evaluations: at most 64), with "
        "transformers at most 64",
    )

    @property
    def longest(self) -> int:
        """The most tokens that a training row, or a sequence in an engine, can have."""
        return self.prompt_tokens if self.context == "full" else self.prompt_tokens + self.response_tokens

    @model_validator(mode="after")
    def _can_be_played(self) -> Rollout:
        if self.tensor_parallel > 1 and self.engine != "vllm":
            raise ValueError(
                f"rollout.tensor_parallel={self.tensor_parallel} is for vLLM; "
                "set rollout.engine=vllm, or rollout.tensor_parallel=1"
            )
        if self.async_scheduling != "auto" and self.engine != "vllm":
            raise ValueError(
                f"rollout.async_scheduling={self.async_scheduling} is for vLLM; "
                "set rollout.engine=vllm, or rollout.async_scheduling=auto"
            )
        if self.date:
            try:
                right = date.fromisoformat(self.date).isoformat() == self.date
            except ValueError:
                right = False
            if not right:
                raise ValueError(
                    f"rollout.date={self.date!r} is no date; write YYYY-MM-DD, or leave it empty for today"
                )
        if self.longest <= self.response_tokens:
            raise ValueError(
                f"rollout.response_tokens={self.response_tokens} leaves no room in "
                f"rollout.prompt_tokens={self.prompt_tokens}, "
                "which with rollout.context=full is the whole sequence; raise rollout.prompt_tokens"
            )
        return self


class Eval(Section):
    every: int = Field(default=20, ge=0, description="steps between evaluations; 0 = only before and after training")
    tasks: int = Field(
        default=400,
        ge=1,
        description="held-out tasks of an evaluation, one episode each; as many of env.dev, if it is used",
    )
    temperature: float = Field(default=1.0, ge=0, description="sampling temperature; 0 = greedy")
    teacher: bool = Field(
        default=True,
        description="also evaluate the teacher, once, before training (with the transformers engine); "
        "schedule.kappa.kind=adaptive needs it",
    )


class Train(Section):
    steps: int = Field(default=120, ge=1, description="training steps, each a rollout and its updates")
    seed: int = Field(default=0, ge=0, lt=2**63, description="seed of all random numbers")
    learning_rate: float = Field(default=7e-4, ge=0, description="peak AdamW learning rate")
    warmup_steps: int = Field(default=10, ge=0, description="steps of linear warm-up")
    schedule: RateShape = Field(
        default="linear",
        description="how the learning rate falls from its peak to its final value; constant = it does not fall",
    )
    final_learning_rate: float = Field(
        default=0.2,
        ge=0,
        le=1,
        description="learning rate of the last step, as a fraction of the peak; not used by constant",
    )
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW weight decay")
    # A TOML array arrives as a list, which strict mode would refuse.
    betas: tuple[Decay, Decay] = Field(default=(0.9, 0.95), strict=False, description="AdamW betas")
    grad_clip: float = Field(default=1.0, gt=0, description="largest global gradient norm")
    tasks_per_step: int = Field(default=8, ge=1, description="tasks per step, over all ranks")
    group_size: int = Field(default=8, ge=1, description="trajectories per task")
    resample_flat: int = Field(
        default=0,
        ge=0,
        description="most rounds a step in which groups whose trajectories all have the same reward give way to groups "
        "of other tasks (DAPO's dynamic sampling); 0 = none",
    )
    minibatch_rows: int = Field(
        default=16, ge=0, description="most rows per optimiser update, over all ranks; 0 = all rows in one update"
    )
    epochs: int = Field(default=1, ge=1, description="passes over the rows of a step")
    microbatch_tokens: int = Field(
        default=4096, ge=16, description="most tokens of a forward pass on a rank; a longer row is passed alone"
    )
    shard: Literal["node", "all"] = Field(
        default="node",
        description="ranks that student and teacher are sharded over: node, those of each node, with a copy on every "
        "node and less traffic between them; all, those of all nodes, which needs less memory",
    )


class Objective(Section):
    preset: Literal["paper", "exact", "opd", "grpo", "fixed", "sequential"] = Field(
        default="paper",
        description="expands into keys of objective.*, schedule.* and turns.*, overriding earlier sources; keys set in "
        "the same or a later source override it",
    )
    divergence: Literal["k1", "k2", "k3", "reverse_kl", "forward_kl", "jsd", "skew_reverse_kl", "skew_forward_kl"] = (
        Field(
            default="k1",
            description="k1: sampled reverse KL, as an advantage (paper); k2, k3: sampled, as a loss (on policy, k3 "
            "has the gradient of the forward KL); the others: over the full vocabulary, as a loss",
        )
    )
    alpha: float = Field(default=0.5, ge=0, le=1, description="mixture weight of jsd and the skewed divergences")
    log_ratio_clip: float = Field(
        default=0.0, ge=0, description="bound of |log pi_T - log pi_old| in the k1 advantage; 0 = no bound (paper)"
    )
    advantage: Literal["grpo", "rloo", "gigpo"] = Field(
        default="grpo", description="estimator of the reinforcement-learning advantage"
    )
    normalise_std: bool = Field(default=True, description="divide advantages by the group's standard deviation")
    std_epsilon: float = Field(default=1e-6, gt=0, description="added to that standard deviation")
    baseline: Literal["trajectory", "rows"] = Field(
        default="rows",
        description="what group statistics are over: trajectories, or the rewards of their turns after the "
        "invalid-action penalty (rows, as verl-agent); rloo needs trajectory",
    )
    gigpo_omega: float = Field(default=1.0, ge=0, description="weight of GiGPO's step-level advantage")
    gigpo_gamma: float = Field(default=0.95, gt=0, le=1, description="discount of GiGPO's step returns")
    invalid_penalty: float = Field(
        default=0.0, ge=0, description="subtracted from the reward of a turn with an invalid action"
    )
    invalid: Literal["form", "accepted"] = Field(
        default="form",
        description="which actions invalid_penalty counts as invalid: form, responses without the required form "
        "(verl-agent); accepted, also actions that the environment refuses",
    )
    ratio: Literal["token", "sequence"] = Field(
        default="token",
        description="what pi / pi_old is taken of: each token (paper), or the geometric mean over a turn's response "
        "(sequence, GSPO), which costs a forward pass more in each update of a step but the first",
    )
    clip: float = Field(default=0.2, gt=0, description="PPO clip range: the ratio is bounded by 1 - clip and 1 + clip")
    clip_high: float = Field(
        default=0.0,
        ge=0,
        description="clip range above 1, if not the one below (DAPO's clip-higher); 0 = objective.clip",
    )
    dual_clip: float = Field(default=3.0, ge=0, description="dual-clip bound for negative advantages; 0 = off")
    entropy_bonus: float = Field(default=0.0, ge=0, description="coefficient of the entropy bonus")
    aggregation: Literal["token", "trajectory", "turn"] = Field(
        default="token",
        description="what the loss is averaged over: tokens, or the token means of trajectories or turns",
    )
    tis_cap: float = Field(
        default=0.0,
        ge=0,
        description="cap of the truncated importance weight pi_old(trainer)/pi(rollout engine), which is 1 if the two "
        "agree; 0 = no such weight (paper)",
    )
    mismatch_mask: float = Field(
        default=0.0,
        ge=0,
        description="turns whose geometric mean of pi_old(trainer)/pi(rollout engine) is above this bound, or below "
        "1/bound, are left out of the loss; 0 = none (paper)",
    )

    @model_validator(mode="after")
    def _bounds(self) -> Objective:
        # At these ends the mixture is one of the two models and the divergence is identically 0.
        if self.divergence == "jsd" and self.alpha in (0, 1):
            raise ValueError(
                f"objective.alpha={self.alpha:g} makes objective.divergence=jsd 0 everywhere; "
                "use a value between 0 and 1, or reverse_kl or forward_kl"
            )
        if self.divergence.startswith("skew") and self.alpha == 1:
            raise ValueError(
                f"objective.alpha=1 makes objective.divergence={self.divergence} 0 everywhere; use a value below 1"
            )
        if self.advantage == "rloo" and self.baseline == "rows":
            raise ValueError(
                "objective.advantage=rloo leaves one trajectory out, which objective.baseline=rows cannot: "
                "the trajectory's other turns would stay in; set objective.baseline=trajectory"
            )
        for key in ("dual_clip", "tis_cap"):
            if 0 < getattr(self, key) < 1:
                raise ValueError(
                    f"objective.{key}={getattr(self, key):g} would cut tokens on which nothing has changed; "
                    "use 1 or more, or 0 for none"
                )
        if 0 < self.mismatch_mask <= 1:
            raise ValueError(
                f"objective.mismatch_mask={self.mismatch_mask:g} would leave out turns on which engine and trainer "
                "agree; use more than 1, or 0 for none"
            )
        return self


class Slide(Section):
    kind: Literal[SlideShape, "adaptive"] = Field(
        default="linear",
        description="how the value changes; adaptive (kappa only): start * (1 - success of student / teacher on "
        "env.dev), never rising",
    )
    start: float = Field(default=1.0, ge=0, description="value before it changes")
    end: float = Field(default=0.1, ge=0, description="value after it has changed; not used by constant and adaptive")
    horizon: int = Field(
        default=64, ge=1, description="steps the change takes after hold; kind=step: steps until it jumps"
    )
    hold: int = Field(default=0, ge=0, description="steps at the start value before the change begins")

    @property
    def always_zero(self) -> bool:
        return self.start == 0 and (self.kind in ("constant", "adaptive") or self.end == 0)


class Schedule(Section):
    kappa: Slide = Field(default=Slide(start=1.0, end=0.1), description="weight of imitation")
    rho: Slide = Field(default=Slide(start=1.0, end=2.0), description="weight of reward")

    @model_validator(mode="after")
    def _kinds(self) -> Schedule:
        if self.rho.kind == "adaptive":
            raise ValueError(
                "schedule.rho.kind=adaptive follows the gap to the teacher, which only kappa can; "
                "use another kind for rho"
            )
        for name in ("kappa", "rho"):
            slide: Slide = getattr(self, name)
            if slide.kind == "exponential" and 0 in (slide.start, slide.end):
                raise ValueError(
                    f"schedule.{name}.kind=exponential never reaches 0; "
                    f"raise schedule.{name}.start and end above 0, or use cosine"
                )
        return self


class Turns(Section):
    disagreement: Literal["sampled", "exact"] = Field(
        default="sampled", description="d: mean |log pi_old - log pi_T| (paper), or mean full-vocabulary KL"
    )
    uncertainty: Literal["sampled", "exact"] = Field(
        default="sampled", description="h: mean negative log-likelihood (paper), or mean entropy"
    )
    normalise: Literal["minmax", "rank", "none"] = Field(
        default="minmax", description="how each signal is scaled to [0, 1]"
    )
    fuse: Literal["softor", "mean", "max", "product", "disagreement", "uncertainty", "uniform", "shuffled"] = Field(
        default="softor", description="how the two signals are combined to one weight"
    )
    scope: Literal["trajectory", "batch"] = Field(
        default="trajectory", description="which turns a signal is scaled over: those of a trajectory, or all of a step"
    )
    budget: Literal["raw", "mean1"] = Field(
        default="raw",
        description="raw (paper), or mean1: scaled and clipped to [0.5, 2], with a token-weighted mean of 1",
    )
    min_turns: int = Field(default=3, ge=1, description="trajectories with fewer turns keep weight 1")
    min_disagreement: float = Field(
        default=0.01, ge=0, description="trajectories whose largest d is smaller keep weight 1"
    )


class Checkpoint(Section):
    every: int = Field(
        default=50, ge=0, description="steps between checkpoints; 0 = only at the end or when interrupted"
    )
    keep: int = Field(default=2, ge=1, description="newest checkpoints that are kept")
    keep_best: bool = Field(
        default=False,
        description="also keep the checkpoint with the best success on env.dev, named in checkpoints/best.json",
    )


class Observe(Section):
    trajectories_every: int = Field(
        default=10,
        ge=0,
        description="steps between files of training trajectories; each evaluation also writes one; 0 = no such files",
    )
    prompts: bool = Field(
        default=True,
        description="write the rendered prompt of each turn, with special tokens, to these files (4 bytes a token)",
    )


class Guard(Section):
    logprob_gap: float = Field(
        default=0.0,
        ge=0,
        description="largest mean |rollout - trainer log-prob| allowed; 0 = 1e-3 in fp32, 0.05 in bf16",
    )
    wait_minutes: float = Field(
        default=0.0,
        ge=0,
        description="minutes that a rank waits for the others after a rollout; 0 = computed from the settings as the "
        "longest possible rollout (env.step_timeout per turn, 1 s per token), at least 30 minutes",
    )
    skipped_updates: int = Field(
        default=3,
        ge=0,
        description="most updates in a row that are skipped because their gradient is not finite; one more stops the "
        "run",
    )
    failed_environments: float = Field(
        default=0.5, ge=0, le=1, description="largest share of environments that may fail in a rollout or an evaluation"
    )


def _over(below: Mapping[str, Any], given: Any) -> Any:
    """Return `given`, a section or a table, with the keys that it leaves out filled in from `below`."""
    if isinstance(given, Section):
        given = {name: getattr(given, name) for name in given.model_fields_set}
    if not isinstance(given, Mapping):
        return given
    inner = {name: _over(below[name], value) for name, value in given.items() if isinstance(below.get(name), dict)}
    return {**below, **given, **inner}


def _method(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `objective.preset` in `given` expands into; without it, the default preset for the sections given."""
    objective = _over({}, given.get("objective"))
    preset = objective.get("preset") if isinstance(objective, dict) else None
    if preset is None:
        return {name: table for name, table in nest(OBJECTIVES[Objective().preset]).items() if name in given}
    return nest(OBJECTIVES.get(preset, {})) if isinstance(preset, str) else {}


class Config(Section):
    """All settings. `objective.preset` always expands into the keys it owns; keys given with it override it."""

    student: Student = Field(default=Student(), description="the model that is trained")
    teacher: Teacher = Field(default=Teacher(), description="the frozen model that scores the student's tokens")
    env: Env = Field(default=Env(), description="the environment and its tasks")
    rollout: Rollout = Field(default=Rollout(), description="how the student plays episodes")
    eval: Eval = Field(default=Eval(), description="evaluation on held-out tasks")
    train: Train = Field(default=Train(), description="training steps and optimiser")
    objective: Objective = Field(default=Objective(), description="the loss")
    schedule: Schedule = Field(default=Schedule(), description="weights of imitation and of reward over the steps")
    turns: Turns = Field(default=Turns(), description="T-DUR turn weights")
    checkpoint: Checkpoint = Field(default=Checkpoint(), description="when checkpoints are saved")
    observe: Observe = Field(default=Observe(), description="files of trajectories")
    guard: Guard = Field(default=Guard(), description="when to stop a faulty run")

    @model_validator(mode="before")
    @classmethod
    def _expand_preset(cls, given: Any) -> Any:
        return _over(_method(given), given) if isinstance(given, Mapping) else given

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Config:
        """Return a copy with the sections of `update`, validated, with a preset in `update` expanded."""
        given = dict(update or {})
        objective = given.get("objective")
        if isinstance(objective, Objective) and objective.preset != self.objective.preset:
            owned = {name for name in Objective.model_fields if f"objective.{name}" in OBJECTIVES[objective.preset]}
            if owned <= objective.model_fields_set:
                # A copied section holds every key. Only those that it changed override the new preset.
                old = {name for name in owned if getattr(objective, name) == getattr(self.objective, name)}
                given["objective"] = {
                    name: getattr(objective, name) for name in Objective.model_fields if name not in old
                }
        method = _method(given)
        kept = self.model_dump()
        return Config.model_validate({**kept, **_over({name: kept[name] for name in method}, method), **given})

    @property
    def teacher_scores(self) -> bool:
        """Whether kappa is above 0 in any step. If not, the teacher is not loaded for training."""
        return not self.schedule.kappa.always_zero

    @property
    def teacher_plays(self) -> bool:
        """Whether the teacher is evaluated before training."""
        return self.eval.teacher and bool(self.teacher.path)

    @property
    def choosers(self) -> list[str]:
        """The settings that use success on env.dev during the run. Without any, env.dev is not opened."""
        settings = {
            "schedule.kappa.kind=adaptive": self.schedule.kappa.kind == "adaptive",
            "checkpoint.keep_best=true": self.checkpoint.keep_best,
        }
        return [setting for setting, given in settings.items() if given]

    @property
    def evaluated(self) -> tuple[str, ...]:
        """The splits whose tasks are played at each evaluation."""
        return ("eval", "dev") if self.choosers else ("eval",)

    @model_validator(mode="after")
    def _belongs_together(self) -> Config:
        taught = self.teacher.path or not self.teacher_scores
        named = {"student.path": self.student.path, "teacher.path": taught, "env.name": self.env.name}
        empty = [key for key, name in named.items() if not name]
        if empty == ["teacher.path"]:
            raise ValueError(
                'teacher.path="" names no teacher, and schedule.kappa gives imitation weight; '
                "set teacher.path, or kappa to 0 throughout (objective.preset=grpo)"
            )
        if empty:
            raise ValueError(
                f"{', '.join(empty)}: empty; name your own: "
                f"{' '.join(f'{key}=...' for key in empty)} (docs/environments.md)"
            )
        for setting in self.choosers:
            if self.eval.every == 0:
                raise ValueError(
                    f"{setting} follows the evaluations, which eval.every=0 turns off; set eval.every to 1 or more"
                )
            if not self.env.dev:
                raise ValueError(
                    f"{setting} chooses by success on env.dev, which is empty; "
                    "give it tasks apart from those of env.eval, which are reported: env.dev='{...}'"
                )
        if self.schedule.kappa.kind == "adaptive" and not self.teacher_plays:
            without = (
                'teacher.path="" does not name; name one'
                if self.eval.teacher
                else "eval.teacher=false leaves out; set it to true"
            )
            raise ValueError(f"schedule.kappa.kind=adaptive measures the student against the teacher, which {without}")
        if self.train.group_size == 1 and not self.schedule.rho.always_zero:
            raise ValueError(
                "train.group_size=1 leaves no group to compare rewards in; use 2 or more, or objective.preset=opd"
            )
        if self.train.resample_flat and self.schedule.rho.always_zero:
            raise ValueError(
                f"train.resample_flat={self.train.resample_flat} looks for groups whose rewards differ, and "
                "schedule.rho gives reward no weight; set train.resample_flat=0, or rho above 0"
            )
        if 0 < self.teacher.microbatch_tokens < self.train.microbatch_tokens:
            raise ValueError(
                f"teacher.microbatch_tokens={self.teacher.microbatch_tokens} holds no micro-batch of "
                f"train.microbatch_tokens={self.train.microbatch_tokens}; raise it, or set it to 0"
            )
        if self.objective.ratio == "sequence":
            if self.train.epochs == 1 and not self.train.minibatch_rows:
                raise ValueError(
                    "objective.ratio=sequence changes nothing with train.minibatch_rows=0 and train.epochs=1: in a "
                    "step's first update every ratio is 1; set train.minibatch_rows, or objective.ratio=token"
                )
            if self.schedule.rho.always_zero and self.objective.divergence != "k1":
                raise ValueError(
                    f"objective.ratio=sequence has no advantage to scale: objective.divergence="
                    f"{self.objective.divergence} is a loss, and schedule.rho gives reward no weight; "
                    "set objective.ratio=token"
                )
        return self
