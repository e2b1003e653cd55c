"""Linear probe: heads on the features of a frozen backbone, by MAE's recipe.

Heads of several poolings and learning rates are trained at once on one forward pass of the
backbone. They share nothing else: each ends with the weights that it would have alone.
"""

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor, nn

from data.loader import StepOrder, TrainBatch, share_of
from data.transforms import TrainTransform
from eval.backbone import Backbone
from eval.common import Classification, EvalRun, count_classes, labelled_images, run_evaluation
from eval.features import extract_labelled
from eval.heads import ATTENTIVE, ProbeHead, probe_features
from util.command import run_worker
from util.config import ConfigError
from util.distributed import Ranks, all_reduce
from util.lars import LARS
from util.loaders import train_loader
from util.loop import Line, sum_over_processes
from util.schedules import peak_learning_rate, warmup_cosine


class StepData(NamedTuple):
    """What one optimiser step of this process sees."""

    features: dict[str, Tensor]  # by pooling: [B, D] or [B, L, D], on the device
    labels: Tensor  # int64 [B], on the device


def main(cfg: DictConfig) -> None:
    run_evaluation(cfg, "linear_probe", evaluate)


def evaluate(run: EvalRun) -> None:
    task = Probe(run)
    task.train_to_the_end()
    report(run, task)


class Probe(Classification):
    model: nn.ModuleDict
    optimizer: LARS

    def __init__(self, run: EvalRun):
        super().__init__(run, scales_loss=False)  # heads are float32
        cfg, ranks, backbone = run.cfg, run.ranks, run.backbone
        backbone.requires_grad_(False)
        self.data = CachedFeatures(run) if cfg.cached else LiveFeatures(run)
        self.loader, self.evaluation = self.data.loader, self.data.evaluation
        self.model = build_heads(cfg, ranks, backbone, self.data.classes)
        self.optimizer = build_optimizer(cfg, ranks, self.model)
        self.names = [head_name(pooling, blr) for pooling, blr in head_choices(cfg)]
        self.losses = torch.zeros(len(self.names), dtype=torch.float64, device=ranks.device)

    def introduction(self) -> str:
        source = "features without augmentation" if self.cfg.cached else "augmented images"
        return f"linear_probe: {len(self.names)} heads, {self.data.classes} classes, {source}"

    def step(self, step: int, batches: Iterator) -> None:
        """The micro-steps of a step together: batch norm sees all its images."""
        set_learning_rates(self.cfg, self.optimizer, step / self.loader.steps_per_epoch)
        parts = [self.data.encoded(next(batches)) for _ in range(self.cfg.accum_iter)]
        features = {
            pooling: torch.cat([part.features[pooling] for part in parts])
            for pooling in self.cfg.poolings
        }
        data = StepData(features, torch.cat([part.labels for part in parts]))
        self.losses += train_step(self.model, self.optimizer, data, self.ranks)

    def log_line(self, done: int, steps: int) -> Line:
        losses = sum_over_processes(self.losses, self.loader, self.ranks)
        self.losses.zero_()
        means = [loss / steps / self.ranks.world_size for loss in losses]
        values = {f"loss/{name}": mean for name, mean in zip(self.names, means, strict=True)}
        return values, f"loss {min(means):.4f} to {max(means):.4f}"

    def predictions(self) -> Iterator[tuple[list[Tensor], Tensor]]:
        for part in self.data.evaluation_parts():
            yield [head(part.features) for head in self.model.values()], part.labels

    def evaluate(self, epoch: int) -> Line:
        self.measure()
        first = dict(zip(self.names, self.accuracies[:, 0].tolist(), strict=True))
        summary = "  ".join(f"{name} {value:.2f} %" for name, value in first.items())
        return {f"top1/{name}": value for name, value in first.items()}, summary


# --- heads --------------------------------------------------------------------------------------


def head_choices(cfg: DictConfig) -> Iterator[tuple[str, float]]:
    """The pooling and base learning rate of each head."""
    return product(cfg.poolings, cfg.blrs)


def head_name(pooling: str, blr: float) -> str:
    return f"{pooling}/{blr:g}"


