import copy
import csv
import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import kronsearch as ks
from kronsearch.errors import CheckpointError, DataError, TrainingError
from kronsearch.files import alone
from kronsearch.finetuning import course, loop
from kronsearch.finetuning.course import long_settings
from kronsearch.models.apply import apply_plan, load_compressed, save_compressed
from kronsearch.models.checkpoint import load_state_dict, read_metadata, save_safetensors
from kronsearch.training.evaluate import evaluate, outputs
from kronsearch.training.schedule import default_rate


class Stopped(Exception):  # noqa: N818
    pass


def stopping_at(step):
    def watch(progress):
        if progress.phase == "finetune" and progress.done >= step:
            raise Stopped("by the test")

    return watch


@pytest.fixture(scope="module")
def begin(model, plan, data):
    def begin(out, **options):
        return ks.finetune(model, plan, data, **{"epochs": 2.5, "batch_size": 10, "lr": 0.002, "out": out} | options)

    return begin


@pytest.fixture(scope="module")
def whole(begin, tmp_path_factory):
    """A fine-tune of 15 steps, 6 of them an epoch."""
    return begin(tmp_path_factory.mktemp("whole"))


def rows(folder):
    with (folder / "log.csv").open() as file:
        return list(csv.DictReader(file))


def test_it_logs_each_epoch_and_keeps_the_best(whole, model, plan, data):
    log = rows(whole.out)
    assert [(row["step"], row["epoch"]) for row in log] == [("6", "1.0"), ("12", "2.0"), ("15", "2.5")]
    assert list(log[0]) == [
        *("step", "epoch", "loss", "lr", "accuracy", "error", "divergence", "images_per_second", "seconds", "kept"),
    ]
    assert not whole.was_done
    [*_, kept] = [row for row in log if row["kept"] == "True"]
    assert read_metadata(whole.out / "compressed.safetensors")["epochs"] == kept["epoch"]
    saved = load_compressed(model, whole.out / "compressed.safetensors")
    assert evaluate(saved, data, "test") == whole.compressed
    assert all(torch.equal(tensor, saved.state_dict()[name]) for name, tensor in whole.model.state_dict().items())
    assert whole.dense == evaluate(model, data, "test")
    assert whole.plan.compressed.params < whole.plan.dense.params == sum(p.numel() for p in model.parameters())
    assert list(whole.log["step"]) == [6, 12, 15]


def test_long_runs_are_on_mixtures_and_without_hints_in_the_end(data):
    short, long = (long_settings(data, epochs=steps / 6, batch_size=10) for steps in (2999, 3000))
    assert not short.mixing
    assert long.mixing
    assert short.hints == long.hints == 1
    assert long_settings(data, epochs=5000, batch_size=10).hints == 0.1
    assert short.averaging == long.averaging > 0
    assert short.lr < long.lr == default_rate(3000, 10)
    assert long_settings(data, epochs=1, lr=0.5).lr == 0.5


def test_it_brings_the_network_nearer_to_its_teacher(begin, model, plan, data, tmp_path):
    found = begin(tmp_path / "a", epochs=6, lr=0.01)
    goal = outputs(model, data, "val")
    before, after = (
        evaluate(network, data, "val", teacher_outputs=goal).divergence
        for network in (apply_plan(model, plan, data), found.model)
    )
    assert after < 0.5 * before
    assert found.log["divergence"].iloc[-1] < found.log["divergence"].iloc[0]


