"""Killed, out of space, failing: a checkpoint is whole or not there, and the one before is untouched."""

import errno
import os
import random
import resource
import signal
import time

import pytest
from support.checkpoints import make_checkpoint, make_header, make_pieces
from support.writing import begin, write_file

from hpcpipe.checkpoint import disk
from hpcpipe.checkpoint.layout import candidates
from hpcpipe.checkpoint.retain import retain
from hpcpipe.checkpoint.verify import verify
from hpcpipe.checkpoint.write import abandon, commit
from hpcpipe.errors import DiskError


def in_child(function):
    """Run a function in a child process; return the child's pid."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            function()
            code = 0
        finally:
            os._exit(code)
    return pid


def exit_of(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def write_on(root, steps):
    for step in steps:
        path, _ = make_checkpoint(root, step, 2)
        retain(root, path, keep=2)


def test_killed_at_any_moment_every_committed_checkpoint_verifies(tmp_path):
    draw = random.Random(9)
    started = time.monotonic()
    write_on(tmp_path, [1])
    once_s = time.monotonic() - started
    first, newest = 2, 1
    for _ in range(20):
        pid = in_child(lambda first=first: write_on(tmp_path, range(first, first + 10_000)))
        time.sleep(draw.uniform(0.0, 8 * once_s))
        os.kill(pid, signal.SIGKILL)
        assert exit_of(pid) == -signal.SIGKILL
        found = candidates(tmp_path)
        assert [problem for path in found for problem in verify(path)] == []
        steps = [int(path.name[5:]) for path in found]
        assert max(steps, default=0) >= newest
        newest = max(steps, default=0)
        first = newest + 1
    assert newest > 5


SYSTEM_CALLS = ("open", "posix_fallocate", "write", "fsync", "close", "rename", "mkdir", "unlink", "rmdir")


def test_killed_at_every_system_call_of_a_writing(tmp_path):
    """Step 2 replaces a damaged step 2, so that every path of commit and retain is walked."""
    survived = 0
    for number in range(1, 200):
        root = tmp_path / str(number)
        make_checkpoint(root, 1, 1)
        make_checkpoint(root, 2, 1)
        (root / "step-00000002" / "rank-0000.h5").unlink()

        def write(root=root, number=number):
            count = 0

            def counted(function):
                def call(*args, **kwargs):
                    nonlocal count
                    count += 1
                    if count == number:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return function(*args, **kwargs)

                return call

            for name in SYSTEM_CALLS:
                setattr(os, name, counted(getattr(os, name)))
            path, _ = make_checkpoint(root, 2, 2)
            retain(root, path, keep=1)

        code = exit_of(in_child(write))
        sound = [path.name for path in candidates(root) if verify(path) == []]
        assert sound, f"killed at call {number}: no checkpoint is left"
        assert set(sound) <= {"step-00000001", "step-00000002"}
        # The damaged step 2 of before may be there as long as the new one is not committed.
        assert all(verify(path) == [] for path in candidates(root)) or "step-00000002" not in sound
        begin(root, 3)
        assert not list(root.glob("trash-*"))
        if code == 0:
            survived = number
            break
    assert survived > 20


@pytest.mark.parametrize(("limit", "file"), [(0, "rank-0000.h5"), (1, "rank-0000.h5"), (4096, "rank-0000.h5")])
def test_a_file_size_limit_is_a_disk_error_and_the_one_before_is_intact(tmp_path, limit, file):
    refuse_beyond(tmp_path, limit, file, limit_before_files=True)


@pytest.mark.parametrize(("limit", "file"), [(700, "view.h5"), (20_000, "manifest.json")])
def test_a_view_or_manifest_beyond_the_file_size_limit_commits_nothing(tmp_path, limit, file):
    refuse_beyond(tmp_path, limit, file, limit_before_files=False)


def refuse_beyond(root, limit, file, limit_before_files):
    good, _ = make_checkpoint(root, 1, 1)

    def write():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        limits = (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
        partial = begin(root, 2)
        if limit_before_files:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        try:
            record = write_file(partial, 0, 2, make_pieces(1)[0])
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            commit(partial, {**make_header(2), "note": "x" * 20_000}, [record])
        except DiskError as error:
            complete = all(part in str(error) for part in (str(partial / file), "ulimit -f", "bytes needed"))
            os._exit(74 if complete else 1)

    assert exit_of(in_child(write)) == 74
    assert candidates(root) == [good]
    assert verify(good) == []
    begin(root, 3)
    assert sorted(path.name for path in root.iterdir()) == [good.name, "step-00000003.partial"]


CURES = {
    errno.ENOSPC: "free space",
    errno.EDQUOT: "quota",
    errno.EROFS: "read-only",
    errno.EIO: "device or the server",
    errno.EFBIG: "ulimit",
    errno.ESTALE: "file system",
}


@pytest.mark.parametrize("call", ["open", "posix_fallocate", "write", "fsync", "close", "preadv"])
@pytest.mark.parametrize("code", sorted(CURES))
def test_what_the_disk_refuses_is_named_with_its_cure(tmp_path, monkeypatch, call, code):
    good, _ = make_checkpoint(tmp_path, 1, 1)
    partial = begin(tmp_path, 2)
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    with monkeypatch.context() as patch:
        real_close = os.close

        def refuse(*args, **kwargs):
            if call == "close":
                real_close(*args)
            raise OSError(code, os.strerror(code))

        patch.setattr(os, call, refuse)
        with pytest.raises(DiskError, match=CURES[code]) as caught:
            write_file(partial, 0, 2, make_pieces(1)[0])
    assert str(partial / "rank-0000.h5") in str(caught.value)
    assert "bytes needed" in str(caught.value)
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
    abandon(partial)
    assert [path.name for path in tmp_path.iterdir()] == [good.name]
    assert verify(good) == []


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_commit_that_fails_commits_nothing(tmp_path, monkeypatch, call):
    good, _ = make_checkpoint(tmp_path, 1, 1)
    partial = begin(tmp_path, 2)
    record = write_file(partial, 0, 2, make_pieces(1)[0])
    with monkeypatch.context() as patch:

        def refuse(*args, **kwargs):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        patch.setattr(os, call, refuse)
        with pytest.raises(DiskError, match="device"):
            commit(partial, make_header(2), [record])
    assert candidates(tmp_path) == [good]
    abandon(partial)
    assert verify(good) == []


def test_a_full_device_is_a_disk_error(tmp_path, monkeypatch):
    partial = begin(tmp_path, 2)
    real_open = os.open
    monkeypatch.setattr(os, "open", lambda path, flags, mode=0o777: real_open("/dev/full", os.O_RDWR))
    monkeypatch.setattr(disk, "_reserve", lambda handle, num_bytes: None)
    with pytest.raises(DiskError, match=r"No space left on device; .* bytes needed, .* free: free space there"):
        write_file(partial, 0, 2, make_pieces(1)[0])


def test_short_writes_are_continued(tmp_path, monkeypatch):
    real_write = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: real_write(handle, data[:1001]))
    path, _ = make_checkpoint(tmp_path, 2, 1)
    assert verify(path) == []
    monkeypatch.setattr(os, "write", lambda handle, data: 0)
    with pytest.raises(DiskError, match="took 0 bytes and no more"):
        make_checkpoint(tmp_path, 3, 1)


def test_a_file_system_that_cannot_reserve_space_is_no_obstacle(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    assert verify(make_checkpoint(tmp_path, 2, 1)[0]) == []


def test_what_the_disk_returns_is_compared_with_what_was_written(tmp_path, monkeypatch):
    real_write = os.write

    def altering(handle, data):
        altered = bytearray(data)
        altered[-1] ^= 1
        return real_write(handle, altered)

    monkeypatch.setattr(os, "write", altering)
    partial = begin(tmp_path, 2)
    with pytest.raises(DiskError, match="differs from what was written"):
        write_file(partial, 0, 2, make_pieces(1)[0])


def test_a_root_that_cannot_be_made_is_a_disk_error(tmp_path):
    (tmp_path / "run").write_text("a file where the run directory should be")
    with pytest.raises(DiskError, match=r"step-00000001\.partial: Not a directory"):
        begin(tmp_path / "run" / "checkpoints", 1)
