"""OpenWebText: from its archives on the Hugging Face hub to token files in the order that nanoGPT and the paper use.

The corpus is 21 tar archives of xz-compressed tar archives of text documents. Each archive is downloaded,
tokenized into a file of its own and deleted; when all are there, the documents are gathered from those
files in the order of a fixed random permutation, whose first 0.05 % are for validation. What is finished
lies in data/openwebtext.parts and is not done again: the program may be killed at any time.
"""

import collections
import contextlib
import hashlib
import io
import json
import lzma
import math
import os
import re
import shutil
import sys
import tarfile
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import download
from command import UserError, clock, short
from files import locked, new_file
from tokenizer import GPT2Tokenizer

HUB = "https://huggingface.co"
REVISION = "f3808c30e817981b845ec549c43e82bb467d8144"  # the last one that held these archives
PARQUET_REVISION = "79d93d786212f7344586290adb811d4ae6a1762c"  # a later one, which holds the same text otherwise
N_SHARDS = 21
SHA256 = {  # of the archives, as far as published
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

# The whole corpus, as others who read the same archives in the same order report it. (nanoGPT's own README
# has the same total in another split, made when the corpus's loader still sorted the documents.)
DOCUMENTS, TRAIN_TOKENS, VAL_TOKENS = 8_013_769, 9_035_582_489, 4_434_606
FIRST_TRAIN_TOKENS = [8585, 262, 1772, 25, 25334, 8120, 17, 43959, 44947, 318]
PERMUTATION_SHA256 = "713795c9660553b17cc384b3c0d72c0328090f1926873b034ce38fe506e0655e"

HINT = (
    "try another --mirror, or fetch the archives elsewhere and name their folder with --source "
    f"(parquet files, which the hub has at revision {PARQUET_REVISION}, are not read)"
)
TOKEN_BYTES_PER_ARCHIVE_BYTE = 1.5  # 18.1 GB / 12.9 GB = 1.4, and a margin
MEMBER_BYTES = 1 << 28  # no inner archive unpacks to more (the true ones to some 2 MB)
MAX_THREADS = 16  # unpacking and tokenizing run side by side, but the twentieth of the work that is Python's does not
GATHER_TOKENS = 1 << 25  # written at a time; documents are read in corpus order within


def prepare(data_dir, shards, mirror, source, keep):
    """Write data_dir/openwebtext, or data_dir/openwebtext_A-B for a part of the corpus.

    shards: range of archive numbers; mirror: address to ask instead of the hub's; source: folder that
    holds the archives (None: download them); keep: do not delete what was downloaded.
    """
    target, parts = data_dir / dataset_name(shards), data_dir / "openwebtext.parts"
    if target.exists():
        leftover = f" ({parts} is not needed for it)" if parts.exists() else ""
        raise UserError(f"{target} exists already; delete it to prepare it anew{leftover}")
    tokenizer = GPT2Tokenizer(has_eot=True)
    try:
        with locked(parts):
            shutil.rmtree(parts / target.name, ignore_errors=True)  # where gathering was killed
            make_parts(parts, shards, tokenizer, mirror, source, keep)
            gather(parts, shards, tokenizer, target)
            remove(parts, shards, keep or source)
    except KeyboardInterrupt:
        print(f"\nstopped; what is finished is kept in {parts}, and the same command goes on", flush=True)
        raise
    except BrokenPipeError:
        raise
    except OSError as e:
        reason = f"{e.filename or parts}: {e.strerror or e}"
        raise UserError(f"{reason}; what is finished is kept, and the same command goes on") from None


def dataset_name(shards):
    if len(shards) == N_SHARDS:
        return "openwebtext"
    return "openwebtext_" + "-".join(str(shard) for shard in sorted({shards[0], shards[-1]}))


def make_parts(parts, shards, tokenizer, mirror, source, keep):
    """Have every shard's tokens in parts; the next archive is fetched while one is tokenized."""
    archives = [locate(shard, mirror, source) for shard in shards if not is_done(parts, shard)]
    check_space(parts, shards, archives, source, keep)
    progress, coming = Progress(sum(archive.size for archive in archives)), None
    for archive, following in zip(archives, [*archives[1:], None]):
        path = progress.wait(coming or in_background(fetch, archive, parts, progress))
        coming = in_background(fetch, following, parts, progress) if following else None
        tokenize(archive, path, parts, tokenizer, progress)
        if not (source or keep):
            path.unlink()


def part(parts, shard, kind):
    """The path of a shard's tokens, lengths or json."""
    return parts / f"{shard:02d}.{kind}"


def is_done(parts, shard):
    return part(parts, shard, "json").exists()


def check_space(parts, shards, archives, source, keep):
    """Say what the work needs on the disk, and refuse where that is not there."""
    sizes = sorted(archive.size for archive in archives)
    archived = 0 if source else sum(sizes if keep else sizes[-2:])
    archived -= min(archived, sum(path.stat().st_size for path in parts.glob("*.tar*")))  # here already
    tokens = int(sum(sizes) * TOKEN_BYTES_PER_ARCHIVE_BYTE)
    result = tokens + sum(2 * read_record(parts, shard)["tokens"] for shard in shards if is_done(parts, shard))
    need, free = archived + tokens + result, shutil.disk_usage(parts).free
    print(
        f"{len(archives)} of {len(shards)} archives to do, {short(sum(sizes))}B; needs {short(need)}B on the disk: "
        f"archives {short(archived)}B, their tokens {short(tokens)}B, the result {short(result)}B",
        flush=True,
    )
    if need > free:
        raise UserError(
            f"{parts.parent} has {short(free)}B free, but {short(need)}B are needed; make room, or use --shards"
        )


# ---------------------------------------------------------------------------------------------------
# Archives, from the hub or from a folder.


def archive_name(shard):
    return f"urlsf_subset{shard:02d}.tar"


@dataclass
class Archive:
    shard: int
    place: str | Path  # its address, or the file
    size: int  # bytes
    sha256: str | None  # None where neither the server nor this program knows it


def locate(shard, mirror, source):
    """Find an archive and what is told about it."""
    name, sha256 = archive_name(shard), SHA256.get(shard)
    if source:
        path = Path(source) / name
        if not path.is_file():
            raise UserError(f"--source {source} holds no {name}")
        return Archive(shard, path, path.stat().st_size, sha256)
    url = f"{(mirror or HUB).rstrip('/')}/datasets/Skylion007/openwebtext/resolve/{REVISION}/subsets/{name}"
    size, told = download.announced(url, HINT)
    if told and sha256 not in (None, told):
        raise UserError(f"{url} is not the published file: sha256 {told}, not {sha256}")
    return Archive(shard, url, size, sha256 or told)


def fetch(archive, parts, progress):
    """The path of an archive on this disk; its sha256 is checked where it is known, and known from here on."""
    if isinstance(archive.place, Path):
        archive.sha256 = download.check_sum(archive.place, archive.size, archive.sha256)
        return archive.place
    path, report = parts / archive_name(archive.shard), progress.fetching(archive)
    archive.sha256 = download.fetch(archive.place, path, archive.size, archive.sha256, HINT, report)
    return path


# ---------------------------------------------------------------------------------------------------
# From an archive to its tokens.


def tokenize(archive, path, parts, tokenizer, progress):
    """Write NN.tokens (uint16), NN.lengths (uint32, two a document: tokens, bytes of text) and, after both,
    NN.json, which marks the shard as finished.
    """
    record = {"archive": archive_name(archive.shard), "bytes": archive.size, "sha256": archive.sha256}
    record |= {"documents": 0, "tokens": 0, "text_bytes": 0}
    tokens_path, lengths_path, record_path = (part(parts, archive.shard, kind) for kind in PART_FILES)
    work = ((path, name, data, tokenizer) for name, data in members(path))
    with new_file(tokens_path) as tokens_file, new_file(lengths_path) as lengths_file:
        with contextlib.closing(in_order(tokenize_member, work, n_threads())) as results:
            for ids, lengths, compressed in results:
                tokens_file.write(ids)
                lengths_file.write(lengths)
                record["documents"] += len(lengths)
                record["tokens"] += len(ids)
                record["text_bytes"] += int(lengths[:, 1].sum(dtype=np.int64))
                progress.tokenized(compressed, len(ids))
    if not record["documents"]:
        raise UserError(f"{path} holds no documents; fetch it anew")
    with new_file(record_path) as f:
        f.write(json.dumps(record).encode())


PART_FILES = ("tokens", "lengths", "json")


def n_threads():
    """As many as there are cores to use, up to MAX_THREADS."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MAX_THREADS)


def in_order(function, items, threads):
    """Yield function(*item) for each item, computed by threads that run ahead by a bounded number of items."""
    pool, waiting = ThreadPoolExecutor(threads), collections.deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, *item))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def members(path):
    """Yield the name and the bytes of each inner archive, in order."""
    try:
        with tarfile.open(path, "r|", bufsize=1 << 20) as tar:
            for member in tar:
                if wanted(member, ".xz"):
                    yield member.name, tar.extractfile(member).read()
        with open(path, "rb") as f:  # tarfile takes a damaged header, and no header at all, for the end
            f.seek(tar.offset)
            end = f.read(1 << 16)
        if not end or end.strip(b"\0"):
            raise tarfile.ReadError(f"no archive goes on like this at byte {tar.offset:,}")
    except tarfile.TarError as e:
        raise UserError(f"{path} is damaged or cut off ({e}); fetch it anew") from None


def wanted(member, suffix):
    base = member.name.rpartition("/")[2]
    return member.isreg() and base.endswith(suffix) and not base.startswith((".", "__"))


def tokenize_member(path, name, data, tokenizer):
    """An inner archive -> its tokens (uint16), its documents' lengths (documents, 2), its compressed size."""
    ids, lengths, eot = [], [], np.array([tokenizer.eot], np.uint16)
    try:
        for document, raw in documents(data):
            try:
                text = clean(raw.decode()).encode()
            except UnicodeDecodeError as e:
                raise tarfile.ReadError(f"{document}: {e}") from None
            ids += [tokenizer.encode(text), eot]
            lengths.append((len(ids[-2]) + 1, len(text)))
    except (lzma.LZMAError, EOFError, tarfile.TarError) as e:
        raise UserError(f"{path}: {name}: {e}; fetch the archive anew") from None
    return np.concatenate([np.empty(0, np.uint16), *ids]), np.array(lengths, np.uint32).reshape(-1, 2), len(data)


def documents(data):
    """Yield the name and the bytes of each text in a compressed archive, in order; nothing touches the disk."""
    raw = bytearray()
    with lzma.open(io.BytesIO(data)) as f:
        while block := f.read(1 << 20):  # checks the sums in it; EOFError where the end is missing
            raw += block
            if len(raw) > MEMBER_BYTES:
                raise lzma.LZMAError(f"it unpacks to more than {MEMBER_BYTES:,} bytes")
    with tarfile.open(fileobj=io.BytesIO(raw), mode="r:") as tar:
        for member in tar:
            if wanted(member, ".txt"):
                yield member.name, tar.extractfile(member).read()


def clean(text):
    """As the corpus's own loader does it: no more than one empty line in a row, none around."""
    return re.sub("\n\n\n+", "\n\n", text).strip()


# ---------------------------------------------------------------------------------------------------
# From the shards' tokens to the data set.


def permutation(n):
    """The order of n documents that datasets.train_test_split(test_size=0.0005, seed=2357) gives them."""
    return np.random.default_rng(2357).permutation(n)


def gather(parts, shards, tokenizer, target):
    """Write val.bin, train.bin and meta.json, check them, and move them into place."""
    records = [read_record(parts, shard) for shard in shards]
    n = sum(record["documents"] for record in records)
    whole = len(shards) == N_SHARDS
    check("documents", n, DOCUMENTS, whole)
    order = permutation(n)
    check("the sha256 of the order", hashlib.sha256(order.astype("<i8")).hexdigest(), PERMUTATION_SHA256, whole)
    n_val = math.ceil(0.0005 * n)
    if n_val == n:
        raise UserError(f"{n} documents are too few to be split")
    lengths = np.concatenate([read_lengths(parts, shard, record) for shard, record in zip(shards, records)])
    temporary = parts / target.name
    temporary.mkdir()
    meta = {"source": f"{HUB}/datasets/Skylion007/openwebtext", "revision": REVISION}
    meta |= {"tokenizer": tokenizer.spec, "vocab_size": tokenizer.vocab_size, "dtype": "uint16"}
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(open(part(parts, shard, "tokens"), "rb", buffering=0)) for shard in shards]
        sizes = [record["tokens"] for record in records]
        first = np.cumsum([0, *sizes], dtype=np.int64)  # where each shard begins in the corpus
        for split, chosen in (("val", order[:n_val]), ("train", order[n_val:])):
            meta[split] = write_split(temporary / f"{split}.bin", chosen, lengths, files, first, tokenizer.eot)
    check("tokens", meta["train"]["tokens"] + meta["val"]["tokens"], TRAIN_TOKENS + VAL_TOKENS, whole)
    if whole:
        meta["as_published"] = as_published(temporary, meta)
    meta["shards"] = records
    with new_file(temporary / "meta.json") as f:
        f.write(json.dumps(meta, indent=1).encode())
    os.rename(temporary, target)
    print(f"{target}: {meta['train']['tokens']:,} train, {meta['val']['tokens']:,} val tokens of {n:,} documents")


