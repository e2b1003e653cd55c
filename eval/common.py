"""What all evaluations share: processes, data, the backbone, and what they leave behind."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from data.base import DataError, ImageDataset
from data.datasets import build_dataset
from data.loader import EvalLoader, TrainLoader
from data.picture import Picture
from data.transforms import EvalTransform, normalise
from eval.backbone import Backbone, backbone_from, find_checkpoint
from eval.networks import Colour
from util.checkpoint import CheckpointError
from util.config import job_directory
from util.distributed import (
    Ranks,
    default_workers,
    join_processes,
    leave_processes,
    on_main,
)
from util.files import write_whole
from util.job import describe_environment, prepare_job_directory
from util.lock import unlock
from util.metrics import readable_time
from util.record import TensorBoardFile

PROGRESS_SECONDS = 5
TOP = 5  # the second number of a classification


class EvalRun:
    """The console, results/NAME.json and TensorBoard. Only the first process writes."""

    def __init__(self, cfg: DictConfig, ranks: Ranks, name: str):
        self.cfg, self.ranks, self.name = cfg, ranks, name
        self.start = self.last_progress = time.monotonic()
        self.backbone: Backbone | None = None
        if "resume" in cfg:
            self.job = on_main(lambda: prepare_job_directory(cfg), ranks)
            return
        self.job = job_directory(cfg)
        if ranks.is_main:
            for folder in ("results", "tensorboard"):
                (self.job / folder).mkdir(parents=True, exist_ok=True)
            OmegaConf.save(cfg, self.job / "config.yaml")
            write_json(self.job / "environment.json", describe_environment())

    def say(self, text: str) -> None:
        if self.ranks.is_main:
            print(text, flush=True)

    def progress(self, done: int, total: int, what: str = "") -> None:
        """A line every few seconds of long work."""
        now = time.monotonic()
        if now - self.last_progress > PROGRESS_SECONDS and done < total:
            self.last_progress = now
            elapsed = readable_time(now - self.start)
            self.say(f"  {self.name}: {what + ' ' if what else ''}{done}/{total}  {elapsed}")

    def finish(
        self,
        results: dict[str, float],
        *,
        protocol: str,
        images: int,
        extra: dict | None = None,
    ) -> None:
        """One line, results/NAME.json and a TensorBoard scalar per number."""
        if not self.ranks.is_main:
            return
        seconds = time.monotonic() - self.start
        numbers = "  ".join(f"{metric} {value:.4g}" for metric, value in results.items())
        self.say(f"{self.name}: {numbers}  ({protocol}; {images} images, {seconds:.1f} s)")
        environment = describe_environment()
        contents = {
            "evaluation": self.name,
            "results": results,
            "protocol": protocol,
            "backbone": self.backbone.describe() if self.backbone is not None else None,
            "pretrained": self.cfg.pretrained,
            "random_init": self.cfg.random_init,
            "dataset": self.cfg.dataset.name,
            "images": images,
            "seed": self.cfg.seed,
            "processes": self.ranks.world_size,
            "device": str(self.ranks.device),
            "seconds": round(seconds, 2),
            "versions": environment["packages"] | {"python": environment["python"]},
            "git_commit": environment["git_commit"],
            **(extra or {}),
        }
        write_json(self.job / "results" / f"{self.name}.json", contents)
        self.write_scalars(results)

    def write_scalars(self, results: dict[str, float]) -> None:
        file = TensorBoardFile(self.job / "tensorboard")
        file.add({f"{self.name}/{metric}": value for metric, value in results.items()}, 0)
        file.close()


def write_json(path: Path, contents: dict) -> None:
    write_whole(path, json.dumps(contents, indent=2).encode() + b"\n")


# --- an evaluation from beginning to end --------------------------------------------------------


@contextmanager
def joined_processes() -> Iterator[Ranks]:
    """Several evaluations in one process, one after the other, join the others only once."""
    if dist.is_initialized():
        device = torch.device("cpu")
        if torch.cuda.is_available():
            device = torch.device("cuda", torch.cuda.current_device())
        yield Ranks(dist.get_rank(), dist.get_world_size(), device)
        return
    ranks = join_processes()
    yield ranks
    leave_processes()


def run_evaluation(
    cfg: DictConfig,
    name: str,
    evaluate: Callable[[DictConfig, Ranks, Backbone, EvalRun], None],
) -> None:
    """What a worker's main(cfg) does."""
    with joined_processes() as ranks:
        backbone = load_for_all(cfg, ranks).to(ranks.device)
        run = EvalRun(cfg, ranks, name)
        run.backbone = backbone
        run.say(f"{name}: {backbone.summary()}")
        try:
            evaluate(cfg, ranks, backbone, run)
        finally:
            unlock(run.job)


def load_for_all(cfg: DictConfig, ranks: Ranks) -> Backbone:
    """All processes read the same file, also while a running job writes newer ones."""
    if cfg.pretrained is not None and Path(cfg.pretrained).is_dir():
        cfg.pretrained = on_main(lambda: str(find_checkpoint(Path(cfg.pretrained))), ranks)
    return backbone_from(cfg)


# --- data ---------------------------------------------------------------------------------------


