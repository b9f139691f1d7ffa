"""What fastdeit refuses, and says so in an error for its user."""

import pytest

from fastdeit.pipelines.conversion.convert import convert
from fastdeit.pipelines.conversion.workers import ConvertError
from fastdeit.pipelines.errors import UserError


def refused(reason, call, *arguments, error=UserError, **options):
    """The message of the error with which `call(*arguments, **options)` ends; `reason` is a pattern in it."""
    with pytest.raises(error, match=reason) as caught:
        call(*arguments, **options)
    return str(caught.value)


def not_converted(reason, source, dest, *, error=ConvertError, **options):
    """The message of the error with which a conversion ends."""
    return refused(reason, convert, source, dest, error=error, **{"progress": False, **options})
