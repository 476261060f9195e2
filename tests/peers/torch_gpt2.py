"""Trains GPT-2 124M on random tokens with PyTorch, and prints its speed as one JSON object.

    python tests/peers/torch_gpt2.py [--precision f32|bf16] [--compile] [--microbatch SAMPLES] [--threads CORES]

As PyTorch recommends: torch.compile (or eager), autocast to bfloat16 over float32 weights, fused attention and AdamW,
one thread per core.
"""

import json
import os
import shutil

import numpy as np
import torch
from gpt2_task import Args, Task, initial_weights, measure, parse
from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
    """Attention and perceptron, each behind a LayerNorm and added to the residual stream."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.heads = task.heads
        self.norm1 = nn.LayerNorm(task.width)
        self.qkv = nn.Linear(task.width, 3 * task.width)
        self.output = nn.Linear(task.width, task.width)
        self.norm2 = nn.LayerNorm(task.width)
        self.up = nn.Linear(task.width, 4 * task.width)
        self.down = nn.Linear(4 * task.width, task.width)

    def forward(self, x):
        """Return the residual stream behind the block."""
        batch, context, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).split(width, dim=2)
        q, k, v = (part.view(batch, context, self.heads, -1).transpose(1, 2) for part in (q, k, v))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.output(attended.transpose(1, 2).reshape(batch, context, width))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class GPT2(nn.Module):
    """The model, up to the mean loss of a microbatch."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.token = nn.Embedding(task.vocab, task.width)
        self.position = nn.Embedding(task.context, task.width)
        self.blocks = nn.ModuleList(Block(task) for _ in range(task.layers))
        self.norm = nn.LayerNorm(task.width)

    def forward(self, tokens, targets):
        """Return the mean cross-entropy."""
        x = self.token(tokens) + self.position.weight
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm(x), self.token.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def layers(self) -> dict[str, nn.Module]:
        """Return the modules that hold weights, under hpcpipe's names."""
        found = {"embedding/token": self.token, "embedding/position": self.position, "head/norm": self.norm}
        for index, block in enumerate(self.blocks):
            names = ("norm1", "attention/qkv", "attention/output", "norm2", "mlp/up", "mlp/down")
            found |= {f"layers/{index:03d}/{name}": getattr(block, name.rpartition("/")[2]) for name in names}
        return found


class Trainer:
    """The model and its optimizer, in one process."""

    def __init__(self, args: Args, weights: dict[str, np.ndarray]) -> None:
        self.args, task = args, args.task
        self.model = GPT2(task)
        for name, layer in self.model.layers().items():
            for kind, parameter in layer.named_parameters():
                value = torch.from_numpy(weights[f"{name}/{kind}"])
                # nn.Linear keeps (outputs, inputs), hpcpipe (inputs, outputs).
                parameter.data.copy_(value.T if isinstance(layer, nn.Linear) and value.ndim == 2 else value)
        parameters = list(self.model.parameters())
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": task.weight_decay},
            {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            groups, lr=task.learning_rate, betas=task.betas, eps=task.epsilon, fused=True
        )
        self._loss = torch.compile(self.model) if args.compile else self.model

    def step(self, tokens: np.ndarray, targets: np.ndarray) -> float:
        """Train on a batch, and return its loss when the weights are updated."""
        size, share = self.args.microbatch, self.args.microbatch / len(tokens)
        total = 0.0
        self.optimizer.zero_grad(set_to_none=True)
        for x, y in zip(
            torch.from_numpy(tokens).split(size), torch.from_numpy(targets).long().split(size), strict=True
        ):
            with torch.autocast("cpu", torch.bfloat16, enabled=self.args.precision == "bf16"):
                loss = self._loss(x, y) * share
            loss.backward()
            total += loss.item()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.args.task.clip)
        self.optimizer.step()
        return total


def main() -> None:
    """Read the command line, and time some steps."""
    args = parse(__doc__, microbatch=2, compiles=True)
    if args.compile and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++"))):
        print(json.dumps({"skipped": "torch.compile needs a C++ compiler such as g++, and there is none"}))
        return
    torch.set_num_threads(args.threads)
    trainer = Trainer(args, initial_weights(args.task))
    measure(args, ["torch"], {"capability": torch.backends.cpu.get_cpu_capability()}, trainer.step)


if __name__ == "__main__":
    main()
