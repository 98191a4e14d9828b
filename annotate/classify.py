"""The digits of a picture: candidates framed as the network's target domain frames its own, and classified."""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from annotate.boxes import Box, reading_order
from annotate.find_digits import Candidate, frame
from digits.domains import DOMAINS
from methods.classifier import Classifier

SINGLE_SIDE = 32  # pixels: no larger picture of the domains exists, and in a smaller one there is nothing to search
FAINTEST = 16  # of 255: a small picture whose pixels differ by less is blank
MIN_CONFIDENCE = 0.5
# How the domains that show digits light on dark frame them: the share of the side that a digit takes, and where its
# centre of mass stands (None: its box is in the middle). MNIST's own numbers, confirmed on its training digits.
FRAMES = {"mnist": (20 / 28, 14.5 / 28), "usps": (1.0, None), "optdigits": (1.0, None)}
ANY_FRAME = (0.75, None)  # of the domains of photographs, in any colours


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


def framed(candidate: Candidate, classifier: Classifier) -> Tensor:
    """A digit that was found, light on dark, as the network's target domain frames it. Shape: -> (1, 3, S, S) uint8."""
    square = frame(candidate.ink, *FRAMES.get(classifier.target, ANY_FRAME))
    return torch.from_numpy(square)[None, None].expand(1, 3, -1, -1)


def classify(
    picture: Image.Image, candidates: list[Candidate], classifier: Classifier, least: float | None
) -> list[list[Digit]]:
    """The digits of a picture, line by line.

    Args:
        candidates: where there may be digits; a picture that is one digit needs none.
        least: confidence below which a candidate is no digit. None is the default: a picture that is one digit is
            classified in any case.
    """
    single = is_single(picture, classifier)
    if single:
        blank = not takes_any_picture(classifier) and np.ptp(np.asarray(picture.convert("L"))) < FAINTEST
        boxes: list[Box] = [] if blank else [(0, 0, *picture.size)]
        images = [whole(picture, classifier) for _ in boxes]
    else:
        boxes = [candidate.box for candidate in candidates]
        images = [framed(candidate, classifier) for candidate in candidates]
    if not boxes:
        return []
    resized = torch.cat([classifier.preprocess.resize(image) for image in images])
    confidences, digits = classifier.probabilities(resized).max(1)
    if least is None:
        least = 0.0 if single else MIN_CONFIDENCE
    found = [
        Digit(classifier.classes[digit], confidence, box)
        for digit, confidence, box in zip(digits.tolist(), confidences.tolist(), boxes, strict=True)
        if confidence >= least
    ]
    return [[found[i] for i in line] for line in reading_order([digit.box for digit in found])]
