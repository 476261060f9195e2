"""Numba's own count of what compiled kernels allocate; they should allocate nothing."""

from typing import Any

from numba.core import runtime

# It has no types.
_runtime: Any = runtime


def allocated_blocks() -> int:
    """Return how many blocks numba's runtime has allocated since this was called for the first time.

    Each array argument of a call counts as one: numba makes a small record of who owns it. Whatever is more than that
    was allocated by the kernel.
    """
    _runtime._nrt_python.memsys_enable_stats()
    return int(_runtime.rtsys.get_allocation_stats().alloc)
