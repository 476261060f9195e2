"""The configuration: one frozen dataclass per section, one line of documentation per key."""

from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any


def key(default: Any, doc: str) -> Any:
    """Declare a configuration key with its default and its line of documentation."""
    return field(default=default, metadata={"doc": doc})


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where the run keeps its files, and the seed of everything random."""

    name: str = key("run", "name of the run; its directory is <dir>/<name>")
    dir: str = key("runs", "directory that holds run directories, on a file system that every rank sees")
    seed: int = key(1, "seed of initial weights, sample order and sampling")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of the model."""

    kind: str = key("gpt2", "architecture: gpt2")
    layers: int = key(4, "transformer blocks")
    width: int = key(128, "size of the residual stream, a multiple of heads")
    heads: int = key(4, "attention heads")
    context: int = key(128, "tokens that the model sees at once")
    vocab: int = key(0, "token ids the model knows; 0: as many as the tokenizer has")
    tied: bool = key(True, "the head uses the token embedding's weight")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What the model reads."""

    source: str = key("stdlib", "what to prepare when file is empty: stdlib, or a text file, folder or .jsonl")
    file: str = key("", "token file made by `hpcpipe data prepare`; empty: prepared from source once")
    validation_fraction: float = key(0.02, "fraction of the documents held out")
    validation_samples: int = key(0, "evaluate on at most this many held-out samples; 0: on all")


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the work is cut over ranks; pipeline x data must equal the number of ranks."""

    pipeline: int = key(0, "pipeline stages; 0: number of ranks / data")
    data: int = key(1, "replicas of the pipeline")
    schedule: str = key(
        "1f1b",
        "order of the actions: a name that `hpcpipe schedule show` draws, a .csv file, or auto: by simulation",
    )
    chunks: int = key(0, "stages per rank; 0: what the schedule is defined for, or 2 where it may be any number")
    microbatches: int = key(8, "microbatches per step over all replicas, a multiple of data")
    microbatch_size: int = key(4, "samples per microbatch")
    partition: str | tuple[int, ...] = key("auto", "blocks of each stage, as a list; auto: cut by measured costs")
    threads: int = key(0, "threads per rank; 0: cores of its node / ranks there; float32 computes with one")
    lanes: int = key(0, "partial gradient sums per step, see docs/numerics.md; 0: chosen from microbatches")
    timeout_s: float = key(600.0, "seconds a rank waits for another before it gives up")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The optimizer and the length of the run."""

    steps: int = key(1000, "optimizer updates until the run is done")
    precision: str = key(
        "auto",
        "f32: float32 throughout; bf16: bfloat16 operands, float32 sums and weights; auto: bf16 where the processor has"
        " a unit for it",
    )
    learning_rate: float = key(1e-3, "peak learning rate")
    warmup_steps: int = key(50, "steps of linear warmup")
    decay_steps: int = key(
        0,
        "step at which the cosine reaches min_learning_rate; 0: steps (set it if steps will be raised later)",
    )
    min_learning_rate: float = key(1e-4, "learning rate at the end of the cosine")
    weight_decay: float = key(0.1, "decoupled weight decay of weight matrices")
    betas: tuple[float, float] = key((0.9, 0.95), "AdamW's decay rates of the two moments")
    clip: float = key(1.0, "global gradient norm above which gradients are scaled down; 0: never")
    eval_every: int = key(0, "steps between evaluations; 0: only at the end")
    recompute: str = key("none", "activations recomputed in the backward: none, selective (only what is cheap) or full")
    sample_tokens: int = key(200, "tokens of text written at the end; 0: none")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the state is written, and how much of it is kept."""

    every: int | str = key(
        100,
        'steps between checkpoints, or a time such as "15 minutes", or "auto": by measured cost and failures; 0: only'
        " at the end",
    )
    keep: int = key(3, "newest checkpoints kept; 0: all")
    keep_every: int = key(0, "checkpoints of steps that are multiples of this are kept for ever; 0: none")
    keep_best: bool = key(True, "the checkpoint with the lowest held-out loss is kept")
    on_signal: bool = key(True, "write a checkpoint when the run is asked to stop")
    when_busy: str = key("skip", "when one is due while the last is still being written: skip it, or wait")
    max_failures: int = key(3, "failed checkpoints in a row after which the run stops with exit code 74")


@dataclass(frozen=True, kw_only=True)
class RecoveryConfig:
    """What a run does about ranks that die or hang while it runs."""

    copy_every: int = key(1, "steps between copies of weights and moments in memory that survives a rank; 0: no copies")
    max_attempts: int = key(
        3, "recoveries without coming further, first from memory, then as many from the disk; then exit code 75"
    )
    hang_s: float = key(
        10.0, "least seconds without progress that count as a hang; slow steps get more; 0: hangs are not looked for"
    )


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """What a run does about numbers that go wrong."""

    state: bool = key(True, "before each update, compare weights and moments with what the last one has left")
    messages: bool = key(True, "compare what was received in a step with what was sent")
    recompute_every: int = key(50, "steps between forwards that are computed twice and compared; 0: never")
    max_skipped: int = key(3, "steps in a row skipped for gradients that are not finite before the run goes back")
    spikes: str = key("warn", "when the loss or the gradient jumps: off, warn, skip (the step) or rewind (the run)")


@dataclass(frozen=True, kw_only=True)
class TelemetryConfig:
    """What is shown."""

    console: str = key("auto", "auto, terminal, lines or quiet")


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole configuration, as TOML sections."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    recovery: RecoveryConfig = field(default_factory=RecoveryConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)


def documented_keys() -> dict[str, str]:
    """Map every ``section.key`` to its line of documentation, in file order."""
    docs = {}
    for section in fields(Config):
        assert is_dataclass(section.type)
        for entry in fields(section.type):
            docs[f"{section.name}.{entry.name}"] = entry.metadata["doc"]
    return docs
