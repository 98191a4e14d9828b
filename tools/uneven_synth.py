"""Train on the development pair that is as hard as real house numbers: main.py, with another `synth`.

    python -m tools.uneven_synth --recipe modern --source mnist --target synth --epochs 5

Takes every flag of main.py. `synth` becomes 8,535 training and 4,868 test images that are small, dim, noisy and from
JPEG, of some classes three times as many as of others; results call them "degraded synth".
"""

import dataclasses
import io
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import main
from data_loader import CLASS_NAMES
from digits.contract import checked
from digits.domains import DOMAINS
from digits.readers import Reading, read_synth
from utils.cli import run_script

TRAIN_IMAGES = 14_000  # of the training images of `synth`; the others are added to its test images
SHARES = np.geomspace(1, 1 / 3, 10)[np.random.default_rng(7).permutation(10)]  # of each class, which is kept
SMALLEST, DIMMEST, NOISE, QUALITY = 6, 0.12, 4.0, (40, 96)  # pixels; share of the contrast; of 255; of JPEG
SMEARED, REACH = 0.5, (8, 14)  # how often on each side, and from how many pixels beside the middle on


def degrade(images: Tensor, seed: int, training: bool) -> Tensor:
    """Images as a distant camera sees them: fewer pixels, less contrast, noise, JPEG.

    Training images also lose their colours and, often, what stands beside the digit: edge pixels are smeared over it.

    Shape: (N, 3, 32, 32) uint8 -> (N, 3, 32, 32) uint8
    """
    generator = np.random.default_rng(seed)
    count, side = len(images), images.shape[-1]
    pixels = np.exp(generator.uniform(np.log(SMALLEST), np.log(side), count)).round().astype(int)
    x = images.float()
    if training:
        x = x.mean(1, keepdim=True).expand(-1, 3, -1, -1).contiguous()
    for size in np.unique(pixels[pixels < side]):
        index = torch.from_numpy(np.flatnonzero(pixels == size))
        small = F.interpolate(x[index], (int(size), int(size)), mode="bilinear", antialias=True)
        x[index] = F.interpolate(small, (side, side), mode="bicubic").clamp(0, 255)
    contrast = torch.from_numpy(np.exp(generator.uniform(np.log(DIMMEST), 0, count))).float().view(-1, 1, 1, 1)
    mean = x.mean((1, 2, 3), keepdim=True)
    noise = torch.from_numpy(generator.normal(0, 1, x.shape)).float()
    noise *= torch.from_numpy(generator.uniform(0, NOISE, (count, 1, 1, 1))).float()
    x = mean + (x - mean) * contrast + (noise[:, :1] if training else noise)
    array = x.clamp(0, 255).round().byte().permute(0, 2, 3, 1).numpy()

    quality = generator.integers(*QUALITY, count)
    smeared = generator.random((count, 2)) < SMEARED
    reach = generator.integers(*REACH, (count, 2))
    for number in range(count):
        file = io.BytesIO()
        Image.fromarray(array[number]).save(file, "JPEG", quality=int(quality[number]))
        image = np.array(Image.open(file))
        if training:
            image[:] = image.mean(2, keepdims=True).round().astype(np.uint8)
            left, right = side // 2 - reach[number, 0], side // 2 + reach[number, 1]
            if smeared[number, 0]:
                image[:, :left] = image[:, left, None]
            if smeared[number, 1]:
                image[:, right:] = image[:, right - 1, None]
        array[number] = image
    return torch.from_numpy(array).permute(0, 3, 1, 2).contiguous()


def uneven(labels: Tensor, seed: int) -> Tensor:
    """Indices of images of which each class keeps its share of SHARES. Shape: (N,) -> (M,), M ≤ N."""
    return torch.from_numpy(np.flatnonzero(np.random.default_rng(seed).random(len(labels)) < SHARES[labels.numpy()]))


def synth(data_dir: Path, split: str) -> tuple[Tensor, Tensor]:
    """One split of `synth`. Shape: -> (N, 3, 32, 32) uint8, (N,) int64"""
    reading = read_synth(data_dir, split)
    return checked("synth", split, reading.images, reading.labels, len(CLASS_NAMES))


def read_uneven_synth(data_dir: Path, split: str) -> Reading:
    """One split of the degraded, uneven `synth`, made anew each time, in seconds."""
    images, labels = synth(data_dir, "train")
    if split == "train":
        images, labels = images[:TRAIN_IMAGES], labels[:TRAIN_IMAGES]
    else:
        more, more_labels = synth(data_dir, "test")
        images, labels = torch.cat((images[TRAIN_IMAGES:], more)), torch.cat((labels[TRAIN_IMAGES:], more_labels))
    kept = uneven(labels, 1 if split == "train" else 2)
    seen = degrade(images[kept], 3 if split == "train" else 4, split == "train")
    return Reading(seen.numpy(), labels[kept].numpy())


def run() -> None:
    """What main.py does, with `synth` replaced."""
    DOMAINS["synth"] = dataclasses.replace(DOMAINS["synth"], title="degraded synth", read=read_uneven_synth)
    main.main()


if __name__ == "__main__":
    run_script(run)
