"""MNIST-M: MNIST's digits blended with patches of photographs, the target of the paper's first pair.

Ganin & Lempitsky (2015), section 4: of a digit and a patch that is cut at random from a photograph of BSDS500 the
absolute difference in each channel. In the official test set the digit is black and white: the patch is inverted
wherever a pixel of the digit is above 0, however dark. So it is here. The official set has 59,001 training and 9,001
test images of 32 × 32 pixels, MNIST's 28 × 28 in the middle.
"""

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

SIZE = 32  # pixels, both sides of an image


def blend(digits: np.ndarray, photographs: Sequence[np.ndarray], seed: int, progress: bool = True) -> np.ndarray:
    """Each digit over a patch of a photograph. Image i depends on digit i, the photographs and (seed, i) alone.

    Shape: (N, 28, 28) uint8, photographs (H, W, 3) uint8 of at least 32 × 32 -> (N, 32, 32, 3) uint8
    """
    margin = (SIZE - digits.shape[1]) // 2
    stroke = np.pad(digits > 0, ((0, 0), (margin, margin), (margin, margin)))[..., None]
    images = np.empty((len(digits), SIZE, SIZE, 3), np.uint8)
    bar = tqdm(range(len(digits)), "blending MNIST-M", leave=False, disable=None if progress else True)
    for i in bar:
        rng = np.random.default_rng((seed, i))
        photograph = photographs[int(rng.integers(len(photographs)))]
        top, left = (rng.integers(length - SIZE + 1) for length in photograph.shape[:2])
        patch = photograph[top : top + SIZE, left : left + SIZE]
        images[i] = np.where(stroke[i], 255 - patch, patch)
    return images


def read_photographs(folder: Path) -> list[np.ndarray]:
    """The photographs in a folder's subfolders `train` and `val`, in the order of their names; empty where none are.

    Shape: -> (H, W, 3) uint8 each
    """
    paths = sorted(path for part in ("train", "val") for path in (folder / part).glob("*.jpg"))
    return [np.asarray(Image.open(path).convert("RGB")) for path in paths]


def read_archive(path: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """One split of the official archive: PNG files, and a text with a name and a label a line.

    Raises: ValueError, KeyError, OSError or tarfile.TarError when the archive is damaged or another one.

    Shape: -> (N, 32, 32, 3) uint8, (N,) int64
    """
    with tarfile.open(path) as archive:
        text = archive.extractfile(f"mnist_m/mnist_m_{split}_labels.txt")
        if text is None:
            raise ValueError("its labels are no file")
        number_of = {}
        labels: list[int] = []
        for line in text.read().decode().splitlines():
            name, label = line.split()
            number_of[f"mnist_m/mnist_m_{split}/{name}"] = len(labels)
            labels.append(int(label))
        images, missing = np.empty((len(labels), SIZE, SIZE, 3), np.uint8), set(number_of)
        for member in tqdm(archive, "unpacking MNIST-M", leave=False, disable=None):
            if member.name in missing and (file := archive.extractfile(member)):
                images[number_of[member.name]] = np.asarray(Image.open(io.BytesIO(file.read())).convert("RGB"))
                missing.remove(member.name)
    if missing:
        raise ValueError(f"{len(missing)} of its pictures are missing")
    return images, np.array(labels, dtype=np.int64)
