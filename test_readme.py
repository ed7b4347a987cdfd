"""README.md: its commands, its file tree and its numbers are true."""

import re
import shlex
import shutil
import subprocess

import pytest
import torch

import ablate
import bench
import import_checkpoint
import prepare_data
import sample
import train
from conftest import ROOT
from model import GPT, GPTConfig

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", README, re.S) for line in block.splitlines()]


@pytest.mark.parametrize("line", [c for c in COMMANDS if not c.startswith("python3 -m venv")])
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


def test_the_two_first_commands_install_what_is_required():
    required = re.search(r"^dependencies = \[(.*)\]", (ROOT / "pyproject.toml").read_text(), re.M)[1]
    names = re.findall(r'"([a-z]+)', required)
    first, second = [c for c in COMMANDS if c.startswith("python3 -m venv")]
    assert f"pip install {' '.join(names)} && .venv/bin/python train.py config/quickstart.py" in first
    assert f"pip install {' '.join(names)} pytest && .venv/bin/python -m pytest" in second


def test_the_ablation_in_the_readme_loads():
    (snippet,) = re.findall(r"```python\n(.*?)```", README, re.S)
    with open("ablation.py", "w", encoding="utf-8") as f:
        f.write(snippet)
    _, model_args = train.read_command(["ablation.py"])
    with torch.device("meta"):
        report = GPT(GPTConfig(**model_args)).parameter_report()
    assert model_args["query_activation"] == "none" and report["total"] == 124_392_192


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
