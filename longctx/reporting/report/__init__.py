"""The page ``report.html``: its sections, each from the records of a run."""
