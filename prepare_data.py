"""Turn text into tokens: python prepare_data.py NAME writes data/NAME/{train.bin, val.bin, meta.json}.

    stdlib            the Python source of this interpreter's standard library, as bytes; no network
    shakespeare_char  tiny Shakespeare, one token a character
    shakespeare       tiny Shakespeare, GPT-2 BPE
    text              your own files: --name NAME --input FILE_OR_FOLDER ... --tokenizer gpt2|char|byte
    openwebtext       the corpus of the paper's experiment; --shards 0-3 for a part; see --help

A .bin file is a plain array of token ids; meta.json tells their dtype, number and sha256, the tokenizer
and the source. A data set appears complete or not at all.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from utils.settings import Parser, UserError, run_program
from utils.tokenizers import CharTokenizer, load_tokenizer

DATA_DIR = Path("data")
SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


# ---------------------------------------------------------------------------------------------------
# Reading a data set.


class Dataset:
    """data/NAME, checked against its meta.json. UserError where it is damaged or shorter than block_size."""

    def __init__(self, name, block_size):
        self.folder, self.block_size = DATA_DIR / name, block_size
        try:
            self.meta = json.loads((self.folder / "meta.json").read_text(encoding="utf-8"))
            self.vocab_size, self.tokenizer = int(self.meta["vocab_size"]), dict(self.meta["tokenizer"])
            self.source, self.sha256 = self.meta["source"], {}
            for split in ("train", "val"):  # what is needed later must be there now
                self.sha256[split], _ = self.meta[split]["sha256"], int(self.meta[split]["text_bytes"])
                found, told, path = len(self.tokens(split)), self.n_tokens(split), self.folder / f"{split}.bin"
                if found != told:
                    raise UserError(f"{path} holds {found} tokens, but meta.json says {told}; prepare it anew")
                if told <= block_size:
                    raise UserError(f"{path} has {told} tokens, too few for block_size={block_size}; add text")
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise UserError(f"{self.folder} is damaged ({type(e).__name__}: {e}); delete and prepare it anew") from None

    def n_tokens(self, split):
        return self.meta[split]["tokens"]

    def tokens(self, split):
        # Opened afresh each time: the pages that a long-lived memmap has touched count as resident memory.
        return np.memmap(self.folder / f"{split}.bin", dtype=self.meta["dtype"], mode="r")


def prepare_if_small(name):
    """Prepare a small data set that is not there yet; refuse another one with the command that prepares it."""
    if (DATA_DIR / name).exists():
        return
    if name not in SMALL:
        part = re.fullmatch(r"openwebtext(?:_(\d+(?:-\d+)?))?", name)
        command = f"text --name {name} --input FILE_OR_FOLDER"
        if part:
            command = "openwebtext" + (f" --shards {part[1]}" if part[1] else "")
        raise UserError(f"there is no data set {DATA_DIR / name}; prepare it: python prepare_data.py {command}")
    print(f"preparing {DATA_DIR / name}", flush=True)
    SMALL[name]()


# ---------------------------------------------------------------------------------------------------
# Writing a data set.


@dataclass
class Document:
    """A text under a name that is the same on every machine: a file, or bytes that begin at an offset of one."""

    name: str
    content: Path | bytes
    offset: int = 0

    def read(self):
        return self.content if isinstance(self.content, bytes) else self.content.read_bytes()


def find_documents(folder, pattern="*", skip=()):
    """Every file below a folder, as documents; no hidden or empty files, nothing below a folder named in skip."""
    documents = []
    for path in folder.rglob(pattern):
        parts = path.relative_to(folder).parts
        wanted = not any(part.startswith(".") or part in skip for part in parts)
        if wanted and path.is_file() and path.stat().st_size:
            documents.append(Document("/".join(parts), path))
    return documents


def split(documents):
    """Documents -> {"train": documents, "val": documents}, whatever order they come in.

    A single document is cut after 90 % of its bytes, at a character's end. Of several, the tenth whose
    names have the smallest sha256 are for validation.
    """
    if len(documents) == 1:
        name, data = documents[0].name, documents[0].read()
        cut = int(0.9 * len(data))
        while cut < len(data) and data[cut] & 0xC0 == 0x80:  # within a character of UTF-8
            cut += 1
        return {"train": [Document(name, data[:cut])], "val": [Document(name, data[cut:], cut)]}
    shuffled = sorted(documents, key=lambda doc: (hashlib.sha256(doc.name.encode()).digest(), str(doc.content)))
    n_val = max(1, round(0.1 * len(documents)))
    return {"train": shuffled[n_val:], "val": shuffled[:n_val]}


def write_dataset(name, documents, tokenizer_kind, source):
    """Tokenize documents into data/NAME, which must not exist yet; it appears when it is complete."""
    target = DATA_DIR / name
    if target.exists():
        raise UserError(f"{target} exists already; delete it to prepare it anew")
    if not documents:
        raise UserError(f"no text for {target}: {source} holds no file with anything in it")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{name}.{os.getpid()}.tmp")
    temporary.mkdir()
    try:
        tokenizer = make_tokenizer(tokenizer_kind, documents)
        dtype = next(t for t in ("uint8", "uint16", "uint32") if tokenizer.vocab_size - 1 <= np.iinfo(t).max)
        meta = {"source": source, "tokenizer": tokenizer.spec, "vocab_size": tokenizer.vocab_size, "dtype": dtype}
        for part, part_documents in split(documents).items():
            meta[part] = write_split(temporary / f"{part}.bin", part_documents, tokenizer, dtype)
            if meta[part]["tokens"] < 2:
                raise UserError(f"{source} is too short: {meta[part]['tokens']} tokens would be left for {part}.bin")
        (temporary / "meta.json").write_text(json.dumps(meta, indent=1, ensure_ascii=False), encoding="utf-8")
        os.rename(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    counts = ", ".join(f"{meta[part]['tokens']:,} {part}" for part in ("train", "val"))
    print(f"{target}: {counts} tokens; vocabulary {tokenizer.vocab_size:,}; from {source}")


def make_tokenizer(kind, documents):
    """The tokenizer for some documents; they need no separator where there is one alone."""
    has_eot = len(documents) > 1
    if kind != "char":
        return load_tokenizer({"kind": kind, "has_eot": has_eot})
    chars = set()
    for doc in documents:
        chars |= set(encode(doc, doc.read(), bytes.decode))
    return CharTokenizer("".join(sorted(chars)), has_eot)


def write_split(path, documents, tokenizer, dtype):
    """Write one .bin file -> its entry in meta.json. text_bytes counts the text alone, not what ends a document."""
    tokens, text_bytes, sha256 = 0, 0, hashlib.sha256()
    with open(path, "wb") as f:
        for doc in documents:
            data = doc.read()
            ids = encode(doc, data, tokenizer.encode)
            if tokenizer.eot is not None:
                ids = np.append(ids, np.uint32(tokenizer.eot))
            array = ids.astype(dtype).tobytes()
            f.write(array)
            sha256.update(array)
            tokens += len(ids)
            text_bytes += len(data)
    return {"documents": len(documents), "tokens": tokens, "text_bytes": text_bytes, "sha256": sha256.hexdigest()}


def encode(doc, data, encoder):
    """What an encoder makes of a document's bytes; UserError where they should be text and are not."""
    try:
        return encoder(data)
    except UnicodeDecodeError as e:
        where = f"byte 0x{data[e.start]:02x} at offset {doc.offset + e.start}"
        raise UserError(f"{doc.name} is not UTF-8 text ({where}); --tokenizer byte takes any file") from None


