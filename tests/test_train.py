"""train.py: settings, the batch of a step, evaluation, one step, and exact resuming.

test_encoder.py has what is particular to masked tokens; both objectives run here.
"""

import dataclasses
import hashlib
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
from conftest import ROOT, assert_same, assert_same_run, checkpoint, metrics, parameter_report
from conftest import run, start
from torch._dynamo.testing import CompileCounter
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import train
from model import GPT, GPTConfig
from train import Settings, get_batch, get_lr, get_micro_batches, get_offsets
from utils import checkpoint as checkpoint_module
from utils import device as device_module
from utils.data import Dataset
from utils.device import resolve
from utils.flops import flops_per_token
from utils.settings import UserError, read_command

both_objectives = pytest.mark.parametrize("objective", ["next", "masked"])
NO_SCALER = torch.amp.GradScaler(enabled=False)


def read(*argv):
    return read_command(argv, Settings, GPTConfig)


def on_cpu(**more):
    return resolve(Settings(**{"device": "cpu", "dtype": "float32", **more}))


# Settings.


GPT3 = {"small": (12, 768, 12), "medium": (24, 1024, 16), "large": (24, 1536, 16)}  # table 2.1
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
    s = resolve(settings)
    total, *rates = ARMS[arm]
    n_layer, d, n_head = GPT3[arm.split("_")[-1]]
    shape = (config.n_layer, config.n_embd, config.n_head, config.block_size)
    assert shape == (n_layer, d, n_head, 1024)
    assert parameter_report(config)["total"] == total
    if "identity" not in arm and "wide" not in arm:
        # Embeddings; then query, key and value, output, an MLP of 4 d, and the gains of norms.
        gains = 4 if "nlq" in arm else 2
        blocks = n_layer * (d * d + 2 * d * d + d * d + 8 * d * d + gains * d)
        assert total == (50304 + 1024) * d + blocks + d
    assert [s.learning_rate, pytest.approx(s.min_lr), s.weight_decay] == rates
    assert s.batch_size * s.gradient_accumulation_steps * config.block_size == 491_520
    assert (s.max_iters, s.warmup_iters, s.lr_decay_iters) == (60_002, 2000, 60_002)
    assert (s.beta1, s.beta2, s.grad_clip, s.lr_schedule) == (0.9, 0.95, 1.0, "cosine")
    assert (s.dataset, config.dropout) == ("openwebtext", 0.0)


def test_values_have_the_types_of_their_settings():
    Path("c.py").write_text("import math\n_half = 0.5\nlearning_rate = 1\ncompile = False\n")
    flags = "--batch_size=3 --eval_tokens 1000 --wandb_log --resume=false --min_lr=auto"
    s, config = read("c.py", *flags.split(), "--dropout=0", "--query_activation=none")
    assert (s.learning_rate, s.compile, s.batch_size, s.eval_tokens) == (1.0, False, 3, 1000)
    assert (s.wandb_log, s.resume, s.min_lr) == (True, False, None)
    assert (s.out_dir, config.vocab_size) == (os.path.join("out", "c"), None)
    assert (config.dropout, config.query_activation) == (0.0, "none")
    assert type(s.learning_rate) is type(config.dropout) is float and type(s.batch_size) is int


def test_help_has_every_setting_with_its_comment_and_default(capsys):
    with pytest.raises(SystemExit) as end:
        train.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0
    for cls in (Settings, GPTConfig):
        for field in dataclasses.fields(cls):
            default = "auto" if field.default is None else field.default
            if field.name not in ("causal", "vocab_size"):
                assert re.search(rf"--{field.name} \S+ \w.*? \({re.escape(str(default))}\)", text)


def test_the_learning_rate_follows_its_schedule():
    s = Settings(learning_rate=1.0, min_lr=0.1, warmup_iters=9, lr_decay_iters=109)
    expected = {0: 0.1, 4: 0.5, 8: 0.9, 9: 1.0, 59: 0.55, 109: 0.1, 500: 0.1}
    expected[34] = 0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2
    assert {step: pytest.approx(get_lr(s, step)) for step in expected} == expected
    s = Settings(
        learning_rate=1.0, min_lr=0.0, lr_schedule="linear", warmup_iters=0, lr_decay_iters=10
    )
    assert [get_lr(s, step) for step in range(11)] == pytest.approx(
        [1 - step / 10 for step in range(11)]
    )
    for warmup in (10, 12):  # longer than the run: nothing divides by zero
        s = Settings(learning_rate=1.0, min_lr=0.1, warmup_iters=warmup, lr_decay_iters=10)
        assert all(0 < get_lr(s, step) <= 1 for step in range(15))


