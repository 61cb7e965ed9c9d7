"""Result rows and the arrays beside them, turned into claims, tables and pictures. Runs no model."""

from __future__ import annotations

from patchrank.report.page import Report as Report
from patchrank.report.page import write_report as write_report
from patchrank.report.paper import paper_rows as paper_rows
