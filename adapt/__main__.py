"""`python -m adapt`, `torchrun -m adapt`."""

from adapt.cli import entry

entry()
