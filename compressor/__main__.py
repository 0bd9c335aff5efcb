"""`python -m compressor` is `compress`."""

import os
import sys


def main() -> None:
    """Run the command line; Ctrl-C while it is still being imported ends it without a traceback."""
    try:
        from compressor import cli

        cli.main()
    except KeyboardInterrupt:
        print("compress: stopped", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    # NOTE: Before anything else is imported: Python puts the present folder first here, and it may hold a downloaded
    # `typer.py`. A factory of the user's own is imported from there when it is named (`training/models.py`).
    if sys.path[:1] in ([""], [os.getcwd()]):  # noqa: PTH109
        del sys.path[0]
    main()
