"""What a reader returns, checked in one place: images and labels as everything else expects them, or one line."""

import numpy as np
import torch
from torch import Tensor

from utils.cli import UserError

WANTED = "wanted are uint8 images (N, C, H, W) with C = 1 or 3"


def checked(domain: str, split: str, images: object, labels: object, classes: int) -> tuple[Tensor, Tensor]:
    """Images and labels in the one form, where what was read means that without doubt.

    Understood are numpy arrays and tensors; images without a channel axis, with it last, with an opaque alpha channel,
    of whole numbers up to 255 in any type, or of floats in [0, 1]; labels of whole numbers in any type, in a column.

    Args:
        classes: how many there are; labels count from 0.

    Raises: UserError, which names the domain, what was found, and what is wanted.

    Shape: (N, H, W), (N, C, H, W) or (N, H, W, C), and (N,) or (N, 1) -> (N, 1 or 3, H, W) uint8 and (N,) int64
    """
    where = f"the {split} images of {domain}"
    x, y = (value.numpy() if isinstance(value, Tensor) else np.asarray(value) for value in (images, labels))
    x = _grey_levels(_channels_first(x, where), where)
    y = y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y
    if y.ndim != 1 or y.dtype.kind not in "iuf" or (y.dtype.kind == "f" and not (y == np.round(y)).all()):
        raise UserError(f"{where} have labels {y.dtype} {y.shape}: wanted is one whole number an image, (N,)")
    if len(x) != len(y) or not len(y):
        raise UserError(f"{where}: {len(x)} images but {len(y)} labels; wanted is one label an image, and any at all")
    if y.min() < 0 or y.max() >= classes:
        raise UserError(f"{where} have labels from {y.min():g} to {y.max():g}: wanted are 0 to {classes - 1}")
    return torch.from_numpy(np.ascontiguousarray(x)), torch.from_numpy(y.astype(np.int64))


def _channels_first(x: np.ndarray, where: str) -> np.ndarray:
    """Shape: -> (N, 1 or 3, H, W)"""
    if x.ndim == 3:
        return x[:, None]
    if x.ndim == 4 and x.shape[1] not in (1, 3, 4):
        x = x.transpose(0, 3, 1, 2)
    if x.ndim != 4 or x.shape[1] not in (1, 3, 4):
        raise UserError(f"{where} are an array {x.shape}: {WANTED}")
    if x.shape[1] == 4:
        if x.size and (x[:, 3] != (1 if x.dtype.kind == "f" else 255)).any():
            raise UserError(f"{where} have an alpha channel that is not opaque: put them on a background; {WANTED}")
        x = x[:, :3]
    return x


def _grey_levels(x: np.ndarray, where: str) -> np.ndarray:
    """Any numbers as uint8, where they can mean grey levels in one way only."""
    if x.dtype == np.uint8 or not x.size:
        return x.astype(np.uint8)
    if x.dtype.kind not in "iuf" or not np.isfinite(x).all():
        raise UserError(f"{where} are of type {x.dtype}, or not finite: {WANTED}")
    low, high = x.min(), x.max()
    if x.dtype.kind == "f" and low >= 0 and high <= 1:
        return (x * 255).round().astype(np.uint8)
    if low >= 0 and high <= 255 and (x == np.round(x)).all():
        return x.astype(np.uint8)
    raise UserError(f"{where} are {x.dtype} from {low:g} to {high:g}: {WANTED}, or floats in [0, 1]")
