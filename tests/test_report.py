"""The results tables: statistics, marks, what was not run, and the command line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tools import ablation, report
from tools.report_ablation import VARIANTS, ablation_report
from utils.cli import UserError
from utils.config import recipe_config, to_dict

ROOT = Path(__file__).resolve().parent.parent
README = f"# Title\n\n{report.BEGIN}\nold\n{report.END}\n\nafter, with {report.BEGIN} in a sentence\n"
SUBSET = {"source_mark": "SVHN subset, 23,412", "source_test_mark": "SVHN subset, 1,083"}


def result(**changes) -> dict:
    """A result as main.py writes it, on the official data sets unless the changes say otherwise."""
    values = {
        "kind": "training",
        "source": "svhn",
        "target": "mnist",
        "method": "dann",
        "recipe": "dann",
        "seed": 0,
        "epochs": 12,
        "source_correct": 900,
        "source_total": 1000,
        "target_correct": 7000,
        "target_total": 10000,
        "seconds": 100.0,
        "device": "cpu",
        "machine": "AMD EPYC, 2 cores",
        "precision": "bf16",
        "source_mark": "SVHN",
        "target_mark": "MNIST",
        "source_test_mark": "SVHN",
        "target_test_mark": "MNIST",
    } | changes
    values.setdefault("command", f"python main.py --recipe {values['recipe']} --seed {values['seed']}")
    for domain in ("source", "target"):
        values.setdefault(f"{domain}_accuracy", values[f"{domain}_correct"] / values[f"{domain}_total"])
    return values


def write(path: Path, values) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(values if isinstance(values, str) else json.dumps(values), encoding="utf-8")
    return path


def render(tmp_path: Path, *results: dict) -> str:
    for number, values in enumerate(results):
        write(tmp_path / "results" / "pair" / f"{number}.json", values)
    (tmp_path / "results").mkdir(parents=True, exist_ok=True)
    return report.report(report.read_results(tmp_path / "results"), tmp_path)


def rows(text: str, start: str) -> list[list[str]]:
    """The cells of the table rows that start so."""
    lines = [line for line in text.replace("\u00a0", " ").splitlines() if line.startswith(f"| {start}")]
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines]


def run_cli(tmp_path: Path, *arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "tools" / "report.py", "--readme", tmp_path / "README.md"]
    command += ["--results", tmp_path / "results", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with a README, a result, and a run that is not among the results yet."""
    (tmp_path / "README.md").write_text(README, encoding="utf-8")
    write(tmp_path / "results" / "svhn-mnist" / "dann-dann-seed0.json", result())
    write(tmp_path / "runs" / "one" / "result.json", result(seed=1, target_correct=7200))
    return tmp_path


def test_mean_sample_deviation_and_gain(tmp_path):
    """70, 71, 73: mean 71.333, squared deviations 1.778 + 0.111 + 2.778 over n - 1 = 2, root 1.5275."""
    dann = [
        result(seed=seed, target_correct=correct, seconds=seconds)
        for seed, correct, seconds in ((0, 7000, 90), (1, 7100, 1250), (2, 7300, 110))
    ]
    plain = [
        result(seed=seed, target_correct=correct, method="source-only")
        for seed, correct in ((0, 6000), (1, 6000), (2, 6300))
    ]
    text = render(tmp_path, *dann, *plain)
    source_only = rows(text, "source only (recipe `dann`)")[0]
    adapted = rows(text, "**DANN** (recipe `dann`)")[0]
    assert adapted[1:4] == ["90.00 ± 0.00", "71.33 ± 1.53", "+10.33"]
    assert source_only[1:3] == ["90.00 ± 0.00", "61.00 ± 1.73"]
    assert adapted[4] == "system A: 93 / 72–75"
    assert adapted[5] == "3 seeds, 12 epochs, 110 s on AMD EPYC, 2 cores (cpu, bf16)"
    assert adapted[6] == "`python main.py --recipe dann --seed 0 … 2`"
    assert text.index("source only (recipe `dann`)") < text.index("**DANN** (recipe `dann`)")
    assert "[results/pair](results/pair)" in text


