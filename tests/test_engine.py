"""The training step: accumulation, precision, and what happens to a step that is not finite."""

import copy

import pytest
import torch

from engine_pretrain import (
    SCALER_SEARCHES,
    Training,
    begin_step,
    end_step,
    micro_step,
    train_step,
)
from models.views import Views, sample_views
from tests.published import published_model, published_training

CPU = torch.device("cpu")
GRID, PATCH, GAP, VISIBLE = 4, 3, 1, 5
SIDE = GRID * (PATCH + GAP)


def build_training(
    seed: int = 0, avg_sim_coeff: float = 0.1, decoder: str = "cross", **options
) -> Training:
    torch.manual_seed(seed)
    model = published_model(
        grid_size=GRID,
        patch_size=PATCH,
        patch_gap=GAP,
        embed_dim=24,
        depth=2,
        num_heads=3,
        mlp_dim=32,
        mlp_depth=2,
        decoder=decoder,
        decoder_embed_dim=16,
        decoder_depth=1,
        decoder_num_heads=2,
    )
    own = {"warmup_epochs": 1, "epochs": 4, "target_mom": 0.9, "avg_sim_coeff": avg_sim_coeff}
    return published_training(model, **own, **options)


def draw(seed: int, batch_size: int) -> tuple[torch.Tensor, Views]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(batch_size, 3, SIDE, SIDE, generator=generator)
    return images, sample_views(batch_size, GRID, VISIBLE, GAP, generator)


def half(views: Views, which: int) -> Views:
    size = len(views.visible_ids) // 2
    return Views(*(part[which * size : (which + 1) * size] for part in views))


def run_steps(training: Training, steps: int, batch_size: int = 8) -> None:
    """Each step sees the same images, in accum_iter equal parts."""
    for step in range(steps):
        images, views = draw(step, batch_size)
        begin_step(training, step / 4)
        if training.accum_iter == 1:
            micro_step(training, images, views, last_of_step=True)
        else:
            for part in range(2):
                share = images[part * batch_size // 2 : (part + 1) * batch_size // 2]
                micro_step(training, share, half(views, part), last_of_step=part == 1)
        end_step(training, step)


def weights(training: Training) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in training.model.parameters()])


def note_gradients(training: Training) -> list[torch.Tensor]:
    """Filled with the gradient of each step that the optimiser is about to take."""
    seen = []

    def note(optimizer, *_):
        parameters = (p for group in optimizer.param_groups for p in group["params"])
        seen.append(torch.cat([p.grad.flatten() for p in parameters]))

    training.optimizer.register_step_pre_hook(note)
    return seen


def relative_difference(ours: torch.Tensor, expected: torch.Tensor) -> float:
    return float((ours - expected).norm() / expected.norm())


def test_accumulating_two_halves_equals_the_whole_batch():
    """Without the similarity term, which is not a mean over images."""
    whole = build_training(avg_sim_coeff=0.0)
    halves = build_training(avg_sim_coeff=0.0, accum_iter=2)
    gradients = {}
    for training in (whole, halves):
        gradients[training.accum_iter] = note_gradients(training)
        run_steps(training, 6)
    first, expected = gradients[2][0], gradients[1][0]
    assert relative_difference(first, expected) < 1e-5
    # Adam turns the rounding of near-zero gradients into full steps, hence the wider bound.
    assert relative_difference(weights(halves), weights(whole)) < 1e-3
    assert halves.meters.read() == pytest.approx(whole.meters.read(), rel=1e-4)


def test_accumulated_micro_steps_are_one_optimiser_step():
    training = build_training(accum_iter=2)
    run_steps(training, 3)
    steps = {float(state["step"]) for state in training.optimizer.state.values()}
    assert steps == {3.0}


def test_the_target_moves_before_the_forward_pass_and_only_once_per_step():
    training = build_training(accum_iter=2)
    run_steps(training, 1)  # target and encoder differ from here on
    expected = copy.deepcopy(training.model.target_encoder)
    online = dict(training.model.encoder.named_parameters())
    momentum = training.schedule.target_momentum(0.25)
    with torch.no_grad():
        for name, parameter in expected.named_parameters():
            parameter.mul_(momentum).add_(online[name], alpha=1 - momentum)
    images, views = draw(1, 4)
    begin_step(training, 0.25)
    micro_step(training, images, views, last_of_step=False)
    micro_step(training, images, views, last_of_step=True)
    for name, parameter in training.model.target_encoder.named_parameters():
        torch.testing.assert_close(parameter, dict(expected.named_parameters())[name])


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_leaves_everything_as_it_was(poison):
    training = build_training()
    run_steps(training, 2)
    before = weights(training).clone()
    state_before = copy.deepcopy(training.optimizer.state_dict()["state"])
    images, views = draw(2, 8)
    images[3] = poison
    training.model.target = "frozen"  # a moving average moves at each step, good or bad
    begin_step(training, 0.5)
    micro_step(training, images, views, last_of_step=True)
    end_step(training, 2)
    assert torch.equal(weights(training), before)
    for index, state in training.optimizer.state_dict()["state"].items():
        for name, value in state.items():
            assert torch.equal(value, state_before[index][name]), (index, name)
    assert (training.meters.first_bad_step, training.meters.bad_steps) == (2, 1)
    run_steps(training, 1)
    assert not torch.equal(weights(training), before), "the next good step is taken"
    assert weights(training).isfinite().all()


