"""Seeds: one for each purpose, so that no use of random numbers can disturb another."""

import hashlib


def derive_seed(seed, *key):
    """A seed below 2**63 for one named purpose, e.g. derive_seed(1337, "batch", step).

    It depends on the run's seed and the key alone, so a step's batch or a weight's first values
    can be drawn again at any time, in any order, on any machine.
    """
    digest = hashlib.sha256(repr((seed, *key)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
