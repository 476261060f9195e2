"""What it costs that ranks show what they do: price and number of calls, steps with and without, the supervisor.

    python docs/benchmarks/measure_watch.py [--ranks N] [--steps N]

In one run of the quickstart the ranks are silent in every other pair of steps, so that whatever else happens on the
machine happens to both. Needs `mpirun` on PATH.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

from hpcpipe.schedule.action import Action, Kind
from hpcpipe.watch import start
from hpcpipe.watch.beacon import Beacon
from hpcpipe.watch.layout import Phase
from hpcpipe.watch.memory import SHARED_MEMORY, MemoryFile

CONFIG = Path(__file__).parents[2] / "configs" / "quickstart.toml"
CALLS = ("begin", "end", "posted", "nap", "waited")
COLD_STEPS = 20


class SilentNowAndThen(Beacon):
    """A beacon that shows nothing in the second pair of each four steps; counts its calls in the first."""

    is_silent = False
    counts: ClassVar[Counter[str]] = Counter()

    def step(self, step: int) -> None:
        """Say that a step begins."""
        SilentNowAndThen.is_silent = step // 2 % 2 == 1
        self.counts["step"] += not self.is_silent
        super().step(step)

    def close(self, *, has_failed: bool = False) -> None:
        """Print the calls per step."""
        sys.stderr.write(
            f"calls {json.dumps({k: round(v / self.counts['step'], 1) for k, v in self.counts.items()})}\n"
        )
        super().close(has_failed=has_failed)


def silenced(name: str) -> Callable[..., None]:
    """Return a method that does nothing in silent steps."""
    method = getattr(Beacon, name)

    def call(self: SilentNowAndThen, *args: object) -> None:
        if not self.is_silent:
            self.counts[name] += 1
            method(self, *args)

    return call


def be_a_rank(arguments: list[str]) -> int:
    """Train with a beacon that is silent now and then."""
    from hpcpipe.cli.main import main

    for name in CALLS:
        setattr(SilentNowAndThen, name, silenced(name))
    start.Beacon = SilentNowAndThen
    return main(arguments)


def price(call: Callable[[], object], number: int = 3000) -> float:
    """Return the microseconds that a call takes, the best of nine tries."""
    best = float("inf")
    for _ in range(9):
        began = time.thread_time()
        for _ in range(number):
            call()
        best = min(best, (time.thread_time() - began) / number * 1e6)
    return best


def prices(folder: Path) -> dict[str, float]:
    """Return the microseconds of each call."""
    beacon, message = Beacon(MemoryFile(folder / "memory", 1, 1), 0, 0), Action(Kind.RECV_F, 2, 1)
    beacon.configure(10.0)
    beacon.phase(Phase.TRAIN)
    now = time.perf_counter()
    empty = price(lambda: None)
    found = {
        "begin": price(lambda: beacon.begin(Kind.F, 1, 2)),
        "end": price(beacon.end),
        "posted": price(lambda: beacon.posted("RECV", message, 2, 7, 65536)),
        "waited": price(lambda: beacon.waited("RECV", message, 2, 7, now)),
    }
    beacon.nap("RECV", message, 2, 7, str)
    found["nap"] = price(lambda: beacon.nap("RECV", message, 2, 7, str))
    busy = price(lambda: (beacon.begin(Kind.F, 1, 2), beacon.end(), beacon.step(3)))
    return {name: value - empty for name, value in {**found, "step": busy - found["begin"] - found["end"]}.items()}


def share_of_supervisor(launch_id: str, seconds: float, told: list[float]) -> None:
    """Wait for the run to be under way, and note what part of a core its supervisor uses."""
    while not (files := list(SHARED_MEMORY.glob(f"hpcpipe-{launch_id}-*"))):
        time.sleep(0.1)
    time.sleep(15.0)
    memory = MemoryFile(files[0], 0)
    path = Path(f"/proc/{memory.supervisor()[0]}/schedstat")
    before = int(path.read_text().split()[0])
    time.sleep(seconds)
    told.append((int(path.read_text().split()[0]) - before) * 1e-9 / seconds)
    memory.close()


def main() -> int:
    """Measure and print."""
    if len(sys.argv) > 1 and sys.argv[1] == "train":
        return be_a_rank(sys.argv[1:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=1200)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder, launch_id = Path(name), f"measure-{os.getpid()}"
        print("us per call:", {key: round(value, 2) for key, value in prices(folder).items()})
        options = ["--with-ft", "ulfm", "--oversubscribe", "--bind-to", "none", "--mca", "btl", "self,sm"]
        command = ["mpirun", *options, "-n", str(args.ranks), sys.executable, __file__, "train", str(CONFIG)]
        for setting in (
            f"run.dir={folder}",
            f"train.steps={args.steps}",
            "train.eval_every=0",
            "checkpoint.every=1000000",
            "train.sample_tokens=0",
        ):
            command += ["--set", setting]
        environ = {**os.environ, "HPCPIPE_LAUNCH_ID": launch_id, "HPCPIPE_BIND": "cores", "OPENBLAS_NUM_THREADS": "1"}
        environ |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        told: list[float] = []
        threading.Thread(target=share_of_supervisor, args=(launch_id, 20.0, told), daemon=True).start()
        finished = subprocess.run(command, env=environ, capture_output=True, text=True)
        print(*(line for line in finished.stderr.splitlines() if line.startswith("calls ")), sep="\n")
        rows = [json.loads(line) for line in (folder / "quickstart" / "metrics.jsonl").read_text().splitlines()]
        steps = {row["step"]: row["step_s"] for row in rows if "step_s" in row and row["step"] > COLD_STEPS}
    pairs = [(steps[n] + steps[n + 1], steps[n + 2] + steps[n + 3]) for n in range(COLD_STEPS + 4, max(steps) - 3, 4)]
    differences = sorted((shown - silent) / silent for shown, silent in pairs)
    spread = 1.25 * statistics.stdev(differences) / len(differences) ** 0.5
    print(f"step: {statistics.median(silent for _, silent in pairs) / 2 * 1e3:.2f} ms (median, silent)")
    print(
        f"with, against without: {statistics.median(differences):+.2%} +- {spread:.2%} (median of {len(pairs)} pairs)"
    )
    print(f"supervisor: {told[0]:.3%} of a core" if told else "supervisor: the run was over too soon")
    return finished.returncode


if __name__ == "__main__":
    sys.exit(main())
