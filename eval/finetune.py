"""Fine-tuning: the whole backbone and a linear layer on its pooled tokens, by MAE's recipe."""

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from timm.data import Mixup
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from data.augmentation import FinetuneTransform
from data.loader import TrainLoader
from eval.features import autocast, pool
from eval.networks import Backbone
from eval.run import EvalRun, colours, eval_batches, normalised, run_evaluation
from eval.training import (
    LabelledImages,
    check_same_backbone,
    count_classes,
    count_hits,
    labelled_images,
    train_loader,
)
from util import checkpoint
from util.command import run_worker
from util.config import ConfigError
from util.distributed import Ranks, all_reduce, synchronised
from util.metrics import FaultCounter, readable_time
from util.optim import layer_decay_groups
from util.precision import choose_precision
from util.preemption import StopFlag, stoppable
from util.record import TrainingRecord, TrainingStopped, check_same_steps, find_checkpoint
from util.schedules import peak_learning_rate, warmup_cosine
from util.streams import Stream, seed_of, seeded

HEAD_STD = 2e-5  # the head starts with almost equal logits


class Classifier(nn.Module):
    """Backbone, pooling, LayerNorm, linear layer."""

    def __init__(self, backbone: Backbone, pooling: str, classes: int, seed: int):
        super().__init__()
        self.backbone, self.pooling = backbone, pooling
        width = backbone.embed_dim * (2 if pooling == "cls+mean" else 1)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, classes)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(Stream.CLASSIFIER, seed))
            nn.init.trunc_normal_(self.head.weight, std=HEAD_STD)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W], normalised -> logits [B, classes]"""
        return self.head(self.norm(pool(self.backbone(images), self.pooling)))


@dataclass
class Training:
    model: Classifier
    network: nn.Module  # the model, or DistributedDataParallel around it
    optimizer: torch.optim.AdamW
    scaler: torch.amp.GradScaler  # does something for fp16 only
    mixup: Mixup | None
    precision: str
    peak_lr: float


def main(cfg: DictConfig) -> None:
    run_evaluation(cfg, "finetune", evaluate)


def evaluate(cfg: DictConfig, ranks: Ranks, backbone: Backbone, run: EvalRun) -> None:
    with stoppable(ranks) as stop_flag:
        finetune(cfg, ranks, backbone, run, stop_flag)


def finetune(
    cfg: DictConfig, ranks: Ranks, backbone: Backbone, run: EvalRun, stop_flag: StopFlag
) -> None:
    # 1. Data, network, optimiser.
    evaluation = labelled_images(cfg, "eval", "finetune")
    loader = build_loader(cfg, ranks, backbone)
    classes = count_classes(loader.dataset.labels, evaluation.labels)
    model = Classifier(backbone, cfg.pooling, classes, cfg.seed).to(ranks.device)
    backbone.set_drop_path(cfg.drop_path)
    freeze_what_is_not_used(model)

    # 2. New, or as in the newest checkpoint.
    resumed = find_checkpoint(cfg, run.job, ranks)
    if resumed is not None:
        check_same_backbone(resumed, backbone)
        checkpoint.load_weights(model, resumed["state_dict"], run.job / "checkpoints")
    training = build_training(cfg, ranks, model, classes)
    step = 0
    if resumed is not None:
        training.optimizer.load_state_dict(resumed["optimizer"])
        if resumed["loss_scaler"]:  # empty unless that run was in fp16
            training.scaler.load_state_dict(resumed["loss_scaler"])
        check_same_steps(resumed, loader.windows_per_epoch)
        step = resumed["step"]

    # 3. Epochs, from wherever that is to the end.
    record = FinetuneRecord(cfg, ranks, run.job, loader, stop_flag, step, training)
    record.introduce(classes)
    settle_gradient_buckets(training)
    batches = record.speed.timed(loader.stream(step, record.total_steps))
    per_epoch = loader.windows_per_epoch
    hits = None
    while step < record.total_steps:
        training.network.train()
        end = (step // per_epoch + 1) * per_epoch
        for current in range(step, end):
            train_window(cfg, ranks, training, batches, current, per_epoch, record)
            record.after_window(current)
        step, finished = end, end // per_epoch
        if (cfg.eval_freq and finished % cfg.eval_freq == 0) or finished == cfg.epochs:
            with record.speed.pause():
                hits = accuracy(cfg, ranks, training, evaluation, run)
            record.record_accuracy(hits, finished)
        record.after_epoch(finished)
    if hits is None:  # the run that is resumed had come to its end
        hits = accuracy(cfg, ranks, training, evaluation, run)
    record.finish()
    record.log.close()
    run.finish(
        {"top1": hits[0], "top5": hits[1]},
        protocol=f"fine-tuning, {cfg.epochs} epochs, top-1 of the last one",
        images=len(evaluation),
    )


# --- one step -----------------------------------------------------------------------------------


def train_window(
    cfg: DictConfig,
    ranks: Ranks,
    training: Training,
    batches,
    step: int,
    windows_per_epoch: int,
    record: "FinetuneRecord",
) -> None:
    """accum_iter micro-steps and one optimiser step."""
    set_learning_rates(cfg, training, step / windows_per_epoch)
    for micro in range(cfg.accum_iter):
        batch = next(batches)
        # The same numbers for the same images, however a window is split into micro-steps and
        # processes.
        position = micro * ranks.world_size + ranks.rank
        images, targets = batch.images, batch.labels
        if training.mixup is not None:
            with seeded(Stream.MIXUP, cfg.seed, step, position):
                images, targets = training.mixup(images, targets)
        torch.manual_seed(seed_of(Stream.DROP_PATH, cfg.seed, step, position))
        last = micro == cfg.accum_iter - 1
        keep_local = isinstance(training.network, DistributedDataParallel) and not last
        with training.network.no_sync() if keep_local else nullcontext():
            with autocast(ranks.device, training.precision):
                logits = training.network(images)
            smoothing = cfg.label_smoothing if training.mixup is None else 0.0
            loss = F.cross_entropy(logits.float(), targets, label_smoothing=smoothing)
            training.scaler.scale(loss / cfg.accum_iter).backward()
        record.add(step, loss.detach())
    optimiser_step(training, step, record)


def optimiser_step(training: Training, step: int, record: "FinetuneRecord") -> None:
    """Left out on the device if the gradient is not finite; the run stops at its next log line."""
    training.scaler.unscale_(training.optimizer)
    gradients = [p.grad for p in training.model.parameters() if p.grad is not None]
    bad = ~nn.utils.get_total_norm(gradients, foreach=True).isfinite()
    if not training.scaler.is_enabled():
        training.optimizer.found_inf = bad.float()
        record.bad_steps.add(step, bad)
    training.scaler.step(training.optimizer)
    training.scaler.update()
    training.optimizer.zero_grad(set_to_none=True)


def set_learning_rates(cfg: DictConfig, training: Training, epoch: float) -> None:
    floor_share = min(1.0, cfg.min_lr / training.peak_lr)
    share = warmup_cosine(epoch, floor_share, cfg.warmup_epochs, cfg.epochs)
    for group in training.optimizer.param_groups:
        group["lr"] = training.peak_lr * share * group["lr_scale"]


@torch.no_grad()
def accuracy(
    cfg: DictConfig, ranks: Ranks, training: Training, evaluation: LabelledImages, run: EvalRun
) -> list[float]:
    """Percent of the evaluation images, of all processes: first, among the first five."""
    model = training.model.eval()
    hits = torch.zeros(2, dtype=torch.int64, device=ranks.device)
    loader = eval_batches(cfg, ranks, evaluation, model.backbone.image_side)
    for number, batch in enumerate(loader):
        run.progress(number, len(loader), "evaluation batches:")
        with autocast(ranks.device, training.precision):
            logits = model(normalised(cfg, model.backbone, batch.images))
        hits += count_hits(logits, batch.labels)
    return (100 * all_reduce(hits).double() / len(evaluation)).tolist()


# --- what is built ------------------------------------------------------------------------------


def build_loader(cfg: DictConfig, ranks: Ranks, backbone: Backbone) -> TrainLoader:
    transform = FinetuneTransform(
        backbone.image_side,
        *colours(cfg, backbone),
        flip=cfg.dataset.flip,
        min_crop=cfg.min_crop,
        auto_augment=cfg.auto_augment,
        erase=cfg.erase,
        seed=cfg.seed,
    )
    return train_loader(cfg, ranks, labelled_images(cfg, "train", "finetune"), transform)


def build_training(cfg: DictConfig, ranks: Ranks, model: Classifier, classes: int) -> Training:
    precision = choose_precision(cfg.precision, ranks.device)
    groups = layer_decay_groups(
        model, model.backbone.layer_of, model.backbone.depth + 1, cfg.weight_decay, cfg.layer_decay
    )
    return Training(
        model=model,
        network=synchronised(model, ranks),
        optimizer=torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), fused=True),
        scaler=torch.amp.GradScaler(ranks.device.type, enabled=precision == "fp16"),
        mixup=build_mixup(cfg, classes),
        precision=precision,
        peak_lr=peak_learning_rate(cfg.blr, cfg.batch_size, cfg.accum_iter, ranks.world_size),
    )


def build_mixup(cfg: DictConfig, classes: int) -> Mixup | None:
    if cfg.mixup == 0 and cfg.cutmix == 0:
        return None
    if cfg.batch_size % 2:
        raise ConfigError(
            f"batch_size={cfg.batch_size}: valid is an even number, because mixup={cfg.mixup} and "
            f"cutmix={cfg.cutmix} mix the images of a batch in pairs"
        )
    return Mixup(
        mixup_alpha=cfg.mixup,
        cutmix_alpha=cfg.cutmix,
        label_smoothing=cfg.label_smoothing,
        num_classes=classes,
    )


def freeze_what_is_not_used(model: Classifier) -> None:
    """Parameters that the loss does not reach, such as the norm of an unused class token: they get
    no gradient, and processes would wait for it."""
    side = model.backbone.image_side
    device = model.head.weight.device
    model.eval()
    F.cross_entropy(
        model(torch.zeros(1, 3, side, side, device=device)),
        torch.zeros(1, dtype=int, device=device),
    ).backward()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.requires_grad and parameter.grad is not None)
        parameter.grad = None


def settle_gradient_buckets(training: Training) -> None:
    """One pass before the first step, of a new run and of a resumed one alike: processes sum
    gradients in another order after their first backward pass (as in main_lmim)."""
    if not isinstance(training.network, DistributedDataParallel):
        return
    side = training.model.backbone.image_side
    device = training.model.head.weight.device
    with autocast(device, training.precision):
        logits = training.network(torch.zeros(1, 3, side, side, device=device))
    logits.float().sum().backward()
    training.optimizer.zero_grad(set_to_none=True)


# --- what is left behind ------------------------------------------------------------------------


class FinetuneRecord(TrainingRecord):
    def __init__(
        self,
        cfg: DictConfig,
        ranks: Ranks,
        job: Path,
        loader: TrainLoader,
        stop_flag: StopFlag,
        first_step: int,
        training: Training,
    ):
        super().__init__(cfg, ranks, job, loader, stop_flag, first_step)
        self.training = training
        self.loss = torch.zeros((), dtype=torch.float64, device=ranks.device)
        self.bad_steps = FaultCounter(ranks.device)

    def introduce(self, classes: int) -> None:
        trained = sum(p.numel() for p in self.training.model.parameters() if p.requires_grad)
        self.log.say(
            f"finetune: {len(self.loader.dataset)} images of {classes} classes, "
            f"{trained / 1e6:.1f} M trainable parameters, {self.training.precision}, "
            f"{self.images_per_step} images per step, {self.total_steps} steps, {self.where()}"
        )

    def add(self, step: int, loss: Tensor) -> None:
        self.loss += loss
        self.bad_steps.add(step, ~loss.isfinite())

    def write_log(self, done: int) -> None:
        """Waits for the device."""
        micro_steps = (done - self.last_logged) * self.cfg.accum_iter
        faults = self.bad_steps.count.double()
        bad_images = torch.tensor(len(self.loader.bad_images)).to(faults)
        loss, faults, bad_images = all_reduce(torch.stack([self.loss, faults, bad_images])).tolist()
        if bad_images:
            self.check_bad_images()
        if faults:
            raise TrainingStopped(
                f"the loss or gradient is not finite before step {done}: a smaller blr may help; "
                f"{self.last_good_checkpoint()}"
            )
        self.loss.zero_()
        epoch = done / self.loader.windows_per_epoch
        # The head's learning rate, as it was in this step.
        values = {
            "epoch": epoch,
            "loss": loss / micro_steps / self.ranks.world_size,
            "lr": max(group["lr"] for group in self.training.optimizer.param_groups),
            **self.read_speed(done),
        }
        summary = (
            f"epoch {epoch:.2f}/{self.cfg.epochs}  step {done}/{self.total_steps}  "
            f"loss {values['loss']:.4f}  lr {values['lr']:.2e}  "
            f"{values['images_per_second']:.0f} images/s  "
            f"waiting {values['data_wait']:.0%}  eta {readable_time(values['eta_seconds'])}"
        )
        self.log.record(values, done, summary)

    def record_accuracy(self, hits: list[float], epoch: int) -> None:
        step = epoch * self.loader.windows_per_epoch
        values = {"epoch": epoch, "top1": hits[0], "top5": hits[1]}
        self.log.record(values, step, f"epoch {epoch}: {hits[0]:.2f} % (top-5 {hits[1]:.2f} %)")

    def contents(self) -> dict:
        return {
            "state_dict": self.training.model.state_dict(),
            "optimizer": self.training.optimizer.state_dict(),
            "loss_scaler": self.training.scaler.state_dict(),
            "backbone": self.training.model.backbone.describe(),
        }


if __name__ == "__main__":
    run_worker(main, description=__doc__, config_name="finetune")
