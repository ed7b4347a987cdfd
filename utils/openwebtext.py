"""OpenWebText: from its archives on the Hugging Face hub to token files in the order that nanoGPT and the paper use.

The corpus is 21 tar archives of xz-compressed tar archives of text documents. Each archive is downloaded, tokenized
and deleted; its tokens are appended to a file in data/openwebtext.parts, from which the documents are gathered in the
order of a fixed random permutation. The program may be killed at any time: what is finished is not done again.
"""

import collections
import hashlib
import io
import json
import lzma
import math
import os
import re
import shutil
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
from requests import RequestException
from urllib3.exceptions import HTTPError

from utils import download
from utils.download import tqdm
from utils.files import locked, new_file
from utils.settings import UserError, short
from utils.tokenizers import GPT2Tokenizer

HUB, REPOSITORY = "https://huggingface.co", "datasets/Skylion007/openwebtext"
REVISION = "f3808c30e817981b845ec549c43e82bb467d8144"  # the last one with these archives
PARQUET_REVISION = "79d93d786212f7344586290adb811d4ae6a1762c"  # a later one, with the same text in other files
N_SHARDS = 21
SHA256 = {  # of the archives; the others' were never published
    0: "cba8c76f8a27ea1d0d1430cfed59a84dc812e29d0e999d10305bc49848cd7127",
    1: "83891be18f14e9e2e7c7e7604c67f8ac44571f71bec34a6d57fe76e4bfe77c4c",
    2: "9f6bfb3408b3aec9d22ef18ac84ee0fe34c8555366f9074a733dfa68d9ebf2d1",
    7: "d78f0c0d2890a20fa1f9f00d92959e1c450fe6b8c879e0596cccad9bc7aba17f",
    8: "17fecd74d654807b09d2b3328b8b71c050f2879bbe0f3514874be7f2fd3732ed",
    9: "65368771304487ba42d432d281d31e061679ceef5d05a4d0a9b3a0fae4add14f",
    10: "d06538c4ca1a1558c2d9305b86d853908c4ba5937e93e1ac74e57c32dfca8154",
    12: "87619da8dfea1e843ff9644a08c52ce64bcb269383e1d22ac77483b65a5609cb",
    16: "d0d3f20835741ce54d28577793c1f9adbd22d9c6593db55651d6f380c121e801",
    17: "e0c20956c68bcba2a6cff7724db1a7c305c64a54f55ca5612f026beee51baa66",
    19: "dfd91671633113ac5246334e217560ac57facb7e9353df5a56724c50a4e5c976",
    20: "1bc38f227abde149dbaee01e24eace67b534c1392b90655195f650b2b979ba52",
}
# The whole corpus, as others report it who read the same archives in the same order.
ORDER_SHA256 = "713795c9660553b17cc384b3c0d72c0328090f1926873b034ce38fe506e0655e"
PUBLISHED = {"documents": 8_013_769, "tokens": 9_040_017_095, "order": ORDER_SHA256}
TRAIN_TOKENS, FIRST_TRAIN_TOKENS = 9_035_582_489, [8585, 262, 1772, 25, 25334, 8120, 17, 43959, 44947, 318]

TOKEN_BYTES_PER_ARCHIVE_BYTE = 1.5  # 18.1 GB / 12.9 GB = 1.4, and a margin
MEMBER_BYTES = 1 << 28  # an inner archive that unpacks to more is refused; the true ones have some 2 MB
MAX_THREADS = 16  # more would only wait: a twentieth of the work holds Python's lock
GATHER_TOKENS = 1 << 24  # gathered in memory at a time


