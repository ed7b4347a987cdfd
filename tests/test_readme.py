"""The READMEs and the house: commands, snippets, links and numbers are true, and code is small."""

import ast
import importlib
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT, parameter_report, run

import prepare_data
import sample
import train
from model import GPTConfig
from utils.settings import read_command

README = (ROOT / "README.md").read_text(encoding="utf-8")
LISTED = "model.py train.py prepare_data.py sample.py test_model.py config study tools tests utils"
ROOT_HOLDS = f"{LISTED} README.md LICENSE pyproject.toml .ci .gitignore"
DOCUMENTS = sorted([ROOT / "README.md", *ROOT.glob("[a-z]*/README.md")])
is_checkout = shutil.which("git") and (ROOT / ".git").exists()
no_git = pytest.mark.skipif(not is_checkout, reason="not a git checkout")
PYTHON = [*ROOT.glob("*.py"), *ROOT.glob("[a-z]*/*.py")]


def blocks(language, text=README):
    return re.findall(rf"```{language}\n(.*?)```", text, re.S)


def commands(text):
    return [line for block in blocks("sh", text) for line in block.splitlines()]


COMMANDS = commands(README)
OF_THE_FORK = [line for line in COMMANDS if "sigmoid" in line]  # what the recipe adds is not here
PARSERS = {
    "train.py": lambda words: read_command(words, train.Settings, GPTConfig),
    "sample.py": sample.read_options,
    "prepare_data.py": prepare_data.read_options,
}


@no_git
def test_the_root_holds_what_a_reader_expects():
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    names = [name for name in done.stdout.splitlines() if (ROOT / name).exists()]
    assert {name.split("/")[0] for name in names} == set(ROOT_HOLDS.split())


def lines_of(path):
    return path.read_text(encoding="utf-8").splitlines()


def imported_by(path):
    """The project's own files that a file imports, inside functions, too."""
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    paths = [ROOT / f"{name.replace('.', '/')}.py" for name in names]
    return [path for path in paths if path.exists()]


def test_a_reader_can_hold_the_program_in_the_head():
    reached, todo = {}, [ROOT / "train.py"]
    while todo:
        path = todo.pop()
        if path not in reached:
            reached[path] = len(lines_of(path))
            todo += imported_by(path)
    print("\n".join(f"{n:5} {path.relative_to(ROOT)}" for path, n in reached.items()))
    assert sum(reached.values()) <= 1200, sum(reached.values())
    sizes = {path.relative_to(ROOT): len(lines_of(path)) for path in PYTHON}
    tests = sum(n for path, n in sizes.items() if path.name.startswith(("test_", "conftest")))
    config = sum(n for path, n in sizes.items() if path.parts[0] == "config")
    assert tests <= 4000 and sum(sizes.values()) - tests - config <= 3700, (tests, config, sizes)
    assert not [path for path in PYTHON if any(len(line) > 100 for line in lines_of(path))]


def test_the_readmes_can_be_read_in_half_an_hour():
    words = {path: len(path.read_text(encoding="utf-8").split()) for path in DOCUMENTS}
    assert sum(words.values()) <= 6500 and words[ROOT / "study/README.md"] <= 2000, words


