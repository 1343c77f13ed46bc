"""The tests of aggregator.py, in the order of its sections: house rules, §2 Events, §3 Store, §4 Pipeline, §5 HTTP,
§6 Reference, §7 Page, §8 API, §9 Server, §10 Client, and the whole program as a process. pytest and the standard library;
no plugins, no mocks of our own store.

Environment: KILL_ROUNDS, CRASH_ROUNDS, MODEL_SEEDS, MODEL_STEPS, FUZZ_REQUESTS, DAMAGE_ROUNDS, DISK_FULL_ROUNDS, RELAY_KILLS
and SOAK_MINUTES make the random tests longer.
"""

import ast
import asyncio
import base64
import contextlib
import datetime
import doctest
import email.utils
import errno
import gc
import glob
import gzip
import hashlib
import html
import html.parser
import http.client
import http.server
import itertools
import json
import logging
import os
import random
import re
import shutil
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
import zlib
from typing import NamedTuple
from urllib.parse import quote

import pytest

import aggregator

PROGRAM = os.path.abspath(aggregator.__file__)
NOW = 1_767_225_600_000_000  # 2026-01-01T00:00:00Z in microseconds
needs_linux = pytest.mark.skipif(
    not os.path.isdir("/proc/self/fd"), reason="there is no /proc to look into"
)


# ======================================================================================================================
# House rules: what must be true of the project itself
# ======================================================================================================================

HERE = os.path.dirname(os.path.abspath(aggregator.__file__))
SOURCE = open(os.path.join(HERE, "aggregator.py"), encoding="utf-8").read()
TREE = ast.parse(SOURCE)
README = open(os.path.join(HERE, "README.md"), encoding="utf-8").read()
# section: the sections whose names it may use
KNOWS = {
    1: {1},
    2: {1, 2},
    3: {1, 2, 3},
    4: {1, 2, 3, 4},
    5: {1, 5},
    6: {1, 5, 6},
    7: {1, 7},
    8: {1, 2, 4, 5, 6, 7, 8},
    9: {1, 4, 5, 8, 9},
    10: {1, 2, 10},
    11: set(range(1, 12)),
}
MODULES = {
    "sqlite3": {3},
    "asyncio": {4, 9, 11},
    "zlib": {5, 10},
    "argparse": {11},
    "signal": {11},
    "concurrent": {4},
    "blake2b": {3, 10},
    "sha256": {7},
    "sys": {10, 11},
}
# section: what it imports inside a function, where it is needed: serving must not pay for it, and small systems lack it
LAZY = {
    0: {"_md5"},
    8: {"hmac"},
    10: {
        "http.client",
        "io",
        "random",
        "socket",
        "subprocess",
        "tempfile",
        "threading",
        "urllib.parse",
    },
    11: {"resource", "socket", "ssl"},
}


SECTION_LINES = [
    SOURCE.count("\n", 0, match.start()) + 1 for match in re.finditer(r"^# §[0-9]+  ", SOURCE, re.M)
]


def section_of(line):
    return sum(start <= line for start in SECTION_LINES)


def defined_names():
    """Every name bound at the top level, with its section."""
    names = {}
    for node in TREE.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names[node.name] = section_of(node.lineno)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                for part in ast.walk(target):
                    if isinstance(part, ast.Name):
                        names[part.id] = section_of(node.lineno)
    return names


def imports_of(nodes):
    return {
        (alias.name if isinstance(node, ast.Import) else node.module, section_of(node.lineno))
        for node in nodes
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    }


def test_only_the_standard_library_is_imported():
    at_once = imports_of(TREE.body)
    assert at_once == {
        (name, 0)
        for name in (
            "argparse",
            "asyncio",
            "binascii",
            "bisect",
            "collections",
            "concurrent.futures",
            "contextlib",
            "datetime",
            "errno",
            "functools",
            "gc",
            "hashlib",
            "itertools",
            "json",
            "logging",
            "os",
            "re",
            "signal",
            "sqlite3",
            "sys",
            "time",
            "typing",
            "zlib",
        )
    }
    assert imports_of(ast.walk(TREE)) - at_once == {
        (name, section) for section in LAZY for name in LAZY[section]
    }
    assert "dependencies = []" in SOURCE


