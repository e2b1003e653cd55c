"""What all evaluations share: processes, data, the backbone, and what they leave behind."""

import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor

from data.base import DataError, ImageDataset, LabelledImages, first_few
from data.loader import EvalLoader
from data.transforms import EvalTransform, normalise
from eval.backbone import Backbone, Colour, Tokens, load_backbone
from launch import job
from launch.config import job_directory
from launch.lock import unlock
from launch.results import CheckpointError, other_backbone, result_path
from util.build import eval_loader, open_split
from util.distributed import (
    Ranks,
    all_reduce,
    gather_objects,
    join_processes,
    leave_processes,
    on_main,
)
from util.files import write_json
from util.loop import Loop, Task, newest_for_all, sum_over_processes, train
from util.metrics import readable_time
from util.precision import choose_precision
from util.preemption import stoppable
from util.record import TensorBoardFile

PROGRESS_SECONDS = 5


class EvalRun:
    """What an evaluation works with, how it encodes images, and what it leaves behind: the console,
    a file in results/ and TensorBoard, to which only the first process writes."""

    def __init__(self, cfg: DictConfig, ranks: Ranks, backbone: Backbone):
        self.cfg, self.ranks, self.backbone = cfg, ranks, backbone
        self.name = cfg.worker.rpartition(".")[2]
        self.start = self.last_progress = time.monotonic()
        self.job = job_directory(cfg)
        self.trained_in: float | None = None  # seconds of an earlier start, which trained it all
        # Of each data set the images that could not be read, by name.
        self.bad_images: dict[ImageDataset, set[str]] = defaultdict(set)
        self.report: dict = {}  # what the first process has written to results/

    def prepare(self) -> None:
        """The folder, and what runs in it."""
        if "resume" in self.cfg:
            on_main(lambda: job.prepare_job_directory(self.cfg), self.ranks)
            return
        job.refuse_folder_of_another(self.cfg)
        if self.ranks.is_main:
            (self.job / "results").mkdir(parents=True, exist_ok=True)
            job.record_start(self.cfg, self.job)

    # --- images and tokens

    def loader(self, dataset: ImageDataset, indices: Sequence[int] | None = None) -> EvalLoader:
        """This process's part of all images, or of those with these indices."""
        cfg = self.cfg
        transform = EvalTransform(self.backbone.image_side, cfg.dataset.crop_ratio)
        loader = eval_loader(cfg, self.ranks, dataset, transform, indices, cfg.max_bad_images)
        loader.bad_images = self.bad_images[dataset]  # each is named once
        return loader

    def batches(self, loader: EvalLoader, what: str) -> Iterator:
        """Those of this process. At their end all processes know what any of them left out."""
        yield from self.tracked(loader, what)
        loader.bad_images.update(*gather_objects(loader.bad_images, self.ranks))
        loader.check_bad_images()

    def leave_out(self, dataset: ImageDataset, indices: list[int]) -> None:
        """What could not be read outside a loader, on all processes alike."""
        names = [dataset.describe(index) for index in indices]
        if not self.ranks.is_main:  # the first one names them
            self.bad_images[dataset].update(names)
        self.loader(dataset).leave_out(names)

    def count_left_out(self) -> int:
        return len(set().union(*self.bad_images.values()))

    def left_out_in_words(self) -> str:
        """Of all data sets: images that could not be read, and other files."""
        count = self.count_left_out()
        found = {dataset.others for dataset in self.bad_images if dataset.others}
        parts = [f"{count} unreadable"] * (count > 0) + sorted(found)
        return f", left out: {', '.join(parts)}" if parts else ""

    @cached_property
    def precision(self) -> str:
        return choose_precision(self.cfg.precision, self.ranks.device)

    def autocast(self) -> torch.autocast:
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision)
        return torch.autocast(self.ranks.device.type, dtype=dtype, enabled=dtype is not None)

    @property
    def colours(self) -> tuple[Colour, Colour]:
        """The mean and deviation that the backbone was trained with; the data set's where it does
        not say."""
        backbone, dataset = self.backbone, self.cfg.dataset
        return tuple(backbone.mean or dataset.mean), tuple(backbone.std or dataset.std)

    def normalised(self, images: Tensor) -> Tensor:
        return normalise(images, *self.colours)

    def tokens(self, images: Tensor) -> Tokens:
        """Of uint8 images [B, 3, H, W]."""
        with self.autocast():
            return self.backbone(self.normalised(images))

    # --- what it says

    def say(self, text: str) -> None:
        if self.ranks.is_main:
            print(text, flush=True)

    def tracked(self, pieces: Sequence | EvalLoader, what: str) -> Iterator:
        """The pieces of long work, and a line every few seconds."""
        for done, piece in enumerate(pieces):
            now = time.monotonic()
            if now - self.last_progress > PROGRESS_SECONDS:
                self.last_progress = now
                elapsed = readable_time(now - self.start)
                self.say(f"  {self.name}: {what} {done}/{len(pieces)}  {elapsed}")
            yield piece

    def result_path(self) -> Path:
        sha256, processes = self.backbone.fingerprint, self.ranks.world_size
        return result_path(self.cfg, self.name, sha256, processes)

    def finish(
        self, results: dict[str, float], *, protocol: str, images: int, extra: dict | None = None
    ) -> None:
        """One line, a file in results/ and a TensorBoard scalar per number."""
        if not self.ranks.is_main:
            return
        seconds = time.monotonic() - self.start
        numbers = "  ".join(f"{metric} {value:.4g}" for metric, value in results.items())
        seen = f"{images} images{self.left_out_in_words()}"
        self.say(f"{self.name}: {numbers}  ({protocol}; {seen}, {seconds:.1f} s)")
        environment = job.describe_environment()
        self.report = {
            "evaluation": self.name,
            "results": results,
            "protocol": protocol,
            "backbone": self.backbone.describe(),
            "pretrained": self.cfg.pretrained,
            "random_init": self.cfg.random_init,
            "dataset": self.cfg.dataset.name,
            "images": images,
            "left_out": self.count_left_out(),
            "seed": self.cfg.seed,
            "processes": self.ranks.world_size,
            "device": str(self.ranks.device),
            "seconds": round(seconds if self.trained_in is None else self.trained_in, 2),
            "versions": environment["packages"] | {"python": environment["python"]},
            "git_commit": environment["git_commit"],
            **({"made_on_resume": True} if self.trained_in is not None else {}),
            **(extra or {}),
        }
        path = self.result_path()
        write_json(path, self.report)
        board = self.job / "tensorboard" / path.stem  # of this result alone
        shutil.rmtree(board, ignore_errors=True)
        with closing(TensorBoardFile(board)) as file:
            file.add({f"{self.name}/{metric}": value for metric, value in results.items()}, 0)


