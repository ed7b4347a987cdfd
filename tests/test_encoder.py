"""What an encoder has of its own: holes, their loss, and how sample.py fills them. Accumulation, several processes and
resuming are in test_train.py, for both objectives."""

import hashlib
import json
import math
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import sample
import train
from conftest import checkpoint, metrics, printed, train_on
from model import GPT, GPTConfig
from prepare_data import Dataset
from tools import bench
from train import Settings, get_batch, get_holes, get_micro_batches, get_offsets
from utils.device import resolve
from utils.settings import UserError

MASK = 18  # the first id beyond data/tiny's vocabulary


def settings(**more):
    return resolve(Settings(device="cpu", dtype="float32", objective="masked", **more))


def holes_by_hand(count, block_size, *key):
    """The places of the smallest numbers that Philox gives for a key, which numpy and sha256 define for good."""
    seed = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little") >> 1
    raw = np.random.Philox(key=seed).random_raw(block_size).tolist()
    return sorted(sorted(range(block_size), key=raw.__getitem__)[:count])


def places(holes):
    return [np.flatnonzero(row).tolist() for row in holes]


# Holes.


@pytest.mark.parametrize("share, count", [(0.15, 6), (0.3, 12), (0.001, 1), (0.999, 40)])
def test_each_window_has_equally_many_holes_and_each_place_equally_often(share, count):
    data, n = types.SimpleNamespace(block_size=40), 4000
    holes = get_holes(data, settings(mask_share=share), np.arange(n), 5, "holes", 3)
    assert holes.shape == (n, 40) and (holes.sum(1) == count).all()
    p = count / 40
    assert np.abs(holes.mean(0) - p).max() <= 4.5 * math.sqrt(p * (1 - p) / n)  # 40 places: by chance once in 4000


def test_holes_depend_on_seed_step_and_offset_alone():
    data, offsets = types.SimpleNamespace(block_size=40), np.array([7, 123, 7])
    found = get_holes(data, settings(), offsets, 1337, "holes", 2)
    assert places(found) == [holes_by_hand(6, 40, 1337, "holes", 2, offset) for offset in offsets.tolist()]
    assert places(found)[0] == places(found)[2] != places(found)[1]
    assert np.array_equal(get_holes(data, settings(), offsets[1:], 1337, "holes", 2), found[1:])
    for other in ((1338, "holes", 2), (1337, "holes", 3)):
        assert places(get_holes(data, settings(), offsets, *other))[0] != places(found)[0]
    assert get_holes(data, Settings(), offsets, 1337, "holes", 2) is None  # the next token is the objective


def test_inputs_hide_what_the_targets_are_and_nothing_else(tiny_data):
    data, s = Dataset("tiny", 16), settings(batch_size=3, gradient_accumulation_steps=2)
    tokens, found = np.fromfile("data/tiny/train.bin", np.uint8).tolist(), 0
    offsets = iter(get_offsets(data, s.seed, 4, 6).tolist())
    for x, y in get_micro_batches(data, s, 4):
        assert x.shape == y.shape == (3, 16) and y.is_contiguous()
        for inputs, targets, offset in zip(x.tolist(), y.tolist(), offsets):
            window, holes = tokens[offset : offset + 16], holes_by_hand(2, 16, s.seed, "holes", 4, offset)
            assert inputs == [MASK if i in holes else window[i] for i in range(16)]
            assert targets == [window[i] if i in holes else -1 for i in range(16)]
            found += 1
    assert found == 6
    holes = np.ones((1, 16), bool)  # past the end of the data there is nothing to predict
    assert get_batch(data, "train", [len(tokens) - 3], len(tokens), "cpu", holes)[1][0].tolist()[3:] == [-1] * 13


# Evaluation.


@pytest.mark.parametrize("eval_tokens, windows", [(None, None), (100, 6), (16, 1), (7, 1)])
def test_validation_is_the_mean_over_the_same_holes_for_every_run(tiny_data, eval_tokens, windows):
    """One window at a time in float64, only whole ones; neither batch size nor seed changes what is predicted."""
    data, model = Dataset("tiny", 16), GPT(GPTConfig(16, 19, 2, 2, 16, causal=False)).double()
    tokens = np.fromfile("data/tiny/val.bin", np.uint8)
    windows = windows or (len(tokens) - 1) // 16
    assert (len(tokens) - 1) % 16  # or the last window would be whole, and the test too easy
    nats = 0.0
    for first in range(0, 16 * windows, 16):
        window, holes = torch.tensor(tokens[first : first + 16].astype(int)), holes_by_hand(2, 16, "validation", first)
        hidden = window.clone()
        hidden[holes] = MASK
        nats -= model(hidden[None])[0].log_softmax(-1)[0, holes, window[holes]].sum().item()
    for batch_size, seed in ((1, 1), (3, 2), (50, 3)):
        s = settings(batch_size=batch_size, seed=seed, eval_tokens=eval_tokens)
        found = train.evaluate(train.Objective(model), data, s)
        assert found.keys() == {"val_loss", "perplexity"}
        assert found["val_loss"] == pytest.approx(nats / (2 * windows), rel=1e-6)
        assert found["perplexity"] == pytest.approx(math.exp(nats / (2 * windows)), rel=1e-6)


# Runs.


