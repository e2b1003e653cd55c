"""Linear probe: heads on the features of a frozen backbone, by MAE's recipe.

Heads of several poolings and learning rates are trained at once on one forward pass of the
backbone. They share nothing else: each ends with the weights that it would have alone.
"""

from collections.abc import Iterator
from functools import partial
from itertools import product
from typing import NamedTuple

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce as summed_with_gradients
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from data.base import DataError
from data.loader import StepOrder, share_of
from data.transforms import TrainTransform
from eval.backbone import Backbone, Tokens
from eval.common import Classification, EvalRun, run_evaluation
from eval.features import extract_labelled, pool, pooled_width
from launch.command import run_worker
from launch.config import ConfigError
from util.distributed import Ranks, all_reduce
from util.lars import LARS
from util.loaders import train_loader
from util.loop import Line, sum_over_processes
from util.schedules import peak_learning_rate, warmup_cosine

ATTENTIVE = "attentive"
CHANNELS_PER_QUERY = 64
NORM_EPS, NORM_MOMENTUM = 1e-6, 0.1


class StepData(NamedTuple):
    """What one optimiser step of this process sees."""

    features: dict[str, Tensor]  # by pooling: [B, D] or [B, L, D], on the device
    labels: Tensor  # int64 [B], on the device


def main(cfg: DictConfig) -> None:
    run_evaluation(cfg, "linear_probe", evaluate)


def evaluate(run: EvalRun) -> None:
    cfg, task = run.cfg, CachedProbe(run) if run.cfg.cached else Probe(run)
    task.train_to_the_end()
    columns = task.accuracies.T.tolist()
    top1, top5 = (dict(zip(task.names, column, strict=True)) for column in columns)
    best = max(task.names, key=lambda name: top1[name])
    run.finish(
        {"top1": top1[best], "top5": top5[best]} | {f"top1/{name}": top1[name] for name in top1},
        protocol=f"linear probe, {cfg.epochs} epochs of {task.source}, LARS; top1 is the best of "
        f"{len(top1)} heads (pooling/learning rate), chosen on the evaluation images",
        images=task.evaluated,
        extra={"best_head": best, "top5_by_head": top5},
    )


class Probe(Classification):
    """On augmented images, which go through the backbone in each epoch."""

    source = "random crops"
    model: nn.ModuleDict
    optimizer: LARS

    def __init__(self, run: EvalRun):
        super().__init__(run)
        cfg, ranks, backbone = run.cfg, run.ranks, run.backbone
        backbone.requires_grad_(False)
        self.loader = self.build_loader()
        self.model = build_heads(cfg, ranks, backbone, self.classes)
        self.optimizer = build_optimizer(cfg, ranks, self.model)
        self.names = list(head_choices(cfg))
        self.losses = torch.zeros(len(self.names), dtype=torch.float64, device=ranks.device)

    def build_loader(self) -> StepOrder:
        cfg, side = self.cfg, self.run.backbone.image_side
        transform = TrainTransform(side, cfg.min_crop, cfg.dataset.flip, cfg.seed)
        return train_loader(cfg, self.ranks, self.images["train"], transform)

    def introduction(self) -> str:
        return f"linear_probe: {len(self.names)} heads, {self.classes} classes, {self.source}"

    def step(self, step: int, batches: Iterator) -> None:
        """The micro-steps of a step together: batch norm sees all its images."""
        set_learning_rates(self.cfg, self.optimizer, step / self.loader.steps_per_epoch)
        parts = [self.encoded(next(batches)) for _ in range(self.cfg.accum_iter)]
        poolings = self.cfg.poolings
        features = {name: torch.cat([part.features[name] for part in parts]) for name in poolings}
        data = StepData(features, torch.cat([part.labels for part in parts]))
        self.half_done = True  # batch norm moves before the optimiser does
        self.losses += train_step(self.model, self.optimizer, data, self.ranks)
        self.half_done = False

    def sums(self) -> list[Tensor]:
        return [self.losses]

    def log_line(self, done: int, steps: int) -> Line:
        losses = sum_over_processes(self.losses, self.loader, self.ranks)
        self.losses.zero_()
        means = [loss / steps / self.ranks.world_size for loss in losses]
        values = {f"loss/{name}": mean for name, mean in zip(self.names, means, strict=True)}
        return values, f"loss {min(means):.4f} to {max(means):.4f}"

    @torch.no_grad()
    def encoded(self, batch) -> StepData:
        """Of a TrainBatch or an EvalBatch, which has labels here, too."""
        tokens = self.run.tokens(batch.images)
        features = {name: probe_features(tokens, name) for name in self.cfg.poolings}
        return StepData(features, batch.labels)

    def evaluation_parts(self) -> Iterator[StepData]:
        loader = self.run.loader(self.evaluation)
        return map(self.encoded, self.run.batches(loader, "evaluation batches:"))

    def predictions(self) -> Iterator[tuple[list[Tensor], Tensor]]:
        for part in self.evaluation_parts():
            yield [head(part.features) for head in self.model.values()], part.labels

    def evaluate(self) -> Line:
        self.measure()
        first = dict(zip(self.names, self.accuracies[:, 0].tolist(), strict=True))
        summary = "  ".join(f"{name} {value:.2f} %" for name, value in first.items())
        return {f"top1/{name}": value for name, value in first.items()}, summary


