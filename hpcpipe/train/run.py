"""A training run from start to end, on every rank."""

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import hpcpipe
from hpcpipe.checkpoint.layout import candidates
from hpcpipe.cluster.slurm import AllocationEnd
from hpcpipe.config.check import check_data
from hpcpipe.config.dump import to_toml
from hpcpipe.config.interval import parse_interval
from hpcpipe.config.load import run_directory
from hpcpipe.data.prepare import default_path, ensure_prepared
from hpcpipe.data.reader import TokenFile
from hpcpipe.data.windows import HeldOut, Samples
from hpcpipe.errors import ExitCode, UsageError
from hpcpipe.kernels import warm
from hpcpipe.kernels.threads import Team
from hpcpipe.memory.block import huge_pages
from hpcpipe.model.gpt2 import count_parameters
from hpcpipe.mpi import runtime
from hpcpipe.mpi.agree import together
from hpcpipe.mpi.collectives import broadcast_bytes
from hpcpipe.mpi.grid import make_grid
from hpcpipe.mpi.runtime import World
from hpcpipe.telemetry.console import Console
from hpcpipe.telemetry.events import EventLog
from hpcpipe.telemetry.files import write_whole
from hpcpipe.telemetry.status import read_status
from hpcpipe.train.batches import TrainingBatches
from hpcpipe.train.cadence import Cadence, estimate_mtbf_s
from hpcpipe.train.checkpoints import Checkpoints, WriterMemory
from hpcpipe.train.directory import RunDirectory, open_directory
from hpcpipe.train.evaluate import Evaluator
from hpcpipe.train.finish import show_compression, show_sample
from hpcpipe.train.footprint import describe_allocated, describe_predicted
from hpcpipe.train.halt import HaltFile
from hpcpipe.train.leave import leaving_together
from hpcpipe.train.lock import RunLock
from hpcpipe.train.loop import Loop
from hpcpipe.train.peak import measure_peak_flops
from hpcpipe.train.plan import Plan, compare_with_prediction, describe_plan, make_plan, write_plan
from hpcpipe.train.resume import drop_later_metrics, find_start, identity_of, resume_state
from hpcpipe.train.session import Session
from hpcpipe.train.setup import SETUP_TIMEOUT_S, agree_on_setup, compile_kernels, leave_if_asked, require_own_memory
from hpcpipe.train.state import State, build_state
from hpcpipe.train.step import Trainer
from hpcpipe.train.stop import StopRequest


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
    # A process that is started before MPI cannot disturb it.
    writer = WriterMemory()
    world = runtime.start()
    code = ExitCode.DONE
    with leaving_together(world, run_directory(config_path, overrides)) as outcome:
        code = _train(world, config_path, overrides, resume, writer)
    writer.close()
    runtime.stop(world)
    return outcome.code or code


def _train(world: World, config_path: Path, overrides: Sequence[str], resume: str, writer: WriterMemory) -> ExitCode:
    stop = StopRequest()
    setup = agree_on_setup(world, config_path, overrides)
    config, waiter, binding = setup.config, setup.waiter, setup.binding
    directory = RunDirectory.of(config.run)
    console = Console(config.telemetry.console if world.rank == 0 else "quiet")
    lock = RunLock(directory.lock, say=console.say)
    events = EventLog(directory.events if world.rank == 0 else None, lock.check)
    with together(world.comm, waiter):
        if world.rank == 0:
            open_directory(directory, lock, console.say)
            # A run that has checkpoints keeps the configuration that it was trained with until it goes on.
            if not candidates(directory.checkpoints):
                write_whole(directory.config, to_toml(config))
    team = Team(config.parallel.threads, binding.own_cores(world.local_rank))
    try:
        grid = make_grid(world.comm, config.parallel.pipeline, config.parallel.data)
        local = world.num_local_ranks, world.num_local_cores
        session = Session(
            config, setup.schedule, directory, grid, *local, binding, team, waiter, setup.mode, console, events
        )
        if world.rank == 0:
            session.lock = lock
            _watch(session, stop)
            # A run that is done stays so until there are more steps to do.
            if read_status(directory.path).get("state") != "done":
                session.status(0, None)
        events.add("started", hpcpipe=hpcpipe.__version__, ranks=world.size, pid=os.getpid(), resume=resume)
        if len(setup.families) > 1 and config.train.precision == "bf16":
            console.say(
                f"warning: ranks have kernels of {' and '.join(setup.families)}, so bits depend on which rank computes"
                f" what: set HPCPIPE_KERNELS={setup.families[-1]} for the same bits everywhere"
            )
        compile_kernels(session, world, stop=stop)
        code = _run(session, stop, resume, writer)
        grid.free()
        return code
    finally:
        team.close()
        if world.rank == 0:
            lock.release()