def prepare(data_dir, shards, mirror, source, keep):
    """Write data_dir/openwebtext, or openwebtext_A-B where shards, a range of archive numbers, is a part of the corpus.

    mirror: address to ask instead of the hub's; source: folder of the archives, where they are not to be downloaded.
    """
    name, parts, whole = "openwebtext", data_dir / "openwebtext.parts", len(shards) == N_SHARDS
    if not whole:
        name += f"_{shards[0]}" + (f"-{shards[-1]}" if len(shards) > 1 else "")
    target, work = data_dir / name, parts / name
    if target.exists():
        raise UserError(f"{target} exists already; delete it to prepare it anew")
    tokenizer = GPT2Tokenizer(has_eot=True)
    try:
        with locked(parts):
            corpus = tokenize_archives(work, shards, tokenizer, mirror, source, keep)
            gather(work, corpus, whole, tokenizer, target)
            shutil.rmtree(work)
    except (RequestException, HTTPError) as e:
        cause = str(e).rpartition("Caused by ")[2][:200]  # requests puts a long address before it
        hint = f"try again, another --mirror, or --source (no parquet files, as in revision {PARQUET_REVISION})"
        raise UserError(f"{mirror or HUB}: {cause}; {hint}") from None
    except (KeyboardInterrupt, OSError):
        print(f"\nstopped; what is finished is kept in {parts}, and the same command goes on", flush=True)
        raise


class Archive:
    """One of the 21 archives: its path on this disk, its size in bytes, and its sha256 where it is known."""

    def __init__(self, number, parts, mirror, source):
        name = f"urlsf_subset{number:02d}.tar"
        self.path, self.url, announced = Path(source or parts) / name, None, None
        if not source:
            self.url = f"{(mirror or HUB).rstrip('/')}/{REPOSITORY}/resolve/{REVISION}/subsets/{name}"
            self.size, announced = download.announced(self.url)
        elif self.path.is_file():
            self.size = self.path.stat().st_size
        else:
            raise UserError(f"--source {source} holds no {name}")
        self.sha256 = SHA256.get(number) or announced

    def fetch(self, room):
        """Download the archive and check its sha256, when room, a semaphore, lets us -> the archive."""
        room.acquire()
        if self.url:
            download.fetch(self.url, self.path, self.size)
        found = hashlib.sha256()
        with open(self.path, "rb") as f:
            while block := f.read(1 << 20):
                found.update(block)
        expected, self.sha256 = self.sha256, found.hexdigest()
        if expected not in (None, self.sha256):
            if self.url:
                self.path.unlink()  # so that the same command downloads it anew
            raise UserError(f"{self.path} has sha256 {self.sha256}, not {expected}; fetch it anew")
        return self


def tokenize_archives(work, shards, tokenizer, mirror, source, keep):
    """Append to work/tokens (uint16) the documents of the archives that are not done yet, and to work/lengths
    (uint32, two a document) their tokens and bytes of text -> which archives, documents and tokens there are.
    """
    corpus, record = {"archives": [], "documents": 0, "tokens": 0}, work / "corpus.json"
    if record.exists():
        try:
            corpus = json.loads(record.read_text(encoding="utf-8"))
        except ValueError as e:
            raise UserError(f"{record} is damaged ({e}); delete {work} to begin anew") from None
    archives = [Archive(number, work.parent, mirror, source) for number in shards[len(corpus["archives"]) :]]
    check_space(work.parent, archives, 2 * corpus["tokens"], 0 if source else len(archives) if keep else 2)
    work.mkdir(exist_ok=True)
    room = threading.Semaphore(2)  # archives on the disk: one is tokenized, and the next one is fetched meanwhile
    # The pool's thread is a daemon: Ctrl-C does not wait for it.
    with ThreadPool(1) as pool, open(work / "tokens", "ab") as tokens, open(work / "lengths", "ab") as lengths:
        tokens.truncate(2 * corpus["tokens"])  # an archive that was not finished left more
        lengths.truncate(8 * corpus["documents"])
        for archive in pool.imap(lambda archive: archive.fetch(room), archives):
            name, before = archive.path.name, corpus["documents"]
            for member_tokens, member_lengths in tqdm(tokenize(archive.path, tokenizer), name, disable=None):
                tokens.write(member_tokens)
                lengths.write(member_lengths)
                corpus["tokens"] += len(member_tokens)
                corpus["documents"] += len(member_lengths)
            if corpus["documents"] == before:
                raise UserError(f"{archive.path} holds no documents; fetch it anew")
            for file in (tokens, lengths):  # what they were made from is deleted next: a power cut must not lose both
                file.flush()
                os.fsync(file.fileno())
            if not (source or keep):
                archive.path.unlink()
            corpus["archives"].append({"name": name, "bytes": archive.size, "sha256": archive.sha256})
            with new_file(record) as f:
                f.write(json.dumps(corpus).encode())
            print(f"{name} is done; {corpus['documents']:,} documents, {corpus['tokens']:,} tokens so far", flush=True)
            room.release()
    return corpus


