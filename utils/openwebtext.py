"""OpenWebText: from its archives on the Hugging Face hub to token files in nanoGPT's order.

Each of the 21 tar archives holds xz-compressed tar archives of text documents. An archive becomes
two files in the folder data/openwebtext.work: its tokens, and a record that appears when it is
done. A run that was stopped continues with the archives that lack a record. At last the documents
of all archives are copied to val.bin and train.bin in the order of a fixed random permutation.
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
import tarfile
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
from requests import RequestException
from urllib3.exceptions import HTTPError

from utils.download import download
from utils.files import locked, new_file
from utils.settings import UserError
from utils.tokenizers import GPT2Tokenizer

HUB = "https://huggingface.co"
REPOSITORY = "datasets/Skylion007/openwebtext"
REVISION = "f3808c30e817981b845ec549c43e82bb467d8144"  # the last one with these archives
N_SHARDS = 21
MEMBER_BYTES = 1 << 28  # of an inner archive at most; the true ones have some 2 MB
PUBLISHED = {"documents": 8_013_769, "tokens": 9_040_017_095, "val": 4_434_606}
# The published sums of twelve archives, in the format of the command sha256sum.
SUMS = Path(__file__).with_name("openwebtext.sha256").read_text().split()
SHA256 = dict(zip(SUMS[1::2], SUMS[::2]))


def prepare(data_dir, shards, mirror, source, keep):
    """Write data_dir/openwebtext, or openwebtext_A-B where shards is a part of the 21 archives.

    mirror: address to ask instead of the hub's. source: folder that holds the archives.
    keep: leave the downloaded archives in data_dir/openwebtext.archives.
    """
    name = "openwebtext"
    if len(shards) < N_SHARDS:
        name += f"_{shards[0]}" if len(shards) == 1 else f"_{shards[0]}-{shards[-1]}"
    target = data_dir / name
    work = data_dir / f"{name}.work"
    if target.exists():
        # A run that was killed at its very end leaves its working folder.
        shutil.rmtree(work, ignore_errors=True)
        raise UserError(f"{target} exists already; delete it to prepare it again")
    archives = [f"urlsf_subset{number:02d}.tar" for number in shards]
    address = None if source else (mirror or HUB).rstrip("/")
    folder = data_dir / "openwebtext.archives" if keep else work
    tokenizer = GPT2Tokenizer(has_eot=True)
    try:
        with locked(work):
            try:
                tokenize_archives(archives, work, Path(source or folder), address, tokenizer)
                gather(archives, work, tokenizer)
                os.rename(work / "result", target)
            finally:
                if target.exists() or [path.name for path in work.iterdir()] == [".lock"]:
                    shutil.rmtree(work)
                else:
                    print(f"{work} keeps what is finished; the same command continues", flush=True)
    except (RequestException, HTTPError) as e:
        # requests puts a long address before the cause.
        cause = str(e).rpartition("Caused by ")[2][:200]
        raise UserError(f"{address}: {cause}; try again, or another --mirror") from None


def tokenize_archives(archives, work, folder, address, tokenizer):
    """Write the tokens and the record of each archive that has no record yet."""
    todo = [name for name in archives if not (work / f"{name}.json").exists()]
    print(f"{len(todo)} archives to do", flush=True)
    # Tokens take 0.9 GB an archive, and the data set is a second copy of them.
    if shutil.disk_usage(work).free < 0.9e9 * (len(todo) + len(archives)):
        raise UserError(f"{work} has too little space for {len(archives)} archives; see --shards")
    # The thread that downloads ahead is a daemon, so Ctrl-C does not wait for it.
    with ThreadPool(1) as pool:
        for path, sha256 in pool.imap(lambda name: fetch(name, folder, address), todo):
            try:
                tokenize_archive(path, sha256, work, tokenizer)
            except (tarfile.TarError, lzma.LZMAError, UnicodeDecodeError) as e:
                raise UserError(f"{path} is damaged ({e}); delete it and get it again") from None
            if folder == work:
                path.unlink()


def fetch(name, folder, address):
    """Download an archive where there is an address, and check it. Return its path and sha256."""
    path = folder / name
    announced = None
    if address:
        announced = download(f"{address}/{REPOSITORY}/resolve/{REVISION}/subsets/{name}", path)
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    sha256 = digest.hexdigest()
    expected = SHA256.get(name) or announced
    if expected not in (None, sha256):
        raise UserError(f"{path} has sha256 {sha256}, not {expected}; delete it and get it again")
    return path, sha256


def tokenize_archive(path, sha256, work, tokenizer):
    """Write an archive's tokens (uint16), then its record."""
    lengths = []
    tokens_path = work / f"{path.name}.tokens"
    with new_file(work / f"{path.name}.json") as record, new_file(tokens_path) as f:
        for tokens, of_documents in tokenize(path, tokenizer):
            f.write(tokens)
            lengths += of_documents
        if not lengths:
            raise tarfile.ReadError("it holds no documents")
        entry = {"name": path.name, "bytes": path.stat().st_size, "sha256": sha256}
        record.write(json.dumps(entry | {"lengths": lengths}).encode())
    print(f"{path.name} is done: {len(lengths):,} documents", flush=True)


