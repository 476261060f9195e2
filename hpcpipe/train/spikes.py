"""Whether a loss or a gradient norm jumps: how far it lies above the last ones, by medians, not means."""

import math
from bisect import bisect_left, insort
from collections import deque

WINDOW = 128
"""Steps that a step is compared with."""
LEAST_SEEN = 32
"""Steps before the first alarm."""
ALARM, GRAVE = 6.0, 10.0
"""Scores above which a step is a spike, and above which one is enough to go back."""
MANY = 3
"""Spikes within the window that are enough to go back."""

# The median of absolute deviations of normal numbers, times this, is their standard deviation.
_TO_DEVIATION = 1.4826
# So is what is above the median up to where 4 of 128 of them begin, divided by this. Outliers are fewer than that; runs
# with small steps have such tails all the time.
_TAIL, _TO_TAIL = 4 / WINDOW, 1.86
# Least deviations: a jump that is smaller than ALARM times these is no alarm, however calm the run was before.
_LEAST_OF_LOSS = 0.01
_LEAST_OF_NORM = 0.15


class _Series:
    """The last numbers of a series, in their order and sorted."""

    def __init__(self) -> None:
        self._values: deque[float] = deque()
        self._sorted: list[float] = []

    def __len__(self) -> int:
        return len(self._values)

    def add(self, value: float) -> None:
        """Take a number, and drop the oldest if there are too many."""
        if len(self._values) == WINDOW:
            del self._sorted[bisect_left(self._sorted, self._values.popleft())]
        self._values.append(value)
        insort(self._sorted, value)

    def score(self, value: float, least: float, least_relative: float = 0.0) -> float:
        """Return how many deviations a number lies above the median; 0 where it cannot be more than `ALARM`.

        Parameters
        ----------
        value : float
            The number.
        least, least_relative : float
            Least deviation, by itself and as a part of the median's magnitude.
        """
        center = _median(self._sorted)
        excess, floor = value - center, max(least, least_relative * abs(center))
        # Most numbers end here, before anything is sorted.
        if excess <= ALARM * floor:
            return 0.0
        usual = _TO_DEVIATION * _median(sorted(abs(other - center) for other in self._values))
        tail = self._sorted[-1 - math.ceil(_TAIL * len(self._sorted))] - center
        deviation = max(floor, usual, tail / _TO_TAIL)
        return excess / deviation if deviation > 0 else math.inf


def _median(ordered: list[float]) -> float:
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


class SpikeWatch:
    """Scores each step against the steps before it.

    The score is how many robust standard deviations (from the median of absolute deviations, or from the upper tail if
    that is heavier) a loss lies above the median of the last `WINDOW`, or the logarithm of a gradient norm above that
    of the last norms, whichever is more. It is a function of the numbers alone, so that all ranks find the same.
    """

    def __init__(self) -> None:
        self._losses, self._norms = _Series(), _Series()
        self._spikes: deque[bool] = deque(maxlen=WINDOW)

    def score(self, loss: float, norm: float) -> float:
        """Return how far a step stands out; 0 where it clearly does not, and while too few were seen.

        Parameters
        ----------
        loss, norm : float
            Of the step, finite.
        """
        if len(self._losses) < LEAST_SEEN:
            return 0.0
        of_loss = self._losses.score(loss, 0.0, _LEAST_OF_LOSS)
        return max(0.0, of_loss, self._norms.score(_log(norm), _LEAST_OF_NORM))

    def add(self, loss: float, norm: float) -> None:
        """Take a step, spike or not, so that a lasting change stops being one."""
        self._spikes.append(self.score(loss, norm) > ALARM)
        self._losses.add(loss)
        self._norms.add(_log(norm))

    @property
    def num_spikes(self) -> int:
        """Spikes within the window."""
        return sum(self._spikes)


def _log(norm: float) -> float:
    """Return the logarithm of a norm; of zero a very small number."""
    return math.log(max(norm, 1e-300))
