"""Serving: a recursive system behind the HTTP protocol of chat completions, for the clients that people already have.

    python -m minimas.serve --style tiny
    curl http://127.0.0.1:8000/v1/models

See docs/serving.md. It needs the extra `serve`.
"""

import os

# Before torch is loaded: oneDNN keeps something for each shape in two places, and a server meets shapes of all sizes.
# An entry has about 0.4 MB. With the usual 1,024 of each the tiny system took 200 MB more, and was not faster; with 128
# of the second it still grew by 5 % after 640 requests, until that was full.
os.environ.setdefault("LRU_CACHE_CAPACITY", "64")
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
