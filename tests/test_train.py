"""train.py: settings, data order, schedule, evaluation, exact resume, and what it refuses."""

import dataclasses
import hashlib
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_same, assert_same_run, checkpoint, metrics, parameter_report, run, start
from torch._dynamo.testing import CompileCounter
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import train
from model import GPT, GPTConfig
from prepare_data import Dataset
from train import Settings, get_batch, get_holes, get_lr, get_offsets
from utils import checkpoint as checkpoint_module
from utils import device as device_module
from utils.checkpoint import RunFolder
from utils.device import autocast, flops_per_token, resolve
from utils.settings import UserError, clock, read_command, run_program, short
from utils.watch import check_loss_scale, largest_attention_logit


both_objectives = pytest.mark.parametrize("objective", ["next", "masked"])  # what is masked alone is in test_encoder.py


def read(*argv):
    return read_command(argv, Settings, GPTConfig)


# Settings.


GPT3 = {"small": (12, 768, 12), "medium": (24, 1024, 16), "large": (24, 1536, 16)}  # layers, width, heads: table 2.1
ARMS = {  # parameters, highest and lowest rate, weight decay
    "gpt3_small": (124_373_760, 6e-4, 6e-5, 0.1),
    "identity_gpt3_small": (155_929_344, 6e-4, 6e-5, 2**-5),  # with an untied head
    "nlq_gpt3_small": (124_392_192, 3.6e-3, 2e-5, 0.1),
    "wide_gpt3_small": (134_990_592, 6e-4, 6e-5, 0.1),
    "gpt3_medium": (354_599_936, 3e-4, 3e-5, 0.1),
    "nlq_gpt3_medium": (354_649_088, 3e-3, 2e-5, 0.1),
    "gpt3_large": (758_392_320, 2.5e-4, 2.5e-5, 0.1),
    "nlq_gpt3_large": (758_466_048, 2.55e-3, 2e-5, 0.1),
}


@pytest.mark.parametrize("arm", ARMS)
def test_the_recipes_are_those_of_gpt3_and_of_the_paper(arm):
    settings, config = read(f"{ROOT}/config/{arm}.py")
    s, (total, *rates) = resolve(settings), ARMS[arm]
    n_layer, d, n_head = GPT3[arm.split("_")[-1]]
    assert (config.n_layer, config.n_embd, config.n_head, config.block_size) == (n_layer, d, n_head, 1024)
    assert parameter_report(config)["total"] == total
    if "identity" not in arm and "wide" not in arm:
        # Tokens and positions; a query, key and value, output, MLP of 4 d, and the gains of two norms, four if nonlinear.
        blocks = n_layer * (d * d + 2 * d * d + d * d + 8 * d * d + (4 if "nlq" in arm else 2) * d)
        assert total == (50304 + 1024) * d + blocks + d
    assert [s.learning_rate, pytest.approx(s.min_lr), s.weight_decay] == rates
    assert s.batch_size * s.gradient_accumulation_steps * config.block_size == 491_520
    assert (s.max_iters, s.warmup_iters, s.lr_decay_iters, s.beta1, s.beta2) == (60_002, 2000, 60_002, 0.9, 0.95)
    assert (s.dataset, s.grad_clip, s.lr_schedule, config.dropout) == ("openwebtext", 1.0, "cosine", 0.0)


def test_values_are_converted_to_their_types():
    Path("c.py").write_text("import math\n_half = 0.5\nlearning_rate = 1\nmax_iters = 1e3\ncompile = False\n")
    flags = "--batch_size=3 --eval_tokens=1e6 --wandb_log --resume=false --min_lr=auto --dropout=0 --n_layer=2"
    s, config = read("c.py", *flags.split(), "--query_activation=none")
    assert (s.learning_rate, s.max_iters, s.compile, s.batch_size, s.eval_tokens) == (1.0, 1000, False, 3, 1_000_000)
    assert (s.wandb_log, s.resume, s.min_lr, s.out_dir) == (True, False, None, os.path.join("out", "c"))
    assert (config.dropout, config.n_layer, config.query_activation, config.vocab_size) == (0.0, 2, "none", None)
    assert all(type(v) is t for v, t in ((s.learning_rate, float), (s.max_iters, int), (config.dropout, float)))


def test_help_lists_every_setting_with_its_default(capsys):
    assert train.main(["--help"]) == 0
    text = capsys.readouterr().out
    for cls in (Settings, GPTConfig):
        for name, field in cls.__dataclass_fields__.items():
            if name != "causal":
                (shown,) = re.findall(rf"^  --{name}=(.*)\n        \S", text, re.M)
                default = "auto" if field.default is None else field.default
                assert shown.strip('"') == str(default) or float(shown) == default


