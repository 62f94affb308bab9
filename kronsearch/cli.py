"""The command line: its options, and what becomes of errors.

Results go to stdout, everything else to stderr. Exit codes: 0; 2 for what a user can put right, in one line; 130 when
interrupted; 1 for a fault of the program.
"""

import os
import sys
import traceback
from collections.abc import Callable
from functools import partial
from io import BufferedWriter, TextIOWrapper
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from kronsearch import commands
from kronsearch.config import Settings, resolve
from kronsearch.errors import FileError, KronsearchError
from kronsearch.files import Results
from kronsearch.tables import one_line

__all__ = ["app", "main"]

app = typer.Typer(
    help="Smaller networks by a search over Kronecker factorizations (SeKron) within FLOPs, params or latency.",
    epilog="Options may also stand in a kronsearch.yaml in the working directory.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

_RESUMED = {
    commands.run: ": the same line again resumes the study",
    commands.finetune: ": the same line again resumes the fine-tune",
}

Words = str | None
PlanFile = Annotated[Path, typer.Argument(metavar="PLAN", help="A plan.json that `kronsearch run` wrote")]
ModelSpec = Annotated[
    Words, typer.Option("--model", metavar="SPEC", help="zoo:NAME, torchvision:NAME, timm:NAME or MODULE:CALLABLE")
]
ModelArgs = Annotated[
    Words, typer.Option("--model-args", metavar="JSON", help="A JSON object: keyword arguments for the model")
]
Weights = Annotated[
    Words, typer.Option("--weights", metavar="FILE", help="A checkpoint, or a name such as DEFAULT to download")
]
DataSpec = Annotated[
    Words, typer.Option("--data", metavar="SPEC", help="digits, cifar10:DIR, imagefolder:DIR or MODULE:CALLABLE")
]
InputShape = Annotated[
    Words, typer.Option("--input-shape", metavar="3,224,224", help="Sizes of one example, if there are no data")
]
Space = Annotated[Words, typer.Option("--space", metavar="NAME|FILE", help="Search space [default: default]")]
Sensitivity = Annotated[
    Words,
    typer.Option(
        "--sensitivity", metavar="NAME", help="measured, fisher, inputs, absolute or plain [default: measured]"
    ),
]
Out = Annotated[Words, typer.Option("--out", metavar="DIR", help="Folder for the results [default: kronsearch-out]")]
Cache = Annotated[
    Words, typer.Option("--cache", metavar="DIR", help="Statistics and error tables to share [default: OUT/cache]")
]
Device = Annotated[Words, typer.Option("--device", metavar="cpu|cuda", help="Where to compute [default: cpu]")]
Seed = Annotated[int | None, typer.Option("--seed", help="Seed of all that is random [default: 0]")]
ValFraction = Annotated[
    float | None,
    typer.Option("--val-fraction", help="Part of the training set that is held out to validate [default: 0.1]"),
]
LatencyBatch = Annotated[
    int | None, typer.Option("--latency-batch", help="Examples in a run where latency is measured [default: 1]")
]
LatencyThreads = Annotated[
    int | None, typer.Option("--latency-threads", help="Threads of torch where latency is measured [default: 1]")
]
AllowSlower = Annotated[
    bool, typer.Option("--allow-slower", help="Let layers become slower than they are, and measure no latency for that")
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Show no progress")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error, and the study's log")]


