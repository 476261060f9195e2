"""README and docs: their commands parse, their configurations exist, their links lead somewhere."""

import re
import shlex
from pathlib import Path

import pytest

from hpcpipe.cli.main import build_parser
from hpcpipe.config.check import resolve
from hpcpipe.config.load import load

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([ROOT / "README.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("slurm/*.md"), *ROOT.glob("seeds/*.md")])
LINK = re.compile(r"\]\(([^)#]+)(?:#[^)]*)?\)")


def commands(text: str) -> list[list[str]]:
    """Return the hpcpipe commands of the shell blocks, without comments and without what starts them."""
    found = []
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
        for line in block.splitlines():
            for part in re.split(r"&&", line):
                words = shlex.split(part, comments=True)
                if words[:1] == ["hpcpipe"]:
                    found.append(words[1:])
    return found


README_COMMANDS = commands((ROOT / "README.md").read_text())


def test_the_readme_shows_the_main_job():
    assert ["launch", "-n", "2", "train", "configs/quickstart.toml"] in README_COMMANDS
    assert {words[0] for words in README_COMMANDS} >= {"launch", "sample", "checkpoint", "data", "schedule", "doctor"}


@pytest.mark.parametrize("words", README_COMMANDS, ids=" ".join)
def test_a_command_of_the_readme_parses(words):
    args = build_parser().parse_args(words)
    if words[0] == "launch":
        train = build_parser().parse_args([args.program, *args.arguments])
        resolve(load(ROOT / train.config, train.overrides), args.num_ranks)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    targets = [target for target in LINK.findall(path.read_text()) if "://" not in target]
    assert [target for target in targets if not (path.parent / target).exists()] == []
