"""Losses against slow or hand-made formulations, values and gradients."""

import math

import pytest
import torch
import torch.nn.functional as F

from models.lmim import Latents
from models.losses import LOSSES, METRICS, average_similarity, infonce_patches
from tests import reference
from tests.published import prediction_loss, published_objective

SHAPES = [(1, 3, 4), (2, 5, 8), (3, 7, 6)]
# The losses cast to float32, which is what their results can be held to.
CLOSE = {"rtol": 2e-5, "atol": 1e-6}

SLOW = {
    "infonce_patches": reference.infonce_patches,
    "norm_l2": lambda p, t, tau: reference.norm_l2(p, t),
    "l2": lambda p, t, tau: ((p - t) ** 2).mean(),
    "l1": lambda p, t, tau: (p - t).abs().mean(),
    # A parabola within distance 1, a straight line beyond.
    "smooth_l1": lambda p, t, tau: torch.where(
        (p - t).abs() < 1, (p - t) ** 2 / 2, (p - t).abs() - 0.5
    ).mean(),
    "cosine": lambda p, t, tau: torch.stack(
        [
            1 - reference.unit(a) @ reference.unit(b)
            for a, b in zip(p.flatten(0, 1), t.flatten(0, 1), strict=True)
        ]
    ).mean(),
}


