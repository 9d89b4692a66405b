from .engine import backward, grad  # noqa
