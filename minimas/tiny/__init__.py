"""The tiny system: three small agents and their links, trained by us and shipped here in the released layout.

task.py   the task: chains of arithmetic modulo 10
build.py  the command that trains everything from scratch (by train/tiny.py): python -m minimas.tiny.build --out FOLDER
"""
