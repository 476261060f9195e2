"""Checks across configuration keys, and the values that are chosen automatically."""

import math
from collections.abc import Callable
from dataclasses import replace

from hpcpipe.config.grid import (
    data_divides_microbatches,
    degrees_fill_the_ranks,
    layers_fill_the_stages,
    partition_covers_the_layers,
)
from hpcpipe.config.interval import parse_interval
from hpcpipe.config.schema import Config
from hpcpipe.config.threads import Node, choose_threads
from hpcpipe.config.values import as_toml
from hpcpipe.errors import DamagedError, UsageError

Check = Callable[[Config, int], str | None]
"""Takes a configuration and the number of ranks; returns what is wrong, with the cure, or None."""

CHOICES = {
    "model.kind": ("gpt2",),
    "train.precision": ("auto", "bf16", "f32"),
    "train.recompute": ("none", "selective", "full"),
    "checkpoint.when_busy": ("skip", "wait"),
    "guard.spikes": ("off", "warn", "skip", "rewind"),
    "telemetry.console": ("auto", "terminal", "lines", "quiet"),
}
POSITIVE = (
    "model.layers",
    "model.width",
    "model.heads",
    "model.context",
    "parallel.data",
    "parallel.microbatches",
    "parallel.microbatch_size",
    "parallel.timeout_s",
    "checkpoint.max_failures",
    "recovery.max_attempts",
    "guard.max_skipped",
    "train.steps",
    "train.learning_rate",
)

SHORTEST_HANG_S = 2.0
LONGEST_HANG_S = 1e6


