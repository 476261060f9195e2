"""Recovery: what every process does from a failure until all go on, or leave together. docs/recovery.md tells why so.

    1  leave     drop what is under way, revoke every communicator, so that all others leave too
    2  agree     not everybody is done: nobody goes on as before
    3  shrink    a communicator of those who are alive
    4  exchange  one row each: what it has of which rank, of which steps
    5  decide    the same decision everywhere, by a pure function of the rows: nobody leads, so anybody may die
    6  form      the new grid
    7  restore   parts of the state go from whoever holds them to whoever needs them
    8  agree     all of this has worked on everybody: the next epoch begins; else again from 1

A process that dies in between makes the others start again at 1. Nothing of the old epoch is given up before 8.
"""

import time
from dataclasses import dataclass, replace

from hpcpipe.errors import BY_CODE, ExitCode, HpcpipeError, Interruption, RankError, StoppedError
from hpcpipe.faults import hooks
from hpcpipe.mpi.crew import CommunicationError
from hpcpipe.mpi.runtime import report_traceback
from hpcpipe.recovery.decide import Decision, decide
from hpcpipe.recovery.standing import NOTHING, Standing
from hpcpipe.train.change import Change, restore
from hpcpipe.train.epoch import run_epoch
from hpcpipe.train.member import Member
from hpcpipe.train.outline import Outline
from hpcpipe.train.spare import wait_as_spare, wake_spares
from hpcpipe.watch.layout import Phase


@dataclass
class End:
    """How an epoch ended on this process.

    Attributes
    ----------
    code : ExitCode or None
        The run is over, with this code; None if it was interrupted.
    error : HpcpipeError or None
        Why, if that is no success: of all ranks, or of this one alone.
    cause : str
        What interrupted it, as this process saw it.
    rewind : int
        Step to go back to, -1 for none.
    seen_s : float
        When, by `time.monotonic`.
    """

    code: ExitCode | None = None
    error: HpcpipeError | None = None
    cause: str = ""
    rewind: int = NOTHING
    seen_s: float = 0.0

    @property
    def is_over(self) -> bool:
        """Whether all ranks end the run in the same way, as far as this one knows."""
        return self.code is not None and (self.error is None or self.error.on_all_ranks)


def live(member: Member) -> ExitCode:
    """Train as a rank or wait as a spare, through all failures, until the run is over.

    Returns
    -------
    ExitCode
        The same on every process.

    Raises
    ------
    HpcpipeError
        On every process alike, see `hpcpipe.errors.HpcpipeError.on_all_ranks`; without fault tolerance also on one.
    """
    crew, parallel = member.crew, member.base.config.parallel
    member.grid = crew.form_grid(member.role, parallel.pipeline, parallel.data)
    member.base.beacon.epoch(member.epoch, member.role)
    if not crew.can_recover:
        hooks.take_rank(None if member.role == NOTHING else member.role)
        return run_epoch(member) if member.grid is not None else wait_as_spare(member)
    while True:
        member.base.beacon.epoch(member.epoch, member.role)
        hooks.take_rank(None if member.role == NOTHING else member.role)
        end = _attempt(member)
        if member.role == 0 and end.code is not None and end.is_over:
            crew.tell(member.spares(), bytes([end.code]))
        if not end.is_over:
            hooks.point("revoke")
            crew.revoke()
            wake_spares(member)
        if not crew.agree(end.is_over):
            end = _recover(member, end)
        if end.code is not None:
            return _leave(end)


def _leave(end: End) -> ExitCode:
    assert end.code is not None
    if end.error is not None:
        raise end.error
    return end.code


def _attempt(member: Member) -> End:
    """Run an epoch, and return how it ended."""
    try:
        return End(run_epoch(member) if member.grid is not None else wait_as_spare(member))
    except CommunicationError as error:
        return End(cause=f"communication failed: {error}", seen_s=time.monotonic())
    except Interruption as interruption:
        rewind = getattr(interruption, "to_step", NOTHING)
        return End(cause=interruption.cause, rewind=rewind, seen_s=time.monotonic())
    except HpcpipeError as error:
        return End(error.exit_code, error, seen_s=time.monotonic())
    except Exception as error:
        # Whatever takes this place would meet it too, so that all stop.
        report_traceback(f"process {member.crew.process}, rank {member.role}")
        return End(ExitCode.RANK_FAILED, RankError(f"{type(error).__name__}: {error}"), seen_s=time.monotonic())