def check_space(folder, archives, done, n_kept):
    """Refuse to begin where the disk has too little room. done: bytes of tokens; n_kept: downloads at a time."""
    sizes = sorted((archive.size for archive in archives), reverse=True)
    tokens = int(sum(sizes) * TOKEN_BYTES_PER_ARCHIVE_BYTE)
    here = sum(archive.path.stat().st_size for archive in archives if archive.path.exists())
    need, free = max(0, sum(sizes[:n_kept]) - here) + tokens, shutil.disk_usage(folder).free
    need += done + tokens  # the data set is a second copy
    print(f"{len(archives)} archives to do; needs {short(need)}B on the disk", flush=True)
    if need > free:
        raise UserError(f"{folder} has {short(free)}B free, but {short(need)}B are needed; make room, or use --shards")


def tokenize(path, tokenizer):
    """Yield the tokens and lengths of each inner archive, in order. Threads work ahead, but only by a few of them."""
    waiting, threads = collections.deque(), n_threads()
    with ThreadPoolExecutor(threads) as pool:
        for name, data in members(path):
            waiting.append(pool.submit(tokenize_member, path, name, data, tokenizer))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def n_threads():
    """As many as there are cores to use, up to MAX_THREADS."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MAX_THREADS)


def members(path):
    """Yield the name and the bytes of each inner archive, in order."""
    try:
        with tarfile.open(path, "r|", bufsize=1 << 20) as tar:
            yield from files(tar, ".xz")
        with open(path, "rb") as f:  # tarfile takes a damaged header for the end, but the true end is zeros
            f.seek(tar.offset)
            end = f.read(1 << 16)
        if not end or end.strip(b"\0"):
            raise tarfile.ReadError(f"no archive goes on like this at byte {tar.offset:,}")
    except tarfile.TarError as e:
        raise UserError(f"{path} is damaged or cut off ({e}); fetch it anew") from None


def files(tar, suffix):
    """Yield the name and the bytes of each file in a tar archive that the corpus's own loader would read."""
    for member in tar:
        base = member.name.rpartition("/")[2]
        if member.isreg() and base.endswith(suffix) and not base.startswith((".", "__")):
            yield member.name, tar.extractfile(member).read()


def tokenize_member(path, name, data, tokenizer):
    """An inner archive -> its tokens (uint16) and its documents' lengths (documents, 2). Nothing touches the disk."""
    place, tokens, lengths = f"{path}: {name}", [np.empty(0, np.uint16)], []
    try:
        with lzma.open(io.BytesIO(data)) as f:
            raw = f.read(MEMBER_BYTES + 1)
        if len(raw) > MEMBER_BYTES:
            raise lzma.LZMAError(f"it unpacks to more than {MEMBER_BYTES:,} bytes")
        with tarfile.open(fileobj=io.BytesIO(raw), mode="r:") as tar:
            for document, text in files(tar, ".txt"):
                place = f"{path}: {name}: {document}"
                # As the corpus's own loader does it: no more than one empty line in a row, none around.
                text = re.sub("\n\n\n+", "\n\n", text.decode()).strip().encode()
                ids = np.append(tokenizer.encode(text), np.uint16(tokenizer.eot))
                tokens.append(ids)
                lengths.append((len(ids), len(text)))
    except (lzma.LZMAError, EOFError, tarfile.TarError, UnicodeDecodeError) as e:
        raise UserError(f"{place}: {e}; fetch the archive anew") from None
    return np.concatenate(tokens), np.array(lengths, np.uint32).reshape(-1, 2)


