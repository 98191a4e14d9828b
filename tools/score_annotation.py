"""Measure what `image_annotate.py` finds: on pictures whose digits are known, and on pictures made of held-out digits.

A digit counts as right where its box and the true one share at least 0.3 of what they cover together, and the digit is
that one. Pictures of your own need a JSON file: {"name.png": [[digit, [x0, y0, x1, y1]], …]}.
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from tqdm import tqdm

from annotate.boxes import Box
from annotate.classify import MIN_CONFIDENCE, Digit, classify
from annotate.detector import detect, load_detector
from digits.domains import load_domain
from methods.classifier import load_classifier
from tools.compose import compose, hits
from tools.scenes import make_picture
from tools.train_detector import material_of
from utils import machine
from utils.cli import UserError, run_script, script_parser
from utils.files import write_json
from utils.pictures import open_picture
from watch.plots import REFERENCE, STYLE, new_figure, save_figure

SAME_PLACE = 0.3  # least overlap of a box and the true one
CONFIDENCES = (0.3, 0.4, 0.5, 0.6, 0.65, 0.7, 0.8, 0.9)
BOUNDS = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 1.01)  # of confidence, in the reliability diagram
Truth = list[tuple[int, Box]]


@dataclass
class Score:
    """Counts over pictures: true digits, found ones, those at a true place and those that are right; whole pictures."""

    pictures: int = 0
    true: int = 0
    found: int = 0
    placed: int = 0
    right: int = 0
    whole: int = 0

    def add(self, found: list[Digit], true: Truth) -> list[bool]:
        """Count a picture; which of the found digits are right."""
        places = dict(hits([digit.box for digit in found], [box for _, box in true], SAME_PLACE))
        right = [i in places and digit.name == str(true[places[i]][0]) for i, digit in enumerate(found)]
        self.pictures += 1
        self.true += len(true)
        self.found += len(found)
        self.placed += len(places)
        self.right += sum(right)
        self.whole += sum(right) == len(true) == len(found)
        return right

    def figures(self) -> dict:
        """F1, precision, recall, share of pictures whole, and false digits a picture."""
        return {
            "pictures": self.pictures,
            "digits": self.true,
            "f1": round(2 * self.right / max(1, self.found + self.true), 4),
            "precision": round(self.right / max(1, self.found), 4),
            "recall": round(self.right / max(1, self.true), 4),
            "whole": self.whole,
            "false_per_picture": round((self.found - self.placed) / max(1, self.pictures), 3),
        }


@dataclass
class Outcome:
    """Of one set of pictures."""

    scores: dict[float, Score] = field(default_factory=lambda: {least: Score() for least in CONFIDENCES})
    judged: list[tuple[float, bool]] = field(default_factory=list)  # of each digit: confidence, whether it is right
    seconds: list[float] = field(default_factory=list)

    def record(self) -> dict:
        """What result files keep of it."""
        reliability = []
        for low, high in itertools.pairwise(BOUNDS):
            here = [(sure, right) for sure, right in self.judged if low <= sure < high]
            if here:
                mean, share = (round(statistics.fmean(values), 3) for values in zip(*here, strict=True))
                reliability.append({"from": low, "digits": len(here), "confidence": mean, "right": share})
        return {
            **self.scores[MIN_CONFIDENCE].figures(),
            "seconds_median": round(statistics.median(self.seconds), 3),
            "by_least_confidence": {str(least): score.figures() for least, score in self.scores.items()},
            "reliability": reliability,
        }


def pictures_in(folder: Path, truth: Path) -> Iterator[tuple[Image.Image, Truth]]:
    """Pictures of a folder and what stands in them."""
    try:
        known = json.loads(truth.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {truth} ({error}): name a JSON file as --help shows it") from None
    for name, digits in sorted(known.items()):
        yield open_picture(folder / name), [(digit, tuple(box)) for digit, box in digits]


def made_of_crops(count: int, data_dir: Path, device: torch.device) -> Iterator[tuple[Image.Image, Truth]]:
    """Pictures with a house number each, made of crops and photographs that the detector has not seen."""
    material = material_of(data_dir, "own", device, held_out=True)
    for i in range(count):
        image, placed = make_picture(material, np.random.default_rng((1, i)))
        yield (
            Image.fromarray(image),
            [
                (label, (round(x - w / 2), round(y - h / 2), round(x + w / 2), round(y + h / 2)))
                for x, y, w, h, label in placed
            ],
        )


def composed_pages(count: int, data_dir: Path) -> Iterator[tuple[Image.Image, Truth]]:
    """Pages of MNIST's test digits."""
    test = load_domain("mnist", "test", data_dir)
    images, labels = test.images[:, 0].numpy(), test.labels.numpy()
    for i in range(count):
        page = compose(images, labels, np.random.default_rng((0, i)))
        yield page.picture, list(zip(page.digits, page.boxes, strict=True))


