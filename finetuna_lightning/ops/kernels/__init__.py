"""Triton kernels, each imported only where it can run."""
