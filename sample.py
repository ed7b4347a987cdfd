"""Let a trained model write: python sample.py out/NAME [--prompt=TEXT | --prompt=FILE:path] [...]"""

import argparse
import codecs
import sys
from pathlib import Path

import torch

from model import GPT, GPTConfig
from utils.checkpoint import RunFolder, fitting
from utils.device import pick_device
from utils.generation import for_generation
from utils.settings import Parser, UserError, run_program
from utils.tokenizers import load_tokenizer


def load_model(folder, device):
    """The run's best model, or its last where none is marked best -> (GPT ready to generate, its tokenizer's spec)."""
    run = RunFolder(folder)
    name = next((name for name in ("best.pt", "ckpt.pt") if run.holds(name)), None)
    if name is None:
        raise UserError(f"{run} holds no trained model (neither best.pt nor ckpt.pt)")
    checkpoint = run.load(name)
    with fitting(run.path / name):
        model = GPT(GPTConfig(**checkpoint["config"]))
        model.load_state_dict(checkpoint["model"])
    return for_generation(model.to(device)), checkpoint["tokenizer"]


def encode_prompt(prompt, tokenizer, block_size):
    """The --prompt option -> token ids (1, T), 1 <= T <= block_size. None begins a new document, or a new line."""
    if prompt is None and tokenizer.eot is not None:
        return torch.tensor([[tokenizer.eot]])
    data = b"\n" if prompt is None else prompt.encode(errors="surrogateescape")  # the bytes that were typed
    if prompt and prompt.startswith("FILE:"):
        try:
            data = Path(prompt.removeprefix("FILE:")).read_bytes()
        except OSError as e:
            raise UserError(f"--prompt={prompt}: {e.strerror}") from None
    if not data:
        raise UserError("the prompt is empty; leave out --prompt to begin a new document")
    try:
        ids = torch.tensor([tokenizer.encode(data).tolist()])
    except UnicodeDecodeError:
        raise UserError(f"--prompt={prompt} is not UTF-8 text, which this run's tokens are made of") from None
    if ids.size(1) > block_size:
        raise UserError(
            f"the prompt has {ids.size(1):,} tokens, but this model sees {block_size:,} at most; shorten it"
        )
    return ids


def read_options(argv):
    parser = Parser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("run", help="folder of a run, out/NAME")
    parser.add_argument("--prompt", help="text to go on from, or FILE:path; without it a new document begins")
    parser.add_argument("--num_samples", type=int, default=3, help="how many texts")
    parser.add_argument("--max_new_tokens", type=int, default=500, help="length of each, in tokens")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token each time")
    parser.add_argument("--top_k", type=int, help="draw from the k likeliest tokens only")
    parser.add_argument("--top_p", type=float, help="draw from the fewest tokens whose probabilities reach p")
    parser.add_argument("--seed", type=int, default=1337, help="of the draws")
    parser.add_argument("--device", help="cpu, cuda, cuda:N or mps; without it the first there is of cuda, mps, cpu")
    options = parser.parse_args(argv)
    ranges = {
        "num_samples": options.num_samples >= 1,
        "max_new_tokens": options.max_new_tokens >= 1,
        "seed": 0 <= options.seed < 2**63,
        "temperature": options.temperature >= 0,
        "top_k": options.top_k is None or options.top_k >= 1,
        "top_p": options.top_p is None or 0 < options.top_p <= 1,
    }
    for name, holds in ranges.items():
        if not holds:
            parser.error(f"--{name}={getattr(options, name)} is out of range")
    return options


def main(argv=None):
    options = read_options(argv)
    device = pick_device(options.device)
    model, tokenizer_spec = load_model(options.run, device)
    tokenizer = load_tokenizer(tokenizer_spec)
    prompt = encode_prompt(options.prompt, tokenizer, model.config.block_size).to(device)
    generator = torch.Generator(device).manual_seed(options.seed)
    sys.stdout.reconfigure(errors="replace")  # a terminal may lack a character
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
    return 0


if __name__ == "__main__":
    run_program(main)
