"""Linear probe: heads on the features of a frozen backbone, by MAE's recipe.

Heads of several poolings and learning rates are trained at once on one forward pass of the
backbone. They share nothing else: each ends with the weights that it would have alone.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor, nn

from data.base import DataError
from data.loader import TrainBatch, TrainLoader, epoch_order
from data.transforms import TrainTransform
from eval.common import (
    EvalRun,
    check_same_backbone,
    count_classes,
    count_hits,
    eval_batches,
    labelled_images,
    normalised,
    run_evaluation,
    share_of,
    train_loader,
)
from eval.features import Features, autocast, extract
from eval.heads import ATTENTIVE, ProbeHead, probe_features
from eval.networks import Backbone
from util.command import run_worker
from util.config import ConfigError
from util.distributed import Ranks, all_reduce
from util.lars import LARS
from util.loop import Line, Loop, Task, sum_over_processes, train
from util.precision import choose_precision
from util.preemption import stoppable
from util.schedules import peak_learning_rate, warmup_cosine


class StepData(NamedTuple):
    """What one optimiser step of this process sees."""

    features: dict[str, Tensor]  # by pooling: [B, D] or [B, L, D], on the device
    labels: Tensor  # int64 [B], on the device


def main(cfg: DictConfig) -> None:
    run_evaluation(cfg, "linear_probe", evaluate)


def evaluate(cfg: DictConfig, ranks: Ranks, backbone: Backbone, run: EvalRun) -> None:
    task = Probe(cfg, ranks, backbone, run)
    with stoppable(ranks) as stop_flag:
        train(task, cfg, ranks, run.job, stop_flag)


class Probe(Task):
    def __init__(self, cfg: DictConfig, ranks: Ranks, backbone: Backbone, run: EvalRun):
        self.cfg, self.ranks, self.backbone, self.run = cfg, ranks, backbone, run
        backbone.requires_grad_(False)
        choices = CachedFeatures if cfg.cached else LiveFeatures
        self.data = choices(cfg, ranks, backbone, run)
        self.loader = self.data.loader
        self.model = build_heads(cfg, ranks, backbone, self.data.classes)
        self.optimizer = build_optimizer(cfg, ranks, self.model)
        self.names = [head_name(pooling, blr) for pooling in cfg.poolings for blr in cfg.blrs]
        self.losses = torch.zeros(len(self.model), dtype=torch.float64, device=ranks.device)
        self.accuracies: Tensor | None = None  # the last ones, [heads, 2]: first, first five

    def introduction(self) -> str:
        source = "features without augmentation" if self.cfg.cached else "augmented images"
        return f"linear_probe: {len(self.model)} heads, {self.data.classes} classes, {source}"

    def batches(self, first: int, last: int) -> Iterator:
        return self.data.batches(first, last)

    def step(self, step: int, batches: Iterator) -> None:
        set_learning_rates(self.cfg, self.optimizer, step / self.loader.steps_per_epoch)
        data = self.data.of_step(batches)
        self.losses += train_step(self.model, self.optimizer, data, self.ranks)

    def log_line(self, done: int, steps: int) -> Line:
        losses = sum_over_processes(self.losses, self.loader, self.ranks)
        self.losses.zero_()
        means = [loss / steps / self.ranks.world_size for loss in losses]
        values = {f"loss/{name}": mean for name, mean in zip(self.names, means, strict=True)}
        return values, f"loss {min(means):.4f} to {max(means):.4f}"

    @torch.no_grad()
    def evaluate(self, epoch: int) -> Line:
        """Percent of the evaluation images, of all processes."""
        self.model.eval()
        hits = torch.zeros(len(self.model), 2, dtype=torch.int64, device=self.ranks.device)
        for part in self.data.evaluation_parts():
            for position, head in enumerate(self.model.values()):
                hits[position] += count_hits(head(part.features), part.labels)
        self.model.train()
        self.accuracies = 100 * all_reduce(hits).double() / self.data.eval_images
        first = dict(zip(self.names, self.accuracies[:, 0].tolist(), strict=True))
        summary = "  ".join(f"{name} {value:.2f} %" for name, value in first.items())
        return {f"top1/{name}": value for name, value in first.items()}, summary

    def finish(self, loop: Loop) -> None:
        if self.accuracies is None:  # the run that is resumed had come to its end
            self.evaluate(self.cfg.epochs)
        report(self.cfg, self.run, self)

    def state(self) -> dict:
        return super().state() | {"backbone": self.backbone.describe()}

    def restore(self, contents: dict, source: Path) -> None:
        check_same_backbone(contents, self.backbone)
        super().restore(contents, source)


# --- heads --------------------------------------------------------------------------------------


def head_name(pooling: str, blr: float) -> str:
    return f"{pooling}/{blr:g}"


def build_heads(cfg: DictConfig, ranks: Ranks, backbone: Backbone, classes: int) -> nn.ModuleDict:
    heads = nn.ModuleDict()
    for pooling in cfg.poolings:
        for blr in cfg.blrs:
            head = ProbeHead(pooling, backbone.embed_dim, classes, ranks.world_size, cfg.seed)
            heads[module_name(pooling, blr)] = head
    return heads.to(ranks.device)


def module_name(pooling: str, blr: float) -> str:
    """Names of modules hold no dot."""
    return head_name(pooling, blr).replace(".", "_")


def build_optimizer(cfg: DictConfig, ranks: Ranks, heads: nn.ModuleDict) -> LARS:
    """One group for each head, with its own peak learning rate."""
    groups = []
    for pooling in cfg.poolings:
        for blr in cfg.blrs:
            peak = peak_learning_rate(blr, cfg.batch_size, cfg.accum_iter, ranks.world_size)
            parameters = list(heads[module_name(pooling, blr)].parameters())
            groups.append({"params": parameters, "peak_lr": peak})
    return LARS(groups, weight_decay=cfg.weight_decay)


def set_learning_rates(cfg: DictConfig, optimizer: LARS, epoch: float) -> None:
    share = warmup_cosine(epoch, 0.0, cfg.warmup_epochs, cfg.epochs)
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * share


def train_step(heads: nn.ModuleDict, optimizer: LARS, data: StepData, ranks: Ranks) -> Tensor:
    """-> each head's loss on the images of this process"""
    losses = [F.cross_entropy(head(data.features), data.labels) for head in heads.values()]
    # The sum trains each head as if it were alone: no parameter is in two of them.
    (sum(losses) / ranks.world_size).backward()
    gradients = [parameter.grad for parameter in heads.parameters()]
    if ranks.world_size > 1:
        total = all_reduce(torch.cat([gradient.flatten() for gradient in gradients]))
        parts = total.split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return torch.stack(losses).detach()


