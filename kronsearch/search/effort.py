"""How many images a network is run on to measure something, so that large networks don't take hours."""

__all__ = ["affordable"]


def affordable(macs: int, work: int, fewest: int, most: int) -> int:
    """Return how many images can be run for some work, but no fewer and no more than told.

    Args:
        macs: multiply-accumulates for one image, in all runs together.
        work: multiply-accumulates that may be spent, as far as the fewest images allow.
        fewest: images without which the measure is of no use.
        most: images from which on more of them tell nothing new.
    """
    return min(max(work // max(1, macs), fewest), most)