def test_auto_settings_get_values():
    s = resolve(Settings(device="cpu", max_iters=70, learning_rate=0.5))
    assert (s.lr_decay_iters, s.min_lr, s.compile) == (70, 0.05, False)
    assert resolve(Settings(device="cpu", lr_schedule="linear")).min_lr == 0
    assert resolve(Settings(device="cpu", compile=True, dtype="bfloat16")).dtype == "bfloat16"


# Data and evaluation.


def test_batches_depend_on_seed_and_step_alone(tiny_data):
    data = Dataset("tiny", 16)
    tokens = np.fromfile("data/tiny/train.bin", np.uint8)
    offsets = get_offsets(data, 5, 3, 1000)
    assert np.array_equal(offsets, get_offsets(Dataset("tiny", 16), 5, 3, 1000))
    assert np.array_equal(offsets[:10], get_offsets(data, 5, 3, 10))  # more sequences come after
    for seed, step in ((5, 4), (6, 3)):
        assert np.mean(offsets == get_offsets(data, seed, step, 1000)) < 0.02
    last = len(tokens) - 17
    assert offsets.min() < 0.02 * last and 0.98 * last < offsets.max() <= last
    x, y = get_batch(data, "train", np.array([0, last]), on_cpu(), mask_key=())
    for row, offset in enumerate((0, last)):
        assert x[row].tolist() == tokens[offset : offset + 16].tolist()
        assert y[row].tolist() == tokens[offset + 1 : offset + 17].tolist()


def test_the_batch_of_a_step_is_pinned():
    """Philox with a sha256 key is defined outside numpy, so an old run can be repeated."""
    key = int.from_bytes(hashlib.sha256(b"(1337, 'batch', 0)").digest()[:8], "little") >> 1
    M0, M1 = 0xD2E7470EE14C6C93, 0xCA5A826395121157
    W0, W1 = 0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B
    mask = 2**64 - 1
    # The first block of Philox4x64-10 (Salmon et al. 2011); numpy's counter begins at 1.
    c, k = [1, 0, 0, 0], [key, 0]
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
    data = Dataset("tiny", 16)
    model = GPT(GPTConfig(16, 20, 2, 2, 16)).double()
    tokens = torch.from_numpy(np.fromfile("data/tiny/val.bin", np.uint8).astype(np.int64))
    n = eval_tokens or len(tokens) - 1
    data.meta["val"]["text_bytes"] = 3 * len(tokens)  # as if each character had three bytes
    nats = 0.0
    for first in range(0, n, 16):  # one window at a time, the last one shorter
        stop = min(first + 16, n)
        log_p = model(tokens[None, first:stop]).log_softmax(-1)
        nats -= log_p[0, torch.arange(stop - first), tokens[first + 1 : stop + 1]].sum().item()
    for batch_size in (1, 3, 50):
        s = on_cpu(batch_size=batch_size, eval_tokens=eval_tokens)
        result = train.evaluate(model, data, s)
        assert result["val_loss"] == pytest.approx(nats / n, rel=1e-6)
        assert result["perplexity"] == pytest.approx(math.exp(nats / n), rel=1e-6)
        assert result["bits_per_byte"] == pytest.approx(nats / n / math.log(2) / 3, rel=1e-6)


