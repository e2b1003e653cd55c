"""Training from JPEG files: loader and step together, and how long the step waits for data.

python -m bench.train --encoder vit_small --batch 48 --precision bf16 --workers 1
python -m bench.train --data /path/to/imagenet --encoder vit_base --batch 256 --compile
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from bench.loader import FLIP, MEAN, MIN_CROP, SEED, SIDE, STD
from bench.photos import write_photos
from bench.step import ENCODERS, MATRIX_TYPES, VISIBLE, Setting, build_training, device_name
from data.datasets import build_dataset
from data.loader import TrainLoader
from data.transforms import TrainTransform, normalise
from engine_pretrain import train_step
from models.views import sample_views
from util.distributed import Ranks, default_workers, join_processes, leave_processes
from util.metrics import Speed

GRID, PATCH_GAP = 14, 4
WARM_UP = 3  # steps


def measure(data: Path, setting: Setting, workers: int, steps: int, ranks: Ranks) -> dict:
    training = build_training(setting, ranks)
    loader = TrainLoader(
        dataset=build_dataset("imagefolder", "train", str(data)),
        transform=TrainTransform(SIDE, MIN_CROP, FLIP, SEED),
        seed=SEED,
        batch_size=setting.batch,
        accum_iter=1,
        rank=ranks.rank,
        world_size=ranks.world_size,
        num_workers=workers,
        device=ranks.device,
    )
    speed = Speed()
    generator = torch.Generator(ranks.device)

    def draw_views(step: int, micro_step: int, batch_size: int):
        return sample_views(batch_size, GRID, round(VISIBLE * GRID**2), PATCH_GAP, generator)

    def images() -> Iterator[Tensor]:
        for batch in speed.timed(loader.stream(0, WARM_UP + steps)):
            yield normalise(batch.images, MEAN, STD)

    def after_step(step: int) -> None:
        if step + 1 in (WARM_UP, WARM_UP + steps):
            training.meters.read()  # waits for the device, as a log point does
            steps_there = WARM_UP if step + 1 == WARM_UP else steps
            measured.update(speed.read(steps_there, setting.batch * ranks.world_size, 0))

    measured: dict = {}
    batches = images()
    for step in range(WARM_UP + steps):
        train_step(training, batches, draw_views, step, step / (WARM_UP + steps))
        after_step(step)
    return {
        "encoder": setting.encoder,
        "batch": setting.batch,
        "precision": setting.precision,
        "compile": setting.compile,
        "workers": workers,
        "device": device_name(ranks.device),
        "images_per_second": measured["images_per_second"],
        "waiting": measured["data_wait"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    encoders = sorted(path.stem for path in ENCODERS.glob("*.yaml"))
    parser.add_argument("--data", type=Path, help="a folder with train/CLASS/*.jpg; else made here")
    parser.add_argument("--photos", type=int, default=500, help="how many files to make")
    parser.add_argument("--encoder", default="vit_small", choices=encoders)
    parser.add_argument("--batch", type=int, default=48, help="images per process")
    parser.add_argument("--precision", default="bf16", choices=MATRIX_TYPES)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--workers", type=int, help="default: as in training")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--json", type=Path, help="write the result here")
    options = parser.parse_args()
    ranks = join_processes()
    setting = Setting(
        options.encoder, options.batch, GRID, options.precision, options.compile, recompute=False
    )
    workers = default_workers() if options.workers is None else options.workers
    with tempfile.TemporaryDirectory() as folder:
        data = options.data
        if data is None:
            data = Path(folder)
            write_photos(data, max(options.photos, options.batch * ranks.world_size))
        result = measure(data, setting, workers, options.steps, ranks)
    if ranks.is_main:
        print(
            f"{result['encoder']} batch {result['batch']} {result['precision']}, {workers} loader "
            f"processes: {result['images_per_second']:.1f} images/s, waiting "
            f"{result['waiting']:.0%} of the time"
        )
        if options.json:
            options.json.write_text(json.dumps(result, indent=2) + "\n")
    leave_processes()


if __name__ == "__main__":
    main()
