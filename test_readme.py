"""README.md: its commands, its snippets, its file tree and its numbers are true."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import ablate
import bench
import import_checkpoint
import prepare_data
import report
import sample
import train
from conftest import ROOT
from model import GPT, GPTConfig

README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


COMMANDS = [line for block in blocks("sh") for line in block.splitlines()]
OF_THE_FORK = [line for line in COMMANDS if "gated" in line]  # what the recipe adds is not here
STUDY = ROOT / "results" / "stdlib_cpu"


@pytest.mark.parametrize("line", [c for c in COMMANDS if not c.startswith("python3") and c not in OF_THE_FORK])
def test_each_command_is_understood(line, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(line)
    if words[0] == "torchrun":
        words = words[words.index("train.py") - 1 :]
    _, program, *arguments = words
    if program == "train.py" and arguments != ["--help"]:
        train.resolve(train.read_command(arguments)[0])
    elif program == "sample.py":
        sample.read_options(arguments)
    elif program == "bench.py":
        bench.read_options(arguments)
    elif program == "import_checkpoint.py":
        assert import_checkpoint.read_command(arguments)
    elif program == "ablate.py":
        assert ablate.read_command(arguments)
    elif program == "prepare_data.py":
        prepare_data.read_options(arguments)
    else:
        assert line == "python train.py --help"


def test_the_commands_that_train_and_sample_run_one_after_another():
    """As they stand, but on a small text, with a small model, for two steps."""
    Path("tiny.txt").write_text("def main():\n    pass\n" * 50)
    prepare_data.main(["text", "--name=tiny", "--input", "tiny.txt", "--tokenizer=byte"])
    small = "--dataset=tiny --n_layer=1 --n_head=2 --n_embd=16 --block_size=16 --vocab_size=257 --batch_size=2"
    small += " --gradient_accumulation_steps=2 --max_iters=2 --eval_tokens=32 --device=cpu --compile=false"
    shutil.copytree(ROOT / "config", "config")
    assert train.main(small.split()) == 0  # config/quickstart.py, which the first command of all trains
    for line in COMMANDS:
        _, program, *arguments = shlex.split(line)
        if line in OF_THE_FORK or line.startswith("torchrun"):
            continue
        if program == "train.py":
            assert train.main([*arguments, *([] if arguments == ["--help"] else small.split())]) == 0
        elif program == "sample.py":
            sample.main([*arguments, "--max_new_tokens=3", "--device=cpu"])


def test_the_two_first_commands_install_what_is_required():
    required = re.search(r"^dependencies = \[(.*)\]", (ROOT / "pyproject.toml").read_text(), re.M)[1]
    names = re.findall(r'"([a-z]+)', required)
    first, second = [c for c in COMMANDS if c.startswith("python3 -m venv")]
    assert f"pip install {' '.join(names)} && .venv/bin/python train.py config/quickstart.py" in first
    assert f"pip install {' '.join(names)} pytest && .venv/bin/python -m pytest" in second


def test_the_walk_through_agrees_to_rounding():
    (snippet,) = [block for block in blocks("python") if "theta" in block]
    words = r"logits up to (\d+), which differ by at most (\S+?)(?=`|$)"
    done = subprocess.run([sys.executable, "-c", snippet], cwd=ROOT, capture_output=True, text=True, check=True)
    (told,), (quoted,) = (re.findall(words, text, re.M) for text in (done.stdout, README.replace(snippet, "")))
    assert told[0] == quoted[0] and float(told[1]) < 1e-10 and float(quoted[1]) < 1e-10


def test_the_config_in_the_readme_loads():
    (snippet,) = [block for block in blocks("python") if block.startswith("from config.")]
    Path("ablation.py").write_text(snippet, encoding="utf-8")
    _, model_args = train.read_command(["ablation.py"])
    with torch.device("meta"):
        counts = GPT(GPTConfig(**model_args)).parameter_report()
    assert model_args["query_activation"] == "none" and counts["total"] == 124_392_192


@pytest.mark.skipif(not shutil.which("git"), reason="needs git apply")
def test_the_recipe_for_a_query_of_ones_own(tiny_config):
    """The diff applies to model.py; the commands below it run, on a small text."""
    (diff,) = blocks("diff")
    fork = Path("fork").absolute()
    fork.mkdir()
    for path in ROOT.glob("*.py"):
        shutil.copy(path, fork)
    subprocess.run(["git", "apply"], cwd=fork, input=diff, text=True, check=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8", "PYTHONPATH": str(fork)}

    def python(*arguments, **options):
        command = [sys.executable, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, **options)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    test_line, train_line, ablate_line = (shlex.split(line)[1:] for line in OF_THE_FORK)
    assert "4 passed" in python(*test_line, cwd=fork)
    python(fork / train_line[0], tiny_config, *train_line[2:])
    arms = "import sys, ablate; print(*ablate.read_command(sys.argv[1:])[0].arms)"
    assert python("-c", arms, tiny_config, *ablate_line[2:]) == "query_mode=linear query_mode=gated\n"
    record = json.loads(Path("out/gated/config.json").read_text())
    assert record["model"]["query_mode"] == "gated" and record["parameters"]["query_path"] == 2 * 16**2
    assert Path("out/gated/summary.json").exists()


def test_the_parameters_in_the_first_table():
    for mode, count in re.findall(r"^\| `(\w+)` \|.*\| ([\d,]+) \|$", README, re.M):
        with torch.device("meta"):
            counts = GPT(GPTConfig(query_mode=mode)).parameter_report()
        assert counts["query_path"] == 12 * int(count.replace(",", ""))


def test_the_study_in_the_readme_is_that_of_the_records():
    told = json.loads((STUDY / "study.json").read_text())
    study = ablate.Study(*(told[key] for key in ("config", "arms", "learning_rates", "tuning_seeds", "seeds")), STUDY)
    arms = report.summarise(study, study.outcomes())
    published = (STUDY / "report.md").read_text(encoding="utf-8")
    assert report.main_table(arms) in README and report.main_table(arms) in published
    assert report.rate_table(arms) in README and report.rate_table(arms) in published
    assert study.to_go(study.outcomes()) == 0 and all(arm.bracketed for arm in arms)


def test_the_numbers_of_the_study_computed_anew():
    """From nothing but the final losses in summary.json and the names of the folders."""
    told = json.loads((STUDY / "study.json").read_text())
    tuning, seeds = told["tuning_seeds"], told["seeds"]
    runs = {}
    for path in STUDY.glob("*/summary.json"):
        arm, rate, seed = re.fullmatch(r"(\w+)-lr([\d.e-]+)-seed(\d+)", path.parent.name).groups()
        loss = json.loads(path.read_text())["final_val_loss"]
        runs.setdefault(arm, {}).setdefault(float(rate), {})[int(seed)] = loss
    assert len(runs) == 6 and len(seeds) >= 3 and not set(seeds) & set(tuning)
    measured = {}
    for arm, rates in runs.items():
        means = {rate: np.mean([losses[seed] for seed in tuning if seed in losses]) for rate, losses in rates.items()}
        best = min(means, key=means.get)
        losses = measured[arm] = np.array([rates[best][seed] for seed in seeds])
        (row,) = [line for line in README.splitlines() if line.startswith(f"| {arm} | ") and "n = " in line]
        assert f"| {best:g} | {losses.mean():.4f} ± {losses.std(ddof=1):.4f} (n = {len(seeds)}) |" in row
    quantile = {3: 4.3026527, 4: 3.1824463, 5: 2.7764451}[len(seeds)]  # of Student's t
    for arm in measured.keys() - {"linear"}:
        (row,) = [line for line in README.splitlines() if line.startswith(f"| {arm} | ") and "n = " in line]
        gains = measured[arm] - measured["linear"]
        error = quantile * gains.std(ddof=1) / len(seeds) ** 0.5
        three = np.array([gains.mean(), gains.mean() - error, gains.mean() + error])
        for percent in (100 * three / measured["linear"].mean(), 100 * np.expm1(three)):
            assert "{:+.2f} % [{:+.2f}, {:+.2f}]".format(*percent) in row


def test_the_file_tree_is_complete():
    (tree,) = re.findall(r"## Files\n\n```\n(.*?)```", README, re.S)
    listed = {line.split()[0].rstrip("/") for line in tree.splitlines()}
    assert all((ROOT / name).exists() for name in listed)
    if not (shutil.which("git") and (ROOT / ".git").exists()):
        pytest.skip("not a git checkout")
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    top = {name.split("/")[0] for name in tracked.stdout.splitlines()}
    assert {name for name in top if not name.startswith(".")} <= listed


def test_every_config_is_listed_with_its_parameters():
    rows = dict(re.findall(r"^\| \[(\w+)\]\(config/\1\.py\) \| (.*?) \|", README, re.M))
    assert rows.keys() == {path.stem for path in (ROOT / "config").glob("[!_]*.py")}
    for name, text in rows.items():
        _, model_args = train.read_command([f"{ROOT}/config/{name}.py"])
        with torch.device("meta"):
            total = GPT(GPTConfig(**model_args)).parameter_report()["total"]
        for number in re.findall(r"\d{1,3}(?:,\d{3})+", text):
            assert int(number.replace(",", "")) == total


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert target.startswith("https://arxiv.org/") or (ROOT / target).exists()


def test_every_model_setting_is_named():
    assert all(f"`{name}`" in README for name in GPTConfig.__dataclass_fields__)
