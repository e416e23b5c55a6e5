"""The configuration: `schema` has the keys, `methods` and presets/ the named sets of values, `settings` merges them."""

from atod_fast.config.schema import (
    Checkpoint,
    Config,
    Env,
    Eval,
    Guard,
    Objective,
    Observe,
    Rollout,
    Schedule,
    Section,
    Slide,
    Student,
    Teacher,
    Train,
    Turns,
)

__all__ = [
    "Checkpoint",
    "Config",
    "Env",
    "Eval",
    "Guard",
    "Objective",
    "Observe",
    "Rollout",
    "Schedule",
    "Section",
    "Slide",
    "Student",
    "Teacher",
    "Train",
    "Turns",
]