@pytest.mark.parametrize("step", [0, 1, 6, 9, 12, 15])
def test_stopped_and_resumed_it_ends_with_the_same_weights(begin, whole, tmp_path, monkeypatch, step):
    monkeypatch.setattr(loop, "_SAVE_SECONDS", -1.0)  # after each portion
    monkeypatch.setattr(loop, "_TELL", 2)
    with pytest.raises(Stopped, match="by the test"):
        begin(tmp_path / "cut", watch=stopping_at(step))
    again = begin(tmp_path / "cut")
    assert not again.was_done
    for name in ("compressed.safetensors", "checkpoint.safetensors"):
        ours, theirs = load_state_dict(whole.out / name), load_state_dict(tmp_path / "cut" / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    for mine, other in zip(rows(tmp_path / "cut"), rows(whole.out), strict=True):
        for column in ("step", "epoch", "lr", "accuracy", "error", "divergence", "kept"):
            assert mine[column] == other[column]
        assert float(mine["loss"]) == pytest.approx(float(other["loss"]), rel=1e-6)


def test_what_has_not_taken_a_step_is_begun_with_other_settings(begin, tmp_path):
    with pytest.raises(Stopped, match="by the test"):
        begin(tmp_path, watch=stopping_at(0))
    assert [path.name for path in tmp_path.glob("[!.]*")] == ["checkpoint.safetensors"]
    assert begin(tmp_path, epochs=0.5).log["epoch"].iloc[-1] == 0.5


@pytest.mark.parametrize("last", ["save_compressed", "save_log"])
def test_killed_between_the_files_of_its_first_epoch_it_is_resumed(begin, whole, tmp_path, monkeypatch, last):
    with monkeypatch.context() as patch:

        def fail(*told, **named):
            getattr(before, last)(*told, **named)
            raise Stopped("by the test")

        before = SimpleNamespace(save_compressed=loop.save_compressed, save_log=loop.save_log)
        patch.setattr(loop, last, fail)
        with pytest.raises(Stopped, match="by the test"):
            begin(tmp_path)
    assert begin(tmp_path).compressed == whole.compressed


def test_in_whichever_modes_the_caller_is_it_does_the_same(begin, whole, tmp_path):
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert begin(tmp_path).compressed == whole.compressed
    with torch.inference_mode(), pytest.raises(TrainingError, match=r"within torch.inference_mode\(\)"):
        begin(tmp_path / "other")


def test_what_is_done_is_not_done_again(begin, whole):
    def files():
        return {path.name: path.stat().st_mtime_ns for path in whole.out.glob("[!.]*")}

    before, told = files(), []
    again = begin(whole.out, watch=told.append)
    assert again.was_done
    assert (again.dense, again.compressed) == (whole.dense, whole.compressed)
    assert {progress.phase for progress in told} == {"test"}
    assert files() == before


def test_what_lies_in_the_place_of_its_network_is_looked_at(begin, whole, tmp_path):
    shutil.copytree(whole.out, tmp_path / "out")
    path = tmp_path / "out" / "compressed.safetensors"
    state = load_state_dict(path)
    name = next(name for name in state if "factors" in name)
    for damaged in (state[name] * torch.nan, state[name][:1, :1]):
        save_safetensors(state | {name: damaged}, path, read_metadata(path))
        with pytest.raises(
            CheckpointError, match="is not what this fine-tune left there, pass another --out: 1 "
        ) as caught:
            begin(tmp_path / "out")
        assert "\n" not in str(caught.value)


def test_of_two_in_one_folder_one_is_at_it_and_the_other_waits(begin, whole, tmp_path):
    told = []
    with ThreadPoolExecutor(1) as pool:
        with alone(tmp_path / ".lock", lambda: None):
            other = pool.submit(begin, tmp_path, watch=lambda progress: told.append(progress.message))
            while "another fine-tune is at it" not in told:
                assert not other.done()
                time.sleep(0.01)
            shutil.copytree(whole.out, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".lock"))
        assert other.result().was_done


def test_progress_tells_steps_and_scores(begin, tmp_path):
    told = []
    found = begin(tmp_path / "a", epochs=1.5, watch=told.append)
    steps = [(progress.done, progress.total) for progress in told if progress.phase == "finetune"]
    assert steps == [(0, 9), (6, 9), (6, 9), (9, 9), (9, 9)]
    best = [progress.best for progress in told if progress.best is not None]
    kept = found.log[found.log["kept"]]
    assert best == [found.log["metric"][0], kept["metric"].iloc[-1]]
    phases = [progress.phase for progress in told]
    first = phases.index("finetune")
    assert (phases[0], set(phases[1:first])) == ("calibrate", {"apply"})


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"epochs": 3.0}, "epochs was 2.5, is 3.0"),
        ({"lr": None}, "lr was 0.002, is 1.0"),
        ({"batch_size": 20}, "batch size was 10, is 20"),
        ({"label_weight": 0.5}, "label weight was 0.0, is 0.5"),
        ({"compiled": True}, "compiled was False, is True"),
        ({"seed": 1}, "seed was 0, is 1"),
    ],
)
def test_with_other_settings_it_is_not_resumed(begin, whole, options, told):
    with pytest.raises(TrainingError, match=f"begun with other settings .{told}.*pass another --out") as caught:
        begin(whole.out, **options)
    assert "\n" not in str(caught.value)


def test_from_another_beginning_it_is_not_resumed(whole, model, plan, data, make_data, tmp_path):
    small = apply_plan(model, plan)
    save_compressed(small, plan, tmp_path / "small.safetensors")
    with pytest.raises(TrainingError, match="network was"):
        ks.finetune(model, tmp_path / "small.safetensors", data, epochs=2.5, out=whole.out)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.get_parameter("head.bias").add_(1)
    with pytest.raises(TrainingError, match="weights was"):
        ks.finetune(other, plan, data, epochs=2.5, out=whole.out)
    tilted = copy.deepcopy(model)
    tilted.slope = 0.1
    with pytest.raises(TrainingError, match="structure was"):
        ks.finetune(tilted, plan, data, epochs=2.5, out=whole.out)
    with pytest.raises(TrainingError, match="data was"):
        ks.finetune(model, plan, make_data(9), epochs=2.5, out=whole.out)


