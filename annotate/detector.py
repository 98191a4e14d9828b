"""A network that knows where digits stand in a picture, and what is none.

It is fully convolutional: every fourth pixel of a picture asks whether a digit 18 to 31 pixels high has its middle
there, which one, and where its edges are. A pyramid of smaller and larger copies of the picture shows it digits of
other heights, and of answers that overlap the surest stays. `python -m tools.train_detector` trains it.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from annotate.boxes import Box
from utils import machine
from utils.checkpoint import check_shapes, load_weights
from utils.pretrained import find_detector

CLASSES = 10
NONE = CLASSES  # the eleventh class
STRIDE = 4  # pixels from answer to answer
LEAST_HEIGHT, LARGEST_HEIGHT = 17.5, 31.0  # pixels of the digits that it answers to
USUAL_BOX = (16.0, 24.0)  # pixels, width and height; answers are relative to it
SHIFT = 8.0  # pixels; the unit of a digit's distance from the answer
NEIGHBOURHOOD = 33  # pixels, both sides of the square in which brightness and contrast are made alike
MARGIN = 16  # pixels of edge that are repeated around a picture
PYRAMID_STEP = 1.29  # from copy to copy of the pyramid
SMALLEST = 9.0  # pixels of a digit's height that the largest copy shows large enough
MOST_PIXELS = 1.5e6  # of the largest copy; in larger pictures small digits are not looked for
FAINTEST = 0.2  # confidence below which nothing counts
SAME_DIGIT, WITHIN = 0.15, 0.55  # intersection over union, and over the smaller one, above which the surer one stays


def even_out(images: Tensor) -> Tensor:
    """Colours relative to the mean and the deviation of the grey around them. Shape: (N, 3, H, W) uint8 -> float32"""
    x = images.float() / 255

    def around(values: Tensor) -> Tensor:
        for window in ((NEIGHBOURHOOD, 1), (1, NEIGHBOURHOOD)):  # one after the other: a fifteenth of the work
            margins = (window[0] // 2, window[1] // 2)
            values = F.avg_pool2d(values, window, 1, margins, count_include_pad=False)
        return values

    grey = x.mean(1, keepdim=True)
    mean = around(grey)
    deviation = around((grey - mean) ** 2).sqrt()
    return (x - mean) / (deviation + 0.02)


class Detector(nn.Module):
    """Where digits stand.

    Shape: (N, 3, H, W) uint8, H and W multiples of 4 -> logits (N, 11, H / 4, W / 4), the last class being "none", and
    boxes (N, 4, H / 4, W / 4): the middle's shift across and down in units of SHIFT, and the logarithms of width and
    height in units of USUAL_BOX
    """

    def __init__(self) -> None:
        super().__init__()

        def block(inputs: int, outputs: int) -> list[nn.Module]:
            return [
                nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
            ]  # fmt: skip

        self.body = nn.Sequential(
            nn.Conv2d(3, 32, 5, stride=2, padding=2, bias=False), nn.BatchNorm2d(32), nn.ReLU(inplace=True),
            nn.Conv2d(32, 64, 3, padding=1, bias=False), nn.MaxPool2d(2), nn.BatchNorm2d(64), nn.ReLU(inplace=True),
            *block(64, 96), *block(96, 96), *block(96, 128), *block(128, 128),
        )  # fmt: skip
        self.classes, self.boxes = nn.Conv2d(128, CLASSES + 1, 1), nn.Conv2d(128, 4, 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """See the class."""
        features = self.body(even_out(images).contiguous(memory_format=torch.channels_last))
        return self.classes(features), self.boxes(features)


@dataclass(frozen=True)
class Detection:
    """A digit as the detector sees it: how probable each of the ten is, and its box in pixels of the picture.

    What lacks to 1 is how probable none is.
    """

    probabilities: tuple[float, ...]
    box: Box


def load_detector(device: torch.device, allow_download: bool = True) -> Detector:
    """The detector with the weights that come with the code; raises UserError where they can't be had."""
    path = find_detector(allow_download)
    weights, _ = load_weights(path)
    detector = Detector()
    check_shapes(detector, weights, path, "the detector")
    detector.load_state_dict(weights)
    return detector.to(device).to(memory_format=torch.channels_last).eval()


@torch.inference_mode()
def detect(picture: Image.Image, detector: Detector, least: float = FAINTEST) -> list[Detection]:
    """The places of a picture where a digit is more probable than `least`, in no order."""
    device = next(detector.parameters()).device
    precision = machine.choose_precision("auto", device)
    width, height = picture.size
    scale = min(LEAST_HEIGHT / SMALLEST, math.sqrt(MOST_PIXELS / (width * height)))
    probabilities, boxes = [], []
    while LEAST_HEIGHT / scale < height and scale * min(width, height) >= STRIDE:
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        copy = np.asarray(picture.resize(size, Image.Resampling.BILINEAR))
        margins = [(MARGIN, MARGIN + -length % STRIDE) for length in copy.shape[:2]]
        padded = torch.from_numpy(np.pad(copy, (*margins, (0, 0)), "edge")).permute(2, 0, 1)[None]
        with machine.autocast(device, precision):
            logits, offsets = detector(padded.to(device))
        digits = logits[0].float().softmax(0)[:NONE]
        rows, columns = torch.nonzero(digits.amax(0) > least, as_tuple=True)
        x, y, w, h = offsets[0][:, rows, columns].float().cpu().double().numpy()
        x = (columns.cpu().numpy() + 0.5) * STRIDE - MARGIN + SHIFT * x
        y = (rows.cpu().numpy() + 0.5) * STRIDE - MARGIN + SHIFT * y
        w, h = USUAL_BOX[0] * np.exp(w), USUAL_BOX[1] * np.exp(h)
        boxes.append(np.stack((x - w / 2, y - h / 2, x + w / 2, y + h / 2), 1) / scale)
        probabilities.append(digits[:, rows, columns].T.cpu().numpy())
        scale /= PYRAMID_STEP
    if not boxes:
        return []
    found, probable = np.concatenate(boxes), np.concatenate(probabilities)
    middle = (found[:, :2] + found[:, 2:]) / 2
    inside = ((middle > 0) & (middle < (width, height))).all(1)
    found, probable = found[inside].clip(0, (width, height, width, height)), probable[inside]
    return [
        Detection(tuple(probable[i].tolist()), tuple(found[i].round().astype(int).tolist()))
        for i in surest(found, probable.max(1))
    ]


def surest(boxes: np.ndarray, confidences: np.ndarray) -> list[int]:
    """Of boxes that show the same the surest. Shape: boxes (N, 4), confidences (N,) -> indices"""
    kept: list[int] = []
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    waiting = np.argsort(-confidences)
    waiting = waiting[areas[waiting] > 0]
    while len(waiting):
        first, others = waiting[0], waiting[1:]
        kept.append(int(first))
        low, high = np.maximum(boxes[first, :2], boxes[others, :2]), np.minimum(boxes[first, 2:], boxes[others, 2:])
        common = (high - low).clip(0).prod(1)
        smaller = np.minimum(areas[first], areas[others])
        same = (common > SAME_DIGIT * (areas[first] + areas[others] - common)) | (common > WITHIN * smaller)
        waiting = others[~same]
    return kept
