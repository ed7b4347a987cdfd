"""The validation loss of n-gram counts, counted in the very tokens that a run is trained on.

A model that ends above the trigram line has hardly learned to use its context. The counts are
interpolated by Witten and Bell's rule (Chen and Goodman 1999, section 2.4):

    p_n(w|h) = (c(hw) + t(h) p_{n-1}(w|h')) / (c(h) + t(h))

c counts, t(h) is the number of different tokens after h, h' is h without its last token, and p_0 is
uniform. h are the n - 1 tokens nearest to w: those before it or, for an encoder, on both sides.
"""

from dataclasses import replace

import numpy as np
import torch

from train import get_batch, get_micro_batches

# Where the tokens of h stand, nearest first.
NEAREST = {"next": (-1, -2, -3, -4), "masked": (-1, 1, -2, 2)}
MOST_TOKENS = 100_000_000  # counting more would take too much memory


def ngram_losses(data, settings):
    """{n: mean loss in nats} for n = 1 to 5 on val.bin; {} for a run of too many tokens.

    The counts learn from what a run learns from: a decoder's windows, an encoder's masked tokens.
    They never reach over the edge of a window. On val.bin a decoder's counts have no edges.
    """
    settings = replace(settings, device="cpu")
    per_step = settings.batch_size * settings.gradient_accumulation_steps
    if settings.max_iters * per_step * data.block_size > MOST_TOKENS:
        return {}
    batches = []
    for step in range(settings.max_iters):
        batches += get_micro_batches(data, settings, step)
    x, y = (torch.cat(tensors).numpy() for tensors in zip(*batches))
    n = min(data.n_tokens("val") - 1, settings.eval_tokens or data.n_tokens("val"))
    if settings.objective == "next":
        seen = tokens = np.concatenate([x[:, :1], y], axis=1)
        counted = np.ones_like(seen, bool)
        val = val_tokens = np.asarray(data.tokens("val")[: n + 1], np.int64)[None]
        val_counted = np.arange(n + 1)[None] > 0
    else:
        seen, tokens, counted = x, y, y >= 0
        offsets = np.arange(max(1, n // data.block_size)) * data.block_size
        batch = get_batch(data, "val", offsets, settings, mask_key=("validation",), end=n + 1)
        val, val_tokens = (tensor.numpy() for tensor in batch)
        val_counted = val_tokens >= 0
    around = NEAREST[settings.objective]
    near = neighbours(seen, around, data)[counted]
    val_near = neighbours(val, around, data)[val_counted]
    return count(near, tokens[counted], val_near, val_tokens[val_counted], data.vocab_size)


def neighbours(windows, around, data):
    """The tokens around each token of windows (rows, length) -> (rows, length, len(around))."""
    edge = data.vocab_size + 1  # the mask token is data.vocab_size
    padded = np.pad(windows, ((0, 0), (4, 4)), constant_values=edge)
    length = windows.shape[1]
    return np.stack([padded[:, 4 + offset : 4 + offset + length] for offset in around], axis=-1)


def count(near, tokens, val_near, val_tokens, vocab_size):
    """Count tokens (N,) after those near them (N, 4) -> {n: mean loss of val_tokens (M,)}."""
    ids = vocab_size + 2
    h = np.zeros_like(tokens)  # a number for each different h
    val_h = np.zeros_like(val_tokens)  # the same numbers; -1 for an h that was not counted
    p = np.full(len(val_tokens), 1 / vocab_size)
    losses = {}
    for n in range(1, near.shape[1] + 2):
        grams, counts = np.unique(h * ids + tokens, return_counts=True)
        place, known = find(grams, val_h * ids + val_tokens)
        c_hw = np.where(known, counts[place], 0)
        c_h = np.where(val_h >= 0, np.bincount(grams // ids, counts)[val_h], 0)
        t_h = np.where(val_h >= 0, np.bincount(grams // ids)[val_h], 0)
        p = np.where(c_h > 0, (c_hw + t_h * p) / np.maximum(c_h + t_h, 1), p)
        losses[n] = float(-np.log(p).mean())
        if n <= near.shape[1]:
            longer, h = np.unique(h * ids + near[:, n - 1], return_inverse=True)
            place, known = find(longer, val_h * ids + val_near[:, n - 1])
            val_h = np.where(known, place, -1)
    return losses


def find(ordered, values):
    """Where values stand in an ordered array, and whether they do."""
    place = np.searchsorted(ordered, values).clip(max=len(ordered) - 1)
    return place, ordered[place] == values
