"""The emulator of tiles reads instructions as processors do, and computes what Intel's manual says."""

import platform
import sys

import numpy as np
import pytest
from support import tile_emulator
from support.fresh import RANDOM
from support.tile_emulator import NUM_REGISTERS, REGISTERS, RIP, STATE_BYTES

pytestmark = pytest.mark.skipif(sys.platform != "linux" or platform.machine() != "x86_64", reason="tiles are x86-64's")

RAX, RCX, _, RBX, RSP, RBP, RSI, RDI, R8, _, R10, _, R12, R13, R14, R15 = REGISTERS
SMALLEST = np.float32(2.0**-126)


class Thread:
    """Registers, tiles and a little memory of an emulated thread."""

    def __init__(self, rows=(16,) * 8, columns=(64,) * 8):
        self.memory = RANDOM.integers(0, 256, 1 << 16, dtype=np.uint8)
        self.start = self.memory.ctypes.data
        self.registers = RANDOM.integers(-(2**62), 2**62, NUM_REGISTERS)
        self.state = np.zeros(STATE_BYTES + 128, np.uint8)
        self.state[0] = 1
        self.state[16:32].view(np.uint16)[:] = columns
        self.state[48:56] = rows

    def point(self, values):
        """Set registers; values of the first one count from the start of memory."""
        for place, (register, value) in enumerate(values.items()):
            self.registers[register] = value + (self.start if place == 0 else 0)

    def execute(self, code, behind=bytes(16)):
        """Carry out an instruction; whether it was one. RIP must then be behind it, and no other register change."""
        code = bytes.fromhex(code)
        text = np.frombuffer(code + behind, np.uint8)
        self.registers[RIP] = text.ctypes.data
        before = self.registers.copy()
        done = tile_emulator.carry_out(self.registers, self.state[:STATE_BYTES])
        before[RIP] += len(code) if done else 0
        assert np.array_equal(self.registers, before)
        return done

    def tile(self, number, dtype=np.uint8):
        return self.state[64 + 1024 * number : 64 + 1024 * (number + 1)].reshape(16, 64).view(dtype)

    def rows_at(self, offset, stride, rows=16):
        return np.stack([self.memory[offset + row * stride :][:64] for row in range(rows)])


# tileloadd as an assembler writes it, its tile, and registers that make it read at `offset` and every `stride` bytes.
LOADS = [
    ("c4e27b4b0430", 0, {RAX: 1000, RSI: 72}, 1000, 72),
    ("c4827b4b7c7540", 7, {R13: 5000, R14: 100}, 5064, 200),
    ("c4a27b4b9ce400f0ffff", 3, {RSP: 9001, R12: 15}, 4905, 120),
    ("c4e27b4b0c23", 1, {RBX: 777}, 777, 0),
    ("c4c27b4b340a", 6, {R10: 40, RCX: 999}, 40, 999),
    ("c4e27b4b6c4d80", 5, {RBP: 20000, RCX: -150}, 19872, -300),
]


@pytest.mark.parametrize(("code", "tile", "values", "offset", "stride"), LOADS)
def test_a_load_reads_where_the_instruction_says(code, tile, values, offset, stride):
    thread = Thread()
    thread.point(values)
    assert thread.execute(code)
    assert np.array_equal(thread.tile(tile), thread.rows_at(offset, stride))
    assert not any(thread.tile(other).any() for other in range(8) if other != tile)


def test_an_address_may_have_no_base():
    thread = Thread()
    thread.registers[RDI] = 123456
    code = np.frombuffer(bytes.fromhex("c4e27b4b143d00100000"), np.uint8)
    assert tile_emulator.decode_address(code, thread.registers, 0, 0) == (0x1000, 123456, len(code))


def test_a_store_writes_the_shape_of_its_tile_only():
    thread = Thread(rows=(5,) * 8, columns=(24,) * 8)
    thread.tile(6)[:] = 255
    thread.point({R8: 333, RCX: 80})
    expected = thread.memory.copy()
    for row in range(5):
        expected[333 + 80 * row :][:24] = 255
    assert thread.execute("c4c27a4b3408")
    assert np.array_equal(thread.memory, expected)


def test_a_load_zeroes_the_rest_of_its_tile():
    thread = Thread(rows=(5,) * 8, columns=(24,) * 8)
    thread.tile(0)[:] = 255
    thread.point({RAX: 0, RSI: 64})
    assert thread.execute("c4e27b4b0430")
    assert np.array_equal(thread.tile(0)[:5, :24], thread.rows_at(0, 64, 5)[:, :24])
    assert not thread.tile(0)[5:].any()
    assert not thread.tile(0)[:, 24:].any()


CONFIGS = [
    ("c4e2784900", {RAX: 640}, 640),
    ("c482784944bc08", {R12: 600, R15: 8}, 640),
    ("c4e2784945c0", {RBP: 704}, 640),
]


@pytest.mark.parametrize(("code", "values", "offset"), CONFIGS)
def test_a_configuration_is_loaded_and_tiles_are_zeroed(code, values, offset):
    thread = Thread()
    thread.tile(3)[:] = 1
    configuration = thread.memory[offset : offset + 64]
    configuration[:] = 0
    configuration[[0, 16, 18, 48, 49]] = 1, 64, 8, 16, 2
    thread.point(values)
    assert thread.execute(code)
    assert np.array_equal(thread.state[:64], configuration)
    assert not thread.state[64:].any()


