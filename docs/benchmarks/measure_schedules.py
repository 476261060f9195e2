"""Runs every schedule and compares the step that was predicted before the run with the one that was measured.

    python docs/benchmarks/measure_schedules.py OUTPUT.json [--ranks 2] [--rounds 3] [--steps 30] [--set KEY=VALUE]...

Each round goes through all schedules in turn. Before each run a run of a few steps measures the costs anew, so that a
prediction never comes from the run that it is compared with. The last line tells how far `auto` is behind the best.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCHEDULES = [
    ("1f1b", 1),
    ("gpipe", 1),
    ("eager-1f1b", 1),
    ("zb-h1", 1),
    ("zb-h2", 1),
    ("greedy", 1),
    ("looped-bfs", 2),
    ("interleaved", 2),
    ("interleaved-zb", 2),
    ("zb-v", 2),
    ("v-half", 2),
    ("v-min", 2),
    ("dualpipe-v", 2),
    ("greedy", 2),
    ("interleaved", 4),
    ("interleaved-zb", 4),
]
WARMUP_STEPS = 3


class Runner:
    """Starts runs below one directory, with one cache of kernels and costs."""

    def __init__(self, directory: Path, arguments: argparse.Namespace) -> None:
        self._directory = directory
        self._arguments = arguments
        self._environ = os.environ | {"HPCPIPE_CACHE_DIR": str(directory / "cache")}

    def run(self, schedule: str, chunks: int, steps: int) -> Path:
        """Train, and return the run directory, which the next run replaces."""
        directory = self._directory / "runs" / "run"
        shutil.rmtree(directory, ignore_errors=True)
        settings = [
            f"run.dir={directory.parent}",
            f"run.name={directory.name}",
            f"train.steps={steps}",
            "train.warmup_steps=1",
            "train.eval_every=0",
            "train.sample_tokens=0",
            "data.validation_samples=4",
            "checkpoint.every=0",
            f"parallel.schedule={schedule}",
            f"parallel.chunks={chunks}",
            *self._arguments.settings,
        ]
        words = ["hpcpipe", "launch", "-n", str(self._arguments.ranks), "train", str(ROOT / "configs/quickstart.toml")]
        words += [word for setting in settings for word in ("--set", setting)]
        subprocess.run(words, env=self._environ, check=True, stdout=subprocess.DEVNULL)
        return directory

    def forget_costs(self) -> None:
        """Make the next run measure."""
        for folder in (self._directory / "cache").glob("hpcpipe/*/costs"):
            shutil.rmtree(folder)

    def compare(self, schedule: str, chunks: int) -> dict:
        """Measure costs in one run, predict with them in the next, and return its figures."""
        self.forget_costs()
        self.run(schedule, chunks, steps=1)
        directory = self.run(schedule, chunks, self._arguments.steps)
        prediction = json.loads((directory / "prediction.json").read_text())
        assert prediction["costs_from_cache"]
        rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
        steps_s = [row["step_s"] for row in rows if "step_s" in row][WARMUP_STEPS:]
        return {
            "schedule": prediction["schedule"],
            "chunks": prediction["chunks"],
            "partition": prediction["partition"],
            "predicted_s": prediction["step_s"],
            "measured_s": statistics.median(steps_s),
            "quartiles_s": statistics.quantiles(steps_s, n=4)[::2],
            "costs": prediction["costs"],
        }


def summary(results: list[dict]) -> list[dict]:
    """Put the rounds of each schedule together, the fastest first."""
    table = {}
    for result in results:
        table.setdefault((result["asked"], result["chunks"]), []).append(result)
    rows = []
    for (name, chunks), rounds in table.items():
        errors = [result["measured_s"] / result["predicted_s"] - 1 for result in rounds]
        rows.append(
            {
                "schedule": name,
                "chunks": chunks,
                "ran": rounds[0]["schedule"],
                "measured_s": statistics.median(result["measured_s"] for result in rounds),
                "predicted_s": statistics.median(result["predicted_s"] for result in rounds),
                "error": statistics.median(errors),
                "errors": errors,
                "spread": (max(r["measured_s"] for r in rounds) / min(r["measured_s"] for r in rounds)) - 1,
            }
        )
    return sorted(rows, key=lambda row: row["measured_s"])


def main() -> None:
    """Measure, write the JSON file, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--only", action="append", help="NAME or NAME:CHUNKS; default: all")
    parser.add_argument("--set", action="append", default=[], dest="settings")
    arguments = parser.parse_args()
    schedules = SCHEDULES
    if arguments.only:
        wanted = [only.partition(":") for only in arguments.only]
        schedules = [(name, int(chunks or 0)) for name, _, chunks in wanted]
    results = []
    with tempfile.TemporaryDirectory() as directory:
        runner = Runner(Path(directory), arguments)
        runner.run("1f1b", 1, steps=1)
        for number in range(arguments.rounds):
            for name, chunks in [*schedules, ("auto", 0)]:
                result = {"round": number, "asked": name, **runner.compare(name, chunks)}
                results.append(result)
                error = result["measured_s"] / result["predicted_s"] - 1
                print(
                    f"round {number} {name:>15} x {chunks}: predicted {result['predicted_s']:.4f} s, measured"
                    f" {result['measured_s']:.4f} s, {error:+.1%}",
                    file=sys.stderr,
                    flush=True,
                )
                arguments.output.write_text(json.dumps({"arguments": sys.argv[1:], "results": results}, indent=1))
    rows = summary(results)
    print(f"{'schedule':<20}{'chunks':>7}{'measured s':>12}{'predicted s':>12}{'error':>8}{'spread':>8}")
    for row in rows:
        print(
            f"{row['schedule']:<20}{row['chunks']:>7}{row['measured_s']:>12.4f}{row['predicted_s']:>12.4f}"
            f"{row['error']:>+8.1%}{row['spread']:>8.1%}"
        )
    errors = sorted(abs(error) for row in rows for error in row["errors"])
    print(f"error: median {statistics.median(errors):.1%}, worst {errors[-1]:.1%} of {len(errors)} runs")
    fixed = [row for row in rows if row["schedule"] != "auto"]
    auto = [row for row in rows if row["schedule"] == "auto"]
    chosen = ", ".join(f"{row['ran']} x {row['chunks']}" for row in auto)
    measured = statistics.median(r["measured_s"] for r in results if r["asked"] == "auto")
    plain = next(row["measured_s"] for row in fixed if row["schedule"] == "1f1b")
    print(f"auto took {chosen}: {measured / fixed[0]['measured_s'] - 1:+.1%} against the best, {fixed[0]['schedule']}")
    print(f"auto against 1f1b: {measured / plain - 1:+.1%}")


if __name__ == "__main__":
    main()
