"""Going on after a stop: what is loaded, what is said about it, and which rows of the metrics stay."""

from pathlib import Path

from hpcpipe.data.reader import TokenFile
from hpcpipe.mpi.agree import together
from hpcpipe.train.restore import restore
from hpcpipe.train.session import Session
from hpcpipe.train.state import State


def resume_state(session: Session, state: State, resume: str, tokens: TokenFile) -> None:
    """Fill the state as `restore` does, say what was found, and drop the metrics of steps that will be run again."""

    def refused(path: Path, problem: str) -> None:
        session.console.say(f"passed over {path.name}: {problem}")
        session.events.add("checkpoint refused", path=str(path), problem=problem)

    restored = restore(state, session.grid, session.waiter, session.directory.checkpoints, resume, refused)
    with together(session.grid.comm, session.waiter):
        if session.metrics is not None:
            session.metrics.keep_until(state.step)
    if restored is None:
        return
    path, manifest = restored
    header = manifest.header
    grid = header["grid"]
    session.console.say(f"resumed from {path}: step {state.step}, written by {grid['pipeline']} x {grid['data']} ranks")
    session.events.add("resumed", step=state.step, path=str(path))
    for warning in _changes(header, state, tokens):
        session.console.say(f"warning: {warning}")


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
        "train.decay_steps": (then["train"]["decay_steps"], now.train.decay_steps),
    }
    for name, (before, after) in pairs.items():
        if before != after:
            warnings.append(f"{name} was {before} and is {after}: the run will not continue bit for bit")
    return warnings
