"""matplotlib, loaded when it is needed, with one look for all figures."""

import functools
import io
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from tl_paramdecomp.components.disk import replace_bytes, writing
from tl_paramdecomp.errors import MissingExtraError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.constrained_layout.use": True,
}
Given = ParamSpec("Given")
Made = TypeVar("Made")


def figure(draw: Callable[Given, Made]) -> Callable[Given, Made]:
    """Draw in the package's style, whatever the user's own settings are, and without changing them.

    The decorated function raises MissingExtraError where matplotlib is not installed.
    """

    @functools.wraps(draw)
    def styled(*args: Given.args, **kwargs: Given.kwargs) -> Made:
        try:
            import matplotlib
        except ImportError as error:
            raise MissingExtraError(
                "Figures need matplotlib, which is not installed; pip install 'tl-paramdecomp[plots]'."
            ) from error
        settings: dict[Any, Any] = {**matplotlib.rcParamsDefault, **STYLE}
        with matplotlib.rc_context(settings):
            return draw(*args, **kwargs)

    return styled


def subplots(rows: int, columns: int, size: tuple[float, float], **settings: Any) -> "tuple[Figure, Any]":
    """A figure and its panels [rows, columns], which no window shows and nothing else keeps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=size)
    FigureCanvasAgg(made)
    return made, made.subplots(rows, columns, squeeze=False, **settings)


def save(made: "Figure", path: Path) -> Path:
    """Write a figure as PNG (else DecompositionFileError)."""
    drawn = io.BytesIO()
    made.savefig(drawn, dpi=150)
    with writing(f"Could not write {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
    replace_bytes(path, drawn.getvalue())
    return path
