"""prepare_data.py: what it writes against independent readings of the same text, and what it refuses."""

import dis
import hashlib
import json
import random
import shutil
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import tiktoken

import prepare_data
from utils.settings import UserError
from conftest import SHARED, prepare_tiny
from prepare_data import Document, split
from utils.files import locked
from utils.tokenizers import ByteTokenizer, CharTokenizer, GPT2Tokenizer, load_tokenizer


def read(name, part):
    meta = json.loads(Path(f"data/{name}/meta.json").read_text(encoding="utf-8"))
    raw = Path(f"data/{name}/{part}.bin").read_bytes()
    assert hashlib.sha256(raw).hexdigest() == meta[part]["sha256"]
    ids = np.frombuffer(raw, meta["dtype"])
    assert len(ids) == meta[part]["tokens"] and ids.max() < meta["vocab_size"]
    return ids.tolist(), meta


COPY = SHARED / "tinyshakespeare.txt"
COUNTS = [("shakespeare_char", (1_003_854, 111_540)), ("shakespeare", (301_966, 36_059))]


@pytest.mark.skipif(not COPY.exists(), reason="needs a copy of tiny Shakespeare beside the project")
@pytest.mark.parametrize("name, tokens", COUNTS)
def test_tiny_shakespeare(name, tokens, gpt2_vocabulary):
    prepare_data.main([name, "--input", str(COPY)])
    text = COPY.read_text(encoding="ascii")
    cut = int(0.9 * len(text))
    for part, expected, count in zip(("train", "val"), (text[:cut], text[cut:]), tokens):
        ids, meta = read(name, part)
        assert len(ids) == count
        assert meta[part]["text_bytes"] == len(expected)
        if name == "shakespeare_char":
            chars = sorted(set(text))
            assert "".join(chars[i] for i in ids) == expected
            assert (meta["vocab_size"], meta["dtype"]) == (65, "uint8")
        else:
            assert ids == tiktoken.get_encoding("gpt2").encode_ordinary(expected)
            assert (meta["vocab_size"], meta["dtype"]) == (50257, "uint16")


def test_what_a_killed_process_left_is_no_obstacle_and_one_at_work_is(tiny_data):
    shutil.move("data/tiny", "before")
    Path("data/.tiny.tmp/new").mkdir(parents=True)
    Path("data/.tiny.tmp/new/train.bin").write_bytes(b"half")
    with locked(Path("data/.tiny.tmp")), pytest.raises(UserError, match="another process is at work in data/.tiny.tmp"):
        prepare_tiny()
    prepare_tiny()
    assert [path.name for path in Path("data").iterdir()] == ["tiny"]
    assert all(path.read_bytes() == Path("before", path.name).read_bytes() for path in Path("data/tiny").iterdir())


def test_stdlib_holds_this_pythons_source_split_by_file():
    prepare_data.main(["stdlib"])
    documents = {}
    for part in ("train", "val"):
        ids, meta = read("stdlib", part)
        assert (meta["vocab_size"], meta["dtype"]) == (257, "uint16")
        text = "".join(map(chr, ids)).split(chr(256))
        assert text.pop() == ""  # each document ends with the separator
        documents[part] = {document.encode("latin-1") for document in text}
    library = Path(sysconfig.get_path("stdlib"))
    assert all(len(twin) < 200 for twin in documents["train"] & documents["val"])  # one-line files that are alike
    everything = documents["train"] | documents["val"]
    assert all((library / name).read_bytes() in everything for name in ("ast.py", "json/decoder.py", "typing.py"))
    assert (library / "site.py").read_bytes() in everything
    installed, tests = ([*library.glob(pattern)] for pattern in ("site-packages/*/*.py", "test/test_a*.py"))
    for unwanted in installed[:25] + tests[:25]:
        assert unwanted.stat().st_size < 200 or unwanted.read_bytes() not in everything
    size = {part: sum(map(len, documents[part])) for part in documents}
    assert 0.03 < size["val"] / size["train"] < 0.3
    assert f"{sys.version_info[0]}.{sys.version_info[1]}" in meta["source"]


def test_bytecode_holds_the_instructions_of_each_module_and_of_all_functions_in_it():
    """As Python's own disassembler lists them, whose arguments include those of EXTENDED_ARG."""
    prepare_data.main(["bytecode"])
    documents = []
    for part in ("train", "val"):
        ids, meta = read("bytecode", part)
        documents += "".join(map(chr, ids)).split(chr(256))[:-1]
        assert meta["vocab_size"] == 257
    for name in ("ast.py", "json/decoder.py", "typing.py"):
        source = Path(sysconfig.get_path("stdlib"), name).read_text("utf-8")
        queue, expected = [compile(source, name, "exec")], b""
        while queue:
            code = queue.pop(0)
            for instruction in dis.get_instructions(code):
                expected += bytes([instruction.opcode, (instruction.arg or 0) % 256])
            queue += [constant for constant in code.co_consts if hasattr(constant, "co_code")]
        assert len(expected) > 2000 and expected.decode("latin-1") in documents


