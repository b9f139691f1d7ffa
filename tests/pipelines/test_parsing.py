"""JSON and TOML are parsed within limits; within these, Python's own parsers are the reference."""

import json
import tomllib

import pytest

from fastdeit.config import Recipe
from fastdeit.pipelines.parsing import MAX_DEPTH, parse_json, parse_toml
from fastdeit.recipes import RECIPES


@pytest.mark.parametrize(
    "text",
    [
        "{}", "[]", "0", '"🦊 é \\ud83e\\udd8a"', '{"a": [1, -2.5e3, null, true, NaN], "b": {"c": "d,e:[{"}}',
        "9" * 100, "[" * MAX_DEPTH + "]" * MAX_DEPTH, json.dumps(list(range(10_000))),
    ],
)  # fmt: skip
def test_json_within_the_bounds_is_pythons(text):
    assert repr(parse_json(text)) == repr(json.loads(text))
    assert repr(parse_json(text.encode())) == repr(json.loads(text))
    assert repr(parse_json(b"\xef\xbb\xbf" + text.encode())) == repr(json.loads(text))


def test_recipes_are_within_the_bounds():
    for make in RECIPES.values():
        values = make().to_dict()
        assert Recipe(**parse_json(json.dumps(values, indent=2))) == Recipe(**json.loads(json.dumps(values)))
    text = 'name = "x"\n[run]\nepochs = 300\noutput = "~/a.b/c"\n[augment]\nmean = [0.5, 0.5, 0.5]\n'
    assert parse_toml(text) == tomllib.loads(text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 65 + "]" * 65, "nested more than 64 deep"),
        ('{"a":' * 65 + "0" + "}" * 65, "nested more than 64 deep"),
        ("[" * 10_000, "nested more than 64 deep"),
        ("1" * 101, "an integer of 101 digits"),
        ("-" + "1" * 100, "an integer of 101 digits"),
        ("[" + "0," * 300_000 + "0]", "about 300001 values, above the limit of 262144"),
        (" " * 1_000_001, "1000001 bytes, above the limit of 1000000"),
        ("[1", "Expecting"),
    ],
)
def test_json_beyond_the_bounds(text, reason):
    with pytest.raises(ValueError, match=reason):
        parse_json(text, 1_000_000)


@pytest.mark.parametrize(
    "text", ["a = " + "[" * 65 + "]" * 65, "a = " + "{a = " * 65 + "1" + "}" * 65, "a" + ".a" * 201 + " = 1"]
)
def test_toml_beyond_the_bounds(text):
    with pytest.raises(ValueError, match=r"nested more than 64 deep|line 1 has more than 200 dots"):
        parse_toml(text)
    tomllib.loads(text)
