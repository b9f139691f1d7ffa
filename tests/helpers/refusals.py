"""What fastdeit refuses, and says so in an error for its user."""

import pytest

from fastdeit.pipelines.errors import UserError


def refused(reason, call, *arguments, error=UserError, **options):
    """The message of the error with which `call(*arguments, **options)` ends; `reason` is a pattern in it."""
    with pytest.raises(error, match=reason) as caught:
        call(*arguments, **options)
    return str(caught.value)
