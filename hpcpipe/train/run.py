"""A training run from start to end, on every rank."""

import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import hpcpipe
from hpcpipe.config.check import check_data, check_stages, resolve
from hpcpipe.config.dump import to_toml
from hpcpipe.config.load import load, run_directory
from hpcpipe.config.schema import Config
from hpcpipe.data.prepare import default_path, ensure_prepared
from hpcpipe.data.reader import TokenFile
from hpcpipe.data.windows import HeldOut, Samples
from hpcpipe.errors import DiskError, ExitCode, HpcpipeError, InUseError
from hpcpipe.kernels import warm
from hpcpipe.model.gpt2 import count_parameters
from hpcpipe.mpi import runtime
from hpcpipe.mpi.agree import together
from hpcpipe.mpi.channel import MessageMode
from hpcpipe.mpi.collectives import barrier
from hpcpipe.mpi.grid import make_grid
from hpcpipe.mpi.runtime import World
from hpcpipe.mpi.wait import Waiter
from hpcpipe.schedule.simulate import Costs, simulate
from hpcpipe.telemetry.console import Console
from hpcpipe.telemetry.events import EventLog
from hpcpipe.telemetry.files import read_lines, write_whole
from hpcpipe.telemetry.status import write_status
from hpcpipe.train.batches import TrainingBatches
from hpcpipe.train.directory import RunDirectory
from hpcpipe.train.evaluate import Evaluator
from hpcpipe.train.finish import show_compression, show_sample
from hpcpipe.train.lock import RunLock, is_held_by_another
from hpcpipe.train.loop import Loop
from hpcpipe.train.peak import measure_peak_flops
from hpcpipe.train.restore import restore
from hpcpipe.train.session import Session, build_schedule
from hpcpipe.train.state import State, build_state
from hpcpipe.train.step import Trainer
from hpcpipe.train.stop import StopRequest

MESSAGES = "HPCPIPE_TEST_MESSAGES"

_SPEAK_S = 0.5
_LONGEST_SPEAK_S = 2.0


def train(config_path: Path, overrides: Sequence[str], resume: str) -> ExitCode:
    """Train as a configuration says, on all ranks that were started together.

    Whatever happens, every rank leaves: an error that all ranks know is told by rank 0; one that hits a single rank is
    told by that rank, which then ends the others.

    Parameters
    ----------
    config_path : Path
        The TOML file.
    overrides : sequence of str
        ``section.key=value`` each.
    resume : str
        ``auto``, ``never``, or the path of a checkpoint.

    Returns
    -------
    ExitCode
        Also written to ``status.json``.
    """
    world = runtime.start()
    directory = run_directory(config_path, overrides)
    try:
        code = _train(world, config_path, overrides, resume)
    except HpcpipeError as error:
        if not error.on_all_ranks:
            _let_lower_ranks_speak(world)
        if world.rank == 0 or not error.on_all_ranks:
            _tell(world, error)
            _write_last_status(world, directory, error)
        code = error.exit_code
        if not error.on_all_ranks:
            runtime.abort(code)
    except BaseException as error:
        _let_lower_ranks_speak(world)
        runtime.report_traceback(world)
        cause = f"rank {world.rank}: {type(error).__name__}: {error}"
        _write_last_status(world, directory, HpcpipeError(cause))
        runtime.abort(ExitCode.RANK_FAILED)
        raise
    runtime.stop(world)
    return code


def _train(world: World, config_path: Path, overrides: Sequence[str], resume: str) -> ExitCode:
    stop = StopRequest()
    waiter = Waiter(timeout_s=600.0)
    with together(world.comm, waiter):
        config = resolve(load(config_path, overrides), world.size)
        schedule = build_schedule(config)
        config = check_stages(config, schedule.num_stages)
        mode = MessageMode.parse(os.environ.get(MESSAGES, ""))
    waiter.timeout_s = config.parallel.timeout_s
    directory = RunDirectory.of(config.run)
    lock = RunLock(directory.lock)
    with together(world.comm, waiter):
        if world.rank == 0:
            _open(directory, lock, config)
    try:
        grid = make_grid(world.comm, config.parallel.pipeline, config.parallel.data)
        console = Console(config.telemetry.console if world.rank == 0 else "quiet")
        events = EventLog(directory.events if world.rank == 0 else None)
        session = Session(config, schedule, directory, grid, waiter, mode, console, events)
        session.status(0, None)
        events.add("started", hpcpipe=hpcpipe.__version__, ranks=world.size, pid=os.getpid(), resume=resume)
        _compile(session, world)
        code = _run(session, stop, resume)
        grid.free()
        return code
    finally:
        if world.rank == 0:
            lock.release()


def _open(directory: RunDirectory, lock: RunLock, config: Config) -> None:
    """Make and lock the run directory, and write the resolved configuration to it."""
    try:
        directory.path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DiskError(f"run.dir = {config.run.dir}: {directory.path} could not be made ({error.strerror}): choose another run.dir") from error
    lock.acquire()
    write_whole(directory.config, to_toml(config))


def _compile(session: Session, world: World) -> None:
    """Compile the kernels on one rank per node; the others load them from its cache."""

    def report(name: str, index: int, total: int) -> None:
        session.console.say(f"compiling kernels for this processor, once: {index}/{total} {name}")

    if world.local_rank == 0:
        warm.compile_all(None if warm.is_compiled() else report)
    barrier(world.comm, session.waiter)
    if world.local_rank != 0:
        warm.compile_all(None)


