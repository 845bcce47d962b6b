"""Lays out what is too wide for a column of text: the names of tests in tables, and pictures."""

from __future__ import annotations

from xml.etree.ElementTree import Element

from markdown import Extension, Markdown
from markdown.treeprocessors import Treeprocessor
from mkdocs.config.defaults import MkDocsConfig


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Adds the layout to what reads Markdown; called by mkdocs when it has read its configuration."""
    config.markdown_extensions.append(Layout())
    return config


class Layout(Extension):
    """Gives tests rows of their own, and shows a picture alone when it is clicked."""

    def extendMarkdown(self, md: Markdown) -> None:
        # After inline Markdown (20), which makes the pictures, and before mkdocs looks where links lead (0).
        md.treeprocessors.register(_Layout(md), 'layout', 10)


class _Layout(Treeprocessor):
    def run(self, root: Element) -> None:
        for table in root.iter('table'):
            _put_tests_below(table)
        for parent in list(root.iter()):
            for index, child in enumerate(parent):
                if child.tag == 'img' and parent.tag != 'a':
                    parent[index] = _linked(child)


def _put_tests_below(table: Element) -> None:
    """Where the last column names tests, moves each name into a row below its own, as wide as the table."""
    header, body = table.find('thead/tr'), table.find('tbody')
    if header is None or body is None or header[-1].text != 'test':
        return
    header.remove(header[-1])
    for index, row in reversed(list(enumerate(body))):
        test = row[-1]
        row.remove(test)
        test.attrib = {'colspan': str(len(header))}
        below = Element('tr', {'class': 'test'})
        below.append(test)
        body.insert(index + 1, below)


def _linked(image: Element) -> Element:
    link = Element('a', {'href': image.attrib['src']})
    link.tail, image.tail = image.tail, None
    link.append(image)
    return link
