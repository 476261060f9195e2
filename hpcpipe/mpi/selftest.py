"""Ranks exchange one message: ``mpirun -n 2 python -m hpcpipe.mpi.selftest``."""

import json
import os
import sys

from hpcpipe.config.threads import choose_threads
from hpcpipe.mpi import runtime
from hpcpipe.mpi.collectives import gather_bytes
from hpcpipe.mpi.wait import Waiter

MESSAGE = b"from one rank to the other"
_TIMEOUT_S = 20.0


def main() -> int:
    """Send a message around all ranks; rank 0 prints one JSON object.

    Returns
    -------
    int
        0 where every rank got its neighbour's message, 1 where not.
    """
    world = runtime.start()
    received = bytearray(len(MESSAGE))
    world.comm.Sendrecv(
        MESSAGE, dest=(world.rank + 1) % world.size, recvbuf=received, source=(world.rank - 1) % world.size
    )
    num_threads = choose_threads(0, world.tightest)
    binding = world.bind(num_threads)
    own = {
        "arrived": received == MESSAGE,
        "name": os.uname().nodename if world.local_rank == 0 else None,
        "ranks": world.num_local_ranks,
        "cores": binding.describe(),
    }
    everyone = [
        json.loads(content) for content in gather_bytes(world.comm, Waiter(_TIMEOUT_S), json.dumps(own).encode())
    ]
    arrived = all(rank.pop("arrived") for rank in everyone)
    if world.rank == 0:
        facts = {
            "size": world.size,
            "arrived": arrived,
            "library": runtime.library_version(),
            "threads": num_threads,
            "cores": binding.describe(),
            "nodes": [rank for rank in everyone if rank["name"] is not None],
        }
        sys.stdout.write(json.dumps(facts) + "\n")
        sys.stdout.flush()
    runtime.stop(world)
    return 0 if arrived else 1


if __name__ == "__main__":
    sys.exit(main())
