"""`python -m ecodiff` is the command `ecodiff`."""

from ecodiff.cli import main

main()
