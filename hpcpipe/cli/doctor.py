"""``hpcpipe doctor``: what this machine has, and whether training can work on it."""

import argparse
import importlib
import json
import platform
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hpcpipe
from hpcpipe.errors import ExitCode, UsageError

if TYPE_CHECKING:
    from hpcpipe.cluster.slurm import Allocation

_PACKAGES = ("numpy", "scipy", "numba", "h5py", "blake3", "mpi4py")
_DESCRIPTION = """\
Show what this machine has for training, and try whether two ranks can talk and whether ranks go on when one is killed.
In a Slurm job, try every launcher over all nodes, and show where it binds ranks.

Exit code 0 when training can work, 64 when something has to be put right first."""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the verb to the command's parser."""
    parser = subparsers.add_parser("doctor", help="show what this machine has", description=_DESCRIPTION)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Carry out the verb.

    Parameters
    ----------
    args : argparse.Namespace
        ``json``: print one object, not text.

    Returns
    -------
    int
        0, or 64 where a problem keeps training from working.
    """
    report = examine()
    print(json.dumps(report, indent=1) if args.json else as_text(report))
    return int(ExitCode.USAGE if report["problems"] else ExitCode.DONE)


def examine() -> dict[str, Any]:
    """Look at the machine; starts two ranks, and no MPI in this process.

    Returns
    -------
    dict
        ``mpi cores cpu features memory_bytes slurm recovery versions kernels problems``, ready for JSON. ``mpi`` has
        ``library version mpirun works``, and ``threads cores``: of each of two ranks, and where they are bound. In a
        Slurm job its ``launchers`` say what works over all nodes, see `hpcpipe.cli.doctor_launch.in_allocation`.
        ``recovery`` has ``works seconds trouble``, see `hpcpipe.cli.doctor_recovery.try_recovery`.
        ``kernels`` has ``family precision description compiled``, those that ``train.precision = "auto"`` chooses.
    """
    from hpcpipe.cli.doctor_recovery import try_recovery
    from hpcpipe.cluster import processor, slurm
    from hpcpipe.cluster.environment import limit_blas_threads

    limit_blas_threads()
    problems: list[str] = []
    allocation = slurm.allocation()
    mpi = _mpi(problems, allocation)
    return {
        "mpi": mpi,
        "cores": processor.num_cores(),
        "cpu": processor.model_name(),
        "features": list(processor.features()),
        "memory_bytes": asdict(processor.memory()),
        "slurm": None if allocation is None else asdict(allocation),
        "recovery": try_recovery(Path(mpi["mpirun"]) if mpi["mpirun"] else None, allocation),
        "versions": _versions(problems),
        "kernels": _kernels(problems),
        "problems": problems,
    }


def as_text(report: dict[str, Any]) -> str:
    """Write the report for people.

    Parameters
    ----------
    report : dict
        From `examine`.

    Returns
    -------
    str
        Aligned lines; problems come last.
    """
    from hpcpipe.cli import doctor_recovery
    from hpcpipe.cli.doctor_launch import describe

    mpi, memory, slurm = report["mpi"], report["memory_bytes"], report["slurm"]
    rows = {
        "hpcpipe": report["versions"]["hpcpipe"],
        "MPI": (mpi["library"] or "none that works").partition(", package")[0],
        "mpirun": mpi["mpirun"] or "none",
        "two ranks": f"exchange messages; on cores: {mpi['cores']}" if mpi["works"] else "do not work together",
        "cores": f"{report['cores']} usable, {report['cpu']}",
        "features": " ".join(report["features"]) or "none that kernels use",
        "memory": f"{memory['total_bytes'] / 2**30:.1f} GiB, {memory['available_bytes'] / 2**30:.1f} GiB available",
        "Slurm": "not in an allocation"
        if slurm is None
        else f"job {slurm['job_id']} on {slurm['num_nodes']} nodes ({slurm['node_list']})",
        **{f"by {attempt['name'].partition(' ')[0]}": describe(attempt) for attempt in mpi.get("launchers", ())},
        **_describe_kernels(report["kernels"]),
        "recovery": doctor_recovery.describe(report["recovery"], slurm["num_nodes"] if slurm else 1),
        "versions": ", ".join(f"{k} {v}" for k, v in report["versions"].items() if v and k != "hpcpipe"),
    }
    lines = [f"{name:<10} {value}" for name, value in rows.items()]
    if not report["problems"]:
        return "\n".join([*lines, "", "Training can work here."])
    return "\n".join([*lines, "", "Problems:", *(f"- {problem}" for problem in report["problems"])])


def _mpi(problems: list[str], allocation: "Allocation | None") -> dict[str, Any]:
    """Find mpirun and let two ranks talk; in an allocation, ranks on all of its nodes."""
    from hpcpipe.cli.doctor_launch import in_allocation, two_ranks
    from hpcpipe.cluster import launcher

    facts: dict[str, Any] = {"library": None, "version": None, "mpirun": None, "works": False}
    facts.update(threads=None, cores=None, launchers=[])
    mpirun: Path | None = None
    try:
        mpirun = launcher.find_mpirun()
        facts.update(mpirun=str(mpirun), version=launcher.mpirun_version(mpirun))
    except UsageError as error:
        problems.append(str(error))
    if allocation is not None:
        facts["launchers"] = in_allocation(mpirun, allocation)
        _conclude(facts, problems)
        return facts
    if mpirun is None:
        return facts
    heard, trouble = two_ranks(mpirun)
    if heard is not None:
        facts.update({key: heard[key] for key in ("library", "threads", "cores")})
        facts["works"] = heard["size"] == 2 and heard["arrived"]
        if heard["size"] != 2:
            trouble = (
                f"mpi4py loads {heard['library']}, which {mpirun} does not start: "
                "every rank believes it is alone; use the mpirun of that library"
            )
    if not facts["works"]:
        problems.append(f"two ranks do not work together: {trouble}")
    return facts


def _conclude(facts: dict[str, Any], problems: list[str]) -> None:
    """Take over what the launchers of an allocation have shown."""
    working = [attempt for attempt in facts["launchers"] if attempt["works"]]
    for attempt in working[:1]:
        facts.update({key: attempt[key] for key in ("library", "threads", "cores")}, works=True)
    for attempt in facts["launchers"]:
        if attempt["name"] == "mpirun" and not attempt["works"]:
            others = f"; {working[0]['name']} works, see slurm/README.md" if working else ""
            problems.append(f"ranks do not work together by mpirun in this job: {attempt['trouble']}{others}")


def _versions(problems: list[str]) -> dict[str, str | None]:
    """Return the version of everything, and import what can be imported without starting MPI."""
    from importlib import metadata

    versions: dict[str, str | None] = {"hpcpipe": hpcpipe.__version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
            importlib.import_module(name)
        except Exception as error:
            versions.setdefault(name, None)
            problems.append(f"{name} cannot be imported ({error}): pip install --force-reinstall {name}")
    return versions


def _kernels(problems: list[str]) -> dict[str, Any] | None:
    """Say which kernels would compute with ``train.precision = "auto"``, without compiling them."""
    try:
        from hpcpipe.kernels import features, warm

        precision = "bf16" if features.has_bf16_unit() else "f32"
        return {
            "family": features.family(),
            "precision": precision,
            "description": warm.describe(precision),
            "compiled": warm.is_compiled(precision),
        }
    except Exception as error:
        problems.append(f"the kernels cannot be loaded: {error}")
        return None


def _describe_kernels(kernels: dict[str, Any] | None) -> dict[str, str]:
    """Return the rows about kernels."""
    if kernels is None:
        return {"kernels": "none that work"}
    state = "compiled" if kernels["compiled"] else "to be compiled at the first start"
    return {
        "kernels": f"{kernels['description']}, {state}",
        "family": f'{kernels["family"]}; train.precision = "auto" means {kernels["precision"]}',
    }
