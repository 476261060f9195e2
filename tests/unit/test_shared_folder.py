"""The folder of a launch for the memory that its ranks share: where it is, and that nothing of it stays."""

import os
from pathlib import Path

import pytest

from hpcpipe.cluster import shared_folder
from hpcpipe.cluster.shared_folder import BACKING


def test_what_ranks_leave_is_removed() -> None:
    environ: dict[str, str] = {}
    with shared_folder.shared_folder(environ, 2, is_one_node=True):
        folder = Path(environ[BACKING])
        (folder / "sm_segment").write_bytes(b"left by a rank that was killed")
        with shared_folder.shared_folder(other := {}, 2, is_one_node=True):
            assert other[BACKING] != environ[BACKING]
    assert not folder.exists()


def test_what_a_killed_launch_has_left_is_removed_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_folder, "_SHARED_MEMORY", tmp_path)
    abandoned, recent, other = (tmp_path / name for name in ("hpcpipe-mpi-a", "hpcpipe-mpi-b", "another-c"))
    for folder in (abandoned, recent, other):
        folder.mkdir()
        (folder / "sm_segment").write_bytes(b"x")
    with shared_folder.shared_folder(environ := {}, 2, is_one_node=True):
        for folder in (abandoned, other, held := Path(environ[BACKING])):
            os.utime(folder, (0, 0))
        with shared_folder.shared_folder({}, 2, is_one_node=True):
            assert held.is_dir()
            assert not abandoned.exists()
            assert recent.is_dir()
            assert other.is_dir()


@pytest.mark.parametrize("num_bytes", [0, 100 << 20])
def test_it_lies_where_there_is_room(num_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = shared_folder._RANK_BYTES * 4 + shared_folder._ROOM_FOR_OTHERS - 1 + num_bytes
    monkeypatch.setattr(shared_folder, "_SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(shared_folder.shutil, "disk_usage", lambda path: _Usage(free))
    environ: dict[str, str] = {}
    with shared_folder.shared_folder(environ, 4, is_one_node=True):
        assert Path(environ[BACKING]).is_relative_to(tmp_path) == (num_bytes > 0)


def test_without_shared_memory_it_lies_with_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_folder, "_SHARED_MEMORY", tmp_path / "absent")
    environ: dict[str, str] = {}
    with shared_folder.shared_folder(environ, 4, is_one_node=True):
        assert Path(environ[BACKING]).is_dir()


def test_a_chosen_folder_stays_and_other_nodes_have_none(tmp_path: Path) -> None:
    environ = {BACKING: str(tmp_path)}
    with shared_folder.shared_folder(environ, 4, is_one_node=True):
        assert environ == {BACKING: str(tmp_path)}
    environ = {}
    with shared_folder.shared_folder(environ, 4, is_one_node=False):
        assert environ == {}


class _Usage:
    def __init__(self, free: int) -> None:
        self.free = free
