"""The report of one run: `run_report.write`; figures, tables and pages that studies share."""
