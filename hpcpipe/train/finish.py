"""The end of a run: how well the model compresses beside compressors, and a sample of its text."""

import numpy as np

from hpcpipe.data.compression import baseline
from hpcpipe.data.tokenizer import tokenizer_named
from hpcpipe.data.windows import HeldOut
from hpcpipe.mpi.channel import Channel
from hpcpipe.mpi.collectives import gather_rows
from hpcpipe.pipeline.messages import Messages
from hpcpipe.schedule.build import build_forward
from hpcpipe.telemetry.text import visible
from hpcpipe.train.evaluate import Evaluation
from hpcpipe.train.generate import Generator
from hpcpipe.train.session import Session
from hpcpipe.train.state import State
from hpcpipe.train.stop import StopRequest

_TEMPERATURE = 0.7
_STOPPED = -1


def show_compression(session: Session, held_out: HeldOut, evaluation: Evaluation) -> None:
    """Say on rank 0 how many bits per byte the model, gzip and xz need for the same held-out bytes."""
    if not session.is_root:
        return
    raw = held_out.raw_bytes()
    others = baseline(raw)
    session.console.say(f"held-out loss: {evaluation.val_loss:.4f} nats per token over {len(raw):,} bytes of text")
    session.console.say(
        f"bits per byte: hpcpipe {evaluation.bits_per_byte:.3f}   gzip -9 {others['gzip']:.3f}"
        f"   xz -9 {others['xz']:.3f}"
    )
    session.events.add(
        "evaluated",
        val_loss=evaluation.val_loss,
        bits_per_byte=evaluation.bits_per_byte,
        gzip_bits_per_byte=others["gzip"],
        xz_bits_per_byte=others["xz"],
    )


def show_sample(session: Session, state: State, tokenizer_name: str, stop: StopRequest) -> None:
    """Let the first replica write text until it is asked to stop, and show it on rank 0."""
    config, grid = session.config, session.grid
    if config.train.sample_tokens == 0 or grid.replica != 0:
        return
    tokenizer = tokenizer_named(tokenizer_name)
    schedule = build_forward(state.placement, 1)
    messages = Messages(Channel(grid.pipeline_comm, session.waiter, session.mode), schedule)

    def share(token: int) -> int:
        rows = gather_rows(grid.pipeline_comm, session.waiter, np.array([token, stop.is_set]))
        return _STOPPED if rows[:, 1].any() else int(rows[state.placement[-1], 0])

    generator = Generator(state, schedule, grid.stage_rank, messages, share)
    prompt = [tokenizer.separator]
    tokens = generator.run(prompt, config.train.sample_tokens, _TEMPERATURE, config.run.seed, end=_STOPPED)
    session.console.say(f"a sample at temperature {_TEMPERATURE}:")
    session.console.say(visible(tokenizer.decode(tokens), kept="\n\t"))
