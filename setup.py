# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""The settings are in setup.cfg. This file only makes the links of README.md absolute, for its page on PyPI.

In README.md, links are relative, so that they work in every clone, fork and version.
"""

import re
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent


def with_absolute_links(text: str, repository: str) -> str:
    """Make the relative links and images in Markdown absolute, for files in a repository on GitHub."""
    text = re.sub(r"(!\[[^\]]*\]\()(?!\w+:|#)", rf"\1{repository}/raw/main/", text)
    return re.sub(r"(\]\()(?!\w+:|#)", rf"\1{repository}/blob/main/", text)


if __name__ == "__main__":
    readme, settings = ((HERE / name).read_text(encoding="utf-8") for name in ("README.md", "setup.cfg"))
    repository = re.search(r"^\s+Source = (\S+)$", settings, re.MULTILINE)[1]
    setup(long_description=with_absolute_links(readme, repository))