def test_a_single_seed_shows_its_counts_and_no_deviation(tmp_path):
    row = rows(render(tmp_path, result(target_correct=7123)), "**DANN** (recipe `dann`)")[0]
    assert row[2] == "71.23 (7123 / 10000)"
    assert row[3] == "–"
    assert row[5].startswith("1 seed, ")


@pytest.mark.parametrize(
    "change",
    [
        {"epochs": 100},
        {"recipe": "paper"},
        {"precision": "fp32"},
        {"device": "cuda"},
        {"config": {"lr": 0.02}},
        {"target_total": 7000},
        {"target_mark": "MNIST subset, 500"},
    ],
)
def test_different_settings_are_never_averaged(tmp_path, change):
    runs = [{"seed": seed, "config": {"lr": 0.01}} for seed in range(3)]
    runs[2] |= change
    text = render(tmp_path, *(result(**run) for run in runs))
    seeds = [row[5][:7] for row in rows(text, "**DANN**") if len(row) == 7]
    assert sorted(seeds) == ["1 seed,", "2 seeds"]


def test_rows_tell_their_settings_apart(tmp_path):
    text = render(tmp_path, *(result(config={"lr": lr, "gamma": 10}) for lr in (0.01, 0.02, 0.03)))
    assert rows(text, "**DANN** (recipe `dann`)"), "0.01 is the recipe's own"
    assert rows(text, "**DANN** (recipe `dann`, lr 0.02)")
    assert rows(text, "**DANN** (recipe `dann`, lr 0.03)")


def test_a_row_alone_tells_its_settings_too(tmp_path):
    text = render(tmp_path, result(recipe="modern", config=to_dict(recipe_config("modern")) | {"warp": 0.0}))
    assert rows(text, "**DANN** (recipe `modern`, warp 0.0)")


def test_a_bound_names_no_settings_that_do_nothing_there(tmp_path):
    own = to_dict(recipe_config("modern")) | {"warp": 0.0, "lambda_max": 0.5}
    text = render(tmp_path, result(recipe="modern", method="source-only", config=own))
    assert rows(text, "source only (recipe `modern`) ")
    text = render(tmp_path, result(recipe="modern", method="source-only", config=own | {"teacher_decay": 0.5}))
    assert rows(text, "source only (recipe `modern`, teacher_decay 0.5)"), "the average is what is tested"


def test_settings_that_the_recipe_does_not_know_are_always_named(tmp_path):
    text = render(tmp_path, *(result(recipe="mine", config={"lr": lr}) for lr in (0.01, 0.02)))
    assert rows(text, "**DANN** (recipe `mine`, lr 0.01)")
    assert rows(text, "**DANN** (recipe `mine`, lr 0.02)")


def test_gain_needs_the_same_settings(tmp_path):
    text = render(tmp_path, result(), result(method="source-only", epochs=100))
    assert rows(text, "**DANN** (recipe `dann`)")[0][3] == "–"


@pytest.mark.parametrize("change", [{"lambda_max": 0.5}, {"teacher_views": "both"}])
def test_settings_of_adaptation_do_not_matter_for_the_gain_unless_a_row_has_the_same(tmp_path, change):
    runs = [
        result(config={"lr": 0.01} | change, target_correct=8000),
        result(config={"lr": 0.01}, method="source-only", target_correct=7100),
    ]
    assert rows(render(tmp_path, *runs), "**DANN**")[0][3] == "+9.00"
    runs.append(result(config={"lr": 0.01} | change, method="source-only", target_correct=7200))
    assert rows(render(tmp_path, *runs), "**DANN**")[0][3] == "+8.00"
    runs[1:] = [result(config={"lr": 0.02} | change, method="source-only")]
    (tmp_path / "results" / "pair" / "2.json").unlink()
    assert rows(render(tmp_path, *runs), "**DANN**")[0][3] == "–"


