"""Whether ``mpirun`` is asked for MPI's fault tolerance (ULFM), so that a run survives the death of a rank."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

WHY_OFF = "HPCPIPE_NO_RECOVERY"
"""Variable that tells the ranks why `hpcpipe launch` has not asked for fault tolerance."""

_TUNING = "share/openmpi/amca-param-sets/ft-mpi"
_ABLE_PML = "ob1"
_UNABLE_COLL = "^han,cuda,hcoll,portals4"


def why_not(
    mpirun: Path,
    num_ranks: int,
    on_one_node: bool,
    wanted: str | None,
    extra: Sequence[str] = (),
    environ: Mapping[str, str] = os.environ,
) -> str:
    """Say why the ranks have to do without fault tolerance.

    Parameters
    ----------
    mpirun : Path
        Open MPI's launcher.
    num_ranks : int
        Ranks to start, spares included.
    on_one_node : bool
        Whether all of them run on this node.
    wanted : str or None
        ``on`` or ``off``, if the user said so.
    extra : sequence of str
        The user's own options of ``mpirun``.
    environ : mapping
        The environment of ``mpirun``.

    Returns
    -------
    str
        A clause for people; empty where nothing is in the way.
    """
    if wanted == "off":
        return "--recovery off asks for that"
    if num_ranks < 2:
        return "there is no other rank that could go on"
    # Only an Open MPI that was built with fault tolerance installs this file, and mpirun --with-ft reads it. To ask
    # ompi_info takes 80 ms, and mpirun accepts --with-ft also where the library ignores it.
    if not (mpirun.resolve().parent.parent / _TUNING).is_file():
        return f"{mpirun} belongs to an Open MPI without fault tolerance (there is no {_TUNING} beside it)"
    chosen = mca_options(extra).get("pml", environ.get("OMPI_MCA_pml", _ABLE_PML))
    if chosen != _ABLE_PML:
        return f"pml = {chosen} is chosen for messages, and fault tolerance works with {_ABLE_PML} only"
    # It would replace the fast transport of an InfiniBand or Slingshot site, and what becomes of a lost node is not
    # proven: not without being asked.
    if not on_one_node and wanted != "on" and not is_asked_for(extra):
        return f"on several nodes it limits messages to {_ABLE_PML}, so that --recovery on has to ask for it"
    return ""


def options(extra: Sequence[str] = (), environ: Mapping[str, str] = os.environ) -> list[str]:
    """Return the options of ``mpirun`` that make the ranks survive each other.

    Parameters
    ----------
    extra : sequence of str
        The user's own options of ``mpirun``, which are not given twice.
    environ : mapping
        The environment of ``mpirun``.

    Returns
    -------
    list of str
        Options.
    """
    given = mca_options(extra)
    result = [] if is_asked_for(extra) else ["--with-ft", "ulfm"]
    # Without it, MPI_Finalize waits now and then for ever after a failure, in a fence of PMIx.
    for key, value in {"async_mpi_finalize": "1", "coll": _UNABLE_COLL}.items():
        # Collectives that hang or crash after a failure, see open-mpi/ompi #13915; the list in the file that --with-ft
        # reads is repeated, since this one replaces it.
        if key not in given and f"OMPI_MCA_{key}" not in environ:
            result += ["--mca", key, value]
    return result


def is_asked_for(extra: Sequence[str]) -> bool:
    """Return whether the user's own options of ``mpirun`` ask for fault tolerance."""
    return any(option.partition("=")[0].lstrip("-") == "with-ft" for option in extra if option.startswith("-"))


def mca_options(extra: Sequence[str]) -> dict[str, str]:
    """Return the parameters that options like ``--mca NAME VALUE`` set.

    Parameters
    ----------
    extra : sequence of str
        Options of ``mpirun``.

    Returns
    -------
    dict
        Values by name.
    """
    words = [*extra, "", ""]
    return {words[i + 1]: words[i + 2] for i, word in enumerate(extra) if word.lstrip("-") in ("mca", "omca", "gomca")}
