"""A linear classifier of single patches, trained on frozen tokens against masks.

The first process trains it, on the tokens of all: the others wait, so that the number of processes
changes nothing.
"""

import math

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor, nn

from data.base import DataError
from data.loader import epoch_order
from data.masks import IGNORE
from eval.backbone import Tokens
from eval.common import EvalRun
from util.distributed import Ranks, broadcast_object, gather_objects


class PatchHead(nn.Module):
    """Standardise each channel, then a linear layer that starts at zero."""

    def __init__(self, mean: Tensor, std: Tensor, classes: int) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)
        self.linear = nn.Linear(len(mean), classes)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, vectors: Tensor) -> Tensor:
        """[..., D] -> logits [..., classes]"""
        return self.linear((vectors - self.mean) / self.std)


def train_patch_head(run: EvalRun, parts: list[tuple[Tokens, np.ndarray]]) -> PatchHead:
    """parts: the training tokens and masks of this process. -> the same head on all processes"""
    cfg, ranks = run.cfg, run.ranks
    grids = gather_objects([tokens.grid for tokens, _ in parts[:1]], ranks)
    grid = next(own[0] for own in grids if own)  # a process may have no images
    # What waits for its turn waits in the memory of the host.
    tokens = gather_to_first([tokens.patches.cpu() for tokens, _ in parts], ranks)
    masks = gather_to_first([torch.from_numpy(masks) for _, masks in parts], ranks)
    parts.clear()
    head = None
    if ranks.is_main:
        labelled = masks[masks != IGNORE]
        if len(labelled) == 0:
            raise DataError("no pixel of the training masks has a class")
        head, optimizer = start(cfg, ranks, tokens, classes=int(labelled.max()) + 1)
    for epoch in run.tracked(range(cfg.patch_head.epochs), "epochs of the head:"):
        if head is not None:
            train_epoch(cfg, ranks, head, optimizer, tokens, masks, grid, epoch)
        broadcast_object(epoch, ranks)  # a sign of life, before the others give up waiting
    return broadcast_object(None if head is None else head.cpu(), ranks).to(ranks.device)


def start(
    cfg: DictConfig, ranks: Ranks, tokens: Tensor, classes: int
) -> tuple[PatchHead, torch.optim.Optimizer]:
    count = tokens.shape[0] * tokens.shape[1]
    total = torch.zeros(tokens.shape[-1], dtype=torch.float64)
    squares = torch.zeros_like(total)
    for image in tokens:
        total += image.double().sum(dim=0)
        squares += image.double().square().sum(dim=0)
    average = total / count
    deviation = (squares / count - average.square()).clamp(min=0).sqrt()
    # A channel that never changes says nothing: leave it at zero.
    deviation = torch.where(deviation > 1e-6, deviation, 1)
    head = PatchHead(average.float(), deviation.float(), classes).to(ranks.device)
    optimizer = torch.optim.AdamW(head.parameters(), weight_decay=cfg.patch_head.weight_decay)
    return head, optimizer  # each step sets its learning rate


def train_epoch(
    cfg: DictConfig,
    ranks: Ranks,
    head: PatchHead,
    optimizer: torch.optim.Optimizer,
    tokens: Tensor,
    masks: Tensor,
    grid: tuple[int, int],
    epoch: int,
) -> None:
    """tokens [N, L, D], masks uint8 [N, H, W]"""
    order = epoch_order(len(tokens), cfg.seed, epoch)
    batches = order.split(cfg.patch_head.batch_images)
    for step, rows in enumerate(batches):
        done = (epoch + step / len(batches)) / cfg.patch_head.epochs
        for group in optimizer.param_groups:
            group["lr"] = cfg.patch_head.lr * 0.5 * (1 + math.cos(math.pi * done))
        counts = class_counts(masks[rows].to(ranks.device), grid, head.linear.out_features)
        logits = head(tokens[rows].to(ranks.device))
        # Each pixel counts the same, whichever patch it lies in.
        loss = -(counts * F.log_softmax(logits, dim=-1)).sum() / counts.sum().clamp(min=1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def class_counts(masks: Tensor, grid: tuple[int, int], classes: int) -> Tensor:
    """uint8 [B, H, W] -> float [B, L, classes]: pixels of each class in each patch."""
    batch, height, width = masks.shape
    rows, columns = grid
    cells = masks.reshape(batch, rows, height // rows, columns, width // columns)
    cells = cells.transpose(2, 3).reshape(batch, rows * columns, -1).long()
    labelled = cells != IGNORE
    counts = torch.zeros(batch, rows * columns, classes, device=masks.device)
    return counts.scatter_add_(2, cells * labelled, labelled.float())


def gather_to_first(parts: list[Tensor], ranks: Ranks) -> Tensor:
    """The rows of all processes in the order of ranks, on the first one; none on the others."""
    shapes = gather_objects([(part.shape, part.dtype) for part in parts], ranks)
    if not ranks.is_main:
        for part in parts:
            dist.send(part.contiguous().to(ranks.device), 0)
        return torch.empty(0)
    for source in range(1, ranks.world_size):
        for shape, dtype in shapes[source]:
            part = torch.empty(shape, dtype=dtype, device=ranks.device)
            dist.recv(part, source)
            parts.append(part.cpu())
    return torch.cat(parts)
