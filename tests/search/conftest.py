import pytest

import kronsearch as ks


@pytest.fixture(scope="session")
def digits_model():
    return ks.load_model("zoo:digits")


@pytest.fixture(scope="session")
def digits_data():
    return ks.load_data("digits", seed=0)


@pytest.fixture(scope="session")
def digits_cost(digits_model):
    return ks.profile_model(digits_model, input_shape=(1, 8, 8))
