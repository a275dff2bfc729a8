"""Sampling by commands: a request and what is written of it, and the fit of adaptive step counts."""
