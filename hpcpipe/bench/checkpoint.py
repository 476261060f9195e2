"""``hpcpipe bench checkpoint``: what checkpoints of a model take, beside the same bytes moved by ``dd``."""

import os
import secrets
import shutil
import signal
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from hpcpipe.bench.config import quiet_session, with_vocabulary
from hpcpipe.bench.result import BenchResult
from hpcpipe.checkpoint.disk import drop_from_cache
from hpcpipe.checkpoint.layout import file_name, step_name
from hpcpipe.checkpoint.manifest import load_manifest
from hpcpipe.checkpoint.verify import verify_metadata
from hpcpipe.config.interval import Interval
from hpcpipe.errors import DiskError, UsageError
from hpcpipe.kernels.threads import ALONE
from hpcpipe.mpi import runtime
from hpcpipe.mpi.agree import together
from hpcpipe.mpi.collectives import barrier, broadcast_bytes, gather_rows
from hpcpipe.mpi.runtime import World
from hpcpipe.train.cadence import Cadence
from hpcpipe.train.checkpoints import Checkpoints
from hpcpipe.train.directory import RunDirectory
from hpcpipe.train.leave import leaving_together
from hpcpipe.train.load import load_state
from hpcpipe.train.setup import Setup, agree_on_setup, require_own_memory
from hpcpipe.train.state import build_state
from hpcpipe.train.writer_memory import WriterMemory

_BLOCK = "8M"
_WAIT_S = 600.0
_REMOVALS = 20
_NAP_S = 0.05
_MEASURES = ("write", "dd_write", "read_back", "restore", "dd_read")


def bench_checkpoint(config_path: Path, overrides: Sequence[str], num_rounds: int) -> BenchResult:
    """Write and restore checkpoints of a model as a run does, in turn with ``dd``, on all ranks together.

    In each round: a checkpoint is taken and committed; dropped from the page cache and read back; every rank's ``dd``
    writes the same bytes from the same memory and syncs them; the checkpoint is dropped from the cache and restored;
    dropped again and read by ``dd``. All is below ``run.dir``, and gone at the end.

    Parameters
    ----------
    config_path : Path
        The TOML file.
    overrides : sequence of str
        ``section.key=value`` each.
    num_rounds : int
        At least 1; one more, that does not count, comes first.

    Returns
    -------
    BenchResult
        Its report has ``benchmark ranks directory bytes rounds``; ``blocked_s blocked_p10_s blocked_p90_s``: what
        training would wait for a checkpoint on the slowest rank; for ``write`` (from the snapshot to the committed
        checkpoint), ``read_back``, ``dd_write``, ``restore`` and ``dd_read`` a dict of ``s p10_s p90_s bytes_per_s``,
        all ranks together; ``write_of_dd`` and ``restore_of_dd``, the median over rounds of the ratio of rates.

    Raises
    ------
    UsageError
        There are no rounds, or no ``dd``.
    """
    if num_rounds < 1:
        raise UsageError(f"--rounds {num_rounds}: at least 1 is needed")
    if shutil.which("dd") is None:
        raise UsageError("bench checkpoint compares with dd, and there is no such program on PATH")
    writer = WriterMemory()
    world = runtime.start()
    report = None
    with leaving_together(world, None) as outcome:
        report = _Bench(world, agree_on_setup(world, config_path, overrides), writer).run(num_rounds)
    writer.close()
    runtime.stop(world)
    return BenchResult(outcome.code, report if world.rank == 0 else None)


@dataclass
class _Rounds:
    """Seconds of each round, on the slowest rank."""

    blocked_s: list[float] = field(default_factory=list)
    seconds: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in _MEASURES})


