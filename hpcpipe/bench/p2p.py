"""``hpcpipe bench p2p``: what messages between neighbours in a pipeline take."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hpcpipe.bench.config import load_for_any_grid
from hpcpipe.bench.result import BenchResult
from hpcpipe.cluster.environment import rank_hint
from hpcpipe.errors import UsageError
from hpcpipe.mpi import runtime
from hpcpipe.mpi.agree import together
from hpcpipe.mpi.channel import Channel, MessageMode
from hpcpipe.mpi.collectives import gather_rows
from hpcpipe.mpi.ping import measure_pair
from hpcpipe.mpi.runtime import World
from hpcpipe.mpi.wait import Waiter
from hpcpipe.train.leave import leaving_together
from hpcpipe.train.setup import MESSAGES

SIZES = tuple(1024 * 4**power for power in range(9))
"""1 KiB to 64 MiB."""

_TIMEOUT_S = 60.0
_MOVED_BYTES = 256 << 20
_LEAST_ROUNDS, _MOST_ROUNDS = 10, 200


def bench_p2p(sizes: Sequence[int], config_path: Path | None = None, overrides: Sequence[str] = ()) -> BenchResult:
    """Measure messages between neighbours, on all ranks that were started together.

    Ranks 0 and 1, 2 and 3 and so on send each other messages as the trainer does, all pairs at the same time: receives
    are posted ahead, sends do not block, and waiting is the trainer's. What is told is the slowest pair.

    Parameters
    ----------
    sizes : sequence of int
        Bytes of the messages, each at least 1.
    config_path : Path or None
        A configuration, whose residual stream of one microbatch is one more size.
    overrides : sequence of str
        ``section.key=value`` each.

    Returns
    -------
    BenchResult
        Its report has ``benchmark ranks pairs library cores sizes``; each size has ``bytes``, ``is_stream`` (whether it
        is the configuration's), ``rounds``, ``one_way_s p10_s p90_s bytes_per_s`` (from the start of a send until the
        receiver has the message: half of a round trip), and ``both_ways_s both_ways_p10_s both_ways_p90_s
        both_ways_bytes_per_s`` (until two messages that neighbours send each other at the same time are there; the
        rate counts both).

    Raises
    ------
    UsageError
        There is only one rank, or a size or the configuration is wrong, or overrides are without one.
    """
    if overrides and config_path is None:
        raise UsageError(f"--set {overrides[0]}: there is no CONFIG whose key it could override")
    hint = rank_hint()
    if hint is None or hint[1] < 2:
        raise UsageError("bench p2p needs at least 2 ranks: run `hpcpipe launch -n 2 bench p2p`")
    world = runtime.start()
    report = None
    with leaving_together(world, None) as outcome:
        report = _measure(world, sizes, config_path, overrides)
    runtime.stop(world)
    return BenchResult(outcome.code, report if world.rank == 0 else None)


def _measure(world: World, sizes: Sequence[int], config_path: Path | None, overrides: Sequence[str]) -> dict[str, Any]:
    waiter = Waiter(_TIMEOUT_S, owns_core=world.owns_core)
    streams: list[int] = []
    with together(world.comm, waiter):
        binding = world.bind(num_threads=1)
        mode = MessageMode.parse(os.environ.get(MESSAGES, ""))
        if any(size < 1 for size in sizes):
            raise UsageError(f"--sizes {','.join(map(str, sizes))}: messages have at least 1 byte")
        if config_path is not None:
            streams = [_stream_bytes(config_path, overrides)]
    channel = Channel(world.comm, waiter, mode)
    # Every rank may have read another file.
    streams = gather_rows(world.comm, waiter, np.array(streams, np.int64))[0].tolist()
    rows = []
    for num_bytes in sorted({*sizes, *streams}):
        rounds = min(max(_MOVED_BYTES // num_bytes, _LEAST_ROUNDS), _MOST_ROUNDS)
        taken = measure_pair(world.comm, waiter, channel, num_bytes, rounds)
        one_way, both_ways = (_slowest(world, waiter, seconds) for seconds in taken)
        rows.append(
            {
                "bytes": num_bytes,
                "is_stream": num_bytes in streams,
                "rounds": rounds,
                "one_way_s": one_way[1],
                "p10_s": one_way[0],
                "p90_s": one_way[2],
                "bytes_per_s": num_bytes / one_way[1],
                "both_ways_s": both_ways[1],
                "both_ways_p10_s": both_ways[0],
                "both_ways_p90_s": both_ways[2],
                "both_ways_bytes_per_s": 2 * num_bytes / both_ways[1],
            }
        )
    return {
        "benchmark": "p2p",
        "ranks": world.size,
        "pairs": world.size // 2,
        "library": runtime.library_version(),
        "cores": binding.describe(),
        "sizes": rows,
    }


def _stream_bytes(config_path: Path, overrides: Sequence[str]) -> int:
    """Return the bytes of what crosses a stage boundary for one microbatch: float32 (batch * context, width)."""
    config = load_for_any_grid(config_path, overrides)
    return 4 * config.parallel.microbatch_size * config.model.context * config.model.width


def _slowest(world: World, waiter: Waiter, seconds: Sequence[float]) -> list[float]:
    """Return the 10th, 50th and 90th percentile of the pair with the largest median; all ranks call it."""
    own = np.percentile(seconds, (10, 50, 90)) if seconds else np.zeros(3)
    rows = gather_rows(world.comm, waiter, own)
    figures: list[float] = rows[int(np.argmax(rows[:, 1]))].tolist()
    return figures
