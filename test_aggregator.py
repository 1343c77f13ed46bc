"""The tests of aggregator.py, in the order of its sections.

Helpers stand first. Then come the house rules, the sections from §1 on, and the whole
program as a process. pytest and the standard library; no plugins, no mocks of our own
store.

Environment variables that make the random tests longer: KILL_ROUNDS, CRASH_ROUNDS,
MODEL_SEEDS, MODEL_STEPS, FUZZ_REQUESTS, DAMAGE_ROUNDS, DISK_FULL_ROUNDS, RELAY_KILLS
and SOAK_MINUTES. FUZZ_SEED repeats a run of the fuzzing test.
"""

import ast
import asyncio
import base64
import concurrent.futures
import contextlib
import datetime
import doctest
import email.utils
import errno
import gc
import glob
import gzip
import hashlib
import hmac
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
import shlex
import shutil
import signal
import socket
import sqlite3
import statistics
import struct
import subprocess
import symtable
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
HERE = os.path.dirname(PROGRAM)

# As a module, because Python compiles a script anew at each start. Some hundred starts
# share one compiled form, in a folder that goes when the tests have ended.
COMMAND = (sys.executable, "-m", "aggregator")
COMPILED = tempfile.TemporaryDirectory()
os.environ["PYTHONPATH"] = HERE
os.environ["PYTHONPYCACHEPREFIX"] = COMPILED.name
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
NOW = 1_767_225_600_000_000  # 2026-01-01T00:00:00Z in microseconds

has_proc = os.path.isdir("/proc/self/fd")
has_curl = shutil.which("curl") and shutil.which("bash")
needs_linux = pytest.mark.skipif(not has_proc, reason="there is no /proc to look into")
needs_curl = pytest.mark.skipif(not has_curl, reason="no curl or bash here")


def with_cases(arguments, table):
    """Run a test once for each case of a dictionary, under the name of the case."""
    return pytest.mark.parametrize(arguments, list(table.values()), ids=list(table))


def text_table(text):
    """A dictionary of cases, written as lines: name | cell | cell …

    A case with one cell is that text; one with several is a tuple of them.
    """
    table = {}
    for line in text.strip().split("\n"):
        name, *cells = [cell.strip() for cell in line.split(" | ")]
        assert name not in table, f"two cases are named {name}"
        table[name] = cells.pop() if len(cells) == 1 else tuple(cells)
    return table


def json_table(text):
    """A dictionary of cases, written as lines: name | a value as JSON."""
    return {name: json.loads(value) for name, value in text_table(text).items()}


def read_text(name):
    """A file of the project."""
    with open(os.path.join(HERE, name), encoding="utf-8") as file:
        return file.read()


def sample(event_id="1", **fields):
    """A valid event, as JSON has it."""
    event = {
        "topic": "t",
        "event_id": event_id,
        "timestamp": "2026-01-01T00:00:00Z",
        "source": "s",
        "payload": {"n": 1},
    }
    event.update(fields)
    return event


def samples(*event_ids, **fields):
    return [sample(str(event_id), **fields) for event_id in event_ids]


def lines(values):
    """One JSON value a line."""
    return "\n".join(json.dumps(value) for value in values).encode()


class Answer(NamedTuple):
    """An answer as a client has it. `pieces`: in how many a stream came."""

    status: int
    headers: dict
    body: bytes
    pieces: int = 1

    @property
    def json(self):
        return json.loads(self.body.decode("utf-8"))

    @property
    def problem(self):
        """The slug of the problem that a refusal names."""
        return self.json["type"].partition("docs#")[2]

    @property
    def rows(self):
        """The values of an answer that has one a line."""
        return [json.loads(line) for line in self.body.splitlines()]


def assert_problem(answer, content_type):
    """A refusal has the form of RFC 9457, and what PROBLEMS says of its kind."""
    assert content_type == "application/problem+json"
    assert answer.json["detail"]
    problem = aggregator.PROBLEMS[answer.problem]
    assert answer.status == problem.status
    assert answer.json["status"] == problem.status
    assert answer.json["title"] == problem.title
    assert ("Retry-After" in answer.headers) == (answer.status == 503)


def unchanging(text):
    """A README's answer or a real one, with what differs from run to run made equal."""
    text = re.sub("[0-9,]+/s", "1/s", text)
    text = re.sub(r'"(processed_at|first_seen)":"[^"]*"', r'"\1":"…"', text)
    return re.sub(r'"(seconds_since_first_seen|milliseconds)":[0-9.e-]+', r'"\1":0', text)


# ============================================================================
# For the house rules
# ============================================================================

SOURCE = read_text("aggregator.py")
SOURCE_LINES = SOURCE.split("\n")
TREE = ast.parse(SOURCE)
README = read_text("README.md")

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
SCOPES = (*FUNCTIONS, ast.ClassDef)
BANNER = re.compile(r"^# =+\n# §([0-9]+)  (.*?)^# =+\n", re.M | re.S)


class Section(NamedTuple):
    """A section of aggregator.py. `banner` is all its text, as one line."""

    number: int
    first_line: int
    title: str
    banner: str

    @property
    def known(self):
        """The numbers of the sections that the banner's "Knows …" sentence allows.

        A banner says "Knows §1, §4 to §6.", "Knows nothing …" or "Knows all …".
        """
        sentence = re.search(r"\bKnows (.*?)\.(?= |\Z)", self.banner)
        assert sentence, f"§{self.number} does not say what it knows"
        text = sentence.group(1)
        if text.startswith("all"):
            return set(range(1, self.number))
        numbers = {int(number) for number in re.findall("§([0-9]+)", text)}
        for first, last in re.findall("§([0-9]+)(?: to |–)§([0-9]+)", text):
            numbers |= set(range(int(first), int(last)))
        return numbers


def read_sections():
    sections = []
    for match in BANNER.finditer(SOURCE):
        number, text = match.groups()
        line = SOURCE.count("\n", 0, match.start()) + 1
        banner = " ".join(text.replace("\n#", "\n").split())
        title = text.partition("\n")[0]
        sections.append(Section(int(number), line, title, banner))
    return sections


SECTIONS = read_sections()


def number_of(title):
    """The number of the section with this title."""
    (number,) = [each.number for each in SECTIONS if each.title.startswith(title)]
    return number


def section_of(line):
    """The number of the section that a line belongs to; 0 above the first."""
    number = 0
    for section in SECTIONS:
        if section.first_line <= line:
            number = section.number
    return number


def bindings(tree):
    """The names that a file binds at its top level, each with its line, in order."""
    found = []
    for node in tree.body:
        if isinstance(node, SCOPES):
            found.append((node.name, node.lineno))
        targets = getattr(node, "targets", [])
        if isinstance(node, ast.AnnAssign):
            targets = [node.target]
        for target in targets:
            for part in ast.walk(target):
                if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
                    found.append((part.id, part.lineno))
    return found


def homes_of_names():
    """The section of each name that aggregator.py binds at its top level."""
    return {name: section_of(line) for name, line in bindings(TREE)}


class Use(NamedTuple):
    """A global name that a section uses, and the line of the scope where it does."""

    section: int
    line: int
    name: str


def uses_in_scope(table):
    """The global names that a function or class uses, and all that stands inside it."""
    uses = []
    line = table.get_lineno()
    for symbol in table.get_symbols():
        if symbol.is_referenced() and symbol.is_global():
            uses.append(Use(section_of(line), line, symbol.get_name()))
    for child in table.get_children():
        uses += uses_in_scope(child)
    return uses


def outside_scopes(node):
    """All nodes below a statement, but none of the bodies of functions and classes."""
    for child in ast.iter_child_nodes(node):
        if isinstance(node, SCOPES) and child in node.body:
            continue
        yield child
        yield from outside_scopes(child)


def read_uses():
    """Every use of a global name: inside of functions and classes, and at the top."""
    uses = []
    for table in symtable.symtable(SOURCE, "aggregator.py", "exec").get_children():
        uses += uses_in_scope(table)
    for node in TREE.body:
        for part in outside_scopes(node):
            if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Load):
                uses.append(Use(section_of(part.lineno), part.lineno, part.id))
    return uses


def imports_of(nodes):
    """The imports among these nodes, as pairs of a section and a module."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {(section_of(node.lineno), alias.name) for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            found.add((section_of(node.lineno), node.module))
    return found


def functions():
    return [node for node in ast.walk(TREE) if isinstance(node, FUNCTIONS)]


def lines_of_code(function):
    """How many lines of a function are neither blank, nor comment, nor docstring."""
    first_line = function.lineno
    if ast.get_docstring(function):
        docstring = function.body[0]
        first_line = docstring.end_lineno + 1
    body = SOURCE_LINES[first_line - 1 : function.end_lineno]
    code = [line for line in body if line.strip() and not line.lstrip().startswith("#")]
    return len(code)


def readme_part(heading):
    """What stands below a heading of the README, up to the next one of any level."""
    _, found, rest = README.partition(f"\n{heading}\n")
    assert found, f"the README has no {heading}"
    return re.split("^#+ ", rest, flags=re.M)[0]


def readme_code():
    """The lines of code of the README, in blocks and in backticks."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", README, re.M | re.S)
    prose = re.sub(r"^```.*?^```", "", README, flags=re.M | re.S)
    return "".join(blocks).split("\n") + re.findall("`([^`\n]+)`", prose)


COMMAND_IN_README = re.compile(r"(?:aggregator\.py|-m aggregator)(?: |$)([^|;&>)]*)")


def readme_commands():
    """Our commands in the README: pairs of the command's name and its arguments.

    Variables and what stands in front of them are left out, and so is the output.
    """
    found = []
    for line in readme_code():
        for match in COMMAND_IN_README.finditer(line):
            words = re.sub("'[^']*'", "TEXT", match.group(1)).replace('"', "").split()
            name = "serve"
            if words and words[0] in aggregator.COMMANDS:
                name = words.pop(0)
            found.append((name, words))
    return found


def readme_requests():
    """Requests in the README: pairs of a method, "" if it is not said, and a path."""
    found = []
    for code in readme_code():
        found += re.findall(r"\b(GET|HEAD|POST|PUT|DELETE) (/[\w{}/.%-]*)", code)
        for path in re.findall(r"(?:localhost|nas\.lan):8000(/[\w/.%-]*)", code):
            method = re.search("-X ([A-Z]+)", code)
            found.append((method.group(1) if method else "", path))
    return found


def route_pattern(path):
    """The paths that a route takes, as a regular expression."""
    pattern = re.escape(path).replace(r"\{topic\}", ".+").replace(r"\{event_id\}", "[^/]+")
    return re.compile(pattern + r"\Z")


def readme_anchors():
    """The anchors of the README's headings, as GitHub makes them."""
    prose = re.sub(r"^```.*?^```", "", README, flags=re.M | re.S)
    anchors = set()
    for heading in re.findall("^#+ (.*)$", prose, re.M):
        kept = re.sub(r"[^\w\- ]", "", heading.lower())
        anchors.add(kept.replace(" ", "-"))
    return anchors


def console_blocks():
    """The commands that the README shows, each with the answer it shows."""
    blocks = []
    for text in re.findall(r"^```console\n(.*?)^```", README, re.M | re.S):
        command, answer = text.split("\n", 1)
        assert command.startswith("$ ")
        blocks.append((command[2:], answer.partition("\n")[0]))
    return blocks


# ============================================================================
# Helpers of §1  Events
# ============================================================================

EPOCH = datetime.datetime(1970, 1, 1)
MICROSECOND = datetime.timedelta(microseconds=1)
MINUTE_US = 60_000_000
FIRST_INSTANT = "0001-01-01 00:00:00.000000"
LAST_INSTANT = "9999-12-31 23:59:59.999999"

GOOD_EVENT = {
    "topic": "t",
    "event_id": "1",
    "timestamp": "2026-01-01T00:00:00Z",
    "source": "s",
    "payload": {},
}
REQUIRED_FIELDS = list(GOOD_EVENT)
NAME_FIELDS = ["topic", "event_id", "source"]


def instant_of(text):
    """`2026-01-31 12:00:00.000000` in microseconds, by way of `strptime`."""
    return (datetime.datetime.strptime(text, "%Y-%m-%d %H:%M:%S.%f") - EPOCH) // MICROSECOND


def one_event(event_id):
    """The JSON text of a good event, as bytes."""
    return json.dumps({**GOOD_EVENT, "event_id": event_id}).encode()


E1 = one_event("1")
E2 = one_event("2")


def body_of(text):
    """The bytes of a body in which good events are written as <1>, <2>, <3>."""
    body = text.encode()
    for event_id in "123":
        body = body.replace(b"<%b>" % event_id.encode(), one_event(event_id))
    return body


def read_one(**changes):
    """The event that GOOD_EVENT with these changes is read as."""
    [event] = aggregator.parse_events(json.dumps({**GOOD_EVENT, **changes}).encode(), most=10)
    return event


def read_payload(text):
    """The canonical payload of an event that was sent with this payload text."""
    [event] = aggregator.parse_events(with_payload(text), most=10)
    return event.payload


def with_payload(text):
    """The body of a good event with this text as its payload, valid JSON or not."""
    return E1.replace(b'"payload": {}', b'"payload":' + text.encode())


def faults_in(read, *arguments):
    """The faults that `read(*arguments)` must raise. Each has a message in ASCII."""
    with pytest.raises(aggregator.InvalidEvents) as caught:
        read(*arguments)
    for fault in caught.value.faults:
        assert fault.message, fault
        assert fault.message.isascii(), fault
    return caught.value.faults


def places_of(faults):
    """Where faults are, in words: "0 topic" is the topic of the event at index 0."""
    return [f"{fault.index} {fault.field}".strip() for fault in faults]


def faults_of(body):
    """Where the faults of a body are: of bytes, or of a value still to be written."""
    if not isinstance(body, bytes):
        body = json.dumps(body).encode()
    return places_of(faults_in(aggregator.parse_events, body, 10**9))


def nested(levels, opening, closing):
    """A payload of this many levels, with something flat beside them."""
    return '{"wide":[{}],"a":' + opening * (levels - 1) + "0" + closing * (levels - 1) + "}"


# ---- Timestamps

INSTANTS = text_table("""
    the epoch               | 1970-01-01T00:00:00Z             | 1970-01-01 00:00:00.000000
    a date alone            | 1970-01-01                       | 1970-01-01 00:00:00.000000
    a blank for the T       | 1970-01-01 00:00                 | 1970-01-01 00:00:00.000000
    a microsecond after     | 1970-01-01T00:00:00.000001Z      | 1970-01-01 00:00:00.000001
    a microsecond before    | 1969-12-31T23:59:59.999999Z      | 1969-12-31 23:59:59.999999
    a comma before 1970     | 1969-12-31T23:59:59,5Z           | 1969-12-31 23:59:59.500000
    the first instant       | 0001-01-01T00:00:00Z             | 0001-01-01 00:00:00.000000
    minus zero offset       | 0001-01-01T00:00:00.000001-00:00 | 0001-01-01 00:00:00.000001
    the last instant        | 9999-12-31T23:59:59.9999999Z     | 9999-12-31 23:59:59.999999
    no seconds              | 2026-01-31T12:00Z                | 2026-01-31 12:00:00.000000
    a leap day              | 2024-02-29                       | 2024-02-29 00:00:00.000000
    a leap day of a century | 2000-02-29T12:00                 | 2000-02-29 12:00:00.000000
    one digit of a second   | 2026-01-31T12:00:00.5Z           | 2026-01-31 12:00:00.500000
    a comma                 | 2026-01-31T12:00:00,123456Z      | 2026-01-31 12:00:00.123456
    a seventh digit is cut  | 2026-01-31T12:00:00.1234569Z     | 2026-01-31 12:00:00.123456
    an offset ahead         | 2026-01-31 14:00+02:00           | 2026-01-31 12:00:00.000000
    an offset without colon | 2026-01-31T14:00:00+0200         | 2026-01-31 12:00:00.000000
    an offset of hours      | 2026-01-31T14:00:00+02           | 2026-01-31 12:00:00.000000
    an offset behind        | 2026-01-31T12:00:00-05:30        | 2026-01-31 17:30:00.000000
    behind, without colon   | 2026-01-31T12:00:00-0530         | 2026-01-31 17:30:00.000000
    a fraction and offset   | 2026-01-31T14:00:00.25+02:00     | 2026-01-31 12:00:00.250000
    the largest offset      | 2026-01-31T12:00:00+23:59        | 2026-01-30 12:01:00.000000
    a lower-case z          | 2026-01-01T12:00:00z             | 2026-01-01 12:00:00.000000
    a lower-case t          | 2026-01-01t12:00:00Z             | 2026-01-01 12:00:00.000000
    a leap second           | 2016-12-31T23:59:60Z             | 2016-12-31 23:59:59.999999
    second 60 of any minute | 2026-01-01T12:00:60Z             | 2026-01-01 12:00:59.999999
    a fraction of second 60 | 2026-01-01T12:00:60.25Z          | 2026-01-01 12:00:59.999999
    second 60 with offset   | 2026-01-31T14:00:60+02:00        | 2026-01-31 12:00:59.999999
    the last second 60      | 9999-12-31T23:59:60Z             | 9999-12-31 23:59:59.999999
""")
INSTANTS["thirty digits are cut"] = (
    "2026-01-31T12:00:00." + "9" * 30,
    "2026-01-31 12:00:00.999999",
)

NOT_TIMESTAMPS = text_table("""
    a word                       | now
    zero                         | 0
    a year                       | 2026
    a year and a month           | 2026-01
    seconds since 1970           | 1767225600
    the year 0                   | 0000-01-01T00:00:00Z
    the year 10000               | 10000-01-01
    a negative year              | -0001-01-01
    month 0                      | 2026-00-01
    month 13                     | 2026-13-01
    day 0                        | 2026-01-00
    day 32                       | 2026-01-32
    31 April                     | 2026-04-31
    29 February 2026             | 2026-02-29
    29 February 1900             | 1900-02-29
    one-digit month and day      | 2026-1-1
    a day of a week              | 2026-W01-1
    a week                       | 2026-W01
    a day of a year              | 2026-001
    no dashes                    | 20260101
    no dashes and colons         | 20260101T000000Z
    a year of two digits         | 26-01-01
    slashes                      | 2026/01/01
    nothing behind the T         | 2026-01-01T
    an hour alone                | 2026-01-01T12
    a one-digit hour             | 2026-01-01T1:00
    hour 24                      | 2026-01-01T24:00
    hour 24 with seconds         | 2026-01-01T24:00:00
    minute 60                    | 2026-01-01T12:60
    second 60 behind the last    | 9999-12-31T23:59:60-00:01
    second 61                    | 2026-01-01T12:00:61
    a time without colons        | 2026-01-01T120000Z
    a time without its 2nd colon | 2026-01-01T12:0000
    a fraction of a minute       | 2026-01-01T12:00.5
    a comma behind a minute      | 2026-01-01T12:00,5Z
    a fraction of a day          | 2026-01-01.5
    a dot and no digit           | 2026-01-01T12:00:00.
    a dot and no digit before Z  | 2026-01-01T12:00:00.Z
    two fractions                | 2026-01-01T12:00:00.5.5
    thirty-one digits            | 2026-01-01T12:00:00.1111111111111111111111111111111
    an underscore between digits | 2026-01-01T12:00:00.1_0
    a negative fraction          | 2026-01-01T12:00:00.-1
    a date with a zone           | 2026-01-01Z
    a date with an offset        | 2026-01-01+02:00
    a T with an offset           | 2026-01-01T+02:00
    offset of 99 hours           | 2026-01-01T12:00:00+99:99
    offset of 24 hours           | 2026-01-01T12:00:00+24:00
    offset of 60 minutes         | 2026-01-01T12:00:00-00:60
    offset of one digit          | 2026-01-01T12:00:00+1
    offset of three digits       | 2026-01-01T12:00:00+123
    offset with a bare colon     | 2026-01-01T12:00:00+12:
    offset with seconds          | 2026-01-01T12:00:00+01:00:00
    two zones                    | 2026-01-01T12:00:00ZZ
    a zone and an offset         | 2026-01-01T12:00:00Z+01:00
    a blank before the zone      | 2026-01-01T12:00:00 Z
    a named zone                 | 2026-01-01T12:00:00UTC
    before the year 1 in UTC     | 0001-01-01T00:00:00+00:01
    just before the year 1       | 0001-01-01T23:58:59.999999+23:59
    behind the year 9999 in UTC  | 9999-12-31T23:59:59-00:01
    two blanks for the T         | 2026-01-01  12:00
    a minus sign of typesetters  | 2026-01-01T12:00:00−02:00
    Arabic digits                | ٢٠٢٦-٠١-٠١
    full-width digits            | ２０２６-01-01
    an Arabic second             | 2026-01-01T12:00:0٥Z
    an Arabic fraction           | 2026-01-01T12:00:00.٥Z
    an Arabic offset             | 2026-01-01T12:00:00+0٢:00
""")
NOT_TIMESTAMPS.update(
    {
        "nothing": "",
        "a blank": " ",
        "a line feed behind an instant": "2026-01-01T12:00:00Z\n",
        "a line feed behind a date": "2026-01-01\n",
        "a line feed before": "\n2026-01-01",
        "a blank before": " 2026-01-01",
        "a blank behind": "2026-01-01 ",
        "NUL behind": "2026-01-01T12:00:00Z\x00",
    }
)


# ---- Fields

KEPT_NAMES = json_table(r"""
    a letter               | "a"
    a digit                | "0"
    blanks around          | " a "
    a blank inside         | "a b"
    a hierarchy            | "logs/web"
    a slash                | "/"
    a star                 | "*"
    a percent sign         | "%"
    a letter of 2 bytes    | "é"
    a combining accent     | "e\u0301"
    an emoji               | "😀"
    right-to-left override | "\u202e"
    zero-width space       | "\u200b"
    line separator inside  | "a\u2028b"
""")
KEPT_NAMES["255 bytes of 1"] = "a" * 255
KEPT_NAMES["255 bytes of 2"] = "é" * 127 + "a"
KEPT_NAMES["255 bytes of 3"] = "漢" * 85
KEPT_NAMES["255 bytes of 4"] = "😀" * 63 + "abc"

WRONG_NAMES = json_table(r"""
    null                   | null
    true                   | true
    zero                   | 0
    a fraction             | 1.5
    a list                 | []
    a list of a string     | ["a"]
    an object              | {"a": 1}
    nothing                | ""
    a blank                | " "
    a no-break space       | "\u00a0"
    ideographic blanks     | "\u3000\u2028"
    a line feed            | "a\n"
    NUL                    | "\u0000"
    NUL inside             | "a\u0000b"
    unit separator         | "\u001f"
    a tab                  | "\t"
    delete                 | "\u007f"
    next line              | "\u0085"
    a C1 control           | "\u009f"
    a high surrogate       | "\ud800"
    a low surrogate inside | "a\udfffb"
""")
WRONG_NAMES["256 bytes of 1"] = "a" * 256
WRONG_NAMES["256 bytes of 2"] = "é" * 128
WRONG_NAMES["256 bytes of 2 and 1"] = "é" * 127 + "ab"
WRONG_NAMES["257 bytes of 4 and 1"] = "a" + "😀" * 64
WRONG_NAMES["a million bytes"] = "a" * 1_000_000

WRONG_TIMESTAMPS = json_table(r"""
    null               | null
    true               | true
    zero               | 0
    seconds since 1970 | 1767225600
    a fraction         | 1.5
    a list             | []
    an object          | {}
    a list of a date   | ["2026-01-01"]
    nothing            | ""
    a word             | "now"
    a surrogate        | "\ud800"
    30 February        | "2026-02-30"
""")
WRONG_TIMESTAMPS["100,000 digits"] = "9" * 100_000

WRONG_PAYLOADS = json_table(r"""
    null                | null
    true                | true
    zero                | 0
    nothing             | ""
    an object as string | "{}"
    a string            | "text"
    a list              | []
    a list of an object | [{}]
    NaN                 | NaN
    Infinity            | Infinity
""")

WRONG_SEQUENCES = json_table(r"""
    below zero        | -1
    2 to the power 63 | 9223372036854775808
    2 to the power 64 | 18446744073709551616
    true              | true
    false             | false
    a half            | 0.5
    one and a bit     | 1.0000001
    beyond, a float   | 1e19
    a digit as string | "1"
    nothing           | ""
    a list            | []
    an object         | {}
    NaN               | NaN
    Infinity          | Infinity
""")
WRONG_SEQUENCES["401 digits"] = 10**400


def wrong_values():
    """The four tables above in one: name to (field, value)."""
    tables = {
        "topic": WRONG_NAMES,
        "event_id": WRONG_NAMES,
        "source": WRONG_NAMES,
        "timestamp": WRONG_TIMESTAMPS,
        "payload": WRONG_PAYLOADS,
        "sequence": WRONG_SEQUENCES,
    }
    together = {}
    for field, table in tables.items():
        for name, value in table.items():
            together[f"{field}: {name}"] = (field, value)
    return together


WRONG_VALUES = wrong_values()


# ---- Payloads

# Each of these values stands in a payload in one of these places.
UNREADABLE_VALUES = text_table(r"""
    NaN                    | NaN
    Infinity               | Infinity
    -Infinity              | -Infinity
    too large              | 1e999
    too large, below zero  | -1e999
    a high surrogate       | "\ud800"
    a low surrogate        | "a\udc00"
    a surrogate as a name  | {"\udfff":1}
    a pair in wrong order  | "\ude00\ud83d"
""")
UNREADABLE_VALUES["401 digits"] = "1" + "0" * 400
UNREADABLE_VALUES["401 digits below zero"] = "-1" + "0" * 400
UNREADABLE_VALUES["5,000 digits"] = "1" * 5000
UNREADABLE_VALUES["100,000 digits"] = "1" * 100_000
PLACES_IN_A_PAYLOAD = {
    "on top": '{"a":?}',
    "nested": '{"a":[1,{"b":?}]}',
    "beside other letters": '{"a":?,"pad":"' + "é" * 300 + '"}',
}

READABLE_VALUES = text_table(r"""
    a large number          | 1e308
    the largest, below zero | -1.7976931348623157e308
    the smallest            | 5e-324
    rounded to zero         | 1e-999
    more than 64 bits       | 18446744073709551616
    less than 64 bits       | -9223372036854775809
    NUL                     | "\u0000"
    an emoji, escaped       | "\ud83d\ude00"
    NaN in a string         | "NaN"
    true                    | true
    null                    | null
    an empty list           | []
    an empty object         | {}
    empty names             | {"":{"":[]}}
""")
READABLE_VALUES["308 digits"] = "9" * 308
READABLE_VALUES["308 digits below zero"] = "-" + "9" * 308
READABLE_VALUES["delete and a line separator"] = '"\x7f\u2028"'

EQUAL_PAYLOADS = text_table(r"""
    order and blanks      | {"a":1,"b":2}        | { "b" : 2, "a" : 1 }
    order further down    | {"a":{"c":1,"b":2}}  | {"a":{"b":2,"c":1}}
    escapes               | {"a":"\u00e9\/"}     | {"a":"é/"}
    an escaped pair       | {"a":"\ud83d\ude00"} | {"a":"😀"}
    spelling of a number  | {"a":1e2}            | {"a":100.0}
    the last of two names | {"a":1,"a":2}        | {"a":2}
""")
EQUAL_PAYLOADS["a line feed"] = ('{"a":1,"b":2}', '{"a":1,\n"b":2}')
UNEQUAL_PAYLOADS = text_table(r"""
    order of a list    | {"a":[1,2]}                | {"a":[2,1]}
    number and string  | {"a":1}                    | {"a":"1"}
    number and true    | {"a":1}                    | {"a":true}
    number and false   | {"a":0}                    | {"a":false}
    null and nothing   | {"a":null}                 | {}
    list and object    | {"a":[]}                   | {"a":{}}
    composed letters   | {"a":"\u00e9"}             | {"a":"e\u0301"}
    more than 64 bits  | {"a":18446744073709551616} | {"a":18446744073709551617}
    nested and dotted  | {"a":{"b":1}}              | {"a.b":1}
""")

BRACKETS = {
    "lists": ("[", "]"),
    "objects": ('{"a":', "}"),
    "lists of objects": ('[0,{"b":', "}]"),
    "lists with blanks": ("[ 0, ", "]"),
}
HOSTILE_BRACKETS = {
    "lists": ("[", "]"),
    "objects": ('{"a":', "}"),
    "lists left open": ("[", ""),
    "objects left open": ('{"a":', ""),
}


# ---- Bodies: <1>, <2>, <3> stand for good events

# A body and the ids of its events.
BODIES = text_table("""
    an event                    | <1>                           | 1
    a list of one               | [<1>]                         | 1
    a list of two               | [<1> , <2>]                   | 12
    an object of events         | {"events":[<1>,<2>]}          | 12
    events beside another field | {"other":0,"events":[<1>]}    | 1
    nothing between             | <1><2><3>                     | 123
    all kinds                   | [<1>]<2>{"events":[<3>]}      | 123
    empty lists around          | []<1>{"events":[]}            | 1
    the same event twice        | <1><1>                        | 11
""")
BODIES["blanks around"] = (" \r\n\t<1> \r\n\t", "1")
BODIES["lines"] = ("<1>\n<2>\n", "12")
BODIES["lines with CR, and a blank one"] = ("<1>\r\n\r\n<2>", "12")
BODIES["a tab between"] = ("<1>\t<2>", "12")
BODIES["indented"] = (json.dumps(GOOD_EVENT, indent=4), "1")

TEXTS_NOT_JSON = text_table(r"""
    an open object                | {
    a closing brace               | }
    an open list                  | [
    crossed brackets              | {]
    a comma behind                | <1>,
    a comma between               | <1>,<2>
    a comma at the end of a list  | [<1>,]
    a form                        | topic=t&event_id=1
    single quotes                 | {'a':1}
    nan                           | nan
    inf                           | inf
    undefined                     | undefined
    an unknown escape             | ["\x41"]
    a short escape                | ["\u12"]
    a leading zero                | [01]
    a plus sign                   | [+1]
    a point without digits        | [1.]
    an underscore                 | [1_0]
    an Arabic digit               | [١]
""")
TEXTS_NOT_JSON.update(
    {
        "nothing": "",
        "a blank": " ",
        "line feeds": "\r\n\r\n",
        "NUL": "\x00",
        "vertical tab between": "<1>\x0b<2>",
        "no-break space between": "<1>\u00a0<2>",
        "NUL behind": "<1>\x00",
        "a comment": "// x\n<1>",
        "a byte-order mark before": "\ufeff<1>",
        "a byte-order mark alone": "\ufeff",
        "a byte-order mark behind": "<1>\ufeff",
        "a line feed in a string": '["a\nb"]',
        "NUL in a string": '["a\x00b"]',
    }
)
BYTES_NOT_JSON = {
    "a cut event": E1[:-1],
    "a cut second line": E1 + b"\n" + E2[:-1],
    "no UTF-8": b'["\xff"]',
    "overlong UTF-8": b'["\xc0\xaf"]',
    "a surrogate in UTF-8": b'["\xed\xa0\x80"]',
    "Latin-1": b'["\xe9"]',
    "beyond Unicode": b'["\xf4\x90\x80\x80"]',
    "gzip": gzip.compress(E1),
}
for encoding in ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-8-sig"]:
    BYTES_NOT_JSON[encoding] = E1.decode().encode(encoding)

# A body and where its faults are.
NO_EVENTS = text_table("""
    an empty list                | []                           | 0
    an empty list of events      | {"events":[]}                | 0
    two empty lists              | [] []                        | 0
    events: null                 | {"events":null}              | 0 events
    events: a number             | {"events":5}                 | 0 events
    events: a string             | {"events":"x"}               | 0 events
    events: an object            | {"events":{}}                | 0 events
    null                         | null                         | 0
    a number                     | 5                            | 0
    true                         | true                         | 0
    a string                     | "text"                       | 0
    NaN                          | NaN                          | 0
    a list in a list             | [[<1>]]                      | 0
    a number behind an event     | <1>5                         | 1
    values among events          | [<1>,<2>] 1 <3> null         | 2, 4
    events: a number, behind two | [<1>,<2>]{"events":1}        | 2 events
""")
NO_EVENTS["events in a list"] = (
    '[{"events":[<1>]}]',
    "0 topic, 0 event_id, 0 timestamp, 0 source, 0 payload",
)

# Eleven candidates each, for a queue of ten.
TOO_MANY = {
    "a list": b"[" + b"1," * 10 + b"1]",
    "objects": b"{}" * 11,
    "a list of events": b'{"events":[' + b"[]," * 10 + b"[]]}",
}

# A text, its topic, and where the faults are.
UNUSABLE_TEXTS = {
    "nothing": ("", "t", ["0"]),
    "blank lines": ("\n\r\n \n", "t", ["0"]),
    "a blank topic": ("a\n\nb", "", ["0 topic", "1 topic"]),
}

# What a random body is spoilt with.
SCRAPS = rb"""
    {} [ ] , } { : \ " 0 null NaN -1 1e999 "\ud800" "a" "events": "topic": "payload":{"a":
""".split()
SCRAPS += [b" ", b"\x00", b"\xff", '"é"'.encode()]


def spoilt_body(rng):
    """A good body in which up to three places were overwritten with scraps."""
    good = rng.choice(["<1>", "<1><2>", "[<1>]", '{"events":[<1>]}'])
    body = bytearray(body_of(good))
    for _ in range(rng.randint(0, 3)):
        at = rng.randrange(len(body))
        body[at : at + rng.randint(0, 3)] = rng.choice(SCRAPS)
    return bytes(body)


def written(event):
    """The JSON text that a publisher would send for this event."""
    fields = event._asdict()
    fields["timestamp"] = aggregator.format_timestamp(event.timestamp)
    fields["payload"] = json.loads(event.payload)
    return json.dumps(fields, ensure_ascii=False).encode()


def from_lines(text, topic="t", most=100):
    """The events of plain text: source s, instant 1, ids id:1, id:2 …"""
    return aggregator.events_from_lines(text, topic, "s", 1, "id:{}".format, most)


# ============================================================================
# Helpers of §2 to §4  The index, the store, reading
# ============================================================================

HOUR_US = 3_600_000_000
DAY_US = 24 * HOUR_US
# An index so small that a few hundred events exercise every part of it.
SMALL_INDEX = {"recent_ids": 64, "seen_ids": 256, "shelves": 16, "list_rows": 16}


def event(event_id="1", topic="t", payload='{"n":1}', source="s", timestamp=NOW, sequence=None):
    """A record, as the pipeline hands it to the store."""
    sent = aggregator.Event(topic, str(event_id), timestamp, source, payload, sequence)
    return aggregator.record_of(sent)


def events_of(numbers, **fields):
    """Records with these numbers as ids, a microsecond apart in their timestamps."""
    return [event(number, timestamp=NOW + number, **fields) for number in numbers]


class Clocks:
    """A wall clock, which anybody may set, and a monotonic clock, which nobody can."""

    def __init__(self):
        self.wall_us = NOW
        self._monotonic_us = 0

    def monotonic_us(self):
        return self._monotonic_us

    def wait(self, duration_us):
        """Time passes."""
        self.wall_us += duration_us
        self._monotonic_us += duration_us


def open_store(path, clocks=None, **settings):
    """A store to be used in a `with` statement."""
    monotonic_us = Clocks().monotonic_us if clocks is None else clocks.monotonic_us
    store = aggregator.Store(str(path), aggregator.StoreSettings(**settings), monotonic_us)
    return contextlib.closing(store)


def open_reader(path, **limits):
    """A reader to be used in a `with` statement."""
    return contextlib.closing(aggregator.Reader(str(path), aggregator.ReadLimits(**limits)))


def contradictions(path):
    """The sentences of `check` that do not hold for a store that nobody has open."""
    return [sentence for holds, sentence in aggregator.check_store(str(path)) if not holds]


# The other tests still use this name.
sound = contradictions


@pytest.fixture
def path(tmp_path):
    """Where a test may have its store, which must be sound when the test is over."""
    name = str(tmp_path / "s.db")
    yield name
    assert contradictions(name) == []


@pytest.fixture
def path_of_any_store(tmp_path):
    """The same, for a store that need not be ours."""
    name = str(tmp_path / "s.db")
    yield name
    with contextlib.suppress(aggregator.StoreError):
        assert contradictions(name) == []


@pytest.fixture
def store(path):
    """A store with the usual settings."""
    with open_store(path) as opened:
        yield opened


def kinds_of(store, records, now_us=NOW):
    """Commit these records; the kind of each, in order."""
    answers = answers_of(store.commit(records, now_us), len(records))
    return [answer.kind for answer in answers]


def kind_of(store, record, now_us=NOW):
    """Commit this record; its kind."""
    [kind] = kinds_of(store, [record], now_us)
    return kind


def first_of(store, record, now_us=NOW):
    """Commit this record, which is a repeat; what the index holds of the first."""
    [repeat] = store.commit([record], now_us).repeats
    return repeat.first


def retain(store, now_us):
    """Let retention work until it has nothing left to do."""
    while store.tidy(now_us):
        pass


def stats_of(path):
    """The statistics that a new reader finds."""
    with open_reader(path) as reader:
        return reader.stats()


def events_in(page):
    """The events of a page, as dictionaries."""
    return json.loads(f"[{page.text}]")


def stored_ids(path, **query):
    """The ids of the first 1,000 events that a query finds, in its order."""
    with open_reader(path) as reader:
        page = reader.page(aggregator.EventQuery(limit=1000, **query))
    return [found["event_id"] for found in events_in(page)]


def pages_of(reader, query):
    """Every page of a query, each begun where the one before ended."""
    page = reader.page(query)
    yield page
    while page.next is not None:
        page = reader.page(query._replace(after=page.next))
        yield page


# ---- Answers


class StoreAnswer(NamedTuple):
    """What a publisher is told of an event: its kind, and the seq of the first."""

    kind: str
    seq: int


def answers_of(decision, count):
    """The answer to each of the `count` events of a decision, in order."""
    repeats = {repeat.index: repeat for repeat in decision.repeats}
    answers = []
    next_seq = decision.first_seq
    for index in range(count):
        if index in repeats:
            repeat = repeats[index]
            answers.append(StoreAnswer(repeat.kind, repeat.first.seq))
        else:
            answers.append(StoreAnswer("new", next_seq))
            next_seq += 1
    return answers


# ---- What `decide` is asked, in words: a1 is the event with id a and content 1


def record_in_words(word):
    """`a1` as a record."""
    event_id, content = word
    return event(event_id, payload='{"n":%s}' % content)


def records_in_words(words):
    """`a1 b1` as records; `-` is none."""
    return [record_in_words(word) for word in words.split() if word != "-"]


def known_in_words(words):
    """`a1=3` as what the index holds: a with content 1 is known, with seq 3."""
    known = {}
    for word in words.split():
        if word != "-":
            name, seq = word.split("=")
            record = record_in_words(name)
            first = aggregator.Known(int(seq), record.fingerprint, NOW - 5, "seen")
            known[record.key] = first
    return known


def decision_in_words(decision, count):
    """`new:8 dup:8 con:8`: the kind of each event, and the seq it has or repeats."""
    answers = answers_of(decision, count)
    return " ".join(f"{answer.kind[:3]}:{answer.seq}" for answer in answers) or "-"


# What is known, a batch, and what is decided where 7 is the last seq given out.
DECISIONS = text_table("""
    nothing at all              | -         | -              | -
    all are new                 | -         | a1 b1 c1       | new:8 new:9 new:10
    a repeat                    | a1=3      | a1             | dup:3
    the id with other content   | a1=3      | a2             | con:3
    another id                  | b1=3      | a1             | new:8
    twice in the batch          | -         | a1 b1 a1       | new:8 new:9 dup:8
    three times in the batch    | -         | a1 a1 a1       | new:8 dup:8 dup:8
    other content in the batch  | -         | a1 a2          | new:8 con:8
    the first content stays     | -         | a1 a2 a2 a1    | new:8 con:8 con:8 dup:8
    a conflict teaches nothing  | a1=3      | a2 a2 a1       | con:3 con:3 dup:3
    repeats take no seq         | a1=3 b1=5 | a1 c1 b1 c1 d1 | dup:3 new:8 dup:5 dup:8 new:9
""")

# What else the second of two events has, and what it is then.
SAME_IDENTITY = {
    "nothing else": ({}, "duplicate"),
    "another payload": ({"payload": '{"n":2}'}, "conflict"),
    "another source": ({"source": "other"}, "conflict"),
    "another timestamp": ({"timestamp": NOW + 1}, "duplicate"),
    "another sequence": ({"sequence": 5}, "duplicate"),
    "another topic": ({"topic": "u"}, "new"),
    "another id": ({"event_id": "2"}, "new"),
}

# Keys are on disk, so they must never change.
KEYS = text_table("""
    door 1        | door | 1   | 8b68e835fba8ca613ac95b54b33a7265
    door 2        | door | 2   | 064ec0c58c08b40d360fd2fa249d9522
    door 3        | door | 3   | e006731145b310b1cf9571af467bcc4a
    door 5        | door | 5   | 694e2f6276b44d96e1703c3bef06646f
    a colon later | a    | b:c | b2a3ac46d030c038f1ada2bab2e5dca8
    a colon first | a:b  | c   | 8d3846c247ba1c199af4e4d7cfe9636c
""")


# ---- The oracle


class First(NamedTuple):
    """What the model remembers of an identity: its first event, and its seq."""

    seq: int
    record: NamedTuple
    arrived_us: int


class Model:
    """What a naive and plainly correct store answers: a dict that forgets nothing."""

    def __init__(self):
        self.firsts = {}
        self.unique = 0
        self.repeated = 0

    def commit(self, batch, now_us):
        """An answer for each event of the batch."""
        return [self._answer(record, now_us) for record in batch]

    def _answer(self, record, now_us):
        identity = (record.topic, record.event_id)
        first = self.firsts.get(identity)
        if first is None:
            self.unique += 1
            self.firsts[identity] = First(self.unique, record, now_us)
            return StoreAnswer("new", self.unique)
        self.repeated += 1
        if (first.record.source, first.record.payload) == (record.source, record.payload):
            return StoreAnswer("duplicate", first.seq)
        return StoreAnswer("conflict", first.seq)

    def seq_of(self, identity):
        """The seq of an identity; None if it was never seen."""
        first = self.firsts.get(identity)
        return None if first is None else first.seq

    def kept(self, now_us, max_per_topic=0, retention_us=0):
        """The seqs that are left when retention has nothing left to do. 0 keeps all."""
        topics = {}
        for first in self.firsts.values():
            if not retention_us or first.arrived_us >= now_us - retention_us:
                topics.setdefault(first.record.topic, []).append(first)
        kept = []
        for firsts in topics.values():
            firsts.sort(key=lambda first: (first.record.timestamp, first.seq))
            if max_per_topic:
                firsts = firsts[-max_per_topic:]
            kept += [first.seq for first in firsts]
        return sorted(kept)


class OurStore:
    """Our store behind the methods that the model has."""

    def __init__(self, path, **settings):
        self.path = path
        self.settings = settings
        self.clocks = Clocks()
        self.store = aggregator.Store(
            path,
            aggregator.StoreSettings(full_sync=False, **settings),
            self.clocks.monotonic_us,
        )

    def commit(self, batch, now_us):
        """An answer for each event of the batch."""
        self.clocks.wait(now_us - self.clocks.wall_us)
        return answers_of(self.store.commit(batch, now_us), len(batch))

    def seq_of(self, identity):
        """The seq of an identity; None if it was never seen."""
        return self.store.locate(*identity)

    def received(self):
        """How many events were decided."""
        return self.store.received()

    def keep_house(self, now_us):
        """What a store does when nothing is published."""
        self.clocks.wait(now_us - self.clocks.wall_us)
        self.store.tidy(now_us)

    def kept(self, now_us):
        """The seqs that are left when retention has nothing left to do."""
        self.clocks.wait(now_us - self.clocks.wall_us)
        retain(self.store, now_us)
        found = self.store.db.execute("SELECT seq FROM processed_events ORDER BY seq")
        return [seq for (seq,) in found]

    def reopened(self):
        """The same file, opened anew."""
        self.close()
        return OurStore(self.path, **self.settings)

    def close(self):
        self.store.close()


class UniqueStore:
    """Rung 2 of the ladder: UNIQUE, and let the INSERT fail."""

    def __init__(self, path):
        self.path = path
        self.db = sqlite3.connect(path, isolation_level=None)
        self.db.execute("PRAGMA synchronous=OFF")
        self.db.execute(
            """
            CREATE TABLE IF NOT EXISTS events(
                seq INTEGER PRIMARY KEY AUTOINCREMENT,
                topic TEXT NOT NULL,
                event_id TEXT NOT NULL,
                source TEXT NOT NULL,
                payload TEXT NOT NULL,
                UNIQUE(topic, event_id)
            )
            """
        )
        self.db.execute("CREATE TABLE IF NOT EXISTS received(events INTEGER NOT NULL)")

    def commit(self, batch, now_us):
        """An answer for each event of the batch."""
        self.db.execute("BEGIN IMMEDIATE")
        try:
            answers = [self._answer(record) for record in batch]
            self.db.execute("INSERT INTO received VALUES(?)", (len(batch),))
        except sqlite3.Error as error:
            self.db.execute("ROLLBACK")
            raise aggregator.StoreFailed(str(error))
        self.db.execute("COMMIT")
        return answers

    def _answer(self, record):
        values = record._asdict()
        try:
            inserted = self.db.execute(
                """
                INSERT INTO events(topic, event_id, source, payload)
                VALUES(:topic, :event_id, :source, :payload)
                """,
                values,
            )
            return StoreAnswer("new", inserted.lastrowid)
        except sqlite3.IntegrityError:
            first = self.db.execute(
                """
                SELECT seq, source, payload
                FROM events
                WHERE topic = :topic AND event_id = :event_id
                """,
                values,
            ).fetchone()
            if first is None:
                raise
        seq, source, payload = first
        if (source, payload) == (record.source, record.payload):
            return StoreAnswer("duplicate", seq)
        return StoreAnswer("conflict", seq)

    def seq_of(self, identity):
        """The seq of an identity; None if it was never seen."""
        found = self.db.execute(
            "SELECT seq FROM events WHERE topic = ? AND event_id = ?", identity
        ).fetchone()
        return None if found is None else found[0]

    def keep_house(self, now_us):
        """Nothing: this store has no retention."""

    def remove(self, seqs):
        """Delete events to save space, as a table with UNIQUE has to."""
        for seq in seqs:
            self.db.execute("DELETE FROM events WHERE seq = ?", (seq,))

    def received(self):
        """How many events were decided."""
        [total] = self.db.execute("SELECT ifnull(sum(events), 0) FROM received").fetchone()
        return total

    def reopened(self):
        """The same file, opened anew."""
        self.close()
        return UniqueStore(self.path)

    def close(self):
        self.db.close()


MODEL_SEEDS = range(int(os.environ.get("MODEL_SEEDS", "3")))
MODEL_STEPS = int(os.environ.get("MODEL_STEPS", "400"))

# How a small store keeps less than all.
RETENTIONS = {
    "all": {},
    "15 events of a topic": {"max_per_topic": 15},
    "the last 40 us": {"retention_us": 40},
}


def our_small_store(path, **retention):
    """Our store with a small index, and with a clock that is believed at once."""
    return OurStore(path, **SMALL_INDEX, clock_settles_us=0, **retention)


# Every store that has to answer as the model does.
STORES = {
    "UNIQUE": UniqueStore,
    "our store": OurStore,
    "our small store": our_small_store,
    "of few events": lambda path: our_small_store(path, max_per_topic=15),
    "of a short past": lambda path: our_small_store(path, retention_us=40),
    "of few events and a short past": lambda path: our_small_store(
        path, max_per_topic=15, retention_us=40
    ),
}


def live_through(rng, store, model, steps):
    """Random work, in which the store has to answer as the model does.

    Repeats of any age, conflicts, batches that fail, questions, quiet moments, and
    reopening. Returns the store, and the time at the end.
    """
    now_us = NOW
    for _ in range(steps):
        now_us += rng.randrange(3)
        batch = random_batch(rng, model.firsts, now_us)
        action = rng.random()
        if action < 0.05:
            store = store.reopened()
            assert store.received() == model.unique + model.repeated
        elif action < 0.1:
            store.keep_house(now_us)
        elif action < 0.15:
            identity = (batch[0].topic, batch[0].event_id)
            assert store.seq_of(identity) == model.seq_of(identity)
        elif action < 0.25:
            batch.insert(rng.randrange(len(batch) + 1), unstorable_event())
            with pytest.raises(aggregator.StoreFailed):
                store.commit(batch, now_us)
        else:
            assert store.commit(batch, now_us) == model.commit(batch, now_us)
    return store, now_us


def random_batch(rng, firsts, now_us):
    """Events of which 40 in 100 repeat one of any age, some with other content."""
    batch = []
    for _ in range(rng.choice([1, 2, 20, 100])):
        if firsts and rng.random() < 0.4:
            topic, event_id = rng.choice(list(firsts))
        else:
            topic = rng.choice("abé")
            event_id = "%x" % rng.getrandbits(rng.choice([7, 40]))
        payload = '{"n":1}' if rng.random() < 0.1 else '{"n":0}'
        batch.append(event(event_id, topic, payload, timestamp=now_us - rng.randrange(50)))
    return batch


def unstorable_event():
    """A record that no validated event can look like."""
    return event("broken")._replace(source=None)


# How somebody sets the wall clock.
CLOCK_STEPS = {
    "not at all": 0,
    "ten minutes ahead": HOUR_US // 6,
    "a year ahead": 365 * DAY_US,
    "ten minutes back": -HOUR_US // 6,
    "a year back": -365 * DAY_US,
}


# ---- What sources left out


class SequenceModel:
    """The numbers of one source that are missing, told by a set of those that came."""

    def __init__(self):
        self.come = set()

    def commit(self, numbers):
        """Note the numbers of a batch. What is below the first was never expected."""
        if numbers and not self.come:
            self.come = set(range(min(numbers)))
        self.come |= set(numbers)

    def missing(self):
        """All numbers below the newest that have not come."""
        if not self.come:
            return set()
        return set(range(max(self.come))) - self.come


def numbered_batch(rng, first_id):
    """Events of two sources, with numbers that come late, twice, or not at all."""
    batch = []
    for event_id in range(first_id, first_id + rng.choice([1, 5, 60])):
        source = rng.choice("ab")
        number = rng.choice([rng.randrange(100, 400), 100 + event_id])
        sequence = rng.choice([number, number, None])
        batch.append(event(event_id, source=source, sequence=sequence))
    return batch


def numbers_of(batch, source):
    """The sequence numbers that a batch has for a source."""
    numbers = []
    for record in batch:
        if record.source == source and record.sequence is not None:
            numbers.append(record.sequence)
    return numbers


def numbers_in(ranges):
    """All numbers of ranges [first, last]."""
    numbers = set()
    for first, last in ranges:
        numbers.update(range(first, last + 1))
    return numbers


# What a source has that left nothing out.
NO_GAPS = {"missing": [], "missing_count": 0, "given_up": 0}


def gaps_of(reader):
    """What the reader says of each source that left numbers out, by source."""
    return {found["source"]: found for found in reader.gaps(None, 10)}


# ---- Statements that fail, and processes that die


def one_line(statement):
    """SQL without its line breaks."""
    return " ".join(statement.split())


class FaultyConnection(sqlite3.Connection):
    """A connection of which one statement fails: the `countdown`-th that is run."""

    countdown = 0

    def execute(self, statement, *values):
        if self.countdown and not statement.startswith("ROLLBACK"):
            self.countdown -= 1
            if not self.countdown:
                raise sqlite3.OperationalError("disk I/O error")
        return super().execute(statement, *values)


@pytest.fixture
def faulty_connections(monkeypatch):
    """Makes every connection one that can be told to fail."""
    connect = sqlite3.connect

    def connect_faulty(path, **options):
        return connect(path, factory=FaultyConnection, **options)

    monkeypatch.setattr(sqlite3, "connect", connect_faulty)


# Commits batches of seven until it kills itself: before or after the countdown-th
# statement that begins with the given words. It prints a line for each commit.
CRASHING_PROGRAM = """
import functools, os, signal, sqlite3, sys
folder, path, when, words, countdown = sys.argv[1:]
sys.path.insert(0, folder)
import aggregator

countdown = int(countdown)

class DeadlyConnection(sqlite3.Connection):
    def execute(self, statement, *values):
        self.die_if_due("before", statement)
        result = super().execute(statement, *values)
        self.die_if_due("after", statement)
        return result

    def die_if_due(self, now, statement):
        global countdown
        statement = " ".join(statement.replace("OR ROLLBACK", "").split())
        if now == when and statement.startswith(words):
            countdown -= 1
            if countdown == 0:
                os.kill(os.getpid(), signal.SIGKILL)

sqlite3.connect = functools.partial(sqlite3.connect, factory=DeadlyConnection)
small = dict(recent_ids=64, seen_ids=128, shelves=16, list_rows=16)
settings = aggregator.StoreSettings(max_per_topic=25, **small)
store = aggregator.Store(path, settings)
for second in range(300):
    batch = []
    for number in range(second * 7, second * 7 + 7):
        event = aggregator.Event("t", str(number), second, "s", "{}")
        batch.append(aggregator.record_of(event))
    store.commit(batch, second)
    print(second, flush=True)
"""

# When the process dies: before or after a statement, how it begins, and how often it
# may have run by then (the start runs some of them once only).
CRASHES = text_table("""
    before the events are written   | before | INSERT INTO processed_events | 39
    after the events are written    | after  | INSERT INTO processed_events | 39
    after the keys are learned      | after  | INSERT INTO recent.ids       | 39
    after counting                  | after  | INSERT INTO stats            | 39
    before a slice is moved         | before | INSERT INTO seen             | 39
    between the halves of a move    | after  | INSERT INTO seen             | 39
    after a slice left recent.ids   | after  | DELETE FROM recent.ids       | 39
    after a slice got its mark      | after  | UPDATE progress              | 39
    before a shelf is moved         | before | INSERT INTO archive          | 39
    between the halves of its move  | after  | INSERT INTO archive          | 39
    after a shelf left `seen`       | after  | DELETE FROM seen             | 39
    while the archive gets its mark | before | UPDATE progress              | 160
    before the listing is fed       | before | INSERT INTO listing          | 39
    after the times are fed         | after  | INSERT INTO by_time          | 39
    after rows left the listing     | after  | DELETE FROM listing          | 39
    after rows left the log         | after  | DELETE FROM processed_events | 39
    before the commit               | before | COMMIT                       | 39
    after the commit                | after  | COMMIT                       | 39
    before the file is made         | before | BEGIN EXCLUSIVE              | 2
    while the file is made          | after  | PRAGMA user_version=         | 1
    after the memory is attached    | after  | ATTACH                       | 1
""")


def crash(path, when, words, countdown):
    """Run the crashing program; how many of its commits were acknowledged."""
    command = [sys.executable, "-c", CRASHING_PROGRAM, HERE, path, when, words, str(countdown)]
    child = subprocess.run(command, capture_output=True, timeout=60, check=False)
    assert child.returncode == -signal.SIGKILL, child.stderr.decode()
    return len(child.stdout.split())


# ---- What a store holds

TABLES = [
    "processed_events",
    "recent.ids",
    "seen",
    "archive",
    "listing",
    "by_time",
    "progress",
    "stats",
    "sequences",
]


def rows_of(store, table):
    """All rows of a table, in order."""
    return sorted(store.db.execute(f"SELECT * FROM {table}").fetchall())


def everything_in(store):
    """All rows of all tables, and what the writer keeps in variables."""
    found = {table: rows_of(store, table) for table in TABLES}
    found["last seq"] = store.last_seq
    found["recent keys"] = store.index.recent_count
    found["next slice"] = store.index.next_slice
    found["archive mark"] = store.index.archive_mark
    return found


class Move(NamedTuple):
    """What a commit moved from recent.ids to `seen`."""

    slices: int
    keys: int


def commit_and_watch(store, records):
    """Commit new records; what was moved."""
    index = store.index
    slice_before = index.next_slice
    keys_before = index.recent_count
    store.commit(records, NOW)
    slices = (index.next_slice - slice_before) % aggregator.SLICES
    return Move(slices, keys_before + len(records) - index.recent_count)


def pages_touched(rng, keys, pages):
    """On how many of so many pages random keys fall."""
    return len({rng.randrange(pages) for _ in range(keys)})


# ---- Files


@contextlib.contextmanager
def as_somebody_else():
    """Root gives up its rights for a while, because nothing is read-only for root."""
    if os.geteuid() != 0:
        yield
        return
    os.setresuid(65534, 65534, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


def damaged(rng, whole):
    """A copy of the bytes of a store in which up to 50 places are overwritten."""
    data = bytearray(whole)
    for _ in range(rng.choice([1, 1, 5, 50])):
        at = rng.randrange(100, len(data))
        size = rng.choice([1, 8, 100, 4096])
        noise = rng.getrandbits(8 * size).to_bytes(size, "big")
        data[at : at + size] = rng.choice([b"\0" * size, noise])
    return bytes(data[: len(whole)])


def bytes_of_a_store(path):
    """The file of a store in which every table has rows."""
    with open_store(path, **SMALL_INDEX) as store:
        for start in range(0, 1500, 50):
            batch = []
            for number in range(start, start + 50):
                topic = "b" if number % 2 else "a"
                sequence = number * number
                batch.append(event(number, topic, timestamp=NOW + number, sequence=sequence))
            store.commit(batch, NOW + start)
    with open(path, "rb") as file:
        return file.read()


def writes_to(store):
    """Calls of which the pipeline takes any failure."""
    again = [event(number, "a", sequence=number) for number in range(0, 3000, 7)]
    return [lambda: store.commit(again, NOW), lambda: store.tidy(NOW + 2000)]


def reads_from(store, reader):
    """Calls that may fail with StoreFailed and in no other way."""
    by_topic = aggregator.EventQuery("a")
    by_source = aggregator.EventQuery(source="s", descending=True)
    return [
        lambda: store.probe(0, NOW),
        lambda: store.locate("a", "10"),
        lambda: reader.stats(),
        lambda: reader.event(20),
        lambda: reader.gaps(None, 10),
        lambda: reader.tail(aggregator.EventQuery(), 10),
        lambda: reader.page(by_topic),
        lambda: reader.page(by_source),
    ]


def failures_of(calls):
    """How many of these calls fail: with StoreFailed, which must have a message."""
    failed = 0
    for call in calls:
        try:
            call()
        except aggregator.StoreFailed as error:
            assert str(error)
            failed += 1
    return failed


def failures_of_any_kind(calls):
    """How many of these calls raise anything at all."""
    failed = 0
    for call in calls:
        try:
            call()
        except Exception:
            failed += 1
    return failed


def wal_bytes(path):
    return os.path.getsize(path + "-wal")


def fill_wal(store, numbers):
    """Commit 20 KB for each number; how large the WAL is then."""
    for number in numbers:
        store.commit([event(number, payload='{"x":"%s"}' % ("y" * 20_000))], NOW)
    return wal_bytes(store.path)


class WatchedConnection:
    """A connection that counts checkpoints, and fails them while it is told to."""

    def __init__(self, db):
        self.checkpoints = 0
        self.fails = False
        self._db = db

    def __getattr__(self, name):
        return getattr(self._db, name)

    def execute(self, statement, *values):
        if "wal_checkpoint" in statement:
            self.checkpoints += 1
            if self.fails:
                raise sqlite3.OperationalError("disk I/O error")
        return self._db.execute(statement, *values)


# Queries for the three rare events among a hundred.
UNINDEXED_QUERIES = {
    "by source": aggregator.EventQuery(source="rare"),
    "by the beginning of a topic": aggregator.EventQuery(topic="b/", prefix=True),
    "by source, latest first": aggregator.EventQuery(source="rare", descending=True),
}


def as_version(path, version):
    """Take from a store what later versions of the schema added."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("INSERT INTO seen SELECT * FROM archive")
        db.execute("DROP TABLE archive")
        db.execute("DELETE FROM progress WHERE part = 'archive'")
        if version < 3:
            db.execute("DROP TABLE about")
        db.execute(f"PRAGMA user_version={version}")


# ---- Erasing

# Six events: their id is their place in time.
ERASABLE = {"0": "a", "1": "a/b", "2": "a", "3": "b", "4": "a/c", "5": "a"}

# Which events are erased, and which are left.
ERASURES = {
    "a topic": ({"topic": "a", "prefix": False, "until_us": None}, "134"),
    "all topics that begin so": ({"topic": "a", "prefix": True, "until_us": None}, "3"),
    "a topic until an instant": ({"topic": "a", "prefix": False, "until_us": NOW + 2}, "12345"),
    "a beginning until an instant": ({"topic": "a/", "prefix": True, "until_us": NOW + 4}, "02345"),
    "a topic that is not there": ({"topic": "c", "prefix": False, "until_us": None}, "012345"),
}


def erasable_batch():
    """The six events."""
    batch = []
    for event_id, topic in ERASABLE.items():
        batch.append(event(event_id, topic, timestamp=NOW + int(event_id)))
    return batch


def erase_all(store, which):
    """Erase until nothing is left to erase; after each step, how many events it was."""
    erasure = store.begin_erasing(**which)
    steps = []
    while not erasure.is_done:
        erasure = store.go_on_erasing(erasure)
        steps.append(erasure.events)
    return steps


def is_in_a_file_of(path, text):
    """Whether a file of a store holds this text."""
    for ending in ("", "-wal"):
        with open(path + ending, "rb") as file:
            if text.encode() in file.read():
                return True
    return False


# ---- Counts by time


COUNT_QUERIES = {
    "all": {},
    "by topic": {"by_topic": True},
    "of a topic": {"topic": "a"},
    "of topics that begin so": {"topic": "a", "prefix": True},
    "of these, by topic": {"topic": "a", "prefix": True, "by_topic": True},
    "of a source": {"source": "s1"},
    "of a source, by topic": {"source": "s1", "by_topic": True},
    "of local hours": {"offset_us": 30 * MINUTE_US},
}


def counts_by_hand(records, query):
    """What `Reader.counts` should say, event by event."""
    found = {}
    for record in records:
        in_time = query.since <= record.timestamp < query.until
        of_source = query.source in (None, record.source)
        if in_time and of_source and query.wants(record.topic):
            topic = record.topic if query.by_topic else None
            start_us = record.timestamp - (record.timestamp + query.offset_us) % query.span_us
            found[start_us, topic] = found.get((start_us, topic), 0) + 1
    return [aggregator.EventCount(*place, events) for place, events in sorted(found.items())]


def scattered_events(rng, count):
    """Events of a few topics and sources, within some hours."""
    batch = []
    for number in range(count):
        topic = rng.choice(["a", "a/b", "b", "é"])
        timestamp = NOW + rng.randrange(300) * MINUTE_US
        batch.append(event(number, topic, source=rng.choice(["s1", "s2"]), timestamp=timestamp))
    return batch


# What is looked for in a payload, and which of these payloads have it.
SEARCHABLE = [
    '{"m":"red door"}',
    '{"m":"Red"}',
    r'{"m":"a 100% \"red\" é"}',
    '{"door":1}',
]
SEARCHES = {
    "a word": ("red", [0, 2]),
    "a capital letter": ("Red", [1]),
    "a name of a field": ("door", [0, 3]),
    "a percent sign is no wildcard": ("%", [2]),
    "quotes": ('"red"', [2]),
    "a letter of two bytes": ("é", [2]),
    "nothing like it": ("blue", []),
}


# ============================================================================
# Helpers of §3: what stands around the file of a store
# ============================================================================

# A library that is loaded before all others. It makes the N-th write, sync or open of
# the files of a store fail, once.
FAULTS_C = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int fails(const char *what, const char *path) {
    static int seen;
    if (strcmp(what, getenv("FAULT_WHAT")) || !strstr(path, getenv("FAULT_IN"))) return 0;
    if (++seen != atoi(getenv("FAULT_AT"))) return 0;
    errno = atoi(getenv("FAULT_ERRNO"));
    return 1;
}

static int fails_fd(const char *what, int fd) {
    char link[64], path[1024];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t size = readlink(link, path, sizeof path - 1);
    if (size < 0) return 0;
    path[size] = 0;
    return fails(what, path);
}

#define REAL(name) dlsym(RTLD_NEXT, name)

ssize_t write(int fd, const void *data, size_t size) {
    ssize_t (*real)(int, const void *, size_t) = REAL("write");
    return fails_fd("write", fd) ? -1 : real(fd, data, size);
}
ssize_t pwrite(int fd, const void *data, size_t size, off_t at) {
    ssize_t (*real)(int, const void *, size_t, off_t) = REAL("pwrite");
    return fails_fd("write", fd) ? -1 : real(fd, data, size, at);
}
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) {
    ssize_t (*real)(int, const void *, size_t, off64_t) = REAL("pwrite64");
    return fails_fd("write", fd) ? -1 : real(fd, data, size, at);
}
int fsync(int fd) {
    int (*real)(int) = REAL("fsync");
    return fails_fd("sync", fd) ? -1 : real(fd);
}
int fdatasync(int fd) {
    int (*real)(int) = REAL("fdatasync");
    return fails_fd("sync", fd) ? -1 : real(fd);
}
static int open_any(const char *name, const char *path, int flags, mode_t mode) {
    int (*real)(const char *, int, ...) = REAL(name);
    return fails("open", path) ? -1 : real(path, flags, mode);
}
int open(const char *path, int flags, ...) {
    va_list rest;
    va_start(rest, flags);
    mode_t mode = va_arg(rest, int);
    va_end(rest);
    return open_any("open", path, flags, mode);
}
int open64(const char *path, int flags, ...) {
    va_list rest;
    va_start(rest, flags);
    mode_t mode = va_arg(rest, int);
    va_end(rest);
    return open_any("open64", path, flags, mode);
}
"""

# Commits events one by one and in groups, and prints the id of each that was
# acknowledged.
FAULTY_WRITER = """
import sys
sys.path.insert(0, sys.argv[1])
import aggregator

try:
    small = {"recent_ids": 32, "seen_ids": 64, "shelves": 16, "list_rows": 16}
    settings = aggregator.StoreSettings(checkpoint_pages=8, **small)
    store = aggregator.Store(sys.argv[2], settings)
except aggregator.StoreError:
    sys.exit(0)
for start in range(0, 60, 3):
    events = [aggregator.Event("t", str(n), n, "s", "{}") for n in range(start, start + 3)]
    try:
        store.commit([aggregator.record_of(event) for event in events], start)
    except aggregator.StoreFailed:
        continue
    for event in events:
        print(event.event_id)
"""

# Leaves what a power cut in the middle of making the tables leaves: a hot journal that
# says "the file was empty", and a file whose pages have not been written.
HALF_MADE = """
import os, sqlite3, sys
db = sqlite3.connect(sys.argv[1], isolation_level=None)
db.execute("PRAGMA cache_size=2")
db.execute("BEGIN IMMEDIATE")
db.execute("CREATE TABLE t(x)")
for n in range(200):
    db.execute("INSERT INTO t VALUES(zeroblob(4000))")
os._exit(1)
"""


@pytest.fixture(scope="session")
def faults_library(tmp_path_factory):
    """The compiled library; skips where nothing can compile or preload it."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if not sys.platform.startswith("linux") or compiler is None:
        pytest.skip("no C compiler here, or no Linux")
    folder = tmp_path_factory.mktemp("faults")
    source = folder / "faults.c"
    source.write_text(FAULTS_C)
    library = str(folder / "faults.so")
    command = [compiler, "-shared", "-fPIC", "-o", library, str(source), "-ldl"]
    built = subprocess.run(command, stderr=subprocess.PIPE, timeout=60)
    if built.returncode != 0:
        pytest.skip("the compiler cannot make the library")
    return library


def damage_listing(path, damaged, sound):
    """Make pages of `listing` unreadable: those with one topic and without another."""
    with open(path, "r+b") as file:
        data = file.read()
        for start in range(0, len(data), 4096):
            page = data[start : start + 4096]
            # 10: a leaf of a table WITHOUT ROWID. The books say "topic" beside a topic.
            if page[0] == 10 and damaged in page and sound not in page and b"topic" not in page:
                file.seek(start)
                file.write(b"\xff" * 4096)


def acknowledged_with_fault(library, path, what, number, error):
    """The ids that a writer acknowledged while its N-th operation of a kind failed."""
    environment = {
        **os.environ,
        "LD_PRELOAD": library,
        "FAULT_WHAT": what,
        "FAULT_AT": str(number),
        "FAULT_IN": os.path.basename(path),
        "FAULT_ERRNO": str(error),
    }
    done = subprocess.run(
        [sys.executable, "-c", FAULTY_WRITER, HERE, path],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        env=environment,
    )
    assert done.stderr == ""
    return done.stdout.split()


@contextlib.contextmanager
def umask(value):
    before = os.umask(value)
    try:
        yield
    finally:
        os.umask(before)


# ============================================================================
# Helpers of §5  The pipeline
# ============================================================================


def plain(event_id, topic="t", source="s", payload="{}"):
    """An event, as the API hands it to the pipeline."""
    return aggregator.Event(topic, str(event_id), NOW, source, payload)


def plain_events(numbers):
    """Events with these numbers as ids."""
    return [plain(number) for number in numbers]


def in_pipeline(path, body, limits=None, **settings):
    """Run `body(pipeline)` with a pipeline on a store at `path`, and stop it after."""

    def open_the_store():
        return aggregator.Store(path, aggregator.StoreSettings(**settings))

    async def run():
        pipeline_limits = aggregator.PipelineLimits(**(limits or {}))
        pipeline = aggregator.Pipeline(open_the_store, lambda: NOW, pipeline_limits)
        await pipeline.start()
        try:
            return await asyncio.wait_for(body(pipeline), 20)
        finally:
            assert await pipeline.stop(5)

    return asyncio.run(run())


async def one_turn():
    """Let every task that can run do so once."""
    await asyncio.sleep(0)


async def publish_soon(pipeline, events, size=1):
    """Put a batch in the queue; the task that waits for its receipt."""
    task = asyncio.ensure_future(pipeline.publish(events, size))
    await one_turn()
    return task


async def ask_until(pipeline, happened):
    """Ask the pipeline for its books until something has happened."""
    while not happened(await pipeline.stats()):
        pass


def kinds_in(receipt):
    """The kind of each event of a receipt, in order."""
    return [verdict.kind for verdict in receipt.verdicts()]


def answers_in(receipt):
    """The answer to each event of a receipt, in order."""
    return [StoreAnswer(verdict.kind, verdict.seq) for verdict in receipt.verdicts()]


class Gate:
    """Holds each commit in the writer's thread until opened, and fails it on demand.

    The store behind it is the real one.
    """

    def __init__(self, pipeline):
        self.failure = None
        self.groups = []  # how many events each commit had
        self._opened = threading.Event()
        self._reached = threading.Event()
        self._commit = pipeline._store.commit
        pipeline._store.commit = self._commit_when_open

    def open(self):
        """Let this commit through, and all later ones."""
        self._opened.set()

    async def reached(self):
        """Return when a commit stands at the gate."""
        loop = asyncio.get_running_loop()
        assert await loop.run_in_executor(None, self._reached.wait, 10)

    def _commit_when_open(self, records, now_us):
        self._reached.set()
        assert self._opened.wait(10)
        self.groups.append(len(records))
        if self.failure is not None:
            raise self.failure
        return self._commit(records, now_us)


class SlowCall:
    """A method of the store that waits in the writer's thread until opened."""

    def __init__(self, pipeline, name):
        self.calls = 0
        self._opened = threading.Event()
        self._call = getattr(pipeline._store, name)
        setattr(pipeline._store, name, self._call_when_open)

    def open(self):
        """Let this call through, and all later ones."""
        self._opened.set()

    async def reached(self):
        """Return when a call waits."""
        while not self.calls:
            await asyncio.sleep(0.001)

    def _call_when_open(self, *arguments):
        self.calls += 1
        assert self._opened.wait(10)
        return self._call(*arguments)


COMMIT_FAILURES = {
    "a full disk": aggregator.StoreFailed("disk full"),
    "a bug": ValueError("a bug"),
    "no memory": MemoryError(),
}

# How a batch of five may have been cut into the batches of three publishers.
GROUP_SIZES = {
    "the first has all": [5, 0, 0],
    "each has some": [2, 1, 2],
    "the last has all": [0, 0, 5],
}


# ============================================================================
# Helpers of §6  HTTP
# ============================================================================

# Bytes of the largest body that the parsers of these tests take.
MAX_BODY = 1000

GET = b"GET / HTTP/1.1\r\nHost: h\r\n"
POST = b"POST /p HTTP/1.1\r\nHost: h\r\n"
CHUNKED_POST = POST + b"Transfer-Encoding: chunked\r\n\r\n"
EXPECT_CONTINUE = b"Expect: 100-continue"
# Behind a request line: all that HTTP/1.1 asks for.
HOST_AND_END = b"\r\nHost: h\r\n\r\n"


class Seen(NamedTuple):
    """What a test looks at of a request that came out of the parser."""

    method: str
    path: tuple
    body: bytes


class Outcome(NamedTuple):
    """The requests that came out, and the problem that ended it, if any."""

    seen: list
    # Its name in PROBLEMS, or None.
    problem: object


ROOT = Seen("GET", ("",), b"")
HELLO = Seen("POST", ("p",), b"hello")
EMPTY_POST = Seen("POST", ("p",), b"")
FULL_POST = Seen("POST", ("p",), b"x" * MAX_BODY)
# A request that follows another on the same connection.
NEXT = b"PUT /next?a=1 HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\n\r\nok"
NEXT_SEEN = Seen("PUT", ("next",), b"ok")


def get_request(*fields):
    return GET + b"".join(field + b"\r\n" for field in fields) + b"\r\n"


def post_request(*fields, body=b""):
    return POST + b"".join(field + b"\r\n" for field in fields) + b"\r\n" + body


def post_coded(body, coding):
    return post_request(
        b"Content-Encoding: " + coding, b"Content-Length: %d" % len(body), body=body
    )


def post_gzip(body):
    return post_coded(body, b"gzip")


def post_deflate(body):
    return post_coded(body, b"deflate")


def bare_deflate(body, level=-1, wbits=-15, strategy=zlib.Z_DEFAULT_STRATEGY):
    """A deflate stream; negative `wbits` leave out the header and checksum of zlib."""
    stream = zlib.compressobj(level, zlib.DEFLATED, wbits, 8, strategy)
    return stream.compress(body) + stream.flush()


def padded(size):
    """A head of `size` bytes, without the empty line that ends it."""
    line = b"a: " + b"x" * 995 + b"\r\n"
    lines = GET + line * ((size - len(GET)) // 1000 - 1)
    return lines + b"b: " + b"y" * (size - len(lines) - 3)


def bytes_of(raw):
    """`raw`, a byte a piece."""
    return [raw[at : at + 1] for at in range(len(raw))]


def feeds(raw):
    """Whole, byte by byte, and in two pieces, split everywhere.

    What is long is split at about 200 places.
    """
    yield [raw]
    yield bytes_of(raw)
    for cut in range(1, len(raw), 1 + len(raw) // 200):
        yield [raw[:cut], raw[cut:]]


def outcome(pieces, parser=None):
    """What a parser makes of bytes that come in these pieces."""
    if parser is None:
        parser = aggregator.RequestParser(MAX_BODY)
    seen = []
    for piece in pieces:
        parser.feed(piece)
        try:
            for request in iter(parser.next_request, None):
                assert type(request) is aggregator.Request
                seen.append(Seen(request.head.method, request.head.path, request.body))
        except aggregator.HTTPError as error:
            assert error.problem in aggregator.PROBLEMS
            assert error.detail.isascii()
            return Outcome(seen, error.problem)
    return Outcome(seen, None)


def head_of(raw):
    parser = aggregator.RequestParser(MAX_BODY)
    parser.feed(raw)
    return parser.next_request().head


def inflated(body, coding, max_bytes):
    """A whole body without its coding, without a break."""
    inflating = aggregator.inflate(body, coding, max_bytes)
    while True:
        try:
            next(inflating)
        except StopIteration as end:
            return end.value


def empty_blocks(count):
    """A bare deflate stream of blocks that hold nothing, eight in ten bytes."""
    # RFC 1951 §3.2.6: not the last, fixed codes (01), end of block (0000000).
    eight = 0
    for number in range(8):
        eight |= 0b010 << 10 * number
    return eight.to_bytes(10, "little") * (count // 8) + b"\x03\x00"


def least_seconds(pieces):
    """The least CPU time of three runs, all of which end with one request."""
    times = []
    for _ in range(3):
        aggregator._parse_kept_head.cache_clear()
        parser = aggregator.RequestParser(10**7)
        start = time.process_time()
        result = outcome(pieces, parser)
        times.append(time.process_time() - start)
        assert result.problem is None
        assert len(result.seen) == 1
    return min(times)


def wire_table(text):
    """A dictionary of cases: name | bytes, with the escapes of a bytes literal.

    A blank at either end is written as \\x20.
    """
    table = {}
    for name, cell in text_table(text).items():
        table[name] = cell.encode("latin-1").decode("unicode_escape").encode("latin-1")
    return table


# ---- Requests that are taken: name -> bytes, what comes out -----------------

GOOD_REQUESTS = {}

for name, raw in wire_table(r"""
    no blank after the colon     | GET / HTTP/1.1\r\nHost:h\r\n\r\n
    blanks around a value        | GET / HTTP/1.1\r\nHost: h\r\nA: \t x \t\r\n\r\n
    an empty value               | GET / HTTP/1.1\r\nHost: h\r\nA:\r\n\r\n
    bytes over 127 in a value    | GET / HTTP/1.1\r\nHost: h\r\nA: caf\xe9 \xff\r\n\r\n
    an empty line before         | \r\nGET / HTTP/1.1\r\nHost: h\r\n\r\n
    no body                      | GET / HTTP/1.1\r\nHost: h\r\n\r\n
    an empty query               | GET /? HTTP/1.1\r\nHost: h\r\n\r\n
    a query against caches       | GET /?_=1 HTTP/1.1\r\nHost: h\r\n\r\n
    HTTP/1.0 without Host        | GET / HTTP/1.0\r\n\r\n
    an unknown minor version     | GET / HTTP/1.2\r\nHost: h\r\n\r\n
""").items():
    GOOD_REQUESTS[name] = (raw, [ROOT])

for name, rest in wire_table(r"""
    a length                     | Content-Length: 5\r\n\r\nhello
    a length with leading zeros  | content-LENGTH:\t0005 \r\n\r\nhello
    identity                     | Content-Encoding: Identity\r\nContent-Length: 5\r\n\r\nhello
    chunked in mixed case        | transfer-encoding: \tChunKED \r\n\r\n5\r\nhello\r\n000\r\n\r\n
""").items():
    GOOD_REQUESTS[name] = (POST + rest, [HELLO])

for name, rest in wire_table(r"""
    chunks                       | 2\r\nhe\r\n003\r\nllo\r\n0\r\n\r\n
    chunk extensions             | 5;a=b;c="d;e"\r\nhello\r\n0 \t;x\r\n\r\n
    trailer fields               | 5\r\nhello\r\n0\r\nContent-Length: 7\r\nA: b\r\n\r\n
""").items():
    GOOD_REQUESTS[name] = (CHUNKED_POST + rest, [HELLO])


def add_good(name, raw, *seen):
    assert name not in GOOD_REQUESTS, f"two cases are named {name}"
    GOOD_REQUESTS[name] = (raw, list(seen))


def add_good_body(name, raw, body):
    add_good(name, raw, Seen("POST", ("p",), body))


add_good(
    "an empty line after a body",
    POST + b"Content-Length: 5\r\n\r\nhello\r\n" + get_request(),
    HELLO,
    ROOT,
)
add_good("an empty line before each", b"\r\n" + get_request() + b"\r\n" + get_request(), ROOT, ROOT)
add_good(
    "three requests",
    get_request() + CHUNKED_POST + b"5\r\nhello\r\n0\r\n\r\n" + get_request(),
    ROOT,
    HELLO,
    ROOT,
)
add_good("the asterisk", b"OPTIONS * HTTP/1.1" + HOST_AND_END, Seen("OPTIONS", ("*",), b""))
add_good(
    "a GET with a body",
    get_request(b"Content-Length: 14") + b"GET / HTTP/1.1",
    Seen("GET", ("",), b"GET / HTTP/1.1"),
)
add_good(
    "the longest request line",
    b"GET /" + b"x" * 7986 + b" HTTP/1.1" + HOST_AND_END,
    Seen("GET", ("x" * 7986,), b""),
)
add_good("the longest head", padded(aggregator.MAX_HEAD_BYTES) + b"\r\n\r\n", ROOT)
add_good("the most fields", get_request(*[b"A: b"] * 99), ROOT)

add_good("a length of zero", post_request(b"Content-Length: 0"), EMPTY_POST)
add_good("the largest body", post_request(b"Content-Length: 1000", body=b"x" * MAX_BODY), FULL_POST)
add_good("no chunk but the last", CHUNKED_POST + b"0\r\n\r\n", EMPTY_POST)
add_good_body(
    "a chunk that holds CR LF", CHUNKED_POST + b"7\r\n\r\n0\r\n\r\n\r\n0\r\n\r\n", b"\r\n0\r\n\r\n"
)
add_good_body(
    "hexadecimal sizes in both cases",
    CHUNKED_POST + b"A\r\nabcdefghij\r\na\r\nabcdefghij\r\n0\r\n\r\n",
    b"abcdefghij" * 2,
)
add_good(
    "chunks that fill the largest body",
    CHUNKED_POST + b"3e7\r\n" + b"x" * 999 + b"\r\n1\r\nx\r\n0\r\n\r\n",
    FULL_POST,
)
add_good_body("many chunks", CHUNKED_POST + b"1\r\nx\r\n" * 150 + b"0\r\n\r\n", b"x" * 150)
add_good(
    "the longest chunk line", CHUNKED_POST + b"5;" + b"x" * 1022 + b"\r\nhello\r\n0\r\n\r\n", HELLO
)
add_good(
    "the most trailer fields", CHUNKED_POST + b"0\r\n" + b"a:b\r\n" * 100 + b"\r\n", EMPTY_POST
)
add_good(
    "the longest trailer section",
    CHUNKED_POST + b"0\r\na:" + b"x" * 4094 + b"\r\nb:" + b"y" * 4094 + b"\r\n\r\n",
    EMPTY_POST,
)

HELLO_GZIP = gzip.compress(b"hello")
HELLO_ZLIB = zlib.compress(b"hello")
HELLO_BARE = bare_deflate(b"hello")
TWO_MEMBERS = gzip.compress(b"he") + gzip.compress(b"") + gzip.compress(b"llo")

add_good("gzip", post_gzip(HELLO_GZIP), HELLO)
add_good("x-gzip in mixed case", post_coded(HELLO_GZIP, b"x-GZip"), HELLO)
add_good("gzip of several members", post_gzip(TWO_MEMBERS), HELLO)
add_good("gzip of the largest body", post_gzip(gzip.compress(b"x" * MAX_BODY)), FULL_POST)
add_good("gzip of nothing", post_gzip(gzip.compress(b"")), EMPTY_POST)
add_good("an empty body called gzip", post_gzip(b""), EMPTY_POST)
add_good("deflate with the zlib header", post_deflate(HELLO_ZLIB), HELLO)
add_good("deflate without the zlib header", post_deflate(HELLO_BARE), HELLO)
add_good("deflate in upper case", post_coded(HELLO_ZLIB, b"DEFLATE"), HELLO)
add_good("deflate of the largest body", post_deflate(zlib.compress(b"x" * MAX_BODY)), FULL_POST)
add_good("bare deflate of the largest body", post_deflate(bare_deflate(b"x" * MAX_BODY)), FULL_POST)
add_good("bare deflate that is only stored", post_deflate(bare_deflate(b"hello", 0)), HELLO)
# RFC 1951 §3.2.4: the bits behind the header of a stored block are ignored. One is set.
STORED_WITH_A_BIT = b"\x08\x05\x00\xfa\xffhello" + bare_deflate(b"")
add_good("bare deflate with a stray bit", post_deflate(STORED_WITH_A_BIT), HELLO)
add_good("deflate of nothing", post_deflate(zlib.compress(b"")), EMPTY_POST)
add_good("an empty body called deflate", post_deflate(b""), EMPTY_POST)

for coding, coded in ((b"gzip", HELLO_GZIP), (b"deflate", HELLO_ZLIB)):
    coded_chunk = b"%x\r\n%b\r\n0\r\n\r\n" % (len(coded), coded)
    add_good(
        coding.decode() + " in chunks",
        post_request(
            b"Transfer-Encoding: chunked", b"Content-Encoding: " + coding, body=coded_chunk
        ),
        HELLO,
    )


# ---- Requests that are refused: name -> problem, bytes ----------------------

REFUSED_REQUESTS = {}


def add_refused(problem, name, raw):
    assert name not in REFUSED_REQUESTS, f"two cases are named {name}"
    REFUSED_REQUESTS[name] = (problem, raw)


def add_refused_table(problem, kind, before, table, after):
    """Each of the cases of the table, between `before` and `after`."""
    for name, cell in table.items():
        add_refused(problem, f"{kind}: {name}", before + cell + after)


LENGTH_IS = POST + b"Content-Length: "
add_refused("bad-request", "length: nothing", LENGTH_IS + b"\r\n\r\nhello")
BAD_LENGTHS = wire_table(r"""
    plus sign                | +5
    minus sign               | -5
    minus zero               | -0
    blank between            | 5 5
    list                     | 5,5
    list with a blank        | 5, 5
    underscore               | 1_0
    hexadecimal              | 0x5
    fraction                 | 5.0
    exponent                 | 5e0
    word                     | five
    superscript in latin-1   | \xb2
    Arabic digit in UTF-8    | \xd9\xa5
    wide digit in UTF-8      | \xef\xbc\x95
    vertical tab behind      | 5\x0b
    form feed before         | \x0c5
    no-break space before    | \xa05
    next line behind         | 5\x85
    quoted                   | "5"
    semicolon                | 5;
    binary                   | 0b101
""")
add_refused_table("bad-request", "length", LENGTH_IS, BAD_LENGTHS, b"\r\n\r\nhello")

CODING_IS = POST + b"Transfer-Encoding: "
add_refused("bad-request", "coding: nothing", CODING_IS + b"\r\n\r\n0\r\n\r\n")
BAD_CODINGS = wire_table(r"""
    letter before            | xchunked
    digits behind            | chunked123
    twice                    | chunked, chunked
    not the last             | chunked, identity
    gzip after it            | chunked, gzip
    identity                 | identity
    gzip alone               | gzip
    parameter                | chunked;q=1
    quoted                   | "chunked"
    comma behind             | chunked,
    comma before             | ,chunked
    unknown before           | x, chunked
    cut off                  | chunke
    blank inside             | chun ked
    vertical tab before      | \x0bchunked
    form feed behind         | chunked\x0c
    no-break space before    | \xa0chunked
    Kelvin sign for k        | chun\xe2\x84\xaaed
    NUL behind               | chunked\x00
    another name             | trailers
""")
add_refused_table("bad-request", "coding", CODING_IS, BAD_CODINGS, b"\r\n\r\n0\r\n\r\n")

add_refused("bad-request", "size: nothing", CHUNKED_POST + b"\r\nhello\r\n0\r\n\r\n")
add_refused(
    "bad-request", "size: 500 digits", CHUNKED_POST + b"1" * 500 + b"\r\nhello\r\n0\r\n\r\n"
)
add_refused("bad-request", "size: line too long", CHUNKED_POST + b"5;" + b"x" * 1023 + b"\r\n")
BAD_CHUNK_SIZES = wire_table(r"""
    blank                    | \x20
    plus sign                | +5
    minus sign               | -5
    minus zero               | -0
    plus zero                | +0
    0x                       | 0x5
    0X                       | 0X5
    underscore               | 5_0
    underscore after zero    | 0_0
    blank behind             | 5\x20
    blank before             | \x205
    tab before               | \t5
    no digit                 | g
    no digit behind          | 5g
    point                    | 5.
    Arabic digit in UTF-8    | \xd9\xa5
    superscript in latin-1   | \xb2
    NUL behind               | 5\x00
    comma                    | 5,
    CR behind                | 5\r
    NUL in the extension     | 5;a\x00
    DEL in the extension     | 5;\x7f
    LF in the extension      | 5;a\nb
    LF behind                | 5\n
    CR after the extension   | 5;a\r
    17 digits of zero        | 00000000000000000
    17 digits                | fffffffffffffffff
""")
add_refused_table("bad-request", "size", CHUNKED_POST, BAD_CHUNK_SIZES, b"\r\nhello\r\n0\r\n\r\n")

BAD_CHUNKS = wire_table(r"""
    no line end              | 5\r\nhello0\r\n\r\n
    LF for its end           | 5\r\nhello\n0\r\n\r\n
    CR for its end           | 5\r\nhello\r0\r\n\r\n
    a byte short             | 5\r\nhell\r\n0\r\n\r\n
    a byte long              | 5\r\nhello!\r\n0\r\n\r\n
    CR CR LF for its end     | 5\r\nhello\r\r\n0\r\n\r\n
    LF CR LF for its end     | 5\r\nhello\n\r\n0\r\n\r\n
    LF after the size        | 5\nhello
    CR after the size        | 5\rhello
    LF before the size       | \n5\r\nhello
    empty line between       | 5\r\nhello\r\n\r\n0\r\n\r\n
    empty line, no last      | 5\r\nhello\r\n\r\n
    LF in the extension      | 5;\nhello\r\n0\r\n\r\n
    CR in the extension      | 5;a\rb\r\nhello\r\n0\r\n\r\n
    blank after the last     | 5\r\nhello\r\n0 \r\n\r\n
    minus zero for the last  | 5\r\nhello\r\n-0\r\n\r\n
""")
add_refused_table("bad-request", "chunk", CHUNKED_POST, BAD_CHUNKS, b"")

BAD_TRAILERS = wire_table(r"""
    blank before the colon   | A : b\r\n\r\n
    folded                   | A: b\r\n c\r\n\r\n
    NUL                      | A: \x00\r\n\r\n
    no colon                 | A\r\n\r\n
    LF for a line end        | A: b\n\r\n
    LF for the empty line    | \n
    CR for the empty line    | \rX
    a second last chunk      | 0\r\n\r\n
    a request                | GET / HTTP/1.1\r\nHost: h\r\n\r\n
    an absolute request      | GET http://h/ HTTP/1.1\r\n\r\n
""")
add_refused_table("bad-request", "trailer", CHUNKED_POST + b"0\r\n", BAD_TRAILERS, b"")

add_refused("bad-request", "line: nothing", HOST_AND_END)
BAD_REQUEST_LINES = wire_table(r"""
    no version               | GET /
    two blanks               | GET  / HTTP/1.1
    blank behind             | GET / HTTP/1.1\x20
    blank before             | \x20GET / HTTP/1.1
    tabs                     | GET\t/\tHTTP/1.1
    four words               | GET / x HTTP/1.1
    letter behind            | GET / HTTP/1.1x
    version in lower case    | GET / http/1.1
    no minor version         | GET / HTTP/1
    two digits               | GET / HTTP/1.10
    no point                 | GET / HTTP/11
    superscript in latin-1   | GET / HTTP/1.\xb2
    blank in the version     | GET / HTTP /1.1
    HTTPS                    | GET / HTTPS/1.1
    NUL in the target        | GET /\x00 HTTP/1.1
    1F in the target         | GET /\x1f HTTP/1.1
    DEL in the target        | GET /\x7f HTTP/1.1
    vertical tab             | GET /\x0b HTTP/1.1
    LF in the target         | GET /\n HTTP/1.1
    CR in the target         | GET /\r HTTP/1.1
    NUL in the method        | G\x00ET / HTTP/1.1
    bracket in the method    | G(T / HTTP/1.1
    latin-1 in the method    | G\xc9T / HTTP/1.1
    no target                | GET HTTP/1.1
    empty target             | GET  HTTP/1.1
    target without slash     | GET x HTTP/1.1
    query only               | GET ?a HTTP/1.1
    asterisk for GET         | GET * HTTP/1.1
    fragment                 | GET /#a HTTP/1.1
    host and port            | GET h:80 HTTP/1.1
    asterisk and letter      | OPTIONS *a HTTP/1.1
    asterisk and query       | OPTIONS *?a HTTP/1.1
    other scheme             | GET ftp://h/ HTTP/1.1
    absolute without host    | GET http:/// HTTP/1.1
    absolute with user       | GET http://a@h/ HTTP/1.1
    port of letters          | GET http://h:x/ HTTP/1.1
    bracket in the host      | GET http://[/ HTTP/1.1
    scheme only              | GET http:// HTTP/1.1
    lone percent             | GET /% HTTP/1.1
    percent and one digit    | GET /%4 HTTP/1.1
    percent and letters      | GET /%zz HTTP/1.1
    percent and plus         | GET /%+4 HTTP/1.1
    percent and blank        | GET /% 4 HTTP/1.1
    percent, Arabic digits   | GET /%\xd9\xa5\xd9\xa5 HTTP/1.1
    encoded FF               | GET /%ff HTTP/1.1
    overlong slash           | GET /%c0%af HTTP/1.1
    surrogate                | GET /%ed%a0%80 HTTP/1.1
    latin-1 in the target    | GET /\xff HTTP/1.1
    query, one digit         | GET /?%f HTTP/1.1
    query, no UTF-8          | GET /?a=%80 HTTP/1.1
""")
add_refused_table("bad-request", "line", b"", BAD_REQUEST_LINES, HOST_AND_END)

BAD_FIELDS = wire_table(r"""
    blank before the colon   | A : b
    tab before the colon     | A\t: b
    no-break space           | A\xa0: b
    blank before the name    | \x20A: b
    tab before the name      | \tA: b
    no name                  | : b
    no colon                 | A
    blank in the name        | A b: c
    brackets in the name     | A(b): c
    latin-1 in the name      | \xc4: b
    NUL in the name          | A\x00: b
    NUL for a value          | A: \x00
    NUL in a value           | A: b\x00c
    01 in a value            | A: \x01
    vertical tab in a value  | A: \x0b
    1F in a value            | A: \x1f
    DEL in a value           | A: \x7f
    LF and blank             | A: b\n c
    LF and a field           | A: b\nC: d
    CR and a field           | A: b\rC: d
    CR behind                | A: b\r
    folded with a blank      | A: b\r\n c
    folded with a tab        | A: b\r\n\tc
    folded, a colon          | A: b\r\n : c
    second Host, equal       | Host: h
    second Host, another     | host: i
    length_                  | Content_Length: 5
    coding_                  | Transfer_Encoding: chunked
    length, blank, colon     | Content-Length : 5
    coding, blank, colon     | Transfer-Encoding : chunked
    length twice             | Content-Length: 5\r\nContent-Length: 5
    two lengths              | Content-Length: 5\r\ncontent-length: 6
    length, coding           | Content-Length: 5\r\nTransfer-Encoding: chunked
    length, empty coding     | Content-Length: 0\r\nTransfer-Encoding:
    coding, length           | Transfer-Encoding: chunked\r\nContent-Length: 5
    coding twice             | Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked
    two codings              | Transfer-Encoding: gzip\r\nTransfer-Encoding: x
    folded coding            | Transfer-Encoding:\r\n chunked
    folded length            | Content-Length: \r\n 5
    coding, identity         | Transfer-Encoding: chunked\r\nTransfer-Encoding: identity
    length, identity         | Content-Length: 5\r\nTransfer-Encoding: identity
    coding, length 0         | Transfer-Encoding: chunked\r\nContent-Length: 0
    length and length_       | Content-Length: 5\r\nContent_Length: 6
    list of lengths          | Content-Length: 5, 5
    coding_ after another    | content-transfer_encoding: 7bit\r\nTransfer_Encoding: x
    length, folded coding    | Content-Length: 5\r\n Transfer-Encoding: chunked
""")
add_refused_table("bad-request", "field", GET, BAD_FIELDS, b"\r\n\r\n")

BAD_HOSTS = wire_table(r"""
    blank                    | a b
    slash                    | a/b
    comma and blank          | a,b, c
    user                     | a@b
    port of letters          | a:b
    two ports                | a:80:80
    URL                      | http://h
    bracket open             | [::1
    no brackets              | ::1
    letter in brackets       | [g]
    latin-1                  | h\xe9
    query                    | a?b
    fragment                 | a#b
    quoted                   | "h"
    backslash                | h\\
    lone percent             | a%
    percent and letters      | a%zz
""")
add_refused_table("bad-request", "host", b"GET / HTTP/1.1\r\nHost: ", BAD_HOSTS, b"\r\n\r\n")

BAD_STARTS = wire_table(r"""
    chunked in HTTP/1.0      | POST / HTTP/1.0\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n
    no Host                  | GET / HTTP/1.1\r\n\r\n
    blank before Host        | GET / HTTP/1.1\r\n Host: h\r\n\r\n
    absolute without Host    | GET http://h/ HTTP/1.1\r\n\r\n
    bad Host in HTTP/1.0     | GET / HTTP/1.0\r\nHost: a b\r\n\r\n
    two empty lines          | \r\n\r\nGET / HTTP/1.1\r\nHost: h\r\n\r\n
    LF before                | \nGET / HTTP/1.1\r\nHost: h\r\n\r\n
    CR before                | \rGET
    NUL before               | \x00GET / HTTP/1.1\r\nHost: h\r\n\r\n
    byte order mark          | \xef\xbb\xbfGET / HTTP/1.1\r\nHost: h\r\n\r\n
    TLS                      | \x16\x03\x01GET / HTTP/1.1\r\nHost: h\r\n\r\n
    LF for every line end    | GET / HTTP/1.1\nHost: h\n\n
    CR for every line end    | GET / HTTP/1.1\rHost: h\r\r\r\n\r\n
    LF for the empty line    | GET / HTTP/1.1\r\nHost: h\r\n\n
    LF after a field         | GET / HTTP/1.1\r\nHost: h\r\nA: b\n\r\n
    CR CR LF                 | GET / HTTP/1.1\r\nHost: h\r\n\r\r\n
    CR CR LF after a field   | GET / HTTP/1.1\r\nHost: h\r\r\n\r\n
""")
add_refused_table("bad-request", "start", b"", BAD_STARTS, b"")


def refuse_gzip(name, body):
    add_refused("bad-request", f"gzip: {name}", post_gzip(body))


refuse_gzip("plain text", b"hello")
refuse_gzip("without its last byte", HELLO_GZIP[:-1])
refuse_gzip("only a head", HELLO_GZIP[:5])
refuse_gzip("NUL behind", HELLO_GZIP + b"\0")
refuse_gzip("garbage behind", HELLO_GZIP + b"garbage")
refuse_gzip("second member cut off", HELLO_GZIP + HELLO_GZIP[:-4])
refuse_gzip("wrong checksum", HELLO_GZIP[:-8] + b"\0" * 8)
refuse_gzip("zlib instead", HELLO_ZLIB)


def refuse_deflate(name, body):
    add_refused("bad-request", f"deflate: {name}", post_deflate(body))


refuse_deflate("plain text", b"hello")
refuse_deflate("JSON", b'{"topic":"t"}')
refuse_deflate("one byte", HELLO_ZLIB[:1])
refuse_deflate("without its last byte", HELLO_ZLIB[:-1])
refuse_deflate("bare, without its last byte", HELLO_BARE[:-1])
refuse_deflate("NUL behind", HELLO_ZLIB + b"\0")
refuse_deflate("bare, NUL behind", HELLO_BARE + b"\0")
refuse_deflate("two streams", HELLO_ZLIB + HELLO_ZLIB)
refuse_deflate("wrong checksum", HELLO_ZLIB[:-4] + b"\0" * 4)
refuse_deflate("gzip instead", HELLO_GZIP)
# RFC 1950 §2.2: FDICT. No dictionary was agreed on.
refuse_deflate("a dictionary", b"\x78\xbb" + b"\0" * 4 + HELLO_BARE)
# RFC 1950 §2.2: CINFO must not be above 7. The two bytes are a multiple of 31.
refuse_deflate("too large a window", b"\x88\x1c" + HELLO_ZLIB[2:])


def refuse_size(name, raw):
    add_refused("too-large", f"too large: {name}", raw)


HALVES_TOO_LARGE = gzip.compress(b"x" * 501) + gzip.compress(b"x" * 500)
FULL_CHUNK = b"3e8\r\n" + b"x" * MAX_BODY + b"\r\n"

refuse_size("a byte too many", LENGTH_IS + b"1001\r\n\r\n" + b"x" * 1001)
refuse_size("18 digits", LENGTH_IS + b"9" * 18 + b"\r\n\r\n")
refuse_size("over 2^64", LENGTH_IS + b"18446744073709551621\r\n\r\n")
refuse_size("5,000 digits", LENGTH_IS + b"1" * 5000 + b"\r\n\r\n")
refuse_size("before a 100 Continue", post_request(b"Content-Length: 1001", EXPECT_CONTINUE))
refuse_size("chunk", CHUNKED_POST + b"3e9\r\n" + b"x" * 1001)
refuse_size("second chunk", CHUNKED_POST + FULL_CHUNK + b"1\r\n")
refuse_size("chunk of 2^32 - 1", CHUNKED_POST + b"ffffffff\r\n")
refuse_size("chunk of 2^64 - 1", CHUNKED_POST + b"FFFFFFFFFFFFFFFF\r\n")
refuse_size("chunk of 2^63", CHUNKED_POST + b"8000000000000000\r\n")
refuse_size("gzip", post_gzip(gzip.compress(b"x" * 1001)))
refuse_size("gzip bomb", post_gzip(gzip.compress(b"\0" * 500_000)))
refuse_size("gzip in two members", post_gzip(HALVES_TOO_LARGE))
refuse_size("deflate", post_deflate(zlib.compress(b"x" * 1001)))
refuse_size("deflate bomb", post_deflate(zlib.compress(b"\0" * 500_000)))
refuse_size("bare deflate", post_deflate(bare_deflate(b"x" * 1001)))
refuse_size("bare deflate bomb", post_deflate(bare_deflate(b"\0" * 500_000)))

LONG_TRAILER = b"0\r\na:" + b"x" * 4094 + b"\r\nb:" + b"y" * 4095 + b"\r\n\r\n"
add_refused(
    "target-too-long", "long: request line", b"GET /" + b"x" * 7987 + b" HTTP/1.1" + HOST_AND_END
)
add_refused("target-too-long", "long: no line end", b"x" * 8002)
add_refused("target-too-long", "long: 100,000 letters", b"A" * 100_000)
add_refused("headers-too-large", "long: head", padded(aggregator.MAX_HEAD_BYTES + 1) + b"\r\n\r\n")
add_refused("headers-too-large", "long: endless field", GET + b"a: " + b"x" * 40_000)
add_refused("headers-too-large", "long: 101 fields", get_request(*[b"A: b"] * 100))
add_refused(
    "headers-too-large",
    "long: 101 trailer fields",
    CHUNKED_POST + b"0\r\n" + b"a:b\r\n" * 101 + b"\r\n",
)
add_refused("headers-too-large", "long: trailer section", CHUNKED_POST + LONG_TRAILER)
add_refused("headers-too-large", "long: endless trailer", CHUNKED_POST + b"0\r\n" + b"a" * 9000)

for method in (b"get", b"Get", b"GETT", b"GE", b"CONNECT", b"PROPFIND", b"!", b"M-SEARCH"):
    add_refused(
        "not-implemented", f"method: {method.decode()}", method + b" / HTTP/1.1" + HOST_AND_END
    )
add_refused(
    "not-implemented", "method: CONNECT to a host", b"CONNECT h:443 HTTP/1.1" + HOST_AND_END
)
add_refused(
    "not-implemented", "coding: gzip before chunked", CODING_IS + b"gzip, chunked\r\n\r\n0\r\n\r\n"
)
add_refused(
    "not-implemented",
    "coding: gzip before chunked, two fields",
    post_request(b"Transfer-Encoding: gzip", b"Transfer-Encoding: chunked", body=b"0\r\n\r\n"),
)

for version in (b"2.0", b"0.9", b"3.0", b"0.0", b"9.9"):
    add_refused(
        "version-not-supported",
        f"version: {version.decode()}",
        b"GET / HTTP/" + version + HOST_AND_END,
    )
add_refused("version-not-supported", "version: HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")

for value in (b"x", b"100", b"100-continue, x", b"100-continue;a", b"200-ok", b"100-continued"):
    add_refused(
        "expectation-failed",
        f"expect: {value.decode()}",
        post_request(b"Expect: " + value, b"Content-Length: 5", body=b"hello"),
    )

for coding in (
    b"br",
    b"gzip, gzip",
    b"gzip, identity",
    b"deflate, gzip",
    b"x-deflate",
    b"gzipped",
    b"zstd",
    b"gzip;q=1",
):
    add_refused(
        "unsupported-encoding", f"encoding: {coding.decode()}", post_coded(HELLO_GZIP, coding)
    )

add_refused("bad-parameter", "query: a name twice", b"GET /?a=1&%61=2 HTTP/1.1" + HOST_AND_END)


# ---- The bytes that may stand in a place ------------------------------------

TOKEN_BYTES = frozenset(
    b"!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
)
NAME_BYTES = TOKEN_BYTES | {ord(":")}
VALUE_BYTES = frozenset([9, *range(32, 127), *range(128, 256)])
# Not "%", which needs two digits behind it.
TARGET_BYTES = frozenset(range(33, 127)) - frozenset(b"#%")

# name -> what stands before the byte, what stands behind it, the bytes that are taken
BYTE_PLACES = {}


def add_place(name, before, after, taken):
    BYTE_PLACES[name] = (before, after, taken)


add_place("in the name of a field", GET + b"A", b"B: c\r\n\r\n", NAME_BYTES)
add_place("for the name of a field", GET, b": c\r\n\r\n", TOKEN_BYTES)
add_place("in a value", GET + b"A: b", b"c\r\n\r\n", VALUE_BYTES)
add_place("for a value", GET + b"A:", b"\r\n\r\n", VALUE_BYTES)
add_place("in a path", b"GET /a", b"b HTTP/1.1" + HOST_AND_END, TARGET_BYTES)
add_place("in a query", b"GET /?a=", b"b HTTP/1.1" + HOST_AND_END, TARGET_BYTES)
add_place("in an extension", CHUNKED_POST + b"5;a", b"b\r\nhello\r\n0\r\n\r\n", VALUE_BYTES)
add_place("in a trailer value", CHUNKED_POST + b"0\r\nA: b", b"c\r\n\r\n", VALUE_BYTES)
add_place("in a trailer name", CHUNKED_POST + b"0\r\nA", b"B: c\r\n\r\n", NAME_BYTES)


# ---- What a head means ------------------------------------------------------

# name | target | path | query | host
TARGETS = text_table("""
    the root                  | /                       | [""]             | {}            | h
    two slashes               | //                      | ["", ""]         | {}            | h
    a bracket, no host        | //[                     | ["", "["]        | {}            | h
    a slash at the end        | /a/b/                   | ["a", "b", ""]   | {}            | h
    a slash in a part         | /a%2Fb/c%20d+e          | ["a/b", "c d+e"] | {}            | h
    encoded UTF-8             | /caf%C3%A9/%f0%9F%98%80 | ["café", "😀"]   | {}            | h
    raw UTF-8                 | /café                   | ["café"]         | {}            | h
    dots                      | /../%2e%2e              | ["..", ".."]     | {}            | h
    control characters        | /%00%0a%25              | ["\\u0000\\n%"]  | {}            | h
    an empty query            | /?                      | [""]             | {}            | h
    a query against caches    | /?_=1                   | [""]             | {"_": "1"}    | h
    plus and percent          | /?b=x+y%2B%26           | [""]             | {"b": "x y+&"} | h
    a name without a value    | /?a&c=                  | [""]             | {"a": "", "c": ""} | h
    an empty name             | /?&&=&                  | [""]             | {"": ""}      | h
    signs in a value          | /?d=e=f?g               | [""]             | {"d": "e=f?g"} | h
    an absolute target        | http://g/x?y=1          | ["x"]            | {"y": "1"}    | g
    a port and no path        | HTTP://g:80             | [""]             | {}            | g:80
    https and no path         | https://g?y             | [""]             | {"y": ""}     | g
""")

GOOD_HOSTS = text_table("""
    a name                   | h
    no port behind a colon   | h:
    a port                   | h:8000
    IPv4                     | 127.0.0.1:80
    IPv6                     | [::1]
    IPv4 in IPv6             | [::ffff:1.2.3.4]:80
    other characters         | a-b_c.~d
    percent-encoded          | a%41
""")
GOOD_HOSTS["nothing"] = ""

KEPT_CONNECTIONS = wire_table(r"""
    nothing                  | GET / HTTP/1.1\r\nHost: h\r\n\r\n
    empty                    | GET / HTTP/1.1\r\nHost: h\r\nConnection:\r\n\r\n
    closed                   | GET / HTTP/1.1\r\nHost: h\r\nConnection: closed\r\n\r\n
    no comma                 | GET / HTTP/1.1\r\nHost: h\r\nConnection: foo close\r\n\r\n
    1.0, Keep-Alive          | GET / HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n
    1.0, in a second field   | GET / HTTP/1.0\r\nConnection: foo\r\nConnection: keep-alive\r\n\r\n
""")
CLOSED_CONNECTIONS = wire_table(r"""
    close                    | GET / HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n
    CLOSE                    | GET / HTTP/1.1\r\nHost: h\r\nConnection: CLOSE\r\n\r\n
    the last                 | GET / HTTP/1.1\r\nHost: h\r\nConnection: foo, close\r\n\r\n
    the first                | GET / HTTP/1.1\r\nHost: h\r\nConnection: close,foo\r\n\r\n
    in a second field        | GET / HTTP/1.1\r\nHost: h\r\nConnection:x\r\nConnection:Close\r\n\r\n
    keep-alive and close     | GET / HTTP/1.1\r\nHost: h\r\nConnection: keep-alive, close\r\n\r\n
    tabs                     | GET / HTTP/1.1\r\nHost: h\r\nConnection: \tx\t,\tclose\t\r\n\r\n
    empty members            | GET / HTTP/1.1\r\nHost: h\r\nConnection: ,,close\r\n\r\n
    1.0, nothing             | GET / HTTP/1.0\r\n\r\n
    1.0, empty               | GET / HTTP/1.0\r\nConnection:\r\n\r\n
    1.0, foo                 | GET / HTTP/1.0\r\nConnection: foo\r\n\r\n
    1.0, keep-alive, close   | GET / HTTP/1.0\r\nConnection: keep-alive, close\r\n\r\n
""")

# Heads of requests with the body "hello".
CONTINUE_WANTED = wire_table(r"""
    a length | POST /p HTTP/1.1\r\nHost: h\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n
    chunks   | POST /p HTTP/1.1\r\nHost:\r\nexpect:100-Continue\r\nTransfer-Encoding:chunked\r\n\r\n
""")
CONTINUE_NOT_WANTED = wire_table(r"""
    no expectation  | POST /p HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\n\r\n
    an empty one    | POST /p HTTP/1.1\r\nHost: h\r\nExpect:\r\nContent-Length: 5\r\n\r\n
    HTTP/1.0        | POST /p HTTP/1.0\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n
""")

# name -> request, what becomes of it
NEVER_CONTINUED = {
    "no body": (get_request(EXPECT_CONTINUE), Outcome([ROOT], None)),
    "too large": (post_request(EXPECT_CONTINUE, b"Content-Length: 1001"), Outcome([], "too-large")),
    "refused in the body": (
        post_request(EXPECT_CONTINUE, b"Transfer-Encoding: chunked", body=b"x\r\n"),
        Outcome([], "bad-request"),
    ),
}


# ---- Input without an end, and much of it -----------------------------------

# name -> start, what comes again and again, bytes that may be kept of it
ENDLESS_INPUT = {}


def add_endless(name, start, more, kept):
    ENDLESS_INPUT[name] = (start, more, kept)


add_endless("request line", b"GET /", b"x", 8002)
add_endless("fields", GET, b"a: b\r\n", 32_768)
add_endless("field", GET + b"a: ", b"x", 32_772)
add_endless("chunk extension", CHUNKED_POST + b"5;", b"x", 1026)
add_endless("chunk size", CHUNKED_POST, b"1" * 8, 1026)
add_endless("chunks", CHUNKED_POST, b"1\r\nx\r\n", MAX_BODY)
add_endless("trailer fields", CHUNKED_POST + b"0\r\n", b"a:b\r\n", 8192)
add_endless("trailer field", CHUNKED_POST + b"0\r\na:", b"x", 8194)
add_endless("empty lines", b"\r\n", b"\r\n", 32_768)
add_endless("CR", b"", b"\r", 2)


def head_in_bytes(size):
    return bytes_of(padded(size) + b"\r\n\r\n")


def request_line_in_bytes(size):
    return bytes_of(b"GET /" + b"x" * size + b" HTTP/1.1" + HOST_AND_END)


def trailer_in_bytes(size):
    field = b"a:" + b"x" * 96 + b"\r\n"
    return bytes_of(CHUNKED_POST + b"0\r\n" + field * (size // 100) + b"\r\n")


def chunks_at_once(size):
    return [CHUNKED_POST + b"10\r\n0123456789abcdef\r\n" * (size // 22) + b"0\r\n\r\n"]


def chunks_in_bytes(size):
    return bytes_of(chunks_at_once(size).pop())


def body_in_bytes(size):
    return bytes_of(post_request(b"Content-Length: %d" % size, body=b"x" * size))


def gzip_at_once(size):
    return [post_gzip(gzip.compress(b"x" * 20 * size))]


def deflate_at_once(size):
    return [post_deflate(bare_deflate(b"x" * 20 * size))]


# name -> pieces for a size, the smaller of two sizes
GROWING = {
    "head": (head_in_bytes, 8000),
    "request line": (request_line_in_bytes, 1900),
    "trailer": (trailer_in_bytes, 2000),
    "chunks": (chunks_in_bytes, 16_000),
    "chunks at once": (chunks_at_once, 250_000),
    "body": (body_in_bytes, 64_000),
    "gzip": (gzip_at_once, 50_000),
    "deflate": (deflate_at_once, 50_000),
}


LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
SHORT_NAMES = "&".join(map("".join, itertools.product(LETTERS, repeat=2))).encode()


def head_full_of_names(number, size):
    """A head of about `size` bytes that takes as much memory as one can."""
    return b"GET /?%03d&%b HTTP/1.1" % (number, SHORT_NAMES[: size - 40]) + HOST_AND_END


# ---- Random requests --------------------------------------------------------

NAMED_FRAGMENTS = wire_table(r"""
    line end       | \r\n
    empty line     | \r\n\r\n
    CR             | \r
    LF             | \n
    NUL            | \x00
    blank          | \x20
    tab            | \t
    colon          | :
    semicolon      | ;
    comma          | ,
    percent        | %
    zero           | 0
    five           | 5
    f              | f
    minus          | -
    underscore     | _
    FF             | \xff
    chunked        | chunked
    length         | Content-Length: 5\r\n
    last chunk     | 0\r\n\r\n
    start of gzip  | \x1f\x8b\x08
    coding         | Transfer-Encoding: chunked\r\n
    deflate        | Content-Encoding: deflate\r\n
    version        | HTTP/1.1
    method         | GET\x20
    slash          | /
    host           | Host: h\r\n
""")
FRAGMENTS = list(NAMED_FRAGMENTS.values())
SHORT_GOOD = [raw for raw, _ in GOOD_REQUESTS.values() if len(raw) < 400]
SHORT_REFUSED = [raw for _, raw in REFUSED_REQUESTS.values() if len(raw) < 400]


def random_request(rng):
    """A request with some of its bytes changed, or fragments in any order."""
    fragments = b"".join(rng.choices(FRAGMENTS, k=rng.randint(1, 30)))
    raw = rng.choice(rng.choice([SHORT_GOOD, SHORT_GOOD, SHORT_REFUSED, [fragments]]))
    for _ in range(rng.choice([0, 1, 1, 2, 5])):
        start = rng.randrange(len(raw) + 1)
        end = start + rng.choice([0, 0, 1, 2, 9])
        other = rng.choice([rng.choice(FRAGMENTS), bytes([rng.randrange(256)])])
        raw = raw[:start] + other + raw[end:]
    return raw + rng.choice([b"", b"", NEXT])


def random_pieces(rng, raw):
    cuts = [rng.randrange(len(raw) + 1) for _ in range(rng.randint(1, 4))]
    pieces = []
    start = 0
    for cut in sorted(cuts):
        pieces.append(raw[start:cut])
        start = cut
    return pieces + [raw[start:]]


# ---- Responses --------------------------------------------------------------

DATE = "Thu, 01 Jan 1970 00:00:00 GMT"


async def no_pieces():
    yield b""


def response_bytes(status_line, *lines, body=b""):
    """The bytes of an answer; the lines that each one has are filled in."""
    common = [
        f"Date: {DATE}",
        f"Server: aggregator/{aggregator.__version__}",
        "X-Content-Type-Options: nosniff",
    ]
    head = "\r\n".join([f"HTTP/1.1 {status_line}", *common, *lines])
    return head.encode() + b"\r\n\r\n" + body


JSON_TYPE = "Content-Type: application/json"
TWO_CHARACTERS = "é😀".encode()

# name -> response, options of `encode_response`, its bytes
RESPONSES = {}


def add_response(name, response, *lines, body=b"", **options):
    """`lines` are the status and the fields after those that each answer has."""
    RESPONSES[name] = (response, options, response_bytes(*lines, body=body))


JSON_ANSWER = aggregator.Response(200, b"{}")
STREAM_ANSWER = aggregator.Response(200, no_pieces())
CHUNKED_LINE = "Transfer-Encoding: chunked"

add_response("a body", JSON_ANSWER, "200 OK", JSON_TYPE, "Content-Length: 2", body=b"{}")
add_response("HEAD", JSON_ANSWER, "200 OK", JSON_TYPE, "Content-Length: 2", head_only=True)
add_response("a stream", STREAM_ANSWER, "200 OK", JSON_TYPE, CHUNKED_LINE)
add_response("HEAD of a stream", STREAM_ANSWER, "200 OK", JSON_TYPE, CHUNKED_LINE, head_only=True)
add_response(
    "a stream in HTTP/1.0",
    STREAM_ANSWER,
    "200 OK",
    JSON_TYPE,
    "Connection: close",
    http_1_0=True,
    keep_alive=False,
)
add_response(
    "an empty body",
    aggregator.Response(202, b""),
    "202 Accepted",
    JSON_TYPE,
    "Content-Length: 0",
)
add_response(
    "an empty body in HTTP/1.0",
    aggregator.Response(202, b""),
    "202 Accepted",
    JSON_TYPE,
    "Content-Length: 0",
    "Connection: keep-alive",
    http_1_0=True,
)
add_response(
    "a length in bytes, not characters",
    aggregator.Response(200, TWO_CHARACTERS),
    "200 OK",
    JSON_TYPE,
    "Content-Length: 6",
    body=TWO_CHARACTERS,
)
add_response("204", aggregator.Response(204), "204 No Content")
add_response(
    "204 and close",
    aggregator.Response(204, b"", "", (("Allow", "GET, HEAD"),)),
    "204 No Content",
    "Allow: GET, HEAD",
    "Connection: close",
    keep_alive=False,
)
add_response(
    "other fields, another type",
    aggregator.Response(400, b"x", "text/plain", (("A", "b"), ("C", "d"))),
    "400 Bad Request",
    "Content-Type: text/plain",
    "Content-Length: 1",
    "A: b",
    "C: d",
    "Connection: close",
    body=b"x",
    keep_alive=False,
)


# ============================================================================
# For §10 Reference and metrics
# ============================================================================

DOCUMENT = json.loads(aggregator.openapi_json())
SCHEMAS = DOCUMENT["components"]["schemas"]
DOCS = aggregator.docs_html()
PROBLEM_TYPE = "application/problem+json"

# Which values of Python are of which type of JSON.
JSON_TYPES = {
    "object": dict,
    "array": list,
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "null": type(None),
}

each_route = with_cases("route", {route.name: route for route in aggregator.ROUTES})


def operation_of(route):
    """What the document says about a route."""
    return DOCUMENT["paths"][route.path][route.method.lower()]


def route_named(name):
    [found] = [route for route in aggregator.ROUTES if route.name == name]
    return found


def parameters_of(operation, place):
    """The parameters in "path", "query" or "header", by name."""
    parameters = {}
    for parameter in operation["parameters"]:
        if parameter["in"] == place:
            parameters[parameter["name"]] = parameter
    return parameters


def references_in(value):
    """All that a part of the document refers to."""
    found = []
    if isinstance(value, dict):
        found += [text for name, text in value.items() if name == "$ref"]
        value = list(value.values())
    if isinstance(value, list):
        for inner in value:
            found += references_in(inner)
    return found


def resolved(schema):
    """The schema itself, or the one that it refers to by name."""
    if "$ref" not in schema:
        return schema
    place, _, name = schema["$ref"].rpartition("/")
    assert place == "#/components/schemas"
    return SCHEMAS[name]


def has_type(value, schema):
    """Whether a value has the type that a schema asks for, if it asks for one."""
    names = schema.get("type", list(JSON_TYPES))
    if isinstance(names, str):
        names = [names]
    for name in names:
        # True is an int in Python, and none in JSON.
        if isinstance(value, JSON_TYPES[name]) and isinstance(value, bool) == (name == "boolean"):
            return True
    return False


def fits(value, schema):
    """Whether a single value, neither list nor object, obeys its schema."""
    if not has_type(value, schema) or value not in schema.get("enum", [value]):
        return False
    if isinstance(value, str):
        # In ECMAScript $ is the end. In Python it may stand before a line feed, too.
        pattern = re.sub(r"\$\Z", r"\\Z", schema.get("pattern", ""))
        longest = schema.get("maxLength", len(value))
        long_enough = schema.get("minLength", 0) <= len(value) <= longest
        return long_enough and re.search(pattern, value) is not None
    if isinstance(value, (int, float)):
        return schema.get("minimum", value) <= value <= schema.get("maximum", value)
    return True


def assert_described(value, schema):
    """Every field of a value obeys the schema, and all required ones are there."""
    schema = resolved(schema)
    assert has_type(value, schema), (value, schema)
    if isinstance(value, list):
        for inner in value:
            assert_described(inner, schema.get("items", {}))
    elif isinstance(value, dict):
        for name in schema.get("required", []):
            assert name in value
        other = schema.get("additionalProperties", {})
        for name, inner in value.items():
            assert_described(inner, schema.get("properties", {}).get(name, other))
    else:
        assert fits(value, schema), (value, schema)


def assert_same_fields(example, answer):
    """An answer has the fields of its example, with values of the same types.

    Names that are no identifiers are data, such as topics. A payload is data, too, and
    not every event has a sequence.
    """
    if isinstance(example, dict):
        assert isinstance(answer, dict)
        if all(name.isidentifier() for name in example):
            assert set(answer) | {"sequence"} == set(example) | {"sequence"}
            for name in set(example) & set(answer) - {"payload"}:
                assert_same_fields(example[name], answer[name])
    elif isinstance(example, list):
        assert isinstance(answer, list)
        assert answer != []
        for inner in answer:
            assert_same_fields(example[0], inner)
    elif isinstance(example, float):
        assert has_type(answer, {"type": "number"}), answer
    elif example is not None:
        assert type(answer) is type(example), answer


def is_beyond_a_schema(field, value):
    """Whether JSON Schema has no words for what is wrong with a value of this field."""
    if field == "timestamp":
        return value == "2026-02-30"
    if field == "sequence":
        return value != value or value in (0.0, 1.0, 1e3)  # NaN; integers in JSON Schema
    if field == "payload":
        return False
    if not isinstance(value, str):
        return False
    # Lengths are counted in characters there, and a surrogate is nothing special.
    surrogate = re.search("[\ud800-\udfff]", value)
    return surrogate is not None or len(value) <= 255 < len(value.encode())


class DocsReader(html.parser.HTMLParser):
    """The tags, ids and links of the reference, and the texts of its menu."""

    def __init__(self, page=DOCS):
        super().__init__()
        self.tags = []
        self.ids = []
        self.links = []
        self.menu = []
        self.is_in_menu = False
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag == "nav":
            self.is_in_menu = True
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            if name == "href":
                self.links.append(value)

    def handle_endtag(self, tag):
        if tag == "nav":
            self.is_in_menu = False

    def handle_data(self, text):
        if self.is_in_menu and text.strip():
            self.menu.append(text)


def docs_words(page):
    """A part of the reference without its tags."""
    return html.unescape(re.sub("<[^>]+>", "", page))


def docs_words_of(problem):
    """What the reference says about a problem."""
    _, _, text = DOCS.partition(f'<dt id="{problem}">')
    text, _, _ = text.partition("<dt")
    return docs_words(text)


class Shown(NamedTuple):
    """An example as the reference shows it: a command, and what comes back."""

    command: str
    status: int
    content_type: str
    received: str


SHOWN_EXAMPLE = re.compile(
    r"""
    <pre\ class="ask">(?P<command>[^<]*)</pre>\n
    <p\ class="soft">(?P<status>[0-9]+)
    (?:,\ without\ content|\ <code>(?P<content_type>[^<]+)</code>)\n
    (?:<pre\ class="answer">(?P<received>[^<]*)</pre>)?
    """,
    re.VERBOSE,
)


def shown_examples(page):
    """All examples of the reference, in order."""
    shown = []
    for match in SHOWN_EXAMPLE.finditer(page):
        shown.append(
            Shown(
                html.unescape(match["command"]),
                int(match["status"]),
                match["content_type"] or "",
                html.unescape(match["received"] or ""),
            )
        )
    return shown


# What curl says at the end: the status and the type of the answer.
CURL_REPORT = " -w '\\n%{http_code} %{content_type}'"


def run_command(shown):
    """What a shell and curl make of a command of the reference."""
    command = shown.command + CURL_REPORT
    if "follow=1" in command:
        # It never ends by itself.
        command += " -m 1"
    shell = ["bash", "-c", command.replace("curl ", "curl -s ")]
    output = subprocess.run(shell, stdout=subprocess.PIPE, timeout=30).stdout.decode()
    received, _, report = output.rpartition("\n")
    status, _, content_type = report.partition(" ")
    content_type, _, _ = content_type.partition(";")
    return Shown(shown.command, int(status), content_type, received)


# Members that depend on when and how fast the story is told.
UNSETTLED = {
    "processed_at",
    "first_seen",
    "repeated",
    "delay_seconds",
    "seconds_since_first_seen",
    "milliseconds",
}


def settled(value):
    """A value without what differs from run to run."""
    if isinstance(value, list):
        return [settled(inner) for inner in value]
    if not isinstance(value, dict):
        return value
    result = {}
    for name, inner in value.items():
        result[name] = None if name in UNSETTLED else settled(inner)
    return result


def assert_json_as_shown(shown, received):
    """The same, but for times. Of numbers about the service only types are compared."""
    example = json.loads(shown.received)
    answer = json.loads(received)
    if "/openapi.json" in shown.command:
        assert answer["openapi"] == example["openapi"]
    elif shown.command.endswith(("/stats", "/")):
        assert_same_fields(example, answer)
    else:
        assert settled(answer) == settled(example)


def assert_lines_as_shown(shown, received):
    """The first event is the one shown; others may follow."""
    before_example, _, _ = shown.received.partition("{")
    assert received.startswith(before_example + "{")
    [example] = objects_in(shown.received)
    first, *_ = objects_in(received)
    assert settled(first) == settled(example)


def without_numbers(text):
    return re.sub(" [0-9]+$", " n", text, flags=re.MULTILINE)


def assert_as_shown(shown, received):
    """What came back is what the reference shows."""
    assert received.status == shown.status
    assert received.content_type == shown.content_type
    if shown.content_type == "application/json":
        assert_json_as_shown(shown, received.received)
    elif shown.content_type in ("application/x-ndjson", "text/event-stream"):
        assert_lines_as_shown(shown, received.received)
    elif shown.content_type == "text/html":
        assert received.received.startswith("<!doctype html>")
    else:
        assert without_numbers(received.received).startswith(without_numbers(shown.received))


class Sampled(NamedTuple):
    """An answer as its route declares it, and the one that the program gave."""

    route: aggregator.Route
    declared: aggregator.Answer
    answer: Answer

    @property
    def example(self):
        """The declared example: a value where it is JSON, else the text."""
        return aggregator.example_value(self.declared.content_type, self.declared.example)

    @property
    def media(self):
        """What the document says about answers of this status and media type."""
        response = operation_of(self.route)["responses"][str(self.declared.status)]
        media_type, _, _ = self.declared.content_type.partition(";")
        return response["content"][media_type]

    @property
    def schema(self):
        """What the document says about just this answer."""
        schemas = dict(zip(self.media["examples"], self.media["schema"]["anyOf"]))
        return schemas[self.declared.meaning]


def with_content(sampled):
    """The answers that have a body: a 204 has none."""
    return [each for each in sampled if each.declared.content_type]


def fetch_sample(port, route, declared):
    """What comes to a sample request; of a live tail, all up to its first event."""
    request = aggregator.sample_request(route, declared)
    body = request.body.encode()
    if request.is_gzip:
        body = gzip.compress(body)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    with contextlib.closing(connection):
        connection.request(request.method, request.target, body or None, request.headers)
        response = connection.getresponse()
        received = b""
        for line in response:
            received += line
            if "follow" in declared.ask and b"processed_at" in line:
                break
        return Answer(response.status, dict(response.getheaders()), received)


@pytest.fixture(scope="module")
def sampled(tmp_path_factory):
    """All answers that routes declare, with those of a new program, in order."""
    found = []
    with Program(tmp_path_factory.mktemp("sampled") / "events.db") as program:
        for route in aggregator.ROUTES:
            for declared in route.answers:
                answer = fetch_sample(program.port, route, declared)
                found.append(Sampled(route, declared, answer))
    return found


def objects_in(text):
    """The JSON objects of an answer that holds one in each of some lines."""
    return [json.loads(found) for found in re.findall(r"\{.*\}", text)]


SAMPLE_LINE = re.compile(
    r"""
    (?P<name>[a-zA-Z_:][a-zA-Z0-9_:]*)
    (?:\{(?P<label>[a-zA-Z_][a-zA-Z0-9_]*)="(?P<value>(?:[^"\\\n]|\\["\\n])*)"\})?
    [ ](?P<number>-?[0-9.]+(?:e[+-]?[0-9]+)?)
    """,
    re.VERBOSE,
)


class Metrics:
    """Metrics in the text format 0.0.4, read strictly.

    `values` has for each name the numbers by the value of the label, which is None if
    there is no label. Histograms are kept flat: names end in _bucket, _sum and _count.
    """

    def __init__(self, text):
        self.values = {}
        self.kinds = {}
        self.current = None
        assert text.endswith("\n")
        assert not text.endswith("\n\n")
        for line in text[:-1].split("\n"):
            if line.startswith("# HELP "):
                self.read_help(line[len("# HELP ") :])
            elif line.startswith("# TYPE "):
                self.read_type(line[len("# TYPE ") :])
            else:
                self.read_sample(SAMPLE_LINE.fullmatch(line))
        for name, kind in self.kinds.items():
            if kind == "histogram":
                self.check_histogram(self[name + "_bucket"], self.one(name + "_count"))

    def __getitem__(self, name):
        return self.values[name]

    def one(self, name):
        """The number of a metric that has one."""
        [(label, number)] = self[name].items()
        assert label is None
        return number

    def above_zero(self, name):
        """The numbers of a metric but for the zeros."""
        return {label: number for label, number in self[name].items() if number}

    def plain(self, name):
        """A name without the beginning that all of them have."""
        assert name.startswith("aggregator_")
        return name[len("aggregator_") :]

    def read_help(self, text):
        name, meaning = text.split(" ", 1)
        self.current = self.plain(name)
        assert self.current not in self.kinds
        assert meaning
        assert "\\" not in meaning

    def read_type(self, text):
        name, kind = text.split(" ")
        assert self.plain(name) == self.current
        assert kind in ("counter", "gauge", "histogram")
        assert (kind == "counter") == name.endswith("_total")
        self.kinds[self.current] = kind

    def read_sample(self, match):
        name = self.plain(match["name"])
        base = name
        if self.kinds[self.current] == "histogram":
            base = re.sub("_(bucket|sum|count)$", "", name)
        assert base == self.current
        assert (match["label"] == "le") == name.endswith("_bucket")
        value = match["value"]
        if value is not None:
            # Of the three escapes only \n stands for another character.
            value = re.sub(r'\\(["\\n])', lambda found: found[1].replace("n", "\n"), value)
        numbers = self.values.setdefault(name, {})
        assert value not in numbers
        numbers[value] = float(match["number"])

    def check_histogram(self, buckets, count):
        bounds = list(buckets)
        assert bounds[-1] == "+Inf"
        assert bounds == sorted(bounds, key=float)
        numbers = list(buckets.values())
        assert numbers == sorted(numbers)
        assert numbers[-1] == count


def metrics_of(desk):
    return Metrics(desk.get("/metrics").body.decode())


HOSTILE_TOPICS = ['a"b', "back\\slash", "\\", '\\n"', "é😀", "brace}{", "a b", 't="1",x']


@pytest.fixture
def counted(desk):
    """A desk with 16 events, 3 repeats after 30 s, one a conflict, and 3 refusals."""
    for topic in HOSTILE_TOPICS:
        desk.publish(*samples(1, 2, topic=topic))
    desk.now += 30_000_000
    first, second, *_ = HOSTILE_TOPICS
    desk.publish(
        sample("1", topic=first),
        sample("2", topic=first, payload={}),
        sample("1", topic=second),
    )
    for target in ("/nowhere", "/events?limit=0", "/events?limit=x"):
        desk.get(target)
    return desk


# ============================================================================
# For §11 Page
# ============================================================================

# A name that is markup, a template, and looks like a tag of ours.
HOSTILE = '<img src=x onerror=alert(1)>&amp;"\'{0}<b data-n="stored">'

BROWSER = "Accept: text/html,application/xhtml+xml;q=0.9,*/*;q=0.8"

# What GET /stats might answer: every number of it is another one.
PAGE_STATS = {
    "received": 12_345,
    "unique_processed": 10_000,
    "duplicate_dropped": 2_340,
    "conflicts": 7,
    "current_queue_size": 5,
    "stored": 9_876,
    "topics": {HOSTILE: {"unique": 3, "duplicates": 1}},
    "topics_total": 31,
    "sources": {"hall": {"unique": 4, "duplicates": 2}},
    "sources_total": 32,
    "gaps": 6,
    "store_bytes": 2_560_000,
    "limits": {"queue_max_size": 20_000},
    "duplicate_delay_seconds": {"1": 11, "60": 0, "120": 12, "7200": 13, "86400": 0, "inf": 0},
    "windows": [{"window_seconds": 120, "like": "Some broker", "would_have_stored_twice": 14}],
}


class Reading(html.parser.HTMLParser):
    """What a reader without style and script gets of a page.

    `words` are its texts in order, `tags` its elements with their attributes, `inline`
    the contents of style and script.
    """

    def __init__(self, page):
        super().__init__()
        self.words = []
        self.tags = []
        self.inline = {}
        self.inside = ""
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

    def words_from(self, start):
        """The texts that begin like this."""
        return [word for word in self.words if word.startswith(start)]

    def after(self, text):
        """The text behind this one."""
        return self.words[self.words.index(text) + 1]


def read_page(stats=PAGE_STATS, **options):
    return Reading(aggregator.render_page(stats, **options))


def policy_of(answer):
    """The directives of the content policy of a page."""
    rules = answer.headers["Content-Security-Policy"].split("; ")
    return dict(rule.split(" ", 1) for rule in rules)


def source_hash(text):
    """How a content policy names a style or script (CSP 3 §2.3.1)."""
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


# ============================================================================
# For §8 API
# ============================================================================

NDJSON = "Accept: application/x-ndjson"
SSE = "Accept: text/event-stream"


class Desk:
    """An API over a store of its own, and a clock that only the test moves. No sockets.

    `await send(…)` and its shorter forms give requests to the parser and the API. Every
    answer is checked for what all have in common, and `close` checks the books.
    `store` holds settings of the store; followers hear something every `keep_alive_s`.
    """

    def __init__(self, path, queue_events=1000, keep_alive_s=15.0, **store):
        self.path = path
        self.now = NOW
        # By a clock that nobody sets.
        self.passed_us = 0
        self.queue_events = queue_events
        self.keep_alive_s = keep_alive_s
        self.store_settings = aggregator.StoreSettings(clock_settles_us=0, **store)
        self.random_numbers = itertools.count()
        self.loop = asyncio.new_event_loop()
        self.loop.run_until_complete(self.open())

    async def open(self):
        self.pipeline = aggregator.Pipeline(
            self.open_store,
            lambda: self.now,
            aggregator.PipelineLimits(queue_events=self.queue_events),
        )
        await self.pipeline.start()
        self.live_tail = aggregator.LiveTail(
            self.pipeline, aggregator.TailLimits(keep_alive_s=self.keep_alive_s)
        )
        self.api = aggregator.API(
            self.pipeline,
            self.live_tail,
            lambda: self.now,
            self.random_id,
            {"shown": 1},
            lambda: self.passed_us / 1e6,
        )

    def open_store(self):
        self.store = aggregator.Store(self.path, self.store_settings, lambda: self.now)
        return self.store

    def random_id(self):
        return f"random-{next(self.random_numbers)}"

    async def respond(self, method, target, body=b"", headers=(), peer="192.0.2.7"):
        """The `Response` to a request; the body of a stream has not begun."""
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
        head = [f"{method} {target} HTTP/1.1", "Host: x", f"Content-Length: {len(body)}"]
        head += [*headers, "", ""]
        parser = aggregator.RequestParser()
        parser.feed("\r\n".join(head).encode("latin-1") + body)
        response = await self.api.answer(parser.next_request(), peer)
        assert fields_of(response)["Cache-Control"] == "no-store"
        return response

    async def send(self, *request, **options):
        response = await self.respond(*request, **options)
        pieces = [response.body]
        if not isinstance(response.body, bytes):
            pieces = [piece async for piece in response.body]
        answer = Answer(response.status, fields_of(response), b"".join(pieces), len(pieces))
        if answer.status >= 400:
            assert_problem(answer, response.content_type)
        return answer

    async def pieces(self, target, *headers):
        """The pieces of a stream, one at a time."""
        response = await self.respond("GET", target, headers=headers)
        assert response.status == 200, response.body
        async for piece in response.body:
            yield piece

    def run(self, scenario):
        """The result of a coroutine, which has 20 s."""
        return self.loop.run_until_complete(asyncio.wait_for(scenario, 20))

    def ask(self, *request, **options):
        return self.loop.run_until_complete(self.send(*request, **options))

    def get(self, target, *headers):
        return self.ask("GET", target, headers=headers)

    def post(self, target, body=b"", *headers):
        return self.ask("POST", target, body, headers)

    def put(self, target, body=b"{}"):
        return self.ask("PUT", target, body)

    def stats(self):
        return self.get("/stats").json

    def publish(self, *events):
        """The counts of events that are published as one batch."""
        answer = self.post("/publish", list(events))
        assert answer.status == 202, answer
        return answer.json

    def publish_range(self, *bounds, **fields):
        """Publish one batch of events whose ids are these numbers."""
        return self.publish(*samples(*range(*bounds), **fields))

    def events(self, query=""):
        """What GET /events lists."""
        answer = self.get("/events" + query)
        assert answer.status == 200, answer
        events = answer.json["events"]
        assert answer.json["count"] == len(events)
        return events

    def listed(self, query=""):
        """The ids of what GET /events lists."""
        return [event["event_id"] for event in self.events(query)]

    async def first_seqs(self, target):
        """The seqs in the first piece of a stream."""
        async for piece in self.pieces(target):
            return seqs_in(piece)

    def follow_once(self, query, *headers):
        """The first piece of a live tail."""

        async def first_piece():
            async for piece in self.pieces("/events?follow=1&" + query, *headers):
                return piece

        return self.run(first_piece())

    async def until_followed_by(self, count):
        while self.live_tail.followers < count:
            await asyncio.sleep(0)

    async def tidy(self):
        """All of the retention that is due."""
        while await self.pipeline._ask_writer(self.store.tidy, self.now):
            pass

    def close(self):
        self.api.access = aggregator.Access()
        stats = self.stats()
        assert self.run(self.pipeline.stop(5))
        self.loop.close()
        decided = stats["unique_processed"] + stats["duplicate_dropped"]
        assert stats["received"] == decided + stats["current_queue_size"]
        for finding in aggregator.check_store(self.path):
            holds, _ = finding
            assert holds, finding


@pytest.fixture
def make_desk(tmp_path):
    desks = []

    def make(**options):
        desk = Desk(str(tmp_path / f"desk{len(desks)}.db"), **options)
        desks.append(desk)
        return desk

    yield make
    for desk in desks:
        desk.close()


@pytest.fixture
def desk(make_desk):
    return make_desk()


# Events whose timestamps spell instants in many ways; the id is the place in this list.
SPELLINGS = [
    "2026-01-01T02:00:00+02:00",
    "2025-12-31T23:59:59.999999-00:00",
    "2026-01-01 00:00:00.5",
    "1969-12-31T23:00Z",
    "0001-01-01T00:00:00Z",
    "9999-12-31T23:59:59.999999Z",
    "2026-01-01T05:30:01+0530",
    "1970-01-01",
]


@pytest.fixture
def filled(desk):
    """A desk with an event for each of SPELLINGS: two topics, three sources."""
    events = []
    for number, text in enumerate(SPELLINGS):
        topic = ("logs/a", "logs/b")[number % 2]
        source = f"s{number % 3}"
        events.append(sample(str(number), timestamp=text, topic=topic, source=source))
    desk.publish(*events)
    return desk


@pytest.fixture
def locked(make_desk):
    """A desk whose store another connection holds for writing, until `unlock()`."""
    desk = make_desk(lock_timeout_s=0.05)
    other = sqlite3.connect(desk.path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    desk.unlock = other.close
    yield desk
    other.close()


def seqs_in(piece):
    """The seqs of the events in a piece of a live tail."""
    return [json.loads(line)["seq"] for line in piece.splitlines()]


def fields_of(response):
    """The header fields of a response; what stands twice is joined (RFC 9110 §5.3)."""
    fields = {}
    for name, value in response.headers:
        if name in fields:
            value = fields[name] + ", " + value
        fields[name] = value
    return fields


def assert_nothing_stored(desk):
    assert desk.listed() == []
    assert desk.stats()["received"] == 0


def fields_in(cell, name=""):
    """The header field that stands in a cell of a table; "-" is none."""
    return [] if cell == "-" else [name + cell]


def explain(desk, *events):
    """The answer to a publish that says how each verdict came about."""
    return desk.post("/publish?explain=1", list(events)).json


def found_places(desk, event_id):
    """Where the key of an event is found, and then that of its repeat in the batch."""
    answer = explain(desk, sample(event_id), sample(event_id, source="other"))
    return [each["explanation"]["found"] for each in answer["events"]]


def publish_and_repeat_late(desk):
    """Five events, repeated late, each with a copy of "x"; the fifth copy differs."""
    for number, delay_s in enumerate((0, 120, 200, 400, 700)):
        event = sample(str(number), source=f"s{number % 2}")
        desk.publish(event)
        desk.now += delay_s * 1_000_000
        desk.publish(event, sample("x", topic="other", payload={"v": number // 4}))


def publish_sequences(desk, *numbers):
    desk.publish(*[sample(str(number), sequence=number) for number in numbers])


def plain_target(route):
    """A path of this route: its parameters are called by their names."""
    return route.path.replace("{", "").replace("}", "")


def routes_by_name(chosen):
    """Run a test once for each route for which `chosen` holds."""
    routes = {route.method + route.path: route for route in aggregator.ROUTES if chosen(route)}
    return with_cases("route", routes)


async def sse_blocks(desk, count, *headers):
    """The first blocks of Server-Sent Events of a live tail."""
    text = b""
    async for piece in desk.pieces("/events?follow=1&after=0", SSE, *headers):
        text += piece
        if text.count(b"\n\n") == count:
            return text.decode().split("\n\n")


async def three_silent_pieces(desk, *headers):
    found = []
    async for piece in desk.pieces("/events?follow=1&topic=none", *headers):
        found.append(piece)
        if len(found) == 3:
            return found


def reset_on_close(sock):
    """Closing this socket sends a reset, as if its host had gone."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


# What a field, a parameter or a part of a path should not be, or only just may be.
STRANGE_VALUES = [
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
STRANGE_TEXTS = [str(value) for value in STRANGE_VALUES if value != "\ud800"]
STRANGE_TEXTS += "0 1 5 1000 true asc desc a1.1 d-5.99 2026-01-01 10m t t* s 1-3".split()
STRANGE_BYTES = [
    b"\0",
    b"\xff",
    b"\xed\xa0\x80",
    b"[",
    b"{" * 2000,
    b"1" * 5000,
    b'"',
    b"\\ud800",
    b",",
]
STRANGE_FIELDS = [
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
]


class StrangeRequests:
    """Bytes of requests that are valid but for some things, chosen by a seed."""

    def __init__(self, seed):
        self.rng = random.Random(seed)

    def event(self):
        digits = self.rng.choice((3, 30))
        event = sample(f"{self.rng.getrandbits(digits):x}", payload={"n": self.rng.randrange(3)})
        for _ in range(self.rng.choice((0, 0, 1, 2))):
            name = self.rng.choice([*event, "sequence", "events"])
            if self.rng.random() < 0.2:
                event.pop(name, None)
            else:
                event[name] = self.rng.choice(STRANGE_VALUES)
        return event

    def segment(self, _):
        text = self.rng.choice(STRANGE_TEXTS + ["1", "t"] * 9)
        return quote(text, safe=self.rng.choice(("", "/")))

    def parameter(self, route):
        name = "strange"
        if route.query and self.rng.random() < 0.95:
            name = self.rng.choice(route.query).name
        return name + "=" + quote(self.rng.choice(STRANGE_TEXTS).encode())

    def target(self, route):
        path = re.sub(r"{\w+}", self.segment, route.path)
        parameters = [self.parameter(route) for _ in range(self.rng.choice((0, 0, 1, 2)))]
        if parameters:
            path += "?" + "&".join(parameters)
        return path.encode()

    def body(self):
        events = [self.event() for _ in range(self.rng.choice((1, 1, 2, 5)))]
        forms = [
            json.dumps(events).encode(),
            json.dumps(events[-1]).encode(),
            json.dumps({"events": events}).encode(),
            lines(events),
            b"a\n\0b\n\xed\x9f\xbf",
            b"",
        ]
        body = self.rng.choice(forms)
        if self.rng.random() < 0.3:
            body = self.damaged(body, self.rng.choice(STRANGE_BYTES), (0, 1, 9))
        return body

    def damaged(self, data, piece, lengths):
        """Data in which a piece stands somewhere, in the place of so many bytes."""
        start = self.rng.randrange(len(data) + 1)
        return data[:start] + piece + data[start + self.rng.choice(lengths) :]

    def request(self):
        route = self.rng.choice(aggregator.ROUTES)
        fields = self.rng.sample(STRANGE_FIELDS, self.rng.choice((0, 1, 2)))
        body = self.body()
        if b"Content-Encoding: gzip" in fields and self.rng.random() < 0.9:
            body = gzip.compress(body, 1)
        method = route.method.encode()
        if self.rng.random() < 0.3:
            method = self.rng.choice((b"HEAD", b"OPTIONS", b"DELETE", b"TRACE"))
        head = [b"%b %b HTTP/1.1" % (method, self.target(route)), b"Host: x"]
        head.append(b"Content-Length: %d" % len(body))
        raw = b"\r\n".join([*head, *fields, b"", body])
        if self.rng.random() < 0.1:
            raw = self.damaged(raw, bytes([self.rng.randrange(256)]), (0, 1))
        return raw


def request_in(raw):
    """The request that these bytes are, if they are one and whole."""
    parser = aggregator.RequestParser()
    parser.feed(raw)
    try:
        return parser.next_request()
    except aggregator.HTTPError:
        return None


async def assert_no_server_error(desk, raw):
    """A request, given as bytes, is answered well. Returns the status, if any."""
    request = request_in(raw)
    if request is None:
        return None
    response = await desk.api.answer(request, "192.0.2.7")
    date = "Thu, 01 Jan 1970 00:00:00 GMT"
    assert aggregator.encode_response(response._replace(body=b""), date, True).isascii()
    body = response.body
    if "follow" in request.head.query and not isinstance(body, bytes):
        return response.status  # it has no end
    if not isinstance(body, bytes):
        rows = b"".join([piece async for piece in response.body]).splitlines()
        body = b"[" + b",".join(rows) + b"]"
    if b"docs#queue-full" not in body:
        assert response.status < 500, body
    if "json" in response.content_type and response.status != 204:
        # NaN and Infinity are not JSON.
        json.loads(body.decode("utf-8"), parse_constant=pytest.fail)
    return response.status


# ============================================================================
# For §8 Webhooks and CloudEvents
# ============================================================================

HOOKS = "/events/hooks/shop"
SECRET = "whsec_" + base64.b64encode(b"the key of the shop").decode()
OTHER_SECRET = "whsec_" + base64.b64encode(b"another key of the shop").decode()


def standard_signature(secret, body, delivery="msg_1", timestamp=NOW // 10**6, version="v1"):
    """The header fields of a Standard Webhook, signed as its specification says."""
    key = base64.b64decode(secret[len("whsec_") :])
    content = f"{delivery}.{timestamp}.".encode() + body
    digest = hmac.new(key, content, hashlib.sha256).digest()
    return [
        f"webhook-id: {delivery}",
        f"webhook-timestamp: {timestamp}",
        f"webhook-signature: {version},{base64.b64encode(digest).decode()}",
    ]


def hub_signature(secret, body, delivery="d-1"):
    """The header fields of a delivery of GitHub."""
    digest = hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()
    return [f"X-GitHub-Delivery: {delivery}", f"X-Hub-Signature-256: sha256={digest}"]


@pytest.fixture
def guarded(desk):
    """A desk that needs a token, with a secret for the topic of HOOKS."""
    desk.api.access = aggregator.Access(
        tokens=("s3cret",), webhooks={"hooks/shop": (SECRET, OTHER_SECRET)}
    )
    return desk


def stored_events(desk):
    """All events, whatever the access of the desk."""
    access = desk.api.access
    desk.api.access = aggregator.Access()
    events = desk.events()
    desk.api.access = access
    return events


def deliver(desk, body, *headers, query=""):
    """POST a body to the inbox; the one event that is then stored."""
    answer = desk.post(HOOKS + query, body, *headers)
    assert answer.status == 202, answer
    [event] = desk.events()
    return event


CLOUD_EVENT = {
    "specversion": "1.0",
    "id": "A234-1234-1234",
    "source": "https://example.com/storage/tenant",
    "type": "com.example.someevent",
    "subject": "new",
    "time": "2018-04-05T17:31:00Z",
    "comexampleextension1": "value",
    "datacontenttype": "application/json",
    "data": {"n": [1, None]},
}
STRUCTURED = "Content-Type: application/cloudevents+json; charset=utf-8"
BATCHED = "Content-Type: application/cloudevents-batch+json"


def binary_fields(**attributes):
    """The header fields of a CloudEvent in the binary mode."""
    fields = {"specversion": "1.0", "id": "1", "source": "/door", "type": "opened"}
    fields.update(attributes)
    return [f"ce-{name}: {value}" for name, value in fields.items() if value is not None]


def given_back(event):
    """The CloudEvent that an event was made of."""
    source, _, event_id = event["event_id"].partition(" ")
    cloud_event = {"type": event["topic"], "time": event["timestamp"], **event["payload"]}
    return {"id": event_id, "source": source, **cloud_event}


class CountedPayload(dict):
    """A payload; `in_memory` counts those that are left."""

    in_memory = 0

    def __init__(self, **members):
        super().__init__(**members)
        CountedPayload.in_memory += 1

    def __del__(self):
        CountedPayload.in_memory -= 1


# ============================================================================
# For §8, removing and counting; and for backups, tokens, size, upgrades
# ============================================================================

PASSWORD = "hunter2-correct-horse"


WHOLE_TOPIC = {"topic": "t", "prefix": False, "until_us": None}


def secret_record(event_id="1", topic="t", padding=0, timestamp=NOW):
    """A record whose payload holds the secret and so many bytes more."""
    payload = '{"password":"%s","x":"%s"}' % (PASSWORD, "x" * padding)
    return event(event_id, topic, payload, timestamp=timestamp)


def files_with(folder, text):
    """The names of the files in a folder that hold this text."""
    names = []
    for name in os.listdir(folder):
        with open(os.path.join(folder, name), "rb") as file:
            if text.encode() in file.read():
                names.append(name)
    return names


@contextlib.contextmanager
def desk_over(path, **options):
    """A desk over a store that is there already."""
    opened = Desk(str(path), **options)
    try:
        yield opened
    finally:
        opened.close()


async def waits_of_publishers(opened, until_done):
    """Publish one by one until a task is done; how long each waited, in seconds."""
    waits_s = []
    while not until_done.done():
        began_s = time.monotonic()
        new = sample(f"new {len(waits_s)}", topic="new")
        answer = await opened.send("POST", "/publish", [new])
        assert answer.status == 202
        waits_s.append(time.monotonic() - began_s)
        await asyncio.sleep(0.002)
    return waits_s


# ---- Finding

# A payload, a text, and whether the text is in it.
TEXTS = {
    "a word": ({"message": "the door is open"}, "door", True),
    "a part of a word": ({"message": "the door is open"}, "oor i", True),
    "in capitals": ({"message": "the door is open"}, "Door", False),
    "a name": ({"temperature": 5}, "temper", True),
    "deep inside": ({"a": [{"b": ["x", "needle"]}]}, "needle", True),
    "a quote": ({"message": 'say "no"'}, '"no"', True),
    "a backslash": ({"path": "C:\\new"}, "C:\\new", True),
    "half of a backslash and n": ({"path": "a\nb"}, "nb", False),
    "a line end": ({"message": "a\nb"}, "a\nb", True),
    "é": ({"message": "café"}, "café", True),
    "é of two characters": ({"message": "café"}, "cafe\u0301", False),
    "an emoji": ({"message": "so 😀!"}, "😀", True),
    "a NUL": ({"message": "a\0b"}, "a\0b", True),
    "a NUL, and what is behind": ({"message": "a\0b"}, "b", True),
    "part of an escape": ({"message": "a\0b"}, "u0000", False),
    "a number": ({"n": 1234}, "123", True),
    "a number in its spelling": ({"n": 1.5}, "1.5", True),
    "true": ({"open": True}, "true", True),
    "across a name and its value": ({"open": True}, 'open":true', False),
    "across two values": ({"a": ["x", "y"]}, "x,y", False),
    "a percent sign": ({"message": "100 % sure"}, "100 % sure", True),
    "a wildcard": ({"message": "the door"}, "d*r", False),
    "longer than the payload": ({}, "x" * 500, False),
}

# What `since` says, the zone, and the instant that is meant, at 2026-01-01T00:30:00Z.
DAYS = text_table("""
    today               | today     | Z      | 2026-01-01T00:00:00Z
    yesterday           | yesterday | Z      | 2025-12-31T00:00:00Z
    today, further east | today     | +02:00 | 2025-12-31T22:00:00Z
    today, further west | today     | -01:00 | 2025-12-31T01:00:00Z
    yesterday, west     | yesterday | -01:00 | 2025-12-30T01:00:00Z
    half an hour more   | today     | +05:30 | 2025-12-31T18:30:00Z
""")


# ---- Size

MB = 1024 * 1024
GB = 1024 * MB


def growth_of(*sizes, apart_s=60.0, free=100 * GB, total=200 * GB):
    """What is known after these sizes of a store, so far apart."""
    growth = aggregator.Growth()
    for number, size in enumerate(sizes):
        growth.add(number * apart_s, aggregator.DiskUse(size, free, total))
    return growth


# What is seen, and the beginning of the warning.
DISKS = {
    "much room": (growth_of(MB), ""),
    "nothing seen yet": (growth_of(), ""),
    "a system that does not tell": (growth_of(MB, free=None, total=None), ""),
    "less than 256 MB of a large disk": (growth_of(MB, free=255 * MB), "the disk has only 255 MB"),
    "5 % of a router's disk": (growth_of(MB, free=10 * MB, total=100 * MB), ""),
    "4 % of a router's disk": (growth_of(MB, free=4 * MB, total=100 * MB), "the disk has only 4"),
    "full in three days": (growth_of(0, GB, apart_s=43_200.0, free=6 * GB), "at this growth"),
    "full in ten days": (growth_of(0, GB, apart_s=43_200.0, free=20 * GB), ""),
    "it shrinks": (growth_of(9 * GB, 0, apart_s=43_200.0, free=GB), ""),
    "a burst in the first minute": (growth_of(0, GB, free=20 * GB), ""),
}


# ---- Backups


def make_store(path, records):
    """A store with these records, closed again."""
    with open_store(path) as opened:
        for start in range(0, len(records), 1000):
            opened.commit(records[start : start + 1000], NOW)


def schema_version(path):
    with contextlib.closing(sqlite3.connect(path)) as db:
        [version] = db.execute("PRAGMA user_version").fetchone()
        return version


def old_program(folder):
    """`aggregator.py` as of 1.0.0 from the history of the project; None without one."""
    # The last commit of 1.0.0.
    words = ["git", "-C", HERE, "show", "700e9cc:aggregator.py"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        shown = subprocess.run(words, check=True, capture_output=True, timeout=20)
        path = folder / "aggregator_1.py"
        path.write_bytes(shown.stdout)
        return path
    return None


def mode_of(path):
    return os.stat(path).st_mode & 0o777


NO_BACKUPS = {
    "no store at all": (["--db", "missing.db", "--to", "copy.db"], 1, "there is no store"),
    "nowhere to": (["--db", "s.db"], 2, "--to FILE"),
    "an empty name": (["--db", "s.db", "--to", ""], 2, "--to must not be empty"),
    "a file that exists": (["--db", "s.db", "--to", "notes.txt"], 1, "never replaces a file"),
    "the store itself": (["--db", "s.db", "--to", "s.db"], 1, "never replaces a file"),
    "a folder that is missing": (["--db", "s.db", "--to", "no/copy.db"], 1, "No such file"),
    "no store of ours": (["--db", "notes.txt", "--to", "copy.db"], 1, "not an SQLite database"),
    "half a backup": (["--db", "s.db", "--to", "half.db"], 1, "was interrupted"),
}


# ---- Tokens

# Flags and variables, and part of the message. {} is the folder of the test.
NO_TOKENS = {
    "an empty flag": (["--token", ""], {}, "--token must be"),
    "an empty variable": ([], {"AUTH_TOKEN": ""}, "AUTH_TOKEN must be"),
    "only commas": (["--token", " , "], {}, "--token must be"),
    "an empty name of a file": (["--token-file", ""], {}, "must name a file"),
    "an empty variable for the file": ([], {"AUTH_TOKEN_FILE": ""}, "must name a file"),
    "a file that is missing": (["--token-file", "{}/none"], {}, "cannot be read: No such file"),
    "a file that is a folder": (["--token-file", "{}"], {}, "cannot be read: Is a directory"),
    "an empty file": (["--token-file", "{}/empty"], {}, "each token in it must be"),
    "a file with a wrong token": (["--token-file", "{}/wrong"], {}, "each token in it must be"),
    "a file that is no text": (["--token-file", "{}/binary"], {}, "more than ASCII"),
    "an empty credential": ([], {"CREDENTIALS_DIRECTORY": "{}/bad"}, "each token in it must be"),
    "only a read token": (["--read-token", "r"], {}, "needs --token or --token-file"),
    "only a credential for reading": (
        [],
        {"CREDENTIALS_DIRECTORY": "{}/reading"},
        "credential aggregator-read-token needs --token or",
    ),
    "only a file of read tokens": (["--read-token-file", "{}/good"], {}, "needs --token or"),
}


def make_token_files(folder):
    (folder / "good").write_text("new-one\nold-one\n")
    (folder / "empty").write_text("\n")
    (folder / "wrong").write_text("s3cret!\n")
    (folder / "binary").write_bytes(b"\xff")
    for name in ("bad", "credentials", "reading"):
        (folder / name).mkdir()
    (folder / "bad" / "aggregator-token").write_text("")
    (folder / "credentials" / "aggregator-token").write_text("from-systemd\n")
    (folder / "credentials" / "aggregator-read-token").write_text("reader\n")
    (folder / "reading" / "aggregator-read-token").write_text("reader\n")


def settings_of(*arguments, **environment):
    return aggregator.read_settings("serve", list(arguments), environment)


def bearer(token):
    return "Authorization: Bearer " + token


READ_ONLY = aggregator.Access(tokens=("all",), read_tokens=("read",))
# The method, the target, and the problem; "-" is none.
TAIL_TOKENS = text_table("""
    the read token     | GET    | /events?follow=1&access_token=read         | -
    the other token    | GET    | /events?follow=1&access_token=all          | unauthorized
    a wrong token      | GET    | /events?follow=1&access_token=x            | unauthorized
    an empty token     | GET    | /events?follow=1&access_token=             | unauthorized
    no ASCII           | GET    | /events?follow=1&access_token=%C3%A9       | unauthorized
    no token           | GET    | /events?follow=1                           | unauthorized
    a list             | GET    | /events?access_token=read                  | unauthorized
    follow=0           | GET    | /events?follow=0&access_token=read         | bad-parameter
    one event          | GET    | /events/t/1?follow=1&access_token=read     | unauthorized
    the numbers        | GET    | /stats?follow=1&access_token=read          | unauthorized
    erasing            | DELETE | /events?follow=1&access_token=read&topic=t | unauthorized
""")


class Site:
    """A server on a free port, in a thread with a loop of its own.

    `api`, `server`, `store` and `live_tail` are what it runs; they belong to its
    thread.
    """

    def __init__(self, path, limits):
        self._path = path
        self._limits = limits
        self._ready = threading.Event()
        self._thread = threading.Thread(target=asyncio.run, args=(self._run(),), daemon=True)
        self._thread.start()
        assert self._ready.wait(10)

    async def _run(self):
        def clock_us():
            return time.time_ns() // 1000

        self._loop = asyncio.get_running_loop()
        self._end = asyncio.Event()
        pipeline = aggregator.Pipeline(self._open_store, clock_us)
        self.live_tail = aggregator.LiveTail(pipeline)
        self.api = aggregator.API(pipeline, self.live_tail, clock_us, lambda: "id", {})
        self.server = aggregator.Server(self.api, time.time, self._limits)
        self.port = await self._bind(None)
        await pipeline.start()
        await self.server.listen()
        self._ready.set()
        await self._end.wait()
        await self.server.stop(0.5)
        await pipeline.stop(5)

    def _open_store(self):
        self.store = aggregator.Store(self._path)
        return self.store

    async def _bind(self, tls):
        addresses = await self.server.bind("127.0.0.1", 0, tls)
        return int(addresses[0].rpartition(":")[2])

    def serve_tls(self, certificate):
        """Begin to serve the same over TLS; the port."""
        import ssl

        async def bind_and_listen():
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            port = await self._bind(context)
            await self.server.listen()
            return port

        return asyncio.run_coroutine_threadsafe(bind_and_listen(), self._loop).result(10)

    @property
    def connections(self):
        """How many are open."""
        return self.api.connections()

    @property
    def kept(self):
        """Bytes of bodies and answers in memory that count against the limit."""
        return self.server.kept_bytes()

    def call(self, function):
        """Have the server's thread call a function."""
        self._loop.call_soon_threadsafe(function)

    def shrink_send_buffers(self):
        """Have the kernel take little of what future connections do not read."""
        for sock in self.server._server.sockets:
            # Accepted sockets inherit it.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)

    def close(self):
        self.call(self._end.set)
        self._thread.join(20)
        assert not self._thread.is_alive()


@pytest.fixture
def open_site(tmp_path):
    """A function that opens a site with the limits that it is given."""
    sites = []

    def open_one(**limits):
        limits = aggregator.ServerLimits(**dict({"sweep_s": 0.05, "linger_s": 0.3}, **limits))
        sites.append(Site(str(tmp_path / "site.db"), limits))
        return sites[-1]

    yield open_one
    for site in sites:
        site.close()


@pytest.fixture
def site(open_site):
    return open_site()


def until(condition, timeout_s=15):
    """Wait until a condition holds; fail if it takes too long."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.01)


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
    """A connected socket that has sent `data`."""
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


def read_until(sock, ending):
    """Everything up to what ends with `ending`."""
    data = b""
    while not data.endswith(ending):
        piece = sock.recv(65536)
        assert piece, "the stream ended early"
        data += piece
    return data


def read_what_comes(sock):
    """Everything up to the end of the stream, or to a reset."""
    data = b""
    with contextlib.suppress(ConnectionError):
        while True:
            piece = sock.recv(65536)
            if not piece:
                break
            data += piece
    return data


def reset(sock):
    """Close a socket so that the other side gets a reset."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def exchange(port, data, half_close=False):
    """All answers to what is sent over one connection, up to its end."""
    with contextlib.closing(dial(port, data)) as sock:
        if half_close:
            sock.shutdown(socket.SHUT_WR)
        return answers(read_all(sock))


def statuses(port, data, half_close=False):
    """Their statuses."""
    return statuses_of(exchange(port, data, half_close))


def statuses_of(found):
    return [answer.status for answer in found]


def first_answer(raw):
    answer, _ = split_answer(raw)
    return answer


def answers(raw):
    """Raw bytes to answers; each must have its Date, its Server and exact framing."""
    found = []
    while raw:
        answer, raw = split_answer(raw)
        if answer.status >= 200:
            date = "[A-Z][a-z]{2}, [0-9]{2} [A-Z][a-z]{2} 20[0-9]{2} [0-9:]{8} GMT"
            assert re.fullmatch(date, answer.headers["date"])
            assert answer.headers["server"] == "aggregator/" + aggregator.__version__
        found.append(answer)
    return found


def split_answer(raw):
    """The first answer of raw bytes, and what stands behind it."""
    head, blank, raw = raw.partition(b"\r\n\r\n")
    assert blank, "a head without an end"
    status_line, *fields = head.decode("ascii").split("\r\n")
    match = re.match(r"HTTP/1\.1 (?P<status>[0-9]{3}) [A-Z]", status_line)
    status = int(match["status"])
    headers = {}
    for field in fields:
        name, _, value = field.partition(":")
        assert name.lower() not in headers or name == "Vary"
        headers[name.lower()] = value.strip()
    if headers.get("transfer-encoding") == "chunked":
        assert "content-length" not in headers
        body, pieces, raw = split_chunks(raw)
        return Answer(status, headers, body, pieces), raw
    size = 0
    if status not in (100, 204):
        size = int(headers["content-length"])
    assert len(raw) >= size
    return Answer(status, headers, raw[:size]), raw[size:]


def split_chunks(raw):
    """A chunked body, how many chunks it had, and what stands behind it."""
    body = b""
    pieces = 0
    while True:
        text, _, raw = raw.partition(b"\r\n")
        size = int(text, 16)
        assert raw[size : size + 2] == b"\r\n"
        body += raw[:size]
        raw = raw[size + 2 :]
        if size == 0:
            return body, pieces, raw
        pieces += 1


def http_request(method, target, body=b"", *fields):
    """The bytes of a request; with its Content-Length unless `fields` have it."""
    head = [f"{method} {target} HTTP/1.1", "Host: localhost", *fields]
    framing = ("content-length", "transfer-encoding")
    if body and not any(field.lower().startswith(framing) for field in fields):
        head.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*head, "", ""]).encode() + body


def post(*fields, body=b""):
    """The bytes of a publish."""
    return http_request("POST", "/publish", body, *fields)


def get(target, *fields):
    return http_request("GET", target, b"", *fields)


def put_request(event_id, size, *fields):
    """The head of a PUT whose body will have `size` bytes."""
    return http_request("PUT", f"/events/t/{event_id}", b"", f"Content-Length: {size}", *fields)


def chunk(data):
    return b"%x\r\n%b\r\n" % (len(data), data)


HEALTH = get("/health")
LAST = get("/health", "Connection: foo, CLOSE")
SMUGGLED = http_request("PUT", "/events/smuggled/1", b"{}")
FOLLOW = get("/events?follow=1&after=0")
STREAM = get("/events", "Accept: application/x-ndjson")


def messages_in_memory():
    """Requests and answers, and what makes them, by id."""
    kinds = (aggregator.Request, aggregator.Response, aggregator.RequestParser, aggregator.Page)
    return {id(value) for value in gc.get_objects() if type(value) in kinds}


def requests_in_memory():
    """How many whole requests the collector knows of."""
    return sum(type(value) is aggregator.Request for value in gc.get_objects())


@pytest.fixture
def assert_nothing_is_left():
    """Asserts that nothing of an exchange waits for the garbage collector.

    What waits for it would be megabytes, and it comes after thousands of requests. So
    the collector rests, and cycles stay.
    """
    gc.disable()
    before = messages_in_memory()
    yield lambda: until(lambda: messages_in_memory() <= before, timeout_s=5)
    gc.enable()


class NoisyAPI:
    """An API whose answers a test chooses. `refusal` may be an exception to raise."""

    def __init__(self, answer, refusal=None):
        self._answer = answer
        self._refusal = refusal

    async def answer(self, request, peer):
        return self._answer()

    def admit(self, head):
        return True

    def refuse(self, error, who, warn=True):
        if self._refusal:
            raise self._refusal
        body = json.dumps({"detail": error.detail}).encode()
        status = aggregator.PROBLEMS[error.problem].status
        return aggregator.Response(status, body, "application/problem+json")


def ask_server_over(api, data):
    """What a server over `api` answers to `data`."""

    async def ask():
        server = aggregator.Server(api, time.time, aggregator.ServerLimits(linger_s=0.2))
        addresses = await server.bind("127.0.0.1", 0)
        await server.listen()
        host, _, port = addresses[0].rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(data)
        raw = await asyncio.wait_for(reader.read(), 10)
        writer.close()
        await server.stop(1)
        return raw

    return asyncio.run(ask())


# ============================================================================
# Helpers of §12  Publish, follow, relay
# ============================================================================

# Limits with which nothing waits for long.
FAST = aggregator.ClientLimits(
    backoff_s=0.001, poll_s=0.01, quiet_s=0.0, copy_s=0.0, rewritten_s=0.0
)
NUMBERS = itertools.count()


class Fake:
    """A service that answers as `behave(asked)` says; it keeps what it was asked.

    `asked` is the list of events of a publish, or the target of a GET. The answer is a
    status, a JSON object or text, and header fields if need be; None breaks the
    connection.
    """

    def __init__(self, behave):
        self.behave = behave
        self.asked = []
        self.codings = []
        self.when_s = []
        fake = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1

            def do_GET(self):
                self.answer(self.path)

            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                fake.codings.append(self.headers["Content-Encoding"])
                if fake.codings[-1] == "gzip":
                    body = zlib.decompress(body, 31)
                self.answer([json.loads(line) for line in body.split(b"\n")])

            def answer(self, asked):
                told = fake.note(asked)
                if told is None:
                    self.close_connection = True
                    return
                status, value, *more = told
                text = value
                if not isinstance(value, str):
                    text = json.dumps(value)
                fields = dict(*more)
                fields["Content-Length"] = str(len(text.encode()))
                self.send_response(status)
                for name in fields:
                    self.send_header(name, fields[name])
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        serve = self.server.serve_forever
        threading.Thread(target=serve, args=(0.01,), daemon=True).start()

    def note(self, asked):
        self.asked.append(asked)
        self.when_s.append(time.monotonic())
        return self.behave(asked)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


def taken(events):
    """The answer of a service that takes all."""
    counts = {"unique": len(events), "duplicates": 0, "conflicts": 0}
    return 202, dict(counts, status="accepted", accepted=len(events))


def scripted(*answers):
    """A behaviour: these answers first, then all is taken."""
    left = list(answers)
    return lambda asked: left.pop(0) if left else taken(asked)


def refuse_thirteen(events):
    """Takes no more than 16 at a time, and never the 13th; names no faulty one."""
    if len(events) > 16:
        return 413, {}
    for event in events:
        if event["event_id"] == "13":
            return 422, {"detail": "unlucky"}
    return taken(events)


def passed_by(fake, behave):
    """The ids of the events that a fake took, in order."""
    passed = []
    for asked in fake.asked:
        if isinstance(asked, list) and behave(asked)[0] == 202:
            passed.extend(event["event_id"] for event in asked)
    return passed


class Child:
    """A client of ours as a process.

    `said()` is what it told, `aside()` what it set aside.
    """

    def __init__(self, folder, *arguments, **env):
        self.arguments = arguments
        self.out = os.path.join(str(folder), f"child-{next(NUMBERS)}")
        words = [*COMMAND, *map(str, arguments)]
        with open(self.out, "wb") as out, open(self.out + ".err", "wb") as err:
            self.process = subprocess.Popen(
                words, stdin=subprocess.PIPE, stdout=out, stderr=err, env=clean_environment(**env)
            )

    def said(self):
        with open(self.out + ".err", encoding="utf-8") as err:
            return err.read()

    def last_line(self):
        lines = self.said().splitlines()
        return lines[-1] if lines else ""

    def aside(self):
        with open(self.out, encoding="utf-8") as out:
            return out.read()

    def end(self, number=signal.SIGTERM):
        self.process.send_signal(number)
        return self.process.wait(10)

    def kill(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.kill()


def ship(address, *files, **settings):
    """Publish files in this process; the exit status."""
    settings = {name: convert(value) for name, value in settings.items()}
    settings.setdefault("limits", FAST)
    url = aggregator.parse_address(str(address))
    files = tuple(str(file) for file in files)
    return aggregator.publish(aggregator.PublishSettings(files, url, **settings))


def convert(value):
    """A path as text, all else as it is."""
    if isinstance(value, os.PathLike):
        return str(value)
    return value


@pytest.fixture
def send(site):
    """Publishes lines of files to a site, under the topic "t"; the exit status."""

    def send_files(*files, **settings):
        return ship(local(site.port), *files, topic="t", **settings)

    return send_files


def pass_on(source, target, place="", **settings):
    """Relay once, in this process, between fakes or services; the exit status."""
    urls = []
    for side in (source, target):
        url = getattr(side, "url", None) or local(side.port)
        urls.append(aggregator.parse_address(url))
    settings.setdefault("limits", FAST)
    return aggregator.relay(
        aggregator.RelaySettings(*urls, state=str(place), once=True, **settings)
    )


def ids_in(events):
    return [event["event_id"] for event in events]


def local(port):
    """The address of a service on this machine."""
    return f"127.0.0.1:{port}"


def stored(port, topic="t"):
    """All events of a topic, in order of seq."""
    accept = {"Accept": "application/x-ndjson"}
    answer = fetch(port, "GET", "/events?topic=" + quote(topic), headers=accept)
    return sorted(answer.rows, key=lambda event: event["seq"])


def messages(port, topic="t"):
    return [event["payload"]["message"] for event in stored(port, topic)]


def count_stored(port):
    return fetch(port, "GET", "/stats").json["unique_processed"]


def append(path, text):
    with open(str(path), "a", encoding="utf-8") as file:
        file.write(text)


def numbered(start, stop):
    """Lines with a time, a number and a place in the past."""
    return "".join(f"2026-01-01T00:00:00Z line {number}\n" for number in range(start, stop))


def line_numbers(texts):
    """The numbers of lines that `numbered` made."""
    return [int(text.rpartition(" ")[2]) for text in texts]


class LogReading:
    """A log as a follower has it, but looked at and read by hand: nothing waits."""

    def __init__(self, path, place=None, limits=FAST, topic="t", **options):
        options.setdefault("follows", True)
        options.setdefault("keeps_place", True)
        options.setdefault("reads_older", True)
        ids = "offset" if topic else "given"
        lines = aggregator.LineSettings(topic, "h", ids)
        marks = aggregator.read_marks(place)
        options["salt"] = aggregator.read_salt(place)
        self.log = aggregator.Log(str(path), lines, limits, marks, **options)
        self.place = place
        self.ids = []

    def look(self):
        self.log.look()
        return self

    def read(self):
        """What is there now; its messages, in order."""
        texts = []
        while True:
            batch = self.log.read()
            if batch is None:
                return texts
            for event in map(json.loads, batch.events):
                texts.append(event["payload"]["message"])
                self.ids.append(event["event_id"])
            # As it comes out of the file of --state.
            self.place = json.loads(json.dumps(batch.place))

    def again(self, **options):
        """The reading of the next start, which has the place of this one."""
        return LogReading(self.log.path, self.place, **options).look()


def ids_of(path, **options):
    """The ids of the lines of a file that is read without any history."""
    options.setdefault("follows", False)
    reading = LogReading(path, is_alone=True, keeps_place=False, **options).look()
    reading.read()
    return reading.ids


def copy_and_truncate(path, copy):
    shutil.copyfile(str(path), str(copy))
    os.truncate(str(path), 0)


def compress(path):
    """As gzip does: the file gives way to NAME.gz, which keeps its time."""
    path = str(path)
    status = os.stat(path)
    with open(path, "rb") as plain, gzip.open(path + ".gz", "wb") as squeezed:
        shutil.copyfileobj(plain, squeezed)
    os.utime(path + ".gz", ns=(status.st_atime_ns, status.st_mtime_ns))
    os.remove(path)


class ChaosWriter:
    """Writes numbered lines with a time, and equal ones without, and rotates the log.

    It does so in three ways: by renaming; by copying and truncating; by renaming, with
    the file before compressed.

    Lines that are `alike` make files that begin alike: some numbered lines tell the
    second only, and equal lines stand at the start of files, too. Some of those have a
    time.
    """

    EQUAL = "a line without a time, like others"
    EQUAL_TIMED = "retry, like others"

    def __init__(self, path, count, equal, seed, alike):
        self.alike = alike
        self.equal = equal
        self.equal_timed = 0
        self.path = str(path)
        self.chance = random.Random(seed)
        self.count = count
        # An equal line follows each of these, so that none is the first of a file.
        self.equal_after = set(self.chance.sample(range(count), equal))
        self.written = 0
        self.rotations = 0
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self):
        while self.written < self.count:
            self.write(self.chance.randrange(1, 60))
            time.sleep(self.chance.choice((0, 0.001, 0.02)))
            # At random, and after each fifth of the lines at the latest.
            is_due = self.written > self.count * (self.rotations + 1) / 5
            if is_due or self.chance.random() < 0.05:
                self.rotate()

    def write(self, most):
        """Some lines, the last one in two halves."""
        text = ""
        if self.alike and not (os.path.exists(self.path) and os.path.getsize(self.path)):
            text += self.start_alike()
        for number in range(self.written, min(self.written + most, self.count)):
            now = datetime.datetime.now(datetime.timezone.utc).isoformat()
            if self.alike and self.chance.random() < 0.3:
                now = now[:19] + "Z"
            text += f"{now} {'x' * self.chance.randrange(80)} line {number}\n"
            if number in self.equal_after:
                text += self.EQUAL + "\n"
            self.written += 1
        half = self.chance.randrange(len(text))
        with open(self.path, "a") as file:
            file.write(text[:half])
            file.flush()
            file.write(text[half:])

    def start_alike(self):
        """Equal lines at the start of a file, without a time and with the second."""
        equal, timed = self.chance.randrange(2), self.chance.randrange(3)
        self.equal += equal
        self.equal_timed += timed
        now = datetime.datetime.now(datetime.timezone.utc).isoformat()[:19]
        return f"{self.EQUAL}\n" * equal + f"{now}Z {self.EQUAL_TIMED}\n" * timed

    def rotate(self):
        self.rotations += 1
        numbers = self.shift()
        style = self.chance.choice(("rename", "copy", "compress"))
        if style == "copy":
            copy_and_truncate(self.path, self.path + ".1")
            return
        os.rename(self.path, self.path + ".1")
        if style == "compress" and 1 in numbers:
            compress(self.path + ".2")
        open(self.path, "a").close()

    def shift(self):
        """Rename .1 to .2 and so on; the numbers of those that are not compressed."""
        found = []
        for name in os.listdir(os.path.dirname(self.path)):
            match = re.fullmatch(r"app\.log\.([0-9]+)(\.gz)?", name)
            if match:
                found.append((int(match[1]), match[2] or ""))
        for number, ending in sorted(found, reverse=True):
            os.rename(f"{self.path}.{number}{ending}", f"{self.path}.{number + 1}{ending}")
        return [number for number, ending in found if not ending]


class Chaos:
    """A writer, a service and a follower; the last two are killed at random.

    Once the place is deleted, too; but not with files that are `alike`: they are told
    apart by what the place knows.
    """

    def __init__(self, folder, count, equal, seed, alike):
        self.folder = folder
        self.chance = random.Random(seed)
        self.place = folder / "place"
        self.log = folder / "app.log"
        self.writer = ChaosWriter(self.log, count, equal, seed, alike)
        self.service = Program(folder / "chaos.db")
        self.port = self.service.port
        self.follower = self.follow()
        self.kills = 0
        self.has_deleted = alike

    def expected(self):
        return self.writer.count + self.writer.equal + self.writer.equal_timed

    def follow(self):
        return Child(
            self.folder,
            *("publish", "--url", local(self.port), "--topic", "t", "--source", "h"),
            *("--follow", "--state", self.place, self.log),
        )

    def run(self):
        # A fast writer is done before much was killed. Then what follows it is.
        while self.writer.thread.is_alive() or self.kills < 2:
            time.sleep(self.chance.uniform(0, 0.8))
            self.strike()
        wait_until(lambda: count_stored(self.port) >= self.expected(), 120)

    def strike(self):
        """Kill one of the two, or both, and start what was killed some time later."""
        victims = self.chance.choice((["service"], ["follower"], ["service", "follower"]))
        self.kills += len(victims)
        if "service" in victims:
            self.service.kill()
        if "follower" in victims:
            self.follower.kill()
            self.delete_place_once()
        time.sleep(self.chance.uniform(0, 0.8))
        if "service" in victims:
            self.service = Program(self.folder / "chaos.db", "--port", str(self.port))
        if "follower" in victims:
            self.follower = self.follow()

    def delete_place_once(self):
        is_late = self.writer.written > self.writer.count / 2
        if is_late and not self.has_deleted and self.place.exists():
            os.remove(str(self.place))
            self.has_deleted = True

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.follower.kill()
        self.service.kill()


# ============================================================================
# Helpers of §14  The replicated log: PostgreSQL, a log in memory, nodes, chaos
# ============================================================================


def find_postgres():
    """The folder with the programs of the newest PostgreSQL; "" if there is none."""
    if os.environ.get("WITHOUT_POSTGRES"):
        return ""
    folders = sorted(
        glob.glob("/usr/lib/postgresql/*/bin"),
        key=lambda folder: int(folder.split("/")[-2]),
    )
    for folder in reversed(folders):
        if os.path.exists(folder + "/initdb"):
            return folder
    return os.path.dirname(shutil.which("initdb") or "")


POSTGRES_BIN = find_postgres()
# PostgreSQL refuses to run as root, so root runs it as somebody else.
AS_POSTGRES = []
if os.geteuid() == 0:
    AS_POSTGRES = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
can_run_postgres = has_proc and (not AS_POSTGRES or shutil.which("setpriv"))
needs_postgres = pytest.mark.skipif(
    not POSTGRES_BIN or not can_run_postgres,
    reason="no initdb here (Debian: apt-get install postgresql), or WITHOUT_POSTGRES is set",
)
LOG_PASSWORD = "s3:cr@t/?#%"
LOG_PASSWORD_IN_URL = "s3%3acr%40t%2f%3f%23%25"


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class PostgresServer:
    """A PostgreSQL on loopback with a folder of its own. Its user is not root."""

    CONFIGURATION = """
        listen_addresses = '127.0.0.1'
        unix_socket_directories = ''
        fsync = off
        shared_buffers = 16MB
        max_connections = 60
        wal_keep_size = 512MB
        hot_standby = on
        log_min_messages = warning
    """

    SURROUNDINGS = {"cwd": "/", "env": {"PATH": os.environ["PATH"], "LC_ALL": "C"}}

    def __init__(self, folder, name):
        self.name = name
        self.port = free_port()
        self.data = os.path.join(folder, name)
        self.output = os.path.join(folder, name + ".txt")
        self._process = None

    def run(self, program, *arguments):
        """Run a program of PostgreSQL to its end; its output."""
        command = [*AS_POSTGRES, os.path.join(POSTGRES_BIN, program), *arguments]
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            universal_newlines=True,
            timeout=20,
            **self.SURROUNDINGS,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def create(self, *lines):
        """Make the folder: a superuser "agg" with a password, and "guest" without."""
        self.run("initdb", "-D", self.data, "-U", "agg", "-A", "trust", "--no-sync")
        with open(self.data + "/pg_hba.conf", "w") as file:
            file.write(
                "host all guest 127.0.0.1/32 trust\n"
                "host replication guest 127.0.0.1/32 trust\n"
                "hostssl all secret 127.0.0.1/32 scram-sha-256\n"
                "hostnossl all secret 127.0.0.1/32 reject\n"
                "host all,replication all 127.0.0.1/32 scram-sha-256\n"
            )
        self.configure(self.CONFIGURATION)
        statements = f"""
            SET password_encryption = 'scram-sha-256';
            ALTER USER agg PASSWORD '{LOG_PASSWORD}';
            CREATE USER guest SUPERUSER;
            CREATE USER secret PASSWORD '{LOG_PASSWORD}';
        """
        subprocess.run(
            [*AS_POSTGRES, POSTGRES_BIN + "/postgres", "--single", "-D", self.data, "postgres"],
            input=" ".join(statements.split()).replace("; ", ";\n").encode() + b"\n",
            stdout=subprocess.DEVNULL,
            check=True,
            timeout=20,
            **self.SURROUNDINGS,
        )
        self.configure(*lines)

    def configure(self, *lines):
        with open(self.data + "/postgresql.conf", "a") as file:
            file.write("\n".join(lines) + "\n")

    def start(self):
        """Start, and wait until it can be asked."""
        with open(self.output, "ab") as output:
            self._process = subprocess.Popen(
                [*AS_POSTGRES, POSTGRES_BIN + "/postgres", "-D", self.data]
                + ["-p", str(self.port)]
                # A standby is known to its primary by this name.
                + ["-c", f"cluster_name={self.name}"],
                stdout=output,
                stderr=output,
                **self.SURROUNDINGS,
            )
        for _ in range(200):
            ready = subprocess.run(
                [POSTGRES_BIN + "/pg_isready", "-q", "-h", "127.0.0.1", "-p", str(self.port)]
            )
            if ready.returncode == 0:
                return
            time.sleep(0.05)
        with open(self.output) as file:
            raise AssertionError(file.read()[-2000:])

    def stop(self):
        """Stop at once, whatever state it is in."""
        if self._process is None:
            return
        self.signal(signal.SIGCONT)
        self._process.send_signal(signal.SIGQUIT)
        self._process.wait()
        self._process = None

    def pids(self):
        """The server and all processes that it has started."""
        pid = self._process.pid
        pids = [pid]
        with contextlib.suppress(OSError):
            with open(f"/proc/{pid}/task/{pid}/children") as file:
                pids += [int(child) for child in file.read().split()]
        return pids

    def signal(self, number):
        for pid in self.pids():
            with contextlib.suppress(OSError):
                os.kill(pid, number)

    def kill(self):
        """kill -9 of everything."""
        self.signal(signal.SIGKILL)
        self._process.wait()
        self._process = None

    def ask(self, statement, database="postgres"):
        """The lines that a statement returns."""
        address = f"host=127.0.0.1 port={self.port} user=guest dbname={database}"
        return self.run("psql", "-XAtq", "-d", address, "-c", statement).split("\n")[:-1]

    def reconfigure(self, setting, value):
        self.ask(f"ALTER SYSTEM SET {setting} = '{value}'")
        self.ask("SELECT pg_reload_conf()")

    def url(self, database="postgres", user="agg", options=""):
        return f"postgres://{user}:{LOG_PASSWORD_IN_URL}@127.0.0.1:{self.port}/{database}{options}"


def make_postgres_folder():
    """A folder that the user of PostgreSQL can reach, unlike pytest's."""
    folder = tempfile.mkdtemp(prefix="agg-postgres-")
    if os.geteuid() == 0:
        shutil.chown(folder, "postgres")
    return folder


@pytest.fixture(scope="module")
def postgres():
    """One server for many tests; each takes a database of its own."""
    folder = make_postgres_folder()
    server = PostgresServer(folder, "only")
    server.create()
    certificate = make_certificate(folder, "localhost")
    server.configure("ssl = on", f"ssl_cert_file = '{certificate}'")
    server.configure(f"ssl_key_file = '{certificate[:-4]}.key'")
    server.certificate = certificate
    server.start()
    yield server
    server.stop()
    shutil.rmtree(folder, ignore_errors=True)


def make_certificate(folder, name):
    """A certificate for a name, signed by itself; NAME.pem and NAME.key."""
    path = os.path.join(folder, name)
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
        + ["-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name}"]
        + ["-keyout", path + ".key", "-out", path + ".pem"],
        check=True,
        stderr=subprocess.DEVNULL,
    )
    for ending in (".key", ".pem"):
        if os.geteuid() == 0:
            shutil.chown(path + ending, "postgres")
        os.chmod(path + ending, 0o600)
    return path + ".pem"


@pytest.fixture
def database(postgres):
    """A database that only this test uses: its URL."""
    name = f"db{time.monotonic_ns()}"
    postgres.ask(f"CREATE DATABASE {name}")
    yield postgres.url(name)
    postgres.reconfigure("synchronous_standby_names", "")


def ask_log(url, statement):
    """What a statement returns in the database of a URL, one text a row."""
    address = aggregator.parse_log_url(url)
    place = f"host=127.0.0.1 port={address.servers[0].port} user=guest dbname={address.database}"
    command = [os.path.join(POSTGRES_BIN, "psql"), "-XAtq", "-d", place, "-c", statement]
    return subprocess.check_output(command, universal_newlines=True).split("\n")[:-1]


def in_loop(coroutine, timeout_s=20):
    """Run a coroutine to its end."""

    async def bounded():
        return await asyncio.wait_for(coroutine, timeout_s)

    return asyncio.run(bounded())


QUICK = aggregator.LogLimits(
    connect_s=1.0,
    answer_s=1.2,
    give_up_s=0.9,
    last_try_s=0.3,
    retry_s=0.02,
    poll_s=0.01,
    proof_s=0.2,
    catch_up_s=1.0,
)


async def connected(url, **limits):
    """A connection to the server of a URL."""
    address = aggregator.parse_log_url(url)
    return await aggregator.PostgresConnection.open(
        address.servers[0], address, "test", QUICK._replace(**limits)
    )


def query(url, statement, *values, **limits):
    """The rows of one statement over our own client."""

    async def run():
        connection = await connected(url, **limits)
        try:
            return await connection.query(statement, *values)
        finally:
            connection.close()

    return in_loop(run())


@contextlib.asynccontextmanager
async def fake_postgres(*answers):
    """A server that sends one answer after each thing it reads; its URL.

    It says nothing more behind the last answer and keeps the connection.
    """
    handlers = []

    async def serve(reader, writer):
        handlers.append(asyncio.current_task())
        for answer in answers:
            await reader.read(4096)
            writer.write(answer)
        with contextlib.suppress(OSError):
            await reader.read()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        port = server.sockets[0].getsockname()[1]
        yield f"postgres://u:{LOG_PASSWORD_IN_URL}@127.0.0.1:{port}/d"
    finally:
        server.close()
        for handler in handlers:
            handler.cancel()
        await asyncio.gather(*handlers, return_exceptions=True)


# ---- A log in memory ----


class MemoryLog:
    """A log that several nodes share in one process. Nothing fails in it."""

    def __init__(self):
        self.rows = []
        self.base = ""
        self.positions = {}
        # Appends whose bytes something holds: they will come, but nobody waits for
        # them.
        self.held = 0

    def add_later(self, delay_s, *entry):
        def add():
            self.held -= 1
            self.add(*entry)

        self.held += 1
        asyncio.get_running_loop().call_later(delay_s, add)

    def add(self, writer, number, body):
        if (writer, number) not in self.positions:
            chain = self.rows[-1].chain if self.rows else b""
            position = len(self.rows) + 1
            chain = aggregator.next_chain(chain, body)
            self.rows.append(aggregator.LogRow(position, chain, body))
            self.positions[writer, number] = position
        position = self.positions[writer, number]
        return aggregator.Appended(position, self.rows[position - 1].chain)

    def entries(self):
        return [aggregator.decode_entry(row.body) for row in self.rows]


class MemoryView:
    """What one node has of a MemoryLog, with the methods of PostgresLog.

    `reachable`: whether it answers at all. `quorum`: whether commits return; with None,
    appends do and barriers do not. `shown`: the log that reads see, if not `log`.
    `oldest`: entries before it were trimmed. With `rng`, calls take several turns of
    the loop, and some fail before or after they did their work. Now and then the way to
    the log is cut for a while: what was on it arrives later.
    """

    primary = "memory:1"

    def __init__(self, log, rng=None):
        self.log = log
        self.shown = None
        self.reachable = True
        self.quorum = True
        self.oldest = 1
        self.appends = 0
        self.barriers = 0
        self.reads = 0
        self._rng = rng
        self.failure_rate = 0.1
        self._cut_until_s = 0.0

    def _cut_now_and_then(self, *entry):
        """Cut the way, with an entry on it."""
        if self._rng is None or self._rng.random() > self.failure_rate / 2:
            return
        cut_s = self._rng.random() * 0.1
        self._cut_until_s = time.monotonic() + cut_s
        self.log.add_later(cut_s + self._rng.random() * 0.1, *entry)

    async def _dawdle(self):
        if not self.reachable or time.monotonic() < self._cut_until_s:
            raise aggregator.LogUnavailable("memory:1: unplugged")
        if self._rng is None:
            return await asyncio.sleep(0)
        for _ in range(self._rng.randrange(4)):
            await asyncio.sleep(0)
        if self._rng.random() < self.failure_rate:
            raise aggregator.LogUnavailable("memory:1: a random failure")

    async def _wait_for_quorum(self):
        if not self.quorum:
            raise aggregator.LogUnavailable("memory:1: no standby confirms")
        await self._dawdle()

    async def append(self, writer, number, body):
        self.appends += 1
        self._cut_now_and_then(writer, number, body)
        await self._dawdle()
        appended = self.log.add(writer, number, body)
        if self.quorum is False:
            await self._wait_for_quorum()
        await self._dawdle()
        return appended

    async def read(self, after):
        await self._dawdle()
        self.reads += 1
        shown = self.shown or self.log
        rows = shown.rows[max(after, self.oldest - 1) :][: aggregator.LOG_READ_ENTRIES]
        head, chain = 0, b""
        if shown.rows:
            head, chain = len(shown.rows), shown.rows[-1].chain
        stretch = aggregator.LogStretch(head, chain, shown.base, list(rows))
        await self._dawdle()
        return stretch

    async def barrier(self):
        self.barriers += 1
        await self._wait_for_quorum()

    async def claim_base(self, base):
        await self._dawdle()
        if not self.log.base and not self.log.rows:
            self.log.base = base

    async def trim(self):
        pass

    def close(self):
        pass


class Nodes:
    """Nodes on one log, each with a file in one folder."""

    def __init__(self, folder, limits=QUICK):
        self.folder = str(folder)
        self.limits = limits
        self.running = []

    def path(self, name):
        return os.path.join(self.folder, name + ".db")

    async def start(self, name, view, **settings):
        """Start a node on its file, which may be new."""
        settings.setdefault("full_sync", False)
        node = aggregator.ReplicatedPipeline(
            lambda: aggregator.Store(self.path(name), aggregator.StoreSettings(**settings)),
            lambda: time.time_ns() // 1000,
            view,
            name,
            log_limits=self.limits,
        )
        await node.start()
        self.running.append(node)
        return node

    async def stop(self):
        for node in self.running:
            await node.stop(2.0)
        self.running = []

    async def crash(self, node):
        """End a node in the middle of what it does, as kill -9 would."""
        self.running.remove(node)
        for task in node._tasks:
            task.cancel()
        await asyncio.gather(*node._tasks, return_exceptions=True)
        await node.stop(0.0)


def in_cluster(folder, scenario, limits=QUICK):
    """Run `scenario(nodes)`, a coroutine function, and stop what it started."""

    async def run():
        nodes = Nodes(folder, limits)
        try:
            return await scenario(nodes)
        finally:
            await nodes.stop()

    return in_loop(run())


def numbered_events(*numbers, payload="{}", sequence=None):
    """Events of one topic, by number."""
    events = []
    for number in numbers:
        events.append(aggregator.Event("t", str(number), NOW, "s", payload, sequence))
    return events


async def send_numbers(node, *numbers, **fields):
    """Publish events by number; a list of (kind, seq)."""
    receipt = await node.publish(numbered_events(*numbers, **fields), 10)
    return [(verdict.kind, verdict.seq) for verdict in receipt.verdicts()]


async def refusal_of(awaitable):
    """The text of the StoreFailed or StoreError that something ends with."""
    with pytest.raises((aggregator.StoreFailed, aggregator.StoreError)) as refusal:
        await awaitable
    return str(refusal.value)


async def until_true(condition, timeout_s=10.0):
    """Wait until something holds. `condition` is a function without arguments."""
    for _ in range(int(timeout_s / 0.01)):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it never came true")


async def level(*nodes):
    """Wait until each node has applied all that is in the log."""
    for node in nodes:
        await node.catch_up()


def replica_rows(path):
    """All of a store that must be equal on every node.

    The marks of merging and listing are left out: they depend on how many entries were
    applied together. Which keys are known is compared, not in which table.
    """
    with contextlib.closing(sqlite3.connect(path)) as db:
        return {
            "events": db.execute("SELECT * FROM processed_events ORDER BY seq").fetchall(),
            "books": db.execute("SELECT * FROM stats ORDER BY kind, name").fetchall(),
            "gaps": db.execute("SELECT * FROM sequences ORDER BY source").fetchall(),
            "id": db.execute("SELECT value FROM about WHERE name = 'store_id'").fetchall(),
            "place": db.execute("SELECT * FROM replica ORDER BY name").fetchall(),
            "keys": db.execute(
                """
                SELECT key, seq, fingerprint, first_seen FROM seen
                UNION
                SELECT key, seq, fingerprint, first_seen FROM archive
                UNION
                SELECT key, seq, fingerprint, processed_at FROM processed_events
                ORDER BY key
                """
            ).fetchall(),
        }


def assert_equal_stores(paths):
    """Row by row, and each in order by itself."""
    first = replica_rows(paths[0])
    for path in paths:
        rows = replica_rows(path)
        for table in first:
            assert rows[table] == first[table], f"{table} of {path}"
        broken = [sentence for holds, sentence in aggregator.check_store(path) if not holds]
        assert broken == []


def matches_of(order, kept, firsts):
    """The identities that an order erases: none that was stored after it was made."""
    found = set()
    for topic, name in kept:
        is_meant = order.topic == topic and order.event_id in (None, name)
        if is_meant and firsts[topic, name][0] <= order.through_seq:
            found.add((topic, name))
    return found


def assert_model_agrees(path, entries):
    """A dict that replays the log says the same as a store. Returns its firsts.

    `firsts`: by identity, the seq and the content that came first, also if it is
    erased.
    """
    firsts = {}
    kept = set()
    last = {}
    uniques = duplicates = conflicts = 0
    for entry in entries:
        if entry.number <= last.get(entry.writer, 0):
            continue
        last[entry.writer] = entry.number
        for record in entry.records:
            identity = (record.topic, record.event_id)
            content = (record.source, record.payload)
            if identity not in firsts:
                uniques += 1
                firsts[identity] = (uniques, content)
                kept.add(identity)
            else:
                duplicates += 1
                conflicts += firsts[identity][1] != content
        if entry.erasure is not None:
            kept -= matches_of(entry.erasure, kept, firsts)
    with contextlib.closing(sqlite3.connect(path)) as db:
        stored = db.execute("SELECT topic, event_id, seq, source, payload FROM processed_events")
        found = {(topic, name): (seq, (source, text)) for topic, name, seq, source, text in stored}
        (books,) = db.execute(
            "SELECT uniques, duplicates, conflicts FROM stats WHERE kind = 'total'"
        )
    assert found == {identity: firsts[identity] for identity in kept}
    assert books == (uniques, duplicates, conflicts)
    return firsts


def assert_acknowledged(acknowledged, firsts):
    """Nothing acknowledged is lost or doubled, and each verdict is right."""
    new = set()
    for event, verdict in acknowledged:
        identity = (event.topic, event.event_id)
        seq, content = firsts[identity]
        assert verdict.seq == seq
        if verdict.kind == "new":
            assert identity not in new
            new.add(identity)
        is_conflict = content != (event.source, event.payload)
        assert (verdict.kind == "conflict") == is_conflict


# ---- What tests share ----


WELCOME = b"R\0\0\0\x08\0\0\0\0"


READY = b"Z\0\0\0\x05I"


def in_log(url, scenario, limits=QUICK):
    """Run `scenario(log)` on the log of a URL."""

    async def run():
        log = aggregator.PostgresLog(aggregator.parse_log_url(url), "n", limits)
        try:
            return await scenario(log)
        finally:
            log.close()

    return in_loop(run())


def random_entries(rng, count):
    """Groups with repeats, conflicts and sequence numbers, and their arrivals."""
    groups = []
    for number in range(count):
        records = []
        for _ in range(rng.randrange(1, 6)):
            event = aggregator.Event(
                rng.choice("ab"),
                str(rng.randrange(60)),
                NOW,
                rng.choice("xy"),
                rng.choice(["{}", "{}", "{}", '{"n":1}', '"' + "l" * 2000 + '"']),
                rng.choice([None, rng.randrange(40)]),
            )
            records.append(aggregator.record_of(event))
        groups.append(aggregator.LogGroup(records, NOW + number))
    return groups


def entry_of(writer, number, event_id):
    """An entry of another node with one event."""
    return aggregator.Entry(
        writer, number, NOW, [aggregator.record_of(numbered_events(event_id)[0])]
    )


async def hang(*arguments):
    """A server that takes what it is sent and never answers."""
    await asyncio.sleep(3600)


async def unreadable(after):
    raise aggregator.LogUnavailable("memory:1: only reads fail")


def unwritable():
    raise aggregator.StoreFailed("the disk is full")


def rewound(log, position):
    """The same log, but from a position on it has other entries."""
    other = MemoryLog()
    other.base = log.base
    record = aggregator.record_of(numbered_events(1000)[0])
    for row in log.rows[: position - 1]:
        other.add("w", row.position, row.body)
    entry = aggregator.Entry("other", 1, NOW, [record])
    other.add("w", position, aggregator.encode_entry(entry))
    return other


def extended(log):
    entry = aggregator.Entry("other", 2, NOW, [])
    for number in range(2, 6):
        log.add("x", number, aggregator.encode_entry(entry._replace(number=number)))
    return log


def backends(server, statement, wanted="pid"):
    """The server processes that run a node's statement with this text, a line each."""
    return server.ask(
        f"SELECT {wanted} FROM pg_stat_activity WHERE application_name LIKE 'aggregator %'"
        f" AND state = 'active' AND query LIKE '%{statement}%'"
    )


def open_alone(path):
    """The store of a file as the program opens it without a log."""
    return aggregator.open_store(aggregator.read_settings("serve", ["--db", path], {}))


async def start_on(nodes, name, url):
    """Start a node whose log is in PostgreSQL."""
    log = aggregator.PostgresLog(aggregator.parse_log_url(url), name, nodes.limits)
    return await nodes.start(name, log)


def random_events(rng):
    """A few of 80 identities, sometimes with another content."""
    events = []
    for number in rng.choices(range(80), k=rng.randrange(1, 8)):
        payload = rng.choice(["{}", "{}", "1"])
        events += numbered_events(number, payload=payload, sequence=rng.randrange(90))
    return events


async def erase_something(node, rng, erased):
    """Erase one of those 80, rarely all; what is acknowledged is added to `erased`."""
    with contextlib.suppress(aggregator.StoreFailed, aggregator.Stopping, asyncio.TimeoutError):
        if rng.random() < 0.05:
            await asyncio.wait_for(node.erase_matching("t", False, None), 0.5)
            return
        name = str(rng.randrange(80))
        count = await asyncio.wait_for(node.erase_event("t", name), 0.5)
        if count is not None:
            erased.add(name)


def stored_names(path):
    """The ids of all events of a store."""
    with contextlib.closing(sqlite3.connect(path)) as db:
        return {name for (name,) in db.execute("SELECT event_id FROM processed_events")}


def fail_now_and_then(node, rng):
    """Have some transactions of a node's store fail, until its failure_rate is 0."""
    node.failure_rate = 0.1
    check_files = node._store._check_files

    def check_files_or_fail():
        if rng.random() < node.failure_rate:
            raise aggregator.StoreFailed("a random failure of the disk")
        check_files()

    node._store._check_files = check_files_or_fail


def run_beside(action):
    """Run something that blocks while the loop goes on."""
    return asyncio.get_running_loop().run_in_executor(None, action)


PATIENT = QUICK._replace(give_up_s=20.0, poll_s=0.05)


async def copy_stream(reader, writer):
    """Pass on what comes, until it ends."""
    with contextlib.suppress(OSError):
        while True:
            data = await reader.read(65536)
            if not data:
                break
            writer.write(data)
            await writer.drain()
    writer.close()


# ---- Chaos ----


class PostgresCluster:
    """Three servers: one primary, two standbys, and a commit needs one of these."""

    def __init__(self, folder):
        self.servers = [PostgresServer(folder, name) for name in ("s0", "s1", "s2")]
        self.primary = self.servers[0]
        self.history = {}

    def create(self):
        self.primary.create("synchronous_standby_names = 'ANY 1 (s0, s1, s2)'")
        self.primary.start()
        for standby in self.standbys():
            self.build_standby(standby)

    def standbys(self):
        return [server for server in self.servers if server is not self.primary]

    def url(self, database="postgres", servers=None):
        servers = servers or self.servers
        places = ",".join(f"127.0.0.1:{server.port}" for server in servers)
        return f"postgres://agg:{LOG_PASSWORD_IN_URL}@{places}/{database}?sslmode=disable"

    def create_database(self):
        name = f"db{time.monotonic_ns()}"
        self.primary.ask(f"CREATE DATABASE {name}")
        return name

    def build_standby(self, server):
        """Begin with an empty disk, and copy the primary."""
        shutil.rmtree(server.data, ignore_errors=True)
        place = f"host=127.0.0.1 port={self.primary.port} user=guest"
        server.run("pg_basebackup", "-d", place, "-D", server.data, "-c", "fast", "-R", "--no-sync")
        server.start()

    def promote(self):
        """Make the standby that has more the primary, as Patroni would."""
        received = {}
        for standby in self.standbys():
            (bytes_received,) = standby.ask(
                "SELECT greatest(pg_last_wal_receive_lsn(), pg_last_wal_replay_lsn()) - '0/0'"
            )
            received[int(bytes_received)] = standby
        other_standbys = self.standbys()
        old = self.primary
        self.primary = received[max(received)]
        other_standbys.remove(self.primary)
        self.primary.run("pg_ctl", "promote", "-w", "-D", self.primary.data)
        for standby in other_standbys:
            place = f"host=127.0.0.1 port={self.primary.port} user=guest"
            standby.reconfigure("primary_conninfo", place)
        return old

    def entries(self, database):
        """The whole log."""
        statement = "SELECT encode(body, 'hex') FROM agg_log ORDER BY pos"
        found = self.primary.ask(statement, database)
        return [aggregator.decode_entry(bytes.fromhex(body)) for body in found]

    def stop(self):
        for server in self.servers:
            server.stop()

    # What may happen. Afterwards all three run, and one of them is the primary.

    def kill_primary(self):
        self.primary.kill()
        time.sleep(0.2)
        self.build_standby(self.promote())

    def wake_old_primary(self):
        """It stops for a while, another takes over, and it wakes up unaware of that."""
        self.primary.signal(signal.SIGSTOP)
        old = self.promote()
        time.sleep(0.5)
        old.signal(signal.SIGCONT)
        time.sleep(1.0)
        old.kill()
        self.build_standby(old)

    def pause_primary(self):
        self.primary.signal(signal.SIGSTOP)
        time.sleep(0.7)
        self.primary.signal(signal.SIGCONT)

    def restart_primary(self):
        self.primary.kill()
        self.primary.start()

    def kill_standby(self):
        standby = random.choice(self.standbys())
        standby.kill()
        time.sleep(0.3)
        standby.start()

    def wipe_standby(self):
        standby = random.choice(self.standbys())
        standby.kill()
        self.build_standby(standby)

    def pause_standbys(self):
        for standby in self.standbys():
            standby.signal(signal.SIGSTOP)
        time.sleep(1.0)
        for standby in self.standbys():
            standby.signal(signal.SIGCONT)


@pytest.fixture(scope="module")
def servers():
    """Three servers for several tests. Each leaves them as three that run."""
    folder = make_postgres_folder()
    cluster = PostgresCluster(folder)
    cluster.create()
    yield cluster
    cluster.stop()
    shutil.rmtree(folder, ignore_errors=True)


NODE_PROGRAM = """
import asyncio, json, logging, signal, sys, time
import aggregator

async def answer(node, request):
    if "stats" in request:
        return {**(await node.stats())["log"], "health": await node.health()}
    events = [aggregator.Event(*fields) for fields in request.get("events", [])]
    try:
        if "erase" in request:
            return {"erased": await node.erase_event("chaos", request["erase"])}
        receipt = await node.publish(events, 100)
    except (aggregator.StoreFailed, aggregator.QueueFull, aggregator.Stopping) as error:
        return {"error": str(error)}
    return {"verdicts": [[verdict.kind, verdict.seq] for verdict in receipt.verdicts()]}

async def main(name, path, port, url):
    limits = aggregator.LogLimits(
        connect_s=1.0, answer_s=1.5, give_up_s=8.0, retry_s=0.1, poll_s=0.05, proof_s=0.5
    )
    log = aggregator.PostgresLog(aggregator.parse_log_url(url), name, limits)
    settings = aggregator.StoreSettings(full_sync=False, recent_ids=2048)
    node = aggregator.ReplicatedPipeline(
        lambda: aggregator.Store(path, settings),
        lambda: time.time_ns() // 1000, log, name, log_limits=limits,
    )
    await node.start()

    async def serve(reader, writer):
        async for line in reader:
            writer.write(json.dumps(await answer(node, json.loads(line))).encode() + b"\\n")
        writer.close()

    end = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, end.set_result, None)
    await asyncio.start_server(serve, "127.0.0.1", int(port), limit=2**22)
    await end
    sys.exit(0 if await node.stop(5.0) else 3)

logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
asyncio.run(main(*sys.argv[1:]))
"""


class NodeProcess:
    """A node as a process of its own, which answers lines of JSON."""

    def __init__(self, folder, name):
        self.name = name
        self.path = os.path.join(folder, f"node-{name}.db")
        self.port = free_port()
        self.output = os.path.join(folder, f"node-{name}.txt")
        self._process = None

    def start(self, url):
        self._url = url
        with open(self.output, "ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-c", NODE_PROGRAM, self.name, self.path, str(self.port), url],
                stdout=output,
                stderr=output,
                cwd=HERE,
            )

    def kill(self):
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def restart(self):
        self.kill()
        self.start(self._url)

    def lose_disk(self, other):
        """Begin anew with a copy of another node's store."""
        self.kill()
        for ending in ("", "-wal", "-shm", "-owner", ".part"):
            with contextlib.suppress(FileNotFoundError):
                os.remove(self.path + ending)
        aggregator.copy_store(other.path, self.path)
        self.start(self._url)

    def stop(self):
        self._process.send_signal(signal.SIGTERM)
        status = self._process.wait(20)
        with open(self.output) as file:
            assert status == 0, file.read()[-3000:]
        self._process = None

    async def ask(self, request, timeout_s=15.0):
        """The answer. Raises OSError, EOFError, ValueError and asyncio.TimeoutError."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=2**22)
        try:
            writer.write(json.dumps(request).encode() + b"\n")
            line = await asyncio.wait_for(reader.readline(), timeout_s)
        finally:
            writer.close()
        if not line:
            raise EOFError
        return json.loads(line)


async def live_in_chaos(servers, database, nodes, seconds):
    """Publish and erase while everything fails in turn.

    Returns the acknowledged events and verdicts, and the ids of which it was
    acknowledged that they are erased.
    """
    rng = random.Random(7)
    acknowledged = []
    erased = set()
    ends = time.monotonic() + seconds
    publishers = []
    for number in range(12):
        publisher = publish_in_chaos(random.Random(number), number, nodes, ends, acknowledged)
        publishers.append(asyncio.ensure_future(publisher))
    publishers.append(asyncio.ensure_future(erase_in_chaos(random.Random(12), nodes, ends, erased)))
    names = list(nodes)

    def restart_a_node():
        nodes[rng.choice(names)].restart()

    def lose_the_disk_of_a_node():
        lost, source = rng.sample(names, 2)
        nodes[lost].lose_disk(nodes[source])

    actions = [
        servers.kill_primary,
        restart_a_node,
        servers.wake_old_primary,
        servers.pause_standbys,
        lose_the_disk_of_a_node,
        servers.wipe_standby,
        servers.pause_primary,
        servers.kill_standby,
        servers.restart_primary,
    ]
    loop = asyncio.get_running_loop()
    for action in itertools.cycle(actions):
        if time.monotonic() > ends:
            break
        await asyncio.sleep(0.3)
        name = action.__name__
        servers.history[name] = servers.history.get(name, 0) + 1
        await loop.run_in_executor(None, action)
    await asyncio.gather(*publishers)
    await everything_is_applied(servers, database, nodes)
    return acknowledged, erased


async def publish_in_chaos(rng, publisher, nodes, ends, acknowledged):
    """Send batches, some events repeated or in conflict, until each is acknowledged."""
    number = 0
    while time.monotonic() < ends:
        events = []
        for _ in range(20):
            kind = rng.random()
            name = f"{publisher}-{number}"
            payload = "{}"
            if kind < 0.8:
                number += 1
            elif kind < 0.9:
                name = f"{rng.randrange(12)}-{rng.randrange(number + 1)}"
            else:
                name = f"{publisher}-{rng.randrange(number + 1)}"
                payload = '"other"'
            events.append(aggregator.Event("chaos", name, NOW, "s", payload, None))
        verdicts = None
        while verdicts is None:
            node = nodes[rng.choice(list(nodes))]
            with contextlib.suppress(OSError, EOFError, ValueError, asyncio.TimeoutError):
                answer = await node.ask({"events": events})
                verdicts = answer.get("verdicts")
            if verdicts is None:
                await asyncio.sleep(0.05)
        for event, (kind, seq) in zip(events, verdicts):
            acknowledged.append((event, aggregator.Verdict(kind, seq, 0, "")))


async def erase_in_chaos(rng, nodes, ends, erased):
    """Erase events of any publisher, not all of which were published already."""
    while time.monotonic() < ends:
        name = f"{rng.randrange(12)}-{rng.randrange(50)}"
        with contextlib.suppress(OSError, EOFError, ValueError, asyncio.TimeoutError):
            answer = await nodes[rng.choice(list(nodes))].ask({"erase": name})
            if answer.get("erased") is not None:
                erased.add(name)
        await asyncio.sleep(0.05)


async def everything_is_applied(servers, database, nodes):
    """Wait until every node is well and stands at the head of the log.

    Until a node is well, it may put one more entry into the log.
    """
    for _ in range(300):
        places = []
        for node in nodes.values():
            with contextlib.suppress(OSError, EOFError, ValueError, asyncio.TimeoutError):
                place = await node.ask({"stats": True})
                places.append((place["position"], place["health"]))
        (head,) = servers.primary.ask("SELECT pos FROM agg_head", database)
        if places == [(int(head), "")] * len(nodes):
            return
        await asyncio.sleep(0.1)
    for node in nodes.values():
        with open(node.output) as file:
            print(file.read()[-3000:])
    raise AssertionError(f"the log ends at {head}, and the nodes stand at {places}")


# ============================================================================
# Helpers of §13 and §15  Drill, health, and the whole program as a process
# ============================================================================


def clean_environment(**more):
    """The environment without what would change the program, and with `more`."""
    environment = dict(os.environ)
    for setting in aggregator.SETTINGS:
        environment.pop(setting.variable, None)
    for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "JOURNAL_STREAM", "AGGREGATOR_URL"):
        environment.pop(name, None)
    environment.update(more)
    return environment


def wait_until(condition, timeout_s=15):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class Program:
    """`aggregator.py` on a free port. Its log goes to a file beside the store."""

    def __init__(self, db, *flags, command=None, env=None):
        self.db = str(db)
        self.log = self.db + ".log"
        words = list(command or COMMAND)
        words += ["--port", "0", "--db", self.db, *flags]
        with open(self.log, "wb") as log:
            environment = clean_environment(**(env or {}))
            self.process = subprocess.Popen(words, stderr=log, env=environment)
        self.start_up = ""
        try:
            wait_until(self._has_started, timeout_s=20)
        except AssertionError:
            self.kill()
            raise AssertionError(self.read_log()) from None

    def _has_started(self):
        assert self.process.poll() is None
        found = re.search(r"LISTENING - https?://127\.0\.0\.1:([0-9]+).*\n", self.read_log())
        if found:
            self.start_up = found.group()
            self.port = int(found.group(1))
        return found

    def read_log(self):
        with open(self.log, encoding="utf-8") as log:
            return log.read()

    def kill(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)

    def end(self, number=signal.SIGTERM, timeout_s=10):
        """Signal, and the exit status."""
        self.process.send_signal(number)
        return self.process.wait(timeout_s)

    def ask(self, method, target, body=None, **headers):
        return fetch(self.port, method, target, body, headers)

    def publish(self, *events):
        return self.ask("POST", "/publish", list(events))

    def stats(self):
        return self.ask("GET", "/stats").json

    def listed(self):
        """All events, as the list has them."""
        return self.ask("GET", "/events", Accept="application/x-ndjson").rows

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()


def run(*arguments, program=COMMAND, **env):
    """A command that ends by itself: its status and what it said."""
    words = [*program, *arguments]
    environment = clean_environment(**env)
    return subprocess.run(
        words, check=False, capture_output=True, timeout=20, text=True, env=environment
    )


def with_changes(text):
    """A command that runs the program after changing it by `text`."""
    folder = os.path.dirname(PROGRAM)
    lines = [f"import sys; sys.path.insert(0, {folder!r})", "import aggregator", text]
    lines.append("sys.exit(aggregator.main())")
    return [sys.executable, "-c", "\n".join(lines)]


def with_stop_limits(**limits):
    """A command that runs the program with other limits for its stop."""
    return with_changes(
        "serve = aggregator.COMMANDS['serve']\n"
        f"limits = aggregator.StopLimits(**{limits!r})\n"
        "run = lambda settings: aggregator.run_service(settings, limits)\n"
        "aggregator.COMMANDS['serve'] = serve._replace(run=run)"
    )


def from_a_shell(script):
    """A command that runs the program by a shell script, as "$@"."""
    return ["sh", "-c", script, "sh", sys.executable, PROGRAM]


def assert_refused(found, status, message):
    """One clear line, and no other output."""
    assert found.returncode == status, found
    assert found.stdout == ""
    assert found.stderr.count("\n") == 1, found.stderr
    assert found.stderr.startswith("aggregator.py: ")
    assert message in found.stderr


class Found(NamedTuple):
    """What became of a command, as `run` tells it."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def start_with(capsys):
    """Reads the settings of a service that is not to start; what became of it."""

    def start(words, env):
        with pytest.raises(SystemExit) as ended:
            aggregator.read_settings("serve", words, env)
        said = capsys.readouterr()
        return Found(ended.value.code, said.out, said.err)

    return start


@pytest.fixture(scope="module")
def sound_store(tmp_path_factory):
    """The name of a store so small that merging and listing have happened."""
    path = str(tmp_path_factory.mktemp("sound") / "sound.db")
    small = {"recent_ids": 8, "seen_ids": 32, "shelves": 8, "list_rows": 16}
    settings = aggregator.StoreSettings(max_per_topic=90, **small)
    with contextlib.closing(aggregator.Store(path, settings)) as store:
        # 100 events, three times each.
        for n in range(300):
            store.commit([event(n % 100)], NOW + n)
    assert_sound(path)
    return path


def assert_sound(db):
    """`check` finds nothing wrong with a store, and says what it looked at."""
    found = run("check", "--db", str(db))
    assert found.stderr == ""
    assert [line for line in found.stdout.splitlines() if not line.startswith("ok ")] == []
    assert found.returncode == 0
    assert found.stdout.count("\n") > 10


def assert_no_traceback(program):
    assert "Traceback" not in program.read_log()


def ids_in_store(db):
    with contextlib.closing(sqlite3.connect(str(db))) as connection:
        rows = connection.execute("SELECT event_id FROM processed_events")
        return [event_id for (event_id,) in rows]


class Publisher:
    """Sends batches over one connection after the other until told to end.

    Remembers what was acknowledged, and sends again what was not.
    """

    def __init__(self, number, target="/publish"):
        self.number = number
        self.target = target
        self.random = random.Random(number)
        self.sent = 0
        self.pending = []
        self.acknowledged = set()

    def begin(self, port):
        self.port = port
        self.over = False
        self.thread = threading.Thread(target=self._send_all, daemon=True)
        self.thread.start()

    def join(self):
        self.over = True
        self.thread.join(20)
        assert not self.thread.is_alive()

    def _send_all(self):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=15)
        # When the service goes away, `pending` is what to send again.
        with contextlib.closing(connection):
            with contextlib.suppress(OSError, http.client.HTTPException):
                while self.pending or not self.over:
                    self._send(connection)

    def _send(self, connection):
        if not self.pending:
            count = self.random.choice((1, 1, 5, 40))
            numbers = range(self.sent, self.sent + count)
            self.pending = [f"{self.number}-{n}" for n in numbers]
            self.sent += count
        connection.request("POST", self.target, json.dumps(samples(*self.pending)))
        response = connection.getresponse()
        response.read()
        if response.status == 202:
            self.acknowledged.update(self.pending)
            self.pending = []
        else:
            assert response.status == 503


@contextlib.contextmanager
def publishing(publishers, port):
    """All publishers at work."""
    for publisher in publishers:
        publisher.begin(port)
    try:
        yield
    finally:
        for publisher in publishers:
            publisher.join()


def acknowledged_by(publishers):
    return set().union(*[publisher.acknowledged for publisher in publishers])


def make_foreign(path, statement):
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE theirs(x)")
        connection.execute(statement)
        connection.commit()


def make_garbage(path, data):
    with open(path, "wb") as file:
        file.write(data)


def make_newer(path):
    aggregator.Store(path).close()
    make_foreign(path, "PRAGMA user_version=99")


def make_truncated(path):
    aggregator.Store(path).close()
    os.truncate(path, 9000)


# What makes a file that is no store, and what is said of it.
NO_STORES = {
    "text": (lambda path: make_garbage(path, b"Dear diary,\n" * 1000), "not an SQLite database"),
    "a header": (lambda path: make_garbage(path, b"SQLite format 3\0"), "not an SQLite database"),
    "foreign": (lambda path: make_foreign(path, "PRAGMA user_version=1"), "not an aggregator's"),
    "newer": (make_newer, "schema version 99"),
    "truncated": (make_truncated, "damaged"),
}

DAMAGES = text_table("""
an event is gone | DELETE FROM processed_events WHERE seq = 55
another payload | UPDATE processed_events SET payload = '{}' WHERE seq = 50
another source | UPDATE processed_events SET source = 'x' WHERE seq = 50
a payload that is not JSON | UPDATE processed_events SET payload = 'x' WHERE seq = 50
an id is forgotten | DELETE FROM seen WHERE seq = (SELECT max(seq) FROM seen)
an old id is forgotten | DELETE FROM archive WHERE seq = (SELECT max(seq) FROM archive)
ids lead elsewhere | UPDATE seen SET seq = seq + 1000
old ids lead elsewhere | UPDATE archive SET seq = seq + 1000
an id is there twice | INSERT INTO archive SELECT * FROM seen LIMIT 1
an id has two seqs | UPDATE archive SET key = (SELECT key FROM seen) WHERE seq = 1
the archive has no mark | DELETE FROM progress WHERE part = 'archive'
a slice has no progress | DELETE FROM progress WHERE part = 'A0'
progress beyond the log | UPDATE progress SET through = 9999
a duplicate too many | UPDATE stats SET duplicates = duplicates + 1 WHERE kind = 'topic'
delays are gone | DELETE FROM stats WHERE kind = 'delay'
an event too few is counted | UPDATE stats SET uniques = uniques - 1
an event is not listed | DELETE FROM listing WHERE seq = 60
the list leads elsewhere | UPDATE listing SET seq = seq + 9999
""")

# Flags, environment, and what the message must name.
BAD_SETTINGS = {
    "a port too high": (["--port", "70000"], {}, "--port"),
    "a port below zero": (["--port", "-1"], {}, "--port"),
    "a port in words": (["--port", "abc"], {}, "--port"),
    "a port in other digits": (["--port", "\u0663"], {}, "--port"),
    "a word that is no choice": (["--sync", "maybe"], {}, "--sync"),
    "no duration": (["--retention", "soon"], {}, "--retention"),
    "an endless duration": (["--retention", "9" * 5000], {}, "--retention"),
    "no name of a file": (["--db", ""], {}, "--db"),
    "a variable's port": ([], {"PORT": "70000"}, "PORT"),
    "a variable's choice": ([], {"SYNC": "maybe"}, "SYNC"),
    "a queue for nothing": ([], {"QUEUE_MAX_SIZE": "0"}, "SIZE"),
    "a level that is none": (["--log-level", "loud"], {}, "--log-level"),
}

UNKNOWN_WORDS = {
    "a slip": (["--prot", "1"], "--prot"),
    "an abbreviation": (["--por", "1"], "--por"),
    "a flag without its value": (["--port"], "--port"),
}

BAD_ACCESS = {
    "an empty token": (["--token", ""], {}, "--token must be 1 to 512"),
    "an empty variable": ([], {"AUTH_TOKEN": ""}, "AUTH_TOKEN must be 1 to 512"),
    "an empty variable to read": (
        ["--token", "t"],
        {"READ_TOKEN": ""},
        "READ_TOKEN must be 1 to 512",
    ),
    "a read token alone": (["--read-token", "r"], {}, "--read-token needs --token"),
    "a key alone": (["--tls-key", "k"], {}, "--tls-key needs --tls-cert"),
    "a secret in no form": ([], {"AUTH_TOKEN": "a:b"}, "AUTH_TOKEN must be 1 to 512"),
    "a name for an origin": (
        ["--allow-origin", "a.example"],
        {},
        "origins such as https://example.org",
    ),
}

# What OpenWrt has in packages of their own.
SPLIT_MODULES = (
    *("pathlib", "urllib", "urllib.parse", "urllib.request", "email", "uuid", "http"),
    *("http.client", "http.server", "ctypes", "decimal", "multiprocessing", "unittest"),
    *("xml", "lzma", "bz2", "dbm", "ssl"),
)

# Names that Windows lacks, as the program could meet them. Not all of them: here
# Python's own modules need SIGKILL and AF_UNIX.
NOT_ON_WINDOWS = """
import asyncio, os, shutil, signal, sys
sys.modules["resource"] = sys.modules["fcntl"] = sys.modules["pwd"] = None
for module, names in (
    (os, "O_DIRECTORY O_PATH O_NOFOLLOW O_CLOEXEC O_NONBLOCK fchmod fchown geteuid getuid getpgid"),
    (os, "mkfifo memfd_create statvfs pread pwrite fork sched_getaffinity posix_fadvise"),
    (signal, "SIGHUP SIGALRM SIGUSR1 SIGUSR2 SIGPIPE SIGCHLD alarm setitimer"),
    (signal, "pthread_sigmask pthread_kill sigwait"),
):
    for name in names.split():
        if hasattr(module, name):
            delattr(module, name)

def refuse(*arguments):
    raise NotImplementedError

asyncio.AbstractEventLoop.add_signal_handler = refuse
asyncio.unix_events._UnixSelectorEventLoop.add_signal_handler = refuse

open_file = os.open

def open_no_folder(path, *arguments, **named):
    if os.path.isdir(path):
        raise PermissionError(13, "Permission denied", path)
    return open_file(path, *arguments, **named)

os.open = open_no_folder
# There, removing a folder does not open it.
shutil._use_fd_functions = False
"""


def as_on_windows(folder):
    """A command that runs the program without what Windows lacks."""
    script = os.path.join(str(folder), "windows.py")
    with open(script, "w") as file:
        file.write(NOT_ON_WINDOWS)
        file.write("import runpy\nsys.argv[0] = sys.argv.pop(1)\n")
        file.write("sys.path.insert(0, os.path.dirname(sys.argv[0]))\n")
        file.write("runpy.run_path(sys.argv[0], run_name='__main__')\n")
    return [sys.executable, script, PROGRAM]


# Of localhost, for these tests only.
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
"""


@pytest.fixture
def certificate(tmp_path):
    """The name of a file with a certificate of localhost and its key."""
    path = tmp_path / "both.pem"
    path.write_text(CERTIFICATE)
    return str(path)


class TLSClient:
    """Asks a program over HTTPS."""

    def __init__(self, port, certificate):
        import ssl

        self.port = port
        self.context = ssl.create_default_context(cafile=certificate)

    def ask(self, method, target, body=None):
        connection = http.client.HTTPSConnection(
            "localhost", self.port, timeout=10, context=self.context
        )
        connection.request(method, target, body, {"Accept": "application/x-ndjson"})
        return connection.getresponse()


def messages_to(manager):
    """What a service manager's socket has got, until there is nothing for a while."""
    manager.settimeout(0.2)
    told = []
    with contextlib.suppress(socket.timeout):
        while True:
            told.append(manager.recv(100))
    return told


class Replay:
    """Events of an hour out of order, with repeats, in any offsets from UTC."""

    def __init__(self, seed, count):
        rng = random.Random(seed)
        self.instants_us = []
        self.events = []
        order = []
        for n in range(count):
            instant_us = NOW + rng.randrange(3600 * 1000) * 1000
            self.instants_us.append(instant_us)
            text = self._with_offset(instant_us, rng.choice((0, 60, 120, 330, -300, -570)))
            event = sample(f"e{n:04d}", timestamp=text, topic=f"topic/{n % 7}", payload={"n": n})
            self.events.append(event)
            for _ in range(rng.choice((1, 1, 1, 2, 3))):
                order.append((n + rng.uniform(0, 150), n))
        order.sort()
        self.deliveries = [self.events[n] for _, n in order]

    @staticmethod
    def _with_offset(instant_us, minutes):
        local = aggregator.format_timestamp(instant_us + minutes * 60_000_000).rstrip("Z")
        sign = "-" if minutes < 0 else "+"
        hours, minutes = divmod(abs(minutes), 60)
        return f"{local}{sign}{hours:02d}:{minutes:02d}"


def client(command, *arguments):
    """A command in this process; its exit status."""
    words = [str(each) for each in arguments]
    settings = aggregator.read_settings(command, words, {})
    return aggregator.COMMANDS[command].run(settings)


class Leaky:
    """A service that acknowledges everything, stores by the rules, and breaks one.

    `sin` is none, lost, twice or otherwise.
    """

    def __init__(self, sin):
        self.rows = {}
        self.sin = sin

    def __call__(self, asked):
        if isinstance(asked, str):
            return 200, self.answer_list(asked.partition("topic=")[2])
        for event in asked:
            self.store(event)
        return taken(asked)

    def store(self, event):
        if self.sin == "otherwise" and event["payload"]["n"] == 5:
            event["payload"]["text"] = "other"
        self.rows.setdefault((event["topic"], event["event_id"]), event)

    def answer_list(self, topic):
        rows = [row for row in self.rows.values() if row["topic"] == topic]
        if self.sin == "twice":
            rows += rows[:1]
        if self.sin == "lost":
            rows = rows[1:]
        return "".join(json.dumps(row) + "\n" for row in rows)


# What a drill must print when a service has this sin.
SINS = {
    "none": {"lost": "0", "stored twice": "0", "stored otherwise": "0"},
    "lost": {"lost": "7", "stored": "93"},
    "twice": {"stored twice": "7", "lost": "0"},
    "otherwise": {"stored otherwise": "1", "lost": "1"},
}


def figures_of(output):
    """The lines of a drill that are a name and a number."""
    return dict(re.findall("^([a-z ]+?) +([0-9,]+)$", output, re.M))


class ListHandler(logging.Handler):
    """Keeps what would be written."""

    def __init__(self):
        super().__init__()
        self.written = []

    def emit(self, record):
        self.written.append(record.getMessage())


class LimitedLog:
    """Our log behind a `LogLimit`, with a clock that only the test moves."""

    def __init__(self):
        self.now_s = 0.0
        self.handler = ListHandler()
        self.handler.addFilter(aggregator.LogLimit(lambda: self.now_s))

    def __enter__(self):
        aggregator.log.addHandler(self.handler)
        aggregator.log.setLevel(logging.INFO)
        return self

    def __exit__(self, *_):
        aggregator.log.removeHandler(self.handler)
        aggregator.log.setLevel(logging.NOTSET)

    @property
    def written(self):
        return self.handler.written


class PipedLog:
    """A `LogWriter` that writes into a pipe, which is read when the test says so."""

    def __init__(self, most_bytes=aggregator.LOG_QUEUE_BYTES):
        self.reader, descriptor = os.pipe()
        self.descriptor = descriptor
        self.writer = aggregator.LogWriter(descriptor, most_bytes)
        self.writer.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
        self.writer.start()

    def fill(self):
        """Put so much into the pipe that nothing more fits."""
        os.set_blocking(self.descriptor, False)
        size = 0
        with contextlib.suppress(BlockingIOError):
            while True:
                size += os.write(self.descriptor, b"x" * 1000)
        os.set_blocking(self.descriptor, True)
        return size

    def read(self, size):
        data = b""
        while len(data) < size:
            data += os.read(self.reader, size - len(data))
        return data

    def read_lines(self):
        """What is written when the writer has nothing left to write."""
        text = b""
        self.writer.flush(5)
        os.set_blocking(self.reader, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                text += os.read(self.reader, 65536)
        return text.decode("utf-8").splitlines()


def log_record(text):
    return logging.makeLogRecord({"msg": text, "levelname": "INFO", "levelno": logging.INFO})


def memory_mb(pid, what="VmHWM"):
    with open(f"/proc/{pid}/status") as file:
        return int(re.search(what + r":\s+([0-9]+) kB", file.read())[1]) / 1024


def descriptors(pid):
    return len(os.listdir(f"/proc/{pid}/fd"))


def cpu_seconds(pid):
    """Time of the processor that a process has used."""
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    user, system = fields[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def many_descriptors(count):
    """Lets this process open `count` files, or skips the test."""
    import resource

    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft, hard = limits
    if 0 <= hard < count:
        pytest.skip(f"no process here may open {count} files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(count, soft), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@contextlib.contextmanager
def dialled(port, count, data=b"", receive_bytes=0):
    """So many connections that have sent `data`."""
    socks = []
    try:
        for _ in range(count):
            socks.append(dial(port, data, receive_bytes))
        yield socks
    finally:
        for sock in socks:
            sock.close()


class Trickle(NamedTuple):
    """A slow client: its connection, and what it sends from time to time."""

    sock: socket.socket
    data: bytes

    def send(self):
        with contextlib.suppress(OSError):
            self.sock.send(self.data)


# How 500 slow clients begin, and what they send then.
SLOW_BODY = http_request("POST", "/publish", b"", "Content-Length: 3999999") + b" " * 2000
SLOW_LIST = http_request("GET", "/events", b"", "Accept: application/x-ndjson")
SLOW_CLIENTS = {
    "a head byte by byte": (b"GET / HT", b"x"),
    "a body byte by byte": (SLOW_BODY, b" "),
    "nothing": (b"", b""),
    "lists that are not read": (SLOW_LIST * 20, SLOW_LIST),
    "answers that are not read": (HEALTH * 50, HEALTH),
}

# What clients have sent when SIGTERM comes.
PHASES = {
    "nothing": b"",
    "half a head": b"GET / HT",
    "a request": HEALTH,
    "many requests": HEALTH * 500,
    "half a body": http_request("POST", "/publish", b"", "Content-Length: 99") + b"{",
    "half a chunk": http_request("POST", "/publish", b"5\r\n", "Transfer-Encoding: chunked"),
    "no HTTP": b"?\r\n\r\n",
    "a question": http_request(
        "POST", "/publish", b"", "Content-Length: 999", "Expect: 100-continue"
    ),
    "lists": SLOW_LIST * 30,
}


def fill_disk(folder):
    """Write a file until nothing more fits; returns its name."""
    ballast = os.path.join(folder, "ballast")
    with open(ballast, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"x" * 4096)
    return ballast


@contextlib.contextmanager
def full_disk(program, folder):
    """Nothing more fits on the disk."""
    ballast = fill_disk(folder)
    try:
        yield
    finally:
        os.unlink(ballast)


@contextlib.contextmanager
def file_size_limit(program, folder):
    """The program may not write much more to its WAL."""
    import resource

    size = os.path.getsize(program.db + "-wal") + 50_000
    none = resource.RLIM_INFINITY
    resource.prlimit(program.process.pid, resource.RLIMIT_FSIZE, (size, none))
    try:
        yield
    finally:
        resource.prlimit(program.process.pid, resource.RLIMIT_FSIZE, (none, none))


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of 24 MB, or a skipped test."""
    folder = str(tmp_path / "disk")
    os.mkdir(folder)
    if os.geteuid() != 0 or not shutil.which("mount"):
        pytest.skip("only root may mount a small disk to fill")
    mount = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", folder]
    if subprocess.run(mount, stderr=subprocess.DEVNULL).returncode != 0:
        pytest.skip("no small disk can be mounted here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


class Filler:
    """Publishes large events until the disk is full; knows what was acknowledged."""

    def __init__(self, program):
        self.program = program
        self.numbers = itertools.count()
        self.acknowledged = []

    def publish(self, size=30_000):
        event = sample(str(next(self.numbers)), payload={"x": "y" * size})
        answer = self.program.publish(event)
        if answer.status == 202:
            self.acknowledged.append(event)
        return answer

    def publish_until_refused(self, size):
        for _ in range(300):
            answer = self.publish(size)
            if answer.status != 202:
                return answer
        raise AssertionError("everything was taken")


# A program that holds the write lock of a store for some seconds.
LOCK_HOLDER = """
import sqlite3, sys, time
db = sqlite3.connect(sys.argv[1], isolation_level=None)
db.execute("BEGIN EXCLUSIVE")
print("held", flush=True)
time.sleep(float(sys.argv[2]))
"""


@contextlib.contextmanager
def locked_by_another(db, seconds):
    words = [sys.executable, "-c", LOCK_HOLDER, db, str(seconds)]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        yield
        assert holder.wait(10) == 0


class Soak:
    """A long mixed load: publishing, reading, quick and slow streams."""

    def __init__(self, port):
        self.port = port
        self.failures = []
        self.over = threading.Event()
        self.threads = []

    def begin(self):
        works = [self.publish] * 4 + [self.read] * 2 + [self.stream] + [self.stream_slowly] * 3
        for seed, work in enumerate(works):
            thread = threading.Thread(target=self._repeat, args=(work, seed), daemon=True)
            self.threads.append(thread)
            thread.start()

    def end(self):
        self.over.set()
        for thread in self.threads:
            thread.join(60)

    def _repeat(self, work, seed):
        rng = random.Random(seed)
        while not self.over.is_set():
            try:
                work(rng)
            except Exception as error:
                self.failures.append(repr(error))
                self.over.set()

    def _event(self, rng):
        payload = {"n": int(rng.random() < 0.01), "x": "y" * rng.choice((0, 100, 3000))}
        event_id = "%x" % rng.getrandbits(rng.choice((8, 60)))
        return sample(event_id, topic=f"t{rng.randrange(10)}", payload=payload)

    def publish(self, rng):
        batch = [self._event(rng) for _ in range(rng.choice((1, 1, 1, 10, 200)))]
        target = "/publish" + rng.choice(("", "?wait=0", "?verdicts=1"))
        answer = fetch(self.port, "POST", target, batch)
        assert answer.status == 202 or answer.problem == "queue-full", answer

    def read(self, rng):
        targets = "events?topic=t1 events?source=s&limit=5 stats health duplicates events/t1/1"
        answer = fetch(self.port, "GET", "/" + rng.choice(targets.split()))
        assert answer.status in (200, 404, 410)
        time.sleep(0.05)

    def stream(self, rng):
        answer = fetch(self.port, "GET", "/events", headers={"Accept": "application/x-ndjson"})
        assert answer.rows is not None

    def stream_slowly(self, rng):
        ask = http_request(
            "GET", "/events", b"", "Accept: application/x-ndjson", "Connection: close"
        )
        with contextlib.closing(dial(self.port, ask, receive_bytes=4096)) as sock:
            for _ in range(200):
                if self.over.is_set() or not sock.recv(20_000):
                    break
                time.sleep(0.1)


class Usage(NamedTuple):
    """What a program takes at a moment."""

    memory_mb: float
    file_mb: float
    wal_mb: float
    descriptors: int

    @classmethod
    def of(cls, program):
        pid = program.process.pid
        file_mb = os.path.getsize(program.db) / 2**20
        wal_mb = os.path.getsize(program.db + "-wal") / 2**20
        return cls(memory_mb(pid, "VmRSS"), file_mb, wal_mb, descriptors(pid))

    @classmethod
    def mean(cls, usages):
        columns = [sum(column) / len(usages) for column in zip(*usages)]
        return cls(*columns)


# ============================================================================
# Helpers of the exercises
# ============================================================================


def bytes_allocated(make):
    """What `make` returns, and the bytes that it takes."""
    tracemalloc.start()
    try:
        made = make()
        return made, tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()


class StatementsAbout:
    """Counts the statements of a store's connection that name a table."""

    def __init__(self, store, table):
        self.count = 0
        self.table = re.compile(rf"\b{table}\b")
        store.db.set_trace_callback(self.note)

    def note(self, statement):
        if self.table.search(statement):
            self.count += 1


# ============================================================================
# House rules: what must be true of the project itself
# ============================================================================

# The standard library as far as serving needs it.
AT_ONCE = """
    argparse asyncio binascii bisect collections concurrent.futures contextlib datetime errno
    functools gc hashlib io itertools json logging os re signal sqlite3 stat sys time typing zlib
"""

THE_LOG = number_of("More than one machine")
THE_PROGRAM = number_of("The program")

# What a section imports inside a function, where it is needed. Serving must not pay for
# it, and small systems do not have it.
LAZY = {
    0: "_md5 importlib.util marshal py_compile",
    8: "hmac",
    9: "socket",
    12: "gzip http.client random select socket threading urllib.parse",
    13: "random socket subprocess tempfile threading",
    THE_LOG: "binascii hashlib hmac ssl",
    THE_PROGRAM: "resource socket ssl threading",
}

# Options of other programs that the README's text names.
OPTIONS_OF_OTHERS = {"--retry", "--cacert"}

# Names that only these sections may use.
RESERVED = {
    "sqlite3": {2, 3},
    "concurrent": {5},
    "asyncio": {5, 7, 9, THE_LOG, THE_PROGRAM},
    "zlib": {6, 11, 12, THE_LOG},
    "blake2b": {2, 12},
    "sha256": {8, THE_LOG},
    "argparse": {THE_PROGRAM},
    "signal": {THE_PROGRAM},
    "sys": {12, 13, THE_PROGRAM},
}


def test_only_the_standard_library_is_imported():
    at_once = {module for _, module in imports_of(TREE.body)}
    assert at_once == set(AT_ONCE.split())
    assert "dependencies = []" in SOURCE


def test_what_serving_does_not_need_is_imported_where_it_is_used():
    lazy = {(section, name) for section, names in LAZY.items() for name in names.split()}
    found = imports_of(ast.walk(TREE)) - imports_of(TREE.body)
    assert found == lazy


IMPORT_AND_REPORT = f"""
import sys
sys.path.insert(0, {HERE!r})
import {", ".join(AT_ONCE.split())}
before = set(sys.modules)
import aggregator
print(*set(sys.modules) - before)
print(*{{"http.client", "urllib", "email", "tempfile"}} & set(sys.modules))
"""


def test_importing_the_file_loads_nothing_but_what_it_names_at_the_top():
    # Without `site`, whose hooks differ from machine to machine.
    command = [sys.executable, "-I", "-S", "-c", IMPORT_AND_REPORT]
    loaded, costly, _ = subprocess.check_output(command, timeout=20).decode().split("\n")
    assert loaded == "aggregator"
    assert costly == ""


def test_the_oldest_grammar_parses_the_file_so_that_the_version_check_can_run():
    ast.parse(SOURCE, feature_version=(3, 7))
    assert "from __future__" not in SOURCE


def test_sections_are_numbered_in_order():
    numbers = [section.number for section in SECTIONS]
    assert len(numbers) >= 11
    assert numbers == list(range(1, len(numbers) + 1))


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: f"§{section.number}")
def test_a_banner_names_only_sections_above_it(section):
    assert section.known <= set(range(1, section.number))


@pytest.mark.parametrize("path", [PROGRAM, __file__], ids=os.path.basename)
def test_no_name_is_bound_twice(path):
    lines = {}
    for name, line in bindings(ast.parse(read_text(path))):
        assert name not in lines, f"{name} in line {line}, and before in line {lines[name]}"
        lines[name] = line


def test_a_section_uses_only_the_sections_that_its_banner_names():
    homes = homes_of_names()
    allowed = {section.number: section.known for section in SECTIONS}
    wrong = []
    for use in read_uses():
        home = homes.get(use.name, 0)  # 0: version and logger, and what is built in
        if use.section and home not in allowed[use.section] | {0, use.section}:
            wrong.append(f"line {use.line}: §{use.section} uses {use.name} of §{home}")
    assert wrong == []


def test_a_module_is_used_only_where_it_belongs():
    wrong = []
    for use in read_uses():
        if use.section and use.section not in RESERVED.get(use.name, {use.section}):
            wrong.append(f"line {use.line}: §{use.section} uses {use.name}")
    assert wrong == []


def test_the_http_section_does_no_input_or_output():
    waiting = (ast.Await, ast.AsyncFunctionDef, ast.AsyncFor, ast.AsyncWith)
    for node in ast.walk(TREE):
        if section_of(getattr(node, "lineno", 0)) == 6:
            assert not isinstance(node, waiting), node.lineno
    for use in read_uses():
        if use.section == 6:
            assert use.name not in ("open", "print", "os", "asyncio"), use


STATEMENTS_WITHOUT_WORK = (
    *SCOPES,
    ast.Import,
    ast.ImportFrom,
    ast.Assign,
    ast.AnnAssign,
)


def test_importing_does_no_work():
    for node in TREE.body:
        if isinstance(node, ast.Expr):
            assert isinstance(node.value, ast.Constant), node.lineno
        elif isinstance(node, ast.If):
            assert ast.dump(node.test).count("__main__") == 1
        else:
            assert isinstance(node, STATEMENTS_WITHOUT_WORK), node.lineno


def test_a_function_fits_on_a_page():
    for function in functions():
        assert lines_of_code(function) <= 60, function.name


def test_private_names_are_unique():
    # `_commit_group` of a subclass is another way to do the same.
    homes = {}
    for scope in (TREE, *(node for node in TREE.body if isinstance(node, ast.ClassDef))):
        for node in scope.body:
            if isinstance(node, SCOPES) and re.match("_[^_]", node.name):
                homes.setdefault(node.name, []).append(getattr(scope, "name", ""))
    several = {name for name, found in homes.items() if len(found) > 1}
    assert several == {"_commit_group"}


def test_half_of_the_functions_are_short():
    lengths = sorted(lines_of_code(function) for function in functions())
    assert lengths[len(lengths) // 2] <= 12


def test_everything_public_is_documented():
    classes = [node for node in TREE.body if isinstance(node, ast.ClassDef)]
    public = []
    for scope in (TREE, *classes):
        for node in scope.body:
            if isinstance(node, SCOPES) and not node.name.startswith("_"):
                public.append(node)
    assert len(public) > 100
    bare = [node.name for node in public if not ast.get_docstring(node)]
    assert bare == []


def test_the_examples_in_docstrings_are_true():
    outcome = doctest.testmod(aggregator)
    assert outcome.failed == 0
    assert outcome.attempted >= 10


# The README


def test_the_readme_lists_the_routes_as_they_are():
    rows = [row for row in readme_part("### All routes").split("\n") if row.startswith("| `")]
    routes = [f"| `{route.method} {route.path}` | {route.summary} |" for route in aggregator.ROUTES]
    assert rows == routes


def test_the_readme_asks_only_for_routes_that_exist():
    requests = readme_requests()
    assert len(requests) > 30
    patterns = [(route.method, route_pattern(route.path)) for route in aggregator.ROUTES]
    for method, path in requests:
        methods = [each for each, pattern in patterns if pattern.match(path)]
        assert methods, path
        assert method in ("", "HEAD", *methods), f"{method} {path}"


@pytest.mark.parametrize("command", sorted(set(aggregator.COMMANDS) - {"serve"}))
def test_the_readme_shows_every_command(command):
    assert command in [name for name, _ in readme_commands()]


def test_the_readme_gives_commands_only_options_that_they_have():
    for name, words in readme_commands():
        known = {setting.flag for setting in aggregator.COMMANDS[name].settings}
        for word in words:
            if word.startswith("--") and word not in ("--help", "--version"):
                assert word.partition("=")[0] in known, f"{name} {word}"


def test_the_readme_names_only_options_that_exist():
    known = {"--help", "--version"}
    for command in aggregator.COMMANDS.values():
        known |= {setting.flag for setting in command.settings}
    prose = re.sub(r"^```.*?^```", "", README, flags=re.M | re.S)
    named = set(re.findall("`(--[a-z0-9-]+)", prose))
    assert len(named) > 10
    assert named <= known | OPTIONS_OF_OTHERS


def readme_units():
    """The systemd units of the README that start this program."""
    blocks = re.findall(r"^```ini\n(.*?)^```", README, re.M | re.S)
    return [block for block in blocks if "aggregator.py" in block]


def test_each_unit_of_the_readme_has_a_folder_of_its_own():
    # systemd gives the folder, and all in it, to the user of the unit that started
    # last.
    folders = re.findall(r"StateDirectory=([\w-]+)", README)
    assert len(folders) == len(set(folders)) == 3
    for unit in readme_units():
        [folder] = re.findall(r"^StateDirectory=(.+)$", unit, re.M)
        assert re.findall(r"(?:%S|/var/lib)/([\w-]+)/", unit) == [folder]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd-analyze")
def test_the_units_of_the_readme_leave_little_to_an_intruder(tmp_path):
    for number, unit in enumerate(readme_units()):
        file = tmp_path / f"unit{number}.service"
        file.write_text(unit)
        words = ["systemd-analyze", "security", "--offline=true", "--threshold=20", str(file)]
        done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60)
        if b"unrecognized option" in done.stdout:
            pytest.skip("this systemd-analyze is older than 250")
        assert done.returncode == 0, done.stdout.decode()[-300:]


def test_the_readme_names_only_problems_that_exist():
    named = re.findall("\\b([45][0-9][0-9]) `([a-z-]+)`", README)
    assert len(named) >= 4
    for status, name in named:
        assert name in aggregator.PROBLEMS
        assert int(status) == aggregator.PROBLEMS[name].status, name


def test_every_link_inside_the_readme_leads_to_a_heading():
    links = set(re.findall(r"\]\(#([^)]*)\)", README))
    assert len(links) >= 6
    assert links <= readme_anchors()


def test_what_the_readme_says_of_another_product_has_its_source():
    rows = [row for row in readme_part("## What else there is").split("\n") if row]
    _, _, *products = rows
    assert len(products) >= 5
    for row in products:
        assert "](https://" in row, row


def test_every_promise_of_the_readme_names_its_test():
    promises = 0
    for heading in ("### The service", "### The shipper"):
        table = readme_part(heading).partition("| not promised |")[0]
        for row in table.strip().split("\n")[2:]:
            assert "`test_" in row, row
            promises += 1
    assert promises >= 15


def test_the_readme_names_only_tests_and_exercises_that_exist():
    named = set(re.findall("`((?:test|exercise)_[a-z0-9_]+)`", README))
    assert len(named) > 8
    defined = re.findall(r"^def ((?:test|exercise)_\w+)", read_text(__file__), re.M)
    assert named <= set(defined)


def test_the_readmes_first_command_starts_the_service():
    command, answer = console_blocks()[0]
    assert command == "python3 aggregator.py &"
    assert answer == ""


@needs_curl
def test_the_readmes_commands_answer_what_it_shows(tmp_path):
    _, *blocks = console_blocks()
    assert len(blocks) >= 7
    with Program(tmp_path / "readme.db") as program:
        environment = clean_environment(PORT=str(program.port))
        for command, shown in blocks:
            command = command.replace("localhost:8000", f"127.0.0.1:{program.port}")
            command = command.replace("python3 aggregator.py", f'"{sys.executable}" "{PROGRAM}"')
            output = subprocess.run(
                ["bash", "-c", command],
                stdout=subprocess.PIPE,
                cwd=str(tmp_path),
                timeout=30,
                env=environment,
            ).stdout
            assert unchanging(output.decode().strip()) == unchanging(shown), command


# The image


def test_the_image_has_python_3_11_and_runs_as_nobody_special():
    dockerfile = read_text("Dockerfile")
    assert re.search(r"^ARG .*=3\.11", dockerfile, re.M)
    assert re.search("^USER (?!root|0)", dockerfile, re.M)
    assert "\nVOLUME " in dockerfile


def test_the_image_starts_the_compiled_program_without_a_shell():
    dockerfile = read_text("Dockerfile")
    assert "compileall" in dockerfile
    assert '\nENTRYPOINT ["python", "-m", "aggregator"]\n' in dockerfile


def test_the_image_asks_for_its_health_without_curl():
    _, _, health = read_text("Dockerfile").partition("\nHEALTHCHECK ")
    assert '["python", "-m", "aggregator", "health"]' in health
    assert "curl" not in health


def test_the_compose_file_sets_only_variables_that_exist():
    known = {setting.variable for setting in aggregator.SETTINGS}
    services = re.split(r"\n  (?=\w+:)", read_text("compose.yml"))
    ours = [service for service in services if "build: ." in service]
    assert len(ours) == 3
    for service in ours:
        assert set(re.findall(r"^      ([A-Z_]+): ", service, re.M)) <= known


# ============================================================================
# §1  Events
# ============================================================================


@with_cases("text, expected", INSTANTS)
def test_a_timestamp_names_this_instant(text, expected):
    assert aggregator.parse_timestamp(text) == instant_of(expected)


def test_instants_are_microseconds_since_1970():
    assert aggregator.parse_timestamp("1970-01-01T00:00:00.000001Z") == 1
    assert aggregator.parse_timestamp("1970-01-01T00:00:00Z") == 0
    assert aggregator.parse_timestamp("1969-12-31T23:59:59.999999Z") == -1


@with_cases("text", NOT_TIMESTAMPS)
def test_what_is_no_timestamp_is_refused(text):
    with pytest.raises(ValueError):
        aggregator.parse_timestamp(text)


def test_formatting_and_parsing_a_timestamp_are_inverse():
    rng = random.Random(1)
    first = instant_of(FIRST_INSTANT)
    last = instant_of(LAST_INSTANT)
    instants = [first, last, -1, 0, 1]
    for _ in range(5000):
        instants.append(rng.randint(first, last))
    for instant in instants:
        text = aggregator.format_timestamp(instant)
        by_datetime = EPOCH + instant * MICROSECOND
        assert text == by_datetime.isoformat(timespec="microseconds") + "Z"
        assert aggregator.parse_timestamp(text) == instant


def test_an_offset_moves_the_instant_and_nothing_else():
    rng = random.Random(2)
    for _ in range(3000):
        instant = rng.randint(0, instant_of(LAST_INSTANT) - 1440 * MINUTE_US)
        instant += instant_of(FIRST_INSTANT) * rng.randrange(2) // 2
        minutes = rng.randint(-1439, 1439)
        local = aggregator.format_timestamp(instant + minutes * MINUTE_US).rstrip("Z")
        sign = "-" if minutes < 0 else "+"
        hour, minute = divmod(abs(minutes), 60)
        assert aggregator.parse_timestamp(f"{local}{sign}{hour:02d}:{minute:02d}") == instant
        assert aggregator.parse_timestamp(f"{local}{sign}{hour:02d}{minute:02d}") == instant


@pytest.mark.parametrize("field", REQUIRED_FIELDS)
def test_a_missing_field_is_a_fault(field):
    event = dict(GOOD_EVENT)
    del event[field]
    assert faults_of(event) == [f"0 {field}"]


@with_cases("field, value", WRONG_VALUES)
def test_a_wrong_value_is_a_fault_of_its_field_and_of_no_other(field, value):
    assert faults_of({**GOOD_EVENT, field: value}) == [f"0 {field}"]


def test_a_name_may_have_255_bytes():
    assert aggregator.MAX_NAME_BYTES == 255


@pytest.mark.parametrize("field", NAME_FIELDS)
@with_cases("value", KEPT_NAMES)
def test_a_name_of_up_to_255_bytes_is_kept_as_it_is(field, value):
    assert len(value.encode()) <= 255
    assert getattr(read_one(**{field: value}), field) == value


@pytest.mark.parametrize("value", [0, 1, 2**53 + 1, 2**63 - 1])
def test_a_sequence_is_kept_exactly(value):
    assert read_one(sequence=value).sequence == value


def test_a_sequence_with_nothing_behind_its_point_is_an_integer():
    for value in (7.0, 7e0):
        sequence = read_one(sequence=value).sequence
        assert sequence == 7
        assert type(sequence) is int


def test_a_sequence_may_be_left_out():
    assert read_one().sequence is None


def test_unknown_fields_are_ignored():
    assert read_one(extra={"a": [1]}, Topic=5, events=[1], seq=-1) == read_one()


@with_cases("text", UNREADABLE_VALUES)
@with_cases("place", PLACES_IN_A_PAYLOAD)
def test_a_payload_that_could_not_be_read_back_is_refused(place, text):
    assert faults_of(with_payload(place.replace("?", text))) == ["0 payload"]


@with_cases("text", READABLE_VALUES)
def test_a_payload_is_read_back_as_it_was_sent(text):
    payload = read_payload('{"a":' + text + "}")
    assert json.loads(payload) == {"a": json.loads(text)}


@with_cases("opening, closing", BRACKETS)
def test_a_payload_may_be_nested_100_levels_and_not_101(opening, closing):
    levels_a_step = opening.count("[") + opening.count("{")
    deepest = nested((aggregator.MAX_NESTING - 1) // levels_a_step + 1, opening, closing)
    too_deep = nested(aggregator.MAX_NESTING // levels_a_step + 1, opening, closing)
    assert json.loads(read_payload(deepest)) == json.loads(deepest)
    assert faults_of(with_payload(too_deep)) == ["0 payload"]


def test_many_brackets_beside_each_other_are_not_nesting():
    payload = {"a": [[{}]] * (5 * aggregator.MAX_NESTING)}
    assert json.loads(read_one(payload=payload).payload) == payload


@pytest.mark.parametrize("levels", [101, 500, 950, 3000, 20_000, 100_000])
@with_cases("opening, closing", HOSTILE_BRACKETS)
@pytest.mark.parametrize("place", ["", '{"payload":', '{"events":['])
def test_any_number_of_brackets_is_refused_and_crashes_nothing(place, opening, closing, levels):
    body = place + opening * levels + "0" + closing * levels
    with pytest.raises((aggregator.InvalidEvents, aggregator.NotJSON)):
        aggregator.parse_events(body.encode(), 10)


def test_what_is_nested_too_deep_is_counted_in_events():
    body = b"[{},{}]{}" + b"[" * 90_000
    [fault] = faults_in(aggregator.parse_events, body, 10)
    assert fault.index == 3


def test_all_faults_of_all_events_are_listed_in_order():
    wrong = {"topic": "", "event_id": 5, "timestamp": "x", "payload": [], "sequence": -1}
    blank = {**GOOD_EVENT, "source": " "}
    body = [GOOD_EVENT, wrong, 7, None, "text", [], GOOD_EVENT, {}, blank]
    expected = [f"1 {field}" for field in REQUIRED_FIELDS]
    expected += ["1 sequence", "2", "3", "4", "5"]
    expected += [f"7 {field}" for field in REQUIRED_FIELDS]
    expected += ["8 source"]
    assert faults_of(body) == expected


def test_a_fault_says_what_stood_there():
    body = json.dumps({**GOOD_EVENT, "topic": "a\ud800😀", "sequence": -3}).encode()
    topic, sequence = faults_in(aggregator.parse_events, body, 10)
    assert "\\ud800" in topic.message
    assert "-3" not in topic.message
    assert "-3" in sequence.message
    assert "\\ud800" not in sequence.message


@pytest.mark.parametrize("element", [b"{}", b"1", b"[]"])
def test_listing_the_faults_of_a_hostile_body_takes_bounded_memory(element):
    body = b"[" + (element + b",") * (100_000 // (len(element) + 1)) + element + b"]"
    tracemalloc.start()
    try:
        faults_of(body)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # Decoding alone takes up to 25 times the size of the body.
    assert peak < 60 * len(body)


@with_cases("body, ids", BODIES)
def test_a_body_holds_these_events_in_this_order(body, ids):
    events = aggregator.parse_events(body_of(body), 10)
    assert [event.event_id for event in events] == list(ids)


@with_cases("text", TEXTS_NOT_JSON)
def test_a_text_that_is_not_json_is_refused_as_such(text):
    with pytest.raises(aggregator.NotJSON) as caught:
        aggregator.parse_events(body_of(text), 10)
    assert str(caught.value).isascii()


@with_cases("body", BYTES_NOT_JSON)
def test_bytes_that_are_not_json_are_refused_as_such(body):
    with pytest.raises(aggregator.NotJSON) as caught:
        aggregator.parse_events(body, 10)
    assert str(caught.value).isascii()


@with_cases("body, expected", NO_EVENTS)
def test_json_that_holds_no_events_is_refused_with_index_and_field(body, expected):
    assert faults_of(body_of(body)) == expected.split(", ")


@with_cases("one, other", EQUAL_PAYLOADS)
def test_equal_payloads_have_equal_canonical_text(one, other):
    assert read_payload(one) == read_payload(other)


@with_cases("one, other", UNEQUAL_PAYLOADS)
def test_unequal_payloads_have_unequal_canonical_text(one, other):
    assert read_payload(one) != read_payload(other)


@with_cases("one, other", {**EQUAL_PAYLOADS, **UNEQUAL_PAYLOADS})
def test_canonical_text_is_the_same_without_the_fast_encoder(one, other):
    # What Pythons without the C encoder use.
    assert read_payload(one) == aggregator._ENCODER.encode(json.loads(one))


@with_cases("body", TOO_MANY)
def test_more_events_than_the_queue_holds_are_refused_before_they_are_looked_at(body):
    expected = "11 events in one request, and the queue holds 10"
    with pytest.raises(aggregator.BatchTooLarge, match=expected):
        aggregator.parse_events(body, 10)


LARGE_TEXTS = {
    "lists": b"[" + b"[]," * 250_000 + b"[]]",
    "numbers": b"[" + b"1," * 250_000 + b"1]",
    "strings": b"[" + b'"\\"",' * 250_000 + b"1]",
    "a payload": json.dumps(sample(payload={"a": [[]] * 250_000})).encode(),
}


@with_cases("body", LARGE_TEXTS)
def test_a_text_of_too_many_values_is_refused_before_it_is_decoded(body, monkeypatch):
    monkeypatch.setattr(aggregator, "_DECODER", None)
    with pytest.raises(aggregator.InvalidEvents) as refusal:
        aggregator.parse_events(body)
    (fault,) = refusal.value.faults
    assert "more than 200000 values" in fault.message


def test_the_values_of_a_full_queue_are_taken():
    payload = {f"k{number}": number for number in range(12)}
    body = lines([sample(str(number), payload=payload) for number in range(10_000)])
    assert len(aggregator.parse_events(body)) == 10_000


def test_a_long_queue_allows_more_values():
    body = b"[" + b"[]," * 250_000 + b"[]]"
    assert len(aggregator.json_values(body.decode(), most=30_000)[0]) == 250_001


def test_commas_and_brackets_inside_a_string_are_no_values():
    table = '1,2,3,[{"\\\n' * 100_000
    body = json.dumps(sample(payload={"table": table})).encode()
    (event,) = aggregator.parse_events(body)
    assert json.loads(event.payload) == {"table": table}


def test_reading_stops_after_one_value_too_many():
    # Behind it stands no JSON, and nobody looks at it.
    assert aggregator.json_values("1 2 3 ?", most=2) == [1, 2, 3]
    with pytest.raises(aggregator.BatchTooLarge):
        aggregator.parse_events(b"1 " * 150_000 + b"?")


def test_lines_of_text_become_events_numbered_by_line():
    events = from_lines("one\r\n\n \t\ntwo\x0b\x85\u2028é😀\nlast\x00")
    found = {event.event_id: json.loads(event.payload) for event in events}
    assert found == {
        "id:1": {"message": "one"},
        "id:4": {"message": "two\x0b\x85\u2028é😀"},
        "id:5": {"message": "last\x00"},
    }


def test_lines_of_text_share_topic_source_and_instant():
    for event in from_lines("one\ntwo"):
        assert event.topic == "t"
        assert event.source == "s"
        assert event.timestamp == 1


@with_cases("text, topic, expected", UNUSABLE_TEXTS)
def test_text_without_a_line_or_with_a_bad_topic_is_refused(text, topic, expected):
    assert places_of(faults_in(from_lines, text, topic)) == expected


def test_as_many_lines_as_the_queue_holds_are_taken():
    assert len(from_lines("a\n" * 10, most=10)) == 10


def test_more_lines_than_the_queue_holds_are_refused():
    with pytest.raises(aggregator.BatchTooLarge):
        from_lines("a\n" * 11, most=10)


def test_random_bodies_are_refused_with_a_fault_or_can_be_written_and_read_back():
    rng = random.Random(3)
    known_fields = {*REQUIRED_FIELDS, "sequence", "events", ""}
    taken = 0
    for _ in range(8000):
        body = spoilt_body(rng)
        try:
            events = aggregator.parse_events(body, 10)
        except aggregator.NotJSON:
            continue
        except aggregator.InvalidEvents as error:
            assert error.faults, body
            assert {fault.field for fault in error.faults} <= known_fields, body
            continue
        taken += 1
        for event in events:
            assert aggregator.parse_events(written(event), 10) == [event], body
    # Otherwise the bodies are spoilt too much or too little to show anything.
    assert 1000 < taken < 7000


# ============================================================================
# §2  The index: "seen before?"
# ============================================================================


@with_cases("known, batch, expected", DECISIONS)
def test_a_batch_is_decided_like_this(known, batch, expected):
    records = records_in_words(batch)
    decision = aggregator.decide(records, known_in_words(known), last_seq=7, now_us=NOW)
    assert decision_in_words(decision, len(records)) == expected


@with_cases("known, batch, expected", DECISIONS)
def test_deciding_changes_nothing_that_it_was_given(known, batch, expected):
    records = records_in_words(batch)
    known_before = known_in_words(known)
    aggregator.decide(records, known_before, last_seq=7, now_us=NOW)
    assert records == records_in_words(batch)
    assert known_before == known_in_words(known)


@with_cases("known, batch, expected", DECISIONS)
def test_what_is_fresh_is_what_is_no_repeat_in_order(known, batch, expected):
    records = records_in_words(batch)
    decision = aggregator.decide(records, known_in_words(known), last_seq=7, now_us=NOW)
    repeated = [repeat.index for repeat in decision.repeats]
    not_repeated = [record for n, record in enumerate(records) if n not in repeated]
    assert list(decision.fresh) == not_repeated
    assert repeated == sorted(repeated)


@with_cases("known, batch, expected", DECISIONS)
def test_a_repeat_tells_when_and_where_the_first_was_seen(known, batch, expected):
    records = records_in_words(batch)
    before = known_in_words(known)
    decision = aggregator.decide(records, before, last_seq=7, now_us=NOW)
    for repeat in decision.repeats:
        key = records[repeat.index].key
        if key in before:
            assert repeat.first == before[key]
        else:
            assert repeat.first.first_seen == NOW
            assert repeat.first.place == "batch"


@with_cases("changes, kind", SAME_IDENTITY)
def test_a_second_event_is_this(store, changes, kind):
    store.commit([event(1)], NOW)
    assert kind_of(store, event(**{"event_id": "1", **changes})) == kind


@with_cases("changes, kind", SAME_IDENTITY)
def test_a_second_event_in_the_same_batch_is_this(store, changes, kind):
    batch = [event(1), event(**{"event_id": "1", **changes})]
    assert kinds_of(store, batch) == ["new", kind]


@with_cases("topic, event_id, key", KEYS)
def test_a_key_is_the_same_on_every_host_and_for_ever(topic, event_id, key):
    assert aggregator.identity(topic, event_id).hex() == key


def test_topic_and_event_id_cannot_run_into_each_other():
    assert aggregator.identity("é", "x") != aggregator.identity("", "éx")
    assert aggregator.identity("a", "b:c") != aggregator.identity("a:b", "c")


def test_source_and_payload_cannot_run_into_each_other():
    assert aggregator.fingerprint("é", "x") != aggregator.fingerprint("", "éx")
    assert aggregator.fingerprint("a", "b:c") != aggregator.fingerprint("a:b", "c")


def test_a_key_has_16_bytes():
    assert len(aggregator.identity("é", "😀")) == 16


def test_a_repeat_in_a_later_batch_knows_the_first(store):
    store.commit([event(1), event(2)], NOW)
    decision = store.commit([event(2), event(3)], NOW + 5)
    fingerprint = event(2).fingerprint
    first = aggregator.Known(seq=2, fingerprint=fingerprint, first_seen=NOW, place="recent")
    assert decision.repeats == [aggregator.Repeat(0, "duplicate", first)]


def test_the_first_seq_is_1(store):
    assert store.commit([event(1), event(2)], NOW).first_seq == 1


@with_cases("changes", {"payload": {"payload": '{"n":2}'}, "source": {"source": "other"}})
def test_the_first_content_stays_when_another_one_comes(store, changes):
    store.commit([event(1)], NOW)
    store.commit([event(1, **changes)], NOW)
    with open_reader(store.path) as reader:
        found = json.loads(reader.event(1))
    assert found["payload"] == {"n": 1}
    assert found["source"] == "s"


def test_a_duplicate_is_found_wherever_its_key_has_moved_to(path):
    with open_store(path, full_sync=False, **SMALL_INDEX) as store:
        for start in range(0, 2000, 50):
            store.commit(events_of(range(start, start + 50)), NOW)
        places = {first_of(store, record).place for record in events_of(range(2000))}
    assert places == {"recent", "seen", "archive"}


def test_keys_are_known_again_after_the_memory_is_gone(path):
    everything = events_of(range(2000))
    with open_store(path, **SMALL_INDEX) as store:
        for start in range(0, 2000, 50):
            store.commit(everything[start : start + 50], NOW)
        recent_before = rows_of(store, "recent.ids")
        slice_before = store.index.next_slice
    with open_store(path, **SMALL_INDEX) as store:
        assert rows_of(store, "recent.ids") == recent_before
        assert store.index.next_slice == slice_before
        assert kinds_of(store, everything) == ["duplicate"] * 2000


@pytest.mark.parametrize("batch", [1, 7, 40, 300, 3000])
def test_merging_never_falls_behind(path, batch):
    average_slice = 10
    recent_ids = average_slice * aggregator.SLICES
    with open_store(path, full_sync=False, recent_ids=recent_ids) as store:
        for start in range(0, 4 * recent_ids, batch):
            store.commit(events_of(range(start, start + batch)), NOW)
            assert store.index.recent_count <= recent_ids + average_slice


def test_a_move_takes_out_on_average_twice_an_average_slice(path):
    average_slice = 10
    recent_ids = average_slice * aggregator.SLICES
    moves = []
    with open_store(path, full_sync=False, recent_ids=recent_ids) as store:
        # The first round moves slices that have just begun to fill.
        for start in range(0, 12 * recent_ids, 40):
            moves.append(commit_and_watch(store, events_of(range(start, start + 40))))
    late = moves[len(moves) // 2 :]
    slices = sum(move.slices for move in late)
    keys = sum(move.keys for move in late)
    assert keys / slices == pytest.approx(2 * average_slice, rel=0.05)


def test_slices_are_moved_in_turn(path):
    with open_store(path, **SMALL_INDEX) as store:
        order = []
        for start in range(0, 2000, 3):
            before = store.index.next_slice
            move = commit_and_watch(store, events_of(range(start, start + 3)))
            for step in range(move.slices):
                order.append((before + step) % aggregator.SLICES)
    assert order == [turn % aggregator.SLICES for turn in range(len(order))]


# Keys that share the writing of a page: the ids in the table they move to, into how
# many pieces the key space is cut, how many keys come with one piece, and the figure.
SHARES = {
    "a slice to seen": (2 * 10**6, aggregator.SLICES, 3072, 33),
    "a slice of 10 million, without an archive": (10**7, aggregator.SLICES, 3072, 6.5),
    "a slice of 100 million, without an archive": (10**8, aggregator.SLICES, 3072, 1.4),
    "a slice of 1,000 million, without an archive": (10**9, aggregator.SLICES, 3072, 1.0),
    "a shelf of 10 million": (8 * 10**6, aggregator.SHELVES, 1024, 43),
    "a shelf of 100 million": (98 * 10**6, aggregator.SHELVES, 1024, 3.7),
    "a shelf of 1,000 million": (998 * 10**6, aggregator.SHELVES, 1024, 1.2),
}


@with_cases("ids, pieces, keys, share", SHARES)
def test_so_many_keys_of_a_piece_share_a_page(ids, pieces, keys, share):
    tombstones_on_a_page = 83
    rng = random.Random(1)
    pages = round(ids / tombstones_on_a_page / pieces)
    touched = statistics.mean(pages_touched(rng, keys, pages) for _ in range(9))
    assert keys / touched == pytest.approx(share, rel=0.04)


def test_the_pieces_of_the_figures_are_those_of_the_program():
    assert 2 * aggregator.RECENT_IDS // aggregator.SLICES == 3072
    assert aggregator.SEEN_IDS // aggregator.SHELVES == 1024
    assert aggregator.SEEN_IDS == 4_194_304


@with_cases("pieces", {"slices": 256, "shelves": 4096, "a toy": 4})
def test_every_key_is_in_one_piece_of_the_key_space(pieces):
    spans = [aggregator.key_span(number, pieces) for number in range(pieces)]
    edges = [b"\0" * 16, b"\xff" * 16, *(bytes([n]) + b"\0" * 15 for n in range(256))]
    keys = [*edges, *(aggregator.identity("t", str(n)) for n in range(1000))]
    for key in keys:
        (number,) = (n for n, span in enumerate(spans) if span["low"] <= key < span["high"])
        assert number == int.from_bytes(key[:2], "big") * pieces // 65536


def test_nothing_is_archived_before_seen_has_had_its_fill(path):
    with open_store(path, full_sync=False, **SMALL_INDEX) as store:
        for start in range(0, 256 + 16, 8):
            assert rows_of(store, "archive") == []
            store.commit(events_of(range(start, start + 8)), NOW)
        assert store.index.archive_mark == 16


@pytest.mark.parametrize("batch", [1, 7, 40, 300, 3000])
def test_archiving_never_falls_behind(path, batch):
    seen_ids, shelves = 640, 64
    small = {"recent_ids": 256, "seen_ids": seen_ids, "shelves": shelves}
    with open_store(path, full_sync=False, **small) as store:
        for start in range(0, 4 * seen_ids, batch):
            store.commit(events_of(range(start, start + batch)), NOW)
            if start + batch >= seen_ids:
                behind = store.last_seq - seen_ids - store.index.archive_mark
                assert 0 <= behind < seen_ids // shelves


def test_shelves_are_moved_in_turn_and_seen_keeps_what_came_since(path):
    with open_store(path, full_sync=False, **SMALL_INDEX) as store:
        for start in range(0, 2000, 4):
            store.commit(events_of(range(start, start + 4)), NOW)
        turns = store.index.archive_mark // 16
        assert turns == (2000 - 256) // 16
        # Of the shelf that was moved last, `seen` has only what came with slices since.
        last = aggregator.key_span((turns - 1) % 16, 16)
        since = store.last_seq - 16
        for key, seq, _, _ in rows_of(store, "seen"):
            assert not last["low"] <= key < last["high"] or seq > since - 2 * 64
        assert len(rows_of(store, "seen")) < 256 + 64


def test_no_key_is_in_the_archive_and_in_another_table(path):
    settings = dict(SMALL_INDEX, max_per_topic=20)
    with open_store(path, full_sync=False, **settings) as store:
        for start in range(0, 2000, 9):
            # Most events are removed while their keys are recent.
            store.commit(events_of(range(start, start + 9)), NOW)
            recent, seen, archive = (
                {row[0] for row in rows_of(store, table)}
                for table in ("recent.ids", "seen", "archive")
            )
            assert archive & (recent | seen) == set()
            assert len(recent | seen | archive) == start + 9
        assert recent & seen != set()
        assert archive != set()


def test_about_80_tombstones_stand_on_a_page():
    rng = random.Random(1)
    with contextlib.closing(sqlite3.connect(":memory:")) as db:
        db.execute("CREATE TABLE seen" + aggregator.KEYS_TABLE)
        pages_before = aggregator.query_value(db, "PRAGMA page_count")
        for _ in range(20):
            slice_keys = sorted(rng.getrandbits(128).to_bytes(16, "big") for _ in range(3000))
            for seq, key in enumerate(slice_keys, 10_000_000):
                fingerprint = rng.getrandbits(63)
                db.execute("INSERT INTO seen VALUES(?, ?, ?, ?)", (key, seq, fingerprint, NOW))
        pages = aggregator.query_value(db, "PRAGMA page_count") - pages_before
    assert 60_000 / pages == pytest.approx(83, rel=0.05)


@with_cases("index", {"from seen": {"recent_ids": 64}, "from the archive": SMALL_INDEX})
def test_tombstones_expire_after_dedup_retention_and_not_before(path, index):
    clocks = Clocks()
    settings = dict(index, max_per_topic=20, dedup_retention_us=HOUR_US)
    with open_store(path, clocks, **settings) as store:
        store.commit(events_of(range(100)), clocks.wall_us)
        clocks.wait(HOUR_US // 2)
        # So many events that every slice is moved several times.
        for start in range(100, 3000, 25):
            store.commit(events_of(range(start, start + 25)), clocks.wall_us)
        assert kind_of(store, event(0), clocks.wall_us) == "duplicate"
        clocks.wait(HOUR_US * 3 // 2)
        for start in range(3000, 6000, 25):
            store.commit(events_of(range(start, start + 25), topic="u"), clocks.wall_us)
        assert kind_of(store, event(0), clocks.wall_us) == "new"
        # The event of this one is still there.
        assert kind_of(store, event(2999), clocks.wall_us) == "duplicate"


def test_a_late_retry_of_a_removed_event_is_a_duplicate_or_a_conflict(path):
    with open_store(path, **SMALL_INDEX, max_per_topic=10) as store:
        for number in range(300):
            store.commit(events_of([number]), NOW)
        retain(store, NOW)
        again = store.commit(events_of(range(300)), NOW)
        assert [repeat.first.seq for repeat in again.repeats] == list(range(1, 301))
        assert kind_of(store, event(5, payload='{"n":2}')) == "conflict"
        assert store.locate("t", "5") == 6


def test_a_late_retry_is_a_duplicate_after_a_start_too(path):
    with open_store(path, max_per_topic=10) as store:
        store.commit(events_of(range(300)), NOW)
        retain(store, NOW)
    assert len(stored_ids(path)) == 10
    with open_store(path) as store:
        assert kinds_of(store, events_of(range(300))) == ["duplicate"] * 300


def test_looking_first_and_inserting_then_stores_twice_what_two_send_at_once(tmp_path):
    """Rung 1 of the ladder, and how it fails."""
    table = "CREATE TABLE events(topic TEXT, event_id TEXT)"
    look = "SELECT count(*) FROM events WHERE topic = 't' AND event_id = '1'"
    insert = "INSERT INTO events VALUES('t', '1')"
    one = sqlite3.connect(tmp_path / "naive.db", isolation_level=None)
    other = sqlite3.connect(tmp_path / "naive.db", isolation_level=None)
    with contextlib.closing(one), contextlib.closing(other):
        one.execute(table)
        found_by_one = aggregator.query_value(one, look)
        found_by_other = aggregator.query_value(other, look)
        for db, found in [(one, found_by_one), (other, found_by_other)]:
            if not found:
                db.execute(insert)
        assert aggregator.query_value(one, look) == 2


def test_a_unique_table_forgets_the_id_with_the_row(tmp_path):
    """Rung 3 of the ladder, and how it fails."""
    with contextlib.closing(UniqueStore(str(tmp_path / "naive.db"))) as naive:
        naive.commit([event(1)], NOW)
        naive.remove([1])
        assert naive.commit([event(1)], NOW) == [StoreAnswer("new", 2)]


def test_our_store_keeps_the_id_when_the_row_is_gone(store):
    store.commit([event(1)], NOW)
    assert store.erase_event("t", "1") == 1
    assert stored_ids(store.path) == []
    assert kind_of(store, event(1)) == "duplicate"


@pytest.mark.parametrize("seed", MODEL_SEEDS)
@with_cases("make_store", STORES)
def test_a_store_answers_like_the_model_whatever_happens(path_of_any_store, make_store, seed):
    store = make_store(path_of_any_store)
    store, _ = live_through(random.Random(seed), store, Model(), MODEL_STEPS)
    store.close()


@pytest.mark.parametrize("seed", MODEL_SEEDS)
@with_cases("retention", RETENTIONS)
def test_retention_and_the_books_end_as_the_model_says(path, retention, seed):
    model = Model()
    store = our_small_store(path, **retention)
    store, now_us = live_through(random.Random(seed), store, model, MODEL_STEPS)
    kept = store.kept(now_us)
    store.close()
    assert kept == model.kept(now_us, **retention)
    stats = stats_of(path)
    assert stats["stored"] == len(kept)
    assert stats["unique_processed"] == model.unique
    assert stats["duplicate_dropped"] == model.repeated


# ============================================================================
# §3  The store: log, books, retention
# ============================================================================


def test_a_failed_batch_leaves_nothing_behind_on_disk_or_in_memory(store):
    store.commit([event(0)], NOW)
    with pytest.raises(aggregator.StoreFailed):
        store.commit([event("a"), unstorable_event(), event("b")], NOW)
    batch = [event("a"), event("b"), event(0)]
    assert kinds_of(store, batch) == ["new", "new", "duplicate"]
    assert store.commit([event("c")], NOW).first_seq == 4


def test_a_commit_that_fails_at_any_statement_leaves_everything_as_it_was(path, faulty_connections):
    numbers = {"source": "counted", "sequence": 9}
    with open_store(path, **SMALL_INDEX, max_per_topic=5) as store:
        store.commit([*events_of(range(100)), event("a", **numbers)], NOW)
        before = everything_in(store)
        batch = [*events_of(range(90, 130)), event("b", **{**numbers, "sequence": 12})]
        survived = 0
        for countdown in range(1, 1000):
            store.db.countdown = countdown
            try:
                store.commit(batch, NOW)
                break
            except aggregator.StoreFailed:
                survived += 1
            # The next transaction reads the variables back.
            store.probe(0, NOW)
            assert everything_in(store) == before
        store.db.countdown = 0
        assert survived > 15
        assert kinds_of(store, batch) == ["duplicate"] * len(batch)


def test_a_commit_that_another_program_blocks_fails_and_the_next_one_succeeds(path):
    with open_store(path, lock_timeout_s=0.02) as store:
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(aggregator.StoreFailed, match="locked"):
                store.commit([event(1)], NOW)
            other.execute("ROLLBACK")
        assert kind_of(store, event(1)) == "new"


@pytest.mark.parametrize("full_sync, level", [(True, 2), (False, 1)])
def test_the_writer_uses_full_sync_unless_told_otherwise(path, full_sync, level):
    with open_store(path, full_sync=full_sync) as store:
        assert aggregator.query_value(store.db, "PRAGMA synchronous") == level
        assert aggregator.query_value(store.db, "PRAGMA journal_mode") == "wal"


def test_full_sync_is_the_default():
    assert aggregator.StoreSettings().full_sync


def test_a_probe_writes_as_much_as_a_small_commit(store):
    at_start = wal_bytes(store.path)
    store.commit([event(1)], NOW)
    after_commit = wal_bytes(store.path)
    store.probe(0, NOW)
    after_probe = wal_bytes(store.path)
    assert after_commit > at_start
    assert after_probe - after_commit >= after_commit - at_start


def test_a_probe_leaves_nothing(store):
    store.commit(events_of(range(3)), NOW)
    before = everything_in(store)
    store.probe(0, NOW)
    assert everything_in(store) == before


@pytest.mark.parametrize("variables", [999, 32_766])
def test_no_statement_binds_more_values_than_sqlite_takes(variables):
    rows = list(range(1500))
    pieces = list(aggregator.chunks(rows, columns=10, variables=variables))
    assert list(itertools.chain.from_iterable(pieces)) == rows
    assert max(len(piece) for piece in pieces) * 10 <= variables


def test_a_batch_of_more_rows_than_a_statement_takes_is_stored_whole(store):
    batch = events_of(range(5000))
    assert kinds_of(store, batch) == ["new"] * 5000
    assert kinds_of(store, batch[::-1]) == ["duplicate"] * 5000


def test_a_commit_takes_few_statements_however_many_topics_and_sources_it_has(store):
    batch = [event(n, topic=f"t{n}", source=f"s{n}", sequence=n) for n in range(2000)]
    statements = []
    store.db.set_trace_callback(statements.append)
    store.commit(batch, NOW)
    # Before 3.32, SQLite binds 999 values: 64 rows of the log, 128 of the books.
    most = 40 if aggregator.SQLITE_VARIABLES > 999 else 80
    assert len(statements) < most


# ---- Retention


def test_retention_keeps_the_newest_of_each_topic(path):
    with open_store(path, **SMALL_INDEX, max_per_topic=10) as store:
        for number in range(300):
            rising = event(number, "a", timestamp=NOW + number)
            falling = event(number, "b", timestamp=NOW - number)
            store.commit([rising, falling], NOW)
        retain(store, NOW)
        assert stored_ids(path, topic="a") == [str(number) for number in range(290, 300)]
        assert stored_ids(path, topic="b") == [str(number) for number in range(9, -1, -1)]
        stats = stats_of(path)
    assert stats["topics"]["a"] == {"unique": 300, "duplicates": 0, "stored": 10}
    assert stats["unique_processed"] == 600
    assert stats["stored"] == 20


def test_a_flood_never_outruns_the_limit_of_a_topic(path):
    with open_store(path, max_per_topic=10) as store:
        for start in range(0, 3000, 100):
            store.commit(events_of(range(start, start + 100)), NOW)
            assert stats_of(path)["stored"] == 10


def test_retention_by_age_removes_what_arrived_before_it(path):
    clocks = Clocks()
    long_ago = NOW - 400 * DAY_US
    with open_store(path, clocks, retention_us=DAY_US) as store:
        for number in range(5):
            store.commit([event(number, timestamp=long_ago)], clocks.wall_us)
            clocks.wait(DAY_US // 2)
        # The third arrived 36 hours ago, the fourth 24 hours ago and no longer.
        retain(store, clocks.wall_us)
        assert stored_ids(path) == ["3", "4"]
        assert kind_of(store, event(0), clocks.wall_us) == "duplicate"


def test_what_age_removes_counts_for_the_number_that_a_topic_keeps(path):
    clocks = Clocks()
    with open_store(path, clocks) as store:
        store.commit(events_of(range(5)), clocks.wall_us)
        clocks.wait(HOUR_US)
        # These arrived later and happened before.
        happened_before = [event(n, timestamp=NOW - n) for n in range(5, 10)]
        store.commit(happened_before, clocks.wall_us)
    clocks.wait(1)
    settings = {"max_per_topic": 5, "retention_us": HOUR_US, "clock_settles_us": 0}
    with open_store(path, clocks, **settings) as store:
        retain(store, clocks.wall_us)
    assert sorted(stored_ids(path)) == ["5", "6", "7", "8", "9"]


def test_a_step_of_retention_stays_under_50_ms(path):
    clocks = Clocks()
    with open_store(path, clocks) as store:
        batch = [event(n, f"t{n % 7}", timestamp=NOW + n) for n in range(20_000)]
        store.commit(batch, NOW)
    steps = []
    settings = {"max_per_topic": 10, "retention_us": HOUR_US, "clock_settles_us": 0}
    with open_store(path, clocks, **settings) as store:
        more = True
        while more:
            started = time.perf_counter()
            more = store.tidy(NOW + 1)
            steps.append(time.perf_counter() - started)
    steps.sort()
    assert len(steps) >= 20_000 // aggregator.TRIM_ROWS
    assert steps[len(steps) // 2] < 0.05


# ---- Erasing


@with_cases("which, left", ERASURES)
def test_erasing_takes_these_events(store, which, left):
    store.commit(erasable_batch(), NOW)
    *_, erased = erase_all(store, which)
    assert erased == len(ERASABLE) - len(left)
    assert stored_ids(store.path) == list(left)


@with_cases("which, left", ERASURES)
def test_what_is_erased_stays_known(store, which, left):
    store.commit(erasable_batch(), NOW)
    erase_all(store, which)
    assert kinds_of(store, erasable_batch()) == ["duplicate"] * len(ERASABLE)


def test_erasing_a_whole_topic_takes_many_steps(path):
    whole_topic = {"topic": "t", "prefix": False, "until_us": None}
    with open_store(path, trim_rows=10) as store:
        store.commit(events_of(range(35)), NOW)
        assert erase_all(store, whole_topic) == [10, 20, 30, 35]
        assert stats_of(path)["stored"] == 0


def test_what_comes_while_a_topic_is_erased_is_spared(path):
    with open_store(path, trim_rows=10) as store:
        store.commit(events_of(range(20)), NOW)
        erasure = store.begin_erasing("t", False, None)
        number = 20
        while not erasure.is_done:
            # A flood that erasing would never catch up with.
            store.commit(events_of(range(number, number + 20)), NOW)
            number += 20
            erasure = store.go_on_erasing(erasure)
        assert erasure.events == 20
        assert stats_of(path)["stored"] == number - 20


def test_erasing_goes_on_through_more_topics_than_a_step_looks_at(path):
    all_topics = {"topic": "t", "prefix": True, "until_us": None}
    with open_store(path) as store:
        store.commit([event(n, f"t/{n}") for n in range(3 * aggregator.TRIM_TOPICS)], NOW)
        store.commit([event("other", "u")], NOW)
        *_, erased = erase_all(store, all_topics)
        assert erased == 3 * aggregator.TRIM_TOPICS
        assert stored_ids(path) == ["other"]


def test_erasing_an_event_says_whether_it_was_there(store):
    store.commit([event(1)], NOW)
    assert store.erase_event("t", "1") == 1
    assert store.erase_event("t", "1") == 0
    assert store.erase_event("t", "never seen") is None


def fill_with_kilobytes(path, topics):
    """Store ten events with payloads of 1,000 bytes, for these topics in turn."""
    payload = '{"x":"%s"}' % ("é" * 496)
    assert len(payload.encode()) == 1000
    with open_store(path) as store:
        for number in range(10):
            store.commit([event(number, topics[number % len(topics)], payload)], NOW)


@with_cases("topics", {"one topic": ["a"], "many topics": ["a", "a/b", "a/c", "a/d"]})
@with_cases(
    "most, erased",
    {
        "as many as fit": (3000, [3, 6, 9, 10]),
        # Two are not weighed.
        "one at least": (10, [1, 2, 3, 4, 5, 6, 7, 8, 10]),
    },
)
def test_a_step_of_erasing_ends_after_so_many_bytes(path, topics, most, erased):
    fill_with_kilobytes(path, topics)
    with open_store(path, trim_bytes=most) as store:
        assert erase_all(store, {"topic": "a", "prefix": True, "until_us": None}) == erased
    assert stored_ids(path) == []


def steps_of_tidy(store, now_us):
    """How many events each step of retention removes, until none is left to remove."""
    sizes = []
    stored = len(rows_of(store, "processed_events"))
    while store.tidy(now_us):
        left = len(rows_of(store, "processed_events"))
        sizes.append(stored - left)
        stored = left
    return sizes


@with_cases("topics", {"one topic": ["a"], "many topics": ["a", "b", "c", "d"]})
def test_a_step_of_retention_by_age_ends_after_so_many_bytes(path, topics):
    fill_with_kilobytes(path, topics)
    settings = {"retention_us": HOUR_US, "trim_bytes": 3000, "clock_settles_us": 0}
    with open_store(path, **settings) as store:
        assert steps_of_tidy(store, NOW + 2 * HOUR_US) == [3, 3, 3, 1]


@with_cases(
    "topics, steps", {"one topic": (["a"], [3, 3, 3]), "two topics": (["a", "b"], [3, 3, 2])}
)
def test_a_step_of_retention_by_number_ends_after_so_many_bytes(path, topics, steps):
    fill_with_kilobytes(path, topics)
    with open_store(path, max_per_topic=1, trim_bytes=3000) as store:
        assert steps_of_tidy(store, NOW) == steps


def test_the_patrol_comes_back_for_what_was_too_much_for_one_step(path):
    # An event of a clock that was ahead stays and hides those after it.
    with open_store(path) as store:
        store.commit([event("ahead")], NOW + 1000 * DAY_US)
    fill_with_kilobytes(path, ["a"])
    settings = {"retention_us": HOUR_US, "trim_bytes": 3000, "clock_settles_us": 0}
    with open_store(path, trim_rows=5, **settings) as store:
        assert sum(steps_of_tidy(store, NOW + 2 * HOUR_US)) == 10
    assert stored_ids(path) == ["ahead"]


def test_a_commit_removes_no_more_than_so_many_bytes(path):
    fill_with_kilobytes(path, ["a"])
    settings = {"retention_us": HOUR_US, "trim_bytes": 3000, "clock_settles_us": 0}
    with open_store(path, **settings) as store:
        store.commit(events_of(range(100, 120)), NOW + 2 * HOUR_US)
        assert len(rows_of(store, "processed_events")) == 20 + 10 - 3


def test_what_goes_is_weighed_without_reading_what_stays(path):
    with open_store(path, full_sync=False) as store:
        for start in range(0, 400, 100):
            numbers = range(start, start + 100)
            store.commit(events_of(numbers, payload='{"x":"%s"}' % ("y" * 50_000)), NOW)
        everything = list(range(1, 401))
        durations_s = []
        for _ in range(5):
            began_s = time.perf_counter()
            assert len(store._weighed(everything)) == 84
            durations_s.append(time.perf_counter() - began_s)
        began_s = time.perf_counter()
        store._settings = store._settings._replace(trim_bytes=10**12)
        assert len(store._weighed(everything)) == 400
        assert min(durations_s) < time.perf_counter() - began_s


def test_no_file_holds_what_was_erased_once_it_is_scrubbed(store):
    secret = "correct horse battery staple"
    store.commit([event(1, payload='{"m":"%s"}' % secret), event(2)], NOW)
    assert is_in_a_file_of(store.path, secret)
    store.erase_event("t", "1")
    assert store.scrub_is_due
    store.scrub()
    assert not store.scrub_is_due
    assert not is_in_a_file_of(store.path, secret)


def test_a_reader_in_the_middle_of_an_answer_holds_scrubbing_up(store):
    store.commit([event(1)], NOW)
    with contextlib.closing(sqlite3.connect(store.path, isolation_level=None)) as other:
        other.execute("BEGIN")
        other.execute("SELECT * FROM stats").fetchall()
        store.erase_event("t", "1")
        store.scrub()
        assert store.scrub_is_due
    store.scrub()
    assert not store.scrub_is_due


def test_after_a_start_scrubbing_is_due(path):
    # The process before may have been killed between erasing and scrubbing.
    with open_store(path) as store:
        assert store.scrub_is_due


# ---- Clocks that are wrong


@with_cases("step_us", CLOCK_STEPS)
def test_no_step_of_the_clock_removes_what_came_within_the_period(path, step_us):
    clocks = Clocks()
    with open_store(path, clocks, retention_us=HOUR_US) as store:
        store.commit([event(1)], clocks.wall_us)
        clocks.wall_us += step_us
        store.commit([event(2)], clocks.wall_us)
        clocks.wait(HOUR_US - 1)
        retain(store, clocks.wall_us)
    assert sorted(stored_ids(path)) == ["1", "2"]


@with_cases("step_us", CLOCK_STEPS)
def test_no_step_of_the_clock_makes_the_index_forget_within_the_period(path, step_us):
    clocks = Clocks()
    settings = dict(SMALL_INDEX, max_per_topic=1, dedup_retention_us=HOUR_US)
    with open_store(path, clocks, **settings) as store:
        store.commit([event(1)], clocks.wall_us)
        clocks.wall_us += step_us
        store.commit(events_of(range(2, 2000)), clocks.wall_us)
        clocks.wait(HOUR_US - 1)
        store.commit(events_of(range(2000, 4000)), clocks.wall_us)
        assert kind_of(store, event(1), clocks.wall_us) == "duplicate"


@with_cases("step_us", CLOCK_STEPS)
def test_after_a_step_of_the_clock_retention_goes_on(path, step_us):
    clocks = Clocks()
    with open_store(path, clocks, retention_us=HOUR_US) as store:
        store.commit([event(1)], clocks.wall_us)
        clocks.wall_us += step_us
        store.commit([event(2)], clocks.wall_us)
        for _ in range(3):
            clocks.wait(HOUR_US)
            retain(store, clocks.wall_us)
    # What arrived by a clock that was ahead stays until its time has come.
    expected = ["1"] if step_us < -2 * HOUR_US else []
    assert stored_ids(path) == expected


def test_events_from_before_the_start_wait_until_the_clock_has_settled(path):
    clocks = Clocks()
    with open_store(path, clocks) as store:
        store.commit([event(1)], clocks.wall_us)
    clocks.wait(2 * HOUR_US)
    settings = {"retention_us": HOUR_US, "clock_settles_us": 600_000_000}
    with open_store(path, clocks, **settings) as store:
        retain(store, clocks.wall_us)
        assert stored_ids(path) == ["1"]
        clocks.wait(599_999_999)
        retain(store, clocks.wall_us)
        assert stored_ids(path) == ["1"]
        clocks.wait(1)
        retain(store, clocks.wall_us)
        assert stored_ids(path) == []


def test_after_a_step_of_the_clock_events_from_before_the_start_wait_again(path):
    clocks = Clocks()
    with open_store(path, clocks) as store:
        store.commit([event(1)], clocks.wall_us)
    settings = {"retention_us": HOUR_US, "clock_settles_us": 600_000_000}
    with open_store(path, clocks, **settings) as store:
        retain(store, clocks.wall_us)
        clocks.wait(1_200_000_000)
        retain(store, clocks.wall_us)
        clocks.wall_us += 365 * DAY_US
        retain(store, clocks.wall_us)
        assert stored_ids(path) == ["1"]
        clocks.wait(600_000_000)
        retain(store, clocks.wall_us)
        assert stored_ids(path) == []


def test_an_event_of_a_clock_that_was_ahead_holds_up_no_other(path):
    clocks = Clocks()
    with open_store(path, clocks, retention_us=HOUR_US) as store:
        store.commit([event(1)], clocks.wall_us + HOUR_US)
        store.commit([event(2)], clocks.wall_us)
        clocks.wait(HOUR_US + 1)
        # Now the first seems to have arrived just now.
        retain(store, clocks.wall_us)
        assert stored_ids(path) == ["1"]
        clocks.wait(HOUR_US)
        retain(store, clocks.wall_us)
        assert stored_ids(path) == []


def test_a_clock_that_is_set_back_an_hour_keeps_duplicates_known(path):
    clocks = Clocks()
    with open_store(path, clocks) as store:
        store.commit([event(1)], clocks.wall_us + HOUR_US)
        first = first_of(store, event(1), clocks.wall_us + 1)
        assert first.seq == 1
        assert first.first_seen == clocks.wall_us + HOUR_US
        # A delay below zero counts as the shortest.
        assert stats_of(path)["duplicate_delay_seconds"]["1"] == 1


def test_many_events_of_a_clock_that_was_years_ahead_do_not_stop_retention(path):
    clocks = Clocks()
    with open_store(path, clocks, retention_us=HOUR_US, trim_rows=10) as store:
        store.commit(events_of(range(50)), clocks.wall_us + 90_000 * HOUR_US)
        store.commit(events_of(range(50, 75)), clocks.wall_us)
        clocks.wait(HOUR_US)
        store.commit(events_of([75]), clocks.wall_us)
        clocks.wait(1)
        retain(store, clocks.wall_us)
        expected = [str(number) for number in [*range(50), 75]]
        assert stored_ids(path) == expected


@pytest.mark.parametrize("seed", range(3))
def test_an_age_limit_is_reached_when_the_period_has_passed_and_little_later(seed):
    period_us = 1_000_000
    rng = random.Random(seed)
    limit = aggregator.AgeLimit(period_us, settles_us=0, started_after_seq=0)
    arrivals = [0]
    now_us = 0
    for seq in range(1, 3000):
        now_us += rng.choice([0, 1, 5, 300, 700_000, 2_000_000])
        now = aggregator.Moment(now_us, now_us)
        limit.tick(now)
        through_seq = limit.reached().through_seq
        assert arrivals[through_seq] <= now_us - period_us or through_seq == 0
        if through_seq + 1 < seq:
            assert arrivals[through_seq + 1] > now_us - period_us * 1.002
        arrivals.append(now_us)
        limit.arrived(now, seq)


# ---- What sources left out


@pytest.mark.parametrize("seed", MODEL_SEEDS)
def test_the_gaps_of_a_source_are_what_a_set_says_they_are(path, seed):
    rng = random.Random(seed)
    models = {"a": SequenceModel(), "b": SequenceModel()}
    store = OurStore(path)
    next_id = 0
    for _ in range(60):
        batch = numbered_batch(rng, next_id)
        next_id += len(batch)
        store.commit(batch, NOW)
        if rng.random() < 0.1:
            store = store.reopened()
        with open_reader(path) as reader:
            gaps = gaps_of(reader)
            total = reader.stats()["gaps"]
        assert total == sum(found["missing_count"] for found in gaps.values())
        for source, model in models.items():
            model.commit(numbers_of(batch, source))
            missing = model.missing()
            found = gaps.get(source, NO_GAPS)
            assert found["missing_count"] == len(missing)
            assert found["given_up"] == 0
            listed = numbers_in(found["missing"])
            assert listed <= missing
            # Only the last 100 ranges are listed.
            assert listed == missing or len(found["missing"]) == 100
    store.close()


def test_the_gaps_remembered_are_bounded(path):
    with open_store(path, gaps_kept=20) as store:
        every_other = [event(n, source="s", sequence=2 * n) for n in range(31)]
        store.commit(every_other, NOW)
        with open_reader(path) as reader:
            found = gaps_of(reader)["s"]
            assert found["missing_count"] == 20
            assert found["given_up"] == 10
            assert reader.stats()["gaps"] == 20


def test_500_gaps_of_a_source_are_remembered():
    assert aggregator.StoreSettings().gaps_kept == 500


def test_the_largest_numbers_do_no_harm(store):
    most = aggregator.MAX_SEQUENCE
    for number in (0, most, most - 9):
        batch = [event(f"{number}-{source}", source=source, sequence=number) for source in "tu"]
        store.commit(batch, NOW)
    with open_reader(store.path) as reader:
        gaps = gaps_of(reader)
        assert gaps["t"]["missing"] == [[1, most - 10], [most - 8, most - 1]]
        assert gaps["u"]["missing"] == gaps["t"]["missing"]
        # The sum is too large for an integer of SQLite.
        assert reader.stats()["gaps"] == pytest.approx(2 * most)


def test_a_source_that_begins_with_the_largest_number_has_no_gap(store):
    store.commit([event(1, sequence=aggregator.MAX_SEQUENCE)], NOW)
    with open_reader(store.path) as reader:
        assert gaps_of(reader) == {}


def test_the_gaps_of_one_source_can_be_asked_for(store):
    for source in "st":
        store.commit([event(f"{source}-{n}", source=source, sequence=n) for n in (1, 5)], NOW)
    with open_reader(store.path) as reader:
        [found] = reader.gaps("s", 10)
        assert found["source"] == "s"
        assert reader.gaps("none", 10) == []


# ---- Crashes


@with_cases("when, words, most", CRASHES)
def test_kill_9_in_the_middle_of_a_commit_loses_nothing_and_doubles_nothing(
    tmp_path, when, words, most
):
    rng = random.Random(when + words)
    for number in range(int(os.environ.get("CRASH_ROUNDS", "2"))):
        # A new file each time, so that the countdown ends in every phase.
        path = str(tmp_path / f"{number}.db")
        acknowledged = 7 * crash(path, when, words, rng.randint(1, int(most)))
        with open_store(path, max_per_topic=25) as store:
            unique = store.received()
            # The last batch may have been on its way.
            assert unique in (acknowledged, acknowledged + 7)
            everything = [event(n, payload="{}") for n in range(unique)]
            assert kinds_of(store, everything) == ["duplicate"] * unique
            assert store.received() == 2 * unique
        assert contradictions(path) == []


# ---- Files


@pytest.mark.parametrize("version", [2, 3])
def test_a_store_of_an_older_schema_is_brought_up_to_date(path, caplog, version):
    caplog.set_level(logging.INFO)
    with open_store(path) as store:
        store.commit(events_of(range(10)), NOW)
    as_version(path, version)
    with open_store(path) as store:
        assert kinds_of(store, events_of(range(11))) == ["duplicate"] * 10 + ["new"]
        assert len(store.store_id) == 16
    [message] = caplog.messages
    assert message.startswith(f"UPGRADED - {path} from schema version {version} to 4")
    assert contradictions(path) == []


def test_an_old_store_gets_its_archive_little_by_little(path):
    with open_store(path, full_sync=False, **SMALL_INDEX) as store:
        for start in range(0, 2000, 40):
            store.commit(events_of(range(start, start + 40)), NOW)
        archived = len(rows_of(store, "archive"))
    as_version(path, 3)
    with open_store(path, full_sync=False, **SMALL_INDEX) as store:
        assert rows_of(store, "archive") == []
        for number in range(2000, 2300):
            mark_before = store.index.archive_mark
            store.commit([event(number)], NOW)
            # A shelf at most, so that no commit is long.
            assert store.index.archive_mark - mark_before <= 16
        assert len(rows_of(store, "archive")) >= archived
        assert kinds_of(store, events_of(range(2300))) == ["duplicate"] * 2300
    assert contradictions(path) == []


def test_a_store_keeps_its_name_and_no_other_has_it(path, tmp_path):
    with open_store(path) as store, open_store(tmp_path / "other.db") as other:
        store_id = store.store_id
        assert store_id != other.store_id
    with open_store(path) as store:
        assert store.store_id == store_id


def test_a_probe_that_fails_half_way_leaves_a_sound_store(path, faulty_connections):
    for countdown in range(1, 1000):
        with open_store(path) as store:
            store.db.countdown = countdown
            try:
                store.probe(1000, NOW)
                break
            except aggregator.StoreFailed:
                pass
            store.db.countdown = 0
        assert contradictions(path) == []
    assert countdown > 15


def test_many_commits_leave_the_wal_bounded(path):
    with open_store(path, full_sync=False) as store:
        for number in range(6000):
            store.commit([event(number)], NOW)
        assert wal_bytes(path) < (aggregator.CHECKPOINT_PAGES + 500) * 4200


@pytest.mark.parametrize("ending", ["", "-owner", "-shm", "-wal"])
@pytest.mark.parametrize("replaced", [False, True])
@pytest.mark.parametrize("system", ["Linux", "another"])
def test_a_store_whose_file_is_moved_or_replaced_takes_nothing_until_it_is_back(
    path, ending, replaced, system, monkeypatch
):
    if system != "Linux":
        monkeypatch.delattr(os, "O_PATH", raising=False)
    with open_store(path) as store:
        assert_refuses_while_away(store, store.path + ending, replaced)


def assert_refuses_while_away(store, name, replaced):
    store.commit([event(1)], NOW)
    os.rename(name, name + ".away")
    if replaced:
        shutil.copy(name + ".away", name)
    refusal = re.escape(name) + " was deleted, moved, replaced or linked"
    with pytest.raises(aggregator.StoreFailed, match=refusal):
        store.commit([event(2)], NOW)
    with pytest.raises(aggregator.StoreFailed, match=refusal):
        store.probe(0, NOW)
    os.replace(name + ".away", name)
    assert kinds_of(store, [event(2), event(1)]) == ["new", "duplicate"]


@pytest.mark.parametrize("ending", ["-shm", "-wal"])
def test_a_store_whose_file_is_deleted_takes_nothing(path, ending):
    with open_store(path) as store:
        store.commit([event(1)], NOW)
        os.remove(store.path + ending)
        with pytest.raises(aggregator.StoreFailed, match="was deleted, moved"):
            store.commit([event(2)], NOW)


@pytest.mark.skipif(not hasattr(os, "O_PATH"), reason="this system has no O_PATH")
def test_no_commit_asks_for_the_times_of_the_wal(store, monkeypatch):
    asked = []
    stat = os.stat

    def note(path, *arguments, **options):
        asked.append(str(path))
        return stat(path, *arguments, **options)

    monkeypatch.setattr(os, "stat", note)
    store.commit([event(1)], NOW)
    assert sorted(asked) == sorted([store.path, store.path + "-owner", store.path + "-shm"])


@pytest.mark.skipif(not hasattr(os, "O_PATH"), reason="this system has no O_PATH")
def test_a_store_goes_on_when_proc_goes_away(store, monkeypatch):
    def refuse(path, *_):
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", path)

    monkeypatch.setattr(os, "readlink", refuse)
    assert kinds_of(store, [event(1)]) == ["new"]
    os.rename(store.path + "-wal", store.path + "-wal.away")
    with pytest.raises(aggregator.StoreFailed, match="was deleted, moved"):
        store.commit([event(2)], NOW)
    os.rename(store.path + "-wal.away", store.path + "-wal")


def test_a_store_that_is_closed_leaves_no_descriptor(path):
    before = len(os.listdir("/proc/self/fd"))
    with open_store(path) as store:
        store.commit([event(1)], NOW)
    assert len(os.listdir("/proc/self/fd")) == before


@with_cases("what, mode", {"the folder": ("", 0o555), "the file": ("s.db", 0o444)})
def test_a_read_only_file_or_folder_is_refused_with_a_reason(what, mode):
    # Not tmp_path: that is its owner's alone.
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "s.db")
        aggregator.Store(path).close()
        if os.geteuid() == 0:
            for name in (folder, path, path + "-owner"):
                os.chown(name, 65534, -1)
        os.chmod(os.path.join(folder, what), mode)
        refusal = "is read-only: the user that runs"
        with as_somebody_else(), pytest.raises(aggregator.StoreError, match=refusal):
            aggregator.Store(path)
        os.chmod(folder, 0o755)
        assert contradictions(path) == []


def test_a_foreign_reader_makes_the_wal_grow_until_it_ends(path):
    settings = {"full_sync": False, "wal_warn_bytes": 1_000_000, "checkpoint_pages": 50}
    with open_store(path, **settings) as store:
        assert fill_wal(store, range(100)) < 1_000_000
        assert store.checkpoint_note() == ""
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN")
            other.execute("SELECT * FROM stats").fetchall()
            grown = fill_wal(store, range(100, 200))
            note = store.checkpoint_note()
        assert grown > 2_000_000
        assert "end the program that is reading the store" in note
        # It begins anew.
        assert fill_wal(store, range(200, 300)) < grown * 1.1
        assert store.checkpoint_note() == ""


# Holds the lock of those who write the WAL back, as a hanging checkpoint would.
HOLD_CHECKPOINTS = """
import fcntl, sys
shared = open(sys.argv[1], "r+b")
fcntl.lockf(shared, fcntl.LOCK_EX, 1, 121)
print("held", flush=True)
sys.stdin.read()
"""


def test_a_checkpoint_of_another_program_that_hangs_is_noticed(path):
    pytest.importorskip("fcntl")
    settings = {"full_sync": False, "wal_warn_bytes": 1_000_000, "checkpoint_pages": 10}
    with open_store(path, **settings) as store:
        store.commit(events_of([1]), NOW)
        words = [sys.executable, "-c", HOLD_CHECKPOINTS, path + "-shm"]
        pipe = subprocess.PIPE
        with subprocess.Popen(words, stdin=pipe, stdout=pipe) as other:
            assert other.stdout.readline() == b"held\n"
            assert fill_wal(store, range(2, 60)) > 1_000_000
            note = store.checkpoint_note()
        assert "end the program" in note
        fill_wal(store, range(60, 70))
        assert store.checkpoint_note() == ""


def test_a_wal_that_cannot_be_written_back_is_noticed_long_before_it_is_large(path):
    with open_store(path, full_sync=False, checkpoint_pages=10) as store:
        db = store.db = WatchedConnection(store.db)
        fill_wal(store, range(3))
        assert store.checkpoint_note() == ""
        assert db.checkpoints == 0
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN")
            other.execute("SELECT * FROM stats").fetchall()
            # Four checkpoints are 160 KB.
            assert 200_000 < fill_wal(store, range(3, 20)) < 1_000_000
            # A reader holds it up: that is no failure.
            assert store.checkpoint_note() == ""
        db.fails = True
        for _ in range(2):
            with pytest.raises(aggregator.StoreFailed, match="cannot be written back.*disk I/O"):
                store.checkpoint_note()


def test_a_wal_that_was_written_back_is_left_alone_until_it_grows(path):
    with open_store(path, full_sync=False, checkpoint_pages=10) as store:
        db = store.db = WatchedConnection(store.db)
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN")
            other.execute("SELECT * FROM stats").fetchall()
            grown = fill_wal(store, range(20))
        for _ in range(3):
            assert store.checkpoint_note() == ""
        assert db.checkpoints == 1
        # The file keeps its size, and begins anew.
        assert fill_wal(store, range(20, 23)) == grown
        assert store.checkpoint_note() == ""
        assert db.checkpoints == 1


@needs_linux
def test_payloads_of_every_group_size_are_not_kept_in_memory(path):
    large = "x" * 2_000_000
    with open_store(path, full_sync=False) as store:
        store.commit([event("first", payload='{"n":"%s"}' % large)], NOW)
        before = memory_mb(os.getpid(), "VmRSS")
        for size in range(1, 64):
            payload = '{"n":"%s"}' % large[: len(large) // size]
            batch = [event(f"{size}-{n}", payload=payload) for n in range(size)]
            assert kinds_of(store, batch) == ["new"] * size
        assert memory_mb(os.getpid(), "VmRSS") < before + 60
    assert stats_of(path)["stored"] == 1 + sum(range(1, 64))


def test_a_damaged_file_is_refused_or_fails_with_a_reason_and_nothing_else(tmp_path):
    path = str(tmp_path / "s.db")
    rng = random.Random(int(os.environ.get("FUZZ_SEED", "1")))
    whole = bytes_of_a_store(path)
    refused = 0
    failed = 0
    for number in range(int(os.environ.get("DAMAGE_ROUNDS", "40"))):
        with open(path, "wb") as file:
            file.write(damaged(rng, whole))
        settings = {"max_per_topic": rng.choice([0, 300]), "retention_us": rng.choice([0, 1000])}
        try:
            opening = open_store(path, full_sync=False, clock_settles_us=0, **settings)
        except aggregator.StoreError as error:
            refusal = re.search("damaged|schema|not an", str(error))
            assert refusal, f"round {number}: {error}"
            refused += 1
            continue
        with opening as store, open_reader(path) as reader:
            failed += failures_of_any_kind(writes_to(store))
            failed += failures_of(reads_from(store, reader))
        with contextlib.suppress(aggregator.StoreError):
            for _, sentence in aggregator.check_store(path):
                assert sentence
    assert refused + failed > 0


@with_cases("seq", {"below zero": -1, "ahead of the log": 1 << 40})
def test_a_tombstone_whose_seq_cannot_be_is_found_by_check_in_bounded_memory(tmp_path, seq):
    path = str(tmp_path / "s.db")
    with open_store(path) as store:
        store.commit([event(1)], NOW)
        store.db.execute("INSERT INTO seen VALUES(x'00', :seq, 1, 1)", {"seq": seq})
    tracemalloc.start()
    try:
        assert contradictions(path) != []
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 10_000_000


# ============================================================================
# §4  Reading
# ============================================================================


def test_a_page_is_cut_short_by_its_bytes_and_goes_on_behind_a_cursor(store):
    payload = '{"x":"%s"}' % ("y" * 100)
    store.commit(events_of(range(7), payload=payload), NOW)
    with open_reader(store.path, page_bytes=250) as reader:
        pages = list(pages_of(reader, aggregator.EventQuery()))
    found = [each["event_id"] for page in pages for each in events_in(page)]
    assert [page.size for page in pages] == [2, 2, 2, 1]
    assert found == [str(number) for number in range(7)]


@with_cases("query", UNINDEXED_QUERIES)
def test_a_filter_without_an_index_looks_at_a_bounded_number_of_rows(path, query):
    with open_store(path, **SMALL_INDEX) as store:
        for number in range(100):
            rare = number in (37, 38, 99)
            topic = "b/x" if rare else "a"
            source = "rare" if rare else "s"
            store.commit([event(number, topic, source=source, timestamp=NOW + number)], NOW)
    with open_reader(path, scan_rows=10) as reader:
        pages = list(pages_of(reader, query))
    found = [each["event_id"] for page in pages for each in events_in(page)]
    assert sorted(found) == ["37", "38", "99"]
    assert 5 < len(pages) < 15


@with_cases("text, places", SEARCHES)
def test_a_payload_is_found_by_what_it_contains(store, text, places):
    batch = [event(number, payload=payload) for number, payload in enumerate(SEARCHABLE)]
    store.commit(batch, NOW)
    assert stored_ids(store.path, contains=text) == [str(place) for place in places]


@with_cases("changes", COUNT_QUERIES)
@pytest.mark.parametrize("list_rows", [1, 64, 1000])
def test_counts_by_time_are_those_of_counting_by_hand(path, changes, list_rows):
    rng = random.Random(list_rows)
    records = scattered_events(rng, 500)
    with open_store(path, list_rows=list_rows) as store:
        for start in range(0, 500, 50):
            store.commit(records[start : start + 50], NOW)
    span = {
        "span_us": 60 * MINUTE_US,
        "since": NOW + 20 * MINUTE_US,
        "until": NOW + 250 * MINUTE_US,
    }
    query = aggregator.CountQuery(**span)._replace(**changes)
    with open_reader(path) as reader:
        assert reader.counts(query) == counts_by_hand(records, query)


# ============================================================================
# §3  What stands around the file: owners, names, modes, first starts, faults
# ============================================================================

needs_posix = pytest.mark.skipif(os.name != "posix", reason="files have no such names here")


@needs_posix
def test_a_file_with_a_second_name_is_refused(path, tmp_path):
    with open_store(path):
        pass
    os.link(path, str(tmp_path / "other.db"))
    with pytest.raises(aggregator.StoreError, match="2 names"):
        aggregator.Store(path)
    os.remove(str(tmp_path / "other.db"))


@needs_posix
def test_what_reads_a_store_refuses_a_second_name(path, tmp_path):
    with open_store(path) as store:
        store.commit(events_of([1]), NOW)
        other = str(tmp_path / "other.db")
        os.link(path, other)
        # It has no WAL beside it, and the event is in the WAL.
        with pytest.raises(aggregator.StoreError, match="2 names"):
            aggregator.copy_store(other, str(tmp_path / "copy.db"))
        with pytest.raises(aggregator.StoreError, match="2 names"):
            contradictions(other)
        os.remove(other)
    assert sorted(os.listdir(str(tmp_path))) == ["s.db", "s.db-owner"]


@needs_posix
def test_a_second_name_that_comes_later_stops_the_commits(path, tmp_path):
    with open_store(path) as store:
        os.link(path, str(tmp_path / "other.db"))
        with pytest.raises(aggregator.StoreFailed, match="linked"):
            store.commit(events_of([1]), NOW)
        os.remove(str(tmp_path / "other.db"))
        assert not store.commit(events_of([1]), NOW).repeats


def test_a_symbolic_link_is_the_same_store(path, tmp_path):
    with open_store(path):
        link = str(tmp_path / "link.db")
        os.symlink(path, link)
        with pytest.raises(aggregator.StoreError, match="another running aggregator"):
            aggregator.Store(link)


@needs_linux
def test_a_mount_point_is_known_as_one(tmp_path):
    assert aggregator.is_mount_point("/proc")
    assert not aggregator.is_mount_point(str(tmp_path))


@pytest.mark.skipif(
    os.name != "posix" or os.geteuid() != 0 or not shutil.which("unshare"),
    reason="mounting takes the superuser and unshare",
)
@with_cases("words", {"serve": ["--port", "0"], "check": ["check"], "backup": ["backup", "--to"]})
def test_a_file_that_is_mounted_alone_is_refused(path, tmp_path, words):
    with open_store(path):
        pass
    other = str(tmp_path / "other.db")
    with open(other, "wb"):
        pass
    if words[-1] == "--to":
        words = [*words, str(tmp_path / "copy.db")]
    script = 'mount --bind "$1" "$2" && shift 2 && exec "$@"'
    words = [sys.executable, PROGRAM, *words, "--db", other]
    words = ["unshare", "-m", "sh", "-c", script, "sh", path, other, *words]
    done = subprocess.run(words, stderr=subprocess.PIPE, text=True, timeout=30)
    if "mount:" in done.stderr or "unshare:" in done.stderr:
        pytest.skip("nothing can be mounted here")
    assert done.returncode == 1
    assert "mount the folder instead" in done.stderr


@needs_posix
@pytest.mark.parametrize("mask", [0, 0o377, 0o777])
def test_new_files_of_a_store_are_private_whatever_the_umask(path, mask):
    with umask(mask), open_store(path):
        modes = {name: os.stat(path + name).st_mode & 0o777 for name in ("", "-owner", "-wal")}
    assert modes == {"": 0o600, "-owner": 0o600, "-wal": 0o600}


@pytest.mark.skipif(
    os.name != "posix" or os.geteuid() != 0, reason="only the superuser gives files away"
)
def test_a_check_by_root_leaves_nothing_that_the_service_cannot_use(path):
    with open_store(path):
        pass
    os.chown(path, 65534, 65534)
    os.remove(path + "-owner")
    for _ in aggregator.check_store(path):
        pass
    assert os.stat(path + "-owner").st_uid == 65534
    os.chown(path, 0, 0)


def test_a_folder_called_locked_is_no_lock(path, monkeypatch):
    def refuse(name, like):
        raise PermissionError(errno.EACCES, "Permission denied", "/locked/s.db-owner")

    monkeypatch.setattr(aggregator, "make_file", refuse)
    with pytest.raises(aggregator.StoreError, match="must be able to write it"):
        aggregator.Store(path)
    monkeypatch.undo()
    aggregator.Store(path).close()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_is_refused_before_it_is_opened(tmp_path):
    pipe = str(tmp_path / "pipe")
    os.mkfifo(pipe)
    for words in (["--port", "0"], ["check"], ["backup", "--to", str(tmp_path / "copy.db")]):
        found = run(*words, "--db", pipe)
        assert_refused(found, 1, "is not a regular file: choose another --db")
    assert os.listdir(str(tmp_path)) == ["pipe"]


def test_the_null_device_is_no_store():
    with pytest.raises(aggregator.StoreError, match="not a regular file"):
        aggregator.check_header(os.devnull)


def test_an_owner_file_that_cannot_be_used_is_one_sentence(path):
    with open_store(path):
        pass
    os.remove(path + "-owner")
    os.mkdir(path + "-owner")
    with pytest.raises(aggregator.StoreError, match="cannot lock"):
        aggregator.Store(path)
    os.rmdir(path + "-owner")


def test_a_store_that_was_half_made_when_the_power_went_is_made_anew(path):
    subprocess.run([sys.executable, "-c", HALF_MADE, path], timeout=30)
    assert os.path.getsize(path + "-journal") > 512
    size = os.path.getsize(path)
    with open(path, "wb") as file:
        file.write(bytes(size))
    with open_store(path) as store:
        store.commit(events_of([1]), NOW)
        assert store.received() == 1


def test_a_store_whose_first_page_was_written_when_the_power_went_is_made_anew(path, tmp_path):
    aggregator.Store(str(tmp_path / "whole.db")).close()
    first_page = (tmp_path / "whole.db").read_bytes()[:4096]
    subprocess.run([sys.executable, "-c", HALF_MADE, path], timeout=30)
    with open(path, "r+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        file.write(first_page.ljust(size, b"\0"))
    before = bytes_of_files(tmp_path)
    with pytest.raises(aggregator.StoreError, match="there is no store"):
        contradictions(path)
    with pytest.raises(aggregator.StoreError, match="there is no store"):
        aggregator.copy_store(path, str(tmp_path / "copy.db"))
    assert bytes_of_files(tmp_path) == before
    with open_store(path) as store:
        store.commit(events_of([1]), NOW)
        assert store.received() == 1


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_journal_that_is_a_pipe_is_not_waited_for(tmp_path):
    path = str(tmp_path / "s.db")
    aggregator.Store(path).close()
    os.mkfifo(path + "-journal")
    with pytest.raises(aggregator.StoreError, match="-journal is not a regular file: remove it"):
        contradictions(path)


def bytes_of_files(folder):
    """The content of each file of a folder, by name."""
    return {each.name: each.read_bytes() for each in folder.iterdir()}


@with_cases(
    "journal",
    {
        "something else": b"Dear diary",
        "zeros": bytes(512),
        "of a file that had pages": b"\xd9\xd5\x05\xf9\x20\xa1\x63\xd7" + b"\1" * 504,
    },
)
def test_a_file_of_zeros_beside_another_journal_is_refused_and_both_are_left(tmp_path, journal):
    (tmp_path / "zeros.db").write_bytes(bytes(8192))
    (tmp_path / "zeros.db-journal").write_bytes(journal)
    before = bytes_of_files(tmp_path)
    with pytest.raises(aggregator.StoreError, match="not an SQLite database"):
        aggregator.Store(str(tmp_path / "zeros.db"))
    assert bytes_of_files(tmp_path) == before


def test_a_journal_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "zeros.db").write_bytes(bytes(8192))
    (tmp_path / "zeros.db-journal").mkdir()
    with pytest.raises(aggregator.StoreError, match="zeros.db-journal is not a regular file"):
        aggregator.Store(str(tmp_path / "zeros.db"))


def test_a_file_of_zeros_without_a_journal_is_refused_and_left_as_it_is(tmp_path):
    zeros = tmp_path / "zeros.db"
    zeros.write_bytes(bytes(8192))
    with pytest.raises(aggregator.StoreError, match="not an SQLite database"):
        aggregator.Store(str(zeros))
    assert zeros.read_bytes() == bytes(8192)


@pytest.mark.parametrize("what", ["write", "sync", "open"])
def test_the_library_makes_the_disk_fail(faults_library, tmp_path, what):
    path = str(tmp_path / "s.db")
    acknowledged = acknowledged_with_fault(faults_library, path, what, 3, errno.EIO)
    assert len(acknowledged) < 60


FAULT_ROUNDS = int(os.environ.get("FAULT_ROUNDS", "3"))


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC], ids=["EIO", "ENOSPC"])
@pytest.mark.parametrize("what, most", [("write", 120), ("sync", 40), ("open", 8)])
def test_a_fault_of_the_disk_loses_nothing_acknowledged(faults_library, path, what, most, error):
    for number in random.sample(range(1, most), FAULT_ROUNDS):
        for name in glob.glob(path + "*"):
            os.remove(name)
        acknowledged = acknowledged_with_fault(faults_library, path, what, number, error)
        with open_store(path) as store:
            stored = [event_id for event_id in acknowledged if store.locate("t", event_id)]
        assert stored == acknowledged, (what, number)
        assert not contradictions(path), (what, number)


# ============================================================================
# §5  The pipeline
# ============================================================================


def test_a_publisher_is_answered_after_the_commit(path):
    async def body(pipeline):
        gate = Gate(pipeline)
        waiting = await publish_soon(pipeline, [plain(1)])
        await gate.reached()
        assert not waiting.done()
        assert (await pipeline.stats())["current_queue_size"] == 1
        gate.open()
        assert kinds_in(await waiting) == ["new"]
        assert (await pipeline.stats())["current_queue_size"] == 0

    in_pipeline(path, body)


def test_what_waits_is_committed_as_one_group_and_each_gets_its_own_verdicts(path):
    async def body(pipeline):
        gate = Gate(pipeline)
        first = await publish_soon(pipeline, [plain("x")])
        await gate.reached()
        others = []
        for number in (1, 2, 3):
            batch = [plain(number), plain("x"), plain(number + 1)]
            others.append(await publish_soon(pipeline, batch))
        gate.open()
        assert answers_in(await first) == [StoreAnswer("new", 1)]
        one, two, three = [await other for other in others]
        repeat_of_x = StoreAnswer("duplicate", 1)
        assert answers_in(one) == [StoreAnswer("new", 2), repeat_of_x, StoreAnswer("new", 3)]
        assert answers_in(two) == [StoreAnswer("duplicate", 3), repeat_of_x, StoreAnswer("new", 4)]
        assert answers_in(three) == [
            StoreAnswer("duplicate", 4),
            repeat_of_x,
            StoreAnswer("new", 5),
        ]
        assert gate.groups == [1, 9]
        assert one.group_events == two.group_events == three.group_events == 9
        assert len(pipeline.duplicates) == 5

    in_pipeline(path, body)


@with_cases("sizes", GROUP_SIZES)
def test_the_receipts_of_a_group_say_together_what_was_decided(sizes):
    records = records_in_words("a1 b1 a1 a2 c1")
    decision = aggregator.decide(records, known_in_words("b1=3"), last_seq=7, now_us=NOW)
    answers = []
    left = list(records)
    for size, share in zip(sizes, aggregator.shares_of(decision, sizes)):
        own = [left.pop(0) for _ in range(size)]
        receipt = aggregator.Receipt(own, share.first_seq, share.repeats, NOW, 5, 0)
        assert receipt.unique + receipt.duplicates == size
        answers += answers_in(receipt)
    assert answers == answers_of(decision, len(records))


def test_a_receipt_counts_what_became_of_its_events():
    records = records_in_words("a1 b1 a1 a2 c1")
    decision = aggregator.decide(records, {}, last_seq=7, now_us=NOW)
    receipt = aggregator.Receipt(records, decision.first_seq, decision.repeats, NOW, 5, 0)
    assert receipt.unique == 3
    assert receipt.duplicates == 2
    assert receipt.conflicts == 1


def test_a_group_ends_with_the_batch_that_fills_it(path):
    async def body(pipeline):
        gate = Gate(pipeline)
        tasks = [await publish_soon(pipeline, [plain("first")])]
        await gate.reached()
        for number in range(5):
            tasks.append(await publish_soon(pipeline, [plain(number)]))
        gate.open()
        await asyncio.gather(*tasks)
        assert gate.groups == [1, 3, 2]

    in_pipeline(path, body, limits={"group_events": 3})


def test_a_full_queue_refuses_a_batch_whole_and_counts_nothing_of_it(path):
    async def body(pipeline):
        gate = Gate(pipeline)
        tasks = []
        for start in (0, 4):
            tasks.append(await publish_soon(pipeline, plain_events(range(start, start + 4))))
        with pytest.raises(aggregator.QueueFull, match="8 of 10"):
            await pipeline.publish(plain_events(range(20, 23)), 1)
        # Two more fit exactly.
        tasks.append(await publish_soon(pipeline, plain_events([30, 31])))
        stats = await pipeline.stats()
        assert stats["received"] == 10
        assert stats["current_queue_size"] == 10
        gate.open()
        await asyncio.gather(*tasks)
        stats = await pipeline.stats()
        assert stats["received"] == 10
        assert stats["unique_processed"] == 10
        assert stats["current_queue_size"] == 0

    in_pipeline(path, body, limits={"queue_events": 10})


def test_a_batch_larger_than_the_queue_is_told_so(path):
    async def body(pipeline):
        with pytest.raises(aggregator.BatchTooLarge, match="at most 10"):
            await pipeline.publish(plain_events(range(11)), 1)

    in_pipeline(path, body, limits={"queue_events": 10})


def test_a_batch_as_large_as_the_queue_is_taken(path):
    async def body(pipeline):
        receipt = await pipeline.publish(plain_events(range(10)), 1)
        assert receipt.unique == 10

    in_pipeline(path, body, limits={"queue_events": 10})


def test_the_queue_is_bounded_in_bytes_too(path):
    async def body(pipeline):
        gate = Gate(pipeline)
        # Alone, a body may be larger than the bound.
        first = await publish_soon(pipeline, [plain(1)], size=5000)
        with pytest.raises(aggregator.QueueFull, match="5000 of 1000 bytes are queued and 1 more"):
            await pipeline.publish([plain(2)], 1)
        gate.open()
        await first
        assert kinds_in(await pipeline.publish([plain(2)], 1)) == ["new"]

    in_pipeline(path, body, limits={"queue_bytes": 1000})


@with_cases("failure", COMMIT_FAILURES)
def test_a_failing_commit_refuses_its_group_and_the_consumer_goes_on(path, failure):
    async def body(pipeline):
        gate = Gate(pipeline)
        gate.open()
        gate.failure = failure
        for number in (1, 2):
            with pytest.raises(aggregator.StoreFailed):
                await pipeline.publish([plain(number)], 1)
        stats = await pipeline.stats()
        assert stats["received"] == 0
        assert stats["unique_processed"] == 0
        assert stats["current_queue_size"] == 0
        gate.failure = None
        assert kinds_in(await pipeline.publish([plain(1)], 1)) == ["new"]
        assert (await pipeline.stats())["received"] == 1

    in_pipeline(path, body)


@with_cases("failure", COMMIT_FAILURES)
def test_a_failing_commit_tells_all_publishers_of_its_group(path, failure):
    async def body(pipeline):
        gate = Gate(pipeline)
        gate.failure = failure
        tasks = [await publish_soon(pipeline, [plain(number)]) for number in range(3)]
        gate.open()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [aggregator.StoreFailed] * 3

    in_pipeline(path, body)


@with_cases("failure", COMMIT_FAILURES)
def test_events_taken_without_waiting_that_could_not_be_stored_are_in_the_log(
    path, failure, caplog
):
    async def body(pipeline):
        gate = Gate(pipeline)
        gate.failure = failure
        await pipeline.publish([plain(1)], 1, wait=False)
        waiting = await publish_soon(pipeline, [plain(2)])
        gate.open()
        with pytest.raises(aggregator.StoreFailed):
            await waiting
        assert (await pipeline.stats())["received"] == 0

    in_pipeline(path, body)
    assert "LOST - 1 events" in caplog.text
    assert "COMMIT FAILED" in caplog.text


def test_events_taken_without_waiting_are_stored_when_the_pipeline_stops(path):
    async def body(pipeline):
        for number in range(50):
            assert await pipeline.publish([plain(number)], 1, wait=False) is None

    in_pipeline(path, body)
    with open_store(path) as store:
        assert store.received() == 50


def test_a_publisher_that_goes_away_leaves_its_events_and_the_books_in_order(path):
    async def body(pipeline):
        gate = Gate(pipeline)
        leaving = await publish_soon(pipeline, [plain(1)])
        await gate.reached()
        leaving.cancel()
        gate.open()
        await pipeline.publish([plain(2)], 1)
        stats = await pipeline.stats()
        assert stats["received"] == 2
        assert stats["unique_processed"] == 2
        assert stats["current_queue_size"] == 0

    in_pipeline(path, body)


def test_nothing_is_taken_once_stopping(path):
    async def body(pipeline):
        pipeline._stopping = True
        with pytest.raises(aggregator.Stopping):
            await pipeline.publish([plain(1)], 1)
        assert "stopping" in await pipeline.health()

    in_pipeline(path, body)


def test_nobody_waits_for_a_consumer_that_has_ended(path):
    async def body(pipeline):
        consumer = pipeline._tasks[0]
        consumer.cancel()
        await asyncio.wait([consumer])
        with pytest.raises(aggregator.Stopping):
            await pipeline.publish([plain(1)], 1)
        assert "consumer has ended" in await pipeline.health()

    in_pipeline(path, body)


@with_cases("failure", COMMIT_FAILURES)
def test_health_finds_out_by_writing_that_a_failure_has_passed(path, failure):
    async def body(pipeline):
        gate = Gate(pipeline)
        gate.open()
        gate.failure = failure
        with pytest.raises(aggregator.StoreFailed):
            await pipeline.publish([plain(1)], 1)
        assert pipeline.trouble() is not None
        assert await pipeline.health() == ""
        assert pipeline.trouble() is None

    in_pipeline(path, body)


def test_health_writes_when_no_commit_has_shown_for_long_that_one_can(path):
    async def body(pipeline):
        def fail_to_write(size, now_us):
            raise aggregator.StoreFailed("disk full")

        pipeline._store.probe = fail_to_write
        assert await pipeline.health() == "disk full"

    in_pipeline(path, body, limits={"health_probe_s": -1})


def a_store_whose_listing_is_damaged(tmp_path):
    """Its topic "spoilt" cannot be sorted: not more than 99 events are taken for it."""
    path = str(tmp_path / "damaged.db")
    with open_store(path, list_rows=100) as store:
        for topic in ("sound", "spoilt"):
            store.commit(events_of(range(1000), topic=topic), NOW)
    damage_listing(path, damaged=b"spoilt", sound=b"sound")
    return path


def spoilt_events(numbers):
    return [plain(f"new-{number}", topic="spoilt") for number in numbers]


def test_health_is_not_ok_while_what_failed_would_fail_again(tmp_path):
    async def body(pipeline):
        await pipeline.publish(spoilt_events(range(60)), 1)
        for _ in range(3):
            with pytest.raises(aggregator.StoreFailed, match="malformed"):
                await pipeline.publish(spoilt_events(range(60, 120)), 1)
            assert "malformed" in await pipeline.health()

    path = a_store_whose_listing_is_damaged(tmp_path)
    in_pipeline(path, body, limits={"probe_pause_s": 0}, list_rows=100)


def test_health_is_not_ok_while_the_sorted_tables_cannot_be_fed(tmp_path):
    async def body(pipeline):
        await pipeline.publish(spoilt_events(range(99)), 1)
        assert "malformed" in await pipeline.health()

    path = a_store_whose_listing_is_damaged(tmp_path)
    in_pipeline(path, body, limits={"health_probe_s": -1}, list_rows=100)


def test_a_probe_looks_where_the_failed_events_would_go(path):
    async def body(pipeline):
        look_up = pipeline._store.index.look_up

        def fail_for_one_key(records):
            if any(record.event_id == "2" for record in records):
                raise sqlite3.DatabaseError("database disk image is malformed")
            return look_up(records)

        pipeline._store.index.look_up = fail_for_one_key
        with pytest.raises(aggregator.StoreFailed):
            await pipeline.publish(plain_events([1, 2]), 1)
        assert "malformed" in await pipeline.health()
        pipeline._store.index.look_up = look_up
        assert await pipeline.health() == ""
        # The probe has stored nothing.
        assert kinds_in(await pipeline.publish(plain_events([1, 2]), 1)) == ["new", "new"]

    in_pipeline(path, body, limits={"probe_pause_s": 0})


def test_a_rehearsal_changes_nothing(path):
    with open_store(path, max_per_topic=8, **SMALL_INDEX) as store:
        store.commit(events_of(range(100)), NOW)
        before = everything_in(store)
        store.rehearse(events_of(range(50, 150)), NOW)
        with store._transaction():
            pass
        assert everything_in(store) == before
        assert kinds_of(store, events_of([99, 100])) == ["duplicate", "new"]


def test_health_checks_at_the_same_time_share_one_probe(path):
    async def body(pipeline):
        probe = SlowCall(pipeline, "probe")
        checks = [asyncio.ensure_future(pipeline.health()) for _ in range(50)]
        await probe.reached()
        checks += [asyncio.ensure_future(pipeline.health()) for _ in range(50)]
        # One that goes away takes nobody along.
        checks.pop(0).cancel()
        await one_turn()
        probe.open()
        assert set(await asyncio.gather(*checks)) == {""}
        assert probe.calls == 1

    in_pipeline(path, body, limits={"health_probe_s": -1})


def test_while_commits_fail_probes_keep_a_distance(path):
    async def body(pipeline):
        began_s = []

        def fail(records, now_us):
            began_s.append(time.monotonic())
            raise aggregator.StoreFailed("disk full")

        rehearse = pipeline._store.rehearse
        pipeline._store.commit = pipeline._store.rehearse = fail
        with pytest.raises(aggregator.StoreFailed):
            await pipeline.publish([plain(1)], 1)
        for _ in range(4):
            checks = [pipeline.health() for _ in range(10)]
            assert set(await asyncio.gather(*checks)) == {"disk full"}
        _, first, second, third, fourth = began_s
        assert min(second - first, third - second, fourth - third) > 0.09
        # The disk has room again, and that is not told later than it is known.
        pipeline._store.rehearse = rehearse
        assert await pipeline.health() == ""

    in_pipeline(path, body, limits={"probe_pause_s": 0.1})


def test_a_failure_while_a_probe_is_under_way_is_not_cleared_by_it(path):
    async def body(pipeline):
        probe = SlowCall(pipeline, "probe")
        gate = Gate(pipeline)
        gate.open()
        gate.failure = aggregator.StoreFailed("disk full")
        check = asyncio.ensure_future(pipeline.health())
        await probe.reached()
        # As if it had stood before the probe in the line of the writer.
        pipeline._refuse_group([], 0, gate.failure)
        pipeline._failed_records = [event(1)]
        probe.open()
        assert await check == "disk full"

    in_pipeline(path, body, limits={"health_probe_s": -1})


@pytest.mark.parametrize("name", ["erase_event", "begin_erasing", "tidy"])
def test_any_call_of_the_store_that_lasts_too_long_is_a_failure(path, name):
    async def body(pipeline):
        call = SlowCall(pipeline, name)
        pipeline.limits = pipeline.limits._replace(commit_hangs_s=0)
        asking = {
            "erase_event": lambda: pipeline.erase_event("t", "1"),
            "begin_erasing": lambda: pipeline.erase_matching("t", False, None),
        }
        task = asyncio.ensure_future(asking.get(name, one_turn)())
        await call.reached()
        await ask_until(pipeline, lambda stats: stats["health"]["status"] == "failing")
        assert "the disk hangs" in await pipeline.health()
        pipeline.limits = pipeline.limits._replace(commit_hangs_s=1000)
        call.open()
        await task
        assert await pipeline.health() == ""

    in_pipeline(path, body, limits={"tidy_interval_s": 0.01})


def test_a_commit_that_lasts_too_long_is_a_failure(path):
    async def body(pipeline):
        gate = Gate(pipeline)
        waiting = await publish_soon(pipeline, [plain(1)])
        await gate.reached()
        assert "the disk hangs" in await pipeline.health()
        gate.open()
        await waiting
        assert await pipeline.health() == ""

    in_pipeline(path, body, limits={"commit_hangs_s": -1})


def test_retention_works_without_anything_being_published(path):
    with open_store(path) as store:
        store.commit(events_of(range(1200)), NOW)

    async def body(pipeline):
        await ask_until(pipeline, lambda stats: stats["stored"] == 5)
        assert (await pipeline.stats())["unique_processed"] == 1200

    in_pipeline(path, body, limits={"tidy_interval_s": 0}, max_per_topic=5)


def test_a_wal_that_grows_is_warned_of_once(path, caplog):
    async def body(pipeline):
        rounds = []

        def note_and_count():
            rounds.append("round")
            return "it has 300 MB"

        pipeline._store.checkpoint_note = note_and_count
        await ask_until(pipeline, lambda stats: len(rounds) >= 3)

    in_pipeline(path, body, limits={"tidy_interval_s": 0})
    assert caplog.messages == ["WAL GROWS - it has 300 MB"]


def test_a_wal_that_cannot_be_emptied_is_a_failure(path, caplog):
    async def body(pipeline):
        def fail():
            raise aggregator.StoreFailed("the WAL cannot be written back: disk I/O error")

        scrub = pipeline._store.scrub
        pipeline._store.scrub = fail
        pipeline._store.scrub_is_due = True
        await ask_until(pipeline, lambda stats: stats["health"]["status"] == "failing")
        assert "disk I/O error" in await pipeline.health()
        pipeline._store.scrub = scrub
        await ask_until(pipeline, lambda stats: stats["health"]["status"] == "ok")

    in_pipeline(path, body, limits={"tidy_interval_s": 0})
    assert caplog.messages == ["WAL GROWS - the WAL cannot be written back: disk I/O error"]


def test_small_groups_are_logged_event_by_event_and_large_ones_in_a_line(path, caplog):
    caplog.set_level(logging.INFO)

    async def body(pipeline):
        await pipeline.publish([plain(1), plain(1)], 1)
        await pipeline.publish([plain(1, source="other")], 1)
        await pipeline.publish(plain_events(range(50)), 1)

    in_pipeline(path, body)
    new, repeat, conflict, dropped, group = caplog.messages
    assert new == "EVENT PROCESSED - topic: t, event_id: 1, source: s"
    assert repeat == "DUPLICATE DROPPED - topic: t, event_id: 1, source: s"
    assert conflict.startswith("CONFLICT - topic: t, event_id: 1, source: other")
    assert "seq 1" in conflict
    assert dropped == "DUPLICATE DROPPED - topic: t, event_id: 1, source: other"
    assert group == "GROUP COMMITTED - events: 50, processed: 49, duplicates dropped: 1"


def test_the_last_duplicates_are_kept_without_their_payloads(path):
    async def body(pipeline):
        large = plain(1, payload='{"x":"%s"}' % ("y" * 1_000_000))
        for _ in range(4):
            await pipeline.publish([large], 1_000_000)
        payloads = [duplicate.record.payload for duplicate in pipeline.duplicates]
        assert payloads == ["", "", ""]

    in_pipeline(path, body)


# ============================================================================
# §6  HTTP
# ============================================================================


@with_cases("raw, seen", GOOD_REQUESTS)
def test_a_good_request_is_parsed_alike_however_it_arrives(raw, seen):
    for pieces in feeds(raw):
        assert outcome(pieces) == Outcome(seen, None)


@with_cases("raw, seen", GOOD_REQUESTS)
def test_a_request_after_a_good_one_is_parsed_too(raw, seen):
    for pieces in feeds(raw + NEXT):
        assert outcome(pieces) == Outcome(seen + [NEXT_SEEN], None)


@with_cases("raw, seen", GOOD_REQUESTS)
def test_a_request_without_its_last_byte_is_awaited(raw, seen):
    assert outcome([raw[:-1]]) == Outcome(seen[:-1], None)


@with_cases("problem, raw", REFUSED_REQUESTS)
def test_a_bad_request_is_refused_alike_however_it_arrives(problem, raw):
    for pieces in feeds(raw):
        assert outcome(pieces) == Outcome([], problem)


@with_cases("problem, raw", REFUSED_REQUESTS)
def test_what_follows_a_bad_request_is_not_taken(problem, raw):
    for pieces in feeds(raw + NEXT):
        assert outcome(pieces) == Outcome([], problem)


@with_cases("problem, raw", REFUSED_REQUESTS)
def test_what_stands_before_a_bad_request_is_taken(problem, raw):
    assert outcome([NEXT + raw]) == Outcome([NEXT_SEEN], problem)
    assert outcome([NEXT, raw]) == Outcome([NEXT_SEEN], problem)


@with_cases("before, after, taken", BYTE_PLACES)
def test_every_byte_is_taken_or_refused_as_the_grammar_says(before, after, taken):
    for byte in range(256):
        raw = before + bytes([byte]) + after
        expected = None if byte in taken else "bad-request"
        assert outcome([raw]).problem == expected, byte
        assert outcome(bytes_of(raw)).problem == expected, byte


def test_every_byte_in_a_method_is_known_or_unknown_or_refused():
    for byte in range(256):
        raw = b"G" + bytes([byte]) + b"T / HTTP/1.1" + HOST_AND_END
        expected = "not-implemented" if byte in TOKEN_BYTES else "bad-request"
        if byte == ord("E"):
            expected = None
        assert outcome([raw]).problem == expected, byte
        assert outcome(bytes_of(raw)).problem == expected, byte


def test_a_parser_that_refused_must_not_be_asked_again():
    parser = aggregator.RequestParser()
    assert outcome([b"x\r\n\r\n" + NEXT], parser) == Outcome([], "bad-request")
    with pytest.raises(AssertionError):
        parser.next_request()


def test_a_closed_parser_keeps_nothing():
    parser = aggregator.RequestParser()
    assert outcome([post_request(b"Content-Length: 5", body=b"hell")], parser) == Outcome([], None)
    parser.close()
    assert not parser._buffer


def test_a_refusal_for_its_coding_says_which_codings_are_taken():
    with pytest.raises(aggregator.HTTPError) as refusal:
        head_of(post_request(b"Content-Encoding: br"))
    assert refusal.value.headers == (("Accept-Encoding", "gzip, deflate"),)


def test_a_long_trailer_section_is_refused_with_the_limit_for_all_of_it():
    parser = aggregator.RequestParser()
    parser.feed(CHUNKED_POST + LONG_TRAILER)
    with pytest.raises(aggregator.HTTPError, match="longer than 8192 bytes"):
        parser.next_request()


# ---- What a head means ------------------------------------------------------


@with_cases("target, path, query, host", TARGETS)
def test_a_target_is_split_and_then_decoded(target, path, query, host):
    head = head_of(b"GET " + target.encode() + b" HTTP/1.1" + HOST_AND_END)
    assert head.path == tuple(json.loads(path))
    assert head.query == json.loads(query)


@with_cases("target, path, query, host", TARGETS)
def test_the_host_in_a_target_outranks_the_host_field(target, path, query, host):
    head = head_of(b"GET " + target.encode() + b" HTTP/1.1" + HOST_AND_END)
    assert head.headers["host"] == host


@with_cases("host", GOOD_HOSTS)
def test_a_host_field_may_hold_whatever_names_a_host(host):
    raw = b"GET / HTTP/1.1\r\nhOST: " + host.encode() + b" \r\n\r\n"
    assert head_of(raw).headers == {"host": host}


def test_field_names_are_lower_case():
    assert head_of(get_request(b"X-Y: Z")).headers == {"host": "h", "x-y": "Z"}


def test_repeated_fields_are_joined_in_order():
    headers = head_of(get_request(b"X: 1", b"y:2", b"x: ", b"X: caf\xe9")).headers
    assert headers == {"host": "h", "x": "1, , caf\xe9", "y": "2"}


def test_the_content_type_is_lower_case_and_without_parameters():
    head = head_of(get_request(b"Content-Type: \tText/Plain \t; Charset=UTF-8"))
    assert head.content_type == "text/plain"


@with_cases("raw", KEPT_CONNECTIONS)
def test_a_connection_stays_open_after_such_a_request(raw):
    assert head_of(raw).keep_alive is True


@with_cases("raw", CLOSED_CONNECTIONS)
def test_a_connection_is_closed_after_such_a_request(raw):
    assert head_of(raw).keep_alive is False


@with_cases("head", CONTINUE_WANTED)
def test_continue_is_wanted_from_the_head_on_until_the_body_is_there(head):
    parser = aggregator.RequestParser(MAX_BODY)
    for byte in bytes_of(head[:-1]):
        outcome([byte], parser)
        assert parser.wants_continue is False
    outcome([head[-1:]], parser)
    assert parser.wants_continue is True
    body = b"5\r\nhello\r\n0\r\n\r\n" if b"chunked" in head else b"hello"
    assert outcome([body], parser) == Outcome([HELLO], None)
    assert parser.wants_continue is False


@with_cases("head", CONTINUE_NOT_WANTED)
def test_continue_is_not_wanted_unless_it_is_expected(head):
    parser = aggregator.RequestParser(MAX_BODY)
    for byte in bytes_of(head + b"hello"):
        outcome([byte], parser)
        assert parser.wants_continue is False
    assert parser.phase == "idle"


@with_cases("raw, expected", NEVER_CONTINUED)
def test_continue_is_not_wanted_without_a_body_nor_after_a_refusal(raw, expected):
    parser = aggregator.RequestParser(MAX_BODY)
    assert outcome([raw], parser) == expected
    assert parser.wants_continue is False


def test_a_request_without_a_body_expects_no_continue():
    assert head_of(get_request(EXPECT_CONTINUE)).expects_continue is False


def test_the_phase_says_what_is_awaited():
    raw = post_request(b"Content-Length: 5", body=b"hello")
    body_at = len(raw) - len(b"hello")
    parser = aggregator.RequestParser()
    assert parser.phase == "idle"
    for byte in bytes_of(raw[: body_at - 1]):
        outcome([byte], parser)
        assert parser.phase == "head"
    for byte in bytes_of(raw[body_at - 1 : -1]):
        outcome([byte], parser)
        assert parser.phase == "body"
    outcome([raw[-1:]], parser)
    assert parser.phase == "idle"


def test_equal_heads_are_parsed_once():
    assert head_of(get_request(b"A: once")) is head_of(get_request(b"A: once"))


def test_a_long_head_is_not_remembered():
    raw = get_request(b"A: " + b"x" * aggregator.MAX_KEPT_HEAD_BYTES)
    assert head_of(raw) == head_of(raw)
    assert head_of(raw) is not head_of(raw)


@pytest.mark.parametrize("size", [1000, 8000])
def test_the_remembered_heads_of_a_stranger_take_less_than_4_mb(size):
    aggregator._parse_kept_head.cache_clear()
    gc.collect()
    tracemalloc.start()
    try:
        for number in range(aggregator.HEADS_KEPT + 10):
            head_of(head_full_of_names(number, size))
        gc.collect()
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        aggregator._parse_kept_head.cache_clear()
    assert held < 4 * 1024 * 1024


# ---- Input without an end, and much of it -----------------------------------


@with_cases("start, more, kept", ENDLESS_INPUT)
def test_what_never_ends_is_refused_before_it_fills_the_memory(start, more, kept):
    parser = aggregator.RequestParser(MAX_BODY)
    parser.feed(start)
    most = 0
    with pytest.raises(aggregator.HTTPError):
        for _ in range(50_000 // len(more)):
            assert parser.next_request() is None
            most = max(most, len(parser._buffer))
            parser.feed(more)
    assert most <= kept


@with_cases("pieces_of, size", GROWING)
def test_four_times_the_input_takes_about_four_times_as_long(pieces_of, size):
    once = least_seconds(pieces_of(size))
    four_times = least_seconds(pieces_of(4 * size))
    assert four_times < 9 * once + 0.005


def test_random_bytes_are_a_request_or_unfinished_or_refused_however_they_arrive():
    seed = int(os.environ.get("FUZZ_SEED") or random.randrange(2**32))
    count = int(os.environ.get("FUZZ_REQUESTS", "40000"))
    rng = random.Random(seed)
    finished = 0
    refused = 0
    for number in range(count):
        raw = random_request(rng)
        pieces = random_pieces(rng, raw)
        hint = f"seed {seed}, number {number}, pieces {pieces}"
        whole = outcome([raw])
        split = outcome(pieces)
        assert whole.seen == split.seen, hint
        assert bool(whole.problem) == bool(split.problem), hint
        finished += bool(whole.seen)
        refused += bool(whole.problem)
    assert finished > count // 10
    assert refused > count // 10


# ---- Content codings --------------------------------------------------------


def test_a_gzip_body_may_have_as_many_members_as_the_limit():
    members = gzip.compress(b"x") * aggregator.MAX_GZIP_MEMBERS
    plain = inflated(members, "gzip", MAX_BODY)
    assert plain == b"x" * aggregator.MAX_GZIP_MEMBERS


@pytest.mark.parametrize("excess", [1, 50_000])
def test_a_gzip_body_of_more_members_than_the_limit_is_refused(excess):
    members = gzip.compress(b"x") * (aggregator.MAX_GZIP_MEMBERS + excess)
    with pytest.raises(aggregator.HTTPError, match="more than 100 members"):
        inflated(members, "gzip", 10**7)


@pytest.mark.parametrize("level", range(10))
@pytest.mark.parametrize("window", range(9, 16))
def test_deflate_is_taken_with_and_without_its_header_at_any_setting(level, window):
    noise = random.Random(level).getrandbits(8000).to_bytes(1000, "big")
    bodies = [b"", b"x", b"x" * 70_000, b'{"topic":"door"}' * 20, noise]
    for body in bodies:
        for strategy in (zlib.Z_DEFAULT_STRATEGY, zlib.Z_HUFFMAN_ONLY, zlib.Z_FIXED):
            for wbits in (window, -window):
                coded = bare_deflate(body, level, wbits, strategy)
                assert inflated(coded, "deflate", len(body)) == body


def test_a_bare_deflate_stream_is_not_taken_for_one_with_a_header():
    alike = 0
    for number in range(1000):
        body = b"%d" % number
        coded = bare_deflate(body)
        alike += int.from_bytes(coded[:2], "big") % 31 == 0
        assert inflated(coded, "deflate", 3) == body
    assert alike


def test_inflating_stops_often_enough_to_let_others_have_a_turn():
    body = empty_blocks(3_000_000)
    head = f"POST / HTTP/1.1\r\nHost: x\r\nContent-Encoding: deflate\r\nContent-Length: {len(body)}"
    parser = aggregator.RequestParser()
    parser.feed(head.encode() + b"\r\n\r\n" + body)
    turns = 0
    while True:
        request = parser.next_request()
        if request is not None:
            break
        assert parser.is_busy
        turns += 1
    assert request.body == b""
    assert turns == len(body) // aggregator.INFLATE_SLICE_BYTES
    assert not parser.is_busy
    assert parser.next_request() is None


@pytest.mark.parametrize("size", [70_000, 400_000])
def test_a_body_of_several_slices_is_inflated_whole(size):
    noise = random.Random(size).getrandbits(8 * size).to_bytes(size, "big")
    for coded in (gzip.compress(noise), gzip.compress(noise[:9]) + gzip.compress(noise[9:])):
        assert inflated(coded, "gzip", size) == noise
        with pytest.raises(aggregator.HTTPError, match="cut off"):
            inflated(coded[:-1], "gzip", size)
        with pytest.raises(aggregator.HTTPError, match="more than"):
            inflated(coded, "gzip", size - 1)
    with pytest.raises(aggregator.HTTPError, match="behind its end"):
        inflated(zlib.compress(noise) + bytes(70_000), "deflate", size)


# ---- Who may send a body ----------------------------------------------------


BODY_HEADS = {
    "large": "Content-Length: 70000",
    "chunked": "Transfer-Encoding: chunked",
    "compressed": "Content-Length: 9\r\nContent-Encoding: gzip",
    "expects 100": "Content-Length: 9\r\nExpect: 100-continue",
}


@with_cases("fields", BODY_HEADS)
def test_a_body_is_refused_as_soon_as_its_head_is_there(fields):
    def refuse(head):
        raise aggregator.HTTPError("unauthorized", f"no body for {head.path[0]}")

    parser = aggregator.RequestParser(MAX_BODY, refuse)
    parser.feed(f"POST /a HTTP/1.1\r\nHost: x\r\n{fields}\r\n\r\n".encode())
    with pytest.raises(aggregator.HTTPError, match="no body for a"):
        parser.next_request()
    assert not parser.wants_continue


def test_nobody_is_asked_about_a_small_plain_body():
    parser = aggregator.RequestParser(MAX_BODY, lambda head: 1 / 0)
    parser.feed(b"POST /a HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}")
    assert parser.next_request().body == b"{}"


def test_an_unwanted_body_may_be_short_only():
    coded = gzip.compress(bytes(aggregator.MAX_UNWANTED_BODY_BYTES + 1))
    head = f"POST /a HTTP/1.1\r\nHost: x\r\nContent-Encoding: gzip\r\nContent-Length: {len(coded)}"
    parser = aggregator.RequestParser(10**7, lambda head: False)
    parser.feed(head.encode() + b"\r\n\r\n" + coded)
    with pytest.raises(aggregator.HTTPError, match="65536"):
        parser.next_request()


def test_a_parser_that_waits_keeps_no_request():
    parser = aggregator.RequestParser(MAX_BODY)
    parser.feed(b"POST /a HTTP/1.1\r\nHost: x\r\nContent-Length: 900\r\n\r\n" + b"b" * 900)
    body = parser.next_request().body
    # The name `body`, and the argument of the call.
    assert sys.getrefcount(body) == 2


def test_a_body_in_tiny_chunks_is_refused():
    parser = aggregator.RequestParser(10**7)
    parser.feed(b"POST /a HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
    parser.feed(b"1\r\na\r\n" * 20_000)
    with pytest.raises(aggregator.HTTPError, match="chunks of the body are too small"):
        parser.next_request()


# ---- Responses --------------------------------------------------------------


@with_cases("response, options, expected", RESPONSES)
def test_a_response_has_exactly_these_bytes(response, options, expected):
    options = {"keep_alive": True, **options}
    assert aggregator.encode_response(response, DATE, **options) == expected
    # The second time, the head was remembered.
    assert aggregator.encode_response(response, DATE, **options) == expected


def test_every_problem_has_a_reason_phrase():
    for status, _title, _advice in aggregator.PROBLEMS.values():
        assert status in aggregator.REASONS


def test_the_date_is_the_one_format_of_http_for_any_instant():
    rng = random.Random(4)
    instants = [0, 0.999, 951_782_400, 2**31]
    for _ in range(500):
        instants.append(rng.uniform(0, 4e9))
    for instant in instants:
        expected = email.utils.formatdate(int(instant), usegmt=True)
        assert aggregator.http_date(instant) == expected


# ============================================================================
# §10 Reference and metrics: what the service says about itself is true
# ============================================================================


def test_the_document_has_every_route_in_order_and_nothing_else():
    assert DOCUMENT["openapi"].startswith("3.1.")
    documented = set()
    for path, methods in DOCUMENT["paths"].items():
        for method in methods:
            documented.add((method.upper(), path))
    assert documented == {(route.method, route.path) for route in aggregator.ROUTES}
    paths = [route.path for route in aggregator.ROUTES]
    assert list(DOCUMENT["paths"]) == list(dict.fromkeys(paths))


def test_every_operation_has_a_name_of_its_own():
    names = {operation_of(route)["operationId"] for route in aggregator.ROUTES}
    assert len(names) == len(aggregator.ROUTES)


def test_every_reference_in_the_document_leads_to_a_schema():
    references = references_in(DOCUMENT)
    assert len(references) > 10
    for reference in references:
        assert resolved({"$ref": reference})


@each_route
def test_an_operation_has_the_parameters_of_its_route(route):
    operation = operation_of(route)
    in_path = re.findall(r"{(\w+)}", route.path)
    assert list(parameters_of(operation, "path")) == in_path
    in_query = [field.name for field in route.query]
    assert list(parameters_of(operation, "query")) == in_query
    in_headers = [field.name for field in route.headers]
    assert list(parameters_of(operation, "header")) == in_headers


@each_route
def test_the_example_and_the_default_of_a_parameter_are_values_that_it_takes(route):
    for parameter in operation_of(route)["parameters"]:
        schema = parameter["schema"]
        [example] = schema["examples"]
        assert fits(example, schema), parameter["name"]
        assert fits(schema.get("default", example), schema), parameter["name"]


@each_route
def test_an_operation_has_the_answers_and_problems_of_its_route(route):
    responses = operation_of(route)["responses"]
    statuses = {str(answer.status) for answer in route.answers}
    for name in aggregator.ANYWHERE + route.problems:
        status = str(aggregator.PROBLEMS[name].status)
        statuses.add(status)
        assert f"`{name}`" in responses[status]["description"]
    assert set(responses) == statuses


@each_route
def test_the_example_of_a_body_is_described_by_its_schema(route):
    operation = operation_of(route)
    assert ("requestBody" in operation) == (route.method in ("POST", "PUT"))
    if "requestBody" not in operation:
        return
    for media in operation["requestBody"]["content"].values():
        schema = media["schema"]
        [example] = schema["examples"]
        simplest, *_ = schema.get("anyOf", [schema])
        assert_described(example, simplest)


def test_a_list_of_events_is_a_body_too():
    content = operation_of(route_named("publish_events"))["requestBody"]["content"]
    _, as_list, as_object = content["application/json"]["schema"]["anyOf"]
    [event] = content["application/json"]["schema"]["examples"]
    assert_described([event], as_list)
    assert_described({"events": [event]}, as_object)


def test_a_topic_to_name_an_event_has_rules_and_one_to_filter_by_has_none():
    named = operation_of(route_named("get_event"))
    assert "pattern" in parameters_of(named, "path")["topic"]["schema"]
    filtered = operation_of(route_named("list_events"))
    assert "pattern" not in parameters_of(filtered, "query")["topic"]["schema"]


OPEN_PATHS = {"/", "/health", "/docs", "/openapi.json"}


@each_route
def test_a_route_needs_the_token_unless_it_is_open(desk, route):
    is_open = route.path in OPEN_PATHS
    assert operation_of(route).get("security") == ([] if is_open else None)
    assert ("unauthorized" not in route.problems) == is_open
    desk.api.access = aggregator.Access(tokens=("s3cret",))
    answer = desk.ask(route.method, plain_target(route))
    assert (answer.status != 401) == is_open


def test_every_problem_is_said_somewhere():
    said = set(aggregator.ANYWHERE + aggregator.NOWHERE)
    for route in aggregator.ROUTES:
        said |= set(route.problems)
    assert said == set(aggregator.PROBLEMS)


def test_the_reference_has_an_anchor_for_every_problem_and_route():
    ids = DocsReader().ids
    assert len(set(ids)) == len(ids)
    assert set(aggregator.PROBLEMS) <= set(ids)
    assert {route.name for route in aggregator.ROUTES} <= set(ids)


def test_the_reference_has_one_main_part_and_a_menu_of_all_routes():
    docs = DocsReader()
    assert docs.tags.count("main") == 1
    assert docs.tags.count("nav") == 1
    assert docs.tags.count("h1") == 1
    routes = [f"{route.method} {route.path}" for route in aggregator.ROUTES]
    assert docs.menu == [*routes, "On the wire", "An event", "Problems"]


def test_the_reference_works_offline_and_behind_a_prefix():
    docs = DocsReader()
    assert set(docs.tags).isdisjoint({"script", "img", "link", "iframe", "object"})
    anchors = {"#" + anchor for anchor in docs.ids}
    assert set(docs.links) - anchors == {"./", "openapi.json"}


def test_the_reference_says_how_to_send_the_token_and_who_needs_none():
    _, _, text = DOCS.partition("<p>Token: ")
    words = docs_words(text.partition("\n")[0])
    assert "-H 'Authorization: Bearer TOKEN'" in words
    for path in OPEN_PATHS:
        assert path in words


# Hosts as the field has them, and as the commands do.
SHOWN_HOSTS = text_table("""
    a name          | nas.lan          | nas.lan
    a name and port | nas.lan:8080     | nas.lan:8080
    an address      | 192.0.2.7:80     | 192.0.2.7:80
    IPv6            | [2001:db8::7]:80 | [2001:db8::7]:80
    a quote         | a'b              | localhost:8000
    a command       | $(reboot)        | localhost:8000
    a background    | a;reboot&        | localhost:8000
    nothing         | -                | localhost:8000
""")


@with_cases("host, shown", SHOWN_HOSTS)
def test_the_commands_have_the_host_and_port_of_the_request(site, host, shown):
    answer = fetch(site.port, "GET", "/docs", headers={"Host": host.strip("-")})
    assert answer.status == 200
    page = answer.body.decode()
    commands = [example.command for example in shown_examples(page)]
    assert len(commands) > 20
    for command in commands:
        assert aggregator.shell_word(shown + "/").rstrip("/'") + "/" in command
    assert f"Host: {shown}\n" in page


def test_the_commands_of_a_service_with_tls_begin_with_https(tmp_path, certificate):
    with Program(tmp_path / "tls.db", "--tls-cert", certificate) as program:
        page = TLSClient(program.port, certificate).ask("GET", "/docs").read().decode()
        for shown in shown_examples(page):
            assert f"https://localhost:{program.port}/" in shown.command


def test_the_answers_of_the_reference_are_indented():
    answers = [each for each in shown_examples(DOCS) if each.content_type == "application/json"]
    assert len(answers) > 10
    for shown in answers:
        assert shown.received == json.dumps(json.loads(shown.received), indent=2)


# What a reader looks for, and the part of a command that shows it.
COMMANDS = text_table("""
    lines of text | Content-Type: text/plain
    gzip          | Content-Encoding: gzip
    CloudEvents   | Content-Type: application/cloudevents+json
    a webhook     | /events/hooks/shop?id=body:/id
    a live tail   | curl -N
    PUT           | -X PUT
    erase         | /events/door/42 -X DELETE
    count         | /counts?per=day
""")


@with_cases("part", COMMANDS)
def test_the_reference_has_a_command_for(part):
    assert [shown for shown in shown_examples(DOCS) if part in shown.command]


@pytest.mark.parametrize("name", aggregator.PROBLEMS)
def test_the_reference_says_what_a_problem_is_and_what_to_do(name):
    problem = aggregator.PROBLEMS[name]
    words = docs_words_of(name)
    assert str(problem.status) in words
    assert problem.title in words
    assert problem.advice.replace("`", "") in words


# The examples, sent to the program


def test_an_answer_has_the_status_and_type_of_its_example(sampled):
    for each in sampled:
        assert each.answer.status == each.declared.status, each
        assert each.answer.headers.get("Content-Type", "") == each.declared.content_type, each


def test_the_document_has_every_example(sampled):
    for each in with_content(sampled):
        assert each.media["examples"][each.declared.meaning]["value"] == each.example


def test_a_schema_describes_its_example_and_the_answer(sampled):
    for each in with_content(sampled):
        assert len(each.media["examples"]) == len(each.media["schema"]["anyOf"])
        assert_described(each.example, each.schema)
        if each.declared.content_type == "application/json":
            assert_described(each.answer.json, each.schema)


def test_an_answer_in_json_has_the_fields_of_its_example(sampled):
    for each in sampled:
        if each.declared.content_type == "application/json":
            if each.route.path == "/openapi.json":
                assert each.answer.json == DOCUMENT
            else:
                assert_same_fields(each.example, each.answer.json)


def test_an_answer_in_lines_begins_as_its_example(sampled):
    for each in sampled:
        if each.declared.content_type in ("application/x-ndjson", "text/event-stream"):
            text = each.answer.body.decode()
            first, *_ = objects_in(text)
            [example] = objects_in(each.example)
            assert_same_fields(example, first)
            before_example, _, _ = each.example.partition("{")
            assert text.startswith(before_example + "{")


def test_the_examples_tell_one_story(sampled):
    changing = {"/stats", "/openapi.json", "/"}
    for each in sampled:
        is_json = each.declared.content_type == "application/json"
        if is_json and each.route.path not in changing:
            assert settled(each.answer.json) == settled(each.example), each


@needs_curl
@pytest.mark.skipif(not shutil.which("gzip"), reason="no gzip here")
def test_every_command_of_the_reference_gets_the_answer_below_it(tmp_path):
    with Program(tmp_path / "docs.db") as program:
        page = program.ask("GET", "/docs").body.decode()
        shown = shown_examples(page)
        assert len(shown) == sum(len(route.answers) for route in aggregator.ROUTES)
        for example in shown:
            assert f"127.0.0.1:{program.port}" in example.command
            assert_as_shown(example, run_command(example))


# The problem, the operation that has it, a request for it, and its body.
REFUSALS = text_table("""
    no event      | invalid-event | publish_events | POST /publish       | []
    half an event | not-json      | publish_events | POST /publish       | {
    limit 0       | bad-parameter | list_events    | GET /events?limit=0 | -
    no such event | no-such-event | get_event      | GET /events/t/1     | -
    a control     | invalid-event | put_event      | PUT /events/t/%01   | -
""")


@with_cases("problem, name, request_line, body", REFUSALS)
def test_a_refusal_is_a_problem_of_its_operation(desk, problem, name, request_line, body):
    method, target = request_line.split()
    answer = desk.ask(method, target, body.encode())
    assert answer.problem == problem
    route = route_named(name)
    assert problem in aggregator.ANYWHERE + route.problems
    response = operation_of(route)["responses"][str(answer.status)]
    assert_described(answer.json, response["content"][PROBLEM_TYPE]["schema"])


# The schemas of fields, against what the service takes


@with_cases("text, instant", INSTANTS)
def test_the_schema_of_a_timestamp_takes_what_the_service_takes(text, instant):
    assert aggregator.parse_timestamp(text) == instant_of(instant)
    assert fits(text, SCHEMAS["timestamp"])


# Instants that an offset brings out of the years 1 to 9999 are beyond a pattern.
BEYOND_A_PATTERN = {
    "before the year 1 in UTC",
    "just before the year 1",
    "behind the year 9999 in UTC",
    "second 60 behind the last",
}


@pytest.mark.parametrize("name", sorted(set(NOT_TIMESTAMPS) - BEYOND_A_PATTERN))
def test_the_schema_of_a_timestamp_refuses_what_the_service_refuses(name):
    assert not fits(NOT_TIMESTAMPS[name], SCHEMAS["timestamp"])


@with_cases("field, value", WRONG_VALUES)
def test_the_schema_of_a_field_refuses_what_the_service_refuses(field, value):
    if not is_beyond_a_schema(field, value):
        assert not fits(value, resolved(SCHEMAS["event"]["properties"][field]))


DURATIONS = {
    "10m": True,
    "7d": True,
    "2026-01-01": True,
    "9999w": True,
    "99999d": True,
    "999999h": True,
    "99999999m": True,
    "10": False,
    "m": False,
    "1 d": False,
}


@pytest.mark.parametrize("text, taken", DURATIONS.items())
def test_the_schema_of_since_takes_instants_and_durations(desk, text, taken):
    parameters = parameters_of(operation_of(route_named("list_events")), "query")
    assert fits(text, parameters["since"]["schema"]) == taken
    assert (desk.get("/events?since=" + quote(text)).status == 200) == taken


# The metrics


def test_the_counters_of_events_are_the_numbers_of_stats(counted):
    metrics = metrics_of(counted)
    stats = counted.stats()
    assert stats["received"] == 19
    assert metrics.one("events_received_total") == 19
    assert metrics.one("events_unique_total") == 16
    assert stats["duplicate_dropped"] == 3
    assert metrics.one("events_duplicates_total") == 3
    assert metrics.one("events_conflicts_total") == 1


def test_the_metrics_of_topics_survive_hostile_names(counted):
    metrics = metrics_of(counted)
    first, second, *_ = HOSTILE_TOPICS
    assert metrics["topic_unique_total"] == dict.fromkeys(HOSTILE_TOPICS, 2.0)
    assert metrics.above_zero("topic_duplicates_total") == {first: 2, second: 1}


def test_the_metrics_count_refusals_by_problem(counted):
    metrics = metrics_of(counted)
    assert metrics.above_zero("rejected_total") == {"not-found": 1, "bad-parameter": 2}
    assert set(metrics["rejected_total"]) == set(aggregator.PROBLEMS)


def test_the_metrics_have_the_ages_of_events_at_their_repeats(counted):
    buckets = metrics_of(counted)["duplicate_delay_seconds_bucket"]
    bounds = [str(bound) for bound in aggregator.DELAY_BOUNDS_S]
    assert list(buckets) == [*bounds, "+Inf"]
    for bound, number in buckets.items():
        assert number == (0 if float(bound) < 60 else 3), bound


def test_the_metrics_of_commits_have_their_sizes_and_times(counted):
    metrics = metrics_of(counted)
    assert metrics["commit_events_bucket"]["1"] == 0
    assert metrics["commit_events_bucket"]["2"] == 8
    assert metrics.one("commit_events_count") == 9
    assert metrics.one("commit_events_sum") == 19
    assert metrics.one("commit_duration_seconds_sum") > 0
    last = counted.stats()["last_commit"]
    assert last["events"] == 3
    assert last["milliseconds"] > 0


def test_the_metrics_of_the_service_say_how_full_and_how_old_it_is(counted):
    metrics = metrics_of(counted)
    assert metrics.one("queue_events") == 0
    assert counted.stats()["current_queue_size"] == 0
    assert metrics.one("queue_limit_events") == 1000
    assert metrics.one("store_bytes") > 4096
    assert metrics.one("start_time_seconds") == NOW / 1e6
    assert metrics["build_info"] == {aggregator.__version__: 1}


def test_only_the_largest_topics_have_series_of_their_own(desk):
    many = [f"topic {number}" for number in range(aggregator.METRICS_MAX_TOPICS - 1)]
    desk.publish(sample("1", topic="small"), *samples(1, 2, 3, topic="large"))
    for topic in many:
        desk.publish(*samples(1, 2, topic=topic))
    metrics = metrics_of(desk)
    assert metrics["topic_unique_total"]["large"] == 3
    assert set(metrics["topic_unique_total"]) == {"large", *many}
    assert set(metrics["topic_duplicates_total"]) == {"large", *many}


def test_a_counter_of_events_never_falls(desk):
    def fail_to_commit(*_):
        raise aggregator.StoreFailed("the disk is full")

    desk.publish(sample("1"))
    desk.store.commit = fail_to_commit
    before = metrics_of(desk)
    assert desk.post("/publish", sample("2")).status == 503
    after = metrics_of(desk)
    assert before.one("events_received_total") == 1
    assert after.one("events_received_total") == 1
    assert after.one("commit_events_count") == 1
    assert after["rejected_total"]["store-unavailable"] == 1


def test_what_the_parser_refuses_is_counted_and_so_are_connections(site):
    [refused] = exchange(site.port, b"nonsense\r\n\r\n")
    assert refused.status == 400
    with contextlib.closing(dial(site.port)):
        metrics = Metrics(fetch(site.port, "GET", "/metrics").body.decode())
    assert metrics["rejected_total"]["bad-request"] == 1
    assert metrics.one("connections") == 2


# ============================================================================
# §11 Page
# ============================================================================

# Words of the page, and the number that stands behind them.
WITHOUT_JAVASCRIPT = text_table("""
    what was received | received | 12,345
    what was unique | unique | 10,000
    what was a duplicate | duplicates | 2,340
    what waits | in the queue | 5
    what is stored | Stored | 9,876
    how many topics there are | largest of | 31
    how large the store is | Size | 2.6
    how many the queue holds | Queue holds | 20,000
    how many numbers are missing | Missing sequence numbers | 6
    how late a duplicate was | to 2 min | 12
""")


@with_cases("label, number", WITHOUT_JAVASCRIPT)
def test_without_javascript_the_page_says(label, number):
    assert read_page().after(label) == number


def test_without_javascript_a_sentence_says_what_is_missing():
    assert "Without JavaScript" in " ".join(read_page().words)


def test_without_javascript_a_locked_page_says_that_it_is_locked():
    text = " ".join(read_page(None, locked=True).words)
    assert "wants a token, and without JavaScript" in text


def test_the_tables_of_names_end_where_nobody_reads_on():
    many = {f"topic {number}": {"unique": 1, "duplicates": 0} for number in range(99)}
    shown = read_page({**PAGE_STATS, "topics": many}).words_from("topic ")
    assert shown == list(many)[: aggregator.NAMES_SHOWN]


def test_the_histogram_of_delays_ends_with_its_last_bar():
    assert read_page().words_from("to ") == ["to 1 s", "to 1 min", "to 2 min", "to 2 h"]


def test_the_histogram_is_empty_before_the_first_duplicate():
    none = dict.fromkeys(PAGE_STATS["duplicate_delay_seconds"], 0)
    page = read_page({**PAGE_STATS, "duplicate_delay_seconds": none})
    assert page.words_from("to ") == []


def test_the_histogram_marks_where_a_known_window_ends():
    words = read_page().words
    said = "Some broker: forgets here, and 14 would be stored twice"
    assert words[words.index("to 2 min") + 2] == said


def test_what_publishers_send_is_shown_as_it_is():
    reading = read_page()
    at = reading.words.index(HOSTILE)
    assert reading.words[at : at + 3] == [HOSTILE, "3", "1"]


def test_what_publishers_send_is_never_markup():
    for tag, attributes in read_page().tags:
        assert tag != "img"
        for name in attributes:
            assert not name.startswith("on")


TURNING = "\u061c\u200e\u200f\u202a\u202e\u2066\u2069"
UNSEEN = "\0\n\x1b\x7f\x85\xad\u200b\u2028\u2060\ufeff\U000e0001\U000e0041"


@pytest.mark.parametrize("character", TURNING + UNSEEN)
def test_a_character_that_is_not_seen_or_turns_others_is_shown_by_its_number(character):
    topics = {f"a{character}b": {"unique": 1, "duplicates": 0}}
    assert f"a⟨U+{ord(character):04X}⟩b" in read_page({**PAGE_STATS, "topics": topics}).words


def test_page_and_script_show_the_same_characters_by_their_numbers():
    pattern = re.sub(r"\\U000(e00[0-9a-f]+)", r"\\u{\1}", aggregator._UNSEEN.pattern)
    assert f"/{pattern}/gu" in aggregator.PAGE_SCRIPT


@pytest.mark.parametrize("way", ["innerHTML", "outerHTML", "insertAdjacentHTML", "document.write"])
def test_the_script_makes_no_markup_of_text(way):
    assert way not in aggregator.PAGE_SCRIPT


def test_without_numbers_the_page_shows_none():
    page = aggregator.render_page(None)
    wanted = re.findall(r'data-n="[^"]+"[^>]*>(.)', page)
    assert set(wanted) == {"–"}


def test_every_address_in_the_page_is_relative():
    page = aggregator.render_page(PAGE_STATS)
    for _, attributes in Reading(page).tags:
        assert not attributes.get("href", "").startswith("/")
    addresses = re.findall(r'(?:ask|fetch)\(\s*["`](.)', page)
    assert len(addresses) > 5
    assert "/" not in addresses


def test_the_page_names_no_other_host():
    page = aggregator.render_page(PAGE_STATS)
    named = set(re.findall("[a-z]+://[^ '\"`)]*", page))
    # The name of a language, which no browser asks for.
    assert named == {"http://www.w3.org/2000/svg"}


def test_what_the_script_keeps_to_is_handed_in():
    tags = dict(read_page().tags)
    agreed = json.loads(tags["main"]["data-limits"])
    assert agreed == {"names": 12, "rows": 200, "silence_ms": 45_000}


def test_curl_gets_the_list_of_routes(desk):
    for accept in ("*/*", "application/json", "text/html-not"):
        listed = desk.get("/", "Accept: " + accept).json
        assert listed["service"] == "aggregator"
        assert listed["routes"][0].keys() == {"method", "path", "summary"}


def test_a_browser_gets_the_page(desk):
    page = desk.get("/", BROWSER)
    assert page.headers["Referrer-Policy"] == "no-referrer"
    assert "Accept" in page.headers["Vary"]
    assert page.body.decode().startswith("<!doctype html>")


def test_the_content_policy_names_style_and_script_of_the_page(desk):
    page = desk.get("/", BROWSER)
    policy = policy_of(page)
    inline = Reading(page.body.decode()).inline
    assert policy.pop("style-src") == source_hash(inline["style"])
    assert policy.pop("script-src") == source_hash(inline["script"])
    assert policy == {
        "default-src": "'none'",
        "connect-src": "'self'",
        "img-src": "data:",
        "form-action": "'none'",
        "base-uri": "'none'",
        "frame-ancestors": "'none'",
    }


def test_no_element_of_the_page_has_a_style_of_its_own():
    for _, attributes in read_page().tags:
        assert "style" not in attributes


def test_an_event_is_written_as_the_page_cuts_it(desk):
    text = '"payload":1,"processed_at":"'
    desk.publish(sample("1", payload={"x": text}, sequence=7), sample("2", payload={"y": {}}))
    for event in desk.get("/events", NDJSON).body.decode().splitlines():
        names, _, rest = event.partition(',"payload":')
        assert "payload" not in json.loads(names + "}")
        payload = re.sub(r',(?:"sequence":[^,]*,)?"processed_at":"[^"]*"\}$', "", rest)
        assert json.loads(payload) == json.loads(event)["payload"]


def test_a_cursor_says_how_far_was_looked_as_the_page_reads_it(desk):
    desk.publish(sample("1", timestamp="1969-12-31T23:59:59.5Z"), sample("2"))
    following = desk.get("/events?limit=1").json["next"]
    assert re.search("-?[0-9]+", following)[0] == "-500000"


# Limits, which the desk makes up; and what is known only after a while.
NOT_IN_STATS = {
    "limits.queue_max_size",
    "disk_free_bytes",
    "days_until_full",
    "growth_bytes_per_day.last_hour",
    "growth_bytes_per_day.last_day",
}
ONLY_WITH_A_LOG = {"node", "primary", "position", "lag_entries", "lag_seconds"}


def test_the_service_has_the_numbers_that_the_page_wants(desk):
    desk.publish(sample("1"), sample("1"))
    page = desk.get("/", BROWSER).body.decode()
    missing = set(re.findall(r'data-n="([^"]+)"[^>]*>–', page))
    with_a_log = {name for name in missing if name.startswith("log.")}
    assert with_a_log == {"log." + name for name in ONLY_WITH_A_LOG}
    assert missing - with_a_log <= NOT_IN_STATS


def test_the_page_of_a_node_shows_where_it_is_in_the_log():
    log = {"node": "<b>", "primary": "db1", "position": 1234, "lag_entries": 2, "lag_seconds": 0.5}
    page = aggregator.render_page({**PAGE_STATS, "log": log})
    assert 'data-n="log.position">1,234<' in page
    # A name is put in by the script, as text.
    assert 'data-n="log.node">–<' in page


def test_the_page_tells_how_large_the_store_is_and_becomes():
    named = set(re.findall(r'data-n="([^"]+)"', aggregator._PAGE_BODY))
    assert {"store_bytes", "bytes_per_event", "disk_free_bytes", "days_until_full"} <= named
    assert {f"growth_bytes_per_day.last_{period}" for period in ("hour", "day")} <= named


def test_with_a_token_the_page_comes_without_numbers(desk):
    desk.publish(sample("1"))
    desk.api.access = aggregator.Access(tokens=("secret",))
    page = desk.get("/", BROWSER).body.decode()
    assert page == aggregator.render_page(None, locked=True)


def test_without_javascript_the_page_says_that_the_store_cannot_be_read():
    assert "The store cannot be read" in read_page(None).words


def test_the_page_comes_even_if_the_store_cannot_be_read(desk, monkeypatch):
    async def broken(*_):
        raise aggregator.StoreFailed("disk I/O error")

    monkeypatch.setattr(desk.pipeline, "stats", broken)
    page = desk.get("/", BROWSER).body.decode()
    monkeypatch.undo()
    assert page == aggregator.render_page(None)


def test_a_browser_gets_the_page_in_gzip(desk):
    page = desk.get("/", BROWSER, "Accept-Encoding: deflate, gzip, br")
    assert page.headers["Content-Encoding"] == "gzip"
    assert "Accept-Encoding" in page.headers["Vary"]
    assert gzip.decompress(page.body) == desk.get("/", BROWSER).body


@pytest.mark.parametrize("codings", ["identity", "br", "gzip;q=0", "gzip;q=0.5", "x-gzip"])
def test_who_does_not_ask_for_gzip_gets_none(desk, codings):
    page = desk.get("/", BROWSER, "Accept-Encoding: " + codings)
    assert "Content-Encoding" not in page.headers


def test_the_page_is_light(desk):
    page = desk.get("/", BROWSER, "Accept-Encoding: gzip")
    assert len(page.body) < 20_000


# ============================================================================
# §8 API: bytes to the parser, requests to `answer`; no sockets
# ============================================================================

# Publishing

TWO = samples(1, 2)
PLAIN_TEXT = "Content-Type: text/plain"
FORM = "Content-Type: application/x-www-form-urlencoded"
JSON_IN_UTF_8 = "Content-Type: application/json; charset=utf-8"

PUBLISH_BODIES = {
    "a list": (json.dumps(TWO).encode(),),
    "an object with events": (json.dumps({"events": TWO}).encode(),),
    "an event a line": (lines(TWO),),
    "events with nothing between": (lines(TWO).replace(b"\n", b""),),
    "called a form, as curl does": (lines(TWO) + b"\r\n", FORM),
    "compressed": (gzip.compress(lines(TWO)), "Content-Encoding: gzip"),
    "a list, then an object": (lines([TWO[:1], {"events": TWO[1:]}]),),
    "indented": (json.dumps(TWO, indent=1).encode(), JSON_IN_UTF_8),
}


@with_cases("body", PUBLISH_BODIES)
def test_every_form_of_a_body_publishes_the_same_events(desk, body):
    assert desk.post("/publish", *body).json == {
        "status": "accepted",
        "accepted": 2,
        "unique": 2,
        "duplicates": 0,
        "conflicts": 0,
        "stored": True,
    }
    assert desk.post("/publish", *body).json["duplicates"] == 2
    assert desk.listed() == ["1", "2"]


def test_a_retried_text_with_an_idempotency_key_is_all_duplicates(desk):
    target = "/publish?topic=logs/web&source=nas"
    text = "first\r\n\n café 😀\n".encode()
    headers = (PLAIN_TEXT + "; charset=utf-8", "Idempotency-Key: run-7")
    assert desk.post(target, text, *headers).json["unique"] == 2
    desk.now += 10**6
    assert desk.post(target, text, *headers).json["duplicates"] == 2

    first, last = desk.events("?topic=logs/web")
    assert first["event_id"] == "run-7:1"
    assert first["payload"]["message"] == "first"
    assert first["source"] == "nas"
    assert last["event_id"] == "run-7:3"
    assert last["payload"]["message"] == " café 😀"
    assert last["source"] == "nas"


def test_text_without_topic_and_source_is_told_that_it_needs_them(desk):
    answer = desk.post("/publish", b"a log line", PLAIN_TEXT)
    assert answer.problem == "not-json"
    assert "lines of text need ?topic=NAME&source=NAME" in answer.json["detail"]
    assert "?topic=" not in desk.post("/publish", b"a log line").json["detail"]


def test_text_without_a_key_is_new_each_time(desk):
    for _ in range(2):
        counts = desk.post("/publish?topic=t&source=s", b"a\nb", PLAIN_TEXT).json
        assert counts["unique"] == 2
        assert counts["duplicates"] == 0


# The problem, the query, and the text.
NO_TEXTS = {
    "no source": ("bad-parameter", "?topic=t", b"a"),
    "no topic": ("bad-parameter", "?source=s", b"a"),
    "blank": ("invalid-event", "?topic=t&source=s", b" \n"),
}


@with_cases("problem, query, text", NO_TEXTS)
def test_a_refused_text_stores_nothing(desk, problem, query, text):
    answer = desk.post("/publish" + query, text, PLAIN_TEXT)
    assert answer.problem == problem
    assert_nothing_stored(desk)


def test_a_text_whose_ids_would_be_too_long_stores_nothing(desk):
    key = "Idempotency-Key: " + "k" * 300
    answer = desk.post("/publish?topic=t&source=s", b"a", PLAIN_TEXT, key)
    assert answer.problem == "invalid-event"
    assert_nothing_stored(desk)


NO_PUBLISH_QUERIES = text_table("""
    a topic for JSON        | ?topic=t
    wait=maybe              | ?wait=maybe
    verdicts=maybe          | ?explain=1&verdicts=maybe
    a misspelt parameter    | ?verdict=1
""")


@with_cases("query", NO_PUBLISH_QUERIES)
def test_a_publish_with_a_wrong_query_stores_nothing(desk, query):
    assert desk.post("/publish" + query, TWO).problem == "bad-parameter"
    assert_nothing_stored(desk)


NO_PUBLISH_BODIES = {
    "nothing": ("not-json", b""),
    "null": ("invalid-event", b"null"),
    "an empty list": ("invalid-event", b"[]"),
    "100,000 brackets": ("invalid-event", b"[" * 100_000),
    "half an event behind one": ("not-json", lines(TWO)[:-1]),
    "an empty object behind events": ("invalid-event", lines(TWO) + b"{}"),
    "half a character": ("invalid-event", b'{"topic":"\\ud800"}'),
}


@with_cases("problem, body", NO_PUBLISH_BODIES)
def test_a_publish_of_a_wrong_body_stores_nothing(desk, problem, body):
    assert desk.post("/publish", body).problem == problem
    assert_nothing_stored(desk)


def test_every_fault_of_a_batch_is_listed_with_its_index_and_field(desk):
    batch = [sample(), sample("", payload=[]), 5, {"topic": "t"}]
    answer = desk.post("/publish", batch)
    assert answer.status == 422
    faults = {(fault["index"], fault["field"]) for fault in answer.json["errors"]}
    nameless = {(1, "event_id"), (1, "payload")}
    bare = {(3, "event_id"), (3, "timestamp"), (3, "source"), (3, "payload")}
    assert faults == nameless | {(2, "")} | bare


def test_wait_0_answers_before_the_commit_and_says_so(desk):
    answer = desk.post("/publish?wait=0", TWO)
    assert answer.status == 202
    assert answer.json == {"status": "accepted", "accepted": 2, "stored": False}
    # The next publish is behind it in the same queue.
    assert desk.publish(sample("3"))["unique"] == 1
    assert desk.listed() == ["1", "2", "3"]


def test_verdicts_come_in_order_with_the_seq_of_the_original(desk):
    desk.publish(*samples("a", "b"))
    batch = samples("c", "b", "a", "c", "d")
    batch[2]["payload"] = {"n": 2}
    answer = desk.post("/publish?verdicts=1", batch).json
    assert answer["unique"] == 2
    assert answer["duplicates"] == 3
    assert answer["conflicts"] == 1
    verdicts = [f"{each['event_id']} {each['verdict']} {each['seq']}" for each in answer["events"]]
    assert verdicts == ["c new 3", "b duplicate 2", "a conflict 1", "c duplicate 3", "d new 4"]


def test_explain_says_where_a_key_was_found(make_desk):
    desk = make_desk(recent_ids=1, full_sync=False)
    assert found_places(desk, "a") == ["nowhere", "batch"]
    assert found_places(desk, "a") == ["recent", "recent"]
    # With one recent key, each commit moves at least one of the 256 slices.
    for number in range(300):
        desk.publish(sample(f"filler-{number}"))
    assert found_places(desk, "a") == ["seen", "seen"]


def test_explain_says_what_the_key_is_and_how_old(desk):
    desk.publish(sample("a"))
    desk.now += 2_500_000
    answer = explain(desk, sample("a", payload={}))
    [event] = answer["events"]
    assert event["verdict"] == "conflict"
    assert event["explanation"]["seconds_since_first_seen"] == 2.5
    assert event["explanation"]["key"] == aggregator.identity("t", "a").hex()
    assert answer["group"]["events"] == 1


# PUT: one event under its identity


def test_put_answers_201_then_200_and_409_for_other_content(desk):
    target = "/events/logs/web/error/42"
    assert desk.put(target, {"a": 1}).status == 201
    again = desk.put(target, b' {"a" : 1}\n')
    assert again.status == 200
    assert again.json["verdict"] == "duplicate"
    assert again.json["seq"] == 1
    conflict = desk.put(target, {"a": "secret"})
    assert conflict.status == 409
    assert b"secret" not in conflict.body
    assert b'"a"' not in conflict.body

    event = desk.get(target).json
    assert event["topic"] == "logs/web/error"
    assert event["event_id"] == "42"
    assert event["source"] == "192.0.2.7"
    assert event["payload"] == {"a": 1}
    assert event["timestamp"] == "2026-01-01T00:00:00.000000Z"


def test_put_takes_an_object_as_payload(desk):
    assert desk.put("/events/t/1", b'{"x":[1,null]}').status == 201
    assert desk.get("/events/t/1").json["payload"] == {"x": [1, None]}
    [listed] = desk.events()
    assert listed["payload"] == {"x": [1, None]}


MESSAGES = {
    "words": "door open",
    "nothing": "",
    "a list": "[1]",
    "two objects": "{}{}",
    "an object and a word": "{} x",
    "letters of many bytes": "é😀",
    "a zero byte": "a\0b",
    "a number that is none": "NaN",
}


@with_cases("text", MESSAGES)
def test_put_takes_any_other_text_as_a_message(desk, text):
    assert desk.put("/events/t/1", text.encode()).status == 201
    assert desk.get("/events/t/1").json["payload"] == {"message": text}
    [listed] = desk.events()
    assert listed["payload"] == {"message": text}


IDENTITIES = text_table("""
    an escaped slash      | t/a%2Fb                | t    | a/b
    a blank and a plus    | a%20b/c+d              | a b  | c+d
    letters of many bytes | caf%C3%A9/%F0%9F%98%80 | café | 😀
""")


@with_cases("path, topic, event_id", IDENTITIES)
def test_put_reads_the_identity_from_the_path(desk, path, topic, event_id):
    assert desk.put("/events/" + path).status == 201
    event = desk.get("/events/" + path).json
    assert event["topic"] == topic
    assert event["event_id"] == event_id
    assert event["timestamp"] == "2026-01-01T00:00:00.000000Z"
    assert event["source"] == "192.0.2.7"


def test_put_reads_the_source_from_the_query(desk):
    assert desk.put("/events/t/1?source=nas").status == 201
    assert desk.get("/events/t/1").json["source"] == "nas"


# A + in a query is a blank, so an offset's may arrive as one.
PUT_TIMESTAMPS = {
    "2026-01-01T10:00:00+02:00": "2026-01-01T08:00:00.000000Z",
    "2026-01-01T10:00:00.5%2B02:00": "2026-01-01T08:00:00.500000Z",
    "2026-01-01+10:00-0230": "2026-01-01T12:30:00.000000Z",
}


@pytest.mark.parametrize("text, instant", PUT_TIMESTAMPS.items())
def test_put_reads_the_timestamp_from_the_query(desk, text, instant):
    assert desk.put("/events/t/1?timestamp=" + text).status == 201
    assert desk.get("/events/t/1").json["timestamp"] == instant


NO_PUT = {
    "no topic": ("//1",),
    "no id": ("/t/",),
    "a zero byte": ("/t/%00",),
    "a long id": ("/t/" + "x" * 256,),
    "a timestamp that is none": ("/t/1?timestamp=now",),
    "an empty source": ("/t/1?source=",),
    "a number that is none": ("/t/1", b'{"a":NaN}'),
    "a number without end": ("/t/1", b'{"a":1e999}'),
    "half a character": ("/t/1", b'{"a":"\\udc00"}'),
    "deep nesting": ("/t/1", b'{"a":' * 200 + b"1" + b"}" * 200),
}


@with_cases("case", NO_PUT)
def test_put_refuses_what_could_not_be_read_back(desk, case):
    path, *body = case
    assert desk.put("/events" + path, *body).status == 422
    assert desk.listed() == []


# Listing

# Query: the ids that `filled` lists, in order.
LISTED = {
    "": "43710265",
    "?order=desc": "56201734",
    "?order=asc&limit=3": "437",
    "?topic=logs/a": "4026",
    "?topic=logs/*": "43710265",
    "?topic=*": "43710265",
    "?topic=log*&source=s0": "306",
    "?topic=logs/": "",
    "?topic=LOGS/*": "",
    "?topic=logs/_": "",
    "?source=s2": "25",
    "?source=s2&order=desc": "52",
    "?since=2026-01-01T01:00:00+01:00": "0265",
    "?since=2026-01-01T01:00:00%2B01:00&until=2026-01-01T00:00:01Z": "02",
    "?since=2026-01-01&until=2025-01-01": "",
    "?since=10m": "10265",
    "?since=500ms&until=0s": "1",
    "?since=7d&until=0s": "1",
    "?until=1970-01-01": "43",
    "?until=0001-01-01": "",
    "?topic=logs/b&since=1970-01-01&order=desc": "517",
}


@pytest.mark.parametrize("query, ids", LISTED.items())
def test_events_are_listed_by_instant_and_filtered(filled, query, ids):
    assert "".join(filled.listed(query)) == ids


def test_instants_are_given_back_in_utc_with_microseconds(filled):
    assert [event["timestamp"] for event in filled.events()] == [
        "0001-01-01T00:00:00.000000Z",
        "1969-12-31T23:00:00.000000Z",
        "1970-01-01T00:00:00.000000Z",
        "2025-12-31T23:59:59.999999Z",
        "2026-01-01T00:00:00.000000Z",
        "2026-01-01T00:00:00.500000Z",
        "2026-01-01T00:00:01.000000Z",
        "9999-12-31T23:59:59.999999Z",
    ]


NO_LIST = text_table("""
    a limit below zero                      | limit=-1
    a limit of zero                         | limit=0
    a limit that is too large               | limit=1001
    a limit in other digits                 | limit=%D9%A3
    a limit with a sign                     | limit=+5
    a limit with an underscore              | limit=1_0
    an empty limit                          | limit=
    an unknown order                        | order=up
    a word that is no day                   | since=tomorrow
    a number without a unit                 | since=10
    a duration with an exponent             | until=1e3s
    a week                                  | since=2026-W01-1
    an empty cursor                         | cursor=
    a word for a cursor                     | cursor=zzz
    half a cursor                           | cursor=a1
    a cursor of the other order             | cursor=d1.2
    a cursor of the other order, descending | order=desc&cursor=a1.2
    a cursor in other digits                | cursor=a%D9%A3.1
    a misspelt parameter                    | topics=t
    follow=2                                | follow=2
""")
NO_LIST["a limit of 5,000 digits"] = "limit=" + "9" * 5000
NO_LIST["a duration of 5,000 digits"] = "since=" + "9" * 5000 + "d"
NO_LIST["a cursor of 5,000 digits"] = "cursor=a" + "9" * 5000 + ".1"


@with_cases("query", NO_LIST)
def test_a_list_refuses_a_parameter_that_it_does_not_understand(filled, query):
    assert filled.get("/events?" + query).problem == "bad-parameter"


@pytest.mark.parametrize("order", ["asc", "desc"])
@pytest.mark.parametrize("filters", ["", "&source=s", "&topic=*&source=s"])
def test_a_walk_by_cursor_equals_the_whole_list_and_survives_inserts(desk, order, filters):
    # Three events share each instant, so seq decides among them.
    stamps = [f"2026-01-01T00:00:{number // 3:02d}Z" for number in range(40)]
    random.Random(1).shuffle(stamps)
    batch = [sample(str(number), timestamp=stamp) for number, stamp in enumerate(stamps)]
    desk.publish(*batch)
    whole = desk.listed("?order=" + order)
    assert len(set(whole)) == 40

    walked = []
    target = f"/events?limit=7&order={order}{filters}"
    page = desk.get(target).json
    while page["next"] is not None:
        walked += page["events"]
        for stamp in ("1969-01-01", "2026-01-01T00:00:06.5Z", "2027-01-01"):
            desk.publish(sample(f"late-{len(walked)}-{stamp}", timestamp=stamp))
        page = desk.get(target + "&cursor=" + quote(page["next"])).json
    walked += page["events"]

    ids = [event["event_id"] for event in walked]
    assert [event_id for event_id in ids if "late" not in event_id] == whole
    assert len(set(ids)) == len(ids)
    assert len(ids) > len(whole)


# Query: how many lines it lists of 2,500, and in how many pieces.
NDJSON_LISTS = {
    "": (2500, 3),
    "?limit=7": (7, 1),
    "?topic=x": (0, 0),
    "?source=s&order=desc": (2500, 3),
}


def test_ndjson_streams_all_pages_and_keeps_a_limit(make_desk):
    desk = make_desk(queue_events=2500)
    payload = {"text": "é😀\n\0"}
    desk.publish_range(2500, payload=payload)
    for query, (count, pieces) in NDJSON_LISTS.items():
        answer = desk.get("/events" + query, "Accept: text/html, application/x-ndjson;q=0.9")
        assert len(answer.rows) == count
        assert answer.body.count(b"\n") == count
        assert answer.pieces == pieces
        for row in answer.rows:
            assert row["payload"] == payload


STRANGE_TOPICS = {
    "an apostrophe": "it's",
    "quotation marks": 'say "hi"',
    "a statement of SQL": "a'; DROP TABLE processed_events; --",
    "a percent sign": "100%",
    "an underscore": "a_b",
    "only a percent sign": "%",
    "only an underscore": "_",
    "a backslash": "\\",
    "an escaped zero": "a\\u0000b",
    "letters of many bytes": "é/😀",
    "what a query cannot hold": "a b+c&d=e?f#g/../h",
    "braces": "{}",
    "a line separator": "a\u2028b",
    "a letter in two parts": "e\u0301",
    "a star": "*x",
    "empty segments": "/a//b/",
}


@with_cases("topic", STRANGE_TOPICS)
def test_a_strange_topic_is_stored_listed_and_read_like_any_other(desk, topic):
    event_id = "i'\"%_é😀"
    payload = {topic: "\0\u0001\x7f\ud83d\ude00\\"}
    desk.publish(sample(event_id, topic=topic, source=topic, payload=payload))
    for decoy in ("axb", "100x", topic + "x"):
        desk.publish(sample("decoy", topic=decoy))

    escaped = quote(topic, safe="")
    assert desk.listed(f"?topic={escaped}") == [event_id]
    assert desk.listed(f"?source={escaped}") == [event_id]
    assert desk.listed(f"?topic={escaped}*&source={escaped}") == [event_id]
    assert desk.listed(f"?topic={escaped}*") == [event_id, "decoy"]
    event = desk.get(f"/events/{quote(topic)}/{quote(event_id, safe='')}").json
    assert event["topic"] == topic
    assert event["source"] == topic
    assert event["payload"] == {topic: "\0\u0001\x7f😀\\"}
    assert desk.stats()["topics"][topic]["unique"] == 1


def test_one_event_is_read_with_all_its_fields(desk):
    desk.publish(sample("1", sequence=7, payload={"k": [1.5, None, True]}))
    assert desk.get("/events/t/1").json == {
        "seq": 1,
        "topic": "t",
        "event_id": "1",
        "timestamp": "2026-01-01T00:00:00.000000Z",
        "source": "s",
        "payload": {"k": [1.5, None, True]},
        "sequence": 7,
        "processed_at": "2026-01-01T00:00:00.000000Z",
    }


def test_one_event_is_410_after_retention_and_404_if_never_seen(make_desk):
    desk = make_desk(max_per_topic=2)
    desk.publish(sample("1"))
    desk.publish_range(2, 9)
    desk.publish(sample("9"))
    assert desk.get("/events/t/1").status == 410
    assert desk.get("/events/t/never").status == 404
    assert desk.get("/events/other/1").status == 404
    assert desk.listed() == ["8", "9"]


def test_a_repeat_of_an_event_that_retention_removed_is_a_duplicate(make_desk):
    desk = make_desk(max_per_topic=2)
    first = sample("1", sequence=7, payload={"k": [1.5, None, True]})
    desk.publish(first)
    desk.publish_range(2, 9)
    desk.publish(sample("9"))
    assert desk.get("/events/t/1").status == 410
    desk.now += 10**12
    again = desk.publish(first)
    assert again["duplicates"] == 1
    assert again["conflicts"] == 0
    stats = desk.stats()
    assert stats["unique_processed"] == 9
    assert stats["stored"] + stats["removed_by_retention"] == 9
    assert desk.listed() == ["8", "9"]


# The numbers


def test_stats_have_the_books(desk):
    publish_and_repeat_late(desk)
    stats = desk.stats()
    assert stats["received"] == 15
    assert stats["unique_processed"] == 6
    assert stats["duplicate_dropped"] == 9
    assert stats["conflicts"] == 1


def test_stats_have_topics_and_sources(desk):
    publish_and_repeat_late(desk)
    stats = desk.stats()
    assert sorted(stats["topics"]) == ["other", "t"]
    assert stats["topics"]["t"] == {"unique": 5, "duplicates": 5, "stored": 5}
    assert stats["topics"]["other"] == {"unique": 1, "duplicates": 4, "stored": 1}
    assert stats["sources"]["s0"] == {"unique": 3, "duplicates": 3}


def test_the_uptime_does_not_fall_when_the_clock_is_set_back(desk):
    desk.passed_us += 5_000_000
    desk.now -= 86_400_000_000
    assert desk.stats()["uptime_seconds"] == 5.0


def test_a_delay_is_not_negative_when_the_clock_was_set_back(desk):
    desk.publish(sample("1"))
    desk.now -= 86_400_000_000
    desk.publish(sample("1"))
    (duplicate,) = desk.get("/duplicates").json["duplicates"]
    assert duplicate["delay_seconds"] == 0.0


def test_stats_have_limits_version_uptime_and_size(desk):
    desk.passed_us += 1_420_000_000
    stats = desk.stats()
    assert stats["limits"] == {"shown": 1}
    assert stats["version"] == aggregator.__version__
    assert stats["uptime_seconds"] == 1420.0
    assert stats["store_bytes"] > 4096


def test_stats_say_what_a_window_would_have_stored_twice(desk):
    publish_and_repeat_late(desk)
    stats = desk.stats()
    assert sum(stats["duplicate_delay_seconds"].values()) == 9
    # Delays of "x": 120, 320, 720, 1,420 s. Of the others: 0, 120, 200, 400, 700 s.
    windows = {each["window_seconds"]: each["would_have_stored_twice"] for each in stats["windows"]}
    assert windows == {120: 6, 300: 5, 600: 3}


def test_the_last_duplicates_are_listed_latest_first(desk):
    desk.publish(*samples("a", "b"))
    desk.now += 1_500_000
    desk.publish(sample("a"), sample("b", payload={}))
    latest, earlier = desk.get("/duplicates").json["duplicates"]
    assert latest["event_id"] == "b"
    assert latest["verdict"] == "conflict"
    assert latest["seq"] == 2
    assert latest["delay_seconds"] == 1.5
    assert earlier["event_id"] == "a"
    assert earlier["verdict"] == "duplicate"
    assert earlier["seq"] == 1
    assert earlier["delay_seconds"] == 1.5
    assert desk.get("/duplicates?limit=1").json["count"] == 1
    assert desk.get("/duplicates?limit=0").status == 400


def test_a_source_that_left_out_numbers_is_found_out(desk):
    publish_sequences(desk, 1, 2, 5, 9)
    answer = desk.get("/gaps").json
    assert answer["count"] == 1
    [source] = answer["sources"]
    assert source == {
        "source": "s",
        "newest": 9,
        "missing_count": 5,
        "given_up": 0,
        "missing": [[3, 4], [6, 8]],
    }
    assert desk.stats()["gaps"] == 5


def test_a_gap_heals_when_the_missing_numbers_come(desk):
    publish_sequences(desk, 1, 2, 5, 9)
    publish_sequences(desk, 8, 3, 4, 6)
    [source] = desk.get("/gaps?source=s&limit=1").json["sources"]
    assert source["missing"] == [[7, 7]]
    publish_sequences(desk, 7)
    assert desk.get("/gaps").json == {"count": 0, "sources": []}
    assert desk.stats()["gaps"] == 0


# Refusing for lack of room or store


def test_health_is_ok_while_the_store_can_be_written(desk):
    answer = desk.get("/health")
    assert answer.status == 200
    assert answer.json == {"status": "ok"}


def test_a_locked_store_is_503_until_it_is_free_again(locked):
    assert locked.post("/publish", sample()).problem == "store-unavailable"
    assert locked.put("/events/t/1").problem == "store-unavailable"
    assert locked.get("/health").problem == "store-unavailable"
    locked.unlock()
    assert locked.publish(sample("2"))["unique"] == 1
    assert locked.get("/health").status == 200
    # What was refused is not on the books.
    assert locked.stats()["received"] == 1


def test_what_did_not_wait_for_a_locked_store_is_not_counted(locked):
    assert locked.post("/publish?wait=0", sample()).status == 202
    while locked.stats()["current_queue_size"]:
        pass
    # Readers do not wait for the writer.
    assert locked.listed() == []
    assert locked.stats()["received"] == 0


def test_a_batch_larger_than_the_queue_is_413(make_desk):
    answer = make_desk(queue_events=5).post("/publish", samples(*range(6)))
    assert answer.status == 413
    assert answer.problem == "batch-too-large"


def test_a_full_queue_is_503_and_takes_nothing(make_desk):
    desk = make_desk(queue_events=5)

    async def publish_three_batches():
        return await asyncio.gather(
            desk.send("POST", "/publish", samples("a1", "a2", "a3")),
            desk.send("POST", "/publish", samples("b1", "b2", "b3")),
            desk.send("POST", "/publish", samples("c1", "c2", "c3")),
        )

    taken, *refused = desk.run(publish_three_batches())
    assert taken.status == 202
    for answer in refused:
        assert answer.status == 503
        assert answer.problem == "queue-full"
        assert int(answer.headers["Retry-After"]) >= 1
    assert desk.stats()["received"] == 3
    assert desk.listed() == ["a1", "a2", "a3"]
    assert desk.publish(*samples("b1", "b2", "b3"))["unique"] == 3


# Routes

WRONG_METHODS = text_table("""
    DELETE /publish   | OPTIONS, POST
    GET /publish      | OPTIONS, POST
    HEAD /publish     | OPTIONS, POST
    POST /events      | DELETE, GET, HEAD, OPTIONS
    PUT /stats        | GET, HEAD, OPTIONS
    TRACE /           | GET, HEAD, OPTIONS
    QUERY /metrics    | GET, HEAD, OPTIONS
    PATCH /events/t/1 | DELETE, GET, HEAD, OPTIONS, POST, PUT
    GET /events/t     | OPTIONS, POST
""")


@pytest.mark.parametrize("request_line, allowed", WRONG_METHODS.items())
def test_a_wrong_method_is_405_with_what_is_allowed(desk, request_line, allowed):
    method, target = request_line.split()
    answer = desk.ask(method, target)
    assert answer.status == 405
    assert answer.headers["Allow"] == allowed
    options = desk.ask("OPTIONS", target)
    assert options.status == 204
    assert options.headers["Allow"] == allowed
    assert options.body == b""


def test_options_of_the_whole_server_lists_every_method(desk):
    assert desk.ask("OPTIONS", "*").headers["Allow"] == "DELETE, GET, HEAD, OPTIONS, POST, PUT"
    assert desk.ask("OPTIONS", "/nowhere").status == 404


MISSPELT = "/event /Publish /publish/ // /stats/x /* /publish%00"


@pytest.mark.parametrize("target", MISSPELT.split())
def test_a_misspelt_route_is_404(desk, target):
    assert desk.get(target).problem == "not-found"


@routes_by_name(lambda route: route.query)
def test_a_route_with_parameters_refuses_an_unknown_one(desk, route):
    answer = desk.ask(route.method, plain_target(route) + "?n%C3%B6=1", {})
    assert answer.problem == "bad-parameter"
    assert "\\u00f6" in answer.json["detail"]


@routes_by_name(lambda route: not route.query)
def test_a_route_without_parameters_ignores_a_query(desk, route):
    target = plain_target(route)
    plain = desk.ask(route.method, target)
    assert desk.ask(route.method, target + "?_=1").status == plain.status
    assert plain.status in (200, 404)


@routes_by_name(lambda route: route.method == "GET")
def test_head_has_the_status_of_get(desk, route):
    target = plain_target(route)
    answer = desk.ask("HEAD", target)
    assert answer.status == desk.get(target).status
    assert answer.status in (200, 404)


def test_every_problem_has_a_status_with_a_reason():
    for problem in aggregator.PROBLEMS.values():
        assert 400 <= problem.status < 600
        assert aggregator.REASONS[problem.status]
        assert problem.title
        assert problem.advice


ERRORS = text_table("""
    NotJSON       | not-json
    InvalidEvents | invalid-event
    BatchTooLarge | batch-too-large
    QueueFull     | queue-full
    Stopping      | stopping
    StoreFailed   | store-unavailable
    CursorAhead   | bad-parameter
    CursorExpired | gone
""")


@pytest.mark.parametrize("name, problem", ERRORS.items())
def test_an_error_class_names_its_problem(name, problem):
    assert getattr(aggregator, name).problem == problem
    assert problem in aggregator.PROBLEMS


def test_a_bug_is_answered_as_one_and_logged(desk, caplog):
    async def stats_with_a_bug(topics, sources):
        raise LookupError("this should not happen")

    stats = desk.pipeline.stats
    desk.pipeline.stats = stats_with_a_bug
    answer = desk.get("/stats")
    desk.pipeline.stats = stats
    assert answer.problem == "internal-error"
    assert b"should not happen" not in answer.body
    assert "should not happen" in caplog.text


# What caches and proxies are told

ANSWERS_OF_ALL_KINDS = text_table("""
    an index        | GET /
    a list          | GET /events
    a number        | GET /stats
    a document      | GET /docs
    a write         | PUT /events/t/1
    methods         | OPTIONS /events
    a refusal       | GET /events?limit=0
    a missing route | GET /nowhere
    a stream        | HEAD /events?follow=1
""")


@with_cases("request_line", ANSWERS_OF_ALL_KINDS)
def test_no_answer_may_be_stored_by_a_cache(desk, request_line):
    response = desk.run(desk.respond(*request_line.split()))
    assert fields_of(response)["Cache-Control"] == "no-store"


def test_a_refusal_by_the_server_may_not_be_stored_by_a_cache(desk):
    response = desk.api.refuse(aggregator.HTTPError("timeout", "it came too slowly"), "peer")
    assert response.status == 408
    assert fields_of(response)["Cache-Control"] == "no-store"


NEGOTIATED = {
    "a list": ("/events", "-", "application/json"),
    "lines": ("/events", NDJSON, "application/x-ndjson"),
    "a live tail": ("/events?follow=1", "-", "application/x-ndjson"),
    "a live tail for browsers": ("/events?follow=1", SSE, "text/event-stream"),
    "an index": ("/", "-", "application/json"),
    "a page": ("/", "Accept: text/html", "text/html; charset=utf-8"),
}


@with_cases("target, accept, media_type", NEGOTIATED)
def test_an_answer_that_depends_on_accept_says_so(desk, target, accept, media_type):
    response = desk.run(desk.respond("GET", target, headers=fields_in(accept)))
    assert response.content_type == media_type
    assert fields_of(response)["Vary"] == "Accept"


def test_an_answer_that_does_not_depend_on_accept_does_not_say_so(desk):
    assert "Vary" not in desk.get("/stats").headers


@pytest.mark.parametrize("accept", [NDJSON, SSE])
def test_a_live_tail_tells_a_proxy_not_to_gather_it(desk, accept):
    response = desk.run(desk.respond("GET", "/events?follow=1", headers=[accept]))
    assert fields_of(response)["X-Accel-Buffering"] == "no"


def test_a_stream_of_all_pages_tells_a_proxy_not_to_gather_it(desk):
    assert desk.get("/events", NDJSON).headers["X-Accel-Buffering"] == "no"


# Who may do what

ONE = sample("1", timestamp="2026-01-01", payload={})

# The request, what it gives for authorization, and the status of the answer.
AUTHORIZATIONS = text_table("""
    the token reads                 | GET /stats           | Bearer s3cret  | 200
    the token publishes             | POST /publish        | Bearer s3cret  | 202
    the token puts                  | PUT /events/t/2      | Bearer s3cret  | 201
    the token for reading reads     | GET /stats           | bearer r34d    | 200
    the token for reading publishes | POST /publish        | bearer r34d    | 403
    the token for reading puts      | PUT /events/t/1      | bearer r34d    | 403
    a stranger reads                | GET /stats           | -              | 401
    a stranger asks for a head      | HEAD /events         | -              | 401
    a stranger follows              | GET /events?follow=1 | -              | 401
    a stranger publishes            | POST /publish        | -              | 401
    a stranger tries a route        | GET /nothing         | -              | 401
    a stranger asks for health      | GET /health          | -              | 200
    a stranger asks for the index   | GET /                | -              | 200
    a stranger asks for methods     | OPTIONS /publish     | -              | 204
    a longer token                  | GET /stats           | Bearer s3cret2 | 401
    another scheme                  | GET /stats           | Basic s3cret   | 401
    no scheme                       | GET /stats           | s3cret         | 401
    no token                        | GET /stats           | Bearer         | 401
    a letter beyond ASCII           | GET /stats           | Bearer é       | 401
""")


@with_cases("request_line, authorization, status", AUTHORIZATIONS)
def test_with_a_token_only_its_bearer_may_publish_and_read(
    desk, request_line, authorization, status
):
    desk.api.access = aggregator.Access(tokens=("s3cret",), read_tokens=("r34d",))
    method, target = request_line.split()
    answer = desk.ask(method, target, ONE, fields_in(authorization, "Authorization: "))
    assert answer.status == int(status)
    challenge = answer.headers.get("WWW-Authenticate", "")
    assert challenge.startswith("Bearer") == (status in ("401", "403"))
    desk.api.access = aggregator.Access()
    stored = status in ("201", "202")
    assert len(desk.listed()) == stored


def test_each_of_several_tokens_is_taken(desk):
    desk.api.access = aggregator.Access(tokens=("0ld", "n3w"), read_tokens=("r34d", "r3ad"))
    assert desk.post("/publish", ONE, "Authorization: Bearer 0ld").status == 202
    assert desk.post("/publish", ONE, "Authorization: Bearer n3w").status == 202
    assert desk.post("/publish", ONE, "Authorization: Bearer r3ad").status == 403
    assert desk.get("/stats", "Authorization: Bearer r34d").status == 200
    assert desk.get("/stats", "Authorization: Bearer r3ad").status == 200


def test_a_token_that_is_given_twice_is_none(desk):
    desk.api.access = aggregator.Access(tokens=("s3cret",))
    twice = ["Authorization: Bearer s3cret"] * 2
    assert desk.get("/stats", *twice).status == 401


@pytest.mark.parametrize("origin", ["http://x", "https://X"])
def test_a_page_of_our_own_may_publish(desk, origin):
    answer = desk.post("/publish", ONE, "Origin: " + origin)
    assert answer.status == 202
    assert "Access-Control-Allow-Origin" not in answer.headers
    read = desk.get("/events", "Origin: " + origin)
    assert read.status == 200
    assert "Access-Control-Allow-Origin" not in read.headers


FOREIGN_PAGES = text_table("""
    another port                        | http://x:81           | -
    another name                        | http://evil.example   | -
    a longer name                       | http://x.evil.example | -
    no origin to speak of               | null                  | -
    another scheme than the allowed one | http://a.example      | https://a.example
""")


@with_cases("origin, allowed", FOREIGN_PAGES)
def test_a_page_of_another_site_cannot_publish_unless_it_is_allowed_to(desk, origin, allowed):
    desk.api.access = aggregator.Access(origins=frozenset([allowed]))
    answer = desk.post("/publish", ONE, "Origin: " + origin)
    assert answer.status == 403
    assert desk.listed() == []
    assert "Access-Control-Allow-Origin" not in answer.headers
    read = desk.get("/events", "Origin: " + origin)
    assert read.status == 200
    assert "Access-Control-Allow-Origin" not in read.headers


ALLOWED_PAGES = {
    "named": ("https://a.example", "https://a.example"),
    "any": ("null", "*"),
}


@with_cases("origin, allowed", ALLOWED_PAGES)
def test_a_page_that_is_allowed_to_may_publish_and_read(desk, origin, allowed):
    desk.api.access = aggregator.Access(origins=frozenset([allowed]))
    answer = desk.post("/publish", ONE, "Origin: " + origin)
    assert answer.status == 202
    assert len(desk.listed()) == 1
    assert answer.headers["Access-Control-Allow-Origin"] == origin
    assert "Origin" in answer.headers["Vary"]
    read = desk.get("/events", "Origin: " + origin)
    assert read.status == 200
    assert read.headers["Access-Control-Allow-Origin"] == origin
    assert "Accept" in read.headers["Vary"]
    assert "Origin" in read.headers["Vary"]


def test_a_browser_that_asks_before_it_sends_is_told_what_it_may(desk):
    asks = ("Origin: https://a.example", "Access-Control-Request-Method: POST")
    answer = desk.ask("OPTIONS", "/publish", headers=asks)
    assert "Access-Control-Allow-Origin" not in answer.headers
    origins = frozenset(["https://a.example"])
    desk.api.access = aggregator.Access(tokens=("s3cret",), origins=origins)
    answer = desk.ask("OPTIONS", "/publish", headers=asks)
    assert answer.status == 204
    assert answer.headers["Access-Control-Allow-Origin"] == "https://a.example"
    assert "POST" in answer.headers["Access-Control-Allow-Methods"]
    assert "Authorization" in answer.headers["Access-Control-Allow-Headers"]


OUR_NAMES = "localhost LOCALHOST:8000 127.0.0.1:1 [::1]:8000 [::1] nas.lan"
OTHER_NAMES = "evil.example evil.example:8000 localhost.evil.example [::2]:8000"
LOOPBACK = frozenset(["localhost", "127.0.0.1", "[::1]", "nas.lan"])


@pytest.mark.parametrize("host", OUR_NAMES.split())
def test_on_loopback_our_names_are_known(desk, host):
    desk.api.access = aggregator.Access(hosts=LOOPBACK)
    assert desk.get(f"http://{host}/stats").status == 200


@pytest.mark.parametrize("host", OTHER_NAMES.split())
def test_on_loopback_a_name_that_is_not_ours_is_refused(desk, host):
    desk.api.access = aggregator.Access(hosts=LOOPBACK)
    assert desk.get(f"http://{host}/stats").status == 421
    desk.api.access = aggregator.Access(hosts=frozenset(["localhost", "*"]))
    assert desk.get(f"http://{host}/stats").status == 200


# Following


def test_a_follower_gets_what_was_stored_and_what_comes_once_each_and_in_order(make_desk):
    desk = make_desk(queue_events=5000)

    async def follow_and_publish():
        seqs = []
        async for piece in desk.pieces("/events?follow=1&after=2"):
            seqs += seqs_in(piece)
            if len(seqs) == 3:
                await desk.send("POST", "/publish", samples(2, 6, 7))
            if len(seqs) == 5:
                await desk.send("POST", "/publish", samples(*range(8, 2500)))
            if len(seqs) == 2497:
                return seqs

    desk.publish_range(1, 6)
    assert desk.run(follow_and_publish()) == list(range(3, 2500))


def test_without_a_cursor_following_starts_now(desk):
    async def first_piece_after_a_publish():
        stream = desk.pieces("/events?follow=1")
        first = asyncio.ensure_future(stream.__anext__())
        await desk.until_followed_by(1)
        await desk.send("POST", "/publish", sample("new"))
        piece = await first
        await stream.aclose()
        return piece

    desk.publish(sample("old"))
    event = json.loads(desk.run(first_piece_after_a_publish()))
    assert event["event_id"] == "new"


def test_a_follower_that_is_gone_is_no_longer_counted(tmp_path):
    with Program(tmp_path / "store.db") as program:
        for _ in range(3):
            sock = dial(program.port, b"GET /events?follow=1 HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert sock.recv(1000)
            reset_on_close(sock)
            sock.close()
        assert fetch(program.port, "GET", "/stats").json["subscribers"] == 3
        # It is writing to them that finds them gone.
        for number in range(2000):
            fetch(program.port, "POST", "/publish", sample(str(number)))
            if fetch(program.port, "GET", "/stats").json["subscribers"] == 0:
                return
        pytest.fail("they are still counted")


FOLLOWED = {
    "topic=a": "14",
    "topic=a*": "124",
    "source=y": "23",
    "topic=ab&source=y": "2",
    "": "1234",
}


@pytest.mark.parametrize("query, ids", FOLLOWED.items())
def test_a_follower_sees_only_what_it_asked_for(desk, query, ids):
    desk.publish(
        sample("1", topic="a", source="x"),
        sample("2", topic="ab", source="y"),
        sample("3", topic="b", source="y"),
        sample("4", topic="a", source="x"),
    )
    piece = desk.follow_once("after=0&" + query)
    events = [json.loads(line) for line in piece.splitlines()]
    assert "".join(event["event_id"] for event in events) == ids


def test_server_sent_events_carry_the_seq_as_their_id(desk):
    desk.publish(sample("1"), sample("2", payload={"text": "line\nline\r\n\u2028"}))
    start, *events, end = desk.run(sse_blocks(desk, 3))
    assert start == "retry: 2000"
    assert end == ""
    for seq, event in enumerate(events, 1):
        id_line, data_line = event.split("\n")
        assert id_line == f"id: {seq}"
        assert data_line.startswith("data: ")
        assert json.loads(data_line[6:])["seq"] == seq


def test_last_event_id_is_nearer_than_after(desk):
    desk.publish_range(1, 4)
    _, *events, _ = desk.run(sse_blocks(desk, 3, "Last-Event-ID: 1"))
    assert [event.partition("\n")[0] for event in events] == ["id: 2", "id: 3"]


def test_a_silent_tail_says_that_it_lives(make_desk):
    desk = make_desk(keep_alive_s=0.01)
    assert desk.run(three_silent_pieces(desk)) == [b"\n"] * 3


def test_a_silent_tail_moves_the_cursor_of_a_browser(make_desk):
    desk = make_desk(keep_alive_s=0.01)
    desk.publish(*TWO)
    _, *silent = desk.run(three_silent_pieces(desk, SSE))
    assert silent == [b": keep-alive\nid: 2\n\n"] * 2


# The target, a header field, and what the detail of the refusal says.
NO_FOLLOWING = text_table("""
    from the future      | /events?follow=1&after=3     | -                | the newest is 2
    from a negative seq  | /events?follow=1&after=-1    | -                | must be a seq
    from a word          | /events?follow=1             | Last-Event-ID: x | must be a seq
    after without follow | /events?after=1              | -                | follow=1
    with a limit         | /events?follow=1&limit=5     | -                | limit
    with a cursor        | /events?follow=1&cursor=a1.1 | -                | cursor
    follow=2             | /events?follow=2             | -                | 0 or 1
""")


@with_cases("target, header, detail", NO_FOLLOWING)
def test_following_from_nowhere_is_refused(desk, target, header, detail):
    desk.publish(*TWO)
    answer = desk.get(target, *fields_in(header))
    assert answer.status == 400
    assert detail in answer.json["detail"]


def test_a_cursor_older_than_retention_is_told_what_is_gone(make_desk):
    desk = make_desk(retention_us=1_000_000)
    desk.publish_range(10)
    desk.now += 2_000_000
    desk.publish(*samples("late", "later"))
    desk.run(desk.tidy())
    answer = desk.get("/events?follow=1&after=4")
    assert answer.status == 410
    assert answer.json["oldest_seq"] == 11
    assert "after=10" in answer.json["detail"]
    assert seqs_in(desk.follow_once("after=10")) == [11, 12]


def test_a_slow_follower_that_retention_overtakes_is_ended_and_not_skipped_ahead(make_desk):
    desk = make_desk(retention_us=1_000_000, queue_events=5000)

    async def read_one_page_slowly():
        seqs = []
        async for piece in desk.pieces("/events?follow=1&after=0"):
            if not seqs:
                # While the follower holds its first page, all the rest goes.
                desk.now += 5_000_000
                await desk.tidy()
                await desk.send("POST", "/publish", sample("new"))
            seqs += seqs_in(piece)
        return seqs

    desk.publish_range(2500)
    assert desk.run(read_one_page_slowly()) == list(range(1, 1001))


def test_followers_that_wait_for_the_same_share_one_look_into_the_store(desk):
    looks = []
    look = desk.pipeline._reader.tail

    def counted_look(query, after):
        looks.append(after)
        return look(query, after)

    async def follow_fifty_times():
        streams = [desk.pieces("/events?follow=1") for _ in range(50)]
        firsts = [asyncio.ensure_future(stream.__anext__()) for stream in streams]
        await desk.until_followed_by(50)
        await desk.send("POST", "/publish", TWO)
        return await asyncio.gather(*firsts)

    desk.pipeline._reader.tail = counted_look
    first, *others = desk.run(follow_fifty_times())
    assert first.count(b"\n") == 2
    assert set(others) == {first}
    # One at the beginning, and one when the events came.
    assert len(looks) == 2


# What the log is told


HOSTILE_PATH = "%0d%0a%1b%5b31m%7f%c2%85"
REFUSED_WRITES = {
    "no JSON": ("REFUSED 400 - 192.0.2.9, POST ", "POST", "/publish", b"?"),
    "a hostile id": ("REFUSED 422 - 192.0.2.9, PUT ", "PUT", "/events/t/" + HOSTILE_PATH, b"{}"),
    "a hostile path": ("REFUSED 404 - 192.0.2.9, PATCH ", "PATCH", "/" + HOSTILE_PATH, b""),
}


@with_cases("case", REFUSED_WRITES)
def test_a_refused_write_is_logged_with_peer_and_reason(desk, caplog, case):
    beginning, *request = case
    assert desk.ask(*request, peer="192.0.2.9").status >= 400
    [record] = caplog.records
    message = record.getMessage()
    assert message.startswith(beginning)
    assert message.isascii()
    assert message.isprintable()


def test_a_refused_read_is_not_logged(desk, caplog):
    assert desk.get("/" + HOSTILE_PATH).status == 404
    assert caplog.records == []


def test_nothing_that_a_client_sends_is_answered_with_a_server_error(make_desk):
    seed = int(os.environ.get("FUZZ_SEED") or random.randrange(2**32))
    count = int(os.environ.get("FUZZ_REQUESTS", "3000"))
    strange = StrangeRequests(seed)
    desk = make_desk(full_sync=False, max_per_topic=9, retention_us=10)
    statuses = set()

    async def ask_all(requests):
        asked = [assert_no_server_error(desk, raw) for raw in requests]
        found = await asyncio.gather(*asked, return_exceptions=True)
        for raw, status in zip(requests, found):
            if isinstance(status, BaseException):
                print("seed", seed, "request", raw)
                raise status
            statuses.add(status)

    logging.disable(logging.CRITICAL)
    try:
        for _ in range(0, count, 50):
            desk.now += 1  # retention keeps the lists short
            requests = [strange.request() for _ in range(50)]
            desk.loop.run_until_complete(ask_all(requests))
    finally:
        logging.disable(logging.NOTSET)
    assert statuses >= {200, 202, 400, 404, 405, 422}
    # Whatever it stored can be read back.
    assert isinstance(desk.get("/events", NDJSON).rows, list)


# ============================================================================
# §8 Webhooks and CloudEvents: senders that were not written for us
# ============================================================================

# Text and JSON, whatever the type says


def test_text_without_topic_and_source_is_json_as_fetch_sends_it(desk):
    type_of_fetch = "Content-Type: text/plain;charset=UTF-8"
    assert desk.post("/publish", [sample("1")], type_of_fetch).json["unique"] == 1
    assert desk.post("/publish", b"no json", PLAIN_TEXT).problem == "not-json"
    assert desk.listed() == ["1"]


BODY_TEXTS = {
    "a byte that is not UTF-8": ("", b"caf\xe9 open", "caf\\xe9 open"),
    "half a character": ("", b"\xe2\x82 5", "\\xe2\\x82 5"),
    "ISO 8859-1": ("; charset=iso-8859-1", b"caf\xe9 open", "café open"),
    "in capitals and quotes": ('; charset="ISO-8859-1"', b"caf\xe9 open", "café open"),
    "UTF-8": ("; charset=utf-8", "café".encode(), "café"),
    "a byte order mark": ("", b"\xef\xbb\xbfopen", "open"),
}


@with_cases("charset, body, text", BODY_TEXTS)
def test_no_byte_of_a_line_refuses_the_other_lines(desk, charset, body, text):
    target = "/publish?topic=t&source=s"
    answer = desk.post(target, body + b"\nnext", PLAIN_TEXT + charset)
    assert answer.json["unique"] == 2
    messages = [event["payload"]["message"] for event in desk.events()]
    assert messages == [text, "next"]


@with_cases("charset, body, text", BODY_TEXTS)
def test_a_put_takes_the_same_text(desk, charset, body, text):
    assert desk.ask("PUT", "/events/t/1", body, (PLAIN_TEXT + charset,)).status == 201
    assert desk.get("/events/t/1").json["payload"] == {"message": text}


# The inbox


def test_a_repeated_delivery_is_stored_once_and_always_answered_202(desk):
    key = "Idempotency-Key: delivery-1"
    first = desk.post(HOOKS, {"n": 1}, key)
    assert first.status == 202
    assert first.json == {
        "status": "accepted",
        "accepted": 1,
        "unique": 1,
        "duplicates": 0,
        "conflicts": 0,
        "stored": True,
    }
    again = desk.post(HOOKS, {"n": 1}, key)
    assert again.status == 202
    assert again.json["duplicates"] == 1
    other = desk.post(HOOKS, {"n": 2}, key)
    assert other.status == 202
    assert other.json["conflicts"] == 1

    [event] = desk.events()
    assert event["topic"] == "hooks/shop"
    assert event["event_id"] == "delivery-1"
    assert event["source"] == "192.0.2.7"
    assert event["payload"] == {"n": 1}
    assert event["timestamp"] == "2026-01-01T00:00:00.000000Z"


DELIVERED_BODIES = {
    "an object": (b'{"a": [1]}', "", {"a": [1]}),
    "JSON that is called a form": (b'{"a": "b=c"}', FORM, {"a": "b=c"}),
    "a list": (b"[1, 2]", "", {"value": [1, 2]}),
    "a number": (b"7", "", {"value": 7}),
    "null": (b"null", "", {"value": None}),
    "a form": (b"door=front+left&n=%C3%A9", FORM, {"door": "front left", "n": "é"}),
    "a field given twice": (b"n=1&n=2&n=", FORM, {"n": ["1", "2", ""]}),
    "a form that is not called one": (b"a=1&b=2", "", {"message": "a=1&b=2"}),
    "a line that is called a form": (b"rate = 5 %", FORM, {"message": "rate = 5 %"}),
    "a word that is called a form": (b"done", FORM, {"message": "done"}),
    "too many fields": (b"&".join([b"a=b"] * 1001), FORM, {"message": "&".join(["a=b"] * 1001)}),
    "a form in another encoding": (b"n=%E9", FORM, {"n": "\\xe9"}),
    "a form that says its encoding": (b"n=%E9", FORM + "; charset=latin1", {"n": "\xe9"}),
    "a form with empty fields": (b"a=1&&b=2&", FORM, {"a": "1", "b": "2"}),
    "a form with a lone percent sign": (b"rate=5%", FORM, {"rate": "5%"}),
    "text": (b"backup done", PLAIN_TEXT, {"message": "backup done"}),
    "two values": (b"1 2", "", {"message": "1 2"}),
    "nothing": (b"", "", {"message": ""}),
    "no number": (b"NaN", "", {"message": "NaN"}),
    "a number too large": (b'{"n":1e999}', "", {"message": '{"n":1e999}'}),
    "half a character": (b'["\\ud800"]', "", {"message": '["\\ud800"]'}),
    "too many levels": (b"[" * 200 + b"]" * 200, "", {"message": "[" * 200 + "]" * 200}),
    "100,000 brackets": (b"[" * 100_000, "", {"message": "[" * 100_000}),
    "bytes": (b"\xff\x00", "", {"message": "\\xff\x00"}),
    "ISO 8859-1": (b"caf\xe9", PLAIN_TEXT + "; charset=latin1", {"message": "café"}),
}


@with_cases("body, content_type, payload", DELIVERED_BODIES)
def test_what_parses_as_json_is_json_whatever_its_type_says(desk, body, content_type, payload):
    headers = [content_type] if content_type else []
    assert deliver(desk, body, *headers, query="?id=random")["payload"] == payload


# The query, a header field, the body, and the id that they give.
DELIVERY_IDS = text_table("""
    a key              | -               | Idempotency-Key: k      | {}                  | k
    a standard webhook | -               | webhook-id: msg_1       | {}                  | msg_1
    GitHub             | -               | X-GitHub-Delivery: 72d3 | {}                  | 72d3
    a CloudEvent       | -               | ce-id: 9                | {}                  | 9
    a header field     | ?id=header:X-Id | x-id: s7                | {}                  | s7
    instead of another | ?id=body:       | webhook-id: 2           | "x"                 | x
    a member           | ?id=body:/id    | -                       | {"id": "evt_1"}     | evt_1
    a number           | ?id=body:/id    | -                       | {"id": 12345678}    | 12345678
    as it is written   | ?id=body:/id    | -                       | {"id": -1E2}        | -1E2
    far inside         | ?id=body:/a/1/b | -                       | {"a":[0,{"b":"x"}]} | x
    a slash in a name  | ?id=body:/a~1b  | -                       | {"a/b": "x"}        | x
    a tilde in a name  | ?id=body:/a~01  | -                       | {"a~1": "x"}        | x
    an empty name      | ?id=body:/      | -                       | {"": "x"}           | x
    chance             | ?id=random      | webhook-id: 2           | {}                  | random-0
""")


@with_cases("query, header, body, event_id", DELIVERY_IDS)
def test_the_id_of_a_delivery_is_where_it_is_said_to_be(desk, query, header, body, event_id):
    query = "" if query == "-" else query
    event = deliver(desk, body.encode(), *fields_in(header), query=query)
    assert event["event_id"] == event_id


def test_the_id_may_be_a_field_of_a_form(desk):
    assert deliver(desk, b"id=x&n=1", FORM, query="?id=body:/id")["event_id"] == "x"


# All that senders write and browsers do not. `?id=body:` says that it is a form.
LOOSE_FORMS = {
    "another encoding": (b"id=x&name=Ren%E9", {"name": "Ren\\xe9"}),
    "bytes as they are": (b"id=x&name=Ren\xe9", {"name": "Ren\\xe9"}),
    "UTF-8 as it is": ("id=x&name=Ren\u00e9".encode(), {"name": "Ren\u00e9"}),
    "a blank": (b"id=x&note=hello world", {"note": "hello world"}),
    "a lone percent sign": (b"id=x&note=100%", {"note": "100%"}),
    "a field without =": (b"id=x&open", {"open": ""}),
    "an empty field": (b"&id=x&&n=1&", {"n": "1"}),
}


@with_cases("body, rest", LOOSE_FORMS)
def test_no_letter_of_a_form_keeps_its_id_from_being_found(desk, body, rest):
    event = deliver(desk, body, FORM, query="?id=body:/id")
    assert event["event_id"] == "x"
    assert event["payload"] == {"id": "x", **rest}


def test_the_id_may_be_the_hash_of_the_content(desk):
    event = deliver(desk, b"{}", query="?id=content")
    assert event["event_id"] == hashlib.sha256(b"{}").hexdigest()


def test_equal_content_is_stored_once_if_the_content_is_the_id(desk):
    for body in (b'{"n":1}', b'{"n":1}', b'{"n":2}'):
        assert desk.post(HOOKS + "?id=content", body).status == 202
    assert desk.stats()["unique_processed"] == 2


def test_every_delivery_is_new_if_chance_is_the_id(desk):
    for _ in range(2):
        assert desk.post(HOOKS + "?id=random", b"{}").json["unique"] == 1


def test_a_delivery_without_an_id_is_told_all_ways_to_have_one(desk):
    answer = desk.post(HOOKS, {"n": 1})
    assert answer.problem == "bad-parameter"
    for way in (*aggregator.ID_HEADERS, "header:NAME", "body:/", "?id=content", "?id=random"):
        assert way in answer.json["detail"]
    assert_nothing_stored(desk)


NO_IDS = text_table("""
    no such place         | ?id=cookie:a
    no name               | ?id=header:
    no such header field  | ?id=header:X-None
    no such member        | ?id=body:/none
    no such item          | ?id=body:/list/2
    an index with a zero  | ?id=body:/list/01
    behind the end        | ?id=body:/list/-
    no text and no number | ?id=body:/list
    true                  | ?id=body:/true
    null                  | ?id=body:/null
    an empty text         | ?id=body:/empty
    no pointer            | ?id=body:list
    a wrong escape        | ?id=body:/a~2
    a misspelt parameter  | ?ids=random
    an unknown time       | ?id=random&time=now
    no such time          | ?id=random&time=body:/none
    a time that is none   | ?id=random&time=body:/word
    a time too far away   | ?id=random&time=body:/far
""")


@with_cases("query", NO_IDS)
def test_a_delivery_whose_id_or_time_cannot_be_found_is_refused(desk, query):
    body = {
        "list": ["a", "b"],
        "true": True,
        "null": None,
        "empty": "",
        "word": "soon",
        "far": 10**15,
    }
    answer = desk.post(HOOKS + query, body)
    assert answer.problem == "bad-parameter"
    assert_nothing_stored(desk)


DELIVERY_TIMES = text_table("""
    a standard webhook |                 | webhook-timestamp: 1767225600 | 2026-01-01T00:00:00Z
    a header field     | &time=header:At | At: 2025-12-31T23:00          | 2025-12-31T23:00:00Z
    seconds            | &time=body:/s   | -                             | 2025-12-31T23:00:00Z
    parts of a second  | &time=body:/f   | -                             | 2025-12-31T23:00:00.5Z
    milliseconds       | &time=body:/ms  | -                             | 2025-12-31T23:00:00.25Z
    text               | &time=body:/t   | -                             | 2025-12-31T22:00:00Z
""")


@with_cases("query, header, timestamp", DELIVERY_TIMES)
def test_the_time_of_a_delivery_is_where_it_is_said_to_be(desk, query, header, timestamp):
    body = {
        "s": 1767222000,
        "f": 1767222000.5,
        "ms": 1767222000250,
        "t": "2025-12-31T23:00:00+01:00",
    }
    desk.now += 5 * 10**6
    text = json.dumps(body).encode()
    event = deliver(desk, text, *fields_in(header), query="?id=random" + query)
    instant = aggregator.parse_timestamp(timestamp)
    assert event["timestamp"] == aggregator.format_timestamp(instant)


def test_long_numbers_that_are_one_double_are_two_ids(desk):
    one, other = b'{"id": 12345678901234567890.5}', b'{"id": 12345678901234567890.6}'
    for body in (one, other, one):
        assert desk.post(HOOKS + "?id=body:/id", body).status == 202
    assert desk.listed() == ["12345678901234567890.5", "12345678901234567890.6"]


NO_NUMBERS = {
    "NaN": b'{"id": NaN}',
    "infinite": b'{"id": -Infinity}',
    "too large": b'{"id": 1e999}',
    "too many digits": b'{"id": 1' + b"0" * 400 + b"}",
}


@with_cases("body", NO_NUMBERS)
def test_what_is_no_number_is_no_id(desk, body):
    assert desk.post(HOOKS + "?id=body:/id", body).problem == "bad-parameter"
    assert_nothing_stored(desk)


# Bytes of a header field, and the id that they are.
ID_BYTES = {
    "UTF-8": ("Ā€😀".encode(), "Ā€😀"),
    "ISO 8859-1": (b"caf\xe9", "café"),
}


@with_cases("raw, event_id", ID_BYTES)
@pytest.mark.parametrize("query", ["", "?id=header:Idempotency-Key"])
def test_an_id_in_a_header_field_is_utf_8_where_it_can_be(desk, raw, event_id, query):
    key = "Idempotency-Key: " + raw.decode("latin-1")
    assert deliver(desk, b"{}", key, query=query)["event_id"] == event_id


def test_the_key_of_lines_may_be_in_utf_8(desk):
    key = "Idempotency-Key: " + "€".encode().decode("latin-1")
    assert desk.post("/publish?topic=t&source=s", b"a\nb", PLAIN_TEXT, key).status == 202
    assert desk.listed() == ["€:1", "€:2"]


LARGE_BODY = b'{"a":[' + b"[]," * 250_000 + b"[]]}"


def test_a_delivery_of_too_many_values_is_kept_as_text(desk):
    event = deliver(desk, LARGE_BODY, query="?id=random")
    assert event["payload"] == {"message": LARGE_BODY.decode()}


def test_a_put_of_too_many_values_is_refused(desk):
    answer = desk.ask("PUT", "/events/t/1", LARGE_BODY, ())
    assert answer.problem == "invalid-event"
    assert "send fewer" in answer.json["errors"][0]["message"]
    assert_nothing_stored(desk)


@pytest.mark.parametrize("method, target", [("POST", HOOKS + "?id=random"), ("PUT", "/events/t/1")])
def test_a_decoded_body_is_gone_before_its_event_is_stored(desk, monkeypatch, method, target):
    monkeypatch.setattr(aggregator, "json_values", lambda text, most: [CountedPayload(n=1)])
    publish = desk.api.pipeline.publish
    left = []

    async def watching_publish(*arguments):
        left.append(CountedPayload.in_memory)
        return await publish(*arguments)

    monkeypatch.setattr(desk.api.pipeline, "publish", watching_publish)
    assert desk.ask(method, target, b"{}", ()).status in (201, 202)
    assert left == [0]


def test_a_delivery_can_name_its_source(desk):
    assert deliver(desk, b"{}", query="?id=random&source=shop")["source"] == "shop"


def test_an_invalid_delivery_lists_its_faults(desk):
    answer = desk.post("/events/%01", b"NaN", "webhook-id: " + "x" * 300)
    assert answer.problem == "invalid-event"
    assert {fault["field"] for fault in answer.json["errors"]} == {"topic", "event_id"}
    assert_nothing_stored(desk)


# Signatures

DELIVERED = b'{"order": 7}'
SIGNED = {
    "Standard Webhooks": standard_signature(SECRET, DELIVERED),
    "by the second secret": standard_signature(OTHER_SECRET, DELIVERED),
    "GitHub": hub_signature(SECRET, DELIVERED),
    "almost five minutes old": standard_signature(SECRET, DELIVERED, timestamp=NOW // 10**6 - 299),
}


@with_cases("headers", SIGNED)
def test_a_right_signature_needs_no_token(guarded, headers):
    assert guarded.post(HOOKS, DELIVERED, *headers).status == 202
    [event] = stored_events(guarded)
    assert event["payload"] == {"order": 7}


def test_one_of_several_signatures_is_enough(guarded):
    *headers, right = standard_signature(SECRET, DELIVERED)
    several = right.replace(": ", ": v1a,xyz v1,AAAA ")
    assert guarded.post(HOOKS, DELIVERED, *headers, several).status == 202


def test_a_secret_may_be_base64_without_a_prefix_or_a_text(desk):
    bare = SECRET[len("whsec_") :]
    text = "whsec_" + base64.b64encode(b"a text of ours").decode()
    desk.api.access = aggregator.Access(webhooks={"hooks/shop": (bare, "a text of ours")})
    for number, secret in enumerate((SECRET, text)):
        headers = standard_signature(secret, DELIVERED, delivery=f"msg_{number}")
        assert desk.post(HOOKS, DELIVERED, *headers).status == 202


def test_a_copy_of_a_signed_delivery_is_no_new_event(guarded):
    headers = standard_signature(SECRET, DELIVERED)
    assert guarded.post(HOOKS, DELIVERED, *headers).json["unique"] == 1
    copies = {
        "": "Idempotency-Key: another",
        "?source=192.0.2.7": "ce-id: another",
        "?time=body:/order": "X-GitHub-Delivery: another",
        "?id=header:webhook-id": "Idempotency-Key: another",
    }
    for query, header in copies.items():
        answer = guarded.post(HOOKS + query, DELIVERED, header, *headers)
        assert answer.json["duplicates"] == 1, query


@pytest.mark.parametrize("place", ["random", "content", "body:/order", "header:X-Id"])
def test_a_signed_delivery_may_not_say_its_id_where_it_is_not_signed(guarded, place):
    headers = standard_signature(SECRET, DELIVERED)
    answer = guarded.post(f"{HOOKS}?id={place}", DELIVERED, "X-Id: 7", *headers)
    assert answer.problem == "bad-parameter"
    assert "leave out ?id=" in answer.json["detail"]
    assert stored_events(guarded) == []


def test_a_hub_signature_leaves_the_place_of_the_id_open(guarded):
    headers = hub_signature(SECRET, DELIVERED)
    assert guarded.post(HOOKS + "?id=body:/order", DELIVERED, *headers).status == 202
    assert [event["event_id"] for event in stored_events(guarded)] == ["7"]


# A secret, and how many keys it may stand for.
KEYS_OF_SECRETS = {
    "a word": ("abcd", 1),
    "letters that are base64": ("abcdefghijklmnopqrstuvwx", 2),
    "base64 with blanks": ("abcdefghij klmnopqrstuvwx", 1),
    "whsec": (SECRET, 1),
    "whsec, too short": ("whsec_YWJjZA==", 0),
    "whsec, no base64": ("whsec_" + "a-b_" * 8, 0),
    "whsec, cut": (SECRET[:-1], 0),
    "whsec, too many signs": (SECRET + "====", 0),
}


@with_cases("secret, count", KEYS_OF_SECRETS)
def test_only_exact_base64_of_16_bytes_is_a_key(secret, count):
    keys = aggregator.standard_keys(secret)
    assert len(keys) == count
    if not secret.startswith("whsec_"):
        assert keys[0] == secret.encode()


WRONG_SIGNATURES = {
    "none": [],
    "an empty one": ["webhook-id: 1", "webhook-timestamp: 1767225600", "webhook-signature: "],
    "another secret": standard_signature("whsec_" + SECRET[10:] + "AA==", DELIVERED),
    "another body": standard_signature(SECRET, DELIVERED + b" "),
    "another version": standard_signature(SECRET, DELIVERED, version="v2"),
    "another id": [*standard_signature(SECRET, DELIVERED)[1:], "webhook-id: msg_2"],
    "no id": standard_signature(SECRET, DELIVERED)[1:],
    "no time": standard_signature(SECRET, DELIVERED)[::2],
    "too old": standard_signature(SECRET, DELIVERED, timestamp=NOW // 10**6 - 301),
    "too new": standard_signature(SECRET, DELIVERED, timestamp=NOW // 10**6 + 301),
    "a time that is none": standard_signature(SECRET, DELIVERED, timestamp="+1"),
    "GitHub, another secret": hub_signature("x", DELIVERED),
    "GitHub, SHA-1": ["X-Hub-Signature-256: sha1=00"],
    "bytes": ["X-Hub-Signature-256: \xff", "webhook-id: 1"],
    "a wrong token": ["Authorization: Bearer x"],
    "a wrong one beside a right one": [
        *hub_signature(SECRET, DELIVERED),
        *standard_signature(SECRET, b""),
    ],
}


@with_cases("headers", WRONG_SIGNATURES)
def test_a_wrong_signature_is_401_and_stored_nowhere(guarded, headers):
    answer = guarded.post(HOOKS, DELIVERED, *headers)
    assert answer.problem == "unauthorized"
    assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert stored_events(guarded) == []


def test_a_signature_is_for_its_topic_and_route_only(guarded):
    headers = standard_signature(SECRET, DELIVERED)
    assert guarded.post("/events/other", DELIVERED, *headers).status == 401
    assert guarded.post("/publish", DELIVERED, *headers).status == 401
    assert guarded.ask("PUT", HOOKS + "/1", DELIVERED, headers).status == 401
    assert guarded.ask("GET", "/events?topic=hooks/shop", b"", headers).status == 401


def test_the_token_still_opens_an_inbox_with_a_secret(guarded):
    token = "Authorization: Bearer s3cret"
    assert guarded.post(HOOKS + "?id=random", DELIVERED, token).status == 202


def test_a_secret_closes_an_inbox_also_where_no_token_is_needed(desk):
    desk.api.access = aggregator.Access(webhooks={"hooks/shop": (SECRET,)})
    assert desk.post(HOOKS + "?id=random", DELIVERED).status == 401
    assert desk.post("/events/other?id=random", DELIVERED).status == 202


def test_the_tolerance_of_the_clock_can_be_set_and_switched_off(guarded):
    old = standard_signature(SECRET, DELIVERED, timestamp=1)
    access = guarded.api.access
    for tolerance_us, status in ((10**12, 401), (0, 202)):
        guarded.api.access = access._replace(webhook_tolerance_us=tolerance_us)
        assert guarded.post(HOOKS, DELIVERED, *old).status == status


def test_a_sender_that_signs_wrongly_is_logged_once_until_it_signs_rightly(guarded, caplog):
    caplog.set_level(logging.WARNING)
    wrong = hub_signature("x", DELIVERED)
    for _ in range(3):
        guarded.post(HOOKS, DELIVERED, *wrong)
    assert caplog.text.count("REFUSED 401") == 1
    guarded.ask("POST", HOOKS, DELIVERED, wrong, peer="192.0.2.8")
    assert caplog.text.count("REFUSED 401") == 2
    guarded.post(HOOKS, DELIVERED, *hub_signature(SECRET, DELIVERED))
    guarded.post(HOOKS, DELIVERED, *wrong)
    assert caplog.text.count("REFUSED 401") == 3


def test_those_who_sign_wrongly_do_not_fill_the_memory(guarded):
    for number in range(aggregator.MAX_WRONG_SIGNERS + 2):
        guarded.ask("POST", HOOKS, DELIVERED, hub_signature("x", DELIVERED), peer=str(number))
    assert len(guarded.api.wrong_signers) == 2


# CloudEvents


def test_a_structured_cloud_event_is_stored_without_loss(desk):
    assert desk.post("/publish", CLOUD_EVENT, STRUCTURED).json["unique"] == 1
    assert desk.post("/publish", CLOUD_EVENT, STRUCTURED).json["duplicates"] == 1
    [event] = desk.events()
    assert event["topic"] == "com.example.someevent"
    assert event["event_id"] == "https://example.com/storage/tenant A234-1234-1234"
    assert event["source"] == "https://example.com/storage/tenant"
    assert event["timestamp"] == "2018-04-05T17:31:00.000000Z"
    assert given_back(event) == {**CLOUD_EVENT, "time": "2018-04-05T17:31:00.000000Z"}


def test_the_topic_of_a_cloud_event_can_be_chosen_and_its_type_is_kept(desk):
    desk.post("/publish?topic=inbox", CLOUD_EVENT, STRUCTURED)
    [event] = desk.events()
    assert event["topic"] == "inbox"
    assert event["payload"]["type"] == "com.example.someevent"


def test_the_same_id_of_another_source_is_another_event(desk):
    other = {**CLOUD_EVENT, "source": "/other"}
    answer = desk.post("/publish", [CLOUD_EVENT, other, CLOUD_EVENT], BATCHED)
    assert answer.json["unique"] == 2
    assert answer.json["duplicates"] == 1


def test_an_empty_batch_is_taken(desk):
    # JSON format §4.3: it is valid in a request.
    answer = desk.post("/publish?verdicts=1", b"[]", BATCHED)
    assert answer.status == 202
    assert answer.json["accepted"] == 0
    assert answer.json["events"] == []


def test_a_cloud_event_that_is_not_called_one_is_told_how(desk):
    answer = desk.post("/publish", CLOUD_EVENT, "Content-Type: application/json")
    assert answer.problem == "invalid-event"
    assert "Content-Type: application/cloudevents+json" in answer.json["detail"]


CLOUD_EVENT_TIMES = text_table("""
    2026-01-01T00:00:00Z             | -
    2026-01-01T00:00:00.123456Z      | -
    2026-01-01T00:00:00.5Z           | -
    2016-12-31T23:59:60Z             | 2016-12-31T23:59:60Z
    2016-12-31T23:59:60.250Z         | 2016-12-31T23:59:60.250Z
    2026-01-01T00:00:00.123456789Z   | 2026-01-01T00:00:00.123456789Z
    2026-01-01T02:00:00+02:00        | 2026-01-01T02:00:00+02:00
""")


@pytest.mark.parametrize("text, kept", CLOUD_EVENT_TIMES.items())
def test_a_time_is_kept_as_it_was_unless_the_timestamp_says_all_of_it(desk, text, kept):
    desk.post("/publish", {**CLOUD_EVENT, "time": text}, STRUCTURED)
    [event] = desk.events()
    assert event["payload"].get("time", "-") == kept


def test_a_cloud_event_without_a_time_happens_now(desk):
    desk.post("/publish", b"", *binary_fields())
    [event] = desk.events()
    assert event["timestamp"] == "2026-01-01T00:00:00.000000Z"
    assert event["payload"] == {"specversion": "1.0"}


BINARY_DATA = {
    "JSON": ("application/json", b'{"n": 1}', {"data": {"n": 1}}),
    "a JSON format": ("application/geo+json", b"[1]", {"data": [1]}),
    "JSON, a text": ("application/json", b'"7"', {"data": "7"}),
    "text": ("text/plain", b"7", {"data": "7"}),
    "XML": ("application/xml", b"<a/>", {"data": "<a/>"}),
    "bytes": ("image/png", b"\xff\x00", {"data_base64": "/wA="}),
    "nothing": ("text/plain", b"", {}),
}


@with_cases("content_type, body, members", BINARY_DATA)
def test_a_binary_cloud_event_becomes_its_json_format(desk, content_type, body, members):
    fields = binary_fields(subject="a%20b%E2%82%AC 5%", ext='"q"', old="caf\xe9")
    desk.post("/publish", body, *fields, "Content-Type: " + content_type)
    [event] = desk.events()
    assert event["topic"] == "opened"
    assert event["event_id"] == "/door 1"
    attributes = {"specversion": "1.0", "subject": "a b€ 5%", "ext": "q", "old": "café"}
    assert event["payload"] == {**attributes, "datacontenttype": content_type, **members}


# The problem, the field at fault, and the header fields or the body.
NO_CLOUD_EVENTS = {
    "no id": ("invalid-event", "id", binary_fields(id=None), b""),
    "no source": ("invalid-event", "source", binary_fields(source=None), b""),
    "no type": ("invalid-event", "type", binary_fields(type=None), b""),
    "an empty id": ("invalid-event", "id", binary_fields(id=""), b""),
    "an old version": ("invalid-event", "specversion", binary_fields(specversion="0.3"), b""),
    "a source with a blank": ("invalid-event", "source", binary_fields(source="a b"), b""),
    "a strange time": ("invalid-event", "time", binary_fields(time="noon"), b""),
    "an id too long": ("invalid-event", "event_id", binary_fields(id="x" * 260), b""),
    "a list": ("invalid-event", "", [STRUCTURED], b"[1]"),
    "a batch of one number": ("invalid-event", "", [BATCHED], b"[1]"),
    "two data": ("invalid-event", "data", [STRUCTURED], {"data": 1, "data_base64": ""}),
    "a number as id": ("invalid-event", "id", [STRUCTURED], {"id": 1}),
    "a number as time": ("invalid-event", "time", [STRUCTURED], {"time": 1}),
    "no JSON": ("not-json", "", [STRUCTURED], b"<a/>"),
    "two values": ("not-json", "", [STRUCTURED], b"{}{}"),
    "another format": ("not-json", "", ["Content-Type: application/cloudevents+avro"], b"x"),
    "data that are no JSON": (
        "not-json",
        "",
        [*binary_fields(), "Content-Type: application/json"],
        b"{",
    ),
}


@with_cases("problem, field, headers, body", NO_CLOUD_EVENTS)
def test_what_is_no_cloud_event_is_told_why_and_stored_nowhere(desk, problem, field, headers, body):
    if isinstance(body, dict):
        body = {**CLOUD_EVENT, **body}
    answer = desk.post("/publish", body, *headers)
    assert answer.problem == problem
    if problem == "invalid-event":
        assert field in {fault["field"] for fault in answer.json["errors"]}
    assert_nothing_stored(desk)


def test_a_batch_of_cloud_events_is_taken_whole_or_not_at_all(make_desk):
    desk = make_desk(queue_events=2)
    wrong = {**CLOUD_EVENT, "id": ""}
    answer = desk.post("/publish", [CLOUD_EVENT, wrong], BATCHED)
    assert [fault["index"] for fault in answer.json["errors"]] == [1]
    answer = desk.post("/publish", [CLOUD_EVENT] * 3, BATCHED)
    assert answer.problem == "batch-too-large"
    assert desk.post("/publish?source=s", CLOUD_EVENT, STRUCTURED).problem == "bad-parameter"
    assert_nothing_stored(desk)


# Behind a proxy, and for a page of another site

PROBLEM_LINKS = text_table("""
    GET /nowhere              | docs#not-found
    GET /events/a/b           | ../../docs#no-such-event
    GET /events/a/b/c%2Fd     | ../../../docs#no-such-event
    GET /events?limit=0       | docs#bad-parameter
    OPTIONS /a/b              | ../docs#not-found
""")


@pytest.mark.parametrize("request_line, link", PROBLEM_LINKS.items())
def test_the_link_to_a_problem_is_relative_to_the_request(desk, request_line, link):
    assert desk.ask(*request_line.split()).json["type"] == link


def test_the_document_is_right_behind_any_prefix():
    assert DOCUMENT["servers"] == [{"url": "."}]


def test_a_page_may_send_compressed_bodies(desk):
    answer = desk.ask(
        "OPTIONS", "/publish", headers=["Origin: https://a", "Access-Control-Request-Method: POST"]
    )
    assert "Content-Encoding" in answer.headers["Access-Control-Allow-Headers"]


ORIGIN = b"Host: x\r\nOrigin: https://app.example.org\r\n"
# Requests that the parser refuses, and how the link of the problem begins.
REFUSED_BY_THE_PARSER = {
    "another coding": (b"POST /publish HTTP/1.1\r\nContent-Encoding: br\r\n", "docs#"),
    "no length": (b"PUT /events/t/1 HTTP/1.1\r\nContent-Length: x\r\n", "../../docs#"),
    "a body too large": (b"POST /a/b HTTP/1.1\r\nContent-Length: 9999999\r\n", "../docs#"),
    "a strange expectation": (b"POST /publish HTTP/1.1\r\nExpect: x\r\n", "docs#"),
    "a chunk without a size": (
        b"POST /publish HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n",
        "docs#",
    ),
    "a parameter given twice": (b"GET /events/t/1?a=1&a=2 HTTP/1.1\r\n", "../../docs#"),
    "a query of half characters": (b"GET /a/b?a=100% HTTP/1.1\r\n", "../docs#"),
    "a target too long": (b"GET /events?contains=" + b"x" * 9000 + b" HTTP/1.1\r\n", "docs#"),
    "a field too long": (b"GET /events HTTP/1.1\r\nCookie: " + b"x" * 33_000 + b"\r\n", "docs#"),
    "a field with a control character": (b"GET /events HTTP/1.1\r\nA: \x01\r\n", "docs#"),
    "another version": (b"GET /events HTTP/2.0\r\n", "docs#"),
}


@with_cases("head, link", REFUSED_BY_THE_PARSER)
def test_a_page_may_read_also_why_the_parser_refused(desk, head, link):
    desk.api.access = aggregator.Access(origins=frozenset(["https://app.example.org"]))
    line, _, rest = head.partition(b"\r\n")
    parser = aggregator.RequestParser()
    parser.feed(line + b"\r\n" + ORIGIN + rest + b"\r\n")
    with pytest.raises(aggregator.HTTPError) as caught:
        parser.next_request()
        parser.feed(b"x\r\n\r\n")
        parser.next_request()
    error = caught.value
    if parser.head is not None:
        error.name_request(parser.head.path, parser.head.headers)
    response = desk.api.refuse(error, "peer")
    assert fields_of(response)["Access-Control-Allow-Origin"] == "https://app.example.org"
    assert json.loads(response.body)["type"].startswith(link)


OTHER_PROTOCOLS = {
    "TLS": (bytes.fromhex("16030100f1010000ed0303"), "--tls-cert"),
    "PROXY": (b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\nGET / HTTP/1.1\r\n\r\n", "send-proxy"),
    "PROXY, version 2": (bytes.fromhex("0d0a0d0a000d0a515549540a2111000c"), "send-proxy-v2"),
}


@with_cases("first_bytes, advice", OTHER_PROTOCOLS)
def test_another_protocol_is_told_what_to_do(first_bytes, advice):
    parser = aggregator.RequestParser()
    parser.feed(first_bytes)
    with pytest.raises(aggregator.HTTPError, match=advice):
        parser.next_request()


# The program


def test_the_program_takes_secrets_and_the_tolerance_from_flags_and_environment(tmp_path):
    flags = ("--token", "s3cret", "--webhook-tolerance", "0")
    environment = {"WEBHOOK_SECRET": f"hooks/shop={SECRET}  other=text"}
    old = dict(line.split(": ") for line in standard_signature(SECRET, DELIVERED, timestamp=1))
    with Program(tmp_path / "store.db", *flags, env=environment) as program:
        assert program.ask("POST", HOOKS, DELIVERED, **old).status == 202
        assert program.ask("POST", "/events/other", DELIVERED, **old).status == 401


NO_SECRETS = text_table("""
    no topic           | =secret   | topic
    no secret          | topic=    | topic=secret
    a word             | secret    | topic=secret
    no base64          | t=whsec_a | base64
    a topic of control | \x01=secret | topic
""")


@with_cases("text, reason", NO_SECRETS)
def test_a_secret_in_no_form_is_refused_and_not_shown(text, reason):
    with pytest.raises(ValueError, match=reason) as caught:
        aggregator.read_webhook_secrets(text)
    assert "whsec_a" not in str(caught.value)


def test_a_variable_with_secrets_is_not_empty_by_mistake(tmp_path):
    found = run("--db", str(tmp_path / "store.db"), WEBHOOK_SECRET="")
    assert_refused(found, 2, "WEBHOOK_SECRET must not be empty")


def test_a_page_may_read_also_that_its_body_is_too_large(tmp_path):
    origin = "https://app.example.org"
    with Program(tmp_path / "store.db", "--allow-origin", origin) as program:
        connection = http.client.HTTPConnection("127.0.0.1", program.port, timeout=5)
        connection.putrequest("PUT", "/events/t/1")
        connection.putheader("Origin", origin)
        connection.putheader("Content-Length", "9999999")
        connection.endheaders()
        response = connection.getresponse()
        assert response.status == 413
        assert response.getheader("Access-Control-Allow-Origin") == origin
        assert json.loads(response.read())["type"] == "../../docs#too-large"


def test_plain_http_at_the_tls_port_is_told_to_use_https(tmp_path, certificate):
    methods = ("GET", "POST", "DELETE", "OPTIONS")
    with Program(tmp_path / "store.db", "--tls-cert", certificate) as program:
        for method in methods:
            connection = http.client.HTTPConnection("localhost", program.port, timeout=5)
            with contextlib.closing(connection):
                connection.request(method, "/events/t/1")
                response = connection.getresponse()
                assert response.status == 400
                assert "https://" in json.loads(response.read())["detail"]
        assert TLSClient(program.port, certificate).ask("GET", "/health").status == 200
        program.end()
    assert program.read_log().count("PLAIN HTTP") == len(methods)


def test_a_proxy_header_at_the_tls_port_is_logged(tmp_path, certificate):
    beginnings = [first_bytes for first_bytes, _ in OTHER_PROTOCOLS.values()]
    with Program(tmp_path / "store.db", "--tls-cert", certificate) as program:
        for first_bytes in beginnings[1:]:
            assert exchange(program.port, first_bytes) == []
        assert TLSClient(program.port, certificate).ask("GET", "/health").status == 200
        program.end()
    assert program.read_log().count("PROXY HEADER") == 2


def test_tls_1_2_has_no_suites_with_cbc():
    ssl = pytest.importorskip("ssl")
    for suite in aggregator.make_tls_context(ssl).get_ciphers():
        assert re.search("GCM|CHACHA20|CCM", suite["name"]), suite["name"]


# ============================================================================
# §8, removing and counting; and what else an operator does
# ============================================================================

# Erasing


@pytest.mark.parametrize("padding", [0, 900, 30_000])
@pytest.mark.parametrize("list_rows", [1, 4096])
def test_erased_text_is_in_no_file_of_the_store(tmp_path, padding, list_rows):
    path = tmp_path / "s.db"
    with open_store(path, list_rows=list_rows) as store:
        store.commit([*events_of(range(50)), secret_record("x", padding=padding)], NOW)
        store.commit(events_of(range(50, 100)), NOW)
        assert files_with(tmp_path, PASSWORD) != []
        assert store.erase_event("t", "x") == 1
        store.scrub()
        assert not store.scrub_is_due
        assert files_with(tmp_path, PASSWORD) == []
    assert contradictions(path) == []


def test_an_erased_text_is_gone_when_the_answer_comes(desk, tmp_path):
    desk.publish(sample("1", payload={"password": PASSWORD}))
    assert files_with(tmp_path, PASSWORD) != []
    answer = desk.ask("DELETE", "/events/t/1")
    assert answer.status == 204
    assert answer.body == b""
    assert files_with(tmp_path, PASSWORD) == []


def test_the_text_of_many_erased_events_is_in_no_file(tmp_path):
    path = tmp_path / "s.db"
    with open_store(path, trim_rows=50, list_rows=100, recent_ids=256) as store:
        for start in range(0, 2000, 100):
            numbers = range(start, start + 100)
            store.commit([secret_record(f"s{number}", "secret", 50) for number in numbers], NOW)
            store.commit(events_of(numbers, topic="kept"), NOW)
        *_, erased = erase_all(store, {**WHOLE_TOPIC, "topic": "secret"})
        assert erased == 2000
        store.scrub()
        assert files_with(tmp_path, PASSWORD) == []
    assert contradictions(path) == []


def test_the_text_of_what_retention_removed_is_in_no_file_either(tmp_path):
    with open_store(tmp_path / "s.db", max_per_topic=1) as store:
        store.commit([secret_record("1", timestamp=NOW)], NOW)
        store.commit([event("2", timestamp=NOW + 1)], NOW)
        retain(store, NOW)
        store.scrub()
        assert files_with(tmp_path, PASSWORD) == []


def test_text_that_a_killed_process_had_erased_goes_after_the_next_start(tmp_path):
    path = tmp_path / "s.db"
    dead = tmp_path / "dead"
    dead.mkdir()
    with open_store(path) as store:
        store.commit([secret_record()], NOW)
        store.erase_event("t", "1")
        # A process that is killed leaves just these files.
        for ending in ("", "-wal"):
            shutil.copy(f"{path}{ending}", f"{dead}/s.db{ending}")
    assert files_with(dead, PASSWORD) != []
    with open_store(dead / "s.db") as store:
        assert store.scrub_is_due
        store.scrub()
        assert files_with(dead, PASSWORD) == []


def test_a_repeat_of_an_erased_event_is_a_duplicate(desk):
    desk.publish(sample("1"))
    desk.ask("DELETE", "/events/t/1")
    assert desk.publish(sample("1"))["duplicates"] == 1
    assert desk.publish(sample("1", source="other"))["conflicts"] == 1


def test_an_erased_event_is_answered_with_gone(desk):
    desk.publish(sample("1"))
    desk.ask("DELETE", "/events/t/1")
    assert desk.get("/events/t/1").problem == "gone"
    assert desk.ask("DELETE", "/events/t/1").problem == "gone"


def test_an_event_that_never_was_cannot_be_erased(desk):
    assert desk.ask("DELETE", "/events/t/1").problem == "no-such-event"


def test_an_event_with_slashes_in_its_name_can_be_erased(desk):
    desk.publish(sample("a/b", topic="logs/café"))
    assert desk.ask("DELETE", "/events/logs/caf%C3%A9/a%2Fb").status == 204
    assert desk.listed() == []


def test_no_list_and_no_follower_shows_an_erased_event(desk):
    desk.publish_range(5)
    desk.ask("DELETE", "/events/t/2")
    assert desk.listed() == ["0", "1", "3", "4"]
    assert desk.listed("?order=desc") == ["4", "3", "1", "0"]
    assert seqs_in(desk.follow_once("after=0")) == [1, 2, 4, 5]
    assert [row["event_id"] for row in desk.get("/events", NDJSON).rows] == ["0", "1", "3", "4"]


def test_a_walk_through_pages_goes_on_over_erased_events(desk):
    desk.publish_range(6)
    first = desk.get("/events?limit=2").json
    desk.ask("DELETE", "/events/t/1")
    desk.ask("DELETE", "/events/t/2")
    assert desk.listed("?limit=2&cursor=" + first["next"]) == ["3", "4"]


def test_the_books_count_what_was_erased(desk):
    desk.publish_range(3)
    desk.publish(sample("1", topic="other"))
    desk.ask("DELETE", "/events/t/1")
    stats = desk.stats()
    assert stats["unique_processed"] == 4
    assert stats["stored"] == 3
    assert stats["topics"]["t"] == {"unique": 3, "duplicates": 0, "stored": 2}


def test_the_limit_of_a_topic_counts_without_erased_events(make_desk):
    desk = make_desk(max_per_topic=3)
    desk.publish_range(3)
    desk.ask("DELETE", "/events/t/1")
    desk.publish(sample("3"))
    desk.run(desk.tidy())
    assert sorted(desk.listed()) == ["0", "2", "3"]


# The query, and what stays of a/1, a/2, ab/1 and b/1; the 2 is a day later.
TOPIC_ERASURES = text_table("""
    a topic                    | topic=a                        | ab/1 b/1
    a prefix                   | topic=a*                       | b/1
    a prefix with a slash      | topic=a/*                      | a/1 a/2 ab/1 b/1
    a topic until an instant   | topic=a&until=2026-01-02       | a/2 ab/1 b/1
    a prefix until an instant  | topic=a*&until=2026-01-01      | a/1 a/2 ab/1 b/1
    a topic that there is not  | topic=c                        | a/1 a/2 ab/1 b/1
    a topic in other capitals  | topic=A                        | a/1 a/2 ab/1 b/1
""")


@with_cases("query, stays", TOPIC_ERASURES)
def test_a_topic_can_be_erased(desk, query, stays):
    later = sample("2", topic="a", timestamp="2026-01-02")
    desk.publish(sample("1", topic="a"), later, sample("1", topic="ab"), sample("1", topic="b"))
    answer = desk.ask("DELETE", "/events?" + query)
    found = sorted(f"{each['topic']}/{each['event_id']}" for each in desk.events())
    assert found == stays.split()
    assert answer.json == {"removed": 4 - len(found)}


NO_TOPIC_ERASURES = text_table("""
    no topic          | -
    an empty topic    | ?topic=
    every topic       | ?topic=*
    only until        | ?until=7d
    no such instant   | ?topic=t&until=soon
    a misspelt until  | ?topic=t&untill=7d
    a source          | ?topic=t&source=s
""")


@with_cases("query", NO_TOPIC_ERASURES)
def test_a_request_that_is_not_clear_erases_nothing(desk, query):
    desk.publish(sample("1"))
    assert desk.ask("DELETE", "/events" + query.strip("-")).problem == "bad-parameter"
    assert desk.listed() == ["1"]


def test_no_commit_waits_long_while_100_000_events_are_erased(tmp_path):
    path = tmp_path / "s.db"
    make_store(path, [event(number, "old", timestamp=NOW + number) for number in range(100_000)])

    async def erase_and_publish(opened):
        erasing = asyncio.ensure_future(opened.send("DELETE", "/events?topic=old"))
        waits_s = await waits_of_publishers(opened, erasing)
        return await erasing, waits_s

    with desk_over(path) as opened:
        answer, waits_s = opened.loop.run_until_complete(erase_and_publish(opened))
        assert answer.json == {"removed": 100_000}
        assert len(waits_s) > 50
        # All of them, where the machine does nothing else.
        assert sorted(waits_s)[len(waits_s) * 99 // 100] < 0.25
        assert opened.stats()["topics"]["old"]["stored"] == 0


def test_a_stop_ends_the_erasing_between_two_steps(make_desk):
    desk = make_desk(trim_rows=1)
    desk.publish_range(300)

    async def stop_soon():
        erasing = asyncio.ensure_future(desk.send("DELETE", "/events?topic=t"))
        await asyncio.sleep(0.02)
        desk.pipeline._stopping = True
        answer = await erasing
        desk.pipeline._stopping = False
        return answer

    assert desk.run(stop_soon()).problem == "stopping"
    assert 0 < len(desk.listed("?limit=1000")) < 300


def test_a_failing_store_refuses_to_erase(locked):
    assert locked.ask("DELETE", "/events?topic=t").problem == "store-unavailable"


def test_a_token_for_reading_erases_nothing(desk):
    desk.publish(sample("1"))
    desk.api.access = READ_ONLY
    for target in ("/events/t/1", "/events?topic=t"):
        refused = desk.ask("DELETE", target, headers=[bearer("read")])
        assert refused.problem == "forbidden"
        assert desk.ask("DELETE", target).problem == "unauthorized"
    assert desk.ask("DELETE", "/events/t/1", headers=[bearer("all")]).status == 204


def test_a_page_of_another_site_erases_nothing(desk):
    answer = desk.ask("DELETE", "/events?topic=t", headers=["Origin: https://example.org"])
    assert answer.problem == "forbidden"


def test_the_log_says_what_was_erased_and_for_whom(desk, caplog):
    caplog.set_level(logging.INFO)
    desk.publish_range(2)
    desk.ask("DELETE", "/events/t/1", peer="192.0.2.9")
    desk.ask("DELETE", "/events?topic=t*", peer="192.0.2.9")
    assert "ERASED - topic: t, event_id: 1, for 192.0.2.9" in caplog.text
    assert "ERASED - 1 events of topic: t*, for 192.0.2.9" in caplog.text


# Duplicates: both contents of a conflict


def test_a_conflict_shows_the_newcomer_and_the_way_to_the_original(desk):
    desk.publish(sample("a/b", topic="x/é", payload={"n": 1}))
    desk.publish(sample("a/b", topic="x/é", payload={"n": 2}))
    [listed] = desk.get("/duplicates").json["duplicates"]
    assert listed["payload"] == '{"n":2}'
    assert listed["original"] == "events/x/%C3%A9/a%2Fb"
    assert desk.get("/" + listed["original"]).json["payload"] == {"n": 1}


def test_a_duplicate_is_remembered_without_its_payload(desk):
    for _ in range(2):
        desk.publish(sample("1"))
    [listed] = desk.get("/duplicates").json["duplicates"]
    assert "payload" not in listed
    assert listed["original"] == "events/t/1"


def test_a_long_payload_of_a_conflict_is_cut_between_characters(desk):
    desk.publish(sample("1"), sample("1", payload={"m": "é" * 5000}))
    [listed] = desk.get("/duplicates").json["duplicates"]
    assert listed["payload"] == '{"m":"' + "é" * 1021
    assert len(listed["payload"].encode()) == 2048


@pytest.mark.parametrize("target", ["/events/t/1", "/events?topic=t", "/events?topic=t*"])
def test_what_a_conflict_brought_is_forgotten_with_the_erased_event(desk, target):
    for topic in ("t", "u"):
        desk.publish(sample("1", topic=topic), sample("1", topic=topic, payload={"m": PASSWORD}))
    desk.ask("DELETE", target)
    other, erased = desk.get("/duplicates").json["duplicates"]
    assert PASSWORD not in erased["payload"]
    assert PASSWORD in other["payload"]


# Counting


def test_counts_are_of_the_last_24_hours_by_hour(desk):
    times = ("2025-12-30T23:59:59", "2025-12-31T00:00:00", "2025-12-31T23:59:59", "2026-01-01")
    desk.publish(*[sample(text, timestamp=text) for text in times])
    assert desk.get("/counts").json == {
        "per": "hour",
        "counts": [
            {"from": "2025-12-31T00:00:00.000000Z", "count": 1},
            {"from": "2025-12-31T23:00:00.000000Z", "count": 1},
        ],
    }


def test_counts_of_yesterday_by_topic_are_in_local_time(filled):
    filled.now = NOW + DAY_US
    answer = filled.get("/counts?per=day&since=yesterday&until=today&tz=%2B02:00&by=topic").json
    assert answer["counts"] == [
        {"from": "2026-01-01T00:00:00.000000+02:00", "topic": "logs/a", "count": 3},
        {"from": "2026-01-01T00:00:00.000000+02:00", "topic": "logs/b", "count": 1},
    ]


def test_the_beginning_of_a_count_can_be_asked_for(desk):
    desk.publish(sample("1", timestamp="2025-12-31T20:00:00Z"))
    [count] = desk.get("/counts?per=day&tz=-01:30").json["counts"]
    assert desk.listed("?since=" + quote(count["from"])) == ["1"]
    assert desk.listed("?until=" + quote(count["from"])) == []


NO_COUNTS = text_table("""
    another span            | per=week
    by something else       | by=source
    a name of a zone        | tz=Europe/Berlin
    an hour that is none    | tz=%2B25:00
    no colon                | tz=%2B0200
    no such instant         | since=then
    two hundred thousand    | per=minute&since=200000m
    a limit                 | limit=5
""")


@with_cases("query", NO_COUNTS)
def test_counts_that_cannot_be_given_are_refused(desk, query):
    assert desk.get("/counts?" + query).problem == "bad-parameter"


def test_too_many_counts_are_refused_and_the_answer_says_how_many(desk):
    answer = desk.get("/counts?per=minute&since=10081m")
    assert "10,081" in answer.json["detail"]
    assert desk.get("/counts?per=minute&since=10080m").status == 200


def test_too_many_topics_for_the_spans_are_refused(desk):
    topics = [sample("1", topic=f"t{number}") for number in range(11)]
    desk.publish(*topics)
    # The listing gets them.
    desk.ask("DELETE", "/events?topic=none")
    answer = desk.get("/counts?per=minute&since=1000m&by=topic")
    assert answer.problem == "bad-parameter"
    assert "10 such topics" in answer.json["detail"]
    assert desk.get("/counts?per=hour&since=1000m&by=topic").status == 200


@pytest.mark.parametrize("zone", ["-12:00", "%2B12:00", "Z"])
def test_counts_at_the_ends_of_time_are_no_failure(filled, zone):
    first = filled.get(f"/counts?per=day&since=0001-01-01&until=0001-01-02&tz={zone}")
    assert [count["count"] for count in first.json["counts"]] == [1]
    last = filled.get(
        f"/counts?per=day&since=9999-12-31&until=9999-12-31T23:59:59.999999&tz={zone}"
    )
    assert last.json["counts"] == []


# Finding


@with_cases("payload, text, is_in_it", TEXTS)
def test_contains_finds_a_text_in_names_and_values(desk, payload, text, is_in_it):
    desk.publish(sample("1", payload=payload))
    assert desk.listed("?contains=" + quote(text)) == (["1"] if is_in_it else [])


def test_contains_goes_with_the_other_filters(desk):
    desk.publish(*samples("a", "b", payload={"m": "needle"}))
    desk.publish(*samples("a", "b", topic="u", payload={"m": "needle"}), sample("c"))
    assert desk.listed("?contains=needle&topic=u") == ["a", "b"]
    assert desk.listed("?contains=needle&topic=u&limit=1&order=desc") == ["b"]
    assert desk.listed("?contains=nothing&topic=u") == []


def test_a_live_tail_shows_what_contains_a_text(desk):
    desk.publish(sample("1"), sample("2", payload={"m": "needle"}), sample("3"))
    assert seqs_in(desk.follow_once("after=0&contains=needle")) == [2]


def test_a_scan_for_a_text_is_bounded_and_goes_on(path):
    needle = event("needle", payload='{"m":"needle"}', timestamp=NOW + 90)
    with open_store(path) as store:
        store.commit([*events_of(range(90)), needle], NOW)
    query = aggregator.EventQuery(contains="needle")
    with open_reader(path, scan_payloads=40) as reader:
        pages = list(pages_of(reader, query))
    assert len(pages) == 3
    assert [found["event_id"] for page in pages for found in events_in(page)] == ["needle"]


def test_a_scan_of_long_payloads_becomes_shorter(path):
    payload = '{"m":"%s"}' % ("x" * 200_000)
    with open_store(path, full_sync=False) as store:
        store.commit([event(number, payload=payload) for number in range(300)], NOW)
    query = aggregator.EventQuery(contains="needle")
    with open_reader(path) as reader:
        reader.page(query)
        assert reader._payloads_at_once < aggregator.PAGE_MAX_PAYLOADS
        ids = [key for page in pages_of(reader, query) for key in events_in(page)]
        assert ids == []


def test_an_empty_text_to_find_is_refused(desk):
    assert desk.get("/events?contains=").problem == "bad-parameter"


@with_cases("name, zone, instant", DAYS)
def test_today_and_yesterday_begin_at_midnight_of_the_zone(desk, name, zone, instant):
    desk.now = NOW + 30 * MINUTE_US
    begin_us = aggregator.parse_timestamp(instant)
    for event_id, timestamp_us in (("before", begin_us - 1), ("at", begin_us)):
        desk.publish(sample(event_id, timestamp=aggregator.format_timestamp(timestamp_us)))
    query = f"{name}&tz={quote(zone)}"
    assert desk.listed("?since=" + query) == ["at"]
    assert desk.listed("?until=" + query) == ["before"]
    # As curl sends it: a plus that became a blank.
    assert desk.listed(f"?since={name}&tz={zone}") == ["at"]


# Size


@with_cases("growth, warning", DISKS)
def test_a_disk_that_gets_full_is_told(growth, warning):
    assert growth.warning().startswith(warning)
    assert (growth.warning() == "") == (warning == "")


def test_the_growth_of_an_hour_is_known_after_half_an_hour():
    assert growth_of(0, MB, apart_s=1799.0).bytes_per_day(3600.0) is None
    assert growth_of(0, MB, apart_s=1800.0).bytes_per_day(3600.0) == 48 * MB


def test_the_growth_of_an_hour_looks_back_one_hour():
    sizes = [number * MB for number in range(100)] + [100 * MB] * 61
    assert growth_of(*sizes).bytes_per_day(3600.0) == 0


def test_health_is_200_and_warns_of_a_full_disk(desk, caplog):
    assert desk.get("/health").json == {"status": "ok"}
    use = aggregator.DiskUse(MB, free=MB, total=GB)
    desk.pipeline.growth.add(0.0, use)
    answer = desk.get("/health")
    assert answer.status == 200
    assert answer.json == {"status": "ok", "warning": "the disk has only 1 MB left"}
    assert desk.stats()["health"]["warning"] == "the disk has only 1 MB left"


def test_the_command_health_says_what_the_service_warns_of(site):
    url = aggregator.parse_address(f"http://127.0.0.1:{site.port}")
    assert aggregator.health_of_service(url).sentence == "ok"
    site.api.pipeline.growth.add(0.0, aggregator.DiskUse(MB, free=MB, total=GB))
    found = aggregator.health_of_service(url)
    assert found.is_good
    assert found.sentence == "ok, but the disk has only 1 MB left"


def test_the_log_says_once_that_the_disk_gets_full(desk, caplog, monkeypatch):
    monkeypatch.setattr(aggregator, "disk_use", lambda path: aggregator.DiskUse(MB, MB, GB))
    desk.pipeline.growth = aggregator.Growth(look_s=0.0)
    for _ in range(3):
        desk.run(desk.pipeline._watch_disk())
    assert caplog.text.count("DISK GETS FULL - the disk has only 1 MB left") == 1


def test_stats_and_metrics_tell_the_size(desk):
    desk.publish(sample("1"))
    desk.run(desk.pipeline._watch_disk())
    stats = desk.stats()
    assert stats["bytes_per_event"] == stats["store_bytes"]
    assert stats["disk_free_bytes"] > 0
    metrics = metrics_of(desk)
    assert metrics.one("bytes_per_event") > 0
    assert metrics.one("disk_free_bytes") > 0
    assert metrics.one("healthy") == 1
    assert metrics.one("failing_seconds") == 0
    assert metrics.one("commit_failures_total") == 0
    # Nobody knows yet.
    assert "days_until_full" not in metrics.values


def test_a_failed_commit_is_counted_and_is_not_healthy(locked):
    assert locked.post("/publish", sample("1")).status == 503
    pipeline = locked.pipeline
    pipeline._trouble = pipeline._trouble._replace(since_s=locked.loop.time() - 100)
    metrics = metrics_of(locked)
    assert metrics.one("commit_failures_total") == 1
    assert metrics.one("healthy") == 0
    assert 100 <= metrics.one("failing_seconds") < 160


def test_stats_list_as_many_names_as_are_asked_for(desk):
    for number in range(5):
        desk.publish(*samples(*range(number + 1), topic=f"t{number}", source=f"s{number}"))
    stats = desk.get("/stats?topics=2&sources=0").json
    assert list(stats["topics"]) == ["t4", "t3"]
    assert stats["topics_total"] == 5
    assert stats["sources"] == {}
    assert len(desk.stats()["sources"]) == 5
    for query in ("topics=-1", "topics=10001", "sources=many", "names=1"):
        assert desk.get("/stats?" + query).problem == "bad-parameter"


# Backups


def test_a_backup_holds_what_the_store_holds(path, tmp_path):
    make_store(path, events_of(range(500)))
    target = tmp_path / "copy.db"
    found = run("backup", "--db", path, "--to", str(target))
    assert found.returncode == 0, found
    size = os.path.getsize(target)
    assert found.stdout == f"{target}: {size:,} bytes, 500 events, newest seq 500; checked\n"
    assert mode_of(target) == 0o600
    assert contradictions(target) == []
    assert stored_ids(target) == stored_ids(path)
    assert not (tmp_path / "copy.db.part").exists()


def test_a_backup_knows_the_ids_that_the_store_knows(path, tmp_path):
    target = str(tmp_path / "copy.db")
    make_store(path, events_of(range(10)))
    with open_store(path) as store:
        store.erase_event("t", "1")
        store_id = store.store_id
        aggregator.copy_store(path, target)
    with open_store(target) as copy:
        assert copy.store_id == store_id
        assert kinds_of(copy, events_of([1, 2, 99])) == ["duplicate", "duplicate", "new"]


@needs_linux
def test_a_backup_of_a_running_service_is_sound_and_has_all_acknowledged(tmp_path):
    with Program(tmp_path / "s.db") as program:
        acknowledged = 0
        for turn in range(3):
            for _ in range(5):
                batch = samples(*range(acknowledged, acknowledged + 100))
                assert program.publish(*batch).status == 202
                acknowledged += 100
            target = tmp_path / f"copy{turn}.db"
            copying = subprocess.Popen(
                [sys.executable, PROGRAM, "backup", "--db", program.db, "--to", str(target)]
            )
            before = acknowledged
            while copying.poll() is None:
                assert program.publish(sample(str(acknowledged))).status == 202
                acknowledged += 1
            assert copying.returncode == 0
            assert contradictions(target) == []
            with contextlib.closing(sqlite3.connect(target)) as db:
                [copied] = db.execute("SELECT count(*) FROM processed_events").fetchone()
            assert before <= copied <= acknowledged


def test_erased_text_and_free_pages_are_not_in_a_backup(path, tmp_path):
    make_store(path, [secret_record(number, padding=500) for number in range(1000)])
    with open_store(path) as store:
        erase_all(store, WHOLE_TOPIC)
        size_before = os.path.getsize(path)
        copied = aggregator.copy_store(path, str(tmp_path / "copy.db"))
    assert copied.events == 0
    assert copied.newest_seq == 1000
    assert copied.size < size_before / 4
    assert PASSWORD.encode() not in (tmp_path / "copy.db").read_bytes()


@with_cases("arguments, status, message", NO_BACKUPS)
def test_a_backup_that_cannot_be_made_leaves_everything_as_it_was(
    tmp_path, monkeypatch, arguments, status, message
):
    monkeypatch.chdir(tmp_path)
    make_store("s.db", [event("1")])
    (tmp_path / "notes.txt").write_text("not an SQLite database, but some of my notes")
    (tmp_path / "half.db.part").write_bytes(b"")
    before = set(os.listdir(tmp_path))
    assert_refused(run("backup", *arguments), status, message)
    assert set(os.listdir(tmp_path)) == before
    assert stored_ids("s.db") == ["1"]


@with_cases("name", {"folder": b"caf\xe9/copy.db", "file": b"caf\xe9.db", "both": b"\xe9/\xff.db"})
def test_a_backup_goes_under_a_name_that_is_not_utf8(path, tmp_path, name):
    make_store(path, events_of(range(5)))
    target = os.path.join(os.fsencode(str(tmp_path)), name)
    try:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with open(target, "wb"):
            pass
    except OSError:
        pytest.skip("this file system has only names in UTF-8")
    os.remove(target)
    found = run("backup", "--db", path, "--to", os.fsdecode(target))
    assert found.returncode == 0, found
    assert found.stderr == ""
    assert "5 events, newest seq 5; checked" in found.stdout
    assert contradictions(os.fsdecode(target)) == []
    assert stored_ids(os.fsdecode(target)) == stored_ids(path)


def test_a_backup_is_told_of_where_its_name_cannot_be_shown(path, tmp_path):
    make_store(path, events_of(range(5)))
    target = str(tmp_path / "café.db")
    found = run("backup", "--db", path, "--to", target, PYTHONIOENCODING="ascii")
    assert found.returncode == 0, found
    assert found.stderr == ""
    assert "/caf\\xe9.db: " in found.stdout
    assert contradictions(target) == []


def test_a_damaged_store_gives_no_backup(path_of_any_store, tmp_path):
    make_store(path_of_any_store, events_of(range(5)))
    with contextlib.closing(sqlite3.connect(path_of_any_store)) as db:
        db.execute("UPDATE stats SET uniques = uniques + 1")
        db.commit()
    with pytest.raises(aggregator.StoreError, match="the copy is not sound"):
        aggregator.copy_store(path_of_any_store, str(tmp_path / "copy.db"))
    assert not (tmp_path / "copy.db").exists()
    assert not (tmp_path / "copy.db.part").exists()
    with contextlib.closing(sqlite3.connect(path_of_any_store)) as db:
        db.execute("UPDATE stats SET uniques = uniques - 1")
        db.commit()


# Tokens


@with_cases("arguments, environment, message", NO_TOKENS)
def test_a_token_that_is_set_but_empty_or_wrong_starts_no_service(
    tmp_path, capsys, arguments, environment, message
):
    make_token_files(tmp_path)
    arguments = [text.replace("{}", str(tmp_path)) for text in arguments]
    environment = {name: text.replace("{}", str(tmp_path)) for name, text in environment.items()}
    with pytest.raises(SystemExit) as ended:
        settings_of(*arguments, **environment)
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert message in told
    assert "s3cret" not in told


def test_several_tokens_come_from_flags_variables_files_and_credentials(tmp_path):
    make_token_files(tmp_path)
    settings = settings_of(
        "--token",
        "a b",
        "--read-token-file",
        f"{tmp_path}/good",
        READ_TOKEN="c,d",
        CREDENTIALS_DIRECTORY=f"{tmp_path}/credentials",
    )
    access = aggregator.access_for(settings, ["127.0.0.1:1"])
    assert access.tokens == ("a", "b", "from-systemd")
    # The flag comes before the credential.
    assert access.read_tokens == ("c", "d", "new-one", "old-one")


def test_a_folder_of_credentials_without_ours_changes_nothing(tmp_path):
    settings = settings_of(CREDENTIALS_DIRECTORY=str(tmp_path))
    assert settings.file_tokens == ()


def test_a_token_file_lets_in_its_bearers_and_nobody_else(tmp_path):
    make_token_files(tmp_path)
    flags = ["--token-file", f"{tmp_path}/good"]
    with Program(tmp_path / "s.db", *flags) as program:
        for token, status in (("new-one", 200), ("old-one", 200), ("other", 401)):
            answer = program.ask("GET", "/stats", Authorization="Bearer " + token)
            assert answer.status == status, token
        assert "OPEN" not in program.read_log()


@with_cases("method, target, problem", TAIL_TOKENS)
def test_a_read_token_in_the_address_opens_the_live_tail_and_nothing_else(
    desk, method, target, problem
):
    desk.api.access = READ_ONLY
    response = desk.run(desk.respond(method, target))
    if problem == "-":
        assert response.status == 200
        assert not isinstance(response.body, bytes)
    else:
        assert f"docs#{problem}" in response.body.decode()


def test_a_token_in_the_address_of_a_list_is_refused_whoever_asks(desk):
    assert desk.get("/events?access_token=read").problem == "bad-parameter"
    desk.api.access = READ_ONLY
    answer = desk.get("/events?access_token=read", bearer("read"))
    assert answer.problem == "bad-parameter"


def test_no_token_in_an_address_gets_into_the_log(site, caplog):
    caplog.set_level(logging.DEBUG)
    for target in ("/events?access_token=s3cret", "/nothing?access_token=s3cret"):
        assert fetch(site.port, "GET", target).status in (400, 404)
    assert "s3cret" not in caplog.text


# Upgrades


def test_a_backup_of_schema_2_stays_schema_2(path, tmp_path):
    make_store(path, events_of(range(20)))
    as_version(path, 2)
    target = str(tmp_path / "copy.db")
    assert aggregator.copy_store(path, target).events == 20
    assert schema_version(target) == 2
    assert schema_version(path) == 2


def test_a_store_that_1_0_0_wrote_opens(tmp_path):
    old = old_program(tmp_path)
    if old is None:
        pytest.skip("the history of the project is not here")
    db = tmp_path / "s.db"
    with Program(db, command=[sys.executable, str(old)]) as program:
        assert program.publish(*samples(*range(100))).status == 202
    assert schema_version(db) == 2
    with Program(db) as program:
        assert program.publish(*samples(*range(100))).json["duplicates"] == 100
        assert program.publish(sample("new")).json["unique"] == 1
        assert "UPGRADED" in program.read_log()
        assert len(program.listed()) == 101
    assert contradictions(db) == []


@pytest.mark.parametrize("target", ["/events", "/events?since=7d", "/counts?until=7d"])
def test_a_zone_that_is_none_is_refused_also_where_nothing_needs_it(desk, target):
    joint = "&" if "?" in target else "?"
    assert desk.get(f"{target}{joint}tz=").problem == "bad-parameter"


# ============================================================================
# §9  Server: real sockets, and clients that know nothing of ours
# ============================================================================


def test_a_connection_is_kept(site):
    connection = http.client.HTTPConnection("127.0.0.1", site.port, timeout=10)
    connection.request("PUT", "/events/t/1", b"{}")
    connection.getresponse().read()
    sock = connection.sock
    connection.request("GET", "/events/t/1")
    assert connection.getresponse().status == 200
    assert connection.sock is sock
    connection.close()


def test_pipelined_requests_are_answered_in_order(site):
    puts = [http_request("PUT", f"/events/p/{n % 40}", b"{}") for n in range(80)]
    *kept, last = exchange(site.port, b"".join(puts) + LAST)
    assert statuses_of(kept) == [201] * 40 + [200] * 40
    seqs = [answer.json["seq"] for answer in kept]
    assert seqs == [*range(1, 41), *range(1, 41)]
    assert not any("connection" in answer.headers for answer in kept)
    assert last.headers["connection"] == "close"


@with_cases(
    "data, status",
    {
        "no version": (b"GET /\r\n\r\n", 400),
        "no host": (b"GET / HTTP/1.1\r\n\r\n", 400),
        "blank before the colon": (b"GET / HTTP/1.1\r\nHost: x\r\nA : b\r\n\r\n", 400),
        "bare line feeds": (b"GET / HTTP/1.1\nHost: x\n\n", 400),
        "bad escape": (get("/?a=%zz"), 400),
        "parameter twice": (get("/events?limit=1&limit=2"), 400),
        "two lengths of one body": (
            post("Content-Length: 5", "Transfer-Encoding: chunked", body=b"0\r\n\r\n"),
            400,
        ),
        "chunk longer than its size": (
            post("Transfer-Encoding: chunked", body=b"5;\r\nabcdeX\r\n"),
            400,
        ),
        "length twice": (
            post("Content-Length: 0", "Content-Length: 0"),
            400,
        ),
        "length with a sign": (post("Content-Length: +5"), 400),
        "unknown method": (http_request("BREW", "/"), 501),
        "unknown version": (b"GET / HTTP/2.0\r\nHost: x\r\n\r\n", 505),
        "large body": (post("Content-Length: 999999999"), 413),
        "long target": (http_request("GET", "/" + "x" * 9000), 414),
        "many fields": (get("/", *["A: b"] * 101), 431),
        "long field": (get("/", "A: " + "b" * 40000), 431),
        "unknown expectation": (post("Expect: tea"), 417),
        "not gzip": (post("Content-Encoding: gzip", body=b"no"), 400),
        "unknown coding": (post("Content-Encoding: br", body=b"x"), 415),
        "close": (LAST, 200),
        "close in a second field": (
            get("/health", "Connection: x", "Connection: close"),
            200,
        ),
    },
)
def test_nothing_behind_a_refusal_or_a_close_is_executed(site, data, status):
    (answer,) = exchange(site.port, data + SMUGGLED)
    assert answer.status == status
    assert answer.headers["connection"] == "close"
    if status >= 400:
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.json["status"] == status
    assert fetch(site.port, "GET", "/events/smuggled/1").status == 404


@with_cases(
    "method, target, body, status",
    {
        "unknown path": ("GET", "/nowhere", SMUGGLED, 404),
        "wrong method": ("PATCH", "/publish", SMUGGLED, 405),
        "HEAD": ("HEAD", "/health", SMUGGLED, 200),
        "invalid event": ("POST", "/publish", b"{}", 422),
        "OPTIONS": ("OPTIONS", "*", SMUGGLED, 204),
    },
)
def test_a_body_that_nobody_wants_is_read_and_not_taken_for_a_request(
    site, method, target, body, status
):
    data = http_request(method, target, body) + LAST
    with contextlib.closing(dial(site.port, data)) as sock:
        raw = read_all(sock)
    assert re.findall(rb"HTTP/1\.1 ([0-9]+)", raw) == [b"%d" % status, b"200"]
    assert fetch(site.port, "GET", "/events/smuggled/1").status == 404


EXPECT = ("EXPECT: 100-Continue", "Connection: close")


def test_100_continue_comes_before_the_body(site):
    body = json.dumps(sample()).encode()
    head = post(f"Content-Length: {len(body)}", *EXPECT)
    with contextlib.closing(dial(site.port, head)) as sock:
        assert sock.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(body)
        (answer,) = answers(read_all(sock))
    assert answer.status == 202


def test_100_continue_does_not_come_before_a_refusal(open_site):
    site = open_site(max_body=1000)
    head = post("Content-Length: 1001", *EXPECT)
    assert statuses(site.port, head) == [413]


def test_100_continue_does_not_come_for_http_1_0(site):
    request = post(*EXPECT, body=json.dumps(sample()).encode())
    assert statuses(site.port, request.replace(b"HTTP/1.1", b"HTTP/1.0")) == [202]


def test_100_continue_does_not_come_without_a_body(site):
    assert statuses(site.port, get("/health", *EXPECT)) == [200]


@with_cases(
    "target, accept",
    {
        "small": ("/health", "*/*"),
        "event": ("/events/t/1", "*/*"),
        "list": ("/events", "*/*"),
        "refusal": ("/nowhere", "*/*"),
        "stream": ("/events", "application/x-ndjson"),
    },
)
def test_head_has_the_head_of_get_and_no_body(site, target, accept):
    fetch(site.port, "PUT", "/events/t/1", b"{}")
    found = {}
    for method in ("GET", "HEAD"):
        ask = http_request(method, target, b"", "Accept: " + accept, "Connection: close")
        with contextlib.closing(dial(site.port, ask)) as sock:
            head, _, body = read_all(sock).partition(b"\r\n\r\n")
        found[method] = re.sub(rb"\r\nDate: [^\r]+", b"", head)
        assert (body == b"") == (method == "HEAD")
    assert found["HEAD"] == found["GET"]


def test_http_1_0_is_closed_after_one_answer(site):
    old = HEALTH.replace(b"HTTP/1.1", b"HTTP/1.0")
    assert statuses(site.port, old + SMUGGLED) == [200]


def test_http_1_0_is_kept_if_it_asks_for_it(site):
    old = HEALTH.replace(b"HTTP/1.1", b"HTTP/1.0")
    asking = old.replace(b"\r\n\r\n", b"\r\nConnection: Keep-Alive\r\n\r\n")
    first, second = exchange(site.port, asking + old)
    assert first.status == 200
    # Without this field an old client waits for the end.
    assert first.headers["connection"] == "keep-alive"
    assert second.status == 200


def test_a_stream_for_http_1_0_ends_with_the_connection(site):
    fetch(site.port, "PUT", "/events/t/1", b"{}")
    with contextlib.closing(dial(site.port, STREAM.replace(b"HTTP/1.1", b"HTTP/1.0"))) as sock:
        head, _, body = read_all(sock).partition(b"\r\n\r\n")
    assert b"chunked" not in head
    assert b"Connection: close" in head
    assert json.loads(body)["event_id"] == "1"


def test_a_half_closed_client_gets_its_answers(site):
    publish = post(body=json.dumps(sample()).encode())
    assert statuses(site.port, publish + HEALTH, half_close=True) == [202, 200]


def test_a_client_that_sends_nothing_gets_nothing(site):
    assert exchange(site.port, b"", half_close=True) == []


SIZED = post(body=b"[]")
CHUNKED = post("Transfer-Encoding: chunked", body=b"2\r\n[]\r\n0\r\n\r\n")


@with_cases(
    "data",
    {
        "in the request line": b"G",
        "in the fields": SIZED[:20],
        "before the blank line": HEALTH[:-2],
        "in the blank line": HEALTH[:-1],
        "before the body": SIZED[:-2],
        "in the body": SIZED[:-1],
        "before the chunks": CHUNKED[:-12],
        "in a chunk": CHUNKED[:-8],
        "before the last chunk": CHUNKED[:-5],
        "in the last chunk": CHUNKED[:-4],
        "before the trailers' end": CHUNKED[:-2],
        "in the trailers' end": CHUNKED[:-1],
    },
)
def test_a_client_that_half_closes_in_the_middle_is_told_so(site, data):
    assert statuses(site.port, data, half_close=True) == [400]
    assert statuses(site.port, HEALTH + data, half_close=True) == [200, 400]
    assert fetch(site.port, "GET", "/stats").json["received"] == 0


ENDLESS = post("Content-Length: 999999")
ENDLESS_CHUNKS = post("Transfer-Encoding: chunked")


# What a client sends at first, what it adds ten times a second, and the answers.
TRICKLING_CLIENTS = {
    "head without a line": (b"GET / HT", b"", [408]),
    "head that grows": (b"GET / HTTP/1.1\r\n", b"A: b\r\n", [408]),
    "no byte": (b"", b"", []),
    "empty line": (b"\r\n", b"", []),
    "body that stops": (ENDLESS + b"{", b"", [408]),
    "body that trickles": (ENDLESS, b"{", [408]),
    "chunks that trickle": (ENDLESS_CHUNKS, b"1\r\n \r\n", [408]),
    "second request that never comes": (HEALTH, b"", [200]),
    "second head that grows": (HEALTH + b"G", b"E", [200, 408]),
}


def trickle_into(port, start, trickle):
    """Be such a client to the end: the statuses it gets, and how long that took."""
    began = time.monotonic()
    data = b""
    with contextlib.closing(dial(port, start)) as sock:
        sock.settimeout(0.1)
        while time.monotonic() - began < 5:
            try:
                piece = sock.recv(65536)
            except socket.timeout:
                with contextlib.suppress(OSError):
                    sock.sendall(trickle)
                continue
            if not piece:
                break
            data += piece
    return statuses_of(answers(data)), time.monotonic() - began


def test_a_slow_client_meets_a_deadline_that_it_cannot_renew(open_site):
    site = open_site(head_s=0.5, body_stall_s=0.5, grace_s=0.7, idle_s=0.5)
    with concurrent.futures.ThreadPoolExecutor(len(TRICKLING_CLIENTS)) as threads:
        # All at once, since each only waits.
        clients = {}
        for name, (start, trickle, _) in TRICKLING_CLIENTS.items():
            clients[name] = threads.submit(trickle_into, site.port, start, trickle)
    for name, (_, _, expected) in TRICKLING_CLIENTS.items():
        statuses, took_s = clients[name].result()
        assert statuses == expected, name
        assert 0.4 < took_s < 3, name


def publish_megabytes(site, megabytes):
    """Store so many events of a megabyte; returns how long the whole list is."""
    for n in range(megabytes):
        payload = {"filling": "x" * 1_000_000}
        event = sample(f"large-{n}", payload=payload)
        assert fetch(site.port, "POST", "/publish", [event]).status == 202
    return len(fetch(site.port, "GET", "/events").body)


ASKS = {
    "one body": get("/events", "Connection: close"),
    "a stream": get("/events", "Accept: application/x-ndjson", "Connection: close"),
}


@with_cases("ask", ASKS)
def test_a_client_that_does_not_read_is_cut_off(open_site, caplog, ask):
    site = open_site(write_stall_s=0.3)
    size = publish_megabytes(site, 6)
    site.shrink_send_buffers()
    with contextlib.closing(dial(site.port, ask, receive_bytes=4096)) as sock:
        until(lambda: "CUT OFF - 127.0.0.1: nothing of the answer was read" in caplog.text)
        assert len(read_what_comes(sock)) < size


def read_steadily(port, ask):
    """Read an answer at 750 KB a second: how much came, and how long that took."""
    began = time.monotonic()
    received = 0
    with contextlib.closing(dial(port, ask, receive_bytes=4096)) as sock:
        while True:
            piece = sock.recv(65536)
            if not piece:
                break
            received += len(piece)
            time.sleep(len(piece) / 750_000)
    return received, time.monotonic() - began


def test_a_client_that_reads_steadily_is_not_cut_off_however_long_it_takes(open_site):
    site = open_site(write_stall_s=0.6)
    size = publish_megabytes(site, 2)
    site.shrink_send_buffers()
    with concurrent.futures.ThreadPoolExecutor(len(ASKS)) as threads:
        readers = {name: threads.submit(read_steadily, site.port, ASKS[name]) for name in ASKS}
    for name, reader in readers.items():
        received, took_s = reader.result()
        assert received >= size, name
        # More than four times as long as the deadline.
        assert took_s > 4 * 0.6, name


def test_a_client_that_reads_too_slowly_is_cut_off_after_its_grace(open_site, caplog):
    site = open_site(grace_s=0.3, rate=100_000_000)
    publish_megabytes(site, 6)
    site.shrink_send_buffers()
    with contextlib.closing(dial(site.port, ASKS["one body"], receive_bytes=4096)) as sock:
        with contextlib.suppress(ConnectionError):
            while sock.recv(4096):
                time.sleep(0.02)
    assert "CUT OFF - 127.0.0.1: the answer was read slower than" in caplog.text


def test_others_are_served_while_a_client_does_not_read(site):
    publish_megabytes(site, 6)
    site.shrink_send_buffers()
    with contextlib.ExitStack() as stack:
        for ask in ASKS.values():
            stack.enter_context(contextlib.closing(dial(site.port, ask, receive_bytes=4096)))
        began = time.monotonic()
        for _ in range(20):
            assert fetch(site.port, "GET", "/health").status == 200
        assert time.monotonic() - began < 5


def test_a_small_answer_that_is_not_read_does_not_hold_its_connection_for_ever(open_site):
    site = open_site(write_stall_s=0.3, idle_s=0.3)
    fetch(site.port, "PUT", "/events/t/1", {"x": "y" * 60_000})
    until(lambda: site.connections == 0)
    site.shrink_send_buffers()
    ask = get("/events/t/1")
    with contextlib.closing(dial(site.port, ask, receive_bytes=2048)) as sock:
        until(lambda: site.connections == 1)
        until(lambda: site.connections == 0)
        assert len(read_what_comes(sock)) < 60_000


def test_one_connection_too_many_is_503(open_site):
    site = open_site(connections=3)
    with contextlib.ExitStack() as stack:
        for _ in range(3):
            sock = stack.enter_context(contextlib.closing(dial(site.port, HEALTH)))
            assert sock.recv(5) == b"HTTP/"
        (answer,) = exchange(site.port, HEALTH)
    assert answer.status == 503
    assert answer.problem == "too-many-connections"
    assert int(answer.headers["retry-after"]) >= 1


def test_a_free_place_is_taken_again(open_site):
    site = open_site(connections=1)
    with contextlib.closing(dial(site.port, HEALTH)) as sock:
        assert sock.recv(5) == b"HTTP/"
        assert statuses(site.port, HEALTH) == [503]
    until(lambda: site.connections == 0)
    assert fetch(site.port, "GET", "/health").status == 200


def test_a_refused_connection_is_closed_even_if_its_client_stays(open_site):
    site = open_site(connections=1)
    with contextlib.ExitStack() as stack:
        held = stack.enter_context(contextlib.closing(dial(site.port, HEALTH)))
        assert held.recv(5) == b"HTTP/"
        refused = stack.enter_context(contextlib.closing(dial(site.port)))
        assert first_answer(read_all(refused)).status == 503
        with pytest.raises(ConnectionError):
            for _ in range(100):
                time.sleep(0.02)
                refused.sendall(b"x")


def test_beyond_the_connections_that_are_told_so_any_more_are_just_closed(open_site):
    site = open_site(connections=2, refusals_at_once=3, linger_s=0.5)
    with contextlib.ExitStack() as stack:
        socks = []
        for _ in range(12):
            socks.append(stack.enter_context(contextlib.closing(dial(site.port))))
        # The first two are connected, and wait.
        found = [read_what_comes(sock)[:12] for sock in socks[2:]]
    assert found.count(b"HTTP/1.1 503") == 3
    assert found.count(b"") == 7


@with_cases(
    "framing", {"sized": "Content-Length: 8000000", "chunked": "Transfer-Encoding: chunked"}
)
def test_an_upload_that_is_refused_while_it_is_sent_gets_its_answer(open_site, framing):
    site = open_site(max_body=1000, linger_s=2)
    with contextlib.closing(dial(site.port, post(framing))) as sock:
        for _ in range(64):
            sock.sendall(chunk(b"x" * 65536))
            time.sleep(0.001)
        sock.shutdown(socket.SHUT_WR)
        (answer,) = answers(read_all(sock))
    assert answer.status == 413


@with_cases("delay_s", {"at once": 0, "a moment later": 0.02})
def test_a_reset_in_any_phase_leaves_the_server_healthy(site, caplog, delay_s):
    events = samples(*range(30), payload={"x": "y" * 100_000})
    fetch(site.port, "POST", "/publish", events)
    phases = {
        "idle": b"",
        "head": b"GET",
        "body": ENDLESS + b"{",
        "publish": http_request("POST", "/publish", lines([sample("reset")])),
        "small answer": HEALTH,
        "large answer": STREAM,
        "large answers": STREAM * 5,
        "refusal": b"?\r\n\r\n",
        "pipeline": HEALTH * 200,
    }
    for data in phases.values():
        sock = dial(site.port, data)
        time.sleep(delay_s)
        reset(sock)
    until(lambda: site.connections == 0)
    assert fetch(site.port, "GET", "/health").status == 200
    assert "ERROR" not in caplog.text


def test_a_long_list_is_streamed_in_chunks(site):
    # Two pages and a part of a third.
    events = samples(*range(2350), payload={"text": "\u00e9\0"})
    fetch(site.port, "POST", "/publish", events)
    stream, last = exchange(site.port, STREAM + LAST)
    assert stream.headers["content-type"] == "application/x-ndjson"
    assert stream.pieces == 3
    assert last.status == 200
    ids = [int(row["event_id"]) for row in stream.rows]
    assert ids == list(range(2350))


def curl(*arguments):
    """What curl prints."""
    command = ["curl", "-sSm10", *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout


@needs_curl
@with_cases("flag", {"without its newlines": "-d", "as it is": "--data-binary"})
def test_curl_publishes_a_file_without_waiting_for_100_continue(site, tmp_path, flag):
    upload = tmp_path / "events"
    # Above 1 MB curl asks with Expect first.
    upload.write_bytes(lines(samples(*range(1500), payload={"x": "y" * 1000})))
    began = time.monotonic()
    found = curl(f"http://127.0.0.1:{site.port}/publish", flag, f"@{upload}")
    # curl waits a second for a 100 that does not come.
    assert time.monotonic() - began < 0.9
    assert json.loads(found)["unique"] == 1500


@needs_curl
def test_curl_puts_a_file_twice(site, tmp_path):
    upload = tmp_path / "event"
    upload.write_bytes(b"text")
    url = f"http://127.0.0.1:{site.port}/events/put/1"
    arguments = ("-o", os.devnull, "-w", "%{http_code}", "-T", upload)
    assert curl(url, *arguments) == b"201"
    assert curl(url, *arguments) == b"200"


@needs_curl
def test_curl_lists_a_topic(site):
    fetch(site.port, "POST", "/publish", samples(*range(1500)))
    url = f"http://127.0.0.1:{site.port}/events?topic=t"
    assert len(curl("-H", "Accept: application/x-ndjson", url).splitlines()) == 1500


def test_a_slow_follower_loses_nothing_and_holds_nobody_up(site):
    with contextlib.closing(dial(site.port, FOLLOW, receive_bytes=4096)) as slow:
        for n in range(40):
            ids = [f"{n}-{m}" for m in range(100)]
            # 8 MB in all, and nobody reads.
            batch = samples(*ids, payload={"filling": "x" * 2000})
            assert fetch(site.port, "POST", "/publish", batch).status == 202
        data = bytearray()
        while b'{"seq":4000,' not in data[-10_000:]:
            data += slow.recv(1 << 16)
    found = re.findall(rb'\{"seq":([0-9]+),', data)
    assert found == [b"%d" % n for n in range(1, 4001)]


def test_a_stop_ends_the_live_tails_at_once_and_whole(site):
    with contextlib.closing(dial(site.port, FOLLOW)) as follower:
        assert fetch(site.port, "POST", "/publish", sample("1")).status == 202
        data = b""
        while b'"seq":1' not in data:
            data += follower.recv(65536)
        site.call(site.live_tail.end)
        data += read_until(follower, b"0\r\n\r\n")
    assert data.endswith(b"\n\r\n0\r\n\r\n")


# ---- What all connections keep in memory together ----

ROOM = {"buffers": 1_000_000, "max_body": 400_000}


def start_upload(site, stack, event_id, size=399_999, sent=300_000):
    """A socket that announces a body, has a place for it, and has sent a part."""
    before = site.kept
    sock = stack.enter_context(contextlib.closing(dial(site.port, put_request(event_id, size))))
    until(lambda: site.kept == before + size)
    sock.sendall(b" " * sent)
    return sock


def start_uploads(site, stack, count):
    return [start_upload(site, stack, n) for n in range(count)]


def finish_upload(sock, left=99_999):
    sock.sendall(b" " * left)
    return first_answer(read_until(sock, b"}\n"))


def test_a_large_body_without_room_is_refused_before_it_is_read(open_site, caplog):
    site = open_site(**ROOM)
    with contextlib.ExitStack() as stack:
        older = start_uploads(site, stack, 2)
        # Only the head is sent: the answer comes before the body.
        (answer,) = exchange(site.port, put_request("late", 399_999))
        assert answer.status == 503
        assert answer.problem == "overloaded"
        assert int(answer.headers["retry-after"]) >= 1
        assert answer.headers["connection"] == "close"
        assert statuses_of(map(finish_upload, older)) == [201, 201]
    assert 'REFUSED 503 - 127.0.0.1, "/events/t/late": too much is on its way' in caplog.text
    until(lambda: site.kept == 0)


def test_a_refused_body_is_not_asked_for_with_100_continue(open_site):
    site = open_site(**ROOM)
    with contextlib.ExitStack() as stack:
        start_uploads(site, stack, 2)
        assert statuses(site.port, put_request("late", 399_999, *EXPECT)) == [503]


def test_a_body_that_is_refused_for_want_of_room_gets_its_answer_while_it_is_sent(open_site):
    site = open_site(**dict(ROOM, linger_s=2))
    with contextlib.ExitStack() as stack:
        start_uploads(site, stack, 2)
        late = stack.enter_context(contextlib.closing(dial(site.port)))
        late.sendall(put_request("late", 399_999))
        for _ in range(39):
            late.sendall(b" " * 10_000)
            time.sleep(0.001)
        assert first_answer(read_all(late)).status == 503


def test_a_small_body_is_taken_however_crowded_it_is(open_site):
    site = open_site(**ROOM)
    with contextlib.ExitStack() as stack:
        start_uploads(site, stack, 2)
        assert fetch(site.port, "PUT", "/events/small/1", b"{}").status == 201


def test_the_next_body_is_taken_when_one_is_done(open_site):
    site = open_site(**ROOM)
    with contextlib.ExitStack() as stack:
        older = start_uploads(site, stack, 2)
        finish_upload(older.pop())
        until(lambda: site.kept == 399_999)
        assert finish_upload(start_upload(site, stack, "next")).status == 201


def test_the_youngest_of_chunked_bodies_makes_room(open_site):
    site = open_site(**ROOM)
    with contextlib.ExitStack() as stack:
        socks = []
        for n in range(3):
            head = http_request("PUT", f"/events/t/{n}", b"", "Transfer-Encoding: chunked")
            sock = stack.enter_context(contextlib.closing(dial(site.port, head)))
            # What comes with the head is not counted.
            until(lambda n=n: site.connections == n + 1)
            time.sleep(0.05)
            sock.sendall(chunk(b" " * 320_000))
            until(lambda n=n: site.kept >= (n + 1) * 320_000)
            socks.append(sock)
        # The oldest grows, and the youngest goes.
        socks[0].sendall(chunk(b" " * 70_000))
        assert first_answer(read_all(socks[2])).problem == "overloaded"
        for sock in socks[:2]:
            sock.sendall(b"0\r\n\r\n")
            assert sock.recv(12) == b"HTTP/1.1 201"


def test_who_hardly_moves_makes_room_for_others(open_site):
    site = open_site(**dict(ROOM, crowded_grace_s=0.3, crowded_rate=10_000_000))
    with contextlib.ExitStack() as stack:
        older, younger = start_uploads(site, stack, 2)
        time.sleep(0.4)
        quick = http_request("PUT", "/events/t/quick", b" " * 399_999)
        assert statuses(site.port, quick + LAST) == [201, 200]
        # One place was enough, and the youngest gave it.
        assert first_answer(read_all(younger)).problem == "overloaded"
        assert finish_upload(older).status == 201


def test_who_announces_a_body_and_sends_nothing_makes_room_at_once(open_site):
    site = open_site(**dict(ROOM, crowded_silence_s=0.1))
    with contextlib.ExitStack() as stack:
        for n in range(2):
            start_upload(site, stack, n, sent=0)
        time.sleep(0.2)
        quick = http_request("PUT", "/events/t/quick", b" " * 399_999)
        assert statuses(site.port, quick + LAST) == [201, 200]


def test_a_follower_that_has_read_everything_takes_no_room(open_site):
    site = open_site(**ROOM)
    fetch(site.port, "PUT", "/events/large/1", {"x": "y" * 390_000})
    with contextlib.closing(dial(site.port, FOLLOW)) as sock:
        read_until(sock, b"}\n\r\n")
        until(lambda: site.live_tail.followers == 1 and site.kept == 0)


def test_a_follower_that_has_closed_is_noticed_though_nothing_happens(open_site):
    site = open_site(gone_s=0.1)
    sock = dial(site.port, FOLLOW)
    assert sock.recv(12) == b"HTTP/1.1 200"
    until(lambda: site.live_tail.followers == 1)
    sock.close()
    until(lambda: site.live_tail.followers == 0, timeout_s=3)
    until(lambda: site.connections == 0, timeout_s=3)


UNREAD_BODIES = {
    "large": ("Content-Length: 4000000",),
    "chunked": ("Transfer-Encoding: chunked",),
    "compressed": ("Content-Length: 4000", "Content-Encoding: gzip"),
    "expects 100": ("Content-Length: 4", "Expect: 100-continue"),
}


@with_cases("fields", UNREAD_BODIES)
def test_a_stranger_is_refused_before_his_body_is_read(site, fields):
    site.api.access = aggregator.Access(tokens=("secret",))
    (answer,) = exchange(site.port, post(*fields))
    assert answer.status == 401
    assert answer.headers["connection"] == "close"


@with_cases(
    "method, target, status",
    {
        "route without a body": ("GET", "/health", 413),
        "wrong method": ("POST", "/health", 405),
        "no such route": ("POST", "/nowhere", 404),
    },
)
def test_a_large_body_that_nobody_wants_is_refused_before_it_is_read(site, method, target, status):
    data = http_request(method, target, b"", "Content-Length: 4000000")
    assert statuses(site.port, data) == [status]


def test_a_signed_webhook_may_send_its_body_without_a_token(site):
    site.api.access = aggregator.Access(tokens=("secret",), webhooks={"hook": ("key",)})
    head = http_request("POST", "/events/hook", b"", "Content-Length: 4", "Expect: 100-continue")
    with contextlib.closing(dial(site.port, head)) as sock:
        assert sock.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(b"null")
        assert sock.recv(12) == b"HTTP/1.1 401"


def test_others_are_answered_while_a_body_is_inflated(site):
    body = empty_blocks(3_000_000)
    data = post("Content-Encoding: deflate", body=body)
    found = []
    sending = threading.Thread(target=lambda: found.extend(exchange(site.port, data + LAST)))
    sending.start()
    longest_s = 0.0
    while sending.is_alive():
        start = time.monotonic()
        assert fetch(site.port, "GET", "/health").status == 200
        longest_s = max(longest_s, time.monotonic() - start)
    sending.join()
    assert statuses_of(found) == [400, 200]
    assert longest_s < 0.25


def test_a_large_answer_without_room_is_refused_and_its_connection_kept(open_site):
    site = open_site(**ROOM)
    fetch(site.port, "PUT", "/events/large/1", {"x": "y" * 390_000})
    with contextlib.ExitStack() as stack:
        older = start_uploads(site, stack, 2)
        refused, health = exchange(site.port, get("/events/large/1") + LAST)
        assert refused.status == 503
        assert refused.problem == "overloaded"
        assert health.status == 200
        assert statuses_of(map(finish_upload, older)) == [201, 201]
    assert fetch(site.port, "GET", "/events/large/1").status == 200


def test_an_answer_larger_than_all_the_room_is_sent_if_it_is_alone(open_site):
    site = open_site(buffers=800_000, max_body=400_000)
    for n in range(4):
        fetch(site.port, "PUT", f"/events/large/{n}", {"x": "y" * 390_000})
    until(lambda: site.kept == 0)
    assert len(fetch(site.port, "GET", "/events").body) > 800_000


def test_answers_that_are_not_read_are_bounded_together(open_site):
    site = open_site(buffers=5_000_000, max_body=2_000_000)
    size = publish_megabytes(site, 2)
    site.shrink_send_buffers()
    with contextlib.ExitStack() as stack:
        socks = []
        for n in range(8):
            ask = list(ASKS.values())[n % 2]
            sock = dial(site.port, ask, receive_bytes=4096)
            socks.append(stack.enter_context(contextlib.closing(sock)))
            until(lambda n=n: site.kept >= min(n + 1, 2) * size - 1000)
            assert site.kept <= 5_000_000
        # The oldest get all of it.
        for sock in socks[:2]:
            assert len(read_all(sock)) >= size


def test_large_bodies_that_are_complete_at_once_are_all_taken(open_site):
    # Together they are more than the queue takes.
    site = open_site(buffers=100_000_000, max_body=4_000_000)
    with contextlib.ExitStack() as stack:
        socks = []
        for n in range(12):
            socks.append(start_upload(site, stack, n, size=3_900_000, sent=3_899_999))
        for sock in socks:
            sock.sendall(b" ")
        found = [first_answer(read_until(sock, b"}\n")) for sock in socks]
    assert statuses_of(found) == [201] * 12


def test_what_a_client_that_goes_kept_is_free_again(open_site):
    site = open_site(**ROOM)
    with contextlib.ExitStack() as stack:
        start_upload(site, stack, "gone")
    until(lambda: site.kept == 0)


# ---- Whatever fails, there is an answer ----


def failing_answer():
    raise UnicodeEncodeError("utf-8", "caf\udce9", 3, 4, "surrogates not allowed")


def test_a_handler_that_fails_is_answered_500(caplog):
    raw = ask_server_over(NoisyAPI(failing_answer), HEALTH)
    assert raw.startswith(b"HTTP/1.1 500 ")
    assert b"this is our fault" in raw
    assert "a bug while answering 127.0.0.1" in caplog.text


def test_an_answer_that_cannot_be_encoded_is_answered_500():
    response = aggregator.Response(200, b"{}", headers=(("Link", "caf\udce9"),))
    raw = ask_server_over(NoisyAPI(lambda: response), HEALTH)
    assert raw.startswith(b"HTTP/1.1 500 ")


def test_when_even_the_refusal_fails_there_is_an_answer():
    failure = UnicodeEncodeError("utf-8", "caf\udce9", 3, 4, "surrogates not allowed")
    raw = ask_server_over(NoisyAPI(failing_answer, refusal=failure), HEALTH)
    (answer,) = answers(raw)
    assert answer.status == 500
    assert_problem(answer, answer.headers["content-type"])


def test_a_request_that_is_refused_by_a_failing_api_is_answered_as_well():
    raw = ask_server_over(NoisyAPI(failing_answer, refusal=ValueError("a bug")), b"?\r\n\r\n")
    assert first_answer(raw).problem == "internal-error"


def test_a_stream_that_fails_is_left_unfinished(caplog):
    async def pieces():
        yield b"one\n"
        raise ValueError("the disk is gone")

    def response():
        return aggregator.Response(200, pieces(), "application/x-ndjson")

    raw = b""
    # The end is a reset.
    with contextlib.suppress(ConnectionError):
        raw = ask_server_over(NoisyAPI(response), HEALTH)
    assert not raw.endswith(b"0\r\n\r\n")
    assert "a list for 127.0.0.1 was cut off: the disk is gone" in caplog.text


# ---- TLS ----


def dial_tls(port, certificate, data):
    import ssl

    context = ssl.create_default_context(cafile=certificate)
    sock = context.wrap_socket(dial(port), server_hostname="localhost")
    sock.sendall(data)
    return sock


def test_over_tls_a_finished_conversation_ends_at_once(open_site, certificate):
    site = open_site(linger_s=5)
    port = site.serve_tls(certificate)
    began = time.monotonic()
    with contextlib.closing(dial_tls(port, certificate, HEALTH + LAST)) as sock:
        found = answers(read_all(sock))
    assert time.monotonic() - began < 2
    assert statuses_of(found) == [200, 200]


def test_over_tls_a_large_answer_is_whole(open_site, certificate):
    site = open_site()
    port = site.serve_tls(certificate)
    size = publish_megabytes(site, 3)
    with contextlib.closing(dial_tls(port, certificate, ASKS["one body"])) as sock:
        (answer,) = answers(read_all(sock))
    assert len(answer.body) == size


def test_over_tls_an_upload_that_is_refused_while_it_is_sent_gets_its_answer(
    open_site, certificate
):
    site = open_site(max_body=1000, linger_s=1)
    port = site.serve_tls(certificate)
    with contextlib.closing(dial_tls(port, certificate, put_request("1", 4_000_000))) as sock:
        with contextlib.suppress(OSError):
            for _ in range(40):
                sock.sendall(b"x" * 100_000)
        assert first_answer(read_what_comes(sock)).status == 413


# ---- The rest ----


def test_what_is_refused_before_it_is_a_request_is_logged_with_peer_and_reason(site, caplog):
    requests = [
        b"G\x1b[2J / HTTP/1.1\r\n\r\n",
        b"GET /\x00\r\n\r\n",
        http_request("BREW", "/"),
        get("/%"),
        get("/?a%1b=1&a%1b=2"),
        get("/", "Expect: \x07"),
    ]
    for data in requests:
        (answer,) = exchange(site.port, data)
        assert answer.status >= 400
    assert len(caplog.messages) == len(requests)
    for message in caplog.messages:
        assert re.match(r'REFUSED [45][0-9]{2} - 127\.0\.0\.1(, "/")?: .{10}', message)
        assert message.isprintable()
        assert message.isascii()


LARGE = json.dumps(samples(*range(5), payload={"x": "y" * 100_000})).encode()
PUBLISH = post("Connection: close", body=LARGE)
GZIP = "Content-Encoding: gzip"


@with_cases(
    "data, status",
    {
        "publish": (PUBLISH, 202),
        "list": (get("/events", "Connection: close"), 200),
        "stream": (ASKS["a stream"], 200),
        "large event": (http_request("PUT", "/events/t/9", LARGE, "Connection: close"), 201),
        "not JSON": (post(body=b"[" + LARGE), 400),
        "invalid events": (post(body=b"[{}]"), 422),
        "unknown method": (http_request("BREW", "/", LARGE), 501),
        "not gzip": (post(GZIP, body=LARGE), 400),
        "half of gzip": (post(GZIP, body=gzip.compress(LARGE)[:-9]), 400),
        "half of a body": (PUBLISH[:-9], 400),
        "half of a head": (PUBLISH[:20], 400),
    },
)
def test_nothing_of_an_exchange_waits_for_the_garbage_collector(
    site, assert_nothing_is_left, data, status
):
    fetch(site.port, "POST", "/publish", LARGE)
    assert statuses(site.port, data, half_close=True) == [status]
    assert_nothing_is_left()


@with_cases(
    "data, status",
    {
        "invalid events": (post(body=b"[{}]"), 422),
        "not JSON": (post(body=b"{" * 1000), 400),
        "no such event": (get("/events/t/none"), 404),
        "bad parameter": (get("/events?limit=x"), 400),
    },
)
def test_nothing_of_a_refused_request_is_left_while_its_connection_is_kept(
    site, assert_nothing_is_left, data, status
):
    with contextlib.closing(dial(site.port, data + HEALTH)) as sock:
        raw = read_until(sock, b'"ok"}\n')
        assert statuses_of(answers(raw)) == [status, 200]
        # The parser of this connection stays.
        until(lambda: requests_in_memory() == 0, timeout_s=5)


@with_cases("target", {"idle": "/health", "follows": "/events?follow=1&after=0"})
def test_a_connection_keeps_no_request_when_it_has_been_answered(
    site, assert_nothing_is_left, target
):
    data = http_request("GET", target, b" " * 30_000)
    with contextlib.closing(dial(site.port, data)) as sock:
        assert sock.recv(12) == b"HTTP/1.1 200"
        until(lambda: requests_in_memory() == 0, timeout_s=5)


@with_cases("data", {"body": PUBLISH[:-9], "head": PUBLISH[:20]})
def test_nothing_of_a_late_request_waits_for_the_garbage_collector(
    open_site, assert_nothing_is_left, data
):
    site = open_site(head_s=0.3, body_stall_s=0.3)
    assert statuses(site.port, data) == [408]
    assert_nothing_is_left()


@with_cases("data", {"body": PUBLISH[:-9], "list": get("/events") * 3, "stream": STREAM * 3})
def test_nothing_of_a_reset_waits_for_the_garbage_collector(site, assert_nothing_is_left, data):
    fetch(site.port, "POST", "/publish", LARGE)
    site.shrink_send_buffers()
    sock = dial(site.port, data, receive_bytes=4096)
    if data.startswith(b"GET"):
        sock.recv(10)
    time.sleep(0.05)
    reset(sock)
    assert_nothing_is_left()


def test_nothing_of_a_refusal_for_want_of_room_waits_for_the_garbage_collector(
    open_site, assert_nothing_is_left
):
    site = open_site(**ROOM)
    fetch(site.port, "PUT", "/events/large/1", {"x": "y" * 390_000})
    with contextlib.ExitStack() as stack:
        start_uploads(site, stack, 2)
        assert statuses(site.port, put_request("late", 399_999)) == [503]
        ask = get("/events/large/1", "Connection: close")
        assert statuses(site.port, ask) == [503]
    assert_nothing_is_left()


def test_nothing_of_a_commit_that_fails_waits_for_the_garbage_collector(
    site, assert_nothing_is_left, monkeypatch
):
    # pytest would keep the lines of the log, and with them their tracebacks.
    monkeypatch.setattr(aggregator.log, "disabled", True)
    with monkeypatch.context() as failing:
        failing.setattr(site.store, "commit", lambda *_: 1 / 0)
        assert statuses(site.port, PUBLISH) == [503]
    assert statuses(site.port, PUBLISH) == [202]
    assert_nothing_is_left()


def test_the_date_follows_a_clock_that_is_set_back():
    instants = iter([7200.5, 7200.9, 3600.2])
    server = aggregator.Server(NoisyAPI(None), lambda: next(instants))
    assert [server.date()[17:25] for _ in range(3)] == ["02:00:00", "02:00:00", "01:00:00"]


def test_it_listens_where_a_socket_cannot_be_duplicated(monkeypatch):
    def refuse(self):
        raise OSError("not here")

    monkeypatch.setattr(asyncio.trsock.TransportSocket, "dup", refuse)
    monkeypatch.delattr(socket, "TCP_NOTSENT_LOWAT", raising=False)
    response = aggregator.Response(200, b"{}")
    raw = ask_server_over(NoisyAPI(lambda: response), LAST)
    assert raw.startswith(b"HTTP/1.1 200 ")


# ============================================================================
# §12  Publish, follow, relay: against the real service, and against a fake one where it
# must misbehave
# ============================================================================

ADDRESSES = {
    "no scheme": ("localhost:8000", ("http", "localhost", 8000, "")),
    "no port": ("http://nas", ("http", "nas", None, "")),
    "IPv6 and a path": ("https://[::1]:8443/logs/", ("https", "::1", 8443, "/logs/")),
}
NO_ADDRESSES = {
    "empty": "",
    "other scheme": "ftp://nas",
    "no host": "http://",
    "port too large": "http://nas:99999",
    "port 0": "http://nas:0",
    "port a word": "http://nas:x",
    "user": "http://u:p@nas",
    "query": "http://n/?a=b",
    "fragment": "http://n/#a",
    "blank": "http://n a/",
    "not ASCII": "http://né/",
    "open bracket": "http://[::1",
    "line end": "nas\n",
    "empty label": "http://a..b",
}


@with_cases("text, expected", ADDRESSES)
def test_an_address_is_read_as_curl_reads_it(text, expected):
    parts = aggregator.parse_address(text)
    assert (parts.scheme, parts.hostname, parts.port, parts.path) == expected


@with_cases("text", NO_ADDRESSES)
def test_what_is_no_address_is_refused(text):
    with pytest.raises(ValueError, match="must be an address"):
        aggregator.parse_address(text)


# ---- Delivering ----


def test_what_fails_on_the_way_is_sent_again_until_it_is_answered(tmp_path):
    script = [None, (503, {}, {"Retry-After": "1"}), (429, {}), (500, {}), (408, {}), (502, "<p>")]
    (tmp_path / "log").write_text("one\ntwo\n")
    with Fake(scripted(*script)) as fake:
        assert ship(fake.url, tmp_path / "log", topic="t") == 0
    assert len(fake.asked) == len(script) + 1
    for asked in fake.asked:
        assert asked == fake.asked[0]
    assert [event["payload"]["message"] for event in fake.asked[0]] == ["one", "two"]


def test_retry_after_is_kept_to(tmp_path):
    (tmp_path / "log").write_text("one\n")
    with Fake(scripted((503, {}, {"Retry-After": "1"}))) as fake:
        ship(fake.url, tmp_path / "log", topic="t")
    assert fake.when_s[1] - fake.when_s[0] >= 1


def test_pauses_between_attempts_grow_and_are_random(monkeypatch):
    slept = []
    monkeypatch.setattr(aggregator.time, "sleep", slept.append)
    limits = aggregator.ClientLimits()
    rounds = []
    for _ in range(3):
        backoff = aggregator._Backoff(limits)
        for _ in range(12):
            backoff.pause()
        rounds.append(slept[-12:])
    for pauses in rounds:
        for attempt, pause in enumerate(pauses):
            bound = min(limits.backoff_max_s, limits.backoff_s * 2**attempt)
            assert 0 <= pause <= bound
    assert rounds[0] != rounds[1]
    assert rounds[1] != rounds[2]
    assert max(slept) > 1


@pytest.mark.parametrize("status", [200, 301, 400, 401, 403, 404])
def test_an_answer_that_no_repetition_changes_ends_a_run(tmp_path, status):
    (tmp_path / "log").write_text("one\n")
    with Fake(lambda events: (status, {"detail": "says the service"})) as fake:
        with pytest.raises(aggregator.ClientError, match=f"{status} says the service"):
            ship(fake.url, tmp_path / "log", topic="t", state=tmp_path / "place")
    assert len(fake.asked) == 1
    assert not (tmp_path / "place").exists()


def test_no_answer_ends_a_follower(tmp_path):
    (tmp_path / "log").write_text("one\n")
    script = [(401, {"detail": "no token"}), (403, {}), (404, {}), (200, "<p>"), (400, {}), None]
    with Fake(scripted(*script)) as fake:
        arguments = ("--url", fake.url, "--topic", "t", "--follow", tmp_path / "log")
        with Child(tmp_path, "publish", *arguments) as child:
            wait_until(lambda: len(fake.asked) == len(script) + 1)
            wait_until(lambda: "waiting" not in child.last_line())
            assert child.process.poll() is None
            assert child.end() == 143
    assert "waiting: " + fake.url + ": 401 no token" in child.said()
    assert "waiting" not in child.last_line()


def test_a_trouble_that_stays_is_told_once(capsys):
    report = aggregator.Report("line")
    for _ in range(3):
        report.waits("no answer")
    report.waits("")
    assert capsys.readouterr().err.count("waiting: no answer") == 1


def test_a_run_gives_up_after_its_timeout(tmp_path):
    (tmp_path / "log").write_text("one\n")
    with Fake(lambda events: (503, {"detail": "disk full"})) as fake:
        with pytest.raises(aggregator.ClientError, match="503 disk full"):
            ship(fake.url, tmp_path / "log", topic="t", timeout_us=100_000)
    assert len(fake.asked) > 1


def test_a_timeout_bounds_also_what_the_service_asks_to_wait(tmp_path):
    (tmp_path / "log").write_text("one\n")
    with Fake(lambda events: (503, {}, {"Retry-After": "600"})) as fake:
        began_s = time.monotonic()
        with pytest.raises(aggregator.ClientError, match="503"):
            ship(fake.url, tmp_path / "log", topic="t", timeout_us=60_000_000)
    assert time.monotonic() - began_s < 30


def test_a_timeout_bounds_the_silence_of_a_service(tmp_path):
    (tmp_path / "log").write_text("one\n")
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as silent:
        began_s = time.monotonic()
        with pytest.raises(aggregator.ClientError, match="timed out"):
            ship(local(silent.getsockname()[1]), tmp_path / "log", topic="t", timeout_us=100_000)
    assert time.monotonic() - began_s < aggregator.ANSWER_TIMEOUT_S / 2


ODD_ANSWERS = {
    "another's detail": {"detail": [{"loc": ["body"]}]},
    "errors an object": {"errors": {"a": 1}},
    "errors null": {"errors": None},
    "errors of text": {"errors": ["a"]},
    "errors of another form": {"errors": [{"index": [], "field": 1, "message": 2}]},
}


@pytest.mark.parametrize("status", [400, 422])
@with_cases("members", ODD_ANSWERS)
def test_whatever_another_service_says_is_shown_and_no_crash(tmp_path, capsys, status, members):
    (tmp_path / "log").write_text("one\n")
    with Fake(lambda events: (status, members)) as fake:
        told = ""
        try:
            assert ship(fake.url, tmp_path / "log", topic="t") == 1
        except aggregator.ClientError as error:
            told = str(error)
    assert f": {status} " in told + capsys.readouterr().err


def test_what_is_refused_is_set_aside_with_its_line_number(tmp_path, capsys):
    events = samples(*range(100))
    (tmp_path / "log").write_bytes(b"\n" + lines(events) + b"\n")
    with Fake(refuse_thirteen) as fake:
        assert ship(fake.url, tmp_path / "log", state=tmp_path / "place") == 1
    told = capsys.readouterr()
    assert "line 15 refused" in told.err
    assert "unlucky" in told.err
    assert "99 new" in told.err
    assert told.out == ""
    assert json.loads((tmp_path / "place.refused").read_text()) == events[13]


def test_without_a_place_what_is_refused_goes_to_stdout(tmp_path, capsys):
    events = samples(*range(20))
    (tmp_path / "log").write_bytes(lines(events))
    with Fake(refuse_thirteen) as fake:
        assert ship(fake.url, tmp_path / "log") == 1
    assert json.loads(capsys.readouterr().out) == events[13]


def test_the_rest_of_a_refused_block_is_stored_once_and_in_order(tmp_path, capsys):
    (tmp_path / "log").write_bytes(lines(samples(*range(100))))
    with Fake(refuse_thirteen) as fake:
        ship(fake.url, tmp_path / "log")
    expected = [str(number) for number in range(100) if number != 13]
    assert passed_by(fake, refuse_thirteen) == expected
    assert "99 new" in capsys.readouterr().err


def test_of_a_batch_with_many_faults_each_is_refused_and_the_others_are_stored(
    site, tmp_path, capsys
):
    good = [json.dumps(event) for event in samples(*range(50))]
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
    (tmp_path / "log").write_text("\n".join(good[:25] + bad + good[25:]))
    assert ship(local(site.port), tmp_path / "log") == 1
    told = capsys.readouterr()
    assert {event["event_id"] for event in stored(site.port)} == {str(n) for n in range(50)}
    assert "50 new" in told.err
    for number in range(26, 26 + len(bad)):
        assert f"line {number} refused" in told.err
    assert "event_id is missing" in told.err


def test_a_conflict_is_no_success(site, tmp_path, capsys):
    events = [sample("1"), sample("2"), sample("1", payload={"other": 1})]
    (tmp_path / "log").write_bytes(lines(events))
    assert ship(local(site.port), tmp_path / "log") == 1
    assert "2 new, 1 duplicate, 1 conflict" in capsys.readouterr().err


def test_one_bad_file_does_not_keep_the_others_away(site, tmp_path, capsys, send):
    for name in ("a", "c"):
        (tmp_path / name).write_text(name + "\n")
    status = send(*(tmp_path / name for name in "abc"))
    assert status == 1
    assert messages(site.port) == ["a", "c"]
    told = f"aggregator.py: {tmp_path / 'b'}: {os.strerror(errno.ENOENT)}"
    assert capsys.readouterr().err.splitlines()[-1] == told


FILES_THAT_CANNOT_BE_READ = {"missing": ("none", errno.ENOENT), "a folder": (".", errno.EISDIR)}


@with_cases("name, number", FILES_THAT_CANNOT_BE_READ)
def test_a_file_that_cannot_be_opened_is_named_in_plain_words(tmp_path, name, number):
    path = str(tmp_path / name)
    found = run("publish", "--url", "127.0.0.1:1", "--topic", "t", path)
    assert found.returncode == 1
    assert found.stderr.splitlines()[-1] == f"aggregator.py: {path}: {os.strerror(number)}"


SETTINGS_THAT_DO_NOT_FIT = {
    "given ids of text": {"ids": "given", "topic": "t"},
    "random ids of events": {"ids": "random"},
    "offsets in a pipe": {"ids": "offset", "topic": "t"},
    "a place in standard input": {"state": "s"},
    "following standard input": {"follow": True},
    "following two": {"follow": True, "files": ("a", "b")},
    "a place in two": {"state": "s", "files": ("a", "b")},
    "a follower that gives up": {"follow": True, "files": ("a",), "timeout_us": 1},
}


@with_cases("settings", SETTINGS_THAT_DO_NOT_FIT)
def test_what_does_not_go_together_is_said_so(settings):
    with pytest.raises(aggregator.ClientError, match="--"):
        aggregator.publish(aggregator.PublishSettings(**settings))


def test_a_token_is_shown_to_the_service_and_a_missing_one_is_named(tmp_path):
    (tmp_path / "log").write_text("one\n")
    with Program(tmp_path / "token.db", "--token", "s3cret") as program:
        url = local(program.port)
        arguments = ("publish", "--url", url, "--topic", "t", str(tmp_path / "log"))
        found = run(*arguments)
        assert found.returncode == 1
        assert "401" in found.stderr
        assert run(*arguments, "--token", "s3cret").returncode == 0
        assert run(*arguments, AUTH_TOKEN="s3cret").returncode == 0


def test_nothing_is_lost_when_the_service_is_killed_and_started_again(tmp_path):
    log, db = tmp_path / "log", tmp_path / "kill.db"
    log.write_text("".join(f"line {n}\n" for n in range(20_000)))
    with Program(db) as program:
        port = program.port
        child = Child(tmp_path, "publish", "--url", local(port), "--topic", "t", log)
        wait_until(lambda: count_stored(port) > 0)
        program.kill()
    with child, Program(db, "--port", str(port)) as program:
        assert child.process.wait(20) == 0
        assert messages(port) == [f"line {n}" for n in range(20_000)]
        assert program.end() == 0
    assert "20,000 sent" in child.said()
    assert "waiting" in child.said()
    assert_sound(db)


def test_on_a_terminal_progress_is_one_line_that_moves(tmp_path):
    pty = pytest.importorskip("pty")
    (tmp_path / "log").write_text("one\n")
    words = [sys.executable, PROGRAM, "publish", "--topic", "t", str(tmp_path / "log")]
    with Fake(scripted(*[(503, {})] * 3)) as fake:
        master, slave = pty.openpty()
        words += ["--url", fake.url]
        process = subprocess.Popen(words, stderr=slave, env=clean_environment())
        os.close(slave)
        text = b""
        with contextlib.suppress(OSError):
            for data in iter(lambda: os.read(master, 1000), b""):
                text += data
        os.close(master)
        assert process.wait(10) == 0
    assert text.count(b"\r\x1b[K") >= 3
    assert text.count(b"\n") == 1
    assert b"waiting" in text
    assert b"1 sent, 1 new" in text


# ---- The place ----


def test_a_place_is_remembered(site, tmp_path, capsys, send):
    log, place = tmp_path / "log", tmp_path / "place"
    log.write_text("one\ntwo\n")
    for sent in (2, 0):
        assert send(log, state=place) == 0
        assert f"{sent} sent" in capsys.readouterr().err
    append(log, "three\n")
    assert send(log, state=place) == 0
    assert "1 sent, 1 new" in capsys.readouterr().err
    assert {"log", "place"} <= set(os.listdir(str(tmp_path)))
    assert "place.new" not in os.listdir(str(tmp_path))


def test_without_an_acknowledgement_the_place_stays(tmp_path):
    (tmp_path / "log").write_text("one\n")
    arguments = ("--topic", "t", "--state", tmp_path / "place", tmp_path / "log")
    with Fake(lambda events: (503, {})) as fake:
        with Child(tmp_path, "publish", "--url", fake.url, *arguments) as child:
            wait_until(lambda: len(fake.asked) > 1)
            assert child.end() == 143
    assert not (tmp_path / "place").exists()
    assert "waiting: " + fake.url in child.said()
    assert "0 sent" in child.said()


FOREIGN_PLACES = {"open bracket": "{", "list": "[]", "another's": '{"of": "x", "place": 1}'}


@with_cases("text", FOREIGN_PLACES)
def test_a_file_that_is_no_place_of_this_log_is_refused(tmp_path, text):
    (tmp_path / "place").write_text(text)
    (tmp_path / "log").write_text("one\n")
    with pytest.raises(aggregator.ClientError, match="choose another --state"):
        ship("127.0.0.1:1", tmp_path / "log", topic="t", state=tmp_path / "place")
    assert (tmp_path / "place").read_text() == text


def saved_place(folder, place=(1,), **more):
    """A place file in a folder, and what it holds."""
    file = aggregator.PlaceFile(str(folder / "place"), "/log")
    file.save(list(place), 0, "bytes", "")
    return file


def test_an_empty_file_is_a_place_that_was_made_for_a_mount(tmp_path):
    (tmp_path / "place").touch()
    assert aggregator.PlaceFile(str(tmp_path / "place"), "/log").load() is None


def test_a_place_that_a_power_cut_tore_is_begun_anew(tmp_path, capsys):
    file = saved_place(tmp_path)
    os.truncate(file.path, os.path.getsize(file.path) - 5)
    assert file.load() is None
    assert "repeats are harmless" in capsys.readouterr().err


def test_a_place_that_cannot_be_replaced_is_written_where_it_is(tmp_path, monkeypatch):
    def busy(*_):
        raise OSError(errno.EBUSY, "Device or resource busy")

    file = saved_place(tmp_path, range(100))
    inode = os.stat(file.path).st_ino
    monkeypatch.setattr(aggregator.os, "replace", busy)
    file.save([2], 0, "bytes", "")
    assert file.load() == [2]
    assert os.stat(file.path).st_ino == inode


def test_a_place_is_saved_where_a_folder_cannot_be_opened(tmp_path, monkeypatch):
    file = aggregator.PlaceFile(str(tmp_path / "place"), "/log")
    open_file = os.open

    def open_no_folder(path, *arguments, **named):
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return open_file(path, *arguments, **named)

    monkeypatch.setattr(os, "open", open_no_folder)
    file.save([7], 0, "bytes", "")
    assert file.load() == [7]


def test_a_place_that_cannot_be_saved_is_told_and_delivery_goes_on(tmp_path, capsys):
    file = aggregator.PlaceFile(str(tmp_path / "gone" / "place"), "/log")
    report = aggregator.Report("line", file, "bytes")
    batch = aggregator.Batch([b"{}"], [1], [7])
    report.settle(batch, aggregator.Outcome(1, 0, 0, {}))
    assert "cannot save the place" in capsys.readouterr().err
    assert report.status() == 1
    os.mkdir(str(tmp_path / "gone"))
    assert report.status() == 0
    assert file.load() == [7]


def test_a_place_carries_how_far_behind_it_is_and_what_is_wrong(tmp_path):
    file = aggregator.PlaceFile(str(tmp_path / "place"), "/log", follows=True)
    report = aggregator.Report("line", file, "bytes")
    report.lag = lambda: 17
    report.waits("no route to host")
    saved = json.loads((tmp_path / "place").read_text())
    assert saved["lag"] == 17
    assert saved["unit"] == "bytes"
    assert saved["error"] == "no route to host"
    assert saved["follows"] is True
    assert saved["of"] == "/log"
    assert time.time() - aggregator.parse_timestamp(saved["at"]) / 1e6 < 10


def test_a_place_says_soon_what_is_waited_for_and_soon_that_it_is_over(tmp_path):
    file = aggregator.PlaceFile(str(tmp_path / "place"), "/log", follows=True)
    report = aggregator.Report("line", file, "bytes")
    for trouble in ("", "no route to host", ""):
        report._saved_s -= 1
        report.waits(trouble)
        assert json.loads((tmp_path / "place").read_text())["error"] == trouble


def test_a_place_says_why_a_run_ended_and_the_next_one_clears_it(tmp_path):
    log, place = tmp_path / "log", tmp_path / "place"
    errors = []
    with Fake(scripted()) as fake:
        for answers in ([], [(403, {"detail": "not yours"})], []):
            append(log, "one\n")
            fake.behave = scripted(*answers)
            with contextlib.suppress(aggregator.ClientError):
                ship(fake.url, log, topic="t", state=place)
            errors.append(json.loads(place.read_text())["error"])
    assert errors == ["", f"{fake.url}: 403 not yours", ""]


def test_events_are_compressed_if_they_leave_this_machine(tmp_path, monkeypatch):
    (tmp_path / "log").write_text("one\ntwo\n")
    with Fake(scripted()) as fake:
        assert ship(fake.url, tmp_path / "log", topic="t") == 0
        monkeypatch.setattr(aggregator, "is_loopback", lambda host: False)
        assert ship(fake.url, tmp_path / "log", topic="t") == 0
        assert fake.codings == [None, "gzip"]
        monkeypatch.undo()
        large = sample("1", payload={"x": "x" * 1_100_000})
        (tmp_path / "log").write_bytes(lines([large]))
        assert ship(fake.url, tmp_path / "log") == 0
        assert fake.codings[2:] == ["gzip"]
    here, elsewhere, _ = fake.asked
    assert [event["payload"] for event in here] == [event["payload"] for event in elsewhere]


def test_a_place_of_the_first_version_is_understood(site, tmp_path, capsys, send):
    log, place = tmp_path / "log", tmp_path / "place"
    log.write_text("one\ntwo\n")
    (tmp_path / "log.1").write_text("older\n")
    saved = [os.stat(str(log)).st_ino, 4, 1, 4, zlib.crc32(b"one\n"), 1]
    place.write_text(json.dumps({"of": str(log), "place": saved}))
    assert send(log, state=place) == 0
    assert messages(site.port) == ["two"]
    assert send(log, state=place) == 0
    assert messages(site.port) == ["two"]


# ---- Lines as they are ----

CUTS = {
    "unfinished": (b"one\ntwo", 10, False, [b"one\n"]),
    "unfinished and last": (b"one\ntwo", 10, True, [b"one\n", b"two"]),
    "as long as may be": (b"abcd\n", 5, False, [b"abcd\n"]),
    "one longer": (b"abcde\n", 5, False, [b"abcde", b"\n"]),
    "long and unfinished": (b"abcdefg", 5, False, [b"abcde"]),
    "carriage returns": (b"a\r\nb\rc\n", 9, False, [b"a\r\n", b"b\rc\n"]),
    "two bytes": ("aé\n".encode(), 2, True, [b"a", b"\xc3\xa9", b"\n"]),
    "four bytes": ("abc\U0001f600\n".encode(), 6, True, [b"abc", b"\xf0\x9f\x98\x80\n"]),
    "no UTF-8": (b"\x80" * 9, 5, True, [b"\x80" * 2, b"\x80" * 2, b"\x80" * 5]),
}


@with_cases("data, longest, final, expected", CUTS)
def test_lines_are_cut_at_characters(data, longest, final, expected):
    assert aggregator.cut_lines(data, longest, final) == expected


def test_ids_by_offset_make_it_harmless_to_send_a_file_again(site, tmp_path, capsys, send):
    log = tmp_path / "log"
    text = "\u00e9\U0001f600\n".encode() + b"\xff\x00\x1b[0m\r\nlast"
    log.write_bytes(b"\0\0\0same\nsame\n\n \t\n" + text)
    for new, duplicate in ((5, 0), (0, 5)):
        assert send(log, source="nas") == 0
        assert f"5 sent, {new} new, {duplicate} duplicate" in capsys.readouterr().err
    found = ["same", "same", "\u00e9\U0001f600", "\\xff\x00\x1b[0m", "last"]
    assert messages(site.port) == found
    assert {event["source"] for event in stored(site.port)} == {"nas"}


def test_what_is_appended_to_a_file_is_new_and_the_rest_is_not(site, tmp_path, capsys, send):
    log = tmp_path / "log"
    log.write_text("one\ntwo")
    send(log)
    append(log, "\nmore\n")
    send(log)
    assert "3 sent, 1 new, 2 duplicate" in capsys.readouterr().err


def test_another_line_at_a_known_place_is_another_event_and_no_conflict(
    site, tmp_path, capsys, send
):
    log = tmp_path / "log"
    log.write_text("2026-01-01T00:00:00Z same\nsame\n")
    send(log)
    log.write_text("2026-01-01T00:00:00Z SAME\nsame\n")
    send(log)
    assert "2 sent, 2 new, 0 duplicate, 0 conflict" in capsys.readouterr().err


def test_an_endless_line_is_cut_and_the_lines_after_it_are_whole(tmp_path):
    limits = FAST._replace(line_bytes=1000)
    text = "a" * 2500 + "\n" + "b" * 1000 + "\nshort\n" + "c" * 1001 + "\n" + "d" * 200_000
    (tmp_path / "log").write_text(text)
    options = {"follows": False, "keeps_place": False}
    reading = LogReading(tmp_path / "log", limits=limits, **options).look()
    found = reading.read()
    assert found[:4] == ["a" * 1000, "a" * 1000, "a" * 500, "b" * 1000]
    assert found[4:7] == ["short", "c" * 1000, "c"]
    assert found[7:] == ["d" * 1000] * 200
    other = LogReading(tmp_path / "log", limits=limits._replace(read_bytes=77), **options).look()
    other.read()
    assert other.ids == reading.ids


def test_a_line_of_300_kilobytes_is_cut_at_a_character(site, tmp_path, send):
    text = "x" + "\u00e9" * 150_000
    (tmp_path / "log").write_text(text + "\n")
    assert send(tmp_path / "log") == 0
    found = messages(site.port)
    assert len(found) == 2
    assert "".join(found) == text


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "log").write_bytes(b"\xef\xbb\xbf2026-01-01T00:00:00Z one\n\xef\xbb\xbftwo\n")
    reading = LogReading(tmp_path / "log").look()
    assert reading.read() == ["2026-01-01T00:00:00Z one", "\ufefftwo"]


def test_events_as_json_may_begin_with_a_byte_order_mark(site, tmp_path):
    (tmp_path / "log").write_bytes(b"\xef\xbb\xbf" + lines([sample("1")]))
    assert ship(local(site.port), tmp_path / "log") == 0
    assert len(stored(site.port)) == 1


@pytest.mark.parametrize("mark", ["\ufeff", ""])
@pytest.mark.parametrize("name", ["utf-16-le", "utf-16-be"])
def test_utf_16_is_refused_in_a_sentence(tmp_path, capsys, name, mark):
    (tmp_path / "log").write_bytes((mark + "one\n").encode(name))
    assert ship("127.0.0.1:1", tmp_path / "log", topic="t") == 1
    assert "log: is UTF-16, not UTF-8" in capsys.readouterr().err


def test_a_follower_leaves_utf_16_out_and_goes_on_with_the_next_file(tmp_path, capsys):
    log = tmp_path / "log"
    log.write_bytes("\ufeffone\n".encode("utf-16"))
    reading = LogReading(log).look()
    assert reading.read() == []
    assert "it is left out" in capsys.readouterr().err
    os.rename(str(log), str(log) + ".1")
    log.write_text("two\n")
    assert reading.look().read() == ["two"]


def test_gzip_is_inflated(site, tmp_path, send):
    with gzip.open(str(tmp_path / "log.gz"), "wb") as file:
        file.write(b"one\ntwo")
    assert send(tmp_path / "log.gz") == 0
    assert messages(site.port) == ["one", "two"]


def test_gzip_in_a_pipe_is_refused_in_a_sentence(tmp_path):
    with Child(tmp_path, "publish", "--url", "127.0.0.1:1", "--topic", "t") as child:
        child.process.stdin.write(gzip.compress(b"one\n" * 1000) + b"\n")
        child.process.stdin.close()
        assert child.process.wait(10) == 1
    assert "is gzip" in child.said()


def test_an_unfinished_line_is_left_for_the_next_run_if_there_is_one(site, tmp_path, send):
    log = tmp_path / "log"
    log.write_text("whole\nhal")
    send(log, state=tmp_path / "place")
    assert messages(site.port) == ["whole"]
    append(log, "f\nnext\n")
    send(log, state=tmp_path / "place")
    assert messages(site.port) == ["whole", "half", "next"]


def test_the_unfinished_line_of_a_rotated_file_is_a_line(tmp_path):
    log = tmp_path / "log"
    log.write_text("one\ntwo")
    reading = LogReading(log).look()
    assert reading.read() == ["one"]
    os.rename(str(log), str(log) + ".1")
    assert reading.look().read() == ["two"]


def test_a_hole_is_waited_for_until_it_is_data(tmp_path):
    log = tmp_path / "log"
    log.write_bytes(b"one\n" + b"\0" * 20 + b"rest\n")
    reading = LogReading(log).look()
    assert reading.read() == ["one"]
    with open(str(log), "r+b") as file:
        file.seek(4)
        file.write(b"two\n" + b"x" * 16)
    assert reading.look().read() == ["two", "x" * 16 + "rest"]


def test_a_hole_that_stays_is_none(tmp_path):
    log = tmp_path / "log"
    log.write_bytes(b"one\n" + b"\0" * 20 + b"two\n")
    reading = LogReading(log, limits=FAST._replace(hole_s=0)).look()
    assert reading.read() == ["one", "two"]


def test_a_file_whose_blocks_are_reserved_has_no_lines_in_them(tmp_path):
    log = tmp_path / "log"
    log.write_bytes(b"one\n" + b"\0" * 100_000)
    reading = LogReading(log, limits=FAST._replace(hole_s=0)).look()
    assert reading.read() == ["one"]


# ---- Pipes ----


def test_lines_from_a_pipe_are_sent_as_they_come(tmp_path):
    with Program(tmp_path / "pipe.db") as program:
        arguments = ("publish", "--url", local(program.port), "--topic", "t")
        with Child(tmp_path, *arguments) as child:
            for number in range(3):
                child.process.stdin.write(b"line %d\nhalf" % number)
                child.process.stdin.flush()
                wait_until(lambda n=number: len(messages(program.port)) == n + 1)
            child.process.stdin.close()
            assert child.process.wait(10) == 0
        expected = ["line 0", "halfline 1", "halfline 2", "half"]
        assert messages(program.port) == expected


@pytest.fixture
def pipe(tmp_path):
    """A named pipe; writes to it wait for a reader."""
    path = str(tmp_path / "pipe")
    os.mkfifo(path)

    def write(text):
        threading.Thread(target=append, args=(path, text), daemon=True).start()
        return path

    return write


def test_an_equal_line_from_a_named_pipe_is_another_event(site, pipe, send):
    for _ in range(2):
        assert send(pipe("disk full\n")) == 0
    assert messages(site.port) == ["disk full", "disk full"]


def test_a_named_pipe_is_followed_from_writer_to_writer(site, pipe, tmp_path):
    path = pipe("one\n")
    arguments = ("--url", local(site.port), "--topic", "t", "--follow", path)
    with Child(tmp_path, "publish", *arguments):
        wait_until(lambda: messages(site.port) == ["one"])
        pipe("two\n")
        wait_until(lambda: messages(site.port) == ["one", "two"])


class PipeReading:
    """A named pipe as `publish` reads it, a batch a call; nothing is sent."""

    def __init__(self, path, **settings):
        settings = aggregator.PublishSettings((path,), topic="t", limits=FAST, **settings)
        if settings.follow:
            report = aggregator.Report("line")
            self.batches = aggregator._batches_of_pipe(path, settings, report)
        else:
            self.batches = aggregator._batches_of_files((path,), settings, [])

    def next(self):
        """The messages of the next batch. Raises TimeoutError where none comes."""
        found = []
        thread = threading.Thread(target=lambda: found.append(next(self.batches)), daemon=True)
        thread.start()
        thread.join(10)
        if not found:
            raise TimeoutError("nothing comes out of the pipe")
        return [json.loads(event)["payload"]["message"] for event in found[0].events]


def test_a_writer_that_comes_before_the_last_line_of_another_is_taken_is_read(pipe):
    path = pipe("one\ntwo")
    reading = PipeReading(path, follow=True)
    assert reading.next() == ["one"]
    # The end was read. Now the service keeps it waiting, and somebody writes.
    assert reading.next() == ["two"]
    append(path, "three\n")
    assert reading.next() == ["three"]


def test_what_was_written_into_a_pipe_before_it_lost_its_name_is_read(pipe):
    path = pipe("one\ntwo")
    reading = PipeReading(path, follow=True)
    assert reading.next() == ["one"]
    assert reading.next() == ["two"]
    append(path, "three\n")
    os.remove(path)
    os.mkfifo(path)
    assert reading.next() == ["three"]
    pipe("of the new pipe\n")
    assert reading.next() == ["of the new pipe"]


def test_the_last_lines_of_writers_that_do_not_end_them_are_not_joined(site, pipe, tmp_path):
    path = pipe("first")
    arguments = ("--url", local(site.port), "--topic", "t", "--follow", path)
    with Child(tmp_path, "publish", *arguments):
        wait_until(lambda: messages(site.port) == ["first"])
        for number in range(10):
            append(path, f"line {number}")
            time.sleep(aggregator.FILE_POLL_S / 8)
        expected = ["first"] + [f"line {number}" for number in range(10)]
        wait_until(lambda: messages(site.port) == expected)


def test_a_new_pipe_is_read_although_a_silent_writer_holds_the_old_one(pipe):
    path = pipe("one\ntwo")
    reading = PipeReading(path, follow=True)
    assert reading.next() == ["one"]
    assert reading.next() == ["two"]
    with open(path, "w"):
        os.remove(path)
        os.mkfifo(path)
        pipe("of the new pipe\n")
        assert reading.next() == ["of the new pipe"]


def test_a_pipe_that_is_read_once_takes_no_more_when_its_end_was_read(pipe):
    path = pipe("one\ntwo")
    reading = PipeReading(path)
    assert reading.next() == ["one"]
    assert reading.next() == ["two"]
    with pytest.raises(OSError) as caught:
        os.open(path, os.O_WRONLY | os.O_NONBLOCK)
    assert caught.value.errno == errno.ENXIO


def test_nothing_that_passes_ends_who_follows_a_named_pipe(site, pipe, tmp_path):
    path = pipe("one\n")
    arguments = ("--url", local(site.port), "--topic", "t", "--follow", path)
    with Child(tmp_path, "publish", *arguments) as child:
        wait_until(lambda: messages(site.port) == ["one"])
        # By now the follower waits for the next writer.
        time.sleep(2 * aggregator.FILE_POLL_S)
        os.remove(path)
        wait_until(lambda: os.strerror(errno.ENOENT) in child.said())
        append(path, "a regular file\n")
        wait_until(lambda: "is no pipe any more" in child.said())
        os.remove(path)
        os.mkfifo(path)
        with open(path, "wb") as file:
            size = file.write(gzip.compress(os.urandom(100_000)))
        # A writer that came before the end of this one could not be told from it.
        wait_until(lambda: f"{size:,} bytes were left out" in child.said())
        assert "is gzip" in child.said()
        pipe("two\n")
        wait_until(lambda: messages(site.port) == ["one", "two"])
        wait_until(lambda: "waiting" not in child.last_line())
        assert child.process.poll() is None


def test_a_pipe_under_the_name_of_a_followed_file_is_said_and_not_opened(tmp_path):
    log = tmp_path / "log"
    os.mkfifo(str(log))
    reading = LogReading(log).look()
    assert reading.log.trouble() == f"{log}: is no regular file"
    with pytest.raises(OSError, match="is no regular file"):
        aggregator.LogBytes(str(log))
    os.remove(str(log))
    log.write_text("one\n")
    assert reading.look().read() == ["one"]


def test_a_place_in_a_named_pipe_is_refused_in_a_sentence(pipe, tmp_path):
    os_path = pipe("")
    with pytest.raises(aggregator.ClientError, match="is no regular file"):
        ship("127.0.0.1:1", os_path, topic="t", state=tmp_path / "place")


@needs_linux
def test_an_endless_input_takes_no_more_memory_than_a_short_one(tmp_path):
    def behave(events):
        # At first slowly, so that there is time to read far ahead.
        if len(fake.asked) == 1:
            time.sleep(0.5)
        return taken(events)

    peaks = []
    with Fake(behave) as fake:
        code = (
            f"import re, sys\nsys.path.insert(0, {HERE!r})\nimport aggregator\n"
            f"aggregator.main(['publish', '--url', {fake.url!r}, '--topic', 't'])\n"
            "status = open('/proc/self/status').read()\n"
            "print(re.search('VmHWM:[^0-9]*([0-9]+)', status)[1])"
        )
        for size in (1_000_000, 48_000_000):
            fake.asked.clear()
            command = [sys.executable, "-c", code]
            found = subprocess.run(command, input=b"x" * size, capture_output=True, timeout=30)
            peaks.append(int(found.stdout) * 1024)
    assert peaks[1] < peaks[0] + 16_000_000
    assert peaks[1] < 64_000_000


# ---- The time of a line ----

ARRIVAL = aggregator.parse_timestamp("2026-11-28T00:30:00Z")
LINE_TIMES = text_table("""
    ISO 8601                | 2026-11-27T21:50:46.123Z a          | 2026-11-27T21:50:46.123000Z
    offset                  | 2026-11-27T21:50:46+05:30 a         | 2026-11-27T16:20:46.000000Z
    comma, blank, offset    | 2026-11-27 21:50:46,5 -0100 a       | 2026-11-27T22:50:46.500000Z
    brackets, local         | [2026-11-27 21:50:46] a             | 2026-11-27T20:50:46.000000Z
    local in summer         | 2026-07-27 21:50:46 a               | 2026-07-27T19:50:46.000000Z
    nanoseconds             | 2026-11-27T21:50:46.123456789Z      | 2026-11-27T21:50:46.123456Z
    syslog                  | Nov 27 21:50:46 host                | 2026-11-27T20:50:46.000000Z
    syslog of last year     | Dec  4 21:50:46 host                | 2025-12-04T20:50:46.000000Z
    syslog by another clock | Nov 28 02:10:00 host                | 2026-11-28T01:10:00.000000Z
    Apache                  | [Sun Dec 04 04:47:44 2005] [notice] | 2005-12-04T03:47:44.000000Z
    Apache 2.4              | [Sun Dec 04 04:47:44.25 2005] a     | 2005-12-04T03:47:44.250000Z
    offset of hours         | 2026-11-27T21:50:46+01 a            | 2026-11-27T20:50:46.000000Z
    a number is no offset   | 2026-11-27 21:50:46 -10 degrees     | 2026-11-27T20:50:46.000000Z
    a word is no zone       | 2026-11-27 21:50:46 Zones           | 2026-11-27T20:50:46.000000Z
    a number is no year     | Nov 27 21:50:46 1234 bytes          | 2026-11-27T20:50:46.000000Z
    29th of February        | Feb 29 10:00:00 host                | 2024-02-29T09:00:00.000000Z
""")
NO_LINE_TIMES = text_table("""
    none                             | started
    later in the line                | at 2026-11-27T21:50:46Z
    no month 13                      | 2026-13-27T21:50:46Z a
    no 31st of November              | Nov 31 10:00:00 host
    hour 24                          | 2026-11-27 24:50:46 a
    a date alone                     | 2026-11-27 started
    more digits                      | 2026-11-27 21:50:461
    numbers                          | 081109 203615 148 INFO
    before the calendar              | 0001-01-01T00:00:00+05:00 a
    no 30th of February              | Feb 30 10:00:00 host
""")


@pytest.fixture
def in_vienna(monkeypatch):
    """One hour ahead of UTC, two in summer."""
    monkeypatch.setenv("TZ", "CET-1CEST,M3.5.0,M10.5.0/3")
    time.tzset()
    aggregator._second_of.cache_clear()
    yield
    monkeypatch.undo()
    time.tzset()
    aggregator._second_of.cache_clear()


@with_cases("line, expected", LINE_TIMES)
def test_the_time_at_the_start_of_a_line_is_read(in_vienna, line, expected):
    assert aggregator.time_of_line(line.encode(), ARRIVAL) == expected


@with_cases("line", NO_LINE_TIMES)
def test_what_is_no_time_of_a_line_is_not_taken_for_one(line):
    assert aggregator.time_of_line(line.encode(), ARRIVAL) == ""


def test_the_time_of_a_line_is_the_events_and_without_one_it_is_the_arrival(site, tmp_path, send):
    (tmp_path / "log").write_text("2001-02-03T04:05:06Z one\n  at main()\n")
    send(tmp_path / "log")
    first, second = stored(site.port)
    assert first["timestamp"] == "2001-02-03T04:05:06.000000Z"
    assert first["payload"]["message"] == "2001-02-03T04:05:06Z one"
    arrival = aggregator.parse_timestamp(second["timestamp"])
    assert abs(arrival / 1e6 - time.time()) < 60


def test_the_time_of_a_line_can_be_left_alone(site, tmp_path, send):
    (tmp_path / "log").write_text("2001-02-03T04:05:06Z one\n")
    send(tmp_path / "log", time="arrival")
    assert stored(site.port)[0]["timestamp"] > "2026"
    send(tmp_path / "log")
    assert len(stored(site.port)) == 1


# ---- The id of a line ----

PAST = "2026-01-01T00:00:00Z one\n  at main()\n  at main()\n2026-01-01T00:00:01Z two\n"


def test_a_line_has_the_same_id_with_and_without_a_place(tmp_path):
    (tmp_path / "log").write_text(PAST)
    reading = LogReading(tmp_path / "log").look()
    reading.read()
    assert ids_of(tmp_path / "log") == reading.ids
    assert len(set(reading.ids)) == 4


@pytest.mark.parametrize("name", ["log.1", "log-20261127", "log.2026-11-27"])
def test_a_line_keeps_its_id_under_the_name_of_a_rotated_file(tmp_path, name):
    log = tmp_path / "log"
    log.write_text(PAST)
    before = ids_of(log)
    os.rename(str(log), str(tmp_path / name))
    log.touch()
    assert ids_of(tmp_path / name) == before


def test_a_line_keeps_its_id_in_a_copy_and_in_gzip(tmp_path):
    log = tmp_path / "log"
    log.write_text(PAST)
    before = ids_of(log)
    copy_and_truncate(log, tmp_path / "log.2")
    assert ids_of(tmp_path / "log.2") == before
    compress(tmp_path / "log.2")
    assert ids_of(tmp_path / "log.2.gz") == before


def test_lines_without_any_time_keep_their_ids_under_a_new_name(tmp_path):
    log = tmp_path / "log"
    log.write_text("tick\ntick\n")
    before = ids_of(log)
    os.rename(str(log), str(log) + ".1")
    log.touch()
    assert ids_of(str(log) + ".1") == before


def test_the_same_lines_of_another_log_have_other_ids(tmp_path):
    for name in ("worker.1", "worker.2"):
        (tmp_path / name).write_text(PAST)
    assert not set(ids_of(tmp_path / "worker.1")) & set(ids_of(tmp_path / "worker.2"))


def test_ids_do_not_change_when_the_place_is_lost(tmp_path):
    log = tmp_path / "log"
    reading = LogReading(log).look()
    for start in range(0, 40, 10):
        log.write_text(numbered(start, start + 10))
        reading.look().read()
        os.rename(str(log), f"{log}.{9 - start // 10}")
    compress(str(log) + ".8")
    log.write_text(numbered(40, 50))
    reading.look().read()
    anew = LogReading(log).look()
    assert line_numbers(anew.read()) == list(range(50))
    assert anew.ids == reading.ids


def test_equal_lines_without_a_time_are_new_after_a_truncation(tmp_path):
    log = tmp_path / "log"
    log.write_text("tick\ntick\ntick\n")
    reading = LogReading(log).look()
    reading.read()
    log.write_text("tick\n")
    assert reading.look().read() == ["tick"]
    assert len(set(reading.ids)) == 4


def test_equal_lines_are_new_in_a_file_that_took_over_the_inode(tmp_path):
    log = tmp_path / "log"
    log.write_text("tick\ntick\n")
    reading = LogReading(log).look()
    reading.read()
    mark = reading.place["files"][0]
    log.write_text("tick\n")
    # The first file is gone, and the second has its inode.
    again = LogReading(log, {"files": [mark]}).look()
    assert again.read() == ["tick"]
    assert again.ids[0] not in reading.ids


def test_a_line_with_a_time_that_begins_two_files_is_stored_twice(tmp_path):
    log = tmp_path / "log"
    log.write_text("2026-01-01T00:00:00Z start\n")
    reading = LogReading(log).look()
    reading.read()
    os.rename(str(log), str(log) + ".1")
    log.write_text("2026-01-01T00:00:00Z start\n")
    reading.look().read()
    assert len(set(reading.ids)) == 2


RETRY = "2026-11-27 21:50:46 retry\n"


def test_an_equal_line_at_an_equal_place_of_a_file_that_begins_otherwise_is_new(tmp_path):
    log = tmp_path / "log"
    log.write_text("2026-11-27 21:50:46 a\n" + RETRY)
    reading = LogReading(log).look()
    reading.read()
    rotate(log, 1, "2026-11-27 21:50:47 b\n" + RETRY)
    assert len(reading.look().read()) == 2
    assert len(set(reading.ids)) == 4
    assert ids_of(log) + ids_of(f"{log}.1") == reading.ids[2:] + reading.ids[:2]


def test_a_line_with_a_time_keeps_its_id_in_a_copy_that_begins_without_one(tmp_path):
    log = tmp_path / "log"
    log.write_text("time;text\n" + RETRY * 2)
    before = ids_of(log)
    copy_and_truncate(log, tmp_path / "log.1")
    assert ids_of(tmp_path / "log.1")[1:] == before[1:]


@pytest.mark.parametrize("keeps_place", [True, False])
def test_no_id_is_used_again_after_the_place_was_lost(tmp_path, keeps_place):
    log = tmp_path / "log"
    ids = []
    for _ in range(2):
        log.write_text("tick\n")
        reading = LogReading(log, keeps_place=keeps_place).look()
        reading.read()
        for _ in range(3):
            os.truncate(str(log), 0)
            reading.look().read()
            append(log, "tick\n")
            assert reading.look().read() == ["tick"]
        ids.append(reading.ids)
    first, second = ids
    assert len(set(first + second)) == 7
    assert first[0] == second[0]


def test_a_line_that_is_sent_again_after_a_crash_keeps_its_nonce(tmp_path):
    log = tmp_path / "log"
    log.write_text("tick\n")
    reading = LogReading(log).look()
    reading.read()
    rotate(log, 1, "x\n")
    reading.look().read()
    for text in ("tick\n", RETRY, RETRY):
        rotate(log, 2, text)
        reading.look()
        crashed = LogReading(log, reading.place).look()
        assert reading.read() == crashed.read()
        assert reading.ids[-1:] == crashed.ids


ROOTS = {
    "not used": ([], "ab"),
    "others used": (["cd", "cd~3~salt", ""], "ab"),
    "used": (["ab"], "ab~1~new"),
    "used with a nonce": (["ab~1~salt", "ab~7~other", "cd~9~salt"], "ab~8~new"),
}


@with_cases("used, expected", ROOTS)
def test_a_root_that_is_used_gets_a_nonce_that_is_not(used, expected):
    assert aggregator.tell_apart("ab", used, "new") == expected


ROTATED_NAMES = text_table("""
    number                      | app.log.1                | app.log
    number, compressed          | app.log.12.gz            | app.log
    date                        | app.log-20261127         | app.log
    date and time               | app.log.2026-11-27_21-50 | app.log
    date before the extension   | app-20261127.log.gz      | app.log
    number before the extension | app.3.log                | app.log
    date with hyphens           | app.log-2026-11-27       | app.log
    the same and compressed     | app.log-2026-11-27.gz    | app.log
    date with hyphens and hour  | app.log-2026-11-27-21    | app.log
    the same before extension   | app-2026-11-27.log       | app.log
    date and counter            | app-2026-11-27.0.log.gz  | app.log
    month, day and year         | app-11-27-2026-1.log.gz  | app.log
    present                     | app.log                  | app.log
    another instance            | worker-2.log             | worker-2.log
    backup                      | app.log.bak              | app.log.bak
""")


@with_cases("name, expected", ROTATED_NAMES)
def test_the_name_before_the_rotation_is_seen_in_the_name_after_it(name, expected):
    assert aggregator.rotated_from(name) == expected


# ---- Rotation ----


@pytest.fixture
def log(tmp_path):
    """A log with one line, in a folder of its own."""
    path = tmp_path / "logs" / "app.log"
    path.parent.mkdir()
    path.write_text(numbered(0, 1))
    return path


def rotate(log, number=1, text=""):
    """Rename a log and begin it anew."""
    os.rename(str(log), f"{log}.{number}")
    log.write_text(text)


def test_files_that_came_and_were_renamed_between_two_looks_are_read_in_order(log):
    reading = LogReading(log).look()
    for start in range(1, 5):
        rotate(log, 9 - start, numbered(start, start + 1))
    assert line_numbers(reading.look().read()) == [0, 1, 2, 3, 4]


def test_a_file_is_read_to_its_end_although_it_was_deleted(log):
    reading = LogReading(log).look()
    append(log, numbered(1, 3))
    os.remove(str(log))
    log.write_text(numbered(3, 4))
    assert line_numbers(reading.look().read()) == [0, 1, 2, 3]


def test_late_lines_of_a_rotated_file_are_read(log):
    reading = LogReading(log).look()
    rotate(log, 1, numbered(1, 2))
    assert line_numbers(reading.look().read()) == [0, 1]
    append(str(log) + ".1", numbered(2, 3))
    append(log, numbered(3, 4))
    assert line_numbers(reading.look().read()) == [2, 3]


def test_a_rotated_file_gives_way_only_when_it_is_quiet(log):
    reading = LogReading(log, limits=FAST._replace(quiet_s=60)).look()
    rotate(log, 1, numbered(2, 3))
    assert line_numbers(reading.look().read()) == [0]
    append(str(log) + ".1", numbered(1, 2))
    assert line_numbers(reading.read()) == [1]
    os.utime(str(log) + ".1", (0, 0))
    reading.log._files[0].read_s -= 100
    assert line_numbers(reading.read()) == [2]


def test_a_copy_before_a_truncation_is_read_on_from_the_place(log):
    reading = LogReading(log).look()
    reading.read()
    append(log, numbered(1, 5))
    copy_and_truncate(log, str(log) + ".1")
    append(log, numbered(5, 6))
    assert line_numbers(reading.look().read()) == [1, 2, 3, 4, 5]


def test_a_copy_before_a_truncation_is_not_read_again(log):
    reading = LogReading(log).look()
    assert line_numbers(reading.read()) == [0]
    copy_and_truncate(log, str(log) + ".1")
    append(log, numbered(1, 2))
    assert line_numbers(reading.look().read()) == [1]
    copy_and_truncate(log, str(log) + ".0")
    append(log, numbered(2, 3))
    assert line_numbers(reading.look().read()) == [2]


def test_a_log_that_was_copied_and_truncated_twice_between_two_looks_is_read_in_order(log):
    reading = LogReading(log).look()
    append(log, numbered(1, 3))
    copy_and_truncate(log, str(log) + ".2")
    append(log, numbered(3, 5))
    copy_and_truncate(log, str(log) + ".1")
    append(log, numbered(5, 6))
    assert line_numbers(reading.look().read()) == [0, 1, 2, 3, 4, 5]


def test_a_log_that_is_at_once_longer_than_before_its_truncation_is_read_from_its_start(log):
    reading = LogReading(log).look()
    reading.read()
    log.write_text(numbered(1, 9))
    assert line_numbers(reading.read()) == []
    assert line_numbers(reading.look().read()) == list(range(1, 9))


def test_what_a_truncation_took_is_said_with_numbers(log, capsys):
    reading = LogReading(log).look()
    append(log, numbered(1, 3))
    reading.look()
    os.truncate(str(log), 0)
    reading.look()
    told = capsys.readouterr().err
    assert f"and {3 * len(numbered(0, 1))} bytes that were seen behind" in told
    assert "read up to byte 0" in told


DATED = "2026-01-01T00:00:00Z start\n2026-01-01T00:00:01Z line 0\n"
DATED_TEXTS = {
    "two times": DATED,
    "a microsecond": "2026-01-01T00:00:00.000001Z line 0\n",
    "a header": "time;text\n" + DATED,
}
UNDATED_TEXTS = {
    "no time": "line 0\nline 0\n",
    "one second": numbered(0, 1) * 2,
    "one millisecond": "2026-01-01 00:00:00,123 line 0\n" * 2,
    "a time within": "[a] 2026-01-01T00:00:00Z\n[b] 2026-01-01T00:00:01Z\n",
}


@with_cases("text", DATED_TEXTS)
def test_a_copy_of_lines_that_can_be_written_only_once_is_not_read_again(log, text):
    log.write_text(text)
    reading = LogReading(log).look()
    reading.read()
    shutil.copyfile(str(log), str(log) + ".1")
    rotate(log, 2, numbered(1, 2))
    assert line_numbers(reading.look().read()) == [1]
    assert line_numbers(reading.again().read()) == []


@with_cases("text", UNDATED_TEXTS)
def test_what_may_be_a_copy_or_a_new_file_is_read_as_new_and_said(log, capsys, text):
    log.write_text(text)
    reading = LogReading(log).look()
    found = reading.read()
    shutil.copyfile(str(log), str(log) + ".1")
    rotate(log, 2, numbered(1, 2))
    assert reading.look().read() == found + ["2026-01-01T00:00:00Z line 1"]
    assert len(set(reading.ids)) == len(reading.ids)
    told = capsys.readouterr().err
    assert f"{log}.1: {len(text)} bytes are read as new lines, although" in told


def test_files_with_the_same_lines_of_one_second_are_all_read(log):
    log.write_text(RETRY * 3)
    reading = LogReading(log).look()
    found = reading.read()
    for number in range(9, 4, -1):
        rotate(log, number, RETRY * 3)
    found += reading.look().read()
    assert found == [RETRY.strip()] * 18
    assert len(set(reading.ids)) == 18


def test_a_file_that_begins_as_an_open_one_and_goes_on_is_read(log):
    log.write_text(RETRY)
    reading = LogReading(log).look()
    reading.read()
    rotate(log, 2, RETRY + numbered(1, 3))
    rotate(log, 1, numbered(3, 4))
    found = reading.look().read()
    assert found[0] == RETRY.strip()
    assert line_numbers(found[1:]) == [1, 2, 3]
    assert len(set(reading.ids)) == 5


def test_files_with_the_same_lines_that_came_while_nobody_followed_are_all_read(log):
    reading = LogReading(log).look()
    reading.read()
    for number in (3, 2, 1):
        rotate(log, number, RETRY * 3)
    again = reading.again()
    assert again.read() == [RETRY.strip()] * 9
    assert len(set(again.ids)) == 9


@pytest.mark.parametrize("is_first_gone", [True, False])
def test_a_gzip_with_the_header_of_another_file_is_read(log, is_first_gone):
    header = "c" * 300 + "\n"
    log.write_text(header + "1\n")
    reading = LogReading(log).look()
    found = reading.read()
    for texts in ("2", "34"):
        for text in texts:
            rotate(log, 9 - int(text), f"{header}{text}\n")
            compress(f"{log}.{9 - int(text)}")
        reading = reading.again()
        found += reading.read()
        if is_first_gone and texts == "2":
            os.remove(f"{log}.7.gz")
    assert [text for text in found if len(text) == 1] == ["1", "2", "3", "4"]


def test_a_gzip_of_a_file_that_is_there_is_left_alone_until_that_is_gone(log):
    reading = LogReading(log, limits=FAST._replace(copy_s=60)).look()
    reading.read()
    rotate(log, 1, numbered(1, 2))
    found = reading.look().read()
    os.link(f"{log}.1", f"{log}.1.kept")
    compress(f"{log}.1")
    os.rename(f"{log}.1.kept", f"{log}.1")
    rotate(log, 2, numbered(2, 3))
    found += reading.look().read()
    os.remove(f"{log}.1")
    rotate(log, 3, numbered(3, 4))
    found += reading.look().read()
    assert line_numbers(found) == [1, 2, 3]


@pytest.mark.parametrize("text", [numbered(0, 1), DATED], ids=["undated", "dated"])
def test_a_copy_that_is_seen_before_the_truncation_is_read_only_as_the_copy(log, text):
    log.write_text(text)
    reading = LogReading(log, limits=FAST._replace(copy_s=60)).look()
    reading.read()
    append(log, numbered(1, 2))
    copy = log.with_name("app.log.1")
    for part in ("", text[:5], text + numbered(1, 2)):
        copy.write_text(part)
        reading.log._is_settled = False
        reading.look()
    os.truncate(str(log), 0)
    append(log, numbered(2, 3))
    assert line_numbers(reading.look().read()) == [1, 2]


def test_what_could_be_a_copy_is_read_when_its_time_is_over(log):
    log.write_text(RETRY)
    reading = LogReading(log, limits=FAST._replace(copy_s=60)).look()
    reading.read()
    log.with_name("app.log.1").write_text(RETRY)
    reading.log._is_settled = False
    assert reading.look().read() == []
    reading.log._limits = FAST
    assert reading.look().read() == [RETRY.strip()]


def test_equal_lines_are_counted_right_where_their_copy_was_compressed(log):
    log.write_text("ping\n" * 100)
    reading = LogReading(log).look()
    found = reading.read()
    copy_and_truncate(log, f"{log}.1")
    compress(f"{log}.1")
    append(log, "ping\n" * 120)
    again = reading.again()
    found += again.read()
    assert found == ["ping"] * 220
    assert not set(again.ids) & set(reading.ids)


@pytest.mark.parametrize("is_original", [True, False])
def test_a_gzip_without_times_that_came_while_nobody_looked_is_known_by_its_time(log, is_original):
    log.write_text("job done\n")
    reading = LogReading(log).look()
    reading.read()
    rotate(log, 1, "other\n")
    if not is_original:
        write_anew(log.with_name("app.log.1"), "job done\n")
    compress(f"{log}.1")
    expected = ["other"] if is_original else ["job done", "other"]
    assert reading.again().read() == expected


@with_cases(
    "line, is_copy",
    {
        "no time": ("GET / 200\n", False),
        "a clock alone": ("at 10:00:00\n", False),
        "a web server's": ('1.2.3.4 - - [27/Nov/2026:21:50:46 +0000] "GET /"\n', True),
        "JSON": ('{"level":"info","time":"2026-11-27T21:50:46Z"}\n', True),
        "syslog": ("Nov 27 21:50:46 host\n", True),
    },
)
def test_a_copy_that_came_while_nobody_looked_is_one_only_if_its_lines_tell_a_time(
    log, capsys, line, is_copy
):
    log.write_text(line)
    reading = LogReading(log).look()
    reading.read()
    append(log, "two\n")
    copy_and_truncate(log, f"{log}.1")
    append(log, "three, which is longer than all that was there before: " + "x" * 80 + "\n")
    found = reading.again().read()
    assert found[-2] == "two"
    assert (found[0] == line.strip()) != is_copy
    assert ("although" in capsys.readouterr().err) != is_copy


def write_anew(log, text):
    """The same file with other lines, a second later by its clock."""
    log.write_text(text)
    os.utime(str(log), (time.time() + 1, time.time() + 1))


@pytest.mark.parametrize("is_follower", [True, False])
def test_the_same_text_that_is_written_anew_is_new(log, capsys, is_follower):
    log.write_text("tick\n")
    reading = LogReading(log).look()
    reading.read()
    write_anew(log, "tick\n")
    again = reading if is_follower else LogReading(log, reading.place)
    assert again.look().read() == ["tick"]
    assert len(set(reading.ids + again.ids)) == 2
    told = capsys.readouterr().err
    assert "written anew" in told or "gone or truncated" in told


def test_a_file_of_dated_lines_that_is_only_touched_is_not_read_again(log):
    log.write_text(DATED)
    reading = LogReading(log).look()
    reading.read()
    write_anew(log, DATED)
    assert reading.look().read() == []
    assert reading.again().read() == []


def test_a_write_that_is_under_way_is_no_truncation(log):
    log.write_text("tick\n")
    mark = aggregator.Mark(1, offset=5, mtime_ns=1)

    class Growing(aggregator.LogBytes):
        def status(self):
            append(log, "tock\n" * self.is_asked)
            self.is_asked = True
            return super().status()

    growing = Growing(str(log))
    growing.is_asked = False
    assert not aggregator.is_rewritten(growing, mark, 10)
    growing.close()


def test_a_run_that_finds_an_empty_file_remembers_the_truncation(log):
    log.write_text("tick\n")
    reading = LogReading(log).look()
    reading.read()
    os.truncate(str(log), 0)
    empty = reading.again()
    assert empty.read() == []
    append(log, "tick\nmore\n")
    again = empty.again()
    assert again.read() == ["tick", "more"]
    assert again.ids[0] not in reading.ids


def test_a_file_without_times_that_took_the_inode_of_a_rotated_one_is_new(log):
    log.write_text("tick\n")
    reading = LogReading(log).look()
    reading.read()
    rotate(log, 1, "other\n")
    reading.look().read()
    os.remove(str(log))
    os.rename(f"{log}.1", str(log))
    append(log, "tock\n")
    assert reading.again().read() == ["tick", "tock"]


def test_a_file_is_read_on_under_a_name_that_no_rotation_gives(log):
    reading = LogReading(log).look()
    reading.read()
    append(log, numbered(1, 2))
    os.rename(str(log), str(log.with_name("yesterday")))
    log.write_text(numbered(2, 3))
    assert line_numbers(reading.again().read()) == [1, 2]


def test_the_unfinished_line_of_a_rotated_file_is_left_for_the_next_run(log):
    append(log, "hal")
    reading = LogReading(log, follows=False).look()
    assert line_numbers(reading.read()) == [0]
    rotate(log, 1, numbered(1, 2))
    again = reading.again(follows=False)
    assert line_numbers(again.read()) == [1]
    append(f"{log}.1", "f\nrest")
    last = again.again(follows=False)
    assert last.read() == ["half"]
    os.utime(f"{log}.1", (0, 0))
    assert last.again(follows=False).read() == ["rest"]


def test_a_rotated_file_that_is_still_written_to_holds_up_the_next_for_a_while_only(log):
    reading = LogReading(log, limits=FAST._replace(quiet_s=60)).look()
    rotate(log, 1, numbered(2, 3))
    assert line_numbers(reading.look().read()) == [0]
    reading.log._limits = FAST._replace(quiet_s=60, held_s=0)
    append(f"{log}.1", numbered(1, 2) + "hal")
    assert line_numbers(reading.read()) == [1, 2]
    append(f"{log}.1", "f\n")
    assert reading.read() == ["half"]


@with_cases("is_restarted", {"while it is followed": False, "after a restart": True})
def test_a_writer_that_comes_back_to_a_rotated_file_is_read(log, is_restarted):
    limits = FAST._replace(kept_s=0)
    reading = LogReading(log, limits=limits).look()
    rotate(log, 1, numbered(2, 3))
    assert line_numbers(reading.look().read()) == [0, 2]
    assert reading.look().read() == []
    if is_restarted:
        reading = reading.again(limits=limits)
    append(f"{log}.1", numbered(1, 2))
    assert line_numbers(reading.look().read()) == [1]


def test_a_removed_file_is_closed_after_a_while(log):
    reading = LogReading(log, limits=FAST._replace(kept_s=0)).look()
    rotate(log, 1, numbered(1, 2))
    assert line_numbers(reading.look().read()) == [0, 1]
    os.remove(f"{log}.1")
    rotate(log, 2, numbered(2, 3))
    assert line_numbers(reading.look().read()) == [2]
    assert reading.read() == []
    assert len(reading.log.open_files()) == 2


def test_the_file_of_another_log_that_took_an_inode_is_not_read(log):
    reading = LogReading(log).look()
    rotate(log, 1, numbered(1, 2))
    assert line_numbers(reading.look().read()) == [0, 1]
    other = log.parent / "other.log"
    os.rename(f"{log}.1", str(other))
    other.write_text("2026-01-01T00:00:00Z a secret\n")
    assert reading.again().read() == []
    rotate(log, 2, numbered(2, 3))
    assert line_numbers(reading.again().read()) == [2]


def test_copies_with_one_header_of_files_that_were_not_read_are_read_once_each(log):
    header = "# " + "x" * 300 + "\n"
    reading = LogReading(log).look()
    reading.read()
    # Nothing is read meanwhile, as when the service is away.
    for number in range(1, 4):
        append(log, header + numbered(number, number + 1))
        reading.look()
        copy_and_truncate(log, f"{log}.{9 - number}")
        reading.look()
    found = [text for text in reading.look().read() if not text.startswith("#")]
    assert line_numbers(found) == [1, 2, 3]
    assert len(set(reading.ids)) == len(reading.ids)


def test_a_file_that_was_copied_and_filled_again_before_it_was_read_is_in_its_copy(log):
    header = "# " + "x" * 300 + "\n"
    reading = LogReading(log).look()
    reading.read()
    copy_and_truncate(log, f"{log}.9")
    append(log, header + numbered(1, 2))
    reading.look()
    copy_and_truncate(log, f"{log}.8")
    append(log, header + numbered(2, 4))
    found = [text for text in reading.look().read() if not text.startswith("#")]
    assert line_numbers(found) == [1, 2, 3]


def test_a_new_file_with_the_inode_of_one_that_was_left_unread_is_read(log):
    older = log.parent / "app.log.1"
    older.write_text("started\n")
    os.utime(str(older), (1, 1))
    reading = LogReading(log, reads_older=False, keeps_place=False).look()
    assert line_numbers(reading.read()) == [0]
    # As if it were removed, and the next file took its inode.
    removed = log.parent / "removed"
    os.rename(str(older), str(removed))
    os.rename(str(log), str(older))
    removed.write_text("started\nnew\n")
    os.rename(str(removed), str(log))
    assert reading.look().read() == ["started", "new"]


def test_a_run_waits_for_a_file_that_is_just_being_compressed(log, tmp_path):
    header = "# " + "x" * 300 + "\n"
    limits = FAST._replace(copy_s=0.2)
    log.write_text(header + numbered(0, 1))
    place = tmp_path / "place"
    with Fake(taken) as fake:
        assert ship(fake.url, log, topic="t", state=place, limits=limits) == 0
        for number in (1, 2):
            append(log, numbered(10 * number, 10 * number + 1))
            rotate(log, 5 - number, header + numbered(number, number + 1))
            compress(f"{log}.{5 - number}")
        assert ship(fake.url, log, topic="t", state=place, limits=limits) == 0
        texts = [event["payload"]["message"] for asked in fake.asked for event in asked]
    found = [text for text in texts if not text.startswith("#")]
    assert line_numbers(found)[-4:] == [10, 1, 20, 2]


def test_an_older_file_that_could_not_be_decided_at_first_stays_unread(log):
    older = log.parent / "app.log.1"
    older.write_text("")
    limits = FAST._replace(copy_s=60.0)
    reading = LogReading(log, limits=limits, reads_older=False, keeps_place=False).look()
    older.write_text("old\n")
    reading.log._limits = FAST
    assert line_numbers(reading.look().read()) == [0]
    assert reading.look().read() == []


def test_a_place_of_1_0_0_is_followed_through_a_rotation(log, site, tmp_path):
    size = os.path.getsize(str(log))
    last = log.read_bytes()
    old = [log.stat().st_ino, size, 1, len(last), zlib.crc32(last)]
    place = tmp_path / "place"
    place.write_text(json.dumps({"of": str(log), "place": old}))
    words = ("--url", local(site.port), "--topic", "t", "--follow", "--state", place, log)
    with Child(tmp_path, "publish", *words) as child:
        wait_until(lambda: json.loads(place.read_text()).get("follows"))
        append(log, numbered(1, 2))
        wait_until(lambda: len(stored(site.port)) == 1)
        rotate(log, 1, numbered(2, 3))
        wait_until(lambda: len(stored(site.port)) == 2)
        assert "Traceback" not in child.said()


def test_a_follower_that_can_look_no_more_ends(log, monkeypatch):
    def fail(*_):
        raise KeyError("a bug")

    reading = LogReading(log)
    monkeypatch.setattr(reading.log, "look", fail)
    with pytest.raises(KeyError):
        aggregator._watch(reading.log, FAST, aggregator.Report("line"))
    with pytest.raises(aggregator.ClientError, match="a bug while looking for its files"):
        reading.log.read()


def test_two_files_that_begin_with_the_same_time_are_both_read(log):
    reading = LogReading(log).look()
    reading.read()
    start = "2026-01-01T00:00:09Z start\n"
    rotate(log, 3, start + numbered(1, 2))
    reading.look().read()
    rotate(log, 2, start + numbered(2, 3))
    rotate(log, 1, start + numbered(3, 4))
    found = [text for text in reading.look().read() if "start" not in text]
    assert line_numbers(found) == [2, 3]
    assert len(set(reading.ids)) == 7


def test_a_gzip_that_is_broken_is_said_so_and_does_not_keep_the_others_back(log, capsys):
    whole = gzip.compress(numbered(1, 50_000).encode())
    broken = log.parent / "app.log.1.gz"
    broken.write_bytes(whole[:-9])
    os.utime(str(broken), (0, 0))
    assert line_numbers(LogReading(log).look().read())[-1] == 0
    assert "app.log.1.gz: is not whole gzip" in capsys.readouterr().err


def test_what_was_compressed_since_is_not_read_again(log):
    reading = LogReading(log).look()
    reading.read()
    rotate(log, 1, numbered(1, 2))
    reading.look().read()
    compress(str(log) + ".1")
    rotate(log, 2, numbered(2, 3))
    assert line_numbers(reading.look().read()) == [2]


def test_several_rotations_while_nobody_followed_are_read_in_order(log):
    reading = LogReading(log).look()
    reading.read()
    append(log, numbered(1, 3))
    for start in range(3, 9, 2):
        rotate(log, 9 - start, numbered(start, start + 2))
    compress(str(log) + ".6")
    compress(str(log) + ".4")
    assert line_numbers(reading.again().read()) == list(range(1, 9))


def test_a_copy_and_truncation_while_nobody_followed_is_read_from_the_place(log):
    reading = LogReading(log).look()
    reading.read()
    append(log, numbered(1, 3))
    copy_and_truncate(log, str(log) + ".1")
    append(log, numbered(3, 20))
    assert line_numbers(reading.again().read()) == list(range(1, 20))


def test_names_with_dates_are_read_in_order(log):
    reading = LogReading(log).look()
    reading.read()
    for day in (25, 26):
        append(log, numbered(day, day + 1))
        os.rename(str(log), f"{log}-202611{day}")
    log.write_text(numbered(27, 28))
    assert line_numbers(reading.again().read()) == [25, 26, 27]


def test_late_lines_that_came_while_nobody_followed_are_read(log):
    reading = LogReading(log).look()
    rotate(log, 1, numbered(2, 3))
    reading.look().read()
    append(str(log) + ".1", numbered(1, 2))
    assert line_numbers(reading.again().read()) == [1]


def test_a_log_that_was_moved_to_another_disk_is_read_on(log):
    log.write_text(DATED)
    reading = LogReading(log).look()
    reading.read()
    os.rename(str(log), str(log) + ".moving")
    shutil.copyfile(str(log) + ".moving", str(log))
    os.remove(str(log) + ".moving")
    append(log, numbered(1, 2))
    assert line_numbers(reading.again().read()) == [1]


def test_with_a_place_the_older_files_are_read_first_and_without_one_they_are_not(log, capsys):
    rotate(log, 1, numbered(1, 2))
    assert line_numbers(LogReading(log).look().read()) == [0, 1]
    assert "reading 1 older files" in capsys.readouterr().err
    without = LogReading(log, reads_older=False).look()
    assert line_numbers(without.read()) == [1]
    compress(str(log) + ".1")
    rotate(log, 2, numbered(2, 3))
    assert line_numbers(without.look().read()) == [2]


def test_files_beyond_those_that_may_be_open_are_found_again_by_their_content(log):
    reading = LogReading(log, limits=FAST._replace(open_files=2)).look()
    for start in range(1, 6):
        rotate(log, 9 - start, numbered(start, start + 1))
        reading.look()
    assert len(reading.log.open_files()) == 2
    for number in (4, 5, 6):
        compress(f"{log}.{number}")
    assert line_numbers(reading.read()) == [0, 1, 2, 3, 4, 5]


class RotatedWhileListed:
    """Every listing of a folder sees a rotation between one name and the next.

    `app.log.2` is asked for before the rotation, `app.log.1` after it: then no name
    that was asked for is that of the file that went from the one to the other.
    """

    def __init__(self, log, rotations):
        self.log = log
        self.numbers = iter(range(10, 10 + rotations))
        self.scandir = os.scandir

    @contextlib.contextmanager
    def scan(self, folder):
        with self.scandir(folder) as entries:
            entries = sorted(entries, key=lambda entry: entry.name, reverse=True)
            yield self.pass_on(entries)

    def pass_on(self, entries):
        for entry in entries:
            if entry.name.endswith(".1"):
                self.rotate()
            yield entry

    def rotate(self):
        number = next(self.numbers, None)
        if number is not None:
            shift_and_rotate(self.log, numbered(number, number + 1))


def shift_and_rotate(log, text):
    """As logrotate and most loggers do: `.2` becomes `.3`, `.1` becomes `.2`."""
    for number in range(99, 0, -1):
        if os.path.exists(f"{log}.{number}"):
            os.rename(f"{log}.{number}", f"{log}.{number + 1}")
    rotate(log, 1, text)


@pytest.mark.parametrize("rotations", (1, 3, 30))
@pytest.mark.parametrize("is_first_look", (True, False))
@pytest.mark.parametrize("open_files", (1, 64))
def test_a_file_that_is_renamed_while_the_folder_is_listed_is_found(
    log, monkeypatch, rotations, is_first_look, open_files
):
    shift_and_rotate(log, numbered(1, 2))
    shift_and_rotate(log, numbered(2, 3))
    reading = LogReading(log, limits=FAST._replace(open_files=open_files))
    found = []
    if not is_first_look:
        found = reading.look().read()
        shift_and_rotate(log, numbered(3, 4))
    monkeypatch.setattr(os, "scandir", RotatedWhileListed(log, rotations).scan)
    # As the thread that looks does it: again and again.
    for _ in range(rotations + 1):
        reading.look()
    found += reading.read()
    first = [0, 1, 2] if is_first_look else [0, 1, 2, 3]
    assert sorted(line_numbers(found)) == [*first, *range(10, 10 + rotations)]


def test_a_look_that_ends_in_an_error_keeps_what_it_found(log, monkeypatch):
    append(log, numbered(1, 2))
    listing, calls = aggregator.list_log, []

    def list_once(path, *inodes):
        calls.append(path)
        if len(calls) % 2 == 0:
            raise OSError(errno.EMFILE, "Too many open files", path)
        return listing(path, *inodes)

    monkeypatch.setattr(aggregator, "list_log", list_once)
    reading = LogReading(log)
    found = []
    for _ in range(3):
        found += reading.look().read()
    assert line_numbers(found) == [0, 1]


def test_a_look_lists_the_folder_a_bounded_number_of_times(log, monkeypatch):
    listing, calls = aggregator.list_log, []

    def list_and_count(path, *inodes):
        calls.append(path)
        return listing(path, *inodes)

    monkeypatch.setattr(aggregator, "list_log", list_and_count)
    LogReading(log).look()
    assert len(calls) == 2
    del calls[:]
    shift_and_rotate(log, numbered(1, 2))
    monkeypatch.setattr(aggregator, "is_same_listing", lambda one, other: False)
    LogReading(log).look()
    assert len(calls) == 2 * aggregator.LOOKS_MAX


def rename_and_copy_when_opened(log, monkeypatch):
    """When `app.log.1` is opened, the next rotation by copying has just been made."""
    opens, rotated = aggregator.LogBytes, []

    def open_late(path):
        if path == f"{log}.1" and not rotated:
            rotated.append(path)
            os.rename(f"{log}.1", f"{log}.2")
            copy_and_truncate(log, f"{log}.1")
        return opens(path)

    monkeypatch.setattr(aggregator, "LogBytes", open_late)


def test_a_copy_that_took_a_listed_name_is_not_taken_for_a_new_file(log, monkeypatch):
    reading = LogReading(log).look()
    found = reading.read()
    with open(f"{log}.1", "w") as older:
        older.write(numbered(1, 2))
    rename_and_copy_when_opened(log, monkeypatch)
    reading.log._is_settled = False
    for _ in range(3):
        found += reading.look().read()
    append(log, numbered(2, 3))
    for _ in range(3):
        found += reading.look().read()
    assert sorted(line_numbers(found)) == [0, 1, 2]
    assert len(set(reading.ids)) == 3


def test_nothing_is_called_missing_whose_copy_was_only_renamed_meanwhile(log, monkeypatch, capsys):
    reading = LogReading(log).look()
    found = reading.read()
    append(log, numbered(1, 2))
    reading.look()
    copy_and_truncate(log, f"{log}.1")
    append(log, numbered(2, 3))
    opens, renamed = aggregator.LogBytes, []

    def open_late(path):
        if path == f"{log}.1" and not renamed:
            renamed.append(path)
            os.rename(path, f"{log}.2")
        return opens(path)

    monkeypatch.setattr(aggregator, "LogBytes", open_late)
    found += reading.look().read()
    assert sorted(line_numbers(found)) == [0, 1, 2]
    assert "missing" not in capsys.readouterr().err


def test_an_empty_log_that_was_compressed_is_one_file_for_ever(log):
    reading = LogReading(log).look()
    reading.read()
    os.remove(str(log))
    with gzip.open(f"{log}.1.gz", "wb"):
        pass
    for _ in range(5):
        reading.look().read()
    assert len(reading.log.place()["files"]) <= 2


def test_a_log_that_is_not_there_yet_is_said(log):
    os.remove(str(log))
    reading = LogReading(log).look()
    assert reading.log.trouble() == f"{log} is not there yet"
    append(log, numbered(1, 2))
    assert line_numbers(reading.look().read()) == [1]
    assert reading.log.trouble() == ""
    # An application that has not begun its new log is no trouble.
    os.rename(str(log), f"{log}.1")
    assert reading.look().log.trouble() == ""


def test_a_folder_that_rests_is_looked_at_no_more(log, monkeypatch):
    shift_and_rotate(log, numbered(1, 2))
    reading = LogReading(log).look()
    listings = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda folder: listings.append(folder) or scandir(folder))
    for _ in range(5):
        reading.look()
    assert listings == []


def test_a_file_that_was_removed_before_it_was_read_is_said_with_its_size(log, capsys):
    reading = LogReading(log, limits=FAST._replace(open_files=1)).look()
    for start in (1, 2):
        rotate(log, 9 - start, numbered(start, start + 1))
    reading.look()
    os.remove(str(log) + ".7")
    assert line_numbers(reading.read()) == [0, 2]
    told = capsys.readouterr().err
    assert "app.log.7: was removed before it was read" in told
    assert f"{len(numbered(1, 2))} bytes are missing" in told


def test_a_place_that_is_nowhere_any_more_is_said_with_its_offset(log, capsys):
    reading = LogReading(log).look()
    reading.read()
    log.write_text(numbered(5, 6))
    assert line_numbers(reading.again().read()) == [5]
    told = capsys.readouterr().err
    assert f"read up to byte {len(numbered(0, 1))} (line 1) is gone or truncated" in told


def test_a_file_that_is_unreadable_for_a_moment_is_reported_and_read_later(log, monkeypatch):
    reading = LogReading(log).look()
    reading.read()
    rotate(log, 1, numbered(1, 2))
    opens = aggregator.LogBytes

    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", path)

    monkeypatch.setattr(aggregator, "LogBytes", refuse)
    assert reading.look().read() == []
    assert reading.log.trouble() == f"{log}: Permission denied"
    monkeypatch.setattr(aggregator, "LogBytes", opens)
    assert line_numbers(reading.look().read()) == [1]
    assert reading.log.trouble() == ""


def test_a_file_that_cannot_be_read_for_a_moment_is_opened_again(log, monkeypatch):
    reading = LogReading(log).look()
    append(log, numbered(1, 2))

    def stale(*_):
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(reading.log.open_files()[0].bytes, "at", stale)
    with pytest.raises(OSError, match="Stale"):
        reading.read()
    assert line_numbers(reading.look().read()) == [0, 1]


def test_a_gzip_that_is_not_whole_yet_is_read_when_it_is(log):
    reading = LogReading(log).look()
    reading.read()
    whole = gzip.compress(numbered(1, 500).encode())
    squeezed = log.parent / "app.log.1.gz"
    squeezed.write_bytes(whole[:20])
    rotate(log, 2, numbered(500, 501))
    assert line_numbers(reading.look().read()) == [500]
    assert "is not whole gzip" in reading.log.trouble()
    squeezed.write_bytes(whole)
    assert line_numbers(reading.look().read()) == list(range(1, 500))


def test_a_followed_log_whose_folder_goes_away_is_waited_for(log, tmp_path):
    with Fake(taken) as fake:
        arguments = ("--url", fake.url, "--topic", "t", "--follow", log)
        with Child(tmp_path, "publish", *arguments) as child:
            wait_until(lambda: len(fake.asked) == 1)
            os.rename(str(log.parent), str(tmp_path / "away"))
            wait_until(lambda: "waiting: " in child.said())
            log.parent.mkdir()
            log.write_text("back\n")
            wait_until(lambda: len(fake.asked) == 2)
            assert child.process.poll() is None
    assert fake.asked[1][0]["payload"]["message"] == "back"


def test_a_file_that_is_not_the_one_read_before_is_said_so_and_read_from_its_start(
    site, tmp_path, capsys, send
):
    log, place = tmp_path / "log", tmp_path / "place"
    for text, is_told in (("one\ntwo\n", False), ("three\nfour\nfive\n", True), ("six\n", True)):
        log.write_text(text)  # in place: the same inode
        assert send(log, state=place) == 0
        assert ("gone or truncated" in capsys.readouterr().err) == is_told
    assert messages(site.port) == "one two three four five six".split()


class Followed:
    """A log that a process follows, and what it has stored."""

    def __init__(self, folder, port):
        self.folder = folder
        self.port = port
        self.log = folder / "app.log"
        self.place = folder / "place"

    def follow(self):
        follow = ("publish", "--url", local(self.port), "--topic", "t", "--follow")
        return Child(self.folder, *follow, "--state", self.place, self.log)

    def sees(self, *expected):
        wait_until(lambda: len(messages(self.port)) >= len(expected))
        assert messages(self.port) == list(expected)


def test_a_followed_file_loses_nothing_through_rotation_and_truncation(tmp_path):
    with Program(tmp_path / "follow.db") as program:
        followed = Followed(tmp_path, program.port)
        log = followed.log
        with followed.follow() as child:  # before the file is there
            append(log, "1\nhalf")
            followed.sees("1")
            append(log, " whole\n")
            followed.sees("1", "half whole")
            os.rename(str(log), str(log) + ".1")
            append(log, "new\nold\n")
            time.sleep(2 * aggregator.FILE_POLL_S)
            append(str(log) + ".1", "late\n")  # its writer has not been told until now
            followed.sees("1", "half whole", "late", "new", "old")
            os.truncate(str(log), 0)
            append(log, "new\n")  # the same bytes at the same place, and another event
            followed.sees("1", "half whole", "late", "new", "old", "new")
            assert child.end(signal.SIGINT) == 130


def test_a_followed_file_loses_nothing_through_restarts(tmp_path):
    with Program(tmp_path / "follow.db") as program:
        followed = Followed(tmp_path, program.port)
        log = followed.log
        append(log, "1\n")
        with followed.follow():
            followed.sees("1")
            wait_until(lambda: '"offset": 2' in followed.place.read_text())
        append(log, "while away\n")
        os.rename(str(log), str(log) + ".2")
        append(str(log) + ".2", "and more\n")
        append(log, "after\n")
        known = followed.place.read_text()
        for end in ("", "end\n"):
            with followed.follow():
                append(log, end)
                followed.sees("1", "while away", "and more", "after", *end.split())
            # As if it had been killed before it saved: the same lines, with the same
            # ids.
            followed.place.write_text(known)


def test_a_follower_takes_the_new_token_from_its_file(tmp_path):
    token, log = tmp_path / "token", tmp_path / "log"
    token.write_text("the-old-one\n")
    log.write_text("one\n")
    with Program(tmp_path / "follow.db", env={"AUTH_TOKEN": "the-new-one"}) as program:
        words = ("--url", local(program.port), "--topic", "t", "--follow", "--token-file", token)
        with Child(tmp_path, "publish", *words, log) as child:
            wait_until(lambda: "401" in child.said())
            token.write_text("the-new-one\nanother\n")

            def has_come():
                answer = program.ask("GET", "/events", Authorization="Bearer the-new-one")
                return len(answer.json["events"]) == 1

            wait_until(has_come)


def test_a_relay_takes_the_new_tokens_from_their_files(tmp_path):
    new = {"AUTH_TOKEN": "the-new-one"}
    bearer = {"Authorization": "Bearer the-new-one"}
    token_from, token_to = tmp_path / "token-from", tmp_path / "token-to"
    for token in (token_from, token_to):
        token.write_text("the-old-one\n")
    edge = Program(tmp_path / "edge.db", env=new)
    central = Program(tmp_path / "central.db", env=new)
    with edge, central:
        event = sample("1", topic="t")
        assert fetch(edge.port, "POST", "/publish", event, bearer).status == 202
        words = ["relay", "--from", local(edge.port), "--to", local(central.port)]
        words += ["--token-from-file", token_from, "--token-to-file", token_to]
        with Child(tmp_path, *words) as child:
            wait_until(lambda: f"{local(edge.port)}: 401" in child.said())
            token_from.write_text("the-new-one\n")
            wait_until(lambda: f"{local(central.port)}: 401" in child.said())
            token_to.write_text("the-new-one\n")
            wait_until(
                lambda: fetch(central.port, "GET", "/events/t/1", None, bearer).status == 200
            )


@pytest.mark.parametrize("content", (None, "", "no token", "\u00e9"))
def test_a_token_file_that_holds_no_token_is_said(tmp_path, content):
    if content is not None:
        (tmp_path / "token").write_text(content)
    done = run("publish", "--token-file", str(tmp_path / "token"), "--topic", "t", "-")
    if content == "no token":
        # Its first word could be one. The service decides.
        assert "AUTH_TOKEN_FILE" not in done.stderr
    else:
        assert done.returncode == 2
        assert str(tmp_path / "token") in done.stderr


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_the_recipe_that_renames_a_topic_loses_nothing_there_and_back(tmp_path):
    _, behind = README.split("**Rename a topic.**", 1)
    recipe = behind.split("```sh\n", 1)[1].split("```", 1)[0]
    with Program(tmp_path / "a.db") as program:
        program.publish(*[sample(str(n), topic="door/old", payload={"n": n}) for n in range(3)])
        script = recipe.replace("localhost:8000", f"127.0.0.1:{program.port}")
        script = script.replace("aggregator.py", shlex.quote(PROGRAM))
        script = script.replace("python3", shlex.quote(sys.executable))
        back = script.replace("door/old", "TEMP").replace("door/new", "door/old")
        back = back.replace("TEMP", "door/new")
        environment = clean_environment(AGGREGATOR_URL=local(program.port))
        for text, status in ((script, 0), (back, 1)):
            done = subprocess.run(
                ["sh", "-c", text],
                check=False,
                capture_output=True,
                text=True,
                cwd=str(tmp_path),
                env=environment,
                timeout=30,
            )
            assert done.returncode == status, done
            topics = [event["topic"] for event in program.listed()]
            assert topics == ["door/new"] * 3
        # Their ids are known under the old name: it would have removed the only copies.
        assert "was removed there before" in done.stderr


def test_the_start_says_how_long_events_are_kept(tmp_path):
    with Program(tmp_path / "a.db", "--retention", "30") as program:
        wait_until(lambda: "an event goes 30 s (0.0 days) after its arrival" in program.read_log())


def test_a_log_that_rotates_at_full_speed_loses_nothing(site, tmp_path):
    import logging.handlers

    log = tmp_path / "app.log"
    handler = logging.handlers.RotatingFileHandler(str(log), maxBytes=4096, backupCount=500)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    count = 10_000
    arguments = ("--url", local(site.port), "--topic", "t", "--follow", "--state")
    with contextlib.closing(handler):
        with Child(tmp_path, "publish", *arguments, tmp_path / "place", log):
            for number in range(count):
                record = logging.LogRecord("", 20, "", 0, f"line {number}", None, None)
                handler.handle(record)
            wait_until(lambda: count_stored(site.port) >= count, 30)
    assert sorted(line_numbers(messages(site.port))) == list(range(count))


@pytest.mark.parametrize("alike", [False, True], ids=["place deleted", "files alike"])
def test_chaos_loses_nothing_and_doubles_nothing(tmp_path, alike):
    """CHAOS_LINES=100000 is the full size; CHAOS_SEED repeats a run."""
    count = int(os.environ.get("CHAOS_LINES", "12000"))
    seed = int(os.environ.get("CHAOS_SEED") or random.randrange(1_000_000))
    print(f"CHAOS_SEED={seed}")
    with Chaos(tmp_path, count, count // 100, seed, alike) as chaos:
        chaos.run()
        found = messages(chaos.port)
    print(f"{chaos.kills} kills, {chaos.writer.rotations} rotations")
    equal = found.count(ChaosWriter.EQUAL)
    timed = [text for text in found if text.endswith(ChaosWriter.EQUAL_TIMED)]
    numbers = line_numbers([text for text in found if " line " in text and "time" not in text])
    assert set(numbers) == set(range(count))
    assert len(numbers) == count
    assert equal == chaos.writer.equal
    assert len(timed) == chaos.writer.equal_timed
    assert (equal > count // 100) == alike
    assert chaos.kills > 1
    assert chaos.writer.rotations > 2


# ---- Relay ----


def relayed(port):
    """What of the three topics is stored, without what each service adds."""
    found = []
    for number in range(3):
        for event in stored(port, f"logs/{number}"):
            del event["seq"], event["processed_at"]
            found.append(event)
    return found


def test_a_relay_passes_on_what_is_there_and_what_comes_in_order_and_unchanged(tmp_path):
    events = []
    for number in range(1200):
        payload = {"text": "\u00e9\0" * (number % 50)}
        topic = f"logs/{number % 3}"
        events.append(sample(str(number), topic=topic, sequence=number, payload=payload))
    with Program(tmp_path / "edge.db") as edge, Program(tmp_path / "central.db") as central:
        assert fetch(edge.port, "POST", "/publish", events[:1100]).status == 202
        fetch(edge.port, "POST", "/publish", [sample("no", topic="private")])
        fetch(central.port, "POST", "/publish", events[7:9])
        ends = ("--from", local(edge.port), "--to", local(central.port))
        place = tmp_path / "place"
        with Child(tmp_path, "relay", *ends, "--topic", "logs/*", "--state", place) as child:
            wait_until(lambda: len(relayed(central.port)) == 1100)
            fetch(edge.port, "POST", "/publish", events[1100:])
            wait_until(lambda: len(relayed(central.port)) == 1200)
            assert child.end() == 143
        assert "1,198 new, 2 duplicate" in child.said()
        assert stored(central.port, "private") == []
        assert sorted(relayed(central.port), key=str) == sorted(relayed(edge.port), key=str)
        saved = json.loads(place.read_text())
        assert saved["place"]["seq"] == 1201
        assert saved["place"]["event_id"] == "1199"
        assert saved["unit"] == "seqs"


def test_a_relay_outlives_kills_of_either_side_with_nothing_lost_doubled_or_out_of_order(tmp_path):
    chance, kills, count = random.Random(7), int(os.environ.get("RELAY_KILLS", "2")), 0
    names = ("edge.db", "central.db")
    sides = [Program(tmp_path / name) for name in names]
    ports = [side.port for side in sides]
    ends = ("--from", local(ports[0]), "--to", local(ports[1]))
    relay = ("relay", *ends, "--state", tmp_path / "place")
    child = Child(tmp_path, *relay)
    try:
        for kill in range(kills):
            for _ in range(chance.randrange(5, 15)):
                batch = samples(*range(count, count + chance.randrange(1, 300)))
                count += len(batch)
                assert fetch(ports[0], "POST", "/publish", batch).status == 202
            side = (kill + 1) % 2
            sides[side].kill()
            if kill == 1:  # the relay too, once
                child.kill()
                child = Child(tmp_path, *relay)
            sides[side] = Program(tmp_path / names[side], "--port", str(ports[side]))
        wait_until(lambda: count_stored(ports[1]) >= count, 60)
        assert child.end() == 143
        for port in ports:
            ids = ids_in(stored(port))
            assert ids == [str(number) for number in range(count)]
    finally:
        child.kill()
        for side in sides:
            side.kill()


def edge_with(first, last):
    """A service whose log holds the seqs `first` to `last`; they are the ids, too."""

    def behave(target):
        if target == "/stats":
            return 200, {"unique_processed": last}
        match = re.fullmatch(r"/events\?follow=1&after=([0-9]+)", target)
        if match is None:
            seq = int(target.rpartition("/")[2])
            return 200, dict(sample(str(seq)), seq=seq, processed_at="then")
        after = int(match[1])
        if after + 1 < first:
            return 410, {"type": "/docs#gone", "oldest_seq": first}
        text = "\n"
        for seq in range(after + 1, last + 1):
            text += json.dumps(dict(sample(str(seq)), seq=seq, processed_at="then")) + "\n\n"
        return 200, text

    return behave


def test_a_relay_says_what_is_gone_sets_aside_what_is_refused_and_goes_on(tmp_path, capsys):
    place = tmp_path / "place"
    with Fake(edge_with(10, 19)) as edge, Fake(refuse_thirteen) as central:
        assert pass_on(edge, central, place) == 1
    told = capsys.readouterr().err
    assert "GONE: 9 seqs, 1 to 9" in told
    assert "seq 13 refused" in told
    assert json.loads((tmp_path / "place.refused").read_text())["event_id"] == "13"
    assert json.loads(place.read_text())["place"]["seq"] == 19
    expected = [str(seq) for seq in range(10, 20) if seq != 13]
    assert passed_by(central, refuse_thirteen) == expected


def test_a_relay_of_a_topic_does_not_call_the_events_of_others_gone(capsys):
    def behave(target):
        return edge_with(10, 19)(target.replace("&topic=t", ""))

    with Fake(behave) as edge, Fake(taken) as central:
        assert pass_on(edge, central, topic="t") == 0
    told = capsys.readouterr().err
    assert "before they were relayed; how many of them were of the topic is not known" in told


def test_a_relay_goes_on_behind_its_place_if_the_log_holds_it(tmp_path, capsys):
    place = tmp_path / "place"
    with Fake(edge_with(1, 5)) as edge, Fake(taken) as central:
        assert pass_on(edge, central, place) == 0
        edge.behave = edge_with(1, 7)
        assert pass_on(edge, central, place) == 0
    assert ids_in(central.asked[-1]) == ["6", "7"]
    assert "starting over" not in capsys.readouterr().err.lower()


@pytest.mark.parametrize("status", [200, 404])
def test_a_relay_notices_another_log_behind_the_same_address(tmp_path, capsys, status):
    def other(target):
        if target == "/events/t/5":
            problem = {"type": "/docs#no-such-event"}
            return (404, problem) if status == 404 else (200, {"seq": 5, "processed_at": "now"})
        return edge_with(1, 9)(target)

    place = tmp_path / "place"
    with Fake(edge_with(1, 5)) as edge, Fake(taken) as central:
        assert pass_on(edge, central, place) == 0
        edge.behave = other
        assert pass_on(edge, central, place) == 0
    assert ids_in(central.asked[-1]) == list("123456789")
    assert "this is another log" in capsys.readouterr().err


def test_a_relay_does_not_start_over_because_a_proxy_finds_nothing(tmp_path):
    def other(target):
        return (404, "<p>") if target == "/events/t/5" else edge_with(1, 9)(target)

    place = tmp_path / "place"
    with Fake(edge_with(1, 5)) as edge, Fake(taken) as central:
        pass_on(edge, central, place)
        edge.behave = other
        with pytest.raises(aggregator.ClientError, match="404"):
            pass_on(edge, central, place)


def test_a_relay_whose_last_event_was_removed_by_retention_goes_on(tmp_path):
    def other(target):
        gone = (410, {"type": "/docs#gone"})
        return gone if target == "/events/t/5" else edge_with(1, 9)(target)

    place = tmp_path / "place"
    with Fake(edge_with(1, 5)) as edge, Fake(taken) as central:
        pass_on(edge, central, place)
        edge.behave = other
        pass_on(edge, central, place)
    assert ids_in(central.asked[-1]) == list("6789")


def test_a_relay_finds_out_that_the_edge_was_restored_and_skips_nothing(tmp_path):
    place = tmp_path / "place"
    with Program(tmp_path / "edge.db") as edge, Program(tmp_path / "central.db") as central:
        fetch(edge.port, "POST", "/publish", samples("a", "b", "c"))
        assert pass_on(edge, central, place) == 0
        edge.end()
        for path in glob.glob(str(tmp_path / "edge.db*")):
            os.remove(path)
        with Program(tmp_path / "edge.db", "--port", str(edge.port)):
            fetch(edge.port, "POST", "/publish", samples("a", "x", "y", "z"))
            assert pass_on(edge, central, place) == 0
        assert ids_in(stored(central.port)) == ["a", "b", "c", "x", "y", "z"]


def test_a_relays_place_of_the_first_version_is_understood(tmp_path, capsys):
    place = tmp_path / "place"
    with Fake(edge_with(1, 9)) as edge, Fake(taken) as central:
        place.write_text(json.dumps({"of": edge.url, "place": [7]}))
        assert pass_on(edge, central, place) == 0
    assert ids_in(central.asked[-1]) == ["8", "9"]


def test_a_relay_that_is_to_run_once_ends_with_what_was_there(tmp_path, capsys):
    with Fake(edge_with(1, 9)) as edge, Fake(taken) as central:
        assert pass_on(edge, central) == 0
    assert "9 sent, 9 new" in capsys.readouterr().err


def test_a_relay_that_is_to_run_once_gives_up_after_its_timeout():
    with Fake(lambda asked: (503, {"detail": "disk full"})) as edge:
        with pytest.raises(aggregator.ClientError, match="503 disk full"):
            pass_on(edge, edge, timeout_us=100_000)


def test_a_relay_says_that_it_waits_only_while_it_does(tmp_path):
    broken = (200, "no chunk\n", {"Transfer-Encoding": "chunked"})
    script = [broken, (401, {"detail": "no token"}), (200, "<p>\n")]
    event = json.dumps(dict(sample("1"), seq=1, processed_at="then")) + "\n"

    def behave(target):
        if "follow" not in target:
            return 200, {"seq": 1, "processed_at": "then"}
        return script.pop(0) if script else (200, event)

    with Fake(behave) as edge, Fake(taken) as central:
        with Child(tmp_path, "relay", "--from", edge.url, "--to", central.url) as child:
            wait_until(lambda: len(central.asked) > 1)
            wait_until(lambda: "waiting" not in child.last_line())
            assert child.end() == 143
    assert "waiting: " + edge.url in child.said()
    assert "401 no token" in child.said()
    assert "sends no events in NDJSON" in child.said()
    assert "waiting" not in child.last_line()


def test_a_relay_that_lacks_an_address_says_so():
    assert_refused(run("relay", "--from", "localhost:1"), 1, "--to")


def test_a_relay_that_never_ends_takes_no_timeout():
    url = aggregator.parse_address("localhost:1")
    with pytest.raises(aggregator.ClientError, match="--once"):
        aggregator.relay(aggregator.RelaySettings(url, url, timeout_us=1))


@pytest.mark.parametrize("text", ["<html>\n", "[]\n", "{}\n"])
def test_a_relay_that_is_to_run_once_says_why_it_cannot_go_on(text):
    def behave(target):
        return (200, {"unique_processed": 1}) if target == "/stats" else (200, text)

    with Fake(behave) as edge:
        with pytest.raises(aggregator.ClientError, match="no events in NDJSON"):
            pass_on(edge, edge)


def test_a_relay_refused_by_the_edge_says_why():
    with Fake(lambda target: (400, {"detail": "bad parameter"})) as edge:
        with pytest.raises(aggregator.ClientError, match="bad parameter"):
            pass_on(edge, edge)


# ============================================================================
# §14  More than one machine: the replicated log
# ============================================================================

# ---- Where the log is ----


def test_the_url_of_a_log_names_servers_user_and_database():
    address = aggregator.parse_log_url(
        f"postgresql://me:{LOG_PASSWORD_IN_URL}@h1,[::1]:5433/d%20b?sslmode=verify-full"
        "&sslrootcert=/etc/ca.pem"
    )
    assert address.servers == [("h1", 5432), ("::1", 5433)]
    assert (address.user, address.password, address.database) == ("me", LOG_PASSWORD, "d b")
    assert (address.sslmode, address.root_certificate) == ("verify-full", "/etc/ca.pem")


def test_an_address_shows_no_password():
    address = aggregator.parse_log_url("postgres://me:hush@h1/d")
    assert f"{address}{address!r}".count("postgres://me@h1:5432/d") == 2
    assert "hush" not in f"{address}{address!r}"


@with_cases(
    ("url", "reason"),
    text_table(
        """
        another database | mysql://me:hush@h/d | must look like
        no slashes | postgres:me:hush@h/d | must look like
        no user | postgres://h/d | must look like
        an empty user | postgres://:hush@h/d | must name a user
        no database | postgres://me:hush@h/ | must name a user and a database
        no path | postgres://me:hush@h | must look like
        an @ in the password | postgres://me:hush@hush@h/d | write @ as %40
        a slash in the password | postgres://me:hush/hush@h/d | / as %2F
        a question mark in it | postgres://me:hush?hush@h/d | ? as %3F
        a number sign in it | postgres://me:hush#hush@h/d | # as %23
        an unknown option | postgres://me:hush@h/d?ssl=1 | has the option ssl
        an unknown sslmode | postgres://me:hush@h/d?sslmode=on | must have an sslmode of disable
        no host | postgres://me:hush@h1,,h2/d | '' where a host
        a port that is no number | postgres://me:hush@h:x/d | 'h:x' where a host
        port 0 | postgres://me:hush@h:0/d | the port 0
        a port that is too large | postgres://me:hush@h:65536/d | the port 65536
        an IPv6 address without brackets | postgres://me:hush@::1/d | '::1' where a host
        bytes that are not UTF-8 | postgres://me:hush\udce9@h/d | must be UTF-8
        """
    ),
)
def test_a_wrong_url_is_refused_and_its_password_is_not_shown(url, reason):
    with pytest.raises(ValueError, match=re.escape(reason)) as refusal:
        aggregator.parse_log_url(url)
    assert "hush" not in str(refusal.value)


# ---- The password ----


def test_salting_by_hand_gives_what_openssl_gives():
    by_hand = aggregator.salt_password_by_hand(b"secret", b"salt", 50)
    assert by_hand == hashlib.pbkdf2_hmac("sha256", b"secret", b"salt", 50)


def test_without_pbkdf2_the_password_is_salted_by_hand(monkeypatch):
    expected = aggregator.salt_password(b"secret", b"salt", 3)
    monkeypatch.delattr(hashlib, "pbkdf2_hmac")
    assert aggregator.salt_password(b"secret", b"salt", 3) == expected


@with_cases(
    "challenge",
    {
        "no fields": b"hello",
        "the nonce of somebody else": b"r=other,s=c2FsdA==,i=4096",
        "no rounds": b"r=mine1,s=c2FsdA==,i=0",
        "more rounds than anybody needs": b"r=mine1,s=c2FsdA==,i=9999999",
        "an extension": b"m=x,r=mine1,s=c2FsdA==,i=4096",
        "a salt without its end": b"r=mine1,s=A,i=4096",
        "a salt of padding": b"r=mine1,s====,i=4096",
        "a nonce outside ASCII": b"r=mine1\xff,s=c2FsdA==,i=4096",
    },
)
def test_a_challenge_against_the_rules_is_refused(challenge):
    with pytest.raises(aggregator.LogUnavailable):
        aggregator.Scram("secret", "mine").answer(challenge)


def test_a_server_that_does_not_know_the_password_is_refused():
    scram = aggregator.Scram("secret", "mine")
    scram.answer(b"r=mine1,s=c2FsdA==,i=2")
    with pytest.raises(aggregator.LogUnavailable, match="does not know the password"):
        scram.verify(b"v=AAAA")


# ---- One connection, against servers that are none ----


@with_cases(
    ("answer", "reason"),
    {
        "clear text": (b"R\0\0\0\x08\0\0\0\x03", "a password in clear text"),
        "MD5": (b"R\0\0\0\x0c\0\0\0\x05salt", "an MD5 password"),
        "Kerberos": (b"R\0\0\0\x08\0\0\0\x07", "way 7 to log in"),
        "SASL without SCRAM-SHA-256": (b"R\0\0\0\x0d\0\0\0\x0aNEW\0\0", "way 10 to log in"),
        "HTTP": (b"HTTP/1.1 400 Bad Request\r\n\r\n", "is no PostgreSQL"),
        "an error": (b"E\0\0\0\x13C28000\0Mgo away\0\0", r"go away \(SQLSTATE 28000\)"),
        "nothing": (b"", "did not answer within"),
    },
)
def test_a_server_that_answers_the_login_with(answer, reason):
    async def run():
        async with fake_postgres(answer) as url:
            with pytest.raises(Exception, match=reason) as refusal:
                await connected(url + "?sslmode=disable", connect_s=0.2)
            assert LOG_PASSWORD not in str(refusal.value)

    in_loop(run())


@with_cases(
    ("mode", "answer", "reason"),
    {
        "no TLS where it must be": ("require", b"N", "offers no TLS"),
        "no TLS where it must be right": ("verify-full", b"N", "offers no TLS"),
        "an error instead of a byte": ("prefer", b"E", "offers no TLS"),
        "something else": ("require", b"S" + b"hello, hello", "127.0.0.1"),
    },
)
def test_a_server_that_answers_the_question_for_tls_with(mode, answer, reason):
    async def run():
        async with fake_postgres(answer) as url:
            with pytest.raises(aggregator.LogUnavailable, match=reason):
                await connected(f"{url}?sslmode={mode}", connect_s=0.5)

    in_loop(run())


def test_a_connection_that_breaks_off_is_unavailable():
    async def run():
        async with fake_postgres(WELCOME + READY, b"D\0\0\0\x20") as url:
            connection = await connected(url + "?sslmode=disable", answer_s=0.2)
            assert "did not answer" in await refusal_of(connection.query("SELECT 1"))

    in_loop(run())


@with_cases(
    ("answers", "reason"),
    {
        "a parameter without a value": ((b"S\0\0\0\x05x" + WELCOME + READY, b"", READY), "standby"),
        "no row": ((WELCOME + READY, READY), "standby"),
    },
)
def test_behind_a_server_that_is_none_the_next_one_is_tried(answers, reason):
    async def run():
        async with fake_postgres(*answers) as url:
            nobody = f"127.0.0.1:{free_port()}"
            url = url.replace("/d", f",{nobody}/d?sslmode=disable")
            log = aggregator.PostgresLog(aggregator.parse_log_url(url), "n", QUICK)
            refusal = await refusal_of(log.read(0))
            assert reason in refusal
            assert nobody in refusal
            log.close()

    in_loop(run())


def test_a_host_name_that_cannot_be_one_is_unavailable():
    url = f"postgres://u:x@{'h' * 70}.example/d?sslmode=disable"
    with pytest.raises(aggregator.LogUnavailable, match="hhh.example"):
        query(url, "SELECT 1")


def test_a_file_of_certificates_that_is_missing_is_named_and_ends_the_start(tmp_path):
    missing = str(tmp_path / "ca.pem")

    async def scenario(nodes):
        async with fake_postgres(b"S") as url:
            url += f"?sslmode=verify-full&sslrootcert={missing}"
            log = aggregator.PostgresLog(aggregator.parse_log_url(url), "n", QUICK)
            reason = await refusal_of(nodes.start("a", log))
            assert f"sslrootcert {missing}: No such file" in reason
            assert "the log cannot be used" in reason

    in_cluster(tmp_path, scenario)


def test_a_failure_that_comes_with_the_end_of_the_connection_is_told():
    error = b"E\0\0\0\x24SFATAL\0VFATAL\0C57P01\0Mgoing down\0\0"

    async def run():
        async with fake_postgres(WELCOME + READY, error) as url:
            connection = await connected(url + "?sslmode=disable", answer_s=0.2)
            assert "did not answer" in await refusal_of(connection.query("SELECT 1"))

    in_loop(run())


# ---- One connection, against PostgreSQL ----


@needs_postgres
def test_a_password_is_proved_by_scram(database):
    assert query(database, "SELECT current_user::text") == [[b"agg"]]


@needs_postgres
def test_a_user_who_is_trusted_needs_none(postgres):
    assert query(postgres.url(user="guest"), "SELECT 1") == [[b"\0\0\0\1"]]


@needs_postgres
def test_a_wrong_password_is_told_with_its_code(postgres):
    url = postgres.url().replace(LOG_PASSWORD_IN_URL, "wrong")
    with pytest.raises(aggregator.PostgresError, match="authentication failed") as refusal:
        query(url, "SELECT 1")
    assert refusal.value.sqlstate == "28P01"


@needs_postgres
def test_cells_come_in_binary_form(database):
    statement = "SELECT $1::bigint, $2::text, $3::bytea, NULL, true"
    large = bytes(range(256)) * 20_000
    ((number, text, data, null, truth),) = query(database, statement, -5, "ä'\"", large)
    assert aggregator.int_cell(number) == -5
    assert text.decode() == "ä'\""
    assert data == large
    assert null is None
    assert truth == b"\1"


@needs_postgres
def test_an_error_has_its_sentence_and_its_code_and_the_connection_lives_on(database):
    async def run():
        connection = await connected(database)
        for _ in range(2):
            with pytest.raises(aggregator.PostgresError, match="division by zero") as refusal:
                await connection.query("SELECT 1 / $1::int", 0)
            assert refusal.value.sqlstate == "22012"
        assert await connection.query("SELECT 1 / $1::int", 1) == [[b"\0\0\0\1"]]
        connection.close()

    in_loop(run())


@needs_postgres
def test_a_warning_is_a_failure_and_a_notice_is_not(database):
    assert query(database, "DO $$ BEGIN RAISE NOTICE 'fine'; END $$") == []
    with pytest.raises(aggregator.PostgresError, match="not so fine"):
        query(database, "DO $$ BEGIN RAISE WARNING 'not so fine'; END $$")


@needs_postgres
def test_a_statement_that_takes_too_long_is_given_up(database):
    began = time.monotonic()
    with pytest.raises(aggregator.LogUnavailable, match="did not answer within 0.2 s"):
        query(database, "SELECT pg_sleep(20)", answer_s=0.2)
    assert time.monotonic() - began < 5


@needs_postgres
def test_a_server_that_ends_a_connection_says_why(database):
    async def run():
        connection = await connected(database)
        other = await connected(database)
        sleeping = asyncio.ensure_future(connection.query("SELECT pg_sleep(20)"))
        await asyncio.sleep(0.1)
        await other.query(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE $1::text",
            "SELECT pg_sleep%",
        )
        assert "terminating connection" in await refusal_of(sleeping)
        other.close()

    in_loop(run())


@needs_postgres
@with_cases(
    ("mode", "host", "certificate", "reason"),
    {
        "prefer takes it": ("prefer", "127.0.0.1", False, ""),
        "require takes any certificate": ("require", "127.0.0.1", False, ""),
        "verify-ca wants one that it knows": ("verify-ca", "127.0.0.1", False, "verify failed"),
        "verify-ca does not look at the name": ("verify-ca", "127.0.0.1", True, ""),
        "verify-full does": ("verify-full", "127.0.0.1", True, "127.0.0.1"),
        "verify-full takes the right name": ("verify-full", "localhost", True, ""),
        "without TLS this user is rejected": ("disable", "127.0.0.1", False, "pg_hba.conf"),
    },
)
def test_tls_by_sslmode(postgres, mode, host, certificate, reason):
    url = postgres.url(user="secret", options=f"?sslmode={mode}").replace("127.0.0.1", host)
    if certificate:
        url += f"&sslrootcert={postgres.certificate}"
    if not reason:
        assert query(url, "SELECT 1") == [[b"\0\0\0\1"]]
        return
    refused = (aggregator.LogUnavailable, aggregator.PostgresError)
    with pytest.raises(refused, match=reason):
        query(url, "SELECT 1")


@needs_postgres
def test_the_first_server_that_answers_is_taken(database):
    nobody = free_port()
    url = database.replace("@127.0.0.1", f"@127.0.0.1:{nobody},127.0.0.1")

    async def run():
        log = aggregator.PostgresLog(aggregator.parse_log_url(url), "n", QUICK)
        await log.read(0)
        assert log.primary == database.split("@")[1].split("/")[0]
        log.close()

    in_loop(run())


@needs_postgres
def test_after_a_try_that_was_cut_short_the_next_server_is_tried(database):
    async def run():
        async with fake_postgres() as silent:
            place = silent.split("@")[1].split("/")[0]
            url = database.replace("@", f"@{place},")
            limits = QUICK._replace(connect_s=600.0)
            log = aggregator.PostgresLog(aggregator.parse_log_url(url), "n", limits)
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(log.read(0), 0.1)
            await log.read(0)
            assert log.primary == database.split("@")[1].split("/")[0]
            log.close()

    in_loop(run())


@needs_postgres
def test_when_no_server_answers_each_is_named_with_its_reason(postgres):
    nobody = free_port()
    url = postgres.url("nowhere").replace("@127.0.0.1", f"@127.0.0.1:{nobody},127.0.0.1")

    async def run():
        log = aggregator.PostgresLog(aggregator.parse_log_url(url), "n", QUICK)
        reason = await refusal_of(log.read(0))
        assert f"127.0.0.1:{nobody}: " in reason
        assert f'127.0.0.1:{postgres.port}: database "nowhere" does not exist' in reason
        assert log.primary == ""

    in_loop(run())


# ---- The log in PostgreSQL ----


@needs_postgres
def test_positions_have_no_gap_and_the_chain_is_ours(database):
    async def scenario(log):
        first = await log.append("w", 1, b"one")
        second = await log.append("w", 2, b"two")
        stretch = await log.read(0)
        assert [row.body for row in stretch.rows] == [b"one", b"two"]
        assert [first.position, second.position, stretch.head] == [1, 2, 2]
        chain = aggregator.next_chain(b"", b"one")
        assert first.chain == chain
        assert stretch.head_chain == aggregator.next_chain(chain, b"two")

    in_log(database, scenario)


@needs_postgres
def test_an_append_that_is_repeated_is_stored_once(database):
    async def scenario(log):
        first = await log.append("w", 1, b"one")
        assert await log.append("w", 1, b"one") == first
        assert (await log.append("w", 2, b"two")).position == 2

    in_log(database, scenario)


@needs_postgres
def test_appends_of_many_nodes_at_once_stand_one_behind_the_other(database):
    async def run():
        address = aggregator.parse_log_url(database)
        logs = [aggregator.PostgresLog(address, f"n{i}", QUICK) for i in range(4)]

        async def append(log, name):
            return [(await log.append(name, n, b"x")).position for n in range(1, 21)]

        found = await asyncio.gather(*[append(log, f"w{i}") for i, log in enumerate(logs)])
        assert sorted(itertools.chain(*found)) == list(range(1, 81))
        for log in logs:
            log.close()

    in_loop(run())


@needs_postgres
def test_nodes_that_begin_at_once_make_the_tables_once(database):
    async def run():
        address = aggregator.parse_log_url(database)
        patient = QUICK._replace(connect_s=10.0, answer_s=10.0)
        logs = [aggregator.PostgresLog(address, f"n{i}", patient) for i in range(4)]
        holder = await connected(database)
        await holder.query("SELECT pg_advisory_lock(4711)")
        reading = [asyncio.ensure_future(log.read(0)) for log in logs]
        # All have seen that there are no tables, and want to make them.
        waiting = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
        while await holder.query(waiting) != [[(4).to_bytes(8, "big")]]:
            await asyncio.sleep(0.01)
        await holder.query("SELECT pg_advisory_unlock(4711)")
        for stretch in await asyncio.gather(*reading):
            assert stretch.head == 0
        holder.close()
        for log in logs:
            log.close()

    in_loop(run())


@needs_postgres
def test_old_entries_are_removed_and_the_newest_stays(database):
    async def scenario(log):
        for number in range(1, 5):
            await log.append("w", number, b"x")
        ask_log(database, "UPDATE agg_log SET at = now() - interval '8 days' WHERE pos < 4")
        await log.trim()
        assert [row.position for row in (await log.read(0)).rows] == [4]

    in_log(database, scenario)


@needs_postgres
def test_many_old_entries_are_removed_in_portions(database):
    most = aggregator.LOG_TRIM_ENTRIES

    async def scenario(log):
        await log.read(0)
        ask_log(
            database,
            "INSERT INTO agg_log SELECT pos, 'w', pos, '', now() - interval '8 days', ''"
            f" FROM generate_series(1, {2 * most}) AS pos",
        )
        assert await log.trim()
        assert ask_log(database, "SELECT count(*) FROM agg_log") == [str(most + 1)]
        assert await log.trim()
        assert not await log.trim()
        assert ask_log(database, "SELECT pos FROM agg_log") == [str(2 * most)]

    in_log(database, scenario)


@needs_postgres
def test_an_old_entry_behind_a_young_one_stays(database):
    async def scenario(log):
        for number in range(1, 4):
            await log.append("w", number, b"x")
        ask_log(database, "UPDATE agg_log SET at = now() - interval '8 days' WHERE pos = 2")
        await log.trim()
        assert [row.position for row in (await log.read(0)).rows] == [1, 2, 3]

    in_log(database, scenario)


def test_a_node_goes_on_removing_while_there_is_more(tmp_path):
    async def scenario(nodes):
        view = MemoryView(MemoryLog())
        portions = [True, True, True, False]

        async def trim():
            return portions.pop(0)

        view.trim = trim
        a = await nodes.start("a", view)
        # The first is due a minute after the start.
        a._trimmed_s -= nodes.limits.trim_s
        await until_true(lambda: not portions)

    in_cluster(tmp_path, scenario)


@needs_postgres
def test_whoever_connects_does_not_wait_for_one_that_makes_tables_or_removes(database):
    async def scenario(log):
        await log.append("w", 1, b"x")
        other = await connected(database)
        await other.query("SELECT pg_advisory_lock(4711), pg_advisory_lock(4712)")
        # A new connection.
        log.close()
        assert [row.position for row in (await log.read(0)).rows] == [1]
        other.close()

    in_log(database, scenario)


@needs_postgres
def test_a_read_fetches_a_bounded_number_of_entries_and_bytes(database):
    async def scenario(log):
        large = bytes(aggregator.LOG_READ_BYTES // 3)
        for number in range(1, 6):
            await log.append("w", number, large)
        assert [row.position for row in (await log.read(0)).rows] == [1, 2, 3, 4]
        for number in range(6, 50):
            await log.append("w", number, b"x")
        assert len((await log.read(5)).rows) == aggregator.LOG_READ_ENTRIES
        assert (await log.read(49)).rows == []

    in_log(database, scenario)


@needs_postgres
def test_only_the_first_node_says_what_the_log_began_from(database):
    async def scenario(log):
        await log.claim_base("a:0")
        await log.claim_base("b:0")
        assert (await log.read(0)).base == "a:0"

    in_log(database, scenario)


@needs_postgres
def test_a_user_without_rights_is_told_and_the_node_does_not_start(postgres, database, tmp_path):
    name = aggregator.parse_log_url(database).database
    url = postgres.url(name, user="secret", options="?sslmode=require")

    async def scenario(nodes):
        log = aggregator.PostgresLog(aggregator.parse_log_url(url), "n", QUICK)
        reason = await refusal_of(nodes.start("a", log))
        assert "permission denied for schema public (SQLSTATE 42501)" in reason

    in_cluster(tmp_path, scenario)


# ---- Entries ----


def test_an_entry_comes_back_as_it_was():
    event = aggregator.Event("t/ä", "\ud800", -1, 's"', '{"a":"\\n"}', aggregator.MAX_SEQUENCE)
    record = aggregator.record_of(numbered_events(1)[0])
    entry = aggregator.Entry("w", 3, NOW, [record, record._replace(sequence=None)])
    assert aggregator.decode_entry(aggregator.encode_entry(entry)) == entry
    assert event.topic == "t/ä"


def test_an_erasure_comes_back_as_it_was():
    entry = aggregator.Entry("w", 3, NOW, [], aggregator.EraseOrder("t", 7, None, True, 5))
    assert aggregator.decode_entry(aggregator.encode_entry(entry)) == entry


@with_cases(
    ("body", "reason"),
    {
        "of a newer aggregator": (zlib.compress(b"[2,{}]"), "update this node first"),
        "that is not deflated": (b"x", "is damaged"),
        "that is no JSON": (zlib.compress(b"["), "is damaged"),
        "that lacks a part": (zlib.compress(b'[1,"w"]'), "is damaged"),
        "with a number for a topic": (
            zlib.compress(b'[1,"w",1,0,[[7,"1",0,"s","{}",null]]]'),
            "is damaged",
        ),
        "with a text for a time": (
            zlib.compress(b'[1,"w",1,0,[["t","1","0","s","{}",null]]]'),
            "is damaged",
        ),
        "with too few fields of an event": (zlib.compress(b'[1,"w",1,0,[["t"]]]'), "is damaged"),
        "with an event that is none": (zlib.compress(b'[1,"w",1,0,[5]]'), "is damaged"),
        "with a text for a number": (zlib.compress(b'[1,"w","1",0,[]]'), "is damaged"),
        "with a list for a writer": (zlib.compress(b"[1,[],1,0,[]]"), "is damaged"),
        "that erases what is no topic": (
            zlib.compress(b'[1,"w",1,0,[],{"topic":7,"event_id":null}]'),
            "is damaged",
        ),
        "that erases by an unknown field": (
            zlib.compress(b'[1,"w",1,0,[],{"topic":"t","all":true}]'),
            "is damaged",
        ),
        "that is nested too deeply": (zlib.compress(b"[" * 200_000), "is damaged"),
    },
)
def test_an_entry_is_refused(body, reason):
    with pytest.raises(aggregator.LogRefused, match=reason):
        aggregator.decode_entry(body)


# ---- Applying ----


@with_cases("seed", {f"seed {seed}": seed for seed in range(5)})
def test_a_store_does_not_depend_on_how_many_entries_are_applied_together(tmp_path, seed):
    rng = random.Random(seed)
    groups = random_entries(rng, 80)
    decisions = []
    paths = []
    for name, most in (("a", 1), ("b", 7), ("c", 80)):
        path = str(tmp_path / name)
        paths.append(path)
        store = aggregator.Store(path, aggregator.StoreSettings(False, recent_ids=16))
        store.log_mark()
        store.adopt_id("the same")
        decided = []
        place = 0
        while place < len(groups):
            some = groups[place : place + rng.randrange(1, most + 1)]
            place += len(some)
            mark = aggregator.LogMark(place, b"chain", 0, {"w": place})
            for decision in store.apply(some, mark, NOW):
                decided.append((decision.first_seq, len(decision.fresh), decision.arrived_us))
        decisions.append(decided)
        store.close()
    assert decisions[0] == decisions[1] == decisions[2]
    assert_equal_stores(paths)


def test_the_position_moves_in_the_transaction_that_applies(tmp_path):
    path = str(tmp_path / "a")
    store = aggregator.Store(path)
    assert store.log_mark() == (0, b"", 0, {}, False)
    group = aggregator.LogGroup(
        [aggregator.record_of(event) for event in numbered_events(1, 2, 1)], NOW
    )
    store.apply([group], aggregator.LogMark(1, b"c", 0, {"w": 7}), NOW)
    assert store.log_mark() == (1, b"c", 3, {"w": 7}, False)
    check_files = store._check_files
    store._check_files = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        store.apply([group], aggregator.LogMark(2, b"d", 0, {"w": 8}), NOW)
    store._check_files = check_files
    assert store.log_mark() == (1, b"c", 3, {"w": 7}, False)
    store.close()


def test_the_number_of_a_writer_never_goes_back(tmp_path):
    store = aggregator.Store(str(tmp_path / "a"))
    store.log_mark()
    store.apply([], aggregator.LogMark(1, b"c", 0, {"w": 7}), NOW)
    store.apply([], aggregator.LogMark(2, b"d", 0, {"w": 3}), NOW)
    assert store.log_mark() == (2, b"d", 0, {"w": 7}, False)
    store.close()


def test_without_a_log_there_is_no_table_of_it(tmp_path):
    store = aggregator.Store(str(tmp_path / "a"))
    store.commit([aggregator.record_of(event) for event in numbered_events(1)], NOW)
    tables = {name for (name,) in store.db.execute("SELECT name FROM sqlite_master")}
    assert "replica" not in tables
    store.close()


# ---- Nodes on one log ----


def test_two_nodes_agree_on_who_was_first(tmp_path):
    async def scenario(nodes):
        log = MemoryLog()
        a = await nodes.start("a", MemoryView(log))
        b = await nodes.start("b", MemoryView(log))
        assert await send_numbers(a, 1, 2) == [("new", 1), ("new", 2)]
        assert await send_numbers(b, 2, 3) == [("duplicate", 2), ("new", 3)]
        assert await send_numbers(a, 3, payload="1") == [("conflict", 3)]
        await level(a, b)
        await nodes.stop()
        assert_equal_stores([nodes.path("a"), nodes.path("b")])

    in_cluster(tmp_path, scenario)


def test_the_books_balance_on_each_node(tmp_path):
    async def scenario(nodes):
        log = MemoryLog()
        a = await nodes.start("a", MemoryView(log))
        b = await nodes.start("b", MemoryView(log))
        await send_numbers(a, 1, 2, 2)
        await level(b)
        for node in (a, b):
            stats = await node.stats()
            assert (stats["received"], stats["current_queue_size"]) == (3, 0)
            assert (stats["unique_processed"], stats["duplicate_dropped"]) == (2, 1)

    in_cluster(tmp_path, scenario)


def test_an_event_of_another_node_is_found_before_404(tmp_path):
    async def scenario(nodes):
        log = MemoryLog()
        nodes.limits = QUICK._replace(poll_s=60.0)
        a = await nodes.start("a", MemoryView(log))
        b = await nodes.start("b", MemoryView(log))
        await send_numbers(a, 1)
        seq, text = await b.event("t", "1")
        assert seq == 1
        assert json.loads(text)["event_id"] == "1"
        assert await b.event("t", "2") == (None, None)

    in_cluster(tmp_path, scenario)


def test_a_404_wants_a_proof_that_the_log_it_saw_was_not_old(tmp_path):
    async def scenario(nodes):
        nodes.limits = QUICK._replace(proof_s=60.0, poll_s=60.0)
        view = MemoryView(MemoryLog())
        a = await nodes.start("a", view)
        barriers = view.barriers
        await a.event("t", "never")
        assert view.barriers == barriers + 1

    in_cluster(tmp_path, scenario)


def test_a_cursor_of_another_node_is_not_ahead(tmp_path):
    async def scenario(nodes):
        log = MemoryLog()
        nodes.limits = QUICK._replace(poll_s=60.0)
        a = await nodes.start("a", MemoryView(log))
        b = await nodes.start("b", MemoryView(log))
        await send_numbers(a, 1, 2)
        tail = await aggregator.LiveTail(b).tail(aggregator.EventQuery(), 2)
        assert tail.newest == 2
        with pytest.raises(aggregator.CursorAhead):
            await aggregator.LiveTail(b).tail(aggregator.EventQuery(), 3)

    in_cluster(tmp_path, scenario)


def test_followers_of_one_node_see_the_events_of_another(tmp_path):
    async def scenario(nodes):
        log = MemoryLog()
        a = await nodes.start("a", MemoryView(log))
        b = await nodes.start("b", MemoryView(log))
        live = aggregator.LiveTail(b)
        tail = await live.tail(aggregator.EventQuery(), None)
        following = live.follow(aggregator.EventQuery(), tail)
        await send_numbers(a, 1)
        news = await following.__anext__()
        assert list(news.seqs) == [1]
        await following.aclose()

    in_cluster(tmp_path, scenario)


def test_what_is_erased_at_one_node_is_erased_at_all(tmp_path):
    async def scenario(nodes):
        log = MemoryLog()
        a = await nodes.start("a", MemoryView(log))
        b = await nodes.start("b", MemoryView(log))
        await send_numbers(a, 1, 2, 3, 4)
        assert await b.erase_event("t", "1") == 1
        assert await b.erase_event("t", "1") == 0
        assert await b.erase_event("t", "never") is None
        assert await a.erase_matching("t", False, None) == 3
        assert await send_numbers(b, 1) == [("duplicate", 1)]
        await level(a, b)
        await nodes.stop()
        assert_equal_stores([nodes.path("a"), nodes.path("b")])

    in_cluster(tmp_path, scenario)


def test_a_group_that_is_appended_waits_while_the_one_before_is_applied(tmp_path):
    async def scenario(nodes):
        log = MemoryLog()
        a = await nodes.start("a", MemoryView(log))
        held = threading.Event()
        a._ask_writer(held.wait)
        publishing = [asyncio.ensure_future(send_numbers(a, number)) for number in range(8)]
        for _ in range(8):
            publishing.append(asyncio.ensure_future(send_numbers(a, len(publishing))))
            await asyncio.sleep(0.005)
        await until_true(lambda: len(log.rows) == aggregator.LOG_GROUPS_AHEAD)
        await asyncio.sleep(0.05)
        assert len(log.rows) == aggregator.LOG_GROUPS_AHEAD
        held.set()
        await asyncio.gather(*publishing)
        stats = await a.stats()
        assert stats["unique_processed"] == 16
        assert a._ahead._value == aggregator.LOG_GROUPS_AHEAD

    in_cluster(tmp_path, scenario)


def test_own_groups_need_no_barrier_and_are_not_read(tmp_path):
    async def scenario(nodes):
        nodes.limits = QUICK._replace(proof_s=60.0, poll_s=60.0)
        view = MemoryView(MemoryLog())
        a = await nodes.start("a", view)
        await asyncio.sleep(0.05)
        reads = view.reads
        barriers = view.barriers
        for number in range(20):
            await send_numbers(a, number)
        assert view.barriers == barriers
        assert view.reads - reads <= 21
        held = await a.stats()
        assert held["log"]["position"] == 20

    in_cluster(tmp_path, scenario)


def test_an_own_entry_proves_those_before_it(tmp_path):
    async def scenario(nodes):
        nodes.limits = QUICK._replace(proof_s=60.0, poll_s=60.0)
        log = MemoryLog()
        view = MemoryView(log)
        a = await nodes.start("a", MemoryView(log))
        b = await nodes.start("b", view)
        barriers = view.barriers
        await send_numbers(a, 1)
        assert await send_numbers(b, 1, 2) == [("duplicate", 1), ("new", 2)]
        assert view.barriers == barriers

    in_cluster(tmp_path, scenario)


def test_rows_behind_an_own_entry_are_not_proved_by_it(tmp_path):
    async def scenario(nodes):
        log = MemoryLog()
        view = MemoryView(log)
        a = await nodes.start("a", view)
        log.add("x", 1, aggregator.encode_entry(entry_of("x", 1, 1)))
        view.quorum = None
        append = view.append

        async def append_before_another(*entry):
            appended = await append(*entry)
            log.add("x", 2, aggregator.encode_entry(entry_of("x", 2, 3)))
            return appended

        view.append = append_before_another
        assert await send_numbers(a, 2) == [("new", 2)]
        await until_true(lambda: a.trouble() is not None)
        assert (await a.event("t", "3"))[0] is None
        view.quorum = True
        await until_true(lambda: a.trouble() is None)
        assert (await a.event("t", "3"))[0] == 3

    in_cluster(tmp_path, scenario)


def test_an_own_entry_proves_the_history_that_it_was_appended_to_and_no_other(tmp_path):
    async def scenario(nodes):
        log = MemoryLog()
        view = MemoryView(log)
        a = await nodes.start("a", view)
        await send_numbers(a, 1)
        # Reads go to an old primary, which has other rows at the next two places.
        log.add("x", 1, aggregator.encode_entry(entry_of("x", 1, 2)))
        view.shown = extended(rewound(log, 2))
        view.quorum = None
        sending = asyncio.ensure_future(send_numbers(a, 3))
        await until_true(lambda: 3 in a._own)
        barriers = view.barriers
        await until_true(lambda: view.barriers > barriers + 1)
        assert (await a.event("t", "1000"))[0] is None
        view.shown = log
        view.quorum = True
        assert await sending == [("new", 3)]

    in_cluster(tmp_path, scenario)


def test_a_writer_that_has_gone_on_is_not_applied_a_second_time(tmp_path):
    async def scenario(nodes):
        log = MemoryLog()
        record = aggregator.record_of(numbered_events(1)[0])
        for number in (2, 1):
            entry = aggregator.Entry("w", number, NOW, [record])
            log.add("w", number, aggregator.encode_entry(entry))
        log.base = "x:0"
        a = await nodes.start("a", MemoryView(log))
        await level(a)
        stats = await a.stats()
        assert (stats["received"], stats["log"]["position"]) == (1, 2)

    in_cluster(tmp_path, scenario)


@with_cases("together", {"read together": True, "read one after the other": False})
def test_an_order_to_erase_that_comes_late_erases_nothing(tmp_path, together):
    """Its writer had given it up, and has put something into the log since."""

    async def scenario(nodes):
        log = MemoryLog()
        a = await nodes.start("a", MemoryView(log))
        await send_numbers(a, 1)
        log.add("w", 2, aggregator.encode_entry(entry_of("w", 2, 2)))
        if not together:
            await level(a)
        order = aggregator.EraseOrder("t", 3, None, False, None)
        late = aggregator.Entry("w", 1, NOW, [], order)
        log.add("w", 1, aggregator.encode_entry(late))
        # Were the number of the writer set back, this one would be applied again.
        again = entry_of("w", 2, 3)
        log.add("w again", 2, aggregator.encode_entry(again))
        await level(a)
        assert json.loads((await a.event("t", "1"))[1])["event_id"] == "1"
        assert json.loads((await a.event("t", "2"))[1])["event_id"] == "2"
        assert await a.event("t", "3") == (None, None)
        stats = await a.stats()
        assert (stats["stored"], stats["log"]["position"]) == (2, 4)

    in_cluster(tmp_path, scenario)


def test_an_order_to_erase_spares_what_came_after_it(tmp_path):
    """Also that of a node which was started anew since, and has another name now."""

    async def scenario(nodes):
        log = MemoryLog()
        a = await nodes.start("a", MemoryView(log))
        await send_numbers(a, 1)
        await send_numbers(a, 2)
        orders = [aggregator.EraseOrder("t", 1), aggregator.EraseOrder("t", 1, "2")]
        for order in orders:
            gone = f"gone {order.event_id}"
            log.add(gone, 1, aggregator.encode_entry(aggregator.Entry(gone, 1, NOW, [], order)))
        await level(a)
        assert await a.event("t", "1") == (1, None)
        assert json.loads((await a.event("t", "2"))[1])["event_id"] == "2"

    in_cluster(tmp_path, scenario)


def test_a_node_that_cannot_know_what_is_in_the_log_erases_nothing(tmp_path):
    async def scenario(nodes):
        log = MemoryLog()
        view = MemoryView(log)
        a = await nodes.start("a", view)
        await send_numbers(a, 1)
        view.reachable = False
        await until_true(lambda: a.trouble() is not None)
        assert "is behind the log" in await refusal_of(a.erase_event("t", "1"))
        assert "is behind the log" in await refusal_of(a.erase_matching("t", False, None))
        view.reachable = True
        await until_true(lambda: a.trouble() is None)
        assert await a.erase_event("t", "1") == 1

    in_cluster(tmp_path, scenario)


def test_what_another_node_has_just_taken_is_erased(tmp_path):
    async def scenario(nodes):
        log = MemoryLog()
        nodes.limits = QUICK._replace(poll_s=60.0)
        a = await nodes.start("a", MemoryView(log))
        b = await nodes.start("b", MemoryView(log))
        await send_numbers(a, 1)
        assert await b.erase_matching("t", False, None) == 1

    in_cluster(tmp_path, scenario)


def test_stats_say_how_far_a_node_is_behind(tmp_path):
    async def scenario(nodes):
        log = MemoryLog()
        view = MemoryView(log)
        a = await nodes.start("a", MemoryView(log))
        b = await nodes.start("b", view)
        await send_numbers(a, 1)
        await level(b)
        replication = (await b.stats())["log"]
        assert replication["lag_seconds"] < 5
        replication["lag_seconds"] = 0
        assert replication == {
            "node": "b",
            "primary": "memory:1",
            "position": 1,
            "head": 1,
            "lag_entries": 0,
            "lag_seconds": 0,
        }
        view.quorum = False
        await send_numbers(a, 2)
        await until_true(lambda: b.trouble() is not None)
        replication = (await b.stats())["log"]
        assert (replication["position"], replication["lag_entries"]) == (1, 1)

    in_cluster(tmp_path, scenario)


# ---- The table of failures ----


def test_when_an_aggregator_dies_its_publisher_finds_the_event_at_another(tmp_path):
    async def scenario(nodes):
        log = MemoryLog()
        view = MemoryView(log)
        a = await nodes.start("a", view)
        b = await nodes.start("b", MemoryView(log))
        view.quorum = False
        publishing = asyncio.ensure_future(send_numbers(a, 1))
        await until_true(lambda: log.rows)
        await nodes.crash(a)
        publishing.cancel()
        assert await send_numbers(b, 1) == [("duplicate", 1)]

    in_cluster(tmp_path, scenario)


def test_while_the_log_is_away_for_a_moment_requests_wait(tmp_path):
    async def scenario(nodes):
        view = MemoryView(MemoryLog())
        a = await nodes.start("a", view)
        view.reachable = False
        waiting = asyncio.ensure_future(send_numbers(a, 1))
        await until_true(lambda: a.trouble() is not None)
        assert not waiting.done()
        view.reachable = True
        assert await waiting == [("new", 1)]

    in_cluster(tmp_path, scenario, PATIENT)


def test_while_the_log_stays_away_requests_fail_and_then_it_goes_on(tmp_path):
    async def scenario(nodes):
        view = MemoryView(MemoryLog())
        a = await nodes.start("a", view)
        assert await send_numbers(a, 1) == [("new", 1)]
        view.reachable = False
        began = time.monotonic()
        assert "unplugged. What was sent may still be stored" in await refusal_of(
            send_numbers(a, 2)
        )
        assert QUICK.give_up_s <= time.monotonic() - began < 5
        view.reachable = True
        assert await send_numbers(a, 2) == [("new", 2)]
        stats = await a.stats()
        assert (stats["received"], stats["current_queue_size"]) == (2, 0)

    in_cluster(tmp_path, scenario)


def test_servers_that_hang_do_not_add_their_time_to_that_of_a_request(tmp_path):
    async def scenario(nodes):
        view = MemoryView(MemoryLog())
        a = await nodes.start("a", view)
        view.append = hang
        began = time.monotonic()
        waiting = []
        for number in range(3):
            waiting.append(asyncio.ensure_future(send_numbers(a, number)))
            await asyncio.sleep(0.01)
        for publishing in waiting:
            assert "no answer within" in await refusal_of(publishing)
        assert time.monotonic() - began < 10

    in_cluster(tmp_path, scenario)


def test_groups_that_wait_do_not_add_their_time_to_that_of_those_behind(tmp_path):
    async def scenario(nodes):
        view = MemoryView(MemoryLog())
        a = await nodes.start("a", view)
        await level(a)
        view.append = hang
        size = aggregator.GROUP_MAX_EVENTS
        began = time.monotonic()
        waiting = []
        for number in range(4):
            numbers = range(number * size, (number + 1) * size)
            waiting.append(asyncio.ensure_future(send_numbers(a, *numbers)))
        for publishing in waiting:
            assert "the log takes no entries" in await refusal_of(publishing)
        # Each would wait for a second more.
        assert time.monotonic() - began < 3

    in_cluster(tmp_path, scenario)


def test_what_does_not_come_out_of_the_log_is_refused_in_time(tmp_path):
    async def scenario(nodes):
        log = MemoryLog()
        view = MemoryView(log)
        nodes.limits = QUICK._replace(poll_s=60.0)
        a = await nodes.start("a", view)
        await level(a)
        read, view.read = view.read, unreadable
        # Another node's entry comes first, so it has to be read before ours is applied.
        log.add("x", 1, aggregator.encode_entry(entry_of("x", 1, 1)))
        publishing = []
        for number in range(2, 2 + 2 * aggregator.LOG_GROUPS_AHEAD):
            publishing.append(asyncio.ensure_future(send_numbers(a, number)))
            await asyncio.sleep(0.01)
        reason = await refusal_of(publishing[0])
        assert "does not come out of it: memory:1: only reads fail" in reason
        assert "What was sent may still be stored" in reason
        for rest in publishing[1:]:
            await refusal_of(rest)
        # What could not be applied is not put into the log again and again.
        entries = len(log.rows)
        for number in range(20, 23):
            assert "the log cannot be read" in await refusal_of(send_numbers(a, number))
        assert len(log.rows) == entries
        assert "only reads fail" in await a.health()
        view.read = read
        await until_true(lambda: not a._log_troubles)
        assert (await send_numbers(a, 2))[0][0] == "duplicate"
        assert a._ahead._value == aggregator.LOG_GROUPS_AHEAD
        stats = await a.stats()
        assert stats["current_queue_size"] == 0

    in_cluster(tmp_path, scenario)


def test_health_wants_an_entry_that_the_log_took_after_one_that_it_did_not_take(tmp_path):
    async def scenario(nodes):
        log = MemoryLog()
        view = MemoryView(log)
        a = await nodes.start("a", view)
        assert await send_numbers(a, 1) == [("new", 1)]
        append, view.append = view.append, hang
        await refusal_of(send_numbers(a, 2))
        # Reads and barriers go well meanwhile.
        barriers = view.barriers
        await until_true(lambda: view.barriers > barriers + 2)
        assert "no answer within" in await a.health()
        # Nobody publishes. The node finds out by an entry without events.
        view.append = append
        await until_true(lambda: not a._log_troubles)
        assert await a.health() == ""
        assert [len(entry.records) for entry in log.entries()] == [1, 0]
        assert await send_numbers(a, 2) == [("new", 2)]
        assert a._ahead._value == aggregator.LOG_GROUPS_AHEAD

    in_cluster(tmp_path, scenario)


def test_an_entry_that_is_under_way_for_too_long_is_a_trouble(tmp_path):
    async def scenario(nodes):
        view = MemoryView(MemoryLog())
        a = await nodes.start("a", view)
        a.limits = a.limits._replace(commit_hangs_s=0.05)
        view.append = hang
        publishing = asyncio.ensure_future(send_numbers(a, 1))
        await until_true(lambda: a.trouble() is not None)
        assert "an entry has been under way to the log" in await a.health()
        assert not a._log_troubles
        await nodes.crash(a)
        publishing.cancel()

    in_cluster(tmp_path, scenario, PATIENT)


def test_a_node_that_is_cut_off_says_so_and_answers_reads(tmp_path):
    async def scenario(nodes):
        log = MemoryLog()
        view = MemoryView(log)
        a = await nodes.start("a", view)
        await send_numbers(a, 1)
        assert await a.health() == ""
        view.reachable = False
        await until_true(lambda: a.trouble() is not None)
        assert "unplugged" in await a.health()
        assert (await a.event("t", "1"))[0] == 1
        assert (await a.event("t", "2"))[0] is None
        behind = (await a.stats())["log"]["lag_seconds"]
        await asyncio.sleep(0.05)
        assert (await a.stats())["log"]["lag_seconds"] > behind
        view.reachable = True
        await until_true(lambda: a.trouble() is None)
        assert await a.health() == ""

    in_cluster(tmp_path, scenario)


def test_a_node_starts_while_the_log_is_away(tmp_path):
    async def scenario(nodes):
        view = MemoryView(MemoryLog())
        view.reachable = False
        a = await nodes.start("a", view)
        assert "unplugged" in await a.health()
        await refusal_of(send_numbers(a, 1))
        view.reachable = True
        await until_true(lambda: not a._log_troubles)
        assert await send_numbers(a, 1) == [("new", 1)]

    in_cluster(tmp_path, scenario)


def test_a_node_starts_while_servers_take_connections_and_say_nothing(tmp_path):
    async def scenario(nodes):
        # Far more than this test may last, so nothing here waits for it.
        nodes.limits = QUICK._replace(connect_s=600.0, start_s=0.05)
        async with fake_postgres() as silent, fake_postgres() as silent_too:
            url = silent.replace("/d", "," + silent_too.split("@")[1])
            a = await start_on(nodes, "a", url)
            assert await a.health() == "the log did not answer within 0.05 s"
            assert await a.event("t", "1") == (None, None)
            await nodes.stop()

    in_cluster(tmp_path, scenario)


def test_a_node_appends_nothing_before_it_has_compared_its_store_with_the_log(tmp_path):
    async def scenario(nodes):
        view = MemoryView(MemoryLog())
        view.reachable = False
        a = await nodes.start("a", view)
        view.read = unreadable
        view.reachable = True
        assert "has not compared its store" in await refusal_of(send_numbers(a, 1))
        assert view.log.rows == []

    in_cluster(tmp_path, scenario)


def test_the_outcome_of_an_append_may_come_late(tmp_path):
    async def scenario(nodes):
        log = MemoryLog()
        view = MemoryView(log)
        a = await nodes.start("a", view)
        view.quorum = False
        waiting = asyncio.ensure_future(send_numbers(a, 1))
        await until_true(lambda: view.appends > 3)
        view.quorum = True
        assert await waiting == [("new", 1)]
        assert len(log.rows) == 1

    in_cluster(tmp_path, scenario)


def test_what_was_given_up_may_be_stored_and_the_repeat_is_a_duplicate(tmp_path):
    async def scenario(nodes):
        log = MemoryLog()
        view = MemoryView(log)
        a = await nodes.start("a", view)
        view.quorum = False
        assert "send it again, with the same ids" in await refusal_of(send_numbers(a, 1))
        view.quorum = True
        assert await send_numbers(a, 1) == [("duplicate", 1)]
        assert (await a.stats())["received"] == 2

    in_cluster(tmp_path, scenario)


def test_a_store_that_cannot_be_written_holds_up_its_node_only(tmp_path):
    async def scenario(nodes):
        log = MemoryLog()
        a = await nodes.start("a", MemoryView(log))
        b = await nodes.start("b", MemoryView(log))
        check_files, a._store._check_files = a._store._check_files, unwritable
        assert "the disk is full" in await refusal_of(send_numbers(a, 1))
        assert "the disk is full" in await a.health()
        assert await send_numbers(b, 1) == [("duplicate", 1)]
        # What this node cannot store is not put into the log again and again.
        assert "the disk is full" in await refusal_of(send_numbers(a, 1))
        assert len(log.rows) == 2
        a._store._check_files = check_files
        await until_true(lambda: not a._log_troubles)
        assert await send_numbers(a, 1) == [("duplicate", 1)]
        assert await a.health() == ""
        stats = await a.stats()
        assert (stats["received"], stats["current_queue_size"]) == (3, 0)

    in_cluster(tmp_path, scenario)


def test_a_lost_disk_is_replaced_by_a_copy_of_another_nodes_store(tmp_path):
    async def scenario(nodes):
        log = MemoryLog()
        a = await nodes.start("a", MemoryView(log))
        await send_numbers(a, *range(50))
        aggregator.copy_store(nodes.path("a"), nodes.path("b"))
        await send_numbers(a, *range(40, 60))
        b = await nodes.start("b", MemoryView(log))
        assert await send_numbers(b, 55) == [("duplicate", 56)]
        await level(a, b)
        await nodes.stop()
        assert_equal_stores([nodes.path("a"), nodes.path("b")])

    in_cluster(tmp_path, scenario)


def test_a_store_of_a_single_node_becomes_the_base(tmp_path):
    async def scenario(nodes):
        single = aggregator.Store(nodes.path("a"))
        single.commit([aggregator.record_of(event) for event in numbered_events(1, 2, 1)], NOW)
        single.close()
        log = MemoryLog()
        a = await nodes.start("a", MemoryView(log))
        assert log.base == f"{single.store_id}:3"
        aggregator.copy_store(nodes.path("a"), nodes.path("b"))
        b = await nodes.start("b", MemoryView(log))
        assert await send_numbers(b, 2, 3) == [("duplicate", 2), ("new", 3)]
        await level(a, b)
        await nodes.stop()
        assert_equal_stores([nodes.path("a"), nodes.path("b")])
        reason = await refusal_of(nodes.start("empty", MemoryView(log)))
        assert "copy of another node's store" in reason

    in_cluster(tmp_path, scenario)


def test_a_base_that_is_on_one_disk_only_is_not_believed(tmp_path):
    async def scenario(nodes):
        single = aggregator.Store(nodes.path("a"))
        single.commit([aggregator.record_of(event) for event in numbered_events(1, 2, 1)], NOW)
        single.close()
        # The claim of a is visible, and no standby has it.
        view = MemoryView(MemoryLog())
        view.quorum = None
        a = await nodes.start("a", view)
        await until_true(lambda: view.log.base)
        assert "no standby confirms" in await a.health()
        # The disk is lost. The next primary has no base, and an empty node comes first.
        log = MemoryLog()
        b = await nodes.start("b", MemoryView(log))
        # No try is under way: it would have the base of one and the barrier of another.
        view.reachable = False
        await until_true(lambda: "unplugged" in str(a._log_troubles))
        view.log = log
        view.quorum = True
        view.reachable = True
        await until_true(lambda: "the log began from store" in str(a.trouble()))
        assert "copy of another node's store" in await refusal_of(send_numbers(a, 1))
        assert await send_numbers(b, 1) == [("new", 1)]

    in_cluster(tmp_path, scenario)


@needs_postgres
def test_the_claim_of_a_base_needs_the_quorum(postgres, database, tmp_path):
    async def make_tables(log):
        await log.read(0)

    async def scenario(nodes):
        postgres.reconfigure("synchronous_standby_names", "ANY 1 (nobody)")
        await asyncio.sleep(0.2)
        a = await start_on(nodes, "a", database)
        await until_true(lambda: backends(postgres, "SET base", "pg_terminate_backend(pid)"))
        # The base is visible now, and the node has read it.
        await until_true(lambda: backends(postgres, "pg_logical_emit_message"))
        assert ask_log(database, "SELECT base FROM agg_head") != [""]
        assert not a._joined
        postgres.reconfigure("synchronous_standby_names", "")
        await until_true(lambda: a._joined and not a._log_troubles)
        assert await send_numbers(a, 1) == [("new", 1)]

    in_log(database, make_tables)
    in_cluster(tmp_path, scenario)


def test_a_base_that_changes_while_a_node_runs_is_noticed(tmp_path):
    async def scenario(nodes):
        log = MemoryLog()
        view = MemoryView(log)
        a = await nodes.start("a", view)
        base = log.base
        # An old primary shows another one. It is not believed, and it decides nothing.
        view.quorum = False
        log.base = ""
        await until_true(lambda: a.trouble() is not None)
        log.base = base
        view.quorum = True
        await until_true(lambda: not a._log_troubles)
        log.base = "another:0"
        await until_true(lambda: "it began from 'another:0'" in str(a.trouble()))
        assert "choose the store to go on with" in await refusal_of(send_numbers(a, 1))

    in_cluster(tmp_path, scenario)


@with_cases(
    ("base", "reason"),
    {
        "no base": ("", "does not say which store they began from"),
        "a base without a count": ("x", "(base: 'x')"),
        "a count that is none": ("x:many", "the log is damaged"),
    },
)
def test_a_log_that_has_entries_and(tmp_path, base, reason):
    async def scenario(nodes):
        log = MemoryLog()
        log.add("x", 1, aggregator.encode_entry(entry_of("x", 1, 1)))
        log.base = base
        assert reason in await refusal_of(nodes.start("a", MemoryView(log)))

    in_cluster(tmp_path, scenario)


def test_nodes_that_begin_empty_share_the_id_of_the_first(tmp_path):
    async def scenario(nodes):
        log = MemoryLog()
        a = await nodes.start("a", MemoryView(log))
        await send_numbers(a, 1)
        b = await nodes.start("b", MemoryView(log))
        assert (await b.stats())["store_id"] == (await a.stats())["store_id"]

    in_cluster(tmp_path, scenario)


def test_a_store_of_another_base_is_refused(tmp_path):
    async def scenario(nodes):
        log = MemoryLog()
        await nodes.start("a", MemoryView(log))
        await nodes.start("b", MemoryView(MemoryLog()))
        await send_numbers(nodes.running[1], 1)
        await nodes.crash(nodes.running[1])
        reason = await refusal_of(nodes.start("b", MemoryView(log)))
        assert "the log began from store" in reason
        assert "start with a copy of another node's store" in reason

    in_cluster(tmp_path, scenario)


def test_going_back_to_one_node_and_then_to_the_log_again_is_refused(tmp_path):
    async def scenario(nodes):
        log = MemoryLog()
        a = await nodes.start("a", MemoryView(log))
        await send_numbers(a, 1)
        await nodes.stop()
        alone = aggregator.Store(nodes.path("a"))
        repeated = alone.commit([aggregator.record_of(event) for event in numbered_events(1)], NOW)
        assert repeated.repeats[0].first.seq == 1
        alone.close()
        reason = await refusal_of(nodes.start("a", MemoryView(log)))
        assert "it was used without the log" in reason

    in_cluster(tmp_path, scenario)


@with_cases("numbers", {"after some entries": (1, 2), "before the first entry": ()})
def test_a_store_that_was_used_alone_to_erase_may_not_go_back(tmp_path, numbers):
    async def scenario(nodes):
        single = aggregator.Store(nodes.path("a"))
        single.commit([aggregator.record_of(event) for event in numbered_events(1)], NOW)
        single.close()
        log = MemoryLog()
        a = await nodes.start("a", MemoryView(log))
        for number in numbers:
            await send_numbers(a, number)
        await nodes.stop()
        alone = open_alone(nodes.path("a"))
        assert alone.erase_event("t", "1") == 1
        alone.close()
        reason = await refusal_of(nodes.start("a", MemoryView(log)))
        assert "it was used without the log since" in reason

    in_cluster(tmp_path, scenario)


def test_a_store_that_was_alone_may_begin_a_log(tmp_path):
    async def scenario(nodes):
        open_alone(nodes.path("a")).close()
        await nodes.start("a", MemoryView(MemoryLog()))
        await nodes.stop()
        open_alone(nodes.path("a")).close()
        log = MemoryLog()
        view = MemoryView(log)
        # It claims the base, and does not know yet whether that is on the quorum.
        view.quorum = None
        a = await nodes.start("a", view)
        await until_true(lambda: log.base)
        view.quorum = True
        await until_true(lambda: not a._log_troubles)
        assert await send_numbers(a, 1) == [("new", 1)]

    in_cluster(tmp_path, scenario)


def test_alone_a_store_that_never_had_a_log_is_not_marked(tmp_path):
    path = str(tmp_path / "a")
    open_alone(path).close()
    store = open_alone(path)
    tables = {name for (name,) in store.db.execute("SELECT name FROM sqlite_master")}
    assert "replica" not in tables
    # It looked for its log, did not find it, and was used without.
    store.log_mark()
    store.close()
    store = open_alone(path)
    assert not store.log_mark().was_alone
    store.close()


def test_a_node_that_stops_catches_up_first(tmp_path):
    async def scenario(nodes):
        log = MemoryLog()
        a = await nodes.start("a", MemoryView(log))
        nodes.limits = QUICK._replace(poll_s=60.0)
        b = await nodes.start("b", MemoryView(log))
        await send_numbers(a, 1, 2)
        await nodes.stop()
        assert (a._mark.position, b._mark.position) == (1, 1)
        assert_equal_stores([nodes.path("a"), nodes.path("b")])

    in_cluster(tmp_path, scenario)


def test_a_node_that_stops_waits_no_longer_for_a_log_that_hangs_than_it_may(tmp_path):
    async def scenario(nodes):
        nodes.limits = QUICK._replace(catch_up_s=600.0, poll_s=600.0)
        view = MemoryView(MemoryLog())
        a = await nodes.start("a", view)
        view.read = hang
        nodes.running.remove(a)
        assert await a.stop(0.2)

    in_cluster(tmp_path, scenario)


def test_a_copy_that_is_older_than_the_base_is_refused(tmp_path):
    async def scenario(nodes):
        single = aggregator.Store(nodes.path("a"))
        single.commit([aggregator.record_of(event) for event in numbered_events(1)], NOW)
        aggregator.copy_store(nodes.path("a"), nodes.path("b"))
        single.commit([aggregator.record_of(event) for event in numbered_events(1)], NOW)
        single.close()
        log = MemoryLog()
        await nodes.start("a", MemoryView(log))
        assert "the copy is too old" in await refusal_of(nodes.start("b", MemoryView(log)))

    in_cluster(tmp_path, scenario)


def test_a_store_that_is_too_old_for_the_log_is_refused(tmp_path):
    async def scenario(nodes):
        log = MemoryLog()
        a = await nodes.start("a", MemoryView(log))
        for number in range(5):
            await send_numbers(a, number)
        late = MemoryView(log)
        late.oldest = 4
        b = await nodes.start("b", late)
        await until_true(lambda: b.trouble() is not None)
        reason = await refusal_of(send_numbers(b, 9))
        assert "up to entry 0, and the log begins at 4" in reason
        assert "Start with a copy of another node's store" in await b.health()

    in_cluster(tmp_path, scenario)


@with_cases(
    "change",
    {
        "it ends earlier": lambda log: rewound(log, 3),
        "its last entry is another": lambda log: rewound(log, 5),
        "entries before the new ones are others": lambda log: extended(rewound(log, 4)),
    },
)
def test_a_log_that_was_rewound_is_refused(tmp_path, change):
    async def scenario(nodes):
        log = MemoryLog()
        view = MemoryView(log)
        a = await nodes.start("a", view)
        for number in range(5):
            await send_numbers(a, number)
        view.log = change(log)
        await until_true(lambda: a.trouble() is not None)
        assert "it was rewound" in await a.health()
        assert "it was rewound" in await refusal_of(send_numbers(a, 9))
        assert (await a.event("t", "4"))[0] == 5
        assert (await a.event("t", "1000"))[0] is None

    in_cluster(tmp_path, scenario)


def test_a_store_that_forgets_its_place_begins_a_new_log(tmp_path):
    readme = read_text("README.md")
    command = re.search(r'python3 -c "import sqlite3; ([^"]*DROP TABLE replica[^"]*)"', readme)

    async def scenario(nodes):
        a = await nodes.start("a", MemoryView(MemoryLog()))
        await send_numbers(a, 1)
        await nodes.stop()
        exec(command[1].replace("events.db", nodes.path("a")), {"sqlite3": sqlite3})
        log = MemoryLog()
        a = await nodes.start("a", MemoryView(log))
        assert await send_numbers(a, 1) == [("duplicate", 1)]
        assert log.base.endswith(":1")

    in_cluster(tmp_path, scenario)


def test_an_empty_log_is_not_the_one_that_a_store_has_read(tmp_path):
    async def scenario(nodes):
        a = await nodes.start("a", MemoryView(MemoryLog()))
        await send_numbers(a, 1)
        await nodes.stop()
        reason = await refusal_of(nodes.start("a", MemoryView(MemoryLog())))
        assert "the log is empty, and this store has read 1 entries" in reason

    in_cluster(tmp_path, scenario)


def test_an_old_primary_that_wakes_up_is_not_believed(tmp_path):
    async def scenario(nodes):
        log = MemoryLog()
        view = MemoryView(log)
        a = await nodes.start("a", view)
        for number in range(3):
            await send_numbers(a, number)
        # It shows a row that never reached the quorum, and no commit returns from it.
        view.log = rewound(log, 3)
        view.quorum = False
        await until_true(lambda: a.trouble() is not None)
        assert "no standby confirms" in await a.health()
        view.log = log
        view.quorum = True
        assert await send_numbers(a, 9) == [("new", 4)]
        assert (await a.event("t", "1000"))[0] is None

    in_cluster(tmp_path, scenario)


# ---- The same with PostgreSQL ----


@needs_postgres
def test_nodes_on_postgres_have_equal_stores(database, tmp_path):
    async def scenario(nodes):
        a = await start_on(nodes, "a", database)
        b = await start_on(nodes, "b", database)

        async def publish(node, start):
            for number in range(start, start + 30):
                await send_numbers(node, number, number + 10, sequence=number)

        await asyncio.gather(*[publish((a, b)[i % 2], i * 15) for i in range(8)])
        await b.erase_event("t", "20")
        await level(a, b)
        await nodes.stop()
        assert_equal_stores([nodes.path("a"), nodes.path("b")])

    in_cluster(tmp_path, scenario)


@needs_postgres
def test_while_no_standby_confirms_nothing_is_acknowledged_and_reads_go_on(
    postgres, database, tmp_path
):
    async def scenario(nodes):
        a = await start_on(nodes, "a", database)
        await send_numbers(a, 1)
        postgres.reconfigure("synchronous_standby_names", "ANY 1 (nobody)")
        await asyncio.sleep(0.2)
        assert "may still be stored" in await refusal_of(send_numbers(a, 2))
        assert "no standby confirms" in await a.health()
        assert (await a.event("t", "1"))[0] == 1
        assert (await a.event("t", "2"))[0] is None
        level_s = a._level_s
        await until_true(lambda: a._loop.time() - level_s > QUICK.answer_s)
        # Told in tenths of a second.
        assert (await a.stats())["log"]["lag_seconds"] >= QUICK.answer_s
        postgres.reconfigure("synchronous_standby_names", "")
        await until_true(lambda: not a._log_troubles)
        assert await send_numbers(a, 2) in ([("new", 2)], [("duplicate", 2)])

    in_cluster(tmp_path, scenario)


@needs_postgres
def test_the_trap_a_row_that_is_visible_and_on_one_disk_only(postgres, database, tmp_path):
    async def scenario(nodes):
        b = await start_on(nodes, "b", database)
        await send_numbers(b, 1)
        postgres.reconfigure("synchronous_standby_names", "ANY 1 (nobody)")
        await asyncio.sleep(0.2)
        # A node appends, and no standby has it. Then somebody ends its server process.
        entry = aggregator.Entry("other", 1, NOW, [aggregator.record_of(numbered_events(666)[0])])
        log = aggregator.PostgresLog(aggregator.parse_log_url(database), "other", QUICK)
        appending = asyncio.ensure_future(log.append("other", 1, aggregator.encode_entry(entry)))
        await asyncio.sleep(0.3)
        assert ask_log(database, "SELECT count(*) FROM agg_log") == ["1"]
        postgres.ask(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE application_name = 'aggregator other'"
        )
        # The append is a failure for its node, and the row is there for all to see.
        await refusal_of(appending)
        assert "no standby confirms" in await refusal_of(
            log.append("other", 1, aggregator.encode_entry(entry))
        )
        assert ask_log(database, "SELECT count(*) FROM agg_log") == ["2"]
        await until_true(lambda: b.trouble() is not None)
        await asyncio.sleep(1.0)
        assert (await b.event("t", "666"))[0] is None
        assert (await b.stats())["log"]["lag_entries"] == 1
        # A quorum is back: the row is proved now, and applied.
        postgres.reconfigure("synchronous_standby_names", "")
        await until_true(lambda: b.trouble() is None)
        assert (await b.event("t", "666"))[0] == 2

    in_cluster(tmp_path, scenario)


@needs_postgres
def test_a_cancelled_wait_for_the_quorum_is_no_success(postgres, database):
    async def scenario(log):
        await log.append("w", 1, b"x")
        postgres.reconfigure("synchronous_standby_names", "ANY 1 (nobody)")
        await asyncio.sleep(0.2)
        appending = asyncio.ensure_future(log.append("w", 2, b"y"))
        await asyncio.sleep(0.3)
        postgres.ask(
            "SELECT pg_cancel_backend(pid) FROM pg_stat_activity"
            " WHERE application_name = 'aggregator n'"
        )
        assert "canceling wait for synchronous replication" in await refusal_of(appending)
        postgres.reconfigure("synchronous_standby_names", "")
        await asyncio.sleep(0.2)
        assert (await log.append("w", 2, b"y")).position == 2

    in_log(database, scenario, QUICK._replace(answer_s=5.0))


@needs_postgres
def test_a_log_restored_from_an_old_backup_is_refused(database, tmp_path):
    async def scenario(nodes):
        a = await start_on(nodes, "a", database)
        for number in range(5):
            await send_numbers(a, number)
        ask_log(database, "DELETE FROM agg_log WHERE pos > 3")
        ask_log(
            database,
            "UPDATE agg_head SET pos = 3, chain = (SELECT chain FROM agg_log WHERE pos = 3)",
        )
        await until_true(lambda: a.trouble() is not None)
        assert "from entry 4 on: it was rewound" in await a.health()

    in_cluster(tmp_path, scenario)


# ---- Random interleavings ----


@with_cases(
    "seed", {f"seed {seed}": seed for seed in range(int(os.getenv("LOG_MODEL_SEEDS", "6")))}
)
def test_three_nodes_in_any_interleaving_do_what_a_dict_does(tmp_path, seed):
    """Nodes crash, the log fails at random, and so do the nodes' own disks.

    Some appends that failed come into the log later. Some events are erased.
    """
    rng = random.Random(seed)
    log = MemoryLog()
    acknowledged = []
    erased = set()
    names = ("a", "b", "c")
    live = {}

    async def start_node(nodes, name):
        live[name] = await nodes.start(name, MemoryView(log, rng), recent_ids=32)
        fail_now_and_then(live[name], rng)

    async def publish():
        for _ in range(12):
            events = random_events(rng)
            receipt = None
            while receipt is None:
                await asyncio.sleep(rng.random() * 0.003)
                publishing = live[rng.choice(names)].publish(events, 10)
                with contextlib.suppress(
                    aggregator.StoreFailed, aggregator.Stopping, asyncio.TimeoutError
                ):
                    receipt = await asyncio.wait_for(publishing, 0.5)
            acknowledged.extend(zip(events, receipt.verdicts()))

    async def erase():
        for _ in range(40):
            await asyncio.sleep(rng.random() * 0.02)
            await erase_something(live[rng.choice(names)], rng, erased)

    async def crash_now_and_then(nodes):
        for _ in range(6):
            await asyncio.sleep(rng.random() * 0.05)
            name = rng.choice(names)
            await nodes.crash(live[name])
            await start_node(nodes, name)

    async def scenario(nodes):
        for name in names:
            await start_node(nodes, name)
        publishing = [publish() for _ in range(6)]
        await asyncio.gather(crash_now_and_then(nodes), erase(), *publishing)
        for node in nodes.running:
            node._log.failure_rate = 0
            node.failure_rate = 0
        await until_true(lambda: not log.held)
        # A node whose appends failed puts one more entry into the log.
        await until_true(lambda: not any(node._log_troubles for node in nodes.running))
        for node in nodes.running:
            await until_true(lambda node=node: node._mark.position == len(log.rows))
            stats = await node.stats()
            assert stats["current_queue_size"] == 0
        await nodes.stop()

    limits = QUICK._replace(
        give_up_s=0.05, last_try_s=0.02, retry_s=0.001, poll_s=0.001, proof_s=0.01
    )
    in_cluster(tmp_path, scenario, limits)
    paths = [str(tmp_path / f"{name}.db") for name in names]
    assert_equal_stores(paths)
    firsts = assert_model_agrees(paths[0], log.entries())
    assert_acknowledged(acknowledged, firsts)
    assert not erased & stored_names(paths[0])


# ---- Three servers with a quorum ----


@needs_postgres
@with_cases("action", {"dies": "kill_standby", "is wiped": "wipe_standby"})
def test_nobody_notices_when_a_standby(servers, tmp_path, action):
    url = servers.url(servers.create_database())

    async def scenario(nodes):
        a = await start_on(nodes, "a", url)
        action_ends = run_beside(getattr(servers, action))
        number = 0
        while not action_ends.done():
            number += 1
            assert await send_numbers(a, number) == [("new", number)]
            assert await a.health() == ""
        await action_ends

    in_cluster(tmp_path, scenario)


@needs_postgres
def test_when_the_primary_dies_requests_wait_and_go_on_at_the_next_one(servers, tmp_path):
    url = servers.url(servers.create_database())

    async def scenario(nodes):
        a = await start_on(nodes, "a", url)
        b = await start_on(nodes, "b", url)
        assert await send_numbers(a, 1) == [("new", 1)]
        old = (await a.stats())["log"]["primary"]
        action_ends = run_beside(servers.kill_primary)
        await asyncio.sleep(0.1)
        assert await send_numbers(a, 2) == [("new", 2)]
        assert await send_numbers(b, 1, 2, 3) == [("duplicate", 1), ("duplicate", 2), ("new", 3)]
        await action_ends
        now = (await a.stats())["log"]["primary"]
        assert old != now == f"127.0.0.1:{servers.primary.port}"
        await level(a, b)
        await nodes.stop()
        assert_equal_stores([nodes.path("a"), nodes.path("b")])

    in_cluster(tmp_path, scenario, PATIENT)


@needs_postgres
def test_an_old_primary_that_wakes_up_cannot_commit(servers, tmp_path):
    database = servers.create_database()
    old = servers.primary
    both = servers.url(database, [old, *servers.standbys()])

    async def scenario(nodes):
        a = await start_on(nodes, "a", both)
        assert await send_numbers(a, 1) == [("new", 1)]
        old.signal(signal.SIGSTOP)
        await run_beside(servers.promote)
        old.signal(signal.SIGCONT)
        alone = aggregator.parse_log_url(servers.url(database, [old]))
        log = aggregator.PostgresLog(alone, "alone", QUICK)
        assert "no standby confirms" in await refusal_of(log.append("w", 1, b"x"))
        # The node finds the new primary, though the old one comes first in its URL.
        assert await send_numbers(a, 2) == [("new", 2)]
        assert (await a.stats())["log"]["primary"] == f"127.0.0.1:{servers.primary.port}"
        old.kill()
        await run_beside(lambda: servers.build_standby(old))

    in_cluster(tmp_path, scenario, PATIENT)


@needs_postgres
def test_without_both_standbys_nothing_is_acknowledged(servers, tmp_path):
    url = servers.url(servers.create_database())

    async def scenario(nodes):
        a = await start_on(nodes, "a", url)
        assert await send_numbers(a, 1) == [("new", 1)]
        for standby in servers.standbys():
            standby.kill()
        try:
            assert "may still be stored" in await refusal_of(send_numbers(a, 2))
            assert await a.health() != ""
            assert (await a.event("t", "1"))[0] == 1
            assert (await a.event("t", "2"))[0] is None
        finally:
            for standby in servers.standbys():
                await run_beside(standby.start)
        await until_true(lambda: not a._log_troubles)
        assert (await send_numbers(a, 2))[0][1] == 2

    in_cluster(tmp_path, scenario)


# ---- The program ----


@with_cases(
    ("words", "env", "status", "message"),
    {
        "a URL that is none": (["--log", "mysql://u:hush@h/d"], {}, 2, "--log must look like"),
        "the same by the environment": ([], {"LOG_URL": "u:hush@h"}, 2, "LOG_URL must look like"),
        "a name without a log": (["--node", "a"], {}, 2, "--node needs --log"),
        "a name that is not UTF-8": (
            ["--log", "postgres://u:hush@127.0.0.1:1/d"],
            {"NODE_NAME": os.fsdecode(b"caf\xe9")},
            2,
            "NODE_NAME must not hold control characters or lone surrogates",
        ),
        "ids that are forgotten": (
            ["--log", "postgres://u:hush@127.0.0.1:1/d", "--dedup-retention", "7d"],
            {},
            1,
            "--dedup-retention does not go together with --log",
        ),
    },
)
def test_the_program_does_not_start_with(tmp_path, words, env, status, message):
    found = run("--port", "0", "--db", str(tmp_path / "db"), *words, **env)
    assert found.returncode == status
    assert message in found.stderr
    assert "hush" not in found.stderr


@needs_postgres
def test_the_program_does_not_start_with_a_wrong_password(tmp_path, database):
    url = database.replace(LOG_PASSWORD_IN_URL, "hush")
    found = run("--port", "0", "--db", str(tmp_path / "db"), LOG_URL=url)
    assert found.returncode == 1
    assert "password authentication failed" in found.stderr
    assert "(SQLSTATE 28P01)" in found.stderr
    assert "hush" not in found.stderr


@needs_postgres
def test_two_services_are_one(tmp_path, database):
    with contextlib.ExitStack() as stack:
        env = {"LOG_URL": database}
        a = stack.enter_context(Program(tmp_path / "a", "--node", "a", env=env))
        b = stack.enter_context(Program(tmp_path / "b", "--node", "b", env=env))
        assert a.publish(sample("1"), sample("2")).json["unique"] == 2
        answer = b.publish(sample("2"), sample("3")).json
        assert (answer["unique"], answer["duplicates"]) == (1, 1)
        assert a.ask("GET", "/events/t/3").json["seq"] == 3
        assert b.ask("DELETE", "/events/t/1").status < 300
        wait_until(lambda: a.ask("GET", "/events/t/1").status == 410)
        assert [event["event_id"] for event in a.listed()] == ["2", "3"]
        # The position is written once all of an order to erase is done.
        wait_until(lambda: a.stats()["log"]["position"] == 3)
        place = a.stats()["log"]
        assert (place["node"], place["lag_entries"]) == ("a", 0)
        assert place["primary"] == database.split("@")[1].split("/")[0]
        metrics = a.ask("GET", "/metrics").body.decode()
        assert 'aggregator_log_node{name="a"} 1' in metrics
        assert "aggregator_log_position 3" in metrics
        assert a.ask("GET", "/health").status == 200
        assert LOG_PASSWORD not in a.read_log()
        assert (a.end(), b.end()) == (0, 0)


@needs_postgres
def test_a_copy_by_the_program_is_a_new_node(tmp_path, database):
    env = {"LOG_URL": database}
    with Program(tmp_path / "a", env=env) as a:
        a.publish(sample("1"))
        done = run("backup", "--db", a.db, "--to", str(tmp_path / "b"))
        assert done.returncode == 0, done.stderr
        a.publish(sample("2"))
        with Program(tmp_path / "b", env=env) as b:
            assert b.publish(sample("2"), sample("1")).json["duplicates"] == 2
            assert b.stats()["received"] == 4


@needs_postgres
def test_a_drill_against_a_balancer_finds_every_promise_kept(tmp_path, database):
    async def scenario(ports):
        async def pass_on(reader, writer):
            there, back = await asyncio.open_connection("127.0.0.1", next(ports))
            await asyncio.gather(copy_stream(reader, back), copy_stream(there, writer))

        balancer = await asyncio.start_server(pass_on, "127.0.0.1", 0)
        port = balancer.sockets[0].getsockname()[1]
        url = f"http://127.0.0.1:{port}"
        words = ["drill", "--url", url, "--events", "1000", "--batch", "20"]
        drilled = await run_beside(lambda: run(*words))
        balancer.close()
        return drilled

    env = {"LOG_URL": database}
    with Program(tmp_path / "a", env=env) as a, Program(tmp_path / "b", env=env) as b:
        drilled = in_loop(scenario(itertools.cycle([a.port, b.port])))
        assert drilled.returncode == 0, drilled.stdout + drilled.stderr
        assert "kept: everything acknowledged is stored, and once" in drilled.stdout
        # /stats says what a node has applied, and one of them may be a moment behind.
        wait_until(lambda: a.stats()["stored"] == b.stats()["stored"] == 1000)


def test_a_service_that_is_cut_off_from_its_log_says_so(tmp_path):
    url = f"postgres://u:hush@127.0.0.1:{free_port()}/d"
    with Program(tmp_path / "a", env={"LOG_URL": url}) as a:
        answer = a.ask("GET", "/health")
        assert answer.status == 503
        assert "no server takes entries" in answer.json["detail"]
        assert a.ask("GET", "/events").json["count"] == 0
        assert a.stats()["log"]["lag_seconds"] is None
        assert "hush" not in a.read_log()


# ---- Chaos ----


@needs_postgres
def test_in_chaos_the_log_loses_nothing_and_doubles_nothing(servers, tmp_path):
    """Servers and nodes are killed, paused, wiped and promoted under load.

    LOG_CHAOS_SECONDS says for how long. LOG_CHAOS_EVENTS says how many ids must be
    acknowledged at least.
    """
    seconds = float(os.getenv("LOG_CHAOS_SECONDS", "4"))
    database = servers.create_database()
    nodes = {name: NodeProcess(str(tmp_path), name) for name in ("a", "b", "c")}
    try:
        for node in nodes.values():
            node.start(servers.url(database))
        chaos = live_in_chaos(servers, database, nodes, seconds)
        acknowledged, erased = in_loop(chaos, seconds + 120)
        for node in nodes.values():
            node.stop()
    finally:
        for node in nodes.values():
            node.kill()
    paths = [node.path for node in nodes.values()]
    assert_equal_stores(paths)
    firsts = assert_model_agrees(paths[0], servers.entries(database))
    assert_acknowledged(acknowledged, firsts)
    assert not erased & stored_names(paths[0])
    ids = {(event.topic, event.event_id) for event, _ in acknowledged}
    print(f"{len(ids):,} ids in {len(acknowledged):,} acknowledged events,", end=" ")
    print(f"{len(erased)} erased,", servers.history)
    assert len(ids) >= int(os.getenv("LOG_CHAOS_EVENTS", "100"))


# ============================================================================
# §13 Drill, health; §15 The program: as a process, as people start it
# ============================================================================


def test_a_drill_kills_its_service_and_finds_everything_kept(tmp_path):
    words = ["--events", "3000", "--batch", "20", "--kill9", "2"]
    found = run("drill", *words, TMPDIR=str(tmp_path), PORT="1", RETENTION="1s", AUTH_TOKEN="x")
    assert found.returncode == 0, found
    assert figures_of(found.stdout) == {
        "acknowledged": "3,000",
        "stored": "3,000",
        "lost": "0",
        "stored twice": "0",
        "stored otherwise": "0",
    }
    assert "(99 %)" in found.stdout
    assert "events/s" in found.stdout
    # There is a histogram.
    assert found.stdout.count("\n") > 12
    duplicates = re.search("([0-9,]+) duplicate", found.stderr).group(1)
    assert int(duplicates.replace(",", "")) > 900
    assert os.listdir(str(tmp_path)) == []


@pytest.mark.parametrize("sin", list(SINS))
def test_a_drill_finds_what_is_lost_or_stored_twice_or_otherwise(sin, capsys):
    with Fake(Leaky(sin)) as fake:
        status = client("drill", "--url", fake.url, "--events", 100, "--batch", 7)
    assert status == (0 if sin == "none" else 1)
    figures = figures_of(capsys.readouterr().out)
    for name, value in SINS[sin].items():
        assert figures[name] == value, name


def test_a_drill_does_not_kill_a_service_that_is_not_its_own():
    found = run("drill", "--kill9", "1", "--url", "localhost:1")
    assert_refused(found, 1, "leave out --url")


def test_a_drill_that_may_not_publish_says_so():
    with Fake(lambda asked: (401, {"detail": "no token"})) as fake:
        found = run("drill", "--url", fake.url, "--events", "10")
    assert found.returncode == 1
    assert "no token" in found.stderr
    assert found.stdout == ""


def test_a_drill_shows_its_token(tmp_path):
    with Program(tmp_path / "token.db", "--token", "s3cret") as program:
        url = f"127.0.0.1:{program.port}"
        found = run("drill", "--url", url, "--events", "50", AUTH_TOKEN="s3cret")
    assert found.returncode == 0, found


def test_health_of_a_service_that_can_store_is_ok(site, capsys):
    assert client("health", "--url", f"127.0.0.1:{site.port}") == 0
    assert capsys.readouterr().out == "ok\n"


def test_health_without_a_service_is_a_reason(capsys):
    assert client("health", "--url", "127.0.0.1:1") == 1
    assert "refused" in capsys.readouterr().out


def test_health_waits_for_a_silent_service_but_not_for_long():
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as silent:
        url = aggregator.parse_address(f"127.0.0.1:{silent.getsockname()[1]}")
        began = time.monotonic()
        found = aggregator.health_of_service(url, timeout_s=0.2)
        assert time.monotonic() - began < 2
    assert not found.is_good
    assert "timed out" in found.sentence


@with_cases(
    "answer, reason",
    {
        "trouble": ((503, {"detail": "disk full"}), "503 disk full"),
        "another service": ((200, "<html>"), "200 OK"),
    },
)
def test_health_tells_what_the_service_says(answer, reason, capsys):
    with Fake(lambda target: answer) as fake:
        assert client("health", "--url", fake.url) == 1
    assert reason in capsys.readouterr().out
    assert fake.asked == ["/health"]


def test_health_over_https_checks_the_certificate(tmp_path, certificate):
    with Program(tmp_path / "tls.db", "--tls-cert", certificate) as program:
        url = f"https://localhost:{program.port}"
        unknown = run("health", "--url", url)
        known = run("health", "--url", url, SSL_CERT_FILE=certificate)
    assert unknown.returncode == 1
    assert "certificate verify failed" in unknown.stdout.lower()
    assert known.returncode == 0
    assert known.stdout == "ok\n"


def place_of_a_shipper(folder, **changes):
    place = {"of": "/var/log/app.log", "at": "2026-01-01T00:00:00Z", "follows": True}
    place.update(lag=70, unit="bytes", error="", place={})
    place.update(changes)
    path = os.path.join(str(folder), "place")
    with open(path, "w") as file:
        json.dump(place, file)
    return path


@with_cases(
    "changes, age_s, expected",
    {
        "fresh": ({}, 59, (True, "ok, 70 bytes behind")),
        "too old": ({}, 61, (False, "last heard of 61 s ago: it does not run, or hangs")),
        "a run that ends": ({"follows": False}, 10**6, (True, "ok, 70 bytes behind")),
        "a relay": ({"unit": "seqs", "lag": 3}, 0, (True, "ok, 3 seqs behind")),
        "waiting": ({"error": "no route to host"}, 0, (False, "no route to host")),
    },
)
def test_health_of_a_shipper_is_read_from_its_place(tmp_path, changes, age_s, expected):
    path = place_of_a_shipper(tmp_path, **changes)
    assert aggregator.health_of_shipper(path, NOW + age_s * 1_000_000) == expected


@with_cases(
    "text",
    {
        "no JSON": "{",
        "an array": "[]",
        "no UTF-8": b"\xff",
        "an older version": '{"of": "x", "place": [1]}',
        "a time in words": '{"of":"x","at":"noon","follows":true,"lag":0,"unit":"s","error":""}',
    },
)
def test_a_file_that_is_no_place_is_said_to_be_none(tmp_path, text, capsys):
    path = tmp_path / "place"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert client("health", "--state", path) == 1
    assert capsys.readouterr().out == f"{path}: holds no place of this version yet\n"


def test_a_place_that_is_not_there_is_named(tmp_path, capsys):
    assert client("health", "--state", tmp_path / "none") == 1
    assert capsys.readouterr().out == f"{tmp_path / 'none'}: {os.strerror(errno.ENOENT)}\n"


# ---------------------------------------------------------------------------
# Settings


@pytest.mark.parametrize("name", list(aggregator.COMMANDS))
def test_the_table_of_a_command_fills_the_record_of_its_settings(name):
    command = aggregator.COMMANDS[name]
    fields = [setting.field for setting in command.settings]
    required = set(command.record._fields) - set(command.record._field_defaults)
    assert len(fields) == len(set(fields))
    assert required <= set(fields) <= set(command.record._fields)


@with_cases("flags, env, named", BAD_SETTINGS)
def test_a_bad_setting_is_one_clear_line(start_with, flags, env, named):
    assert_refused(start_with(flags, env), 2, named)


def test_a_program_with_a_bad_setting_does_not_touch_the_store(tmp_path):
    found = run("--db", str(tmp_path / "never.db"), "--sync", "maybe")
    assert_refused(found, 2, "--sync must be one of full, normal")
    assert os.listdir(str(tmp_path)) == []


@with_cases("words, named", UNKNOWN_WORDS)
def test_an_unknown_flag_is_one_clear_line(start_with, words, named):
    assert_refused(start_with(words, {}), 2, named)


def test_an_unknown_command_is_one_clear_line():
    assert_refused(run("chekc"), 2, "; there are: serve, check, ")


def test_a_flag_counts_more_than_a_variable_and_a_variable_more_than_a_default():
    environment = {"PORT": "1", "HOST": "::1", "DB_PATH": ""}
    settings = aggregator.read_settings("serve", ["--port", "2"], environment)
    assert settings.port == 2
    assert settings.host == "::1"
    assert settings.db == "dedup_store.db"


def test_commands_look_for_the_service_at_the_port_of_the_environment():
    settings = aggregator.read_settings("health", [], {"PORT": "8123"})
    assert settings.url.geturl() == "http://127.0.0.1:8123"


@with_cases("flags, env, message", BAD_ACCESS)
def test_access_settings_that_cannot_be_meant_are_refused(start_with, flags, env, message):
    assert_refused(start_with(flags, env), 2, message)


@with_cases(
    "words, env",
    {
        "a flag": (["--token", "se:cret"], {}),
        "a variable": ([], {"AUTH_TOKEN": "se:cret"}),
        "another": (["--token", "t"], {"READ_TOKEN": "se:cret"}),
    },
)
def test_no_secret_is_shown(start_with, words, env):
    assert "se:cret" not in start_with(words, env).stderr


@with_cases("text", {"blanks": "old new", "commas": "old,new", "both": " old, new ,"})
def test_several_tokens_may_be_given(text):
    settings = aggregator.read_settings("serve", [], {"AUTH_TOKEN": text, "READ_TOKEN": "a b"})
    assert settings.tokens == ("old", "new")
    assert settings.read_tokens == ("a", "b")


def test_each_of_several_tokens_is_good_and_no_other(tmp_path):
    with Program(tmp_path / "store.db", "--token", "old,new") as program:
        for token, status in (("old", 200), ("new", 200), ("old,new", 401), ("other", 401)):
            answer = program.ask("GET", "/stats", Authorization=f"Bearer {token}")
            assert answer.status == status, token


def test_a_random_id_is_a_uuid_of_version_4():
    form = "[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
    ids = {aggregator.random_uuid() for _ in range(100)}
    assert len(ids) == 100
    for text in ids:
        assert re.fullmatch(form, text), text


# ---------------------------------------------------------------------------
# The log


def test_of_a_flood_of_warnings_some_lines_are_logged():
    with LimitedLog() as limited:
        for _ in range(1_234):
            aggregator.log.warning("CONFLICT - topic: %s", "t")
    assert limited.written == ["CONFLICT - topic: t"] * aggregator.LOG_LINES


def test_what_strangers_cannot_cause_is_logged_in_full():
    with LimitedLog() as limited:
        for _ in range(1_234):
            aggregator.log.info("EVENT PROCESSED - topic: %s", "t")
    assert limited.written == ["EVENT PROCESSED - topic: t"] * 1_234


def test_a_flood_of_one_kind_leaves_room_for_the_others():
    with LimitedLog() as limited:
        for _ in range(1_234):
            aggregator.log.warning("CONFLICT - topic: %s", "t")
        aggregator.log.error("COMMIT FAILED - %s", "why")
    assert limited.written[-1] == "COMMIT FAILED - why"


def test_a_flood_of_one_status_leaves_room_for_the_others(desk):
    with LimitedLog() as limited:
        for _ in range(aggregator.LOG_LINES + 5):
            desk.api.refuse(aggregator.HTTPError("bad-request", "junk"), "192.0.2.7")
        desk.api.refuse(aggregator.HTTPError("unauthorized", "wrong token"), "192.0.2.7")
    assert len(limited.written) == aggregator.LOG_LINES + 1
    assert limited.written[-1] == "REFUSED 401 - 192.0.2.7: wrong token"


def test_a_line_without_a_format_is_of_the_kind_of_its_place():
    with LimitedLog() as limited:
        for n in range(aggregator.LOG_LINES + 5):
            aggregator.log.warning("line %d" % n)
    assert len(limited.written) == aggregator.LOG_LINES


def test_when_the_period_is_over_it_is_said_how_many_lines_were_left_out():
    with LimitedLog() as limited:
        for n in range(1_234):
            aggregator.log.warning("CONFLICT - topic: %s", n)
        limited.now_s += aggregator.LOG_PERIOD_S
        aggregator.log.error("COMMIT FAILED - %s", "why")
    left_out = f"… and {1_234 - aggregator.LOG_LINES:,} more like it: CONFLICT - topic: 1233"
    assert limited.written[-2:] == [left_out, "COMMIT FAILED - why"]


def test_log_lines_are_written_in_order():
    piped = PipedLog()
    for n in range(1000):
        piped.writer.handle(log_record(f"line {n}"))
    assert piped.read_lines() == [f"INFO line {n}" for n in range(1000)]


def test_who_logs_does_not_wait_for_who_reads_the_log():
    piped = PipedLog()
    piped.fill()
    began = time.monotonic()
    for n in range(5000):
        piped.writer.handle(log_record(f"line {n}"))
    assert time.monotonic() - began < 2


def test_what_waits_to_be_logged_is_bounded_and_what_is_dropped_is_counted():
    piped = PipedLog(most_bytes=10_000)
    filling = piped.fill()
    for n in range(5000):
        piped.writer.handle(log_record(f"line {n:04d}"))
    piped.read(filling)
    written = piped.read_lines()
    dropped = re.findall("LOG LINES DROPPED - ([0-9,]+): ", "\n".join(written))
    kept = [line for line in written if line.startswith("INFO line")]
    most = 10_000 // len("INFO line 0000\n")
    assert kept == [f"INFO line {n:04d}" for n in range(most)]
    assert sum(int(count.replace(",", "")) for count in dropped) == 5000 - most


@needs_linux
def test_what_a_full_disk_did_not_take_of_the_log_is_counted():
    with open("/dev/full", "wb", buffering=0) as full:
        writer = aggregator.LogWriter(full.fileno())
        writer.start()
        for n in range(3):
            writer.handle(log_record(f"line {n}"))
        wait_until(lambda: writer.dropped == 3)


def test_a_log_line_that_is_not_utf8_is_written_all_the_same():
    piped = PipedLog()
    piped.writer.handle(log_record("store caf\udce9"))
    assert piped.read_lines() == ["INFO store caf\\udce9"]


def test_flushing_the_log_waits_for_a_notice_that_is_being_written(monkeypatch):
    piped = PipedLog()
    begun, gate = threading.Event(), threading.Event()
    monkeypatch.setattr(piped.writer, "_write", lambda text: begun.set() or gate.wait(15))
    with piped.writer._changed:
        piped.writer.dropped = 3
        piped.writer._changed.notify_all()
    assert begun.wait(15)
    flushing = threading.Thread(target=piped.writer.flush, args=(15,))
    flushing.start()
    flushing.join(0.05)
    assert flushing.is_alive()
    gate.set()
    flushing.join(15)
    assert not flushing.is_alive()


def test_flushing_the_log_does_not_wait_for_ever():
    piped = PipedLog()
    piped.fill()
    piped.writer.handle(log_record("stuck"))
    began = time.monotonic()
    piped.writer.flush(0.1)
    assert time.monotonic() - began < 2


@needs_linux
def test_a_reader_of_the_log_who_stops_reading_does_not_stop_the_service(tmp_path):
    read_end, write_end = os.pipe()
    words = [*COMMAND, "--port", "0", "--db", str(tmp_path / "s.db")]
    process = subprocess.Popen(words, stderr=write_end, env=clean_environment())
    try:
        line = b""
        while b"LISTENING" not in line:
            line += os.read(read_end, 1000)
        port = int(re.search(rb"127\.0\.0\.1:([0-9]+)", line).group(1))
        # From here on nobody reads. Each event is a line of about 100 bytes.
        for n in range(1500):
            assert fetch(port, "PUT", f"/events/t/{n}", b"{}").status == 201
        assert fetch(port, "GET", "/health").status == 200
        process.terminate()
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.wait(10)
        os.close(read_end)
        os.close(write_end)


def test_the_last_lines_of_a_crash_get_out(tmp_path):
    command = with_changes(
        "async def crash(*arguments): raise ZeroDivisionError('ouch')\n"
        "aggregator.stop_in_order = crash"
    )
    with Program(tmp_path / "crash.db", command=command) as program:
        assert program.end() == 1
        assert "CRITICAL CRASHED - this is a bug" in program.read_log()
        assert program.read_log().endswith("ZeroDivisionError: ouch\n")


def test_under_journald_log_lines_leave_the_time_to_it(tmp_path):
    script = (
        "import os, sys; found = os.fstat(2);"
        " os.environ['JOURNAL_STREAM'] = '%d:%d' % (found.st_dev, found.st_ino);"
        " os.execv(sys.executable, [sys.executable] + sys.argv[1:])"
    )
    command = [sys.executable, "-c", script, PROGRAM]
    with Program(tmp_path / "a.db", command=command) as program:
        assert program.read_log().startswith("INFO LISTENING")


def test_under_another_stream_than_journalds_log_lines_have_their_time(tmp_path):
    with Program(tmp_path / "b.db", env={"JOURNAL_STREAM": "1:1"}) as program:
        assert re.match(r"[0-9]{4}-[0-9]{2}-[0-9]{2} ", program.read_log())


# ---------------------------------------------------------------------------
# Start


def test_the_start_up_line_names_address_file_and_versions(tmp_path):
    with Program(tmp_path / "named.db", env={"DB_PATH": "/ignored"}) as program:
        assert f"http://127.0.0.1:{program.port}" in program.start_up
        assert os.path.realpath(program.db) in program.start_up
        assert aggregator.versions() in program.start_up


def test_a_setting_of_the_environment_is_seen_in_the_limits(tmp_path):
    with Program(tmp_path / "named.db", env={"QUEUE_MAX_SIZE": "77"}) as program:
        assert program.stats()["limits"]["queue_max_size"] == 77


def test_version_names_all_versions():
    found = run("--version")
    assert found.returncode == 0
    assert found.stdout.strip() == aggregator.versions()
    assert aggregator.__version__ in found.stdout
    assert sqlite3.sqlite_version in found.stdout


@pytest.mark.parametrize("words", [("serve", "--port", "0"), ("check",)])
def test_a_second_process_on_the_same_file_is_refused_and_the_first_goes_on(tmp_path, words):
    with Program(tmp_path / "one.db") as program:
        program.publish(sample())
        found = run(*words, "--db", program.db)
        assert_refused(found, 1, "another running aggregator")
        assert program.stats()["received"] == 1


def test_a_second_process_on_the_same_port_is_refused_and_leaves_its_file_alone(tmp_path):
    other = str(tmp_path / "other.db")
    with Program(tmp_path / "one.db") as program:
        found = run("--db", other, "--port", str(program.port))
        reason = os.strerror(errno.EADDRINUSE)
        advice = "stop what listens there, or choose another --port"
        assert_refused(found, 1, f"127.0.0.1:{program.port}: {reason}; {advice}\n")
        assert not os.path.exists(other)


def test_the_lock_of_a_killed_process_does_not_stay(tmp_path):
    with Program(tmp_path / "one.db") as program:
        program.publish(sample())
        program.kill()
    with Program(tmp_path / "one.db") as program:
        assert program.publish(sample()).json["duplicates"] == 1


@with_cases("make, message", NO_STORES)
def test_a_file_that_cannot_be_a_store_is_refused_and_left_as_it_is(tmp_path, make, message):
    path = str(tmp_path / "file")
    make(path)
    with open(path, "rb") as file:
        before = file.read()
    assert_refused(run("--db", path, "--port", "0"), 1, message)
    checked = run("check", "--db", path)
    assert checked.returncode == 1
    assert "Traceback" not in checked.stderr
    assert message in checked.stderr + checked.stdout or message == "damaged"
    with open(path, "rb") as file:
        assert file.read() == before


@with_cases("name, message", {"folder": ("", "is a folder"), "none": ("no/x", "does not exist")})
def test_a_place_that_cannot_hold_a_store_is_refused(tmp_path, name, message):
    found = run("--db", str(tmp_path / name), "--port", "0")
    assert_refused(found, 1, message)
    assert os.listdir(str(tmp_path)) == []


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    if os.geteuid() == 0:
        pytest.skip("nothing is read-only for root")
    (tmp_path / "closed").mkdir(0o500)
    found = run("--db", str(tmp_path / "closed/x.db"), "--port", "0")
    assert_refused(found, 1, "read-only")


@with_cases("damage", DAMAGES)
def test_check_finds_planted_damage(tmp_path, sound_store, damage, capsys):
    path = str(tmp_path / "damaged.db")
    shutil.copy(sound_store, path)
    with contextlib.closing(sqlite3.connect(path)) as connection:
        assert connection.execute(damage).rowcount > 0
        connection.commit()
    assert client("check", "--db", path) == 1
    assert re.search("^BAD .*NOT", capsys.readouterr().out, re.M)


def test_an_old_python_is_told_so():
    pythons = sorted(glob.glob(os.path.expanduser("~/.pyenv/versions/3.[67].*/bin/python")))
    if not pythons:
        pytest.skip("no Python before 3.8 here")
    for python in pythons:
        assert_refused(run(program=(python, PROGRAM)), 2, "3.8 or newer is needed")


def test_serving_needs_none_of_the_modules_that_openwrt_packs_separately(tmp_path):
    code = f"for name in {SPLIT_MODULES!r}: sys.modules[name] = None"
    folder = os.path.dirname(PROGRAM)
    code = f"import sys; sys.path.insert(0, {folder!r})\n{code}\nimport aggregator\n"
    command = [sys.executable, "-c", code + "sys.exit(aggregator.main())"]
    with Program(tmp_path / "small.db", command=command) as program:
        assert program.publish(sample()).json["unique"] == 1
        assert program.publish(sample()).json["duplicates"] == 1
        assert program.ask("GET", "/events").json["count"] == 1
        assert program.end() == 0


def test_compiled_once_it_runs_as_a_module(tmp_path):
    folder = tmp_path / "app"
    folder.mkdir()
    shutil.copy(PROGRAM, str(folder / "aggregator.py"))
    words = [sys.executable, "-m", "compileall", "-q", "--invalidation-mode", "unchecked-hash"]
    subprocess.run([*words, "aggregator.py"], check=True, cwd=str(folder), timeout=60)
    (folder / "aggregator.py").write_text("raise SystemExit('the source was read')")
    script = (
        "import os, sys; os.chdir(sys.argv[1]);"
        " os.execv(sys.executable, [sys.executable, '-m', 'aggregator'] + sys.argv[2:])"
    )
    command = [sys.executable, "-c", script, str(folder)]
    with Program(tmp_path / "s.db", command=command) as program:
        assert program.publish(sample()).json["unique"] == 1
        assert program.end() == 0


@with_cases(
    "words, env, loaded",
    {
        "plain": ((), {}, False),
        "a certificate": (("--tls-cert", "x"), {}, True),
        "a certificate in the environment": ((), {"TLS_CERT": "x"}, True),
        "an https address": (("health", "--url", "HTTPS://nas", "--help"), {}, True),
        "an https service": ((), {"AGGREGATOR_URL": "https://nas"}, True),
    },
)
def test_openssl_is_loaded_for_tls_only(words, env, loaded):
    # With -v, Python tells of each module that it has loaded.
    found = run(*words, "--version", program=(sys.executable, "-S", "-v", PROGRAM), **env)
    assert found.returncode == 0
    assert re.search("^import 'sqlite3'", found.stderr, re.M)
    assert bool(re.search("^import '(?:_ssl|_hashlib)'", found.stderr, re.M)) == loaded


def test_a_python_that_has_no_hashes_but_those_of_openssl_will_do():
    pytest.importorskip("_hashlib")
    gone = ["_md5", "_sha1", "_sha2", "_sha256", "_sha512"]
    # Python 3.8 has no other SHA-3.
    if sys.version_info >= (3, 9):
        gone.append("_sha3")
    code = f"import runpy, sys; sys.modules.update(dict.fromkeys({gone}));"
    code += f" sys.argv[1:] = ['--version']; runpy.run_path({PROGRAM!r}, run_name='__main__')"
    found = run("-c", code, program=(sys.executable,))
    assert found.stderr == ""
    assert found.returncode == 0
    assert "aggregator" in found.stdout


@with_cases(
    "words, closed, status",
    {
        "no output": (["--version"], ">&-", 0),
        "no errors": (["--port", "abc"], "2>&-", 2),
        "no output and trouble": (["check", "--db", "/none/x"], ">&-", 1),
        "no errors and trouble": (["check", "--db", "/none/x"], "2>&-", 1),
        "nothing at all": (["health", "--url", "127.0.0.1:1"], "<&- >&- 2>&-", 1),
    },
)
def test_closed_standard_streams_change_no_exit_status(words, closed, status):
    found = run(*words, program=from_a_shell(f'"$@" {closed}'))
    assert "Traceback" not in found.stderr
    assert found.returncode == status


@needs_linux
def test_with_closed_standard_streams_nothing_else_gets_their_numbers(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    words = [*COMMAND, "--port", str(port), "--db", str(tmp_path / "s.db")]
    shell = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *words]
    process = subprocess.Popen(shell, env=clean_environment())
    try:
        wait_until(lambda: client("health", "--url", f"127.0.0.1:{port}") == 0)
        for number in (0, 1, 2):
            assert os.readlink(f"/proc/{process.pid}/fd/{number}") == os.devnull
        assert fetch(port, "PUT", "/events/t/1", b"{}").status == 201
        process.terminate()
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.wait(10)


def test_output_that_nobody_takes_is_a_sentence_and_a_status(tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("there is no /dev/full")
    aggregator.Store(str(tmp_path / "s.db")).close()
    program = from_a_shell('"$@" >/dev/full')
    found = run("check", "--db", str(tmp_path / "s.db"), program=program)
    assert_refused(found, 1, os.strerror(errno.ENOSPC))


def test_a_store_under_a_name_that_is_not_utf8_is_served_and_checked(tmp_path):
    folder = os.fsencode(str(tmp_path)) + b"/caf\xe9"
    try:
        os.mkdir(folder)
    except OSError:
        pytest.skip("this file system has only names in UTF-8")
    db = os.fsdecode(folder + b"/s.db")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    words = [*COMMAND, "--port", str(port), "--db", db]
    with subprocess.Popen(words, stderr=subprocess.PIPE, env=clean_environment()) as process:
        try:
            line = process.stderr.readline()
            assert b"LISTENING" in line
            assert b"caf\\udce9" in line
            assert fetch(port, "PUT", "/events/t/1", b"{}").status == 201
            os.unlink(db)
            assert fetch(port, "PUT", "/events/t/2", b"{}").status == 503
            answer = fetch(port, "GET", "/health")
            assert answer.status == 503
            assert "moved" in answer.json["detail"]
            process.terminate()
            rest = process.stderr.read()
        finally:
            process.kill()
    assert b"Traceback" not in rest


def test_check_of_a_name_that_is_not_utf8_says_what_it_found(tmp_path):
    path = os.fsencode(str(tmp_path)) + b"/caf\xe9.db"
    found = run("check", "--db", os.fsdecode(path))
    assert_refused(found, 1, "caf")


@needs_linux
def test_without_enough_descriptors_the_start_says_what_to_raise(tmp_path):
    few = from_a_shell('ulimit -n 16; exec "$@"')
    found = run("--db", str(tmp_path / "s.db"), "--port", "0", program=few)
    assert_refused(found, 1, "raise the limit (ulimit -n)")
    assert os.listdir(str(tmp_path)) == []


NO_THREADS = """
import threading
def refuse(self): raise RuntimeError("can't start new thread")
threading.Thread.start = refuse
"""


@with_cases(
    "words",
    {
        "serve": ["serve", "--port", "0"],
        "publish": ["publish", "--topic", "t"],
        "drill": ["drill", "--url", "127.0.0.1:1", "--events", "1"],
    },
)
def test_without_threads_a_command_says_what_to_raise(tmp_path, words):
    if words[0] == "serve":
        words = [*words, "--db", str(tmp_path / "s.db")]
    with Fake(lambda asked: (200, {"status": "ok"})) as fake:
        words = [fake.url if word == "127.0.0.1:1" else word for word in words]
        found = run(*words, program=with_changes(NO_THREADS))
    assert found.returncode == 1
    assert "Traceback" not in found.stderr
    last_line = found.stderr.splitlines()[-1]
    assert last_line.startswith("aggregator.py: no further thread can be started")


def test_without_a_thread_for_the_store_the_start_says_what_to_raise(tmp_path):
    one_thread = NO_THREADS.replace("threading.Thread.start = refuse", "").lstrip()
    one_thread += "start = threading.Thread.start\n"
    one_thread += "def start_log(self): start(self) if self.name == 'log' else refuse(self)\n"
    one_thread += "threading.Thread.start = start_log"
    command = with_changes(one_thread)
    found = run("--db", str(tmp_path / "s.db"), "--port", "0", program=command)
    assert_refused(found, 1, "no further thread can be started")


@with_cases("host", {"no address": "999.1.1.1", "no name": "a" * 70 + ".example", "blank": " "})
def test_a_host_that_is_none_is_one_clear_line(tmp_path, host):
    found = run("--host", host, "--port", "0", "--db", str(tmp_path / "s.db"))
    assert_refused(found, 1, host)


# ---------------------------------------------------------------------------
# Systems that are no Linux


def test_what_windows_lacks_is_not_needed_to_publish_and_to_read(tmp_path):
    command = as_on_windows(tmp_path)
    with Program(tmp_path / "win.db", command=command) as program:
        assert program.publish(sample()).json["unique"] == 1
        assert program.publish(sample()).json["duplicates"] == 1
        assert len(program.listed()) == 1
        assert program.ask("GET", "/health").status == 200
        # Ctrl-C
        assert program.end(signal.SIGINT) == 0
        assert_no_traceback(program)
        assert "STOPPED" in program.read_log()


def test_where_a_promise_cannot_be_kept_the_start_says_so(tmp_path):
    with Program(tmp_path / "win.db", command=as_on_windows(tmp_path)) as program:
        wait_until(lambda: program.read_log().count("NOT PROMISED HERE") == 2)
        assert "a folder cannot be forced to the disk here" in program.read_log()
    with Program(tmp_path / "linux.db") as program:
        assert program.end() == 0
        assert sys.platform != "linux" or "NOT PROMISED" not in program.read_log()


def test_a_start_that_does_not_wait_for_the_disk_says_so(tmp_path):
    with Program(tmp_path / "s.db", "--sync", "normal") as program:
        assert program.end() == 0
        assert "with --sync normal, a power cut may undo the last commits" in program.read_log()


def test_what_windows_lacks_is_not_needed_to_check(tmp_path):
    aggregator.Store(str(tmp_path / "s.db")).close()
    found = run("check", "--db", str(tmp_path / "s.db"), program=as_on_windows(tmp_path))
    assert found.stderr == ""
    assert found.returncode == 0


def test_what_windows_lacks_is_not_needed_for_a_drill_without_kills(tmp_path):
    found = run("drill", "--events", "300", program=as_on_windows(tmp_path))
    assert found.returncode == 0, found
    assert figures_of(found.stdout)["stored"] == "300"


# ---------------------------------------------------------------------------
# Stop


def test_after_kill_9_nothing_acknowledged_is_lost_and_nothing_is_there_twice(tmp_path):
    publishers = [Publisher(n) for n in range(8)]
    db = tmp_path / "kill.db"
    rng = random.Random(5)
    retried = 0
    for _ in range(int(os.environ.get("KILL_ROUNDS", "5"))):
        with Program(db) as program, publishing(publishers, program.port):
            time.sleep(rng.uniform(0.2, 0.7))
            program.kill()
        retried += sum(len(publisher.pending) for publisher in publishers)
    with Program(db) as program:
        with publishing(publishers, program.port):
            time.sleep(0.3)
        stats = program.stats()
        listed = [row["event_id"] for row in program.listed()]
        assert program.end() == 0

    acknowledged = acknowledged_by(publishers)
    assert retried > 0
    assert len(acknowledged) > 100
    assert len(acknowledged) == sum(publisher.sent for publisher in publishers)
    assert set(listed) == acknowledged
    assert len(listed) == len(set(listed))
    assert set(ids_in_store(db)) == acknowledged
    assert stats["unique_processed"] == len(acknowledged)
    assert stats["duplicate_dropped"] <= retried
    assert stats["received"] == stats["unique_processed"] + stats["duplicate_dropped"]
    assert stats["conflicts"] == 0
    assert_sound(db)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_a_signal_under_load_ends_the_program_with_everything_acknowledged_on_disk(tmp_path, name):
    publishers = [Publisher(n) for n in range(4)]
    publishers += [Publisher(n, "/publish?wait=0") for n in range(4, 8)]
    with Program(tmp_path / "term.db") as program:
        with publishing(publishers, program.port):
            time.sleep(0.7)
            assert program.end(getattr(signal, name)) == 0
        assert_no_traceback(program)
        assert "STOPPED" in program.read_log()
    stored = ids_in_store(program.db)
    for publisher in publishers:
        assert publisher.acknowledged
        assert publisher.acknowledged <= set(stored)
    assert len(stored) == len(set(stored))
    assert_sound(program.db)


def test_sighup_does_not_end_a_program_that_nohup_started(tmp_path):
    command = from_a_shell("trap '' HUP; exec \"$@\"")
    with Program(tmp_path / "nohup.db", command=command) as program:
        program.process.send_signal(signal.SIGHUP)
        assert program.publish(sample()).status == 202
        assert program.end() == 0


def test_a_second_signal_ends_the_program_at_once(tmp_path):
    unfinished = http_request("POST", "/publish", b"", "Content-Length: 9", "Expect: 100-continue")
    with Program(tmp_path / "twice.db") as program, dialled(program.port, 1, unfinished) as socks:
        for sock in socks:
            assert sock.recv(12) == b"HTTP/1.1 100"
        program.process.send_signal(signal.SIGTERM)
        wait_until(lambda: "STOPPING" in program.read_log())
        # It waits for the request under way.
        assert program.process.poll() is None
        began = time.monotonic()
        assert program.end() == 130
        assert time.monotonic() - began < 1
    assert_sound(program.db)


HANGING_DISK = """
import time
aggregator.Store.commit = lambda *arguments: time.sleep(40)
"""


def hanging(**limits):
    """A command that runs the program on a disk that hangs."""
    *words, code = with_stop_limits(**limits)
    return [*words, code.replace("import aggregator\n", "import aggregator\n" + HANGING_DISK)]


def test_a_hanging_disk_is_waited_for_and_then_left(tmp_path):
    with Program(tmp_path / "hang.db", command=hanging(drain_s=0.1)) as program:
        assert program.ask("POST", "/publish?wait=0", sample()).status == 202
        began = time.monotonic()
        assert program.end() == 1
        assert time.monotonic() - began < 5
        assert "may not be stored" in program.read_log()


def test_a_stop_has_an_end_whatever_hangs(tmp_path):
    command = hanging(drain_s=30, total_s=0.5)
    with Program(tmp_path / "hang.db", command=command) as program:
        assert program.ask("POST", "/publish?wait=0", sample()).status == 202
        began = time.monotonic()
        assert program.end() == 1
        assert time.monotonic() - began < 5
        assert "NOT STOPPED IN ORDER" in program.read_log()


def test_everything_that_a_stop_may_take_fits_the_10_s_of_docker_stop():
    limits = aggregator.StopLimits()
    assert limits.total_s + aggregator.LOG_FLUSH_S < 10
    assert limits.requests_s + limits.drain_s < limits.total_s


def test_a_second_signal_is_heard_while_the_disk_hangs(tmp_path):
    with Program(tmp_path / "hang.db", command=hanging(drain_s=30, total_s=60)) as program:
        assert program.ask("POST", "/publish?wait=0", sample()).status == 202
        program.process.send_signal(signal.SIGTERM)
        wait_until(lambda: "STOPPING" in program.read_log())
        began = time.monotonic()
        assert program.end() == 130
        assert time.monotonic() - began < 1


def test_a_disk_that_hangs_at_the_start_does_not_keep_the_program_from_ending(tmp_path):
    *words, code = with_stop_limits(total_s=0.5)
    hanging_start = "import time; aggregator.open_store = lambda *arguments: time.sleep(40)"
    code = code.replace("import aggregator\n", f"import aggregator\n{hanging_start}\n")
    db = str(tmp_path / "s.db")
    words = [*words, code, "--port", "0", "--db", db, "--log-level", "debug"]
    environment = clean_environment()
    with subprocess.Popen(words, stderr=subprocess.PIPE, env=environment) as process:
        try:
            # asyncio's first line, at DEBUG: the loop runs.
            assert process.stderr.readline()
            time.sleep(0.5)
            process.terminate()
            assert process.wait(5) == 1
            assert b"NOT STOPPED IN ORDER" in process.stderr.read()
        finally:
            process.kill()


def test_an_idle_connection_does_not_delay_the_end(tmp_path):
    with Program(tmp_path / "idle.db") as program, dialled(program.port, 1):
        with contextlib.closing(dial(program.port, HEALTH)) as kept:
            assert kept.recv(5) == b"HTTP/"
            began = time.monotonic()
            assert program.end() == 0
            assert time.monotonic() - began < 1.5


def test_sigterm_at_any_moment_of_the_start_leaves_a_sound_store_or_none(tmp_path):
    for n in range(6):
        db = str(tmp_path / f"{n}.db")
        words = [*COMMAND, "--port", "0", "--db", db]
        process = subprocess.Popen(
            words, stderr=subprocess.PIPE, text=True, env=clean_environment()
        )
        time.sleep(0.06 * (n + 1))
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=10)
        assert process.returncode in (0, -signal.SIGTERM)
        assert "Traceback" not in log
        with contextlib.closing(aggregator.Store(db)) as store:
            store.commit([event(1)], NOW)
        assert_sound(db)


def test_sigterm_with_clients_in_every_phase_ends_the_program_in_time(tmp_path):
    publishers = [Publisher(n) for n in range(4)]
    large = [sample(f"{n}", payload={"x": "y" * 30_000}) for n in range(100)]
    command = with_stop_limits(requests_s=0.7)
    with contextlib.ExitStack() as stack:
        program = stack.enter_context(Program(tmp_path / "phases.db", command=command))
        program.publish(*large)
        stack.enter_context(publishing(publishers, program.port))
        for data in PHASES.values():
            stack.enter_context(dialled(program.port, 1, data, receive_bytes=4096))
        time.sleep(0.3)
        began = time.monotonic()
        assert program.end() == 0
        assert time.monotonic() - began < 5
    assert_no_traceback(program)
    assert "STOPPED" in program.read_log()
    assert acknowledged_by(publishers) <= set(ids_in_store(program.db))
    assert_sound(program.db)


@with_cases("address", {"a path": "notify", "an abstract name": "@aggregator"})
@needs_linux
def test_a_service_manager_is_told_of_readiness_liveness_and_stopping(tmp_path, address):
    if address.startswith("@"):
        address += str(os.getpid())
        name = "\0" + address[1:]
    else:
        address = name = str(tmp_path / address)
    env = {"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "100000"}
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(name)
        manager.settimeout(10)
        with Program(tmp_path / "s.db", env=env) as program:
            told = [manager.recv(100) for _ in range(4)]
            assert program.end() == 0
        told += messages_to(manager)
    assert told[:4] == [b"READY=1", b"WATCHDOG=1", b"WATCHDOG=1", b"WATCHDOG=1"]
    assert told.count(b"STOPPING=1") == 1
    assert told.count(b"READY=1") == 1


# ---------------------------------------------------------------------------
# Who may reach it


def test_https_is_spoken_with_a_certificate(tmp_path, certificate):
    with Program(tmp_path / "store.db", "--tls-cert", certificate) as program:
        tls = TLSClient(program.port, certificate)
        assert tls.ask("POST", "/publish", json.dumps(sample("1"))).status == 202
        plain = dial(program.port, HEALTH)
        assert plain.recv(10_000).startswith(b"HTTP/1.1 400 ")
        assert program.end() == 0


def test_a_file_that_is_no_certificate_is_refused(tmp_path):
    (tmp_path / "bad.pem").write_text("nothing")
    found = run("--tls-cert", str(tmp_path / "bad.pem"), "--db", str(tmp_path / "b.db"))
    assert_refused(found, 1, "cannot load --tls-cert")


def test_over_tls_a_list_of_many_pieces_ends_and_a_live_tail_goes_on(tmp_path, certificate):
    with Program(tmp_path / "store.db", "--tls-cert", certificate) as program:
        tls = TLSClient(program.port, certificate)
        tail = tls.ask("GET", "/events?follow=1&after=0")
        for number in range(6):
            batch = samples(*[f"{number}-{n}" for n in range(700)])
            assert tls.ask("POST", "/publish", json.dumps(batch)).status == 202
            followed = [json.loads(tail.readline())["event_id"] for _ in batch]
            assert followed == [each["event_id"] for each in batch]
        assert len(tls.ask("GET", "/events").read().splitlines()) == 4200


@with_cases(
    "flags, warned",
    {
        "everyone": (("--host", "0.0.0.0"), True),
        "who has the token": (("--host", "0.0.0.0", "--token", "s3cret"), False),
        "this machine": ((), False),
    },
)
def test_what_everyone_can_reach_without_a_token_is_warned_about(tmp_path, flags, warned):
    words = [*COMMAND, "--port", "0", "--db", str(tmp_path / "s.db"), *flags]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=clean_environment())
    log = ""
    while "LISTENING" not in log:
        line = process.stderr.readline()
        assert line
        log += line
    process.terminate()
    log += process.communicate(timeout=10)[1]
    assert ("OPEN - 0.0.0.0:" in log) == warned
    assert "s3cret" not in log


@with_cases("flags, status", {"no": ((), 421), "yes": (("--allow-host", "nas.lan other"), 200)})
def test_an_unknown_host_is_refused_on_loopback_and_taken_where_allowed(tmp_path, flags, status):
    with Program(tmp_path / "store.db", *flags) as program:
        assert program.ask("GET", "/stats", Host="nas.lan:80").status == status
        assert program.ask("GET", "/stats", Host="localhost:80").status == 200


# ---------------------------------------------------------------------------
# The program under pressure


def test_a_disordered_replay_with_repeats_and_mixed_offsets_is_stored_once_in_order(tmp_path):
    replay = Replay(2026, 700)
    told_unique = 0
    with Program(tmp_path / "replay.db", "--log-level", "info") as program:
        for at in range(0, len(replay.deliveries), 37):
            batch = replay.deliveries[at : at + 37]
            answer = program.publish(*batch).json
            assert answer["accepted"] == len(batch)
            assert answer["unique"] + answer["duplicates"] == len(batch)
            told_unique += answer["unique"]
        stats = program.stats()
        rows = program.listed()
        assert program.end() == 0
    assert told_unique == 700
    assert stats["unique_processed"] == 700
    assert stats["duplicate_dropped"] == len(replay.deliveries) - 700 > 0
    assert stats["received"] == len(replay.deliveries)
    assert stats["current_queue_size"] == 0
    assert stats["conflicts"] == 0
    assert set(stats["topics"]) == {f"topic/{n}" for n in range(7)}
    assert {topic["unique"] for topic in stats["topics"].values()} == {100}
    in_order = [aggregator.format_timestamp(instant) for instant in sorted(replay.instants_us)]
    assert [row["timestamp"] for row in rows] == in_order
    found = {(row["event_id"], row["payload"]["n"]) for row in rows}
    assert found == {(f"e{n:04d}", n) for n in range(700)}
    assert_sound(program.db)


def slowest_of_most(connection, slow_clients, round_):
    """Milliseconds that 99 % of 150 publishes take at most, beside slow clients."""
    taken_ms = []
    for n in range(150):
        for slow_client in slow_clients[n % 50 :: 50]:
            slow_client.send()
        began = time.monotonic()
        connection.request("POST", "/publish", json.dumps(sample(f"{round_}-{n}")))
        response = connection.getresponse()
        assert response.read()
        assert response.status == 202
        taken_ms.append((time.monotonic() - began) * 1000)
    return sorted(taken_ms)[len(taken_ms) * 99 // 100]


@needs_linux
def test_500_slow_clients_do_not_slow_a_publisher(tmp_path):
    large = [sample(f"{n}", payload={"x": "y" * 20_000}) for n in range(150)]
    with contextlib.ExitStack() as stack:
        stack.enter_context(many_descriptors(600))
        program = stack.enter_context(Program(tmp_path / "slow.db"))
        program.publish(*large)
        slow_clients = []
        for start, trickle in SLOW_CLIENTS.values():
            for sock in stack.enter_context(dialled(program.port, 100, start, 4096)):
                slow_clients.append(Trickle(sock, trickle))
        connection = http.client.HTTPConnection("127.0.0.1", program.port, timeout=10)
        stack.callback(connection.close)
        # Three attempts: the machine may be busy with something else.
        figures = []
        while len(figures) < 3 and min(figures, default=50) >= 50:
            figures.append(slowest_of_most(connection, slow_clients, len(figures)))
        print(f"p99 of a publish beside 500 slow clients: {min(figures):.1f} ms")
        print(f"memory: at most {memory_mb(program.process.pid):.0f} MB")
        assert min(figures) < 50


@needs_linux
def test_a_thousand_connections_are_held_and_more_are_refused(tmp_path):
    # As some systems start it.
    command = from_a_shell('ulimit -S -n 256; exec "$@"')
    with many_descriptors(1200), Program(tmp_path / "many.db", command=command) as program:
        pid = program.process.pid
        program.ask("GET", "/events")
        descriptors_before = descriptors(pid)
        memory_before = memory_mb(pid, "VmRSS")
        with dialled(program.port, aggregator.MAX_CONNECTIONS) as socks:
            for _ in range(10):
                (refused,) = exchange(program.port, HEALTH)
                assert refused.status == 503
                assert refused.problem == "too-many-connections"
            for sock in socks[::100]:
                sock.sendall(HEALTH)
                assert sock.recv(12) == b"HTTP/1.1 200"
            taken_mb = memory_mb(pid, "VmRSS") - memory_before
            print(f"1000 idle connections take {taken_mb:.1f} MB")
            assert descriptors(pid) >= 1000
            assert memory_mb(pid) < memory_before + 50
        wait_until(lambda: descriptors(pid) <= descriptors_before, timeout_s=10)
        assert program.ask("GET", "/health").status == 200
        assert program.end() == 0
        assert_no_traceback(program)
        assert program.read_log().count("REFUSED 503") <= aggregator.LOG_LINES


@needs_linux
def test_without_descriptors_it_waits_quietly_and_goes_on_when_some_come_back(tmp_path):
    command = from_a_shell('ulimit -n 64; exec "$@"')
    with Program(tmp_path / "few.db", command=command) as program:
        pid = program.process.pid
        with contextlib.closing(dial(program.port, HEALTH)) as held:
            with dialled(program.port, 100):
                time.sleep(0.2)
                before = cpu_seconds(pid)
                time.sleep(1.5)
                assert cpu_seconds(pid) - before < 0.5
                # Who has a connection is served.
                held.sendall(http_request("PUT", "/events/t/1", b"{}"))
                time.sleep(0.1)
                statuses = [answer.status for answer in answers(held.recv(65536))]
                assert statuses == [200, 201]
        assert program.ask("GET", "/events/t/1").status == 200
        assert program.end() == 0
        log = program.read_log()
        assert log.count("NO CONNECTION TAKEN") == 1
        assert "ulimit" in log
        assert_no_traceback(program)


@needs_linux
def test_half_sent_bodies_of_many_connections_do_not_fill_the_memory(tmp_path):
    start = http_request("POST", "/publish", b"", "Content-Length: 4000000")
    piece = b" " * 65536
    with Program(tmp_path / "large.db") as program, contextlib.ExitStack() as stack:
        for _ in range(200):
            (sock,) = stack.enter_context(dialled(program.port, 1, start))
            # Some are refused meanwhile.
            with contextlib.suppress(OSError):
                for _ in range(30):
                    sock.sendall(piece)
        assert program.publish(sample()).status == 202
        most_mb = memory_mb(program.process.pid)
        print(f"200 connections with 2 MB of their bodies sent: {most_mb:.0f} MB at most")
        buffers_mb = aggregator.ServerLimits().buffers / 2**20
        assert most_mb < 32 + 3 * buffers_mb


def fill_and_recover(program, folder, no_space):
    """Twice: no space, refusals, space again, and everything works by itself."""
    filler = Filler(program)
    for _ in range(int(os.environ.get("DISK_FULL_ROUNDS", "2"))):
        assert filler.publish().status == 202
        with no_space(program, folder):
            # Until not even a small one fits.
            for size in (30_000, 0):
                answer = filler.publish_until_refused(size)
                assert answer.status == 503
                assert answer.problem == "store-unavailable"
                assert answer.json["detail"]
            assert program.ask("GET", "/health").status == 503
            assert program.ask("GET", "/events").status == 200
        assert program.ask("GET", "/health").status == 200
        assert filler.publish().status == 202
    assert program.publish(*filler.acknowledged[-100:]).json["unique"] == 0
    stats = program.stats()
    assert stats["unique_processed"] == len(filler.acknowledged)
    assert stats["current_queue_size"] == 0
    assert program.end() == 0
    assert "COMMIT FAILED" in program.read_log()
    assert_no_traceback(program)


@needs_linux
def test_a_limit_of_file_sizes_is_503_and_recovers_by_itself(tmp_path):
    with Program(tmp_path / "full.db") as program:
        fill_and_recover(program, str(tmp_path), file_size_limit)
    assert_sound(program.db)


@needs_linux
def test_a_full_disk_is_503_keeps_what_was_acknowledged_and_recovers_by_itself(small_disk):
    with Program(os.path.join(small_disk, "full.db")) as program:
        fill_and_recover(program, small_disk, full_disk)
    assert_sound(program.db)


# Some SQLites wait in whole seconds.
IMPATIENT = """
open_patient = aggregator.Store
def open_impatient(path, settings):
    return open_patient(path, settings._replace(lock_timeout_s=1.1))
aggregator.Store = open_impatient
"""


@with_cases("held_s, statuses", {"short": (0.4, [202]), "long": (1.8, [503, 202])})
def test_a_lock_of_another_program_is_waited_for_and_then_503(tmp_path, held_s, statuses):
    with Program(tmp_path / "locked.db", command=with_changes(IMPATIENT)) as program:
        with locked_by_another(program.db, held_s):
            began = time.monotonic()
            for status in statuses:
                answer = program.publish(sample())
                assert answer.status == status
                assert status == 202 or "locked" in answer.json["detail"]
            assert time.monotonic() - began > held_s - 0.2
        assert program.stats()["received"] == 1
        assert program.end() == 0


def test_a_file_that_is_moved_under_the_service_is_503_until_it_is_back(tmp_path):
    with Program(tmp_path / "moved.db") as program:
        assert program.publish(sample("1")).status == 202
        os.rename(program.db, program.db + ".away")
        for answer in (program.publish(sample("2")), program.ask("GET", "/health")):
            assert answer.status == 503
            assert "moved" in answer.json["detail"]
        # It can still be read, and saved.
        assert program.ask("GET", "/events").json["count"] == 1
        os.rename(program.db + ".away", program.db)
        assert program.ask("GET", "/health").status == 200
        assert program.publish(sample("1"), sample("2")).json["duplicates"] == 1
        assert program.end() == 0
        assert_no_traceback(program)


def test_a_file_that_is_deleted_under_the_service_is_503(tmp_path):
    with Program(tmp_path / "gone.db") as program:
        assert program.publish(sample("1")).status == 202
        os.unlink(program.db)
        assert program.publish(sample("2")).status == 503
        assert program.end() == 0
        assert_no_traceback(program)


# So that all of the index is in motion after a minute.
SMALL_STORES = """
open_large = aggregator.Store
def open_small(path, settings):
    return open_large(path, settings._replace(recent_ids=30_000))
aggregator.Store = open_small
"""


@pytest.mark.skipif(
    not os.environ.get("SOAK_MINUTES"),
    reason="SOAK_MINUTES says for how long; 20 is a good measure",
)
@needs_linux
def test_after_a_long_mixed_load_memory_and_file_are_flat_and_the_books_balance(tmp_path):
    duration_s = float(os.environ["SOAK_MINUTES"]) * 60
    flags = ["--max-events-per-topic", "2000", "--retention", "30s", "--dedup-retention", "40s"]
    command = with_changes(SMALL_STORES)
    usages = []
    with Program(tmp_path / "soak.db", *flags, command=command) as program:
        soak = Soak(program.port)
        soak.begin()
        began = time.monotonic()
        while time.monotonic() - began < duration_s and not soak.over.wait(duration_s / 20):
            usages.append(Usage.of(program))
            print(f"{time.monotonic() - began:6.0f} s: {usages[-1]}", flush=True)
        soak.end()
        assert soak.failures == []
        stats = program.stats()
        assert stats["received"] == (
            stats["unique_processed"] + stats["duplicate_dropped"] + stats["current_queue_size"]
        )
        assert stats["duplicate_dropped"] > 0
        assert stats["conflicts"] > 0
        assert stats["removed_by_retention"] > 0
        assert program.end() == 0
        assert_no_traceback(program)
    # In five minutes everything has grown to its size.
    if duration_s >= 300:
        middle = Usage.mean(usages[7:13])
        late = Usage.mean(usages[14:])
        assert late.memory_mb < middle.memory_mb * 1.1 + 5
        assert late.file_mb < middle.file_mb * 1.1 + 5
        assert late.descriptors < middle.descriptors + 5
    assert max(usage.wal_mb for usage in usages) < 100
    assert_sound(program.db)


# The compiled form of the script


@pytest.fixture
def lone_script(tmp_path):
    """A copy of the program in a folder of its own, where bytecode can be kept."""
    folder = tmp_path / "lone"
    folder.mkdir()
    return shutil.copy(PROGRAM, str(folder / "aggregator.py"))


def version_of(script, *options):
    """What `--version` prints, and the names of bytecode files beside the script."""
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": ""}
    found = subprocess.run(
        [sys.executable, *options, script, "--version"],
        stdout=subprocess.PIPE,
        text=True,
        timeout=60,
        env=environment,
        check=True,
    )
    kept = glob.glob(os.path.join(os.path.dirname(script), "__pycache__", "*.pyc"))
    return found.stdout, kept


needs_exec = pytest.mark.skipif(
    os.name != "posix" or not hasattr(sys, "orig_argv"),
    reason="before Python 3.10, and on Windows, a script goes on as it is",
)


@needs_exec
def test_a_script_keeps_its_compiled_form_and_becomes_it(lone_script):
    printed, kept = version_of(lone_script, "-W", "ignore")
    assert printed.startswith("aggregator " + aggregator.__version__)
    assert len(kept) == 1


@needs_exec
@pytest.mark.parametrize("options", ("--", "-B --", "-I -B", "-x -B", "-B -u -W ignore"))
def test_the_options_of_the_interpreter_are_kept(lone_script, options):
    # With -I, the folder of the script is no place to import from.
    poison = os.path.join(os.path.dirname(lone_script), "argparse.py")
    if "-I" in options:
        with open(poison, "w") as file:
            file.write("raise SystemExit('this must not be imported')")
    printed, _ = version_of(lone_script, *options.split())
    assert printed.startswith("aggregator " + aggregator.__version__)


@needs_exec
def test_a_drill_starts_its_service_wherever_it_was_started_itself(lone_script, tmp_path):
    for options in ([], ["-B"]):
        program = (sys.executable, *options, os.path.relpath(lone_script))
        done = run("drill", "--events", "50", program=program, PYTHONPYCACHEPREFIX="")
        assert done.returncode == 0, done.stdout + done.stderr


@needs_exec
def test_a_changed_script_is_compiled_anew(lone_script):
    version_of(lone_script)
    changed = read_text(lone_script).replace('__version__ = "', '__version__ = "changed-', 1)
    with open(lone_script, "w", encoding="utf-8") as file:
        file.write(changed)
    printed, _ = version_of(lone_script)
    assert printed.startswith("aggregator changed-" + aggregator.__version__)


def test_a_script_that_may_keep_nothing_keeps_nothing(lone_script):
    printed, kept = version_of(lone_script, "-B")
    assert printed.startswith("aggregator " + aggregator.__version__)
    assert not kept


@needs_exec
@pytest.mark.parametrize("options", ([], ["-B"]), ids=["kept", "in memory"])
def test_a_service_that_is_started_as_a_script_takes_the_memory_of_its_compiled_form(
    lone_script, tmp_path, options
):
    if not hasattr(os, "memfd_create"):
        pytest.skip("this system has no files in memory")
    command = [sys.executable, *options, lone_script]
    env = {"PYTHONPYCACHEPREFIX": ""}
    with Program(tmp_path / "a.db", command=command, env=env) as program:
        pid = program.process.pid
        with open(f"/proc/{pid}/status", encoding="ascii") as file:
            memory_kb = int(re.search(r"VmHWM:\s+(\d+)", file.read()).group(1))
        # Compiling it takes 25 MB more than running it.
        assert memory_kb < 36_000
        # It is still found by its name.
        with open(f"/proc/{pid}/cmdline", encoding="utf-8") as file:
            assert "source=" + lone_script in file.read().split("\0")
        # The file in memory is closed.
        opened = [os.readlink(name) for name in glob.glob(f"/proc/{pid}/fd/*")]
        assert len(opened) > 3 and not any("memfd" in name for name in opened)


@needs_exec
def test_a_module_stays_what_it_is(lone_script):
    found = subprocess.run(
        [sys.executable, "-m", "aggregator", "--version"],
        stdout=subprocess.PIPE,
        text=True,
        timeout=60,
        cwd=os.path.dirname(lone_script),
        check=True,
    )
    assert found.stdout.startswith("aggregator " + aggregator.__version__)


# ============================================================================
# Exercises of the README: red until they are done.
# Run with -o python_functions='exercise_*'
# ============================================================================


def exercise_1_the_list_can_be_filtered_by_a_least_sequence(desk):
    desk.publish(*[sample(str(n), sequence=n) for n in (1, 5, 3, 8)], sample("none"))
    assert desk.listed("?min_sequence=4") == ["5", "8"]
    assert desk.listed("?min_sequence=0") == ["1", "5", "3", "8"]
    assert desk.ask("GET", "/events?min_sequence=x").status == 400


def exercise_2_a_bloom_filter_never_denies_what_was_added_and_seldom_affirms_what_was_not():
    # Room for so many keys.
    bloom, taken_bytes = bytes_allocated(lambda: aggregator.Bloom(100_000))
    added = [aggregator.identity("t", str(n)) for n in range(100_000)]
    others = [aggregator.identity("t", str(n)) for n in range(100_000, 200_000)]
    for key in added:
        bloom.add(key)
    assert taken_bytes <= 130_000
    assert all(key in bloom for key in added)
    assert sum(key in bloom for key in others) <= 1500


def exercise_3_a_new_id_is_seldom_looked_up_among_the_tombstones(path):
    with open_store(path, **SMALL_INDEX) as store:
        store.commit([event(n) for n in range(1000)], NOW)
    with open_store(path, **SMALL_INDEX) as store:
        asked = StatementsAbout(store, "seen")
        for n in range(1000, 1200):
            store.index.look_up([event(n)])
        assert asked.count <= 10
        for n in (0, 500, 999):
            assert len(store.commit([event(n)], NOW).repeats) == 1
        assert store.commit([event(2000)], NOW).repeats == []
