"""Two ranks exchange one message: ``mpirun -n 2 python -m hpcpipe.mpi.selftest``."""

import json
import sys

from hpcpipe.config.threads import choose_threads
from hpcpipe.mpi import runtime

MESSAGE = b"from one rank to the other"


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
    arrived = received == MESSAGE
    num_threads = choose_threads(0, world.tightest)
    binding = world.bind(num_threads)
    if world.rank == 0:
        facts = {
            "size": world.size,
            "arrived": arrived,
            "library": runtime.library_version(),
            "threads": num_threads,
            "cores": binding.describe(),
        }
        sys.stdout.write(json.dumps(facts) + "\n")
        sys.stdout.flush()
    runtime.stop(world)
    return 0 if arrived else 1


if __name__ == "__main__":
    sys.exit(main())
