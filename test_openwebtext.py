"""openwebtext.py and download.py: the program against a server on this machine, which serves small archives in
the corpus's format, and everything that can go wrong on the way.
"""

import contextlib
import hashlib
import io
import json
import lzma
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import download
import openwebtext
import prepare_data
from command import UserError
from conftest import ROOT, run

SHARDS = (3, 4, 5)  # of which no sum is published, so that other archives may take their place
PARTS = Path("data/openwebtext.parts")

# ---------------------------------------------------------------------------------------------------
# Archives, and what they hold.


def tar(members):
    """[(name, bytes; None for a folder or a link)] -> bytes of a tar archive."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if content is None:
                info.type, info.linkname = tarfile.DIRTYPE if name.endswith("/") else tarfile.SYMTYPE, "elsewhere"
            else:
                info.size = len(content)
            archive.addfile(info, io.BytesIO(content or b""))
    return out.getvalue()


def xz(members):
    return lzma.compress(tar(members), preset=0)


def texts(seed, n):
    """Some documents with blank lines, blanks around them and characters of several bytes."""
    rng = random.Random(seed)
    words = ["query", "the", "Zwölf", "日本", "a", "<|endoftext|>", "x=1", "\n", "\n\n\n\n", "\r\n", "\t", "\u00a0"]
    documents = [" \n" + " ".join(rng.choices(words, k=rng.randrange(3, 400))) + "\u3000\n" for _ in range(n)]
    documents[7:9] = ["", " \n"]  # nothing but their end
    return documents


def archive_of(documents, n_members):
    """Documents in the corpus's format, among members that are not to be read."""
    groups = [documents[i::n_members] for i in range(n_members)]
    ordered, members = [], [("openwebtext/", None), ("openwebtext/README.md", b"no text of the corpus")]
    for g, group in enumerate(groups):
        inner = [("./", None), (".hidden.txt", b"no"), ("../../__meta.txt", b"no"), ("list.csv", b"no")]
        inner += [(f"../{g}-{i}.txt", text.encode()) for i, text in enumerate(group)]
        inner += [("link.txt", None)]
        members.append((f"openwebtext/urlsf_subset-{g}_data.xz", xz(inner)))
        members += [(f"openwebtext/._{g}_data.xz", b"no xz"), (f"openwebtext/{g}.xz", None)]
        ordered += group
    return tar(members), ordered


@pytest.fixture(scope="module")
def corpus():
    """{shard: bytes of its archive}, and all documents in order."""
    archives, documents = {}, []
    for shard in SHARDS:
        archives[shard], ordered = archive_of(texts(shard, 900 + 40 * shard), 5)
        documents += ordered
    return archives, documents


