"""Linear probe: heads on the features of a frozen backbone, by MAE's recipe.

Heads of several poolings and learning rates are trained at once on one forward pass of the
backbone. They share nothing else: each ends with the weights that it would have alone.
"""

from collections.abc import Iterator
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce as summed_with_gradients
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from data.loader import StepOrder, share_of
from data.transforms import TrainTransform
from eval.backbone import Tokens
from eval.common import Classification, EvalRun, worker
from eval.features import extract_labelled, pool, pooled_width
from launch.command import run_worker
from launch.config import ConfigError
from util.build import train_loader
from util.distributed import all_reduce
from util.loop import Line
from util.optim import LARS, peak_learning_rate, warmup_cosine

ATTENTIVE = "attentive"
CHANNELS_PER_QUERY = 64
NORM_EPS, NORM_MOMENTUM = 1e-6, 0.1


# On the device: features by pooling, [B, D] or [B, L, D], and labels, int64 [B].
Batch = tuple[dict[str, Tensor], Tensor]


def evaluate(run: EvalRun) -> None:
    cfg = run.cfg
    task = CachedProbe(run) if cfg.cached else Probe(run)
    task.train_to_the_end()
    top1, top5 = task.top1, task.top5
    best = max(task.names, key=lambda name: top1[name])
    run.finish(
        {"top1": top1[best], "top5": top5[best]} | task.by_head(),
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
        self.names, self.model, groups = [], nn.ModuleDict(), []
        for pooling, blr in product(cfg.poolings, cfg.blrs):
            name = f"{pooling}/{blr:g}"
            head = ProbeHead(pooling, backbone.embed_dim, self.classes, ranks.world_size, cfg.seed)
            peak = peak_learning_rate(blr, cfg.batch_size, cfg.accum_iter, ranks.world_size)
            self.names.append(name)
            self.model[name.replace(".", "_")] = head.to(ranks.device)  # modules' names hold no dot
            groups.append({"params": list(head.parameters()), "peak_lr": peak})
        self.optimizer = LARS(groups, weight_decay=cfg.weight_decay)
        self.losses = torch.zeros(len(self.names), dtype=torch.float64, device=ranks.device)

    def build_loader(self) -> StepOrder:
        cfg, side = self.cfg, self.run.backbone.image_side
        transform = TrainTransform(side, cfg.min_crop, cfg.dataset.flip, cfg.seed)
        return train_loader(cfg, self.ranks, self.dataset, transform)

    def introduction(self) -> str:
        return f"linear_probe: {len(self.names)} heads, {self.classes} classes, {self.source}"

    def step(self, step: int, batches: Iterator) -> None:
        """The micro-steps of a step together: batch norm sees all its images."""
        self.set_learning_rates(step / self.loader.steps_per_epoch)
        parts = [self.encoded(next(batches)) for _ in range(self.cfg.accum_iter)]
        poolings = self.cfg.poolings
        features = {name: torch.cat([part[name] for part, _ in parts]) for name in poolings}
        labels = torch.cat([labels for _, labels in parts])
        self.half_done = True  # batch norm moves before the optimiser does
        losses = [F.cross_entropy(head(features), labels) for head in self.model.values()]
        # The sum trains each head as if it were alone: no parameter is in two of them.
        (sum(losses) / self.ranks.world_size).backward()
        if self.ranks.world_size > 1:
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            vector_to_parameters(all_reduce(parameters_to_vector(gradients)), gradients)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.losses += torch.stack(losses).detach()
        self.half_done = False

    def set_learning_rates(self, epoch: float) -> None:
        share = warmup_cosine(epoch, 0.0, self.cfg.warmup_epochs, self.cfg.epochs)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * share

    def log_line(self, done: int, steps: int) -> Line:
        means = self.mean_losses(steps)
        values = {f"loss/{name}": mean for name, mean in zip(self.names, means, strict=True)}
        return values, f"loss {min(means):.4f} to {max(means):.4f}"

    @torch.no_grad()
    def encoded(self, batch) -> Batch:
        """Of a TrainBatch or an EvalBatch, which has labels here, too."""
        tokens = self.run.tokens(batch.images)
        return {name: probe_features(tokens, name) for name in self.cfg.poolings}, batch.labels

    def evaluation_parts(self) -> Iterator[Batch]:
        loader = self.run.loader(self.evaluation)
        return map(self.encoded, self.run.batches(loader, "evaluation batches:"))

    def predictions(self) -> Iterator[tuple[list[Tensor], Tensor]]:
        for features, labels in self.evaluation_parts():
            yield [head(features) for head in self.model.values()], labels

    def evaluate(self) -> Line:
        self.measure()
        summary = "  ".join(f"{name} {value:.2f} %" for name, value in self.top1.items())
        return self.by_head(), summary

    def by_head(self) -> dict[str, float]:
        return {f"top1/{name}": value for name, value in self.top1.items()}


class CachedProbe(Probe):
    """On features of the images without augmentation, computed once."""

    source = "features without augmentation"

    def build_loader(self) -> StepOrder:
        cfg, ranks, count = self.cfg, self.ranks, len(self.dataset)
        if ATTENTIVE in cfg.poolings:
            raise ConfigError("cached=True: expected poolings without attentive, it needs tokens")
        sizes = cfg.batch_size, cfg.accum_iter, ranks.rank, ranks.world_size
        order = StepOrder(count, cfg.seed, *sizes)
        # Of several poolings each is a part of cls+mean, or all of it.
        pooling = cfg.poolings[0] if len(cfg.poolings) == 1 else "cls+mean"
        self.stored = extract_labelled(self.run, self.images, pooling)
        bad = self.run.bad_images[self.images["train"].dataset]
        kept = [index for index in range(count) if self.dataset.describe(index) not in bad]
        # Of each training image; one that could not be read is replaced by the next, as elsewhere.
        self.rows = torch.searchsorted(torch.tensor(kept), torch.arange(count)) % len(kept)
        return order

    def encoded(self, indices: list[int] | Tensor, split: str = "train") -> Batch:
        rows = self.rows[indices] if split == "train" else indices
        features, labels = (part[rows].to(self.ranks.device) for part in self.stored[split])
        width = self.run.backbone.embed_dim
        poolings = {"cls": features[:, :width], "mean": features[:, -width:], "cls+mean": features}
        return poolings, labels

    def evaluation_parts(self) -> Iterator[Batch]:
        count = len(self.stored["eval"].labels)
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


main = worker(evaluate)

if __name__ == "__main__":
    run_worker(main, description=__doc__, config_name="linear_probe")
