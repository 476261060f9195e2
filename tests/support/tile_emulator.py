"""Carries out the tile instructions of AMX on processors that have none, so that their kernels are tested anywhere.

A processor without AMX raises SIGILL at each tile instruction. `install` sets a handler for it, compiled by numba,
which reads the instruction and the registers from the signal's context, does on memory what the instruction does on
tiles, and lets the thread go on behind it. Every thread has its own tiles.

Known are the six instructions that ``hpcpipe.kernels.amx`` uses: ldtilecfg, tilerelease, tilezero, tileloadd,
tilestored and tdpbf16ps, with every form of address that 64-bit code has save prefixes of segment and address size.
They do what Intel's manual says, rounding included, and refuse what it refuses: a tile that is not configured,
tiles whose shapes do not fit. A refused instruction, or any other one that the processor does not have, goes to
the handler that was there before, which as a rule ends the process. One that reads or writes where there is no memory
raises SIGSEGV, as on the processor.

An instruction takes a few microseconds. Where the processor has tiles that the kernel grants, nothing is emulated.

As a program, ``python -m support.tile_emulator MODULE ARGUMENT...`` runs a module that way.

Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volumes 1 (18) and 2.
"""

import ctypes
import os
import runpy
import signal
import sys

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import carray, cfunc, njit, types
from numba.extending import intrinsic

from hpcpipe.kernels import features

TILES, TILE_ROWS, ROW_BYTES = 8, 16, 64
CONFIG_BYTES = 64
STATE_BYTES = CONFIG_BYTES + TILES * TILE_ROWS * ROW_BYTES
"""What a thread has: the configuration, whose first byte is 0 when there is none, and the tiles behind it."""

# Numbers of registers in instructions, as indices into the general registers of a signal's context.
REGISTERS = np.array([13, 14, 12, 11, 15, 10, 9, 8, 0, 1, 2, 3, 4, 5, 6, 7])
RIP, NUM_REGISTERS = 16, 23
REGISTERS_IN_CONTEXT = 40

NO_PREFIX, F3, F2 = 0, 2, 3
SMALLEST_NORMAL = np.float32(2.0**-126)
ZERO = np.float32(0)


def is_needed():
    """Tell whether this processor has no tiles of its own."""
    return not llvm.get_host_cpu_features().get("amx-bf16", False)


def environment():
    """Return the variables a process needs, so that its kernels are compiled with tile instructions."""
    if not is_needed():
        return {}
    features = llvm.get_host_cpu_features().flatten()
    return {"NUMBA_CPU_NAME": llvm.get_host_cpu_name(), "NUMBA_CPU_FEATURES": f"{features},+amx-tile,+amx-bf16"}


@intrinsic
def pointer(typing, address):
    def emit(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.int64), emit


@intrinsic
def fused(typing, a, b, c):
    """a * b + c, rounded once."""
    return types.float32(*[types.float32] * 3), lambda context, builder, signature, arguments: builder.fma(*arguments)


@njit(cache=True)
def flushed(x):
    """Zero of the same sign for a subnormal number."""
    return x * ZERO if abs(x) < SMALLEST_NORMAL else x


@njit(cache=True)
def shape_in(config, tile):
    """(rows, bytes per row) of a tile."""
    return np.int64(config[48 + tile]), np.int64(config[16 + 2 * tile]) + 256 * np.int64(config[17 + 2 * tile])


@njit(cache=True)
def place_of(tile):
    return CONFIG_BYTES + tile * TILE_ROWS * ROW_BYTES


@njit(cache=True)
def load_config(state, source):
    """ldtilecfg; everything but the palette and the shapes of 8 tiles must be zero."""
    excess = source[0] > 1 or source[1] != 0
    for byte in range(2, CONFIG_BYTES):
        if (byte < 16 or 32 <= byte < 48 or byte >= 56) and source[byte] != 0:
            excess = True
    for tile in range(TILES):
        rows, columns = shape_in(source, tile)
        if rows > TILE_ROWS or columns > ROW_BYTES or (rows == 0) != (columns == 0):
            excess = True
    if excess:
        return False
    clear(state, 0, STATE_BYTES)
    for byte in range(CONFIG_BYTES):
        state[byte] = source[byte] if source[0] == 1 else 0
    return True


