"""The clock of a schedule: every action as early as its rank and what it waits for allow."""

from collections.abc import Sequence

import numpy as np

from hpcpipe.schedule.action import Kind, Schedule
from hpcpipe.schedule.flat import Flat, Table

NEVER = -1
"""In place of an index: what an action waits for does not exist."""

Instants = list[float | None]


def run(
    offsets: Sequence[int], needs: Sequence[int], durations: Sequence[float], delays: Sequence[float]
) -> tuple[Instants, Instants]:
    """Start each action when the one before it on its rank has ended and what it needs is there.

    A rank that waits is tried again when what it waits for happens, so the time that this takes grows with the number
    of actions, not with that of the ranks.

    Parameters
    ----------
    offsets : sequence of int
        The index at which each rank's list starts, and at the end the number of actions.
    needs : sequence of int
        For each action, the index of another rank's or an earlier one that must have ended; the number of actions if
        it needs none, and `NEVER` if that does not exist.
    durations, delays : sequence of float
        What each action takes, and how long after the end of what it needs it may start.

    Returns
    -------
    starts, ends : list of float or None
        For each action; None if its rank waits for ever.
    """
    num_actions = offsets[-1]
    starts: Instants = [None] * num_actions
    ends: Instants = [*starts, 0.0, None]
    position = list(offsets[:-1])
    clock = [0.0] * len(position)
    waiting: dict[int, int] = {}
    runnable = list(range(len(position)))
    while runnable:
        rank = runnable.pop()
        now = clock[rank]
        stop = offsets[rank + 1]
        for index in range(position[rank], stop):
            ready = ends[needs[index]]
            if ready is None:
                waiting[needs[index]] = rank
                stop = index
                break
            ready += delays[index]
            if ready > now:
                now = ready
            starts[index] = now
            now += durations[index]
            ends[index] = now
            if index in waiting:
                runnable.append(waiting.pop(index))
        position[rank] = stop
        clock[rank] = now
    return starts, ends[:num_actions]


def needs_of(schedule: Schedule, flat: Flat) -> Table:
    """Return what each of a schedule's compute actions waits for, by index, as `run` takes it.

    Parameters
    ----------
    schedule : Schedule
        Where the actions come from.
    flat : Flat
        Its compute actions alone.
    """
    shape = schedule.num_stages, schedule.num_microbatches
    output = flat.find(Kind.F, *shape)
    gradient = np.maximum(flat.find(Kind.B, *shape), flat.find(Kind.I, *shape))
    return wait_for(flat, np.roll(output, 1, axis=0), np.roll(gradient, -1, axis=0))


def wait_for(flat: Flat, inputs: Table, gradients: Table) -> Table:
    """Return what forwards and backwards wait for, given the index of what brings each stage its input and gradient.

    Parameters
    ----------
    flat : Flat
        The actions.
    inputs, gradients : ndarray of int64, shape (stages, microbatches)
        Indices; the first stage's inputs and the last stage's gradients are not read, as they wait for nothing.
    """
    num_actions = int(flat.offsets[-1])
    needs = np.full(num_actions, num_actions)
    for behind, table in (
        (flat.is_any(Kind.F) & (flat.stage > 0), inputs),
        (flat.is_any(Kind.B, Kind.I) & (flat.stage < len(gradients) - 1), gradients),
    ):
        needs[behind] = table[flat.stage[behind], flat.microbatch[behind]]
    return needs
