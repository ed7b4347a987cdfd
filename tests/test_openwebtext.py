"""openwebtext.py and download.py: the program against a server on this machine, which has small archives in the
corpus's format, and everything that can go wrong on the way.
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
import sys
import tarfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import requests
import tiktoken
from conftest import run, start

import prepare_data
from utils import download, openwebtext
from utils.settings import UserError

SHARDS = (3, 4, 5)  # no sha256 of these is published, so that other archives may take their place
FIRST = "urlsf_subset03.tar"
PARTS = Path("data/openwebtext.parts")
WORK = PARTS / "openwebtext_3-5"

pytestmark = pytest.mark.usefixtures("gpt2_vocabulary")


def tar(members):
    """[(name, bytes; None for a folder or a link)] -> bytes of a tar archive."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content or b"")
            if content is None:
                info.type, info.linkname = tarfile.DIRTYPE if name.endswith("/") else tarfile.SYMTYPE, "elsewhere"
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


def xz(members):
    return lzma.compress(tar(members), preset=0)


def texts(seed, n):
    """Documents with blank lines, blanks around them and characters of several bytes."""
    rng = random.Random(seed)
    words = ["query", "the", "Zwölf", "日本", "a", "<|endoftext|>", "x=1", "\n", "\n\n\n\n", "\r\n", "\t", "\u00a0"]
    documents = [" \n" + " ".join(rng.choices(words, k=rng.randrange(3, 400))) + "\u3000\n" for _ in range(n)]
    documents[7:9] = ["", " \n"]  # nothing but their end
    return documents


def archive_of(documents, n_members):
    """Documents in the corpus's format, among members that are not to be read -> archive, documents in its order."""
    groups = [documents[i::n_members] for i in range(n_members)]
    members = [("openwebtext/", None), ("openwebtext/README.md", b"no text of the corpus")]
    for g, group in enumerate(groups):
        inner = [("./", None), (".hidden.txt", b"no"), ("../../__meta.txt", b"no"), ("list.csv", b"no")]
        inner += [(f"../{g}-{i}.txt", text.encode()) for i, text in enumerate(group)]
        members.append((f"openwebtext/urlsf_subset-{g}_data.xz", xz([*inner, ("link.txt", None)])))
        members += [(f"openwebtext/._{g}_data.xz", b"no xz"), (f"openwebtext/{g}.xz", None)]
    return tar(members), [text for group in groups for text in group]


@pytest.fixture(scope="module")
def corpus():
    """{shard: bytes of its archive}, and all documents in order."""
    archives, documents = {}, []
    for shard in SHARDS:
        archives[shard], ordered = archive_of(texts(shard, 900 + 40 * shard), 5)
        documents += ordered
    return archives, documents


