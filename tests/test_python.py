"""What is passed from Python in the place of what is meant is told in one line."""

import pytest
import torch

import kronsearch as ks

BUDGET = ks.Budget(params="50%")


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda model, data: ks.search("zoo:digits", data, budget=BUDGET), "a network is a torch.nn.Module"),
        (lambda model, data: ks.search(model, [1, 2], budget=BUDGET), "data are a kronsearch.training.data.Data"),
        (
            lambda model, data: ks.search(model, data, budget="50%"),
            "a budget is a Budget",
        ),
        (lambda model, data: ks.sweep(model, "digits", params="30%,50%"), "data are a kronsearch.training.data.Data"),
        (lambda model, data: ks.search_front(data, data, params="30%:50%"), "a network is a torch.nn.Module"),
        (lambda model, data: ks.apply_plan(model, "plan.json"), "a plan is a Plan, such as load_plan returns"),
        (lambda model, data: ks.finetune(model, model, data), "what a fine-tune starts with is a Plan, its file, or"),
        (
            lambda model, data: ks.finetune(model, "plan.json", torch.zeros(3)),
            "data are a kronsearch.training.data.Data",
        ),
        (lambda model, data: ks.bench(model, "small", input_shape=(1, 8, 8)), "a network is a torch.nn.Module"),
        (lambda model, data: ks.profile_model("zoo:digits", input_shape=(1, 8, 8)), "a network is a torch.nn.Module"),
    ],
)
def test_it_is_told(digits_model, digits_data, call, told):
    with pytest.raises(ks.KronsearchError, match=rf"^{told}.*, not of type \w+$"):
        call(digits_model, digits_data)
