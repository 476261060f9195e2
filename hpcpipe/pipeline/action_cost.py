"""What an executor itself costs per action: real schedules on stages without layers, streams of one number."""

import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from hpcpipe.model.layer import Microbatch
from hpcpipe.pipeline.executor import Executor, Work
from hpcpipe.pipeline.parameters import Parameters
from hpcpipe.pipeline.stage import Stage
from hpcpipe.pipeline.transport import Transport
from hpcpipe.schedule.action import COMPUTE, Action, Schedule

POLL = "poll"
"""Stands among the kinds for one poll between two kernels."""


class InstantTransport:
    """A transport whose messages are there at once and carry nothing, for executors that run alone."""

    def post_receive(self, action: Action, buffer: np.ndarray) -> None:
        """Do nothing."""

    def start_send(self, action: Action, buffer: np.ndarray) -> None:
        """Do nothing."""

    def wait(self, action: Action) -> None:
        """Return at once."""

    def is_complete(self, action: Action) -> bool:
        """Return True."""
        return True

    def poll(self) -> None:
        """Do nothing."""


class TimedExecutor(Executor):
    """Notes the time of every action by its kind, and of one poll after every compute action.

    Parameters
    ----------
    schedule, rank, stages, transport, work
        As for `Executor`.
    waited_s : callable
        Seconds that this rank has waited so far, which do not count.

    Attributes
    ----------
    spent_s : dict of str to list of float
        Seconds of each action of a kind.
    """

    def __init__(
        self,
        schedule: Schedule,
        rank: int,
        stages: Mapping[int, Stage],
        transport: Transport,
        work: Work,
        waited_s: Callable[[], float],
    ) -> None:
        super().__init__(schedule, rank, stages, transport, work)
        self.spent_s: dict[str, list[float]] = defaultdict(list)
        self._waited_s = waited_s
        self._handlers = {kind: self._timed(handler) for kind, handler in self._handlers.items()}

    def _timed(self, handler: Callable[[Action], None]) -> Callable[[Action], None]:
        def run(action: Action) -> None:
            waited_s, start = self._waited_s(), time.perf_counter()
            handler(action)
            end = time.perf_counter()
            self.spent_s[action.kind].append(end - start - (self._waited_s() - waited_s))
            if action.kind in COMPUTE:
                start = time.perf_counter()
                self._poll()
                self.spent_s[POLL].append(time.perf_counter() - start)

        return run


@dataclass
class ActionCost:
    """What walking some lists took.

    Attributes
    ----------
    num_actions : int
        Actions of all lists.
    action_s : list of float
        Mean seconds per action, without waiting, one figure per repetition.
    spent_s : dict of str to list of float
        Seconds of each action of a kind, from repetitions of their own.
    """

    num_actions: int
    action_s: list[float]
    spent_s: dict[str, list[float]] = field(default_factory=dict)


def measure(
    schedule: Schedule,
    ranks: list[int],
    transport: Transport,
    repetitions: int,
    waited_s: Callable[[], float] = lambda: 0.0,
    meet: Callable[[], None] = lambda: None,
) -> ActionCost:
    """Walk the lists of some ranks one after the other, again and again, after one time that does not count.

    Parameters
    ----------
    schedule : Schedule
        Lowered and checked.
    ranks : list of int
        Whose lists are walked here: all with an `InstantTransport`, this rank's own with messages.
    transport : Transport
        Carries the messages.
    repetitions : int
        Walks of each list, at least 1; as many again are timed action by action.
    waited_s : callable
        Seconds that this rank has waited so far, which do not count.
    meet : callable
        Waits for the other ranks; called before each repetition, outside of what is timed.
    """
    empty = np.zeros((1, 1), np.int32)
    microbatch = Microbatch(empty, empty, empty.astype(np.float32))
    work = Work(load=lambda _: microbatch, gradients=lambda *_: [], finished=lambda *_: None)
    plain, timed = [], []
    for rank in ranks:
        stages = {index: Stage((), Parameters(()), 1, 1, 1) for index in schedule.stages_of(rank)}
        plain.append(Executor(schedule, rank, stages, transport, work))
        timed.append(TimedExecutor(schedule, rank, stages, transport, work, waited_s))
    cost = ActionCost(sum(len(schedule.actions[rank]) for rank in ranks), [])
    for repetition in range(repetitions + 1):
        meet()
        start_waited_s, start = waited_s(), time.perf_counter()
        for executor in plain:
            executor.run()
        spent = time.perf_counter() - start - (waited_s() - start_waited_s)
        if repetition > 0:
            cost.action_s.append(spent / cost.num_actions)
        meet()
        for executor in timed:
            executor.run()
    for executor in timed:
        for kind, seconds in executor.spent_s.items():
            cost.spent_s.setdefault(kind, []).extend(seconds)
    return cost