def build_heads(cfg: DictConfig, ranks: Ranks, backbone: Backbone, classes: int) -> nn.ModuleDict:
    heads = nn.ModuleDict()
    for pooling, blr in head_choices(cfg):
        name = head_name(pooling, blr).replace(".", "_")  # names of modules hold no dot
        heads[name] = ProbeHead(pooling, backbone.embed_dim, classes, ranks.world_size, cfg.seed)
    return heads.to(ranks.device)


def build_optimizer(cfg: DictConfig, ranks: Ranks, heads: nn.ModuleDict) -> LARS:
    """One group for each head, with its own peak learning rate."""
    groups = []
    for (_, blr), head in zip(head_choices(cfg), heads.values(), strict=True):
        peak = peak_learning_rate(blr, cfg.batch_size, cfg.accum_iter, ranks.world_size)
        groups.append({"params": list(head.parameters()), "peak_lr": peak})
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

    def __init__(self, run: EvalRun):
        self.run, cfg = run, run.cfg
        train, self.evaluation = labelled_images(cfg, "linear_probe", "train", "eval").values()
        self.classes = count_classes(train.labels, self.evaluation.labels)
        side = run.backbone.image_side
        transform = TrainTransform(side, cfg.min_crop, cfg.dataset.flip, cfg.seed)
        self.loader = train_loader(run.cfg, run.ranks, train, transform)

    @torch.no_grad()
    def encoded(self, batch: TrainBatch) -> StepData:  # an EvalBatch has labels here, too
        tokens = self.run.tokens(batch.images)
        poolings = self.run.cfg.poolings
        features = {pooling: probe_features(tokens, pooling) for pooling in poolings}
        return StepData(features, batch.labels)

    def evaluation_parts(self) -> Iterator[StepData]:
        loader = self.run.loader(self.evaluation)
        return map(self.encoded, self.run.tracked(loader, "evaluation batches:"))


class CachedFeatures(StepOrder):
    """Features of the images without augmentation, computed once; also the loader of them."""

    def __init__(self, run: EvalRun):
        cfg, self.ranks, self.loader = run.cfg, run.ranks, self
        if ATTENTIVE in cfg.poolings:
            raise ConfigError(
                "cached=True: expected poolings: cls, mean and cls+mean, because attentive needs "
                "all tokens"
            )
        images = labelled_images(cfg, "linear_probe", "train", "eval")
        train, self.evaluation = images.values()
        self.classes = count_classes(train.labels, self.evaluation.labels)
        sizes = (cfg.batch_size, cfg.accum_iter)
        super().__init__(len(train), cfg.seed, *sizes, self.ranks.rank, self.ranks.world_size)
        self.features = {
            pooling: extract_labelled(run, images, pooling, normalised=False)
            for pooling in cfg.poolings
        }

    def rows(self, split: str, indices: list[int] | Tensor) -> StepData:
        device = self.ranks.device
        parts = {pooling: splits[split] for pooling, splits in self.features.items()}
        features = {pooling: part.features[indices].to(device) for pooling, part in parts.items()}
        labels = next(iter(parts.values())).labels  # of any pooling: they are the same
        return StepData(features, labels[indices].to(device))

    def encoded(self, indices: list[int]) -> StepData:
        return self.rows("train", indices)

    def evaluation_parts(self) -> Iterator[StepData]:
        count = len(self.evaluation)
        own = torch.arange(count)[share_of(count, self.rank, self.world_size)]
        for indices in own.split(self.batch_size):
            yield self.rows("eval", indices)


def report(run: EvalRun, task: Probe) -> None:
    cfg, names, final = run.cfg, task.names, task.accuracies
    best = int(final[:, 0].argmax())
    results = {"top1": final[best, 0].item(), "top5": final[best, 1].item()}
    for name, (first, _) in zip(names, final.tolist(), strict=True):
        results[f"top1/{name}"] = first
    source = "features without augmentation" if cfg.cached else "random crops"
    run.finish(
        results,
        protocol=f"linear probe, {cfg.epochs} epochs of {source}, LARS; top1 is the best of "
        f"{len(names)} heads (pooling/learning rate), chosen on the evaluation images",
        images=len(task.evaluation),
        extra={
            "best_head": names[best],
            "top5_by_head": dict(zip(names, final[:, 1].tolist(), strict=True)),
        },
    )


if __name__ == "__main__":
    run_worker(main, description=__doc__, config_name="linear_probe")
