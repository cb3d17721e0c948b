"""An SVG that shapes and words are added to: the paper of ``drawings``."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

STYLE = """
.card { fill: #ffffff; stroke: #d0d7de }
.box { fill: #f3f5f8; stroke: #aab4c0 }
text { fill: #1f2328; font: 14px system-ui, "Segoe UI", Helvetica, Arial, sans-serif }
.head { font-weight: 600; font-size: 15px }
.small { font-size: 12px; fill: #59636e }
.on { fill: #ffffff; font-size: 12px; font-weight: 600 }
.line { stroke: #59636e; stroke-width: 1.6; fill: none }
.tip { fill: #59636e }
.faint { fill: #e4e8ed }
.edge { fill: none; stroke: #1f2328; stroke-width: 1.8 }
.r0 { fill: #3569c9 } .r1 { fill: #c2611f } .r2 { fill: #2c8159 } .r3 { fill: #8a4fb8 }
@media (prefers-color-scheme: dark) {
  .card { fill: #171b22; stroke: #3d444d }
  .box { fill: #22272f; stroke: #59636e }
  text { fill: #e6edf3 }
  .small { fill: #9da7b3 }
  .on { fill: #ffffff }
  .line { stroke: #9da7b3 }
  .tip { fill: #9da7b3 }
  .faint { fill: #2a3038 }
  .edge { stroke: #e6edf3 }
}
"""


class Canvas:
    """An SVG of a fixed size, to which shapes and words are added in the order of painting."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.width, self.height = width, height
        self.title = title
        self.shapes: list[str] = []
        self.rect(0.5, 0.5, width - 1, height - 1, "card", radius=10)

    def rect(self, x: float, y: float, w: float, h: float, kind: str, word: str = "", radius: float = 3) -> None:
        self.shapes.append(f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="{radius}" class="{kind}"/>')
        if word:
            self.text(x + w / 2, y + h / 2 + 4.5, word, "on" if kind[0] == "r" else "", "middle")

    def text(self, x: float, y: float, word: str, kind: str = "", anchor: str = "start") -> None:
        self.shapes.append(f'<text x="{x}" y="{y}" class="{kind}" text-anchor="{anchor}">{escape(word)}</text>')

    def lines(self, x: float, y: float, words: Sequence[str], kind: str = "", anchor: str = "start") -> None:
        for number, word in enumerate(words):
            self.text(x, y + 18 * number, word, kind, anchor)

    def arrow(self, *points: tuple[float, float]) -> None:
        """A line through the points with a tip at its end."""
        path = " L".join(f"{x} {y}" for x, y in points)
        self.shapes.append(f'<path d="M{path}" class="line" marker-end="url(#tip)"/>')

    def svg(self) -> str:
        tip = (
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            'orient="auto-start-reverse"><path d="M0 0 L8 4 L0 8 z" class="tip"/></marker></defs>'
        )
        start = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" '
            f'width="{self.width}" height="{self.height}" role="img">'
        )
        body = "\n".join(self.shapes)
        return f"{start}\n<title>{escape(self.title)}</title>\n<style>{STYLE}</style>\n{tip}\n{body}\n</svg>\n"
