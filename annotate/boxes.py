"""Boxes around digits: how they lie to each other, and their reading order: line by line from the top."""

Box = tuple[int, int, int, int]  # x0, y0, x1, y1 in pixels, x1 and y1 beyond the last one


def overlap(a: Box, b: Box) -> bool:
    """Whether two boxes share a pixel."""
    return min(a[2], b[2]) > max(a[0], b[0]) and min(a[3], b[3]) > max(a[1], b[1])


def intersection_over_union(a: Box, b: Box) -> float:
    """What two boxes share, as a part of what they cover together; from 0 to 1."""
    common = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    areas = [(x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in (a, b)]
    return common / max(1, sum(areas) - common)


def reading_order(boxes: list[Box]) -> list[list[int]]:
    """Indices of boxes, line by line from the top, each line from left to right; lines may slant.

    A box continues the line with whose last box it shares half of the larger height, or begins one.
    """
    lines: list[list[int]] = []
    for index in sorted(range(len(boxes)), key=lambda i: boxes[i][0] + boxes[i][2]):
        _, y0, _, y1 = boxes[index]

        def common_height(line: list[int], y0: int = y0, y1: int = y1) -> float:
            _, top, _, bottom = boxes[line[-1]]
            return (min(y1, bottom) - max(y0, top)) / max(1, y1 - y0, bottom - top)

        best = max(lines, key=common_height, default=None)
        if best is not None and common_height(best) >= 0.5:
            best.append(index)
        else:
            lines.append([index])
    return sorted(lines, key=lambda line: sum(boxes[i][1] + boxes[i][3] for i in line) / len(line))
