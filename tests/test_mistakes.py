"""Mistakes that users make, over all programs: one line that names what is wrong, a status, no traceback, and
everything on the disk as it was.
"""

import importlib
import os
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import torch

import prepare_data
import train
from conftest import files, prepare_tiny
from utils.checkpoint import RunFolder
from utils.settings import run_program

USAGE, FAILURE, DRY = 2, 1, ("", " --dry-run")
UNREADABLE = "out/%s/ckpt.pt cannot be read as a checkpoint"
MODULES = {"ablate": "study.ablate", "bench": "tools.bench", "import_checkpoint": "tools.import_checkpoint"}
no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
no_root = pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
CONFIGS = {
    "typo.py": "lerning_rate = 1e-2",
    "syntax.py": "n_layer = = 2",
    "text.py": "n_layer = 'two'",
    "true.py": "max_iters = True",
    "three.py": "compile = 3",
    "seven.py": "dataset = 7",
    "ends.py": "raise SystemExit(3)",
    "raises.py": "raise ValueError('two\\nlines')",
    "imports.py": "from config.nowhere import *",
}
META = {"brace": "{", "dict": "{}", "list": "[]"}  # what is no meta.json and no config.json
META["foreign"] = '{"settings": [], "architectures": ["GPT2LMHeadModel"]}'


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
        tiny = "dataset = 'tiny'\ndevice = 'cpu'\nn_layer, n_head, n_embd, block_size = 1, 2, 8, 16\n"
        tiny += "batch_size, gradient_accumulation_steps, max_iters, warmup_iters, eval_tokens = 2, 1, 2, 1, 50\n"
        Path("tiny.py").write_text(tiny + "learning_rate = 1e-2\n")
        for name, text in CONFIGS.items():
            Path(name).write_text(text)
        train.main(["tiny.py", "--out_dir=out/good"])
        train.main(["tiny.py", "--out_dir=out/encoder", "--objective=masked"])
        for name in ("cut", "executes"):
            shutil.copytree("out/good", f"out/{name}")
        fork = RunFolder(shutil.copytree("out/good", "out/fork"))
        checkpoint = fork.load("best.pt")
        fork.save("best.pt", checkpoint | {"config": checkpoint["config"] | {"query_mode": "gated"}})
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
        Path("quote.txt").write_text("tiny.py --arm='linear")
        Path("folder").mkdir()
        torch.save({"weights": torch.ones(3)}, "foreign.pt")
        Path("executes.pt").write_bytes(pickle.dumps(Malicious()))
        Path("long.txt").write_text("1 plus 1 is 2.\n" * 5)
    return folder


