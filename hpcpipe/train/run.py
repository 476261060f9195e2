"""A training run from start to end, on every process that was started for it."""

import os
import secrets
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import hpcpipe
from hpcpipe.checkpoint.layout import candidates
from hpcpipe.cluster.environment import will_be_spare
from hpcpipe.config.check import check_data
from hpcpipe.config.dump import to_toml
from hpcpipe.config.load import run_directory
from hpcpipe.data.prepare import default_path, ensure_prepared
from hpcpipe.data.reader import TokenFile
from hpcpipe.data.windows import HeldOut, Samples
from hpcpipe.errors import ExitCode, UsageError
from hpcpipe.kernels.threads import Team
from hpcpipe.mpi import runtime
from hpcpipe.mpi.agree import together
from hpcpipe.mpi.collectives import broadcast_bytes, gather_bytes
from hpcpipe.mpi.crew import Crew, has_fault_tolerance
from hpcpipe.mpi.ending import fault_tolerance_note
from hpcpipe.mpi.grid import line_grid
from hpcpipe.mpi.runtime import World
from hpcpipe.recovery.standing import NOTHING
from hpcpipe.telemetry.console import Console
from hpcpipe.telemetry.events import EventLog
from hpcpipe.telemetry.files import write_whole
from hpcpipe.telemetry.status import read_status
from hpcpipe.telemetry.text import count
from hpcpipe.train.directory import RunDirectory, open_directory
from hpcpipe.train.leave import Outcome, leaving_together
from hpcpipe.train.lock import RunLock
from hpcpipe.train.member import Member, Place
from hpcpipe.train.recover import live
from hpcpipe.train.session import Session
from hpcpipe.train.setup import agree_on_setup, compile_kernels, leave_if_asked
from hpcpipe.train.spare import be_ready_to_wake
from hpcpipe.train.stop import StopRequest
from hpcpipe.train.writer_memory import WriterMemory
from hpcpipe.watch.beacon import NoBeacon
from hpcpipe.watch.start import attach

_SHOWN = 16


def train(config_path: Path, overrides: Sequence[str], resume: str) -> ExitCode:
    """Train as a configuration says, on all ranks that were started together.

    Whatever happens, every rank leaves: an error that all ranks know is told by one of them; one that hits a single
    rank is told by that rank, which then ends the others.

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
    be_ready_to_wake()
    # Processes that are started before MPI cannot disturb it.
    writer = WriterMemory(starts_now=not will_be_spare())
    place = run_directory(config_path, overrides)
    beacon = attach(place, _tell)
    world = runtime.start()
    code = ExitCode.DONE
    with leaving_together(world, place) as outcome:
        code = _train(world, config_path, overrides, resume, writer, outcome, beacon)
    code = outcome.code or code
    beacon.close(has_failed=code not in (ExitCode.DONE, ExitCode.STOPPED))
    writer.close()
    if outcome.crew is not None and outcome.crew.has_changed:
        runtime.leave(outcome.crew.comm, code)
    runtime.stop(world)
    return code


def _train(
    world: World,
    config_path: Path,
    overrides: Sequence[str],
    resume: str,
    writer: WriterMemory,
    outcome: Outcome,
    beacon: NoBeacon,
) -> ExitCode:
    stop = StopRequest()
    setup = agree_on_setup(world, config_path, overrides)
    config, waiter, binding = setup.config, setup.waiter, setup.binding
    waiter.watch = beacon
    beacon.configure(config.recovery.hang_s)
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
    team = Team(config.parallel.threads, binding.own_cores(world.local_rank) if not world.is_spare else ())
    member: Member | None = None
    try:
        local = world.num_local_ranks, world.num_local_cores
        base = Session(
            config,
            setup.schedule,
            directory,
            line_grid(world.comm),
            *local,
            binding,
            team,
            waiter,
            setup.mode,
            console,
            events,
            beacon=beacon,
        )
        if world.rank == 0:
            base.lock = lock
            beacon.publish(directory.path, directory.lock, lock.fence)
            # From now on a stop can be told; a run that is done stays so until there are more steps to do.
            if read_status(directory.path).get("state") != "done":
                base.status(0, None)
        events.add(
            "started",
            hpcpipe=hpcpipe.__version__,
            ranks=world.num_ranks,
            spares=world.num_spares,
            pid=os.getpid(),
            resume=resume,
        )
        _warn(base, world, setup.families)
        member = _prepare_member(base, world, stop, writer, resume)
        if world.rank == 0:
            member.console, member.lock = console, lock
        outcome.crew, outcome.speaks = member.crew, lambda: member.speaks
        return live(member)
    finally:
        team.close()
        held = member.lock if member is not None else lock if world.rank == 0 else None
        if held is not None:
            held.release()


def _tell(text: str) -> None:
    """Say something before anybody knows whether the console is to be quiet."""
    with suppress(OSError, ValueError):
        sys.stderr.write(f"hpcpipe: {text}\n")
        sys.stderr.flush()


def _say_processes(base: Session, world: World, places: tuple[Place, ...]) -> None:
    """Say which processes of rank 0's machine are which ranks."""
    near = [(number, place) for number, place in enumerate(places) if place.host == places[0].host][:_SHOWN]
    words = [f"{'spare' if number >= world.num_ranks else f'rank {number}'} {place.pid}" for number, place in near]
    more = f", and {len(places) - len(near)} more" if len(places) > len(near) else ""
    base.console.say(f"processes on {places[0].host}: {', '.join(words)}{more}")