def expected(documents):
    """An independent reading: what val.bin and train.bin are to hold."""
    import tiktoken

    bpe = tiktoken.get_encoding("gpt2")
    tokens, lengths = [], []
    for text in documents:
        while "\n\n\n" in text:
            text = text.replace("\n\n\n", "\n\n")
        tokens.append(bpe.encode_ordinary(text.strip()) + [50256])
        lengths.append(len(text.strip().encode()))
    order = np.random.default_rng(2357).permutation(len(documents)).tolist()
    n_val = -(-len(documents) // 2000)
    return {
        split: ([t for i in chosen for t in tokens[i]], sum(lengths[i] for i in chosen))
        for split, chosen in (("val", order[:n_val]), ("train", order[n_val:]))
    }


def check_result(corpus, shards=SHARDS, name="openwebtext_3-5", kept=()):
    archives, documents = corpus
    meta = json.loads(Path(f"data/{name}/meta.json").read_text())
    for split, (tokens, text_bytes) in expected(documents).items():
        raw = Path(f"data/{name}/{split}.bin").read_bytes()
        assert np.frombuffer(raw, "<u2").tolist() == tokens
        sha256 = hashlib.sha256(raw).hexdigest()
        assert (meta[split]["tokens"], meta[split]["text_bytes"]) == (len(tokens), text_bytes)
        assert meta[split]["sha256"] == sha256
    assert meta["train"]["documents"] + meta["val"]["documents"] == len(documents)
    assert [s["sha256"] for s in meta["shards"]] == [hashlib.sha256(archives[s]).hexdigest() for s in shards]
    assert meta["revision"] == openwebtext.REVISION and meta["dtype"] == "uint16"
    assert sorted(p.name for p in Path("data").iterdir()) == sorted([name, *(["openwebtext.parts"] if kept else [])])


# ---------------------------------------------------------------------------------------------------
# A hub: an address that redirects to a store, which can be told to misbehave.


@pytest.fixture
def hub(corpus):
    archives, _ = corpus
    state = SimpleNamespace(
        files={f"urlsf_subset{shard:02d}.tar": data for shard, data in archives.items()},
        sums={},  # other than true
        faults=[],  # of the next requests to the store: functions of (handler, file, first byte)
        requests=[],  # (method, path, Range)
        tells=True,  # the size and the sum, while redirecting
        name=str,  # how the names of headers are written
    )

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.answer(b"")

        def do_GET(self):
            self.answer(None)

        def answer(self, body):
            state.requests.append((self.command, self.path.split("?")[0], self.headers.get("Range")))
            name = self.path.split("?")[0].rpartition("/")[2]
            data = state.files.get(name)
            if data is None:
                return self.reply(404, {}, b"")
            if not self.path.startswith("/store/"):
                assert f"/resolve/{openwebtext.REVISION}/subsets/" in self.path
                told = state.sums.get(name, hashlib.sha256(data).hexdigest())
                head = {"Location": f"/store/{name}?signature={len(state.requests)}"}
                if state.tells:
                    head |= {"X-Linked-Size": str(len(data)), "X-Linked-Etag": f'"{told}"'}
                return self.reply(302, head, b"")
            if body is None and state.faults:
                return state.faults.pop(0)(self, data)
            begin = int(re.match(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))[1])
            self.reply(*serve(self, data, begin), body)

        def reply(self, code, head, content, body=None):
            self.send_response(code)
            for key, value in ({"Content-Length": str(len(content))} | head).items():
                self.send_header(state.name(key), value)
            self.end_headers()
            self.wfile.write(content if body is None else body)

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    state.url = f"http://127.0.0.1:{server.server_port}"
    yield state
    server.shutdown()
    server.server_close()


def serve(handler, data, begin):
    if "Range" not in handler.headers:
        return 200, {}, data
    return 206, {"Content-Range": f"bytes {begin}-{len(data) - 1}/{len(data)}"}, data[begin:]


def cut(after, then_wait=0):
    """Announce everything, send so many bytes, hang up (in a while)."""

    def fault(handler, data):
        begin = int((handler.headers.get("Range") or "bytes=0-")[6:-1])
        code, head, rest = serve(handler, data, begin)
        handler.reply(code, head | {"Content-Length": str(len(rest))}, rest[:after])
        time.sleep(then_wait)
        handler.close_connection = True

    return fault


def status(code, **head):
    return lambda handler, data: handler.reply(code, head, b"")


def all_of_it(handler, data):
    handler.reply(200, {}, data)


def prepare(*arguments):
    return run("prepare_data.py", "openwebtext", "--shards=3-5", *arguments)


# ---------------------------------------------------------------------------------------------------
# The whole way.


def test_the_program_from_a_hub(hub, corpus, gpt2_vocabulary):
    done = prepare(f"--mirror={hub.url}")
    assert (done.returncode, done.stderr) == (0, "")
    check_result(corpus)
    assert "3 of 3 archives to do" in done.stdout and "needs" in done.stdout
    again = prepare(f"--mirror={hub.url}")
    assert again.returncode == 1 and "openwebtext_3-5 exists already" in again.stderr


