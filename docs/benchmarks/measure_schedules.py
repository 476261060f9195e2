"""Runs every schedule and compares the step that was predicted before the run with the one that was measured.

    python docs/benchmarks/measure_schedules.py OUTPUT.json [--ranks 2] [--rounds 3] [--steps 20] [--set KEY=VALUE]...

Each round goes through all schedules in turn. A prediction is made from the costs that the run before it observed, of
another schedule. The last lines tell how far `auto` is behind the best.
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

    def compare(self, schedule: str, chunks: int) -> dict:
        """Run a schedule, and return what was predicted and measured."""
        directory = self.run(schedule, chunks, self._arguments.steps)
        prediction = json.loads((directory / "prediction.json").read_text())
        assert prediction["costs_from_cache"]
        rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
        steps_s = [row["step_s"] for row in rows if "step_s" in row]
        events = [json.loads(line) for line in (directory / "events.jsonl").read_text().splitlines()]
        compared = next(event for event in events if event["event"] == "step time")
        return {
            "schedule": prediction["schedule"],
            "ran_chunks": prediction["chunks"],
            "partition": prediction["partition"],
            "predicted_s": compared["predicted_s"],
            "measured_s": compared["measured_s"],
            "explained_s": compared["explained_s"],
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
                "ran": sorted({f"{result['schedule']} x {result['ran_chunks']}" for result in rounds}),
                "measured_s": statistics.median(result["measured_s"] for result in rounds),
                "predicted_s": statistics.median(result["predicted_s"] for result in rounds),
                "explained_s": statistics.median(result["explained_s"] for result in rounds),
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
    parser.add_argument("--steps", type=int, default=20)
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
        runner.run("1f1b", 1, arguments.steps)
        for number in range(arguments.rounds):
            for name, chunks in [*schedules, ("auto", 0)]:
                result = {"round": number, "asked": name, "chunks": chunks, **runner.compare(name, chunks)}
                results.append(result)
                error = result["measured_s"] / result["predicted_s"] - 1
                print(
                    f"round {number} {name:>15} x {chunks}: predicted {result['predicted_s']:.4f} s, measured"
                    f" {result['measured_s']:.4f} s, {error:+.1%}",
                    file=sys.stderr,
                    flush=True,
                )
                arguments.output.write_text(json.dumps({"arguments": sys.argv[1:], "results": results}, indent=1))
    report(summary(results))


def report(rows: list[dict]) -> None:
    """Print the tables."""
    print("| schedule | stages per rank | measured s | predicted s | error | explained s | error | spread of runs |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|")
    for row in rows:
        measured, predicted, explained = row["measured_s"], row["predicted_s"], row["explained_s"]
        print(
            f"| {row['schedule']} | {row['chunks'] or ''} | {measured:.4f} | {predicted:.4f} |"
            f" {measured / predicted - 1:+.1%} | {explained:.4f} | {measured / explained - 1:+.1%} |"
            f" {row['spread']:.1%} |"
        )
    by_schedule = sorted(abs(row["measured_s"] / row["predicted_s"] - 1) for row in rows)
    by_run = sorted(abs(error) for row in rows for error in row["errors"])
    for what, errors in (("schedules", by_schedule), ("runs", by_run)):
        median, worst = statistics.median(errors), errors[-1]
        print(f"error over {len(errors)} {what}: median {median:.1%}, worst {worst:.1%}")
    fixed = [row for row in rows if row["schedule"] != "auto"]
    auto = next(row for row in rows if row["schedule"] == "auto")
    plain = next(row for row in fixed if row["schedule"] == "1f1b")
    print(f"auto took {', '.join(auto['ran'])}")
    print(f"against the best, {fixed[0]['schedule']}: {auto['measured_s'] / fixed[0]['measured_s'] - 1:+.1%}")
    print(f"against 1f1b: {auto['measured_s'] / plain['measured_s'] - 1:+.1%}")


if __name__ == "__main__":
    main()