# ---------------------------------------------------------------------------------------------------
# The data sets.


def stdlib():
    folder = Path(sysconfig.get_path("stdlib"))
    skip = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
    version = ".".join(map(str, sys.version_info[:3]))
    write_dataset("stdlib", find_documents(folder, "*.py", skip), "byte", f"Python {version}'s standard library")


def shakespeare(tokenizer_kind, file=None):
    """Tiny Shakespeare from its address, or from a copy of it; checked either way."""
    try:
        text = Path(file).read_bytes() if file else download(SHAKESPEARE_URL)
    except OSError as e:
        raise UserError(f"--input {file}: {e.strerror}") from None
    found, place = hashlib.sha256(text).hexdigest(), file or SHAKESPEARE_URL
    if found != SHAKESPEARE_SHA256:
        what = f"{len(text):,} bytes with sha256 {found}, not {SHAKESPEARE_SHA256}"
        raise UserError(f"{place} is not tiny Shakespeare: {what}")
    name = "shakespeare_char" if tokenizer_kind == "char" else "shakespeare"
    write_dataset(name, [Document("input.txt", text)], tokenizer_kind, SHAKESPEARE_URL)


def download(url):
    import requests

    try:
        answer = requests.get(url, timeout=30)
        answer.raise_for_status()
    except requests.RequestException as e:
        what_to_do = "fetch it elsewhere and name the file with --input"
        raise UserError(f"could not fetch {url} ({type(e).__name__}); {what_to_do}") from None
    return answer.content


