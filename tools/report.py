"""Write the tables of results and of speed from what results/ holds, and from that alone.

Each table stands between two lines of README.md, docs/results.md or docs/speed.md such as `<!-- results:begin -->` and
`<!-- results:end -->`; the rest of these pages stays as it is. A row averages runs that differ in their seed alone.
"""

import argparse
import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pandas as pd

from methods.recipes import RECIPES
from tools.report_ablation import FILE as ABLATION
from tools.report_ablation import ablation_report
from tools.report_selection import FILE as SELECTION
from tools.report_selection import curves_of, run_identity, selection_report
from tools.report_speed import speed_report
from tools.tables import METHOD_NAMES, Record, accuracy, code, escape, flags_of, gain, json_line, markdown, read_records
from utils.cli import UserError, run_script, script_parser
from utils.files import write_atomically

ROOT = Path(__file__).resolve().parent.parent
REPORTED = json.loads((ROOT / "tools" / "reported_numbers.json").read_text(encoding="utf-8"))  # by others, in %
PAIRS = list(dict.fromkeys((entry["source"], entry["target"]) for entry in REPORTED))  # to show before other pairs
UNOFFICIAL = re.compile(r" unofficial, [\d,]+")  # of data that is complete, but in files of another checksum
UNOFFICIAL_NOTE = (
    "\\* All images of the official split, in other files: [docs/reproducing.md](docs/reproducing.md#data-files)."
)
LEAST_RUNS = 3  # of a row in the README

DATA = ["source", "target", "source_mark", "target_mark", "source_test_mark", "target_test_mark"]
COUNTS = [f"{domain}_{name}" for domain in ("source", "target") for name in ("accuracy", "correct", "total")]
OTHERS = ["method", "recipe", "seed", "epochs", "seconds", "device", "machine", "precision", "command", "config"]
COSTS = ["seconds_to", "operations", "parameters", "threads"]
BY_SOURCE = "target_correct_by_source_statistics"  # only of source only, by a network with both domains' statistics

# Settings that a record also has at its top, where the precision is the one used; and those of `modern` as a whole,
# which are looked at one by one.
NOT_COMPARED = {"source", "target", "method", "recipe", "seed", "epochs", "precision", "modern", "on_nan"}
# Settings that change nothing in a bound: those of gradient reversal, and of the teacher all but its average.
ADAPTATION = {
    "lambda_max", "lambda_schedule", "lambda_update", "clip_norm", "balance_classes", "domain_loss",
    "adversary", "teacher_views", "teacher_weight", "teacher_start", "perturbation", "warp", "alignment",
    "alignment_until", "alignment_after", "confidence",
}  # fmt: skip
USUAL_FLAGS = (
    "--recipe", "--source", "--target", "--method", "--seed", "--threads", "--run-dir", "--data-dir", "--device",
    "--no-download", "--precision",
)  # fmt: skip


def run_of(record: Record) -> Record:
    """A record with what tables group, sort and show beside its own keys; raises UserError when it is no result."""
    where, missing = record["where"], [key for key in [*DATA, *COUNTS, *OTHERS] if key not in record]
    if record["kind"] != "training" or record.get("dry_run"):
        raise UserError(f"{where} is a dry run or no training run at all, which is not a result")
    if missing or record["method"] not in METHOD_NAMES:
        raise UserError(f"{where} lacks {', '.join(missing) or 'a method of ' + ', '.join(METHOD_NAMES)}")
    run: Record = {**dict.fromkeys(COSTS), BY_SOURCE: float("nan"), **record}
    for domain in ("source", "target"):
        share, correct, total = (record[f"{domain}_{name}"] for name in ("accuracy", "correct", "total"))
        # The tables use the counts, which are exact; the fraction may have been rounded to two digits.
        if not 0 <= correct <= total > 0 or not abs(share - correct / total) <= 0.005:
            raise UserError(f"{where}: a {domain}_accuracy of {share} does not fit {correct} / {total}")
        run[f"{domain}_percent"] = 100 * correct / total
    run["percent_by_source"] = 100 * run[BY_SOURCE] / record["target_total"]
    momentum = {"momentum": 0.9}  # of every run before it was a setting
    flat = sorted((momentum | run["config"] | (run["config"].get("modern") or {})).items())
    settings = [item for item in flat if item[0] not in NOT_COMPARED]
    data, shared = [run[key] for key in DATA], [item for item in settings if item[0] not in ADAPTATION]
    run["device"] = run["device"].split(":")[0]
    run["pair"] = tuple(data)
    run["bounds"] = json.dumps([data, run["recipe"], run["epochs"], shared])  # the same in a row and in its bounds
    own = settings if run["method"] == "dann" else shared
    run["row"] = json.dumps([run["bounds"], run["method"], own, run["device"], run["precision"]])
    place = PAIRS.index(run["pair"][:2]) if run["pair"][:2] in PAIRS else len(PAIRS)
    recipe = (list(RECIPES).index(run["recipe"]), -run["epochs"])
    method = list(METHOD_NAMES).index(run["method"])
    run["order"] = (place, data, *recipe, run["bounds"], method, run["row"], run["seed"])
    return run


