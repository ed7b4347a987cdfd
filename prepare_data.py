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
import itertools
import json
import os
import re
import shutil
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from command import Parser, UserError, run_program
from tokenizer import CharTokenizer, code_points, load_tokenizer

DATA_DIR = Path("data")
SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
PIECE_BYTES = 1 << 22  # text is read and tokenized in pieces of about this size
SAFE_CUT = re.compile(rb"[!-~]\n(?=[!-~])")  # see Document.pieces

# ---------------------------------------------------------------------------------------------------
# Documents, and which split they belong to.


@dataclass
class Document:
    """The bytes start to stop of a file, under a name that is the same on every machine."""

    name: str
    path: Path
    start: int
    stop: int

    def pieces(self):
        """Yield the document in pieces of about PIECE_BYTES that tokenize as the whole would.

        They end after a newline between two visible ASCII characters: neither UTF-8 nor GPT-2's
        splitting pattern joins anything across that. A file without such a place is one piece.
        """
        with open(self.path, "rb") as f:
            f.seek(self.start)
            left, rest = self.stop - self.start, bytearray()
            while left:
                block = f.read(min(PIECE_BYTES, left))
                if not block:
                    raise UserError(f"{self.path} became shorter while it was read")
                left -= len(block)
                searched = max(0, len(rest) - 2)
                rest += block
                cuts = [m.end() for m in SAFE_CUT.finditer(rest, searched)]
                if cuts and left:
                    yield bytes(rest[: cuts[-1]])
                    del rest[: cuts[-1]]
            yield bytes(rest)


def find_documents(folder, pattern="*", skip=()):
    """Every file below a folder, as documents; no hidden or empty files, nothing below a folder named in skip."""
    documents = []
    for path in folder.rglob(pattern):
        parts = path.relative_to(folder).parts
        wanted = not any(part.startswith(".") or part in skip for part in parts)
        if wanted and path.is_file() and path.stat().st_size:
            documents.append(Document("/".join(parts), path, 0, path.stat().st_size))
    return documents


def split(documents):
    """Documents -> {"train": documents, "val": documents}, whatever order they come in.

    A single document is cut after 90 % of its bytes, at a character's end. Of several, the tenth whose
    names have the smallest sha256 are for validation.
    """
    if len(documents) == 1:
        doc = documents[0]
        cut = doc.start + int(0.9 * (doc.stop - doc.start))
        with open(doc.path, "rb") as f:
            f.seek(cut)
            following = f.read(4)
        cut += next(
            (i for i, byte in enumerate(following) if byte & 0xC0 != 0x80), len(following)
        )  # past continuation bytes
        return {
            "train": [Document(doc.name, doc.path, doc.start, cut)],
            "val": [Document(doc.name, doc.path, cut, doc.stop)],
        }
    shuffled = sorted(documents, key=lambda doc: (hashlib.sha256(doc.name.encode()).digest(), str(doc.path)))
    n_val = max(1, round(0.1 * len(documents)))
    return {"train": shuffled[n_val:], "val": shuffled[:n_val]}


