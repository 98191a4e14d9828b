"""Write the README's tables of results and of speed from results/**/*.json alone.

The results stand between two lines of the README, `<!-- results:begin -->` and `<!-- results:end -->`, the ablation
and the speed between two such lines with their names; the rest of it stays as it is. A row of results averages runs
that differ in their seed and in nothing else.
"""

import argparse
import dataclasses
import json
import math
import os
import re
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools.report_ablation import FOLDER as ABLATION  # noqa: E402
from tools.report_ablation import ablation_report  # noqa: E402
from tools.report_speed import speed_report  # noqa: E402
from tools.tables import (  # noqa: E402
    METHOD_NAMES,
    code,
    counted,
    difference,
    escape,
    markdown_table,
    mean_and_deviation,
    percents,
    read_record,
)
from utils.cli import UserError, run_script, script_parser  # noqa: E402
from utils.config import ADDED, RECIPES, Config, recipe_config, to_dict  # noqa: E402
from utils.files import write_atomically  # noqa: E402

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
ABLATION_BEGIN, ABLATION_END = "<!-- ablation:begin -->", "<!-- ablation:end -->"
SPEED_BEGIN, SPEED_END = "<!-- speed:begin -->", "<!-- speed:end -->"
PAIRS = {  # in the order to show, with the recipe that is meant for them
    ("svhn", "mnist"): "dann",
    ("mnist", "svhn"): "modern",
    ("mnist", "usps"): "modern",
    ("usps", "mnist"): "modern",
    ("synth", "svhn"): "modern",
    ("synth", "optdigits"): "quick",
}
AIMS = {  # what the recipe `modern` was to reach, %
    ("svhn", "mnist"): "99.0, worst 98.7",
    ("mnist", "svhn"): "84.0, worst 81.0",
    ("mnist", "usps"): "98.2",
    ("usps", "mnist"): "99.0",
    ("synth", "svhn"): "2 below trained on target",
}
METHODS = METHOD_NAMES | {"dann": "**DANN**"}
OFFICIAL_MARKS = {"svhn": "SVHN", "mnist": "MNIST", "usps": "USPS"}  # what published numbers were measured on

MARKS = ("source_mark", "target_mark", "source_test_mark", "target_test_mark")
TEXTS = ("source", "target", "method", "recipe", "device", "machine", "precision", "command", *MARKS)
COUNTS = ("seed", "epochs", "source_correct", "source_total", "target_correct", "target_total")
NUMBERS = ("source_accuracy", "target_accuracy", "seconds")
# Settings that a result also has at its top; there the precision is the one used, not "auto".
KEYED = ("source", "target", "method", "recipe", "seed", "epochs", "precision")
# Settings that change nothing in a bound: all of gradient reversal, and of the teacher all but its average.
ADAPTATION = frozenset(
    item.name
    for item in dataclasses.fields(Config)
    if item.metadata["group"] in ("gradient reversal", "teacher") and item.name != "teacher_decay"
)


def read_result(path: Path) -> dict | None:
    """A training run's result with its `path` added; None when the file is another kind of record.

    Raises:
        UserError: the file is no JSON object, lacks a key, contradicts itself, or comes from a dry run.
    """
    result = read_record(path)
    if result["kind"] != "training":
        return None
    check_result(result, path)
    return result | {"path": path}


