"""Text from a checkpoint, in one process."""

from pathlib import Path

from hpcpipe.checkpoint.layout import locate
from hpcpipe.checkpoint.manifest import load_manifest
from hpcpipe.checkpoint.table import Manifest
from hpcpipe.checkpoint.verify import verify
from hpcpipe.config.schema import Config, ModelConfig, ParallelConfig
from hpcpipe.data.tokenizer import ByteTokenizer, tokenizer_named
from hpcpipe.errors import DamagedError
from hpcpipe.pipeline.transport import NoTransport
from hpcpipe.schedule.build import build_forward
from hpcpipe.train.generate import Generator
from hpcpipe.train.load import load_weights
from hpcpipe.train.state import build_state


def sample(path: Path, prompt: str, num_tokens: int, temperature: float, seed: int) -> str:
    """Return a prompt and its continuation.

    Parameters
    ----------
    path : Path
        A checkpoint's directory, or one that holds some: then the newest that verifies.
    prompt : str
        What the text begins with; may be empty.
    num_tokens : int
        Tokens to write at most; the text also ends where the model ends the document.
    temperature : float
        Divides the logits; 0 takes the most likely token.
    seed : int
        Of the random choices.

    Raises
    ------
    DamagedError
        If there is no checkpoint that verifies.
    """
    sound = next((candidate for candidate in locate(path) if not verify(candidate)), None)
    if sound is None:
        raise DamagedError(f"{path} holds no checkpoint that verifies: `hpcpipe checkpoint verify {path}` says why")
    manifest = load_manifest(sound)
    model, tokenizer = _read_header(sound, manifest)
    state = build_state(Config(model=model, parallel=ParallelConfig(pipeline=1)), (0,), 0)
    load_weights(state, sound, manifest)
    generator = Generator(state, build_forward(state.placement, 1), 0, NoTransport(), lambda token: token)
    tokens = [int(token) for token in tokenizer.encode(prompt)]
    return prompt + tokenizer.decode(generator.run(tokens, num_tokens, temperature, seed, end=tokenizer.separator))


def _read_header(path: Path, manifest: Manifest) -> tuple[ModelConfig, ByteTokenizer]:
    """Return what to sample with; of a checkpoint from anybody, so that nothing is allocated that it does not hold."""
    try:
        model = ModelConfig(**manifest.header["model"])
        sizes = (model.layers, model.width, model.heads, model.context, model.vocab)
        if any(isinstance(size, bool) or size <= 0 for size in sizes):
            raise ValueError(f"sizes {sizes}")
        if (12 * model.layers * model.width + model.vocab + model.context) * model.width > manifest.num_parameters:
            raise ValueError(f"a model of sizes {sizes} has more than its {manifest.num_parameters} parameters")
        return model, tokenizer_named(manifest.header["data"]["tokenizer"])
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedError(f"{path}: its header says of no model that can be sampled: {error!r:.200}") from error