def test_a_run_that_is_too_old_for_a_setting_did_without(tmp_path):
    runs = [result(config={"lr": 0.01}), result(seed=1, config={"lr": 0.01, "balance_classes": False})]
    runs.append(result(seed=2, config={"lr": 0.01, "balance_classes": True}))
    text = render(tmp_path, *runs)
    assert rows(text, "**DANN** (recipe `dann`) ")[0][5].startswith("2 seeds")
    assert rows(text, "**DANN** (recipe `dann`, balance_classes True)")[0][5].startswith("1 seed,")


def test_gain_compares_the_seeds_that_both_rows_have(tmp_path):
    bound = {"method": "source-only", "config": {"lr": 0.01}}
    runs = [result(seed=seed, config={"lr": 0.01}, target_correct=8000 + seed) for seed in (0, 1)]
    runs += [result(seed=seed, **bound, target_correct=correct) for seed, correct in ((1, 7001), (2, 100))]
    assert rows(render(tmp_path, *runs), "**DANN**")[0][3] == "+10.00"
    (tmp_path / "results" / "pair" / "3.json").unlink()
    assert rows(render(tmp_path, *runs[:2], result(seed=2, **bound)), "**DANN**")[0][3] == "–"


def test_gain_is_over_source_only_and_nothing_else(tmp_path):
    text = render(tmp_path, result(), result(method="target-only"))
    assert rows(text, "**DANN** (recipe `dann`)")[0][3] == "–"


def test_the_paper_stands_in_where_a_recipe_has_no_reported_number(tmp_path):
    text = render(tmp_path, result(method="target-only"))
    assert rows(text, "trained on target (recipe `dann`)")[0][4] == "paper: – / 99.42"


def test_seeds_of_an_average_may_differ_in_their_recorded_seed_and_asked_precision(tmp_path):
    first = result(config={"seed": 0, "precision": "auto", "lr": 0.01})
    second = result(seed=1, config={"seed": 1, "precision": "bf16", "lr": 0.01})
    assert rows(render(tmp_path, first, second), "**DANN** (recipe `dann`)")[0][5].startswith("2 seeds")


def test_commands_that_differ_in_more_than_the_seed_are_all_shown(tmp_path):
    first = result(command="python main.py | tee log")
    second = result(seed=1, command="python main.py --seed 1 --workers 2")
    text = render(tmp_path, first, second)
    assert r"`python main.py \| tee log`<br>`python main.py --seed 1 --workers 2`" in text


def test_the_folder_of_a_run_is_no_part_of_its_command(tmp_path):
    first = result(command="python main.py --run-dir 'my runs/0' --epochs 12 --seed 0")
    second = result(seed=1, command="python main.py --run-dir=runs/1 --epochs 12 --seed 1")
    assert "`python main.py --epochs 12 --seed 0, 1`" in render(tmp_path, first, second)


def test_the_mark_of_unofficial_data_is_carried(tmp_path):
    text = render(tmp_path, result(**SUBSET), result())
    official, subset = text.index("**SVHN → MNIST**"), text.index("**SVHN subset, 23,412 → MNIST**")
    assert official < subset
    assert "(source test: SVHN subset, 1,083; target test: MNIST)" in text[subset:]
    assert "Reported: source / target" in text[official:subset]
    assert "Reported for the full SVHN: source / target" in text[subset:]
    assert "73,257 colour training digits and 26,032 test digits" in text


def test_subsets_of_different_size_have_different_tables(tmp_path):
    text = render(tmp_path, result(**SUBSET), result(**SUBSET | {"source_mark": "SVHN subset, 500"}, seed=1))
    assert "**SVHN subset, 500 → MNIST**" in text
    assert "**SVHN subset, 23,412 → MNIST**" in text


