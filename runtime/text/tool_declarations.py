"""Tool declarations as TypeScript: the form in which Kimi K2.5 and later saw tools (`tools_ts_str`).

Output, for one tool:

    # Tools

    ## functions
    namespace functions {
    // What the tool does
    type get_weather = (_: {
      // City name
      city: string,
      unit?: "c" | "f"
    }) => any;
    }

Required properties come first, then the optional ones, each group sorted by name. `$defs` become interfaces,
in the order of the schema. The layout is that of K2.5's own tokenizer; another layout costs accuracy.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

Schema = dict[str, Any]

_INDENT = "  "
_SCALARS = {"integer": "number"}
_UNION_MEMBERS = {
    "string": "string",
    "number": "number",
    "integer": "number",
    "boolean": "boolean",
    "null": "null",
    "object": "{}",
    "array": "Array<any>",
}
_CONSTRAINTS = {
    "string": ("maxLength", "minLength", "pattern"),
    "number": ("maximum", "minimum"),
    "integer": ("maximum", "minimum"),
    "array": ("maxItems", "minItems"),
}


class UnsupportedSchema(ValueError):
    """A JSON Schema that the TypeScript form cannot express; the template then prints JSON instead."""


def typescript_declarations(tools: Sequence[dict[str, Any]]) -> str:
    """The declarations of `tools` (`{"type": "function", "function": {...}}`); an empty string without tools.

    Raises:
        UnsupportedSchema: a parameter's schema has no type, or refers to an unknown definition.
    """
    functions = [tool["function"] for tool in tools if tool.get("type") == "function"]
    if not functions:
        return ""
    body = "\n".join(_function(function) for function in functions)
    return f"# Tools\n\n## functions\nnamespace functions {{\n{body}\n}}\n"


@dataclass
class _Scope:
    """What a tool's schemas have in common.

    Attributes:
        definitions: the `$defs` found so far.
        refers_to_root: whether a schema refers to the tool's whole parameters (`#`).
    """

    definitions: dict[str, Schema] = field(default_factory=dict)
    refers_to_root: bool = False

    def name(self, ref: str) -> str:
        """The TypeScript name for a `$ref`."""
        if ref == "#":
            self.refers_to_root = True
            return "parameters"
        name = ref.removeprefix("#/$defs/")
        if name == ref or name not in self.definitions:
            raise UnsupportedSchema(f"$ref {ref!r} refers to nothing")
        return name


def _function(function: dict[str, Any]) -> str:
    scope = _Scope()
    root = function.get("parameters") or {}
    if not isinstance(root, dict):
        raise UnsupportedSchema(f"parameters = {root!r}")
    parameters = _object(root, scope, "")
    lines = []
    if scope.refers_to_root:
        lines.append(f"interface parameters {_root_interface(root, scope)}")
        parameters = "parameters"
    for name, schema in list(scope.definitions.items()):
        lines += _comment(schema.get("description"), "")
        lines.append(f"interface {name} {_type(schema, scope, '')}")
    lines += _comment(function.get("description"), "")
    lines.append(f"type {function['name']} = (_: {parameters}) => any;")
    return "\n".join(lines)


def _root_interface(root: Schema, scope: _Scope) -> str:
    """As `_object`, but with the properties in the order of the schema."""
    required = set(root.get("required", ()))
    properties = root.get("properties", {}).items()
    members = [_member(name, schema, name in required, scope, _INDENT) for name, schema in properties]
    return "{\n" + ",\n".join(members) + "\n}" if members else "{}"


def _type(schema: object, scope: _Scope, indent: str) -> str:  # noqa: PLR0911 - one line per kind of schema
    if isinstance(schema, bool):
        return "any" if schema else "null"
    if not isinstance(schema, dict):
        raise UnsupportedSchema(f"schema {schema!r}")
    if "$ref" in schema:
        return scope.name(schema["$ref"])
    if "anyOf" in schema:
        return " | ".join(_type(member, scope, indent) for member in schema["anyOf"])
    if "enum" in schema:
        return _enum(schema)
    kind = schema.get("type")
    if isinstance(kind, list):
        return " | ".join(_union_member(member) for member in kind)
    if kind == "object":
        return _object(schema, scope, indent)
    if kind == "array":
        return _array(schema, scope, indent)
    if isinstance(kind, str):
        return _SCALARS.get(kind, kind)
    if schema:
        raise UnsupportedSchema(f"schema without a type: {json.dumps(schema)}")
    return "any"


def _enum(schema: Schema) -> str:
    return " | ".join(f'"{value}"' if isinstance(value, str) else str(value) for value in schema["enum"])


def _union_member(kind: str) -> str:
    if kind not in _UNION_MEMBERS:
        raise UnsupportedSchema(f"type {kind!r}")
    return _UNION_MEMBERS[kind]


def _object(schema: Schema, scope: _Scope, indent: str) -> str:
    scope.definitions |= schema.get("$defs") or {}
    inner = indent + _INDENT
    required = set(schema.get("required", ()))
    properties = sorted(
        (schema.get("properties") or {}).items(), key=lambda item: (item[0] not in required, item[0])
    )
    members = [_member(name, value, name in required, scope, inner) for name, value in properties]
    extra = schema.get("additionalProperties")
    if extra is not None:
        kind = "never" if extra is False else _type(extra, scope, inner)
        members.append(f"{inner}[k: string]: {kind}")
    return "{\n" + ",\n".join(members) + f"\n{indent}}}" if members else "{}"


def _member(name: str, schema: object, required: bool, scope: _Scope, indent: str) -> str:
    lines = _doc(schema, indent)
    default = schema.get("default") if isinstance(schema, dict) else None
    if default is not None:
        lines.append(f"{indent}// Default: {_default(default)}")
    lines.append(f"{indent}{name}{'' if required else '?'}: {_type(schema, scope, indent)}")
    return "\n".join(lines)


def _default(value: object) -> str:
    return repr(value) if isinstance(value, int | float) else json.dumps(value, ensure_ascii=False)


def _array(schema: Schema, scope: _Scope, indent: str) -> str:
    items = schema.get("items") or {}
    doc = _doc(items, indent + _INDENT)
    if not doc:
        return f"Array<{_type(items, scope, indent)}>"
    inner = indent + _INDENT
    return "\n".join(["Array<", *doc, f"{inner}{_type(items, scope, inner)}", f"{indent}>"])


def _doc(schema: object, indent: str) -> list[str]:
    """Description and limits of a schema as comment lines."""
    if not isinstance(schema, dict):
        return []
    lines = _comment(schema.get("description"), indent)
    plain = "$ref" not in schema and "anyOf" not in schema and "enum" not in schema
    kind = schema.get("type")
    names = _CONSTRAINTS.get(kind, ()) if plain and isinstance(kind, str) else ()
    limits = ", ".join(f"{name}: {schema[name]}" for name in names if name in schema)
    return [*lines, f"{indent}// {limits}"] if limits else lines


def _comment(text: object, indent: str) -> list[str]:
    if not isinstance(text, str) or not text:
        return []
    return [f"{indent}// {line}" if line else "" for line in text.split("\n")]
