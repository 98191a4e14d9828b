"""The tables: grouping, statistics, marks, what is refused, and that the pages show what results/ holds."""

import json
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from tools import ablation, report
from tools.report_ablation import ablation_report
from utils.cli import UserError

PLAIN = {"network": "system-a", "lr": 0.01}
Record = dict[str, Any]


def result(correct: int = 7000, **changes: Any) -> Record:
    """A result as main.py writes it, on the official data sets unless the changes say otherwise."""
    return {
        "kind": "training", "source": "svhn", "target": "mnist", "method": "dann", "recipe": "dann", "seed": 0,
        "epochs": 12, "source_correct": 900, "source_total": 1000, "target_correct": correct, "target_total": 10000,
        "source_accuracy": 0.9, "target_accuracy": correct / 10000, "seconds": 100.0, "device": "cpu",
        "machine": "AMD EPYC, 2 cores", "precision": "bf16", "source_mark": "SVHN", "target_mark": "MNIST",
        "source_test_mark": "SVHN", "target_test_mark": "MNIST", "dry_run": False, "resumed": [], "config": PLAIN,
        "command": f"python main.py --seed {changes.get('seed', 0)} --run-dir runs/a", **changes,
    }  # fmt: skip


def runs(*corrects: int, **changes: Any) -> list[Record]:
    return [result(correct, seed=seed, **changes) for seed, correct in enumerate(corrects)]


def write(folder: Path, records: list[Any], name: str = "svhn-mnist.jsonl") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return folder


def rows(text: str) -> list[dict[str, str]]:
    """The rows of all tables in a text, by their headers."""
    found = []
    for block in text.replace("\u00a0", " ").split("\n\n"):
        lines = [re.split(r" ?(?<!\\)\| ?", line)[1:-1] for line in block.splitlines() if line.startswith("|")]
        found += [dict(zip(lines[0], cells, strict=True)) for cells in lines[2:]]
    return found


def readme(tmp_path: Path, *records: Record) -> list[dict[str, str]]:
    return rows(report.readme_report(report.read_results(write(tmp_path, list(records)))))


def docs(tmp_path: Path, *records: Record) -> list[dict[str, str]]:
    text = report.docs_report(report.read_results(write(tmp_path, list(records))))
    return [row for row in rows(text) if "Gain" in row]


def shown(*percents: float) -> str:
    return f"{statistics.mean(percents):.2f} ± {statistics.stdev(percents):.2f} (n = {len(percents)})"


def test_means_deviations_bounds_and_gain(tmp_path):
    records = runs(7000, 7100, 7300) + runs(6000, 6050, method="source-only") + runs(9900, method="target-only")
    (row,) = readme(tmp_path, *records)
    assert list(row.values()) == [
        "SVHN → MNIST", "DANN, recipe dann", shown(60, 60.5), shown(70, 71, 73), "99.00 (n = 1)",
        "54.90 → 73.85 → 99.42 (arXiv: 59.19 → 71.07)",
    ]  # fmt: skip
    lower, adapted, upper = docs(tmp_path, *records)
    assert adapted["Gain"] == "+10.25", "over seeds 0 and 1, which both have: 70.5 - 60.25"
    assert adapted["Runs"] == "seeds 0, 1, 2; 12 epochs, 100 s on AMD EPYC, 2 cores (cpu, bf16)"
    assert (lower["Gain"], upper["Gain"]) == ("", "")
    assert docs(tmp_path, result(seed=3), *records[3:])[1]["Gain"] == "–"
    assert list(readme(tmp_path, *records[:3])[0].values()).count("not run") == 2


def test_runs_share_a_row_when_their_settings_are_alike(tmp_path):
    others = [{"epochs": 100}, {"recipe": "paper"}, {"precision": "fp32"}, {"device": "cuda"}]
    others += [{"target_mark": "MNIST, 500"}, {"config": PLAIN | {"lr": 0.02}}, {"config": PLAIN | {"warp": 0.2}}]
    for change in others:
        records = [*runs(7000, 7100), result(7300, seed=2, **change)]
        assert {row["Target test, %"][-7:] for row in docs(tmp_path, *records)} == {"(n = 1)", "(n = 2)"}
        assert readme(tmp_path, *records) == [], "too few of each"
    first, second = PLAIN | {"modern": None}, PLAIN | {"modern": None, "precision": "auto", "seed": 1}
    assert len(docs(tmp_path, result(config=first), result(seed=1, config=second))) == 1


