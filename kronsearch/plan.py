"""The plan: what was done to each layer, and all that is needed to do it again on another checkpoint."""

import hashlib
import json
from math import prod
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_serializer,
    model_serializer,
    model_validator,
)

from kronsearch.errors import PlanError
from kronsearch.files import read_text, write_text
from kronsearch.jsontext import read_json
from kronsearch.sekron.spec import SeKronSpec

__all__ = [
    "SCHEMA_VERSION",
    "Cost",
    "Decomposition",
    "Latency",
    "LayerPlan",
    "ModelIdentity",
    "Plan",
    "PlanBudget",
    "Provenance",
    "Score",
    "fingerprint",
    "holds_weights",
    "load_plan",
    "parse_plan",
    "save_plan",
]

SCHEMA_VERSION = 1
_LARGEST_INPUT = 2**28  # entries
_MOST_IMAGES = 10**7  # that a plan may ask to be calibrated on
_LARGEST_FILE = 64 * 2**20

Count = Annotated[int, Field(ge=0, lt=2**63)]
Extent = Annotated[int, Field(ge=1, lt=2**31)]
Extents = Annotated[tuple[Extent, ...], Field(max_length=16)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ModelIdentity(_Part):
    """The network a plan was made for: its specification, None for a module of the caller's, and its fingerprint."""

    spec: str | None
    args: dict[str, Any] = {}
    fingerprint: str


class PlanBudget(_Part):
    """The budget as the user wrote it, and as numbers."""

    flops: str | None = None
    params: str | None = None
    max_macs: Count | None = None
    max_params: Count | None = None
    latency: str | None = None

    @model_serializer(mode="wrap")
    def _plainly(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return _without_latency(write(self))


class Cost(_Part):
    """MACs of one example and parameters of a whole network, as fvcore counts."""

    macs: Count
    params: Count


class Latency(_Part):
    """What the dense and the compressed network take on one machine: information, that nothing is checked against.

    Times are medians of runs that took turns; the ratio is the median, over pairs of runs, of the compressed network's
    time divided by the dense one's, between its quartiles.
    """

    dense_ms: Annotated[float, Field(gt=0)]
    compressed_ms: Annotated[float, Field(gt=0)]
    ratio: Annotated[float, Field(gt=0)]
    ratio_low: Annotated[float, Field(gt=0)]
    ratio_high: Annotated[float, Field(gt=0)]
    batch: Extent
    threads: Extent
    device: str
    dense_layout: str
    compressed_layout: str


class LayerPlan(_Part):
    """What becomes of a layer: a spec, or dense with the reason why."""

    kernel_shape: Extents
    spec: SeKronSpec | None = None
    dense: str | None = None
    error: Annotated[float, Field(ge=0)] = 0.0
    """Predicted relative squared error of the kernel, in the norm of the decomposition."""

    @field_serializer("spec")
    def _plainly(self, spec: SeKronSpec | None) -> dict[str, object] | None:
        """Leave out a coupling as a tree and the default run, which are what a plan means that says nothing."""
        if spec is None:
            return None
        told: dict[str, object] = {"factor_shapes": spec.factor_shapes, "ranks": spec.ranks}
        told |= {"coupling": spec.coupling} if spec.coupling == "chain" else {}
        return told | ({"run": spec.run} if spec.run else {})

    @model_validator(mode="after")
    def _one_of_both(self) -> "LayerPlan":
        if (self.spec is None) == (self.dense is None):
            raise ValueError("a layer has either a spec or the reason why it stays dense")
        if self.spec is not None:
            self.spec.check_kernel(self.kernel_shape)
            most = 64 * prod(self.kernel_shape)
            if max(self.spec.params, *map(self.spec.merged_params, self.spec.order)) > most:
                raise ValueError(f"the factors of {self.spec} have more than {most} entries, 64 times the kernel's")
        return self


class Decomposition(_Part):
    """How kernels become factors.

    `calibration_images` > 0 means data-aware; `batchnorm_images` is how many training images the statistics of batch
    norms are re-estimated on; `sequential_images` > 0 on how many each layer is fitted in the network that those before
    it have become, which gives batch norms theirs; `seed` chooses all.
    """

    calibration_images: Annotated[int, Field(ge=0, le=_MOST_IMAGES)] = 0
    batchnorm_images: Annotated[int, Field(ge=0, le=_MOST_IMAGES)] = 0
    sequential_images: Annotated[int, Field(ge=0, le=_MOST_IMAGES)] = 0
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] = 0

    @model_serializer(mode="wrap")
    def _plainly(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out what plans from before it was there do without: they are written as they were."""
        return {name: value for name, value in write(self).items() if name != "sequential_images" or value > 0}


class Score(_Part):
    """The score by which the plan was chosen, on the validation split after a short fine-tune."""

    metric: str
    value: float
    examples: Count


class Provenance(_Part):
    """Where a plan comes from."""

    versions: dict[str, str]
    seed: int
    study: str | None = None
    trial: Count | None = None
    gap: float | None = None
    """The proven relative gap of the trial's allocation to the least weighed error under the budget."""


class Plan(_Part):
    """A compression plan; `layers` is in the order in which the network runs them."""

    schema_version: int = SCHEMA_VERSION
    model: ModelIdentity
    input_shape: Extents
    budget: PlanBudget
    dense: Cost
    compressed: Cost
    layers: dict[str, LayerPlan]
    decomposition: Decomposition
    predicted_error: float
    score: Score | None = None
    provenance: Provenance
    latency: Latency | None = None

    @model_serializer(mode="wrap")
    def _plainly(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return _without_latency(write(self))

    @model_validator(mode="after")
    def _has_a_sane_input(self) -> "Plan":
        if prod(self.input_shape) > _LARGEST_INPUT:
            raise ValueError(f"an input of shape {self.input_shape} is larger than any example")
        return self

    @model_validator(mode="after")
    def _fits_its_fingerprint(self) -> "Plan":
        if self.model.fingerprint != fingerprint(self.layers):
            raise ValueError("the fingerprint is not the one of the layers that the plan replaces")
        return self

    @property
    def replaced(self) -> dict[str, SeKronSpec]:
        """The spec of each layer that is not left dense."""
        return {name: layer.spec for name, layer in self.layers.items() if layer.spec is not None}


def _without_latency(written: dict[str, Any]) -> dict[str, Any]:
    """Leave the latency out where there is none: plans from before there was any are written as they were."""
    return {name: value for name, value in written.items() if name != "latency" or value is not None}


def fingerprint(layers: dict[str, LayerPlan]) -> str:
    """Return a digest of the names and kernel shapes of the layers that a plan replaces.

    Layers that stay dense are left out: another head on the same body is no mismatch.
    """
    replaced = sorted((name, list(layer.kernel_shape)) for name, layer in layers.items() if layer.spec is not None)
    return hashlib.sha256(json.dumps(replaced).encode()).hexdigest()


def save_plan(plan: Plan, path: str | Path) -> None:
    """Write a plan as JSON, all of it or nothing; equal plans give equal bytes."""
    write_text(Path(path), plan.model_dump_json(indent=2) + "\n")


def holds_weights(path: Path) -> bool:
    """Tell by its name whether a file is one of weights, which of a compressed network has the plan in its metadata."""
    return path.suffix == ".safetensors"


def load_plan(path: str | Path) -> Plan:
    """Read and check a plan.

    Raises:
        PlanError: the file is missing, not a plan, of another schema, or contradicts itself.
    """
    path = Path(path)
    try:
        text = read_text(path, _LARGEST_FILE)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        raise PlanError(
            f"can't read the plan {path} ({reason}): pass the plan.json that `kronsearch run` wrote"
        ) from error
    if text is None:
        raise PlanError(f"{path} is larger than any plan ({_LARGEST_FILE >> 20} MiB): pass a plan.json")
    return parse_plan(text, origin=str(path))


def parse_plan(text: str, *, origin: str) -> Plan:
    """Check the JSON text of a plan; `origin` is what errors call it.

    Raises:
        PlanError: it is not a plan, of another schema, or contradicts itself.
    """
    try:
        content = read_json(text)
    except (ValueError, RecursionError) as error:
        raise PlanError(f"{origin} is not JSON ({error}): pass the plan.json that `kronsearch run` wrote") from error
    version = content.get("schema_version") if isinstance(content, dict) else None
    if type(version) is not int:
        raise PlanError(f"{origin} is not a plan: it has no schema_version that is a whole number")
    if version != SCHEMA_VERSION:
        raise PlanError(
            f"{origin} has schema_version {version!r}, this version of kronsearch reads {SCHEMA_VERSION}: "
            "use the version that wrote it, or search anew"
        )
    try:
        return Plan.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the plan"
        raise PlanError(f"{origin} is not a valid plan: {where}: {first['msg']}") from error
