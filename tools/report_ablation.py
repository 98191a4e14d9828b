"""The table of the ablation, from the records that tools/ablation.py left."""

from pathlib import Path

import pandas as pd

from tools.tables import accuracy, code, escape, gain, markdown, read_records
from utils.cli import UserError

FILE = "ablation.jsonl"
WHOLE = "everything"
NEEDED = ("variant", "seed", "source_mark", "target_test_mark", "target_correct", "target_total", "steps", "config")


def read_ablation(path: Path) -> pd.DataFrame:
    """One line a run; raises UserError for a record that lacks something."""
    records = read_records(path)
    for record in records:
        if missing := [key for key in NEEDED if key not in record]:
            raise UserError(f"{record['where']} lacks {', '.join(missing)}: remove it")
    runs = pd.DataFrame(records)
    runs["target_percent"] = 100 * runs.target_correct / runs.target_total
    runs["pair"] = runs.source_mark + " → " + runs.target_test_mark
    return runs


def changes(variant: pd.DataFrame, whole: pd.DataFrame) -> str:
    """The settings of a variant that everything on has otherwise, as flags."""
    here, there = (
        {key: value for key, value in (config | (config.get("modern") or {})).items() if key not in ("modern", "seed")}
        for config in (variant.config.iloc[0], whole.config.iloc[0])
    )
    flags = [f"--{key.replace('_', '-')} {here[key]}" for key in here if key in there and here[key] != there[key]]
    return code(" ".join(flags)) if flags else "–"


def ablation_report(path: Path) -> str:
    """The table; "not run" where a variant has no result."""
    if not path.exists():
        return "Not run."
    runs = read_ablation(path)
    rows = []
    for name, variant in runs.groupby("variant", sort=False):
        row = {"What is off": escape(name), "Settings": ""}
        for pair, all_of_pair in runs.groupby("pair", sort=False):
            here, whole = variant[variant.pair == pair], all_of_pair[all_of_pair.variant == WHOLE]
            if len(here) and len(whole):
                row["Settings"] = changes(here, whole)
            points = f", {gain(here, whole)}" * (name != WHOLE and len(here) > 0)
            row[escape(pair)] = f"{accuracy(here.target_percent)}{points}"
        rows.append(row)
    steps = " or ".join(f"{number:,}" for number in sorted(runs.steps.unique()))
    return (
        f"{markdown(rows)}\n\nTarget test accuracy, %; after it the difference to everything on, in points, on average "
        f"over the seeds of both. Every run has {steps} steps: [{FILE}](../results/{FILE})."
    )
