"""What every rank runs in the tests of `hpcpipe launch`: a run without MPI that keeps a status.json.

``miniature_run.py DIRECTORY BEHAVIOUR``; each rank writes its process id to ``DIRECTORY/pid-RANK``.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

from hpcpipe.cluster.environment import die_with_parent

DIRECTORY, BEHAVIOUR = Path(sys.argv[1]), sys.argv[2]
RANK = int(os.environ["OMPI_COMM_WORLD_RANK"])
LIMIT_S = 30.0
stop_signals: list[int] = []


def remember(number: int, frame: FrameType | None) -> None:
    stop_signals.append(number)


def write(name: str, text: str) -> None:
    partial = DIRECTORY / f"{name}.partial"
    partial.write_text(text)
    partial.rename(DIRECTORY / name)


def status(state: str, exit_code: int | None, cause: str = "") -> None:
    if RANK == 0:
        launch_id = os.environ["HPCPIPE_LAUNCH_ID"]
        content = {"state": state, "exit_code": exit_code, "cause": cause, "launch_id": launch_id}
        write("status.json", json.dumps(content))


def wait_for_stop() -> None:
    deadline = time.monotonic() + LIMIT_S
    while not stop_signals and time.monotonic() < deadline:
        time.sleep(0.01)


def main() -> int:
    die_with_parent()
    if BEHAVIOUR not in ("starting", "in-use"):
        signal.signal(signal.SIGUSR1, remember)
        status("running", None)
    write(f"pid-{RANK}", str(os.getpid()))
    if BEHAVIOUR == "done":
        print(f"terminal {os.environ.get('HPCPIPE_TERMINAL')}", flush=True)
        print("partial", end="", file=sys.stderr, flush=True)
        status("done", 0)
        return 0
    if BEHAVIOUR == "silent":
        return 0
    if BEHAVIOUR == "damaged":
        if RANK == 0:
            print("hpcpipe: error: tokens.h5: truncated", file=sys.stderr, flush=True)
        # mpirun may lose the text of rank 0 where another rank fails first.
        status("failed", 65, "tokens.h5: truncated")
        return 65
    if BEHAVIOUR == "in-use":
        return 73
    if BEHAVIOUR in ("one-dies", "all-die"):
        if RANK == 1 or BEHAVIOUR == "all-die":
            time.sleep(1.5)
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(4)
        status("done", 0)
        return 0
    if BEHAVIOUR == "hangs-at-end":
        status("done", 0)
        time.sleep(LIMIT_S)
    if BEHAVIOUR == "deaf":
        time.sleep(LIMIT_S)
    wait_for_stop()
    if BEHAVIOUR == "late":
        status("stopped", 75)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(LIMIT_S)
    if not stop_signals:
        return 1
    write(f"signal-{RANK}", signal.Signals(stop_signals[0]).name)
    status("stopped", 75)
    return 75


sys.exit(main())
