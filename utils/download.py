"""Download a large file over a bad connection: it goes on where it broke off."""

import contextlib
import re
import time

import requests

try:
    from tqdm import tqdm
except ImportError:  # an optional extra

    def tqdm(items, *arguments, **options):
        return items


TRIES = 7  # in a row that bring nothing, before we give up
TIMEOUT = 30  # seconds without a byte
BLOCK = 1 << 16  # bytes; a connection that breaks loses less than this

retry = requests.adapters.Retry(total=TRIES - 1, backoff_factor=1, status_forcelist=(408, 429, 500, 502, 503, 504))
session = requests.Session()
for scheme in ("http://", "https://"):
    session.mount(scheme, requests.adapters.HTTPAdapter(max_retries=retry))
session.headers["Accept-Encoding"] = "identity"  # not compressed on the way, so that we can count the file's bytes


def announced(url):
    """A file's size in bytes, and its sha256 or None, as the server announces them."""
    answer = session.head(url, allow_redirects=True, timeout=TIMEOUT)
    # The hub tells both, and redirects to a store that does not.
    answer = next((step for step in answer.history if "X-Linked-Size" in step.headers), answer)
    answer.raise_for_status()
    size = int(answer.headers.get("X-Linked-Size") or answer.headers.get("Content-Length") or 0)
    if size == 0:
        raise requests.RequestException(f"{url} does not tell its size")
    sha256 = re.search(r"\b[0-9a-f]{64}\b", answer.headers.get("X-Linked-Etag", ""))
    return size, sha256[0] if sha256 else None


def fetch(url, path, size):
    """Download url to path, a file of size bytes. What is there already is kept, and the rest is appended."""
    failures, most = 0, -1
    while (have := path.stat().st_size if path.exists() else 0) != size:
        failures = 0 if have > most else failures + 1
        if failures == TRIES:
            raise requests.RequestException(f"gave up after {TRIES} tries: {url} sends nothing after byte {have:,}")
        most = max(have, most)
        print(f"{path.name}: downloading, {have / 1e6:.0f} of {size / 1e6:.0f} MB are here", flush=True)
        time.sleep(2**failures - 1)
        receive(url, path, have, size)


def receive(url, path, have, size):
    """Append to path what the server sends after the first `have` bytes, until the connection breaks."""
    # Always from the hub's own address, since the one to which it redirects expires.
    headers = {"Range": f"bytes={have}-"} if have else {}
    with session.get(url, headers=headers, stream=True, timeout=TIMEOUT) as answer:
        if answer.status_code == 416:  # the server's file is shorter than ours: begin anew
            path.unlink()
            return
        answer.raise_for_status()
        if answer.status_code == 206:
            mode, fits = "ab", answer.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        else:  # the whole file although we asked for the rest, or a page that is not the file
            mode, fits = "wb", answer.headers.get("Content-Length", str(size)) == str(size)
        if fits:
            with open(path, mode) as f, contextlib.suppress(requests.RequestException):
                shown = {"total": size // BLOCK, "initial": f.tell() // BLOCK, "disable": None}
                f.writelines(tqdm(answer.iter_content(BLOCK), path.name, **shown))
