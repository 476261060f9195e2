"""Measures what it takes to build every schedule, and to simulate it: ``python docs/benchmarks/measure_building.py``.

Each row is a schedule: processor seconds of ``build(name, 64, 512)``, which generates, lowers and checks, and of
`simulate` for 64 ranks and 256 microbatches; median of 5, lowest and highest in brackets. Names as arguments measure
only these schedules.
"""

import statistics
import sys
import time
from collections.abc import Callable

from hpcpipe.schedule.build import build
from hpcpipe.schedule.simulate import Costs, simulate

_RANKS = 64
_REPETITIONS = 5
_NAMES = (
    *("gpipe", "1f1b", "eager-1f1b", "zb-h1", "zb-h2", "looped-bfs", "interleaved", "interleaved-zb"),
    *("zb-v", "dualpipe-v", "v-half", "v-min"),
)


def measure(function: Callable[[], object]) -> str:
    """Call a function some times, and return the median, lowest and highest processor time."""
    times = []
    for _ in range(_REPETITIONS):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return f"{statistics.median(times):.3f} ({min(times):.3f} to {max(times):.3f})"


def main() -> None:
    """Print the table."""
    print("| schedule | build 64 x 512 | simulate 64 x 256 |\n|---|---|---|")
    for name in sys.argv[1:] or _NAMES:
        program = build(name, _RANKS, 256)
        costs = Costs.uniform(program)
        built = measure(lambda name=name: build(name, _RANKS, 512))
        simulated = measure(lambda program=program, costs=costs: simulate(program, costs))
        print(f"| {name} | {built} | {simulated} |", flush=True)


if __name__ == "__main__":
    main()
