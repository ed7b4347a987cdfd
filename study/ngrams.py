"""What counting reaches: the loss of n-gram tables on val.bin, counted on the very tokens that a run is trained on.

A model that ends above the trigram line has not learned to look around. Interpolated by Witten and Bell's rule (Chen and
Goodman 1999, section 2.4): p_n(w|h) = (c(hw) + t(h) p_{n-1}(w|h')) / (c(h) + t(h)), where c counts, t(h) is the number of
different tokens seen with h, h' is h without its last token, and p_0 is uniform. h are the n - 1 tokens nearest to w: those
before it or, for an encoder, those on both sides, the mask token among them.
"""

from dataclasses import replace

import numpy as np
import torch

from train import get_batch, get_holes, get_micro_batches

NEAREST = {"next": (-1, -2, -3, -4), "masked": (-1, 1, -2, 2)}  # where the tokens of h stand
MOST_TOKENS = 100_000_000  # of a run, beyond which counting would take too much memory


def ngram_losses(data, settings):
    """{n: mean loss in nats} for n = 1 to 5 over the targets of an evaluation; {} where a run sees too many tokens.

    Counted is what a run learns from: a decoder's windows, and of an encoder the tokens in holes. No count reaches over a
    window's edge. A decoder's table goes on over the whole of val.bin, where the model's windows begin anew.
    """
    settings = replace(settings, device="cpu")
    per_step = settings.batch_size * settings.gradient_accumulation_steps
    if settings.max_iters * per_step * data.block_size > MOST_TOKENS:
        return {}
    batches = [batch for step in range(settings.max_iters) for batch in get_micro_batches(data, settings, step)]
    x, y = (torch.cat(tensors).numpy() for tensors in zip(*batches))
    n = min(data.n_tokens("val") - 1, settings.eval_tokens or data.n_tokens("val"))
    around = NEAREST[settings.objective]
    if settings.objective == "next":
        seen = tokens = np.concatenate([x[:, :1], y], axis=1)
        counted = np.ones_like(seen, bool)
        val = np.asarray(data.tokens("val")[: n + 1], np.int64)[None]
        val_near, val_tokens = neighbours(val, around, data)[:, 1:], val[:, 1:]
    else:
        seen, tokens, counted = x, y, y >= 0
        offsets = np.arange(max(1, n // data.block_size)) * data.block_size
        holes = get_holes(data, settings, offsets, seed="validation")
        val, targets = (t.numpy() for t in get_batch(data, "val", offsets, n + 1, "cpu", holes))
        val_near, val_tokens = neighbours(val, around, data)[holes], targets[holes]
    near, val_near = neighbours(seen, around, data)[counted], val_near.reshape(-1, len(around))
    return count(near, tokens[counted], val_near, val_tokens.ravel(), data.vocab_size)


def neighbours(windows, around, data):
    """The tokens around each token of windows (rows, length) -> (rows, length, len(around))."""
    edge, length = data.vocab_size + 1, windows.shape[1]  # an id beyond the mask token's
    padded = np.pad(windows, ((0, 0), (4, 4)), constant_values=edge)
    return np.stack([padded[:, 4 + offset : 4 + offset + length] for offset in around], axis=-1)


def count(near, tokens, val_near, val_tokens, vocab_size):
    """Count tokens (N,) with those near them (N, 4), nearest first -> {n: mean loss of val_tokens (M,)}."""
    ids = vocab_size + 2
    h, val_h = np.zeros_like(tokens), np.zeros_like(val_tokens)  # a number for each h that was counted; -1: for no such
    p, losses = np.full(len(val_tokens), 1 / vocab_size), {}
    for n in range(1, near.shape[1] + 2):
        grams, counts = np.unique(h * ids + tokens, return_counts=True)
        place, known = find(grams, val_h * ids + val_tokens)
        c_hw = np.where(known, counts[place], 0)
        c, t = (np.where(val_h >= 0, np.bincount(grams // ids, weights)[val_h], 0) for weights in (counts, None))
        p = np.where(c > 0, (c_hw + t * p) / np.maximum(c + t, 1), p)
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
