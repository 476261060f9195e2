"""What checkpoints cost training, on a disk as it is and on one that is a hundred times slower.

    python tests/faults/slow_disk.py [--rounds 5] [--steps 600] [--every 50] [--bytes-per-s 1e7] [CONFIG]

Each round trains without checkpoints, with them, and with them on a disk that takes and gives only so many bytes per
second in each writer (``HPCPIPE_TEST_DISK``), in an order that changes from round to round. Prints Markdown.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
HPCPIPE = str(Path(sys.executable).with_name("hpcpipe"))
WARMUP_STEPS = 20


def rows(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a log."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def train(args: argparse.Namespace, root: Path, name: str, every: int, disk: str) -> dict[str, float]:
    """Train once; return seconds per step, of which blocked, and what became of the checkpoints."""
    settings = {
        "run.dir": root,
        "run.name": name,
        "train.steps": args.steps,
        "train.eval_every": 0,
        "train.sample_tokens": 0,
        "data.validation_samples": 8,
        "checkpoint.every": every,
    }
    words = [HPCPIPE, "launch", "-n", "2", "train", str(args.config)]
    for key, value in settings.items():
        words += ["--set", f"{key}={value}"]
    environ = {**os.environ, **({"HPCPIPE_TEST_DISK": disk} if disk else {})}
    subprocess.run(words, env=environ, check=True, stdout=subprocess.DEVNULL)
    every_step = [row["step_s"] for row in rows(root / name / "metrics.jsonl") if "step_s" in row]
    steps = every_step[WARMUP_STEPS:]
    events = [event for event in rows(root / name / "events.jsonl") if 0 < event.get("step", 0) < args.steps]
    blocked = [event["blocked_s"] for event in events if event["event"] == "checkpoint"]
    return {
        "median_s": median(steps),
        "mean_s": (sum(steps) + sum(blocked)) / len(steps),
        "blocked_s": median(blocked) if blocked else 0.0,
        "share": sum(blocked) / (sum(steps) + sum(blocked)),
        "meanwhile": meanwhile(every_step, [event for event in events if event["event"] == "checkpoint"]),
        "written": len(blocked),
        "skipped": sum(event["event"] == "checkpoint skipped" for event in events),
    }


def meanwhile(steps: list[float], events: list[dict[str, Any]]) -> float:
    """Return the median step while a checkpoint was being written, over that of the other steps of the same run.

    Steps while one was being read back, which takes as long again, count as neither.
    """
    during, others = [], set(range(WARMUP_STEPS, len(steps)))
    for event in events:
        elapsed_s = 0.0
        for index in range(event["step"], len(steps)):
            elapsed_s += steps[index]
            if elapsed_s > 2.5 * event["seconds"]:
                break
            others.discard(index)
            if elapsed_s <= event["seconds"]:
                during.append(steps[index])
    return median(during) / median(steps[index] for index in others) if during and others else 1.0


def main() -> None:
    """Run all rounds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, nargs="?", default=ROOT / "configs/quickstart.toml")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--every", type=int, default=50)
    parser.add_argument("--bytes-per-s", type=float, default=1e7)
    args = parser.parse_args()
    kinds = {
        "no checkpoints": (0, ""),
        f"every {args.every} steps": (args.every, ""),
        f"every {args.every} steps, {args.bytes_per_s / 1e6:g} MB/s": (args.every, f"slow={args.bytes_per_s}"),
    }
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(args.rounds):
            order = list(kinds.items())
            for kind, (every, disk) in order[number % 3 :] + order[: number % 3]:
                name = f"{len(found[kind])}-{every}-{bool(disk):d}"
                found[kind].append(train(args, Path(folder), name, every, disk))
                print(kind, found[kind][-1], file=sys.stderr)
    print("| | median step ms | mean ms with waiting | waiting per checkpoint ms | of the time | written | skipped |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    for kind, results in found.items():
        ms = [f"{1e3 * median(r[key] for r in results):.2f}" for key in ("median_s", "mean_s", "blocked_s")]
        share = f"{median(r['share'] for r in results):.2%}"
        counts = [f"{median(r[key] for r in results):g}" for key in ("written", "skipped")]
        print(f"| {kind} | {' | '.join([*ms, share, *counts])} |")
    for kind, results in list(found.items())[1:]:
        ratios = sorted(result["meanwhile"] for result in results)
        spread = f"{ratios[0] - 1:+.1%} to {ratios[-1] - 1:+.1%}"
        print(
            f"\n{kind}: steps while one is written beside others of the same run {median(ratios) - 1:+.1%} ({spread})"
        )
    base, *others = found.values()
    for kind, results in zip(list(kinds)[1:], others, strict=True):
        for key, words in (("median_s", "median step"), ("mean_s", "mean step with waiting")):
            ratios = sorted(r[key] / b[key] for r, b in zip(results, base, strict=True))
            spread = f"{ratios[0] - 1:+.1%} to {ratios[-1] - 1:+.1%}"
            print(f"\n{kind} beside no checkpoints, {words}: {median(ratios) - 1:+.1%} ({spread})")


if __name__ == "__main__":
    main()
