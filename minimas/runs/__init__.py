"""What commands, evaluation and training share.

lock.py          one process for each output
dependencies.py  what a run depends on, so that only the same run is continued
needs.py         what a run needs before anything is loaded (--needs)
processes.py     the processes that torchrun starts
plot.py          line charts
outputs.py       the files that a run writes, and a table as text
formats.py       what a data file is, and its records
rows.py          where rows come from, and their columns
"""
