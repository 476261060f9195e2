"""How a rank's own part of a step compares with what it usually takes."""

from collections import deque
from statistics import median

_RECENT = 5
_USUAL = 40
_FEWEST = 4
_COLD = 2


class Pace:
    """Compares the last steps with those before them, so that single slow steps do not count.

    The last ones are taken by their median, or by four thirds of the shortest if that is less: whoever shares its core
    with others has slow steps now and then, one that has become slower has no others.
    """

    def __init__(self) -> None:
        self._num_steps = 0
        self._times: deque[float] = deque(maxlen=_RECENT + _USUAL)

    def add(self, own_s: float) -> float:
        """Take a step's time without waits; return how many times longer the last ones took than those before.

        Returns
        -------
        float
            0 while too few steps are known.
        """
        self._num_steps += 1
        if self._num_steps > _COLD:
            self._times.append(own_s)
        if len(self._times) < _RECENT + _FEWEST:
            return 0.0
        times = list(self._times)
        usual = median(times[:-_RECENT])
        recent = times[-_RECENT:]
        return min(median(recent), min(recent) * 4 / 3) / usual if usual > 0 else 0.0
