"""The documentation's build: ``sphinx-build -W --keep-going -q docs build/docs``."""

from __future__ import annotations

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator

import merge_callback

project = "merge_callback"
author = "The merge_callback developers"
version = release = merge_callback.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
source_suffix = {".md": "markdown"}
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = "merge_callback"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_copy_source = False
html_math_renderer = "mathml"

autodoc_member_order = "bysource"
autodoc_typehints = "none"
autodoc_preserve_defaults = True


def _inline(translator: HTML5Translator, node: nodes.math) -> None:
    translator.body.append(tex2mathml(node.astext()))
    raise nodes.SkipNode


def _block(translator: HTML5Translator, node: nodes.math_block) -> None:
    translator.body.append(tex2mathml(node.astext()).replace("<math ", '<math display="block" ', 1))
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    """Formulas are MathML: no script, and nothing from the network."""
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
