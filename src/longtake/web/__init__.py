"""Pages made of a run: self-contained HTML. Needs no torch."""
