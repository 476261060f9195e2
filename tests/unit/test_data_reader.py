"""Token files that are whole are read; any that are not are refused by name."""

import shutil

import h5py
import numpy as np
import pytest

from hpcpipe.data.format import BLOCK_TOKENS
from hpcpipe.data.prepare import prepare
from hpcpipe.data.reader import TokenFile, document_names
from hpcpipe.data.verify import verify
from hpcpipe.errors import DamagedError, UsageError


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A token file of a few kilobytes with 40 documents."""
    folder = tmp_path_factory.mktemp("small")
    (folder / "in").mkdir()
    for number in range(40):
        (folder / "in" / f"{number}.txt").write_text(f"document {number} " * (1 + number % 3))
    prepare([str(folder / "in")], folder / "tokens.h5")
    return folder / "tokens.h5"


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A token file of three blocks."""
    folder = tmp_path_factory.mktemp("large")
    letters = np.random.default_rng(0).integers(97, 123, 1_200_000, dtype=np.uint8)
    (folder / "a.txt").write_bytes(letters.tobytes())
    prepare([str(folder / "a.txt")], folder / "tokens.h5")
    return folder / "tokens.h5"


def flip(path, bit):
    """Flip one bit of a file in place."""
    with path.open("r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ (1 << bit % 8)]))


def everything(path):
    """All that a reader can learn from a file."""
    with TokenFile(path) as file:
        facts = (file.source, file.tokenizer, file.vocab, file.separator, file.text_bytes, file.digest)
        arrays = (file.document_offsets.tobytes(), file.document_hash.tobytes())
        return facts, arrays, file.read(0, file.num_tokens).tobytes(), document_names(path, 1000)


@pytest.mark.parametrize("keep", [0, 1, 47, "half", -1])
def test_truncated_files_are_refused_with_sizes(large, tmp_path, keep):
    size = large.stat().st_size
    length = {"half": size // 2, -1: size - 1}.get(keep, keep)
    path = tmp_path / "cut.h5"
    path.write_bytes(large.read_bytes()[:length])
    expected = f"expected {size} bytes, found {length};" if length > 47 else f"at least 48 bytes, found {length};"
    with pytest.raises(DamagedError, match=rf"cut\.h5: truncated: .*{expected} make it again: hpcpipe data prepare"):
        TokenFile(path)
    assert len(verify(path)) == 1
    assert expected in verify(path)[0]


@pytest.mark.parametrize("seed", range(6))
def test_a_flipped_bit_in_the_tokens_is_noticed(large, tmp_path, seed):
    path = tmp_path / "flipped.h5"
    shutil.copy(large, path)
    with h5py.File(path) as file:
        tokens_at = file["tokens"].id.get_offset()
        num_tokens = file["tokens"].shape[0]
    bit = int(np.random.default_rng(seed).integers(num_tokens * 16))
    flip(path, tokens_at * 8 + bit)
    block = bit // 16 // BLOCK_TOKENS
    first = tokens_at + block * BLOCK_TOKENS * 2
    problems = verify(path)
    assert len(problems) == 1
    assert f"{path}: damaged between byte {first} and byte" in problems[0]
    with TokenFile(path) as file:
        with pytest.raises(DamagedError, match=f"flipped.h5: damaged between byte {first} "):
            file.read(bit // 16, bit // 16 + 1)
        sound = (block + 1) % 3  # blocks that are not touched are none of the reader's business
        assert len(file.read(sound * BLOCK_TOKENS, sound * BLOCK_TOKENS + 100)) == 100


def test_a_flipped_bit_anywhere_is_noticed_or_changes_nothing(small, tmp_path):
    path = tmp_path / "flipped.h5"
    size, sound = small.stat().st_size, everything(small)
    rng = np.random.default_rng(1)
    # The structures of HDF5 lie in the first and last kilobytes.
    bits = [
        *rng.integers(0, 8 * 1024, 60),
        *rng.integers(0, 8 * size, 80),
        *rng.integers(8 * (size - 1024), 8 * size, 20),
    ]
    noticed = 0
    for bit in map(int, bits):
        shutil.copy(small, path)
        flip(path, bit)
        if verify(path):
            noticed += 1
        else:
            assert everything(path) == sound, f"bit {bit}"
    assert noticed > len(bits) // 2


def test_missing_and_other_files_are_refused(small, tmp_path):
    with pytest.raises(DamagedError, match=r"nowhere\.h5: no such token file; make it: hpcpipe data prepare SOURCE"):
        TokenFile(tmp_path / "nowhere.h5")
    with pytest.raises(DamagedError, match="it is a folder"):
        TokenFile(tmp_path)
    (tmp_path / "text.h5").write_text("some text, longer than a superblock is, but with no signature")
    with pytest.raises(DamagedError, match="not a token file: it is not HDF5"):
        TokenFile(tmp_path / "text.h5")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["tokens"] = np.arange(5)
    with pytest.raises(DamagedError, match="its format is not 'hpcpipe-tokens'"):
        TokenFile(tmp_path / "other.h5")


def edited(small, tmp_path, edit):
    """A copy of a file that a program has changed through HDF5, so that all checksums of HDF5 are right."""
    path = tmp_path / "edited.h5"
    shutil.copy(small, path)
    with h5py.File(path, "r+") as file:
        edit(file)
    return path


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda file: file.attrs.modify("version", np.uint64(2)), "version 2 of hpcpipe-tokens, this hpcpipe reads"),
        (lambda file: file.attrs.modify("digest", np.bytes_("0" * 64)), "checksum of offsets, hashes and names"),
        (lambda file: file["document_offsets"].__setitem__(3, 1), "checksum of offsets, hashes and names"),
        (lambda file: file["document_names"].__setitem__(3, 1), "checksum of offsets, hashes and names"),
        (lambda file: file["block_crc32"].__setitem__(0, 1), "checksum of offsets, hashes and names"),
        (lambda file: file.__delitem__("document_hash"), "HDF5 cannot read it"),
        (lambda file: file.__delitem__("tokens"), "HDF5 cannot read it"),
        (lambda file: file.attrs.__delitem__("vocab"), "HDF5 cannot read it"),
        (lambda file: file.attrs.__setitem__("format", [1, 2]), "not a token file|HDF5 cannot read it"),
        (lambda file: retyped(file, np.uint32), "contiguous, unfiltered and of type uint16, found uint32"),
        (lambda file: retyped(file, np.uint16, compression="gzip"), "contiguous, unfiltered"),
        (lambda file: retyped(file, np.uint16, cut=1), "document offsets end at"),
    ],
)
def test_other_versions_and_inconsistent_files_are_refused(small, tmp_path, edit, said):
    path = edited(small, tmp_path, edit)
    with pytest.raises(DamagedError, match=said) as caught:
        TokenFile(path)
    assert str(path) in str(caught.value)
    assert len(verify(path)) == 1


