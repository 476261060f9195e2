"""The task that hpcpipe and its peers do side by side: sizes, optimizer, tokens, starting values, timing.

Each peer's script has its own model and its own training step.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Task:
    """GPT-2 with 124 million parameters; a step trains on `samples` x `context` tokens.

    Tied embeddings, learned positions, tanh-GELU, LayerNorm with bias, no dropout; weight decay on matrices and tables.
    """

    layers: int = 12
    width: int = 768
    heads: int = 12
    context: int = 512
    vocab: int = 50257
    samples: int = 8
    learning_rate: float = 6e-4
    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0


@dataclass
class Args:
    """How a peer does the task."""

    precision: str = "f32"
    microbatch: int = Task.samples
    compile: bool = False
    threads: int = 1
    warmup: int = 2
    steps: int = 3
    task: Task = field(default_factory=Task)


def parse(description: str, microbatch: int, compiles: bool = False) -> Args:
    """Read a peer's command line, and give up the cores that it does not name.

    Parameters
    ----------
    description : str
        Of the script.
    microbatch : int
        Default of ``--microbatch``.
    compiles : bool
        Whether the script has ``--compile``.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=("f32", "bf16"), default="f32")
    if compiles:
        parser.add_argument("--compile", action="store_true", help="torch.compile")
    parser.add_argument("--microbatch", type=int, default=0, help=f"samples at once; default: {microbatch}")
    parser.add_argument("--threads", type=int, default=0, help="cores to use; default: all")
    parser.add_argument("--warmup", type=int, default=Args.warmup, help="steps before those that count")
    parser.add_argument("--steps", type=int, default=Args.steps, help="steps that count")
    parser.add_argument("--layers", type=int, default=Task.layers, help="fewer for a quick look")
    parser.add_argument("--samples", type=int, default=Task.samples, help="fewer for a quick look")
    values = vars(parser.parse_args())
    task = Task(layers=values.pop("layers"), samples=values.pop("samples"))
    args = Args(**values, task=task)
    args.microbatch = args.microbatch or min(microbatch, task.samples)
    if task.samples % args.microbatch:
        parser.error(f"--microbatch {args.microbatch} does not divide {task.samples} samples")
    args.threads = keep_cores(args.threads)
    return args


def keep_cores(count: int = 0) -> int:
    """Keep one hardware thread of each of `count` cores (0: of all), and return the number of cores kept.

    Both peers start their threads later, as many as there are processors then.
    """
    first_threads: dict[str, int] = {}
    for cpu in sorted(os.sched_getaffinity(0)):
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        first_threads.setdefault(siblings.read_text() if siblings.exists() else str(cpu), cpu)
    kept = list(first_threads.values())[: count or None]
    os.sched_setaffinity(0, kept)
    return len(kept)


def random_batch(task: Task, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens of a step and those that follow them, both int32 of shape (samples, context)."""
    windows = np.random.default_rng([1, step]).integers(0, task.vocab, (task.samples, task.context + 1), np.int32)
    return windows[:, :-1].copy(), windows[:, 1:].copy()


def initial_weights(task: Task, seed: int = 1) -> dict[str, np.ndarray]:
    """Return hpcpipe's starting values under hpcpipe's names: matrices are (inputs, outputs), tables (rows, width)."""
    from hpcpipe.config.schema import ModelConfig
    from hpcpipe.model.gpt2 import build_layers
    from hpcpipe.model.initial import fill_initial

    model = ModelConfig(
        layers=task.layers, width=task.width, heads=task.heads, context=task.context, vocab=task.vocab, tied=True
    )
    tensors = [tensor for layer in build_layers(model) for tensor in layer.tensors if not tensor.tied_to]
    weights = {tensor.name: np.empty(tensor.shape, np.float32) for tensor in tensors}
    for tensor in tensors:
        fill_initial(tensor, seed, weights[tensor.name])
    return weights


def measure(args: Args, packages: list[str], settings: dict, step: Callable[[np.ndarray, np.ndarray], float]) -> None:
    """Time a peer's steps, and print one JSON object.

    Parameters
    ----------
    args : Args
        The command line.
    packages : list of str
        Whose versions to tell.
    settings : dict
        What else to tell.
    step : callable
        Trains on a batch of `random_batch`, and returns its loss when the weights are updated.
    """
    losses, times_s, cpu_s = [], [], []
    for number in range(args.warmup + args.steps):
        batch = random_batch(args.task, number)
        start, cpu_start = time.perf_counter(), time.process_time()
        losses.append(step(*batch))
        times_s.append(time.perf_counter() - start)
        cpu_s.append(time.process_time() - cpu_start)
    tokens = args.task.samples * args.task.context
    rates = [tokens / step_s for step_s in times_s[args.warmup :]]
    result = {
        "tokens_per_s": statistics.median(rates),
        "lowest": min(rates),
        "highest": max(rates),
        "step_s": times_s[args.warmup :],
        "warmup_s": times_s[: args.warmup],
        "cpu_s": cpu_s[args.warmup :],
        "loss": losses,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
        "settings": {name: value for name, value in asdict(args).items() if name != "task"} | settings,
    }
    print(json.dumps(result))
