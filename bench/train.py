"""Training from JPEG files: loader and step together, and how long the step waits for data.

python -m bench.train --encoder vit_small --batch 48 --precision bf16 --workers 1
python -m bench.train --data /path/to/imagenet --encoder vit_base --batch 256 --compile
"""

from dataclasses import asdict
from pathlib import Path

from bench.loader import IMAGENET, add_photo_options, build_loader, photo_folder, recipe_transform
from bench.step import (
    GRID,
    Setting,
    add_training_options,
    build_training,
    command_line,
    device_name,
    image_side,
    show,
    view_source,
)
from data.datasets import build_dataset
from data.transforms import normalise
from engine_pretrain import train_step
from util.distributed import Ranks, default_workers, join_processes, leave_processes
from util.metrics import Speed

WARM_UP = 3  # steps


def measure(data: Path, setting: Setting, workers: int, steps: int, ranks: Ranks) -> dict:
    training = build_training(setting, ranks)
    dataset = build_dataset("imagefolder", "train", str(data))
    transform = recipe_transform(image_side(training, setting))
    loader = build_loader(dataset, transform, setting.batch, workers, ranks)
    speed, all_steps = Speed(), WARM_UP + steps
    batches = (
        normalise(batch.images, IMAGENET["mean"], IMAGENET["std"])
        for batch in speed.timed(loader.stream(0, all_steps))
    )
    draw_views = view_source(setting, ranks)
    for step in range(all_steps):
        if step == WARM_UP:
            training.meters.read()  # waits for the device, as a log point does
            speed.read(WARM_UP, setting.batch, 0)
        train_step(training, batches, lambda *_: draw_views(), step, step / all_steps)
    training.meters.read()
    measured = speed.read(steps, setting.batch * ranks.world_size, 0)
    return {
        **asdict(setting),
        "workers": workers,
        "device": device_name(ranks.device),
        "images_per_second": measured["images_per_second"],
        "waiting": measured["data_wait"],
    }


def main() -> None:
    parser = command_line(__doc__)
    add_photo_options(parser, photos=500)
    add_training_options(parser, precision="bf16")
    parser.add_argument("--batch", type=int, default=48, help="images per process")
    parser.add_argument("--workers", type=int, help="default: as in training")
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args()
    ranks = join_processes()
    setting = Setting(
        options.encoder, options.batch, GRID, options.precision, options.compile, recompute=False
    )
    workers = default_workers() if options.workers is None else options.workers
    with photo_folder(options) as data:
        result = measure(data, setting, workers, options.steps, ranks)
    if ranks.is_main:
        show(result)
    leave_processes()


if __name__ == "__main__":
    main()
