import pytest

from moebox.runtime.text.tool_declarations import UnsupportedSchema, typescript_declarations


def declare(parameters, **function):
    text = typescript_declarations(
        [{"type": "function", "function": {"name": "f", "parameters": parameters, **function}}]
    )
    return text.removeprefix("# Tools\n\n## functions\nnamespace functions {\n").removesuffix("\n}\n")


def properties(required=(), **members):
    return {"type": "object", "properties": members, "required": list(required)}


def test_no_tools_declare_nothing():
    assert typescript_declarations([]) == ""
    assert typescript_declarations([{"type": "_plugin"}]) == ""


def test_two_tools_share_a_namespace():
    tools = [{"type": "function", "function": {"name": name}} for name in "ab"]
    assert typescript_declarations(tools) == (
        "# Tools\n\n## functions\nnamespace functions {\n"
        "type a = (_: {}) => any;\ntype b = (_: {}) => any;\n}\n"
    )


def test_required_first_each_by_name():
    text = declare(properties(["z", "b"], z={"type": "integer"}, a={"type": "boolean"}, b={"type": "null"}))
    assert text == "type f = (_: {\n  b: null,\n  z: number,\n  a?: boolean\n}) => any;"


def test_descriptions_limits_and_defaults_are_comments():
    city = {"type": "string", "description": "City\n\nname", "default": "Köln"}
    city |= {"minLength": 1, "maxLength": 9}
    days = {"type": "integer", "minimum": 0, "default": 3}
    text = declare(properties(city=city, days=days), description="Weather\nof a city")
    assert text == (
        "// Weather\n// of a city\n"
        "type f = (_: {\n"
        '  // City\n\n  // name\n  // maxLength: 9, minLength: 1\n  // Default: "Köln"\n  city?: string,\n'
        "  // minimum: 0\n  // Default: 3\n  days?: number\n"
        "}) => any;"
    )


def test_enums_unions_and_any_of():
    text = declare(
        properties(
            a={"enum": ["x", 2, None, True]},
            b={"type": ["string", "null", "array", "object"]},
            c={"anyOf": [{"type": "integer"}, {"type": "array", "items": {"type": "string"}}]},
            d={},
            e=True,
        )
    )
    assert text == (
        'type f = (_: {\n  a?: "x" | 2 | None | True,\n  b?: string | null | Array<any> | {},\n'
        "  c?: number | Array<string>,\n  d?: any,\n  e?: any\n}) => any;"
    )


def test_nested_objects_and_arrays():
    inner = properties(["k"], k={"type": "number"})
    commented = {"type": "array", "items": {"type": "string", "description": "One"}, "minItems": 1}
    text = declare(
        properties(
            objects={"type": "array", "items": inner},
            strings=commented,
            extra={"type": "object", "additionalProperties": {"type": "string"}},
            closed={"type": "object", "additionalProperties": False},
        )
    )
    assert text == (
        "type f = (_: {\n"
        "  closed?: {\n    [k: string]: never\n  },\n"
        "  extra?: {\n    [k: string]: string\n  },\n"
        "  objects?: Array<{\n    k: number\n  }>,\n"
        "  // minItems: 1\n  strings?: Array<\n    // One\n    string\n  >\n"
        "}) => any;"
    )


def test_definitions_become_interfaces_in_their_order():
    text = declare(
        properties(z={"$ref": "#/$defs/Zebra"}, a={"$ref": "#/$defs/Apple"})
        | {
            "$defs": {
                "Zebra": properties(stripes={"type": "integer"}) | {"description": "Striped"},
                "Apple": properties(other={"$ref": "#/$defs/Zebra"}),
            }
        },
        description="Zoo",
    )
    assert text == (
        "// Striped\ninterface Zebra {\n  stripes?: number\n}\n"
        "interface Apple {\n  other?: Zebra\n}\n"
        "// Zoo\ntype f = (_: {\n  a?: Apple,\n  z?: Zebra\n}) => any;"
    )


def test_a_schema_that_refers_to_itself_is_named_parameters():
    text = declare(properties(next={"$ref": "#"}, a={"type": "string"}))
    interface = "interface parameters {\n  next?: parameters,\n  a?: string\n}\n"
    assert text == interface + "type f = (_: parameters) => any;"


@pytest.mark.parametrize(
    "schema",
    [{"$ref": "#/$defs/Missing"}, {"$ref": "other.json"}, {"title": "no type"}, {"type": ["odd"]}, "text"],
)
def test_a_schema_that_typescript_cannot_express_is_refused(schema):
    with pytest.raises(UnsupportedSchema):
        declare(properties(x=schema))
