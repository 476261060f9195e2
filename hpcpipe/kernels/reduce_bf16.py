"""Sums over rows of bfloat16, each in one fixed order."""

from hpcpipe.kernels.arrays import BFloats, Floats
from hpcpipe.kernels.bfloat16 import widen
from hpcpipe.kernels.block import BLOCK_ELEMENTS, carray, new_block
from hpcpipe.kernels.jit import kernel


@kernel
def bias_gradient_bf16(d: BFloats, acc: Floats, first_column: int, last_column: int) -> None:
    """Add the sum of all rows to ``acc``: the gradient of a bias that was added to every row.

    The rows are summed in float32 first, from row 0 upwards, and the sum is then added. Before that it is off by at
    most ``2**-24 * R`` times the sum of its terms' magnitudes.

    Parameters
    ----------
    d : uint16 array, shape [R, N]
        Gradient of the output.
    acc : float32 array, shape [N]
        Gradient of the bias, added to in place in the columns ``first_column`` to ``last_column``.
    first_column, last_column : int
        Columns; threads may share them in any way.
    """
    block = carray(new_block(), BLOCK_ELEMENTS)
    num_rows = d.shape[0]
    for start in range(first_column, last_column, BLOCK_ELEMENTS):
        stop = min(start + BLOCK_ELEMENTS, last_column)
        sums = block[: stop - start]
        sums[:] = 0
        # Four rows at once, since the sums pass through the cache each time.
        for row in range(0, num_rows - 3, 4):
            row0, row1, row2, row3 = (
                d[row, start:stop],
                d[row + 1, start:stop],
                d[row + 2, start:stop],
                d[row + 3, start:stop],
            )
            for c in range(stop - start):
                sums[c] = (((sums[c] + widen(row0[c])) + widen(row1[c])) + widen(row2[c])) + widen(row3[c])
        for row in range(num_rows // 4 * 4, num_rows):
            line = d[row, start:stop]
            for c in range(stop - start):
                sums[c] += widen(line[c])
        for c in range(stop - start):
            acc[start + c] += sums[c]
