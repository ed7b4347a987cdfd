"""What the programs share about their command line: settings from a config file and --key=value flags
into typed values, a user's mistake into one line instead of a traceback, numbers into few characters.
"""

import argparse
import contextlib
import difflib
import inspect
import os
import re
import runpy
import sys
import types
import typing
from pathlib import Path


class UserError(Exception):
    """Something that the user can mend, told in one line. Exit status 2: the command is wrong; 1: it failed."""

    def __init__(self, message, status=1):
        super().__init__(message)
        self.status = status


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are UserErrors."""

    def error(self, message):
        raise UserError(f"{message} (--help tells more)", status=2)


def run_program(main):
    """Call main() and exit with what it returns; a mistake of the user or a failing disk becomes one line."""
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of a pipe, head or less, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except Exception as e:
        if out_of_memory(e):
            e = UserError("out of memory: do less at a time (--num_samples, --batch_size), or a smaller model")
        if not isinstance(e, (UserError, OSError)):
            raise
        print(f"{Path(sys.argv[0]).name}: {e}", file=sys.stderr)
        sys.exit(getattr(e, "status", 1))


def out_of_memory(e):
    """Whether an exception of Python or of torch says so; the words differ with device and version."""
    return isinstance(e, MemoryError) or any(words in str(e) for words in ("out of memory", "allocate memory"))


def clock(seconds):
    """125 -> 2:05, 3725 -> 1h02m"""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}h{minutes % 60:02}m" if minutes >= 60 else f"{minutes}:{seconds:02}"


def short(number):
    """Three digits: 61.4, 23.3k, 1.25M, 18.1G"""
    powers = ((9, "G"), (6, "M"), (3, "k"), (0, ""))
    power, unit = next((p, u) for p, u in powers if p == 0 or number >= 0.9995 * 10**p)
    return f"{number / 10**power:.3g}{unit}"


# ---------------------------------------------------------------------------------------------------
# Settings: the fields of dataclasses. A field's type is int, float, bool, str, or one of them | None,
# where None is written "auto"; the comment behind it is its help.


def read_settings(argv, kinds, default_config):
    """Command line -> (path of the config file, {key: value} of what it and the flags set; flags win).

    kinds: {key: type} of every setting there is.
    """
    files, flags = split_command(argv, kinds)
    if len(files) > 1:
        raise UserError(f"one config file at most, not {' '.join(files)}; a setting is written --key=value", status=2)
    path = Path(files[0]) if files else default_config
    values = {key: convert(key, value, kinds, path) for key, value in read_config(path).items()}
    return path, values | {key: convert(key, value, kinds, "command line") for key, value in flags.items()}


def split_command(argv, kinds):
    """Command line -> (words that are no flags, {key: text of the flag, or True of a bare switch})."""
    words, flags = [], {}
    for argument in argv:
        key, equals, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--"):
            words.append(argument)
        elif equals or base_type(kinds.get(key, bool)) is bool:
            flags[key] = value if equals else True
        else:
            raise UserError(f"--{key} needs a value: --{key}=VALUE", status=2)
    return words, flags


def base_type(kind):
    """int | None -> int"""
    return (typing.get_args(kind) or (kind,))[0]


def read_config(path):
    """The assignments of a config file: Python, the user's own, which may start from another such file."""
    if not path.is_file():
        raise UserError(f"there is no config file {path}", status=2)
    try:
        values = runpy.run_path(str(path))
    except (Exception, SystemExit) as e:
        raise UserError(f"{path}: {type(e).__name__}: {' '.join(str(e).split())}", status=2) from None
    return {
        k: v for k, v in values.items() if not (k.startswith("_") or callable(v) or isinstance(v, types.ModuleType))
    }


def convert(key, value, kinds, where):
    """A flag's text or a file's value -> a value of the setting's type."""
    if key not in kinds:
        near = difflib.get_close_matches(key, kinds, n=1, cutoff=0)[0]
        raise UserError(f"{where}: unknown setting {key!r}; the nearest is {near!r} (--help lists all)", status=2)
    kind, text = base_type(kinds[key]), str(value).lower()
    if kind is not kinds[key] and (value is None or text == "auto"):
        return None
    if kind is str and isinstance(value, str) and value:
        return value
    if kind is bool and text in ("true", "false", "1", "0"):
        return text in ("true", "1")
    if kind in (int, float):
        with contextlib.suppress(ValueError):
            number = float(text)
            if kind is float:
                return number
            if number.is_integer():  # 1e6 will do, as people write it; large integers keep every digit
                return int(text) if re.fullmatch(r"[-+]?\d[\d_]*", text) else int(number)
    expected = {int: "an integer", float: "a number", bool: "true or false", str: "a text"}[kind]
    raise UserError(f"{where}: {key}={value!r} is not {expected}", status=2)


def list_settings(cls, kinds):
    """The settings of a dataclass with their defaults and comments, as --help shows them."""
    lines = re.findall(r"^    (\w+): [^=\n]+ = (.+?)  # (.+)$", inspect.getsource(cls), re.M)
    return "\n".join(
        f"  --{key}={default.replace('None', 'auto')}\n        {meaning.replace('None:', 'auto:')}"
        for key, default, meaning in lines
        if key in kinds
    )
