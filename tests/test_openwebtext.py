"""openwebtext.py and download.py against a server on this machine that holds small archives."""

import contextlib
import hashlib
import io
import json
import lzma
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
from conftest import start

import prepare_data
from utils import download, openwebtext
from utils.settings import UserError

# No sha256 of these archives is published, so that others may take their place.
SHARDS = (3, 4, 5)
FIRST = "urlsf_subset03.tar"
WORK = Path("data/openwebtext_3-5.work")
ARCHIVES = Path("data/openwebtext.archives")


@pytest.fixture(autouse=True)
def small_needs(gpt2_vocabulary, monkeypatch):
    monkeypatch.setattr(openwebtext, "TOKEN_BYTES", 1e6)


def tar(members):
    """[(name, bytes; None for a folder or a link)] -> the bytes of a tar archive."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content or b"")
            if content is None:
                info.type = tarfile.DIRTYPE if name.endswith("/") else tarfile.SYMTYPE
            archive.addfile(info, io.BytesIO(content or b""))
    return out.getvalue()


def xz(members):
    return lzma.compress(tar(members), preset=0)


def make_documents(seed, n):
    """Texts with blank lines, blanks around them and characters of several bytes."""
    rng = random.Random(seed)
    words = ["query", "the", "Zwölf", "日本", "<|endoftext|>", "\n", "\n\n\n\n", "\r\n", "\u00a0"]
    sizes = [rng.randrange(3, 400) for _ in range(n)]
    texts = [" \n" + " ".join(rng.choices(words, k=size)) + "\u3000\n" for size in sizes]
    return [*texts, "", " \n"]


def make_archive(documents):
    """An archive whose five members hold the documents, among files that are not to be read."""
    members = [("openwebtext/", None), ("openwebtext/README.md", b"no text of the corpus")]
    for i, group in enumerate(np.array_split(documents, 5)):
        inner = [("./", None), (".hidden.txt", b"no"), ("../__meta.txt", b"no"), ("a.csv", b"no")]
        inner += [(f"../{i}-{j}.txt", text.encode()) for j, text in enumerate(group.tolist())]
        members.append((f"openwebtext/{i}_data.xz", xz([*inner, ("link.txt", None)])))
        members += [(f"openwebtext/._{i}_data.xz", b"no xz"), (f"openwebtext/{i}.xz", None)]
    return tar(members)


@pytest.fixture(scope="module")
def corpus():
    """{file name: (bytes of the archive, its documents)}"""
    documents = {f"urlsf_subset{i:02d}.tar": make_documents(i, 900 + 40 * i) for i in SHARDS}
    return {name: (make_archive(texts), texts) for name, texts in documents.items()}


def check_result(corpus, name="openwebtext_3-5", others=()):
    """Compare data/NAME with an independent reading, and data/ with what it should hold."""
    meta = json.loads(Path(f"data/{name}/meta.json").read_text())
    documents = [text for _, texts in corpus.values() for text in texts]
    texts = [re.sub("\n\n+", lambda match: match[0][:2], text).strip() for text in documents]
    order = np.random.default_rng(2357).permutation(len(texts)).tolist()
    n_val = -(-len(texts) // 2000)
    bpe = tiktoken.get_encoding("gpt2")
    for split, chosen in (("val", order[:n_val]), ("train", order[n_val:])):
        raw = Path(f"data/{name}/{split}.bin").read_bytes()
        tokens = [token for i in chosen for token in bpe.encode_ordinary(texts[i]) + [50256]]
        assert np.frombuffer(raw, meta["dtype"]).tolist() == tokens
        assert meta[split] == {
            "documents": len(chosen),
            "tokens": len(tokens),
            "text_bytes": sum(len(texts[i].encode()) for i in chosen),
            "sha256": hashlib.sha256(raw).hexdigest(),
        }
    assert (meta["revision"], meta["vocab_size"]) == (openwebtext.REVISION, 50257)
    for entry, (archive, (data, _)) in zip(meta["archives"], corpus.items(), strict=True):
        sha256 = hashlib.sha256(data).hexdigest()
        assert entry == {"name": archive, "bytes": len(data), "sha256": sha256}
    assert {path.name for path in Path("data").iterdir()} == {name, *others}


class Hub(BaseHTTPRequestHandler):
    """A server with an address that redirects to a store. Its state is in server.hub."""

    def do_GET(self):
        hub = self.server.hub
        path = self.path.split("?")[0]
        name = path.rpartition("/")[2]
        first = int(self.headers.get("Range", "bytes=0-")[6:-1])
        hub.requests.append((self.command, path, first))
        if name not in hub.files:
            code, headers, content = 404, {}, b""
        elif path.startswith("/store/"):
            answer = hub.faults.pop(0) if self.command == "GET" and hub.faults else serve
            code, headers, content = answer(hub.files[name], first)
        else:
            assert f"/resolve/{openwebtext.REVISION}/subsets/" in path
            sha256 = hub.sums.get(name, hashlib.sha256(hub.files[name]).hexdigest())
            announced = {"X-Linked-Size": len(hub.files[name]), "X-Linked-Etag": f'"{sha256}"'}
            headers = {"Location": f"/store/{name}"} | announced
            code, content = 302, b""
        self.send_response(code)
        for key, value in ({"Content-Length": len(content)} | headers).items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)
            hub.may_hang_up.wait(100)

    do_HEAD = do_GET

    def log_message(self, *arguments):
        pass


@pytest.fixture
def hub(corpus):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    url = f"http://127.0.0.1:{server.server_port}"
    server.hub = SimpleNamespace(
        url=url,
        first=f"{url}/resolve/{openwebtext.REVISION}/subsets/{FIRST}",
        files={name: data for name, (data, _) in corpus.items()},
        sums={},  # announced sums that differ from the true ones
        faults=[],  # the next answers of the store: functions of (file, first byte)
        may_hang_up=threading.Event(),  # whether it closes a connection after an answer
        requests=[],  # (method, path, first byte)
    )
    server.hub.may_hang_up.set()
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    yield server.hub
    server.shutdown()
    server.server_close()


def serve(data, first):
    return 206, {}, data[first:]


def cut(n_bytes):
    """Announce everything, send n_bytes, hang up."""
    return lambda data, first: (206, {"Content-Length": len(data) - first}, data[first:][:n_bytes])


def reply(code, content=b"", **headers):
    return lambda data, first: (code, headers, content)


def prepare(*arguments, shards="3-5"):
    prepare_data.main(["openwebtext", f"--shards={shards}", *arguments])


def prepare_from(archives, shards="3-5"):
    """Prepare archives, {name: bytes}, from a folder."""
    for name, data in archives.items():
        Path(name).write_bytes(data)
    prepare("--source=.", shards=shards)


PROGRAM = """
import _thread, os, resource, signal, sys, threading, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
sys.modules["tqdm"] = None  # as if it was not installed