def read_results(folder: Path) -> pd.DataFrame:
    """Every reported run, in the order to show: the lines of all PAIR.jsonl.

    Raises:
        UserError: there is none, one is no good, or two are of the same settings and seed.
    """
    files = [path for path in sorted(folder.glob("*.jsonl")) if path.name not in (ABLATION, SELECTION)]
    runs = [run_of(record) for path in files for record in read_records(path)]
    if not runs:
        raise UserError(f"no results in {folder}: add a run with python -m tools.report --add RUN")
    frame = pd.DataFrame(sorted(runs, key=lambda run: run["order"]))
    for where in frame[frame.duplicated(["row", "seed"])]["where"]:
        raise UserError(f"{where} has the settings and the seed of another line: remove one of them")
    return frame


def identity(record: Record) -> tuple[str, int]:
    """What no two runs share."""
    return run_of(record)["row"], record["seed"]


def add(runs: list[Path], folder: Path, force: bool) -> None:
    """Append the runs' result.json to their pairs' files, and their curves to one more; all or, if one is bad, none."""
    files: dict[Path, dict[tuple, Record]] = {}

    def put(path: Path, record: Record, identify: Callable[[Record], tuple]) -> None:
        records = files.get(path)
        if records is None:
            records = files[path] = {identify(line): line for line in (read_records(path) if path.exists() else [])}
        key = identify(record)
        if key in records and not force:
            both = f"{records[key]['where']} and {record['where']}"
            raise UserError(f"{both} have the same settings and seed: leave one out, or replace it by --force")
        records[key] = record

    for run in runs:
        for record in read_records(run / "result.json" if run.is_dir() else run):
            put(folder / file_of(record["source"], record["target"]), record, identity)
            curves = curves_of(run, record) if run.is_dir() else None
            if curves:
                put(folder / SELECTION, curves | {"where": str(run / "metrics.jsonl")}, run_identity)
    for path, records in files.items():
        write(path, "".join(map(json_line, records.values())))
        print(path)


def file_of(source: str, target: str) -> str:
    """The file of a pair; of a folder its name counts."""
    return f"{Path(source).name}-{Path(target).name}.jsonl"


def write(path: Path, text: str) -> None:
    write_atomically(path, partial(Path.write_text, data=text, encoding="utf-8"))


def rows_of(runs: pd.DataFrame) -> list[pd.DataFrame]:
    return [row for _, row in runs.groupby("row", sort=False)]


def bound(row: pd.DataFrame, method: str, runs: pd.DataFrame) -> pd.DataFrame:
    """The runs of a bound with the row's network and settings; in its precision, where there are any."""
    run = row.iloc[0]
    found = runs[(runs.method == method) & (runs.bounds == run.bounds)]
    alike = found[(found.device == run.device) & (found.precision == run.precision)]
    return better((found if alike.empty else alike).drop_duplicates("seed"))


def better(row: pd.DataFrame) -> pd.DataFrame:
    """A row with the batch statistics that are better on the target: of source only its own or the source's."""
    by_source = row.percent_by_source
    return row.assign(target_percent=by_source) if by_source.mean() > row.target_percent.mean() else row


def unusual_flags(row: pd.DataFrame) -> list[str]:
    """The flags with their values that all commands of a row have, but for the usual ones."""
    each = [flags_of(command) for command in row.command]
    return [f for f in each[0] if re.split("[ =]", f)[0] not in USUAL_FLAGS and all(f in flags for flags in each)]


