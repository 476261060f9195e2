"""Filling a state from a checkpoint, whatever grid wrote it."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from hpcpipe.checkpoint.compare import compare
from hpcpipe.checkpoint.read import Reader, Wanted
from hpcpipe.checkpoint.table import Manifest
from hpcpipe.config.dump import to_dict
from hpcpipe.config.schema import Config
from hpcpipe.errors import UsageError
from hpcpipe.train.state import WEIGHT, State


def check_model(config: Config, path: Path, manifest: Manifest) -> None:
    """Refuse a checkpoint of another model.

    Raises
    ------
    UsageError
        With every difference.
    """
    model = to_dict(config)["model"]
    differences = compare({"model": manifest.header.get("model")}, {"model": model})
    if differences:
        raise UsageError(
            f"{path} holds another model: {'; '.join(differences)}. Set [model] as in the checkpoint, or train the new"
            " model under another run.name"
        )


def load_state(state: State, path: Path, manifest: Manifest) -> None:
    """Read the weights of this rank's stages, and the moments of its shard.

    Parameters
    ----------
    state : State
        Filled; its step becomes the checkpoint's.
    path : Path
        The checkpoint's directory.
    manifest : Manifest
        Its manifest, of the same model.

    Raises
    ------
    DamagedError
        If a tensor is missing or its bytes are not those that were written.
    """
    originals = {tensor.name: tensor.tied_to for layer in state.model for tensor in layer.tensors if tensor.tied_to}
    with Reader(path, manifest) as reader:
        reader.read_all([*_weights(state), *_moments(state, originals)])
    state.pack()
    state.step = manifest.step


def load_weights(state: State, path: Path, manifest: Manifest) -> None:
    """Read only the weights; otherwise as `load_state`."""
    with Reader(path, manifest) as reader:
        reader.read_all(_weights(state))
    state.pack()
    state.step = manifest.step


def _weights(state: State) -> Iterator[Wanted]:
    for stage in state.stages.values():
        for tensor in stage.parameters.layout.stored:
            yield Wanted(tensor.tied_to or tensor.name, WEIGHT, stage.parameters.weights.arrays[tensor.name])


def _moments(state: State, originals: Mapping[str, str]) -> Iterator[Wanted]:
    for stage in state.stages.values():
        for held in stage.stored_slices():
            for moment, arena in stage.moments.items():
                name = originals.get(held.name, held.name)
                yield Wanted(name, moment, arena.arrays[held.name], held.start, held.stop)