def test_the_split_does_not_depend_on_the_order_of_the_listing():
    documents = [Document(f"folder/{n}.py", Path("x")) for n in range(100)]
    expected = split(documents)
    random.Random(0).shuffle(documents)
    assert split(documents) == expected
    assert (len(expected["train"]), len(expected["val"])) == (90, 10)
    digests = {part: [hashlib.sha256(d.name.encode()).hexdigest() for d in expected[part]] for part in expected}
    assert max(digests["val"]) < min(digests["train"])


def test_text_of_ones_own_characters():
    Path("in").mkdir()
    texts = {"a.txt": "äöü ß\n", "b.txt": "zwölf Boxkämpfer\r\n", "sub/c.txt": "日本語\n"}
    for name, text in texts.items():
        Path("in", name).parent.mkdir(exist_ok=True)
        Path("in", name).write_bytes(text.encode())
    Path("in/.hidden").write_text("no")
    Path("in/empty").write_text("")
    prepare_data.main(["text", "--name=mine", "--input", "in", "--tokenizer=char"])
    (train, meta), (val, _) = read("mine", "train"), read("mine", "val")
    chars = sorted(set("".join(texts.values())))
    assert meta["vocab_size"] == len(chars) + 1
    decoded = ["".join((chars + ["<end>"])[i] for i in ids) for ids in (train, val)]
    assert sorted("".join(decoded).split("<end>")[:-1]) == sorted(texts.values())
    assert meta["train"]["text_bytes"] + meta["val"]["text_bytes"] == sum(len(t.encode()) for t in texts.values())


def test_any_file_as_bytes_cut_after_nine_tenths():
    data = random.Random(0).randbytes(10_000)
    Path("blob").write_bytes(data)
    prepare_data.main(["text", "--name=blob", "--input", "blob", "--tokenizer=byte"])
    (train, _), (val, _) = read("blob", "train"), read("blob", "val")
    assert bytes(train + val) == data  # a single document needs no separator
    assert 9000 <= len(train) <= 9004
    assert load_tokenizer(json.loads(Path("data/blob/meta.json").read_text())["tokenizer"]).eot is None


def test_a_cut_never_falls_inside_a_character():
    for text in ("é" * 11, "a" + "日" * 13, "😀" * 7, "ab😀" * 5, "x日" * 2):
        parts = split([Document("t", text.encode())])
        assert "".join(d.read().decode() for (d,) in parts.values()) == text and parts["val"][0].offset > 0


def test_dtype_follows_the_vocabulary():
    for n_chars, dtype in ((256, "uint8"), (257, "uint16"), (65_536, "uint16"), (65_537, "uint32")):
        text = "".join(chr(c) for c in range(0x21, 0x21 + n_chars + 2048) if not 0xD800 <= c < 0xE000)[:n_chars]
        Path("t").write_text(text * 2, encoding="utf-8", newline="")
        prepare_data.main(["text", f"--name=n{n_chars}", "--input", "t", "--tokenizer=char"])
        ids, meta = read(f"n{n_chars}", "train")
        assert (meta["vocab_size"], meta["dtype"]) == (n_chars, dtype)
        assert max(ids) == n_chars - 1


def test_tokenizers_give_back_what_they_took(gpt2_vocabulary):
    text = "Ein Zwölfkampf: 日本 😀\r\n\tdone"
    for tokenizer in (ByteTokenizer(True), CharTokenizer("".join(sorted(set(text))), True), GPT2Tokenizer(True)):
        again = load_tokenizer(json.loads(json.dumps(tokenizer.spec)))
        ids = tokenizer.encode(text.encode()).tolist()
        assert again.encode(text.encode()).tolist() == ids
        assert again.decode(ids) == text.encode()
        assert max(ids) < tokenizer.eot == tokenizer.vocab_size - 1
        assert again.decode([tokenizer.eot]) == b"<|endoftext|>"
        assert tokenizer.decode([tokenizer.vocab_size + 40])  # padded ids do no harm


def test_text_that_reads_like_a_special_token_is_text(gpt2_vocabulary, monkeypatch):
    assert GPT2Tokenizer(True).encode(b"hello world").tolist() == [31373, 995]
    assert GPT2Tokenizer(True).encode(b"a <|endoftext|>").tolist() == [64, 1279, 91, 437, 1659, 5239, 91, 29]
    for old in (lambda self, text, **_: self.encode(text, allowed_special="all"), None):  # 0.9 and 0.10; before
        with monkeypatch.context() as patch:
            if old is None:
                patch.delattr(tiktoken.Encoding, "encode_to_numpy")
            else:
                patch.setattr(tiktoken.Encoding, "encode_to_numpy", lambda *a, **k: np.array(old(*a, **k)))
            with pytest.raises(UserError, match="too old"):
                GPT2Tokenizer(True)


def test_what_cannot_be_fetched_is_told_and_leaves_nothing_behind(monkeypatch):
    monkeypatch.setattr(prepare_data, "SHAKESPEARE_URL", "http://127.0.0.1:9/input.txt")  # nothing listens there
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: open("no/route"))
    Path("t").write_text("some text\n" * 100)
    failed = r"could not fetch http://127.0.0.1:9/input.txt .*--input"
    for command, words in (("shakespeare_char", failed), ("text --name=x --input t", "TIKTOKEN_CACHE_DIR")):
        with pytest.raises(UserError, match=words):
            prepare_data.main(command.split())
        assert not list(Path().glob("data/*"))
