"""The tables of speed, from the records that tools/benchmark.py wrote."""

import os
from pathlib import Path
from urllib.parse import quote

from tools.tables import Record, code, markdown, read_records
from utils.cli import UserError

NEEDED = ("machine", "device", "threads", "command", "commit")


def read_benchmarks(folder: Path) -> list[Record]:
    """Every benchmark record under the folder, with its "where"; raises UserError for one that lacks what is needed."""
    files = sorted(folder.rglob("*.json"), key=lambda path: path.with_suffix(""))
    records = [record for path in files for record in read_records(path) if record["kind"] == "benchmark"]
    for record in records:
        if missing := [key for key in NEEDED if key not in record]:
            raise UserError(f"{record['where']} lacks {', '.join(missing)}: repeat python -m tools.benchmark --json")
    return records


def number(value: float) -> str:
    """A figure with as many digits as mean something."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def spread(rate: Record) -> str:
    """Median and, in brackets, the slowest and the fastest round."""
    return f"{number(rate['median'])} ({number(rate['slowest'])} – {number(rate['fastest'])})"


def rates_table(rates: list[Record]) -> str:
    """Images per second of each recipe, its gain over the usual way, its share of the ceiling."""
    rows = []
    for rate in rates:
        if "way" in rate:
            usual = rate["way"] == "usual"
            way = "the usual way" if usual else "compiled" if rate["compiled"] else ""
            rows.append({
                "what": ", ".join(filter(None, [rate["kind"], f"`{rate['recipe']}`", rate["precision"], way])),
                "images/s: median (slowest – fastest)": spread(rate),
                "times the usual way": "1" if usual else f"{rate['times_the_usual_way']:.2f}",
                "GFLOP/s": "–" if usual else number(rate["gflop_per_second"]),
                "share of the ceiling": "–" if usual else f"{rate['share_of_ceiling']:.0%}",
            })  # fmt: skip
    ceilings = "; ".join(f"{rate['name']} {spread(rate)} {rate['unit']}" for rate in rates if "way" not in rate)
    return f"{markdown(rows)}\n\nThe ceiling, measured in the same run: {ceilings}."


def other_lines(record: Record) -> list[str]:
    """Start, memory and time to an accuracy, a line each."""
    lines = []
    for name, seconds in record.get("start", {}).items():
        if name == "of it":
            lines.append("Of it, " + "; ".join(f"{part}: {value:.1f} s" for part, value in seconds.items()))
        else:
            text = f"{seconds['median']:.1f} s ({seconds['fastest']:.1f} – {seconds['slowest']:.1f})"
            lines.append(f"`{name.split()[0]}` {name.split(' ', 1)[1]}, imports included, files warm: {text}")
    if memory := record.get("memory"):
        lines.append(f"Peak memory of `main.py` with SVHN and MNIST of full size: {memory['peak_bytes'] / 1e9:.2f} GB")
    if entry := record.get("accuracy"):
        text = "not reached" if entry["seconds"] is None else f"{entry['seconds']:.0f} s"
        lines.append(f"`{entry['recipe']}` has a target accuracy of {entry['target_accuracy']:.0%} after: {text}")
    return lines


def speed_report(folder: Path, home: Path) -> str:
    """One part for each record; links are relative to the folder `home`."""
    parts = []
    records = read_benchmarks(folder)
    for record in records:
        file = Path(os.path.relpath(record["where"], home)).as_posix()
        where = f"{record['machine']} ({record['device']}), threads: {record['threads']}"
        parts.append(f"**{where}** – {code(record['command'])} wrote [{file}]({quote(file)})")
        parts += [rates_table(record["speed"]["rates"])] if "speed" in record else []
        parts.append("\n".join(f"- {line}" for line in other_lines(record)))
    if not any(record["device"] == "cuda" for record in records):
        parts.append("On a GPU: not run. The anchor is system A's 100 epochs in about 15 minutes on a GTX 1080.")
    return "\n\n".join(part for part in parts if part)
