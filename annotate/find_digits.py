"""Find what may be a digit in a picture: strokes that stand out from their surroundings, dark or light.

The picture is compared with its own background, the median of a window so large that strokes are a minority in it. The
largest window is right for a sheet of paper, smaller ones for a plate on a wall; what one window finds is painted over
before the next looks. What stands out is cut at half of its own contrast, so that uneven light does not matter, and
the pieces of a digit that broke are joined.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy.ndimage import binary_dilation, distance_transform_edt
from skimage.filters import gaussian
from skimage.filters.rank import median
from skimage.measure import label, regionprops

from annotate.boxes import Box, contains, distance, share_within, union

SEARCHED_SIDE = 1200  # pixels: larger pictures are searched at this size
BACKGROUND_SIDE = 128  # pixels: backgrounds are smooth, so that a small copy shows them
WINDOWS = (1.0, 0.4, 0.15)  # of the picture's shorter side
BLUR = 1.0  # pixels, the standard deviation: noise goes, strokes stay
LEAST_CONTRAST = 0.08  # of the range from black to white
LEAST_HEIGHT = 6  # pixels of the searched picture


@dataclass(frozen=True)
class Candidate:
    """Something that may be a digit.

    Shape: ink (H, W) float32 in [0, 1], the size of `box`: 0 the ground, 1 the stroke, whichever of them is dark
    """

    box: Box
    ink: np.ndarray
    contrast: float  # of ink to ground, in [0, 1]
    stroke: float  # its width, pixels
    holes: int

    @property
    def width(self) -> int:
        """Pixels."""
        return self.box[2] - self.box[0]

    @property
    def height(self) -> int:
        """Pixels."""
        return self.box[3] - self.box[1]

    @property
    def area(self) -> int:
        """Pixels of ink."""
        return int((self.ink > 0.5).sum())

    @property
    def filled(self) -> float:
        """Share of the box that is ink."""
        return self.area / self.ink.size


def background(grey: np.ndarray, window: float) -> np.ndarray:
    """The median of the square of `window` pixels around each pixel, smoothed. Shape: (H, W) in [0, 1] -> the same."""
    height, width = grey.shape
    scale = min(1.0, BACKGROUND_SIDE / max(grey.shape))
    small = Image.fromarray(grey).resize(
        [max(1, round(side * scale)) for side in (width, height)], Image.Resampling.BOX
    )
    radius = max(1, round(window * scale / 2))
    padded = np.pad((np.asarray(small) * 255).astype(np.uint8), radius, mode="symmetric")
    middle = median(padded, np.ones((2 * radius + 1,) * 2, np.uint8))[radius:-radius, radius:-radius]
    middle = gaussian(middle.astype(np.float32) / 255, radius / 4)
    return np.asarray(Image.fromarray(middle).resize((width, height), Image.Resampling.BILINEAR))


def noise_of(grey: np.ndarray) -> float:
    """Standard deviation of the noise, from differences that slopes and most edges leave at 0."""
    differences = grey[1:, 1:] - grey[:-1, 1:] - grey[1:, :-1] + grey[:-1, :-1]
    return float(np.median(np.abs(differences))) / 0.6745 / 2 if differences.size else 0.0


def find_strokes(difference: np.ndarray, floor: float) -> list[Candidate]:
    """Connected regions above `floor`, each cut once more at half of its own contrast.

    Shape: difference (H, W), positive where there is ink
    """
    found = []
    for region in regionprops(label(difference > floor, connectivity=2)):
        if max(region.image.shape) < LEAST_HEIGHT:
            continue
        part = np.where(region.image, difference[region.slice], 0)
        contrast = float(np.percentile(part[region.image], 90))
        if contrast < 1.5 * floor:
            continue
        part = np.clip(part / contrast, 0, 1).astype(np.float32)
        labels = label(part > 0.5, connectivity=2)
        for piece in regionprops(labels):
            if piece.area < LEAST_HEIGHT:
                continue
            others = (labels[piece.slice] > 0) & ~piece.image
            ink = np.where(binary_dilation(piece.image) & ~others, part[piece.slice], 0)  # with its soft edge
            y0, x0, y1, x1 = (int(value) for value in np.add(piece.bbox, region.bbox[:2] * 2))
            stroke = 2 * piece.area / max(4.0, piece.perimeter)
            found.append(Candidate((x0, y0, x1, y1), ink, contrast, stroke, int(1 - piece.euler_number)))
    return found


def on_one_canvas(a: Candidate, b: Candidate) -> tuple[Box, list[np.ndarray]]:
    """The box around two candidates, and the ink of each in it."""
    box = union(a.box, b.box)
    canvases = []
    for part in (a, b):
        canvas = np.zeros((box[3] - box[1], box[2] - box[0]), np.float32)
        x, y = part.box[0] - box[0], part.box[1] - box[1]
        canvas[y : y + part.height, x : x + part.width] = part.ink
        canvases.append(canvas)
    return box, canvases


def belong_together(a: Candidate, b: Candidate) -> bool:
    """Whether the smaller of two is a piece that broke off the other, as the bar of a 5 does.

    It is no taller than half of both together, or else flat; and no farther away than the pen is wide.
    """
    big, small = (a, b) if a.height >= b.height else (b, a)
    reach = 1 + min(big.stroke, 2 * small.stroke)
    if distance(a.box, b.box) > reach or small.contrast < 0.4 * big.contrast:
        return False
    box, (ink_a, ink_b) = on_one_canvas(a, b)
    wide, high = box[2] - box[0], box[3] - box[1]
    if wide > 1.6 * high or (small.height > 0.55 * high and small.width < 1.3 * small.height):
        return False
    return bool(distance_transform_edt(ink_a <= 0.5)[ink_b > 0.5].min() <= reach)


def join(a: Candidate, b: Candidate) -> Candidate:
    """One candidate of two."""
    box, canvases = on_one_canvas(a, b)
    return Candidate(
        box, np.maximum(*canvases), max(a.contrast, b.contrast), max(a.stroke, b.stroke), a.holes + b.holes
    )


def join_pieces(found: list[Candidate]) -> list[Candidate]:
    """Join pieces to what they broke off, the smallest first."""
    waiting, whole = sorted(found, key=lambda c: c.width * c.height), []
    while waiting:
        piece = waiting.pop(0)
        hosts = [i for i, other in enumerate(waiting) if belong_together(piece, other)]
        if hosts:
            host = min(hosts, key=lambda i: distance(waiting[i].box, piece.box))
            waiting[host] = join(waiting[host], piece)
        else:
            whole.append(piece)
    return whole


def is_cut_off(candidate: Candidate, height: int, width: int) -> bool:
    """Whether it goes on beyond the picture's edge, as shadows do: it fills a corner, or lies along an edge."""
    x0, y0, x1, y1 = candidate.box
    ink = candidate.ink > 0.5
    edges = ((x0 == 0, ink[:, 0]), (y0 == 0, ink[0]), (x1 == width, ink[:, -1]), (y1 == height, ink[-1]))
    along = [edge.sum() for touches, edge in edges if touches]
    return len(along) > 1 or sum(along) > 0.5 * min(candidate.width, candidate.height)


