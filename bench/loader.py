"""How many images per second does one loader process deliver, and does training wait for it?

python -m bench.loader                      # makes 300 JPEG files of ImageNet's sizes, reads them
python -m bench.loader --data /path/to/imagenet --workers 1 2 4
python -m bench.loader --train --encoder vit_small --batch 48 --precision bf16

Pipelines, measured in turns: `pil float`, the customary one (Pillow decodes, crops and resizes;
float32, normalised, in the worker); `pil`, this project's with decoder=pil (uint8, normalised on
the device); `fast`, with decoder=fast, also as a share of what one process decodes if it does
nothing else. --train: loader and training step together.
"""

import statistics
import tempfile
import time
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms

from bench import step
from data.base import ImageDataset
from data.datasets import build_dataset
from data.loader import TrainLoader
from data.picture import decode
from data.transforms import TrainTransform
from engine_pretrain import train_step
from util.distributed import Ranks, join_processes, leave_processes
from util.metrics import Speed

SIDE, BATCH = 280, 16
WARM_UP = 3  # steps
IMAGENET = step.RECIPE["dataset"]
PHOTO_SIZES = [(500, 375), (375, 500), (500, 333)]  # the most frequent ones of ImageNet
PHOTO_CLASSES = 10


def natural_noise(width: int, height: int, rng: np.random.Generator) -> np.ndarray:
    """Amplitudes fall with the frequency, as in photographs, and the colours go along with each
    other: files come out about as long as ImageNet's (110 kB). -> uint8 [height, width, 3]"""
    rows = np.fft.fftfreq(height)[:, None] * height
    columns = np.fft.rfftfreq(width)[None, :] * width
    amplitude = 1 / np.maximum(np.hypot(rows, columns), 1)
    phases = rng.uniform(0, 2 * np.pi, (3, *amplitude.shape))
    planes = np.fft.irfft2(amplitude * np.exp(1j * phases), s=(height, width))
    planes /= planes.std(axis=(1, 2), keepdims=True)
    grey = planes[0] + 0.04 * rng.standard_normal((height, width))  # the sensor's own noise
    image = np.stack([grey, grey + 0.25 * planes[1], grey + 0.25 * planes[2]], axis=2)
    return np.clip(118 + 55 * image, 0, 255).astype(np.uint8)


def write_photos(folder: Path, count: int) -> None:
    """folder/train/CLASS/*.jpg, quality 90 to 95."""
    rng = np.random.default_rng(0)
    for number in range(count):
        target = folder / "train" / f"class{number % PHOTO_CLASSES}" / f"{number:06}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        pixels = natural_noise(*PHOTO_SIZES[number % len(PHOTO_SIZES)], rng)
        Image.fromarray(pixels).save(target, quality=int(rng.integers(90, 96)))


BICUBIC = transforms.InterpolationMode.BICUBIC
CUSTOMARY = transforms.Compose(
    [
        transforms.RandomResizedCrop(SIDE, (step.RECIPE["min_crop"], 1), interpolation=BICUBIC),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(IMAGENET["mean"], IMAGENET["std"]),
    ]
)


def customary_transform(image: Image.Image, epoch: int, index: int) -> Tensor:
    """What most code bases do in their loaders."""
    return CUSTOMARY(image)


def recipe_transform(side: int) -> TrainTransform:
    return TrainTransform(side, step.RECIPE["min_crop"], IMAGENET["flip"], step.RECIPE["seed"])


def build_loader(
    data: ImageDataset, transform, batch: int, workers: int, ranks: Ranks
) -> TrainLoader:
    sizes = {"batch_size": batch, "accum_iter": 1, "num_workers": workers}
    place = {"rank": ranks.rank, "world_size": ranks.world_size, "device": ranks.device}
    return TrainLoader(data, transform, seed=step.RECIPE["seed"], **sizes, **place)


