"""Oracles: MathML by hand; `xml.etree`, which reads what the converter writes; the formulas of the real tree."""

import re
from xml.etree import ElementTree

import markdown
import pytest

import taxonomy
from tools.mathml import DISPLAY, INLINE, to_mathml

SPACE = "{http://www.w3.org/1998/Math/MathML}"


def html(text):
    return markdown.markdown(text, extensions=["tables", "tools.mathml"])


def formulas(text):
    """Of the HTML of a Markdown text: for each formula, inline or block and its letters."""
    found = ElementTree.fromstring(f"<html>{html(text)}</html>").iter(f"{SPACE}math")
    return [(math.get("display"), "".join(math.itertext())) for math in found]


def test_a_fraction_by_hand():
    """Oracle: the MathML specification's own form of a half."""
    half = "<mfrac><mrow><mn>1</mn></mrow><mrow><mn>2</mn></mrow></mfrac>"
    assert to_mathml(r" \frac{1}{2} ") == f'<math xmlns="{SPACE[1:-1]}" display="inline"><mrow>{half}</mrow></math>'
    assert 'display="block"' in to_mathml("x", "block")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Let $x$ be.", [("inline", "x")]),
        ("$x$", [("inline", "x")]),
        ("$a$ and $b$, ($c$), $d$-th, *$e$*, [$f$](g)", [("inline", letter) for letter in "abcdef"]),
        ("It is $$a+b$$ there.", [("block", "a+b")]),
        ("It is\n$$\na\n+ b\n$$\nthere, $c$.", [("block", "a+b"), ("inline", "c")]),
        ("$$a$$ $$b$$", [("block", "a"), ("block", "b")]),
        ("$a\nb$", [("inline", "ab")]),
        ("$a_i * b_j * c_k$", [("inline", "ai*bj*ck")]),  # no emphasis inside
        (r"$\{x\}$, $\|x\|$, $a<b$", [("inline", "{x}"), ("inline", "‖x‖"), ("inline", "a<b")]),
        (r"$\big\{x\big\}$ $\big\|x\big\|$", [("inline", "{x}"), ("inline", "‖x‖")]),
        ("| a | b |\n|---|---|\n| $x$ | $y$ |", [("inline", "x"), ("inline", "y")]),
        ("# The $L_2$ norm", [("inline", "L2")]),
    ],
)
def test_formulas_in_text(text, found):
    """Oracle: by hand."""
    assert formulas(text) == found
    assert "$" not in html(text)


@pytest.mark.parametrize(
    "text",
    [
        "costs $5 and $6",
        "between $5/$6",
        "$5-$10",
        "US$5 and US$6",
        "from $100K to $1M",
        "a lone $ sign",
        "$ x$ and $y $",
        "a$x$",
        "$x$5",
        "two $$ signs",
    ],
)
def test_prices_are_no_formulas(text):
    assert html(text) == f"<p>{text}</p>"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("`$x$` and `$$y$$`", "<p><code>$x$</code> and <code>$$y$$</code></p>"),
        ("``$x$ ` $y$``", "<p><code>$x$ ` $y$</code></p>"),
        ("    $x$", "<pre><code>$x$\n</code></pre>"),
        (r"\$x\$", "<p>$x$</p>"),
        (r"costs \$5, not \$x$", "<p>costs $5, not $x$</p>"),
        (r"a $x \$ y", r"<p>a $x $ y</p>"),
        (r"\*x\*", "<p>*x*</p>"),
    ],
)
def test_code_and_escapes_stay(text, shown):
    assert html(text) == shown


@pytest.mark.parametrize(
    ("latex", "said"),
    [
        (r"\foo", r"unknown command \\foo"),
        (r"a + \RR^2", r"unknown command \\RR"),
        (r"\big\lfloor x", r"unknown command \\lfloor"),
        (r"\frac{1}", "mfrac has 1 parts and needs 2"),
        (r"a & b", "is there a stray & in it"),
        (r"x^", "cannot be converted|parts"),
        (r"\begin{matrix} a", "cannot be converted"),
        (r"\left( x", "cannot be converted"),
    ],
)
def test_what_cannot_be_converted_is_refused(latex, said):
    """And the message holds the formula, so that it can be found."""
    with pytest.raises(ValueError, match=said) as caught:
        to_mathml(latex)
    assert repr(latex) in str(caught.value)
    with pytest.raises(ValueError, match=said):
        html(f"It is ${latex}$.")


def texts(tree):
    for entry in [*tree.methods.values(), *tree.categories.values()]:
        yield entry.id, f"{entry.idea}\n\n{entry.when}" if entry.id in tree.methods else entry.text


def test_every_formula_of_the_real_tree():
    """All are converted, none is left over, none is taken for a price: each dollar sign opens or closes one."""
    count = 0
    for name, text in texts(taxonomy.load()):
        found = formulas(text)
        shown = ElementTree.fromstring(f"<html>{html(text)}</html>")
        assert "$" not in "".join(shown.itertext()), name
        display = re.findall(DISPLAY, text, re.DOTALL)
        inline = re.findall(INLINE, re.sub(DISPLAY, " ", text, flags=re.DOTALL))
        assert len(found) == len(display) + len(inline), name
        assert [kind for kind, _ in found].count("block") == len(display), name
        assert all(letters.strip() for _, letters in found), name
        count += len(found)
    assert count > 1000
