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

import main
from data_loader import DigitSet
from digits.domains import Pair, load_domain
from methods.networks import NETWORKS, build_network, preprocessing_for
from methods.recipes import RECIPES, recipe_config
from tools import benchmark, report_speed
from tools.usual_way import Digits, UsualWay, transform_of
from utils.cli import StopRequest, UserError
from utils.distributed import ALONE, Processes
from watch.operations import operations, operations_of_step
from watch.watcher import Watcher

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
    network, model = NETWORKS[config.network], build_network(config.network).eval()
    with torch.no_grad():
        image = torch.zeros(1, network.channels, network.image_size, network.image_size)
        extractor, features = by_hand(model.extractor.layers, image)
        parts = {name: by_hand(part.layers, features)[0] for name, part in model.parts().items() if name != "extractor"}
    assert operations(config) == {"extractor": extractor, **parts}


def test_operations_of_system_a_by_the_numbers_of_its_description():
    parts = operations(recipe_config("dann"))
    convolutions = 28**2 * 3 * 64 + 14**2 * 64 * 64 + 7**2 * 64 * 128
    assert parts["extractor"] == 2 * 25 * convolutions
    assert parts["classifier"] == 2 * (6272 * 3072 + 3072 * 2048 + 2048 * 10)
    assert parts["discriminator"] == 2 * (6272 * 1024 + 1024 * 1024 + 1024 * 2)
    label = parts["extractor"] + parts["classifier"]
    domain = parts["extractor"] + 2 * parts["discriminator"]
    assert operations_of_step(recipe_config("dann")) == 3 * 128 * (label + domain)
    assert operations_of_step(recipe_config("dann"), adapts=False) == 3 * 128 * label


@pytest.mark.parametrize(
    ("views", "perturbed", "passes"), [("weak", 0, 1), ("both", 0, 2), ("weak", 1, 3), ("both", 1, 4)]
)
def test_operations_of_a_step_with_a_teacher(views, perturbed, passes):
    """Forward and backward of both domains, the classifier for both, and the teacher's passes of the target."""
    recipe = recipe_config("modern")
    extractor, classifier, discriminator = operations(recipe).values()
    student = 3 * 2 * (extractor + classifier + discriminator)
    for changes in ((3.0 * perturbed, 0.0), (0.0, 0.2 * perturbed)):
        modern = dataclasses.replace(recipe.modern, teacher_views=views, perturbation=changes[0], warp=changes[1])
        expected = recipe.batch_size * (student + passes * (extractor + classifier))
        assert operations_of_step(dataclasses.replace(recipe, modern=modern)) == expected


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


def digits(*shape: int) -> DigitSet:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (40, *shape), generator=generator, dtype=torch.uint8)
    return DigitSet("svhn", "train", images, torch.arange(40) % 10, "", {})


@pytest.mark.parametrize("recipe", ["quick", "cnn-grl"])
def test_what_is_measured_trains_as_main_does(tmp_path, recipe):
    """The weights after the same epoch, of which main.py's loop is one."""
    more = {"epochs": 1, "warm_start_epochs": 0, "batch_size": 8, "precision": "fp32", "dropout": 0.0}
    config = dataclasses.replace(recipe_config(recipe), **more)
    source, target = digits(3, 32, 32), digits(1, 28, 28)
    pair = Pair(source, source.images, target.images, source, target, {}, {})
    trained = []
    for measured in (True, False):
        run, loader, classifier = main.set_up(config, pair, tmp_path, False, False, CPU, ALONE)
        if measured:
            objective = main.make_objective(run, config, loader.labels_s)
            assert benchmark.train(run, config, loader, objective, CPU, loader.steps) == 5 * 16
        else:
            silent = Processes(rank=1)  # one that neither tests nor writes
            watcher = Watcher(run, config, loader, pair, classifier, silent, "")
            main.train(run, config, loader, watcher, silent, False, StopRequest())
        trained.append(run.model.state_dict())
    new = main.set_up(config, pair, tmp_path, False, False, CPU, ALONE)[0].model.state_dict()
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in new)
    assert not all(torch.equal(trained[0][name], new[name]) for name in new)


@pytest.mark.parametrize(
    ("recipe", "tolerance"), [("dann", 0.02), ("quick", 0.06)]
)  # a level of 255, standardised for quick
def test_usual_way_sees_the_images_of_the_recipe(recipe, tolerance):
    """Without augmentation its transforms give what our preprocessing gives, to the rounding of PIL's resizing."""
    config = recipe_config(recipe)
    for source in (digits(3, 32, 32), digits(1, 28, 28)):
        x, label = Digits(source, transform_of(config, training=False))[7]
        ours = preprocessing_for(config)(source.images[7:8])[0]
        assert label == 7
        assert x.shape == ours.shape
        assert (x - ours).abs().max() < tolerance


def test_usual_way_trains():
    config = dataclasses.replace(recipe_config("quick"), batch_size=4)
    torch.manual_seed(0)
    usual = UsualWay(config, digits(3, 32, 32), digits(1, 28, 28), CPU)
    before = [w.clone() for w in usual.model.parameters()]
    assert usual.train(2) == 16
    assert all(not torch.equal(a, b) for a, b in zip(before, usual.model.parameters(), strict=True))
    assert usual.test(3) == 12


def test_script_writes_what_the_tables_show(monkeypatch, capsys, tmp_path):
    """A short run of the real thing, in small batches; the table is made from its file."""
    small = dataclasses.replace(recipe_config("quick"), batch_size=8)
    monkeypatch.setattr(benchmark, "recipe_config", {"quick": small}.get)
    file = tmp_path / "results" / "benchmark" / "here.json"
    options = ["--sections", "speed", "--recipes", "quick", "--precisions", "fp32", "--rounds", "1", "--seconds", "0.1"]
    options += ["--threads", "1", "--device", "cpu", "--json", str(file)]
    file.parent.mkdir(parents=True)
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *options])
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
    for shown in (
        "5.0 s (4.0 – 6.0)",
        "importing torch: 2.0 s; importing main.py: 3.0 s",
        "1.90 GB",
        "70%",
        "not reached",
    ):
        assert shown in text
    assert "not run" not in text


def test_a_benchmark_record_that_lacks_something_is_named(tmp_path):
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
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert 0.5 <= float(out) <= time.perf_counter() - started + 0.02


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
