"""An epoch: what runs between two recoveries. Whatever knows a communicator is built here, and given up at its end."""

import time
from dataclasses import replace

from hpcpipe.checkpoint.retain import set_aside
from hpcpipe.cluster.holder import fence_of
from hpcpipe.cluster.processor import memory
from hpcpipe.cluster.slurm import AllocationEnd
from hpcpipe.config.interval import parse_interval
from hpcpipe.errors import ExitCode
from hpcpipe.faults import hooks
from hpcpipe.memory.block import huge_pages
from hpcpipe.mpi.agree import together
from hpcpipe.mpi.collectives import broadcast_bytes
from hpcpipe.recovery.copies import Copies
from hpcpipe.recovery.standing import NOTHING
from hpcpipe.telemetry.metrics import last_step
from hpcpipe.telemetry.status import read_status
from hpcpipe.telemetry.text import count
from hpcpipe.train.batches import TrainingBatches
from hpcpipe.train.cadence import Cadence, estimate_mtbf_s
from hpcpipe.train.checkpoints import Checkpoints
from hpcpipe.train.evaluate import Evaluator
from hpcpipe.train.finish import show_compression, show_sample
from hpcpipe.train.footprint import describe_allocated
from hpcpipe.train.halt import HaltFile
from hpcpipe.train.introduce import introduce
from hpcpipe.train.loop import Loop
from hpcpipe.train.member import Member
from hpcpipe.train.outline import Outline
from hpcpipe.train.parts import entries_of_grid, parts_of
from hpcpipe.train.peak import measure_peak_flops
from hpcpipe.train.plan import Plan, compare_with_prediction, make_plan, write_plan
from hpcpipe.train.resume import drop_later_metrics, find_start, identity_of, resume_state
from hpcpipe.train.session import Session
from hpcpipe.train.setup import SETUP_TIMEOUT_S, leave_if_asked, require_own_memory
from hpcpipe.train.state import State, build_state
from hpcpipe.train.step import Trainer
from hpcpipe.train.surroundings import surroundings_of
from hpcpipe.watch.layout import Phase


def run_epoch(member: Member) -> ExitCode:
    """Train to the end of the run; every rank of the grid calls it.

    Raises
    ------
    HpcpipeError
        The run ends, on all ranks or, to be told to the others, on one.
    CommunicationError, Interruption
        The run can go on in another epoch.
    """
    session, plan = member.session(), None
    waiter = session.waiter
    waiter.background, waiter.timeout_s = [], SETUP_TIMEOUT_S
    _watch_for_stop(session, member)
    if member.story is not None and session.is_root:
        member.story["finished"] = last_step(session.directory.metrics)
    if member.state is None:
        session.beacon.phase(Phase.SETUP)
        _set_later_aside(member, session)
        found = find_start(session, member.resume, member.at_most)
        done = 0 if found is None else found[1].step
        if done >= session.config.train.steps:
            drop_later_metrics(session, done)
            session.console.say(f"nothing to do: step {done} is done and train.steps = {session.config.train.steps}")
            session.status(done, ExitCode.DONE)
            return ExitCode.DONE
        session.status(done, None)
        if member.outline is None:
            plan = _plan(member, session, done)
        state = _build(member, session)
        if plan is not None:
            introduce(session, state, member.tokens, plan, require_own_memory(session, session.config))
        resume_state(session, state, found, member.tokens, member.resume, member.at_most)
        member.state = state
        session.begin(state.step)
        if plan is not None:
            write_plan(session, plan)
    else:
        state = member.state
        session.start_step = member.outline.start_step if member.outline else None
        drop_later_metrics(session, state.step)
        session.status(state.step, None)
    return _train(member, session, state, plan)