def test_what_was_not_run_says_so(tmp_path):
    text = render(tmp_path, result(**SUBSET))
    not_run = {(row[0], row[1]): row[2:] for row in rows(text, "") if "not run" in row}
    assert not_run["SVHN → MNIST", "**DANN** (recipe `dann`)"] == ["not run", "system A: 93 / 72–75"]
    assert not_run["SVHN → MNIST", "source only (recipe `cnn-grl`)"] == ["not run", "system B: 90.8 / 60.1"]
    assert not_run["MNIST → SVHN", "**DANN** (recipe `cnn-grl`)"] == ["not run", "system B: 98.2 / 23.8"]
    assert not_run["synth → optdigits", "all methods (recipe `quick`)"] == ["not run", "–"]


def test_what_was_run_is_not_called_not_run(tmp_path):
    built_in = {"source": "synth", "target": "optdigits", "source_mark": "synth", "target_mark": "optdigits"}
    text = render(tmp_path, result(), result(**built_in, recipe="quick"))
    not_run = [row[:2] for row in rows(text, "") if "not run" in row]
    assert ["SVHN → MNIST", "**DANN** (recipe `dann`)"] not in not_run
    assert ["SVHN → MNIST", "**DANN** (recipe `paper`)"] in not_run
    assert "synth → optdigits" not in dict(not_run)


def test_tables_are_well_formed(tmp_path):
    marked = result(**SUBSET | {"source_mark": "a|b *c*"}, machine="x | y", command="a `b` | c")
    text = render(tmp_path, marked, result(), result(recipe="paper", method="target-only"))
    for block in text.split("\n\n"):
        if block.startswith("|"):
            bars = {line.replace(r"\|", "").count("|") for line in block.splitlines()}
            assert len(bars) == 1
    assert r"**a\|b \*c\* → MNIST**" in text


def test_other_kinds_are_ignored(tmp_path):
    assert render(tmp_path, {"kind": "benchmark"}) == render(tmp_path / "empty")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "is not a result"),
        ("{}", "is not a result"),
        ({key: value for key, value in result().items() if key != "machine"}, 'lacks the key "machine"'),
        (result(seed="0"), '"seed" cannot be'),
        (result(epochs=True), '"epochs" cannot be'),
        (result(method="magic"), "'magic' is none of"),
        (result(target_accuracy=0.9), "does not fit 7000 / 10000"),
        (result(target_accuracy=float("nan")), "does not fit"),
        (result() | {"target_correct": 0, "target_total": 0}, "does not fit 0 / 0"),
        (result(seconds=float("nan")), '"seconds" cannot be'),
        (result(config=[]), '"config"'),
        (result(dry_run=True), "dry run"),
    ],
)
def test_a_bad_result_is_named(tmp_path, content, message):
    path = write(tmp_path / "results" / "bad.json", content)
    with pytest.raises(UserError, match=message) as caught:
        report.read_results(tmp_path / "results")
    assert str(path) in str(caught.value)


def test_the_same_run_twice_names_both_files(tmp_path):
    with pytest.raises(UserError, match=r"0\.json and .*1\.json"):
        render(tmp_path, result(), result(seconds=99.0))


def test_cli_writes_checks_and_leaves_the_rest_alone(project):
    stale = run_cli(project, "--check")
    assert (stale.returncode, stale.stdout) == (1, "")
    assert stale.stderr.count("\n") == 1
    assert "python tools/report.py" in stale.stderr
    assert (project / "README.md").read_text(encoding="utf-8") == README

    assert run_cli(project).returncode == 0
    assert run_cli(project, "--check").returncode == 0
    text = (project / "README.md").read_text(encoding="utf-8")
    old_before, old_after = README.split("\nold\n")
    assert text.startswith(old_before)
    assert text.endswith(old_after)
    assert "70.00 (7000 / 10000)" in text
    assert "old" not in text
    assert sorted(path.name for path in project.iterdir()) == ["README.md", "results", "runs"]

    write(project / "results" / "svhn-mnist" / "dann-dann-seed0.json", result(target_correct=7001))
    assert run_cli(project, "--check").returncode == 1
    assert run_cli(project).returncode == 0
    assert run_cli(project, "--check").returncode == 0


