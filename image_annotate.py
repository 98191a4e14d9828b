"""Find the digits in pictures, read them, and write the pictures with the readings on them.

python image_annotate.py -f note.jpg
python image_annotate.py -f photos/ --json --weights runs/NAME
"""

import argparse
import itertools
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageShow
from torch import Tensor

from utils import machine
from utils.boxes import Box, reading_order
from utils.cli import run_script, script_parser
from utils.draw_digits import COLOURS, draw_digits, lay_out, side_by_side
from utils.files import make_folder
from utils.find_digits import Candidate, find_digits, frame
from utils.pictures import open_picture, output_for, pictures_named, save_picture
from utils.run_log import say
from valid import Reader, load_reader, predict

IMAGES = Path(__file__).resolve().parent / "images"
SINGLE_SIDE = 32  # pixels: no larger picture of the domains exists, and in a smaller one there is nothing to search
FAINTEST = 16  # of 255: a small picture whose pixels differ by less is blank
MIN_CONFIDENCE = 0.5
# How the domains that show digits light on dark frame them: the share of the side that a digit takes, and where its
# centre of mass stands (None: its box is in the middle). MNIST's own numbers, confirmed on its training digits.
FRAMES = {"mnist": (20 / 28, 14.5 / 28), "usps": (1.0, None), "optdigits": (1.0, None)}
ANY_FRAME = (0.75, None)  # of the domains of photographs, in any colours


@dataclass(frozen=True)
class Digit:
    """One digit as a network reads it; the box in pixels of the upright picture."""

    digit: int
    confidence: float
    box: Box


def is_single(picture: Image.Image) -> bool:
    """Whether a picture is one digit: as small as the images of the domains."""
    return max(picture.size) <= SINGLE_SIDE


def whole(picture: Image.Image, reader: Reader) -> Tensor:
    """The picture as one digit, padded to a square. Shape: -> (1, 3, S, S) uint8.

    Dark on light becomes light on dark for a network whose target has nothing else.
    """
    pixels = np.asarray(picture)
    border = np.concatenate((pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]))
    ground = np.median(border, axis=0)
    if reader.config.target in FRAMES and ground.mean() > (int(pixels.min()) + int(pixels.max())) / 2:
        pixels, ground = 255 - pixels, 255 - ground
    side = max(picture.size)
    square = np.empty((side, side, 3), np.uint8)
    square[:] = ground.astype(np.uint8)
    top, left = (side - picture.height) // 2, (side - picture.width) // 2
    square[top : top + picture.height, left : left + picture.width] = pixels
    return torch.from_numpy(square).permute(2, 0, 1)[None].contiguous()


def framed(candidate: Candidate, reader: Reader) -> Tensor:
    """A digit that was found, light on dark, as the network's target domain frames it. Shape: -> (1, 3, S, S) uint8."""
    square = frame(candidate.ink, *FRAMES.get(reader.config.target, ANY_FRAME))
    return torch.from_numpy(square)[None, None].expand(1, 3, -1, -1)


def read(
    picture: Image.Image, candidates: list[Candidate], reader: Reader, device: torch.device, least: float | None
) -> list[list[Digit]]:
    """The digits of a picture, line by line.

    Args:
        candidates: where there may be digits; a picture that is one digit needs none.
        least: confidence below which a candidate is no digit. None is the default: a picture that is one digit is
            read in any case.
    """
    if is_single(picture):
        low, high = picture.convert("L").getextrema()
        boxes: list[Box] = [(0, 0, *picture.size)] if high - low >= FAINTEST else []
        images = [whole(picture, reader) for _ in boxes]
    else:
        boxes = [candidate.box for candidate in candidates]
        images = [framed(candidate, reader) for candidate in candidates]
    if not boxes:
        return []
    resized = torch.cat([reader.preprocess.resize(image) for image in images])
    confidences, digits = predict(reader.model, resized, reader.preprocess, device, "fp32").max(1)
    if least is None:
        least = 0.0 if is_single(picture) else MIN_CONFIDENCE
    found = [
        Digit(digit, confidence, box)
        for digit, confidence, box in zip(digits.tolist(), confidences.tolist(), boxes, strict=True)
        if confidence >= least
    ]
    return [[found[i] for i in line] for line in reading_order([digit.box for digit in found])]


def as_numbers(lines: list[list[Digit]]) -> list[str]:
    """What stands in each line."""
    return ["".join(str(digit.digit) for digit in line) for line in lines]


def as_document(lines: list[list[Digit]]) -> dict:
    """What `--json` says of a reading."""
    return {
        "lines": as_numbers(lines),
        "digits": [
            {"digit": d.digit, "confidence": round(d.confidence, 4), "box": list(d.box)} for line in lines for d in line
        ],
    }


