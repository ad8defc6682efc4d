"""What people see of a run: the display, its history, report.html, summary.json."""
