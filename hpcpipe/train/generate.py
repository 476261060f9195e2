"""Writing text: the ranks that hold the model run it forward, one token at a time."""

import hashlib
from collections.abc import Callable, Sequence

import numpy as np

from hpcpipe.model.head import Head
from hpcpipe.model.layer import Microbatch
from hpcpipe.pipeline.executor import Executor, Work
from hpcpipe.pipeline.stage import Stash
from hpcpipe.pipeline.transport import Transport
from hpcpipe.schedule.action import Schedule
from hpcpipe.train.batches import empty_microbatch
from hpcpipe.train.evaluate import no_gradients
from hpcpipe.train.state import State

Share = Callable[[int], int]


class Generator:
    """Continues a sequence of tokens.

    Parameters
    ----------
    state : State
        Weights; only read.
    schedule : Schedule
        Forward-only, with one microbatch.
    stage_rank : int
        This rank's place in the pipeline.
    transport : Transport
        Carries the messages.
    share : callable
        Given the token that the last stage chose (any number elsewhere), returns it on every rank of the pipeline.
    """

    def __init__(self, state: State, schedule: Schedule, stage_rank: int, transport: Transport, share: Share) -> None:
        self._state = state
        self._context = state.config.model.context
        self._share = share
        self._last_stage = state.last_stage
        self._is_last = self._last_stage in state.stages
        self._microbatch = empty_microbatch(1, self._context)
        self._position = 0
        self._logits = np.zeros(state.config.model.vocab, np.float32)
        work = Work(load=self._load, gradients=no_gradients, finished=self._keep_logits)
        self._executor = Executor(schedule, stage_rank, state.compute_stages(1), transport, work)

    def run(
        self, prompt: Sequence[int], num_tokens: int, temperature: float, seed: int, end: int | None = None
    ) -> list[int]:
        """Return the tokens that follow a prompt; every rank of the pipeline calls it.

        Parameters
        ----------
        prompt : sequence of int
            At least one token; the model sees the last `context` of prompt and continuation.
        num_tokens : int
            Tokens to write.
        temperature : float
            Divides the logits; 0 takes the most likely token.
        seed : int
            The random numbers are a function of the seed and the position.
        end : int, optional
            Stop before this token.
        """
        tokens = list(prompt)
        for count in range(num_tokens):
            window = tokens[-self._context :]
            self._microbatch.tokens[0, : len(window)] = window
            self._position = len(window) - 1
            self._executor.run()
            chosen = choose(self._logits, temperature, uniform(seed, count)) if self._is_last else 0
            token = self._share(chosen)
            if token == end:
                break
            tokens.append(token)
        return tokens[len(prompt) :]

    def _load(self, index: int) -> Microbatch:
        return self._microbatch

    def _keep_logits(self, stage: int, index: int, microbatch: Microbatch, stash: Stash) -> None:
        if stage == self._last_stage:
            head = self._state.model[-1]
            assert isinstance(head, Head)
            head.logits(stash.layers[-1], self._position, self._logits)


def choose(logits: np.ndarray, temperature: float, number: float) -> int:
    """Pick a token: the one in whose part of the distribution a uniform number in [0, 1) falls."""
    if temperature == 0:
        return int(np.argmax(logits))
    scaled = logits.astype(np.float64) / temperature
    probabilities = np.exp(scaled - scaled.max())
    bounds = np.cumsum(probabilities)
    return min(int(np.searchsorted(bounds, number * bounds[-1], side="right")), len(logits) - 1)


def uniform(seed: int, position: int) -> float:
    """Return a number in [0, 1) that depends on nothing but the seed and the position."""
    digest = hashlib.blake2b(f"sample/{seed}/{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2.0**53
