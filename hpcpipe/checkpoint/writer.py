"""The process beside a rank that writes its checkpoints: ``python -m hpcpipe.checkpoint.writer PARENT HANDLE``.

It reads orders from standard input, one JSON object per line, and answers each on standard output with one: ``do`` as
in the order and what came of it, or ``failed``, an exit code, and ``problem``, a sentence.
"""

import json
import os
import signal
import sys
from collections.abc import Sequence

from hpcpipe.cluster.environment import parent_signal

_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_LOWEST_PRIORITY = 19


def main(arguments: Sequence[str]) -> None:
    """Carry out orders until there are no more, or the rank ends."""
    parent, handle = map(int, arguments)
    for number in _IGNORED:
        # mpirun may send to all processes of a rank what only the rank is to act on.
        signal.signal(number, signal.SIG_IGN)
    parent_signal(signal.SIGKILL)
    if os.getppid() != parent:
        return
    os.nice(_LOWEST_PRIORITY)
    # Only now, since the imports take longer than the start of the rank may be delayed.
    from hpcpipe.checkpoint.orders import Writer

    writer = Writer(handle)
    for line in sys.stdin.buffer:
        answer = writer.answer(json.loads(line))
        try:
            sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
            sys.stdout.buffer.flush()
        except OSError:
            return


if __name__ == "__main__":
    main(sys.argv[1:])