class CachedProbe(Probe):
    """On features of the images without augmentation, computed once."""

    source = "features without augmentation"

    def build_loader(self) -> StepOrder:
        cfg, ranks = self.cfg, self.ranks
        if ATTENTIVE in cfg.poolings:
            raise ConfigError("cached=True: expected poolings without attentive, it needs tokens")
        train = self.images["train"]
        sizes = (len(train), cfg.seed, cfg.batch_size, cfg.accum_iter)
        order = StepOrder(*sizes, ranks.rank, ranks.world_size)
        stored = partial(extract_labelled, self.run, self.images, normalised=False)
        self.features = {pooling: stored(pooling=pooling) for pooling in cfg.poolings}
        counts = [[len(part.labels) for part in parts.values()] for parts in self.features.values()]
        if any(count != counts[0] for count in counts):
            raise DataError(
                "images that could be read for one of the poolings could not for another"
            )
        bad = self.run.bad_images[train.dataset]
        kept = [index for index in range(len(train)) if not bad or train.describe(index) not in bad]
        # Of each training image; one that could not be read is replaced by the next, as elsewhere.
        self.rows = torch.searchsorted(torch.tensor(kept), torch.arange(len(train))) % len(kept)
        return order

    def encoded(self, indices: list[int] | Tensor, split: str = "train") -> StepData:
        if split == "train":
            indices = self.rows[indices]
        features = {}
        for pooling, splits in self.features.items():
            features[pooling] = splits[split].features[indices].to(self.ranks.device)
            labels = splits[split].labels[indices].to(self.ranks.device)  # the same for all
        return StepData(features, labels)

    def evaluation_parts(self) -> Iterator[StepData]:
        count = len(self.features[self.cfg.poolings[0]]["eval"].labels)
        own = torch.arange(count)[share_of(count, self.ranks.rank, self.ranks.world_size)]
        for indices in own.split(self.cfg.batch_size):
            yield self.encoded(indices, "eval")


def probe_features(tokens: Tokens, pooling: str) -> Tensor:
    """What the heads of one pooling start from: [B, D or 2 D], or tokens [B, L, D]."""
    if pooling == ATTENTIVE:
        return F.layer_norm(tokens.patches.float(), tokens.patches.shape[-1:])
    return pool(tokens, pooling).float()


