"""A folder of JPEG files like those of ImageNet, of noise with the statistics of photographs."""

from pathlib import Path

import numpy as np
from PIL import Image

SIZES = [(500, 375), (375, 500), (500, 333)]  # the most frequent ones of ImageNet
CLASSES = 10


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


def write_photos(folder: Path, count: int, seed: int = 0) -> None:
    """folder/train/CLASS/*.jpg, quality 90 to 95."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        target = folder / "train" / f"class{number % CLASSES}" / f"{number:06}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        pixels = natural_noise(*SIZES[number % len(SIZES)], rng)
        Image.fromarray(pixels).save(target, quality=int(rng.integers(90, 96)))
