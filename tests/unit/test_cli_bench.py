"""The command ``hpcpipe bench``."""

import json
from pathlib import Path

import pytest

from hpcpipe.bench.gemm import GPT2
from hpcpipe.cli.main import main
from hpcpipe.config.load import load
from hpcpipe.errors import ExitCode
from hpcpipe.kernels.features import family
from hpcpipe.schedule.build import build

SHORT = ("--repetitions", "2", "--microbatches", "4")


@pytest.fixture
def call(capsys, monkeypatch):
    for variable in ("OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(variable, raising=False)

    def run(*words):
        code = main(["bench", *words])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def test_json_has_the_keys_that_people_script_against(call):
    code, out, _ = call("actions", *SHORT, "--ranks", "3", "--schedule", "zb-h1", "--schedule", "gpipe", "--json")
    found = json.loads(out)
    assert code == ExitCode.DONE
    rows = found.pop("schedules")
    assert found == {"benchmark": "actions", "transport": "none", "ranks": 3, "microbatches": 4, "repetitions": 2}
    assert [row["schedule"] for row in rows] == ["zb-h1", "gpipe"]
    for row in rows:
        schedule = build(row["schedule"], 3, 4)
        assert row["stages"] == 3
        assert row["actions"] == sum(map(len, schedule.actions))
        assert 0 < row["p10_us"] <= row["action_us"] <= row["p90_us"] < 10_000
        kinds = {action.kind for actions in schedule.actions for action in actions}
        assert set(row["kinds"]) == {*kinds, "poll"}
        assert min(row["kinds"].values()) > 0


def test_the_table_has_a_row_per_schedule_and_all_columns_in_a_narrow_terminal(call, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    code, out, _ = call("actions", *SHORT)
    assert code == ExitCode.DONE
    head, columns, *rows = out.splitlines()
    assert "4 ranks, 4 microbatches, without messages" in head
    assert columns.split()[:4] == ["schedule", "actions", "us", "10-90"]
    assert {"F", "B", "I", "W", "SEND_F", "RECV_B", "REDUCE", "STEP", "poll"} <= set(columns.split())
    assert [row.split()[0] for row in rows] == ["1f1b", "zb-h1", "interleaved", "zb-v"]


TINY = """
[model]
layers = 2
width = 36
heads = 3
context = 40
[parallel]
pipeline = 2
microbatch_size = 2
"""
ROW_KEYS = (
    "group name use end shape flops bytes median_s p10_s p90_s flops_per_s of_peak bytes_per_s of_copy one_thread_s"
    " speedup"
)


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Return a configuration of a tiny model, timed on little memory."""
    monkeypatch.setattr("hpcpipe.bench.gemm._COLD_BYTES", 1 << 20)
    monkeypatch.setattr("hpcpipe.bench.gemm.copy_bytes_per_s", lambda team: 1e9)
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    return str(path)


@pytest.mark.parametrize(("precision", "unit"), [("f32", "blas"), ("bf16", family())])
def test_gemm_times_all_uses_of_all_matrices(call, tiny, precision, unit):
    code, out, _ = call("gemm", tiny, "--precision", precision, "--repetitions", "3", "--json")
    found = json.loads(out)
    assert code == ExitCode.DONE
    assert (found["benchmark"], found["precision"], found["unit"]) == ("gemm", precision, unit)
    # A byte tokenizer stands for the file that nobody has prepared.
    assert (found["rows"], found["model"]["vocab"], found["repetitions"], found["threads"]) == (80, 257, 3, 1)
    assert found["peak_flops"] > 1e8 and found["copy_bytes_per_s"] == 1e9
    kernels = found["kernels"]
    products = {(row["name"], row["use"]): row for row in kernels if row["group"] == "products"}
    assert set(products) == {
        (name, use)
        for name in ("qkv", "output", "up", "down", "head")
        for use in ("forward", "input gradient", "weight gradient")
    }
    sizes = {"qkv": (36, 108), "output": (36, 36), "up": (36, 144), "down": (144, 36), "head": (36, 257)}
    for (name, _), row in products.items():
        assert row["flops"] == 2 * 80 * sizes[name][0] * sizes[name][1]
        assert sorted(row["shape"]) == sorted((80, *sizes[name]))
        assert row["of_peak"] == row["flops_per_s"] / found["peak_flops"] > 0
    for row in kernels:
        assert set(row) == set(ROW_KEYS.split())
        assert 0 < row["p10_s"] <= row["median_s"] <= row["p90_s"]
        assert row["bytes"] > 0 and row["of_copy"] == pytest.approx(row["bytes"] / row["median_s"] / 1e9)
        assert (row["flops_per_s"] is None) == (row["group"] == "memory")
        assert row["one_thread_s"] is row["speedup"] is None
    attention = [row["flops"] for row in kernels if row["group"] == "attention"]
    assert attention == [count * 2 * 36 * 2 * 40 * 41 / 2 for count in (2, 5)]
    memory = {row["name"] for row in kernels if row["group"] == "memory"}
    assert {"LayerNorm", "bias", "cross-entropy", "embedding"} < memory


def test_gemm_on_threads_tells_the_speed_up_and_keeps_all_columns_in_a_narrow_terminal(call, tiny, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    words = ("gemm", tiny, "--precision", "bf16", "--threads", "2", "--repetitions", "2", "--rows", "20")
    code, out, _ = call(*words)
    assert code == ExitCode.DONE
    assert "on 2 threads, 20 rows, median of 2 calls" in out
    headings = [line for line in out.splitlines() if line.startswith(("product ", "bound by memory"))]
    assert len(headings) == 2 and all("speed-up" in line and "GB/s" in line for line in headings)
    assert any(line.startswith("qkv  ") and "20 x 36 x 108" in line for line in out.splitlines())
    assert "head" in out and "weight gradient + added" in out


def test_gemm_without_a_configuration_measures_the_shape_of_the_one_for_gpt2():
    shipped = load(Path(__file__).parents[2] / "configs/gpt2-124m.toml")
    assert shipped.model == GPT2.model
    assert shipped.parallel.microbatch_size == GPT2.parallel.microbatch_size


def test_gemm_measures_one_process(call, monkeypatch):
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    code, out, err = call("gemm")
    assert (code, out) == (ExitCode.USAGE, "") and "2 ranks were started: run it by itself" in err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("action",), "did you mean actions?"),
        (("gemm", "nowhere.toml"), "nowhere.toml: no such configuration file"),
        (("gemm", "--threads", "0"), "--threads 0: at least 1 is needed"),
        (("gemm", "--threads", "2", "--precision", "f32"), "float32 computes on one thread"),
        (("gemm", "--repetitions", "0"), "--repetitions 0: at least 1 is needed"),
        (("gemm", "--rows", "0"), "give 1 to 512, or a multiple of 512"),
        (("gemm", "--rows", "700"), "--rows 700: whole samples of model.context = 512"),
        (("gemm", "--precision", "bf8"), "--precision 'bf8': choose from 'bf16', 'f32'"),
        (("step",), "required: CONFIG"),
        (("step", "nowhere.toml", "--steps", "0"), "--steps 0: at least 1 is needed"),
        (("p2p",), "p2p needs at least 2 ranks: run `hpcpipe launch -n 2 bench p2p`"),
        (("p2p", "--sizes", "1KiB,2KB"), "'2KB' is no number of bytes, such as 1024, 16KiB or 4MiB"),
        (("p2p", "--set", "model.width=8"), "there is no CONFIG whose key it could override"),
        (("actions", "--schedule", "1f2b"), "there is no schedule '1f2b'"),
        (("actions", "--schedule", "dualpipe-v", "--microbatches", "4"), "set parallel.microbatches = 8"),
        (("actions", "--ranks", "0"), "at least 1 rank"),
        (("actions", "--repetitions", "0"), "--repetitions 0: at least 1 is needed"),
    ],
)
def test_mistakes_are_told(call, words, told):
    code, out, err = call(*words)
    assert code == ExitCode.USAGE
    assert out == "" and told in err
