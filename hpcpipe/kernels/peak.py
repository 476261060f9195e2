"""The rate of the unit that multiplies bfloat16, with operands that stay close to it."""

from hpcpipe.kernels.arrays import BFloats, Floats, Panels
from hpcpipe.kernels.block import begin_blocks, end_blocks, multiply_block
from hpcpipe.kernels.jit import kernel


@kernel
def repeat_block(a: BFloats, b: Panels, out: Floats, repetitions: int) -> None:
    """Multiply the same block again and again.

    Parameters
    ----------
    a : uint16 array, shape [32, K]
        Left operand; K is a multiple of 32.
    b : uint16 array, shape [panel_elements(K, 32)]
        Right operand; starts a cache line.
    out : float32 array, shape [32, 32]
        Overwritten; starts a cache line.
    repetitions : int
        Products, of ``2 * 32 * 32 * K`` FLOPs each.
    """
    begin_blocks()
    for _ in range(repetitions):
        multiply_block(a.ctypes.data, a.strides[0], b.ctypes.data, a.shape[1] // 32, out.ctypes.data, False)
    end_blocks()
