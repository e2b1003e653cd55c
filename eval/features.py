"""Features of whole images, from any subset of processes, in the order of the dataset: for
evaluations, and as files.

python launcher.py --config-name=features pretrained=checkpoints/lmim-vit_base images=photos
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from numpy.lib.format import write_array_header_1_0
from omegaconf import OmegaConf
from torch import Tensor

from data.base import ImageDataset
from data.files import given_images
from data.loader import EvalBatch
from eval.backbone import BackboneError, Tokens
from eval.common import EvalRun, LabelledImages, worker
from launch.command import run_worker
from launch.job import describe_environment
from launch.lock import lock
from util.build import open_split
from util.distributed import Ranks, barrier, broadcast_object, on_main, sum_rows
from util.files import read_json, remove_unfinished, write_json, write_whole

Vectors = Callable[[Tensor], Tensor]  # uint8 images [B, 3, H, W] on the device -> [B, width]


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
    run: EvalRun, dataset: ImageDataset, split: str, pooling: str, only_labelled: bool = False
) -> Features:
    """Pooled features of all images of a split that can be read, on every process.

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
    labels, is_read = labels_of(dataset), ~features[:, 0].isnan()
    if not is_read.all():
        run.leave_out(dataset, (~is_read).nonzero().flatten().tolist())  # if it is from the cache
    kept = is_read & (labels >= 0) if only_labelled else is_read
    if not kept.all():  # otherwise a file of the cache stays on the disk
        features, labels = features[kept], labels[kept]
    return Features(features, labels)


def extract_labelled(
    run: EvalRun, images: dict[str, LabelledImages], pooling: str
) -> dict[str, Features]:
    """Of those images of each split that have a label."""
    return {
        split: extract(run, labelled.dataset, split, pooling, only_labelled=True)
        for split, labelled in images.items()
    }


def labels_of(dataset: ImageDataset) -> Tensor:
    """int64 [N]; -1 where an image has none."""
    if dataset.labels is None:
        return torch.full((len(dataset),), -1)
    return torch.from_numpy(np.asarray(dataset.labels, dtype=np.int64))


@torch.inference_mode()
def compute(run: EvalRun, dataset: ImageDataset, pooling: str) -> Tensor:
    """-> float32 [N, D], not normalised; NaN are the rows of images that could not be read"""
    width = pooled_width(run.backbone.embed_dim, pooling)
    batches = run.batches(run.loader(dataset), "batches encoded:")
    features, is_read = encode(
        batches, lambda images: pool(run.tokens(images), pooling), (len(dataset), width), run.ranks
    )
    check_finite(features, f"precision={run.precision}")
    features[~is_read] = torch.nan
    return features


def check_finite(features: Tensor, settings: str) -> None:
    if not features.isfinite().all():
        raise BackboneError(f"{settings}: the backbone's features are not finite")


@torch.inference_mode()
def encode(
    batches: Iterable[EvalBatch], vectors: Vectors, shape: tuple[int, int], ranks: Ranks
) -> tuple[Tensor, Tensor]:
    """Each process encodes its part; then all have all. -> float32 [N, width], on the CPU, and
    which of the images could be read, bool [N]; the rows of the others are zero"""
    features = torch.zeros(shape)
    is_read = torch.zeros(len(features), dtype=torch.uint8)
    for batch in batches:
        indices = batch.indices.cpu()
        features[indices], is_read[indices] = vectors(batch.images).float().cpu(), 1
    for rows in (features, is_read):
        sum_rows(rows, ranks)
    return features, is_read.bool()


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


