"""One run per directory: a lock that names its holder, that a dead holder does not keep, and that can be lost.

Files are only created, renamed and removed, each of which is atomic on every file system that a cluster shares; the
file system need not have locks.
"""

import contextlib
import errno
import os
import threading
import time
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path

from hpcpipe.cluster.holder import Holder, is_known_alive, this_process
from hpcpipe.errors import DiskError, InUseError

_RENEW_S = 1.0
_WATCH_S = 3.0
_POLL_S = 0.1
_SURE_S = 2.0
_PATIENCE_S = 1.0
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV)


class RunLock:
    """The lock of a run directory, held by rank 0.

    The holder renews the file's time of change every second. Whoever finds a lock takes it over if its holder is known
    to be gone, see `hpcpipe.cluster.holder.is_known_alive`; where that cannot be known it watches the file for three
    seconds, and takes it over if nobody has renewed it. Clocks of different machines are never compared.

    `hpcpipe launch` takes the lock before it starts ranks, so that a second run is refused before it costs anything;
    rank 0 of the same launch then takes it from there.

    A holder that was only held up, such as a suspended process, finds another fence in the file: from then on it must
    not write any more, see `check`.

    Parameters
    ----------
    path : Path
        The lock file, in an existing directory.
    me : Holder, optional
        Who takes the lock; this process without it.
    say : callable, optional
        Takes a line of text for people, when the lock has to be watched.
    """

    def __init__(self, path: Path, me: Holder | None = None, say: Callable[[str], None] | None = None) -> None:
        self._path = path
        self._me = me or this_process()
        self._content = self._me.to_bytes()
        self._say = say or (lambda text: None)
        self._done = threading.Event()
        self._mutex = threading.Lock()
        self._is_lost = False
        self._seen_at = 0.0

    @property
    def fence(self) -> str:
        """What the file says as long as the lock is this run's, see `hpcpipe.cluster.holder.fence_of`."""
        return self._me.fence

    def acquire(self) -> str:
        """Take the lock, and renew it from now on.

        Returns
        -------
        str
            Who held it before, if a dead run's lock was taken over; else an empty string.

        Raises
        ------
        InUseError
            If another run holds it; names the process and the machine.
        DiskError
            If the file cannot be made or read; an incomplete one is not left behind.
        """
        try:
            taken_from = _take(self._path, self._me, self._say)
            _remove_leftovers(self._path, self._content)
        except OSError as error:
            raise DiskError(
                f"{self._path}: cannot be written: {error.strerror or error}: free space, or choose another run.dir"
            ) from error
        self._seen_at = time.monotonic()
        threading.Thread(target=self._renew, daemon=True).start()
        return taken_from

    def is_ours(self) -> bool:
        """Read the file, and tell whether the lock is still this run's; one that somebody removed is made again."""
        with self._mutex:
            if self._is_lost or not self._seen_at or self._done.is_set():
                return False
            try:
                found = _read(self._path)
                is_ours = found == self._content or (found is None and _create(self._path, self._me))
            except OSError:
                # A file system that does not answer says nothing about who holds the lock.
                return True
            self._is_lost = not is_ours
            self._seen_at = time.monotonic()
            return is_ours

    def check(self) -> None:
        """Refuse to go on if the lock is another run's; reads the file only if that has not been done for two seconds.

        Raises
        ------
        InUseError
            If the lock was taken over, which can happen to a run that did not get to run for some seconds.
        """
        if self._is_lost or (time.monotonic() - self._seen_at > _SURE_S and not self.is_ours()):
            raise InUseError(
                f"{self._path.parent} was taken over by {_holder(self._path)}, since this run had not shown itself for"
                f" {_WATCH_S:g} s; it writes nothing more"
            )

    def release(self) -> None:
        """Give the lock back, if it is still this run's."""
        with self._mutex:
            self._done.set()
        with contextlib.suppress(OSError, InUseError):
            _replace(self._path, self._content, self._me, None)

    def _renew(self) -> None:
        while not self._done.wait(_RENEW_S) and self.is_ours():
            with contextlib.suppress(OSError):
                os.utime(self._path)


def is_held_by_another(path: Path) -> bool:
    """Return whether a lock file's holder is alive and not this process, or the file may not be read."""
    me = this_process()
    try:
        while (content := _read(path)) is not None:
            holder = Holder.from_bytes(content) or Holder()
            if holder.is_of_same_run(me):
                return False
            verdict = _is_alive(path, content, me)
            if verdict is not None:
                return verdict
    except OSError as error:
        return not isinstance(error, IsADirectoryError)
    return False


