"""sample.py: what it prints, and what it refuses."""

from pathlib import Path

import pytest
import torch

import sample
import train
from command import UserError
from conftest import run
from tokenizer import ByteTokenizer, CharTokenizer, load_tokenizer
from run_folder import RunFolder


@pytest.fixture
def a_run(tiny_config):
    train.main([tiny_config])
    return "out/tiny"


def printed(capsys, *arguments):
    capsys.readouterr()
    assert sample.main(list(arguments)) == 0
    return capsys.readouterr().out


def test_it_prints_what_the_model_generates(a_run, capsys):
    model, spec = RunFolder(a_run).load_model("cpu")
    tokenizer = load_tokenizer(spec)
    prompt = torch.tensor([tokenizer.encode(b"7 plus ").tolist()])
    generator = torch.Generator().manual_seed(5)
    rows = model.generate(prompt.expand(2, -1), 40, temperature=0.7, top_k=8, generator=generator).tolist()
    assert rows[0] != rows[1]
    expected = ("\n" + "-" * 79 + "\n").join(tokenizer.decode(row).decode() for row in rows) + "\n"
    options = ["--num_samples=2", "--max_new_tokens=40", "--temperature=0.7", "--top_k=8", "--seed=5", "--device=cpu"]
    assert printed(capsys, a_run, "--prompt=7 plus ", *options) == expected
    Path("p.txt").write_text("7 plus ")
    assert printed(capsys, a_run, "--prompt=FILE:p.txt", *options) == expected
    assert printed(capsys, a_run, "--prompt=7 plus ", *options[:-2], "--seed=6") != expected


def test_the_best_model_is_used_or_the_last(a_run):
    folder = RunFolder(a_run)
    checkpoint = folder.load("best.pt")
    checkpoint["model"]["ln_f.weight"].fill_(7)
    folder.save("best.pt", checkpoint)
    best, _ = folder.load_model("cpu")
    assert not best.training and (best.ln_f.weight == 7).all()
    Path(a_run, "best.pt").unlink()
    assert (folder.load_model("cpu")[0].ln_f.weight != 7).all()


def test_bytes_that_make_up_a_character_are_printed_together(tiny_data, capsys):
    text = "日本語 😀 ünï\n" * 60
    Path("u.txt").write_text(text, encoding="utf-8")
    import prepare_data

    prepare_data.main(["text", "--name=u", "--input", "u.txt", "--tokenizer=byte"])
    Path("u.py").write_text(
        "dataset, device = 'u', 'cpu'\nn_layer, n_head, n_embd, block_size = 1, 2, 32, 32\n"
        "batch_size, gradient_accumulation_steps = 8, 1\n"
        "max_iters, warmup_iters, learning_rate, lr_schedule = 150, 5, 1e-2, 'linear'\n"
    )
    train.main(["u.py"])
    out = printed(capsys, "out/u", "--prompt=日", "--temperature=0", "--num_samples=1", "--max_new_tokens=100")
    assert out.startswith("日本語 😀 ünï\n日本語 😀 ünï\n")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--prompt="], ["prompt is empty"]),
        (["--prompt=7 plus é"], ["'é'", "U+00E9"]),
        (["--prompt=" + "1" * 17], ["17 tokens", "16"]),
        (["--prompt=FILE:nowhere"], ["nowhere", "No such file"]),
        (["--prompt=FILE:blob"], ["blob", "UTF-8"]),
        (["--seed=99999999999999999999"], ["--seed=99999999999999999999"]),
        (["--prompt=\udcff"], ["UTF-8"]),
        (["--temperature=-1"], ["--temperature=-1.0"]),
        (["--top_p=1.5"], ["--top_p=1.5"]),
        (["--top_k=0"], ["--top_k=0"]),
        (["--num_samples=0"], ["--num_samples=0"]),
        (["--max_new_tokens=x"], ["max_new_tokens", "'x'"]),
        (["--device=cuda:99"], ["cuda:99"]),
        (["--promt=x"], ["--promt=x"]),
    ],
)
def test_mistakes_are_told_in_one_line(a_run, arguments, words):
    Path("blob").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError) as e:
        sample.main([a_run, *arguments])
    assert all(word in str(e.value) for word in words) and "\n" not in str(e.value)


def test_without_a_prompt_it_begins_as_documents_do():
    for tokenizer, expected in (
        (ByteTokenizer(True), [[256]]),
        (ByteTokenizer(False), [[10]]),  # one document: the separator was never trained
        (CharTokenizer("\nab", False), [[0]]),
    ):
        assert sample.encode_prompt(None, tokenizer, 16).tolist() == expected
    assert sample.encode_prompt("\udcff", ByteTokenizer(False), 16).tolist() == [[255]]  # bytes as they were typed
    with pytest.raises(UserError, match=r"'\\n'.*not among"):
        sample.encode_prompt(None, CharTokenizer("ab", False), 16)


def test_a_missing_or_damaged_run_is_told(a_run):
    for folder in ("out/nowhere", "tiny.py"):
        with pytest.raises(UserError, match=folder):
            sample.main([folder])
    Path(a_run, "best.pt").write_bytes(b"not a checkpoint")
    done = run("sample.py", a_run)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("sample.py: ") and "best.pt" in done.stderr and done.stderr.count("\n") == 1
