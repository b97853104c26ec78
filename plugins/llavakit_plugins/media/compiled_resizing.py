"""Resizes images as Pillow and PyTorch do, to the same bits, in loops that numba compiles.

Pillow sums integers, pixel by pixel: bytes times weights that are multiples of 1/2^22. PyTorch's
kernel for bytes does so with weights of 16 bits. The same sums of many pixels are computed here
side by side, and none of what is cut off. A pixel is a word: red, green, blue and a byte that means
nothing, as Pillow's memory has them.
"""

from __future__ import annotations

from math import ceil

import numpy as np
import numpy.typing as npt
from numba import config, njit

if getattr(config, "DISABLE_JIT", 0):  # in Python these loops would take minutes
    raise ImportError("NUMBA_DISABLE_JIT is set")

Words = npt.NDArray[np.uint32]
Bytes = npt.NDArray[np.uint8]
Sums = npt.NDArray[np.int32]

_BITS = 22  # of a weight behind the point
_HALF = 1 << (_BITS - 1)
_ROWS = 48  # that are taken together, so that they stay in a core's cache; a multiple of 8


@njit(inline="always")
def _turn(pixels_HW: Words, row: int, count: int, first: int, turned_WR: Words) -> None:
    """Write rows as columns, eight at a time where there are as many: stored as one vector."""
    for r in range(0, _ROWS, 8):
        if r + 8 > count:
            break
        a_W, b_W = pixels_HW[row + r], pixels_HW[row + r + 1]
        c_W, d_W = pixels_HW[row + r + 2], pixels_HW[row + r + 3]
        e_W, f_W = pixels_HW[row + r + 4], pixels_HW[row + r + 5]
        g_W, h_W = pixels_HW[row + r + 6], pixels_HW[row + r + 7]
        for x in range(len(turned_WR)):
            line_R, at = turned_WR[x], first + x
            line_R[r], line_R[r + 1] = a_W[at], b_W[at]
            line_R[r + 2], line_R[r + 3] = c_W[at], d_W[at]
            line_R[r + 4], line_R[r + 5] = e_W[at], f_W[at]
            line_R[r + 6], line_R[r + 7] = g_W[at], h_W[at]
    for r in range(count // 8 * 8, count):
        for x in range(len(turned_WR)):
            turned_WR[x, r] = pixels_HW[row + r, first + x]


@njit(inline="always")  # so that it is seen that no two of the arrays share memory
def _sum(
    lines_LN: Words,
    begin: int,
    weights_T: Sums,
    count: int,
    red_N: Sums,
    green_N: Sums,
    blue_N: Sums,
) -> None:
    """Write `count` weighted sums, and a half, of lines that begin with `begin`."""
    weight, line_N = weights_T[0], lines_LN[begin]
    for n in range(count):
        word = line_N[n]
        red_N[n] = _HALF + np.int32(word & 255) * weight
        green_N[n] = _HALF + np.int32((word >> 8) & 255) * weight
        blue_N[n] = _HALF + np.int32((word >> 16) & 255) * weight
    for tap in range(1, len(weights_T)):
        weight, line_N = weights_T[tap], lines_LN[begin + tap]
        for n in range(count):
            word = line_N[n]
            red_N[n] += np.int32(word & 255) * weight
            green_N[n] += np.int32((word >> 8) & 255) * weight
            blue_N[n] += np.int32((word >> 16) & 255) * weight


@njit(inline="always")
def _byte(total: int) -> int:
    return min(max(total >> _BITS, 0), 255)


@njit(cache=True)
def _weights(
    length: int, resized: int, first: int, last: int, reach: float, short: bool
) -> tuple[Sums, Sums, Sums]:
    """Return for pixels of a resized line where those begin that make it, how many, their weights.

    The operations in float64 are in the order of both, so that the weights are rounded as there.
    """
    scale = length / resized
    wider = max(scale, 1.0)
    around = reach * wider
    start, stop = (0, resized) if short else (first, last)
    begins_N = np.empty(stop - start, np.int32)
    counts_N = np.empty(stop - start, np.int32)
    exact_NT = np.zeros((stop - start, 2 * ceil(around) + 1))
    for n in range(stop - start):
        centre = (start + n + 0.5) * scale
        begin = max(0, int(centre - around + 0.5))
        count = min(length, int(centre + around + 0.5)) - begin
        total = 0.0
        for tap in range(count):
            exact_NT[n, tap] = _curve(abs((begin + tap - centre + 0.5) * (1 / wider)), reach)
            total += exact_NT[n, tap]
        for tap in range(count):
            exact_NT[n, tap] /= total
        begins_N[n], counts_N[n] = begin, count
    bits = _BITS
    if short:  # as many as the largest of the line has room for
        bits, largest = 0, exact_NT.max()
        while bits < _BITS and int(largest * (1 << (bits + 1)) + 0.5) < 1 << 15:
            bits += 1
    part = slice(first - start, last - start)
    exact_NT = exact_NT[part]
    weights_NT = np.empty((last - first, exact_NT.shape[1]), np.int32)
    for n in range(last - first):
        for tap in range(weights_NT.shape[1]):
            weight = exact_NT[n, tap] * (1 << bits)
            rounded = int(weight - 0.5 if weight < 0 else weight + 0.5)
            weights_NT[n, tap] = rounded << (_BITS - bits)
    return begins_N[part], counts_N[part], weights_NT


@njit(inline="always")
def _curve(x: float, reach: float) -> float:
    if reach == 1:
        return max(1 - x, 0.0)
    if x < 1:
        return (1.5 * x - 2.5) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * -0.5 if x < 2 else 0.0


_OF_ANY_PART = (  # compiled once, also for pixels that lie apart
    "uint8[:, :, ::1](uint32[:, :], UniTuple(int64, 2), UniTuple(int64, 4), float64, boolean)"
)


@njit(_OF_ANY_PART, cache=True, nogil=True)
def resize_part(
    pixels_HW: Words,
    size: tuple[int, int],
    box: tuple[int, int, int, int],
    reach: float,
    short: bool,
) -> Bytes:
    """Return a part, `[3, H, W]`, of the image that is resized to `size`, its width and height.

    Args:
        box: The part's left, upper, right and lower edge.
        reach: 1.0 for bilinear, 2.0 for bicubic weights.
        short: Whether weights are PyTorch's, of 16 bits, and not Pillow's.
    """
    (rows, columns), (left, top, right, bottom) = pixels_HW.shape, box
    begins_W, counts_W, weights_WT = _weights(columns, size[0], left, right, reach, short)
    begins_H, counts_H, weights_HT = _weights(rows, size[1], top, bottom, reach, short)
    width, height = right - left, bottom - top
    first, above = begins_W[0], begins_H[0]
    used = begins_W[-1] + counts_W[-1] - first
    below = begins_H[-1] + counts_H[-1]
    red_N = np.empty(max(_ROWS, width), np.int32)
    green_N, blue_N = np.empty_like(red_N), np.empty_like(red_N)
    block_WR = np.empty((used, _ROWS), np.uint32)
    narrow_WR = np.empty((width, _ROWS), np.uint32)
    narrow_HW = np.empty((below - above, width), np.uint32)
    for row in range(above, below, _ROWS):
        taken = min(_ROWS, below - row)
        _turn(pixels_HW, row, taken, first, block_WR)
        for x in range(width):
            weights_T = weights_WT[x, : counts_W[x]]
            _sum(block_WR, begins_W[x] - first, weights_T, _ROWS, red_N, green_N, blue_N)
            for r in range(_ROWS):
                green, blue = _byte(green_N[r]), _byte(blue_N[r])
                narrow_WR[x, r] = _byte(red_N[r]) | (green << 8) | (blue << 16)
        for r in range(taken):
            for x in range(width):
                narrow_HW[row - above + r, x] = narrow_WR[x, r]
    found_3HW = np.empty((3, height, width), np.uint8)
    for y in range(height):
        weights_T = weights_HT[y, : counts_H[y]]
        _sum(narrow_HW, begins_H[y] - above, weights_T, width, red_N, green_N, blue_N)
        for x in range(width):
            found_3HW[0, y, x] = _byte(red_N[x])
            found_3HW[1, y, x] = _byte(green_N[x])
            found_3HW[2, y, x] = _byte(blue_N[x])
    return found_3HW
