"""`python -m fp8fx`."""

from fp8fx.cli import main

main()
