"""Runs that are killed, disks that are full, files that are damaged: nothing is lost."""

import os
import signal
import socket
import sys
from pathlib import Path

import pytest
import torch

from conftest import assert_same, assert_same_run, checkpoint, metrics, run, start

import train
from utils.checkpoint import RunFolder
from utils.files import new_file
from utils.settings import UserError

LONG = ["--max_iters=100000", "--eval_interval=50000", "--eval_tokens=16"]
posix = pytest.mark.skipif(sys.platform == "win32", reason="needs fork and POSIX signals")


def slow(test):
    """Real processes, some of them killed: pytest -m slow."""
    return pytest.mark.slow(posix(test))


# Each start is a fork of one process that has torch loaded and in use, so that twenty take seconds.
KILLER = """
import os, random, signal, sys, time
import torch
torch.set_num_threads(1)
import train

train.main(["tiny.py", "--out_dir=out/warm_up"])
rng, killed = random.Random(0), 0
while killed < 20 or not os.path.exists("out/killed/ckpt.pt"):
    child = os.fork()
    if child == 0:
        sys.stdout = open(os.devnull, "w")
        resume = ["--resume"] if os.path.exists("out/killed/config.json") else []
        os._exit(train.main(["tiny.py", *{flags!r}, "--out_dir=out/killed", *resume]))
    time.sleep(rng.uniform(0.0, 0.6))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status):
        sys.exit(f"it ended after {{killed}} kills with {{os.waitstatus_to_exitcode(status)}}")
    killed += 1
"""


@slow
@pytest.mark.parametrize("objective", ["next", "masked"])
def test_killed_twenty_times_it_ends_as_if_it_had_not_been(objective, tiny_config):
    flags = ["--max_iters=100000", "--eval_interval=10", "--eval_tokens=64", "--log_interval=5"]
    flags += ["--dropout=0.2", f"--objective={objective}"]
    Path("killer.py").write_text(KILLER.format(flags=flags))
    done = run("killer.py")
    assert done.returncode == 0, done.stderr
    reached = RunFolder("out/killed").load("ckpt.pt")["state"]["step"]
    assert reached > 0
    end = [f"--max_iters={reached + 20}", "--lr_decay_iters=100000", *flags[1:]]
    assert run("train.py", tiny_config, *end, "--out_dir=out/killed", "--resume").returncode == 0
    assert run("train.py", tiny_config, *end, "--out_dir=out/whole").returncode == 0
    assert_same_run("out/killed", "out/whole")
    assert not list(Path("out/killed").glob("*.tmp"))


@slow
def test_a_full_disk_while_saving_keeps_the_checkpoint_before(tiny_config):
    resource = pytest.importorskip("resource")
    flags = [tiny_config, "--log_interval=1"]
    assert run("train.py", *flags, "--max_iters=4", "--lr_decay_iters=12").returncode == 0
    good = Path("out/tiny/ckpt.pt").read_bytes()
    limit = len(good) // 2
    limited = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))}
    done = run("train.py", *flags, "--resume", "--max_iters=12", **limited)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert "ckpt.pt could not be written: File too large" in done.stderr
    assert Path("out/tiny/ckpt.pt").read_bytes() == good
    assert not list(Path("out/tiny").glob(".*.tmp"))
    assert run("train.py", *flags, "--resume", "--max_iters=12").returncode == 0
    assert run("train.py", *flags, "--max_iters=12", "--out_dir=out/whole").returncode == 0
    assert_same(checkpoint("out/tiny")["model"], checkpoint("out/whole")["model"])


def test_a_checkpoint_that_is_damaged_is_named(tiny_config, whole_run):
    path = Path(whole_run, "ckpt.pt")
    whole = path.read_bytes()
    damaged = [b"", whole[:1], whole[:100], whole[: len(whole) // 2], whole[:-1000]]
    without = checkpoint(whole_run)
    del without["state"]
    torch.save(without, path)
    damaged.append(path.read_bytes())
    for data in damaged:
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"^out/tiny/ckpt.pt is damaged, or no checkpoint .*$"):
            train.main([tiny_config, "--resume", "--max_iters=20", "--lr_decay_iters=12"])
        assert path.read_bytes() == data and metrics(whole_run, "val_loss").keys() == {0, 4, 8, 12}


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("a bug")])
def test_an_error_while_writing_leaves_the_old_file(error):
    path = Path("f")
    path.write_text("old")
    words = "^f could not be written: No space left" if isinstance(error, OSError) else "a bug"
    with pytest.raises((UserError, RuntimeError), match=words), new_file(path) as f:
        f.write(b"new")
        raise error
    assert path.read_text() == "old" and not Path(".f.tmp").exists()