def test_importing_the_file_loads_nothing_but_what_it_names_at_the_top():
    code = (
        "import sys\nsys.path.insert(0, {!r})\nimport {}\nbefore = set(sys.modules)\nimport aggregator\n"
        "print(set(sys.modules) - before, sorted(set({!r}) & set(sys.modules)))"
    )
    named = ", ".join(sorted(name for name, _ in imports_of(TREE.body)))
    costly = ["http.client", "urllib", "email", "tempfile"]
    found = subprocess.run(
        [sys.executable, "-I", "-c", code.format(HERE, named, costly)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        timeout=20,
    )
    assert found.stdout == "{'aggregator'} []\n"


def test_the_file_parses_with_the_oldest_grammar_so_that_the_version_check_can_run():
    ast.parse(SOURCE, feature_version=(3, 7))
    assert "from __future__" not in SOURCE


def test_a_section_uses_only_the_sections_it_may_know():
    names, wrong = defined_names(), []
    for node in TREE.body:
        here = section_of(node.lineno)
        for part in ast.walk(node):
            if isinstance(part, ast.Name) and here:
                if names.get(part.id, here) not in KNOWS[here] | {0}:  # 0: version and logger
                    wrong.append(
                        "line {}: §{} names {} of §{}".format(
                            part.lineno, here, part.id, names[part.id]
                        )
                    )
                if here not in MODULES.get(part.id, {here}):
                    wrong.append("line {}: §{} names {}".format(part.lineno, here, part.id))
    assert not wrong


def test_the_http_section_does_no_input_or_output():
    for node in ast.walk(TREE):
        if section_of(getattr(node, "lineno", 0)) == 5:
            assert not isinstance(
                node, (ast.Await, ast.AsyncFunctionDef, ast.AsyncFor, ast.AsyncWith)
            )


def test_importing_does_no_work():
    for node in TREE.body:
        assert isinstance(
            node,
            (
                ast.FunctionDef,
                ast.AsyncFunctionDef,
                ast.ClassDef,
                ast.Import,
                ast.ImportFrom,
                ast.Assign,
                ast.AnnAssign,
                ast.Expr,
                ast.If,
            ),
        )
        if isinstance(node, ast.Expr):
            assert isinstance(node.value, ast.Constant)
        if isinstance(node, ast.If):
            assert ast.dump(node.test).count("__main__") == 1


def test_functions_stay_short():
    sizes = sorted(
        node.end_lineno - node.lineno + 1
        for node in ast.walk(TREE)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    )
    assert sizes[len(sizes) // 2] <= 20


def test_everything_public_is_documented():
    bare = []
    for node in ast.walk(TREE):
        if isinstance(
            node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        ) and not node.name.startswith("_"):
            if not ast.get_docstring(node) and node.name not in ("read", "enter", "on_signal"):
                bare.append(node.name)
    assert not bare


def test_the_examples_in_docstrings_are_true():
    outcome = doctest.testmod(aggregator)
    assert outcome.attempted >= 10 and outcome.failed == 0


def test_the_readme_has_every_route_parameter_option_and_problem():
    for route in aggregator.ROUTES:
        row = next(
            line
            for line in README.split("\n")
            if line.startswith("| `{} {}` |".format(route.method, route.path))
        )
        assert re.findall(r"`([a-z]+)`", row.split("|")[2]) == list(route.parameters)
    for setting in aggregator.SETTINGS:
        assert (
            "| `{}` | `{}` | `{}` |".format(setting.flag, setting.variable, setting.default)
            in README
        )
    for name, (status, _, advice) in aggregator.PROBLEMS.items():
        assert f"| `{name}` | {status} | {advice} |" in README
    for name, command in aggregator.COMMANDS.items():
        assert name == "serve" or f"aggregator.py {name}" in README
        for setting in command.settings:
            assert f"`{setting.flag}`" in README or f"`{setting.flag}…`" in README, setting.flag


def test_the_readme_names_only_tests_and_exercises_that_exist():
    named = set(re.findall(r"`((?:test|exercise)_[a-z0-9_]+)`", README))
    here = set(
        re.findall(r"^def ((?:test|exercise)_\w+)", open(__file__, encoding="utf-8").read(), re.M)
    )
    assert len(named) > 8 and named <= here


def test_the_image_runs_as_nobody_special_and_needs_no_curl():
    dockerfile = open(os.path.join(HERE, "Dockerfile")).read()
    assert re.search(r"^ARG .*=3\.11", dockerfile, re.M) and re.search(
        r"^USER (?!root|0)", dockerfile, re.M
    )
    assert re.search(r"^(ENTRYPOINT|CMD) \[", dockerfile, re.M) and "VOLUME" in dockerfile
    health = dockerfile[dockerfile.index("HEALTHCHECK") :]
    assert "curl" not in health and '["python", "-m", "aggregator", "health"]' in health
    assert (
        '\nENTRYPOINT ["python", "-m", "aggregator"]\n' in dockerfile and "compileall" in dockerfile
    )
    for variable in re.findall(
        r"([A-Z_]+)(?:=|: )\"?[\w./]+\"?", open(os.path.join(HERE, "compose.yml")).read()
    ):
        assert variable in [setting.variable for setting in aggregator.SETTINGS] + ["CMD", "ALL"], (
            variable
        )


def unchanging(text):
    """A README answer or a real one, with what differs from run to run made equal."""
    text = re.sub(r'"(processed_at|first_seen)":"[^"]*"', r'"\1":"…"', text)
    return re.sub(
        r'"(seconds_since_first_seen|milliseconds)":[0-9.e-]+',
        r'"\1":0',
        re.sub("[0-9,]+/s", "1/s", text),
    )


@pytest.mark.skipif(
    not shutil.which("curl") or not shutil.which("bash"), reason="no curl or bash here"
)
def test_the_readmes_commands_answer_what_it_shows(tmp_path):
    blocks = re.findall(r"^```console\n(.*?)^```", README, re.M | re.S)
    assert len(blocks) >= 8 and blocks[0] == "$ python3 aggregator.py &\n"
    with Program(tmp_path / "readme.db") as program:
        for block in blocks[1:]:
            command, *answer = block.split("\n")
            assert command.startswith("$ ")
            shown = answer[0]
            command = command.replace("localhost:8000", "127.0.0.1:%d" % program.port)
            command = command.replace(
                "python3 aggregator.py", '"{}" "{}"'.format(sys.executable, PROGRAM)
            )
            child = subprocess.run(
                ["bash", "-c", command[2:]],
                stdout=subprocess.PIPE,
                cwd=str(tmp_path),
                timeout=30,
                env=clean_environment(PORT=str(program.port)),
            )
            assert unchanging(child.stdout.decode().strip()) == unchanging(shown), command


# ======================================================================================================================
# §2 Events
# ======================================================================================================================

EPOCH = datetime.datetime(1970, 1, 1)
US = datetime.timedelta(microseconds=1)
GOOD_EVENT = {
    "topic": "t",
    "event_id": "1",
    "timestamp": "2026-01-01T00:00:00Z",
    "source": "s",
    "payload": {},
}


def us(*parts):
    """Year, month, day, hour, … to microseconds since 1970, by way of `datetime`, which the service does not use."""
    return (datetime.datetime(*parts) - EPOCH) // US


@pytest.mark.parametrize(
    "text, expected",
    [
        ("1970-01-01T00:00:00Z", 0),
        ("1970-01-01", 0),
        ("1970-01-01 00:00", 0),
        ("1970-01-01T00:00:00.000001Z", 1),
        ("1969-12-31T23:59:59.999999Z", -1),
        ("1969-12-31T23:59:59,5Z", -500_000),
        ("0001-01-01T00:00:00Z", us(1, 1, 1)),
        ("0001-01-01T00:00:00.000001-00:00", us(1, 1, 1) + 1),
        ("2026-01-31T12:00Z", us(2026, 1, 31, 12)),
        ("9999-12-31T23:59:59.9999999Z", us(9999, 12, 31, 23, 59, 59, 999_999)),
        ("2024-02-29", us(2024, 2, 29)),
        ("2000-02-29T12:00", us(2000, 2, 29, 12)),
        ("2026-01-31T12:00:00.5Z", us(2026, 1, 31, 12, 0, 0, 500_000)),
        ("2026-01-31T12:00:00,123456Z", us(2026, 1, 31, 12, 0, 0, 123_456)),
        ("2026-01-31T12:00:00.1234569Z", us(2026, 1, 31, 12, 0, 0, 123_456)),
        ("2026-01-31T12:00:00." + "9" * 30, us(2026, 1, 31, 12, 0, 0, 999_999)),
        ("2026-01-31 14:00+02:00", us(2026, 1, 31, 12)),
        ("2026-01-31T14:00:00+0200", us(2026, 1, 31, 12)),
        ("2026-01-31T14:00:00+02", us(2026, 1, 31, 12)),
        ("2026-01-31T12:00:00-05:30", us(2026, 1, 31, 17, 30)),
        ("2026-01-31T14:00:00.25+02:00", us(2026, 1, 31, 12, 0, 0, 250_000)),
        ("2026-01-31T12:00:00-0530", us(2026, 1, 31, 17, 30)),
        ("2026-01-31T12:00:00+23:59", us(2026, 1, 30, 12, 1)),
    ],
)
def test_a_timestamp_names_this_instant(text, expected):
    assert aggregator.parse_timestamp(text) == expected


NO_TIMESTAMPS = (
    "| |now|0|2026|2026-01|1767225600|0000-01-01T00:00:00Z|10000-01-01|-0001-01-01|2026-00-01|2026-13-01|2026-01-00|"
    "2026-01-32|2026-04-31|2026-02-29|1900-02-29|2026-1-1|2026-W01-1|2026-W01|2026-001|20260101|20260101T000000Z|"
    "26-01-01|2026/01/01|2026-01-01T|2026-01-01T12|2026-01-01T1:00|2026-01-01T24:00|2026-01-01T24:00:00|"
    "2026-01-01T12:60|2026-01-01T12:00:60Z|2016-12-31T23:59:60Z|2026-01-01T12:00:61|"
    "2026-01-01T120000Z|2026-01-01T12:0000|2026-01-01T12:00.5|2026-01-01T12:00,5Z|2026-01-01.5|2026-01-01T12:00:00.|"
    "2026-01-01T12:00:00.Z|2026-01-01T12:00:00.5.5|"
    "2026-01-01T12:00:00.1111111111111111111111111111111|2026-01-01T12:00:00.1_0|"
    "2026-01-01T12:00:00.-1|2026-01-01Z|2026-01-01+02:00|2026-01-01T+02:00|2026-01-01T12:00:00+99:99|"
    "2026-01-01T12:00:00+24:00|2026-01-01T12:00:00-00:60|2026-01-01T12:00:00+1|2026-01-01T12:00:00+123|"
    "2026-01-01T12:00:00+12:|2026-01-01T12:00:00+01:00:00|2026-01-01T12:00:00ZZ|2026-01-01T12:00:00Z+01:00|"
    "2026-01-01T12:00:00 Z|2026-01-01T12:00:00z|2026-01-01t12:00:00Z|2026-01-01T12:00:00UTC|"
    "2026-01-01T12:00:00\u221202:00|0001-01-01T00:00:00+00:01|9999-12-31T23:59:59-00:01|"
    "0001-01-01T23:58:59.999999+23:59|2026-01-01T12:00:00Z\n|2026-01-01\n|\n2026-01-01| 2026-01-01|"
    "2026-01-01 |2026-01-01  12:00|2026-01-01T12:00:00Z\x00|\u0662\u0660\u0662\u0666-\u0660\u0661-\u0660\u0661|"
    "２０２６-01-01|2026-01-01T12:00:0\u0665Z|2026-01-01T12:00:00.\u0665Z|2026-01-01T12:00:00+0\u0662:00"
)


@pytest.mark.parametrize("text", NO_TIMESTAMPS.split("|"))
def test_what_is_no_timestamp_is_refused(text):
    with pytest.raises(ValueError):
        aggregator.parse_timestamp(text)


def test_formatting_and_parsing_a_timestamp_are_inverse_and_agree_with_datetime():
    rng = random.Random(1)
    first, last = us(1, 1, 1), us(9999, 12, 31, 23, 59, 59, 999_999)
    for instant in [first, last, -1, 0, 1] + [rng.randint(first, last) for _ in range(5000)]:
        text = aggregator.format_timestamp(instant)
        assert text == (EPOCH + instant * US).isoformat(timespec="microseconds") + "Z"
        assert aggregator.parse_timestamp(text) == instant


def test_an_offset_moves_the_instant_and_nothing_else():
    rng = random.Random(2)
    for _ in range(3000):
        instant = rng.randint(us(2, 1, 1), us(9998, 1, 1))
        minutes = rng.randint(-1439, 1439)
        text = aggregator.format_timestamp(instant + minutes * 60_000_000)[:-1]
        offset = "{}{:02d}:{:02d}".format(
            "-" if minutes < 0 else "+", abs(minutes) // 60, abs(minutes) % 60
        )
        for spelling in (offset, offset.replace(":", "")):
            assert aggregator.parse_timestamp(text + spelling) == instant, text + spelling


def faults_of(body):
    """Index and field of all that is wrong with a body, given as bytes or as a value still to be written."""
    with pytest.raises(aggregator.InvalidEvents) as caught:
        aggregator.parse_events(
            body if isinstance(body, bytes) else json.dumps(body).encode(), 10**9
        )
    assert all(fault.message and fault.message.isascii() for fault in caught.value.faults)
    return [(fault.index, fault.field) for fault in caught.value.faults]


def read_one(**changes):
    [event] = aggregator.parse_events(json.dumps({**GOOD_EVENT, **changes}).encode())
    return event


@pytest.mark.parametrize("field", sorted(GOOD_EVENT))
def test_a_missing_field_is_a_fault(field):
    assert faults_of({name: GOOD_EVENT[name] for name in GOOD_EVENT if name != field}) == [
        (0, field)
    ]


NAME = ("topic", "event_id", "source")
WRONG = (
    [
        (field, value)
        for field in NAME
        for value in (
            None,
            True,
            0,
            1.5,
            [],
            ["a"],
            {"a": 1},
            "",
            " ",
            "\u00a0",
            "\u3000\u2028",
            "a\n",
            "\x00",
            "a\x00b",
            "\x1f",
            "\t",
            "\x7f",
            "\x85",
            "\x9f",
            "\ud800",
            "a\udfffb",
            "a" * 256,
            "é" * 128,
            "a" + "😀" * 64,
            "é" * 127 + "ab",
            "a" * 1_000_000,
        )
    ]
    + [
        ("timestamp", value)
        for value in (
            None,
            True,
            0,
            1767225600,
            1.5,
            [],
            {},
            ["2026-01-01"],
            "",
            "now",
            "\ud800",
            "2026-02-30",
            "9" * 100_000,
        )
    ]
    + [
        ("payload", value)
        for value in (None, True, 0, "", "{}", "text", [], [{}], float("nan"), float("inf"))
    ]
    + [
        ("sequence", value)
        for value in (
            -1,
            2**63,
            2**64,
            10**400,
            True,
            False,
            0.0,
            1.0,
            1e3,
            "1",
            "",
            [],
            {},
            float("nan"),
            float("inf"),
        )
    ]
)


@pytest.mark.parametrize("field, value", WRONG, ids=lambda value: ascii(value)[:30])
def test_a_wrong_value_is_a_fault_of_its_field_and_of_no_other(field, value):
    assert faults_of({**GOOD_EVENT, field: value}) == [(0, field)]


@pytest.mark.parametrize("field", NAME)
@pytest.mark.parametrize(
    "value",
    [
        "a",
        "0",
        " a ",
        "a b",
        "logs/web",
        "/",
        "*",
        "%",
        "é",
        "e\u0301",
        "😀",
        "\u202e",
        "\u200b",
        "a\u2028b",
        "a" * 255,
        "é" * 127 + "a",
        "😀" * 63 + "abc",
        "漢" * 85,
    ],
)
def test_a_name_of_up_to_255_bytes_is_kept_as_it_is(field, value):
    assert len(value.encode()) <= aggregator.MAX_NAME_BYTES == 255
    assert getattr(read_one(**{field: value}), field) == value


@pytest.mark.parametrize("value", [0, 1, 2**53 + 1, 2**63 - 1])
def test_a_sequence_is_kept_exactly_and_may_be_left_out(value):
    assert (read_one(sequence=value).sequence, read_one().sequence) == (value, None)


def test_unknown_fields_are_ignored():
    assert read_one(extra={"a": [1]}, Topic=5, events=[1], seq=-1) == read_one()


def with_payload(text):
    return (
        json.dumps(dict(GOOD_EVENT, payload=0))
        .replace('"payload": 0', '"payload":' + text)
        .encode()
    )


@pytest.mark.parametrize(
    "text",
    [
        "NaN",
        "Infinity",
        "-Infinity",
        "1e999",
        "-1e999",
        "1" + "0" * 400,
        "-1" + "0" * 400,
        "1" * 5000,
        "1" * 100_000,
        r'"\ud800"',
        r'"a\udc00"',
        r'{"\udfff":1}',
        r'"\ude00\ud83d"',
    ],
    ids=lambda text: text[:20],
)
@pytest.mark.parametrize(
    "place", ['{"a":?}', '{"a":[1,{"b":?}]}', '{"a":?,"pad":"' + "é" * 300 + '"}']
)
def test_a_payload_that_could_not_be_read_back_is_refused(place, text):
    assert faults_of(with_payload(place.replace("?", text))) == [(0, "payload")]


@pytest.mark.parametrize(
    "text",
    [
        "1e308",
        "-1.7976931348623157e308",
        "5e-324",
        "1e-999",
        "9" * 308,
        "-" + "9" * 308,
        "18446744073709551616",
        "-9223372036854775809",
        '"\\u0000"',
        '"\\ud83d\\ude00"',
        '"\x7f\u2028"',
        '"NaN"',
        "true",
        "null",
        "[]",
        "{}",
        '{"":{"":[]}}',
    ],
    ids=lambda text: text[:20],
)
def test_a_payload_is_read_back_as_it_was_sent(text):
    [event] = aggregator.parse_events(with_payload('{"a":' + text + "}"))
    assert json.loads(event.payload) == {"a": json.loads(text)}


def nested(levels, opening, closing):
    return '{"wide":[{}],"a":' + opening * (levels - 1) + "0" + closing * (levels - 1) + "}"


@pytest.mark.parametrize(
    "opening, closing", [("[", "]"), ('{"a":', "}"), ('[0,{"b":', "}]"), ("[ 0, ", "]")]
)
def test_a_payload_may_be_nested_100_levels_and_not_101(opening, closing):
    step = opening.count("[") + opening.count("{")
    good = nested((aggregator.MAX_NESTING - 1) // step + 1, opening, closing)
    [event] = aggregator.parse_events(with_payload(good))
    assert json.loads(event.payload) == json.loads(good)
    assert faults_of(
        with_payload(nested(aggregator.MAX_NESTING // step + 1, opening, closing))
    ) == [(0, "payload")]


def test_many_brackets_beside_each_other_are_not_nesting():
    payload = {"a": [[{}] for _ in range(5 * aggregator.MAX_NESTING)]}
    assert json.loads(read_one(payload=payload).payload) == payload


@pytest.mark.parametrize("levels", [101, 500, 950, 3000, 20_000, 100_000])
@pytest.mark.parametrize("opening, closing", [("[", "]"), ('{"a":', "}"), ("[", ""), ('{"a":', "")])
@pytest.mark.parametrize("place", ["", '{"payload":', '{"events":['])
def test_any_number_of_brackets_is_refused_and_crashes_nothing(place, opening, closing, levels):
    with pytest.raises((aggregator.InvalidEvents, aggregator.NotJSON)):
        aggregator.parse_events((place + opening * levels + "0" + closing * levels).encode())


def test_all_faults_of_all_events_are_listed_in_order():
    bad = {"topic": "", "event_id": 5, "timestamp": "x", "payload": [], "sequence": -1}
    body = [GOOD_EVENT, bad, 7, None, "text", [], GOOD_EVENT, {}, dict(GOOD_EVENT, source=" ")]
    required = ["topic", "event_id", "timestamp", "source", "payload"]
    assert faults_of(body) == (
        [(1, field) for field in required + ["sequence"]]
        + [(index, "") for index in (2, 3, 4, 5)]
        + [(7, field) for field in required]
        + [(8, "source")]
    )


def test_a_fault_says_what_stood_there():
    with pytest.raises(aggregator.InvalidEvents) as caught:
        aggregator.parse_events(
            json.dumps(dict(GOOD_EVENT, topic="a\ud800😀", sequence=-3)).encode()
        )
    assert [
        ("\\ud800" in fault.message, "-3" in fault.message) for fault in caught.value.faults
    ] == [(True, False), (False, True)]


@pytest.mark.parametrize("element", [b"{}", b"1", b"[]"])
def test_listing_the_faults_of_a_hostile_body_takes_bounded_memory(element):
    body = b"[" + (element + b",") * (100_000 // (len(element) + 1)) + element + b"]"
    tracemalloc.start()
    try:
        faults_of(body)
        assert tracemalloc.get_traced_memory()[1] < 60 * len(
            body
        )  # decoding alone takes up to 25 times its size
    finally:
        tracemalloc.stop()


E1, E2, E3 = (json.dumps(dict(GOOD_EVENT, event_id=name)).encode() for name in "123")


@pytest.mark.parametrize(
    "body, ids",
    [
        (E1, "1"),
        (b" \r\n\t" + E1 + b" \r\n\t", "1"),
        (b"[" + E1 + b"]", "1"),
        (b"[" + E1 + b" , " + E2 + b"]", "12"),
        (b'{"events":[' + E1 + b"," + E2 + b"]}", "12"),
        (b'{"other":0,"events":[' + E1 + b"]}", "1"),
        (E1 + b"\n" + E2 + b"\n", "12"),
        (E1 + b"\r\n\r\n" + E2, "12"),
        (E1 + E2 + E3, "123"),
        (E1 + b"\t" + E2, "12"),
        (b"[" + E1 + b"]" + E2 + b'{"events":[' + E3 + b"]}", "123"),
        (b"[]" + E1 + b'{"events":[]}', "1"),
        (json.dumps(dict(GOOD_EVENT, event_id="1"), indent=4).encode(), "1"),
        (E1 + E1, "11"),
    ],
)
def test_a_body_holds_these_events_in_this_order(body, ids):
    assert "".join(event.event_id for event in aggregator.parse_events(body)) == ids


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" ",
        b"\r\n\r\n",
        b"\x00",
        b"{",
        b"}",
        b"[",
        b"{]",
        E1[:-1],
        E1 + b",",
        E1 + b"," + E2,
        b"[" + E1 + b",]",
        E1 + b"\n" + E2[:-1],
        E1 + b"\x0b" + E2,
        E1 + b"\xc2\xa0" + E2,
        E1 + b"\x00",
        b"topic=t&event_id=1",
        b"{'a':1}",
        b"// x\n" + E1,
        b"nan",
        b"inf",
        b"undefined",
        b"\xef\xbb\xbf" + E1,
        b"\xef\xbb\xbf",
        E1 + b"\xef\xbb\xbf",
        E1.replace(b'"t"', b'"\xff"'),
        E1.replace(b'"t"', b'"\xc0\xaf"'),
        E1.replace(b'"t"', b'"\xed\xa0\x80"'),
        E1.replace(b'"t"', b'"\xe9"'),
        E1.replace(b'"t"', b'"\xf4\x90\x80\x80"'),
        E1.replace(b'"t"', b'"a\nb"'),
        E1.replace(b'"t"', b'"a\x00b"'),
        E1.decode().encode("utf-16"),
        E1.decode().encode("utf-16-le"),
        E1.decode().encode("utf-16-be"),
        E1.decode().encode("utf-32"),
        E1.decode().encode("utf-8-sig"),
        E1.replace(b'"t"', b'"\\x41"'),
        E1.replace(b'"t"', b'"\\u12"'),
        gzip.compress(E1),
        b"[01]",
        b"[+1]",
        b"[1.]",
        b"[1_0]",
        "[\u0661]".encode(),
    ],
    ids=lambda body: ascii(body)[2:40],
)
def test_a_body_that_is_not_json_is_refused_as_such(body):
    with pytest.raises(aggregator.NotJSON) as caught:
        aggregator.parse_events(body)
    assert str(caught.value).isascii()


@pytest.mark.parametrize(
    "body, expected",
    [
        (b"[]", [(0, "")]),
        (b'{"events":[]}', [(0, "")]),
        (b"[] []", [(0, "")]),
        (b'{"events":null}', [(0, "events")]),
        (b'{"events":5}', [(0, "events")]),
        (b'{"events":"x"}', [(0, "events")]),
        (b'{"events":{}}', [(0, "events")]),
        (b"null", [(0, "")]),
        (b"5", [(0, "")]),
        (b"true", [(0, "")]),
        (b'"text"', [(0, "")]),
        (b"NaN", [(0, "")]),
        (b"[[" + E1 + b"]]", [(0, "")]),
        (b'[{"events":[' + E1 + b"]}]", [(0, field) for field in GOOD_EVENT]),
        (E1 + b"5", [(1, "")]),
        (b"[" + E1 + b"," + E2 + b"] 1 " + E3 + b" null", [(2, ""), (4, "")]),
        (b"[" + E1 + b"," + E2 + b']{"events":1}', [(2, "events")]),
    ],
)
def test_json_that_holds_no_events_is_refused_with_index_and_field(body, expected):
    assert faults_of(body) == expected


@pytest.mark.parametrize(
    "one, other, same",
    [
        ('{"a":1,"b":2}', '{ "b" : 2,\n"a" : 1 }', True),
        ('{"a":{"c":1,"b":2}}', '{"a":{"b":2,"c":1}}', True),
        (r'{"a":"\u00e9\/"}', '{"a":"é/"}', True),
        (r'{"a":"\ud83d\ude00"}', '{"a":"😀"}', True),
        ('{"a":1e2}', '{"a":100.0}', True),
        ('{"a":1,"a":2}', '{"a":2}', True),
        ('{"a":[1,2]}', '{"a":[2,1]}', False),
        ('{"a":1}', '{"a":"1"}', False),
        ('{"a":1}', '{"a":true}', False),
        ('{"a":0}', '{"a":false}', False),
        ('{"a":null}', "{}", False),
        ('{"a":[]}', '{"a":{}}', False),
        ('{"a":"é"}', '{"a":"e\u0301"}', False),
        ('{"a":18446744073709551616}', '{"a":18446744073709551617}', False),
        ('{"a":{"b":1}}', '{"a.b":1}', False),
    ],
)
def test_equal_payloads_have_equal_canonical_text_and_others_have_not(one, other, same):
    texts = [
        aggregator.parse_events(E1.replace(b'"payload": {}', b'"payload":' + text.encode()))[
            0
        ].payload
        for text in (one, other)
    ]
    assert (texts[0] == texts[1]) is same
    assert texts[0] == aggregator._ENCODER.encode(
        json.loads(one)
    )  # what Pythons without the C encoder use


def test_lines_of_text_become_events_numbered_by_line():
    events = aggregator.events_from_lines(
        "one\r\n\n \t\ntwo\x0b\x85\u2028é😀\nlast\x00", "t", "s", 1, "id:{}".format
    )
    assert [(event.event_id, json.loads(event.payload)) for event in events] == [
        ("id:1", {"message": "one"}),
        ("id:4", {"message": "two\x0b\x85\u2028é😀"}),
        ("id:5", {"message": "last\x00"}),
    ]
    assert {event[:1] + event[2:4] for event in events} == {("t", 1, "s")}


@pytest.mark.parametrize(
    "text, topic, expected",
    [
        ("", "t", [(0, "")]),
        ("\n\r\n \n", "t", [(0, "")]),
        ("a\n\nb", "", [(0, "topic"), (1, "topic")]),
    ],
)
def test_text_without_a_line_or_with_a_bad_topic_is_refused(text, topic, expected):
    with pytest.raises(aggregator.InvalidEvents) as caught:
        aggregator.events_from_lines(text, topic, "s", 0, str)
    assert [(fault.index, fault.field) for fault in caught.value.faults] == expected


def test_random_events_are_either_refused_with_a_fault_or_can_be_written_and_read_back():
    rng = random.Random(3)
    bits = [
        b"{}",
        b"[",
        b"]",
        b",",
        b"null",
        b"NaN",
        b"-1",
        b"1e999",
        b'"\\ud800"',
        b'"a"',
        b"\xff",
        b'"\xc3\xa9"',
        b'"events":',
        b'"topic":',
        b'"payload":{"a":',
        b"}",
        b"{",
        b" ",
        b"\x00",
        b"0",
        b"\\",
        b'"',
        b":",
    ]
    taken = 0
    for _ in range(8000):
        body = bytearray(rng.choice([E1, E1 + E2, b"[" + E1 + b"]", b'{"events":[' + E1 + b"]}"]))
        for _ in range(rng.randint(0, 3)):
            at = rng.randrange(len(body))
            body[at : at + rng.randint(0, 3)] = rng.choice(bits)
        try:
            events = aggregator.parse_events(bytes(body))
        except aggregator.NotJSON:
            continue
        except aggregator.InvalidEvents as error:
            assert error.faults, body
            assert {fault.field for fault in error.faults} <= {
                *GOOD_EVENT,
                "sequence",
                "events",
                "",
            }, body
            continue
        taken += 1
        for event in events:
            again = dict(
                event._asdict(),
                timestamp=aggregator.format_timestamp(event.timestamp),
                payload=json.loads(event.payload),
            )
            assert aggregator.parse_events(json.dumps(again, ensure_ascii=False).encode()) == [
                event
            ], body
    assert 1000 < taken < 7000


def test_the_examples_in_the_docstrings_are_true():
    failed, attempted = doctest.testmod(aggregator)
    assert attempted >= 9 and not failed


def test_more_events_than_the_queue_holds_are_refused_before_they_are_looked_at():
    for body in (b"[" + b"1," * 10 + b"1]", b"{}" * 11, b'{"events":[' + b"[]," * 10 + b"[]]}"):
        with pytest.raises(
            aggregator.BatchTooLarge, match="11 events in one request, and the queue holds 10"
        ):
            aggregator.parse_events(body, 10)
    with pytest.raises(aggregator.BatchTooLarge):
        aggregator.events_from_lines("a\n" * 11, "t", "s", 0, str, 10)
    assert len(aggregator.events_from_lines("a\n" * 10, "t", "s", 0, str, 10)) == 10


def test_the_index_of_what_is_nested_too_deep_counts_events_not_values():
    with pytest.raises(aggregator.InvalidEvents) as caught:
        aggregator.parse_events(b"[{},{}]{}" + b"[" * 100_000)
    assert caught.value.faults[0].index == 3


# ======================================================================================================================
# §3  Store
# ======================================================================================================================


def event(event_id="1", topic="t", payload='{"n":1}', source="s", timestamp=NOW):
    return aggregator.record(aggregator.Event(topic, str(event_id), timestamp, source, payload))


@pytest.fixture
def store(tmp_path):
    with contextlib.closing(aggregator.Store(str(tmp_path / "s.db"))) as opened:
        yield opened


@pytest.fixture
def small_index(monkeypatch):
    """An index so small that a few hundred events exercise every part of it."""
    monkeypatch.setattr(aggregator, "RECENT_IDS", 64)
    monkeypatch.setattr(aggregator, "LIST_ROWS", 16)


def kinds(decision, count):
    repeats = dict(decision.repeats)
    return [repeats[i].kind if i in repeats else "new" for i in range(count)]


def sound(path):
    return [sentence for holds, sentence in aggregator.check_store(str(path)) if not holds]


def test_a_repeat_in_a_later_batch_is_a_duplicate_with_the_seq_of_the_original(store):
    assert store.commit([event(1), event(2)], NOW).first_seq == 1
    assert store.commit([event(2), event(3)], NOW + 5).repeats == [
        (0, aggregator.Verdict("duplicate", 2, NOW, "recent"))
    ]


def test_the_same_event_twice_in_one_batch_is_stored_once(store):
    decision = store.commit([event(1), event(1), event(2), event(1)], NOW)
    assert kinds(decision, 4) == ["new", "duplicate", "new", "duplicate"]
    assert [verdict.seq for _, verdict in decision.repeats] == [1, 1]


@pytest.mark.parametrize("other", [{"payload": '{"n":2}'}, {"source": "other"}])
def test_another_content_under_a_known_identity_is_a_conflict_and_the_first_one_stays(store, other):
    store.commit([event(1)], NOW)
    assert kinds(store.commit([event(1, **other)], NOW), 1) == ["conflict"]
    with contextlib.closing(aggregator.Reader(store.path)) as reader:
        assert (
            json.loads(reader.event(1))["payload"] == {"n": 1}
            and json.loads(reader.event(1))["source"] == "s"
        )


def test_another_timestamp_alone_is_no_conflict(store):
    store.commit([event(1)], NOW)
    assert kinds(store.commit([event(1, timestamp=NOW + 1)], NOW), 1) == ["duplicate"]


def test_topic_and_event_id_cannot_run_into_each_other():
    assert aggregator.identity("a", "b:c") != aggregator.identity("a:b", "c")
    assert aggregator.identity("é", "x") != aggregator.identity("", "éx")
    assert len(aggregator.identity("é", "😀")) == 16


def test_a_failed_batch_leaves_nothing_behind_on_disk_or_in_memory(store):
    store.commit([event(0)], NOW)
    broken = event("broken")._replace(source=object())  # no validated event can look like this
    with pytest.raises((aggregator.StoreFailed, sqlite3.Error, TypeError)):
        store.commit([event("a"), broken, event("b")], NOW)
    assert kinds(store.commit([event("a"), event("b"), event(0)], NOW), 3) == [
        "new",
        "new",
        "duplicate",
    ]
    assert store.commit([event("c")], NOW).first_seq == 4
    store.close()
    assert sound(store.path) == []


def test_a_commit_that_another_program_blocks_fails_and_the_next_one_succeeds(store):
    store._db.execute("PRAGMA busy_timeout=20")
    with contextlib.closing(sqlite3.connect(store.path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(aggregator.StoreFailed, match="locked"):
            store.commit([event(1)], NOW)
        other.execute("ROLLBACK")
    assert kinds(store.commit([event(1)], NOW), 1) == ["new"]


def test_the_writer_uses_full_sync_unless_told_otherwise(tmp_path):
    for full, level in ((True, 2), (False, 1)):
        with contextlib.closing(aggregator.Store(str(tmp_path / "sync.db"), full)) as opened:
            assert opened._db.execute("PRAGMA synchronous").fetchone() == (level,)
            assert opened._db.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_a_probe_writes_as_much_as_a_small_commit_and_leaves_nothing(store):
    sizes = []
    for write in (lambda: store.commit([event(1)], NOW), store.probe, store.probe):
        sizes.append(os.path.getsize(store.path + "-wal"))
        write()
    sizes.append(os.path.getsize(store.path + "-wal"))
    commit, *probes = [after - before for before, after in zip(sizes, sizes[1:])]
    assert min(probes) >= commit > 0
    store.close()
    assert sound(store.path) == []


def test_more_rows_than_sqlite_has_variables_for_are_split(store, monkeypatch):
    monkeypatch.setattr(aggregator, "_MAX_VARIABLES", 999)  # SQLite before 3.32
    batch = [event(i) for i in range(1500)]
    assert kinds(store.commit(batch, NOW), 1500) == ["new"] * 1500
    assert kinds(store.commit(batch[::-1], NOW), 1500) == ["duplicate"] * 1500


def test_a_duplicate_is_found_wherever_its_key_has_moved_to(tmp_path, small_index):
    path = str(tmp_path / "s.db")
    with contextlib.closing(aggregator.Store(path)) as opened:
        for at in range(0, 2000, 50):
            opened.commit([event(i) for i in range(at, at + 50)], NOW)
        found = {
            verdict.found
            for i in range(2000)
            for _, verdict in opened.commit([event(i)], NOW).repeats
        }
        assert found == {"recent", "seen"}
        assert opened._state.recent <= 64 + 50 * 2
    assert sound(path) == []
    with contextlib.closing(aggregator.Store(path)) as opened:  # rebuilt from the log
        assert (
            kinds(opened.commit([event(i) for i in range(2000)], NOW), 2000) == ["duplicate"] * 2000
        )


def test_retention_keeps_the_newest_of_each_topic_and_still_knows_the_others(tmp_path, small_index):
    path = str(tmp_path / "s.db")
    with contextlib.closing(aggregator.Store(path, max_per_topic=10)) as opened:
        for i in range(300):
            opened.commit([event(i, "a", timestamp=NOW + i), event(i, "b", timestamp=NOW - i)], NOW)
        while opened.tidy(NOW):
            pass
        with contextlib.closing(aggregator.Reader(path)) as reader:
            listed = json.loads("[" + reader.page(aggregator.EventQuery(limit=1000)).text + "]")
            assert sorted(int(e["event_id"]) for e in listed if e["topic"] == "a") == list(
                range(290, 300)
            )
            assert sorted(int(e["event_id"]) for e in listed if e["topic"] == "b") == list(
                range(10)
            )
            stats = reader.stats()
            assert stats["topics"]["a"] == {"unique": 300, "duplicates": 0, "stored": 10}
            assert stats["unique_processed"] == 600 and stats["stored"] == 20
        again = opened.commit([event(i, "a", timestamp=NOW + i) for i in range(300)], NOW)
        assert [verdict.seq for _, verdict in again.repeats] == list(range(1, 601, 2))
        assert kinds(opened.commit([event(5, "a", payload='{"n":2}')], NOW), 1) == ["conflict"]
        assert opened.locate("a", "5") == 11
    assert sound(path) == []


def test_retention_by_age_removes_what_arrived_before_it(tmp_path):
    path, day = str(tmp_path / "s.db"), 86_400_000_000
    with contextlib.closing(aggregator.Store(path, retention_us=day)) as opened:
        for i in range(5):
            opened.commit([event(i, timestamp=NOW - 400 * day)], NOW + i * day // 2)
        while opened.tidy(NOW + 2 * day + 1):
            pass
        with contextlib.closing(aggregator.Reader(path)) as reader:
            listed = json.loads("[" + reader.page(aggregator.EventQuery()).text + "]")
            assert [e["event_id"] for e in listed] == ["3", "4"]
        assert kinds(opened.commit([event(0)], NOW + 3 * day), 1) == ["duplicate"]


def test_what_age_removes_counts_for_the_number_that_a_topic_keeps(tmp_path):
    path, hour = str(tmp_path / "s.db"), 3_600_000_000
    with contextlib.closing(aggregator.Store(path)) as opened:
        opened.commit([event(i, timestamp=NOW + i) for i in range(5)], NOW)
        opened.commit(
            [event(i, timestamp=NOW - i) for i in range(5, 10)], NOW + hour
        )  # arrived later, happened before
    with contextlib.closing(aggregator.Store(path, max_per_topic=5, retention_us=hour)) as opened:
        while opened.tidy(NOW + hour + 1):
            pass
        with contextlib.closing(aggregator.Reader(path)) as reader:
            listed = json.loads("[" + reader.page(aggregator.EventQuery()).text + "]")
    assert sorted(each["event_id"] for each in listed) == ["5", "6", "7", "8", "9"]
    assert sound(path) == []


def test_a_step_of_retention_stays_under_50_ms(tmp_path):
    with contextlib.closing(aggregator.Store(str(tmp_path / "s.db"))) as opened:
        opened.commit([event(i, "t%d" % (i % 7), timestamp=NOW + i) for i in range(20_000)], NOW)
    with contextlib.closing(
        aggregator.Store(str(tmp_path / "s.db"), max_per_topic=10, retention_us=10**12)
    ) as opened:
        steps = []
        while True:
            started = time.perf_counter()
            if not opened.tidy(NOW + 1):
                break
            steps.append(time.perf_counter() - started)
        assert len(steps) >= 20_000 // aggregator.TRIM_ROWS
        assert sorted(steps)[len(steps) // 2] < 0.05
    assert sound(tmp_path / "s.db") == []


def test_tombstones_expire_only_after_dedup_retention_and_never_before_their_event(
    tmp_path, small_index
):
    path, hour = str(tmp_path / "s.db"), 3_600_000_000
    with contextlib.closing(
        aggregator.Store(path, max_per_topic=20, dedup_retention_us=hour)
    ) as opened:
        opened.commit([event(i, timestamp=NOW + i) for i in range(100)], NOW)
        for i in range(100, 3000, 25):  # merges every slice several times over
            opened.commit([event(i + k, timestamp=NOW + i + k) for k in range(25)], NOW + hour // 2)
        assert kinds(opened.commit([event(0)], NOW + hour // 2), 1) == ["duplicate"]
        for i in range(3000, 6000, 25):
            opened.commit(
                [event(i + k, "u", timestamp=NOW + i + k) for k in range(25)], NOW + 2 * hour
            )
        assert kinds(opened.commit([event(0)], NOW + 2 * hour), 1) == ["new"]  # forgotten, as asked
        assert kinds(opened.commit([event(2999)], NOW + 2 * hour), 1) == [
            "duplicate"
        ]  # its event is still there
    assert sound(path) == []


def test_a_page_is_cut_short_by_its_bytes_and_goes_on_behind_a_cursor(store, monkeypatch):
    monkeypatch.setattr(aggregator, "PAGE_MAX_BYTES", 250)
    store.commit(
        [event(i, payload='{"x":"%s"}' % ("y" * 100), timestamp=NOW + i) for i in range(7)], NOW
    )
    with contextlib.closing(aggregator.Reader(store.path)) as reader:
        query, seen = aggregator.EventQuery(), []
        while True:
            page = reader.page(query)
            seen += [e["event_id"] for e in json.loads("[" + page.text + "]")]
            assert page.size == 2 or page.next is None
            if page.next is None:
                break
            query = query._replace(after=page.next)
        assert seen == [str(i) for i in range(7)]


@pytest.mark.parametrize(
    "query",
    [{"source": "rare"}, {"topic": "b/", "prefix": True}, {"source": "rare", "descending": True}],
)
def test_a_filter_without_an_index_looks_at_a_bounded_number_of_rows(
    store, small_index, monkeypatch, query
):
    monkeypatch.setattr(aggregator, "PAGE_MAX_SCAN", 10)
    for i in range(100):
        rare = i in (37, 38, 99)
        store.commit(
            [event(i, "b/x" if rare else "a", source="rare" if rare else "s", timestamp=NOW + i)],
            NOW,
        )
    with contextlib.closing(aggregator.Reader(store.path)) as reader:
        asked, found, pages = aggregator.EventQuery(**query), [], 0
        while True:
            page = reader.page(asked)
            found += [e["event_id"] for e in json.loads("[" + page.text + "]")]
            pages += 1
            if page.next is None:
                break
            asked = asked._replace(after=page.next)
    assert sorted(found) == ["37", "38", "99"] and 5 < pages < 15


@pytest.mark.parametrize("seed", range(int(os.environ.get("MODEL_SEEDS", "4"))))
def test_the_store_agrees_with_a_dict_under_random_operations(tmp_path, small_index, seed):
    """The oracle: a plain dict. Batches with repeats from any age, conflicts, retention, expiry, reopening, failures."""
    rng = random.Random(seed)
    path, cap = str(tmp_path / "s.db"), rng.choice([0, 0, 15])
    retention = rng.choice([0, 40])
    opened = aggregator.Store(path, False, cap, retention)
    oracle, now, counts = {}, NOW, [0, 0]
    try:
        for _ in range(int(os.environ.get("MODEL_STEPS", "600"))):
            now += rng.randrange(3)
            action = rng.random()
            if action < 0.04:
                opened.close()
                opened = aggregator.Store(path, False, cap, retention)
                assert opened.received() == sum(counts)
            elif action < 0.08:
                opened.tidy(now)
            elif action < 0.12 and oracle:
                topic, event_id = rng.choice(list(oracle))
                assert opened.locate(topic, event_id) == oracle[topic, event_id][0]
            else:
                batch = []
                for _ in range(rng.choice([1, 2, 20, 100])):
                    if oracle and rng.random() < 0.4:
                        topic, event_id = rng.choice(list(oracle))
                    else:
                        topic, event_id = (
                            rng.choice("abé"),
                            "%x" % rng.getrandbits(rng.choice([7, 40])),
                        )
                    batch.append(
                        event(
                            event_id,
                            topic,
                            '{"n":%d}' % (rng.random() < 0.1),
                            timestamp=now - rng.randrange(50),
                        )
                    )
                fails = rng.random() < 0.1
                if fails:
                    batch.insert(
                        rng.randrange(len(batch) + 1), event("broken")._replace(topic=None)
                    )
                    with pytest.raises(aggregator.StoreFailed):
                        opened.commit(batch, now)
                    continue
                decision = opened.commit(batch, now)
                expected, seq = [], decision.first_seq
                for each in batch:
                    known = oracle.get((each.topic, each.event_id))
                    if known is None:
                        oracle[each.topic, each.event_id] = (seq, each.payload)
                        expected.append("new")
                        seq += 1
                    else:
                        expected.append("duplicate" if known[1] == each.payload else "conflict")
                assert kinds(decision, len(batch)) == expected, "seed %d" % seed
                for index, verdict in decision.repeats:
                    assert verdict.seq == oracle[batch[index].topic, batch[index].event_id][0]
                counts[0] += expected.count("new")
                counts[1] += len(expected) - expected.count("new")
        assert sorted(seq for seq, _ in oracle.values()) == list(range(1, len(oracle) + 1))
        with contextlib.closing(aggregator.Reader(path)) as reader:
            stats = reader.stats()
        assert [stats["unique_processed"], stats["duplicate_dropped"]] == counts
        if not cap and not retention:
            assert stats["stored"] == len(oracle)
    finally:
        opened.close()
    assert sound(path) == []


@pytest.mark.parametrize("seed", range(int(os.environ.get("MODEL_SEEDS", "3"))))
def test_the_gaps_of_a_source_are_what_a_set_says_they_are(tmp_path, seed):
    """Late numbers, repeats, gaps beyond the bound, reopening; the oracle is a set of what has come."""
    rng, path = random.Random(seed), str(tmp_path / "s.db")
    opened, come, number = aggregator.Store(path, False), {"a": set(), "b": set()}, 0
    for _ in range(60):
        batch = []
        for _ in range(rng.choice([1, 5, 60])):
            number += 1
            source, sequence = rng.choice("ab"), rng.choice([rng.randrange(100, 400), 100 + number])
            batch.append(
                event(str(number), source=source)._replace(
                    sequence=rng.choice([sequence, sequence, None])
                )
            )
        opened.commit(batch, NOW)
        base = {}
        for each in batch:
            if each.sequence is not None:
                base[each.source] = min(base.get(each.source, each.sequence), each.sequence)
        for (
            source,
            first,
        ) in base.items():  # what came before the first group of a source was never expected
            come[source] |= set() if come[source] else set(range(first))
        for each in batch:
            if each.sequence is not None:
                come[each.source].add(each.sequence)
        if rng.random() < 0.1:
            opened.close()
            opened = aggregator.Store(path, False)
        with contextlib.closing(aggregator.Reader(path)) as reader:
            found = {each["source"]: each for each in reader.gaps(None, 10)}
            assert reader.stats()["gaps"] == sum(each["missing_count"] for each in found.values())
        for source in come:
            if come[source]:
                missing = set(range(max(come[source]))) - come[source]
                entry = found.get(source, {"missing": [], "missing_count": 0, "given_up": 0})
                assert entry["missing_count"] == len(missing) and entry["given_up"] == 0
                listed = {n for first, last in entry["missing"] for n in range(first, last + 1)}
                assert listed == missing if len(entry["missing"]) < 100 else listed <= missing
    opened.close()
    assert sound(path) == []


@needs_linux
def test_payloads_of_every_group_size_are_not_kept_in_memory(tmp_path):
    with contextlib.closing(aggregator.Store(str(tmp_path / "s.db"), False)) as opened:
        opened.commit([event("first", payload='{"n":"%s"}' % ("x" * 2_000_000))], NOW)
        before = memory_mb(os.getpid(), "VmRSS")
        for n in range(1, 64):
            payload = '{"n":"%s"}' % ("x" * (2_000_000 // n))
            assert (
                opened.commit(
                    [event("%d-%d" % (n, m), payload=payload) for m in range(n)], NOW
                ).repeats
                == []
            )
        assert memory_mb(os.getpid(), "VmRSS") < before + 60
    with contextlib.closing(aggregator.Reader(str(tmp_path / "s.db"))) as reader:
        assert reader.stats()["stored"] == 1 + 63 * 64 // 2


def test_the_gaps_remembered_are_bounded_and_the_largest_numbers_do_no_harm(tmp_path, store):
    store.commit(
        [
            event(str(n), source="s")._replace(sequence=2 * n)
            for n in range(aggregator.GAPS_KEPT + 11)
        ],
        NOW,
    )
    for number in (0, aggregator.MAX_SEQUENCE, aggregator.MAX_SEQUENCE - 9):
        store.commit(
            [
                event("%d-%d" % (number, n), source="t%d" % n)._replace(sequence=number)
                for n in (0, 1)
            ],
            NOW,
        )
    store.commit([event("only", source="u")._replace(sequence=aggregator.MAX_SEQUENCE)], NOW)
    with contextlib.closing(aggregator.Reader(store.path)) as reader:
        found = {each["source"]: each for each in reader.gaps(None, 10)}
        assert reader.stats()["gaps"] == pytest.approx(
            aggregator.GAPS_KEPT + 2 * aggregator.MAX_SEQUENCE
        )
        assert [each["source"] for each in reader.gaps("s", 10)] == ["s"] and reader.gaps(
            "none", 10
        ) == []
    assert (found["s"]["missing_count"], found["s"]["given_up"]) == (aggregator.GAPS_KEPT, 10)
    most = aggregator.MAX_SEQUENCE
    assert (
        found["t0"]["missing"] == found["t1"]["missing"] == [[1, most - 10], [most - 8, most - 1]]
        and "u" not in found
    )


CRASH = """
import os, signal, sys
sys.path.insert(0, {folder!r})
import aggregator
aggregator.RECENT_IDS, aggregator.LIST_ROWS = 64, 16
place, countdown = {place!r}, {countdown}

class Murderous:
    def __init__(self, db):
        self.db = db
    def execute(self, statement, *values):
        global countdown
        before, after = place.split("|")
        if before and statement.startswith(before):
            countdown -= 1
            if not countdown:
                os.kill(os.getpid(), signal.SIGKILL)
        result = self.db.execute(statement, *values)
        if after and statement.startswith(after):
            countdown -= 1
            if not countdown:
                os.kill(os.getpid(), signal.SIGKILL)
        return result
    def __getattr__(self, name):
        return getattr(self.db, name)

connect = aggregator._connect
aggregator._connect = lambda path, **options: Murderous(connect(path, **options))
store = aggregator.Store({path!r}, True, 25)
for i in range({start}, 100000):
    batch = [aggregator.Event("t", str(i * 7 + k), i, "s", "{{}}") for k in range(7)]
    store.commit([aggregator.record(event) for event in batch], i)
    print(i, flush=True)
"""
PLACES = [
    "INSERT INTO processed_events|",
    "|INSERT INTO processed_events",
    "INSERT INTO seen SELECT key, seq, fingerprint, f|",
    "|DELETE FROM recent.ids",
    "|UPDATE progress",
    "|INSERT INTO listing",
    "|DELETE FROM processed_events",
    "COMMIT|",
    "|COMMIT",
    "|ATTACH",
    "|INSERT INTO recent.ids",
    "|INSERT INTO stats",
    "BEGIN EXCLUSIVE|",
    "|PRAGMA user_version=",
    "|DELETE FROM listing",
    "|INSERT INTO by_time",
]


@pytest.mark.parametrize("place", PLACES)
def test_kill_9_in_the_middle_of_a_commit_loses_nothing_and_doubles_nothing(tmp_path, place):
    path, start, rng = str(tmp_path / "s.db"), 0, random.Random(place)
    for _ in range(int(os.environ.get("CRASH_ROUNDS", "2"))):
        program = CRASH.format(
            folder=os.path.dirname(os.path.abspath(aggregator.__file__)),
            path=path,
            place=place,
            countdown=1
            if "ATTACH" in place or "EXCL" in place or "user_v" in place
            else rng.randrange(1, 40),
            start=start,
        )
        child = subprocess.run(
            [sys.executable, "-c", program],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            timeout=60,
        )
        assert child.returncode == -signal.SIGKILL, child.stderr.decode()
        acknowledged = start + len(child.stdout.split())
        with contextlib.closing(aggregator.Store(path, True, 25)) as opened:
            unique = opened.received()
            assert unique in (
                acknowledged * 7,
                acknowledged * 7 + 7,
            )  # the last one may have been on its way
            everything = [event(i, payload="{}") for i in range(unique)]
            assert (
                not everything
                or kinds(opened.commit(everything, NOW), unique) == ["duplicate"] * unique
            )
            assert opened.received() == unique * 2
        assert sound(path) == []
        os.unlink(path)  # a fresh one each time, so that countdowns fall in every phase
        start = 0


def test_ten_thousand_batches_leave_the_wal_bounded(tmp_path):
    with contextlib.closing(aggregator.Store(str(tmp_path / "s.db"), False)) as opened:
        for i in range(6000):
            opened.commit([event(i)], NOW)
        assert os.path.getsize(opened.path + "-wal") < (aggregator.CHECKPOINT_PAGES + 500) * 4200


@pytest.mark.parametrize("end", ["", "-owner", "-shm", "-wal"])
@pytest.mark.parametrize("replaced", [False, True])
def test_a_store_whose_file_is_moved_or_replaced_takes_nothing_until_the_same_file_is_back(
    store, end, replaced
):
    path = store.path + end
    store.commit([event(1)], NOW)
    os.rename(path, path + ".away")
    if replaced:
        shutil.copy(path + ".away", path)
    for act in (lambda: store.commit([event(2)], NOW), store.probe):
        with pytest.raises(
            aggregator.StoreFailed, match=re.escape(path) + " was deleted, moved or replaced"
        ):
            act()
    os.replace(path + ".away", path)
    assert kinds(store.commit([event(2), event(1)], NOW), 2) == ["new", "duplicate"]
    store.close()
    assert sound(store.path) == []


def test_a_clock_that_is_set_back_an_hour_stops_neither_duplicates_nor_retention(tmp_path):
    hour, path = 3_600_000_000, str(tmp_path / "s.db")
    with contextlib.closing(
        aggregator.Store(path, retention_us=hour)
    ) as opened, contextlib.closing(aggregator.Reader(path)) as reader:
        opened.commit([event(1)], NOW + hour)  # the clock is an hour ahead
        opened.commit([event(2)], NOW)  # and set right
        [(_, verdict)] = opened.commit([event(1)], NOW + 1).repeats
        assert verdict == aggregator.Verdict("duplicate", 1, NOW + hour, "recent")
        assert not opened.tidy(NOW + hour) and reader.stats()["stored"] == 2
        while opened.tidy(NOW + hour + 1):  # the second has expired, and the first came before it
            pass
        stats = reader.stats()
        assert (
            stats["stored"] == 0 and stats["duplicate_delay_seconds"]["1"] == 1
        )  # its delay was negative
        assert kinds(opened.commit([event(1), event(2)], NOW), 2) == ["duplicate"] * 2
    assert sound(path) == []


def test_many_events_of_a_clock_that_was_years_ahead_do_not_stop_retention(tmp_path, monkeypatch):
    monkeypatch.setattr(aggregator, "TRIM_ROWS", 10)
    hour, path = 3_600_000_000, str(tmp_path / "s.db")
    with contextlib.closing(aggregator.Store(path, retention_us=hour)) as opened:
        opened.commit([event(n) for n in range(50)], NOW + 90_000 * hour)
        opened.commit([event(n) for n in range(50, 75)], NOW)
        opened.commit([event(75)], NOW + hour)
        assert not opened.tidy(NOW + hour)
        while opened.tidy(NOW + hour + 1):
            pass
        with contextlib.closing(aggregator.Reader(path)) as reader:
            assert reader.stats()["stored"] == 1
    assert sound(path) == []


@contextlib.contextmanager
def as_somebody_else():
    """For root nothing is read-only."""
    if os.geteuid():
        yield
        return
    os.setresuid(65534, 65534, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


@pytest.mark.parametrize("what, mode", [("", 0o555), ("s.db", 0o444)])
def test_a_read_only_file_or_folder_is_refused_with_a_reason(what, mode):
    with tempfile.TemporaryDirectory() as folder:  # not tmp_path, which is its owner's alone
        path = os.path.join(folder, "s.db")
        aggregator.Store(path).close()
        for name in (folder, path, path + "-owner"):
            if not os.geteuid():
                os.chown(name, 65534, -1)
        os.chmod(os.path.join(folder, what), mode)
        with as_somebody_else(), pytest.raises(
            aggregator.StoreError, match="is read-only: the user that runs"
        ):
            aggregator.Store(path)
        os.chmod(folder, 0o755)
        assert sound(path) == []


def test_a_foreign_reader_makes_the_wal_grow_and_is_warned_of_until_it_ends(
    tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(aggregator, "WAL_WARN_BYTES", 1_000_000)
    monkeypatch.setattr(aggregator, "CHECKPOINT_PAGES", 50)

    def grow(opened, start):
        for i in range(start, start + 100):
            opened.commit([event(i, payload='{"x":"%s"}' % ("y" * 20_000))], NOW)
        return os.path.getsize(opened.path + "-wal")

    with contextlib.closing(aggregator.Store(str(tmp_path / "s.db"), False)) as opened:
        assert grow(opened, 0) < 1_000_000 and not caplog.records
        with contextlib.closing(sqlite3.connect(opened.path, isolation_level=None)) as other:
            other.execute("BEGIN")
            other.execute("SELECT * FROM stats").fetchall()
            large = grow(opened, 100)
        assert large > 2_000_000
        assert 1 <= len(caplog.records) <= 3 and all(
            "WAL GROWS" in each.getMessage() for each in caplog.records
        )
        assert grow(opened, 200) < large * 1.1  # it starts over
    assert sound(tmp_path / "s.db") == []


def test_a_damaged_file_is_refused_or_fails_with_a_reason_and_nothing_else(tmp_path, small_index):
    seed = int(os.environ.get("FUZZ_SEED") or random.randrange(2**32))
    rng, path, refused, failed = random.Random(seed), str(tmp_path / "s.db"), 0, 0
    with contextlib.closing(aggregator.Store(path)) as opened:
        for i in range(0, 1500, 50):
            opened.commit(
                [
                    event(k, "ab"[k % 2], timestamp=NOW + k)._replace(sequence=k * k)
                    for k in range(i, i + 50)
                ],
                NOW + i,
            )
    with open(path, "rb") as file:
        whole = file.read()
    for number in range(int(os.environ.get("DAMAGE_ROUNDS", "40"))):
        data = bytearray(whole)
        for _ in range(rng.choice((1, 1, 5, 50))):
            at, size = rng.randrange(100, len(data)), rng.choice((1, 8, 100, 4096))
            data[at : at + size] = rng.choice(
                (b"\0" * size, rng.getrandbits(8 * size).to_bytes(size, "big"))
            )
        with open(path, "wb") as file:
            file.write(data[: len(whole)])
        try:
            opened = aggregator.Store(path, False, rng.choice((0, 300)), rng.choice((0, 1000)))
        except aggregator.StoreError as error:
            assert "damaged" in str(error) or "schema" in str(error) or "not an" in str(error), str(
                error
            )
            refused += 1
            continue
        with contextlib.closing(opened), contextlib.closing(aggregator.Reader(path)) as reader:
            again = [event(i, "a")._replace(sequence=i) for i in range(0, 3000, 7)]
            for act, *arguments in (
                (opened.commit, again, NOW),
                (opened.probe,),
                (opened.tidy, NOW + 2000),
                (opened.locate, "a", "10"),
                (reader.stats,),
                (reader.event, 20),
                (reader.gaps, None, 10),
                (reader.tail, aggregator.EventQuery(), 10),
                (reader.page, aggregator.EventQuery("a")),
                (reader.page, aggregator.EventQuery(source="s", descending=True)),
            ):
                try:
                    act(*arguments)
                except aggregator.StoreFailed as error:
                    assert str(error)
                    failed += 1
                except (
                    Exception
                ) as error:  # the pipeline takes any failure of a commit or of retention
                    print("seed", seed, "number", number)
                    assert act in (opened.commit, opened.tidy), repr(error)
                    failed += 1
        with contextlib.suppress(aggregator.StoreError):
            assert all(sentence for _, sentence in aggregator.check_store(path))
    assert refused + failed


# ======================================================================================================================
# §4  Pipeline
# ======================================================================================================================


def in_pipeline(tmp_path, body, max_events=100, **options):
    """Run `body(pipeline)` beside a pipeline on a temporary store, and stop it after."""

    async def run():
        pipeline = aggregator.Pipeline(
            lambda: aggregator.Store(str(tmp_path / "p.db"), **options), lambda: NOW, max_events
        )
        await pipeline.start()
        try:
            return await asyncio.wait_for(body(pipeline), 20)
        finally:
            assert await pipeline.stop(5)

    return asyncio.run(run())


def plain(event_id, topic="t"):
    return aggregator.Event(topic, str(event_id), NOW, "s", "{}")


class Gate:
    """Holds the writer's thread until opened, and fails its commits on demand; the store behind it is the real one."""

    def __init__(self, pipeline):
        self.opened, self.failure, self.groups = threading.Event(), None, []
        self.commit, pipeline._store.commit = pipeline._store.commit, self

    def __call__(self, records, now_us):
        assert self.opened.wait(10)
        self.groups.append(len(records))
        if self.failure:
            raise self.failure
        return self.commit(records, now_us)


def test_a_publisher_is_answered_after_the_commit(tmp_path):
    async def body(pipeline):
        gate = Gate(pipeline)
        waiting = asyncio.ensure_future(pipeline.publish([plain(1)], 10))
        await asyncio.sleep(0.05)
        assert not waiting.done() and (await pipeline.stats())["current_queue_size"] == 1
        gate.opened.set()
        assert [verdict.kind for verdict in (await waiting).verdicts()] == ["new"]
        assert (await pipeline.stats())["current_queue_size"] == 0

    in_pipeline(tmp_path, body)


def test_what_waits_is_committed_as_one_group_and_each_publisher_gets_its_own_verdicts(tmp_path):
    async def body(pipeline):
        gate = Gate(pipeline)
        first = asyncio.ensure_future(pipeline.publish([plain("x")], 1))
        await asyncio.sleep(0.05)
        others = [
            asyncio.ensure_future(pipeline.publish([plain(i), plain("x"), plain(i + 1)], 1))
            for i in (1, 2, 3)
        ]
        await asyncio.sleep(0.05)
        gate.opened.set()
        assert (await first).first_seq == 1
        receipts = await asyncio.gather(*others)
        assert [[(v.kind, v.seq) for v in receipt.verdicts()] for receipt in receipts] == [
            [("new", 2), ("duplicate", 1), ("new", 3)],
            [("duplicate", 3), ("duplicate", 1), ("new", 4)],
            [("duplicate", 4), ("duplicate", 1), ("new", 5)],
        ]
        assert gate.groups == [1, 9] and {receipt.group for receipt in receipts} == {9}
        assert len(pipeline.duplicates) == 5

    in_pipeline(tmp_path, body)


def test_a_full_queue_refuses_a_batch_whole_and_counts_nothing_of_it(tmp_path):
    async def body(pipeline):
        gate = Gate(pipeline)
        taken = [
            asyncio.ensure_future(pipeline.publish([plain(i) for i in range(k, k + 4)], 1))
            for k in (0, 4)
        ]
        await asyncio.sleep(0.05)
        with pytest.raises(aggregator.QueueFull, match="8 of 10"):
            await pipeline.publish([plain(i) for i in range(20, 23)], 1)
        last = asyncio.ensure_future(pipeline.publish([plain(30), plain(31)], 1))  # exactly fits
        await asyncio.sleep(0)
        stats = await pipeline.stats()
        assert stats["received"] == stats["current_queue_size"] == 10
        gate.opened.set()
        await asyncio.gather(last, *taken)
        stats = await pipeline.stats()
        assert (
            stats["received"] == stats["unique_processed"] == 10
            and stats["current_queue_size"] == 0
        )

    in_pipeline(tmp_path, body, max_events=10)


def test_a_batch_larger_than_the_queue_is_told_so(tmp_path):
    async def body(pipeline):
        with pytest.raises(aggregator.BatchTooLarge, match="at most 10"):
            await pipeline.publish([plain(i) for i in range(11)], 1)
        assert len((await pipeline.publish([plain(i) for i in range(10)], 1)).records) == 10

    in_pipeline(tmp_path, body, max_events=10)


def test_the_queue_is_bounded_in_bytes_too(tmp_path, monkeypatch):
    monkeypatch.setattr(aggregator, "QUEUE_MAX_BYTES", 1000)

    async def body(pipeline):
        gate = Gate(pipeline)
        first = asyncio.ensure_future(
            pipeline.publish([plain(1)], 5000)
        )  # alone, it may be larger than the bound
        await asyncio.sleep(0.05)
        with pytest.raises(aggregator.QueueFull):
            await pipeline.publish([plain(2)], 1)
        gate.opened.set()
        await first
        await pipeline.publish([plain(2)], 1)

    in_pipeline(tmp_path, body)


@pytest.mark.parametrize(
    "failure", [aggregator.StoreFailed("disk full"), ValueError("a bug"), MemoryError()]
)
def test_a_failing_commit_refuses_its_group_and_the_consumer_goes_on(tmp_path, failure, caplog):
    async def body(pipeline):
        gate = Gate(pipeline)
        gate.opened.set()
        gate.failure = failure
        both = await asyncio.gather(
            *[pipeline.publish([plain(i)], 1) for i in (1, 2)], return_exceptions=True
        )
        assert [type(error) for error in both] == [aggregator.Unavailable] * 2
        await pipeline.publish([plain(3)], 1, wait=False)
        await asyncio.sleep(0.05)
        stats = await pipeline.stats()
        assert stats["received"] == stats["unique_processed"] == stats["current_queue_size"] == 0
        gate.failure = None
        assert await pipeline.health() == ""  # found out by writing
        assert [v.kind for v in (await pipeline.publish([plain(1)], 1)).verdicts()] == ["new"]
        assert (await pipeline.stats())["received"] == 1

    in_pipeline(tmp_path, body)
    assert "LOST - 1 events" in caplog.text and "COMMIT FAILED" in caplog.text


def test_events_taken_without_waiting_are_stored_when_the_pipeline_stops(tmp_path):
    async def body(pipeline):
        for i in range(50):
            assert await pipeline.publish([plain(i)], 1, wait=False) is None

    in_pipeline(tmp_path, body)
    with contextlib.closing(aggregator.Store(str(tmp_path / "p.db"))) as opened:
        assert opened.received() == 50


def test_a_publisher_that_goes_away_leaves_its_events_and_the_books_in_order(tmp_path):
    async def body(pipeline):
        gate = Gate(pipeline)
        leaving = asyncio.ensure_future(pipeline.publish([plain(1)], 1))
        await asyncio.sleep(0.05)
        leaving.cancel()
        gate.opened.set()
        await pipeline.publish([plain(2)], 1)
        stats = await pipeline.stats()
        assert (stats["received"], stats["unique_processed"], stats["current_queue_size"]) == (
            2,
            2,
            0,
        )

    in_pipeline(tmp_path, body)


def test_nothing_is_taken_once_stopping(tmp_path):
    async def body(pipeline):
        pipeline._stopping = True
        with pytest.raises(aggregator.Stopping):
            await pipeline.publish([plain(1)], 1)
        assert "stopping" in await pipeline.health()

    in_pipeline(tmp_path, body)


def test_retention_works_without_anything_being_published(tmp_path, monkeypatch):
    monkeypatch.setattr(aggregator, "TIDY_INTERVAL_S", 0.01)
    with contextlib.closing(aggregator.Store(str(tmp_path / "p.db"))) as opened:
        opened.commit([event(i) for i in range(1200)], NOW)

    async def body(pipeline):
        while (await pipeline.stats())["stored"] > 5:
            await asyncio.sleep(0.01)
        assert (await pipeline.stats())["unique_processed"] == 1200

    in_pipeline(tmp_path, body, max_per_topic=5)


def test_small_groups_are_logged_event_by_event_and_large_ones_in_a_line(tmp_path, caplog):
    caplog.set_level(logging.INFO)

    async def body(pipeline):
        await pipeline.publish([plain(1), plain(1)], 1)
        await pipeline.publish([aggregator.Event("t", "1", NOW, "other", "{}")], 1)
        await pipeline.publish([plain(i) for i in range(50)], 1)

    in_pipeline(tmp_path, body)
    lines = [record.getMessage() for record in caplog.records]
    assert lines[:2] == [
        "EVENT PROCESSED - topic: t, event_id: 1, source: s",
        "DUPLICATE DROPPED - topic: t, event_id: 1, source: s",
    ]
    assert (
        lines[2].startswith("CONFLICT - topic: t, event_id: 1, source: other")
        and "seq 1" in lines[2]
    )
    assert lines[4:] == ["GROUP COMMITTED - events: 50, processed: 49, duplicates dropped: 1"]


def test_the_last_duplicates_are_kept_without_their_payloads(tmp_path):
    async def body(pipeline):
        large = plain(1)._replace(payload='{"x":"%s"}' % ("y" * 1_000_000))
        for _ in range(4):
            await pipeline.publish([large], 1_000_000)
        assert [len(each.payload) for each, _, _ in pipeline.duplicates] == [0] * 3

    in_pipeline(tmp_path, body)


def test_nobody_waits_for_a_consumer_that_has_ended(tmp_path, monkeypatch):
    async def body(pipeline):
        pipeline._tasks[0].cancel()
        await asyncio.sleep(0)
        with pytest.raises(aggregator.Stopping):
            await pipeline.publish([plain(1)], 1)
        assert "consumer has ended" in await pipeline.health()

    in_pipeline(tmp_path, body)


# ======================================================================================================================
# §5 HTTP
# ======================================================================================================================

MAX = 1000  # bytes of a body in these tests
GET, POST = b"GET / HTTP/1.1\r\nHost: h\r\n", b"POST /p HTTP/1.1\r\nHost: h\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
NEXT = b"PUT /next?a=1 HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\n\r\nok"
NEXT_SEEN = ("PUT", ("next",), b"ok")


def get(*fields):
    return GET + b"".join(field + b"\r\n" for field in fields) + b"\r\n"


def post(*fields, body=b""):
    return POST + b"".join(field + b"\r\n" for field in fields) + b"\r\n" + body


def zipped(body, coding=b"gzip"):
    return post(b"Content-Encoding: " + coding, b"Content-Length: %d" % len(body), body=body)


def outcome(pieces, parser=None):
    """Method, path and body of the requests that came out, and the name of the problem that ended it, if any."""
    parser, seen = parser or aggregator.RequestParser(MAX), []
    for piece in pieces:
        parser.feed(piece)
        try:
            for request in iter(parser.next_request, None):
                assert type(request) is aggregator.Request
                seen.append((request.head.method, request.head.path, request.body))
        except aggregator.HTTPError as error:
            assert error.problem in aggregator.PROBLEMS and error.detail.isascii()
            return seen, error.problem
    return seen, None


def feeds(raw):
    """Whole, byte by byte, and in two pieces, split everywhere (at 200 places of what is long)."""
    yield [raw]
    yield [raw[i : i + 1] for i in range(len(raw))]
    for cut in range(1, len(raw), 1 + len(raw) // 200):
        yield [raw[:cut], raw[cut:]]


def head_of(raw):
    parser = aggregator.RequestParser(MAX)
    parser.feed(raw)
    return parser.next_request().head


def padded(size):
    """A head of `size` bytes, without the empty line that ends it."""
    lines = GET + (b"a: " + b"x" * 995 + b"\r\n") * ((size - len(GET)) // 1000 - 1)
    return lines + b"b: " + b"y" * (size - len(lines) - 3)


HELLO_GZ = gzip.compress(b"hello")
ROOT, P = ("GET", ("",), b""), ("POST", ("p",), b"")
HELLO = ("POST", ("p",), b"hello")
GOOD = {
    "no body": (get(), [ROOT]),
    "no blank after the colon": (b"GET / HTTP/1.1\r\nHost:h\r\n\r\n", [ROOT]),
    "blanks around a value": (get(b"A: \t x \t"), [ROOT]),
    "an empty value": (get(b"A:"), [ROOT]),
    "bytes over 127 in a value": (get(b"A: caf\xe9 \xff"), [ROOT]),
    "an empty line before": (b"\r\n" + get(), [ROOT]),
    "an empty line after a body": (
        post(b"Content-Length: 5", body=b"hello\r\n") + get(),
        [HELLO, ROOT],
    ),
    "HTTP/1.0 without Host": (b"GET / HTTP/1.0\r\n\r\n", [ROOT]),
    "an unknown minor version": (b"GET / HTTP/1.2\r\nHost: h\r\n\r\n", [ROOT]),
    "a length": (post(b"Content-Length: 5", body=b"hello"), [HELLO]),
    "a length of zero": (post(b"Content-Length: 0"), [P]),
    "a length with leading zeros": (post(b"content-LENGTH:\t0005 ", body=b"hello"), [HELLO]),
    "a GET with a body": (
        get(b"Content-Length: 14") + b"GET / HTTP/1.1",
        [ROOT[:2] + (b"GET / HTTP/1.1",)],
    ),
    "the largest body": (post(b"Content-Length: 1000", body=b"x" * MAX), [P[:2] + (b"x" * MAX,)]),
    "chunks": (CHUNKED + b"2\r\nhe\r\n003\r\nllo\r\n0\r\n\r\n", [HELLO]),
    "no chunk but the last": (CHUNKED + b"0\r\n\r\n", [P]),
    "CHUNKED": (post(b"transfer-encoding: \tChunKED ", body=b"5\r\nhello\r\n000\r\n\r\n"), [HELLO]),
    "chunk extensions": (CHUNKED + b'5;a=b;c="d;e"\r\nhello\r\n0 \t;x\r\n\r\n', [HELLO]),
    "trailers": (CHUNKED + b"5\r\nhello\r\n0\r\nContent-Length: 7\r\nA: b\r\n\r\n", [HELLO]),
    "a chunk that holds CR LF": (
        CHUNKED + b"7\r\n\r\n0\r\n\r\n\r\n0\r\n\r\n",
        [P[:2] + (b"\r\n0\r\n\r\n",)],
    ),
    "hex digits": (
        CHUNKED + b"A\r\nabcdefghij\r\na\r\nabcdefghij\r\n0\r\n\r\n",
        [P[:2] + (b"abcdefghij" * 2,)],
    ),
    "chunks, the most": (
        CHUNKED + b"3e7\r\n%b\r\n1\r\nx\r\n0\r\n\r\n" % (b"x" * 999),
        [P[:2] + (b"x" * MAX,)],
    ),
    "many chunks": (CHUNKED + b"1\r\nx\r\n" * 150 + b"0\r\n\r\n", [P[:2] + (b"x" * 150,)]),
    "the longest chunk line": (CHUNKED + b"5;%b\r\nhello\r\n0\r\n\r\n" % (b"x" * 1022), [HELLO]),
    "the most trailers": (CHUNKED + b"0\r\n" + b"a:b\r\n" * 100 + b"\r\n", [P]),
    "the longest trailers": (
        CHUNKED + b"0\r\na:%b\r\nb:%b\r\n\r\n" % (b"x" * 4094, b"y" * 4094),
        [P],
    ),
    "the longest request line": (
        b"GET /%b HTTP/1.1\r\nHost: h\r\n\r\n" % (b"x" * 7986),
        [("GET", ("x" * 7986,), b"")],
    ),
    "the longest head": (padded(aggregator.MAX_HEAD_BYTES) + b"\r\n\r\n", [ROOT]),
    "the most fields": (get(*[b"A: b"] * 99), [ROOT]),
    "three requests": (get() + CHUNKED + b"5\r\nhello\r\n0\r\n\r\n" + get(), [ROOT, HELLO, ROOT]),
    "the asterisk": (b"OPTIONS * HTTP/1.1\r\nHost: h\r\n\r\n", [("OPTIONS", ("*",), b"")]),
    "gzip": (zipped(HELLO_GZ), [HELLO]),
    "x-GZip": (zipped(HELLO_GZ, b"x-GZip"), [HELLO]),
    "gzip of two members": (
        zipped(gzip.compress(b"he") + gzip.compress(b"") + gzip.compress(b"llo")),
        [HELLO],
    ),
    "gzip of the largest body": (zipped(gzip.compress(b"x" * MAX)), [P[:2] + (b"x" * MAX,)]),
    "gzip in chunks": (
        post(
            b"Transfer-Encoding: chunked",
            b"Content-Encoding: gzip",
            body=b"%x\r\n%b\r\n0\r\n\r\n" % (len(HELLO_GZ), HELLO_GZ),
        ),
        [HELLO],
    ),
    "identity": (zipped(b"hello", b"Identity"), [HELLO]),
}

LENGTHS = (
    b'+5|-5|-0|5 5|5,5|5, 5|1_0|0x5|5.0|5e0||five|\xb2|\xd9\xa5|\xef\xbc\x95|5\x0b|\x0c5|\xa05|5\x85|"5"|5;|0b101'
).split(b"|")
CODINGS = (
    b'|xchunked|chunked123|chunked, chunked|chunked, identity|chunked, gzip|identity|gzip|chunked;q=1|"chunked"|'
    b"chunked,|,chunked|x, chunked|chunke|chun ked|\x0bchunked|chunked\x0c|\xa0chunked|chun\xe2\x84\xaaed|chunked\x00|"
    b"trailers"
).split(b"|")
SIZES = (
    b"| |+5|-5|-0|+0|0x5|0X5|5_0|0_0|5 | 5|\t5|g|5g|5.|\xd9\xa5|\xb2|5\x00|5,|5\r|5;a\x00|5;\x7f|5;a\nb|5\n|5;a\r|"
    b"00000000000000000|fffffffffffffffff"
).split(b"|")
LINES = (
    b"GET /|GET  / HTTP/1.1|GET / HTTP/1.1 | GET / HTTP/1.1|GET\t/\tHTTP/1.1|GET / x HTTP/1.1|GET / HTTP/1.1x|"
    b"GET / http/1.1|GET / HTTP/1|GET / HTTP/1.10|GET / HTTP/11|GET / HTTP/1.\xb2|GET / HTTP /1.1|GET / HTTPS/1.1|"
    b"GET /\x00 HTTP/1.1|GET /\x1f HTTP/1.1|GET /\x7f HTTP/1.1|GET /\x0b HTTP/1.1|GET /\n HTTP/1.1|GET /\r HTTP/1.1|"
    b"G\x00ET / HTTP/1.1|G(T / HTTP/1.1|G\xc9T / HTTP/1.1|GET HTTP/1.1|GET  HTTP/1.1||GET x HTTP/1.1|GET ?a HTTP/1.1|"
    b"GET * HTTP/1.1|GET /#a HTTP/1.1|GET h:80 HTTP/1.1|OPTIONS *a HTTP/1.1|OPTIONS *?a HTTP/1.1|"
    b"GET ftp://h/ HTTP/1.1|GET http:/// HTTP/1.1|GET http://a@h/ HTTP/1.1|GET http://h:x/ HTTP/1.1|"
    b"GET http://[/ HTTP/1.1|GET http:// HTTP/1.1|GET /% HTTP/1.1|GET /%4 HTTP/1.1|GET /%zz HTTP/1.1|"
    b"GET /%+4 HTTP/1.1|GET /% 4 HTTP/1.1|GET /%\xd9\xa5\xd9\xa5 HTTP/1.1|GET /%ff HTTP/1.1|GET /%c0%af HTTP/1.1|"
    b"GET /%ed%a0%80 HTTP/1.1|GET /\xff HTTP/1.1|GET /?%f HTTP/1.1|GET /?a=%80 HTTP/1.1"
).split(b"|")
FIELDS = (
    b"A : b|A\t: b|A\xa0: b| A: b|\tA: b|: b|A|A b: c|A(b): c|\xc4: b|A\x00: b|A: \x00|A: b\x00c|A: \x01|A: \x0b|"
    b"A: \x1f|A: \x7f|A: b\n c|A: b\nC: d|A: b\rC: d|A: b\r|A: b\r\n c|A: b\r\n\tc|A: b\r\n : c|Host: h|host: i|"
    b"Content_Length: 5|Transfer_Encoding: chunked|Content-Length : 5|Transfer-Encoding : chunked|"
    b"Content-Length: 5\r\nContent-Length: 5|Content-Length: 5\r\ncontent-length: 6|"
    b"Content-Length: 5\r\nTransfer-Encoding: chunked|Content-Length: 0\r\nTransfer-Encoding:|"
    b"Transfer-Encoding: chunked\r\nContent-Length: 5|Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked|"
    b"Transfer-Encoding: gzip\r\nTransfer-Encoding: x|Transfer-Encoding:\r\n chunked|Content-Length: \r\n 5|"
    b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity|Content-Length: 5\r\nTransfer-Encoding: identity|"
    b"Transfer-Encoding: chunked\r\nContent-Length: 0|Content-Length: 5\r\nContent_Length: 6|Content-Length: 5, 5|"
    b"content-transfer_encoding: 7bit\r\nTransfer_Encoding: x|Content-Length: 5\r\n Transfer-Encoding: chunked"
).split(b"|")
HOSTS = (
    b'a b|a/b|a,b, c|a@b|a:b|a:80:80|http://h|[::1|::1|[g]|h\xe9|a?b|a#b|"h"|h\\|a%|a%zz'
).split(b"|")
CHUNKS = (
    b"5\r\nhello0\r\n\r\n|5\r\nhello\n0\r\n\r\n|5\r\nhello\r0\r\n\r\n|5\r\nhell\r\n0\r\n\r\n|5\r\nhello!\r\n0\r\n\r\n|"
    b"5\r\nhello\r\r\n0\r\n\r\n|5\r\nhello\n\r\n0\r\n\r\n|5\nhello|5\rhello|\n5\r\nhello|5\r\nhello\r\n\r\n0\r\n\r\n|"
    b"0\r\nA : b\r\n\r\n|0\r\nA: b\r\n c\r\n\r\n|0\r\nA: \x00\r\n\r\n|0\r\nA\r\n\r\n|0\r\nA: b\n\r\n|0\r\n\n|0\r\n\rX|"
    b"0\r\n0\r\n\r\n|0\r\nGET / HTTP/1.1\r\nHost: h\r\n\r\n|0\r\nGET http://h/ HTTP/1.1\r\n\r\n|5\r\nhello\r\n\r\n|"
    b"5;\nhello\r\n0\r\n\r\n|5;a\rb\r\nhello\r\n0\r\n\r\n|5\r\nhello\r\n0 \r\n\r\n|5\r\nhello\r\n-0\r\n\r\n"
).split(b"|")
TAIL = b"\r\nHost: h\r\n\r\n"

REFUSED = [
    ("bad-request", raw)
    for raw in itertools.chain(
        (post(b"Content-Length: " + length, body=b"hello") for length in LENGTHS),
        (post(b"Transfer-Encoding: " + coding, body=b"0\r\n\r\n") for coding in CODINGS),
        (CHUNKED + size + b"\r\nhello\r\n0\r\n\r\n" for size in SIZES + [b"1" * 500]),
        (CHUNKED + rest for rest in CHUNKS),
        (line + TAIL for line in LINES),
        (get(field) for field in FIELDS),
        (b"GET / HTTP/1.1\r\nHost: " + host + b"\r\n\r\n" for host in HOSTS),
        (
            b"POST /p HTTP/1.0\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            b"GET / HTTP/1.1\r\n\r\n",
            b"GET / HTTP/1.1\r\n Host: h\r\n\r\n",
            b"GET http://h/ HTTP/1.1\r\n\r\n",
            b"GET / HTTP/1.0\r\nHost: a b\r\n\r\n",
            b"\r\n\r\n" + get(),
            b"\n" + get(),
            b"\rGET",
            b" " + get(),
            b"\x00" + get(),
            b"\xef\xbb\xbf" + get(),
            b"\x16\x03\x01" + get(),
            get().replace(b"\r\n", b"\n"),
            get().replace(b"\r\n", b"\r") + b"\r\n\r\n",
            GET + b"\n",
            GET + b"A: b\n\r\n",
            GET + b"\r\r\n",
            GET[:-2] + b"\r\r\n\r\n",
            CHUNKED + b"5;%b\r\n" % (b"x" * 1023),
        ),
        (
            zipped(body)
            for body in (
                b"hello",
                HELLO_GZ[:-1],
                HELLO_GZ[:5],
                HELLO_GZ + b"\0",
                HELLO_GZ + b"garbage",
                HELLO_GZ + HELLO_GZ[:-4],
                HELLO_GZ[:-8] + b"\0" * 8,
                zlib.compress(b"hello"),
            )
        ),
    )
]
REFUSED += [
    ("too-large", raw)
    for raw in (
        post(b"Content-Length: 1001", body=b"x" * 1001),
        post(b"Content-Length: " + b"9" * 18),
        post(b"Content-Length: 18446744073709551621"),
        post(b"Content-Length: " + b"1" * 5000),
        post(b"Content-Length: 1001", b"Expect: 100-continue"),
        CHUNKED + b"3e9\r\n" + b"x" * 1001,
        CHUNKED + b"3e8\r\n%b\r\n1\r\n" % (b"x" * MAX),
        CHUNKED + b"ffffffff\r\n",
        CHUNKED + b"FFFFFFFFFFFFFFFF\r\n",
        CHUNKED + b"8000000000000000\r\n",
        zipped(gzip.compress(b"x" * 1001)),
        zipped(gzip.compress(b"\0" * 500_000)),
        zipped(gzip.compress(b"x" * 501) + gzip.compress(b"x" * 500)),
    )
]
REFUSED += [
    ("target-too-long", raw)
    for raw in (b"GET /%b HTTP/1.1" % (b"x" * 7987) + TAIL, b"x" * 8002, b"A" * 100_000)
]
REFUSED += [
    ("headers-too-large", raw)
    for raw in (
        padded(aggregator.MAX_HEAD_BYTES + 1) + b"\r\n\r\n",
        get(*[b"A: b"] * 100),
        GET + b"a: " + b"x" * 40_000,
        CHUNKED + b"0\r\n" + b"a:b\r\n" * 101 + b"\r\n",
        CHUNKED + b"0\r\na:%b\r\nb:%b\r\n\r\n" % (b"x" * 4094, b"y" * 4095),
        CHUNKED + b"0\r\n" + b"a" * 9000,
    )
]
REFUSED += [
    ("not-implemented", raw)
    for raw in (
        [
            method + b" / HTTP/1.1" + TAIL
            for method in b"get|Get|GETT|GE|CONNECT|PROPFIND|!|M-SEARCH".split(b"|")
        ]
        + [
            b"CONNECT h:443 HTTP/1.1" + TAIL,
            post(b"Transfer-Encoding: gzip, chunked", body=b"0\r\n\r\n"),
            post(b"Transfer-Encoding: gzip", b"Transfer-Encoding: chunked", body=b"0\r\n\r\n"),
        ]
    )
]
REFUSED += [
    ("version-not-supported", raw)
    for raw in [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"]
    + [b"GET / HTTP/%b%b" % (version, TAIL) for version in (b"2.0", b"0.9", b"3.0", b"0.0", b"9.9")]
]
REFUSED += [
    ("expectation-failed", post(b"Expect: " + value, b"Content-Length: 5", body=b"hello"))
    for value in (b"x", b"100", b"100-continue, x", b"100-continue;a", b"200-ok", b"100-continued")
]
REFUSED += [
    ("unsupported-encoding", zipped(HELLO_GZ, coding))
    for coding in (
        b"br",
        b"deflate",
        b"gzip, gzip",
        b"gzip, identity",
        b"gzipped",
        b"zstd",
        b"gzip;q=1",
    )
]
REFUSED += [("bad-parameter", b"GET /?a=1&%61=2 HTTP/1.1" + TAIL)]


@pytest.mark.parametrize("raw, expected", GOOD.values(), ids=GOOD)
def test_a_good_request_is_parsed_alike_however_it_arrives(raw, expected):
    for pieces in feeds(raw):
        assert outcome(pieces) == (expected, None)
    for pieces in feeds(raw + NEXT):
        assert outcome(pieces) == (expected + [NEXT_SEEN], None)
    assert outcome([raw[:-1]]) == (expected[:-1], None)  # and not a byte early


@pytest.mark.parametrize("problem, raw", REFUSED, ids=lambda value: ascii(value)[-60:])
def test_a_bad_request_is_refused_alike_however_it_arrives_and_so_is_what_follows(problem, raw):
    for pieces in itertools.chain(feeds(raw), feeds(raw + NEXT)):
        assert outcome(pieces) == ([], problem)
    assert outcome([NEXT + raw]) == outcome([NEXT, raw]) == ([NEXT_SEEN], problem)


TOKEN = set(b"!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
TEXT = {9} | set(range(32, 127)) | set(range(128, 256))


@pytest.mark.parametrize(
    "before, after, taken",
    [
        (b"G", b"T / HTTP/1.1" + TAIL, set(b"E")),
        (GET + b"A", b"B: c\r\n\r\n", TOKEN | set(b":")),
        (GET, b": c\r\n\r\n", TOKEN),
        (GET + b"A: b", b"c\r\n\r\n", TEXT),
        (GET + b"A:", b"\r\n\r\n", TEXT),
        (b"GET /a", b"b HTTP/1.1" + TAIL, set(range(33, 127)) - set(b"#%")),
        (b"GET /?a=", b"b HTTP/1.1" + TAIL, set(range(33, 127)) - set(b"#%")),
        (CHUNKED + b"5;a", b"b\r\nhello\r\n0\r\n\r\n", TEXT),
        (CHUNKED + b"0\r\nA: b", b"c\r\n\r\n", TEXT),
        (CHUNKED + b"0\r\nA", b"B: c\r\n\r\n", TOKEN | set(b":")),
    ],
    ids=lambda value: ascii(value)[:40],
)
def test_every_byte_in_every_place_is_taken_or_refused_as_the_grammar_says(before, after, taken):
    for byte in range(256):
        raw = before + bytes([byte]) + after
        expected = None if byte in taken else "bad-request"
        if before == b"G" and byte in TOKEN - taken:
            expected = "not-implemented"
        assert (
            outcome([raw])[1] == outcome([raw[i : i + 1] for i in range(len(raw))])[1] == expected
        ), byte


def test_a_parser_that_refused_must_not_be_asked_again():
    parser = aggregator.RequestParser()
    assert outcome([b"x\r\n\r\n" + NEXT], parser) == ([], "bad-request")
    with pytest.raises(AssertionError):
        parser.next_request()


@pytest.mark.parametrize(
    "target, path, query, host",
    [
        (b"/", ("",), {}, "h"),
        (b"//", ("", ""), {}, "h"),
        (b"//[", ("", "["), {}, "h"),
        (b"/a/b/", ("a", "b", ""), {}, "h"),
        (b"/a%2Fb/c%20d+e", ("a/b", "c d+e"), {}, "h"),
        (b"/caf%C3%A9/%f0%9F%98%80", ("café", "😀"), {}, "h"),
        (b"/caf\xc3\xa9", ("café",), {}, "h"),
        (b"/../%2e%2e", ("..", ".."), {}, "h"),
        (b"/%00%0a%25", ("\0\n%",), {}, "h"),
        (b"/?", ("",), {}, "h"),
        (
            b"/?a=1&b=x+y%2B%26&&c&=&d=e=f?g",
            ("",),
            {"a": "1", "b": "x y+&", "c": "", "": "", "d": "e=f?g"},
            "h",
        ),
        (b"http://g/x?y=1", ("x",), {"y": "1"}, "g"),
        (b"HTTP://g:80", ("",), {}, "g:80"),
        (b"http://g?y", ("",), {"y": ""}, "g"),
    ],
)
def test_a_target_is_split_then_decoded_and_its_authority_outranks_the_host_field(
    target, path, query, host
):
    assert head_of(b"GET " + target + b" HTTP/1.1" + TAIL)[1:3] == (path, query)
    assert head_of(b"GET " + target + b" HTTP/1.1" + TAIL).headers["host"] == host


@pytest.mark.parametrize(
    "host", b"|h|h:|h:8000|127.0.0.1:80|[::1]|[::ffff:1.2.3.4]:80|a-b_c.~d|a%41".split(b"|")
)
def test_a_host_field_may_hold_whatever_names_a_host(host):
    assert head_of(b"GET / HTTP/1.1\r\nhOST: " + host + b" \r\n\r\n").headers == {
        "host": host.decode()
    }


def test_field_names_are_lower_case_and_repeated_fields_are_joined_in_order():
    assert head_of(get(b"X: 1", b"y:2", b"x: ", b"X: caf\xe9")).headers == {
        "host": "h",
        "x": "1, , caf\xe9",
        "y": "2",
    }
    assert (
        head_of(get(b"Content-Type: \tText/Plain \t; Charset=UTF-8")).content_type == "text/plain"
    )


@pytest.mark.parametrize(
    "version, fields, keep_alive",
    [
        (1, b"", True),
        (1, b"close", False),
        (1, b"CLOSE", False),
        (1, b"foo, close", False),
        (1, b"close,foo", False),
        (1, b"foo|Close", False),
        (1, b"keep-alive, close", False),
        (1, b"\tx\t,\tclose\t", False),
        (1, b",,close", False),
        (1, b"closed", True),
        (1, b"foo close", True),
        (0, b"", False),
        (0, b"foo", False),
        (0, b"Keep-Alive", True),
        (0, b"foo|keep-alive", True),
        (0, b"keep-alive, close", False),
    ],
)
def test_connection_is_a_list_of_tokens_and_may_be_repeated(version, fields, keep_alive):
    lines = b"".join(b"Connection: " + field + b"\r\n" for field in fields.split(b"|"))
    assert (
        head_of(b"GET / HTTP/1.%d\r\nHost: h\r\n%b\r\n" % (version, lines)).keep_alive is keep_alive
    )
    assert head_of(b"GET / HTTP/1.%d\r\nHost: h\r\n\r\n" % version).keep_alive is bool(version)


@pytest.mark.parametrize(
    "raw, expected",
    [
        (post(b"Expect: 100-continue", b"Content-Length: 5"), True),
        (post(b"expect: 100-CONTINUE", b"Transfer-Encoding: chunked"), True),
        (post(b"Content-Length: 5"), False),
        (post(b"Expect:", b"Content-Length: 5"), False),
        (
            POST.replace(b"1.1", b"1.0") + b"Expect: 100-continue\r\nContent-Length: 5\r\n\r\n",
            False,
        ),
    ],
)
def test_continue_is_wanted_from_the_head_on_until_the_body_is_there(raw, expected):
    parser = aggregator.RequestParser(MAX)
    assert (outcome([raw[:-1]], parser), parser.wants_continue, parser.phase) == (
        ([], None),
        False,
        "head",
    )
    assert (outcome([raw[-1:]], parser), parser.wants_continue, parser.phase) == (
        ([], None),
        expected,
        "body",
    )
    body = b"5\r\nhello\r\n0\r\n\r\n" if b"chunked" in raw else b"hello"
    assert (outcome([body], parser), parser.wants_continue, parser.phase) == (
        ([HELLO], None),
        False,
        "idle",
    )


def test_continue_is_not_wanted_without_a_body_nor_after_a_refusal():
    expect = b"Expect: 100-continue"
    for raw, result in (
        (get(expect), ([ROOT], None)),
        (post(expect, b"Content-Length: 1001"), ([], "too-large")),
        (post(expect, b"Transfer-Encoding: chunked", body=b"x\r\n"), ([], "bad-request")),
    ):
        parser = aggregator.RequestParser(MAX)
        assert (outcome([raw], parser), parser.wants_continue) == (result, False)


@pytest.mark.parametrize(
    "start, more, kept",
    [
        (b"GET /", b"x", 8002),
        (GET, b"a: b\r\n", 32_768),
        (GET + b"a: ", b"x", 32_768 + 4),
        (CHUNKED + b"5;", b"x", 1026),
        (CHUNKED, b"1" * 8, 1026),
        (CHUNKED, b"1\r\nx\r\n", MAX),
        (CHUNKED + b"0\r\n", b"a:b\r\n", 8192),
        (CHUNKED + b"0\r\na:", b"x", 8194),
        (b"\r\n", b"\r\n", 32_768),
        (b"", b"\r", 2),
    ],
)
def test_what_never_ends_is_refused_before_it_fills_the_memory(start, more, kept):
    parser, most = aggregator.RequestParser(MAX), 0
    parser.feed(start)
    with pytest.raises(aggregator.HTTPError):
        for _ in range(50_000 // len(more)):
            assert parser.next_request() is None
            most = max(most, len(parser._buffer))
            parser.feed(more)
    assert most <= kept


def test_random_bytes_are_a_request_or_unfinished_or_refused_however_they_arrive():
    seed = int(os.environ.get("FUZZ_SEED") or random.randrange(2**32))
    count = int(os.environ.get("FUZZ_REQUESTS", "40000"))
    rng = random.Random(seed)
    good = [raw for raw, _ in GOOD.values() if len(raw) < 400]
    bad = [raw for _, raw in REFUSED if len(raw) < 400]
    bits = (
        b"\r\n|\r\n\r\n|\r|\n|\0| |\t|:|;|,|%|0|5|f|-|_|\xff|chunked|Content-Length: 5\r\n|0\r\n\r\n|\x1f\x8b\x08|"
        b"Transfer-Encoding: chunked\r\n|HTTP/1.1|GET |/|Host: h\r\n"
    ).split(b"|")
    finished = refused = 0
    for number in range(count):
        raw = bytearray(
            rng.choice(
                rng.choice((good, good, bad, [b"".join(rng.choices(bits, k=rng.randint(1, 30)))]))
            )
        )
        for _ in range(rng.choice((0, 1, 1, 2, 5))):
            at = rng.randrange(len(raw) + 1)
            raw[at : at + rng.choice((0, 0, 1, 2, 9))] = rng.choice(
                (rng.choice(bits), bytes([rng.randrange(256)]))
            )
        raw = bytes(raw) + rng.choice((b"", b"", NEXT))
        cuts = sorted(rng.randrange(len(raw) + 1) for _ in range(rng.randint(1, 4)))
        pieces = [raw[start:end] for start, end in zip([0] + cuts, cuts + [len(raw)])]
        try:
            whole, split = outcome([raw]), outcome(pieces)
            assert whole[0] == split[0] and bool(whole[1]) == bool(split[1])
        except BaseException:
            print("seed", seed, "number", number, "pieces", pieces)
            raise
        finished, refused = finished + bool(whole[0]), refused + bool(whole[1])
    assert finished > count // 10 and refused > count // 10


def seconds(pieces, max_body):
    """The least CPU time of three runs, all of which end with one request."""
    times = []
    for _ in range(3):
        aggregator._parse_head.cache_clear()
        start = time.process_time()
        seen, problem = outcome(pieces, aggregator.RequestParser(max_body))
        times.append(time.process_time() - start)
        assert len(seen) == 1 and problem is None
    return min(times)


@pytest.mark.parametrize(
    "raw, size",
    [
        (lambda n: [b"%c" % byte for byte in padded(n) + b"\r\n\r\n"], 8000),
        (lambda n: [b"%c" % byte for byte in b"GET /%b HTTP/1.1" % (b"x" * n) + TAIL], 1900),
        (
            lambda n: [
                b"%c" % byte
                for byte in CHUNKED + b"0\r\n" + b"a:%b\r\n" % (b"x" * 96) * (n // 100) + b"\r\n"
            ],
            2000,
        ),
        (
            lambda n: [b"%c" % byte for byte in CHUNKED + b"1\r\nx\r\n" * (n // 6) + b"0\r\n\r\n"],
            16_000,
        ),
        (lambda n: [CHUNKED + b"1\r\nx\r\n" * (n // 6) + b"0\r\n\r\n"], 250_000),
        (
            lambda n: [b"%c" % byte for byte in post(b"Content-Length: %d" % n, body=b"x" * n)],
            64_000,
        ),
        (lambda n: [zipped(gzip.compress(b"x" * 20 * n))], 50_000),
    ],
    ids=["head", "request line", "trailers", "chunks", "chunks at once", "body", "gzip"],
)
def test_four_times_the_input_takes_about_four_times_as_long(raw, size):
    assert seconds(raw(4 * size), 10**7) < 9 * seconds(raw(size), 10**7) + 0.005


def test_a_gzip_body_of_more_members_than_the_limit_is_refused():  # each costs a copy of all that is behind it
    member = gzip.compress(b"x")
    assert (
        aggregator._inflate(member * aggregator.MAX_GZIP_MEMBERS, MAX)
        == b"x" * aggregator.MAX_GZIP_MEMBERS
    )
    for excess in (1, 50_000):
        with pytest.raises(aggregator.HTTPError):
            aggregator._inflate(member * (aggregator.MAX_GZIP_MEMBERS + excess), 10**7)


DATE = "Thu, 01 Jan 1970 00:00:00 GMT"
TOP = (
    b"Date: "
    + DATE.encode()
    + b"\r\nServer: aggregator/"
    + aggregator.__version__.encode()
    + b"\r\nX-Content-Type-Options: nosniff\r\n"
)
JSON = b"Content-Type: application/json\r\n"


async def no_pieces():
    yield b""


@pytest.mark.parametrize(
    "response, options, expected",
    [
        ((200, b"{}"), {}, b"HTTP/1.1 200 OK\r\n" + TOP + JSON + b"Content-Length: 2\r\n\r\n{}"),
        ((202, b""), {}, b"HTTP/1.1 202 Accepted\r\n" + TOP + JSON + b"Content-Length: 0\r\n\r\n"),
        (
            (200, "é😀".encode()),
            {},
            b"HTTP/1.1 200 OK\r\n" + TOP + JSON + b"Content-Length: 6\r\n\r\n" + "é😀".encode(),
        ),
        (
            (200, b"{}"),
            {"head_only": True},
            b"HTTP/1.1 200 OK\r\n" + TOP + JSON + b"Content-Length: 2\r\n\r\n",
        ),
        ((204,), {}, b"HTTP/1.1 204 No Content\r\n" + TOP + b"\r\n"),
        (
            (204, b"", "", (("Allow", "GET, HEAD"),)),
            {"keep_alive": False},
            b"HTTP/1.1 204 No Content\r\n" + TOP + b"Allow: GET, HEAD\r\nConnection: close\r\n\r\n",
        ),
        (
            (400, b"x", "text/plain", (("A", "b"), ("C", "d"))),
            {"keep_alive": False},
            b"HTTP/1.1 400 Bad Request\r\n"
            + TOP
            + b"Content-Type: text/plain\r\nContent-Length: 1\r\nA: b\r\nC: d\r\nConnection: close\r\n\r\nx",
        ),
        (
            (200, no_pieces()),
            {},
            b"HTTP/1.1 200 OK\r\n" + TOP + JSON + b"Transfer-Encoding: chunked\r\n\r\n",
        ),
        (
            (200, no_pieces()),
            {"keep_alive": False, "http_1_0": True},
            b"HTTP/1.1 200 OK\r\n" + TOP + JSON + b"Connection: close\r\n\r\n",
        ),
        (
            (200, b""),
            {"http_1_0": True},
            b"HTTP/1.1 200 OK\r\n"
            + TOP
            + JSON
            + b"Content-Length: 0\r\nConnection: keep-alive\r\n\r\n",
        ),
    ],
)
def test_a_response_has_exactly_these_bytes(response, options, expected):
    options = {"keep_alive": True, **options}
    for _ in range(2):  # the second from the cache
        assert (
            aggregator.encode_response(aggregator.Response(*response), DATE, **options) == expected
        )


def test_every_problem_has_a_reason_phrase():
    assert {status for status, _, _ in aggregator.PROBLEMS.values()} <= set(aggregator.REASONS)


def test_the_date_is_the_one_format_of_http_for_any_instant():
    rng = random.Random(4)
    for instant in [0, 0.999, 951_782_400, 2**31] + [rng.uniform(0, 4e9) for _ in range(500)]:
        assert aggregator.http_date(instant) == email.utils.formatdate(int(instant), usegmt=True)


# ======================================================================================================================
# §6 Reference: the table against the documents made of it, and both against the service
# ======================================================================================================================

DOCUMENT = json.loads(aggregator.openapi_json().decode())
DOCS = aggregator.docs_html()


def violations(value, schema, at="$"):
    """What in `value` contradicts a schema of the document: the part of JSON Schema that is used there, and no more."""
    if schema is False or schema is True:
        return [] if schema else [at]
    if "$ref" in schema:
        place, found = schema["$ref"].split("/"), DOCUMENT
        assert place[0] == "#"
        for name in place[1:]:
            found = found[name]
        return violations(value, found, at)
    assert set(schema) <= {
        "type",
        "enum",
        "anyOf",
        "required",
        "properties",
        "additionalProperties",
        "items",
        "minItems",
        "minimum",
        "maximum",
        "minLength",
        "maxLength",
        "pattern",
        "description",
        "examples",
        "default",
    }
    kinds = {
        "object": dict,
        "array": list,
        "string": str,
        "integer": int,
        "number": (int, float),
        "boolean": bool,
        "null": type(None),
    }
    wanted = schema.get("type", [])
    wanted = wanted if isinstance(wanted, list) else [wanted]
    if wanted and not any(
        isinstance(value, kinds[kind]) and (kind == "boolean") == isinstance(value, bool)
        for kind in wanted
    ):
        return [f"{at}: {value!r} is not of type {wanted}"]
    wrong = []
    if "anyOf" in schema and all(violations(value, each, at) for each in schema["anyOf"]):
        wrong.append(f"{at}: none of anyOf")
    if isinstance(value, dict):
        wrong += [
            f"{at}.{name} is missing" for name in schema.get("required", []) if name not in value
        ]
        for name, inner in value.items():
            rule = schema.get("properties", {}).get(name, schema.get("additionalProperties", True))
            wrong += violations(inner, rule, f"{at}.{name}")
    elif isinstance(value, list):
        wrong += [f"{at}: too few"] if len(value) < schema.get("minItems", 0) else []
        for index, inner in enumerate(value):
            wrong += violations(inner, schema.get("items", True), f"{at}[{index}]")
    elif isinstance(value, str):
        if not schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", 10**9):
            wrong.append(f"{at}: length")
        if (
            "pattern" in schema
            and re.search(re.sub(r"\$\Z", r"\\Z", schema["pattern"]), value) is None
        ):  # ECMAScript's $
            wrong.append(f"{at}: {value!r} does not match {schema['pattern']}")
    elif isinstance(value, (int, float)) and not schema.get(
        "minimum", value
    ) <= value <= schema.get("maximum", value):
        wrong.append(f"{at}: {value} is out of range")
    return wrong + ([f"{at}: not one of enum"] if value not in schema.get("enum", [value]) else [])


def operation_of(route):
    return DOCUMENT["paths"][route.path][route.method.lower()]


def test_the_document_has_every_route_with_all_it_takes_and_answers_and_nothing_else():
    assert DOCUMENT["openapi"].startswith("3.1.")
    assert [
        (method.upper(), path) for path, methods in DOCUMENT["paths"].items() for method in methods
    ] == sorted(
        [(route.method, route.path) for route in aggregator.ROUTES],
        key=lambda row: list(DOCUMENT["paths"]).index(row[1]),
    )
    for route in aggregator.ROUTES:
        operation = operation_of(route)
        places = {
            place: tuple(each["name"] for each in operation["parameters"] if each["in"] == place)
            for place in ("path", "query", "header")
        }
        assert places == {
            "path": tuple(re.findall(r"{(\w+)}", route.path)),
            "query": route.parameters,
            "header": route.headers,
        }
        problems = aggregator.ANYWHERE + route.problems
        assert sorted(operation["responses"]) == sorted(
            {str(answer.status) for answer in route.answers}
            | {str(aggregator.PROBLEMS[name][0]) for name in problems}
        )
        for name in problems:
            assert (
                f"`{name}`"
                in operation["responses"][str(aggregator.PROBLEMS[name][0])]["description"]
            )
        for media_type, body in operation.get("requestBody", {"content": {}})["content"].items():
            assert not violations(body["schema"]["examples"][0], body["schema"]), media_type
        for each in operation["parameters"]:
            example = each["schema"]["examples"][0]
            assert not violations(example, each["schema"])
            assert each["schema"].get("default", example) in each["schema"].get(
                "enum", [each["schema"].get("default", example)]
            )
    for path, ruled in (
        ("/events", False),
        ("/events/{topic}/{event_id}", True),
    ):  # a topic to filter by, and one to name
        assert ("pattern" in DOCUMENT["paths"][path]["get"]["parameters"][0]["schema"]) == ruled
    open_paths = {
        tuple(route.path[1:].split("/"))
        for route in aggregator.ROUTES
        if "unauthorized" not in route.problems
    }
    assert open_paths == set(aggregator.OPEN_PATHS)
    assert len({operation_of(route)["operationId"] for route in aggregator.ROUTES}) == len(
        aggregator.ROUTES
    )


def test_every_problem_is_said_somewhere_and_has_an_anchor_that_says_what_to_do():
    said = (
        set(aggregator.ANYWHERE)
        | set(aggregator.NOWHERE)
        | {name for route in aggregator.ROUTES for name in route.problems}
    )
    assert said == set(aggregator.PROBLEMS)
    parser = html.parser.HTMLParser()
    tags = []
    parser.handle_starttag = lambda tag, attributes: tags.append((tag, dict(attributes)))
    parser.feed(DOCS)
    anchors = [attributes["id"] for _, attributes in tags if "id" in attributes]
    links = {attributes["href"] for _, attributes in tags if "href" in attributes}
    assert len(set(anchors)) == len(anchors) and set(aggregator.PROBLEMS) <= set(anchors)
    assert {tag for tag, _ in tags} & {"script", "img", "link", "iframe", "object"} == set()
    assert links <= {"#" + anchor for anchor in anchors}  # all of it is here: it works offline
    for name, (status, title, advice) in aggregator.PROBLEMS.items():
        described = html.unescape(
            re.sub("<[^>]+>", "", DOCS.partition(f'id="{name}"')[2].partition("</dl>")[0])
        )
        assert (
            str(status) in described and title in described and advice.replace("`", "") in described
        )


def same_fields(example, answer):
    """Whether an answer has the fields of its example; keys that are data may differ."""
    if isinstance(example, dict) and all(map(str.isidentifier, example)):
        return (
            isinstance(answer, dict)
            and set(example) == set(answer)
            and all(same_fields(example[name], answer[name]) for name in example)
        )
    if isinstance(example, list):
        return (
            isinstance(answer, list)
            and all(same_fields(example[0], each) for each in answer)
            and answer != []
        )
    return True


@pytest.fixture(scope="module")
def sampled(tmp_path_factory):
    """Each answer of the table with what the program answers to its sample request, in the order of the table."""
    found = []
    for name, routes in (
        ("put", [route for route in aggregator.ROUTES if route.method == "PUT"]),
        ("others", [route for route in aggregator.ROUTES if route.method != "PUT"]),
    ):
        with Program(tmp_path_factory.mktemp(name) / "sampled.db") as program:
            for route in routes:
                if route.handler == "gaps":  # 7 is there, so 8 is missing
                    fetch(program.port, "POST", "/publish", sample("43", source="hall", sequence=9))
                for answer in route.answers:
                    found.append((route, answer, fetch_sample(program.port, route, answer)))
    return found


def fetch_sample(port, route, answer):
    """What comes to a sample request; of a stream without end, what comes up to its first event."""
    target, fields, body = aggregator.sample_request(route, answer)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    with contextlib.closing(connection):
        connection.request(route.method, target, body or None, fields)
        response, received = connection.getresponse(), b""
        for line in response:
            received += line
            if "follow" in answer.query and b"processed_at" in line:
                break
        return Answer(response.status, dict(response.getheaders()), received)


def test_the_examples_are_what_the_service_answers(sampled):
    for route, example, answer in sampled:
        where = (route.method, route.path, example.meaning, answer.body)
        assert (answer.status, answer.headers["Content-Type"]) == (
            example.status,
            example.content_type,
        ), where
        content = operation_of(route)["responses"][str(answer.status)]["content"][
            example.content_type.partition(";")[0]
        ]
        assert content["examples"][example.meaning]["value"] == example.example
        if example.content_type == "application/json":
            assert not violations(answer.json, aggregator._schema(example.example)), where
            assert not violations(answer.json, content["schema"]) and not violations(
                example.example, content["schema"]
            )
            assert route.path == "/openapi.json" or same_fields(example.example, answer.json), where
        elif example.content_type in ("application/x-ndjson", "text/event-stream"):
            shown, received = [
                re.findall(r"\{.*\}", text) for text in (example.example, answer.body.decode())
            ]
            assert same_fields(json.loads(shown[0]), json.loads(received[0])), where
            assert answer.body.decode().partition("{")[0] == example.example.partition("{")[0]
    publish = [
        (example.example, answer.json)
        for route, example, answer in sampled
        if route.handler == "publish"
    ]
    assert publish[0][0] == publish[0][1] and publish[1][0] == publish[1][1]
    assert unchanging(json.dumps(publish[2][0]["events"][0]["verdict"])) == '"duplicate"'
    assert {**publish[2][1], "events": 0, "group": 0} == {**publish[2][0], "events": 0, "group": 0}


@pytest.mark.skipif(
    not shutil.which("curl") or not shutil.which("bash"), reason="no curl or bash here"
)
def test_every_curl_line_of_the_docs_succeeds(tmp_path):
    commands = re.findall("<pre>(curl [^\n]+)\n", DOCS)
    assert len(commands) == sum(len(route.answers) for route in aggregator.ROUTES)
    with Program(tmp_path / "docs.db") as program:
        for command in map(html.unescape, commands):
            command = (
                command.replace("localhost:8000", "127.0.0.1:%d" % program.port)
                + " -o /dev/null -w '%{http_code}'"
            )
            if "PUT" in command:  # the identity of the examples belongs to the POST
                command = command.replace("door/42", "door/43")
            if "follow" in command:
                command += " -m 0.3"
            child = subprocess.run(["bash", "-c", command], stdout=subprocess.PIPE, timeout=30)
            assert child.stdout.decode() in ("200", "201", "202"), command


def test_a_refusal_is_a_problem_of_its_operation(desk):
    for method, target, body, name in (
        ("POST", "/publish", b"[]", "invalid-event"),
        ("POST", "/publish", b"{", "not-json"),
        ("GET", "/events?limit=0", b"", "bad-parameter"),
        ("GET", "/events/t/1", b"", "no-such-event"),
        ("PUT", "/events/t/%01", b"", "invalid-event"),
    ):
        answer = desk.ask(method, target, body)
        route = next(
            route
            for route in aggregator.ROUTES
            if route.method == method
            and (
                route.path == target.partition("?")[0]
                or ("{" in route.path and target.count("/") == 3)
            )
        )
        assert (
            answer.json["type"] == "/docs#" + name and name in aggregator.ANYWHERE + route.problems
        )
        content = operation_of(route)["responses"][str(answer.status)]["content"][
            "application/problem+json"
        ]
        assert not violations(answer.json, content["schema"])


TAKEN = (
    "1970-01-01",
    "1970-01-01 00:00",
    "1969-12-31T23:59:59,5Z",
    "2024-02-29",
    "2026-01-31T12:00:00." + "9" * 30,
    "2026-01-31 14:00+02:00",
    "2026-01-31T14:00:00+0200",
    "2026-01-31T14:00:00+02",
    "0001-01-01T00:00:00Z",
)


def test_the_schema_of_a_field_says_what_the_service_takes():
    rule = aggregator.TERMS["timestamp"]
    for text in TAKEN:
        assert aggregator.parse_timestamp(text) is not None and not violations(text, rule)
    calendar = {
        "0000-01-01T00:00:00Z",
        "2026-04-31",
        "2026-02-29",
        "1900-02-29",
        "0001-01-01T00:00:00+00:01",
        "9999-12-31T23:59:59-00:01",
        "0001-01-01T23:58:59.999999+23:59",
    }  # what no pattern knows
    for text in set(NO_TIMESTAMPS.split("|")) - calendar:
        assert violations(text, rule), text
    for field, value in WRONG:
        bytes_long = isinstance(value, str) and len(value) <= 255 < len(
            value.encode("utf-8", "surrogatepass")
        )
        surrogate = isinstance(value, str) and re.search("[\ud800-\udfff]", value)
        if (
            field != "timestamp"
            and not bytes_long
            and not surrogate
            and value is not None
            and value == value
        ):
            assert violations(
                {**GOOD_EVENT, field: value}, DOCUMENT["components"]["schemas"]["event"]
            ) or value in (1.0, 1e3), (field, value)
    for query, taken in (
        ("10m", True),
        ("7d", True),
        ("2026-01-01", True),
        ("10", False),
        ("m", False),
        ("1 d", False),
    ):
        assert bool(violations(query, aggregator.TERMS["since"])) != taken


SAMPLE_LINE = re.compile(
    r'([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\\n]|\\["\\n])*)"\})?'
    r" (-?[0-9.]+(?:e[+-]?[0-9]+)?)"
)


def parsed_metrics(text):
    """Text format 0.0.4, strictly: metric names with {label value or None: number}; histograms are checked and kept flat."""
    found, kinds, current = {}, {}, None
    assert text.endswith("\n") and not text.endswith("\n\n")
    for line in text[:-1].split("\n"):
        if line.startswith("# HELP "):
            current, meaning = line[7:].split(" ", 1)
            assert (
                current.startswith("aggregator_")
                and current not in kinds
                and meaning
                and "\\" not in meaning
            )
        elif line.startswith("# TYPE "):
            name, kind = line[7:].split(" ")
            assert name == current and kind in ("counter", "gauge", "histogram")
            assert (kind == "counter") == name.endswith("_total")
            kinds[name] = kind
        else:
            name, label, value, number = SAMPLE_LINE.fullmatch(line).groups()
            plain_name = (
                re.sub("_(bucket|sum|count)$", "", name) if kinds[current] == "histogram" else name
            )
            assert plain_name == current and (label == "le") == name.endswith("_bucket")
            value = (
                value
                if value is None
                else re.sub(r'\\(["\\n])', lambda match: {"n": "\n"}.get(match[1], match[1]), value)
            )
            assert value not in found.setdefault(name, {})
            found[name][value] = float(number)
    for name in [name for name, kind in kinds.items() if kind == "histogram"]:
        bounds, counts = list(found[name + "_bucket"]), list(found[name + "_bucket"].values())
        assert bounds[-1] == "+Inf" and [float(each) for each in bounds] == sorted(
            float(each) for each in bounds
        )
        assert counts == sorted(counts) and counts[-1] == found[name + "_count"][None]
    return {name.partition("_")[2]: values for name, values in found.items()}


def test_the_metrics_are_the_numbers_of_stats(desk):
    hostile = ['a"b', "back\\slash", "\\", '\\n"', "é😀", "brace}{", "a b", 't="1",x']
    for topic in hostile:
        desk.publish(sample("1", topic=topic), sample("2", topic=topic))
    desk.now += 30_000_000
    desk.publish(
        sample("1", topic=hostile[0]),
        sample("2", topic=hostile[0], payload={}),
        sample("1", topic=hostile[1]),
    )
    for target in ("/nowhere", "/events?limit=0", "/events?limit=x"):
        desk.ask("GET", target)
    answer, stats = desk.ask("GET", "/metrics"), desk.ask("GET", "/stats").json
    metrics = parsed_metrics(answer.body.decode())
    single = {name: values[None] for name, values in metrics.items() if list(values) == [None]}
    assert (
        single["events_received_total"] == stats["received"] == 19
        and single["events_unique_total"] == 16
    )
    assert (
        (single["events_duplicates_total"], single["events_conflicts_total"])
        == (stats["duplicate_dropped"], 1)
        == (3, 1)
    )
    assert (
        single["queue_events"] == stats["current_queue_size"] == 0
        and single["queue_limit_events"] == 1000
    )
    assert metrics["topic_unique_total"] == dict.fromkeys(hostile, 2.0)
    assert {topic: n for topic, n in metrics["topic_duplicates_total"].items() if n} == {
        hostile[0]: 2,
        hostile[1]: 1,
    }
    assert {name: n for name, n in metrics["rejected_total"].items() if n} == {
        "not-found": 1,
        "bad-parameter": 2,
    }
    assert set(metrics["rejected_total"]) == set(aggregator.PROBLEMS)
    assert metrics["duplicate_delay_seconds_bucket"] == {
        bound: 3.0 if float(bound) >= 60 else 0.0
        for bound in list(map(str, aggregator.DELAY_BOUNDS_S)) + ["+Inf"]
    }
    assert metrics["commit_events_bucket"]["1"] == 0 and metrics["commit_events_bucket"][
        "2"
    ] == len(hostile)
    assert (single["commit_events_sum"], single["commit_events_count"]) == (19, len(hostile) + 1)
    assert single["commit_duration_seconds_sum"] > 0 and single["store_bytes"] > 4096
    assert single["start_time_seconds"] == NOW / 1e6 and metrics["build_info"] == {
        aggregator.__version__: 1
    }
    assert stats["last_commit"]["events"] == 3 and stats["last_commit"]["milliseconds"] > 0


def test_only_the_largest_topics_have_series_of_their_own(desk, monkeypatch):
    monkeypatch.setattr(aggregator, "METRICS_MAX_TOPICS", 2)
    for n in (1, 3, 2):
        desk.publish(*[sample(str(i), topic=f"t{n}") for i in range(n)])
    metrics = parsed_metrics(desk.ask("GET", "/metrics").body.decode())
    assert metrics["topic_unique_total"] == {"t3": 3, "t2": 2} and list(
        metrics["topic_duplicates_total"]
    ) == ["t3", "t2"]


def test_a_counter_of_events_never_falls(desk, monkeypatch):
    desk.publish(sample("1"))
    monkeypatch.setattr(
        desk.pipeline._store,
        "commit",
        lambda *_: (_ for _ in ()).throw(aggregator.StoreFailed("full")),
    )
    before = parsed_metrics(desk.ask("GET", "/metrics").body.decode())
    assert desk.ask("POST", "/publish", sample("2")).status == 503
    after = parsed_metrics(desk.ask("GET", "/metrics").body.decode())
    assert before["events_received_total"] == after["events_received_total"] == {None: 1}
    assert (
        after["commit_events_count"] == {None: 1}
        and after["rejected_total"]["store-unavailable"] == 1
    )


def test_what_the_parser_refuses_is_counted_and_so_are_connections(site):
    assert exchange(site.port, b"nonsense\r\n\r\n")[0].status == 400
    with contextlib.closing(dial(site.port)):
        metrics = parsed_metrics(fetch(site.port, "GET", "/metrics").body.decode())
    assert metrics["rejected_total"]["bad-request"] == 1 and metrics["connections"][None] == 2


# ======================================================================================================================
# §7 Page
# ======================================================================================================================

NUMBERS = {
    "received": 12_345,
    "unique_processed": 10_000,
    "duplicate_dropped": 2_340,
    "conflicts": 7,
    "current_queue_size": 5,
    "topics": {"<img src=x onerror=alert(1)>&amp;\"'{0}": {"unique": 3, "duplicates": 1}},
    "topics_total": 1,
    "store_bytes": 2_560_000,
    "duplicate_delay_seconds": {
        **{str(bound): bound for bound in aggregator.DELAY_BOUNDS_S},
        "inf": 4,
    },
    "windows": [
        {"window_seconds": window, "like": like, "would_have_stored_twice": 1_000_000 + window}
        for window, like in aggregator.DEDUP_WINDOWS
    ],
}


class Reading(html.parser.HTMLParser):
    """What a reader without style and script gets: the words, the tags, and the content of style and script."""

    def __init__(self, page):
        super().__init__()
        self.words, self.tags, self.inline, self.inside = [], [], {}, ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.inside = tag

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        if self.inside in ("style", "script"):
            self.inline[self.inside] = self.inline.get(self.inside, "") + data
        elif data.strip():
            self.words.append(" ".join(data.split()))


def test_the_page_reads_without_javascript():
    words = Reading(aggregator.render_page(NUMBERS)).words
    for label, number in (
        ("received", "12,345"),
        ("unique", "10,000"),
        ("duplicates", "2,340"),
        ("in the queue", "5"),
    ):
        assert words[words.index(label) + 1] == number
    assert words[words.index("2.6") + 1] == "MB" and "7" in words
    many = {
        **NUMBERS,
        "topics": {"topic %d" % n: {"unique": 1, "duplicates": 0} for n in range(99)},
    }
    assert aggregator.render_page(many).count("<th>topic ") == aggregator.TOPICS_SHOWN
    assert "TOPICS = {},".format(aggregator.TOPICS_SHOWN) in aggregator.PAGE_SCRIPT
    assert (
        words[words.index("to 7 d") :][:2] == ["to 7 d", "604,800"]
        and words[words.index("later") + 1] == "4"
    )


def test_the_page_marks_where_each_window_ends():
    text = " ".join(Reading(aggregator.render_page(NUMBERS)).words)
    for (window, like), label in zip(
        aggregator.DEDUP_WINDOWS, ("to 2 min", "to 5 min", "to 10 min")
    ):
        assert (
            "{0} {1} {2}: forgets here, and {3:,} would".format(
                label, window, like, 1_000_000 + window
            )
            in text
        )


def test_what_publishers_send_is_never_markup():
    name = next(iter(NUMBERS["topics"]))
    reading = Reading(aggregator.render_page(NUMBERS))
    assert reading.words[reading.words.index(name) :][:4] == [name, "3", "1", "25.0 %"]
    assert not [
        tag
        for tag, attributes in reading.tags
        if tag == "img" or any(key.startswith("on") for key in attributes)
    ]
    assert "innerHTML" not in aggregator.PAGE_SCRIPT and "outerHTML" not in aggregator.PAGE_SCRIPT
    hostile = 'data-n="windows.9">{received}'
    assert (
        hostile
        in Reading(
            aggregator.render_page({**NUMBERS, "topics": {hostile: {"unique": 1, "duplicates": 0}}})
        ).words
    )


def test_without_numbers_the_page_shows_none():
    page = aggregator.render_page(None)
    assert (
        len(re.findall('data-n="[^"]+"[^>]*>–', page)) == page.count('data-n="') > 20
        and len(page.encode()) < 25_000
    )
    assert not re.search(
        "[0-9]",
        "".join(Reading(page[page.index("<dl") : page.index("How late")]).words).replace(
            "2 minutes", ""
        ),
    )


def test_the_policy_names_what_is_inline_and_nothing_else():
    reading, policy = (
        Reading(aggregator.render_page(NUMBERS)),
        dict(each.strip().split(" ", 1) for each in aggregator.page_policy().split(";")),
    )
    for tag, content in reading.inline.items():
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert policy.pop(tag + "-src") == "'sha256-{}'".format(digest)
    assert policy == {
        "default-src": "'none'",
        "connect-src": "'self'",
        "img-src": "data:",
        "form-action": "'none'",
        "base-uri": "'none'",
        "frame-ancestors": "'none'",
    }
    assert not [attributes for _, attributes in reading.tags if "style" in attributes]
    assert set(re.findall("[a-z]+://[^ '\"`)]*", aggregator.render_page(NUMBERS))) == set()


def test_a_browser_gets_the_page_and_curl_the_list(desk):
    desk.publish(sample(), sample())
    for accept in ("*/*", "application/json", ""):
        assert (
            desk.ask("GET", "/", headers=["Accept: " + accept] if accept else []).json["service"]
            == "aggregator"
        )
    found = desk.ask(
        "GET", "/", headers=["Accept: text/html,application/xhtml+xml;q=0.9,*/*;q=0.8"]
    )
    assert found.headers["Content-Security-Policy"] == aggregator.page_policy()
    assert (
        found.headers["Referrer-Policy"],
        found.headers["Cache-Control"],
        found.headers["Vary"],
    ) == ("no-referrer", "no-store", "Accept")
    # Every number that the page names is one that /stats has, but for the limits, which are the desk's own.
    assert re.findall('data-n="([^"]+)"[^>]*>–', found.body.decode()) == ["limits.queue_max_size"]
    desk.api.access = aggregator.Access(token="secret")
    assert desk.ask(
        "GET", "/", headers=["Accept: text/html"]
    ).body.decode() == aggregator.render_page(None)


def test_the_page_comes_even_if_the_store_cannot_be_read(desk, monkeypatch):
    async def broken():
        raise aggregator.Unavailable("disk I/O error")

    monkeypatch.setattr(desk.pipeline, "stats", broken)
    assert desk.ask(
        "GET", "/", headers=["Accept: text/html"]
    ).body.decode() == aggregator.render_page(None)
    monkeypatch.undo()


# ======================================================================================================================
# §8 API: bytes to the parser, requests to `answer`, no sockets; a clock that only the test moves
# ======================================================================================================================


def sample(event_id="1", **fields):
    return {
        "topic": "t",
        "event_id": event_id,
        "timestamp": "2026-01-01T00:00:00Z",
        "source": "s",
        "payload": {"n": 1},
        **fields,
    }


def lines(values):
    return "\n".join(json.dumps(value) for value in values).encode()


class Answer(NamedTuple):
    status: int
    headers: dict
    body: bytes
    pieces: int = 1

    @property
    def json(self):
        return json.loads(self.body.decode("utf-8"))


def assert_problem(answer, content_type):
    """RFC 9457, and the status that PROBLEMS gives this type."""
    assert content_type == "application/problem+json"
    assert {"type", "title", "status", "detail"} <= set(answer.json) and answer.json["detail"]
    name = answer.json["type"].partition("/docs#")[2]
    assert (answer.status, answer.json["title"]) == aggregator.PROBLEMS[name][:2] and answer.json[
        "status"
    ] == answer.status
    assert (answer.status == 503) == ("Retry-After" in answer.headers)


class Desk:
    """An API over a store of its own. Every answer is checked for its form, and the books at the end."""

    def __init__(self, path, max_events=1000, **options):
        self.path, self.now, self.random_ids = path, NOW, iter(f"random-{n}" for n in range(10**6))
        self.loop = asyncio.new_event_loop()
        self.loop.run_until_complete(self._open(max_events, options))

    async def _open(self, max_events, options):
        self.pipeline = aggregator.Pipeline(
            lambda: aggregator.Store(self.path, **options), lambda: self.now, max_events
        )
        await self.pipeline.start()
        self.api = aggregator.API(
            self.pipeline, lambda: self.now, lambda: next(self.random_ids), {"shown": 1}
        )

    async def _ask(self, method, target, body=b"", headers=(), peer="192.0.2.7"):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        head = [f"{method} {target} HTTP/1.1", "Host: x", f"Content-Length: {len(body)}"]
        parser = aggregator.RequestParser()
        parser.feed("\r\n".join(head + list(headers) + ["", ""]).encode("latin-1") + body)
        response = await self.api.answer(parser.next_request(), peer)
        pieces = (
            [response.body]
            if isinstance(response.body, bytes)
            else [piece async for piece in response.body]
        )
        answer = Answer(response.status, dict(response.headers), b"".join(pieces), len(pieces))
        if answer.status >= 400:
            assert_problem(answer, response.content_type)
        return answer

    def ask(self, *request, **options):
        return self.loop.run_until_complete(self._ask(*request, **options))

    async def tidy(self):
        """One step of retention; whether there may be more to do."""
        return await self.loop.run_in_executor(
            self.pipeline._writer, self.pipeline._store.tidy, self.now
        )

    def ask_at_once(self, *requests):
        async def together():
            return await asyncio.gather(*[self._ask(*request) for request in requests])

        return self.loop.run_until_complete(together())

    def publish(self, *events):
        answer = self.ask("POST", "/publish", list(events))
        assert answer.status == 202, answer
        return answer.json

    def listed(self, query=""):
        answer = self.ask("GET", "/events" + query)
        assert answer.status == 200, answer
        assert answer.json["count"] == len(answer.json["events"])
        return [each["event_id"] for each in answer.json["events"]]

    def close(self):
        self.api.access = aggregator.Access()
        stats = self.ask("GET", "/stats").json
        assert self.loop.run_until_complete(self.pipeline.stop(5))
        self.loop.close()
        queued = stats["current_queue_size"]
        assert stats["received"] == stats["unique_processed"] + stats["duplicate_dropped"] + queued
        assert all(holds for holds, _ in aggregator.check_store(self.path))


@pytest.fixture
def make_desk(tmp_path):
    desks = []

    def make(**options):
        desks.append(Desk(str(tmp_path / f"desk{len(desks)}.db"), **options))
        return desks[-1]

    yield make
    for each in desks:
        each.close()


@pytest.fixture
def desk(make_desk):
    return make_desk()


TWO = [sample("1"), sample("2")]


@pytest.mark.parametrize(
    "body, headers",
    [
        (json.dumps(TWO).encode(), ()),
        (json.dumps({"events": TWO}).encode(), ()),
        (lines(TWO), ()),
        (lines(TWO).replace(b"\n", b""), ()),
        (lines(TWO) + b"\r\n", ("Content-Type: application/x-www-form-urlencoded",)),
        (gzip.compress(lines(TWO)), ("Content-Encoding: gzip",)),
        (lines([TWO[:1], {"events": TWO[1:]}]), ()),
        (json.dumps(TWO, indent=1).encode(), ("Content-Type: application/json; charset=utf-8",)),
    ],
)
def test_every_form_of_a_body_publishes_the_same_events(desk, body, headers):
    assert desk.ask("POST", "/publish", body, headers).json == {
        "status": "accepted",
        "accepted": 2,
        "unique": 2,
        "duplicates": 0,
        "conflicts": 0,
        "stored": True,
    }
    assert desk.ask("POST", "/publish", body, headers).json["duplicates"] == 2
    assert desk.listed() == ["1", "2"]


def test_a_retried_text_with_an_idempotency_key_is_all_duplicates(desk):
    target, text = (
        "/publish?topic=logs/web&source=nas",
        "first\r\n\n caf\u00e9 \U0001f600\n".encode("utf-8"),
    )
    headers = ("Content-Type: text/plain; charset=utf-8", "Idempotency-Key: run-7")
    assert desk.ask("POST", target, text, headers).json["unique"] == 2
    desk.now += 10**6
    assert desk.ask("POST", target, text, headers).json["duplicates"] == 2
    events = desk.ask("GET", "/events?topic=logs/web").json["events"]
    assert [(each["event_id"], each["payload"]["message"]) for each in events] == [
        ("run-7:1", "first"),
        ("run-7:3", " caf\u00e9 \U0001f600"),
    ]
    assert {each["source"] for each in events} == {"nas"}


def test_text_without_a_key_is_new_each_time(desk):
    for unique in (2, 2):
        answer = desk.ask(
            "POST", "/publish?topic=t&source=s", b"a\nb", ("Content-Type: text/plain",)
        )
        assert (answer.json["unique"], answer.json["duplicates"]) == (unique, 0)


@pytest.mark.parametrize(
    "target, body, headers, problem",
    [
        ("/publish?topic=t", b"a", ("Content-Type: text/plain",), "bad-parameter"),
        ("/publish?source=s", b"a", ("Content-Type: text/plain",), "bad-parameter"),
        ("/publish?topic=t&source=s", b" \n", ("Content-Type: text/plain",), "invalid-event"),
        ("/publish?topic=t&source=s", b"\xff", ("Content-Type: text/plain",), "not-json"),
        (
            "/publish?topic=t&source=s",
            b"a",
            ("Content-Type: text/plain", "Idempotency-Key: " + "k" * 300),
            "invalid-event",
        ),
        ("/publish?topic=t", lines(TWO), (), "bad-parameter"),
        ("/publish?wait=maybe", lines(TWO), (), "bad-parameter"),
        ("/publish?verdict=1", lines(TWO), (), "bad-parameter"),
        ("/publish", b"", (), "not-json"),
        ("/publish?explain=1&verdicts=maybe", lines(TWO), (), "bad-parameter"),
        ("/publish", b"null", (), "invalid-event"),
        ("/publish", b"[]", (), "invalid-event"),
        ("/publish", b"[" * 100_000, (), "invalid-event"),
        ("/publish", lines(TWO)[:-1], (), "not-json"),
        ("/publish", lines(TWO) + b"{}", (), "invalid-event"),
        ("/publish", b'{"topic":"\\ud800"}', (), "invalid-event"),
    ],
)
def test_a_refused_publish_stores_nothing(desk, target, body, headers, problem):
    assert desk.ask("POST", target, body, headers).json["type"] == "/docs#" + problem
    assert desk.listed() == [] and desk.ask("GET", "/stats").json["received"] == 0


def test_every_fault_of_a_batch_is_listed_with_its_index_and_field(desk):
    answer = desk.ask("POST", "/publish", [sample(), sample("", payload=[]), 5, {"topic": "t"}])
    assert answer.status == 422
    assert {(each["index"], each["field"]) for each in answer.json["errors"]} == {
        (1, "event_id"),
        (1, "payload"),
        (2, ""),
        (3, "event_id"),
        (3, "timestamp"),
        (3, "source"),
        (3, "payload"),
    }


def test_wait_0_answers_before_the_commit_and_says_so(desk):
    answer = desk.ask("POST", "/publish?wait=0", TWO)
    assert (answer.status, answer.json) == (
        202,
        {"status": "accepted", "accepted": 2, "stored": False},
    )
    assert desk.publish(sample("3"))["unique"] == 1  # behind it in the same queue
    assert desk.listed() == ["1", "2", "3"]


def test_verdicts_come_in_order_with_the_seq_of_the_original(desk):
    desk.publish(sample("a"), sample("b"))
    batch = [
        sample("c"),
        sample("b"),
        sample("a", payload={"n": 2}),
        sample("c"),
        sample("d", sequence=3),
    ]
    answer = desk.ask("POST", "/publish?verdicts=1", batch).json
    assert (answer["unique"], answer["duplicates"], answer["conflicts"]) == (2, 3, 1)
    assert [(each["event_id"], each["verdict"], each["seq"]) for each in answer["events"]] == [
        ("c", "new", 3),
        ("b", "duplicate", 2),
        ("a", "conflict", 1),
        ("c", "duplicate", 3),
        ("d", "new", 4),
    ]


def test_explain_says_where_a_key_was_found(desk, monkeypatch):
    def found(event_id):
        return [
            each["explanation"]["found"]
            for each in desk.ask(
                "POST", "/publish?explain=1", [sample(event_id), sample(event_id, source="other")]
            ).json["events"]
        ]

    assert found("a") == ["nowhere", "batch"]
    desk.now += 2_500_000
    last = desk.ask("POST", "/publish?explain=1", sample("a", payload={})).json
    assert last["events"][0]["verdict"] == "conflict" and last["group"]["events"] == 1
    assert last["events"][0]["explanation"]["seconds_since_first_seen"] == 2.5
    assert last["events"][0]["explanation"]["key"] == aggregator.identity("t", "a").hex()
    assert found("a") == ["recent", "recent"]
    monkeypatch.setattr(aggregator, "RECENT_IDS", 1)
    for n in range(300):  # each commit merges a slice of the 256 or more
        desk.publish(sample(f"filler-{n}"))
    assert found("a") == ["seen", "seen"]


def test_put_answers_201_then_200_and_409_for_other_content(desk):
    assert desk.ask("PUT", "/events/logs/web/error/42", {"a": 1}).status == 201
    again = desk.ask("PUT", "/events/logs/web/error/42", b' {"a" : 1}\n')
    assert (again.status, again.json["verdict"], again.json["seq"]) == (200, "duplicate", 1)
    conflict = desk.ask("PUT", "/events/logs/web/error/42", {"a": "secret"})
    assert conflict.status == 409 and b"secret" not in conflict.body and b'"a"' not in conflict.body
    event = desk.ask("GET", "/events/logs/web/error/42").json
    assert (event["topic"], event["event_id"], event["source"]) == (
        "logs/web/error",
        "42",
        "192.0.2.7",
    )
    assert (event["payload"], event["timestamp"]) == ({"a": 1}, "2026-01-01T00:00:00.000000Z")


@pytest.mark.parametrize(
    "body, payload",
    [
        (b'{"x":[1,null]}', {"x": [1, None]}),
        (b"door open", {"message": "door open"}),
        (b"", {"message": ""}),
        (b"[1]", {"message": "[1]"}),
        (b"{}{}", {"message": "{}{}"}),
        ("\u00e9\U0001f600".encode(), {"message": "\u00e9\U0001f600"}),
        (b"{} x", {"message": "{} x"}),
        (b"a\x00b", {"message": "a\0b"}),
        (b"NaN", {"message": "NaN"}),
    ],
)
def test_put_takes_an_object_as_payload_and_any_other_text_as_message(desk, body, payload):
    assert desk.ask("PUT", "/events/t/1", body).status == 201
    assert desk.ask("GET", "/events/t/1").json["payload"] == payload
    assert desk.ask("GET", "/events").json["events"][0]["payload"] == payload


@pytest.mark.parametrize(
    "target, topic, event_id, timestamp, source",
    [
        ("/events/t/a%2Fb?source=nas", "t", "a/b", "2026-01-01T00:00:00.000000Z", "nas"),
        (
            "/events/a%20b/c+d?timestamp=2026-01-01T10:00:00+02:00",
            "a b",
            "c+d",
            "2026-01-01T08:00:00.000000Z",
            "192.0.2.7",
        ),
        (
            "/events/t/1?timestamp=2026-01-01T10:00:00.5%2B02:00",
            "t",
            "1",
            "2026-01-01T08:00:00.500000Z",
            "192.0.2.7",
        ),
        (
            "/events/t/1?timestamp=2026-01-01+10:00-0230",
            "t",
            "1",
            "2026-01-01T12:30:00.000000Z",
            "192.0.2.7",
        ),
        (
            "/events/caf%C3%A9/%F0%9F%98%80",
            "caf\u00e9",
            "\U0001f600",
            "2026-01-01T00:00:00.000000Z",
            "192.0.2.7",
        ),
    ],
)
def test_put_reads_identity_timestamp_and_source_from_the_target(
    desk, target, topic, event_id, timestamp, source
):
    assert desk.ask("PUT", target, b"{}").status == 201
    event = desk.ask("GET", target.partition("?")[0]).json
    assert event == {
        **event,
        "topic": topic,
        "event_id": event_id,
        "timestamp": timestamp,
        "source": source,
    }


@pytest.mark.parametrize(
    "target, body",
    [
        ("/events//1", b"{}"),
        ("/events/t/", b"{}"),
        ("/events/t/%00", b"{}"),
        ("/events/t/" + "x" * 256, b"{}"),
        ("/events/t/1?timestamp=now", b"{}"),
        ("/events/t/1?source=", b"{}"),
        ("/events/t/1", b'{"a":NaN}'),
        ("/events/t/1", b'{"a":1e999}'),
        ("/events/t/1", b'{"a":"\\udc00"}'),
        ("/events/t/1", b'{"a":' * 200 + b"1" + b"}" * 200),
    ],
)
def test_put_refuses_what_could_not_be_read_back(desk, target, body):
    assert desk.ask("PUT", target, body).status == 422
    assert desk.listed() == []


@pytest.fixture
def filled(desk):
    spellings = [
        "2026-01-01T02:00:00+02:00",
        "2025-12-31T23:59:59.999999-00:00",
        "2026-01-01 00:00:00.5",
        "1969-12-31T23:00Z",
        "0001-01-01T00:00:00Z",
        "9999-12-31T23:59:59.999999Z",
        "2026-01-01T05:30:01+0530",
        "1970-01-01",
    ]
    desk.publish(
        *[
            sample(str(n), timestamp=text, topic="logs/" + "ab"[n % 2], source="s" + str(n % 3))
            for n, text in enumerate(spellings)
        ]
    )
    return desk


@pytest.mark.parametrize(
    "query, ids",
    [
        ("", "43710265"),
        ("?order=desc", "56201734"),
        ("?order=asc&limit=3", "437"),
        ("?topic=logs/a", "4026"),
        ("?topic=logs/*", "43710265"),
        ("?topic=*", "43710265"),
        ("?topic=log*&source=s0", "306"),
        ("?topic=logs/", ""),
        ("?source=s2", "25"),
        ("?source=s2&order=desc", "52"),
        ("?topic=LOGS/*", ""),
        ("?topic=logs/_", ""),
        ("?since=2026-01-01T01:00:00+01:00", "0265"),
        ("?since=2026-01-01T01:00:00%2B01:00&until=2026-01-01T00:00:01Z", "02"),
        ("?until=1970-01-01", "43"),
        ("?until=0001-01-01", ""),
        ("?since=10m", "10265"),
        ("?since=500ms&until=0s", "1"),
        ("?since=7d&until=0s", "1"),
        ("?since=2026-01-01&until=2025-01-01", ""),
        ("?topic=logs/b&since=1970-01-01&order=desc", "517"),
    ],
)
def test_events_are_listed_by_instant_and_filtered(filled, query, ids):
    assert "".join(filled.listed(query)) == ids


def test_instants_are_given_back_in_utc_with_microseconds(filled):
    assert [each["timestamp"] for each in filled.ask("GET", "/events").json["events"]] == [
        "0001-01-01T00:00:00.000000Z",
        "1969-12-31T23:00:00.000000Z",
        "1970-01-01T00:00:00.000000Z",
        "2025-12-31T23:59:59.999999Z",
        "2026-01-01T00:00:00.000000Z",
        "2026-01-01T00:00:00.500000Z",
        "2026-01-01T00:00:01.000000Z",
        "9999-12-31T23:59:59.999999Z",
    ]


@pytest.mark.parametrize(
    "query",
    [
        "limit=-1",
        "limit=0",
        "limit=1001",
        "limit=%D9%A3",
        "limit=" + "9" * 5000,
        "limit=+5",
        "limit=1_0",
        "limit=",
        "order=up",
        "since=yesterday",
        "since=10",
        "until=1e3s",
        "since=" + "9" * 5000 + "d",
        "since=2026-W01-1",
        "cursor=",
        "cursor=zzz",
        "cursor=a1",
        "cursor=d1.2",
        "order=desc&cursor=a1.2",
        "cursor=a%D9%A3.1",
        "cursor=a" + "9" * 5000 + ".1",
        "topics=t",
        "follow=2",
    ],
)
def test_a_list_refuses_a_parameter_that_it_does_not_understand(filled, query):
    assert filled.ask("GET", "/events?" + query).json["type"] == "/docs#bad-parameter"


@pytest.mark.parametrize("order", ["asc", "desc"])
@pytest.mark.parametrize("more", ["", "&source=s", "&topic=*&source=s"])
def test_a_walk_by_cursor_equals_the_whole_list_and_survives_inserts(desk, order, more):
    stamps = [f"2026-01-01T00:00:{n // 3:02d}Z" for n in range(40)]  # equal instants: seq decides
    random.Random(1).shuffle(stamps)
    desk.publish(*[sample(str(n), timestamp=stamp) for n, stamp in enumerate(stamps)])
    whole, walked, cursor, page = desk.listed("?order=" + order), [], "", 0
    assert len(set(whole)) == 40
    while True:
        answer = desk.ask("GET", f"/events?limit=7&order={order}{more}{cursor}").json
        walked += [each["event_id"] for each in answer["events"]]
        if answer["next"] is None:
            break
        cursor = "&cursor=" + quote(answer["next"])
        for n, stamp in enumerate(("1969-01-01", "2026-01-01T00:00:06.5Z", "2027-01-01")):
            desk.publish(sample(f"late-{page}-{n}", timestamp=stamp))
        page += 1
    assert [each for each in walked if not each.startswith("late")] == whole
    assert len(set(walked)) == len(walked) and any(each.startswith("late") for each in walked)


def test_ndjson_streams_all_pages_and_keeps_a_limit(desk, monkeypatch):
    for name in ("PAGE_MAX", "PAGE_DEFAULT"):
        monkeypatch.setattr(aggregator, name, 10)
    desk.publish(*[sample(str(n), payload={"text": "\u00e9\U0001f600\n\0"}) for n in range(25)])
    for query, count, pieces in (
        ("", 25, 3),
        ("?limit=7", 7, 1),
        ("?topic=x", 0, 0),
        ("?source=s&order=desc", 25, 3),
    ):
        answer = desk.ask(
            "GET", "/events" + query, b"", ("Accept: text/html, application/x-ndjson;q=0.9",)
        )
        rows = [json.loads(line) for line in answer.body.decode("utf-8").splitlines() if line]
        assert (len(rows), answer.pieces) == (count, pieces) and answer.body.count(b"\n") == count
        assert all(row["payload"] == {"text": "\u00e9\U0001f600\n\0"} for row in rows)


@pytest.mark.parametrize(
    "topic",
    [
        "it's",
        'say "hi"',
        "a'; DROP TABLE processed_events; --",
        "100%",
        "a_b",
        "%",
        "_",
        "\\",
        "a\\u0000b",
        "\u00e9/\U0001f600",
        "a b+c&d=e?f#g/../h",
        "{}",
        "a\u2028b",
        "e\u0301",
        "*x",
        "/a//b/",
    ],
)
def test_a_strange_topic_is_stored_listed_and_read_like_any_other(desk, topic):
    strange = sample(
        "i'\"%_\u00e9\U0001f600",
        topic=topic,
        source=topic,
        payload={topic: "\0\u0001\x7f\ud83d\ude00\\"},
    )
    desk.publish(strange, *[sample("decoy", topic=decoy) for decoy in ("axb", "100x", topic + "x")])
    for query in ("?topic={0}", "?source={0}", "?topic={0}*&source={0}"):
        assert desk.listed(query.format(quote(topic, safe=""))) == [strange["event_id"]]
    assert desk.listed("?topic={}*".format(quote(topic, safe=""))) == [strange["event_id"], "decoy"]
    event = desk.ask(
        "GET", "/events/{}/{}".format(quote(topic), quote(strange["event_id"], safe=""))
    ).json
    assert event["topic"] == event["source"] == topic
    assert event["payload"] == {topic: "\0\u0001\x7f\U0001f600\\"}
    assert desk.ask("GET", "/stats").json["topics"][topic]["unique"] == 1


def test_one_event_is_200_then_410_after_retention_and_404_if_never_seen(make_desk):
    desk = make_desk(max_per_topic=2)
    desk.publish(sample("1", sequence=7, payload={"k": [1.5, None, True]}))
    event = desk.ask("GET", "/events/t/1").json
    assert event == {
        "seq": 1,
        "topic": "t",
        "event_id": "1",
        "timestamp": "2026-01-01T00:00:00.000000Z",
        "source": "s",
        "payload": {"k": [1.5, None, True]},
        "sequence": 7,
        "processed_at": "2026-01-01T00:00:00.000000Z",
    }
    desk.publish(*[sample(str(n)) for n in range(2, 9)])
    desk.publish(sample("9"))
    assert desk.ask("GET", "/events/t/1").status == 410
    assert (
        desk.ask("GET", "/events/t/never").status == 404
        and desk.ask("GET", "/events/other/1").status == 404
    )
    desk.now += 10**12
    assert (
        desk.publish(sample("1", sequence=7, payload={"k": [1.5, None, True]}))["duplicates"] == 1
    )
    stats = desk.ask("GET", "/stats").json
    assert stats["stored"] + stats["removed_by_retention"] == stats["unique_processed"] == 9
    assert desk.listed() == ["8", "9"]


def test_stats_have_the_books_the_windows_and_the_limits(desk):
    for n, delay_s in enumerate((0, 120, 200, 400, 700)):
        desk.publish(sample(str(n), source=f"s{n % 2}"))
        desk.now += delay_s * 1_000_000
        desk.publish(
            sample(str(n), source=f"s{n % 2}"),
            sample("x", topic="other", payload={"v": 1 + n // 4}),
        )
    stats = desk.ask("GET", "/stats").json
    assert (stats["received"], stats["unique_processed"], stats["duplicate_dropped"]) == (15, 6, 9)
    assert stats["conflicts"] == 1 and stats["limits"] == {"shown": 1}
    assert stats["topics"] == {
        "t": {"unique": 5, "duplicates": 5, "stored": 5},
        "other": {"unique": 1, "duplicates": 4, "stored": 1},
    }
    assert stats["sources"]["s0"] == {"unique": 3, "duplicates": 3}
    assert stats["uptime_seconds"] == 1420.0 and stats["version"] == aggregator.__version__
    assert stats["store_bytes"] > 4096 and sum(stats["duplicate_delay_seconds"].values()) == 9
    assert [
        (each["window_seconds"], each["would_have_stored_twice"]) for each in stats["windows"]
    ] == [
        (120, 6),
        (300, 5),
        (600, 3),
    ]  # of "x": 120, 320, 720 and 1,420 s; of the others: 0, 120, 200, 400 and 700 s


def test_the_last_duplicates_are_listed_latest_first(desk):
    desk.publish(sample("a"), sample("b"))
    desk.now += 1_500_000
    desk.publish(sample("a"), sample("b", payload={}))
    found = desk.ask("GET", "/duplicates").json
    assert [(each["event_id"], each["verdict"], each["seq"]) for each in found["duplicates"]] == [
        ("b", "conflict", 2),
        ("a", "duplicate", 1),
    ]
    assert {each["delay_seconds"] for each in found["duplicates"]} == {1.5}
    assert desk.ask("GET", "/duplicates?limit=1").json["count"] == 1
    assert desk.ask("GET", "/duplicates?limit=0").status == 400


def test_a_locked_store_is_503_until_it_is_free_again(make_desk, monkeypatch):
    connect = aggregator._connect
    monkeypatch.setattr(
        aggregator, "_connect", lambda path, **options: connect(path, **dict(options, timeout=0.05))
    )
    desk = make_desk()
    assert (desk.ask("GET", "/health").status, desk.ask("GET", "/health").json) == (
        200,
        {"status": "ok"},
    )
    other = sqlite3.connect(desk.path, isolation_level=None)
    try:
        other.execute("BEGIN IMMEDIATE")
        for request in (
            ("POST", "/publish", sample()),
            ("PUT", "/events/t/1", {}),
            ("GET", "/health"),
        ):
            assert desk.ask(*request).json["type"] == "/docs#store-unavailable"
        assert desk.ask("POST", "/publish?wait=0", sample()).status == 202
        while desk.ask("GET", "/stats").json["current_queue_size"]:
            time.sleep(0.01)
        assert desk.listed() == []  # readers do not wait for the writer
    finally:
        other.close()
    assert desk.publish(sample("2"))["unique"] == 1
    assert desk.ask("GET", "/health").status == 200
    assert desk.ask("GET", "/stats").json["received"] == 1  # what was refused is not on the books


def test_a_batch_larger_than_the_queue_is_413_and_a_full_queue_503(make_desk):
    desk = make_desk(max_events=5)
    batches = [[sample(f"{batch}-{n}") for n in range(3)] for batch in range(3)]
    too_large = desk.ask("POST", "/publish", batches[0] + batches[1])
    assert (too_large.status, too_large.json["type"]) == (413, "/docs#batch-too-large")
    answers = desk.ask_at_once(*[("POST", "/publish", batch) for batch in batches])
    assert [each.status for each in answers] == [202, 503, 503]
    assert (
        answers[1].json["type"] == "/docs#queue-full"
        and int(answers[1].headers["Retry-After"]) >= 1
    )
    assert desk.ask("GET", "/stats").json["received"] == 3 and desk.listed() == [
        "0-0",
        "0-1",
        "0-2",
    ]
    assert desk.publish(*batches[1])["unique"] == 3


@pytest.mark.parametrize(
    "method, target, allow",
    [
        ("DELETE", "/publish", "OPTIONS, POST"),
        ("GET", "/publish", "OPTIONS, POST"),
        ("POST", "/events", "GET, HEAD, OPTIONS"),
        ("PATCH", "/events/t/1", "GET, HEAD, OPTIONS, PUT"),
        ("PUT", "/stats", "GET, HEAD, OPTIONS"),
        ("TRACE", "/", "GET, HEAD, OPTIONS"),
        ("HEAD", "/publish", "OPTIONS, POST"),
        ("QUERY", "/metrics", "GET, HEAD, OPTIONS"),
    ],
)
def test_a_wrong_method_is_405_with_what_is_allowed(desk, method, target, allow):
    answer = desk.ask(method, target)
    assert (answer.status, answer.headers["Allow"]) == (405, allow)
    options = desk.ask("OPTIONS", target)
    assert (options.status, options.headers["Allow"], options.body) == (204, allow, b"")


def test_options_of_the_whole_server_lists_every_method(desk):
    assert desk.ask("OPTIONS", "*").headers["Allow"] == "GET, HEAD, OPTIONS, POST, PUT"
    assert desk.ask("OPTIONS", "/nowhere").status == 404


@pytest.mark.parametrize(
    "target",
    [
        "/event",
        "/Publish",
        "/publish/",
        "/events/",
        "/events/t",
        "//",
        "/stats/x",
        "/*",
        "/publish%00",
    ],
)
def test_a_misspelt_route_is_404(desk, target):
    assert desk.ask("GET", target).json["type"] == "/docs#not-found"


@pytest.mark.parametrize("route", aggregator.ROUTES, ids=lambda route: route.method + route.path)
def test_every_route_refuses_a_parameter_it_does_not_have(desk, route):
    target = route.path.replace("{", "").replace("}", "")
    answer = desk.ask(route.method, target + "?n%C3%B6=1", {})
    assert answer.json["type"] == "/docs#bad-parameter" and "\\u00f6" in answer.json["detail"]
    if route.method == "GET":
        assert desk.ask("HEAD", target).status == desk.ask("GET", target).status != 405


def test_every_problem_has_a_status_with_a_reason():
    for status, title, advice in aggregator.PROBLEMS.values():
        assert 400 <= status < 600 and aggregator.REASONS[status] and title and advice


# Who may do what

SECRET, READING = ("Authorization: Bearer s3cret",), ("Authorization: bearer r34d",)
ONE = {"topic": "t", "event_id": "1", "timestamp": "2026-01-01", "source": "s", "payload": {}}


@pytest.mark.parametrize(
    "method, target, headers, status",
    [
        ("GET", "/stats", SECRET, 200),
        ("GET", "/stats", READING, 200),
        ("GET", "/stats", (), 401),
        ("HEAD", "/events", (), 401),
        ("GET", "/events?follow=1", (), 401),
        ("GET", "/stats", ("Authorization: Bearer s3cret2",), 401),
        ("GET", "/stats", ("Authorization: Basic s3cret",), 401),
        ("GET", "/stats", ("Authorization: s3cret",), 401),
        ("GET", "/stats", ("Authorization: Bearer",), 401),
        ("GET", "/stats", ("Authorization: Bearer \xe9",), 401),
        ("GET", "/stats", SECRET * 2, 401),
        ("POST", "/publish", SECRET, 202),
        ("POST", "/publish", READING, 403),
        ("POST", "/publish", (), 401),
        ("PUT", "/events/t/1", READING, 403),
        ("PUT", "/events/t/2", SECRET, 201),
        ("GET", "/nothing", (), 401),
        ("GET", "/health", (), 200),
        ("GET", "/", (), 200),
        ("OPTIONS", "/publish", (), 204),
    ],
)
def test_with_a_token_only_its_bearer_may_publish_and_read(desk, method, target, headers, status):
    desk.api.access = aggregator.Access("s3cret", "r34d")
    answer = desk.ask(method, target, ONE, headers)
    assert answer.status == status
    assert answer.headers.get("WWW-Authenticate", "").startswith("Bearer") == (status in (401, 403))
    desk.api.access = aggregator.Access()
    assert len(desk.listed()) == (status in (201, 202))


@pytest.mark.parametrize(
    "origin, allowed, status",
    [
        ("http://x", (), 202),
        ("https://X", (), 202),
        ("http://x:81", (), 403),
        ("http://evil.example", (), 403),
        ("null", (), 403),
        ("http://x.evil.example", (), 403),
        ("https://a.example", ("https://a.example",), 202),
        ("null", ("*",), 202),
        ("http://a.example", ("https://a.example",), 403),
    ],
)
def test_a_page_of_another_site_cannot_publish_unless_it_is_allowed_to(
    desk, origin, allowed, status
):
    desk.api.access = aggregator.Access(origins=frozenset(allowed))
    answer = desk.ask("POST", "/publish", ONE, ("Origin: " + origin,))
    assert answer.status == status and len(desk.listed()) == (status == 202)
    shared = (
        {"Access-Control-Allow-Origin": origin, "Vary": "Origin"}
        if allowed and status == 202
        else {}
    )
    assert {
        name: answer.headers[name]
        for name in ("Access-Control-Allow-Origin", "Vary")
        if name in answer.headers
    } == shared
    read = desk.ask("GET", "/events", b"", ("Origin: " + origin,))
    assert read.status == 200 and ("Access-Control-Allow-Origin" in read.headers) == bool(shared)


def test_a_browser_that_asks_before_it_sends_is_told_what_it_may(desk):
    asks = ("Origin: https://a.example", "Access-Control-Request-Method: POST")
    assert "Access-Control-Allow-Origin" not in desk.ask("OPTIONS", "/publish", b"", asks).headers
    desk.api.access = aggregator.Access(token="s3cret", origins=frozenset(["https://a.example"]))
    answer = desk.ask("OPTIONS", "/publish", b"", asks)
    assert (
        answer.status == 204
        and answer.headers["Access-Control-Allow-Origin"] == "https://a.example"
    )
    assert "POST" in answer.headers["Access-Control-Allow-Methods"]
    assert "Authorization" in answer.headers["Access-Control-Allow-Headers"]


@pytest.mark.parametrize(
    "host, known",
    [
        ("localhost", True),
        ("LOCALHOST:8000", True),
        ("127.0.0.1:1", True),
        ("[::1]:8000", True),
        ("[::1]", True),
        ("nas.lan", True),
        ("evil.example", False),
        ("evil.example:8000", False),
        ("localhost.evil.example", False),
        ("[::2]:8000", False),
    ],
)
def test_on_loopback_a_name_that_is_not_ours_is_refused(desk, host, known):
    desk.api.access = aggregator.Access(
        hosts=frozenset(["localhost", "127.0.0.1", "[::1]", "nas.lan"])
    )
    answer = desk.ask("GET", "http://{}/stats".format(host))
    assert answer.status == (200 if known else 421)
    desk.api.access = aggregator.Access(hosts=frozenset(["localhost", "*"]))
    assert desk.ask("GET", "http://{}/stats".format(host)).status == 200


def test_a_source_that_left_out_numbers_is_found_out_and_heals_when_they_come(desk):
    desk.publish(*[sample(str(n), sequence=n) for n in (1, 2, 5, 9)])
    assert desk.ask("GET", "/gaps").json == {
        "count": 1,
        "sources": [
            {
                "source": "s",
                "newest": 9,
                "missing_count": 5,
                "given_up": 0,
                "missing": [[3, 4], [6, 8]],
            }
        ],
    }
    assert desk.ask("GET", "/stats").json["gaps"] == 5
    desk.publish(*[sample(str(n), sequence=n) for n in (8, 3, 4, 6)])
    assert desk.ask("GET", "/gaps?source=s&limit=1").json["sources"][0]["missing"] == [[7, 7]]
    desk.publish(sample("7", sequence=7))
    assert (
        desk.ask("GET", "/gaps").json == {"count": 0, "sources": []}
        and desk.ask("GET", "/stats").json["gaps"] == 0
    )


# Following


async def pieces_of(desk, target, headers=()):
    """The pieces of a stream, one at a time."""
    parser = aggregator.RequestParser()
    parser.feed(
        "\r\n".join(
            ("GET {} HTTP/1.1".format(target), "Host: x") + tuple(headers) + ("", "")
        ).encode()
    )
    response = await desk.api.answer(parser.next_request(), "peer")
    assert response.status == 200, response.body
    async for piece in response.body:
        yield piece


def test_a_follower_gets_what_was_stored_and_what_comes_once_each_and_in_order(desk):
    async def scenario():
        seqs = []
        async for piece in pieces_of(desk, "/events?follow=1&after=2"):
            seqs += [json.loads(line)["seq"] for line in piece.decode().splitlines()]
            if len(seqs) == 3:
                await desk._ask("POST", "/publish", [sample("2"), sample("6"), sample("7")])
            if len(seqs) == 5:
                await desk._ask("POST", "/publish", [sample(str(n)) for n in range(8, 2500)])
            if len(seqs) == 2497:
                return seqs

    desk.pipeline.max_events = 5000
    desk.publish(*[sample(str(n)) for n in range(1, 6)])
    assert desk.loop.run_until_complete(asyncio.wait_for(scenario(), 20)) == list(range(3, 2500))


def test_without_a_cursor_following_starts_now(desk):
    async def scenario():
        stream = pieces_of(desk, "/events?follow=1")
        first = asyncio.ensure_future(stream.__anext__())
        while not desk.pipeline.followers:
            await asyncio.sleep(0)
        await desk._ask("POST", "/publish", sample("new"))
        piece = await first
        await stream.aclose()
        return piece

    desk.publish(sample("old"))
    assert (
        json.loads(desk.loop.run_until_complete(asyncio.wait_for(scenario(), 20)).decode())[
            "event_id"
        ]
        == "new"
    )


def test_a_follower_that_is_gone_is_no_longer_counted(tmp_path):
    with Program(tmp_path / "store.db") as program:

        def ask(method, target, body=None):
            connection = http.client.HTTPConnection("127.0.0.1", program.port, timeout=10)
            connection.request(method, target, body)
            with contextlib.closing(connection):
                return json.loads(connection.getresponse().read())

        for _ in range(3):
            sock = dial(program.port, b"GET /events?follow=1 HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert sock.recv(1000)
            sock.setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
            )  # closing is a reset
            sock.close()
        assert ask("GET", "/stats")["subscribers"] == 3
        deadline, number = time.monotonic() + 10, 0
        while (
            ask("GET", "/stats")["subscribers"] and time.monotonic() < deadline
        ):  # it is writing that finds them gone
            number += 1
            ask("POST", "/publish", json.dumps(sample(str(number))))
            time.sleep(0.1)
        assert ask("GET", "/stats")["subscribers"] == 0


@pytest.mark.parametrize(
    "query, expected",
    [
        ("topic=a", ["1", "4"]),
        ("topic=a*", ["1", "2", "4"]),
        ("source=y", ["2", "3"]),
        ("topic=ab&source=y", ["2"]),
        ("", list("1234")),
    ],
)
def test_a_follower_sees_only_what_it_asked_for(desk, query, expected):
    async def scenario():
        async for piece in pieces_of(desk, "/events?follow=1&after=0&" + query):
            return [json.loads(line)["event_id"] for line in piece.decode().splitlines()]

    for event_id, topic, source in (
        ("1", "a", "x"),
        ("2", "ab", "y"),
        ("3", "b", "y"),
        ("4", "a", "x"),
    ):
        desk.publish(sample(event_id, topic=topic, source=source))
    assert desk.loop.run_until_complete(asyncio.wait_for(scenario(), 20)) == expected


def test_server_sent_events_carry_the_seq_as_their_id_and_resume_behind_it(desk):
    async def scenario():
        text = b""
        headers = ("Accept: text/event-stream", "Last-Event-ID: 1")
        async for piece in pieces_of(
            desk, "/events?follow=1&after=0", headers
        ):  # the header is nearer than the address
            text += piece
            if text.count(b"\n\n") == 3:
                return text.decode()

    desk.publish(sample("1"), sample("2", payload={"text": "line\nline\r\n\u2028"}), sample("3"))
    blocks = desk.loop.run_until_complete(asyncio.wait_for(scenario(), 20)).split("\n\n")
    assert blocks[0] == "retry: 2000" and blocks[3] == ""
    for seq, block in ((2, blocks[1]), (3, blocks[2])):
        fields = [line.partition(": ") for line in block.split("\n")]
        assert [name for name, _, _ in fields] == ["id", "data"] and fields[0][2] == str(seq)
        assert json.loads(fields[1][2])["seq"] == seq


def test_a_silent_tail_says_that_it_lives_and_moves_the_browsers_cursor(desk, monkeypatch):
    monkeypatch.setattr(aggregator, "FOLLOW_KEEP_ALIVE_S", 0.01)

    async def scenario(headers):
        found = []
        async for piece in pieces_of(desk, "/events?follow=1&topic=none", headers):
            found.append(piece)
            if len(found) == 3:
                return found

    desk.publish(sample("1"), sample("2"))
    assert desk.loop.run_until_complete(asyncio.wait_for(scenario(()), 20)) == [b"\n"] * 3
    assert (
        desk.loop.run_until_complete(
            asyncio.wait_for(scenario(("Accept: text/event-stream",)), 20)
        )[1:]
        == [b": keep-alive\nid: 2\n\n"] * 2
    )


@pytest.mark.parametrize(
    "target, headers, detail",
    [
        ("/events?follow=1&after=3", (), "the newest is 2"),
        ("/events?follow=1&after=-1", (), "must be a seq"),
        ("/events?follow=1", ("Last-Event-ID: x",), "must be a seq"),
        ("/events?after=1", (), "follow=1"),
        ("/events?follow=1&limit=5", (), "limit"),
        ("/events?follow=1&cursor=a1.1", (), "cursor"),
        ("/events?follow=2", (), "0 or 1"),
    ],
)
def test_a_cursor_that_makes_no_sense_is_refused(desk, target, headers, detail):
    desk.publish(sample("1"), sample("2"))
    answer = desk.ask("GET", target, b"", headers)
    assert answer.status == 400 and detail in answer.json["detail"]


def test_a_cursor_older_than_retention_is_told_what_is_gone(make_desk):
    desk = make_desk(retention_us=1_000_000)

    async def rest(after):
        async for piece in pieces_of(desk, "/events?follow=1&after={}".format(after)):
            return [json.loads(line)["seq"] for line in piece.decode().splitlines()]

    desk.publish(*[sample(str(n)) for n in range(10)])
    desk.now += 2_000_000
    desk.publish(sample("late"), sample("later"))
    while desk.loop.run_until_complete(desk.tidy()):
        pass
    answer = desk.ask("GET", "/events?follow=1&after=4")
    assert (
        answer.status == 410
        and answer.json["oldest_seq"] == 11
        and "after=10" in answer.json["detail"]
    )
    assert desk.loop.run_until_complete(asyncio.wait_for(rest(10), 20)) == [11, 12]


def test_a_slow_follower_that_retention_overtakes_is_ended_and_not_skipped_ahead(make_desk):
    desk = make_desk(retention_us=1_000_000, max_events=5000)

    async def scenario():
        seqs = []
        async for piece in pieces_of(desk, "/events?follow=1&after=0"):
            if not seqs:  # it took the first page, and while it does nothing all the rest goes
                desk.now += 5_000_000
                while await desk.tidy():
                    pass
                await desk._ask("POST", "/publish", sample("new"))
            seqs += [json.loads(line)["seq"] for line in piece.decode().splitlines()]
        return seqs

    desk.publish(*[sample(str(n)) for n in range(2500)])
    assert desk.loop.run_until_complete(asyncio.wait_for(scenario(), 20)) == list(range(1, 1001))


def test_followers_that_wait_for_the_same_share_one_look_into_the_store(desk):
    looks = []
    look = desk.pipeline._reader.tail

    def counted(query, after):
        looks.append(after)
        return look(query, after)

    async def follower():
        async for piece in pieces_of(desk, "/events?follow=1"):
            return piece

    async def scenario():
        tasks = [asyncio.ensure_future(follower()) for _ in range(50)]
        while desk.pipeline.followers < 50:
            await asyncio.sleep(0)
        await desk._ask("POST", "/publish", [sample("1"), sample("2")])
        return await asyncio.gather(*tasks)

    desk.pipeline._reader.tail = counted
    found = desk.loop.run_until_complete(asyncio.wait_for(scenario(), 20))
    assert len(set(found)) == 1 and found[0].count(b"\n") == 2 and len(looks) == 2


def test_a_refused_write_is_logged_with_peer_and_reason_and_a_refused_read_is_not(desk, caplog):
    hostile = "%0d%0a%1b%5b31m%7f%c2%85"
    for method, target, body in (
        ("POST", "/publish", b"?"),
        ("PUT", f"/events/t/{hostile}", b"{}"),
        ("PATCH", "/" + hostile, b""),
        ("GET", "/" + hostile, b""),
    ):
        assert desk.ask(method, target, body, peer="192.0.2.9").status >= 400
    logged = [each.getMessage() for each in caplog.records]
    assert [
        re.match(r"REFUSED ([0-9]+) - 192\.0\.2\.9, ([A-Z]+) ", each).groups() for each in logged
    ] == [("400", "POST"), ("422", "PUT"), ("404", "PATCH")]
    assert all(each.isascii() and each.isprintable() for each in logged)


STRANGE = [
    None,
    True,
    -1,
    0.5,
    2**63,
    10**400,
    float("nan"),
    float("-inf"),
    "",
    " ",
    "\0",
    "\x7f",
    "\ud800",
    "é😀\u2028",
    "%",
    "*",
    "a/b",
    "x" * 300,
    [],
    {},
    [[]],
    {"": {"a": [1]}},
    {"é": "\ud83d"},
    "1h",
    "9" * 30,
    "2026-02-30",
    "0001-01-01",
]


def strange_event(rng):
    value = sample("%x" % rng.getrandbits(rng.choice((3, 30))), payload={"n": rng.randrange(3)})
    for _ in range(rng.choice((0, 0, 1, 2))):
        name = rng.choice(list(value) + ["sequence", "events"])
        if rng.random() < 0.2:
            value.pop(name, None)
        else:
            value[name] = rng.choice(STRANGE)
    return value


def strange_request(rng):
    """Bytes of a request that is valid but for some things."""
    route = rng.choice(aggregator.ROUTES)
    texts = [str(value) for value in STRANGE if value != "\ud800"] + [
        "0",
        "1",
        "5",
        "1000",
        "true",
        "asc",
        "desc",
        "a1.1",
        "d-5.99",
        "2026-01-01",
        "10m",
        "t",
        "t*",
        "s",
        "1-3",
    ]
    target = re.sub(
        r"{\w+}",
        lambda _: quote(rng.choice(texts + ["1", "t"] * 9), safe=rng.choice(("", "/"))),
        route.path,
    )
    named = [
        (
            rng.choice(route.parameters) if route.parameters and rng.random() < 0.95 else "strange",
            quote(rng.choice(texts).encode()),
        )
        for _ in range(rng.choice((0, 0, 1, 2)))
    ]
    target += "?" * bool(named) + "&".join("=".join(each) for each in named)
    values = [strange_event(rng) for _ in range(rng.choice((1, 1, 2, 5)))]
    body = rng.choice(
        (
            lambda: json.dumps(values),
            lambda: json.dumps(values[0]),
            lambda: json.dumps({"events": values}),
            lambda: "\n".join(map(json.dumps, values)),
            lambda: "a\n\0b\n\ud7ff",
            lambda: "",
        )
    )().encode()
    if rng.random() < 0.3:
        at = rng.randrange(len(body) + 1)
        bits = (
            b"\0",
            b"\xff",
            b"\xed\xa0\x80",
            b"[",
            b"{" * 2000,
            b"1" * 5000,
            b'"',
            b"\\ud800",
            b",",
        )
        body = body[:at] + rng.choice(bits) + body[at + rng.choice((0, 1, 9)) :]
    fields = rng.sample(
        [
            b"Accept: application/x-ndjson",
            b"Accept: text/html",
            b"Accept: \xff,;",
            b"Content-Type: text/plain",
            b"Idempotency-Key: k\xe9",
            b"Idempotency-Key: " + b"k" * 300,
            b"Connection: close",
            b"Expect: 100-continue",
            b"Content-Encoding: gzip",
            b"Last-Event-ID: -1",
            b"Origin: null",
        ],
        rng.choice((0, 1, 2)),
    )
    if b"Content-Encoding: gzip" in fields and rng.random() < 0.9:
        body = gzip.compress(body, 1)
    method = rng.choice([route.method.encode()] * 9 + [b"HEAD", b"OPTIONS", b"DELETE", b"TRACE"])
    head = b"%b %b HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n" % (
        method,
        target.encode(),
        len(body),
    )
    raw = head + b"".join(field + b"\r\n" for field in fields) + b"\r\n" + body
    if rng.random() < 0.1:
        at = rng.randrange(len(raw))
        raw = raw[:at] + bytes([rng.randrange(256)]) + raw[at + rng.choice((0, 1)) :]
    return raw


def test_nothing_that_a_client_sends_is_answered_with_a_server_error(make_desk):
    seed = int(os.environ.get("FUZZ_SEED") or random.randrange(2**32))
    count = int(os.environ.get("FUZZ_REQUESTS", "3000"))
    rng, desk, statuses = (
        random.Random(seed),
        make_desk(full_sync=False, max_per_topic=9, retention_us=10),
        {},
    )

    async def ask(raw):
        parser = aggregator.RequestParser()
        parser.feed(raw)
        try:
            request = parser.next_request()
        except aggregator.HTTPError:
            return
        if request is None:
            return
        response = await desk.api.answer(request, "192.0.2.7")
        body = response.body
        if not isinstance(body, bytes):
            pieces = [] if "follow" in request.head.query else [piece async for piece in body]
            body = b"[" + b",".join(b"".join(pieces).splitlines()) + b"]"
        problem = b"/docs#queue-full" in body
        statuses[response.status] = statuses.get(response.status, 0) + 1
        assert aggregator.encode_response(response._replace(body=b""), DATE, True).isascii()
        assert response.status < 500 or problem, body
        if "json" in response.content_type and response.status != 204:
            json.loads(
                body.decode("utf-8"), parse_constant=pytest.fail
            )  # NaN and Infinity are not JSON

    async def ask_all(requests):
        found = await asyncio.gather(*map(ask, requests), return_exceptions=True)
        for raw, error in zip(requests, found):
            if error is not None:
                print("seed", seed, "request", raw)
                raise error

    logging.disable(logging.CRITICAL)
    try:
        for _ in range(0, count, 50):
            desk.now += 1  # retention keeps the lists short
            desk.loop.run_until_complete(ask_all([strange_request(rng) for _ in range(50)]))
    finally:
        logging.disable(logging.NOTSET)
    assert {200, 202, 400, 404, 405, 422} <= set(statuses)
    for row in desk.ask(
        "GET", "/events", headers=("Accept: application/x-ndjson",)
    ).body.splitlines():
        json.loads(row)


# ======================================================================================================================
# §9 Server: real sockets, and clients that know nothing of ours
# ======================================================================================================================


class Site:
    """aggregator.Server on a free port, in a thread with a loop of its own."""

    def __init__(self, path, **options):
        self._path, self._options, self._ready = path, options, threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)
        self._thread.start()
        assert self._ready.wait(10)

    async def _run(self):
        def clock():
            return time.time_ns() // 1000

        self.pipeline = pipeline = aggregator.Pipeline(lambda: aggregator.Store(self._path), clock)
        self.server = aggregator.Server(
            aggregator.API(pipeline, clock, lambda: "id", {}), time.time, **self._options
        )
        self.port = int((await self.server.bind("127.0.0.1", 0))[0].rpartition(":")[2])
        await pipeline.start()
        await self.server.listen()
        self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        self._ready.set()
        await self._end.wait()
        await self.server.stop(0.5)
        await pipeline.stop(5)

    def close(self):
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join(20)
        assert not self._thread.is_alive()


@pytest.fixture
def open_site(tmp_path, monkeypatch):
    sites = []

    def open_one(limits=(), **options):
        for name, value in dict(limits, SWEEP_INTERVAL_S=0.05).items():
            monkeypatch.setattr(aggregator, name, value)
        sites.append(Site(str(tmp_path / "site.db"), **options))
        return sites[-1]

    yield open_one
    for each in sites:
        each.close()


@pytest.fixture
def site(open_site):
    return open_site({"LINGER_TIMEOUT_S": 0.5})


def fetch(port, method, target, body=None, headers=None):
    """One request by http.client."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        if isinstance(body, (dict, list)):
            body = json.dumps(body)
        connection.request(method, target, body, headers or {})
        response = connection.getresponse()
        return Answer(response.status, dict(response.getheaders()), response.read())
    finally:
        connection.close()


def dial(port, data=b"", receive_bytes=0):
    sock = socket.socket()
    if receive_bytes:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    sock.settimeout(10)
    sock.connect(("127.0.0.1", port))
    sock.sendall(data)
    return sock


def read_all(sock):
    """Everything up to the end of the stream."""
    data = b""
    while True:
        piece = sock.recv(65536)
        if not piece:
            return data
        data += piece


def exchange(port, data, half_close=False):
    with contextlib.closing(dial(port, data)) as sock:
        if half_close:
            sock.shutdown(socket.SHUT_WR)
        return answers(read_all(sock))


def answers(raw):
    """Raw bytes to answers; each must have its Date, its Server and exact framing."""
    found = []
    while raw:
        head, blank, raw = raw.partition(b"\r\n\r\n")
        status_line, *fields = head.decode("ascii").split("\r\n")
        headers = {
            name.lower(): value.strip()
            for name, _, value in (field.partition(":") for field in fields)
        }
        status, body, pieces = int(re.match(r"HTTP/1\.1 ([0-9]{3}) [A-Z]", status_line)[1]), b"", 1
        assert blank and len(headers) == len(fields)
        if status >= 200:
            assert re.fullmatch(
                "[A-Z][a-z]{2}, [0-9]{2} [A-Z][a-z]{2} 20[0-9]{2} [0-9:]{8} GMT", headers["date"]
            )
            assert headers["server"] == "aggregator/" + aggregator.__version__
        if headers.get("transfer-encoding") == "chunked":
            assert "content-length" not in headers
            while True:
                size, _, raw = raw.partition(b"\r\n")
                size = int(size, 16)
                assert raw[size : size + 2] == b"\r\n"
                body, raw, pieces = body + raw[:size], raw[size + 2 :], pieces + 1
                if size == 0:
                    break
        elif status not in (100, 204):
            size = int(headers["content-length"])
            assert len(raw) >= size
            body, raw = raw[:size], raw[size:]
        found.append(Answer(status, headers, body, pieces))
    return found


def http_request(method, target, body=b"", *fields):
    head = [f"{method} {target} HTTP/1.1", "Host: localhost"] + list(fields)
    if body and not any(
        field.lower().startswith(("content-length", "transfer-encoding")) for field in fields
    ):
        head.append(f"Content-Length: {len(body)}")
    return "\r\n".join(head + ["", ""]).encode() + body


HEALTH = http_request("GET", "/health")
LAST = http_request("GET", "/health", b"", "Connection: foo, CLOSE")
SMUGGLED = http_request("PUT", "/events/smuggled/1", b"{}")


def test_a_connection_is_kept_and_pipelined_requests_are_answered_in_order(site):
    connection = http.client.HTTPConnection("127.0.0.1", site.port, timeout=10)
    connection.request("PUT", "/events/t/1", b"{}")
    first = connection.getresponse()
    first.read()
    sock = connection.sock
    connection.request("GET", "/events/t/1")
    assert connection.getresponse().status == 200 and connection.sock is sock
    connection.close()
    data = b"".join(http_request("PUT", f"/events/p/{n % 40}", b"{}") for n in range(80)) + LAST
    found = exchange(site.port, data)
    assert [each.status for each in found] == [201] * 40 + [200] * 41
    assert [each.json["seq"] for each in found[:80]] == [2 + n % 40 for n in range(80)]
    assert "close" in found[-1].headers["connection"] and "connection" not in found[0].headers


@pytest.mark.parametrize(
    "data, status",
    [
        (b"GET /\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\nA : b\r\n\r\n", 400),
        (b"GET / HTTP/1.1\nHost: x\n\n", 400),
        (http_request("GET", "/?a=%zz"), 400),
        (http_request("GET", "/events?limit=1&limit=2"), 400),
        (
            http_request(
                "POST", "/publish", b"0\r\n\r\n", "Content-Length: 5", "Transfer-Encoding: chunked"
            ),
            400,
        ),
        (http_request("POST", "/publish", b"5;\r\nabcdeX\r\n", "Transfer-Encoding: chunked"), 400),
        (http_request("POST", "/publish", b"", "Content-Length: 0", "Content-Length: 0"), 400),
        (http_request("POST", "/publish", b"", "Content-Length: +5"), 400),
        (http_request("BREW", "/"), 501),
        (b"GET / HTTP/2.0\r\nHost: x\r\n\r\n", 505),
        (http_request("POST", "/publish", b"", "Content-Length: 999999999"), 413),
        (http_request("GET", "/" + "x" * 9000), 414),
        (http_request("GET", "/", b"", *["A: b"] * 101), 431),
        (http_request("GET", "/", b"", "A: " + "b" * 40000), 431),
        (http_request("POST", "/publish", b"", "Expect: tea"), 417),
        (http_request("POST", "/publish", b"no gzip", "Content-Encoding: gzip"), 400),
        (http_request("POST", "/publish", b"x", "Content-Encoding: br"), 415),
        (LAST, 200),
        (http_request("GET", "/health", b"", "Connection: x", "Connection: close"), 200),
    ],
)
def test_nothing_behind_a_refusal_or_a_close_is_executed(site, data, status):
    found = exchange(site.port, data + SMUGGLED)
    assert [each.status for each in found] == [status] and found[0].headers["connection"] == "close"
    if status >= 400:
        assert_problem(found[0], found[0].headers["content-type"])
    assert fetch(site.port, "GET", "/events/smuggled/1").status == 404


@pytest.mark.parametrize(
    "method, target, status",
    [
        ("GET", "/nowhere", 404),
        ("DELETE", "/publish", 405),
        ("HEAD", "/health", 200),
        ("POST", "/publish", 422),
        ("OPTIONS", "*", 204),
    ],
)
def test_a_body_that_nobody_wants_is_read_and_not_taken_for_a_request(site, method, target, status):
    body = SMUGGLED if target != "/publish" else b"{}"
    data = http_request(method, target, body) + LAST
    with contextlib.closing(dial(site.port, data)) as sock:
        raw = read_all(sock)
    assert re.findall(rb"HTTP/1\.1 ([0-9]+)", raw) == [b"%d" % status, b"200"]
    assert fetch(site.port, "GET", "/events/smuggled/1").status == 404


def test_100_continue_comes_before_the_body_and_only_where_it_helps(open_site):
    site, body = (
        open_site({"LINGER_TIMEOUT_S": 0.3}, max_body_bytes=1000),
        json.dumps(sample()).encode(),
    )
    expect = ("EXPECT: 100-Continue", "Connection: close")
    fitting, too_large = [
        http_request("POST", "/publish", b"", f"Content-Length: {n}", *expect)
        for n in (len(body), 1001)
    ]
    with contextlib.closing(dial(site.port, fitting)) as sock:
        assert sock.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(body)
        assert [each.status for each in answers(read_all(sock))] == [202]
    assert [each.status for each in exchange(site.port, too_large)] == [413]
    old = http_request("POST", "/publish", body, *expect).replace(b"HTTP/1.1", b"HTTP/1.0")
    assert [each.status for each in exchange(site.port, old)] == [202]
    assert [
        each.status for each in exchange(site.port, http_request("GET", "/health", b"", *expect))
    ] == [200]


def test_head_has_the_head_of_get_and_no_body(site):
    fetch(site.port, "PUT", "/events/t/1", b"{}")
    for target, accept in (
        ("/health", "*/*"),
        ("/events/t/1", "*/*"),
        ("/events", "*/*"),
        ("/nowhere", "*/*"),
        ("/events", "application/x-ndjson"),
    ):
        heads = []
        for method in ("GET", "HEAD"):
            ask = http_request(method, target, b"", "Accept: " + accept, "Connection: close")
            with contextlib.closing(dial(site.port, ask)) as sock:
                head, _, body = read_all(sock).partition(b"\r\n\r\n")
            heads.append(re.sub(rb"\r\nDate: [^\r]+", b"", head))
            assert (body == b"") == (method == "HEAD")
        assert heads[0] == heads[1]


def test_http_1_0_is_closed_after_one_answer_unless_it_asks_to_be_kept(site):
    old = HEALTH.replace(b"HTTP/1.1", b"HTTP/1.0")
    assert [each.status for each in exchange(site.port, old + SMUGGLED)] == [200]
    kept = exchange(
        site.port, old.replace(b"\r\n\r\n", b"\r\nConnection: Keep-Alive\r\n\r\n") + old
    )
    assert [each.status for each in kept] == [200, 200]
    assert (
        kept[0].headers.get("connection", "").lower() == "keep-alive"
    )  # or an old client waits for the end
    stream = http_request("GET", "/events", b"", "Accept: application/x-ndjson").replace(
        b"HTTP/1.1", b"HTTP/1.0"
    )
    fetch(site.port, "PUT", "/events/t/1", b"{}")
    with contextlib.closing(dial(site.port, stream)) as sock:
        head, _, body = read_all(sock).partition(b"\r\n\r\n")
    assert (
        b"chunked" not in head
        and b"Connection: close" in head
        and json.loads(body)["event_id"] == "1"
    )


def test_a_half_closed_client_gets_its_answers(site):
    publish = http_request("POST", "/publish", json.dumps(sample()).encode())
    assert [each.status for each in exchange(site.port, publish + HEALTH, half_close=True)] == [
        202,
        200,
    ]
    assert [each.status for each in exchange(site.port, publish[:-5], half_close=True)] == [400]
    assert exchange(site.port, b"", half_close=True) == []


@pytest.mark.parametrize(
    "start, trickle, status",
    [
        (b"GET / HT", b"", [408]),
        (b"GET / HTTP/1.1\r\n", b"A: b\r\n", [408]),
        (b"", b"", []),
        (b"\r\n", b"", []),
        (http_request("POST", "/publish", b"", "Content-Length: 9") + b"{", b"", [408]),
        (HEALTH, b"", [200]),
        (http_request("POST", "/publish", b"", "Content-Length: 999999"), b"{", [408]),
        (HEALTH + b"G", b"E", [200, 408]),
        (http_request("POST", "/publish", b"", "Transfer-Encoding: chunked"), b"1\r\n \r\n", [408]),
    ],
)
def test_a_slow_client_meets_a_deadline_that_it_cannot_renew(open_site, start, trickle, status):
    site = open_site(
        {
            "HEAD_TIMEOUT_S": 0.5,
            "BODY_STALL_TIMEOUT_S": 0.5,
            "BODY_GRACE_S": 0.7,
            "IDLE_TIMEOUT_S": 0.5,
            "LINGER_TIMEOUT_S": 0.3,
        }
    )
    began, data = time.monotonic(), b""
    with contextlib.closing(dial(site.port, start)) as sock:
        sock.settimeout(0.1)
        while time.monotonic() - began < 5:
            with contextlib.suppress(socket.timeout):
                piece = sock.recv(65536)
                if not piece:
                    break
                data += piece
                continue
            with contextlib.suppress(OSError):
                sock.sendall(trickle)
    assert [each.status for each in answers(data)] == status
    assert 0.4 < time.monotonic() - began < 3


def test_a_client_that_does_not_read_is_dropped_and_others_are_served_meanwhile(open_site):
    site = open_site({"WRITE_TIMEOUT_S": 0.4, "LINGER_TIMEOUT_S": 0.3})
    for n in range(6):
        fetch(
            site.port,
            "POST",
            "/publish",
            [sample(f"{n}-{i}", payload={"x": "y" * 250_000}) for i in range(8)],
        )
    asks = [
        http_request("GET", "/events", b"", field)
        for field in ("Accept: */*", "Accept: application/x-ndjson")
    ]
    socks = [dial(site.port, ask * 3, receive_bytes=4096) for ask in asks]
    try:
        began = time.monotonic()
        while time.monotonic() - began < 1:
            asked = time.monotonic()
            assert fetch(site.port, "GET", "/health").status == 200 and time.monotonic() - asked < 1
            time.sleep(0.05)
        for sock in socks:
            with contextlib.suppress(ConnectionError):
                assert len(read_all(sock)) < 8_000_000
    finally:
        for sock in socks:
            sock.close()


def test_a_small_answer_that_is_not_read_does_not_hold_its_connection_for_ever(open_site):
    site = open_site({"WRITE_TIMEOUT_S": 0.3, "IDLE_TIMEOUT_S": 0.3, "LINGER_TIMEOUT_S": 0.2})
    fetch(site.port, "PUT", "/events/t/1", {"x": "y" * 60_000})
    site.server._server.sockets[0].setsockopt(
        socket.SOL_SOCKET, socket.SO_SNDBUF, 4096
    )  # accepted sockets inherit it
    with contextlib.closing(
        dial(site.port, http_request("GET", "/events/t/1"), receive_bytes=2048)
    ) as sock:
        deadline = time.monotonic() + 5
        while len(site.server._connections) < 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        while site.server._connections and time.monotonic() < deadline:
            time.sleep(0.01)
        with contextlib.suppress(ConnectionError):
            assert len(read_all(sock)) < 60_000


def test_one_connection_too_many_is_503_and_a_free_place_is_taken_again(open_site):
    site = open_site({"LINGER_TIMEOUT_S": 0.3}, max_connections=3)
    held = [dial(site.port, HEALTH) for _ in range(3)]
    try:
        assert all(sock.recv(5) == b"HTTP/" for sock in held)
        refused = exchange(site.port, HEALTH)
        assert refused[0].status == 503 and refused[0].json["type"] == "/docs#too-many-connections"
        assert int(refused[0].headers["retry-after"]) >= 1
        held.pop().close()
        deadline = time.monotonic() + 5
        while len(site.server._connections) > 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert fetch(site.port, "GET", "/health").status == 200
    finally:
        for sock in held:
            sock.close()


def test_a_refused_connection_is_closed_even_if_its_client_stays(open_site):
    site = open_site({"LINGER_TIMEOUT_S": 0.2}, max_connections=1)
    with contextlib.closing(dial(site.port, HEALTH)) as held:
        assert held.recv(5) == b"HTTP/"
        with contextlib.closing(dial(site.port)) as refused:
            assert answers(read_all(refused))[0].status == 503
            with pytest.raises(ConnectionError):
                for _ in range(60):
                    time.sleep(0.02)
                    refused.sendall(b"x")


@pytest.mark.parametrize("fields", [("Content-Length: 8000000",), ("Transfer-Encoding: chunked",)])
def test_an_upload_that_is_refused_while_it_is_sent_gets_its_answer(open_site, fields):
    site = open_site(max_body_bytes=1000)
    chunk = b"10000\r\n" + b"x" * 65536 + b"\r\n"
    with contextlib.closing(
        dial(site.port, http_request("POST", "/publish", b"", *fields))
    ) as sock:
        for _ in range(64):
            sock.sendall(chunk)
            time.sleep(0.001)
        sock.shutdown(socket.SHUT_WR)
        assert [each.status for each in answers(read_all(sock))] == [413]


def test_a_reset_in_any_phase_leaves_the_server_healthy(site, caplog):
    fetch(
        site.port,
        "POST",
        "/publish",
        [sample(str(n), payload={"x": "y" * 100_000}) for n in range(30)],
    )
    stream = http_request("GET", "/events", b"", "Accept: application/x-ndjson")
    for data in (
        b"",
        b"GET",
        http_request("POST", "/publish", b"", "Content-Length: 9") + b"{",
        HEALTH,
        stream,
        stream * 5,
        http_request("POST", "/publish", lines([sample("reset")])),
        b"?\r\n\r\n",
        HEALTH * 200,
    ):
        for delay_s in (0, 0.02):
            sock = dial(site.port, data)
            time.sleep(delay_s)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.close()
    deadline = time.monotonic() + 5
    while site.server._connections and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not site.server._connections and fetch(site.port, "GET", "/health").status == 200
    assert not [each for each in caplog.records if each.levelno >= logging.ERROR]


def test_a_long_list_is_streamed_in_chunks(site, monkeypatch):
    monkeypatch.setattr(aggregator, "PAGE_MAX", 100)
    fetch(
        site.port,
        "POST",
        "/publish",
        [sample(str(n), payload={"text": "\u00e9\0"}) for n in range(350)],
    )
    found = exchange(
        site.port, http_request("GET", "/events", b"", "Accept: application/x-ndjson") + LAST
    )
    assert (
        found[0].headers["content-type"] == "application/x-ndjson"
        and found[0].pieces > 3
        and found[1].status == 200
    )
    assert [json.loads(line)["event_id"] for line in found[0].body.splitlines()] == [
        str(n) for n in range(350)
    ]


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_curl_publishes_puts_and_lists(site, tmp_path):
    url, upload = f"http://127.0.0.1:{site.port}", tmp_path / "events"
    upload.write_bytes(
        lines([sample(str(n), payload={"x": "y" * 1000}) for n in range(1500)])
    )  # for 100-continue

    def curl(*arguments):
        return subprocess.run(
            ["curl", "-sSm10"] + list(arguments), check=True, stdout=subprocess.PIPE
        ).stdout

    for unique, flag in ((1500, "-d"), (0, "--data-binary")):
        began = time.monotonic()
        assert json.loads(curl(url + "/publish", flag, "@" + str(upload)))["unique"] == unique
        assert time.monotonic() - began < 0.9  # curl waits a second for a 100 that does not come
    code = ["-o", os.devnull, "-w", "%{http_code}", "-T", str(upload)]
    assert [curl(url + "/events/put/1", *code) for _ in range(2)] == [b"201", b"200"]
    assert (
        len(curl("-H", "Accept: application/x-ndjson", url + "/events?topic=t").splitlines())
        == 1500
    )


def test_a_slow_follower_loses_nothing_and_holds_nobody_up(site):
    slow = dial(
        site.port,
        b"GET /events?follow=1&after=0 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        receive_bytes=4096,
    )
    for n in range(40):
        batch = [sample(f"{n}-{m}", payload={"filling": "x" * 2000}) for m in range(100)]
        assert (
            fetch(site.port, "POST", "/publish", batch).status == 202
        )  # 8 MB in all, and nobody reads
    data = bytearray()
    while b'{"seq":4000,' not in data[-10_000:]:
        data += slow.recv(1 << 16)
    slow.close()
    found = re.findall(rb'\{"seq":([0-9]+),', data)
    assert found == [b"%d" % n for n in range(1, 4001)]


def test_a_stop_ends_the_live_tails_at_once_and_whole(open_site):
    site = open_site({"LINGER_TIMEOUT_S": 0.5})
    follower = dial(site.port, b"GET /events?follow=1&after=0 HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert fetch(site.port, "POST", "/publish", sample("1")).status == 202
    data = b""
    while b'"seq":1' not in data:
        data += follower.recv(65536)
    site._loop.call_soon_threadsafe(site.pipeline.end_followers)
    while not data.endswith(b"\r\n0\r\n\r\n"):
        piece = follower.recv(65536)
        assert piece
        data += piece
    follower.close()


def test_a_client_that_half_closes_in_the_middle_is_told_so_and_nothing_of_it_is_stored(site):
    event = json.dumps(sample()).encode()
    sized = http_request("POST", "/publish", event)
    chunked = http_request(
        "POST",
        "/publish",
        b"%x\r\n%b\r\n0\r\n\r\n" % (len(event), event),
        "Transfer-Encoding: chunked",
    )
    for data in (
        b"G",
        sized[:20],
        sized[: -len(event)],
        sized[:-1],
        chunked[:-1],
        chunked[:-2],
        chunked[:-4],
        chunked[:-5],
        chunked[:-7],
        chunked[: -7 - len(event)],
        HEALTH[:-1],
        HEALTH[:-2],
    ):
        assert [each.status for each in exchange(site.port, data, half_close=True)] == [400], data
        assert [each.status for each in exchange(site.port, HEALTH + data, half_close=True)] == [
            200,
            400,
        ], data
    assert json.loads(fetch(site.port, "GET", "/stats").body)["received"] == 0


def held(site):
    return sum(each.held for each in list(site.server._connections))


def test_bodies_on_their_way_are_bounded_together_and_the_slowest_makes_room(open_site, caplog):
    site = open_site(
        {"BUFFERS_MAX_BYTES": 1_000_000, "LINGER_TIMEOUT_S": 0.2}, max_body_bytes=400_000
    )
    start = http_request("POST", "/publish", b"", "Content-Length: 399999") + b"[" + b" " * 349_000
    socks = []
    try:
        for n in range(5):
            socks.append(dial(site.port, start))
            deadline = time.monotonic() + 5
            while held(site) < min(n + 1, 2) * 280_000 and time.monotonic() < deadline:
                time.sleep(0.01)
            assert fetch(site.port, "PUT", f"/events/small/{n}", b"{}").status == 201
            assert 280_000 < held(site) <= 1_000_000
        refused = [answers(read_all(sock)) for sock in socks[:2]]
        assert [(each.status, each.json["type"]) for [each] in refused] == [
            (503, "/docs#overloaded")
        ] * 2
        socks[-1].sendall(b" " * (399_999 - 349_001 - 1) + b"]")
        assert (
            socks[-1].recv(12) == b"HTTP/1.1 422"
        )  # the list is empty, but it is there, all of it
    finally:
        for sock in socks:
            sock.close()
    deadline = time.monotonic() + 5
    while held(site) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert held(site) == 0 and [
        each for each in caplog.messages if each.startswith("REFUSED 503 - 127.0.0.1: too much")
    ]


def test_what_completes_a_body_or_is_all_of_an_answer_is_not_cut_off_for_being_too_much(open_site):
    site = open_site(
        {"BUFFERS_MAX_BYTES": 800_000, "LINGER_TIMEOUT_S": 0.2}, max_body_bytes=400_000
    )
    start = http_request("PUT", "/events/a/1", b"", "Content-Length: 399999")
    with contextlib.ExitStack() as stack:
        first, second, third = [stack.enter_context(dial(site.port, start)) for _ in range(3)]
        until(lambda: [each.phase for each in list(site.server._connections)] == ["body"] * 3)
        for n, sock in enumerate((first, second)):
            sock.sendall(b" " * 350_000)
            until(lambda n=n: held(site) == (n + 1) * 350_000)
        while held(site) < 765_000:
            third.sendall(b" " * 4_000)
            time.sleep(0.01)
        first.sendall(b" " * 49_999)  # now all of it is there, and together they are too much
        assert first.recv(12) == b"HTTP/1.1 201"
    assert len(fetch(site.port, "GET", "/events/a/1").body) * 2 > 800_000


def test_answers_that_are_not_read_are_bounded_together(open_site, caplog):
    site = open_site(
        {"BUFFERS_MAX_BYTES": 5_000_000, "LINGER_TIMEOUT_S": 0.2}, max_body_bytes=2_000_000
    )
    fetch(
        site.port,
        "POST",
        "/publish",
        [sample(str(n), payload={"x": "y" * 150_000}) for n in range(10)],
    )
    asks = [
        http_request("GET", "/events", b"", field)
        for field in ("Accept: */*", "Accept: application/x-ndjson")
    ]
    site.server._server.sockets[0].setsockopt(
        socket.SOL_SOCKET, socket.SO_SNDBUF, 4096
    )  # accepted sockets inherit it
    socks = []
    try:
        for n in range(8):
            socks.append(dial(site.port, asks[n % 2] * 2, receive_bytes=4096))
            time.sleep(0.03)
            assert held(site) <= 5_000_000
        with contextlib.suppress(ConnectionError):
            assert len(read_all(socks[0])) < 1_500_000
        assert fetch(site.port, "GET", "/events").json["count"] == 10
    finally:
        for sock in socks:
            sock.close()
    assert "CUT OFF - 127.0.0.1" in caplog.text


def test_beyond_the_connections_that_are_told_so_any_more_are_just_closed(open_site):
    site = open_site({"REFUSALS_AT_ONCE": 3, "LINGER_TIMEOUT_S": 0.5}, max_connections=2)
    socks = [dial(site.port) for _ in range(12)]
    try:
        found = []
        for sock in socks[2:]:
            with contextlib.suppress(ConnectionError):
                found.append(read_all(sock))
        assert len([each for each in found if each.startswith(b"HTTP/1.1 503")]) == 3
        assert len([each for each in found if not each]) == 7
    finally:
        for sock in socks:
            sock.close()


def test_what_is_refused_before_it_is_a_request_is_logged_with_peer_and_reason(site, caplog):
    for data in (
        b"G\x1b[2J / HTTP/1.1\r\n\r\n",
        b"GET /\x00\r\n\r\n",
        http_request("BREW", "/"),
        http_request("GET", "/%"),
        http_request("GET", "/?a%1b=1&a%1b=2"),
        http_request("GET", "/", b"", "Expect: \x07"),
    ):
        assert exchange(site.port, data)[0].status >= 400
    assert len(caplog.records) == 6
    for message in caplog.messages:
        assert (
            re.match(r"REFUSED [45][0-9]{2} - 127\.0\.0\.1: .{10}", message)
            and message.isprintable()
            and message.isascii()
        )


def reset(sock):
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def test_nothing_of_a_request_or_its_answer_waits_for_the_garbage_collector(open_site, monkeypatch):
    """What waits for it are megabytes, and it comes after thousands of requests."""
    limits = {"LINGER_TIMEOUT_S": 0.2, "HEAD_TIMEOUT_S": 0.3, "BODY_STALL_TIMEOUT_S": 0.3}
    site, close = open_site(limits), "Connection: close"
    site.server._server.sockets[0].setsockopt(
        socket.SOL_SOCKET, socket.SO_SNDBUF, 4096
    )  # accepted sockets inherit it
    body = json.dumps([sample(str(n), payload={"x": "y" * 100_000}) for n in range(5)]).encode()
    publish, ndjson = (
        http_request("POST", "/publish", body, close),
        ("Accept: application/x-ndjson", close),
    )
    gc.collect()
    gc.disable()
    try:
        for data, status in (
            (publish, 202),
            (http_request("GET", "/events", b"", close), 200),
            (http_request("GET", "/events", b"", *ndjson), 200),
            (http_request("PUT", "/events/t/1", body, close), 409),
            (http_request("POST", "/publish", b"[" + body, close), 400),
            (http_request("POST", "/publish", b"[{}]", close), 422),
            (http_request("BREW", "/", body), 501),
            (http_request("POST", "/publish", body, "Content-Encoding: gzip"), 400),
            (publish[:-9], 408),
            (publish[:20], 408),
            (
                http_request(
                    "POST", "/publish", gzip.compress(body)[:-9], "Content-Encoding: gzip"
                ),
                400,
            ),
        ):
            assert exchange(site.port, data)[-1].status == status, data[:60]
        for data in (
            publish[:-9],
            http_request("GET", "/events") * 3,
            http_request("GET", "/events", b"", ndjson[0]) * 3,
        ):
            sock = dial(site.port, data, receive_bytes=4096)
            if data.startswith(b"GET"):
                sock.recv(10)
            time.sleep(0.05)
            reset(sock)
        with monkeypatch.context() as failing:
            failing.setattr(site.server._api._pipeline._store, "commit", lambda *_: 1 / 0)
            assert exchange(site.port, publish)[0].status == 503
        assert exchange(site.port, publish)[0].status == 202
        kinds = (aggregator.Request, aggregator.Response, aggregator.RequestParser, aggregator.Page)
        deadline, left = time.monotonic() + 5, [None]
        while left and time.monotonic() < deadline:
            time.sleep(0.02)
            left = [each for each in gc.get_objects() if type(each) in kinds]
        assert left == []
    finally:
        gc.enable()


def test_the_date_follows_a_clock_that_is_set_back():
    instants = iter([7200.5, 7200.9, 3600.2])
    server = aggregator.Server(aggregator.API(None, lambda: NOW, str, {}), lambda: next(instants))
    assert [server._now()[17:25] for _ in range(3)] == ["02:00:00", "02:00:00", "01:00:00"]


# ======================================================================================================================
# §10 Client: against the real service, and against a fake one where it must misbehave
# ======================================================================================================================


class Fake:
    """A service that answers as `behave(events)` says: a status and a JSON object, and header fields if need be; None breaks
    the connection. `events` are those of a publish, or the target of a GET, whose answer may be text. Keeps what was asked."""

    def __init__(self, behave):
        fake, self.asked, self.when = self, [], []

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version, wbufsize = "HTTP/1.1", -1

            def do_GET(self):
                self.answer(self.path)

            def do_POST(self):
                body = zlib.decompress(self.rfile.read(int(self.headers["Content-Length"])), 31)
                self.answer([json.loads(line) for line in body.split(b"\n")])

            def answer(self, asked):
                fake.asked.append(asked)
                fake.when.append(time.monotonic())
                told = behave(asked)
                if told is None:
                    self.close_connection = True
                    return
                body = (
                    told[1].encode() if isinstance(told[1], str) else json.dumps(told[1]).encode()
                )
                self.send_response(told[0])
                for name, value in dict(
                    told[2] if len(told) > 2 else {}, **{"Content-Length": str(len(body))}
                ).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = "http://127.0.0.1:%d" % self.server.server_port
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


def taken(events):
    return 202, {
        "status": "accepted",
        "accepted": len(events),
        "unique": len(events),
        "duplicates": 0,
        "conflicts": 0,
    }


class Child:
    """A client of ours as a process. Its words are in `said()`, what it set aside in `aside()`."""

    def __init__(self, folder, *arguments, **env):
        self.out = os.path.join(str(folder), "child-%d" % next(COUNTER))
        with open(self.out, "wb") as out, open(self.out + ".err", "wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, PROGRAM, *map(str, arguments)],
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=err,
                env=clean_environment(**env),
            )

    def said(self):
        with open(self.out + ".err", encoding="utf-8") as err:
            return err.read()

    def aside(self):
        with open(self.out, encoding="utf-8") as out:
            return out.read()

    def end(self, number=signal.SIGTERM):
        self.process.send_signal(number)
        return self.process.wait(10)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)


COUNTER = itertools.count()


def until(condition, timeout_s=15):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def client(command, *arguments):
    """A command in this process; its exit status."""
    return aggregator.COMMANDS[command].run(
        aggregator.read_settings(command, [str(each) for each in arguments], {})
    )


def stored(port, topic="t"):
    """All events of a topic, in order of seq."""
    found = fetch(
        port, "GET", "/events?topic=" + quote(topic), headers={"Accept": "application/x-ndjson"}
    ).body.splitlines()
    return sorted([json.loads(line) for line in found], key=lambda each: each["seq"])


def messages(port, topic="t"):
    return [each["payload"]["message"] for each in stored(port, topic)]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("localhost:8000", ("http", "localhost", 8000, "")),
        ("http://nas", ("http", "nas", None, "")),
        ("https://[::1]:8443/logs/", ("https", "::1", 8443, "/logs/")),
        ("", None),
        ("ftp://nas", None),
        ("http://", None),
        ("http://nas:99999", None),
        ("http://nas:0", None),
        ("http://nas:x", None),
        ("http://u:p@nas", None),
        ("http://n/?a=b", None),
        ("http://n/#a", None),
        ("http://n a/", None),
        ("http://né/", None),
        ("http://[::1", None),
        ("nas\n", None),
        ("http://a..b", None),
    ],
)
def test_an_address_is_read_as_curl_reads_it(text, expected):
    if expected is None:
        with pytest.raises(ValueError):
            aggregator.parse_address(text)
    else:
        parts = aggregator.parse_address(text)
        assert (parts.scheme, parts.hostname, parts.port, parts.path) == expected


def test_what_fails_on_the_way_is_sent_again_until_it_is_answered(tmp_path, monkeypatch):
    monkeypatch.setattr(aggregator, "BACKOFF_S", 0.001)
    script = [
        None,
        (503, {}, {"Retry-After": "1"}),
        (429, {}),
        (500, {}),
        (408, {}),
        (502, "<html>"),
    ]
    (tmp_path / "log").write_text("one\ntwo\n")
    with Fake(lambda events: script.pop(0) if script else taken(events)) as fake:
        assert client("publish", "--url", fake.url, "--topic", "t", tmp_path / "log") == 0
    assert len(fake.asked) == 7 and all(asked == fake.asked[0] for asked in fake.asked)
    assert [each["payload"]["message"] for each in fake.asked[0]] == ["one", "two"]
    assert fake.when[2] - fake.when[1] >= 1  # Retry-After is kept to


def test_pauses_between_attempts_grow_and_are_random(monkeypatch):
    slept = []
    monkeypatch.setattr(aggregator.time, "sleep", slept.append)
    for _ in range(3):
        script = [(503, {})] * 12 + [(200, {})]
        with Fake(lambda events, script=script: script.pop(0)) as fake:
            aggregator.Remote(aggregator.parse_address(fake.url)).ask("GET", "/")
    rounds = [slept[at : at + 12] for at in (0, 12, 24)]
    bounds = [min(aggregator.BACKOFF_MAX_S, aggregator.BACKOFF_S * 2**n) for n in range(12)]
    assert all(0 <= pause <= bound for each in rounds for pause, bound in zip(each, bounds))
    assert rounds[0] != rounds[1] != rounds[2] and max(slept) > 1


@pytest.mark.parametrize(
    "status, told",
    [(401, "401"), (403, "403"), (404, "404"), (200, "200"), (301, "301"), (400, "400")],
)
def test_an_answer_that_no_repetition_changes_ends_the_command(tmp_path, status, told):
    (tmp_path / "log").write_text("one\n")
    with Fake(lambda events: (status, {"detail": "says the service"})) as fake:
        found = run(
            "publish",
            "--url",
            fake.url,
            "--topic",
            "t",
            str(tmp_path / "log"),
            "--state",
            str(tmp_path / "place"),
        )
        assert (
            found.returncode == 1
            and told + " says the service" in found.stderr
            and "Traceback" not in found.stderr
        )
    assert len(fake.asked) == 1 and not (tmp_path / "place").exists()


def refuse_thirteen(events):
    """No more than 16 at a time, and never the 13th; a faulty one is not named."""
    if len(events) > 16:
        return 413, {}
    return (
        (422, {"detail": "unlucky"})
        if any(each["event_id"] == "13" for each in events)
        else taken(events)
    )


def test_what_is_refused_is_set_aside_with_its_line_number_and_the_rest_of_its_block_is_stored(
    tmp_path, capsys
):
    events = [sample(str(n)) for n in range(100)]
    (tmp_path / "log").write_bytes(b"\n" + lines(events))
    with Fake(refuse_thirteen) as fake:
        assert (
            client("publish", "--url", fake.url, tmp_path / "log", "--state", tmp_path / "place")
            == 1
        )
        told = capsys.readouterr()
        assert (
            "line 15 refused" in told.err
            and "unlucky" in told.err
            and "99 new" in told.err
            and told.out == ""
        )
        assert json.loads((tmp_path / "place.refused").read_text()) == events[13]
        passed = [
            each["event_id"]
            for asked in fake.asked
            if refuse_thirteen(asked)[0] == 202
            for each in asked
        ]
        assert passed == [str(n) for n in range(100) if n != 13]  # once, and in order
        assert client("publish", "--url", fake.url, tmp_path / "log") == 1
        assert (
            json.loads(capsys.readouterr().out) == events[13]
        )  # without a state it goes to stdout


def test_of_a_batch_with_many_faults_each_is_refused_by_the_service_and_the_others_are_stored(
    site, tmp_path, capsys
):
    good = [json.dumps(sample(str(n))) for n in range(50)]
    bad = [
        "garbage",
        '{"topic":"t"}',
        "[]",
        '{"topic":"t","event_id":"x"} {"topic":"t"}',
        "null",
        "\ufeff{}",
        "[" * 9000,
        json.dumps(sample("big", payload={"x": "y" * 5_000_000})),
        json.dumps(sample("\0")),
    ]
    text = "\n".join(good[:25] + bad + good[25:])
    (tmp_path / "log").write_text(text)
    assert client("publish", "--url", "127.0.0.1:%d" % site.port, tmp_path / "log") == 1
    told = capsys.readouterr()
    assert {each["event_id"] for each in stored(site.port)} == {str(n) for n in range(50)}
    assert "50 new" in told.err
    for number in range(26, 26 + len(bad)):
        assert f"line {number} refused" in told.err
    assert "event_id is missing" in told.err


def test_a_conflict_is_no_success(site, tmp_path, capsys):
    (tmp_path / "log").write_bytes(
        lines([sample("1"), sample("2"), sample("1", payload={"other": 1})])
    )
    assert client("publish", "--url", "127.0.0.1:%d" % site.port, tmp_path / "log") == 1
    assert "2 new, 1 duplicate, 1 conflict" in capsys.readouterr().err


def test_ids_by_offset_make_it_harmless_to_send_a_file_again(site, tmp_path, capsys):
    log, url = tmp_path / "log", "127.0.0.1:%d" % site.port
    log.write_bytes(
        b"\0\0\0same\nsame\n\n \t\n" + "\u00e9\U0001f600\n".encode() + b"\xff\x00\x1b[0m\r\nlast"
    )
    for new, duplicate in ((5, 0), (0, 5)):
        assert client("publish", "--url", url, "--topic", "t", "--source", "nas", log) == 0
        assert f"5 sent, {new} new, {duplicate} duplicate" in capsys.readouterr().err
    assert messages(site.port) == ["same", "same", "\u00e9\U0001f600", "\\xff\x00\x1b[0m", "last"]
    assert {each["source"] for each in stored(site.port)} == {"nas"}
    with open(str(log), "ab") as file:
        file.write(b"\nmore\n")
    assert client("publish", "--url", url, "--topic", "t", "--source", "nas", log) == 0
    assert "1 new, 5 duplicate" in capsys.readouterr().err
    log.write_bytes(
        b"\0\0\0SAME\nsame\nsame\n"
    )  # another content at a known place is another event, never a conflict
    assert client("publish", "--url", url, "--topic", "t", "--source", "nas", log) == 0
    assert "2 new, 1 duplicate, 0 conflict" in capsys.readouterr().err


def test_a_place_is_remembered_and_belongs_to_its_file(site, tmp_path, capsys):
    log, place, url = tmp_path / "log", tmp_path / "place", "127.0.0.1:%d" % site.port
    log.write_text("one\ntwo\n")
    for sent in (2, 0):
        assert client("publish", "--url", url, "--topic", "t", "--state", place, log) == 0
        assert f"{sent} sent" in capsys.readouterr().err
    with open(str(log), "a") as file:
        file.write("three\n")
    assert client("publish", "--url", url, "--topic", "t", "--state", place, log) == 0
    assert (
        "1 sent, 1 new" in capsys.readouterr().err and os.listdir(str(tmp_path)).count("place") == 1
    )
    (tmp_path / "other").write_text("x\n")
    for other, text in (("other", place.read_text()), ("log", "{"), ("log", "[]"), ("log", "")):
        place.write_text(text)
        with pytest.raises(aggregator.ClientError, match="choose another --state"):
            client("publish", "--url", url, "--topic", "t", "--state", place, tmp_path / other)


@pytest.mark.parametrize(
    "members",
    [
        {"detail": [{"loc": ["body"]}]},
        {"errors": {"a": 1}},
        {"errors": None},
        {"errors": ["a"]},
        {"errors": [{"index": [], "field": 1, "message": 2}]},
    ],
)
@pytest.mark.parametrize("status", [400, 422])
def test_whatever_another_service_says_it_is_shown_and_no_crash(tmp_path, status, members):
    (tmp_path / "log").write_text("one\n")
    with Fake(lambda events: (status, members)) as fake:
        found = run("publish", "--url", fake.url, "--topic", "t", str(tmp_path / "log"))
    assert (
        found.returncode == 1 and f": {status} " in found.stderr and "Traceback" not in found.stderr
    )


def test_without_an_acknowledgement_the_place_stays(tmp_path):
    (tmp_path / "log").write_text("one\n")
    with Fake(lambda events: (503, {})) as fake, Child(
        tmp_path,
        "publish",
        "--url",
        fake.url,
        "--topic",
        "t",
        "--state",
        tmp_path / "place",
        tmp_path / "log",
    ) as child:
        until(lambda: len(fake.asked) > 1)
        assert child.end() == 143 and not (tmp_path / "place").exists()
        assert "waiting: " + fake.url in child.said() and "0 sent" in child.said()


def test_a_file_that_is_not_the_one_read_before_is_said_so_and_read_from_its_start(
    site, tmp_path, capsys
):
    log, place, url = tmp_path / "log", tmp_path / "place", "127.0.0.1:%d" % site.port
    for text, told in (("one\ntwo\n", False), ("three\nfour\nfive\n", True), ("six\n", True)):
        log.write_text(text)  # in place: the same inode
        assert client("publish", "--url", url, "--topic", "t", "--state", place, log) == 0
        assert ("gone or truncated" in capsys.readouterr().err) == told
    assert messages(site.port) == "one two three four five six".split()


@pytest.mark.parametrize(
    "arguments",
    [
        ("--ids", "given", "--topic", "t"),
        ("--ids", "random"),
        ("--ids", "offset", "--topic", "t"),
        ("--state", "s"),
        ("--follow",),
        ("--follow", "a", "b"),
        ("--state", "s", "a", "b"),
        ("--topic", "t", "--ids", "offset", "-"),
    ],
)
def test_what_does_not_go_together_is_said_so(arguments):
    with pytest.raises(aggregator.ClientError, match="--"):
        client("publish", *arguments)


def test_lines_from_a_pipe_are_sent_as_they_come(tmp_path):
    with Program(tmp_path / "pipe.db") as program, Child(
        tmp_path, "publish", "--url", "localhost:%d" % program.port, "--topic", "t"
    ) as child:
        for n in range(3):
            child.process.stdin.write(b"line %d\nhalf" % n)
            child.process.stdin.flush()
            until(lambda n=n: len(messages(program.port)) == n + 1)
        child.process.stdin.close()
        assert child.process.wait(10) == 0
        assert messages(program.port) == ["line 0", "halfline 1", "halfline 2", "half"]


def test_an_endless_line_is_cut_and_the_lines_after_it_are_whole(
    site, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(aggregator, "MAX_LINE_BYTES", 1000)
    text = "a" * 2500 + "\n" + "b" * 1000 + "\nshort\n" + "c" * 1001 + "\n" + "d" * 200_000
    (tmp_path / "log").write_text(text)
    assert (
        client("publish", "--url", "127.0.0.1:%d" % site.port, "--topic", "t", tmp_path / "log")
        == 0
    )
    found = messages(site.port)
    assert found[:7] == ["a" * 1000, "a" * 1000, "a" * 500, "b" * 1000, "short", "c" * 1000, "c"]
    assert found[7:] == ["d" * 1000] * 200
    monkeypatch.setattr(aggregator, "READ_BYTES", 77)  # other reads, the same pieces
    assert (
        client("publish", "--url", "127.0.0.1:%d" % site.port, "--topic", "t", tmp_path / "log")
        == 0
    )
    assert "0 new, 207 duplicate" in capsys.readouterr().err


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="no /proc here")
def test_an_endless_input_takes_no_more_memory_than_a_short_one(tmp_path):
    def slow(events):  # at first, so that there is time to read far ahead
        time.sleep(0.5 if len(fake.asked) == 1 else 0)
        return taken(events)

    with Fake(slow) as fake:
        code = (
            f"import re, sys\nsys.path.insert(0, {HERE!r})\nimport aggregator\n"
            f"aggregator.main(['publish', '--url', {fake.url!r}, '--topic', 't'])\n"
            "print(re.search('VmHWM:[^0-9]*([0-9]+)', open('/proc/self/status').read())[1])"
        )
        peaks = []
        for size in (1_000_000, 48_000_000):
            fake.asked.clear()
            found = subprocess.run(
                [sys.executable, "-c", code], input=b"x" * size, capture_output=True, timeout=30
            )
            peaks.append(int(found.stdout) * 1024)
    assert peaks[1] < peaks[0] + 16_000_000 < 80_000_000


def test_nothing_is_lost_when_the_service_is_killed_in_the_middle_and_started_again(tmp_path):
    log, db = tmp_path / "log", tmp_path / "kill.db"
    log.write_text("".join(f"line {n}\n" for n in range(20_000)))
    with Program(db) as program:
        port = program.port
        child = Child(tmp_path, "publish", "--url", "127.0.0.1:%d" % port, "--topic", "t", log)
        until(lambda: json.loads(fetch(port, "GET", "/stats").body)["unique_processed"] > 0)
        program.kill()
    with child, Program(db, "--port", str(port)) as program:
        assert (
            child.process.wait(20) == 0
            and "20,000 sent" in child.said()
            and "waiting" in child.said()
        )
        assert messages(port) == [f"line {n}" for n in range(20_000)]
        assert program.end() == 0
    assert_sound(db)


def append(path, text):
    with open(str(path), "a") as file:
        file.write(text)


def test_a_followed_file_loses_nothing_through_rotation_truncation_and_restarts(tmp_path):
    log, place = tmp_path / "app.log", tmp_path / "place"
    with Program(tmp_path / "follow.db") as program:

        def seen(*expected):
            until(lambda: len(messages(program.port)) >= len(expected))
            assert messages(program.port) == list(expected)

        follow = (
            "publish",
            "--url",
            "127.0.0.1:%d" % program.port,
            "--topic",
            "t",
            "--follow",
            "--state",
            place,
            log,
        )
        with Child(tmp_path, *follow) as child:  # before the file is there
            append(log, "1\nhalf")
            seen("1")
            append(log, " whole\n")
            seen("1", "half whole")
            os.rename(str(log), str(log) + ".1")
            append(log, "new\nold\n")
            time.sleep(2 * aggregator.FILE_POLL_S)
            append(str(log) + ".1", "late\n")  # its writer has not been told until now
            seen("1", "half whole", "late", "new", "old")
            os.truncate(str(log), 0)  # copytruncate
            append(log, "new\n")  # the same bytes at the same place, and another event
            seen("1", "half whole", "late", "new", "old", "new")
            until(lambda: json.loads(place.read_text())["place"][1] == 4)
            assert child.end(signal.SIGINT) == 130
        append(log, "while away\n")
        os.rename(str(log), str(log) + ".2")
        append(str(log) + ".2", "and more\n")
        append(log, "after\n")
        known = place.read_text()
        for end in ("", "end\n"):
            with Child(tmp_path, *follow) as child:
                append(log, end)
                seen(
                    "1",
                    "half whole",
                    "late",
                    "new",
                    "old",
                    "new",
                    "while away",
                    "and more",
                    "after",
                    *end.split(),
                )
                child.process.kill()
            place.write_text(
                known
            )  # as if it had been killed before the place was saved: the same lines, with the same ids


def test_a_followed_file_that_is_truncated_and_at_once_longer_than_before_is_read_from_its_start(
    tmp_path,
):
    log, found = tmp_path / "app.log", []
    log.write_text("one\n")
    lines = aggregator._lines_of(str(log), aggregator.Place(), True, 1, 1000)
    for _ in range(10):
        found += [piece for _, piece in next(lines)]
        if found == [b"one\n"]:
            log.write_text("two\nthree\nfour\n")  # the same inode
            found += [b"then"]
    assert found == [b"one\n", b"then", b"two\n", b"three\n", b"four\n"]


def test_a_token_is_shown_to_the_service_and_a_missing_one_is_named(tmp_path):
    (tmp_path / "log").write_text("one\n")
    with Program(tmp_path / "token.db", "--token", "s3cret") as program:
        arguments = (
            "publish",
            "--url",
            "127.0.0.1:%d" % program.port,
            "--topic",
            "t",
            str(tmp_path / "log"),
        )
        assert run(*arguments).returncode == 1 and "401" in run(*arguments).stderr
        assert (
            run(*arguments, "--token", "s3cret").returncode
            == run(*arguments, AUTH_TOKEN="s3cret").returncode
            == 0
        )
        found = run(
            "drill", "--url", "127.0.0.1:%d" % program.port, "--events", "50", AUTH_TOKEN="s3cret"
        )
        assert found.returncode == 0, found


def test_a_file_that_cannot_be_opened_is_named_in_plain_words(tmp_path):
    for path, number in ((tmp_path / "none", errno.ENOENT), (tmp_path, errno.EISDIR)):
        found = run("publish", "--url", "127.0.0.1:1", "--topic", "t", str(path))
        assert found.returncode == 1
        assert found.stderr.splitlines()[-1] == f"aggregator.py: {path}: {os.strerror(number)}"


def test_https_is_spoken_and_the_certificate_is_checked(tmp_path):
    (tmp_path / "both.pem").write_text(CERTIFICATE)
    with Program(tmp_path / "tls.db", "--tls-cert", str(tmp_path / "both.pem")) as program:
        url = "https://localhost:%d" % program.port
        found = run("health", "--url", url)
        assert found.returncode == 1 and "certificate verify failed" in found.stdout.lower()
        found = run("health", "--url", url, SSL_CERT_FILE=str(tmp_path / "both.pem"))
        assert (found.returncode, found.stdout) == (0, "ok\n")


def test_on_a_terminal_progress_is_one_line_that_moves(tmp_path):
    pty = pytest.importorskip("pty")
    (tmp_path / "log").write_text("one\n")
    answers_ = iter([(503, {})] * 3)
    with Fake(lambda events: next(answers_, taken(events))) as fake:
        master, slave = pty.openpty()
        process = subprocess.Popen(
            [
                sys.executable,
                PROGRAM,
                "publish",
                "--url",
                fake.url,
                "--topic",
                "t",
                str(tmp_path / "log"),
            ],
            stderr=slave,
            env=clean_environment(),
        )
        os.close(slave)
        text = b""
        with contextlib.suppress(OSError):
            for data in iter(lambda: os.read(master, 1000), b""):
                text += data
        os.close(master)
        assert process.wait(10) == 0
    assert (
        text.count(b"\r\x1b[K") >= 3
        and text.count(b"\n") == 1
        and b"waiting" in text
        and b"1 sent, 1 new" in text
    )


# Relay


def test_a_relay_passes_on_what_is_there_and_what_comes_in_order_and_unchanged(tmp_path):
    with Program(tmp_path / "edge.db") as edge, Program(tmp_path / "central.db") as central:
        events = [
            sample(
                str(n), topic=f"logs/{n % 3}", sequence=n, payload={"text": "\u00e9\0" * (n % 50)}
            )
            for n in range(1200)
        ]
        assert fetch(edge.port, "POST", "/publish", events[:1100]).status == 202
        fetch(edge.port, "POST", "/publish", [sample("no", topic="private")])
        fetch(central.port, "POST", "/publish", events[7:9])
        command = (
            "relay",
            "--from",
            "127.0.0.1:%d" % edge.port,
            "--to",
            "127.0.0.1:%d" % central.port,
            "--topic",
            "logs/*",
            "--state",
            tmp_path / "place",
        )

        def there(port):
            return [
                {name: each[name] for name in each if name not in ("seq", "processed_at")}
                for n in range(3)
                for each in stored(port, f"logs/{n}")
            ]

        with Child(tmp_path, *command) as child:
            until(lambda: len(there(central.port)) == 1100)
            fetch(edge.port, "POST", "/publish", events[1100:])
            until(lambda: len(there(central.port)) == 1200)
            assert child.end() == 143 and "1,198 new, 2 duplicate" in child.said()
        assert stored(central.port, "private") == []
        assert sorted(there(central.port), key=str) == sorted(there(edge.port), key=str)
        assert json.loads((tmp_path / "place").read_text())["place"] == [1201]


def test_a_relay_outlives_kills_of_either_side_with_nothing_lost_doubled_or_out_of_order(tmp_path):
    chance, kills, count = random.Random(7), int(os.environ.get("RELAY_KILLS", "2")), 0
    names = ("edge.db", "central.db")
    sides = [Program(tmp_path / name) for name in names]
    ports = [each.port for each in sides]
    try:
        with Child(
            tmp_path,
            "relay",
            "--from",
            "127.0.0.1:%d" % ports[0],
            "--to",
            "127.0.0.1:%d" % ports[1],
            "--state",
            tmp_path / "place",
        ) as child:
            for kill in range(kills):
                for _ in range(chance.randrange(5, 15)):
                    batch = [sample(f"{n}") for n in range(count, count + chance.randrange(1, 300))]
                    count += len(batch)
                    assert fetch(ports[0], "POST", "/publish", batch).status == 202
                side = (kill + 1) % 2
                sides[side].kill()
                if kill == 1:
                    child.process.kill()  # the relay too, once
                    child.process.wait(10)
                    child.__init__(tmp_path, *child.process.args[2:])
                sides[side] = Program(tmp_path / names[side], "--port", str(ports[side]))
            until(
                lambda: (
                    json.loads(fetch(ports[1], "GET", "/stats").body)["unique_processed"] >= count
                ),
                60,
            )
            assert child.end() == 143
        for port in ports:
            assert [each["event_id"] for each in stored(port)] == [str(n) for n in range(count)]
    finally:
        for each in sides:
            each.kill()


def test_a_relay_says_what_is_gone_sets_aside_what_is_refused_and_goes_on(tmp_path):
    def source(target):
        after = int(re.search("after=([0-9]+)", target)[1])
        if after < 9:
            return 410, {"type": "/docs#gone", "oldest_seq": 10}
        return 200, "\n" + "".join(
            json.dumps({**sample(str(n)), "seq": n}) + "\n\n" for n in range(after + 1, 20)
        )

    with Fake(source) as edge, Fake(refuse_thirteen) as central, Child(
        tmp_path, "relay", "--from", edge.url, "--to", central.url, "--state", tmp_path / "place"
    ) as child:
        until(lambda: central.asked and central.asked[-1][-1]["event_id"] == "19")
        until(
            lambda: (
                (tmp_path / "place").exists()
                and json.loads((tmp_path / "place").read_text())["place"] == [19]
            )
        )
        until(lambda: "after=19" in edge.asked[-1])
        assert (
            child.end() == 143
            and "GONE: 9 seqs, 1 to 9" in child.said()
            and "seq 13 refused" in child.said()
        )
        assert json.loads((tmp_path / "place.refused").read_text())["event_id"] == "13"
        passed = [
            int(each["event_id"])
            for asked in central.asked
            if refuse_thirteen(asked)[0] == 202
            for each in asked
        ]
        assert passed == [n for n in range(10, 20) if n != 13]


def test_a_relay_says_that_it_waits_only_while_it_does(tmp_path):
    breaks = iter([(200, "no chunk\n", {"Transfer-Encoding": "chunked"})])
    with Fake(
        lambda target: next(breaks, (200, json.dumps({**sample("1"), "seq": 1}) + "\n"))
    ) as edge, Fake(taken) as central, Child(
        tmp_path, "relay", "--from", edge.url, "--to", central.url
    ) as child:
        until(lambda: len(central.asked) > 2)
        assert child.end() == 143
        assert (
            "waiting: " + edge.url in child.said()
            and "waiting" not in child.said().splitlines()[-1]
        )


def test_a_relay_that_cannot_go_on_says_why(tmp_path):
    found = run("relay", "--from", "localhost:1")
    assert_refused(found, 1, "--to")
    with Fake(lambda target: (400, {"detail": "ahead of the log"})) as edge:
        found = run("relay", "--from", edge.url, "--to", edge.url)
        assert found.returncode == 1 and "ahead of the log" in found.stderr
    for text in ("<html>\n", "[]\n", "{}\n"):
        with Fake(lambda target, text=text: (200, text)) as edge:
            found = run("relay", "--from", edge.url, "--to", edge.url)
            assert found.returncode == 1 and "no events in NDJSON" in found.stderr


# Drill


def test_a_drill_kills_its_service_and_finds_everything_kept(tmp_path):
    found = run(
        "drill",
        "--events",
        "3000",
        "--batch",
        "20",
        "--kill9",
        "2",
        TMPDIR=str(tmp_path),
        PORT="1",
        RETENTION="1s",
    )
    assert found.returncode == 0, found
    for name, value in (
        ("acknowledged", "3,000"),
        ("stored", "3,000"),
        ("lost", "0"),
        ("stored twice", "0"),
        ("stored otherwise", "0"),
    ):
        assert re.search(f"^{name} +{value}$", found.stdout, re.M)
    assert "(99 %)" in found.stdout and "events/s" in found.stdout and found.stdout.count("\n") > 12
    assert (
        int(re.search("([0-9,]+) duplicate", found.stderr)[1].replace(",", "")) > 900
        and os.listdir(str(tmp_path)) == []
    )


class Leaky:
    """A service that acknowledges everything, stores by the rules, and is asked to break one of them."""

    def __init__(self, sin):
        self.rows, self.sin = {}, sin

    def __call__(self, asked):
        if isinstance(asked, str):
            topic = asked.partition("topic=")[2]
            rows = [row for row in self.rows.values() if row["topic"] == topic]
            if self.sin == "twice" and rows:
                rows.append(rows[0])
            return 200, "".join(
                json.dumps(row) + "\n" for row in (rows[1:] if self.sin == "lost" else rows)
            )
        for event in asked:
            if self.sin == "otherwise" and event["payload"]["n"] == 5:
                event["payload"]["text"] = "other"
            self.rows.setdefault((event["topic"], event["event_id"]), event)
        return taken(asked)


@pytest.mark.parametrize(
    "sin, table",
    [
        ("none", {"lost": "0", "stored twice": "0", "stored otherwise": "0"}),
        ("lost", {"lost": "7", "stored": "93"}),
        ("twice", {"stored twice": "7", "lost": "0"}),
        ("otherwise", {"stored otherwise": "1", "lost": "1"}),
    ],
)
def test_a_drill_fails_when_something_is_lost_or_stored_twice_or_otherwise(sin, table, capsys):
    with Fake(Leaky(sin)) as fake:
        assert client("drill", "--url", fake.url, "--events", 100, "--batch", 7) == (
            0 if sin == "none" else 1
        )
    out = capsys.readouterr().out
    for name, value in table.items():
        assert re.search(f"^{name} +{value}$", out, re.M), out


def test_a_drill_that_cannot_go_on_says_why(tmp_path):
    assert_refused(run("drill", "--kill9", "1", "--url", "localhost:1"), 1, "leave out --url")
    with Fake(lambda asked: (401, {"detail": "no token"})) as fake:
        found = run("drill", "--url", fake.url, "--events", "10")
        assert found.returncode == 1 and "no token" in found.stderr and found.stdout == ""


# Health


def test_health_is_an_exit_status_and_a_reason(site, monkeypatch, capsys):
    monkeypatch.setattr(aggregator, "HEALTH_TIMEOUT_S", 0.2)
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as silent:
        for url, status, reason in (
            ("127.0.0.1:%d" % site.port, 0, "ok\n"),
            ("127.0.0.1:1", 1, "refused"),
            ("127.0.0.1:%d" % silent.getsockname()[1], 1, "timed out"),
        ):
            began = time.monotonic()
            assert client("health", "--url", url) == status and time.monotonic() - began < 2
            assert reason in capsys.readouterr().out
    for answer, reason in (
        ((503, {"detail": "disk full"}), "503 disk full"),
        ((200, "<html>"), "200 OK"),
    ):
        with Fake(lambda target, answer=answer: answer) as fake:
            assert client("health", "--url", fake.url) == 1 and reason in capsys.readouterr().out
            assert fake.asked == ["/health"]


# ======================================================================================================================
# The whole program, as a process
# ======================================================================================================================


class Program:
    """`aggregator.py` on a free port. Its log goes to a file beside the store."""

    def __init__(self, db, *flags, command=None, env=None):
        self.db, self.log = str(db), str(db) + ".log"
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                (command or [sys.executable, PROGRAM])
                + ["--port", "0", "--db", self.db]
                + list(flags),
                stderr=log,
                env=clean_environment(**(env or {})),
            )
        found, deadline = None, time.monotonic() + 20
        while found is None and self.process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
            found = re.search(r"LISTENING - https?://127\.0\.0\.1:([0-9]+).*\n", self.read_log())
        if found is None:
            self.kill()
            raise AssertionError(self.read_log())
        self.start_up, self.port = found[0], int(found[1])

    def read_log(self):
        with open(self.log, encoding="utf-8") as log:
            return log.read()

    def kill(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)

    def end(self, number=signal.SIGTERM):
        """Signal, and the exit status."""
        self.process.send_signal(number)
        return self.process.wait(10)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()


def clean_environment(**more):
    names = {setting.variable for setting in aggregator.SETTINGS} | {
        "NOTIFY_SOCKET",
        "WATCHDOG_USEC",
        "JOURNAL_STREAM",
    }
    return {**{name: value for name, value in os.environ.items() if name not in names}, **more}


def run(*arguments, program=(sys.executable, PROGRAM), **env):
    return subprocess.run(
        list(program) + list(arguments),
        check=False,
        capture_output=True,
        timeout=20,
        text=True,
        env=clean_environment(**env),
    )


def assert_refused(found, status, message):
    """One clear line, and no other output."""
    assert found.returncode == status and found.stdout == "" and found.stderr.count("\n") == 1, (
        found
    )
    assert found.stderr.startswith("aggregator.py: ") and message in found.stderr


def assert_sound(db):
    found = run("check", "--db", str(db))
    assert found.returncode == 0 and found.stderr == "", found
    assert (
        all(line.startswith("ok ") for line in found.stdout.splitlines())
        and len(found.stdout.splitlines()) > 10
    )


def stored_ids(db):
    connection = sqlite3.connect(str(db))
    try:
        return [row[0] for row in connection.execute("SELECT event_id FROM processed_events")]
    finally:
        connection.close()


class Publisher(threading.Thread):
    """Sends batches over one connection after the other until told to end; remembers what was acknowledged, and retries
    what was not."""

    def __init__(self, number, target="/publish"):
        self.number, self.target, self.random = number, target, random.Random(number)
        self.sent, self.pending, self.acknowledged = 0, [], set()

    def begin(self, port):
        super().__init__(daemon=True)
        self.port, self.over = port, False
        self.start()

    def run(self):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=15)
        try:
            while self.pending or not self.over:
                if not self.pending:
                    count = self.random.choice((1, 1, 5, 40))
                    self.pending = [
                        f"{self.number}-{n}" for n in range(self.sent, self.sent + count)
                    ]
                    self.sent += count
                connection.request(
                    "POST", self.target, json.dumps([sample(event_id) for event_id in self.pending])
                )
                response = connection.getresponse()
                response.read()
                if response.status == 202:
                    self.acknowledged.update(self.pending)
                    self.pending = []
                elif response.status != 503:
                    raise AssertionError(response.status)
        except (OSError, http.client.HTTPException):
            pass  # the service is gone: `pending` is what to retry
        finally:
            connection.close()


def test_after_kill_9_nothing_acknowledged_is_lost_and_nothing_is_there_twice(tmp_path):
    publishers, db, chance = (
        [Publisher(n) for n in range(8)],
        tmp_path / "kill.db",
        random.Random(5),
    )
    rounds, retried = int(os.environ.get("KILL_ROUNDS", "5")), 0
    for round_ in range(rounds + 1):
        with Program(db) as program:
            for each in publishers:
                each.begin(program.port)
            time.sleep(chance.uniform(0.2, 0.7))
            if round_ < rounds:
                program.kill()
            for each in publishers:
                each.over = True
            for each in publishers:
                each.join(20)
                assert not each.is_alive()
            if round_ < rounds:
                retried += sum(len(each.pending) for each in publishers)
                continue
            stats = json.loads(fetch(program.port, "GET", "/stats").body)
            listed = [
                json.loads(line)["event_id"]
                for line in fetch(
                    program.port, "GET", "/events", headers={"Accept": "application/x-ndjson"}
                ).body.splitlines()
            ]
            assert program.end() == 0
    acknowledged = set().union(*[each.acknowledged for each in publishers])
    assert retried > 0 and sum(each.sent for each in publishers) == len(acknowledged) > 100
    assert len(listed) == len(set(listed)) and set(listed) == acknowledged == set(stored_ids(db))
    assert stats["unique_processed"] == len(acknowledged) and stats["duplicate_dropped"] <= retried
    assert (
        stats["received"] == stats["unique_processed"] + stats["duplicate_dropped"]
        and stats["conflicts"] == 0
    )
    assert_sound(db)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_under_load_ends_the_program_with_everything_acknowledged_on_disk(
    tmp_path, number
):
    publishers = [Publisher(n, "/publish?wait=0" if n % 2 else "/publish") for n in range(8)]
    with Program(tmp_path / "term.db") as program:
        for each in publishers:
            each.begin(program.port)
        time.sleep(0.7)
        began = time.monotonic()
        assert program.end(number) == 0 and time.monotonic() - began < 10
        for each in publishers:
            each.over = True
            each.join(20)
        assert "Traceback" not in program.read_log() and "STOPPED" in program.read_log()
    acknowledged = set().union(*[each.acknowledged for each in publishers])
    stored = stored_ids(program.db)
    assert all(each.acknowledged for each in publishers)
    assert acknowledged <= set(stored) and len(stored) == len(set(stored))
    assert_sound(program.db)


def test_a_second_signal_ends_the_program_at_once(tmp_path):
    unfinished = http_request("POST", "/publish", b"", "Content-Length: 9") + b"{"
    with Program(tmp_path / "twice.db") as program, contextlib.closing(
        dial(program.port, unfinished)
    ):
        time.sleep(0.2)
        program.process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert program.process.poll() is None  # it waits for the request under way
        began = time.monotonic()
        assert program.end() not in (0, None) and time.monotonic() - began < 1
    assert_sound(program.db)


def test_an_idle_connection_does_not_delay_the_end(tmp_path):
    with Program(tmp_path / "idle.db") as program, contextlib.closing(
        dial(program.port)
    ), contextlib.closing(dial(program.port, HEALTH)) as kept:
        assert kept.recv(5) == b"HTTP/"
        began = time.monotonic()
        assert program.end() == 0 and time.monotonic() - began < 1.5


def test_the_start_up_line_names_address_file_and_versions_and_so_does_version(tmp_path):
    with Program(
        tmp_path / "named.db", env={"DB_PATH": "/ignored", "QUEUE_MAX_SIZE": "77"}
    ) as program:
        for part in (
            f"http://127.0.0.1:{program.port}",
            os.path.realpath(program.db),
            aggregator.versions(),
        ):
            assert part in program.start_up
        assert (
            json.loads(fetch(program.port, "GET", "/stats").body)["limits"]["queue_max_size"] == 77
        )
    found = run("--version")
    assert (found.returncode, found.stdout.strip()) == (0, aggregator.versions())
    assert aggregator.__version__ in found.stdout and sqlite3.sqlite_version in found.stdout


def test_a_second_process_on_the_same_file_or_port_is_refused_and_the_first_goes_on(tmp_path):
    with Program(tmp_path / "one.db") as program:
        fetch(program.port, "POST", "/publish", sample())
        for command in ("serve", "check"):
            flags = ("--port", "0") if command == "serve" else ()
            found = run(command, "--db", program.db, *flags)
            assert_refused(found, 1, "another running aggregator")
        other = str(tmp_path / "other.db")
        found = run("--db", other, "--port", str(program.port))
        assert_refused(found, 1, str(program.port))
        assert (
            found.stderr
            == "aggregator.py: 127.0.0.1:{}: {}; stop what listens there, or choose another --port\n".format(
                program.port, os.strerror(errno.EADDRINUSE)
            )
            and not os.path.exists(other)
        )
        assert json.loads(fetch(program.port, "GET", "/stats").body)["received"] == 1
        program.kill()
    with Program(tmp_path / "one.db") as program:  # the lock of a killed process does not stay
        assert json.loads(fetch(program.port, "POST", "/publish", sample()).body)["duplicates"] == 1


@pytest.mark.parametrize(
    "flags, env, named",
    [
        (["--port", "70000"], {}, "--port"),
        (["--port", "-1"], {}, "--port"),
        (["--port", "abc"], {}, "--port"),
        (["--port", "\u0663"], {}, "--port"),
        (["--sync", "maybe"], {}, "--sync"),
        (["--retention", "soon"], {}, "--retention"),
        (["--db", ""], {}, "--db"),
        ([], {"PORT": "70000"}, "PORT"),
        ([], {"SYNC": "maybe"}, "SYNC"),
        ([], {"QUEUE_MAX_SIZE": "0"}, "SIZE"),
        (["--retention", "9" * 5000], {}, "--retention"),
        (["--log-level", "loud"], {}, "--log-level"),
    ],
)
def test_a_bad_setting_is_one_clear_line(tmp_path, flags, env, named):
    found = run("--db", str(tmp_path / "never.db"), *flags, **env)
    assert_refused(found, 2, named)
    assert os.listdir(str(tmp_path)) == []


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--prot", "1"], "--prot"),
        (["--por", "1"], "--por"),
        (["--port"], "--port"),
        (["chekc"], "chekc"),
    ],
)
def test_an_unknown_flag_is_one_clear_line(tmp_path, flags, named):
    found = run("--db", str(tmp_path / "never.db"), *flags)
    assert_refused(found, 2, named)


def make_foreign(path, statement):
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE theirs(x)")
        connection.execute(statement)
        connection.commit()


def make_garbage(path, data):
    with open(path, "wb") as file:
        file.write(data)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda path: make_garbage(path, b"Dear diary,\n" * 1000), "not an SQLite database"),
        (lambda path: make_garbage(path, b"SQLite format 3\0"), "not an SQLite database"),
        (lambda path: make_foreign(path, "PRAGMA user_version=1"), "not an aggregator's"),
        (
            lambda path: (
                aggregator.Store(path).close(),
                make_foreign(path, "PRAGMA user_version=99"),
            ),
            "schema version 99",
        ),
        (lambda path: (aggregator.Store(path).close(), os.truncate(path, 9000)), "damaged"),
    ],
)
@pytest.mark.parametrize("command", ["serve", "check"])
def test_a_file_that_cannot_be_a_store_is_refused_and_left_as_it_is(
    tmp_path, make, message, command
):
    path = str(tmp_path / "file")
    make(path)
    with open(path, "rb") as file:
        before = file.read()
    found = run(command, "--db", path, *(("--port", "0") if command == "serve" else ()))
    assert found.returncode == 1 and "Traceback" not in found.stderr
    if message != "damaged" or command == "serve":
        assert_refused(found, 1, message)
    with open(path, "rb") as file:
        assert file.read() == before


@pytest.mark.parametrize(
    "path, message",
    [("", "is a folder"), ("missing/x.db", "does not exist"), ("closed/x.db", "read-only")],
)
def test_a_place_that_cannot_hold_a_store_is_refused(tmp_path, path, message):
    if path.startswith("closed"):
        if os.geteuid() == 0:
            pytest.skip("nothing is read-only for root")
        (tmp_path / "closed").mkdir(0o500)
    found = run("--db", str(tmp_path / path), "--port", "0")
    assert_refused(found, 1, message)
    assert set(os.listdir(str(tmp_path))) <= {"closed"}


@pytest.mark.parametrize(
    "damage",
    [
        "DELETE FROM processed_events WHERE seq = 55",
        "UPDATE processed_events SET payload = '{}' WHERE seq = 50",
        "UPDATE processed_events SET source = 'x' WHERE seq = 50",
        "UPDATE processed_events SET payload = 'x' WHERE seq = 50",
        "DELETE FROM seen WHERE seq = (SELECT min(seq) FROM seen WHERE seq IN (SELECT seq FROM processed_events))",
        "UPDATE seen SET seq = seq + 1000",
        "DELETE FROM progress WHERE part = 'A0'",
        "UPDATE progress SET through = 9999",
        "UPDATE stats SET duplicates = duplicates + 1 WHERE kind = 'topic'",
        "DELETE FROM stats WHERE kind = 'delay'",
        "UPDATE stats SET uniques = uniques - 1",
        "DELETE FROM listing WHERE seq = 60",
        "UPDATE listing SET seq = seq + 9999",
    ],
)
def test_check_finds_planted_damage(tmp_path, monkeypatch, damage):
    for name, value in (
        ("RECENT_IDS", 8),
        ("LIST_ROWS", 16),
    ):  # so that merging and listing have happened
        monkeypatch.setattr(aggregator, name, value)
    path = str(tmp_path / "damaged.db")
    store = aggregator.Store(path, max_per_topic=90)
    for n in range(300):  # 100 events, three times each: one slice is merged by each commit
        store.commit(
            [aggregator.record(event) for event in aggregator.read_events([sample(str(n % 100))])],
            NOW + n,
        )
    store.close()
    assert_sound(path)
    with contextlib.closing(sqlite3.connect(path)) as connection:
        assert connection.execute(damage).rowcount > 0
        connection.commit()
    found = run("check", "--db", path)
    assert found.returncode == 1 and "BAD" in found.stdout and "NOT" in found.stdout


def test_an_old_python_is_told_so():
    pythons = sorted(glob.glob(os.path.expanduser("~/.pyenv/versions/3.[67].*/bin/python")))
    if not pythons:
        pytest.skip("no Python before 3.8 here")
    for python in pythons:
        found = run(program=(python, PROGRAM))
        assert_refused(found, 2, "3.8 or newer is needed")


SPLIT_PACKAGES = (
    "pathlib",
    "urllib",
    "urllib.parse",
    "urllib.request",
    "email",
    "uuid",
    "http",
    "http.client",
    "http.server",
    "ctypes",
    "decimal",
    "multiprocessing",
    "unittest",
    "xml",
    "lzma",
    "bz2",
    "dbm",
    "ssl",
)


def test_serving_needs_none_of_the_modules_that_openwrt_packs_separately(tmp_path):
    code = (
        f"import sys\nfor name in {SPLIT_PACKAGES!r}: sys.modules[name] = None\n"
        f"sys.path.insert(0, {os.path.dirname(PROGRAM)!r})\nimport aggregator\nsys.exit(aggregator.main())"
    )
    with Program(tmp_path / "small.db", command=[sys.executable, "-c", code]) as program:
        for duplicates in (0, 1):
            assert (
                json.loads(fetch(program.port, "POST", "/publish", sample()).body)["duplicates"]
                == duplicates
            )
        assert json.loads(fetch(program.port, "GET", "/events").body)["count"] == 1
        assert program.end() == 0


def test_a_disordered_replay_with_repeats_and_mixed_offsets_is_stored_once_in_order(tmp_path):
    chance, events, deliveries = random.Random(2026), [], []
    for n in range(700):
        instant_us = NOW + chance.randrange(3600 * 10**6) // 1000 * 1000
        offset = chance.choice((0, 60, 120, 330, -300, -570))
        text = aggregator.format_timestamp(instant_us + offset * 60_000_000)[:-1]
        text += f"{'-' if offset < 0 else '+'}{abs(offset) // 60:02d}:{abs(offset) % 60:02d}"
        events.append(
            (
                instant_us,
                sample(f"e{n:04d}", timestamp=text, topic=f"topic/{n % 7}", payload={"n": n}),
            )
        )
        deliveries += [(n + chance.uniform(0, 150), n)] * chance.choice((1, 1, 1, 2, 3))
    order = [n for _, n in sorted(deliveries, key=lambda each: each[0] + chance.random())]
    with Program(tmp_path / "replay.db", "--log-level", "info") as program:
        told = 0
        while order:
            batch, order = order[:37], order[37:]
            answer = json.loads(
                fetch(program.port, "POST", "/publish", [events[n][1] for n in batch]).body
            )
            assert answer["unique"] + answer["duplicates"] == answer["accepted"] == len(batch)
            told += answer["unique"]
        stats = json.loads(fetch(program.port, "GET", "/stats").body)
        rows = [
            json.loads(line)
            for line in fetch(
                program.port, "GET", "/events", headers={"Accept": "application/x-ndjson"}
            ).body.splitlines()
        ]
        assert program.end() == 0
    assert (
        told == stats["unique_processed"] == 700
        and stats["duplicate_dropped"] == len(deliveries) - 700 > 0
    )
    assert (
        stats["received"] == len(deliveries)
        and stats["current_queue_size"] == stats["conflicts"] == 0
    )
    assert {name: each["unique"] for name, each in stats["topics"].items()} == {
        f"topic/{n}": 100 for n in range(7)
    }
    assert [row["timestamp"] for row in rows] == sorted(
        aggregator.format_timestamp(instant) for instant, _ in events
    )
    assert {(row["event_id"], row["payload"]["n"]) for row in rows} == {
        (f"e{n:04d}", n) for n in range(700)
    }
    assert_sound(program.db)


CERTIFICATE = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgzKYGczbK85YGBHxc
nXn1z0OkmWpIrSVVoxuXlNEZ9SGhRANCAARey/GveSR9RhVdNS6B3aF9WKYsE3eS
pgxZo8H0UW9FWJo1IVEqyY5IxN3NOBszePJbAsm9Vw+UtBiTleeyyIdR
-----END PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBmjCCAUGgAwIBAgIUKVITFsByyLPM4s43NuL5rUx37Z8wCgYIKoZIzj0EAwIw
FDESMBAGA1UEAwwJbG9jYWxob3N0MCAXDTI2MTEyMzA4Mjk0MFoYDzIxMjYxMDMw
MDgyOTQwWjAUMRIwEAYDVQQDDAlsb2NhbGhvc3QwWTATBgcqhkjOPQIBBggqhkjO
PQMBBwNCAARey/GveSR9RhVdNS6B3aF9WKYsE3eSpgxZo8H0UW9FWJo1IVEqyY5I
xN3NOBszePJbAsm9Vw+UtBiTleeyyIdRo28wbTAdBgNVHQ4EFgQUlHGG4bkkJT1y
Xxqodo2/f7wdYawwHwYDVR0jBBgwFoAUlHGG4bkkJT1yXxqodo2/f7wdYawwDwYD
VR0TAQH/BAUwAwEB/zAaBgNVHREEEzARgglsb2NhbGhvc3SHBH8AAAEwCgYIKoZI
zj0EAwIDRwAwRAIgOg8EAQOBtsM1UXiDd5FkAAM+ji5/B1lWlTwr06vkQ9kCIAeM
6YLtc29nnf3eofwhKCR5T2ynEsRFMo7OaJsPEZ30
-----END CERTIFICATE-----
"""  # of localhost, for these tests only


def test_https_is_spoken_with_a_certificate_and_a_bad_one_is_refused(tmp_path):
    certificate = tmp_path / "both.pem"
    certificate.write_text(CERTIFICATE)
    import ssl

    context = ssl.create_default_context(cafile=str(certificate))
    context.check_hostname = False
    with Program(tmp_path / "store.db", "--tls-cert", str(certificate)) as program:
        connection = http.client.HTTPSConnection(
            "127.0.0.1", program.port, timeout=10, context=context
        )
        connection.request("POST", "/publish", json.dumps(sample("1")))
        assert connection.getresponse().status == 202
        connection.close()
        plain = dial(program.port, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b"200 OK" not in read_all(plain)
        assert program.end() == 0
    (tmp_path / "bad.pem").write_text("nothing")
    assert_refused(
        run("--tls-cert", str(tmp_path / "bad.pem"), "--db", str(tmp_path / "b.db")),
        1,
        "cannot load --tls-cert",
    )


def test_over_tls_a_list_of_many_pieces_ends_and_a_live_tail_goes_on(tmp_path):
    certificate = tmp_path / "both.pem"
    certificate.write_text(CERTIFICATE)
    import ssl

    context = ssl.create_default_context(cafile=str(certificate))
    with Program(tmp_path / "store.db", "--tls-cert", str(certificate)) as program:

        def ask(method, target, body=None):
            connection = http.client.HTTPSConnection(
                "localhost", program.port, timeout=10, context=context
            )
            connection.request(method, target, body, {"Accept": "application/x-ndjson"})
            return connection.getresponse()

        tail = ask("GET", "/events?follow=1&after=0")
        for number in range(6):
            assert (
                ask(
                    "POST", "/publish", json.dumps([sample(f"{number}-{n}") for n in range(700)])
                ).status
                == 202
            )
            assert json.loads(tail.readline())["event_id"] == f"{number}-0"
            assert [json.loads(tail.readline())["event_id"] for _ in range(699)][
                -1
            ] == f"{number}-699"
        assert len(ask("GET", "/events").read().splitlines()) == 4200


def test_what_everyone_can_reach_without_a_token_is_warned_about(tmp_path):
    for flags, warned in (
        (("--host", "0.0.0.0"), True),
        (("--host", "0.0.0.0", "--token", "s3cret"), False),
        ((), False),
    ):
        process = subprocess.Popen(
            [sys.executable, PROGRAM, "--port", "0", "--db", str(tmp_path / "s.db"), *flags],
            stderr=subprocess.PIPE,
            text=True,
            env=clean_environment(),
        )
        lines = []
        while not any("LISTENING" in line for line in lines):
            lines.append(process.stderr.readline())
            assert lines[-1]
        process.terminate()
        rest = process.communicate(timeout=10)[1]
        assert ("OPEN - 0.0.0.0:" in "".join(lines)) == warned and "s3cret" not in "".join(
            lines
        ) + rest


@pytest.mark.parametrize(
    "flags, env, message",
    [
        (["--token", ""], {}, "--token must be 1 to 512"),
        (["--read-token", "r"], {}, "--read-token needs --token"),
        (["--tls-key", "k"], {}, "--tls-key needs --tls-cert"),
        ([], {"AUTH_TOKEN": "a b"}, "AUTH_TOKEN must be 1 to 512"),
        (["--allow-origin", "a.example"], {}, "origins such as https://example.org"),
    ],
)
def test_access_settings_that_cannot_be_meant_are_refused_and_no_secret_is_shown(
    flags, env, message
):
    found = run(*flags, **env)
    assert_refused(found, 2, message)
    assert "a b" not in found.stderr


def test_an_unknown_host_is_refused_on_loopback_and_taken_where_allowed(tmp_path):
    for flags, status in (((), 421), (("--allow-host", "nas.lan other"), 200)):
        with Program(tmp_path / "store.db", *flags) as program:
            assert (
                fetch(program.port, "GET", "/stats", headers={"Host": "nas.lan:80"}).status
                == status
            )
            assert (
                fetch(program.port, "GET", "/stats", headers={"Host": "localhost:80"}).status == 200
            )


def test_a_service_manager_is_told_of_readiness_liveness_and_stopping(tmp_path):
    for address in (str(tmp_path / "notify"), "@aggregator-{}".format(os.getpid())):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            manager.bind("\0" + address[1:] if address[0] == "@" else address)
            manager.settimeout(10)
            with Program(
                tmp_path / "s.db", env={"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "100000"}
            ) as program:
                told = [manager.recv(100) for _ in range(4)]
                assert program.end() == 0
            manager.settimeout(0.2)
            with contextlib.suppress(socket.timeout):
                while True:
                    told.append(manager.recv(100))
        assert (
            told[:4] == [b"READY=1"] + [b"WATCHDOG=1"] * 3
            and told.count(b"STOPPING=1") == 1
            and told.count(b"READY=1") == 1
        )


def test_compiled_once_it_runs_as_a_module(tmp_path):
    folder = tmp_path / "app"
    folder.mkdir()
    shutil.copy(PROGRAM, str(folder / "aggregator.py"))
    subprocess.run(
        [
            sys.executable,
            "-m",
            "compileall",
            "-q",
            "--invalidation-mode",
            "unchecked-hash",
            "aggregator.py",
        ],
        check=True,
        cwd=str(folder),
        timeout=60,
    )
    (folder / "aggregator.py").write_text("raise SystemExit('the source was read')")
    script = (
        "import os, sys; os.chdir(sys.argv[1]);"
        " os.execv(sys.executable, [sys.executable, '-m', 'aggregator'] + sys.argv[2:])"
    )
    with Program(tmp_path / "s.db", command=[sys.executable, "-c", script, str(folder)]) as program:
        assert fetch(program.port, "POST", "/publish", sample("1")).json["unique"] == 1
        assert program.end() == 0


def test_openssl_is_loaded_for_tls_only():
    for flags, loaded in ((), False), (("--tls-cert", "x"), True):
        found = run(
            "--version", *flags, program=(sys.executable, "-S", "-X", "importtime", PROGRAM)
        )
        assert found.returncode == 0 and "aggregator" in found.stdout
        times = re.findall(
            r"^import time: +([0-9]+) \| +[0-9]+ \| +(?:_?ssl|_hashlib)$", found.stderr, re.M
        )
        assert times and (max(map(int, times)) > 200) == loaded  # microseconds: a refusal takes few


def test_a_python_that_has_no_hashes_but_those_of_openssl_will_do():
    pytest.importorskip("_hashlib")
    gone = ["_md5", "_sha1", "_sha2", "_sha256", "_sha512"] + ["_sha3"] * (
        sys.version_info >= (3, 9)
    )  # 3.8 has no other
    code = (
        f"import runpy, sys; sys.modules.update(dict.fromkeys({gone}));"
        f" sys.argv[1:] = ['--version']; runpy.run_path({PROGRAM!r}, run_name='__main__')"
    )
    found = run("-c", code, program=(sys.executable,))
    assert (found.returncode, found.stderr) == (0, "") and "aggregator" in found.stdout


def test_under_journald_log_lines_leave_the_time_to_it(tmp_path):
    script = (
        "import os, sys; found = os.fstat(2); os.environ['JOURNAL_STREAM'] = '%d:%d' % (found.st_dev, found.st_ino);"
        " os.execv(sys.executable, [sys.executable] + sys.argv[1:])"
    )
    with Program(tmp_path / "a.db", command=[sys.executable, "-c", script, PROGRAM]) as program:
        assert program.start_up.startswith("LISTENING") and program.read_log().startswith(
            "INFO LISTENING"
        )
    with Program(tmp_path / "b.db", env={"JOURNAL_STREAM": "1:1"}) as program:
        assert re.match(r"[0-9]{4}-[0-9]{2}-[0-9]{2} ", program.read_log())


# ======================================================================================================================
# Exercises of the README: red until they are done. Run with -o python_functions='exercise_*'
# ======================================================================================================================


def exercise_1_the_list_can_be_filtered_by_a_least_sequence(desk):
    desk.publish(*[sample(str(n), sequence=n) for n in (1, 5, 3, 8)], sample("none"))
    assert desk.listed("?min_sequence=4") == ["5", "8"] and desk.listed("?min_sequence=0") == [
        "1",
        "5",
        "3",
        "8",
    ]
    assert desk.ask("GET", "/events?min_sequence=x").status == 400


def exercise_2_a_bloom_filter_never_denies_what_was_added_and_seldom_affirms_what_was_not():
    tracemalloc.start()
    try:
        bloom = aggregator.Bloom(100_000)  # for so many keys
        taken = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    keys = [aggregator.identity("t", str(n)) for n in range(200_000)]
    for key in keys[:100_000]:
        bloom.add(key)
    assert taken <= 130_000 and all(key in bloom for key in keys[:100_000])
    assert sum(key in bloom for key in keys[100_000:]) <= 1500


def exercise_3_a_new_id_is_seldom_looked_up_among_the_tombstones(tmp_path, small_index):
    path, asked = str(tmp_path / "s.db"), []
    with contextlib.closing(aggregator.Store(path)) as opened:
        opened.commit([event(n) for n in range(1000)], NOW)
    with contextlib.closing(aggregator.Store(path)) as opened:
        opened._db.set_trace_callback(
            lambda text: asked.append(text) if re.search(r"\bseen\b", text) else None
        )
        for n in range(1000, 1200):
            opened._decide([event(n)], NOW)
        assert len(asked) <= 10
        assert [len(opened.commit([event(n)], NOW).repeats) for n in (0, 500, 999, 2000)] == [
            1,
            1,
            1,
            0,
        ]
    assert sound(path) == []


def test_a_flood_of_warnings_is_logged_as_some_lines_and_a_number():
    now, written, handler = [0.0], [], logging.Handler()
    handler.emit = lambda record: written.append(record.getMessage())
    handler.addFilter(aggregator.log_limit(lambda: now[0]))
    aggregator.log.addHandler(handler)
    aggregator.log.setLevel(logging.INFO)
    try:
        for _ in range(1_234):
            aggregator.log.warning("CONFLICT - topic: %s", "t")
            aggregator.log.info("EVENT PROCESSED - topic: %s", "t")
        assert written.count("EVENT PROCESSED - topic: t") == 1_234
        assert [each for each in written if "CONFLICT" in each] == [
            "CONFLICT - topic: t"
        ] * aggregator.LOG_LINES
        now[0] += aggregator.LOG_PERIOD_S
        aggregator.log.error("COMMIT FAILED - %s", "why")
        assert written[-2:] == [
            f"… and {1_234 - aggregator.LOG_LINES:,} more like it: CONFLICT",
            "COMMIT FAILED - why",
        ]
    finally:
        aggregator.log.removeHandler(handler)
        aggregator.log.setLevel(logging.NOTSET)


def memory_mb(pid, what="VmHWM"):
    with open(f"/proc/{pid}/status") as file:
        return int(re.search(what + r":\s+([0-9]+) kB", file.read())[1]) / 1024


def descriptors(pid):
    return len(os.listdir(f"/proc/{pid}/fd"))


@contextlib.contextmanager
def many_descriptors(count):
    """Lets this process open `count` files, or skips the test."""
    import resource

    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= limits[1] < count:
        pytest.skip(f"no process here may open {count} files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(count, limits[0]), limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@needs_linux
def test_500_slow_clients_do_not_slow_a_publisher(tmp_path):
    body = http_request("POST", "/publish", b"", "Content-Length: 3999999") + b" " * 2000
    ask = http_request("GET", "/events", b"", "Accept: application/x-ndjson")
    with many_descriptors(600), Program(tmp_path / "slow.db") as program:
        fetch(
            program.port,
            "POST",
            "/publish",
            [sample(f"{n}", payload={"x": "y" * 20_000}) for n in range(150)],
        )
        connection = http.client.HTTPConnection("127.0.0.1", program.port, timeout=10)
        socks, figures = [], []
        try:
            for start, trickle in (
                (b"GET / HT", b"x"),
                (body, b" "),
                (b"", b""),
                (ask * 20, ask),
                (HEALTH * 50, HEALTH),
            ):
                socks += [
                    (dial(program.port, start, receive_bytes=4096), trickle) for _ in range(100)
                ]
            for round_ in range(3):
                taken = []
                for n in range(150):
                    for sock, trickle in socks[n % 50 :: 50]:
                        with contextlib.suppress(OSError):
                            sock.send(trickle)
                    began = time.monotonic()
                    connection.request("POST", "/publish", json.dumps(sample(f"{round_}-{n}")))
                    response = connection.getresponse()
                    assert response.status == 202 and response.read()
                    taken.append(time.monotonic() - began)
                figures.append(sorted(taken)[len(taken) * 99 // 100] * 1000)
                if figures[-1] < 50:
                    break  # else the machine may have been busy with something else
            print(
                "p99 of a publish beside 500 slow clients: {:.1f} ms; memory at most {:.0f} MB".format(
                    min(figures), memory_mb(program.process.pid)
                )
            )
            assert min(figures) < 50
        finally:
            for sock, _ in socks:
                sock.close()
            connection.close()


@needs_linux
def test_a_thousand_connections_are_held_more_are_refused_and_all_descriptors_come_back(tmp_path):
    command = [
        "sh",
        "-c",
        'ulimit -S -n 256; exec "$0" "$@"',
        sys.executable,
        PROGRAM,
    ]  # as some systems start it
    with many_descriptors(1200), Program(tmp_path / "many.db", command=command) as program:
        pid, socks = program.process.pid, []
        fetch(program.port, "GET", "/events")
        before = descriptors(pid), memory_mb(pid, "VmRSS")
        try:
            socks += [dial(program.port) for _ in range(aggregator.MAX_CONNECTIONS)]
            refused = [exchange(program.port, HEALTH)[0] for _ in range(10)]
            assert {(each.status, each.json["type"]) for each in refused} == {
                (503, "/docs#too-many-connections")
            }
            for sock in socks[::100]:
                sock.sendall(HEALTH)
                assert sock.recv(12) == b"HTTP/1.1 200"
            print(
                "1000 idle connections take {:.1f} MB".format(memory_mb(pid, "VmRSS") - before[1])
            )
            assert descriptors(pid) >= 1000 and memory_mb(pid) < before[1] + 50
        finally:
            for sock in socks:
                sock.close()
        deadline = time.monotonic() + 10
        while descriptors(pid) > before[0] and time.monotonic() < deadline:
            time.sleep(0.02)
        assert descriptors(pid) <= before[0] and fetch(program.port, "GET", "/health").status == 200
        assert program.end() == 0 and "Traceback" not in program.read_log()
        assert program.read_log().count("REFUSED 503") <= aggregator.LOG_LINES


@needs_linux
def test_without_descriptors_it_waits_quietly_and_goes_on_when_some_come_back(tmp_path):
    command = ["sh", "-c", 'ulimit -n 64; exec "$0" "$@"', sys.executable, PROGRAM]
    with Program(tmp_path / "few.db", command=command) as program:

        def cpu_ticks():
            with open(f"/proc/{program.process.pid}/stat") as file:
                return sum(map(int, file.read().rpartition(")")[2].split()[11:13]))

        held = dial(program.port, HEALTH)
        socks = [dial(program.port) for _ in range(100)]
        try:
            time.sleep(0.2)
            before = cpu_ticks()
            time.sleep(1.5)
            assert (cpu_ticks() - before) / os.sysconf("SC_CLK_TCK") < 0.5
            held.sendall(
                http_request("PUT", "/events/t/1", b"{}")
            )  # who has a connection is served
            time.sleep(0.1)
            assert [each.status for each in answers(held.recv(65536))] == [200, 201]
        finally:
            for sock in socks + [held]:
                sock.close()
        assert fetch(program.port, "GET", "/events/t/1").status == 200
        log = program.read_log()
        assert log.count("NO CONNECTION TAKEN") == 1 and "ulimit" in log and "Traceback" not in log
        assert program.end() == 0


@needs_linux
def test_half_sent_bodies_of_many_connections_do_not_fill_the_memory(tmp_path):
    start = http_request("POST", "/publish", b"", "Content-Length: 4000000")
    with Program(tmp_path / "large.db") as program:
        socks, piece = [], b" " * 65536
        try:
            for _ in range(200):
                socks.append(dial(program.port, start))
                with contextlib.suppress(OSError):  # those that were refused meanwhile
                    for _ in range(30):
                        socks[-1].sendall(piece)
            assert fetch(program.port, "POST", "/publish", sample()).status == 202
            print(
                "200 connections with 2 MB of their bodies sent: {:.0f} MB at most".format(
                    memory_mb(program.process.pid)
                )
            )
            assert memory_mb(program.process.pid) < 32 + 3 * aggregator.BUFFERS_MAX_BYTES / 2**20
        finally:
            for sock in socks:
                sock.close()


def refuse_writes(program, how, folder):
    """Take the space away from a running service; returns what gives it back."""
    if how == "full disk":
        with open(
            os.path.join(folder, "ballast"), "wb", buffering=0
        ) as ballast, contextlib.suppress(OSError):
            while True:
                ballast.write(b"x" * 4096)
        return lambda: os.unlink(os.path.join(folder, "ballast"))
    import resource

    size = os.path.getsize(program.db + "-wal") + 50_000
    resource.prlimit(program.process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    return lambda: resource.prlimit(
        program.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2
    )


@needs_linux
@pytest.mark.parametrize("how", ["file size limit", "full disk"])
def test_a_full_disk_is_503_keeps_what_was_acknowledged_and_recovers_by_itself(tmp_path, how):
    folder, acknowledged, sent = str(tmp_path), [], itertools.count()
    if how == "full disk":
        mounted = (
            os.geteuid() == 0
            and shutil.which("mount")
            and subprocess.run(
                ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", folder],
                stderr=subprocess.DEVNULL,
            ).returncode
            == 0
        )
        if not mounted:
            pytest.skip("only root may mount a small disk to fill")
    try:
        with Program(os.path.join(folder, "full.db")) as program:

            def publish(size=30_000):
                event = sample(str(next(sent)), payload={"x": "y" * size})
                answer = fetch(program.port, "POST", "/publish", event)
                if answer.status == 202:
                    acknowledged.append(event)
                return answer

            for _ in range(int(os.environ.get("DISK_FULL_ROUNDS", "2"))):
                assert publish().status == 202
                give_back = refuse_writes(program, how, folder)
                for size in (30_000, 0):  # until not even a small one fits
                    answer = next(
                        each for each in (publish(size) for _ in range(300)) if each.status != 202
                    )
                    assert (answer.status, answer.json["type"]) == (
                        503,
                        "/docs#store-unavailable",
                    ) and answer.json["detail"]
                assert fetch(program.port, "GET", "/health").status == 503
                assert fetch(program.port, "GET", "/events").status == 200
                give_back()
                assert fetch(program.port, "GET", "/health").status == 200
                assert publish().status == 202
            assert "COMMIT FAILED" in program.read_log() and "Traceback" not in program.read_log()
            assert fetch(program.port, "POST", "/publish", acknowledged[-100:]).json["unique"] == 0
            stats = fetch(program.port, "GET", "/stats").json
            assert (
                stats["unique_processed"] == len(acknowledged) and stats["current_queue_size"] == 0
            )
            assert program.end() == 0
        assert_sound(program.db)
    finally:
        if how == "full disk":
            subprocess.run(["umount", "-l", folder], check=True)


def with_changes(text):
    """A command that runs the program after changing it by `text`."""
    return [
        sys.executable,
        "-c",
        f"import sys; sys.path.insert(0, {os.path.dirname(PROGRAM)!r})\nimport aggregator\n{text}\n"
        "sys.exit(aggregator.main())",
    ]


def test_a_lock_of_another_program_is_waited_for_and_then_503(tmp_path):
    impatient = with_changes(
        "connect = aggregator._connect\n"
        "aggregator._connect = lambda path, **options: connect(path, **{**options, 'timeout': 1.1})"
    )
    holder = (
        "import sqlite3, sys, time\ndb = sqlite3.connect(sys.argv[1], isolation_level=None)\n"
        "db.execute('BEGIN EXCLUSIVE')\nprint('held', flush=True)\ntime.sleep(float(sys.argv[2]))"
    )
    with Program(tmp_path / "locked.db", command=impatient) as program:
        for event_id, held_s, expected in (
            ("1", 0.4, [202]),
            ("2", 1.8, [503, 202]),
        ):  # some SQLites wait in whole seconds
            other = subprocess.Popen(
                [sys.executable, "-c", holder, program.db, str(held_s)], stdout=subprocess.PIPE
            )
            assert other.stdout.readline() == b"held\n"
            began = time.monotonic()
            for status in expected:
                answer = fetch(program.port, "POST", "/publish", sample(event_id))
                assert answer.status == status and (
                    status == 202 or "locked" in answer.json["detail"]
                )
            assert time.monotonic() - began > held_s - 0.2
            assert other.wait(10) == 0
            other.stdout.close()
        assert fetch(program.port, "GET", "/stats").json["received"] == 2
        assert program.end() == 0


def test_a_file_that_is_deleted_or_moved_under_the_service_is_503_until_it_is_back(tmp_path):
    with Program(tmp_path / "moved.db") as program:
        assert fetch(program.port, "POST", "/publish", sample("1")).status == 202
        os.rename(program.db, program.db + ".away")
        for method, target, body in (("POST", "/publish", sample("2")), ("GET", "/health", None)):
            answer = fetch(program.port, method, target, body)
            assert answer.status == 503 and "deleted, moved or replaced" in answer.json["detail"]
        assert (
            fetch(program.port, "GET", "/events").json["count"] == 1
        )  # it can still be read, and saved
        os.rename(program.db + ".away", program.db)
        assert fetch(program.port, "GET", "/health").status == 200
        assert (
            fetch(program.port, "POST", "/publish", [sample("1"), sample("2")]).json["duplicates"]
            == 1
        )
        os.unlink(program.db)
        assert fetch(program.port, "POST", "/publish", sample("3")).status == 503
        assert program.end() == 0 and "Traceback" not in program.read_log()


def test_sigterm_at_any_moment_of_the_start_leaves_a_sound_store_or_none(tmp_path):
    for n in range(6):
        db = str(tmp_path / f"{n}.db")
        process = subprocess.Popen(
            [sys.executable, PROGRAM, "--port", "0", "--db", db],
            stderr=subprocess.PIPE,
            text=True,
            env=clean_environment(),
        )
        time.sleep(0.06 * (n + 1))
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=10)
        assert process.returncode in (0, -signal.SIGTERM) and "Traceback" not in log
        with contextlib.closing(aggregator.Store(db)) as opened:
            opened.commit([event(1)], NOW)
        assert sound(db) == []


def test_sigterm_with_clients_in_every_phase_ends_the_program_in_time(tmp_path):
    quick = with_changes("aggregator.STOP_REQUESTS_S = 0.7")
    publishers = [Publisher(n) for n in range(4)]
    phases = [
        b"",
        b"GET / HT",
        HEALTH,
        HEALTH * 500,
        http_request("POST", "/publish", b"", "Content-Length: 99") + b"{",
        http_request("POST", "/publish", b"5\r\n", "Transfer-Encoding: chunked"),
        b"?\r\n\r\n",
        http_request("POST", "/publish", b"", "Content-Length: 999", "Expect: 100-continue"),
        http_request("GET", "/events", b"", "Accept: application/x-ndjson") * 30,
    ]
    with Program(tmp_path / "phases.db", command=quick) as program:
        fetch(
            program.port,
            "POST",
            "/publish",
            [sample(f"{n}", payload={"x": "y" * 30_000}) for n in range(100)],
        )
        for each in publishers:
            each.begin(program.port)
        socks = [dial(program.port, data, receive_bytes=4096) for data in phases]
        time.sleep(0.3)
        began = time.monotonic()
        assert program.end() == 0 and time.monotonic() - began < 5
        for each in publishers:
            each.over = True
            each.join(20)
        for sock in socks:
            sock.close()
        assert "Traceback" not in program.read_log() and "STOPPED" in program.read_log()
    assert set().union(*[each.acknowledged for each in publishers]) <= set(stored_ids(program.db))
    assert_sound(program.db)


@pytest.mark.skipif(
    not os.environ.get("SOAK_MINUTES"),
    reason="SOAK_MINUTES says for how long; 20 is a good measure",
)
@needs_linux
def test_after_a_long_mixed_load_memory_and_file_are_flat_and_the_books_balance(tmp_path):
    """Publishing (single, batches, repeats, conflicts), reading, streams (quick and slow), with retention."""
    duration_s, failures, over = float(os.environ["SOAK_MINUTES"]) * 60, [], threading.Event()

    def repeat(work, seed):
        rng = random.Random(seed)

        def run():
            while not over.is_set():
                try:
                    work(rng)
                except Exception as error:
                    failures.append(repr(error))
                    over.set()

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        return thread

    small = with_changes(
        "aggregator.RECENT_IDS = 30_000"
    )  # so that all of the index is in motion after a minute
    with Program(
        tmp_path / "soak.db",
        "--max-events-per-topic",
        "2000",
        "--retention",
        "30s",
        "--dedup-retention",
        "40s",
        command=small,
    ) as program:
        pid, port = program.process.pid, program.port

        def publish(rng):
            count = rng.choice((1, 1, 1, 10, 200))
            batch = [
                sample(
                    "%x" % rng.getrandbits(rng.choice((8, 60))),
                    topic=f"t{rng.randrange(10)}",
                    payload={"n": int(rng.random() < 0.01), "x": "y" * rng.choice((0, 100, 3000))},
                )
                for _ in range(count)
            ]
            answer = fetch(
                port, "POST", "/publish" + rng.choice(("", "?wait=0", "?verdicts=1")), batch
            )
            assert answer.status == 202 or b"queue-full" in answer.body, answer

        def read(rng):
            target = rng.choice(
                (
                    "events?topic=t1",
                    "events?source=s&limit=5",
                    "stats",
                    "health",
                    "duplicates",
                    "events/t1/1",
                )
            )
            assert fetch(port, "GET", "/" + target).status in (200, 404, 410)
            time.sleep(0.05)

        def stream(rng):
            answer = fetch(port, "GET", "/events", headers={"Accept": "application/x-ndjson"})
            for line in answer.body.splitlines():
                json.loads(line)

        def stream_slowly(rng):
            ask = http_request(
                "GET", "/events", b"", "Accept: application/x-ndjson", "Connection: close"
            )
            with contextlib.closing(dial(port, ask, receive_bytes=4096)) as sock:
                for _ in range(200):
                    if over.is_set() or not sock.recv(20_000):
                        break
                    time.sleep(0.1)

        threads = [
            repeat(work, n)
            for n, work in enumerate([publish] * 4 + [read] * 2 + [stream] + [stream_slowly] * 3)
        ]
        figures, began = [], time.monotonic()
        while time.monotonic() - began < duration_s and not over.wait(duration_s / 20):
            figures.append(
                (
                    memory_mb(pid, "VmRSS"),
                    os.path.getsize(program.db) / 2**20,
                    os.path.getsize(program.db + "-wal") / 2**20,
                    descriptors(pid),
                )
            )
            print(
                "{:6.0f} s: memory {:.1f} MB, file {:.1f} MB, WAL {:.1f} MB, {} descriptors".format(
                    time.monotonic() - began, *figures[-1]
                ),
                flush=True,
            )
        over.set()
        for thread in threads:
            thread.join(60)
        assert not failures
        stats = fetch(port, "GET", "/stats").json
        assert (
            stats["received"]
            == stats["unique_processed"] + stats["duplicate_dropped"] + stats["current_queue_size"]
        )
        assert (
            stats["duplicate_dropped"] > 0
            and stats["conflicts"] > 0
            and stats["removed_by_retention"] > 0
        )
        assert program.end() == 0 and "Traceback" not in program.read_log()
    middle, late = [
        [sum(column) / len(part) for column in zip(*part)] for part in (figures[7:13], figures[14:])
    ]
    if duration_s >= 300:  # everything has grown to its size by then
        assert (
            late[0] < middle[0] * 1.1 + 5
            and late[1] < middle[1] * 1.1 + 5
            and late[3] < middle[3] + 5
        )
    assert max(each[2] for each in figures) < 100
    assert_sound(program.db)
