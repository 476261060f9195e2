"""What a run says of itself before its first step."""

import hpcpipe
from hpcpipe.data.reader import TokenFile
from hpcpipe.kernels import warm
from hpcpipe.model.gpt2 import count_parameters
from hpcpipe.train.footprint import describe_predicted
from hpcpipe.train.plan import Plan, describe_plan
from hpcpipe.train.session import Session
from hpcpipe.train.state import State


def introduce(session: Session, state: State, tokens: TokenFile, plan: Plan, needed: dict[str, int]) -> None:
    """Say what is about to run."""
    config, grid, say = session.config, session.grid, session.console.say
    model, parallel = config.model, config.parallel
    ranks = "1 rank" if grid.comm.size == 1 else f"{grid.comm.size} ranks"
    stages = "1 stage" if parallel.chunks == 1 else f"{parallel.chunks} stages"
    say(f"hpcpipe {hpcpipe.__version__}: {ranks} = pipeline of {grid.pipeline} x {grid.data} replicas")
    say(
        f"schedule: {parallel.schedule}, {stages} per rank, {parallel.microbatches} microbatches of"
        f" {parallel.microbatch_size} samples"
    )
    say(describe_plan(plan))
    say(
        f"model: {model.kind}, {model.layers} layers, width {model.width}, {model.heads} heads,"
        f" context {model.context}, {count_parameters(state.model):,} parameters"
    )
    say(f"data: {tokens.path}, {tokens.num_tokens:,} tokens in {tokens.num_documents:,} documents of {tokens.source}")
    say(f"kernels: {warm.describe(config.train.precision)}")
    say(f"cores: {_describe_cores(session)}")
    say(f"memory: {describe_predicted(needed)}")
    say(f"run directory: {session.directory.path}")


def _describe_cores(session: Session) -> str:
    """Say what runs where on the node of rank 0."""
    config, binding = session.config, session.binding
    where = " (node of rank 0)" if len(binding.ranks) < session.grid.comm.size else ""
    unused = "; float32 uses one" if config.train.precision == "f32" and config.parallel.threads > 1 else ""
    return f"{binding.describe()}{where}{unused}"
