"""The book's own modules lie beside its pages, in docs/_ext."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "docs" / "_ext"))
