"""Let a trained model write: python sample.py out/NAME [--prompt=TEXT | --prompt=FILE:path] [...]"""

import argparse
import codecs
import sys
from pathlib import Path

import torch

from model import GPT, GPTConfig
from utils.checkpoint import RunFolder, reading
from utils.device import pick_device
from utils.generation import FORMATS, best_format, for_generation
from utils.settings import Parser, UserError, checked, run_program
from utils.tokenizers import load_tokenizer


def load_model(folder, device, dtype="float32"):
    """The run's best model, or its last where none is marked best -> (GPT ready to generate, its tokenizer's spec)."""
    run = RunFolder(folder)
    name = "best.pt" if run.holds("best.pt") else "ckpt.pt"
    if not run.holds(name):
        raise UserError(f"{run} holds no trained model (neither best.pt nor ckpt.pt)")
    checkpoint = run.load(name)
    with reading(run.path / name):
        model = GPT(GPTConfig(**checkpoint["config"]))
        model.load_state_dict(checkpoint["model"])
    return for_generation(model.to(device), dtype), checkpoint["tokenizer"]


def encode_prompt(prompt, tokenizer, block_size):
    """The --prompt option -> token ids (1, T), 1 <= T <= block_size. None begins a new document, or a new line."""
    if prompt is None and tokenizer.eot is not None:
        return torch.tensor([[tokenizer.eot]])
    data = b"\n" if prompt is None else prompt.encode(errors="surrogateescape")  # the bytes that were typed
    if prompt and prompt.startswith("FILE:"):
        data = Path(prompt.removeprefix("FILE:")).read_bytes()
    if not data:
        raise UserError("the prompt is empty; leave out --prompt to begin a new document")
    try:
        ids = torch.tensor([tokenizer.encode(data).tolist()])
    except UnicodeDecodeError:
        raise UserError(f"--prompt={prompt} is not UTF-8 text, which this run's tokens are made of") from None
    if ids.numel() > block_size:
        raise UserError(f"the prompt has {ids.numel():,} tokens, but this model sees {block_size:,} at most")
    return ids


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
    parser.add_argument("--dtype", choices=FORMATS, help="of the weights; without it int8 on a CPU, bfloat16 on CUDA")
    return parser.parse_args(argv)


def main(argv=None):
    options = read_options(argv)
    device = pick_device(options.device)
    model, tokenizer_spec = load_model(options.run, device, options.dtype or best_format(device))
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
