"""Rows of a LaTeX table as lines with tabs."""

from __future__ import annotations

import re

_COMMANDS = (
    (
        re.compile(r"\\(?:textbf|textit|underline|emph|mathbf|num|text|mathrm)\s*\{([^{}]*)\}"),
        r"\1",
    ),
    (re.compile(r"\\(?:multicolumn\{\d+\}\{[^{}]*\})\{([^{}]*)\}"), r"\1"),
    (re.compile(r"\\pm(?![a-zA-Z])"), "±"),
    (re.compile(r"\\(?:times|cdot)(?![a-zA-Z])"), "×"),
    (re.compile(r"\\(?:approx|sim)(?![a-zA-Z])"), "~"),
    (re.compile(r"\\[,;! ]|(?<=\d)\{,\}"), ""),  # thin spaces between thousands
    (re.compile(r"\^\{([^{}]*)\}"), r"^\1"),
    (re.compile(r"\\([%#&_$])"), r"\1"),
    (re.compile(r"\$|\\[a-zA-Z]+\*?(?:\[[^\]]*\])?(?:\{[^{}]*\})*"), ""),
    (re.compile(r"~(?=\D|$)"), " "),
)


def is_latex(text: str) -> bool:
    r"""Whether a text is a LaTeX table: most of its rows have `&` and end with `\\`."""
    rows = [line for line in text.splitlines() if "&" in line]
    return len(rows) > 1 and sum(r"\\" in line for line in rows) > len(rows) / 2


def latex_to_tabs(text: str) -> str:
    r"""The rows of a LaTeX table with tabs between cells; other lines are blank.

    >>> latex_to_tabs("$70\\times 10^{6}$ & \\textbf{3.1} $\\pm$ 0.01 \\\\ \\hline")
    '70× 10^6\t3.1 ± 0.01'
    """
    lines = []
    for line in text.splitlines():
        row = line.partition(r"\\")[0] if r"\\" in line else ""
        escaped = row.replace(r"\&", "\0")
        cells = [_plain_cell(cell.replace("\0", "&")) for cell in escaped.split("&")]
        lines.append("\t".join(cells) if "&" in escaped else "")
    return "\n".join(lines)


def _plain_cell(cell: str) -> str:
    for pattern, replacement in _COMMANDS:
        cell = pattern.sub(replacement, cell)
    return cell.strip()