def test_a_compressed_network_goes_on_from_its_own_weights(model, plan, data, tmp_path):
    small = apply_plan(model, plan, data)
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.mul_(1.01)
    file = tmp_path / "small.safetensors"
    save_compressed(small, plan, file)
    found = ks.finetune(model, str(file), data, epochs=0.1, batch_size=10, lr=1e-12, out=tmp_path / "out")
    for name, parameter in small.named_parameters():
        torch.testing.assert_close(found.model.get_parameter(name), parameter.detach())
    save_compressed(small, plan, tmp_path / "compressed.safetensors")
    with pytest.raises(TrainingError, match=r"compressed\.safetensors is there already"):
        ks.finetune(model, tmp_path / "compressed.safetensors", data, out=tmp_path)


@pytest.mark.parametrize(("epochs", "steps"), [(3, 18), (0.1, 1)])  # of one step, the scores tell
def test_a_training_that_diverges_is_one_line_and_leaves_the_checkpoint_before(begin, tmp_path, epochs, steps):
    with pytest.raises(TrainingError, match=rf"diverged at step .* of {steps}, .* rate of 1e\+30: pass a lower --lr"):
        begin(tmp_path, epochs=epochs, lr=1e30)
    assert load_state_dict(tmp_path / "checkpoint.safetensors")["place"].tolist() == [0, 0]


def test_senseless_settings_are_one_line(begin, tmp_path):
    with pytest.raises(TrainingError, match="must be positive"):
        begin(tmp_path / "a", epochs=-1)
    assert not (tmp_path / "a").exists()


def test_without_a_test_split_nothing_is_begun(model, plan, make_data, tmp_path):
    data = make_data()
    size = data.size
    data.size = lambda split: 0 if split == "test" else size(split)
    with pytest.raises(DataError, match="no example in the test split"):
        ks.finetune(model, plan, data, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_network_that_can_not_be_stored_is_told_before_anything_is_begun(model, plan, data, tmp_path):
    turned = copy.deepcopy(model)
    turned.register_buffer("rotation", torch.ones(1, dtype=torch.complex64))
    with pytest.raises(CheckpointError, match=r"can't write rotation .torch.complex64. to .*compressed.safetensors"):
        ks.finetune(turned, plan, data, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_parameter_of_integers_stays(model, plan, data, tmp_path):
    counted = copy.deepcopy(model)
    counted.count = nn.Parameter(torch.tensor(3), requires_grad=False)
    found = ks.finetune(counted, plan, data, epochs=0.1, batch_size=10, out=tmp_path)
    assert found.model.count == 3


def test_without_a_compiler_nothing_is_begun(begin, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("no compiler")

    monkeypatch.setattr(torch, "compile", lambda function: fail)
    with pytest.raises(TrainingError, match=r"torch.compile does not work here \(.*no compiler\)"):
        begin(tmp_path / "out", compiled=True)
    assert not (tmp_path / "out").exists()


def test_of_a_compiled_fine_tune_that_is_done_the_result_is_had_without_a_compiler(begin, whole, tmp_path, monkeypatch):
    shutil.copytree(whole.out, tmp_path / "out")
    path = tmp_path / "out" / "checkpoint.safetensors"
    metadata = read_metadata(path)
    record = json.loads(metadata["record"])
    record["identity"]["compiled"] = True
    save_safetensors(load_state_dict(path), path, metadata | {"record": json.dumps(record)})
    monkeypatch.setattr(course, "require_compiler", None)
    assert begin(tmp_path / "out", compiled=True).was_done


def test_a_checkpoint_that_is_none_is_refused(begin, whole, tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(b"something else")
    with pytest.raises(CheckpointError, match="can't be read as a safetensors file"):
        begin(tmp_path)
    save_safetensors({}, path, {"format": "other"})
    with pytest.raises(CheckpointError, match="is not the checkpoint of a fine-tune"):
        begin(tmp_path)
    metadata = read_metadata(whole.out / path.name)
    record = json.loads(metadata["record"])
    state = load_state_dict(whole.out / path.name)
    for change, match in (({"version": 1}, "has version 1, this kronsearch reads 2"), ({"log": 3}, "is not a valid")):
        save_safetensors(state, path, metadata | {"record": json.dumps(record | change)})
        with pytest.raises(CheckpointError, match=match):
            begin(tmp_path)
    save_safetensors(state, path, metadata)
    with pytest.raises(CheckpointError, match=r"without compressed.safetensors beside it: pass another --out"):
        begin(tmp_path)
    shutil.copy(whole.out / "compressed.safetensors", tmp_path)
    for name, tensor in (
        ("generator", torch.zeros(3, dtype=torch.uint8)),
        ("place", torch.tensor([5, 2**40])),
        ("place", torch.tensor([2**40, 0])),
        ("model/head.bias", torch.zeros(4)),
        ("optimizer/head.bias/exp_avg", torch.zeros(4)),
    ):
        save_safetensors(state | {name: tensor}, path, metadata)
        with pytest.raises(CheckpointError, match=r"can't be resumed from .*: pass another --out"):
            begin(tmp_path)
