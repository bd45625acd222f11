"""What the files of others hold. Checkpoints of many makers are read as transformers 5.3 reads them.

rope.py           rotary parameters in config.json
config_fields.py  what can be wrong in a config.json
folder.py         what a folder of another format holds, and what to do with it
hub.py            files of the hub, and why they cannot be had
tokens.py         special and added tokens that other files than tokenizer.json name
template.py       where the chat template is, and the sandbox in which it runs
"""
