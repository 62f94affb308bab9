"""`kronsearch finetune` with a teacher whose outputs are the mean of those for an image and for its mirror image.

python mirrored.py COMPRESSED WEIGHTS CIFAR10_DIR EPOCHS OUT [cuda|cpu]: of the blocks, those for the image itself are
learnt. The rest is as of `kronsearch finetune --val-fraction 0.01 --lr 3e-3 --label-weight 0.5 --compile`.
"""

import sys
from collections.abc import Mapping

from torch import Tensor

import kronsearch as ks
from kronsearch.models.apply import stored_plan
from kronsearch.training import finetune as training
from kronsearch.training.teacher import Teacher


class Mirrored(Teacher):
    """A teacher that sees each image twice."""

    def __call__(self, inputs: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return the mean of the outputs, and those of the blocks for the images as they are."""
        others, _ = super().__call__(inputs.flip(-1))
        outputs, blocks = super().__call__(inputs)
        return (outputs + others) / 2, blocks


def main(start: str, weights: str, folder: str, epochs: str, out: str, device: str = "cuda") -> None:
    """Fine-tune and tell what came of it."""
    training.Teacher = Mirrored
    model = ks.load_model(stored_plan(start).model.spec, weights=weights)
    data = ks.load_data(f"cifar10:{folder}", seed=0, val_fraction=0.01)
    found = ks.finetune(
        model, start, data, epochs=float(epochs), lr=3e-3, label_weight=0.5, compiled=True, out=out, device=device
    )
    print(f"test: dense {found.dense.metric:.2%}, compressed {found.compressed.metric:.2%}")


if __name__ == "__main__":
    main(*sys.argv[1:])
