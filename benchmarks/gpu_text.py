"""report.md from the rows of a report."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

from allocator import MIB

EAGER, COMPILED = "eager, channels-last", "torch.compile, channels-last"
"""Names of the variants that others are compared with."""
CASE = ("network", "mode", "precision", "batch", "compiled")
Row = dict[str, Any]


def markdown(report: dict[str, Any]) -> str:
    rows = report["rows"]
    sections = [
        "# What a GPU said" if not report["smoke"] else "# What a CPU said, to show that the report works",
        *_where(report),
        *_checks(_of("check", rows)),
        *_tests([row for row in _of("test", rows) if row["outcome"] == "failed"]),
        *_blocks(_of("blocks", rows)),
        *_kernelbench(_of("kernelbench", rows)),
        *_networks(_of("network", rows), [row["name"] for row in _of("peer", rows)]),
        *_errors(_of("error", rows)),
        *_primitives(_of("primitive", rows)),
        *_not_measured(_of("failed", rows), _of("dropped", rows), _unfinished(rows)),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def plain(report: dict[str, Any], why: str) -> str:
    """Every row as JSON, for the case that :func:`markdown` fails."""
    rows = "\n".join(json.dumps(row) for row in report["rows"])
    return f"# {why}\n\n{json.dumps({k: v for k, v in report.items() if k != 'rows'}, indent=1)}\n\n```\n{rows}\n```\n"


def _of(kind: str, rows: list[Row]) -> list[Row]:
    return [row for row in rows if row["kind"] == kind]


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Markdown; all columns but the first to the right."""
    lines = ["| " + " | ".join(header) + " |", "|---" + "|---:" * (len(header) - 1) + "|"]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows])


def _where(report: dict[str, Any]) -> list[str]:
    machine, versions = report["machine"], report["versions"]
    lines = [
        f"- {report['status']}, {report['seconds']:.0f} s: `{report['command']}`",
        f"- device: {machine['gpu'] or machine['processor'] or 'unknown'}, driver {machine['driver'] or 'none'}",
        "- " + ", ".join(f"{name} {version or 'not installed'}" for name, version in versions.items()),
        f"- commit {report['commit'] or 'unknown'}",
    ]
    reasons = report.get("backends")
    if reasons is not None:
        lines.append("- backends: " + "; ".join(f"{name}: {reason or 'runs'}" for name, reason in reasons.items()))
    for row in _of("tools", report["rows"]):
        found = ", ".join(f"{name} {what or 'missing'}" for name, what in row.items() if name != "kind")
        lines.append(f"- to build and check: {found}")
    for row in _of("rates", report["rows"]):
        products = ", ".join(f"{name} {rate / 1e12:.1f} TFLOP/s" for name, rate in row["products"].items())
        lines.append(f"- measured: copy {row['copy'] / 1e9:.0f} GB/s (read and written); matrix product {products}")
    return ["\n".join(lines)]


def _checks(rows: list[Row]) -> list[str]:
    if not rows:
        return []
    cells = [(row["check"], row["outcome"], row.get("seconds", ""), row.get("closing", "")) for row in rows]
    outputs = [f"Output of {row['check']}:\n\n```\n{row['output']}\n```" for row in rows if row.get("output")]
    return ["## Checks", table(("check", "outcome", "s", "last word"), cells), *outputs]


def _tests(failed: list[Row]) -> list[str]:
    lines = [f"- `{row['test']}`: {row['error']}" for row in failed]
    return ["## Tests that failed", "\n".join(lines)] if lines else []


def _unfinished(rows: list[Row]) -> list[Row]:
    """What was begun last in each phase, if nothing has ended it."""
    last = {row["phase"]: row for row in rows if row["kind"] in ("begun", "ended", "finished")}
    failed = {row["what"] for row in _of("failed", rows)}
    return [row for row in last.values() if row["kind"] == "begun" and row["what"] not in failed]


def _blocks(rows: list[Row]) -> list[str]:
    if not rows:
        return []
    cells = [
        (
            row["backend"],
            row["batch"],
            _ms(row["predicted_milliseconds"]),
            _ms(row["floor_milliseconds"]),
            _ms(row["milliseconds"]),
            _x(row),
        )
        for row in rows
    ]
    header = ("backend", "batch", "predicted, ms", "floor, ms", "measured, ms", "times the floor")
    text = "Forward and backward of the four dense blocks of DenseNet-121, bfloat16, in a CUDA graph. Predicted by benchmarks/gpu_model.py before anything was measured."
    return ["## Dense blocks against their floor", text, table(header, cells)]