def _recover(member: Member, end: End) -> End:
    """Carry out the sequence until it has worked on everybody; return an end with a code if all are to leave."""
    while True:
        member.base.beacon.phase(Phase.RECOVER)
        change: Change | None = None
        is_done = True
        try:
            leaving, change = _meet(member, end)
            if leaving is not None:
                return leaving
        except (CommunicationError, Interruption):
            is_done = False
        except HpcpipeError as error:
            end = replace(end, code=error.exit_code, error=error)
            is_done = False
        except Exception as error:
            report_traceback(f"process {member.crew.process}, rank {member.role}")
            failure = RankError(f"{type(error).__name__}: {error}")
            end = replace(end, code=ExitCode.RANK_FAILED, error=failure)
            is_done = False
        if not is_done:
            member.crew.revoke()
        hooks.point("commit")
        if member.crew.agree(is_done) and change is not None:
            change.apply(member)
            return End()


def _meet(member: Member, end: End) -> tuple[End | None, Change | None]:
    """Carry out steps 3 to 7; return how to leave, or what changes in the next epoch."""
    crew, parallel = member.crew, member.config.parallel
    hooks.point("shrink")
    crew.shrink()
    hooks.point("exchange")
    standings = [Standing.from_row(row) for row in crew.exchange(_standing(member, end).to_row(member.num_roles()))]
    everyone = range(len(standings))
    knowing = [rank for rank in everyone if not standings[rank].is_spare] or list(everyone)
    is_planned = all(standings[rank].is_ready for rank in knowing)
    if is_planned and not all(one.is_ready for one in standings):
        content = member.outline.to_bytes() if member.outline and crew.rank == knowing[0] else None
        member.outline = Outline.from_bytes(crew.hear(content, knowing[0]))
    outline = member.outline if is_planned else None
    fewer: list[Outline | None] = []

    def choose_grid(num_processes: int) -> tuple[int, int] | None:
        fewer.append(None if outline is None else outline.for_fewer(num_processes))
        found = fewer[0]
        return None if found is None else (found.config.parallel.pipeline, found.config.parallel.data)

    hooks.point("decide")
    decision = decide(standings, parallel.pipeline, parallel.data, choose_grid, member.level)
    if decision.exit_code is not None:
        return _told(member, end, decision), None
    role = decision.roles[crew.rank]
    hooks.point("form")
    grid = crew.form_grid(role, decision.pipeline, decision.data)
    new_outline = fewer[0] if fewer else outline
    state = restore(member, standings, decision, outline, new_outline) if decision.holders else None
    lost = sorted(set(member.processes) - {one.process for one in standings})
    story = {
        "cause": _cause(member, lost, end, standings),
        "processes_lost": lost,
        "source": "memory" if decision.holders else "disk",
        "seen_s": end.seen_s,
    }
    return None, Change(
        tuple(one.process for one in standings), decision, grid, new_outline, state, story, outline is new_outline
    )


def _standing(member: Member, end: End) -> Standing:
    """Say what this process has."""
    state, copies, is_spare = member.state, member.copies, member.role == NOTHING
    num_roles = member.num_roles()
    held = () if copies is None else tuple(copies.held_steps(role) for role in range(num_roles))
    return Standing(
        process=member.crew.process,
        role=member.role,
        is_ready=member.outline is not None and (is_spare or state is not None),
        live=NOTHING if state is None or state.is_torn or is_spare else state.step,
        own=(NOTHING, NOTHING) if copies is None else copies.own_steps,
        held=held,
        finished=int(end.code) + 1 if end.code is not None and end.is_over and not is_spare else 0,
        failed=int(end.code) if end.code is not None and not end.is_over else 0,
        rewind=end.rewind,
    )


def _told(member: Member, end: End, decision: Decision) -> End:
    """Let all processes know why they leave, and return how."""
    code = ExitCode(decision.exit_code or 0)
    if decision.speaker == NOTHING:
        error: HpcpipeError = StoppedError(f"{decision.reason}; run the same command again")
    else:
        is_speaker = member.crew.rank == decision.speaker
        own = end.error if is_speaker else None
        where = "" if own is None or own.on_all_ranks else f"process {member.crew.process}: "
        content = f"{where}{own or ''}".encode("utf-8", "surrogatepass") if is_speaker else None
        text = member.crew.hear(content, decision.speaker).decode("utf-8", "surrogatepass")
        if code is ExitCode.DONE:
            member.speak_last(None)
            return End(code)
        error = BY_CODE.get(int(code), RankError)(text)
    member.speak_last(error)
    return End(code, error.on_all())


def _cause(member: Member, lost: list[int], end: End, standings: list[Standing]) -> str:
    """Say what has happened."""
    if not lost:
        return end.cause
    roles = dict(zip(member.processes, member.roles, strict=True))
    names = [
        f"rank {roles[number]} (process {number})" if roles[number] >= 0 else f"spare process {number}"
        for number in lost
    ]
    *most, last = names
    return f"{', '.join(most)} and {last} died" if most else f"{last} died"
