"""The README says nothing that the command line doesn't know."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import kronsearch as ks
from kronsearch.cli import app
from kronsearch.search.space import load_space
from kronsearch.sekron import SeKronConv2d

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
LINES = [
    line
    for language, block in BLOCKS
    if language in ("bash", "sh")
    for line in re.findall(r"^(?:torchrun .* --no-python )?(kronsearch .*)$", block, re.MULTILINE)
]


def options_of(command: str) -> set[str]:
    result = CliRunner().invoke(app, [command, "--help"])
    assert result.exit_code == 0, result.output
    return set(re.findall(r"^  (--[a-z-]+)", result.output, re.MULTILINE)) - {"--help"}


@pytest.mark.parametrize("line", LINES)
def test_every_line_uses_options_that_there_are(line):
    _, command, *words = shlex.split(line)
    assert {word for word in words if word.startswith("--")} <= options_of(command)


def test_the_table_of_options_is_complete():
    section = README.split("### run")[1].split("### profile")[0]
    assert set(re.findall(r"`(--[a-z-]+)", section)) == options_of("run")


def test_the_options_of_the_fine_tune_are_complete():
    section = README.split("### finetune")[1].split("### evaluate")[0]
    own, rest = section.split("`--model`, ")
    told = set(re.findall(r"^\| `(--[a-z-]+)", own, re.MULTILINE)) | set(re.findall(r"`(--[a-z-]+)`", rest))
    assert told | {"--model"} == options_of("finetune")


def test_the_first_two_blocks_are_the_first_run_and_the_tests():
    first, second = (block.splitlines() for language, block in BLOCKS if language == "bash")
    assert first[0] == "pip install ."
    assert first[1].startswith("kronsearch run ")
    assert second == ["pip install -e '.[dev]'", "pytest"]


def test_the_search_spaces_that_are_named_are_there():
    section = README.split("## Search spaces")[1].split("## ")[0]
    named = re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)
    assert named == ["default", "gkpd", "cp"]
    for name in named:
        load_space(name)


def test_the_files_of_options_and_spaces_are_read(tmp_path):
    from kronsearch.config import read_settings

    options, space = (block for language, block in BLOCKS if language == "yaml")
    (tmp_path / "kronsearch.yaml").write_text(options)
    assert read_settings(tmp_path / "kronsearch.yaml").trials == 40
    (tmp_path / "space.yaml").write_text(space)
    assert load_space(tmp_path / "space.yaml").keep_dense == ("conv1", "fc")


def test_the_engine_does_what_the_page_says(capsys):
    block = next(block for language, block in BLOCKS if "pair_table" in block)
    names: dict[str, Any] = {}
    exec(block, names)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 192
    assert lines[0].startswith("rank 1: squared error 0.")
    assert lines[-1] == "rank 192: squared error 0.0000"
    assert len(block.splitlines()) < 15
    images, _ = next(ks.load_data("digits", seed=0).batches("test", 8))
    assert isinstance(names["model"].get_submodule("block2.conv2"), SeKronConv2d)
    assert names["model"](images).shape == (8, 10)


@pytest.mark.filterwarnings("ignore")  # what exporters say of their own insides
def test_a_network_is_exported_as_the_page_says(tmp_path, monkeypatch):
    pytest.importorskip("onnxscript", reason="needs kronsearch[onnx]")
    monkeypatch.chdir(tmp_path)
    block = next(block for language, block in BLOCKS if language == "python" and "onnx" in block)
    exec(block, {})
    assert all((tmp_path / name).stat().st_size > 0 for name in ("small.pt2", "small.onnx"))


def test_the_python_is_python():
    for language, block in BLOCKS:
        if language == "python":
            compile(block, "README.md", "exec")
