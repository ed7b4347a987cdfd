"""Turn text into tokens, data/NAME: python prepare_data.py NAME

    stdlib            this Python's standard library as bytes; no network
    shakespeare_char  tiny Shakespeare, one token for each character
    shakespeare       tiny Shakespeare, GPT-2's BPE
    text              your own files: --name NAME --input FILE_OR_FOLDER ...
    openwebtext       the paper's corpus; --shards 0-3 takes a part of it

train.bin and val.bin are plain arrays of token ids, and meta.json describes
them. A data set appears when it is complete. NAME --help lists its options.
"""

import argparse
import hashlib
import itertools
import json
import os
import platform
import re
import shutil
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from utils.data import DATA_DIR
from utils.files import locked, new_file
from utils.options import checked
from utils.settings import Parser, UserError, run_program
from utils.tokenizers import load_tokenizer

SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare"
SHAKESPEARE_URL = f"{SHAKESPEARE}/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


@dataclass
class Document:
    """A text, and a name of it that is the same on every machine."""

    name: str
    content: Path | bytes  # a file, or the text itself

    def read(self):
        return self.content if isinstance(self.content, bytes) else self.content.read_bytes()


def find_documents(folder, pattern="*", skip=()):
    """The files below a folder, but no hidden or empty ones, and none below a folder in skip."""
    documents = []
    for path in folder.rglob(pattern):
        parts = path.relative_to(folder).parts
        unwanted = any(part.startswith(".") or part in skip for part in parts)
        if not unwanted and path.is_file() and path.stat().st_size:
            documents.append(Document("/".join(parts), path))
    return documents


def split(documents):
    """Documents, in any order -> {"train": documents, "val": documents}."""
    if len(documents) == 1:  # cut it after 90 % of its bytes, where a character ends
        name = documents[0].name
        data = documents[0].read()
        cut = int(0.9 * len(data))
        while cut < len(data) and data[cut] & 0xC0 == 0x80:  # inside a character of UTF-8
            cut += 1
        return {"train": [Document(name, data[:cut])], "val": [Document(name, data[cut:])]}

    def order(document):
        digest = hashlib.sha256(os.fsencode(document.name)).digest()
        return digest, str(document.content)

    # A hash of the name draws a tenth of the documents for validation, the same on each machine.
    shuffled = sorted(documents, key=order)
    n_val = max(1, round(0.1 * len(documents)))
    return {"train": shuffled[n_val:], "val": shuffled[:n_val]}


def write_dataset(name, documents, tokenizer_kind, source):
    """Tokenize documents into data/NAME. UserError where it exists already."""
    target = DATA_DIR / name
    work = DATA_DIR / f".{name}.tmp"
    with locked(work):
        try:
            if target.exists():
                raise UserError(f"{target} exists already; delete it to prepare it again")
            new = work / "new"
            shutil.rmtree(new, ignore_errors=True)  # a process that was killed may have left it
            new.mkdir()
            meta = write_parts(new, documents, tokenizer_kind, source)
            os.rename(new, target)
        finally:
            shutil.rmtree(work)
    n_train, n_val = meta["train"]["tokens"], meta["val"]["tokens"]
    print(f"{target}: {n_train:,} train, {n_val:,} val tokens from {source}")


def write_parts(folder, documents, tokenizer_kind, source):
    """Write train.bin, val.bin and meta.json -> the content of meta.json."""
    has_eot = len(documents) > 1  # a single document needs no separator
    spec = {"kind": tokenizer_kind, "has_eot": has_eot}
    if tokenizer_kind == "char":
        texts = (encode(document, document.read(), bytes.decode) for document in documents)
        spec["chars"] = "".join(sorted(set(itertools.chain.from_iterable(texts))))
    tokenizer = load_tokenizer(spec)
    largest = tokenizer.vocab_size - 1
    dtype = next(t for t in ("uint8", "uint16", "uint32") if largest <= np.iinfo(t).max)
    meta = {"source": source, "tokenizer": tokenizer.spec}
    meta |= {"vocab_size": tokenizer.vocab_size, "dtype": dtype}
    for part, of_part in split(documents).items():
        meta[part] = write_split(folder / f"{part}.bin", of_part, tokenizer, dtype)
        n = meta[part]["tokens"]
        if n < 2:
            raise UserError(f"{source} is too short: {n} tokens would be left for {part}.bin")
    with new_file(folder / "meta.json") as f:
        f.write(json.dumps(meta, indent=1).encode())
    return meta