CHANGES = {  # to a run that is to be resumed
    "--n_embd=16": "n_embd was 8, now is 16",
    "--n_layer=3": "n_layer was 1, now is 3",
    "--query_mode=linear": "query_mode was nonlinear, now is linear",
    "--seed=2": "seed was 1337, now is 2",
    "--learning_rate=0.5": "learning_rate was 0.01, now is 0.5",
    "--eval_tokens=40": "eval_tokens was 50, now is 40",
    "--batch_size=4": "sequences in a step was 2, now is 4",
    "--max_iters=20": "lr_decay_iters was 2, now is 20 (--lr_decay_iters=2 keeps it, and from that step on the rate is",
    "--dataset=other": "data set was",
    "--objective=masked": "objective was next, now is masked",
    "--mask_share=0.3": "mask_share was 0.15, now is 0.3",
}
NOT_UNDERSTOOD = ["wikipedia", "stdlib --keep", "stdlib --shards=1", "stdlib --mirror=1", "stdlib --source=1"]
NOT_UNDERSTOOD += ["shakespeare --tokenizer=char", "shakespeare --input tiny.txt empty.txt"]
NOT_UNDERSTOOD += [f"openwebtext {word}" for word in ("--shards=3-1", "--shards=all", "--shards=", "--mirror=")]
NOT_UNDERSTOOD += [f"openwebtext {word}" for word in ("--source=", "--mirror=http://x --source=y", "--input=x")]
MISTAKES = [
    # the command line and config files of train.py
    ("train", "nowhere.py", USAGE, "there is no config file nowhere.py"),
    ("train", "--compile false", USAGE, "there is no config file false; a setting is written --key=value"),
    ("train", "tiny.py typo.py", USAGE, "one config file at most"),
    ("train", "typo.py", USAGE, "typo.py: unknown setting 'lerning_rate'; the nearest is 'learning_rate'"),
    ("train", "syntax.py", USAGE, "syntax.py: SyntaxError"),
    ("train", "text.py", USAGE, "text.py: n_layer='two' is not an integer"),
    ("train", "tiny.py --n_embd=1e30", USAGE, "n_embd='1e30' is not an integer below"),
    ("train", "true.py", USAGE, "true.py: max_iters=True is not an integer"),
    ("train", "three.py", USAGE, "compile=3 is not true or false"),
    ("train", "seven.py", USAGE, "dataset=7 is not a text"),
    ("train", "ends.py", USAGE, "ends.py: SystemExit"),
    ("train", "raises.py", USAGE, "raises.py: ValueError: two lines"),
    ("train", "imports.py", USAGE, "imports.py: ModuleNotFoundError: No module named 'config.nowhere'"),
    ("train", "tiny.py --lerning_rate=1", USAGE, "the nearest is 'learning_rate'"),
    ("train", "tiny.py --n_heads=2", USAGE, "unknown setting 'n_heads'; the nearest is 'n_head'"),
    ("train", "tiny.py --causal=false", USAGE, "unknown setting 'causal'"),
    ("train", "tiny.py --n_layer=1.5", USAGE, "n_layer='1.5' is not an integer"),
    ("train", "tiny.py --max_iters=ten", USAGE, "max_iters='ten' is not an integer"),
    ("train", "tiny.py --learning_rate=fast", USAGE, "learning_rate='fast' is not a number"),
    ("train", "tiny.py --learning_rate=nan", USAGE, "learning_rate=nan must be above 0"),
    ("train", "tiny.py --resume=maybe", USAGE, "resume='maybe' is not true or false"),
    *[("train", f"tiny.py --seed{word}", USAGE, "--seed needs a value: --seed=VALUE") for word in ("", " 4")],
    ("train", "tiny.py --batch_size=0", USAGE, "batch_size=0 must be at least 1"),
    ("train", "tiny.py --gradient_accumulation_steps=-1", USAGE, "gradient_accumulation_steps=-1"),
    ("train", "tiny.py --grad_clip=nan", USAGE, "grad_clip=nan"),
    ("train", "tiny.py --beta2=1", USAGE, "beta2=1.0 must be in [0, 1)"),
    ("train", "tiny.py --lr_schedule=step", USAGE, "lr_schedule=step must be cosine or linear"),
    ("train", "tiny.py --objective=mask", USAGE, "objective=mask must be next or masked"),
    *[("train", f"tiny.py --mask_share={s}", USAGE, f"{s} must be above 0 and below 1") for s in ("0.0", "1.0")],
    ("train", "tiny.py --dtype=int8", USAGE, "dtype=int8 must be float32, bfloat16 or float16"),
    # settings that contradict each other; for more of the model's see test_model.py
    ("train", "tiny.py --n_head=3", USAGE, "n_embd=8 is not divisible by n_head=3"),
    ("train", "tiny.py --min_lr=1", USAGE, "min_lr=1 is above learning_rate=0.01"),
    ("train", "tiny.py --dtype=float16", USAGE, "dtype=float16 needs a CUDA device"),
    ("train", "tiny.py --vocab_size=5", USAGE, "vocab_size=5 is smaller than the 18 of tiny\n"),
    ("train", "tiny.py --objective=masked --vocab_size=18", USAGE, "smaller than the 19 of tiny and the mask token"),
    # data that are not there, or not right
    ("train", "tiny.py --dataset=nowhere", FAILURE, "python prepare_data.py text --name nowhere"),
    ("train", "tiny.py --dataset=openwebtext", FAILURE, "python prepare_data.py openwebtext\n"),
    ("train", "tiny.py --dataset=openwebtext_0-3", FAILURE, "python prepare_data.py openwebtext --shards 0-3\n"),
    ("train", "tiny.py --dataset=short", FAILURE, "data/short/train.bin holds"),
    ("train", "tiny.py --dataset=short_val", FAILURE, "val.bin holds 50 tokens, but meta.json says"),
    *[("train", f"tiny.py --dataset={name}", FAILURE, f"data/{name}") for name in (*META, "uint64")],
    *[("train", f"tiny.py --dataset={n}", FAILURE, f"data/{n} is damaged") for n in ("bare", "no_val", "empty")],
    ("train", "tiny.py --block_size=100000", FAILURE, "too few for block_size=100000"),
    # runs, machines
    ("train", "tiny.py --out_dir=out/good", FAILURE, "out/good holds a run: --resume it"),
    ("train", "tiny.py --out_dir=empty.txt", FAILURE, "empty.txt is a file"),
    ("train", "tiny.py --resume --out_dir=out/none", FAILURE, "out/none holds no run to resume"),
    *[("train", f"tiny.py --resume --out_dir=out/good {flag}", FAILURE, words) for flag, words in CHANGES.items()],
    *[("train", f"tiny.py --resume --out_dir=out/{name}", FAILURE, UNREADABLE % name) for name in ("cut", "executes")],
    ("train", "tiny.py --resume --out_dir=out/brace", FAILURE, "out/brace/config.json cannot be read"),
    ("train", "tiny.py --resume --out_dir=out/foreign", FAILURE, "config.json cannot be read as one of a run"),
    *[("train", f"tiny.py --resume --out_dir=out/{name}", FAILURE, "config.json cannot be read") for name in META],
    pytest.param("train", "tiny.py --device=cuda", FAILURE, "device=cuda is not there", marks=no_cuda),
    *[("train", f"tiny.py --device={name}", FAILURE, f"device={name} is not there") for name in ("cuda:99", "tpu")],
    ("train", "tiny.py --wandb_log", FAILURE, "pip install wandb"),
    pytest.param("train", "tiny.py --out_dir=/nlqgpt", FAILURE, "/nlqgpt", marks=no_root),
    # sample.py
    ("sample", "", USAGE, "run"),
    *[("sample", name, FAILURE, f"{name} holds no trained model") for name in ("out/none", "data/tiny")],
    ("sample", "empty.txt", FAILURE, "empty.txt is a file"),
    *[("sample", name, FAILURE, f"{name}/best.pt cannot be read") for name in ("out/cut", "out/executes")],
    ("sample", "out/fork", FAILURE, "query_mode=gated, which is not one of linear, identity, nonlinear"),
    ("sample", "out/good --prompt=Ω", FAILURE, "U+03A9"),
    ("sample", "out/good --prompt=", FAILURE, "the prompt is empty"),
    ("sample", "out/good --prompt=FILE:nowhere", FAILURE, "nowhere"),
    ("sample", "out/good --prompt=FILE:long.txt", FAILURE, "this model sees 16 at most"),
    ("sample", "out/good --temperature=-1", USAGE, "--temperature: '-1' is not 0 or above"),
    ("sample", "out/good --top_p=0", USAGE, "--top_p: '0' is not in (0, 1]"),
    ("sample", "out/good --top_k=many", USAGE, "many"),
    ("sample", "out/good --num_samples=0", USAGE, "--num_samples: '0' is not 1 or above"),
    ("sample", "out/good --max_new_tokens=x", USAGE, "'x'"),
    ("sample", "out/good --seed=99999999999999999999", USAGE, "--seed: '99999999999999999999' is not in"),
    ("sample", "out/good --promt=x", USAGE, "--promt=x"),
    ("sample", "out/good --prompt=FILE:latin.txt", FAILURE, "not UTF-8"),
    ("sample", "out/good --device=tpu", FAILURE, "device=tpu is not there"),
    *[("sample", f"out/encoder{p}", FAILURE, "a --prompt with <mask> or _ in it") for p in ("", " --prompt=1")],
    ("sample", "out/encoder --prompt=Ω_", FAILURE, "U+03A9"),
    ("sample", f"out/encoder --prompt={'1_' * 9}", FAILURE, "has 18 tokens, but this model sees 16 at most"),
    ("sample", "out/encoder --prompt=1_ --top_k=2", USAGE, "--top_k has no meaning here: out/encoder is an encoder"),
    # prepare_data.py
    ("prepare_data", "text --name=x --input nowhere", FAILURE, "--input nowhere is no file or folder"),
    *[("prepare_data", f"text --name=x --input {i}", FAILURE, f"{i} is empty") for i in ("empty.txt", "folder")],
    ("prepare_data", "text --name=x --input latin.txt --tokenizer=char", FAILURE, "latin.txt is not UTF-8"),
    ("prepare_data", "text --name=tiny --input tiny.txt --tokenizer=char", FAILURE, "exists already"),
    ("prepare_data", "text --name=x --input one.txt --tokenizer=byte", FAILURE, "too short"),
    ("prepare_data", "text --name=x --input latin.txt ./latin.txt --tokenizer=byte", FAILURE, "twice"),
    ("prepare_data", "text --input tiny.txt", USAGE, "--name"),
    ("prepare_data", "text --name=../x --input tiny.txt", USAGE, "not a plain folder name"),
    ("prepare_data", "stdlib --input tiny.txt", USAGE, "--input"),
    ("prepare_data", "openwebtext --tokenizer=char", USAGE, "unrecognized arguments: --tokenizer=char"),
    *[("prepare_data", words, USAGE, words.split()[-1].partition("=")[0]) for words in NOT_UNDERSTOOD],
    ("prepare_data", "shakespeare_char --input nowhere", FAILURE, "nowhere"),
    ("prepare_data", "text --name=x --input tiny.txt --tokenizer=bpe", USAGE, "bpe"),
    ("prepare_data", "shakespeare_char --input tiny.txt", FAILURE, "not tiny Shakespeare"),
    ("prepare_data", "openwebtext --shards=21", USAGE, "--shards: 21 is neither"),
    ("prepare_data", "openwebtext --mirror=huggingface.co", USAGE, "--mirror: 'huggingface.co' must begin"),
    # import_checkpoint.py
    ("import_checkpoint", "", USAGE, "two places are needed"),
    ("import_checkpoint", "foreign.pt out/x", USAGE, "--dataset=NAME is needed"),
    ("import_checkpoint", "foreign.pt out/x --dataset=tiny --n_layer=3", USAGE, "--n_layer"),
    ("import_checkpoint", "foreign.pt out/x --dataset=tiny --lr=3", USAGE, "'lr'"),
    ("import_checkpoint", "foreign.pt out/x --dataset=tiny --batch_size=0", USAGE, "batch_size=0"),
    ("import_checkpoint", "nowhere.pt out/x --dataset=tiny", FAILURE, "nowhere.pt"),
    ("import_checkpoint", "tiny.txt out/x --dataset=tiny", FAILURE, "tiny.txt cannot be read as a checkpoint"),
    ("import_checkpoint", "executes.pt out/x --dataset=tiny", FAILURE, "executes.pt cannot be read"),
    ("import_checkpoint", "out/good/ckpt.pt out/x --dataset=tiny", FAILURE, "lacks model or model_args"),
    # ablate.py
    ("ablate", "", USAGE, "config"),
    ("ablate", "@quote.txt", USAGE, "@quote.txt: No closing quotation"),
    ("ablate", "nowhere.py", USAGE, "there is no config file nowhere.py"),
    ("ablate", "tiny.py --arm=linear,quadratic", USAGE, "--arm=quadratic is not one of linear"),
    ("ablate", "tiny.py --lerning_rate=1,2", USAGE, "the nearest is 'learning_rate'"),
    ("ablate", "tiny.py --learning_rate", USAGE, "--learning_rate needs a value"),
    ("ablate", "tiny.py --learning_rate=1e-2,fast", USAGE, "learning_rate='fast' is not a number"),
    ("ablate", "tiny.py --learning_rate=1e-2,0.01", USAGE, "names a value twice"),
    ("ablate", "tiny.py --learning_rate=1e-2,-1", USAGE, "learning_rate=-1.0 must be above 0"),
    ("ablate", "tiny.py --seed=3,-2", USAGE, "seed=-2 must be 0 or above"),
    ("ablate", "tiny.py --seed=3,4 extra", USAGE, "'extra' is not understood"),
    ("ablate", "tiny.py --tune= --learning_rate=1e-2,2e-2", USAGE, "several rates need --tune=SEEDS"),
    ("ablate", "tiny.py --arm=linear,identity --compare=identity", USAGE, "--compare=identity is not two of the arms"),
    ("ablate", "tiny.py --arm=linear,linear", USAGE, "--arm=linear,linear names an arm twice"),
    ("ablate", "tiny.py --arm=linear,identity --compare=identity:linear,linear:identity", USAGE, "two arms twice"),
    ("ablate", "tiny.py --margin=0", USAGE, "--margin: '0' is not between 0 and 100"),
    ("ablate", "@nowhere.txt", USAGE, "nowhere.txt"),
    ("ablate", "tiny.py --query_mode=linear,quadratic", USAGE, "query_mode='quadratic' is not one of"),
    ("ablate", "tiny.py --arm=linear --query_rank=4", USAGE, "query_rank=4 has no meaning"),
    ("ablate", "tiny.py --seed=1,2 --tune=2,3", USAGE, "share a seed"),
    ("ablate", "tiny.py --tune=1,one", USAGE, "--tune=1,one: seed='one' is not an integer"),
    ("ablate", "tiny.py --seed=1 --tune=2 --min_lr=1e-3", FAILURE, "--min_lr=auto"),
    ("ablate", "tiny.py --arm=linear,linear_wide --mlp_hidden=9", USAGE, "--mlp_hidden is what the arm linear_wide"),
    ("ablate", "tiny.py --learning_rate=1e-2,1.0000001e-2", USAGE, "two runs would have one name"),
    ("ablate", "tiny.py --dataset=tiny,../data/tiny", USAGE, "a name would be a path"),
    ("ablate", "tiny.py --devices=cpu,", USAGE, "an empty device"),
    ("ablate", "tiny.py --devices=cpu --dtype=float16", USAGE, "dtype=float16 needs a CUDA device"),
    ("ablate", "tiny.py --out_dir=x", USAGE, "--out_dir is not for a grid"),
    ("ablate", "tiny.py --devices=cpu,tpu", FAILURE, "device=tpu is not there"),
    *[("ablate", f"tiny.py --dataset=nowhere{dry}", FAILURE, "prepare_data.py text --name nowhere") for dry in DRY],
    ("ablate", "tiny.py --block_size=100000", FAILURE, "too few for block_size=100000"),
    ("ablate", "tiny.py --out=tiny.txt", FAILURE, "tiny.txt"),
    # bench.py
    ("bench", "", USAGE, "what"),
    ("bench", "inference", USAGE, "inference"),
    ("bench", "train --batch_size=0", USAGE, "--batch_size: '0'"),
    ("bench", "train --device=tpu", FAILURE, "device=tpu is not there"),
]