def _train(member: Member, session: Session, state: State, plan: Plan | None) -> ExitCode:
    """Build what trains a state, and train it to the end."""
    config, grid, waiter = session.config, session.grid, session.waiter
    per_replica = config.parallel.microbatches // grid.data
    local = range(grid.replica * per_replica, (grid.replica + 1) * per_replica)
    batches = TrainingBatches(
        member.samples, config.parallel.microbatches, local, config.parallel.microbatch_size, config.model.context
    )
    surroundings = surroundings_of(session, state.step, recovers=member.crew.can_recover)
    trainer = Trainer(state, session.schedule, grid, waiter, batches, session.mode, surroundings)
    evaluator = None
    if member.held_out.num_samples:
        evaluator = Evaluator(state, grid, waiter, member.held_out, session.mode, trainer.memory)
    checkpoints = _make_checkpoints(session, state, member)
    copies = _keep_copies(member, session, state, trainer)
    if plan is not None:
        needed = require_own_memory(session, config)
        session.console.say(f"memory: {describe_allocated(grid, waiter, needed)}; {huge_pages()}")
    assert member.outline is not None

    def after_step(step: int) -> None:
        if copies is not None:
            hooks.corrupt("copy", copies.whole())
            copies.begin(step)
        _look_for_dead_spares(member, session)

    loop = Loop(session, state, trainer, evaluator, member.stop, checkpoints, member.outline.peak_flops, after_step)
    if member.epoch == 0:
        # Later the loop stops after its next step, and saves what the recovery has kept.
        leave_if_asked(session, member.stop, state.step)
    waiter.timeout_s = config.parallel.timeout_s
    lock = session.directory.lock
    session.beacon.publish(session.directory.path, lock, fence_of(lock))
    session.beacon.expect(plan.candidate.prediction.step_s if plan is not None else 0.0)
    _tell_story(member, session, state)
    evaluation = loop.run()
    trainer.before_update()
    waiter.timeout_s = SETUP_TIMEOUT_S
    if plan is not None:
        compare_with_prediction(session, plan, loop.steps_s, trainer.stages)
    if evaluation is not None:
        show_compression(session, member.held_out, evaluation)
    show_sample(session, state, member.tokens.tokenizer, member.stop)
    session.events.add("done", step=state.step, records_dropped=loop.num_dropped)
    session.status(state.step, ExitCode.DONE)
    return ExitCode.DONE


def _tell_story(member: Member, session: Session, state: State) -> None:
    """Say what has happened since the last epoch."""
    if member.story is None:
        return
    story, member.story = member.story, None
    seconds = time.monotonic() - story.pop("seen_s")
    story["lost_steps"] = max(0, story.pop("finished", 0) - state.step)
    degrees = session.grid.pipeline, session.grid.data
    facts = {"step": state.step, "pipeline": degrees[0], "data": degrees[1], "spares": len(member.spares())}
    by_role = sorted(zip(member.roles, member.processes, strict=True))
    story["processes"] = [process for role, process in by_role if role != NOTHING]
    session.events.add("recovered", **story, **facts, epoch=member.epoch, seconds=seconds)
    spares = f", {count(len(member.spares()), 'spare')} left" if member.had_spares else ""
    again = f"{count(story['lost_steps'], 'step')} to be run again"
    session.console.say(
        f"recovered in {seconds:.2f} s from {story['source']}: {story['cause']}; going on from step {state.step} on"
        f" {degrees[0]} x {degrees[1]} ranks, {again}{spares}"
    )


def _watch_for_stop(session: Session, member: Member) -> None:
    """Let the rank that speaks look for requests to stop that are no signals."""

    def warn(problem: str) -> None:
        session.console.say(f"warning: {problem}")
        session.events.add("halt file refused", problem=problem)

    if session.is_root:
        member.stop.watch(HaltFile(session.directory.halt, warn), AllocationEnd())
        # A run that is done stays so until there are more steps to do.
        if member.epoch == 0 and read_status(session.directory.path).get("state") != "done":
            session.status(0, None)