def test_the_learning_rate_follows_its_schedule():
    s = Settings(learning_rate=1.0, min_lr=0.1, warmup_iters=9, lr_decay_iters=109)
    expected = {0: 0.1, 4: 0.5, 8: 0.9, 9: 1.0, 59: 0.55, 34: 0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2, 109: 0.1, 500: 0.1}
    assert {step: pytest.approx(get_lr(s, step)) for step in expected} == expected
    s = Settings(learning_rate=1.0, min_lr=0.0, lr_schedule="linear", warmup_iters=0, lr_decay_iters=10)
    assert [get_lr(s, step) for step in range(11)] == pytest.approx([1 - step / 10 for step in range(11)])
    for warmup in (10, 12):  # longer than the run: nothing divides by zero
        s = Settings(learning_rate=1.0, min_lr=0.1, warmup_iters=warmup, lr_decay_iters=10)
        assert all(0 < get_lr(s, step) <= 1 for step in range(15))


def test_auto_settings_are_resolved_after_every_override():
    s = resolve(Settings(device="cpu", max_iters=70, learning_rate=0.5))
    assert (s.lr_decay_iters, s.min_lr, s.compile) == (70, 0.05, False)
    assert resolve(Settings(device="cpu", lr_schedule="linear")).min_lr == 0
    assert resolve(Settings(device="cpu", compile=True, dtype="bfloat16")).dtype == "bfloat16"


def test_a_process_uses_its_own_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for visible, local_rank, device in ((8, 3, "cuda:3"), (1, 3, "cuda:0"), (1, 0, "cuda:0")):
        monkeypatch.setattr(torch.cuda, "device_count", lambda visible=visible: visible)
        assert device_module.pick_device(None, local_rank) == device


# Data and evaluation.


def test_batches_depend_on_seed_and_step_alone(tiny_data):
    data = Dataset("tiny", 16)
    tokens = np.fromfile("data/tiny/train.bin", np.uint8)
    offsets = get_offsets(data, 5, 3, 1000)
    assert np.array_equal(offsets, get_offsets(Dataset("tiny", 16), 5, 3, 1000))
    assert np.array_equal(offsets[:10], get_offsets(data, 5, 3, 10))  # more sequences extend the step's batch
    for seed, step in ((5, 4), (6, 3)):
        assert np.mean(offsets == get_offsets(data, seed, step, 1000)) < 0.02
    last = len(tokens) - 17
    assert offsets.min() < 0.02 * last and 0.98 * last < offsets.max() <= last
    x, y = get_batch(data, "train", [0, last], len(tokens), "cpu")
    for row, offset in enumerate((0, last)):
        assert x[row].tolist() == tokens[offset : offset + 16].tolist()
        assert y[row].tolist() == tokens[offset + 1 : offset + 17].tolist()


def test_the_batch_of_a_step_is_pinned():
    """Philox with a sha256 key is defined outside numpy and Python: a run from years ago can be repeated."""
    key = int.from_bytes(hashlib.sha256(b"(1337, 'batch', 0)").digest()[:8], "little") >> 1
    M0, M1, W0, W1, mask = 0xD2E7470EE14C6C93, 0xCA5A826395121157, 0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B, 2**64 - 1
    c, k = [1, 0, 0, 0], [key, 0]  # the first block of Philox4x64-10 (Salmon et al. 2011), counter 1 as in numpy
    for _ in range(10):
        a, b = M0 * c[0], M1 * c[2]
        c = [(b >> 64) ^ c[1] ^ k[0], b & mask, (a >> 64) ^ c[3] ^ k[1], a & mask]
        k = [(k[0] + W0) & mask, (k[1] + W1) & mask]
    data = types.SimpleNamespace(n_tokens=lambda split: 1_000_003, block_size=3)
    assert get_offsets(data, 1337, 0, 4).tolist() == [value % 1_000_000 for value in c]


def assert_close_runs(a, b):
    for key in ("train_loss", "val_loss", "grad_norm"):
        assert metrics(a, key) == pytest.approx(metrics(b, key), rel=2e-5)


@both_objectives
def test_accumulation_changes_neither_data_nor_losses(objective, tiny_config):
    flags = [tiny_config, "--dropout=0", f"--objective={objective}"]
    train.main(flags)
    for batch_size, steps in ((4, 1), (1, 4)):
        sizes = [f"--batch_size={batch_size}", f"--gradient_accumulation_steps={steps}"]
        train.main([*flags, f"--out_dir=out/{steps}", *sizes])
        assert_close_runs(f"out/{steps}", "out/tiny")


@pytest.mark.parametrize("eval_tokens", [None, 100, 16, 7])
def test_validation_is_the_mean_over_tokens_whatever_the_batch_size(tiny_data, eval_tokens):
    data, model = Dataset("tiny", 16), GPT(GPTConfig(16, 20, 2, 2, 16)).double()
    tokens = torch.from_numpy(np.fromfile("data/tiny/val.bin", np.uint8).astype(np.int64))
    n = eval_tokens or len(tokens) - 1
    data.meta["val"]["text_bytes"] = 3 * len(tokens)  # as if each character had three bytes
    nats = 0.0
    for first in range(0, n, 16):  # one window at a time, the last one shorter
        stop = min(first + 16, n)
        log_p = model(tokens[None, first:stop])[0].log_softmax(-1)
        nats -= log_p[0, torch.arange(stop - first), tokens[first + 1 : stop + 1]].sum().item()
    for batch_size in (1, 3, 50):
        s = resolve(Settings(device="cpu", dtype="float32", batch_size=batch_size, eval_tokens=eval_tokens))
        found = train.evaluate(train.Objective(model), data, s)
        assert found["val_loss"] == pytest.approx(nats / n, rel=1e-6)
        assert found["perplexity"] == pytest.approx(math.exp(nats / n), rel=1e-6)
        assert found["bits_per_byte"] == pytest.approx(nats / n / math.log(2) / 3, rel=1e-6)


