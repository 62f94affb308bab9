"""Search spaces: which structures may replace a kernel, read from YAML."""

from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from kronsearch.errors import SpaceError
from kronsearch.sekron.shapes import Structure
from kronsearch.yamlfile import read_yaml

__all__ = ["SearchSpace", "load_space"]

_LARGEST_FILE = 2**16
_PACKAGE = Path(__file__).resolve().parent.parent
_FOLDERS = (_PACKAGE / "search_spaces", _PACKAGE.parent / "search_spaces")  # as installed; in a checkout


class SearchSpace(BaseModel):
    """What may replace a kernel; the files in `search_spaces/` explain each field."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    structures: Annotated[tuple[Structure, ...], Field(min_length=1)] = (
        Structure.BOTTLENECK,
        Structure.SPATIAL,
        Structure.MIXING,
        Structure.DEEP,
    )
    deep_fits: Annotated[int, Field(ge=2, le=64)] = 8
    keep_dense: tuple[str, ...] = ()

    @field_validator("structures")
    @classmethod
    def _of_factors(cls, structures: tuple[Structure, ...]) -> tuple[Structure, ...]:
        if Structure.DENSE in structures:
            raise ValueError("layers may always stay dense: leave it out")
        return structures

    def check_names(self, layers: Iterable[str]) -> None:
        """Raise SpaceError if a layer that shall stay dense is none of these."""
        names = list(layers)
        for pattern in self.keep_dense:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise SpaceError(
                    f"the search space keeps {pattern!r} dense, which no layer of the model is called: the names are "
                    "those that `kronsearch profile` shows"
                )

    def reason_to_keep(self, name: str) -> str | None:
        """Return why the space leaves a layer dense, or None."""
        for pattern in self.keep_dense:
            if fnmatchcase(name, pattern):
                return f"the search space keeps {pattern!r} dense"
        return None


def load_space(name: str | Path) -> SearchSpace:
    """Read a search space by the name of one that comes with the package, or from a YAML file.

    Raises:
        SpaceError: there is no such space, or the file is malformed.
    """
    path = _find(name)
    content, _ = read_yaml(path, largest=_LARGEST_FILE, error=SpaceError)
    try:
        return SearchSpace.model_validate({} if content is None else content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise SpaceError(f"the search space {path} is not valid: {where}: {first['msg']}") from error


def _find(name: str | Path) -> Path:
    known = {path.stem: path for folder in _FOLDERS if folder.is_dir() for path in sorted(folder.glob("*.yaml"))}
    if str(name) in known:
        return known[str(name)]
    if Path(name).is_file():
        return Path(name)
    raise SpaceError(f"no search space {str(name)!r}: pass a YAML file or one of {', '.join(sorted(known))}")
