"""From the config to networks, optimiser and schedules, to the images of a split and to loaders.

cfg: a composed config, or anything with its keys as attributes.
"""

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from data.base import DataError, ImageDataset
from data.datasets import DECODING, build_dataset
from data.loader import Augmentation, EvalLoader, TrainLoader
from data.transforms import scale_and_shift
from launch.results import training_batch_size
from models.lmim import LatentMIM
from models.losses import METRICS, Objective, SIGReg
from models.views import Geometry
from util.distributed import Ranks, all_reduce, default_workers, on_main, synchronised
from util.metrics import DeviceMeters
from util.optim import Schedule, build_adamw, peak_learning_rate

OF_THE_SAME_NAME = (  # keys and arguments of LatentMIM
    "grid_size patch_size patch_gap freeze_pe recompute "
    "decoder_embed_dim decoder_depth decoder_num_heads avg_vis_mask_token "
    "target_depth mask_target target_norm target_post_norm target_tap"
)
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}


def read_geometry(cfg) -> Geometry:
    return Geometry(cfg.grid_size, cfg.patch_size, cfg.patch_gap, cfg.num_vis)


def build_model(cfg) -> LatentMIM:
    model = LatentMIM(
        **{name: getattr(cfg, name) for name in OF_THE_SAME_NAME.split()},
        embed_dim=cfg.encoder.embed_dim,
        depth=cfg.encoder.depth,
        num_heads=cfg.encoder.num_heads,
        mlp_dim=cfg.proj.mlp_dim,
        mlp_depth=cfg.proj.mlp_depth,
        decoder=cfg.decoder.name,
        target=cfg.target.name,
        target_layers=target_layers(cfg),
    )
    mean, std, device = cfg.dataset.mean, cfg.dataset.std, torch.get_default_device()
    colours = scale_and_shift(tuple(mean), tuple(std), device)
    for own, values in zip((model.scale, model.shift), colours, strict=True):
        own.copy_(values.flatten().repeat(cfg.patch_size**2))  # channel fastest
    return model


def target_layers(cfg) -> list[int] | None:
    """Counted from 0; top:K are the last K of the target encoder."""
    if isinstance(cfg.target_layers, str):
        depth = cfg.target_depth or cfg.encoder.depth
        return list(range(depth))[-int(cfg.target_layers.removeprefix("top:")) :]
    return None if cfg.target_layers is None else list(cfg.target_layers)


def build_sigreg(cfg, ranks: Ranks) -> SIGReg | None:
    if cfg.sigreg == 0:
        return None
    return SIGReg(
        weight=cfg.sigreg,
        slices=cfg.sigreg_slices,
        on=cfg.sigreg_on,
        dim=cfg.encoder.embed_dim,
        seed=cfg.seed,
        processes=ranks.world_size,
        all_reduce=all_reduce,
        device=ranks.device,
    )


class Training:
    """Everything that one step touches."""

    def __init__(self, cfg, model: LatentMIM, ranks: Ranks, precision: str, batch_size: int):
        """batch_size: the loader's, which shrink_batch may have made smaller."""
        self.model, self.network = model, synchronised(model, ranks)
        self.device, self.precision = ranks.device, precision
        self.accum_iter: int = cfg.accum_iter
        self.clip_grad: float | None = cfg.clip_grad
        self.optimizer = build_adamw(model, cfg.weight_decay)
        is_fp16 = precision == "fp16"
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=is_fp16)
        options = {field.name: getattr(cfg, field.name) for field in fields(Objective)}
        self.objective: Any = Objective(**options | {"loss": cfg.loss.name})
        peak = peak_learning_rate(cfg.blr, batch_size, cfg.accum_iter, ranks.world_size)
        self.schedule = Schedule(cfg, peak)
        self.sigreg = build_sigreg(cfg, ranks)
        self.target_is_ahead = False  # from when it moves to the end of the step
        self.half_done = False  # while networks and optimiser are between two steps
        # On the device: compiled code takes it as it comes.
        self.similarity_goal = torch.zeros((), device=self.device)
        names = METRICS if self.sigreg is None else (*METRICS, "sigreg")
        self.meters = DeviceMeters(self.device, names)

    def compile(self) -> None:
        """The networks in parts, and the loss. All shapes of training are fixed."""
        # It would split graphs where gradients are sent; blocks are small enough already.
        torch._dynamo.config.optimize_ddp = False
        for owner, name in self.model.compiled_methods():
            setattr(owner, name, torch.compile(getattr(owner, name), dynamic=False))
        self.objective = torch.compile(self.objective, dynamic=False)

    def autocast(self) -> torch.autocast:
        dtype = AUTOCAST[self.precision]
        return torch.autocast(self.device.type, dtype, enabled=dtype is not None)


def open_split(cfg: DictConfig, split: str, ranks: Ranks | None = None) -> ImageDataset:
    """train or eval; an empty one is an error. ranks: who open it together; files are listed by one
    of them."""

    def open_it() -> ImageDataset:
        options = OmegaConf.to_container(cfg.dataset.options)
        dataset = build_dataset(cfg.dataset.name, split, cfg.data_path, options)
        if len(dataset) == 0:
            raise DataError(f"dataset={cfg.dataset.name}: its {split} split holds no image")
        return dataset

    return on_main(open_it, ranks) if ranks and cfg.dataset.name in DECODING else open_it()


def train_loader(
    cfg: DictConfig, ranks: Ranks, dataset: ImageDataset, transform: Augmentation
) -> TrainLoader:
    return TrainLoader(
        dataset,
        transform,
        batch_size=training_batch_size(cfg, len(dataset), ranks.world_size),
        accum_iter=cfg.accum_iter,
        seed=cfg.seed,
        max_bad_images=cfg.max_bad_images,
        **for_both(cfg, ranks),
    )


def eval_loader(
    cfg: DictConfig,
    ranks: Ranks,
    dataset: ImageDataset,
    transform: Callable[..., Tensor],
    indices: Sequence[int] | None = None,
    max_bad_images: float = 1,
) -> EvalLoader:
    return EvalLoader(
        dataset,
        transform,
        batch_size=cfg.batch_size,
        indices=indices,
        max_bad_images=max_bad_images,
        **for_both(cfg, ranks),
    )


def for_both(cfg: DictConfig, ranks: Ranks) -> dict:
    return {
        "rank": ranks.rank,
        "world_size": ranks.world_size,
        "num_workers": default_workers() if cfg.num_workers is None else cfg.num_workers,
        "device": ranks.device,
        "data_timeout": cfg.data_timeout,
    }