def random_tokens(shape, seed: int) -> torch.Tensor:
    """Far from centred: a loss that forgets to subtract a mean gives another number."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(shape[-1], generator=generator) + 0.5
    return 0.7 + scale * torch.randn(shape, generator=generator)


def value_and_gradients(function, *tensors):
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    value = function(*leaves)
    return value, torch.autograd.grad(value, leaves)


def assert_same(fast, slow, *tensors):
    """Values and all gradients; the slow side in float64."""
    value, gradients = value_and_gradients(fast, *tensors)
    expected, wanted = value_and_gradients(slow, *[tensor.double() for tensor in tensors])
    torch.testing.assert_close(value, expected.float(), **CLOSE)
    for gradient, own in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, own.float(), rtol=1e-4, atol=1e-6)


def random_latents(dtype=torch.float32, requires_grad=False) -> Latents:
    shapes = [(2, 5, 8), (2, 5, 8), (2, 3, 8)]
    tokens = [random_tokens(shape, seed).to(dtype) for seed, shape in enumerate(shapes)]
    return Latents(*[own.requires_grad_(requires_grad) for own in tokens])


def test_every_loss_has_a_slow_formulation():
    assert set(SLOW) == set(LOSSES)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "name, tau",
    [(name, 0.2) for name in LOSSES] + [("infonce_patches", 0.07), ("infonce_patches", 1.0)],
)
def test_losses_equal_the_slow_formulation(name, tau, shape):
    predictions, targets = random_tokens(shape, 1), random_tokens(shape, 2)
    assert_same(
        lambda p, t: prediction_loss(name, p, t, tau),
        lambda p, t: SLOW[name](p, t, tau),
        predictions,
        targets,
    )


def test_infonce_standardises_with_the_unbiased_deviation():
    # Only where a deviation is about as small as the 1e-4 added to it does its definition show:
    # a factor common to all channels is lost in the normalisation.
    scales = torch.tensor([1e-5, 1e-4, 1e-3, 1.0])
    predictions = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(3)) * scales
    targets = random_tokens((2, 3, 4), 4)
    loss = prediction_loss("infonce_patches", predictions, targets, 0.2)
    expected = reference.infonce_patches(predictions.double(), targets.double(), 0.2)
    torch.testing.assert_close(loss, expected.float(), **CLOSE)


@pytest.mark.parametrize("tau", [0.1, 0.2, 0.5])
@pytest.mark.parametrize("masked", [16, 176])
def test_chance_level_of_infonce(masked, tau):
    # In 4096 dimensions random vectors are all but orthogonal.
    predictions, targets = (
        torch.randn(2, masked, 4096, generator=torch.Generator().manual_seed(seed))
        for seed in (5, 6)
    )
    loss = prediction_loss("infonce_patches", predictions, targets, tau)
    assert loss.item() == pytest.approx(2 * tau * math.log(masked), rel=0.02)


def test_infonce_of_targets_that_are_all_alike_is_chance():
    targets = torch.ones(2, 9, 6)
    loss = prediction_loss("infonce_patches", random_tokens((2, 9, 6), 7), targets, 0.2)
    assert loss.item() == pytest.approx(0.4 * math.log(9), rel=1e-6)


def test_infonce_compares_within_the_image_only():
    predictions, targets = random_tokens((2, 5, 8), 8), random_tokens((2, 5, 8), 9)
    both = prediction_loss("infonce_patches", predictions, targets, 0.2)
    alone = [
        prediction_loss("infonce_patches", predictions[n : n + 1], targets[n : n + 1], 0.2)
        for n in range(2)
    ]
    torch.testing.assert_close(both, sum(alone) / 2)


def test_norm_l2_uses_the_unbiased_variance():
    # The target 1, 3 has mean 2 and unbiased variance 2: standardised -1/sqrt(2), 1/sqrt(2).
    loss = prediction_loss("norm_l2", torch.zeros(1, 1, 2), torch.tensor([[[1.0, 3.0]]]), 0.2)
    assert loss.item() == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize("shape", SHAPES + [(2, 1, 4)])
def test_average_similarity_equals_the_full_matrix(shape):
    tokens = random_tokens(shape, 10)
    assert_same(average_similarity, reference.average_similarity, tokens)


def test_average_similarity_of_known_tokens():
    alike = torch.tensor([1.0, 2.0, 3.0]).expand(2, 4, 3)
    orthogonal = 5 * torch.eye(4).expand(2, 4, 4)
    opposite = torch.tensor([[[1.0, 0.0], [-3.0, 0.0]]])
    assert average_similarity(alike).item() == pytest.approx(1)
    assert average_similarity(orthogonal).item() == pytest.approx(1 / 4)  # the diagonal counts
    assert average_similarity(opposite).item() == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("coefficient", [0.1, 3.0])
def test_objective_adds_the_similarity_constraint(name, coefficient):
    latents, goal = random_latents(), 0.3

    def fast(predictions, targets, visible):
        objective = published_objective(loss=name, avg_sim_coeff=coefficient)
        return objective(Latents(predictions, targets, visible), goal)[0]

    def slow(predictions, targets, visible):
        constraint = (reference.average_similarity(predictions) - goal) ** 2
        constraint = constraint + (reference.average_similarity(visible) - goal) ** 2
        return SLOW[name](predictions, targets, 0.2) + coefficient * constraint

    assert_same(fast, slow, *latents)


def test_constraint_is_zero_and_flat_at_its_goal():
    tokens = random_tokens((2, 5, 8), 11)
    goal = average_similarity(tokens).item()
    latents = Latents(tokens, random_tokens((2, 5, 8), 12), tokens.clone().requires_grad_())
    loss, _ = published_objective(avg_sim_coeff=1.0)(latents, goal)
    loss.backward()
    assert loss.item() == pytest.approx(
        prediction_loss("infonce_patches", latents.predictions, latents.targets, 0.2).item()
    )
    assert latents.visible.grad.abs().max() < 1e-6


def test_without_coefficient_similarities_have_no_gradient():
    latents = random_latents(requires_grad=True)
    loss, metrics = published_objective(avg_sim_coeff=0.0)(latents, 0.3)
    loss.backward()
    alone = random_latents(requires_grad=True)
    prediction_loss("infonce_patches", alone.predictions, alone.targets, 0.2).backward()
    assert latents.visible.grad is None
    assert torch.equal(latents.predictions.grad, alone.predictions.grad)
    # They are logged all the same.
    assert metrics[2].item() == pytest.approx(average_similarity(latents.visible).item())


@pytest.mark.parametrize("coefficient", [0.0, 0.1])
def test_metrics_are_the_loss_and_three_similarities(coefficient):
    latents = random_latents(requires_grad=True)
    loss, metrics = published_objective(avg_sim_coeff=coefficient)(latents, 0.3)
    assert METRICS == ("loss", "sim_pred", "sim_vis", "sim_trg")
    tokens = (latents.predictions, latents.visible, latents.targets)
    similarities = [reference.average_similarity(own.detach().double()) for own in tokens]
    expected = torch.stack([loss.detach().double(), *similarities]).float()
    torch.testing.assert_close(metrics, expected, **CLOSE)
    assert not metrics.requires_grad


def test_targets_get_no_gradient_from_their_similarity():
    # The constraint is on predictions and visible latents. One loss without a path to the targets
    # but the similarity: cross-entropy against targets that are detached.
    latents = random_latents(requires_grad=True)
    detached = latents._replace(targets=latents.targets.detach())
    loss, _ = published_objective(avg_sim_coeff=1.0)(latents, 0.3)
    same, _ = published_objective(avg_sim_coeff=1.0)(detached, 0.3)
    plain = prediction_loss("infonce_patches", latents.predictions, latents.targets, 0.2)
    assert torch.equal(loss, same)
    with_constraint = torch.autograd.grad(loss, latents.targets)[0]
    without = torch.autograd.grad(plain, latents.targets)[0]
    torch.testing.assert_close(with_constraint, without)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_latents_are_computed_in_float32(name, dtype):
    half = random_latents(dtype)
    full = Latents(*[own.float() for own in half])
    for goal in (0.1, 0.9):
        loss, metrics = published_objective(loss=name)(half, goal)
        expected, expected_metrics = published_objective(loss=name)(full, goal)
        assert loss.dtype == metrics.dtype == torch.float32
        assert torch.equal(loss, expected)
        assert torch.equal(metrics, expected_metrics)


def test_gradients_return_in_the_precision_of_the_latents():
    latents = random_latents(torch.bfloat16, requires_grad=True)
    published_objective()(latents, 0.3)[0].backward()
    gradient = latents.predictions.grad
    assert gradient.dtype == torch.bfloat16
    full = Latents(*[own.detach().float().requires_grad_() for own in latents])
    published_objective()(full, 0.3)[0].backward()
    # The sum of both summands (loss and constraint), rounded once, to eight bits.
    torch.testing.assert_close(gradient.float(), full.predictions.grad, rtol=2**-8, atol=0)


@pytest.mark.parametrize("name", ["l2", "norm_l2", "cosine"])
def test_a_perfect_prediction_costs_nothing(name):
    targets = random_tokens((2, 5, 8), 13)
    predictions = targets
    if name == "norm_l2":
        predictions = F.layer_norm(targets, (8,)) * math.sqrt(7 / 8)  # biased to unbiased
    assert prediction_loss(name, predictions, targets, 0.2).item() == pytest.approx(0, abs=1e-6)


def test_an_image_counts_only_if_all_its_patches_have_candidates():
    """Targets by their angles: the one in the middle of the first image is alike to both others,
    which differ from each other."""
    angles = torch.tensor([[0.0, 30, 60], [0, 90, 180]]).deg2rad()
    targets = torch.stack([angles.cos(), angles.sin()], dim=2)
    predictions = torch.randn(2, 3, 2, generator=torch.Generator().manual_seed(0))
    keys = {"tau": 0.2, "pred_unit": None, "same_target": 0.8}
    both = infonce_patches(predictions, targets, **keys)
    assert both == infonce_patches(predictions[1:], targets[1:], **keys) > 0
