"""Programs, what is waited for, calls that fail, and paths that are no files."""

import contextlib
import os
import resource
import signal
import socket
import subprocess
import sys
import time


def run(*words, status=None, **options):
    """A finished process of this program with these arguments, its output as text; it must end with `status`."""
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, **options)
    assert status in (None, done.returncode), done.stdout + done.stderr
    return done


def run_python(*words, **options):
    return run(sys.executable, *words, **options)


def wait_for(condition, process=None, seconds=300):
    """The first true value of `condition()`; fails if `process` ends before, or after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return value


def end_when_ready(*words, interrupt=True):
    """What this Python says on stderr, and its exit status; once it prints "ready", it gets a Ctrl-C."""
    command = [sys.executable, *map(str, words)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "ready\n"
        if interrupt:
            process.send_signal(signal.SIGINT)
        return process.communicate(timeout=20)[1], process.returncode
    finally:
        process.kill()


def refusing(number):
    """A function that fails as a system call does that sets errno to `number`."""

    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    return refuse


def bind_socket(path):
    """Make a socket at a path."""
    with contextlib.chdir(path.parent), socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name)  # the path of a socket has at most 108 characters


def make_odd(path, kind):
    """Make a fifo, a socket or a link to a device at a path."""
    match kind:
        case "fifo":
            os.mkfifo(path)
        case "socket":
            bind_socket(path)
        case "device":
            path.symlink_to("/dev/zero")


@contextlib.contextmanager
def limited_files(count):
    """This process may open so many files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
