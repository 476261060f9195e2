"""Filling a state from a checkpoint, whatever grid wrote it."""

from pathlib import Path

from hpcpipe.checkpoint.compare import compare
from hpcpipe.checkpoint.read import Reader
from hpcpipe.checkpoint.table import Manifest
from hpcpipe.config.dump import to_dict
from hpcpipe.errors import UsageError
from hpcpipe.train.state import WEIGHT, State


def check_model(state: State, path: Path, manifest: Manifest) -> None:
    """Refuse a checkpoint of another model.

    Raises
    ------
    UsageError
        With every difference.
    """
    model = to_dict(state.config)["model"]
    differences = compare({"model": manifest.header["model"]}, {"model": model})
    if differences:
        raise UsageError(
            f"{path} holds another model: {'; '.join(differences)}. Set [model] as in the checkpoint, or train the new"
            " model under another run.name"
        )


def load_state(state: State, path: Path, manifest: Manifest) -> None:
    """Read the weights and moments of this rank's stages.

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
    with Reader(path, manifest) as reader:
        for stage in state.stages.values():
            for tensor in stage.parameters.layout.stored:
                for kind, array in stage.arrays(tensor):
                    reader.read(tensor.tied_to or tensor.name, kind, array)
    state.step = manifest.step


def load_weights(state: State, path: Path, manifest: Manifest) -> None:
    """Read only the weights; otherwise as `load_state`."""
    with Reader(path, manifest) as reader:
        for stage in state.stages.values():
            for tensor in stage.parameters.layout.stored:
                reader.read(tensor.tied_to or tensor.name, WEIGHT, stage.parameters.weights.arrays[tensor.name])
    state.step = manifest.step
