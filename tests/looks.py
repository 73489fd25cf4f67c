"""Whether what a figure says can be read."""

from __future__ import annotations

from itertools import combinations

from matplotlib.figure import Figure
from matplotlib.text import Text


def assert_readable(figure: Figure) -> None:
    """It is as wide as a column of text, no letter is tiny, nothing sticks out of it, and no names
    of panels and axes lie on each other."""
    figure.canvas.draw()
    drawn, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert width == 5.5
    assert drawn.x0 > -0.01 and drawn.x1 < width + 0.01
    assert drawn.y0 > -0.01 and drawn.y1 < height + 0.01
    texts = [one for one in figure.findobj(Text) if one.get_text().strip() and one.get_visible()]
    assert min(text.get_fontsize() for text in texts) >= 6
    axes = [axis for axis in figure.axes if axis.axison]
    names = [name for axis in axes for name in (axis.title, axis.xaxis.label, axis.yaxis.label)]
    names = [name for name in names if name.get_text()]
    for one, other in combinations(names, 2):
        apart = not one.get_window_extent().overlaps(other.get_window_extent())
        assert apart, (one.get_text(), other.get_text())
