"""The one executor: it walks a rank's list of actions, whatever schedule made it."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from hpcpipe.faults import hooks
from hpcpipe.memory.layout import Extent, Memory, new_memory
from hpcpipe.model.layer import Arrays, Microbatch
from hpcpipe.pipeline.buffers import Key, RankLayout
from hpcpipe.pipeline.pool import Pool
from hpcpipe.pipeline.stage import Stage, Stash
from hpcpipe.pipeline.transport import Transport
from hpcpipe.schedule.action import COMPUTE, UPDATE, Action, Kind, Schedule

ACTIVATIONS = "activations"
"""What the memory of executors is counted under."""

_PHASES = {Kind.F: "forward", Kind.B: "backward", Kind.I: "backward", Kind.W: "backward"}
_SHOWN = COMPUTE | UPDATE


def _nothing(*_: Kind | int) -> None:
    """Do nothing, where nothing is trained or there is one replica."""


@dataclass(frozen=True)
class Computed:
    """What a compute action has left, for who wants to check it before it is used.

    Attributes
    ----------
    action : Action
        ``F``, ``B``, ``I`` or ``W``.
    result : ndarray or None
        Output of a forward, or gradient of a stage's input; None where there is none, as with the loss and for ``W``.
    microbatch : Microbatch
        What it was computed from; has the loss after the head's forward.
    stash : Stash
        What the forward has left for the backward.
    again : callable
        Computes a forward once more, with the same effect.
    """

    action: Action
    result: np.ndarray | None
    microbatch: Microbatch
    stash: Stash
    again: Callable[[], None] = _nothing


@dataclass
class Work:
    """What an executor calls for each microbatch, and at the end of a step.

    Attributes
    ----------
    load : callable
        Gives the microbatch of an index; the same object until that microbatch's backward is done.
    gradients : callable
        Gives the gradient arrays of a stage's layers that a microbatch adds to; not called in forward-only schedules.
    finished : callable
        Told when the weight gradients of (stage, microbatch) are added, or the forward is done in a forward-only one.
    reduce : callable
        Told when all weight gradients of a stage are added: starts their sum over the replicas.
    step : callable
        Updates a stage; the schedule's messages are done and its time is taken before the first call.
    poll : callable
        Called between kernels and while the rank waits for a message: lets what `reduce` started move.
    begin, end : callable
        Told that an action begins, with kind, stage and microbatch, and that it is done; not of messages.
    check : callable or None
        Told of each compute action when it is done; it may be set and taken back between two runs.
    """

    load: Callable[[int], Microbatch]
    gradients: Callable[[int, int], list[Arrays]]
    finished: Callable[[int, int, Microbatch, Stash], None]
    reduce: Callable[[int], None] = _nothing
    step: Callable[[int], None] = _nothing
    poll: Callable[[], None] = _nothing
    begin: Callable[[Kind, int, int], None] = _nothing
    end: Callable[[], None] = _nothing
    check: Callable[[Computed], None] | None = None


class Executor:
    """Walks the list of one rank.

    Parameters
    ----------
    schedule : Schedule
        Lowered and checked.
    rank : int
        This rank's place in the pipeline.
    stages : mapping of int to Stage
        The stages that this rank holds.
    transport : Transport
        Carries the messages.
    work : Work
        Gives microbatches and gradient buffers.
    memory : Memory, optional
        What its stages compute on, at least what `hpcpipe.pipeline.buffers.RankLayout` plans; the caller's, which may
        give it to other executors that do not run at the same time. Without it the executor makes its own.

    Attributes
    ----------
    run_s : float
        Seconds that the last `run` took, updates left out.
    memory : Memory
        What its stages compute on.
    """

    def __init__(
        self,
        schedule: Schedule,
        rank: int,
        stages: Mapping[int, Stage],
        transport: Transport,
        work: Work,
        memory: Memory | None = None,
    ) -> None:
        self._schedule = schedule
        self._actions = schedule.actions[rank]
        # The schedule searches its lists for a backward each time it is asked.
        self._is_forward_only = schedule.is_forward_only
        self._stages = stages
        self._transport = transport
        self._work = work
        self.run_s = 0.0
        self._start_s = 0.0
        self._is_timed = False
        layout = RankLayout(schedule, rank, {index: stage.shape for index, stage in stages.items()})
        offsets, extent = layout.place()
        self.memory = new_memory(extent, ACTIVATIONS) if memory is None else memory
        assert self.memory.holds(extent)
        streams = layout.streams.cut(self.memory)
        self._streams = Pool(streams.values())
        # Stands for the input of the embedding and the output of the head, which nobody reads or writes.
        self._unused = streams[0].view()
        for index, stage in stages.items():
            stage.bind(layout.stages[index], self.memory.at(layout.working_at))
        self._shared = {index: stage.shared_upstream() for index, stage in stages.items()}
        self._stashes: dict[Key, Stash] = {}
        self._upstreams: dict[Key, list[Arrays]] = {}
        self._find_stashes(offsets)
        self._x: dict[Key, np.ndarray] = {}
        self._out: dict[Key, np.ndarray] = {}
        self._d: dict[Key, np.ndarray] = {}
        self._leaving: list[tuple[Action, np.ndarray]] = []
        self._handlers: dict[Kind, Callable[[Action], None]] = {
            Kind.F: self._forward,
            Kind.B: self._backward,
            Kind.I: self._backward_input,
            Kind.W: self._backward_weight,
            Kind.RECV_F: self._receive_input,
            Kind.RECV_B: self._receive_gradient,
            Kind.SEND_F: self._send_output,
            Kind.SEND_B: self._send_gradient,
            Kind.REDUCE: lambda action: work.reduce(action.stage),
            Kind.STEP: self._step,
        }

    def _find_stashes(self, offsets: Mapping[tuple[Key, bool], Extent]) -> None:
        """Give each (stage, microbatch) its part of the memory; those at one place share what describes it."""
        stashes: dict[tuple[int, Extent], Stash] = {}
        upstreams: dict[tuple[int, Extent], list[Arrays]] = {}
        for (key, is_upstream), offset in offsets.items():
            stage, place = self._stages[key[0]], (key[0], offset)
            if is_upstream and place not in upstreams:
                upstreams[place] = stage.upstream_in(self.memory.at(offset))
            elif not is_upstream and place not in stashes:
                stashes[place] = stage.stash_in(self.memory.at(offset))
            if is_upstream:
                self._upstreams[key] = upstreams[place]
            else:
                self._stashes[key] = stashes[place]

    def run(self) -> None:
        """Walk the whole list once; on return no message is under way."""
        self._start_s = time.perf_counter()
        self._is_timed = True
        for action in self._actions:
            if action.kind not in _SHOWN:
                self._handlers[action.kind](action)
                continue
            self._work.begin(*action)
            if action.kind in _PHASES:
                hooks.point(_PHASES[action.kind], action.microbatch)
            self._handlers[action.kind](action)
            self._work.end()
        self._end_schedule()

    def _step(self, action: Action) -> None:
        self._end_schedule()
        self._work.step(action.stage)

    def _end_schedule(self) -> None:
        """Collect what is still under way and take the time, once per run."""
        while self._leaving:
            self._collect_oldest()
        if self._is_timed:
            self.run_s = time.perf_counter() - self._start_s
            self._is_timed = False

    def _poll(self) -> None:
        self._transport.poll()
        self._work.poll()

    def _forward(self, action: Action) -> None:
        key = (action.stage, action.microbatch)
        stage, microbatch = self._stages[action.stage], self._work.load(action.microbatch)
        if self._schedule.input_crosses(action.stage):
            self._transport.wait(Action(Kind.RECV_F, *key))
        elif action.stage == 0:
            self._x[key] = self._unused
        else:
            self._x[key] = self._out.pop((action.stage - 1, action.microbatch))
        is_last = action.stage + 1 == self._schedule.num_stages
        out = self._unused if is_last else self._take()
        stage.forward(microbatch, self._x[key], out, self._stashes[key], self._poll)
        if not is_last:
            hooks.corrupt("activation", [out], action.microbatch)
            self._out[key] = out
        if self._work.check is not None:
            again = partial(stage.forward, microbatch, self._x[key], out, self._stashes[key], self._poll)
            self._work.check(Computed(action, None if is_last else out, microbatch, self._stashes[key], again))
        if self._is_forward_only:
            self._work.finished(*key, microbatch, self._stashes[key])
            self._release(key)

    def _backward(self, action: Action) -> None:
        key, d, microbatch = self._enter_backward(action)
        self._stages[action.stage].backward(
            microbatch,
            self._x[key],
            d,
            self._stashes[key],
            self._shared[action.stage],
            self._work.gradients(*key),
            self._poll,
        )
        self._check(action, d, microbatch)
        self._leave_backward(key, d)
        self._work.finished(*key, microbatch, self._stashes[key])
        self._release(key)

    def _backward_input(self, action: Action) -> None:
        key, d, microbatch = self._enter_backward(action)
        self._stages[action.stage].backward_input(
            microbatch, self._x[key], d, self._stashes[key], self._upstreams[key], self._poll
        )
        self._check(action, d, microbatch)
        self._leave_backward(key, d)

    def _backward_weight(self, action: Action) -> None:
        key = (action.stage, action.microbatch)
        microbatch = self._work.load(action.microbatch)
        self._stages[action.stage].backward_weight(
            microbatch, self._x[key], self._stashes[key], self._upstreams[key], self._work.gradients(*key), self._poll
        )
        self._check(action, None, microbatch)
        self._work.finished(*key, microbatch, self._stashes[key])
        self._release(key)

    def _check(self, action: Action, d: np.ndarray | None, microbatch: Microbatch) -> None:
        """Show the gradients that a backward has left."""
        if self._work.check is not None:
            key = (action.stage, action.microbatch)
            self._work.check(Computed(action, d, microbatch, self._stashes[key]))

    def _enter_backward(self, action: Action) -> tuple[Key, np.ndarray, Microbatch]:
        """Get the gradient of a stage's output: from a message, from the next stage here, or from the loss."""
        key = (action.stage, action.microbatch)
        if self._schedule.output_crosses(action.stage):
            self._transport.wait(Action(Kind.RECV_B, *key))
            d = self._d.pop(key)
        elif action.stage + 1 == self._schedule.num_stages:
            d = self._take()
        else:
            d = self._d.pop(key)
        return key, d, self._work.load(action.microbatch)

    def _leave_backward(self, key: Key, d: np.ndarray) -> None:
        """Keep the gradient of a stage's input for the stage in front, if there is one."""
        stage, k = key
        if stage == 0:
            self._streams.give_back(d)
        elif self._schedule.input_crosses(stage):
            self._d[key] = d
        else:
            self._d[stage - 1, k] = d

    def _receive_input(self, action: Action) -> None:
        buffer = self._x[action.stage, action.microbatch] = self._take()
        self._transport.post_receive(action, buffer)

    def _receive_gradient(self, action: Action) -> None:
        buffer = self._d[action.stage, action.microbatch] = self._take()
        self._transport.post_receive(action, buffer)

    def _send_output(self, action: Action) -> None:
        self._send(action, self._out.pop((action.stage, action.microbatch)))

    def _send_gradient(self, action: Action) -> None:
        self._send(action, self._d.pop((action.stage, action.microbatch)))

    def _send(self, action: Action, buffer: np.ndarray) -> None:
        self._transport.start_send(action, buffer)
        self._leaving.append((action, buffer))

    def _take(self) -> np.ndarray:
        """Take a stream, after collecting those whose messages have left."""
        while self._leaving and self._transport.is_complete(self._leaving[0][0]):
            self._collect_oldest()
        while not self._streams:
            self._collect_oldest()
        return self._streams.take()

    def _collect_oldest(self) -> None:
        send, buffer = self._leaving.pop(0)
        self._transport.wait(send)
        self._streams.give_back(buffer)

    def _release(self, key: Key) -> None:
        """Give back the stream that a microbatch held on a stage."""
        x = self._x.pop(key)
        if x is not self._unused:
            self._streams.give_back(x)
