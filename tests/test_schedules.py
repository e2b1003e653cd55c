"""Schedules: numbers worked out by hand from the formulas."""

from types import SimpleNamespace

import pytest

from util.optim import Schedule, peak_learning_rate


def schedule(**changes) -> Schedule:
    values = {
        "min_lr_frac": 0.25,
        "warmup_epochs": 10,
        "epochs": 100,
        "target_mom": 0.99,
        "sim_init": 0.8,
        "sim_end": 0.2,
    }
    return Schedule(SimpleNamespace(**values | changes), 1e-3)


@pytest.mark.parametrize(
    "epoch, expected",
    [
        (0, 2.5e-4),  # the floor
        (5, 6.25e-4),  # half way up
        (9.5, 9.625e-4),  # epochs are fractional
        (10, 1e-3),  # the peak
        (40, 8.125e-4),  # a third of the way down: cos(pi / 3) = 1/2, height 3/4
        (55, 6.25e-4),  # half way down
        (70, 4.375e-4),  # two thirds: height 1/4
        (100, 2.5e-4),  # the floor again
    ],
)
def test_learning_rate(epoch, expected):
    assert schedule().learning_rate(epoch) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("epoch, expected", [(0, 1e-3), (50, 6.25e-4), (100, 2.5e-4)])
def test_learning_rate_without_warm_up_starts_at_the_peak(epoch, expected):
    rate = schedule(warmup_epochs=0).learning_rate(epoch)
    assert rate == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("epoch, expected", [(0, 2.5e-4), (50, 6.25e-4), (100, 1e-3)])
def test_learning_rate_with_nothing_but_warm_up_ends_at_the_peak(epoch, expected):
    rate = schedule(warmup_epochs=100).learning_rate(epoch)
    assert rate == pytest.approx(expected, rel=1e-12)


def test_learning_rate_without_a_floor_starts_and_ends_at_zero():
    without_floor = schedule(min_lr_frac=0.0)
    assert without_floor.learning_rate(0) == 0
    assert without_floor.learning_rate(100) == pytest.approx(0, abs=1e-18)


def test_learning_rate_has_no_step_between_warm_up_and_cosine():
    before, after = (schedule().learning_rate(10 + shift) for shift in (-1e-6, 1e-6))
    assert before == pytest.approx(1e-3, rel=1e-6)
    assert after == pytest.approx(1e-3, rel=1e-6)


@pytest.mark.parametrize(
    "epoch, expected", [(0, 0.99), (100 / 3, 0.9925), (50, 0.995), (75.0, 0.99853553), (100, 1.0)]
)
def test_target_momentum_rises_to_one(epoch, expected):
    # No warm-up here: it depends on the whole length alone. At 3/4: 1 - 0.01 (1 - sqrt(1/2)) / 2.
    assert schedule().target_momentum(epoch) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("epoch, expected", [(0, 0.8), (100 / 3, 0.65), (50, 0.5), (100, 0.2)])
def test_similarity_goal(epoch, expected):
    assert schedule().similarity_goal(epoch) == pytest.approx(expected, rel=1e-12)


def test_similarity_goal_may_rise():
    rising = schedule(sim_init=0.1, sim_end=0.9)
    goals = [rising.similarity_goal(epoch) for epoch in (0, 50, 100)]
    assert goals == pytest.approx([0.1, 0.5, 0.9], rel=1e-12)


@pytest.mark.parametrize(
    "blr, batch_size, accum_iter, world_size, expected",
    [(1.5e-4, 256, 1, 1, 1.5e-4), (1.5e-4, 64, 2, 16, 1.2e-3), (1e-3, 32, 1, 1, 1.25e-4)],
)
def test_peak_learning_rate_is_per_256_images(blr, batch_size, accum_iter, world_size, expected):
    peak = peak_learning_rate(blr, batch_size, accum_iter, world_size)
    assert peak == pytest.approx(expected, rel=1e-12)
