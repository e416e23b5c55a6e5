"""kappa, rho and the learning rate over the steps of a run."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atod_fast.config import Schedule, Slide, Train
from atod_fast.errors import UserError
from atod_fast.objective import needs_teacher
from atod_fast.schedules import AdaptiveKappa, Annealed, LearningRate, make

PAPER_KAPPA = Slide(kind="linear", start=1.0, end=0.1, horizon=80)
PAPER_RHO = Slide(kind="linear", start=1.0, end=2.0, horizon=80)


def value(slide, step):
    return make(slide).value(step)


def test_the_papers_numbers():
    assert value(PAPER_KAPPA, 1) == pytest.approx(0.98875)
    assert value(PAPER_KAPPA, 80) == value(PAPER_KAPPA, 150) == pytest.approx(0.1)
    assert value(PAPER_RHO, 40) == pytest.approx(1.5)
    assert value(PAPER_RHO, 80) == value(PAPER_RHO, 150) == 2.0


@pytest.mark.parametrize(
    ("kind", "halfway"),
    [("linear", 0.55), ("cosine", 0.55), ("exponential", 0.1**0.5), ("step", 1.0), ("constant", 1.0)],
)
def test_each_kind_at_its_start_middle_and_end(kind, halfway):
    slide = Slide(kind=kind, start=1.0, end=0.1, horizon=10)
    assert value(slide, 0) == pytest.approx(1.0)
    assert value(slide, 5) == pytest.approx(halfway)
    assert value(slide, 10) == pytest.approx(1.0 if kind == "constant" else 0.1)


def test_cosine_leaves_slowly_where_linear_does_not():
    cosine, linear = (Slide(kind=kind, start=1.0, end=0.0, horizon=10) for kind in ("cosine", "linear"))
    assert value(cosine, 1) > value(linear, 1)
    assert value(cosine, 9) < value(linear, 9)


def test_step_jumps_at_its_horizon():
    slide = Slide(kind="step", start=1.0, end=0.0, horizon=10)
    assert [value(slide, step) for step in (9, 10)] == [1.0, 0.0]


@given(
    kind=st.sampled_from(["linear", "cosine", "exponential", "step", "constant"]),
    start=st.floats(0.01, 5),
    end=st.floats(0.01, 5),
    horizon=st.integers(1, 200),
    hold=st.integers(0, 200),
    step=st.integers(1, 500),
)
def test_a_slide_stays_between_its_ends_moves_one_way_and_is_delayed_by_hold(kind, start, end, horizon, hold, step):
    slide = Slide(kind=kind, start=start, end=end, horizon=horizon, hold=hold)
    low, high = sorted((start, end))
    now, later = value(slide, step), value(slide, step + 1)
    assert low - 1e-9 <= now <= high + 1e-9
    assert (later - now) * (end - start) >= -1e-9
    assert now == pytest.approx(value(slide.model_copy(update={"hold": 0}), max(step - hold, 0)))


@pytest.mark.parametrize("key", ["start", "end"])
def test_an_exponential_cannot_touch_zero(key):
    with pytest.raises(ValueError, match=r"schedule\.kappa\.kind=exponential"):
        Schedule(kappa=Slide(**{"kind": "exponential", "start": 1.0, "end": 0.5, key: 0.0}))


def test_only_kappa_adapts():
    assert Schedule(kappa=Slide(kind="adaptive")).kappa.kind == "adaptive"
    with pytest.raises(ValueError, match=r"schedule\.rho\.kind=adaptive"):
        Schedule(rho=Slide(kind="adaptive"))


def test_the_teacher_is_needed_as_long_as_kappa_is_above_zero():
    slide = Slide(kind="linear", start=1.0, end=0.0, horizon=4)
    assert [needs_teacher(value(slide, step)) for step in (1, 3, 4, 5)] == [True, True, False, False]


def test_adaptive_follows_the_gap_to_the_teacher_over_the_last_five_evaluations():
    kappa = AdaptiveKappa(Slide(kind="adaptive", start=0.8), teacher_success=0.8)
    assert kappa.value(1) == 0.8
    seen = []
    for success in (0.0, 0.4, 0.4, 0.4, 0.4, 0.8):
        kappa.observe(success)
        seen.append(kappa.value(1))
    means = (0.0, 0.2, 0.8 / 3, 0.3, 0.32, 0.48)
    assert seen == pytest.approx([0.8 * (1 - mean / 0.8) for mean in means])


def test_adaptive_never_rises_and_ends_at_zero_beyond_the_teacher():
    kappa = AdaptiveKappa(Slide(kind="adaptive"), teacher_success=0.5)
    kappa.observe(0.25)
    kappa.observe(0.0)
    assert kappa.value(1) == 0.5
    for _ in range(5):
        kappa.observe(0.6)
    assert kappa.value(1) == 0.0
    for _ in range(5):
        kappa.observe(0.0)
    assert kappa.value(1) == 0.0


def test_adaptive_holds_before_it_follows():
    kappa = AdaptiveKappa(Slide(kind="adaptive", start=1.0, hold=3), teacher_success=1.0)
    kappa.observe(0.5)
    assert [kappa.value(step) for step in (3, 4)] == [1.0, 0.5]


def test_adaptive_resumes_from_json_exactly():
    slide = Slide(kind="adaptive")
    one = AdaptiveKappa(slide, teacher_success=0.9)
    for success in (0.1, 0.35, 0.2, 0.3, 0.4, 0.41):
        one.observe(success)
    two = AdaptiveKappa(slide, teacher_success=0.9)
    two.load_state_dict(json.loads(json.dumps(one.state_dict())))
    for success in (0.7, 0.6):
        assert two.value(9) == one.value(9)
        one.observe(success)
        two.observe(success)
    assert two.value(9) == one.value(9)


def test_adaptive_refuses_a_teacher_that_never_succeeds():
    with pytest.raises(UserError, match=r"schedule\.kappa\.kind=adaptive"):
        AdaptiveKappa(Slide(kind="adaptive"), teacher_success=0.0)


def test_adaptive_is_no_function_of_the_step():
    with pytest.raises(ValueError, match="adaptive"):
        Annealed(Slide(kind="adaptive")).value(1)


def test_what_depends_on_the_step_alone_keeps_no_state_and_observes_nothing():
    for schedule in (make(PAPER_KAPPA), LearningRate(Train())):
        before = [schedule.value(step) for step in range(1, 100)]
        schedule.observe(0.9)
        assert schedule.state_dict() == {}
        schedule.load_state_dict({})
        assert [schedule.value(step) for step in range(1, 100)] == before


RATE = {"steps": 100, "learning_rate": 2.0, "final_learning_rate": 0.25, "warmup_steps": 10}


@pytest.mark.parametrize(
    ("kind", "middle", "last"), [("constant", 2.0, 2.0), ("linear", 2 * 0.625, 0.5), ("cosine", 2 * 0.625, 0.5)]
)
def test_the_learning_rate_warms_up_and_falls_to_its_last_value(kind, middle, last):
    rate = LearningRate(Train(schedule=kind, **RATE))
    full = LearningRate(Train(schedule=kind, **RATE | {"warmup_steps": 0}))
    assert [rate.value(step) for step in (1, 5)] == pytest.approx([full.value(1) / 10, full.value(5) / 2])
    assert rate.value(10) == full.value(10)
    assert rate.value(50) == pytest.approx(middle) and rate.value(100) == pytest.approx(last)


def test_a_cosine_rate_stays_up_longer_and_then_falls_faster():
    linear, cosine = (LearningRate(Train(schedule=kind, **RATE)) for kind in ("linear", "cosine"))
    assert cosine.value(20) > linear.value(20) and cosine.value(80) < linear.value(80)


def test_a_constant_rate_is_the_linear_one_that_ends_at_its_peak():
    constant = LearningRate(Train(schedule="constant", **RATE))
    linear = LearningRate(Train(**RATE | {"final_learning_rate": 1.0}))
    assert [constant.value(step) for step in range(1, 101)] == [linear.value(step) for step in range(1, 101)]
