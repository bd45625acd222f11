"""The commands: their options, how they start, fail and end, and what `python -m minimas.recurse` does.

Results go to stdout, everything else goes to stderr. Nothing but a command imports this package.
"""