def check_result(result: dict, path: Path) -> None:
    """Raise UserError, naming the file, unless the result has all that the tables need, in type and range."""
    if result.get("dry_run"):
        raise UserError(f"{path} comes from a dry run, which is not a result")
    for keys, kinds in ((TEXTS, str), (COUNTS, int), (NUMBERS, int | float)):
        for key in keys:
            if key not in result:
                raise UserError(f'{path} lacks the key "{key}"')
            value = result[key]
            if not isinstance(value, kinds) or isinstance(value, bool):
                raise UserError(f'{path}: "{key}" cannot be {value!r}')
    if result["method"] not in METHODS:
        raise UserError(f"{path}: the method {result['method']!r} is none of {', '.join(METHODS)}")
    if not isinstance(result.get("config", {}), dict):
        raise UserError(f'{path}: "config" should be an object')
    if not 0 <= result["seconds"] < math.inf:
        raise UserError(f'{path}: "seconds" cannot be {result["seconds"]}')
    for domain in ("source", "target"):
        accuracy, correct, total = (result[f"{domain}_{name}"] for name in ("accuracy", "correct", "total"))
        # The tables use the counts, which are exact; the fraction may have been rounded to two digits.
        if not 0 <= correct <= total or total == 0 or not abs(accuracy - correct / total) <= 0.005:
            raise UserError(f"{path}: a {domain}_accuracy of {accuracy} does not fit {correct} / {total}")


def read_results(folder: Path) -> list[dict]:
    """Every training result under the folder but those of the ablation, which have a table of their own."""
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: add a run with python tools/report.py --add RUN")
    paths = sorted(path for path in folder.rglob("*.json") if path.relative_to(folder).parts[0] != ABLATION)
    results = [read_result(path) for path in paths]
    return [result for result in results if result is not None]


def settings(result: dict) -> dict:
    """The hyper-parameters of a run that have no key of their own; what it is too old for as what does without."""
    return {key: value for key, value in (ADDED | result.get("config", {})).items() if key not in KEYED}


def training(result: dict, but: frozenset = frozenset()) -> tuple:
    """What two runs on whatever machine must share, besides data and method, to be the same training."""
    shared = {key: value for key, value in settings(result).items() if key not in but}
    return result["epochs"], json.dumps(shared, sort_keys=True), (result["source_total"], result["target_total"])


def setup(result: dict, but: frozenset = frozenset()) -> tuple:
    """What two runs must share, besides data and method, to be compared with each other, but for some settings."""
    return result["device"].split(":")[0], result["precision"], *training(result, but)


def group(results: list[dict]) -> list[list[list[dict]]]:
    """Tables of rows of runs: a table has one pair of data sets, the runs of a row differ in seed alone."""
    tables = defaultdict(lambda: defaultdict(list))
    for run in sorted(results, key=lambda run: run["seed"]):
        row = tables[table_order(run)][row_order(run)]
        if row and row[-1]["seed"] == run["seed"]:
            raise UserError(f"{row[-1]['path']} and {run['path']} are the same run: remove one of them")
        row.append(run)
    return [[table[row] for row in sorted(table)] for _, table in sorted(tables.items())]


def table_order(run: dict) -> tuple:
    """A table's key, in the order to show: the project's pairs first, of a pair the official data first."""
    pair = (run["source"], run["target"])
    return position(pair, tuple(PAIRS)), pair, len(unofficial(run)), tuple(run[mark] for mark in MARKS)


def row_order(run: dict) -> tuple:
    """A row's key, in the order to show: by recipe, the longest schedule first, the methods side by side."""
    recipe, method = run["recipe"], position(run["method"], tuple(METHODS))
    return position(recipe, tuple(RECIPES)), recipe, -run["epochs"], setup(run), method


def position(item, order: tuple) -> int:
    return order.index(item) if item in order else len(order)


def unofficial(run: dict) -> list[str]:
    """The official names of the domains that this run saw in another form, such as a subset."""
    marks = {domain: {run[f"{domain}_mark"], run[f"{domain}_test_mark"]} for domain in ("source", "target")}
    official = {domain: OFFICIAL_MARKS.get(run[domain]) for domain in marks}
    return [name for domain, name in official.items() if name and marks[domain] != {name}]


def accuracy_cell(row: list[dict], domain: str) -> str:
    """Mean ± sample standard deviation; of a single run its accuracy and its counts."""
    values = percents(row, domain)
    if len(values) == 1:
        return f"{values[0]:.2f} ({row[0][f'{domain}_correct']} / {row[0][f'{domain}_total']})"
    return mean_and_deviation(values)


