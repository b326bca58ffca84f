"""The command line: `modelopt COMMAND`, one file for each command. Importing it loads neither torch nor transformers.

Exit codes: 0 done; 2 bad input, with one line that says what to change; 1 failure; 130 interrupted.
"""

from __future__ import annotations

import signal
import sys
from types import FrameType

from modelopt.core.errors import ExportError, ModelOptError

BAD_INPUT = 2
FAILURE = 1


def exit_code(error: Exception) -> int:
    """Return 2 for what the user can correct, 1 for a failure on the way (a full disk, a file that may not be read)."""
    if isinstance(error, OSError) or (isinstance(error, ExportError) and isinstance(error.__cause__, OSError)):
        return FAILURE
    return BAD_INPUT


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and leave with its exit code. `--debug`, anywhere, shows the traceback of an error.

    >>> main(["formats"])                                                            # doctest: +SKIP
    """
    from modelopt.cli.app import app
    from modelopt.cli.console import print_error, quiet

    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    previous = signal.signal(signal.SIGTERM, _interrupt)  # so that a terminated export cleans up as an interrupted one does
    try:
        with quiet(debug):
            app(args=[a for a in given if a != "--debug"], prog_name="modelopt")
    except (ModelOptError, OSError) as error:
        if debug:
            raise
        print_error(error)
        sys.exit(exit_code(error))
    finally:
        signal.signal(signal.SIGTERM, previous)
