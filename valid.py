"""Test weights on the domains they were trained for, or on others.

python valid.py                                     # the weights that come with the code
python valid.py --weights runs/NAME --domains svhn mnist usps
"""

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from data_loader import CLASS_NAMES, DigitSet, relabelled
from digits.domains import DOMAINS, check_name, load_test_sets, same_domain, title
from digits.files import data_files
from methods.classifier import Classifier, Evaluation, load_classifier
from methods.export import ENDINGS, TOLERANCE, export, largest_difference, load_export
from utils import machine
from utils.cli import UserError, run_script, say, script_parser
from utils.pretrained import read_index
from watch.screen import ACCURACY_HEADER, accuracy_line

EXPORTED = Path("runs/exported")


def evaluate(classifier: Classifier, digits: DigitSet, domain: str | None = None) -> Evaluation:
    """Count right and wrong over a test set: the only accuracy code of this project.

    Args:
        domain: whose batch statistics count, "source" or "target"; None: the source's for the domain that the network
            was trained on with labels, the target's for all others.
    """
    classes = len(classifier.classes)
    if not len(digits):
        return Evaluation(torch.zeros(classes, classes, dtype=torch.int64), digits.labels)
    domain = domain or ("source" if same_domain(digits.domain, classifier.source) else "target")
    predicted = classifier.probabilities(digits.images, domain).argmax(1)
    pairs = digits.labels.cpu() * classes + predicted
    return Evaluation(torch.bincount(pairs, minlength=classes**2).view(classes, classes), predicted)


def confusion_table(confusion: Tensor, classes: tuple[str, ...]) -> str:
    """A matrix of counts for the screen: rows the true class, columns the predicted one."""
    width = max(6, *(len(name) + 2 for name in classes))
    first = max(16, width)
    rows = ["true \\ predicted".rjust(first) + "".join(f"{name:>{width}}" for name in classes)]
    rows += [
        f"{name:>{first}}" + "".join(f"{n:{width}d}" for n in row)
        for name, row in zip(classes, confusion.tolist(), strict=True)
    ]
    return "\n".join(rows)


def parse_arguments() -> argparse.Namespace:
    parser = script_parser(
        description="Test weights on the test sets of their two domains, or on others.",
        epilog="examples:\n"
        "  python valid.py                                            weights that come with the code\n"
        "  python valid.py --weights runs/NAME --domains svhn mnist   a run of yours, on two test sets\n"
        "  python valid.py --weights runs/NAME --domains photos/new   the same on a folder of pictures",
    )
    parser.add_argument(
        "--weights",
        metavar="NAME",
        help="a name in pretrained/index.json (default: its default), a weights file, a run folder or a URL#sha256=…",
    )
    parser.add_argument(
        "--domains", nargs="+", metavar="DOMAIN",
        help=f"test sets: {', '.join(DOMAINS)}, `all` of these that are at hand, or folders of pictures (default: the "
        "two of the training)",
    )  # fmt: skip
    parser.add_argument("--confusion", action="store_true", help="print the confusion matrices")
    parser.add_argument(
        "--export", choices=tuple(ENDINGS), help="write the network into runs/exported as well, and check the file"
    )
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
    machine.prepare(device)
    classifier = load_classifier(args.weights, device, args.download, args.precision)
    for name in args.domains or ():
        if name != "all":
            check_name(name)
    everything = bool(args.domains) and "all" in args.domains
    names = list(DOMAINS) if everything else args.domains or [classifier.source, classifier.target]
    say(f"{machine.header(device, classifier.precision)}; weights {classifier.path}")

    # `all` means all that are at hand: it does not fetch gigabytes that nobody named.
    names = list(dict.fromkeys(names))
    sets, missing = load_test_sets(names, args.data_dir, args.download and not everything, classifier.preprocess)
    if not sets and not args.domains and classifier.classes == CLASS_NAMES:
        built_in = [name for name in DOMAINS if not data_files(name, "test")]
        say(f"none of its own test sets is at hand: tested on {' and '.join(built_in)}, which come with the code")
        sets, _ = load_test_sets(built_in, args.data_dir, False)
    known = []
    for digits in sets:
        try:
            known.append(relabelled(digits, classifier.classes))
        except UserError as error:
            missing[digits.domain] = str(error)
    if not known:
        raise UserError("nothing could be tested: " + "; ".join(missing.values()))
    results: dict[str, dict[str, float | str]] = {}
    print(ACCURACY_HEADER)
    for digits in known:
        tested = evaluate(classifier, digits)
        print(accuracy_line(digits.mark, tested.correct, tested.total), flush=True)
        results[digits.domain] = {
            "accuracy": tested.accuracy,
            "correct": tested.correct,
            "total": tested.total,
        }
        if digits.mark != title(digits.domain):
            results[digits.domain]["data"] = digits.mark
        if args.confusion:
            print(confusion_table(tested.confusion, classifier.classes))
    if args.export:
        path = export(classifier, args.export, EXPORTED)
        for digits in known:
            difference = largest_difference(load_export(path), classifier, digits.images)
            if difference > TOLERANCE:
                raise UserError(
                    f"{path} gives other probabilities than PyTorch: by up to {difference:.2g} on {digits.mark}"
                )
            say(f"wrote {path}: on {digits.mark} its probabilities differ from PyTorch's by at most {difference:.1g}")
    for name, reason in missing.items():
        print(f"{title(name):28} not tested: {reason}")
    print(json.dumps({"weights": args.weights or read_index()["default"], "domains": results}, ensure_ascii=False))


if __name__ == "__main__":
    run_script(main)