def permutation(n):
    """The order of n documents that datasets.train_test_split(test_size=0.0005, seed=2357) gives them."""
    return np.random.default_rng(2357).permutation(n)


def gather(work, corpus, whole, tokenizer, target):
    """Write val.bin, train.bin and meta.json, and move them to target. whole: check the published numbers."""
    lengths = np.fromfile(work / "lengths", np.uint32).reshape(-1, 2)
    n, n_tokens = len(lengths), int(lengths[:, 0].sum(dtype=np.int64))
    if (n, n_tokens) != (corpus["documents"], corpus["tokens"]):
        raise UserError(f"{work / 'lengths'} is damaged; delete {work} to begin anew")
    order, n_val = permutation(n), math.ceil(0.0005 * n)
    found = {"documents": n, "tokens": n_tokens, "order": hashlib.sha256(order.astype("<i8")).hexdigest()}
    if whole and found != PUBLISHED:
        raise UserError(f"{found}, but the whole corpus has {PUBLISHED}; delete {work} to begin anew")
    result = work / "result"
    shutil.rmtree(result, ignore_errors=True)  # of a run that was stopped
    result.mkdir()
    meta = {"source": f"{HUB}/{REPOSITORY}", "revision": REVISION, "archives": corpus["archives"]}
    meta |= {"tokenizer": tokenizer.spec, "vocab_size": tokenizer.vocab_size, "dtype": "uint16"}
    for split, chosen in {"val": order[:n_val], "train": order[n_val:]}.items():
        meta[split] = write_split(result / f"{split}.bin", chosen, work / "tokens", lengths, tokenizer.eot)
    n_train = meta["train"]["tokens"]
    if whole:
        first = np.fromfile(result / "train.bin", np.uint16, len(FIRST_TRAIN_TOKENS)).tolist()
        meta["as_published"] = (n_train, first) == (TRAIN_TOKENS, FIRST_TRAIN_TOKENS)
        if not meta["as_published"]:
            print(f"warning: another order than published: train.bin has {n_train:,} tokens and begins {first}")
    with new_file(result / "meta.json") as f:
        f.write(json.dumps(meta, indent=1).encode())
    os.rename(result, target)
    print(f"{target}: {n_train:,} train, {meta['val']['tokens']:,} val tokens of {n:,} documents")


def write_split(path, chosen, tokens_path, lengths, eot):
    """Write the documents whose numbers are chosen, in that order -> the split's entry in meta.json."""
    starts = lengths[:, 0].cumsum(dtype=np.int64) - lengths[:, 0]
    cuts = np.flatnonzero(np.diff(lengths[chosen, 0].cumsum(dtype=np.int64) // GATHER_TOKENS)) + 1
    n_tokens, text_bytes = lengths[chosen].sum(axis=0, dtype=np.int64).tolist()
    sha256 = hashlib.sha256()
    print(f"writing {n_tokens:,} tokens to {path.name}", flush=True)
    with open(tokens_path, "rb", buffering=0) as source, new_file(path) as f:
        for some in tqdm(np.split(chosen, cuts), path.name, disable=None):
            tokens = read_documents(source, some, starts, lengths[:, 0], eot)
            f.write(tokens)
            sha256.update(tokens)
    return {"documents": len(chosen), "tokens": n_tokens, "text_bytes": text_bytes, "sha256": sha256.hexdigest()}


def read_documents(file, chosen, starts, lengths, eot):
    """The tokens of the chosen documents, one after another, as bytes. starts, lengths: of all documents, in tokens."""
    pieces = {}
    for i in np.sort(chosen).tolist():  # reading forward is faster than back and forth
        file.seek(2 * int(starts[i]))
        pieces[i] = file.read(2 * int(lengths[i]))
        if not pieces[i].endswith(np.uint16(eot).tobytes()):
            raise UserError(f"{file.name} does not fit the lengths beside it; delete its folder to begin anew")
    return b"".join(pieces[i] for i in chosen.tolist())
