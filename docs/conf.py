# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Settings of the documentation: `sphinx-build -W --keep-going docs build/docs` builds it, and a warning is an error.

Neither the build nor a reader's browser fetches anything, so formulas are MathML.
"""

import re
from pathlib import Path

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
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
# setup.cfg is the only place with the address of the repository.
settings = (Path(__file__).parents[1] / "setup.cfg").read_text(encoding="utf-8")
repository = re.search(r"^\s+Source = (\S+)$", settings, re.MULTILINE)[1]
# Each page links to its source, and the menu to the repository.
html_theme_options = {"source_repository": repository, "source_branch": "main", "source_directory": "docs/"}
html_context = {"repository": repository}
templates_path = ["_templates"]
html_sidebars = {
    "**": [
        "sidebar/brand.html",
        "sidebar/search.html",
        "sidebar/scroll-start.html",
        "sidebar/navigation.html",
        "repository.html",
        "sidebar/scroll-end.html",
    ]
}
html_math_renderer = "mathml"

# References to this package must resolve. Those to other libraries would need a network.
nitpicky = True
nitpick_ignore_regex = [
    (
        "py:class",
        r"(torch|nn|peft|collections|contextlib|os|abc|transformers|pathlib|PIL|accelerate|huggingface_hub)\.\S+|PeftType|TaskType",
    ),
    # How an `SDPTConfig` is read and written; its methods are documented with the config.
    ("py:class", r"peft_sdpt\.saving\.SavedConfig"),
    # The annotations of a named tuple stay texts.
    ("py:class", r"Tensor"),
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
    # Formulas side by side are below each other on a narrow screen.
    parts = [convert(part, display="block") for part in node.astext().split(r"\qquad")]
    translator.body.append(f'<div class="formulas">{"".join(parts)}</div>')
    raise SkipNode


def setup(app):
    app.add_html_math_renderer("mathml", (inline_formula, None), (formula, None))
