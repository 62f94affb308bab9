"""Which measure of a plan, before and after a short fine-tune, orders plans as the test split does.

python measures.py STUDY MODEL WEIGHTS CIFAR10_DIR OUT.csv
    STUDY is the study.db of `kronsearch run`, or of an arm of ../search-ablation
python measures.py --table OUT.csv …
    the correlations of one or more of these

Every plan of the study is built, and measured on 2,500 validation images; fine-tuned on 24,000 images, and measured
again; the test split is read each time. Measures are the divergence from the dense network's outputs at a temperature
of 1 and of 4 and the squared distance of the outputs, of clean images, augmented ones, and the means of two images.
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import optuna
import pandas as pd
import torch
from torch import Tensor, nn

import kronsearch as ks
from kronsearch.plan import parse_plan
from kronsearch.search.score import Scorer
from kronsearch.search.subject import Subject
from kronsearch.sekron.convolution import kernels_formed
from kronsearch.training.blocks import block_names
from kronsearch.training.distillation import softened_divergence
from kronsearch.training.finetune import finetune
from kronsearch.training.precision import KERNELS, eval_mode, forward, precision_for
from kronsearch.training.schedule import TrainSettings, default_rate, total_steps
from kronsearch.training.streams import Purpose, stream

IMAGES, TUNED_ON = 2_500, 24_000
PRECISION = precision_for("cpu")


def logits(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad(), eval_mode(model), kernels_formed(model, KERNELS[PRECISION]):
        return torch.cat([forward(model, part, PRECISION) for part in images.split(250)])


def image_sets(data: ks.Data) -> dict[str, Tensor]:
    """Return the images that networks are measured on."""
    generator = torch.Generator().manual_seed(5)
    raw, labels = data._splits["val"]
    chosen = raw[torch.randperm(len(labels), generator=generator)[:IMAGES]]
    clean = data._normalise(chosen)
    augmented = data._normalise(data._augment(chosen, generator))
    others = clean[torch.randperm(IMAGES, generator=generator)]
    return {
        "clean": clean,
        "augmented": augmented,
        "mixed": torch.lerp(others, clean, 0.5),
        "test": data._normalise(data._splits["test"][0]),
    }


def measure(path: str, spec: str, weights: str, folder: str, out: str) -> None:
    data, model = ks.load_data(f"cifar10:{folder}", seed=0), ks.load_model(spec, weights=weights)
    subject = Subject(model, data, seed=0)
    scorer = Scorer(subject.dense, data, subject.prepared().metrics, subject.settings, "cpu")
    [name] = [n for n in optuna.get_all_study_names(f"sqlite:///{path}") if not n.endswith("finals")]
    study = optuna.load_study(study_name=name, storage=f"sqlite:///{path}")
    plans = {t.user_attrs["digest"]: t.user_attrs["plan"] for t in study.trials if "plan" in t.user_attrs}
    sets = image_sets(data)
    wanted = {kind: logits(subject.dense, images) for kind, images in sets.items()}
    test_labels = data._splits["test"][1]
    settings = TrainSettings(epochs=TUNED_ON / data.size("train"))
    settings = replace(settings, lr=default_rate(total_steps(settings, data.size("train"))))

    def told(small: nn.Module, when: str) -> dict[str, float]:
        found = {}
        for kind, images in sets.items():
            own = logits(small, images)
            for temperature in (1, 4):
                apart = softened_divergence(own, wanted[kind], data.task, temperature)
                found[f"{when}/{kind}/T{temperature}"] = apart.item()
            centred = [each - each.mean(1, keepdim=True) for each in (own, wanted[kind])]
            found[f"{when}/{kind}/squared"] = (centred[0] - centred[1]).square().sum(1).mean().item()
            if kind == "test":
                found[f"{when}/test/error"] = (own.argmax(1) != test_labels).float().mean().item()
        return found

    rows = []
    for digest, content in plans.items():
        plan = parse_plan(content, origin=digest)
        small = scorer.build(plan.replaced)
        row = {"digest": digest, "predicted": plan.predicted_error} | told(small, "before")
        blocks = block_names(plan.replaced)
        finetune(small, data, settings, teacher=subject.dense, blocks=blocks, generator=stream(0, Purpose.PROXY))
        rows.append(row | told(small, "after"))
        pd.DataFrame(rows).to_csv(out, index=False)
        print(len(rows), len(plans), digest, flush=True)


def table(paths: list[str]) -> None:
    """Print, for each measure, how it and the divergence on the test split after the fine-tune go together."""
    print(
        "| measure | "
        + " | ".join(f"{Path(path).stem}: Spearman, Pearson of logarithms, slope" for path in paths)
        + " |"
    )
    print("|---" * (len(paths) + 1) + "|")
    found = [pd.read_csv(path) for path in paths]
    for column in found[0].columns[1:]:
        if "test" in column:
            continue
        cells = []
        for each in found:
            x, y = np.log(each[column]), np.log(each["after/test/T1"])
            cells.append(f"{x.corr(y, method='spearman'):.2f}, {x.corr(y):.2f}, {np.polyfit(x, y, 1)[0]:.2f}")
        print(f"| {column} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    torch.set_num_threads(1)
    table(sys.argv[2:]) if sys.argv[1] == "--table" else measure(*sys.argv[1:])
