"""`python -m tests.fuzz`."""

import sys

from tests.fuzz.fuzzer import main

if __name__ == "__main__":  # the processes of --jobs import this file, too
    sys.exit(main())
