"""The fast decoder against Pillow: the same pictures, crops and errors."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from bench.loader import natural_noise
from data.base import UNREADABLE
from data.picture import decode, size_of, to_image
from data.transforms import EvalTransform, TrainTransform


def photo(width: int = 200, height: int = 150) -> Image.Image:
    return Image.fromarray(natural_noise(width, height, np.random.default_rng(0)))


def stored(image: Image.Image, kind: str = "JPEG", **options) -> bytearray:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return bytearray(file.getvalue())


def assert_alike(ours: torch.Tensor, expected: torch.Tensor) -> None:
    """Nowhere more than a few of 255 levels apart, and hardly at all on average."""
    assert ours.shape == expected.shape and ours.dtype == expected.dtype == torch.uint8
    difference = (ours.int() - expected.int()).abs().float()
    assert difference.max() <= 10 and difference.mean() < 0.5


KINDS = {
    "colour": lambda: stored(photo(), quality=92),
    "full chroma": lambda: stored(photo(), quality=95, subsampling=0),
    "progressive": lambda: stored(photo(), quality=90, progressive=True),
    "grey": lambda: stored(photo().convert("L")),
    "restart markers": lambda: stored(photo(), restart_marker_blocks=8),
}


@pytest.mark.parametrize("kind", KINDS)
def test_jpeg_decoded_by_torch_is_pillows_picture(kind):
    contents = KINDS[kind]()
    fast, slow = decode(contents, "fast"), decode(contents, "pil")
    assert isinstance(fast, torch.Tensor) and size_of(fast) == size_of(slow) == (200, 150)
    assert np.array_equal(np.asarray(to_image(fast)), np.asarray(slow))


OTHERS = {
    "cmyk": lambda: stored(photo().convert("CMYK")),
    "png": lambda: stored(photo(), "PNG"),
    "palette": lambda: stored(photo().convert("P"), "GIF"),
    "webp": lambda: stored(photo(), "WEBP"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_files_go_through_pillow(kind):
    contents = OTHERS[kind]()
    fast, slow = decode(contents, "fast"), decode(contents, "pil")
    assert isinstance(fast, Image.Image)
    assert fast.tobytes() == slow.tobytes()


@pytest.mark.parametrize("side, min_crop", [(64, 0.2), (280, 0.2), (64, 0.9)])
def test_training_crops_are_pillows(side, min_crop):
    """Smaller and larger than the picture, mirrored and not."""
    transform = TrainTransform(side, min_crop, flip=True, seed=0)
    contents = KINDS["colour"]()
    for index in range(12):
        fast, slow = (transform(decode(contents, name), 3, index) for name in ("fast", "pil"))
        assert_alike(fast, slow)


@pytest.mark.parametrize("size", [(200, 150), (150, 201), (40, 30)])
def test_evaluation_crops_are_pillows(size):
    contents = stored(photo(*size), quality=95)
    fast, slow = (EvalTransform(64)(decode(contents, name)) for name in ("fast", "pil"))
    assert_alike(fast, slow)


DAMAGES = {
    "cut off": lambda contents: contents[: len(contents) // 2],
    "only a start": lambda contents: contents[:20],
    "text": lambda contents: bytearray(b"\xff\xd8\xff<html>404</html>"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_pillow_cannot_read_is_unreadable_here_too(damage):
    contents = DAMAGES[damage](KINDS["colour"]())
    for name in ("fast", "pil"):
        with pytest.raises(UNREADABLE):
            decode(contents, name)