def fills(candidate: Candidate, height: int, width: int) -> bool:
    """Whether it is the picture's one subject, cut out so closely that it touches the edges."""
    spans = (candidate.height > 0.9 * height, candidate.width > 0.9 * width)
    return candidate.contrast > 0.25 and (all(spans) or (any(spans) and candidate.filled < 0.6))


def has_shape_of_digit(candidate: Candidate) -> bool:
    """Whether it is neither a dash nor a hairline, neither a blot nor a frame nor a plate with digits for holes."""
    wide = candidate.width / candidate.height
    blot = candidate.filled > 0.75 and wide > 0.5
    return (
        candidate.height >= LEAST_HEIGHT
        and 0.05 < wide < 1.8
        and not blot
        and candidate.filled > 0.08
        and (candidate.holes < 3 or candidate.filled < 0.45)  # noise may well pierce a stroke
    )


def is_frame(candidate: Candidate, others: list[Candidate]) -> bool:
    """Whether it goes around what no digit goes around: more ink than its own, or another digit as clear as itself."""
    held = [other for other in others if other is not candidate and contains(candidate.box, other.box)]
    return any(
        other.area > candidate.area
        or (
            has_shape_of_digit(other)
            and other.height > 0.3 * candidate.height
            and other.contrast > 0.6 * candidate.contrast
        )
        for other in held
    )


