"""The report file and the one line that a person reads."""

from pathlib import Path
from typing import Any

from apq_mmdet.calibration.memory import peak_memory
from apq_mmdet.files import write_json

REPORT = "report.json"  # in a work dir


def remove_report(folder: Path) -> None:
    """Remove the report of an earlier run, if there is one."""
    (folder / REPORT).unlink(missing_ok=True)


def write_report(folder: Path, report: dict[str, Any]) -> None:
    """Complete the report, write it to ``report.json`` and print its summary."""
    report = {**report, "peak_memory": peak_memory()}
    write_json(folder / REPORT, report)
    print(summary_line(report))


def _ap(metrics: dict[str, float] | None, format_only: bool) -> str:
    """Box and mask AP in percent, or the first metrics of another evaluator."""
    if metrics is None:
        return "not measured"
    if not metrics:  # what CocoMetric gives where nothing was detected, too
        return f"no metrics ({'format_only' if format_only else 'nothing detected?'})"
    aps = [(k.split("/")[-1].split("_")[0], v) for k, v in metrics.items() if k.endswith("_mAP")]
    if aps:
        return ", ".join(f"{name} AP {100 * value:.1f}" for name, value in aps)
    return ", ".join(f"{k} {v:.4g}" for k, v in list(metrics.items())[:2])


def summary_line(report: dict[str, Any]) -> str:
    """Float AP, quantized AP, sizes and time on one line."""
    sizes, bits = report["sizes"], report["bits"]
    shown = {kind: _ap(metrics, report.get("format_only", False)) for kind, metrics in report["metrics"].items()}
    mib = {key: value / 2**20 for key, value in sizes.items()}
    return (
        f"W{bits['weight']}A{bits['activation']} {report['recipe']} ({report['scope']}): "
        f"float {shown['float']} | quantized {shown['quantized']} | "
        f"{mib['float_checkpoint_bytes']:.1f} -> {mib['quantized_checkpoint_bytes']:.1f} MiB | "
        f"calibration {report['calibration_seconds']:.0f} s, total {report['seconds']:.0f} s"
    )
