# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Reads the metadata of a model card, and the page that the Hub makes of its Markdown."""

from __future__ import annotations

import ast
from dataclasses import dataclass, field
from html.parser import HTMLParser

import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

# The HTML elements that the sections of this package have.
TAGS = {"h1", "h2", "h3", "p", "a", "code", "pre", "table", "thead", "tbody", "tr", "th", "td", "ul", "li", "img"}


@dataclass
class Shown(HTMLParser):
    """The content of a page.

    Attributes:
        tags: all tags.
        links: where links go to, and where pictures come from.
        names: texts that are shown as code within a line.
        rows: texts of the cells of each row of the tables.
        comments: texts of comments.
        python: blocks of code.
        titles, items: texts of headings, and of items of lists.
    """

    tags: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    comments: list[str] = field(default_factory=list)
    python: list[str] = field(default_factory=list)
    titles: list[str] = field(default_factory=list)
    items: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        assert {name for name, _ in attributes} <= {"href", "src", "alt", "class"}, (tag, attributes)
        self.links += [value or "" for name, value in attributes if name in ("href", "src")]
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        elif tag == "li":
            self.items.append("")
        elif tag in ("h1", "h2"):
            self.titles.append("")
        elif tag == "code":
            (self.python if "pre" in self.open else self.names).append("")

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_comment(self, data: str) -> None:
        self.comments.append(data)

    def handle_data(self, data: str) -> None:
        texts = {"code": self.python if "pre" in self.open else self.names, "li": self.items}
        for tag, found in (*texts.items(), ("h1", self.titles), ("h2", self.titles)):
            if tag in self.open:
                found[-1] += data
        if {"td", "th"} & {*self.open}:
            self.rows[-1][-1] += data


def read_card(content: str) -> tuple[dict, Shown]:
    """Return the metadata of a card, after checking that two readers agree on it, and the content of its page."""
    card = ModelCard(content)
    data = yaml.safe_load(content.split("\n---\n")[0].removeprefix("---"))
    assert card.data.to_dict() == {name: value for name, value in data.items() if value is not None}
    shown = Shown()
    shown.feed(MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(card.text))
    shown.close()
    assert not shown.open and set(shown.tags) <= TAGS, set(shown.tags) - TAGS
    for block in shown.python:
        ast.parse(block)
    return data, shown