def resolve(config: Config, world_size: int, has_bf16_unit: bool = False, node: Node | None = None) -> Config:
    """Check a configuration for a number of ranks and fill in what it leaves to be chosen.

    Parameters
    ----------
    config : Config
        As loaded.
    world_size : int
        Number of ranks that were started.
    has_bf16_unit : bool
        Whether every processor multiplies bfloat16 faster than float32: what ``train.precision = "auto"`` goes by.
    node : Node or None
        The node with the fewest cores for each of its ranks: what ``parallel.threads = 0`` goes by.

    Returns
    -------
    Config
        With `parallel.pipeline`, `parallel.lanes`, `parallel.threads`, `train.decay_steps` and `train.precision`
        filled in. It resolves to itself.

    Raises
    ------
    UsageError
        The first check that fails, with the keys, the numbers and the cure.
    """
    for check in CHECKS:
        _require(check(config, world_size))
    parse_interval("checkpoint.every", config.checkpoint.every)
    parallel = config.parallel
    if parallel.pipeline == 0:
        parallel = replace(parallel, pipeline=world_size // parallel.data)
    if parallel.lanes == 0:
        parallel = replace(parallel, lanes=_choose_lanes(parallel.microbatches, parallel.data))
    parallel = replace(parallel, threads=choose_threads(parallel.threads, node))
    train = replace(config.train, decay_steps=config.train.decay_steps or config.train.steps)
    if train.precision == "auto":
        train = replace(train, precision="bf16" if has_bf16_unit else "f32")
    resolved = replace(config, parallel=parallel, train=train)
    for check in GRID_CHECKS:
        _require(check(resolved, world_size))
    return resolved


def check_stages(config: Config, num_stages: int) -> Config:
    """Check that a model fills the stages of a schedule.

    Parameters
    ----------
    config : Config
        A resolved configuration.
    num_stages : int
        Stages of the schedule, over all ranks of a pipeline.

    Returns
    -------
    Config
        With `parallel.chunks` filled in.

    Raises
    ------
    UsageError
        There are fewer layers than stages, or a partition by hand does not fit.
    """
    for check in (layers_fill_the_stages, partition_covers_the_layers):
        _require(check(config, num_stages))
    return replace(config, parallel=replace(config.parallel, chunks=num_stages // config.parallel.pipeline))


def check_data(config: Config, vocab: int, max_id: int = -1) -> Config:
    """Check the model's vocabulary against the data, and fill it in when it is left to the tokenizer.

    Parameters
    ----------
    config : Config
        A resolved configuration.
    vocab : int
        Number of token ids of the tokenizer that made the data.
    max_id : int
        Largest token id that occurs in the data; -1 where it is not known.

    Returns
    -------
    Config
        With `model.vocab` filled in.

    Raises
    ------
    UsageError
        `model.vocab` is smaller than the tokenizer's vocabulary.
    DamagedError
        The data has ids that its own tokenizer does not.
    """
    if max_id >= vocab:
        raise DamagedError(
            f"the token file has token id {max_id}, and its tokenizer only {vocab} ids (0 to {vocab - 1}): "
            "prepare the file again with `hpcpipe data prepare`"
        )
    if 0 < config.model.vocab < vocab:
        raise UsageError(
            f"model.vocab = {config.model.vocab} is smaller than the {vocab} token ids of the data's tokenizer: "
            f"set model.vocab = {vocab} or more, or 0 to take the tokenizer's"
        )
    return replace(config, model=replace(config.model, vocab=config.model.vocab or vocab))


def _require(problem: str | None) -> None:
    """Raise what a check found."""
    if problem:
        raise UsageError(problem)


def _choose_lanes(microbatches: int, data: int) -> int:
    """Choose four lanes where the microbatches allow it, so that grids of 1, 2 and 4 replicas agree."""
    lanes = math.gcd(microbatches, 4)
    return data if lanes % data else lanes


def _get(config: Config, name: str) -> object:
    """Look up section.key."""
    section, _, key = name.partition(".")
    value: object = getattr(getattr(config, section), key)
    return value


def _choices_exist(config: Config, world_size: int) -> str | None:
    for name, choices in CHOICES.items():
        value = _get(config, name)
        if value not in choices:
            return f"{name} = {as_toml(value)}: expected {' or '.join(as_toml(choice) for choice in choices)}"
    return None


def _positive_where_needed(config: Config, world_size: int) -> str | None:
    for name in POSITIVE:
        value = _get(config, name)
        if value == 0:
            least = "at least 1" if isinstance(value, int) else "a number above 0"
            return f"{name} = {as_toml(value)}: expected {least}"
    return None


def _heads_divide_width(config: Config, world_size: int) -> str | None:
    width, heads = config.model.width, config.model.heads
    if width % heads == 0:
        return None
    low, high = width // heads * heads, -(-width // heads) * heads
    widths = f"{low} or {high}" if low else f"{high}"
    return (
        f"model.width = {width} is not a multiple of model.heads = {heads}: set model.width = {widths}, "
        f"or model.heads = {max(h for h in range(1, heads + 1) if width % h == 0)}"
    )


def _validation_fraction_is_a_part(config: Config, world_size: int) -> str | None:
    fraction = config.data.validation_fraction
    if 0 < fraction < 1:
        return None
    return f"data.validation_fraction = {fraction}: expected a number between 0 and 1, such as 0.02"


def _data_is_named(config: Config, world_size: int) -> str | None:
    if config.data.file or config.data.source:
        return None
    return 'data.source and data.file are both empty: set data.source = "stdlib", or data.file to a token file'


def _betas_are_decay_rates(config: Config, world_size: int) -> str | None:
    betas = config.train.betas
    if all(beta < 1 for beta in betas):
        return None
    return f"train.betas = {as_toml(betas)}: expected two numbers from 0 up to, but not including, 1"


def _learning_rate_falls(config: Config, world_size: int) -> str | None:
    train = config.train
    if train.min_learning_rate <= train.learning_rate:
        return None
    return (
        f"train.min_learning_rate = {train.min_learning_rate} is above train.learning_rate = "
        f"{train.learning_rate}: set it to {train.learning_rate} or less"
    )


def _decay_follows_warmup(config: Config, world_size: int) -> str | None:
    train = config.train
    # A run that ends within its warmup is fine: its decay ends with it and never begins.
    if train.decay_steps in (0, train.steps) or train.decay_steps >= train.warmup_steps:
        return None
    return (
        f"train.decay_steps = {train.decay_steps} ends before train.warmup_steps = {train.warmup_steps}: set it "
        f"to more than {train.warmup_steps}, or to 0 for train.steps"
    )


def _hangs_can_be_told_from_waits(config: Config, world_size: int) -> str | None:
    if config.recovery.hang_s == 0 or SHORTEST_HANG_S <= config.recovery.hang_s <= LONGEST_HANG_S:
        return None
    if config.recovery.hang_s > LONGEST_HANG_S:
        return (
            f"recovery.hang_s = {config.recovery.hang_s:g}: expected at most {LONGEST_HANG_S:g} s, or 0 so that hangs"
            " are not looked for"
        )
    return (
        f"recovery.hang_s = {config.recovery.hang_s}: ranks on busy cores are still for so long now and then: set it to"
        f" {SHORTEST_HANG_S:g} or more, or to 0 so that hangs are not looked for"
    )


def _lanes_fit(config: Config, world_size: int) -> str | None:
    lanes, microbatches, data = config.parallel.lanes, config.parallel.microbatches, config.parallel.data
    if microbatches % lanes == 0 and lanes % data == 0:
        return None
    fitting = [n for n in range(data, microbatches + 1, data) if microbatches % n == 0]
    return (
        f"parallel.lanes = {lanes} must divide parallel.microbatches = {microbatches} and be a multiple of "
        f"parallel.data = {data}: set it to 0, or to one of {', '.join(map(str, fitting))}"
    )


CHECKS: tuple[Check, ...] = (
    _choices_exist,
    _positive_where_needed,
    _heads_divide_width,
    _validation_fraction_is_a_part,
    _data_is_named,
    _betas_are_decay_rates,
    _learning_rate_falls,
    _decay_follows_warmup,
    _hangs_can_be_told_from_waits,
    degrees_fill_the_ranks,
)
"""Checks of a configuration as loaded."""

GRID_CHECKS: tuple[Check, ...] = (
    data_divides_microbatches,
    _lanes_fit,
)
"""Checks that need the degrees."""