def print_reading(lines: list[list[Digit]]) -> None:
    """One line a digit in reading order, then the number in each line."""
    if not lines:
        print("  no digit found")
    for digit in itertools.chain(*lines):
        x0, y0, x1, y1 = digit.box
        print(f"  {digit.digit}  {digit.confidence:6.1%}  at {x0},{y0} – {x1},{y1}")
    for number in as_numbers(lines):
        print(f"  reads {number}")


def annotated(picture: Image.Image, readings: list[list[list[Digit]]]) -> list[Image.Image]:
    """For each reading the picture, equally large, with a box, the digit and its confidence at each place."""
    found = [list(itertools.chain(*lines)) for lines in readings]
    marks = [([d.box for d in digits], [f"{d.digit} {d.confidence:.0%}" for d in digits]) for digits in found]
    scale = max(lay_out(picture.size, boxes, texts).scale for boxes, texts in marks)
    return [draw_digits(picture, *mark, colour, scale) for mark, colour in zip(marks, COLOURS, strict=False)]


def show(page: Image.Image, output: Path) -> None:
    """Open a window with the page, or say that there is no display."""
    headless = sys.platform.startswith("linux") and not any(os.environ.get(k) for k in ("DISPLAY", "WAYLAND_DISPLAY"))
    if headless or not ImageShow.show(page, output.name):
        say(f"there is no display to show it on: open {output}")


def confidence(text: str) -> float:
    """A number from 0 to 1, for argparse."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def parse_arguments() -> argparse.Namespace:
    parser = script_parser(
        description="Find every digit in pictures, read it, and write the pictures with the readings on them.",
        epilog="examples:\n"
        "  python image_annotate.py -f note.jpg                     a name in images/, or any path\n"
        "  python image_annotate.py -f photos/ --json               all pictures of a folder\n"
        "  python image_annotate.py -f a.jpg b.jpg --weights runs/DANN --compare runs/SOURCE-ONLY",
    )
    parser.add_argument(
        "-f", "--file", nargs="+", required=True, metavar="IMG", help="pictures to read, or folders of them"
    )
    parser.add_argument("--weights", metavar="NAME", help="as in valid.py (default: the same)")
    parser.add_argument("--compare", metavar="NAME", help="weights of a second network, whose reading stands beside")
    parser.add_argument(
        "--min-confidence", type=confidence, metavar="P",
        help=f"leave out what is read with less, 0 to 1 (default: {MIN_CONFIDENCE}, and 0 for a picture of at most "
        f"{SINGLE_SIDE} pixels a side, which is one digit)",
    )  # fmt: skip
    parser.add_argument(
        "--output-dir", type=Path, default=Path("runs/annotated"), metavar="DIR", help="(default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document in place of lines")
    parser.add_argument("--show", action="store_true", help="open a window with each annotated picture")
    machine.add_device_argument(parser)
    parser.add_argument(
        "--download", action=argparse.BooleanOptionalAction, default=True, help="fetch missing weights (default: yes)"
    )
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    paths = pictures_named(args.file, IMAGES)
    for path in paths:  # all are looked at before one is written, but not kept: a folder may hold more than memory
        open_picture(path)
    device = machine.choose_device(args.device)
    names = [args.weights] if args.compare is None else [args.weights, args.compare]
    readers = [load_reader(name, device, args.download) for name in names]
    make_folder(args.output_dir)
    documents = []
    for path in paths:
        picture = open_picture(path)
        candidates = [] if is_single(picture) else find_digits(picture)
        readings = [read(picture, candidates, reader, device, args.min_confidence) for reader in readers]
        pages = annotated(picture, readings)
        page = pages[0]
        if args.compare is not None:
            titles = [f"{name or reader.path.stem}: {' / '.join(as_numbers(lines)) or 'no digit found'}"
                      for name, reader, lines in zip(names, readers, readings, strict=True)]  # fmt: skip
            page = side_by_side(pages, titles)

        output = output_for(path, args.output_dir)
        save_picture(page, output, made_of=path)
        document = {"image": str(path), **as_document(readings[0])}
        if args.compare is not None:
            document["compare"] = {"weights": args.compare, **as_document(readings[1])}
        documents.append(document)
        if not args.json:
            for name, lines in zip(names, readings, strict=True):
                print(f"{path}" if args.compare is None else f"{path}, {name or 'default weights'}")
                print_reading(lines)
        elif not all(readings):
            say(f"{path}: no digit found")
        say(f"wrote {output}")
        if args.show:
            show(page, output)
    if args.json:
        print(json.dumps(documents, ensure_ascii=False))


if __name__ == "__main__":
    run_script(main)
