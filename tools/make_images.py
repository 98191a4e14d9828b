"""Write the pictures in images/: a handwritten seven from scikit-learn's digits and a rendered house number."""

import sys
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from utils.synth_digits import render_digit  # noqa: E402

SYNTH_SEED = 1  # not the seed of the training images


def main() -> None:
    digits = load_digits()
    seven = digits.images[1297:][np.flatnonzero(digits.target[1297:] == 7)[7]]
    ink = Image.fromarray((255 - seven * (255 / 16)).round().astype(np.uint8))
    ink.resize((128, 128), Image.BICUBIC).save(ROOT / "images" / "seven.png")

    index = next(i for i in range(100) if render_digit(SYNTH_SEED, i)[1] == 4)
    number, _ = render_digit(SYNTH_SEED, index)
    Image.fromarray(number).save(ROOT / "images" / "four.png")


if __name__ == "__main__":
    main()