@njit(cache=True)
def clear(state, first, last):
    for byte in range(first, last):
        state[byte] = 0


@njit(cache=True)
def move(state, tile, address, stride, is_store):
    """Tileloadd and tilestored."""
    rows, columns = shape_in(state, tile)
    if rows == 0:
        return False
    place = place_of(tile)
    if not is_store:
        clear(state, place, place_of(tile + 1))
    for row in range(rows):
        memory = carray(pointer(address + row * stride), ROW_BYTES, np.uint8)
        for byte in range(columns):
            if is_store:
                memory[byte] = state[place + row * ROW_BYTES + byte]
            else:
                state[place + row * ROW_BYTES + byte] = memory[byte]
    return True


@njit(cache=True)
def dot(state, out, left, right):
    """tdpbf16ps: sums of even and of odd k side by side, then their sum added to what the tile holds."""
    rows, columns = shape_in(state, out)
    left_rows, left_columns = shape_in(state, left)
    right_rows, right_columns = shape_in(state, right)
    if rows == 0 or left_rows != rows or right_columns != columns or left_columns != right_rows * 4:
        return False
    if right_rows == 0 or columns % 4 != 0 or out in (left, right) or left == right:
        return False
    start = state.ctypes.data
    sums = carray(pointer(start + place_of(out)), (TILE_ROWS, 16), np.float32)
    a = carray(pointer(start + place_of(left)), (TILE_ROWS, 16), np.uint32)
    b = carray(pointer(start + place_of(right)), (TILE_ROWS, 16), np.uint32)
    temporary = carray(pointer(start + STATE_BYTES), (2, 16), np.float32)
    upper, half = np.uint32(0xFFFF0000), np.uint32(16)
    for row in range(rows):
        for c in range(16):
            temporary[0, c] = temporary[1, c] = 0
        for k in range(right_rows):
            first = flushed(np.uint32(a[row, k] << half).view(np.float32))
            second = flushed(np.uint32(a[row, k] & upper).view(np.float32))
            for c in range(16):
                even, odd = np.uint32(b[k, c] << half), np.uint32(b[k, c] & upper)
                temporary[0, c] = flushed(fused(first, flushed(even.view(np.float32)), temporary[0, c]))
                temporary[1, c] = flushed(fused(second, flushed(odd.view(np.float32)), temporary[1, c]))
        for c in range(columns // 4):
            sums[row, c] = flushed(flushed(sums[row, c]) + flushed(temporary[0, c] + temporary[1, c]))
    return True


@njit(cache=True)
def decode_address(code, registers, x, b):
    """Return (address without index, index times scale, length of the instruction) of a memory operand."""
    kind, low = code[4] >> 6, np.int64(code[4] & 7)
    length, index, base = 5, np.int64(0), np.int64(0)
    has_base = True
    if low == 4:
        sib = code[5]
        length = 6
        number = np.int64(sib >> 3 & 7) | x << 3
        if number != 4:
            index = registers[REGISTERS[number]] << np.int64(sib >> 6)
        low = np.int64(sib & 7)
        has_base = kind != 0 or low != 5
    is_relative = code[4] & 0xC7 == 5
    if has_base and not is_relative:
        base = registers[REGISTERS[low | b << 3]]
    if kind == 1:
        base += np.int8(code[length])
        length += 1
    elif kind == 2 or is_relative or not has_base:
        unsigned = np.uint32(0)
        for byte in range(4):
            unsigned |= np.uint32(code[length + byte]) << np.uint32(8 * byte)
        base += np.int64(np.int32(unsigned))
        length += 4
    if is_relative:
        base += registers[RIP] + length
    return base, index, length


@njit(cache=True, error_model="numpy")
def carry_out(registers, state):
    """Carry out the tile instruction at RIP and move RIP behind it; False, and nothing changes, if it is none.

    registers : int64 [23], in the order of a signal's context. state : uint8 [STATE_BYTES], then 128 bytes to work in.
    """
    code = carray(pointer(registers[RIP]), 16, np.uint8)
    # A VEX prefix of three bytes: inverted R, X, B and the map of opcodes (2: 0F 38); W, inverted vvvv, L, prefix.
    if code[0] != 0xC4 or code[1] & 0x1F != 2 or code[2] & 0x84 != 0:
        return False
    inverted, last = ~np.int64(code[1]), np.int64(code[2])
    r, x, b = inverted >> 7 & 1, inverted >> 6 & 1, inverted >> 5 & 1
    third, prefix = ~last >> 3 & 15, last & 3
    opcode, in_memory = code[3], code[4] < 0xC0
    first, second = np.int64(code[4] >> 3 & 7) | r << 3, np.int64(code[4] & 7) | b << 3
    length = np.int64(5)
    done = False
    if opcode == 0x5C and prefix == F3 and not in_memory and first < TILES and second < TILES and third < TILES:
        done = dot(state, first, second, third)
    elif third != 0:
        return False
    elif opcode == 0x49 and prefix == NO_PREFIX and in_memory and first == 0:
        address, index, length = decode_address(code, registers, x, b)
        done = load_config(state, carray(pointer(address + index), CONFIG_BYTES, np.uint8))
    elif opcode == 0x49 and prefix == NO_PREFIX and code[4] == 0xC0:
        clear(state, 0, STATE_BYTES)
        done = True
    elif opcode == 0x49 and prefix == F2 and not in_memory and second == 0 and first < TILES:
        done = shape_in(state, first)[0] > 0
        if done:
            clear(state, place_of(first), place_of(first + 1))
    elif opcode == 0x4B and prefix in (F2, F3) and in_memory and code[4] & 7 == 4 and first < TILES:
        address, stride, length = decode_address(code, registers, x, b)
        done = move(state, first, address, stride, prefix == F3)
    if done:
        registers[RIP] += length
    return done


class _Action(ctypes.Structure):
    """struct sigaction of the C library."""

    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_ulong * 16),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


