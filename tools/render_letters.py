"""Write letters drawn with fonts as a folder domain: DIR/train/A/00000.png and so on, 26 classes, 32 × 32 pixels.

They are drawn as the digits of `synth` are, a capital and a small letter under one name. Any folder of other letters
with these 26 classes makes a pair with them.
"""

import argparse
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from digits.readers import SYNTH_SEED, SYNTH_TEST_START
from digits.synth import LETTERS, render_digits
from utils.cli import UserError, run_script, script_parser


def write_letters(folder: Path, split: str, start: int, count: int) -> None:
    """Render letters and write each as a PNG into the folder of its class."""
    images, labels = render_digits(SYNTH_SEED, start, count, alphabet=LETTERS)
    for name in LETTERS.classes:
        (folder / split / name).mkdir(parents=True)
    for i, (image, label) in enumerate(
        zip(tqdm(images, f"writing {folder / split}", disable=None), labels, strict=True)
    ):
        Image.fromarray(image).save(folder / split / LETTERS.classes[label] / f"{i:05d}.png")


def main() -> None:
    parser = script_parser(
        description=__doc__,
        epilog="example:\n  python -m tools.render_letters data/letters-synth\n"
        "  python main.py --source data/letters-synth --target data/letters-handwritten",
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="the folder to write, which is not there yet")
    for name, count in (("train", 26_000), ("test", 2_600)):
        parser.add_argument(f"--{name}", type=int, default=count, metavar="N", help="letters (default: %(default)s)")
    args: argparse.Namespace = parser.parse_args()
    if args.folder.exists():
        raise UserError(f"{args.folder} is there already: name another folder")
    for split, start in (("train", 0), ("test", SYNTH_TEST_START)):
        write_letters(args.folder, split, start, getattr(args, split))
        print(f"{args.folder / split}: {getattr(args, split):,} letters")


if __name__ == "__main__":
    run_script(main)
