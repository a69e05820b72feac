"""Reads the docstrings of this package for the reference: arguments value by value, and the texts of options."""

from __future__ import annotations

import ast
import re
from typing import Any

import griffe

#: ``name: what it is`` or ``one, two: what they are`` at the beginning of a line
VALUE = re.compile(r"(?!Source)(\w+(?:, \w+)*): (?=\S)")


class HouseStyle(griffe.Extension):
    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        """Shows a schema's field ``option(default, "its help")`` as the default and the help."""
        call = attr.value
        if isinstance(call, griffe.ExprCall) and str(call.function) == "option" and len(call.arguments) > 1:
            default, text, *_ = call.arguments
            attr.value = default
            attr.docstring = griffe.Docstring(ast.literal_eval(str(text)), parent=attr)

    def on_attribute(self, *, attr: griffe.Attribute, **_: Any) -> None:
        """Gives a typed field the help of its twin in the schema that its class inherits."""
        if attr.docstring is None and isinstance(attr.parent, griffe.Class):
            twins = [base.members.get(attr.name) for base in attr.parent.resolved_bases]
            attr.docstring = next((twin.docstring for twin in twins if twin is not None), None)

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None and not obj.is_attribute:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(text: str) -> str:
    """A docstring whose values are a list and whose Raises and Source begin a paragraph."""
    lines: list[str] = []
    listed = False
    for line in text.splitlines():
        value = VALUE.match(line)
        if value is not None:
            lines += ([] if listed else [""]) + [f"- **{value[1]}**: {line[value.end() :]}"]
            listed = True
        elif line.startswith(("Raises ", "Source: ")) or not line.strip():
            lines += ["", line]
            listed = False
        else:
            lines.append(f"  {line}" if listed else line)
    return "\n".join(lines).strip()
