"""Draw docs/images/quickstart.svg from what a run showed on a terminal.

script -qc "stty cols 112; hpcpipe launch -n 2 train configs/quickstart.toml" TYPESCRIPT
python docs/make_quickstart_picture.py TYPESCRIPT
"""

import io
import re
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

COMMAND = "hpcpipe launch -n 2 train configs/quickstart.toml"
PICTURE = Path(__file__).parent / "images" / "quickstart.svg"
WIDTH = 112
_CONTROL = re.compile(r"\x1b\[\?\d+[hl]|\x1b\[\d*[A-LN-Z]")


def last_lines(typescript: str) -> list[str]:
    """Return what stays on the terminal from the run's first line to the end of its sample.

    Parameters
    ----------
    typescript : str
        As `script` writes it. Colours are kept; of a line that was written again and again, the last state.
    """
    # A carriage return begins the same line anew, so `splitlines` would see too many.
    lines = [line.rstrip("\r").rpartition("\r")[2] for line in typescript.split("\n")]
    lines = [_CONTROL.sub("", line) for line in lines if not line.startswith("Script ")]
    first = next(number for number, line in enumerate(lines) if line.startswith("hpcpipe "))
    bars = [number for number, line in enumerate(lines) if "\u2501" in line]
    return [line for number, line in enumerate(lines) if number >= first and number not in bars[:-1]]


def main() -> None:
    """Read the typescript and write the picture."""
    typescript = Path(sys.argv[1]).read_bytes().decode(errors="replace").replace("\r\n", "\n")
    console = Console(record=True, width=WIDTH, file=io.StringIO(), highlight=False)
    console.print(f"$ {COMMAND}", style="bold", markup=False)
    for line in last_lines(typescript):
        console.print(Text.from_ansi(line))
    PICTURE.write_text(console.export_svg(title=COMMAND, unique_id="quickstart"))


if __name__ == "__main__":
    main()
