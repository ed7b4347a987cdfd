"""Measure this machine: python bench.py train | sample | data

    train    steps of training in the three query modes: tokens/s, share of what the machine's matrix products
             reach, memory, the time of the first step, and what the paper's run would take
    sample   greedy generation in the three query modes
    data     OpenWebText's way from archives to tokens against tiktoken alone, its memory, and what the whole
             corpus would take

--peer adds Hugging Face's GPT2LMHeadModel of the same shape (pip install transformers). All that is compared
runs in turns in one go, after a warm-up; told are medians and, in brackets, the extremes.
"""

import argparse
import io
import lzma
import multiprocessing
import os
import random
import statistics
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np

from command import Parser, UserError, clock, run_program, short

SHAPES = {
    "small": dict(n_layer=6, n_head=6, n_embd=384, block_size=256, vocab_size=65),
    "gpt3_small": dict(n_layer=12, n_head=12, n_embd=768, block_size=1024, vocab_size=50304),
}
PEER = "GPT2LMHeadModel"
PAPER_TOKENS = 60_002 * 480 * 1024
CORPUS_TOKENS = 9_040_017_095  # OpenWebText
DOCUMENTS_IN_A_MEMBER = 390  # as there


def timed(function):
    """Seconds that function() takes, and what it returns."""
    started = time.perf_counter()
    result = function()
    return time.perf_counter() - started, result


def spread(values, form=short):
    return f"{form(statistics.median(values))} ({form(min(values))} to {form(max(values))})"


# ---------------------------------------------------------------------------------------------------
# train and sample. Torch is imported within, so that `data` measures a process without it.


def build(name, options):
    """A model of a query mode, or the peer, on its device."""
    import torch

    from model import GPT, GPTConfig

    if name != PEER:
        return GPT(GPTConfig(query_mode=name, **SHAPES[options.shape])).to(options.device)
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError:
        raise UserError("--peer needs the package transformers: pip install transformers") from None

    class Peer(torch.nn.Module):
        """The peer behind this project's interface."""

        def __init__(self, n_layer, n_head, n_embd, block_size, vocab_size):
            super().__init__()
            shape = dict(n_layer=n_layer, n_head=n_head, n_embd=n_embd, n_positions=block_size, vocab_size=vocab_size)
            no_dropout = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
            self.gpt2 = GPT2LMHeadModel(GPT2Config(**shape, **no_dropout, bos_token_id=None, eos_token_id=None))

        def forward(self, x, y):
            return None, self.gpt2(input_ids=x, labels=x, use_cache=False).loss

        def for_generation(self):
            return self.eval()

        def generate(self, idx, n, temperature):
            options = dict(max_new_tokens=n, do_sample=False, pad_token_id=0)
            return self.gpt2.generate(idx, attention_mask=torch.ones_like(idx), **options)

    return Peer(**SHAPES[options.shape]).to(options.device)


class Training:
    """Steps of train.py, of a query mode or of the peer, on random tokens."""

    def __init__(self, name, options):
        import torch

        import train

        flags = [
            f"--{key}={getattr(options, key)}" for key in ("device", "batch_size", "compile") if getattr(options, key)
        ]
        flags += [f"--dtype={options.dtype}"] if options.dtype else []
        settings, _ = train.read_command(["--gradient_accumulation_steps=1", *flags])
        self.settings, self.steps = train.resolve(settings), 0
        if self.settings.device.startswith("cuda"):
            torch.set_float32_matmul_precision("high")  # as train.py does
        self.model, self.train_step = build(name, options), train.train_step
        self.data = train.Data("random", SHAPES[options.shape]["block_size"])
        self.optimizer = train.make_optimizer(self.model, self.settings)
        self.scaler = torch.amp.GradScaler(options.device.split(":")[0], enabled=self.settings.dtype == "float16")
        if self.settings.compile and (name != PEER or self.settings.device.startswith("cuda")):
            self.model.compile()  # as users of the peer do: not on a CPU

    def run(self, steps):
        for _ in range(steps):
            loss, _ = self.train_step(self.model, self.optimizer, self.scaler, self.data, self.settings, self.steps)
            self.steps += 1
        return loss.item()  # waits for the device


