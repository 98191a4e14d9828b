"""The digits of a picture: what was found, shown to the network as its domains show theirs, and classified."""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from annotate.boxes import Box, reading_order
from annotate.detector import Detection
from digits.domains import DOMAINS
from methods.classifier import Classifier

SINGLE_SIDE = 32  # pixels: no larger picture of the domains exists, and in a smaller one there is nothing to search
FAINTEST = 16  # of 255: a small picture whose pixels differ by less is blank
MIN_CONFIDENCE, DETECTOR_SHARE = 0.7, 0.7  # chosen with tools.score_annotation: see docs/annotate.md
# How the domains that show digits light on dark frame them: the share of the side that a digit takes, and where its
# centre of mass stands (None: its box is in the middle). MNIST's own numbers, confirmed on its training digits.
FRAMES = {"mnist": (20 / 28, 14.5 / 28), "usps": (1.0, None), "optdigits": (1.0, None)}


@dataclass(frozen=True)
class Digit:
    """One digit as a network classifies it, or what else it knows; the box in pixels of the upright picture."""

    name: str  # of its class
    confidence: float
    box: Box


def takes_any_picture(classifier: Classifier) -> bool:
    """Whether a network was trained on folders of pictures, and classifies each as a whole."""
    return classifier.target not in DOMAINS


def is_single(picture: Image.Image, classifier: Classifier) -> bool:
    """Whether a picture is one image of the network's domains."""
    return max(picture.size) <= SINGLE_SIDE or takes_any_picture(classifier)


def whole(picture: Image.Image, classifier: Classifier) -> Tensor:
    """The picture as one image of the target. Shape: -> (1, 3, H, W) uint8.

    As a digit it is padded to a square, and dark on light becomes light on dark for a network whose target has nothing
    else. For a network trained on folders it stays as it is.
    """
    pixels = np.array(picture)
    if takes_any_picture(classifier):
        return torch.from_numpy(pixels).permute(2, 0, 1)[None]
    border = np.concatenate((pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]))
    ground = np.median(border, axis=0)
    if classifier.target in FRAMES and ground.mean() > (int(pixels.min()) + int(pixels.max())) / 2:
        pixels, ground = 255 - pixels, 255 - ground
    side = max(picture.size)
    square = np.empty((side, side, 3), np.uint8)
    square[:] = ground.astype(np.uint8)
    top, left = (side - picture.height) // 2, (side - picture.width) // 2
    square[top : top + picture.height, left : left + picture.width] = pixels
    return torch.from_numpy(square).permute(2, 0, 1)[None].contiguous()


def frame(ink: np.ndarray, fill: float, centre_of_mass: float | None) -> np.ndarray:
    """A digit in a square, light on dark, as the images of a domain show it.

    Args:
        fill: share of the square's side that the digit's longer side takes.
        centre_of_mass: where it stands, across and down, as a share of the side; None: the box stands in the middle.

    Shape: (H, W) float32 in [0, 1] -> (S, S) uint8
    """
    height, width = ink.shape
    side = max(2, round(max(height, width) / fill))
    x, y, middle = width / 2, height / 2, side / 2
    if centre_of_mass is not None and ink.any():
        x = float(np.average(np.arange(width) + 0.5, weights=ink.sum(0)))
        y = float(np.average(np.arange(height) + 0.5, weights=ink.sum(1)))
        middle = side * centre_of_mass
    left = min(max(0, round(middle - x)), side - width)
    top = min(max(0, round(middle - y)), side - height)
    square = np.zeros((side, side), np.uint8)
    square[top : top + height, left : left + width] = (255 * ink).round().astype(np.uint8)
    return square


def cut_square(picture: Image.Image, box: Box) -> Image.Image:
    """The square around a box, as SVHN's crops were cut; beyond the picture its edge goes on."""
    x0, y0, x1, y1 = box
    side = max(x1 - x0, y1 - y0)
    left, top = (x0 + x1 - side) // 2, (y0 + y1 - side) // 2
    rows, columns = (np.arange(start, start + side).clip(0, most - 1)
                     for start, most in ((top, picture.height), (left, picture.width)))  # fmt: skip
    return Image.fromarray(np.asarray(picture)[rows[:, None], columns])


def ink_in(picture: Image.Image, box: Box) -> np.ndarray:
    """How far each pixel of a box is from the ground, which most of its edge shows. Shape: -> (H, W) in [0, 1]"""
    grey = np.asarray(picture.convert("L").crop(box), np.float32)
    edge = np.concatenate((grey[0], grey[-1], grey[:, 0], grey[:, -1]))
    away = np.abs(grey - np.median(edge))
    return (away / max(1.0, np.percentile(away, 95))).clip(0, 1)


def shown(picture: Image.Image, boxes: list[Box], classifier: Classifier) -> tuple[Tensor, str]:
    """What the network sees of the digits in boxes, and as images of which of its domains.

    A network that knows photographs sees parts of the picture. Another one sees each digit light on dark, framed as its
    target frames its own.

    Shape: -> (N, C, H, W) uint8, resized for the network
    """
    for domain in ("source", "target"):
        if getattr(classifier, domain) not in FRAMES:
            squares = [np.array(cut_square(picture, box)) for box in boxes]
            break
    else:
        domain, how = "target", FRAMES[classifier.target]
        squares = [frame(ink_in(picture, box), *how)[..., None].repeat(3, 2) for box in boxes]
    images = [torch.from_numpy(square).permute(2, 0, 1)[None] for square in squares]
    return torch.cat([classifier.preprocess.resize(image) for image in images]), domain


def classify(
    picture: Image.Image,
    detections: list[Detection],
    classifier: Classifier,
    least: float | None,
    detector_share: float = DETECTOR_SHARE,
) -> list[list[Digit]]:
    """The digits of a picture, line by line.

    Detector and network classify each together: the class has the largest weighted mean of their probabilities. That
    mean, times how probable the detector holds any digit there, is the confidence.

    Args:
        detections: where there are digits; a picture that is one digit needs none.
        least: confidence below which a digit is left out. None is the default: a picture that is one digit is
            classified in any case.
        detector_share: the detector's weight; with 0 the network classifies alone.
    """
    single = is_single(picture, classifier)
    if single:
        if not takes_any_picture(classifier) and np.ptp(np.asarray(picture.convert("L"))) < FAINTEST:
            return []
        images, domain = whole(picture, classifier), "target"
        boxes: list[Box] = [(0, 0, *picture.size)]
    else:
        if not detections:
            return []
        boxes = [detection.box for detection in detections]
        images, domain = shown(picture, boxes, classifier)
    probabilities = classifier.probabilities(images, domain)
    if not single:
        seen = torch.tensor([detection.probabilities for detection in detections])
        probabilities = (1 - detector_share) * seen.sum(1, keepdim=True) * probabilities + detector_share * seen
    confidences, classes = probabilities.max(1)
    if least is None:
        least = 0.0 if single else MIN_CONFIDENCE
    found = [
        Digit(classifier.classes[number], confidence, box)
        for number, confidence, box in zip(classes.tolist(), confidences.tolist(), boxes, strict=True)
        if confidence >= least
    ]
    return [[found[i] for i in line] for line in reading_order([digit.box for digit in found])]
