"""Rendering of the prompt texts in `codjax/envs/templates/`.

A template that names a value it is not given raises instead of leaving a hole in a prompt.
"""

from __future__ import annotations

import functools
import pathlib
from typing import Any

import jinja2


def render(name: str, **values: Any) -> str:
    """The text of the template `name` (a file name) with its values filled in."""
    return _environment().get_template(name).render(**values)


@functools.cache
def _environment() -> jinja2.Environment:
    folder = pathlib.Path(__file__).parent / "templates"
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        undefined=jinja2.StrictUndefined,
        autoescape=False,  # prompts are plain text
        trim_blocks=True,
        lstrip_blocks=True,
    )