def _warn(base: Session, world: World, families: tuple[str, ...]) -> None:
    """Say what is not as it could be."""
    config, say = base.config, base.console.say
    if len(families) > 1 and config.train.precision == "bf16":
        say(
            f"warning: ranks have kernels of {' and '.join(families)}, so bits depend on which rank computes"
            f" what: set HPCPIPE_KERNELS={families[-1]} for the same bits everywhere"
        )
    note = fault_tolerance_note(world.size)
    if note:
        say(f"recovery: {note}")
    if has_fault_tolerance():
        is_fixed = not isinstance(config.parallel.partition, str) or config.parallel.schedule.endswith(".csv")
        if is_fixed and not world.num_spares:
            say("recovery: a rank that dies ends the run, since its cut into stages was given and there is no spare")
        else:
            say(f"recovery: the run goes on when a rank dies, with {count(world.num_spares, 'spare')}")


def _prepare_member(base: Session, world: World, stop: StopRequest, writer: WriterMemory, resume: str) -> Member:
    """Make ready what every process needs, whichever rank it is or will be."""
    compile_kernels(base, world, stop=stop)
    tokens = _open_tokens(base)
    leave_if_asked(base, stop)
    with together(world.comm, base.waiter):
        config = check_data(base.config, tokens.vocab)
        training, validation = tokens.split(config.data.validation_fraction)
        samples = Samples(training, config.model.context, config.run.seed)
        held_out = HeldOut(validation, config.model.context, config.data.validation_samples)
    crew = Crew(world.comm, world.rank)
    if not crew.can_recover or world.num_ranks == 1:
        # Copies are for survivors.
        config = replace(config, recovery=replace(config.recovery, copy_every=0))
    base.config = config
    roles = (*range(world.num_ranks), *[NOTHING] * world.num_spares)
    processes = tuple(range(world.size))
    rows = gather_bytes(world.comm, base.waiter, f"{os.getpid()} {socket.gethostname()}".encode())
    words = [row.decode().split(" ", 1) for row in rows]
    own_token = secrets.token_hex(4).encode() if world.rank == 0 else None
    token = broadcast_bytes(world.comm, base.waiter, own_token, 0).decode()
    places = tuple(Place(host, int(pid)) for pid, host in words)
    base.events.add("processes", hosts=[place.host for place in places], pids=[place.pid for place in places])
    _say_processes(base, world, places)
    return Member(crew, base, stop, writer, resume, tokens, samples, held_out, processes, roles, places, token)


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
