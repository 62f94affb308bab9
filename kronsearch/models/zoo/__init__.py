"""A small zoo: networks whose trained weights are at hand or train in a minute."""

__all__: list[str] = []
