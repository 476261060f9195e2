"""Starting values: a function of the seed and the tensor's name, whatever the grid."""

import hashlib

import numpy as np

from hpcpipe.model.tensors import TensorSpec


def fill_initial(spec: TensorSpec, seed: int, out: np.ndarray) -> None:
    """Fill a tensor with its starting values.

    Parameters
    ----------
    spec : TensorSpec
        Name, shape and distribution. A tied tensor gets the values of the one that it is tied to.
    seed : int
        The run's seed.
    out : ndarray of float32
        The caller's, of the tensor's shape.
    """
    if spec.initial_std == 0.0:
        out.fill(spec.initial_value)
        return
    name = spec.tied_to or spec.name
    key = hashlib.blake2b(f"initial/{seed}/{name}".encode(), digest_size=16).digest()
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
    generator.standard_normal(out=out, dtype=np.float32)
    out *= np.float32(spec.initial_std)
