"""Features of whole images, from any subset of processes, in the order of the dataset."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import Tensor

from data.base import ImageDataset
from data.loader import EvalLoader
from eval.backbone import Tokens
from eval.common import EvalRun, LabelledImages
from eval.families import BackboneError
from util.distributed import Ranks, barrier, broadcast_object, share_rows
from util.files import write_whole

ROWS = 65536  # features that are copied or normalised at a time: bounds the memory


class Features(NamedTuple):
    features: Tensor  # float32 [N, D], on the CPU, in the order of the data set
    labels: Tensor  # int64 [N]; -1 where an image has none


def pool(tokens: Tokens, pooling: str) -> Tensor:
    """-> [B, D], or [B, 2 D] for cls+mean"""
    if pooling != "mean" and tokens.cls is None:
        raise BackboneError(f"pooling={pooling}: this backbone has no class token; expected mean")
    parts = {"cls": (tokens.cls,), "mean": (None,), "cls+mean": (tokens.cls, None)}[pooling]
    return torch.cat([tokens.patches.mean(dim=1) if p is None else p for p in parts], dim=1)


def pooled_width(width: int, pooling: str) -> int:
    return 2 * width if pooling == "cls+mean" else width


def extract(
    run: EvalRun, dataset: ImageDataset, split: str, pooling: str, normalised: bool = True
) -> Features:
    """Pooled features of all images of a split, on every process. normalised: to length 1.

    With cache_dir features are computed once, and read from there by all evaluations and processes.
    """
    if run.cfg.cache_dir is None:
        features = compute(run, dataset, pooling)
    else:
        path = cache_path(run, dataset, split, pooling)
        if not broadcast_object(path.exists(), run.ranks):
            features = compute(run, dataset, pooling)
            if run.ranks.is_main:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_whole(path, lambda file: np.save(file, features.numpy()))
            barrier()
        features = torch.from_numpy(np.load(path, mmap_mode="c"))
    return Features(unit_length(features) if normalised else features, labels_of(dataset))


def extract_labelled(
    run: EvalRun, images: dict[str, LabelledImages], pooling: str, normalised: bool = True
) -> dict[str, Features]:
    """Of those images of each split that have a label."""
    found = {}
    for split, labelled in images.items():
        everything = extract(run, labelled.dataset, split, pooling, normalised)
        kept = everything.labels >= 0
        found[split] = everything if kept.all() else Features(*(part[kept] for part in everything))
    return found


def labels_of(dataset: ImageDataset) -> Tensor:
    """int64 [N]; -1 where an image has none."""
    if dataset.labels is None:
        return torch.full((len(dataset),), -1)
    return torch.from_numpy(np.asarray(dataset.labels, dtype=np.int64))


def unit_length(features: Tensor) -> Tensor:
    """A normalised copy, part by part: a file that is mapped is never in memory as a whole."""
    result = torch.empty(features.shape)
    for part, normalised in zip(features.split(ROWS), result.split(ROWS), strict=True):
        F.normalize(part, dim=-1, out=normalised)
    return result


def compute(run: EvalRun, dataset: ImageDataset, pooling: str) -> Tensor:
    """-> float32 [N, D], not normalised"""
    width = pooled_width(run.backbone.embed_dim, pooling)
    features = encode(
        run.loader(dataset), lambda images: pool(run.tokens(images), pooling), width, run.ranks, run
    )
    if not features.isfinite().all():
        raise BackboneError(f"precision={run.precision}: the backbone's features are not finite")
    return features


@torch.inference_mode()
def encode(
    loader: EvalLoader,
    vectors: Callable[[Tensor], Tensor],
    width: int,
    ranks: Ranks,
    run: EvalRun | None = None,
) -> Tensor:
    """Each process encodes its part; then all have all. -> float32 [N, width], on the CPU

    vectors: uint8 images [B, 3, H, W] on the device -> [B, width]
    """
    features = torch.empty(len(loader.dataset), width)
    for batch in loader if run is None else run.tracked(loader, "batches encoded:"):
        features[batch.indices.cpu()] = vectors(batch.images).float().cpu()
    share_rows(features, loader.batch_size, ranks)
    return features


def cache_path(run: EvalRun, dataset: ImageDataset, split: str, pooling: str) -> Path:
    """Named after everything that the features depend on. The files of a data set are not read for
    this: after changing images in place, with the same number and labels, empty the cache."""
    cfg = run.cfg
    labels = labels_of(dataset).numpy().tobytes()
    key = run.backbone.describe() | {
        "pooling": pooling,
        "precision": run.precision,
        "dataset": cfg.dataset.name,
        "options": OmegaConf.to_container(cfg.dataset.options),
        "crop_ratio": cfg.dataset.crop_ratio,
        "colours": run.colours,
        "data_path": None if cfg.data_path is None else str(Path(cfg.data_path).resolve()),
        "split": split,
        "images": len(dataset),
        "labels": hashlib.sha256(labels).hexdigest(),
    }
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    return Path(cfg.cache_dir) / f"features-{name}.npy"