def test_from_a_folder_which_stays_as_it_is(corpus, gpt2_vocabulary):
    Path("archives").mkdir()
    for shard, data in corpus[0].items():
        Path(f"archives/urlsf_subset{shard:02d}.tar").write_bytes(data)
    assert prepare("--source=archives").returncode == 0
    check_result(corpus)
    assert len(list(Path("archives").iterdir())) == len(SHARDS)


def test_training_reads_it(corpus, gpt2_vocabulary):
    import train

    test_from_a_folder_which_stays_as_it_is(corpus, None)
    data = train.open_data("openwebtext_3-5", 64)
    assert data.meta["vocab_size"] == 50257 and len(data.tokens("train")) == data.meta["train"]["tokens"]


def test_what_was_kept_can_be_named_as_the_source(hub, corpus, gpt2_vocabulary):
    assert prepare(f"--mirror={hub.url}", "--keep").returncode == 0
    shutil.rmtree("data/openwebtext_3-5")
    assert prepare(f"--source={PARTS}").returncode == 0
    assert {p.name: p.read_bytes() for p in PARTS.iterdir()} == hub.files
    check_result(corpus, kept=True)


def test_kept_archives_are_used_again(hub, corpus, gpt2_vocabulary):
    assert prepare(f"--mirror={hub.url}", "--keep").returncode == 0
    check_result(corpus, kept=True)
    assert {p.name: p.read_bytes() for p in PARTS.iterdir()} == hub.files
    shutil.rmtree("data/openwebtext_3-5")
    hub.requests.clear()
    assert prepare(f"--mirror={hub.url}").returncode == 0
    check_result(corpus)
    assert {method for method, _, _ in hub.requests} == {"HEAD"}


def test_a_part_of_a_part_is_a_data_set_of_its_own(hub, corpus, gpt2_vocabulary):
    archives, documents = corpus
    done = run("prepare_data.py", "openwebtext", "--shards=4", f"--mirror={hub.url}")
    assert done.returncode == 0
    only = documents[900 + 40 * 3 :][: 900 + 40 * 4]
    check_result((archives, only), shards=[4], name="openwebtext_4")


# ---------------------------------------------------------------------------------------------------
# The order.


def test_the_permutation_is_the_one_that_others_used():
    assert openwebtext.permutation(10).tolist() == [8, 3, 0, 9, 5, 6, 2, 7, 4, 1]
    order = openwebtext.permutation(8_013_769)
    assert order[:5].tolist() == [4327249, 4286500, 2184614, 4793011, 1709068]
    assert hashlib.sha256(order.astype("<i8")).hexdigest().startswith("713795c9660553b17cc384b3c0d72c03")


def test_gathering_in_many_pieces(corpus, gpt2_vocabulary, monkeypatch):
    monkeypatch.setattr(openwebtext, "GATHER_TOKENS", 777)  # documents are longer and shorter than that
    prepare_here(corpus)
    check_result(corpus)


def prepare_here(corpus, shards="3-5"):
    Path("archives").mkdir(exist_ok=True)
    for shard, data in corpus[0].items():
        Path(f"archives/urlsf_subset{shard:02d}.tar").write_bytes(data)
    prepare_data.main(["openwebtext", f"--shards={shards}", "--source=archives"])


