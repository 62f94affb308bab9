import pytest

from kronsearch.errors import SpaceError
from kronsearch.search.space import SearchSpace, load_space
from kronsearch.sekron.shapes import Structure


def test_the_default_file_is_the_default_space():
    assert load_space("default") == SearchSpace()


def test_gkpd_has_two_factors_only():
    assert set(load_space("gkpd").structures) == {Structure.BOTTLENECK, Structure.SPATIAL, Structure.MIXING}


def test_a_file_of_the_users_own(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("structures: [deep]\nkeep_dense: ['layer1.*', fc]\n")
    space = load_space(path)
    assert space.structures == (Structure.DEEP,)
    assert space.reason_to_keep("layer1.0.conv1") == "the search space keeps 'layer1.*' dense"
    assert space.reason_to_keep("fc") is not None
    assert space.reason_to_keep("layer2.0.conv1") is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("structures: [deep", "line 1: not YAML that can be read"),
        ("structures: [round]", r"is not valid: structures\.0"),
        ("structures: []", "is not valid: structures"),
        ("depth: 3", "is not valid: depth"),
        ("deep_fits: 1000", "is not valid: deep_fits"),
        ("!!python/object/apply:os.system [true]", "line 1: not YAML that can be read"),
        ("[" * 5000, "nested deeper than 20 levels"),
        ("- 1", "is not valid: the file"),
        ("[]", "is not valid: the file"),
        ("false", "is not valid: the file"),
        ("structures: [dense, deep]", "is not valid: structures: .*layers may always stay dense"),
    ],
)
def test_malformed_files_are_refused_in_one_line(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(SpaceError, match=message) as caught:
        load_space(path)
    assert "\n" not in str(caught.value)


def test_an_unknown_name_lists_what_there_is():
    with pytest.raises(SpaceError, match="no search space 'defualt': pass a YAML file or one of cp, default, gkpd"):
        load_space("defualt")


def test_an_empty_file_is_the_default_space(tmp_path):
    path = tmp_path / "empty.yaml"
    path.write_text("# nothing\n")
    assert load_space(path) == SearchSpace()


def test_layers_to_keep_that_there_are_not_are_refused():
    space = SearchSpace(keep_dense=("fc", "layer1.*"))
    space.check_names(["layer1.0.conv1", "fc", "conv1"])
    with pytest.raises(SpaceError, match=r"keeps 'layer1\.\*' dense, which no layer of the model is called"):
        space.check_names(["fc", "layer1"])
