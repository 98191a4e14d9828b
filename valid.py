"""Test weights on the domains they were trained for, or on others.

python valid.py                                     # the weights that come with the code
python valid.py --weights runs/NAME --domains svhn mnist usps
"""

import argparse
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from data_loader import DOMAINS, DigitSet, MissingData, Preprocessing, load_domain
from download_data import fetch
from model import CLASSES, DANN, NETWORKS
from utils import machine
from utils.checkpoint import load_into, load_weights
from utils.cli import UserError, run_script, script_parser
from utils.config import Config, from_dict
from utils.data_files import data_files
from utils.pretrained import find_weights, read_index
from utils.run_log import say

EVALUATION_BATCH = 1000


@dataclass(frozen=True)
class Evaluation:
    """The outcome of a test: counts, rows the true digit, columns the predicted, and the digit read in each image.

    Shape: confusion (10, 10) int64, predicted (N,) int64
    """

    confusion: Tensor
    predicted: Tensor

    @property
    def correct(self) -> int:
        """Number of images read right."""
        return int(self.confusion.trace())

    @property
    def total(self) -> int:
        """Number of images."""
        return int(self.confusion.sum())

    @property
    def accuracy(self) -> float:
        """correct / total, in [0, 1]."""
        return self.correct / self.total


@torch.inference_mode()
def outputs(
    module: nn.Module, images: Tensor, preprocess: Preprocessing, device: torch.device, precision: str
) -> Tensor:
    """What a network, or its extractor, makes of uint8 images of any size, in eval mode; its own mode is restored.

    Shape: (N, C, H, W) uint8 -> (N, F) float32 on the device
    """
    was_training = module.training
    module.eval()
    parts = []
    for part in images.split(EVALUATION_BATCH):
        with machine.autocast(device, precision):
            parts.append(module(preprocess(part.to(device))).float())
    module.train(was_training)
    return torch.cat(parts)


def predict(model: DANN, images: Tensor, preprocess: Preprocessing, device: torch.device, precision: str) -> Tensor:
    """Class probabilities of uint8 images of any size. Shape: (N, C, H, W) uint8 -> (N, 10) float32 on the CPU."""
    return outputs(model, images, preprocess, device, precision).softmax(1).cpu()


def evaluate(
    model: DANN, digits: DigitSet, preprocess: Preprocessing, device: torch.device, precision: str
) -> Evaluation:
    """Count right and wrong over a test set: the only accuracy code of this project."""
    predicted = predict(model, digits.images, preprocess, device, precision).argmax(1)
    pairs = digits.labels.cpu() * CLASSES + predicted
    return Evaluation(torch.bincount(pairs, minlength=CLASSES**2).view(CLASSES, CLASSES), predicted)


@dataclass(frozen=True)
class Reader:
    """A network with its weights, and what has to be done to images before it sees them."""

    model: DANN
    preprocess: Preprocessing
    config: Config
    path: Path

    def precision_on(self, device: torch.device) -> str:
        """As trained, or fp32 where the machine has no bf16."""
        return self.config.precision if machine.has_bf16(device) else "fp32"


def load_reader(name: str | None, device: torch.device, allow_download: bool = True) -> Reader:
    """Load weights by name, path or URL, as `utils.pretrained.find_weights` takes them."""
    path = find_weights(name, allow_download)
    weights, about = load_weights(path)
    try:
        config = from_dict(about["config"])
        preprocess = Preprocessing(**{**about["preprocessing"], "mean": tuple(about["preprocessing"]["mean"])})
        known = config.network in NETWORKS
    except (KeyError, TypeError):
        known = False
    if not known:
        raise UserError(f"{path} does not say which network its weights belong to: use a file that main.py wrote")
    model = DANN(config.network, config.dropout)
    load_into(model, weights, path, config.network)
    return Reader(model.to(device, memory_format=torch.channels_last).eval(), preprocess, config, path)


def load_or_fetch(name: str, split: str, data_dir: Path, download: bool) -> DigitSet:
    """Read one split of a domain, fetching what is missing when `download` allows it."""
    try:
        return load_domain(name, split, data_dir)
    except MissingData:
        if not download:
            raise
    fetch([name], data_dir, split)
    return load_domain(name, split, data_dir)


