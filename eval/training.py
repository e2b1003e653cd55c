"""What the evaluations that train share: labelled data, batches, and the count of hits."""

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor

from data.base import DataError, ImageDataset
from data.loader import TrainLoader
from data.picture import Picture
from eval.networks import Backbone
from eval.run import build_eval_data, require_labels
from util.checkpoint import CheckpointError
from util.distributed import Ranks, default_workers

TOP = 5  # the second number of a classification


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
            f"one, overwrite=True to start anew, or another job_name"
        )