def _watch(session: Session, stop: StopRequest) -> None:
    """Let rank 0 look for requests to stop that are no signals."""

    def warn(problem: str) -> None:
        session.console.say(f"warning: {problem}")
        session.events.add("halt file refused", problem=problem)

    stop.watch(HaltFile(session.directory.halt, warn), AllocationEnd())


def _run(session: Session, stop: StopRequest, resume: str, writer: WriterMemory) -> ExitCode:
    """Build what is trained, go on from the last checkpoint, and train to the end."""
    grid, waiter, console = session.grid, session.waiter, session.console
    tokens = _open_tokens(session)
    leave_if_asked(session, stop)
    with together(grid.comm, waiter):
        config = session.config = check_data(session.config, tokens.vocab)
        training, validation = tokens.split(config.data.validation_fraction)
        samples = Samples(training, config.model.context, config.run.seed)
        held_out = HeldOut(validation, config.model.context, config.data.validation_samples)
    found = find_start(session, resume)
    done = 0 if found is None else found[1].step
    if done >= config.train.steps:
        drop_later_metrics(session, done)
        console.say(f"nothing to do: step {done} is done and train.steps = {config.train.steps}")
        session.status(done, ExitCode.DONE)
        return ExitCode.DONE
    session.status(done, None)
    with together(grid.comm, waiter):
        # Layers are timed only where they fit; where the model is cut matters little here, and is not known yet.
        require_own_memory(session, replace(config, parallel=replace(config.parallel, partition="auto")))
    plan = make_plan(session)
    leave_if_asked(session, stop, done)
    config = session.config
    with together(grid.comm, waiter):
        needed = require_own_memory(session, config)
    state = build_state(config, session.schedule.stage_to_rank, grid.stage_rank, grid.replica, session.team)
    _introduce(session, state, tokens, plan, needed)
    resume_state(session, state, found, tokens, resume)
    session.begin(state.step)
    write_plan(session, plan)

    per_replica = config.parallel.microbatches // grid.data
    local = range(grid.replica * per_replica, (grid.replica + 1) * per_replica)
    batches = TrainingBatches(
        samples, config.parallel.microbatches, local, config.parallel.microbatch_size, config.model.context
    )
    trainer = Trainer(state, session.schedule, grid, waiter, batches, session.mode)
    evaluator = None
    if held_out.num_samples:
        evaluator = Evaluator(state, grid, waiter, held_out, session.mode, trainer.memory)
    checkpoints = _make_checkpoints(session, state, writer, tokens)
    console.say(f"memory: {describe_allocated(grid, waiter, needed)}; {huge_pages()}")
    peak_flops = measure_peak_flops(grid, waiter, config.train.precision, session.team, session.share_of_core)
    loop = Loop(session, state, trainer, evaluator, stop, checkpoints, peak_flops)
    leave_if_asked(session, stop, state.step)
    waiter.timeout_s = config.parallel.timeout_s
    evaluation = loop.run()
    waiter.timeout_s = SETUP_TIMEOUT_S
    compare_with_prediction(session, plan, loop.steps_s, trainer.stages)

    if evaluation is not None:
        show_compression(session, held_out, evaluation)
    show_sample(session, state, tokens.tokenizer, stop)
    session.events.add("done", step=state.step)
    session.status(state.step, ExitCode.DONE)
    return ExitCode.DONE


