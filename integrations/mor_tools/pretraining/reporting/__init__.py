"""What users see of a run: the display, its history, report.html and summary.json."""
