"""A Python-Markdown extension: `$…$` and `$$…$$` become MathML, so that formulas need no script and no network."""

import re
from typing import Any
from xml.etree.ElementTree import Element, ParseError, fromstring

from latex2mathml.converter import convert
from markdown import Markdown
from markdown.extensions import Extension
from markdown.inlinepatterns import InlineProcessor

# A single dollar opens only before, and closes only after, something that is no space: prices in prose stay prices.
DISPLAY, INLINE = r"\$\$(.+?)\$\$", r"(?<![\\$\w])\$(?!\s)([^$]+?)(?<![\s\\])\$(?![\d$])"
FENCES = {r"\{": "{", r"\}": "}", r"\|": "‖"}  # the converter leaves these as they are after \big and its like
PARTS = {"mfrac": 2, "mroot": 2, "msub": 2, "msup": 2, "munder": 2, "mover": 2, "msubsup": 3, "munderover": 3}


def to_mathml(latex: str, display: str = "inline") -> str:
    """MathML of a formula.

    Raises:
        ValueError: it cannot be converted, holds a command that the converter does not know, or lacks an argument.
    """
    try:
        mathml: str = convert(latex.strip(), display=display)
    except Exception as error:  # the converter has no common exception
        raise ValueError(f"formula {latex!r} cannot be converted: {type(error).__name__} {error}") from error
    for sign, meant in FENCES.items():
        mathml = mathml.replace(f">{sign}<", f">{meant}<")
    unknown = re.search(r">(\\[^<]*)<", mathml)
    if unknown:
        raise ValueError(f"formula {latex!r}: unknown command {unknown[1]}")
    try:
        parts = list(fromstring(mathml).iter())  # noqa: S314 - it was written here
    except ParseError as error:
        raise ValueError(f"formula {latex!r} gives no well-formed MathML: is there a stray & in it?") from error
    for part in parts:
        name = part.tag.rpartition("}")[2]
        if len(part) != PARTS.get(name, len(part)):
            raise ValueError(f"formula {latex!r}: {name} has {len(part)} parts and needs {PARTS[name]}")
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
        md.ESCAPED_CHARS.append("$")
        md.inlinePatterns.register(_Formula(DISPLAY, md, "block"), "math-display", 186)
        md.inlinePatterns.register(_Formula(INLINE, md, "inline"), "math-inline", 185)


def makeExtension(**settings: Any) -> MathML:  # noqa: N802
    """Called by Python-Markdown."""
    return MathML(**settings)
