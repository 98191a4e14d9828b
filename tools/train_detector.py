"""Train the detector of `image_annotate.py`: where digits stand in a picture, and what is none.

It learns from house numbers that are put together of SVHN's labelled crops, from print, and from the handwriting of
MNIST and scikit-learn, whose labels are those that a trained network predicts. Writes a run folder: config.json,
metrics.jsonl, result.json, last.pt, previous.pt, detector.safetensors, tensorboard/.
"""

import argparse
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from annotate.detector import NONE, Detector
from digits.domains import load_domain
from digits.mnist_m import read_photographs
from methods.classifier import load_classifier
from methods.run import run_folder_made
from tools.scenes import IGNORED, Material, Scenes
from tools.strips import numbers
from utils import machine
from utils.checkpoint import load_checkpoint, save_checkpoint, save_weights
from utils.cli import Interrupted, UserError, run_script, say, script_parser, stop_on_signals
from utils.files import write_json
from watch.log import RunLog

HELD_OUT = 5000  # of SVHN's and MNIST's training digits each, the last: for thresholds and calibration
SURE = 0.8  # least confidence of a predicted label; the other digits are not shown
OFTEN = 8  # times that each of scikit-learn's 1,297 digits stands among MNIST's 55,000
HARDEST = (4, 200)  # of the answers "none" that many count for each digit, and that many at least: the most mistaken
LOG_EVERY_STEPS, SAVE_EVERY_STEPS = 50, 250


@dataclass(frozen=True)
class Settings:
    """Of a run; a checkpoint keeps them."""

    steps: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    seed: int
    labels: str
    precision: str


def material_of(data_dir: Path, labels: str, device: torch.device, held_out: bool = False) -> Material:
    """What scenes are made of, for training or held out of it.

    Args:
        labels: of the handwriting, "own", or the weights of the network whose surest predictions are taken.
    """
    part = slice(-HELD_OUT, None) if held_out else slice(None, -HELD_OUT)
    svhn = load_domain("svhn", "train", data_dir)
    photographs = read_photographs(data_dir / "BSDS500")
    if not photographs:
        raise UserError(f"there are no photographs in {data_dir / 'BSDS500'}: put BSDS500's train/ and val/ there")
    photographs = photographs[-50:] if held_out else photographs[:-50]
    handwriting, named = handwriting_of(data_dir, labels, device, part)
    crops = svhn.images[part]
    say(f"putting {len(crops):,} crops together again")
    found = numbers(crops, svhn.labels[part])
    crops = crops.permute(0, 2, 3, 1).contiguous()
    return Material(crops.numpy(), found, handwriting.numpy(), named.numpy(), photographs)


def handwriting_of(data_dir: Path, labels: str, device: torch.device, part: slice) -> tuple[Tensor, Tensor]:
    """A part of MNIST's training digits, and scikit-learn's enlarged, each of them several times; see `material_of`.

    Shape: -> (N, 28, 28) uint8 light on black, (N,)
    """
    mnist, small = load_domain("mnist", "train", data_dir), load_domain("optdigits", "train", data_dir)
    enlarged = F.interpolate(small.images.float(), mnist.images.shape[2:], mode="bicubic").clamp(0, 255).byte()
    images = torch.cat((mnist.images[part], enlarged.repeat(OFTEN, 1, 1, 1)))
    if labels == "own":
        return images[:, 0], torch.cat((mnist.labels[part], small.labels.repeat(OFTEN)))
    network = load_classifier(None if labels == "default" else labels, device)
    shares, named = network.probabilities(images).max(1)
    sure = shares >= SURE
    return images[sure, 0], named[sure]


def is_digit(classes: Tensor) -> Tensor:
    """Which answers should be a digit. Shape: the same"""
    return (classes != IGNORED) & (classes != NONE)


def losses_of(logits: Tensor, boxes: Tensor, classes: Tensor, true_boxes: Tensor) -> dict[str, Tensor]:
    """The losses by name, whose sum is minimised: of digits, of the hardest of what is none, and of boxes.

    Shape: logits (N, 11, H, W), boxes (N, 4, H, W), classes (N, H, W), true_boxes (N, 4, H, W)
    """
    entropy = F.cross_entropy(logits, classes, ignore_index=IGNORED, reduction="none")
    digit, none = is_digit(classes), classes == NONE
    count = int(digit.sum())
    hardest = entropy[none].topk(min(max(HARDEST[0] * count, HARDEST[1]), int(none.sum()))).values
    distance = F.smooth_l1_loss(boxes, true_boxes, reduction="none").sum(1)
    share = 1 / max(count, 1)
    return {
        "loss_digit": entropy[digit].sum() * share,
        "loss_none": hardest.mean(),
        "loss_box": distance[digit].sum() * share,
    }


def rate(settings: Settings, step: int) -> float:
    """The learning rate of a step: up in a line for a tenth of the steps, then down along half a cosine."""
    warm = settings.steps // 10
    if step < warm:
        return settings.learning_rate * (step + 1) / warm
    return settings.learning_rate * (1 + math.cos(math.pi * (step - warm) / (settings.steps - warm))) / 2


