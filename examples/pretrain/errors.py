"""What a person can mend: a sentence, and exit status 2."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path


class UserError(Exception):
    """Names what is wrong, its value, and what is allowed or what to do."""


def in_sentences(interrupted: str) -> Callable[[Callable[[], int]], Callable[[], int]]:
    """Makes a program's main return 2 after the sentence of a UserError, 130 after ctrl-C and what that left."""

    def decorate(main: Callable[[], int]) -> Callable[[], int]:
        @wraps(main)
        def reporting() -> int:
            try:
                return main()
            except UserError as error:
                print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
                return 2
            except KeyboardInterrupt:
                print(interrupted, file=sys.stderr)
                return 130

        return reporting

    return decorate
