"""The reports of ``hpcpipe bench`` as tables for people."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

_WIDEST = 400


def print_actions(report: Mapping[str, Any]) -> None:
    """Print a row per schedule, a column per kind of action."""
    messages = "with MPI messages" if report["transport"] == "mpi" else "without messages"
    print(
        f"executor, microseconds per action, compute and waiting left out: {report['ranks']} ranks,"
        f" {report['microbatches']} microbatches, {messages}, median of {report['repetitions']} walks"
    )
    kinds = list(dict.fromkeys(kind for row in report["schedules"] for kind in row["kinds"]))
    table = _table("schedule", "actions", "us", "10-90 %", *kinds)
    for row in report["schedules"]:
        figures = [f"{row['kinds'][kind]:.1f}" if kind in row["kinds"] else "" for kind in kinds]
        spread = f"{row['p10_us']:.1f}-{row['p90_us']:.1f}"
        table.add_row(row["schedule"], str(row["actions"]), f"{row['action_us']:.1f}", spread, *figures)
    _print(table)


def print_gemm(report: Mapping[str, Any]) -> None:
    """Print what computes products, and below it what is bound by memory."""
    threads = f"{report['threads']} thread{'' if report['threads'] == 1 else 's'}"
    peak, copied, reached = (report[key] / 1e9 for key in ("peak_flops", "copy_bytes_per_s", "products_flops_per_s"))
    print(
        f"{report['precision']} kernels ({report['unit']}) on {threads}, {report['rows']} rows, median of"
        f" {report['repetitions']} calls\n"
        f"peak of the unit {peak:,.0f} GFLOP/s, copy in memory {copied:,.1f} GB/s; all products {reached:,.0f} GFLOP/s,"
        f" {report['products_of_peak']:.1%} of the peak\n"
    )
    bound = {True: "product", False: "bound by memory"}
    faster = ["speed-up"] if report["threads"] > 1 else []
    for has_products, heading in bound.items():
        rates = ["GFLOP/s", "% of peak", "MB", "GB/s"] if has_products else ["MB", "GB/s", "% of copy"]
        table = _table(heading, "use", "shape", "ms", "10-90 %", *rates, *faster)
        for row in report["kernels"]:
            if (row["flops_per_s"] is not None) == has_products:
                table.add_row(*_gemm_cells(row, has_products, bool(faster)))
        _print(table)
        if has_products:
            print()


def _gemm_cells(row: Mapping[str, Any], has_products: bool, has_speedup: bool) -> Sequence[str]:
    use = f"{row['use']} + {row['end']}" if row["end"] else row["use"]
    times = _milliseconds(row["median_s"]), f"{_milliseconds(row['p10_s'])}-{_milliseconds(row['p90_s'])}"
    traffic = f"{row['bytes'] / 1e6:,.1f}", f"{row['bytes_per_s'] / 1e9:,.1f}"
    if has_products:
        rates = [f"{row['flops_per_s'] / 1e9:,.0f}", f"{100 * row['of_peak']:.1f}", *traffic]
    else:
        rates = [*traffic, f"{100 * row['of_copy']:.0f}"]
    speedup = [f"{row['speedup']:.2f}"] if has_speedup else []
    return row["name"], use, " x ".join(map(str, row["shape"])), *times, *rates, *speedup


def print_step(report: Mapping[str, Any]) -> None:
    """Print the figures of a step, and where its time goes."""
    ranks, threads = report["ranks"], report["threads"]
    print(
        f"{ranks} rank{'' if ranks == 1 else 's'} = pipeline of {report['pipeline']} x {report['data']} with"
        f" {threads} thread{'' if threads == 1 else 's'} each, {report['schedule']}, {report['precision']}"
        f" ({report['unit']}), {report['tokens_per_step']:,} tokens per step\n"
        f"{report['tokens_per_s']:,.0f} tokens/s: {report['step_s']:.4g} s per step, median of {report['steps']}"
        f" ({report['step_p10_s']:.4g}-{report['step_p90_s']:.4g} s), {report['predicted_step_s']:.4g} s predicted\n"
        f"MFU {report['mfu']:.1%} of {report['peak_flops'] / 1e9:,.0f} GFLOP/s; copy in memory"
        f" {report['copy_bytes_per_s'] / 1e9:,.1f} GB/s\n"
        f"bubble {report['bubble']:.1%}; of the step {report['waiting']:.1%} waiting: {report['scheduled_waiting']:.1%}"
        f" by the schedule, {report['exposed_messages']:.1%} exposed messages\n"
    )
    total_s = report["observed_step_s"]
    table = _table("kernel", "calls", "ms", "% of step", "GFLOP/s", "GB/s", "at peak ms", "at copy ms")
    for row in report["kernels"]:
        rates = [_rate(row["flops_per_s"], 0), _rate(row["bytes_per_s"], 1)]
        floors = [_milliseconds(row[key]) if row[key] else "" for key in ("peak_s", "copy_s")]
        shown = _milliseconds(row["seconds"]), f"{100 * row['share']:.1f}"
        table.add_row(row["name"], f"{row['calls']:,.0f}", *shown, *rates, *floors)
    for name, seconds in (
        ("waiting for messages", report["waiting_s"]),
        ("everything else", report["other_s"]),
        ("a step on all ranks", total_s),
    ):
        table.add_row(name, "", _milliseconds(seconds), f"{100 * seconds / total_s:.1f}")
    _print(table)


def print_p2p(report: Mapping[str, Any]) -> None:
    """Print a row per size."""
    pairs = f"the slowest of {report['pairs']} pairs at once" if report["pairs"] > 1 else "one pair"
    library = report["library"].partition(", package")[0]
    print(f"messages between neighbours, {pairs}; cores: {report['cores']}\n{library}\n")
    table = _table("bytes", "us", "10-90 %", "GB/s", "both ways us", "10-90 %", "GB/s", "rounds", "")
    for row in report["sizes"]:
        cells = [f"{row['bytes']:,}"]
        for prefix, key in (("", "one_way_s"), ("both_ways_", "both_ways_s")):
            spread = "-".join(_microseconds(row[f"{prefix}{name}"]) for name in ("p10_s", "p90_s"))
            cells += [_microseconds(row[key]), spread, f"{row[f'{prefix}bytes_per_s'] / 1e9:.2f}"]
        table.add_row(*cells, str(row["rounds"]), "residual stream" if row["is_stream"] else "")
    _print(table)


def print_checkpoint(report: Mapping[str, Any]) -> None:
    """Print a row per way of moving the bytes."""
    ranks = report["ranks"]
    print(
        f"checkpoints of {report['bytes'] / 1e6:,.1f} MB from {ranks} rank{'' if ranks == 1 else 's'} in"
        f" {report['directory']}, median of {report['rounds']} rounds\n"
        f"training waits {_milliseconds(report['blocked_s'])} ms for each"
        f" ({_milliseconds(report['blocked_p10_s'])}-{_milliseconds(report['blocked_p90_s'])} ms)\n"
    )
    table = _table("", "ms", "10-90 %", "MB/s", "of dd")
    for label, key, ratio in (
        ("written and committed", "write", "write_of_dd"),
        ("dd, with fsync", "dd_write", ""),
        ("read back and verified", "read_back", ""),
        ("restored and verified", "restore", "restore_of_dd"),
        ("dd to /dev/null", "dd_read", ""),
    ):
        row = report[key]
        spread = f"{_milliseconds(row['p10_s'])}-{_milliseconds(row['p90_s'])}"
        part = f"{report[ratio]:.0%}" if ratio else ""
        table.add_row(label, _milliseconds(row["s"]), spread, f"{row['bytes_per_s'] / 1e6:,.0f}", part)
    _print(table)


def _microseconds(seconds: float) -> str:
    return f"{1e6 * seconds:,.1f}" if seconds < 1e-4 else f"{1e6 * seconds:,.0f}"


def _rate(per_second: float | None, digits: int) -> str:
    return "" if per_second is None else f"{per_second / 1e9:,.{digits}f}"


def _milliseconds(seconds: float) -> str:
    """Write milliseconds with three digits or more."""
    number = 1e3 * seconds
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"


def _table(*columns: str) -> "Table":
    """Return a plain table whose first column, and others of words, are aligned to the left."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="")
    for place, name in enumerate(columns):
        is_words = place == 0 or name == "use"
        table.add_column(name, justify="left" if is_words else "right", no_wrap=True)
    return table


def _print(table: "Table") -> None:
    from rich.console import Console

    from hpcpipe.cluster.environment import terminal_size

    size = terminal_size()
    console = Console(highlight=False, width=size[0] if size else None)
    # Columns that do not fit are worth more on a second line than cut off.
    console.width = max(console.width, console.measure(table, options=console.options.update(width=_WIDEST)).maximum)
    console.print(table, soft_wrap=True)
