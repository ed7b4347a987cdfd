"""tools/bench.py runs to its end and measures every model; no number is tested, since they depend on the machine."""

import importlib.util

from model import QUERIES
from tools import bench

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
