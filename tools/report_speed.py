"""The README's tables of speed, from the records that tools/benchmark.py wrote."""

import os
from pathlib import Path
from urllib.parse import quote

from tools.tables import code, counted, markdown_table, read_record
from utils.cli import UserError

NEEDED = ("machine", "device", "threads", "command", "commit")


def read_benchmarks(folder: Path) -> list[dict]:
    """Every benchmark record under the folder, with its `path`.

    Raises: UserError for a record that lacks what the tables need.
    """
    records = []
    for path in sorted(folder.rglob("*.json"), key=lambda path: path.with_suffix("")):
        record = read_record(path)
        if record["kind"] == "benchmark":
            if missing := [key for key in NEEDED if key not in record]:
                raise UserError(f"{path} lacks {', '.join(missing)}: make it again with tools/benchmark.py --json")
            records.append(record | {"path": path})
    return records


def number(value: float) -> str:
    """A figure with as many digits as mean something."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def spread(rate: dict) -> str:
    """Median and, in brackets, the slowest and the fastest round."""
    return f"{number(rate['median'])} ({number(rate['slowest'])} – {number(rate['fastest'])})"


def rates_table(speed: dict) -> str:
    """Images per second of each recipe, its gain over the usual way, its share of the ceiling."""
    rows = []
    for rate in speed["rates"]:
        if rate.get("way") == "usual":
            rows.append([f"{rate['kind']}, `{rate['recipe']}`, fp32, the usual way", spread(rate), "1", "–", "–"])
        elif "way" in rate:
            what = f"{rate['kind']}, `{rate['recipe']}`, {rate['precision']}" + ", compiled" * rate["compiled"]
            share, gflops = f"{rate['share_of_ceiling']:.0%}", number(rate["gflop_per_second"])
            rows.append([what, spread(rate), f"{rate['times_the_usual_way']:.2f}", gflops, share])
    header = ["what", "images/s: median (slowest – fastest)", "times the usual way", "GFLOP/s", "share of the ceiling"]
    ceilings = "; ".join(
        f"{rate['name']} {spread(rate)} {rate['unit']}" for rate in speed["rates"] if "way" not in rate
    )
    return f"{markdown_table(header, 'lrrrr', rows)}\n\nThe ceiling, measured in the same run: {ceilings}."


def other_lines(record: dict) -> list[str]:
    """Start, memory and time to an accuracy, a line each."""
    lines = []
    for name, seconds in record.get("start", {}).items():
        if name == "of it":
            lines.append("Of it, " + "; ".join(f"{part}: {value:.1f} s" for part, value in seconds.items()))
        else:
            text = f"{seconds['median']:.1f} s ({seconds['fastest']:.1f} – {seconds['slowest']:.1f})"
            lines.append(f"`{name.split()[0]}` {name.split(' ', 1)[1]}, imports included, files warm: {text}")
    if "memory" in record:
        peak = record["memory"]["peak_bytes"] / 1e9
        lines.append(f"Peak memory of `main.py` with SVHN and MNIST of full size: {peak:.2f} GB")
    if "accuracy" in record:
        reached = record["accuracy"]["seconds"]
        text = "not reached" if reached is None else f"{reached:.0f} s"
        entry = record["accuracy"]
        lines.append(f"`{entry['recipe']}` reads {entry['target_accuracy']:.0%} of its target's test set after: {text}")
    return lines


def speed_report(folder: Path, home: Path) -> str:
    """One part for each machine that was measured; links are relative to the folder `home`."""
    records = read_benchmarks(folder)
    parts = []
    for record in records:
        file = Path(os.path.relpath(record["path"], home)).as_posix()
        where = f"{record['machine']} ({record['device']}), {counted(record['threads'], 'thread')}"
        parts.append(f"**{where}** – {code(record['command'])} wrote [{file}]({quote(file)})")
        if "speed" in record:
            parts.append(rates_table(record["speed"]))
        parts.append("\n".join(f"- {line}" for line in other_lines(record)))
    if not any(record["device"] == "cuda" for record in records):
        parts.append("On a GPU: not run. The anchor is system A's 100 epochs in about 15 minutes on a GTX 1080.")
    return "\n\n".join(part for part in parts if part)
