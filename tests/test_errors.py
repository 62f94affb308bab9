import pytest

from kronsearch.errors import PlanError, check_kind, differences, first_line


def test_what_differs_is_named_with_both_values():
    known, given = {"seed": 0, "data": "a", "budget": "flops 50%"}, {"seed": 1, "data": "a", "objective": "loss"}
    assert differences(known, given) == ("seed was 0, is 1; budget was flops 50%, is None; objective was None, is loss")
    assert differences(known, dict(known)) == ""


def test_what_is_not_there_differs_from_what_is_none():
    assert differences({}, {"data": None}) == "data was None, is None"


@pytest.mark.parametrize(("error", "line"), [(ValueError(" \none\ntwo"), "one"), (ValueError(), "")])
def test_the_first_line_of_an_error(error, line):
    assert first_line(error) == line


def test_a_value_of_another_kind_is_told_by_its_type():
    check_kind("a plan is a Plan", 3, (str, int), PlanError)
    with pytest.raises(PlanError, match=r"^a plan is a Plan, not of type list$"):
        check_kind("a plan is a Plan", [], (str, int), PlanError)
