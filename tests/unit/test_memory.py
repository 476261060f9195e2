"""Memory: blocks from the kernel, offsets from lifetimes, layouts in two parts."""

import gc
import itertools
import mmap

import numpy as np
import pytest

from hpcpipe.memory import block
from hpcpipe.memory.block import ALIGNMENT, allocated_bytes, huge_pages, new_block
from hpcpipe.memory.layout import Extent, Layout, largest, new_arrays, new_memory
from hpcpipe.memory.place import most_at_once, place
from hpcpipe.model.tensors import BufferSpec, bf16, f32, raw


def meet(one, other):
    return one[0] <= other[1] and other[0] <= one[1]


def random_buffers(generator, num_sizes):
    count = int(generator.integers(1, 40))
    sizes = generator.choice(generator.integers(0, 900, num_sizes), count).tolist()
    lives = [tuple(sorted(pair)) for pair in generator.integers(0, 30, (count, 2)).tolist()]
    return sizes, lives


def test_buffers_in_use_at_the_same_time_do_not_overlap():
    generator = np.random.default_rng(1)
    for _ in range(300):
        sizes, lives = random_buffers(generator, 6)
        offsets, total = place(sizes, lives)
        assert all(offset % ALIGNMENT == 0 for offset in offsets)
        assert all(offset + size <= total for offset, size in zip(offsets, sizes, strict=True))
        for a, b in itertools.combinations(range(len(sizes)), 2):
            if meet(lives[a], lives[b]):
                apart = offsets[a] + sizes[a] <= offsets[b] or offsets[b] + sizes[b] <= offsets[a]
                assert apart or 0 in (sizes[a], sizes[b])
        assert most_at_once(sizes, lives) <= total


def test_buffers_of_one_size_need_what_is_in_use_at_once():
    generator = np.random.default_rng(2)
    for _ in range(200):
        sizes, lives = random_buffers(generator, 1)
        most = max(sum(meet(life, (moment, moment)) for life in lives) for moment in range(31))
        size = -(-sizes[0] // ALIGNMENT) * ALIGNMENT
        assert place(sizes, lives)[1] == most_at_once(sizes, lives) == most * size


def test_small_buffers_go_into_gaps():
    offsets, total = place([100, 640, 64, 64], [(0, 9), (0, 3), (4, 9), (5, 6)])
    assert offsets == [640, 0, 0, 64] and total == 640 + 128


def test_nothing_needs_no_memory():
    assert place([], []) == ([], 0)
    assert place([0, 0], [(0, 1), (0, 1)]) == ([0, 0], 0)
    assert most_at_once([], []) == 0


def test_blocks_are_zeroed_aligned_and_counted():
    gc.collect()
    before = allocated_bytes()
    small, large = new_block(1000, "test"), new_block((5 << 20) + 3, "test")
    assert small.nbytes == 1000 and large.nbytes == (5 << 20) + 3
    assert small.ctypes.data % ALIGNMENT == 0 and large.ctypes.data % (2 << 20) == 0
    assert not small.any() and not large.any()
    small[:], large[:] = 1, 2
    assert new_block(0, "test").size == 0
    assert allocated_bytes()["test"] - before.get("test", 0) == 1000 + (5 << 20) + 3
    view = large[10:].view(np.uint8)
    del large
    gc.collect()
    assert allocated_bytes()["test"] - before.get("test", 0) == 1000 + (5 << 20) + 3 and view[0] == 2
    del small, view
    gc.collect()
    assert allocated_bytes() == before


@pytest.mark.parametrize("has_advice", [True, False])
def test_a_kernel_without_huge_pages_gives_memory_too(monkeypatch, has_advice):
    class Refusing(block.Block):
        def madvise(self, *_):
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(block, "Block", Refusing)
    if not has_advice:
        monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    large = new_block(3 << 20, "test")
    large[-1] = 7
    assert large[-1] == 7 and not large[:-1].any()


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("[always] madvise never\n", "transparent huge pages on (always)"),
        ("always [madvise] never\n", "transparent huge pages on (madvise)"),
        ("always madvise [never]\n", "no transparent huge pages: "),
        (None, "no transparent huge pages: this kernel has none"),
    ],
)
def test_the_setting_of_huge_pages_is_said(tmp_path, setting, said):
    file = tmp_path / "sys/kernel/mm/transparent_hugepage/enabled"
    if setting is not None:
        file.parent.mkdir(parents=True)
        file.write_text(setting)
    assert huge_pages(tmp_path).startswith(said)


