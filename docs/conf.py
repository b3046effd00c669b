"""Sphinx: the pages are Markdown (MyST), the reference comes from the docstrings."""

import sys
from importlib.metadata import version as version_of
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # for mathml.py

project = "smt_ext"
author = "the authors of smt_ext"
release = version = version_of("smt_ext")

extensions = [
    "mathml", "myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode",
]  # fmt: skip
myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
# Attributes are described in their class's docstring.
napoleon_use_ivar = True

html_theme = "furo"
html_math_renderer = "mathml"
html_static_path = ["static"]
html_css_files = ["pages.css"]
html_title = f"smt_ext {release}"
