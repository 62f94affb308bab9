"""The plain allocation's plan, decomposed in two ways, on the test split and without any fine-tune.

    python results/sequential/compare.py MODEL WEIGHTS CIFAR10_DIR CACHE BUDGET...

BUDGET is such as flops=33% or params=20%. Each layer by itself with batch norms re-estimated, as trials are measured;
and one after the other, as `apply` does it. Divergence is at a temperature of 4; seconds are the process's.
"""

import sys
import time

import torch

import kronsearch as ks
from kronsearch.models.apply import decomposed
from kronsearch.search.decode import Problem, Weighing
from kronsearch.search.pace import specs_of
from kronsearch.search.subject import Subject
from kronsearch.training.evaluate import evaluate, outputs


def main(spec: str, weights: str, folder: str, cache: str, budgets: list[str]) -> None:
    torch.set_num_threads(1)
    data = ks.load_data(f"cifar10:{folder}", seed=0)
    subject = Subject(ks.load_model(spec, weights=weights), data, cache=cache)
    prepared = subject.prepared()
    candidates, sensitivity = subject.tables(prepared)
    wanted = outputs(subject.dense, data, "test")
    alone = subject.settings.model_copy(update={"sequential_images": 0})
    for told in budgets:
        budget = ks.Budget(**dict([told.split("=")]))
        limits = budget.limits(dense_macs=subject.cost.macs, dense_params=subject.cost.params)
        problem = Problem(subject.cost, limits, candidates, sensitivity)
        specs = specs_of(candidates, problem.allocate(Weighing()))
        for words, settings in (("each by itself", alone), ("one after the other", subject.settings)):
            began = time.process_time()
            small = decomposed(
                subject.dense,
                specs,
                subject.cost,
                prepared.metrics,
                data,
                settings,
                device="cpu",
                tell=lambda *_: None,
            )
            took = time.process_time() - began
            found = evaluate(small.eval(), data, "test", teacher_outputs=wanted, temperature=4.0)
            print(f"{told}, {words}: accuracy {found.metric:.2%}, divergence {found.divergence:.4f}, {took:.0f} s")


if __name__ == "__main__":
    main(*sys.argv[1:5], sys.argv[5:])