def _set_later_aside(member: Member, session: Session) -> None:
    """Rename the checkpoints that a run which goes back must not take, now or later."""
    with together(session.grid.comm, session.waiter):
        if member.at_most >= 0 and session.is_root:
            for path in set_aside(session.directory.checkpoints, member.at_most):
                session.events.add("checkpoint set aside", path=str(path), at_most=member.at_most)


def _plan(member: Member, session: Session, done: int) -> Plan:
    """Decide what is left open, and let all processes know."""
    asked = session.config
    with together(session.grid.comm, session.waiter):
        # Layers are timed only where they fit; where the model is cut matters little here, and is not known yet.
        require_own_memory(session, replace(asked, parallel=replace(asked.parallel, partition="auto")))
    plan = make_plan(session)
    leave_if_asked(session, member.stop, done)
    with together(session.grid.comm, session.waiter):
        require_own_memory(session, session.config)
    precision = session.config.train.precision
    peak_flops = measure_peak_flops(session.grid, session.waiter, precision, session.team, session.share_of_core)
    limit_bytes = memory().available_bytes / session.num_local_ranks
    outline = Outline(asked, session.config, session.schedule, plan.measured, plan.cores, limit_bytes, peak_flops, done)
    # To the last bit the same on all, since all decide by it.
    content = broadcast_bytes(session.grid.comm, session.waiter, outline.to_bytes() if session.is_root else None, 0)
    member.outline = Outline.from_bytes(content)
    if session.is_root:
        member.crew.tell(member.spares(), content)
    return plan


def _build(member: Member, session: Session) -> State:
    """Allocate what this rank trains."""
    grid = session.grid
    return build_state(session.config, session.schedule.stage_to_rank, grid.stage_rank, grid.replica, session.team)


def _look_for_dead_spares(member: Member, session: Session) -> None:
    """Say so when a spare has died; nothing else needs it now."""
    if not session.is_root or not member.spares():
        return
    dead = set(member.crew.dead()).intersection(member.spares()) - member.dead_spares
    if dead:
        member.dead_spares |= dead
        left = len(member.spares()) - len(member.dead_spares)
        numbers = [member.processes[rank] for rank in sorted(dead)]
        session.events.add("spare lost", processes_lost=numbers, spares=left)
        who = " and ".join(f"process {number}" for number in numbers)
        session.console.say(f"warning: spare {who} died; {count(left, 'spare')} left")


def _keep_copies(member: Member, session: Session, state: State, trainer: Trainer) -> Copies | None:
    """Keep copies of the state, if that is asked for."""
    grid, every = session.grid, session.config.recovery.copy_every
    if not every or grid.comm.size == 1:
        return None
    copies = member.copies
    if copies is None:
        copies = member.copies = Copies(parts_of(state), every, lambda step: state.digests.get(step, ()))
    _, sizes = entries_of_grid(session.config, session.schedule)
    places = member.places_of_ranks()
    hosts, processes = [place.host for place in places], [place.pid for place in places]
    copies.connect(grid, session.waiter, session.mode, sizes, hosts, processes)
    copies.forget_after(state.step)
    copies.take(state.step)
    session.waiter.background.append(copies.advance)
    trainer.before_update = copies.finish
    return copies


def _make_checkpoints(session: Session, state: State, member: Member) -> Checkpoints:
    """Make what takes checkpoints, as often as the configuration says."""
    interval = parse_interval("checkpoint.every", session.config.checkpoint.every)
    num_nodes = -(-session.grid.comm.size // session.num_local_ranks)
    mtbf_s = estimate_mtbf_s(num_nodes, session.events.read())
    cadence = Cadence(interval, mtbf_s, time.monotonic())
    if member.epoch == 0:
        session.console.say(f"checkpoints: {cadence.describe()}")
    lock = {"path": str(session.directory.lock), "fence": session.lock.fence if session.lock else ""}
    identity = identity_of(member.tokens)
    return Checkpoints(session, state, member.writer, identity, lock, cadence, member.token, member.epoch)
