"""AdamW of a matrix that bfloat16 products read, which is packed again while it is in cache."""

from hpcpipe.kernels.adamw import adamw_update
from hpcpipe.kernels.arrays import Floats, Panels
from hpcpipe.kernels.block import ROWS
from hpcpipe.kernels.jit import kernel
from hpcpipe.kernels.panels import pack_tile, pack_transposed_tile

_AT_ONCE = 1024  # columns; 32 rows of them stay in the second-level cache between update and packing


@kernel
def adamw_pack(
    weight: Floats,
    grad: Floats,
    moment1: Floats,
    moment2: Floats,
    scale: float,
    learning_rate: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    weight_decay: float,
    correction1: float,
    correction2: float,
    rows: Panels,
    columns: Panels,
    first_row: int,
    last_row: int,
) -> None:
    """Do to rows of a matrix what `adamw_update` does, to the bit, and pack them in both directions.

    Parameters
    ----------
    weight, moment1, moment2 : float32 array, shape [K, N]
        Updated in place in the rows ``first_row`` to ``last_row``.
    grad : float32 array, shape [K, N]
        Gradient; left as it is.
    scale, learning_rate, beta1, beta2, epsilon, weight_decay, correction1, correction2 : float
        As in `adamw_update`.
    rows : uint16 array, shape [panel_elements(K, N)]
        Right operand of ``a @ weight``, overwritten for these rows as by `pack_rows`.
    columns : uint16 array, shape [panel_elements(N, K)]
        Right operand of ``a @ weight.T``, overwritten for these rows as by `pack_columns`.
    first_row, last_row : int
        Rows; the first is a multiple of 32, and so is the last unless it is K.
    """
    for top in range(first_row, last_row, ROWS):
        bottom = min(top + ROWS, last_row)
        for left in range(0, weight.shape[1], _AT_ONCE):
            right = min(left + _AT_ONCE, weight.shape[1])
            for row in range(top, bottom):
                adamw_update(
                    weight[row, left:right],
                    grad[row, left:right],
                    moment1[row, left:right],
                    moment2[row, left:right],
                    scale,
                    learning_rate,
                    beta1,
                    beta2,
                    epsilon,
                    weight_decay,
                    correction1,
                    correction2,
                )
            pack_tile(weight, rows, top, bottom, left, right)
            pack_transposed_tile(weight, columns, top, bottom, left, right)
