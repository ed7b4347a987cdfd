"""Seeds for random numbers."""

import hashlib


def derive_seed(seed, *key):
    """A seed below 2**63 for one named purpose, e.g. ("batch", step); streams never interfere."""
    digest = hashlib.sha256(repr((seed, *key)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
