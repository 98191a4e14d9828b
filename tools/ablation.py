"""Train the recipe `modern` with one part off at a time, on a schedule of about a third, into results/ablation.

The teacher has two views, as it had in the recipe before the ablation showed that the second gives nothing.

    python tools/ablation.py                  # all runs that results/ablation lacks, one after the other
    python tools/ablation.py --jobs 2         # two at a time, with one thread each

tools/report.py makes the README's table of them.
"""

import argparse
import itertools
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools.report_ablation import RECIPE, VARIANTS  # noqa: E402
from utils.cli import Interrupted, UserError, run_script, script_parser  # noqa: E402
from utils.files import make_folder  # noqa: E402
from utils.run_log import say  # noqa: E402

PAIRS = (("svhn", "mnist"), ("mnist", "svhn"))
SCHEDULE = ("--epochs", "4", "--epoch-steps", "160")


def parse_arguments() -> argparse.Namespace:
    parser = script_parser(
        description="Train the recipe modern, its teacher with two views, with one part off at a time.",
        epilog="examples:\n"
        "  python tools/ablation.py --jobs 2\n"
        '  python tools/ablation.py --pairs svhn-mnist --variants "everything" "no reversal" --seeds 0',
    )
    pairs = [f"{source}-{target}" for source, target in PAIRS]
    option = parser.add_argument
    option("--pairs", nargs="+", choices=pairs, default=pairs, metavar="PAIR", help=f"(default: {' '.join(pairs)})")
    option(
        "--variants", nargs="+", choices=tuple(VARIANTS), default=tuple(VARIANTS), metavar="VARIANT",
        help=f"{', '.join(VARIANTS)} (default: all)",
    )  # fmt: skip
    option("--seeds", type=int, nargs="+", default=(0, 1, 2), metavar="N", help="(default: 0 1 2)")
    option("--jobs", type=int, default=1, metavar="N", help="runs at a time; several have a thread each (default: 1)")
    option("--out", type=Path, default=ROOT / "results/ablation", metavar="DIR", help="(default: results/ablation)")
    option("--runs", type=Path, default=Path("runs/ablation"), metavar="DIR", help="run folders (default: %(default)s)")
    option("--data-dir", type=Path, default=Path("data"), metavar="DIR", help="(default: %(default)s)")
    option("--dry-run", action="store_true", help="two epochs on a few images each, and no results")
    args = parser.parse_args()
    if args.jobs < 1:
        raise UserError(f"--jobs must be above 0, not {args.jobs}")
    return args


def train(pair: str, variant: str, seed: int, args: argparse.Namespace) -> None:
    """One run, or the rest of one that was interrupted; its result goes to the results folder."""
    name = f"{variant.replace(' ', '-')}-seed{seed}"
    goal, folder = args.out / pair / f"{name}.json", args.runs / pair / name
    if goal.exists():
        return
    command = [sys.executable, os.path.relpath(ROOT / "main.py")]
    if (folder / "last.pt").exists():
        command += ["--resume", str(folder)]
    else:
        source, target = pair.split("-")
        command += [*RECIPE, "--source", source, "--target", target, *SCHEDULE, *VARIANTS[variant]]
        command += ["--seed", str(seed), "--run-dir", str(folder)]
    command += ["--data-dir", str(args.data_dir)] if args.data_dir != Path("data") else []
    command += ["--threads", "1"] if args.jobs > 1 else []
    command += ["--dry-run"] if args.dry_run else []
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 130:
        raise Interrupted("interrupted: the same command goes on")
    if done.returncode:
        raise UserError(f"{pair}, {variant}, seed {seed} failed: {done.stderr.strip().splitlines()[-1]}")
    if not args.dry_run:
        make_folder(goal.parent)
        shutil.copyfile(folder / "result.json", goal)
    say(f"{pair}, {variant}, seed {seed}: {done.stdout.strip().splitlines()[-2]}")


def main() -> None:
    args = parse_arguments()
    with ThreadPoolExecutor(args.jobs) as pool:
        jobs = [pool.submit(train, *job, args) for job in itertools.product(args.pairs, args.variants, args.seeds)]
        try:
            for job in jobs:
                job.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


if __name__ == "__main__":
    run_script(main)
