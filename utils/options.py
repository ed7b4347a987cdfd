"""What the programs beside train.py need for their options and output."""

import argparse


def checked(kind, holds, problem):
    """A type for argparse: int, float or str, refused with the problem where holds is false."""

    def value(text):
        if not holds(kind(text)):
            raise argparse.ArgumentTypeError(f"{text!r} {problem}")
        return kind(text)

    value.__name__ = kind.__name__  # argparse prints it
    return value


def short(number):
    """Three digits: 61.4, 23.3k, 1.25M, 18.1G"""
    for power, unit in ((9, "G"), (6, "M"), (3, "k")):
        if number >= 0.9995 * 10**power:
            return f"{number / 10**power:.3g}{unit}"
    return f"{number:.3g}"
