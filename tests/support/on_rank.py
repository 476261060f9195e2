"""A pytest plugin for each rank of an SPMD test job: it writes a report, and ends the job when a test fails.

Without it a rank whose assertion fails leaves the others waiting in MPI for ever.
"""

import atexit
import faulthandler
import json
import os
import signal
import time
from pathlib import Path

import pytest

from hpcpipe.cluster.environment import die_with_parent, rank_hint

DIRECTORY = "RANK_REPORTS"
LIMIT_S = "RANK_TEST_LIMIT_S"
GRACE_S = 1.0
"""Time for the ranks that fail together with this one to write their reports too."""


class OnRank:
    """The hooks of one rank.

    The report is one JSON object per line: ``start`` of a test, ``result`` of each of its phases, and ``end`` of the
    session. Stacks of a crash or of a test beyond its limit go to a file of their own.
    """

    def __init__(self, rank: int, directory: Path | None) -> None:
        self.limit_s = float(os.environ.get(LIMIT_S, "120"))
        self.report = self.stacks = None
        if directory is not None:
            # Line buffering: a rank that is killed keeps what it has written.
            self.report = (directory / f"rank-{rank}.jsonl").open("w", buffering=1)
            self.stacks = (directory / f"rank-{rank}.stacks").open("w", buffering=1)
            faulthandler.enable(self.stacks)

    def write(self, event: str, **values: object) -> None:
        if self.report is not None:
            self.report.write(json.dumps({"event": event, "time_s": time.time(), **values}) + "\n")

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.write("start", test=nodeid)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        marker = item.get_closest_marker("timeout")
        limit_s = marker.args[0] if marker and marker.args else self.limit_s
        if self.stacks is not None:
            faulthandler.dump_traceback_later(limit_s, exit=True, file=self.stacks)

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_teardown(self) -> None:
        faulthandler.cancel_dump_traceback_later()

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.write("result", test=report.nodeid, phase="collection", outcome="failed", text=report.longreprtext)
            abort()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        text = report.longreprtext if report.failed else ""
        sections = [f"{title}:\n{content}" for title, content in report.sections] if report.failed else []
        self.write(
            "result",
            test=report.nodeid,
            phase=report.when,
            outcome=report.outcome,
            text="\n".join([text, *sections]),
        )
        if report.failed:
            abort()

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        self.write("end", status=int(exitstatus))
        if exitstatus not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            abort()


def start_mpi() -> None:
    """Start MPI as the program does, for the whole session; importing hpcpipe leaves it to its caller."""
    import mpi4py

    mpi4py.rc.initialize = mpi4py.rc.finalize = False
    from mpi4py import MPI

    if not MPI.Is_initialized():
        MPI.Init_thread(MPI.THREAD_FUNNELED)
        atexit.register(MPI.Finalize)


def abort() -> None:
    """End all ranks."""
    from mpi4py import MPI

    time.sleep(GRACE_S)
    MPI.COMM_WORLD.Abort(1)
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Take up work when this process is a rank."""
    hint = rank_hint()
    if config.pluginmanager.has_plugin("on-rank"):
        return
    start_mpi()
    if hint is None:
        return
    die_with_parent()
    directory = Path(os.environ[DIRECTORY]) if DIRECTORY in os.environ else None
    if directory is not None:
        config.option.basetemp = str(directory / f"rank-{hint[0]}-tmp")
    config.pluginmanager.register(OnRank(hint[0], directory), "on-rank")
