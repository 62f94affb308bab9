import os
from pathlib import Path

import pytest

from kronsearch.config import OptionError, Settings, read_settings, resolve


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return tmp_path / "kronsearch.yaml"


def test_without_a_file_and_options_all_is_default(config):
    assert resolve({"model": None, "trials": None}, config_file=config) == Settings()
    assert (Settings().trials, Settings().final_epochs, Settings().out) == (20, 10.0, "kronsearch-out")


def test_dashes_and_underscores_both_name_an_option(config):
    config.write_text("model: zoo:digits\nbudget-flops: 50%\nbudget_params: 90000\nmodel-args: {num_classes: 10}\n")
    settings = read_settings(config)
    assert (settings.model, settings.budget_flops, settings.budget_params) == ("zoo:digits", "50%", 90_000)
    assert settings.model_args == {"num_classes": 10}


def test_options_on_the_line_win_over_the_file_and_the_file_over_defaults(config):
    config.write_text("trials: 5\nseed: 9\n")
    settings = resolve({"trials": 7, "seed": None}, config_file=config)
    assert (settings.trials, settings.seed, settings.out) == (7, 9, "kronsearch-out")


def test_an_option_given_with_its_default_wins_too(config):
    config.write_text("trials: 5\n")
    assert resolve({"trials": 20}, config_file=config).trials == 20


def test_what_was_given_is_known(config):
    config.write_text("seed: 0\n")
    assert resolve({"trials": 7}, config_file=config).model_fields_set == {"trials", "seed"}


def test_options_of_latency(config):
    config.write_text("budget-latency: 60%\nlatency-batch: 8\nlatency-threads: 1\nallow-slower: true\n")
    settings = read_settings(config)
    assert (settings.budget_latency, settings.latency_batch, settings.latency_threads) == ("60%", 8, 1)
    assert settings.allow_slower
    assert not Settings().allow_slower
    for name, value, reason in (
        ("latency_batch", 0, "greater than or equal to 1"),
        ("latency_threads", 10**6, "cores to run on: more threads wait for each other"),
        ("budget_latency", 5, "valid string"),
    ):
        with pytest.raises(OptionError, match=rf"^--{name.replace('_', '-')} {value}: .*{reason}"):
            resolve({name: value}, config_file=config)


@pytest.mark.parametrize(("written", "seconds"), [("90s", 90), ("30m", 30 * 60), ("1.5h", 1.5 * 3600)])
def test_durations(config, written, seconds):
    assert resolve({"timeout": written}, config_file=config).timeout == seconds


@pytest.mark.parametrize("written", ["", "90", "0s", "-1m", "1d", "1e3s", "nan", "٣s", "1 m"])
def test_durations_that_are_none(config, written):
    with pytest.raises(OptionError, match=r"^--timeout .*: write a duration such as 90s, 30m or 2h$"):
        resolve({"timeout": written}, config_file=config)


def test_a_shape_is_read_from_the_line_and_from_the_file(config):
    config.write_text("input-shape: [3, 32, 32]\n")
    assert read_settings(config).input_shape == (3, 32, 32)
    assert resolve({"input_shape": "1, 8,8"}, config_file=config).input_shape == (1, 8, 8)


@pytest.mark.parametrize("written", ["", "3,,3", "0,8", "-1,8", "3x8", "1.5,2", "9" * 10])
def test_shapes_that_are_none(config, written):
    with pytest.raises(OptionError, match=r"^--input-shape .*: write the sizes of one example"):
        resolve({"input_shape": written}, config_file=config)


@pytest.mark.parametrize("written", ["1,8", " 1, 8", [1, 8], (1, "8")])
def test_counts(config, written):
    assert resolve({"batch": written}, config_file=config).batch == (1, 8)
    assert resolve({"batch": 4}, config_file=config).batch == (4,)
    assert (Settings().batch, Settings().threads) == ((1,), None)


@pytest.mark.parametrize("written", ["", "0", "1,", "-1", "1.5", "1x", "9" * 7, [], [None]])
def test_counts_that_are_none(config, written):
    with pytest.raises(OptionError, match=r"^--batch .*: write one count or several, such as 1,8$"):
        resolve({"batch": written}, config_file=config)


def test_there_are_not_more_threads_than_cores(config, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 5}, raising=False)
    assert resolve({"threads": "1,2"}, config_file=config).threads == (1, 2)
    with pytest.raises(OptionError, match=r"^--threads 1,3: there are 2 cores to run on"):
        resolve({"threads": "1,3"}, config_file=config)


