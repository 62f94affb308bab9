import math

import pytest
import torch

from kronsearch.plan import Decomposition
from kronsearch.search import score
from kronsearch.search.score import Scorer
from kronsearch.sekron.spec import SeKronSpec
from kronsearch.training.evaluate import evaluate, outputs

SPECS = {"block2.conv2": SeKronSpec(((64, 1, 3, 1), (1, 64, 1, 3)), (8,))}


@pytest.fixture
def scorer(digits_model, digits_data):
    return Scorer(digits_model, digits_data, {}, Decomposition(batchnorm_images=256), "cpu")


def test_before_a_fine_tune_a_network_is_measured_on_training_images(scorer, digits_model, digits_data):
    small = scorer.build(SPECS)
    found = scorer.settled(small)
    assert found.n == digits_data.size("train")
    expected = evaluate(
        small, digits_data, "train", teacher_outputs=outputs(digits_model, digits_data, "train"), temperature=4.0
    )
    assert found.divergence == pytest.approx(expected.divergence, rel=0.1)  # which may be in bfloat16
    assert found.metric == pytest.approx(expected.metric, abs=0.01)
    assert scorer.tuning == 0


def test_a_large_network_is_measured_on_fewer_of_them(digits_model, digits_data, monkeypatch):
    monkeypatch.setattr(score, "_SETTLED_IMAGES", (1000, 10_000))
    for macs, images in ((16 * 10**9, 1000), (16 * 10**12 // 1100, 1100), (10**15, 1000)):
        scorer = Scorer(digits_model, digits_data, {}, Decomposition(), "cpu", macs=macs)
        assert scorer.settled(digits_model).n == images


def test_a_proxy_fine_tune_is_measured_on_the_validation_split_and_brings_nearer(scorer, digits_data):
    small = scorer.build(SPECS)
    before = scorer.validate(small)
    after = scorer.proxy(small, 0)
    assert before.n == after.n == digits_data.size("val")
    assert after.divergence < before.divergence
    assert scorer.tuning > 0


def test_the_same_seed_scores_the_same(scorer):
    assert scorer.proxy(scorer.build(SPECS), 0) == scorer.proxy(scorer.build(SPECS), 0)


def test_a_network_that_diverges_has_no_score(scorer):
    small = scorer.build(SPECS)
    with torch.no_grad():
        small.get_submodule("block2.conv2").factors[0].fill_(math.inf)
    assert math.isnan(scorer.proxy(small, 0).metric)
