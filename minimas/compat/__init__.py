"""What the files of others hold. Checkpoints of many makers are read as transformers 5.3 reads them.

rope.py      rotary parameters in config.json
tokens.py    special and added tokens that other files than tokenizer.json name
template.py  where the chat template is, and the sandbox in which it runs
"""
