"""What a fine-tune leaves on disk to go on from, and the log that people read."""

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError
from torch import Tensor

from kronsearch.errors import CheckpointError, TrainingError, differences
from kronsearch.files import write_text
from kronsearch.models.checkpoint import load_state_dict, read_metadata, save_safetensors
from kronsearch.training.evaluate import Evaluation

__all__ = ["Record", "Row", "read_record", "save_log", "save_record"]

_FORMAT = "kronsearch-finetune"
_VERSION = 2

Count = Annotated[int, Field(ge=0, lt=2**63)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Row(_Part):
    """An evaluation on the validation split: the mean loss since the one before, and what came of it."""

    step: Count
    epoch: float
    loss: float
    lr: float
    metric: float
    error: float
    divergence: float | None
    images_per_second: float
    seconds: float
    kept: bool

    @property
    def evaluation(self) -> Evaluation:
        """The evaluation as such; the loss there is of no use here."""
        return Evaluation(self.metric, 0.0, self.divergence, 0, self.error)


class Record(_Part):
    """Where a fine-tune stands, besides its tensors.

    Attributes:
        identity: what must not differ when it is resumed.
        log: the evaluations so far.
        seconds: spent so far.
        losses: sum of the losses since the last evaluation, and of how many steps.
    """

    version: int = _VERSION
    identity: dict[str, JsonValue]
    log: tuple[Row, ...] = ()
    seconds: float = 0.0
    losses: tuple[float, Count] = (0.0, 0)

    @property
    def begun(self) -> bool:
        """Whether there was a step."""
        return bool(self.log) or self.losses[1] > 0

    @property
    def kept(self) -> Row | None:
        """The row of the network that is kept."""
        return next((row for row in reversed(self.log) if row.kept), None)

    def check(self, identity: Mapping[str, JsonValue], path: Path) -> None:
        """Raise TrainingError, which names what differs, unless it is of this identity."""
        if told := differences(self.identity, identity):
            raise TrainingError(
                f"the fine-tune in {path.parent} was begun with other settings ({told}): repeat them to resume it, or "
                "pass another --out"
            )


def save_record(record: Record, state: Mapping[str, Tensor], path: Path) -> None:
    """Write a record and the tensors of its training, all of it or nothing."""
    save_safetensors(state, path, {"format": _FORMAT, "record": record.model_dump_json()})


def read_record(path: Path) -> tuple[Record, dict[str, Tensor]] | None:
    """Return what `save_record` wrote, None if there is no such file.

    Raises:
        CheckpointError: it is of another kind or version, or malformed.
    """
    if not path.exists():
        return None
    metadata = read_metadata(path)
    try:
        if metadata.get("format") != _FORMAT:
            raise CheckpointError(f"{path} is not the checkpoint of a fine-tune: pass another --out")
        record = Record.model_validate_json(metadata.get("record", ""))
    except ValidationError as error:
        raise CheckpointError(f"{path} is not a valid checkpoint of a fine-tune: pass another --out") from error
    if record.version != _VERSION:
        raise CheckpointError(
            f"{path} has version {record.version}, this kronsearch reads {_VERSION}: resume it with the one that wrote "
            "it, or pass another --out"
        )
    return record, load_state_dict(path)


def save_log(record: Record, metric: str, path: Path) -> None:
    """Write the evaluations as CSV, a row for each, all of them or nothing."""
    text = io.StringIO()
    names = [name if name != "metric" else metric for name in Row.model_fields]
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    writer.writerows(row.model_dump().values() for row in record.log)
    write_text(path, text.getvalue())