def expected(documents):
    """An independent reading -> {split: (its tokens, its bytes of text)}."""
    bpe = tiktoken.get_encoding("gpt2")
    texts = [re.sub("\n\n+", lambda found: found[0][:2], text).strip() for text in documents]
    order = np.random.default_rng(2357).permutation(len(texts)).tolist()
    n_val = -(-len(texts) // 2000)
    result = {}
    for split, chosen in (("val", order[:n_val]), ("train", order[n_val:])):
        tokens = [token for i in chosen for token in bpe.encode_ordinary(texts[i]) + [50256]]
        result[split] = tokens, sum(len(texts[i].encode()) for i in chosen)
    return result


def check_result(corpus, shards=SHARDS, name="openwebtext_3-5", kept=False):
    archives, documents = corpus
    meta = json.loads(Path(f"data/{name}/meta.json").read_text())
    for split, (tokens, text_bytes) in expected(documents).items():
        raw = Path(f"data/{name}/{split}.bin").read_bytes()
        assert np.frombuffer(raw, meta["dtype"]).tolist() == tokens and max(tokens) < meta["vocab_size"] == 50257
        assert (meta[split]["tokens"], meta[split]["text_bytes"]) == (len(tokens), text_bytes)
        assert meta[split]["sha256"] == hashlib.sha256(raw).hexdigest()
    assert meta["train"]["documents"] + meta["val"]["documents"] == len(documents)
    assert [a["sha256"] for a in meta["archives"]] == [hashlib.sha256(archives[s]).hexdigest() for s in shards]
    assert meta["revision"] == openwebtext.REVISION
    assert {p.name for p in Path("data").iterdir()} == {name} | ({PARTS.name} if kept else set())


@pytest.fixture
def hub(corpus):
    """A server with an address that redirects to a store, which can be told to misbehave."""
    hub = SimpleNamespace(
        files={f"urlsf_subset{shard:02d}.tar": data for shard, data in corpus[0].items()},
        sums={},  # other than true
        faults=[],  # of the next GETs from the store: functions of (file, first byte or None) -> answer
        may_hang_up=threading.Event(),  # the store, after an answer
        requests=[],  # (method, path, Range)
        tells=True,  # the size and the sum, while it redirects
        name=str,  # how the names of headers are written
    )

    def answer(method, path, begin):
        """-> status, headers, content"""
        name = path.rpartition("/")[2]
        data = hub.files.get(name)
        if data is None:
            return 404, {}, b""
        if path.startswith("/store/"):
            return hub.faults.pop(0)(data, begin) if method == "GET" and hub.faults else serve(data, begin)
        assert f"/resolve/{openwebtext.REVISION}/subsets/" in path
        told = hub.sums.get(name, hashlib.sha256(data).hexdigest())
        tells = {"X-Linked-Size": len(data), "X-Linked-Etag": f'"{told}"'} if hub.tells else {}
        return 302, {"Location": f"/store/{name}?signature={len(hub.requests)}"} | tells, b""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            path, wanted = self.path.split("?")[0], self.headers.get("Range")
            hub.requests.append((self.command, path, wanted))
            code, head, content = answer(self.command, path, int(wanted[6:-1]) if wanted else None)
            self.send_response(code)
            for key, value in ({"Content-Length": len(content)} | head).items():
                self.send_header(hub.name(key), str(value))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)
                hub.may_hang_up.wait(100)

        do_HEAD = do_GET

        def log_message(self, *arguments):
            pass

    hub.may_hang_up.set()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    hub.first = f"{hub.url}/datasets/resolve/{openwebtext.REVISION}/subsets/{FIRST}"
    yield hub
    server.shutdown()
    server.server_close()


def serve(data, begin):
    if begin is None:
        return 200, {}, data
    return 206, {"Content-Range": f"bytes {begin}-{len(data) - 1}/{len(data)}"}, data[begin:]


def cut(after):
    """Announce everything, send so many bytes, hang up."""

    def fault(data, begin):
        code, head, rest = serve(data, begin)
        return code, head | {"Content-Length": len(rest)}, rest[:after]

    return fault


def reply(code, content=b"", **head):
    return lambda data, begin: (code, head, content)


def prepare(*arguments, shards="3-5"):
    return run("prepare_data.py", "openwebtext", f"--shards={shards}", *arguments)


def prepare_here(corpus, shards="3-5"):
    """In this process, from a folder with the archives."""
    Path("archives").mkdir(exist_ok=True)
    for shard, data in corpus[0].items():
        Path(f"archives/urlsf_subset{shard:02d}.tar").write_bytes(data)
    prepare_data.main(["openwebtext", f"--shards={shards}", "--source=archives"])


PROGRAM = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
import _thread, sys, threading, time
sys.modules["tqdm"] = None  # as if it was not installed

def press_again(ignored):  # Python drops a Ctrl-C that falls into a callback, such as a weak reference's
    if ignored.exc_type is not KeyboardInterrupt:
        return sys.__unraisablehook__(ignored)
    threading.Timer(0.01, _thread.interrupt_main).start()

sys.unraisablehook = press_again
import prepare_data
from utils import openwebtext, settings