@both_objectives
def test_a_step_is_adamw_on_clipped_accumulated_gradients_at_the_scheduled_rate(objective, tiny_data):
    recipe = dict(device="cpu", dtype="float32", batch_size=2, gradient_accumulation_steps=2, learning_rate=0.02)
    recipe |= dict(min_lr=0.0, warmup_iters=2, lr_decay_iters=4, weight_decay=0.3, beta1=0.8, beta2=0.9, grad_clip=0.1)
    s = Settings(**recipe, objective=objective)
    data, config = Dataset("tiny", 16), GPTConfig(16, 20, 2, 2, 16, bias=True)  # gains and biases do not decay
    config.causal = objective == "next"
    ours, ref = GPT(config).double(), GPT(config).double()
    optimizer, scaler = train.make_optimizer(ours, s), torch.amp.GradScaler(enabled=False)
    moments = {p: (torch.zeros_like(p), torch.zeros_like(p)) for p in ref.parameters()}
    for t, rate in enumerate((0.02 / 3, 0.04 / 3, 0.02, 0.01)):
        found_loss, found_norm = train.train_step(train.Objective(ours), optimizer, scaler, data, s, t)
        offsets = get_offsets(data, s.seed, t, 4)
        holes = get_holes(data, s, offsets, s.seed, "holes", t)
        x, y = get_batch(data, "train", offsets, data.n_tokens("train"), "cpu", holes)
        assert objective == "next" or (y >= 0).sum() == 4 * 2
        loss = ref(x, y)[1]
        grads = torch.autograd.grad(loss, list(ref.parameters()))
        norm = math.sqrt(sum(g.pow(2).sum().item() for g in grads))
        assert norm > s.grad_clip  # or the test would not see the clipping
        assert (found_loss.item(), found_norm.item()) == (pytest.approx(loss.item()), pytest.approx(norm))
        with torch.no_grad():
            for p, g in zip(ref.parameters(), grads):
                m, v = moments[p]
                g = g * s.grad_clip / norm
                m.mul_(s.beta1).add_(g * (1 - s.beta1))
                v.mul_(s.beta2).add_(g * g * (1 - s.beta2))
                step = m / (1 - s.beta1 ** (t + 1)) / ((v / (1 - s.beta2 ** (t + 1))).sqrt() + 1e-8)
                p.sub_(rate * (step + (s.weight_decay * p if p.dim() >= 2 else 0)))
    for p, q in zip(ours.parameters(), ref.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def test_a_scaled_step_is_the_unscaled_one(tiny_data):
    """Of float16: what is clipped, and what AdamW sees, are the true gradients."""
    recipe = dict(device="cpu", dtype="float32", batch_size=2, gradient_accumulation_steps=2, grad_clip=0.1)
    s = Settings(**recipe, warmup_iters=0, lr_decay_iters=9, min_lr=0.0)
    data, ends, norms = Dataset("tiny", 16), [], []
    for enabled in (False, True):
        model = GPT(GPTConfig(16, 20, 2, 2, 16)).double()
        optimizer, scaler = train.make_optimizer(model, s), torch.amp.GradScaler("cpu", enabled=enabled)
        norms.append(
            [train.train_step(train.Objective(model), optimizer, scaler, data, s, t)[1].item() for t in range(3)]
        )
        ends.append(torch.cat([p.flatten() for p in model.parameters()]))
    assert norms[1] == pytest.approx(norms[0])
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-5, atol=1e-7)


def test_steps_and_evaluations_use_the_number_format_asked_for(tiny_data):
    s = resolve(Settings(device="cpu", dtype="bfloat16", batch_size=2, gradient_accumulation_steps=1, eval_tokens=100))
    model, data, seen = GPT(GPTConfig(16, 20, 2, 2, 16)), Dataset("tiny", 16), set()
    model.lm_head.register_forward_hook(lambda module, x, y: seen.add((y.dtype, y.requires_grad)))
    steps_of(train.Objective(model), data, s)(1)
    assert seen == {(torch.bfloat16, True)}
    seen.clear()
    train.evaluate(train.Objective(model), data, s)
    assert seen == {(torch.bfloat16, False)}


