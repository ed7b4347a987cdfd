"""Tokenizers: bytes <-> token ids. Each has

spec                what meta.json and a checkpoint store of it, for load_tokenizer
vocab_size          ids are below this
eot                 the id that ends a document; None where the data set is a single one, so that none was trained
encode(data)        bytes -> array of ids; text that is not UTF-8 raises UnicodeDecodeError
decode(ids)         ids -> bytes
"""

import numpy as np

from utils.settings import UserError

EOT_TEXT = b"<|endoftext|>"


class ByteTokenizer:
    """Each byte is its own id, and 256 ends a document. Takes any file, text or not."""

    vocab_size = 257

    def __init__(self, has_eot):
        self.eot = 256 if has_eot else None
        self.spec = {"kind": "byte", "has_eot": has_eot}

    def encode(self, data):
        return np.frombuffer(data, np.uint8)

    def decode(self, ids):
        return b"".join(bytes([i]) if i < 256 else EOT_TEXT for i in ids)


class CharTokenizer:
    """One id for each Unicode character of `chars`, and one more that ends a document if has_eot."""

    def __init__(self, chars, has_eot):
        self.chars, self.codes = chars, np.array([ord(c) for c in chars], np.uint32)  # sorted
        self.eot = len(chars) if has_eot else None
        self.vocab_size = len(chars) + has_eot
        self.spec = {"kind": "char", "chars": chars, "has_eot": has_eot}

    def encode(self, data):
        codes = np.frombuffer(data.decode().encode("utf-32-le"), np.uint32)
        ids = np.searchsorted(self.codes, codes).clip(max=len(self.codes) - 1)
        unknown = codes[self.codes[ids] != codes]
        if len(unknown):
            c = chr(unknown[0])
            known = f"{len(self.chars):,} of this vocabulary: {self.chars[:100]!r}"
            raise UserError(f"the character {c!r} (U+{ord(c):04X}) is not among the {known}")
        return ids

    def decode(self, ids):
        return b"".join(self.chars[i].encode() if i < len(self.chars) else EOT_TEXT for i in ids)


class GPT2Tokenizer:
    """GPT-2's byte-pair encoding, from tiktoken, which fetches its vocabulary once and keeps it."""

    vocab_size = 50257

    def __init__(self, has_eot):
        import tiktoken

        self.eot = 50256 if has_eot else None
        self.spec = {"kind": "gpt2", "has_eot": has_eot}
        try:
            self.bpe = tiktoken.get_encoding("gpt2")
        except (OSError, ValueError) as e:  # requests' exceptions are OSErrors
            raise UserError(
                "the GPT-2 vocabulary could not be loaded; set TIKTOKEN_CACHE_DIR to a folder that holds it, "
                f"or use char or byte tokens, which need no download ({type(e).__name__}: {str(e)[:150]})"
            ) from e
        # Before 0.11, encode_to_numpy takes a text that reads like a special token for one, or is not there.
        if not hasattr(self.bpe, "encode_to_numpy") or 50256 in self.encode(EOT_TEXT):
            raise UserError(f"tiktoken {tiktoken.__version__} is too old; pip install --upgrade 'tiktoken>=0.11'")

    def encode(self, data):
        # What looks like a special token is text; encode_ordinary would make a Python list on the way.
        return self.bpe.encode_to_numpy(data.decode(), disallowed_special=()).astype(np.uint16)

    def decode(self, ids):  # a model's vocabulary may be padded beyond the tokenizer's
        return b"".join(self.bpe.decode_single_token_bytes(i) if i < self.vocab_size else b"\xff" for i in ids)


def load_tokenizer(spec):
    """The tokenizer that a meta.json or a checkpoint describes."""
    kinds = {"byte": ByteTokenizer, "char": CharTokenizer, "gpt2": GPT2Tokenizer}
    arguments = {key: value for key, value in spec.items() if key != "kind"}
    if spec.get("kind") not in kinds:
        raise UserError(f"unknown tokenizer {spec.get('kind')!r}: this version knows {', '.join(kinds)}")
    return kinds[spec["kind"]](**arguments)