def _kernelbench(rows: list[Row]) -> list[str]:
    if not rows:
        return []
    cells = [
        (
            row["problem"],
            row["variant"],
            _ms(row["milliseconds"]),
            f"{row['error']:.0e}",
            _ms(row["published_eager"]),
            _ms(row["published_compiled"]),
        )
        for row in rows
    ]
    header = ("problem", "", "ms", "error against eager", "published eager, ms", "published torch.compile, ms")
    text = "Level 3, forward alone, float32, batch 10, batch statistics. The published times are KernelBench's own on an H100, not of this machine."
    return ["## KernelBench", text, table(header, cells)]


def _networks(rows: list[Row], peer: list[str]) -> list[str]:
    sections = [f"## Whole networks\n\nBeside: {', '.join(peer)}."] if rows else []
    cases = list(dict.fromkeys(tuple(r[key] for key in CASE) for r in rows))
    for case in cases:
        here = [r for r in rows if tuple(r[key] for key in CASE) == case]
        by_name = {r["variant"]: r for r in here}
        compiled = by_name.get(COMPILED)
        plain = by_name.get(EAGER)
        cells = []
        for row in here:
            ratios = [_ratio(other, row, "milliseconds") for other in (plain, compiled)]
            memory = _ratio(row, plain, "peak_bytes") if plain else ""
            peak = f"{row['peak_bytes'] / MIB:.0f}" if row["peak_bytes"] else ""
            speed = f"{row['images_per_second']:.0f}"
            cells.append((row["variant"], _ms(row["milliseconds"]), speed, *ratios, peak, memory))
        header = ("", "ms", "images/s", "× eager", "× torch.compile", "peak, MiB", "of eager's")
        title = "### {}, {}, {}, batch {}{}".format(*case[:4], ", torch.compile" if case[4] else "")
        sections.append(f"{title}\n\n{table(header, cells)}")
    return sections


def _ratio(over: Row | None, under: Row, key: str) -> str:
    return f"{over[key] / under[key]:.2f}" if over and over.get(key) and under.get(key) else ""


def _errors(rows: list[Row]) -> list[str]:
    if not rows:
        return []
    cells = [(row["variant"], row["network"], row["precision"], f"{row['gradient_error']:.1e}") for row in rows]
    text = "Relative error of all gradients together against float64, batch 2."
    return ["## Errors", text, table(("variant", "network", "precision", "error"), cells)]


def _primitives(rows: list[Row]) -> list[str]:
    sections = []
    text = "Device time inside a CUDA graph, with a second-level cache that holds other data; host time is that of a call's Python and launch. Errors: against eager. Predicted by benchmarks/gpu_model.py before anything was measured."
    header = (
        "",
        "backend",
        "predicted, µs",
        "floor, µs",
        "measured, µs",
        "× floor",
        "GB/s",
        "TFLOP/s",
        "host, µs",
        "error",
    )
    for arithmetic in dict.fromkeys(row["arithmetic"] for row in rows):
        cells = []
        for row in (r for r in rows if r["arithmetic"] == arithmetic):
            rate = f"{row['gigabytes_per_second']:.0f}", f"{row['teraflops']:.1f}"
            predicted = row["predicted_microseconds"]
            times = f"{row['floor_microseconds']:.1f}", f"{row['microseconds']:.1f}", _x(row)
            host = f"{row['host_microseconds']:.0f}", f"{row['error']:.0e}"
            first = row["primitive"], row["backend"], "" if predicted is None else f"{predicted:.1f}"
            cells.append((*first, *times, *rate, *host))
        sections.append(f"### {arithmetic}\n\n{table(header, cells)}")
    return ["## Primitives against their floors", text, *sections] if sections else []


def _not_measured(failed: list[Row], dropped: list[Row], unfinished: list[Row]) -> list[str]:
    lines = [f"- {row['what']}: {row['error']}" for row in failed]
    lines += [f"- begun and not ended: {row['phase']}: {row['what']}" for row in unfinished]
    lines += [f"- dropped, no time was left: {row['what']}" for row in dropped]
    outputs = [f"Output of {row['what']}:\n\n```\n{row['output']}\n```" for row in failed if row.get("output")]
    return ["## Not measured", "\n".join(lines), *outputs] if lines else []


def _ms(milliseconds: float | None) -> str:
    if milliseconds is None:
        return ""
    return f"{milliseconds:.2f}" if milliseconds < 100 else f"{milliseconds:.0f}"


def _x(row: Row) -> str:
    return f"{row['times_the_floor']:.2f}"