def test_dropout_differs_between_seeds_steps_and_ranks(tiny_data, monkeypatch):
    settings = resolve(Settings(device="cpu", dtype="float32", batch_size=2, gradient_accumulation_steps=1))
    data, losses = Dataset("tiny", 16), {}
    for rank, step, seed in ((0, 0, 1), (0, 0, 1), (0, 1, 1), (1, 0, 1), (0, 0, 2)):
        s = dataclasses.replace(settings, seed=seed)
        model = GPT(GPTConfig(16, 20, 2, 2, 16, dropout=0.5))
        monkeypatch.setattr(train, "rank", lambda rank=rank: rank)
        # every rank and step is given the same two sequences, so that only dropout can differ
        monkeypatch.setattr(train, "get_offsets", lambda *_, n=rank + 1: np.array([3, 7] * n))
        optimizer, scaler = train.make_optimizer(model, s), torch.amp.GradScaler(enabled=False)
        loss, _ = train.train_step(train.Objective(model), optimizer, scaler, data, s, step)
        losses.setdefault((rank, step, seed), []).append(loss.item())
    assert losses[0, 0, 1][0] == losses[0, 0, 1][1]
    assert len({loss for values in losses.values() for loss in values}) == 4


# Runs.


def test_a_run_leaves_a_complete_record(whole_run):
    names = {"config.json", "metrics.jsonl", "ckpt.pt", "best.pt", "summary.json"}
    assert {p.name for p in Path(whole_run).iterdir()} == names
    config = json.loads(Path(whole_run, "config.json").read_text())
    assert config["settings"]["lr_decay_iters"] == 12 and config["model"]["query_rank"] == 8
    assert config["parameters"]["total"] == sum(p.numel() for p in GPT(GPTConfig(**config["model"])).parameters())
    assert len(config["data"]["sha256"]["train"]) == 64 and config["versions"]["torch"] == torch.__version__
    assert config["command"] == "python train.py tiny.py"
    assert list(metrics(whole_run, "val_loss")) == [0, 4, 8, 12]
    assert list(metrics(whole_run, "train_loss")) == [1, 2, 4, 6, 8, 10, 12]
    decay = {n: 1e-3 + 9e-3 * (1 + math.cos(math.pi * (n - 3) / 10)) / 2 for n in (4, 6, 8, 10, 12)}
    assert metrics(whole_run, "learning_rate") == pytest.approx({1: 1e-2 / 3, 2: 2e-2 / 3, **decay})
    losses = metrics(whole_run, "val_loss")
    assert losses[0] == pytest.approx(math.log(config["model"]["vocab_size"]), rel=0.02)
    summary = json.loads(Path(whole_run, "summary.json").read_text())
    assert (summary["final_val_loss"], summary["best_val_loss"]) == (losses[12], min(losses.values()))
    assert summary["perplexity"] == pytest.approx(math.exp(losses[12])) and summary["objective"] == "next"
    assert (summary["steps"], summary["tokens"]) == (12, 12 * 4 * 16)
    assert summary["tokens_per_second"] > 0 and summary["seconds"] > 0
    best = checkpoint(whole_run, "best.pt")
    assert losses[best["state"]["step"]] == summary["best_val_loss"] and "optimizer" not in best


def test_the_best_model_is_kept_though_later_ones_are_worse(tiny_config, monkeypatch):
    losses = iter([3.0, 2.0, 2.5, 2.2])
    found = lambda *_: dict.fromkeys(("val_loss", "perplexity", "bits_per_byte"), next(losses))  # noqa: E731
    monkeypatch.setattr(train, "evaluate", found)
    train.main([tiny_config, "--max_iters=8", "--lr_decay_iters=12"])
    train.main([tiny_config, "--resume"])  # the best loss survives resuming, too
    assert checkpoint("out/tiny", "best.pt")["state"]["step"] == 4 and checkpoint("out/tiny")["state"]["step"] == 12
    summary = json.loads(Path("out/tiny/summary.json").read_text())
    assert (summary["best_val_loss"], summary["final_val_loss"]) == (2.0, 2.2)


def test_first_weights_follow_the_seed_and_a_model_is_compiled_where_asked(tiny_config, monkeypatch):
    monkeypatch.setattr(train.Objective, "compile", compile := mock.Mock())
    for seed, flag in ((1, "false"), (2, "true")):
        flags = [f"--seed={seed}", f"--compile={flag}", f"--out_dir=out/{seed}", "--max_iters=1", "--min_lr=1e-2"]
        train.main([tiny_config, *flags])  # a constant rate is allowed
        assert compile.call_count == seed - 1
    assert metrics("out/1", "val_loss")[0] != metrics("out/2", "val_loss")[0]


def test_a_run_that_goes_on_has_no_summary(tiny_config, whole_run, monkeypatch):
    monkeypatch.setattr(train, "train_step", mock.Mock(side_effect=RuntimeError("out of power")))
    with pytest.raises(RuntimeError, match="out of power"):
        train.main([tiny_config, "--resume", "--max_iters=14", "--lr_decay_iters=12"])
    assert not Path(whole_run, "summary.json").exists()