def row_names(rows: list[pd.DataFrame]) -> list[str]:
    """What the README calls each row of a pair: its recipe, and in what it differs from others with the same."""
    names = []
    for row in rows:
        run = row.iloc[0]
        flags = [code(flag) for flag in unusual_flags(row) if not flag.startswith("--epochs")]
        more = [*flags, f"{run.epochs} epochs", run.precision, run.device]
        name = "modern (EMA teacher + reversal)" if run.recipe == "modern" else f"DANN, recipe {run.recipe}"
        names.append((name, more))
    common = {name: set.intersection(*(set(more) for other, more in names if other == name)) for name, _ in names}
    return [", ".join([name, *(part for part in more if part not in common[name])]) for name, more in names]


def pair_name(run: pd.Series) -> str:
    return f"{run.source_mark} → {run.target_mark}"


def note_of(entry: Record) -> str:
    return f" ({entry['note']})" if "note" in entry else ""


def paper_cell(run: pd.Series) -> str:
    """What the paper reports for a pair."""
    wanted = {"source": run.source, "target": run.target, "recipe": "paper"}
    told = {entry["method"]: entry for entry in REPORTED if wanted.items() <= entry.items()}
    numbers = " → ".join(told[method]["target_accuracy"] if method in told else "–" for method in METHOD_NAMES)
    return numbers + "".join(map(note_of, told.values())) if told else "–"


def readme_report(runs: pd.DataFrame) -> str:
    """The README's table: a row for each pair and method with enough runs, between its bounds."""
    lines = []
    for _, pair in runs.groupby("pair", sort=False):
        rows = [row for row in rows_of(pair[pair.method == "dann"]) if len(row) >= LEAST_RUNS]
        for row, name in zip(rows, row_names(rows), strict=True):
            lines.append({
                "Pair": escape(UNOFFICIAL.sub("*", pair_name(row.iloc[0]))),
                "Method": name,
                "Source only": accuracy(bound(row, "source-only", pair).target_percent),
                "Adapted": accuracy(row.target_percent),
                "Trained on target": accuracy(bound(row, "target-only", pair).target_percent),
                "Paper: source only → DANN → on target": paper_cell(row.iloc[0]),
            })  # fmt: skip
    return "\n\n".join([markdown(lines), *[UNOFFICIAL_NOTE] * any("*" in line["Pair"] for line in lines)])


def pair_report(pair: pd.DataFrame) -> str:
    """A pair's heading and the table of all its rows."""
    lines = []
    for row in rows_of(pair):
        run, flags, name = row.iloc[0], unusual_flags(row), METHOD_NAMES[row.iloc[0].method]
        seeds, machines = ", ".join(map(str, row.seed)), "; ".join(row.machine.unique())
        by_source = f"; by the source's statistics {accuracy(row.percent_by_source)}"
        how = f"{run.epochs} epochs, {row.seconds.median():,.0f} s on {machines} ({run.device}, {run.precision})"
        lines.append({
            "Method": f"{name}, recipe {run.recipe}" + f", {code(' '.join(flags))}" * bool(flags),
            "Source test, %": accuracy(row.source_percent),
            "Target test, %": accuracy(row.target_percent) + by_source * bool(row.percent_by_source.notna().any()),
            "Gain": gain(row, bound(row, "source-only", pair)) if run.method == "dann" else "",
            "Runs": escape(f"seed{'s' * (len(row) > 1)} {seeds}; {how}"),
            "Command": code(re.sub(r"\s--(run-dir|seed)[ =](?:'[^']*'|[^\s'])+", "", run.command)),
        })  # fmt: skip
    file = file_of(run.source, run.target)
    tests = escape(f"Source test: {run.source_test_mark}; target test: {run.target_test_mark}.")
    return f"## {escape(pair_name(run))}\n\n{tests} Every run: [{file}](../results/{file}).\n\n{markdown(lines)}"


def cost_report(runs: pd.DataFrame) -> str:
    """What adaptation by the recipe modern costs."""
    lines = []
    for row in rows_of(runs[(runs.recipe == "modern") & (runs.method == "dann") & runs.seconds_to.notna()]):
        run, reached = row.iloc[0], {}
        for percent in ("90", "95", "98"):
            times = row.seconds_to.str[percent].dropna()
            some = f" ({len(times)} of {len(row)})" * (len(times) < len(row))
            reached[f"s to {percent} %"] = f"{times.median():,.0f}{some}" if len(times) else "never"
        lines.append({
            "Pair": escape(pair_name(run)),
            **reached,
            "s in all (slowest)": f"{row.seconds.median():,.0f} ({row.seconds.max():,.0f})",
            "TFLOP": f"{run.operations / 1e12:.0f}",
            "Parameters": f"{run.parameters:,.0f}",
            "On": escape(f"{run.machine}, {run.precision}, threads: {run.threads:.0f}"),
        })  # fmt: skip
    return f"## What `modern` costs\n\n{markdown(lines)}"


