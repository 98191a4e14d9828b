"""Draw what a run has learnt: features, network, samples, curves, confusion matrix, misclassified digits, as PNG.

    python -m tools.figures                               # those of results/figures
    python -m tools.figures RUN --compare SOURCE_ONLY_RUN # any run's, into RUN/figures

The former come from the two runs that are kept in results/figures; its README says how they were trained.
"""

import argparse
import json
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from tools.figure_architecture import architecture_figure
from tools.figure_curves import curves_figure
from tools.figure_data import Network, load_domains, load_network, side_by_side
from tools.figure_features import compared_features
from tools.figure_samples import samples_figure
from utils import machine
from utils.cli import run_script, say, script_parser
from utils.files import make_folder, write_json
from valid import evaluate
from watch.plots import STYLE, confusion_figure, misclassified_figure, save_figure

KEPT = Path(__file__).resolve().parent.parent / "results" / "figures"


def parse_arguments() -> argparse.Namespace:
    parser = script_parser(
        description="Draw the figures of a run; without arguments those of results/figures.",
        epilog="examples:\n"
        "  python -m tools.figures                                   those of results/figures\n"
        "  python -m tools.figures runs/dann --compare runs/source-only",
    )
    parser.add_argument("run", type=Path, nargs="?", metavar="RUN", help="run folder (default: results/figures/dann)")
    parser.add_argument(
        "--compare", type=Path, metavar="RUN",
        help="another run on the same domains to put beside it, such as its source-only run",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the figures (default: RUN/figures)")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), metavar="DIR", help="(default: %(default)s)")
    parser.add_argument(
        "--download", action=argparse.BooleanOptionalAction, default=True, help="fetch missing data (default: yes)"
    )
    machine.add_device_argument(parser)
    args = parser.parse_args()
    if args.compare and not args.run:
        parser.error("--compare needs a RUN to compare with")
    if not args.run:
        args.run, args.compare, args.out = KEPT / "dann", KEPT / "source-only", args.out or KEPT
    args.out = args.out or args.run / "figures"
    return args


def about(network: Network) -> dict:
    """How figures.json names a network."""
    keys = ("recipe", "source", "target", "method", "network", "seed")
    return {"label": network.label, **{key: getattr(network.settings, key) for key in keys}}


def draw(networks: list[Network], args: argparse.Namespace) -> dict:
    """Draw and save every figure; returns the numbers that stand in them."""
    run = networks[-1]
    domains = load_domains(run.classifier, args.data_dir, args.download)
    make_folder(args.out)
    numbers = [about(network) for network in networks]

    def save(name: str, figure: Figure) -> None:
        save_figure(figure, args.out / f"{name}.png")
        say(f"{args.out / name}.png")

    with matplotlib.rc_context(STYLE):
        save("architecture", architecture_figure(run, domains))
        save("samples", samples_figure(run, domains))
        save("curves", curves_figure(networks))
        target = domains.target_test
        tested = {network.label: evaluate(network.classifier, target) for network in networks}
        confusions = {name: outcome.confusion for name, outcome in tested.items()}
        save("confusion", confusion_figure(confusions, target.mark, target.classes))
        predictions = {name: outcome.predicted for name, outcome in tested.items()}
        figure, counts = misclassified_figure(predictions, target, run.classifier.preprocess.image_size)
        save("misclassified", figure)
        figure, features = compared_features(networks, domains)
        save("features", figure)
    for entry, outcome, found in zip(numbers, tested.values(), features, strict=True):
        entry |= {"target_correct": outcome.correct, "target_total": outcome.total, **found}
    return {"kind": "figures", "networks": numbers, "target_test_images": counts}


def main() -> None:
    args = parse_arguments()
    device = machine.choose_device(args.device)
    networks = [load_network(args.run, device)]
    if args.compare:
        networks = side_by_side(networks[0], load_network(args.compare, device), args.compare)
    numbers = draw(networks, args)
    write_json(args.out / "figures.json", numbers)
    print(json.dumps(numbers, ensure_ascii=False))


if __name__ == "__main__":
    run_script(main)
