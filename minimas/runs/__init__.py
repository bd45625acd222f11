"""What evaluation and training share: locks on what they write, what a run depends on, the processes of torchrun."""
