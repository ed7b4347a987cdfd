"""Settings from a config file and --key=value flags, and a user's mistakes in one line instead of a traceback.

Settings are the fields of dataclasses. A field's type is int, float, bool, str, or one of them | None, where None is
written "auto"; the comment behind a field is its help.
"""

import argparse
import contextlib
import dataclasses
import difflib
import inspect
import math
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
    for power, unit in ((9, "G"), (6, "M"), (3, "k")):
        if number >= 0.9995 * 10**power:
            return f"{number / 10**power:.3g}{unit}"
    return f"{number:.3g}"


# ---------------------------------------------------------------------------------------------------
# Reading a command line.


def setting_types(*classes):
    """{name: type} of the settings of some dataclasses."""
    kinds = {name: kind for cls in classes for name, kind in typing.get_type_hints(cls).items()}
    kinds.pop("causal", None)  # set in code only: training predicts the next token
    return kinds


def read_command(argv, settings_class, config_class, default_config="config/quickstart.py"):
    """Command line -> (settings, model configuration); flags win over the config file.

    What is auto in the settings stays None. vocab_size is None where it was not given: it is the data set's.
    """
    kinds = setting_types(settings_class, config_class)
    files, flags = split_command(argv, kinds)
    if len(files) > 1:
        raise UserError(f"one config file at most, not {' '.join(files)}; a setting is written --key=value", status=2)
    path = Path(files[0]) if files else Path(__file__).parent.parent / default_config
    given = {key: convert(key, value, kinds, path) for key, value in read_config(path).items()}
    given |= {key: convert(key, value, kinds, "command line") for key, value in flags.items()}
    model_args = {f.name: given.pop(f.name) for f in dataclasses.fields(config_class) if f.name in given}
    settings = settings_class(**given)
    settings = dataclasses.replace(settings, out_dir=settings.out_dir or str(Path("out") / path.stem))
    check_ranges(settings)
    try:
        return settings, config_class(**{"vocab_size": None, **model_args})
    except ValueError as e:
        raise UserError(str(e), status=2) from None


def check_ranges(settings):
    """Refuse values of the training settings that make no sense."""
    ranges = {
        "at least 1": (lambda v: v >= 1, "batch_size gradient_accumulation_steps max_iters lr_decay_iters"),
        "1 or above": (lambda v: v >= 1, "eval_interval eval_tokens log_interval"),
        "above 0": (lambda v: 0 < v < math.inf, "learning_rate peak_tflops"),
        "0 or above": (lambda v: 0 <= v < math.inf, "seed min_lr warmup_iters weight_decay grad_clip"),
        "in [0, 1)": (lambda v: 0 <= v < 1, "beta1 beta2"),
        "cosine or linear": (lambda v: v in ("cosine", "linear"), "lr_schedule"),
        "float32, bfloat16 or float16": (lambda v: v in ("float32", "bfloat16", "float16"), "dtype"),
    }
    for meaning, (holds, names) in ranges.items():
        for name in names.split():
            value = getattr(settings, name)
            if value is not None and not holds(value):
                raise UserError(f"{name}={value} must be {meaning}", status=2)
    if settings.min_lr is not None and settings.min_lr > settings.learning_rate:
        rates = f"min_lr={settings.min_lr:g} is above learning_rate={settings.learning_rate:g}"
        raise UserError(f"{rates}; lower it too", status=2)


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
    own = {name: value for name, value in values.items() if not (name.startswith("_") or callable(value))}
    return {name: value for name, value in own.items() if not isinstance(value, types.ModuleType)}


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


def list_settings(*classes):
    """The settings of dataclasses with their defaults and comments, as --help shows them."""
    kinds, lines = setting_types(*classes), []
    for cls in classes:
        for key, default, meaning in re.findall(r"^    (\w+): [^=\n]+ = (.+?)  # (.+)$", inspect.getsource(cls), re.M):
            if key in kinds:
                lines.append(
                    f"  --{key}={default.replace('None', 'auto')}\n        {meaning.replace('None:', 'auto:')}"
                )
    return "\n".join(lines)