@both_objectives
def test_n_steps_and_n_more_equal_twice_n_bit_for_bit(objective, tiny_config):
    train.main([tiny_config, f"--objective={objective}"])
    common = [tiny_config, f"--objective={objective}", "--out_dir=out/b", "--lr_decay_iters=12"]
    train.main([*common, "--max_iters=6"])
    train.main([*common, "--max_iters=12", "--resume"])
    # The first session ended on an evaluation of its own, at step 6; nothing else may differ.
    lines = Path("out/b/metrics.jsonl").read_text().splitlines(keepends=True)
    extra = [line for line in lines if json.loads(line)["step"] == 6 and "val_loss" in line]
    assert len(extra) == 1
    Path("out/b/metrics.jsonl").write_text("".join(line for line in lines if line not in extra))
    assert_same_run("out/b", "out/tiny")


@pytest.mark.slow
@both_objectives
def test_a_signal_saves_and_the_resumed_run_equals_an_undisturbed_one(objective, tiny_config):
    flags = [tiny_config, "--max_iters=4000", "--eval_interval=2000", "--eval_tokens=16", "--log_interval=20"]
    flags.append(f"--objective={objective}")
    shorter = ["--max_iters=150", "--lr_decay_iters=4000"]
    whole = run("train.py", *flags, "--out_dir=out/whole", *shorter)  # rounding depends on the number of threads
    assert whole.returncode == 0
    for signum in (signal.SIGTERM, signal.SIGINT):
        out = f"out/{signum}"
        process = start("train.py", *flags, f"--out_dir={out}")
        assert any(line.startswith("step 20/") for line in process.stdout)
        process.send_signal(signum)
        rest = process.communicate()[0]
        assert process.returncode == 128 + signum
        told = re.search(r"stopped after step (\d+) and saved; go on with: python (train.py .*)\n", rest)
        step = checkpoint(out)["state"]["step"]
        assert int(told[1]) == step and 20 <= step < 150
        done = run(*told[2].split(), *shorter)
        assert done.returncode == 0, done.stderr
        assert_same(checkpoint(out)["model"], checkpoint("out/whole")["model"])
        assert metrics(out, "train_loss") == metrics("out/whole", "train_loss")


def test_killed_before_its_first_checkpoint_a_run_begins_again(tiny_config, whole_run):
    for name in ("ckpt.pt", "best.pt", "summary.json"):
        Path(whole_run, name).rename(f"{name}.before")
    with open(f"{whole_run}/metrics.jsonl", "a") as f:
        f.write('{"step": 13, "tra')  # the line that was being written
    train.main([tiny_config, "--resume"])
    assert_same(checkpoint(whole_run)["model"], torch.load("ckpt.pt.before", weights_only=True)["model"])
    assert list(metrics(whole_run, "val_loss")) == [0, 4, 8, 12]


def test_eval_only_gives_the_loss_of_the_checkpoint_and_writes_nothing(tiny_config, whole_run, capsys):
    before = {p.name: p.read_bytes() for p in Path(whole_run).iterdir()}
    capsys.readouterr()
    assert train.main([tiny_config, "--resume", "--eval_only"]) == 0
    assert f"val loss {metrics(whole_run, 'val_loss')[12]:.4f}" in capsys.readouterr().out
    assert {p.name: p.read_bytes() for p in Path(whole_run).iterdir()} == before


@pytest.mark.parametrize("log_interval", [1, 100])  # seen at a log line, or before the next save
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tiny_config, monkeypatch, log_interval):
    good, step = [], train.train_step

    def fails_at_6(objective, optimizer, *arguments):
        if arguments[-1] == 6:
            good.append(Path("out/tiny/ckpt.pt").read_bytes())
            with torch.no_grad():
                next(objective.parameters()).fill_(math.nan)
        return step(objective, optimizer, *arguments)

    monkeypatch.setattr(train, "train_step", fails_at_6)
    with pytest.raises(UserError, match="not finite") as e:
        train.main([tiny_config, f"--log_interval={log_interval}"])
    assert e.value.status == 1
    assert [Path("out/tiny/ckpt.pt").read_bytes()] == good
    assert checkpoint("out/tiny")["state"]["step"] == 4


def test_a_rate_far_too_high_ends_in_one_line_and_status_1(tiny_config):
    done = run("train.py", tiny_config, "--learning_rate=1e30", "--grad_clip=0")
    assert done.returncode == 1
    assert re.fullmatch(r"train\.py: .*finite.*learning_rate \(now 1e\+30\).*\n", done.stderr)


@pytest.mark.parametrize("flag", ["--compile=false", pytest.param("--compile", marks=pytest.mark.slow)])
@both_objectives
def test_two_processes_give_the_losses_of_one(objective, flag, tiny_config):
    flags = [tiny_config, "--dropout=0", "--gradient_accumulation_steps=4", f"--objective={objective}"]
    train.main(flags)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", ROOT / "train.py"]
    done = run(*launch, *flags, flag, "--out_dir=out/two")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"step 12/12 {'val' if objective == 'next' else 'masked-token'} loss") == 1
    assert_close_runs("out/two", "out/tiny")
    assert json.loads(Path("out/two/config.json").read_text())["processes"] == 2