def write_split(path, documents, tokenizer, dtype):
    """Write a .bin file -> its entry in meta.json. text_bytes does not count separators."""
    n_tokens = 0
    text_bytes = 0
    sha256 = hashlib.sha256()
    with new_file(path) as f:
        for document in documents:
            data = document.read()
            ids = encode(document, data, tokenizer.encode)
            if tokenizer.eot is not None:
                ids = np.append(ids, np.uint32(tokenizer.eot))
            ids = ids.astype(dtype)
            f.write(ids)
            sha256.update(ids)
            n_tokens += len(ids)
            text_bytes += len(data)
    sizes = {"documents": len(documents), "tokens": n_tokens, "text_bytes": text_bytes}
    return {**sizes, "sha256": sha256.hexdigest()}


def encode(document, data, encoder):
    """encoder(data) for the bytes of a document; UserError where they should be text."""
    try:
        return encoder(data)
    except UnicodeDecodeError as e:
        problem = f"{document.name} is not UTF-8 text (it has the byte 0x{data[e.start]:02x})"
        raise UserError(f"{problem}; --tokenizer byte takes any file") from None


def standard_library():
    """The source of Python's standard library, as bytes."""
    skip = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
    documents = find_documents(Path(sysconfig.get_path("stdlib")), "*.py", skip)
    if not documents:
        raise UserError("this Python has no standard library as files (*.py)")
    source = f"Python {platform.python_version()}'s standard library"
    write_dataset("stdlib", documents, "byte", source)


def shakespeare(name, file=None):
    """Tiny Shakespeare, downloaded or from a copy; its sha256 is compared either way."""
    import requests  # the other data sets need no download

    place = file or SHAKESPEARE_URL
    hint = f"download it elsewhere, then: python prepare_data.py {name} --input FILE"
    try:
        text = Path(file).read_bytes() if file else requests.get(place, timeout=30).content
    except OSError as e:  # those of requests, too
        raise UserError(f"could not fetch {place} ({type(e).__name__}); {hint}") from None
    if hashlib.sha256(text).hexdigest() != SHAKESPEARE_SHA256:
        raise UserError(f"{place} is not tiny Shakespeare, by its sha256; {hint}")
    tokenizer_kind = "char" if name == "shakespeare_char" else "gpt2"
    write_dataset(name, [Document("input.txt", text)], tokenizer_kind, SHAKESPEARE_URL)


def text(name, inputs, tokenizer_kind):
    """Files and folders of your own."""
    documents = []
    for path in map(Path, inputs):
        if not path.exists():
            raise UserError(f"there is no --input {path}")
        new = find_documents(path) if path.is_dir() else [Document(path.name, path)]
        if not any(document.content.stat().st_size for document in new):
            raise UserError(f"--input {path} is empty")
        documents += new
    if len({document.content.resolve() for document in documents}) < len(documents):
        raise UserError("--input names a file twice, which could put it in both splits")
    write_dataset(name, documents, tokenizer_kind, ", ".join(map(str, inputs)))


def read_options(argv):
    parser = Parser(description=__doc__)
    datasets = parser.add_subparsers(dest="dataset", metavar="NAME", required=True)
    datasets.add_parser("stdlib")
    for name in ("shakespeare_char", "shakespeare"):
        copy = datasets.add_parser(name)
        copy.add_argument("--input", help="a copy of the text, where there is no network")
    own = datasets.add_parser("text")
    name = checked(str, re.compile(r"\w[\w.-]*").fullmatch, "is not a plain folder name")
    own.add_argument("--name", type=name, required=True, help="of the data set, a folder in data/")
    own.add_argument("--input", nargs="+", required=True, help="files or folders")
    own.add_argument("--tokenizer", choices=["gpt2", "char", "byte"], default="gpt2")
    corpus = datasets.add_parser("openwebtext")
    corpus.add_argument("--shards", type=shard_range, default="0-20", help="a part: 0-3")
    place = corpus.add_mutually_exclusive_group()
    address = checked(str, re.compile("https?://").match, "must begin with http:// or https://")
    place.add_argument("--mirror", type=address, help="a server instead of https://huggingface.co")
    place.add_argument("--source", help="a folder that holds the archives")
    corpus.add_argument("--keep", action="store_true", help="keep the downloaded archives")
    return parser.parse_args(argv)


def shard_range(text):
    """ "0-3" -> range(0, 4)"""
    first, _, last = text.partition("-")
    last = last or first
    if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last) <= 20):
        problem = f"{text} is neither a number from 0 to 20 nor a range like 0-3"
        raise argparse.ArgumentTypeError(problem)
    return range(int(first), int(last) + 1)


def main(argv=None):
    options = read_options(sys.argv[1:] if argv is None else argv)
    if options.dataset == "stdlib":
        standard_library()
    elif options.dataset == "text":
        text(options.name, options.input, options.tokenizer)
    elif options.dataset == "openwebtext":
        from utils import openwebtext  # only this one needs requests

        places = (options.mirror, options.source, options.keep)
        openwebtext.prepare(DATA_DIR, options.shards, *places)
    else:
        shakespeare(options.dataset, options.input)


if __name__ == "__main__":
    run_program(main)