def save(run: EvalRun) -> None:
    """meta.json comes last: where it is, the other files are whole and belong to it."""
    cfg, results, side = run.cfg, run.job / "results", run.backbone.image_side
    if cfg.images is not None:
        dataset = given_images(cfg.images, cfg.dataset.options.get("max_value"))
    else:
        dataset = open_split(cfg, cfg.split, run.ranks)

    def chosen(tokens: Tokens) -> Tensor:
        return tokens.patches if cfg.tokens else pool(tokens, cfg.pooling)

    with torch.inference_mode():  # one image says which shape there will be
        blank = torch.zeros(1, 3, side, side, dtype=torch.uint8, device=run.ranks.device)
        tokens = run.tokens(blank)
        shape = (len(dataset), *chosen(tokens).shape[1:])
    on_main(lambda: claim(run.job), run.ranks)
    path, kept = save_rows(run, dataset, lambda images: chosen(run.tokens(images)), shape)
    if not run.ranks.is_main:
        return
    shape = (len(kept), *shape[1:])
    names = (dataset.describe(index).splitlines() for index in kept)
    lines = (os.fsencode("\\n".join(name)) + b"\n" for name in names)
    write_whole(results / "paths.txt", lambda file: file.writelines(lines))
    labels = labels_of(dataset)[kept].numpy()
    write_whole(results / "labels.npy", lambda file: np.save(file, labels))
    meta = {
        "shape": shape,
        "left_out": sorted(run.bad_images[dataset]),  # images that could not be read
        "grid": tokens.grid,  # of the patch tokens: rows, columns
        "backbone": run.backbone.describe(),
        "precision": run.precision,
        "mean": run.colours[0],
        "std": run.colours[1],
        "classes": dataset.classes,
        "config": OmegaConf.to_container(cfg),
        **describe_environment(),
    }
    write_json(results / "meta.json", meta)
    run.say(f"features: {path}, {cfg.dtype} {list(shape)}{run.left_out_in_words()}")


def claim(job: Path) -> None:
    """What an earlier start has left is replaced."""
    (job / "logs").mkdir(exist_ok=True)
    lock(job)
    remove_unfinished(job / "results")
    meta = job / "results" / "meta.json"
    if earlier := read_json(meta).get("backbone"):
        name = f"{earlier['family']} {earlier['name']}"
        print(f"features: replacing those of {name} (sha256 {earlier['sha256'][:8]})", flush=True)
    meta.unlink(missing_ok=True)


@torch.inference_mode()
def save_rows(
    run: EvalRun, dataset: ImageDataset, vectors: Vectors, shape: tuple
) -> tuple[Path, list[int]]:
    """Each process writes its rows into one .npy, as they come. Not through a mapping: its pages
    would count as memory, a full disk would be a bus error, and of a page that two machines share
    one would lose its rows. -> the file, and the images whose rows it has"""
    dtype, path = np.dtype(run.cfg.dtype), run.job / "results" / "features.npy"
    size, kept = dtype.itemsize * math.prod(shape[1:]), list(range(len(dataset)))  # bytes of a row
    header = {"descr": dtype.str, "fortran_order": False, "shape": shape}

    def write(file: BinaryIO | None = None) -> None:
        if file is not None:  # a header, which is as long for fewer rows
            write_array_header_1_0(file, header)
            file.flush()
        name, start = broadcast_object(file and (file.name, file.tell()), run.ranks)
        with open(name, "r+b") as rows:
            for batch in run.batches(run.loader(dataset), "batches encoded:"):
                values = vectors(batch.images).float().cpu().to(getattr(torch, dtype.name))
                check_finite(values, f"dtype={dtype}, precision={run.precision}")
                for index, row in zip(batch.indices.tolist(), values.numpy(), strict=True):
                    rows.seek(start + index * size)
                    rows.write(np.ascontiguousarray(row).data)
        barrier()
        if file is None:
            return
        if left_out := run.bad_images[dataset]:  # the rows behind them move up
            stored = np.memmap(name, np.uint8, "r+", start, (len(kept), size))
            kept[:] = [index for index in kept if dataset.describe(index) not in left_out]
            for place, index in enumerate(kept):
                stored[place] = stored[index]
            stored.flush()
            file.truncate(start + len(kept) * size)
            file.seek(0)
            write_array_header_1_0(file, header | {"shape": (len(kept), *shape[1:])})

    if run.ranks.is_main:
        write_whole(path, write)
    else:
        write()
    return path, kept


main = worker(save)

if __name__ == "__main__":
    run_worker(main, description=__doc__, config_name="features")
