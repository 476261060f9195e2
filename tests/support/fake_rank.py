"""A rank without MPI, in a process of its own: it shows what it does like a real one, and hangs as it is asked to.

``python -m support.fake_rank ROLE RUN_DIR HANG_S`` with the variables of a launcher. Roles: ``wait:PEER:TAG`` waits for
a message that never comes, ``spin`` computes with Python's lock held, ``work`` does steps, ``work:N`` does N of them.
"""

import sys
import time
from pathlib import Path

from hpcpipe.cluster.environment import rank_hint
from hpcpipe.errors import Interruption, RankError
from hpcpipe.schedule.action import Action, Kind
from hpcpipe.watch.beacon import NoBeacon
from hpcpipe.watch.layout import Phase
from hpcpipe.watch.start import attach

GAVE_UP = 4


def work(beacon: NoBeacon, first: int, last: int) -> None:
    """Do steps of 20 ms."""
    for step in range(first, last + 1):
        beacon.step(step)
        for kind in ("F", "B"):
            beacon.begin(kind, 0, 0)
            time.sleep(0.01)
            beacon.end()


def wait(beacon: NoBeacon, process: int, peer: int, tag: int, usual: int) -> None:
    """Wait for a message that has another tag than in the step before; recover twice, and wait again."""
    action = Action(Kind.RECV_F, process, 0)
    for attempt in range(1, 4):
        beacon.step(8)
        beacon.posted("RECV", action, peer, usual, 64)
        beacon.posted("SEND", Action(Kind.SEND_F, process, 0), (process + 1) % 2, usual, 64)
        beacon.step(9)
        beacon.begin("F", process, 0)
        beacon.posted("SEND", Action(Kind.SEND_F, process, 0), (process + 1) % 2, usual, 64)
        beacon.posted("RECV", action, peer, tag, 64)
        try:
            while True:
                beacon.nap("RECV", action, peer, tag, lambda: f"message {action}")
                time.sleep(0.001)
        except Interruption as interruption:
            print(f"reset {attempt}: {interruption}", flush=True)
            beacon.phase(Phase.RECOVER)
            beacon.epoch(attempt, process)
            beacon.phase(Phase.TRAIN)


def main() -> int:
    role, directory, hang_s = sys.argv[1], Path(sys.argv[2]), float(sys.argv[3])
    hint = rank_hint()
    assert hint is not None
    beacon = attach(None, lambda text: print(text, flush=True))
    beacon.configure(hang_s)
    if hint[0] == 0:
        (directory / "lock.json").write_text('{"fence": "ours"}')
        beacon.publish(directory, directory / "lock.json", "ours")
    beacon.epoch(0, hint[0])
    beacon.phase(Phase.TRAIN)
    name, *numbers = role.split(":")
    work(beacon, 1, 7)
    print("ready", flush=True)
    try:
        if name == "wait":
            wait(beacon, hint[0], int(numbers[0]), int(numbers[1]), usual=5)
        elif name == "spin":
            beacon.begin("F", 2, 1)
            # One call of C that keeps Python's lock.
            sum(range(10**12))
        elif name == "work":
            work(beacon, 8, int(numbers[0]) if numbers else 10**9)
    except RankError as error:
        print(f"gave up: {error}", flush=True)
        beacon.close(has_failed=True)
        return GAVE_UP
    beacon.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
