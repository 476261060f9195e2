"""Starting again: the newest checkpoint that is sound, and why others were passed over."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from hpcpipe.checkpoint.layout import candidates, locate, step_of
from hpcpipe.checkpoint.manifest import load_manifest
from hpcpipe.checkpoint.table import Manifest
from hpcpipe.checkpoint.verify import verify_file, verify_metadata
from hpcpipe.config.schema import Config
from hpcpipe.errors import DamagedError, UsageError
from hpcpipe.mpi.agree import together
from hpcpipe.mpi.collectives import broadcast_bytes
from hpcpipe.mpi.grid import Grid
from hpcpipe.mpi.wait import Waiter
from hpcpipe.train.load import check_model, load_state
from hpcpipe.train.state import State

Refused = Callable[[Path, str], None]
Checkpoint = tuple[Path, Manifest]


def find_checkpoint(
    config: Config,
    grid: Grid,
    waiter: Waiter,
    root: Path,
    resume: str,
    refused: Refused,
    damaged: Mapping[Path, str] | None = None,
    at_most: int = -1,
) -> Checkpoint | None:
    """Find the checkpoint to go on from.

    Its manifest, the sizes of its files, and what they hold around the tensors are checked here. The tensors are when
    they are read, so that every byte is read once; of the checkpoint of a run that is done, now.

    Parameters
    ----------
    config : Config
        Resolved, with the vocabulary.
    grid : Grid
        All ranks take part: each verifies its share of the files.
    waiter : Waiter
        Waits, with its deadline.
    root : Path
        The run's ``checkpoints`` directory.
    resume : str
        ``auto``: the newest checkpoint below `root` that verifies, or a new start if there is none. ``never``: a new
        start. Else the path of a checkpoint, or of a directory that holds some.
    refused : callable
        Told of every checkpoint that was passed over, and why.
    damaged : mapping of Path to str
        Checkpoints that turned out to be damaged when they were read, and how.
    at_most : int
        Latest step to go on from; -1 for any.

    Returns
    -------
    (Path, Manifest) or None
        None for a new start.

    Raises
    ------
    DamagedError
        If there are checkpoints and none of them is sound, or the one that was asked for does not.
    UsageError
        If the checkpoint is of another model, ``never`` would write over checkpoints, or the one that was asked for is
        older than others of the run.
    """
    damaged = damaged or {}
    problems = list(damaged.values())
    for path in _choose(grid, waiter, root, resume):
        if path in damaged or 0 <= at_most < (step_of(path.name) or 0):
            continue
        manifest = None
        try:
            with together(grid.comm, waiter):
                manifest = load_manifest(path)
                check = verify_file if manifest.step >= config.train.steps else verify_metadata
                for name in list(manifest.files)[grid.comm.rank :: grid.comm.size]:
                    _require_sound(check(path, manifest, name))
        except DamagedError as error:
            problems.append(str(error))
            refused(path, str(error))
            continue
        assert manifest is not None
        with together(grid.comm, waiter):
            check_model(config, path, manifest)
            if resume != "auto" and grid.comm.rank == 0:
                _require_newest(root, manifest.step)
        return path, manifest
    if problems:
        raise DamagedError(f"no checkpoint could be used: {'; '.join(problems)}").on_all()
    return None


def restore(state: State, grid: Grid, waiter: Waiter, found: Checkpoint | None) -> None:
    """Fill the state from a checkpoint, or with starting values.

    Parameters
    ----------
    state : State
        Filled.
    grid : Grid
        All ranks take part.
    waiter : Waiter
        Waits, with its deadline.
    found : (Path, Manifest) or None
        What `find_checkpoint` returned.

    Raises
    ------
    DamagedError
        On every rank, if the checkpoint is damaged; the state is then undefined.
    """
    if found is None:
        state.fill_initial()
        return
    with together(grid.comm, waiter):
        load_state(state, *found)


def _choose(grid: Grid, waiter: Waiter, root: Path, resume: str) -> list[Path]:
    """Return the checkpoints to try, as rank 0 sees them."""
    paths: list[Path] = []
    with together(grid.comm, waiter):
        if grid.comm.rank == 0:
            existing = candidates(root)
            if resume == "never" and existing:
                raise UsageError(
                    f"--resume never: {root} holds {len(existing)} checkpoints, the newest {existing[0].name}, which a"
                    " new start would mix with its own: choose another run.name, or remove the run directory"
                )
            if resume == "auto":
                paths = existing
            elif resume != "never":
                paths = locate(Path(resume))
    content = b"\0".join(map(os.fsencode, paths)) if grid.comm.rank == 0 else None
    names = broadcast_bytes(grid.comm, waiter, content, 0)
    return [Path(os.fsdecode(name)) for name in names.split(b"\0") if name]


def _require_newest(root: Path, step: int) -> None:
    """Refuse to go back in a directory that holds later steps: they would be taken for the new run's."""
    later = [path for path in candidates(root) if (step_of(path.name) or 0) > step]
    if later:
        raise UsageError(
            f"{root} holds {later[0].name} and {len(later) - 1} more checkpoints later than step {step}, which the next"
            " start would take for this run's: move them away, or go on under another run.name"
        )


def _require_sound(problems: list[str]) -> None:
    if problems:
        raise DamagedError("; ".join(problems))