def test_one_of_several_processes_ends_before_anything_can_abort_it():
    late = "import atexit, os; from utils.settings import run_program; atexit.register(os.abort); print('told'); "
    Path("late.py").write_text(late + "run_program(lambda: 3)")
    ends = [run("late.py", environment={"WORLD_SIZE": str(n)}) for n in (1, 2)]
    assert [(end.returncode, end.stdout) for end in ends] == [(-signal.SIGABRT, "told\n"), (3, "told\n")]


def steps_of(objective, data, settings):
    """A function that takes n steps of training."""
    optimizer, scaler = train.make_optimizer(objective, settings), torch.amp.GradScaler(enabled=False)
    return lambda n: [train.train_step(objective, optimizer, scaler, data, settings, step) for step in range(n)]


@both_objectives
def test_a_step_is_one_graph_that_is_not_compiled_again(objective, tiny_data):
    """Training, then evaluation, which is a graph of its own; neither is compiled again, whatever comes after it."""
    recipe = {"batch_size": 2, "gradient_accumulation_steps": 2, "objective": objective}
    settings = resolve(Settings(device="cpu", dtype="float32", **recipe))
    model, data, counter = GPT(GPTConfig(16, 20, 2, 2, 16)), Dataset("tiny", 16), CompileCounter()
    objective, names = train.Objective(model), list(model.state_dict())
    torch._dynamo.reset()
    objective.compile(backend=counter, fullgraph=True)
    take_steps = steps_of(objective, data, settings)
    take_steps(2)
    assert counter.frame_count == 1
    train.evaluate(objective, data, settings)
    assert counter.frame_count == 2
    take_steps(2)
    train.evaluate(objective, data, dataclasses.replace(settings, eval_tokens=17))  # the last batch is not full
    assert counter.frame_count == 2 and list(model.state_dict()) == names


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@both_objectives
def test_a_step_on_a_gpu_does_not_wait_for_it(objective, tiny_data):
    settings = resolve(Settings(device="cuda", batch_size=2, gradient_accumulation_steps=2, objective=objective))
    take_steps = steps_of(train.Objective(GPT(GPTConfig(16, 20, 2, 2, 16)).to("cuda")), Dataset("tiny", 16), settings)
    take_steps(1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        take_steps(2)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_number_format_follows_what_the_processor_has(monkeypatch):
    for amx, avx, dtype in ((True, True, "bfloat16"), (False, True, "bfloat16"), (False, False, "float32")):
        capabilities = {"amx_bf16": amx, "avx512_bf16": avx}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found, raising=False)
        assert device_module.best_dtype("cpu") == dtype
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # torch before 2.10
    assert device_module.best_dtype("cpu") == "float32"


def test_a_loss_scale_that_collapses_stops_the_run():
    scaler = torch.amp.GradScaler("cpu", enabled=True, init_scale=2.0)
    check_loss_scale(scaler)
    scaler._scale = torch.tensor(0.5)
    with pytest.raises(UserError, match="float16: the loss scale fell to 0.5"):
        check_loss_scale(scaler)


@pytest.mark.parametrize("causal", [True, False])
def test_the_largest_attention_logit_is_logged_where_asked(causal, tiny_config):
    model = GPT(GPTConfig(16, 20, 2, 2, 16, causal=causal)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(6)
    idx, seen = torch.randint(20, (2, 16)), []
    for block in model.blocks:  # from the weights alone, head by head
        block.ln_1.register_forward_hook(lambda module, inputs, x, block=block: seen.append((block.attn, x)))
    model(idx)
    largest = -math.inf
    for attention, x in seen:
        q, k = attention.query(x), x @ attention.key_value.weight[:16].T
        for head in (slice(0, 8), slice(8, 16)):
            logits = q[..., head] @ k[..., head].transpose(1, 2) / math.sqrt(8)
            largest = max(largest, *(logits[:, i, : i + 1 if causal else 16].max().item() for i in range(16)))
    settings = Settings(device="cpu", dtype="float32")
    assert largest_attention_logit(model, idx, settings) == pytest.approx(largest, rel=1e-6)
    train.main([tiny_config, "--watch", "--max_iters=4", f"--objective={'next' if causal else 'masked'}"])
    assert list(metrics("out/tiny", "largest_logit")) == [1, 2, 4]


def test_accumulation_must_be_shared_evenly(tiny_config, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match="gradient_accumulation_steps=2 .* 3 processes"):
        train.main([tiny_config])


@pytest.mark.parametrize("query_mode", ["linear", "identity", "nonlinear"])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_bfloat16_stays_close_to_float32(query_mode, qk_norm):
    model = GPT(GPTConfig(16, 20, 2, 2, 32, query_mode=query_mode, qk_norm=qk_norm))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 if p.dim() < 2 else 8)  # large enough that the attention weights are far from uniform
    idx = torch.randint(20, (4, 16), generator=torch.Generator().manual_seed(0))
    exact, _ = model(idx)
    with autocast(Settings(device="cpu", dtype="bfloat16")):
        rounded, _ = model(idx)
    assert rounded.dtype == torch.bfloat16
    error = (rounded.float() - exact).pow(2).mean().sqrt() / exact.std()
    assert 0 < error < 0.05
    for block in model.blocks:  # a query that went missing would show
        block.attn.query.forward = torch.zeros_like
    without, _ = model(idx)
    assert (without - exact).pow(2).mean().sqrt() / exact.std() > 3 * error


