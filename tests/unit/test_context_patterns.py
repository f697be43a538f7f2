"""Patterns of file names and the rules of .dockerignore, as documented and at large."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandmartin.context.patterns import IgnoreRules, Pattern, is_pattern
from sandmartin.context.source import InvalidBuild


@pytest.mark.parametrize(
    ("pattern", "matching", "other"),
    [
        ("a", ["a"], ["b", "a/b", "ab"]),
        ("*.py", ["x.py", ".py"], ["d/x.py", "x.pyc"]),
        ("*/temp*", ["d/temp", "d/temporary.txt"], ["temp", "a/b/temp"]),
        ("temp?", ["tempa"], ["temp", "tempab", "temp/"]),
        ("**/*.go", ["x.go", "a/x.go", "a/b/c/x.go"], ["x.goo", "xgo"]),
        ("**/foo", ["foo", "a/foo", "a/b/foo"], ["xfoo", "a/xfoo", "foo/a"]),
        ("a/**", ["a/b", "a/b/c"], ["a", "b/a"]),
        ("a/**/b", ["a/b", "a/x/b", "a/x/y/b"], ["ab", "a/xb"]),
        ("**", ["a", "a/b"], []),
        ("[a-c]x", ["ax", "cx"], ["dx", "/x"]),
        ("[^a-c]x", ["dx", "^x"], ["ax", "/x"]),
        (r"[\]\-]", ["]", "-"], ["\\"]),
        ("arr[[]0].txt", ["arr[0].txt"], ["arr0.txt"]),
        (r"\*", ["*"], ["a"]),
        ("ä?", ["äö"], ["a"]),
        ("a\nb*", ["a\nbc"], ["a"]),
    ],
)
def test_pattern(pattern: str, matching: list[str], other: list[str]) -> None:
    compiled = Pattern(pattern)
    assert [path for path in matching if not compiled.matches(path)] == []
    assert [path for path in other if compiled.matches(path)] == []


@pytest.mark.parametrize(
    "pattern", ["[", "[a", "[]", "[]a]", "[-a]", "[a-", "[c-a]", "a\\", "[a-]"]
)
def test_a_malformed_pattern_is_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        Pattern(pattern)


@given(st.text("ab/*?", max_size=8), st.text("ab/", max_size=10))
def test_patterns_are_what_their_regular_expression_is(pattern: str, path: str) -> None:
    expression = re.escape(pattern)
    for written, meant in (
        (r"\*\*/", "(?:.*/)?"),
        (r"\*\*", ".*"),
        (r"\*", "[^/]*"),
        (r"\?", "[^/]"),
    ):
        expression = expression.replace(written, meant.replace("*", "\0").replace("?", "\1"))
    expression = expression.replace("\0", "*").replace("\1", "?")
    assert Pattern(pattern).matches(path) == bool(re.fullmatch(expression, path))


def test_a_pattern_made_to_take_for_ever_takes_no_time() -> None:
    started = time.process_time()
    assert not Pattern("*a" * 500 + "b").matches("a" * 4000)
    assert not Pattern("**/" * 300 + "b").matches("a/" * 2000)
    assert time.process_time() - started < 5


@pytest.mark.parametrize(
    ("text", "ignored", "kept"),
    [
        ("", [], ["a"]),
        ("# a\n\n  b  ", ["b", "b/c"], ["a", "# a"]),
        ("*.md\n!README.md", ["a.md"], ["README.md", "d/a.md"]),
        (
            "*.md\n!README*.md\nREADME-secret.md",
            ["a.md", "README-secret.md"],
            ["README.md", "README-x.md"],
        ),
        ("*.md\nREADME-secret.md\n!README*.md", ["a.md"], ["README-secret.md"]),
        ("/foo/bar", ["foo/bar", "foo/bar/x"], ["bar", "x/foo/bar"]),
        ("./foo/../bar/", ["bar", "bar/x"], ["foo"]),
        ("node_modules\n!node_modules/keep", ["node_modules/a"], ["node_modules/keep/b"]),
        ("**/node_modules", ["node_modules", "a/node_modules/b"], ["a/node_module"]),
        ("*\n!src\nsrc/*.log", ["a", "src/x.log"], ["src", "src/a/x.log"]),
        ("\ufeffa\r\nb\r\n", ["a", "b"], ["c"]),
        ("! a\n", [], ["a"]),
        (".git", [".git/config"], [".gitignore", "git"]),
        ("A", ["A"], ["a"]),
    ],
)
def test_ignore_rules(text: str, ignored: list[str], kept: list[str]) -> None:
    rules = IgnoreRules(text)
    assert [path for path in ignored if not rules.ignores(path)] == []
    assert [path for path in kept if rules.ignores(path)] == []


def test_a_malformed_rule_is_named_by_its_line() -> None:
    with pytest.raises(InvalidBuild, match=r"^\.dockerignore:2:1: the pattern '\[' is malformed"):
        IgnoreRules("a\n[\n")
    with pytest.raises(InvalidBuild, match="names nothing"):
        IgnoreRules("!")
    with pytest.raises(InvalidBuild, match="more than"):
        IgnoreRules("a\n" * 10_000)


def test_what_is_a_pattern() -> None:
    assert [text for text in ("a", "a*", "a?", "[a", "a\\", "ä") if is_pattern(text)] == [
        "a*",
        "a?",
        "[a",
        "a\\",
    ]
