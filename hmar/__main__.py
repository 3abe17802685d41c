"""`python -m hmar` is the command `hmar`."""

from hmar.cli import main

main()
