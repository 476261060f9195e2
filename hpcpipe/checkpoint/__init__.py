"""Checkpoints on disk: one HDF5 file per writing rank, and a manifest with hashes that commits them.

Everything here is plain functions of one process. Which rank calls what, and what the ranks must agree on in
between, is decided in ``train/``: every rank's writer process writes its
file, that of rank 0 calls ``commit``.
"""