def test_the_whole_corpus_is_checked_against_what_is_published(monkeypatch, gpt2_vocabulary, capsys):
    """All 21 archives, of one document each: the published numbers are made to be theirs."""
    monkeypatch.setattr(openwebtext, "SHA256", {})
    documents = [f"document {i}" for i in range(21)]
    archives = {i: tar([("a.xz", xz([("a.txt", text.encode())]))]) for i, text in enumerate(documents)}
    with pytest.raises(UserError, match=r"documents: 21, but the whole corpus has 8013769"):
        prepare_here((archives, documents), shards="0-20")
    monkeypatch.setattr(openwebtext, "DOCUMENTS", 21)
    with pytest.raises(UserError, match="the sha256 of the order"):
        prepare_here((archives, documents), shards="0-20")
    sha256 = hashlib.sha256(np.random.default_rng(2357).permutation(21).astype("<i8").tobytes()).hexdigest()
    monkeypatch.setattr(openwebtext, "PERMUTATION_SHA256", sha256)
    with pytest.raises(UserError, match="tokens"):
        prepare_here((archives, documents), shards="0-20")
    assert not Path("data/openwebtext").exists()
    result = expected(documents)
    monkeypatch.setattr(openwebtext, "TRAIN_TOKENS", len(result["train"][0]))
    monkeypatch.setattr(openwebtext, "VAL_TOKENS", len(result["val"][0]))
    prepare_here((archives, documents), shards="0-20")
    assert "another order than published" in capsys.readouterr().out
    assert json.loads(Path("data/openwebtext/meta.json").read_text())["as_published"] is False
    shutil.rmtree("data/openwebtext")
    monkeypatch.setattr(openwebtext, "FIRST_TRAIN_TOKENS", result["train"][0][:10])
    prepare_here((archives, documents), shards="0-20")
    assert json.loads(Path("data/openwebtext/meta.json").read_text())["as_published"] is True
    check_result((archives, documents), shards=range(21), name="openwebtext")


# ---------------------------------------------------------------------------------------------------
# A bad connection.


