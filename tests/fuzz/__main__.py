"""`python -m tests.fuzz`."""

import sys

from tests.fuzz.campaign import main

main(sys.argv[1:])
