"""What one of the scales of a matrix is for, read from the shape of all of them."""

from dataclasses import dataclass

import numpy as np

from moesaic.safetensors.reader import Array

#: Nobody scales fewer columns or, short of one, fewer rows.
_LEAST_BLOCK = 16


@dataclass(frozen=True)
class ScaleGrid:
    """Scales of ``rows`` x ``cols`` values; each of ``parts`` of the rows starts blocks anew.

    The parts are gate and up where one matrix holds both and their scales were made apart.
    """

    rows: int
    cols: int
    parts: int = 1

    def row_index(self, n: int) -> Array:
        """The row of the grid for each of ``n`` rows."""
        part, row = np.divmod(np.arange(n), n // self.parts)
        index: Array = part * -(-(n // self.parts) // self.rows) + row // self.rows
        return index

    def shape(self, n: int, k: int) -> tuple[int, int]:
        """The shape of the scales of [n, k]."""
        return self.parts * -(-(n // self.parts) // self.rows), -(-k // self.cols)

    def scale(self, values: Array, scales: Array) -> None:
        """Multiplies the values [n, k], in place."""
        index, k = self.row_index(values.shape[0]), values.shape[1]
        # In pieces, so that the scales of all values are never there at once.
        for first in range(0, len(index), 256):
            rows, piece = scales[index[first : first + 256]], values[first : first + 256]
            if k % self.cols == 0 and piece.flags.c_contiguous:
                blocks = piece.reshape(len(piece), -1, self.cols)
                blocks *= rows[:, :, None]
            else:
                piece *= np.repeat(rows, self.cols, axis=1)[:, :k]

    def spread(self, grid: Array, n: int, k: int) -> Array:
        """The entry of each value, [n, k]."""
        out: Array = np.repeat(grid[self.row_index(n)], self.cols, axis=1)[:, :k]
        return out


def two_dims(shape: tuple[int, ...]) -> tuple[int, int] | None:
    """The rows and columns of scales; ModelOpt writes [rows, 1, columns, 1]."""
    if len(shape) == 4 and shape[1] == shape[3] == 1:
        return shape[0], shape[2]
    if len(shape) == 2:
        return shape[0], shape[1]
    if len(shape) < 2:
        return (shape[0] if shape else 1), 1
    return None


def find_grid(
    shape: tuple[int, int], n: int, k: int, parts: int, hint: tuple[int, int] | None
) -> ScaleGrid | None:
    """What scales of ``shape`` are for in a matrix [n, k]; None where nothing fits.

    Several blocks may fit a ragged matrix; ``hint``, the block that the configuration names, is
    taken where it fits, else a power of two.
    """
    splits = [count for count in (1, parts) if n % count == 0]
    if hint is not None:
        for count in splits:
            grid = ScaleGrid(*hint, count)
            if grid.shape(n, k) == shape:
                return grid
    simple = {
        (1, 1): ScaleGrid(n, k),
        (parts, 1): ScaleGrid(n // parts, k),
        (n, 1): ScaleGrid(1, k),
    }
    if shape in simple:
        return simple[shape]
    rows, cols = shape
    found = []
    for count in splits:
        if rows % count == 0:
            row_sizes = _block_sizes(n // count, rows // count)
            found += [ScaleGrid(r, c, count) for r in row_sizes for c in _block_sizes(k, cols)]
    if hint is not None:  # A grid that contradicts the configuration has to be beyond doubt.
        found = [grid for grid in found if n // grid.parts % grid.rows == k % grid.cols == 0]
    return max(found, key=_likeliness, default=None)


def _block_sizes(size: int, count: int) -> list[int]:
    """Sizes of blocks of which ``size`` has ``count``, those that anybody would choose."""
    if count == 1 or count == size:
        return [size // count]
    if not 1 < count < size:
        return []
    least, most = -(-size // count), -(-size // (count - 1)) - 1
    power = 1 << (least - 1).bit_length()
    found = ([power] if power <= most else []) + ([least] if size % count == 0 else [])
    return [block for block in found if block >= _LEAST_BLOCK]


def _likeliness(grid: ScaleGrid) -> tuple[bool, bool, bool]:
    def usual(size: int) -> bool:
        return size & (size - 1) == 0

    return usual(grid.rows) and usual(grid.cols), grid.rows == grid.cols, grid.parts == 1
