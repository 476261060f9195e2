"""Token files, the order in which their samples are read, tokenizers, and the preparation of text.

Together with ``checkpoint/`` this is the only room that imports h5py. It knows nothing of ranks: every rank that needs
tokens opens the file itself and computes from the step number which samples are its own.
"""