@pytest.mark.parametrize(
    "faults, ranges",
    [
        ([cut(5000)], [None, "bytes=5000-"]),  # goes on where it broke off
        ([cut(5000), cut(0), cut(70)], [None, "bytes=5000-", "bytes=5000-", "bytes=5070-"]),
        ([cut(5000), all_of_it], [None, "bytes=5000-"]),  # 200 where a range was asked for: begins anew
        ([status(503)], [None, None]),
        ([cut(5000), lambda h, d: h.reply(200, {}, b"a page")], [None, "bytes=5000-", "bytes=5000-"]),
        ([cut(5000), status(416)], [None, "bytes=5000-", None]),
        ([lambda h, d: h.reply(206, {"Content-Range": f"bytes 7-{len(d) - 1}/{len(d)}"}, d[7:])], [None, None]),
    ],
)
def test_a_broken_download_goes_on(hub, faults, ranges, monkeypatch):
    monkeypatch.setattr(download.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(download, "BLOCK", 10)
    hub.faults = list(faults)
    name = "urlsf_subset03.tar"
    path, data = Path(name), hub.files[name]
    url = f"{hub.url}/resolve/{openwebtext.REVISION}/subsets/{name}"
    size, sha256 = download.announced(url, "")
    assert (size, sha256) == (len(data), hashlib.sha256(data).hexdigest())
    download.fetch(url, path, size, sha256, "", lambda have, speed: None)
    assert path.read_bytes() == data and not Path(f"{name}.part").exists()
    asked = [(path, range) for method, path, range in hub.requests if method == "GET"]
    assert [range for path, range in asked if path.startswith("/resolve")] == ranges  # each time from the hub's address


def test_the_program_over_a_bad_connection(hub, corpus, gpt2_vocabulary):
    hub.faults = [cut(9000), status(503)]
    done = prepare(f"--mirror={hub.url}")
    assert done.returncode == 0
    assert "503" in done.stdout and "next try in" in done.stdout
    check_result(corpus)


def test_back_off_doubles_and_ends(hub, monkeypatch):
    slept = []
    monkeypatch.setattr(download.time, "sleep", slept.append)
    monkeypatch.setattr(download, "BLOCK", 10)
    hub.faults = [cut(100), status(429, **{"Retry-After": "9"}), cut(100)] + [status(503)] * 20
    name = "urlsf_subset03.tar"
    url = f"{hub.url}/resolve/{openwebtext.REVISION}/subsets/{name}"
    with pytest.raises(UserError, match="gave up after 7 tries .*503.*--mirror"):
        download.fetch(url, Path(name), len(hub.files[name]), None, openwebtext.HINT, lambda have, speed: None)
    slept = [seconds for seconds in slept if seconds]  # but for the server's
    assert slept == [1, 9, 1, 2, 4, 8, 16, 32]  # the count begins anew when bytes have come
    assert Path(f"{name}.part").stat().st_size == 200


@pytest.mark.parametrize("name", [str, str.lower])
@pytest.mark.parametrize("tells", [True, False])
def test_what_a_server_tells_while_redirecting(hub, tells, name):
    hub.tells, hub.name, archive = tells, name, hub.files["urlsf_subset03.tar"]
    url = f"{hub.url}/resolve/{openwebtext.REVISION}/subsets/urlsf_subset03.tar"
    sha256 = hashlib.sha256(archive).hexdigest() if tells else None
    assert download.announced(url, "") == (len(archive), sha256)


@pytest.mark.parametrize(
    "wrong, shard, words",
    [
        ("address", 3, "a..b"),
        ("announced", 3, "has sha256"),  # the store has other bytes than the hub says
        ("published", 0, "is not the published file"),  # the hub has another file than this program knows
        ("missing", 6, "answers 404"),
    ],
)
def test_a_wrong_file_is_refused(hub, wrong, shard, words, gpt2_vocabulary):
    hub.sums["urlsf_subset03.tar"] = "0" * 64
    hub.files["urlsf_subset00.tar"] = b"0" * 10240
    url = "http://a..b" if wrong == "address" else hub.url
    done = run("prepare_data.py", "openwebtext", f"--shards={shard}", f"--mirror={url}")
    assert done.returncode == 1 and words in done.stderr and done.stderr.count("\n") == 1
    if wrong == "missing":
        assert openwebtext.PARQUET_REVISION in done.stderr and "--source" in done.stderr
    if wrong == "announced":
        assert "it is deleted" in done.stderr
    assert not PARTS.exists()


# ---------------------------------------------------------------------------------------------------
# Damaged archives. Where the sum is published or announced they get no further than that.

GOOD = [("1.txt", b"some text"), ("2.txt", b"more text")]


def broken_xz():
    data = bytearray(xz(GOOD))
    data[len(data) // 2] ^= 0xFF
    return bytes(data)


@pytest.mark.parametrize(
    "data, words",
    [
        (tar([("a.xz", broken_xz())]), "a.xz"),
        (tar([("a.xz", xz(GOOD)[:-30])]), "a.xz"),
        (tar([("a.xz", b"")]), "a.xz"),
        (tar([("a.xz", xz([("1.txt", b"fine"), ("2.txt", b"\xff\xfe")]))]), "a.xz: 2.txt"),
        (tar([("a.xz", lzma.compress(b"no tar" * 200))]), "a.xz"),
        (tar([("a.xz", xz(GOOD)), ("b.xz", xz(GOOD))])[:1400], "cut off"),
        (tar([("a.xz", xz(GOOD)), ("b.xz", xz(GOOD))])[:1024], "cut off"),  # between two members
        (tar([("a.xz", xz(GOOD)), ("b.xz", xz(GOOD))]).replace(b"b.xz", b"c.xz"), "cut off"),  # a header's sum
        (b"", "damaged"),
        (b"<html>not found</html>" * 100, "damaged"),
        (tar([]), "holds no documents"),
        (tar([("a.xz", xz([(".1.txt", b"hidden")]))]), "holds no documents"),
    ],
)
def test_a_damaged_archive_is_named(data, words, gpt2_vocabulary):
    assert len(xz(GOOD)) <= 512  # the cuts above are where they say
    with pytest.raises(UserError) as e:
        prepare_here(({3: data}, None), shards="3")
    message = str(e.value)
    assert words in message and "urlsf_subset03.tar" in message and "\n" not in message
    assert not Path("data/openwebtext_3").exists()


def test_an_archive_that_unpacks_without_end_is_refused(monkeypatch, gpt2_vocabulary):
    monkeypatch.setattr(openwebtext, "MEMBER_BYTES", 100_000)
    with pytest.raises(UserError, match="more than 100,000 bytes"):
        prepare_here(({3: tar([("a.xz", xz([("1.txt", bytes(200_000))]))])}, None), shards="3")


def test_nothing_in_an_archive_reaches_the_disk(corpus, gpt2_vocabulary):
    prepare_here(corpus)  # its members are called ../../__meta.txt and ../0-0.txt
    assert sorted(p.name for p in Path().rglob("*") if p.is_file()) == sorted(
        ["meta.json", "train.bin", "val.bin", *(f"urlsf_subset{shard:02d}.tar" for shard in SHARDS)]
    )


# ---------------------------------------------------------------------------------------------------
# Stopped anywhere.

SLOWED = """
import signal

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
import sys, time
sys.path.insert(0, {root!r})
import openwebtext, prepare_data, command

def slow(function):
    def slowed(*arguments):
        time.sleep(0.05)
        return function(*arguments)
    return slowed

openwebtext.GATHER_TOKENS = 20_000
openwebtext.tokenize_member = slow(openwebtext.tokenize_member)
openwebtext.read_documents = slow(openwebtext.read_documents)
command.run_program(prepare_data.main)
"""


def start(*arguments):
    """The program, slowed so that it can be stopped where one wants to."""
    Path("slowed.py").write_text(SLOWED.format(root=str(ROOT)))
    command = [sys.executable, "slowed.py", "openwebtext", "--shards=3-5", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_until_growing(pattern, process):
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(FileNotFoundError):  # gone between listing and looking
            if any(path.stat().st_size for path in Path("data").rglob(pattern)):
                return
        time.sleep(0.001)
    process.kill()
    pytest.fail(f"no {pattern} was seen")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has other signals")
@pytest.mark.parametrize(
    "moment, number",
    [
        ("*03.tar.part", "SIGKILL"),
        (".03.tokens.tmp", "SIGINT"),
        (".05.tokens.tmp", "SIGKILL"),
        ("val.bin", "SIGKILL"),
        (".train.bin.tmp", "SIGINT"),
        (".train.bin.tmp", "SIGKILL"),
    ],
)
def test_stopped_anywhere_it_goes_on(hub, corpus, gpt2_vocabulary, moment, number):
    if "part" in moment:
        hub.faults = [cut(70_000, then_wait=5)]
    process = start(f"--mirror={hub.url}")
    wait_until_growing(moment, process)
    process.send_signal(getattr(signal, number))
    out, err = process.communicate(timeout=60)
    if number == "SIGINT":
        assert process.returncode == 130 and "the same command goes on" in out and err == ""
    finished = {path: path.stat().st_mtime_ns for path in PARTS.glob("*.json")}
    assert not Path("data/openwebtext_3-5").exists()
    hub.requests.clear()
    done = prepare(f"--mirror={hub.url}")
    assert done.returncode == 0, done.stderr
    assert f"{3 - len(finished)} of 3 archives to do" in done.stdout
    if "part" in moment:
        assert ("GET", "/store/urlsf_subset03.tar", f"bytes={download.BLOCK}-") in hub.requests
    check_result(corpus)


def test_a_full_disk_leaves_what_is_finished(hub, corpus, gpt2_vocabulary):
    tokens = len(expected(corpus[1])["train"][0])
    done = prepare_limited(hub, tokens)  # in bytes: every shard's tokens fit, train.bin does not
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "File too large" in done.stderr and "what is finished is kept" in done.stderr
    assert len(list(PARTS.glob("*.json"))) == 3 and not list(PARTS.rglob("*.tmp*"))
    assert prepare(f"--mirror={hub.url}").returncode == 0
    check_result(corpus)


def prepare_limited(hub, limit):
    """The program where no file can grow beyond limit bytes."""
    resource = pytest.importorskip("resource")
    return run(
        "prepare_data.py",
        "openwebtext",
        "--shards=3-5",
        f"--mirror={hub.url}",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )


def test_a_full_disk_while_downloading(hub, corpus, gpt2_vocabulary):
    done = prepare_limited(hub, 4096)
    assert done.returncode == 1 and "File too large" in done.stderr and done.stderr.count("\n") == 1
    assert prepare(f"--mirror={hub.url}").returncode == 0
    check_result(corpus)


def test_too_little_room_is_told_before_anything_is_done(hub, monkeypatch, gpt2_vocabulary, capsys):
    monkeypatch.setattr(openwebtext.shutil, "disk_usage", lambda path: SimpleNamespace(free=10_000))
    with pytest.raises(UserError, match="has 10kB free, but .* are needed"):
        prepare_data.main(["openwebtext", "--shards=3-5", f"--mirror={hub.url}"])
    assert "archives to do" in capsys.readouterr().out
    assert {method for method, _, _ in hub.requests} == {"HEAD"} and not PARTS.exists()


def test_two_at_once_are_refused(hub, gpt2_vocabulary):
    pytest.importorskip("fcntl")
    process = start(f"--mirror={hub.url}")
    wait_until_growing(".03.tokens.tmp", process)
    second = prepare(f"--mirror={hub.url}")
    assert second.returncode == 1 and "another process is at work" in second.stderr
    process.kill()
    process.communicate(timeout=60)


def test_damaged_parts_are_named(corpus, gpt2_vocabulary, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(openwebtext, "gather", lambda *arguments: (_ for _ in ()).throw(OSError("stop here")))
        with pytest.raises(UserError):
            prepare_here(corpus)
    for name, damage, words in (
        ("04.tokens", lambda data: data[:-2], "04.json is damaged"),
        ("04.lengths", lambda data: data[4:] + data[:4], "04.lengths is damaged"),
        ("04.json", lambda data: data[:-5], "04.json is damaged"),
        ("04.tokens", lambda data: data[2:] + data[:2], "do not fit their lengths"),
    ):
        path = PARTS / name
        whole = path.read_bytes()
        path.write_bytes(damage(whole))
        with pytest.raises(UserError, match=words):
            prepare_here(corpus)
        path.write_bytes(whole)
    prepare_here(corpus)
    check_result(corpus)


# ---------------------------------------------------------------------------------------------------
# Mistakes on the command line.


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--shards=21"], "--shards 21"),
        (["--shards=3-1"], "--shards 3-1"),
        (["--shards=all"], "--shards all"),
        (["--mirror=huggingface.co"], "--mirror huggingface.co"),
        (["--mirror=http://x", "--source=y"], "excludes --source"),
        (["--shards="], "--shards"),
        (["--source="], "--source"),
        (["--mirror="], "--mirror"),
        (["--input=x"], "--input is not for openwebtext"),
    ],
)
def test_mistakes_of_usage(arguments, words):
    with pytest.raises(UserError) as e:
        prepare_data.read_options(["openwebtext", *arguments])
    assert words in str(e.value) and e.value.status == 2


def test_options_of_openwebtext_are_not_for_others():
    for option in ("--shards=0", "--mirror=http://x", "--source=x", "--keep"):
        with pytest.raises(UserError, match="is not for stdlib, but for openwebtext"):
            prepare_data.read_options(["stdlib", option])


def test_a_folder_without_the_archives(gpt2_vocabulary):
    os.mkdir("empty")
    with pytest.raises(UserError, match="--source empty holds no urlsf_subset00.tar"):
        prepare_data.main(["openwebtext", "--source=empty"])
    assert not PARTS.exists()
