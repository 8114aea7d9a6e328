"""python -m thinslice: the command line."""

from thinslice.cli.app import main

main()
