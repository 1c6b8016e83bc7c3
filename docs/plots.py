"""The plots of the documentation, drawn from the tables of performance.md.

    python docs/plots.py

writes docs/images/*.svg. Text takes the colour that suits a light or a dark page.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from html import escape
from pathlib import Path

DOCS = Path(__file__).parent
WIDTH, LABELS, BAR, GAP = 760, 230, 16, 14
COLOURS = {"other": "#9aa0a6", "kt_moe bf16": "#0f9d8a", "kt_moe int4": "#6366f1"}
STEPS = "| s a step, tokens/s; over RoundPipe |"
LAYER = "| E | T | kt_moe forward / backward | tokens/s | share |"
STYLE = (
    ".card{fill:#fff}text{font-family:system-ui,sans-serif;font-size:13px;fill:#24292f}.title{font-size:15px;font-weight:600}"
    ".note{font-size:11px;fill:#6e7781}"
    "@media(prefers-color-scheme:dark){.card{fill:#161b22}text{fill:#e6edf3}.note{fill:#9198a1}}"
)


@dataclass(frozen=True)
class Bar:
    """A bar: its group, its name in the group, its length, and what is written behind it."""

    group: str
    name: str
    value: float
    text: str


def table(start: str, text: str) -> list[list[str]]:
    """The rows of the Markdown table whose header begins with `start`, the header first."""
    found = re.search(rf"^{re.escape(start)}.*\n\|[-|: ]+\|\n((?:\|.*\n)+)", text, re.MULTILINE)
    if found is None:
        raise SystemExit(f"docs/plots.py: no table in performance.md begins with {start!r}")
    rows = [found.group().splitlines()[0], *found.group(1).splitlines()]
    return [[re.sub(r"\*\*", "", cell).strip() for cell in row.strip("|").split("|")] for row in rows]


def steps(text: str) -> list[Bar]:
    """Tokens a second of whole training steps on one GPU."""
    header, *rows = table(STEPS, text)
    bars = []
    for column, tokens in enumerate(header[1:4], 1):
        for row in rows:
            rate = re.search(r"\d, ([\d,]+)", row[column])
            name = row[0]
            if rate and name.startswith(("RoundPipe", "kt_moe")):
                value = float(rate.group(1).replace(",", ""))
                group = f"{tokens.removesuffix(' tokens')} tokens a step"
                bars.append(Bar(group, name, value, f"{value:,.0f} tokens/s"))
    return bars


def ratios(start: str, column: str, text: str) -> list[Bar]:
    """How many times as fast as another implementation one layer is, by experts and tokens."""
    header, *rows = table(start, text)
    place = header.index(column)
    bars = []
    for row in rows:
        if found := re.match(r"\d+(\.\d+)?", row[place]):
            tokens = f"{row[1]} token{'s' * (row[1] != '1')}"
            shape = f"{row[0].partition(',')[0]} experts, {tokens}"
            bars.append(Bar("", shape, float(found.group()), f"{found.group()} times"))
    return bars


def draw(title: str, note: str, bars: list[Bar]) -> str:
    """An SVG of horizontal bars, longest to the right edge."""
    most = max(bar.value for bar in bars)
    room = WIDTH - LABELS - 130
    parts = [f'<text class="title" x="0" y="18">{escape(title)}</text>']
    y, group = 34, None
    for bar in bars:
        if bar.group != group:
            if bar.group:
                y += GAP + 6
                parts.append(f'<text x="0" y="{y}">{escape(bar.group)}</text>')
                y += 6
            group = bar.group
        colour = COLOURS.get(bar.name, COLOURS["kt_moe bf16"] if not bar.group else COLOURS["other"])
        length = round(room * bar.value / most)
        parts.append(
            f'<text x="{LABELS - 8}" y="{y + 13}" text-anchor="end">{escape(bar.name)}</text>'
            f'<rect x="{LABELS}" y="{y}" width="{length}" height="{BAR}" rx="2" fill="{colour}"/>'
            f'<text x="{LABELS + length + 6}" y="{y + 13}">{escape(bar.text)}</text>'
        )
        y += BAR + 4
    parts.append(f'<text class="note" x="0" y="{y + 18}">{escape(note)}</text>')
    box = f'x="-16" y="-10" width="{WIDTH + 32}" height="{y + 46}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-16 -10 {WIDTH + 32} {y + 46}" '
        f'width="{WIDTH + 32}" role="img" aria-label="{escape(title)}"><style>{STYLE}</style>'
        f'<rect class="card" {box} rx="8"/>{"".join(parts)}</svg>\n'
    )


def measured(start: str, text: str) -> str:
    """The last date that stands before a table."""
    return re.findall(r"\d{4}-\d\d-\d\d", text[: text.index(start)])[-1]


def plots(text: str) -> dict[str, str]:
    """SVGs by file name."""
    zen5, amx = (f"{LAYER} {column}" for column in ("over torch |", "kt-kernel forward / backward |"))
    layer = "One layer, forward and backward: kt_moe over kt-kernel 0.7.2"
    shape = "H 2048, I 768, 8 experts a token, bf16, LoRA r = 16. Measured on"
    return {
        "steps.svg": draw(
            "LoRA on all 48 layers of Qwen3-30B-A3B's shape, one H200 beside 16 CPUs",
            f"Whole training steps, 2.4 GiB of GPU memory for experts. Measured on {measured(STEPS, text)}.",
            steps(text),
        ),
        "layer-zen5.svg": draw(
            f"{layer}, 2 cores of Zen 5",
            f"{shape} {measured(zen5, text)}.",
            ratios(zen5, "over kt-kernel", text),
        ),
        "layer-amx.svg": draw(
            f"{layer}, 16 CPUs with AMX",
            f"{shape} {measured(amx, text)}. 8 experts: H 7168, I 2048.",
            ratios(amx, "over kt-kernel", text),
        ),
    }


def main() -> None:
    """Write them all."""
    text = (DOCS / "performance.md").read_text(encoding="utf-8")
    for name, svg in plots(text).items():
        (DOCS / "images" / name).write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    main()