def _take(path: Path, me: Holder, say: Callable[[str], None]) -> str:
    """Make the file, if need be in place of a dead run's, and return who held that."""
    before = None
    patient_until = time.monotonic() + _PATIENCE_S
    while True:
        content = _read(path)
        if content is None:
            if _create(path, me):
                return ""
            continue
        holder = Holder.from_bytes(content) or Holder()
        if me.launch_id and holder.launch_id == me.launch_id and _replace(path, content, me, me.to_bytes()):
            return ""
        # Who took the lock while this process watched it was there a moment ago.
        verdict = _is_alive(path, content, me, say) if before in (None, content) else True
        before = content
        # Who is just being killed is gone in a moment.
        if verdict and time.monotonic() < patient_until:
            time.sleep(_POLL_S)
        elif verdict:
            raise InUseError(
                f"{path.parent} is in use by {holder}, started {holder.started}: wait for it, stop it, or choose"
                " another run.name"
            )
        if verdict is False and _replace(path, content, me, me.to_bytes()):
            return str(holder)


def _is_alive(path: Path, content: bytes, me: Holder, say: Callable[[str], None] | None = None) -> bool | None:
    """Tell whether the holder of a lock with this content is there; None if the file has changed meanwhile.

    Opening the file makes network file systems ask their server, which asking for its status does not.
    """
    first = _signature(path)
    if first is None:
        return None
    holder = Holder.from_bytes(content) or Holder()
    known = is_known_alive(holder, me, first[0] * 1e-9)
    if known is not None:
        return known
    if say is not None:
        say(f"{path.parent} is locked by {holder}: watching for up to {_WATCH_S:g} s whether it is still there")
    deadline = time.monotonic() + _WATCH_S
    while time.monotonic() < deadline:
        time.sleep(_POLL_S)
        if _read(path) != content:
            return None
        if _signature(path) != first:
            return True
    return False


def _replace(path: Path, content: bytes, me: Holder, new: bytes | None) -> bool:
    """Replace or remove a lock file if it has a certain content, which nobody else can do at the same time.

    The right to do so is a file beside it, named after the content: since every content is unique, having that file and
    then still finding the content means that nobody changes it. A process that died with the right loses it as it would
    lose the lock.
    """
    right = path.with_name(f"{path.name}.{_digest(content)}")
    deadline = time.monotonic() + _WATCH_S
    while not _create(right, me):
        held = _read(right)
        if _read(path) != content:
            return False
        if held is None:
            continue
        if time.monotonic() > deadline:
            raise InUseError(f"{path.parent} is being taken over by {_holder(right)}, which hangs: stop it")
        if _is_alive(right, held, me) is not False:
            time.sleep(_POLL_S / 10)
        elif _replace(right, held, me, me.to_bytes()):
            break
    try:
        if _read(path) != content:
            return False
        if new is None:
            path.unlink()
            return True
        temporary = _temporary(path, me)
        temporary.write_bytes(new)
        temporary.replace(path)
        return True
    finally:
        right.unlink(missing_ok=True)


def _create(path: Path, me: Holder) -> bool:
    """Make a lock file, whole or not at all; False if there is one."""
    temporary = _temporary(path, me)
    try:
        temporary.write_bytes(me.to_bytes())
        os.link(temporary, path)
    except FileExistsError:
        # Over NFS the answer to a link that was made may be lost, and the second try finds it.
        return temporary.stat().st_nlink == 2
    except FileNotFoundError:
        # The new holder of the lock has tidied up; or the directory is gone, which the next look finds.
        if not path.parent.is_dir():
            raise
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        return _create_without_links(path, me)
    finally:
        temporary.unlink(missing_ok=True)
    return True


def _create_without_links(path: Path, me: Holder) -> bool:
    try:
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(me.to_bytes())
    except OSError:
        path.unlink(missing_ok=True)
        raise
    return True


def _read(path: Path) -> bytes | None:
    """Return the content of a lock file, None if there is none; one that is just being written is waited for."""
    content = b""
    for _ in range(10):
        try:
            content = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        if Holder.from_bytes(content) is not None:
            break
        time.sleep(0.05)
    return content


def _signature(path: Path) -> tuple[int, int, int] | None:
    """Return what a renewal changes: times and identity of the file; None if it is gone."""
    try:
        with path.open("rb") as file:
            state = os.fstat(file.fileno())
    except (FileNotFoundError, NotADirectoryError):
        return None
    return state.st_mtime_ns, state.st_ctime_ns, state.st_ino


def _holder(path: Path) -> str:
    """Name who holds a lock now."""
    with contextlib.suppress(OSError):
        return str(Holder.from_bytes(path.read_bytes()) or "another run")
    return "another run"


def _temporary(path: Path, me: Holder) -> Path:
    return path.with_name(f".{path.name}.{me.fence}.{threading.get_ident()}.tmp")


def _digest(content: bytes) -> str:
    return blake2b(content, digest_size=8).hexdigest()


def _remove_leftovers(path: Path, content: bytes) -> None:
    """Remove what killed processes left: unfinished files, and rights to replace contents that are gone."""
    for found in (*path.parent.glob(f".{path.name}.*.tmp"), *path.parent.glob(f"{path.name}.*")):
        if found.name != f"{path.name}.{_digest(content)}":
            with contextlib.suppress(OSError):
                found.unlink()
