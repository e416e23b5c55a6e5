"""Objective presets: what each stands for, and which key wins beside it."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from atod_fast.cli import parse
from atod_fast.config import Config, Objective, Schedule, Slide, Train, Turns
from atod_fast.config.settings import (
    OBJECTIVES,
    load,
)
from helpers.config import KEYS, values


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_preset_replaces_any_other(name, write):
    for other in OBJECTIVES:
        found = values(parse([write(f'objective.preset = "{other}"'), f"objective.preset={name}"]).config)
        assert {key: found[key] for key in OBJECTIVES[name]} == OBJECTIVES[name]
        assert found["objective.preset"] == name


def test_objective_presets_own_the_same_keys_and_no_horizon():
    assert len({frozenset(level) for level in OBJECTIVES.values()}) == 1
    assert not {key for key in OBJECTIVES["paper"] if key.endswith(("horizon", "hold"))}
    assert set(OBJECTIVES["paper"]) <= set(KEYS)


def test_the_default_objective_is_what_its_preset_says():
    assert values(load(overrides=[f"objective.preset={Config().objective.preset}"])) == values(Config())


def test_objective_preset_in_an_override_replaces_lower_levels(write):
    file = write('turns.fuse = "max"\nobjective.divergence = "jsd"\nschedule.kappa = { kind = "cosine", horizon = 33 }')
    config = parse([file, "objective.preset=opd"]).config
    assert {key: values(config)[key] for key in OBJECTIVES["opd"]} == OBJECTIVES["opd"]
    assert config.schedule.kappa.horizon == 33  # not a key that objective presets own


def test_an_explicit_key_beside_or_after_the_objective_preset_wins(write):
    file = write('[objective]\npreset = "opd"\n[turns]\nfuse = "max"')
    assert parse([file]).config.turns.fuse == "max"
    assert parse([file, "turns.fuse=mean"]).config.turns.fuse == "mean"
    assert parse(["turns.fuse=max", "objective.preset=opd"]).config.turns.fuse == "max"
    assert parse([file, "objective.preset=fixed"]).config.turns.fuse == OBJECTIVES["fixed"]["turns.fuse"]


def test_the_family_of_objectives():
    def ends(name):
        schedule = load(overrides=[f"objective.preset={name}"]).schedule
        return [(s.kind, s.start, s.end) for s in (schedule.kappa, schedule.rho)]

    assert ends("paper") == ends("exact") == [("linear", 1, 0.1), ("linear", 1, 2)]
    assert ends("opd") == [("constant", 1, 1), ("constant", 0, 0)]
    assert ends("grpo") == [("constant", 0, 0), ("constant", 1, 1)]
    assert ends("fixed") == [("constant", 1, 1), ("constant", 1, 1)]
    assert ends("sequential") == [("step", 1, 0), ("step", 0, 1)]
    exact = load(overrides=["objective.preset=exact"])
    correction = {name: load(overrides=[f"objective.preset={name}"]).objective.tis_cap for name in OBJECTIVES}
    assert correction == dict.fromkeys(OBJECTIVES, 2.0) | {"paper": 0.0}
    assert (exact.objective.divergence, exact.turns.disagreement, exact.turns.uncertainty, exact.turns.budget) == (
        "reverse_kl",
        "exact",
        "exact",
        "mean1",
    )


# --- the same from Python


def same(*configs: Config) -> bool:
    return all(values(config) == values(configs[0]) for config in configs)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_preset_expands_however_a_config_is_made(name):
    chosen = {"preset": name}
    start = load(
        overrides=["objective.preset=fixed", "objective.divergence=k2", "turns.fuse=max", "schedule.rho.end=7"]
    )
    assert same(
        load(overrides=[f"objective.preset={name}"]),
        Config(objective=chosen),
        Config(objective=Objective(preset=name)),
        Config(objective=Objective(preset=name), schedule={}, turns=Turns()),
        Config.model_validate({"objective": chosen}),
        Config.model_validate_json(f'{{"objective": {{"preset": "{name}"}}}}'),
        Config().model_copy(update={"objective": chosen}),
        start.model_copy(update={"objective": Objective(preset=name)}),
    )


def test_keys_given_beside_the_preset_win_and_the_rest_is_the_presets():
    tables = {
        "objective": {"preset": "grpo", "clip": 0.3},
        "schedule": {"kappa": {"horizon": 10}},
        "turns": {"fuse": "max"},
    }
    models = {
        "objective": Objective(preset="grpo", clip=0.3),
        "schedule": Schedule(kappa=Slide(horizon=10)),
        "turns": Turns(fuse="max"),
    }
    wanted = load(
        overrides=["objective.preset=grpo", "objective.clip=0.3", "schedule.kappa.horizon=10", "turns.fuse=max"]
    )
    assert same(
        wanted, Config(**tables), Config(**models), Config(**models | {"schedule": {"kappa": Slide(horizon=10)}})
    )
    assert (wanted.schedule.kappa.start, wanted.schedule.kappa.horizon, wanted.turns.fuse) == (0.0, 10, "max")
    assert Config(schedule={"rho": {"horizon": 10}}) == load(overrides=["schedule.rho.horizon=10"]), (
        "a slide is filled up with its own ends"
    )


def test_a_copy_is_a_checked_config_that_differs_in_what_was_asked_for():
    start = load(overrides=["objective.preset=opd", "train.seed=3", "schedule.kappa.horizon=9"])
    copy = start.model_copy(update={"train": Train(steps=7)})
    assert values(copy) == values(start) | {"train.steps": 7, "train.seed": 0}, (
        "a section is replaced, others are left as they are"
    )
    assert start.model_copy() == start
    moved = start.model_copy(update={"objective": {"preset": "sequential"}})
    assert moved.schedule.kappa == Slide(kind="step", start=1.0, end=0.0, horizon=9)
    with pytest.raises(ValidationError, match="train.steps"):
        start.model_copy(update={"train": {"steps": 0}})


@pytest.mark.parametrize("objective", ["grpo", {"preset": "grop"}, {"preset": 3}, 3])
def test_what_is_no_objective_is_refused(objective):
    with pytest.raises(ValidationError, match="objective"):
        Config(objective=objective)


def test_a_copied_section_with_another_preset_is_that_preset():
    config = Config(objective={"entropy_bonus": 0.3})
    copied = config.model_copy(update={"objective": config.objective.model_copy(update={"preset": "exact"})})
    assert values(copied) == values(Config(objective={"preset": "exact", "entropy_bonus": 0.3}))
