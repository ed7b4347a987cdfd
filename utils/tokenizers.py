"""Tokenizers: bytes <-> token ids."""

import sys

import numpy as np

from utils.settings import UserError


class Tokenizer:
    """A subclass has encode(data): bytes -> array of ids; text that is not UTF-8 raises UnicodeDecodeError.

    pieces: the bytes of each id; the next id, or any above it, ends a document. eot is that id, but None where the
    data set is a single document. spec is what meta.json and a checkpoint store of it, for load_tokenizer.
    """

    def __init__(self, pieces, has_eot, kind, **arguments):
        self.pieces, self.vocab_size = pieces, len(pieces) + 1
        self.eot = len(pieces) if has_eot else None
        self.spec = {"kind": kind, "has_eot": has_eot, **arguments}

    def decode(self, ids):
        return b"".join(self.pieces[i] if i < len(self.pieces) else b"<|endoftext|>" for i in ids)


class ByteTokenizer(Tokenizer):
    """Each byte is its own id, and 256 ends a document. Takes any file, text or not."""

    def __init__(self, has_eot):
        super().__init__([bytes([i]) for i in range(256)], has_eot, "byte")

    def encode(self, data):
        return np.frombuffer(data, np.uint8)


class CharTokenizer(Tokenizer):
    """One id for each Unicode character of `chars`, which are sorted, and one more that ends a document if has_eot."""

    def __init__(self, chars, has_eot):
        super().__init__([c.encode() for c in chars], has_eot, "char", chars=chars)
        self.vocab_size, self.ids = len(chars) + has_eot, np.full(sys.maxunicode + 1, -1, np.int32)
        self.ids[[ord(c) for c in chars]] = np.arange(len(chars))

    def encode(self, data):
        codes = np.frombuffer(data.decode().encode("utf-32-le"), np.uint32)
        ids = self.ids[codes]
        unknown = codes[ids < 0]
        if len(unknown):
            known = f"{len(self.spec['chars']):,} of this vocabulary: {self.spec['chars'][:100]!r}"
            raise UserError(f"the character {chr(unknown[0])!r} (U+{unknown[0]:04X}) is not among the {known}")
        return ids


class GPT2Tokenizer(Tokenizer):
    """GPT-2's byte-pair encoding, from tiktoken, which fetches its vocabulary once and keeps it."""

    def __init__(self, has_eot):
        import tiktoken

        try:
            self.bpe = tiktoken.get_encoding("gpt2")
        except (OSError, ValueError) as e:  # requests' exceptions are OSErrors
            hint = "set TIKTOKEN_CACHE_DIR to a folder that holds it, or use char or byte tokens"
            raise UserError(f"no GPT-2 vocabulary ({type(e).__name__}: {str(e)[:150]}); {hint}") from e
        super().__init__([self.bpe.decode_single_token_bytes(i) for i in range(50256)], has_eot, "gpt2")
        # Before 0.11, encode_to_numpy takes a text that reads like a special token for one, or is not there.
        if not hasattr(self.bpe, "encode_to_numpy") or 50256 in self.encode(b"<|endoftext|>"):
            raise UserError(f"tiktoken {tiktoken.__version__} is too old; pip install --upgrade 'tiktoken>=0.11'")

    def encode(self, data):
        # What looks like a special token is text; encode_ordinary would make a Python list on the way.
        return self.bpe.encode_to_numpy(data.decode(), disallowed_special=()).astype(np.uint16)


def load_tokenizer(spec):
    """The tokenizer that a meta.json or a checkpoint describes."""
    kinds = {"byte": ByteTokenizer, "char": CharTokenizer, "gpt2": GPT2Tokenizer}
    if spec.get("kind") not in kinds:
        raise UserError(f"unknown tokenizer {spec.get('kind')!r}: this version knows {', '.join(kinds)}")
    return kinds[spec["kind"]](**{key: value for key, value in spec.items() if key != "kind"})