def test_a_bound_may_differ_in_adaptation_and_precision_alone(tmp_path):
    adapted = runs(8000, 8000, 8000, precision="fp32", config=PLAIN | {"lambda_max": 0.5, "modern": {"warp": 0.2}})
    bound = result(7100, method="source-only", config=PLAIN | {"lambda_max": 1.0})
    for bounds, expected in (
        ([bound], "71.00 (n = 1)"),
        ([bound, result(7200, method="source-only", precision="fp32")], "72.00 (n = 1)"),
        ([bound | {"config": PLAIN | {"modern": {"teacher_decay": 0.9}}}], "not run"),
        ([bound | {"epochs": 3}], "not run"),
        ([bound | {"recipe": "paper"}], "not run"),
    ):
        assert readme(tmp_path, *adapted, *bounds)[0]["Source only"] == expected


def test_names_of_rows_follow_from_the_data(tmp_path):
    command = "python main.py --epochs 12 --seed 0"
    records = runs(9900, 9900, 9900, recipe="modern") + runs(7000, 7100, 7300, command=command)
    more = {"command": command + " --no-balance-classes", "config": PLAIN | {"balance_classes": False}, "epochs": 20}
    records += runs(8000, 8100, 8200, **more) + runs(8000, recipe="paper")
    assert [row["Method"] for row in readme(tmp_path, *records)] == [
        "DANN, recipe dann, `--no-balance-classes`, 20 epochs", "DANN, recipe dann, 12 epochs",
        "modern (EMA teacher + reversal)",
    ]  # fmt: skip
    assert "dann, `--epochs 12 --no-balance-classes`" in docs(tmp_path, *records)[0]["Method"]


def test_source_only_counts_with_the_batch_statistics_that_are_better(tmp_path):
    for by_source, better, gain in ((5000, shown(60, 60.5), "+10.25"), (6200, shown(62, 62), "+8.50")):
        bound = runs(6000, 6050, method="source-only", target_correct_by_source_statistics=by_source)
        records = runs(7000, 7100, 7300) + bound
        assert readme(tmp_path, *records)[0]["Source only"] == better
        lower, adapted = docs(tmp_path, *records)
        both = f"{shown(60, 60.5)}; by the source's statistics {shown(by_source / 100, by_source / 100)}"
        assert (lower["Target test, %"], adapted["Gain"]) == (both, gain)


def test_data_that_is_not_official_is_marked(tmp_path):
    whole, subset = ({"source_mark": f"SVHN {kind}"} for kind in ("unofficial, 73,257", "subset, 23,412"))
    marked = runs(7000, 7100, 7300, **whole) + runs(8000, 8100, 8300, **subset)
    for records, pairs, notes in (
        (runs(7000, 7100, 7300), ["SVHN → MNIST"], 0),
        (marked, [r"SVHN\*", "SVHN subset"], 1),
    ):
        frame = report.read_results(write(tmp_path, records))
        text = report.readme_report(frame)
        assert text.count(report.UNOFFICIAL_NOTE) == notes
        assert all(pair in text for pair in pairs)
    assert r"## SVHN unofficial, 73,257 → MNIST" in report.docs_report(frame)


def test_what_others_report_stands_beside_the_runs_here(tmp_path):
    records = runs(7000, 7200, recipe="system-a", epochs=100) + runs(
        100, recipe="system-a", source_mark="SVHN subset, 9"
    )
    text = report.docs_report(report.read_results(write(tmp_path, records)))
    here = {row["By"]: row["Here"] for row in rows(text) if "By" in row}
    assert here["system A"] == f"recipe system-a: 90.00 / {shown(70, 72)}, 100 epochs"
    assert here["system B"] == "recipe cnn-grl: not run"