def rate(dataset: ImageDataset, transform, workers: int, images: int) -> float:
    """Images per second; the start of the workers and their end are left out."""
    alone = Ranks(0, 1, torch.device("cpu"))
    count = images // BATCH
    batches = build_loader(dataset, transform, BATCH, workers, alone).stream(0, 3 * count)
    next(batches)
    start = time.perf_counter()
    delivered = sum(len(batch.images) for batch in islice(batches, count))
    seconds = time.perf_counter() - start
    batches.close()
    return delivered / seconds


def decoding_rate(files: list[bytearray]) -> float:
    start = time.perf_counter()
    for contents in files:
        decode(contents, "fast")
    return len(files) / (time.perf_counter() - start)


def measure(data: Path, workers: int, images: int, rounds: int) -> dict:
    """Images per second, medians over the rounds."""
    decoders = ({"decoder": name} for name in ("pil", "fast"))
    pil, fast = (build_dataset("imagefolder", "train", str(data), own) for own in decoders)
    ours = recipe_transform(SIDE)
    kinds = {"pil float": (pil, customary_transform), "pil": (pil, ours), "fast": (fast, ours)}
    files = [fast.contents(index) for index in range(min(images, len(fast)))]
    rates = {name: [] for name in (*kinds, "decoding")}
    for _ in range(rounds):
        rates["decoding"].append(decoding_rate(files))
        for name, (dataset, transform) in kinds.items():
            rates[name].append(rate(dataset, transform, workers, images))
    result = {"workers": workers}
    for name, values in rates.items():
        result[name] = statistics.median(values)
        result[f"{name}, times pil float"] = step.median_ratio(values, rates["pil float"])
    result["fast, share of decoding"] = step.median_ratio(rates["fast"], rates["decoding"])
    return result


def train(data: Path, setting: step.Setting, workers: int, steps: int, ranks: Ranks) -> dict:
    """Images per second, and the share of the time that the step waits for data."""
    training = step.build_training(setting, ranks)
    dataset = build_dataset("imagefolder", "train", str(data))
    transform = recipe_transform(step.image_side(training, setting))
    loader = build_loader(dataset, transform, setting.batch, workers, ranks)
    speed, all_steps = Speed(), WARM_UP + steps
    batches = (batch.images for batch in speed.timed(loader.stream(0, all_steps)))
    draw_views = step.view_source(setting, ranks)
    for number in range(all_steps):
        if number == WARM_UP:
            training.meters.read()  # waits for the device, as a log point does
            speed.read(WARM_UP, setting.batch, 0)
        train_step(training, batches, lambda *_: draw_views(), number, number / all_steps)
    training.meters.read()
    measured = speed.read(steps, setting.batch * ranks.world_size, 0)
    shown = {"images_per_second": measured["images_per_second"], "waiting": measured["data_wait"]}
    about = {"workers": workers, "device": step.device_name(ranks.device)}
    return asdict(setting) | about | shown


def main() -> None:
    parser = step.command_line(__doc__)
    parser.add_argument("--data", type=Path, help="a folder with train/CLASS/*.jpg; else made here")
    parser.add_argument("--photos", type=int, default=300, help="how many files to make")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--images", type=int, default=400, help="read in each round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--train", action="store_true", help="measure loader and step together")
    step.add_training_options(parser)
    parser.add_argument("--batch", type=int, default=48, help="with --train: images per process")
    parser.add_argument("--steps", type=int, default=10, help="with --train")
    options = parser.parse_args()
    ranks = join_processes()
    setting = step.setting_of(options, options.batch, step.GRID)
    if not options.train:
        torch.set_num_threads(1)  # as in a loader process
    with tempfile.TemporaryDirectory() as made:
        data = options.data or Path(made)
        if options.data is None:
            write_photos(data, options.photos)
        for workers in options.workers:
            if options.train:
                result = train(data, setting, workers, options.steps, ranks)
            else:
                result = measure(data, workers, options.images, options.rounds)
            if ranks.is_main:
                step.show(result)
    leave_processes()


if __name__ == "__main__":
    main()
