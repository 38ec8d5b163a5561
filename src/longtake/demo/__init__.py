"""The demo: real clips, the bundled tiny model, the whole way."""
