"""`python -m fp8fx.reasons` prints the tables of reasons; with a page's path it writes them into the page."""

import sys
from pathlib import Path

from fp8fx.reasons.docs_page import markdown, updated

if __name__ == "__main__":
    if len(sys.argv) == 1:
        print(markdown())
    else:
        page = Path(sys.argv[1])
        page.write_text(updated(page.read_text()))
