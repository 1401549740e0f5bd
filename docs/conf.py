# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Settings of the documentation: `sphinx-build -W --keep-going docs build/docs` builds it, and a warning is an error.

Neither the build nor a reader's browser fetches anything, so formulas are MathML.
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

# References to this package must resolve. Those to other libraries would need a network.
nitpicky = True
nitpick_ignore_regex = [
    ("py:class", r"(torch|nn|peft|collections|os|abc|pathlib|PIL|accelerate|huggingface_hub)\.\S+|PeftType|TaskType"),
    # How an `SDPTConfig` is read and written; its methods are documented with the config.
    ("py:class", r"peft_sdpt\.saving\.SavedConfig"),
    # If an entry of `Attributes` has two names, the builder takes the first for a type.
    ("py:class", r"[a-z_]+"),
]

# Single backticks in docstrings are code, as in Markdown.
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
