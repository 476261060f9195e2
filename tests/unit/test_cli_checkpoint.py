"""The command ``hpcpipe checkpoint``."""

import argparse
import json
import subprocess
import sys

import pytest
from blake3 import blake3
from support.checkpoints import make_checkpoint, make_header, make_pieces, make_tensors
from support.version1 import write_version1

from hpcpipe.cli import checkpoint
from hpcpipe.errors import DamagedError, ExitCode, UsageError


@pytest.fixture
def call(capsys):
    parser = argparse.ArgumentParser()
    checkpoint.add_parser(parser.add_subparsers())

    def run(*words):
        args = parser.parse_args(["checkpoint", *map(str, words)])
        code = args.run(args)
        return code, capsys.readouterr().out

    return run


@pytest.fixture
def run_dir(tmp_path):
    for step in (100, 200):
        make_checkpoint(tmp_path / "checkpoints", step, 2)
    return tmp_path


def damage(run_dir, step):
    file = run_dir / "checkpoints" / f"step-{step:08d}" / "rank-0001.h5"
    altered = bytearray(file.read_bytes())
    altered[len(altered) // 2] ^= 1
    file.write_bytes(altered)
    return file


def test_show_takes_the_newest_of_a_run(call, run_dir):
    code, text = call("show", run_dir)
    assert code == ExitCode.DONE
    assert "step       200" in text
    assert "tokens     819,200" in text
    assert "kind gpt2, layers 4, width 128" in text
    assert "data 1, pipeline 2" in text
    assert "rank-0001.h5" in text
    assert "7 with 257 parameters" in text
    assert "qkv" not in text
    assert (
        "layers/003/attention/qkv/weight  7 x 23  float32  moment1, moment2, weight  1,932 bytes\n"
        in call("show", "--tensors", run_dir / "checkpoints" / "step-00000100")[1]
    )


def test_show_prints_one_json_object(call, run_dir):
    shown = json.loads(call("show", run_dir / "checkpoints", "--json", "--tensors")[1])
    assert (shown["step"], shown["tokens"], shown["num_tensors"], shown["num_parameters"]) == (200, 819200, 7, 257)
    assert shown["model"]["width"] == 128
    files = {file["name"]: file["bytes"] for file in shown["files"]}
    assert files == {path.name: path.stat().st_size for path in (run_dir / "checkpoints/step-00000200").glob("*.h5")}
    assert shown["bytes"] == sum(files.values())
    (scale,) = (tensor for tensor in shown["tensors"] if tensor["name"] == "head/scale")
    assert (scale["shape"], scale["dtype"], scale["bytes"]) == ([], "float64", 24)
    assert scale["kinds"] == ["moment1", "moment2", "weight"]
    assert (
        scale["pieces"]["weight"][0]["digest"] == blake3(make_tensors()["head/scale", "weight"].tobytes()).hexdigest()
    )


def test_show_says_the_hashes(call, run_dir):
    path = run_dir / "checkpoints" / "step-00000200"
    document = json.loads((path / "manifest.json").read_text())
    text = call("show", path)[1]
    assert f"format     version 2, blake3 {document['blake3']}\n" in text
    for file in document["files"]:
        assert f"{file['name']}  {file['bytes']:,} bytes  {file['blake3']}\n" in text
    view = path / "view.h5"
    assert f"view.h5  {view.stat().st_size:,} bytes  {blake3(view.read_bytes()).hexdigest()}\n" in text


def test_show_and_verify_read_version_1(call, tmp_path):
    write_version1(tmp_path / "checkpoints", make_header(7), make_pieces(2))
    text = call("show", tmp_path)[1]
    assert "format     version 1, blake2b " in text
    assert "view.h5" not in text
    assert call("verify", tmp_path) == (0, f"{tmp_path / 'checkpoints' / 'step-00000007'}: ok\n")


def test_verify_says_which_are_good(call, run_dir):
    code, text = call("verify", run_dir)
    assert code == ExitCode.DONE
    assert text.count(": ok\n") == 2
    file = damage(run_dir, 200)
    code, text = call("verify", run_dir)
    assert code == ExitCode.DAMAGED
    assert f"{file}: was altered" in text
    assert text.endswith(f"newest good: {run_dir / 'checkpoints' / 'step-00000100'}\n")
    code, text = call("verify", run_dir, "--json")
    report = json.loads(text)
    assert code == ExitCode.DAMAGED
    assert report["ok"] is False
    assert len(report["problems"]) == 1
    assert report["newest_good"].endswith("step-00000100")
    assert [item["ok"] for item in report["checkpoints"]] == [False, True]
    damage(run_dir, 100)
    assert json.loads(call("verify", run_dir, "--json")[1])["newest_good"] is None


def test_verify_of_one_checkpoint_looks_at_that_one(call, run_dir):
    damage(run_dir, 200)
    code, text = call("verify", run_dir / "checkpoints" / "step-00000100", "--json")
    assert code == ExitCode.DONE
    assert (json.loads(text)["ok"], json.loads(text)["problems"]) == (True, [])


def test_what_is_not_there_is_said(call, tmp_path):
    for action in ("show", "verify"):
        with pytest.raises(UsageError, match="no such directory"):
            call(action, tmp_path / "nowhere")
        with pytest.raises(DamagedError, match="holds no checkpoint"):
            call(action, tmp_path)


def test_importing_the_command_is_cheap():
    heavy = "{'numpy', 'h5py', 'numba', 'mpi4py', 'rich'} & set(sys.modules)"
    program = f"import sys, hpcpipe.cli.checkpoint; print({heavy})"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
