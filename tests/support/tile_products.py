"""Uses tiles in a process of its own, for tests that must not depend on the processor they run on.

``python -m support.tile_products blocks CASES RESULTS`` computes block products in several ways; CASES is the .npz of
`save`. ``... die HOW`` executes an instruction that must end the process.
"""

import resource
import sys
import threading

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from support import tile_emulator

MARGIN = 16
"""Elements before and behind a result, 64 bytes: what nobody may write."""
UNTOUCHED = np.float32(-7.5)
REPEATS = 8


def save(path, cases):
    """Write cases of (memory of the left operand, first element, stride in bytes, panel, block before, accumulate)."""
    np.savez(path, **{f"{index}-{part}": value for index, case in enumerate(cases) for part, value in enumerate(case)})


def load(path):
    with np.load(path) as file:
        return [[file[f"{index}-{part}"] for part in range(6)] for index in range(len(file.files) // 6)]


def aligned(size):
    """A float32 array that starts a cache line."""
    raw = np.empty(size + MARGIN, np.float32)
    start = -raw.ctypes.data % 64 // 4
    return raw[start : start + size]


class Product:
    """One case with its result, which has margins."""

    def __init__(self, case):
        memory, first, stride, panel, before, accumulate = case
        self.memory, self.panel, self.before = memory, panel, before
        self.a, self.stride, self.accumulate = memory.ctypes.data + 2 * int(first), int(stride), bool(accumulate)
        self.steps = len(panel)
        self.result = aligned(before.size + 2 * MARGIN)
        self.out = self.result[MARGIN:].ctypes.data

    def compute(self, multiply):
        """multiply(a, stride, b, steps, out, accumulate); return a copy of the result."""
        self.result[:] = UNTOUCHED
        self.result[MARGIN:-MARGIN] = self.before.ravel()
        multiply(self.a, self.stride, self.panel.ctypes.data, self.steps, self.out, self.accumulate)
        return self.result.copy()


def compute_blocks(cases, results):
    from hpcpipe.kernels import amx

    def in_parts(a, stride, b, steps, out, accumulate):
        half = steps // 2
        amx.multiply_block(a, stride, b, half, out, accumulate)
        amx.multiply_block(a + 64 * half, stride, b + 2048 * half, steps - half, out, half > 0 or accumulate)

    def with_prefetch(a, stride, b, steps, out, accumulate):
        amx.multiply_block_and_prefetch(a, stride, b, steps, out, accumulate, b + 2048)

    def all_of(multiply):
        products = [Product(case) for case in cases]
        amx.begin()
        computed = [product.compute(multiply) for product in products]
        amx.end()
        return np.stack(computed)

    def on_a_thread(place):
        barrier.wait(60)
        # Not in the same order on both, or one could use the other's tiles without harm.
        own = cases if place == 0 else cases[::-1]
        for repeat in range(REPEATS):
            products = [Product(case) for case in own]
            amx.begin()
            computed = np.stack([product.compute(amx.multiply_block) for product in products])
            amx.end()
            threaded[place, repeat] = computed if place == 0 else computed[::-1]

    whole = all_of(amx.multiply_block)
    barrier = threading.Barrier(2)
    threaded = np.zeros((2, REPEATS, *whole.shape), np.float32)
    threads = [threading.Thread(target=on_a_thread, args=(place,)) for place in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    np.savez(results, whole=whole, in_parts=all_of(in_parts), with_prefetch=all_of(with_prefetch), threaded=threaded)


@intrinsic
def trap(typing):
    def emit(context, builder, signature, arguments):
        nothing = ir.FunctionType(ir.VoidType(), [])
        builder.call(builder.module.declare_intrinsic("llvm.trap", (), nothing), [])
        return context.get_dummy_value()

    return types.void(), emit


def die(how):
    """Multiply on tiles that are not prepared, or not any more, or execute an instruction that is no tile's."""
    from hpcpipe.kernels import amx

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    block = aligned(1024)
    block[:] = 0
    memory = block.ctypes.data
    amx.begin()
    amx.multiply_block(memory, 64, memory, 1, memory, False)
    amx.end()
    print("alive", flush=True)
    if how == "released":
        amx.multiply_block(memory, 64, memory, 1, memory, False)
    elif how == "unprepared":
        thread = threading.Thread(target=amx.multiply_block, args=(memory, 64, memory, 1, memory, False))
        amx.begin()
        thread.start()
        thread.join()
    elif how == "trap":
        njit(lambda: trap())()
    print("survived", flush=True)


if __name__ == "__main__":
    tile_emulator.install()
    action, *arguments = sys.argv[1:]
    if action == "blocks":
        compute_blocks(load(arguments[0]), arguments[1])
    else:
        die(*arguments)