def load_side_by_side(keys: list[tuple[str, str]], data_dir: Path, download: bool) -> dict[tuple[str, str], DigitSet]:
    """Read several (domain, split) at once, which takes less than half the time, then fetch those that are missing."""

    def read(key: tuple[str, str]) -> DigitSet | None:
        try:
            return load_domain(*key, data_dir)
        except MissingData:
            return None

    files = [key for key in keys if data_files(*key)]  # domains that are made here start processes: never in a thread
    with ThreadPoolExecutor() as pool:
        sets = dict(zip(files, pool.map(read, files), strict=True))
    return {key: sets.get(key) or load_or_fetch(*key, data_dir, download) for key in keys}


def read_test_sets(names: list[str], data_dir: Path, download: bool) -> tuple[list[DigitSet], dict[str, str]]:
    """The test sets that can be had, and for each other domain what is wrong and which command brings it."""
    sets, missing = [], {}
    for name in names:
        try:
            sets.append(load_or_fetch(name, "test", data_dir, download))
        except UserError as error:
            missing[name] = str(error)
            if not isinstance(error, MissingData):  # the network, most likely: it is not waited for again
                download = False
    return sets, missing


def confusion_table(confusion: Tensor) -> str:
    """A matrix of counts for the screen: rows the true digit, columns the predicted one."""
    rows = ["true \\ read" + "".join(f"{digit:6d}" for digit in range(CLASSES))]
    rows += [f"{digit:11d}" + "".join(f"{n:6d}" for n in row) for digit, row in enumerate(confusion.tolist())]
    return "\n".join(rows)


def parse_arguments() -> argparse.Namespace:
    parser = script_parser(
        description="Test weights on the test sets of their two domains, or on others.",
        epilog="examples:\n"
        "  python valid.py                                            weights that come with the code\n"
        "  python valid.py --weights runs/NAME --domains svhn mnist   a run of yours, on two test sets",
    )
    parser.add_argument(
        "--weights",
        metavar="NAME",
        help="a name in pretrained/index.json (default: its default), a weights file, a run folder or a URL#sha256=…",
    )
    parser.add_argument(
        "--domains", nargs="+", choices=("all", *DOMAINS), metavar="DOMAIN",
        help=f"test sets: {', '.join(DOMAINS)}, or all that are at hand (default: the two of the training)",
    )  # fmt: skip
    parser.add_argument("--confusion", action="store_true", help="print the confusion matrices")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), metavar="DIR", help="(default: %(default)s)")
    parser.add_argument(
        "--download",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="fetch what is missing (default: yes)",
    )
    machine.add_device_argument(parser)
    parser.add_argument(
        "--precision", choices=("as-trained", "fp32", "bf16"), default="as-trained",
        help="as-trained is fp32 where the machine has no bf16 (default: %(default)s)",
    )  # fmt: skip
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    device = machine.choose_device(args.device)
    machine.keep_memory(device)
    reader = load_reader(args.weights, device, args.download)
    precision = reader.precision_on(device) if args.precision == "as-trained" else args.precision
    everything = bool(args.domains) and "all" in args.domains
    names = list(DOMAINS) if everything else args.domains or [reader.config.source, reader.config.target]
    say(f"{machine.header(device, precision)}; weights {reader.path}")

    # `all` means all that are at hand: it does not fetch gigabytes that nobody named.
    sets, missing = read_test_sets(list(dict.fromkeys(names)), args.data_dir, args.download and not everything)
    if not sets and not args.domains:
        built_in = [name for name in DOMAINS if not data_files(name, "test")]
        say(f"none of its own test sets is at hand: tested on {' and '.join(built_in)}, which come with the code")
        sets, _ = read_test_sets(built_in, args.data_dir, False)
    if not sets:
        raise UserError("nothing could be tested: " + "; ".join(missing.values()))
    results = {}
    print(f"{'test set':28} {'accuracy':>9}  correct / total")
    for digits in sets:
        tested = evaluate(reader.model, digits, reader.preprocess, device, precision)
        print(f"{digits.mark:28} {tested.accuracy:9.2%}  {tested.correct} / {tested.total}", flush=True)
        results[digits.domain] = {
            "accuracy": tested.accuracy,
            "correct": tested.correct,
            "total": tested.total,
        }
        if digits.mark != DOMAINS[digits.domain].title:
            results[digits.domain]["data"] = digits.mark
        if args.confusion:
            print(confusion_table(tested.confusion))
    for name, reason in missing.items():
        print(f"{DOMAINS[name].title:28} not tested: {reason}")
    print(json.dumps({"weights": args.weights or read_index()["default"], "domains": results}, ensure_ascii=False))


if __name__ == "__main__":
    run_script(main)
