"""sample.py: what it prints, and what it refuses."""

import copy
from pathlib import Path

import pytest
import torch

from conftest import printed, run, train_on

import sample
from model import GPT, GPTConfig
from utils.checkpoint import RunFolder
from utils.generation import INT8_FROM, Int8Linear, best_format, for_generation, generate
from utils.settings import UserError
from utils.tokenizers import ByteTokenizer, CharTokenizer, load_tokenizer


def test_it_prints_what_the_model_generates(whole_run, capsys):
    model, spec = sample.load_model(whole_run, "cpu")
    tokenizer = load_tokenizer(spec)
    prompt = torch.tensor([tokenizer.encode(b"7 plus ").tolist()])
    generator = torch.Generator().manual_seed(5)
    sampling = {"temperature": 0.7, "top_k": 8, "generator": generator}
    rows = generate(model, prompt.expand(2, -1), 40, **sampling).tolist()
    assert rows[0] != rows[1]
    texts = [tokenizer.decode(row).decode() for row in rows]
    expected = ("\n" + "-" * 79 + "\n").join(texts) + "\n"
    options = ["--num_samples=2", "--max_new_tokens=40", "--temperature=0.7", "--top_k=8"]
    options += ["--device=cpu", "--seed=5"]
    assert printed(capsys, whole_run, "--prompt=7 plus ", *options) == expected
    Path("p.txt").write_text("7 plus ")
    assert printed(capsys, whole_run, "--prompt=FILE:p.txt", *options) == expected
    assert printed(capsys, whole_run, "--prompt=7 plus ", *options[:-1], "--seed=6") != expected


def test_int8_is_the_default_where_it_gains():
    sizes = (INT8_FROM - 1, INT8_FROM)
    small, large = (torch.nn.Linear(1, n, bias=False, device="meta") for n in sizes)
    assert [best_format("cpu", model) for model in (small, large)] == ["float32", "int8"]
    assert best_format("cuda", large) == "float32"


def test_the_best_model_is_used_or_the_last(whole_run):
    folder = RunFolder(whole_run)
    checkpoint = folder.load("best.pt")
    checkpoint["model"]["ln_f.weight"].fill_(7)
    folder.save("best.pt", checkpoint)
    best, _ = sample.load_model(whole_run, "cpu")
    assert not best.training and (best.ln_f.weight == 7).all()
    Path(whole_run, "best.pt").unlink()
    assert (sample.load_model(whole_run, "cpu")[0].ln_f.weight != 7).all()
    Path(whole_run, "best.pt").write_bytes(b"not a checkpoint")
    done = run("sample.py", whole_run)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert done.stderr.startswith("sample.py: ") and "best.pt" in done.stderr


def test_bytes_that_make_up_a_character_are_printed_together(capsys):
    recipe = (
        "n_layer, n_head, n_embd, block_size = 1, 2, 32, 32\n"
        "batch_size, gradient_accumulation_steps = 8, 1\n"
        "max_iters, warmup_iters, learning_rate, lr_schedule = 150, 5, 1e-2, 'linear'\n"
    )
    a_run = train_on("u", "日本語 😀 ünï\n" * 60, recipe)
    options = ["--temperature=0", "--num_samples=1", "--max_new_tokens=100"]
    out = printed(capsys, a_run, "--prompt=日", *options)
    assert out.startswith("日本語 😀 ünï\n日本語 😀 ünï\n")


@pytest.mark.parametrize("mode", ["linear", "identity", "nonlinear"])
def test_the_layout_for_generation_changes_no_value(mode):
    config = GPTConfig(16, 50, 2, 2, 32, query_mode=mode, dropout=0.5)
    model, same = GPT(config).double().train(), GPT(config).double().eval()
    assert for_generation(model) is model and not model.training
    for (name, ours), (_, theirs) in zip(model.state_dict().items(), same.state_dict().items()):
        assert torch.equal(ours, theirs), name
    assert model.lm_head.weight is model.wte.weight
    idx = torch.randint(50, (2, 16))
    torch.testing.assert_close(model(idx), same(idx), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype, bits", [("bfloat16", 8), ("int8", 7)])
def test_smaller_weights_change_the_logits_as_little_as_their_rounding_does(dtype, bits, bias):
    torch.manual_seed(0)
    exact = GPT(GPTConfig(16, 50, 2, 2, 64, bias=bias)).eval()
    small = for_generation(copy.deepcopy(exact), dtype)
    layers = [small.get_submodule(name) for name in ("lm_head", "blocks.0.mlp.c_fc")]
    assert dtype == "bfloat16" or all(type(layer) is Int8Linear for layer in layers)
    idx = torch.randint(50, (2, 16))
    expected, found = exact(idx), small(idx).float()
    error = ((found - expected).pow(2).mean() / expected.pow(2).mean()).sqrt().item()
    assert 2**-12 < error < 8 * 2**-bits


@pytest.mark.parametrize("rank", [7, 12, 32])
def test_layers_too_narrow_for_the_int8_kernel_are_left_in_bfloat16(rank):
    """With other widths, torch's kernel returns infinity or ends the process."""
    exact = GPT(GPTConfig(16, 50, 2, 2, 24, query_rank=rank)).eval()
    idx = torch.randint(50, (1, 5))
    expected = exact(idx)
    small = for_generation(exact, "int8")
    kinds = {type(block.attn.query.w_2) for block in small.blocks}
    assert kinds == {Int8Linear if rank == 32 else torch.nn.Linear}
    error = (small(idx).float() - expected).pow(2).mean().sqrt()
    assert error / expected.pow(2).mean().sqrt() < 0.06


def test_without_a_prompt_it_begins_as_documents_do():
    for tokenizer, expected in (
        (ByteTokenizer(True), [[256]]),
        (ByteTokenizer(False), [[10]]),  # one document: the separator was never trained
        (CharTokenizer("\nab", False), [[0]]),
    ):
        assert sample.encode_prompt(None, tokenizer, 16).tolist() == expected
    as_typed = sample.encode_prompt("\udcff", ByteTokenizer(False), 16)
    assert as_typed.tolist() == [[255]]
    with pytest.raises(UserError, match=r"'\\n'.*not among"):
        sample.encode_prompt(None, CharTokenizer("ab", False), 16)
