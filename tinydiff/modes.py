from .engine import grad_enabled, no_grad, set_grad_enabled as recording  # noqa
