"""`paged_kv.benchmarks.report` under a short name for scripts. Knows nothing."""

from paged_kv.benchmarks.report import (
    COMMIT,
    ROOT,
    Row,
    add_arguments,
    failure_row,
    kept_rows,
    write_report,
)

__all__ = ["COMMIT", "ROOT", "Row", "add_arguments", "failure_row", "kept_rows", "write_report"]
