"""Serving: a recursive system behind the HTTP protocol of chat completions, for the clients that people already have.

    python -m minimas.serve --style tiny
    curl http://127.0.0.1:8000/v1/models

See docs/serving.md. It needs the extra `serve`.
"""
