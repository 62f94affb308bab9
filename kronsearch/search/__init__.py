"""Candidates, sensitivity, allocation and the study.

The room has the name of the call that it is for: `kronsearch.search(...)` is `kronsearch.search.run.search(...)`,
whether or not the room has been entered before.
"""

import sys
from types import ModuleType
from typing import Any

__all__: list[str] = []


class _CallableRoom(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from kronsearch.search.run import search

        return search(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableRoom
