"""Read the digit in a picture and write the picture with the reading on it.

    python image_annotate.py -f images/seven.png

A picture is read as one digit: crop a longer number into its digits first.
"""

import argparse
import json
import math
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from utils import machine
from utils.cli import UserError, run_script, script_parser
from utils.files import make_folder, write_atomically
from valid import load_reader, predict

IMAGES = Path(__file__).resolve().parent / "images"
LARGEST_PIXELS = 100_000_000


def open_picture(path: Path) -> Image.Image:
    """Open a picture upright, in RGB, transparency on white; raises UserError for what is none or is absurdly large."""
    try:
        with Image.open(path) as picture:
            if max(picture.size) ** 2 > LARGEST_PIXELS:  # it is going to be padded to a square
                size, side = f"{picture.width}×{picture.height}", math.isqrt(LARGEST_PIXELS)
                raise UserError(f"{path} has {size} pixels, a side has at most {side:,}: make it smaller")
            picture = ImageOps.exif_transpose(picture)
            if picture.mode.startswith("I"):  # 16-bit grey: Pillow would clip it at 255
                values = np.asarray(picture, dtype=np.float32)
                picture = Image.fromarray((values / max(1, values.max()) * 255).astype(np.uint8))
            white = Image.new("RGBA", picture.size, "white")
            return Image.alpha_composite(white, picture.convert("RGBA")).convert("RGB")
    except FileNotFoundError:
        raise UserError(f"there is no picture {path}: name a file, or one in {IMAGES}") from None
    except Image.DecompressionBombError:
        raise UserError(f"{path} has more than {LARGEST_PIXELS:,} pixels: make it smaller") from None
    # Image.open and the decoders raise many kinds for damaged bytes: SyntaxError, struct.error, ValueError, ….
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        reason = " ".join(str(error).split())[:100]
        raise UserError(f"{path} can't be read as a picture ({reason}): save it as PNG or JPEG") from None


def as_square(picture: Image.Image) -> Tensor:
    """The picture padded to a square with its border's median colour. Shape: -> (1, 3, S, S) uint8."""
    pixels = np.asarray(picture)
    border = np.concatenate((pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]))
    colour = tuple(int(value) for value in np.median(border, axis=0))
    side = max(picture.size)
    square = Image.new("RGB", (side, side), colour)
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return torch.from_numpy(np.array(square)).permute(2, 0, 1)[None].contiguous()


def annotated(picture: Image.Image, text: str) -> Image.Image:
    """The picture, enlarged when it is small, with a caption below it that is legible at its width."""
    picture = picture.resize([side * max(1, -(-256 // max(picture.size))) for side in picture.size], Image.NEAREST)
    font_path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    size = max(14, picture.width // 12)
    font = ImageFont.truetype(str(font_path), size)
    width = max(picture.width, int(font.getlength(text)) + size)
    page = Image.new("RGB", (width, picture.height + 2 * size), "white")
    page.paste(picture, ((width - picture.width) // 2, 0))
    ImageDraw.Draw(page).text((width / 2, picture.height + size), text, "black", font, anchor="mm")
    return page


def parse_arguments() -> argparse.Namespace:
    parser = script_parser(
        description="Read a picture as one digit and write it with the reading on it.",
        epilog="examples:\n"
        "  python image_annotate.py -f seven.png                    a name in images/, or any path\n"
        "  python image_annotate.py -f a.jpg b.jpg --weights runs/NAME",
    )
    parser.add_argument("-f", "--file", nargs="+", required=True, metavar="IMG", help="pictures to read")
    parser.add_argument("--weights", metavar="NAME", help="as in valid.py (default: the same)")
    parser.add_argument(
        "--output-dir", type=Path, default=Path("runs/annotated"), metavar="DIR", help="(default: %(default)s)"
    )
    machine.add_device_argument(parser)
    parser.add_argument(
        "--download", action=argparse.BooleanOptionalAction, default=True, help="fetch missing weights (default: yes)"
    )
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    paths = [Path(name) if Path(name).exists() else IMAGES / name for name in args.file]
    pictures = [
        open_picture(path if path.exists() else Path(name)) for path, name in zip(paths, args.file, strict=True)
    ]
    device = machine.choose_device(args.device)
    reader = load_reader(args.weights, device, args.download)
    outputs = [args.output_dir / f"{path.stem}-annotated.png" for path in paths]
    for path, output in zip(paths, outputs, strict=True):
        if output.resolve() in {other.resolve() for other in paths}:
            raise UserError(f"{output} is one of the pictures to read: choose another --output-dir")
        if outputs.count(output) > 1:
            raise UserError(f"{path} and another picture would both become {output}: annotate them one by one")
    make_folder(args.output_dir)
    for path, picture, output in zip(paths, pictures, outputs, strict=True):
        probabilities = predict(reader.model, as_square(picture), reader.preprocess, device, "fp32")[0]
        digit, confidence = int(probabilities.argmax()), float(probabilities.max())
        page = annotated(picture, f"{digit}   {confidence:.1%}")
        write_atomically(output, lambda file, page=page: page.save(file, "PNG"))
        line = {"image": str(path), "digit": digit, "confidence": round(confidence, 4), "annotated": str(output)}
        print(json.dumps(line, ensure_ascii=False))


if __name__ == "__main__":
    run_script(main)
