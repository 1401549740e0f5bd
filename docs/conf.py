# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""How the site is built: `sphinx-build -W --keep-going docs build/docs`, a warning is an error.

Nothing is fetched, neither now nor by a reader's browser: formulas are MathML.
"""

from docutils.nodes import SkipNode
from latex2mathml.converter import convert

from peft_sdpt.version import __version__

project = "peft_sdpt"
author = "The peft_sdpt authors"
copyright = "2026, The peft_sdpt authors. Apache-2.0"
release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["conf.py"]

html_theme = "furo"
html_title = f"peft_sdpt {release}"
html_copy_source = False
html_math_renderer = "mathml"

# Names of ours must lead somewhere; those of PyTorch and PEFT would need a network to.
nitpicky = True
nitpick_ignore_regex = [
    ("py:class", r"(torch|nn|peft|collections|os|abc)\.\S+|PeftType|TaskType"),
    # `Attributes` of two names, of which the builder takes the first for a type.
    ("py:class", r"[a-z_]+"),
]

# One backtick is code in the docstrings, as in Markdown.
default_role = "literal"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"show-inheritance": True}
napoleon_numpy_docstring = False
napoleon_use_ivar = True


def inline_formula(translator, node):
    translator.body.append(convert(node.astext()))
    raise SkipNode


def formula(translator, node):
    translator.body.append(f"<div>{convert(node.astext(), display='block')}</div>")
    raise SkipNode


def setup(app):
    app.add_html_math_renderer("mathml", (inline_formula, None), (formula, None))
