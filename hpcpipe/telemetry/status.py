"""``status.json``: what became of a run, for scripts that must not trust the launcher's exit code."""

import json
import os
from pathlib import Path
from typing import Any

from hpcpipe.cluster import slurm
from hpcpipe.cluster.environment import LAUNCH_ID
from hpcpipe.errors import ExitCode
from hpcpipe.telemetry.files import now, write_whole
from hpcpipe.telemetry.metrics import last_step

STATES: dict[int, str] = {ExitCode.DONE: "done", ExitCode.STOPPED: "stopped"}


def write_status(
    directory: Path,
    step: int,
    exit_code: ExitCode | None,
    cause: str = "",
    *,
    start_step: int | None = None,
    stopped_by: str = "",
    launch_id: str | None = None,
) -> None:
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
    start_step : int, optional
        Step that this start goes on from; None until its first step begins, or if it has none.
    stopped_by : str
        Who asked a stopped run to stop, see `hpcpipe.errors.StoppedError`.
    launch_id : str, optional
        Name of the launch; that of this process's environment without it.
    """
    status = {
        "state": "running" if exit_code is None else STATES.get(exit_code, "failed"),
        "step": step,
        "start_step": step if start_step is None and exit_code is not None else start_step,
        "checkpoint_step": newest_checkpoint(directory),
        "exit_code": None if exit_code is None else int(exit_code),
        "cause": cause,
        "stopped_by": stopped_by,
        "time": now(),
        "launch_id": os.environ.get(LAUNCH_ID, "") if launch_id is None else launch_id,
        "job": _job(),
    }
    write_whole(directory / "status.json", json.dumps(status, indent=1) + "\n")


def read_status(directory: Path) -> dict[str, Any]:
    """Return what ``status.json`` says, nothing if there is none or it is no object."""
    try:
        status = json.loads((directory / "status.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return status if isinstance(status, dict) else {}


def is_running(status: dict[str, Any], launch_id: str) -> bool:
    """Return whether a status says that a launch's run is running."""
    return bool(status) and status.get("launch_id") == launch_id and status.get("exit_code") is None


def end_status(directory: Path, launch_id: str, exit_code: int, cause: str, stopped_by: str = "") -> None:
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
    stopped_by : str
        As for `write_status`.

    Raises
    ------
    DiskError
        If the file system refuses; the file still says that the run is running.
    """
    status = read_status(directory)
    if not is_running(status, launch_id):
        return
    step = last_step(directory / "metrics.jsonl") or status.get("step", 0)
    start_step = status.get("start_step")
    end = {
        "state": STATES.get(exit_code, "failed"),
        "step": step,
        "start_step": step if start_step is None else start_step,
        "checkpoint_step": newest_checkpoint(directory),
        "exit_code": int(exit_code),
        "cause": cause,
        "stopped_by": stopped_by,
        "time": now(),
    }
    write_whole(directory / "status.json", json.dumps({**status, **end}, indent=1) + "\n")


def note_refusal(directory: Path, launch_id: str, exit_code: int, cause: str) -> None:
    """Add to the status of a run that is done that a later start failed, which has undone nothing.

    Parameters
    ----------
    directory : Path
        The run directory.
    launch_id : str
        Name of the later start.
    exit_code : int
        What its command returns.
    cause : str
        Why it failed.

    Raises
    ------
    DiskError
        If the file system refuses; the file is as before.
    """
    later = {"exit_code": int(exit_code), "cause": cause, "time": now(), "launch_id": launch_id}
    status = {**read_status(directory), "later_start": later}
    write_whole(directory / "status.json", json.dumps(status, indent=1) + "\n")


def newest_checkpoint(directory: Path) -> int:
    """Return the step of the newest complete checkpoint, 0 without any; only names are read."""
    try:
        found = [path for path in (directory / "checkpoints").glob("step-*") if path.is_dir() and not path.is_symlink()]
    except OSError:
        return 0
    names = (path.name.removeprefix("step-") for path in found)
    return max((int(name) for name in names if name.isdecimal()), default=0)


def _job() -> dict[str, int] | None:
    """Return Slurm's number of this job, and how often it was requeued."""
    found = slurm.allocation()
    return {"id": found.job_id, "restart_count": found.restart_count} if found else None