def tokenize(path, tokenizer):
    """Yield what tokenize_member makes of each inner archive, in order."""
    # More than 16 threads would wait for Python's lock.
    threads = min(os.cpu_count() or 1, 16)
    waiting = collections.deque()
    with tarfile.open(path, "r|", bufsize=1 << 20) as tar, ThreadPoolExecutor(threads) as pool:
        for data in files(tar, ".xz"):
            waiting.append(pool.submit(tokenize_member, data, tokenizer))
            # The threads work ahead only a little, so that memory stays small.
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        for future in waiting:
            yield future.result()
        # tarfile takes a damaged header for the end, but only zeros follow the true end.
        end = tar.fileobj.read(1 << 16)
        if not end or any(end):
            raise tarfile.ReadError(f"cut off at byte {tar.offset:,}")


def files(tar, suffix):
    """Yield the bytes of each file in a tar archive that the corpus's own loader would read."""
    for member in tar:
        name = member.name.rpartition("/")[2]
        if member.isreg() and name.endswith(suffix) and not name.startswith((".", "__")):
            yield tar.extractfile(member).read()


def tokenize_member(data, tokenizer):
    """Return an inner archive's tokens as bytes, and each document's (tokens, bytes of text)."""
    tokens = []
    lengths = []
    decompressor = lzma.LZMADecompressor()
    raw = decompressor.decompress(data, MEMBER_BYTES)
    if not decompressor.eof:
        raise lzma.LZMAError(f"a member is cut off, or has more than {MEMBER_BYTES:,} bytes")
    with tarfile.open(fileobj=io.BytesIO(raw), mode="r:") as tar:
        for document in files(tar, ".txt"):
            # The corpus's own loader leaves one empty line in a row at most, and none at the ends.
            text = re.sub("\n\n\n+", "\n\n", document.decode()).strip().encode()
            tokens.append(np.append(tokenizer.encode(text), np.uint16(tokenizer.eot)))
            lengths.append((len(tokens[-1]), len(text)))
    return b"".join(tokens), lengths


def gather(archives, work, tokenizer):
    """Write the data set to work/result."""
    entries = []
    tables = []
    for number, name in enumerate(archives):
        entry = json.loads((work / f"{name}.json").read_text())
        lengths = np.array(entry.pop("lengths"), np.uint32)
        starts = lengths[:, 0].cumsum(dtype=np.uint32) - lengths[:, 0]
        tables.append(np.column_stack([np.full_like(starts, number), starts, lengths]))
        entries.append(entry)
    # A row for each document: number of the archive, position in its tokens, tokens, bytes of text.
    documents = np.concatenate(tables)
    # The split and the order of datasets.train_test_split(test_size=0.0005, seed=2357).
    documents = documents[np.random.default_rng(2357).permutation(len(documents))]
    n_val = math.ceil(0.0005 * len(documents))
    meta = {"source": f"{HUB}/{REPOSITORY}", "revision": REVISION, "archives": entries}
    meta |= {"tokenizer": tokenizer.spec, "vocab_size": tokenizer.vocab_size, "dtype": "uint16"}
    result = work / "result"
    shutil.rmtree(result, ignore_errors=True)
    result.mkdir()
    with contextlib.ExitStack() as stack:
        paths = [work / f"{name}.tokens" for name in archives]
        sources = [stack.enter_context(open(path, "rb", buffering=0)) for path in paths]
        meta["val"] = write_split(result / "val.bin", documents[:n_val], sources)
        meta["train"] = write_split(result / "train.bin", documents[n_val:], sources)
    if len(archives) == N_SHARDS:
        val = meta["val"]["tokens"]
        found = {"documents": len(documents), "tokens": val + meta["train"]["tokens"], "val": val}
        if found != PUBLISHED:
            raise UserError(f"found {found} instead of {PUBLISHED}; delete {work} to start again")
        meta["as_published"] = True
    with new_file(result / "meta.json") as f:
        f.write(json.dumps(meta, indent=1).encode())


def write_split(path, documents, sources):
    """Copy documents, in their order, to a .bin file. Return the split's entry in meta.json."""
    print(f"writing {path.name}", flush=True)
    sha256 = hashlib.sha256()
    _, _, n_tokens, text_bytes = documents.sum(axis=0, dtype=np.int64).tolist()
    with new_file(path) as f:
        for archive, start, n, _ in map(np.ndarray.tolist, documents):
            sources[archive].seek(2 * start)
            tokens = sources[archive].read(2 * n)
            sha256.update(tokens)
            f.write(tokens)
    entry = {"documents": len(documents), "tokens": n_tokens, "text_bytes": text_bytes}
    return entry | {"sha256": sha256.hexdigest()}