def retyped(file, kind, cut=0, **options):
    tokens = file["tokens"][:]
    del file["tokens"]
    file.create_dataset("tokens", data=tokens[: len(tokens) - cut].astype(kind), **options)


def test_more_attributes_and_datasets_are_passed_over(small, tmp_path):
    def add(file):
        file.attrs["note"] = "from a later version"
        file["more"] = np.arange(3)

    path = edited(small, tmp_path, add)
    assert verify(path) == []
    assert everything(path) == everything(small)


def test_the_tokens_are_mapped_and_read_only(small):
    with TokenFile(small) as file:
        with pytest.raises(ValueError, match="read-only"):
            file.read(0, 3)[0] = 1
        for start, stop in [(-1, 2), (3, 2), (0, file.num_tokens + 1)]:
            with pytest.raises(ValueError, match="outside"):
                file.read(start, stop)
        assert len(file.read(file.num_tokens, file.num_tokens)) == 0
    with pytest.raises(ValueError, match="closed"):
        file.read(0, 1)


@pytest.mark.parametrize("fraction", [0.0, 1e-12, 0.02, 0.3, 0.5, 0.97, 1 - 2**-53])
def test_split_is_by_hash_and_leaves_both_sides_something(small, fraction):
    with TokenFile(small) as file:
        train, validation = file.split(fraction)
        assert train.num_documents + validation.num_documents == file.num_documents == 40
        assert train.num_tokens + validation.num_tokens == file.num_tokens
        assert (validation.start, validation.stop, train.stop) == (0, train.start, file.num_tokens)
        by_hash = int((file.document_hash.astype(object) < fraction * 2**64).sum())
        assert validation.num_documents == (min(max(by_hash, 1), 39) if fraction else 0)
        if validation.num_tokens:
            assert validation.read(0, 1)[0] == 256
        assert train.read(0, 1)[0] == 256


def test_a_larger_fraction_holds_out_more(small):
    with TokenFile(small) as file:
        held_out = [file.split(fraction)[1].num_documents for fraction in np.linspace(0, 0.99, 50)]
    assert held_out == sorted(held_out)
    assert held_out[25] in range(10, 31)


def test_held_out_documents_do_not_depend_on_the_others(small, tmp_path):
    with TokenFile(small) as file:
        held_out = set(file.document_hash[: file.split(0.4)[1].num_documents].tolist())
        everyone = set(file.document_hash.tolist())
    (tmp_path / "more").mkdir()
    for number in range(30):
        (tmp_path / "more" / f"{number}").write_text(f"another document {number}")
    prepare([str(tmp_path / "more"), str(small.parent / "in")], tmp_path / "more.h5")
    with TokenFile(tmp_path / "more.h5") as file:
        now_held_out = set(file.document_hash[: file.split(0.4)[1].num_documents].tolist())
    assert now_held_out & everyone == held_out
    assert now_held_out - everyone


def test_a_single_document_is_trained_on(large):
    with TokenFile(large) as file:
        train, validation = file.split(0.5)
        assert (train.num_documents, validation.num_documents) == (1, 0)
        assert train.num_tokens == file.num_tokens


@pytest.mark.parametrize("fraction", [-0.1, 1.0, 1.5, float("nan")])
def test_fractions_out_of_range_are_refused(small, fraction):
    with (
        TokenFile(small) as file,
        pytest.raises(UsageError, match="validation_fraction must be at least 0 and below 1"),
    ):
        file.split(fraction)
