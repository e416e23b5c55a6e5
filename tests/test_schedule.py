"""kappa and rho over the steps of a run."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atod_fast.config import Schedule, Slide
from atod_fast.errors import UserError
from atod_fast.objective import AdaptiveKappa, needs_teacher, value

PAPER_KAPPA = Slide(kind="linear", start=1.0, end=0.1, horizon=80)
PAPER_RHO = Slide(kind="linear", start=1.0, end=2.0, horizon=80)


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
    with pytest.raises(ValueError, match="AdaptiveKappa"):
        value(Slide(kind="adaptive"), 1)
