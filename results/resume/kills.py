"""Kill a search with `kill -9` at random moments, resume it each time, and compare it with one that was left alone.

python kills.py FOLDER KILLS TRIALS SECONDS: each run is killed after up to so many seconds.
"""

import random
import subprocess
import sys
from pathlib import Path

import optuna
import pandas as pd

PROGRAM = (sys.executable, "-c", "from kronsearch.cli import main; main()")
LINE = "run --model zoo:digits --data digits --budget-flops 50% --space space.yaml --final-epochs 0.5 --quiet"


def main(folder: Path, kills: int, trials: int, seconds: float) -> None:
    folder.mkdir(parents=True)
    (folder / "space.yaml").write_text("structures: [bottleneck, spatial]\n")
    line = (*PROGRAM, *LINE.split(), "--trials", str(trials))
    subprocess.run((*line, "--out", "whole"), cwd=folder, check=True)
    moments, killed = random.Random(0), 0
    while killed < kills:
        process = subprocess.Popen((*line, "--out", "killed"), cwd=folder)
        try:
            process.wait(timeout=moments.uniform(0, seconds))
            break  # it came to its end
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            killed += 1
    subprocess.run((*line, "--out", "killed"), cwd=folder, check=True)

    study = optuna.load_study(study_name="kronsearch", storage=f"sqlite:///{folder / 'killed' / 'study.db'}")
    states = pd.Series([trial.state.name for trial in study.get_trials()]).value_counts()
    print(f"{killed} kills, then {', '.join(f'{count} {state}' for state, count in states.items())}")
    whole, after = (table(folder / name) for name in ("whole", "killed"))
    print("tables of finished trials equal:", whole.equals(after), f"({len(whole)} rows, {len(whole.columns)} columns)")
    networks = [(folder / name / "compressed.safetensors").read_bytes() for name in ("whole", "killed")]
    print("final networks equal, but for the trial's number:", weights(networks[0]) == weights(networks[1]))


def table(out: Path) -> pd.DataFrame:
    """Return the finished trials without their numbers and times."""
    return pd.read_csv(out / "trials.csv").drop(columns=["trial", "seconds"])


def weights(safetensors: bytes) -> bytes:
    """Return the tensors of a file without its header, which holds the plan."""
    return safetensors[8 + int.from_bytes(safetensors[:8], "little") :]


if __name__ == "__main__":
    main(Path(sys.argv[1]), *(int(number) for number in sys.argv[2:]))
