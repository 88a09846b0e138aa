"""Triton kernels; imported only where they can run. Each has its meaning in ``ops.reference`` or beside its caller."""
