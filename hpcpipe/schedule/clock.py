"""The clock of a schedule: every compute action as early as its rank and its input allow."""

from collections.abc import Sequence

from hpcpipe.schedule.action import Action, Kind, Schedule

Times = list[list[float]]


def run(
    schedule: Schedule,
    lists: Sequence[Sequence[Action]],
    forward: Sequence[float],
    backward_input: Sequence[float],
    backward_weight: Sequence[float],
    message: float = 0.0,
) -> tuple[Times, Times]:
    """Start each action when the one before it on its rank has ended and its input is there.

    Parameters
    ----------
    schedule : Schedule
        Says where messages cross ranks.
    lists : sequence of sequence of Action
        The compute actions of each rank.
    forward, backward_input, backward_weight : sequence of float
        What each stage takes.
    message : float
        From the end of the sender's action until the receiver may start.

    Returns
    -------
    starts, ends : list of list of float
        For each rank, in the order of its list; shorter than the list if the rank waits for ever.
    """
    m, last = schedule.num_microbatches, schedule.num_stages - 1
    enters = [message * schedule.input_crosses(stage) for stage in range(schedule.num_stages)]
    leaves = [message * schedule.output_crosses(stage) for stage in range(schedule.num_stages)]
    duration = {
        Kind.F: forward,
        Kind.I: backward_input,
        Kind.W: backward_weight,
        Kind.B: [i + w for i, w in zip(backward_input, backward_weight, strict=True)],
    }
    # When the output of a stage, and the gradient of its input, are there; by stage * microbatches + microbatch.
    outputs: list[float | None] = [None] * (schedule.num_stages * m)
    gradients: list[float | None] = [None] * (schedule.num_stages * m)
    starts: Times = [[] for _ in lists]
    ends: Times = [[] for _ in lists]
    clock = [0.0] * len(lists)
    waiting: dict[tuple[bool, int], int] = {}
    runnable = list(range(len(lists)))
    while runnable:
        rank = runnable.pop()
        actions, now, begun, ended = lists[rank], clock[rank], starts[rank], ends[rank]
        for position in range(len(begun), len(actions)):
            kind, stage, k = actions[position]
            index = stage * m + k
            ready: float | None = 0.0
            needed = (True, index)
            if kind is Kind.F and stage > 0:
                needed = (True, index - m)
                ready = outputs[index - m]
                delay = enters[stage]
            elif (kind is Kind.I or kind is Kind.B) and stage < last:
                needed = (False, index + m)
                ready = gradients[index + m]
                delay = leaves[stage]
            else:
                delay = 0.0
            if ready is None:
                waiting[needed] = rank
                break
            start = max(now, ready + delay)
            now = start + duration[kind][stage]
            begun.append(start)
            ended.append(now)
            if kind is Kind.F:
                outputs[index] = now
                woken = waiting.pop((True, index), None)
            elif kind is not Kind.W:
                gradients[index] = now
                woken = waiting.pop((False, index), None)
            else:
                woken = None
            if woken is not None:
                runnable.append(woken)
        clock[rank] = now
    return starts, ends