@both_objectives
def test_a_step_is_adamw_on_clipped_accumulated_gradients_at_its_rate(objective, tiny_data):
    recipe = {"batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 0.02}
    recipe |= {"min_lr": 0.0, "warmup_iters": 2, "lr_decay_iters": 4, "weight_decay": 0.3}
    s = on_cpu(**recipe, beta1=0.8, beta2=0.9, grad_clip=0.1, objective=objective)
    data = Dataset("tiny", 16)
    config = GPTConfig(16, 20, 2, 2, 16, bias=True)  # gains and biases do not decay
    config.causal = objective == "next"
    ours, ref = GPT(config).double(), GPT(config).double()
    optimizer = train.make_optimizer(ours, s)
    moments = {p: (torch.zeros_like(p), torch.zeros_like(p)) for p in ref.parameters()}
    for t, rate in enumerate((0.02 / 3, 0.04 / 3, 0.02, 0.01)):
        our_loss, our_norm = train.train_step(ours, optimizer, NO_SCALER, data, s, t)
        parts = list(get_micro_batches(data, s, t))
        x, y = (torch.cat(tensors) for tensors in zip(*parts))
        assert len(parts) == 2 and (objective == "next" or (y >= 0).sum() == 4 * 2)
        loss = ref(x, y)
        grads = torch.autograd.grad(loss, list(ref.parameters()))
        norm = math.sqrt(sum(g.pow(2).sum().item() for g in grads))
        assert norm > s.grad_clip  # or the test would not see the clipping
        assert our_loss.item() == pytest.approx(loss.item())
        assert our_norm.item() == pytest.approx(norm)
        with torch.no_grad():
            for p, g in zip(ref.parameters(), grads):
                m, v = moments[p]
                g = g * s.grad_clip / norm
                m.mul_(s.beta1).add_(g * (1 - s.beta1))
                v.mul_(s.beta2).add_(g * g * (1 - s.beta2))
                mean = m / (1 - s.beta1 ** (t + 1))
                step = mean / ((v / (1 - s.beta2 ** (t + 1))).sqrt() + 1e-8)
                p.sub_(rate * (step + (s.weight_decay * p if p.dim() >= 2 else 0)))
    for p, q in zip(ours.parameters(), ref.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def test_a_scaled_step_is_the_unscaled_one(tiny_data):
    """In float16, what is clipped and what AdamW sees are the true gradients."""
    recipe = {"batch_size": 2, "gradient_accumulation_steps": 2, "grad_clip": 0.1}
    s = on_cpu(**recipe, warmup_iters=0, lr_decay_iters=9, min_lr=0.0)
    data, ends, norms = Dataset("tiny", 16), [], []
    for enabled in (False, True):
        model = GPT(GPTConfig(16, 20, 2, 2, 16)).double()
        optimizer = train.make_optimizer(model, s)
        scaler = torch.amp.GradScaler("cpu", enabled=enabled)
        steps = [train.train_step(model, optimizer, scaler, data, s, t) for t in range(3)]
        norms.append([norm.item() for _, norm in steps])
        ends.append(torch.cat([p.flatten() for p in model.parameters()]))
    assert norms[1] == pytest.approx(norms[0])
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-5, atol=1e-7)


def steps_of(model, data, settings):
    """A function that takes n steps of training."""
    optimizer = train.make_optimizer(model, settings)

    def take_steps(n):
        for step in range(n):
            train.train_step(model, optimizer, NO_SCALER, data, settings, step)

    return take_steps


def test_steps_and_evaluations_use_the_number_format_asked_for(tiny_data):
    recipe = {"batch_size": 2, "gradient_accumulation_steps": 1, "eval_tokens": 100}
    s = on_cpu(dtype="bfloat16", **recipe)
    model, data, seen = GPT(GPTConfig(16, 20, 2, 2, 16)), Dataset("tiny", 16), set()
    model.lm_head.register_forward_hook(lambda m, x, y: seen.add((y.dtype, y.requires_grad)))
    steps_of(model, data, s)(1)
    assert seen == {(torch.bfloat16, True)}
    seen.clear()
    train.evaluate(model, data, s)
    assert seen == {(torch.bfloat16, False)}


def test_dropout_differs_between_seeds_steps_and_ranks(tiny_data, monkeypatch):
    settings = on_cpu(batch_size=2, gradient_accumulation_steps=1)
    data, losses = Dataset("tiny", 16), {}
    for rank, step, seed in ((0, 0, 1), (0, 0, 1), (0, 1, 1), (1, 0, 1), (0, 0, 2)):
        s = dataclasses.replace(settings, seed=seed)
        model = GPT(GPTConfig(16, 20, 2, 2, 16, dropout=0.5))
        monkeypatch.setattr(train, "rank", lambda rank=rank: rank)
        # Each rank and step is given the same two sequences, so that only dropout can differ.
        offsets = np.array([3, 7] * (rank + 1))
        monkeypatch.setattr(train, "get_offsets", lambda *_, offsets=offsets: offsets)
        optimizer = train.make_optimizer(model, s)
        loss, _ = train.train_step(model, optimizer, NO_SCALER, data, s, step)
        losses.setdefault((rank, step, seed), []).append(loss.item())
    assert losses[0, 0, 1][0] == losses[0, 0, 1][1]
    assert len({loss for values in losses.values() for loss in values}) == 4


@both_objectives
def test_a_step_is_one_graph_that_is_not_compiled_again(objective, tiny_data):
    """Training is one graph and evaluation another, whatever comes after them."""
    s = on_cpu(batch_size=2, gradient_accumulation_steps=2, objective=objective)
    model, data, counter = GPT(GPTConfig(16, 20, 2, 2, 16)), Dataset("tiny", 16), CompileCounter()
    names = list(model.state_dict())
    torch._dynamo.reset()
    model.compile(backend=counter, fullgraph=True)
    take_steps = steps_of(model, data, s)
    take_steps(2)
    assert counter.frame_count == 1
    train.evaluate(model, data, s)
    assert counter.frame_count == 2
    take_steps(2)
    train.evaluate(model, data, dataclasses.replace(s, eval_tokens=17))  # a batch that is not full
    assert counter.frame_count == 2 and list(model.state_dict()) == names


# Runs.


def test_a_run_leaves_a_complete_record(tiny_config):
    folder = Path("out/tiny")
    assert run("train.py", tiny_config).returncode == 0
    names = {"config.json", "metrics.jsonl", "ckpt.pt", "best.pt", ".lock"}
    assert {p.name for p in folder.iterdir()} == names
    config = json.loads((folder / "config.json").read_text())
    assert config["settings"]["lr_decay_iters"] == 12 and config["model"]["query_rank"] == 8
    model = GPT(GPTConfig(**config["model"]))
    assert config["parameters"]["total"] == sum(p.numel() for p in model.parameters())
    assert len(config["data"]["sha256"]["train"]) == 64
    assert config["versions"]["torch"] == torch.__version__
    assert config["command"].endswith("train.py tiny.py")
    assert list(metrics(folder, "val_loss")) == [0, 4, 8, 12]
    assert list(metrics(folder, "train_loss")) == [1, 2, 4, 6, 8, 10, 12]
    speeds = metrics(folder, "tokens_per_second")
    assert speeds.pop(1) is None and all(speed > 0 for speed in speeds.values())
    decay = {
        n: 1e-3 + 9e-3 * (1 + math.cos(math.pi * (n - 3) / 10)) / 2 for n in (4, 6, 8, 10, 12)
    }
    rates = {1: 1e-2 / 3, 2: 2e-2 / 3, **decay}
    assert metrics(folder, "learning_rate") == pytest.approx(rates)
    losses = metrics(folder, "val_loss")
    assert losses[0] == pytest.approx(math.log(config["model"]["vocab_size"]), rel=0.02)
    best, last = checkpoint(folder, "best.pt"), checkpoint(folder)
    assert losses[best["state"]["step"]] == min(losses.values()) and "optimizer" not in best
    assert last["state"]["best_val_loss"] == min(losses.values())
    assert last["state"]["val"]["val_loss"] == losses[12]


def test_the_best_model_is_kept_though_later_ones_are_worse(tiny_config, monkeypatch):
    losses = iter([3.0, 2.0, 2.5, 2.2])
    monkeypatch.setattr(train, "evaluate", lambda *_: {"val_loss": next(losses)})
    train.main([tiny_config, "--max_iters=8", "--lr_decay_iters=12"])
    train.main([tiny_config, "--resume"])  # the best loss is remembered
    assert checkpoint("out/tiny", "best.pt")["state"]["step"] == 4
    state = checkpoint("out/tiny")["state"]
    assert (state["step"], state["best_val_loss"], state["val"]["val_loss"]) == (12, 2.0, 2.2)


def test_a_model_is_compiled_where_asked(tiny_config, monkeypatch):
    monkeypatch.setattr(GPT, "compile", compile := mock.Mock())
    for calls, flag in enumerate(("--compile=false", "--compile")):
        # With a single step the rate is constant, which is allowed.
        train.main([tiny_config, flag, f"--out_dir=out/{calls}", "--max_iters=1", "--min_lr=1e-2"])
        assert compile.call_count == calls


@both_objectives
def test_n_steps_and_n_more_equal_twice_n_bit_for_bit(objective, tiny_config):
    train.main([tiny_config, f"--objective={objective}"])
    common = [tiny_config, f"--objective={objective}", "--out_dir=out/b", "--lr_decay_iters=12"]
    train.main([*common, "--max_iters=6"])
    train.main([*common, "--max_iters=12", "--resume"])
    # The first session ended with an evaluation of its own, at step 6; nothing else may differ.
    path = Path("out/b/metrics.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    kept = [line for line in lines if line["step"] != 6 or "val_loss" not in line]
    assert len(kept) == len(lines) - 1
    path.write_text("".join(json.dumps(line) + "\n" for line in kept))
    assert_same_run("out/b", "out/tiny")


@pytest.mark.slow
@both_objectives
def test_a_signal_saves_and_the_resumed_run_equals_an_undisturbed_one(objective, tiny_config):
    flags = [tiny_config, "--eval_interval=2000", "--eval_tokens=16", "--log_interval=20"]
    flags += [f"--objective={objective}", "--lr_decay_iters=4000"]
    whole = run("train.py", *flags, "--out_dir=out/whole", "--max_iters=150")
    assert whole.returncode == 0
    for signum in (signal.SIGTERM, signal.SIGINT):
        out = f"out/{signum}"
        process = start("train.py", *flags, f"--out_dir={out}", "--max_iters=4000")
        assert any(line.startswith("step 20/") for line in process.stdout)
        process.send_signal(signum)
        rest = process.communicate()[0]
        assert process.returncode == 128 + signum
        step = checkpoint(out)["state"]["step"]
        assert f"stopped after step {step} and saved" in rest and 20 <= step < 150
        done = run("train.py", *flags, f"--out_dir={out}", "--resume", "--max_iters=150")
        assert done.returncode == 0, done.stderr
        assert_same(checkpoint(out)["model"], checkpoint("out/whole")["model"])
        assert metrics(out, "train_loss") == metrics("out/whole", "train_loss")


def test_killed_before_its_first_checkpoint_a_run_begins_again(tiny_config, whole_run):
    for name in ("ckpt.pt", "best.pt"):
        Path(whole_run, name).rename(f"{name}.before")
    with open(f"{whole_run}/metrics.jsonl", "a") as f:
        f.write('{"step": 13, "tra')  # the line that was being written
    train.main([tiny_config, "--resume"])
    before = torch.load("ckpt.pt.before", weights_only=True)
    assert_same(checkpoint(whole_run)["model"], before["model"])
    assert list(metrics(whole_run, "val_loss")) == [0, 4, 8, 12]


def test_eval_only_gives_the_loss_of_the_checkpoint_and_writes_nothing(whole_run, capsys):
    before = {p.name: p.read_bytes() for p in Path(whole_run).iterdir()}
    capsys.readouterr()
    assert train.main(["tiny.py", "--resume", "--eval_only"]) == 0
    loss = metrics(whole_run, "val_loss")[12]
    assert f"val_loss {loss:.4f} " in capsys.readouterr().out
    assert {p.name: p.read_bytes() for p in Path(whole_run).iterdir()} == before


@pytest.mark.parametrize("flag", ["--log_interval=1", "--log_interval=100"])
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(
    tiny_config, monkeypatch, flag
):
    good, step = [], train.train_step

    def fails_at_6(model, optimizer, *arguments):
        if arguments[-1] == 6:
            good.append(Path("out/tiny/ckpt.pt").read_bytes())
            with torch.no_grad():
                next(model.parameters()).fill_(math.nan)
        return step(model, optimizer, *arguments)

    monkeypatch.setattr(train, "train_step", fails_at_6)
    with pytest.raises(UserError, match="not finite") as e:
        train.main([tiny_config, flag])
    assert e.value.status == 1
    assert [Path("out/tiny/ckpt.pt").read_bytes()] == good
    assert checkpoint("out/tiny")["state"]["step"] == 4
    assert json.loads(Path("out/tiny/metrics.jsonl").read_text().splitlines()[-1])["diverged"]


@pytest.mark.parametrize(
    "flag", ["--compile=false", pytest.param("--compile", marks=pytest.mark.slow)]
)
@both_objectives
def test_two_processes_give_the_losses_of_one(objective, flag, tiny_config):
    flags = [tiny_config, "--dropout=0", "--gradient_accumulation_steps=4"]
    flags.append(f"--objective={objective}")
    train.main(flags)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = run(*launch, ROOT / "train.py", *flags, flag, "--out_dir=out/two")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step 12/12 val_loss") == 1
    assert_close_runs("out/two", "out/tiny")
    assert json.loads(Path("out/two/config.json").read_text())["processes"] == 2


def test_a_run_may_change_its_number_format(tiny_config, whole_run):
    more = ["--resume", "--dtype=bfloat16", "--max_iters=14", "--lr_decay_iters=12"]
    train.main([tiny_config, *more])
    record = json.loads(Path(whole_run, "config.json").read_text())
    assert record["settings"]["dtype"] == "float32"
    (session,) = record["resumed"]
    assert session["at_step"] == 12 and session["settings"]["dtype"] == "bfloat16"


def test_float16s_loss_scale_continues_as_if_the_run_had_not_stopped(tiny_config, monkeypatch):
    scaler = torch.amp.GradScaler  # the CPU has none for float16, but scales float32's gradients
    grow = lambda device, enabled: scaler("cpu", growth_interval=3)  # noqa: E731
    monkeypatch.setattr(torch.amp, "GradScaler", grow)
    train.main([tiny_config, "--out_dir=a"])
    train.main([tiny_config, "--out_dir=b", "--max_iters=5", "--lr_decay_iters=12"])
    train.main([tiny_config, "--out_dir=b", "--resume"])
    whole, parts = checkpoint("a")["scaler"], checkpoint("b")["scaler"]
    assert whole == parts
    assert whole["scale"] == 2**16 * 2**4 and whole["_growth_tracker"] == 0  # 12 steps


def test_what_is_printed_fits_a_terminal_and_wandb_gets_what_is_logged(
    tiny_config, monkeypatch, capsys
):
    logged, begun, finish = [], [], mock.Mock()
    log = lambda values, step: logged.append({"step": step, **values})  # noqa: E731
    wandb_run = types.SimpleNamespace(log=log, finish=finish)
    init = lambda **options: begun.append(options) or wandb_run  # noqa: E731
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    capsys.readouterr()
    train.main([tiny_config, "--wandb_log", "--wandb_project=p"])
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80
    lines = Path("out/tiny/metrics.jsonl").read_text().splitlines()
    assert logged == [json.loads(line) for line in lines]
    finish.assert_called_once_with()
    (options,) = begun
    assert (options["project"], options["name"]) == ("p", "tiny")
    assert options["config"]["settings"]["wandb_log"]


# Devices, processes, programs.


def test_a_process_uses_its_own_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "empty", lambda size, device: None)
    for visible, local_rank, device in ((8, 3, "cuda:3"), (1, 3, "cuda:0"), (1, 0, "cuda:0")):
        monkeypatch.setattr(torch.cuda, "device_count", lambda visible=visible: visible)
        assert device_module.pick_device(None, local_rank) == device


FORMATS = [(True, True, "bfloat16"), (False, True, "bfloat16"), (False, False, "float32")]


@pytest.mark.parametrize("amx, avx, dtype", FORMATS)
def test_the_number_format_follows_what_the_processor_has(amx, avx, dtype, monkeypatch):
    has = {"amx_bf16": amx, "avx512_bf16": avx}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has, raising=False)
    assert device_module.best_dtype("cpu") == dtype
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # torch before 2.10
    assert device_module.best_dtype("cpu") == "float32"


