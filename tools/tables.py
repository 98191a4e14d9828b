"""What the README's tables and figures share: names of the methods, reading a record, and Markdown."""

import json
import re
import statistics
from pathlib import Path

from utils.cli import UserError

METHOD_NAMES = {"source-only": "source only", "dann": "DANN", "target-only": "trained on target"}


def percents(runs: list[dict], domain: str) -> list[float]:
    """Test accuracies of runs on their "source" or "target", from the exact counts."""
    return [100 * run[f"{domain}_correct"] / run[f"{domain}_total"] for run in runs]


def difference(runs: list[dict], others: list[dict]) -> str | None:
    """Points of target accuracy by which runs are above others, on average over the seeds of both; None without any."""
    of_seed = {run["seed"]: run for run in others}
    pairs = [(run, of_seed[run["seed"]]) for run in runs if run["seed"] in of_seed]
    if not pairs:
        return None
    mine, theirs = (statistics.mean(percents(row, "target")) for row in zip(*pairs, strict=True))
    return f"{mine - theirs:+.2f}"


def mean_and_deviation(values: list[float]) -> str:
    """Mean ± sample standard deviation of at least two values."""
    # No-break spaces: a narrow page would otherwise split the number.
    return f"{statistics.mean(values):.2f}\u00a0±\u00a0{statistics.stdev(values):.2f}"


def counted(number: int, noun: str) -> str:
    """A number with its noun: 1 seed, 5 seeds."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def read_record(path: Path) -> dict:
    """A JSON object with a "kind"; raises UserError, naming the file, when it is none."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(record, dict) or "kind" not in record:
        raise UserError(f'{path} is not a result: it should be a JSON object with a "kind"')
    return record


def escape(text: str) -> str:
    """Text as it should show in a Markdown table cell."""
    return re.sub(r"([\\|*<`\[])", r"\\\1", " ".join(text.split()))


def code(text: str) -> str:
    """Code as it should show in a Markdown table cell, where even in code a bar must be escaped."""
    return "`" + " ".join(text.replace("`", "'").split()).replace("|", "\\|") + "`"


def markdown_table(header: list[str], align: str, rows: list[list[str]]) -> str:
    """A Markdown table; `align` has one letter a column, l or r."""
    rule = [{"l": ":--", "r": "--:"}[letter] for letter in align]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, rule, *rows])
