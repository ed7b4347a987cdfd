"""Settings from a config file and flags, and a user's mistakes in one line.

A setting is a field of a dataclass, and the comment behind it is its help. None is written "auto".
"""

import argparse
import contextlib
import dataclasses
import inspect
import math
import os
import re
import runpy
import sys
import traceback
import types
import typing
from pathlib import Path

QUICKSTART = Path(__file__).parent.parent / "config" / "quickstart.py"
CHOICES = {
    "objective": ("next", "masked"),
    "lr_schedule": ("cosine", "linear"),
    "dtype": ("float32", "bfloat16", "float16"),
    "query_activation": ("gelu", "none"),
}


class UserError(Exception):
    """A mistake that the user can mend, in one line. Status 2: a wrong command; 1: a failure."""

    def __init__(self, message, status=1):
        super().__init__(message)
        self.status = status


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are UserErrors. It takes no abbreviated flags."""

    def __init__(self, **options):
        as_written = argparse.RawDescriptionHelpFormatter
        super().__init__(allow_abbrev=False, formatter_class=as_written, **options)

    def error(self, message):
        raise UserError(f"{message} (see --help)", status=2)


def setting_type(kinds):
    """A type for argparse: the text of a flag -> a bool, int, float or str, or None for auto."""

    def value(text):
        if text == "auto" and types.NoneType in kinds:
            return None
        if bool in kinds:
            return ["false", "true"].index(text.lower()) == 1  # ValueError for other texts
        return kinds[0](text)

    value.__name__ = kinds[0].__name__  # argparse prints it
    return value


def add_settings(parser, cls):
    """Add a flag for each field of a dataclass but causal, which follows the objective."""
    group = parser.add_argument_group(cls.__name__)
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(cls), re.M))
    for field in dataclasses.fields(cls):
        if field.name == "causal":
            continue
        kinds = typing.get_args(field.type) or (field.type,)
        options = {"type": setting_type(kinds), "metavar": kinds[0].__name__}
        options["default"] = "auto" if field.default is None else field.default
        options["help"] = f"{comments.get(field.name, '').replace('%', '%%')} (%(default)s)"
        if bool in kinds:  # a bare --resume means --resume=true
            options |= {"nargs": "?", "const": True}
        group.add_argument(f"--{field.name}", **options)


def build(cls, options):
    """A dataclass from what argparse has parsed. UserError where its values contradict."""
    names = [field.name for field in dataclasses.fields(cls) if hasattr(options, field.name)]
    try:
        return cls(**{name: getattr(options, name) for name in names})
    except ValueError as e:
        raise UserError(str(e), status=2) from None


def read_command(argv, settings_class, config_class):
    """Command line -> (settings, model configuration). Flags override the config file.

    What is auto stays None, and so does vocab_size where it is not given.
    """
    usage = "%(prog)s [config/FILE.py] [--key=value ...]"
    parser = Parser(usage=usage, description=inspect.getmodule(settings_class).__doc__)
    parser.add_argument("config", nargs="?", type=Path, default=QUICKSTART, help=argparse.SUPPRESS)
    add_settings(parser, settings_class)
    add_settings(parser, config_class)
    parser.set_defaults(vocab_size="auto")
    path = parser.parse_args(argv).config
    options = parser.parse_args([*read_config(path), *argv])
    options.out_dir = options.out_dir or str(Path("out") / path.stem)
    check_ranges(options)
    return build(settings_class, options), build(config_class, options)


def read_config(path):
    """The assignments of a config file, Python of the user's own, as flags."""
    if not path.exists():
        raise UserError(f"there is no config file {path}", status=2)
    values = runpy.run_path(str(path))
    code = [name for name, v in values.items() if callable(v) or isinstance(v, types.ModuleType)]
    names = [name for name in values if name not in code and not name.startswith("_")]
    return [f"--{name}={'auto' if values[name] is None else values[name]}" for name in names]


def check_ranges(options):
    """Refuse values that make no sense. options has settings as attributes."""
    for name, value in vars(options).items():
        least = 1 if type(value) is int and name not in ("seed", "warmup_iters") else 0
        bound = 1 if name in ("beta1", "beta2", "dropout", "mask_share") else math.inf
        if isinstance(value, (int, float)) and not least <= value < bound:
            raise UserError(f"{name}={value} is not in [{least}, {bound})", status=2)
        if value is not None and value not in CHOICES.get(name, [value]):
            raise UserError(f"{name}={value} must be {' or '.join(CHOICES[name])}", status=2)
    if options.min_lr is not None and options.min_lr > options.learning_rate:
        problem = f"min_lr={options.min_lr:g} is above learning_rate={options.learning_rate:g}"
        raise UserError(f"{problem}; lower it, too", status=2)


def run_program(main):
    """Call main() and exit with the status that it returns. A mistake of the user is one line."""
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    with contextlib.suppress(AttributeError):  # a notebook's stdout lacks reconfigure
        sys.stdout.reconfigure(errors="replace")  # a terminal may lack a character
    try:
        status = main() or 0
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:  # the output is piped to head or less
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 141
    except (UserError, OSError) as e:
        print(f"{Path(sys.argv[0]).name}: {e}", file=sys.stderr, flush=True)
        status = getattr(e, "status", 1)
    except Exception:
        if alone:
            raise
        traceback.print_exc()
        status = 1
    if alone:
        sys.exit(status)
    # One of several processes may have failed alone. An orderly exit would wait for the others,
    # and with torch 2.14 (Gloo, DistributedDataParallel) it can abort in a thread of torch's.
    sys.stdout.flush()
    os._exit(status)