class GlobalBatchNorm(nn.Module):
    """BatchNorm1d(affine=False) whose statistics are those of the images of all processes.

    In float64, so that the split into processes is lost in the rounding to float32. (torch's own
    SyncBatchNorm needs a GPU.) All processes have the same number of images."""

    def __init__(self, dim: int, world_size: int):
        super().__init__()
        self.world_size = world_size
        self.register_buffer("running_mean", torch.zeros(dim, dtype=torch.float64))
        self.register_buffer("running_var", torch.ones(dim, dtype=torch.float64))

    def forward(self, features: Tensor) -> Tensor:
        """[B, D] -> [B, D]"""
        features = features.double()
        mean, var = self.running_mean, self.running_var
        if self.training:
            count = len(features) * self.world_size
            mean = self.total(features) / count
            var = self.total((features - mean).square()) / count
            with torch.no_grad():
                self.running_mean.lerp_(mean, NORM_MOMENTUM)
                self.running_var.lerp_(var * (count / max(count - 1, 1)), NORM_MOMENTUM)
        return ((features - mean) * (var + NORM_EPS).rsqrt()).float()

    def total(self, values: Tensor) -> Tensor:
        """[B, D] -> [D], over all processes; gradients come back from all of them, too."""
        own = values.sum(dim=0)
        return own if self.world_size == 1 else summed_with_gradients(own)


class AttentivePool(nn.Module):
    """Attention of learned queries to the patch tokens, one query per 64 channels.

    A key projection would be absorbed by the queries, and values are projected after the pooling:
    both are linear, so this is multi-head attention with a learned query, at a small share of its
    cost."""

    def __init__(self, dim: int, generator: torch.Generator):
        super().__init__()
        most = max(1, dim // CHANNELS_PER_QUERY)
        self.queries = next(count for count in range(most, 0, -1) if dim % count == 0)
        self.query = nn.Parameter(torch.empty(self.queries, dim))
        self.value = nn.Parameter(torch.empty(dim, dim))
        nn.init.normal_(self.query, std=0.02, generator=generator)
        nn.init.xavier_uniform_(self.value, generator=generator)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, L, D] -> [B, D]"""
        attention = (tokens @ self.query.T).softmax(dim=1)  # [B, L, queries]
        pooled = attention.transpose(1, 2) @ tokens  # [B, queries, D]
        value = self.value.unflatten(0, (self.queries, -1))  # [queries, D / queries, D]
        return torch.einsum("bqd,qed->bqe", pooled, value).flatten(1)


class ProbeHead(nn.Module):
    """One pooling, trained with one learning rate."""

    def __init__(self, pooling: str, dim: int, classes: int, world_size: int, seed: int):
        super().__init__()
        # The start of a head does not depend on its learning rate or on other heads.
        generator = torch.Generator().manual_seed(seed)
        self.pooling = pooling
        self.pool = AttentivePool(dim, generator) if pooling == ATTENTIVE else nn.Identity()
        width = pooled_width(dim, pooling)
        self.norm = GlobalBatchNorm(width, world_size)
        self.linear = nn.Linear(width, classes)
        nn.init.normal_(self.linear.weight, std=0.01, generator=generator)
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        """-> logits [B, classes]"""
        return self.linear(self.norm(self.pool(features[self.pooling])))


def head_choices(cfg: DictConfig) -> dict[str, tuple[str, float]]:
    """The pooling and base learning rate of each head, by its name."""
    return {f"{choice[0]}/{choice[1]:g}": choice for choice in product(cfg.poolings, cfg.blrs)}


def build_heads(cfg: DictConfig, ranks: Ranks, backbone: Backbone, classes: int) -> nn.ModuleDict:
    settings = (backbone.embed_dim, classes, ranks.world_size, cfg.seed)
    heads = {
        name.replace(".", "_"): ProbeHead(pooling, *settings)  # names of modules hold no dot
        for name, (pooling, _) in head_choices(cfg).items()
    }
    return nn.ModuleDict(heads).to(ranks.device)


def build_optimizer(cfg: DictConfig, ranks: Ranks, heads: nn.ModuleDict) -> LARS:
    """One group for each head, with its own peak learning rate."""
    groups = []
    for (_, blr), head in zip(head_choices(cfg).values(), heads.values(), strict=True):
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
    if ranks.world_size > 1:
        gradients = [p.grad for p in heads.parameters() if p.grad is not None]
        vector_to_parameters(all_reduce(parameters_to_vector(gradients)), gradients)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return torch.stack(losses).detach()


if __name__ == "__main__":
    run_worker(main, description=__doc__, config_name="linear_probe")
