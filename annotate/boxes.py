"""Boxes around digits: how they lie to each other, and their reading order: line by line from the top."""

import numpy as np

Box = tuple[int, int, int, int]  # x0, y0, x1, y1 in pixels, x1 and y1 beyond the last one


def distance(a: Box, b: Box) -> float:
    """Pixels between two boxes; 0 where they touch or overlap."""
    across = max(0, max(a[0], b[0]) - min(a[2], b[2]))
    down = max(0, max(a[1], b[1]) - min(a[3], b[3]))
    return float(np.hypot(across, down))


def union(a: Box, b: Box) -> Box:
    """The smallest box around two."""
    return min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3])


def contains(a: Box, b: Box) -> bool:
    """Whether box `b` lies within `a`."""
    return union(a, b) == a


def share_within(a: Box, b: Box) -> float:
    """The part of box `a` that lies within `b`, from 0 to 1."""
    across = max(0, min(a[2], b[2]) - max(a[0], b[0]))
    down = max(0, min(a[3], b[3]) - max(a[1], b[1]))
    return across * down / ((a[2] - a[0]) * (a[3] - a[1]))


def overlap(a: Box, b: Box) -> bool:
    """Whether two boxes share a pixel."""
    return min(a[2], b[2]) > max(a[0], b[0]) and min(a[3], b[3]) > max(a[1], b[1])


def reading_order(boxes: list[Box]) -> list[list[int]]:
    """Indices of boxes, line by line from the top, each line from left to right; lines may slant.

    A box continues the line whose last box overlaps its height by half of the smaller height, or begins one.
    """
    lines: list[list[int]] = []
    for index in sorted(range(len(boxes)), key=lambda i: boxes[i][0] + boxes[i][2]):
        _, y0, _, y1 = boxes[index]

        def common_height(line: list[int], y0: int = y0, y1: int = y1) -> float:
            _, top, _, bottom = boxes[line[-1]]
            return (min(y1, bottom) - max(y0, top)) / max(1, min(y1 - y0, bottom - top))

        best = max(lines, key=common_height, default=None)
        if best is not None and common_height(best) >= 0.5:
            best.append(index)
        else:
            lines.append([index])
    return sorted(lines, key=lambda line: sum(boxes[i][1] + boxes[i][3] for i in line) / len(line))
