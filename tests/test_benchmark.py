"""The benchmark counts and times what it says, and its baseline trains the same network on the same numbers."""

import dataclasses
import json
import sys
import time

import pytest
import torch
from conftest import run_as_process
from small_run import SmallRun, random_digits
from torch import nn

from digits.domains import load_domain
from methods.networks import NETWORKS, build_network, preprocessing_for
from methods.recipes import RECIPES, recipe_config
from tools import benchmark, report_speed
from tools.usual_way import Digits, UsualWay, transform_of
from utils.cli import UserError
from watch.operations import operations, operations_of_step

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
    network, model = NETWORKS[config.network], build_network(config.network).eval()
    with torch.no_grad():
        image = torch.zeros(1, network.channels, network.image_size, network.image_size)
        extractor, features = by_hand(model.extractor.layers, image)
        parts = {name: by_hand(part.layers, features)[0] for name, part in model.parts().items() if name != "extractor"}
    assert operations(config) == {"extractor": extractor, **parts}


def test_operations_of_a_step():
    """Forward and backward of both domains, with a teacher the classifier for both, and its passes of the target."""
    system_a, modern = recipe_config("system-a"), recipe_config("modern")
    extractor, classifier, discriminator = operations(system_a).values()
    assert operations_of_step(system_a, adapts=False) == 3 * 128 * (extractor + classifier)
    assert operations_of_step(system_a) == 3 * 128 * (2 * extractor + classifier + 2 * discriminator)
    extractor, classifier, discriminator = operations(modern).values()
    student = 3 * 2 * (extractor + classifier + discriminator)
    for views, perturbation, warp, passes in (
        ("weak", 0.0, 0.0, 1), ("both", 0.0, 0.0, 2), ("weak", 3.0, 0.0, 3), ("weak", 0.0, 0.2, 3),
        ("both", 3.0, 0.0, 4), ("both", 0.0, 0.2, 4),
    ):  # fmt: skip
        changed = dataclasses.replace(modern.modern, teacher_views=views, perturbation=perturbation, warp=warp)
        expected = modern.batch_size * (student + passes * (extractor + classifier))
        assert operations_of_step(dataclasses.replace(modern, modern=changed)) == expected


def test_rates_are_amounts_by_seconds_and_jobs_take_turns():
    order = []

    def job(name: str, seconds: float) -> benchmark.Job:
        def run(steps: int) -> float:
            order.append((name, steps))
            time.sleep(steps * seconds)
            return 6.0 * steps

        return benchmark.Job(name, "things/s", run, {"kind": "test"})

    records = benchmark.measure([job("a", 0.01), job("b", 0.02)], 3, 0.1, CPU)
    steps = {record["name"]: record["steps_a_turn"] for record in records}
    first = [("a", 1), ("a", 2), ("b", 1), ("b", 2)]  # how long do they take? not counted
    turns = [(name, count) for name in "ab" for count in (steps[name] // 2, steps[name])]
    assert order == first + turns * 3
    for record, seconds in zip(records, (0.01, 0.02), strict=True):
        assert 0.5 * 0.1 / seconds <= record["steps_a_turn"] <= 0.1 / seconds
        assert 0.3 * 6 / seconds < record["slowest"] <= record["median"] <= record["fastest"] <= 6 / seconds
        assert record["kind"] == "test"


@pytest.mark.parametrize("recipe", ["quick", "cnn-grl"])
def test_what_is_measured_trains_as_main_does(recipe):
    """The weights after the same epoch, of which main.py's loop is one."""
    more = {"epochs": 1, "warm_start_epochs": 0, "batch_size": 8, "dropout": 0.0}
    measured, trained = (SmallRun(dataclasses.replace(recipe_config(recipe), **more), steps=5) for _ in range(2))
    new = trained.weights()
    assert benchmark.train(measured.run, measured.config, measured.loader, measured.objective(), CPU, 5) == 5 * 16
    trained.train()
    assert all(torch.equal(weight, trained.weights()[name]) for name, weight in measured.weights().items())
    assert not all(torch.equal(weight, new[name]) for name, weight in measured.weights().items())


SOURCE = random_digits(40, 32, 0)
TARGET = dataclasses.replace(random_digits(40, 28, 1), images=random_digits(40, 28, 1).images[:, :1])


@pytest.mark.parametrize(("recipe", "tolerance"), [("system-a", 0.02), ("quick", 0.06)])
def test_usual_way_sees_the_images_of_the_recipe(recipe, tolerance):
    """Without augmentation, to the rounding of PIL's resizing: some levels of 255, standardised for quick."""
    config = recipe_config(recipe)
    for digits in (SOURCE, TARGET):
        x, label = Digits(digits, transform_of(config, training=False))[7]
        ours = preprocessing_for(config)(digits.images[7:8])[0]
        assert label == 7
        assert x.shape == ours.shape
        assert (x - ours).abs().max() < tolerance


def test_usual_way_trains():
    torch.manual_seed(0)
    usual = UsualWay(dataclasses.replace(recipe_config("quick"), batch_size=4), SOURCE, TARGET, CPU)
    before = [w.clone() for w in usual.model.parameters()]
    assert usual.train(2) == 16
    assert all(not torch.equal(a, b) for a, b in zip(before, usual.model.parameters(), strict=True))
    assert usual.test(3) == 12


def test_script_writes_what_the_tables_show(monkeypatch, capsys, tmp_path):
    """A short run of the real thing, in small batches; the table is made from its file."""
    small = dataclasses.replace(recipe_config("quick"), batch_size=8)
    monkeypatch.setattr(benchmark, "recipe_config", {"quick": small}.get)
    file = tmp_path / "results" / "benchmark" / "here.json"
    file.parent.mkdir(parents=True)
    options = "--sections speed --recipes quick --precisions fp32 --rounds 1 --seconds 0.1 --threads 1 --device cpu"
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *options.split(), "--json", str(file)])
    benchmark.main()
    record = json.loads(file.read_text())
    assert json.loads(capsys.readouterr().out) == record
    rates = {rate["name"]: rate for rate in record["speed"]["rates"]}
    ours, usual = rates["training quick fp32"], rates["training quick fp32, the usual way"]
    assert ours["times_the_usual_way"] == pytest.approx(ours["median"] / usual["median"])
    share = ours["median"] * ours["operations_per_image"] / 1e9 / rates["matrix product fp32"]["median"]
    assert ours["share_of_ceiling"] == pytest.approx(share)
    text = report_speed.speed_report(tmp_path / "results", tmp_path)
    assert f"{ours['times_the_usual_way']:.2f} |" in text
    assert "(results/benchmark/here.json)" in text
    assert "On a GPU: not run" in text