def check(what, found, published, applies):
    if applies and found != published:
        raise UserError(
            f"{what}: {found}, but the whole corpus has {published}; delete openwebtext.parts and begin anew"
        )


def as_published(folder, meta):
    """Whether the split and its order are those of others' token files; tells where they are not."""
    first = np.fromfile(folder / "train.bin", np.uint16, len(FIRST_TRAIN_TOKENS)).tolist()
    same = (meta["train"]["tokens"], meta["val"]["tokens"], first) == (TRAIN_TOKENS, VAL_TOKENS, FIRST_TRAIN_TOKENS)
    if not same:
        print(
            f"warning: all tokens are there, but in another order than published: train.bin has "
            f"{meta['train']['tokens']:,} and begins {first}, not {TRAIN_TOKENS:,} and {FIRST_TRAIN_TOKENS}"
        )
    return same


def read_record(parts, shard):
    path = part(parts, shard, "json")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        sizes = {"tokens": 2 * record["tokens"], "lengths": 8 * record["documents"]}
        if any(part(parts, shard, kind).stat().st_size != size for kind, size in sizes.items()):
            raise ValueError("the files beside it have other sizes")
        if SHA256.get(shard) not in (None, record["sha256"]):
            raise ValueError("it is of another archive than the published one")
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"{path} is damaged ({e}); delete it to prepare this archive anew") from None
    return record


