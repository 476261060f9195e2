"""Pipeline-parallel training of transformer language models on MPI machines.

Importing the package starts no MPI and compiles nothing: the rooms below it do so when they are used.
"""

__version__ = "0.1.0"
