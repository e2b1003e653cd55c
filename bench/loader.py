"""How many images per second does one loader process deliver?

python -m bench.loader                      # makes 300 JPEG files of ImageNet's sizes, reads them
python -m bench.loader --data /path/to/imagenet --workers 1 2 4

Pipelines, measured in turns: `pil float`, the customary one (Pillow decodes, crops and resizes;
float32, normalised, in the worker); `pil`, this project's with decoder=pil (uint8, normalised on
the device); `fast`, with decoder=fast; `tar`, the same out of tar files.
"""

import argparse
import json
import statistics
import tarfile
import tempfile
import time
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from torchvision import transforms

from bench.photos import write_photos
from bench.step import device_name
from data.base import ImageDataset
from data.datasets import build_dataset
from data.loader import TrainLoader
from data.transforms import TrainTransform

SIDE, MIN_CROP, FLIP, SEED = 280, 0.2, True, 0  # the published recipe
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BATCH = 16


class CustomaryTransform:
    """What most code bases do in their loaders."""

    def __init__(self) -> None:
        self.steps = transforms.Compose(
            [
                transforms.RandomResizedCrop(
                    SIDE, (MIN_CROP, 1), interpolation=transforms.InterpolationMode.BICUBIC
                ),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )

    def __call__(self, image, epoch: int, index: int) -> Tensor:
        return self.steps(image)


def make_tars(folder: Path, target: Path) -> None:
    """One uncompressed tar per class, as ImageNet ships them."""
    (target / "train").mkdir(parents=True)
    for class_folder in sorted((folder / "train").iterdir()):
        with tarfile.open(target / "train" / f"{class_folder.name}.tar", "w") as tar:
            for path in sorted(class_folder.iterdir()):
                tar.add(path, arcname=path.name)


def pipelines(data: Path, tars: Path) -> dict[str, tuple[ImageDataset, object]]:
    def files(decoder: str) -> ImageDataset:
        return build_dataset("imagefolder", "train", str(data), {"decoder": decoder})

    ours = TrainTransform(SIDE, MIN_CROP, FLIP, SEED)
    return {
        "pil float": (files("pil"), CustomaryTransform()),
        "pil": (files("pil"), ours),
        "fast": (files("fast"), ours),
        "tar": (build_dataset("tar", "train", str(tars)), ours),
    }


def rate(dataset: ImageDataset, transform, workers: int, images: int) -> float:
    """Images per second; the start of the workers and their end are left out."""
    loader = TrainLoader(
        dataset=dataset,
        transform=transform,
        seed=SEED,
        batch_size=BATCH,
        accum_iter=1,
        rank=0,
        world_size=1,
        num_workers=workers,
        device="cpu",
    )
    count = images // BATCH
    batches = loader.stream(0, 3 * count)
    next(batches)
    start = time.perf_counter()
    delivered = sum(len(batch.images) for batch in islice(batches, count))
    seconds = time.perf_counter() - start
    batches.close()
    return delivered / seconds


def measure(data: Path, tars: Path, workers: int, images: int, rounds: int) -> dict:
    kinds = pipelines(data, tars)
    rates = {name: [] for name in kinds}
    for _ in range(rounds):
        for name, (dataset, transform) in kinds.items():
            rates[name].append(rate(dataset, transform, workers, images))
    result = {"workers": workers, "cpu": device_name(torch.device("cpu")), "side": SIDE}
    for name, values in rates.items():
        result[name] = statistics.median(values)
        ratios = [a / b for a, b in zip(values, rates["pil float"], strict=True)]
        result[f"{name}, times pil float"] = statistics.median(ratios)
    ratios = [a / b for a, b in zip(rates["tar"], rates["fast"], strict=True)]
    result["tar, times fast"] = statistics.median(ratios)
    return result


def one_line(result: dict) -> str:
    names = ("pil float", "pil", "fast", "tar")
    rates = ", ".join(
        f"{name} {result[name]:.0f} images/s ({result[f'{name}, times pil float']:.2f} x)"
        for name in names
    )
    workers = result["workers"] or "no"
    return f"{workers} workers: {rates}; tar in place {result['tar, times fast']:.2f} x files"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="a folder with train/CLASS/*.jpg; else made here")
    parser.add_argument("--photos", type=int, default=300, help="how many files to make")
    parser.add_argument("--images", type=int, default=400, help="read in each round")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the results here")
    options = parser.parse_args()
    torch.set_num_threads(1)  # as in a loader process
    results = []
    with tempfile.TemporaryDirectory() as folder:
        data, tars = options.data, Path(folder) / "tars"
        if data is None:
            data = Path(folder) / "photos"
            write_photos(data, options.photos)
        make_tars(data, tars)
        for workers in options.workers:
            results.append(measure(data, tars, workers, options.images, options.rounds))
            print(one_line(results[-1]), flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
