"""What the programs beside train.py need for their options."""

import argparse


def checked(kind, holds, problem):
    """A type for argparse: int, float or str, refused with the problem where holds is false."""

    def value(text):
        if not holds(kind(text)):
            raise argparse.ArgumentTypeError(f"{text!r} {problem}")
        return kind(text)

    value.__name__ = kind.__name__  # argparse prints it
    return value


count = checked(int, lambda n: n >= 1, "is not 1 or above")