def test_a_run_may_change_its_number_format(tiny_config, whole_run):
    train.main([tiny_config, "--resume", "--dtype=bfloat16", "--max_iters=14", "--lr_decay_iters=12"])
    record = json.loads(Path(whole_run, "config.json").read_text())
    assert record["command"] == "python train.py tiny.py" and record["settings"]["dtype"] == "float32"
    (session,) = record["resumed"]
    assert session["at_step"] == 12 and session["changed"] == {"dtype": "bfloat16", "max_iters": 14}
    assert session["command"].endswith("--resume --dtype=bfloat16 --max_iters=14 --lr_decay_iters=12")


def test_a_run_in_float16_goes_on_from_one_that_was_not(whole_run):
    saved, scaler, state = checkpoint(whole_run), torch.amp.GradScaler("cpu", enabled=True), {"step": 0}
    model = GPT(GPTConfig(**saved["config"]))
    RunFolder(whole_run).restore(saved, model, train.make_optimizer(model, Settings()), scaler, state)
    assert state["step"] == 12 and scaler.get_scale() == torch.amp.GradScaler("cpu").get_scale()


def test_float16s_loss_scale_goes_on_as_if_the_run_had_not_stopped(tiny_config, monkeypatch):
    scaler = torch.amp.GradScaler  # the CPU has none for float16, but scales float32's gradients as well
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled: scaler(device, growth_interval=3))
    for argv in ["--out_dir=a"], ["--out_dir=b", "--max_iters=5", "--lr_decay_iters=12"], ["--out_dir=b", "--resume"]:
        train.main([tiny_config, *argv])
    whole, parts = checkpoint("a")["scaler"], checkpoint("b")["scaler"]
    assert whole == parts and whole["scale"] == 2**16 * 2**4 and whole["_growth_tracker"] == 0  # 12 steps


def test_a_second_ctrl_c_acts_at_once_but_not_torchruns_sigterm():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job would ignore Ctrl-C
    try:
        with device_module.StopSignal() as stop:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)
            assert stop.number == signal.SIGTERM
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_what_is_logged_fits_a_terminal_and_is_told_wandb(tiny_config, monkeypatch, capsys):
    assert [clock(seconds) for seconds in (5, 125, 3599.6, 45296)] == ["0:05", "2:05", "1h00m", "12h34m"]
    shortened = [short(number) for number in (0.5, 61.44, 999.9, 23345, 421003, 1.25e6)]
    assert shortened == ["0.5", "61.4", "1k", "23.3k", "421k", "1.25M"]
    told, begun, finish = [], [], mock.Mock()
    run = types.SimpleNamespace(log=lambda values, step: told.append({"step": step, **values}), finish=finish)
    fake = types.SimpleNamespace(init=lambda **options: begun.append(options) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    capsys.readouterr()
    train.main([tiny_config, "--peak_tflops=0.0001", "--max_iters=60002", "--eval_only"])
    train.main([tiny_config, "--peak_tflops=0.0001", "--wandb_log", "--wandb_project=p"])
    lines = capsys.readouterr().out.splitlines()
    assert any("mfu" in line for line in lines) and max(map(len, lines)) <= 80
    assert told == [json.loads(line) for line in Path("out/tiny/metrics.jsonl").read_text().splitlines()]
    finish.assert_called_once_with()  # Python's own end, at which wandb would do it, is left out with several processes
    (options,) = begun
    assert (options["project"], options["name"]) == ("p", "tiny") and options["config"]["settings"]["wandb_log"]
    speed, mfu = metrics("out/tiny", "tokens_per_second"), metrics("out/tiny", "mfu")
    flops = flops_per_token(GPT(GPTConfig(**options["config"]["model"])))
    assert speed.pop(1) is None  # the first step, which may compile, says nothing
    assert all(mfu[step] == pytest.approx(speed[step] * flops / 1e8, rel=1e-9) for step in speed)


ZERO = [(torch.ones(()), torch.zeros(()))]  # loss and norm of the first step
FAILURES = [
    (torch.OutOfMemoryError("CUDA out of memory"), r"batch_size \(now 2\).*gradient_accumulation_steps \(now 2\)"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), "out of memory"),
    (torch._dynamo.exc.InternalTorchDynamoError("no C++ compiler"), "--compile=false"),
    (ZERO, "the first gradient is exactly 0.*--compile=false"),
]


