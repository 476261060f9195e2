"""Measures parts of hpcpipe on this machine."""
