"""The README's table of the ablation, from the results that tools/ablation.py left."""

from collections import defaultdict
from pathlib import Path

from tools.tables import difference, escape, markdown_table, mean_and_deviation, percents, read_record
from utils.cli import UserError

FOLDER = "ablation"
WHOLE = "everything"
RECIPE = ("--recipe", "modern", "--teacher-views", "both")  # as it was before this table took a view from it
VARIANTS = {  # what is off, and the flags that turn it off
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


def read_ablation(folder: Path) -> dict[str, dict[str, list[dict]]]:
    """The results by pair and variant, in the order to show; empty where there are none."""
    found = defaultdict(lambda: defaultdict(list))
    for path in sorted((folder / FOLDER).glob("*/*.json")):
        name = path.stem.rpartition("-seed")[0].replace("-", " ")
        if name not in VARIANTS:
            raise UserError(f"{path} is no variant of the ablation ({', '.join(VARIANTS)}): rename or remove it")
        found[path.parent.name][name].append(read_record(path))
    return found


def cell(runs: list[dict], whole: list[dict]) -> str:
    """Mean ± sample standard deviation; in brackets, points, the difference to the whole recipe with the same seeds."""
    if not runs:
        return "not run"
    values = percents(runs, "target")
    text = mean_and_deviation(values) if len(values) > 1 else f"{values[0]:.2f}"
    gain = None if runs is whole else difference(runs, whole)
    return f"{text} ({gain})" if gain else text


def ablation_report(folder: Path) -> str:
    """The table; "not run" where a variant has no result."""
    found = read_ablation(folder)
    if not found:
        return "Not run."
    runs = [run for variants in found.values() for results in variants.values() for run in results]
    pairs = {}
    for pair, variants in found.items():
        run = next(iter(variants.values()))[0]
        pairs[pair] = f"{run['source_mark']} → {run['target_test_mark']}"
    rows = []
    for name, flags in VARIANTS.items():
        cells = [cell(found[pair][name], found[pair][WHOLE]) for pair in pairs]
        rows.append([name, f"`{' '.join(flags)}`" if flags else "–", *cells])
    header = ["what is off", "flags", *(escape(mark) for mark in pairs.values())]
    table = markdown_table(header, "ll" + "r" * len(pairs), rows)
    seeds = sorted({run["seed"] for run in runs})
    steps = sorted({run["steps"] for run in runs})
    which = f"mean ± sample standard deviation over the seeds {listed(seeds)}, of one seed without it"
    if len(seeds) == 1:
        which = f"seed {seeds[0]}"
    return (
        f"{table}\n\nTarget test accuracy, %: {which}; in brackets the difference to everything on, points. Runs of "
        f"`{' '.join(RECIPE)}` with {listed(steps)} steps: `python tools/ablation.py` wrote "
        "[results/ablation](results/ablation)."
    )


def listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))
