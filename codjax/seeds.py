"""Seeds derived by name, so that a new consumer of randomness moves no other.

>>> derive_seed(0, "rollout", 3) == derive_seed(0, "rollout", 3)
True
"""

from __future__ import annotations

import hashlib
import json


def derive_seed(*parts: int | str, bits: int = 32) -> int:
    """A seed that depends on every part, in order, and on nothing else.

    Args:
        parts: the run's seed, the consumer's name, then step, pack, run, … as needed.
        bits: width of the result, at most 64.

    Returns:
        The leading `bits` of SHA-256 over the parts as compact JSON, as an unsigned integer.
    """
    payload = json.dumps(parts, separators=(",", ":")).encode()
    return int.from_bytes(hashlib.sha256(payload).digest()[:8], "big") >> (64 - bits)
