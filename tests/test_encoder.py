"""What is particular to encoders: masked tokens, their loss, and how sample.py fills them in."""

import hashlib
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import metrics, printed, train_on

import sample
import train
from model import GPT, GPTConfig
from train import Settings, get_batch, get_micro_batches, get_offsets, mask_tokens
from utils.data import Dataset
from utils.device import resolve

MASK = 18  # the first id beyond data/tiny's vocabulary


def settings(**more):
    return resolve(Settings(device="cpu", dtype="float32", objective="masked", **more))


def masked_by_hand(count, block_size, *key):
    """The places of the smallest numbers that Philox gives for a key."""
    seed = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little") >> 1
    raw = np.random.Philox(key=seed).random_raw(block_size).tolist()
    return sorted(sorted(range(block_size), key=raw.__getitem__)[:count])


# Masks.


@pytest.mark.parametrize("share, count", [(0.15, 6), (0.3, 12), (0.001, 1), (0.999, 40)])
def test_each_window_has_equally_many_masks_and_each_place_equally_often(share, count):
    n = 4000
    x = np.zeros((n, 40), np.int64)
    inputs, targets = mask_tokens(x, MASK, settings(mask_share=share), np.arange(n), (5, 3))
    masked = inputs == MASK
    assert (masked.sum(1) == count).all() and np.array_equal(masked, targets == 0)
    p = count / 40
    # With 40 places, a difference as large as this happens by chance once in 4000 tests.
    assert np.abs(masked.mean(0) - p).max() <= 4.5 * math.sqrt(p * (1 - p) / n)


def test_masks_depend_on_seed_step_and_offset_alone():
    def places(offsets, *key):
        x = np.zeros((len(offsets), 40), np.int64)
        inputs, _ = mask_tokens(x, MASK, settings(), np.array(offsets), key)
        return [np.flatnonzero(row == MASK).tolist() for row in inputs]

    found = places([7, 123, 7], 1337, "holes", 2)
    assert found == [masked_by_hand(6, 40, 1337, "holes", 2, offset) for offset in (7, 123, 7)]
    assert found[0] != found[1] and places([123], 1337, "holes", 2) == found[1:2]
    assert places([7], 1338, "holes", 2) != found[:1] != places([7], 1337, "holes", 3)


def test_inputs_hide_what_the_targets_are_and_nothing_else(tiny_data):
    data, s = Dataset("tiny", 16), settings(batch_size=3, gradient_accumulation_steps=2)
    tokens = np.fromfile("data/tiny/train.bin", np.uint8).tolist()
    offsets = iter(get_offsets(data, s.seed, 4, 6).tolist())
    for x, y in get_micro_batches(data, s, 4):
        assert x.shape == y.shape == (3, 16) and y.is_contiguous()
        for inputs, targets, offset in zip(x.tolist(), y.tolist(), offsets):
            window = tokens[offset : offset + 16]
            masked = masked_by_hand(2, 16, s.seed, "holes", 4, offset)
            assert inputs == [MASK if i in masked else window[i] for i in range(16)]
            assert targets == [window[i] if i in masked else -1 for i in range(16)]
    assert next(offsets, None) is None
    # Past the end of the data there is nothing to predict.
    everything = settings(mask_share=0.999)
    end = np.array([len(tokens) - 3])
    _, y = get_batch(data, "train", end, everything, mask_key=(1,))
    assert y[0].tolist()[3:] == [-1] * 13 and min(y[0].tolist()[:3]) >= 0


# Evaluation.


@pytest.mark.parametrize("eval_tokens, windows", [(None, None), (100, 6), (16, 1), (7, 1)])
def test_validation_is_the_mean_over_the_same_masks_for_every_run(tiny_data, eval_tokens, windows):
    """One window at a time, only whole ones; neither batch size nor seed changes the result."""
    data = Dataset("tiny", 16)
    model = GPT(GPTConfig(16, 19, 2, 2, 16, causal=False)).double()
    tokens = np.fromfile("data/tiny/val.bin", np.uint8)
    windows = windows or (len(tokens) - 1) // 16
    assert (len(tokens) - 1) % 16  # or the last window would be whole, and the test too easy
    nats = 0.0
    for first in range(0, 16 * windows, 16):
        window = torch.tensor(tokens[first : first + 16].astype(int))
        masked = masked_by_hand(2, 16, "validation", first)
        hidden = window.clone()
        hidden[masked] = MASK
        nats -= model(hidden[None]).log_softmax(-1)[0, masked, window[masked]].sum().item()
    for batch_size, seed in ((1, 1), (3, 2), (50, 3)):
        s = settings(batch_size=batch_size, seed=seed, eval_tokens=eval_tokens)
        result = train.evaluate(model, data, s)
        assert result.keys() == {"val_loss", "perplexity"}
        assert result["val_loss"] == pytest.approx(nats / (2 * windows), rel=1e-6)
        assert result["perplexity"] == pytest.approx(math.exp(nats / (2 * windows)), rel=1e-6)