def press_again(ignored):
    # Python drops a Ctrl-C that falls into a callback, such as a weak reference's.
    if ignored.exc_type is not KeyboardInterrupt:
        return sys.__unraisablehook__(ignored)
    threading.Timer(0.01, _thread.interrupt_main).start()

sys.unraisablehook = press_again
import prepare_data
from utils import openwebtext, settings

def slowly(items, *arguments, **options):
    for item in items:
        yield item
        time.sleep(0.1)

openwebtext.TOKEN_BYTES = 1e6
{changes}
settings.run_program(prepare_data.main)
"""
SLOW = """
openwebtext.tqdm = slowly
os.rename = lambda *paths: (os.replace(*paths), time.sleep(0.3))
"""


def start_changed(hub, changes):
    """Start the program with changes, as a process of its own."""
    Path("changed.py").write_text(PROGRAM.format(changes=changes))
    return start("changed.py", "openwebtext", "--shards=3-5", f"--mirror={hub.url}")


def wait_for(name, process):
    """Wait until a file of that name in data/ has content."""
    while process.poll() is None:
        with contextlib.suppress(FileNotFoundError):
            if any(path.stat().st_size for path in Path("data").rglob(name)):
                return
        time.sleep(0.001)
    pytest.fail(f"no {name} appeared: {process.communicate()}")


def test_from_the_hub_over_a_bad_connection_and_again_from_kept_archives(hub, corpus, capsys):
    hub.faults = [cut(90_000), reply(503)]
    prepare(f"--mirror={hub.url}/", "--keep")
    check_result(corpus, others=[ARCHIVES.name])
    assert "3 archives to do, which need 6MB" in capsys.readouterr().out
    for place, methods in ((f"--source={ARCHIVES}", set()), (f"--mirror={hub.url}", {"HEAD"})):
        assert {path.name: path.read_bytes() for path in ARCHIVES.iterdir()} == hub.files
        shutil.rmtree("data/openwebtext_3-5")
        hub.requests.clear()
        prepare(place, "--keep")
        check_result(corpus, others=[ARCHIVES.name])
        assert {method for method, _, _ in hub.requests} == methods
    # An archive's files never reach the disk, although they have names such as ../0-0.txt.
    names = sorted(path.name for path in Path().rglob("*") if path.is_file())
    assert names == ["meta.json", "train.bin", *corpus, "val.bin"]


def test_a_part_of_a_part_is_a_data_set_of_its_own(hub, corpus):
    prepare(f"--mirror={hub.url}", shards="4")
    name = "urlsf_subset04.tar"
    check_result({name: corpus[name]}, name="openwebtext_4")


def test_numpy_has_the_permutation_that_others_used():
    assert np.random.default_rng(2357).permutation(10).tolist() == [8, 3, 0, 9, 5, 6, 2, 7, 4, 1]
    order = np.random.default_rng(2357).permutation(8_013_769)
    sha256 = hashlib.sha256(order.astype("<i8")).hexdigest()
    assert sha256 == "713795c9660553b17cc384b3c0d72c0328090f1926873b034ce38fe506e0655e"


def test_the_whole_corpus_is_checked_against_the_published_numbers(monkeypatch):
    monkeypatch.setattr(openwebtext, "SHA256", {})
    corpus = {}
    for i in range(21):
        data = tar([("a.xz", xz([("a.txt", b"document")]))])
        corpus[f"urlsf_subset{i:02d}.tar"] = data, ["document"]
    archives = {name: data for name, (data, _) in corpus.items()}
    published = {"documents": 21, "tokens": 42, "val": 2}
    for key, value in published.items():
        monkeypatch.setattr(openwebtext, "PUBLISHED", published | {key: 7})
        with pytest.raises(UserError, match=f"'{key}': {value}.* instead of .*'{key}': 7"):
            prepare_from(archives, shards="0-20")
        assert not Path("data/openwebtext").exists()
    monkeypatch.setattr(openwebtext, "PUBLISHED", published)
    prepare_from(archives, shards="0-20")
    check_result(corpus, name="openwebtext")
    assert json.loads(Path("data/openwebtext/meta.json").read_text())["as_published"] is True


@pytest.fixture
def slept(monkeypatch):
    """The waits in seconds, which are not waited. Blocks are small, so that no byte is lost."""
    seconds = []
    monkeypatch.setattr(time, "sleep", seconds.append)
    monkeypatch.setattr(download, "BLOCK", 10)
    return seconds


@pytest.mark.parametrize(
    "faults, begins",
    [
        ([cut(5000)], [0, 5000]),
        ([cut(5000), cut(0), cut(70)], [0, 5000, 5000, 5070]),
        # The server ignores Range.
        ([cut(5000), lambda data, first: (200, {}, data)], [0, 5000]),
        # The store itself is asked again.
        ([reply(503)], [0]),
        # The answer is another file, or not the bytes that were asked for.
        ([cut(5000), reply(200, b"a page")], [0, 5000, 5000]),
        ([lambda data, first: serve(data, 7)], [0, 0]),
    ],
)
def test_a_broken_download_continues(hub, slept, faults, begins):
    hub.faults = list(faults)
    path = Path(FIRST)
    sha256 = download.download(hub.first, path)
    assert path.read_bytes() == hub.files[FIRST] and not hub.faults
    assert sha256 == hashlib.sha256(hub.files[FIRST]).hexdigest()
    # Each time the hub's own address is asked.
    gets = [request for request in hub.requests if request[0] == "GET"]
    assert [first for _, path, first in gets if "/resolve/" in path] == begins
    # A server that does not redirect announces no sum.
    assert download.announced(f"{hub.url}/store/{FIRST}") == (len(hub.files[FIRST]), None)


def test_back_off_grows_and_ends(hub, slept):
    def give_up(faults, message, waits):
        slept.clear()
        hub.faults = faults
        with pytest.raises(requests.RequestException, match=message):
            download.download(hub.first, Path(FIRST))
        assert [seconds for seconds in slept if seconds] == waits
        assert Path(FIRST).stat().st_size == 200

    # The program waits as long as the server asks. The count starts again when bytes come.
    busy = reply(429, **{"Retry-After": "9"})
    give_up([cut(100), busy, cut(100)] + [reply(503)] * 7, "503", [9, 2, 4, 8, 16, 32])
    give_up([cut(0)] * 7, "sends nothing after byte 200", [1, 3, 7, 15, 31, 63])


def test_a_wrong_file_is_refused(hub):
    hub.sums[FIRST] = "0" * 64
    hub.files["urlsf_subset00.tar"] = b"0" * 10240
    advice = f"--mirror, or --source .*{openwebtext.PARQUET_REVISION}"
    for mirror, shard, message in (
        ("http://a..b", 3, f"a..b.*{advice}"),
        (hub.url, 6, f"404.*{advice}"),
        # The store has other bytes than the hub announces.
        (hub.url, 3, f"{FIRST} has sha256 .*, not 000.*delete it"),
        # The hub has another file than this program knows.
        (hub.url, 0, "urlsf_subset00.tar has sha256 .*, not cba8c7.*delete it"),
    ):
        with pytest.raises(UserError, match=f"^.*{message}.*$"):
            prepare(f"--mirror={mirror}", shards=str(shard))
        assert any(Path("data").iterdir()) is ("delete it" in message)


# Archives may be damaged if their sum is neither published nor announced.
GOOD = [("1.txt", b"some text"), ("2.txt", b"more text")]
TWO = tar([("a.xz", xz(GOOD)), ("b.xz", xz(GOOD))])
HALF = len(xz(GOOD)) // 2
FLIPPED = xz(GOOD)[:HALF] + bytes([xz(GOOD)[HALF] ^ 0xFF]) + xz(GOOD)[HALF + 1 :]


@pytest.mark.parametrize(
    "data, message",
    [
        (tar([("a.xz", FLIPPED)]), "[Cc]orrupt"),
        (tar([("a.xz", xz(GOOD)[:-30])]), "cut off"),
        (tar([("a.xz", b"")]), "cut off"),
        (tar([("a.xz", xz([("1.txt", b"fine"), ("2.txt", b"\xff\xfe")]))]), "0xff in position 0"),
        (tar([("a.xz", lzma.compress(b"no tar" * 200))]), "header"),
        (TWO[:1400], "cut off"),
        # Between two members, and a header that differs from its checksum.
        (TWO[:1024], "cut off at byte 1,024"),
        (TWO.replace(b"b.xz", b"c.xz"), "cut off at byte 1,024"),
        (b"", "empty"),
        (b"<html>not found</html>" * 100, "header"),
        (tar([]), "no documents"),
        (tar([("a.xz", xz([(".1.txt", b"hidden")]))]), "no documents"),
    ],
)
def test_a_damaged_archive_is_named(data, message):
    with pytest.raises(UserError, match=f"^{FIRST} is damaged .*{message}.*delete it") as e:
        prepare_from({FIRST: data}, shards="3")
    assert "\n" not in str(e.value)
    assert not any(Path("data").iterdir())


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has other signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize(
    "moment",
    [FIRST, f".{FIRST}.tokens.tmp", f"{FIRST}.json", ".train.bin.tmp", "openwebtext_3-5/val.bin"],
)
def test_stopped_anywhere_it_continues(hub, corpus, moment, number):
    if moment == FIRST:
        hub.faults = [cut(70_000)]
        hub.may_hang_up.clear()
    process = start_changed(hub, SLOW)
    wait_for(moment, process)
    process.send_signal(number)
    # It does not wait for the server.
    out, err = process.communicate(timeout=60)
    hub.may_hang_up.set()
    if number == signal.SIGINT:
        assert (process.returncode, err) == (130, "")
        assert "the same command continues" in out
    n_done = len(list(WORK.glob("*.json")))
    hub.requests.clear()
    process = start_changed(hub, "")
    out, err = process.communicate(timeout=60)
    if "/" in moment:
        assert "openwebtext_3-5 exists already" in err
    else:
        assert process.returncode == 0, err
        assert f"{3 - n_done} archives to do" in out
    if moment == FIRST:
        assert ("GET", f"/store/{FIRST}", download.BLOCK) in hub.requests
    check_result(corpus)


@pytest.mark.parametrize("limit, n_done", [(4096, 0), (300_000, 0), (2_000_000, 3)])
def test_a_full_disk_leaves_what_is_finished(hub, corpus, limit, n_done):
    """The limit on a file's size stops a download, tokens, or train.bin."""
    pytest.importorskip("resource")
    process = start_changed(hub, f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "File too large" in err and err.count("\n") == 1
    assert "keeps what is finished" in out and not list(WORK.rglob("*.tmp"))
    assert len(list(WORK.glob("*.json"))) == n_done
    prepare(f"--mirror={hub.url}")
    check_result(corpus)


def test_refused_before_anything_is_done(hub, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=5_999_999))
    with pytest.raises(UserError, match="has only 6MB free; make room"):
        prepare(f"--mirror={hub.url}")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=6_000_000))
    with pytest.raises(UserError, match="--source nowhere holds no urlsf_subset03.tar"):
        prepare("--source=nowhere")
    assert not hub.requests and not any(Path("data").iterdir())


def test_two_at_once_are_refused(hub):
    pytest.importorskip("fcntl")
    process = start_changed(hub, SLOW)
    wait_for(f"{FIRST}.json", process)
    with pytest.raises(UserError, match="another process is at work"):
        prepare(f"--mirror={hub.url}")
    process.kill()
    process.communicate(timeout=60)