def write_random_tokens(folder, vocab_size):
    import json

    (folder / "random").mkdir()
    tokens = np.random.default_rng(0).integers(0, vocab_size, 1 << 20).astype(np.uint16)
    meta = {"vocab_size": vocab_size, "dtype": "uint16", "source": "random", "tokenizer": {"kind": "none"}}
    for split in ("train", "val"):
        tokens.tofile(folder / "random" / f"{split}.bin")
        meta[split] = {"tokens": len(tokens), "text_bytes": len(tokens), "sha256": ""}
    (folder / "random" / "meta.json").write_text(json.dumps(meta))


def alone(name, options):
    """In a process of its own: seconds to the end of the first step, peak memory in bytes."""
    import prepare_data
    from machine import peak_memory

    prepare_data.DATA_DIR = options.data_dir
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(options.data_dir / name)  # nothing compiled before
    training = Training(name, options)
    first, _ = timed(lambda: training.run(1))
    training.run(2)
    return first, peak_memory(training.settings.device)


def matmul_flops(device, dtype):
    """Operations a second of large matrix products."""
    import torch

    n = 8192 if device.startswith("cuda") else 2048
    a = torch.randn(n, n, device=device, dtype=getattr(torch, dtype))
    (a @ a)[0, 0].item()  # warm-up
    seconds, _ = timed(lambda: [a @ a for _ in range(4)][-1][0, 0].item())
    return 4 * 2 * n**3 / seconds


def bench_train(options):
    import torch

    import machine
    import prepare_data
    from model import QUERIES

    names = [*QUERIES, *([PEER] if options.peer else [])]
    with tempfile.TemporaryDirectory() as folder:
        options.data_dir = prepare_data.DATA_DIR = Path(folder)
        write_random_tokens(options.data_dir, SHAPES[options.shape]["vocab_size"])
        first, memory = {}, {}
        for name in names:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                first[name], memory[name] = pool.apply(alone, (name, options))
        trainings = {name: Training(name, options) for name in names}
        s = trainings["linear"].settings
        tokens = s.batch_size * SHAPES[options.shape]["block_size"]
        print(f"train: {options.shape} {SHAPES[options.shape]}, batch {s.batch_size}")
        compiled = "compiled" if s.compile else "not compiled"
        print(f"{machine.device_name(s.device)}, {s.dtype}, {compiled}, torch {torch.__version__}", flush=True)
        for training in trainings.values():
            training.run(3)
        steps = max(1, round(options.seconds / timed(lambda: trainings["linear"].run(1))[0]))
        rates, peaks = {name: [] for name in names}, []
        for _ in range(options.repeats):
            peaks.append(matmul_flops(s.device, s.dtype))
            for name, training in trainings.items():
                rates[name].append(steps * tokens / timed(lambda: training.run(steps))[0])
        offsets, step_seconds = np.arange(s.batch_size), tokens / statistics.median(rates["linear"])
        data = trainings["linear"].data
        batch = statistics.median(timed(lambda: data.batch("train", offsets, 1 << 20, s.device))[0] for _ in range(50))
        if options.profile:
            profile(trainings["nonlinear"])
    print(f"{'':15} {'tokens/s':26} {'step':>10} {'of matmul':>9} {'first step':>10} {'memory':>7}")
    for name in names:
        flops = trainings[name if name in QUERIES else "linear"].model.flops_per_token()
        share = statistics.median(rate * flops / peak for rate, peak in zip(rates[name], peaks))
        step = statistics.median(mine / other for mine, other in zip(rates["linear"], rates[name]))
        tail = f"{step:9.3f}x {share:9.0%} {first[name]:9.1f}s {short(memory[name]):>6}B"
        print(f"{name:15} {spread(rates[name]):26} {tail}")
    print(f"matrix products alone: {spread(peaks)}FLOP/s; a batch takes {batch / step_seconds:.2%} of a linear step")
    if options.shape == "gpt3_small":
        for name in QUERIES:
            hours = PAPER_TOKENS / statistics.median(rates[name]) / 3600
            print(f"the paper's run, {name}: {PAPER_TOKENS / 1e9:.1f} billion tokens in {hours:,.0f} hours (projected)")


def profile(training):
    """Where a step's time goes, by operation."""
    import torch

    cuda = training.settings.device.startswith("cuda")
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * cuda
    with torch.profiler.profile(activities=activities) as p:
        training.run(5)
    print(
        p.key_averages().table(
            sort_by=f"self_{'cuda' if cuda else 'cpu'}_time_total", row_limit=15, max_name_column_width=40
        )
    )


