"""The arithmetic of a stage: compiled kernels over buffers that the caller owns.

Every operation is one function of one module (``gemm``, ``norm``, ``activation``, ``attention``, ``embedding``,
``loss``, ``adamw``, ``reduce``), and has a twin of the same name and signature in ``reference``, written in plain
numpy. Kernels keep no state and allocate nothing. This room is the only one that imports numba.

All float arrays of a call have one dtype (float32, or float64 where gradients are checked), are C-contiguous and
writable, and do not overlap except where a kernel says that they may. Shapes are not checked: a kernel trusts its
caller. Letters of shapes: R rows (samples x context), T context, C width, V vocabulary, M, K and N the sides of a
matrix product.
"""