def reported_report(runs: pd.DataFrame) -> str:
    """What others reported, and beside it the runs here by the recipe that is compared with it."""
    lines = []
    whole = runs[~(runs.source_mark + runs.target_mark).str.contains("subset")]
    for entry in REPORTED:
        here = whole[(whole[["source", "target", "recipe", "method"]] == pd.Series(entry)[:4]).all(axis=1)]
        rows = [
            f"{row.source_percent.mean():.2f} / {accuracy(better(row).target_percent)}, {row.iloc[0].epochs} epochs"
            for row in rows_of(here)
        ]
        lines.append({
            "Pair": f"{entry['source']} → {entry['target']}",
            "Method": METHOD_NAMES[entry["method"]],
            "By": entry["by"] + note_of(entry),
            "Source / target test, %": f"{entry['source_accuracy'] or '–'} / {entry['target_accuracy']}",
            "Here": f"recipe {entry['recipe']}: {'; '.join(rows) or 'not run'}",
        })  # fmt: skip
    return f"## Reported by others\n\n{markdown(lines)}"


def docs_report(runs: pd.DataFrame) -> str:
    """All that docs/results.md shows but the ablation."""
    pairs = [pair_report(pair) for _, pair in runs.groupby(DATA, sort=False)]
    return "\n\n".join([*pairs, cost_report(runs), reported_report(runs)])


def with_part(page: Path, text: str, name: str, body: str) -> str:
    """A page's text with the part between the markers of this name replaced; raises UserError without these."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    parts = re.split(rf"(?m)^({begin}|{end})$\n?", text)
    if parts[1::2] != [begin, end]:
        raise UserError(f"{page} needs one line {begin} and, below it, one line {end}: add them")
    return f"{parts[0]}{begin}\n\n{body}\n\n{end}\n{parts[4]}"


def parse_args() -> argparse.Namespace:
    parser = script_parser(
        description="Write the tables of README.md, docs/results.md and docs/speed.md from the records in results/.",
        epilog="examples:\n"
        "  python -m tools.report --add runs/svhn-mnist-seed0 runs/svhn-mnist-seed1\n"
        "  python -m tools.report",
    )
    option = parser.add_mutually_exclusive_group().add_argument
    option("--check", action="store_true", help="write nothing; exit 1 when pages and results differ")
    option("--add", type=Path, nargs="+", metavar="RUN", help="append result.json of these runs to the results")
    option = parser.add_argument
    option("--force", action="store_true", help="with --add: replace a run of the same settings and seed")
    option("--readme", type=Path, metavar="FILE", default=ROOT / "README.md", help="default: %(default)s")
    option("--docs", type=Path, metavar="FOLDER", default=ROOT / "docs", help="default: %(default)s")
    option("--results", type=Path, metavar="FOLDER", default=ROOT / "results", help="default: %(default)s")
    args = parser.parse_args()
    if args.force and not args.add:
        parser.error("--force goes with --add")
    return args


def main() -> None:
    args = parse_args()
    if args.add:
        add(args.add, args.results, args.force)
        return
    runs = read_results(args.results)
    pages = {
        args.readme: {"results": readme_report(runs)},
        args.docs / "results.md": {
            "results": docs_report(runs),
            "selection": selection_report(args.results / SELECTION),
            "ablation": ablation_report(args.results / ABLATION),
        },
        args.docs / "speed.md": {"speed": speed_report(args.results, args.docs)},
    }
    changed: dict[Path, str] = {}
    for page, bodies in pages.items():
        new = text = page.read_text(encoding="utf-8") if page.exists() else ""
        for name, body in bodies.items():
            new = with_part(page, new, name, body)
        changed |= {page: new} if new != text else {}
    if args.check and changed:
        names = ", ".join(map(str, changed))
        raise UserError(f"not what {args.results} holds: {names}; run python -m tools.report")
    for page, text in changed.items():
        write(page, text)


if __name__ == "__main__":
    run_script(main)
