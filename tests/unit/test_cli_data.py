"""The three commands on token files, as a shell would call them."""

import json
import subprocess
import sys

import pytest

from hpcpipe.cli import data
from hpcpipe.cli.parser import Parser
from hpcpipe.errors import DamagedError, UsageError


def run(*words):
    """Parse and carry out ``hpcpipe data WORDS``."""
    parser = Parser(prog="hpcpipe")
    data.add_parser(parser.add_subparsers())
    args = parser.parse_args(["data", *map(str, words)])
    return int(args.run(args))


@pytest.fixture
def prepared(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("first text")
    (tmp_path / "evil\x1b[31m\n.txt").write_text("second")
    assert run("prepare", tmp_path / "a.txt", tmp_path, "-o", tmp_path / "out.h5") == 0
    said = capsys.readouterr().out
    assert "read 3 documents" in said
    assert "dropped 1 duplicate\n" in said
    return tmp_path / "out.h5"


def test_show(prepared, capsys):
    assert run("show", prepared, "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["format"], shown["version"], shown["tokenizer"], shown["vocab"]) == (
        "hpcpipe-tokens",
        1,
        "bytes",
        257,
    )
    assert (shown["num_documents"], shown["num_tokens"], shown["text_bytes"]) == (2, 18, 16)
    assert shown["document_bytes"] == {"smallest": 6, "median": 8, "largest": 10}
    assert shown["file_bytes"] == prepared.stat().st_size
    assert {document["bytes"] for document in shown["documents"]} == {6, 10}
    assert run("show", prepared) == 0
    text = capsys.readouterr().out
    assert "evil\\x1b[31m\\n.txt" in text
    assert "\x1b" not in text
    assert shown["digest"] in text


def test_verify(prepared, capsys):
    assert run("verify", prepared) == 0
    assert capsys.readouterr().out == f"{prepared}: ok\n"
    assert run("verify", prepared, "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"ok": True, "problems": []}
    prepared.write_bytes(prepared.read_bytes()[:-1])
    assert run("verify", prepared) == 65
    assert "truncated" in capsys.readouterr().out
    assert run("verify", prepared, "--json") == 65
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is False
    assert "truncated" in found["problems"][0]
    with pytest.raises(DamagedError, match="truncated"):
        run("show", prepared)


def test_prepare_overwrites_only_token_files_and_only_when_told(prepared, tmp_path):
    before = prepared.read_bytes()
    with pytest.raises(UsageError, match=r"out\.h5 exists; .*--force"):
        run("prepare", tmp_path / "a.txt", "-o", prepared)
    assert prepared.read_bytes() == before
    assert run("prepare", tmp_path / "a.txt", "-o", prepared, "--force") == 0
    assert prepared.read_bytes() != before
    prepared.write_bytes(b"")
    assert run("prepare", tmp_path / "a.txt", "-o", prepared, "--force") == 0
    with pytest.raises(UsageError, match=r"a\.txt is not an HDF5 file"):
        run("prepare", tmp_path / "a.txt", "-o", tmp_path / "a.txt", "--force")
    assert (tmp_path / "a.txt").read_text() == "first text"


def test_usage_is_checked():
    with pytest.raises(UsageError, match="-o"):
        run("prepare", "stdlib")
    with pytest.raises(UsageError, match="SOURCE"):
        run("prepare", "-o", "x.h5")


def test_the_verb_is_cheap_to_import():
    script = (
        "import sys, hpcpipe.cli.data; print([name for name in ('numpy', 'h5py', 'mpi4py') if name in sys.modules])"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert ended.stdout == "[]\n"
