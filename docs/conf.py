"""How Sphinx makes the book: `sphinx-build -W docs OUT`, after `pip install -e '.[docs]'`."""

import os
import sys
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "agg")
sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "tinydiff"
author = "the authors of tinydiff"
copyright = "the authors of tinydiff, MIT licence"
extensions = ["myst_parser", "book"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_ext", "_build"]
root_doc = "index"
myst_heading_anchors = 4
smartquotes = False
html_theme = "furo"
html_title = "tinydiff: the book"
html_static_path = ["_static"]
html_css_files = ["book.css"]
html_copy_source = False
html_show_sphinx = False
pygments_style = "default"
suppress_warnings = ["misc.highlighting_failure"]
