"""Where programs and searches that an agent asks for are carried out.

python.py   runs a Python program in a guarded process; also the tests of answers that are programs
guard.py    the process that guards it
launch.py   starts the program of a tool call
tools.py    the calls that an agent writes into its text
search.py   asks a search engine
"""
