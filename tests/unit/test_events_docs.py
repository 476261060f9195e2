"""Every event that the package records is described."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
NAMED = re.compile(r"""(?:events\.add|self\._event|_tell|EventLog\([^)]*\)\.add|\.add)\(\s*f?"([a-z][a-z -]+)",""")


def test_every_event_is_in_the_table():
    table = (ROOT / "docs" / "run-files.md").read_text()
    found = {
        name
        for file in (ROOT / "hpcpipe").rglob("*.py")
        for name in NAMED.findall(file.read_text())
        if "events" in file.read_text() or "_tell" in file.read_text() or "_event" in file.read_text()
    }
    assert {"recovered", "spare lost", "checkpoint", "done", "hang"} <= found
    missing = sorted(name for name in found if f"`{name}`" not in table)
    assert not missing
