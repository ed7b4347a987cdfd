"""Turn text into tokens: python prepare_data.py NAME writes data/NAME/{train.bin, val.bin, meta.json}.

    stdlib            the Python source of this interpreter's standard library, as bytes; no network
    bytecode          no text: the instructions that Python compiles that library to, two bytes each; no network
    shakespeare_char  tiny Shakespeare, one token a character
    shakespeare       tiny Shakespeare, GPT-2 BPE
    text              your own files: --name NAME --input FILE_OR_FOLDER ... --tokenizer gpt2|char|byte
    openwebtext       the corpus of the paper's experiment; --shards 0-3 for a part; see --help

A .bin file is a plain array of token ids, of which meta.json tells the rest. A data set appears complete or not at all.
"""

import argparse
import dis
import hashlib
import itertools
import json
import os
import platform
import re
import shutil
import sysconfig
import types
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from utils.files import locked, new_file
from utils.settings import Parser, UserError, checked, run_program
from utils.tokenizers import load_tokenizer

DATA_DIR = Path("data")
SMALL = ("stdlib", "bytecode", "shakespeare_char", "shakespeare")  # prepared by train.py on first use
SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


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
        command = f"text --name {name} --input FILE_OR_FOLDER"
        if re.fullmatch(r"openwebtext(_[\d-]+)?", name):
            command = name.replace("_", " --shards ")
        raise UserError(f"there is no data set {DATA_DIR / name}; prepare it: python prepare_data.py {command}")
    print(f"preparing {DATA_DIR / name}", flush=True)
    main([name])


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
        unwanted = any(part.startswith(".") or part in skip for part in parts)
        if not unwanted and path.is_file() and path.stat().st_size:
            documents.append(Document("/".join(parts), path))
    return documents


def split(documents):
    """Documents, in any order -> {"train": documents, "val": documents}."""
    if len(documents) == 1:  # it is cut after 90 % of its bytes, at a character's end
        name, data = documents[0].name, documents[0].read()
        cut = int(0.9 * len(data))
        while cut < len(data) and data[cut] & 0xC0 == 0x80:  # within a character of UTF-8
            cut += 1
        return {"train": [Document(name, data[:cut])], "val": [Document(name, data[cut:], cut)]}
    # The tenth whose names have the smallest sha256 are for validation.
    shuffled = sorted(documents, key=lambda doc: (hashlib.sha256(os.fsencode(doc.name)).digest(), str(doc.content)))
    n_val = max(1, round(0.1 * len(documents)))
    return {"train": shuffled[n_val:], "val": shuffled[:n_val]}


def write_dataset(name, documents, tokenizer_kind, source):
    """Tokenize documents into data/NAME, which must not exist yet; it appears when it is complete."""
    target, work = DATA_DIR / name, DATA_DIR / f".{name}.tmp"
    with locked(work):
        if target.exists():
            raise UserError(f"{target} exists already; delete it to prepare it anew")
        shutil.rmtree(work / "new", ignore_errors=True)  # left by a process that was killed
        (work / "new").mkdir()
        try:
            meta = write_parts(work / "new", documents, tokenizer_kind, source)
            os.rename(work / "new", target)
        finally:
            shutil.rmtree(work / "new", ignore_errors=True)
    print(f"{target}: {meta['train']['tokens']:,} train, {meta['val']['tokens']:,} val tokens from {source}")


def write_parts(folder, documents, tokenizer_kind, source):
    """Write train.bin, val.bin and meta.json -> what the latter holds."""
    spec = {"kind": tokenizer_kind, "has_eot": len(documents) > 1}  # one document alone needs no separator
    if tokenizer_kind == "char":
        texts = (encode(doc, doc.read(), bytes.decode) for doc in documents)
        spec["chars"] = "".join(sorted(set(itertools.chain.from_iterable(texts))))
    tokenizer = load_tokenizer(spec)
    dtype = next(t for t in ("uint8", "uint16", "uint32") if tokenizer.vocab_size - 1 <= np.iinfo(t).max)
    meta = {"source": source, "tokenizer": tokenizer.spec, "vocab_size": tokenizer.vocab_size, "dtype": dtype}
    for part, part_documents in split(documents).items():
        meta[part] = write_split(folder / f"{part}.bin", part_documents, tokenizer, dtype)
        if meta[part]["tokens"] < 2:
            raise UserError(f"{source} is too short: {meta[part]['tokens']} tokens would be left for {part}.bin")
    with new_file(folder / "meta.json") as f:
        f.write(json.dumps(meta, indent=1).encode())
    return meta


def write_split(path, documents, tokenizer, dtype):
    """Write one .bin file -> its entry in meta.json. text_bytes counts the text alone, not what ends a document."""
    tokens, text_bytes, sha256 = 0, 0, hashlib.sha256()
    with new_file(path) as f:
        for doc in documents:
            data = doc.read()
            ids = encode(doc, data, tokenizer.encode)
            if tokenizer.eot is not None:
                ids = np.append(ids, np.uint32(tokenizer.eot))
            ids = ids.astype(dtype)
            f.write(ids)
            sha256.update(ids)
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


