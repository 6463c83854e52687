r"""Answers as text: one spelling for what LaTeX, Unicode and habit write in many ways.

Pure string work on untrusted text: nothing is evaluated, and every pattern takes linear time on a short answer.
"""

import re
import unicodedata

_GREEK = "αβγδεζηθκλμνξπρστφχψωΓΔΘΛΞΠΣΦΨΩ"
_GREEK_NAMES = (
    "alpha beta gamma delta epsilon zeta eta theta kappa lambda mu nu xi pi rho sigma tau phi chi psi omega "
    "Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega"
)
_CHARACTERS = {
    **dict.fromkeys("−–—‐‑‒", "-"),
    **dict.fromkeys("°˚º", r"^\circ "),
    **dict.fromkeys("×✕", r"\times "),
    **dict.fromkeys("·⋅∙•", r"\cdot "),
    **dict.fromkeys("≤⩽", r"\leq "),
    **dict.fromkeys("≥⩾", r"\geq "),
    **dict.fromkeys("≈≃", r"\approx "),
    **dict.fromkeys("€£¥", ""),
    **{"÷": "/", "∞": r"\infty ", "≠": r"\neq ", "±": r"\pm ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in "},
    **{"∅": r"\emptyset ", "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "⌊": r"\lfloor ", "⌋": r"\rfloor ", "′": "'"},
    **{letter: rf"\{name} " for letter, name in zip(_GREEK, _GREEK_NAMES.split(), strict=True)},
}
_SUPERSCRIPTS = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+")
_SUBSCRIPTS = re.compile("[₀₁₂₃₄₅₆₇₈₉]+")

_END = r"(?![a-zA-Z])"
_SPELLINGS = [
    (re.compile(pattern, re.DOTALL), spelling)
    for pattern, spelling in [
        (r"^\s*\*\*(.*)\*\*\s*$", r"\1"),  # Markdown
        (r"\\\$|\$|(?<!\\)\\[()\[\]]", ""),  # currency, and where a formula begins and ends
        (r"(?<=\d)(?:,\s*\\!|\{,\s*(?:\\!)?\})\s*(?=\d{3}(?!\d))", ""),  # separators that can only be of thousands
        (rf"\\(?:displaystyle|limits|left|right|[bB]igg?[lrm]?){_END}|(?<!\\)\\!", ""),
        (rf"(?<!\\)\\[,;: ]|~|\\q?quad{_END}", " "),
        (r"\{,\s*\}", ","),
        (rf"\\[dtc]frac{_END}", r"\\frac"),
        (r"\\frac\s*(\d)\s*(?=[\d{])", r"\\frac{\1}"),
        (r"\\frac\s*(\{[^{}]*\})\s*(\d)", r"\\frac\1{\2}"),
        (r"\\(?:mbox|textbf|textit|textrm|textnormal|mathrm|mathbf|mathit|operatorname)\s*\{", r"\\text{"),
        (rf"\\lt{_END}", "<"),
        (rf"\\gt{_END}", ">"),
        (rf"\\(?:leqslant|le){_END}|<=", r"\\leq "),
        (rf"\\(?:geqslant|ge){_END}|>=", r"\\geq "),
        (rf"\\ne{_END}|!=", r"\\neq "),
        (rf"\\div{_END}", "/"),
        (r"\\%", "%"),
        (rf"(?<![\\a-zA-Z])(?:np\.)?(sqrt|arcsin|arccos|arctan|sin|cos|tan|log|ln|pi){_END}", r"\\\1"),
        (rf"(?<![\\a-zA-Z])(?:infty|infinity){_END}", r"\\infty"),
        (r"(?:√|\\sqrt)\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"√\s*(\d+(?:\.\d+)?|[a-zA-Z])", r"\\sqrt{\1}"),
        (r"√", r"\\sqrt "),
        (r"(\d\.?)\s*[eE]\s*([+-]?\d+)(?![\d.])", r"\1\\times 10^{\2}"),
        (r"(\d\.?)\s*[x*]\s*10\s*\^", r"\1\\times 10^"),
        (r"\\text\s*\{\s*,?\s*(and|or)\s*\}|\b(and|or)\b", r" \1\2 "),
        (r";", ","),
        (r"\s+", " "),
    ]
]
_TRIGONOMETRY = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)")
_DEGREE = re.compile(r"\s*(?:\^\s*(?:\{\s*\\circ\s*\}|\\circ)|\\text\s*\{\s*degrees?\s*\}|\bdegrees?\b)")
_TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")


def clean(text: str) -> str:
    r"""One spelling of an answer; spaces that may matter (`3 1/2`) stay, and so does \text{} around words.

    Compatibility characters are folded (NFKC), but a superscript, subscript or fraction in one character keeps its
    meaning. Thin spaces, delimiters, currency signs, degrees and a final stop go; `4.5e33` becomes a product with a
    power of ten.

    >>> clean("$−\\dfrac{1}{2}\\,$."), clean("x² + 90°"), clean("4.5e33")
    ('-\\frac{1}{2}', 'x^{2} + 90', '4.5\\times 10^{33}')
    """
    text = fold_characters(text)
    for pattern, spelling in _SPELLINGS:
        text = pattern.sub(spelling, text)
    if not _TRIGONOMETRY.search(text):
        text = _DEGREE.sub("", text)
    return text.strip().rstrip(".\\").strip()


def fold_characters(text: str) -> str:
    r"""ASCII and LaTeX for the Unicode characters that mathematics is written in.

    >>> fold_characters("2½ ≤ √5"), fold_characters("x¹²")
    ('2 \\frac{1}{2} \\leq  √5', 'x^{12}')
    """
    text = _SUPERSCRIPTS.sub(lambda run: f"^{{{_nfkc(run[0])}}}", text)
    text = _SUBSCRIPTS.sub(lambda run: f"_{{{_nfkc(run[0])}}}", text)
    return "".join(_fold(character) for character in text)


def _fold(character: str) -> str:
    if character.isascii():
        return character
    if character in _CHARACTERS:
        return _CHARACTERS[character]
    if unicodedata.category(character) == "Cf":  # zero-width characters, soft hyphens, direction marks
        return ""
    above, slash, below = _nfkc(character).partition("⁄")
    return f" \\frac{{{above}}}{{{below}}}" if slash else above


def _nfkc(text: str) -> str:
    return unicodedata.normalize("NFKC", text).replace("−", "-")


def without_text(text: str) -> str:
    r"""The words of every \text{} bare.

    >>> without_text(r"5 \text{ cm}")
    '5  cm'
    """
    return _TEXT.sub(r"\1", text)


def compact(text: str) -> str:
    r"""Without spaces and \text{}: what is then equal is the same answer.

    >>> compact(r"\text{June }20") == compact("June 20")
    True
    """
    return re.sub(r"\s+", "", without_text(text))
