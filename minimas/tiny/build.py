"""python -m minimas.tiny.build: trains and measures the tiny system, as train/tiny.py says."""

if __name__ == "__main__":
    from ..commands.failures import command
    from ..train.tiny import main

    command(main)