def bench_sample(options):
    import torch

    import machine
    from model import QUERIES

    names = [*QUERIES, *([PEER] if options.peer else [])]
    models = {name: build(name, options).for_generation() for name in names}
    prompt = torch.zeros(options.batch_size, 1, dtype=torch.long, device=options.device)
    print(
        f"sample: {options.shape} {SHAPES[options.shape]}, batch {options.batch_size}, {options.new_tokens} tokens each"
    )
    print(f"{machine.device_name(options.device)}, float32, torch {torch.__version__}")
    rates = {name: [] for name in names}
    for turn in range(options.repeats + 1):
        for name, model in models.items():
            seconds, out = timed(lambda: model.generate(prompt, options.new_tokens, temperature=0).cpu())
            assert out.size(1) == 1 + options.new_tokens
            if turn:  # the first is the warm-up
                rates[name].append(options.batch_size * options.new_tokens / seconds)
    for name in names:
        against = statistics.median(mine / other for mine, other in zip(rates[name], rates["linear"]))
        print(f"{name:15} {spread(rates[name]):26} tokens/s {against:6.2f} of linear")


# ---------------------------------------------------------------------------------------------------
# data


def real_text(megabytes):
    """Documents of OpenWebText's mean length, cut at random from the texts that come with this Python."""
    folders = [Path(sysconfig.get_path("stdlib")), Path(sysconfig.get_path("purelib"))]
    files = sorted(
        {path for folder in folders for kind in ("py", "txt", "rst", "md") for path in folder.rglob(f"*.{kind}")}
    )
    rng, source, size = random.Random(0), [], 0
    rng.shuffle(files)
    for path in files:
        if size > 60e6:
            break
        text = path.read_bytes().decode(errors="ignore")
        source.append(text)
        size += len(text)
    source, documents, size = "".join(source), [], 0
    while size < megabytes * 1e6:
        length = min(int(rng.lognormvariate(8.0, 1.0)), 100_000)
        start = rng.randrange(len(source) - length)
        documents.append(source[start : start + length])
        size += length
    return documents


def write_archive(path, documents):
    """Documents as an archive of the corpus."""
    with tarfile.open(path, "w") as archive:
        for first in range(0, len(documents), DOCUMENTS_IN_A_MEMBER):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as member:
                for i, text in enumerate(documents[first : first + DOCUMENTS_IN_A_MEMBER], first):
                    add(member, f"{i}.txt", text.encode())
            add(archive, f"{first}.xz", lzma.compress(inner.getvalue(), preset=1))


