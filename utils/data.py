"""A prepared data set, data/NAME: the token files and meta.json that prepare_data.py writes."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from utils.settings import UserError

DATA_DIR = Path("data")
SMALL = ("stdlib", "shakespeare_char", "shakespeare")  # train.py prepares these itself


class Dataset:
    """data/NAME, compared with its meta.json. UserError where it is damaged or too short."""

    def __init__(self, name, block_size):
        self.folder = DATA_DIR / name
        self.block_size = block_size
        try:
            self.meta = json.loads((self.folder / "meta.json").read_text(encoding="utf-8"))
            self.vocab_size = int(self.meta["vocab_size"])
            self.tokenizer = dict(self.meta["tokenizer"])
            self.source = self.meta["source"]
            self.sha256 = {split: self.meta[split]["sha256"] for split in ("train", "val")}
            sizes = {split: len(self.tokens(split)) for split in ("train", "val")}
            for split, size in sizes.items():
                if size != self.n_tokens(split):
                    raise ValueError(f"{split}.bin has {size} tokens, not {self.n_tokens(split)}")
        except (FileNotFoundError, ValueError, KeyError, TypeError) as e:
            reason = f"{type(e).__name__}: {e}"
            raise UserError(f"{self.folder} is damaged ({reason}); prepare it again") from None
        if min(sizes.values()) <= block_size:
            problem = f"{self.folder} has {sizes} tokens, too few for block_size={block_size}"
            raise UserError(f"{problem}; add text, or take a smaller block_size")

    def n_tokens(self, split):
        return self.meta[split]["tokens"]

    def tokens(self, split):
        """The token ids of a split, (n_tokens,)."""
        # Open the file each time: the pages that a memory map has touched count as used memory.
        return np.memmap(self.folder / f"{split}.bin", dtype=self.meta["dtype"], mode="r")


def prepare_if_small(name):
    """Run prepare_data.py if data/NAME is missing and small; UserError if it is large."""
    if (DATA_DIR / name).exists():
        return
    if name not in SMALL:
        raise UserError(f"there is no {DATA_DIR / name}; see: python prepare_data.py --help")
    print(f"preparing {DATA_DIR / name}", flush=True)
    program = Path(__file__).parent.parent / "prepare_data.py"
    done = subprocess.run([sys.executable, program, name], stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise UserError(done.stderr.strip())
