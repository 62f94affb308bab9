import torch

from kronsearch.training.streams import Purpose, stream


def test_each_purpose_has_numbers_of_its_own_and_each_seed():
    drawn = [
        tuple(torch.rand(4, generator=stream(seed, purpose)).tolist())
        for seed in (0, 1, 2**63 - 1)
        for purpose in Purpose
    ]
    assert len(set(drawn)) == 3 * len(Purpose)
    assert drawn[0] == tuple(torch.rand(4, generator=stream(0, Purpose.CALIBRATION)).tolist())
