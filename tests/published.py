"""Networks and objective of the published recipe, in everything that a test does not set itself."""

from dataclasses import fields
from functools import cache

from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from launch.config import compose_config
from models.lmim import LatentMIM
from models.losses import Objective
from util.build import Training, build_model
from util.distributed import Ranks

PLACES = {
    "embed_dim": "encoder.embed_dim",
    "depth": "encoder.depth",
    "num_heads": "encoder.num_heads",
    "mlp_dim": "proj.mlp_dim",
    "mlp_depth": "proj.mlp_depth",
    "decoder": "decoder.name",
    "target": "target.name",
}


@cache
def recipe() -> DictConfig:
    return compose_config("lmim", [])


def published_model(**changes) -> LatentMIM:
    """changes: arguments of LatentMIM."""
    cfg = recipe().copy()
    for name, value in changes.items():
        OmegaConf.update(cfg, PLACES.get(name, name), value)
    return build_model(cfg)


def published_objective(**changes) -> Objective:
    cfg = recipe()
    names = (field.name for field in fields(Objective) if field.name != "loss")
    values = {"loss": cfg.loss.name} | {name: cfg[name] for name in names}
    return Objective(**values | changes)


def published_training(
    model: LatentMIM, precision: str = "fp32", accum_iter: int = 1, **changes
) -> Training:
    """With a learning rate of 1e-3, on the model's device. changes: keys of the config."""
    own = {"blr": 1e-3, "batch_size": 256 // accum_iter, "accum_iter": accum_iter, **changes}
    ranks = Ranks(0, 1, next(model.parameters()).device)
    cfg = OmegaConf.merge(recipe(), own)
    return Training(cfg, model, ranks, precision, cfg.batch_size)


def prediction_loss(
    name: str, predictions: Tensor, targets: Tensor, tau: float, **changes
) -> Tensor:
    """changes: fields of Objective."""
    objective = published_objective(loss=name, tau=tau, **changes)
    return objective.prediction_loss(predictions, targets)
