"""What a reader may return: understood where it means one thing, else refused in a line that says what is wanted."""

import numpy as np
import pytest
import torch

from digits.contract import checked
from utils.cli import UserError

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (6, 1, 9, 7), dtype=np.uint8)
COLOUR = RNG.integers(0, 256, (6, 3, 9, 7), dtype=np.uint8)
LABELS = np.arange(6)
OPAQUE = np.concatenate((COLOUR, np.full((6, 1, 9, 7), 255, np.uint8)), 1)


UNDERSTOOD = [
    (COLOUR, COLOUR), (torch.from_numpy(COLOUR), COLOUR), (GREY[:, 0], GREY), (COLOUR.transpose(0, 2, 3, 1), COLOUR),
    (GREY.transpose(0, 2, 3, 1), GREY), (OPAQUE, COLOUR), (OPAQUE.transpose(0, 2, 3, 1), COLOUR),
    (COLOUR / 255, COLOUR), ((OPAQUE / 255).astype(np.float32), COLOUR), (COLOUR.astype(np.float64), COLOUR),
    (COLOUR.astype(np.int32), COLOUR),
]  # fmt: skip


@pytest.mark.parametrize(("images", "expected"), UNDERSTOOD)
def test_what_is_understood(images, expected):
    x, y = checked("mine", "train", images, LABELS, 10)
    assert (x.dtype, y.dtype, x.is_contiguous()) == (torch.uint8, torch.int64, True)
    assert np.array_equal(x.numpy(), expected)


@pytest.mark.parametrize("labels", [LABELS.astype(np.uint8), LABELS.astype(float), LABELS[:, None], torch.arange(6)])
def test_labels_that_are_understood(labels):
    assert checked("mine", "train", GREY, labels, 6)[1].tolist() == [*range(6)]


CLEAR = OPAQUE.copy()
CLEAR[0, 3, 0, 0] = 254
REFUSED = [
    (GREY[0, 0], LABELS, r"\(9, 7\)"), (GREY.repeat(2, 1), LABELS, "C = 1 or 3"),
    (CLEAR, LABELS, "not opaque"),
    (COLOUR / 127, LABELS, "from 0 to 2.0"), (COLOUR - 1.5, LABELS, r"float64 from -1\.5"),
    (COLOUR.astype(np.int64) * 2, LABELS, "int64 from 0 to 510"), (np.full((6, 9, 7), np.nan), LABELS, "not finite"),
    (GREY > 9, LABELS, "type bool"), (GREY, LABELS[:5], "6 images but 5 labels"), (GREY[:0], LABELS[:0], "0 images"),
    (GREY, np.eye(6), r"float64 \(6, 6\)"), (GREY, LABELS / 2, "whole number"), (GREY, LABELS.astype(str), "<U"),
    (GREY, LABELS * 2, "from 0 to 10: wanted are 0 to 9"), (GREY, LABELS - 2, "from -2 to 3"),
]  # fmt: skip


@pytest.mark.parametrize(("images", "labels", "found"), REFUSED)
def test_what_is_refused(images, labels, found):
    with pytest.raises(UserError, match=rf"^the test images of mine\b.*{found}") as caught:
        checked("mine", "test", images, labels, 10)
    assert "wanted" in str(caught.value)
    assert "\n" not in str(caught.value)
