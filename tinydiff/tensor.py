from .engine import *  # noqa: F403
from .engine import Tensor, check_floating, tensor  # noqa: F401
from .operators import OPS, array_of  # noqa: F401
