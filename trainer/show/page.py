"""Pages: jinja2 templates with autoescape, one stylesheet, the colours of show/figure, the words of show/units.

A page is one file that needs nothing beside itself: no script, no font, no picture from elsewhere. Templates hold the
prose and the layout; what they show is computed before, in Python.
"""

import functools
import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.show import figure, units

if TYPE_CHECKING:
    from jinja2 import Environment

TEMPLATES = Path(__file__).parent / "templates"


def render(template: str, **values: Any) -> str:
    """Return the HTML document of show/templates/`template`.

    Every value is escaped unless the template marks it as safe. Raises jinja2.UndefinedError if the template asks for
    a value that is not there.
    """
    return _environment().get_template(template).render(values)


@functools.cache
def _environment() -> "Environment":
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    # StrictUndefined: a misspelt name is an error, not an empty place on the page.
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # Every public function of units is a filter: {{ rung.flops | flops }}.
    environment.filters |= {
        name: function
        for name, function in inspect.getmembers(units, inspect.isfunction)
        if not name.startswith("_")
    }  # fmt: skip
    environment.globals |= {"units": units, "palette": figure.PALETTE}
    return environment
