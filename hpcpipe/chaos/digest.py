"""One hash for what a checkpoint holds, whatever grid wrote it."""

from pathlib import Path

import numpy as np

from hpcpipe.checkpoint.digests import new_hash
from hpcpipe.checkpoint.layout import candidates, step_of
from hpcpipe.checkpoint.manifest import load_manifest
from hpcpipe.checkpoint.read import Reader
from hpcpipe.checkpoint.verify import verify


def state_digest(path: Path) -> str:
    """Hash weights and moments of a checkpoint: names, kinds, shapes and bytes, in the order of the names.

    The bytes are read, and compared with the manifest on the way; how they are cut into files does not count.

    Parameters
    ----------
    path : Path
        Directory of a committed checkpoint.

    Raises
    ------
    DamagedError
        The checkpoint is not what was written.
    """
    manifest = load_manifest(path)
    digest = new_hash()
    with Reader(path, manifest) as reader:
        for name in sorted(manifest.tensors):
            tensor = manifest.tensors[name]
            for kind in sorted(tensor.kinds):
                values = np.empty(tensor.size, tensor.dtype)
                reader.read(name, kind, values)
                digest.update(f"{name} {kind} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
                digest.update(values.view(np.uint8).data)
    return digest.digest().hex()


def checkpoint_digests(directory: Path) -> dict[int, str]:
    """Return `state_digest` of every checkpoint of a run, by its step.

    Parameters
    ----------
    directory : Path
        The run directory.

    Raises
    ------
    DamagedError
        A checkpoint is not what was written.
    """
    found = {step_of(path.name): path for path in candidates(directory / "checkpoints")}
    return {step: state_digest(path) for step, path in sorted(found.items()) if step is not None}


def damaged_checkpoints(directory: Path) -> list[str]:
    """List in sentences what is wrong with the checkpoints of a run."""
    return [problem for path in candidates(directory / "checkpoints") for problem in verify(path)]
