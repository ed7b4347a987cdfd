"""Measure this machine: python bench.py data

    data   OpenWebText's way from archives to tokens against tiktoken alone, its memory, and what the whole
           corpus would take

Everything that is compared runs in turns in one go; told are medians and, in brackets, the extremes.
"""

import argparse
import io
import lzma
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

from command import Parser, clock, run_program, short

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
        rate = min(per_core * number, ceiling)
        print(
            f"the whole corpus, {number:2} cores   {clock(CORPUS_TOKENS / rate)} at {short(rate)} tokens/s (projected)"
        )


def main(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["data"])
    parser.add_argument("--megabytes", type=int, default=400, help="data: of text, half of it in the first run")
    parser.add_argument("--repeats", type=int, default=3, help="turns")
    options = parser.parse_args(argv)
    if min(options.megabytes, options.repeats) < 1:
        parser.error("--megabytes and --repeats are at least 1")
    bench_data(options)


if __name__ == "__main__":
    run_program(main)
