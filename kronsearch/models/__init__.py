"""Models: loading them, measuring what they cost, checkpoints, and a small zoo."""

__all__: list[str] = []