def _run(session: Session, stop: StopRequest, resume: str) -> ExitCode:
    """Build what is trained, go on from the last checkpoint, and train to the end."""
    grid, waiter, console = session.grid, session.waiter, session.console
    tokens = _open_tokens(session)
    with together(grid.comm, waiter):
        config = session.config = check_data(session.config, tokens.vocab)
        training, validation = tokens.split(config.data.validation_fraction)
        samples = Samples(training, config.model.context, config.run.seed)
        held_out = HeldOut(validation, config.model.context, config.data.validation_samples)
    state = build_state(config, session.schedule.stage_to_rank, grid.stage_rank)
    _introduce(session, state, tokens)
    _restore(session, state, resume, tokens)
    if state.step >= config.train.steps:
        console.say(f"nothing to do: step {state.step} is done and train.steps = {config.train.steps}")
        session.status(state.step, ExitCode.DONE)
        return ExitCode.DONE

    per_replica = config.parallel.microbatches // grid.data
    local = range(grid.replica * per_replica, (grid.replica + 1) * per_replica)
    batches = TrainingBatches(
        samples, config.parallel.microbatches, local, config.parallel.microbatch_size, config.model.context
    )
    trainer = Trainer(state, session.schedule, grid, waiter, batches, session.mode)
    evaluator = Evaluator(state, grid, waiter, held_out, session.mode) if held_out.num_samples else None
    peak_flops = measure_peak_flops(grid, waiter)
    evaluation = Loop(session, state, trainer, evaluator, stop, _identity(tokens), peak_flops).run()

    if evaluation is not None:
        show_compression(session, held_out, evaluation)
    show_sample(session, state, tokens.tokenizer)
    session.events.add("done", step=state.step)
    session.status(state.step, ExitCode.DONE)
    return ExitCode.DONE


def _open_tokens(session: Session) -> TokenFile:
    """Prepare the token file if the configuration names only a source, and open it on every rank."""
    data, comm = session.config.data, session.grid.comm
    path = Path(data.file) if data.file else default_path(data.source, Path(session.config.run.dir))
    with together(comm, session.waiter):
        if comm.rank == 0 and not data.file:
            ensure_prepared(data.source, path, session.console.say)
    tokens = None
    with together(comm, session.waiter):
        tokens = TokenFile(path)
    assert tokens is not None
    return tokens


def _introduce(session: Session, state: State, tokens: TokenFile) -> None:
    """Say what is about to run."""
    config, grid, say = session.config, session.grid, session.console.say
    model, parallel = config.model, config.parallel
    say(f"hpcpipe {hpcpipe.__version__}: {grid.comm.size} ranks = pipeline of {grid.pipeline} x {grid.data} replicas")
    timeline = simulate(session.schedule, Costs.uniform(session.schedule))
    say(
        f"schedule: {parallel.schedule}, {parallel.chunks} stage(s) per rank, {parallel.microbatches} microbatches of"
        f" {parallel.microbatch_size} samples; bubble {timeline.bubble / timeline.makespan:.0%} if all stages take the"
        " same time"
    )
    say(
        f"model: {model.kind}, {model.layers} layers, width {model.width}, {model.heads} heads,"
        f" context {model.context}, {count_parameters(state.model):,} parameters"
    )
    say(f"data: {tokens.path}, {tokens.num_tokens:,} tokens in {tokens.num_documents:,} documents of {tokens.source}")
    say(f"kernels: {warm.describe()}")
    say(f"run directory: {session.directory.path}")


def _restore(session: Session, state: State, resume: str, tokens: TokenFile) -> None:
    """Fill the state, and drop the metrics of steps that will be run again."""

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


def _identity(tokens: TokenFile) -> dict[str, str]:
    return {"digest": tokens.digest, "tokenizer": tokens.tokenizer}


def _changes(header: dict[str, object], state: State, tokens: TokenFile) -> list[str]:
    """Name what makes the steps after a restart differ from those of a run that never stopped."""
    then, now = header["config"], state.config
    warnings = []
    if header["data"] != _identity(tokens):
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


def _let_lower_ranks_speak(world: World) -> None:
    """Wait a moment: if a lower rank met the same error, it tells it and ends this rank meanwhile."""
    # The launcher ends ranks with SIGTERM, which so far was a request to stop after the step.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(min(_SPEAK_S * world.rank, _LONGEST_SPEAK_S))


def _tell(world: World, error: HpcpipeError) -> None:
    """Print an error once, with its rank if only one rank met it."""
    where = "" if error.on_all_ranks else f"rank {world.rank} of {world.size}: "
    kind = "stopped" if error.exit_code is ExitCode.STOPPED else "error"
    sys.stderr.write(f"hpcpipe: {kind}: {where}{error}\n")
    sys.stderr.flush()


def _write_last_status(world: World, directory: Path | None, error: HpcpipeError) -> None:
    """Say in the run directory why the run ended, unless the directory is another run's."""
    if directory is None or isinstance(error, InUseError):
        return
    try:
        # A wrong configuration is found before the lock is taken: the directory may be that of a run under way.
        if world.rank == 0 and is_held_by_another(RunDirectory(directory).lock):
            return
        directory.mkdir(parents=True, exist_ok=True)
        write_status(directory, _last_step(directory), error.exit_code, str(error))
    except (DiskError, OSError):
        return


def _last_step(directory: Path) -> int:
    """Return the step of the last row of the metrics."""
    return max((int(row["step"]) for row in read_lines(directory / "metrics.jsonl")), default=0)
