"""What is known of the released checkpoints without the network: released.json, which says where it is from."""

from pathlib import Path
from typing import Any

from ..common import read_json

FILE = Path(__file__).with_name("released.json")
OWNER = "RecursiveMAS"  # on the hub


def recorded_config(repository: str) -> dict[str, Any] | None:
    """The fields of config.json that are recorded for a released agent, by its hub id; None for any other."""
    owner, _, name = repository.partition("/")
    recorded = read_json(FILE)
    agent = recorded["repositories"].get(name, {})
    if owner != OWNER or "model" not in agent:
        return None
    return recorded["models"][agent["model"]]["config"]


def recorded_on() -> str:
    """The day on which it was recorded."""
    return read_json(FILE)["recorded"]