def measure(
    pictures: Iterator[tuple[Image.Image, Truth]], annotate: Callable[[Image.Image], list[Digit]], name: str
) -> Outcome:
    """Annotate all pictures and compare."""
    outcome = Outcome()
    for picture, true in tqdm(pictures, name, leave=False, disable=None):
        began = time.perf_counter()
        digits = annotate(picture)
        outcome.seconds.append(time.perf_counter() - began)
        for least, score in outcome.scores.items():
            shown = [digit for digit in digits if digit.confidence >= least]
            right = score.add(shown, true)
            if least == CONFIDENCES[0]:
                outcome.judged += [(d.confidence, ok) for d, ok in zip(shown, right, strict=True)]
    return outcome


def reliability_figure(sets: dict[str, list[dict]]) -> Figure:
    """How many of the digits of each confidence are right, for each set of pictures."""
    figure = new_figure(4)
    axes = figure.subplots()
    axes.plot([0.3, 1], [0.3, 1], color=REFERENCE, linestyle="--", label="as many as it says")
    for (name, rows), marker in zip(sets.items(), "osD^v", strict=False):
        axes.plot([row["confidence"] for row in rows], [row["right"] for row in rows], marker=marker, label=name)
    axes.set(xlabel="mean confidence", ylabel="share of the digits that is right", xlim=(0.3, 1.02), ylim=(0, 1.02))
    axes.legend(loc="lower right")
    return figure


def main() -> None:
    parser = script_parser(
        description=__doc__,
        epilog="examples:\n"
        "  python -m tools.score_annotation --made 300 --composed 200\n"
        "  python -m tools.score_annotation --pictures photos/ truth.json --record results/annotation.json",
    )
    parser.add_argument(
        "--pictures", nargs=2, type=Path, action="append", default=[], metavar=("DIR", "JSON"),
        help="pictures and their digits; may be given several times",
    )  # fmt: skip
    parser.add_argument("--made", type=int, default=0, metavar="N", help="pictures made of held-out crops of SVHN")
    parser.add_argument("--composed", type=int, default=0, metavar="N", help="pages composed of MNIST's test digits")
    parser.add_argument("--weights", metavar="NAME", help="as in valid.py (default: the same)")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), metavar="DIR", help="(default: %(default)s)")
    parser.add_argument("--record", type=Path, metavar="FILE", help="write the figures into this JSON file")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="draw the reliability diagram into this PNG file")
    parser.add_argument("--threads", type=int, metavar="N", help="of the CPU (default: all)")
    machine.add_device_argument(parser)
    args: argparse.Namespace = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = machine.choose_device(args.device)
    machine.prepare(device)
    classifier, detector = load_classifier(args.weights, device), load_detector(device)

    def annotate(picture: Image.Image) -> list[Digit]:
        return [digit for line in classify(picture, detect(picture, detector), classifier, 0) for digit in line]

    sets = {}
    for folder, truth in args.pictures:
        sets[folder.name] = pictures_in(folder, truth)
    if args.made:
        sets["made of held-out crops"] = made_of_crops(args.made, args.data_dir, device)
    if args.composed:
        sets["composed pages"] = composed_pages(args.composed, args.data_dir)
    records = {}
    for name, pictures in sets.items():
        records[name] = measure(pictures, annotate, name).record()
        print(name)
        for least, figures in records[name]["by_least_confidence"].items():
            print(f"  at least {least}: " + "  ".join(f"{key} {value}" for key, value in figures.items()))
        for row in records[name]["reliability"]:
            print(f"  from {row['from']:.0%} on: {row['digits']:5d} digits, {row['right']:.1%} right")
        print(f"  {records[name]['seconds_median']:.2f} s a picture (median)")
    if args.figure:
        with matplotlib.rc_context(STYLE):
            save_figure(
                reliability_figure({name: record["reliability"] for name, record in records.items()}), args.figure
            )
        print(f"wrote {args.figure}")
    if args.record:
        about = {
            "kind": "annotation", "weights": classifier.path.stem, "threads": torch.get_num_threads(),
            "machine": machine.describe(device), "commit": machine.commit(), "versions": machine.versions(),
        }  # fmt: skip
        write_json(args.record, about | records)
        print(f"wrote {args.record}")


if __name__ == "__main__":
    run_script(main)