def test_utils_know_neither_model_nor_training():
    for path in (ROOT / "utils").glob("*.py"):
        assert not {ROOT / "model.py", ROOT / "train.py"} & {*imported_by(path)}, path


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_each_command_is_understood(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for line in commands(path.read_text(encoding="utf-8")):
        words = shlex.split(line)
        if words[0] == "torchrun":
            words = ["python", *words[words.index("train.py") :]]
        if words[0] != "python" or line in OF_THE_FORK:
            continue
        if words[-1] == "--help" or words[1:3] == ["-m", "pytest"]:
            continue
        if words[1] == "-m":
            if words[2] == "study.ablate":
                pytest.importorskip("scipy", reason="a study needs scipy")
                pytest.importorskip("matplotlib", reason="a study needs matplotlib")
            module = importlib.import_module(words[2])
            if hasattr(module, "read_options"):  # the demonstration has no options
                module.read_options(words[3:])
        else:
            PARSERS[words[1]](words[2:])


def test_the_commands_that_train_and_sample_run_one_after_another():
    """As they stand, but on a small text, with a small model, for two steps."""
    Path("tiny.txt").write_text("def main():\n    pass\n" * 50)
    prepare_data.main(["text", "--name=tiny", "--input", "tiny.txt", "--tokenizer=byte"])
    small = "--dataset=tiny --n_layer=1 --n_head=2 --n_embd=16 --block_size=32 --vocab_size=258"
    small += " --batch_size=2 --gradient_accumulation_steps=2 --max_iters=2 --eval_tokens=32"
    small += " --device=cpu --compile=false"
    shutil.copytree(ROOT / "config", "config")
    assert train.main(small.split()) == 0  # config/quickstart.py, as in the first command
    for line in COMMANDS:
        _, program, *arguments = shlex.split(line)
        if line in OF_THE_FORK or line.startswith("torchrun"):
            continue
        if program == "train.py":
            assert train.main([*arguments, *small.split()]) == 0
        elif program == "sample.py":
            short = [] if "out/encoder_quickstart" in arguments else ["--max_new_tokens=3"]
            sample.main([*arguments, *short, "--device=cpu"])


def test_the_recipe_for_a_query_of_ones_own(tiny_config):
    """The snippet goes where the README says; the commands below it run, on a small text."""
    (snippet,) = blocks("python")
    fork = Path("fork").absolute()
    away = shutil.ignore_patterns(".git", ".venv", "data", "out", "results", "__pycache__")
    shutil.copytree(ROOT, fork, ignore=away)
    source = (fork / "model.py").read_text(encoding="utf-8")
    (registry,) = re.findall(r"^QUERIES = .*$", source, re.M)
    source = source.replace(registry, f"{registry}\n\n\n{snippet}")
    (fork / "model.py").write_text(source, encoding="utf-8")

    def python(*arguments, **options):
        done = run(*arguments, environment={"PYTHONPATH": str(fork)}, **options)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    test_line, train_line, ablate_line = (shlex.split(line)[1:] for line in OF_THE_FORK)
    assert "4 passed" in python(*test_line, cwd=fork)
    python(fork / train_line[0], tiny_config, *train_line[2:])
    record = json.loads(Path("out/sigmoid/config.json").read_text())
    assert record["model"]["query_mode"] == "sigmoid"
    assert record["parameters"]["query_path"] == 2 * 16**2
    assert Path("out/sigmoid/best.pt").exists()
    pytest.importorskip("scipy", reason="a study needs scipy")
    pytest.importorskip("matplotlib", reason="a study needs matplotlib")
    words = [tiny_config, *ablate_line[3:], "--dry-run"]
    assert "sigmoid-lr" in python("-m", "study.ablate", *words)


def test_the_configs_and_the_parameters_in_the_tables():
    modes = re.findall(r"^\| `(\w+)` \|.*\| ([\d,]+) \|$", README, re.M)
    assert len(modes) == 3
    for mode, count in modes:
        report = parameter_report(GPTConfig(query_mode=mode))
        assert report["query_path"] == 12 * int(count.replace(",", ""))
    rows = dict(re.findall(r"^\| .*\[(\w+)\]\(config/\1\.py\) \| (.*?) \|", README, re.M))
    assert rows.keys() == {path.stem for path in (ROOT / "config").glob("[!_]*.py")}
    for name, text in rows.items():
        _, config = read_command([f"{ROOT}/config/{name}.py"], train.Settings, GPTConfig)
        total = parameter_report(config)["total"]  # which builds it, too
        for number in re.findall(r"\d{1,3}(?:,\d{3})+", text):
            assert int(number.replace(",", "")) == total


def test_the_file_tree_is_complete():
    (tree,) = re.findall(r"## Files\n\n```\n(.*?)```", README, re.S)
    listed = {line.split()[0].rstrip("/") for line in tree.splitlines()}
    assert listed == set(LISTED.split())


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
        is_known = re.match(r"https://(arxiv\.org|github\.com)/", target)
        assert is_known or (path.parent / target).exists(), target
