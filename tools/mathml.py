"""A Python-Markdown extension: `$…$` and `$$…$$` become MathML, so that formulas need no script and no network."""

import re
from typing import Any
from xml.etree.ElementTree import Element

from latex2mathml.converter import convert
from markdown import Markdown
from markdown.extensions import Extension
from markdown.inlinepatterns import InlineProcessor

# A single dollar opens only before, and closes only after, something that is no space: prices in prose stay prices.
DISPLAY, INLINE = r"\$\$(.+?)\$\$", r"(?<![\\$\w])\$(?!\s)([^$]+?)(?<!\s)\$(?![\d$])"


def to_mathml(latex: str, display: str = "inline") -> str:
    """MathML of a formula.

    Raises:
        ValueError: it cannot be converted, or holds a command that the converter does not know.
    """
    try:
        mathml: str = convert(latex.strip(), display=display)
    except Exception as error:  # the converter has no common exception
        raise ValueError(f"formula {latex!r} cannot be converted: {type(error).__name__} {error}") from error
    unknown = re.search(r">(\\[A-Za-z]+)<", mathml)
    if unknown:
        raise ValueError(f"formula {latex!r}: unknown command {unknown[1]}")
    return mathml


class _Formula(InlineProcessor):
    def __init__(self, pattern: str, md: Markdown, display: str) -> None:
        super().__init__(pattern, md)
        self.compiled_re = re.compile(pattern, re.DOTALL)
        self.display = display

    def handleMatch(self, m: re.Match[str], data: str) -> tuple[str | Element, int, int]:  # type: ignore[override]  # noqa: ARG002, N802
        return self.md.htmlStash.store(to_mathml(m[1], self.display)), m.start(0), m.end(0)


class MathML(Extension):
    """Registers both patterns after code spans, which keep their dollars, and before backslash escapes."""

    def extendMarkdown(self, md: Markdown) -> None:  # noqa: N802
        """Called by Python-Markdown."""
        md.inlinePatterns.register(_Formula(DISPLAY, md, "block"), "math-display", 186)
        md.inlinePatterns.register(_Formula(INLINE, md, "inline"), "math-inline", 185)


def makeExtension(**settings: Any) -> MathML:  # noqa: N802
    """Called by Python-Markdown."""
    return MathML(**settings)
