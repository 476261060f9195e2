"""From sources to token files: what is taken, in which order, and what is refused."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hpcpipe.data import write
from hpcpipe.data.format import document_hash
from hpcpipe.data.prepare import default_path, ensure_prepared, prepare
from hpcpipe.data.reader import TokenFile, document_names
from hpcpipe.data.sources import source_documents, source_files
from hpcpipe.data.verify import verify
from hpcpipe.errors import DamagedError, DiskError, UsageError


def texts_of(path):
    """The documents of a token file, in its order."""
    with TokenFile(path) as file:
        tokens = file.read(0, file.num_tokens)
        pieces = np.split(tokens, file.document_offsets[1:-1].astype(np.int64))
        assert all(piece[0] == 256 for piece in pieces)
        return [piece[1:].astype(np.uint8).tobytes() for piece in pieces]


def names_in(folder):
    """Everything in a folder, hidden files too."""
    return sorted(entry.name for entry in folder.iterdir())


def make_folder(tmp_path):
    """A folder with text, and with much that is none."""
    folder = tmp_path / "corpus"
    for name, content in {
        "b.txt": b"second",
        "a.txt": "först".encode(),
        "deep/er/c.md": b"third",
        "deep/copy.txt": b"second",
        "empty.txt": b"",
        "binary.dat": b"text\0and zero",
        "latin1.txt": b"caf\xe9",
        ".hidden": b"hidden",
        ".git/config": b"hidden too",
        "lines.jsonl": b'{"text": "fourth", "id": 1}\n\n{"text": "second"}\n',
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / "loop").symlink_to(folder)
    (folder / "dangling").symlink_to(folder / "nothing")
    os.mkfifo(folder / "pipe")
    return folder


def test_a_folder_round_trips(tmp_path):
    folder, path, said = make_folder(tmp_path), tmp_path / "tokens.h5", []
    prepare([str(folder)], path, said.append)
    texts = texts_of(path)
    assert sorted(texts) == sorted([b"second", "först".encode(), b"third", b"fourth"])
    assert texts == sorted(texts, key=document_hash)
    assert sorted(document_names(path, 100)) == [
        "corpus/a.txt",
        "corpus/b.txt",
        "corpus/deep/er/c.md",
        "corpus/lines.jsonl:1",
    ]
    with TokenFile(path) as file:
        assert (file.num_documents, file.num_tokens, file.text_bytes) == (4, 27, 23)
        assert (file.vocab, file.separator, file.tokenizer) == (257, 256, "bytes")
        assert file.document_hash.tolist() == [document_hash(text) for text in texts]
    assert verify(path) == []
    assert "dropped 2 duplicates" in said[0]
    assert names_in(tmp_path) == ["corpus", "tokens.h5"]


def test_the_same_text_gives_the_same_file_and_digest(tmp_path):
    folder = make_folder(tmp_path)
    prepare([str(folder)], tmp_path / "one.h5")
    prepare([str(folder)], tmp_path / "two.h5")
    assert (tmp_path / "one.h5").read_bytes() == (tmp_path / "two.h5").read_bytes()
    prepare([str(folder / name) for name in ("lines.jsonl", "deep/er", "b.txt", "a.txt")], tmp_path / "other.h5")
    (folder / "a.txt").write_bytes(b"changed")
    prepare([str(folder)], tmp_path / "changed.h5")
    one, other, changed = (TokenFile(tmp_path / f"{name}.h5").digest for name in ("one", "other", "changed"))
    assert one == other
    assert one != changed
    assert len(one) == 64


def test_a_single_document_is_remarked_on(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").write_text("b")
    one, two = [], []
    prepare([str(tmp_path / "a.txt")], tmp_path / "one.h5", one.append)
    prepare([str(tmp_path / "a.txt"), str(tmp_path / "b.txt")], tmp_path / "two.h5", two.append)
    assert any("single document" in line for line in one)
    assert not any("single document" in line for line in two)


def test_documents_longer_than_a_block_round_trip(tmp_path):
    rng = np.random.default_rng(3)
    long = [rng.integers(32, 127, size, dtype=np.uint8).tobytes() for size in (524287, 524288, 1_500_001)]
    for number, text in enumerate([*long, b"x"]):
        (tmp_path / f"{number}.txt").write_bytes(text)
    path = tmp_path / "tokens.h5"
    prepare([str(tmp_path)], path)
    assert sorted(texts_of(path)) == sorted([*long, b"x"])
    assert TokenFile(path).num_blocks == 5
    assert verify(path) == []


@pytest.mark.parametrize(
    "name",
    [b"new\nline.txt", b"-o.txt", b"\xff\xfe.txt", "ünï 🎉.txt".encode(), b"%s {0}.txt", b"x" * 251 + b".txt"],
    ids=["newline", "dash", "not-utf8", "emoji", "format", "longest"],
)
def test_odd_file_names(tmp_path, name):
    folder = tmp_path / "in"
    folder.mkdir()
    text = folder / os.fsdecode(name)
    text.write_bytes(b"hello")
    path = tmp_path / os.fsdecode(name)
    prepare([str(text)], path)
    assert document_names(path, 1) == [os.fsdecode(name)]
    assert TokenFile(path).source == str(text)
    prepare([str(folder)], path)
    assert document_names(path, 1) == [f"in/{os.fsdecode(name)}"]
    assert verify(path) == []
    assert default_path(str(text), tmp_path).name.isascii()


def test_the_standard_library_is_its_sources_without_tests():
    names = [document.name for document in source_documents("stdlib")]
    assert "stdlib/json/decoder.py" in names
    assert names == sorted(names, key=os.fsencode)
    folders = {part for name in names for part in name.split("/")[:-1]}
    assert folders.isdisjoint({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"})
    assert all(name.endswith(".py") for name in names)
    assert not any("_sysconfigdata" in name for name in names)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"text": "cut', "not JSON"),
        (b'{"txt": "misspelt"}', 'a string under "text"'),
        (b'{"text": 5}', 'a string under "text"'),
        (b'["text"]', 'a string under "text"'),
        (b'{"text": "\xff"}', "not JSON"),
        (rb'{"text": "\ud800"}', "surrogate"),
        (b"[" * 100_000, "not JSON"),
    ],
)
def test_malformed_json_lines_are_named(tmp_path, line, said):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "fine"}\n\n' + line + b'\n{"text": "fine too"}\n')
    with pytest.raises(DamagedError, match=r"x\.jsonl:3: ") as caught:
        prepare([str(path)], tmp_path / "out.h5")
    assert said in str(caught.value)
    assert names_in(tmp_path) == ["x.jsonl"]


def test_json_lines_keep_unicode_and_line_ends_within_text(tmp_path):
    texts = ["a\u2028b\x85c", "line\nline\r\n", "🎉\0"]
    (tmp_path / "x.jsonl").write_text(
        "".join(json.dumps({"text": text}, ensure_ascii=False) + "\r\n" for text in texts)
    )
    assert [document.text.decode() for document in source_documents(str(tmp_path / "x.jsonl"))] == texts


@pytest.mark.parametrize(("raw", "said"), [(b"caf\xe9", "byte 3 \\(0xe9\\)"), (b"ab\0", "byte 2 is zero")])
def test_a_named_file_must_be_text(tmp_path, raw, said):
    (tmp_path / "x.txt").write_bytes(raw)
    with pytest.raises(DamagedError, match=said):
        prepare([str(tmp_path / "x.txt")], tmp_path / "out.h5")


def test_sources_that_cannot_be_read(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe")
    out = tmp_path / "out.h5"
    with pytest.raises(UsageError, match="'nowhere': no such file"):
        prepare([str(tmp_path / "a.txt"), "nowhere"], out)
    with pytest.raises(UsageError, match="no such file"):
        prepare([str(tmp_path / "a.txt" / "below")], out)
    with pytest.raises(UsageError, match="neither a file nor a folder"):
        prepare([str(tmp_path / "pipe")], out)
    with pytest.raises(UsageError, match="cannot be read"):
        prepare(["a\0b"], out)
    with pytest.raises(UsageError, match=r"no text found in .*empty"):
        prepare([str(tmp_path / "empty")], out)
    with pytest.raises(UsageError, match="no text found"):
        prepare([], out)
    with pytest.raises(UsageError, match=r"folder .*missing does not exist"):
        prepare([str(tmp_path / "a.txt")], tmp_path / "missing" / "out.h5")
    with pytest.raises(UsageError, match="is a folder"):
        prepare([str(tmp_path / "a.txt")], tmp_path / "empty")
    assert names_in(tmp_path) == ["a.txt", "empty", "pipe"]


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("a")
    out = tmp_path / "out.h5"
    out.write_bytes(b"the one before")

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(write.os, "fsync", full)
    with pytest.raises(DiskError, match=r"out\.h5: cannot be written: No space left on device"):
        prepare([str(tmp_path / "a.txt")], out)
    with pytest.raises(DiskError, match="No space left"):
        ensure_prepared(str(tmp_path / "a.txt"), tmp_path / "other.h5")
    assert names_in(tmp_path) == ["a.txt", "out.h5"]
    assert out.read_bytes() == b"the one before"


def test_a_refused_write_leaves_nothing_behind(tmp_path):
    (tmp_path / "a.txt").write_text("a" * 100_000)
    script = f"""
