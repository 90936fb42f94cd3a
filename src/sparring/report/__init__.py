"""One self-contained HTML page about a run folder, or about a folder that compares runs.

It reads files and nothing else: no data set, no model. The page needs no network and no script.
"""

from sparring.report.page import write_report

__all__ = ["write_report"]