# --- features -----------------------------------------------------------------------------------


class LiveFeatures:
    """Augmented training images, through the backbone in each epoch."""

    def __init__(self, cfg: DictConfig, ranks: Ranks, backbone: Backbone, run: EvalRun):
        self.cfg, self.ranks, self.backbone, self.run = cfg, ranks, backbone, run
        self.precision = choose_precision(cfg.precision, ranks.device)
        train = labelled_images(cfg, "train", "linear_probe")
        self.evaluation = labelled_images(cfg, "eval", "linear_probe")
        self.eval_images = len(self.evaluation)
        self.classes = count_classes(train.labels, self.evaluation.labels)
        transform = TrainTransform(backbone.image_side, cfg.min_crop, cfg.dataset.flip, cfg.seed)
        self.loader: TrainLoader = train_loader(cfg, ranks, train, transform)

    @torch.no_grad()
    def features(self, images: Tensor) -> dict[str, Tensor]:
        with autocast(self.ranks.device, self.precision):
            tokens = self.backbone(normalised(self.cfg, self.backbone, images))
        return {pooling: probe_features(tokens, pooling) for pooling in self.cfg.poolings}

    def batches(self, first: int, last: int) -> Iterator[TrainBatch]:
        return self.loader.stream(first, last)

    def of_step(self, batches: Iterator[TrainBatch]) -> StepData:
        """The micro-steps of a step together: batch norm sees all its images."""
        parts = [next(batches) for _ in range(self.cfg.accum_iter)]
        features = [self.features(batch.images) for batch in parts]
        together = {
            pooling: torch.cat([part[pooling] for part in features])
            for pooling in self.cfg.poolings
        }
        return StepData(together, torch.cat([batch.labels for batch in parts]))

    def evaluation_parts(self) -> Iterator[StepData]:
        loader = eval_batches(self.cfg, self.ranks, self.evaluation, self.backbone.image_side)
        for number, batch in enumerate(loader):
            self.run.progress(number, len(loader), "evaluation batches:")
            yield StepData(self.features(batch.images), batch.labels)