def test_a_file_is_on_the_disk_before_it_has_its_name(monkeypatch):
    done, replace = [], os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: done.append(os.fstat(fd).st_size))
    monkeypatch.setattr(os, "replace", lambda *names: (done.append("named"), replace(*names)))
    with new_file(Path("f")) as f:
        f.write(b"12345")
    assert done == [5, "named"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGPIPE")
def test_a_reader_that_has_seen_enough_ends_a_program_quietly():
    Path("p.py").write_text(
        "from utils.settings import run_program\n"
        "def main():\n    while True:\n        print('x' * 99)\nrun_program(main)\n"
    )
    process = start("p.py")
    process.stdout.readline()
    process.stdout.close()
    assert (process.wait(60), process.stderr.read()) == (141, "")


@pytest.mark.parametrize("beyond", [18, 200])
def test_token_ids_beyond_the_vocabulary_are_never_trained_on(beyond, tiny_config):
    path = Path("data/tiny/train.bin")
    ids = bytearray(path.read_bytes())
    ids[500:] = bytes([beyond]) * (len(ids) - 500)
    path.write_bytes(ids)
    words = f"train.bin holds the token id {beyond}, but data/tiny has a vocabulary of 18"
    with pytest.raises(UserError, match=words):
        train.main([tiny_config])
    assert not Path("out/tiny/ckpt.pt").exists()


@slow
def test_two_runs_in_one_folder_at_once_are_refused(tiny_config):
    flags = [tiny_config, *LONG]
    first = start("train.py", *flags)
    try:
        assert any(line.startswith("step 2/") for line in first.stdout)
        second = run("train.py", *flags)
        assert second.returncode == 1 and "out/tiny holds a run" in second.stderr
        second = run("train.py", *flags, "--resume")
        assert second.returncode == 1
        assert "another process is at work in out/tiny" in second.stderr
        assert run("train.py", *flags, "--resume", "--eval_only").returncode == 0  # only reads
        first.send_signal(signal.SIGTERM)
        first.communicate(timeout=60)
        assert first.returncode == 143
    finally:
        first.kill()
    assert run("train.py", *flags).returncode == 1  # it holds a run now


# Two processes, started as torchrun does, but without torchrun, which would end them by itself.

RANK = """
import os, sys
import train
from utils import settings

step = train.train_step

def spoilt(*arguments):
    loss, norm = step(*arguments)
    spoils = arguments[-1] == 3 and os.environ["RANK"] == "1"
    return loss * float("nan") if spoils else loss, norm

if "spoil" in sys.argv:
    sys.argv.remove("spoil")
    train.train_step = spoilt
settings.run_program(train.main)
"""


@pytest.fixture
def two_ranks(tiny_config):
    """A function that starts a run of two ranks and waits until it has done two steps."""
    Path("rank.py").write_text(RANK)
    ranks = []

    def start_both(*flags):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = str(s.getsockname()[1])
        for rank in range(2):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
            place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            command = ["rank.py", tiny_config, "--log_interval=2", *flags]
            ranks.append(start(*command, environment=place))
        assert any(line.startswith("step 2/") for line in ranks[0].stdout)
        return ranks

    yield start_both
    for process in ranks:
        process.kill()


@slow
def test_where_a_rank_dies_the_other_does_not_wait_for_it(two_ranks):
    ranks = two_ranks(*LONG)
    ranks[1].kill()
    _, errors = ranks[0].communicate(timeout=60)
    assert ranks[0].returncode == 1
    assert "Traceback" in errors


@slow
def test_a_signal_to_one_rank_stops_both_and_one_process_goes_on(two_ranks, tiny_config):
    ranks = two_ranks(*LONG)
    ranks[1].send_signal(signal.SIGTERM)
    out, _ = ranks[0].communicate(timeout=60)
    assert "and saved; --resume continues" in out
    assert (ranks[0].returncode, ranks[1].wait(timeout=60)) == (143, 143)
    step = RunFolder("out/tiny").load("ckpt.pt")["state"]["step"]
    assert step >= 2
    end = ["--lr_decay_iters=100000", f"--max_iters={step + 3}"]
    train.main([tiny_config, *LONG[1:], "--resume", *end])
    assert RunFolder("out/tiny").load("ckpt.pt")["state"]["step"] == step + 3
    (session,) = RunFolder("out/tiny").read_json("config.json")["resumed"]
    assert session["processes"] == 1


@slow
def test_a_loss_that_is_not_finite_on_one_rank_stops_both(two_ranks):
    ranks = two_ranks("spoil", *LONG)
    for process in ranks:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 1, errors
        assert "is not finite at step" in errors and "Traceback" not in errors