def test_tables_show_start_memory_and_accuracy(tmp_path):
    record = {
        "kind": "benchmark", "machine": "M", "device": "cuda", "threads": 2, "command": "c", "commit": "d",
        "start": {"main.py to its first step": {"median": 5.04, "slowest": 6.0, "fastest": 4.0},
                  "of it": {"importing torch": 2.0, "importing main.py": 3.0}},
        "memory": {"peak_bytes": 1_900_000_000, "images": {}},
        "accuracy": {"recipe": "quick", "target_accuracy": 0.7, "seconds": None},
    }  # fmt: skip
    (tmp_path / "m.json").write_text(json.dumps(record))
    text = report_speed.speed_report(tmp_path, tmp_path)
    parts = "importing torch: 2.0 s; importing main.py: 3.0 s"
    assert all(shown in text for shown in ("5.0 s (4.0 – 6.0)", parts, "1.90 GB", "70%", "not reached"))
    assert "not run" not in text
    (tmp_path / "m.json").write_text('{"kind": "benchmark", "machine": "M"}')
    with pytest.raises(UserError, match=r"m.json lacks device, threads"):
        report_speed.speed_report(tmp_path, tmp_path)


def test_seconds_until_a_line(tmp_path):
    script = tmp_path / "s.py"
    script.write_text("import time\nprint('warming up')\ntime.sleep(0.3)\nprint('first step 1 s')\ntime.sleep(60)")
    seconds, line = benchmark.seconds_until([str(script)], r"^first step ")
    assert 0.3 < seconds < 20
    assert line == "first step 1 s"
    with pytest.raises(UserError, match="first step"):
        benchmark.seconds_until(["-c", "print('other')"], r"^first step ")


def test_full_size_data_has_the_official_formats(tmp_path, monkeypatch):
    sizes = {"svhn": (30, 20), "mnist": (25, 15)}
    monkeypatch.setattr(benchmark, "FULL_SIZES", sizes)
    benchmark.write_full_size_data(tmp_path)
    for name, counts in sizes.items():
        assert tuple(len(load_domain(name, split, tmp_path)) for split in ("train", "test")) == counts


def test_seconds_since_start_is_the_age_of_the_process():
    code = "import time; time.sleep(0.5); from utils.machine import seconds_since_start as s; print(s())"
    started = time.perf_counter()
    age = float(run_as_process("-c", code).stdout)
    assert 0.5 <= age <= time.perf_counter() - started + 0.02


@pytest.mark.parametrize("option", ["--rounds", "--seconds", "--threads"])
def test_nothing_to_measure_is_refused(monkeypatch, option):
    monkeypatch.setattr(sys, "argv", ["benchmark.py", option, "0"])
    with pytest.raises(UserError, match=option):
        benchmark.parse_arguments()


def test_peak_memory_is_that_of_the_process():
    code = "import time; x = bytearray(b'x') * 80_000_000; del x; print('there', flush=True); time.sleep(60)"
    with benchmark.running(["-c", code]) as (process, printed):
        assert printed.readline() == "there\n"
        assert 80e6 < benchmark.peak_memory(process.pid) < 120e6
