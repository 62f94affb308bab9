"""Images per second of training: a hand-written loop, kronsearch's on the dense network, and on a compressed one.

python throughput.py COMPRESSED WEIGHTS CIFAR10_DIR [STEPS [ROUNDS]]

COMPRESSED is the compressed.safetensors of a run with the model that its plan names; kronsearch's loop runs with
`--compile` as well. All have a teacher (the dense network), the losses, batch size, precision, layout, augmentation,
clipping and schedule of `kronsearch finetune`, and AdamW. They take turns, STEPS steps (10) each, ROUNDS times (9)
after a warm-up of one, and another is first in each round, so that what else the machine does falls on all; ratios are
within a round: quartiles and median.
"""

import copy
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import kronsearch as ks
from kronsearch.models.apply import load_compressed, stored_plan
from kronsearch.training.blocks import block_names
from kronsearch.training.data import endless_train_batches
from kronsearch.training.finetune import Trainer
from kronsearch.training.precision import precision_for
from kronsearch.training.schedule import TrainSettings, learning_rate

SETTINGS = TrainSettings(epochs=100, lr=2e-4)
TOTAL = 100_000


def by_hand(model: nn.Module, teacher: nn.Module, data: ks.Data, blocks: tuple[str, ...]) -> Iterator[None]:
    """Train as a script written for this network and these data would, a step at a time."""
    teacher = teacher.to(memory_format=torch.channels_last).eval()
    model = model.to(memory_format=torch.channels_last).train()
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": SETTINGS.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=SETTINGS.lr,
        fused=True,
    )
    ours: dict[str, torch.Tensor] = {}
    theirs: dict[str, torch.Tensor] = {}
    for network, seen in ((model, ours), (teacher, theirs)):
        for name in blocks:
            network.get_submodule(name).register_forward_hook(lambda _, __, out, n=name, s=seen: s.update({n: out}))
    bf16 = precision_for("cpu") == "bf16"
    heat = SETTINGS.temperature
    batches = endless_train_batches(data, SETTINGS.batch_size, generator=torch.Generator().manual_seed(0))
    for step, (images, _) in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(SETTINGS, step, TOTAL)
        images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            with torch.no_grad():
                goal = teacher(images).float() / heat
            logits = model(images).float() / heat
        loss = heat**2 * F.kl_div(logits.log_softmax(1), goal.log_softmax(1), reduction="batchmean", log_target=True)
        apart = [
            (ours[name] - theirs[name]).square().mean(dtype=torch.float32)
            / theirs[name].square().mean(dtype=torch.float32)
            for name in blocks
        ]
        loss = loss + SETTINGS.feature_weight * torch.stack(apart).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), SETTINGS.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield


def kronsearchs(
    model: nn.Module, teacher: nn.Module, data: ks.Data, blocks: tuple[str, ...], *, compiled: bool = False
) -> Callable[[int], object]:
    settings, generator = replace(SETTINGS, compiled=compiled), torch.Generator().manual_seed(0)
    teacher = copy.deepcopy(teacher)
    return Trainer(model.requires_grad_(), data, settings, teacher=teacher, blocks=blocks, generator=generator).advance


def timed(advance: Callable[[int], object], steps: int) -> float:
    """Return images per second."""
    began = time.perf_counter()
    advance(steps)
    return steps * SETTINGS.batch_size / (time.perf_counter() - began)


def main() -> None:
    file, weights, folder, *rest = sys.argv[1:]
    steps, rounds = int(rest[0]) if rest else 10, int(rest[1]) if rest[1:] else 9
    plan = stored_plan(Path(file))
    dense = ks.load_model(plan.model.spec, weights=weights, args=plan.model.args)
    data = ks.load_data(f"cifar10:{folder}", seed=0)
    blocks = block_names(plan.replaced)
    hand = by_hand(copy.deepcopy(dense), copy.deepcopy(dense), data, blocks)
    runs: dict[str, Callable[[int], object]] = {
        "by hand, dense": lambda n: [next(hand) for _ in range(n)],
    }
    for words, compiled in (("", False), (", compiled", True)):
        small = load_compressed(dense, file, plan)
        runs[f"dense{words}"] = kronsearchs(copy.deepcopy(dense), dense, data, blocks, compiled=compiled)
        runs[f"compressed{words}"] = kronsearchs(small, dense, data, blocks, compiled=compiled)
    for run in runs.values():
        run(steps)
    speeds: dict[str, list[float]] = {name: [] for name in runs}
    order = list(runs)
    for _ in range(rounds):
        for name in order:
            speeds[name].append(timed(runs[name], steps))
        order.append(order.pop(0))
    told: dict[str, object] = {name: round(statistics.median(found), 1) for name, found in speeds.items()}
    for above, below in (
        ("dense", "by hand, dense"),
        ("compressed", "dense"),
        ("dense, compiled", "dense"),
        ("compressed, compiled", "compressed"),
        ("compressed, compiled", "dense, compiled"),
    ):
        ratios = [a / b for a, b in zip(speeds[above], speeds[below], strict=True)]
        told[f"{above} / {below}"] = [round(q, 3) for q in statistics.quantiles(ratios, n=4, method="inclusive")]
    told |= {"steps": steps, "rounds": rounds, "batch": SETTINGS.batch_size, "precision": precision_for("cpu")}
    told |= {"threads": torch.get_num_threads(), "torch": torch.__version__, "model": plan.model.spec}
    print(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