def train(settings: Settings, folder: Path, state: dict | None, material: Material, device: torch.device) -> dict:
    """All steps that the run still has; the record of it."""
    torch.manual_seed(settings.seed)
    model = Detector().to(device).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), settings.learning_rate, weight_decay=settings.weight_decay)
    done, seconds, sums, records = 0, 0.0, torch.zeros(4), []
    if state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        done, seconds, sums, records = (state[key] for key in ("step", "seconds", "sums", "records"))
    log = RunLog(folder, done, records)
    scenes = DataLoader(
        Scenes(material, settings.seed), settings.batch_size, num_workers=1,
        sampler=range(done * settings.batch_size, settings.steps * settings.batch_size),
    )  # fmt: skip
    began = time.monotonic() - seconds
    bar = tqdm(scenes, "training", initial=done, total=settings.steps, leave=False, disable=None)
    with stop_on_signals() as stop:
        for step, batch in enumerate(bar, done + 1):
            images, classes, boxes = (values.to(device) for values in batch)
            for group in optimizer.param_groups:
                group["lr"] = rate(settings, step - 1)
            with machine.autocast(device, settings.precision):
                logits, predicted = model(images)
            losses = losses_of(logits.float(), predicted.float(), classes, boxes)
            optimizer.zero_grad(set_to_none=True)
            total: Tensor = sum(losses.values())  # type: ignore[assignment]
            total.backward()
            optimizer.step()
            right = (logits.argmax(1) == classes)[is_digit(classes)].float().mean()
            sums += torch.stack([*losses.values(), right]).detach().cpu()
            if step % LOG_EVERY_STEPS == 0:
                names = [*losses, "digit_accuracy"]
                values = dict(zip(names, (sums / LOG_EVERY_STEPS).tolist(), strict=True))
                sums.zero_()
                log.scalars(step, {f"train/{name}": value for name, value in values.items()})
                records.append({"step": step, **values, "seconds": round(time.monotonic() - began, 1)})
                log.epoch(records[-1])
                say(f"step {step:5d}/{settings.steps}  " + "  ".join(f"{k} {v:.3f}" for k, v in values.items()))
                if step == LOG_EVERY_STEPS:
                    log.images("scenes", step, images[:32], 8)
            stopping = stop.made
            if step % SAVE_EVERY_STEPS == 0 or step == settings.steps or stopping:
                state = {
                    "model": model.state_dict(), "optimizer": optimizer.state_dict(), "settings": asdict(settings),
                    "step": step, "seconds": time.monotonic() - began, "sums": sums,
                    "records": records,
                }  # fmt: skip
                save_checkpoint(folder / "last.pt", state)
            if stopping:
                log.close()
                go_on = f"python -m tools.train_detector --resume {folder}"
                raise Interrupted(f"interrupted at step {step}: go on with `{go_on}`", stop.exit_code)
    log.close()
    record = {
        "settings": asdict(settings), "seconds": round(time.monotonic() - began, 1),
        "machine": machine.describe(device), "threads": torch.get_num_threads(), "commit": machine.commit(),
        "versions": machine.versions(), "parameters": sum(w.numel() for w in model.parameters()),
    }  # fmt: skip
    save_weights(folder / "detector.safetensors", model.state_dict(), record)
    write_json(folder / "result.json", record)
    return record


def parse_arguments() -> argparse.Namespace:
    parser = script_parser(
        description=__doc__,
        epilog="examples:\n"
        "  python -m tools.train_detector                          an hour on a core with bf16\n"
        "  python -m tools.train_detector --resume runs/detector   go on after an interruption",
    )
    parser.add_argument("--data-dir", type=Path, default=Path("data"), metavar="DIR", help="(default: %(default)s)")
    parser.add_argument("--run-dir", type=Path, default=Path("runs/detector"), metavar="DIR",
                        help="what is written (default: %(default)s)")  # fmt: skip
    parser.add_argument("--resume", type=Path, metavar="DIR", help="an interrupted run, which goes on as it was")
    parser.add_argument("--steps", type=int, default=15000, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="(default: %(default)s)")
    parser.add_argument(
        "--labels", default="default", metavar="NAME",
        help="of the handwriting: what a trained network predicts, weights as in valid.py, or `own` for true ones "
        "(default: the weights that valid.py tests)",
    )  # fmt: skip
    parser.add_argument("--threads", type=int, metavar="N", help="of the CPU (default: all)")
    machine.add_device_argument(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = machine.choose_device(args.device)
    machine.prepare(device)
    folder, state = args.resume or args.run_dir, None
    if args.resume:
        state = load_checkpoint(folder / "last.pt")
        settings = Settings(**state["settings"])
    elif (folder / "last.pt").exists():
        raise UserError(f"{folder} holds a run already: go on with `--resume {folder}`, or choose another --run-dir")
    else:
        precision = machine.choose_precision("auto", device)
        settings = Settings(args.steps, 32, 2e-3, 0.02, args.seed, args.labels, precision)
    material = material_of(args.data_dir, settings.labels, device)
    with run_folder_made(folder):
        write_json(folder / "config.json", asdict(settings))
        record = train(settings, folder, state, material, device)
    print(f"wrote {folder / 'detector.safetensors'} after {record['seconds']:.0f} s")


if __name__ == "__main__":
    run_script(main)