@pytest.mark.parametrize("mode", ["linear", "identity", "nonlinear"])
def test_the_operations_of_a_step_are_those_that_torch_counts(mode):
    shape = {"n_layer": 3, "n_head": 4, "n_embd": 32, "mlp_hidden": 40}
    model, idx = GPT(GPTConfig(16, 50, query_mode=mode, **shape)), torch.randint(50, (2, 16))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(idx, idx).backward()
    assert counter.get_total_flops() == 2 * 16 * flops_per_token(model)


def test_accumulation_must_be_shared_evenly(tiny_config, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match="gradient_accumulation_steps=2 .* 3 processes"):
        train.main([tiny_config])


def test_a_second_ctrl_c_acts_at_once_but_not_torchruns_sigterm():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # pytest may ignore it
    try:
        with device_module.stop_signals() as received:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)
            assert received == [signal.SIGINT, signal.SIGTERM]
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_number_too_small_to_be_normal_counts_as_zero():
    def product():
        return (torch.tensor(1e-30) * 1e-9).item()  # float32 is normal down to 1.2e-38

    torch.set_flush_denormal(False)
    assert product() == pytest.approx(1e-39, rel=1e-4)
    with device_module.processes(on_cpu()):
        assert product() == 0
    torch.set_flush_denormal(False)


@pytest.mark.skipif(not shutil.which("git"), reason="git is not installed")
def test_a_changed_file_makes_the_commit_dirty_but_records_of_studies_do_not(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_module, "__file__", str(tmp_path / "utils/checkpoint.py"))
    script = "git init -q; mkdir -p utils study/results; touch utils/a study/results/a; git add .; "
    subprocess.run(f"{script} git -c user.name=a -c user.email=b commit -qm c", shell=True)
    commit = checkpoint_module.git_commit()
    Path("study/results/a").write_text("more")
    assert len(commit) == 40 and checkpoint_module.git_commit() == commit
    Path("utils/a").write_text("more")
    assert checkpoint_module.git_commit() == f"{commit}-dirty"