# ---------------------------------------------------------------------------------------------------
# Writing a data set.


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
        end = [] if tokenizer.eot is None else [np.array([tokenizer.eot])]
        for part, part_documents in split(documents).items():
            meta[part] = write_split(temporary / f"{part}.bin", part_documents, tokenizer, dtype, end)
            if meta[part]["tokens"] < 2:
                raise UserError(f"{source} is too short: {meta[part]['tokens']} tokens would be left for {part}.bin")
        (temporary / "meta.json").write_text(json.dumps(meta, indent=1, ensure_ascii=False), encoding="utf-8")
        os.rename(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    counts = ", ".join(f"{meta[part]['tokens']:,} {part}" for part in ("train", "val"))
    print(f"{target}: {counts} tokens; vocabulary {tokenizer.vocab_size:,}; from {source}")


def make_tokenizer(kind, documents):
    has_eot = len(documents) > 1
    if kind != "char":
        return load_tokenizer({"kind": kind, "has_eot": has_eot})
    codes = set()
    for doc in documents:
        for piece_codes in encode(doc, code_points):
            codes.update(np.unique(piece_codes).tolist())
    return CharTokenizer("".join(map(chr, sorted(codes))), has_eot)


def write_split(path, documents, tokenizer, dtype, end):
    """Write one .bin file -> its entry in meta.json. text_bytes counts the text alone, not what ends a document."""
    tokens, text_bytes, sha256, said = 0, 0, hashlib.sha256(), time.monotonic()
    with open(path, "wb") as f:
        for number, doc in enumerate(documents, 1):
            for ids in itertools.chain(encode(doc, tokenizer.encode), end):
                array = ids.astype(dtype).tobytes()
                f.write(array)
                sha256.update(array)
                tokens += len(ids)
                if time.monotonic() - said > 2:
                    said = time.monotonic()
                    print(f"  {path.name}: {tokens:,} tokens, document {number:,} of {len(documents):,}", flush=True)
            text_bytes += doc.stop - doc.start
    return {"documents": len(documents), "tokens": tokens, "text_bytes": text_bytes, "sha256": sha256.hexdigest()}


def encode(doc, encoder):
    """Yield the encoder's array for each piece of a document; UserError where it should be text and is not."""
    offset = doc.start
    for piece in doc.pieces():
        try:
            yield encoder(piece)
        except UnicodeDecodeError as e:
            where = f"byte 0x{piece[e.start]:02x} at offset {offset + e.start}"
            raise UserError(f"{doc.path} is not UTF-8 text ({where}); --tokenizer byte takes any file") from None
        offset += len(piece)


# ---------------------------------------------------------------------------------------------------
# The data sets.


def stdlib():
    folder = Path(sysconfig.get_path("stdlib"))
    skip = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
    version = ".".join(map(str, sys.version_info[:3]))
    write_dataset("stdlib", find_documents(folder, "*.py", skip), "byte", f"Python {version}'s standard library")


def shakespeare(name, file=None):
    """Tiny Shakespeare from its address, or from a copy of it; checked either way."""
    with tempfile.TemporaryDirectory() as folder:
        if file is None:
            file = Path(folder) / "input.txt"
            file.write_bytes(download(SHAKESPEARE_URL))
        try:
            text = Path(file).read_bytes()
        except OSError as e:
            raise UserError(f"--input {file}: {e.strerror}") from None
        found = hashlib.sha256(text).hexdigest()
        if found != SHAKESPEARE_SHA256:
            raise UserError(
                f"{file} is not tiny Shakespeare: {len(text):,} bytes with sha256 {found}, not {SHAKESPEARE_SHA256}"
            )
        document = Document("input.txt", Path(file), 0, len(text))
        write_dataset(name, [document], "char" if name == "shakespeare_char" else "gpt2", SHAKESPEARE_URL)


def download(url):
    import requests

    try:
        answer = requests.get(url, timeout=30)
        answer.raise_for_status()
    except requests.RequestException as e:
        raise UserError(
            f"could not fetch {url} ({type(e).__name__}); fetch it elsewhere and name the file with --input"
        ) from None
    return answer.content


def text(name, inputs, tokenizer_kind):
    """Files and folders of one's own; what is named must exist and hold something."""
    documents = []
    for path in map(Path, inputs):
        if path.is_dir():
            found = find_documents(path)
        elif path.is_file():
            found = [Document(path.name, path, 0, path.stat().st_size)] if path.stat().st_size else []
        else:
            raise UserError(f"--input {path} does not exist")
        if not found:
            raise UserError(f"--input {path} is empty")
        documents += found
    if len({doc.path.resolve() for doc in documents}) < len(documents):
        raise UserError("--input names a file twice, which could put it in both splits")
    write_dataset(name, documents, tokenizer_kind, ", ".join(map(str, inputs)))


SMALL = {  # prepared by train.py on first use
    "stdlib": stdlib,
    "shakespeare_char": lambda file=None: shakespeare("shakespeare_char", file),
    "shakespeare": lambda file=None: shakespeare("shakespeare", file),
}


def command(name):
    """What prepares the data set of a name, for messages."""
    part = re.fullmatch(r"openwebtext(?:_(\d+(?:-\d+)?))?", name)
    if part:
        return "python prepare_data.py openwebtext" + (f" --shards {part[1]}" if part[1] else "")
    return f"python prepare_data.py text --name {name} --input FILE_OR_FOLDER"


def read_options(argv):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", choices=[*SMALL, "text", "openwebtext"], help="which data set to prepare")
    parser.add_argument("--name", help="text: the data set's name, a folder in data/")
    parser.add_argument(
        "--input", nargs="+", help="text: files or folders; shakespeare: a copy, where there is no network"
    )
    parser.add_argument("--tokenizer", choices=["gpt2", "char", "byte"], help="text: default gpt2")
    parser.add_argument("--shards", help="openwebtext: 0 to 20 or 0-3, a part of it, in a data set of its own")
    parser.add_argument("--mirror", metavar="URL", help="openwebtext: ask there instead of https://huggingface.co")
    parser.add_argument("--source", metavar="FOLDER", help="openwebtext: take the archives from there")
    parser.add_argument("--keep", action="store_true", help="openwebtext: keep the downloaded archives")
    options = parser.parse_args(argv)
    belongs = {"name": "text", "tokenizer": "text", "input": "text shakespeare shakespeare_char"}
    for name, value in vars(options).items():
        if (
            name != "dataset"
            and value not in (None, False)
            and options.dataset not in belongs.get(name, "openwebtext").split()
        ):
            parser.error(f"--{name} is not for {options.dataset}, but for {belongs.get(name, 'openwebtext')}")
    if options.dataset == "text":
        if not options.name or not options.input:
            parser.error("text needs --name NAME and --input FILE_OR_FOLDER ...")
        if not re.fullmatch(r"\w[\w.-]*", options.name):
            parser.error(f"--name {options.name!r} is not a plain folder name")
    elif options.input and len(options.input) > 1:
        parser.error(f"--input {' '.join(options.input)}: {options.dataset} is one file")
    if options.source == "":
        parser.error("--source names no folder")
    if options.mirror is not None and (options.source or not re.match("https?://", options.mirror)):
        parser.error(f"--mirror {options.mirror} must begin with http:// or https://, and excludes --source")
    options.shards = read_shards(parser, options.shards)
    return options


def read_shards(parser, text):
    """ "0-3" -> range(0, 4)"""
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", "0-20" if text is None else text)
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, -1)
    if not first <= last <= 20:
        parser.error(f"--shards {text} is neither a number from 0 to 20 nor a range like 0-3")
    return range(first, last + 1)


def main(argv=None):
    options = read_options(argv)
    if options.dataset == "text":
        text(options.name, options.input, options.tokenizer or "gpt2")
    elif options.dataset == "openwebtext":
        import openwebtext  # needs requests, which the others can do without

        openwebtext.prepare(DATA_DIR, options.shards, options.mirror, options.source, options.keep)
    elif options.dataset == "stdlib":
        stdlib()
    else:
        shakespeare(options.dataset, options.input[0] if options.input else None)


if __name__ == "__main__":
    run_program(main)
