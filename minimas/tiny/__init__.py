"""The tiny system: three small agents and their links, trained by us and shipped here in the released layout.

task.py   the task: chains of arithmetic modulo 10
build.py  trains everything from scratch: python -m minimas.tiny.build --out FOLDER
"""
