"""The benchmark counts and times what it says, and its baseline trains the same network on the same numbers."""

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from data_loader import DigitSet, load_domain
from model import DANN, NETWORKS
from tools import benchmark, report_speed
from tools.usual_way import Digits, UsualWay, transform_of
from utils import machine
from utils.cli import UserError
from utils.config import RECIPES, recipe_config

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")


def by_hand(layers: nn.Sequential, x: torch.Tensor) -> tuple[int, torch.Tensor]:
    """2 × multiplications of a forward pass, from the shapes of the weights and of the outputs."""
    count = 0
    for layer in layers:
        x = layer(x)
        if isinstance(layer, nn.Conv2d):
            count += 2 * layer.weight.numel() * x.shape[2] * x.shape[3]
        elif isinstance(layer, nn.Linear):
            count += 2 * layer.weight.numel()
    return count, x


@pytest.mark.parametrize("recipe", RECIPES)
def test_operations_are_those_of_the_layers(recipe):
    config = recipe_config(recipe)
    model = DANN(config.network).eval()
    image = torch.zeros(1, NETWORKS[config.network].channels, config.image_size, config.image_size)
    with torch.no_grad():
        extractor, features = by_hand(model.extractor.layers, image)
        expected = {"extractor": extractor}
        for name in ("classifier", "discriminator"):
            expected[name], _ = by_hand(getattr(model, name).layers, features)
    assert benchmark.operations(config) == expected


def test_operations_of_system_a_by_the_numbers_of_its_description():
    parts = benchmark.operations(recipe_config("dann"))
    convolutions = 28**2 * 3 * 64 + 14**2 * 64 * 64 + 7**2 * 64 * 128
    assert parts["extractor"] == 2 * 25 * convolutions
    assert parts["classifier"] == 2 * (6272 * 3072 + 3072 * 2048 + 2048 * 10)
    assert parts["discriminator"] == 2 * (6272 * 1024 + 1024 * 1024 + 1024 * 2)
    step = benchmark.operations_of_step(recipe_config("dann"))
    assert step == 3 * 128 * (2 * parts["extractor"] + parts["classifier"] + 2 * parts["discriminator"])
    assert benchmark.operations_of_step(recipe_config("dann"), False) == 3 * 128 * (
        parts["extractor"] + parts["classifier"]
    )


def test_operations_of_a_step_with_a_teacher():
    """Forward and backward of both domains, the classifier for both, and the teacher's passes of the target."""
    config = recipe_config("modern")
    extractor, classifier, discriminator = benchmark.operations(config).values()
    student = 2 * (extractor + classifier + discriminator)
    for views, moves, answers in (("weak", 0.0, 1), ("both", 0.0, 2), ("weak", 3.0, 3), ("both", 3.0, 3)):
        config = dataclasses.replace(config, teacher_views=views, perturbation=moves, warp=0.0)
        assert not moves or benchmark.operations_of_step(config) == benchmark.operations_of_step(
            dataclasses.replace(config, perturbation=0.0, warp=0.2)
        )
        expected = config.batch_size * (3 * student + answers * (extractor + classifier))
        assert benchmark.operations_of_step(config) == expected


