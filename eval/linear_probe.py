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
from data.loader import TrainLoader, epoch_order
from data.transforms import TrainTransform
from eval.features import Features, autocast, extract
from eval.heads import ATTENTIVE, ProbeHead, probe_features
from eval.networks import Backbone
from eval.run import EvalRun, eval_batches, normalised, run_evaluation, share_of
from eval.training import (
    check_same_backbone,
    count_classes,
    count_hits,
    labelled_images,
    train_loader,
)
from util import checkpoint
from util.command import run_worker
from util.config import ConfigError
from util.distributed import Ranks, all_reduce
from util.lars import LARS
from util.metrics import readable_time
from util.precision import choose_precision
from util.preemption import StopFlag, stoppable
from util.record import TrainingRecord, check_same_steps, find_checkpoint
from util.schedules import peak_learning_rate, warmup_cosine


class Window(NamedTuple):
    """What one optimiser step of this process sees."""

    features: dict[str, Tensor]  # by pooling: [B, D] or [B, L, D], on the device
    labels: Tensor  # int64 [B], on the device


def main(cfg: DictConfig) -> None:
    run_evaluation(cfg, "linear_probe", evaluate)


def evaluate(cfg: DictConfig, ranks: Ranks, backbone: Backbone, run: EvalRun) -> None:
    with stoppable(ranks) as stop_flag:
        probe(cfg, ranks, backbone, run, stop_flag)


