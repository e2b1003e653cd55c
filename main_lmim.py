"""Latent MIM pre-training: one process of it. Run by launcher.py, or by hand:

torchrun --nproc_per_node=2 main_lmim.py --config-name=demo
"""

from collections.abc import Callable, Iterator

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from data.datasets import build_dataset
from data.loader import EvalLoader, TrainLoader
from data.transforms import EvalTransform, TrainTransform, normalise
from engine_pretrain import Training, train_epoch
from eval.nn import leave_one_out_accuracy
from models.lmim import LatentMIM
from models.losses import Objective
from models.views import Views, sample_views
from util import checkpoint
from util.command import run_worker
from util.distributed import (
    Ranks,
    default_workers,
    join_processes,
    leave_processes,
    on_main,
    synchronised,
)
from util.job import job_directory, prepare_job_directory
from util.lock import unlock
from util.optim import build_adamw
from util.precision import choose_precision
from util.preemption import StopFlag, stoppable
from util.record import check_same_steps, find_checkpoint
from util.run_record import RunRecord
from util.schedules import Schedule, peak_learning_rate
from util.streams import Stream, seed_of


def main(cfg: DictConfig) -> None:
    ranks = join_processes()
    try:
        with stoppable(ranks) as stop_flag:
            pretrain(cfg, ranks, stop_flag)
    finally:
        unlock(job_directory(cfg))
    leave_processes()


