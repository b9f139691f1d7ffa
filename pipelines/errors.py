"""The base of every error that a person can mend."""

from __future__ import annotations


class UserError(Exception):
    """Bad input, configuration, data or environment; the message names what is wrong and what to do about it.

    Commands print the message alone and exit with status 2. Any other exception is a bug: a traceback, status 1.
    """