@app.command("run")
def run(
    model: ModelSpec = None,
    model_args: ModelArgs = None,
    weights: Weights = None,
    data: DataSpec = None,
    input_shape: InputShape = None,
    budget_flops: Annotated[
        Words, typer.Option("--budget-flops", metavar="1G|50%", help="Bound on the MACs of one example")
    ] = None,
    budget_params: Annotated[
        Words, typer.Option("--budget-params", metavar="90k|20%", help="Bound on the number of parameters")
    ] = None,
    budget_latency: Annotated[
        Words, typer.Option("--budget-latency", metavar="5ms|70%", help="Bound on the time that the network takes here")
    ] = None,
    latency_batch: LatencyBatch = None,
    latency_threads: LatencyThreads = None,
    allow_slower: AllowSlower = False,
    space: Space = None,
    decoder: Annotated[
        Words,
        typer.Option("--decoder", metavar="NAME", help="What trials decide: allocate or direct [default: allocate]"),
    ] = None,
    sampler: Annotated[
        Words,
        typer.Option("--sampler", metavar="NAME", help="What proposes it: gp, tpe, cmaes or random [default: gp]"),
    ] = None,
    sensitivity: Sensitivity = None,
    objective: Annotated[
        Words,
        typer.Option(
            "--objective",
            metavar="NAME",
            help="score, or pareto: score against cost between two budgets [default: score]",
        ),
    ] = None,
    trials: Annotated[int | None, typer.Option("--trials", help="Trials of the study [default: 20]")] = None,
    timeout: Annotated[Words, typer.Option("--timeout", metavar="30m", help="Begin no trial after this time")] = None,
    storage: Annotated[
        Words, typer.Option("--storage", metavar="URL", help="Storage of the study [default: sqlite:///OUT/study.db]")
    ] = None,
    study: Annotated[Words, typer.Option("--study", metavar="NAME", help="Name of the study in the storage")] = None,
    out: Out = None,
    cache: Cache = None,
    device: Device = None,
    seed: Seed = None,
    final_epochs: Annotated[
        float | None, typer.Option("--final-epochs", help="Epochs of fine-tuning at the end [default: 10]")
    ] = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Search for the best plan under a budget; the same line again resumes."""
    _execute(commands.run, **locals())


@app.command("sweep")
def sweep(
    model: ModelSpec = None,
    model_args: ModelArgs = None,
    weights: Weights = None,
    data: DataSpec = None,
    input_shape: InputShape = None,
    budget_flops: Annotated[
        Words, typer.Option("--budget-flops", metavar="25%:90%:20", help="FROM:TO:HOW MANY, or 30%,50%, or one bound")
    ] = None,
    budget_params: Annotated[
        Words,
        typer.Option("--budget-params", metavar="25%:90%:20", help="Likewise; one of the budgets has several values"),
    ] = None,
    budget_latency: Annotated[
        Words,
        typer.Option("--budget-latency", metavar="4ms:8ms:5", help="Likewise, of the time that the network takes here"),
    ] = None,
    latency_batch: LatencyBatch = None,
    latency_threads: LatencyThreads = None,
    allow_slower: AllowSlower = False,
    space: Space = None,
    sensitivity: Sensitivity = None,
    out: Out = None,
    cache: Cache = None,
    device: Device = None,
    seed: Seed = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Allocate many budgets at once, without any training: the front of cost and predicted error."""
    _execute(commands.sweep, **locals())


@app.command("profile")
def profile(
    model: ModelSpec = None,
    model_args: ModelArgs = None,
    weights: Weights = None,
    data: DataSpec = None,
    input_shape: InputShape = None,
    space: Space = None,
    debug: Debug = False,
) -> None:
    """Show what each layer costs, which can be replaced, and the smallest reachable cost."""
    _execute(commands.profile, **locals())


@app.command("show")
def show(plan: PlanFile, debug: Debug = False) -> None:
    """Show a plan."""
    _execute(lambda _: commands.show(plan), debug=debug)


@app.command("apply")
def apply(
    plan: PlanFile,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The compressed checkpoint (safetensors)")],
    model: ModelSpec = None,
    model_args: ModelArgs = None,
    weights: Weights = None,
    data: DataSpec = None,
    device: Device = None,
    seed: Seed = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Apply a plan to a checkpoint of the same network."""
    options = {name: value for name, value in locals().items() if name not in ("plan", "out")}
    _execute(partial(commands.apply, plan, out), **options)


@app.command("finetune")
def finetune(
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan to apply, or a compressed.safetensors")],
    model: ModelSpec = None,
    model_args: ModelArgs = None,
    weights: Weights = None,
    data: DataSpec = None,
    epochs: Annotated[float | None, typer.Option("--epochs", help="How long; fractions too [default: 10]")] = None,
    lr: Annotated[
        float | None, typer.Option("--lr", help="Highest learning rate [default: what suits the number of steps]")
    ] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", help="Examples in a step [default: 128]")] = None,
    label_weight: Annotated[
        float | None, typer.Option("--label-weight", help="Part of the loss that the labels are [default: 0]")
    ] = None,
    val_fraction: ValFraction = None,
    compile: Annotated[  # noqa: A002 -- it is the option's name
        bool, typer.Option("--compile", help="Run through torch.compile: faster after a minute, needs a compiler")
    ] = False,
    out: Annotated[
        Words, typer.Option("--out", metavar="DIR", help="Folder for the results [default: kronsearch-finetuned]")
    ] = None,
    device: Device = None,
    seed: Seed = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Fine-tune a compressed network, the dense one as its teacher; the same line again resumes."""
    options = {name: value for name, value in locals().items() if name != "plan"}
    _execute(partial(commands.finetune, plan), **options)


@app.command("evaluate")
def evaluate(
    plan: Annotated[
        Path | None, typer.Argument(metavar="PLAN", help="A plan to apply to the weights, or a compressed.safetensors")
    ] = None,
    model: ModelSpec = None,
    model_args: ModelArgs = None,
    weights: Weights = None,
    data: DataSpec = None,
    split: Annotated[Words, typer.Option("--split", metavar="test|val", help="Split [default: test]")] = None,
    val_fraction: ValFraction = None,
    device: Device = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Evaluate a dense checkpoint, a plan applied to one, or a compressed checkpoint."""
    options = {name: value for name, value in locals().items() if name != "plan"}
    _execute(partial(commands.evaluate, plan), **options)


@app.command("bench")
def bench(
    plan: Annotated[
        Path | None, typer.Argument(metavar="PLAN", help="A plan to apply, or a compressed.safetensors")
    ] = None,
    model: ModelSpec = None,
    model_args: ModelArgs = None,
    weights: Weights = None,
    batch: Annotated[Words, typer.Option("--batch", metavar="1,8", help="Examples in a run [default: 1]")] = None,
    threads: Annotated[
        Words, typer.Option("--threads", metavar="1,2", help="Threads of torch [default: as it is set]")
    ] = None,
    seconds: Annotated[
        float | None, typer.Option("--seconds", help="How long to time, for each batch and thread [default: 5]")
    ] = None,
    csv: Annotated[Path | None, typer.Option("--csv", metavar="FILE", help="Write the timings there, too")] = None,
    device: Device = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Time the dense network against a compressed one on this machine, whole and by replaced layer."""
    options = {name: value for name, value in locals().items() if name not in ("plan", "csv")}
    _execute(partial(commands.bench, plan, csv), **options)


def main() -> None:
    """Run the command line, the entry point of the console script `kronsearch`."""
    _keep_stdout_for_results()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that has no ⊗ shows a ?
    try:
        app()
    except FileError as error:  # a help that can't be written
        typer.echo(one_line(f"error: {error}"), err=True)
        sys.exit(2)


def _keep_stdout_for_results() -> None:
    """Send to stderr what libraries in C print on the process's stdout, such as lines that HiGHS has forgotten."""
    stdout = sys.stdout
    try:
        number = stdout.fileno()
    except (AttributeError, OSError):  # closed, or not a file
        return
    if isinstance(stdout, TextIOWrapper) and sys.stderr is not None:
        stdout.flush()
        kept = BufferedWriter(Results(os.dup(number), "w"))
        sys.stdout = TextIOWrapper(kept, encoding=stdout.encoding, line_buffering=stdout.line_buffering)
        os.dup2(2, number)


def _execute(command: Callable[[Settings], None], **given: object) -> None:
    """Run a command with its settings; errors become one line on stderr and an exit code."""
    debug = bool(given.get("debug"))
    try:
        settings = resolve({name: None if value is False else value for name, value in given.items()})
        debug = settings.debug
        command(settings)
        if sys.stdout is not None:
            sys.stdout.flush()  # what can't be written is told here, else Python would tell it in its own words
    except KronsearchError as error:
        _fail(f"error: {error}", 2, debug=debug)
    except KeyboardInterrupt:
        _fail(f"interrupted{_RESUMED.get(getattr(command, 'func', command), '')}", 130)
    except BrokenPipeError:
        raise  # whoever read the results has seen enough; Typer ends quietly
    except Exception as error:
        hint = "" if debug else " (run again with --debug for the traceback)"
        _fail(f"error: {type(error).__name__}: {error}{hint}", 1, debug=debug)


def _fail(message: str, code: int, *, debug: bool = False) -> NoReturn:
    if debug:
        traceback.print_exc()
    typer.echo(one_line(message), err=True)
    raise typer.Exit(code)
