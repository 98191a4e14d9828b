"""Find the digits in pictures, classify them, and write the pictures with the predictions on them.

python image_annotate.py -f note.jpg
python image_annotate.py -f photos/ --json --weights runs/NAME
"""

import argparse
import itertools
import json
import os
import sys
from pathlib import Path

from PIL import Image, ImageShow
from tqdm import tqdm

from annotate.classify import DETECTOR_SHARE, MIN_CONFIDENCE, SINGLE_SIDE, Digit, classify, is_single
from annotate.detector import detect, load_detector
from annotate.draw import COLOURS, draw_digits, lay_out, side_by_side
from annotate.pictures import output_for, pictures_named, save_picture, sheets_of
from data_loader import CLASS_NAMES
from methods.classifier import load_classifier
from utils import machine
from utils.cli import run_script, say, script_parser
from utils.files import make_folder
from utils.pictures import open_picture

IMAGES = Path(__file__).resolve().parent / "images"


def as_numbers(lines: list[list[Digit]]) -> list[str]:
    """What stands in each line."""
    return ["".join(digit.name for digit in line) for line in lines]


def as_class(name: str) -> dict:
    """A digit as a number, another class by its name."""
    return {"digit": int(name)} if name in CLASS_NAMES else {"class": name}


def as_document(lines: list[list[Digit]]) -> dict:
    """What `--json` says of a picture's digits."""
    return {
        "lines": as_numbers(lines),
        "digits": [
            {**as_class(d.name), "confidence": round(d.confidence, 4), "box": list(d.box)}
            for line in lines
            for d in line
        ],
    }


def print_digits(lines: list[list[Digit]]) -> None:
    """One line a digit in reading order, then the number in each line of digits."""
    if not lines:
        print("  no digit found")
    for digit in itertools.chain(*lines):
        x0, y0, x1, y1 = digit.box
        print(f"  {digit.name}  {digit.confidence:6.1%}  at {x0},{y0} – {x1},{y1}")
    for number in filter(str.isdecimal, as_numbers(lines)):  # other classes make no number
        print(f"  number {number}")


def annotated(picture: Image.Image, classified: list[list[list[Digit]]]) -> list[Image.Image]:
    """For each network the picture, equally large, with a box, the digit and its confidence at each place."""
    found = [list(itertools.chain(*lines)) for lines in classified]
    marks = [([d.box for d in digits], [f"{d.name} {d.confidence:.0%}" for d in digits]) for digits in found]
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
        description="Find every digit in pictures, classify it, and write the pictures with the predictions on them. "
        "Weights that were trained on folders of pictures classify each picture as a whole.",
        epilog="examples:\n"
        "  python image_annotate.py -f note.jpg                     a name in images/, or any path\n"
        "  python image_annotate.py -f photos/ --json               all pictures of a folder\n"
        "  python image_annotate.py -f a.jpg b.jpg --weights runs/DANN --compare runs/SOURCE-ONLY",
    )
    parser.add_argument("-f", "--file", nargs="+", required=True, metavar="IMG", help="pictures, or folders of them")
    parser.add_argument("--weights", metavar="NAME", help="as in valid.py (default: the same)")
    parser.add_argument("--compare", metavar="NAME", help="weights of a second network, whose predictions stand beside")
    parser.add_argument(
        "--min-confidence", type=confidence, metavar="P",
        help=f"leave out what is predicted with less, 0 to 1 (default: {MIN_CONFIDENCE}, and 0 for a picture of at "
        f"most {SINGLE_SIDE} pixels a side, which is one digit)",
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
    sheets = sheets_of(pictures_named(args.file, IMAGES))
    for sheet in sheets:  # all are looked at before one is written, but not kept: a folder may hold more than memory
        open_picture(sheet.path, page=sheet.frame)
    device = machine.choose_device(args.device)
    machine.prepare(device)
    names = [args.weights] if args.compare is None else [args.weights, args.compare]
    classifiers = [load_classifier(name, device, args.download) for name in names]
    detector = load_detector(device, args.download)
    make_folder(args.output_dir)
    documents = []
    for sheet in tqdm(sheets, "annotating", leave=False, disable=None if len(sheets) > 1 else True):
        picture = open_picture(sheet.path, page=sheet.frame)
        single = all(is_single(picture, classifier) for classifier in classifiers)
        detections = [] if single else detect(picture, detector)
        share = DETECTOR_SHARE if args.compare is None else 0.0  # what is compared is the networks alone
        classified = [classify(picture, detections, network, args.min_confidence, share) for network in classifiers]
        pages = annotated(picture, classified)
        page = pages[0]
        if args.compare is not None:
            titles = [f"{name or classifier.path.stem}: {' / '.join(as_numbers(lines)) or 'no digit found'}"
                      for name, classifier, lines in zip(names, classifiers, classified, strict=True)]  # fmt: skip
            page = side_by_side(pages, titles)

        output = output_for(sheet, args.output_dir)
        save_picture(page, output, made_of=sheet)
        document = {"image": str(sheet.path), **({"page": sheet.page} if sheet.page else {})}
        document |= as_document(classified[0])
        if args.compare is not None:
            document["compare"] = {"weights": args.compare, **as_document(classified[1])}
        documents.append(document)
        if not args.json:
            for name, lines in zip(names, classified, strict=True):
                print(f"{sheet}" if args.compare is None else f"{sheet}, {name or 'default weights'}")
                print_digits(lines)
        elif not all(classified):
            say(f"{sheet}: no digit found")
        say(f"wrote {output}")
        if args.show:
            show(page, output)
    if args.json:
        print(json.dumps(documents, ensure_ascii=False))


if __name__ == "__main__":
    run_script(main)
