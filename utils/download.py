"""Download a large file over connections that may break."""

import contextlib
import re
import shutil
import time

import requests
from urllib3.exceptions import HTTPError

TRIES = 7  # in a row that bring no byte
TIMEOUT = 30  # seconds without a byte
BLOCK = 1 << 16  # bytes; a broken connection loses less than this
BUSY = (408, 429, 500, 502, 503, 504)

session = requests.Session()
for scheme in ("http://", "https://"):
    retry = requests.adapters.Retry(total=TRIES - 1, backoff_factor=1, status_forcelist=BUSY)
    session.mount(scheme, requests.adapters.HTTPAdapter(max_retries=retry))
# In a compressed answer we could not count the file's bytes.
session.headers["Accept-Encoding"] = "identity"


def announced(url):
    """Return a file's size in bytes and its sha256 (or None), as the server announces them."""
    answer = session.head(url, allow_redirects=True, timeout=TIMEOUT)
    answer.raise_for_status()
    # The hub announces both while it redirects to a store, which does not.
    hub = (step for step in answer.history if "X-Linked-Size" in step.headers)
    headers = next(hub, answer).headers
    size = headers.get("X-Linked-Size") or headers.get("Content-Length", 0)
    sha256 = re.search("[0-9a-f]{64}", headers.get("X-Linked-Etag", ""))
    return int(size), sha256 and sha256[0]


def download(url, path):
    """Append to path the bytes that it lacks. Return the file's sha256, if the server announces it.

    RequestException: there is no such file, or several tries in a row brought nothing.
    """
    size, sha256 = announced(url)
    path.parent.mkdir(exist_ok=True)
    failures = 0
    with open(path, "ab") as f:
        while f.tell() < size:
            time.sleep(2**failures - 1)
            before = f.tell()
            print(f"{path.name}: {before / 1e6:.0f} of {size / 1e6:.0f} MB are here", flush=True)
            with contextlib.suppress(HTTPError):
                receive(url, f, size)
            failures = 0 if f.tell() > before else failures + 1
            if failures == TRIES:
                raise requests.ConnectionError(f"{url} sends nothing after byte {before:,}")
    return sha256


def receive(url, f, size):
    """Append to f what the server sends before the connection breaks."""
    # We ask url itself each time, because the address to which the hub redirects expires.
    headers = {"Range": f"bytes={f.tell()}-"}
    with session.get(url, headers=headers, stream=True, timeout=TIMEOUT) as answer:
        answer.raise_for_status()
        # A server that ignores Range answers 200 and starts with the first byte.
        start = f.tell() if answer.status_code == 206 else 0
        # Another length means another file, such as a page that explains an error.
        if answer.headers.get("Content-Length") == str(size - start):
            f.seek(start)
            f.truncate()
            shutil.copyfileobj(answer.raw, f, BLOCK)
