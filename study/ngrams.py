"""What counting reaches: the loss of n-gram tables on val.bin, counted on the very tokens that a run is trained on.

A model that ends above the trigram line has not learned to look back. Interpolated by Witten and Bell's rule (Chen and
Goodman 1999, section 2.4): p_n(w|h) = (c(hw) + t(h) p_{n-1}(w|h')) / (c(h) + t(h)), where c counts, t(h) is the number of
different tokens seen after h, h' is h without its first token, and p_0 is uniform.
"""

import numpy as np

from train import get_offsets

ORDERS = (1, 2, 3, 4, 5)
MOST_TOKENS = 100_000_000  # of a run, beyond which counting would take too much memory


def seen_by(data, settings):
    """The windows that a run sees, (sequences, block_size + 1), or None where they are too many."""
    per_step = settings.batch_size * settings.gradient_accumulation_steps
    if settings.max_iters * per_step * data.block_size > MOST_TOKENS:
        return None
    steps = range(settings.max_iters)
    offsets = np.concatenate([get_offsets(data, settings.seed, step, per_step) for step in steps])
    return np.lib.stride_tricks.sliding_window_view(data.tokens("train"), data.block_size + 1)[offsets]


def ngram_losses(windows, val, vocab_size):
    """{n: mean loss in nats} over all tokens of val (length,) but the first; no count reaches over a window's edge.

    The tables see more than the model at the start of its windows, as their context goes on over the whole of val.
    """
    windows, val = windows.astype(np.int64), np.asarray(val, np.int64)
    # A context is known by a number: its n - 1 tokens' place among all contexts of that length that were counted.
    context, val_context = np.zeros_like(windows), np.zeros_like(val)
    p, losses, contexts = np.full(len(val), 1 / vocab_size), {}, 1
    for n in ORDERS:
        # From here on, position i of windows and val stands for the n tokens that end there.
        keys = context * vocab_size + windows[:, n - 1 :]
        grams, counts = np.unique(keys, return_counts=True)
        total, kinds = (np.bincount(grams // vocab_size, w, contexts) for w in (counts, None))
        place, known = find(grams, val_context * vocab_size + val[n - 1 :])
        count = np.where(known & (val_context >= 0), counts[place], 0)
        c, t = (np.where(val_context >= 0, x[val_context], 0) for x in (total, kinds))
        shorter = p[-len(count) :]
        p[-len(count) :] = np.where(c > 0, (count + t * shorter) / np.maximum(c + t, 1), shorter)
        losses[n] = float(-np.log(p[1:]).mean())
        context, contexts = np.searchsorted(grams, keys)[:, :-1], len(grams)
        val_context = np.where(known & (val_context >= 0), place, -1)[:-1]
    return losses


def find(ordered, values):
    """Where values stand in an ordered array, and whether they do."""
    place = np.searchsorted(ordered, values).clip(max=len(ordered) - 1)
    return place, ordered[place] == values
