"""Programs, and system calls that fail."""

import os
import subprocess
import sys


def run_python(*words, **options):
    """A finished process of this Python with these arguments, its output as text."""
    return subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, **options)


def refusing(number):
    """A function that fails as a system call does that sets errno to `number`."""

    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    return refuse
