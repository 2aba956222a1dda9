"""The page's two themes as CSS variables, and the heat map's scale between them."""

from __future__ import annotations

from sickbay.report.heatmap import LEVELS

LIGHT = {
    "paper": "#fcfcfb", "panel": "#ffffff", "sunk": "#f3f4f2", "ink": "#1c2126", "muted": "#5d666f", "rule": "#e1e4e3",
    "critical": "#b3261e", "warning": "#8f5b00", "note": "#1f5fa8", "sick": "#b3261e", "healthy": "#1c6b45", "unexamined": "#8f5b00",
    "first": "#0b6e6e", "second": "#b0622a", "third": "#7a838c", "lost": "#d81b60", "tint": "7%",
}  # fmt: skip
DARK = {
    "paper": "#121517", "panel": "#191d20", "sunk": "#20262a", "ink": "#e5e8ea", "muted": "#9aa4ad", "rule": "#2c3338",
    "critical": "#ff8a80", "warning": "#f0b45a", "note": "#8ab8f0", "sick": "#ff8a80", "healthy": "#78cfa2", "unexamined": "#f0b45a",
    "first": "#4fc3b8", "second": "#e5a06b", "third": "#8b959e", "lost": "#ff5c93", "tint": "12%",
}  # fmt: skip
# Pale to deep on light paper, deep to bright on dark: the largest value is always the furthest from the background.
LIGHT_SCALE = ((232, 240, 236), (120, 190, 180), (32, 120, 132), (44, 52, 110), (44, 14, 60))
DARK_SCALE = ((30, 38, 44), (28, 78, 92), (34, 138, 132), (150, 196, 96), (253, 231, 110))


def theme_css() -> str:
    """The variables of both themes; the reader's system chooses."""
    light = f":root{{color-scheme:light dark;{_variables(LIGHT)}}}{_scale(LIGHT_SCALE)}"
    dark = f"@media (prefers-color-scheme:dark){{:root{{{_variables(DARK)}}}{_scale(DARK_SCALE)}}}"
    return light + "\n" + dark


def _variables(theme: dict[str, str]) -> str:
    return "".join(f"--{name}:{value};" for name, value in theme.items())


def _scale(stops: tuple[tuple[int, int, int], ...]) -> str:
    return "".join(f".q{level}{{fill:{_between(stops, level / (LEVELS - 1))}}}" for level in range(LEVELS))


def _between(stops: tuple[tuple[int, int, int], ...], share: float) -> str:
    position = share * (len(stops) - 1)
    left = min(int(position), len(stops) - 2)
    part = position - left
    return "#" + "".join(f"{round(a + (b - a) * part):02x}" for a, b in zip(stops[left], stops[left + 1]))
