"""Settings from a config file and --key=value flags, and a user's mistakes in one line instead of a traceback.

Settings are fields of dataclasses: int, float, bool, str, or one of them | None, where None is written "auto".
The comment behind a field is its help.
"""

import argparse
import contextlib
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
    with contextlib.suppress(AttributeError):  # of what a notebook has in its place
        sys.stdout.reconfigure(errors="replace")  # a terminal may lack a character
    try:
        leave(main())
    except KeyboardInterrupt:
        leave(130)
    except BrokenPipeError:  # the reader of a pipe, head or less, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        leave(141)
    except Exception as e:
        if out_of_memory(e) and not isinstance(e, UserError):  # which says more
            e = UserError("out of memory: do less at a time (--num_samples, --batch_size), or a smaller model")
        if isinstance(e, ModuleNotFoundError):
            e = UserError(f"{e}; pip install {(e.name or 'it').partition('.')[0]}")
        if not isinstance(e, (UserError, OSError)):
            raise
        print(f"{Path(sys.argv[0]).name}: {e}", file=sys.stderr, flush=True)
        leave(getattr(e, "status", 1))


def leave(status):
    """Exit; at once as one of several processes, which may have failed alone.

    To leave in order would wait for the others. And torch's threads for collectives outlive the process group (seen with
    2.14, Gloo and DistributedDataParallel): one that frees a tensor while Python shuts down aborts the process.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.stdout.flush()
        os._exit(status or 0)
    sys.exit(status)


def out_of_memory(e):
    """Whether an exception says so; torch's words differ with device and version."""
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


def checked(kind, holds, problem):
    """A type for argparse: int, float or str, refused with the problem where it does not hold for a value."""

    def value(text):
        if not holds(kind(text)):
            raise argparse.ArgumentTypeError(f"{text!r} {problem}")
        return kind(text)

    value.__name__ = kind.__name__  # as argparse tells it
    return value


def setting_types(*classes):
    """{name: (type,), or (type, NoneType)} of the settings of some dataclasses."""
    hints = {name: kind for cls in classes for name, kind in typing.get_type_hints(cls).items()}
    hints.pop("causal", None)  # follows the objective
    return {name: typing.get_args(kind) or (kind,) for name, kind in hints.items()}


def read_command(argv, settings_class, config_class):
    """Command line -> (settings, model configuration); flags win over the config file, and what is auto stays None."""
    kinds = setting_types(settings_class, config_class)
    files, flags = split_command(argv, kinds)
    if len(files) > 1:
        raise UserError(f"one config file at most, not {' '.join(files)}; a setting is written --key=value", status=2)
    path = Path(files[0]) if files else Path(__file__).parent.parent / "config/quickstart.py"
    given = {key: convert(key, value, kinds, path) for key, value in read_config(path).items()}
    given |= {key: convert(key, value, kinds, "command line") for key, value in flags.items()}
    given["out_dir"] = given.get("out_dir") or str(Path("out") / path.stem)
    model_args = {key: given.pop(key) for key in setting_types(config_class) if key in given}
    settings = settings_class(**given)
    check_ranges(settings)
    try:
        return settings, config_class(**{"vocab_size": None, **model_args})  # None: the data set's
    except ValueError as e:
        raise UserError(str(e), status=2) from None


def check_ranges(settings):
    """Refuse values of the training settings that make no sense."""
    counts = "batch_size gradient_accumulation_steps max_iters lr_decay_iters eval_interval eval_tokens log_interval"
    ranges = {
        "at least 1": (lambda v: v >= 1, counts),
        "above 0": (lambda v: 0 < v < math.inf, "learning_rate peak_tflops"),
        "0 or above": (lambda v: 0 <= v < math.inf, "seed min_lr warmup_iters weight_decay grad_clip"),
        "in [0, 1)": (lambda v: 0 <= v < 1, "beta1 beta2"),
        "above 0 and below 1": (lambda v: 0 < v < 1, "mask_share"),
        "next or masked": (lambda v: v in ("next", "masked"), "objective"),
        "cosine or linear": (lambda v: v in ("cosine", "linear"), "lr_schedule"),
        "float32, bfloat16 or float16": (lambda v: v in ("float32", "bfloat16", "float16"), "dtype"),
    }
    for meaning, (holds, names) in ranges.items():
        for name in names.split():
            value = getattr(settings, name)
            if value is not None and not holds(value):
                raise UserError(f"{name}={value} must be {meaning}", status=2)
    rate, min_lr = settings.learning_rate, settings.min_lr
    if min_lr is not None and min_lr > rate:
        raise UserError(f"min_lr={min_lr:g} is above learning_rate={rate:g}; lower it too", status=2)


def split_command(argv, kinds):
    """Command line -> (words that are no flags, {key: text of the flag, or True of a bare switch})."""
    words, flags = [], {}
    for argument in argv:
        key, equals, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--"):
            words.append(argument)
        elif equals or bool in kinds.get(key, (bool,)):
            flags[key] = value if equals else True
        else:
            raise UserError(f"--{key} needs a value: --{key}=VALUE", status=2)
    return words, flags


def read_config(path):
    """The assignments of a config file: Python, the user's own, which may start from another such file."""
    if not path.exists():
        raise UserError(f"there is no config file {path}; a setting is written --key=value", status=2)
    try:
        values = runpy.run_path(str(path))
    except (Exception, SystemExit) as e:
        raise UserError(f"{path}: {type(e).__name__}: {' '.join(str(e).split())}", status=2) from None
    code = {name for name, value in values.items() if callable(value) or isinstance(value, types.ModuleType)}
    return {name: value for name, value in values.items() if name not in code and not name.startswith("_")}


def convert(key, value, kinds, where):
    """A flag's text or a file's value -> a value of the setting's type."""
    if key not in kinds:
        near = difflib.get_close_matches(key, kinds, n=1, cutoff=0)[0]
        raise UserError(f"{where}: unknown setting {key!r}; the nearest is {near!r} (--help lists all)", status=2)
    kind, text = kinds[key][0], str(value).lower()
    if kinds[key] != (kind,) and (value is None or text == "auto"):
        return None
    if kind is str and isinstance(value, str) and value:
        return value
    if kind is bool and text in ("true", "false", "1", "0"):
        return text in ("true", "1")
    if kind in (int, float):
        with contextlib.suppress(ValueError, OverflowError):
            number = float(text)
            if kind is float:
                return number
            if number.is_integer() and abs(number) < 2**53:  # 1e6 will do, as people write it
                return int(number)
    expected = {int: "an integer below 2**53", float: "a number", bool: "true or false", str: "a text"}[kind]
    raise UserError(f"{where}: {key}={value!r} is not {expected}", status=2)


def list_settings(*classes):
    """The settings of dataclasses with their defaults and comments, as --help shows them."""
    kinds, source = setting_types(*classes), "".join(map(inspect.getsource, classes))
    found = re.findall(r"^    (\w+): [^=\n]+ = (.+?)  # (.+)$", source.replace("None", "auto"), re.M)
    return "\n".join(f"  --{key}={default}\n        {meaning}" for key, default, meaning in found if key in kinds)
