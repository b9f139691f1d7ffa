"""`python -m tests.compiled`."""

import sys

from tests.compiled.report import main

main(sys.argv[1:])
