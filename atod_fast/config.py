"""The configuration: one typed tree, every key with its default, range and meaning.

Defaults are the embedded demo's. `settings.py` makes a Config of presets, files and overrides; `--help` prints the keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from atod_fast.methods import OBJECTIVES, nest
from atod_fast.schedules import RateShape, Shape

Decay = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Student(Section):
    path: str = Field(
        "demo:student",
        description="Hugging Face model folder or hub name; the shipped tiny ones are demo:student, demo:webshop/student, ...",
    )
    compute_dtype: Literal["auto", "fp32", "bf16"] = Field(
        "auto",
        description="forward and backward precision; masters are always fp32; auto = bf16 on CUDA, fp32 on a CPU",
    )
    attention: Literal["auto", "flash_attention_2", "sdpa", "eager"] = Field(
        "auto",
        description="auto = flash_attention_2 where flash-attn is installed, CUDA present and the model has it, else sdpa, else eager",
    )
    gradient_checkpointing: bool = Field(False, description="recompute activations of each block in the backward pass")
    head: Literal["auto", "fast", "lean"] = Field(
        "auto",
        description="the update's pass over the vocabulary: fast computes a chunk's logits once and takes the gradient at once; "
        "lean computes them twice, tile by tile, for the least memory; auto = fast",
    )
    liger: Literal["auto", "on", "off"] = Field(
        "auto", description="liger-kernel's RMSNorm, RoPE and SwiGLU; auto = on CUDA where installed"
    )


class Teacher(Section):
    path: str = Field(
        "demo:teacher",
        description="Hugging Face model folder or hub name; the shipped tiny ones are demo:teacher, demo:webshop/teacher, ...; "
        '"" = none, for schedules whose kappa is 0 throughout (objective.preset=grpo)',
    )
    compute_dtype: Literal["auto", "fp32", "bf16"] = Field("auto", description="as student.compute_dtype")
    offload: bool = Field(False, description="keep the teacher's sharded weights in CPU memory between uses")


class Env(Section):
    name: str = Field(
        "alfworld",
        description="alfworld, webshop, searchqa, gymnasium, openenv, an entry point of group atod_fast.envs, or module:Class",
    )
    max_turns: int = Field(12, ge=1, description="turns after which an episode is cut off")
    options: dict[str, Any] = Field({}, description="options of all splits, passed to atod_fast.envs.make")
    train: dict[str, Any] = Field({"generate": 1500, "seed": 0}, description="options of the training tasks")
    eval: dict[str, Any] = Field(
        {"generate": 2400, "seed": 1}, description="options of the held-out tasks, the reported"
    )
    # Odd seeds share no game with training; of this one's games none is among those of eval's either.
    dev: dict[str, Any] = Field(
        {"generate": 2400, "seed": 5},
        description="options of the tasks to choose by: schedule.kappa.kind=adaptive and checkpoint.keep_best look at "
        "success on them; without either they are not opened; empty where env.train or env.eval is replaced and this is not",
    )
    workers: int = Field(8, ge=1, description="threads for environments that do not answer at once")
    step_timeout: float = Field(
        60.0, gt=0, description="seconds an environment may take for one step; then its trajectory ends as failed"
    )

    @model_validator(mode="before")
    @classmethod
    def _new_tasks(cls, given: Any) -> Any:
        """The default's tasks to choose by belong to the default's training and held-out tasks alone."""
        replaced = isinstance(given, Mapping) and ("train" in given or "eval" in given)
        return {"dev": {}, **given} if replaced else given


class Rollout(Section):
    engine: Literal["auto", "vllm", "transformers"] = Field(
        "auto",
        description="what samples: vllm (colocated), or transformers with a decode loop of its own; auto = vllm on CUDA where its version fits",
    )
    tensor_parallel: int = Field(1, ge=1, description="neighbouring ranks that are one vLLM engine together")
    kv_cache_gib: float = Field(
        0.0,
        ge=0,
        description="vLLM's key/value cache on a rank; 0 = room for `concurrency` sequences of the longest kind",
    )
    context: Literal["window", "full"] = Field(
        "full",
        description="window: a fresh prompt each turn with the last `history` turns, one training row a turn (paper); full: one growing sequence, one row",
    )
    temperature: float = Field(
        1.0, gt=0, description="sampling temperature; all log-probs and divergences are taken at it"
    )
    prompt_tokens: int = Field(384, ge=8, description="longest prompt (context full: longest sequence) in tokens")
    response_tokens: int = Field(9, ge=1, description="longest response of one turn in tokens")
    history: int = Field(2, ge=0, description="turns of history shown with rollout.context=window")
    thinking: bool = Field(False, description="let a model that can think do so, and require <think>...</think>")
    date: str = Field(
        "",
        description="YYYY-MM-DD, the day that chat templates which write a date show; empty = the day the run starts, kept when it is resumed",
    )
    concurrency: int = Field(
        64,
        ge=1,
        description="trajectories in flight in one engine; each holds a slot of the transformers engine's key/value cache",
    )

    @property
    def longest(self) -> int:
        """Tokens of the longest training row, which is also the longest sequence an engine must hold."""
        return self.prompt_tokens if self.context == "full" else self.prompt_tokens + self.response_tokens

    @model_validator(mode="after")
    def _can_be_played(self) -> Rollout:
        if self.tensor_parallel > 1 and self.engine != "vllm":
            raise ValueError(
                f"rollout.tensor_parallel={self.tensor_parallel} is for vLLM; set rollout.engine=vllm, or rollout.tensor_parallel=1"
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
                f"rollout.response_tokens={self.response_tokens} leaves no room in rollout.prompt_tokens={self.prompt_tokens}, "
                "which with rollout.context=full is the whole sequence; raise rollout.prompt_tokens"
            )
        return self


class Eval(Section):
    every: int = Field(20, ge=0, description="steps between evaluations; 0 = only first and last")
    tasks: int = Field(
        400, ge=1, description="held-out tasks, one episode each; as many of env.dev, where it is played"
    )
    temperature: float = Field(1.0, ge=0, description="sampling temperature; 0 = greedy")
    teacher: bool = Field(
        True,
        description="also evaluate the teacher, once, before training (with transformers); schedule.kappa.kind=adaptive needs it",
    )


class Train(Section):
    steps: int = Field(120, ge=1, description="optimisation steps (rollout + update)")
    seed: int = Field(0, ge=0, lt=2**63, description="seed of everything random")
    learning_rate: float = Field(7e-4, ge=0, description="peak AdamW learning rate")
    warmup_steps: int = Field(10, ge=0, description="steps of linear warm-up")
    schedule: RateShape = Field(
        "linear", description="how the learning rate falls from its peak to the last step's; constant: not at all"
    )
    final_learning_rate: float = Field(
        0.2, ge=0, le=1, description="fraction of the peak that the last step has; constant does not use it"
    )
    weight_decay: float = Field(0.0, ge=0, description="AdamW weight decay")
    # A TOML array arrives as a list, which strict mode would refuse.
    betas: tuple[Decay, Decay] = Field((0.9, 0.95), strict=False, description="AdamW betas")
    grad_clip: float = Field(1.0, gt=0, description="largest global gradient norm")
    tasks_per_step: int = Field(8, ge=1, description="tasks a step, over all ranks; the number of ranks must divide it")
    group_size: int = Field(8, ge=1, description="trajectories a task")
    minibatch_rows: int = Field(
        16, ge=0, description="most rows of an optimiser update, over all ranks; 0 = all rows in one update"
    )
    epochs: int = Field(1, ge=1, description="passes over a step's rows")
    microbatch_tokens: int = Field(
        4096, ge=16, description="most tokens one forward pass holds on a rank; a longer row goes alone"
    )


class Objective(Section):
    preset: Literal["paper", "exact", "opd", "grpo", "fixed", "sequential"] = Field(
        "paper",
        description="named starting point of objective.*, schedule.* and turns.*; explicit keys of the same or a later level win",
    )
    divergence: Literal["k1", "k2", "k3", "reverse_kl", "forward_kl", "jsd", "skew_reverse_kl", "skew_forward_kl"] = (
        Field(
            "k1",
            description="k1: sampled reverse KL as an advantage (paper); k2, k3: sampled, as a loss (k3's on-policy gradient is the forward KL's); "
            "the others: over the full vocabulary, as a loss",
        )
    )
    alpha: float = Field(0.5, ge=0, le=1, description="mixture weight of jsd and the skewed divergences")
    log_ratio_clip: float = Field(
        0.0, ge=0, description="bound of |log pi_T - log pi_old| in the k1 advantage; 0 = none (paper)"
    )
    advantage: Literal["grpo", "rloo", "gigpo"] = Field("grpo", description="reinforcement-learning advantage")
    normalise_std: bool = Field(True, description="divide by the group's standard deviation")
    std_epsilon: float = Field(1e-6, gt=0, description="added to that standard deviation")
    baseline: Literal["trajectory", "rows"] = Field(
        "rows",
        description="group statistics over trajectories, or over their turns' rewards after the invalid-action penalty (verl-agent); rloo: trajectory",
    )
    gigpo_omega: float = Field(1.0, ge=0, description="weight of GiGPO's step-level advantage")
    gigpo_gamma: float = Field(0.95, gt=0, le=1, description="discount of GiGPO's step returns")
    invalid_penalty: float = Field(0.0, ge=0, description="taken from the reward of a turn whose action is invalid")
    invalid: Literal["form", "accepted"] = Field(
        "form",
        description="what invalid_penalty falls on: form, a response without the required form (verl-agent); accepted, that or an action the world refuses",
    )
    clip: float = Field(0.2, gt=0, description="PPO clip range")
    dual_clip: float = Field(3.0, ge=0, description="dual clip bound for negative advantages; 0 = off")
    entropy_bonus: float = Field(0.0, ge=0, description="coefficient of the entropy bonus")
    aggregation: Literal["token", "trajectory", "turn"] = Field(
        "token", description="what the loss is a mean over; trajectory and turn: of their token means"
    )
    tis_cap: float = Field(
        0.0,
        ge=0,
        description="cap of the truncated importance weight pi_old(trainer)/pi(rollout engine), which is 1 where the two agree; 0 = no such weight (paper)",
    )

    @model_validator(mode="after")
    def _bounds(self) -> Objective:
        # At these ends the mixture is one of the two models and the divergence is identically 0.
        if self.divergence == "jsd" and self.alpha in (0, 1):
            raise ValueError(
                f"objective.alpha={self.alpha:g} makes objective.divergence=jsd 0 everywhere; use a value between 0 and 1, or reverse_kl or forward_kl"
            )
        if self.divergence.startswith("skew") and self.alpha == 1:
            raise ValueError(
                f"objective.alpha=1 makes objective.divergence={self.divergence} 0 everywhere; use a value below 1"
            )
        if self.advantage == "rloo" and self.baseline == "rows":
            raise ValueError(
                "objective.advantage=rloo leaves one trajectory out, which objective.baseline=rows cannot: the trajectory's "
                "other turns would stay in; set objective.baseline=trajectory"
            )
        for key in ("dual_clip", "tis_cap"):
            if 0 < getattr(self, key) < 1:
                raise ValueError(
                    f"objective.{key}={getattr(self, key):g} would cut tokens on which nothing has changed; use 1 or more, or 0 for none"
                )
        return self


class Slide(Section):
    kind: Literal[Shape, "adaptive"] = Field(
        "linear",
        description="shape; adaptive (kappa only): start * (1 - success of student / teacher on env.dev), never rising",
    )
    start: float = Field(1.0, ge=0, description="value before the slide")
    end: float = Field(0.1, ge=0, description="value after it; constant and adaptive do not use it")
    horizon: int = Field(64, ge=1, description="steps the slide takes; step: the step at which it jumps, after `hold`")
    hold: int = Field(0, ge=0, description="steps at `start` before the slide begins")

    @property
    def always_zero(self) -> bool:
        return self.start == 0 and (self.kind in ("constant", "adaptive") or self.end == 0)


class Schedule(Section):
    kappa: Slide = Field(Slide(start=1.0, end=0.1), description="weight of imitation")
    rho: Slide = Field(Slide(start=1.0, end=2.0), description="weight of reward")

    @model_validator(mode="after")
    def _kinds(self) -> Schedule:
        if self.rho.kind == "adaptive":
            raise ValueError(
                "schedule.rho.kind=adaptive follows the gap to the teacher, which only kappa can; use another kind for rho"
            )
        for name in ("kappa", "rho"):
            slide: Slide = getattr(self, name)
            if slide.kind == "exponential" and 0 in (slide.start, slide.end):
                raise ValueError(
                    f"schedule.{name}.kind=exponential never reaches 0; raise schedule.{name}.start and end above 0, or use cosine"
                )
        return self


class Turns(Section):
    disagreement: Literal["sampled", "exact"] = Field(
        "sampled", description="d: mean |log pi_old - log pi_T| (paper), or mean full-vocabulary KL"
    )
    uncertainty: Literal["sampled", "exact"] = Field(
        "sampled", description="h: mean negative log-likelihood (paper), or mean entropy"
    )
    normalise: Literal["minmax", "rank", "none"] = Field("minmax", description="how each signal is brought to [0, 1]")
    fuse: Literal["softor", "mean", "max", "product", "disagreement", "uncertainty", "uniform", "shuffled"] = Field(
        "softor", description="how the two make one weight"
    )
    scope: Literal["trajectory", "batch"] = Field(
        "trajectory", description="the turns that are compared with each other"
    )
    budget: Literal["raw", "mean1"] = Field(
        "raw", description="raw (paper), or scaled and clipped to [0.5, 2] so that the token-weighted mean is 1"
    )
    min_turns: int = Field(3, ge=1, description="trajectories with fewer turns keep weight 1")
    min_disagreement: float = Field(0.01, ge=0, description="trajectories whose largest d is below keep weight 1")


class Checkpoint(Section):
    every: int = Field(50, ge=0, description="steps between checkpoints; 0 = only at the end or when interrupted")
    keep: int = Field(2, ge=1, description="checkpoints kept")
    keep_best: bool = Field(
        False, description="also keep the checkpoint of the best success on env.dev, which checkpoints/best.json names"
    )


class Observe(Section):
    trajectories_every: int = Field(
        10,
        ge=0,
        description="steps between files of training trajectories, which each evaluation has too; 0 = no such files",
    )
    prompts: bool = Field(
        True, description="write each turn's rendered prompt into them (about 4 bytes a token), special tokens included"
    )


class Guard(Section):
    logprob_gap: float = Field(
        0.0, ge=0, description="largest mean |rollout - trainer log-prob| tolerated; 0 = by dtype: 1e-3 fp32, 0.05 bf16"
    )
    wait_minutes: float = Field(
        0.0,
        ge=0,
        description="minutes a rank waits for the others after a rollout; 0 = computed: the longest rollout that the settings allow "
        "(env.step_timeout a turn, 1 s a token), at least 30 minutes",
    )
    failed_environments: float = Field(
        0.5, ge=0, le=1, description="largest share of a rollout's or an evaluation's environments that may fail"
    )


def _over(below: Mapping[str, Any], given: Any) -> Any:
    """`given`, a section or a table, and from `below` what it leaves out."""
    if isinstance(given, Section):
        given = {name: getattr(given, name) for name in given.model_fields_set}
    if not isinstance(given, Mapping):
        return given
    inner = {name: _over(below[name], value) for name, value in given.items() if isinstance(below.get(name), dict)}
    return {**below, **given, **inner}


def _method(given: Mapping[str, Any]) -> dict[str, Any]:
    """The sections that an `objective.preset` in `given` stands for; without one, those of `given` as they are by default."""
    objective = _over({}, given.get("objective"))
    preset = objective.get("preset") if isinstance(objective, dict) else None
    if preset is None:
        return {name: table for name, table in nest(OBJECTIVES[Objective().preset]).items() if name in given}
    return nest(OBJECTIVES.get(preset, {})) if isinstance(preset, str) else {}


class Config(Section):
    """All settings. However it is made, `objective.preset` stands for the keys it owns, and keys given beside it win."""

    student: Student = Field(Student(), description="the model that acts and learns")
    teacher: Teacher = Field(Teacher(), description="the frozen model that scores")
    env: Env = Field(Env(), description="the world")
    rollout: Rollout = Field(Rollout(), description="how the student acts")
    eval: Eval = Field(Eval(), description="success on held-out tasks")
    train: Train = Field(Train(), description="optimisation")
    objective: Objective = Field(Objective(), description="what is optimised")
    schedule: Schedule = Field(Schedule(), description="from imitation to reward")
    turns: Turns = Field(Turns(), description="T-DUR turn weights")
    checkpoint: Checkpoint = Field(Checkpoint(), description="saving")
    observe: Observe = Field(Observe(), description="what is written down")
    guard: Guard = Field(Guard(), description="when to stop a run that has gone wrong")

    @model_validator(mode="before")
    @classmethod
    def _expand_preset(cls, given: Any) -> Any:
        return _over(_method(given), given) if isinstance(given, Mapping) else given

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Config:
        """A Config with the sections of `update`. It is checked, and a preset in `update` expands, as in any Config."""
        given = dict(update or {})
        objective = given.get("objective")
        if isinstance(objective, Objective) and objective.preset != self.objective.preset:
            owned = {name for name in Objective.model_fields if f"objective.{name}" in OBJECTIVES[objective.preset]}
            if owned <= objective.model_fields_set:
                # A copy of a section holds every key. Those that it changed win over the new preset, the others do not.
                old = {name for name in owned if getattr(objective, name) == getattr(self.objective, name)}
                given["objective"] = {
                    name: getattr(objective, name) for name in Objective.model_fields if name not in old
                }
        method = _method(given)
        kept = self.model_dump()
        return Config.model_validate({**kept, **_over({name: kept[name] for name in method}, method), **given})

    @property
    def teacher_scores(self) -> bool:
        """Whether any step of the schedule looks at the teacher; where none does, its weights are not loaded for training."""
        return not self.schedule.kappa.always_zero

    @property
    def teacher_plays(self) -> bool:
        """Whether the teacher is evaluated before training."""
        return self.eval.teacher and bool(self.teacher.path)

    @property
    def choosers(self) -> list[str]:
        """The settings that choose by success on env.dev as the run goes. Without one it is neither opened nor played."""
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
                f"{', '.join(empty)}: empty; name your own: {' '.join(f'{key}=...' for key in empty)} (docs/environments.md)"
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
        return self