def test_cli_keeps_windows_line_ends(project):
    (project / "README.md").write_bytes(README.replace("\n", "\r\n").encode("utf-8"))
    assert run_cli(project).returncode == 0
    content = (project / "README.md").read_bytes()
    assert content.count(b"\n") == content.count(b"\r\n") > 20
    assert run_cli(project, "--check").returncode == 0


@pytest.mark.parametrize(
    "text",
    ["", f"{report.BEGIN}\n", f"{report.END}\n{report.BEGIN}\n", f"{report.BEGIN}\n{report.END}\n" * 2, None],
)
def test_cli_without_markers_says_so_in_one_line(project, text):
    readme = project / "README.md"
    if text is None:
        readme.unlink()
    else:
        readme.write_text(text, encoding="utf-8")
    done = run_cli(project)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert "README.md" in done.stderr
    assert text is None or readme.read_text(encoding="utf-8") == text


def test_cli_adds_a_run_and_refuses_to_replace_another(project):
    run, goal = project / "runs" / "one", project / "results" / "svhn-mnist" / "dann-dann-seed1.json"
    assert run_cli(project, "--add", run).returncode == 0
    assert goal.read_bytes() == (run / "result.json").read_bytes()
    assert run_cli(project, "--add", run / "result.json").returncode == 0

    before = goal.read_bytes()
    write(run / "result.json", result(seed=1, target_correct=7300))
    refused = run_cli(project, "--add", run)
    assert refused.returncode == 1
    assert "--force" in refused.stderr
    assert goal.read_bytes() == before
    assert run_cli(project, "--add", run, "--force").returncode == 0
    assert goal.read_bytes() == (run / "result.json").read_bytes()


@pytest.mark.parametrize(
    ("bad", "message"),
    [(result(seed=3, dry_run=True), "dry run"), ({"kind": "benchmark"}, "not the result of a training run")],
)
def test_cli_adds_all_or_nothing(project, bad, message):
    write(project / "runs" / "bad" / "result.json", bad)
    refused = run_cli(project, "--add", project / "runs" / "one", project / "runs" / "bad")
    assert refused.returncode == 1
    assert message in refused.stderr
    assert [path.name for path in (project / "results").rglob("*.json")] == ["dann-dann-seed0.json"]


def test_cli_refuses_two_runs_for_one_place(project):
    write(project / "runs" / "two" / "result.json", result(seed=1, target_correct=1))
    runs = (project / "runs" / "one", project / "runs" / "two")
    for force in ((), ("--force",)):
        refused = run_cli(project, "--add", *runs, *force)
        assert refused.returncode == 1
        assert "two different runs" in refused.stderr


def test_cli_usage_errors():
    command = [sys.executable, ROOT / "tools" / "report.py"]
    for arguments in (["--force"], ["--check", "--add", "run"], ["--che"]):
        assert subprocess.run([*command, *arguments], capture_output=True, timeout=60).returncode == 2


