"""Let a trained model write: python sample.py out/NAME [--prompt=TEXT | --prompt=FILE:path] [...]

An encoder fills holes in the prompt instead: each <mask> is one token, or, where there is none, each _ is.
"""

import argparse
import codecs
from pathlib import Path

import torch

from model import GPT, QUERIES, GPTConfig
from utils.checkpoint import RunFolder, reading
from utils.device import pick_device
from utils.generation import FORMATS, best_format, for_generation
from utils.settings import Parser, UserError, checked, run_program
from utils.tokenizers import load_tokenizer

OF_WRITING = ("num_samples", "max_new_tokens", "temperature", "top_k", "top_p", "seed")  # options that filling lacks


def load_model(folder, device, dtype="float32"):
    """The run's best model, or its last where none is marked best -> (GPT ready to generate, its tokenizer's spec)."""
    run = RunFolder(folder)
    name = "best.pt" if run.holds("best.pt") else "ckpt.pt"
    if not run.holds(name):
        raise UserError(f"{run} holds no trained model (neither best.pt nor ckpt.pt)")
    checkpoint = run.load(name)
    with reading(run.path / name):
        if (mode := checkpoint["config"]["query_mode"]) not in QUERIES:
            problem = f"{run} has query_mode={mode}, which is not one of {', '.join(QUERIES)}; add it to model.py, or"
            raise UserError(f"{problem}, for one of study/queries.py, type: python -m study.queries sample {run}")
        model = GPT(GPTConfig(**checkpoint["config"]))
        model.load_state_dict(checkpoint["model"])
    return for_generation(model.to(device), dtype), checkpoint["tokenizer"]


def encode_prompt(prompt, tokenizer, block_size, holes=False):
    """The --prompt option -> token ids (1, T), 1 <= T <= block_size. None begins a new document, or a new line.

    holes: those in the prompt become the mask token, which is the first id beyond the tokenizer's.
    """
    if prompt is None and tokenizer.eot is not None and not holes:
        return torch.tensor([[tokenizer.eot]])
    data = b"\n" if prompt is None else prompt.encode(errors="surrogateescape")  # the bytes that were typed
    if prompt and prompt.startswith("FILE:"):
        data = Path(prompt.removeprefix("FILE:")).read_bytes()
    if not data:
        raise UserError("the prompt is empty; leave out --prompt to begin a new document")
    parts = [data]
    if holes:
        parts = data.split(b"<mask>" if b"<mask>" in data else b"_")
        if len(parts) == 1:
            raise UserError("this model is an encoder, and fills holes: give it a --prompt with <mask> or _ in it")
    try:
        ids = [tokenizer.encode(part).tolist() for part in parts]
    except UnicodeDecodeError:
        raise UserError(f"--prompt={prompt} is not UTF-8 text, which this run's tokens are made of") from None
    ids = torch.tensor([ids[0] + [i for part in ids[1:] for i in (tokenizer.vocab_size, *part)]])
    if ids.numel() > block_size:
        raise UserError(f"the prompt has {ids.numel():,} tokens, but this model sees {block_size:,} at most")
    return ids


def write(model, prompt, tokenizer, options):
    """Go on from the prompt (1, T), and print the texts."""
    generator = torch.Generator(prompt.device).manual_seed(options.seed)
    # Characters may be cut between tokens: a decoder holds back what is not complete yet.
    decoders = [codecs.getincrementaldecoder("utf-8")(errors="replace") for _ in range(options.num_samples)]
    begin = tokenizer.decode(prompt[0].tolist()) if options.prompt is not None else b""
    texts = [decoder.decode(begin) for decoder in decoders]
    print(texts[0], end="", flush=True)
    sampling = (options.max_new_tokens, options.temperature, options.top_k, options.top_p, generator)
    for tokens in model.generate_tokens(prompt.expand(options.num_samples, -1), *sampling):
        new = [decoder.decode(tokenizer.decode(ids)) for decoder, ids in zip(decoders, tokens.tolist())]
        print(new[0], end="", flush=True)  # the first is shown as it is written, the others when they are done
        texts = [text + more for text, more in zip(texts, new)]
    print()
    for text in texts[1:]:
        print("-" * 79, text, sep="\n")


