"""To study gradients: explain writes out the rules that a backward pass runs, and save makes a page of them to step
through. They look at the engine from outside."""

from .viewer import save

__all__ = ["save"]
