"""Train the recipe `modern` with one part off at a time, on a shorter schedule, into results/ablation.jsonl.

    python -m tools.ablation                  # all runs that the file lacks, one after the other
    python -m tools.ablation --jobs 2         # two at a time, with one thread each

The teacher has two views in all of them but one. tools/report.py makes the table of docs/results.md.
"""

import argparse
import itertools
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from tools.report_ablation import FILE, WHOLE
from tools.tables import Record, json_line, read_records
from utils.cli import Interrupted, UserError, run_script, script_parser

ROOT = Path(__file__).resolve().parent.parent
PAIRS = (("svhn", "mnist"), ("mnist", "svhn"))
RECIPE = ("--recipe", "modern", "--teacher-views", "both", "--epochs", "4", "--epoch-steps", "160")
VARIANTS: dict[str, tuple[str, ...]] = {  # what is off, and the flags that turn it off
    WHOLE: (),
    "no reversal": ("--lambda-max", "0"),
    "plain reversal": ("--adversary", "marginal"),
    "reversal as strong to the end": ("--lambda-schedule", "rising"),
    "no teacher labels": ("--teacher-weight", "0"),
    "neither teacher labels nor reversal": ("--teacher-weight", "0", "--lambda-max", "0"),
    "one view for the teacher": ("--teacher-views", "weak"),
    "no alignment": ("--alignment", "0", "--alignment-after", "0"),
    "alignment to the end": ("--alignment-until", "1"),
    "no alignment in the second half": ("--alignment-after", "0"),
    "no perturbation": ("--perturbation", "0"),
    "no warp": ("--warp", "0"),
    "no label smoothing": ("--label-smoothing", "0"),
    "strong augmentation of all target images": ("--target-strong-share", "1"),
    "strong augmentation to the end": ("--strong-until", "1"),
    "affine augmentation": ("--augmentation", "affine"),
    "source only": ("--method", "source-only"),
}


def parse_arguments() -> argparse.Namespace:
    parser = script_parser(
        description="Train the recipe modern, its teacher with two views, with one part off at a time.",
        epilog="examples:\n"
        "  python -m tools.ablation --jobs 2\n"
        '  python -m tools.ablation --pairs svhn-mnist --variants "everything" "no reversal" --seeds 0',
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
    option("--out", type=Path, default=ROOT / "results" / FILE, metavar="FILE", help=f"(default: results/{FILE})")
    option("--runs", type=Path, default=Path("runs/ablation"), metavar="DIR", help="run folders (default: %(default)s)")
    option("--data-dir", type=Path, default=Path("data"), metavar="DIR", help="(default: %(default)s)")
    option("--dry-run", action="store_true", help="two epochs on a few images each, and no results")
    args = parser.parse_args()
    if args.jobs < 1:
        raise UserError(f"--jobs must be above 0, not {args.jobs}")
    return args


def train(pair: str, variant: str, seed: int, args: argparse.Namespace) -> Record:
    """One run, or the rest of one that was interrupted; returns its result with the variant's name."""
    runs = args.runs / "dry-run" if args.dry_run else args.runs
    folder = runs / pair / f"{variant.replace(' ', '-')}-seed{seed}"
    if not (folder / "result.json").exists():
        command = [sys.executable, "main.py"]
        if (folder / "last.pt").exists():
            command += ["--resume", str(folder)]
        else:
            source, target = pair.split("-")
            command += [*RECIPE, "--source", source, "--target", target, *VARIANTS[variant]]
            command += ["--seed", str(seed), "--run-dir", str(folder)]
        command += ["--data-dir", str(args.data_dir)] if args.data_dir != Path("data") else []
        command += ["--threads", "1"] if args.jobs > 1 else []
        command += ["--dry-run"] if args.dry_run else []
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode == 130:
            raise Interrupted("interrupted: the same command goes on")
        if done.returncode:
            reason = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            raise UserError(f"{pair}, {variant}, seed {seed} failed: {reason[-1]}")
    (record,) = read_records(folder / "result.json")
    print(f"{pair}, {variant}, seed {seed}: {100 * record['target_accuracy']:.2f} %", file=sys.stderr, flush=True)
    return {"variant": variant, **record}


def main() -> None:
    args = parse_arguments()
    there = read_records(args.out) if args.out.exists() else []
    done = {(f"{record['source']}-{record['target']}", record["variant"], record["seed"]) for record in there}
    missing = [job for job in itertools.product(args.pairs, args.variants, args.seeds) if job not in done]
    with ThreadPoolExecutor(args.jobs) as pool:
        try:
            for job in as_completed([pool.submit(train, *job, args) for job in missing]):
                record = job.result()
                if not args.dry_run:
                    with args.out.open("a", encoding="utf-8") as file:  # by this thread alone: no two lines mix
                        file.write(json_line(record))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


if __name__ == "__main__":
    run_script(main)
