"""To study gradients with: they look at the engine from outside."""
