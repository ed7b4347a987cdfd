"""Mistakes that users make, in all programs: one line that names the mistake, an exit status, no
traceback, and everything on the disk as it was.
"""

import importlib
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import files, prepare_tiny

import prepare_data
import train
from utils.checkpoint import RunFolder
from utils.settings import run_program

USAGE, FAILURE = 2, 1
MODULES = {
    "ablate": "study.ablate",
    "bench": "tools.bench",
    "import_checkpoint": "tools.import_checkpoint",
}
no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
TINY = """
dataset, device, learning_rate = "tiny", "cpu", 1e-2
n_layer, n_head, n_embd, block_size = 1, 2, 8, 16
batch_size, gradient_accumulation_steps = 2, 1
max_iters, warmup_iters, eval_tokens = 2, 1, 50
"""
CONFIGS = {
    "typo.py": "lerning_rate = 1e-2",
    "text.py": "n_layer = 'two'",
    "true.py": "max_iters = True",
}
# Texts that are neither a meta.json nor a config.json.
META = {"brace": "{", "dict": "{}", "list": "[]", "foreign": '{"settings": [], "x": ["GPT2"]}'}


DAMAGED = [*META, "bare", "no_val", "empty", "short", "short_val"]  # data sets


class Malicious:
    def __reduce__(self):
        return (open, ("executed", "w"))


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """A folder with a data set, a finished run, and things that are broken in one way each."""
    folder = tmp_path_factory.mktemp("scene")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        prepare_tiny()
        for name, text in (CONFIGS | {"tiny.py": TINY}).items():
            Path(name).write_text(text)
        train.main(["tiny.py", "--out_dir=out/good"])
        train.main(["tiny.py", "--out_dir=out/encoder", "--objective=masked"])
        for name in ("cut", "executes"):
            shutil.copytree("out/good", f"out/{name}")
        fork = RunFolder(shutil.copytree("out/good", "out/fork"))
        checkpoint = fork.load("best.pt")
        checkpoint["config"]["query_mode"] = "gated"
        fork.save("best.pt", checkpoint)
        for file in ("ckpt.pt", "best.pt"):
            data = Path("out/good", file).read_bytes()
            Path("out/cut", file).write_bytes(data[: len(data) // 2])
            Path("out/executes", file).write_bytes(pickle.dumps(Malicious()))
        meta = Path("data/tiny/meta.json").read_text()
        for name, text in (META | {"uint64": meta.replace('"uint8"', '"uint64"')}).items():
            shutil.copytree("out/good", f"out/{name}")
            Path(f"out/{name}/config.json").write_text(text)
            shutil.copytree("data/tiny", f"data/{name}")
            Path(f"data/{name}/meta.json").write_text(text)
        for name in ("short", "short_val", "bare", "no_val", "empty"):
            shutil.copytree("data/tiny", f"data/{name}")
        Path("data/short/train.bin").write_bytes(Path("data/tiny/train.bin").read_bytes()[:-9])
        Path("data/short_val/val.bin").write_bytes(bytes(50))
        Path("data/bare/meta.json").unlink()
        Path("data/no_val/val.bin").unlink()
        Path("data/empty/val.bin").write_bytes(b"")
        prepare_data.main(["text", "--name=other", "--input", "tiny.txt", "--tokenizer=byte"])
        Path("empty.txt").touch()
        Path("latin.txt").write_bytes(b"caf\xe9 " * 100)
        Path("one.txt").write_text("x")
        Path("folder").mkdir()
        torch.save({"weights": torch.ones(3)}, "foreign.pt")
        Path("executes.pt").write_bytes(pickle.dumps(Malicious()))
        Path("long.txt").write_text("1 plus 1 is 2.\n" * 5)
    return folder


def each(program, command, names, status, words):
    """The same mistake with several names."""
    return [(program, command.format(name), status, words.format(name)) for name in names]


RESUMED = {  # changes to a run that is resumed
    "--n_embd=16": "n_embd was 8, now is 16",
    "--query_mode=linear": "query_mode was nonlinear, now is linear",
    "--learning_rate=0.5": "learning_rate was 0.01, now is 0.5",
    "--batch_size=4": "sequences in a step was 2, now is 4",
    "--max_iters=20": "lr_decay_iters was 2, now is 20",
    "--dataset=other": "data set was",
    "--objective=masked": "objective was next, now is masked",
}
NOT_UNDERSTOOD = ["wikipedia", "stdlib --input tiny.txt", "text --name=../x --input tiny.txt"]
NOT_UNDERSTOOD += [f"openwebtext {flag}" for flag in ("--shards=3-1", "--shards=21", "--mirror=x")]
NOT_SAMPLED = {  # options of sample.py
    "--temperature=-1": "--temperature: '-1' is not 0 or above",
    "--top_p=0": "--top_p: '0' is not in (0, 1]",
    "--num_samples=0": "--num_samples: '0' is not 1 or above",
    "--promt=x": "--promt=x",
}
NOT_PROMPTED = {
    "--prompt=Ω": "U+03A9",
    "--prompt=": "the prompt is empty",
    "--prompt=FILE:nowhere": "nowhere",
    "--prompt=FILE:long.txt": "but the model sees 16",
    "--prompt=FILE:latin.txt": "not UTF-8",
    "--device=tpu": "device=tpu is not there",
}
NOT_A_SETTING = {
    "--lerning_rate=1": "unrecognized arguments: --lerning_rate=1",
    "--causal=false": "unrecognized arguments: --causal=false",
    "--n_layer=1.5": "--n_layer: invalid int value: '1.5'",
    "--learning_rate=fast": "--learning_rate: invalid float value: 'fast'",
    "--resume=maybe": "--resume: invalid bool value: 'maybe'",
    "--seed": "--seed: expected one argument",
    "--learning_rate=nan": "learning_rate=nan is not in [0, inf)",
    "--batch_size=0": "batch_size=0 is not in [1, inf)",
    "--n_layer=0": "n_layer=0 is not in [1, inf)",
    "--beta2=1": "beta2=1.0 is not in [0, 1)",
    "--objective=mask": "objective=mask must be next or masked",
    "--dtype=int8": "dtype=int8 must be float32 or bfloat16 or float16",
    "--query_activation=relu": "query_activation=relu must be gelu or none",
    "--n_head=3": "n_embd=8 is not divisible by n_head=3",
    "--min_lr=1": "min_lr=1 is above learning_rate=0.01",
    "--dtype=float16": "dtype=float16 needs a CUDA device",
    "--vocab_size=5": "vocab_size=5 is smaller than the 18 that tiny needs",
    "--objective=masked --vocab_size=18": "smaller than the 19 that tiny needs",
}
NOT_PREPARED = {
    "--name=x --input nowhere": "there is no --input nowhere",
    "--name=x --input empty.txt": "empty.txt is empty",
    "--name=x --input folder": "folder is empty",
    "--name=x --input latin.txt --tokenizer=char": "not UTF-8",
    "--name=tiny --input tiny.txt --tokenizer=char": "exists already",
    "--name=x --input one.txt --tokenizer=byte": "too short",
    "--name=x --input one.txt ./one.txt --tokenizer=byte": "twice",
}
NOT_IMPORTED = {
    "": "required: checkpoint, run",
    "foreign.pt out/x --dataset=tiny --n_layer=3": "--n_layer",
    "foreign.pt out/x --dataset=tiny --lr=3": "--lr=3",
    "foreign.pt out/x --dataset=tiny --batch_size=0": "batch_size=0",
}
NO_CHECKPOINTS = ["nowhere.pt", "tiny.txt", "executes.pt", "out/good/ckpt.pt"]  # none to import
NOT_STUDIED = {
    "": "config",
    "@nowhere.txt": "nowhere.txt",
    "nowhere.py": "there is no config file nowhere.py",
    "tiny.py --arm=linear,quadratic": "--arm=quadratic is not one of linear",
    "tiny.py --lerning_rate=1,2": "lerning_rate",
    "tiny.py --learning_rate=1e-2,fast": "--learning_rate: invalid values value: '1e-2,fast'",
    "tiny.py --learning_rate=1e-2,-1": "learning_rate=-1.0 is not in [0, inf)",
    "tiny.py --seed=3,4 extra": "extra",
    "tiny.py --tune= --learning_rate=1e-2,2e-2": "several rates need --tune=SEEDS",
    "tiny.py --arm=linear,identity --compare=identity": "--compare=identity is not two of the arms",
    "tiny.py --query_mode=linear,quadratic": "query_mode='quadratic' is not one of",
    "tiny.py --arm=linear --query_rank=4": "query_rank has no meaning",
    "tiny.py --seed=1,2 --tune=2,3": "share a seed",
    "tiny.py --arm=linear,linear_wide --mlp_hidden=9": "--mlp_hidden is what the arm linear_wide",
    "tiny.py --out_dir=x": "--out_dir is not for a grid",
}
MISTAKES = [
    ("train", "nowhere.py", USAGE, "there is no config file nowhere.py"),
    ("train", "tiny.py typo.py", USAGE, "unrecognized arguments: typo.py"),
    ("train", "typo.py", USAGE, "unrecognized arguments: --lerning_rate=0.01"),
    ("train", "text.py", USAGE, "--n_layer: invalid int value: 'two'"),
    ("train", "true.py", USAGE, "--max_iters: invalid int value: 'True'"),
    *[("train", f"tiny.py {flag}", USAGE, words) for flag, words in NOT_A_SETTING.items()],
    # data
    ("train", "tiny.py --dataset=nowhere", FAILURE, "python prepare_data.py --help"),
    *each("train", "tiny.py --dataset={}", DAMAGED, FAILURE, "data/{} is damaged"),
    ("train", "tiny.py --dataset=uint64", FAILURE, "data/uint64"),
    ("train", "tiny.py --block_size=100000", FAILURE, "too few for block_size=100000"),
    # runs and machines
    ("train", "tiny.py --out_dir=out/good", FAILURE, "out/good holds a run: --resume it"),
    ("train", "tiny.py --out_dir=empty.txt", FAILURE, "empty.txt"),
    ("train", "tiny.py --resume --out_dir=out/none", FAILURE, "out/none holds no run to resume"),
    *[
        ("train", f"tiny.py --resume --out_dir=out/good {flag}", FAILURE, words)
        for flag, words in RESUMED.items()
    ],
    *each("train", "tiny.py --resume --out_dir=out/{}", META, FAILURE, "{}/config.json is damaged"),
    *each(
        "train",
        "tiny.py --resume --out_dir=out/{}",
        ("cut", "executes"),
        FAILURE,
        "{}/ckpt.pt is damaged",
    ),
    pytest.param("train", "tiny.py --device=cuda", FAILURE, "device=cuda", marks=no_cuda),
    *each("train", "tiny.py --device={}", ("cuda:99", "tpu"), FAILURE, "device={} is not there"),
    # sample.py
    ("sample", "", USAGE, "run"),
    *each("sample", "{}", ("out/none", "data/tiny"), FAILURE, "{} holds no trained model"),
    ("sample", "empty.txt", FAILURE, "empty.txt"),
    *each("sample", "{}", ("out/cut", "out/executes"), FAILURE, "{}/best.pt is damaged"),
    ("sample", "out/fork", FAILURE, "query_mode='gated' is not one of linear, identity"),
    *[("sample", f"out/good {flag}", USAGE, words) for flag, words in NOT_SAMPLED.items()],
    *[("sample", f"out/good {flag}", FAILURE, words) for flag, words in NOT_PROMPTED.items()],
    *each("sample", "out/encoder{}", ("", " --prompt=1"), FAILURE, "--prompt with <mask>"),
    ("sample", "out/encoder --prompt=Ω<mask>", FAILURE, "U+03A9"),
    ("sample", f"out/encoder --prompt={'1<mask>' * 9}", FAILURE, "18 tokens, but the model sees"),
    # prepare_data.py
    *[("prepare_data", f"text {words}", FAILURE, error) for words, error in NOT_PREPARED.items()],
    ("prepare_data", "text --input tiny.txt", USAGE, "--name"),
    *each("prepare_data", "{}", NOT_UNDERSTOOD, USAGE, ""),
    ("prepare_data", "shakespeare_char --input nowhere", FAILURE, "nowhere"),
    ("prepare_data", "shakespeare_char --input tiny.txt", FAILURE, "not tiny Shakespeare"),
    # tools
    *[("import_checkpoint", words, USAGE, error) for words, error in NOT_IMPORTED.items()],
    *each("import_checkpoint", "{} out/x --dataset=tiny", NO_CHECKPOINTS, FAILURE, "{}"),
    *each("bench", "{}", ("", "inference", "train --batch_size=0"), USAGE, ""),
    ("bench", "train --device=tpu", FAILURE, "device=tpu is not there"),
    # study
    *[("ablate", words, USAGE, error) for words, error in NOT_STUDIED.items()],
    ("ablate", "tiny.py --seed=1 --tune=2 --min_lr=1e-3", FAILURE, "--min_lr=auto"),
    ("ablate", "tiny.py --devices=cpu,tpu", FAILURE, "device=tpu is not there"),
    ("ablate", "tiny.py --dataset=nowhere", FAILURE, "there is no data/nowhere"),
    ("ablate", "tiny.py --block_size=100000", FAILURE, "too few for block_size=100000"),
    ("ablate", "tiny.py --out=tiny.txt", FAILURE, "tiny.txt"),
]


@pytest.mark.parametrize("program, arguments, status, words", MISTAKES)
def test_a_mistake_is_one_line_and_changes_nothing(
    program, arguments, status, words, scene, monkeypatch, capsys
):
    if program == "ablate":
        pytest.importorskip("scipy", reason="a study needs scipy")
        pytest.importorskip("matplotlib", reason="a study needs matplotlib")
    shutil.copytree(scene, ".", dirs_exist_ok=True)
    before = files()
    monkeypatch.setattr(sys, "argv", [f"{program}.py", *arguments.split()])
    module = importlib.import_module(MODULES.get(program, program))
    capsys.readouterr()  # what torch prints when it is imported
    with pytest.raises(SystemExit) as end:
        run_program(module.main)
    lines = capsys.readouterr().err.splitlines()
    assert end.value.code == status
    assert len(lines) == 1 and lines[0].startswith(f"{program}.py: ") and words in lines[0], lines
    assert files() == before


def test_an_error_in_a_config_file_keeps_its_traceback():
    Path("c.py").write_text("n_layer = 1 / 0\n")
    with pytest.raises(ZeroDivisionError):
        train.main(["c.py"])
