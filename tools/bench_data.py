"""The parts of tools/bench.py without torch, among them OpenWebText's way from an archive to tokens."""

import io
import lzma
import re
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import numpy as np

from prepare_data import find_documents
from utils import openwebtext
from utils.settings import clock, short
from utils.tokenizers import GPT2Tokenizer

ROOT = Path(__file__).parent.parent
DOCUMENTS_IN_A_MEMBER = 390  # as in the corpus


def timed(function, *arguments):
    """Call a function -> the seconds that it took, and what it returned."""
    started = time.perf_counter()
    result = function(*arguments)
    return time.perf_counter() - started, result


def spread(values):
    return f"{short(median(values))} ({short(min(values))} to {short(max(values))})"


def random_tokens(shape):
    """Random tokens, with what train.py needs of a Dataset."""
    tokens = np.random.default_rng(0).integers(0, shape["vocab_size"], 2**20, np.uint16)
    return SimpleNamespace(**shape, tokens=lambda split: tokens, n_tokens=lambda split: len(tokens))


def cut_documents(megabytes):
    """Texts about as long as the corpus's, cut at random from the source of Python's standard library."""
    files = find_documents(Path(sysconfig.get_path("stdlib")), "*.py", skip={"site-packages", "dist-packages"})
    source = "".join(file.read().decode(errors="ignore") for file in files)
    rng, documents, size = np.random.default_rng(0), [], 0
    while size < megabytes * 1e6:
        start, length = rng.integers(len(source)), int(rng.lognormal(8.0, 1.0))
        documents.append(source[start : start + length])
        size += len(documents[-1])
    return documents


def tar(files):
    """{name: bytes} -> the bytes of a tar archive."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def make_archive(documents):
    """Documents as an archive of the corpus: a tar of xz-compressed tars."""
    members = {}
    for first in range(0, len(documents), DOCUMENTS_IN_A_MEMBER):
        part = documents[first : first + DOCUMENTS_IN_A_MEMBER]
        texts = {f"{number}.txt": text.encode() for number, text in enumerate(part)}
        members[f"{first}.xz"] = lzma.compress(tar(texts), preset=1)
    return tar(members)


def prepare(folder):
    """To be called in a fresh process: seconds from archive to finished files, and peak memory in bytes (on Linux)."""
    with tempfile.TemporaryDirectory(dir=folder) as data_dir:
        seconds, _ = timed(openwebtext.prepare, Path(data_dir), range(3, 4), None, folder, False)
    # Not getrusage, whose peak includes the process that started this one.
    return seconds, 1024 * int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1])


def bench_data(megabytes, repeats):
    """What the program reaches against tiktoken's own batch call with as many threads, and what the corpus takes."""
    documents, threads, bpe = cut_documents(megabytes), openwebtext.n_threads(), GPT2Tokenizer(True).bpe

    def tokenize():  # a part at a time: the lists of Python integers would fill the memory
        parts = (documents[first : first + 2000] for first in range(0, len(documents), 2000))
        return sum(len(ids) + 1 for part in parts for ids in bpe.encode_ordinary_batch(part, num_threads=threads))

    alone, rates, peaks = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "urlsf_subset03.tar").write_bytes(make_archive(documents))  # of number 3 no sum is published
        for _ in range(repeats):
            seconds, n_tokens = timed(tokenize)
            alone.append(n_tokens / seconds)
            code = f"from tools.bench_data import prepare; print(*prepare({folder!r}))"
            done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
            seconds, peak = map(float, done.stdout.split()[-2:])
            rates.append(n_tokens / seconds)
            peaks.append(peak)
    print(f"data: {megabytes:g} MB of Python source, {len(documents):,} documents, {n_tokens:,} tokens")
    print(f"tiktoken's batch call        {spread(alone)} tokens/s with {threads} threads")
    print(f"prepare_data.py openwebtext  {spread(rates)} tokens/s, peak memory {short(max(peaks))}B")
    print(f"against tiktoken             {spread([ours / theirs for ours, theirs in zip(rates, alone)])}")
    for cores in (2, 16):
        rate = median(rates) / threads * cores
        projected = f"{clock(openwebtext.PUBLISHED['tokens'] / rate)} at {short(rate)} tokens/s (projected)"
        print(f"the whole corpus, {cores:2} cores   {projected}")
