"""The last word about a run that failed, in ``status.json``; needs no MPI."""

import contextlib
import os
from pathlib import Path

from hpcpipe.cluster.environment import LAUNCH_ID
from hpcpipe.errors import ExitCode, HpcpipeError, InUseError, StoppedError
from hpcpipe.telemetry.metrics import last_step
from hpcpipe.telemetry.status import STATES, is_running, note_refusal, read_status, write_status
from hpcpipe.train.directory import RunDirectory
from hpcpipe.train.lock import is_held_by_another


def write_last_status(
    directory: Path | None, error: HpcpipeError, *, is_first: bool, launch_id: str | None = None
) -> None:
    """Say in the run directory why the run ended, unless the directory is another run's, or its run is done.

    A run that is done stays so until a start finds more steps to do: one that fails before has undone nothing.

    Never raises: nothing may come between an error and the end of the ranks.

    Parameters
    ----------
    directory : Path or None
        The run directory, which is made if need be; None if the configuration does not say.
    error : HpcpipeError
        Why.
    is_first : bool
        Whether this process is rank 0, or comes before it: then a lock that another process holds is another run's.
    launch_id : str, optional
        Name of the launch; that of this process's environment without it.
    """
    if directory is None or isinstance(error, InUseError):
        return
    with contextlib.suppress(Exception):
        # A wrong configuration is found before the lock is taken: the directory may be that of a run under way.
        if is_first and is_held_by_another(RunDirectory(directory).lock):
            return
        status = read_status(directory)
        launch_id = os.environ.get(LAUNCH_ID, "") if launch_id is None else launch_id
        if status.get("state") == STATES[ExitCode.DONE]:
            note_refusal(directory, launch_id, error.exit_code, str(error))
            return
        is_own = is_running(status, launch_id)
        directory.mkdir(parents=True, exist_ok=True)
        write_status(
            directory,
            last_step(RunDirectory(directory).metrics),
            error.exit_code,
            str(error),
            start_step=status.get("start_step") if is_own else None,
            stopped_by=error.by if isinstance(error, StoppedError) else "",
            launch_id=launch_id,
        )


def has_last_word(directory: Path | None, since_s: float) -> bool:
    """Return whether a process of this launch has said in ``status.json`` why the run ended.

    Parameters
    ----------
    directory : Path or None
        The run directory; None if the configuration does not say.
    since_s : float
        When this process began, by `time.time`; counts where the launch has no name.
    """
    if directory is None:
        return False
    launch_id = os.environ.get(LAUNCH_ID, "")
    with contextlib.suppress(OSError):
        status = read_status(directory)
        for word in (status, status.get("later_start") or {}):
            if word.get("exit_code") is not None and word.get("launch_id") == launch_id:
                return bool(launch_id) or (directory / "status.json").stat().st_mtime >= since_s
    return False
