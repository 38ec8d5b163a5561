"""Memory strategies: each is one file, applied to a model from outside."""
