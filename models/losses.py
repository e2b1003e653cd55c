"""Losses on latents. predictions, targets: [N, M, D]. Always float32, whatever networks use."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from models.lmim import Latents

METRICS = ("loss", "sim_pred", "sim_vis", "sim_trg")


def infonce_patches(predictions: Tensor, targets: Tensor, tau: float) -> Tensor:
    """Each prediction picks its own patch among all masked patches of its image.

    The factor 2 * tau keeps the size of the gradient about the same for any tau. Chance level:
    2 * tau * ln(M)."""
    mean = predictions.mean(dim=1, keepdim=True)
    std = predictions.std(dim=1, keepdim=True)  # unbiased, over the tokens of the image
    predictions = F.normalize((predictions - mean) / (std + 1e-4), dim=-1)
    targets = F.normalize(targets, dim=-1)
    logits = predictions @ targets.transpose(1, 2) / tau  # [N, M, M]
    own_patch = torch.arange(logits.shape[1], device=logits.device).expand(logits.shape[0], -1)
    return 2 * tau * F.cross_entropy(logits.flatten(0, 1), own_patch.flatten())


def norm_l2(predictions: Tensor, targets: Tensor) -> Tensor:
    """Mean squared error to the targets standardised over the channels of each token."""
    mean = targets.mean(dim=-1, keepdim=True)
    variance = targets.var(dim=-1, keepdim=True)
    return F.mse_loss(predictions, (targets - mean) / (variance + 1e-6).sqrt())


def cosine(predictions: Tensor, targets: Tensor) -> Tensor:
    return 1 - F.cosine_similarity(predictions, targets, dim=-1).mean()


REGRESSIONS = {
    "norm_l2": norm_l2,
    "l2": F.mse_loss,
    "l1": F.l1_loss,
    "smooth_l1": F.smooth_l1_loss,
    "cosine": cosine,
}
LOSSES = ("infonce_patches", *REGRESSIONS)


def prediction_loss(name: str, predictions: Tensor, targets: Tensor, tau: float) -> Tensor:
    if name == "infonce_patches":
        return infonce_patches(predictions, targets, tau)
    return REGRESSIONS[name](predictions, targets)


def average_similarity(tokens: Tensor) -> Tensor:
    """Cosine averaged over the batch and all pairs of tokens of an image (each with itself too):
    the squared norm of the mean unit vector, which takes no L x L matrix."""
    return F.normalize(tokens, dim=-1).mean(dim=1).square().sum(dim=-1).mean()


@dataclass(frozen=True)
class Objective:
    """The prediction loss plus the similarity constraint, and the four numbers that are logged."""

    loss: str
    tau: float
    avg_sim_coeff: float

    def __call__(self, latents: Latents, similarity_goal: float | Tensor) -> tuple[Tensor, Tensor]:
        """-> the loss to differentiate, and METRICS as one tensor, detached and on the device."""
        latents = Latents(*(tokens.float() for tokens in latents))
        loss = prediction_loss(self.loss, latents.predictions, latents.targets, self.tau)
        predicted, target, visible = (average_similarity(tokens) for tokens in latents)
        # The constraint keeps the latents of an image from becoming all equal or all different.
        if self.avg_sim_coeff > 0:
            constraint = (predicted - similarity_goal) ** 2 + (visible - similarity_goal) ** 2
            loss = loss + self.avg_sim_coeff * constraint
        return loss, torch.stack([loss, predicted, visible, target]).detach()