def test_a_spec_says_what_may_be_read_after_a_buffer():
    assert f32(3, 5).num_bytes == 60 and f32(3, 5).slack_bytes == 0
    assert raw(7).num_bytes == 7 and raw(7).dtype == np.uint8
    for rows, columns in ((1, 1), (31, 7), (32, 7), (33, 8)):
        spec = bf16(rows, columns)
        assert spec.num_bytes == 2 * rows * columns
        assert spec.num_bytes + spec.slack_bytes == 2 * -(-rows // 32) * 32 * columns + 64


def test_a_layout_gives_every_buffer_its_own_bytes():
    specs = {"a": f32(3, 5), "b": bf16(33, 3), "c": raw(70), "d": BufferSpec((4,), np.dtype(np.float64)), "e": f32(0)}
    layout = Layout(specs)
    assert layout.extent == Extent(64 + 128 + 64, -(-(64 * 3 * 2 + 64) // 64) * 64)
    memory = new_memory(layout.extent, "test")
    assert memory.holds(layout.extent) and not memory.holds(Extent(0, layout.extent.padded + 1))
    arrays = layout.cut(memory)
    for number, (name, array) in enumerate(arrays.items(), 1):
        assert array.shape == specs[name].shape and array.dtype == specs[name].dtype
        assert array.ctypes.data % ALIGNMENT == 0 and array.flags.c_contiguous
        array.fill(number)
    assert [array.flat[0] for array in arrays.values() if array.size] == [1, 2, 3, 4]
    assert all((array == array.flat[0]).all() for array in arrays.values() if array.size)


def test_steps_that_do_not_meet_share_memory():
    specs = {"a": f32(160).used_in(0, 1), "b": f32(160).used_in(2), "c": f32(16)}
    assert Layout(specs).extent.plain == 2 * 640 + 64
    shared = Layout(specs, shares_between_steps=True)
    assert shared.extent.plain == 640 + 64
    arrays = shared.cut(new_memory(shared.extent, "test"))
    assert arrays["a"].ctypes.data == arrays["b"].ctypes.data != arrays["c"].ctypes.data


def test_what_is_read_after_a_padded_buffer_is_never_of_another_type():
    """Buffers with slack share memory with each other only, so finite bfloat16 numbers are all that is read."""
    specs = {"a": bf16(5, 3).used_in(0), "b": f32(4000).used_in(1), "c": bf16(40, 3).used_in(1)}
    layout = Layout(specs, shares_between_steps=True)
    memory = new_memory(layout.extent, "test")
    arrays = layout.cut(memory)
    arrays["b"].fill(np.nan)
    arrays["c"].fill(0x3F80)
    start = arrays["a"].ctypes.data - memory.padded.ctypes.data
    readable = memory.padded[start : start + 32 * 3 * 2 + 64].view(np.uint16)
    assert set(readable.tolist()) <= {0, 0x3F80}


def test_extents_add_up():
    assert Extent(1, 2).after(Extent(3, 4)) == (4, 6)
    assert largest([Extent(1, 5), Extent(3, 4)]) == (3, 5) and largest([]) == (0, 0)
    arrays = new_arrays({"a": f32(2), "b": f32(3)}, "test")
    assert [array.tolist() for array in arrays.values()] == [[0, 0], [0, 0, 0]]
