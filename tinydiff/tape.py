from .engine import composite, op as primitive  # noqa
