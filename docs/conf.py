"""Sphinx: the pages are Markdown (MyST), the reference comes from the docstrings."""

from importlib.metadata import version as version_of

project = "smt_ext"
author = "the authors of smt_ext"
release = version = version_of("smt_ext")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
# Attributes are described in their class's docstring.
napoleon_use_ivar = True

html_theme = "furo"
html_title = f"smt_ext {release}"