def gain_cell(row: list[dict], table: list[list[dict]]) -> str:
    """Points of target accuracy that DANN adds to source-only training that is the same but for adaptation."""
    if row[0]["method"] != "dann":
        return ""
    return difference(row, with_method("source-only", row, table)) or "–"


def with_method(method: str, row: list[dict], table: list[list[dict]], shared: Callable = setup) -> list[dict]:
    """The row of a bound with the same recipe and `shared`; empty where there is none.

    Where no row has all settings, one that differs in those of `ADAPTATION` will do.
    """
    others = [other for other in table if (other[0]["method"], other[0]["recipe"]) == (method, row[0]["recipe"])]
    for but in (frozenset(), ADAPTATION):
        for other in others:
            if shared(other[0], but) == shared(row[0], but):
                return other
    return []


def method_cell(row: list[dict], table: list[list[dict]]) -> str:
    """Method and recipe, with its `unusual_settings`."""
    return f"{METHODS[row[0]['method']]} (recipe `{row[0]['recipe']}`{unusual_settings(row, table)})"


def pair_cell(row: list[dict], table: list[list[dict]]) -> str:
    """Source and target, with the row's `unusual_settings`."""
    return f"{escape(row[0]['source_mark'])} → {escape(row[0]['target_mark'])}{unusual_settings(row, table)}"


def unusual_settings(row: list[dict], table: list[list[dict]]) -> str:
    """Those that are not the recipe's own, each after a comma; of a recipe that is gone, those that rows differ in.

    A bound's of `ADAPTATION` are left out.
    """
    run, mine = row[0], settings(row[0])
    peers = [settings(other[0]) for other in table if other[0]["recipe"] == run["recipe"]]
    keys = sorted(set().union(*peers) - (frozenset() if run["method"] == "dann" else ADAPTATION))
    varied = [key for key in keys if len({json.dumps(peer.get(key), sort_keys=True) for peer in peers}) > 1]
    own = to_dict(recipe_config(run["recipe"], run["source"], run["target"])) if run["recipe"] in RECIPES else {}
    named = [key for key in keys if (mine.get(key) != own[key] if key in own else key in varied)]
    return escape("".join(f", {key} {mine.get(key, 'not recorded')}" for key in named))


def runs_cell(row: list[dict]) -> str:
    """How many runs, how long, on what."""
    first = row[0]
    where = dict.fromkeys(f"{run['machine']} ({run['device']}, {run['precision']})" for run in row)
    seconds = statistics.median(run["seconds"] for run in row)
    runs, epochs = counted(len(row), "seed"), counted(first["epochs"], "epoch")
    return f"{runs}, {epochs}, {seconds:,.0f} s on {escape('; '.join(where))}"


def command_of(run: dict) -> str:
    """The run's command without the folder it went to, which changes nothing."""
    return re.sub(r"\s--run-dir[ =]('[^']*'|\S+)", "", run["command"])


def command_cell(row: list[dict]) -> str:
    """The row's command, once for all seeds where it differs in nothing else."""
    if len(row) == 1:
        return code(command_of(row[0]))
    seeds = [run["seed"] for run in row]
    in_line = len(seeds) > 2 and seeds == list(range(seeds[0], seeds[-1] + 1))
    shown = f"{seeds[0]} … {seeds[-1]}" if in_line else ", ".join(map(str, seeds))
    commands = []
    for run in row:
        command = command_of(run)
        command = command if "--seed" in command else f"{command} --seed {run['seed']}"
        commands.append(re.sub(rf"(--seed[ =]){run['seed']}\b", rf"\g<1>{shown}", command))
    if len(set(commands)) > 1:
        commands = [command_of(run) for run in row]
    return "<br>".join(code(command) for command in dict.fromkeys(commands))


