"""Kernels are compiled once, before the first step, and kept in one known directory."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numba.core.runtime import _nrt_python
from support.kernels import HEADS, KERNELS, NAN, make_arguments

from hpcpipe.errors import DiskError
from hpcpipe.kernels import attention, gemm, jit, warm

SCRIPT = """
import sys
import numpy as np
from hpcpipe.kernels import jit, reduce
print(jit.CACHE_DIRECTORY)
if sys.argv[1] == "add":
    acc = np.full(5, 2.0, np.float32)
    reduce.add_into(acc, acc.copy())
    print(acc.sum(), sum(reduce.add_into.stats.cache_hits.values()))
"""


def start(action, **environment):
    for variable in ("NUMBA_CACHE_DIR", "HPCPIPE_CACHE_DIR", "XDG_CACHE_HOME"):
        environment.setdefault(variable, "")
    command = [sys.executable, "-c", SCRIPT, action]
    return subprocess.Popen(command, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True)


def finish(process):
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    return output.splitlines()


def run(action, **environment):
    return finish(start(action, **environment))


def test_training_adds_no_signature_to_what_compile_all_compiled():
    names = []
    warm.compile_all(lambda name, index, total: names.append((name, index, total)))
    assert [name for name, _, _ in names] == [function.__name__ for function, _ in warm.cases()]
    assert {name for name, _, _ in names} == set(KERNELS)
    assert [index for _, index, _ in names] == list(range(1, len(KERNELS) + 1))
    assert {total for _, _, total in names} == {len(KERNELS)}
    before = {name: list(kernel.signatures) for name, kernel in KERNELS.items()}
    for name, kernel in KERNELS.items():
        kernel(*map(as_views_of_one_buffer, make_arguments(name, np.float32)))
    assert {name: list(kernel.signatures) for name, kernel in KERNELS.items()} == before


def as_views_of_one_buffer(value):
    """Place an array as training does: a reshaped slice, at an odd offset, of one long buffer."""
    if not isinstance(value, np.ndarray):
        return value
    buffer = np.zeros(value.size + 3, value.dtype)
    view = buffer[3:].reshape(value.shape)
    view[...] = value
    return view


def test_compile_all_leaves_a_marker_that_names_files():
    warm.compile_all()
    assert warm.is_compiled()
    directory = jit.compiled_directory(gemm.matmul)
    assert directory.is_relative_to(jit.CACHE_DIRECTORY)
    victim = next(directory.glob("gemm.matmul_nt-*.nbc"))
    aside = victim.with_suffix(".aside")
    victim.rename(aside)
    try:
        assert not warm.is_compiled()
    finally:
        aside.rename(victim)
    assert warm.is_compiled()


def test_a_marker_that_is_no_list_counts_as_none(monkeypatch, tmp_path):
    marker = tmp_path / "complete.json"
    monkeypatch.setattr(warm, "_marker", lambda dtype: marker)
    assert not warm.is_compiled()
    for content in ('["gone', "3", "[3]", "{}", '{"gone": 0}', '{"complete.json": 1}'):
        marker.write_text(content)
        assert not warm.is_compiled()


DAMAGE = """
import sys
from hpcpipe.kernels import jit, reduce, warm
kept = {"add_into", "sum_of_squares"}
if sys.argv[1:] == ["helper"]:
    kept = {"gelu_forward"}
