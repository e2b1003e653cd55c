"""How many images per second does one loader process deliver?

python -m bench.loader                      # makes 300 JPEG files of ImageNet's sizes, reads them
python -m bench.loader data_path=/path/to/imagenet num_workers=4

Pipelines, measured in turns: `pil float`, the customary one (Pillow decodes, crops and resizes;
float32, normalised, in the worker); `pil`, this project's with decoder=pil (uint8, normalised on
the device); `fast`, with decoder=fast, also as a share of what one process decodes if it does
nothing else. In the process itself and with one worker, unless num_workers says otherwise. Whether
a training waits for its loader each of its log lines says.
"""

import statistics
import tempfile
import time
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from torchvision import transforms

from bench.step import median_ratio, run_bench, show
from data.base import ImageDataset
from data.loader import Augmentation
from data.picture import decode
from data.transforms import TrainTransform
from util.build import open_split, read_geometry, train_loader
from util.distributed import Ranks

BATCH = 16
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


def customary_transform(cfg: DictConfig) -> Augmentation:
    """What most code bases do in their loaders."""
    side, bicubic = read_geometry(cfg).side, transforms.InterpolationMode.BICUBIC
    steps = [
        transforms.RandomResizedCrop(side, (cfg.min_crop, 1), interpolation=bicubic),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(cfg.dataset.mean, cfg.dataset.std),
    ]
    return lambda image, epoch, index: transforms.Compose(steps)(image)


def recipe_transform(cfg: DictConfig) -> TrainTransform:
    return TrainTransform(read_geometry(cfg).side, cfg.min_crop, cfg.dataset.flip, cfg.seed)


def rate(cfg: DictConfig, dataset: ImageDataset, transform: Augmentation, images: int) -> float:
    """Images per second; the start of the workers and their end are left out."""
    cfg = OmegaConf.merge(cfg, {"batch_size": BATCH, "accum_iter": 1})
    count = images // BATCH
    loader = train_loader(cfg, Ranks(0, 1, torch.device("cpu")), dataset, transform)
    batches = loader.stream(0, 3 * count)
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


def measure(cfg: DictConfig, images: int, rounds: int) -> dict:
    """Images per second, medians over the rounds."""
    pil, fast = (
        open_split(OmegaConf.merge(cfg, {"dataset": {"options": {"decoder": decoder}}}), "train")
        for decoder in ("pil", "fast")
    )
    ours = recipe_transform(cfg)
    kinds = {"pil float": (pil, customary_transform(cfg)), "pil": (pil, ours), "fast": (fast, ours)}
    files = [fast.contents(index) for index in range(min(images, len(fast)))]
    rates = {name: [] for name in (*kinds, "decoding")}
    for _ in range(rounds):
        rates["decoding"].append(decoding_rate(files))
        for name, (dataset, transform) in kinds.items():
            rates[name].append(rate(cfg, dataset, transform, images))
    result = {"workers": cfg.num_workers}
    for name, values in rates.items():
        result[name] = statistics.median(values)
        result[f"{name}, times pil float"] = median_ratio(values, rates["pil float"])
    result["fast, share of decoding"] = median_ratio(rates["fast"], rates["decoding"])
    return result


def main(cfg: DictConfig, photos: int, images: int, rounds: int) -> None:
    """photos: how many files to make. images: read in each round."""
    torch.set_num_threads(1)  # as in a loader process
    with tempfile.TemporaryDirectory() as made:
        if cfg.data_path is None:
            write_photos(Path(made), photos)
            cfg.data_path, cfg.dataset.name = made, "imagefolder"
        for workers in (0, 1) if cfg.num_workers is None else (cfg.num_workers,):
            cfg.num_workers = workers
            show(measure(cfg, images, rounds))


if __name__ == "__main__":
    run_bench(main, __doc__, photos=300, images=400, rounds=5)