def reported_numbers() -> list[dict]:
    """What others reported, in %, as text (tools/reported_numbers.json)."""
    return json.loads((ROOT / "tools" / "reported_numbers.json").read_text(encoding="utf-8"))


def reported_cell(run: dict, reported: list[dict]) -> str:
    """What was reported for this pair and method with this recipe, or else in the paper."""
    for recipe in (run["recipe"], "paper"):
        wanted = run | {"recipe": recipe}
        for entry in reported:
            if all(entry[key] == wanted[key] for key in ("source", "target", "method", "recipe")):
                return f"{entry['by']}: {entry['source_accuracy'] or '–'} / {entry['target_accuracy']}"
    return "–"


def pair_table(table: list[list[dict]], reported: list[dict], home: Path) -> str:
    """One pair's heading, table and links to its files, relative to the folder `home`."""
    run = table[0][0]
    marks = {key: escape(run[key]) for key in MARKS}
    heading = f"**{marks['source_mark']} → {marks['target_mark']}**"
    if run["source_mark"] != run["source_test_mark"] or run["target_mark"] != run["target_test_mark"]:
        heading += f" (source test: {marks['source_test_mark']}; target test: {marks['target_test_mark']})"
    other_data = unofficial(run)
    reported_for = f"Reported for the full {' and '.join(other_data)}" if other_data else "Reported"
    header = ["Method", "Source test, %", "Target test, %", "Gain"]
    header += [f"{reported_for}: source / target, %", "Runs", "Command"]
    rows = [
        [
            method_cell(row, table), accuracy_cell(row, "source"), accuracy_cell(row, "target"),
            gain_cell(row, table), reported_cell(row[0], reported), runs_cell(row), command_cell(row),
        ]
        for row in table
    ]  # fmt: skip
    folders = {Path(os.path.relpath(run["path"].parent, home)).as_posix() for row in table for run in row}
    links = ", ".join(f"[{folder}]({quote(folder)})" for folder in sorted(folders))
    remarks = " ".join(f"{remark}." for remark in [*modern_remarks(table), f"Every run: {links}"])
    return f"{heading}\n\n{markdown_table(header, 'lrrrlll', rows)}\n\n{remarks}"


def modern_table(results: list[dict]) -> str:
    """The recipe `modern` at a glance, a row a pair, runs of all precisions together; empty without DANN runs of it."""
    lines = []
    for table in group([run for run in results if run["recipe"] == "modern"]):
        rows = joined(table)
        for row in rows:
            first = row[0]
            if first["method"] == "dann":
                bounds = [with_method(method, row, rows, training) for method in ("source-only", "target-only")]
                lower, upper = (accuracy_cell(bound, "target") if bound else "not run" for bound in bounds)
                worst = f"{min(percents(row, 'target')):.2f}"
                aim = AIMS.get((first["source"], first["target"]), "–")
                cells = [lower, accuracy_cell(row, "target"), worst, aim, upper, str(len(row))]
                lines.append([pair_cell(row, table), *cells])
    header = ["`modern`: target test, %", "Source only", "**DANN**", "Its worst run", "Aimed at"]
    header += ["Trained on target", "DANN runs"]
    return markdown_table(header, "lrrrlrr", lines) if lines else ""


def modern_remarks(table: list[list[dict]]) -> list[str]:
    """How much of the gap between its bounds DANN with `modern` closes, on all machines."""
    remarks = []
    rows = joined(table)
    for row in rows:
        if (row[0]["recipe"], row[0]["method"]) != ("modern", "dann"):
            continue
        lower = [other for other in rows if (other[0]["recipe"], other[0]["method"]) == ("paper", "source-only")]
        upper = with_method("target-only", row, rows, training)
        if len(lower) == 1 and upper:
            low, mean, high = (statistics.mean(percents(runs, "target")) for runs in (*lower, row, upper))
            bounds = "source only with `paper` and trained on target with `modern`"
            remarks.append(f"`modern` closes {100 * (mean - low) / (high - low):.1f} % of the gap between {bounds}")
    return remarks


