"""Images per second of training: a hand-written loop, kronsearch's on the dense network, and on a compressed one.

python throughput.py COMPRESSED WEIGHTS CIFAR10_DIR [STEPS [ROUNDS]]

COMPRESSED is the compressed.safetensors of a run with the model that its plan names. All three have a teacher (the
dense network), the losses, batch size, precision, layout, augmentation, optimizer, clipping and schedule of
`kronsearch finetune`. They take turns, STEPS steps (10) each, ROUNDS times (9) after a warm-up of one, and another is
first in each round, so that what else the machine does falls on all; ratios are within a round: quartiles and median.
"""

import copy
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
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


def kronsearchs(model: nn.Module, teacher: nn.Module, data: ks.Data, blocks: tuple[str, ...]) -> Trainer:
    return Trainer(model.requires_grad_(), data, SETTINGS, teacher=teacher, blocks=blocks, generator=torch.Generator())


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
        "kronsearch, dense": kronsearchs(copy.deepcopy(dense), dense, data, blocks).advance,
        "kronsearch, compressed": kronsearchs(load_compressed(dense, file, plan), dense, data, blocks).advance,
    }
    for run in runs.values():
        run(steps)
    speeds: dict[str, list[float]] = {name: [] for name in runs}
    order = list(runs)
    for _ in range(rounds):
        for name in order:
            speeds[name].append(timed(runs[name], steps))
        order.append(order.pop(0))
    hand_speed, dense_speed, small_speed = speeds.values()
    told: dict[str, object] = {name: round(statistics.median(found), 1) for name, found in speeds.items()}
    for name, above, below in (
        ("kronsearch / by hand, dense", dense_speed, hand_speed),
        ("compressed / dense, kronsearch", small_speed, dense_speed),
    ):
        ratios = [a / b for a, b in zip(above, below, strict=True)]
        told[name] = [round(q, 3) for q in statistics.quantiles(ratios, n=4, method="inclusive")]
    told |= {"steps": steps, "rounds": rounds, "batch": SETTINGS.batch_size, "precision": precision_for("cpu")}
    told |= {"threads": torch.get_num_threads(), "torch": torch.__version__, "model": plan.model.spec}
    print(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
