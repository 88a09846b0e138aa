"""Frozen 8-bit layers, low-rank deltas and routing."""