def test_rates_are_amounts_by_seconds_and_jobs_take_turns():
    order = []

    def job(name: str, seconds: float) -> benchmark.Job:
        def run(steps: int) -> float:
            order.append((name, steps))
            time.sleep(steps * seconds)
            return 6.0 * steps

        return benchmark.Job(name, "things/s", run, {"kind": "test"})

    records = benchmark.measure([job("a", 0.01), job("b", 0.02)], 3, 0.2, CPU)
    steps = {record["name"]: record["steps_a_turn"] for record in records}
    first = [("a", 1), ("a", 2), ("b", 1), ("b", 2)]  # how long do they take? not counted
    turns = [(name, count) for name in "ab" for count in (steps[name] // 2, steps[name])]
    assert order == first + turns * 3
    for record, seconds in zip(records, (0.01, 0.02), strict=True):
        assert 0.6 * 0.2 / seconds <= record["steps_a_turn"] <= 0.2 / seconds
        assert record["slowest"] <= record["median"] <= record["fastest"] <= 6 / seconds
        assert record["median"] > 0.5 * 6 / seconds
        assert record["kind"] == "test"


def digits(shape: tuple[int, ...]) -> DigitSet:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (40, *shape), generator=generator, dtype=torch.uint8)
    return DigitSet("svhn", "train", images, torch.arange(40) % 10, "", {})


@pytest.mark.parametrize("recipe", ["dann", "quick"])
def test_usual_way_sees_the_images_of_the_recipe(recipe):
    """Without augmentation its transforms give what our preprocessing gives, to the rounding of PIL's resizing."""
    config = recipe_config(recipe)
    preprocess = benchmark.preprocessing_for(config)
    for source in (digits((3, 32, 32)), digits((1, 28, 28))):
        x, label = Digits(source, transform_of(config, training=False))[7]
        ours = preprocess(source.images[7:8])[0]
        assert label == 7
        assert x.shape == ours.shape
        tolerance = 0.02 if recipe == "dann" else 0.06  # a level of 255, in units of the standard deviation for quick
        assert (x - ours).abs().max() < tolerance


def test_usual_way_trains():
    config = dataclasses.replace(recipe_config("quick"), batch_size=4)
    torch.manual_seed(0)
    usual = UsualWay(config, digits((3, 32, 32)), digits((1, 28, 28)), CPU)
    before = [w.clone() for w in usual.model.parameters()]
    assert usual.train(2) == 16
    assert all(not torch.equal(a, b) for a, b in zip(before, usual.model.parameters(), strict=True))
    assert usual.test(3) == 12


def test_script_writes_what_the_readme_shows(tmp_path):
    """A short run of the real thing; the table is made from its file."""
    file = tmp_path / "results" / "benchmark" / "here.json"
    command = ["tools/benchmark.py", "--sections", "speed", "--recipes", "quick", "--precisions", "fp32"]
    command += ["--rounds", "1", "--seconds", "0.2", "--threads", "1", "--device", "cpu", "--json", str(file)]
    file.parent.mkdir(parents=True)
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    record = json.loads(file.read_text())
    assert json.loads(done.stdout.splitlines()[-1]) == record
    rates = {rate["name"]: rate for rate in record["speed"]["rates"]}
    ours, usual = rates["training quick fp32"], rates["training quick fp32, the usual way"]
    assert ours["times_the_usual_way"] == pytest.approx(ours["median"] / usual["median"])
    share = ours["median"] * ours["operations_per_image"] / 1e9 / rates["matrix product fp32"]["median"]
    assert ours["share_of_ceiling"] == pytest.approx(share)
    text = report_speed.speed_report(tmp_path / "results", tmp_path)
    assert f"{ours['times_the_usual_way']:.2f} |" in text
    assert "[results/benchmark/here.json](results/benchmark/here.json)" in text
    assert "On a GPU: not run" in text


def test_table_shows_start_memory_and_accuracy(tmp_path):
    record = {
        "kind": "benchmark", "machine": "M", "device": "cuda", "threads": 2, "command": "c", "commit": "d",
        "start": {"main.py to its first step": {"median": 5.04, "slowest": 6.0, "fastest": 4.0},
                  "of it": {"importing torch": 2.0, "importing main.py": 3.0}},
        "memory": {"peak_bytes": 1_900_000_000, "images": {}},
        "accuracy": {"recipe": "quick", "target_accuracy": 0.7, "seconds": None},
    }  # fmt: skip
    (tmp_path / "m.json").write_text(json.dumps(record))
    text = report_speed.speed_report(tmp_path, tmp_path)
    assert "`main.py` to its first step, imports included, files warm: 5.0 s (4.0 – 6.0)" in text
    assert "- Of it, importing torch: 2.0 s; importing main.py: 3.0 s" in text
    assert "full size: 1.90 GB" in text
    assert "70% of its target's test set after: not reached" in text
    assert "not run" not in text


def test_benchmark_record_that_lacks_something_is_named(tmp_path):
    (tmp_path / "m.json").write_text('{"kind": "benchmark", "machine": "M"}')
    with pytest.raises(UserError, match=r"m.json lacks device, threads"):
        report_speed.speed_report(tmp_path, tmp_path)


def test_seconds_until_a_line(tmp_path):
    script = tmp_path / "s.py"
    script.write_text("import time\nprint('warming up')\ntime.sleep(0.3)\nprint('first step 1 s')\ntime.sleep(60)")
    seconds, line = benchmark.seconds_until([str(script)], r"^first step ")
    assert 0.3 < seconds < 20
    assert line == "first step 1 s"
    with pytest.raises(UserError, match="ended without a line like"):
        benchmark.seconds_until(["-c", "print('other')"], r"^first step ")


def test_full_size_data_has_the_official_formats(tmp_path, monkeypatch):
    sizes = {"svhn": (30, 20), "mnist": (25, 15)}
    monkeypatch.setattr(benchmark, "FULL_SIZES", sizes)
    benchmark.write_full_size_data(tmp_path)
    for name, counts in sizes.items():
        for split, count in zip(("train", "test"), counts, strict=True):
            assert len(load_domain(name, split, tmp_path)) == count


def test_seconds_since_start_is_the_age_of_the_process():
    code = "import time; time.sleep(0.5); from utils.machine import seconds_since_start as s; print(s())"
    started = time.perf_counter()
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert 0.5 <= float(out) <= time.perf_counter() - started + 0.02


def test_keeping_memory_changes_no_value():
    x = torch.rand(300, 300)
    before = x @ x
    machine.keep_memory(CPU)
    kept = x @ x
    machine.keep_memory(CPU, False)
    assert torch.equal(before, kept)


@pytest.mark.parametrize("option", ["--rounds", "--seconds", "--threads"])
def test_nothing_to_measure_is_refused(monkeypatch, option):
    monkeypatch.setattr(sys, "argv", ["benchmark.py", option, "0"])
    with pytest.raises(UserError, match=f"{option} must be above 0"):
        benchmark.parse_arguments()


def test_peak_memory_is_that_of_the_process(tmp_path):
    code = "import time; x = bytearray(b'x') * 80_000_000; del x; print('there', flush=True); time.sleep(60)"
    with benchmark.running(["-c", code]) as process:
        assert process.stdout.readline() == "there\n"
        assert 80e6 < benchmark.peak_memory(process.pid) < 120e6
