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


pytestmark = pytest.mark.usefixtures("gpt2_vocabulary")


def sha256_of(data):
    return hashlib.sha256(data).hexdigest()


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
        text_bytes = sum(len(texts[i].encode()) for i in chosen)
        counts = {"documents": len(chosen), "tokens": len(tokens), "text_bytes": text_bytes}
        assert meta[split] == {**counts, "sha256": sha256_of(raw)}
    assert (meta["revision"], meta["vocab_size"]) == (openwebtext.REVISION, 50257)
    for entry, (archive, (data, _)) in zip(meta["archives"], corpus.items(), strict=True):
        assert entry == {"name": archive, "bytes": len(data), "sha256": sha256_of(data)}
    assert {path.name for path in Path("data").iterdir()} == {name, *others}


class Hub(BaseHTTPRequestHandler):
    """A server with an address that redirects to a store. Its state is in server.hub."""

    def do_GET(self):
        hub = self.server.hub
        place, _, name = self.path.rpartition("/")
        first = int(self.headers.get("Range", "bytes=0-")[6:-1])
        hub.requests.append((self.command, place, first))
        code, headers, content = 404, {}, b""
        data = hub.files.get(name)
        if data and place == "/store":
            answer = hub.faults.pop(0) if self.command == "GET" and hub.faults else cut(None)
            code, headers, content = answer(data, first)
        elif data and place.endswith(f"/resolve/{openwebtext.REVISION}/subsets"):
            code, headers = 302, {"Location": f"/store/{name}"}
            headers |= {"X-Linked-Size": len(data), "X-Linked-Etag": f'"{sha256_of(data)}"'}
        self.send_response(code)
        for key, value in ({"Content-Length": len(content)} | headers).items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    do_HEAD = do_GET


@pytest.fixture
def hub(corpus):
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.hub = SimpleNamespace(
            url=f"http://127.0.0.1:{server.server_port}",
            files={name: data for name, (data, _) in corpus.items()},
            faults=[],  # the next answers of the store: functions of (file, first byte)
            requests=[],  # (method, folder, first byte)
        )
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        yield server.hub
        server.shutdown()


def cut(n_bytes):
    """Announce everything, send n_bytes (None: everything), hang up."""
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


# Writing is slow, so that a test can stop the program before and after a file gets its name.
PROGRAM = """
import contextlib, os, resource, signal, time
import prepare_data
from utils import openwebtext, settings
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it

@contextlib.contextmanager
def slow_file(path, new_file=openwebtext.new_file):
    with new_file(path) as f:
        yield f
        f.flush()
        time.sleep(0.3)
    time.sleep(0.3)

{changes}
settings.run_program(prepare_data.main)
"""
SLOW = """
openwebtext.new_file = slow_file
os.rename = lambda *paths: (os.replace(*paths), time.sleep(0.3))
"""


def start_changed(hub, changes):
    """Start the program with changes, as a process of its own."""
    Path("changed.py").write_text(PROGRAM.format(changes=changes))
    return start("changed.py", "openwebtext", "--shards=3-5", f"--mirror={hub.url}")


def wait_for(name, process):
    """Wait until a file of that name in data/ has content."""
    sizes = []
    while not any(sizes):
        assert process.poll() is None, process.communicate()
        with contextlib.suppress(FileNotFoundError):
            sizes = [path.stat().st_size for path in Path("data").rglob(name)]


def test_from_the_hub_over_a_bad_connection_and_again_from_kept_archives(hub, corpus):
    hub.faults = [cut(90_000), reply(503)]
    prepare(f"--mirror={hub.url}/", "--keep")
    check_result(corpus, others=[ARCHIVES.name])
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
    # A single archive is a data set, too.
    prepare(f"--source={ARCHIVES}", shards="3")
    others = [ARCHIVES.name, "openwebtext_3-5"]
    check_result({FIRST: corpus[FIRST]}, name="openwebtext_3", others=others)


def test_numpy_has_the_permutation_that_others_used():
    order = np.random.default_rng(2357).permutation(8_013_769).astype("<i8")
    expected = "713795c9660553b17cc384b3c0d72c0328090f1926873b034ce38fe506e0655e"
    assert sha256_of(order) == expected


def test_the_whole_corpus_is_checked_against_the_published_numbers(monkeypatch):
    monkeypatch.setattr(openwebtext, "SHA256", {})
    data = tar([("a.xz", xz([("a.txt", b"document")]))])
    corpus = {f"urlsf_subset{i:02d}.tar": (data, ["document"]) for i in range(21)}
    archives = dict.fromkeys(corpus, data)
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


