"""The report of a run: one HTML file, RUN/report.html, that needs nothing else."""
