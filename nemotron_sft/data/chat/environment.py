"""The Jinja environment of chat templates, with generation tags turned into marks in the text."""

from __future__ import annotations

import json
import re
import secrets
from datetime import datetime
from typing import Any

from nemotron_sft.errors import UserError

# `{% generation %}` blocks become plain Jinja that prints these around the trained text; random, so that no
# conversation can contain them.
OPEN, CLOSE = (f"\x02{secrets.token_hex(8)}\x03" for _ in range(2))
TAG = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")


def _marker(tag: re.Match) -> str:
    left, end, right = tag.groups()
    if end:
        return f"{{%{left} if true %}}{CLOSE}{{% endif %}}{{% endwith {right}%}}"
    return f"{{%{left} with %}}{{% if true %}}{OPEN}{{% endif {right}%}}"


def unmarked(text: str) -> str:
    """A rendering without the marks."""
    return text.replace(OPEN, "").replace(CLOSE, "")


def compile_template(name: str, source: str) -> tuple[Any, set[str]]:
    """A template with OPEN and CLOSE in place of its generation tags, and the variables that it reads.

    Compiled in the environment that transformers gives to chat templates. Raises UserError for what is no valid Jinja.
    """
    from jinja2 import TemplateSyntaxError
    from jinja2.ext import loopcontrols
    from jinja2.meta import find_undeclared_variables
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    try:
        marked = TAG.sub(_marker, source)
        unknown = find_undeclared_variables(environment.parse(marked))
        compiled = environment.from_string(marked)
    except TemplateSyntaxError as error:
        message = (error.message or "").replace("endwith", "endgeneration")
        raise UserError(f"{name}:{error.lineno}: not a valid Jinja template: {message}") from None
    return compiled, unknown


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
