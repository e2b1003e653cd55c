"""From a picture of any size to a uint8 tensor of one size, and from there to normalised floats.

What is random is a pure function of (seed, epoch, index): neither the number of workers nor an
interruption changes what the model sees.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from numpy.random import Generator
from PIL import Image, ImageOps
from timm.data import create_transform
from timm.data.auto_augment import RandAugment
from torch import Tensor

from data.picture import Box, Picture, crop_and_resize, size_of, to_image
from util.streams import Stream, generator, seeded

CROP_ATTEMPTS = 10
NARROWEST, WIDEST = 3 / 4, 4 / 3


def random_resized_crop_box(width: int, height: int, min_scale: float, rng: Generator) -> Box:
    """A crop of min_scale..1 of the area and of aspect ratio 3/4..4/3.

    Same distribution as torchvision's RandomResizedCrop: crops that do not fit are drawn again, and
    after ten attempts the largest central crop of an allowed aspect ratio is taken."""
    for _ in range(CROP_ATTEMPTS):
        area = width * height * rng.uniform(min_scale, 1)
        ratio = math.exp(rng.uniform(math.log(NARROWEST), math.log(WIDEST)))
        crop_width = round(math.sqrt(area * ratio))
        crop_height = round(math.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            left = int(rng.integers(width - crop_width + 1))
            top = int(rng.integers(height - crop_height + 1))
            return left, top, left + crop_width, top + crop_height
    crop_width = min(width, round(height * WIDEST))
    crop_height = min(height, round(width / NARROWEST))
    left, top = (width - crop_width) // 2, (height - crop_height) // 2
    return left, top, left + crop_width, top + crop_height


class TrainTransform:
    """Random crop, resize to side x side, and a mirror image half of the time."""

    def __init__(self, side: int, min_crop: float, flip: bool, seed: int) -> None:
        self.side, self.min_crop, self.flip, self.seed = side, min_crop, flip, seed

    def __call__(self, picture: Picture, epoch: int, index: int) -> Tensor:
        rng = generator(Stream.CROPS, self.seed, epoch, index)
        box = random_resized_crop_box(*size_of(picture), self.min_crop, rng)
        image = crop_and_resize(picture, box, self.side, self.side)
        if self.flip and rng.random() < 0.5:
            image = image.flip(2)
        return image


def posterize(image: Image.Image, bits: int, **_: object) -> Image.Image:
    """RandAugment at its strongest keeps 0 bits, a black image, which Pillow now refuses."""
    return ImageOps.posterize(image, bits) if bits > 0 else Image.new(image.mode, image.size)


class FinetuneTransform:
    """The augmentation of fine-tuning: random crop, mirror image, RandAugment, random erasing.

    timm's transforms, which draw from the generators of the process; here these are seeded for each
    image. The result is normalised, float32 [3, side, side]: what erasing fills in is noise of the
    normalised image, which uint8 could not hold."""

    def __init__(self, seed: int, **options) -> None:
        """options: of timm's create_transform, besides those that the recipe fixes."""
        self.seed = seed
        fixed = {"color_jitter": None, "interpolation": "bicubic", "re_mode": "pixel"}
        self.augment = create_transform(is_training=True, **fixed, **options)
        for step in self.augment.transforms:
            if isinstance(step, RandAugment):
                for operation in step.ops:
                    if operation.name.startswith("Posterize"):
                        operation.aug_fn = posterize

    def __call__(self, picture: Picture, epoch: int, index: int) -> Tensor:
        with seeded(Stream.FINETUNE_AUGMENTATION, self.seed, epoch, index):
            return self.augment(to_image(picture))


class EvalTransform:
    """Resize the shorter side to side / crop_ratio, then take the central side x side."""

    def __init__(self, side: int, crop_ratio: float = 0.875) -> None:
        self.side = side
        self.shorter = round(side / crop_ratio)

    def __call__(self, picture: Picture) -> Tensor:
        width, height = size_of(picture)
        image = crop_and_resize(picture, (0, 0, width, height), *self.resized(width, height))
        left, top = self.corner(*size_of(image))
        return image[:, top : top + self.side, left : left + self.side]

    def mask(self, mask: Image.Image) -> Tensor:
        """The same part of a mask, without interpolation between its classes.
        -> uint8 [1, side, side]"""
        mask = mask.resize(self.resized(*mask.size), Image.Resampling.NEAREST)
        left, top = self.corner(*mask.size)
        mask = mask.crop((left, top, left + self.side, top + self.side))
        return torch.from_numpy(np.array(mask))[None]

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """Rounding down the longer side, like torchvision, gives the same pixels."""
        scale = min(width, height)
        return int(self.shorter * width / scale), int(self.shorter * height / scale)

    def corner(self, width: int, height: int) -> tuple[int, int]:
        """Left and top of the central part."""
        return round((width - self.side) / 2), round((height - self.side) / 2)


class MaskTransform(EvalTransform):
    """The central crop of an image and the same of its mask, as a fourth channel."""

    def __call__(self, pair: tuple[Picture, Image.Image]) -> Tensor:  # type: ignore[override]
        """-> uint8 [4, side, side]"""
        image, mask = pair
        return torch.cat([super().__call__(image), self.mask(mask)])


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 [..., 3, H, W] to float32 (pixel / 255 - mean) / std, on the device of the images."""
    scale, shift = _kept_scale_and_shift(tuple(mean), tuple(std), images.device)
    return images * scale + shift


def scale_and_shift(mean: tuple, std: tuple, device: torch.device) -> tuple[Tensor, Tensor]:
    """The normalisation as pixel * scale + shift, each [3, 1, 1]."""
    # An evaluation in inference mode may come first, and training could not use its tensors.
    with torch.inference_mode(False):
        mean_tensor = torch.tensor(mean, dtype=torch.float64).view(3, 1, 1)
        std_tensor = torch.tensor(std, dtype=torch.float64).view(3, 1, 1)
        scale = (1 / (255 * std_tensor)).to(device, torch.float32)
        shift = (-mean_tensor / std_tensor).to(device, torch.float32)
    return scale, shift


# For each device: building them means a copy to the device, for which the host waits.
_kept_scale_and_shift = lru_cache(maxsize=16)(scale_and_shift)