@pytest.mark.parametrize("effect, words", FAILURES)
def test_a_failed_step_says_what_to_change(effect, words, tiny_config, monkeypatch, capsys):
    monkeypatch.setattr(train, "train_step", mock.Mock(side_effect=effect))
    monkeypatch.setattr(train.Objective, "compile", lambda self: None)
    with pytest.raises(SystemExit):
        run_program(lambda: train.main([tiny_config, f"--compile={'--compile' in words}"]))
    assert re.search(words, capsys.readouterr().err)


def test_a_program_runs_where_the_output_is_no_terminal_or_file(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())  # as in a notebook
    with pytest.raises(SystemExit):
        run_program(lambda: print("told"))
    assert sys.stdout.getvalue() == "told\n"


@pytest.mark.skipif(not shutil.which("git"), reason="git is not installed")
def test_the_commit_is_dirty_where_the_code_was_changed(tmp_path, monkeypatch):
    """But not by what a study leaves, nor by files that git does not know."""

    def git(*words):
        return subprocess.run(["git", *words], cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()

    monkeypatch.setattr(checkpoint_module, "__file__", str(tmp_path / "utils/checkpoint.py"))
    assert checkpoint_module.git_commit() is None
    for name in ("study/results/a", "utils/b"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(name)
    git("init")
    assert checkpoint_module.git_commit() is None
    git("add", ".")
    git("-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "-m", "one")
    (tmp_path / "study/results/a").write_text("more")
    (tmp_path / "new").write_text("more")
    assert checkpoint_module.git_commit() == git("rev-parse", "HEAD")
    (tmp_path / "utils/b").write_text("more")
    assert checkpoint_module.git_commit() == git("rev-parse", "HEAD") + "-dirty"


def test_flops_per_token_equal_what_torch_counts():
    shape, idx = {"n_layer": 3, "n_head": 4, "n_embd": 32, "mlp_hidden": 40}, torch.randint(50, (2, 16))
    for overrides in ({"query_mode": "linear"}, {"query_mode": "identity"}, {"query_rank": 8}):
        model = GPT(GPTConfig(16, 50, **shape, **overrides))
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            model(idx, idx)[1].backward()
        assert counter.get_total_flops() == 2 * 16 * flops_per_token(model), overrides


PEAKS = {"NVIDIA H100 80GB HBM3": 989, "NVIDIA H100 PCIe": 756, "NVIDIA H200 NVL": 836, "Tesla T4": None}
PEAKS |= {
    "NVIDIA RTX A1000": None,
    "NVIDIA GH200 480GB": 989,
    "NVIDIA A100-SXM4-40GB": 312,
    "NVIDIA A100-SXM4-40GB MIG 1g.5gb": None,
}
PEAKS |= {"NVIDIA GeForce RTX 4090 D": 147, "NVIDIA GeForce RTX 4090": 165, "NVIDIA B200": 2250}


def test_the_speed_that_is_told(monkeypatch):
    """Of two processes: tokens a second of both, MFU of each, and the time for the steps that are left."""
    model = GPT(GPTConfig(16, 20, 2, 2, 16))
    monkeypatch.setenv("WORLD_SIZE", "2")
    speed, words = device_module.measure_speed(model, Settings(peak_tflops=1e-4, max_iters=130), 0.5, 100, 10)
    assert speed == {"tokens_per_second": 200, "mfu": pytest.approx(200 * flops_per_token(model) / 2e8)}
    assert words.startswith("200 tok/s mfu ") and words.endswith(" eta 1:00")


def test_the_peak_of_a_gpu_is_known_or_not_given(monkeypatch):
    monkeypatch.setattr(device_module, "device_name", lambda device: device)
    assert {name: device_module.peak_tflops(f"cuda:{name}") for name in PEAKS} == PEAKS
    assert device_module.peak_tflops("cpu") is None


@pytest.mark.parametrize(
    "n, here, expected",
    [
        (1, None, "python train.py --seed=1"),
        (8, 8, "torchrun --standalone --nproc_per_node=8 train.py --seed=1"),
        (16, 8, "torchrun --nnodes=2 --nproc_per_node=8 train.py --seed=1"),
    ],
)
def test_the_command_that_resumes_starts_as_many_processes(n, here, expected, monkeypatch):
    for name, value in {"WORLD_SIZE": n, "LOCAL_WORLD_SIZE": here}.items():
        monkeypatch.setenv(name, str(value)) if value else monkeypatch.delenv(name, raising=False)
    assert device_module.launch_command("train.py", "--seed=1") == expected


def test_a_number_too_small_to_be_normal_counts_as_zero():
    def product():
        return (torch.tensor(1e-30) * 1e-9).item()  # float32 is normal down to 1.2e-38

    torch.set_flush_denormal(False)
    assert product() == pytest.approx(1e-39, rel=1e-4)
    with device_module.processes(resolve(Settings(device="cpu"))):
        assert product() == 0
    torch.set_flush_denormal(False)
