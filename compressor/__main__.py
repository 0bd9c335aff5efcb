"""`python -m compressor` is `compress`."""

import sys
from pathlib import Path

# NOTE: Before anything else is imported: Python puts the present folder first here, and it may hold a downloaded
# `typer.py`. A factory of the user's own is imported from there when it is named (`training/models.py`).
if sys.path[:1] in ([""], [str(Path.cwd())]):
    del sys.path[0]

from compressor.cli import main

main()
