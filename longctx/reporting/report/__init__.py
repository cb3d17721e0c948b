"""Makes the page ``report.html``: its sections, each from the records of a run."""