def test_a_configuration_is_found_from_the_next_instruction():
    thread = Thread()
    assert thread.execute("c4e278490510000000", behind=bytes(16) + b"\1" + bytes(63))
    assert thread.state[0] == 1
    assert not thread.state[1:].any()


@pytest.mark.parametrize(("place", "value"), [(0, 2), (1, 1), (2, 1), (16, 65), (40, 1), (48, 17), (50, 1), (60, 1)])
def test_a_configuration_beyond_the_unit_is_refused(place, value):
    thread = Thread()
    configuration = thread.memory[:64]
    configuration[:] = 0
    configuration[[0, 16, 48]] = 1, 64, 16
    configuration[place] = value
    thread.point({RAX: 0})
    before = thread.state.copy()
    assert not thread.execute("c4e2784900")
    assert np.array_equal(thread.state, before)


def test_a_release_takes_the_configuration_away():
    thread = Thread()
    thread.tile(1)[:] = 1
    assert thread.execute("c4e27849c0")
    assert not thread.state.any()


def test_zero_clears_one_tile():
    thread = Thread()
    thread.state[64:] = 1
    assert thread.execute("c4e27b49e8")
    assert [thread.tile(tile).any() for tile in range(8)] == [True] * 5 + [False] + [True] * 2


REFUSED = {
    "tilezero of a tile without shape": "c4e27b49f0",
    "tdpbf16ps of rows that do not fit": "c4e2525cc6",
    "tdpbf16ps with a tile twice": "c4e26a5cc2",
    "tileloaddt1": "c4e2794b0430",
    "tdpbssd": "c4e24b5ed5",
    "sttilecfg": "c4e2794900",
    "with W set": "c4e2fb49e8",
    "of 256 bits": "c4e27f49e8",
    "of another map": "c4e17b49e8",
    "with a ninth tile": "c4627b49e8",
    "ud2": "0f0b",
}


@pytest.mark.parametrize("code", REFUSED.values(), ids=REFUSED.keys())
def test_other_instructions_are_refused(code):
    thread = Thread(rows=(16, 16, 16, 16, 16, 8, 0, 16))
    assert not thread.execute(code)


def flushed(x):
    x = x.astype(np.float32)
    return np.where(abs(x) < SMALLEST, np.copysign(np.float32(0), x), x)


def reference_dot(out, a, b):
    """Return out + a @ b as the manual's pseudocode has it; products and sums of float32 are exact in long double.

    A long double has 64 bits of mantissa, so that rounding twice differs from rounding once in 1 of 2^39 cases.
    """
    a, b, sums = flushed(a).astype(np.longdouble), flushed(b).astype(np.longdouble), []
    for parity in range(2):
        total = np.zeros(out.shape, np.float32)
        for k in range(a.shape[1] // 2):
            total = flushed(total + np.outer(a[:, 2 * k + parity], b[k, parity::2]))
        sums.append(total)
    return flushed(flushed(out) + flushed(sums[0] + sums[1]))


RANGES = {
    "of one size": ((-2, 2), (-2, 2)),
    "of many sizes": ((-40, 40), (-40, 40)),
    "with subnormal results": ((-66, -58), (-130, -116)),
    "with subnormal operands": ((-130, -110), (-130, -116)),
    "of subnormal and large numbers": ((-130, 55), (-130, -116)),
}


@pytest.mark.parametrize(("exponents", "exponents_before"), RANGES.values(), ids=RANGES.keys())
def test_dot_products_have_the_bits_of_the_manual(exponents, exponents_before):
    random = RANDOM
    rows, pairs, columns = 7, 11, 5
    # tdpbf16ps tmm2, tmm5, tmm6
    thread = Thread(
        rows=(0, 0, rows, 0, 0, rows, pairs, 0), columns=(0, 0, 4 * columns, 0, 0, 4 * pairs, 4 * columns, 0)
    )

    def draw(exponents, shape):
        return random.standard_normal(shape) * 2.0 ** random.integers(*exponents, shape)

    for tile, height, width in ((5, rows, 2 * pairs), (6, pairs, 2 * columns)):
        bits = draw(exponents, (height, width)).astype(np.float32).view(np.uint32) >> 16
        thread.tile(tile, np.uint16)[:height, :width] = bits
    thread.tile(2, np.float32)[:rows, :columns] = draw(exponents_before, (rows, columns))
    a, b = ((thread.tile(tile, np.uint16).astype(np.uint32) << 16).view(np.float32) for tile in (5, 6))
    before = thread.tile(2, np.float32)[:rows, :columns].copy()
    expected = reference_dot(before, a[:rows, : 2 * pairs], b[:pairs, : 2 * columns])
    assert thread.execute("c4e24a5cd5")
    computed = thread.tile(2, np.float32)[:rows, :columns]
    assert np.array_equal(computed.view(np.uint32), expected.view(np.uint32))
    assert (computed != before).any()


def test_infinities_and_numbers_that_are_none_stay():
    thread = Thread()
    a, b = thread.tile(5, np.uint16), thread.tile(6, np.uint16)
    a[:2, 0], a[2, 0], b[0, 0] = 0x7F80, 0x7FC1, 0x3F80
    a[1, 1], b[0, 1] = 0xFF80, 0x3F80
    assert thread.execute("c4e24a5cd5")
    out = thread.tile(2, np.float32)
    assert np.isposinf(out[0, 0])
    assert np.isnan(out[1:3, 0]).all()
    assert not out[3:, 0].any()
