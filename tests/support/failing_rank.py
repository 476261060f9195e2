"""``hpcpipe`` with an exception that nobody expects on one rank: ``failing_rank.py RANK STEP launch -n 3 train ...``.

The ranks run this file too, as ``failing_rank.py RANK STEP -m hpcpipe train ...``. STEP may also be ``start``, or
``disk`` for an error of the disk at the start.
"""

import sys

from hpcpipe.cli import launch, main
from hpcpipe.cluster.environment import rank_hint

RANK, STEP, ARGUMENTS = int(sys.argv[1]), sys.argv[2], sys.argv[3:]


def fail_in_step() -> None:
    from hpcpipe.train.step import Trainer

    run_step = Trainer.run

    def run(self: Trainer, step: int, stop: bool):
        if step == int(STEP):
            raise ZeroDivisionError("made by a test")
        return run_step(self, step, stop)

    Trainer.run = run


def fail_at_start() -> None:
    from hpcpipe.errors import DiskError
    from hpcpipe.train import run

    def compile_kernels(*arguments: object, **options: object) -> None:
        raise (DiskError if STEP == "disk" else ZeroDivisionError)("made by a test")

    run.compile_kernels = compile_kernels


if __name__ == "__main__":
    if ARGUMENTS[0] == "launch":
        launch.python_command = lambda: [sys.executable, *sys.argv[:3]]
    else:
        ARGUMENTS = ARGUMENTS[2:]
        hint = rank_hint()
        if hint is not None and hint[0] == RANK:
            fail_in_step() if STEP.isdecimal() else fail_at_start()
    sys.exit(main.main(ARGUMENTS))
