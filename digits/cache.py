"""Sets of images that take a while to make: made once, and kept in a file."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from utils.cli import UserError, say
from utils.files import write_atomically

ImageSet = tuple[np.ndarray, np.ndarray]  # images (N, 32, 32, 3) uint8, labels (N,) int64


def cached(name: str, count: int, folders: Sequence[Path], make: Callable[[], ImageSet]) -> ImageSet:
    """The images and labels in a cache file, or what `make` returns, which is then cached.

    Args:
        name: path of the file below the folders; what the images depend on is in it.
        count: how many images there are.
        folders: the first that has the file is read; if none has it, the first that can be written gets it; if none
            can, one line on stderr says so.
    """
    paths = [folder / name for folder in folders]
    for path in paths:
        try:
            return _read(path, count)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except Exception as error:  # numpy and zipfile raise almost anything on damaged bytes
            say(f"{path} is damaged ({type(error).__name__}): making it again")
    images, labels = make()
    failures: list[Exception] = []
    for path in paths:
        try:
            _write(path, images, labels)
            break
        except (OSError, UserError) as error:
            failures.append(error)
    if len(failures) == len(paths):
        say(f"{name} is not cached: {'; '.join(map(str, failures))}")
    return images, labels


def _read(path: Path, count: int) -> ImageSet:
    with np.load(path) as file:
        images, labels = file["images"], file["labels"]
    if images.shape != (count, 32, 32, 3) or images.dtype != np.uint8 or labels.shape != (count,):
        raise ValueError(f"{path} holds {images.dtype} {images.shape}")
    return images, labels


def _write(path: Path, images: np.ndarray, labels: np.ndarray) -> None:
    def save(part: Path) -> None:
        with part.open("wb") as file:  # under a name, savez would append .npz to it
            np.savez(file, images=images, labels=labels)

    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, save)
