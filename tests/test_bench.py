"""tools/bench.py runs to its end and measures every model; no number is tested, since they depend on the machine."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest

from model import QUERIES
from tools import bench, runbook

HAS_PEER = importlib.util.find_spec("transformers") is not None
PEER = ["--peer"] if HAS_PEER else []
MODELS = {*QUERIES, bench.PEER} if HAS_PEER else {*QUERIES}


def lines_of(output):
    """{first word: line}"""
    return {line.split()[0]: line for line in output.splitlines() if line.strip()}


def test_train_measures_every_model(capsys):
    arguments = ["--device=cpu", "--batch_size=2", "--gradient_accumulation_steps=2", "--seconds=0.01", "--repeats=1"]
    bench.main(["train", "--shape=tiny", *arguments, "--profile", *PEER])
    output = capsys.readouterr().out
    lines = lines_of(output)
    assert lines.keys() >= MODELS and "1.000x" in lines["linear"] and "4 sequences a step" in output
    assert "the data take" in output and "aten::mm" in output  # the latter from the profile


def test_sample_measures_every_model(capsys):
    bench.main(["sample", "--shape=tiny", "--device=cpu", "--batch_size=2", "--new_tokens=5", "--repeats=2", *PEER])
    lines = lines_of(capsys.readouterr().out)
    assert lines.keys() >= MODELS and "1.00 of linear" in lines["linear"]


def test_data_prepares_an_archive(gpt2_vocabulary, capsys):
    bench.main(["data", "--megabytes=0.3", "--repeats=1"])
    output = capsys.readouterr().out
    assert "0.3 MB" in output and "prepare_data.py openwebtext" in output and "16 cores" in output


REHEARSAL = ["gpu", "--shape=tiny", "--device=cpu", "--dtype=bfloat16", "--repeats=1", "--out=r"]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="compiling needs a C++ compiler")
def test_the_runbook_is_rehearsed():
    assert bench.main(REHEARSAL) == 0
    book, text = json.loads(Path("r/gpu.json").read_text()), Path("r/gpu.md").read_text()
    steps = ["gradients", "model_tests", "speed", "training", "resume", "generation"]
    assert list(book) == ["about", *steps] and "failed" not in text
    assert all(f"## {step}\n" in text and book[step]["rows"] for step in steps)
    undisturbed, stopped = (row["training loss"] for row in book["resume"]["rows"])
    assert undisturbed == pytest.approx(stopped, rel=1e-6)
    assert "passed" in book["model_tests"]["rows"][0]["result"]


def test_the_runbook_stops_where_the_gradients_are_wrong_and_at_no_other_failure(monkeypatch, capsys):
    def gradients(options, settings):
        """A compiled step against an eager one."""
        return [{"query": "linear", "right": right}]

    def generation(options, settings):
        """Tokens a second."""
        raise RuntimeError("no memory")

    monkeypatch.setattr(runbook, "STEPS", (gradients, generation))
    for right, status, rows in ((True, 0, [{"failed": "RuntimeError: no memory"}]), (False, 1, None)):
        assert bench.main(REHEARSAL) == status
        book = json.loads(Path("r/gpu.json").read_text())
        assert book.get("generation", {}).get("rows") == rows
    assert "nothing else is measured" in capsys.readouterr().out