every = warm.cases
warm.cases = lambda precision: [case for case in every(precision) if case[0].__name__ in kept]
warm.compile_all()
print(jit.compiled_directory(reduce.add_into))
"""


def compile_two(cache, *arguments):
    environment = {**os.environ, "NUMBA_CACHE_DIR": "", "HPCPIPE_CACHE_DIR": str(cache)}
    command = [sys.executable, "-c", DAMAGE, *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    return Path(result.stdout.strip())


def damage(path, how):
    content = path.read_bytes()
    path.write_bytes({"empty": b"", "cut": content[: len(content) // 2], "garbage": b"\xa5" * len(content)}[how])


@pytest.mark.parametrize("how", ["empty", "cut", "garbage"])
def test_damaged_files_are_compiled_again(tmp_path, how):
    directory = compile_two(tmp_path)
    index, code = next(directory.glob("reduce.add_into-*.nbi")), next(directory.glob("reduce.sum_*.nbc"))
    whole = index.read_bytes(), code.stat().st_size
    damage(index, how)
    damage(code, how)
    compile_two(tmp_path)
    assert index.read_bytes() == whole[0]
    # Compiled code holds names that differ from one process to the next, by some bytes.
    assert abs(code.stat().st_size - whole[1]) < 1000


def test_code_that_changed_is_not_loaded(tmp_path):
    """Bytes inside the machine code are no error of reading: it would run, or LLVM would end the process."""
    directory = compile_two(tmp_path)
    code = next(directory.glob("reduce.add_into-*.nbc"))
    content = bytearray(code.read_bytes())
    start = content.index(b"\x7fELF")
    content[start + 64 : start + 576] = b"\xa5" * 512
    code.write_bytes(content)
    compile_two(tmp_path)
    assert b"\xa5" * 512 not in code.read_bytes()


def test_damaged_helpers_are_compiled_again(tmp_path):
    directory = compile_two(tmp_path, "helper")
    index = next(directory.glob("exponential._*.nbi"))
    damage(index, "cut")
    for path in directory.glob("activation.*"):
        path.unlink()
    compile_two(tmp_path, "helper")
    assert list(directory.glob("activation.gelu_forward-*.nbc"))


def test_damage_that_stays_is_reported_with_the_directory(monkeypatch, tmp_path):
    def fail():
        raise EOFError("Ran out of input")

    fail.__module__ = "hpcpipe.kernels.gemm"
    monkeypatch.setattr(warm, "cases", lambda dtype: [(fail, ())])
    monkeypatch.setattr(jit, "compiled_directory", lambda compiled: tmp_path)
    with pytest.raises(EOFError):
        warm.compile_all()
    (tmp_path / "gemm.fail-1.py311.nbi").touch()
    (tmp_path / "gemm.failure-1.py311.nbi").touch()
    with pytest.raises(
        DiskError, match=r"kernels-.*damaged \(fail: EOFError: Ran out of input\): remove this directory"
    ):
        warm.compile_all()
    assert [path.name for path in tmp_path.iterdir()] == ["gemm.failure-1.py311.nbi"]


def test_a_full_disk_is_reported_with_its_cure(monkeypatch):
    def fail():
        raise OSError(28, "No space left on device")

    fail.__name__ = "matmul"
    monkeypatch.setattr(warm, "cases", lambda dtype: [(fail, ())])
    with pytest.raises(DiskError, match=r"kernels-.*No space left.*HPCPIPE_CACHE_DIR"):
        warm.compile_all()


def test_compiler_may_reorder_sums_and_nothing_else():
    for name, kernel in KERNELS.items():
        assert set(kernel.targetoptions["fastmath"] or ()) <= {"reassoc", "nsz"}, name
    for name in ("adamw_update", "add_into", "bias_gradient", "gelu_forward", "gelu_backward"):
        assert not KERNELS[name].targetoptions["fastmath"], name


def test_no_kernel_that_others_call_reorders_its_sums():
    """It would run in one order alone and in another inside its caller: compiled and loaded code then differ."""
    modules = [
        importlib.import_module(f"hpcpipe.kernels.{path.stem}") for path in Path(jit.__file__).parent.glob("*.py")
    ]
    helpers = [
        value
        for module in modules
        for name, value in vars(module).items()
        if name.startswith("_") and hasattr(value, "targetoptions")
    ]
    assert len(helpers) > 20
    bad = [value.__name__ for value in helpers if value.targetoptions["fastmath"]]
    assert bad == []


def test_describe_names_processor_and_blas():
    line = warm.describe()
    assert "\n" not in line
    assert jit.cpu_name() in line
    assert "blas" in line.lower()


def test_processes_that_compile_at_once_leave_what_the_next_one_loads(tmp_path):
    together = [start("add", HPCPIPE_CACHE_DIR=str(tmp_path)) for _ in range(3)]
    lines = [finish(process) for process in together]
    assert all(result.startswith("20.0 ") for _, result in lines)
    directory, result = run("add", HPCPIPE_CACHE_DIR=str(tmp_path))
    assert Path(directory).is_relative_to(tmp_path / "hpcpipe")
    assert result == "20.0 1"


def test_directory_follows_the_environment(tmp_path):
    name = jit.CACHE_DIRECTORY.name
    home, cache = tmp_path / "home", tmp_path / "cache"
    assert run("show", HOME=str(home)) == [str(home / ".cache" / "hpcpipe" / name)]
    assert run("show", HOME=str(home), XDG_CACHE_HOME=str(cache)) == [str(cache / "hpcpipe" / name)]
    mine = {"XDG_CACHE_HOME": str(cache), "HPCPIPE_CACHE_DIR": str(tmp_path / "mine")}
    assert run("show", **mine) == [str(tmp_path / "mine" / "hpcpipe" / name)]
    assert run("show", **mine, NUMBA_CACHE_DIR=str(tmp_path / "n")) == [str(tmp_path / "n" / "hpcpipe" / name)]


def test_directory_that_cannot_be_written_gives_way_to_a_private_one(tmp_path):
    (tmp_path / "file").touch()
    environment = {"HPCPIPE_CACHE_DIR": str(tmp_path / "file"), "TMPDIR": str(tmp_path)}
    private = tmp_path / f"hpcpipe-{os.getuid()}"
    (directory,) = run("show", **environment)
    assert Path(directory) == private / jit.CACHE_DIRECTORY.name
    assert private.stat().st_mode & 0o077 == 0
    private.chmod(0o777)
    (directory,) = run("show", **environment)
    assert not Path(directory).is_relative_to(private)
    assert Path(directory).parent.stat().st_mode & 0o077 == 0


def test_kernels_allocate_nothing():
    """Numba takes one small record per array argument; a hidden copy of an operand would be one more."""
    _nrt_python.memsys_enable_stats()
    try:
        for name, kernel in KERNELS.items():
            arguments = make_arguments(name, np.float32)
            kernel(*arguments)
            before = _nrt_python.memsys_get_stats_alloc()
            kernel(*arguments)
            records = _nrt_python.memsys_get_stats_alloc() - before
            assert records == sum(isinstance(value, np.ndarray) for value in arguments), name
    finally:
        _nrt_python.memsys_disable_stats()


def test_scratch_of_attention_is_enough_and_no_more_is_touched():
    context, width = 131, 51
    for name in ("attention_forward", "attention_backward"):
        arguments = list(make_arguments(name, np.float32, context, width))
        needed = attention.attention_scratch(context, width, HEADS)
        guarded = np.full(needed + 64, NAN, np.float32)
        guarded[needed:] = 7
        arguments[-1] = guarded[:needed]
        KERNELS[name](*arguments)
        assert (guarded[needed:] == 7).all()


RESULTS = """
import hashlib
import numpy as np
from hpcpipe.kernels import activation, adamw, attention, embedding, gemm, loss, norm, reduce, warm
from hpcpipe.kernels.digest import digest_blocks

