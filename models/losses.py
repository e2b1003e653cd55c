"""Losses on latents. predictions, targets: [N, M, D]. Always float32, whatever networks use."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from models.lmim import Latents
from util.streams import Stream, seed_of

METRICS = ("loss", "sim_pred", "sim_vis", "sim_trg")
# What predictions are standardised over, for each channel: the tokens of the image, or of all.
UNITS = {"image": 1, "batch": (0, 1)}


def standardise_predictions(predictions: Tensor, unit: str | None) -> Tensor:
    if unit is None:
        return predictions
    mean = predictions.mean(dim=UNITS[unit], keepdim=True)
    std = predictions.std(dim=UNITS[unit], keepdim=True)  # unbiased
    return (predictions - mean) / (std + 1e-4)


def patch_logits(predictions: Tensor, targets: Tensor, tau: float) -> Tensor:
    """Cosines of each prediction with all targets of its image, over tau. -> [N, M, M]"""
    predictions, targets = F.normalize(predictions, dim=-1), F.normalize(targets, dim=-1)
    return predictions @ targets.transpose(1, 2) / tau


def without_same_targets(logits: Tensor, targets: Tensor, same_target: float) -> Tensor:
    """Candidates whose target is that of the own patch (cosine above same_target) take no part."""
    targets = F.normalize(targets, dim=-1)
    own = torch.eye(targets.shape[1], dtype=torch.bool, device=targets.device)
    is_same = targets @ targets.transpose(1, 2) > same_target
    return logits.masked_fill(is_same & ~own, -math.inf)


def infonce_patches(
    predictions: Tensor,
    targets: Tensor,
    tau: float,
    pred_unit: str | None = "image",
    negatives: str = "image",
    same_target: float | None = None,
) -> Tensor:
    """Each prediction picks its own patch among all masked patches of its image; with
    negatives=batch among those of all images of the process.

    The factor 2 * tau keeps the size of the gradient about the same for any tau. Chance level:
    2 * tau * ln(candidates)."""
    predictions = standardise_predictions(predictions, pred_unit)
    if negatives == "batch":
        predictions, targets = predictions.flatten(0, 1)[None], targets.flatten(0, 1)[None]
    logits = patch_logits(predictions, targets, tau)
    own_patch = torch.arange(logits.shape[1], device=logits.device).expand(logits.shape[0], -1)
    if same_target is None:
        return 2 * tau * F.cross_entropy(logits.flatten(0, 1), own_patch.flatten())
    logits = without_same_targets(logits, targets, same_target)
    losses = F.cross_entropy(logits.transpose(1, 2), own_patch, reduction="none")  # [N, M]
    # An image in which any patch has no candidate left but itself takes no part.
    has_others = (logits > -math.inf).sum(dim=2) > min(1, logits.shape[1] - 1)
    counted = has_others.all(dim=1)
    return 2 * tau * (losses.mean(dim=1) * counted).sum() / counted.sum().clamp(min=1)


def norm_l2(predictions: Tensor, targets: Tensor) -> Tensor:
    """Mean squared error to the targets standardised over the channels of each token."""
    mean = targets.mean(dim=-1, keepdim=True)
    variance = targets.var(dim=-1, keepdim=True)
    return F.mse_loss(predictions, (targets - mean) / (variance + 1e-6).sqrt())


def cosine(predictions: Tensor, targets: Tensor) -> Tensor:
    return 1 - F.cosine_similarity(predictions, targets, dim=-1).mean()


REGRESSIONS = {"norm_l2": norm_l2, "l2": F.mse_loss, "l1": F.l1_loss, "cosine": cosine}
LOSSES = ("infonce_patches", "smooth_l1", *REGRESSIONS)


def average_similarity(tokens: Tensor) -> Tensor:
    """Cosine averaged over the batch and all pairs of tokens of an image (each with itself too):
    the squared norm of the mean unit vector, which takes no L x L matrix."""
    return F.normalize(tokens, dim=-1).mean(dim=1).square().sum(dim=-1).mean()


@dataclass(frozen=True)
class Objective:
    """The prediction loss plus the similarity constraint, and the four numbers that are logged. Its
    fields are keys of the config."""

    loss: str
    tau: float
    avg_sim_coeff: float
    pred_unit: str | None
    negatives: str
    same_target: float | None
    loss_beta: float

    def chance(self, images: int, masked: int, target_dim: int) -> float | None:
        """The loss of predictions that know nothing: all candidates alike, zeros for standardised
        targets, a right angle. None where it depends on the targets."""
        if self.loss == "infonce_patches":
            return 2 * self.tau * math.log(masked * (images if self.negatives == "batch" else 1))
        return {"norm_l2": 1 - 1 / target_dim, "cosine": 1.0}.get(self.loss)

    def prediction_loss(self, predictions: Tensor, targets: Tensor) -> Tensor:
        if self.loss == "infonce_patches":
            options = (self.pred_unit, self.negatives, self.same_target)
            return infonce_patches(predictions, targets, self.tau, *options)
        if self.loss == "smooth_l1":
            return F.smooth_l1_loss(predictions, targets, beta=self.loss_beta)
        return REGRESSIONS[self.loss](predictions, targets)

    def __call__(self, latents: Latents, similarity_goal: float | Tensor) -> tuple[Tensor, Tensor]:
        """-> the loss to differentiate, and METRICS as one tensor, detached and on the device."""
        latents = Latents(*(tokens.float() for tokens in latents))
        loss = self.prediction_loss(latents.predictions, latents.targets)
        predicted, target, visible = (average_similarity(tokens) for tokens in latents)
        # The constraint keeps the latents of an image from becoming all equal or all different.
        if self.avg_sim_coeff > 0:
            constraint = (predicted - similarity_goal) ** 2 + (visible - similarity_goal) ** 2
            loss = loss + self.avg_sim_coeff * constraint
        return loss, torch.stack([loss, predicted, visible, target]).detach()


def gaussian_tables(knots: Tensor) -> tuple[Tensor, Tensor]:
    """Of the integral from -t to t over evenly spaced knots 0 .. t: the characteristic function of
    the normal distribution, and the weight of each knot (trapezoids; a second half stands for the
    negative ones)."""
    gaussian = torch.exp(-knots.square() / 2)
    weights = 2 * (knots[1] - knots[0]) * gaussian
    weights[:: len(knots) - 1] /= 2
    return gaussian, weights


def epps_pulley(
    samples: Tensor,
    directions: Tensor,
    knots: Tensor,
    processes: int = 1,
    all_reduce: Callable[[Tensor], Tensor] = lambda total: total,
) -> Tensor:
    """How far the projections of the samples are from normal: samples [..., n, D] of this process,
    unit directions [D, S] -> [..., S]. The means are over the samples of all processes; each gets
    `processes` times the gradient, which DistributedDataParallel averages."""
    gaussian, weights = gaussian_tables(knots)
    angles = (samples @ directions)[..., None] * knots  # [..., n, S, knots]
    means = torch.stack([angles.cos().mean(dim=-3), angles.sin().mean(dim=-3)])
    everywhere = all_reduce(means.detach().clone()) / processes
    cosine, sine = means + (everywhere - means).detach()
    distance = (cosine - gaussian).square() + sine.square()
    return processes * samples.shape[-2] * distance @ weights


@dataclass
class SIGReg:
    """Keeps the visible latents normally distributed, along random directions that are new in each
    step and the same in all processes (LeJEPA). Added to any objective: loss + weight * statistic.
    Outside of it, because compiled code does not talk to other processes."""

    LAST_KNOT, KNOTS = 3.0, 17

    weight: float
    slices: int
    on: str
    dim: int
    seed: int
    processes: int
    all_reduce: Callable[[Tensor], Tensor]
    device: torch.device

    def __post_init__(self) -> None:
        self.generator = torch.Generator(self.device)
        self.directions = torch.zeros(self.dim, self.slices, device=self.device)
        self.knots = torch.linspace(0, self.LAST_KNOT, self.KNOTS, device=self.device)

    def draw(self, step: int) -> None:
        self.generator.manual_seed(seed_of(Stream.DIRECTIONS, self.seed, step))
        self.directions.normal_(generator=self.generator)
        self.directions /= self.directions.norm(dim=0)

    def __call__(self, visible: Tensor) -> Tensor:
        """visible [N, V, D]: of the images' means, or (on=token) of the v-th tokens of all images,
        averaged over v."""
        visible = visible.float()
        samples = visible.mean(dim=1) if self.on == "image" else visible.transpose(0, 1)
        directions, knots = self.directions, self.knots
        return epps_pulley(samples, directions, knots, self.processes, self.all_reduce).mean()

    def collapsed(self, images: int) -> float:
        """The statistic where so many images of each process are all alike, at the length that a
        LayerNorm gives."""
        gaussian, weights = gaussian_tables(self.knots)
        return float(self.processes * images * (1 - gaussian.square()) @ weights)
