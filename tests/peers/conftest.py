"""Tests of the peers run only when they are asked for: pytest tests/peers."""

from pathlib import Path

import pytest

PEERS = Path(__file__).parent


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave this directory out unless it, or a file in it, is on the command line."""
    asked = (config.invocation_params.dir / argument.partition("::")[0] for argument in config.args)
    return None if any(path.resolve().is_relative_to(PEERS) for path in asked) else True
