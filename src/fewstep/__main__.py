"""`python -m fewstep` is the command."""

from fewstep.cli import main

main()
