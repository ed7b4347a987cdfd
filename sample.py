"""Let a trained model write: python sample.py out/NAME [--prompt=TEXT | --prompt=FILE:path] [...]

An encoder fills in masked tokens instead: each <mask> in the prompt is one token.
"""

import codecs
import sys
from pathlib import Path

import torch

from model import GPT, GPTConfig
from utils.checkpoint import RunFolder
from utils.device import pick_device
from utils.generation import FORMATS, for_generation, generate_tokens
from utils.options import checked, count
from utils.settings import Parser, UserError, run_program
from utils.tokenizers import load_tokenizer


def load_model(folder, device, dtype=None):
    """The best model of a run, or its last one -> (GPT ready to generate, spec of its tokenizer).

    dtype: see for_generation. UserError where there is no model, or its query is unknown.
    """
    run = RunFolder(folder)
    name = "best.pt" if run.holds("best.pt") else "ckpt.pt"
    if not run.holds(name):
        raise UserError(f"{folder} holds no trained model (neither best.pt nor ckpt.pt)")
    checkpoint = run.load(name)
    try:
        model = GPT(GPTConfig(**checkpoint["config"]))
    except ValueError as e:
        hint = f"for one of study/queries.py: python -m study.queries sample {folder}"
        raise UserError(f"{folder}: {e}; {hint}") from None
    model.load_state_dict(checkpoint["model"])
    return for_generation(model.to(device), dtype), checkpoint["tokenizer"]


def encode_prompt(prompt, tokenizer, block_size, is_encoder=False):
    """The --prompt option -> token ids (1, T), 1 <= T <= block_size.

    None begins a new document, or a new line where the data had a single document.
    For an encoder, <mask> becomes the mask token, the first id beyond the tokenizer's.
    """
    if prompt is None and tokenizer.eot is not None and not is_encoder:
        return torch.tensor([[tokenizer.eot]])
    text = b"\n" if prompt is None else prompt.encode(errors="surrogateescape")  # bytes as typed
    if prompt and prompt.startswith("FILE:"):
        text = Path(prompt.removeprefix("FILE:")).read_bytes()
    if not text:
        raise UserError("the prompt is empty; leave out --prompt to begin a new document")
    parts = [text]
    if is_encoder:
        parts = text.split(b"<mask>")
        if len(parts) == 1:
            raise UserError("this model is an encoder: it needs a --prompt with <mask> in it")
    try:
        ids = tokenizer.encode(parts[0]).tolist()
        for part in parts[1:]:
            ids += [tokenizer.vocab_size, *tokenizer.encode(part).tolist()]
    except UnicodeDecodeError:
        raise UserError(f"--prompt={prompt} is not UTF-8 text, as this run's tokens are") from None
    if len(ids) > block_size:
        raise UserError(f"the prompt has {len(ids):,} tokens, but the model sees {block_size:,}")
    return torch.tensor([ids])


def write(model, prompt, tokenizer, options):
    """Continue the prompt (1, T), and print the texts."""
    generator = torch.Generator(prompt.device).manual_seed(options.seed)
    start = tokenizer.decode(prompt[0].tolist()) if options.prompt is not None else b""
    # A character may span several tokens: a decoder waits until it is complete.
    make_decoder = codecs.getincrementaldecoder("utf-8")
    decoders = [make_decoder(errors="replace") for _ in range(options.num_samples)]
    texts = [decoder.decode(start) for decoder in decoders]
    print(texts[0], end="", flush=True)
    sampling = (options.max_new_tokens, options.temperature, options.top_k, options.top_p)
    prompts = prompt.expand(options.num_samples, -1)
    for tokens in generate_tokens(model, prompts, *sampling, generator):
        for row, ids in enumerate(tokens.tolist()):
            new = decoders[row].decode(tokenizer.decode(ids))
            texts[row] += new
            if row == 0:  # print the first text while it is written, and the others at the end
                print(new, end="", flush=True)
    print()
    for text in texts[1:]:
        print("-" * 79, text, sep="\n")


@torch.inference_mode()
def fill(model, idx, mask, n_tokens):
    """Replace each mask in idx (1, T) by an id below n_tokens.

    The most certain one comes first, and the others are then predicted again.
    -> (idx, {position of a mask: the probabilities (n_tokens,) when it was replaced})
    """
    idx = idx.clone()
    predicted = {}
    while len(masked := (idx[0] == mask).nonzero().flatten()):
        logits = model(idx)[0, masked, :n_tokens]
        probs = logits.float().softmax(-1)  # (number of masks, n_tokens)
        surest = probs.amax(-1).argmax()
        position = masked[surest].item()
        predicted[position] = probs[surest]
        idx[0, position] = probs[surest].argmax()
    return idx, dict(sorted(predicted.items()))


def write_filled(model, prompt, tokenizer, options):
    """Fill in the prompt (1, T); print the text, and the most likely tokens of each mask."""
    idx, predicted = fill(model, prompt, tokenizer.vocab_size, len(tokenizer.pieces))
    print(tokenizer.decode(idx[0].tolist()).decode(errors="replace"))
    for number, probs in enumerate(predicted.values(), 1):
        line = f"mask {number:2}"
        top = probs.topk(min(5, len(probs)))
        for p, token in zip(top.values.tolist(), top.indices.tolist()):
            candidate = f"  {tokenizer.pieces[token].decode(errors='backslashreplace')!r} {p:.1%}"
            if len(line + candidate) <= 80:
                line += candidate
        print(line)


def read_options(argv):
    parser = Parser(description=__doc__)
    non_negative = checked(float, lambda value: value >= 0, "is not 0 or above")
    share = checked(float, lambda value: 0 < value <= 1, "is not in (0, 1]")
    seed = checked(int, lambda value: 0 <= value < 2**63, "is not in [0, 2**63)")
    add = parser.add_argument
    add("run", help="folder of a run, out/NAME")
    add("--prompt", help="text to continue, or FILE:path; without it a new document begins")
    add("--num_samples", type=count, default=3, help="number of texts (3)")
    add("--max_new_tokens", type=count, default=500, help="length of each, in tokens (500)")
    add("--temperature", type=non_negative, default=0.8, help="0 takes the likeliest token (0.8)")
    add("--top_k", type=count, help="draw from the k most likely tokens only")
    add("--top_p", type=share, help="draw from the fewest tokens whose probabilities sum to p")
    add("--seed", type=seed, default=1337, help="of the draws (1337)")
    add("--device", help="cpu, cuda, cuda:N or mps; without it the first of cuda, mps, cpu")
    formats = "of the weights; without it int8 for a large model on a CPU, else float32"
    add("--dtype", choices=FORMATS, help=formats)
    return parser.parse_args(argv)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    options = read_options(argv)
    model, spec = load_model(options.run, pick_device(options.device), options.dtype)
    tokenizer = load_tokenizer(spec)
    is_encoder = not model.config.causal
    prompt = encode_prompt(options.prompt, tokenizer, model.config.block_size, is_encoder)
    prompt = prompt.to(next(model.parameters()).device)
    (write_filled if is_encoder else write)(model, prompt, tokenizer, options)
    return 0


if __name__ == "__main__":
    run_program(main)
