"""The augmentation of fine-tuning: random crop, mirror image, RandAugment, random erasing.

timm's transforms, which draw from the generators of the process; here these are seeded for each
image, so that its augmentation is a pure function of (seed, epoch, index).
"""

from PIL import Image, ImageOps
from timm.data import create_transform
from timm.data.auto_augment import RandAugment
from torch import Tensor

from data.picture import Picture, to_image
from util.streams import Stream, seeded


def posterize(image: Image.Image, bits: int, **_: object) -> Image.Image:
    """RandAugment at its strongest keeps 0 bits, a black image, which Pillow now refuses."""
    return ImageOps.posterize(image, bits) if bits > 0 else Image.new(image.mode, image.size)


class FinetuneTransform:
    """For TrainLoader. The result is normalised, float32 [3, side, side]: what erasing fills in is
    noise of the normalised image, which uint8 could not hold."""

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