def joined(table: list[list[dict]]) -> list[list[dict]]:
    """The rows of a table, those as one that differ in device and precision alone."""
    rows = defaultdict(list)
    for row in table:
        rows[row[0]["recipe"], row[0]["method"], training(row[0])] += row
    return list(rows.values())


def cost_table(results: list[dict]) -> str:
    """What DANN runs of the recipe `modern` cost; empty without such runs."""
    rows = []
    for table in group([run for run in results if run["recipe"] == "modern" and "seconds_to" in run]):
        for row in table:
            first = row[0]
            if first["method"] == "dann":
                seconds = [run["seconds"] for run in row]
                reached = [reached_cell(row, percent) for percent in ("90", "95", "98")]
                whole = f"{statistics.median(seconds):,.0f} ({max(seconds):,.0f})"
                tflop = f"{first['operations'] / 1e12:.0f}"
                where = f"{first['machine']}, {first['precision']}, {counted(first['threads'], 'thread')}"
                rows.append([pair_cell(row, table), *reached, whole, tflop, f"{first['parameters']:,}", escape(where)])
    header = ["`modern`, DANN", "s to 90 %", "95 %", "98 %", "s in all (slowest)", "TFLOP", "parameters", "on"]
    note = "Seconds: median over the seeds, tests included, to the end of the first epoch whose target test accuracy is"
    return f"{markdown_table(header, 'lrrrrrrl', rows)}\n\n{note} as high." if rows else ""


def reached_cell(row: list[dict], percent: str) -> str:
    """Median seconds to an accuracy; of the runs that reached it, when not all did."""
    times = [run["seconds_to"][percent] for run in row if run["seconds_to"][percent] is not None]
    if not times:
        return "never"
    return f"{statistics.median(times):,.0f}" + f" ({len(times)} of {len(row)})" * (len(times) < len(row))


def not_run_table(results: list[dict], reported: list[dict]) -> str:
    """What others reported and has no result here, official data only; empty when every result is there."""
    keys = ("source", "target", "recipe", "method")
    done = {tuple(run[key] for key in keys) for run in results if not unofficial(run)}
    rows = []
    for (source, target), recipe in PAIRS.items():
        names = " → ".join(OFFICIAL_MARKS.get(name, name) for name in (source, target))
        entries = [entry for entry in reported if (entry["source"], entry["target"]) == (source, target)]
        for entry in entries:
            if tuple(entry[key] for key in keys) not in done:
                method = f"{METHODS[entry['method']]} (recipe `{entry['recipe']}`)"
                rows.append([names, method, "not run", reported_cell(entry, reported)])
        if not entries and not any(pair[:2] == (source, target) for pair in done):
            rows.append([names, f"all methods (recipe `{recipe}`)", "not run", "–"])
    header = ["Pair", "Method", "Here", "Reported: source / target, %"]
    return f"**Not run, on the official data sets**\n\n{markdown_table(header, 'llll', rows)}" if rows else ""


def footnotes(results: list[dict]) -> str:
    """How to read the tables."""
    notes = [
        "Accuracies: mean ± sample standard deviation over the seeds, last weights of each run (for one seed "
        "also the counts). Target test labels are read for these numbers and select no weights.",
        "Gain: points of target accuracy over source only with the same recipe, epochs, seeds and settings, those of "
        "gradient reversal and of the teacher's labels aside, which do nothing there. "
        "Seconds: median of a row's runs.",
        "Reported: by the paper (JMLR 17(59), 2016; arXiv 1409.7495), by system A (the PyTorch scripts that "
        "recipe `dann` reproduces) or by system B (the Keras scripts that `cnn-grl` reproduces).",
    ]
    if any("SVHN" in unofficial(run) for run in results):
        notes.append(
            "Numbers on an SVHN subset are not of the standard protocol and do not compare with published "
            "ones: official SVHN has 73,257 colour training digits and 26,032 test digits."
        )
    return "\n".join(f"- {note}" for note in notes)


