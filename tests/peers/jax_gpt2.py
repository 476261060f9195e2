"""Trains GPT-2 124M on random tokens with JAX, and prints its speed as one JSON object.

    python tests/peers/jax_gpt2.py [--precision f32|bf16] [--microbatch SAMPLES] [--threads CORES]

One process with all cores; the whole step is one jitted function to which the old state is donated. bf16 is the usual
mixed precision: weights, gradients, moments, LayerNorm, softmax and loss in float32, matrix products and what lies
between them in bfloat16. The loop over layers is unrolled and attention is written out: on CPUs both were faster than
lax.scan and jax.nn.dot_product_attention.
"""

import math
import os
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from gpt2_task import Args, Task, initial_weights, measure, parse


def layer_norm(x, w):
    """Normalise in float32."""
    x = x.astype(jnp.float32)
    centred = x - x.mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-5) * w["weight"] + w["bias"]


def linear(x, w, dtype):
    """Multiply in `dtype`."""
    return x.astype(dtype) @ w["weight"].astype(dtype) + w["bias"].astype(dtype)


def block(x, w, heads, dtype):
    """Attention and perceptron, each behind a LayerNorm and added to the residual stream."""
    batch, context, width = x.shape
    qkv = linear(layer_norm(x, w["norm1"]), w["attention/qkv"], dtype)
    q, k, v = (part.reshape(batch, context, heads, -1).swapaxes(1, 2) for part in jnp.split(qkv, 3, axis=-1))
    scores = (q @ k.swapaxes(2, 3)).astype(jnp.float32) / math.sqrt(width // heads)
    causal = jnp.tril(jnp.ones((context, context), bool))
    probabilities = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf), axis=-1).astype(dtype)
    attended = (probabilities @ v).swapaxes(1, 2).reshape(batch, context, width)
    x = x + linear(attended, w["attention/output"], dtype)
    hidden = jax.nn.gelu(linear(layer_norm(x, w["norm2"]), w["mlp/up"], dtype), approximate=True)
    return x + linear(hidden, w["mlp/down"], dtype)


def mean_loss(w, tokens, targets, task: Task, dtype):
    """Return the mean cross-entropy of a microbatch."""
    table = w["embedding/token"]["weight"]
    x = table[tokens] + w["embedding/position"]["weight"]
    for index in range(task.layers):
        prefix = f"layers/{index:03d}/"
        x = block(x, {name[len(prefix) :]: w[name] for name in w if name.startswith(prefix)}, task.heads, dtype)
    logits = layer_norm(x, w["head/norm"]).astype(dtype) @ table.astype(dtype).T
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), targets).mean()


def loss_and_gradient(w, tokens, targets, args: Args):
    """Return loss and gradient of a batch, one microbatch after the other."""
    task, dtype = args.task, jnp.bfloat16 if args.precision == "bf16" else jnp.float32
    of_microbatch = jax.value_and_grad(partial(mean_loss, task=task, dtype=dtype))
    count = task.samples // args.microbatch
    if count == 1:
        return of_microbatch(w, tokens, targets)
    microbatches = [part.reshape(count, args.microbatch, task.context) for part in (tokens, targets)]
    zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, w))
    total, _ = jax.lax.scan(
        lambda sums, m: (jax.tree.map(jnp.add, sums, of_microbatch(w, *m)), None), zeros, microbatches
    )
    return jax.tree.map(lambda value: value / count, total)


class Trainer:
    """Weights under hpcpipe's names, as {"mlp/up": {"weight": ..., "bias": ...}}, and the optimizer's state."""

    def __init__(self, args: Args, weights: dict[str, np.ndarray]) -> None:
        task = args.task
        self.weights: dict[str, dict[str, jax.Array]] = {}
        for name, value in weights.items():
            layer, _, kind = name.rpartition("/")
            self.weights.setdefault(layer, {})[kind] = jnp.asarray(value)
        optimizer = optax.chain(
            optax.clip_by_global_norm(task.clip),
            optax.adamw(
                task.learning_rate,
                *task.betas,
                eps=task.epsilon,
                weight_decay=task.weight_decay,
                mask=lambda w: jax.tree.map(lambda value: value.ndim > 1, w),
            ),
        )
        self.state = optimizer.init(self.weights)

        @partial(jax.jit, donate_argnums=(0, 1))
        def step(w, state, tokens, targets):
            loss, gradient = loss_and_gradient(w, tokens, targets, args)
            updates, state = optimizer.update(gradient, state, w)
            return optax.apply_updates(w, updates), state, loss

        self._step = step

    def step(self, tokens: np.ndarray, targets: np.ndarray) -> float:
        """Train on a batch, and return its loss when the weights are updated."""
        self.weights, self.state, loss = self._step(self.weights, self.state, tokens, targets)
        jax.block_until_ready((self.weights, self.state))
        return float(loss)


def main() -> None:
    """Read the command line, and time some steps."""
    args = parse(__doc__, microbatch=2)
    trainer = Trainer(args, initial_weights(args.task))
    measure(args, ["jax", "jaxlib", "optax"], {"XLA_FLAGS": os.environ.get("XLA_FLAGS", "")}, trainer.step)


if __name__ == "__main__":
    main()
