"""Block products on tiles: on those of the processor, or on emulated ones where it has none."""

import json
import os
import platform
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support import tile_emulator
from support.fresh import RANDOM
from support.tile_products import MARGIN, UNTOUCHED, save

from hpcpipe.errors import UsageError
from hpcpipe.kernels import features

TESTS = Path(__file__).parents[1]
NAN = 0x7FC0
STEPS = (1, 2, 3, 24)
CASES = [(steps, accumulate) for steps in STEPS for accumulate in (False, True)]
NUM_CASES = len(CASES) + 2
VECTORS = features.family() if features.family() != "amx" else "avx512_bf16"

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux" or platform.machine() != "x86_64", reason="tiles are x86-64's"),
    pytest.mark.skipif(
        not tile_emulator.is_needed() and not features.request_tiles(), reason="the kernel grants no tiles"
    ),
]


def run(*words, family="amx"):
    """Run a module; for tiles, in an interpreter whose numba knows them."""
    command = [sys.executable, "-m", *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": str(TESTS), features.VARIABLE: family}
    if family == "amx":
        environment |= tile_emulator.environment()
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)


def to_bfloat16(x):
    """The upper halves of float32, cut off."""
    return (np.ascontiguousarray(x, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def widened(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


def make_case(random, a, b, accumulate):
    """Lay out one product; whatever is not an operand is not a number, and rows start anywhere and lie apart."""
    depth = a.shape[1]
    first, stride = int(random.integers(1, 40)), depth + int(random.integers(0, 50))
    memory = np.full(first + 32 * stride + 64, NAN, np.uint16)
    for row in range(32):
        memory[first + row * stride :][:depth] = a[row]
    panel = b.reshape(depth // 32, 16, 2, 2, 16).transpose(0, 3, 1, 4, 2).copy()
    before = random.standard_normal((32, 32)).astype(np.float32) if accumulate else np.full((32, 32), np.nan, "f4")
    return memory, first, 2 * stride, panel, before, accumulate


@pytest.fixture(scope="module")
def operands():
    """(a, b) of each case in bfloat16: random ones, then small whole numbers, then equal rows and columns."""
    random = RANDOM

    def normal(rows, columns):
        return to_bfloat16(random.standard_normal((rows, columns)) * 2.0 ** random.integers(-20, 20, (rows, columns)))

    pairs = [(normal(32, 32 * steps), normal(32 * steps, 32)) for steps, _ in CASES]
    pairs.append(tuple(to_bfloat16(random.integers(-128, 129, shape)) for shape in ((32, 96), (96, 32))))
    row, column = normal(1, 160), normal(160, 1)
    pairs.append((np.repeat(row, 32, 0), np.repeat(column, 32, 1)))
    return pairs


@pytest.fixture(scope="module")
def cases(operands):
    random = RANDOM
    flags = [accumulate for _, accumulate in CASES] + [False, False]
    return [make_case(random, *pair, accumulate) for pair, accumulate in zip(operands, flags, strict=True)]


@pytest.fixture(scope="module")
def results(cases, tmp_path_factory):
    directory = tmp_path_factory.mktemp("amx")
    save(directory / "cases.npz", cases)
    finished = run("support.tile_products", "blocks", directory / "cases.npz", directory / "results.npz")
    assert finished.returncode == 0, finished.stderr
    with np.load(directory / "results.npz") as file:
        return dict(file)


def block(results, index):
    return results["whole"][index, MARGIN:-MARGIN].reshape(32, 32)


@pytest.mark.parametrize("index", range(NUM_CASES))
def test_a_block_is_the_product(results, cases, operands, index):
    a, b = (widened(operand).astype(np.float64) for operand in operands[index])
    before = cases[index][4] if cases[index][5] else np.zeros((32, 32))
    exact = a @ b + before
    # Per 32 of k, 16 fused additions to each of two sums, one of these sums and one to the block, each within 2^-24.
    bound = (18 + a.shape[1] // 32) * 2.0**-24 * (abs(a) @ abs(b) + abs(before))
    assert (abs(block(results, index) - exact) <= bound).all()


def test_small_whole_numbers_are_multiplied_exactly(results, operands):
    a, b = (widened(operand).astype(np.int64) for operand in operands[len(CASES)])
    assert np.array_equal(block(results, len(CASES)), a @ b)


def test_bits_do_not_depend_on_the_place_in_a_block(results):
    computed = block(results, NUM_CASES - 1)
    assert computed[0, 0] != 0
    assert np.array_equal(computed.view(np.uint32), np.full((32, 32), computed.view(np.uint32)[0, 0]))


def test_nothing_beside_a_block_is_written(results):
    margins = np.concatenate([results["whole"][:, :MARGIN], results["whole"][:, -MARGIN:]], axis=1)
    assert (margins == UNTOUCHED).all()


@pytest.mark.parametrize("way", ["in_parts", "with_prefetch"])
def test_every_way_gives_the_same_bits(results, way):
    assert results[way].tobytes() == results["whole"].tobytes()


def test_two_threads_at_once_have_tiles_of_their_own(results):
    expected = np.broadcast_to(results["whole"], results["threaded"].shape)
    assert np.array_equal(results["threaded"], expected)


@pytest.mark.parametrize("how", ["unprepared", "released", "trap"])
def test_what_is_no_valid_tile_instruction_ends_the_process(how):
    finished = run("support.tile_products", "die", how)
    assert (finished.returncode, finished.stdout) == (-signal.SIGILL, "alive\n"), finished.stderr


@pytest.mark.skipif(not tile_emulator.is_needed(), reason="these tests use the processor's tiles as they are")
@pytest.mark.parametrize("file", ["test_products.py"])
def test_what_is_built_of_blocks_passes_its_tests_on_tiles(file):
    """The option keeps pytest from taking the signal away from the emulator."""
    pytest_words = ["pytest", "-q", "-p", "no:faulthandler", "-p", "no:cacheprovider", TESTS / "unit" / file]
    finished = run("support.tile_emulator", *pytest_words)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert " passed" in finished.stdout


def test_training_on_tiles_is_training_on_vectors():
    """Their sums differ in order, thus in last bits, which now and then round to another bfloat16."""
    losses_and_norms = []
    for words, family in ((("support.tile_emulator",), "amx"), ((), VECTORS)):
        finished = run(*words, "support.training_in_bf16", family=family)
        assert finished.returncode == 0, finished.stderr
        one_thread, two_threads = json.loads(finished.stdout)
        assert one_thread == two_threads
        losses_and_norms.append(np.array(one_thread))
    tiles, vectors = losses_and_norms
    assert np.allclose(tiles[0], vectors[0], rtol=1e-6)
    assert np.allclose(tiles, vectors, rtol=(1e-3, 1e-2))


ALL_FEATURES = frozenset({"amx-tile", "amx-bf16", "avx512f", "avx512bf16"})


@pytest.mark.parametrize(("granted", "family"), [(True, "amx"), (False, "avx512_bf16")])
def test_tiles_are_chosen_where_the_kernel_grants_them(monkeypatch, granted, family):
    monkeypatch.delenv(features.VARIABLE, raising=False)
    monkeypatch.setattr(features, "compiler_features", lambda: ALL_FEATURES)
    monkeypatch.setattr(features, "request_tiles", lambda: granted)
    assert features.family.__wrapped__() == family


def test_tiles_that_the_kernel_refuses_cannot_be_chosen_by_name(monkeypatch):
    monkeypatch.setenv(features.VARIABLE, "amx")
    monkeypatch.setattr(features, "compiler_features", lambda: ALL_FEATURES)
    monkeypatch.setattr(features, "request_tiles", lambda: False)
    with pytest.raises(UsageError, match=r"HPCPIPE_KERNELS = amx: .* avx512_bf16, vector"):
        features.family.__wrapped__()


def test_the_kernel_grants_tiles_only_where_there_are_some():
    assert features.request_tiles() is not tile_emulator.is_needed()
