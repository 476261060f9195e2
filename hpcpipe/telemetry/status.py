"""``status.json``: what became of a run, for scripts that must not trust the launcher's exit code."""

import json
import os
from pathlib import Path

from hpcpipe.cluster.environment import LAUNCH_ID
from hpcpipe.errors import ExitCode
from hpcpipe.telemetry.files import now, write_whole

STATES = {ExitCode.DONE: "done", ExitCode.STOPPED: "stopped"}


def write_status(directory: Path, step: int, exit_code: ExitCode | None, cause: str = "") -> None:
    """Write the state of a run.

    Parameters
    ----------
    directory : Path
        The run directory.
    step : int
        Last finished step.
    exit_code : ExitCode or None
        What the command returns; None while it runs.
    cause : str
        Why the run ended before its end.
    """
    status = {
        "state": "running" if exit_code is None else STATES.get(exit_code, "failed"),
        "step": step,
        "exit_code": None if exit_code is None else int(exit_code),
        "cause": cause,
        "time": now(),
        "launch_id": os.environ.get(LAUNCH_ID, ""),
    }
    write_whole(directory / "status.json", json.dumps(status, indent=1) + "\n")
