"""Makes the reference of what the code says: fields are described by their comments, examples are code.

A field of a dataclass is described behind it, ``keep: Tensor  # [n, K] int64``, on the lines above it, or in its
``help_text(...)``. mkdocstrings shows docstrings alone, so these become the section "Attributes" of a class.
"""

import ast
import io
import re
import tokenize
from typing import Any

import griffe

EXAMPLE = re.compile(r"(?:^>>> .*\n?(?:^(?!>>>)\S.*\n?)*)+", re.M)


class Docstrings(griffe.Extension):
    """Changes docstrings after their source was read, and before anything is rendered."""

    def on_class_members(self, *, cls: griffe.Class, **_: Any) -> None:
        """Describe the fields of a class."""
        fields = [member for member in cls.attributes.values() if not member.name.startswith("_")]
        texts = {field.name: describe(field) for field in fields if field.docstring is None}
        types = {field.name: re.sub(r"^InitVar\[(.*)\]$", r"\1", str(field.annotation)) for field in fields}
        lines = [f"    {name} ({types[name]}): {text}" for name, text in texts.items() if text]
        if lines and cls.docstring is not None:
            cls.docstring.value += "\n\nAttributes:\n" + "\n".join(lines)

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Fence examples, which begin with ``>>>``."""
        if obj.docstring is not None:
            obj.docstring.value = EXAMPLE.sub(
                lambda found: f"```python\n{found[0].rstrip()}\n```\n", obj.docstring.value
            )


def describe(field: griffe.Attribute) -> str:
    """What the source says of a field, in one line; empty where it says nothing."""
    try:
        statement = ast.parse("\n".join(field.lines).strip()).body[0]
    except SyntaxError:
        return ""
    call = statement.value if isinstance(statement, ast.AnnAssign) else None
    if isinstance(call, ast.Call) and ast.unparse(call.func) == "field":
        given = {keyword.arg: keyword.value for keyword in call.keywords}
        text = given.get("metadata")
        if isinstance(text, ast.Call) and ast.unparse(text.func) == "help_text":
            field.value = ast.unparse(given["default"]) if "default" in given else None
            return str(ast.literal_eval(text.args[0]))
    if field.lineno is None:
        return ""
    return comment_behind(field.lines) or comment_above(field.lines_collection[field.filepath], field.lineno)


def comment_behind(lines: list[str]) -> str:
    """The text of the last comment in the source of one statement."""
    tokens = tokenize.generate_tokens(io.StringIO("\n".join(line.strip() for line in lines) + "\n").readline)
    comments = [token.string for token in tokens if token.type == tokenize.COMMENT]
    return comments[-1].lstrip("# ") if comments else ""


def comment_above(source: list[str], lineno: int) -> str:
    """The comment on the lines just before a line, counted from 1."""
    first = lineno - 1
    while first > 0 and source[first - 1].lstrip().startswith("#"):
        first -= 1
    return " ".join(line.strip().lstrip("# ") for line in source[first : lineno - 1])