def worker(evaluate: Callable[[EvalRun], None]) -> Callable[[DictConfig], None]:
    """Make the main(cfg) of a worker."""

    def main(cfg: DictConfig) -> None:
        run_joined(cfg, join_processes(), evaluate)
        leave_processes()

    return main


def run_joined(cfg: DictConfig, ranks: Ranks, evaluate: Callable[[EvalRun], None]) -> EvalRun:
    """One evaluation of processes that have joined each other; several may follow."""
    run = EvalRun(cfg, ranks, load_for_all(cfg, ranks).to(ranks.device))
    run.prepare()
    try:
        facts = ", ".join(f"{key} {value}" for key, value in run.backbone.describe().items())
        run.say(f"{run.name}: {facts}")
        evaluate(run)
    finally:
        unlock(run.job)
    return run


def load_for_all(cfg: DictConfig, ranks: Ranks) -> Backbone:
    """All processes read the same file, also while a running job writes newer ones."""
    contents = None
    if cfg.pretrained is not None and Path(cfg.pretrained).is_dir():
        newest = newest_for_all(Path(cfg.pretrained), ranks, report=print)
        if newest is not None:
            cfg.pretrained, contents = str(newest[0]), newest[1]
    return load_backbone(cfg, contents)


def labelled_images(run: EvalRun, *splits: str) -> dict[str, LabelledImages]:
    """By split. All of them before any work on one, to complain before it and not after it."""
    labelled = {}
    for split in splits:
        dataset = open_split(run.cfg, split, run.ranks)
        if dataset.labels is None or not (dataset.labels >= 0).any():
            found = f"no image of its {split} split has a label, and {run.name} needs them"
            raise DataError(f"dataset={run.cfg.dataset.name}: {found}")
        labelled[split] = LabelledImages(dataset)
    return labelled


