"""Whatever happens to a committed checkpoint's bytes is noticed, and named."""

import json
import random
import shutil

import numpy as np
import pytest
from support.checkpoints import make_checkpoint, make_header
from support.writing import begin, write_file

from hpcpipe.checkpoint.digests import digest_of
from hpcpipe.checkpoint.layout import Piece
from hpcpipe.checkpoint.manifest import assemble, load_manifest, render
from hpcpipe.checkpoint.read import Reader
from hpcpipe.checkpoint.verify import verify, verify_file
from hpcpipe.checkpoint.write import commit
from hpcpipe.errors import DamagedError

MANIFEST = "manifest.json"
FILES = ("rank-0000.h5", "rank-0001.h5", MANIFEST)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("checkpoints"), 100, 2)


@pytest.fixture
def path(sound, tmp_path):
    return shutil.copytree(sound[0], tmp_path / sound[0].name)


def tensor_bytes(manifest, name):
    """Tell for each byte of a file which tensor it belongs to."""
    owners = {}
    for label, tensor in manifest.tensors.items():
        for kind, pieces in tensor.kinds.items():
            for piece in pieces:
                if piece.file == name:
                    num_bytes = (piece.stop - piece.start) * tensor.item_bytes
                    owners.update(dict.fromkeys(range(piece.offset, piece.offset + num_bytes), f"{kind} of {label}"))
    return owners


def test_a_flipped_bit_is_noticed_wherever_it_is(path):
    manifest = load_manifest(path)
    draw = random.Random(5)
    where = {"tensor": 0, "around": 0, "manifest": 0}
    for number in range(210):
        file = path / FILES[number % 3]
        sound = file.read_bytes()
        altered = bytearray(sound)
        owners = {} if file.name == MANIFEST else tensor_bytes(manifest, file.name)
        # Every other flip hits a tensor: in files as small as these HDF5's own structures are the greater part.
        position = draw.choice(sorted(owners)) if owners and number % 2 else draw.randrange(len(sound))
        altered[position] ^= 1 << draw.randrange(8)
        file.write_bytes(altered)
        (problem,) = verify(path)
        assert str(file) in problem
        if position in owners:
            where["tensor"] += 1
            assert f"damaged: {owners[position]}" in problem
        elif owners:
            where["around"] += 1
            assert "all its tensors are intact" in problem
        else:
            where["manifest"] += 1
        file.write_bytes(sound)
    assert verify(path) == []
    assert min(where.values()) >= 50, where