def test_a_run_says_what_its_loss_is_of(tiny_config, monkeypatch, capsys):
    told = []
    run = types.SimpleNamespace(log=lambda values, step: told.append(values), finish=lambda: None)
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **options: run))
    flags = [tiny_config, "--objective=masked", "--mask_share=0.3"]
    train.main([*flags, "--max_iters=60002", "--eval_only"])
    train.main([*flags, "--wandb_log"])
    out = capsys.readouterr().out
    assert "val loss" not in out and "bits" not in out and max(map(len, out.splitlines())) <= 80
    losses = metrics("out/tiny", "val_loss")
    assert losses[0] == pytest.approx(math.log(19), rel=0.02)
    assert f"step 12/12 masked-token loss {losses[12]:.4f} in " in out
    assert f": masked-token loss {losses[12]:.4f}, masked-token perplexity {math.exp(losses[12]):.2f}\n" in out
    assert [values["masked_token_loss"] for values in told if "masked_token_loss" in values] == list(losses.values())
    assert all("masked_token_perplexity" in values for values in told if "masked_token_loss" in values)
    record = json.loads(Path("out/tiny/config.json").read_text())
    assert (record["settings"]["objective"], record["settings"]["mask_share"]) == ("masked", 0.3)
    assert (record["model"]["causal"], record["model"]["vocab_size"]) == (False, 19)
    summary = json.loads(Path("out/tiny/summary.json").read_text())
    assert (summary["objective"], summary["final_val_loss"]) == ("masked", losses[12])
    assert summary["perplexity"] == pytest.approx(math.exp(losses[12])) and "bits_per_byte" not in summary


def test_number_formats_are_compared_by_the_loss_of_the_run(tiny_config, capsys):
    train.main([tiny_config, "--objective=masked", "--eval_tokens=auto"])
    losses, best = metrics("out/tiny", "val_loss"), checkpoint("out/tiny", "best.pt")["state"]["step"]
    capsys.readouterr()
    bench.main(["sample", "--run=out/tiny", "--device=cpu"])
    assert f"float32   validation loss {losses[best]:.5f} " in capsys.readouterr().out


def test_a_run_from_before_there_were_encoders_is_a_decoder(tiny_config, whole_run):
    path = Path(whole_run, "config.json")
    record = json.loads(path.read_text())
    del record["settings"]["objective"], record["settings"]["mask_share"]
    path.write_text(json.dumps(record))
    more = [tiny_config, "--resume", "--max_iters=14", "--lr_decay_iters=12"]
    with pytest.raises(UserError, match="objective was next, now is masked"):
        train.main([*more, "--objective=masked"])
    assert train.main(more) == 0
    assert checkpoint(whole_run)["state"]["step"] == 14


# Filling holes.


@pytest.fixture
def a_reader():
    """out/abc: an encoder that has read one line over and over."""
    recipe = (
        "dtype, objective, mask_share = 'float32', 'masked', 0.3\n"
        "n_layer, n_head, n_embd, block_size, batch_size, gradient_accumulation_steps = 1, 4, 64, 8, 32, 1\n"
        "max_iters, warmup_iters, learning_rate, lr_schedule, eval_tokens = 400, 5, 1e-2, 'linear', 200\n"
    )
    return train_on("abc", "abc_xyz\n" * 400, recipe)


def test_holes_are_filled_from_both_sides(a_reader, capsys):
    text, *lines, end = printed(capsys, a_reader, "--prompt=_bc_x__").split("\n")  # nothing is before the first
    assert text == "abc_xyz" and end == ""
    assert [line.split("'")[:2] for line in lines] == [[f"hole  {n}  ", c] for n, c in enumerate("a_yz", 1)]
    for line in lines:  # the likeliest first, as many as there is room for
        shares = [float(share) for share in re.findall(r" ([\d.]+)%", line)]
        assert shares == sorted(shares, reverse=True) and 2 <= len(shares) <= 5 and 50 < sum(shares) <= 100.5
        assert len(line) <= 80
    # Where there is a <mask>, an underscore is text.
    Path("p.txt").write_text("<mask>bc_xy<mask>\n")
    assert printed(capsys, a_reader, "--prompt=FILE:p.txt").split("\n")[:2] == ["abc_xyz", ""]


def test_what_is_printed_of_a_hole_fits_a_terminal(capsys):
    pieces = [bytes([65 + i]) * length for i, length in enumerate((30, 18, 12, 3, 90, 1))]
    tokenizer = types.SimpleNamespace(pieces=pieces, vocab_size=6, decode=lambda ids: b"".join(pieces[i] for i in ids))
    model = GPT(GPTConfig(4, 7, 1, 2, 16, causal=False))
    sample.write_filled(model, torch.tensor([[6, 3, 6, 6]]), tokenizer, None)
    _, *lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and all(line.count("%") >= 2 and len(line) <= 80 for line in lines)


def test_the_surest_hole_is_filled_first_and_seen_by_the_others():
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
        at_once = model(idx)[0][0, :, :n_tokens].argmax(-1)
        distributions = {}
        while mask in expected:
            logits = model(torch.tensor([expected]))[0][0].tolist()
            best = (0.0, None, None)
            for place in (i for i, token in enumerate(expected) if token == mask):
                total = sum(math.exp(x) for x in logits[place][:n_tokens])
                p = [math.exp(x) / total for x in logits[place][:n_tokens]]
                best = max(best, (max(p), place, p))
            _, place, distributions[place] = best
            expected[place] = distributions[place].index(best[0])
        found, probs = sample.fill(model, idx, mask, n_tokens)
        assert found[0].tolist() == expected and torch.equal(idx, before) and list(probs) == [1, 4, 5, 10]
        for place in probs:
            assert probs[place].tolist() == pytest.approx(distributions[place], rel=1e-4)
        once_at_a_time += found[0].tolist() != torch.where(idx[0] == mask, at_once, idx[0]).tolist()
    assert once_at_a_time > 2  # or the test would not see the order
