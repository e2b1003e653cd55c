"""Transforms against torchvision: the same distribution of crops, the same evaluation pixels."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as reference

from data.transforms import (
    EvalTransform,
    TrainTransform,
    normalise,
    random_resized_crop_box,
)
from util.streams import Stream, generator


def noise_image(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def our_crops(width: int, height: int, min_scale: float, count: int) -> np.ndarray:
    """Rows of (left, top, width, height)."""
    rng = np.random.default_rng(0)
    boxes = [random_resized_crop_box(width, height, min_scale, rng) for _ in range(count)]
    left, top, right, bottom = np.array(boxes).T
    return np.stack([left, top, right - left, bottom - top], axis=1)


def torchvision_crops(width: int, height: int, min_scale: float, count: int) -> np.ndarray:
    torch.manual_seed(0)
    image = Image.new("L", (width, height))
    crops = [
        reference.RandomResizedCrop.get_params(image, [min_scale, 1], [3 / 4, 4 / 3])
        for _ in range(count)
    ]
    top, left, crop_height, crop_width = np.array(crops).T
    return np.stack([left, top, crop_width, crop_height], axis=1)


@pytest.mark.parametrize(
    "width, height, min_scale", [(500, 375, 0.2), (375, 500, 0.9), (300, 100, 0.3)]
)
def test_crops_follow_torchvisions_distribution(width, height, min_scale):
    from scipy.stats import ks_2samp

    count = 1500
    ours = our_crops(width, height, min_scale, count)
    theirs = torchvision_crops(width, height, min_scale, count)
    columns = {"left": 0, "top": 1, "width": 2, "height": 3}
    for name, column in columns.items():
        # Fixed seeds, so this cannot fail by chance; a changed distribution gives p near 0.
        assert ks_2samp(ours[:, column], theirs[:, column]).pvalue > 1e-3, name
    areas = [crops[:, 2] * crops[:, 3] for crops in (ours, theirs)]
    assert ks_2samp(*areas).pvalue > 1e-3


@pytest.mark.parametrize("width, height", [(1000, 20), (20, 1000), (1, 1), (1, 50), (7, 1)])
def test_extreme_images_fall_back_to_torchvisions_central_crop(width, height):
    assert (our_crops(width, height, 1.0, 5) == torchvision_crops(width, height, 1.0, 5)).all()


def test_crops_stay_inside_the_image():
    crops = our_crops(61, 40, 0.05, 2000)
    assert crops.min(axis=0)[:2].tolist() == [0, 0]
    assert (crops[:, 2:] >= 1).all()
    # The last possible position is reached, and never passed.
    assert (crops[:, 0] + crops[:, 2]).max() == 61 and (crops[:, 1] + crops[:, 3]).max() == 40


def test_augmentation_depends_on_seed_epoch_and_index_alone():
    image = noise_image(80, 60)
    transform = TrainTransform(side=32, min_crop=0.2, flip=True, seed=5)
    first = transform(image, 3, 7)
    transform(image, 0, 0)
    assert torch.equal(transform(image, 3, 7), first)
    for seed, epoch, index in ((6, 3, 7), (5, 4, 7), (5, 3, 8)):
        other = TrainTransform(side=32, min_crop=0.2, flip=True, seed=seed)
        assert not torch.equal(other(image, epoch, index), first)


def test_train_transform_crops_before_it_resizes():
    image = noise_image(90, 70)
    transform = TrainTransform(side=24, min_crop=0.3, flip=False, seed=0)
    for index in range(5):
        box = random_resized_crop_box(90, 70, 0.3, generator(Stream.CROPS, 0, 2, index))
        expected = image.crop(box).resize((24, 24), Image.Resampling.BICUBIC)
        result = transform(image, 2, index)
        assert result.shape == (3, 24, 24) and result.dtype == torch.uint8
        assert torch.equal(result, reference.PILToTensor()(expected))


def test_a_crop_may_be_one_pixel_high():
    """And lies anywhere, not only where crops lie that do not fit."""
    crops = our_crops(6, 1, min_scale=0.05, count=100)
    assert set(crops[:, 0]) == {0, 1, 2, 3, 4, 5} and (crops[:, 3] == 1).all()


def test_flip_mirrors_half_of_the_images_and_nothing_else():
    image = noise_image(40, 40)
    plain = TrainTransform(side=16, min_crop=0.5, flip=False, seed=1)
    flipping = TrainTransform(side=16, min_crop=0.5, flip=True, seed=1)
    flipped = 0
    for index in range(200):
        before, after = plain(image, 0, index), flipping(image, 0, index)
        if torch.equal(after, before.flip(-1)):
            flipped += 1
        else:
            assert torch.equal(after, before)
    assert 75 < flipped < 125


@pytest.mark.parametrize(
    "width, height, side, crop_ratio",
    [(500, 375, 224, 0.875), (333, 501, 224, 0.875), (50, 41, 64, 0.9), (64, 64, 64, 1.0)],
)
def test_eval_transform_equals_torchvision(width, height, side, crop_ratio):
    image = noise_image(width, height)
    resize = reference.Resize(round(side / crop_ratio), reference.InterpolationMode.BICUBIC)
    expected = reference.PILToTensor()(reference.CenterCrop(side)(resize(image)))
    assert torch.equal(EvalTransform(side, crop_ratio)(image), expected)


def test_normalise_equals_torchvision():
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    expected = reference.Normalize(mean, std)(images / 255)
    result = normalise(images, mean, std)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, expected, rtol=0, atol=2e-6)


def test_normalise_in_inference_mode_leaves_training_usable():
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    images = torch.zeros(1, 3, 2, 2, dtype=torch.uint8)
    with torch.inference_mode():
        normalise(images, mean, std)
    pixels = images.float().requires_grad_()
    normalise(pixels, mean, std).sum().backward()
    torch.testing.assert_close(pixels.grad[0, :, 0, 0], 1 / (255 * torch.tensor(std)))
