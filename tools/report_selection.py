"""The table of what choosing an epoch without labels gives, from the curves that `tools.report --add` keeps."""

import json
from pathlib import Path

import pandas as pd

from tools.tables import METHOD_NAMES, Record, deviation, escape, markdown, read_records

FILE = "selection.jsonl"
CHOOSERS = {  # signal -> its name in the table, and whether more of it is better
    "entropy": ("entropy", False),
    "diversity": ("diversity", True),
    "smallest_class_share": ("smallest class", True),
    "bnm": ("BNM", True),
    "snd": ("SND", True),
    "class_ami": ("ClassAMI", True),
}
KEPT = ("source", "target", "source_mark", "target_mark", "method", "recipe", "seed", "precision", "command", "commit")


def curves_of(run: Path, result: Record) -> Record | None:
    """A run's signals and its target accuracy after each epoch; None where it did not log them all, or had labels."""
    metrics = run / "metrics.jsonl"
    epochs = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.is_file() else []
    names = (*CHOOSERS, "target_accuracy")
    if (
        result["method"] == "target-only"
        or not epochs
        or any(epoch.get(name) is None for epoch in epochs for name in names)
    ):
        return None
    curves = {name: [round(epoch[name], 5) for epoch in epochs] for name in names}
    return {"kind": "epochs", **{key: result.get(key) for key in KEPT}, **curves}


def run_identity(record: Record) -> tuple:
    """What no two runs with curves share."""
    keys = ("source", "target", "method", "recipe", "seed", "precision")
    return (*(record[key] for key in keys), len(record["target_accuracy"]))


def chosen(record: Record) -> dict[str, float]:
    """The target accuracy, in %, of the last epoch, of that which each signal likes best, and of the best of all."""
    curve = pd.Series(record["target_accuracy"]) * 100
    found = {"Last": curve.iloc[-1]}
    for signal, (name, more) in CHOOSERS.items():
        values = pd.Series(record[signal])
        found[name] = curve[values.idxmax() if more else values.idxmin()]
    return found | {"Oracle (uses test labels)": curve.max()}


def selection_report(path: Path) -> str:
    """The table, a row for each pair, recipe and method; "Not run." where there is no curve."""
    if not path.exists():
        return "Not run."
    frame = pd.DataFrame([record | {"chosen": chosen(record)} for record in read_records(path)])
    frame["epochs"] = frame.target_accuracy.map(len)
    rows = []
    for key, runs in frame.groupby(
        ["source_mark", "target_mark", "recipe", "method", "precision", "epochs"], sort=False
    ):
        source, target, recipe, method, precision, epochs = key
        cells = pd.DataFrame(list(runs.chosen))
        rows.append({
            "Pair": escape(f"{source} → {target}"),
            "Method": f"{METHOD_NAMES[method]}, recipe {recipe}, {precision}, {epochs} epochs",
            "Runs": str(len(runs)),
            **{name: deviation(cells[name]) for name in cells},
        })  # fmt: skip
    return (
        f"{markdown(rows)}\n\nTarget test accuracy, %, of the epoch that is chosen: mean ± sample standard deviation. "
        f"Every curve: [{FILE}](../results/{FILE})."
    )
