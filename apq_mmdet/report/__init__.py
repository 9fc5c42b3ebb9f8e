"""What a run tells: the layer table, the report file, the last line on the terminal."""

from apq_mmdet.report.summary import REPORT, remove_report, summary_line, write_report
from apq_mmdet.report.table import render_table

__all__ = ["REPORT", "remove_report", "render_table", "summary_line", "write_report"]