def report(results: list[dict], home: Path) -> str:
    """Everything that stands between the markers."""
    reported = reported_numbers()
    parts = [modern_table(results), *(pair_table(table, reported, home) for table in group(results))]
    parts += [cost_table(results), not_run_table(results, reported), footnotes(results)]
    return "\n\n".join(part for part in parts if part)


def with_report(text: str, body: str, readme: Path, begin: str = BEGIN, end: str = END) -> str:
    """The README's text with the part between the markers replaced, in the line ends that it has."""
    marks = [re.findall(rf"^{marker}[ \t]*\r?$", text, flags=re.MULTILINE) for marker in (begin, end)]
    found = re.search(rf"(?ms)^{begin}[ \t]*\r?\n(.*?)^{end}[ \t]*\r?$", text)
    if [len(lines) for lines in marks] != [1, 1] or found is None:
        raise UserError(f"{readme} needs one line {begin} and, below it, one line {end}: add them")
    newline = "\r\n" if "\r\n" in text else "\n"
    return text[: found.start(1)] + f"\n{body}\n\n".replace("\n", newline) + text[found.end(1) :]


def add(runs: list[Path], folder: Path, force: bool) -> None:
    """Copy the runs' result.json into the results folder; all of them or, when one is refused, none."""
    copies = {}
    for run in runs:
        path = run / "result.json" if run.is_dir() else run
        result = read_result(path)
        if result is None:
            raise UserError(f"{path} is not the result of a training run")
        name = "{recipe}-{method}-seed{seed}.json".format(**result)
        goal = folder / "{source}-{target}".format(**result) / name
        content = path.read_bytes()
        if copies.get(goal, content) != content:
            raise UserError(f"two different runs would become {goal}: add one of them")
        if goal.exists() and goal.read_bytes() != content and not force:
            raise UserError(f"{goal} holds another result: rename it to keep both, or replace it by --force")
        copies[goal] = content
    for goal, content in copies.items():
        goal.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(goal, lambda file, content=content: file.write_bytes(content))
        print(goal)


def parse_args() -> argparse.Namespace:
    parser = script_parser(
        description="Write the README's results tables from the result files.",
        epilog="examples:\n"
        "  python tools/report.py --add runs/svhn-mnist-seed0 runs/svhn-mnist-seed1\n"
        "  python tools/report.py",
    )
    option = parser.add_mutually_exclusive_group().add_argument
    option("--check", action="store_true", help="write nothing; exit 1 when README and results differ")
    option("--add", type=Path, nargs="+", metavar="RUN", help="copy result.json of these runs to the results")
    option = parser.add_argument
    option("--force", action="store_true", help="with --add: replace a different result")
    option("--readme", type=Path, metavar="FILE", default=ROOT / "README.md", help="default: %(default)s")
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
    try:
        text = args.readme.read_bytes().decode("utf-8")
    except OSError as error:
        raise UserError(f"cannot read {args.readme}: {error.strerror}") from None
    results = read_results(args.results)
    new = with_report(text, report(results, args.readme.parent), args.readme)
    if ABLATION_BEGIN in new or ABLATION_END in new:
        new = with_report(new, ablation_report(args.results), args.readme, ABLATION_BEGIN, ABLATION_END)
    if SPEED_BEGIN in new or SPEED_END in new:
        speed = speed_report(args.results, args.readme.parent)
        new = with_report(new, speed, args.readme, SPEED_BEGIN, SPEED_END)
    if not args.check:
        write_atomically(args.readme, lambda file: file.write_bytes(new.encode("utf-8")))
    elif new != text:
        raise UserError(f"{args.readme} does not show what {args.results} holds: run python tools/report.py")


if __name__ == "__main__":
    run_script(main)
