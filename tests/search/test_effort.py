import pytest

from kronsearch.search.effort import affordable


@pytest.mark.parametrize(
    ("macs", "images"),
    [(0, 100), (1, 100), (10, 100), (11, 90), (20, 50), (99, 10), (1000, 10)],
)
def test_so_many_images_are_run_as_the_work_allows_within_bounds(macs, images):
    assert affordable(macs, 1000, 10, 100) == images
