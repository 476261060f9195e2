"""The report of a comparison: machine, versions, settings, medians, spreads and ratios."""

import argparse
import datetime
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from statistics import median

from hpcpipe.cluster.processor import features, memory, model_name, num_physical_cores

FAMILIES = {"JAX": "jax", "PyTorch": "torch"}


def machine(root: Path) -> dict[str, str]:
    """Return what there is to say about machine and commit, before anything runs."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=False).stdout.strip()

    changed = " with local changes" if git("status", "--porcelain", "--untracked-files=no") else ""
    return {
        "date": datetime.date.today().isoformat(),
        "processor": model_name(),
        "cores": str(num_physical_cores()),
        "features": ", ".join(features()),
        "memory": f"{memory().total_bytes / 2**30:.0f} GiB",
        "system": f"{platform.system()} {platform.release()}",
        "load": f"{os.getloadavg()[0]:.1f}",
        "commit": (git("rev-parse", "--short", "HEAD") or "unknown") + changed,
    }


def own_versions() -> dict[str, str]:
    """Return the versions that hpcpipe's speed depends on."""
    packages = ("hpcpipe", "numpy", "numba", "llvmlite", "mpi4py")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def rates_of(rounds: list[dict[str, dict]], name: str) -> list[float]:
    """Return the tokens per second of a contender in each round that it ran in."""
    results = (results.get(name, {}) for results in rounds)
    return [result["tokens_per_s"] for result in results if "tokens_per_s" in result]


def median_rate(rounds: list[dict[str, dict]], name: str) -> float | None:
    """Return the median of the rounds, None if the contender was skipped."""
    rates = rates_of(rounds, name)
    return median(rates) if rates else None


def ratios(rounds: list[dict[str, dict]]) -> dict[str, list[float]]:
    """Return, for each family of peers, hpcpipe's speed over that of the family's fastest member in each round."""
    found: dict[str, list[float]] = {family: [] for family in FAMILIES}
    for results in rounds:
        for family, prefix in FAMILIES.items():
            rates = [r["tokens_per_s"] for n, r in results.items() if n.startswith(prefix) and "tokens_per_s" in r]
            if rates and "hpcpipe" in results:
                found[family].append(results["hpcpipe"]["tokens_per_s"] / max(rates))
    return {family: values for family, values in found.items() if values}


def write(facts: dict[str, str], rounds: list[dict[str, dict]], args: argparse.Namespace) -> str:
    """Return the report of the rounds so far."""
    last = {name: result for results in rounds for name, result in results.items()}
    ran = [name for name in last if "skipped" not in last[name]]
    ran.sort(key=lambda name: -(median_rate(rounds, name) or 0.0))
    small = "" if args.layers == 12 and args.samples == 8 else " **A quick look at a smaller task, no result.**"
    versions = {key: value for name in ran for key, value in last[name]["versions"].items()}
    lines = [
        f"# hpcpipe beside JAX and PyTorch: {facts['cores']} cores of {facts['processor']}",
        "",
        f"Date {facts['date']}, commit {facts['commit']}. {facts['cores']} cores of {facts['processor']}"
        f" ({facts['features']}), {facts['memory']}, {facts['system']}; load before the start {facts['load']}. "
        + ", ".join(f"{name} {number}" for name, number in versions.items())
        + ".",
        "",
        f"    {facts['command']}",
        "",
        f"Every contender trains GPT-2 ({args.layers} layers, width 768, 12 heads, context 512, vocabulary 50257, tied"
        " embeddings) from the same starting values on random tokens with AdamW (decay on matrices) and the gradient's"
        f" norm clipped at 1; a step has {args.samples * 512} tokens.{small} Contenders run one after the other; each"
        f" round starts with another one. Of each run the first {args.warmup} steps are dropped, and the median of the"
        f" next {args.steps} counts. That all compute the same loss, gradient and update is tested in"
        " [tests/peers](../../tests/peers/README.md).",
        "",
        f"| contender | tokens/s, median of {len(rounds)} | lowest to highest | within a run | step s | first loss |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name in ran:
        rates, results = rates_of(rounds, name), [r[name] for r in rounds if "tokens_per_s" in r.get(name, {})]
        within = max(result["highest"] / result["lowest"] - 1 for result in results)
        step_s = median(step for result in results for step in result["step_s"])
        lines.append(
            f"| {name} | {median(rates):.1f} | {min(rates):.1f} to {max(rates):.1f} | {within:.1%} | {step_s:.3f}"
            f" | {last[name]['loss'][0]:.4f} |"
        )
    lines += ["", *(f"{name} was left out: {last[name]['skipped']}." for name in last if name not in ran), ""]
    lines += _ratio_table(rounds, ran)
    lines += ["", "## Settings", ""]
    for name in ran:
        settings = ", ".join(
            f"{key} {value}"
            for key, value in last[name]["settings"].items()
            if value not in ("", None) and value is not False
        )
        lines += [f"{name}: {settings}", "", f"    {last[name]['command']}", ""]
    return "\n".join(lines).replace("\n\n\n", "\n\n").rstrip() + "\n"


def _ratio_table(rounds: list[dict[str, dict]], ran: list[str]) -> list[str]:
    """Tokens per second and ratios of each round."""
    found = ratios(rounds)
    lines = [
        "| round | " + " | ".join([*ran, *(f"hpcpipe / best {family}" for family in found)]) + " |",
        "|---|" + "--:|" * (len(ran) + len(found)),
    ]
    for number, results in enumerate(rounds):
        cells = [f"{results[name]['tokens_per_s']:.1f}" for name in ran]
        lines.append(f"| {number + 1} | " + " | ".join(cells + [f"{v[number]:.2f}" for v in found.values()]) + " |")
    lines.append(
        "| median | "
        + " | ".join([f"{median_rate(rounds, n):.1f}" for n in ran] + [f"**{median(v):.2f}**" for v in found.values()])
        + " |"
    )
    return lines