def test_a_run_records_its_objective(tiny_config, capsys):
    train.main([tiny_config, "--objective=masked", "--mask_share=0.3"])
    assert "bits" not in capsys.readouterr().out
    assert metrics("out/tiny", "val_loss")[0] == pytest.approx(math.log(19), rel=0.02)
    record = json.loads(Path("out/tiny/config.json").read_text())
    assert (record["settings"]["objective"], record["settings"]["mask_share"]) == ("masked", 0.3)
    assert (record["model"]["causal"], record["model"]["vocab_size"]) == (False, 19)


# Filling in.


@pytest.fixture
def a_reader():
    """out/abc: an encoder that has seen one line again and again."""
    recipe = (
        "dtype, objective, mask_share = 'float32', 'masked', 0.3\n"
        "n_layer, n_head, n_embd, block_size = 1, 4, 64, 8\n"
        "batch_size, gradient_accumulation_steps, eval_tokens = 32, 1, 200\n"
        "max_iters, warmup_iters, learning_rate, lr_schedule = 400, 5, 1e-2, 'linear'\n"
    )
    return train_on("abc", "abc_xyz\n" * 400, recipe)


def test_masks_are_filled_in_from_both_sides(a_reader, capsys):
    prompt = "--prompt=<mask>bc<mask>x<mask><mask>"
    text, *lines, end = printed(capsys, a_reader, prompt).split("\n")
    assert text == "abc_xyz" and end == ""
    tops = [line.split("'")[:2] for line in lines]
    assert tops == [[f"mask  {n}  ", c] for n, c in enumerate("a_yz", 1)]
    for line in lines:  # the likeliest first, as many as there is room for
        shares = [float(share) for share in re.findall(r" ([\d.]+)%", line)]
        assert shares == sorted(shares, reverse=True) and 50 < sum(shares) <= 100.5
        assert 2 <= len(shares) <= 5 and len(line) <= 80
    Path("p.txt").write_text("<mask>bc_xy<mask>\n")
    assert printed(capsys, a_reader, "--prompt=FILE:p.txt").split("\n")[:2] == ["abc_xyz", ""]


def test_the_most_certain_mask_is_filled_in_first_and_seen_by_the_others():
    mask, n_tokens = 20, 18  # ids 18 (it ends a document) and 19 (padding) are no text
    model = GPT(GPTConfig(12, 21, 2, 2, 16, causal=False), seed=3).double()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(5)  # so that a token that is filled in changes the others' probabilities
        model.wte.weight[18:] *= 3  # and what is no text would often win
    once_at_a_time = 0
    for seed in range(20):
        idx = torch.randint(n_tokens, (1, 12), generator=torch.Generator().manual_seed(seed))
        idx[0, [1, 4, 5, 10]] = mask
        before, expected = idx.clone(), idx[0].tolist()
        at_once = model(idx)[0, :, :n_tokens].argmax(-1)
        distributions = {}
        while mask in expected:
            logits = model(torch.tensor([expected]))[0].tolist()
            best = (0.0, None, None)
            for place in (i for i, token in enumerate(expected) if token == mask):
                total = sum(math.exp(x) for x in logits[place][:n_tokens])
                p = [math.exp(x) / total for x in logits[place][:n_tokens]]
                best = max(best, (max(p), place, p))
            _, place, distributions[place] = best
            expected[place] = distributions[place].index(best[0])
        found, probs = sample.fill(model, idx, mask, n_tokens)
        assert found[0].tolist() == expected and torch.equal(idx, before)
        assert list(probs) == [1, 4, 5, 10]
        for place in probs:
            assert probs[place].tolist() == pytest.approx(distributions[place], rel=1e-4)
        all_at_once = torch.where(idx[0] == mask, at_once, idx[0])
        once_at_a_time += found[0].tolist() != all_at_once.tolist()
    assert once_at_a_time > 2  # or the test would not see the order
