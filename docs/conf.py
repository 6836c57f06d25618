"""Sphinx's configuration: `sphinx-build -W -b html docs docs/_build/html`, with the extra `docs` installed."""

import sys
from importlib.metadata import version as installed_version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import config_reference

project = "jaxdist"
author = "the jaxdist authors"
release = installed_version("jaxdist")

extensions = ["myst_nb"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # tests/test_docs.py runs the code of the pages
exclude_patterns = ["_build"]

html_theme = "sphinx_book_theme"
html_title = "jaxdist"
html_theme_options = {"show_toc_level": 2, "home_page_in_toc": True, "navbar_persistent": []}


def _fill_reference(app, docname, source):
    if docname == "reference/config":
        source[0] = config_reference.fill(source[0])


def setup(app):
    app.connect("source-read", _fill_reference)
    return {"parallel_read_safe": True}