def _make_checkpoints(session: Session, state: State, writer: WriterMemory, tokens: TokenFile) -> Checkpoints:
    """Make what takes checkpoints, as often as the configuration says."""
    interval = parse_interval("checkpoint.every", session.config.checkpoint.every)
    num_nodes = -(-session.grid.comm.size // session.num_local_ranks)
    mtbf_s = estimate_mtbf_s(num_nodes, session.events.read())
    cadence = Cadence(interval, mtbf_s, time.monotonic())
    session.console.say(f"checkpoints: {cadence.describe()}")
    lock = {"path": str(session.directory.lock), "fence": session.lock.fence if session.lock else ""}
    return Checkpoints(session, state, writer, identity_of(tokens), lock, cadence)


def _describe_cores(session: Session) -> str:
    """Say what runs where on the node of rank 0."""
    config, binding = session.config, session.binding
    where = " (node of rank 0)" if len(binding.ranks) < session.grid.comm.size else ""
    unused = "; float32 uses one" if config.train.precision == "f32" and config.parallel.threads > 1 else ""
    return f"{binding.describe()}{where}{unused}"


def _open_tokens(session: Session) -> TokenFile:
    """Prepare the token file if the configuration names only a source, and open it on every rank."""
    data, comm = session.config.data, session.grid.comm
    name = b""
    with together(comm, session.waiter):
        if comm.rank == 0:
            path = Path(data.file) if data.file else _prepare(session)
            name = os.fsencode(path)
    path = Path(os.fsdecode(broadcast_bytes(comm, session.waiter, name if comm.rank == 0 else None, 0)))
    tokens = None
    with together(comm, session.waiter):
        tokens = TokenFile(path)
    assert tokens is not None
    return tokens


def _prepare(session: Session) -> Path:
    """Prepare the token file of the configured source, unless it is there already."""
    source, directory = session.config.data.source, Path(session.config.run.dir)
    if source != "stdlib" and directory.resolve().is_relative_to(Path(source).resolve()):
        raise UsageError(
            f"run.dir = {directory} lies inside data.source = {source}, so the run would read its own files: set"
            " run.dir to a folder elsewhere"
        )
    path = default_path(source, directory)
    ensure_prepared(source, path, session.console.say)
    return path


def _introduce(session: Session, state: State, tokens: TokenFile, plan: Plan, needed: dict[str, int]) -> None:
    """Say what is about to run."""
    config, grid, say = session.config, session.grid, session.console.say
    model, parallel = config.model, config.parallel
    ranks = "1 rank" if grid.comm.size == 1 else f"{grid.comm.size} ranks"
    stages = "1 stage" if parallel.chunks == 1 else f"{parallel.chunks} stages"
    say(f"hpcpipe {hpcpipe.__version__}: {ranks} = pipeline of {grid.pipeline} x {grid.data} replicas")
    say(
        f"schedule: {parallel.schedule}, {stages} per rank, {parallel.microbatches} microbatches of"
        f" {parallel.microbatch_size} samples"
    )
    say(describe_plan(plan))
    say(
        f"model: {model.kind}, {model.layers} layers, width {model.width}, {model.heads} heads,"
        f" context {model.context}, {count_parameters(state.model):,} parameters"
    )
    say(f"data: {tokens.path}, {tokens.num_tokens:,} tokens in {tokens.num_documents:,} documents of {tokens.source}")
    say(f"kernels: {warm.describe(config.train.precision)}")
    say(f"cores: {_describe_cores(session)}")
    say(f"memory: {describe_predicted(needed)}")
    say(f"run directory: {session.directory.path}")
