"""Independent random streams: what an adapter draws depends on its own seed, its name and the purpose, never on its
company. The seed of a stream is a hash, so that no two streams are shifted copies of one another."""

from __future__ import annotations

import hashlib


def stream_seed(*parts: int | str) -> int:
    """A 63-bit seed from ``parts``, for example ``stream_seed(run_seed, "sql", "order", epoch)``."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1
