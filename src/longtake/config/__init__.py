"""Configs: the schema, reading and overriding, and what cannot go together. Needs no torch."""