def test_every_byte_of_the_manifest_counts(tmp_path):
    partial = begin(tmp_path, 1)
    data = np.arange(3, dtype=np.float32)
    header = {"step": 1, "rate": 1e-05}
    path = commit(partial, header, [write_file(partial, 0, 1, [Piece("w", "weight", (3,), 0, 3, data)])])
    sound = (path / MANIFEST).read_bytes()
    for position in range(len(sound)):
        for changed in (sound[position] ^ 0x20, 0x20, 0x0A):
            if changed != sound[position]:
                (path / MANIFEST).write_bytes(sound[:position] + bytes([changed]) + sound[position + 1 :])
                with pytest.raises(DamagedError, match=MANIFEST):
                    load_manifest(path)
    for cut in (0, 1, len(sound) // 2, len(sound) - 1):
        (path / MANIFEST).write_bytes(sound[:cut])
        assert len(verify(path)) == 1


@pytest.mark.parametrize("change", ["empty", "one", "half", "short", "long"])
def test_a_file_of_another_size_is_refused_with_both_numbers(path, change):
    file = path / FILES[1]
    size = file.stat().st_size
    wrong = {"empty": 0, "one": 1, "half": size // 2, "short": size - 1, "long": size + 1}[change]
    file.write_bytes((file.read_bytes() + b"\0")[:wrong])
    assert verify(path) == [f"{file}: has {wrong:,} bytes, the manifest says {size:,}"]
    with Reader(path, load_manifest(path)) as reader, pytest.raises(DamagedError, match=f"has {wrong:,} bytes"):
        reader.read("layers/003/attention/qkv/weight", "moment1", np.zeros((7, 23), np.float32))


def test_a_missing_file_is_named(path):
    (path / FILES[0]).unlink()
    assert verify(path) == [f"{path / FILES[0]}: is missing"]
    with Reader(path, load_manifest(path)) as reader, pytest.raises(DamagedError, match=r"rank-0000\.h5: cannot be"):
        reader.read("layers/003/attention/qkv/weight", "moment1", np.zeros((7, 23), np.float32))
    (path / MANIFEST).unlink()
    assert verify(path) == [f"{path / MANIFEST}: is missing: the checkpoint was never finished"]


def test_a_directory_in_place_of_a_file_is_a_problem_not_a_crash(path):
    (path / FILES[0]).unlink()
    (path / FILES[0]).mkdir()
    assert "cannot be read" in verify(path)[0]


def test_swapped_files_are_recognised(tmp_path):
    partial = begin(tmp_path, 1)
    halves = [Piece("w", "weight", (8,), 4 * i, 4 * i + 4, np.full(4, i, np.float32)) for i in range(2)]
    path = commit(partial, make_header(1), [write_file(partial, i, 1, [half]) for i, half in enumerate(halves)])
    first, second = path / FILES[0], path / FILES[1]
    assert first.stat().st_size == second.stat().st_size
    first.rename(path / "aside")
    second.rename(first)
    (path / "aside").rename(second)
    problems = verify(path)
    assert "holds what belongs in rank-0001.h5" in problems[0]
    assert "holds what belongs in rank-0000.h5" in problems[1]


def test_files_and_manifests_of_another_step_are_refused(tmp_path):
    old, _ = make_checkpoint(tmp_path, 100, 2)
    new, _ = make_checkpoint(tmp_path, 200, 2)
    shutil.copy(old / FILES[0], new / FILES[0])
    (problem,) = verify(new)
    assert str(new / FILES[0]) in problem
    shutil.copy(old / MANIFEST, new / MANIFEST)
    assert verify(new) == [f"{new / MANIFEST}: is of step 100, but lies in step-00000200"]


def test_a_reader_notices_an_altered_tensor_by_itself(path):
    manifest = load_manifest(path)
    piece = manifest.tensors["embedding/token/weight"].kinds["weight"][0]
    file = path / piece.file
    altered = bytearray(file.read_bytes())
    altered[piece.offset + 9] ^= 4
    file.write_bytes(altered)
    with Reader(path, manifest) as reader, pytest.raises(DamagedError, match="weight of embedding/token/weight was al"):
        reader.read("embedding/token/weight", "weight", np.zeros((13, 5), np.float32))


def test_many_damaged_tensors_are_summed_up(path):
    manifest = load_manifest(path)
    file = path / FILES[0]
    file.write_bytes(bytes(file.stat().st_size))
    (problem,) = verify_file(path, manifest, FILES[0])
    assert problem.count(" of ") == 5
    assert problem.endswith("more")


def rewrite(path, change):
    """Alter a manifest as somebody would who also makes its digest right."""
    document = json.loads((path / MANIFEST).read_text())
    document.pop("blake3")
    change(document)
    text = json.dumps(document, sort_keys=True, separators=(",", ":")).encode()
    (path / MANIFEST).write_bytes(render({**document, "blake3": digest_of(text).hex()}))


QKV = "layers/003/attention/qkv/weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(version=3), "has version 3, this hpcpipe reads versions 1 to 2: .* install"),
        (lambda d: d.update(version=0), "has version 0"),
        (lambda d: d.update(version="2"), "has version '2'"),
        (lambda d: d.update(version=True), "has version True"),
        (lambda d: d.update(format="other"), "not the manifest of a checkpoint"),
        (lambda d: d.pop("tensors"), "lacks 'tensors'"),
        (lambda d: d.update(tensors=[]), r"rank-0000\.h5: bytes from \d+ to \d+ are nowhere listed"),
        (lambda d: d["files"][0].pop("metadata"), "lacks 'metadata'"),
        (lambda d: d["files"][0]["metadata"].pop(), "are nowhere listed"),
        (lambda d: d["files"][0]["metadata"][0].update(bytes=8), "are nowhere listed"),
        (lambda d: d["files"][0]["metadata"].append(d["files"][0]["metadata"][1]), "are listed twice"),
        (lambda d: d["files"][0]["metadata"][0].update(blake3="0" * 64), "its digest is not that of its regions"),
        (lambda d: d["files"][0].update(blake3="0" * 63 + "G"), "where a digest belongs"),
        (lambda d: d["files"].append([]), "indices"),
        (lambda d: d.update(step=101), "has step 101"),
        (lambda d: d["files"][0].update(name="../../etc/passwd"), "names the file '../../etc/passwd'"),
        (lambda d: d["files"][0].update(name="rank-0001.h5"), "comes twice"),
        (lambda d: d["files"][0].update(bytes=-1), "-1 where a count belongs"),
        (lambda d: d["tensors"][QKV].update(shape=[2**40, 2**40]), "hold 161 elements of its"),
        (lambda d: d["tensors"][QKV].update(shape=[1] * 1000), "1000 dimensions"),
        (lambda d: d["tensors"][QKV].update(shape=[2**70]), "where a count belongs"),
        (lambda d: d["tensors"][QKV].update(dtype="O"), "dtype 'O'"),
        (lambda d: d["tensors"].update({"../x": d["tensors"][QKV]}), r"names the tensor '\.\./x'"),
        (lambda d: d["tensors"][QKV]["kinds"]["weight"][0].update(offset=2**60), "do not lie within"),
        (lambda d: d["tensors"][QKV]["kinds"]["weight"][0].update(file="rank-0009.h5"), "do not lie within"),
        (lambda d: d["tensors"][QKV]["kinds"]["moment1"].pop(), "hold 80 elements of its 161"),
        (lambda d: d["tensors"][QKV]["kinds"]["moment1"].reverse(), "no file holds the elements"),
    ],
)
def test_a_manifest_made_to_do_harm_is_refused(path, change, message):
    rewrite(path, lambda document: None)
    assert verify(path) == []
    rewrite(path, change)
    with pytest.raises(DamagedError, match=message):
        load_manifest(path)


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"format": 1e999}', b"9" * 9999]
)
def test_a_manifest_that_is_something_else_is_refused(path, text):
    (path / MANIFEST).write_bytes(text)
    assert len(verify(path)) == 1
    assert MANIFEST in verify(path)[0]


def test_numbers_that_json_does_not_know_are_refused_before_anything_is_written():
    with pytest.raises(ValueError, match="Out of range"):
        assemble({"step": 1, "loss": float("nan")}, [])