@pytest.mark.parametrize("program, arguments, status, words", MISTAKES)
def test_a_mistake_is_one_line_and_changes_nothing(program, arguments, status, words, scene, monkeypatch, capsys):
    if program == "ablate":
        pytest.importorskip("scipy", reason="a study needs scipy")
        pytest.importorskip("matplotlib", reason="a study needs matplotlib")
    shutil.copytree(scene, ".", dirs_exist_ok=True)
    before = files()
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it was not installed
    monkeypatch.setattr(sys, "argv", [f"{program}.py", *arguments.split()])
    module = importlib.import_module(MODULES.get(program, program))
    capsys.readouterr()  # what torch may say when it is imported
    with pytest.raises(SystemExit) as end:
        run_program(module.main)
    lines = capsys.readouterr().err.splitlines()
    assert end.value.code == status
    assert len(lines) == 1 and lines[0].startswith(f"{program}.py: ") and words in f"{lines[0]}\n", lines
    assert files() == before


@pytest.mark.parametrize(
    "package, command", [("tiktoken", "text --name=x --input t.txt"), ("requests", "shakespeare_char")]
)
def test_a_package_that_is_missing_is_named(package, command, monkeypatch, capsys):
    Path("t.txt").write_text("some text\n" * 100)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit, match="1"):
        run_program(lambda: prepare_data.main(command.split()))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f"; pip install {package}") and not Path("data").exists()