def test_faults_count_and_remember_the_first_step():
    training = build_training()
    for step, bad in enumerate([False, True, False, True, True]):
        images, views = draw(step, 4)
        begin_step(training, 0.0)
        micro_step(training, images * float("nan") if bad else images, views, True)
        end_step(training, step)
    assert (training.meters.first_bad_step, training.meters.bad_steps) == (1, 3)


def test_clip_grad_bounds_the_step_but_logs_the_true_norm():
    def gradient_norms(clip_grad):
        training = build_training(clip_grad=clip_grad)
        seen = note_gradients(training)
        run_steps(training, 1)
        return float(seen[0].norm()), training.meters.read()["grad_norm"]

    free, logged = gradient_norms(None)
    assert logged == pytest.approx(free, rel=1e-5)
    clipped, logged = gradient_norms(free / 4)
    assert clipped == pytest.approx(free / 4, rel=1e-4)
    assert logged == pytest.approx(free, rel=1e-5)


@pytest.mark.parametrize("precision, tolerance", [("bf16", 0.02), ("fp16", 0.02)])
def test_low_precision_stays_near_fp32(precision, tolerance):
    exact, rounded = build_training(), build_training(precision=precision)
    rounded.scaler = torch.amp.GradScaler("cpu", enabled=precision == "fp16", init_scale=256.0)
    run_steps(exact, 8)
    run_steps(rounded, 8)
    means, expected = rounded.meters.read(), exact.meters.read()
    assert means["loss"] == pytest.approx(expected["loss"], rel=tolerance)
    assert means["loss"] != expected["loss"], "autocast was not on"
    assert all(p.dtype == torch.float32 for p in rounded.model.parameters())


def test_fp16_overflow_lowers_the_scale_and_is_no_fault():
    training = build_training(precision="fp16")
    training.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before = weights(training).clone()
    run_steps(training, 1)
    assert training.scaler.get_scale() == 2.0**39
    assert training.meters.bad_steps == 0
    assert torch.equal(weights(training)[: len(before)], before)


def test_fp16_that_never_finds_its_scale_is_a_fault():
    training = build_training(precision="fp16")
    training.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**100)
    run_steps(training, SCALER_SEARCHES)
    assert training.meters.bad_steps == 0
    run_steps(training, 2)
    assert training.meters.bad_steps == 2
    assert training.meters.read()["grad_norm"] == 0  # and not NaN, which is no JSON


def test_a_step_takes_its_batches_and_draws_its_views():
    training = build_training(accum_iter=2)
    batches = (draw(seed, 4)[0] for seed in range(100))
    drawn = []

    def draw_views(step, micro, batch_size):
        drawn.append((step, micro))
        return draw(step, batch_size)[1]

    for step in range(5, 8):
        train_step(training, batches, draw_views, step, epoch=step / 4)
    assert drawn == [(5, 0), (5, 1), (6, 0), (6, 1), (7, 0), (7, 1)]
    assert torch.equal(next(batches), draw(6, 4)[0])
    assert training.optimizer.param_groups[0]["lr"] == training.schedule.learning_rate(7 / 4)


def test_a_step_that_failed_is_begun_again_without_moving_the_target_twice():
    once, twice = build_training(), build_training()
    for training in (once, twice):
        run_steps(training, 1)
        assert not training.target_is_ahead
        begin_step(training, 0.25)
    assert once.target_is_ahead and not once.half_done
    begin_step(twice, 0.25)
    for ours, expected in zip(
        twice.model.target_encoder.parameters(), once.model.target_encoder.parameters(), strict=True
    ):
        assert torch.equal(ours, expected)


def test_a_failure_while_the_target_moves_leaves_a_step_half_done():
    training = build_training()
    training.model.move_target = lambda momentum: 1 / 0
    with pytest.raises(ZeroDivisionError):
        begin_step(training, 0.25)
    assert training.half_done
