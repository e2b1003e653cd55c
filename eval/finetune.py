"""Fine-tuning: the whole backbone and a linear layer on its pooled tokens, by MAE's recipe."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from timm.data import Mixup
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from data.base import count_images
from data.loader import TrainBatch, TrainLoader
from data.transforms import FinetuneTransform
from eval.backbone import Backbone
from eval.common import Classification, EvalRun, worker
from eval.features import pool, pooled_width
from launch.command import run_worker
from launch.config import ConfigError, TrainingStopped
from util.build import train_loader
from util.distributed import all_reduce, synchronised
from util.loop import Line
from util.optim import peak_learning_rate, warmup_cosine
from util.streams import Stream, seed_of, seeded

NO_DECAY = ("pos_embed", "token")
HEAD_STD = 2e-5  # the head starts with almost equal logits


class Classifier(nn.Module):
    """Backbone, pooling, LayerNorm, linear layer."""

    def __init__(self, backbone: Backbone, pooling: str, classes: int, seed: int):
        super().__init__()
        self.backbone, self.pooling = backbone, pooling
        width = pooled_width(backbone.embed_dim, pooling)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, classes)
        generator = torch.Generator().manual_seed(seed_of(Stream.CLASSIFIER, seed))
        nn.init.trunc_normal_(self.head.weight, std=HEAD_STD, generator=generator)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W], normalised -> logits [B, classes]"""
        return self.head(self.norm(pool(self.backbone(images), self.pooling)))

    def group_matcher(self, coarse: bool) -> Callable[[str], int]:
        """For timm: from the name of a parameter to its layer."""
        return self.backbone.layer_of


def evaluate(run: EvalRun) -> None:
    task = Finetuning(run)
    task.train_to_the_end()
    run.finish(
        {"top1": task.top1["head"], "top5": task.top5["head"]},
        protocol=f"fine-tuning, {run.cfg.epochs} epochs, top-1 of the last one",
        images=task.evaluated,
    )


class Finetuning(Classification):
    loader: TrainLoader
    model: Classifier
    names = ("head",)

    def __init__(self, run: EvalRun):
        super().__init__(run)
        cfg, ranks, backbone = run.cfg, run.ranks, run.backbone
        self.loader = train_loader(cfg, ranks, self.dataset, build_transform(run))
        self.model = Classifier(backbone, cfg.pooling, self.classes, cfg.seed).to(ranks.device)
        backbone.set_drop_path(cfg.drop_path)
        freeze_what_is_not_used(self.model)
        self.network = synchronised(self.model, ranks)
        groups = decaying_groups(self.model, cfg.weight_decay, cfg.layer_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), fused=True)
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=run.precision == "fp16")
        self.mixup = build_mixup(cfg, self.classes)
        self.peak_lr = peak_learning_rate(cfg.blr, cfg.batch_size, cfg.accum_iter, ranks.world_size)
        self.losses = torch.zeros((), dtype=torch.float64, device=ranks.device)
        self.faults = torch.zeros((), dtype=torch.int64, device=ranks.device)

    def introduction(self) -> str:
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        about = f"{count_images(self.loader.dataset)} of {self.classes} classes"
        parameters = f"{trained / 1e6:.1f} M trainable parameters"
        return f"finetune: {about}, {parameters}, {self.run.precision}"

    def prepare(self) -> None:
        if isinstance(self.network, DistributedDataParallel):
            # As in main_lmim: processes sum gradients in another order after their first pass.
            blank_pass(self.network, self.model)
            self.optimizer.zero_grad(set_to_none=True)
        self.network.train()

    def step(self, step: int, batches: Iterator) -> None:
        """accum_iter micro-steps and one step of the optimiser, which is left out on the device if
        the gradient is not finite; then the run stops at its next log line."""
        self.set_learning_rates(step / self.loader.steps_per_epoch)
        for micro in range(self.cfg.accum_iter):
            self.micro_step(step, micro, next(batches))
        self.scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        bad = ~nn.utils.get_total_norm(gradients, foreach=True).isfinite()
        if not self.scaler.is_enabled():
            self.optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
            self.faults += bad
        self.half_done = True
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.half_done = False
        self.optimizer.zero_grad(set_to_none=True)

    def micro_step(self, step: int, micro: int, batch: TrainBatch) -> None:
        # The same numbers for the same images, however a step is split into micro-steps and
        # processes.
        counter = (self.cfg.seed, step, micro * self.ranks.world_size + self.ranks.rank)
        images, targets = batch.images, batch.labels
        if self.mixup is not None:
            with seeded(Stream.MIXUP, *counter):
                images, targets = self.mixup(images, targets)
        torch.manual_seed(seed_of(Stream.DROP_PATH, *counter))
        is_last = micro == self.cfg.accum_iter - 1
        keep_local = isinstance(self.network, DistributedDataParallel) and not is_last
        with self.network.no_sync() if keep_local else nullcontext():
            with self.run.autocast():
                logits = self.network(images)
            smoothing = self.cfg.label_smoothing if self.mixup is None else 0.0
            loss = F.cross_entropy(logits.float(), targets, label_smoothing=smoothing)
            self.scaler.scale(loss / self.cfg.accum_iter).backward()
        self.losses += loss.detach() / self.cfg.accum_iter
        self.faults += ~loss.detach().isfinite()

    def set_learning_rates(self, epoch: float) -> None:
        floor_share = min(1.0, self.cfg.min_lr / self.peak_lr)
        share = warmup_cosine(epoch, floor_share, self.cfg.warmup_epochs, self.cfg.epochs)
        for group in self.optimizer.param_groups:
            group["lr"] = self.peak_lr * share * group["lr_scale"]

    def log_line(self, done: int, steps: int) -> Line:
        (loss,) = self.mean_losses(steps)
        if all_reduce(self.faults):
            raise TrainingStopped(
                f"the loss or gradient is not finite before step {done}: a smaller blr may help"
            )
        self.set_learning_rates((done - 1) / self.loader.steps_per_epoch)  # a resumed run had none
        # The head's learning rate, as it was in this step.
        rate = max(group["lr"] for group in self.optimizer.param_groups)
        return {"loss": loss, "lr": rate}, f"loss {loss:.4f}  lr {rate:.2e}"

    def predictions(self) -> Iterator[tuple[list[Tensor], Tensor]]:
        loader = self.run.loader(self.evaluation)
        for batch in self.run.batches(loader, "evaluation batches:"):
            with self.run.autocast():
                logits = self.model(self.run.normalised(batch.images))
            yield [logits], batch.labels

    def evaluate(self) -> Line:
        self.measure()
        top1, top5 = self.top1["head"], self.top5["head"]
        return {"top1": top1, "top5": top5}, f"{top1:.2f} % (top-5 {top5:.2f} %)"