warm.compile_all()
numbers = np.random.default_rng(0)
B, T, H, C, V = 3, 70, 4, 128, 97
R = B * T


def f(*shape):
    return numbers.standard_normal(shape).astype(np.float32)


def i(low, *shape):
    return numbers.integers(low, V, shape).astype(np.int32)


S = attention.attention_scratch(T, C, H)
calls = {
    "matmul": (gemm.matmul, f(R, C), f(C, V), f(R, V)),
    "matmul_nt": (gemm.matmul_nt, f(R, C), f(V, C), f(R, V)),
    "matmul_tn": (gemm.matmul_tn, f(R, C), f(R, V), f(C, V)),
    "matmul_bias": (gemm.matmul_bias, f(R, C), f(C, V), f(V), f(R, V)),
    "layernorm_forward": (norm.layernorm_forward, f(R, C), f(C), f(C), f(R, C), f(R), f(R)),
    "layernorm_backward_input": (norm.layernorm_backward_input, f(R, C), f(R, C), f(C), f(R), f(R), f(R, C)),
    "layernorm_backward_weight": (norm.layernorm_backward_weight, f(R, C), f(R, C), f(R), f(R), f(C), f(C), f(2, C)),
    "gelu_forward": (activation.gelu_forward, f(R, C), f(R, C)),
    "gelu_backward": (activation.gelu_backward, f(R, C), f(R, C), f(R, C)),
    "attention_forward": (attention.attention_forward, f(R, 3 * C), B, H, f(R, C), f(B, H, T), f(S)),
    "attention_backward": (
        attention.attention_backward, f(R, C), f(R, 3 * C), f(R, C), f(B, H, T) + 6, B, H, f(R, 3 * C), f(S)
    ),
    "embedding_forward": (embedding.embedding_forward, i(0, B, T), f(V, C), f(T, C), f(R, C)),
    "embedding_backward_weight": (embedding.embedding_backward_weight, i(0, B, T), f(R, C), f(V, C), f(T, C)),
    "cross_entropy_forward": (loss.cross_entropy_forward, f(R, V), i(-1, R), abs(f(R)), f(R)),
    "cross_entropy_backward": (loss.cross_entropy_backward, f(R, V), i(0, R), f(R), f(R) + 5, f(R, V)),
    "add_into": (reduce.add_into, f(R), f(R)),
    "sum_of_squares": (reduce.sum_of_squares, f(R * C)),
    "block_sums_of_squares": (reduce.block_sums_of_squares, f(4 * reduce.BLOCK + 3), np.zeros(5)),
    "digest_blocks": (digest_blocks, f(R * C + 1).view(np.uint32), 0, 100),
    "bias_gradient": (reduce.bias_gradient, f(R, C), f(C), f(C)),
    "adamw_update": (
        adamw.adamw_update, f(R), f(R), f(R), abs(f(R)), 0.5, 1e-3, 0.9, 0.95, 1e-8, 0.1, 0.1, 0.05
    ),
}
for name, (function, *arguments) in calls.items():
    result = function(*arguments)
    digest = hashlib.sha256(repr(result).encode())
    for argument in arguments:
        if isinstance(argument, np.ndarray):
            digest.update(argument.tobytes())
    print(name, digest.hexdigest())
"""


def test_compiling_and_loading_give_the_same_bits(tmp_path):
    # The rank that compiles runs code from memory, the others what it wrote to the cache.
    environ = {**os.environ, "HPCPIPE_CACHE_DIR": str(tmp_path), "OPENBLAS_NUM_THREADS": "1"}
    environ.pop("NUMBA_CACHE_DIR", None)
    compiled, loaded = (
        subprocess.run([sys.executable, "-c", RESULTS], env=environ, capture_output=True, text=True, check=True)
        .stdout.splitlines()
        for _ in range(2)
    )  # fmt: skip
    assert {line.split()[0] for line in compiled} == set(KERNELS)
    assert compiled == loaded
