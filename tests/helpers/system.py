"""Programs, and system calls that fail."""

import os
import subprocess
import sys
from unittest.mock import Mock


def run_python(*words, **options):
    """A finished process of this Python with these arguments, its output as text."""
    return subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, **options)


def refusing(number):
    """A function that fails as a system call does that sets errno to `number`."""
    return Mock(side_effect=OSError(number, os.strerror(number)))