def before(name, action):
    function = getattr(openwebtext, name)
    setattr(openwebtext, name, lambda *arguments: (action(), function(*arguments))[1])

{changes}
settings.run_program(prepare_data.main)
"""
SLOWED = """
openwebtext.GATHER_TOKENS = 20_000
before("tokenize_member", lambda: time.sleep(0.05))
before("read_documents", lambda: time.sleep(0.05))
"""


def start_changed(hub, changes):
    """The program as a process of its own, with changes in it."""
    Path("changed.py").write_text(PROGRAM.format(changes=changes))
    return start("changed.py", "openwebtext", "--shards=3-5", f"--mirror={hub.url}")


def wait_until_growing(name, process):
    while process.poll() is None:
        with contextlib.suppress(FileNotFoundError):  # gone between listing and looking
            if any(path.stat().st_size for path in Path("data").rglob(name)):
                return
        time.sleep(0.001)
    pytest.fail(f"no {name} was seen: {process.communicate()}")


def test_the_program_from_a_hub_over_a_bad_connection_and_again_from_kept_archives(hub, corpus):
    hub.faults = [cut(90_000), reply(503)]
    done = prepare(f"--mirror={hub.url}", "--keep")
    assert (done.returncode, done.stderr) == (0, "")
    check_result(corpus, kept=True)
    assert {p.name: p.read_bytes() for p in PARTS.iterdir()} == hub.files
    assert "3 archives to do; needs" in done.stdout and done.stdout.count(f"{FIRST}: downloading") == 2
    for place, kept, methods in ((f"--source={PARTS}", True, set()), (f"--mirror={hub.url}", False, {"HEAD"})):
        with pytest.raises(UserError, match="openwebtext_3-5 exists already"):
            prepare_data.main(["openwebtext", "--shards=3-5", place])
        shutil.rmtree("data/openwebtext_3-5")
        hub.requests.clear()
        prepare_data.main(["openwebtext", "--shards=3-5", place])
        check_result(corpus, kept=kept)
        assert {method for method, _, _ in hub.requests} == methods


@pytest.mark.parametrize("gathered", [777, openwebtext.GATHER_TOKENS])  # documents are longer and shorter than that
def test_from_a_folder_which_stays_as_it_is(corpus, monkeypatch, gathered):
    monkeypatch.setattr(openwebtext, "GATHER_TOKENS", gathered)
    prepare_here(corpus)
    check_result(corpus)
    assert len(list(Path("archives").iterdir())) == len(SHARDS)
    # Nothing in an archive reaches the disk, although its members are called ../../__meta.txt and ../0-0.txt.
    names = sorted(p.name for p in Path().rglob("*") if p.is_file() and p.parent.name != "archives")
    assert names == ["meta.json", "train.bin", "val.bin"]


def test_a_part_of_a_part_is_a_data_set_of_its_own(hub, corpus):
    archives, documents = corpus
    assert prepare(f"--mirror={hub.url}", shards="4").returncode == 0
    only = documents[900 + 40 * 3 :][: 900 + 40 * 4]
    check_result((archives, only), shards=[4], name="openwebtext_4")


def test_the_permutation_is_the_one_that_others_used():
    assert openwebtext.permutation(10).tolist() == [8, 3, 0, 9, 5, 6, 2, 7, 4, 1]
    order = openwebtext.permutation(8_013_769)
    assert order[:5].tolist() == [4327249, 4286500, 2184614, 4793011, 1709068]
    assert hashlib.sha256(order.astype("<i8")).hexdigest().startswith("713795c9660553b17cc384b3c0d72c03")


def test_the_whole_corpus_is_checked_against_what_is_published(monkeypatch, capsys):
    """All 21 archives, of one document each: the published numbers are made to be theirs."""
    monkeypatch.setattr(openwebtext, "SHA256", {})
    documents = [f"document {i}" for i in range(21)]
    archives = {i: tar([("a.xz", xz([("a.txt", text.encode())]))]) for i, text in enumerate(documents)}
    result = {split: tokens for split, (tokens, _) in expected(documents).items()}
    sha256 = hashlib.sha256(np.random.default_rng(2357).permutation(21).astype("<i8").tobytes()).hexdigest()
    right = {"documents": 21, "tokens": sum(map(len, result.values())), "order": sha256}
    for key, value in right.items():
        monkeypatch.setattr(openwebtext, "PUBLISHED", right | {key: "another"})
        with pytest.raises(UserError, match=rf"'{key}': '?{value}.* whole corpus has .*'{key}': 'another'"):
            prepare_here((archives, documents), shards="0-20")
        assert not Path("data/openwebtext").exists()
    monkeypatch.setattr(openwebtext, "PUBLISHED", right)
    for n_tokens, first in ((0, []), (len(result["train"]), []), (len(result["train"]), result["train"][:10])):
        monkeypatch.setattr(openwebtext, "TRAIN_TOKENS", n_tokens)
        monkeypatch.setattr(openwebtext, "FIRST_TRAIN_TOKENS", first or [0] * 10)
        prepare_here((archives, documents), shards="0-20")
        check_result((archives, documents), shards=range(21), name="openwebtext")
        assert ("another order than published" in capsys.readouterr().out) is not bool(first)
        assert json.loads(Path("data/openwebtext/meta.json").read_text())["as_published"] is bool(first)
        shutil.rmtree("data/openwebtext")


@pytest.fixture
def slept(monkeypatch):
    """The waits in seconds, which are not waited; blocks are small, so that no byte is lost."""
    seconds = []
    monkeypatch.setattr(time, "sleep", seconds.append)
    monkeypatch.setattr(download, "BLOCK", 10)
    return seconds


@pytest.mark.parametrize(
    "faults, begins",
    [
        ([cut(5000)], [None, 5000]),  # goes on where it broke off
        ([cut(5000), cut(0), cut(70)], [None, 5000, 5000, 5070]),
        ([cut(5000), lambda data, begin: serve(data, None)], [None, 5000]),  # 200 for a range: begins anew
        ([reply(503)], [None]),  # the store itself is asked again
        ([cut(5000), reply(200, b"a page")], [None, 5000, 5000]),
        ([cut(5000), reply(416)], [None, 5000, None]),
        ([lambda data, begin: serve(data, 7)], [None, None]),
    ],
)
def test_a_broken_download_goes_on(hub, slept, faults, begins):
    hub.faults, path, data = list(faults), Path(FIRST), hub.files[FIRST]
    download.fetch(hub.first, path, len(data))
    assert path.read_bytes() == data and not hub.faults
    asked = [wanted for method, path, wanted in hub.requests if method == "GET" and path.startswith("/datasets")]
    assert asked == [begin and f"bytes={begin}-" for begin in begins]  # each time from the hub's own address


def test_back_off_grows_and_ends(hub, slept):
    def give_up(faults, words, waits, have):
        slept.clear()
        hub.faults = faults
        with pytest.raises(requests.RequestException, match=words):
            download.fetch(hub.first, Path(FIRST), len(hub.files[FIRST]))
        assert [seconds for seconds in slept if seconds] == waits  # but for the server's
        assert Path(FIRST).stat().st_size == have

    busy = reply(429, **{"Retry-After": "9"})  # it is waited for that long; and the count begins anew when bytes come
    give_up([cut(100), busy, cut(100)] + [reply(503)] * 7, "503", [9, 2, 4, 8, 16, 32], 200)
    give_up([cut(0)] * 7, "gave up after 7 tries: .* after byte 200", [1, 3, 7, 15, 31, 63], 200)


@pytest.mark.parametrize("name", [str, str.lower])
@pytest.mark.parametrize("tells", [True, False])
def test_what_a_server_tells_while_redirecting(hub, tells, name):
    hub.tells, hub.name, data = tells, name, hub.files[FIRST]
    assert download.announced(hub.first) == (len(data), hashlib.sha256(data).hexdigest() if tells else None)


def test_a_wrong_file_is_refused(hub):
    hub.sums[FIRST] = "0" * 64
    hub.files["urlsf_subset00.tar"] = b"0" * 10240
    for mirror, shard, words, is_there in (
        ("http://a..b", 3, f"a..b.*--source.*{openwebtext.PARQUET_REVISION}", False),
        (hub.url, 6, f"404.*--source.*{openwebtext.PARQUET_REVISION}", False),
        (hub.url, 3, "has sha256", True),  # the store has other bytes than the hub says
        (hub.url, 0, "has sha256", True),  # the hub has another file than this program knows
    ):
        with pytest.raises(UserError, match=f"^.*{words}.*$"):
            prepare_data.main(["openwebtext", f"--shards={shard}", f"--mirror={mirror}"])
        assert PARTS.exists() is is_there and not list(PARTS.rglob("*.tar"))  # so that it is fetched anew


# Archives whose sum is neither published nor announced may be damaged.
GOOD = [("1.txt", b"some text"), ("2.txt", b"more text")]
TWO = tar([("a.xz", xz(GOOD)), ("b.xz", xz(GOOD))])
HALF = len(xz(GOOD)) // 2


@pytest.mark.parametrize(
    "data, words",
    [
        (tar([("a.xz", xz(GOOD)[:HALF] + bytes([xz(GOOD)[HALF] ^ 0xFF]) + xz(GOOD)[HALF + 1 :])]), "a.xz"),
        (tar([("a.xz", xz(GOOD)[:-30])]), "a.xz"),
        (tar([("a.xz", b"")]), "a.xz"),
        (tar([("a.xz", xz([("1.txt", b"fine"), ("2.txt", b"\xff\xfe")]))]), "a.xz: 2.txt"),
        (tar([("a.xz", lzma.compress(b"no tar" * 200))]), "a.xz"),
        (TWO[:1400], "cut off"),
        (TWO[:1024], "cut off"),  # between two members
        (TWO.replace(b"b.xz", b"c.xz"), "cut off"),  # a header's sum
        (b"", "damaged"),
        (b"<html>not found</html>" * 100, "damaged"),
        (tar([]), "holds no documents"),
        (tar([("a.xz", xz([(".1.txt", b"hidden")]))]), "holds no documents"),
        (tar([("a.xz", xz([("1.txt", bytes(200_000))]))]), "more than 100,000 bytes"),  # unpacks without end
    ],
)
def test_a_damaged_archive_is_named(data, words, monkeypatch):
    assert len(xz(GOOD)) <= 512  # the cuts above are where they say
    monkeypatch.setattr(openwebtext, "MEMBER_BYTES", 100_000)
    with pytest.raises(UserError) as e:
        prepare_here(({3: data}, None), shards="3")
    assert words in str(e.value) and FIRST in str(e.value) and "\n" not in str(e.value)
    assert not Path("data/openwebtext_3").exists()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has other signals")
@pytest.mark.parametrize("number", ["SIGINT", "SIGKILL"])
@pytest.mark.parametrize("moment", [FIRST, "tokens", "corpus.json", "val.bin", ".train.bin.tmp"])
def test_stopped_anywhere_it_goes_on(hub, corpus, moment, number):
    if moment == FIRST:
        hub.faults = [cut(70_000)]
        hub.may_hang_up.clear()
    process = start_changed(hub, SLOWED)
    wait_until_growing(moment, process)
    process.send_signal(getattr(signal, number))
    out, err = process.communicate(timeout=60)  # it does not wait for the server
    hub.may_hang_up.set()
    if number == "SIGINT":
        assert (process.returncode, err) == (130, "") and "the same command goes on" in out
    record = WORK / "corpus.json"
    finished = len(json.loads(record.read_text())["archives"]) if record.exists() else 0
    assert not Path("data/openwebtext_3-5").exists()
    hub.requests = []
    done = prepare(f"--mirror={hub.url}")
    assert done.returncode == 0, done.stderr
    assert f"{3 - finished} archives to do" in done.stdout
    if moment == FIRST:
        assert ("GET", f"/store/{FIRST}", f"bytes={download.BLOCK}-") in hub.requests
    check_result(corpus)


@pytest.mark.parametrize("when, limit", [("gather", 1000), ("tokenize_archives", 4096)])
def test_a_full_disk_leaves_what_is_finished(hub, corpus, when, limit):
    pytest.importorskip("resource")
    limited = f"__import__('resource').setrlimit(__import__('resource').RLIMIT_FSIZE, ({limit}, {limit}))"
    process = start_changed(hub, f"before('{when}', lambda: {limited})")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "File too large" in err and err.count("\n") == 1
    assert "what is finished is kept" in out and not list(PARTS.rglob("*.tmp*"))
    done = prepare(f"--mirror={hub.url}")
    assert done.returncode == 0 and ("0 archives" in done.stdout) is (when == "gather")
    check_result(corpus)


@pytest.mark.parametrize("short_of", [0, 1])
def test_the_room_that_is_asked_for(short_of, monkeypatch, tmp_path):
    """For two downloads at a time but for what is there, their tokens in 1.5 times the space, and a copy of all tokens."""
    for name, size in (("0.tar", 7), ("1.tar", 20)):  # kept from before, and a part of one that is to do
        (tmp_path / name).write_bytes(bytes(size))
    free = (100 + 50 - 20) + 270 + (10 + 270) - short_of
    monkeypatch.setattr(openwebtext.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    refused = pytest.raises(UserError, match="680B are needed") if short_of else contextlib.nullcontext()
    with refused:
        archives = [SimpleNamespace(path=tmp_path / f"{i}.tar", size=size) for i, size in ((1, 30), (2, 100), (3, 50))]
        openwebtext.check_space(tmp_path, archives, 10, 2)


def test_what_is_told_before_anything_is_done(hub, monkeypatch, capsys):
    monkeypatch.setattr(openwebtext.shutil, "disk_usage", lambda path: SimpleNamespace(free=10_000))
    with pytest.raises(UserError, match="has 10kB free, but .* are needed"):
        prepare_data.main(["openwebtext", "--shards=3-5", f"--mirror={hub.url}"])
    assert "archives to do" in capsys.readouterr().out
    assert {method for method, _, _ in hub.requests} == {"HEAD"} and not PARTS.exists()
    os.mkdir("empty")
    with pytest.raises(UserError, match="--source empty holds no urlsf_subset00.tar"):
        prepare_data.main(["openwebtext", "--source=empty"])
    assert not PARTS.exists()


def test_two_at_once_are_refused(hub):
    pytest.importorskip("fcntl")
    process = start_changed(hub, SLOWED)
    wait_until_growing("tokens", process)
    second = prepare(f"--mirror={hub.url}")
    process.kill()
    process.communicate(timeout=60)
    assert second.returncode == 1 and "another process is at work" in second.stderr


def test_damaged_parts_are_named(corpus, monkeypatch):
    with monkeypatch.context() as patch:
        patch.delattr(openwebtext, "gather")
        with pytest.raises(NameError):
            prepare_here(corpus)
    for name, damage, words in (
        ("tokens", lambda data: data[:-2], "tokens does not fit the lengths"),
        ("tokens", lambda data: data[2:] + data[:2], "tokens does not fit the lengths"),
        ("lengths", lambda data: data[4:] + data[:4], "lengths is damaged"),
        ("lengths", lambda data: data[:-8], "lengths is damaged"),
        ("corpus.json", lambda data: data[:-5], "corpus.json is damaged"),
    ):
        path = WORK / name
        whole = path.read_bytes()
        path.write_bytes(damage(whole))
        with pytest.raises(UserError, match=words):
            prepare_here(corpus)
        path.write_bytes(whole)
    prepare_here(corpus)
    check_result(corpus)
