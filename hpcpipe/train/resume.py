"""Going on after a stop: what is loaded, what is said about it, and which rows of the metrics stay."""

from collections.abc import Mapping
from pathlib import Path

from hpcpipe.data.reader import TokenFile
from hpcpipe.errors import DamagedError
from hpcpipe.kernels.features import family
from hpcpipe.mpi.agree import together
from hpcpipe.train.restore import Checkpoint, find_checkpoint, restore
from hpcpipe.train.session import Session
from hpcpipe.train.state import State


def find_start(
    session: Session, resume: str, at_most: int = -1, damaged: Mapping[Path, str] | None = None
) -> Checkpoint | None:
    """Find a checkpoint as `find_checkpoint` does, and say which were passed over."""

    def refused(path: Path, problem: str) -> None:
        _say_refused(session, path, problem)

    root = session.directory.checkpoints
    return find_checkpoint(session.config, session.grid, session.waiter, root, resume, refused, damaged, at_most)


def drop_later_metrics(session: Session, step: int) -> None:
    """Drop the metrics of steps after the one that the run goes on from."""
    with together(session.grid.comm, session.waiter):
        if session.metrics is not None:
            session.metrics.keep_until(step)


def resume_state(
    session: Session, state: State, found: Checkpoint | None, tokens: TokenFile, resume: str, at_most: int = -1
) -> None:
    """Fill the state as `restore` does, say from what, and drop the metrics of steps that will be run again.

    Where the checkpoint turns out to be damaged, the next older one is taken.

    Raises
    ------
    DamagedError
        On every rank, if there are checkpoints and none of them is sound.
    """
    damaged: dict[Path, str] = {}
    while True:
        try:
            restore(state, session.grid, session.waiter, found)
            break
        except DamagedError as error:
            assert found is not None
            damaged[found[0]] = str(error)
            _say_refused(session, found[0], str(error))
            found = find_start(session, resume, at_most, damaged)
    drop_later_metrics(session, state.step)
    if found is None:
        return
    path, manifest = found
    header = manifest.header
    grid = header["grid"]
    session.console.say(f"resumed from {path}: step {state.step}, written by {grid['pipeline']} x {grid['data']} ranks")
    session.events.add("resumed", step=state.step, path=str(path))
    for warning in _changes(header, state, tokens):
        session.console.say(f"warning: {warning}")


def _say_refused(session: Session, path: Path, problem: str) -> None:
    session.console.say(f"passed over {path.name}: {problem}")
    session.events.add("checkpoint refused", path=str(path), problem=problem)


def identity_of(tokens: TokenFile) -> dict[str, str]:
    """Return what a checkpoint remembers of the token file."""
    return {"digest": tokens.digest, "tokenizer": tokens.tokenizer}


def _changes(header: dict[str, object], state: State, tokens: TokenFile) -> list[str]:
    """Name what makes the steps after a restart differ from those of a run that never stopped."""
    then, now = header["config"], state.config
    warnings = []
    if header["data"] != identity_of(tokens):
        warnings.append("the token file is not the one that the checkpoint was trained on")
    assert isinstance(then, dict)
    pairs = {
        "run.seed": (then["run"]["seed"], now.run.seed),
        "parallel.microbatches": (then["parallel"]["microbatches"], now.parallel.microbatches),
        "parallel.microbatch_size": (then["parallel"]["microbatch_size"], now.parallel.microbatch_size),
        "parallel.lanes": (then["parallel"]["lanes"], now.parallel.lanes),
        "train.precision": (then["train"]["precision"], now.train.precision),
        "train.decay_steps": (then["train"]["decay_steps"], now.train.decay_steps),
    }
    if now.train.precision == "bf16" == then["train"]["precision"]:
        pairs["family of kernels"] = (header.get("kernels"), family())
    for name, (before, after) in pairs.items():
        if before != after:
            warnings.append(f"{name} was {before} and is {after}: the run will not continue bit for bit")
    return warnings