def test_commands_with_shell_characters_keep_a_row_whole(tmp_path):
    command = "python main.py --run-dir '/tmp/a b' --data-dir 'a|b `c`' --clip-norm 1 --frozen 2 3 --seed=0"
    (row,) = docs(tmp_path, result(command=command, machine="x | <y> *z*"))
    assert row["Command"] == r"`python main.py --data-dir 'a\|b 'c'' --clip-norm 1 --frozen 2 3`"
    assert row["Method"] == "DANN, recipe dann, `--clip-norm 1 --frozen 2 3`"
    assert r"x \| \<y> \*z\*" in row["Runs"]


BROKEN = [
    ({key: value for key, value in result().items() if key != "machine"}, "lacks machine"),
    (result(kind="benchmark"), "no training run"),
    (result(dry_run=True), "dry run"),
    (result(method="magic"), "lacks a method of"),
    (result(target_accuracy=0.9), "does not fit 7000 / 10000"),
    (result(target_correct=0, target_total=0), "does not fit 0 / 0"),
    ([], "is not a record"),
]


def test_a_broken_record_is_named(tmp_path):
    for record, message in [*BROKEN, (result(6000), "of another line")]:
        with pytest.raises(UserError, match=rf"svhn-mnist\.jsonl line [12].*{message}"):
            report.read_results(write(tmp_path, [result(), record]))
    (tmp_path / "svhn-mnist.jsonl").write_text("{\n")
    with pytest.raises(UserError, match=r"svhn-mnist\.jsonl line 1 is not JSON"):
        report.read_results(tmp_path)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with pages and three results, and a function that runs the tool on them."""
    write(tmp_path / "results", runs(7000, 7100, 7300))
    (tmp_path / "docs").mkdir()
    for page, names in (
        ("README.md", "results"),
        ("docs/results.md", "results selection ablation"),
        ("docs/speed.md", "speed"),
    ):
        parts = "".join(f"<!-- {name}:begin -->\nold\n<!-- {name}:end -->\n" for name in names.split())
        (tmp_path / page).write_text(f"# Title\n\n{parts}\nafter <!-- results:begin -->\n", encoding="utf-8")

    def run(*arguments: object) -> None:
        places = ["--readme", tmp_path / "README.md", "--docs", tmp_path / "docs", "--results", tmp_path / "results"]
        monkeypatch.setattr(sys, "argv", ["report.py", *map(str, [*places, *arguments])])
        report.main()

    return tmp_path, run


def test_check_fails_until_the_pages_show_what_the_results_hold(project):
    folder, run = project
    pages = [folder / "README.md", folder / "docs/results.md", folder / "docs/speed.md"]
    with pytest.raises(UserError, match=r"README\.md, .*results\.md, .*speed\.md; run python -m tools\.report"):
        run("--check")
    assert all("\nold\n" in page.read_text() for page in pages)
    run()
    run("--check")
    assert shown(70, 71, 73) in pages[0].read_text().replace("\u00a0", " ")
    for page in pages:
        assert re.fullmatch(r"# Title\n\n<!-- .* -->\n\nafter <!-- results:begin -->\n", page.read_text(), re.DOTALL)
    write(folder / "results", runs(7000, 7100, 7301))
    with pytest.raises(UserError, match=r"README\.md, .*results\.md; run"):
        run("--check")
    pages[0].write_text("# No markers\n")
    with pytest.raises(UserError, match=r"README\.md needs one line <!-- results:begin -->"):
        run()


def test_add_appends_all_or_none(project):
    folder, run = project
    file, new = folder / "results/svhn-mnist.jsonl", result(7400, seed=3)
    before = file.read_text()
    one = write(folder / "one", [new], "result.json")
    two = write(folder / "two", [result(source="mnist", target="usps")], "result.json")
    for bad, message in [*BROKEN, (result(1), "same settings and seed"), (new, "same settings and seed")]:
        write(folder / "bad", [bad], "result.json")
        with pytest.raises(UserError, match=message):
            run("--add", one, two, folder / "bad")
        assert [path.name for path in file.parent.iterdir()] == [file.name]
        assert file.read_text() == before
    run("--add", one / "result.json", two)
    assert file.read_text() == before + json.dumps(new) + "\n"
    assert (file.parent / "mnist-usps.jsonl").exists()
    run("--add", write(folder / "one", [result(9000, seed=1)], "result.json"), "--force")
    assert [json.loads(line)["target_correct"] for line in file.read_text().splitlines()] == [7000, 9000, 7300, 7400]


def test_each_signal_chooses_the_epoch_that_it_likes_best(project, tmp_path):
    """Entropy the least, the others the most; a run without all of the signals has no curve."""
    folder, run = project
    curves = {
        "target_accuracy": [0.5, 0.9, 0.8, 0.7], "entropy": [0.4, 0.3, 0.2, 0.3], "diversity": [2.3, 2.0, 2.1, 2.2],
        "smallest_class_share": [0.0, 0.01, 0.02, 0.1], "bnm": [0.1, 0.9, 0.2, 0.3], "snd": [1.0, 1.0, 2.0, 1.0],
        "class_ami": [0.1, 0.2, 0.3, 0.4],
    }  # fmt: skip
    epochs = [dict(zip(curves, values, strict=True)) for values in zip(*curves.values(), strict=True)]
    for seed, lines in ((0, epochs), (1, [{"target_accuracy": 0.5, "entropy": 0.1}])):
        where = tmp_path / f"run-{seed}"
        where.mkdir()
        (where / "result.json").write_text(json.dumps(result(seed=seed, source="a/src", target="b/tgt")))
        (where / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run("--add", tmp_path / "run-0", tmp_path / "run-1")
    assert len((folder / "results" / "src-tgt.jsonl").read_text().splitlines()) == 2
    assert len((folder / "results" / "selection.jsonl").read_text().splitlines()) == 1
    run()
    (row,) = rows((folder / "docs/results.md").read_text().split("selection:begin")[1].split("selection:end")[0])
    found = {name: row[name] for name in list(row)[3:]}
    assert found == {
        "Last": "70.00", "entropy": "80.00", "diversity": "50.00", "smallest class": "70.00", "BNM": "90.00",
        "SND": "80.00", "ClassAMI": "70.00", "Oracle (uses test labels)": "90.00",
    }  # fmt: skip


def test_the_pages_of_the_repository_show_its_results():
    command = [sys.executable, "-m", "tools.report", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_ablation_compares_each_variant_with_everything_on(tmp_path):
    on, off = {"lambda_max": 0.3, "modern": {"warp": 0.2}}, {"lambda_max": 0.0, "modern": {"warp": 0.0}}
    records = runs(9800, 9700, 9900, variant="everything", steps=640, config=on)
    records += runs(9500, 9600, variant="neither", steps=640, config=off)
    text = ablation_report(write(tmp_path, records, "ablation.jsonl") / "ablation.jsonl")
    assert [list(row.values()) for row in rows(text)] == [
        ["everything", "–", shown(98, 97, 99)],
        ["neither", "`--lambda-max 0.0 --warp 0.0`", f"{shown(95, 96)}, -2.00"],  # over seeds 0 and 1: 95.5 - 97.5
    ]


def test_the_ablation_runs_and_appends_what_is_missing(monkeypatch, tmp_path):
    def main_py(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        folder, seed = Path(command[command.index("--run-dir") + 1]), int(command[command.index("--seed") + 1])
        write(folder, [result(seed=seed)], "result.json")
        return subprocess.CompletedProcess(command, int(seed == 9), "", "error: no luck")

    def run(*seeds: str) -> list[Record]:
        flags = ["--pairs", "svhn-mnist", "--variants", "everything", "no warp", "--jobs", "2", "--seeds", *seeds]
        monkeypatch.setattr(sys, "argv", ["ablation.py", "--out", str(out), "--runs", str(tmp_path / "runs"), *flags])
        ablation.main()
        return [json.loads(line) for line in out.read_text().splitlines()]

    monkeypatch.setattr(subprocess, "run", main_py)
    out = write(tmp_path, [result(9999, variant="no warp")], "out.jsonl") / "out.jsonl"
    assert sorted((line["variant"], line["seed"], line["target_correct"]) for line in run("0", "1")) == [
        ("everything", 0, 7000), ("everything", 1, 7000), ("no warp", 0, 9999), ("no warp", 1, 7000)
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"svhn-mnist, .*, seed 9 failed: error: no luck"):
        run("9")