def text(name, inputs, tokenizer_kind):
    """Files and folders of one's own; what is named must exist and hold something."""
    documents = []
    for path in map(Path, inputs):
        if not path.exists():
            raise UserError(f"--input {path} does not exist")
        found = find_documents(path) if path.is_dir() else [Document(path.name, path)]
        if not found or not path.stat().st_size:
            raise UserError(f"--input {path} is empty")
        documents += found
    if len({doc.content.resolve() for doc in documents}) < len(documents):
        raise UserError("--input names a file twice, which could put it in both splits")
    write_dataset(name, documents, tokenizer_kind, ", ".join(map(str, inputs)))


SMALL = {  # prepared by train.py on first use
    "stdlib": stdlib,
    "shakespeare_char": lambda: shakespeare("char"),
    "shakespeare": lambda: shakespeare("gpt2"),
}


# ---------------------------------------------------------------------------------------------------
# The command line.


def read_options(argv):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    datasets = parser.add_subparsers(dest="dataset", metavar="NAME", required=True)
    datasets.add_parser("stdlib")
    for name in ("shakespeare_char", "shakespeare"):
        datasets.add_parser(name).add_argument("--input", help="a copy of the text, where there is no network")
    own = datasets.add_parser("text")
    name = matching(r"\w[\w.-]*", "is not a plain folder name")
    own.add_argument("--name", type=name, required=True, help="of the data set, a folder in data/")
    own.add_argument("--input", nargs="+", required=True, help="files or folders")
    own.add_argument("--tokenizer", choices=["gpt2", "char", "byte"], default="gpt2")
    corpus = datasets.add_parser("openwebtext")
    corpus.add_argument("--shards", type=shard_range, default="0-20", help="0 to 20, or 0-3: a part of the corpus")
    place = corpus.add_mutually_exclusive_group()
    address = matching("https?://.*", "must begin with http:// or https://")
    place.add_argument("--mirror", type=address, help="ask there instead of https://huggingface.co")
    place.add_argument("--source", type=matching(".+", "is no folder"), help="folder that holds the archives")
    corpus.add_argument("--keep", action="store_true", help="keep the downloaded archives")
    return parser.parse_args(argv)


def matching(pattern, problem):
    """A type for argparse: a text that matches a regular expression."""

    def check(text):
        if not re.fullmatch(pattern, text):
            raise argparse.ArgumentTypeError(f"{text!r} {problem}")
        return text

    return check


def shard_range(text):
    """ "0-3" -> range(0, 4)"""
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, -1)
    if not first <= last <= 20:
        raise argparse.ArgumentTypeError(f"{text} is neither a number from 0 to 20 nor a range like 0-3")
    return range(first, last + 1)


def main(argv=None):
    options = read_options(argv)
    if options.dataset == "stdlib":
        stdlib()
    elif options.dataset == "text":
        text(options.name, options.input, options.tokenizer)
    elif options.dataset == "openwebtext":
        from utils import openwebtext  # needs requests, which the others can do without

        openwebtext.prepare(DATA_DIR, options.shards, options.mirror, options.source, options.keep)
    else:
        shakespeare("char" if options.dataset == "shakespeare_char" else "gpt2", options.input)


if __name__ == "__main__":
    run_program(main)
