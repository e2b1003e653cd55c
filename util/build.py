"""From the config to networks, optimiser and schedules, for pre-training and its measurements.

cfg: a composed config, or anything with its keys as attributes.
"""

import torch

from models.lmim import LatentMIM
from models.losses import Objective
from models.views import Geometry
from util.distributed import Ranks, synchronised
from util.optim import build_adamw
from util.schedules import Schedule, peak_learning_rate


def read_geometry(cfg) -> Geometry:
    return Geometry(cfg.grid_size, cfg.patch_size, cfg.patch_gap, cfg.num_vis)


def build_model(cfg) -> LatentMIM:
    geometry = read_geometry(cfg)
    return LatentMIM(
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
        recompute=cfg.recompute,
    )


def training_parts(cfg, model: LatentMIM, ranks: Ranks, precision: str) -> dict:
    """The arguments of engine_pretrain.Training."""
    schedule = Schedule(
        peak_lr=peak_learning_rate(cfg.blr, cfg.batch_size, cfg.accum_iter, ranks.world_size),
        min_lr_frac=cfg.min_lr_frac,
        warmup_epochs=cfg.warmup_epochs,
        epochs=cfg.epochs,
        target_mom=cfg.target_mom,
        sim_init=cfg.sim_init,
        sim_end=cfg.sim_end,
    )
    return {
        "network": synchronised(model, ranks),
        "model": model,
        "optimizer": build_adamw(model, cfg.weight_decay),
        "scaler": torch.amp.GradScaler(ranks.device.type, enabled=precision == "fp16"),
        "objective": Objective(cfg.loss.name, cfg.tau, cfg.avg_sim_coeff),
        "schedule": schedule,
        "device": ranks.device,
        "accum_iter": cfg.accum_iter,
        "precision": precision,
        "clip_grad": cfg.clip_grad,
    }
