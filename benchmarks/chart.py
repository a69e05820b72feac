"""Grouped bars as an SVG that reads on light and dark pages, drawn without a library."""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import Mapping, Sequence

__all__ = ["Panel", "bars"]

#: Told apart also by people who do not see all colours (Okabe and Ito, 2008).
_COLOURS = ("#999999", "#0072b2", "#e69f00", "#cc79a7", "#009e73")
_BAR, _GAP, _LEFT, _WIDTH, _ROW = 12, 14, 110, 330, 60


@dataclass(frozen=True)
class Panel:
    """Bars of one measure. series: name -> a value for each group, None where there is none; 1 is marked by a line."""

    title: str
    groups: Sequence[str]
    series: Mapping[str, Sequence[float | None]]


def bars(panels: Sequence[Panel]) -> str:
    """The panels side by side, a legend below."""
    names = list(panels[0].series)
    height_of_group = _BAR * len(names) + _GAP
    height = _ROW + height_of_group * max(len(panel.groups) for panel in panels) + 40
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {(_LEFT + _WIDTH + 60) * len(panels)} {height}" '
        'font-family="sans-serif" font-size="12">',
        "<style>text{fill:#444}line{stroke:#888}@media(prefers-color-scheme:dark){text{fill:#ccc}}</style>",
    ]
    for number, panel in enumerate(panels):
        parts.append(f'<g transform="translate({number * (_LEFT + _WIDTH + 60)},0)">')
        parts += _panel(panel, height_of_group)
        parts.append("</g>")
    for index, name in enumerate(names):
        x = 20 + index * 190
        parts.append(f'<rect x="{x}" y="{height - 22}" width="12" height="12" fill="{_COLOURS[index]}"/>')
        parts.append(f'<text x="{x + 18}" y="{height - 12}">{html.escape(name)}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _panel(panel: Panel, height_of_group: int) -> list[str]:
    values = [value for series in panel.series.values() for value in series if value is not None]
    scale = _WIDTH / max(1.2, *values)
    bottom = _ROW - 16 + height_of_group * len(panel.groups)
    parts = [f'<text x="{_LEFT}" y="24" font-weight="bold">{html.escape(panel.title)}</text>']
    for place, group in enumerate(panel.groups):
        top = _ROW - 10 + place * height_of_group
        middle = top + (height_of_group - _GAP) / 2 + 4
        parts.append(f'<text x="{_LEFT - 8}" y="{middle:.0f}" text-anchor="end">{html.escape(group)}</text>')
        for index, series in enumerate(panel.series.values()):
            value, y = series[place], top + index * _BAR
            if value is None:
                continue
            width = value * scale
            parts.append(
                f'<rect x="{_LEFT}" y="{y}" width="{width:.1f}" height="{_BAR - 2}" fill="{_COLOURS[index]}"/>'
            )
            parts.append(f'<text x="{_LEFT + width + 4:.1f}" y="{y + 9}" font-size="10">{value:.2f}</text>')
    x = _LEFT + scale
    parts.append(f'<line x1="{x:.1f}" y1="{_ROW - 20}" x2="{x:.1f}" y2="{bottom}" stroke-dasharray="4 3"/>')
    return parts