def read_lengths(parts, shard, record):
    path = part(parts, shard, "lengths")
    lengths = np.fromfile(path, np.uint32).reshape(-1, 2)
    if lengths.sum(axis=0, dtype=np.int64).tolist() != [record["tokens"], record["text_bytes"]]:
        raise UserError(f"{path} is damaged; delete {shard:02d}.json to prepare it anew")
    return lengths


def write_split(path, chosen, lengths, files, first, eot):
    """Write documents in the order chosen -> the split's entry in meta.json.

    chosen: document numbers; lengths: (documents, 2) tokens and bytes of text of all; files: the shards'
    token files; first: where each shard begins in the corpus, in tokens.
    """
    starts = np.cumsum(lengths[:, 0], dtype=np.int64) - lengths[:, 0]
    ends = np.cumsum(lengths[chosen, 0], dtype=np.int64)
    cuts = np.searchsorted(ends, np.arange(GATHER_TOKENS, ends[-1], GATHER_TOKENS))
    sha256, ticker = hashlib.sha256(), Ticker()
    with new_file(path) as f:
        for some in np.split(chosen, np.unique(cuts[cuts > 0])):
            tokens = read_documents(some, starts, lengths[:, 0], files, first, eot)
            f.write(tokens)
            sha256.update(tokens)
            ticker.show(f"{path.name}: {f.tell() // 2:,} of {ends[-1]:,} tokens")
        f.flush()
        os.fsync(f.fileno())  # a power cut must not find the shards' files deleted and this one not on the disk
    text_bytes = int(lengths[chosen, 1].sum(dtype=np.int64))
    entry = {"documents": len(chosen), "tokens": int(ends[-1]), "text_bytes": text_bytes}
    return {**entry, "sha256": sha256.hexdigest()}


