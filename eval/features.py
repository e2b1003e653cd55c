"""Features of whole images, from any subset of processes, in the order of the dataset."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from data.base import ImageDataset
from eval.common import EvalRun, build_eval_data, colours, eval_batches, normalised
from eval.networks import Backbone, Tokens
from eval.weights import BackboneError
from models.views import extract_patches
from models.vit import Encoder
from util.distributed import Ranks, barrier, broadcast_object
from util.files import write_whole
from util.precision import choose_precision

ROWS = 65536  # features that are copied, sent or normalised at a time: bounds the memory
POOLINGS = ("cls", "mean", "cls+mean")


class Features(NamedTuple):
    features: Tensor  # float32 [N, D], on the CPU, in the order of the data set
    labels: Tensor  # int64 [N]; -1 where an image has none

    def labelled(self) -> "Features":
        """Without the images that have no label."""
        kept = self.labels >= 0
        return self if bool(kept.all()) else Features(self.features[kept], self.labels[kept])


def pool(tokens: Tokens, pooling: str) -> Tensor:
    """-> [B, D], or [B, 2 D] for cls+mean"""
    if pooling not in POOLINGS:
        raise BackboneError(f"pooling={pooling}: expected one of {', '.join(POOLINGS)}")
    if pooling != "mean" and tokens.cls is None:
        raise BackboneError(f"pooling={pooling}: this backbone has no class token; expected mean")
    parts = {"cls": [tokens.cls], "mean": [None], "cls+mean": [tokens.cls, None]}[pooling]
    return torch.cat([tokens.patches.mean(dim=1) if p is None else p for p in parts], dim=1)


def extract(
    cfg: DictConfig,
    ranks: Ranks,
    backbone: Backbone,
    split: str,
    pooling: str,
    normalised: bool = True,
    run: EvalRun | None = None,
    dataset: ImageDataset | None = None,
) -> Features:
    """Pooled features of all images of a split, on every process. normalised: to length 1.

    dataset: the split, where the caller has it already. With cache_dir features are computed once,
    and read from there by all evaluations and processes.
    """
    dataset = build_eval_data(cfg, split) if dataset is None else dataset
    labels = torch.full((len(dataset),), -1)
    if dataset.labels is not None:
        labels = torch.from_numpy(np.asarray(dataset.labels, dtype=np.int64))
    path = cache_path(cfg, ranks, backbone, dataset, split, pooling)
    if path is None:
        features = compute(cfg, ranks, backbone, dataset, pooling, run)
    else:
        if not broadcast_object(path.exists(), ranks):
            features = compute(cfg, ranks, backbone, dataset, pooling, run)
            if ranks.is_main:
                save_features(path, features)
            del features
            barrier()
        features = torch.from_numpy(np.load(path, mmap_mode="c"))
    if normalised:
        features = unit_length(features)
    return Features(features, labels)


def unit_length(features: Tensor) -> Tensor:
    """A normalised copy, part by part: a file that is mapped is never in memory as a whole."""
    result = torch.empty(features.shape)
    for start in range(0, len(features), ROWS):
        F.normalize(features[start : start + ROWS], dim=-1, out=result[start : start + ROWS])
    return result


@torch.inference_mode()
def compute(
    cfg: DictConfig,
    ranks: Ranks,
    backbone: Backbone,
    dataset: ImageDataset,
    pooling: str,
    run: EvalRun | None,
) -> Tensor:
    """Each process encodes its part; then all have all. -> float32 [N, D], not normalised"""
    backbone.eval()
    precision = choose_precision(cfg.precision, ranks.device)
    loader = eval_batches(cfg, ranks, dataset, backbone.image_side)
    first = loader.batches[0].start if loader.batches else 0
    width = backbone.embed_dim * (2 if pooling == "cls+mean" else 1)
    features = torch.empty(len(dataset), width)
    done = first
    for batch in loader:
        with autocast(ranks.device, precision):
            pooled = pool(backbone(normalised(cfg, backbone, batch.images)), pooling)
        features[done : done + len(pooled)] = pooled.float().cpu()
        done += len(pooled)
        if run is not None:
            run.progress(done - first, len(dataset) // ranks.world_size, "images encoded:")
    share_rows(features, (first, done), ranks)
    if not features.isfinite().all():
        raise BackboneError(
            f"{backbone.family}:{backbone.name} gives features that are not finite, of images of "
            f"{cfg.dataset.name} in precision={precision}"
        )
    return features


def autocast(device: torch.device, precision: str):
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    return torch.autocast(device.type, dtype=dtype, enabled=precision != "fp32")


def share_rows(rows: Tensor, mine: tuple[int, int], ranks: Ranks) -> None:
    """In place: each process has filled the rows mine[0] .. mine[1] - 1; then all have all rows."""
    if ranks.world_size == 1:
        return
    bounds = [
        torch.zeros(2, dtype=torch.int64, device=ranks.device) for _ in range(ranks.world_size)
    ]
    dist.all_gather(bounds, torch.tensor(mine, device=ranks.device))
    for source, (first, last) in enumerate(torch.stack(bounds).tolist()):
        for start in range(first, last, ROWS):
            part = rows[start : min(start + ROWS, last)]
            buffer = part.to(ranks.device)
            dist.broadcast(buffer, source)
            part.copy_(buffer)


# --- the cache ----------------------------------------------------------------------------------


def cache_path(
    cfg: DictConfig,
    ranks: Ranks,
    backbone: Backbone,
    dataset: ImageDataset,
    split: str,
    pooling: str,
) -> Path | None:
    """Named after everything that the features depend on. The files of a data set are not read for
    this: whoever changes images in place, keeping their number and labels, empties the cache."""
    if cfg.cache_dir is None:
        return None
    labels = b"" if dataset.labels is None else np.asarray(dataset.labels, np.int64).tobytes()
    key = {
        "backbone": backbone.fingerprint,
        "which": backbone.name,
        "layer": backbone.layer,
        "final_norm": backbone.final_norm,
        "side": backbone.image_side,
        "pooling": pooling,
        "precision": choose_precision(cfg.precision, ranks.device),
        "dataset": cfg.dataset.name,
        "options": OmegaConf.to_container(cfg.dataset.options),
        "crop_ratio": cfg.dataset.crop_ratio,
        "colours": colours(cfg, backbone),
        "data_path": None if cfg.data_path is None else str(Path(cfg.data_path).resolve()),
        "split": split,
        "images": len(dataset),
        "labels": hashlib.sha256(labels).hexdigest(),
    }
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    return Path(cfg.cache_dir) / f"features-{name}.npy"


def save_features(path: Path, features: Tensor) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda file: np.save(file, features.numpy()))


# --- while pre-training -------------------------------------------------------------------------


def patch_tokens(encoder: Encoder, images: Tensor) -> Tensor:
    """All patches, no gap, before the final norm, without the class token. -> [N, L, D]"""
    patches = extract_patches(images, encoder.patch_size)
    ids = torch.arange(patches.shape[1], device=images.device).expand(len(patches), -1)
    return encoder.forward_features(patches, ids)[:, 1:]


@torch.inference_mode()
def pooled_features(encoder: Encoder, batches, normalise: Callable[[Tensor], Tensor]):
    """Mean of the patch tokens, L2-normalised, for the images of this process.

    batches yields (images uint8, labels, indices) -> features [n, D] and labels [n].
    """
    was_training = encoder.training
    encoder.eval()
    features, labels = [], []
    for batch in batches:
        tokens = patch_tokens(encoder, normalise(batch.images))
        features.append(F.normalize(tokens.mean(dim=1).float(), dim=-1))
        labels.append(batch.labels)
    encoder.train(was_training)
    return torch.cat(features), torch.cat(labels)