_SA_SIGINFO = 4
_get_specific = types.ExternalFunction("pthread_getspecific", types.int64(types.uint32))
_set_specific = types.ExternalFunction("pthread_setspecific", types.int32(types.uint32, types.int64))
_allocate = types.ExternalFunction("calloc", types.int64(types.int64, types.int64))
_set_action = types.ExternalFunction("sigaction", types.int32(types.int32, types.int64, types.int64))
_installed = []


def _compile_handler(key, previous):
    """Make the handler: tiles of a thread are found by its own value of the key, and freed when it ends."""

    @cfunc(types.void(types.int32, types.int64, types.int64), error_model="numpy")
    def handle(number, info, context):
        address = _get_specific(key)
        if address == 0:
            address = _allocate(STATE_BYTES + 2 * ROW_BYTES, 1)
            _set_specific(key, address)
        registers = carray(pointer(context + REGISTERS_IN_CONTEXT), NUM_REGISTERS, np.int64)
        if not carry_out(registers, carray(pointer(address), STATE_BYTES, np.uint8)):
            # The instruction is tried again, and meets the handler that was there before.
            _set_action(number, previous, 0)

    return handle


def install():
    """Set the handler for this process, and let ``request_tiles`` say yes; nothing if the processor has tiles."""
    if not is_needed() or _installed:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    key, previous = ctypes.c_uint(), _Action()
    free = ctypes.cast(libc.free, ctypes.c_void_p)
    assert libc.pthread_key_create(ctypes.byref(key), free) == 0
    handler = _compile_handler(np.uint32(key.value), ctypes.addressof(previous))
    action = _Action(handler=handler.address, flags=_SA_SIGINFO)
    _installed.append((handler, previous))
    if libc.sigaction(signal.SIGILL, ctypes.byref(action), ctypes.byref(previous)) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    features.request_tiles = lambda: True


def main():
    """Run a module as ``python -m`` does, in an interpreter whose numba knows tiles."""
    needed = environment()
    if not needed.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, "-m", "support.tile_emulator", *sys.argv[1:]], os.environ | needed)
    install()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    # As this module by its own name, of which there is one handler however often it is imported.
    from support import tile_emulator

    tile_emulator.main()
