"""``status.json``: what became of a run, for scripts that must not trust the launcher's exit code."""

import json
import os
from pathlib import Path

from hpcpipe.cluster.environment import LAUNCH_ID
from hpcpipe.errors import ExitCode
from hpcpipe.telemetry.files import now, write_whole
from hpcpipe.telemetry.metrics import last_step

STATES: dict[int, str] = {ExitCode.DONE: "done", ExitCode.STOPPED: "stopped"}


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


def end_status(directory: Path, launch_id: str, exit_code: int, cause: str) -> None:
    """Write the end of a run whose ranks were ended before they could, with the last step of its metrics.

    Does nothing unless the file says that this launch's run is still running.

    Parameters
    ----------
    directory : Path
        The run directory.
    launch_id : str
        Name of the launch.
    exit_code : int
        What the command returns.
    cause : str
        Why the run ended.

    Raises
    ------
    DiskError
        If the file system refuses; the file still says that the run is running.
    """
    path = directory / "status.json"
    try:
        status = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return
    if not isinstance(status, dict) or status.get("launch_id") != launch_id or status.get("exit_code") is not None:
        return
    end = {"state": STATES.get(exit_code, "failed"), "exit_code": int(exit_code), "cause": cause, "time": now()}
    step = last_step(directory / "metrics.jsonl") or status.get("step", 0)
    write_whole(path, json.dumps({**status, **end, "step": step}, indent=1) + "\n")