def probe(
    cfg: DictConfig, ranks: Ranks, backbone: Backbone, run: EvalRun, stop_flag: StopFlag
) -> None:
    # 1. Features of the training and the evaluation images, and the heads on them.
    backbone.requires_grad_(False)
    choices = CachedFeatures if cfg.cached else LiveFeatures
    data = choices(cfg, ranks, backbone, run)
    heads = build_heads(cfg, ranks, backbone, data.classes)
    optimizer = build_optimizer(cfg, ranks, heads)

    # 2. New, or as in the newest checkpoint.
    step = 0
    resumed = find_checkpoint(cfg, run.job, ranks)
    if resumed is not None:
        check_same_backbone(resumed, backbone)
        checkpoint.load_weights(heads, resumed["state_dict"], run.job / "checkpoints")
        optimizer.load_state_dict(resumed["optimizer"])
        check_same_steps(resumed, data.loader.windows_per_epoch)
        step = resumed["step"]

    # 3. Epochs, from wherever that is to the end.
    record = ProbeRecord(cfg, ranks, run.job, data, stop_flag, step, heads, optimizer)
    record.backbone = backbone.describe()
    record.introduce()
    per_epoch = data.loader.windows_per_epoch
    windows = data.windows(record, step, record.total_steps)
    final = None
    while step < record.total_steps:
        heads.train()
        end = (step // per_epoch + 1) * per_epoch
        for current in range(step, end):
            set_learning_rates(cfg, optimizer, current / per_epoch)
            record.add(train_step(heads, optimizer, next(windows), ranks))
            record.after_window(current)
        step, finished = end, end // per_epoch
        if (cfg.eval_freq and finished % cfg.eval_freq == 0) or finished == cfg.epochs:
            with record.speed.pause():
                final = accuracies(heads, data, ranks)
            record.record_accuracies(final, finished)
        record.after_epoch(finished)
    if final is None:  # the run that is resumed had come to its end
        final = accuracies(heads, data, ranks)
    record.finish()
    record.log.close()
    report(cfg, run, data, final)


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


def train_step(heads: nn.ModuleDict, optimizer: LARS, window: Window, ranks: Ranks) -> Tensor:
    """-> each head's loss on the images of this process"""
    losses = [F.cross_entropy(head(window.features), window.labels) for head in heads.values()]
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


@torch.no_grad()
def accuracies(heads: nn.ModuleDict, data, ranks: Ranks) -> Tensor:
    """Percent of the evaluation images, of all processes. -> float64 [heads, 2]: first, first 5"""
    heads.eval()
    hits = torch.zeros(len(heads), 2, dtype=torch.int64, device=ranks.device)
    for window in data.evaluation_windows():
        for position, head in enumerate(heads.values()):
            hits[position] += count_hits(head(window.features), window.labels)
    return 100 * all_reduce(hits).double() / data.eval_images


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

    def windows(self, record: "ProbeRecord", first: int, last: int) -> Iterator[Window]:
        """The micro-steps of a window together: batch norm sees all its images."""
        parts = []
        for batch in record.speed.timed(self.loader.stream(first, last)):
            parts.append((self.features(batch.images), batch.labels))
            if len(parts) == self.cfg.accum_iter:
                features = {
                    pooling: torch.cat([features[pooling] for features, _ in parts])
                    for pooling in self.cfg.poolings
                }
                yield Window(features, torch.cat([labels for _, labels in parts]))
                parts = []

    def evaluation_windows(self) -> Iterator[Window]:
        loader = eval_batches(self.cfg, self.ranks, self.evaluation, self.backbone.image_side)
        for number, batch in enumerate(loader):
            self.run.progress(number, len(loader), "evaluation batches:")
            yield Window(self.features(batch.images), batch.labels)


class CachedFeatures:
    """Features of the images without augmentation, computed once; also the loader of them."""

    def __init__(self, cfg: DictConfig, ranks: Ranks, backbone: Backbone, run: EvalRun):
        if ATTENTIVE in cfg.poolings:
            raise ConfigError(
                "cached=True: valid poolings are cls, mean and cls+mean, because attentive needs "
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
        self.windows_per_epoch = self.train_images // images_per_step
        if self.windows_per_epoch == 0:
            raise DataError(
                f"the dataset has {self.train_images} images, but one step needs "
                f"{images_per_step}: batch_size={cfg.batch_size} x accum_iter={cfg.accum_iter} x "
                f"{ranks.world_size} processes"
            )

    def rows(self, source: dict[str, Features], indices: Tensor) -> Window:
        device = self.ranks.device
        features = {name: part.features[indices].to(device) for name, part in source.items()}
        return Window(features, any_of(source).labels[indices].to(device))

    def windows(self, record: "ProbeRecord", first: int, last: int) -> Iterator[Window]:
        """In the order in which TrainLoader would give the images."""
        share = self.batch_size * self.ranks.world_size
        own = slice(self.ranks.rank * self.batch_size, (self.ranks.rank + 1) * self.batch_size)
        for step in range(first, last):
            epoch, window = divmod(step, self.windows_per_epoch)
            order = epoch_order(self.train_images, self.cfg.seed, epoch)
            size = share * self.accum_iter
            indices = order[window * size : (window + 1) * size]
            yield self.rows(self.train, indices.view(-1, share)[:, own].flatten())

    def evaluation_windows(self) -> Iterator[Window]:
        first, last = share_of(self.eval_images, self.ranks)
        for indices in torch.arange(first, last).split(self.batch_size):
            yield self.rows(self.evaluation, indices)


def any_of(features: dict[str, Features]) -> Features:
    """Of one pooling or the other: the labels are the same."""
    return next(iter(features.values()))


# --- what is left behind ------------------------------------------------------------------------


class ProbeRecord(TrainingRecord):
    backbone: dict

    def __init__(
        self,
        cfg: DictConfig,
        ranks: Ranks,
        job: Path,
        data: LiveFeatures | CachedFeatures,
        stop_flag: StopFlag,
        first_step: int,
        heads: nn.ModuleDict,
        optimizer: LARS,
    ):
        super().__init__(cfg, ranks, job, data.loader, stop_flag, first_step)
        self.data, self.heads, self.optimizer = data, heads, optimizer
        self.names = [head_name(pooling, blr) for pooling in cfg.poolings for blr in cfg.blrs]
        self.losses = torch.zeros(len(heads), dtype=torch.float64, device=ranks.device)

    def introduce(self) -> None:
        source = "features without augmentation" if self.cfg.cached else "augmented images"
        self.log.say(
            f"linear_probe: {len(self.heads)} heads, {self.data.classes} classes, {source}, "
            f"{self.images_per_step} images per step, {self.total_steps} steps, {self.where()}"
        )

    def add(self, losses: Tensor) -> None:
        self.losses += losses

    def write_log(self, done: int) -> None:
        """Waits for the device."""
        windows = done - self.last_logged
        bad = torch.full((1,), len(self.loader.bad_images), device=self.ranks.device)
        *losses, bad_images = all_reduce(torch.cat([self.losses, bad])).tolist()
        if bad_images:
            self.check_bad_images()
        self.losses.zero_()
        means = [loss / windows / self.ranks.world_size for loss in losses]
        epoch = done / self.loader.windows_per_epoch
        values = {
            "epoch": epoch,
            **{f"loss/{name}": mean for name, mean in zip(self.names, means, strict=True)},
            **self.read_speed(done),
        }
        summary = (
            f"epoch {epoch:.2f}/{self.cfg.epochs}  step {done}/{self.total_steps}  "
            f"loss {min(means):.4f} to {max(means):.4f}  "
            f"{values['images_per_second']:.0f} images/s  "
            f"eta {readable_time(values['eta_seconds'])}"
        )
        self.log.record(values, done, summary)

    def record_accuracies(self, values: Tensor, epoch: int) -> None:
        first = dict(zip(self.names, values[:, 0].tolist(), strict=True))
        summary = f"epoch {epoch}: " + "  ".join(f"{n} {value:.2f} %" for n, value in first.items())
        step = epoch * self.loader.windows_per_epoch
        named = {f"top1/{name}": value for name, value in first.items()}
        self.log.record({"epoch": epoch, **named}, step, summary)

    def contents(self) -> dict:
        return {
            "state_dict": self.heads.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "loss_scaler": {},  # heads are float32
            "backbone": self.backbone,
        }


def report(cfg: DictConfig, run: EvalRun, data, final: Tensor) -> None:
    names = [head_name(pooling, blr) for pooling in cfg.poolings for blr in cfg.blrs]
    best = int(final[:, 0].argmax())
    results = {"top1": final[best, 0].item(), "top5": final[best, 1].item()}
    for name, (first, _) in zip(names, final.tolist(), strict=True):
        results[f"top1/{name}"] = first
    source = "features without augmentation" if cfg.cached else "random crops"
    run.finish(
        results,
        protocol=f"linear probe, {cfg.epochs} epochs of {source}, LARS; top1 is the best of "
        f"{len(names)} heads (pooling/learning rate), chosen on the evaluation images",
        images=data.eval_images,
        extra={
            "best_head": names[best],
            "top5_by_head": dict(zip(names, final[:, 1].tolist(), strict=True)),
        },
    )


if __name__ == "__main__":
    run_worker(main, description=__doc__, config_name="linear_probe")
