"""Test accuracy against wall-clock, from the plan on.

python first_hour.py PLAN WEIGHTS CIFAR10_DIR EPOCHS [EVERY]: applies the plan, trains as `kronsearch finetune` does,
and reads the test split EVERY so many epochs (0.5). The clock stands still while it does, and starts before the plan is
applied. Nothing is chosen by what is read.
"""

import sys
import time

import kronsearch as ks
from kronsearch.finetuning.course import long_settings, new_trainer
from kronsearch.training.data import train_batch_count
from kronsearch.training.evaluate import evaluate, outputs


def main(plan_file: str, weights: str, folder: str, epochs: float, every: float) -> None:
    """Print seconds, epochs, test accuracy and divergence from the dense network."""
    plan = ks.load_plan(plan_file)
    model, data = ks.load_model(plan.model.spec, weights=weights), ks.load_data(f"cifar10:{folder}", seed=0)
    wanted = outputs(model, data, "test")
    spent, began = 0.0, time.monotonic()
    small = ks.apply_plan(model, plan, data).requires_grad_()
    settings = long_settings(data, epochs=epochs)
    portion = max(1, round(every * train_batch_count(data.size("train"), settings.batch_size)))
    with new_trainer(model, small, plan.replaced, data, settings) as trainer:
        print("seconds,epochs,accuracy,divergence")
        while True:
            spent += time.monotonic() - began
            found = evaluate(trainer.result, data, "test", teacher_outputs=wanted)
            done = trainer.step / trainer.total_steps * epochs
            print(f"{spent:.0f},{done:.2f},{found.metric:.4f},{found.divergence:.4f}", flush=True)
            if trainer.step == trainer.total_steps:
                break
            began = time.monotonic()
            trainer.advance(portion)


if __name__ == "__main__":
    main(*sys.argv[1:4], float(sys.argv[4]), float(sys.argv[5]) if sys.argv[5:] else 0.5)