def test_model_arguments_are_json(config):
    assert resolve({"model_args": '{"a": [1, null]}'}, config_file=config).model_args == {"a": [1, None]}


@pytest.mark.parametrize("written", ["{", "[1]", "1", "[" * 100_000, r'{"a": "\ud800"}', '{"a": {"b": 1, "b": 2}}'])
def test_model_arguments_that_are_no_object(config, written):
    with pytest.raises(OptionError, match=r": write a JSON object of the model's keyword arguments"):
        resolve({"model_args": written}, config_file=config)


@pytest.mark.parametrize(
    ("option", "value", "reason"),
    [
        ("trials", 0, "greater than or equal to 1"),
        ("trials", 10**9, "less than or equal to 1000000"),
        ("seed", -1, "greater than or equal to 0"),
        ("seed", 2**63, "less than 9223372036854775808"),
        ("final_epochs", float("nan"), "finite number"),
        ("final_epochs", -0.5, "greater than or equal to 0"),
        ("seconds", 0.0, "greater than 0"),
        ("device", "tpu", "'cpu' or 'cuda'"),
        ("decoder", "both", "'allocate' or 'direct'"),
        ("sampler", "grid", "'gp', 'tpe', 'cmaes' or 'random'"),
        ("sensitivity", "none", "'measured', 'fisher', 'inputs', 'absolute' or 'plain'"),
        ("split", "train", "'test' or 'val'"),
    ],
)
def test_values_out_of_bounds(config, option, value, reason):
    with pytest.raises(OptionError, match=f"^--{option.replace('_', '-')} .*{reason}"):
        resolve({option: value}, config_file=config)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: zoo:digits\nbudgt-flops: 1G\n", r"line 2: budgt-flops: there is no such option: did you mean budget-"),
        ("xyzzy: 1\n", r"line 1: xyzzy: there is no such option: see"),
        ("# many\n\ntrials: many\n", r"line 3: trials: Input should be a valid integer"),
        ("trials: true\n", r"line 1: trials: Input should be a valid integer"),
        ("timeout: 90\n", r"line 1: timeout: write a duration"),
        ("trials: 1\ntrials: 2\n", r"an option twice"),
        ('trials: !!int ""', r"not YAML that can be read \(IndexError\)"),
        ('seconds: !!float ""', r"not YAML that can be read \(\w+Error\)"),
        ('quiet: !!bool "x"', r"not YAML that can be read \(KeyError\)"),
        ('model: !!timestamp "x"', r"not YAML that can be read \(AttributeError\)"),
        (r'"\ud800": 1', r"line 1: an option's name: "),
        (r'model-args: {"x": "\ud800"}', r"line 1: model-args: write a JSON object .* surrogates"),
        ("budget-flops: 1G\nbudget_flops: 2G\n", r"line 2: budget-flops stands there twice"),
        ("model: [\n", r"line 2: not YAML"),
        ("model: 'a\n", r"line 2: not YAML"),
        ("\tmodel: a\n", r"line 1: not YAML"),
        ("a: !!python/object/apply:os.system [ls]\n", r"line 1: not YAML .*could not determine a constructor"),
        ("a: 2024-99-99\n", r"not YAML"),
        ("a: 1\n---\nb: 2\n", r"line 2: not YAML"),
        ("? [1, 2]\n: 3\n", r"line 1: not YAML .*unhashable"),
        ("model: \x07\n", r"not YAML"),
        ("- model\n", r"not a mapping"),
        ("model\n", r"not a mapping"),
        ("a: &a [x]\nb: *a\n", r"uses aliases"),
        ("[" * 60_000, r"nested deeper than 20 levels"),
        ("1: 2\n", r"line 1: 1: there is no such option"),
        ("_1: a\n-0x1: b\n", r"line 1: -1 stands there twice"),
    ],
)
def test_a_file_that_is_wrong_is_told_in_one_line(config, text, message):
    config.write_text(text)
    with pytest.raises(OptionError, match=message) as caught:
        read_settings(config)
    assert str(caught.value).startswith(str(config))
    assert "\n" not in str(caught.value)


def test_files_that_are_no_text(config):
    config.write_bytes(b"model: \xff\n")
    with pytest.raises(OptionError, match="not UTF-8 text"):
        read_settings(config)
    config.write_text("#" * 2**17)
    with pytest.raises(OptionError, match="larger than 64 KiB"):
        read_settings(config)
    config.unlink()
    config.mkdir()
    with pytest.raises(OptionError, match="Is a directory"):
        read_settings(config)


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n", "null\n"])
def test_an_empty_file_holds_no_options(config, text):
    config.write_text(text)
    assert read_settings(config) == Settings()