def read_documents(documents, starts, lengths, files, first, eot):
    """The tokens of documents, one after another; they are read in corpus order, so that the disk seeks forward."""
    ends = np.cumsum(lengths[documents], dtype=np.int64)
    begins, sources = ends - lengths[documents], starts[documents]
    shards = np.searchsorted(first, sources, side="right") - 1
    offsets = sources - first[shards]
    tokens = np.empty(ends[-1], np.uint16)
    for i in np.argsort(sources):
        file, room = files[shards[i]], memoryview(tokens[begins[i] : ends[i]]).cast("B")
        file.seek(2 * int(offsets[i]))
        if file.readinto(room) != len(room):
            raise UserError(f"{file.name} is shorter than it was; delete it and its .json to prepare it anew")
    if (tokens[ends - 1] != eot).any():
        raise UserError("the token files do not fit their lengths; delete openwebtext.parts and begin anew")
    return tokens


def remove(parts, shards, keep):
    """Delete what the shards left, but for the archives that are to be kept."""
    for shard in shards:
        archive = parts / archive_name(shard)
        downloads = [] if keep else [archive, archive.with_name(f"{archive.name}.part")]
        for path in [part(parts, shard, kind) for kind in reversed(PART_FILES)] + downloads:
            path.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------
# Progress.