@torch.inference_mode()
def fill(model, idx, mask, n_tokens):
    """Fill the holes of idx (1, T), where it is mask, with ids below n_tokens, the surest one first; the others are then
    looked at again -> (idx, {position of a hole: the probabilities (n_tokens,) when it was filled})."""
    idx, found = idx.clone(), {}
    while len(holes := (idx[0] == mask).nonzero().flatten()):
        probs = model(idx)[0][0, holes, :n_tokens].float().softmax(-1)  # (holes, n_tokens)
        surest = probs.amax(-1).argmax()
        position = holes[surest].item()
        found[position] = probs[surest]
        idx[0, position] = probs[surest].argmax()
    return idx, dict(sorted(found.items()))


def write_filled(model, prompt, tokenizer, options):
    """Fill the holes of the prompt (1, T); print the text, and for each hole the likeliest tokens as far as they fit."""
    idx, found = fill(model, prompt, tokenizer.vocab_size, len(tokenizer.pieces))
    print(tokenizer.decode(idx[0].tolist()).decode(errors="replace"))
    for number, probs in enumerate(found.values(), 1):
        line = f"hole {number:2}"
        for p, token in zip(*(values.tolist() for values in probs.topk(min(5, len(probs))))):
            candidate = f"  {tokenizer.pieces[token].decode(errors='backslashreplace')!r} {p:.1%}"
            line += candidate if len(line + candidate) <= 80 else ""
        print(line)


def read_options(argv):
    parser = Parser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("run", help="folder of a run, out/NAME")
    parser.add_argument("--prompt", help="text to go on from, or FILE:path; without it a new document begins")
    count = checked(int, lambda value: value >= 1, "is not 1 or above")
    parser.add_argument("--num_samples", type=count, default=3, help="how many texts")
    parser.add_argument("--max_new_tokens", type=count, default=500, help="length of each, in tokens")
    heat = checked(float, lambda value: value >= 0, "is not 0 or above")
    parser.add_argument("--temperature", type=heat, default=0.8, help="0 takes the likeliest token each time")
    parser.add_argument("--top_k", type=count, help="draw from the k likeliest tokens only")
    share = checked(float, lambda value: 0 < value <= 1, "is not in (0, 1]")
    parser.add_argument("--top_p", type=share, help="draw from the fewest tokens whose probabilities reach p")
    seed = checked(int, lambda value: 0 <= value < 2**63, "is not in [0, 2**63)")
    parser.add_argument("--seed", type=seed, default=1337, help="of the draws")
    parser.add_argument("--device", help="cpu, cuda, cuda:N or mps; without it the first there is of cuda, mps, cpu")
    parser.add_argument("--dtype", choices=FORMATS, help="of the weights; without it int8 on a CPU, float32 elsewhere")
    return parser.parse_args(argv)


def main(argv=None):
    options = read_options(argv)
    device = pick_device(options.device)
    model, tokenizer_spec = load_model(options.run, device, options.dtype or best_format(device))
    fills, defaults = not model.config.causal, read_options([options.run])
    if fills and (given := [name for name in OF_WRITING if getattr(options, name) != getattr(defaults, name)]):
        raise UserError(f"--{given[0]} has no meaning here: {options.run} is an encoder, which fills holes", status=2)
    tokenizer = load_tokenizer(tokenizer_spec)
    prompt = encode_prompt(options.prompt, tokenizer, model.config.block_size, holes=fills).to(device)
    (write_filled if fills else write)(model, prompt, tokenizer, options)
    return 0


if __name__ == "__main__":
    run_program(main)