class _Bench:
    """One benchmark on one rank."""

    def __init__(self, world: World, setup: Setup, writer: WriterMemory) -> None:
        waiter, root = setup.waiter, world.rank == 0
        token = broadcast_bytes(world.comm, waiter, secrets.token_hex(4).encode() if root else None, 0).decode()
        directory = RunDirectory(Path(setup.config.run.dir) / f"bench-checkpoint-{token}")
        self._session = quiet_session(world, setup, ALONE, directory)
        self._comm, self._waiter, self._writer = world.comm, waiter, writer
        with together(world.comm, waiter):
            self._session.config = config = with_vocabulary(setup.config)
            require_own_memory(self._session, config)
        grid = self._session.grid
        self._state = build_state(config, setup.schedule.stage_to_rank, grid.stage_rank, grid.replica)
        self._state.fill_initial()
        never = Cadence(Interval(), 1.0, 0.0)
        self._checkpoints = Checkpoints(self._session, self._state, writer, {}, None, never, "0")
        self._waiter.timeout_s = _WAIT_S

    def run(self, num_rounds: int) -> dict[str, Any]:
        """Measure, and return the report."""
        for ending in (signal.SIGINT, signal.SIGTERM):
            signal.signal(ending, self._leave)
        try:
            rounds = _Rounds()
            for number in range(num_rounds + 1):
                num_bytes = self._round(rounds)
                if number == 0:
                    rounds = _Rounds()
            return self._report(rounds, num_bytes)
        finally:
            self._remove()
            self._session.grid.free()

    def _remove(self) -> None:
        """Remove everything that was written; writers that have not ended yet may still be adding to it."""
        root = self._session.directory.path
        for _ in range(_REMOVALS):
            if self._comm.rank != 0 or not root.exists():
                break
            shutil.rmtree(root, ignore_errors=True)
            time.sleep(_NAP_S)

    def _leave(self, number: int, frame: FrameType | None) -> None:
        """Leave no files behind, and end as the signal would have ended this process."""
        self._remove()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    def _round(self, rounds: _Rounds) -> int:
        """Measure everything once; return the bytes of all ranks' files."""
        state, checkpoints = self._state, self._checkpoints
        state.step += 1
        path = self._session.directory.checkpoints / step_name(state.step)
        own, copy = path / file_name(self._comm.rank), path.with_name(f"dd-{self._comm.rank}")
        before_s = checkpoints.blocked_s
        checkpoints_s = self._time(lambda: checkpoints.take({}))
        rounds.blocked_s.append(self._slowest(checkpoints.blocked_s - before_s))
        rounds.seconds["write"].append(
            checkpoints_s + self._time(lambda: checkpoints.finish({}, save=True, read_back=False))
        )
        num_bytes = own.stat().st_size if own.exists() else 0
        rounds.seconds["read_back"].append(self._time(self._read_back))
        source = f"/proc/self/fd/{self._writer.handle}"
        handles = (self._writer.handle,)
        rounds.seconds["dd_write"].append(
            self._time(lambda: _dd([f"if={source}", f"of={copy}", "conv=fsync"], num_bytes, handles))
        )
        copy.unlink(missing_ok=True)
        rounds.seconds["restore"].append(self._from_disk(own, lambda: self._restore(path)))
        rounds.seconds["dd_read"].append(self._from_disk(own, lambda: _dd([f"if={own}", "of=/dev/null"], num_bytes)))
        barrier(self._comm, self._waiter)
        if self._comm.rank == 0:
            shutil.rmtree(path)
        return int(gather_rows(self._comm, self._waiter, np.array([num_bytes], np.int64)).sum())

    def _read_back(self) -> None:
        """Wait until the checkpoint was read back from the disk, all ranks together."""
        self._checkpoints.finish({}, save=False, read_back=True)
        if self._checkpoints.step != self._state.step:
            raise DiskError(
                f"{self._session.directory.path}: what was written there could not be read back: the device or the"
                " server failed: check its log, or set run.dir to another file system"
            )

    def _restore(self, path: Path) -> None:
        manifest = load_manifest(path)
        problems = [
            problem
            for name in list(manifest.files)[self._comm.rank :: self._comm.size]
            for problem in verify_metadata(path, manifest, name)
        ]
        assert not problems, problems
        load_state(self._state, path, manifest)

    def _from_disk(self, own: Path, work: Callable[[], None]) -> float:
        """Time what reads a file that the kernel does not have in memory."""
        if own.exists():
            drop_from_cache(own)
        return self._time(work)

    def _time(self, work: Callable[[], None]) -> float:
        """Return the seconds until all ranks are done, which begin together."""
        barrier(self._comm, self._waiter)
        start = time.perf_counter()
        with together(self._comm, self._waiter):
            work()
        return self._slowest(time.perf_counter() - start)

    def _slowest(self, seconds: float) -> float:
        return float(gather_rows(self._comm, self._waiter, np.array([seconds])).max())

    def _report(self, rounds: _Rounds, num_bytes: int) -> dict[str, Any]:
        seconds = rounds.seconds
        return {
            "benchmark": "checkpoint",
            "ranks": self._comm.size,
            "directory": str(self._session.directory.path.parent),
            "bytes": num_bytes,
            "rounds": len(rounds.blocked_s),
            **{f"blocked_{name}": value for name, value in _spread(rounds.blocked_s).items()},
            **{
                name: {**_spread(seconds[name]), "bytes_per_s": num_bytes / _median(seconds[name])}
                for name in _MEASURES
            },
            "write_of_dd": _median_ratio(seconds["dd_write"], seconds["write"]),
            "restore_of_dd": _median_ratio(seconds["dd_read"], seconds["restore"]),
        }


def _dd(operands: Sequence[str], num_bytes: int, handles: tuple[int, ...] = ()) -> None:
    """Move bytes with ``dd``."""
    if not num_bytes:
        return
    words = ["dd", *operands, f"bs={_BLOCK}", f"count={num_bytes}", "iflag=count_bytes,fullblock", "status=none"]
    done = subprocess.run(words, capture_output=True, text=True, pass_fds=handles, check=False)
    if done.returncode:
        raise DiskError(f"{' '.join(words)}: {done.stderr.strip()}")


def _median(values: Sequence[float]) -> float:
    return float(statistics.median(values))


def _median_ratio(dividends: Sequence[float], divisors: Sequence[float]) -> float:
    return _median([dividend / divisor for dividend, divisor in zip(dividends, divisors, strict=True)])


def _spread(values: Sequence[float]) -> dict[str, float]:
    low, high = np.quantile(values, [0.1, 0.9]).tolist()
    return {"s": _median(values), "p10_s": low, "p90_s": high}