def test_the_repository_readme_shows_the_repository_results():
    done = subprocess.run(
        [sys.executable, "tools/report.py", "--check"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_costs_of_modern_runs(tmp_path):
    def run(seed, seconds, *reached):
        times = dict(zip(("90", "95", "98"), reached, strict=True))
        more = {"operations": 1.2e14, "parameters": 559092, "threads": 2, "seconds_to": times, "config": own}
        return result(recipe="modern", seed=seed, seconds=seconds, **more)

    own = to_dict(recipe_config("modern"))

    text = render(tmp_path, run(0, 470.0, 90, 140, 230), run(1, 460.0, 80, 150, 250), run(2, 480.0, 100, 160, None))
    (row,) = rows(text, "SVHN → MNIST | 90")
    assert row[1:6] == ["90", "150", "240 (2 of 3)", "470 (480)", "120"]
    assert row[6:] == ["559,092", "AMD EPYC, 2 cores, bf16, 2 threads"]
    own = own | {"warp": 0.0}
    assert rows(render(tmp_path, run(0, 470.0, 90, 140, 230)), "SVHN → MNIST, warp 0.0 | 90")
    never = [run(seed, 470.0, None, None, None) | {"threads": 1} for seed in range(3)]
    text = render(tmp_path, *never)
    assert "| never | never | never |" in text
    assert "AMD EPYC, 2 cores, bf16, 1 thread |" in text


# --- the ablation -----------------------------------------------------------------------------------


def ablated(folder: Path, pair: str, variant: str, *correct: int) -> None:
    source, target = pair.split("-")
    for seed, count in enumerate(correct):
        values = result(recipe="modern", source=source, target=target, seed=seed, target_correct=count, steps=640)
        write(folder / "ablation" / pair / f"{variant.replace(' ', '-')}-seed{seed}.json", values)


def test_modern_at_a_glance_and_the_share_of_the_gap(tmp_path):
    """From 30 % (source only, recipe paper) to 90 % (trained on target), 81 and 87 % close 54 of 60 points."""
    own = to_dict(recipe_config("modern"))
    counts = enumerate((8100, 8700))
    modern = [result(recipe="modern", seed=seed, target_correct=count, config=own) for seed, count in counts]
    bounds = [
        result(recipe="paper", method="source-only", epochs=5, target_correct=3000),
        result(recipe="modern", method="target-only", target_correct=9000, config=own),
    ]
    closes = "`modern` closes 90.0 % of the gap between source only with `paper` and trained on target with `modern`"
    start = "SVHN → MNIST | not run"

    text = render(tmp_path / "one", modern[0])
    assert rows(text, start)[0][1:] == [
        "not run", "81.00 (8100 / 10000)", "81.00", "99.0, worst 98.7", "not run", "1",
    ]  # fmt: skip
    text = render(tmp_path / "both", *modern, *bounds)
    glance = ["not run", "84.00 ± 4.24", "81.00", "99.0, worst 98.7", "90.00 (9000 / 10000)", "2"]
    assert rows(text, start)[0][1:] == glance
    assert closes in text
    # Precisions have rows of their own; the glance and the gap are of all runs.
    text = render(tmp_path / "precisions", modern[0] | {"precision": "fp32"}, modern[1], *bounds)
    assert rows(text, start)[0][1:] == glance
    assert text.count(closes) == 1
    assert "| 1 seed, " in text
    for lacking in bounds:
        assert "gap" not in render(tmp_path / lacking["recipe"], *modern, lacking)
    source_only = result(recipe="modern", method="source-only", target_correct=6000, config=own)
    text = render(tmp_path / "source only", *modern, source_only)
    assert rows(text, "SVHN → MNIST | 60.00")[0][1:3] == ["60.00 (6000 / 10000)", "84.00 ± 4.24"]
    # Two lengths of a recipe are not taken for each other.
    assert "gap" not in render(tmp_path / "longer", *modern, bounds[0], bounds[1] | {"epochs": 20})
    assert "`modern`: target test" not in render(tmp_path / "others", result())


def test_the_ablation_compares_each_variant_with_the_whole_recipe(tmp_path):
    ablated(tmp_path, "svhn-mnist", "everything", 9800, 9700, 9900)
    ablated(tmp_path, "svhn-mnist", "no reversal", 9500, 9600, 9400)
    ablated(tmp_path, "svhn-mnist", "source only", 8000)
    found = {line.split(" | ")[0].lstrip("| "): line for line in ablation_report(tmp_path).splitlines() if "|" in line}
    assert found["everything"].endswith("| – | 98.00\u00a0±\u00a01.00 |")
    assert found["no reversal"].endswith("| `--lambda-max 0` | 95.00\u00a0±\u00a01.00 (-3.00) |")
    assert found["source only"].endswith("| 80.00 (-18.00) |")
    assert found["no alignment"].endswith("| not run |")
    assert "over the seeds 0, 1, 2" in ablation_report(tmp_path)
    ablated(tmp_path, "svhn-mnist", "no alignment", 9500, 9500)
    (row,) = [line for line in ablation_report(tmp_path).splitlines() if line.startswith("| no alignment |")]
    assert "95.00\u00a0±\u00a00.00 (-2.50)" in row, "against seeds 0 and 1 of the whole recipe, 97.50 %"
    ablated(tmp_path / "one", "svhn-mnist", "everything", 9800)
    assert "Target test accuracy, %: seed 0;" in ablation_report(tmp_path / "one")
    assert "Runs of `--recipe modern --teacher-views both` with 640 steps" in ablation_report(tmp_path)


def test_the_ablation_stays_out_of_the_table_of_results(tmp_path):
    write(tmp_path / "svhn-mnist/a.json", result())
    ablated(tmp_path, "svhn-mnist", "no reversal", 9500)
    assert [run["recipe"] for run in report.read_results(tmp_path)] == ["dann"]


def test_an_ablation_without_results_says_so(tmp_path):
    assert ablation_report(tmp_path) == "Not run."


def test_an_unknown_variant_is_named(tmp_path):
    ablated(tmp_path, "svhn-mnist", "no luck", 1)
    with pytest.raises(UserError, match=r"no-luck-seed0\.json is no variant"):
        ablation_report(tmp_path)


def test_every_variant_changes_one_part_of_the_recipe_or_the_two_that_its_name_tells():
    for name, flags in VARIANTS.items():
        parts = {flag.split("-")[2] for flag in flags[::2]}  # --alignment and --alignment-after are of one
        assert len(parts) == (2 if name.startswith("neither ") else bool(flags))
        assert (name == "everything") == (not flags)
    assert len(set(VARIANTS.values())) == len(VARIANTS)


def test_the_ablation_runs_what_is_missing(monkeypatch, tmp_path, tiny_data):
    """A dry run trains and leaves no result; a run that has a result is not trained again."""
    flags = ["--pairs", "svhn-mnist", "--variants", "everything", "no reversal", "--seeds", "0", "--dry-run"]
    flags += ["--out", tmp_path / "out", "--runs", tmp_path / "runs", "--data-dir", tiny_data, "--jobs", "2"]
    write(tmp_path / "out/svhn-mnist/everything-seed0.json", result())
    monkeypatch.setattr(sys, "argv", ["ablation.py", *map(str, flags)])
    ablation.main()
    assert [path.name for path in (tmp_path / "runs/svhn-mnist").iterdir()] == ["no-reversal-seed0"]
    config = json.loads((tmp_path / "runs/svhn-mnist/no-reversal-seed0/config.json").read_text())
    assert (config["recipe"], config["lambda_max"], config["seed"]) == ("modern", 0.0, 0)
    assert config["teacher_views"] == "both", "the recipe as the ablation took it apart"
    assert [path.name for path in (tmp_path / "out/svhn-mnist").iterdir()] == ["everything-seed0.json"]


def test_a_run_of_the_ablation_that_fails_is_named(monkeypatch, tmp_path):
    flags = ["--pairs", "svhn-mnist", "--variants", "everything", "--seeds", "0", "--dry-run"]
    flags += ["--out", tmp_path / "out", "--runs", tmp_path / "runs", "--data-dir", tmp_path / "nowhere"]
    monkeypatch.setattr(sys, "argv", ["ablation.py", *map(str, flags)])
    monkeypatch.setenv("http_proxy", "http://localhost:9")
    monkeypatch.setenv("https_proxy", "http://localhost:9")
    with pytest.raises(UserError, match="svhn-mnist, everything, seed 0 failed: error: "):
        ablation.main()
