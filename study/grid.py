"""The runs of a study, one at a time on each device: each is a process of train.py, and ends as a line of runs.jsonl."""

import contextlib
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

from study.plan import final_loss, read_run
from utils.device import StopSignal
from utils.files import locked
from utils.settings import UserError, clock

TRAIN = Path(__file__).parent.parent / "train.py"


class Grid:
    """Runs what is left of a study, one run at a time on each device."""

    def __init__(self, study, devices):
        self.study, self.devices = study, devices
        self.running = {}  # run -> (its device, its process, the thread that copies what it prints into log.txt)
        self.failure = None  # why a run failed, which stops the others

    def go(self):
        """Run what is left -> the number of the signal that stopped it, or 0."""
        idle, stopping = list(self.devices), False
        with StopSignal() as stop:
            while True:
                for run, (device, process, copying) in list(self.running.items()):
                    if not copying.is_alive():
                        del self.running[run]
                        idle.append(device)
                        self.end(run, process.wait(), stopping)
                if (stop.number or self.failure) and not stopping:
                    stopping = True
                    print("stopping: what runs is saved, and the same command continues", flush=True)
                    for _, process, _ in self.running.values():
                        process.terminate()
                while idle and not stopping and (run := self.next_run()):
                    device = idle.pop(0)
                    self.running[run] = device, *self.start(run, device)
                if not self.running:
                    return stop.number
                time.sleep(0.1)

    def next_run(self):
        """A run that is left; None where there is none, or only the end of one under way can tell which."""
        left = [run for run in self.study.runs() if run not in self.study.records and run not in self.running]
        return left[0] if left else None

    def start(self, run, device):
        """Begin or resume a run -> its process, and the thread that copies what it prints."""
        folder = self.study.run_folder(run)
        flags = [f"--out_dir={folder}"]
        if folder.holds("config.json"):
            flags.append("--resume")
        folder.path.mkdir(parents=True, exist_ok=True)
        # A pipe, and not straight into the file: should this program be killed, the run ends with the next line it
        # prints. In a session of its own the run does not get the Ctrl-C that is meant for this program.
        pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "bufsize": 0, "start_new_session": True}
        process = subprocess.Popen(**self.command(run, device, flags), **pipe)
        copying = threading.Thread(target=copy, args=(process.stdout, folder.path / "log.txt"), daemon=True)
        copying.start()
        return process, copying

    def command(self, run, device, flags):
        """What starts train.py: args and env of a process."""
        environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
        if device:
            flags = [*flags, f"--device={device}"]
        if device == "cpu":  # runs side by side share the processors
            environment.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count() // self.devices.count("cpu"))))
        return {"args": [sys.executable, TRAIN, self.study.config, *self.study.flags(run), *flags], "env": environment}

    def end(self, run, status, stopping):
        """Keep the record of a run that is done, or the reason why it failed."""
        folder = self.study.run_folder(run)
        try:
            record = read_run(folder)
            if record:
                self.study.add(run, record)
                shutil.rmtree(folder.path)
                words = f"val loss {final_loss(record):.4f}" if record["summary"] else "diverged"
                print(f"{run}: {words}; {self.left()}", flush=True)
            elif not stopping:
                log = folder.path / "log.txt"
                raise UserError(f"{last_words(status, log.read_bytes())} ({log} tells more)")
        except (UserError, OSError) as e:
            self.failure = UserError(f"{run}: {e}")

    def left(self, seconds=None):
        """How many runs are to go, and for how long, if each takes so many seconds."""
        to_go, seconds = self.study.to_go(), seconds or self.seconds()
        words = f"at least {to_go} to go" if to_go and self.study.tuning_seeds else f"{to_go} to go"
        return words + (f", {clock(to_go * seconds / len(self.devices))}" if seconds else "")

    def seconds(self):
        """What a run took, on average over those that are finished; None before the first."""
        took = [record["summary"]["seconds"] for record in self.study.records.values() if record["summary"]]
        return statistics.fmean(took) if took else None


def tidy(study):
    """After a kill: wait for runs that are still at work, and delete the folders of those that are recorded."""
    for run in study.runs():
        folder = study.run_folder(run).path
        while folder.exists() and is_at_work(folder):
            print(f"waiting for a run that is still at work in {folder}", flush=True)
            time.sleep(2)
        if run in study.records:
            shutil.rmtree(folder, ignore_errors=True)


def is_at_work(folder):
    """A run whose study.ablate was killed ends with the next line it prints; until then it locks its folder."""
    try:
        with locked(folder):
            return False
    except UserError:
        return True


def copy(pipe, path):
    """Write what comes out of a pipe into a file, at once, until the pipe ends."""
    with contextlib.suppress(OSError), pipe, open(path, "wb", buffering=0) as f:  # a full disk ends the run, too
        shutil.copyfileobj(pipe, f)


def last_words(status, output):
    """Why a run failed."""
    if status < 0:
        return f"killed by signal {-status}"
    lines = output.decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else f"it ended with status {status}"
