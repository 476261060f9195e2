"""What a copy of a rank's state takes, mapped by its neighbour and sent to it: ``mpirun -n 2 python FILE [MIB]``."""

import os
import statistics
import sys
import time

import numpy as np

from hpcpipe.mpi import runtime
from hpcpipe.mpi.channel import MessageMode
from hpcpipe.mpi.grid import line_grid
from hpcpipe.mpi.wait import Waiter
from hpcpipe.recovery.copies import Copies

ROUNDS, WARMUP, NUM_PARTS = 200, 20, 3


def main() -> None:
    """Print a row for each way."""
    world = runtime.start()
    mib = float(sys.argv[1]) if len(sys.argv) > 1 else 4.8
    size = int(mib * 2**20 / 4 / NUM_PARTS)
    parts = [np.ones(size, np.float32) for _ in range(NUM_PARTS)]
    processes = world.comm.allgather(os.getpid())
    for way, hosts in (("mapped", ["a"] * world.size), ("sent", [str(rank) for rank in range(world.size)])):
        copies = Copies(parts, 1)
        sizes = {rank: [size] * NUM_PARTS for rank in range(world.size)}
        copies.connect(line_grid(world.comm), Waiter(60.0, owns_core=True), MessageMode(), sizes, hosts, processes)
        taken = []
        for step in range(WARMUP + ROUNDS):
            begun = time.perf_counter(), time.process_time()
            copies.take(step)
            taken.append((time.perf_counter() - begun[0], time.process_time() - begun[1]))
        wall, cpu = (statistics.median(column) * 1e3 for column in zip(*taken[WARMUP:], strict=True))
        world.comm.Barrier()
        if world.rank == 0:
            print(f"| {way} | {mib:.1f} | {wall:.3f} | {cpu:.3f} |")
    runtime.stop(world)


if __name__ == "__main__":
    main()
