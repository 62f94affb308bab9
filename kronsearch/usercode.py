"""Importing what a user names on the command line."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["working_directory_importable"]


@contextmanager
def working_directory_importable() -> Iterator[None]:
    """Let imports find modules in the working directory first, as `python -m` does."""
    here = os.getcwd()  # noqa: PTH109
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)
