"""Draw what a run has learnt: features, network, samples, curves, confusion matrix and misread digits, as PNG.

    python tools/figures.py                               # the README's figures, into results/figures
    python tools/figures.py RUN --compare SOURCE_ONLY_RUN # any run's, into RUN/figures

The README's figures come from the two runs that are kept in results/figures; its README says how they were trained.
"""

import argparse
import json
import sys
from pathlib import Path

import matplotlib

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools.figure_architecture import architecture_figure  # noqa: E402
from tools.figure_curves import curves_figure  # noqa: E402
from tools.figure_data import Network, load_domains, load_network, side_by_side  # noqa: E402
from tools.figure_features import features_figure  # noqa: E402
from tools.figure_samples import samples_figure  # noqa: E402
from utils import machine  # noqa: E402
from utils.cli import run_script, script_parser  # noqa: E402
from utils.files import make_folder, write_json  # noqa: E402
from utils.plots import STYLE, confusion_figure, misread_figure, save_figure  # noqa: E402
from utils.run_log import say  # noqa: E402

KEPT = ROOT / "results" / "figures"


def parse_arguments() -> argparse.Namespace:
    parser = script_parser(
        description="Draw the figures of a run; without arguments those of the README.",
        epilog="examples:\n"
        "  python tools/figures.py                                  the README's figures, into results/figures\n"
        "  python tools/figures.py runs/dann --compare runs/source-only",
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
    config = network.config
    keys = ("recipe", "source", "target", "method", "network", "seed")
    return {"label": network.label, **{key: getattr(config, key) for key in keys}}


def draw(networks: list[Network], args: argparse.Namespace) -> dict:
    """Draw and save every figure; returns the numbers that stand in them."""
    run = networks[-1]
    domains = load_domains(run.config, args.data_dir, args.download)
    make_folder(args.out)
    numbers = [about(network) for network in networks]

    def save(name: str, figure) -> None:
        save_figure(figure, args.out / f"{name}.png")
        say(f"{args.out / name}.png")

    with matplotlib.rc_context(STYLE):
        save("architecture", architecture_figure(run, domains))
        save("samples", samples_figure(run, domains))
        save("curves", curves_figure(networks))
        target = domains.target_test
        tested = {network.label: network.evaluate(target) for network in networks}
        confusions = {name: outcome.confusion for name, outcome in tested.items()}
        save("confusion", confusion_figure(confusions, target.mark))
        readings = {name: outcome.predicted for name, outcome in tested.items()}
        figure, misread = misread_figure(readings, target, run.reader.preprocess.image_size)
        save("misread", figure)
        figure, features = features_figure(networks, domains)
        save("features", figure)
    for entry, outcome, found in zip(numbers, tested.values(), features, strict=True):
        entry |= {"target_correct": outcome.correct, "target_total": outcome.total, **found}
    return {"kind": "figures", "networks": numbers, "target_test_digits": misread}


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