def is_crumb(candidate: Candidate, others: list[Candidate]) -> bool:
    """Whether it is a blot beside or within something much larger."""
    return any(
        candidate.height < 0.4 * other.height
        and candidate.area < 0.1 * other.area
        and distance(candidate.box, other.box) < 0.15 * other.height
        for other in others
    )


def is_ghost(candidate: Candidate, others: list[Candidate]) -> bool:
    """Whether it is a patch of ground between strokes: far fainter than what is near, or half within its box."""
    return any(
        (candidate.contrast < 0.45 * other.contrast and distance(candidate.box, other.box) < other.height)
        or (candidate.area < other.area and share_within(candidate.box, other.box) > 0.5)
        for other in others
        if other is not candidate
    )


def find_at(grey: np.ndarray, window: float, noise: float) -> tuple[list[Candidate], np.ndarray]:
    """What stands out from the background that a window of so many pixels shows; the background as well."""
    ground = background(grey, window)
    difference = gaussian(grey, BLUR) - ground
    floor = max(LEAST_CONTRAST, 3 * noise)
    pieces = [c for sign in (1, -1) for c in join_pieces(find_strokes(sign * difference, floor))]
    found = [c for c in pieces if has_shape_of_digit(c) and not is_frame(c, pieces)]
    return [c for c in found if not is_crumb(c, found)], ground


def find_digits(picture: Image.Image) -> list[Candidate]:
    """What may be a digit in a picture, in no order; boxes in its pixels, ink in those of the searched copy."""
    scale = min(1.0, SEARCHED_SIDE / max(picture.size))
    small = picture.convert("L")
    if scale < 1:
        small = small.resize([max(1, round(side * scale)) for side in picture.size], Image.Resampling.BOX)
    grey = np.asarray(small, np.float32) / 255
    height, width = grey.shape
    noise = noise_of(grey)
    kept: list[Candidate] = []
    for share in WINDOWS:
        window = share * min(height, width)
        found, ground = find_at(grey, window, noise)
        for candidate in found:
            if share < 1 and candidate.height > window:
                continue
            if is_cut_off(candidate, height, width) and not fills(candidate, height, width):
                continue
            kept.append(candidate)
            x0, y0, x1, y1 = candidate.box
            margin = 2 + round(candidate.stroke)
            area = np.s_[max(0, y0 - margin) : y1 + margin, max(0, x0 - margin) : x1 + margin]
            grey[area] = ground[area]
    tallest = max((c.height for c in kept), default=0)
    back = (picture.width / width, picture.height / height) * 2
    return [
        Candidate(tuple(round(v * k) for v, k in zip(c.box, back, strict=True)), c.ink, c.contrast, c.stroke, c.holes)
        for c in kept
        if c.height > 0.15 * tallest and not is_ghost(c, kept)
    ]


def frame(ink: np.ndarray, fill: float, centre_of_mass: float | None) -> np.ndarray:
    """A digit in a square, light on dark, as the images of a domain show it.

    Args:
        fill: share of the square's side that the digit's longer side takes.
        centre_of_mass: where it stands, across and down, as a share of the side; None: the box stands in the middle.

    Shape: (H, W) float32 in [0, 1] -> (S, S) uint8
    """
    height, width = ink.shape
    side = max(2, round(max(height, width) / fill))
    x, y, middle = width / 2, height / 2, side / 2
    if centre_of_mass is not None and ink.any():
        x = float(np.average(np.arange(width) + 0.5, weights=ink.sum(0)))
        y = float(np.average(np.arange(height) + 0.5, weights=ink.sum(1)))
        middle = side * centre_of_mass
    left = min(max(0, round(middle - x)), side - width)
    top = min(max(0, round(middle - y)), side - height)
    square = np.zeros((side, side), np.uint8)
    square[top : top + height, left : left + width] = (255 * ink).round().astype(np.uint8)
    return square
