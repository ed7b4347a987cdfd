"""A large file over a bad connection: resumed where it broke off, tried again with back-off, checked at the end."""

import hashlib
import os
import re
import time

import requests

from command import UserError

TRIES = 7  # failures in a row before it is given up
TIMEOUT = 30  # seconds without a byte
BLOCK = 1 << 16  # bytes; a connection that breaks loses less than this
NO_ENCODING = {"Accept-Encoding": "identity"}  # the bytes as they are, so that they can be counted


class Retry(Exception):
    """An answer that may be another one in a while, or in so many seconds."""

    def __init__(self, message, seconds=0):
        super().__init__(message)
        self.seconds = seconds


def persist(action, hint, size=lambda: 0):
    """Try action until it succeeds; give up after TRIES failures in a row during which size() did not grow."""
    failures, largest = 0, size()
    while True:
        try:
            return action()
        except ValueError as e:  # requests' and urllib3's word for an address that is none
            raise UserError(f"{e}; {hint}") from None
        except (requests.RequestException, Retry) as e:
            failures = failures + 1 if size() <= largest else 1
            largest = max(largest, size())
            reason = str(e).rpartition("Caused by ")[2].rstrip(")")[:150]
            if failures == TRIES:
                raise UserError(
                    f"gave up after {TRIES} tries ({reason}); try the same command again, or {hint}"
                ) from None
            seconds = max(getattr(e, "seconds", 0), 2 ** (failures - 1))
            print(f"{reason}; next try in {seconds} s", flush=True)
            time.sleep(seconds)


def check_status(answer, url, hint):
    code, said = answer.status_code, f"{url} answers {answer.status_code} {answer.reason}"
    if code in (408, 429) or code >= 500:
        wait = answer.headers.get("Retry-After", "")
        raise Retry(said, min(int(wait), 300) if wait.isdigit() else 0)
    if code >= 400:
        raise UserError(f"{said}; {hint}")


def announced(url, hint):
    """What the server tells of a file -> its size in bytes, and its sha256 or None.

    The Hugging Face hub redirects to an address that expires; its own answer has both. hint: what to do
    about a status that says no.
    """

    def ask(**options):
        answer = requests.head(url, timeout=TIMEOUT, headers=NO_ENCODING, **options)
        check_status(answer, url, hint)
        return answer

    answer = persist(ask, hint)
    if answer.is_redirect and "X-Linked-Size" not in answer.headers:
        answer = persist(lambda: ask(allow_redirects=True), hint)
    told = requests.structures.CaseInsensitiveDict()
    for each in [*answer.history, answer]:
        told.update(each.headers)
    size = told.get("X-Linked-Size") or told.get("Content-Length", "")
    if not (size.isdigit() and int(size)):
        raise UserError(f"{url} does not tell its size; {hint}")
    sha256 = re.search(r"\b[0-9a-f]{64}\b", told.get("X-Linked-Etag", ""))
    return int(size), sha256 and sha256[0]


def fetch(url, path, size, sha256, hint, report):
    """Download url to path, which it becomes when it is complete and has been checked -> its sha256.

    size: in bytes; sha256: None where it is not known; report(bytes so far, bytes/s) is called now and then.
    What is there of an earlier try lies in path.part, and is gone on with; a path that exists is checked.
    """
    partial = path.with_name(f"{path.name}.part")
    if path.exists():
        os.replace(path, partial)
    persist(lambda: receive(url, partial, size, hint, report), hint, lambda: size_of(partial))
    try:
        found = check_sum(partial, size, sha256)
    except UserError as e:
        partial.unlink()
        raise UserError(f"{e}; it is deleted, and the same command fetches it anew") from None
    os.replace(partial, path)
    return found


def receive(url, partial, size, hint, report):
    """Append what is missing; from the first address, since the one it redirects to expires."""
    have = size_of(partial)
    if have >= size:
        return
    wanted = {"Range": f"bytes={have}-"} if have else {}
    with requests.get(url, headers=NO_ENCODING | wanted, stream=True, timeout=TIMEOUT) as answer:
        if answer.status_code == 416:  # the server's file is shorter than what is here
            partial.unlink()
            raise Retry(f"{url} ends before byte {have:,}, beginning anew")
        check_status(answer, url, hint)
        if answer.status_code == 206:
            begin, sends, right = have, answer.headers.get("Content-Range", ""), f"bytes {have}-"
        else:  # the whole file, whatever was asked for; or a page that has nothing to do with it
            begin, sends, right = 0, answer.headers.get("Content-Length", str(size)), str(size)
        if not sends.startswith(right):
            raise Retry(f"{url} sends {sends!r}, not {right!r}")
        have, started = begin, time.monotonic()
        with open(partial, "ab" if begin else "wb") as f:
            for block in answer.iter_content(BLOCK):
                f.write(block)
                have += len(block)
                report(have, (have - begin) / (time.monotonic() - started + 1e-9))
    if have != size:
        raise Retry(f"{url} ended after {have:,} of {size:,} bytes")


def size_of(path):
    return path.stat().st_size if path.exists() else 0


def check_sum(path, size, sha256):
    """The sha256 of a file; UserError unless it has that many bytes and that sha256, where it is not None."""
    found = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            found.update(block)
    if path.stat().st_size != size:
        raise UserError(f"{path} has {path.stat().st_size:,} bytes, not {size:,}")
    if sha256 not in (None, found.hexdigest()):
        raise UserError(f"{path} has sha256 {found.hexdigest()}, not {sha256}")
    return found.hexdigest()