def build_eval_data(cfg: DictConfig, split: str) -> ImageDataset:
    """The data set as in pre-training; an empty one is an error."""
    options = OmegaConf.to_container(cfg.dataset.options)
    dataset = build_dataset(cfg.dataset.name, split, cfg.data_path, options)
    if len(dataset) == 0:
        raise DataError(f"dataset={cfg.dataset.name}: its {split} split holds no image")
    return dataset


def require_labels(cfg: DictConfig, dataset: ImageDataset, purpose: str) -> None:
    if dataset.labels is None:
        raise DataError(
            f"dataset={cfg.dataset.name} has no labels, and {purpose} needs them; expected a "
            f"labelled one, such as imagefolder"
        )


def eval_batches(
    cfg: DictConfig,
    ranks: Ranks,
    dataset: ImageDataset,
    side: int,
    indices: list[int] | None = None,
    transform: Callable | None = None,
) -> EvalLoader:
    """This process's part of all images, or of those with these indices: whole batches, so that a
    batch holds the same images however many processes there are, and its arithmetic is the same to
    the last bit."""
    loader = EvalLoader(
        dataset=dataset,
        transform=transform or EvalTransform(side, cfg.dataset.crop_ratio),
        batch_size=cfg.batch_size,
        rank=0,
        world_size=1,
        num_workers=default_workers() if cfg.num_workers is None else cfg.num_workers,
        device=ranks.device,
    )
    if indices is not None:
        starts = range(0, len(indices), cfg.batch_size)
        loader.batches = [indices[start : start + cfg.batch_size] for start in starts]
    first, last = share_of(len(loader.batches), ranks)
    loader.batches = loader.batches[first:last]
    return loader


def share_of(count: int, ranks: Ranks) -> tuple[int, int]:
    """first, last (outside) of this process's contiguous part of so many pieces of work."""
    return count * ranks.rank // ranks.world_size, count * (ranks.rank + 1) // ranks.world_size


def colours(cfg: DictConfig, backbone: Backbone) -> tuple[Colour, Colour]:
    """The mean and deviation that the backbone was trained with; the data set's where it does not
    say."""
    if backbone.mean is None:
        return tuple(cfg.dataset.mean), tuple(cfg.dataset.std)
    return backbone.mean, backbone.std


def normalised(cfg: DictConfig, backbone: Backbone, images: Tensor) -> Tensor:
    return normalise(images, *colours(cfg, backbone))


# --- those that train -------------------------------------------------------------------------


class LabelledImages(ImageDataset):
    """Those images of a data set that have a label."""

    def __init__(self, dataset: ImageDataset):
        labels = np.asarray(dataset.labels, dtype=np.int64)
        self.dataset, self.classes = dataset, dataset.classes
        self.positions = np.flatnonzero(labels >= 0)
        self.labels = labels[self.positions]

    def __len__(self) -> int:
        return len(self.positions)

    def load(self, index: int) -> Picture:
        return self.dataset.load(int(self.positions[index]))

    def describe(self, index: int) -> str:
        return self.dataset.describe(int(self.positions[index]))


def labelled_images(cfg: DictConfig, split: str, purpose: str) -> LabelledImages:
    dataset = build_eval_data(cfg, split)
    require_labels(cfg, dataset, purpose)
    labelled = LabelledImages(dataset)
    if len(labelled) == 0:
        raise DataError(
            f"dataset={cfg.dataset.name}: no image of its {split} split has a label, and {purpose} "
            f"needs them"
        )
    return labelled


def count_classes(train: Tensor | np.ndarray, evaluation: Tensor | np.ndarray) -> int:
    """From the labels of both splits. One that is never trained could not be told."""
    train, evaluation = set(train.tolist()), set(evaluation.tolist())
    if unknown := sorted(evaluation - train):
        raise DataError(
            f"{len(unknown)} classes of the evaluation images have no training image, the first is "
            f"number {unknown[0]}"
        )
    return max(train) + 1


def train_loader(cfg: DictConfig, ranks: Ranks, dataset: ImageDataset, transform) -> TrainLoader:
    return TrainLoader(
        dataset=dataset,
        transform=transform,
        seed=cfg.seed,
        batch_size=cfg.batch_size,
        accum_iter=cfg.accum_iter,
        rank=ranks.rank,
        world_size=ranks.world_size,
        num_workers=default_workers() if cfg.num_workers is None else cfg.num_workers,
        device=ranks.device,
        max_bad_images=cfg.max_bad_images,
    )


def count_hits(logits: Tensor, labels: Tensor) -> Tensor:
    """How many labels are the first, and among the first five. -> int64 [2]

    Logits that are not finite name no class.
    """
    finite = logits.isfinite().all(dim=1)
    first = logits.topk(min(TOP, logits.shape[1]), dim=1).indices == labels[:, None]
    hits = torch.stack([first[:, 0], first.any(dim=1)]) & finite
    return hits.sum(dim=1)


def check_same_backbone(resumed: dict, backbone: Backbone) -> None:
    """The file, the part of it, the layer, the size: all that its tokens depend on."""
    before, now = resumed["backbone"], backbone.describe()
    different = [key for key, value in now.items() if before.get(key) != value]
    if different:
        changes = ", ".join(f"{key} {before.get(key)} is now {now[key]}" for key in different)
        raise CheckpointError(
            f"the checkpoint to resume belongs to another backbone ({changes}): choose the same "
            f"one, overwrite=True to replace it, or another job_name"
        )
