"""The last word about a run that failed, in ``status.json``; needs no MPI."""

import contextlib
from pathlib import Path

from hpcpipe.errors import HpcpipeError, InUseError
from hpcpipe.telemetry.metrics import last_step
from hpcpipe.telemetry.status import write_status
from hpcpipe.train.directory import RunDirectory
from hpcpipe.train.lock import is_held_by_another


def write_last_status(directory: Path | None, error: HpcpipeError, *, is_first: bool) -> None:
    """Say in the run directory why the run ended, unless the directory is another run's.

    Never raises: nothing may come between an error and the end of the ranks.

    Parameters
    ----------
    directory : Path or None
        The run directory, which is made if need be; None if the configuration does not say.
    error : HpcpipeError
        Why.
    is_first : bool
        Whether this process is rank 0, or comes before it: then a lock that another process holds is another run's.
    """
    if directory is None or isinstance(error, InUseError):
        return
    with contextlib.suppress(Exception):
        # A wrong configuration is found before the lock is taken: the directory may be that of a run under way.
        if is_first and is_held_by_another(RunDirectory(directory).lock):
            return
        directory.mkdir(parents=True, exist_ok=True)
        write_status(directory, last_step(RunDirectory(directory).metrics), error.exit_code, str(error))