def standard_library(name):
    """stdlib or bytecode: the source of what comes with Python, or what Python compiles it to."""
    skip = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
    documents = find_documents(Path(sysconfig.get_path("stdlib")), "*.py", skip)
    if not documents:
        raise UserError("this Python has no standard library as files (*.py)")
    source = f"Python {platform.python_version()}'s standard library"
    if name == "bytecode":
        documents, source = [Document(doc.name, bytecode(doc.read())) for doc in documents], f"{source}, compiled"
    write_dataset(name, documents, "byte", source)


def bytecode(source):
    """Python source -> its instructions, two bytes each: the operation, and the lowest byte of its argument. Those of a
    function follow those of what defines it; no names, constants or inline caches. Nothing is executed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of strings with odd escapes
        code, pairs = [compile(source, "a module", "exec", dont_inherit=True)], []
    for function in code:  # which grows
        code += [constant for constant in function.co_consts if isinstance(constant, types.CodeType)]
        pairs += zip(function.co_code[::2], function.co_code[1::2])
    return bytes(itertools.chain.from_iterable(pair for pair in pairs if pair[0] != dis.opmap.get("CACHE")))


def shakespeare(name, file=None):
    """Tiny Shakespeare from its address, or from a copy of it; checked either way."""
    import requests  # which the others can do without

    place, hint = file or SHAKESPEARE_URL, f"fetch it elsewhere, then: python prepare_data.py {name} --input FILE"
    try:
        text = Path(file).read_bytes() if file else requests.get(SHAKESPEARE_URL, timeout=30).content
    except OSError as e:  # requests' exceptions, too
        raise UserError(f"could not fetch {place} ({type(e).__name__}); {hint}") from None
    if (found := hashlib.sha256(text).hexdigest()) != SHAKESPEARE_SHA256:
        raise UserError(f"{place} is not tiny Shakespeare: its sha256 is {found}, not {SHAKESPEARE_SHA256}; {hint}")
    tokenizer_kind = "char" if name == "shakespeare_char" else "gpt2"
    write_dataset(name, [Document("input.txt", text)], tokenizer_kind, SHAKESPEARE_URL)


def text(name, inputs, tokenizer_kind):
    """Files and folders of one's own."""
    documents = []
    for path in map(Path, inputs):
        found = find_documents(path) if path.is_dir() else [Document(path.name, path)]
        if not path.is_dir() and not path.is_file():
            raise UserError(f"--input {path} is no file or folder")
        if not any(doc.content.stat().st_size for doc in found):
            raise UserError(f"--input {path} is empty")
        documents += found
    if len({doc.content.resolve() for doc in documents}) < len(documents):
        raise UserError("--input names a file twice, which could put it in both splits")
    write_dataset(name, documents, tokenizer_kind, ", ".join(map(str, inputs)))


def read_options(argv):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    datasets = parser.add_subparsers(dest="dataset", metavar="NAME", required=True)
    datasets.add_parser("stdlib")
    datasets.add_parser("bytecode")
    for name in ("shakespeare_char", "shakespeare"):
        datasets.add_parser(name).add_argument("--input", help="a copy of the text, where there is no network")
    own = datasets.add_parser("text")
    name = checked(str, re.compile(r"\w[\w.-]*").fullmatch, "is not a plain folder name")
    own.add_argument("--name", type=name, required=True, help="of the data set, a folder in data/")
    own.add_argument("--input", nargs="+", required=True, help="files or folders")
    own.add_argument("--tokenizer", choices=["gpt2", "char", "byte"], default="gpt2")
    corpus = datasets.add_parser("openwebtext")
    corpus.add_argument("--shards", type=shard_range, default="0-20", help="0 to 20, or 0-3: a part of the corpus")
    place = corpus.add_mutually_exclusive_group()
    address = checked(str, re.compile("https?://").match, "must begin with http:// or https://")
    place.add_argument("--mirror", type=address, help="ask there instead of https://huggingface.co")
    place.add_argument("--source", type=checked(str, len, "is no folder"), help="folder that holds the archives")
    corpus.add_argument("--keep", action="store_true", help="keep the downloaded archives")
    return parser.parse_args(argv)


def shard_range(text):
    """ "0-3" -> range(0, 4)"""
    first, _, last = text.partition("-")
    if not (first.isdecimal() and (last or first).isdecimal() and int(first) <= int(last or first) <= 20):
        raise argparse.ArgumentTypeError(f"{text} is neither a number from 0 to 20 nor a range like 0-3")
    return range(int(first), int(last or first) + 1)


def main(argv=None):
    options = read_options(argv)
    if options.dataset in ("stdlib", "bytecode"):
        standard_library(options.dataset)
    elif options.dataset == "text":
        text(options.name, options.input, options.tokenizer)
    elif options.dataset == "openwebtext":
        from utils import openwebtext  # needs requests, which the others can do without

        openwebtext.prepare(DATA_DIR, options.shards, options.mirror, options.source, options.keep)
    else:
        shakespeare(options.dataset, options.input)


if __name__ == "__main__":
    run_program(main)
