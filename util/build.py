"""From the config to networks, optimiser and schedules, for pre-training and its measurements.

cfg: a composed config, or anything with its keys as attributes.
"""

import torch

from data.transforms import scale_and_shift
from models.lmim import LatentMIM
from models.losses import Objective, SIGReg
from models.views import Geometry
from util.distributed import Ranks, all_reduce, synchronised
from util.optim import build_adamw
from util.schedules import Schedule, peak_learning_rate


def read_geometry(cfg) -> Geometry:
    return Geometry(cfg.grid_size, cfg.patch_size, cfg.patch_gap, cfg.num_vis)


def build_model(cfg) -> LatentMIM:
    geometry = read_geometry(cfg)
    model = LatentMIM(
        grid_size=geometry.grid_size,
        patch_size=geometry.patch_size,
        patch_gap=geometry.patch_gap,
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
        target_layers=target_layers(cfg),
        target_norm=cfg.target_norm,
        target_post_norm=cfg.target_post_norm,
        target_tap=cfg.target_tap,
        recompute=cfg.recompute,
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


def training_parts(cfg, model: LatentMIM, ranks: Ranks, precision: str) -> dict:
    """The arguments of engine_pretrain.Training."""
    peak = peak_learning_rate(cfg.blr, cfg.batch_size, cfg.accum_iter, ranks.world_size)
    return {
        "network": synchronised(model, ranks),
        "model": model,
        "optimizer": build_adamw(model, cfg.weight_decay),
        "scaler": torch.amp.GradScaler(ranks.device.type, enabled=precision == "fp16"),
        "objective": Objective(
            loss=cfg.loss.name,
            tau=cfg.tau,
            avg_sim_coeff=cfg.avg_sim_coeff,
            pred_unit=cfg.pred_unit,
            negatives=cfg.negatives,
            same_target=cfg.same_target,
            loss_beta=cfg.loss_beta,
        ),
        "schedule": Schedule(cfg, peak),
        "device": ranks.device,
        "accum_iter": cfg.accum_iter,
        "precision": precision,
        "clip_grad": cfg.clip_grad,
        "sigreg": build_sigreg(cfg, ranks),
    }