def add(archive, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


PREPARE = """
import pathlib, re, sys
sys.path.insert(0, sys.argv.pop(1))
import prepare_data
prepare_data.main(sys.argv[1:])
print(re.search(r"VmHWM:\\s*(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1])
"""


def prepare(folder, shards):
    """Run the program -> (seconds, peak resident bytes, as Linux counts them for a process alone)."""
    arguments = [str(Path(__file__).parent), "openwebtext", f"--shards={shards}", "--source=archives"]
    command = [sys.executable, "-c", PREPARE, *arguments]
    seconds, done = timed(lambda: subprocess.run(command, cwd=folder, capture_output=True, text=True))
    if done.returncode:
        sys.exit(f"bench.py: prepare_data.py failed: {done.stderr}")
    return seconds, int(done.stdout.split()[-1]) * 1024


def python_alone(folder, tokenizer):
    """Seconds of one archive's work during which Python's lock is held: all but decompression and tokenizing."""
    import openwebtext

    class StandIn:
        eot, encode = tokenizer.eot, staticmethod(lambda text: tokens)

    tokens = np.zeros(1100, np.uint16)
    members = [data for _, data in openwebtext.members(folder / "archives" / "urlsf_subset03.tar")]
    seconds, _ = timed(lambda: [openwebtext.tokenize_member(None, "", data, StandIn) for data in members])
    return seconds - timed(lambda: [lzma.decompress(data) for data in members])[0]


def bench_data(options):
    import shutil

    import openwebtext
    from tokenizer import GPT2Tokenizer

    tokenizer, cores = GPT2Tokenizer(True), openwebtext.n_threads()
    documents = real_text(options.megabytes)
    n = len(documents)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / "archives").mkdir()
        for shard, part in ((3, documents[: n // 2]), (4, documents[n // 2 :])):  # of these no sum is published
            write_archive(folder / "archives" / f"urlsf_subset{shard:02d}.tar", part)
        n_tokens = sum(len(tokenizer.encode(text.encode())) + 1 for text in documents)
        print(f"{options.megabytes} MB of text, {n:,} documents, {n_tokens:,} tokens; {cores} cores", flush=True)

        def tiktoken_alone(threads):
            for first in range(0, n, 2000):  # all at once, its lists of Python integers would fill the memory
                tokenizer.bpe.encode_ordinary_batch(documents[first : first + 2000], num_threads=threads)

        rates = {"one thread": [], "all cores": [], "ours": []}
        memory = {"3": [], "3-4": []}
        for _ in range(options.repeats):
            rates["one thread"].append(n_tokens / timed(lambda: tiktoken_alone(1))[0])
            rates["all cores"].append(n_tokens / timed(lambda: tiktoken_alone(cores))[0])
            for shards in memory:
                seconds, peak = prepare(folder, shards)
                memory[shards].append(peak)
                shutil.rmtree(folder / "data")
            rates["ours"].append(n_tokens / seconds)
        held = python_alone(folder, tokenizer)
    print(f"tiktoken, one thread         {spread(rates['one thread'])} tokens/s")
    print(f"tiktoken, batch, all cores   {spread(rates['all cores'])} tokens/s")
    print(f"prepare_data.py openwebtext  {spread(rates['ours'])} tokens/s, all of it: start, unpacking, gathering")
    ratios = [ours / theirs for ours, theirs in zip(rates["ours"], rates["all cores"])]
    print(f"against tiktoken's batch     {spread(ratios, '{:.2f}'.format)}")
    half, full = (max(peaks) for peaks in memory.values())
    print(f"peak memory                  {short(half)}B for half of it, {short(full)}B for all")
    ceiling, per_core = n_tokens / 2 / held, statistics.median(rates["ours"]) / cores
    print(f"Python's lock allows         {short(ceiling)} tokens/s, whatever the number of cores")
    for number in (2, 16, 64):
        rate = min(per_core * min(number, openwebtext.MAX_THREADS), ceiling)
        print(
            f"the whole corpus, {number:2} cores   {clock(CORPUS_TOKENS / rate)} at {short(rate)} tokens/s (projected)"
        )


def read_options(argv):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["train", "sample", "data"])
    parser.add_argument("--shape", choices=SHAPES, default="small", help="train, sample: of the model")
    parser.add_argument("--peer", action="store_true", help="train, sample: compare with transformers' GPT-2")
    parser.add_argument("--batch_size", type=int, help="train, sample: sequences at a time; default 8, 1")
    parser.add_argument("--device", help="train, sample: cpu, cuda, cuda:N or mps; default the first there is")
    parser.add_argument("--dtype", help="train: float32, bfloat16 or float16; default as train.py")
    parser.add_argument("--compile", help="train: true or false; default as train.py")
    parser.add_argument("--profile", action="store_true", help="train: where the nonlinear step's time goes")
    parser.add_argument("--new_tokens", type=int, default=240, help="sample: length")
    parser.add_argument("--seconds", type=float, default=1.0, help="train: about the length of a turn")
    parser.add_argument("--megabytes", type=int, default=400, help="data: of text, half of it in the first run")
    parser.add_argument("--repeats", type=int, default=9, help="turns")
    options = parser.parse_args(argv)
    for name in ("batch_size", "new_tokens", "megabytes", "repeats"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name}={value} must be at least 1")
    block_size = SHAPES[options.shape]["block_size"]
    if options.new_tokens >= block_size:
        parser.error(f"--new_tokens={options.new_tokens} must be below the block_size of {block_size}")
    return options


def main(argv=None):
    options = read_options(argv)
    if options.what == "data":
        return bench_data(options)
    from machine import pick_device

    options.device = pick_device(options.device)
    options.batch_size = options.batch_size or (8 if options.what == "train" else 1)
    return bench_train(options) if options.what == "train" else bench_sample(options)


if __name__ == "__main__":
    run_program(main)