class Ticker:
    """A line that tells how far it is: redrawn each second on a terminal, else printed every half minute."""

    def __init__(self):
        self.redraw = sys.stdout.isatty()
        self.last = time.monotonic()

    def show(self, text):
        if time.monotonic() - self.last > (1 if self.redraw else 30):
            self.last = time.monotonic()
            print(f"{text:<79.79}" if self.redraw else text, end="\r" if self.redraw else "\n", flush=True)


class Progress:
    """How far downloading and tokenizing are, of all archives together."""

    def __init__(self, size):
        self.size, self.done, self.tokens, self.started = size, 0, 0, time.monotonic()
        self.parts, self.ticker = {}, Ticker()

    def fetching(self, archive):
        """What is to be called with the bytes that are there and their number per second."""

        def report(have, speed):
            text = f"{archive.shard}: {have / 1e6:.0f}/{archive.size / 1e6:.0f} MB, {speed / 1e6:.3g} MB/s"
            self.parts["fetching"] = f"{text}, {clock((archive.size - have) / speed)}"
            if have == archive.size:
                del self.parts["fetching"]

        return report

    def tokenized(self, size, tokens):
        self.done += size
        self.tokens += tokens
        seconds = time.monotonic() - self.started
        left = clock(max(0, self.size - self.done) * seconds / self.done)
        self.parts["tokenized"] = f"{self.done / self.size:.1%}, {short(self.tokens / seconds)} tokens/s, {left} left"
        self.show()

    def show(self):
        self.ticker.show("; ".join(f"{what} {how}" for what, how in list(self.parts.items())))

    def wait(self, future):
        while not future.done():
            self.show()
            wait([future], timeout=1)
        return future.result()


def in_background(function, *arguments):
    """Call function in a thread that does not outlive the program -> Future."""
    future = Future()

    def work():
        try:
            future.set_result(function(*arguments))
        except BaseException as e:
            future.set_exception(e)

    threading.Thread(target=work, daemon=True).start()
    return future