def decaying_groups(model: Classifier, weight_decay: float, layer_decay: float) -> list[dict]:
    """The last layer learns at the full rate (lr_scale 1), each one below it at layer_decay times
    the rate of the one above. Vectors, positions and class and register tokens do not decay."""
    names = [name for name, _ in model.named_parameters()]
    fixed = [name for name in names if any(word in name for word in NO_DECAY)]
    return param_groups_layer_decay(model, weight_decay, fixed, layer_decay=layer_decay)


def build_transform(run: EvalRun) -> FinetuneTransform:
    cfg, (mean, std) = run.cfg, run.colours
    return FinetuneTransform(
        cfg.seed,
        input_size=run.backbone.image_side,
        scale=(cfg.min_crop, 1.0),
        hflip=0.5 if cfg.dataset.flip else 0.0,
        auto_augment=cfg.auto_augment,
        re_prob=cfg.erase,
        mean=mean,
        std=std,
    )


def build_mixup(cfg: DictConfig, classes: int) -> Mixup | None:
    if cfg.mixup == cfg.cutmix == 0:
        return None
    if cfg.batch_size % 2:
        raise ConfigError(f"batch_size={cfg.batch_size}: expected an even number to mix in pairs")
    alphas = {"mixup_alpha": cfg.mixup, "cutmix_alpha": cfg.cutmix}
    return Mixup(**alphas, label_smoothing=cfg.label_smoothing, num_classes=classes)


def freeze_what_is_not_used(model: Classifier) -> None:
    """Parameters that the loss does not reach, such as the norm of an unused class token: they get
    no gradient, and processes would wait for it."""
    model.eval()
    blank_pass(model, model)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.requires_grad and parameter.grad is not None)
        parameter.grad = None


def blank_pass(network: nn.Module, model: Classifier) -> None:
    """Gradients of the model from one blank image, through whatever is around the model."""
    side = model.backbone.image_side
    network(torch.zeros(1, 3, side, side, device=model.head.weight.device)).sum().backward()


main = worker(evaluate)

if __name__ == "__main__":
    run_worker(main, description=__doc__, config_name="finetune")
