"""What a person can mend: a sentence, and exit status 2."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path


class UserError(Exception):
    """Names what is wrong, its value, and what is allowed or what to do."""


def exit_status(main: Callable[[], int], interrupted: str) -> int:
    """What `main` returns; 2 after the sentence of a UserError, 130 after ctrl-C and what it left behind."""
    try:
        return main()
    except UserError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130
