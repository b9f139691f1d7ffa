"""Commands on hostile input: what they print, how they end, and the memory that they take."""

import hashlib
import json
import os
import re
import resource
import sys
import traceback

# What a terminal acts on, except for newlines, tabs and the carriage returns of progress bars.
ACTED_ON = re.compile(
    "[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2028\u2029\u2066-\u2069\ud800-\udfff]"
)


def forked(function):
    """Status of a process that calls `function`, its stdout and stderr, and its memory beyond the start's, MB.

    The status is 1, after a traceback, for any exception but SystemExit, as Python's own.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(read)
            os.dup2(write, 1)
            os.dup2(write, 2)
            sys.stdout, sys.stderr = (open(n, "w", encoding="utf-8", closefd=False) for n in (1, 2))  # noqa: SIM115
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            status = 0
            try:
                function()
            except SystemExit as end:
                status = end.code or 0
            except BaseException:
                traceback.print_exc()
                status = 1
            sys.stdout.flush()
            sys.stderr.flush()
            took = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
            os.write(write, f"\n{status} {took // 1024}".encode())
        finally:
            os._exit(0)
    os.close(write)
    with open(read, "rb") as file:
        said, _, end = file.read().decode().rpartition("\n")
    os.waitpid(child, 0)
    status, memory = map(int, end.split())
    return status, said, memory


def vouch(file):
    """Have the index of stored labels name the file of epoch 0 as it is now: who can write one can write the other."""
    index = file.with_name("labels.json")
    described = json.loads(index.read_text())
    described["epochs"]["0"]["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    index.write_text(json.dumps(described))


def command(main, *words):
    """A function that runs a command's `main` on these words."""

    def call():
        sys.argv = ["command", *map(str, words)]
        main()

    return call
