"""What the tests share: folders of their own, a tiny data set, programs as a user runs them."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import prepare_data
import sample
import train
from model import GPT, QUERIES

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"  # real data for tests, where it exists

TEXT = "".join(f"{n} plus {m} is {n + m}.\n" for n in range(40) for m in range(n % 7 + 3))


@pytest.fixture(autouse=True)
def one_folder_for_each_test(tmp_path, monkeypatch):
    """data/ and out/ are below the current folder, which is the test's own."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def only_the_queries_of_the_model():
    """A test that adds queries adds them for itself."""
    before = dict(QUERIES)
    yield
    QUERIES.clear()
    QUERIES.update(before)


@pytest.fixture
def tiny_data():
    prepare_tiny()


@pytest.fixture
def tiny_config(tiny_data):
    """tiny.py: a config that trains on data/tiny in a second."""
    Path("tiny.py").write_text(
        "dataset, device, dtype = 'tiny', 'cpu', 'float32'\n"
        "n_layer, n_head, n_embd, block_size = 2, 2, 16, 16\n"
        "batch_size, gradient_accumulation_steps = 2, 2\n"
        "max_iters, eval_interval, log_interval = 12, 4, 2\n"
        "learning_rate, warmup_iters, dropout, eval_tokens = 1e-2, 2, 0.1, 500\n",
        encoding="utf-8",
    )
    return "tiny.py"


def train_on(name, text, recipe):
    """Train on a text, as bytes, with the lines of a config file -> the run's folder."""
    Path(f"{name}.txt").write_text(text, encoding="utf-8")
    prepare_data.main(["text", f"--name={name}", "--input", f"{name}.txt", "--tokenizer=byte"])
    Path(f"{name}.py").write_text(f"dataset, device, dtype = {name!r}, 'cpu', 'float32'\n{recipe}")
    train.main([f"{name}.py"])
    return f"out/{name}"


@pytest.fixture
def whole_run(tiny_config):
    """out/tiny: what training with tiny.py leaves."""
    assert train.main([tiny_config]) == 0
    return "out/tiny"


@pytest.fixture
def gpt2_vocabulary(monkeypatch):
    """GPT-2's vocabulary without the network."""
    if not (SHARED / "tiktoken_cache").is_dir():
        pytest.skip("needs a filled tiktoken cache beside the project")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken_cache"))


def start(program, *arguments, environment=None, **options):
    """Start a program, of the project or in the current folder -> Popen with its text output."""
    path = ROOT / program if (ROOT / program).exists() else program
    own = {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1"}
    options["env"] = os.environ | own | (environment or {})
    options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}
    return subprocess.Popen([sys.executable, path, *map(str, arguments)], **options)


def run(program, *arguments, **options):
    """Run a program to its end -> CompletedProcess."""
    with start(program, *arguments, **options) as process:
        try:
            output = process.communicate(timeout=170)
        finally:
            process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, *output)


def prepare_tiny(text=TEXT):
    """data/tiny: some thousand characters."""
    Path("tiny.txt").write_text(text, encoding="utf-8")
    prepare_data.main(["text", "--name=tiny", "--input", "tiny.txt", "--tokenizer=char"])


def printed(capsys, *arguments):
    """What sample.py prints."""
    capsys.readouterr()
    assert sample.main(list(arguments)) == 0
    return capsys.readouterr().out


def parameter_report(config):
    """Of a model without values, with as many tokens as there are bytes unless it says."""
    with torch.device("meta"):
        return GPT(replace(config, vocab_size=config.vocab_size or 257)).parameter_report()


def files(folder="."):
    """{path: content} of what is in a folder; a folder has none."""
    return {path: path.is_file() and path.read_bytes() for path in Path(folder).rglob("*")}


def metrics(folder, key):
    """{step: value} from metrics.jsonl."""
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    values = [(line["step"], line[key]) for line in lines if key in line]
    assert len(dict(values)) == len(values), "a step was logged twice"
    return dict(values)


def checkpoint(folder, name="ckpt.pt"):
    return torch.load(Path(folder) / name, weights_only=True)


def assert_same(a, b, at=""):
    """Bit for bit, all the way down."""
    assert type(a) is type(b), at
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), at
    elif isinstance(a, (dict, list)):
        a, b = (x if isinstance(x, dict) else dict(enumerate(x)) for x in (a, b))
        assert a.keys() == b.keys(), at
        for key in a:
            assert_same(a[key], b[key], f"{at}.{key}")
    else:
        assert a == b, at


def assert_same_run(a, b):
    for name in ("ckpt.pt", "best.pt"):
        x, y = checkpoint(a, name), checkpoint(b, name)
        for state in (x["state"], y["state"]):
            state.pop("seconds")
        assert_same(x, y, name)
    for key in ("train_loss", "learning_rate", "grad_norm", "val_loss", "bits_per_byte"):
        assert metrics(a, key) == metrics(b, key)
