"""Tokenizers: bytes <-> token ids."""

import sys

import numpy as np

from utils.settings import UserError


class Tokenizer:
    """A subclass has encode(data): bytes -> array of ids.

    encode raises UnicodeDecodeError where the bytes should be UTF-8 and are not.
    pieces: the bytes of each id. The next id, or any above it, ends a document.
    eot: the id that ends a document, or None where the data set is a single document.
    spec: what meta.json and a checkpoint store of the tokenizer, for load_tokenizer.
    """

    def __init__(self, pieces, has_eot, kind, **arguments):
        self.pieces = pieces
        self.vocab_size = len(pieces) + 1
        self.eot = len(pieces) if has_eot else None
        self.spec = {"kind": kind, "has_eot": has_eot, **arguments}

    def decode(self, ids):
        n = len(self.pieces)
        return b"".join(self.pieces[i] if i < n else b"<|endoftext|>" for i in ids)


class ByteTokenizer(Tokenizer):
    """Each byte is its own id, and 256 ends a document. It takes any file, text or not."""

    def __init__(self, has_eot):
        super().__init__([bytes([i]) for i in range(256)], has_eot, "byte")

    def encode(self, data):
        return np.frombuffer(data, np.uint8)


class CharTokenizer(Tokenizer):
    """One id for each Unicode character of chars, which are sorted, and if has_eot one more."""

    def __init__(self, chars, has_eot):
        super().__init__([c.encode() for c in chars], has_eot, "char", chars=chars)
        self.vocab_size = len(chars) + has_eot
        self.ids = np.full(sys.maxunicode + 1, -1, np.int32)
        self.ids[[ord(c) for c in chars]] = np.arange(len(chars))

    def encode(self, data):
        codes = np.frombuffer(data.decode().encode("utf-32-le"), np.uint32)
        ids = self.ids[codes]
        unknown = codes[ids < 0]
        if len(unknown):
            known = f"{len(self.spec['chars']):,} of this vocabulary: {self.spec['chars'][:100]!r}"
            character = f"{chr(unknown[0])!r} (U+{unknown[0]:04X})"
            raise UserError(f"the character {character} is not among the {known}")
        return ids


class GPT2Tokenizer(Tokenizer):
    """GPT-2's byte-pair encoding, from tiktoken, which downloads its vocabulary once."""

    def __init__(self, has_eot):
        import tiktoken

        try:
            self.bpe = tiktoken.get_encoding("gpt2")
        except (OSError, ValueError) as e:  # requests' exceptions are OSErrors
            hint = "set TIKTOKEN_CACHE_DIR to a folder that holds it, or use char or byte tokens"
            reason = f"{type(e).__name__}: {str(e)[:150]}"
            raise UserError(f"no GPT-2 vocabulary ({reason}); {hint}") from e
        pieces = [self.bpe.decode_single_token_bytes(i) for i in range(50256)]
        super().__init__(pieces, has_eot, "gpt2")
        if 50256 in self.encode(b"<|endoftext|>"):  # as before version 0.11
            raise UserError(f"tiktoken {tiktoken.__version__} is too old; 0.11 is needed")

    def encode(self, data):
        # Special tokens in the data are text. encode_ordinary would build a Python list first.
        return self.bpe.encode_to_numpy(data.decode(), disallowed_special=()).astype(np.uint16)


def load_tokenizer(spec):
    """The tokenizer that a meta.json or a checkpoint describes."""
    kinds = {"byte": ByteTokenizer, "char": CharTokenizer, "gpt2": GPT2Tokenizer}
    if spec.get("kind") not in kinds:
        raise UserError(f"unknown tokenizer {spec.get('kind')!r}, not one of {', '.join(kinds)}")
    arguments = {key: value for key, value in spec.items() if key != "kind"}
    return kinds[spec["kind"]](**arguments)
