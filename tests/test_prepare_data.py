"""prepare_data.py against independent readings of the same text."""

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

from conftest import SHARED, prepare_tiny

import prepare_data
from prepare_data import Document, split
from utils.data import prepare_if_small
from utils.files import locked
from utils.settings import UserError
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
    words = "another process is at work in data/.tiny.tmp"
    with locked(Path("data/.tiny.tmp")), pytest.raises(UserError, match=words):
        prepare_tiny()
    prepare_tiny()
    assert [path.name for path in Path("data").iterdir()] == ["tiny"]
    for path in Path("data/tiny").iterdir():
        assert path.read_bytes() == Path("before", path.name).read_bytes()


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
    # Only files of a line or two may be alike.
    assert all(len(twin) < 200 for twin in documents["train"] & documents["val"])
    everything = documents["train"] | documents["val"]
    for name in ("ast.py", "json/decoder.py", "typing.py", "site.py"):
        assert (library / name).read_bytes() in everything
    for pattern in ("site-packages/*/*.py", "test/test_a*.py"):
        for unwanted in [*library.glob(pattern)][:25]:
            assert unwanted.stat().st_size < 200 or unwanted.read_bytes() not in everything
    size = {part: sum(map(len, documents[part])) for part in documents}
    assert 0.03 < size["val"] / size["train"] < 0.3
    assert f"{sys.version_info[0]}.{sys.version_info[1]}" in meta["source"]


def test_the_split_does_not_depend_on_the_order_of_the_listing():
    documents = [Document(f"folder/{n}.py", Path("x")) for n in range(100)]
    expected = split(documents)
    random.Random(0).shuffle(documents)
    assert split(documents) == expected
    assert (len(expected["train"]), len(expected["val"])) == (90, 10)
    digest = lambda document: hashlib.sha256(document.name.encode()).hexdigest()  # noqa: E731
    assert max(map(digest, expected["val"])) < min(map(digest, expected["train"]))


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
    text_bytes = meta["train"]["text_bytes"] + meta["val"]["text_bytes"]
    assert text_bytes == sum(len(text.encode()) for text in texts.values())


def test_any_file_as_bytes_cut_after_nine_tenths():
    data = random.Random(0).randbytes(10_000)
    Path("blob").write_bytes(data)
    prepare_data.main(["text", "--name=blob", "--input", "blob", "--tokenizer=byte"])
    (train, _), (val, _) = read("blob", "train"), read("blob", "val")
    assert bytes(train + val) == data  # a single document needs no separator
    assert 9000 <= len(train) <= 9004
    meta = json.loads(Path("data/blob/meta.json").read_text())
    assert load_tokenizer(meta["tokenizer"]).eot is None


def test_a_cut_never_falls_inside_a_character():
    for text in ("é" * 11, "a" + "日" * 13, "😀" * 7, "ab😀" * 5, "x日" * 2):
        parts = split([Document("t", text.encode())])
        assert "".join(document.read().decode() for (document,) in parts.values()) == text
        assert len(parts["train"][0].content) > 0.8 * len(text.encode())


def test_dtype_follows_the_vocabulary():
    for n_chars, dtype in ((256, "uint8"), (257, "uint16"), (65_536, "uint16"), (65_537, "uint32")):
        codes = [c for c in range(0x21, 0x21 + n_chars + 2048) if not 0xD800 <= c < 0xE000]
        text = "".join(map(chr, codes[:n_chars]))
        Path("t").write_text(text * 2, encoding="utf-8", newline="")
        prepare_data.main(["text", f"--name=n{n_chars}", "--input", "t", "--tokenizer=char"])
        ids, meta = read(f"n{n_chars}", "train")
        assert (meta["vocab_size"], meta["dtype"]) == (n_chars, dtype)
        assert max(ids) == n_chars - 1


def test_tokenizers_give_back_what_they_took(gpt2_vocabulary):
    text = "Ein Zwölfkampf: 日本 😀\r\n\tdone"
    chars = "".join(sorted(set(text)))
    for tokenizer in (ByteTokenizer(True), CharTokenizer(chars, True), GPT2Tokenizer(True)):
        again = load_tokenizer(json.loads(json.dumps(tokenizer.spec)))
        ids = tokenizer.encode(text.encode()).tolist()
        assert again.encode(text.encode()).tolist() == ids
        assert again.decode(ids) == text.encode()
        assert max(ids) < tokenizer.eot == tokenizer.vocab_size - 1
        assert again.decode([tokenizer.eot]) == b"<|endoftext|>"
        assert tokenizer.decode([tokenizer.vocab_size + 40])  # padded ids do no harm


def test_text_that_reads_like_a_special_token_is_text(gpt2_vocabulary):
    assert GPT2Tokenizer(True).encode(b"hello world").tolist() == [31373, 995]
    special = GPT2Tokenizer(True).encode(b"a <|endoftext|>").tolist()
    assert special == [64, 1279, 91, 437, 1659, 5239, 91, 29]


def test_a_failed_download_is_one_line_and_leaves_nothing_behind(monkeypatch):
    # Nothing listens at this address.
    monkeypatch.setattr(prepare_data, "SHAKESPEARE_URL", "http://127.0.0.1:9/input.txt")
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: open("no/route"))
    Path("t").write_text("some text\n" * 100)
    failed = r"could not fetch http://127.0.0.1:9/input.txt .*--input"
    commands = {"shakespeare_char": failed, "text --name=x --input t": "TIKTOKEN_CACHE_DIR"}
    for command, words in commands.items():
        with pytest.raises(UserError, match=words):
            prepare_data.main(command.split())
        assert not list(Path().glob("data/*"))


def test_a_small_data_set_is_prepared_by_its_program_and_a_failure_says_why(monkeypatch):
    prepare_if_small("stdlib")
    prepare_data.main(["text", "--name=again", "--input", sysconfig.__file__, "--tokenizer=byte"])
    assert {path.name for path in Path("data").iterdir()} == {"stdlib", "again"}
    assert prepare_if_small("again") is None  # it is there
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="^prepare_data.py: could not fetch .*$"):
        prepare_if_small("shakespeare_char")
    with pytest.raises(UserError, match="there is no data/nowhere; see: python prepare_data.py"):
        prepare_if_small("nowhere")