class CachedFeatures:
    """Features of the images without augmentation, computed once; also the loader of them."""

    def __init__(self, cfg: DictConfig, ranks: Ranks, backbone: Backbone, run: EvalRun):
        if ATTENTIVE in cfg.poolings:
            raise ConfigError(
                "cached=True: expected poolings: cls, mean and cls+mean, because attentive needs "
                "all tokens"
            )
        self.cfg, self.ranks, self.loader = cfg, ranks, self
        for split in ("train", "eval"):
            labelled_images(cfg, split, "linear_probe")  # complain before the work, not after it
        self.train, self.evaluation = (
            {
                pooling: extract(cfg, ranks, backbone, split, pooling, False, run).labelled()
                for pooling in cfg.poolings
            }
            for split in ("train", "eval")
        )
        train, evaluation = (any_of(part).labels for part in (self.train, self.evaluation))
        self.classes = count_classes(train, evaluation)
        self.eval_images = len(evaluation)
        self.train_images = len(train)
        self.batch_size, self.accum_iter = cfg.batch_size, cfg.accum_iter
        self.bad_images: set[str] = set()  # an evaluation leaves no image out
        images_per_step = cfg.batch_size * cfg.accum_iter * ranks.world_size
        self.steps_per_epoch = self.train_images // images_per_step
        if self.steps_per_epoch == 0:
            raise DataError(
                f"the dataset has {self.train_images} images, but one step needs "
                f"{images_per_step}: batch_size={cfg.batch_size} x accum_iter={cfg.accum_iter} x "
                f"{ranks.world_size} processes"
            )

    def rows(self, source: dict[str, Features], indices: Tensor) -> StepData:
        device = self.ranks.device
        features = {name: part.features[indices].to(device) for name, part in source.items()}
        return StepData(features, any_of(source).labels[indices].to(device))

    def of_step(self, batches: Iterator[StepData]) -> StepData:
        return next(batches)

    def batches(self, first: int, last: int) -> Iterator[StepData]:
        """In the order in which TrainLoader would give the images."""
        share = self.batch_size * self.ranks.world_size
        own = slice(self.ranks.rank * self.batch_size, (self.ranks.rank + 1) * self.batch_size)
        for step in range(first, last):
            epoch, place = divmod(step, self.steps_per_epoch)
            order = epoch_order(self.train_images, self.cfg.seed, epoch)
            size = share * self.accum_iter
            indices = order[place * size : (place + 1) * size]
            yield self.rows(self.train, indices.view(-1, share)[:, own].flatten())

    def evaluation_parts(self) -> Iterator[StepData]:
        first, last = share_of(self.eval_images, self.ranks)
        for indices in torch.arange(first, last).split(self.batch_size):
            yield self.rows(self.evaluation, indices)


def any_of(features: dict[str, Features]) -> Features:
    """Of one pooling or the other: the labels are the same."""
    return next(iter(features.values()))


def report(cfg: DictConfig, run: EvalRun, task: Probe) -> None:
    names, final = task.names, task.accuracies
    best = int(final[:, 0].argmax())
    results = {"top1": final[best, 0].item(), "top5": final[best, 1].item()}
    for name, (first, _) in zip(names, final.tolist(), strict=True):
        results[f"top1/{name}"] = first
    source = "features without augmentation" if cfg.cached else "random crops"
    run.finish(
        results,
        protocol=f"linear probe, {cfg.epochs} epochs of {source}, LARS; top1 is the best of "
        f"{len(names)} heads (pooling/learning rate), chosen on the evaluation images",
        images=task.data.eval_images,
        extra={
            "best_head": names[best],
            "top5_by_head": dict(zip(names, final[:, 1].tolist(), strict=True)),
        },
    )


if __name__ == "__main__":
    run_worker(main, description=__doc__, config_name="linear_probe")
