"""`python -m tests.soak`."""

import sys

from tests.soak.campaign import main

main(sys.argv[1:])