def pretrain(cfg: DictConfig, ranks: Ranks, stop_flag: StopFlag) -> None:
    # 1. Data and networks.
    precision = choose_precision(cfg.precision, ranks.device)
    loader, evaluation = build_data(cfg, ranks)
    job = on_main(lambda: prepare_job_directory(cfg), ranks)
    torch.manual_seed(cfg.seed)
    model = build_model(cfg).to(ranks.device)

    # 2. The training state: new, or the newest checkpoint's.
    resumed = find_checkpoint(cfg, job, ranks)
    if resumed is not None:
        checkpoint.load_weights(model, resumed["state_dict"], job / "checkpoints")
    training = build_training(cfg, model, precision, ranks)
    step = 0 if resumed is None else restore(training, resumed, loader)
    del resumed  # gigabytes, in each process
    if cfg.compile:
        training.compile()

    # 3. Epochs, from wherever that is to the end.
    run = RunRecord(cfg, ranks, job, training, loader, stop_flag, step)
    run.introduce()
    total_steps = cfg.epochs * loader.windows_per_epoch
    if step == total_steps:
        run.say_finished()
        return
    if cfg.eval_at_start and step == 0:
        evaluate(cfg, ranks, run, model, evaluation, epoch=0)
    if isinstance(training.network, DistributedDataParallel):
        settle_gradient_buckets(cfg, training)
    images = normalised_images(cfg, run.speed.timed(loader.stream(step, total_steps)))
    draw_views = view_source(cfg, ranks)
    for epoch in range(step // loader.windows_per_epoch, cfg.epochs):
        end = (epoch + 1) * loader.windows_per_epoch
        train_epoch(
            training,
            images,
            draw_views,
            steps=range(step, end),
            windows_per_epoch=loader.windows_per_epoch,
            after_window=run.after_window,
        )
        step, finished = end, epoch + 1
        if cfg.eval_freq and (finished % cfg.eval_freq == 0 or finished == cfg.epochs):
            evaluate(cfg, ranks, run, model, evaluation, finished)
        run.after_epoch(finished)
    run.finish()


# --- what is built ------------------------------------------------------------------------------


def build_data(cfg: DictConfig, ranks: Ranks) -> tuple[TrainLoader, EvalLoader | None]:
    """The training stream, and the evaluation images if they have labels."""
    options = OmegaConf.to_container(cfg.dataset.options)
    train_set = build_dataset(cfg.dataset.name, "train", cfg.data_path, options)
    num_workers = default_workers() if cfg.num_workers is None else cfg.num_workers
    train_side = cfg.grid_size * (cfg.patch_size + cfg.patch_gap)
    loader = TrainLoader(
        dataset=train_set,
        transform=TrainTransform(train_side, cfg.min_crop, cfg.dataset.flip, cfg.seed),
        seed=cfg.seed,
        batch_size=cfg.batch_size,
        accum_iter=cfg.accum_iter,
        rank=ranks.rank,
        world_size=ranks.world_size,
        num_workers=num_workers,
        device=ranks.device,
        max_bad_images=cfg.max_bad_images,
    )
    eval_set = build_dataset(cfg.dataset.name, "eval", cfg.data_path, options)
    if eval_set.labels is None:
        return loader, None
    eval_side = cfg.grid_size * cfg.patch_size
    evaluation = EvalLoader(
        dataset=eval_set,
        transform=EvalTransform(eval_side, cfg.dataset.crop_ratio),
        batch_size=cfg.batch_size,
        rank=ranks.rank,
        world_size=ranks.world_size,
        num_workers=num_workers,
        device=ranks.device,
    )
    return loader, evaluation


def build_model(cfg: DictConfig) -> LatentMIM:
    return LatentMIM(
        grid_size=cfg.grid_size,
        patch_size=cfg.patch_size,
        patch_gap=cfg.patch_gap,
        embed_dim=cfg.encoder.embed_dim,
        depth=cfg.encoder.depth,
        num_heads=cfg.encoder.num_heads,
        freeze_pe=cfg.freeze_pe,
        mlp_dim=cfg.proj.mlp_dim,
        mlp_depth=cfg.proj.mlp_depth,
        decoder=cfg.decoder.name,
        decoder_embed_dim=cfg.decoder_embed_dim,
        decoder_depth=cfg.decoder_depth,
        decoder_num_heads=cfg.decoder_num_heads,
        avg_vis_mask_token=cfg.avg_vis_mask_token,
        target=cfg.target.name,
        target_depth=cfg.target_depth,
        mask_target=cfg.mask_target,
        recompute=cfg.recompute,
    )


def build_training(cfg: DictConfig, model: LatentMIM, precision: str, ranks: Ranks) -> Training:
    peak_lr = peak_learning_rate(cfg.blr, cfg.batch_size, cfg.accum_iter, ranks.world_size)
    return Training(
        network=synchronised(model, ranks),
        model=model,
        optimizer=build_adamw(model, cfg.weight_decay),
        scaler=torch.amp.GradScaler(ranks.device.type, enabled=precision == "fp16"),
        objective=Objective(cfg.loss.name, cfg.tau, cfg.avg_sim_coeff),
        schedule=Schedule(
            peak_lr=peak_lr,
            min_lr_frac=cfg.min_lr_frac,
            warmup_epochs=cfg.warmup_epochs,
            epochs=cfg.epochs,
            target_mom=cfg.target_mom,
            sim_init=cfg.sim_init,
            sim_end=cfg.sim_end,
        ),
        device=ranks.device,
        accum_iter=cfg.accum_iter,
        precision=precision,
        clip_grad=cfg.clip_grad,
    )


def settle_gradient_buckets(cfg: DictConfig, training: Training) -> None:
    """DistributedDataParallel groups gradients anew after the first backward pass, which changes
    the order of summation over more than two processes. One pass on blank images settles this
    before the first step, of a new run and of a resumed one alike: both then sum in the same order.
    """
    side = cfg.grid_size * (cfg.patch_size + cfg.patch_gap)
    # A whole batch: compiled code is then compiled for the shapes of training, here and only once.
    images = torch.zeros(cfg.batch_size, 3, side, side, device=training.device)
    generator = torch.Generator(training.device).manual_seed(0)
    views = sample_views(len(images), cfg.grid_size, cfg.num_vis, cfg.patch_gap, generator)
    with training.autocast():
        latents = training.network(images, views)
    training.objective(latents, training.similarity_goal)[0].backward()
    training.optimizer.zero_grad(set_to_none=False)


def view_source(cfg: DictConfig, ranks: Ranks) -> Callable[[int, int, int], Views]:
    """Views as a function of (seed, step, place of the image in the step), drawn on the device.
    The split into processes and micro-steps changes them as little as it changes the images."""
    generator = torch.Generator(ranks.device)

    def draw_views(step: int, micro_step: int, batch_size: int) -> Views:
        generator.manual_seed(seed_of(Stream.VIEWS, cfg.seed, step))
        images = batch_size * ranks.world_size * cfg.accum_iter
        first = (micro_step * ranks.world_size + ranks.rank) * batch_size  # as data/loader.py
        own = slice(first, first + batch_size)
        return sample_views(images, cfg.grid_size, cfg.num_vis, cfg.patch_gap, generator, own)

    return draw_views


def normalised_images(cfg: DictConfig, batches: Iterator) -> Iterator[Tensor]:
    for batch in batches:
        yield normalise(batch.images, cfg.dataset.mean, cfg.dataset.std)


# --- going on from a checkpoint -----------------------------------------------------------------


def restore(training: Training, resumed: dict, loader: TrainLoader) -> int:
    """Optimiser and scaler as they were. -> the number of finished steps"""
    weight_decays = [group["weight_decay"] for group in training.optimizer.param_groups]
    training.optimizer.load_state_dict(resumed["optimizer"])
    for group, weight_decay in zip(training.optimizer.param_groups, weight_decays, strict=True):
        group["weight_decay"] = weight_decay  # the config's, as the learning rate is
    if resumed["loss_scaler"]:  # empty unless that run was in fp16
        training.scaler.load_state_dict(resumed["loss_scaler"])
    check_same_steps(resumed, loader.windows_per_epoch)
    return resumed["step"]


# --- nearest neighbours while it trains ---------------------------------------------------------


def evaluate(
    cfg: DictConfig,
    ranks: Ranks,
    run: RunRecord,
    model: LatentMIM,
    evaluation: EvalLoader | None,
    epoch: int,
) -> None:
    if evaluation is None:
        return

    def normalised(images: Tensor) -> Tensor:
        return normalise(images, cfg.dataset.mean, cfg.dataset.std)

    # Not compiled: an evaluation has other shapes, and runs too rarely to pay for its compilation.
    with run.speed.pause(), torch.compiler.set_stance("force_eager"):
        accuracy, images = leave_one_out_accuracy(model.encoder, evaluation, normalised, ranks)
    run.record_accuracy(accuracy, images, epoch)


if __name__ == "__main__":
    run_worker(main, description=__doc__)
