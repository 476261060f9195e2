"""Faults that are injected on purpose, so that tests and `hpcpipe chaos` can see what a run does about them."""
