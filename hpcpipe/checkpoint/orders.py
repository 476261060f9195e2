"""What the process beside a rank does to write its checkpoints, one order after the other. It knows nothing of MPI."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpcpipe.checkpoint import disk
from hpcpipe.checkpoint.digests import digest_of
from hpcpipe.checkpoint.image import Image, Region
from hpcpipe.checkpoint.layout import EPOCH_DIGITS, PieceSpec, epoch_text, file_name, leftovers
from hpcpipe.checkpoint.manifest import load_manifest
from hpcpipe.checkpoint.retain import retain
from hpcpipe.checkpoint.snapshot import Snapshot
from hpcpipe.checkpoint.verify import verify_file
from hpcpipe.checkpoint.write import abandon, commit, join_partial
from hpcpipe.errors import DamagedError, ExitCode, HpcpipeError, NumericsError
from hpcpipe.memory.shared import map_shared

Order = dict[str, Any]

_IN_CACHE = 1 << 16


class Writer:
    """Carries out the orders of one rank.

    Parameters
    ----------
    handle : int
        Descriptor of the memory that snapshots are in.
    """

    def __init__(self, handle: int) -> None:
        self._handle = handle
        self._hashing = ThreadPoolExecutor(1)

    def answer(self, order: Order) -> Order:
        """Carry out one order; never raises."""
        do = str(order["do"])
        try:
            return {"do": do, **getattr(self, f"_{do}")(order)}
        except HpcpipeError as error:
            return {"do": do, "failed": int(error.exit_code), "problem": str(error)}
        except Exception as error:
            return {"do": do, "failed": int(ExitCode.DISK), "problem": f"{do}: {type(error).__name__}: {error}"}

    def _prepare(self, order: Order) -> Order:
        """Learn what the snapshot holds: ``pieces``, ``rank``."""
        specs = [PieceSpec.from_json(item) for item in order["pieces"]]
        self._name = file_name(order["rank"])
        self._image = Image(specs)
        sizes = [spec.num_bytes for spec in specs]
        self._buffers = Snapshot(map_shared(self._handle, order["bytes"]), sizes).buffers()
        return {}

    def _clean(self, order: Order) -> Order:
        """Remove what interrupted writings and removals of earlier launches and epochs have left below ``root``."""
        epoch = order.get("epoch", 0)
        for path in list(leftovers(Path(order["root"]))):
            # Other ranks of this launch may be writing already, also in a later epoch where this process is late.
            _, is_own, attempt = path.name.partition(f".{order['token']}")
            is_older = bool(epoch) and attempt[:EPOCH_DIGITS] < epoch_text(epoch)
            if not is_own or is_older:
                disk.remove(path)
        return {}

    def _write(self, order: Order) -> Order:
        """Write the snapshot as this rank's file of ``step`` into ``partial``; answer with its record."""
        step, partial = order["step"], Path(order["partial"])
        regions = self._image.regions(step, self._buffers)
        hashing = self._hashing.submit(_check_and_hash, step, self._image.specs, regions)
        join_partial(partial)
        try:
            disk.write_new(partial / self._name, [region.buffer for region in regions], read_back=False)
        finally:
            # The next snapshot must not be taken while this one is read.
            digests = hashing.result()
        return {"record": self._image.record(self._name, step, regions, digests)}

    def _commit(self, order: Order) -> Order:
        """Make the checkpoint in ``partial`` valid, of all ranks' ``records``, if the run still has its lock."""
        path = commit(Path(order["partial"]), order["header"], order["records"], order.get("lock"))
        return {"path": str(path)}

    def _abandon(self, order: Order) -> Order:
        """Remove the checkpoint in ``partial``, which is not to be committed."""
        abandon(Path(order["partial"]))
        return {}

    def _withdraw(self, order: Order) -> Order:
        """Remove a committed checkpoint at ``path`` that cannot be read back."""
        disk.remove(disk.move_to_trash(Path(order["path"])))
        return {}

    def _verify(self, order: Order) -> Order:
        """Read this rank's file of the checkpoint at ``path`` back from the disk, past the page cache."""
        path = Path(order["path"])
        disk.drop_from_cache(path / self._name)
        problems = verify_file(path, load_manifest(path), self._name)
        if problems:
            raise DamagedError("; ".join(problems))
        return {}

    def _retain(self, order: Order) -> Order:
        """Remove what is not to be kept below ``root``."""
        keep = {key: order[key] for key in ("keep", "keep_every", "keep_best")}
        removed = retain(Path(order["root"]), Path(order["newest"]), **keep)
        return {"removed": [path.name for path in removed]}


def _check_and_hash(step: int, specs: Sequence[PieceSpec], regions: Sequence[Region]) -> list[bytes]:
    """Return the digests; refuse to keep a state that an update has broken: the next start would only fail again."""
    digests = []
    for region in regions:
        if region.piece is not None and not _is_finite(np.frombuffer(region.buffer, specs[region.piece].dtype)):
            raise NumericsError(
                f"step {step}: {specs[region.piece].label} has a value that is not finite: no checkpoint is written;"
                " lower train.learning_rate and go on from the last one"
            )
        digests.append(digest_of(region.buffer))
    return digests


def _is_finite(values: NDArray[Any]) -> bool:
    """Tell whether no value is NaN or infinite; takes no memory."""
    for first in range(0, values.size, _IN_CACHE):
        part = values[first : first + _IN_CACHE]
        if not (np.isfinite(part.max()) and np.isfinite(part.min())):
            return False
    return True