import resource, sys
from pathlib import Path
from hpcpipe.data.prepare import prepare
from hpcpipe.errors import DiskError
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    prepare([{str(tmp_path / "a.txt")!r}], Path({str(tmp_path / "out.h5")!r}))
except DiskError as error:
    print(error)
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert "File too large" in ended.stdout, ended.stderr
    assert names_in(tmp_path) == ["a.txt"]


def test_processes_that_start_together_prepare_once(tmp_path):
    out = tmp_path / "_tokens" / "out.h5"
    corpus = make_folder(tmp_path)
    script = f"""
import sys
from pathlib import Path
from hpcpipe.data.prepare import ensure_prepared
from hpcpipe.data.reader import TokenFile
sys.stdin.readline()
made = ensure_prepared({str(corpus)!r}, Path({str(out)!r}))
print(made, TokenFile(Path({str(out)!r})).digest)
"""
    processes = [
        subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    ended = [process.communicate(timeout=60)[0].split() for process in processes]
    assert sorted(made for made, _ in ended) == ["False", "False", "True"]
    assert len({digest for _, digest in ended}) == 1
    assert names_in(out.parent) == ["out.h5"]
    assert ensure_prepared(str(corpus), out) is False


def test_a_temporary_file_of_a_killed_preparation_is_in_nobodys_way(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    out = tmp_path / "out.h5"
    with write.exclusive(out) as temporary:
        pass
    temporary.write_bytes(b"x" * 100_000)
    assert ensure_prepared(str(tmp_path / "a.txt"), out) is True
    assert names_in(tmp_path) == ["a.txt", "out.h5"]
    assert verify(out) == []


def test_what_is_no_regular_file_is_not_replaced(tmp_path):
    (tmp_path / "a.txt").write_text("some text")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    for name in ("pipe", "link"):
        with pytest.raises(UsageError, match="not a regular file"):
            prepare([str(tmp_path / "a.txt")], tmp_path / name)
    assert (tmp_path / "pipe").is_fifo()


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "a.txt").write_text("some text")
    (tmp_path / "there").mkdir()
    link = tmp_path / "link.h5"
    link.symlink_to(tmp_path / "there/tokens.h5")
    for _ in range(2):
        prepare([str(tmp_path / "a.txt")], link)
        assert link.is_symlink()
        with TokenFile(tmp_path / "there/tokens.h5") as file:
            assert file.num_documents == 1


def test_default_path_follows_the_text(tmp_path):
    text = tmp_path / "my text.txt"
    text.write_text("one")
    first = default_path(str(text), tmp_path)
    assert first.parent == tmp_path / "_tokens"
    assert first.name.startswith("my-text-")
    assert first == default_path(str(text), tmp_path)
    text.write_text("other")
    assert default_path(str(text), tmp_path) != first
    assert default_path(str(tmp_path), tmp_path).name.startswith(tmp_path.name[:10])
    assert default_path("stdlib", Path("runs")).name == f"stdlib-python{sys.version.split()[0]}.h5"
    with pytest.raises(UsageError, match="no such file"):
        default_path("nowhere", tmp_path)


def test_source_files_takes_links_to_files(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "link.txt").symlink_to(tmp_path / "a.txt")
    assert source_files(str(tmp_path / "folder")) == [tmp_path / "folder" / "link.txt"]
