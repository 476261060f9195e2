"""From one epoch to the next: the state of the new grid, made from what the survivors hold of the old one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hpcpipe.errors import Interruption
from hpcpipe.mpi.channel import Channel
from hpcpipe.mpi.grid import Grid
from hpcpipe.recovery.decide import Decision, Holder, Source
from hpcpipe.recovery.standing import NOTHING, Standing
from hpcpipe.recovery.transfer import Entry, Parts, carry_out, plan_moves
from hpcpipe.train.member import Member
from hpcpipe.train.outline import Outline
from hpcpipe.train.parts import entries_of_grid, parts_of, targets_of, wanted_by
from hpcpipe.train.stage_tensors import plan_model
from hpcpipe.train.state import State, build_state


@dataclass
class Change:
    """What becomes of a process in the next epoch, once all have agreed on it.

    Attributes
    ----------
    processes : tuple of int
        The number in the launch of each live process.
    decision : Decision
        Its roles, and the step that the run goes back to.
    grid : Grid or None
        The new one; None for a spare.
    outline : Outline or None
        The plan; None if there was none on all ranks.
    state : State or None
        Filled; None for a spare, and where it comes from the disk.
    story : dict
        What happened, for the event.
    is_same_grid : bool
        Whether every rank of the grid holds what it held before.
    """

    processes: tuple[int, ...]
    decision: Decision
    grid: Grid | None
    outline: Outline | None
    state: State | None
    story: dict[str, Any]
    is_same_grid: bool

    def apply(self, member: Member) -> None:
        """Make it so."""
        keeps_place = self.is_same_grid and self.decision.roles[member.crew.rank] == member.role
        if not keeps_place or self.state is None or self.state is not member.state:
            if member.copies is not None:
                member.copies.close()
            member.copies = None
        member.processes, member.roles, member.grid = self.processes, self.decision.roles, self.grid
        member.outline, member.state = self.outline, self.state
        member.at_most = self.decision.at_most
        member.note_recovery(self.decision.reached)
        member.epoch += 1
        member.dead_spares = set()
        member.story = self.story if member.story is None else _continued(member.story, self.story)


def _continued(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Return what happened since the last epoch that got to tell it."""
    lost = [*first["processes_lost"], *second["processes_lost"]]
    cause = f"{first['cause']}; {second['cause']}"
    return {**first, **second, "cause": cause, "processes_lost": lost, "seen_s": first["seen_s"]}


def restore(
    member: Member, standings: list[Standing], decision: Decision, old: Outline | None, new: Outline | None
) -> State | None:
    """Give every rank of the new grid its state at the step of a decision; all live processes call it.

    Parameters
    ----------
    member : Member
        This process; its live state is written to if it keeps its place.
    standings : list of Standing
        Of all processes.
    decision : Decision
        Who holds what, and who becomes which rank.
    old, new : Outline
        Of the old and the new grid.

    Returns
    -------
    State or None
        None for a spare.

    Raises
    ------
    CommunicationError
        A process has died.
    """
    assert old is not None and new is not None and decision.holders is not None
    crew, base = member.crew, member.base
    wanted: dict[int, list[Entry]] = {}
    for rank, role in enumerate(decision.roles):
        if role != NOTHING and not _has_all(rank, role, standings, decision, old is new):
            wanted[rank] = _wants(new, role)
    moves = plan_moves(entries_of_grid(old.config, old.schedule)[0], wanted)
    sources = {
        role: _source(member, role, holder, decision.step)
        for role, holder in decision.holders.items()
        if holder.rank == crew.rank
    }
    role = decision.roles[crew.rank]
    keeps_place = old is new and role == member.role and member.state is not None
    state = member.state if keeps_place else None
    if role != NOTHING and state is None:
        replica, stage_rank = divmod(role, new.config.parallel.pipeline)
        state = build_state(new.config, new.schedule.stage_to_rank, stage_rank, replica, base.team)
    targets = list(targets_of(state)) if state is not None and crew.rank in wanted else []
    if state is not None and targets:
        state.is_torn = True
    channel = Channel(crew.comm, base.waiter, base.mode)
    holders = {role: holder.rank for role, holder in decision.holders.items()}
    carry_out(moves, holders, sources, targets, channel, crew.rank)
    digests = _share_digests(member, decision, wanted, channel) if old is new else ()
    if state is not None and targets:
        state.pack()
        state.step, state.is_torn = decision.step, False
        state.digests = {decision.step: tuple(digests)} if any(digests) else {}
    return state


def _share_digests(
    member: Member, decision: Decision, wanted: Mapping[int, object], channel: Channel
) -> tuple[int, ...]:
    """Give every rank that gets its state the digests that its parts should have; return this process's."""
    assert member.outline is not None and decision.holders is not None
    rank, received = member.crew.rank, np.zeros(0, np.uint64)
    _, sizes = entries_of_grid(member.outline.config, member.outline.schedule)
    names = []
    for target in wanted:
        role = decision.roles[target]
        holder = decision.holders[role]
        name = f"digests of rank {role} from process {holder.rank} to {target}"
        if holder.rank == rank:
            known = np.zeros(len(sizes[role]), np.uint64)
            values = _known_digests(member, role, holder, decision.step)
            known[: len(values)] = values
            if target == rank:
                received = known
                continue
            channel.start_send(name, known, target, 0)
            names.append(name)
        elif target == rank:
            received = np.zeros(len(sizes[role]), np.uint64)
            channel.post_receive(name, received, holder.rank, 0)
            names.append(name)
    for name in names:
        channel.wait(name)
    return tuple(received.tolist())


def _known_digests(member: Member, role: int, holder: Holder, step: int) -> Sequence[int]:
    """Return the digests of a rank's parts that this process holds, nothing if it knows none."""
    if holder.source is Source.HELD:
        assert member.copies is not None
        return member.copies.held_digests(role, step)
    return member.state.digests.get(step, ()) if member.state is not None else ()


def _has_all(rank: int, role: int, standings: list[Standing], decision: Decision, is_same_grid: bool) -> bool:
    """Return whether a survivor keeps its place, and its live state is what is wanted."""
    assert decision.holders is not None
    return is_same_grid and standings[rank].role == role and decision.holders[role] == Holder(rank, Source.LIVE)


def _wants(outline: Outline, role: int) -> list[Entry]:
    """Return what fills the state of a rank of a grid."""
    replica, stage_rank = divmod(role, outline.config.parallel.pipeline)
    plan = plan_model(outline.config, outline.schedule.num_stages)
    return wanted_by({index: plan.stage(index) for index in outline.schedule.stages_of(stage_rank)}, replica)


def _source(member: Member, role: int, holder: Holder, step: int) -> Parts:
    """Return the elements of a rank that this process holds.

    Raises
    ------
    Interruption
        They were damaged; they are not offered again.
    """
    if holder.source is Source.LIVE:
        assert member.state is not None
        return Parts(parts_of(member.state))
    assert member.copies is not None
    copies = member.copies
    copy = copies.own(step) if holder.source is Source.OWN else copies.held(role, step)
    if copy is None:
        raise Interruption(f"the copy of step {step} of rank {role} was damaged in memory")
    return Parts([copy])
