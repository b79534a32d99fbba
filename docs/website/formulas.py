r"""LaTeX to MathML, which browsers draw themselves.

The generator leaves a formula as `<span class="arithmatex">\(…\)</span>` or `<div class="arithmatex">\[…\]</div>`.
"""

import html
import re

from math_core import LatexError, LatexToMathML

FORMULA = re.compile(r'<(span|div) class="arithmatex">\s*\\([(\[])(.*?)\\[)\]]\s*</\1>([,.;:!?)]*)', re.DOTALL)


def draw_formulas(page: str) -> tuple[str, list[str]]:
    """Return a page of HTML with MathML for its formulas, and what is wrong with those that cannot be read.

    The LaTeX stays inside as an annotation: it is what one gets who copies the formula.
    """
    converter = LatexToMathML(annotation=True, fancy_error=False)
    problems = []

    def draw(match: re.Match[str]) -> str:
        tag, bracket, escaped, punctuation = match.groups()
        latex = html.unescape(escaped).strip()
        try:
            mathml = converter.convert_with_local_state(latex, displaystyle=bracket == "[")
        except LatexError as error:
            problems.append(f"formula {latex!r}, at character {error}")
            return match[0]
        return f'<{tag} class="formula">{mathml}{punctuation}</{tag}>'  # no line may begin with a comma

    return FORMULA.sub(draw, page), problems