def count_classes(train: Tensor | np.ndarray, evaluation: Tensor | np.ndarray) -> int:
    """From the labels of both splits. An evaluation class without training images is an error."""
    train, evaluation = set(train.tolist()), set(evaluation.tolist())
    if unknown := [str(number) for number in sorted(evaluation - train)]:
        raise DataError(f"classes {first_few(unknown)} of the evaluation have no training image")
    return max(train) + 1


class Classification(Task):
    """Trains `model`, all of it or parts of it, to name the classes of images."""

    names: Sequence[str]  # of what predicts in the model, each for itself
    losses: Tensor  # float64, of this process, added up since the last log line
    # By name, percent of the evaluation images; empty: not yet measured.
    top1: dict[str, float] = {}
    top5: dict[str, float]
    evaluated: int  # images that these are of

    def __init__(self, run: EvalRun):
        self.run, self.cfg, self.ranks = run, run.cfg, run.ranks
        self.images = labelled_images(run, "train", "eval")
        self.dataset, self.evaluation = self.images["train"], self.images["eval"]
        self.classes = count_classes(self.dataset.labels, self.evaluation.labels)

    def predictions(self) -> Iterator[tuple[list[Tensor], Tensor]]:
        """Of this process's evaluation images: the logits of each name, and the labels."""
        raise NotImplementedError

    def train_to_the_end(self) -> None:
        with stoppable(self.ranks) as stop_flag:
            train(self, self.cfg, self.ranks, self.run.job, stop_flag)

    def mean_losses(self, steps: int) -> list[float]:
        """Of these last steps, over all processes; the next ones are added up from zero."""
        sums = sum_over_processes(self.losses.reshape(-1), self.loader, self.ranks)
        self.losses.zero_()
        return [loss / steps / self.ranks.world_size for loss in sums]

    def finish(self, loop: Loop) -> None:
        if not self.top1:  # the run that is resumed had come to its end
            self.evaluate()
            if self.ranks.is_main:
                self.run.trained_in = loop.log.seconds()

    @torch.no_grad()
    def measure(self) -> None:
        """The accuracies on the evaluation images of all processes."""
        self.model.eval()
        hits = torch.zeros(2, len(self.names), dtype=torch.int64, device=self.ranks.device)
        count = hits.new_zeros(())
        for predicted, labels in self.predictions():
            hits += torch.stack([count_hits(logits, labels) for logits in predicted], dim=1)
            count += len(labels)
        self.model.train()
        self.evaluated = int(all_reduce(count))
        percent = (100 * all_reduce(hits).double() / self.evaluated).tolist()
        self.top1, self.top5 = (dict(zip(self.names, row, strict=True)) for row in percent)

    def state(self) -> dict:
        return super().state() | {"backbone": self.run.backbone.describe()}

    def restore(self, contents: dict, source: Path) -> None:
        check_same_backbone(contents, self.run.backbone)
        super().restore(contents, source)


def count_hits(logits: Tensor, labels: Tensor) -> Tensor:
    """How many labels are the first, and among the first five. -> int64 [2]

    Logits that are not finite name no class."""
    first = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    hits = torch.stack([first[:, 0], first.any(dim=1)]) & logits.isfinite().all(dim=1)
    return hits.sum(dim=1)


def check_same_backbone(resumed: dict, backbone: Backbone) -> None:
    """The file, the part of it, the layer, the size: all that its tokens depend on."""
    before = resumed["backbone"]
    for key, value in backbone.describe().items():
        if before.get(key) != value:
            raise CheckpointError(other_backbone(key, before.get(key), value))
