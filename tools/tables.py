"""What the tables and the figures share: names of the methods, records, cells and Markdown."""

import json
import re
from pathlib import Path
from typing import Any

import pandas as pd

from utils.cli import UserError

METHOD_NAMES = {"source-only": "source only", "dann": "DANN", "target-only": "trained on target"}
Record = dict[str, Any]


def read_records(path: Path) -> list[Record]:
    """The records of a .jsonl file, one on each line, or the one of a .json file; "where" says where each stands.

    Raises:
        UserError: the file can't be read, or holds something else; the message names the place.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    places = {str(path): text}
    if path.suffix == ".jsonl":
        places = {f"{path} line {number}": line for number, line in enumerate(text.split("\n"), 1) if line}
    records = []
    for where, content in places.items():
        try:
            record = json.loads(content)
        except ValueError as error:
            raise UserError(f"{where} is not JSON: {error}") from None
        if not isinstance(record, dict) or "kind" not in record:
            raise UserError(f'{where} is not a record: it should be a JSON object with a "kind"')
        records.append(record | {"where": where})
    return records


def json_line(record: Record) -> str:
    """A record as a line of JSON, without its "where"."""
    return json.dumps({key: record[key] for key in record if key != "where"}, ensure_ascii=False) + "\n"


def flags_of(command: str) -> list[str]:
    """A command's flags, each with its values as the shell takes them: ["--epochs 20", "--balance-classes"]."""
    return re.findall(r"--[\w-]+(?:[ =](?!--)(?:'[^']*'|[^\s'])+)*", command)


def deviation(percents: pd.Series) -> str:
    """Mean ± sample standard deviation of the runs' accuracies."""
    # No-break spaces: a narrow page would otherwise split the number.
    return f"{percents.mean():.2f}" + (f"\u00a0±\u00a0{percents.std():.2f}" if len(percents) > 1 else "")


def accuracy(percents: pd.Series) -> str:
    """Mean ± sample standard deviation of the runs' accuracies, and how many they are."""
    return "not run" if percents.empty else f"{deviation(percents)} (n\u00a0=\u00a0{len(percents)})"


def gain(runs: pd.DataFrame, others: pd.DataFrame) -> str:
    """Points of target accuracy by which runs are above others, on average over the seeds of both; "–" without any."""
    points = (runs.set_index("seed").target_percent - others.set_index("seed").target_percent).mean()
    return "–" if pd.isna(points) else f"{points:+.2f}"


def escape(text: str) -> str:
    """Text as it should show in a Markdown table cell."""
    return re.sub(r"([\\|*<`\[])", r"\\\1", " ".join(text.split()))


def code(text: str) -> str:
    """Code as it should show in a Markdown table cell, where even in code a bar must be escaped."""
    return "`" + " ".join(text.replace("`", "'").split()).replace("|", "\\|") + "`"


def markdown(rows: list[dict[str, str]]) -> str:
    """A Markdown table of rows whose keys are its header; columns of numbers stand at the right."""
    if not rows:
        return "Not run."
    rule = ["--:" if any(row[name].lstrip("+-")[:1].isdigit() for row in rows) else ":--" for name in rows[0]]
    lines = [list(rows[0]), rule, *(list(row.values()) for row in rows)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