def test_a_broken_download_continues_and_gives_up_after_seven_tries(hub, monkeypatch):
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    monkeypatch.setattr(download, "BLOCK", 10)  # so that no byte is lost
    address = f"{hub.url}/resolve/{openwebtext.REVISION}/subsets/{FIRST}"
    data = hub.files[FIRST]
    hub.faults = [cut(5000), cut(0), cut(70), reply(503)]
    # Then come another file, other bytes, and a server that ignores Range.
    hub.faults += [reply(200, b"a page"), lambda data, _: cut(None)(data, 7), reply(200, data)]
    assert download.download(address, Path(FIRST)) == sha256_of(data)
    assert Path(FIRST).read_bytes() == data and not hub.faults
    # Each time the hub's own address is asked.
    asked = [request for request in hub.requests if request[0] == "GET" and request[1] != "/store"]
    assert [first for _, _, first in asked] == [0, 5000, 5000, 5070, 5070, 5070]
    # A server that does not redirect announces no sum.
    assert download.announced(f"{hub.url}/store/{FIRST}") == (len(data), None)
    # The program waits as long as the server asks. The count starts again when bytes come.
    busy = [reply(429, **{"Retry-After": "9"}), cut(100), *[reply(503)] * 7]
    for faults, message, waits in (
        ([cut(100), *busy], "503", [9, 2, 4, 8, 16, 32]),
        ([cut(0)] * 7, "sends nothing after byte 200", [1, 3, 7, 15, 31, 63]),
    ):
        Path(FIRST).write_bytes(data[:200] if "sends" in message else b"")
        slept.clear()
        hub.faults = faults
        with pytest.raises(requests.RequestException, match=message):
            download.download(address, Path(FIRST))
        assert [seconds for seconds in slept if seconds] == waits
        assert Path(FIRST).read_bytes() == data[:200]


def test_a_wrong_file_is_refused(hub):
    announced = sha256_of(hub.files[FIRST])
    hub.faults = [reply(200, bytes(len(hub.files[FIRST])))]
    hub.files["urlsf_subset00.tar"] = b"0" * 10240
    for place, shard, message in (
        ("--source=nowhere", 3, f"nowhere/{FIRST}"),
        ("--mirror=http://a..b", 3, "a..b.*another --mirror"),
        (f"--mirror={hub.url}", 6, "404.*another --mirror"),
        # The store has other bytes than the hub announces.
        (f"--mirror={hub.url}", 3, f"{FIRST} has sha256 .*, not {announced}.*delete it"),
        # The hub has another file than this program knows.
        (f"--mirror={hub.url}", 0, "urlsf_subset00.tar has sha256 .*, not cba8c7.*delete it"),
    ):
        with pytest.raises((UserError, FileNotFoundError), match=f"^.*{message}.*$"):
            prepare(place, shards=str(shard))
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
        (tar([("a.xz", xz([("1.txt", b"fine"), ("2.txt", b"\xff\xfe")]))]), "0xff in position 0"),
        (tar([("a.xz", lzma.compress(b"no tar" * 200))]), "header"),
        # Between two members, and a header that differs from its checksum.
        (TWO[:1024], "cut off at byte 1,024"),
        (TWO.replace(b"b.xz", b"c.xz"), "cut off at byte 1,024"),
        (b"", "empty"),
        (b"<html>not found</html>" * 100, "header"),
        (tar([("a.xz", xz([(".1.txt", b"hidden")]))]), "no documents"),
    ],
)
def test_a_damaged_archive_is_named(data, message):
    with pytest.raises(UserError, match=f"^{FIRST} is damaged .*{message}.*delete it") as e:
        prepare_from({FIRST: data}, shards="3")
    assert "\n" not in str(e.value)
    assert not any(Path("data").iterdir())


MOMENTS = [FIRST, f".{FIRST}.tokens.tmp", ".train.bin.tmp", "openwebtext_3-5/val.bin"]
SLOW_MOMENTS = [pytest.param(moment, marks=pytest.mark.slow) for moment in MOMENTS]


@pytest.mark.parametrize("number", [signal.SIGINT, 9], ids=["SIGINT", "SIGKILL"])
@pytest.mark.parametrize("moment", [f"{FIRST}.json", *SLOW_MOMENTS])
def test_stopped_anywhere_it_continues_and_two_at_once_are_refused(
    hub, corpus, moment, number, capsys
):
    pytest.importorskip("fcntl")
    # After the first part of an archive the server is silent, and Ctrl-C does not wait for it.
    hub.faults = [cut(70_000), lambda *request: time.sleep(20)] if moment == FIRST else []
    process = start_changed(hub, SLOW)
    wait_for(moment, process)
    is_prepared = "/" in moment
    if not is_prepared:
        with pytest.raises(UserError, match="another process is at work"):
            prepare(f"--mirror={hub.url}")
    process.send_signal(number)
    out, err = process.communicate(timeout=10)
    if number == signal.SIGINT:
        assert (process.returncode, err) == (130, "")
        assert ("the same command continues" in out) is not is_prepared
    n_done = len(list(WORK.glob("*.json")))
    hub.faults.clear()
    size = (WORK / FIRST).stat().st_size if moment == FIRST else 0
    if is_prepared:
        with pytest.raises(UserError, match="openwebtext_3-5 exists already"):
            prepare(f"--mirror={hub.url}")
    else:
        prepare(f"--mirror={hub.url}")
        assert f"{3 - n_done} archives to do" in capsys.readouterr().out
        assert ("GET", "/store", size) in hub.requests
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
