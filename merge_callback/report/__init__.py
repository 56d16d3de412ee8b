"""The report of a run: one page, drawn from its event file."""
