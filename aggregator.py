#!/usr/bin/env python3
# /// script
# requires-python = ">=3.8"
# dependencies = []
# ///
"""aggregator.py: take in events over HTTP, and store each exactly once.

One file; it needs nothing but Python.

    python3 aggregator.py &
    curl -s localhost:8000/publish -d '{"topic": "door", "event_id": "1",
        "timestamp": "2026-01-01T12:00:00Z", "source": "hall", "payload": {"open":
        true}}'
    curl -s localhost:8000/events

Publish the same event again, after a time-out, a crash, a power cut: the answer says
`"duplicates":1`, and the list still holds it once.

     curl ──POST /publish──▶ parser ─▶ validate ─▶ queue ─▶ consumer ─▶ store
             §9 sockets       §6         §1         §5        §5         §3, §2
          ◀── 202 ───────── after the commit ◀── verdicts ◀── group commit
     curl ──GET /events ───▶ §8 routes ─▶ read connection (§4)
                                          readers never block the writer

The life of one event. The server (§9) feeds the bytes of a socket to the parser (§6),
which hands over a whole request or refuses it. The route's handler (§8) has the body
turned into `Event`s (§1): all of them, or none. The pipeline (§5) queues them. Its
consumer passes everything that waits to the store (§3). The store asks the index (§2)
which events it has seen before, writes the new ones, counts, and commits: one
transaction for the whole group, and one wait for the disk. Only then is the publisher
answered.

Promised: 202 means that the events are on disk (`wait=0` and `--sync normal` promise
less, and say so). An identity (topic, event_id) is stored once. A request is taken
whole or not at all. The books balance: received = unique + duplicates + queued. Not
promised: an order between publishers. And a publisher has to do its half: if it gets no
answer and never tries again, its event may be lost.

How to read this file. Sections stand in the order of their dependencies: each uses only
names from sections above it, and its banner says which. Part I (§1 to §5) is the
subject: who came for deduplication reads §2, then `Store.commit` in §3. Part II (§6) is
HTTP/1.1 without any I/O. Part III (§7 to §11) is the service. Part IV (§12, §13) is the
other half: clients that publish, follow files and relay. Part V (§14) is the lesson
that follows: several machines on one replicated log. Part VI (§15) is the program
around it all.
"""

import os
import sys
from typing import (
    Any,
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Container,
    Deque,
    Dict,
    FrozenSet,
    Generator,
    Iterable,
    Iterator,
    List,
    Mapping,
    NamedTuple,
    NoReturn,
    Optional,
    Sequence,
    Set,
    Tuple,
    TypeVar,
    Union,
)


def kept_bytecode() -> str:
    """The name of the compiled form of this file. It is made if it is missing or old.

    It stands where an import would keep it. Its first 16 bytes say which Python made
    it, and the time and size of its source (PEP 552). Raises OSError where it cannot be
    written.
    """
    import importlib.util
    import py_compile

    path = os.path.abspath(__file__)
    source = os.stat(path)
    numbers = (0, int(source.st_mtime), source.st_size)
    head = importlib.util.MAGIC_NUMBER
    for number in numbers:
        head += (number & 0xFFFFFFFF).to_bytes(4, "little")
    kept = importlib.util.cache_from_source(path)
    try:
        with open(kept, "rb") as file:
            if file.read(16) == head:
                return kept
    except FileNotFoundError:
        pass
    py_compile.compile(path, cfile=kept, doraise=True)
    return kept


# Where Linux shows the files that a process has open.
OWN_DESCRIPTORS = "/proc/self/fd/"


def bytecode_in_memory() -> str:
    """The name of a file in memory with the compiled form of this program.

    It goes when nobody has it open any more (memfd_create(2)). `become_bytecode` calls
    it. Raises OSError and AttributeError where the system has no such files.
    """
    import importlib.util
    import marshal

    # The frame of the module runs all of this file.
    code = sys._getframe(2).f_code
    # No flags, no time, no size: nobody compares a script with its source.
    data = importlib.util.MAGIC_NUMBER + bytes(12) + marshal.dumps(code)
    number = os.memfd_create("aggregator.py", 0)
    name = OWN_DESCRIPTORS + str(number)
    try:
        with open(number, "wb", closefd=False) as file:
            file.write(data)
        # Without /proc, whoever becomes it finds nothing.
        os.stat(name)
    except OSError:
        os.close(number)
        raise
    return name


def become_bytecode() -> None:
    """Go on as the compiled form of this file, in the same process, where possible.

    Python compiles a script anew at each start, and never gives the memory for it back:
    25 MB for this file. An imported module is compiled once and kept in __pycache__. So
    the script looks for its compiled form there, or puts it there, and lets Python run
    that instead. Where nothing can be kept, or Python was told to keep nothing, the
    compiled form goes to a file in memory, as far as the system has such files.
    """
    if __file__.startswith(OWN_DESCRIPTORS) and "source" in sys._xoptions:
        # It has been read. When it is open no more, its memory is free.
        os.close(int(__file__[len(OWN_DESCRIPTORS) :]))
        if not getattr(sys.flags, "safe_path", sys.flags.isolated):
            sys.path[0] = os.path.dirname(program_path())
    if os.name != "posix" or not hasattr(sys, "orig_argv") or not sys.executable:
        return
    is_script = __spec__ is None and sys._getframe(1).f_back is None
    if not is_script or not __file__.endswith(".py"):
        # It runs as a module, or inside another program, or it is compiled already.
        return
    # Python ignores it. `ps` and `pgrep -f` show it.
    options = ["-X", "source=" + os.path.abspath(__file__)]
    options += sys.orig_argv[1 : len(sys.orig_argv) - len(sys.argv)]
    forms = [kept_bytecode, bytecode_in_memory]
    if sys.dont_write_bytecode:
        forms.remove(kept_bytecode)
    if "-x" in options:
        # Python would skip the first line of what has no name in .pyc.
        forms.remove(bytecode_in_memory)
    for form in forms:
        try:
            os.execv(sys.executable, [sys.executable, *options, form(), *sys.argv[1:]])
        except (OSError, AttributeError):
            # The next one, or none: then it goes on as it is.
            continue


def program_path() -> str:
    """The absolute path of this file, for whoever starts the program once more."""
    path: str = sys._xoptions.get("source", __file__)
    return os.path.abspath(path)


def wants_openssl(arguments: Sequence[str], environment: Mapping[str, str]) -> bool:
    """Whether this start may have to speak TLS: as a service, or to one."""
    if "TLS_CERT" in environment or "LOG_URL" in environment:
        return True
    for word in (environment.get("AGGREGATOR_URL", ""), *arguments):
        if "--tls-" in word or "postgres" in word or "https:" in word.lower():
            return True
    return False


def leave_out_openssl() -> None:
    """Keep asyncio and hashlib from loading OpenSSL, which would cost 4.5 MB.

    Both import it if it is there, and do without it if it is not. A module that is None
    in sys.modules counts as not there. Resident after the start, CPython 3.11 and 3.13
    on x86-64, compiled: 22 MB without OpenSSL, 26.5 MB with it.
    """
    sys.modules["ssl"] = None  # type: ignore[assignment]
    try:
        import _md5  # type: ignore[import-not-found]  # noqa: F401
    except ImportError:
        # A Python that is built for FIPS has no other hashes than OpenSSL's.
        return
    sys.modules["_hashlib"] = None  # type: ignore[assignment]


# Only as a program, and before the imports that would load OpenSSL.
if __name__ == "__main__":
    become_bytecode()
    if not wants_openssl(sys.argv[1:], os.environ):
        leave_out_openssl()

import argparse
import asyncio
import bisect
import concurrent.futures
import contextlib
import datetime
import errno
import functools
import gc
import io
import itertools
import json
import logging
import re
import signal
import sqlite3
import stat
import time
import zlib
from binascii import a2b_base64, b2a_base64
from collections import Counter, deque
from hashlib import blake2b, sha256

__version__ = "1.1.0"

log = logging.getLogger("aggregator")

# Three limits that several sections share. Every other limit stands at the head of the
# section that keeps it.
#
# Events that may wait to be committed; the default of --queue-max-size. At 20,000
# events a second this is half a second's worth.
QUEUE_MAX_EVENTS = 10_000
# Bytes of one body, before and after inflating; the default of --max-body. A full queue
# of common events fits.
MAX_BODY_BYTES = 4 * 1024 * 1024
# Events of one page of a list.
PAGE_MAX = 1000


# ============================================================================
# §1  Events: one JSON value in, an `Event` or a list of faults out
#
# A publisher sends JSON text. This section decides whether it is a valid event, and
# turns it into one form that all other sections can rely on.
#
# Knows nothing of the other sections. Must not know a clock, SQL or HTTP: what "now"
# is and where bytes come from is the business of the caller.
#
#   * An `Event` can always be written and read back: it has no lone surrogate, no NaN,
#     and no nesting that a JSON reader gives up on.
#   * An instant is an integer: microseconds since 1970 in UTC. Instants are compared as
#     integers, never as text, because texts with different offsets do not sort.
#   * The payload is kept as canonical JSON (sorted keys, no blanks), so equal content
#     is equal text.
#   * All faults of all events are reported at once, so a publisher mends a batch once.
#   * An error carries the name of its problem (`problem`, a word of our own). That is
#     all this part of the file knows of answers: §8 makes status and text of the name.
#
# Two ways through an event. Almost every event is valid, so the fast way only finds out
# whether it is (`_read_event`), and stops at the first fault. Only when it stops, the
# slow way goes over the whole batch again and lists what is wrong (`_faults_of`). Both
# call the same functions for the fields, so they cannot disagree.
#
# Simpler than a production system: names are compared byte for byte, so "é" written
# as one character and as two are different names. Numbers are what Python makes of
# them: integers are exact up to 308 digits, everything else is an IEEE double. So 1 and
# 1.0 are different contents.
# ============================================================================

# Bytes of a topic, event_id or source in UTF-8. Most file systems allow as many for a
# file name, so a reader may use any of these names for a file.
MAX_NAME_BYTES = 255
# The largest sequence number of a producer: SQLite's largest INTEGER.
MAX_SEQUENCE = 2**63 - 1
# Levels of a payload. JSON readers stop far above it: SQLite at 1,000, Python at about
# 1,000.
MAX_NESTING = 100
# Digits of an integer. Nearly all with more are infinite to a reader that keeps
# numbers as IEEE doubles (RFC 8259 §6).
MAX_INT_DIGITS = 308
# Microseconds of a retention or of a "since". A longer duration is a slip.
MAX_DURATION_US = 1000 * 366 * 86_400_000_000
# The most values in one text are the larger of MAX_VALUES and, for each event that
# the queue may hold, MAX_VALUES_PER_EVENT. Each value becomes an object of up to 100
# bytes, while everybody waits: 4 MB of `[],` would be 80 MB and a second. 10,000 events
# may have 200,000.
MAX_VALUES = 100_000
MAX_VALUES_PER_EVENT = 20
# Faults that are looked for and listed in one answer. Whoever sent 10,000 wrong events
# made one mistake, not 10,000, and an answer must not be larger than its request.
MAX_FAULTS = 1000


class Event(NamedTuple):
    """One valid event. `payload` is canonical JSON text.

    `topic` and `event_id` together are its identity: two events with the same identity
    are taken for one event that was sent twice. `sequence` is the producer's own
    counter, if it has one; it tells what was lost on the way (§3).

    Do not mix up two numbers. `sequence` comes from the producer, and may be missing,
    repeated or out of order. `seq`, which §3 gives to each event that it stores, counts
    arrivals: 1, 2, 3 and so on.
    """

    topic: str
    event_id: str
    timestamp: int  # microseconds since 1970 UTC
    source: str
    payload: str
    sequence: Optional[int] = None


class Fault(NamedTuple):
    """What is wrong with one field of the event at `index` of its batch, from 0.

    `field` is "" if the value as a whole is wrong.
    """

    # Hides tuple.index.
    index: int  # type: ignore[assignment]
    field: str
    message: str


class NotJSON(ValueError):
    """The bytes are not JSON text (RFC 8259) in UTF-8; the message says where.

    Here nothing can be said about single events, because nobody knows where one ends.
    """

    problem = "not-json"


class InvalidEvents(ValueError):
    """The JSON is well-formed, and at least one event in it is not valid.

    `faults` lists what is wrong, MAX_FAULTS at most.
    """

    problem = "invalid-event"

    def __init__(self, faults: List[Fault]) -> None:
        count = f"{len(faults)} fault" if len(faults) == 1 else f"{len(faults)} faults"
        if len(faults) == MAX_FAULTS:
            count = f"{MAX_FAULTS} or more faults"
        super().__init__(f"{count} found in the events; nothing was taken")
        self.faults = faults

    def problem_members(self) -> Dict[str, Any]:
        """What a problem document says besides the sentence (RFC 9457 §3.2)."""
        return {"errors": [fault._asdict() for fault in self.faults]}


class BatchTooLarge(ValueError):
    """The batch is larger than the whole queue and could never be taken.

    "Queue full" would be the wrong answer: its publisher would try again for ever.
    """

    problem = "batch-too-large"

    def __init__(self, count: int, most: int) -> None:
        super().__init__(
            f"at least {count} events in one request, and the queue holds {most}:"
            f" send at most {most} at a time"
        )


# ---- Instants and durations ----

# All datetimes here are without a zone and stand for UTC. An offset is applied once,
# while it is read.
_EPOCH = datetime.datetime(1970, 1, 1)
# ISO 8601 as publishers write it: a blank for the T, a comma for the point, an offset
# with or without a colon, or hours only. Only ASCII digits count; \d would take others.
_TIMESTAMP = re.compile(
    r"""
    ([0-9]{4}-[0-9]{2}-[0-9]{2})                              # day
    (?: [Tt ] ([0-9]{2}:[0-9]{2})                             # hour and minute
        (?: :([0-9]{2}) (?: [.,]([0-9]{1,30}) )? )?           # second, fraction
        ( [Zz] | [+-](?:[01][0-9]|2[0-3])(?: :?[0-5][0-9])? )?  # offset
    )?
    """,
    re.VERBOSE,
)
# Nine digits at most, so `int` has little to do. No unit means seconds.
_DURATION = re.compile(r"([0-9]{1,9})(us|ms|s|m|h|d|w|)")
_DURATION_UNITS_US = {
    "us": 1,
    "ms": 1000,
    "s": 1_000_000,
    "": 1_000_000,
    "m": 60_000_000,
    "h": 3_600_000_000,
    "d": 86_400_000_000,
    "w": 604_800_000_000,
}


def parse_timestamp(text: str) -> int:
    """ISO 8601 date and time to microseconds since 1970 UTC. Raises ValueError.

    No offset means UTC. A date alone is midnight. Second 60 is the last microsecond of
    its minute, because nothing here counts leap seconds (RFC 3339 §5.6 and §5.7).
    `datetime.fromisoformat` is of no use: before Python 3.11 it refuses `Z`, and since
    then it takes week dates.

    >>> parse_timestamp("1970-01-01T01:00:00.25+01:00")
    250000
    >>> parse_timestamp("1970-01-02")
    86400000000

    Digits after the sixth are cut off, not rounded: rounding could move an event into
    the next second, or the next year.

    >>> parse_timestamp("1970-01-01T00:00:00.9999999Z")
    999999
    """
    match = _TIMESTAMP.fullmatch(text)
    if match is None:
        raise ValueError(
            "is not an ISO 8601 date and time such as 2026-01-31T12:00:00.5Z"
            " or 2026-01-31 14:00+02:00"
        )
    day, minute, second, fraction, offset = match.groups()
    if second == "60":
        return _instant_of_second(day, minute, "59", offset) + 999_999
    instant_us = _instant_of_second(day, minute, second, offset)
    if fraction:
        instant_us += int(fraction[:6].ljust(6, "0"))
    return instant_us


# Events come in bursts: most share their second with the event before. So the last
# 1,024 seconds are remembered, and only the fraction is read each time.
@functools.lru_cache(1024)
def _instant_of_second(
    day: str, minute: Optional[str], second: Optional[str], offset: Optional[str]
) -> int:
    """The instant of a whole second, in microseconds. Raises ValueError.

    The arguments are the texts that `_TIMESTAMP` found. It checks what a pattern
    cannot: that the month has such a day, and that the instant, moved to UTC, still is
    in the years that `datetime` knows.
    """
    date = [int(part) for part in day.split("-")]
    clock = [int(part) for part in (minute or "00:00").split(":")]
    try:
        instant = datetime.datetime(*date, *clock, int(second or 0))  # type: ignore[arg-type,call-arg]
        if offset and offset not in "Zz":
            # "+5:30" is refused by the pattern; "+05", "+0530" and "+05:30" are left.
            digits = offset[1:].replace(":", "").ljust(4, "0")
            ahead = datetime.timedelta(hours=int(digits[:2]), minutes=int(digits[2:]))
            if offset.startswith("-"):
                instant += ahead
            else:
                # 14:00+02:00 is 12:00 in UTC.
                instant -= ahead
    except (ValueError, OverflowError) as error:
        raise ValueError(f"is not an instant of the years 0001 to 9999 in UTC ({error})")
    since = instant - _EPOCH
    return (since.days * 86_400 + since.seconds) * 1_000_000


def format_timestamp(instant_us: int) -> str:
    """Microseconds since 1970 UTC to `YYYY-MM-DDTHH:MM:SS.ffffffZ`.

    >>> format_timestamp(-1)
    '1969-12-31T23:59:59.999999Z'
    """
    instant = _EPOCH + datetime.timedelta(microseconds=instant_us)
    return instant.isoformat(timespec="microseconds") + "Z"


def parse_duration(text: str) -> int:
    """`90s`, `10m`, `2h`, `7d`, `1w` or seconds to microseconds. Raises ValueError.

    >>> parse_duration("10m")
    600000000
    """
    match = _DURATION.fullmatch(text)
    if match is None:
        raise ValueError("is not a duration such as 30s, 10m, 2h or 7d")
    number, unit = match.groups()
    duration_us = int(number) * _DURATION_UNITS_US[unit]
    if duration_us > MAX_DURATION_US:
        raise ValueError("is longer than a thousand years")
    return duration_us


def is_duration(text: str) -> bool:
    """Whether this is a duration with its unit, such as `10m`, and no instant.

    A bare number is not taken for one: it could as well be meant as an instant.

    >>> is_duration("10m"), is_duration("2026"), is_duration("2026-01-01")
    (True, False, False)
    """
    return _DURATION.fullmatch(text) is not None and not text.isdigit()


# ---- JSON ----


def _read_integer(digits: str) -> Union[int, float]:
    """An integer literal to a number.

    An integer of more than 308 digits becomes infinity, as 1e999 does. `canonical_json`
    refuses infinity, so both are refused in one place. This also keeps `int` from the
    quadratic time that 100,000 digits cost on Pythons before 3.8.14.

    >>> _read_integer("-7"), _read_integer("9" * 309)
    (-7, inf)
    """
    if len(digits.lstrip("-")) > MAX_INT_DIGITS:
        return float("inf")
    return int(digits)


_DECODER = json.JSONDecoder(parse_int=_read_integer)
_ENCODER = json.JSONEncoder(
    sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
)


def _fast_encoder() -> Optional[Callable[[Any, int], Sequence[str]]]:
    """The C encoder with the settings of `_ENCODER`, or None where there is none.

    `JSONEncoder.encode` makes a new C encoder at each call, which costs as much as the
    encoding of a small payload. This one is made once. It is not part of the documented
    interface of `json`; a Python without it takes the documented way.
    """
    make_encoder: Any = getattr(json.encoder, "c_make_encoder", None)
    if make_encoder is None:
        return None
    quote = json.encoder.encode_basestring
    # In this order: no check for cycles (a decoded value has none), no default for
    # strange types (it has none either), the quoting of strings, no indent, the two
    # separators, sorted keys, no skipped keys, no NaN.
    encoder: Callable[[Any, int], Sequence[str]] = make_encoder(
        None, None, quote, None, ":", ",", True, False, False
    )
    return encoder


_encode_fast = _fast_encoder()


def canonical_json(value: Any) -> str:
    """JSON text that is equal for equal content: sorted keys, no blanks.

    Publishers may spell the same payload in another way when they try again, and it
    must not look like a conflict. Raises ValueError for NaN and Infinity, which are not
    JSON (RFC 8259 §6) and would make every later list unreadable, and RecursionError
    for depth.

    >>> canonical_json(json.loads('{"b": 1, "a": 2}'))
    '{"a":2,"b":1}'

    Numbers stay what they are: 1 and 1.0 are different contents.

    >>> canonical_json([1, 1.0, 1e2])
    '[1,1.0,100.0]'
    """
    if _encode_fast is None:
        return _ENCODER.encode(value)
    return "".join(_encode_fast(value, 0))


def decode_text(body: bytes) -> str:
    """UTF-8 to text. Raises NotJSON, which names the first byte that is wrong.

    A byte order mark is refused: RFC 8259 §8.1 forbids it, and a text that begins with
    one is often not UTF-8. Python's decoder refuses half characters, overlong forms and
    surrogates, as RFC 3629 demands.
    """
    if body.startswith(b"\xef\xbb\xbf"):
        raise NotJSON("the body starts with a byte order mark (EF BB BF): send UTF-8 without one")
    try:
        return body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise NotJSON(
            f"byte 0x{body[error.start]:02x} at offset {error.start} is not UTF-8: send UTF-8"
        )


# JSON's white space, and no other (RFC 8259 §2).
_JSON_BLANKS = " \t\r\n"


def json_values(text: str, most: int = QUEUE_MAX_EVENTS) -> List[Any]:
    """All JSON values in `text`, with blanks, newlines or nothing between them.

    Reading stops as soon as there are more than `most`: one more is returned, and what
    follows is not looked at. Raises NotJSON, or InvalidEvents: for nesting that the
    decoder gives up on, and for more values, those inside others too, than MAX_VALUES
    or, if that is more, MAX_VALUES_PER_EVENT for each of `most`.

    So one function reads a single value, a list, and one value a line (JSON Lines).
    Numbers need a blank between them, because "12" is one number.

    >>> json_values('{"a":1}{"b":2}  [3]')
    [{'a': 1}, {'b': 2}, [3]]
    >>> json_values("1 2 3 4", most=1)
    [1, 2]
    """
    values: List[Any] = []
    text = text.strip(_JSON_BLANKS)
    at = 0
    end = len(text)
    if end > MAX_VALUES:
        _check_number_of_values(text, max(MAX_VALUES, most * MAX_VALUES_PER_EVENT))
    while at < end and len(values) <= most:
        try:
            value, at = _DECODER.raw_decode(text, at)
        except RecursionError:
            # The value that is too deep is the next after those already read.
            raise InvalidEvents([Fault(_count_candidates(values), "", _TOO_DEEP)])
        except json.JSONDecodeError as error:
            # Python's message begins with a capital; here it stands in a sentence.
            reason = error.msg[:1].lower() + error.msg[1:]
            raise NotJSON(
                f"at line {error.lineno}, column {error.colno}: {reason};"
                f" what stands there is {shown(text[error.pos : error.pos + 20])}"
            )
        values.append(value)
        while at < end and text[at] in _JSON_BLANKS:
            at += 1
    return values


def _check_number_of_values(text: str, most: int) -> None:
    """Refuse a text that is too much work to decode. Raises InvalidEvents."""
    if _has_more_values(text, most):
        message = (
            f"holds more than {most} values, where those inside others count, and an empty"
            " list or object counts twice: send fewer in one request"
        )
        raise InvalidEvents([Fault(0, "", message)])


def _has_more_values(text: str, most: int) -> bool:
    r"""Whether lists and objects in a text hold more values than `most`; not decoded.

    In each of them, a comma stands between two values. So brackets and commas are as
    many as values inside others, and one more for each empty list or object. Most texts
    have few of them, and are settled by counting. Else those inside strings must not
    count, such as the commas of a table: strings stand at every second place between
    quotes.

    >>> _has_more_values("[1,[2]]", 2), _has_more_values(r'["a,b\",c,d"]', 2)
    (True, False)
    """
    if _count_of_marks(text) <= most:
        return False
    # Escapes are taken away first, because of the quotes among them. More than four
    # quotes for each value cannot be, so the rest of such a text need not be cut.
    bare = text.replace("\\\\", "").replace('\\"', "")
    pieces = bare.split('"', 4 * most)
    return len(pieces) > 4 * most or _count_of_marks("".join(pieces[::2])) > most


def _count_of_marks(text: str) -> int:
    """How many brackets that open, and commas, a text has."""
    return text.count("{") + text.count("[") + text.count(",")


def _count_candidates(values: Sequence[Any]) -> int:
    """How many events these values would be: a list counts as its items."""
    count = 0
    for value in values:
        count += len(value) if isinstance(value, list) else 1
    return count


# ---- Events ----

# A name without control characters (Unicode's C0, DEL and C1), which can move a
# terminal's cursor, and without lone surrogates, which UTF-8 cannot hold.
_NAME = re.compile("[^\x00-\x1f\x7f-\x9f\ud800-\udfff]+")
_SURROGATE = re.compile("[\ud800-\udfff]")
_TOO_DEEP = f"is nested deeper than {MAX_NESTING} levels"


def parse_events(body: bytes, most: int = QUEUE_MAX_EVENTS) -> List[Event]:
    """The events of a body, in order: one at least, `most` at most.

    A body is one or more of: an event, a list of events, `{"events": [...]}`. The last
    form is told from an event by having no topic. Raises NotJSON, BatchTooLarge or
    InvalidEvents.

    >>> body = (b'{"topic":"t","event_id":"1","timestamp":"2026-01-01",'
    ...          b'"source":"s","payload":{}}')
    >>> [event.event_id for event in parse_events(body)]
    ['1']
    """
    values = json_values(decode_text(body), most)
    if not values:
        raise NotJSON("the body is empty: send an event, a list of events, or one event a line")
    candidates: List[Any] = []
    for value in values:
        if isinstance(value, dict) and "events" in value and "topic" not in value:
            value = value["events"]
            if not isinstance(value, list):
                message = "must be a list of events, not " + shown(value)
                raise InvalidEvents([Fault(len(candidates), "events", message)])
        if isinstance(value, list):
            candidates.extend(value)
        else:
            candidates.append(value)
    if not candidates:
        raise InvalidEvents([Fault(0, "", "is missing: the list holds no event")])
    if len(candidates) > most:
        raise BatchTooLarge(len(candidates), most)
    return read_events(candidates)


def read_events(values: Sequence[Any]) -> List[Event]:
    """Decoded JSON values to events, all or none. Raises InvalidEvents.

    A batch of which one half is taken would leave its publisher with a puzzle: which
    half must be sent again?
    """
    try:
        return [_read_event(value) for value in values]
    except (KeyError, TypeError, ValueError):
        # Something is wrong somewhere. Look again, slowly, and say what and where. The
        # iterators are lazy: nobody looks for more faults than are listed.
        faults = itertools.chain.from_iterable(map(_faults_of, itertools.count(), values))
        raise InvalidEvents(list(itertools.islice(faults, MAX_FAULTS)))


def _read_event(value: Dict[str, Any]) -> Event:
    """The fast way through a valid event. It stops at the first fault.

    It raises KeyError for a missing field, TypeError for a value that is no object, and
    ValueError for a wrong field. Unknown fields are passed over, so a publisher may
    send more than is read here.
    """
    sequence = None
    if "sequence" in value:
        sequence = _read_sequence(value["sequence"])
    return Event(
        _read_repeated_name(value["topic"]),
        read_name(value["event_id"]),
        parse_timestamp(value["timestamp"]),
        _read_repeated_name(value["source"]),
        _read_payload(value["payload"]),
        sequence,
    )


def _faults_of(index: int, value: Any) -> Iterator[Fault]:
    """Everything that is wrong with one decoded value.

    >>> [fault.field for fault in _faults_of(0, {"topic": "", "payload": {}})]
    ['topic', 'event_id', 'timestamp', 'source']
    """
    if not isinstance(value, dict):
        fields = "topic, event_id, timestamp, source and payload"
        yield Fault(index, "", f"must be an object with {fields}, not {shown(value)}")
        return
    for field, read in _FIELD_READERS.items():
        if field in value:
            try:
                read(value[field])
            except ValueError as error:
                yield Fault(index, field, f"{error}: {shown(value[field])}")
        elif field != "sequence":
            yield Fault(index, field, "is missing")


def read_name(value: Any) -> str:
    """A topic, event id or source. Raises ValueError.

    Two of the tests are exact and slow: the pattern, and counting bytes. A cheap test
    comes before each, and settles it for most names. All characters are printable: then
    none is a control character or a surrogate. A character has at most 4 bytes in
    UTF-8: so 63 characters never have more than 255 bytes.
    """
    if not isinstance(value, str):
        raise ValueError("must be a string")
    if not value or value.isspace():
        raise ValueError("must not be blank")
    if not value.isprintable() and _NAME.fullmatch(value) is None:
        raise ValueError("must not hold control characters or lone surrogates")
    if len(value) * 4 > MAX_NAME_BYTES and len(value.encode("utf-8")) > MAX_NAME_BYTES:
        raise ValueError(f"must have at most {MAX_NAME_BYTES} bytes in UTF-8")
    return value


# Topics and sources come again and again, so the last 1,024 that were right are
# remembered. Event ids do not: to remember them would only cost.
_read_repeated_name = functools.lru_cache(1024)(read_name)


def _read_timestamp(value: Any) -> int:
    """A timestamp to microseconds. A value that is no text is a wrong text: ""."""
    if not isinstance(value, str):
        value = ""
    return parse_timestamp(value)


def _read_sequence(value: Any) -> Optional[int]:
    """A producer's own number; null means that it has none. Raises ValueError.

    >>> _read_sequence(7.0), _read_sequence(None)
    (7, None)
    """
    # Some languages know no integers. In JSON 7.0 is the same number as 7, and JSON
    # Schema calls both an integer.
    if type(value) is float and value.is_integer():
        value = int(value)
    # `True` is an int to isinstance, but not here.
    if value is not None and (type(value) is not int or not 0 <= value <= MAX_SEQUENCE):
        raise ValueError(f"must be an integer from 0 to {MAX_SEQUENCE}")
    return value


def _read_payload(value: Any) -> str:
    """A JSON object to its canonical text. Raises ValueError.

    What it lets through can be written, stored, and read by any JSON reader. Depth is
    counted only for a text with many brackets, and surrogates are looked for only in a
    text that is not ASCII: both tests go over the whole payload.
    """
    if not isinstance(value, dict):
        raise ValueError("must be an object")
    try:
        text = canonical_json(value)
    except RecursionError:
        raise ValueError(_TOO_DEEP)
    except ValueError:
        raise ValueError("must not hold NaN, Infinity or a number beyond 1e308")
    if _may_be_too_deep(text) and _depth(value) > MAX_NESTING:
        raise ValueError(_TOO_DEEP)
    if not text.isascii() and _SURROGATE.search(text):
        raise ValueError("must not hold lone surrogates")
    return text


def _may_be_too_deep(text: str) -> bool:
    """A cheap test: so many levels need at least so many brackets.

    A bracket inside a string counts, too. So it may say yes where the payload is not
    too deep, but never no where it is.
    """
    if len(text) <= 2 * MAX_NESTING:
        return False
    return text.count("{") + text.count("[") > MAX_NESTING


def _depth(value: Any) -> int:
    """Levels of nesting, counted level by level, without recursion.

    Counting stops one level after MAX_NESTING: more does not matter. Without recursion,
    because Python would give up long before a hostile payload ends.

    >>> _depth({"a": [1]})
    2
    """
    depth = 0
    level = [value]
    while level and depth <= MAX_NESTING:
        depth += 1
        below = []
        for parent in level:
            children = parent.values() if isinstance(parent, dict) else parent
            below += [child for child in children if isinstance(child, (dict, list))]
        level = below
    return depth


# How each field is read, in the order in which faults are listed. Each raises
# ValueError with the rest of a sentence that begins with the name of the field.
_FIELD_READERS: Dict[str, Callable[[Any], Any]] = {
    "topic": read_name,
    "event_id": read_name,
    "timestamp": _read_timestamp,
    "source": read_name,
    "payload": _read_payload,
    "sequence": _read_sequence,
}


def shown(value: Any) -> str:
    r"""A value as it may stand in a message: ASCII, in quotes, 60 characters at most.

    What strangers send must not move the cursor of a terminal or begin a new line in a
    log.

    >>> shown("a" + chr(10) + "b")
    '"a\\nb"'
    """
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return "a list"
    # DEL is the one control character that JSON leaves as it is.
    text = json.dumps(value).replace("\x7f", "\\u007f")
    if len(text) > 60:
        text = text[:57] + "..."
    return text


def events_from_lines(
    text: str,
    topic: str,
    source: str,
    instant_us: int,
    new_id: Callable[[int], str],
    most: int = QUEUE_MAX_EVENTS,
) -> List[Event]:
    r"""Each line of plain text to an event with the payload `{"message": line}`.

    All of them get the same topic, source and instant, in microseconds since 1970 UTC.
    Blank lines are no events. `new_id` names the event of a line by the line's number,
    from 1, so the same text sent again can get the same ids. Raises BatchTooLarge for
    more than `most` lines, and InvalidEvents, also when there is no line.

    >>> text = "up\n\ndown\r\n"
    >>> events = events_from_lines(text, "log", "pi", 0, new_id=lambda n: f"x-{n}")
    >>> [(event.event_id, event.payload) for event in events]
    [('x-1', '{"message":"up"}'), ('x-3', '{"message":"down"}')]
    """
    line_ends = text.count("\n")
    if line_ends > most:
        raise BatchTooLarge(line_ends, most)
    timestamp = format_timestamp(instant_us)
    values = []
    for number, line in enumerate(text.split("\n"), 1):
        if line and not line.isspace():
            value = {
                "topic": topic,
                "event_id": new_id(number),
                "timestamp": timestamp,
                "source": source,
                "payload": {"message": line.rstrip("\r")},
            }
            values.append(value)
    if not values:
        raise InvalidEvents([Fault(0, "", "is missing: the text holds no line")])
    return read_events(values)


# ============================================================================
# §2  The index: "seen before?"
#
# A publisher that got no answer sends again. It cannot know whether the event was
# stored and the answer was lost, or the event was lost. Sending until an answer comes
# is called at-least-once delivery, and it makes repeats. A consumer is idempotent if a
# repeat changes nothing. The two together give an exactly-once *effect*: the
# publisher's half is to repeat, ours is to recognise the repeat. Neither half can do it
# alone, and no protocol can deliver a message exactly once.
#
# The words of this part of the file, one for each thing:
#
#      batch        what one publisher sent in one request
#      group        all batches that one commit stores together (§5)
#      identity     topic and event_id; `key` is its digest of 16 bytes
#      fingerprint  a digest of 8 bytes, which shows that two contents differ
#      seq          our number of a stored event: 1, 2, 3 … in the order of arrival
#      sequence     the producer's own number, which may be missing or come twice
#      arrival      when an event was committed, by our clock (`processed_at`); its
#                   `timestamp` is what the publisher says; `first_seen` is the arrival
#                   of the first event with a key
#      mark         a seq that says how far some work has come
#      tombstone    a row of `seen` or `archive`: key, seq, fingerprint, arrival. It is
#                   written while the event still lives, and stays when it is gone
#
# A ladder, each rung with the way it fails:
#
#   1. SELECT, and INSERT if nothing came back. Two publishers send the same event at
#      the same time. Both SELECTs run before either INSERT. Both find nothing, and the
#      event is stored twice. Looking and acting were two steps, and somebody stepped
#      between them.
#   2. UNIQUE(topic, event_id), and let the INSERT fail. It is exact: the database looks
#      and acts under one lock. But ids are random, so in the B-tree of the constraint
#      each new one lands on another page. Once the tree is larger than the cache, an
#      event of 200 bytes changes a page of 4 KB, and the whole page is written, to the
#      WAL and again to the file. Measured, with the writes of the other tables: 16,600
#      bytes an event, and 40,000 events a second became 20,000 after 6 million events.
#   3. UNIQUE with retention. Old rows are deleted to save space, and each takes its id
#      along. A retry that comes after the clean-up is stored as new.
#   4. This design. The id outlives its event, and ids move to disk in sorted slices.
#
# We, too, look first and insert afterwards. It is safe here for three reasons. First,
# each commit is one transaction that begins with BEGIN IMMEDIATE, so nobody can write
# between its look and its insert: here the race of rung 1 is impossible. Second, one
# thread runs every commit. Third, one process owns the file (§3). It must, because the
# newest keys are in the memory of that process, where no other process could look.
#
# The design is a small log-structured merge. New keys gather in memory. From there they
# move on to larger tables, always many neighbours together:
#
#      new events ──▶ processed_events   the log: in order of arrival, the truth
#      their keys ──▶ recent.ids         the newest keys: in memory, rebuilt at start
#                          │ one slice of the key space at a time, in key order
#                          ▼
#                        seen            the younger tombstones: about 2 million
#                          │ one shelf of the key space at a time, in key order
#                          ▼
#                        archive         the older tombstones: all the others
#
#      seen before?   Look in recent.ids, seen and archive. In none of them: it is new.
#
# A tombstone is what stays when an event goes: its 16-byte key, its seq, a
# fingerprint of its content, and when it was first seen. It is made while the event
# still lives: when its key leaves recent.ids with its slice, or just before the event
# is removed, whichever comes first. It stays for ever, unless --dedup-retention says
# for how long. (Texts on LSM trees call a *delete marker* a tombstone. Ours is the
# opposite: it keeps the id alive when its event is gone.)
#
# Why slices. The key space has 256 of them, by the first byte of the key. A slice is
# moved as a whole and in key order, so keys that are neighbours on a page are written
# together. `progress` holds a mark for each slice: every key of this slice whose event
# has a seq up to the mark has left recent.ids, and has its tombstone. The lowest mark
# is the watermark: up to there, every key of every slice has one. From there on the log
# is read at a start.
#
# Why shelves. The larger `seen` is, the more pages a slice falls on. So `seen` is kept
# small by the same step once more: the key space has 4,096 shelves, and with every
# 1,024 new events the shelf that has waited longest moves to `archive`. Until 4,194,304
# events have ever been stored, the archive is empty. It has one mark, which only says
# whose turn it is. Which keys have moved need not be said: both tables are on the disk,
# and nothing has to be rebuilt.
#
# The same identity may come with another content: another source or payload. That is a
# conflict. The first content stays. The second is not stored, and its publisher is
# told. That works even when the first content has been removed, because its fingerprint
# is in the tombstone.
#
# The way of a key. An event arrives, and §1 to §5 bring it to a commit. There its key
# is looked up in the three tables. It is in none, so the event goes to the log and its
# key to recent.ids. On average 400,000 events later the slice of the key has its turn:
# the key moves to `seen`, and the mark of the slice moves on. On average 2 million
# events later it moves to `archive` with its shelf. Weeks later, if --retention is set,
# the event leaves the log. (If retention comes before the turn of the slice, the key
# goes to `seen` just before its event goes.) The tombstone stays, so a late retry is a
# duplicate.
#
# The arithmetic. A tombstone takes 45 bytes, and 83 of them stand on a page that was
# filled in random order. A move writes each page to which one of its keys belongs. A
# slice brings about 3,072 keys when its turn comes, a shelf 1,024. `seen` holds what
# came since the last turn of each shelf: from none to 4 million keys, so 2 million on
# average. A slice of those has 94 pages, and 3,072 keys for 94 pages are 33 for each.
# (Where pages are many, some get no key: n random keys fall on p (1 - e^(-n/p)) of p
# pages.) The more keys share the writing of a page, the better.
#
#                       keys for each page that is written
#      ids in all       to `seen`    to `archive`    without an archive
#          2 million       33             -                 33
#         10 million       33            43                  6.5
#        100 million       33             3.7                1.4
#      1,000 million       33             1.2                1.0
#
# So the gain ends near a thousand million ids: then each key costs nearly a page of its
# own, as in rung 2. Texts on LSM trees call the three tables levels. One level more
# would move the end further away again, and cost each new id one more look.
#
# What happens in a crash. "Repeats" is what the publisher does when it gets no answer.
#
#      crash                    on disk               publisher  result
#      before the commit        nothing               repeats    stored once, as new
#      inside the commit        a WAL without its     repeats    stored once, as new
#                               COMMIT: nothing
#      between the commit and   the event and         repeats    duplicate: stored once
#        the answer             its key
#      after the answer         the event and         is done    stored once
#                               its key
#      inside a merge           nothing of it: it is  repeats    as inside the commit
#                               part of a commit
#      with wait=0, before      nothing               is done    LOST: the 202 said
#        the commit                                              "stored":false
#      power cut, with          perhaps not the       is done    those are LOST, and
#        --sync normal          last commits                     their keys with them
#
# Why digests are exact enough. Two of ten million identities share a 128-bit key with a
# probability of 10^14 / 2^129, which is less than 10^-24. No disk is that reliable. It
# is BLAKE2b, because ids come from strangers: to make two that collide takes 2^64
# tries, and harms only the publisher that sends both.
#
# The GIL convoy. One lock of Python, the GIL, lets one thread run at a time. SQLite
# works through a statement in steps: a step ends with a row of the result, or at the
# end. `sqlite3` gives up the GIL for each step and has to take it back afterwards.
# While the event loop is busy, the writer's thread gets the lock back only after a
# "switch interval": 5 ms, unless the program says otherwise (§15 says 50 µs). Each step
# waits behind the loop, like cars in a convoy behind a lorry: hence the name. So the
# number of steps counts, not the work of each: `executemany` over 1,000 rows is 1,000
# steps, one INSERT with 1,000 rows of VALUES is one, and a SELECT has a step for each
# row of its result. Measured beside a thread that computes without a pause, in
# transactions of 500 rows, at the interval of 5 ms, rows a second: executemany 338,
# VALUES 19,104. At 0.5 ms they are 2,537 and 46,452. Therefore groups are written with
# many rows to the statement, results come back as one JSON value, and recent.ids is a
# table: what SQL does with it needs no GIL at all.
#
# Knows §1. Its SQL uses tables that §3 makes; of the log it knows four columns: seq,
# key, fingerprint, processed_at. Must not know queues, reading or HTTP.
#
#   * recent.ids is a table of an attached in-memory database, so it takes part in the
#     transaction: what was rolled back was never learned, what was committed is known.
#   * The key of a committed event is in recent.ids, `seen` or `archive`, until
#     --dedup-retention forgets it: then its event has left the log, and is old.
#   * No key is in `archive` and in another table. In recent.ids and in `seen` is the
#     key of an event that was removed before its slice had its turn.
#
# Simpler than a production system: there is no Bloom filter in front of the tombstones.
# So a new id costs a look into `seen` and one into `archive`, and each is a disk read
# once they have outgrown the memory.
# ============================================================================

# Keys kept in recent.ids before slices are merged; about 70 bytes each, so 27 MB. With
# twice as many, an event would cost half as many page writes of `seen`, and the memory
# 27 MB more.
RECENT_IDS = 384 * 1024
# Slices of the key space: 256, one for each value of a key's first byte, or for a toy a
# number that divides 256. Fewer would make the commit that moves one longer. More would
# be moved more often, and the keys for each page would be as many.
SLICES = 256
# Events after which every shelf of `seen` has had its turn. With twice as many, an
# event would cost half as many page writes of the archive, and twice as many of `seen`.
SEEN_IDS = 4 * 1024 * 1024
# Shelves of the key space: 4,096, so that one holds about 1,024 keys at its turn. Fewer
# would make the commit that moves one longer.
SHELVES = 4096
# Values that one statement can bind (SQLite, "Limits": SQLITE_MAX_VARIABLE_NUMBER).
# SQLite before 3.32 takes fewer.
SQLITE_VARIABLES = 32_766 if sqlite3.sqlite_version_info >= (3, 32) else 999
# Rows of one statement. More rows in one statement save no more time.
ROWS_PER_STATEMENT = 2048

# Prepared statements that a connection keeps, so that no group size is prepared twice;
# about 20 KB each.
STATEMENTS_KEPT = 300

# What an event can be. A conflict is a repeat as well: where duplicates are counted,
# conflicts are counted among them.
NEW = "new"
DUPLICATE = "duplicate"
CONFLICT = "conflict"


class Record(NamedTuple):
    """An event with its key and its fingerprint: what a store is given.

    The names of its fields are the names of columns of the log (§3), which takes a
    record as it is.
    """

    key: bytes  # 16 bytes, of topic and event_id
    fingerprint: int  # 64 bits, of source and payload
    topic: str
    event_id: str
    timestamp: int  # microseconds since 1970 UTC
    source: str
    payload: str
    sequence: Optional[int]


class Known(NamedTuple):
    """What the index holds of a key: the first event that came with it."""

    seq: int
    fingerprint: int
    first_seen: int  # microseconds since 1970 UTC
    # Where it was found: "recent", "seen", "archive", or "batch", which means earlier
    # in the same group.
    place: str


class Repeat(NamedTuple):
    """The record at `index` of a group is not new: a duplicate, or a conflict."""

    # Hides tuple.index.
    index: int  # type: ignore[assignment]
    kind: str
    first: Known


class Decision(NamedTuple):
    """What is new in a group, with seqs from `first_seq` on, and what is not.

    `fresh` keeps the order of the group; its records get consecutive seqs. Everything
    that is not in `fresh` is in `repeats`.
    """

    first_seq: int
    fresh: Sequence[Record]
    repeats: List[Repeat]
    # Microseconds since 1970 UTC: the arrival of all that is new.
    arrived_us: int


class ForgetBefore(NamedTuple):
    """What is old enough to go: its arrival and its seq are both low enough.

    Made by `AgeLimit` (§3), for two uses: for --retention it says which events may
    leave the log, for --dedup-retention which tombstones of removed events may go.
    """

    # Arrived before this instant, in microseconds since 1970 UTC.
    before_us: int
    # The highest seq that may go.
    through_seq: int


# A row to write: a tuple of values, or a single value for a table of one column.
_Row = TypeVar("_Row")


def identity(topic: str, event_id: str) -> bytes:
    """The 16-byte key of (topic, event_id).

    The length of the topic goes in first. Otherwise these two would be one identity:

    >>> identity("a", "b:c").hex()
    'b2a3ac46d030c038f1ada2bab2e5dca8'
    >>> identity("a:b", "c").hex()
    '8d3846c247ba1c199af4e4d7cfe9636c'
    """
    name = topic.encode("utf-8")
    text = b"%d:%b%b" % (len(name), name, event_id.encode("utf-8"))
    return blake2b(text, digest_size=16).digest()


def fingerprint(source: str, payload: str) -> int:
    """What shows a conflict: 64 bits of source and canonical payload.

    Signed, as SQLite's INTEGER is. The timestamp is left out: many publishers make a
    new one when they try again. So is the producer's sequence. The fingerprint stays
    when the payload is gone, so a conflict is noticed after retention, too.

    64 bits are enough here, but would not be for the key: one fingerprint is compared
    with one other, and only when the identities are equal. Two contents look the same
    with a probability of 2^-64.
    """
    name = source.encode("utf-8")
    text = b"%d:%b%b" % (len(name), name, payload.encode("utf-8"))
    digest = blake2b(text, digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


def record_of(event: Event) -> Record:
    """An event with what identifies it.

    It is called in the event loop, not in the writer's thread: there, Python would
    compete with the loop for the GIL.
    """
    return Record(
        identity(event.topic, event.event_id), fingerprint(event.source, event.payload), *event
    )


def decide(
    records: Sequence[Record], known: Dict[bytes, Known], last_seq: int, now_us: int
) -> Decision:
    """Which records are new, and which repeat something.

    Of two records of one group with the same key, the second repeats the first. New
    records get the seqs after `last_seq`, in order, and the log stores each under its
    seq. `known` is what `DedupIndex.look_up` found for these records. It is a pure
    function: no clock, no database, and it changes none of its arguments.

    >>> first = record_of(Event("door", "1", 0, "hall", "{}"))
    >>> other = record_of(Event("door", "1", 0, "hall", '{"open":true}'))
    >>> decision = decide([first, first, other], {}, last_seq=7, now_us=0)
    >>> decision.first_seq, len(decision.fresh)
    (8, 1)
    >>> [(repeat.index, repeat.kind, repeat.first.seq) for repeat in decision.repeats]
    [(1, 'duplicate', 8), (2, 'conflict', 8)]
    """
    keys = {record.key for record in records}
    if not known and len(keys) == len(records):
        # Mostly nothing repeats anything.
        return Decision(last_seq + 1, records, [], now_us)
    # A copy, because `known` says what is committed, and this group is not yet. The new
    # keys go into the copy, so that a second record with one of them is a repeat.
    known = dict(known)
    fresh: List[Record] = []
    repeats: List[Repeat] = []
    for index, record in enumerate(records):
        first = known.get(record.key)
        if first is None:
            fresh.append(record)
            seq = last_seq + len(fresh)
            known[record.key] = Known(seq, record.fingerprint, now_us, "batch")
        elif first.fingerprint == record.fingerprint:
            repeats.append(Repeat(index, DUPLICATE, first))
        else:
            repeats.append(Repeat(index, CONFLICT, first))
    return Decision(last_seq + 1, fresh, repeats, now_us)


def slice_name(number: int, slices: int) -> str:
    """The name of a slice in `progress`: the lowest first byte of its keys, as hex.

    >>> slice_name(255, slices=256), slice_name(3, slices=4)
    ('FF', 'C0')
    """
    return f"{number * 256 // slices:02X}"


def key_span(number: int, pieces: int) -> Dict[str, bytes]:
    r"""The keys of one of so many equal pieces of the key space.

    They begin with `low` and end before `high`. Bytes compare like words in a
    dictionary, so a key of 16 bytes that begins with 05 00 comes after those two bytes.

    >>> key_span(5, pieces=256)
    {'low': b'\x05\x00', 'high': b'\x06\x00'}
    """
    low = number * 65536 // pieces
    high = (number + 1) * 65536 // pieces
    if number + 1 == pieces:
        # No key of 16 bytes is above 17 bytes of FF.
        return {"low": low.to_bytes(2, "big"), "high": b"\xff" * 17}
    return {"low": low.to_bytes(2, "big"), "high": high.to_bytes(2, "big")}


# The columns of recent.ids, `seen` and `archive`.
KEYS_TABLE = """(
    key BLOB PRIMARY KEY,
    seq INTEGER NOT NULL,
    fingerprint INTEGER NOT NULL,
    first_seen INTEGER NOT NULL
) WITHOUT ROWID"""


class DedupIndex:
    """Which keys have been seen. Its methods run inside a transaction of the store.

    `db` is a connection to a store (§3). Its tables `recent.ids`, `seen` and `archive`
    belong to this class, which makes the first of them, and so do the marks in
    `progress`, except for that of 'listing'.

    A worked example: a toy with 4 slices that keeps 4 recent keys. The slice of a key
    is the first two bits of it, its shelf the first bit.

    >>> import tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> settings = StoreSettings(slices=4, recent_ids=4, shelves=2, seen_ids=4)
    >>> store = Store(folder.name + "/toy.db", settings)
    >>> def publish(event_id, now_us):
    ...     record = record_of(Event("door", event_id, 0, "hall", "{}"))
    ...     return store.commit([record], now_us).repeats
    >>> def show():
    ...     for table in "recent.ids", "seen", "archive":
    ...         rows = store.db.execute(f"SELECT hex(key), seq FROM {table} ORDER BY 1")
    ...         print(table, *[f"{key[:8]}={seq}" for key, seq in rows])
    ...     marks = store.db.execute("SELECT part, through FROM progress WHERE part < 'l'")
    ...     print("progress", *[f"{part}={through}" for part, through in marks])
    ...     log = store.db.execute("SELECT seq, event_id FROM processed_events ORDER BY seq")
    ...     print("log", *[f"{seq}:{event_id}" for seq, event_id in log])

    Four events arrive, and nothing is merged yet. Each line shows the first bytes of a
    key and its seq; the marks of the four slices and of the archive are 0. (Id 5 comes
    before id 4, so that seq and id differ.)

    >>> for second, event_id in enumerate(["1", "2", "3", "5"]):
    ...     repeats = publish(event_id, now_us=second * 1_000_000)
    >>> show()
    recent.ids 064EC0C5=2 694E2F62=4 8B68E835=1 E0067311=3
    seen
    archive
    progress 00=0 40=0 80=0 C0=0 archive=0
    log 1:1 2:2 3:3 4:5

    A fifth makes one too many. So the slice that has waited longest is moved: of equal
    ones the lowest, slice 0. Its mark says: the keys of this slice are in `seen`, for
    events up to seq 5.

    >>> publish("4", now_us=4_000_000)
    []
    >>> show()
    recent.ids 694E2F62=4 8B68E835=1 E0067311=3 EC0090BA=5
    seen 064EC0C5=2
    archive
    progress 00=5 40=0 80=0 C0=0 archive=0
    log 1:1 2:2 3:3 4:5 5:4

    Now the memory goes, as with kill -9. The log and the marks say what was in it:
    every event that lies above the mark of its slice.

    >>> store.close()
    >>> store = Store(folder.name + "/toy.db", settings)
    >>> show()
    recent.ids 694E2F62=4 8B68E835=1 E0067311=3 EC0090BA=5
    seen 064EC0C5=2
    archive
    progress 00=5 40=0 80=0 C0=0 archive=0
    log 1:1 2:2 3:3 4:5 5:4

    Event 1 is removed, as retention would do it. Its key was still recent, so now it
    gets its tombstone. A retry that comes weeks later is a duplicate all the same.

    >>> store.erase([1])
    1
    >>> show()
    recent.ids 694E2F62=4 8B68E835=1 E0067311=3 EC0090BA=5
    seen 064EC0C5=2 8B68E835=1
    archive
    progress 00=5 40=0 80=0 C0=0 archive=0
    log 2:2 3:3 4:5 5:4
    >>> late = publish("1", now_us=30 * 86_400_000_000)
    >>> [(repeat.kind, repeat.first.seq, repeat.first.place) for repeat in late]
    [('duplicate', 1, 'seen')]

    In this toy, after the first four events, every two new ones move one of the two
    shelves. So the sixth moves shelf 0, the keys below 80, from `seen` to the archive.
    It also makes one too many in recent.ids again, so slice 1 moves to `seen`.

    >>> publish("6", now_us=31 * 86_400_000_000)
    []
    >>> show()
    recent.ids 8B68E835=1 E0067311=3 EC0090BA=5
    seen 68D503E4=6 694E2F62=4 8B68E835=1
    archive 064EC0C5=2
    progress 00=5 40=6 80=0 C0=0 archive=2
    log 2:2 3:3 4:5 5:4 6:6
    >>> store.close()
    >>> folder.cleanup()
    """

    def __init__(
        self,
        db: sqlite3.Connection,
        recent_ids: int = RECENT_IDS,
        slices: int = SLICES,
        seen_ids: int = SEEN_IDS,
        shelves: int = SHELVES,
    ) -> None:
        self._db = db
        self._most_recent = recent_ids
        self._slices = slices
        self._seen_ids = seen_ids
        self._shelves = shelves
        # After so many new events it is the turn of the next shelf.
        self._turn_events = seen_ids // shelves
        # What `reload` reads: keys in recent.ids, the slice to move next, and the mark
        # of the archive.
        self.recent_count = 0
        self.next_slice = 0
        self.archive_mark = 0
        # Attached, so that it takes part in the transactions of the file: a rollback
        # takes the keys out again.
        db.execute("ATTACH ':memory:' AS recent")
        db.execute("CREATE TABLE recent.ids" + KEYS_TABLE)

    def look_up(self, records: Sequence[Record]) -> Dict[bytes, Known]:
        """What is known of the keys of these records. Keys never seen are left out.

        It only reads. What it says holds until the end of the transaction that it runs
        in, because nobody else can write before that.
        """
        # In key order, because neighbours share a page.
        keys = sorted({record.key for record in records})
        known: Dict[bytes, Known] = {}
        for chunk in chunks(keys, columns=1):
            # It finds what `WHERE key IN (…)` would find, in all tables. SQLite never
            # swaps the two sides of a CROSS JOIN, so it takes each wanted key and looks
            # it up. For a plain JOIN it might think it cheaper to scan millions of keys
            # for a few wanted ones. One JSON value comes back instead of a row for each
            # key: one wait for the GIL.
            found = query_value(
                self._db,
                f"""
                WITH wanted(key) AS (VALUES {placeholders(len(chunk), 1)})
                SELECT json_group_array(json_array(hex(key), seq, fingerprint, first_seen, place))
                FROM (
                    SELECT wanted.key, seq, fingerprint, first_seen, 'recent' AS place
                    FROM wanted CROSS JOIN recent.ids AS ids ON ids.key = wanted.key
                    UNION ALL
                    SELECT wanted.key, seq, fingerprint, first_seen, 'seen'
                    FROM wanted CROSS JOIN seen ON seen.key = wanted.key
                    UNION ALL
                    SELECT wanted.key, seq, fingerprint, first_seen, 'archive'
                    FROM wanted CROSS JOIN archive ON archive.key = wanted.key
                )
                """,
                chunk,
            )
            # The key of a removed event may stand in recent.ids and in `seen`. Both say
            # the same of it, except for the place: the last is what is shown.
            for key, *what in json.loads(found):
                known[bytes.fromhex(key)] = Known(*what)
        return known

    def learn(self, after_seq: int) -> None:
        """Take the keys of all events after `after_seq` into recent.ids.

        To be called once for a group, after its new events are in the log; `after_seq`
        is the last seq before them. If the transaction is rolled back, SQLite takes the
        keys out again; `recent_count` is then wrong, and `reload` reads it back.
        """
        # Read back from the log instead of bound from Python: one statement, one wait
        # for the GIL. In key order, because neighbours in recent.ids share a page. OR
        # ROLLBACK: if a row fails, all of the commit is undone, and SQLite need not
        # prepare to undo this statement alone.
        cursor = self._db.execute(
            """
            INSERT OR ROLLBACK INTO recent.ids(key, seq, fingerprint, first_seen)
            SELECT key, seq, fingerprint, processed_at
            FROM processed_events
            WHERE seq > :after_seq
            ORDER BY key
            """,
            {"after_seq": after_seq},
        )
        self.recent_count += cursor.rowcount

    def merge(
        self, new_events: int, last_seq: int, forget_before: Optional[ForgetBefore] = None
    ) -> None:
        """Move keys on to their next table: in the long run, as many as arrive."""
        # The old ones first, so that no key passes through `seen` in one commit.
        self._move_due_shelves(new_events, last_seq, forget_before)
        self._move_due_slices(new_events, last_seq, forget_before)

    def _move_due_slices(
        self, new_events: int, last_seq: int, forget_before: Optional[ForgetBefore]
    ) -> None:
        """Move the slices that have waited longest from recent.ids to `seen`.

        Why this never falls behind. Hashing spreads keys evenly over 256 slices, so
        with 393,216 recent keys a slice holds 1,536 on average: none just after its
        move, and about 3,072 when its turn comes again. So one move, of any slice, is
        needed for every 3,072 new events. `moves` below allows two, and each commit one
        more. A move is made only while recent.ids is over its limit, so in the long run
        as much goes out as comes in.

        Tombstones expire here, too, because the pages of the slice are written anyway.
        So none expires in a store that never had more than 393,216 events, however old.
        """
        moves = 1 + new_events * self._slices // self._most_recent
        while moves and self.recent_count > self._most_recent:
            span = key_span(self.next_slice, self._slices)
            # Expire first: the keys that the move brings are the newest of the slice
            # and need no look. If a key that expires is in recent.ids, too, the move
            # writes it back, and it expires when the slice has its next turn.
            if forget_before is not None:
                self._expire("seen", span, forget_before)
            self._move_slice(span)
            # The mark is the last seq there is, although most events belong to other
            # slices. That is right, because it speaks of this slice only. `learn` has
            # run, so all keys of the slice were in recent.ids, and all have just gone.
            self._set_mark(slice_name(self.next_slice, self._slices), last_seq)
            self.next_slice = (self.next_slice + 1) % self._slices
            moves -= 1

    def _move_due_shelves(
        self, new_events: int, last_seq: int, forget_before: Optional[ForgetBefore]
    ) -> None:
        """Move the shelves that have waited longest from `seen` to `archive`.

        The mark of the archive follows the newest seq at a distance of at least
        4,194,304. With every 1,024 seqs that it goes on, one shelf is moved. So
        4,194,304 new events are a turn for each of 4,096 shelves, and a shelf brings
        what came to it since its last turn: about 1,024 keys.

        It never falls behind: a commit may move a shelf for every 1,024 new events, and
        one more. Tombstones expire here, too: an archived one is looked at once in
        4,194,304 events.
        """
        moves = 1 + new_events // self._turn_events
        due = (last_seq - self._seen_ids - self.archive_mark) // self._turn_events
        for _ in range(min(moves, due)):
            shelf = self.archive_mark // self._turn_events % self._shelves
            span = key_span(shelf, self._shelves)
            if forget_before is not None:
                self._expire("archive", span, forget_before)
            self._move_shelf(span)
            self.archive_mark += self._turn_events
            self._set_mark("archive", self.archive_mark)

    def _move_slice(self, span: Dict[str, bytes]) -> None:
        """Write the keys of one slice to `seen`, and take them out of recent.ids.

        Between the insert and the delete a key is in both tables; nobody sees that,
        because it is one transaction.

        The insert is in key order: SQLite reads the span along the primary key. Keys
        that `make_tombstones` has put into `seen` before are met again here. DO NOTHING
        keeps the first, which says the same; OR ROLLBACK is for any other failure.
        """
        self._db.execute(
            """
            INSERT OR ROLLBACK INTO seen(key, seq, fingerprint, first_seen)
            SELECT key, seq, fingerprint, first_seen
            FROM recent.ids
            WHERE key >= :low AND key < :high
            ON CONFLICT(key) DO NOTHING
            """,
            span,
        )
        moved = self._db.execute(
            "DELETE FROM recent.ids WHERE key >= :low AND key < :high", span
        ).rowcount
        self.recent_count -= moved

    def _move_shelf(self, span: Dict[str, bytes]) -> None:
        """Write the tombstones of one shelf to `archive`, and take them out of `seen`.

        A key that is in recent.ids, too, stays: its slice will bring it to `seen` once
        more, and it must not be in `seen` and in `archive`.
        """
        self._db.execute(
            """
            INSERT OR ROLLBACK INTO archive(key, seq, fingerprint, first_seen)
            SELECT key, seq, fingerprint, first_seen
            FROM seen
            WHERE key >= :low AND key < :high
              AND NOT EXISTS (SELECT 1 FROM recent.ids AS ids WHERE ids.key = seen.key)
            """,
            span,
        )
        self._db.execute(
            """
            DELETE FROM seen
            WHERE key >= :low AND key < :high
              AND NOT EXISTS (SELECT 1 FROM recent.ids AS ids WHERE ids.key = seen.key)
            """,
            span,
        )

    def _set_mark(self, part: str, through: int) -> None:
        """Write how far a part has come."""
        self._db.execute(
            "UPDATE progress SET through = :through WHERE part = :part",
            {"through": through, "part": part},
        )

    def _expire(self, table: str, span: Dict[str, bytes], forget_before: ForgetBefore) -> None:
        """Forget the tombstones of a span that are old and whose events are gone.

        As long as an event is in the log, its tombstone must stay, however old: else a
        repeat would be stored beside it.
        """
        self._db.execute(
            f"""
            DELETE FROM {table}
            WHERE key >= :low AND key < :high
              AND first_seen < :before_us
              AND seq <= :through_seq
              -- Is the event gone? Below the oldest event of the log, all are, and that
              -- is cheap to see. Above it, retention by number has taken single events
              -- out, so each has to be looked up.
              AND (
                seq < (SELECT min(seq) FROM processed_events)
                OR NOT EXISTS (SELECT 1 FROM processed_events AS e WHERE e.seq = {table}.seq)
              )
            """,
            {**span, **forget_before._asdict()},
        )

    def make_tombstones(self, seqs: str) -> None:
        """Make the tombstones of events that are about to be removed.

        `seqs` is a JSON list. A key that has left recent.ids has its tombstone already.
        The others would be lost with a crash, because recent.ids is rebuilt from the
        log. They stay in recent.ids, too, until their slice is moved.
        """
        self._db.execute(
            """
            INSERT OR ROLLBACK INTO seen(key, seq, fingerprint, first_seen)
            SELECT ids.key, ids.seq, ids.fingerprint, ids.first_seen
            FROM processed_events AS e CROSS JOIN recent.ids AS ids ON ids.key = e.key
            WHERE e.seq IN (SELECT value FROM json_each(:seqs))
            ORDER BY ids.key
            ON CONFLICT(key) DO NOTHING
            """,
            {"seqs": seqs},
        )

    def recover(self) -> None:
        """Rebuild recent.ids from the log: what lies above the mark of its slice.

        To be called once, when the store is opened. It reads the log from the lowest
        mark on: about 786,000 events, because a slice waits for twice as many events as
        recent.ids keeps keys. So the time of a start does not grow with the log.
        """
        # `progress` is keyed by the first byte of each slice. The slice of a key is the
        # last that begins at or before it. (The parts 'archive' and 'listing' are no
        # slices. Small letters sort after 'FF', so the conditions leave them out.)
        self._db.execute(
            """
            INSERT OR ROLLBACK INTO recent.ids(key, seq, fingerprint, first_seen)
            SELECT key, seq, fingerprint, processed_at
            FROM processed_events
            WHERE seq > (SELECT min(through) FROM progress WHERE part <= 'FF')
              AND seq > (
                SELECT through
                FROM progress
                WHERE part <= hex(substr(key, 1, 1))
                ORDER BY part DESC
                LIMIT 1
              )
            ORDER BY key
            """
        )
        self.reload()

    def reload(self) -> None:
        """Read the counters back from the tables, after a start or a rollback.

        The next slice to move is the one with the lowest mark: it has waited longest.
        """
        self.recent_count = query_value(self._db, "SELECT count(*) FROM recent.ids")
        oldest = query_value(
            self._db, "SELECT part FROM progress WHERE part <= 'FF' ORDER BY through, part LIMIT 1"
        )
        self.next_slice = int(oldest, 16) * self._slices // 256
        self.archive_mark = query_value(
            self._db, "SELECT through FROM progress WHERE part = 'archive'"
        )


# ---- Many rows to a statement ----


def chunk_sizes(rows: int, most: int) -> Iterator[int]:
    """Sizes that add up to `rows`: multiples of 256, then of 64, then the rest.

    The number of rows is part of the text of a statement, so each size is a statement
    of its own. Few different sizes mean few different statements, and all of them stay
    prepared (STATEMENTS_KEPT). `most` is a multiple of 64.

    >>> list(chunk_sizes(700, most=2048))
    [512, 128, 60]
    """
    while rows:
        if rows >= 256:
            size = rows - rows % 256
        elif rows >= 64:
            size = rows - rows % 64
        else:
            size = rows
        size = min(size, most)
        yield size
        rows -= size


def chunks(
    rows: Sequence[_Row], columns: int, variables: int = SQLITE_VARIABLES
) -> Iterator[Sequence[_Row]]:
    """`rows` of so many columns each, in pieces that one statement can bind.

    A piece has as many rows as fit into `variables` values, rounded down to a multiple
    of 64, so that `chunk_sizes` can cut the usual sizes.

    >>> [len(piece) for piece in chunks(range(300), columns=2, variables=999)]
    [256, 44]
    """
    most = min(ROWS_PER_STATEMENT, variables // columns // 64 * 64)
    start = 0
    for size in chunk_sizes(len(rows), most):
        yield rows[start : start + size]
        start += size


@functools.lru_cache(STATEMENTS_KEPT)
def placeholders(rows: int, columns: int) -> str:
    """Question marks for the VALUES of a statement; they are remembered by size.

    >>> placeholders(2, 3)
    '(?,?,?),(?,?,?)'
    """
    row = "(" + ",".join("?" * columns) + ")"
    return ",".join([row] * rows)


def query_value(db: sqlite3.Connection, statement: str, values: Any = ()) -> Any:
    """The one value of a statement whose result is one row with one column.

    Whatever needs many rows has SQL make one JSON value of them (the GIL convoy,
    above). Raises TypeError if there is no row, which only a damaged store does.
    """
    (value,) = db.execute(statement, values).fetchone()
    return value


def connect(path: str, timeout_s: float = 5.0) -> sqlite3.Connection:
    """A connection in autocommit mode that any one thread at a time may use.

    Autocommit, because `transaction` (§3) says where one begins and ends; Python's
    `sqlite3` would begin one of its own before some statements and not before others.
    `timeout_s` is how long a statement waits for a lock that another program holds. It
    needs no folder for temporary files: what SQLite sorts, it sorts in memory.
    """
    db = sqlite3.connect(
        path,
        timeout=timeout_s,
        isolation_level=None,
        check_same_thread=False,
        cached_statements=STATEMENTS_KEPT,
    )
    db.execute("PRAGMA temp_store=MEMORY")
    return db


# ============================================================================
# §3  The store: log, books, retention
#
# One SQLite file holds the log of events, the index of §2, the counters, and the sorted
# tables. One thread writes to it, and each commit is one transaction: decide,
# append, learn, count, keep house. `Store.commit` is the heart of the file and reads
# like that.
#
# Readers want events sorted by topic and by time. An index on the log would cost a
# page write for each event, as in rung 2 of §2, because topics come in any order. The
# same cure helps: new events gather at the end of the log. Every few thousand of them
# are written at once, in order, to two sorted tables: `listing` (by topic) and
# `by_time`. A reader looks there, and at the end of the log.
#
# Retention removes what is old by arrival, and what a topic has too many of. The
# tombstone of a removed event stays, so a late retry is a duplicate.
#
# A clock may be wrong: a Raspberry Pi starts in 1970, and a clock that is set makes a
# jump. So age is measured by two clocks: see `AgeLimit`.
#
# What a commit costs the disk. With --sync full, one fsync of the WAL: SQLite appends
# the changed pages to that file, and the event is safe when the append is on the disk.
# After every 2,000 pages or so, a commit also writes them back to the store's own file
# and waits for the disk again (a checkpoint). With --sync normal only checkpoints wait
# for the disk. A reader in the middle of a snapshot does not make the writer wait. But
# pages that it may still need cannot be overwritten, so the WAL grows meanwhile.
#
# The order of this section: settings, age and clocks, opening a file, then the writer.
# Read `Store.commit` first, and `AgeLimit` last. The helpers of `commit` that need no
# database stand after the class: `Books`, `SequenceAccount`.
#
# Knows §1 and §2. Must not know asyncio, queues or HTTP. It is synchronous; each object
# is used by one thread at a time.
#
#   * Deciding, storing, counting and merging are one transaction.
#   * A row leaves the log only when its key is in `seen` or `archive`.
#   * A seq is given once. A seq that is used again would make a cursor skip an event.
#     AUTOINCREMENT keeps the highest seq ever given, even when its row has been
#     deleted, and the writer goes on from there.
#   * received = unique + duplicates; stored = unique - removed. A counter changes in
#     the same transaction as what it counts.
#   * One process owns the file. The proof is an exclusive lock on FILE-owner, which the
#     kernel drops when the process ends, however it ends.
#   * A file that is not ours is refused before SQLite may touch it.
#   * The variables of the writer are read back from the file after every rollback.
#   * Inserts of many new rows say OR ROLLBACK. Without it SQLite prepares for undoing
#     one statement and keeping the others: it copies each page before it changes it.
#     Here any failure rolls back the whole commit anyway.
#
# Simpler than a production system: the file does not shrink when events leave it; their
# pages are used again.
# ============================================================================

# "AGGR" in the file header (SQLite file format §1.3.16). `file FILE` shows it, and it
# tells a store from other people's databases.
APPLICATION_ID = 0x41474752
# The version of the tables below, kept in the header, too (`PRAGMA user_version`).
SCHEMA_VERSION = 4
# The oldest version that is brought up to date when it is opened.
OLDEST_SCHEMA_VERSION = 2
SQLITE_VERSION = sqlite3.sqlite_version
# ON CONFLICT DO UPDATE came with it.
OLDEST_SQLITE = (3, 24)

# Events that gather before the sorted tables are fed with them. More would be sorted
# better, and would make the one commit that sorts them longer.
LIST_ROWS = 4096
# SQLite's page cache of the writer, in KB. SQLite's own default is 2 MB.
CACHE_KB = 16 * 1024
# WAL pages of 4 KB after which a commit also writes them back to the file: 8 MB. SQLite
# does so after 1,000. A page that changed often in the meantime is written back once,
# so twice as many pages save some writing.
CHECKPOINT_PAGES = 2000
# The WAL's file is cut to this size when it begins anew, in bytes.
WAL_KEEP_BYTES = 64 * 1024 * 1024
# Beyond so many checkpoints' worth of pages it is looked whether the WAL can be written
# back at all. A commit does that now and then, and SQLite tells nobody when it fails.
WAL_LOOK_CHECKPOINTS = 4
# Beyond this size, something keeps the WAL from being written back to the file: it is
# more than 30 times as large as a checkpoint should leave it.
WAL_WARN_BYTES = 256 * 1024 * 1024
# A page in the WAL, with the header that SQLite puts before it.
WAL_FRAME_BYTES = 24 + 4096
# Characters of a payload that is long. A prepared statement keeps the values that were
# bound to it last, and a connection keeps 300 statements of up to 2,048 rows. So longer
# payloads are bound one at a time: the statement for one row keeps one.
LONG_PAYLOAD = 1024
# Rows that one step of retention removes; about 10 ms. A commit that comes meanwhile
# waits as long.
TRIM_ROWS = 500
# Bytes of payload after which a step of retention or of erasing ends, however few rows
# it has removed: SQLite writes zeros over each of them. That takes about 35 ms.
TRIM_BYTES = 4 * 1024 * 1024
# So few rows are not weighed. A commit of one event removes two at most.
TRIM_UNWEIGHED_ROWS = 2
# Topics over their limit that one step of retention looks at; a query for each.
TRIM_TOPICS = 100
# Missing ranges of sequence numbers that are remembered for each source. When there are
# more, the lowest are given up: their numbers are counted, but no longer listed.
GAPS_KEPT = 500
# The same of all sources together, about: see `_track_sequences`.
GAPS_IN_ALL = 100_000
# Upper bounds of the histogram of duplicates by delay, in seconds: from a retry at once
# to 30 days. The windows of well-known brokers (§4) are among them.
DELAY_BOUNDS_S = (1, 10, 60, 120, 300, 600, 3600, 21_600, 86_400, 604_800, 2_592_000)

# A wall clock that moves by so much more or less than the monotonic clock was set. Both
# are looked at every second, and a clock that NTP corrects gradually differs by far
# less in a second.
CLOCK_JUMP_US = 2_000_000
# How long retention waits after a start, and after a jump, before it believes the
# wall clock: NTP sets a clock within minutes of the network.
CLOCK_SETTLES_US = 600_000_000
# Events that one step of retention looks at besides the oldest; some milliseconds.
PATROL_ROWS = 5000


class StoreError(Exception):
    """The file cannot be opened as a store. The message says why and what to do.

    It comes before anything of the file is changed. It is not a StoreFailed: nothing
    gets better by trying again, so the program ends with it.
    """


class StoreFailed(Exception):
    """A read or write failed and left the store as it was. Trying later may help.

    It is raised in the writer's thread. The future of the call carries it to the
    pipeline (§5), which gives one to every publisher of the group. Nothing they sent is
    stored or counted, so they can repeat it. `problem` is the name under which §8 finds
    what to answer; that is all this section has to do with HTTP.
    """

    problem = "store-unavailable"
    # What is true of the events of the group that failed, for the program's log.
    outcome = "nothing of them stored"


class StoreSettings(NamedTuple):
    """How a store works. Zero means: keep all, or for ever.

    The first four are choices of whoever runs the service. The others are limits that
    tests make small, so that little work shows what much work would. What each of them
    is for stands at the constant that is its default.
    """

    # A commit survives a power cut, not only a crash.
    full_sync: bool = True
    max_per_topic: int = 0  # events
    retention_us: int = 0  # since the arrival of an event
    # Since the arrival of an event that is removed.
    dedup_retention_us: int = 0
    recent_ids: int = RECENT_IDS
    slices: int = SLICES
    seen_ids: int = SEEN_IDS
    shelves: int = SHELVES
    list_rows: int = LIST_ROWS
    trim_rows: int = TRIM_ROWS
    trim_bytes: int = TRIM_BYTES
    gaps_kept: int = GAPS_KEPT
    gaps_in_all: int = GAPS_IN_ALL
    checkpoint_pages: int = CHECKPOINT_PAGES
    wal_warn_bytes: int = WAL_WARN_BYTES
    clock_settles_us: int = CLOCK_SETTLES_US
    # The longest that another program may hold SQLite's lock.
    lock_timeout_s: float = 5.0


class LogGroup(NamedTuple):
    """Records that came in one entry of a log, and their arrival."""

    records: Sequence[Record]
    arrived_us: int  # microseconds since 1970 UTC


class LogMark(NamedTuple):
    """How far a store has come in a log that several nodes read (§14)."""

    position: int  # of the last entry that is applied
    chain: bytes  # digest of all entries up to it
    received: int  # events decided up to it
    # The last number of each writer whose entry is applied.
    writers: Dict[str, int]
    # Whether the store was used without the log since.
    was_alone: bool = False


class Moment(NamedTuple):
    """One instant by both clocks, in microseconds.

    The wall clock tells when something happened, and somebody may set it. The monotonic
    clock tells how much time has passed, and nobody can set it, but it begins anew with
    each start of the machine.
    """

    wall_us: int  # since 1970 UTC
    monotonic_us: int


def monotonic_us() -> int:
    """The monotonic clock in microseconds since some moment that does not matter."""
    return time.monotonic_ns() // 1000


class AgeLimit:
    """What arrived longer than `period_us` ago, though the wall clock may be wrong.

    Why two clocks. A Raspberry Pi has no clock that runs on without power. It starts in
    1970, or where it stopped, and minutes later NTP sets it. With the wall clock alone,
    a jump of a year would make every event a year older, and retention would delete
    them all. The monotonic clock makes no jumps, but it says nothing about the time
    before the start.

    Every event carries the time of its arrival by the wall clock. It is judged by this
    time, never by that of another event. Three rules keep a wrong clock from doing
    harm:

      * The wall clock is believed only once it has run on without a jump for
        `settles_us`, or for the period if that is shorter. Until then nothing goes.
      * An event that arrived before this process started (up to `started_after_seq`) is
        judged by the wall clock alone, because nothing else is known of its age. Events
        of last week, a restart today, a clock that has settled: they may go.
      * An event that arrived since then goes only when the period has passed by the
        monotonic clock, too. For this, marks are kept: at this time, everything up to
        this seq had arrived.

    The jump in an example: 60 seconds are kept, and 7 events are from before the start.

    >>> limit = AgeLimit(60_000_000, settles_us=10_000_000, started_after_seq=7)
    >>> limit.tick(Moment(0, 0))
    >>> limit.arrived(Moment(0, 0), seq=8)

    The clock jumps ahead by a year, and nothing may go.

    >>> limit.tick(Moment(31_536_000_000_000, 1_000_000))
    >>> limit.reached() is None
    True

    It runs on. Events from before the start may go now, and event 8 may not.

    >>> limit.tick(Moment(31_536_010_000_000, 11_000_000))
    >>> limit.reached().through_seq
    7

    A minute has passed by the monotonic clock, and event 8 may go as well.

    >>> limit.tick(Moment(31_536_060_000_000, 61_000_000))
    >>> limit.reached().through_seq
    8
    """

    def __init__(self, period_us: int, settles_us: int, started_after_seq: int) -> None:
        self._period_us = period_us
        self._settles_us = min(period_us, settles_us)
        self._now: Optional[Moment] = None
        self._believed_from_us = 0  # by the monotonic clock
        # The seq up to which the monotonic clock has no objection. It has none to what
        # was there at the start.
        self._old_through = started_after_seq
        self._marks: Deque[_ArrivalMark] = deque()

    def tick(self, now: Moment) -> None:
        """Look at both clocks. To be called often: a jump is seen between two calls.

        Marks that are a period old have served: what they stand for may go.
        """
        if self._now is None or clock_was_set(self._now, now):
            self._believed_from_us = now.monotonic_us + self._settles_us
        self._now = now
        while self._marks and self._marks[0].monotonic_us <= now.monotonic_us - self._period_us:
            self._old_through = self._marks.popleft().seq

    def arrived(self, now: Moment, seq: int) -> None:
        """Everything up to `seq` has arrived and is committed.

        A mark for each commit would fill the memory. So a new mark replaces the last
        one while it comes less than a thousandth of the period after the last but one:
        there are 2,000 marks at most. An event then waits for a mark that is a little
        younger than itself: it stays longer by a thousandth of the period at most.

        With a period of 1,000 s, the mark of 0.8 s replaces that of 0.4 s, and the mark
        of 1.2 s is far enough from that of 0 s:

        >>> limit = AgeLimit(1_000_000_000, settles_us=0, started_after_seq=0)
        >>> for seq, instant_us in enumerate((0, 400_000, 800_000, 1_200_000), 1):
        ...     limit.arrived(Moment(0, instant_us), seq)
        >>> [mark.monotonic_us for mark in limit._marks]
        [0, 800000, 1200000]
        """
        mark = _ArrivalMark(now.monotonic_us, seq)
        if self._marks and self._marks[-1].seq == seq:
            return
        if len(self._marks) > 1:
            apart_us = now.monotonic_us - self._marks[-2].monotonic_us
            if apart_us < self._period_us // 1000:
                self._marks.pop()
        self._marks.append(mark)

    def reached(self) -> Optional[ForgetBefore]:
        """What is old enough; None while the wall clock is not believed.

        Of the two bounds, the instant comes from the wall clock and the seq from the
        monotonic one.
        """
        if self._now is None or self._now.monotonic_us < self._believed_from_us:
            return None
        return ForgetBefore(self._now.wall_us - self._period_us, self._old_through)


class _Expired(NamedTuple):
    """Events past their time, and the last seq looked at; 0 if none was left."""

    seqs: List[int]
    end: int


class _ArrivalMark(NamedTuple):
    """At this time, everything up to this seq had arrived."""

    monotonic_us: int
    seq: int


def clock_was_set(before: Moment, now: Moment) -> bool:
    """Whether somebody set the wall clock between two moments.

    If nobody did, both clocks have moved by the same.

    >>> clock_was_set(Moment(0, 0), Moment(90_000_000, 60_000_000))
    True
    """
    wall_us = now.wall_us - before.wall_us
    passed_us = now.monotonic_us - before.monotonic_us
    return abs(wall_us - passed_us) > CLOCK_JUMP_US


# ---- Opening a file ----

# The tables, one statement each.
#
#   processed_events  The log. `seq` is the order of arrival. AUTOINCREMENT keeps SQLite
#                     from giving a seq again when the newest row was deleted.
#                     `processed_at` is the arrival. `key` and `fingerprint` stand
#                     beside the text they are made of, so SQL alone can rebuild
#                     recent.ids.
#   seen, archive     The tombstones (§2).
#   listing, by_time  The sorted tables.
#   progress          How far a part has come: a slice of the key space, 'archive', or
#                     'listing'.
#   stats             The books. `kind` is 'total', 'topic', 'source' or 'delay', and
#                     `name` says which. `removed` counts what left the log.
#   sequences         What each source has left out of its own counter.
#   about             The id of this store: it tells our cursors from those of others.
#
# WITHOUT ROWID makes the primary key the table itself. Otherwise SQLite would keep the
# rows in one B-tree and their key in a second one, and write both.
SCHEMA = (
    """
    CREATE TABLE processed_events(
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        key BLOB NOT NULL,
        fingerprint INTEGER NOT NULL,
        processed_at INTEGER NOT NULL,
        topic TEXT NOT NULL,
        event_id TEXT NOT NULL,
        timestamp INTEGER NOT NULL,
        source TEXT NOT NULL,
        payload TEXT NOT NULL,
        sequence INTEGER
    )
    """,
    "CREATE TABLE seen" + KEYS_TABLE,
    """
    CREATE TABLE listing(
        topic TEXT NOT NULL,
        timestamp INTEGER NOT NULL,
        seq INTEGER NOT NULL,
        PRIMARY KEY(topic, timestamp, seq)
    ) WITHOUT ROWID
    """,
    """
    CREATE TABLE by_time(
        timestamp INTEGER NOT NULL,
        seq INTEGER NOT NULL,
        PRIMARY KEY(timestamp, seq)
    ) WITHOUT ROWID
    """,
    "CREATE TABLE progress(part TEXT PRIMARY KEY, through INTEGER NOT NULL) WITHOUT ROWID",
    """
    CREATE TABLE stats(
        kind TEXT NOT NULL,
        name TEXT NOT NULL,
        uniques INTEGER NOT NULL,
        duplicates INTEGER NOT NULL,
        conflicts INTEGER NOT NULL,
        removed INTEGER NOT NULL,
        PRIMARY KEY(kind, name)
    ) WITHOUT ROWID
    """,
    """
    CREATE TABLE sequences(
        source TEXT PRIMARY KEY,
        newest INTEGER NOT NULL,
        missing INTEGER NOT NULL,
        given_up INTEGER NOT NULL,
        ranges TEXT NOT NULL
    ) WITHOUT ROWID
    """,
    "INSERT INTO stats VALUES('total', '', 0, 0, 0, 0)",
    "INSERT INTO progress VALUES('listing', 0)",
    f"PRAGMA application_id={APPLICATION_ID}",
)
# What older schemas lack, by the version that brought it. Version 3 gave each store a
# name of its own, version 4 its archive.
ADDED_LATER = {
    3: (
        "CREATE TABLE about(name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
        "INSERT INTO about VALUES('store_id', lower(hex(randomblob(8))))",
    ),
    4: (
        "CREATE TABLE archive" + KEYS_TABLE,
        "INSERT INTO progress VALUES('archive', 0)",
    ),
}
# user_version and application_id in the first 100 bytes of an SQLite file.
_SQLITE_HEADER = re.compile(rb"SQLite format 3\x00.{44}(.{4}).{4}(.{4})", re.DOTALL)
# The number of pages before the transaction, in the header of a rollback journal
# (SQLite file format §3).
_JOURNAL_HEADER = re.compile(rb"\xd9\xd5\x05\xf9\x20\xa1\x63\xd7.{8}(.{4}).{8}", re.DOTALL)


def check_header(path: str) -> bool:
    """Refuse a file that is no store we can read. Returns whether there is one.

    It reads the first 100 bytes and touches nothing. SQLite would not be so careful: a
    mere `PRAGMA journal_mode=WAL` changes the header of somebody else's database. An
    empty file is taken for a new store, because SQLite itself begins with one. A pipe
    or a device is not even opened: that may wait for ever. Raises StoreError.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise StoreError(f"{path} is not a regular file: choose another --db")
        with open(path, "rb") as file:
            head = file.read(100)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error.strerror}")
    if not head:
        return False
    if not head.strip(b"\0") and is_half_made(path):
        return False
    match = _SQLITE_HEADER.match(head)
    if match is None:
        raise StoreError(f"{path} is not an SQLite database: choose another --db")
    version, application = (int.from_bytes(field, "big") for field in match.groups())
    if application != APPLICATION_ID:
        raise StoreError(
            f"{path} is an SQLite database, but not an aggregator's: choose another --db"
        )
    if not OLDEST_SCHEMA_VERSION <= version <= SCHEMA_VERSION:
        raise StoreError(
            f"{path} has schema version {version}, and aggregator {__version__} reads versions"
            f" {OLDEST_SCHEMA_VERSION} to {SCHEMA_VERSION}: start the aggregator that wrote it,"
            " or choose another --db"
        )
    return not is_half_made(path)


def is_half_made(path: str) -> bool:
    """Whether the power went while the tables were being made in a new file.

    Then there is a journal, and it says that the file had no pages before. The next
    start has SQLite make the file empty again, and makes the tables anew. A journal
    without its first eight bytes is none: SQLite would just delete it. Raises
    StoreError.
    """
    journal = path + "-journal"
    try:
        if not stat.S_ISREG(os.stat(journal).st_mode):
            raise StoreError(f"{journal} is not a regular file: remove it")
        with open(journal, "rb") as file:
            match = _JOURNAL_HEADER.match(file.read(28))
    except FileNotFoundError:
        return False
    except OSError as error:
        raise StoreError(f"cannot read {path}-journal: {error.strerror}")
    return match is not None and not any(match[1])


def lock_store(path: str) -> sqlite3.Connection:
    """Own the store until the connection closes or the process dies. Raises StoreError.

    A lock on the store itself would shut out readers, who are welcome. So a second file
    beside it carries the lock. It is SQLite's own lock, which works wherever SQLite
    does. The kernel drops it with the process, so a crash leaves no lock behind. With
    its journal in memory, no third file is made.

    SQLite opens a file that it may not write for reading only, and then locks nothing.
    So the lock is proved by a write, which is never committed.
    """
    owner_path = path + "-owner"
    owner = None
    try:
        make_file(owner_path, like=path)
        owner = connect(owner_path, timeout_s=0.5)
        owner.execute("PRAGMA journal_mode=MEMORY")
        owner.execute("BEGIN EXCLUSIVE")
        owner.execute("PRAGMA user_version=1")
    except (sqlite3.Error, OSError) as error:
        if owner is not None:
            owner.close()
        # The text of an OSError has the path in it, and a folder may be called
        # "locked".
        if isinstance(error, sqlite3.OperationalError) and "locked" in str(error):
            raise StoreError(
                f"{path} belongs to another running aggregator: stop that one,"
                " or choose another --db"
            )
        raise StoreError(
            f"cannot lock {owner_path} ({error}): the user that runs the aggregator must be"
            " able to write it and its folder; if no aggregator runs, it may be removed"
        )
    return owner


def make_file(path: str, like: str) -> None:
    """Make an empty file that only its owner may read, if there is none of this name.

    Whatever the umask says: events may hold secrets, and the owner has to use it. The
    superuser makes it for the owner of `like`, so that a check run by root leaves
    nothing that the service cannot use. Raises OSError.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
    try:
        descriptor = os.open(path, flags, 0o600)
    except FileExistsError:
        return
    # Some file systems have no modes, and Windows no fchmod. They have no umask,
    # either.
    with contextlib.suppress(OSError, AttributeError):
        os.fchmod(descriptor, 0o600)
    os.close(descriptor)
    if hasattr(os, "geteuid") and os.geteuid() == 0 and os.path.exists(like):
        status = os.stat(like)
        os.chown(path, status.st_uid, status.st_gid)
    sync_folder(os.path.dirname(path))


def sync_folder(path: str) -> None:
    """Have the names in a folder on the disk: a new file without a name is lost.

    Windows cannot open a folder, and does not need to.
    """
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def refuse_other_names(path: str) -> None:
    """Refuse a file that has a second name. Raises StoreError.

    The lock and the WAL go by the name of the file. Beside another name there is
    another FILE-owner, so a second process would get its lock and write to the same
    file. Two WALs over one file destroy it. And who only reads, by a name that has no
    WAL beside it, sees nothing of the last commits.
    """
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return
    if status.st_nlink > 1:
        raise StoreError(
            f"{path} has {status.st_nlink} names (hard links), and a second process could open"
            " it by another one: remove the others, or copy the file"
        )
    if is_mount_point(path):
        raise StoreError(
            f"{path} is a mount point of its own, so its WAL would not be beside the real file:"
            " mount the folder instead of the file"
        )


def is_mount_point(path: str) -> bool:
    """Whether something is mounted exactly here, as containers do with single files.

    `os.path.ismount` does not see a file that is mounted from the same disk, so Linux's
    list of mounts is asked: the fifth field of each line (proc_pid_mountinfo(5)).
    """
    encoded = os.fsencode(path)
    try:
        with open("/proc/self/mountinfo", "rb") as mounts:
            for line in mounts:
                _, _, _, _, mount_point, *_ = line.split(b" ")
                # A blank in a name is written as an octal number.
                unescaped = re.sub(
                    rb"\\([0-7]{3})", lambda octal: bytes([int(octal[1], 8)]), mount_point
                )
                if unescaped == encoded:
                    return True
    except (OSError, ValueError):
        return os.path.ismount(path)
    return False


class FileIdentity(NamedTuple):
    """Which file it is, whatever its name, and how many names it has.

    It has nothing to do with the identity of an event.
    """

    device: int
    inode: int
    names: int


def file_identity(path: str) -> Optional[FileIdentity]:
    """The file of this name; None if there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return FileIdentity(status.st_dev, status.st_ino, status.st_nlink)


class WatchedFile:
    """A file of the store, which has to stay the one file of its name.

    A file that `changes_often` is asked for its name, and not for its `stat`, because
    `stat` makes commits slower: it reads the times of the file, and from Linux 6.13 on
    a file whose times were read writes them to the disk with its next change. The WAL
    changes with every commit, and each would take 60 µs longer. The name comes from a
    descriptor that can neither read nor lock (open(2), O_PATH). It is another one once
    the file is moved, and ends in " (deleted)" once it is gone. A second name is not
    noticed this way; that of a WAL harms nobody.
    """

    def __init__(self, path: str, changes_often: bool = False) -> None:
        self.path = path
        self._identity = file_identity(path)
        self._descriptor: Optional[int] = None
        if changes_often and hasattr(os, "O_PATH"):
            self._descriptor = os.open(path, os.O_PATH)
            try:
                self._name = self._name_now()
            except OSError:
                # Without /proc, its times have to be asked for.
                self.close()

    def _name_now(self) -> str:
        """How the system calls the file that was opened. Raises OSError."""
        return os.readlink(f"{OWN_DESCRIPTORS}{self._descriptor}")

    def is_in_place(self) -> bool:
        """Whether the name still stands for the same file."""
        if self._descriptor is not None:
            # It fails if /proc went away.
            with contextlib.suppress(OSError):
                return self._name_now() == self._name
        return file_identity(self.path) == self._identity

    def close(self) -> None:
        """Give the descriptor back."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


@contextlib.contextmanager
def transaction(db: sqlite3.Connection, begin: str = "BEGIN IMMEDIATE") -> Iterator[None]:
    """Commit at the end of the block, or roll back on any exception.

    This is for any connection and knows only SQLite. `Store._transaction` is built on
    it and also keeps the writer's variables right.

    IMMEDIATE takes the write lock at once, so nothing can change between a look and an
    insert. DEFERRED would take it at the first insert. If somebody else had written
    since our look, SQLite would refuse that insert, and the whole commit would fail.
    Errors of SQLite become StoreFailed.

    BaseException, because a cancelled or interrupted block must not leave a transaction
    open: the next BEGIN would fail, and so would every commit after it.
    """
    try:
        db.execute(begin)
        yield
        db.execute("COMMIT")
    except BaseException as error:
        with contextlib.suppress(sqlite3.Error):
            # After a full disk or an I/O error SQLite has rolled back already.
            if db.in_transaction:
                db.execute("ROLLBACK")
        if isinstance(error, sqlite3.Error):
            raise StoreFailed(str(error)) from error
        raise


@contextlib.contextmanager
def snapshot(db: sqlite3.Connection) -> Iterator[None]:
    """Read in one transaction: all statements see one state. Raises StoreFailed.

    LookupError, TypeError and ValueError come from values that a sound store does not
    hold, such as text where JSON should be.
    """
    try:
        with transaction(db, "BEGIN DEFERRED"):
            yield
    except (LookupError, TypeError, ValueError) as error:
        raise StoreFailed(
            f"the store is damaged ({error}): stop the service and run `aggregator.py check`"
        ) from error


# ---- The writer ----


class Store:
    """The writer, and the owner of the file at `path`.

    The constructor raises StoreError if the file cannot be used. A transaction that
    fails raises StoreFailed and leaves the store as it was. `clock_us` is a monotonic
    clock in microseconds; the wall clock comes with each call, as `now_us`.

    `last_seq`, `index.recent_count` and a few more variables repeat what the file says,
    because asking it would cost each commit some statements. They change while a
    transaction runs. After a rollback they are wrong (stale), so they are read back
    before they are used again: see `_refresh`.

    Every method is called in one thread. That, BEGIN IMMEDIATE, and the lock on
    FILE-owner make "look, then insert" safe.

    The constructor sets what it can without a file. The rest is set by `_open`, which
    needs the open file for it: `index`, `store_id`, the two age limits, `last_seq` and
    what else is read from tables.
    """

    def __init__(
        self,
        path: str,
        settings: StoreSettings = StoreSettings(),
        clock_us: Callable[[], int] = monotonic_us,
    ) -> None:
        self.path = os.path.realpath(path)
        self._settings = settings
        self._monotonic_us = clock_us
        folder = os.path.dirname(self.path)
        self._check_folder(folder)
        check_header(self.path)
        refuse_other_names(self.path)
        self._owner = lock_store(self.path)
        # Until the store itself is open, so that `close` can close what there is.
        self.db = self._owner
        self._files: List[WatchedFile] = []
        try:
            make_file(self.path, like=folder)
            self.db = connect(self.path, settings.lock_timeout_s)
            self._open()
        except StoreError:
            self.close()
            raise
        except (sqlite3.Error, LookupError, OSError, TypeError, ValueError) as error:
            # All but the first, and OSError from `make_file`, come from a damaged file.
            self.close()
            raise StoreError(
                f"cannot use {self.path}: {error}; SQLite needs its JSON functions, and a damaged"
                " file has to be moved away or restored from a copy"
            )

    def _age_limit(self, period_us: int) -> Optional[AgeLimit]:
        """The age limit of a setting; None for 0, which means: keep for ever."""
        if not period_us:
            return None
        return AgeLimit(period_us, self._settings.clock_settles_us, self.last_seq)

    def _check_folder(self, folder: str) -> None:
        """Refuse what cannot be a store, in one sentence. Raises StoreError.

        SQLite would find out later, and say "unable to open database file" to all of
        it.
        """
        if not os.path.isdir(folder):
            raise StoreError(
                f"the folder {folder} does not exist: create it, or choose another --db"
            )
        if os.path.isdir(self.path):
            raise StoreError(f"{self.path} is a folder: --db names a file")
        file_is_writable = os.access(self.path, os.W_OK) or not os.path.exists(self.path)
        if not os.access(folder, os.W_OK) or not file_is_writable:
            raise StoreError(
                f"{self.path} or its folder is read-only: the user that runs the aggregator"
                " must own both"
            )

    def _open(self) -> None:
        """Make the tables if there are none, and read what the writer has to know.

        The order matters: the tables before the index that uses them, the index before
        the counters, and the counters before the age limits, which begin at `last_seq`.
        """
        # A small build of SQLite may lack the JSON functions. It shows here.
        self.db.execute("SELECT json_quote('')")
        if sqlite3.sqlite_version_info < OLDEST_SQLITE:
            raise StoreError(f"this SQLite is {SQLITE_VERSION}: 3.24 or newer is needed")
        self._create_tables()
        if query_value(self.db, "PRAGMA journal_mode=WAL") != "wal":
            raise StoreError(
                f"{self.path} is on a file system without shared memory, which SQLite's WAL mode"
                " needs: choose a local disk"
            )
        # FULL: each commit waits until the WAL is on the disk. NORMAL: only checkpoints
        # wait, so the last commits may be lost with the power, but never with a crash
        # of the process (SQLite, "PRAGMA synchronous").
        sync = "FULL" if self._settings.full_sync else "NORMAL"
        self.db.execute(f"PRAGMA synchronous={sync}")
        self.db.execute(f"PRAGMA cache_size=-{CACHE_KB}")
        self.db.execute(f"PRAGMA wal_autocheckpoint={self._settings.checkpoint_pages}")
        self.db.execute(f"PRAGMA journal_size_limit={WAL_KEEP_BYTES}")
        # Zeros are written over all that leaves the file. Always, and not only while
        # somebody erases: SQLite moves rows between pages, and the old places would
        # keep their text. With retention that costs 4 % more written bytes, without it
        # nothing.
        self.db.execute("PRAGMA main.secure_delete=1")
        self.index = DedupIndex(
            self.db,
            self._settings.recent_ids,
            self._settings.slices,
            self._settings.seen_ids,
            self._settings.shelves,
        )
        self.index.recover()
        self._reload()
        self.store_id = query_value(self.db, "SELECT value FROM about WHERE name = 'store_id'")
        # A process that was killed may have left erased text in the WAL.
        self.scrub_is_due = True
        # How large the WAL's file was when all of it was written back; see
        # `checkpoint_note`.
        self._wal_written_bytes = 0
        self._retention = self._age_limit(self._settings.retention_us)
        self._dedup_retention = self._age_limit(self._settings.dedup_retention_us)
        # The files that this store consists of, for `_check_files`.
        self._files = [WatchedFile(self.path + ending) for ending in ("", "-owner", "-shm")]
        self._files.append(WatchedFile(self.path + "-wal", changes_often=True))

    def _create_tables(self) -> None:
        """Make the tables in a new file, or bring an old file up to date.

        It is one transaction: all of it or nothing. The exclusive lock also shows that
        no other program is writing.
        """
        self.db.execute("BEGIN EXCLUSIVE")
        version = query_value(self.db, "PRAGMA user_version")
        if version == 0:
            for statement in SCHEMA:
                self.db.execute(statement)
            for number in range(self._settings.slices):
                name = slice_name(number, self._settings.slices)
                self.db.execute("INSERT INTO progress VALUES(?, 0)", (name,))
        if version < SCHEMA_VERSION:
            for number, statements in ADDED_LATER.items():
                if version < number:
                    for statement in statements:
                        self.db.execute(statement)
            self.db.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
        # A crash in the middle of a probe leaves this row.
        self.db.execute("DELETE FROM progress WHERE part = 'probe'")
        self.db.execute("COMMIT")
        if 0 < version < SCHEMA_VERSION:
            log.info(
                "UPGRADED - %s from schema version %d to %d: older aggregators refuse it now",
                self.path,
                version,
                SCHEMA_VERSION,
            )

    def _reload(self) -> None:
        """Read back from the file what the writer keeps in variables.

        It is right after a start and after a rollback alike, because every one of them
        follows from the tables. Only how far the patrol had come is forgotten, so it
        begins anew.
        """
        self.last_seq = query_value(
            self.db,
            "SELECT ifnull(max(seq), 0) FROM sqlite_sequence WHERE name = 'processed_events'",
        )
        self._listed_through = query_value(
            self.db, "SELECT through FROM progress WHERE part = 'listing'"
        )
        self._sources_counted = query_value(self.db, "SELECT count(*) FROM sequences")
        # Topics that perhaps hold too many events, in the order of being found: after
        # each commit, all topics that it wrote to. Retention looks at each and takes it
        # off the list. A dictionary without values is a set that keeps its order.
        self._perhaps_crowded: Dict[str, None] = {}
        if self._settings.max_per_topic:
            names = query_value(
                self.db,
                """
                SELECT json_group_array(name)
                FROM stats
                WHERE kind = 'topic' AND uniques - removed > :most
                """,
                {"most": self._settings.max_per_topic},
            )
            self._perhaps_crowded = dict.fromkeys(json.loads(names))
        # The seq up to which the patrol of retention has come. See `_patrol`.
        self._patrolled = 0
        self._stale = False

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        """A transaction of the writer: `transaction`, and right variables after it.

        While the block runs, the variables say what the file will say after COMMIT. If
        the block, or COMMIT itself, fails, they are wrong: `_stale` stays True, and the
        next transaction reads them anew. They are not read at once, because right after
        an I/O error the file may not be readable either.
        """
        with transaction(self.db):
            self._refresh()
            # It is assumed to fail until COMMIT has succeeded.
            self._stale = True
            yield
            # Last, right before COMMIT: if a file is gone, all is rolled back, and
            # nobody is told that an event is stored there.
            self._check_files()
        self._stale = False

    def _refresh(self) -> None:
        """Read the variables back from the file if a transaction was rolled back.

        It runs inside a transaction or a snapshot, so nothing changes while it reads.
        """
        if self._stale:
            self.index.reload()
            self._reload()

    def received(self) -> int:
        """Events decided since the store was made: new, duplicate, or conflict."""
        total: int = query_value(
            self.db, "SELECT uniques + duplicates FROM stats WHERE kind = 'total'"
        )
        return total

    def commit(self, records: Sequence[Record], now_us: int) -> Decision:
        """Decide, store and count a group: one transaction.

        `now_us` is the time just before the commit, in microseconds since 1970 UTC; it
        becomes the arrival of what is new. Raises StoreFailed; then nothing of the
        group is stored or counted.

        It returns after COMMIT: then the group is on the disk, unless the setting
        `full_sync` is off. `_note_arrivals` runs after COMMIT: if the commit failed,
        the age limits would hold a time for seqs that other events get later.
        """
        now = Moment(now_us, self._monotonic_us())
        with self._transaction():
            decision = self._store_group(records, now)
        self._note_arrivals(now)
        return decision

    def _store_group(self, records: Sequence[Record], now: Moment) -> Decision:
        """The steps of a commit, inside its transaction. `rehearse` takes them, too.

        The first four (look up, decide, append, learn) are the whole of deduplication.
        They are safe together because nothing else can write between them. The log is
        appended before the index learns, because the index reads the keys back from the
        log. The books change in the same transaction, so after any crash they say what
        is there. Housekeeping comes last.
        """
        known = self.index.look_up(records)
        decision = decide(records, known, self.last_seq, now.wall_us)
        self._append(decision)
        # `last_seq` has moved already.
        self.index.learn(after_seq=decision.first_seq - 1)
        self._count(records, decision)

        self._keep_house(now, new_events=len(decision.fresh))
        return decision

    # ---- Groups that come from a log (§14) ----

    def log_mark(self) -> LogMark:
        """How far this store has come in the log; position 0 if it never read one.

        Only a store that is used with a log has the table `replica`: `through` is the
        position in the row 'position', the events decided up to there in 'received',
        and the last entry of each writer in 'writer NAME'. The row 'alone' is there if
        the store was opened without its log since. Raises StoreFailed.
        """
        with self._transaction():
            self.db.execute(
                """
                CREATE TABLE IF NOT EXISTS replica(
                    name TEXT PRIMARY KEY,
                    through INTEGER NOT NULL,
                    chain BLOB NOT NULL
                ) WITHOUT ROWID
                """
            )
            rows = self.db.execute("SELECT name, through, chain FROM replica").fetchall()
        mark = LogMark(0, b"", self.received(), {})
        for name, through, chain in rows:
            kind, _, writer = name.partition(" ")
            if kind == "position":
                mark = mark._replace(position=through, chain=chain)
            elif kind == "received":
                mark = mark._replace(received=through)
            elif kind == "alone":
                mark = mark._replace(was_alone=True)
            else:
                mark.writers[writer] = through
        return mark

    def join_log(self) -> None:
        """Note that this store and a log go together now. Raises StoreFailed."""
        with self._transaction():
            self.db.execute("INSERT OR IGNORE INTO replica VALUES('position', 0, x'')")
            self.db.execute("DELETE FROM replica WHERE name = 'alone'")

    def leave_log(self) -> None:
        """Note that this store is used without its log, if it has one.

        What is erased or stored now, no other node does. So the store may not go back:
        it would be another than theirs, and nobody would notice. Raises StoreFailed.
        """
        tables = "SELECT count(*) FROM sqlite_master WHERE type = 'table' AND name = 'replica'"
        if not query_value(self.db, tables):
            return
        with self._transaction():
            self.db.execute(
                """
                INSERT OR IGNORE INTO replica(name, through, chain)
                SELECT 'alone', 1, x''
                FROM replica
                WHERE name = 'position'
                """
            )

    def adopt_id(self, store_id: str) -> None:
        """Take the id of the store that this empty one becomes a replica of."""
        with self._transaction():
            self.db.execute(
                "UPDATE about SET value = :store_id WHERE name = 'store_id'",
                {"store_id": store_id},
            )
        self.store_id = store_id

    def apply(self, groups: Sequence[LogGroup], mark: LogMark, now_us: int) -> List[Decision]:
        """Decide, store and count groups of records in their order: one transaction.

        The result is what `commit` would have decided on one after the other, so it
        does not depend on how many are applied together. `mark` is the position after
        the last of them. It changes in the same transaction, so a crash repeats nothing
        and leaves nothing out. `received` in it is filled in here. Raises StoreFailed.
        """
        now = Moment(now_us, self._monotonic_us())
        everything: List[Record] = []
        for group in groups:
            everything.extend(group.records)
        with self._transaction():
            known = self.index.look_up(everything)
            decisions: List[Decision] = []
            last_seq = self.last_seq
            for group in groups:
                decision = decide(group.records, known, last_seq, group.arrived_us)
                known.update(keys_learned(decision))
                last_seq += len(decision.fresh)
                decisions.append(decision)
            new_events = last_seq - self.last_seq
            self._append(*decisions)
            self.index.learn(after_seq=last_seq - new_events)
            for group, decision in zip(groups, decisions):
                self._count(group.records, decision)
            self._write_mark(mark)
            self._keep_house(now, new_events)
        self._note_arrivals(now)
        return decisions

    def _write_mark(self, mark: LogMark) -> None:
        """Write how far the log is applied, one row for each fact and each writer.

        It runs inside the transaction that applies the groups, after they are counted.
        No number ever goes back: a late try must not open the door for the next one.
        """
        rows: List[Tuple[str, int, bytes]] = [
            ("position", mark.position, mark.chain),
            ("received", self.received(), b""),
        ]
        for writer, number in mark.writers.items():
            rows.append(("writer " + writer, number, b""))
        for chunk in chunks(rows, columns=3):
            self.db.execute(
                f"""
                INSERT INTO replica(name, through, chain)
                VALUES {placeholders(len(chunk), 3)}
                ON CONFLICT(name) DO UPDATE SET
                    through = max(through, excluded.through),
                    chain = excluded.chain
                """,
                list(itertools.chain.from_iterable(chunk)),
            )

    def _keep_house(self, now: Moment, new_events: int) -> None:
        """What keeps every later commit as cheap as this one.

        In the long run each step does as much work as has arrived. A single commit may
        pay for several thousand events at once: it moves a slice, or sorts 4,096 events
        into the sorted tables. That lasts tens of milliseconds. To do all of it once a
        night instead would last an hour.

        The clocks come first, because the merge and retention both ask what is old.
        """
        self._look_at_clocks(now)
        self.index.merge(new_events, self.last_seq, self._forget_before())
        self._feed_sorted_tables(at_least=self._settings.list_rows)
        self._apply_retention(at_most=2 * new_events)

    def _append(self, *decisions: Decision) -> None:
        """Write the new records to the end of the log, each with its seq.

        We give the seqs, not SQLite, because they are known already: a repeat in this
        group carries the seq of its first. The numbers of producers (`sequence`) are
        tracked here, too.

        `last_seq` moves before COMMIT; if that fails, it is read back (`_transaction`).
        If a row is refused, say by a full disk, nothing of the group stays.
        """
        # A row is the seq, the arrival, and the fields of the record, in their order:
        # what `_LOG_COLUMNS`, after this class, names.
        short_rows: List[Tuple[Any, ...]] = []
        for decision in decisions:
            for seq, record in enumerate(decision.fresh, decision.first_seq):
                row = (seq, decision.arrived_us, *record)
                if len(record.payload) > LONG_PAYLOAD:
                    # Alone, so that only one prepared statement keeps it.
                    self._append_rows([row])
                else:
                    short_rows.append(row)
        for chunk in chunks(short_rows, columns=_LOG_WIDTH):
            self._append_rows(chunk)
        for decision in decisions:
            self.last_seq += len(decision.fresh)
            # Group by group, as if each had come alone (§14 appends several at once): a
            # source that is new begins with the lowest number of its first group.
            numbered = [record for record in decision.fresh if record.sequence is not None]
            if numbered:
                self._track_sequences(numbered)

    def _append_rows(self, rows: Sequence[Tuple[Any, ...]]) -> None:
        """Write rows to the log with one statement, for one wait for the GIL."""
        self.db.execute(
            f"""
            INSERT OR ROLLBACK INTO processed_events({_LOG_COLUMNS})
            VALUES {placeholders(len(rows), _LOG_WIDTH)}
            """,
            list(itertools.chain.from_iterable(rows)),
        )

    def _count(self, records: Sequence[Record], decision: Decision) -> None:
        """Add a group to the books: totals, topics, sources, delays of duplicates.

        `Books` adds up what the group changes. One statement writes it: a row is made
        if it is not there, and else the numbers are added to it (SQLite, "UPSERT";
        `excluded` is the row that was to be made).

        Every topic of the group is remembered for the limit by number. Whether one of
        them really holds too many, `_surplus_seqs` finds out.
        """
        books = Books(records, decision)
        rows = books.rows()
        for chunk in chunks(rows, columns=6):
            self.db.execute(
                f"""
                INSERT OR ROLLBACK INTO stats(kind, name, uniques, duplicates, conflicts, removed)
                VALUES {placeholders(len(chunk), 6)}
                ON CONFLICT(kind, name) DO UPDATE SET
                    uniques = uniques + excluded.uniques,
                    duplicates = duplicates + excluded.duplicates,
                    conflicts = conflicts + excluded.conflicts
                """,
                list(itertools.chain.from_iterable(chunk)),
            )
        if self._settings.max_per_topic:
            self._perhaps_crowded.update(dict.fromkeys(books.topics))

    def _track_sequences(self, numbered: Sequence[Record]) -> None:
        """Keep account of the sequence numbers that each source has left out.

        It is called with new events only, because a repeat says nothing new. It reads
        the accounts of the sources of the group, lets `SequenceAccount.after` do the
        arithmetic, and writes them back. A source that was never heard of begins with
        its lowest number of this group: what came before is nobody's loss.
        """
        arrived: Dict[str, Set[int]] = {}
        for record in numbered:
            assert record.sequence is not None
            arrived.setdefault(record.source, set()).add(record.sequence)
        known = self._known_sequences(list(arrived))
        self._sources_counted += len(arrived) - len(known)
        gaps_kept = gaps_for_each(self._sources_counted, self._settings)
        rows = []
        for source, numbers in arrived.items():
            account = known.get(source)
            if account is None:
                account = SequenceAccount(newest=min(numbers) - 1)
            account = account.after(sorted(numbers), gaps_kept)
            rows.append({"source": source, "count": account.missing_count(), **account._asdict()})
        # In the table, `missing` is how many numbers are missing; `ranges` says which.
        self.db.execute(
            """
            INSERT OR REPLACE INTO sequences(source, newest, missing, given_up, ranges)
            SELECT
                json_extract(value, '$.source'),
                json_extract(value, '$.newest'),
                json_extract(value, '$.count'),
                json_extract(value, '$.given_up'),
                json_extract(value, '$.missing')
            FROM json_each(:rows)
            """,
            {"rows": json.dumps(rows)},
        )

    def _known_sequences(self, sources: Sequence[str]) -> Dict[str, "SequenceAccount"]:
        """The accounts of these sources, by name; those never heard of are left out."""
        found = query_value(
            self.db,
            """
            SELECT json_group_array(json_array(source, newest, given_up, json(ranges)))
            FROM json_each(:sources) AS wanted
            CROSS JOIN sequences ON source = wanted.value
            """,
            {"sources": json.dumps(sources)},
        )
        accounts: Dict[str, SequenceAccount] = {}
        for source, newest, given_up, missing in json.loads(found):
            accounts[source] = SequenceAccount(newest, given_up, missing)
        return accounts

    def _feed_sorted_tables(self, at_least: int) -> None:
        """Enter the end of the log into `listing` and `by_time`, sorted.

        Sorted, a few thousand rows touch each page of these tables once. One by one,
        each would touch a page of its own. Nothing happens while fewer than `at_least`
        events wait. The mark moves in the same transaction, so an event is always
        either below it and in both tables, or above it and in the log's end.
        """
        if self.last_seq - self._listed_through < at_least:
            return
        after = {"after_seq": self._listed_through}
        self.db.execute(
            """
            INSERT OR ROLLBACK INTO listing(topic, timestamp, seq)
            SELECT topic, timestamp, seq
            FROM processed_events
            WHERE seq > :after_seq
            ORDER BY topic, timestamp, seq
            """,
            after,
        )
        self.db.execute(
            """
            INSERT OR ROLLBACK INTO by_time(timestamp, seq)
            SELECT timestamp, seq
            FROM processed_events
            WHERE seq > :after_seq
            ORDER BY timestamp, seq
            """,
            after,
        )
        self.db.execute(
            "UPDATE progress SET through = :through WHERE part = 'listing'",
            {"through": self.last_seq},
        )
        self._listed_through = self.last_seq

    def locate(self, topic: str, event_id: str) -> Optional[int]:
        """The seq of an identity, whether or not its event is still in the log.

        None if it was never seen. Raises StoreFailed.
        """
        # Only the key of this record is used.
        record = record_of(Event(topic, event_id, 0, "", ""))
        with snapshot(self.db):
            known = self.index.look_up([record]).get(record.key)
        return None if known is None else known.seq

    # ---- Retention ----
    #
    # Two rules say what goes. By age: what arrived before the period of --retention. By
    # number: the oldest by timestamp of a topic that holds more than
    # --max-events-per-topic. Each commit removes up to twice as many as it adds, so a
    # flood never outruns retention. `tidy` does the rest in steps, and what is too long
    # for one commit.

    def tidy(self, now_us: int) -> bool:
        """One step of retention in a transaction of its own. True if there may be more.

        There may be more if this step removed something, or found a topic to be within
        its limit. The caller asks again until neither happens.

        It looks first, by reading, and begins to write only if something may have to
        go: a service without work writes nothing. Raises StoreFailed.
        """
        now = Moment(now_us, self._monotonic_us())
        self._look_at_clocks(now)
        rows = self._settings.trim_rows
        with snapshot(self.db):
            self._refresh()
            expired = self._expired_seqs(after_seq=0, look_at=rows, at_most=rows).seqs
            if not expired:
                expired = self._patrol(rows)
        if not expired and not self._perhaps_crowded:
            return False
        crowded = len(self._perhaps_crowded)
        with self._transaction():
            removed = self._remove(expired)
            removed += self._remove(self._surplus_seqs(rows - removed))
        return bool(removed or len(self._perhaps_crowded) < crowded)

    def _look_at_clocks(self, now: Moment) -> None:
        """Tell the age limits what time it is."""
        for limit in (self._retention, self._dedup_retention):
            if limit is not None:
                limit.tick(now)

    def _note_arrivals(self, now: Moment) -> None:
        """Tell the age limits that all up to `last_seq` is committed."""
        for limit in (self._retention, self._dedup_retention):
            if limit is not None:
                limit.arrived(now, self.last_seq)

    def _forget_before(self) -> Optional[ForgetBefore]:
        """Which tombstones may go, if any."""
        if self._dedup_retention is None:
            return None
        return self._dedup_retention.reached()

    def _apply_retention(self, at_most: int) -> int:
        """Remove up to `at_most` events that are due; returns how many it was.

        Expire by age first; the limit per topic applies to the rest. `at_most` is twice
        what has just arrived, so a store that holds too much shrinks, and no commit
        takes long. A commit without anything new removes nothing.
        """
        if not at_most:
            return 0
        expired = self._expired_seqs(after_seq=0, look_at=at_most, at_most=at_most)
        removed = self._remove(expired.seqs)
        removed += self._remove(self._surplus_seqs(at_most - removed))
        return removed

    def _expired_seqs(self, after_seq: int, look_at: int, at_most: int) -> "_Expired":
        """Events that are past --retention, each judged by its own arrival.

        Each by its own, because one arrival by a wrong clock must not take other events
        along. The scan is bounded: it looks at `look_at` events from `after_seq` on,
        and names `at_most` of them, or as many as `trim_bytes` allows.
        """
        reached = self._retention.reached() if self._retention is not None else None
        if reached is None:
            return _Expired([], 0)
        values = {**reached._asdict(), "after_seq": after_seq, "look_at": look_at}
        end = query_value(
            self.db,
            """
            SELECT ifnull(max(seq), 0)
            FROM (
                SELECT seq
                FROM processed_events
                WHERE seq > :after_seq AND seq <= :through_seq
                ORDER BY seq
                LIMIT :look_at
            )
            """,
            values,
        )
        found = query_value(
            self.db,
            """
            SELECT json_group_array(seq)
            FROM (
                SELECT seq
                FROM processed_events
                WHERE seq > :after_seq AND seq <= :end AND processed_at < :before_us
                ORDER BY seq
                LIMIT :at_most
            )
            """,
            {**values, "end": end, "at_most": at_most},
        )
        expired = json.loads(found)
        seqs = self._within_bytes(expired)
        if len(seqs) == at_most or len(seqs) < len(expired):
            end = seqs[-1]
        return _Expired(seqs, end)

    def _within_bytes(self, seqs: List[int]) -> List[int]:
        """The first of these events, as many as one step may remove.

        One at least, and those until `trim_bytes` of payload are reached. Mostly that
        is all of them, and one look shows it: no payload is longer than its fair share.
        Else the first `trim_rows` are weighed.
        """
        if len(seqs) <= TRIM_UNWEIGHED_ROWS:
            return seqs
        fair_share = self._settings.trim_bytes // len(seqs)
        # As BLOB, because the length of a TEXT is in characters.
        has_longer = query_value(
            self.db,
            """
            SELECT EXISTS(
                SELECT 1
                FROM json_each(:seqs) AS wanted
                CROSS JOIN processed_events AS e ON e.seq = wanted.value
                WHERE length(CAST(e.payload AS BLOB)) > :fair_share
            )
            """,
            {"seqs": json.dumps(seqs), "fair_share": fair_share},
        )
        if has_longer:
            return self._weighed(seqs[: self._settings.trim_rows])
        return seqs

    def _weighed(self, seqs: List[int]) -> List[int]:
        """The first of these events, until `trim_bytes` of payload are reached.

        It goes from event to event and stops there: 500 payloads of a megabyte are not
        read in order to remove four of them.
        """
        # A row for each event that goes, and one to begin with.
        rows = query_value(
            self.db,
            """
            WITH RECURSIVE weighed(place, bytes) AS (
                VALUES (-1, 0)
                UNION ALL
                SELECT place + 1, bytes + ifnull(
                    (
                        SELECT length(CAST(payload AS BLOB))
                        FROM processed_events
                        WHERE seq = json_extract(:seqs, '$[' || (place + 1) || ']')
                    ),
                    0
                )
                FROM weighed
                WHERE bytes < :most AND place + 1 < :count
            )
            SELECT count(*) FROM weighed
            """,
            {"seqs": json.dumps(seqs), "most": self._settings.trim_bytes, "count": len(seqs)},
        )
        return seqs[: rows - 1]

    def _patrol(self, at_most: int) -> List[int]:
        """Look for expired events that stand behind others which stay.

        With a right clock the oldest events expire first, and the scan from the
        beginning finds them. Events that arrived by a clock that was ahead stay longer,
        and would hide all that came after them. So each step also looks at the next
        stretch of the log, from one end to the other and over again.
        """
        expired = self._expired_seqs(self._patrolled, PATROL_ROWS, at_most)
        # At the end of the log it is 0: the patrol begins anew.
        self._patrolled = expired.end
        return expired.seqs

    def _surplus_seqs(self, at_most: int) -> List[int]:
        """The oldest events of topics that hold more than they may.

        It looks at a bounded number of topics, and the others get their turn later: a
        topic stays on the list until it has been looked at and is within its limit, or
        until this step brings it there. `at_most` events are named, of all topics
        together, or as many as `trim_bytes` allows.

        It may write: the oldest of a topic are found in the listing, which has to be
        fed first with the end of the log.
        """
        surplus: Dict[str, int] = {}
        room = at_most
        for topic in list(itertools.islice(self._perhaps_crowded, TRIM_TOPICS)):
            if not room:
                break
            stored = query_value(
                self.db,
                "SELECT uniques - removed FROM stats WHERE kind = 'topic' AND name = :topic",
                {"topic": topic},
            )
            too_many = max(0, stored - self._settings.max_per_topic)
            if too_many <= room:
                # This step removes all of it.
                del self._perhaps_crowded[topic]
            if too_many:
                surplus[topic] = min(too_many, room)
                room -= surplus[topic]
        if surplus:
            # The listing knows what is oldest, so it has to be complete.
            self._feed_sorted_tables(at_least=1)
        seqs: List[int] = []
        for topic, count in surplus.items():
            seqs += self._oldest_of_topic(topic, count)
        fitting = self._within_bytes(seqs)
        if len(fitting) < len(seqs):
            # Some of these topics still hold too many.
            self._perhaps_crowded.update(dict.fromkeys(surplus))
        return fitting

    def _oldest_of_topic(self, topic: str, count: int) -> List[int]:
        """The seqs of the `count` events of a topic with the lowest timestamps."""
        found: List[int] = json.loads(
            query_value(
                self.db,
                """
                SELECT json_group_array(seq)
                FROM (
                    SELECT seq
                    FROM listing
                    WHERE topic = :topic
                    ORDER BY timestamp, seq
                    LIMIT :count
                )
                """,
                {"topic": topic, "count": count},
            )
        )
        return found

    def _remove(self, seqs: Sequence[int]) -> int:
        """Take events out of the log, the sorted tables, and the books.

        First the tombstones, while the log still has the keys. The log goes last,
        because the statements before it read from it what they have to delete. It runs
        inside a transaction of the caller: if it fails, all events are still there.

        Returns how many events were there and are gone; a seq that is not in the log is
        passed over. The books of the sources do not count what was removed.
        """
        if not seqs:
            return 0
        gone = json.dumps(sorted(seqs))
        self.index.make_tombstones(gone)
        self.db.execute(
            """
            INSERT OR ROLLBACK INTO stats(kind, name, uniques, duplicates, conflicts, removed)
            SELECT 'topic', topic, 0, 0, 0, count(*)
            FROM processed_events
            WHERE seq IN (SELECT value FROM json_each(:gone))
            GROUP BY topic
            ON CONFLICT(kind, name) DO UPDATE SET removed = removed + excluded.removed
            """,
            {"gone": gone},
        )
        self.db.execute(
            """
            DELETE FROM listing
            WHERE (topic, timestamp, seq) IN (
                SELECT topic, timestamp, seq
                FROM processed_events
                WHERE seq IN (SELECT value FROM json_each(:gone))
            )
            """,
            {"gone": gone},
        )
        self.db.execute(
            """
            DELETE FROM by_time
            WHERE (timestamp, seq) IN (
                SELECT timestamp, seq
                FROM processed_events
                WHERE seq IN (SELECT value FROM json_each(:gone))
            )
            """,
            {"gone": gone},
        )
        removed = self.db.execute(
            "DELETE FROM processed_events WHERE seq IN (SELECT value FROM json_each(:gone))",
            {"gone": gone},
        ).rowcount
        self.db.execute(
            "UPDATE stats SET removed = removed + :removed WHERE kind = 'total'",
            {"removed": removed},
        )
        return removed

    # ---- Erasing by request ----
    #
    # Somebody sent a password. Its event leaves the log as with retention, and its text
    # leaves the file: `secure_delete` writes zeros over it, and then the WAL is written
    # back and cut to nothing. What stays is the tombstone (digests and times), and the
    # names of topic and source in the books.
    #
    # One gap: where SQLite rebuilds a page, it may leave the old bytes in the part of
    # the page that is unused. In a store that lived under retention, 2 of 5,000 events
    # had such a copy. A copy made by `copy_store` has none.

    def erase_event(
        self, topic: str, event_id: str, through_seq: Optional[int] = None
    ) -> Optional[int]:
        """Erase one event and keep its tombstone.

        Returns how many events that were, 0 if it had gone before, or None if this
        identity was never seen, or not up to `through_seq`. Raises StoreFailed.
        """
        seq = self.locate(topic, event_id)
        if seq is None or (through_seq is not None and seq > through_seq):
            return None
        return self.erase([seq])

    def begin_erasing(
        self,
        topic: str,
        prefix: bool,
        until_us: Optional[int],
        through_seq: Optional[int] = None,
    ) -> "Erasure":
        """Plan to erase events of a topic, or of all topics that begin so.

        `until_us` spares events of that instant and later, `through_seq` those of a
        higher seq. Events that are stored after this call are spared, too, or a busy
        topic would keep the work from ending. Raises StoreFailed.
        """
        # The listing knows the events of a topic, so it has to be complete.
        self.complete_sorted_tables()
        last = last_topic_of(topic) if prefix else topic
        if through_seq is None or through_seq > self.last_seq:
            through_seq = self.last_seq
        return Erasure(topic, last, until_us, through_seq)

    def go_on_erasing(self, erasure: "Erasure") -> "Erasure":
        """Erase some events, the oldest of the next topics; how far it has come.

        To be called until `is_done`. Each call is one short transaction, so commits get
        in between. Raises StoreFailed.
        """
        seqs: List[int] = []
        topic: Optional[str] = erasure.next_topic
        with snapshot(self.db):
            for _ in range(TRIM_TOPICS):
                topic = self._listed_topic(erasure._replace(next_topic=topic))
                room = self._settings.trim_rows - len(seqs)
                if topic is None or not room:
                    break
                found = self._seqs_to_erase(erasure, topic, room)
                seqs += found
                if len(found) < room:
                    # Done with this topic: go on after it. Nothing sorts between a
                    # topic and the same topic with a NUL at its end.
                    topic += "\0"
            fitting = self._within_bytes(seqs)
        if len(fitting) < len(seqs):
            # Begin there again: what is erased now is not listed any more.
            topic = erasure.next_topic
        erased = erasure.events + self.erase(fitting)
        return erasure._replace(next_topic=topic, events=erased)

    def _listed_topic(self, erasure: "Erasure") -> Optional[str]:
        """The next topic that has events in the listing; None if there is none."""
        topic: Optional[str] = query_value(
            self.db,
            "SELECT min(topic) FROM listing WHERE topic BETWEEN :next_topic AND :last_topic",
            erasure._asdict(),
        )
        return topic

    def _seqs_to_erase(self, erasure: "Erasure", topic: str, at_most: int) -> List[int]:
        """The oldest events of one topic that the erasure is about."""
        seqs: List[int] = json.loads(
            query_value(
                self.db,
                """
                SELECT json_group_array(seq)
                FROM (
                    SELECT seq
                    FROM listing
                    WHERE topic = :topic
                      AND timestamp < ifnull(:until_us, 9223372036854775807)
                      AND seq <= :through_seq
                    ORDER BY timestamp, seq
                    LIMIT :at_most
                )
                """,
                {**erasure._asdict(), "topic": topic, "at_most": at_most},
            )
        )
        return seqs

    def erase(self, seqs: Sequence[int]) -> int:
        """Remove events and write zeros over them; how many. Raises StoreFailed."""
        if not seqs:
            return 0
        with self._transaction():
            removed = self._remove(seqs)
        if removed:
            self.scrub_is_due = True
        return removed

    def scrub(self) -> None:
        """Write the WAL back and cut it to nothing, so no erased text is left in it.

        A reader in the middle of an answer holds it up: the WAL cannot be cut while a
        reader may still need it. After 100 ms it gives up, and `scrub_is_due` stays
        True. So short, because commits wait for this call.
        """
        self.db.execute("PRAGMA busy_timeout=100")
        try:
            busy, _, _ = self.db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            self.scrub_is_due = bool(busy)
        except sqlite3.Error as error:
            raise StoreFailed(f"the WAL cannot be written back: {error}")
        finally:
            timeout_ms = int(self._settings.lock_timeout_s * 1000)
            self.db.execute(f"PRAGMA busy_timeout={timeout_ms}")

    # ---- Is the file still there, and can it be written? ----

    def probe(self, size: int, now_us: int) -> None:
        """Prove that the store can be written. Raises StoreFailed.

        It does what a commit of `size` bytes does: it touches the same tables, needs as
        much room, and keeps house. A change that changes nothing would not be written,
        so rows go in and out again, and the room is given back by a second transaction.
        """
        now = Moment(now_us, self._monotonic_us())
        with self._transaction():
            for statement in PROBES:
                self.db.execute(statement)
            self.db.execute(
                "INSERT OR REPLACE INTO progress VALUES('probe', zeroblob(:size))", {"size": size}
            )
            self._keep_house(now, new_events=1)
        with self._transaction():
            self.db.execute("DELETE FROM progress WHERE part = 'probe'")

    def complete_sorted_tables(self) -> None:
        """Feed the sorted tables with all that waits for it. Raises StoreFailed.

        A store may take events and be unable to do this. Then it takes them only until
        `list_rows` of them wait.
        """
        with self._transaction():
            self._feed_sorted_tables(at_least=1)

    def rehearse(self, records: Sequence[Record], now_us: int) -> None:
        """Prove that a group could be stored, and store nothing. Raises StoreFailed.

        It does what the commit of the group does, and rolls it back. So it fails where
        the commit would, say at a page that cannot be read: `probe` would never look at
        the pages of these keys and topics. COMMIT itself is left to `probe`.
        """
        now = Moment(now_us, self._monotonic_us())
        with contextlib.suppress(_Rehearsed), self._transaction():
            self._store_group(records, now)
            # The topics of the group have their places in the listing.
            self._feed_sorted_tables(at_least=1)
            raise _Rehearsed

    def _check_files(self) -> None:
        """Raise StoreFailed if a file of the store was deleted, moved or replaced.

        SQLite would go on writing to a file that has no name any more, and each 202
        would be a lie. Or a second process could own what stands there now.
        """
        for file in self._files:
            if not file.is_in_place():
                raise StoreFailed(
                    f"{file.path} was deleted, moved, replaced or linked while in use: put the"
                    " same file back under its one name, or restart"
                )

    def checkpoint_note(self) -> str:
        """Why the WAL grows, or "" if it does not. To be called between commits.

        A commit writes the WAL back to the file now and then, and SQLite tells nobody
        when that fails. So when the WAL has grown, it is tried once more, to learn why.
        Raises StoreFailed if the file cannot be written, and OSError if the WAL is
        gone.

        The WAL's file keeps its size when it begins anew. So after a success it is left
        alone until it has grown beyond that size.
        """
        wal_bytes = os.stat(self.path + "-wal").st_size
        least = WAL_LOOK_CHECKPOINTS * self._settings.checkpoint_pages * WAL_FRAME_BYTES
        self._wal_written_bytes = max(least, min(self._wal_written_bytes, wal_bytes))
        if wal_bytes <= self._wal_written_bytes:
            return ""
        size = f"{self.path}-wal has {wal_bytes >> 20} MB"
        try:
            # Busy if another program is at this very work; the two others are -1 then.
            busy, frames, written = self.db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
        except sqlite3.Error as error:
            raise StoreFailed(f"{size} and cannot be written back to the file: {error}")
        if not busy and written == frames:
            self._wal_written_bytes = wal_bytes
        elif wal_bytes > self._settings.wal_warn_bytes:
            return f"{size}: end the program that is reading the store"
        return ""

    def close(self) -> None:
        """Write the WAL back to the file and give up ownership.

        The store stays whole if this never runs.
        """
        for file in self._files:
            file.close()
        with contextlib.closing(self._owner):
            self.db.close()


class _Rehearsed(Exception):
    """A group could be stored. It ends a transaction that is to be rolled back."""


class Erasure(NamedTuple):
    """Which events of some topics to erase, and how far that has come."""

    # The first that may have more; None at the end.
    next_topic: Optional[str]
    last_topic: str
    # Only timestamps before it, in microseconds since 1970.
    until_us: Optional[int]
    through_seq: int  # only what was stored by then
    events: int = 0  # erased so far

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to erase."""
        return self.next_topic is None


def keys_learned(decision: Decision) -> Dict[bytes, Known]:
    """What the index knows of a decision's new records once it has learned them."""
    learned: Dict[bytes, Known] = {}
    for seq, record in enumerate(decision.fresh, decision.first_seq):
        learned[record.key] = Known(seq, record.fingerprint, decision.arrived_us, "recent")
    return learned


def last_topic_of(prefix: str) -> str:
    """A text after which no topic that begins with `prefix` sorts.

    It is the prefix, and then the last character of Unicode more often than a name can
    hold. With it, "begins with" becomes a range that a B-tree can search.
    """
    return prefix + chr(0x10FFFF) * MAX_NAME_BYTES


# The columns of the log that a commit writes: two that the store knows, then those that
# a record brings. Its fields have the names of the columns, so the order of the fields
# here and in `_append` is the same by construction.
_LOG_COLUMNS = ", ".join(("seq", "processed_at") + Record._fields)
_LOG_WIDTH = 2 + len(Record._fields)

# What the probe writes to each table, and takes away again.
PROBES = (
    "INSERT INTO processed_events VALUES(0, x'', 0, 0, '', '', 0, '', '', 0)",
    "DELETE FROM processed_events WHERE seq = 0",
    "INSERT INTO seen VALUES(x'', 0, 0, 0)",
    "DELETE FROM seen WHERE key = x''",
    "INSERT INTO archive VALUES(x'', 0, 0, 0)",
    "DELETE FROM archive WHERE key = x''",
    "INSERT INTO listing VALUES('', 0, 0)",
    "DELETE FROM listing WHERE topic = ''",
    "INSERT INTO by_time VALUES(0, 0)",
    "DELETE FROM by_time WHERE timestamp = 0 AND seq = 0",
    "INSERT INTO progress VALUES('', 0)",
    "DELETE FROM progress WHERE part = ''",
    "INSERT INTO stats VALUES('', '', 0, 0, 0, 0)",
    "DELETE FROM stats WHERE kind = ''",
)


class Books:
    """What one group adds to the counters.

    A conflict is a duplicate as well, and is counted as both. Only the total tells
    conflicts apart. The delay of a repeat is the time since the arrival of the first.

    >>> record = record_of(Event("door", "1", 0, "hall", "{}"))
    >>> decision = decide([record, record], {}, last_seq=0, now_us=0)
    >>> for row in Books([record, record], decision).rows():
    ...     print(row)
    ('total', '', 1, 1, 0, 0)
    ('topic', 'door', 1, 1, 0, 0)
    ('source', 'hall', 1, 1, 0, 0)
    ('delay', '1', 0, 1, 0, 0)
    """

    def __init__(self, records: Sequence[Record], decision: Decision) -> None:
        # Lists, because Counter counts the items of a list without running Python code.
        self.topics = Counter([record.topic for record in records])
        self._sources = Counter([record.source for record in records])
        self._topic_repeats: Counter[str] = Counter()
        self._source_repeats: Counter[str] = Counter()
        self._delays: Counter[str] = Counter()
        self._conflicts = 0
        for repeat in decision.repeats:
            record = records[repeat.index]
            self._topic_repeats[record.topic] += 1
            self._source_repeats[record.source] += 1
            delay_us = decision.arrived_us - repeat.first.first_seen
            self._delays[delay_bucket(delay_us)] += 1
            if repeat.kind == CONFLICT:
                self._conflicts += 1

    def rows(self) -> List[Tuple[str, str, int, int, int, int]]:
        """Rows for `stats`: kind, name, uniques, duplicates, conflicts, removed."""
        received = sum(self.topics.values())
        repeats = sum(self._topic_repeats.values())
        rows = [("total", "", received - repeats, repeats, self._conflicts, 0)]
        for name, count in self.topics.items():
            again = self._topic_repeats[name]
            rows.append(("topic", name, count - again, again, 0, 0))
        for name, count in self._sources.items():
            again = self._source_repeats[name]
            rows.append(("source", name, count - again, again, 0, 0))
        for bucket, count in self._delays.items():
            rows.append(("delay", bucket, 0, count, 0, 0))
        return rows


def delay_bucket(delay_us: int) -> str:
    """The bucket of a delay: the least bound in seconds that it does not pass.

    >>> delay_bucket(1_000_000), delay_bucket(1_000_001), delay_bucket(10**15)
    ('1', '10', 'inf')
    """
    for bound in DELAY_BOUNDS_S:
        if delay_us <= bound * 1_000_000:
            return str(bound)
    return "inf"


def gaps_for_each(sources: int, settings: StoreSettings) -> int:
    """How many gaps are kept for each of so many sources.

    The more sources count, the fewer: a request that names them all has to read all
    their gaps. Ten for each, however many there are: fewer would not show where a
    source loses events.

    >>> [gaps_for_each(sources, StoreSettings()) for sources in (1, 10_000, 1_000_000)]
    [500, 10, 10]
    """
    fair_share = settings.gaps_in_all // max(1, sources)
    return min(settings.gaps_kept, max(10, fair_share))


class SequenceAccount(NamedTuple):
    """Which numbers of one source's own counter have come, and which have not.

    A producer that counts its events lets everyone see when one was lost before it got
    here. Numbers may come in any order and more than once: a gap is closed when its
    number comes late.

    Every number up to `newest`, from the first one heard of, has come, is in `missing`,
    or is counted in `given_up`.
    """

    newest: int
    # How many numbers were missing when their range was given up, to save room. Nobody
    # will learn whether they came late.
    given_up: int = 0
    missing: Sequence[Sequence[int]] = ()  # ranges [first, last], ascending

    def missing_count(self) -> int:
        """How many numbers are missing."""
        return sum(last - first + 1 for first, last in self.missing)

    def after(self, arrived: Sequence[int], gaps_kept: int) -> "SequenceAccount":
        """The account once the `arrived` numbers, ascending, have come.

        >>> account = SequenceAccount(newest=5).after([6, 9], gaps_kept=10)
        >>> account.newest, account.missing
        (9, [[7, 8]])
        >>> account.after([8], gaps_kept=10).missing
        [[7, 7]]

        At most `gaps_kept` ranges are kept; the lowest, [7, 8], is given up here:

        >>> account.after([11], gaps_kept=1)
        SequenceAccount(newest=11, given_up=2, missing=[[10, 10]])
        """
        newest = self.newest
        missing = [list(span) for span in self.missing]
        for number in arrived:
            if number > newest:
                if number > newest + 1:
                    missing.append([newest + 1, number - 1])
                newest = number
            else:
                fill_gap(missing, number)
        # All but the last `gaps_kept` ranges.
        lost = missing[:-gaps_kept]
        given_up = self.given_up + SequenceAccount(newest, 0, lost).missing_count()
        return SequenceAccount(newest, given_up, missing[-gaps_kept:])


def fill_gap(missing: List[List[int]], number: int) -> None:
    """Take a number out of the ranges, in place. Nothing happens if it is in none.

    >>> missing = [[2, 2], [4, 8]]
    >>> fill_gap(missing, 2), fill_gap(missing, 6), missing
    (None, None, [[4, 5], [7, 8]])
    """
    # The last range that begins at or before the number. Lists compare by their first
    # items first. So [number, the highest there is] sorts after every range that begins
    # at `number`, and before every range that begins later.
    nearest = bisect.bisect_right(missing, [number, MAX_SEQUENCE]) - 1
    if nearest < 0:
        return
    first, last = missing[nearest]
    if number > last:
        return
    rest = []
    if first < number:
        rest.append([first, number - 1])
    if number < last:
        rest.append([number + 1, last])
    missing[nearest : nearest + 1] = rest


# ---- Checking a store at rest ----


class Check(NamedTuple):
    """What must hold in a store at rest, and a query that counts what contradicts it.

    The sentences are the invariants of the banners of §2 and §3. Together they say that
    the store is what its history of commits makes it.
    """

    sentence: str
    query: str


# Each query scans in the order of a table and sorts little, so memory stays bounded.
# A sort of all keys of a large store would need gigabytes, or a folder for temporary
# files.
CHECKS = (
    Check(
        "every event can be read back, and carries the key and the fingerprint of its content",
        """
        SELECT count(*)
        FROM processed_events
        WHERE NOT carries_its_digests(key, fingerprint, topic, event_id, source, payload)
           OR NOT json_valid(payload)
        """,
    ),
    # Only the end of the log is looked at. Below the marks, two events with one key
    # would share a tombstone, and a later check finds that.
    Check(
        "no identity is in the log twice",
        """
        SELECT count(*) - count(DISTINCT key)
        FROM processed_events
        WHERE seq > (SELECT min(through) FROM progress WHERE part <= 'FF')
        """,
    ),
    Check(
        "no id has two tombstones",
        "SELECT count(*) FROM seen CROSS JOIN archive ON archive.key = seen.key",
    ),
    # AUTOINCREMENT's table says which seq was the last to be given out. `count_repeats`
    # is the aggregate below; it has room for one bit for each seq.
    Check(
        "no two tombstones share a seq, and none has one that was not given out",
        """
        WITH newest AS (SELECT ifnull(max(seq), 0) AS seq FROM sqlite_sequence)
        SELECT (
            SELECT ifnull(count_repeats(seq), 0)
            FROM (SELECT seq FROM seen UNION ALL SELECT seq FROM archive)
            WHERE seq BETWEEN 1 AND (SELECT seq FROM newest)
        ) + (
            SELECT count(*)
            FROM (SELECT seq FROM seen UNION ALL SELECT seq FROM archive)
            WHERE seq NOT BETWEEN 1 AND (SELECT seq FROM newest)
        )
        """,
    ),
    # Two ways to be wrong: there is a tombstone of this key, with another seq; or there
    # is none, although the mark of its slice says that the key was moved.
    Check(
        "every event below its slice's mark has its tombstone, and none contradicts the log",
        """
        SELECT count(*)
        FROM processed_events AS e
        WHERE e.seq <> coalesce(
            (SELECT seq FROM archive WHERE key = e.key),
            (SELECT seq FROM seen WHERE key = e.key),
            -- Above the mark an event needs none.
            (
                SELECT e.seq
                WHERE e.seq > (
                    SELECT through
                    FROM progress
                    WHERE part <= hex(substr(e.key, 1, 1))
                    ORDER BY part DESC
                    LIMIT 1
                )
            ),
            0
        )
        """,
    ),
    # 257 marks: one for each of 256 slices, and that of the listing. From version 4 of
    # the schema on, the archive has one, too.
    Check(
        "all marks are there and none is ahead of the log",
        """
        SELECT abs(257 + (SELECT user_version >= 4 FROM pragma_user_version) - count(*))
            + total(through NOT BETWEEN 0 AND (SELECT ifnull(max(seq), 0) FROM sqlite_sequence))
        FROM progress
        WHERE part <> 'probe'
        """,
    ),
    # `n` counts the events below the mark that are found in both tables. If that is the
    # number of such events, and of all rows of each table, then the tables have all of
    # them and nothing else.
    Check(
        "the listings by topic and by time have every event below their mark, and no other",
        """
        WITH mark AS (
            SELECT through FROM progress WHERE part = 'listing'
        )
        SELECT abs(n - (SELECT count(*) FROM processed_events WHERE seq <= (SELECT * FROM mark)))
            + abs(n - (SELECT count(*) FROM listing))
            + abs(n - (SELECT count(*) FROM by_time))
        FROM (
            SELECT count(*) AS n
            FROM processed_events AS e
            CROSS JOIN listing AS l
                ON l.topic = e.topic AND l.timestamp = e.timestamp AND l.seq = e.seq
            CROSS JOIN by_time AS t ON t.timestamp = e.timestamp AND t.seq = e.seq
            WHERE e.seq <= (SELECT * FROM mark)
        )
        """,
    ),
    # A new event gets the next seq, so the last seq given out is the number of all new
    # events ever. Without a row of totals the sum is NULL, which is wrong, too.
    Check(
        "the books balance: there are as many unique events as seqs given out; without those"
        " removed, there are as many as in the log",
        """
        SELECT ifnull(sum(
            abs(uniques - (SELECT ifnull(max(seq), 0) FROM sqlite_sequence))
            + abs(uniques - removed - (SELECT count(*) FROM processed_events))
        ), 1)
        FROM stats
        WHERE kind = 'total'
        """,
    ),
    # Topics count what was removed; sources and delays do not. Delays count duplicates
    # only, and a store without duplicates has no such row.
    Check(
        "the books balance: topics, sources and delays add up to the totals",
        """
        WITH sums AS (
            SELECT kind, total(uniques) AS u, total(duplicates) AS d, total(removed) AS r
            FROM stats
            GROUP BY kind
        )
        SELECT total(abs(t.u - topics.u) + abs(t.d - topics.d) + abs(t.r - topics.r)
            + abs(t.u - sources.u) + abs(t.d - sources.d) + abs(t.d - ifnull(delays.d, 0)))
        FROM sums AS t
        LEFT JOIN sums AS topics ON topics.kind = 'topic'
        LEFT JOIN sums AS sources ON sources.kind = 'source'
        LEFT JOIN sums AS delays ON delays.kind = 'delay'
        WHERE t.kind = 'total'
        """,
    ),
    Check(
        "the books balance: every topic counts what it holds",
        """
        WITH held AS (
            -- The listing is in the order of topics, so nothing has to be sorted.
            SELECT topic, count(*) AS n FROM listing GROUP BY topic
            UNION ALL
            SELECT topic, count(*)
            FROM processed_events
            WHERE seq > (SELECT through FROM progress WHERE part = 'listing')
            GROUP BY topic
        ),
        sums AS (
            SELECT topic, sum(n) AS n FROM held GROUP BY topic
        )
        SELECT count(*)
        FROM stats
        LEFT JOIN sums ON sums.topic = stats.name
        WHERE kind = 'topic' AND uniques - removed <> ifnull(n, 0)
        """,
    ),
    Check(
        "every source's missing sequence numbers are counted",
        """
        SELECT count(*)
        FROM sequences
        WHERE missing <> (
            SELECT ifnull(sum(json_extract(value, '$[1]') + 1 - json_extract(value, '$[0]')), 0)
            FROM json_each(ranges)
        )
        """,
    ),
)


def _carries_its_digests(
    key: bytes, content: int, topic: str, event_id: str, source: str, payload: str
) -> bool:
    """Whether a row of the log has the key and the fingerprint of what it holds.

    The SQL of a check calls it: one call for a row, because each call costs.
    """
    return key == identity(topic, event_id) and content == fingerprint(source, payload)


class _RepeatCounter:
    """An SQL aggregate: how many numbers were there before. One bit for each number.

    SQLite's `count(DISTINCT …)` keeps a B-tree of all numbers, ten times as large and
    slower.
    """

    def __init__(self) -> None:
        self._bits = bytearray()
        self._repeats = 0

    def step(self, number: int) -> None:
        """Take one number. SQLite calls it for each row."""
        byte, bit = divmod(number, 8)
        if byte >= len(self._bits):
            # A kilobyte more than needed, so that it does not grow with each number.
            self._bits.extend(bytes(byte + 1024 - len(self._bits)))
        if self._bits[byte] >> bit & 1:
            self._repeats += 1
        self._bits[byte] |= 1 << bit

    def finalize(self) -> int:
        """The result. SQLite calls it after the last row."""
        return self._repeats


def check_store(path: str) -> Iterator[Tuple[bool, str]]:
    """Verify the store of a stopped service: one (holds, sentence) after the other.

    It is a generator, so that each sentence is shown when it is known: on a large store
    the whole takes long. The service has to be stopped, because each query would see
    another state while somebody writes.

    Raises StoreError if it cannot be opened, or if a service is running on it.
    """
    path = os.path.realpath(path)
    if not check_header(path):
        raise StoreError(f"there is no store at {path}")
    refuse_other_names(path)
    with contextlib.closing(lock_store(path)):
        try:
            with contextlib.closing(connect(path)) as db:
                yield from _check_open_store(db)
        except sqlite3.Error as error:
            yield False, f"SQLite can read the file: NOT: {error}"


def _check_open_store(db: sqlite3.Connection) -> Iterator[Tuple[bool, str]]:
    """The sentences about a store, from a connection that then cannot write any more.

    SQLite's own check comes first: the others trust its B-trees.
    """
    if query_value(db, "PRAGMA user_version") < 4:
        # It has no archive yet, and shall not get one from a check.
        db.execute("CREATE TEMP TABLE archive" + KEYS_TABLE)
    db.execute("PRAGMA query_only=1")
    # Read the file as memory, up to 128 MB of it: that saves a copy of each page.
    db.execute("PRAGMA mmap_size=134217728")
    db.create_function("carries_its_digests", 6, _carries_its_digests)
    db.create_aggregate("count_repeats", 1, _RepeatCounter)
    damage = "; ".join(text for (text,) in db.execute("PRAGMA integrity_check(5)"))
    if damage == "ok":
        yield True, "SQLite finds the file intact"
    else:
        yield False, "SQLite finds the file intact: NOT: " + damage
    for check in CHECKS:
        against = query_value(db, check.query)
        if against:
            yield False, f"{check.sentence}: NOT: {against:,.0f} contradict it"
        else:
            yield True, check.sentence
    events = query_value(db, "SELECT count(*) FROM processed_events")
    topics = query_value(db, "SELECT count(*) FROM stats WHERE kind = 'topic'")
    tombstones = query_value(
        db, "SELECT (SELECT count(*) FROM seen) + (SELECT count(*) FROM archive)"
    )
    yield True, f"{events:,} events of {topics:,} topics, {tombstones:,} tombstones"


# ---- A copy of a store ----


class StoreCopy(NamedTuple):
    """What a copy holds, as counted in the copy itself."""

    size: int  # bytes
    events: int
    # The last that was given out; 0 if there was none.
    newest_seq: int


def copy_store(path: str, target: str) -> StoreCopy:
    """Copy a store to a new file, whether or not a service runs on it.

    `VACUUM INTO` reads one snapshot, so the copy is the store at one moment. Commits go
    on meanwhile, into the WAL. The copy is compact: free pages, and what they may still
    hold of erased text, are left out. It is checked as `check_store` does.

    Nobody ever sees half a copy: it is written under another name, brought to the disk,
    and renamed. Raises StoreError; then there is no copy.
    """
    path = os.path.realpath(path)
    target = os.path.realpath(target)
    part = target + ".part"
    if not check_header(path):
        raise StoreError(f"there is no store at {path}")
    refuse_other_names(path)
    _refuse_existing(target, "a backup never replaces a file: choose another name, or remove it")
    _refuse_existing(part, "a backup to this name is running, or was interrupted: then remove it")
    try:
        make_file(part, like=path)
    except OSError as error:
        raise StoreError(f"cannot write {part}: {error.strerror}")
    try:
        with contextlib.closing(connect(path)) as db:
            # Called now and then, so that Python hears a signal in the middle of it.
            db.set_progress_handler(lambda: 0, 100_000)
            # Bytes, because a name need not be UTF-8, and Python cannot bind such a
            # text.
            db.execute("VACUUM INTO CAST(:part AS TEXT)", {"part": os.fsencode(part)})
        copied = _check_copy(part)
        sync_file(part)
        os.rename(part, target)
        sync_folder(os.path.dirname(target))
    except (sqlite3.Error, OSError) as error:
        raise StoreError(f"cannot copy {path} to {target}: {error}")
    finally:
        with contextlib.suppress(OSError):
            os.unlink(part)
    return copied


def _refuse_existing(path: str, advice: str) -> None:
    """Refuse to write where something is, also a broken link. Raises StoreError."""
    if os.path.lexists(path):
        raise StoreError(f"{path} exists: {advice}")


def _check_copy(path: str) -> StoreCopy:
    """What the copy holds. Raises StoreError if something in it is wrong."""
    with contextlib.closing(connect(path)) as db:
        for holds, sentence in _check_open_store(db):
            if not holds:
                raise StoreError(f"the copy is not sound, and was thrown away: {sentence}")
        events = query_value(db, "SELECT count(*) FROM processed_events")
        newest_seq = query_value(db, "SELECT ifnull(max(seq), 0) FROM sqlite_sequence")
    return StoreCopy(os.path.getsize(path), events, newest_seq)


def sync_file(path: str) -> None:
    """Have the content of a file on the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ============================================================================
# §4  Reading: pages, tails, single events, and the books
#
# A reader has a connection of its own. In SQLite's WAL mode it sees the state of one
# commit, and neither waits for the writer nor makes it wait. Each answer is one
# snapshot. A long snapshot is not free, though: as long as it is open, the WAL cannot
# be written back beyond it, so it grows (§3). Therefore every answer is bounded.
#
# A page continues by its last (timestamp, seq), not by an offset. An offset would
# count from the start at every page, and would skip or repeat events when others come
# in between (this is called keyset pagination).
#
# Where events are found. In two places: the sorted tables (`listing`, `by_time`) hold
# the place of every event up to their mark, and the end of the log holds the few
# thousand since then. Pages and counts look in both. The sorted tables only hold
# places; the event itself is read from the log, by its seq.
#
# Answers are JSON texts made by SQL: the payload is JSON already and goes in as it is.
# All events of a page come back as one value, for the reason that §2 gives (the GIL
# convoy).
#
# Knows §1, §2 (`connect`, `query_value`) and §3 (its tables, `snapshot`). Must not know
# queues or HTTP.
#
#   * A page is ordered by (timestamp, seq). That order is total, so a cursor loses
#     nothing.
#   * A page looks at a bounded number of rows and holds a bounded number of bytes. It
#     may be short, even empty, and still have a next one.
#   * An event is found at once: what the listing lacks stands at the end of the log.
#
# Simpler than a production system: a filter without an index looks at the events one by
# one. A bounded scan with a cursor keeps that harmless.
# ============================================================================

# Events of a page if nobody says how many.
PAGE_DEFAULT = 100
# Payload bytes of one page. A page that reaches it ends early, with a cursor, so an
# answer takes a bounded part of the memory however large the events are.
PAGE_MAX_BYTES = 8 * 1024 * 1024
# Rows that a filter without an index looks at for one page; about 50 ms. There is one
# thread for pages, so others wait as long.
PAGE_MAX_SCAN = 50_000
# The same for a filter that has to read payloads. Nobody knows how long they are: so it
# begins with fewer, and then reads as many as it can in the time below.
PAGE_MAX_PAYLOADS = 10_000
PAGE_FIRST_PAYLOADS = 1_000
SCAN_S = 0.05
# Counts of one answer: a week of minutes (7 · 24 · 60).
COUNTS_MAX = 10_080
# Ranges of the listing that are counted for one answer: each topic in each span is one.
# About 100 ms.
COUNTED_RANGES_MAX = 100_000
# Payloads whose size is asked for at a time. It bounds what is read in vain when they
# are large.
SIZES_AT_ONCE = 32
# Topics, and sources, listed by name in the books. There may be a million of them.
STATS_MAX_NAMES = 1000
# Characters of a payload up to which a text is searched among its values. In a longer
# one it is searched in the JSON text.
LONG_SEARCHED_PAYLOAD = 256 * 1024
# From the year 1 to 1970, in microseconds. It is added before SQL divides, because
# SQL's / and % round towards zero, and there are instants before 1970: -1 % 1000000 is
# -1 in SQL, and the fraction of the last microsecond of 1969 is .999999.
YEAR_1_US = 62_135_596_800_000_000
# Broker products that recognise repeats for a time only, in seconds, as their manuals
# say. The books tell how many repeats came later than that: what each would have stored
# twice.
DEDUP_WINDOWS = (
    (120, "NATS JetStream, default"),
    (300, "Amazon SQS FIFO"),
    (600, "Azure Service Bus, default"),
)


class EventQuery(NamedTuple):
    """Which events to list. A field that is None does not filter.

    It can be a key of a dictionary, so those who ask the same can share the answer.
    """

    topic: Optional[str] = None  # exact, unless `prefix`
    prefix: bool = False
    source: Optional[str] = None
    contains: Optional[str] = None  # text in the payload, by case
    since: Optional[int] = None  # microseconds since 1970 UTC, inclusive
    until: Optional[int] = None  # the same, exclusive
    limit: int = PAGE_DEFAULT
    # (timestamp, seq) of the last event seen.
    after: Optional[Tuple[int, int]] = None
    descending: bool = False


class Page(NamedTuple):
    """A page of events: their JSON texts, joined by the separator asked for.

    Whoever wants the rest asks again with `next` as `after`, until `next` is None. An
    empty page with a `next` is no end: a filter has looked at as many events as it may.
    """

    text: str
    size: int  # events
    # `after` for the next page; None at the end.
    next: Optional[Tuple[int, int]]


class Tail(NamedTuple):
    """What the log holds after a cursor, which is a seq.

    `through` is the next cursor. It moves on even where no event matches, so a filter
    that finds nothing does not read the same rows again.
    """

    seqs: List[int]  # of the events that match, in order
    # These events as JSON, joined by newlines.
    lines: str
    through: int  # the seq up to which the log was read
    newest: int  # the newest seq there is
    # The oldest still in the log; newest + 1 if there is none.
    oldest: int


class CountQuery(NamedTuple):
    """What to count. Instants and spans are in microseconds."""

    # Of each count: a minute, an hour, a day.
    span_us: int
    since: int  # inclusive
    until: int  # exclusive
    # Of local time from UTC: where a day begins.
    offset_us: int = 0
    topic: Optional[str] = None
    prefix: bool = False
    source: Optional[str] = None
    by_topic: bool = False

    def start_of(self, instant_us: int) -> int:
        """The start of the span that an instant is in.

        With an offset of two hours, a local day begins at 22:00 UTC of the day before:

        >>> day_us = 86_400_000_000
        >>> CountQuery(day_us, 0, 0, offset_us=7_200_000_000).start_of(day_us - 1)
        79200000000
        """
        return instant_us - (instant_us + self.offset_us) % self.span_us

    def starts(self) -> Sequence[int]:
        """The starts of all spans, in order. The first and the last may be cut.

        Minutes from 1:30 to 3:00 are those that begin at 1:00 and 2:00. In the first,
        only the events from 1:30 on are counted.

        >>> minute_us = 60_000_000
        >>> query = CountQuery(minute_us, since=90_000_000, until=3 * minute_us)
        >>> [start_us // minute_us for start_us in query.starts()]
        [1, 2]
        """
        return range(self.start_of(self.since), self.until, self.span_us)

    def label(self, topic: Optional[str]) -> Optional[str]:
        """The topic that a count is named after; None unless counted by topic."""
        if self.by_topic:
            return topic
        return None

    def wants(self, topic: str) -> bool:
        """Whether events of a topic are counted.

        >>> CountQuery(1, 0, 0, topic="door", prefix=True).wants("door/front")
        True
        """
        if self.topic is None:
            return True
        if self.prefix:
            return topic.startswith(self.topic)
        return topic == self.topic


class TooManyCounts(Exception):
    """An answer would hold, or take, too many counts. The message says what helps."""

    problem = "bad-parameter"


class EventCount(NamedTuple):
    """How many events there are from an instant on, for one span."""

    start_us: int
    topic: Optional[str]  # None unless counted by topic
    events: int


class ReadLimits(NamedTuple):
    """What one answer may cost. Tests make the limits small."""

    # Of a tail. A page of a list has the limit of its query.
    page_events: int = PAGE_MAX
    page_bytes: int = PAGE_MAX_BYTES  # of payloads
    scan_rows: int = PAGE_MAX_SCAN
    scan_payloads: int = PAGE_MAX_PAYLOADS


class Reader:
    """The read side of a store. Every method may raise StoreFailed.

    It cannot write: `query_only` makes SQLite refuse. And it sees no recent keys,
    because those are in the memory of the writer's connection. An object is used by one
    thread at a time; the pipeline (§5) has two of them, for pages and for sums.

    An example: three events, in pages of two. The first page ends with the cursor of
    its last event, (timestamp, seq). The second page is what comes after it.

    >>> import tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> store = Store(folder.name + "/toy.db")
    >>> events = [Event("door", str(n), 100 - n, "hall", "{}") for n in range(3)]
    >>> decision = store.commit([record_of(event) for event in events], now_us=0)
    >>> reader = Reader(store.path)
    >>> query = EventQuery(topic="door", limit=2)
    >>> page = reader.page(query)
    >>> page.size, page.next
    (2, (99, 2))
    >>> page = reader.page(query._replace(after=page.next))
    >>> json.loads(page.text)["event_id"], page.next
    ('0', None)
    >>> reader.close()
    >>> store.close()
    >>> folder.cleanup()
    """

    def __init__(self, path: str, limits: ReadLimits = ReadLimits()) -> None:
        self._path = path
        self._limits = limits
        self._db = connect(path)
        self._db.execute("PRAGMA query_only=1")
        self._db.create_function("holds_text", 2, holds_text)
        self._payloads_at_once = min(limits.scan_payloads, PAGE_FIRST_PAYLOADS)
        # Open all files now, whatever becomes of their names later.
        self._db.execute("SELECT 1 FROM stats")

    def close(self) -> None:
        """Release the connection."""
        self._db.close()

    def page(self, query: EventQuery, separator: str = ",") -> Page:
        """The events that `query` asks for, ordered by (timestamp, seq).

        Three steps, in one snapshot: find the places in the order, see how many of the
        events fit into a page, and only then read these.

        How it knows whether there is more. The places found are one more than the limit
        if there is one. Then, or if fewer fit, the cursor is the last event of the
        page. Else it is where the scan stopped, or None at the end.
        """
        with snapshot(self._db):
            with self._timed_scan(query):
                keys, scanned_to = self._page_keys(query)
            seqs = [key.seq for key in keys[: query.limit]]
            fitting = self._how_many_fit(seqs)
            text = self._events_as_json(seqs[:fitting], separator)
        if fitting < len(keys):
            last = keys[fitting - 1]
            return Page(text, fitting, (last.timestamp, last.seq))
        return Page(text, fitting, scanned_to)

    def _page_keys(self, query: EventQuery) -> Tuple[List["_PageKey"], Optional[Tuple[int, int]]]:
        """Where the events of a page stand: one more than the limit, if there is one.

        Also where a bounded scan stopped, if it did before the end.

        The SQL has two levels. Inside, `in_order` walks along a sorted table and the
        end of the log; LIMIT :scan bounds how far. Outside, each place is joined with
        its event and tested; LIMIT :most ends the walk when the page is full. SQLite
        makes the rows one at a time, so it stops as soon as it has enough.
        """
        where = _conditions_of_order(query)
        order = "timestamp DESC, seq DESC" if query.descending else "timestamp, seq"
        one_topic = query.topic is not None and not query.prefix
        # The sorted tables, and the end of the log that they do not have yet.
        # Both halves come sorted or are short, so SQLite merges them without reading
        # all.
        in_order = f"""
            SELECT timestamp, seq
            FROM {"listing" if one_topic else "by_time"}
            WHERE {where}
            UNION ALL
            SELECT timestamp, seq
            FROM processed_events
            WHERE {where} AND seq > (SELECT through FROM progress WHERE part = 'listing')
            ORDER BY {order}
        """
        values = _values_of(query)
        values["after_timestamp"], values["after_seq"] = query.after or (None, None)
        values["most"] = query.limit + 1
        values["scan"] = query.limit + 1
        # A topic alone is found by the listing. Everything else looks at the events.
        filtered = query._replace(topic=None if one_topic else query.topic)
        scans = _conditions_of_event(filtered) != "1"
        if scans:
            values["scan"] = self._scan_rows(query)
        found = query_value(
            self._db,
            f"""
            SELECT json_group_array(json_array(timestamp, seq))
            FROM (
                SELECT place.timestamp, place.seq
                FROM ({in_order} LIMIT :scan) AS place
                CROSS JOIN processed_events AS e ON e.seq = place.seq
                WHERE {_conditions_of_event(query)}
                LIMIT :most
            )
            """,
            values,
        )
        keys = [_PageKey(timestamp, seq) for timestamp, seq in json.loads(found)]
        scanned_to = None
        if scans and len(keys) <= query.limit:
            # The rows looked at hold no full page. The next page goes on after the last
            # of them, the row number `scan`. If there are fewer rows, that was the end.
            scanned_to = self._db.execute(
                f"SELECT timestamp, seq FROM ({in_order} LIMIT 1 OFFSET :scan - 1)", values
            ).fetchone()
        return keys, scanned_to

    def tail(self, query: EventQuery, after: int) -> Tail:
        """The events after seq `after` that match `query`, in the order of seq.

        A page of them at most, found among the next rows that a page may look at. Of
        the query, only topic, source and text count.
        """
        last = after + self._scan_rows(query)
        most = self._limits.page_events
        with snapshot(self._db), self._timed_scan(query):
            newest = query_value(self._db, "SELECT ifnull((SELECT seq FROM sqlite_sequence), 0)")
            oldest = query_value(self._db, "SELECT min(seq) FROM processed_events")
            values = {**_values_of(query), "after_seq": after, "last": last, "most": most}
            found = query_value(
                self._db,
                f"""
                SELECT json_group_array(seq)
                FROM (
                    SELECT seq
                    FROM processed_events AS e
                    WHERE seq > :after_seq AND seq <= :last AND {_conditions_of_event(query)}
                    ORDER BY seq
                    LIMIT :most
                )
                """,
                values,
            )
            matching = json.loads(found)
            seqs = matching[: self._how_many_fit(matching)]
            lines = self._events_as_json(seqs, "\n")
        # All rows up to `last` were looked at. Unless the page was full before: then
        # the next one goes on after its last event.
        through = min(newest, last)
        if len(seqs) < len(matching) or len(matching) == most:
            through = seqs[-1]
        if oldest is None:
            oldest = newest + 1
        return Tail(seqs, lines, through, newest, oldest)

    def _scan_rows(self, query: EventQuery) -> int:
        """How many events a filter may look at for one answer.

        Topic and source are short and stand at the beginning of a row. A payload may
        fill many pages, and all of them have to be read.
        """
        if query.contains is None:
            return self._limits.scan_rows
        # The payload has to be read, and it may be long.
        return self._payloads_at_once

    @contextlib.contextmanager
    def _timed_scan(self, query: EventQuery) -> Iterator[None]:
        """Fit the payloads of the next scan to the time that this one takes.

        If 1,000 payloads took 25 ms, the next scan may look at 2,000. Many long
        payloads make the number small, and short ones make it grow again.
        """
        began_s = time.monotonic()
        yield
        if query.contains is not None:
            took_s = time.monotonic() - began_s
            # At most ten times as many: a short time is mostly spent on other things
            # than reading, and says little.
            fitting = int(self._payloads_at_once * min(10.0, SCAN_S / max(took_s, 1e-9)))
            self._payloads_at_once = max(1, min(self._limits.scan_payloads, fitting))

    def _how_many_fit(self, seqs: Sequence[int]) -> int:
        """How many of these events make one page: as many as have room, at least one.

        It asks for a few sizes at a time and stops when the page is full: a thousand
        payloads of 4 MB are not read in order to return two of them.
        """
        fitting = 0
        left = self._limits.page_bytes
        for start in range(0, len(seqs), SIZES_AT_ONCE):
            # As BLOB, because the length of a TEXT is in characters.
            sizes = query_value(
                self._db,
                """
                SELECT json_group_array(length(CAST(e.payload AS BLOB)))
                FROM json_each(:seqs) AS wanted
                CROSS JOIN processed_events AS e ON e.seq = wanted.value
                """,
                {"seqs": json.dumps(seqs[start : start + SIZES_AT_ONCE])},
            )
            for size in json.loads(sizes):
                left -= size
                if left < 0 and fitting:
                    return fitting
                fitting += 1
        return fitting

    def _events_as_json(self, seqs: Sequence[int], separator: str) -> str:
        """These events as JSON texts, in one step for all.

        In the order of `seqs`. Events that are no longer in the log are left out.
        """
        text: str = query_value(
            self._db,
            f"""
            SELECT ifnull(group_concat(line, :separator), '')
            FROM (
                SELECT {EVENT_AS_JSON} AS line
                FROM json_each(:seqs) AS wanted
                CROSS JOIN processed_events AS e ON e.seq = wanted.value
            )
            """,
            {"separator": separator, "seqs": json.dumps(seqs)},
        )
        return text

    def event(self, seq: int) -> Optional[str]:
        """One event as JSON text, or None if it is not in the log.

        A seq is a rowid, so this is one look into one B-tree.
        """
        with snapshot(self._db):
            return self._events_as_json([seq], "") or None

    def counts(self, query: CountQuery) -> List[EventCount]:
        """How many events there are, by time and perhaps by topic, in this order.

        Spans without events are left out. It counts in the sorted tables, where the
        events of a span stand side by side, and looks at an event only if a source is
        asked for: then a million take about a second. Raises TooManyCounts, and does so
        before it counts.
        """
        spans = len(query.starts())
        if spans > COUNTS_MAX:
            raise TooManyCounts(
                f"that would be {spans:,} counts, and {COUNTS_MAX:,} are the most: choose a longer"
                " span with per=, or less time with since= and until="
            )
        with snapshot(self._db):
            found: Counter[Tuple[int, Optional[str]]] = Counter()
            self._count_listed(query, found)
            self._count_rest(query, found)
        counts = []
        for (start_us, topic), events in sorted(found.items()):
            counts.append(EventCount(start_us, topic, events))
        return counts

    def _count_listed(self, query: CountQuery, found: "Counter[Tuple[int, Optional[str]]]") -> None:
        """Count what the sorted tables hold.

        One query for each topic, or one for all. It asks for all spans at once: a
        nested SELECT counts the rows of a sorted table between two instants, which
        stand side by side.
        """
        topics: List[Optional[str]] = [None]
        order = "by_time"
        conditions = [
            "timestamp >= max(span.value, :since)",
            "timestamp < min(span.value + :span_us, :until)",
        ]
        if query.by_topic or query.topic is not None:
            topics = self._topics_to_count(query)
            order = "listing"
            conditions.append("topic = :topic")
        if query.source is not None:
            conditions.append(
                "(SELECT e.source FROM processed_events AS e WHERE e.seq = place.seq) = :source"
            )
        starts = list(query.starts())
        for topic in topics:
            counts = query_value(
                self._db,
                f"""
                SELECT json_group_array((
                    SELECT count(*) FROM {order} AS place WHERE {" AND ".join(conditions)}
                ))
                FROM json_each(:starts) AS span
                """,
                {**query._asdict(), "topic": topic, "starts": json.dumps(starts)},
            )
            for start_us, events in zip(starts, json.loads(counts)):
                if events:
                    found[start_us, query.label(topic)] += events

    def _topics_to_count(self, query: CountQuery) -> List[Optional[str]]:
        """The topics to count, each by itself. Raises TooManyCounts.

        Counted by topic, each topic in each span is a number of the answer. Else
        the numbers of all topics are added up, and more topics are allowed. It looks
        for one too many, and no further.
        """
        spans = max(1, len(query.starts()))
        most = COUNTED_RANGES_MAX // spans
        if query.by_topic:
            most = COUNTS_MAX // spans
        topics: List[Optional[str]] = list(itertools.islice(self._topics_like(query), most + 1))
        if len(topics) > most:
            raise TooManyCounts(
                f"there are more than {most:,} such topics, too many for {spans:,} spans: choose a"
                " longer span with per=, less time, or fewer topics with topic=name*"
            )
        return topics

    def _topics_like(self, query: CountQuery) -> Iterator[str]:
        """The topics to count, in order, each found by one look into the listing."""
        first = query.topic or ""
        last = first
        if query.prefix or query.topic is None:
            last = last_topic_of(first)
        topic: Optional[str] = query_value(
            self._db,
            "SELECT min(topic) FROM listing WHERE topic BETWEEN :first AND :last",
            {"first": first, "last": last},
        )
        while topic is not None:
            yield topic
            topic = query_value(
                self._db,
                "SELECT min(topic) FROM listing WHERE topic > :topic AND topic <= :last",
                {"topic": topic, "last": last},
            )

    def _count_rest(self, query: CountQuery, found: "Counter[Tuple[int, Optional[str]]]") -> None:
        """Count the end of the log, which the sorted tables do not have yet.

        These are a few thousand events at most, so they are counted in Python.
        """
        rest = query_value(
            self._db,
            """
            SELECT json_group_array(json_array(topic, timestamp))
            FROM processed_events
            WHERE seq > (SELECT through FROM progress WHERE part = 'listing')
              AND timestamp >= :since AND timestamp < :until
              AND source = ifnull(:source, source)
            """,
            query._asdict(),
        )
        for topic, timestamp in json.loads(rest):
            if query.wants(topic):
                found[query.start_of(timestamp), query.label(topic)] += 1

    def gaps(self, source: Optional[str], limit: int) -> List[Dict[str, Any]]:
        """The sources that left out sequence numbers, most missing first.

        The missing numbers come as ranges [first, last]: the last PAGE_DEFAULT ranges
        of each source. `given_up` counts those that no range lists any more (§3).
        """
        with snapshot(self._db):
            found = query_value(
                self._db,
                """
                SELECT json_group_array(json_object(
                    'source', source,
                    'newest', newest,
                    'missing_count', missing,
                    'given_up', given_up,
                    'missing', json(ranges)
                ))
                FROM (
                    SELECT *
                    FROM sequences
                    WHERE missing + given_up > 0 AND source = ifnull(:source, source)
                    ORDER BY missing DESC, source
                    LIMIT :limit
                )
                """,
                {"source": source, "limit": limit},
            )
            accounts: List[Dict[str, Any]] = json.loads(found)
        for account in accounts:
            account["missing"] = account["missing"][-PAGE_DEFAULT:]
        return accounts

    def stats(
        self, topics: int = STATS_MAX_NAMES, sources: int = STATS_MAX_NAMES
    ) -> Dict[str, Any]:
        """The books, from one snapshot.

        Totals; so many topics, those with most events; so many sources, those with most
        duplicates; duplicates by delay; the size of the store in bytes.
        """
        values = {"topics": topics, "sources": sources}
        with snapshot(self._db):
            found = json.loads(query_value(self._db, BOOKS_AS_JSON, values))
        delays = found.pop("delays")
        counts: Dict[str, int] = {}
        for bound in DELAY_BOUNDS_S + (float("inf"),):
            counts[str(bound)] = delays.get(str(bound), 0)
        found["gaps"] = int(found["gaps"])
        found["duplicate_delay_seconds"] = counts
        found["windows"] = duplicates_beyond_windows(counts)
        found["store_bytes"] = self._store_bytes()
        return dict(found)

    def _store_bytes(self) -> int:
        """The size of the store's file and its WAL, in bytes. No file counts as 0."""
        total = 0
        for path in (self._path, self._path + "-wal"):
            with contextlib.suppress(OSError):
                total += os.path.getsize(path)
        return total


class _PageKey(NamedTuple):
    """The place of an event in the order of a page."""

    timestamp: int
    seq: int


def duplicates_beyond_windows(delays: Dict[str, int]) -> List[Dict[str, Any]]:
    """How many duplicates brokers with a dedup window would have stored twice.

    `delays` counts duplicates by the upper bound of their delay in seconds.

    >>> first, *_ = duplicates_beyond_windows({"120": 5, "300": 2, "inf": 1})
    >>> first["window_seconds"], first["would_have_stored_twice"]
    (120, 3)
    """
    windows = []
    for window_s, product in DEDUP_WINDOWS:
        late = 0
        for bound, count in delays.items():
            if float(bound) > window_s:
                late += count
        windows.append(
            {"window_seconds": window_s, "like": product, "would_have_stored_twice": late}
        )
    return windows


def holds_text(payload: str, text: str) -> bool:
    """Whether a name or a value somewhere in a payload has this text in it.

    A search in the JSON text itself would be wrong: there, a newline is the two
    characters \\ and n, and "nb" would be found in it. So the values are compared as
    they are meant. SQL calls this for each payload that passed its first test.

    >>> holds_text('{"path":["C:\\\\\\\\new",1.50]}', "C:\\\\new")
    True
    >>> holds_text('{"path":"a\\\\nb"}', "nb")
    False
    """
    if len(payload) > LONG_SEARCHED_PAYLOAD:
        # To decode it would hold up the event loop. The first test has to do.
        return True
    # Numbers stay as they are spelled.
    values = [json.loads(payload, parse_int=str, parse_float=str)]
    while values:
        value = values.pop()
        if isinstance(value, dict):
            values.extend(value)
            values.extend(value.values())
        elif isinstance(value, list):
            values.extend(value)
        elif text in (value if isinstance(value, str) else json.dumps(value)):
            return True
    return False


def _conditions_of_order(query: EventQuery) -> str:
    """The SQL of what `query` asks of an event's place in the order.

    SQLite finds the first such place by searching the B-tree, and walks on from there.

    >>> _conditions_of_order(EventQuery(since=0, after=(5, 7), descending=True))
    '1 AND timestamp >= :since AND (timestamp, seq) < (:after_timestamp, :after_seq)'
    """
    conditions = ["1"]
    if query.topic is not None and not query.prefix:
        conditions.append("topic = :topic")
    if query.since is not None:
        conditions.append("timestamp >= :since")
    if query.until is not None:
        conditions.append("timestamp < :until")
    if query.after is not None:
        beyond = "<" if query.descending else ">"
        conditions.append(f"(timestamp, seq) {beyond} (:after_timestamp, :after_seq)")
    return " AND ".join(conditions)


def _values_of(query: EventQuery) -> Dict[str, Any]:
    """The parameters of the conditions of `query`."""
    values = query._asdict()
    if query.contains is not None:
        # A payload is JSON text, so what is looked for is spelled as JSON spells it.
        values["contains_json"] = canonical_json(query.contains)[1:-1]
    return values


def _conditions_of_event(query: EventQuery) -> str:
    """The SQL of what has to be looked up in the event itself.

    Only names of parameters stand in it, never a value: what a client sends is bound.
    """
    conditions = ["1"]
    if query.topic and query.prefix:
        # Not LIKE: it has wildcards, and it ignores case.
        conditions.append("substr(e.topic, 1, length(:topic)) = :topic")
    elif query.topic is not None and not query.prefix:
        conditions.append("e.topic = :topic")
    if query.source is not None:
        conditions.append("e.source = :source")
    if query.contains is not None:
        # The first test is fast, and the second is right: in "a\\nb" it finds no "nb".
        conditions.append("instr(e.payload, :contains_json) AND holds_text(e.payload, :contains)")
    return " AND ".join(conditions)


def _instant_as_text(column: str) -> str:
    """SQL that spells an instant as the contract does: `YYYY-MM-DDTHH:MM:SS.ffffffZ`.

    It counts from the year 1, see YEAR_1_US.
    """
    return f"""
        strftime(
            '%Y-%m-%dT%H:%M:%S',
            ({column} + {YEAR_1_US}) / 1000000 - {YEAR_1_US // 1_000_000},
            'unixepoch'
        ) || printf('.%06dZ', ({column} + {YEAR_1_US}) % 1000000)
    """


# One event `e` as JSON text, as GET /events gives it. SQLite quotes the names. The
# payload was checked and made canonical when it came in (§1), so it goes in as it is.
EVENT_AS_JSON = f"""
    '{{"seq":' || e.seq
    || ',"topic":' || json_quote(e.topic)
    || ',"event_id":' || json_quote(e.event_id)
    || ',"timestamp":"' || {_instant_as_text("e.timestamp")}
    || '","source":' || json_quote(e.source)
    || ',"payload":' || e.payload
    || ifnull(',"sequence":' || e.sequence, '')
    || ',"processed_at":"' || {_instant_as_text("e.processed_at")}
    || '"}}'
"""

# All that `stats` says, as one value. The lists are bounded: there may be a million
# topics.
BOOKS_AS_JSON = """
    SELECT json_object(
        'unique_processed', uniques,
        'duplicate_dropped', duplicates,
        'conflicts', conflicts,
        'stored', uniques - removed,
        'removed_by_retention', removed,
        'topics', (
            SELECT json_group_object(name, json_object(
                'unique', uniques, 'duplicates', duplicates, 'stored', uniques - removed
            ))
            FROM (
                SELECT * FROM stats WHERE kind = 'topic' ORDER BY uniques DESC, name LIMIT :topics
            )
        ),
        'topics_total', (SELECT count(*) FROM stats WHERE kind = 'topic'),
        'sources', (
            SELECT json_group_object(name, json_object(
                'unique', uniques, 'duplicates', duplicates
            ))
            FROM (
                SELECT * FROM stats WHERE kind = 'source'
                ORDER BY duplicates DESC, name
                LIMIT :sources
            )
        ),
        'sources_total', (SELECT count(*) FROM stats WHERE kind = 'source'),
        -- total(), because sum() would overflow.
        'gaps', (SELECT total(missing) FROM sequences),
        'delays', (SELECT json_group_object(name, duplicates) FROM stats WHERE kind = 'delay')
    )
    FROM stats
    WHERE kind = 'total'
"""


# ============================================================================
# §5  The pipeline: a bounded queue, one consumer, group commit
#
# Publishers put batches into an asyncio queue. One consumer takes everything that waits
# and has it committed as one group, while the next group gathers (group commit). There
# is no timer: an idle service commits a lone event at once, and a busy one commits
# hundreds for the price of one fsync.
#
# Why groups. An fsync costs about as much for one event as for a thousand, and a
# second one cannot start before the first has ended. So the faster events come, the
# larger the groups become by themselves, and the less each event costs.
#
# The bound makes backpressure: a publisher that comes when the queue is full is told to
# come again, instead of filling the memory.
#
# The way of a batch. `publish` checks the bound, makes records of the events, puts them
# into the queue together with a future, and awaits the future. The consumer gathers a
# group, has `Store.commit` run in the writer's thread, and awaits the decision on the
# whole group. `shares_of` splits it among the batches. Each future gets its receipt,
# and `publish` goes on and returns it. If the commit raises, the exception comes out of
# the await in the consumer, which gives each future a StoreFailed: `publish` raises it.
# A publisher that does not wait (`wait=0` in a request) has no future.
#
# Threads: "writer" runs the calls of the Store. "reader" and "accountant" run those of
# two Readers: the one for pages and single events, the other for sums. Each runs one
# call at a time, in the order of asking. Everything else runs in the event loop, so
# between two `await`s nothing else can happen.
#
# Knows §1 to §4. Must not know HTTP: an error carries the name of its problem
# (`problem`), and §8 makes an answer of that.
#
#   * The bound is in events, and in bytes, counted from being taken until being
#     committed or refused.
#   * A batch is taken whole or not at all. A batch that can never fit is told so, or
#     its publisher would try for ever.
#   * Nothing ends the consumer but `stop`. If a commit fails, the publishers of its
#     group are told, and the consumer goes on.
#   * The books balance at every moment: received = unique + duplicates + queued.
#   * Health tells the truth: a failure that a commit met is cleared by a commit, or by
#     a probe that does as much. A commit under way for too long is a failure, too.
#
# Simpler than a production system: one queue for all publishers. A publisher with large
# batches delays the others by a group at most, and nothing weighs them against each
# other.
# ============================================================================

# Bytes of the bodies that the queued events came in, so that a few large events are
# bounded, too: eight of the largest bodies.
QUEUE_MAX_BYTES = 32 * 1024 * 1024
# Events of one commit. A longer transaction costs no less for each event, and whoever
# waits for it waits longer.
GROUP_MAX_EVENTS = 2000
# Below so many events, the consumer waits for some turns of the loop if the last
# group held several batches: handing work to a thread costs as much as storing ten
# events. A turn is one round of the event loop, in which every connection that has
# something to read is served.
GATHER_EVENTS = 100
GATHER_TURNS = 12
# How often retention looks for work besides the commits. `AgeLimit` needs the looks,
# too: between two of them it sees that a clock was set.
TIDY_INTERVAL_S = 1.0
# A health check writes if no commit has proved for so long that the store can be
# written. So checks every few seconds do not wear out an SD card.
HEALTH_PROBE_S = 60.0
# A commit, or another call of the store, that lasts longer is a failure: a disk hangs.
COMMIT_HANGS_S = 5.0
# Between two probes while commits fail. A probe is a few commits, and publishers wait
# for them, however many ask for the health of the service.
PROBE_PAUSE_S = 1.0
# The largest write that a probe repeats, in bytes.
PROBE_MAX_BYTES = 4 * 1024 * 1024
# Up to so many events in a group, each gets a line at INFO; larger groups get one line.
QUIET_GROUP_EVENTS = 5
# The last duplicates, kept in memory, for somebody who asks what they were.
DUPLICATES_KEPT = 500
# Bytes of the payload that are kept of a conflict, so that somebody can compare: all of
# them together stay below 1 MB.
CONFLICT_KEPT_BYTES = 2048
# How often the size of the store and the room on the disk are looked at, in seconds. A
# day of such looks is kept: 1,441.
DISK_LOOK_S = 60.0
HOUR_S = 3600.0
DAY_S = 86_400.0
# A warning comes when the disk is full in fewer days. It also comes when less room is
# left than both so many bytes and such a share: 256 MB are much on a router, and 5 %
# are much on a large disk.
DISK_WARN_DAYS = 7.0
DISK_WARN_BYTES = 256 * 1024 * 1024
DISK_WARN_SHARE = 0.05
# Whoever erases tries so often to empty the WAL while somebody reads, with pauses of
# so many seconds: about 3 s in all.
SCRUB_ATTEMPTS = 20
SCRUB_PAUSE_S = 0.05
# Upper bounds of the histograms of commits: by duration in seconds, and by events.
COMMIT_BOUNDS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
COMMIT_BOUNDS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000)


class QueueFull(Exception):
    """There is no room for the batch now; nothing of it was taken.

    The publisher comes again after a while. Then it sends the same ids, so it does not
    matter how often that happens. The bound holds for all publishers together.
    """

    problem = "queue-full"


class Stopping(Exception):
    """The service is shutting down and takes nothing more."""

    problem = "stopping"


class Verdict(NamedTuple):
    """What became of one event."""

    # NEW, DUPLICATE, or CONFLICT: the identity has another content.
    kind: str
    # Of the event that is stored under the identity.
    seq: int
    # Its arrival, in microseconds since 1970 UTC.
    first_seen: int
    # Where its key was found: "nowhere", "recent", "seen", "archive" or "batch".
    place: str


class Receipt(NamedTuple):
    """What became of a batch, and of the group that it was committed with.

    A publisher has it only when its events are on disk.

    The second of these two events was known as seq 3:

    >>> records = [record_of(Event("door", str(n), 0, "hall", "{}")) for n in range(2)]
    >>> known = Known(seq=3, fingerprint=0, first_seen=0, place="seen")
    >>> repeats = [Repeat(1, DUPLICATE, known)]
    >>> receipt = Receipt(records, 10, repeats, 0, group_events=2, commit_us=1)
    >>> [(verdict.kind, verdict.seq) for verdict in receipt.verdicts()]
    [('new', 10), ('duplicate', 3)]
    """

    records: List[Record]
    # Of the first new event; the others follow without a gap.
    first_seq: int
    repeats: List[Repeat]  # everything else is new
    # The arrival of the new events; microseconds since 1970 UTC.
    arrived_us: int
    # Events of the whole group, those of other batches among them.
    group_events: int
    # How long the commit took, in microseconds.
    commit_us: int

    @property
    def unique(self) -> int:
        """Events that are new."""
        return len(self.records) - len(self.repeats)

    @property
    def duplicates(self) -> int:
        """Events that are not new, conflicts among them."""
        return len(self.repeats)

    @property
    def conflicts(self) -> int:
        """Events whose identity belongs to another content."""
        count = 0
        for repeat in self.repeats:
            if repeat.kind == CONFLICT:
                count += 1
        return count

    def verdicts(self) -> Iterator[Verdict]:
        """A verdict for each event, in order."""
        repeats = {repeat.index: repeat for repeat in self.repeats}
        seq = self.first_seq
        for index in range(len(self.records)):
            repeat = repeats.get(index)
            if repeat is not None:
                yield verdict_of(repeat)
            else:
                yield Verdict(NEW, seq, self.arrived_us, "nowhere")
                seq += 1


def verdict_of(repeat: Repeat) -> Verdict:
    """The verdict on an event that is not new."""
    return Verdict(repeat.kind, repeat.first.seq, repeat.first.first_seen, repeat.first.place)


class Duplicate(NamedTuple):
    """An event that was not new, as it is remembered for GET /duplicates."""

    # Of its payload only the beginning of a conflict's, else "".
    record: Record
    verdict: Verdict
    arrived_us: int


def remembered(record: Record, kind: str) -> Record:
    """A record that is not new: of the payload stays the beginning of a conflict's.

    >>> record = record_of(Event("door", "1", 0, "hall", "é" * 2000))
    >>> len(remembered(record, CONFLICT).payload), remembered(record, DUPLICATE).payload
    (1024, '')
    """
    payload = ""
    if kind == CONFLICT:
        kept = record.payload.encode("utf-8")[:CONFLICT_KEPT_BYTES]
        payload = kept.decode("utf-8", "ignore")
    return record._replace(payload=payload)


class Share(NamedTuple):
    """What one batch has of the decision on its group."""

    first_seq: int
    # Indexes count from the start of the batch.
    repeats: List[Repeat]


def shares_of(decision: Decision, sizes: Sequence[int]) -> List[Share]:
    """Split the decision on a group among its batches, whose `sizes` are in events.

    The store knows nothing of batches: it gets the events of all of them in a row. New
    events have consecutive seqs through the whole group, so a batch's first seq follows
    from how many events before it were new. `repeats` of the decision are in the order
    of the group, so each batch takes its own from the front.

    Two batches, of 2 and 3 events. The third event of the group is known. That is the
    first of the second batch, so its index becomes 0:

    >>> known = Known(seq=3, fingerprint=0, first_seen=0, place="seen")
    >>> decision = Decision(10, [], [Repeat(2, DUPLICATE, known)], arrived_us=0)
    >>> first, second = shares_of(decision, sizes=[2, 3])
    >>> first.first_seq, second.first_seq
    (10, 12)
    >>> first.repeats, second.repeats[0].index
    ([], 0)
    """
    shares = []
    start = 0
    first_seq = decision.first_seq
    repeats = deque(decision.repeats)
    for size in sizes:
        own = []
        while repeats and repeats[0].index < start + size:
            repeat = repeats.popleft()
            own.append(repeat._replace(index=repeat.index - start))
        shares.append(Share(first_seq, own))
        # An event that is no repeat is new and has taken a seq.
        first_seq += size - len(own)
        start += size
    return shares


class Histogram:
    """Observations counted by upper bounds, and their sum.

    The bounds are inclusive and ascending. The last count is of what exceeds them all.
    It holds counts only, so it takes the same memory after a year.

    >>> sizes = Histogram((1, 10))
    >>> sizes.add(10)
    >>> sizes.add(11)
    >>> sizes.counts, sizes.sum
    ([0, 1, 1], 21.0)
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def add(self, value: float) -> None:
        """Count one observation."""
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.sum += value


class LastCommit(NamedTuple):
    """The last commit: its events, and how long it took with waiting for its turn."""

    events: int
    microseconds: int


class DiskUse(NamedTuple):
    """The size of a store, and of the disk that it is on, in bytes."""

    store: int
    free: Optional[int] = None  # None: this system does not tell
    total: Optional[int] = None


def disk_use(path: str) -> DiskUse:
    """What the system says of a file and its disk. Raises OSError."""
    size = os.path.getsize(path)
    # Windows has no statvfs.
    if not hasattr(os, "statvfs"):
        return DiskUse(size)
    disk = os.statvfs(path)
    # Blocks that only the superuser may fill do not count as free.
    return DiskUse(size, disk.f_bavail * disk.f_frsize, disk.f_blocks * disk.f_frsize)


class _DiskUseAt(NamedTuple):
    """The use of the disk at a time of the loop's clock, in seconds."""

    at_s: float
    use: DiskUse


class Growth:
    """How fast a store grows, and when the disk is full. Times are in seconds.

    A rate is told once half of its time has been seen. Otherwise the first minute of a
    service, in which the WAL is written back, would be taken for a whole day.

    In the example, the store grows by 1 MB in half an hour. That is half of the hour,
    so there is a rate for the hour: 48 MB a day. It is no half day, so there is none
    for the day. 1 GB is free, which lasts for 20.8 days.

    >>> growth = Growth()
    >>> growth.add(0.0, DiskUse(1_000_000, free=10**9, total=10**10))
    >>> growth.add(1800.0, DiskUse(2_000_000, free=10**9, total=10**10))
    >>> growth.bytes_per_day(HOUR_S), growth.bytes_per_day(DAY_S)
    (48000000, None)
    >>> growth.days_until_full()
    20.8
    """

    def __init__(self, look_s: float = DISK_LOOK_S) -> None:
        self._look_s = look_s
        self._seen: Deque[_DiskUseAt] = deque(maxlen=int(DAY_S / DISK_LOOK_S) + 1)

    def is_due(self, now_s: float) -> bool:
        """Whether it is time for another look."""
        return not self._seen or now_s - self._seen[-1].at_s >= self._look_s

    def add(self, now_s: float, use: DiskUse) -> None:
        """Note what was seen."""
        self._seen.append(_DiskUseAt(now_s, use))

    @property
    def disk_free_bytes(self) -> Optional[int]:
        """The room that is left; None while it is not known."""
        if not self._seen:
            return None
        return self._seen[-1].use.free

    def bytes_per_day(self, window_s: float) -> Optional[int]:
        """The growth over the last `window_s`; None if it is not known yet.

        It is negative when the store has become smaller.
        """
        if not self._seen:
            return None
        newest = self._seen[-1]
        # The oldest look inside the window. There is one: the newest is inside.
        oldest = next(seen for seen in self._seen if newest.at_s - seen.at_s <= window_s)
        passed_s = newest.at_s - oldest.at_s
        if passed_s < window_s / 2:
            return None
        return int((newest.use.store - oldest.use.store) * DAY_S / passed_s)

    def days_until_full(self) -> Optional[float]:
        """In how many days the disk is full at the growth of the last day; or None.

        Until that is known, the last hour stands for the day. None means: never, since
        the store does not grow; or neither is known; or the system does not tell what
        is free.
        """
        per_day = self.bytes_per_day(DAY_S)
        if per_day is None:
            per_day = self.bytes_per_day(HOUR_S)
        if self.disk_free_bytes is None or not per_day or per_day < 0:
            return None
        return round(self.disk_free_bytes / per_day, 1)

    def warning(self) -> str:
        """Why somebody should make room on the disk, or "" if nobody needs to."""
        days = self.days_until_full()
        if days is not None and days < DISK_WARN_DAYS:
            return f"at this growth the disk is full in {days} days"
        if not self._seen:
            return ""
        _, free, total = self._seen[-1].use
        if free is None or total is None:
            return ""
        if free < min(DISK_WARN_BYTES, total * DISK_WARN_SHARE):
            return f"the disk has only {free >> 20} MB left"
        return ""


class Trouble(NamedTuple):
    """Why events cannot be stored, and since when by the loop's clock, in seconds."""

    reason: str
    since_s: float


class PipelineLimits(NamedTuple):
    """What may wait, and how long."""

    queue_events: int = QUEUE_MAX_EVENTS
    queue_bytes: int = QUEUE_MAX_BYTES
    group_events: int = GROUP_MAX_EVENTS
    tidy_interval_s: float = TIDY_INTERVAL_S
    health_probe_s: float = HEALTH_PROBE_S
    probe_pause_s: float = PROBE_PAUSE_S
    commit_hangs_s: float = COMMIT_HANGS_S
    # For closing the store, once the queue is empty.
    close_s: float = 2.0


class _Batch(NamedTuple):
    """What one publisher sent in one request. It is committed whole, or not at all.

    `done` is how the consumer answers: with a receipt, or with an exception.
    """

    records: List[Record]
    size: int  # bytes of the body
    done: "Optional[asyncio.Future[Receipt]]"  # None: the publisher does not wait
    queued_s: float  # when it came, by the loop's clock


# What a call in another thread returns.
_Result = TypeVar("_Result")


class Pipeline:
    """Queue, consumer and read side of one store.

    Construct and use it inside one running event loop. `open_store` is called in the
    writer's thread, so no other thread ever touches the Store. `clock_us` gives
    microseconds since 1970 UTC.

    All variables belong to the event loop, but for `_call_began_s`, which the writer's
    thread sets and the loop reads. The three threads get arguments and give results, so
    there is no lock. Of the store, the loop reads what does not change, and
    `scrub_is_due`, which may be late by one call without harm.

    Three threads, each an executor with one worker and a queue of calls. The writer
    owns the Store. The reader answers for pages and single events, and is never asked
    for anything long. The accountant adds up books and counts, which may take a second,
    so nobody who reads a page waits for that.
    """

    def __init__(
        self,
        open_store: Callable[[], Store],
        clock_us: Callable[[], int],
        limits: PipelineLimits = PipelineLimits(),
        read_limits: ReadLimits = ReadLimits(),
    ) -> None:
        self.limits = limits
        self._open_store = open_store
        self._clock_us = clock_us
        self._read_limits = read_limits
        # Owner: the event loop. Publishers put without waiting, because they check the
        # bound first. The consumer waits in get(), and the next put wakes it.
        self._queue: asyncio.Queue[_Batch] = asyncio.Queue()
        # Events, and bytes of bodies, that are taken and neither committed nor refused.
        self._waiting_events = 0
        self._waiting_bytes = 0
        # Events ever taken, less those refused since: `received` of the books. It
        # begins with what the store had counted before.
        self._taken = 0
        self._stopping = False
        # What the last commit failed of; None once one succeeds. And what it held,
        # without the payloads, and how large it was, so that a probe can try as much.
        self._trouble: Optional[Trouble] = None
        self._failed_records: Sequence[Record] = ()
        self._failed_bytes = 0
        # The probe that is under way, or the last. All health checks share it. By the
        # loop's clock: when the next may begin while commits fail.
        self._probing: Optional[asyncio.Task[None]] = None
        self._next_probe_s = 0.0
        # Why the WAL cannot be written back; None while it can.
        self._wal_trouble: Optional[Trouble] = None
        # Whether the log has been told of it already: once for each time.
        self._wal_noted = False
        self._disk_noted = False
        # By the loop's clock: when a write last succeeded, and when the commit that is
        # under way began.
        self._proven_s = 0.0
        self._commit_began_s: Optional[float] = None
        # When the writer's thread began the call that it is at. Only that thread sets
        # it; None while it is at none.
        self._call_began_s: Optional[float] = None
        self.newest_seq = 0
        self.duplicates: Deque[Duplicate] = deque(maxlen=DUPLICATES_KEPT)
        self.last_commit = LastCommit(0, 0)
        self.failed_commits = 0
        self.growth = Growth()
        self.commit_events = Histogram(COMMIT_BOUNDS)
        self.commit_seconds = Histogram(COMMIT_BOUNDS_S)
        # Called after each commit, in the loop. The live tail (§7) is one of them.
        self.commit_listeners: List[Callable[[], None]] = []
        self._writer = concurrent.futures.ThreadPoolExecutor(1, "writer")
        self._reading = concurrent.futures.ThreadPoolExecutor(1, "reader")
        self._accounting = concurrent.futures.ThreadPoolExecutor(1, "accountant")
        self._tasks: List[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Open the store and start the consumer. Raises StoreError.

        It tries a write before it says that all is well. Nothing is taken before the
        number of events that the store has counted is known: the books balance from the
        first request on.
        """
        self._loop = asyncio.get_running_loop()
        self._store = await self._ask_writer(self._open_store)
        # A file that opened for reading only looks fine until the first write.
        try:
            await self._ask_writer(self._store.probe, 0, self._clock_us())
        except StoreFailed as error:
            await self._ask_writer(self._store.close)
            raise StoreError(f"{self._store.path} cannot be written: {error}")
        self._reader = await self._ask_reader(Reader, self._store.path, self._read_limits)
        self._accountant = await self._ask_accountant(Reader, self._store.path, self._read_limits)
        self._taken = await self._ask_writer(self._store.received)
        self.newest_seq = self._store.last_seq
        self._proven_s = self._loop.time()
        consumer = self._loop.create_task(self._consume())
        self._tasks = [consumer, self._loop.create_task(self._tidy())]

    def _ask_writer(
        self, call: Callable[..., _Result], *arguments: Any
    ) -> "asyncio.Future[_Result]":
        """Run a call in the writer's thread, after those that were asked before.

        The future gets the result of the call or its exception, in the event loop.
        """
        return self._loop.run_in_executor(self._writer, self._call_store, call, *arguments)

    def _call_store(self, call: Callable[..., _Result], *arguments: Any) -> _Result:
        """Run a call, in the writer's thread, and note when it began.

        A disk may hang in any of them: `trouble` looks how long it has been.
        """
        self._call_began_s = self._loop.time()
        try:
            return call(*arguments)
        finally:
            self._call_began_s = None

    def _ask_reader(
        self, call: Callable[..., _Result], *arguments: Any
    ) -> "asyncio.Future[_Result]":
        """Run a call in the reader's thread, after those that were asked before."""
        return self._loop.run_in_executor(self._reading, call, *arguments)

    def _ask_accountant(
        self, call: Callable[..., _Result], *arguments: Any
    ) -> "asyncio.Future[_Result]":
        """The same in the accountant's thread, which reads the books."""
        return self._loop.run_in_executor(self._accounting, call, *arguments)

    # ---- Publishing ----

    async def publish(self, events: List[Event], size: int, wait: bool = True) -> Optional[Receipt]:
        """Take a batch that came in `size` bytes.

        With `wait`, return its receipt once it is committed. Without, return None once
        it is queued. Raises BatchTooLarge, QueueFull, Stopping and StoreFailed; then
        nothing of the batch is stored.

        It is safe without a lock: from the check of the bound to the put there is no
        `await`, so no other coroutine runs in between, and two publishers cannot both
        take the last room. If the caller is cancelled, because its client has gone, the
        batch stays in the queue and is stored all the same. The client will repeat it,
        and the repeat is a duplicate.
        """
        count = len(events)
        self._check_room(count, size)
        # No await between the check and the put: no other publisher can come between.
        done = self._loop.create_future() if wait else None
        records = [record_of(event) for event in events]
        self._queue.put_nowait(_Batch(records, size, done, self._loop.time()))
        self._waiting_events += count
        self._waiting_bytes += size
        self._taken += count
        if done is None:
            return None
        try:
            receipt: Receipt = await done
            return receipt
        finally:
            # Break the cycle error → traceback → frame → future → error. Otherwise the
            # batch of a failed commit lives until the next garbage collection.
            del done

    def _check_room(self, count: int, size: int) -> None:
        """Raise what keeps a batch from being taken.

        A publisher must not wait here until there is room: it would hold its body in
        memory meanwhile, and the bound would bound nothing.
        """
        most = self.limits.queue_events
        if count > most:
            raise BatchTooLarge(count, most)
        # If the consumer had ended, that would be a bug, and health says so. A batch
        # would wait for ever, so it is refused.
        if self._stopping or self._tasks[0].done():
            raise Stopping("the service is stopping: send again in a moment")
        if self._waiting_events + count > most:
            raise QueueFull(
                f"{self._waiting_events} of {most} events are queued and {count} more do not fit:"
                " send again after Retry-After"
            )
        # A body that is larger than the bound is taken when nothing else waits.
        most_bytes = self.limits.queue_bytes
        if self._waiting_events and self._waiting_bytes + size > most_bytes:
            raise QueueFull(
                f"{self._waiting_bytes} of {most_bytes} bytes are queued and {size} more do not"
                " fit: send again after Retry-After"
            )

    # ---- Consuming ----

    async def _consume(self) -> None:
        """Commit group after group, until it is cancelled.

        Only `stop` cancels it: when the queue is empty, or when time is up. If time is
        up, a publisher that still waits gets no answer, and will repeat what it sent.

        A commit that fails does not end this loop: `_commit_group` catches what it
        raises. Anything else would be a bug, after the publishers have their answers:
        it is logged, and the next group is taken.
        """
        had_company = False
        while True:
            group = await self._gather_group(had_company)
            had_company = len(group) > 1
            try:
                await self._commit_group(group)
            except Exception:
                log.exception("A BUG - after a commit; the consumer goes on")

    async def _gather_group(self, had_company: bool) -> List[_Batch]:
        """Wait for a batch, and take everything that waits with it, up to the bound.

        The last batch may go beyond the bound, because a batch is never split.
        `had_company`: the last group held several batches, so several publishers are at
        work at the same time. They were answered together and send again together. To
        wait for a few turns of the loop then makes one larger group of them instead of
        two. A publisher that is alone never waits here.
        """
        group = [await self._queue.get()]
        if had_company:
            # sleep(0) lets every other coroutine that is ready run once.
            for _ in range(GATHER_TURNS):
                if self._waiting_events >= GATHER_EVENTS:
                    break
                await asyncio.sleep(0)
        count = len(group[-1].records)
        while count < self.limits.group_events and not self._queue.empty():
            group.append(self._queue.get_nowait())
            count += len(group[-1].records)
        return group

    async def _commit_group(self, group: List[_Batch]) -> None:
        """Have a group committed, and tell its publishers what became of it.

        While it awaits the writer, other coroutines run and fill the queue: that is the
        next group. From the moment when this coroutine goes on, to the end of this
        method, nothing else runs in the loop, so nobody sees the books half settled.

        What the commit raises in the writer's thread comes out of the await here. Then
        nothing of the group is stored, its publishers are told so, and the consumer
        goes on with the next group.
        """
        records = list(itertools.chain.from_iterable(batch.records for batch in group))
        began_s = self._commit_began_s = self._loop.time()
        try:
            decision = await self._ask_writer(self._store.commit, records, self._clock_us())
        except Exception as error:
            # Whatever it is, the next group may go through.
            self._commit_began_s = None
            self._refuse_group(group, len(records), error)
            return
        self._commit_began_s = None
        self._note_commit(group, records, decision, began_s)
        for listener in self.commit_listeners:
            listener()

    def _note_commit(
        self, group: List[_Batch], records: List[Record], decision: Decision, began_s: float
    ) -> None:
        """Settle a group that is on disk, and remember that it went well."""
        commit_us = int((self._loop.time() - began_s) * 1_000_000)
        self._settle_group(group, decision, commit_us)
        self._note_success()
        self.last_commit = LastCommit(len(records), commit_us)
        self.commit_events.add(len(records))
        self.commit_seconds.add(commit_us / 1_000_000)
        self.newest_seq = decision.first_seq + len(decision.fresh) - 1
        _log_group(records, decision)

    def _settle_group(self, group: List[_Batch], decision: Decision, commit_us: int) -> None:
        """Answer the publishers of a committed group. It does not await.

        Each batch leaves the count of what waits, its repeats are remembered, and its
        future gets the receipt. The publisher goes on in the next turn of the loop,
        when all of this is done.
        """
        sizes = [len(batch.records) for batch in group]
        group_events = sum(sizes)
        for batch, share in zip(group, shares_of(decision, sizes)):
            self._give_back_room(batch)
            for repeat in share.repeats:
                record = remembered(batch.records[repeat.index], repeat.kind)
                self.duplicates.append(Duplicate(record, verdict_of(repeat), decision.arrived_us))
            # A publisher that has gone has cancelled its future.
            if batch.done is not None and not batch.done.done():
                receipt = Receipt(
                    batch.records,
                    share.first_seq,
                    share.repeats,
                    decision.arrived_us,
                    group_events,
                    commit_us,
                )
                batch.done.set_result(receipt)

    def _refuse_group(self, group: List[_Batch], count: int, error: Exception) -> None:
        """Tell the publishers of a group that nothing of it is stored.

        Each gets an exception of its own: one exception that many coroutines raise
        would collect the tracebacks of all of them. The events leave the books as if
        they had never come: they were taken, and are taken back. Whoever sent with
        `wait=0` cannot be told, so the log says what was lost.
        """
        self.failed_commits += 1
        expected = isinstance(error, StoreFailed)
        reason = str(error) if expected else f"a commit failed: {error!r}"
        log.error(
            "COMMIT FAILED - %d events of %d requests refused, %s: %s",
            count,
            len(group),
            error.outcome if isinstance(error, StoreFailed) else StoreFailed.outcome,
            reason,
            exc_info=None if expected else error,
        )
        self._failed_records = [
            # A payload may be large, and a probe needs only its size.
            record._replace(payload="{}")
            for batch in group
            for record in batch.records
        ]
        self._failed_bytes = sum(batch.size for batch in group)
        self._note_trouble(reason)
        for batch in group:
            self._give_back_room(batch)
            self._taken -= len(batch.records)
            if batch.done is None:
                log.error(
                    "LOST - %d events taken with wait=0 could not be stored", len(batch.records)
                )
            elif not batch.done.done():
                batch.done.set_exception(StoreFailed(reason))

    def _give_back_room(self, batch: _Batch) -> None:
        """This batch is committed or refused: the room that it took is free again."""
        self._waiting_events -= len(batch.records)
        self._waiting_bytes -= batch.size
        self._queue.task_done()

    async def _tidy(self) -> None:
        """Housekeeping once a second, until it is cancelled.

        Retention goes in steps, and a commit waits for one of them at most. Then erased
        text leaves the WAL, and the WAL and the disk are looked at. What fails is
        logged and tried again a second later.
        """
        while True:
            await asyncio.sleep(self.limits.tidy_interval_s)
            try:
                while await self._ask_writer(self._store.tidy, self._clock_us()):
                    pass
            except Exception as error:
                log.error("HOUSEKEEPING FAILED - will try again: %s", error)
            await self._watch_checkpoints()
            await self._watch_disk()

    async def _watch_disk(self) -> None:
        """Note the size of the store once a minute, and say once that room gets short.

        A disk that hangs would hang the loop, so a thread looks.
        """
        now_s = self._loop.time()
        if not self.growth.is_due(now_s):
            return
        try:
            self.growth.add(now_s, await self._ask_accountant(disk_use, self._store.path))
        except OSError as error:
            log.warning("DISK UNKNOWN - the size of the store cannot be read: %s", error)
        warning = self.growth.warning()
        if warning and not self._disk_noted:
            log.warning("DISK GETS FULL - %s", warning)
        self._disk_noted = bool(warning)

    async def _watch_checkpoints(self) -> None:
        """Say once why the WAL grows. If it cannot be written back, health says so.

        Erased text leaves the WAL by writing it back, so that is a try as well.
        """
        try:
            await self._scrub()
            note = await self._ask_writer(self._store.checkpoint_note)
            self._wal_trouble = None
        except Exception as error:
            # Whatever it is, the next try may go through.
            note = str(error) or repr(error)
            if self._wal_trouble is None:
                self._wal_trouble = Trouble(note, self._loop.time())
        if note and not self._wal_noted:
            log.warning("WAL GROWS - %s", note)
        self._wal_noted = bool(note)

    # ---- Reading ----

    async def page(self, query: EventQuery, separator: str = ",") -> Page:
        """Events, see `Reader.page`. Raises StoreFailed."""
        return await self._ask_reader(self._reader.page, query, separator)

    async def tail(self, query: EventQuery, after: int) -> Tail:
        """What the log holds after `after`, see `Reader.tail`. Raises StoreFailed."""
        return await self._ask_reader(self._reader.tail, query, after)

    async def event(self, topic: str, event_id: str) -> Tuple[Optional[int], Optional[str]]:
        """The seq of an identity, and its event as JSON text. Raises StoreFailed.

        The seq is None if the identity was never seen; the text, if the event was
        removed.
        """
        # Asked of the writer: only its connection sees the recent keys.
        seq = await self._ask_writer(self._store.locate, topic, event_id)
        if seq is None:
            return None, None
        return seq, await self._ask_reader(self._reader.event, seq)

    async def counts(self, query: CountQuery) -> List[EventCount]:
        """Events by time, see `Reader.counts`. Raises StoreFailed."""
        return await self._ask_accountant(self._accountant.counts, query)

    async def gaps(self, source: Optional[str], limit: int) -> List[Dict[str, Any]]:
        """What sources left out, see `Reader.gaps`. Raises StoreFailed."""
        return await self._ask_reader(self._reader.gaps, source, limit)

    async def stats(
        self, topics: int = STATS_MAX_NAMES, sources: int = STATS_MAX_NAMES
    ) -> Dict[str, Any]:
        """The books, balanced, with so many topics and sources. Raises StoreFailed.

        The numbers are: the events that the store has counted, and those that
        are taken and not yet counted (the queue, and the group under way). The one is a
        snapshot of the file, the other a variable of the loop, and neither can be
        frozen while the other is read. So they are read in the order that never makes
        the difference negative.
        """
        books = await self._ask_accountant(self._accountant.stats, topics, sources)
        counted = books["unique_processed"] + books["duplicate_dropped"]
        # `_taken` is read after the snapshot. An event is in `_taken` before a commit
        # can count it, so `_taken` is never less than what the snapshot has counted.
        received = self._taken
        commit = {
            "events": self.last_commit.events,
            "milliseconds": self.last_commit.microseconds / 1000,
        }
        return {
            "received": received,
            **books,
            "current_queue_size": received - counted,
            "last_commit": commit,
            "store_id": self._store.store_id,
            **self._size_facts(books),
            "health": self._health_of(self.trouble()),
        }

    def _size_facts(self, books: Dict[str, Any]) -> Dict[str, Any]:
        """What the books say of the size of the store, and of the room for it."""
        stored = books["stored"]
        return {
            "bytes_per_event": books["store_bytes"] // stored if stored else None,
            "growth_bytes_per_day": {
                "last_hour": self.growth.bytes_per_day(HOUR_S),
                "last_day": self.growth.bytes_per_day(DAY_S),
            },
            "disk_free_bytes": self.growth.disk_free_bytes,
            "days_until_full": self.growth.days_until_full(),
        }

    def _health_of(self, trouble: Optional[Trouble]) -> Dict[str, Any]:
        """Health as the books show it. A warning is no failure: events are stored."""
        warning = self.growth.warning()
        if trouble is None:
            return {"status": "ok", "reason": "", "since_seconds": 0.0, "warning": warning}
        since_s = round(self._loop.time() - trouble.since_s, 3)
        return {
            "status": "failing",
            "reason": trouble.reason,
            "since_seconds": since_s,
            "warning": warning,
        }

    # ---- Erasing ----

    async def erase_event(
        self, topic: str, event_id: str, through_seq: Optional[int] = None
    ) -> Optional[int]:
        """Erase one event, see `Store.erase_event`. Raises StoreFailed."""
        erased = await self._ask_writer(self._store.erase_event, topic, event_id, through_seq)
        if erased is not None:
            self._forget_payloads(
                lambda record: (record.topic, record.event_id) == (topic, event_id)
            )
            await self._scrub_patiently()
        return erased

    async def erase_matching(
        self,
        topic: str,
        prefix: bool,
        until_us: Optional[int],
        through_seq: Optional[int] = None,
    ) -> int:
        """Erase the events of a topic or of all that begin so; how many it was.

        See `Store.begin_erasing`. Commits get in between the steps. Raises StoreFailed;
        then some may be erased.
        """
        plan = self._store.begin_erasing
        erasure = await self._ask_writer(plan, topic, prefix, until_us, through_seq)
        while not erasure.is_done:
            if self._stopping:
                raise Stopping("the service is stopping: ask again for what is left")
            erasure = await self._ask_writer(self._store.go_on_erasing, erasure)
        self._forget_payloads(
            lambda record: record.topic == topic or (prefix and record.topic.startswith(topic))
        )
        await self._scrub_patiently()
        return erasure.events

    def _forget_payloads(self, is_erased: Callable[[Record], bool]) -> None:
        """Forget what repeats of erased events brought: it may be the same text."""
        for index, duplicate in enumerate(self.duplicates):
            if is_erased(duplicate.record):
                forgetful = duplicate.record._replace(payload="")
                self.duplicates[index] = duplicate._replace(record=forgetful)

    async def _scrub_patiently(self) -> None:
        """Have erased text out of the WAL before anybody is told that it is gone.

        Readers of ours are in the way for a moment. Another program may be in the way
        for long: then `_tidy` goes on trying, and the log says so.
        """
        for _ in range(SCRUB_ATTEMPTS):
            await self._scrub()
            if not self._store.scrub_is_due:
                return
            await asyncio.sleep(SCRUB_PAUSE_S)
        log.warning(
            "ERASED TEXT IS STILL IN THE WAL - a program is reading the store; it goes as soon as"
            " that program is done"
        )

    async def _scrub(self) -> None:
        """Have erased text out of the WAL, now or as soon as readers allow it."""
        if self._store.scrub_is_due:
            await self._ask_writer(self._store.scrub)

    # ---- Health ----

    def trouble(self) -> Optional[Trouble]:
        """Why events cannot be stored, as far as it is known without trying.

        The gravest comes first: stopping, a task that has ended, a commit or another
        call of the store that hangs, a commit that failed, a WAL that cannot be written
        back. A commit is measured with waiting for its turn, any other call without.
        """
        now_s = self._loop.time()
        if self._stopping:
            return Trouble("the service is stopping", now_s)
        for task, name in zip(self._tasks, ("consumer", "housekeeper")):
            if task.done():
                return Trouble(f"the {name} has ended: please report the log", now_s)
        under_way = (("a commit", self._commit_began_s), ("a call", self._call_began_s))
        for what, began_s in under_way:
            if began_s is not None and now_s - began_s > self.limits.commit_hangs_s:
                lasts_s = now_s - began_s
                reason = f"{what} has been under way for {lasts_s:.0f} s: the disk hangs"
                return Trouble(reason, began_s)
        return self._trouble or self._wal_trouble

    def _note_trouble(self, reason: str) -> None:
        """Remember why nothing can be stored, and since when for the first time."""
        since_s = self._loop.time() if self._trouble is None else self._trouble.since_s
        self._trouble = Trouble(reason, since_s)

    def _note_success(self) -> None:
        """A write has just shown that events can be stored."""
        self._trouble = None
        self._failed_records = ()
        self._failed_bytes = 0
        self._proven_s = self._loop.time()

    async def health(self) -> str:
        """Why events cannot be stored right now, or "" if they can.

        Where no recent commit shows it, it finds out by writing. After a failed commit,
        too: perhaps nobody publishes any more, so nothing else would ever clear it.
        """
        trouble = self.trouble()
        if trouble is not None and trouble is not self._trouble:
            # No write would show more.
            return trouble.reason
        proof_is_old = self._loop.time() - self._proven_s > self.limits.health_probe_s
        if self._trouble is not None or proof_is_old:
            await self._share_probe()
        trouble = self.trouble()
        return "" if trouble is None else trouble.reason

    async def _share_probe(self) -> None:
        """Wait for the probe that is under way, or begin one.

        A hundred checks at the same time cost publishers no more than one. It does not
        wait for ever: a disk that hangs would otherwise hang the health check, too.
        """
        if self._probing is None or self._probing.done():
            self._probing = self._loop.create_task(self._probe())
        # Whoever asks may go away. That cancels the waiting, and not the probe.
        done, _ = await asyncio.wait([self._probing], timeout=self.limits.commit_hangs_s)
        if not done:
            self._note_trouble("a write has been under way for too long: the disk hangs")

    async def _probe(self) -> None:
        """Do what the failed commit did, and write as much, to learn if it works again.

        The same, because another commit may not touch what is damaged. As much, because
        a full disk often still has room for a single event. One probe after the other,
        with pauses: whoever asks in a pause waits for its end.
        """
        if self._trouble is not None:
            await asyncio.sleep(self._next_probe_s - self._loop.time())
        failed = self._failed_records
        size = min(self._failed_bytes, PROBE_MAX_BYTES)
        try:
            if failed:
                await self._ask_writer(self._store.rehearse, failed, self._clock_us())
            await self._ask_writer(self._store.complete_sorted_tables)
            await self._ask_writer(self._store.probe, size, self._clock_us())
        except Exception as error:
            # Whatever it is, a commit would meet it, too.
            self._note_trouble(str(error) or repr(error))
            return
        finally:
            self._next_probe_s = self._loop.time() + self.limits.probe_pause_s
        # A commit may have failed meanwhile: that one was not tried.
        if self._failed_records is failed:
            self._note_success()

    async def stop(self, timeout_s: float) -> bool:
        """Take nothing more, commit what is queued, close the store.

        False if time ran out before the queue did, or if the store could not be closed.
        What was answered after its commit is on disk. Events taken with `wait=0` were
        answered before, and are lost if time runs out.

        The order: no new batches; wait until the queue is empty; end the consumer and
        the housekeeper; close the readers and the store, each in its own thread.
        """
        self._stopping = True
        clean = True
        if self._tasks:
            drained = self._loop.create_task(self._queue.join())
            done, _ = await asyncio.wait([drained], timeout=timeout_s)
            clean = bool(done)
            ending = [*self._tasks, drained]
            if self._probing is not None:
                ending.append(self._probing)
            for task in ending:
                task.cancel()
            await asyncio.gather(*ending, return_exceptions=True)
            closing = [
                self._ask_reader(self._reader.close),
                self._ask_accountant(self._accountant.close),
                self._ask_writer(self._store.close),
            ]
            # A writer that hangs in the disk would hang here as well.
            _, late = await asyncio.wait(closing, timeout=self.limits.close_s)
            clean = clean and not late
        # A thread that hangs is not waited for.
        self._writer.shutdown(wait=clean)
        self._reading.shutdown(wait=clean)
        self._accounting.shutdown(wait=clean)
        return clean


def _log_group(records: Sequence[Record], decision: Decision) -> None:
    """A line for each event of a small group, and one line for a large group.

    Otherwise a flood of events would become a flood of lines. A conflict always gets a
    line of its own: two contents share an id, and somebody should look why.
    """
    repeated = set()
    for repeat in decision.repeats:
        repeated.add(repeat.index)
        record = records[repeat.index]
        if repeat.kind == CONFLICT:
            log.warning(
                "CONFLICT - topic: %s, event_id: %s, source: %s: the identity is taken by seq %d"
                " with other content, which stays",
                record.topic,
                record.event_id,
                record.source,
                repeat.first.seq,
            )
    level = logging.INFO
    if len(records) > QUIET_GROUP_EVENTS:
        level = logging.DEBUG
        log.info(
            "GROUP COMMITTED - events: %d, processed: %d, duplicates dropped: %d",
            len(records),
            len(decision.fresh),
            len(repeated),
        )
    if not log.isEnabledFor(level):
        return
    for index, record in enumerate(records):
        text = "EVENT PROCESSED - topic: %s, event_id: %s, source: %s"
        if index in repeated:
            text = "DUPLICATE DROPPED - topic: %s, event_id: %s, source: %s"
        log.log(level, text, record.topic, record.event_id, record.source)


# ============================================================================
# §6  HTTP/1.1: bytes in, `Request` out; `Response` in, bytes out. No I/O
#
# The parser is fed what the network brings, in pieces of any size. Asked for a request,
# it gives one of three answers: a whole `Request`, None ("more bytes are needed", or,
# if `is_busy`, "ask again"), or HTTPError. It never waits, reads or writes; that is the
# server's work.
#
# Inside, the parser is a generator, because a generator can stop in the middle of a
# chunk and go on there. It reads like code that blocks: at each `yield None` it waits
# until `feed` has brought more.
#
# Every rule of syntax is a regular expression on bytes, matched in full. The sentence
# of RFC 9112 (how a message is written) or RFC 9110 (what it means) stands above it.
# Methods of `str` and `int` alone would be too kind: they know more blanks and digits
# than HTTP. Where two programs on the way read a message differently, attacks begin.
#
# Knows the version and MAX_BODY_BYTES. Must not know events, routes or sockets.
#
#   * Where a message ends is never guessed: two opinions about its length refuse it.
#   * After HTTPError the connection is finished. Nobody can tell where the next request
#     would start, and what follows may be an attack (request smuggling).
#   * A request comes out the same however its bytes were cut into pieces.
#   * Each byte fed is searched once, so the work grows in proportion to the bytes.
#   * The memory in use is bounded by the limits below.
#   * A large or compressed body is taken only after `admit` has seen the head.
#   * No call of `next_request` works for long: what takes longer is done in slices.
#
# Simpler than a production system: no upgrade to other protocols (WebSocket, HTTP/2), a
# body is handed over whole instead of in pieces, trailer fields are checked and
# dropped, no coding but chunked, gzip and deflate. A proxy in front adds the rest.
# ============================================================================

# RFC 9112 §3: "RECOMMENDED that all HTTP senders and recipients support, at a minimum,
# request-line lengths of 8000 octets." Without the line's CR LF.
MAX_REQUEST_LINE_BYTES = 8000
# Request line and fields, without the empty line that ends them.
MAX_HEAD_BYTES = 32 * 1024
# Header fields of one request, and trailer fields. Apache httpd has 100 as well.
MAX_FIELDS = 100
# The size of a chunk with its extensions, which hardly any client sends.
MAX_CHUNK_LINE_BYTES = 1024
# The trailer fields of one body together, without their line ends.
MAX_TRAILER_BYTES = 8 * 1024
# A body that the route does not take is read and dropped, because the next request
# stands behind it. It may be as long as one read of the server, and no longer.
MAX_UNWANTED_BODY_BYTES = 64 * 1024
# A chunk costs as much work as 500 bytes of a body. So many are free; all others have
# to carry so many bytes on the average. A line of a log, sent by itself, has more.
FREE_CHUNKS = 10_000
MIN_CHUNK_BYTES = 16
# Compressed bytes that are inflated at a time, before others have a turn. Made to be
# slow, they take 7 ms: 64 KB can hold 50,000 empty blocks.
INFLATE_SLICE_BYTES = 64 * 1024
# Of one gzip body: `cat a.gz b.gz` makes two. Each costs a copy of all bytes behind it.
MAX_GZIP_MEMBERS = 100
# Heads remembered, of requests and of answers: so many of each.
HEADS_KEPT = 128
# A longer request head is parsed each time. A stranger can fill heads with short names:
# 128 of 8 KB would take 24 MB of memory, of 1 KB they take 3 MB. curl sends 200 bytes.
MAX_KEPT_HEAD_BYTES = 1024

# The methods of RFC 9110 §9, RFC 5789 (PATCH) and the QUERY draft, but CONNECT, which
# is for proxies. A route may refuse one with 405; a method that is not here gets 501.
METHODS = frozenset(["GET", "HEAD", "POST", "PUT", "OPTIONS", "DELETE", "PATCH", "TRACE", "QUERY"])

REASONS = {
    100: "Continue",
    200: "OK",
    201: "Created",
    202: "Accepted",
    204: "No Content",
    400: "Bad Request",
    401: "Unauthorized",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    408: "Request Timeout",
    409: "Conflict",
    410: "Gone",
    413: "Content Too Large",
    414: "URI Too Long",
    415: "Unsupported Media Type",
    417: "Expectation Failed",
    421: "Misdirected Request",
    422: "Unprocessable Content",
    431: "Request Header Fields Too Large",
    500: "Internal Server Error",
    501: "Not Implemented",
    503: "Service Unavailable",
    505: "HTTP Version Not Supported",
}

# Fields of an answer as (name, value), in the order in which they are sent.
FieldLines = Tuple[Tuple[str, str], ...]


class HTTPError(Exception):
    """A request that is refused.

    `problem` is a key of PROBLEMS, which gives the status. `detail` says what is wrong
    and what to do. `headers` go into the answer. `members` are what else the problem
    details have to say (RFC 9457 §3.2).
    """

    def __init__(self, problem: str, detail: str, headers: FieldLines = (), **members: Any) -> None:
        super().__init__(detail)
        self.problem = problem
        self.detail = detail
        self.headers = headers
        self.members = members
        # What is known of the request, once its head has been read.
        self.path: Tuple[str, ...] = ()
        self.origin = ""
        # Whether the log has said it already of the same sender.
        self.is_known = False

    def name_request(self, path: Tuple[str, ...], headers: Dict[str, str]) -> None:
        """Say which request is refused: the answer depends on its path and Origin."""
        self.path = path
        self.origin = headers.get("origin", "")


class Head(NamedTuple):
    """What stands before the body. Requests share heads: never change one."""

    method: str
    # The target's path, split at "/", then percent-decoded; without the empty part
    # before the first "/". ("*",) for `OPTIONS *`.
    path: Tuple[str, ...]
    # The target's query, decoded. No name occurs twice.
    query: Dict[str, str]
    # By lower-case name. RFC 9110 §5.3: ", " joins the values of a repeated field.
    headers: Dict[str, str]
    # In lower case, without parameters; "" if there is none.
    content_type: str
    # Of the body, as it is sent, in bytes; 0 without a body; None if it is chunked.
    length: Optional[int]
    # "gzip", "deflate", or "" for a body that is sent as it is.
    content_coding: str
    # Does the client wait for "100 Continue" before it sends the body?
    expects_continue: bool
    # Does the client allow a next request on this connection?
    keep_alive: bool
    http_1_0: bool


class Request(NamedTuple):
    """One whole request. The body is without transfer coding and content coding."""

    head: Head
    body: bytes = b""


class Response(NamedTuple):
    """What to answer. The body is bytes, or a stream of pieces of unknown length."""

    status: int
    body: Union[bytes, AsyncGenerator[bytes, None]] = b""
    content_type: str = "application/json"
    headers: FieldLines = ()


# ---- The request line and the fields ----------------------------------------

# RFC 9110 §5.6.2: token = 1*tchar
_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"

# RFC 9112 §3: request-line = method SP request-target SP HTTP-version. One blank each.
# The target takes any byte that is no blank, no control character and no "#".
_REQUEST_LINE = re.compile(
    rb"(?P<method>" + _TOKEN + rb") "
    rb"(?P<target>[^\x00-\x20\x7f#]+) "
    rb"HTTP/(?P<major>[0-9])\.(?P<minor>[0-9])"
)

# RFC 9112 §5: field-line = field-name ":" OWS field-value OWS. §5.1: no white space
# before the colon. RFC 9110 §5.5: no control character in a value, but the tab.
_FIELD_LINE = re.compile(rb"(?P<name>" + _TOKEN + rb"):(?P<value>[^\x00-\x08\x0a-\x1f\x7f]*)")

# RFC 9110 §7.2: Host = uri-host [ ":" port ]; RFC 3986 §3.2.2 and §3.2.3 for its parts.
_HOST = re.compile(
    r"(?:"
    r"(?:[A-Za-z0-9\-._~!$&'()*+,;=]|%[0-9A-Fa-f]{2})*"
    r"|\[[0-9A-Fa-f:.]+\]"
    r")(?::[0-9]{0,5})?"
)

# RFC 9112 §3.2.2: absolute-form, which clients send to a proxy.
_ABSOLUTE_TARGET = re.compile(rb"[Hh][Tt][Tt][Pp][Ss]?://(?P<host>[^/?]+)/?(?P<rest>.*)")

# RFC 9110 §8.6: Content-Length = 1*DIGIT. No sign, no blank, no list, no other digits.
_LENGTH = re.compile("[0-9]+")

# RFC 9112 §7: lists of codings that end with chunked. Valid, but not known here.
_CODINGS_BEFORE_CHUNKED = re.compile(
    r"(?:(?:(?:x-)?(?:gzip|compress)|deflate|identity)[ \t]*,[ \t]*)+chunked"
)

# By Content-Encoding, in lower case (RFC 9110 §8.4.1: a recipient SHOULD consider
# "x-gzip" to be equivalent to "gzip"). The value is that of `Head.content_coding`.
_CONTENT_CODINGS = {
    "": "",
    "identity": "",
    "gzip": "gzip",
    "x-gzip": "gzip",
    "deflate": "deflate",
}


def _parse_head(text: bytes) -> Head:
    """A request's head, without the empty line after it. Raises HTTPError.

    A pure function of the bytes, so that its results can be kept.
    """
    request_line, *field_lines = text.split(b"\r\n")
    try:
        method, raw_target, http_1_0 = _parse_request_line(request_line)
        headers = _parse_fields(field_lines)
        target = _parse_target(method, raw_target, headers, http_1_0)
    except HTTPError as error:
        error.origin = _origin_in(text)
        raise
    headers["host"] = target.host
    try:
        query = _parse_query(target.raw_query)
        length = _body_length(headers, http_1_0)
        expects_continue = _expects_continue(headers)
        content_coding = _content_coding(headers)
    except HTTPError as error:
        error.name_request(target.path, headers)
        raise
    media_type = headers.get("content-type", "").partition(";")[0]
    return Head(
        method=method,
        path=target.path,
        query=query,
        headers=headers,
        content_type=media_type.strip(" \t").lower(),
        length=length,
        content_coding=content_coding,
        # RFC 9110 §10.1.1: to be ignored in HTTP/1.0 and in a request without a body.
        expects_continue=expects_continue and not http_1_0 and length != 0,
        keep_alive=_keeps_connection(headers, http_1_0),
        http_1_0=http_1_0,
    )


_ORIGIN_LINE = re.compile(rb"\r\nOrigin:[ \t]*(?P<origin>[!-~]+)[ \t]*\r\n", re.IGNORECASE)


def _origin_in(text: bytes) -> str:
    """The Origin of a head that cannot be read, or "": its page may still read why."""
    match = _ORIGIN_LINE.search(text + b"\r\n")
    return match["origin"].decode("ascii") if match else ""


# A client sends nearly the same head each time, and a third of all work is reading it.
_parse_kept_head = functools.lru_cache(HEADS_KEPT)(_parse_head)


# How other protocols begin, and what to do. The PROXY protocol of haproxy comes as a
# line of text or, in its second version, as bytes that begin with two empty lines; one
# of them is skipped before any request. TLS begins with a record of type 22
# (RFC 8446 §5.1).
_OTHER_PROTOCOLS = {
    b"PROXY ": "this is a PROXY protocol header, which is not understood here: switch it off"
    " in the proxy (haproxy: no send-proxy; nginx: proxy_protocol off)",
    b"\r\n\0\r\nQUIT\n": "this is a PROXY protocol header of version 2, which is not understood"
    " here: switch it off in the proxy (haproxy: no send-proxy-v2)",
    b"\x16\x03": "this is TLS, and plain HTTP is spoken here: use http://, or start the service"
    " with --tls-cert",
}
_OTHER_BEGINNINGS = tuple(_OTHER_PROTOCOLS)


def _other_protocol(beginning: bytes) -> HTTPError:
    return HTTPError("bad-request", _OTHER_PROTOCOLS[beginning])


def _parse_request_line(line: bytes) -> Tuple[str, bytes, bool]:
    """Method, target, and whether this is HTTP/1.0."""
    match = _REQUEST_LINE.fullmatch(line)
    if match is None:
        if line.startswith(b"PROXY "):
            raise _other_protocol(b"PROXY ")
        raise HTTPError("bad-request", "the request line is not METHOD SP TARGET SP HTTP/1.1")
    raw_method, target, major, minor = match.groups()
    # RFC 9110 §15.6.6: an unknown major version is answered 505.
    if major != b"1":
        raise HTTPError("version-not-supported", "only HTTP/1.1 and HTTP/1.0 are spoken here")
    # RFC 9110 §15.6.2: a method that the server does not recognize is answered 501.
    method = raw_method.decode("ascii")
    if method not in METHODS:
        raise HTTPError("not-implemented", f"the method {method[:40]} is not known here")
    # RFC 9110 §2.5: an unknown minor version counts as the highest known, which is 1.
    return method, target, minor == b"0"


def _parse_fields(lines: Sequence[bytes]) -> Dict[str, str]:
    """Field values by lower-case name; those of a repeated field joined in order.

    A joined value no longer has the form of a single one. So a second Host,
    Content-Length or Transfer-Encoding is refused by the rules for the first.
    """
    if len(lines) > MAX_FIELDS:
        raise HTTPError("headers-too-large", f"there are more than {MAX_FIELDS} header fields")
    headers: Dict[str, str] = {}
    for line in lines:
        match = _FIELD_LINE.fullmatch(line)
        # RFC 9112 §5.2: a value that goes on in the next line (obs-fold) is refused.
        if match is None:
            raise HTTPError("bad-request", "a field is not NAME: VALUE on one line")
        raw_name, raw_value = match.groups()
        name = raw_name.decode("ascii").lower()
        value = raw_value.strip(b" \t").decode("latin-1")
        # CGI does not tell "_" from "-". Such a gateway would see another length here.
        if name in ("content_length", "transfer_encoding"):
            raise HTTPError("bad-request", f"a gateway may mistake the field {name}: leave it out")
        if name in headers:
            value = f"{headers[name]}, {value}"
        headers[name] = value
    return headers


def _content_coding(headers: Dict[str, str]) -> str:
    """The coding of the body (RFC 9110 §8.4): "gzip", "deflate", or "" for none."""
    coding = headers.get("content-encoding", "").lower()
    if coding not in _CONTENT_CODINGS:
        # RFC 9110 §12.5.3: with a 415, Accept-Encoding says which codings would do.
        raise HTTPError(
            "unsupported-encoding",
            "the Content-Encoding must be gzip, deflate or absent",
            (("Accept-Encoding", "gzip, deflate"),),
        )
    return _CONTENT_CODINGS[coding]


def _expects_continue(headers: Dict[str, str]) -> bool:
    """RFC 9110 §10.1.1: an expectation that is not known MAY be answered 417."""
    expectation = headers.get("expect", "").lower()
    if expectation not in ("", "100-continue"):
        raise HTTPError("expectation-failed", "only Expect: 100-continue can be met")
    return expectation != ""


def _keeps_connection(headers: Dict[str, str], http_1_0: bool) -> bool:
    """RFC 9112 §9.3: HTTP/1.1 keeps it unless told to close; HTTP/1.0 only if told."""
    # RFC 9110 §7.6.1: Connection is a list of tokens, in upper or lower case.
    if "connection" not in headers:
        return not http_1_0
    options = set()
    for token in headers["connection"].split(","):
        options.add(token.strip(" \t").lower())
    if "close" in options:
        return False
    return not http_1_0 or "keep-alive" in options


def _body_length(headers: Dict[str, str], http_1_0: bool) -> Optional[int]:
    """Bytes of the body; 0 without one; None if it is chunked (RFC 9112 §6.3)."""
    coding = headers.get("transfer-encoding")
    if coding is not None:
        _check_transfer_coding(coding, headers, http_1_0)
        return None
    length = headers.get("content-length", "0")
    if _LENGTH.fullmatch(length) is None:
        raise HTTPError(
            "bad-request", "Content-Length must be there once and hold decimal digits only"
        )
    # `int` is slow for thousands of digits, and from Python 3.11 on it refuses them.
    if len(length) > 18:
        raise HTTPError("too-large", "Content-Length has more than 18 digits")
    return int(length)


def _check_transfer_coding(coding: str, headers: Dict[str, str], http_1_0: bool) -> None:
    """Refuse whatever is not, without any doubt, a chunked body."""
    # RFC 9112 §6.1: both fields "ought to be handled as an error", and so ought chunked
    # in HTTP/1.0. A gateway may believe the other field, and see another end.
    if "content-length" in headers or http_1_0:
        raise HTTPError(
            "bad-request", "Transfer-Encoding goes neither with Content-Length nor with HTTP/1.0"
        )
    # RFC 9112 §6.1: a coding that is not understood SHOULD be answered 501.
    if _CODINGS_BEFORE_CHUNKED.fullmatch(coding.lower()):
        raise HTTPError(
            "not-implemented",
            "Transfer-Encoding can only be chunked: compress with Content-Encoding: gzip",
        )
    # RFC 9112 §6.3: if chunked is not the last coding, the length cannot be determined.
    # The whole value counts: "xchunked" and "chunked, identity" have the word in them.
    if coding.lower() != "chunked":
        raise HTTPError("bad-request", "Transfer-Encoding must be there once and be chunked")


# ---- The target -------------------------------------------------------------


class _Target(NamedTuple):
    path: Tuple[str, ...]
    raw_query: bytes
    host: str


def _parse_target(method: str, raw: bytes, headers: Dict[str, str], http_1_0: bool) -> _Target:
    """Path, query and host, of any form of target that has a path (RFC 9112 §3.2)."""
    host = headers.get("host")
    if host is None and http_1_0:
        host = ""
    # RFC 9112 §3.2: a request without Host, with several or an invalid one gets 400.
    if host is None or _HOST.fullmatch(host) is None:
        raise HTTPError("bad-request", "the Host field must be there once and name a host")

    if not raw.startswith(b"/"):
        # RFC 9112 §3.2.4: asterisk-form, for OPTIONS about the server as a whole.
        if raw == b"*" and method == "OPTIONS":
            return _Target(("*",), b"", host)
        # RFC 9112 §3.2.2: the host in an absolute target counts, not the Host field.
        absolute = _ABSOLUTE_TARGET.fullmatch(raw)
        if absolute is None:
            raise HTTPError("bad-request", "the target must start with a slash")
        host = absolute["host"].decode("latin-1")
        if _HOST.fullmatch(host) is None:
            raise HTTPError("bad-request", "the target names no valid host")
        raw = b"/" + absolute["rest"]

    raw_path, _, raw_query = raw[1:].partition(b"?")
    # Split first, decode then: "%2F" is a character of a part, not the end of one.
    path = [percent_decode(part) for part in raw_path.split(b"/")]
    return _Target(tuple(path), raw_query, host)


def _parse_query(raw: bytes) -> Dict[str, str]:
    """The parameters of a query (WHATWG URL §5.1, application/x-www-form-urlencoded).

    >>> _parse_query(b"topic=front+door&after")
    {'topic': 'front door', 'after': ''}
    """
    query: Dict[str, str] = {}
    for pair in raw.split(b"&"):
        if not pair:
            continue
        raw_name, _, raw_value = pair.partition(b"=")
        name = percent_decode(raw_name, plus_is_blank=True)
        value = percent_decode(raw_value, plus_is_blank=True)
        if name in query:
            raise HTTPError("bad-parameter", f"the query parameter {name!a} is given twice")
        query[name] = value
    return query


# RFC 3986 §2.1: pct-encoded = "%" HEXDIG HEXDIG
_PERCENT_ENCODED = re.compile(rb"%(?P<hex>[0-9A-Fa-f]{2})")
_LONE_PERCENT = re.compile(rb"%(?![0-9A-Fa-f]{2})")


def percent_decode(raw: bytes, plus_is_blank: bool = False) -> str:
    """Percent-encoded UTF-8 to text (RFC 3986 §2.1).

    Raises HTTPError for a "%" without two hexadecimal digits behind it, and for bytes
    that are not UTF-8 when decoded.

    >>> percent_decode(b"caf%C3%A9+1", plus_is_blank=True)
    'café 1'
    """
    if plus_is_blank:
        raw = raw.replace(b"+", b" ")
    if b"%" in raw:
        if _LONE_PERCENT.search(raw):
            raise HTTPError(
                "bad-request",
                "the target has a % without two hexadecimal digits: write a literal % as %25",
            )
        raw = percent_decode_bytes(raw)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        raise HTTPError("bad-request", "the target is not UTF-8 when percent-decoded") from None


def percent_decode_bytes(raw: bytes) -> bytes:
    """Percent-encoded bytes as bytes; a "%" without two digits stands for itself."""
    return _PERCENT_ENCODED.sub(_decode_percent, raw)


def _decode_percent(match: "re.Match[bytes]") -> bytes:
    return bytes.fromhex(match["hex"].decode("ascii"))


# ---- The parser: from bytes in pieces to requests -----------------------------


class _Part(NamedTuple):
    """A part of a message that goes on until `end` comes, and how long it may be."""

    name: str
    end: bytes
    max_bytes: int
    # The problem of a part that is longer: a key of PROBLEMS.
    problem: str


_HEAD = _Part("the request head", b"\r\n\r\n", MAX_HEAD_BYTES, "headers-too-large")
_CHUNK_SIZE = _Part("a chunk size line", b"\r\n", MAX_CHUNK_LINE_BYTES, "bad-request")
_TRAILER = _Part("the trailer section", b"\r\n", MAX_TRAILER_BYTES, "headers-too-large")

# A line end that is not CR LF. RFC 9112 §2.2 lets a recipient take a bare LF for a line
# end. This one does not, because a gateway may see another message then, and says so at
# once: else the client would wait for an answer until the time is out.
_BARE_LINE_END = re.compile(rb"(?:^|[^\r])\n|\r[^\n]")

# RFC 9112 §7.1: chunk = chunk-size [ chunk-ext ] CRLF. 16 digits are 2^64 - 1 at most.
_CHUNK_SIZE_LINE = re.compile(rb"(?P<size>[0-9A-Fa-f]{1,16})(?:[ \t]*;[^\x00-\x08\x0a-\x1f\x7f]*)?")


def _admit_everyone(head: Head) -> bool:
    return True


class RequestParser:
    """`feed` it bytes, then ask for `next_request` until that is None.

    `max_body_bytes` bounds a body as it is sent, and again when it is inflated.

    `admit` is asked before a body is taken that would cost memory or time. It says
    whether anybody wants it, or raises HTTPError, and then nothing of it is read.

    `is_busy` is true after a None that means: not done yet, ask again without more
    bytes. Let others have a turn before.

    `phase` says what is awaited: "idle" (a request), "head" (the rest of a head) or
    "body". `head` is that of the request whose body is awaited, else None.

    `wants_continue` is true while a client waits for "100 Continue" before it sends its
    body (RFC 9110 §10.1.1). Whoever has sent the 100 sets it to False.

    >>> parser = RequestParser()
    >>> parser.feed(b"GET /events?limit=2 HTTP/1.1\\r\\nHost: loc")
    >>> parser.next_request() is None
    True
    >>> parser.feed(b"alhost\\r\\n\\r\\n")
    >>> parser.next_request().head.query
    {'limit': '2'}
    """

    def __init__(
        self,
        max_body_bytes: int = MAX_BODY_BYTES,
        admit: Callable[[Head], bool] = _admit_everyone,
    ) -> None:
        self.phase = "idle"
        self.wants_continue = False
        self.is_busy = False
        self.head: Optional[Head] = None
        self._max_body_bytes = max_body_bytes
        self._admit = admit
        self._buffer = bytearray()
        # Before this place in the buffer, the end of the awaited part cannot begin.
        self._search_from = 0
        self._requests = self._parse_requests()
        self._refused = False
        self._empty_line_skipped = False

    def feed(self, data: bytes) -> None:
        """Take bytes from the network."""
        self._buffer += data

    def next_request(self) -> Optional[Request]:
        """The next whole request, or None if more bytes are needed.

        Raises HTTPError for a request that is refused. It must not be called after
        that: nobody knows where the next request starts.
        """
        assert not self._refused, "asked again after HTTPError"
        if not self._buffer and self.phase == "idle":
            return None
        try:
            return next(self._requests)
        except HTTPError:
            self._refused = True
            self.wants_continue = False
            raise

    def close(self) -> None:
        """Let go of what was fed.

        Parser and generator refer to each other. Without this, both and the buffer
        would stay in memory until Python next looks for such cycles.
        """
        self._requests.close()
        self._buffer.clear()

    def _parse_requests(self) -> Generator[Optional[Request], None, None]:
        # Each `yield None` lets `next_request` return None. Its next call goes on
        # behind it, where more bytes may be in the buffer.
        while True:
            while not self._first_byte_is_there():
                yield None
            self.phase = "head"
            text = self._take_head()
            while text is None:
                yield None
                text = self._take_head()
            if len(text) > MAX_KEPT_HEAD_BYTES:
                head = _parse_head(text)
            else:
                head = _parse_kept_head(text)
            self.head = head
            # The body gets no name here: a generator keeps its variables while it
            # waits, and the next request may be long in coming.
            request = [Request(head, (yield from self._read_body(head)))]
            self.phase = "idle"
            self.head = None
            self._empty_line_skipped = False
            yield request.pop()

    def _read_body(self, head: Head) -> Generator[None, None, bytes]:
        """The body, without its codings."""
        buffer = self._buffer
        max_bytes = self._max_bytes_of(head)
        if head.length is not None and head.length > max_bytes:
            raise _body_too_large(max_bytes)
        self.phase = "body"
        self.wants_continue = head.expects_continue
        if head.length is None:
            body = yield from self._read_chunked_body(max_bytes)
        else:
            while len(buffer) < head.length:
                yield None
            body = bytes(buffer[: head.length])
            del buffer[: head.length]
        self.wants_continue = False
        if head.content_coding:
            self.is_busy = True
            body = yield from inflate(body, head.content_coding, max_bytes)
            self.is_busy = False
        return body

    def _max_bytes_of(self, head: Head) -> int:
        """How long the body may be. Raises HTTPError if it is not to be taken at all.

        A short body that is sent as it is costs nothing, so nobody is asked about it. A
        client that is refused behind it keeps its connection.
        """
        length = head.length
        is_plain = not head.content_coding and not head.expects_continue
        if length == 0 or (is_plain and length is not None and length <= MAX_UNWANTED_BODY_BYTES):
            return self._max_body_bytes
        if self._admit(head):
            return self._max_body_bytes
        return min(self._max_body_bytes, MAX_UNWANTED_BODY_BYTES)

    def _first_byte_is_there(self) -> bool:
        """Whether a request has begun.

        RFC 9112 §2.2: a server SHOULD ignore at least one empty line before it. Old
        clients send one after a body. A second one is refused: it is an empty request
        line.
        """
        buffer = self._buffer
        if not self._empty_line_skipped and buffer.startswith(b"\r"):
            if buffer == b"\r":
                return False
            if buffer.startswith(b"\r\n"):
                del buffer[:2]
                self._empty_line_skipped = True
        return bool(buffer)

    def _take_head(self) -> Optional[bytes]:
        """Take a head off the buffer; None if its end has not come."""
        try:
            self._check_beginning()
            return self._take(_HEAD)
        except HTTPError as error:
            error.origin = _origin_in(bytes(self._buffer))
            raise

    def _check_beginning(self) -> None:
        """Refuse as early as possible what begins as no request does."""
        buffer = self._buffer
        limit = MAX_REQUEST_LINE_BYTES
        if len(buffer) > limit + 1 and buffer.find(b"\r\n", 0, limit + 2) < 0:
            raise HTTPError("target-too-long", f"the request line is longer than {limit} bytes")
        if buffer.startswith(_OTHER_BEGINNINGS):
            for beginning in _OTHER_BEGINNINGS:
                if buffer.startswith(beginning):
                    raise _other_protocol(beginning)

    def _read_chunked_body(self, max_bytes: int) -> Generator[None, None, bytes]:
        """RFC 9112 §7.1: chunks, one of size 0, trailer fields, an empty line."""
        buffer = self._buffer
        body = bytearray()
        chunks = 0
        while True:
            line = self._take(_CHUNK_SIZE)
            while line is None:
                yield None
                line = self._take(_CHUNK_SIZE)
            size = _parse_chunk_size(line)
            if size == 0:
                break
            if len(body) + size > max_bytes:
                raise _body_too_large(max_bytes)
            chunks += 1
            if chunks > FREE_CHUNKS + len(body) // MIN_CHUNK_BYTES:
                raise HTTPError(
                    "bad-request",
                    f"the chunks of the body are too small: send {MIN_CHUNK_BYTES} bytes or more"
                    " in each",
                )
            while not self._chunk_is_whole(size):
                yield None
            body += buffer[:size]
            del buffer[: size + 2]
        yield from self._skip_trailer()
        return bytes(body)

    def _chunk_is_whole(self, size: int) -> bool:
        """Whether `size` bytes and the CR LF behind them are there.

        A wrong byte in the place of CR or LF is refused as soon as it has come.
        """
        behind = self._buffer[size : size + 2]
        if not b"\r\n".startswith(behind):
            raise HTTPError(
                "bad-request", "a chunk is not followed by CR LF where its size says it ends"
            )
        return len(behind) == 2

    def _skip_trailer(self) -> Generator[None, None, None]:
        """RFC 9112 §7.1.2: trailer fields may be discarded. They must be valid."""
        fields = 0
        taken = 0
        while fields <= MAX_FIELDS:
            line = self._take(_TRAILER, taken)
            while line is None:
                yield None
                line = self._take(_TRAILER, taken)
            if not line:
                return
            _parse_fields([line])
            taken += len(line)
            fields += 1
        raise HTTPError("headers-too-large", f"there are more than {MAX_FIELDS} trailer fields")

    def _take(self, part: _Part, taken: int = 0) -> Optional[bytes]:
        """Take a part and its end off the buffer; None if the end has not come.

        `taken` bytes of the part were taken before. Raises HTTPError for a part that is
        too long, whether its end has come or not, and for a line end that is not CR LF.
        """
        buffer = self._buffer
        found = buffer.find(part.end, self._search_from)
        length = found
        if found < 0:
            # Its end may have begun in the last bytes. All before them belong to it.
            length = len(buffer) - len(part.end) + 1
        if length > part.max_bytes - taken:
            raise HTTPError(part.problem, f"{part.name} is longer than {part.max_bytes} bytes")
        if found < 0:
            if _BARE_LINE_END.search(buffer, self._search_from):
                raise HTTPError(
                    "bad-request", f"{part.name} has a line that does not end with CR LF"
                )
            self._search_from = max(0, length)
            return None
        content = bytes(buffer[:found])
        del buffer[: found + len(part.end)]
        self._search_from = 0
        return content


def _parse_chunk_size(line: bytes) -> int:
    """Bytes of the chunk. RFC 9112 §7.1.1: unknown extensions MUST be ignored."""
    match = _CHUNK_SIZE_LINE.fullmatch(line)
    if match is None:
        raise HTTPError("bad-request", "a chunk does not start with its size in hexadecimal")
    return int(match["size"], 16)


def _body_too_large(max_bytes: int, when: str = "") -> HTTPError:
    return HTTPError(
        "too-large", f"the body has more than {max_bytes} bytes{when}: send less at a time"
    )


# ---- The content coding -----------------------------------------------------

# What zlib is told to expect, in its parameter `wbits`: the window of 2^15 bytes, plus
# 16 for gzip with its checksum, negative for a bare stream without header and checksum.
_WBITS_GZIP = 16 + zlib.MAX_WBITS
_WBITS_ZLIB = zlib.MAX_WBITS
_WBITS_RAW = -zlib.MAX_WBITS


class _Inflated(NamedTuple):
    plain: bytes
    # What stands behind the end of the compressed data.
    rest: bytes


# Each of the functions below is a generator, which yields None after each slice.
_Inflating = Generator[None, None, bytes]


def inflate(body: bytes, coding: str, max_bytes: int) -> _Inflating:
    """A body without its content coding: "gzip" or "deflate" (RFC 9110 §8.4.1).

    At most `max_bytes` come out: without a bound, 4 MB could become 4 GB. An empty body
    stays empty. Raises HTTPError for a body that is too large, cut off, damaged, or of
    another format.
    """
    if coding == "gzip":
        return (yield from _inflate_gzip(body, max_bytes))
    if not body:
        return b""
    inflated = yield from _inflate_once(body, coding, _deflate_wbits(body), max_bytes, 0)
    if inflated.rest:
        raise HTTPError("bad-request", "the deflate body goes on behind its end")
    return inflated.plain


def _inflate_gzip(body: bytes, max_bytes: int) -> _Inflating:
    """RFC 1952 §2.2: a gzip file is a series of members, one after the other."""
    parts: List[bytes] = []
    size = 0
    while body:
        if len(parts) == MAX_GZIP_MEMBERS:
            raise HTTPError(
                "bad-request", f"the gzip body has more than {MAX_GZIP_MEMBERS} members"
            )
        inflated = yield from _inflate_once(body, "gzip", _WBITS_GZIP, max_bytes, size)
        parts.append(inflated.plain)
        size += len(inflated.plain)
        body = inflated.rest
    return b"".join(parts)


def _deflate_wbits(body: bytes) -> int:
    """RFC 9110 §8.4.1.2: deflate is the zlib format; some send the bare stream instead.

    The first two bytes tell which it is. RFC 1950 §2.2: in the zlib format the low half
    of the first byte is 8, and both bytes together are a multiple of 31. A bare stream
    with this 8 would start with a stored block (RFC 1951 §3.2.4) and a bit of 1 in the
    unused bits behind its header; encoders write 0 there.
    """
    header = int.from_bytes(body[:2], "big")
    if header >> 8 & 15 == 8 and header % 31 == 0:
        return _WBITS_ZLIB
    return _WBITS_RAW


def _inflate_once(
    body: bytes, coding: str, wbits: int, max_bytes: int, size: int
) -> Generator[None, None, _Inflated]:
    """Inflate one stream; the streams before it gave `size` bytes of the body."""
    stream = zlib.decompressobj(wbits)
    parts: List[bytes] = []
    end = 0
    while not stream.eof:
        if end >= len(body):
            raise HTTPError("bad-request", f"the {coding} body is cut off")
        if end:
            yield None
        start = end
        end += INFLATE_SLICE_BYTES
        try:
            # A byte more than may come out: if it comes, the body is too large.
            plain = stream.decompress(body[start:end], max_bytes - size + 1)
        except zlib.error:
            raise HTTPError(
                "bad-request", f"the body is not {coding}, though its Content-Encoding says so"
            ) from None
        parts.append(plain)
        size += len(plain)
        if size > max_bytes:
            raise _body_too_large(max_bytes, " when inflated")
    return _Inflated(b"".join(parts), stream.unused_data + body[end:])


# ---- The response -----------------------------------------------------------


def http_date(instant_s: float) -> str:
    """Seconds since 1970 as an HTTP-date, the IMF-fixdate of RFC 9110 §5.6.7.

    The names are the English ones: Python leaves LC_TIME at "C", whatever the
    environment says.

    >>> http_date(0)
    'Thu, 01 Jan 1970 00:00:00 GMT'
    """
    return time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(instant_s))


def encode_response(
    response: Response,
    date: str,
    keep_alive: bool,
    head_only: bool = False,
    http_1_0: bool = False,
) -> bytes:
    """The bytes of an answer: its head, and its body unless that is a stream.

    `date` is an HTTP-date. With `head_only`, for HEAD, the head is the one that GET
    would get (RFC 9110 §9.3.2). A stream is sent chunked. In HTTP/1.0 it ends with the
    connection, so `keep_alive` must be false then.
    """
    body = response.body
    length = None
    if isinstance(body, bytes):
        length = len(body)
    head = _encode_head(
        response.status,
        response.content_type,
        response.headers,
        length,
        date,
        keep_alive,
        http_1_0,
    )
    if isinstance(body, bytes) and not head_only:
        return head + body
    return head


# Most answers of one second have the same head.
@functools.lru_cache(HEADS_KEPT)
def _encode_head(
    status: int,
    content_type: str,
    headers: FieldLines,
    length: Optional[int],
    date: str,
    keep_alive: bool,
    http_1_0: bool,
) -> bytes:
    lines = [
        f"HTTP/1.1 {status} {REASONS[status]}",
        f"Date: {date}",
        f"Server: aggregator/{__version__}",
        # What a publisher sent is never to be taken for a page.
        "X-Content-Type-Options: nosniff",
    ]
    # RFC 9110 §8.6: a 204 MUST NOT have a Content-Length.
    if status != 204:
        lines.append(f"Content-Type: {content_type}")
        if length is not None:
            lines.append(f"Content-Length: {length}")
        elif not http_1_0:
            lines.append("Transfer-Encoding: chunked")
    for name, value in headers:
        lines.append(f"{name}: {value}")
    # RFC 9112 §9.3: in HTTP/1.1 a close has to be said, in HTTP/1.0 that it is kept.
    if not keep_alive:
        lines.append("Connection: close")
    elif http_1_0:
        lines.append("Connection: keep-alive")
    lines.append("\r\n")
    return "\r\n".join(lines).encode("latin-1")


# ============================================================================
# §7  The live tail: followers see each event once it is committed
#
# A follower reads the log after a cursor, and waits for the next commit when it has
# read all. It holds nothing in memory but its cursor, so a slow reader costs nothing.
# There is no list of events per follower that could overflow: what a follower has not
# read yet is in the log, and stays there until retention removes it.
#
# All followers wait for one future, `_news`. The next commit resolves it, or the
# keep-alive timer, or the end. Those who then ask for the same events find the question
# already under way in `_asked` and share the answer. Each answers a little later than
# the one before, because 200 answers at once would hold publishers up.
#
# Knows §1, §4 and §5. Must not know HTTP.
#
#   * A follower sees every event after its cursor, in the order of seq, and none
#     twice.
#   * A follower whose cursor retention has overtaken is told so, and never skips in
#     silence.
#
# Simpler than a production system: the filter is applied by each follower's own query.
# A system with many thousand followers would match each event against all filters once.
# ============================================================================

# A silent tail says that it lives (WHATWG HTML §9.2.7: "every 15 seconds or so").
FOLLOW_KEEP_ALIVE_S = 15.0
# Commits that are closer together, in seconds, wake the followers once. A person who
# looks at a live list does not notice so little.
FOLLOW_GATHER_S = 0.05
# Each follower answers so many seconds later than the one before: 200 of them within 20
# ms, and publishers get their turns in between.
FOLLOW_SPREAD_S = 0.0001


class TailLimits(NamedTuple):
    """The times of a live tail, in seconds."""

    keep_alive_s: float = FOLLOW_KEEP_ALIVE_S
    gather_s: float = FOLLOW_GATHER_S
    spread_s: float = FOLLOW_SPREAD_S


class CursorExpired(Exception):
    """Events after the cursor have left the log: the follower came too late for them.

    It is an error, because to go on in silence would look as if nothing was missing.
    """

    problem = "gone"

    def __init__(self, after: int, oldest_seq: int) -> None:
        super().__init__(
            f"events after seq {after} have been removed; the oldest there is has"
            f" seq {oldest_seq}: to go on without the lost ones, follow with"
            f" after={oldest_seq - 1}"
        )
        self.oldest_seq = oldest_seq  # the first that is still there

    def problem_members(self) -> Dict[str, Any]:
        """What a problem document says besides the sentence (RFC 9457 §3.2)."""
        return {"oldest_seq": self.oldest_seq}


class CursorAhead(Exception):
    """The cursor names a seq that the log has not reached: it is of another store."""

    problem = "bad-parameter"


class LiveTail:
    """What the log gets, for many followers. Use it in the pipeline's loop."""

    def __init__(self, pipeline: Pipeline, limits: TailLimits = TailLimits()) -> None:
        self.followers = 0
        self._pipeline = pipeline
        self._limits = limits
        self._loop = asyncio.get_running_loop()
        self._ended = False
        # Owner: the event loop. All followers that have read everything wait for this
        # future. `_wake` resolves it once and makes room for the next. None: nobody
        # waits.
        self._news: Optional[asyncio.Future[None]] = None
        # When the followers were last woken, by the loop's clock.
        self._woken_s = 0.0
        # Questions to the reader's thread that are under way, by what was asked.
        self._asked: Dict[Tuple[EventQuery, int], asyncio.Future[Tail]] = {}
        pipeline.commit_listeners.append(self._on_commit)

    async def tail(self, query: EventQuery, after: Optional[int]) -> Tail:
        """What the log holds after `after`; None means: nothing yet, from now on.

        Followers that ask the same at the same time share one look into the store, so
        200 open pages cost one look. Raises CursorExpired, CursorAhead and StoreFailed.
        """
        if after is None:
            after = self._pipeline.newest_seq
        key = (query, after)
        if key not in self._asked:
            question = self._loop.create_task(self._pipeline.tail(query, after))
            question.add_done_callback(lambda _: self._asked.pop(key))
            self._asked[key] = question
        # Shielded, because others may wait for the same answer: when one client goes,
        # its coroutine is cancelled, and the shared question must not be.
        tail = await asyncio.shield(self._asked[key])
        if tail.newest < after:
            raise CursorAhead(
                f"there is no seq {after} yet, the newest is {tail.newest}: this cursor is of"
                " another store"
            )
        if tail.oldest > after + 1:
            raise CursorExpired(after, tail.oldest)
        return tail

    async def follow(self, query: EventQuery, tail: Tail) -> AsyncIterator[Tail]:
        """`tail` and all that comes after it, for as long as the caller likes.

        A Tail without seqs is a sign of life. It ends when the service stops, and when
        retention has overtaken the cursor. Raises StoreFailed.

        It may be interrupted at `yield`, while the client reads, and at each `await`.
        The cursor is in `tail`, so nothing gets lost meanwhile: the next look begins
        where the last one ended.
        """
        # The number of those who followed before: its turn to answer.
        turn = self.followers
        self.followers += 1
        try:
            spoken_s = self._loop.time()
            while True:
                silent_s = self._loop.time() - spoken_s
                if tail.seqs or silent_s >= self._limits.keep_alive_s:
                    yield tail
                    spoken_s = self._loop.time()
                    # Only the cursor is needed while we wait, and that may take days.
                    tail = tail._replace(seqs=tail.seqs[:0], lines="")
                if self._ended:
                    return
                # A follower that is late reads page after page without waiting.
                caught_up = tail.through >= tail.newest
                if caught_up:
                    await self._wait_for_news(tail.through)
                try:
                    tail = await self.tail(query, tail.through)
                except CursorExpired:
                    # The client will ask again and be told.
                    return
                if caught_up:
                    await asyncio.sleep(turn * self._limits.spread_s)
        finally:
            self.followers -= 1

    async def _wait_for_news(self, through: int) -> None:
        """Return after the next commit, when a sign of life is due, or at the end.

        The first that waits makes the future, and the timer that resolves it at the
        latest. A timer for a future that was resolved before does nothing.
        """
        if self._news is None:
            self._news = self._loop.create_future()
            self._loop.call_later(self._limits.keep_alive_s, self._wake, self._news)
        if self._pipeline.newest_seq > through:
            # There are news already: a commit came between the look and this line. Do
            # not run ahead of the others, who share one look.
            self._wake_soon(self._news)
        await asyncio.shield(self._news)

    def _on_commit(self) -> None:
        """Called by the pipeline after each commit. Nobody may be waiting."""
        if self._news is not None:
            self._wake_soon(self._news)

    def _wake_soon(self, news: "asyncio.Future[None]") -> None:
        """Wake the followers at once, unless they were woken a moment ago."""
        self._loop.call_at(self._woken_s + self._limits.gather_s, self._wake, news)

    def _wake(self, news: "asyncio.Future[None]") -> None:
        """Resolve `news`, unless somebody has done so before."""
        if self._news is news:
            self._news = None
            self._woken_s = self._loop.time()
            news.set_result(None)

    def end(self) -> None:
        """End all live tails."""
        self._ended = True
        if self._news is not None:
            self._wake(self._news)


# ============================================================================
# §8  API: each route at its handler
#
# A route is declared above the function that answers it: method, path, parameters,
# answers, problems. Everything else is derived from the declarations: which function
# answers, 404, 405 with Allow, HEAD and OPTIONS, who needs a token, and the documents
# of §10. So the service and what it says about itself cannot drift apart.
#
# A handler turns a request into calls of the pipeline, and the result into a response.
# What goes wrong is an exception. Its class carries the name of its problem, and the
# table PROBLEMS knows the rest.
#
# Knows §1 (events), §4 (the types of queries), §5 (pipeline), §6 (HTTP) and §7 (live
# tail). Must not know sockets or SQL.
#
#   * Every answer that is not a success is application/problem+json (RFC 9457).
#   * A route that has parameters refuses every other one: a misspelt filter must not
#     list everything. A route without parameters ignores the query.
#   * No answer may be cached: each is a statement about this moment.
#   * Routes are listed everywhere in the order of their declaration: the order of the
#     file. So whoever adds a route decides where readers find it by where it stands.
#
# The way of a request: `API.answer` finds the routes of its path, asks `Access` whether
# the client may, finds the route of its method, refuses unknown parameters, and calls
# the handler. Whatever is raised on that way becomes a refusal in one place.
#
# Simpler than a framework: a handler is an async function of (API, request, peer), and
# there is one kind of path with variable parts. More kinds would take a real router.
# ============================================================================

# A full queue is drained in well under a second (§5), so a client is asked to wait
# for one. A browser that lost a live tail waits for two.
RETRY_AFTER_S = 1
FOLLOW_RETRY_MS = 2000

# How far the time of a signed webhook may be from ours, in microseconds. All libraries
# of Standard Webhooks allow five minutes.
WEBHOOK_TOLERANCE_US = 5 * 60 * 1_000_000

# Topics, or sources, that GET /stats lists at most, if it is asked to: about 1 MB.
STATS_MOST_NAMES = 10_000

# Methods that change nothing (RFC 9110 §9.2.1, "safe"). Any other needs the right to
# write. PUT and DELETE are not safe, although to repeat them changes nothing more.
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")

JSON_TYPE = "application/json"
NDJSON_TYPE = "application/x-ndjson"
SSE_TYPE = "text/event-stream"
HTML_TYPE = "text/html; charset=utf-8"
TEXT_TYPE = "text/plain"


# ---- Problems: what can go wrong, and how it is said ----


# An exception class of any section says `problem = "queue-full"`, and that is all it
# knows of HTTP. It may have a method `problem_members`: what else a client should read.


class Problem(NamedTuple):
    """One way to refuse a request. RFC 9457 calls it a problem type."""

    status: int
    title: str
    advice: str  # when it is said, and what to do


# By the name that stands in the `type` of the answer, in the metrics and in the log. A
# name never changes its meaning: clients decide by it.
PROBLEMS: Dict[str, Problem] = {
    "bad-request": Problem(
        400,
        "The request is not valid HTTP/1.1",
        "not HTTP/1.1 as RFC 9112 has it; the detail says where",
    ),
    "bad-parameter": Problem(
        400,
        "A query parameter is not valid",
        "a query parameter is unknown, given twice, or has no such value",
    ),
    "not-json": Problem(
        400,
        "The body is not JSON",
        "the body is no JSON in UTF-8; the detail gives line and column",
    ),
    "unauthorized": Problem(
        401, "A token is needed", "`--token` is set: send `Authorization: Bearer TOKEN`"
    ),
    "forbidden": Problem(
        403,
        "This is not allowed from here, or with this token",
        "the token only reads, or a page of another site wants to write: `--allow-origin`",
    ),
    "not-found": Problem(404, "There is nothing here", "no such route; `GET /` lists them"),
    "no-such-event": Problem(404, "No such event", "this identity was never stored"),
    "method-not-allowed": Problem(405, "The method is not allowed here", "`Allow` lists what is"),
    "timeout": Problem(408, "The request took too long to arrive", "the request came too slowly"),
    "conflict": Problem(
        409,
        "This identity is taken by another event",
        "it holds another content: choose another `event_id`",
    ),
    "gone": Problem(
        410,
        "The event is no longer stored",
        "it was removed, and its id is still known; follow from `oldest_seq`",
    ),
    "too-large": Problem(
        413,
        "The body is too large",
        "it exceeds `--max-body`, as sent or inflated: send less at a time",
    ),
    "batch-too-large": Problem(
        413,
        "The batch is larger than the queue",
        "more than `--queue-max-size`: send fewer at a time",
    ),
    "target-too-long": Problem(
        414, "The request target is too long", "the request line exceeds 8,000 bytes"
    ),
    "unsupported-encoding": Problem(
        415, "The Content-Encoding is not supported", "only gzip and deflate are taken"
    ),
    "expectation-failed": Problem(
        417, "The expectation cannot be met", "only `100-continue` is met"
    ),
    "misdirected": Problem(
        421, "This host name is not ours", "on loopback and not a name of it: `--allow-host`"
    ),
    "invalid-event": Problem(
        422,
        "An event is not valid",
        "`errors` lists index, field and fault of all of them; nothing was taken",
    ),
    "headers-too-large": Problem(
        431, "The header fields are too large", "more than 32 KB or 100 fields"
    ),
    "internal-error": Problem(500, "The service has a bug", "please report the log"),
    "not-implemented": Problem(501, "This is not implemented", "unknown method or transfer coding"),
    "queue-full": Problem(
        503, "The queue is full", "retry after `Retry-After` seconds; nothing was taken"
    ),
    "store-unavailable": Problem(
        503,
        "The store cannot be written or read",
        "disk full, locked or broken; nothing was stored: retry",
    ),
    "stopping": Problem(503, "The service is stopping", "retry"),
    "too-many-connections": Problem(503, "Too many connections", "1,000 are open: retry"),
    "overloaded": Problem(
        503,
        "Too much is on its way at once",
        "more than 64 MB arrive and leave, and this was slow or came late: retry",
    ),
    "version-not-supported": Problem(
        505, "The HTTP version is not supported", "neither HTTP/1.1 nor HTTP/1.0"
    ),
}

# What any request may meet before its handler is found, and a request that finds none.
ANYWHERE = (
    "bad-request",
    "bad-parameter",
    "timeout",
    "too-large",
    "target-too-long",
    "unsupported-encoding",
    "expectation-failed",
    "misdirected",
    "headers-too-large",
    "internal-error",
    "not-implemented",
    "too-many-connections",
    "overloaded",
    "version-not-supported",
)
NOWHERE = ("not-found", "method-not-allowed")

# What a handler meets that reads the store, and one that publishes.
READING = ("unauthorized", "store-unavailable")
WRITING = ("not-json", "forbidden", "invalid-event", "queue-full", "stopping", *READING)


def problem_type(problem: str, path: Tuple[str, ...] = ()) -> str:
    """The `type` of a problem (RFC 9457 §3.1.1): its place in the reference.

    It is relative to the path of the request, so it is also right where a proxy puts
    something before all our paths. From /events/door/42, two steps up lead to the root.

    >>> problem_type("gone", ("events", "door", "42"))
    '../../docs#gone'
    """
    return "../" * (len(path) - 1) + "docs#" + problem


def refusal_of(error: Exception) -> HTTPError:
    """Any exception as a refusal.

    Its class names the problem. An error without a name is a bug, and logged with its
    traceback; the client only hears that it is our fault.

    >>> refusal_of(Stopping("soon")).problem
    'stopping'
    """
    if isinstance(error, HTTPError):
        return error
    problem = getattr(error, "problem", None)
    if problem not in PROBLEMS:
        log.error("a bug while answering a request", exc_info=error)
        return HTTPError("internal-error", "this is our fault; the log says more")
    members: Dict[str, Any] = {}
    if hasattr(error, "problem_members"):
        members = error.problem_members()
    return HTTPError(problem, str(error), **members)


def problem_response(error: HTTPError) -> Response:
    """A refusal as problem details (RFC 9457).

    `type` is for programs and never changes its meaning. `detail` is for people and may
    change with any version. Every 503 says when to come again (RFC 9110 §10.2.3).
    """
    problem = PROBLEMS[error.problem]
    details = {
        "type": problem_type(error.problem, error.path),
        "title": problem.title,
        "status": problem.status,
        "detail": error.detail,
        **error.members,
    }
    headers = error.headers
    if problem.status == 503:
        headers += (("Retry-After", str(RETRY_AFTER_S)),)
    return respond(problem.status, json_bytes(details), "application/problem+json", headers)


# ---- Responses ----

NO_STORE: FieldLines = (("Cache-Control", "no-store"),)
VARY_ACCEPT: FieldLines = (("Vary", "Accept"),)


def json_bytes(value: Any) -> bytes:
    """A value as one line of compact JSON.

    A path of the system need not be UTF-8. What cannot be encoded is shown as an
    escape.
    """
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", "backslashreplace") + b"\n"


def respond(
    status: int,
    body: Union[bytes, AsyncGenerator[bytes, None]],
    content_type: str = JSON_TYPE,
    headers: FieldLines = (),
) -> Response:
    """A response that no cache keeps. Every response is made here."""
    return Response(status, body, content_type, NO_STORE + headers)


def json_response(status: int, value: Any) -> Response:
    """A value as JSON."""
    return respond(status, json_bytes(value))


def stream_response(pieces: AsyncGenerator[bytes, None], content_type: str) -> Response:
    """Pieces that are sent as they come; the length is not known before the end."""
    # nginx would collect them first; this field tells it not to.
    return respond(200, pieces, content_type, (("X-Accel-Buffering", "no"),))


def html_response(document: str, policy: str) -> Response:
    """A page for a browser. `policy` is its content_policy."""
    headers = (("Content-Security-Policy", policy), ("Referrer-Policy", "no-referrer"))
    return respond(200, document.encode("utf-8"), HTML_TYPE, headers)


def html_document(title: str, style: str, body: str) -> str:
    """A whole document; `body` is HTML."""
    # The empty icon keeps browsers from asking for one.
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f'<title>{title}</title><link rel="icon" href="data:,">'
        f"<style>{style}</style><body>{body}</html>\n"
    )


@functools.lru_cache(maxsize=None)
def content_policy(style: str, script: str = "") -> str:
    """A Content-Security-Policy: this style, this script, nothing from elsewhere.

    They are named by their hashes (CSP 3 §2.3.1), so nothing that a publisher sent can
    become code, even if it should get into the page unescaped. Nobody may show the page
    in a frame (`frame-ancestors`), and no form of it leads anywhere. The result is
    remembered: there are a few pages, and their texts do not change.
    """

    def _hash_source(text: str) -> str:
        digest = b2a_base64(sha256(text.encode("utf-8")).digest(), newline=False)
        return f"'sha256-{digest.decode('ascii')}'"

    rules = [
        "default-src 'none'",
        "script-src " + (_hash_source(script) if script else "'none'"),
        "style-src " + _hash_source(style),
        "connect-src 'self'",
        "img-src data:",
        "form-action 'none'",
        "base-uri 'none'",
        "frame-ancestors 'none'",
    ]
    return "; ".join(rules)


def accepts(request: Request, media_type: str) -> bool:
    """Whether the client names this media type. `*/*` does not count: it gets JSON.

    Weights (`;q=`) are not looked at: whoever names one of our special types wants it.
    """
    for part in request.head.headers.get("accept", "").split(","):
        if part.partition(";")[0].strip(" \t").lower() == media_type:
            return True
    return False


# ---- Routes: how they are declared, and which one answers ----

# What a declaration is made of. `Route` has everything that the service needs to find
# the handler, and everything that §10 needs to explain it. Examples are text, as they
# come over the wire, so that a reader of this file sees what a client sees.

Schema = Dict[str, Any]  # JSON Schema, 2020-12


class Field(NamedTuple):
    """A named value in a request or an answer, as the documents of §10 explain it."""

    name: str
    example: Any
    schema: Schema
    meaning: str


class Body(NamedTuple):
    """A form in which a request may come."""

    media_type: str
    example: str  # as on the wire
    schema: Schema
    meaning: str


class Answer(NamedTuple):
    """A success: when it is given, an example, and what is special about its request.

    The body of the request is the example of the body that `headers` announce by their
    Content-Type, else of the first. Without a `path` of its own it goes to that of the
    route, with the examples of its parts.
    """

    status: int
    meaning: str
    # As on the wire; JSON may have blanks and line ends.
    example: str
    content_type: str = JSON_TYPE
    ask: str = ""  # the query, with its question mark
    path: str = ""
    headers: FieldLines = ()


# (API, request, address of the client) to a response. It raises what goes wrong.
Handler = Callable[["API", Request, str], Awaitable[Response]]


class Route(NamedTuple):
    """What a handler answers, and what it needs to be asked.

    In `path`, a part in braces takes one segment; {topic} takes all that the others
    leave. `problems` are those that it may have besides ANYWHERE.
    """

    method: str
    path: str
    handler: Handler
    query: Tuple[Field, ...]
    query_names: FrozenSet[str]
    headers: Tuple[Field, ...]
    bodies: Tuple[Body, ...]
    answers: Tuple[Answer, ...]
    problems: Tuple[str, ...]
    # Whether the answer depends on the Accept field.
    is_negotiated: bool

    @property
    def name(self) -> str:
        """Its name in the documents."""
        return self.handler.__name__

    @property
    def summary(self) -> str:
        """What it does: the first line of the handler's docstring."""
        # `python3 -OO` takes the docstrings away; the service then works without words.
        return (self.handler.__doc__ or "").partition("\n")[0].rstrip(".")

    @property
    def is_open(self) -> bool:
        """Whether it needs no token: it shows no data."""
        return "unauthorized" not in self.problems


# Filled by the declarations as the file is read, in their order. Nothing adds later.
ROUTES: List[Route] = []


def route(
    method: str,
    path: str,
    *,
    answers: Tuple[Answer, ...],
    problems: Tuple[str, ...] = (),
    query: Tuple[Field, ...] = (),
    headers: Tuple[Field, ...] = (),
    bodies: Tuple[Body, ...] = (),
) -> Callable[[Handler], Handler]:
    """Declare the function below as the handler of a route.

        @route("GET", "/health", answers=(Answer(200, "they can", '{"status": "ok"}'),))
        async def get_health(api, request, peer):
            \"""Whether events can be stored right now.\"""

    Its name and the first line of its docstring stand in the documents. A route that
    does not list the problem "unauthorized" is open: it needs no token. If its answers
    have several media types, the client chooses by the Accept field.
    """
    query_names = frozenset([field.name for field in query])
    is_negotiated = len({answer.content_type for answer in answers}) > 1

    def declare(handler: Handler) -> Handler:
        ROUTES.append(
            Route(
                method,
                path,
                handler,
                query,
                query_names,
                headers,
                bodies,
                answers,
                problems,
                is_negotiated,
            )
        )
        return handler

    return declare


def routes_listed() -> List[Dict[str, str]]:
    """What GET / says about the routes: method, path and one sentence for each."""
    listed = []
    for each in ROUTES:
        listed.append({"method": each.method, "path": each.path, "summary": each.summary})
    return listed


class PathTemplate(NamedTuple):
    """A path with variable parts: a fixed start, and the least number of segments."""

    start: Tuple[str, ...]
    least: int

    @classmethod
    def of(cls, path: str) -> "PathTemplate":
        """The template of a declared path.

        A topic may have slashes, so the number of segments is a least one.

        >>> PathTemplate.of("/events/{topic}/{event_id}")
        PathTemplate(start=('events',), least=3)
        """
        segments = path[1:].split("/")
        start = tuple(itertools.takewhile(lambda segment: "{" not in segment, segments))
        return cls(start, len(segments))

    def fits(self, path: Tuple[str, ...]) -> bool:
        """Whether these segments may be such a path.

        >>> template = PathTemplate.of("/events/{topic}/{event_id}")
        >>> template.fits(("events", "logs", "web", "7"))
        True
        """
        return len(path) >= self.least and path[: len(self.start)] == self.start


class RouteTable:
    """Finds the routes of a path.

    A path without variable parts is found by one look into a dictionary. Only then are
    the templates tried, of which there are few.
    """

    def __init__(self, routes: Sequence[Route]) -> None:
        self._by_path: Dict[Tuple[str, ...], Dict[str, Route]] = {}
        self._by_template: Dict[PathTemplate, Dict[str, Route]] = {}
        for each in routes:
            if "{" in each.path:
                methods = self._by_template.setdefault(PathTemplate.of(each.path), {})
            else:
                methods = self._by_path.setdefault(tuple(each.path[1:].split("/")), {})
            methods[each.method] = each

    def at(self, path: Tuple[str, ...]) -> Dict[str, Route]:
        """The routes of a path by their methods; none if there is nothing."""
        exact = self._by_path.get(path)
        if exact is not None:
            return exact
        # A path may fit several templates, each with methods of its own.
        found: Dict[str, Route] = {}
        for template, methods in self._by_template.items():
            if template.fits(path):
                found.update(methods)
        return found


def allow_value(methods: Iterable[str]) -> str:
    """The Allow field (RFC 9110 §10.2.1).

    OPTIONS is answered everywhere, and HEAD where GET is.

    >>> allow_value(["PUT", "GET"])
    'GET, HEAD, OPTIONS, PUT'
    """
    allowed = {"OPTIONS", *methods}
    if "GET" in allowed:
        allowed.add("HEAD")
    return ", ".join(sorted(allowed))


# ---- Access: who may do what ----

_PORT = re.compile(r":[0-9]*\Z")


# Most clients ask for one and the same host.
@functools.lru_cache(64)
def _without_port(host: str) -> str:
    """The name in a Host field, in small letters.

    >>> _without_port("LocalHost:8000"), _without_port("[::1]:8000")
    ('localhost', '[::1]')
    """
    return _PORT.sub("", host.lower())


class Access(NamedTuple):
    """Who may do what.

    Each of `tokens` allows everything, each of `read_tokens` what changes nothing.
    Without `tokens` everyone may do everything. `hosts` are the names that a request
    may be addressed to; empty means any. `origins` are the foreign pages that may
    write, and read the answers. "*" in either of the two stands for all.

    A topic in `webhooks` takes POST /events/{topic} from whoever signs with one of its
    secrets, without a token. `webhook_tolerance_us` is how far the time of a signature
    may be from now, in microseconds; 0 for any.
    """

    tokens: Tuple[str, ...] = ()
    read_tokens: Tuple[str, ...] = ()
    hosts: FrozenSet[str] = frozenset()
    origins: FrozenSet[str] = frozenset()
    webhooks: Mapping[str, Tuple[str, ...]] = {}
    webhook_tolerance_us: int = WEBHOOK_TOLERANCE_US

    def check(self, head: Head, routes: Dict[str, Route]) -> None:
        """Refuse who may not ask this. Raises HTTPError.

        `routes` are those of the path.

        A page in a browser on this machine can send to localhost. By a name that
        resolves to 127.0.0.1 (DNS rebinding) it can also read what comes back. The
        fields Host and Origin tell it apart from an honest client: a browser sets them
        itself, and no page can change them.

        OPTIONS needs no token: browsers ask without one before they send.
        """
        if self.hosts and "*" not in self.hosts:
            self._check_host(head)
        if "origin" in head.headers and head.method not in SAFE_METHODS:
            self._check_origin(head)
        if self.tokens and head.method != "OPTIONS":
            self._check_token(head, routes)

    def _check_host(self, head: Head) -> None:
        """The host must be one of ours."""
        host = head.headers["host"]
        # HTTP/1.0 may come without a host. No browser sends it.
        if host and _without_port(host) not in self.hosts:
            raise HTTPError(
                "misdirected", f"nobody here is called {shown(host)}: --allow-host adds a name"
            )

    def _check_origin(self, head: Head) -> None:
        """A page may write if it came from here (RFC 6454 §7), or is allowed to.

        Only writing is checked. A foreign page that reads gets no answer to see, unless
        `_shared_with` lets the browser show it.
        """
        origin = head.headers["origin"]
        # TLS may end at a proxy before us, so the scheme tells nothing.
        is_ours = origin.lower().partition("://")[2] == head.headers["host"].lower()
        if not is_ours and not self.allows(origin):
            raise HTTPError(
                "forbidden",
                f"a page of {shown(origin)} may not write here: --allow-origin adds an origin",
            )

    def _check_token(self, head: Head, routes: Dict[str, Route]) -> None:
        """The right token, or a path that needs none. An unknown path needs one.

        Without any token it is 401. The last question is what the token allows: a read
        token is right, but not for writing, and that is 403.
        """
        if routes and all(each.is_open for each in routes.values()):
            return
        if self.secrets_for(head):
            # The signature covers the body, so the handler looks at it.
            return
        if self.knows(head, self.tokens):
            return
        if not self.knows(head, self.read_tokens) and not self._may_follow(head):
            raise HTTPError(
                "unauthorized",
                "send Authorization: Bearer and the token",
                (("WWW-Authenticate", "Bearer"),),
            )
        if head.method not in SAFE_METHODS:
            raise HTTPError(
                "forbidden",
                "this token is for reading only",
                (("WWW-Authenticate", 'Bearer error="insufficient_scope"'),),
            )

    def secrets_for(self, head: Head) -> Tuple[str, ...]:
        """The secrets one of which must have signed this request; none for most.

        Who sends a token for everything need not sign. Whoever answers a request that
        has secrets must verify its signature: nobody else does.
        """
        if not self.webhooks or head.method != "POST" or head.path[0] != "events":
            return ()
        secrets = self.webhooks.get("/".join(head.path[1:]), ())
        if secrets and self.tokens and self.knows(head, self.tokens):
            return ()
        return secrets

    def _may_follow(self, head: Head) -> bool:
        """Whether the address itself carries a read token, and asks for a live tail.

        The EventSource of a browser cannot send a field of its own, so it is the one
        that needs this (RFC 6750 §2.3). Addresses get into logs, histories and Referer
        fields. It is safe enough here for four reasons: only a read token is taken, and
        only for a live tail. Our log has paths and never a query. The address of an
        EventSource is in no history and no Referer. And the answer is kept by no cache.
        A proxy in front may log addresses: then give browsers a read token of their
        own, and replace it now and then.
        """
        is_tail = head.path == ("events",) and "follow" in head.query
        given = head.query.get("access_token")
        if not is_tail or given is None or head.method not in SAFE_METHODS:
            return False
        return is_one_of(given.encode("utf-8"), self.read_tokens)

    def allows(self, origin: str) -> bool:
        """Whether a page of this origin ("https://shop.example") may write and read."""
        return origin.lower() in self.origins or "*" in self.origins

    def knows(self, head: Head, tokens: Sequence[str]) -> bool:
        """Whether the request carries one of these tokens (RFC 6750 §2.1)."""
        scheme, _, given = head.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            return False
        return is_one_of(given.strip(" ").encode("latin-1"), tokens)


def is_one_of(presented: bytes, tokens: Sequence[str]) -> bool:
    """Whether this is one of the tokens; how long it takes betrays nothing.

    A plain `==` stops at the first difference. From thousands of answer times somebody
    could learn a token letter by letter.
    """
    # Not at the top: small systems have it in a package of its own.
    import hmac

    known = False
    # Every token is compared, and each comparison takes as long wherever the two
    # differ.
    for token in tokens:
        if hmac.compare_digest(presented, token.encode("ascii")):
            known = True
    return known


# ---- API: from a request to its answer ----


class API:
    """Answers requests.

    `clock` gives microseconds since 1970 UTC, `random_id` a fresh event id;
    `limits_shown` is what GET /stats says about the limits. `access` and `connections`
    may be replaced before the first request. Handlers use the public attributes.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        live_tail: LiveTail,
        clock: Callable[[], int],
        random_id: Callable[[], str],
        limits_shown: Dict[str, Any],
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self.pipeline = pipeline
        self.live_tail = live_tail
        self.clock = clock
        self.random_id = random_id
        self.access = Access()
        # "http" or "https": how this service is spoken to. The program sets it.
        self.scheme = "http"
        # How many connections are open; the server replaces it, if there is one.
        self.connections: Callable[[], int] = lambda: 0
        self.started_us = clock()
        # The uptime goes by a clock that nobody can set: it never falls.
        self._monotonic_s = monotonic_s
        self._started_s = monotonic_s()
        # Who signed wrongly since he last signed rightly: topic and address (webhooks).
        self.wrong_signers: Dict[Tuple[str, str], None] = {}
        # Requests refused, by problem.
        self.refused = dict.fromkeys(PROBLEMS, 0)
        self._limits_shown = limits_shown
        self._table = RouteTable(ROUTES)

    async def answer(self, request: Request, peer: str) -> Response:
        """The response to a request from the address `peer`.

        Raises nothing but asyncio.CancelledError, which comes when the client goes away
        or the service stops. This is the one place where an exception becomes an
        answer. A refused read is logged at DEBUG only: it changed nothing, and anybody
        could fill the log with it.
        """
        try:
            response = await self._handle(request, peer)
        except Exception as error:
            refusal = refusal_of(error)
            refusal.name_request(request.head.path, request.head.headers)
            response = self.refuse(refusal, peer, request.head.method)
            # This frame keeps `refusal`, and the traceback keeps this frame and all
            # below it: the request would stay in memory until Python looks for cycles.
            for each in (error, refusal):
                each.__traceback__ = None
                each.__context__ = None
                each.__cause__ = None
            return response
        if "origin" in request.head.headers:
            return self._shared(response, request.head.headers["origin"])
        return response

    def refuse(self, error: HTTPError, peer: str, method: str = "") -> Response:
        """The answer to a refused request of an address; it is counted and logged.

        `method` is "" if it is not known.
        """
        who = peer
        if error.path:
            request = f"{method} {_shown_path(error.path)}"
            who = f"{peer}, {request.strip()}"
        level = logging.WARNING
        if error.is_known or method in SAFE_METHODS:
            level = logging.DEBUG
        # The status is part of the format, so each is a kind of line to `LogLimit`: a
        # flood of bad bodies does not hide who tries tokens.
        log.log(level, f"REFUSED {PROBLEMS[error.problem].status} - %s: %s", who, error.detail)
        self.refused[error.problem] += 1
        return self._shared(problem_response(error), error.origin)

    def _shared(self, response: Response, origin: str) -> Response:
        """The response, which a page of `origin` may read if it is allowed to."""
        if origin and self.access.allows(origin):
            return _shared_with(response, origin)
        return response

    async def numbers(
        self, topics: int = STATS_MAX_NAMES, sources: int = STATS_MAX_NAMES
    ) -> Dict[str, Any]:
        """What GET /stats answers, with so many names. Raises StoreFailed.

        The pipeline knows the books; what is added here only the API knows.
        """
        numbers = await self.pipeline.stats(topics, sources)
        numbers["subscribers"] = self.live_tail.followers
        numbers["uptime_seconds"] = round(self._monotonic_s() - self._started_s, 3)
        numbers["version"] = __version__
        numbers["limits"] = self._limits_shown
        return numbers

    async def _handle(self, request: Request, peer: str) -> Response:
        """The answer of the right handler. Raises whatever it raises.

        HEAD is handled as GET; its body is left out when the response is written.
        """
        head = request.head
        routes = self._table.at(head.path)
        found = self._choose(head, routes)
        if found is None:
            return self._options(head, routes)
        if found.query and head.query:
            _refuse_unknown_parameters(found, head.query)
        response = await found.handler(self, request, peer)
        if found.is_negotiated:
            response = _with_headers(response, VARY_ACCEPT)
        return response

    def admit(self, head: Head) -> bool:
        """Whether the body of this request is wanted. Raises HTTPError.

        The server asks before it takes a large body: a stranger must not have one kept
        or inflated. `answer` checks the same again, with all the rest.
        """
        found = self._choose(head, self._table.at(head.path))
        return found is not None and bool(found.bodies)

    def _choose(self, head: Head, routes: Dict[str, Route]) -> Optional[Route]:
        """The route of `routes` that answers; None for OPTIONS. Raises HTTPError.

        Access is checked first: a stranger learns nothing about routes.
        """
        self.access.check(head, routes)
        if head.method == "OPTIONS":
            return None
        if not routes:
            raise HTTPError(
                "not-found", f"there is no {_shown_path(head.path)}; GET / lists what there is"
            )
        found = routes.get("GET" if head.method == "HEAD" else head.method)
        if found is None:
            allow = allow_value(routes)
            raise HTTPError("method-not-allowed", f"use {allow}", (("Allow", allow),))
        return found

    def _options(self, head: Head, routes: Dict[str, Route]) -> Response:
        """What may be done here (RFC 9110 §9.3.7); browsers ask before they send."""
        if head.path == ("*",):
            allow = allow_value([each.method for each in ROUTES])
        elif routes:
            allow = allow_value(routes)
        else:
            raise HTTPError(
                "not-found", "there is nothing here to ask about; GET / lists what there is"
            )
        headers: FieldLines = (("Allow", allow),)
        # A preflight of a browser (Fetch standard, "CORS-preflight"). It may remember
        # the answer for ten minutes.
        if "access-control-request-method" in head.headers:
            headers += (
                ("Access-Control-Allow-Methods", allow),
                ("Access-Control-Max-Age", "600"),
                (
                    "Access-Control-Allow-Headers",
                    "Authorization, Content-Encoding, Content-Type, Idempotency-Key, Last-Event-ID",
                ),
            )
        return respond(204, b"", headers=headers)


def _shared_with(response: Response, origin: str) -> Response:
    """The response, readable for a page of `origin` (CORS, Fetch standard).

    It names the origin that was allowed, and never says "*". So Vary has to say that
    another origin gets another answer.
    """
    headers = (
        ("Access-Control-Allow-Origin", origin),
        ("Access-Control-Expose-Headers", "Retry-After"),
        ("Vary", "Origin"),
    )
    return _with_headers(response, headers)


def _with_headers(response: Response, headers: FieldLines) -> Response:
    """The response with further header fields, after those that it has."""
    return response._replace(headers=response.headers + headers)


def _shown_path(path: Tuple[str, ...]) -> str:
    """The decoded path of a request, as it may stand in a message or the log."""
    return shown("/" + "/".join(path))


def _refuse_unknown_parameters(found: Route, query: Dict[str, str]) -> None:
    """Refuse `?topci=door`: to ignore it would list everything. Raises HTTPError."""
    for name in query:
        if name not in found.query_names:
            known = ", ".join([field.name for field in found.query])
            raise HTTPError(
                "bad-parameter", f"{found.path} has no parameter {shown(name)}; it has: {known}"
            )


# ---- Fields: what events and queries are made of, and how parameters are read ----

# The schemas say what the service takes, as far as a pattern can say it: a program that
# was made from the document refuses a wrong value before it is sent. The functions
# below decide. A test holds both to the same cases.

# Control characters, by the escapes that Python and ECMAScript share.
_CONTROL = r"\u0000-\u001f\u007f-\u009f"
# What §1 takes as an instant: the calendar is in it, with its leap years. Only an
# offset that leads out of the years 0001 to 9999 is beyond a pattern.
_YEAR = "(?:[1-9][0-9]{3}|0[0-9]{2}[1-9]|0[0-9][1-9]0|0[1-9]00)"
_MULTIPLE_OF_4 = "(?:0[48]|[2468][048]|[13579][26])"
_LEAP_YEAR = f"(?:[0-9]{{2}}{_MULTIPLE_OF_4}|{_MULTIPLE_OF_4}00)"
_DAY_OF_YEAR = (
    "(?:(?:0[1-9]|1[0-2])-(?:0[1-9]|1[0-9]|2[0-8])"
    "|(?:0[13-9]|1[0-2])-(?:29|30)"
    "|(?:0[13578]|1[02])-31)"
)
_TIME_OF_DAY = (
    "(?:[01][0-9]|2[0-3]):[0-5][0-9](?::(?:[0-5][0-9]|60)(?:[.,][0-9]{1,30})?)?"
    "(?:[Zz]|[+-](?:[01][0-9]|2[0-3])(?::?[0-5][0-9])?)?"
)
_ISO_8601 = f"(?:{_YEAR}-{_DAY_OF_YEAR}|{_LEAP_YEAR}-02-29)(?:[Tt ]{_TIME_OF_DAY})?"
# How long ago, up to a thousand years.
_AGE = "(?:[0-9]{1,9}(?:us|ms|s)|[0-9]{1,8}m|[0-9]{1,6}h|[0-9]{1,5}d|[0-9]{1,4}w)"


def text_schema(pattern: str, **more: Any) -> Schema:
    """The JSON Schema of a text that matches `pattern` as a whole."""
    return {"type": "string", "pattern": f"^{pattern}$", **more}


_TEXT_SCHEMA: Schema = {"type": "string"}
_SOME_TEXT_SCHEMA: Schema = {"type": "string", "pattern": r"\S"}
_NAME_SCHEMA = text_schema(
    f"[^{_CONTROL}]*[^\\s{_CONTROL}][^{_CONTROL}]*", minLength=1, maxLength=MAX_NAME_BYTES
)
INSTANT_SCHEMA = text_schema(_ISO_8601)
_SINCE_SCHEMA = text_schema(f"(?:{_ISO_8601}|{_AGE}|today|yesterday)")
_OFFSET_SCHEMA = text_schema(r"(?:[+ -](?:[01][0-9]|2[0-3]):[0-5][0-9]|Z)", default="Z")
_NAMES_SCHEMA: Schema = {
    "type": "integer",
    "minimum": 0,
    "maximum": STATS_MOST_NAMES,
    "default": STATS_MAX_NAMES,
}
_SEQ_SCHEMA = text_schema("[0-9]{1,18}")
_COUNT_SCHEMA: Schema = {"type": ["integer", "null"], "minimum": 0, "maximum": MAX_SEQUENCE}
_KEY_SCHEMA = text_schema(f"[^{_CONTROL}]*", maxLength=MAX_NAME_BYTES - 2)
_LIMIT_SCHEMA: Schema = {
    "type": "integer",
    "minimum": 1,
    "maximum": PAGE_MAX,
    "default": PAGE_DEFAULT,
}
_ORDER_SCHEMA: Schema = {"type": "string", "enum": ["asc", "desc"], "default": "asc"}
_OFF_SCHEMA: Schema = {"type": "string", "enum": ["0", "1", "false", "true"], "default": "0"}
_ON_SCHEMA: Schema = {**_OFF_SCHEMA, "default": "1"}

# What an event is made of.
TOPIC = Field(
    "topic",
    "door",
    _NAME_SCHEMA,
    "1 to 255 bytes in UTF-8, not blank, no control characters; `/` makes it hierarchical",
)
EVENT_ID = Field(
    "event_id", "42", _NAME_SCHEMA, "the same; its producer never uses it again for another event"
)
TIMESTAMP = Field(
    "timestamp",
    "2026-01-01T13:00:00+01:00",
    INSTANT_SCHEMA,
    "ISO 8601; no offset is UTC, no time is midnight; PUT takes the present without it",
)
SOURCE = Field(
    "source",
    "hall",
    _NAME_SCHEMA,
    "who says so, by the same rules; PUT takes the peer's address without it",
)
PAYLOAD = Field(
    "payload",
    {"n": 1},
    {"type": "object", "additionalProperties": {}},
    f"what happened, at most {MAX_NESTING} levels deep, with numbers that a double can hold",
)
SEQUENCE = Field("sequence", 7, _COUNT_SCHEMA, "optional: the producer's own counter")
EVENT_FIELDS = (TOPIC, EVENT_ID, TIMESTAMP, SOURCE, PAYLOAD, SEQUENCE)

# What else a request may say.
WAIT = Field("wait", "0", _ON_SCHEMA, "0 answers before the commit")
VERDICTS = Field("verdicts", "1", _OFF_SCHEMA, "1 lists a verdict for each event")
EXPLAIN = Field("explain", "1", _OFF_SCHEMA, "1 also says how each verdict came about")
TOPIC_FILTER = Field(
    "topic",
    "door*",
    _TEXT_SCHEMA,
    "only this topic, or those that begin with what stands before a final `*`",
)
SOURCE_FILTER = Field("source", "hall", _TEXT_SCHEMA, "only this source")
CONTAINS = Field(
    "contains",
    "door",
    text_schema(".+"),
    "only with this text in a name or a value of the payload, capitals as they are",
)
SINCE = Field(
    "since",
    "7d",
    _SINCE_SCHEMA,
    "from this instant on, or so long ago: `10m`, `2h`, `7d`; `today` and `yesterday` begin"
    " at midnight",
)
UNTIL = Field("until", "2026-01-02", _SINCE_SCHEMA, "before this instant, or so long ago")
TZ = Field("tz", "+02:00", _OFFSET_SCHEMA, "whose midnight counts, as an offset from UTC")
LIMIT = Field("limit", 10, _LIMIT_SCHEMA, "at most so many")
CURSOR = Field(
    "cursor",
    "a17.1",
    text_schema(r"[ad]-?[0-9]{1,18}\.[0-9]{1,18}"),
    "`next` of an answer in this order",
)
ORDER = Field("order", "desc", _ORDER_SCHEMA, "by time, then by seq")
FOLLOW = Field(
    "follow",
    "1",
    _OFF_SCHEMA,
    "1 never ends: what is stored after `after`, in order of seq, then whatever comes",
)
AFTER = Field("after", "0", _SEQ_SCHEMA, "with `follow`: the seq to begin behind; without it, now")
LAST_EVENT_ID = Field(
    "Last-Event-ID",
    "1",
    _SEQ_SCHEMA,
    "with `follow`: outranks `after`; browsers send it by themselves",
)
IDEMPOTENCY_KEY = Field(
    "Idempotency-Key",
    "log-1",
    _KEY_SCHEMA,
    "with `text/plain`: names each event, with its line number; without it names are random",
)

ACCESS_TOKEN = Field(
    "access_token",
    "s3cret",
    _TEXT_SCHEMA,
    "with `follow`: a `--read-token`, for an EventSource, which cannot send it in a field",
)

DAY_US = 86_400_000_000
# `since` and `until` by name: how many days before today they begin.
_DAYS_AGO = {"today": 0, "yesterday": 1}
# "+" in a query stands for a blank.
_OFFSET_TEXT = re.compile("(?P<sign>[+ -])(?P<hours>[01][0-9]|2[0-3]):(?P<minutes>[0-5][0-9])")
_SEQ_TEXT = re.compile("[0-9]{1,18}")
_LIMIT_TEXT = re.compile("[0-9]{1,9}")
_CURSOR_TEXT = re.compile(r"(?P<order>[ad])(?P<timestamp>-?[0-9]{1,18})\.(?P<seq>[0-9]{1,18})")
# A blank where an offset has its plus: "+" in a query stands for a blank.
_LOST_PLUS = re.compile(r"(?<=[0-9]) ([0-9]{2}:?(?:[0-9]{2})?)\Z")
# "2026-01-01 10:00" is shorter than any time with an offset: its blank is meant.
_SHORTEST_WITH_OFFSET = 17


# Whoever reads a parameter names it and its value in the refusal. Digits are checked
# before int(), which would also take signs, blanks, underscores and other alphabets.


def bad_parameter(name: str, expected: str, value: str) -> HTTPError:
    """The refusal of a parameter that has no such value."""
    return HTTPError("bad-parameter", f"{name} must be {expected}, not {shown(value)}")


def read_flag(query: Dict[str, str], name: str, default: bool) -> bool:
    """A parameter that is 0 or 1, or false or true. Raises HTTPError.

    >>> read_flag({"wait": "0"}, "wait", default=True)
    False
    """
    text = query.get(name)
    if text is None:
        return default
    if text.lower() in ("1", "true"):
        return True
    if text.lower() in ("0", "false"):
        return False
    raise bad_parameter(name, "0 or 1", text)


def read_limit(query: Dict[str, str]) -> int:
    """`limit`: how many are wanted at most. Raises HTTPError."""
    text = query.get("limit")
    if text is None:
        return PAGE_DEFAULT
    if _LIMIT_TEXT.fullmatch(text) and 1 <= int(text) <= PAGE_MAX:
        return int(text)
    raise bad_parameter("limit", f"a number from 1 to {PAGE_MAX}", text)


def read_instant(query: Dict[str, str], name: str, now_us: int) -> Optional[int]:
    """`since` or `until`, an instant or how long ago, to microseconds since 1970.

    `today` and `yesterday` begin at the midnight of `tz`. None without the parameter.
    Raises HTTPError.

    At 01:00 UTC on 2 January 1970, it is 03:00 at +02:00, and "today" began at 22:00
    UTC of the day before: 3 hours ago.

    >>> now_us = 25 * 3_600_000_000
    >>> began_us = read_instant({"since": "today", "tz": "+02:00"}, "since", now_us)
    >>> format_timestamp(began_us)
    '1970-01-01T22:00:00.000000Z'
    """
    # A wrong `tz` is refused also where nothing needs it.
    offset_us = read_offset(query)
    text = query.get(name)
    if text is None:
        return None
    if text in _DAYS_AGO:
        # Local time of day is how far local midnight lies back.
        local_us = now_us + offset_us
        return now_us - local_us % DAY_US - _DAYS_AGO[text] * DAY_US
    try:
        if is_duration(text):
            return now_us - parse_duration(text)
        return parse_timestamp(mend_offset(text))
    except ValueError as error:
        detail = (
            f"{name} {error}, nor a duration such as 10m, 2h or 7d, nor today or yesterday:"
            f" {shown(text)}"
        )
        raise HTTPError("bad-parameter", detail)


def read_offset(query: Dict[str, str]) -> int:
    """`tz`: how far local time is ahead of UTC, in microseconds. Raises HTTPError.

    An offset and no name of a zone: names would need tables that small systems lack.

    >>> read_offset({"tz": "-01:30"}), read_offset({})
    (-5400000000, 0)
    """
    text = query.get("tz", "Z")
    if text == "Z":
        return 0
    match = _OFFSET_TEXT.fullmatch(text)
    if match is None:
        raise bad_parameter("tz", "an offset from UTC such as +02:00, or Z", text)
    minutes = int(match["hours"]) * 60 + int(match["minutes"])
    if match["sign"] == "-":
        minutes = -minutes
    return minutes * 60_000_000


def read_count_of_names(query: Dict[str, str], name: str) -> int:
    """How many names of a kind GET /stats shall list. Raises HTTPError."""
    text = query.get(name)
    if text is None:
        return STATS_MAX_NAMES
    if _LIMIT_TEXT.fullmatch(text) and int(text) <= STATS_MOST_NAMES:
        return int(text)
    raise bad_parameter(name, f"a number from 0 to {STATS_MOST_NAMES}", text)


def mend_offset(text: str) -> str:
    """A time, with the + of its offset if it was lost.

    In a query, a + that is not written %2B means a blank (WHATWG URL §5.1), and people
    do not know that.

    >>> mend_offset("2026-01-01T10:00:00 02:00")
    '2026-01-01T10:00:00+02:00'
    >>> mend_offset("2026-01-01 10:00")
    '2026-01-01 10:00'
    """
    if len(text) < _SHORTEST_WITH_OFFSET:
        return text
    return _LOST_PLUS.sub(r"+\1", text)


def read_descending(query: Dict[str, str]) -> bool:
    """`order`: whether the latest event comes first. Raises HTTPError."""
    order = query.get("order", "asc")
    if order not in ("asc", "desc"):
        raise bad_parameter("order", "asc or desc", order)
    return order == "desc"


def write_cursor(place: Optional[Tuple[int, int]], descending: bool) -> Optional[str]:
    """The `next` of a page: the order, and timestamp and seq of its last event.

    The order is in it, so that a cursor of one order is not taken in the other, where
    it would lead back to the start.

    >>> write_cursor((17, 1), descending=False)
    'a17.1'
    """
    if place is None:
        return None
    timestamp, seq = place
    order = "d" if descending else "a"
    return f"{order}{timestamp}.{seq}"


def read_cursor(query: Dict[str, str], descending: bool) -> Optional[Tuple[int, int]]:
    """`cursor`: a page starts after this timestamp and seq. Raises HTTPError."""
    text = query.get("cursor")
    if text is None:
        return None
    match = _CURSOR_TEXT.fullmatch(text)
    if match is None or (match["order"] == "d") != descending:
        raise bad_parameter("cursor", "the `next` of an answer in the same order", text)
    return int(match["timestamp"]), int(match["seq"])


def read_after(request: Request) -> Optional[int]:
    """The seq after which a live tail starts; None means now. Raises HTTPError.

    A browser that connects again names the last event it has in Last-Event-ID. It is
    nearer than the `after` of the address, which the browser repeats unchanged.
    """
    text = request.head.headers.get("last-event-id") or request.head.query.get("after")
    if text is None:
        return None
    if _SEQ_TEXT.fullmatch(text) is None:
        raise bad_parameter("after, or Last-Event-ID,", "a seq", text)
    return int(text)


def read_topic(query: Dict[str, str]) -> Tuple[Optional[str], bool]:
    """`topic`: a name, and whether it is only the beginning of names.

    >>> read_topic({"topic": "logs/*"}), read_topic({})
    (('logs/', True), (None, False))
    """
    topic = query.get("topic")
    if topic is not None and topic.endswith("*"):
        return topic[:-1], True
    return topic, False


def read_event_query(query: Dict[str, str], now_us: int) -> EventQuery:
    """Which events are asked for. Raises HTTPError."""
    topic, prefix = read_topic(query)
    if query.get("contains") == "":
        raise bad_parameter("contains", "a text", "")
    descending = read_descending(query)
    return EventQuery(
        topic=topic,
        prefix=prefix,
        source=query.get("source"),
        contains=query.get("contains"),
        since=read_instant(query, "since", now_us),
        until=read_instant(query, "until", now_us),
        limit=read_limit(query),
        after=read_cursor(query, descending),
        descending=descending,
    )


def read_identity(request: Request) -> Tuple[str, str]:
    """Topic and event_id of /events/{topic}/{event_id}. A topic may have slashes."""
    path = request.head.path
    return "/".join(path[1:-1]), path[-1]


# ---- Handlers: publish ----

EVENT_EXAMPLE = (
    '{"topic":"door","event_id":"42","timestamp":"2026-01-01T13:00:00+01:00",'
    '"source":"hall","payload":{"n":1},"sequence":7}'
)
_EXPLAINED_EXAMPLE = """
    {"status": "accepted", "accepted": 1, "unique": 0, "duplicates": 1, "conflicts": 0,
     "stored": true, "events": [
         {"topic": "door", "event_id": "42", "verdict": "duplicate", "seq": 1, "explanation": {
             "key": "c5466c5f8e017e9d2818cd9f461b3e45", "found": "recent",
             "first_seen": "2026-01-01T12:00:00.250000Z", "seconds_since_first_seen": 1.5,
             "why": "the key was among the recent ones, in memory, not yet merged"}}],
     "group": {"events": 1, "milliseconds": 0.8}}
"""
_LATER_EXAMPLE = (
    '{"topic":"door/back","event_id":"1","timestamp":"2026-01-02T08:30:00Z",'
    '"source":"hall","payload":{"n":2},"sequence":9}'
)
_CLOUD_EVENT_EXAMPLE = (
    '{"specversion":"1.0","id":"7","source":"/shop","type":"order.paid","data":{"n":1}}'
)
_TAKEN_EXAMPLE = (
    '{"status": "accepted", "accepted": 1, "unique": 1, "duplicates": 0, "conflicts": 0,'
    ' "stored": true}'
)
_LINES_TAKEN_EXAMPLE = (
    '{"status": "accepted", "accepted": 2, "unique": 2, "duplicates": 0, "conflicts": 0,'
    ' "stored": true}'
)
_EVENT_SCHEMA: Schema = {"$ref": "#/components/schemas/event"}
_EVENTS_SCHEMA: Schema = {"type": "array", "minItems": 1, "items": _EVENT_SCHEMA}
_WRAPPED_SCHEMA: Schema = {
    "type": "object",
    "required": ["events"],
    "properties": {"events": _EVENTS_SCHEMA},
}

_CLOUD_EVENT_SCHEMA: Schema = {
    "type": "object",
    "required": ["specversion", "id", "source", "type"],
    "additionalProperties": {},
}

# Why a verdict is what it is, by the place where the index found the key (§2).
_WHY_BY_PLACE = {
    "nowhere": "the key was neither among the recent ones nor among the tombstones",
    "recent": "the key was among the recent ones, in memory, not yet merged",
    "seen": "the key was among the younger tombstones",
    "archive": "the key was among the older tombstones, in the archive",
    "batch": "the key came earlier in the same group",
}


@route(
    "POST",
    "/publish",
    query=(WAIT, VERDICTS, EXPLAIN, TOPIC, SOURCE),
    headers=(IDEMPOTENCY_KEY,),
    bodies=(
        Body(
            JSON_TYPE,
            EVENT_EXAMPLE,
            {"anyOf": [_EVENT_SCHEMA, _EVENTS_SCHEMA, _WRAPPED_SCHEMA]},
            'an event, a list, or `{"events": []}`, or several of them; so is any other type read',
        ),
        Body(NDJSON_TYPE, _LATER_EXAMPLE, _SOME_TEXT_SCHEMA, "an event a line"),
        Body(
            TEXT_TYPE,
            "first line\nsecond line\n",
            _SOME_TEXT_SCHEMA,
            "with `?topic=` and `?source=`, each line is the `message` of an event; else JSON",
        ),
        Body(
            "application/cloudevents+json",
            _CLOUD_EVENT_EXAMPLE,
            _CLOUD_EVENT_SCHEMA,
            "a CloudEvent 1.0; `application/cloudevents-batch+json` is a list of them, and fields"
            " such as `ce-id` beside any body are one, too",
        ),
    ),
    answers=(
        Answer(202, "on disk", _TAKEN_EXAMPLE),
        Answer(
            202, "queued", '{"status": "accepted", "accepted": 1, "stored": false}', ask="?wait=0"
        ),
        Answer(202, "on disk, and why", _EXPLAINED_EXAMPLE, ask="?explain=1"),
        Answer(
            202,
            "lines of text, each an event",
            _LINES_TAKEN_EXAMPLE,
            ask="?topic=logs&source=nas",
            headers=(("Content-Type", TEXT_TYPE), ("Idempotency-Key", "log-1")),
        ),
        Answer(
            202,
            "an event a line, in gzip",
            _TAKEN_EXAMPLE,
            headers=(("Content-Type", NDJSON_TYPE), ("Content-Encoding", "gzip")),
        ),
        Answer(
            202,
            "a CloudEvent",
            _TAKEN_EXAMPLE,
            headers=(("Content-Type", "application/cloudevents+json"),),
        ),
    ),
    problems=("batch-too-large", *WRITING),
)
async def publish_events(api: API, request: Request, peer: str) -> Response:
    """Publish one event or many.

    With `wait=0` the answer says "stored": false: the events are queued, and a crash
    may lose them.
    """
    wait = True
    explain = False
    list_verdicts = False
    query = request.head.query
    if query:
        wait = read_flag(query, "wait", default=True)
        explain = read_flag(query, "explain", default=False)
        list_verdicts = read_flag(query, "verdicts", default=False) or explain

    events = read_published(api, request)
    # Here the request waits for the commit of its group. If the client goes away, its
    # events are stored all the same; it will ask again and hear that they are known.
    receipt = await api.pipeline.publish(events, len(request.body), wait)
    if receipt is None:
        queued = b'{"status":"accepted","accepted":%d,"stored":false}\n' % len(events)
        return respond(202, queued)

    details = b""
    if explain:
        details = _members_bytes(events=explained_verdicts(receipt), group=_group_facts(receipt))
    elif list_verdicts:
        details = _members_bytes(events=listed_verdicts(receipt))
    # Written by hand: json.dumps would be a large part of the work for a small event.
    body = (
        b'{"status":"accepted","accepted":%d,"unique":%d,"duplicates":%d,"conflicts":%d,'
        b'"stored":true%b}\n'
    ) % (len(events), receipt.unique, receipt.duplicates, receipt.conflicts, details)
    return respond(202, body)


def read_published(api: API, request: Request) -> List[Event]:
    """The events of a body: CloudEvents, lines of text, or JSON.

    Raises HTTPError and what §1 does. Nothing is guessed from the body: a header field
    or a parameter decides which of the three it is.
    """
    query = request.head.query
    most = api.pipeline.limits.queue_events
    if "ce-specversion" in request.head.headers or is_cloud_events(request.head.content_type):
        return read_cloud_events(request, api.clock(), most)
    if "topic" not in query and "source" not in query:
        # Whatever its type says: `fetch` calls JSON text/plain, curl calls it a form.
        try:
            return parse_events(request.body, most)
        except (NotJSON, InvalidEvents) as error:
            raise _with_advice(error, request)

    if request.head.content_type != TEXT_TYPE:
        raise HTTPError(
            "bad-parameter",
            "topic and source go with Content-Type: text/plain; a JSON event names its own",
        )
    for name in ("topic", "source"):
        if name not in query:
            raise HTTPError(
                "bad-parameter",
                f"lines of text need ?topic= and ?source=: {name} is missing; without both, a"
                " body is read as JSON",
            )
    key = request.head.headers.get("idempotency-key")

    def new_id(line_number: int) -> str:
        # With a key, the same text sent again gets the same ids, and is a duplicate.
        # Without one, every line is new.
        return api.random_id() if key is None else f"{header_text(key)}:{line_number}"

    text = body_text(request)
    return events_from_lines(text, query["topic"], query["source"], api.clock(), new_id, most)


def _with_advice(error: Exception, request: Request) -> HTTPError:
    """A refusal of what was read as JSON, with what its sender may have meant."""
    refusal = refusal_of(error)
    if isinstance(error, NotJSON) and request.head.content_type == TEXT_TYPE:
        refusal.detail += "; lines of text need ?topic=NAME&source=NAME"
    if isinstance(error, InvalidEvents) and b'"specversion"' in request.body:
        refusal.detail += f"; a CloudEvent needs Content-Type: {CLOUD_EVENT_TYPE}+json"
    return refusal


def header_text(value: str) -> str:
    """The text of a header field: UTF-8 where it is that, else ISO 8859-1.

    §6 reads each byte of a field as a character (RFC 9110 §5.5), and loses none. An id
    is written in UTF-8 by most publishers, and it is the same id in a body.

    >>> header_text("cafÃ©"), header_text("café")
    ('café', 'café')
    """
    try:
        return value.encode("latin-1").decode("utf-8")
    except UnicodeDecodeError:
        return value


def listed_verdicts(receipt: Receipt) -> List[Dict[str, Any]]:
    """What became of each event of a batch, in order."""
    listed = []
    for record, verdict in zip(receipt.records, receipt.verdicts()):
        listed.append(
            {
                "topic": record.topic,
                "event_id": record.event_id,
                "verdict": verdict.kind,
                "seq": verdict.seq,
            }
        )
    return listed


def seconds_between(first_us: int, later_us: int) -> float:
    """The seconds between two arrivals; 0 if the clock was set back in between.

    >>> seconds_between(1_000_000, 2_500_000), seconds_between(2_000_000, 0)
    (1.5, 0.0)
    """
    return max(0, later_us - first_us) / 1_000_000


def explained_verdicts(receipt: Receipt) -> List[Dict[str, Any]]:
    """The same, and how each verdict came about: where its key was, and since when."""
    listed = listed_verdicts(receipt)
    for item, record, verdict in zip(listed, receipt.records, receipt.verdicts()):
        why = _WHY_BY_PLACE[verdict.place]
        if verdict.kind == "conflict":
            why += ", with another source or payload: the first one stays"
        item["explanation"] = {
            "key": record.key.hex(),
            "found": verdict.place,
            "first_seen": format_timestamp(verdict.first_seen),
            "seconds_since_first_seen": seconds_between(verdict.first_seen, receipt.arrived_us),
            "why": why,
        }
    return listed


def _group_facts(receipt: Receipt) -> Dict[str, Any]:
    """The size of the group that this batch was committed with, and its duration."""
    return {"events": receipt.group_events, "milliseconds": receipt.commit_us / 1000}


def _members_bytes(**members: Any) -> bytes:
    """Members of a JSON object that continue one, each after a comma.

    >>> _members_bytes(n=1, m=[])
    b',"n":1,"m":[]'
    """
    return b"," + json_bytes(members).strip()[1:-1]


@route(
    "PUT",
    "/events/{topic}/{event_id}",
    query=(TIMESTAMP, SOURCE),
    bodies=(
        Body(
            TEXT_TYPE,
            "finished in 312 s",
            _TEXT_SCHEMA,
            'a text, for the payload `{"message": text}`',
        ),
        Body(JSON_TYPE, '{"n":1}', {}, "an object is the payload, and anything else a text"),
    ),
    answers=(
        Answer(
            201,
            "new",
            '{"topic": "backup", "event_id": "2026-01-01", "verdict": "new", "seq": 6}',
            ask="?source=nas",
            path="/events/backup/2026-01-01",
        ),
        Answer(
            200,
            "a duplicate",
            '{"topic": "backup", "event_id": "2026-01-01", "verdict": "duplicate", "seq": 6}',
            ask="?source=nas",
            path="/events/backup/2026-01-01",
        ),
    ),
    problems=("conflict", *WRITING),
)
async def put_event(api: API, request: Request, peer: str) -> Response:
    """Publish one event under its identity.

    201 and 200 tell new from known, as PUT does everywhere (RFC 9110 §9.3.4). Other
    content is refused: this route has one event, so its publisher can be told.
    """
    events = read_put_event(api, request, peer)
    receipt = await api.pipeline.publish(events, len(request.body))
    assert receipt is not None, "it waits, so there is a receipt"

    (item,) = listed_verdicts(receipt)
    if item["verdict"] == "conflict":
        topic, event_id = read_identity(request)
        raise HTTPError(
            "conflict",
            f"event_id {shown(event_id)} of topic {shown(topic)} is stored as seq {item['seq']}"
            " with another source or payload, which stays: choose another event_id",
        )
    return json_response(201 if item["verdict"] == "new" else 200, item)


def read_put_event(api: API, request: Request, peer: str) -> List[Event]:
    """The one event of a PUT. Raises InvalidEvents.

    A function of its own, so that the decoded body is gone before the event is stored:
    it can take 20 times the memory of its text.
    """
    query = request.head.query
    topic, event_id = read_identity(request)
    if "timestamp" in query:
        timestamp = mend_offset(query["timestamp"])
    else:
        timestamp = format_timestamp(api.clock())
    event = {
        "topic": topic,
        "event_id": event_id,
        "timestamp": timestamp,
        "source": query.get("source", peer),
        "payload": read_payload(request),
    }
    return read_events([event])


# Text that only looks like JSON is no fault: a line of a log that begins with "{" is
# worth as much as any other line.


def read_payload(request: Request) -> Dict[str, Any]:
    """A body as a payload: an object as it is, any other text as a message."""
    try:
        values = json_values(decode_text(request.body), most=1)
    except NotJSON:
        values = []
    if len(values) == 1 and isinstance(values[0], dict):
        payload: Dict[str, Any] = values[0]
        return payload
    return {"message": body_text(request)}


_CHARSET = re.compile(r';[ \t]*charset="?(?P<name>[^\s";]+)', re.IGNORECASE)
# Names of ISO 8859-1, in lower case. Everything else is read as UTF-8.
_LATIN_1_NAMES = ("iso-8859-1", "iso8859-1", "iso_8859-1", "latin-1", "latin1", "l1")


def body_text(request: Request) -> str:
    r"""The text of a body: UTF-8, or ISO 8859-1 if its Content-Type says so.

    A byte that is not UTF-8 becomes \xNN: one strange byte must not hold up all the
    lines around it, because a log daemon would send them again for ever. The byte order
    mark that some editors write is no part of the text.
    """
    charset = text_charset(request)
    body = request.body
    if charset == "utf-8" and body.startswith(b"\xef\xbb\xbf"):
        body = body[3:]
    return body.decode(charset, "backslashreplace")


def text_charset(request: Request) -> str:
    """The encoding of a body that is text, as Python names it."""
    match = _CHARSET.search(request.head.headers.get("content-type", ""))
    if match is not None and match["name"].lower() in _LATIN_1_NAMES:
        return "latin-1"
    return "utf-8"


# ---- Handlers: read ----

STORED_EXAMPLE = (
    '{"seq":1,"topic":"door","event_id":"42","timestamp":"2026-01-01T12:00:00.000000Z",'
    '"source":"hall","payload":{"n":1},"sequence":7,"processed_at":"2026-01-01T12:00:00.250000Z"}'
)
_PAGE_EXAMPLE = f'{{"count": 1, "events": [{STORED_EXAMPLE}], "next": null}}'
_LINE_EXAMPLE = STORED_EXAMPLE + "\n"
_BLOCK_EXAMPLE = f"retry: {FOLLOW_RETRY_MS}\n\nid: 1\ndata: {STORED_EXAMPLE}\n\n"
_FROM_START = "?follow=1&after=0"


@route(
    "GET",
    "/events",
    query=(
        TOPIC_FILTER,
        SOURCE_FILTER,
        CONTAINS,
        SINCE,
        UNTIL,
        TZ,
        LIMIT,
        CURSOR,
        ORDER,
        FOLLOW,
        AFTER,
        ACCESS_TOKEN,
    ),
    headers=(LAST_EVENT_ID,),
    answers=(
        Answer(200, "a page", _PAGE_EXAMPLE, ask="?topic=door&limit=10"),
        Answer(200, "all pages, an event a line", _LINE_EXAMPLE, NDJSON_TYPE),
        Answer(200, "a live tail", _LINE_EXAMPLE, NDJSON_TYPE, ask=_FROM_START),
        Answer(200, "a live tail for browsers", _BLOCK_EXAMPLE, SSE_TYPE, ask=_FROM_START),
    ),
    problems=("gone", *READING),
)
async def list_events(api: API, request: Request, peer: str) -> Response:
    """List events by time, or follow them as they come."""
    if read_flag(request.head.query, "follow", default=False):
        return await follow_events(api, request)
    if "after" in request.head.query:
        raise HTTPError("bad-parameter", "after goes with follow=1; pages are turned with cursor")
    if "access_token" in request.head.query:
        raise HTTPError(
            "bad-parameter", "access_token goes with follow=1; else send Authorization: Bearer"
        )
    query = read_event_query(request.head.query, api.clock())
    if accepts(request, NDJSON_TYPE):
        limited = "limit" in request.head.query
        if not limited:
            query = query._replace(limit=PAGE_MAX)
        # The first page is read here: a failure is then a 503, and not half a list.
        first = await api.pipeline.page(query, "\n")
        return stream_response(page_lines(api.pipeline, query, first, limited), NDJSON_TYPE)

    page = await api.pipeline.page(query, ",")
    following = json.dumps(write_cursor(page.next, query.descending))
    text = f'{{"count":{page.size},"events":[{page.text}],"next":{following}}}\n'
    return respond(200, text.encode("utf-8"))


# A cursor is the place of an event, (timestamp, seq), and no number of a page. So a
# walk shows each event that stays once, whatever else is stored or removed meanwhile.


async def page_lines(
    pipeline: Pipeline, query: EventQuery, page: Page, limited: bool
) -> AsyncGenerator[bytes, None]:
    """A line for each event, from `page` on; one page is in memory at a time.

    Up to `query.limit` events if `limited`, else to the end. Raises StoreFailed.
    """
    left = query.limit
    while True:
        # Each `yield` waits until the client has taken what came before.
        piece = page.text.encode("utf-8") + b"\n"
        # While the piece is being sent, the same page need not be kept as text, too.
        page = page._replace(text="")
        if page.size:
            yield piece
        left -= page.size
        if page.next is None or (limited and left <= 0):
            return
        if limited:
            query = query._replace(limit=left)
        query = query._replace(after=page.next)
        page = await pipeline.page(query, "\n")


async def follow_events(api: API, request: Request) -> Response:
    """A live tail: a line of JSON for each event, or Server-Sent Events.

    The first look into the log happens before the answer begins. After that a status
    has been sent, and an error could only end the stream.
    """
    for name in ("since", "until", "limit", "cursor", "order"):
        if name in request.head.query:
            raise HTTPError(
                "bad-parameter",
                f"{name} does not go with follow=1: it starts with after=SEQ and has no end",
            )
    query = read_event_query(request.head.query, api.clock())
    # Looked up here, so that a cursor that cannot be served is still refused.
    first = await api.live_tail.tail(query, read_after(request))
    tails = api.live_tail.follow(query, first)
    if accepts(request, SSE_TYPE):
        return stream_response(server_sent_events(tails), SSE_TYPE)
    return stream_response(json_lines(tails), NDJSON_TYPE)


async def json_lines(tails: AsyncIterator[Tail]) -> AsyncGenerator[bytes, None]:
    """A live tail as lines; an empty line is a sign of life."""
    async for tail in tails:
        yield tail.lines.encode("utf-8") + b"\n"
        # The next may be long in coming.
        del tail


async def server_sent_events(tails: AsyncIterator[Tail]) -> AsyncGenerator[bytes, None]:
    """A live tail as Server-Sent Events (WHATWG HTML §9.2); an event's id is its seq.

    The sign of life has an id and no data: it moves the cursor of a browser past what
    did not match, and the page sees nothing of it (§9.2.6).
    """
    yield b"retry: %d\n\n" % FOLLOW_RETRY_MS
    async for tail in tails:
        yield _event_blocks(tail)
        # The next may be long in coming.
        del tail


def _event_blocks(tail: Tail) -> bytes:
    if not tail.seqs:
        return b": keep-alive\nid: %d\n\n" % tail.through
    blocks = []
    for seq, line in zip(tail.seqs, tail.lines.split("\n")):
        blocks.append(f"id: {seq}\ndata: {line}\n\n")
    return "".join(blocks).encode("utf-8")


@route(
    "GET",
    "/events/{topic}/{event_id}",
    answers=(Answer(200, "the event", STORED_EXAMPLE),),
    problems=("no-such-event", "gone", *READING),
)
async def get_event(api: API, request: Request, peer: str) -> Response:
    """Read one event.

    404 and 410 say different things: this id is free, or it was taken once and a repeat
    of it would be a duplicate.
    """
    topic, event_id = read_identity(request)
    seq, text = await api.pipeline.event(topic, event_id)
    if seq is None:
        raise HTTPError(
            "no-such-event",
            f"no event {shown(event_id)} was ever stored under topic {shown(topic)}",
        )
    if text is None:
        raise HTTPError(
            "gone",
            f"the event was stored as seq {seq} and has been removed since;"
            " its identity is still known, so a repeat of it is a duplicate",
        )
    return respond(200, text.encode("utf-8") + b"\n")


_DUPLICATES_EXAMPLE = """
    {"count": 1, "duplicates": [
        {"topic": "backup", "event_id": "2026-01-01", "source": "nas", "verdict": "duplicate",
         "seq": 6, "first_seen": "2026-01-01T12:00:00.250000Z",
         "repeated": "2026-01-01T12:00:01.750000Z", "delay_seconds": 1.5,
         "original": "events/backup/2026-01-01"}]}
"""


@route(
    "GET",
    "/duplicates",
    query=(LIMIT,),
    answers=(Answer(200, "500 at most", _DUPLICATES_EXAMPLE, ask="?limit=1"),),
    # They are kept in memory, so a failing store is no reason to refuse.
    problems=("unauthorized",),
)
async def list_duplicates(api: API, request: Request, peer: str) -> Response:
    """The last duplicates, the latest first."""
    limit = read_limit(request.head.query)
    latest_first = reversed(api.pipeline.duplicates)
    listed = []
    for duplicate in itertools.islice(latest_first, limit):
        listed.append(duplicate_facts(duplicate))
    return json_response(200, {"count": len(listed), "duplicates": listed})


def duplicate_facts(duplicate: Duplicate) -> Dict[str, Any]:
    """What GET /duplicates says about one of them.

    For a conflict it has the beginning of the payload that came second. The one that is
    stored is at `original`, which is relative to this route.
    """
    record = duplicate.record
    verdict = duplicate.verdict
    facts = {
        "topic": record.topic,
        "event_id": record.event_id,
        "source": record.source,
        "verdict": verdict.kind,
        "seq": verdict.seq,
        "first_seen": format_timestamp(verdict.first_seen),
        "repeated": format_timestamp(duplicate.arrived_us),
        "delay_seconds": seconds_between(verdict.first_seen, duplicate.arrived_us),
        "original": path_of_event(record.topic, record.event_id),
    }
    if verdict.kind == "conflict":
        facts["payload"] = record.payload
    return facts


def path_of_event(topic: str, event_id: str) -> str:
    """Where an event can be read, without the slash in front.

    Clients resolve the segments `.` and `..` (RFC 3986 §5.2.4), so their dots are
    encoded, too. curl leaves them alone then; a browser resolves them all the same.

    >>> path_of_event("logs/café", "a/b"), path_of_event("..", ".x")
    ('events/logs/caf%C3%A9/a%2Fb', 'events/%2E%2E/.x')
    """
    segments = []
    for name in [*topic.split("/"), event_id]:
        # Everything but the unreserved characters (RFC 3986 §2.3).
        encoded = re.sub(
            rb"[^A-Za-z0-9._~-]", lambda found: b"%%%02X" % ord(found[0]), name.encode("utf-8")
        )
        if encoded in (b".", b".."):
            encoded = encoded.replace(b".", b"%2E")
        segments.append(encoded.decode("ascii"))
    return "/".join(["events", *segments])


_GAPS_EXAMPLE = """
    {"count": 1, "sources": [
        {"source": "hall", "newest": 9, "missing_count": 1, "given_up": 0, "missing": [[8, 8]]}]}
"""


@route(
    "GET",
    "/gaps",
    query=(SOURCE_FILTER, LIMIT),
    answers=(Answer(200, "first and last of each gap", _GAPS_EXAMPLE, ask="?source=hall"),),
    problems=READING,
)
async def list_gaps(api: API, request: Request, peer: str) -> Response:
    """Sequence numbers that sources have left out."""
    query = request.head.query
    sources = await api.pipeline.gaps(query.get("source"), read_limit(query))
    return json_response(200, {"count": len(sources), "sources": sources})


_STATS_EXAMPLE = """
    {"received": 2, "unique_processed": 1, "duplicate_dropped": 1, "conflicts": 0, "stored": 1,
     "removed_by_retention": 0,
     "topics": {"door/front": {"unique": 1, "duplicates": 1, "stored": 1}}, "topics_total": 1,
     "sources": {"192.0.2.7": {"unique": 1, "duplicates": 1}}, "sources_total": 1, "gaps": 0,
     "duplicate_delay_seconds": {"1": 0, "10": 1},
     "windows": [{"window_seconds": 120, "like": "NATS JetStream, default",
                  "would_have_stored_twice": 0}],
     "store_bytes": 86016, "current_queue_size": 0,
     "last_commit": {"events": 1, "milliseconds": 0.8}, "store_id": "0123456789abcdef",
     "bytes_per_event": 86016, "growth_bytes_per_day": {"last_hour": null, "last_day": null},
     "disk_free_bytes": null, "days_until_full": null,
     "health": {"status": "ok", "reason": "", "since_seconds": 0.0, "warning": ""},
     "subscribers": 0, "uptime_seconds": 12.5, "version": "%s",
     "limits": {"queue_max_size": 10000, "max_events_per_topic": 0, "retention_seconds": 0.0,
                "max_body": 4194304, "dedup_retention_seconds": 0.0}}
"""


@route(
    "GET",
    "/stats",
    query=(
        Field("topics", 10, _NAMES_SCHEMA, "list so many topics, those with most events"),
        Field("sources", 10, _NAMES_SCHEMA, "list so many sources, those with most duplicates"),
    ),
    answers=(Answer(200, "all of it", _STATS_EXAMPLE % __version__),),
    problems=READING,
)
async def get_stats(api: API, request: Request, peer: str) -> Response:
    """The books, the topics, and what the duplicates look like."""
    query = request.head.query
    topics = read_count_of_names(query, "topics")
    sources = read_count_of_names(query, "sources")
    return json_response(200, await api.numbers(topics, sources))


@route(
    "GET",
    "/health",
    answers=(Answer(200, "they can", '{"status": "ok"}'),),
    problems=("store-unavailable",),
)
async def get_health(api: API, request: Request, peer: str) -> Response:
    """Whether events can be stored right now.

    It needs no token: load balancers and containers ask it.
    """
    reason = await api.pipeline.health()
    if reason:
        raise HTTPError("store-unavailable", reason)
    warning = api.pipeline.growth.warning()
    if warning:
        # Still 200: events can be stored, and nobody should restart the service.
        return json_response(200, {"status": "ok", "warning": warning})
    return respond(200, b'{"status":"ok"}\n')


# ---- Webhooks and CloudEvents ----

# Senders that cannot be taught our fields. A webhook sender repeats a delivery until it
# is answered 2xx: it is a publisher with at-least-once delivery, and the id of the
# delivery is all that is needed to store it once.
#
#   * A duplicate and a conflict are answered 202. Any other answer makes the sender
#     repeat, and then switch the webhook off.
#   * What was signed is compared before it is read, and in constant time.

# Where the id of a delivery is looked for, in this order, if `?id=` does not say it.
# The fields are those of an IETF draft, of Standard Webhooks, GitHub and CloudEvents.
ID_HEADERS = ("Idempotency-Key", "webhook-id", "X-GitHub-Delivery", "ce-id")
TIME_HEADER = "webhook-timestamp"
# The one place of an id that a signature of Standard Webhooks covers.
SIGNED_ID_PLACE = "header:webhook-id"
# The header fields that carry a signature, by the scheme.
STANDARD_SIGNATURE = "webhook-signature"
HUB_SIGNATURE = "x-hub-signature-256"
# Bytes of a key that is written in base64. Standard Webhooks asks for 24 to 64.
MIN_SIGNING_KEY = 16
_BASE64 = re.compile("[A-Za-z0-9+/]+={0,2}")
# Senders whose wrong signature is remembered, so that it is logged once.
MAX_WRONG_SIGNERS = 1000

# Fields of a form. A body with more is kept as text: taking a million of them apart
# would hold up everyone else for seconds.
MAX_FORM_FIELDS = 1000

FORM_TYPE = "application/x-www-form-urlencoded"

_SOURCES_OF_ID = (
    "send one of the header fields Idempotency-Key, webhook-id, X-GitHub-Delivery or ce-id,"
    " or say where the id is: ?id=header:NAME, ?id=body:/json/pointer (RFC 6901), ?id=content"
    " (the SHA-256 of the body), ?id=random (every delivery is new)"
)


# ---- Finding things in a delivery ----


class Delivery(NamedTuple):
    """A request to POST /events/{topic}, and its body as a JSON value.

    `value` is what JSON or a form says. A body that is neither has the value None and
    `is_text`.
    """

    request: Request
    value: Any
    is_text: bool

    @property
    def payload(self) -> Dict[str, Any]:
        """The payload: an object as it is; any other value and text get a name."""
        if self.is_text:
            return {"message": body_text(self.request)}
        if isinstance(self.value, dict):
            return self.value
        return {"value": self.value}


def read_delivery(request: Request) -> Delivery:
    """What a body says, whatever its type says: curl calls everything a form.

    First JSON, then a form, else text. It never fails: a delivery that is refused for
    its form would only be sent again, for days.
    """
    try:
        values = json_values(decode_text(request.body), most=1)
    except (NotJSON, InvalidEvents):
        values = []
    # Several values, one after the other, are no JSON text (RFC 8259 §2).
    if len(values) == 1:
        return Delivery(request, values[0], is_text=False)
    if request.head.content_type == FORM_TYPE:
        if names_a_field(request) or _looks_like_form(request.body):
            fields = read_form(request.body, text_charset(request))
            if fields:
                return Delivery(request, fields, is_text=False)
    return Delivery(request, None, is_text=True)


def names_a_field(request: Request) -> bool:
    """Whether the query says that the body has fields: then it is no line of text."""
    query = request.head.query
    for parameter in ("id", "time"):
        if query.get(parameter, "").startswith("body:/"):
            return True
    return False


# A browser writes a form without blanks and line ends, and each field has a "=". So a
# line of text that curl calls a form is seldom mistaken for one.
_FORM_FIELD = rb"(?:[!-%'-<>-~]*=[!-%'-~]*)?"
_FORM = re.compile(_FORM_FIELD + rb"(?:&" + _FORM_FIELD + rb")*")


def _looks_like_form(body: bytes) -> bool:
    """Whether a body is written as a form, and not only called one."""
    return b"=" in body and _FORM.fullmatch(body) is not None


def read_form(body: bytes, charset: str = "utf-8") -> Dict[str, Any]:
    r"""The fields of a form (WHATWG URL §5.1); {} if there are none, or too many.

    A field that is given several times is a list. As there, nothing is an error: a lone
    "%" stands for itself, and a field without "=" is empty. A byte that is not in the
    charset becomes \xNN, as in text.

    >>> read_form(b"door=front+left&n=1&n=2&&open")
    {'door': 'front left', 'n': ['1', '2'], 'open': ''}
    >>> read_form(b"name=Ren%E9", "latin-1"), read_form(b"name=Ren%E9&rate=5%")
    ({'name': 'René'}, {'name': 'Ren\\xe9', 'rate': '5%'})
    """
    if body.count(b"&") >= MAX_FORM_FIELDS:
        return {}
    fields: Dict[str, Any] = {}
    for pair in body.split(b"&"):
        if not pair:
            continue
        raw_name, _, raw_value = pair.partition(b"=")
        name = _form_text(raw_name, charset)
        value = _form_text(raw_value, charset)
        if name not in fields:
            fields[name] = value
        elif isinstance(fields[name], list):
            fields[name].append(value)
        else:
            fields[name] = [fields[name], value]
    return fields


def _form_text(raw: bytes, charset: str) -> str:
    """A name or a value of a form as text."""
    raw = percent_decode_bytes(raw.replace(b"+", b" "))
    return raw.decode(charset, "backslashreplace")


_ARRAY_INDEX = re.compile("0|[1-9][0-9]{0,8}")
_WRONG_ESCAPE = re.compile("~(?![01])")


def resolve_pointer(value: Any, pointer: str) -> Any:
    """The value at a JSON Pointer (RFC 6901). Raises LookupError if there is none.

    Raises ValueError for a text that is no pointer. A pointer is a path from the
    outside in: names of members, and places in lists from 0. In a name, ~1 stands for
    a slash and ~0 for a tilde.

    >>> resolve_pointer({"a/b": [{"id": 7}]}, "/a~1b/0/id")
    7
    """
    if pointer and not pointer.startswith("/"):
        raise ValueError("a JSON Pointer is empty or starts with /")
    if _WRONG_ESCAPE.search(pointer):
        raise ValueError("in a JSON Pointer ~ is written ~0, and / in a name is written ~1")
    for part in pointer.split("/")[1:]:
        # RFC 6901 §4: first ~1, then ~0, so that "~01" becomes "~1".
        name = part.replace("~1", "/").replace("~0", "~")
        if isinstance(value, dict):
            value = value[name]
        elif isinstance(value, list) and _ARRAY_INDEX.fullmatch(name):
            value = value[int(name)]
        else:
            raise LookupError(name)
    return value


def find_text(delivery: Delivery, parameter: str, place: str) -> str:
    """The text that stands at `header:NAME` or `body:/json/pointer`. Raises HTTPError.

    `parameter` is the one that names the place: "id" or "time".
    """
    kind, _, name = place.partition(":")
    if kind == "header" and name:
        value = header_text(delivery.request.head.headers.get(name.lower(), ""))
    elif kind == "body":
        value = _text_in_body(delivery, parameter, name)
    else:
        expected = "header:NAME or body:/json/pointer"
        if parameter == "id":
            expected = "header:NAME, body:/json/pointer, content or random"
        raise bad_parameter(parameter, expected, place)
    if not value:
        raise HTTPError(
            "bad-parameter",
            f"no text and no number stands at {shown(place)}, where ?{parameter}= says that the"
            f" {parameter} is",
        )
    return value


# Reads each number as the text that it was written with.
_NUMBERS_AS_TEXT = json.JSONDecoder(parse_int=str, parse_float=str)
_INFINITY = float("inf")


def _text_in_body(delivery: Delivery, parameter: str, pointer: str) -> str:
    """A text or a number in the body, as text; "" if there is none.

    NaN and what is too large for a number are none. As an id, a number keeps all its
    digits: two long numbers may be one and the same double.
    """
    try:
        found = resolve_pointer(delivery.value, pointer)
    except LookupError:
        return ""
    except ValueError as error:
        raise HTTPError("bad-parameter", f"{parameter}: {error}, not {shown(pointer)}")
    if isinstance(found, str):
        return found
    # `True` is an int to isinstance, and no id.
    if type(found) not in (int, float) or not -_INFINITY < found < _INFINITY:
        return ""
    if parameter != "id":
        return json.dumps(found)
    try:
        as_written = _NUMBERS_AS_TEXT.decode(decode_text(delivery.request.body))
    except RecursionError:
        # So deep that the first decoder just did not give up.
        return ""
    return str(resolve_pointer(as_written, pointer))


def delivery_id(delivery: Delivery, is_id_signed: bool, random_id: Callable[[], str]) -> str:
    """The event id of a delivery. Raises HTTPError if nothing says it.

    A signature of Standard Webhooks covers `webhook-id`, and no other place of an id.
    So with `is_id_signed` that is the id: anything else could be changed by whoever
    sends a copy of the delivery, and the copy would be a new event.

    Nothing is invented: an id made here would be another one for each repeat, and no
    repeat would be recognised. Who wants that says so with `?id=random`.
    """
    place = delivery.request.head.query.get("id")
    if is_id_signed:
        # The name of a field has no case (RFC 9110 §5.1).
        if place is not None and place.lower() != SIGNED_ID_PLACE:
            raise HTTPError(
                "bad-parameter",
                "the webhook-signature covers webhook-id and no other place of an id: leave out"
                f" ?id=, or send ?id={SIGNED_ID_PLACE}",
            )
        return header_text(delivery.request.head.headers["webhook-id"])
    if place == "random":
        return random_id()
    if place == "content":
        return sha256(delivery.request.body).hexdigest()
    if place is not None:
        return find_text(delivery, "id", place)
    for name in ID_HEADERS:
        value = delivery.request.head.headers.get(name.lower())
        if value:
            return header_text(value)
    raise HTTPError("bad-parameter", f"this delivery has no id: {_SOURCES_OF_ID}")


_NUMBER_OF_SECONDS = re.compile(r"(?P<whole>[0-9]{1,16})(?:\.(?P<fraction>[0-9]{1,9}))?")


def read_time(text: str) -> int:
    """A time as senders write it to microseconds since 1970. Raises ValueError.

    ISO 8601, or a number since 1970: of seconds, or of milliseconds if it has 12 digits
    or more. In seconds, those are years after 5138.

    >>> [read_time(text) for text in ("1767268800", "1767268800500", "1970-01-02")]
    [1767268800000000, 1767268800500000, 86400000000]
    """
    match = _NUMBER_OF_SECONDS.fullmatch(text)
    if match is None:
        return parse_timestamp(mend_offset(text))
    fraction_us = int((match["fraction"] or "").ljust(6, "0")[:6])
    instant_us = int(match["whole"]) * 1_000_000 + fraction_us
    if len(match["whole"]) >= 12:
        instant_us //= 1000
    try:
        format_timestamp(instant_us)
    except OverflowError:
        raise ValueError("is beyond the year 9999")
    return instant_us


def delivery_time(delivery: Delivery, now_us: int) -> int:
    """When a delivery says that it happened, else now; microseconds since 1970 UTC.

    Raises HTTPError for a time that cannot be read, also where it stands in a header.
    """
    place = delivery.request.head.query.get("time")
    if place is not None:
        text = find_text(delivery, "time", place)
    else:
        place = f"header:{TIME_HEADER}"
        text = delivery.request.head.headers.get(TIME_HEADER, "")
        if not text:
            return now_us
    try:
        return read_time(text)
    except ValueError as error:
        raise HTTPError("bad-parameter", f"the time at {place} {error}: {shown(text)}")


# ---- Signatures ----


def verify_signature(request: Request, access: Access, now_us: int) -> None:
    """Refuse a delivery that none of the topic's secrets has signed. Raises HTTPError.

    Two schemes are known: Standard Webhooks (webhook-signature, over id, time and
    body) and that of GitHub and WebSub (X-Hub-Signature-256, over the body). Where both
    are given, the first counts.

    A signature is an HMAC: a digest of the content and a secret. Only who knows the
    secret can make it, and it fits no other content. So a right signature says who sent
    this and that nobody has changed it. The time, in the first scheme, says that it is
    no old copy.

    A signature says nothing of what it does not cover. Neither covers the path and the
    query: give each topic a secret of its own. `?source=` and `?time=` may be changed
    in a copy; they make no new event of a known id. The second scheme does not cover
    the id either: a copy of a delivery with another X-GitHub-Delivery is a new event,
    and nobody can tell.
    """
    secrets = access.secrets_for(request.head)
    headers = request.head.headers
    if STANDARD_SIGNATURE in headers:
        reason = _fault_of_standard_signature(request, secrets)
        if not reason:
            reason = _fault_of_time(headers[TIME_HEADER], now_us, access.webhook_tolerance_us)
    elif HUB_SIGNATURE in headers:
        reason = _fault_of_hub_signature(request, secrets)
    else:
        reason = (
            "this topic has a --webhook-secret: sign with it (webhook-signature or"
            " X-Hub-Signature-256), or send Authorization: Bearer and the token"
        )
    if reason:
        raise HTTPError("unauthorized", reason, (("WWW-Authenticate", "Bearer"),))


def _fault_of_standard_signature(request: Request, secrets: Sequence[str]) -> str:
    """What is wrong with the signature of a Standard Webhook, or "".

    https://www.standardwebhooks.com: `webhook-signature` is a list, separated by
    blanks. Each part is "v1," and the base64 of the HMAC-SHA256 over
    `webhook-id.webhook-timestamp.body`. There are several while a secret is being
    replaced. Other versions are passed over.
    """
    headers = request.head.headers
    for name in ("webhook-id", TIME_HEADER):
        if name not in headers:
            return f"webhook-signature goes with {name}, which is missing"
    prefix = f"{headers['webhook-id']}.{headers[TIME_HEADER]}."
    content = prefix.encode("latin-1") + request.body
    given = headers[STANDARD_SIGNATURE].split(" ")
    right = False
    for secret in secrets:
        for key in standard_keys(secret):
            signature = b2a_base64(_hmac_sha256(key, content), newline=False)
            if _is_one_of("v1," + signature.decode("ascii"), given):
                right = True
    return "" if right else "webhook-signature is not made with the secret of this topic"


def _fault_of_time(text: str, now_us: int, tolerance_us: int) -> str:
    """Why a signature of this time is not taken, or "": an old one may be a replay.

    A replay is harmless here as long as its id is known: it is a duplicate. The check
    is for the time after --dedup-retention, and because the scheme asks for it.
    """
    if tolerance_us == 0:
        return ""
    if re.fullmatch("[0-9]{1,11}", text) is None:
        return f"webhook-timestamp is no number of seconds since 1970: {shown(text)}"
    ahead_us = int(text) * 1_000_000 - now_us
    if abs(ahead_us) <= tolerance_us:
        return ""
    direction = "ahead of" if ahead_us > 0 else "behind"
    return (
        f"webhook-timestamp is {abs(ahead_us) // 1_000_000} s {direction} the clock here:"
        " --webhook-tolerance allows more, and 0 any time"
    )


def _fault_of_hub_signature(request: Request, secrets: Sequence[str]) -> str:
    """What is wrong with an X-Hub-Signature-256, or "": "sha256=" and hexadecimal."""
    given = request.head.headers[HUB_SIGNATURE].lower()
    right = False
    for secret in secrets:
        signature = "sha256=" + _hmac_sha256(secret.encode("utf-8"), request.body).hex()
        if _is_one_of(signature, [given]):
            right = True
    return "" if right else "X-Hub-Signature-256 is not made with the secret of this topic"


def standard_keys(secret: str) -> List[bytes]:
    """The keys that a secret may stand for in Standard Webhooks.

    It is base64, mostly after "whsec_". Some senders sign with the text itself, so
    without "whsec_" both are tried. Only exact base64 of MIN_SIGNING_KEY bytes counts:
    a word of four letters would be a key of three bytes, which can be guessed.

    >>> standard_keys("whsec_c2VjcmV0IG9mIHRoZSBzaG9w")
    [b'secret of the shop']
    >>> standard_keys("open")
    [b'open']
    """
    keys = []
    encoded = secret
    if secret.startswith("whsec_"):
        encoded = secret[len("whsec_") :]
    else:
        keys.append(secret.encode("utf-8"))
    if len(encoded) % 4 == 0 and _BASE64.fullmatch(encoded):
        key = a2b_base64(encoded)
        if len(key) >= MIN_SIGNING_KEY:
            keys.append(key)
    return keys


def _hmac_sha256(key: bytes, content: bytes) -> bytes:
    """The HMAC-SHA256 of RFC 2104: 32 bytes."""
    # Not at the top: small systems have it in a package of its own.
    import hmac

    return hmac.new(key, content, sha256).digest()


def _is_one_of(expected: str, given: Sequence[str]) -> bool:
    """Whether a signature was given; it takes as long wherever they differ."""
    import hmac

    found = False
    for each in given:
        if hmac.compare_digest(expected.encode("ascii"), each.encode("latin-1")):
            found = True
    return found


def admit_delivery(api: API, request: Request, topic: str, peer: str) -> bool:
    """Let a delivery pass if it must be signed and is. Raises HTTPError.

    Returns whether a signature that counted covers `webhook-id`.

    A sender that signs wrongly does it again and again: the log says it once, until it
    has signed rightly. Senders are told apart by topic and address. When too many are
    remembered, all are forgotten, and some lines are logged once more.
    """
    if not api.access.secrets_for(request.head):
        return False
    signer = (topic, peer)
    try:
        verify_signature(request, api.access, api.clock())
    except HTTPError as error:
        error.is_known = signer in api.wrong_signers
        if len(api.wrong_signers) >= MAX_WRONG_SIGNERS:
            api.wrong_signers.clear()
        api.wrong_signers[signer] = None
        raise
    api.wrong_signers.pop(signer, None)
    return STANDARD_SIGNATURE in request.head.headers


# ---- POST /events/{topic}: an inbox for webhooks ----

ID_PLACE = Field(
    "id",
    "body:/id",
    text_schema("(?:header:[^\\s:]+|body:(?:/(?:[^~]|~[01])*)?|content|random)"),
    "where the event id is: `header:NAME`, `body:/json/pointer`, `content` or `random`; without"
    " it, `Idempotency-Key`, `webhook-id`, `X-GitHub-Delivery` or `ce-id`",
)
TIME_PLACE = Field(
    "time",
    "body:/at",
    text_schema("(?:header:[^\\s:]+|body:(?:/(?:[^~]|~[01])*)?)"),
    "where the time is: `header:NAME` or `body:/json/pointer`, ISO 8601 or seconds since 1970;"
    " without it, `webhook-timestamp`, else now",
)
DELIVERY_KEY = Field(
    "Idempotency-Key", "delivery-1", _TEXT_SCHEMA, "the event id, if `id` says nothing else"
)
_ANY_SCHEMA: Schema = {}


@route(
    "POST",
    "/events/{topic}",
    query=(ID_PLACE, TIME_PLACE, SOURCE),
    headers=(DELIVERY_KEY,),
    bodies=(
        Body(
            JSON_TYPE,
            '{"id":"evt_1","n":1}',
            _ANY_SCHEMA,
            'an object is the payload; `7` becomes `{"value": 7}`',
        ),
        Body(FORM_TYPE, "id=evt_1&n=1", {"type": "object"}, "an object of its fields"),
        Body(TEXT_TYPE, "backup done", _TEXT_SCHEMA, 'text becomes `{"message": text}`'),
    ),
    answers=(
        Answer(
            202,
            "on disk, also for what was there before",
            _TAKEN_EXAMPLE,
            ask="?id=body:/id",
            path="/events/hooks/shop",
        ),
    ),
    problems=WRITING,
)
async def receive_webhook(api: API, request: Request, peer: str) -> Response:
    """Take a webhook: one event whose payload is the body.

    The order counts: the signature is checked before anything of the body is read. With
    a `webhook-signature` that counts, `webhook-id` is the id, and no other is taken.
    """
    topic = "/".join(request.head.path[1:])
    is_id_signed = admit_delivery(api, request, topic, peer)
    events = read_delivered_event(api, request, peer, is_id_signed)
    receipt = await api.pipeline.publish(events, len(request.body))
    assert receipt is not None, "it waits, so there is a receipt"
    counts = {
        "status": "accepted",
        "accepted": 1,
        "unique": receipt.unique,
        "duplicates": receipt.duplicates,
        "conflicts": receipt.conflicts,
        "stored": True,
    }
    return json_response(202, counts)


def read_delivered_event(api: API, request: Request, peer: str, is_id_signed: bool) -> List[Event]:
    """The one event of a delivery. Raises HTTPError or InvalidEvents.

    A function of its own, so that the decoded body is gone before the event is stored:
    it can take 20 times the memory of its text.
    """
    delivery = read_delivery(request)
    event = {
        "topic": "/".join(request.head.path[1:]),
        "event_id": delivery_id(delivery, is_id_signed, api.random_id),
        "timestamp": format_timestamp(delivery_time(delivery, api.clock())),
        "source": request.head.query.get("source", peer),
        "payload": delivery.payload,
    }
    try:
        return read_events([event])
    except InvalidEvents:
        # What is JSON and cannot be kept, such as 1e999, is kept as it was written.
        event["payload"] = {"message": body_text(request)}
        return read_events([event])


# ---- CloudEvents 1.0 ----

# https://github.com/cloudevents/spec: what an event is (spec.md), how it is written in
# JSON (formats/json-format.md), and how it comes over HTTP
# (bindings/http-protocol-binding.md) in three modes: structured, the event is the body;
# batched, a list of events is; binary, the attributes are header fields that begin with
# "ce-", and the body is the data.
#
# Two CloudEvents are the same if `source` and `id` are (spec.md §3.1.1). So our event
# id is both, with a blank between: a source is a URI, and a URI has no blank. Topic,
# source and timestamp are those of the CloudEvent. The payload is everything else, so
# that nothing is lost: an attribute is left out only if our fields give it back.

CLOUD_EVENT_TYPE = "application/cloudevents"
CLOUD_EVENT_VERSION = "1.0"
_ATTRIBUTE_FIELD = re.compile("ce-(?P<name>[a-z0-9]+)")
_BLANK = re.compile(r"\s")


def is_cloud_events(content_type: str) -> bool:
    """Whether a body of this media type is a CloudEvent, or several."""
    return content_type.startswith(CLOUD_EVENT_TYPE)


def read_cloud_events(request: Request, now_us: int, most: int) -> List[Event]:
    """The events of a request in any of the three modes.

    In two steps: first each value must be a CloudEvent by its own rules, then its
    fields must be an event by ours. Faults name the attribute that the sender knows
    where the first step finds them, and our field where the second does. Raises
    HTTPError, NotJSON, BatchTooLarge or InvalidEvents.
    """
    query = request.head.query
    if "source" in query:
        raise HTTPError("bad-parameter", "a CloudEvent names its own source; ?topic= is allowed")
    content_type = request.head.content_type
    if not is_cloud_events(content_type):
        found = [binary_cloud_event(request)]
    elif content_type in (CLOUD_EVENT_TYPE + "+json", CLOUD_EVENT_TYPE + "-batch+json"):
        found = structured_cloud_events(request.body, content_type.endswith("-batch+json"))
    else:
        raise NotJSON(
            f"CloudEvents are read in JSON only: send {CLOUD_EVENT_TYPE}+json or"
            f" {CLOUD_EVENT_TYPE}-batch+json, not {content_type[:60]}"
        )
    if len(found) > most:
        raise BatchTooLarge(len(found), most)
    faults: List[Fault] = []
    for index, attributes in enumerate(found):
        faults += itertools.islice(cloud_event_faults(index, attributes), MAX_FAULTS)
    if faults:
        raise InvalidEvents(faults[:MAX_FAULTS])
    values = []
    for attributes in found:
        values.append(cloud_event_fields(attributes, query.get("topic"), now_us))
    return read_events(values)


def structured_cloud_events(body: bytes, is_batch: bool) -> List[Any]:
    """The CloudEvents of a body: one, or a list in the batched mode."""
    values = json_values(decode_text(body), most=1)
    if len(values) != 1:
        count = "several JSON values" if values else "no JSON value"
        raise NotJSON(f"the body holds {count}: send one CloudEvent, or a batch")
    (value,) = values
    if not is_batch:
        return [value]
    if not isinstance(value, list):
        message = "must be a list of CloudEvents, not " + shown(value)
        raise InvalidEvents([Fault(0, "", message)])
    return value


def binary_cloud_event(request: Request) -> Dict[str, Any]:
    """A CloudEvent whose attributes are header fields, as its JSON format has it."""
    attributes: Dict[str, Any] = {}
    for field, value in request.head.headers.items():
        match = _ATTRIBUTE_FIELD.fullmatch(field)
        if match is not None:
            attributes[match["name"]] = _attribute_value(value)
    content_type = request.head.headers.get("content-type")
    if content_type:
        attributes["datacontenttype"] = content_type
    if request.body:
        name, data = _event_data(request)
        attributes[name] = data
    return attributes


def _attribute_value(value: str) -> str:
    """An attribute from its header field: percent-encoded UTF-8 (binding §3.1.3.2).

    Older senders write other characters as they are, in ISO 8859-1.
    """
    raw = value.encode("latin-1")  # as it came
    if len(raw) >= 2 and raw.startswith(b'"') and raw.endswith(b'"'):
        # Older senders put it in quotes, with backslashes.
        raw = re.sub(rb"\\(.)", rb"\1", raw[1:-1])
    raw = percent_decode_bytes(raw)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw.decode("latin-1")


def _event_data(request: Request) -> Tuple[str, Any]:
    """The member that holds the data in JSON (JSON format §3.1), and the data.

    JSON and text go into "data"; bytes that are no UTF-8 go into "data_base64". Raises
    NotJSON if the data is called JSON and is not.
    """
    content_type = request.head.content_type
    is_json = content_type in ("", JSON_TYPE) or content_type.endswith("+json")
    try:
        text = decode_text(request.body)
    except NotJSON:
        if content_type == JSON_TYPE:
            raise
        return "data_base64", b2a_base64(request.body, newline=False).decode("ascii")
    if not is_json:
        return "data", text
    values = json_values(text, most=1)
    if len(values) != 1:
        count = "several JSON values" if values else "no JSON value"
        raise NotJSON(f"the data holds {count} instead of one")
    return "data", values[0]


def cloud_event_faults(index: int, attributes: Any) -> Iterator[Fault]:
    """What keeps a value from being a CloudEvent. Our own rules are applied later."""
    if not isinstance(attributes, dict):
        yield Fault(index, "", "must be a CloudEvent, not " + shown(attributes))
        return
    for name in ("specversion", "id", "source", "type"):
        value = attributes.get(name)
        if value is None:
            yield Fault(index, name, "is missing: a CloudEvent has specversion, id, source, type")
        elif not isinstance(value, str) or not value:
            yield Fault(index, name, f"must be a text that is not empty: {shown(value)}")
        elif name == "specversion" and value != CLOUD_EVENT_VERSION:
            yield Fault(index, name, f"must be {CLOUD_EVENT_VERSION}: {shown(value)}")
        elif name == "source" and _BLANK.search(value):
            yield Fault(index, name, f"must be a URI reference, without blanks: {shown(value)}")
    if "data" in attributes and "data_base64" in attributes:
        yield Fault(index, "data", "goes not with data_base64: send one of them")
    time_text = attributes.get("time")
    if time_text is not None:
        try:
            parse_timestamp(time_text if isinstance(time_text, str) else "")
        except ValueError as error:
            yield Fault(index, "time", f"{error}: {shown(time_text)}")


def cloud_event_fields(
    attributes: Dict[str, Any], topic: Optional[str], now_us: int
) -> Dict[str, Any]:
    """A CloudEvent as the fields of an event. It must be without faults.

    `topic` replaces its type as our topic, and the type then stays in the payload. A
    time is left out of the payload only if our timestamp says exactly the same.

    >>> attributes = {"id": "7", "source": "/door", "type": "opened"}
    >>> attributes["specversion"] = "1.0"
    >>> fields = cloud_event_fields(attributes, None, now_us=0)
    >>> fields["topic"], fields["event_id"], fields["payload"]
    ('opened', '/door 7', {'specversion': '1.0'})
    """
    given_back = {"id", "source"}
    if topic is None:
        topic = attributes["type"]
        given_back.add("type")
    timestamp = attributes.get("time")
    if timestamp is None:
        timestamp = format_timestamp(now_us)
    elif is_given_back(timestamp):
        given_back.add("time")
    payload = {}
    for name, value in attributes.items():
        if name not in given_back:
            payload[name] = value
    return {
        "topic": topic,
        "event_id": f"{attributes['source']} {attributes['id']}",
        "timestamp": timestamp,
        "source": attributes["source"],
        "payload": payload,
    }


def is_given_back(time_text: str) -> bool:
    """Whether our timestamp says exactly what a valid time says, but for zeros.

    >>> is_given_back("2026-01-01T12:00:00.5Z"), is_given_back("2016-12-31T23:59:60Z")
    (True, False)
    """
    timestamp = format_timestamp(parse_timestamp(time_text))
    return time_text.endswith("Z") and timestamp.startswith(time_text[:-1])


# ---- Removing and counting ----

# Whoever erases wants a text to be gone, and the books to be right. So an erased event
# leaves its tombstone, as one that retention removes: its publisher may still repeat
# it, and the repeat is a duplicate.
#
#   * A request without a topic erases nothing: a parameter that got lost must
#     not empty the store.
#   * When the answer to an erasure is sent, zeros are written over the text in the file
#     (§3 names a gap), and the WAL is cut. Another program that reads the store can
#     keep the WAL from being cut; then the log says so.
#
# Counts are made when they are asked for. Nothing is counted in advance, so an event
# that is erased is in no count any more.

# Lengths of the spans of GET /counts, in microseconds.
_SPANS_US = {"minute": 60_000_000, "hour": 3_600_000_000, "day": DAY_US}

_PER_SCHEMA: Schema = {"type": "string", "enum": list(_SPANS_US), "default": "hour"}
_BY_SCHEMA: Schema = {"type": "string", "enum": ["topic"]}
PER = Field("per", "day", _PER_SCHEMA, "the length of a span")
BY = Field("by", "topic", _BY_SCHEMA, "a count for each topic")
ERASED_TOPIC = Field(
    "topic",
    "door",
    text_schema(".+"),
    "needed: this topic, or those that begin with what stands before a final `*`",
)

ERASING = ("forbidden", "stopping", *READING)

_ONE_DAY = "?per=day&since=2026-01-01&until=2026-01-02"


@route(
    "GET",
    "/counts",
    query=(PER, TOPIC_FILTER, SOURCE_FILTER, SINCE, UNTIL, TZ, BY),
    answers=(
        Answer(
            200,
            "by time; spans without events are left out",
            '{"per": "day", "counts": [{"from": "2026-01-01T00:00:00.000000Z", "count": 1}]}',
            ask=_ONE_DAY,
        ),
        Answer(
            200,
            "by time and topic",
            '{"per": "day", "counts": ['
            '{"from": "2026-01-01T00:00:00.000000Z", "topic": "door", "count": 1}]}',
            ask=_ONE_DAY + "&by=topic",
        ),
    ),
    problems=READING,
)
async def get_counts(api: API, request: Request, peer: str) -> Response:
    """How many events there are, by time: without `since` in the last 24 hours.

    By the timestamp of the events, not by their arrival. `from` is the start of a span
    in the local time of `tz`. Removed events are not counted.
    """
    query = request.head.query
    counts_query = read_count_query(query, api.clock())
    counts = []
    for each in await api.pipeline.counts(counts_query):
        count: Dict[str, Any] = {"from": format_local(each.start_us, counts_query.offset_us)}
        if counts_query.by_topic:
            count["topic"] = each.topic
        count["count"] = each.events
        counts.append(count)
    return json_response(200, {"per": query.get("per", "hour"), "counts": counts})


def read_count_query(query: Dict[str, str], now_us: int) -> CountQuery:
    """What is to be counted. Raises HTTPError.

    >>> query = read_count_query({"per": "day", "topic": "logs/*"}, now_us=DAY_US)
    >>> query.since, query.until, query.topic, query.prefix
    (0, 86400000000, 'logs/', True)
    """
    per = query.get("per", "hour")
    if per not in _SPANS_US:
        raise bad_parameter("per", "one of " + ", ".join(_SPANS_US), per)
    if query.get("by", "topic") != "topic":
        raise bad_parameter("by", "topic", query["by"])
    since = read_instant(query, "since", now_us)
    if since is None:
        since = now_us - DAY_US
    until = read_instant(query, "until", now_us)
    if until is None:
        until = now_us
    topic, prefix = read_topic(query)
    return CountQuery(
        span_us=_SPANS_US[per],
        since=since,
        until=until,
        offset_us=read_offset(query),
        topic=topic,
        prefix=prefix,
        source=query.get("source"),
        by_topic="by" in query,
    )


def format_local(instant_us: int, offset_us: int) -> str:
    """An instant in a local time that is so far ahead of UTC.

    >>> format_local(0, 7_200_000_000), format_local(0, -5_400_000_000)
    ('1970-01-01T02:00:00.000000+02:00', '1969-12-31T22:30:00.000000-01:30')
    """
    if not offset_us:
        return format_timestamp(instant_us)
    sign = "-" if offset_us < 0 else "+"
    hours, minutes = divmod(abs(offset_us) // 60_000_000, 60)
    try:
        local = format_timestamp(instant_us + offset_us)
    except OverflowError:
        # The midnight before the year 1, or after the year 9999: no local time can be
        # written, so it is UTC.
        return format_timestamp(max(instant_us, -YEAR_1_US))
    return f"{local[:-1]}{sign}{hours:02d}:{minutes:02d}"


@route(
    "DELETE",
    "/events/{topic}/{event_id}",
    answers=(Answer(204, "its content is gone", "", ""),),
    problems=("no-such-event", "gone", *ERASING),
)
async def erase_event(api: API, request: Request, peer: str) -> Response:
    """Erase one event, also from the file; its id stays known.

    204 when it is done. Asked again, it is 410: it had been removed before.
    """
    topic, event_id = read_identity(request)
    erased = await api.pipeline.erase_event(topic, event_id)
    if erased is None:
        raise HTTPError(
            "no-such-event",
            f"no event {shown(event_id)} was ever stored under topic {shown(topic)}",
        )
    if not erased:
        raise HTTPError("gone", "the event had been removed before; its identity is still known")
    log.info("ERASED - topic: %s, event_id: %s, for %s", topic, event_id, peer)
    return respond(204, b"")


@route(
    "DELETE",
    "/events",
    query=(ERASED_TOPIC, UNTIL, TZ),
    answers=(Answer(200, "so many were erased", '{"removed": 0}', ask="?topic=old/*&until=7d"),),
    problems=ERASING,
)
async def erase_events(api: API, request: Request, peer: str) -> Response:
    """Erase the events of a topic, or those of them with a timestamp before `until`.

    It works in short steps, so commits go on meanwhile. Events that are published after
    it began are spared. If it breaks off, some are erased: ask again for the rest.
    """
    query = request.head.query
    topic, prefix = read_topic(query)
    if not topic:
        raise HTTPError(
            "bad-parameter",
            "say which topic: ?topic=name, or ?topic=name* for all that begin so; nothing was"
            " removed",
        )
    until_us = read_instant(query, "until", api.clock())
    erased = await api.pipeline.erase_matching(topic, prefix, until_us)
    log.info("ERASED - %d events of topic: %s, for %s", erased, query["topic"], peer)
    return json_response(200, {"removed": erased})


# ============================================================================
# §9  Server: sockets, deadlines, shutdown
#
# One coroutine for each connection. It reads, feeds the parser, has the
# request answered, writes, and starts again. One sweeper looks at all
# connections four times a second and cuts off those that are late. A timer for
# each read would cost something with every request, and a client that sends a
# byte a second would renew it for ever.
#
# Knows §6 (HTTP) and §8 (the API that answers). Must not know routes, events,
# JSON or the store.
#
#   * Requests of one connection are answered in order, one at a time. A flood of them
#     only fills the client's own socket.
#   * After an error or a "close" nothing more of that connection is read as a request.
#   * A client that is refused while it still sends gets its answer before the reset
#     (RFC 9112 §9.6): half-close, then drain.
#   * What all connections together keep in memory is bounded. First come, first
#     finished: when there is no room, the youngest body or answer goes, so that those
#     nearest to their end reach it.
#   * A request that has been read gets an answer, whatever fails meanwhile.
#   * Nobody keeps a request while its answer is sent, or while the next is awaited.
#
# Where a coroutine may be interrupted: only at an `await`. `Server` cancels tasks in
# two places, `_cut_off` and `stop`, and a cancelled task wakes up with CancelledError
# at the `await` where it waits. All of `_Connection` and `_Room` belongs to the one
# thread of the loop, so no lock is needed.
#
# Simpler than a production system: one process, one thread, no HTTP/2, no shares for
# each client. That would take a proxy in front.
# ============================================================================

# Connections at a time. One costs about 6 KB while it is idle.
MAX_CONNECTIONS = 1000


class ServerLimits(NamedTuple):
    """What the server allows. Sizes are in bytes, names that end in `_s` in seconds."""

    # Of one body, as sent and inflated.
    max_body: int = MAX_BODY_BYTES

    connections: int = MAX_CONNECTIONS

    # Beyond the limit, so many connections at a time get a 503. Further ones are closed
    # without an answer, because answering costs memory as well.
    refusals_at_once: int = 64

    # One read from a socket. A body or an answer that fits into one is not counted
    # below.
    read: int = 64 * 1024

    # Bodies that arrive and answers that leave, of all connections together. A body
    # whose length is announced counts whole from its start: to refuse it then is
    # cheaper than to cut it off later. The limit is never less than two bodies of the
    # largest size.
    buffers: int = 64 * 1024 * 1024

    # Large bodies that are answered at a time; further ones wait. Each takes several
    # times its length while it is parsed, and many that are complete in the same moment
    # would overflow the queue: they would be refused after all of them has been sent.
    large_at_once: int = 4

    # A kept connection without a request. nginx waits 75 s, Apache 5 s.
    idle_s: float = 30.0

    # From the first byte of a request to the end of its head, in total.
    head_s: float = 10.0

    # A TLS handshake. asyncio shows us a connection only after it, so `connections`
    # does not count it; that it is short is all that bounds how many there are. They
    # cost a descriptor each: `ulimit -n` should be well above `connections`.
    handshake_s: float = 5.0

    # Without a single byte of the body. Apache's mod_reqtimeout gives 20 s as well.
    body_stall_s: float = 20.0

    # A client that does not read its answer. nginx gives 60 s between two writes
    # (`send_timeout`). The client's kernel takes up to 160 KB for it and says nothing
    # until most of them are read. So a client that reads steadily needs 5.5 KB/s to be
    # seen to read; measured with Linux on both sides of loopback.
    write_stall_s: float = 30.0

    # So long after its start, a body or an answer must have moved at this rate on the
    # average, in bytes per second.
    grace_s: float = 30.0
    rate: int = 1024

    # The same where there is no room for others. At this rate the largest body of 4 MB
    # takes 256 s. Without it, sixteen clients that announce a large body and send next
    # to nothing could keep all others out.
    crowded_grace_s: float = 5.0
    crowded_rate: int = 16 * 1024

    # Where there is no room for others, a body must have begun to come so soon after
    # its head: an announcement costs its sender nothing. Over a long line the first
    # bytes take 0.2 s.
    crowded_silence_s: float = 0.25

    # A follower that waits for events, and whose client has closed, is let go after so
    # long. To close only one half looks the same, so whoever follows must not do that.
    gone_s: float = 2.0

    # A larger answer is written in slices, and each renews the client's deadline. The
    # kernel takes a slice whole, so a slice must take no longer than `write_stall_s` at
    # `rate`: 32 KB in 30 s is 1.07 KB/s.
    slice: int = 32 * 1024

    # How long what a refused client still sends is read and thrown away. nginx waits 5
    # s for more of it, and 30 s in total (`lingering_timeout`, `lingering_time`).
    linger_s: float = 2.0

    # How exactly deadlines are kept.
    sweep_s: float = 0.25

    # So many answers without waiting for the network, then others have a turn.
    answers_in_a_row: int = 16


# Connections that the kernel completes before we take them. Linux cuts it to
# net.core.somaxconn, which is 4,096 since Linux 5.4 and was 128 before.
_KERNEL_BACKLOG = 1024

# While descriptors lack, asyncio tries to accept once a second. An error that comes
# within so many seconds of the last belongs to the same shortage.
_SHORTAGE_S = 10.0

_NO_ROOM = "too much is on its way at once: try again"

# The body of what is sent when even the answer that says so cannot be made. Nothing in
# it depends on the request, or on what failed.
_LAST_RESORT = (
    b'{"type":"docs#internal-error","title":"The service has a bug","status":500,'
    b'"detail":"this is our fault; the log says more"}\n'
)


class _Connection:
    """What the sweeper needs to know of one connection.

    `phase` is "idle", "head", "body", "work", "write", "linger" or, between two pieces
    of an answer, "stream". All instants are the loop's, in seconds.
    """

    __slots__ = (
        "cut_off",
        "kept",
        "moved",
        "moved_at",
        "peer",
        "phase",
        "reader",
        "request",
        "since",
        "task",
        "writer",
    )

    def __init__(
        self,
        task: "asyncio.Task[Any]",
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        now: float,
    ) -> None:
        address = writer.get_extra_info("peername") or ("unknown",)
        self.task = task
        self.reader = reader
        self.writer = writer
        # What is to be answered next. It stands here and nowhere else, so that whoever
        # answers it can let go of it.
        self.request: Optional[Request] = None
        self.peer = str(address[0])
        self.phase = "idle"
        self.since = now  # when the phase began
        self.moved = 0  # bytes that came or went in this phase
        self.moved_at = now  # when the last of them did
        # Bytes that count against the room; only `_Room` writes this.
        self.kept = 0
        self.cut_off: Optional[HTTPError] = None  # why the connection was cut off

    def enter(self, phase: str, now: float) -> None:
        """Begin a phase; nothing happens if it has begun already."""
        if phase != self.phase:
            self.phase = phase
            self.since = now
            self.moved = 0
            self.moved_at = now

    def move(self, size: int, now: float) -> None:
        """Take down that `size` bytes came or went."""
        self.moved += size
        self.moved_at = now

    def overdue(self, now: float, limits: ServerLimits) -> str:
        """Why this connection has waited long enough, or ""."""
        if self.phase == "idle" and now - self.since > limits.idle_s:
            return f"no request came for {limits.idle_s:.0f} s"
        if self.phase == "head" and now - self.since > limits.head_s:
            return f"the request head took longer than {limits.head_s:.0f} s"
        if self.phase == "body":
            if now - self.moved_at > limits.body_stall_s:
                return f"no byte of the body came for {limits.body_stall_s:.0f} s"
            if self.is_slower(limits.rate, limits.grace_s, now):
                return f"the body came slower than {limits.rate} bytes/s"
        if self.phase == "write":
            if now - self.moved_at > limits.write_stall_s:
                return f"nothing of the answer was read for {limits.write_stall_s:.0f} s"
            if self.is_slower(limits.rate, limits.grace_s, now):
                return f"the answer was read slower than {limits.rate} bytes/s"
        if self.phase == "stream" and now - self.since > limits.gone_s and self.is_gone():
            return "the client has closed"
        return ""

    def is_gone(self) -> bool:
        """Whether the client has closed, or at least sends no more."""
        return self.reader.at_eof() or self.writer.transport.is_closing()

    def is_slower(self, rate: int, grace_s: float, now: float) -> bool:
        """Whether a body or an answer is past its grace and moves below `rate`."""
        if self.phase not in ("body", "write"):
            return False
        age_s = now - self.since
        return age_s > grace_s and self.moved < age_s * rate

    def is_silent(self, silence_s: float, now: float) -> bool:
        """Whether a body was announced so long ago and nothing more of it has come."""
        return self.phase == "body" and self.moved == 0 and now - self.since > silence_s


class _Room:
    """Who keeps bodies and answers in memory, and how much of it all together."""

    def __init__(self) -> None:
        self.kept = 0
        # A dictionary remembers the order in which its keys came: the oldest is first.
        self._holders: Dict[_Connection, None] = {}

    def put(self, connection: _Connection, size: int) -> None:
        """Count `size` bytes for a connection, in place of what it kept before."""
        self.kept += size - connection.kept
        connection.kept = size
        self._holders[connection] = None

    def leave(self, connection: _Connection) -> None:
        """Count nothing more for a connection, if anything was."""
        if connection in self._holders:
            self.put(connection, 0)
            del self._holders[connection]

    def youngest_first(self) -> List[_Connection]:
        """Who keeps something, in the order in which they have to go.

        A stream between two pieces keeps nothing, and has its place in the order.
        """
        holders = []
        for connection in reversed(list(self._holders)):
            if connection.kept:
                holders.append(connection)
        return holders


def _with_request(error: HTTPError, head: Optional[Head]) -> HTTPError:
    """The refusal, which also says what is known of the request."""
    if head is not None:
        error.name_request(head.path, head.headers)
    return error


class Server:
    """Serves `api` on a socket. `clock_s` gives seconds since 1970.

    The order of calls is `bind`, `listen`, `stop`, all in the same loop.
    """

    def __init__(
        self,
        api: API,
        clock_s: Callable[[], float],
        limits: ServerLimits = ServerLimits(),
    ) -> None:
        self._api = api
        self._clock_s = clock_s
        self._limits = limits
        self._room = _Room()
        self._room_limit = max(limits.buffers, 2 * limits.max_body)
        self._connections: Set[_Connection] = set()
        api.connections = self._connections.__len__
        # Seconds, by a clock that never jumps.
        self._time = time.monotonic
        self._stopping = False
        # When a connection could not be taken last.
        self._shortage_at = float("-inf")
        self._date_second = -1
        self._date = ""

    async def bind(self, host: str, port: int, tls: Any = None) -> List[str]:
        """Bind without listening yet; returns the addresses as "host:port".

        `tls` is an ssl.SSLContext, or None for plain TCP. Raises OSError.
        """
        # Who has a large body waits here; whoever has been answered wakes the next.
        self._large_bodies = asyncio.Semaphore(self._limits.large_at_once)
        self._server = await asyncio.start_server(
            self._serve,
            host,
            port,
            # The reader stops reading from the socket at twice its limit.
            limit=self._limits.read // 2,
            # asyncio accepts as many connections in one turn of the loop, and for each
            # that it cannot take for want of descriptors it sets a timer. With 1 it is
            # one timer.
            backlog=1,
            start_serving=False,
            ssl=tls,
            ssl_handshake_timeout=self._limits.handshake_s if tls else None,
        )
        addresses = []
        for sock in self._server.sockets or []:
            bound_host, bound_port, *_ = sock.getsockname()
            if ":" in bound_host:
                bound_host = f"[{bound_host}]"
            addresses.append(f"{bound_host}:{bound_port}")
        return addresses

    async def listen(self) -> None:
        """Start taking connections. Raises OSError."""
        await self._server.start_serving()
        self._tune_listening_sockets()
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(self._on_trouble)
        self._sweeper = loop.create_task(self._sweep())

    def _tune_listening_sockets(self) -> None:
        """Set what asyncio does not; where that cannot be done, do without."""
        # asyncio has loaded it already.
        import socket

        # Only Linux and macOS have this option. Without it the kernel takes up to 4 MB
        # of an answer and says nothing until a third of them is gone, so a client that
        # reads at 40 KB/s would look like one that does not read. Connections inherit
        # it.
        option = getattr(socket, "TCP_NOTSENT_LOWAT", None)
        for sock in self._server.sockets or []:
            if option is not None:
                with contextlib.suppress(OSError):
                    sock.setsockopt(socket.IPPROTO_TCP, option, 2 * self._limits.slice)
            # asyncio's own socket object does not let us call listen(); a duplicate
            # refers to the same queue of the kernel.
            with contextlib.suppress(OSError, AttributeError, NotImplementedError):
                with contextlib.closing(sock.dup()) as duplicate:
                    duplicate.listen(_KERNEL_BACKLOG)

    def _on_trouble(self, loop: asyncio.AbstractEventLoop, context: Dict[str, Any]) -> None:
        """What asyncio has nobody to tell: a shortage of descriptors is said once."""
        if "accept" not in str(context.get("message")):
            loop.default_exception_handler(context)
            return
        now = loop.time()
        if now - self._shortage_at > _SHORTAGE_S:
            log.error("NO CONNECTION TAKEN - %s: raise the limit (ulimit -n)", context["exception"])
        self._shortage_at = now

    async def stop(self, timeout_s: float) -> None:
        """Take no more connections, and end those there are.

        Idle ones are closed at once. Requests under way have `timeout_s`, then they are
        cut off.
        """
        self._stopping = True
        self._server.close()
        tasks = set()
        for connection in self._connections:
            tasks.add(connection.task)
            if connection.phase == "idle":
                connection.task.cancel()
        # The second wait is for what cancelled tasks still do: closing their sockets.
        for wait_s in (timeout_s, 1.0):
            if tasks:
                _, tasks = await asyncio.wait(tasks, timeout=wait_s)
            for task in tasks:
                task.cancel()
        self._sweeper.cancel()

    def kept_bytes(self) -> int:
        """What bodies and answers keep in memory, as far as it counts."""
        return self._room.kept

    async def _sweep(self) -> None:
        """Cut off whoever is late, until `stop` cancels this task."""
        while True:
            await asyncio.sleep(self._limits.sweep_s)
            now = self._time()
            for connection in list(self._connections):
                reason = connection.overdue(now, self._limits)
                if reason and connection.cut_off is None:
                    self._cut_off(connection, HTTPError("timeout", f"{reason}: be faster"))

    def _cut_off(self, connection: _Connection, reason: HTTPError) -> None:
        """End a connection that waits in a read or a write."""
        connection.cut_off = reason
        self._room.leave(connection)
        if connection.phase == "write":
            log.warning("CUT OFF - %s: %s", connection.peer, reason.detail)
            connection.writer.transport.abort()
        else:
            # The task waits in a read. `_attend` turns the cancellation into an answer.
            connection.task.cancel()

    def _keep(self, connection: _Connection, size: int) -> bool:
        """Count `size` bytes for a body or an answer; whether they have room."""
        if size <= self._limits.read:
            return True
        self._room.put(connection, size)
        return self._room.kept <= self._room_limit or self._make_room(connection)

    def _make_room(self, connection: _Connection) -> bool:
        """End bodies and answers until the rest has room; False if it must itself go.

        First those go that hardly move. Then the youngest goes: `connection` itself, if
        it has just begun. The oldest stays, even if it is too large for all the room:
        otherwise it could never be sent.
        """
        rate = self._limits.crowded_rate
        grace_s = self._limits.crowded_grace_s
        silence_s = self._limits.crowded_silence_s
        now = self._time()
        for other in self._room.youngest_first():
            is_late = other.is_slower(rate, grace_s, now) or other.is_silent(silence_s, now)
            if other is not connection and is_late:
                self._cut_off(other, HTTPError("overloaded", _NO_ROOM))
                if self._room.kept <= self._room_limit:
                    return True
        for other in self._room.youngest_first()[:-1]:
            if other is connection:
                self._room.leave(connection)
                return False
            # What is in work will be answered, and then leaves by itself.
            if other.phase in ("body", "write"):
                self._cut_off(other, HTTPError("overloaded", _NO_ROOM))
                if self._room.kept <= self._room_limit:
                    return True
        return True

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, from accept to close. asyncio runs it as a task."""
        task = asyncio.current_task()
        assert task is not None
        # A drained answer is in the kernel's hands, all of it. With a limit of 0, TLS
        # of CPython 3.11 and newer would pause at every other write, and nothing would
        # end the pause.
        encrypted = writer.get_extra_info("sslcontext") is not None
        writer.transport.set_write_buffer_limits(1 if encrypted else 0)
        connection = _Connection(task, reader, writer, self._time())
        self._connections.add(connection)
        try:
            refusal = await self._attend(connection, reader)
            if refusal is not None:
                await self._farewell(connection, reader, refusal)
        except (OSError, asyncio.CancelledError) as error:
            # The client is gone, or `stop` waits no longer. The reader keeps this
            # error. Break the chain error → traceback → frames → request and answer.
            error.with_traceback(None)
        finally:
            self._connections.discard(connection)
            self._room.leave(connection)
            # What is left here the client does not read; a close would wait until it
            # does.
            if writer.transport.get_write_buffer_size():
                writer.transport.abort()
            writer.close()

    async def _attend(
        self, connection: _Connection, reader: asyncio.StreamReader
    ) -> Optional[HTTPError]:
        """Hold the conversation; returns a refusal that is still to be sent."""
        surplus = len(self._connections) - self._limits.connections
        if surplus > self._limits.refusals_at_once:
            return None
        if surplus > 0:
            detail = f"{self._limits.connections} connections are open: try again"
            return HTTPError("too-many-connections", detail)
        parser = RequestParser(self._limits.max_body, self._api.admit)
        try:
            await self._converse(connection, reader, parser)
        except HTTPError as error:
            # Its frames would keep the request in memory while the refusal is sent.
            error.__traceback__ = None
            error.__context__ = None
            return _with_request(error, parser.head)
        except asyncio.CancelledError:
            # By `_cut_off` or by `stop`. Only a request that has begun is owed an
            # answer.
            if connection.phase in ("head", "body") and connection.cut_off is not None:
                return _with_request(connection.cut_off, parser.head)
        except OSError:
            # The client is gone.
            raise
        except Exception:
            # Nothing of an answer has been sent: `_write_stream` keeps its own errors.
            log.exception("a bug while answering %s", connection.peer)
            return HTTPError("internal-error", "this is our fault; the log says more")
        finally:
            parser.close()
        return None

    async def _converse(
        self, connection: _Connection, reader: asyncio.StreamReader, parser: RequestParser
    ) -> None:
        """Requests and answers, until either side has had enough.

        Raises HTTPError for what cannot be read on.
        """
        answers_in_a_row = 0
        while True:
            connection.request = parser.next_request()
            if connection.request is None:
                if parser.is_busy:
                    # A body is inflated, and this takes its time.
                    await asyncio.sleep(0)
                    continue
                if not await self._read_on(connection, reader, parser):
                    return
                answers_in_a_row = 0
                continue
            if not await self._answer(connection):
                # TLS cannot half-close: a client that waits for the end would wait as
                # long as we linger. Its request has been read whole, so nobody needs to
                # linger.
                if connection.writer.can_write_eof():
                    await self._linger(connection, reader)
                return
            answers_in_a_row += 1
            if answers_in_a_row % self._limits.answers_in_a_row == 0:
                # Pipelined requests: neither read nor write need have waited.
                await asyncio.sleep(0)

    async def _read_on(
        self, connection: _Connection, reader: asyncio.StreamReader, parser: RequestParser
    ) -> bool:
        """Feed the parser with what comes next; False if nothing more is to come.

        Raises HTTPError if the client stops in the middle of a request.
        """
        connection.enter(parser.phase, self._time())
        if parser.phase == "body":
            size = parser.head.length if parser.head else None
            if size is None:
                # A chunked body does not say how long it will be.
                size = connection.moved
            # What has no room is refused before any more of it is read.
            if not self._keep(connection, size):
                raise HTTPError("overloaded", _NO_ROOM)
        if parser.wants_continue:
            connection.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            parser.wants_continue = False
        if self._stopping and parser.phase == "idle":
            return False
        # Here the sweeper may cut this connection off, and `stop` may.
        data = await reader.read(self._limits.read)
        if not data:
            if parser.phase != "idle":
                raise HTTPError(
                    "bad-request", "the connection was closed in the middle of a request"
                )
            return False
        parser.feed(data)
        now = self._time()
        if connection.phase == "idle":
            connection.enter("head", now)
        connection.move(len(data), now)
        return True

    async def _answer(self, connection: _Connection) -> bool:
        """Answer the request; whether the connection may be kept after it."""
        request = connection.request
        assert request is not None
        connection.request = None
        # No deadline here: what the service itself takes is not the client's fault.
        connection.phase = "work"
        if connection.kept:
            async with self._large_bodies:
                response = await self._api.answer(request, connection.peer)
            self._room.leave(connection)
        else:
            response = await self._api.answer(request, connection.peer)
        connection.enter("write", self._time())
        head = request.head
        # Its body is done with, and to send an answer may take days.
        del request
        keep_alive = head.keep_alive and not self._stopping
        if not isinstance(response.body, bytes):
            return await self._write_stream(connection, head, response, keep_alive)
        if len(response.body) <= self._limits.slice or head.method == "HEAD":
            self._write_small(connection, head, response, keep_alive)
        else:
            await self._write_large(connection, head, response, keep_alive)
        # Most answers go to the kernel at once; waiting would cost a turn of the loop.
        if connection.writer.transport.get_write_buffer_size():
            await connection.writer.drain()
        return keep_alive and connection.cut_off is None

    def _write_small(
        self, connection: _Connection, head: Head, response: Response, keep_alive: bool
    ) -> None:
        """Begin to send an answer that is small, or has no body."""
        head_only = head.method == "HEAD"
        data = encode_response(response, self.date(), keep_alive, head_only, head.http_1_0)
        connection.writer.write(data)

    async def _write_large(
        self, connection: _Connection, head: Head, response: Response, keep_alive: bool
    ) -> None:
        """Send an answer that is all there, and large."""
        body = response.body
        assert isinstance(body, bytes)
        if head.method != "GET":
            # Something was done, and that is told however crowded it is.
            self._room.put(connection, len(body))
        elif not self._keep(connection, len(body)):
            refusal = HTTPError("overloaded", _NO_ROOM)
            response = self._api.refuse(refusal, connection.peer)
            self._write_small(connection, head, response, keep_alive)
            return
        # The head alone: to join head and body would copy the body.
        connection.writer.write(
            encode_response(response, self.date(), keep_alive, True, head.http_1_0)
        )
        await self._write_slices(connection, body)
        self._room.leave(connection)

    async def _write_slices(self, connection: _Connection, data: bytes) -> None:
        """Send bytes so that a client that reads steadily is seen to read."""
        size = self._limits.slice
        for start in range(0, len(data), size):
            piece = data[start : start + size]
            connection.writer.write(piece)
            # Here the sweeper may abort the transport. Then this raises
            # ConnectionError.
            await connection.writer.drain()
            connection.move(len(piece), self._time())

    async def _write_stream(
        self, connection: _Connection, head: Head, response: Response, keep_alive: bool
    ) -> bool:
        """Send an answer piece by piece; whether the connection may be kept."""
        assert not isinstance(response.body, bytes)
        writer = connection.writer
        head_only = head.method == "HEAD"
        # RFC 9112 §6.3: HTTP/1.0 has no chunks; the body ends with the connection.
        keep_alive = keep_alive and not head.http_1_0
        try:
            writer.write(
                encode_response(response, self.date(), keep_alive, head_only, head.http_1_0)
            )
            if not head_only:
                await self._write_pieces(connection, response.body, chunked=not head.http_1_0)
        finally:
            self._room.leave(connection)
            # Now, and not when the collector of cycles comes: a live tail would be
            # counted long after its client is gone.
            await response.body.aclose()
        await writer.drain()
        return keep_alive and connection.cut_off is None

    async def _write_pieces(
        self, connection: _Connection, pieces: AsyncGenerator[bytes, None], chunked: bool
    ) -> None:
        """Send the pieces, each as one chunk (RFC 9112 §7.1) if `chunked`.

        The status is long gone when a piece fails. Then an unfinished body is the only
        honest signal that is left.
        """
        connection.enter("stream", self._time())
        try:
            async for piece in pieces:
                # The deadline is for one piece: between two the client waits for us.
                connection.enter("write", self._time())
                if not self._keep(connection, len(piece)):
                    raise HTTPError("overloaded", _NO_ROOM)
                await self._write_piece(connection, piece, chunked)
                # The next may be long in coming: one follower may wait for days.
                del piece
                if connection.kept:
                    self._room.put(connection, 0)
                connection.enter("stream", self._time())
        except OSError:
            # The client is gone.
            raise
        except HTTPError as error:
            log.warning("CUT OFF - %s: %s", connection.peer, error.detail)
            connection.writer.transport.abort()
        except Exception as error:
            log.error("a list for %s was cut off: %s", connection.peer, error)
            connection.writer.transport.abort()
        else:
            if chunked:
                connection.writer.write(b"0\r\n\r\n")

    async def _write_piece(self, connection: _Connection, piece: bytes, chunked: bool) -> None:
        writer = connection.writer
        if not chunked:
            await self._write_slices(connection, piece)
        elif len(piece) <= self._limits.slice:
            # Most events of a live tail: one call, one packet.
            writer.write(b"%x\r\n%b\r\n" % (len(piece), piece))
            await writer.drain()
        else:
            writer.write(b"%x\r\n" % len(piece))
            await self._write_slices(connection, piece)
            writer.write(b"\r\n")

    async def _farewell(
        self, connection: _Connection, reader: asyncio.StreamReader, error: HTTPError
    ) -> None:
        """Answer once and close."""
        try:
            response = self._api.refuse(error, connection.peer)
            data = encode_response(response, self.date(), keep_alive=False)
        except Exception:
            log.exception("a bug while refusing %s", connection.peer)
            headers = (("Cache-Control", "no-store"),)
            response = Response(500, _LAST_RESORT, "application/problem+json", headers)
            data = encode_response(response, self.date(), keep_alive=False)
        connection.writer.write(data)
        await self._linger(connection, reader)

    async def _linger(self, connection: _Connection, reader: asyncio.StreamReader) -> None:
        """Close without losing the answer (RFC 9112 §9.6).

        If we closed while the client sends, the kernel would answer with a reset, and
        the reset would take our answer out of the client's buffer. So we half-close,
        and throw away what comes until the client closes, for a bounded time.
        """
        writer = connection.writer
        connection.enter("linger", self._time())
        with contextlib.suppress(OSError, asyncio.TimeoutError):
            await asyncio.wait_for(writer.drain(), self._limits.linger_s)
            if writer.can_write_eof():
                writer.write_eof()
            end = self._time() + self._limits.linger_s
            data = b"more"
            while data:
                left_s = max(0.0, end - self._time())
                data = await asyncio.wait_for(reader.read(self._limits.read), left_s)

    def date(self) -> str:
        """The Date field, made anew once a second."""
        now = self._clock_s()
        if int(now) != self._date_second:
            self._date_second = int(now)
            self._date = http_date(now)
        return self._date


# ============================================================================
# §10  Reference and metrics: what the service says about itself
#
# GET /docs is for people, GET /openapi.json for tools, GET /metrics for Prometheus. The
# first two are made of the routes of §8 when they are first asked for, and kept: what a
# route takes, answers and refuses is written down once, at its handler. The schema of
# an answer is read off its example.
#
# The examples are one story. Told in the order of the page to a new, empty service,
# each request gets the answer that stands below it: what is published on top is what is
# listed, counted and erased further down. A test tells the story, with curl where there
# is one, and compares.
#
# Knows §5 (the pipeline, for its numbers), §6 (HTTP, to show an answer on the wire) and
# §8 (the routes). Must not know sockets or the store.
#
#   * The documents need nothing from elsewhere: they work offline.
#   * A link is relative to the page, so it is right behind any proxy. What is to be
#     typed has the host and port by which the page was asked for.
#   * Nothing that a client sent gets into a document, but a host of harmless letters.
#   * A counter of the metrics never falls: what only waits in the queue is not counted.
#
# Simpler than a generator of documents: the schema of an answer has types and meanings,
# no bounds. Those would have to be written down beside each example.
# ============================================================================

# Topics with series of their own in GET /metrics, the largest first. Whoever scrapes
# keeps each series for weeks, so a publisher must not be able to make them up.
METRICS_MAX_TOPICS = 100

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# When the answers shown "on the wire" were given: 2026-01-01T12:00:00Z.
_WIRE_INSTANT_S = 1_767_268_800

# What the commands call the service if the request for the page does not say a name
# that can be shown: the default address.
DEFAULT_HOST = "localhost:8000"

# Hosts that may be shown: a name or an address, and a port. RFC 3986 also allows quotes
# and brackets in a name. A reader pastes the command into a shell, so those stay out.
_HARMLESS_HOST = re.compile(r"(?:[A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?")

# Hosts for which the page is kept ready. There is one as a rule, and a client that
# makes up names must not fill the memory.
_DOCS_HOSTS_KEPT = 4

# Words of a command that a shell takes as they are.
_PLAIN_WORD = re.compile(r"[A-Za-z0-9_./:=-]+")

# A command that is wider, in characters, has an option on each line. 72 fit the column
# of the page on a small laptop.
_COMMAND_WIDTH = 72

# What the answers have besides the fields of an event.
_POSITIVE_SCHEMA: Schema = {"type": "integer", "minimum": 1}
_VERDICT_SCHEMA: Schema = {"enum": ["new", "duplicate", "conflict"]}
_NUMBER_SCHEMA: Schema = {"type": ["number", "null"]}
ANSWER_FIELDS = (
    Field("seq", 1, _POSITIVE_SCHEMA, "the place in the order of arrival, never given twice"),
    Field("processed_at", "2026-01-01T12:00:00.250000Z", INSTANT_SCHEMA, "when it was stored"),
    Field(
        "verdict",
        "new",
        _VERDICT_SCHEMA,
        "a `conflict` has the identity of another event, which stays",
    ),
    Field("next", None, {"type": ["string", "null"]}, "goes into `cursor`; null at the end"),
    Field("bytes_per_event", 283, _NUMBER_SCHEMA, "of the store; null while it is empty"),
    Field("last_hour", 1e6, _NUMBER_SCHEMA, "growth by the last hour; null until it is known"),
    Field("last_day", 1e6, _NUMBER_SCHEMA, "growth by the last day; null until it is known"),
    Field("disk_free_bytes", 64e9, _NUMBER_SCHEMA, "room on the disk; null until it is known"),
    Field("days_until_full", 90.5, _NUMBER_SCHEMA, "at this growth; null if there is no end"),
    Field("warning", "", {"type": "string"}, "why the disk needs room soon; empty if it does not"),
    Field("original", "events/door/42", {"type": "string"}, "where the stored event is"),
)
_PROBLEM_EXAMPLE = f"""
    {{"type": "{problem_type("invalid-event")}", "title": "An event is not valid",
      "status": 422, "detail": "1 fault found in the events; nothing was taken",
      "errors": [{{"index": 0, "field": "topic", "message": "is missing"}}],
      "oldest_seq": 1}}
"""
# Members of examples that are not always there.
_OPTIONAL = ("sequence", "errors", "oldest_seq")

# ---- Examples and their schemas ----

# Examples are text in §8. JSON becomes a value for OpenAPI. On the way to the service
# it is one line; what /docs shows of an answer is indented.
#
# Why schemas are read off examples. A schema beside each answer would be a second
# description of the same thing, and nobody would notice when one of them is wrong. An
# example is sent by a test, so it is right, and a schema that is made of it, too.


def field_schema(field: Field) -> Schema:
    """A field as a JSON Schema, with its meaning and its example."""
    return {**field.schema, "description": field.meaning, "examples": [field.example]}


def field_schemas() -> Dict[str, Schema]:
    """The schemas that have a name of their own, by that name."""
    return {field.name: field_schema(field) for field in EVENT_FIELDS + ANSWER_FIELDS}


def is_json(media_type: str) -> bool:
    """Whether a body of this type is one JSON value.

    >>> is_json("application/problem+json"), is_json("application/x-ndjson")
    (True, False)
    """
    return media_type == JSON_TYPE or media_type.endswith("+json")


def compact_json(text: str) -> str:
    """JSON without the blanks of its layout: as it comes over the wire.

    >>> compact_json('{"n": [1, null]}')
    '{"n":[1,null]}'
    """
    return json.dumps(json.loads(text), ensure_ascii=False, separators=(",", ":"))


def indented_json(text: str) -> str:
    """JSON as a person reads it.

    >>> print(indented_json('{"n":1}'))
    {
      "n": 1
    }
    """
    return json.dumps(json.loads(text), ensure_ascii=False, indent=2)


def has_content(answer: Answer) -> bool:
    """Whether anything comes with an answer: nothing does with a 204."""
    return answer.content_type != ""


def example_value(media_type: str, example: str) -> Any:
    """An example as a value: what JSON or a form says, or the text itself."""
    if is_json(media_type):
        return json.loads(example)
    if media_type == FORM_TYPE:
        return read_form(example.encode("ascii"))
    return example


def schema_of(example: Any, name: str = "") -> Schema:
    """The JSON Schema of a value like this one.

    A name that is a field means here what it means there. The keys of an object are
    its members, unless they are no identifiers: then they are data, such as topics.

    >>> schema_of({"a": [1]})["properties"]
    {'a': {'type': 'array', 'items': {'type': 'integer'}}}
    >>> schema_of({"a/b": 1})
    {'type': 'object', 'additionalProperties': {'type': 'integer'}}
    """
    if name in field_schemas():
        return {"$ref": "#/components/schemas/" + name}
    if isinstance(example, list):
        # All items of a list are alike; an example without any would tell nothing.
        first, *_ = example
        return {"type": "array", "items": schema_of(first)}
    if isinstance(example, dict):
        if not all(map(str.isidentifier, example)):
            value = next(iter(example.values()))
            return {"type": "object", "additionalProperties": schema_of(value)}
        members = {key: schema_of(value, key) for key, value in example.items()}
        required = [key for key in example if key not in _OPTIONAL]
        return {"type": "object", "required": required, "properties": members}
    types = {bool: "boolean", int: "integer", float: "number", str: "string"}
    return {"type": types[type(example)]}


# ---- OpenAPI 3.1 ----

# https://spec.openapis.org/oas/v3.1.0: a path has operations, an operation has
# parameters, a body and responses. A response has content by media type. Several
# answers of one media type become one schema with alternatives, and one example each.
#
# What becomes of a route, in short:
#
#   the route          its Operation Object
#   path, method       where it stands: "paths": {"/events": {"get": {…}}}
#   handler            "operationId": "list_events", "summary": the docstring
#   query, headers     "parameters": [{"name": "limit", "in": "query", "schema": {…}}]
#   bodies             "requestBody": {"content": {media type: {"schema": {…}}}}
#   answers            "responses": {"200": {"content": {media type: {…}}}}
#   problems           "responses": {"410": {"description": "`gone`: …"}}


class Parameter(NamedTuple):
    """A field with the place where a request has it: "path", "query" or "header"."""

    place: str
    field: Field


def parameters_of(each: Route) -> List[Parameter]:
    """All parameters of a route, in the order in which the documents show them.

    A part of the path is called like the field of an event that it holds.
    """
    fields = {field.name: field for field in EVENT_FIELDS}
    found = []
    for name in re.findall(r"{(\w+)}", each.path):
        found.append(Parameter("path", fields[name]))
    for field in each.query:
        found.append(Parameter("query", field))
    for field in each.headers:
        found.append(Parameter("header", field))
    return found


def bare_type(content_type: str) -> str:
    """A media type without its parameters.

    >>> bare_type("text/html; charset=utf-8")
    'text/html'
    """
    return content_type.partition(";")[0]


def _success_responses(each: Route) -> Dict[str, Any]:
    """The answers of a route, by status and then by media type.

    The meaning of an answer is the name of its example. Two answers of a route never
    mean the same.
    """
    responses: Dict[str, Any] = {}
    for answer in each.answers:
        empty = {"description": answer.meaning, "content": {}}
        response = responses.setdefault(str(answer.status), empty)
        if not has_content(answer):
            continue
        media = response["content"].setdefault(
            bare_type(answer.content_type), {"schema": {"anyOf": []}, "examples": {}}
        )
        value = example_value(answer.content_type, answer.example)
        media["schema"]["anyOf"].append(schema_of(value))
        media["examples"][answer.meaning] = {"value": value}
    return responses


def _add_problem_responses(responses: Dict[str, Any], problems: Sequence[str]) -> None:
    """What can go wrong: problems of one status share its description."""
    content = {"schema": {"$ref": "#/components/schemas/problem"}}
    for name in problems:
        problem = PROBLEMS[name]
        response = responses.setdefault(
            str(problem.status),
            {"description": "", "content": {"application/problem+json": content}},
        )
        response["description"] += f"`{name}`: {problem.title}: {problem.advice}.\n"


def _request_body(each: Route) -> Dict[str, Any]:
    """All forms in which a body may come, by media type."""
    content = {}
    is_required = True
    for body in each.bodies:
        if body.schema == {"type": "string"}:
            # Any text will do, also the empty one.
            is_required = False
        schema = {
            **body.schema,
            "description": body.meaning,
            "examples": [example_value(body.media_type, body.example)],
        }
        content[body.media_type] = {"schema": schema}
    return {"required": is_required, "content": content}


def _operation(each: Route) -> Dict[str, Any]:
    """A route as an Operation Object."""
    responses = _success_responses(each)
    _add_problem_responses(responses, ANYWHERE + each.problems)
    parameters = []
    for place, field in parameters_of(each):
        parameters.append(
            {
                "name": field.name,
                "in": place,
                "required": place == "path",
                "description": field.meaning,
                "schema": field_schema(field),
            }
        )
    operation = {
        "operationId": each.name,
        "summary": each.summary,
        "responses": responses,
        "parameters": parameters,
    }
    if each.bodies:
        operation["requestBody"] = _request_body(each)
    if each.is_open:
        # An empty list says that it needs no token; without one, the document's holds.
        operation["security"] = []
    return operation


@functools.lru_cache(maxsize=1)
def openapi_json() -> bytes:
    """The routes as an OpenAPI 3.1 document.

    A path parameter of OpenAPI holds no slash. The tools send the one of a topic as
    %2F, which means the same to us.
    """
    paths: Dict[str, Dict[str, Any]] = {}
    for each in ROUTES:
        paths.setdefault(each.path, {})[each.method.lower()] = _operation(each)
    schemas = field_schemas()
    schemas["event"] = schema_of(json.loads(EVENT_EXAMPLE))
    schemas["problem"] = schema_of(json.loads(_PROBLEM_EXAMPLE))
    bearer = {
        "type": "http",
        "scheme": "bearer",
        "description": "needed if the service has a --token",
    }
    document = {
        "openapi": "3.1.0",
        "info": {"title": "aggregator", "version": __version__},
        # Relative to this document: right also where a proxy puts something before it.
        "servers": [{"url": "."}],
        "paths": paths,
        # With the token or without: whether it is needed depends on the settings.
        "security": [{"bearer": []}, {}],
        "components": {"schemas": schemas, "securitySchemes": {"bearer": bearer}},
    }
    return json_bytes(document)


@route(
    "GET", "/openapi.json", answers=(Answer(200, "OpenAPI; it begins so", '{"openapi": "3.1.0"}'),)
)
async def get_openapi(api: API, request: Request, peer: str) -> Response:
    """This reference, for tools."""
    return respond(200, openapi_json())


# ---- The examples as commands ----

# An answer of §8 says what its request has besides the route: a query, header fields,
# a path of its own. This makes the whole request of it: once as parts for a program,
# and once as a command for a person.


class SampleRequest(NamedTuple):
    """A request made of the examples. `body` is what is meant, before any coding."""

    method: str
    target: str
    headers: Dict[str, str]
    body: str

    @property
    def is_gzip(self) -> bool:
        """Whether the body is to be sent in gzip."""
        return self.headers.get("Content-Encoding") == "gzip"


def sample_request(each: Route, answer: Answer) -> SampleRequest:
    """The request that gets this answer."""
    headers = dict(answer.headers)
    # The first answer is what a client gets that asks for nothing in particular.
    usual, *_ = each.answers
    if has_content(answer) and answer.content_type != usual.content_type:
        headers["Accept"] = bare_type(answer.content_type)
    target = _sample_path(each, answer) + answer.ask
    return SampleRequest(each.method, target, headers, _sample_body(each, headers))


def _sample_path(each: Route, answer: Answer) -> str:
    """The answer's own path, or that of the route with the examples of its parts."""
    if answer.path:
        return answer.path
    path = each.path
    for place, field in parameters_of(each):
        if place == "path":
            path = path.replace("{" + field.name + "}", field.example)
    return path


def _sample_body(each: Route, headers: Dict[str, str]) -> str:
    """The example of the body that the header fields announce, else of the first."""
    if not each.bodies:
        return ""
    usual, *_ = each.bodies
    examples = {body.media_type: body.example for body in each.bodies}
    media_type = headers.get("Content-Type", usual.media_type)
    if is_json(media_type):
        return compact_json(examples[media_type])
    return examples[media_type]


def shell_word(text: str) -> str:
    """A text as one word of a POSIX shell.

    >>> print(shell_word("localhost:8000/health"), shell_word("it's 5"))
    localhost:8000/health 'it'\\''s 5'
    """
    if _PLAIN_WORD.fullmatch(text):
        return text
    # Nothing is special between single quotes, but the quote itself.
    return "'" + text.replace("'", "'\\''") + "'"


def body_source(sample: SampleRequest) -> str:
    """The commands that write the body for curl, up to the pipe; "" if it needs none.

    `curl -d` takes a text of one line as it is. It would send several lines as one, and
    it cannot compress.

    >>> print(body_source(SampleRequest("POST", "/publish", {}, "one\\ntwo\\n")))
    printf '%s\\n' one two |
    """
    if "\n" not in sample.body and not sample.is_gzip:
        return ""
    lines = [shell_word(line) for line in sample.body.splitlines()]
    written = "printf '%s\\n' " + " ".join(lines)
    if sample.is_gzip:
        return written + " | gzip |"
    return written + " |"


def curl_options(sample: SampleRequest) -> List[str]:
    """What curl must be told besides the address."""
    options = []
    # -d makes a POST of a request, and nothing makes a GET.
    if sample.method not in ("GET", "POST"):
        options.append("-X " + sample.method)
    for name, value in sample.headers.items():
        options.append("-H " + shell_word(f"{name}: {value}"))
    if body_source(sample):
        options.append("--data-binary @-")
    elif sample.body:
        options.append("-d " + shell_word(sample.body))
    return options


def curl_command(sample: SampleRequest, address: str) -> str:
    """The command that sends this request to a service at this address.

    >>> sample = SampleRequest("DELETE", "/events/door/42", {}, "")
    >>> print(curl_command(sample, "nas:8000"))
    curl nas:8000/events/door/42 -X DELETE
    """
    # -N shows each event of a live tail as it comes.
    program = "curl -N" if "follow=1" in sample.target else "curl"
    parts = [f"{program} {shell_word(address + sample.target)}", *curl_options(sample)]
    source = body_source(sample)
    if source:
        parts.insert(0, source)
    if len(" ".join(parts)) <= _COMMAND_WIDTH:
        return " ".join(parts)
    # A shell reads on behind a backslash at the end of a line.
    return " \\\n  ".join(parts)


# ---- The reference, to read ----

# A menu, then a section for each route: what it takes, and each answer below the
# command that asks for it. Every problem has an anchor, which its `type` links to.
#
# Names and their meanings stand side by side where there is room, and below each other
# on a phone. Long words break, so nothing is wider than the screen.

DOCS_STYLE = """
:root {
  color-scheme: light dark;
  --paper: #f6f7f9;
  --ink: #15171e;
  --soft: #565c6b;
  --line: #d3d7e1;
  --mark: #3846c4;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #0f111a;
    --ink: #e8eaf3;
    --soft: #9ba2b8;
    --line: #2d3246;
    --mark: #93a0ff;
  }
}
body {
  max-width: 76rem;
  margin: auto;
  padding: 1.5rem clamp(1rem, 4vw, 3rem) 3rem;
  background: var(--paper);
  color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif;
  overflow-wrap: anywhere;
}
a {
  color: inherit;
  text-decoration-color: var(--mark);
}
:focus-visible {
  outline: 2px solid var(--mark);
  outline-offset: 2px;
}
code, pre {
  font: .875rem/1.5 ui-monospace, "SF Mono", "Cascadia Mono", Menlo, monospace;
}
nav ul {
  margin: 0;
  padding: 0;
  list-style: none;
}
nav a {
  display: inline-block;
  padding: .25rem 0;
}
section {
  margin-top: 2rem;
  border-top: 1px solid var(--line);
}
h2 code {
  font-size: 1.125rem;
}
h3 {
  margin: 1.5rem 0 .25rem;
  font-size: 1rem;
}
h3::first-letter {
  text-transform: uppercase;
}
pre {
  margin: .25rem 0;
  border-left: 2px solid var(--line);
  padding-left: .75rem;
  white-space: pre-wrap;
}
pre.ask {
  border-color: var(--mark);
}
.soft, dd {
  margin: 0;
  color: var(--soft);
}
dt {
  margin-top: .5rem;
}
@media (min-width: 60rem) {
  nav ul {
    columns: 3;
  }
  dl {
    display: grid;
    grid-template-columns: 20rem 1fr;
    gap: .25rem 1.5rem;
  }
  dt {
    margin: 0;
  }
}
"""

# How the fields of a request are written, by their place.
_SPELLING = {"path": "`{{{0}}}`", "query": "`?{0}={1}`", "header": "`{0}: {1}`"}


def plain_html(text: str) -> str:
    """Text as HTML, outside of attributes.

    >>> plain_html("a<b & c")
    'a&lt;b &amp; c'
    """
    return text.replace("&", "&amp;").replace("<", "&lt;")


def marked(text: str) -> str:
    """Text as HTML; what stands between back quotes is code.

    >>> marked("`?a=1` & more")
    '<code>?a=1</code> &amp; more'
    """
    return re.sub("`([^`]+)`", r"<code>\1</code>", plain_html(text))


def _docs_text(kind: str, text: str) -> str:
    """What is typed ("ask") or comes back ("answer"), line by line as it is."""
    return f'<pre class="{kind}">{plain_html(text)}</pre>\n'


def _docs_links(names: Iterable[str]) -> str:
    """Links into the page, to what is called so."""
    return ", ".join([f'<a href="#{name}">{name}</a>' for name in names])


def _docs_terms(rows: Iterable[Tuple[str, str]]) -> str:
    """Names with their meanings; nothing if there are none."""
    lines = [f"<dt>{marked(name)}<dd>{marked(meaning)}\n" for name, meaning in rows]
    if not lines:
        return ""
    return "<dl>" + "".join(lines) + "</dl>\n"


def _docs_menu() -> str:
    """A link to each section, by the method and path of its route."""
    items = []
    for each in ROUTES:
        items.append((each.name, f"<code>{each.method} {each.path}</code>"))
    items += [("wire", "On the wire"), ("event", "An event"), ("problems", "Problems")]
    parts = ['<nav aria-label="Reference"><ul>\n']
    for anchor, text in items:
        parts.append(f'<li><a href="#{anchor}">{text}</a>\n')
    parts.append("</ul></nav>\n")
    return "".join(parts)


def _docs_introduction(address: str) -> str:
    """What a reader must know before the first command."""
    open_paths = ", ".join([f"`{each.path}`" for each in ROUTES if each.is_open])
    paragraphs = (
        "The commands on this page work as they stand. Sent in this order to a new, empty"
        " service, each gets the answer below it; times and sizes differ. Near the end, the"
        " first event is erased.",
        "Token: a service that has a `--token` wants it with every request. Add"
        f" `-H 'Authorization: Bearer TOKEN'` to each command. Only {open_paths} need none.",
        f"Behind a proxy, write its address and path instead of `{address}`,"
        " such as `https://example.org/aggregator`.",
    )
    parts = [f"<h1>aggregator {__version__}</h1>\n"]
    for paragraph in paragraphs:
        parts.append(f"<p>{marked(paragraph)}\n")
    # Relative, so they lead to the right place under any prefix.
    parts.append('<p><a href="./">The page</a> · <a href="openapi.json">OpenAPI, for tools</a>\n')
    return "".join(parts)


def _docs_answer(each: Route, answer: Answer, address: str) -> str:
    """What to type, and what comes back."""
    command = curl_command(sample_request(each, answer), address)
    parts = [f"<h3>{marked(answer.meaning)}</h3>\n", _docs_text("ask", command)]
    if not has_content(answer):
        parts.append(f'<p class="soft">{answer.status}, without content\n')
        return "".join(parts)
    media_type = bare_type(answer.content_type)
    parts.append(f'<p class="soft">{answer.status} <code>{media_type}</code>\n')
    received = answer.example
    if is_json(media_type):
        received = indented_json(received)
    parts.append(_docs_text("answer", received.rstrip("\n")))
    return "".join(parts)


def _docs_route(each: Route, address: str) -> str:
    """The section of a route."""
    rows = []
    for place, field in parameters_of(each):
        rows.append((_SPELLING[place].format(field.name, field.example), field.meaning))
    for body in each.bodies:
        rows.append((f"`{body.media_type}`", body.meaning))
    parts = [
        f'<section><h2 id="{each.name}"><code>{each.method} {each.path}</code></h2>\n',
        f"<p>{marked(each.summary)}.\n",
        _docs_terms(rows),
    ]
    for answer in each.answers:
        parts.append(_docs_answer(each, answer, address))
    if each.problems:
        parts.append("<p>Problems: " + _docs_links(each.problems) + "\n")
    parts.append("</section>\n")
    return "".join(parts)


def _docs_on_the_wire(host: str) -> str:
    """The first example once more, byte for byte: what curl hides."""
    first_route, *_ = ROUTES
    answer, *_ = first_route.answers
    sample = sample_request(first_route, answer)
    body = compact_json(answer.example).encode("utf-8") + b"\n"
    response = respond(answer.status, body)
    received = encode_response(response, http_date(_WIRE_INSTANT_S), keep_alive=True)
    sent = (
        f"{sample.method} {sample.target} HTTP/1.1\n"
        f"Host: {host}\n"
        f"Content-Length: {len(sample.body)}\n"
        f"\n{sample.body}"
    )
    return (
        '<section><h2 id="wire">On the wire</h2>\n'
        "<p>The first example without curl, for who writes to a socket; each line of a head"
        " ends with CR and LF.\n"
        + _docs_text("ask", sent)
        + _docs_text("answer", received.decode("utf-8").rstrip("\n"))
        + "</section>\n"
    )


def _docs_problems() -> str:
    """All problems, with the advice of each."""
    parts = [
        '<section><h2 id="problems">Problems</h2>\n',
        "<p>Any request may meet: " + _docs_links(ANYWHERE + NOWHERE) + "\n<dl>",
    ]
    for name, problem in PROBLEMS.items():
        parts.append(
            f'<dt id="{name}"><code>{name}</code> {problem.status}: {problem.title}'
            f"<dd>{marked(problem.advice)}\n"
        )
    parts.append("</dl></section>\n")
    return "".join(parts)


@functools.lru_cache(maxsize=_DOCS_HOSTS_KEPT)
def docs_html(host: str = DEFAULT_HOST, scheme: str = "http") -> str:
    """The reference as the body of a page, with commands for this host and scheme.

    `host` must be harmless: see shown_host. The `type` of a problem links into it.
    """
    # curl takes an address without a scheme as one of http.
    address = host
    if scheme != "http":
        address = f"{scheme}://{host}"
    parts = [_docs_menu(), "<main>\n", _docs_introduction(address)]
    for each in ROUTES:
        parts.append(_docs_route(each, address))
    parts.append(_docs_on_the_wire(host))
    parts.append('<section><h2 id="event">An event</h2>\n')
    parts.append(_docs_terms([(f"`{field.name}`", field.meaning) for field in EVENT_FIELDS]))
    parts.append("</section>\n")
    parts.append(_docs_problems())
    parts.append("</main>\n")
    return "".join(parts)


def shown_host(host: str) -> str:
    """The host of a request, or the default if it cannot stand in a command.

    >>> shown_host("nas.lan:8000"), shown_host("$(reboot)"), shown_host("")
    ('nas.lan:8000', 'localhost:8000', 'localhost:8000')
    """
    if _HARMLESS_HOST.fullmatch(host):
        return host
    return DEFAULT_HOST


@route("GET", "/docs", answers=(Answer(200, "a page", "…", HTML_TYPE),))
async def get_docs(api: API, request: Request, peer: str) -> Response:
    """This reference, to read."""
    body = docs_html(shown_host(request.head.headers["host"]), api.scheme)
    document = html_document("aggregator: reference", DOCS_STYLE, body)
    return html_response(document, content_policy(DOCS_STYLE))


# ---- Metrics ----

# The same numbers as GET /stats, in the text format 0.0.4 of Prometheus: two lines
# about a metric, then a line for each sample. Every name begins with "aggregator_".
# https://prometheus.io/docs/instrumenting/exposition_formats/
#
# Names follow the customs of Prometheus: "_total" for a counter, the unit in the name,
# and seconds and bytes rather than multiples of them.


class Metric(NamedTuple):
    """A metric of Prometheus. `samples` are its numbers, by what follows its name.

    That is nothing for a single number, a label such as {topic="door"}, or one of the
    parts of a histogram: _bucket{le="1"}, _count, _sum.
    """

    name: str
    kind: str  # "counter", "gauge" or "histogram"
    meaning: str
    samples: Dict[str, float]


def counter(name: str, meaning: str, number: float) -> Metric:
    """A number that only grows."""
    return Metric(name, "counter", meaning, {"": number})


def gauge(name: str, meaning: str, number: float) -> Metric:
    """A number that grows and falls."""
    return Metric(name, "gauge", meaning, {"": number})


def by_label(label: str, numbers: Dict[str, int]) -> Dict[str, float]:
    """The samples of a metric that has a number for each value of a label.

    >>> by_label("topic", {"door": 2})
    {'{topic="door"}': 2}
    """
    # JSON escapes a quote, a backslash and a line end as this format does. Our names
    # hold nothing else that JSON would escape.
    samples: Dict[str, float] = {}
    for value, number in numbers.items():
        samples[f"{{{label}={json.dumps(value, ensure_ascii=False)}}}"] = number
    return samples


def by_bound(
    bounds: Sequence[float], counts: Iterable[int], total: Optional[float] = None
) -> Dict[str, float]:
    """The samples of a histogram: how many observations do not exceed each bound.

    `counts` says how many lie between a bound and the one before; the last are those
    above all bounds. `total` is the sum of the observations, None if it is not known.

    >>> by_bound([1, 10], [5, 0, 2])
    {'_bucket{le="1"}': 5, '_bucket{le="10"}': 5, '_bucket{le="+Inf"}': 7, '_count': 7}
    """
    samples: Dict[str, float] = {}
    so_far = 0
    for bound, count in zip([*bounds, "+Inf"], counts):
        so_far += count
        samples[f'_bucket{{le="{bound}"}}'] = so_far
    samples["_count"] = so_far
    if total is not None:
        samples["_sum"] = total
    return samples


def by_histogram(histogram: Histogram) -> Dict[str, float]:
    """The samples of a histogram of §5."""
    return by_bound(histogram.bounds, histogram.counts, histogram.sum)


def metrics_text(metrics: Iterable[Metric]) -> str:
    """Metrics in the text format 0.0.4 of Prometheus.

    >>> metric = Metric("topics", "gauge", "Topics.", by_label("name", {'a"b': 1}))
    >>> print(metrics_text([metric]), end="")
    # HELP aggregator_topics Topics.
    # TYPE aggregator_topics gauge
    aggregator_topics{name="a\\"b"} 1
    """
    lines = []
    for metric in metrics:
        name = "aggregator_" + metric.name
        lines.append(f"# HELP {name} {metric.meaning}")
        lines.append(f"# TYPE {name} {metric.kind}")
        for suffix, number in metric.samples.items():
            lines.append(f"{name}{suffix} {number}")
    return "\n".join(lines) + "\n"


def event_metrics(numbers: Dict[str, Any], most_topics: int = METRICS_MAX_TOPICS) -> List[Metric]:
    """The metrics of events and topics, from the numbers of GET /stats.

    The topics with most events come first there, so those have series of their own.
    """
    unique = numbers["unique_processed"]
    duplicates = numbers["duplicate_dropped"]
    conflicts = numbers["conflicts"]
    by_topic_unique = {}
    by_topic_repeats = {}
    for topic, counts in itertools.islice(numbers["topics"].items(), most_topics):
        by_topic_unique[topic] = counts["unique"]
        by_topic_repeats[topic] = counts["duplicates"]
    unique_samples = by_label("topic", by_topic_unique)
    repeats_samples = by_label("topic", by_topic_repeats)
    return [
        # What only waits is not counted: it may be lost, and a counter must never fall.
        counter("events_received_total", "Events decided.", unique + duplicates),
        counter("events_unique_total", "Events stored.", unique),
        counter("events_duplicates_total", "Repeated events, conflicts among them.", duplicates),
        counter("events_conflicts_total", "Events whose identity another one has.", conflicts),
        Metric("topic_unique_total", "counter", "Events stored.", unique_samples),
        Metric("topic_duplicates_total", "counter", "Repeats.", repeats_samples),
    ]


def commit_metrics(pipeline: Pipeline, numbers: Dict[str, Any]) -> List[Metric]:
    """The metrics of queue and commits, and of the age of duplicates.

    How long a commit takes is what a slow disk shows first. How old events are when
    they are repeated says how long an index must remember them (§2).
    """
    waiting = numbers["current_queue_size"]
    sizes = by_histogram(pipeline.commit_events)
    times = by_histogram(pipeline.commit_seconds)
    delays = numbers["duplicate_delay_seconds"]
    # The keys are the bounds, and "inf" at the end.
    delay_samples = by_bound(list(delays)[:-1], delays.values())
    return [
        gauge("queue_events", "Events taken and not yet committed.", waiting),
        gauge("queue_limit_events", "Events that may wait.", pipeline.limits.queue_events),
        counter("commit_failures_total", "Commits that failed.", pipeline.failed_commits),
        Metric("commit_events", "histogram", "Events of a commit.", sizes),
        Metric("commit_duration_seconds", "histogram", "Time of a commit.", times),
        Metric("duplicate_delay_seconds", "histogram", "Ages of events at repeats.", delay_samples),
    ]


def size_metrics(numbers: Dict[str, Any]) -> List[Metric]:
    """The metrics of the store's size and of health.

    What is not known is left out: a zero would be a false statement, and an alarm.
    """
    growth = numbers["growth_bytes_per_day"]
    is_healthy = int(numbers["health"]["status"] == "ok")
    failing_s = numbers["health"]["since_seconds"]
    named = (
        ("store_bytes", "Size of the store and its write-ahead log.", numbers["store_bytes"]),
        ("bytes_per_event", "Size of the store for each event.", numbers["bytes_per_event"]),
        ("growth_last_hour_bytes_per_day", "Growth by the last hour.", growth["last_hour"]),
        ("growth_last_day_bytes_per_day", "Growth by the last day.", growth["last_day"]),
        ("disk_free_bytes", "Room on the disk.", numbers["disk_free_bytes"]),
        ("days_until_full", "When the disk is full.", numbers["days_until_full"]),
        ("healthy", "1 if events can be stored, as far as known.", is_healthy),
        ("failing_seconds", "For how long they cannot be stored; 0 if they can.", failing_s),
    )
    return [gauge(name, meaning, number) for name, meaning, number in named if number is not None]


def log_metrics(numbers: Dict[str, Any]) -> List[Metric]:
    """The metrics of a node that shares a log with others; none without a log."""
    place = numbers.get("log")
    if place is None:
        return []
    metrics = [
        Metric("log_node", "gauge", "This node.", by_label("name", {place["node"]: 1})),
        gauge("log_position", "The last entry of the log that is applied.", place["position"]),
        gauge("log_lag_entries", "Entries known and not yet applied.", place["lag_entries"]),
    ]
    if place["primary"]:
        primary = by_label("server", {place["primary"]: 1})
        metrics.append(Metric("log_primary", "gauge", "Who takes the entries.", primary))
    if place["lag_seconds"] is not None:
        metrics.append(gauge("log_lag_seconds", "Reads are at most so old.", place["lag_seconds"]))
    return metrics


def service_metrics(api: API, numbers: Dict[str, Any]) -> List[Metric]:
    """The metrics of the service around them."""
    refused = by_label("reason", api.refused)
    version = by_label("version", {__version__: 1})
    started_s = api.started_us / 1e6
    return [
        Metric("rejected_total", "counter", "Requests refused, by problem.", refused),
        gauge("sequence_gaps", "Sequence numbers that sources left out.", numbers["gaps"]),
        gauge("subscribers", "Live tails.", numbers["subscribers"]),
        gauge("connections", "Open connections.", api.connections()),
        *size_metrics(numbers),
        *log_metrics(numbers),
        gauge("start_time_seconds", "When the service started, since 1970.", started_s),
        Metric("build_info", "gauge", "What is running.", version),
    ]


# How the answer begins. The story of the examples ends with ten events decided.
_METRICS_EXAMPLE = """\
# HELP aggregator_events_received_total Events decided.
# TYPE aggregator_events_received_total counter
aggregator_events_received_total 10
"""


@route(
    "GET",
    "/metrics",
    answers=(Answer(200, "text format 0.0.4; it begins so", _METRICS_EXAMPLE, METRICS_TYPE),),
    problems=READING,
)
async def get_metrics(api: API, request: Request, peer: str) -> Response:
    """The numbers of GET /stats, and more, for Prometheus."""
    numbers = await api.numbers()
    metrics = event_metrics(numbers)
    metrics += commit_metrics(api.pipeline, numbers)
    metrics += service_metrics(api, numbers)
    return respond(200, metrics_text(metrics).encode("utf-8"), METRICS_TYPE)


# ============================================================================
# §11  Page: what a browser is shown
#
# `GET /` gives curl a list of the routes and a browser this page: one document that
# asks nobody else for anything. The numbers of the moment are in it, so it reads
# without JavaScript. The script keeps them moving, asks the store for events, then
# follows what arrives, and shows what was a duplicate of what. It knows nothing that
# curl could not ask for: every word on the page comes from a route of §8.
#
# Ink is what was stored, carbon blue is what came again, red is what contradicts.
#
# Knows §3 (that a store can fail), §6 (requests and responses), §7 (how often a live
# tail speaks) and §8 (routes, documents, content policy). Must not know the pipeline,
# how events are stored, or sockets.
#
#   * What publishers send is text. Here it is escaped, and the script assigns it as
#     `textContent`; neither ever makes markup of it. The policy would stop it anyway.
#   * Characters that cannot be seen, or that turn the direction of others, are shown by
#     their numbers.
#   * Every address in the page is relative, so it works under any path of a proxy.
#   * The token is in no address: the script sends it in a field of the request.
#   * What is written here is what is served. Comments and indents cost little, because
#     the document travels in gzip.
#
# Simpler than a production system: one page, no framework, no build, and English only.
# ============================================================================

# Rows of the tables of topics and sources. The service counts more; nobody reads them.
NAMES_SHOWN = 12
# Rows of the lists of arrivals and of duplicates. What is older leaves the page. A row
# holds 300 characters of a payload, so a list is about 100 KB of text for the browser.
ROWS_SHOWN = 200
# A live tail that missed this many signs of life is taken for dead.
SILENT_KEEP_ALIVES = 3

# The style: one rule a line where it fits. Colours have names, so that light and dark
# are two short lists. `.js` is set by the script: without it, what is `live` stays
# hidden.
PAGE_STYLE = """
:root {
  color-scheme: light dark;
  --paper: #f6f7f9;
  --field: #fff;
  --ink: #15171e;
  --soft: #5a6070;
  --line: #d3d7e1;
  --red: #b3202c;
  --carbon: #3846c4;
  --mono: ui-monospace, "SF Mono", "Cascadia Mono", Menlo, monospace;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #0f111a;
    --field: #171a27;
    --ink: #e8eaf3;
    --soft: #9ba2b8;
    --line: #2d3246;
    --red: #ff867f;
    --carbon: #93a0ff;
  }
}
* { box-sizing: border-box; margin: 0; }
[hidden], :root:not(.js) .live, .locked > :not(#key) { display: none !important; }
body {
  margin: auto;
  max-width: 78rem;
  padding: 1.25rem clamp(1rem, 4vw, 3rem) 3rem;
  background: var(--paper);
  color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif;
  overflow-wrap: anywhere;
}
a { color: inherit; text-decoration-color: var(--carbon); }
section:focus { outline: none; }
:focus-visible { outline: 2px solid var(--carbon); outline-offset: 2px; }
h1 { font: 500 1.5rem var(--mono); letter-spacing: -0.05em; }
h2 { font-size: 1.125rem; }
section { border-top: 1px solid var(--line); margin-top: 1.75rem; padding-top: 0.75rem; }
dd { margin: 0; }
ol, ul { list-style: none; padding: 0; }
pre, textarea, summary { font: 0.875rem/1.5 var(--mono); }
.soft, dt, label, thead { color: var(--soft); font-size: 0.875rem; }
.duplicate { color: var(--carbon); }
.conflict, .refused, .unknown { color: var(--red); }
header, .row { display: flex; flex-wrap: wrap; gap: 0.25rem 1.25rem; align-items: baseline; }
.end { margin-left: auto; }
nav a { margin-right: 0.75rem; }

#state::before { content: "● "; }
#state.fine::before { color: var(--carbon); }
#state.failing { color: var(--red); font-weight: 600; }

.books { display: flex; flex-wrap: wrap; gap: 0 1.5rem; margin: 1.5rem 0 0.5rem; }
.books div { display: grid; align-items: center; gap: 0 1.5rem; }
.books dd { font: 500 clamp(1.75rem, 4.4vw, 3.25rem) var(--mono); letter-spacing: -0.05em; }
.books div + div::before {
  grid-row: 2;
  content: "+";
  color: var(--soft);
  font: 500 1.5rem var(--mono);
}
.books div:nth-child(2)::before { content: "="; }
.books div + div dt { grid-column: 2; }
.facts, .halves { display: grid; gap: 0.5rem 3rem; }
.facts { grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); }
.halves { grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }

table { width: 100%; border-spacing: 0; }
td, th { padding: 0.15rem 0; font-weight: 400; text-align: left; vertical-align: top; }
td, th + th { padding-left: 1ch; text-align: right; white-space: nowrap; }
td { font-variant-numeric: tabular-nums; }
.late th { white-space: nowrap; }
.late .wide { width: 100%; }
.edge td {
  border-top: 1px dashed var(--carbon);
  padding: 0 0 0.25rem;
  text-align: left;
  white-space: normal;
}
progress {
  display: block;
  width: 100%;
  height: 0.5rem;
  margin-top: 0.5rem;
  appearance: none;
  border: 0;
  background: var(--line);
}
::-webkit-progress-bar { background: var(--line); }
::-webkit-progress-value { background: var(--carbon); }
::-moz-progress-bar { background: var(--carbon); }

form { display: grid; grid-template-columns: 1fr 1fr; gap: 0.75rem; align-items: end; }
#filter { grid-template-columns: 2fr 1.5fr 2fr 1.2fr 1.2fr auto; margin: 0.5rem 0; }
#key { grid-template-columns: 1fr auto; max-width: 36rem; margin-top: 1.5rem; }
.all { grid-column: 1 / -1; }
input, textarea, button {
  width: 100%;
  min-height: 2.75rem;
  padding: 0.4rem 0.6rem;
  border: 1px solid var(--soft);
  border-radius: 3px;
  background: var(--field);
  color: var(--ink);
  font: inherit;
  font-size: 1rem;
}
input[type="checkbox"] { width: auto; min-height: 0; }
button { width: auto; cursor: pointer; }
.main { background: var(--ink); color: var(--paper); }
button[aria-pressed="true"] { background: var(--carbon); color: var(--paper); }

svg { display: block; width: 100%; height: 7rem; cursor: pointer; }
svg path { stroke: var(--soft); vector-effect: non-scaling-stroke; }
.unique { fill: var(--ink); }
.repeat { fill: var(--carbon); }
.zone { fill: transparent; }
.zone:hover { fill: var(--carbon); fill-opacity: 0.2; }

#tail, #repeats-list { overflow: auto; max-height: min(40rem, 80vh); }
#repeats-list { max-height: 24rem; }
.list > li { border-top: 1px solid var(--line); }
.list > .mark { color: var(--carbon); font-size: 0.875rem; text-align: center; }
summary {
  display: grid;
  grid-template-columns: 23ch 12rem 7rem 1fr;
  gap: 0 1.25rem;
  padding: 0.35rem 0;
  cursor: pointer;
}
#repeats summary { grid-template-columns: 23ch 9ch 1fr 9rem 13ch; }
summary > * {
  overflow: hidden;
  text-overflow: ellipsis;
  unicode-bidi: isolate;
  white-space: nowrap;
}
pre {
  max-height: 24rem;
  overflow: auto;
  margin: 0.25rem 0 0.75rem;
  padding-left: 0.75rem;
  border-left: 2px solid var(--line);
  white-space: pre-wrap;
}
mark { background: none; color: var(--red); font-weight: 700; text-decoration: underline; }
#repeats .list > li { color: inherit; }
#verdicts > li { border-top: 1px solid var(--line); padding: 0.5rem 0; }
#verdicts ol { padding-left: 1.25rem; list-style: decimal; }
.verdict { border: 2px solid; border-radius: 4px; margin-right: 0.75rem; padding: 0 0.4em; }

@media (max-width: 48rem) {
  .books { display: grid; }
  .books div { grid-template-columns: 1.5rem 1fr auto; gap: 0; }
  .books div dt { grid-column: 2; }
  .books div + div::before { grid-row: 1; }
  .books div:first-child { order: 1; border-top: 3px double; }
  .books div:nth-child(2)::before { content: ""; }
  #filter { grid-template-columns: 1fr 1fr; }
  summary, #repeats summary { grid-template-columns: auto 1fr; gap: 0 1rem; }
  summary time, summary .payload { grid-column: 1 / -1; }
  .end { margin-left: 0; }
}
@media (forced-colors: active) {
  .unique, .repeat { fill: CanvasText; }
  #state.failing, mark { text-decoration: underline; }
  progress { border: 1px solid; }
  ::-webkit-progress-value { background: CanvasText; }
  ::-moz-progress-bar { background: CanvasText; }
  button[aria-pressed="true"] { border-width: 4px; }
}
"""

# The body, a template of `str.format`. `data-n` names a number of GET /stats, which
# `_fill_numbers` puts behind it; `data-per` divides it. What works only with the script
# is `live`.
_PAGE_BODY = """
<header>
<h1>aggregator</h1>
<p id="state" role="status">{state}</p>
<nav aria-label="Sections" class="end">
<a class="live" data-jump href="#events">Events</a>
<a class="live" data-jump href="#repeats">Duplicates</a>
<a class="live" data-jump href="#publish">Publish</a>
<a href="docs">Reference</a>
</nav>
</header>
<main data-limits="{limits}">
<noscript><p>{noscript}</p></noscript>
<form id="key" class="live" hidden novalidate>
<label>Token <input name="token" type="password" autocomplete="off"></label>
<button class="main">Use this token</button>
<p id="key-note" class="all" role="alert"></p>
</form>
<dl class="books">
<div><dt>received<dd data-n="received"></div>
<div><dt>unique<dd data-n="unique_processed"></div>
<div><dt>duplicates<dd class="duplicate" data-n="duplicate_dropped"></div>
<div><dt>in the queue<dd data-n="current_queue_size"></div>
</dl>
<p class="row">
<a id="conflicts" data-jump="conflicts" href="#repeats">Conflicts: <b data-n="conflicts"></b></a>
<span>duplicates with other content than the original.</span>
<span class="live end soft">Now <b id="rate-unique">0</b> unique and
<b id="rate-repeats">0</b> duplicates a second</span>
</p>

<section id="events" class="live" tabindex="-1">
<div class="row"><h2>Events</h2><p class="soft">times are UTC</p>
<p id="ranges" class="row soft"></p>
<p class="row soft end"><a id="download" href="#events">Download as NDJSON</a></p></div>
<form id="filter" role="search">
<label>Topic, or its start and * <input name="topic" type="search"></label>
<label>Source <input name="source" type="search"></label>
<label>Text in the payload <input name="contains" type="search"></label>
<label>Since <input name="since" type="search" placeholder="2h, 7d, today"></label>
<label>Until <input name="until" type="search" placeholder="2026-01-31"></label>
<button class="main">Find</button>
</form>
<figure id="counts" hidden>
<svg id="bars" preserveAspectRatio="none" role="img" aria-label="Events by time"></svg>
<figcaption class="row soft"><span id="bars-from"></span><span id="bars-say"></span>
<span id="bars-to" class="end"></span></figcaption>
<p id="bars-left" class="row soft"></p>
</figure>
<p class="row"><button id="hold" type="button" aria-pressed="false">Hold</button>
<span id="note" class="soft"></span></p>
<div id="tail">
<ol id="arrived" class="list"></ol>
<p id="joint" class="soft"></p>
<ol id="stored" class="list"></ol>
<button id="older" type="button" hidden>Older events</button>
</div>
<details class="soft"><summary>The same with curl</summary>
<pre id="curl" tabindex="0" role="region" aria-label="The same with curl"></pre></details>
</section>

<section id="repeats" class="live" tabindex="-1">
<div class="row"><h2>Duplicates and conflicts</h2>
<label><input id="only-conflicts" type="checkbox"> conflicts only</label>
<p id="repeats-note" class="soft"></p></div>
<ol id="repeats-list" class="list"></ol>
</section>

<section id="publish" class="live" tabindex="-1">
<div class="halves">
<div><h2>Publish, and publish again</h2>
<form id="event">
<label>Topic <input name="topic" value="demo"></label>
<label>Source <input name="source" value="this page"></label>
<label class="all">Event id <input name="event_id"></label>
<label class="all">Payload <textarea name="payload" rows="2">{{"door": "open"}}</textarea></label>
<p class="all row"><button class="main">Publish</button>
<button id="change" type="button">Change the payload</button>
<button id="fresh" type="button">New event id</button></p>
</form></div>
<div><h2>Verdicts</h2>
<p class="soft">The same id again is a duplicate. With another payload it is a conflict.</p>
<ol id="verdicts" aria-live="polite"></ol></div>
</div>
</section>

<div class="halves">
<section><h2>Topics</h2><table><thead><tr><th>largest of <b data-n="topics_total"></b>
<th>unique<th>duplicates</thead><tbody id="topics">{topics}</tbody></table></section>
<section><h2>Sources</h2><table><thead><tr><th>largest of <b data-n="sources_total"></b>
<th>unique<th>duplicates</thead><tbody id="sources">{sources}</tbody></table></section>
<section><h2>How late duplicates come</h2>
<table class="late"><tbody id="delays">{delays}</tbody></table></section>
<section><h2>Store</h2><dl class="facts">
<div><dt>Stored<dd><b data-n="stored"></b> events</div>
<div><dt>Size<dd><b data-n="store_bytes" data-per="1000000"></b> MB</div>
<div><dt>Of each event<dd><b data-n="bytes_per_event"></b> bytes</div>
<div hidden><dt>Growth in the last hour
<dd><b data-n="growth_bytes_per_day.last_hour" data-per="1000000"></b> MB a day</div>
<div hidden><dt>Growth in the last day
<dd><b data-n="growth_bytes_per_day.last_day" data-per="1000000"></b> MB a day</div>
<div><dt>Queue holds<dd><b data-n="limits.queue_max_size"></b> events</div>
<div hidden><dt>Free on disk<dd><b data-n="disk_free_bytes" data-per="1000000000"></b> GB</div>
<div hidden><dt>Full in<dd><b data-n="days_until_full" data-per="1"></b> days</div>
<div><dt>Missing sequence numbers<dd><b data-n="gaps"></b></div>
<div hidden><dt>Node<dd><b data-n="log.node"></b></div>
<div hidden><dt>Primary of the log<dd><b data-n="log.primary"></b></div>
<div hidden><dt>Entry of the log<dd><b data-n="log.position"></b></div>
<div hidden><dt>Entries not yet applied<dd><b data-n="log.lag_entries"></b></div>
<div hidden><dt>What is read here
<dd>at most <b data-n="log.lag_seconds" data-per="1"></b> s old</div>
</dl><ul id="gaps" class="live soft"></ul></section>
</div>
</main>
"""

# The script, in chapters. What it has to agree about with the service is handed in as
# JSON, in an attribute of <main>. So the script stays the same text, with the same
# hash.

# What the service hands in, and how much this page keeps. Times end in _MS, in
# milliseconds.
_SCRIPT_SETTINGS = r"""
"use strict";

const LIMITS = JSON.parse(document.querySelector("main").dataset.limits);
// Rows of a list. What came and is not shown is counted.
const ROWS = LIMITS.rows;
// At most half a list comes in at once, so that the mark of what was left out is seen.
const WAITING = ROWS / 2;
const PAGE_EVENTS = 30;
// Duplicates in the list, and those that the service has, among which conflicts are sought.
const REPEATS = 100;
const REPEATS_KEPT = 500;
// Of missing sequence numbers: so many sources, and gaps of each.
const SOURCES_WITH_GAPS = 20;
const GAPS = 10;
// A text of more lines is shown as it came, and is not compared: to lay out 100,000 lines
// takes a browser seconds.
const MOST_LINES = 5000;
// Of a payload in its row. The rest is built when the row is opened.
const SUMMARY_CHARACTERS = 300;
// A longer event is not kept: opening its row asks for it again.
const KEPT_CHARACTERS = 4096;
// Behind by more than so many events, the tail skips to the newest.
const CATCH_UP_EVENTS = 4000;
// Bars at most, gathered from at most so many counts, but for days. A line has room for
// FEWEST_BARS at least, so that a single one is not a wall.
const BARS = 200;
const COUNTS = 1000;
const MOST_DAYS = 10e3;
// Of those outside the range of the bars, at most so many are asked for to be counted.
const OUTSIDE = 100;
const FEWEST_BARS = 24;
const CHART_HEIGHT = 100;
const POLL_MS = 1200;
// While nobody sees the answer, or it takes a token that is not there.
const POLL_SELDOM_MS = 5000;
// Longer without an answer, and the page says so: within two seconds, with the next look.
// On a slow link so much longer as answers took lately, up to SLOW_MS; that is forgotten
// by a tenth with each answer.
const PATIENCE_MS = 1750;
const SLOW_MS = 1500;
const REMEMBERED = 0.9;
const LOOK_MS = 250;
// What an attempt waits for after a failure: twice as long with each, up to the larger.
const PAUSE_MS = 250;
const MAX_PAUSE_MS = 5000;
// So often events are counted again while some arrive, and so long one search may look.
const COUNT_MS = 15e3;
const LOOKING_MS = 2000;
// An event that is asked for by its seq, and does not come so soon, was removed.
const GONE_MS = 2000;
const FIELDS = ["topic", "source", "contains", "since", "until"];
const UNIT_MS = { minute: 60e3, hour: 3600e3, day: 86400e3 };
"""

# Small tools. `make` builds an element from properties; text becomes a child, never
# markup.
_SCRIPT_TOOLS = r"""
function byId(id) {
  return document.getElementById(id);
}

function make(tag, properties, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

function makeShape(tag, attributes) {
  const shape = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) {
    shape.setAttribute(name, value);
  }
  return shape;
}

function put(element, text) {
  if (element.textContent !== text) {
    element.textContent = text;
  }
}

function sleep(milliseconds) {
  return new Promise((done) => setTimeout(done, milliseconds));
}

function count(number) {
  return number.toLocaleString("en");
}

function clock(text) {
  return text.slice(0, 23).replace("T", " ");
}

function clockNow() {
  return new Date().toISOString().slice(11, 19) + " UTC";
}

function duration(seconds) {
  for (const [size, unit] of [[86400, "d"], [3600, "h"], [60, "min"]]) {
    if (seconds >= size) {
      return Number((seconds / size).toFixed(1)) + " " + unit;
    }
  }
  return Number(seconds.toFixed(1)) + " s";
}

// Characters that cannot be seen, or that turn the direction of what follows.
const UNSEEN =
  /[\0-\x1f\x7f-\x9f\xad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\u{e0000}-\u{e007f}]/gu;

function visible(text) {
  return text.replace(UNSEEN, (character) => {
    const code = character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
    return "⟨U+" + code + "⟩";
  });
}
"""

# JSON as it came. JSON.parse rounds 2^53 + 1 and turns 1.0 into 1, so whatever is shown
# is cut out of the text: a tokenizer of one expression is enough for that. The summary
# of a row is light; the whole event is laid out when somebody opens it.
_SCRIPT_JSON = r"""
// A text may have been cut within a string.
const JSON_TOKEN = /"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?$)|[{}[\],:]|[^\s{}[\],:"]+/g;

// The texts of the objects in the one list of an answer.
function listedTexts(answer) {
  const texts = [];
  let depth = 0;
  let start = 0;
  for (const { 0: token, index } of answer.matchAll(JSON_TOKEN)) {
    if (token === "{") {
      depth += 1;
      start = depth === 2 ? index : start;
    } else if (token === "}") {
      if (depth === 2) {
        texts.push(answer.slice(start, index + 1));
      }
      depth -= 1;
    }
  }
  return texts;
}

// A value a line, as JSON.stringify(value, null, 2) has it.
function indented(text) {
  let lines = "";
  let depth = 0;
  let opened = false;
  for (const [token] of text.matchAll(JSON_TOKEN)) {
    const closes = token === "}" || token === "]";
    depth -= closes ? 1 : 0;
    if (opened !== closes) {
      lines += "\n" + "  ".repeat(depth);
    }
    opened = token === "{" || token === "[" || token === ",";
    depth += opened && token !== "," ? 1 : 0;
    lines += token === ":" ? ": " : token;
  }
  return lines;
}

function isLong(lines) {
  return lines.split("\n").length > MOST_LINES;
}

function laidOut(text) {
  const lines = indented(text);
  return isLong(lines) ? text : lines;
}

// The service writes the payload behind the names, so the first `,"payload":` is its own:
// inside a string the quotes would be escaped. Behind it there is only what EVENT_END names.
const EVENT_END = /,(?:"sequence":[^,]*,)?"processed_at":"[^"]*"\}$/;

function readEvent(text) {
  const before = text.indexOf(',"payload":');
  const [end] = EVENT_END.exec(text.slice(-200));
  const event = JSON.parse(text.slice(0, before) + "}");
  event.payload = text.slice(before + ',"payload":'.length, -end.length);
  return event;
}

// What a row needs, in strings of its own: a slice would keep the whole text in memory.
function lighten(text) {
  const event = readEvent(text);
  event.payload = JSON.parse(JSON.stringify(event.payload.slice(0, SUMMARY_CHARACTERS)));
  event.text = text.length > KEPT_CHARACTERS ? "" : text;
  return event;
}
"""

# Asking the service. Every request goes through `ask`: it adds the token, turns a
# refusal into an exception, and a 401 into the form for the token. A request that this
# page ended itself is not an error.
_SCRIPT_ASKING = r"""
class Refused extends Error {
  constructor(problem) {
    super(problem.detail);
    Object.assign(this, problem);
  }
}

let token = "";
let locked = false;

async function ask(path, options = {}) {
  const sent = token;
  const headers = { ...options.headers };
  if (sent) {
    headers.Authorization = "Bearer " + sent;
  }
  const answer = await fetch(path, { cache: "no-store", ...options, headers });
  if (answer.ok) {
    return answer;
  }
  const problem = await readProblem(answer);
  if (answer.status === 401 && sent === token && !locked) {
    lock(sent ? "This is not the token." : "Without its token this service shows nothing.");
  }
  throw new Refused(problem);
}

async function readProblem(answer) {
  try {
    return { status: answer.status, ...(await answer.json()) };
  } catch {
    const detail = "A proxy answered with " + answer.status;
    return { status: answer.status, detail, isFromProxy: true };
  }
}

// What to say of an error; nothing of an abort, which is always intended.
function explain(error) {
  if (error.name === "AbortError") {
    return "";
  }
  return error instanceof Refused ? error.message : "No answer from the service";
}

function recallToken() {
  try {
    return sessionStorage.token || "";
  } catch {
    // Where storage is forbidden, its mention throws.
    return "";
  }
}

function lock(why) {
  locked = true;
  byId("key").hidden = false;
  put(byId("key-note"), why);
  document.querySelector("main").classList.toggle("locked", stats === null);
}

function unlock(event) {
  event.preventDefault();
  const given = byId("key").elements.token.value.trim();
  if (!/^[!-~]+$/.test(given)) {
    put(byId("key-note"), "A token has visible ASCII characters only.");
    return;
  }
  token = given;
  try {
    sessionStorage.token = token;
  } catch {
    // It is kept until this page is closed.
  }
  openUp();
  refreshNumbers();
}

function openUp() {
  locked = false;
  trouble = "";
  answeredAt = performance.now();
  byId("key").hidden = true;
  document.querySelector("main").classList.remove("locked");
  startSearch();
}
"""

# State and numbers. `watch` asks for GET /stats at short intervals, and everything that
# shows a number follows from it. The state is computed from facts each time it is
# shown: when the last answer came, and what it said about health.
_SCRIPT_STATE = r"""
let stats = null;
let answeredAt = performance.now();
// How long answers took lately, in milliseconds.
let slowness = 0;
let trouble = "";
let replacedAt = "";
// Names are asked for only when something came: this keeps an idle page under 2 kB a second.
let wantsNames = true;
// A service that takes no parameters here refuses them.
let statsQuery = true;

async function readStats() {
  const named = wantsNames;
  const names = named ? LIMITS.names : 1;
  const path = statsQuery ? `stats?topics=${names}&sources=${names}` : "stats";
  try {
    const answer = await ask(path, { signal: AbortSignal.timeout(10e3) });
    return { ...(await answer.json()), at: performance.now(), named };
  } catch (error) {
    if (error.status !== 400 || path === "stats") {
      throw error;
    }
    statsQuery = false;
    return readStats();
  }
}

async function refreshNumbers() {
  try {
    const sentAt = performance.now();
    const now = await readStats();
    const before = stats;
    stats = now;
    answeredAt = now.at;
    slowness = Math.min(SLOW_MS, Math.max(REMEMBERED * slowness, now.at - sentAt));
    trouble = "";
    if (locked) {
      // The service was started again without a token.
      openUp();
    }
    wantsNames = before === null || now.received !== before.received;
    shown.received = shown.received || now.received;
    showNumbers(now);
    showRates(before || now, now);
    if (isOtherStore(before || now, now)) {
      replacedAt = clockNow();
      startSearch();
    }
    showWhatChanged(now);
  } catch (error) {
    trouble = explain(error) || trouble;
  }
}

// Nodes of one log have the same store, and one may be behind the other: a balancer may
// have asked another node than before. Alone, fewer events mean that an old copy was restored.
function isOtherStore(before, now) {
  const isFewer = !now.log && now.unique_processed < before.unique_processed;
  return now.store_id !== before.store_id || isFewer;
}

// The state of the service in words, and whether it is "fine", "failing" or neither.
function currentState() {
  if (locked) {
    return ["Waiting for a token", ""];
  }
  const silence = performance.now() - answeredAt;
  const silent = !document.hidden && silence > PATIENCE_MS + slowness;
  if (trouble || silent) {
    return [trouble || "No answer from the service", "failing"];
  }
  if (stats === null) {
    return ["Asking the service", ""];
  }
  if (stats.health && stats.health.status !== "ok") {
    return ["Cannot store: " + stats.health.reason, "failing"];
  }
  if (replacedAt) {
    return ["Another store since " + replacedAt, "failing"];
  }
  if (stats.health && stats.health.warning) {
    return ["Storing events; " + stats.health.warning, "fine"];
  }
  return [stats.health ? "Storing events" : "Answering", "fine"];
}

function showState() {
  const [text, kind] = currentState();
  put(byId("state"), text);
  byId("state").className = kind;
  document.title = (kind === "fine" ? "" : text + " · ") + "aggregator";
}

function showNumbers(now) {
  for (const element of document.querySelectorAll("[data-n]")) {
    const path = element.dataset.n.split(".");
    const fact = path.reduce((inside, name) => inside && inside[name], now);
    const isName = typeof fact === "string" && fact !== "";
    const isNumber = typeof fact === "number";
    if (isName) {
      put(element, fact);
    }
    if (isNumber) {
      const per = element.dataset.per;
      put(element, per ? (fact / per).toFixed(1) : count(fact));
    }
    element.closest(".facts div")?.toggleAttribute("hidden", !isNumber && !isName);
  }
  byId("conflicts").classList.toggle("conflict", now.conflicts > 0);
  if (now.named) {
    showDelays(now.duplicate_delay_seconds, now.windows);
    showNames("topics", "topic", now.topics);
    showNames("sources", "source", now.sources);
  }
}

// A histogram up to its last bar, and a line across it where a well-known dedup window ends.
function showDelays(delays, windows) {
  const bounds = Object.keys(delays).sort((one, other) => boundSeconds(one) - boundSeconds(other));
  while (bounds.length > 0 && !delays[bounds[bounds.length - 1]]) {
    bounds.pop();
  }
  const most = Math.max(...Object.values(delays));
  const rows = [];
  for (const bound of bounds) {
    const gauge = make("progress", { value: delays[bound], max: most, ariaHidden: "true" });
    const label = bound === "inf" ? "later" : "to " + duration(Number(bound));
    rows.push(make("tr", {},
      make("th", {}, label),
      make("td", { className: "wide" }, gauge),
      make("td", {}, count(delays[bound]))));
    const edge = windows.find((each) => String(each.window_seconds) === bound);
    if (edge) {
      const twice = count(edge.would_have_stored_twice);
      const text = `${edge.like}: forgets here, and ${twice} would be stored twice`;
      rows.push(make("tr", { className: "edge soft" }, make("td", { colSpan: 3 }, text)));
    }
  }
  byId("delays").replaceChildren(...rows);
}

function boundSeconds(bound) {
  return bound === "inf" ? Infinity : Number(bound);
}

function showNames(id, field, names) {
  if (whyHeld(byId(id))) {
    // The next numbers have them again.
    wantsNames = true;
    return;
  }
  const rows = Object.entries(names).slice(0, LIMITS.names);
  byId(id).replaceChildren(
    ...rows.map(([name, { unique, duplicates }]) =>
      make("tr", {},
        make("th", {}, nameLink(field, name)),
        make("td", {}, count(unique)),
        make("td", {}, count(duplicates)))));
}

function showRates(before, now) {
  const seconds = (now.at - before.at) / 1000 || 1;
  const rate = (name) => count(Math.max(0, Math.round((now[name] - before[name]) / seconds)));
  put(byId("rate-unique"), rate("unique_processed"));
  put(byId("rate-repeats"), rate("duplicate_dropped"));
}

// What was shown last, so that only what changed is asked for; one round at a time. The
// numbers do not wait for it: a slow answer here does not mean that the service is silent.
const shown = { gaps: 0, repeats: -1, received: 0, busy: false };

async function showWhatChanged(now) {
  if (shown.busy) {
    return;
  }
  shown.busy = true;
  try {
    if (now.gaps !== shown.gaps) {
      await showGaps();
      shown.gaps = now.gaps;
    }
    const isReading = document.hidden || whyHeld(byId("repeats-list"));
    if (now.duplicate_dropped !== shown.repeats && !isReading) {
      await showRepeats(now);
    }
    if (now.received !== shown.received && performance.now() - countedAt > COUNT_MS) {
      await showCounts(search);
      shown.received = now.received;
    }
  } catch {
    // It is still not shown, so the next numbers ask for it again.
  }
  shown.busy = false;
}

async function showGaps() {
  const { sources } = await (await ask("gaps?limit=" + SOURCES_WITH_GAPS)).json();
  byId("gaps").replaceChildren(
    ...sources.map(({ source, missing_count: missing, missing: ranges }) => {
      const last = ranges.slice(-GAPS).map(([from, to]) => (to > from ? from + "–" + to : from));
      const which = ranges.length > GAPS ? `, the last ${GAPS} gaps` : "";
      const text = `: ${count(missing)} missing${which}: ${last.join(", ")}`;
      return make("li", {}, nameLink("source", source), text);
    }));
  if (sources.length === SOURCES_WITH_GAPS) {
    byId("gaps").append(make("li", {}, "Sources that miss less are not listed."));
  }
}
"""

# The filter. It lives in the fragment of the address, so that back, reload and links
# work; the form only writes to it.
_SCRIPT_FILTER = r"""
function readFragment() {
  const given = new URLSearchParams(location.hash.includes("=") ? location.hash.slice(1) : "");
  const filter = {};
  for (const field of FIELDS) {
    const value = given.get(field);
    if (value) {
      filter[field] = value;
    }
  }
  return filter;
}

function filterLink(filter, text) {
  return make("a", { href: "#" + new URLSearchParams(filter) }, visible(text));
}

// A link to all of a topic, or of a source. A topic that ends in * has none: it would be
// taken for the start of others.
function nameLink(field, name) {
  if (field === "topic" && name.endsWith("*")) {
    return visible(name);
  }
  return filterLink({ [field]: name }, name);
}

// Blanks around what somebody typed are not meant; those of a name in a link are.
function submitFilter(event) {
  event.preventDefault();
  replacedAt = "";
  const filter = {};
  for (const [field, value] of new FormData(byId("filter"))) {
    const isTyped = value !== search.filter[field];
    const text = isTyped ? value.trim() : value;
    if (text) {
      filter[field] = text;
    }
  }
  const fragment = "#" + new URLSearchParams(filter);
  if (fragment === (location.hash || "#")) {
    startSearch();
  } else {
    location.hash = fragment;
  }
}

function showFilter(filter) {
  for (const field of FIELDS) {
    byId("filter").elements[field].value = filter[field] || "";
  }
  const rest = { ...filter };
  delete rest.since;
  delete rest.until;
  byId("ranges").replaceChildren(
    ...[["1h", "last hour"], ["1d", "last day"], ["7d", "last week"]].map(([since, name]) =>
      filterLink({ ...rest, since }, name)),
    filterLink(rest, "all time"));
  const { href } = new URL("events?" + new URLSearchParams(filter), location.href);
  const key = token ? ' -H "Authorization: Bearer $AUTH_TOKEN"' : "";
  const accept = "-H 'Accept: application/x-ndjson'";
  put(byId("curl"), `curl -s ${accept}${key} '${href.replaceAll("'", "%27")}'`);
}

const DOWNLOAD = "Download as NDJSON";

async function download(event) {
  event.preventDefault();
  const asked = search;
  const link = byId("download");
  put(link, "Downloading …");
  try {
    const query = new URLSearchParams(readFragment());
    const answer = await ask("events?" + query, { headers: { Accept: "application/x-ndjson" } });
    const address = URL.createObjectURL(await answer.blob());
    make("a", { href: address, download: "events.ndjson" }).click();
    setTimeout(() => URL.revokeObjectURL(address), 60e3);
    put(link, DOWNLOAD);
  } catch (error) {
    if (asked === search) {
      put(link, "Download failed: " + explain(error));
    }
  }
}
"""

# Events. A search asks the store, newest first, then follows what arrives from exactly
# there. It ends when the filter changes. Arrivals wait in a bounded list until they may
# be drawn: not while somebody reads.
_SCRIPT_EVENTS = r"""
// The search under way. `last` is the newest seq that was shown, or passed the filter by;
// `waiting` holds texts of events, light events and marks that are not drawn yet.
let search = null;

function startSearch() {
  if (search) {
    search.ended = true;
    search.wire.abort();
  }
  search = {
    filter: readFragment(),
    wire: new AbortController(),
    ended: false,
    found: false,
    next: null,
    last: 0,
    waiting: [],
    skipped: 0,
    held: "",
    away: "",
    fault: "Looking",
    pause: PAUSE_MS,
  };
  byId("arrived").replaceChildren();
  byId("stored").replaceChildren();
  byId("older").hidden = true;
  put(byId("joint"), "");
  put(byId("download"), DOWNLOAD);
  showFilter(search.filter);
  runSearch(search);
  showCounts(search);
}

async function runSearch(mine) {
  while (!mine.ended) {
    try {
      await untilVisible();
      if (mine.ended) {
        return;
      }
      mine.wire = new AbortController();
      await (mine.found ? catchUp(mine) : findStored(mine));
      if (mine.filter.until) {
        return;
      }
      await follow(mine);
    } catch (error) {
      mine.fault = explain(error);
      if (error.oldest_seq) {
        skipRemoved(mine, error.oldest_seq);
      } else if (isFinal(mine, error)) {
        return;
      } else {
        mine.fault = mine.fault && mine.fault + "; asking again";
        mine.away = document.hidden ? "while this tab was hidden" : "while there was no answer";
      }
    }
    await sleep(mine.pause);
    mine.pause = Math.min(2 * mine.pause, MAX_PAUSE_MS);
  }
}

// A wrong filter stays wrong, and the form for the token begins anew. All else may pass: a
// proxy is started again, or another node is asked.
function isFinal(mine, error) {
  const isOurs = error instanceof Refused && !error.isFromProxy;
  return error.status === 401 || (isOurs && error.status < 500 && !mine.found);
}

function untilVisible() {
  if (!document.hidden) {
    return null;
  }
  return new Promise((done) => {
    document.addEventListener("visibilitychange", done, { once: true });
  });
}

// Seqs count the unique events, so their number is the newest seq. What is stored while we
// look has a larger one, and comes with the tail. A search that was interrupted begins anew.
async function findStored(mine) {
  mine.next = null;
  byId("stored").replaceChildren();
  mine.last = (await readStats()).unique_processed;
  await findOlder(mine);
  mine.found = true;
  mine.fault = "";
  const none = mine.next ? "None of the newest events matches" : "No stored event matches";
  const text = `Stored before ${clockNow()}, newest first`;
  put(byId("joint"), byId("stored").children.length > 0 ? text : none);
}

// A page may come back short where few events match: then the next one is asked for.
async function findOlder(mine) {
  const end = performance.now() + LOOKING_MS;
  let added = 0;
  do {
    const query = new URLSearchParams({ ...mine.filter, order: "desc", limit: PAGE_EVENTS });
    if (mine.next) {
      query.set("cursor", mine.next);
    }
    const answer = await (await ask("events?" + query, { signal: mine.wire.signal })).text();
    const events = listedTexts(answer).map(lighten);
    const before = events.filter((event) => event.seq <= mine.last || mine.filter.until);
    byId("stored").append(...before.map(eventRow));
    added += events.length;
    mine.next = (/"next":"([^"]*)"\}\s*$/.exec(answer.slice(-100)) || [])[1];
  } while (mine.next && added < PAGE_EVENTS && performance.now() < end);
  byId("older").hidden = !mine.next;
}

async function showOlder() {
  const mine = search;
  byId("older").disabled = true;
  mine.fault = "";
  try {
    await findOlder(mine);
  } catch (error) {
    mine.fault = explain(error);
  }
  byId("older").disabled = false;
}

async function catchUp(mine) {
  const newest = (await readStats()).unique_processed;
  const missed = newest - mine.last;
  if (missed > CATCH_UP_EVENTS) {
    const text = `${count(missed)} events were stored ${mine.away}; Find looks again`;
    mine.waiting.push({ mark: "Skipped here: " + text });
    mine.last = newest;
  }
}

function skipRemoved(mine, oldest) {
  const missed = oldest - 1 - mine.last;
  mine.waiting.push({ mark: `Skipped here: retention removed up to ${count(missed)} events` });
  mine.last = oldest - 1;
}

// The live tail, as Server-Sent Events: `id` is the seq to go on behind, `data` an event.
async function follow(mine) {
  const query = new URLSearchParams({ ...mine.filter, follow: 1, after: mine.last });
  query.delete("since");
  const { wire } = mine;
  const headers = { Accept: "text/event-stream" };
  const answer = await ask("events?" + query, { headers, signal: wire.signal });
  const reader = answer.body.getReader();
  const decoder = new TextDecoder();
  let id = mine.last;
  let rest = "";
  mine.fault = "";
  for (;;) {
    const silence = setTimeout(() => wire.abort(), LIMITS.silence_ms);
    const { value, done } = await reader.read();
    clearTimeout(silence);
    if (done) {
      return;
    }
    mine.pause = PAUSE_MS;
    const lines = (rest + decoder.decode(value, { stream: true })).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith("id: ")) {
        id = Number(line.slice(4));
      } else if (line.startsWith("data: ")) {
        arrive(mine, line.slice(6));
      } else if (line === "") {
        mine.last = id;
      }
    }
  }
}

function arrive(mine, text) {
  mine.waiting.push(text.length > KEPT_CHARACTERS ? lighten(text) : text);
  if (mine.waiting.length > WAITING) {
    const first = mine.waiting.shift();
    mine.skipped += first.mark ? 0 : 1;
  }
}

function drawArrivals() {
  const list = byId("arrived");
  const held = isHeldByButton() ? "by you" : whyHeld(byId("tail"));
  const waiting = count(search.waiting.length + search.skipped);
  put(byId("note"), search.fault || (held ? `Held ${held}; ${waiting} waiting` : followed()));
  if (held || search.waiting.length === 0) {
    search.held = held;
    return;
  }
  const rows = search.waiting.map((item) => {
    return item.mark ? markRow(item.mark) : eventRow(item.seq ? item : lighten(item));
  });
  if (search.skipped) {
    const why = search.held ? "while the list was held" : "too fast to be shown";
    rows.unshift(markRow(`${count(search.skipped)} came ${why}`));
  }
  Object.assign(search, { waiting: [], skipped: 0, held: "" });
  list.prepend(...rows.reverse());
  while (list.children.length > ROWS) {
    list.lastChild.remove();
  }
}

function followed() {
  if (search.filter.until) {
    return "A range with an end is not followed";
  }
  const anyTime = search.filter.since ? ", whatever its time" : "";
  return `Following: what arrives comes in here${anyTime}, the last ${ROWS}, in order of arrival`;
}

function isHeldByButton() {
  return byId("hold").getAttribute("aria-pressed") === "true";
}

// A finger leaves `:hover` behind where it touched.
let pointer = "";

function notePointer(event) {
  pointer = event.pointerType;
}

// Why a list must not move right now; "" if it may.
function whyHeld(list) {
  const selection = getSelection();
  if (list.querySelector("[open]")) {
    return "while an event is open";
  }
  if (list.matches(":hover") && pointer === "mouse") {
    return "while you point at it";
  }
  if (list.contains(document.activeElement)) {
    return "while it has the focus";
  }
  if (!selection.isCollapsed && list.contains(selection.anchorNode)) {
    return "while text is selected";
  }
  if (list.scrollTop > 0) {
    return "while you read further down";
  }
  return "";
}

function markRow(text) {
  return make("li", { className: "mark" }, text);
}

function eventRow(event) {
  const summary = make("summary", {},
    make("time", { dateTime: event.timestamp }, clock(event.timestamp)),
    make("span", {}, visible(event.topic)),
    make("span", {}, visible(event.source)),
    make("span", { className: "payload" }, visible(event.payload)));
  const details = make("details", {}, summary);
  details.addEventListener("toggle", () => showEvent(details, event));
  return make("li", {}, details);
}

async function showEvent(details, event) {
  if (!details.open || details.querySelector("pre")) {
    return;
  }
  const whole = jsonBlock("The event " + visible(event.event_id), "");
  details.append(onlyThese(event), whole);
  try {
    whole.textContent = laidOut(visible(event.text || (await readStored(event))));
  } catch (error) {
    whole.textContent = explain(error);
  }
}

// Links to all events of the same topic, and of the same source.
function onlyThese({ topic, source }) {
  const topicLink = nameLink("topic", topic);
  const sourceLink = nameLink("source", source);
  return make("p", { className: "soft" }, "All of ", topicLink, ", all from ", sourceLink);
}

// A group and no region: there may be many, and a region would need a name of its own.
function jsonBlock(label, text) {
  const block = make("pre", { tabIndex: 0, textContent: text });
  block.setAttribute("role", "group");
  block.setAttribute("aria-label", label);
  return block;
}

// The text of an event, by its seq: the first that a live tail from there shows. Its
// address leads to another event at times: browsers resolve the dots of `a/../b`, and some
// proxies decode %2F.
async function readStored({ topic, event_id: id, seq }) {
  const wire = new AbortController();
  const options = { headers: { Accept: "application/x-ndjson" }, signal: wire.signal };
  try {
    const line = await firstLine(await ask(`events?follow=1&after=${seq - 1}`, options), wire);
    const came = line ? readEvent(line) : {};
    if (came.seq === seq && came.topic === topic && came.event_id === id) {
      return line;
    }
  } catch (error) {
    if (error.name !== "AbortError" && error.status !== 410) {
      throw error;
    }
  }
  throw new Refused({ detail: `The event with seq ${seq} is not stored any more` });
}

// What is stored comes at once. Silence means that there is nothing yet behind the cursor.
async function firstLine(answer, wire) {
  const silence = setTimeout(() => wire.abort(), GONE_MS);
  const reader = answer.body.getReader();
  const decoder = new TextDecoder();
  let text = "";
  while (!text.includes("\n")) {
    const { value, done } = await reader.read();
    clearTimeout(silence);
    if (done) {
      throw new TypeError("The answer ends within a line");
    }
    text += decoder.decode(value, { stream: true });
  }
  wire.abort();
  return text.slice(0, text.indexOf("\n"));
}
"""

# Events by time: bars from GET /counts, unique events above the axis, and below it
# those repeats whose time is known.
_SCRIPT_COUNTS = r"""
// What GET /counts said, for which range, in milliseconds, and what is outside of it.
let counted = { per: "day", counts: [], since: 0, until: 0, leftOut: [] };
let countedAt = 0;

async function showCounts(mine) {
  countedAt = performance.now();
  try {
    const answer = await readCounts(mine);
    if (!mine.ended) {
      counted = answer;
      drawBars();
    }
  } catch {
    // A service without this route, or without an answer: the page does without bars.
    byId("counts").hidden = true;
  }
}

// Counts from the oldest event that the filter finds to the newest, whatever their text.
// A clock that is years ahead or behind must not hide all others, so the range ends
// tomorrow at the latest, and begins MOST_DAYS before at the earliest.
async function readCounts(mine) {
  const filter = { ...mine.filter };
  delete filter.contains;
  const leftOut = [];
  let from = await timeOfFirst(mine, filter, "asc");
  let to = await timeOfFirst(mine, filter, "desc");
  if (Number.isNaN(from + to)) {
    return { per: "day", counts: [], leftOut };
  }
  const tomorrow = Date.now() + UNIT_MS.day;
  if (from < tomorrow && to >= tomorrow) {
    leftOut.push(await countOutside(mine, { ...filter, since: instant(tomorrow) }));
    filter.until = instant(tomorrow);
    to = await timeOfFirst(mine, filter, "desc");
  }
  const earliest = to - MOST_DAYS * UNIT_MS.day;
  if (from < earliest) {
    leftOut.push(await countOutside(mine, { ...filter, until: instant(earliest) }));
    filter.since = instant(earliest);
    from = await timeOfFirst(mine, filter, "asc");
  }
  const fits = (unit) => to - from <= COUNTS * UNIT_MS[unit];
  const per = Object.keys(UNIT_MS).find(fits) || "day";
  const range = { since: instant(from), until: instant(to + 1) };
  const query = new URLSearchParams({ ...filter, ...range, per });
  const { counts } = await (await ask("counts?" + query, { signal: mine.wire.signal })).json();
  return { per, counts, since: from, until: to + 1, leftOut };
}

// A page that finds nothing and has a next one has looked at as much as a page may. Its
// cursor says how far, in microseconds: there is nothing before it.
async function timeOfFirst(mine, filter, order) {
  const query = new URLSearchParams({ ...filter, order, limit: 1 });
  const answer = await ask("events?" + query, { signal: mine.wire.signal });
  const { events, next } = await answer.json();
  if (events.length > 0) {
    return Date.parse(events[0].timestamp);
  }
  return next ? Math.floor(/-?[0-9]+/.exec(next)[0] / 1000) : NaN;
}

// A link to the events that a filter finds, with their number: so many as a page has.
async function countOutside(mine, filter) {
  const query = new URLSearchParams({ ...filter, limit: OUTSIDE });
  const answer = await ask("events?" + query, { signal: mine.wire.signal });
  const { count: found, next } = await answer.json();
  const number = next ? count(found) + " or more" : count(found);
  const where = filter.since ? "after " + clock(filter.since) : "before " + clock(filter.until);
  return { filter, text: `${number} ${where}` };
}

// An instant as the service takes it: none is behind the year 9999.
function instant(milliseconds) {
  const text = new Date(milliseconds).toISOString();
  return text.startsWith("+") ? "9999-12-31T23:59:59.999999Z" : text;
}

// At most BARS bars of equal width: {from, until, unique, repeats}, times in milliseconds.
function gatherBars(counts, unit) {
  if (counts.length === 0) {
    return [];
  }
  const start = Date.parse(counts[0].from);
  const units = (Date.parse(counts[counts.length - 1].from) - start) / unit + 1;
  const width = Math.ceil(units / BARS) * unit;
  const bars = [];
  for (let from = start; from < start + units * unit; from += width) {
    bars.push({ from, until: from + width, unique: 0, repeats: 0 });
  }
  for (const { from, count: unique } of counts) {
    bars[Math.floor((Date.parse(from) - start) / width)].unique += unique;
  }
  for (const { topic, source, repeated } of repeats) {
    const bar = bars[Math.floor((Date.parse(repeated) - start) / width)];
    if (bar && isWanted(topic, source)) {
      bar.repeats += 1;
    }
  }
  return bars;
}

function isWanted(topic, source) {
  const { topic: wanted = "*", source: from = source } = search.filter;
  const start = wanted.slice(0, -1);
  const right = wanted.endsWith("*") ? topic.startsWith(start) : topic === wanted;
  return right && source === from;
}

// Drawn in units of its own, a bar wide and CHART_HEIGHT high, and stretched by the browser.
// One scale for both sides of the axis, like a sheet and its carbon copy.
function drawBars() {
  const { per, counts } = counted;
  const bars = gatherBars(counts, UNIT_MS[per]);
  byId("counts").hidden = bars.length === 0;
  if (bars.length === 0) {
    return;
  }
  const most = Math.max(...bars.map((bar) => bar.unique));
  const low = Math.max(...bars.map((bar) => bar.repeats));
  const scale = CHART_HEIGHT / Math.max(1, most + low);
  const axis = most * scale;
  const shapes = bars.map((bar, x) => drawBar(bar, x, axis, scale));
  const width = Math.max(bars.length, FEWEST_BARS);
  const line = makeShape("path", { d: `M0 ${axis}H${width}` });
  byId("bars").setAttribute("viewBox", `0 0 ${width} ${CHART_HEIGHT}`);
  byId("bars").replaceChildren(...shapes.flat(), line);
  describeBars(bars, per, most, low);
}

function drawBar(bar, x, axis, scale) {
  // What is not nothing can be seen.
  const up = bar.unique && Math.max(1, bar.unique * scale);
  const down = bar.repeats * scale;
  const zone = makeShape("rect", { class: "zone", x, y: 0, width: 1, height: CHART_HEIGHT });
  const title = makeShape("title", {});
  const numbers = `${count(bar.unique)} events, ${count(bar.repeats)} repeats`;
  title.textContent = time(bar.from) + ": " + numbers;
  zone.append(title);
  zone.addEventListener("click", () => narrow(bar));
  return [
    makeShape("rect", { class: "unique", x, y: axis - up, width: 0.9, height: up }),
    makeShape("rect", { class: "repeat", x, y: axis, width: 0.9, height: down }),
    zone,
  ];
}

function describeBars(bars, per, most, low) {
  const total = bars.reduce((sum, bar) => sum + bar.unique, 0);
  const units = (bars[0].until - bars[0].from) / UNIT_MS[per];
  const wide = units > 1 ? `${units} ${per}s` : `a ${per}`;
  const text = search.filter.contains ? ", whatever their text" : "";
  const repeated = low ? "; below the line the last repeats, when they came" : "";
  put(byId("bars-from"), time(bars[0].from));
  put(byId("bars-to"), time(bars[bars.length - 1].until));
  const tallest = `at most ${count(most)} in ${wide}`;
  put(byId("bars-say"), `${count(total)} events${text}, ${tallest}${repeated}`);
  const links = counted.leftOut.map((each) => filterLink(each.filter, each.text));
  byId("bars-left").replaceChildren(...(links.length > 0 ? ["Left out: ", ...links] : []));
}

function time(milliseconds) {
  return instant(milliseconds).slice(0, 16).replace("T", " ");
}

// The first bar may begin before the range that is counted, and the last one end behind it.
function narrow({ from, until }) {
  const since = instant(Math.max(from, counted.since));
  const range = { since, until: instant(Math.min(until, counted.until)) };
  location.hash = "#" + new URLSearchParams({ ...search.filter, ...range });
}
"""

# Duplicates and conflicts. GET /duplicates lists the latest. Opened, the original
# stands above what came again, and lines that differ are marked.
_SCRIPT_REPEATS = r"""
let repeats = [];

async function showRepeats(now) {
  const onlyConflicts = byId("only-conflicts").checked;
  const limit = onlyConflicts ? REPEATS_KEPT : REPEATS;
  const { duplicates } = await (await ask("duplicates?limit=" + limit)).json();
  if (onlyConflicts !== byId("only-conflicts").checked) {
    return;
  }
  const conflicts = duplicates.filter((repeat) => repeat.verdict === "conflict");
  const listed = onlyConflicts ? conflicts : duplicates;
  repeats = duplicates;
  byId("repeats-list").replaceChildren(...listed.map(repeatRow));
  put(byId("repeats-note"), describeRepeats(now.duplicate_dropped, listed.length));
  drawBars();
  shown.repeats = now.duplicate_dropped;
}

function describeRepeats(all, listed) {
  if (all === 0) {
    return "None yet";
  }
  const last = `last ${count(repeats.length)} of ${count(all)}; earlier ones are only counted`;
  if (listed === repeats.length) {
    return "The " + last;
  }
  return `${listed === 0 ? "No conflict" : "Conflicts"} among the ${last}`;
}

function repeatRow(repeat) {
  const summary = make("summary", {},
    make("time", { dateTime: repeat.repeated }, clock(repeat.repeated)),
    make("b", { className: repeat.verdict }, repeat.verdict),
    make("span", {}, visible(repeat.topic)),
    make("span", {}, visible(repeat.source)),
    make("span", {}, "after " + duration(repeat.delay_seconds)));
  const details = make("details", {}, summary);
  details.addEventListener("toggle", () => showComparison(details, repeat));
  return make("li", { className: repeat.verdict }, details);
}

async function showComparison(details, repeat) {
  if (!details.open || details.querySelector("div")) {
    return;
  }
  const block = make("div", {}, onlyThese(repeat));
  details.append(block);
  try {
    const original = readEvent(await readStored(repeat));
    const first = content(original.source, original.payload + "}");
    const place = `stored as seq ${repeat.seq} at ${clock(repeat.first_seen)}`;
    const id = `Event id ${visible(repeat.event_id)}, ${place}`;
    block.append(make("p", { className: "soft" }, id));
    if (repeat.payload === undefined) {
      const same = repeat.verdict === "duplicate";
      const kept = "The original stays. The service kept no copy of what came instead.";
      block.append(make("p", {}, same ? "Source and payload are those of the original." : kept));
      block.append(jsonBlock("The original", laidOut(first)));
    } else {
      block.append(make("p", {}, "The original, which stays:"));
      const isCut = !isWhole(repeat.payload);
      const second = content(repeat.source, repeat.payload + (isCut ? "" : "}"));
      const [gone, come] = unpairedLines(first, second, isCut);
      block.append(marked("The original", first, gone));
      const cut = isCut ? ", its beginning, which alone is compared" : "";
      const long = gone ? "" : ", too long to be compared";
      block.append(make("p", {}, `What came instead${cut}${long}:`));
      block.append(marked("What came instead", second, come));
    }
  } catch (error) {
    block.append(make("p", {}, explain(error)));
  }
}

function content(source, payloadAndEnd) {
  return visible(`{"source":${JSON.stringify(source)},"payload":${payloadAndEnd}`);
}

// The service keeps the beginning of a payload. An object that was cut is no JSON.
function isWhole(payload) {
  try {
    JSON.parse(payload);
    return true;
  } catch {
    return false;
  }
}

// Two sets of line numbers: the lines of each text that have no partner in the other, in
// the same order (the longest common subsequence). Where the second text is only a
// beginning, so much of the first is compared. Nothing for texts that are too long. The
// second has a few hundred lines at most, because the service keeps no more.
function unpairedLines(first, second, isCut) {
  const whole = indented(first);
  const came = indented(second);
  if (isLong(whole)) {
    return [];
  }
  const one = linesWithoutCommas(isCut ? whole.slice(0, came.length) : whole);
  const two = linesWithoutCommas(came);
  if (isCut) {
    // The last line of a beginning is not whole.
    one.pop();
    two.pop();
  }
  // At i * width + j: how many pairs there are from line i of the one and j of the other on.
  const width = two.length + 1;
  const pairs = new Uint16Array((one.length + 1) * width);
  for (let i = one.length - 1; i >= 0; i -= 1) {
    for (let j = two.length - 1; j >= 0; j -= 1) {
      const at = i * width + j;
      const without = Math.max(pairs[at + width], pairs[at + 1]);
      pairs[at] = one[i] === two[j] ? pairs[at + width + 1] + 1 : without;
    }
  }
  const gone = new Set(one.keys());
  const come = new Set(two.keys());
  let i = 0;
  let j = 0;
  while (pairs[i * width + j] > 0) {
    if (one[i] === two[j]) {
      gone.delete(i);
      come.delete(j);
      i += 1;
      j += 1;
    } else if (pairs[(i + 1) * width + j] >= pairs[i * width + j + 1]) {
      i += 1;
    } else {
      j += 1;
    }
  }
  // Behind the last pair, the first text has as many lines to show as the beginning has.
  const end = isCut ? i + two.length - j : one.length;
  for (let line = end; line < one.length; line += 1) {
    gone.delete(line);
  }
  return [gone, come];
}

// Lines as they are compared: what follows in the list makes no difference.
function linesWithoutCommas(text) {
  return text.split("\n").map((line) => line.replace(/,$/, ""));
}

// A text with these lines marked; without numbers, as it came.
function marked(label, text, numbers) {
  if (!numbers) {
    return jsonBlock(label, text);
  }
  const block = jsonBlock(label, "");
  // One piece of text up to each mark: a node for each line would be slow.
  let plain = "";
  for (const [number, line] of indented(text).split("\n").entries()) {
    const words = line.trimStart();
    plain += line.slice(0, line.length - words.length);
    if (numbers.has(number)) {
      block.append(plain, make("mark", {}, words));
      plain = "\n";
    } else {
      plain += words + "\n";
    }
  }
  block.append(plain);
  return block;
}

// The list is another one now, even if somebody reads it.
async function showOnlyConflicts() {
  shown.repeats = -1;
  try {
    await showRepeats(stats);
  } catch (error) {
    put(byId("repeats-note"), explain(error));
  }
}
"""

# Publish, and publish again: the form sends one event with `explain=1`, and the answer
# tells what happened inside.
_SCRIPT_PUBLISH = r"""
async function publish(event) {
  event.preventDefault();
  // The payload goes as typed: the service explains what is wrong with it.
  const { payload, ...names } = Object.fromEntries(new FormData(byId("event")));
  const start = JSON.stringify({ ...names, timestamp: new Date().toISOString() }).slice(0, -1);
  const body = `${start},"payload":${payload}}`;
  const headers = { "Content-Type": "application/json" };
  try {
    const answer = await ask("publish?explain=1", { method: "POST", headers, body });
    const { events, group } = await answer.json();
    addVerdict(events[0].verdict, "seq " + events[0].seq, ...whatHappened(events[0], group));
  } catch (error) {
    if (!(error instanceof Refused) || (error.isFromProxy && error.status >= 500)) {
      const again = "It may be stored, or not. Publish it again, and the verdict says which.";
      addVerdict("unknown", "", explain(error), again);
      return;
    }
    const faults = (error.errors || []).map(({ field, message }) => `${field} ${message}`);
    addVerdict("refused", error.title || "", [explain(error), ...faults].join("; "));
  }
}

const FOUND = {
  nowhere: "neither among the recent keys nor among the tombstones",
  recent: "among the recent keys, in memory",
  seen: "not among the recent keys, but among the younger tombstones, on disk",
  archive: "among the older tombstones, on disk, in the archive",
  batch: "the key of an earlier event of the same batch",
};

// What happened inside, in three steps.
function whatHappened({ verdict, explanation }, group) {
  const { key, found, why, seconds_since_first_seen: age } = explanation;
  const others = count(group.events - 1);
  const decided = {
    new: "new; it is stored, and its key is learnt",
    duplicate: `the same source and payload came ${duration(age)} before; nothing to store`,
    conflict: `another source or payload came ${duration(age)} before, and stays`,
  };
  return [
    `Looked up the key ${key}: ${FOUND[found] || why}`,
    `Decided: ${decided[verdict]}`,
    `Committed with ${others} others in ${group.milliseconds.toFixed(1)} ms, then answered`,
  ];
}

function addVerdict(kind, title, ...steps) {
  const list = byId("verdicts");
  list.prepend(make("li", {},
    make("b", { className: "verdict " + kind }, kind), title,
    make("ol", {}, ...steps.map((step) => make("li", {}, visible(step))))));
  while (list.children.length > 5) {
    list.lastChild.remove();
  }
}

function drawId() {
  const random = Math.random().toString(36).slice(2, 8);
  byId("event").elements.event_id.value = Date.now().toString(36) + random;
}

function changePayload() {
  const { payload } = byId("event").elements;
  payload.value = payload.value.includes("open") ? '{"door": "shut"}' : '{"door": "open"}';
}
"""

# Start: the one place that ties functions to the page.
_SCRIPT_START = r"""
function listen(id, kind, act) {
  byId(id).addEventListener(kind, act);
}

function toggleHold() {
  byId("hold").setAttribute("aria-pressed", String(!isHeldByButton()));
}

// Links within the page scroll, and leave the filter in the address alone.
function jump(event) {
  const link = event.target.closest("a[data-jump]");
  if (link) {
    event.preventDefault();
    if (link.dataset.jump === "conflicts") {
      byId("only-conflicts").checked = true;
      showOnlyConflicts();
    }
    const section = document.querySelector(link.getAttribute("href"));
    section.scrollIntoView();
    section.focus({ preventScroll: true });
  }
}

function changeVisibility() {
  if (document.hidden) {
    search.wire.abort();
  } else {
    answeredAt = performance.now();
    refreshNumbers();
  }
}

async function watch() {
  for (;;) {
    await refreshNumbers();
    const start = performance.now();
    // In short steps: a tab that is seen again, or unlocked, does not wait for the long one.
    do {
      await sleep(POLL_MS);
    } while ((document.hidden || locked) && performance.now() - start < POLL_SELDOM_MS);
  }
}

function start() {
  document.documentElement.className = "js";
  listen("key", "submit", unlock);
  listen("filter", "submit", submitFilter);
  listen("download", "click", download);
  listen("hold", "click", toggleHold);
  listen("older", "click", showOlder);
  listen("only-conflicts", "change", showOnlyConflicts);
  listen("event", "submit", publish);
  listen("fresh", "click", drawId);
  listen("change", "click", changePayload);
  document.addEventListener("click", jump);
  document.addEventListener("pointermove", notePointer);
  document.addEventListener("visibilitychange", changeVisibility);
  addEventListener("hashchange", startSearch);
  token = recallToken();
  drawId();
  startSearch();
  watch();
  setInterval(showState, LOOK_MS);
  setInterval(drawArrivals, LOOK_MS);
}

start();
"""
PAGE_SCRIPT = "".join(
    (
        _SCRIPT_SETTINGS,
        _SCRIPT_TOOLS,
        _SCRIPT_JSON,
        _SCRIPT_ASKING,
        _SCRIPT_STATE,
        _SCRIPT_FILTER,
        _SCRIPT_EVENTS,
        _SCRIPT_COUNTS,
        _SCRIPT_REPEATS,
        _SCRIPT_PUBLISH,
        _SCRIPT_START,
    )
)

# A tag that wants a number, and what to divide it by.
_NUMBER_TAG = re.compile(r'data-n="([a-z_.]+)"(?: data-per="([0-9]+)")?>')

# Characters that cannot be seen, or that turn the direction of others. Names that are
# not the same must not look the same. The script has the same list.
_UNSEEN = re.compile(
    r"[\0-\x1f\x7f-\x9f\xad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff"
    r"\U000e0000-\U000e007f]"
)

_SCRIPT_MISSING = (
    "Without JavaScript this page shows the numbers of the moment when it was loaded. "
    "To search, follow and publish, use curl: the reference has an example for each route."
)
_SCRIPT_MISSING_LOCKED = (
    "This service wants a token, and without JavaScript this page cannot send one. "
    "Use curl: the reference has an example for each route."
)


def _as_text(name: str) -> str:
    """What a publisher sent, as HTML that shows it and does nothing else.

    >>> _as_text('<b>"\u202e')
    '&lt;b>&quot;⟨U+202E⟩'
    """
    name = _UNSEEN.sub(lambda found: f"⟨U+{ord(found[0]):04X}⟩", name)
    name = name.replace("&", "&amp;")
    name = name.replace("<", "&lt;")
    return name.replace('"', "&quot;")


def _number_at(stats: Dict[str, Any], path: str) -> Any:
    """The number that a path such as `limits.max_body` names; None if there is none."""
    value: Any = stats
    for name in path.split("."):
        if not isinstance(value, dict):
            return None
        value = value.get(name)
    return value


def _fill_numbers(html: str, stats: Dict[str, Any]) -> str:
    """Put every number behind the tag that names it, or a dash.

    >>> _fill_numbers('<b data-n="stored"></b>', {"stored": 12345})
    '<b data-n="stored">12,345</b>'
    """

    def _tag_with_number(match: "re.Match[str]") -> str:
        tag, path, divisor = match.group(0, 1, 2)
        number = _number_at(stats, path)
        if not isinstance(number, (int, float)):
            # It is not known, or it is a name, which the script puts in.
            return tag + "–"
        if divisor is None:
            return f"{tag}{number:,}"
        quotient = number / int(divisor)
        return f"{tag}{quotient:.1f}"

    return _NUMBER_TAG.sub(_tag_with_number, html)


def _name_rows(names: Dict[str, Dict[str, int]]) -> str:
    """Rows of the table of topics, or of sources."""
    rows: List[str] = []
    for name, numbers in names.items():
        if len(rows) == NAMES_SHOWN:
            break
        unique = numbers["unique"]
        duplicates = numbers["duplicates"]
        rows.append(f"<tr><th>{_as_text(name)}<td>{unique:,}<td>{duplicates:,}")
    return "\n".join(rows)


def _delay_label(bound: str) -> str:
    """What a bar of the histogram holds.

    >>> _delay_label("7200"), _delay_label("inf")
    ('to 2 h', 'later')
    """
    if bound == "inf":
        return "later"
    seconds = int(bound)
    if seconds >= 86_400:
        return f"to {seconds // 86_400} d"
    if seconds >= 3600:
        return f"to {seconds // 3600} h"
    if seconds >= 60:
        return f"to {seconds // 60} min"
    return f"to {seconds} s"


def _delay_rows(stats: Dict[str, Any]) -> str:
    """The histogram of delays, up to its last bar.

    A line crosses it where a well-known dedup window ends.
    """
    delays: Dict[str, int] = stats["duplicate_delay_seconds"]
    bounds = sorted(delays, key=float)
    while bounds and not delays[bounds[-1]]:
        bounds.pop()
    most = max(delays.values())
    rows: List[str] = []
    for bound in bounds:
        count = delays[bound]
        gauge = f'<progress value="{count}" max="{most}" aria-hidden="true"></progress>'
        rows.append(f'<tr><th>{_delay_label(bound)}<td class="wide">{gauge}<td>{count:,}')
        for window in stats["windows"]:
            if str(window["window_seconds"]) == bound:
                rows.append(_window_row(window))
    return "\n".join(rows)


def _window_row(window: Dict[str, Any]) -> str:
    twice = window["would_have_stored_twice"]
    words = f"{window['like']}: forgets here, and {twice:,} would be stored twice"
    return f'<tr class="edge soft"><td colspan="3">{words}'


def render_page(stats: Optional[Dict[str, Any]], locked: bool = False) -> str:
    """The page, with the numbers of GET /stats in it.

    `stats` is None if they need a token (`locked`), or cannot be read. Then the page
    comes without them, and the script asks.
    """
    agreed = {
        "names": NAMES_SHOWN,
        "rows": ROWS_SHOWN,
        "silence_ms": round(1000 * SILENT_KEEP_ALIVES * FOLLOW_KEEP_ALIVE_S),
    }
    parts = dict.fromkeys(("state", "topics", "sources", "delays"), "")
    parts["limits"] = _as_text(json.dumps(agreed))
    parts["noscript"] = _SCRIPT_MISSING
    if locked:
        parts["state"] = "Waiting for a token"
        parts["noscript"] = _SCRIPT_MISSING_LOCKED
    elif stats is None:
        parts["state"] = "The store cannot be read"
    else:
        parts["state"] = "The numbers of this moment"
        parts["topics"] = _name_rows(stats["topics"])
        parts["sources"] = _name_rows(stats["sources"])
        parts["delays"] = _delay_rows(stats)
    # First the numbers, then the names: what a publisher sent is not a template.
    template = _fill_numbers(_PAGE_BODY, stats or {})
    body = template.format(**parts)
    return html_document("aggregator", PAGE_STYLE, f"{body}<script>{PAGE_SCRIPT}</script>")


def _takes_gzip(request: Request) -> bool:
    """Whether the client takes gzip without reservation: `gzip;q=0.5` is one."""
    codings = request.head.headers.get("accept-encoding", "")
    for coding in codings.split(","):
        if coding.strip(" \t").lower() == "gzip":
            return True
    return False


def _in_gzip(response: Response) -> Response:
    """The same response, a third as long on the wire (RFC 9110 §8.4.1.3)."""
    assert isinstance(response.body, bytes)
    # 31: the largest window, in gzip's own header and checksum.
    compressor = zlib.compressobj(wbits=31)
    body = compressor.compress(response.body)
    body += compressor.flush()
    headers = (("Content-Encoding", "gzip"), ("Vary", "Accept-Encoding"))
    return response._replace(body=body, headers=response.headers + headers)


_INDEX_EXAMPLE = """{
  "service": "aggregator",
  "version": "1.0.0",
  "routes": [{"method": "GET", "path": "/", "summary": "What this is and where to go"}]
}"""


@route(
    "GET",
    "/",
    answers=(
        Answer(200, "the routes", _INDEX_EXAMPLE),
        Answer(200, "a page, for browsers", "…", HTML_TYPE),
    ),
)
async def index(api: API, request: Request, peer: str) -> Response:
    """What this is and where to go."""
    if not accepts(request, "text/html"):
        routes = routes_listed()
        return json_response(
            200, {"service": "aggregator", "version": __version__, "routes": routes}
        )
    locked = bool(api.access.tokens)
    stats = None
    if not locked:
        # If the store cannot be read, the page comes anyway, says so, and asks again.
        with contextlib.suppress(StoreFailed):
            stats = await api.numbers(NAMES_SHOWN, NAMES_SHOWN)
    document = render_page(stats, locked)
    response = html_response(document, content_policy(PAGE_STYLE, PAGE_SCRIPT))
    if _takes_gzip(request):
        response = _in_gzip(response)
    return response


# ============================================================================
# §12  Publish, follow, relay: the other half of at-least-once delivery
#
# The service stores an identity once; so whoever publishes may send again, and has to.
# This section is such a publisher. One thread reads ahead (lines of a log, or the live
# tail of another service) and makes batches; the caller's thread delivers one batch at
# a time and repeats it until it is answered. Behind each answer the place moves: a
# small file that says where the next start goes on.
#
# A. the service seen from outside   B. the place and the report   C. carrying
# D. a line: its pieces, its time, its id   E. a log: one name, many files
# F. publish   G. relay
#
# Knows §1, of §3 only `sync_folder`, and of the service only what it says over HTTP.
# Serving must not pay for this section: what it needs beyond §1 is imported where it is
# used.
#
#   * The place never stands behind an event that was neither acknowledged nor set
#     aside.
#   * One request is under way at a time, so order is kept.
#   * Memory is bounded by READ_AHEAD_BYTES and the longest line.
#   * The id of a line depends on the line and on where it stands in its file, not on
#     what was read before: sending a file again makes duplicates, not events.
#   * Nothing that passes ends a follower.
#
# Simpler than a production shipper: one log for each process, no inotify (five looks a
# second), `.gz` is the only compression. A log whose lines carry no time at all can be
# told apart from a copy of itself only by its inode; in a copy such lines are new lines
# once the place is lost.
# ============================================================================

# Bytes of one event as JSON, and of a line that holds one: a service's default limit.
MAX_EVENT_BYTES = 4 * 1024 * 1024
# Bytes of a line of text; the rest of a longer one becomes another event.
MAX_LINE_BYTES = 256 * 1024
# Bytes of one read from a file, a pipe or an answer.
FILE_READ_BYTES = 64 * 1024
# Bytes of events that wait while a request is under way.
READ_AHEAD_BYTES = 1024 * 1024
# Events of one request: what one commit takes, and for a relay some less, as its events
# may be large.
PUBLISH_EVENTS = 2000
RELAY_EVENTS = 500
# Bytes of a body that goes to this machine as it is.
PLAIN_BODY_BYTES = 1_000_000
# Seconds. The first pause between attempts is random below the first; the bound doubles
# with each attempt up to the second ("full jitter": clients do not come back together).
BACKOFF_S = 0.1
BACKOFF_MAX_S = 10.0
# Seconds to wait for a byte of an answer, and of a live tail, which speaks every 15 s.
ANSWER_TIMEOUT_S = 30.0
TAIL_TIMEOUT_S = 45.0
# Seconds that the last attempt before the end of --timeout has.
MIN_TIMEOUT_S = 0.05
# Seconds between two looks at a followed log.
FILE_POLL_S = 0.2
# Seconds without a new line after which a rotated file gives way to the next: its
# writer goes on with it until it is told of the rotation.
ROTATED_QUIET_S = 1.0
# Seconds that a file which was removed is kept open for late lines, after it was read
# to its end. So long a run that is not following leaves a rotated file its unfinished
# line.
ROTATED_KEPT_S = 60.0
# Seconds for which a rotated file that is still written to may hold up the next one.
# Then both are read.
ROTATED_HELD_S = 60.0
# Files of one log that are open at a time. Those beyond are opened when it is their
# turn.
OPEN_FILES = 64
# How often a folder is looked at in a row, until nothing was renamed meanwhile.
LOOKS_MAX = 10
# Seconds since its last change in which gzip may still be at work on a file. When it is
# done it gives the .gz the time of the original.
GZIP_FRESH_S = 60.0
# Seconds since its last change in which a file may be a copy whose original is about to
# be truncated, or a .gz whose original is about to be removed.
COPY_FRESH_S = 1.0
# Seconds to wait before a file whose time changed, but not its size, is called another
# one: a write sets the time first.
REWRITTEN_S = 0.5
# It waits once more as long for each so many bytes that would be read again, and so
# many times at most.
REWRITTEN_BYTES = 1024 * 1024
REWRITTEN_WAITS = 60
# Files whose marks are kept although they are gone: a later one may begin with the same
# line, and its ids must be others.
GONE_FILES_KEPT = 64
# Digits of a fraction that tell microseconds.
MICROSECOND_DIGITS = 6
# Bytes at the start of a file, and before the place, by which a copy is recognised.
HEAD_BYTES = 256
LAST_BYTES = 1024
# Some file systems show NULs for a moment before the data (NFS; preallocated files).
# Seconds to wait for the data, and how many NULs make a hole.
HOLE_WAIT_S = 5.0
HOLE = b"\0" * 8
# Seconds between two signs of progress, on a terminal and elsewhere.
TICK_S = 0.2
PROGRESS_S = 10.0
# Seconds after which a follower writes its place again although it is the same: who
# watches the file sees that the follower lives, and how far behind it is.
STATUS_S = 20.0

GZIP_MAGIC = b"\x1f\x8b"
UTF8_BOM = b"\xef\xbb\xbf"
UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")
# Bytes in which UTF-16 shows without a byte order mark.
UTF16_BYTES = 64


class ClientLimits(NamedTuple):
    """The limits that tests vary; the constants above say what they mean."""

    backoff_s: float = BACKOFF_S
    backoff_max_s: float = BACKOFF_MAX_S
    line_bytes: int = MAX_LINE_BYTES
    read_bytes: int = FILE_READ_BYTES
    poll_s: float = FILE_POLL_S
    quiet_s: float = ROTATED_QUIET_S
    kept_s: float = ROTATED_KEPT_S
    held_s: float = ROTATED_HELD_S
    copy_s: float = COPY_FRESH_S
    rewritten_s: float = REWRITTEN_S
    hole_s: float = HOLE_WAIT_S
    open_files: int = OPEN_FILES


# ---- A. The service seen from outside ----
#
# Whoever publishes meets three kinds of no. Some pass: a broken connection, a full
# queue, a disk that is full just now. The same request is sent again, after a pause
# that is random and grows. Some are the fault of single events: the request is split
# until the faulty ones stand alone. All others end the command, or, where a log is
# followed, are waited out as well: a token can be replaced, a proxy repaired.


class ClientError(Exception):
    """What keeps a command from going on; the message says why."""


class Reply(ClientError):
    """An answer with a JSON object, {} if the body is none.

    Raised where neither time nor another event will change it.
    """

    def __init__(self, address: Any, response: Any) -> None:
        self.status: int = response.status
        self.value: Dict[str, Any] = {}
        # Events with a fault: their index, and what is wrong. A stranger's differ.
        self.faults: List[Tuple[Any, str]] = []
        body = response.read()
        with contextlib.suppress(KeyError, RecursionError, TypeError, ValueError):
            self.value = dict(json.loads(body))
            for error in self.value.get("errors", ()):
                self.faults.append((error["index"], f"{error['field']} {error['message']}"))
        details = [str(self.value.get("detail") or response.reason)]
        for _, fault in self.faults[:9]:
            details.append(fault)
        super().__init__(f"{address.geturl()}: {self.status} {'; '.join(details)}")

    def is_problem(self, slug: str) -> bool:
        """Whether the answer is this problem of ours (RFC 9457), and no proxy's."""
        return str(self.value.get("type")).endswith("#" + slug)


class _Passing(Exception):
    """A failure that time may heal, and for how long at least to wait."""

    def __init__(self, trouble: str, least_s: float = 0.0) -> None:
        super().__init__(trouble)
        self.least_s = least_s


def parse_address(text: str) -> Any:
    """A URL to its parts (urllib.parse.SplitResult). Raises ValueError.

    Without a scheme it is http, as for curl.

    >>> parse_address("nas:8000").hostname
    'nas'
    """
    from urllib.parse import urlsplit

    with contextlib.suppress(ValueError):
        parts = urlsplit(text if "://" in text else "http://" + text)
        # Printable ASCII without a query, a fragment or a user.
        plain = re.fullmatch('[!"$->A-~]+', text) is not None
        host = (parts.hostname or "").encode("idna")
        if plain and host and parts.scheme in ("http", "https") and parts.port != 0:
            return parts
    raise ValueError("must be an address such as http://127.0.0.1:8000 or https://example.org/logs")


def is_loopback(host: str) -> bool:
    """Whether a host is this machine by its name or address (RFC 6761 §6.3, RFC 1122).

    >>> [is_loopback(host) for host in ("localhost", "127.0.0.1", "::1", "127.nas")]
    [True, True, True, False]
    """
    if host in ("localhost", "::1"):
        return True
    return re.fullmatch(r"127(?:\.[0-9]{1,3}){3}", host) is not None


def token_in_file(path: str) -> str:
    """The first bearer token in a file. Raises OSError and ValueError."""
    with open(path, encoding="ascii") as file:
        tokens = file.read().split()
    if not tokens:
        raise ValueError("holds no token")
    return tokens[0]


class _Backoff:
    """Pauses between attempts: random below a bound that doubles (full jitter)."""

    def __init__(self, limits: ClientLimits) -> None:
        self._limits = limits
        self._attempts = 0

    def pause(self, least_s: float = 0.0, most_s: float = float("inf")) -> None:
        """Sleep, for `least_s` seconds at least, and `most_s` at most."""
        import random

        bound_s = self._limits.backoff_s * 2 ** min(self._attempts, 20)
        bound_s = min(bound_s, self._limits.backoff_max_s)
        self._attempts += 1
        time.sleep(min(most_s, max(least_s, random.uniform(0, bound_s))))


def _ignore_trouble(trouble: str) -> None:
    """The default of `waits`: nobody is told."""


class Remote:
    """A service seen over one connection, made anew whenever it breaks.

    For one thread at a time. `waits` is told what it waits for, and "" once that is
    over. After `patience_s` seconds without success a ClientError is raised; no pause
    and no silence of the service outlasts them. A token in a file is read for each
    request, so it can be replaced while a follower runs.
    """

    def __init__(
        self,
        address: Any,
        token: str = "",
        waits: Callable[[str], None] = _ignore_trouble,
        patience_s: float = float("inf"),
        timeout_s: float = ANSWER_TIMEOUT_S,
        limits: ClientLimits = ClientLimits(),
        token_file: str = "",
    ) -> None:
        import http.client

        kind: Any = http.client.HTTPConnection
        if address.scheme == "https":
            kind = http.client.HTTPSConnection
        self._connection = kind(address.hostname, address.port, timeout=timeout_s)
        self._timeout_s = timeout_s
        self._address = address
        # Whether the service, or a proxy before it, runs on this machine.
        self.is_here = is_loopback(address.hostname)
        self._fields: Dict[str, str] = {}
        if token:
            self._fields["Authorization"] = "Bearer " + token
        self._token_file = token_file
        self._patience_s = patience_s
        self.limits = limits
        self.waits = waits

    def ask(
        self,
        method: str,
        target: str,
        body: Optional[bytes] = None,
        fields: Sequence[Tuple[str, str]] = (),
        stream: bool = False,
    ) -> Any:
        """The Reply; of a `stream` that begins with 200, the response to read from.

        A broken connection, 408, 429 and 5xx are tried again, but for 501 and 505,
        which no repetition changes. Raises ClientError.
        """
        end_s = time.monotonic() + self._patience_s
        backoff = _Backoff(self.limits)
        all_fields = dict(self._fields)
        all_fields.update(fields)
        while True:
            self._bound_silence(end_s - time.monotonic())
            try:
                response = self._attempt(method, target, body, all_fields, stream)
                break
            except _Passing as passing:
                left_s = end_s - time.monotonic()
                # Where the service names a time behind the end, waiting is in vain.
                if left_s <= passing.least_s:
                    raise ClientError(str(passing))
                self.waits(str(passing))
                backoff.pause(passing.least_s, left_s)
        # A live tail may be silent for longer.
        self._bound_silence(self._timeout_s)
        return response

    def _bound_silence(self, seconds: float) -> None:
        """Wait for the next bytes for so long at most, and never longer than usual."""
        seconds = max(MIN_TIMEOUT_S, min(seconds, self._timeout_s))
        self._connection.timeout = seconds
        if self._connection.sock is not None:
            self._connection.sock.settimeout(seconds)

    def _attempt(
        self, method: str, target: str, body: Optional[bytes], fields: Dict[str, str], stream: bool
    ) -> Any:
        """One question and its answer. Raises _Passing for what may be asked again."""
        import http.client
        import socket

        if self._token_file:
            try:
                fields["Authorization"] = "Bearer " + token_in_file(self._token_file)
            except (OSError, ValueError) as error:
                raise _Passing(f"{self._token_file}: {getattr(error, 'strerror', None) or error}")
        while True:
            was_open = self._connection.sock is not None
            try:
                path = self._address.path.rstrip("/") + target
                self._connection.request(method, path, body, fields)
                response = self._connection.getresponse()
                if stream and response.status == 200:
                    return response
                answer = Reply(self._address, response)
                break
            except (OSError, http.client.HTTPException) as error:
                self._connection.close()
                # The other side may have closed a connection while it was idle. That
                # proves nothing: ask again at once.
                if not was_open or isinstance(error, socket.timeout):
                    reason = getattr(error, "strerror", None) or str(error) or repr(error)
                    raise _Passing(f"{self._address.geturl()}: {reason}")
        if is_passing(answer.status):
            raise _Passing(str(answer), _retry_after_s(response))
        return answer

    def lines(self, target: str) -> Iterator[List[bytes]]:
        """The lines of an answer in NDJSON, those that arrive together in one list.

        An empty list means: the service is alive and has nothing to say. Raises Reply,
        and OSError where the answer breaks off.
        """
        import http.client

        accept = [("Accept", "application/x-ndjson")]
        response = self.ask("GET", target, fields=accept, stream=True)
        if isinstance(response, Reply):
            raise response
        self.waits("")
        rest = b""
        try:
            while True:
                data = response.read1(self.limits.read_bytes)
                if not data:
                    return
                *whole, rest = (rest + data).split(b"\n")
                if whole:
                    yield [line for line in whole if line]
                if len(rest) > 16 * MAX_EVENT_BYTES:
                    raise ClientError(f"{self._address.geturl()}: sends a line that does not end")
        except http.client.HTTPException as error:
            raise OSError(f"{self._address.geturl()}: {error!r}")
        finally:
            self._connection.close()


def is_passing(status: int) -> bool:
    """Whether the same request may be answered otherwise later (RFC 9110 §15).

    The request came too slowly, too many came, or the service has a trouble of its own.
    Not so 501 and 505: it will not learn a method or a version.

    >>> is_passing(503), is_passing(422)
    (True, False)
    """
    if status in (408, 429):
        return True
    return status >= 500 and status not in (501, 505)


def _retry_after_s(response: Any) -> float:
    """The seconds of `Retry-After` (RFC 9110 §10.2.3); 0 without, or with a date."""
    text = response.getheader("Retry-After") or ""
    if re.fullmatch("[0-9]{1,4}", text) is None:
        return 0.0
    return float(text)


class Outcome(NamedTuple):
    """What became of events: counts, and those refused, by index, with the reason.

    A conflict is an event whose identity another one had before, with another content.
    It was not stored, and sending it again will not help.
    """

    new: int
    duplicate: int
    conflict: int
    refused: Dict[int, str]


def deliver(remote: Remote, events: Sequence[bytes]) -> Outcome:
    """Publish all of `events`, which are JSON. Raises ClientError.

    A request is taken whole or not at all. So one that is refused is split: those with
    a fault go by themselves, or, where none is named, one half and then the other.
    """
    new = duplicate = conflict = 0
    refused: Dict[int, str] = {}
    parts: List[List[int]] = []
    for start in range(0, len(events), PUBLISH_EVENTS):
        parts.insert(0, list(range(start, min(start + PUBLISH_EVENTS, len(events)))))
    while parts:
        part = parts.pop()
        answer = _post_events(remote, [events[index] for index in part])
        value = answer.value
        if answer.status == 202 and "unique" in value:
            new += value["unique"]
            duplicate += value.get("duplicates", 0)
            conflict += value.get("conflicts", 0)
        elif not _is_fault_of_events(answer):
            raise answer
        elif len(part) == 1:
            refused[part[0]] = str(answer)
        else:
            parts.extend(_split_refused(part, answer))
        remote.waits("")
    return Outcome(new, duplicate, conflict, refused)


def _post_events(remote: Remote, events: Sequence[bytes]) -> Reply:
    """Send events as one request, as NDJSON; in gzip, if they leave this machine.

    Large ones always are: a proxy on this machine may refuse a body of more than 1 MB,
    which is nginx's limit unless it is told another.
    """
    body = b"\n".join(events)
    fields = [("Content-Type", "application/x-ndjson")]
    if not remote.is_here or len(body) > PLAIN_BODY_BYTES:
        squeeze = zlib.compressobj(1, zlib.DEFLATED, 31)
        body = squeeze.compress(body) + squeeze.flush()
        fields.append(("Content-Encoding", "gzip"))
    answer: Reply = remote.ask("POST", "/publish", body, fields)
    return answer


def _is_fault_of_events(answer: Reply) -> bool:
    """Whether other events might be taken where these were refused."""
    return answer.status in (413, 422) or answer.is_problem("not-json")


def _split_refused(part: List[int], answer: Reply) -> List[List[int]]:
    """The parts of a refused request, the first to send last."""
    faulty = {index for index, _ in answer.faults if isinstance(index, int)}
    alone: List[List[int]] = []
    others: List[int] = []
    for position, index in enumerate(part):
        if position in faulty:
            alone.append([index])
        else:
            others.append(index)
    if not alone:
        half = len(part) // 2
        return [part[half:], part[:half]]
    if others:
        alone.append(others)
    return alone


# ---- B. The place and the report ----
#
# The place is the client's half of "exactly once in effect". It is saved after the
# answer. A crash between the two sends the last batch once more, with the same ids, and
# the service drops it. Saved before the answer, a crash would lose that batch. So the
# place may stand too far back, never too far ahead; and losing it costs time, no event.
#
#     crash here                        what the next start does     result
#     before the request is sent        sends the batch              stored once
#     stored, the answer under way      sends the batch again        duplicates, dropped
#     answered, the place not saved     sends the batch again        duplicates, dropped
#     the place saved                   goes on behind the batch     stored once
#     the place lost                    sends all that is there      duplicates, dropped
#
# The same file tells whoever watches how far behind the client is, and what it waits
# for: `aggregator.py health --state FILE` reads it.


class Batch(NamedTuple):
    """Events that were read together, and the place behind them."""

    events: List[bytes]  # as JSON
    # For messages: the number of the line, or the seq.
    numbers: List[int]
    place: Any = None  # a value for JSON; None moves nothing


def _tell(text: str, moves: bool = False) -> None:
    """A line to stderr; on a terminal it takes the place of one that `moves`."""
    clear = ""
    if sys.stderr.isatty():
        clear = "\r\x1b[K"
    end = "\n"
    if moves:
        end = ""
    sys.stderr.write(clear + "aggregator.py: " + text + end)
    sys.stderr.flush()


def _reason(error: BaseException) -> str:
    """An error in plain words, with the file that it concerns."""
    text = str(getattr(error, "strerror", None) or error)
    name = getattr(error, "filename", None)
    if name is None:
        return text
    return f"{os.fsdecode(name)}: {text}"


def _write_synced(path: str, data: bytes, mode: str) -> None:
    """Write to a file, and to the disk."""
    with open(path, mode) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


class PlaceFile:
    """The file of --state: one JSON object, written whole each time.

        {"of": "/var/log/app.log", "at": "2026-11-27T21:50:46.000000Z", "follows": true,
         "lag": 0, "unit": "bytes", "error": "", "place": {…}}

    `of` names what the place belongs to, so that a place is not taken for another's.
    `at` is when it was written, `lag` what was there then and not acknowledged, `error`
    what was waited for. A place of version 1.0.0 has only `of` and `place`, a list.
    """

    def __init__(self, path: str, of: str, follows: bool = False) -> None:
        self.path = path
        self.follows = follows
        self._of = of

    def load(self) -> Any:
        """The place saved last, None if there is none. Raises ClientError, OSError."""
        try:
            with open(self.path, encoding="utf-8", errors="replace") as file:
                text = file.read()
        except FileNotFoundError:
            return None
        if not text:  # made in advance, for a mount
            return None
        with contextlib.suppress(ValueError, KeyError, TypeError):
            saved = json.loads(text)
            if saved["of"] == self._of:
                return saved["place"]
        if text.startswith(json.dumps({"of": self._of})[:-1]):
            _tell(f"{self.path} was not written to its end: starting anew; repeats are harmless")
            return None
        advice = "choose another --state, or remove it to start anew"
        raise ClientError(f"{self.path} holds no place of {self._of}: {advice}")

    def save(self, place: Any, lag: int, unit: str, error: str) -> None:
        """Save a place and how things are, onto the disk. Raises OSError."""
        now = format_timestamp(time.time_ns() // 1000)
        value = {"of": self._of, "at": now, "follows": self.follows}
        value.update(lag=lag, unit=unit, error=error, place=place)
        data = json.dumps(value).encode("ascii") + b"\n"
        try:
            _write_synced(self.path + ".new", data, "wb")
            os.replace(self.path + ".new", self.path)
        except OSError as failure:
            # A place that is mounted as a single file cannot be replaced, and the
            # folder of one may not be ours. Then it is written where it is.
            in_place = (errno.EBUSY, errno.EACCES, errno.EPERM, errno.EROFS)
            if failure.errno not in in_place or not os.path.exists(self.path):
                raise
            _write_synced(self.path, data.ljust(os.path.getsize(self.path)), "r+b")
            return
        # Without this a power cut may undo the renaming.
        sync_folder(os.path.dirname(os.path.abspath(self.path)))

    def set_aside(self, event: bytes) -> None:
        """Keep a refused event in STATE.refused. Raises OSError."""
        _write_synced(self.path + ".refused", event + b"\n", "ab")


class Report:
    """Counts what is settled, shows how it goes, and moves the place.

    On a terminal progress is a line that moves; elsewhere it is a line every PROGRESS_S
    seconds, and one whenever a trouble comes or goes. A trouble that stays is told
    once.

    `what` is what numbers in messages count: lines, or seqs. `unit` is that of the lag.
    The threads that read and look report here as well as the one that delivers; the
    lock guards all fields. Whoever holds it may take the lock of a Log, never the other
    way round.
    """

    def __init__(self, what: str, file: Optional[PlaceFile] = None, unit: str = "") -> None:
        import threading

        self._lock = threading.RLock()
        self.counts: Counter[str] = Counter()
        self.place: Any = None
        # How far the place is behind what is there: set by publish and relay.
        self.lag: Callable[[], int] = lambda: 0
        self._what = what
        self._file = file
        self._unit = unit
        self._began_s = time.monotonic()
        self._shown_s = 0.0
        self._saved_s = float("-inf")
        self._saved_error = ""
        self._failure = ""
        self._unsaved = False
        # What is waited for, by kind: "service", "file", "read", "place", "from", "to".
        self._troubles: Dict[str, str] = {}

    def load(self) -> Any:
        """The place to go on from, None without one. Raises ClientError, OSError."""
        if self._file is not None:
            self.place = self._file.load()
        return self.place

    def settle(self, batch: Batch, outcome: Outcome) -> None:
        """Count what was delivered, set aside what was refused, then move the place.

        Raises OSError where something cannot be set aside: then the place stays.
        """
        for index, reason in sorted(outcome.refused.items()):
            self._set_aside(batch.events[index])
            _tell(f"{self._what} {batch.numbers[index]} refused: {reason}")
        with self._lock:
            self.counts["sent"] += len(batch.events)
            self.counts["new"] += outcome.new
            self.counts["duplicate"] += outcome.duplicate
            self.counts["conflict"] += outcome.conflict
            self.counts["refused"] += len(outcome.refused)
            if batch.place is not None:
                self.place = batch.place
                self._save()
            self.show()

    def _set_aside(self, event: bytes) -> None:
        """Keep a refused event: beside the place, or else on stdout. Raises OSError."""
        if self._file is not None:
            self._file.set_aside(event)
        else:
            sys.stdout.buffer.write(event + b"\n")
            sys.stdout.buffer.flush()

    def _save(self) -> None:
        """Save the place. A failure is told, and the next call tries again.

        Going on without is harmless: a restart sends again what is behind the old
        place.
        """
        if self._file is None:
            return
        self._saved_s = time.monotonic()
        self._saved_error = error = self._error()
        try:
            self._file.save(self.place, self.lag(), self._unit, error)
        except OSError as failure:
            self._unsaved = True
            self.waits(f"cannot save the place: {_reason(failure)}", "place")
            return
        self._unsaved = False
        self.waits("", "place")

    def _error(self) -> str:
        """What is wrong; but a place that cannot be saved cannot say so."""
        if self._failure:
            return self._failure
        troubles: List[str] = []
        for kind in sorted(self._troubles):
            if kind != "place" and self._troubles[kind]:
                troubles.append(self._troubles[kind])
        return "; ".join(troubles)

    def waits(self, trouble: str, kind: str = "service") -> None:
        """Show what is waited for; "" when it is over. `kind` tells troubles apart."""
        with self._lock:
            changed = trouble != self._troubles.get(kind, "")
            self._troubles[kind] = trouble
            if kind != "place":
                self.tick()
            self.show(changed)

    def tick(self) -> None:
        """To be called often: saves the place again where that is due.

        That is at once, but once a second at most, where the trouble is another one.
        """
        with self._lock:
            since_s = time.monotonic() - self._saved_s
            follows = self._file is not None and self._file.follows
            is_due = self._unsaved or (follows and self._error() != self._saved_error)
            if (follows and since_s >= STATUS_S) or (is_due and since_s >= 1):
                self._save()

    def show(self, now: bool = False, end: bool = False) -> None:
        """Show how it goes, if it is time to."""
        elapsed_s = time.monotonic() - self._began_s
        moves = sys.stderr.isatty()
        period_s = PROGRESS_S
        if moves:
            period_s = TICK_S
        if not now and not end and elapsed_s - self._shown_s < period_s:
            return
        self._shown_s = elapsed_s
        parts: List[str] = []
        for name in ("sent", "new", "duplicate", "conflict", "refused"):
            parts.append(f"{self.counts[name]:,} {name}")
        rate = self.counts["sent"] / max(elapsed_s, 0.001)
        text = f"{', '.join(parts)}; {rate:,.0f}/s"
        troubles = [trouble for trouble in self._troubles.values() if trouble]
        if troubles:
            text += "; waiting: " + "; ".join(troubles)
        _tell(text, moves and not end)

    def fail(self, reason: str) -> None:
        """Leave in the place why the run ends, if there is one."""
        if self.place is not None:
            self._failure = reason
            self._save()

    def status(self) -> int:
        """The exit status: 1 if an event was not taken, or the place not saved."""
        if self.place is not None:
            self._save()
        if self.counts["refused"] or self.counts["conflict"] or self._unsaved:
            return 1
        return 0


# ---- C. Carrying: a thread reads ahead, the caller's delivers ----
#
#     a log, a pipe, a live tail ──▶ batches, some ahead ──▶ requests ──▶ the place
#              the reading thread                        the caller's thread
#
# While one request is under way the next batches gather. So a fast log goes in large
# requests and a slow one in small ones, without a timer that holds a line back.


class _ReadAhead:
    """Runs `source` in a thread of its own, some batches ahead of who takes them.

    The condition guards all fields. The thread waits for room and the taker for
    batches; each wakes the other.
    """

    def __init__(self, source: Iterator[Batch]) -> None:
        import threading

        self._changed = threading.Condition()
        self._ready: deque[Batch] = deque()
        self._bytes = 0
        self._ended = False
        self._error: Optional[Exception] = None
        threading.Thread(target=self._read, args=(source,), daemon=True).start()

    def _read(self, source: Iterator[Batch]) -> None:
        """The thread: what goes wrong is raised where the batches are taken."""
        error: Optional[Exception] = None
        try:
            for batch in source:
                self._put(batch)
        except Exception as caught:
            error = caught
        with self._changed:
            self._ended = True
            self._error = error
            self._changed.notify_all()

    def _put(self, batch: Batch) -> None:
        """The thread: hand over a batch, and wait until there is room for the next."""
        with self._changed:
            self._ready.append(batch)
            self._bytes += _size_of(batch)
            self._changed.notify_all()
            while self._bytes > READ_AHEAD_BYTES:
                self._changed.wait()

    def take(self, most: int, timeout_s: float) -> Optional[Batch]:
        """All that is ready, as one batch of about `most` events at most.

        It may be empty: nothing came in time. None: there is no more. Raises what the
        source raised.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._ended, timeout_s)
            if self._ended and not self._ready:
                if self._error is not None:
                    raise self._error
                return None
            taken = Batch([], [])
            while self._ready and len(taken.events) + len(self._ready[0].events) <= most:
                taken = self._join(taken, self._ready.popleft())
            if self._ready and not taken.events:
                taken = self._ready.popleft()
                self._bytes -= _size_of(taken)
            self._changed.notify_all()
            return taken

    def _join(self, taken: Batch, following: Batch) -> Batch:
        """One batch of two; the place is that of the second, if it has one."""
        self._bytes -= _size_of(following)
        taken.events.extend(following.events)
        taken.numbers.extend(following.numbers)
        if following.place is None:
            return taken
        return taken._replace(place=following.place)


def _size_of(batch: Batch) -> int:
    """Bytes of its events, as far as memory is concerned."""
    return sum(map(len, batch.events))


def carry(source: Iterator[Batch], remote: Remote, report: Report, most: int, follows: bool) -> int:
    """Deliver what `source` gives, up to `most` events at a time; the exit status.

    What comes while a request is under way goes together with the next: nothing waits
    for a timer. With `follows` no answer and no full disk ends it.
    """
    ahead = _ReadAhead(source)
    try:
        while True:
            batch = ahead.take(most, TICK_S)
            if batch is None:
                return report.status()
            if batch.events or batch.place is not None:
                _carry_batch(batch, remote, report, follows)
            report.tick()
            report.show()
    except ClientError as error:
        report.fail(str(error))
        raise
    finally:
        report.show(end=True)


def _carry_batch(batch: Batch, remote: Remote, report: Report, follows: bool) -> None:
    """Deliver and settle one batch, however long it takes where `follows`."""
    backoff = _Backoff(remote.limits)
    while True:
        try:
            outcome = Outcome(0, 0, 0, {})
            if batch.events:
                outcome = deliver(remote, batch.events)
            report.settle(batch, outcome)
            return
        except Reply as answer:
            # 401, 403, 404 and their like: a token or a proxy is being changed.
            if not follows:
                raise
            report.waits(str(answer))
        except OSError as error:
            # A refused event could not be set aside. All others are duplicates when the
            # batch is sent again.
            if not follows:
                raise
            report.waits(f"cannot set aside what was refused: {_reason(error)}")
        backoff.pause()


# ---- D. A line: its pieces, its time, its id ----
#
# What makes two lines the same line? The ladder of answers, and how each one fails:
#
#   1. A counter in the client. It starts anew with the client: a line that is sent
#      again after a crash gets another id, and is stored twice.
#   2. The name of the file and the offset. A rotation gives the name to the next file:
#      its lines look like those stored already, and are dropped.
#   3. The inode and the offset. A copy and a .gz have other inodes: their lines are
#      stored twice. And an inode is used again: the lines of the new file are dropped.
#   4. The name of the log, the offset and the line itself. Two files of a log may have
#      the same line at the same offset, also if it begins with a time: a program that
#      repeats itself writes it twice in a second, and the second file loses it.
#   5. The same, and what the line leans on. A line with a time leans on the first line
#      with a time in its file; whatever the file is called by now, that one stays. A
#      line without a time leans on the last line before it that has one. Only the lines
#      before any time lean on the inode and on the first line of their file.
#
# The fifth is used here. Where even it could confuse two files (what they lean on is
# the same), a nonce tells them apart. For a repeat costs a row, a confusion a line.


def cut_lines(data: bytes, longest: int, final: bool) -> List[bytes]:
    r"""The lines at the start of `data`, with their ends; long ones in pieces.

    A piece has `longest` bytes, or up to three less so that no character of UTF-8 is
    cut. What follows the last line end is an unfinished line, and left out unless
    `final`.

    >>> cut_lines(b"one\ntwo\nth", 100, final=False)
    [b'one\n', b'two\n']
    >>> cut_lines("caf\u00e9s\n".encode(), 4, final=True)
    [b'caf', b'\xc3\xa9s\n']
    """
    pieces = io.BytesIO(data).readlines()
    if pieces and max(map(len, pieces)) > longest:
        pieces = _cut_long_lines(pieces, longest)
    if pieces and not final and not pieces[-1].endswith(b"\n"):
        pieces.pop()
    return pieces


def _cut_long_lines(lines: Sequence[bytes], longest: int) -> List[bytes]:
    """The same with lines in pieces of `longest` bytes or a little less."""
    pieces: List[bytes] = []
    for line in lines:
        while len(line) > longest:
            end = longest
            # A byte 10xxxxxx continues a character that began before it (RFC 3629 §3).
            while end > longest - 3 and line[end] & 0xC0 == 0x80:
                end -= 1
            pieces.append(line[:end])
            line = line[end:]
        pieces.append(line)
    return pieces


# A time at the start of a line, also in brackets:
#
#     2026-11-27T21:50:46.123Z            ISO 8601 2026-11-27 21:50:46,123 +0100
#     the same with a blank, a comma, an offset 2026-11-27T21:50:46+01              an
#     offset without minutes, if no blank is before Nov 27 21:50:46
#     syslog (RFC 3164 §4.1.2) [Sun Dec 04 04:47:44.000001 2005]   Apache's error log
#
# Only behind a date with its weekday may there be a year: in `Nov 27 21:50:46 1234
# bytes` the number is none.
_LINE_TIME = re.compile(
    rb"""
    [\[(<"]?
    (?P<when>
        [0-9]{4}-[0-9]{2}-[0-9]{2} [T ] [0-9]{2}:[0-9]{2}:[0-9]{2}
    |   (?P<weekday> (?:Mon|Tue|Wed|Thu|Fri|Sat|Sun) [ ] )?
        (?:Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec) [ ] [ 0-9][0-9]
        [ ] [0-9]{2}:[0-9]{2}:[0-9]{2}
    )
    (?: [.,] (?P<fraction>[0-9]+) )?
    (?P<after>
        [ ]? (?: Z | [+-][0-9]{2}:?[0-9]{2} ) (?!\w)
    |   [+-][0-9]{2} (?![\w:])
    |   (?(weekday) [ ] [0-9]{4} (?!\w) | (?!) )
    )?
    (?![0-9])
    """,
    re.VERBOSE,
)
# A date with a time anywhere in a line, as web servers and loggers in JSON write it.
_ANY_TIME = re.compile(
    rb"(?:[0-9]{4}-[0-9]{2}-[0-9]{2}[T ]|[0-9]{2}/[A-Z][a-z]{2}/[0-9]{4}:)"
    rb"[0-9]{2}:[0-9]{2}:[0-9]{2}"
)
# Years to go back for a date without a year: from one 29th of February to another.
LEAP_YEARS = 8
_MONTHS = "Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec".split()


def time_of_line(line: bytes, arrival_us: int) -> str:
    """The time at the start of a line, as an event's timestamp; "" if there is none.

    ISO 8601 without a zone is local time. A syslog time has no year: it is the last
    such day that is not later than a day after the arrival.

    >>> time_of_line(b"[2026-11-27 21:50:46,5 +0100] started", 0)
    '2026-11-27T20:50:46.500000Z'
    >>> time_of_line(b"27 files", 0)
    ''
    """
    match = _LINE_TIME.match(line)
    if match is None:
        return ""
    return _instant_of(match, arrival_us)


def _instant_of(match: Any, arrival_us: int) -> str:
    """What _LINE_TIME found, as a timestamp; "" if the calendar has no such time."""
    when, after = match.group("when"), match.group("after")
    fraction = match.group("fraction")
    second = _second_of(when, after, arrival_us // 86_400_000_000)
    if not second:
        return ""
    if fraction is None:
        return f"{second}.000000Z"
    digits = (fraction.decode("ascii") + "00000")[:6]
    return f"{second}.{digits}Z"


# Lines come in bursts: most share their second with the line before.
@functools.lru_cache(256)
def _second_of(when: bytes, after: Optional[bytes], arrival_day: int) -> str:
    """A whole second, in UTC and without its zone; "" if there is no such second.

    `after` is what follows the time: a zone or, behind a date by name, a year.
    `arrival_day` counts from 1970.
    """
    text = when.decode("ascii")
    suffix = (after or b"").decode("ascii").strip()
    try:
        if not text[:4].isdigit():
            return _local_second(_year_found(text, suffix, arrival_day))
        if suffix and not suffix.isdigit():
            return format_timestamp(parse_timestamp(text + suffix))[:19]
        return _local_second(datetime.datetime.fromisoformat(text))
    except ValueError:
        return ""


def _year_found(text: str, year: str, arrival_day: int) -> datetime.datetime:
    """A date by name, such as `Nov 27 21:50:46`, with its year. Raises ValueError."""
    month, day, clock = text.split()[-3:]
    hour, minute, second = clock.split(":")
    arrival = datetime.datetime(1970, 1, 1) + datetime.timedelta(days=arrival_day)
    candidates = list(range(arrival.year + 1, arrival.year - LEAP_YEARS - 1, -1))
    latest = arrival + datetime.timedelta(days=2)
    if year.isdigit():
        candidates = [int(year)]
        latest = datetime.datetime.max
    for candidate in candidates:
        # The 29th of February is not in every year.
        with contextlib.suppress(ValueError):
            instant = datetime.datetime(
                candidate,
                _MONTHS.index(month) + 1,
                int(day),
                int(hour),
                int(minute),
                int(second),
            )
            if instant <= latest:
                return instant
    raise ValueError("no year of late has such a day")


def _local_second(instant: datetime.datetime) -> str:
    """A local time in UTC; "" beside the ends of the calendar."""
    try:
        utc = instant.astimezone(datetime.timezone.utc)
    except (OverflowError, OSError, ValueError):
        return ""
    return utc.replace(tzinfo=None).isoformat()


def hash_of_log(log: str) -> Any:
    """A hash that has taken in the name of a log, to go on from for each line."""
    return blake2b(log.encode("utf-8", "surrogateescape") + b"\0", digest_size=10)


def line_id(log: Any, anchor: str, offset: int, line: bytes) -> str:
    """The id of a line: where it stands and what it says, and nothing about the past.

    `log` is of `hash_of_log`. `anchor` is what the line leans on: the first line with a
    time in its file; for a line without a time, the last line before it that has one.
    So a line keeps its id in a copy, a renamed or an inflated file, and has another one
    in a file that begins otherwise.

    >>> log = hash_of_log("nas /var/log/app.log")
    >>> line_id(log, "", 0, b"2026-11-27 21:50:46 started")
    'bd4ca5f43edb4ff28e4b'
    >>> line_id(log, "bd4ca5f43edb4ff28e4b", 28, b"  at main()")
    '001a7c5009ff25a8171a'
    """
    digest = log.copy()
    digest.update(f"{anchor} {offset} ".encode("ascii") + line)
    text: str = digest.hexdigest()
    return text


class Roots(NamedTuple):
    """What the lines of a file lean on."""

    # Made of the first line of the file and of its inode.
    first: str = ""
    # Made of the first line with a time; "" until it has come.
    start: str = ""
    # The id of the last line with a time; before any, the same as `first`.
    anchor: str = ""


def tell_apart(root: str, used: Iterable[str], salt: str) -> str:
    """A root that no other file has: the same or, if it is used, one with a nonce.

    The nonce is made of a count, and of a salt that differs wherever the count may
    begin anew: after the place was lost, and from file to file.

    >>> tell_apart("ab", ["cd"], "salt"), tell_apart("ab", ["ab", "ab~1~salt"], "salt")
    ('ab', 'ab~2~salt')
    """
    counts: List[int] = []
    for other in used:
        name, _, nonce = other.partition("~")
        if name == root:
            counts.append(int(nonce.partition("~")[0] or "0"))
    if not counts:
        return root
    return f"{root}~{max(counts) + 1}~{salt}"


def _take_as_it_is(root: str) -> str:
    """The default of `tell_apart` where no other file is known."""
    return root


class LineSettings(NamedTuple):
    """What is made of lines: events as they are, or text."""

    topic: str = ""
    source: str = ""
    ids: str = "given"  # given, random, offset
    time: str = "line"  # line, arrival


def _as_message(line: bytes) -> bytes:
    """A line as a JSON string; bytes that are not UTF-8 are shown as \\xNN."""
    text = json.encoder.encode_basestring(line.decode("utf-8", "backslashreplace"))
    return text.encode("utf-8")


class LineEvents:
    """Makes events of the pieces of one file or stream, in their order.

    `offset` and `line` are those of the next piece, `roots` what its line leans on.
    `apart` is given the start of a file when it is known, and tells it from others.
    """

    def __init__(
        self,
        settings: LineSettings,
        log: str = "",
        offset: int = 0,
        line: int = 1,
        roots: Roots = Roots(),
        apart: Callable[[str], str] = _take_as_it_is,
    ) -> None:
        self.offset = offset
        self.line = line
        self.roots = roots
        self._apart = apart
        self._settings = settings
        self._log = hash_of_log(log)
        self._run = os.urandom(10).hex()
        self._arrival_us = 0
        self._arrival = b""
        # Changes with the lines; the record would be made anew for each.
        self._anchor = roots.anchor
        names = json.dumps({"topic": settings.topic, "source": settings.source})
        self._head = names[:-1].encode("ascii")

    def of_pieces(self, pieces: Sequence[bytes]) -> Batch:
        """The events of the next pieces.

        Blank lines are none. A NUL at either end of a line is a hole that a truncation
        left in the file of a writer who does not append.
        """
        self._arrival_us = time.time_ns() // 1000
        self._arrival = format_timestamp(self._arrival_us).encode("ascii")
        is_text = self._settings.ids != "given"
        events: List[bytes] = []
        numbers: List[int] = []
        for piece in pieces:
            text = piece.strip(b"\0\r\n")
            if self.offset == 0 and text.startswith(UTF8_BOM):
                text = text[len(UTF8_BOM) :]
            if text and not text.isspace():
                numbers.append(self.line)
                events.append(self._event(text) if is_text else text)
            self.offset += len(piece)
            if piece.endswith(b"\n"):
                self.line += 1
        self.roots = self.roots._replace(anchor=self._anchor)
        return Batch(events, numbers)

    def _event(self, text: bytes) -> bytes:
        """A line of text as an event."""
        timestamp = b""
        match = _LINE_TIME.match(text)
        if match is not None and self._settings.time == "line":
            timestamp = _instant_of(match, self._arrival_us).encode("ascii")
        if self._settings.ids == "random":
            event_id = f"{self._run}-{self.offset:x}"
        elif match is not None:
            if not self.roots.start:
                self._begin_with(text)
            event_id = line_id(self._log, self.roots.start, self.offset, text)
            self._anchor = event_id
        else:
            event_id = line_id(self._log, self._anchor, self.offset, text)
        return b'%b,"timestamp":"%b","event_id":"%b","payload":{"message":%b}}' % (
            self._head,
            timestamp or self._arrival,
            event_id.encode("ascii"),
            _as_message(text),
        )

    def _begin_with(self, text: bytes) -> None:
        """Of the first line with a time: all others in this file lean on it."""
        start = self._apart(line_id(self._log, "", self.offset, text))
        self.roots = self.roots._replace(start=start)


# ---- E. A log: one name, many files ----
#
# app.log holds A. It is rotated, and then B is written. What we find:
#
#     renaming      app.log: B, in a new inode    app.log.1: A, in its inode
#     copying       app.log: B, in the inode of A app.log.1: A, in a new inode
#     compressing   app.log: B                    app.log.1.gz: A, in a new inode
#
# So a name says nothing, and an inode not enough. A file is known by its content: its
# first bytes, the last line before the place, and a checksum of all between. With each
# look at the folder, every file of the log is explained in one of five ways:
#
#   * we hold it open, or its inode and its content are those of a mark: it is known;
#   * its content is that of a mark whose file is gone: it is read on from there;
#   * its content is that of a file that we have: it is a copy, and left alone;
#   * it may be a copy that is being made: it is looked at again;
#   * else it is new, and will be read from its start.
#
# When does equal content make a copy? A program that repeats itself fills several files
# with the same bytes within a second. To call one of them a copy would lose its lines.
# So content is proof only if it can have been written just once: if its lines have two
# different times, or one that tells microseconds. For a file begins after the one
# before has ended, and no rotation is done within a microsecond. Without that proof a
# file is a copy only if its original
#
#   * was truncated: that is how copying rotates; or
#   * is gone, and the copy is compressed: that is how compressing rotates.
#
# If that happened while nobody looked, a time in the content or of the file must tell
# of it, too. All others are read as new files, and that is said.


class Mark(NamedTuple):
    """How far one file of a log was read, and by what the file is known again."""

    # Counts the files of the log, from 1.
    number: int
    # 0: the file is gone. The mark is kept for its roots.
    inode: int = 0
    # Bytes that are read, of gzip inflated ones, and the line ends among them.
    offset: int = 0
    line: int = 0
    # Size and CRC-32 of the first bytes, of the last ones before the offset, and of all
    # before it; the last is None where it is not known.
    head_size: int = 0
    head_crc: int = 0
    last_size: int = 0
    last_crc: int = 0
    crc: Optional[int] = None
    # When the file was changed last, if the offset was its size then; else 0. Of a .gz
    # when it was read.
    mtime_ns: int = 0
    # What its lines lean on: see `Roots`.
    first: str = ""
    start: str = ""
    anchor: str = ""
    is_gzip: bool = False
    # Its name is not that of the log, or no more.
    is_rotated: bool = False
    # Never to be read again: a .gz that was read, or no text, or older than the log.
    done: bool = False

    def roots(self) -> Roots:
        """What the next line leans on."""
        return Roots(self.first, self.start, self.anchor)


def has_head(file: Any, mark: Mark) -> bool:
    """Whether a file begins as the one of `mark` did."""
    if mark.head_size == 0:
        return False
    head = file.at(0, mark.head_size)
    return len(head) == mark.head_size and zlib.crc32(head) == mark.head_crc


def holds_place(file: Any, mark: Mark) -> bool:
    """Whether a file has, up to the place in `mark`, what was read there.

    By its content: what the first bytes and the last line before the place were. So a
    file that was truncated, or took over an inode, is not mistaken for what it was.

    >>> class Copy:
    ...     def at(self, offset, count):
    ...         return b"one\\ntwo\\nthree\\n"[offset : offset + count]
    >>> mark = Mark(1, offset=8, last_size=4, last_crc=zlib.crc32(b"two\\n"))
    >>> holds_place(Copy(), mark)
    True
    >>> holds_place(Copy(), mark._replace(offset=4))
    False
    """
    if mark.head_size and not has_head(file, mark):
        return False
    last = file.at(mark.offset - mark.last_size, mark.last_size)
    return len(last) == mark.last_size and zlib.crc32(last) == mark.last_crc


def holds_all(file: Any, mark: Mark) -> bool:
    """Whether a file begins with all that was read of the one of `mark`.

    If nothing was read of it, then nothing tells it from others with the same head.
    """
    if mark.offset == 0 or mark.head_size == 0 or not holds_place(file, mark):
        return False
    if mark.crc is None:
        return True
    offset = crc = 0
    while offset < mark.offset:
        data = file.at(offset, min(FILE_READ_BYTES, mark.offset - offset))
        if not data:
            return False
        crc = zlib.crc32(data, crc)
        offset += len(data)
    return crc == mark.crc


def ends_at(file: Any, size: int) -> bool:
    """Whether a file has so many bytes."""
    return len(file.at(max(0, size - 1), 2)) == min(1, size)


def begins_with(file: Any, other: Any) -> bool:
    """Whether a file begins with all that another one has; not if that is empty."""
    offset = 0
    while True:
        data = other.at(offset, FILE_READ_BYTES)
        if not data:
            return offset > 0
        if file.at(offset, len(data)) != data:
            return False
        offset += len(data)


def is_dated(file: Any, size: int) -> bool:
    """Whether the first bytes of a file can have been written only once.

    So it is if their lines have two different times, or one with microseconds: what
    another file begins with was written after all that this one has.
    """
    times: Set[Tuple[bytes, bytes]] = set()
    whole, _, _ = file.at(0, min(size, FILE_READ_BYTES)).rpartition(b"\n")
    for line in whole.splitlines():
        match = _LINE_TIME.match(line.strip(b"\0"))
        if match is None:
            continue
        fraction = match.group("fraction") or b""
        if len(fraction) >= MICROSECOND_DIGITS:
            return True
        times.add((match.group("when"), fraction))
        if len(times) > 1:
            return True
    return False


def tells_time(file: Any, size: int) -> bool:
    """Whether the first bytes of a file hold a time, wherever in a line.

    That is less than `is_dated`: it makes equal content of other files unlikely.
    """
    head = file.at(0, min(size, FILE_READ_BYTES))
    return _ANY_TIME.search(head) is not None or _LINE_TIME.match(head) is not None


def is_same_second(status: os.stat_result, mark: Mark) -> bool:
    """Whether a .gz has the time of its original, which compressing leaves to it."""
    return mark.mtime_ns != 0 and status.st_mtime_ns // 10**9 == mark.mtime_ns // 10**9


def is_rewritten(file: "LogBytes", mark: Mark, wait_s: float) -> bool:
    """Whether a file that holds the place was written anew with the same bytes.

    It shows in a time that changed, although the file ends where we stand. But a write
    sets the time before the size: for `wait_s` seconds one may still be under way.
    Bytes that can have been written only once were touched, not written.
    """
    wait_s *= min(REWRITTEN_WAITS, 1 + mark.offset // REWRITTEN_BYTES)
    end_s = time.monotonic() + wait_s
    while True:
        status = file.status()
        if mark.mtime_ns in (0, status.st_mtime_ns) or status.st_size != mark.offset:
            return False
        if is_dated(file, mark.offset):
            return False
        if time.monotonic() >= end_s:
            return True
        time.sleep(min(FILE_POLL_S, wait_s / 10))


def _open_at_once(path: str, flags: int) -> int:
    """Open a file without waiting for whoever is at its other end."""
    return os.open(path, flags | os.O_NONBLOCK)


class LogBytes:
    """The bytes of one regular file; of gzip, the inflated ones. All raise OSError."""

    def __init__(self, path: str) -> None:
        # The name may be a pipe's by now: opening it must not wait for a writer.
        self._plain: Any = open(path, "rb", buffering=0, opener=_open_at_once)
        self._file: Any = self._plain
        status = os.fstat(self._plain.fileno())
        self.inode = status.st_ino
        if not stat.S_ISREG(status.st_mode):
            self._plain.close()
            raise OSError(errno.EINVAL, "is no regular file", path)
        self.is_gzip = self._plain.read(2) == GZIP_MAGIC
        if self.is_gzip:
            import gzip

            self._plain.seek(0)
            self._file = gzip.GzipFile(fileobj=self._plain)

    def at(self, offset: int, count: int) -> bytes:
        """`count` bytes from `offset` on; fewer at the end."""
        try:
            self._file.seek(offset)
            data: bytes = self._file.read(count)
        except (EOFError, zlib.error) as error:
            raise OSError(errno.EIO, f"is not whole gzip ({error})")
        return data

    def check_whole(self) -> None:
        """Inflate all: it may be that gzip is still at work. Raises OSError."""
        offset = 0
        while self.at(offset, FILE_READ_BYTES):
            offset += FILE_READ_BYTES

    def status(self) -> os.stat_result:
        """What the file system says of the file, as it is stored."""
        return os.fstat(self._plain.fileno())

    def close(self) -> None:
        """Give the descriptor back."""
        self._file.close()
        self._plain.close()


# What rotation appends to a name, or puts before its extension: `.1`, `-20261127`,
# `-2026-11-27`, `-11-27-2026`, `.2026-11-27_21-50`; an hour and a counter may follow. A
# hyphen and few digits (`worker-2.log`) are another log.
_DATE = "(?:[0-9]{6}|[0-9]{4}-[0-9]{2}|[0-9]{2}-[0-9]{2}-[0-9]{4})"
_ROTATION = rf"(?:\.[0-9]|-{_DATE})[0-9T_:.-]*"
_ROTATED_NAME = re.compile(rf"(.+?){_ROTATION}((?!\.gz)\.[A-Za-z]\w*)?(?:\.gz)?")


def rotated_from(name: str) -> str:
    """The name that a file had before it was rotated, by its looks.

    >>> rotated_from("app.log.2.gz"), rotated_from("app-20261127.log")
    ('app.log', 'app.log')
    >>> rotated_from("worker-2.log")
    'worker-2.log'
    """
    match = _ROTATED_NAME.fullmatch(name)
    if match is None:
        return name
    return match.group(1) + (match.group(2) or "")


def log_name(path: str) -> str:
    """The absolute path of the log that a file belongs to.

    A rotated name counts as such only beside a file of the name without the rotation.
    """
    path = os.path.abspath(path)
    folder, name = os.path.split(path)
    present = os.path.join(folder, rotated_from(name))
    if os.path.isfile(present):
        return present
    return path


class _Entry(NamedTuple):
    """A file of the log as the folder shows it.

    Its status is what it was a moment ago: by now the name may be another file's.
    """

    path: str
    status: os.stat_result

    def age(self) -> Tuple[int, int, str]:
        """A key that sorts the oldest first: last written; then `.2` before `.1`."""
        number = re.search(r"\.([0-9]{1,4})(?:\.|$)", os.path.basename(self.path))
        count = 0
        if number is not None:
            count = -int(number.group(1))
        return self.status.st_mtime_ns, count, self.path


def is_named_after(path: str, log: str) -> bool:
    """Whether a file has the name of a log as rotation changes it."""
    return rotated_from(os.path.basename(path)) == os.path.basename(os.path.realpath(log))


def list_log(path: str, inodes: Container[int] = ()) -> List[_Entry]:
    """The files of a log, the oldest first and the present one last. Raises OSError.

    Those with one of `inodes` are files of the log whatever they are called by now.

    Whoever renames at the same time may hide a file from one listing: its new name was
    asked for too early, and its old one too late.
    """
    entries: List[_Entry] = []
    folder_name, name = os.path.split(os.path.realpath(path))
    with os.scandir(folder_name) as folder:
        for entry in folder:
            if entry.name == name:
                continue
            if not is_named_after(entry.path, path) and entry.inode() not in inodes:
                continue
            with contextlib.suppress(FileNotFoundError):
                status = entry.stat()
                if stat.S_ISREG(status.st_mode):
                    entries.append(_Entry(entry.path, status))
    entries.sort(key=_Entry.age)
    with contextlib.suppress(FileNotFoundError):
        entries.append(_Entry(path, os.stat(path)))
    return entries


def is_same_listing(one: Sequence[_Entry], other: Sequence[_Entry]) -> bool:
    """Whether every name stands for the same file in both.

    Then it did from the end of the first listing to the start of the second, and each
    of them has all files that were there at that moment.
    """
    inodes = {entry.path: entry.status.st_ino for entry in one}
    return inodes == {entry.path: entry.status.st_ino for entry in other}


def open_entry(entry: _Entry) -> LogBytes:
    """Open the file that was listed. Raises OSError.

    If its name is another file's by now, that is FileNotFoundError: the next listing
    has it under its new name.
    """
    mode = entry.status.st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        # Opening a pipe would let its writer go on, and lose what it writes.
        raise OSError(errno.EINVAL, "is no regular file", entry.path)
    opened = LogBytes(entry.path)
    if opened.inode != entry.status.st_ino:
        opened.close()
        raise FileNotFoundError(errno.ENOENT, "was renamed", entry.path)
    return opened


class _Stock(NamedTuple):
    """What a look found."""

    entries: List[_Entry]
    inodes: Set[int]
    # Whether nothing was renamed while they were listed.
    is_settled: bool
    # The numbers of the files of ours that are among them; a look adds to it.
    claimed: Set[int]


class LogFile:
    """One file of a log, and how far it is read.

    `bytes` is None while the file is closed: there is nothing to read in it; or, when
    it `is_waiting`, too many others are open before it.
    """

    def __init__(self, mark: Mark, path: str = "") -> None:
        self.mark = mark
        self.path = path
        self.bytes: Optional[LogBytes] = None
        self.is_waiting = False
        # It was truncated or written anew: its inode is another file by now.
        self.is_lost = False
        self.is_overwritten = False
        self.seen_size = 0
        self.seen_mtime_ns = 0
        # When something new was read last, when the file was found under a rotated
        # name, and when the hole at the place was seen first.
        self.read_s = time.monotonic()
        self.rotated_s = time.monotonic()
        self.hole_s: Optional[float] = None

    def open(self, opened: LogBytes, path: str) -> None:
        """Go on in a file that holds the place."""
        self.close()
        self.bytes = opened
        self.path = path
        self.is_waiting = False
        self.is_lost = False
        self.is_overwritten = False
        status = opened.status()
        self.seen_size = status.st_size
        self.seen_mtime_ns = status.st_mtime_ns
        self.mark = self.mark._replace(inode=opened.inode, is_gzip=opened.is_gzip)
        self._learn_head(opened)

    def close(self) -> None:
        """Give the descriptor back."""
        if self.bytes is not None:
            self.bytes.close()
            self.bytes = None

    def set_rotated(self, is_rotated: bool) -> None:
        """Note whether the file has the name of the log no more."""
        if is_rotated != self.mark.is_rotated:
            self.mark = self.mark._replace(is_rotated=is_rotated)
            self.rotated_s = time.monotonic()

    def is_open_as(self, status: os.stat_result) -> bool:
        """Whether this is the file that we hold open."""
        if self.bytes is None:
            return False
        try:
            return os.path.samestat(self.bytes.status(), status)
        except OSError:
            return False

    def _learn_head(self, opened: LogBytes) -> None:
        """Remember the first bytes. NULs may yet become data, so they do not count."""
        if self.mark.head_size < HEAD_BYTES:
            head = opened.at(0, HEAD_BYTES).partition(b"\0")[0]
            self.mark = self.mark._replace(head_size=len(head), head_crc=zlib.crc32(head))

    def is_torn(self, wait_s: float) -> bool:
        """Whether the open file was truncated since this was asked last.

        It shows in the size, in other first bytes, in another last line before the
        place, or in the time: see `is_rewritten`.
        """
        if self.bytes is None or self.bytes.is_gzip:
            return False
        size = self.bytes.status().st_size
        if size < self.seen_size or self.is_overwritten:
            return True
        if not holds_place(self.bytes, self.mark) or is_rewritten(self.bytes, self.mark, wait_s):
            self.is_overwritten = True
            return True
        self.seen_size = size
        self._learn_head(self.bytes)
        self.note_time()
        return False

    def may_be_another(self) -> bool:
        """Whether an open file, unread so far, was written since this was asked.

        If it was copied, truncated and filled again, only the copy beside it tells.
        """
        assert self.bytes is not None
        if self.mark.offset > 0:
            return False
        before, self.seen_mtime_ns = self.seen_mtime_ns, self.bytes.status().st_mtime_ns
        return before != self.seen_mtime_ns

    def note_time(self) -> None:
        """Remember the time of an open file that ends where we stand."""
        assert self.bytes is not None
        status = self.bytes.status()
        mtime_ns = 0
        if self.bytes.is_gzip or status.st_size == self.mark.offset:
            mtime_ns = status.st_mtime_ns
        if mtime_ns != self.mark.mtime_ns:
            self.mark = self.mark._replace(mtime_ns=mtime_ns)

    def leave_unread(self) -> None:
        """The file is older than the log is followed. A copy of it is, too."""
        assert self.bytes is not None
        if not self.bytes.is_gzip:
            size = self.bytes.status().st_size
            last = self.bytes.at(max(0, size - LAST_BYTES), LAST_BYTES)
            self.mark = self.mark._replace(
                offset=size, last_size=len(last), last_crc=zlib.crc32(last), crc=None
            )
        self.mark = self.mark._replace(done=True)
        self.close()

    def idle_s(self) -> float:
        """Seconds since something was written, by the clock of the file or by ours."""
        idle_s = time.monotonic() - self.read_s
        if self.bytes is not None:
            idle_s = max(idle_s, time.time() - self.bytes.status().st_mtime)
        return idle_s

    def is_removed(self) -> bool:
        """Whether the open file has lost its name: it takes room until it is closed."""
        assert self.bytes is not None
        return self.bytes.status().st_nlink == 0

    def is_unread(self) -> bool:
        """Whether the open file may hold more than was read."""
        assert self.bytes is not None
        return self.bytes.is_gzip or self.unread(self.mark.offset) > 0

    def unread(self, offset: int) -> int:
        """Bytes behind `offset`, as far as that can be known without inflating."""
        if self.mark.done:
            return 0
        if self.bytes is not None and not self.bytes.is_gzip:
            self.seen_size = max(self.seen_size, self.bytes.status().st_size)
        elif not self.is_waiting:
            return 0
        return max(0, self.seen_size - offset)


class Log:
    """A log: the file of a name, and those that had the name before it.

    `look` finds the files, `read` reads them in the order of their age. A thread of its
    own looks while the log is followed, so that a file is open before it is renamed,
    compressed or deleted, however long the reader has to wait. The lock guards all
    fields.

    `marks` say how far the files are read already. With `reads_older` those that no
    mark tells of are read as well; without, only what came after the newest that one
    tells of, or after the present file. With `keeps_place` an unfinished line at the
    end is left for the next run. A log that `is_alone` is its present file only. `salt`
    is that of the place, or "" for one of its own.
    """

    def __init__(
        self,
        path: str,
        lines: LineSettings,
        limits: ClientLimits,
        marks: Sequence[Mark] = (),
        follows: bool = False,
        reads_older: bool = False,
        keeps_place: bool = False,
        is_alone: bool = False,
        salt: str = "",
    ) -> None:
        import threading

        self.path = path
        # What could not be read; of a log that is not followed.
        self.failures: List[str] = []
        # What the thread that looks has ended of.
        self.bug = ""
        self._lines = lines
        self._limits = limits
        self._name = f"{lines.source} {log_name(path)}"
        self._follows = follows
        self._reads_older = reads_older
        self._keeps_place = keeps_place
        self._is_alone = is_alone
        self._salt = salt or os.urandom(4).hex()
        self._lock = threading.RLock()
        self._marks = marks
        # In order of age.
        self._files: List[LogFile] = []
        self._current: Optional[LogFile] = None
        self._is_starting = True
        # Whether nothing was renamed during the last look.
        self._is_settled = False
        # Whether a file was renamed between its listing and its opening.
        self._renamed = False
        # Whether the place must be saved although nothing was read.
        self._has_new_place = False
        self._place_mark: Optional[Mark] = None
        if marks:
            self._place_mark = marks[-1]
        # Files that were found and could not be opened: why, by path.
        self._unopened: Dict[str, str] = {}
        # Files that may be copies that are being made: the next look decides.
        self._undecided: Set[str] = set()
        # Files that were there before the log was followed, by path.
        self._older: Set[str] = set()
        # Files that may be copies and are read as new ones: their sizes, by path.
        self._doubtful: Dict[str, int] = {}

    # -- finding the files --

    def look(self) -> None:
        """See what has come, and open it. Raises OSError for an unreadable folder.

        As long as the present file is the same and whole, this costs two system calls.
        """
        with self._lock:
            if self._is_unchanged():
                return
            # What was renamed while we looked may be missing, or be taken for another.
            for _ in range(LOOKS_MAX):
                if self._is_starting:
                    self._begin_with_marks()
                stock = self._list()
                self._take_stock(stock)
                self._is_settled = stock.is_settled and not self._renamed
                if self._is_settled:
                    break
            if self._is_starting:
                self._tell_the_start(stock)
            self._is_starting = False
            if self._is_settled and not self._unopened and not self._undecided:
                self._forget_gone(stock)
            self._tell_the_doubtful()

    def look_until_settled(self) -> None:
        """Look until every file is explained, or time is up. Raises OSError.

        A file that is just being copied or compressed is explained a moment later.
        """
        end_s = time.monotonic() + 2 * self._limits.copy_s
        self.look()
        while self._undecided or not self._is_settled:
            if time.monotonic() >= end_s:
                names = ", ".join(sorted(self._undecided)) or self.path
                self.failures.append(f"{names}: is being changed, and left for the next run")
                return
            time.sleep(self._limits.copy_s / 10)
            self.look()

    def _list(self) -> _Stock:
        """The files of the log, or its present one alone. Raises OSError.

        They are listed twice. If that fails the second time, what was found counts, and
        the next look tries again.
        """
        entries = self._entries()
        is_settled = False
        with contextlib.suppress(OSError):
            is_settled = is_same_listing(entries, self._entries())
        inodes = {entry.status.st_ino for entry in entries}
        return _Stock(entries, inodes, is_settled, set())

    def _tell_the_doubtful(self) -> None:
        """Say which files are read although they may be copies."""
        if self._doubtful:
            names = ", ".join(sorted(self._doubtful))
            size = sum(self._doubtful.values())
            _tell(
                f"{names}: {size:,} bytes are read as new lines, although they may be a copy"
                " of what was read"
            )
        self._doubtful = {}

    def _begin_with_marks(self) -> None:
        """At first there are the files of the marks, all closed."""
        for file in self._files:
            file.close()
        self._files = [LogFile(mark) for mark in self._marks]
        self._current = None
        self._doubtful = {}
        self.failures = []

    def trouble(self) -> str:
        """What could not be opened, or that there is nothing yet; else ""."""
        with self._lock:
            if not self._files and not self._unopened:
                return f"{self.path} is not there yet"
            return "; ".join(self._unopened.values())

    def _is_unchanged(self) -> bool:
        """Whether the present file is the one of before, and not truncated.

        Then whatever else came is a copy of it that is about to replace it, or none of
        our business.
        """
        current = self._current
        if not self._is_settled or self._unopened or self._undecided:
            return False
        if current is None or current.bytes is None:
            return False
        if current.is_torn(self._limits.rewritten_s) or current.may_be_another():
            return False
        try:
            return os.path.samestat(os.stat(self.path), current.bytes.status())
        except FileNotFoundError:
            return False

    def _take_stock(self, stock: _Stock) -> None:
        """Explain each file of the log: known, a copy of a known one, or new.

        First those whose inode tells, so that a copy cannot pass for its original. Then
        the present one, as the others may be copies of it.
        """
        self._unopened = {}
        undecided, self._undecided = self._undecided, set()
        self._renamed = False
        current, self._current = self._current, None
        if current is not None and current.is_torn(self._limits.rewritten_s):
            self._leave_torn(current)
        unknown: List[_Entry] = []
        for entry in stock.entries:
            file = self._claim(entry)
            if file is not None:
                stock.claimed.add(file.mark.number)
            elif entry.path == self.path or is_named_after(entry.path, self.path):
                unknown.append(entry)
            # Else another program's file has the inode of one of ours that is gone.
        older = self._older_entries(stock, undecided)
        unknown.sort(key=lambda entry: entry.path != self.path)
        for entry in unknown:
            try:
                self._explain(entry, stock, entry.path in older)
            except OSError as error:
                self._note_unopened(entry, error)
        for file in self._files:
            file.set_rotated(file is not self._current)
        self._bound_open_files()

    def _entries(self) -> List[_Entry]:
        """The files of the log, or its present one alone. Raises OSError."""
        entries: List[_Entry] = []
        if not self._is_alone:
            entries = list_log(self.path, {file.mark.inode for file in self._files})
        elif os.path.exists(self.path):
            entries.append(_Entry(self.path, os.stat(self.path)))
        return entries

    def _note_unopened(self, entry: _Entry, error: OSError) -> None:
        """A follower tries again with the next look. What was renamed is looked for."""
        if isinstance(error, FileNotFoundError):
            self._renamed = True
            return
        if self._follows:
            self._unopened[entry.path] = _reason(error)
        else:
            self.failures.append(_reason(error))

    def _claim(self, entry: _Entry) -> Optional[LogFile]:
        """The file of ours that this is by its inode, if its content agrees.

        As long as we hold a file open nobody else can get its inode.
        """
        for file in reversed(self._files):
            if file.is_open_as(entry.status):
                self._place_file(file, entry)
                return file
        for file in reversed(self._files):
            if file.mark.inode != entry.status.st_ino or file.is_lost:
                continue
            if file.bytes is not None:
                if file.bytes.inode == file.mark.inode:
                    continue
                # The copy of a file that we hold open although it was deleted.
                return file
            with contextlib.suppress(OSError):
                if self._reopen_as(file, entry):
                    return file
        return None

    def _reopen_as(self, file: LogFile, entry: _Entry) -> bool:
        """Whether a closed file is this one.

        It is opened if there is more to read, or if there may be, as long as the log is
        followed: the writer of a rotated file may come back to it.
        """
        opened = open_entry(entry)
        if not self._is_still(opened, file.mark, entry):
            opened.close()
            return False
        has_more = opened.is_gzip or entry.status.st_size > file.mark.offset
        is_wanted = has_more or self._follows
        is_wanted = is_wanted and not file.mark.done and not file.is_waiting
        if is_wanted or entry.path == self.path:
            file.open(opened, entry.path)
        else:
            opened.close()
        self._place_file(file, entry)
        return True

    def _is_still(self, opened: LogBytes, mark: Mark, entry: _Entry) -> bool:
        """Whether a file that has the inode of `mark` is that file. Raises OSError."""
        if mark.is_rotated and entry.path == self.path and not is_dated(opened, mark.offset):
            # A rotated file does not get its name back: the inode was used again.
            return False
        if mark.done:
            if mark.mtime_ns not in (0, opened.status().st_mtime_ns):
                return holds_all(opened, mark) and is_dated(opened, mark.offset)
            # To inflate all would only confirm the time. If nothing was in a .gz, it
            # has no first bytes.
            is_empty = mark.head_size == 0 and not opened.at(0, 1)
            return is_empty or has_head(opened, mark)
        if not holds_place(opened, mark):
            return False
        if opened.is_gzip:
            return True
        return not is_rewritten(opened, mark, self._limits.rewritten_s)

    def _place_file(self, file: LogFile, entry: _Entry) -> None:
        """Note under which name a file was found."""
        file.path = entry.path
        if entry.path == self.path:
            self._current = file

    def _explain(self, entry: _Entry, stock: _Stock, is_older: bool) -> None:
        """Find out what a file is whose inode says nothing. Raises OSError."""
        opened = open_entry(entry)
        try:
            is_kept = self._explain_opened(opened, entry, stock, is_older)
        except OSError:
            opened.close()
            raise
        if not is_kept:
            opened.close()

    def _explain_opened(
        self, opened: LogBytes, entry: _Entry, stock: _Stock, is_older: bool
    ) -> bool:
        """The same of an opened file; whether it stays open. Raises OSError."""
        # A new file under the present name is just that, but for a first look: then it
        # may be a log that was moved to another disk.
        alike: List[LogFile] = []
        if entry.path != self.path or self._is_starting:
            alike = [file for file in reversed(self._files) if self._is_alike(opened, file, stock)]
        for file in alike:
            if self._replaces(opened, file, entry, stock):
                return self._go_on_in(file, opened, entry, stock)
        is_there = any(file.mark.number in stock.claimed for file in alike)
        if is_there and is_dated(opened, FILE_READ_BYTES):
            return False
        if self._may_be_decided_later(opened, alike, entry, stock):
            self._undecided.add(entry.path)
            return False
        if alike and not is_older:
            self._doubtful[entry.path] = entry.status.st_size
        self._add(opened, entry, stock, is_older)
        return not is_older

    def _is_alike(self, opened: LogBytes, file: LogFile, stock: _Stock) -> bool:
        """Whether a file has the content of one of ours. Raises OSError."""
        mark = file.mark
        if opened.inode == mark.inode or (mark.done and mark.offset == 0):
            return False
        if file.bytes is not None and not file.bytes.is_gzip:
            return begins_with(file.bytes, opened)
        if mark.offset == 0 and file.bytes is None and not file.is_lost:
            # It was closed before anything was read, for want of room.
            return has_head(opened, mark) and ends_at(opened, file.seen_size)
        if not holds_all(opened, mark):
            return False
        # If it has more than a file that is still there, that is no copy.
        return mark.number not in stock.claimed or not opened.at(mark.offset, 1)

    def _replaces(self, opened: LogBytes, file: LogFile, entry: _Entry, stock: _Stock) -> bool:
        """Whether a file with the content of one that is gone is a copy of it."""
        mark = file.mark
        if mark.number in stock.claimed:
            return False
        size = max(mark.offset, mark.head_size)
        if is_dated(opened, size):
            return True
        if entry.path == self.path or mark.inode == 0 or not stock.is_settled:
            return False
        was_truncated = mark.inode in stock.inodes
        was_compressed = opened.is_gzip and not mark.is_gzip
        if not was_truncated and not was_compressed:
            return False
        # While nobody looked, its inode may have come to another file, or it may have
        # been removed. Then something must tell of the time.
        if not self._is_starting or tells_time(opened, size):
            return True
        return was_compressed and is_same_second(opened.status(), mark)

    def _may_be_decided_later(
        self, opened: LogBytes, alike: Sequence[LogFile], entry: _Entry, stock: _Stock
    ) -> bool:
        """Whether a file may be a copy that is just being made. Raises OSError."""
        if entry.path == self.path:
            return False
        if self._current is not None and self._current.is_torn(self._limits.rewritten_s):
            # The present file was truncated while we looked.
            return True
        if alike and not stock.is_settled:
            return True
        is_empty = not opened.at(0, 1)
        is_copy_of_present = self._current in alike
        is_copy_in_gzip = opened.is_gzip and bool(alike)
        if not (is_empty or is_copy_of_present or is_copy_in_gzip):
            return False
        return time.time() - opened.status().st_ctime < self._limits.copy_s

    def _go_on_in(self, file: LogFile, opened: LogBytes, entry: _Entry, stock: _Stock) -> bool:
        """Read a file on in its copy; whether that stays open."""
        stock.claimed.add(file.mark.number)
        is_wanted = file.bytes is None and not file.mark.done
        if is_wanted:
            file.open(opened, entry.path)
        else:
            # It is read to its end as it is, or was.
            file.mark = file.mark._replace(inode=opened.inode)
        self._place_file(file, entry)
        return is_wanted

    def _add(self, opened: LogBytes, entry: _Entry, stock: _Stock, is_older: bool) -> None:
        """A file that we did not know, behind those that we know. Raises OSError."""
        number = 1 + max([file.mark.number for file in self._files], default=0)
        file = LogFile(Mark(number, crc=0, is_rotated=entry.path != self.path), entry.path)
        if opened.is_gzip and time.time() - entry.status.st_mtime < GZIP_FRESH_S:
            opened.check_whole()
        file.open(opened, entry.path)
        stock.claimed.add(number)
        position = len(self._files)
        if self._current is not None:
            position = self._files.index(self._current)
        self._files.insert(position, file)
        self._place_file(file, entry)
        if is_older:
            file.leave_unread()

    def open_files(self) -> List[LogFile]:
        """Those that hold a descriptor."""
        return [file for file in self._files if file.bytes is not None]

    def _bound_open_files(self) -> None:
        """Close what is too much: first what is read, then what has time.

        The oldest with something to read stays: it is the one that is read.
        """
        surplus = len(self.open_files()) - self._limits.open_files
        rotated = [file for file in self.open_files() if file.mark.is_rotated]
        unread = [file for file in rotated if file.is_unread()]
        rotated.sort(key=lambda file: (file.is_unread(), -file.mark.number))
        for file in rotated[: max(0, surplus)]:
            if file not in unread[:1]:
                file.is_waiting = file in unread
                file.close()

    def _older_entries(self, stock: _Stock, undecided: Set[str]) -> Set[str]:
        """The paths of files that were there before the log was followed.

        A log without a place begins with its present file. With a place of an older
        version, which knows one file, it begins there.
        """
        older: Set[str] = set()
        if self._reads_older:
            return older
        if not self._is_starting:
            # Those that the first look could not decide.
            return self._older & undecided
        known = {file.path for file in self._files if file.mark.number in stock.claimed}
        for entry in stock.entries:
            if entry.path in known or entry.path == self.path:
                break
            older.add(entry.path)
        self._older = older
        return older

    def _leave_torn(self, file: LogFile) -> None:
        """The present file was truncated: it goes on in the copy, if there is one."""
        assert file.bytes is not None
        if file.bytes.status().st_size >= file.seen_size and holds_place(file.bytes, file.mark):
            _tell(f"{file.path} was written anew with the same lines: they are read as new")
        file.close()
        file.is_lost = True
        self._has_new_place = True

    def _tell_the_start(self, stock: _Stock) -> None:
        """What is missing at the start, and what is read in addition."""
        entries = stock.entries
        if not self._follows and (not entries or entries[-1].path != self.path):
            self.failures.append(f"{self.path}: {os.strerror(errno.ENOENT)}")
        last = self._place_mark
        if last is not None and last.number not in stock.claimed:
            self._has_new_place = True
            _tell(
                f"{self.path} as it was read up to byte {last.offset:,} (line {last.line:,})"
                " is gone or truncated: going on with what is there now"
            )
        if last is None and self._reads_older:
            older = [file for file in self._files if file.mark.is_rotated and not file.mark.done]
            if older:
                count = sum(file.seen_size for file in older)
                _tell(f"no place yet: reading {len(older)} older files ({count:,} bytes), too")

    def _forget_gone(self, stock: _Stock) -> None:
        """Forget files that are closed and gone, but for the newest of them.

        Their inodes may be other files' by now. What a truncation took is said here, as
        there is no copy.
        """
        kept: List[LogFile] = []
        for index, file in enumerate(self._files):
            is_there = file.mark.number in stock.claimed
            if file.bytes is not None or file.is_waiting or is_there:
                kept.append(file)
                continue
            self._tell_what_is_missing(file)
            file.is_lost = False
            file.mark = file.mark._replace(inode=0)
            if index >= len(self._files) - GONE_FILES_KEPT:
                kept.append(file)
        self._files = kept

    def _tell_what_is_missing(self, file: LogFile) -> None:
        """Say what was seen of a truncated file, and not read."""
        unread = file.seen_size - file.mark.offset
        if file.is_lost and unread > 0 and not file.mark.done and not self._is_in_copy(file):
            _tell(
                f"{self.path} was truncated, and there is no copy: it was read up to byte"
                f" {file.mark.offset:,}, and {unread:,} bytes that were seen behind are missing"
            )

    def _is_in_copy(self, file: LogFile) -> bool:
        """Whether a file of which nothing was read may be another one by now."""
        if file.mark.offset > 0:
            return False
        for other in self.open_files():
            assert other.bytes is not None
            if other.seen_size >= file.seen_size and has_head(other.bytes, file.mark):
                return True
        return False

    # -- reading them --

    def read(self) -> Optional[Batch]:
        """The next events and the place behind them; None: nothing new.

        A file gives way to the next when it was renamed and its writer is done with it,
        or goes on for too long. It stays open for late lines, which come first again.
        Raises OSError, and ClientError if nobody looks for files any more.
        """
        if self.bug:
            raise ClientError(f"{self.path}: a bug while looking for its files: {self.bug}")
        with self._lock:
            if self._has_new_place:
                self._has_new_place = False
                return Batch([], [], self.place())
            for file in list(self._files):
                if file.is_waiting:
                    self._open_waiting(file)
                if file.bytes is None or file.mark.done:
                    continue
                is_ended = self._is_ended(file)
                try:
                    pieces = self._read_pieces(file, is_ended)
                except OSError as error:
                    self._leave_unreadable(file, error)
                    continue
                if pieces:
                    return self._make_batch(file, pieces)
                if is_ended:
                    self._leave(file)
                elif self._holds_up(file):
                    return None
            return None

    def place(self) -> Dict[str, Any]:
        """How far each file is read, as a value for JSON."""
        marks: List[Dict[str, Any]] = []
        for file in self._files:
            if file.mark.offset or file.mark.done:
                marks.append(file.mark._asdict())
        return {"files": marks, "salt": self._salt}

    def unread(self, place: Any) -> int:
        """Bytes of the log that are behind a place of ours."""
        offsets: Dict[int, int] = {}
        for mark in read_marks(place):
            offsets[mark.number] = mark.offset
        with self._lock:
            count = 0
            for file in self._files:
                count += file.unread(offsets.get(file.mark.number, 0))
            return count

    def _is_ended(self, file: LogFile) -> bool:
        """Whether nothing will be appended, so that a line without an end is one.

        A run that ends and keeps a place leaves such a line for the next run.
        """
        if file.mark.is_gzip:
            return True
        if not self._follows and not self._keeps_place:
            return True
        quiet_s = self._limits.quiet_s
        if not self._follows:
            quiet_s = self._limits.kept_s
        return file.mark.is_rotated and file.idle_s() >= quiet_s

    def _holds_up(self, file: LogFile) -> bool:
        """Whether the files behind this one have to wait for what may be appended."""
        rotated_s = time.monotonic() - file.rotated_s
        return self._follows and file.mark.is_rotated and rotated_s < self._limits.held_s

    def _read_pieces(self, file: LogFile, is_ended: bool) -> List[bytes]:
        """The next lines of a file; none if it was truncated meanwhile."""
        opened = file.bytes
        assert opened is not None
        longest = self._longest_line()
        count = self._limits.read_bytes
        data = opened.at(file.mark.offset, count)
        pieces = self._cut(file, data, is_ended and len(data) < count)
        if not pieces and len(data) == count:
            # A line that is longer than one read.
            data = opened.at(file.mark.offset, longest + 1)
            pieces = self._cut(file, data, is_ended and len(data) <= longest)
        reason = why_no_text(data)
        if pieces and file.mark.offset == 0 and reason:
            self._give_up(file, reason)
            return []
        if pieces and not opened.is_gzip and not holds_place(opened, file.mark):
            file.is_overwritten = True
            return []
        return pieces

    def _longest_line(self) -> int:
        """Bytes after which a line is cut."""
        if self._lines.ids == "given":
            return MAX_EVENT_BYTES
        return self._limits.line_bytes

    def _cut(self, file: LogFile, data: bytes, is_last: bool) -> List[bytes]:
        """Cut data into lines, as far as it is not a hole that may yet become data.

        A hole at the very end is space that was reserved, and waited for without limit.
        """
        hole = data.find(HOLE)
        if hole < 0 or not self._follows:
            file.hole_s = None
            return cut_lines(data, self._longest_line(), is_last)
        start = data.rfind(b"\n", 0, hole) + 1
        if start > 0:
            return cut_lines(data[:start], self._longest_line(), False)
        now_s = time.monotonic()
        if file.hole_s is None:
            file.hole_s = now_s
        if now_s - file.hole_s < self._limits.hole_s or not data.strip(b"\0"):
            return []
        file.hole_s = None
        return cut_lines(data, self._longest_line(), is_last)

    def _make_batch(self, file: LogFile, pieces: List[bytes]) -> Batch:
        """The events of pieces at the place of a file; the place moves on."""
        file.read_s = time.monotonic()
        if file.mark.offset == 0:
            self._learn_first(file, pieces[0])
        mark = file.mark
        events = LineEvents(
            self._lines,
            self._name,
            mark.offset,
            mark.line + 1,
            mark.roots(),
            lambda start: self._apart(file, start),
        )
        batch = events.of_pieces(pieces)
        last = pieces[-1][-LAST_BYTES:]
        crc = None
        if mark.crc is not None:
            crc = zlib.crc32(b"".join(pieces), mark.crc)
        file.mark = mark._replace(
            offset=events.offset,
            line=events.line - 1,
            last_size=len(last),
            last_crc=zlib.crc32(last),
            crc=crc,
            **events.roots._asdict(),
        )
        file.note_time()
        return batch._replace(place=self.place())

    def _learn_first(self, file: LogFile, first: bytes) -> None:
        """Make the root of what comes before the first line with a time.

        A first line without a time may be that of all files; so the inode is in it.
        """
        text = first.strip(b"\0\r\n")
        root = line_id(hash_of_log(self._name), f"file {file.mark.inode}", 0, text)
        root = self._apart(file, root)
        file.mark = file.mark._replace(first=root, anchor=root)

    def _apart(self, file: LogFile, root: str) -> str:
        """A root of `file` that no other file of the log has.

        A line that comes again in a new file is a new line.
        """
        used: List[str] = []
        for other in self._files:
            if other is not file:
                used.extend((other.mark.first, other.mark.start))
        return tell_apart(root, used, f"{self._salt}~{file.mark.inode}")

    def _leave(self, file: LogFile) -> None:
        """A file was read to its end: close it, unless late lines may come."""
        assert file.bytes is not None
        if not file.mark.is_rotated:
            return
        if file.bytes.is_gzip:
            file.note_time()
            file.mark = file.mark._replace(done=True)
            file.close()
        elif file.idle_s() >= self._limits.kept_s and file.is_removed():
            # As long as it has a name, its writer may come back to it.
            file.close()

    def _leave_unreadable(self, file: LogFile, error: OSError) -> None:
        """A file cannot be read on. What is no whole gzip will never be; else raise."""
        assert file.bytes is not None
        is_gzip = file.bytes.is_gzip
        file.close()
        if not is_gzip:
            # A stale handle of a network file system, a bad sector: the next call opens
            # the file again.
            file.is_waiting = True
            raise error
        self._give_up(file, f"{_reason(error)}, and was read up to byte {file.mark.offset:,}")

    def _open_waiting(self, file: LogFile) -> None:
        """Find a file again whose turn has come. Raises OSError."""
        file.is_waiting = False
        if self._open_where_it_was(file):
            return
        self._is_settled = False
        self.look()
        if file.bytes is not None:
            return
        if not self._is_settled or self._unopened or self._undecided:
            file.is_waiting = True
            return
        missing = f"{file.seen_size:,} bytes are missing"
        self._give_up(file, f"was removed before it was read: {missing}")

    def _open_where_it_was(self, file: LogFile) -> bool:
        """Whether a closed file has the name yet that it had, and is open now."""
        with contextlib.suppress(OSError):
            entry = _Entry(file.path, os.stat(file.path))
            if entry.status.st_ino == file.mark.inode:
                return self._reopen_as(file, entry)
        return False

    def _give_up(self, file: LogFile, reason: str) -> None:
        """Leave a file that will never be read, and say so."""
        file.mark = file.mark._replace(done=True)
        text = f"{file.path}: {reason}"
        if self._follows:
            _tell(text + "; it is left out")
        else:
            self.failures.append(text)


class UnreadableText(ClientError):
    """What a stream brings is no text; the message says what it is."""

    def __init__(self, message: str, read_bytes: int) -> None:
        super().__init__(message)
        self.read_bytes = read_bytes  # what has been read of the stream, and is lost


def why_no_text(data: bytes) -> str:
    """Why what begins so cannot be sent as lines; "" if it can.

    >>> why_no_text(b"one\\ntwo\\n")
    ''
    """
    if data.startswith(UTF16_BOMS) or _is_utf_16(data[:UTF16_BYTES]):
        return "is UTF-16, not UTF-8: convert it first, for example with iconv"
    if data.startswith(GZIP_MAGIC):
        return "is gzip: inflate it first, for example with zcat"
    return ""


def _is_utf_16(head: bytes) -> bool:
    r"""Whether text begins as ASCII does in UTF-16: every other byte is a NUL.

    >>> _is_utf_16(b"d\0i\0s\0k\0"), _is_utf_16(b"\0\0\0\0one\n")
    (True, False)
    """
    for first in (0, 1):
        characters, nuls = head[first::2], head[1 - first :: 2]
        if len(head) >= 4 and all(characters) and not any(nuls):
            return True
    return False


# ---- F. Publish ----
#
# Three sources make batches: files that are read once from start to end; a log with a
# place or a follower, which is all its files; and a stream, which cannot be read again,
# so that its lines get random ids and no place.


class PublishSettings(NamedTuple):
    """What `publish` is told."""

    files: Tuple[str, ...] = ()  # none, or "-": standard input
    url: Any = None  # of parse_address
    token: str = ""
    token_file: str = ""
    state: str = ""
    topic: str = ""  # "": lines are events as JSON
    source: str = ""  # "": the name of this host
    ids: str = ""  # "", given, random, offset
    time: str = "line"  # line, arrival
    follow: bool = False
    timeout_us: int = 0  # 0: wait for ever
    limits: ClientLimits = ClientLimits()


def publish(settings: PublishSettings) -> int:
    """Lines of files or of standard input, to a service; the exit status.

    0: all is acknowledged. 1: something was refused or taken by another event, or a
    file could not be read. Raises ClientError for settings that do not fit and for
    answers that no repetition changes; but with `follow` such answers are waited out.
    """
    names = settings.files or ("-",)
    _check_publish_settings(settings, names)
    place_file = None
    if settings.state:
        place_file = PlaceFile(settings.state, os.path.abspath(names[0]), settings.follow)
    report = Report("line", place_file, "bytes")
    place = report.load()
    failures: List[str] = []
    if settings.follow and _is_stream(names[0]):
        source = _batches_of_pipe(names[0], settings, report)
    elif settings.follow or settings.state:
        source = _batches_of_log(names[0], settings, report, place, failures)
    else:
        source = _batches_of_files(names, settings, failures)
    remote = Remote(
        settings.url,
        settings.token,
        report.waits,
        patience_s=_patience_s(settings.timeout_us),
        limits=settings.limits,
        token_file=settings.token_file,
    )
    status = carry(source, remote, report, PUBLISH_EVENTS, settings.follow)
    for failure in failures:
        _tell(failure)
        status = 1
    return status


def _check_publish_settings(settings: PublishSettings, names: Sequence[str]) -> None:
    """Raises ClientError for what does not go together."""
    streams = [name for name in names if _is_stream(name)]
    keeps = settings.state or settings.follow
    if settings.topic and settings.ids == "given":
        raise ClientError("--ids given is for events as JSON: leave out --topic")
    if not settings.topic and settings.ids in ("random", "offset"):
        raise ClientError(
            "events as JSON have ids of their own: --ids random and offset need --topic"
        )
    if keeps and (len(names) > 1 or "-" in names):
        raise ClientError("--state and --follow take one FILE, and not standard input")
    if settings.state and streams:
        raise ClientError(
            f"{streams[0]} is no regular file: what was read from it is gone, so there is no"
            " place to go on from; leave out --state"
        )
    if settings.ids == "offset" and streams:
        raise ClientError("a pipe has no offsets: --ids offset needs a regular FILE")
    if settings.timeout_us and settings.follow:
        raise ClientError("--follow waits for ever: --timeout is for a run that ends")


def _patience_s(timeout_us: int) -> float:
    """How long to wait for a service."""
    if timeout_us == 0:
        return float("inf")
    return timeout_us / 1_000_000


def _is_stream(name: str) -> bool:
    """Whether this can be read only once: a pipe, a terminal, standard input."""
    if name == "-":
        return True
    try:
        mode = os.stat(name).st_mode
    except OSError:
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


def _line_settings(settings: PublishSettings, is_stream: bool) -> LineSettings:
    """What is made of the lines of one FILE."""
    import socket

    ids = settings.ids
    if not settings.topic:
        ids = "given"
    elif not ids and is_stream:
        ids = "random"
    elif not ids:
        ids = "offset"
    source = settings.source or socket.gethostname()
    return LineSettings(settings.topic, source, ids, settings.time)


def _batches_of_files(
    names: Sequence[str], settings: PublishSettings, failures: List[str]
) -> Iterator[Batch]:
    """All lines of several files. One that cannot be read does not stop the others."""
    for name in names:
        try:
            if _is_stream(name):
                yield from _batches_of_stream(name, settings)
            else:
                lines = _line_settings(settings, is_stream=False)
                log = Log(name, lines, settings.limits, is_alone=True)
                yield from _read_to_the_end(log, failures)
        except (OSError, UnreadableText) as error:
            failures.append(_reason(error))


def _read_to_the_end(log: Log, failures: List[str]) -> Iterator[Batch]:
    """What a log holds now. Raises OSError."""
    log.look_until_settled()
    while True:
        batch = log.read()
        if batch is None:
            failures.extend(log.failures)
            return
        yield batch


def _batches_of_stream(name: str, settings: PublishSettings) -> Iterator[Batch]:
    """What comes out of a pipe or a terminal, to its end."""
    with _open_stream(name) as file:
        yield from _batches_of_open_stream(file, name, settings)


def _batches_of_open_stream(file: Any, name: str, settings: PublishSettings) -> Iterator[Batch]:
    """The same of an open stream. Raises UnreadableText."""
    lines = _line_settings(settings, is_stream=True)
    events = LineEvents(lines)
    longest = settings.limits.line_bytes
    if lines.ids == "given":
        longest = MAX_EVENT_BYTES
    rest = b""
    while True:
        data = file.read(settings.limits.read_bytes)
        if not data and not settings.follow:
            # The last lines may wait long for the service. Who opens a named pipe
            # meanwhile waits for its next reader, and writes nothing that nobody reads.
            file.close()
        rest += data
        pieces = cut_lines(rest, longest, final=not data)
        if events.offset == 0 and pieces and why_no_text(rest):
            raise UnreadableText(f"{name}: {why_no_text(rest)}", len(rest))
        if pieces:
            yield events.of_pieces(pieces)
            rest = rest[sum(map(len, pieces)) :]
        if not data:
            return


def _open_stream(name: str) -> Any:
    """A stream, unbuffered, so that lines are sent as they come."""
    if name == "-":
        return open(0, "rb", buffering=0, closefd=False)
    return open(name, "rb", buffering=0)


def _batches_of_pipe(name: str, settings: PublishSettings, report: Report) -> Iterator[Batch]:
    """What comes out of a named pipe, from one writer after the other, for ever."""
    while True:
        try:
            pipe = _open_pipe(name)
            report.waits("", "read")
            yield from _batches_of_writers(pipe, name, settings)
        except OSError as error:
            report.waits(_reason(error), "read")
        time.sleep(settings.limits.poll_s)


def _open_pipe(name: str) -> Any:
    """A named pipe, opened without waiting for a writer. Raises OSError."""
    os.stat(name)
    if not _is_stream(name):
        raise OSError(errno.ESPIPE, "is no pipe any more", name)
    if not os.access(name, os.R_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), name)
    return open(name, "rb", buffering=0, opener=_open_at_once)


def _batches_of_writers(pipe: Any, name: str, settings: PublishSettings) -> Iterator[Batch]:
    """What writers put into an open pipe and its successors. Raises OSError.

    When a writer has gone, the pipe is opened once more before it is closed. It must be
    opened anew, because a pipe whose writer has gone cannot be waited for. It must not
    be closed before, because to close a pipe is to throw away what it holds, and the
    next writer may have written already.
    """
    while pipe is not None:
        successor = None
        with pipe:
            while not _has_something(pipe, settings.limits.poll_s):
                # Nobody opens a pipe that has lost its name: what it holds is the last.
                if not _is_named(pipe, name) and not _has_something(pipe, 0):
                    return
            os.set_blocking(pipe.fileno(), True)
            came = False
            for batch in _batches_of_writer(pipe, name, settings):
                came = True
                yield batch
            with contextlib.suppress(OSError):
                successor = _open_pipe(name)
            if not _is_named(pipe, name) and _has_something(pipe, 0):
                yield from _batches_of_writer(pipe, name, settings)
        if not came:
            # Not every system waits for a writer.
            time.sleep(settings.limits.poll_s)
        pipe = successor


def _has_something(pipe: Any, timeout_s: float) -> bool:
    """Whether an open pipe has something to read, or its writer has gone."""
    import select

    return bool(select.select([pipe], [], [], timeout_s)[0])


def _is_named(pipe: Any, name: str) -> bool:
    """Whether a name leads to an open pipe."""
    try:
        return os.path.samestat(os.stat(name), os.fstat(pipe.fileno()))
    except OSError:
        return False


def _batches_of_writer(pipe: Any, name: str, settings: PublishSettings) -> Iterator[Batch]:
    """What an open pipe holds until nobody has it open for writing. Raises OSError.

    If it is no text, all of it is left out. So the next writer does not follow on it.
    """
    try:
        yield from _batches_of_open_stream(pipe, name, settings)
    except UnreadableText as error:
        _tell(f"{error}; it is left out")
        left_out = error.read_bytes
        while True:
            data = pipe.read(settings.limits.read_bytes)
            if not data:
                break
            left_out += len(data)
        _tell(f"{name}: {left_out:,} bytes were left out")


def _batches_of_log(
    name: str, settings: PublishSettings, report: Report, place: Any, failures: List[str]
) -> Iterator[Batch]:
    """What a log has behind a place; with `follow` also what it gets."""
    import threading

    log = Log(
        name,
        _line_settings(settings, is_stream=False),
        settings.limits,
        read_marks(place),
        follows=settings.follow,
        salt=read_salt(place),
        reads_older=bool(settings.state) and not isinstance(place, list),
        keeps_place=bool(settings.state),
    )
    report.lag = lambda: log.unread(report.place)
    if not settings.follow:
        yield from _read_to_the_end(log, failures)
        return
    threading.Thread(target=_watch, args=(log, settings.limits, report), daemon=True).start()
    trouble = ""
    while True:
        batch = None
        before = trouble
        try:
            batch = log.read()
            trouble = ""
        except OSError as error:
            trouble = _reason(error)
        if trouble != before:
            report.waits(trouble, "read")
        if batch is None:
            time.sleep(settings.limits.poll_s)
        else:
            yield batch


def _watch(log: Log, limits: ClientLimits, report: Report) -> None:
    """A thread: look at a followed log for ever."""
    try:
        while True:
            report.waits(_look_once(log), "file")
            time.sleep(limits.poll_s)
    except Exception as error:
        # A bug. To go on without looking would be to miss every rotation in silence.
        log.bug = repr(error)
        raise


def _look_once(log: Log) -> str:
    """Look for what has come; the trouble with that, or ""."""
    try:
        log.look()
        return log.trouble()
    except OSError as error:
        return _reason(error)


def read_marks(place: Any) -> List[Mark]:
    """The marks in a place of ours, or of version 1.0.0. Raises ClientError."""
    if place is None:
        return []
    try:
        if isinstance(place, list):
            inode, offset, line, size, crc = place[:5]
            return [Mark(1, inode, offset, line, last_size=size, last_crc=crc)]
        return [Mark(**saved) for saved in place["files"]]
    except (KeyError, TypeError, ValueError):
        raise ClientError("the place is of another version: remove it to start anew")


def read_salt(place: Any) -> str:
    """The salt in a place of ours; "" if there is none."""
    if not isinstance(place, dict):
        return ""
    return str(place.get("salt", ""))


# ---- G. Relay ----
#
# A relay follows the live tail of one service and publishes what comes to another. The
# seq is its cursor. But a seq is a number in one log: after a restore from a backup the
# same numbers stand for other events, and a relay that trusts its cursor skips as many
# as were lost. So the place holds the last event itself, and each new connection begins
# with the question whether the log still holds that event at that seq.


class RelaySettings(NamedTuple):
    """What `relay` is told."""

    from_url: Any = None  # of parse_address
    to_url: Any = None
    token_from: str = ""
    token_to: str = ""
    token_from_file: str = ""
    token_to_file: str = ""
    topic: str = ""  # "": all
    state: str = ""
    once: bool = False
    timeout_us: int = 0  # 0: wait for ever
    limits: ClientLimits = ClientLimits()


class RelayPlace(NamedTuple):
    """The last event that was passed on: its seq, and by what it is known again."""

    seq: int = 0
    topic: str = ""
    event_id: str = ""
    processed_at: str = ""


def relay(settings: RelaySettings) -> int:
    """All that one service has and gets, in order, to another; the exit status.

    With `once` it ends when all is passed on that was there. Else it ends by a signal.
    """
    from urllib.parse import quote

    if not settings.from_url or not settings.to_url:
        raise ClientError("a relay needs --from URL and --to URL")
    if settings.timeout_us and not settings.once:
        raise ClientError("a relay waits for ever: --timeout goes with --once")
    topic = ""
    if settings.topic:
        topic = "&topic=" + quote(settings.topic)
    place_file = None
    if settings.state:
        of = settings.from_url.geturl() + topic
        place_file = PlaceFile(settings.state, of, not settings.once)
    report = Report("seq", place_file, "seqs")
    first = read_relay_place(report.load())
    patience_s = _patience_s(settings.timeout_us)
    source = Remote(
        settings.from_url,
        settings.token_from,
        lambda trouble: report.waits(trouble, "from"),
        patience_s,
        TAIL_TIMEOUT_S,
        settings.limits,
        settings.token_from_file,
    )
    target = Remote(
        settings.to_url,
        settings.token_to,
        lambda trouble: report.waits(trouble, "to"),
        patience_s,
        limits=settings.limits,
        token_file=settings.token_to_file,
    )
    reader = _RelayReader(source, topic, first, settings)
    report.lag = lambda: reader.place.seq - read_relay_place(report.place).seq
    return carry(reader.batches(), target, report, RELAY_EVENTS, not settings.once)


def read_relay_place(place: Any) -> RelayPlace:
    """A place of ours, or of 1.0.0, which is a seq alone. Raises ClientError."""
    if place is None:
        return RelayPlace()
    try:
        if isinstance(place, list):
            return RelayPlace(int(place[0]))
        return RelayPlace(**place)
    except (IndexError, TypeError, ValueError):
        raise ClientError("the place is of another version: remove it to start anew")


class _RelayReader:
    """Reads the log of a service from a place on, whatever happens to either."""

    def __init__(
        self, source: Remote, topic: str, place: RelayPlace, settings: RelaySettings
    ) -> None:
        self.place = place
        self._source = source
        self._topic = topic  # for the query
        self._url = settings.from_url.geturl()
        self._once = settings.once
        self._patience_s = _patience_s(settings.timeout_us)
        self._read_s = time.monotonic()
        self._backoff = _Backoff(source.limits)

    def batches(self) -> Iterator[Batch]:
        """Events with the place behind them. Raises ClientError if it cannot go on."""
        while True:
            try:
                yield from self._connected()
                if self._once:
                    return
            except Reply as answer:
                if self._gone(answer):
                    continue
                self._wait_out(answer)
            except ClientError as error:
                self._wait_out(error)
            except OSError as error:
                if time.monotonic() - self._read_s >= self._patience_s:
                    raise ClientError(_reason(error))
                self._source.waits(str(error))
            except (ValueError, KeyError, TypeError):
                self._wait_out(ClientError(f"{self._url}: sends no events in NDJSON"))
            # `ask` has pauses of its own. These are for a service that answers and then
            # breaks off.
            self._backoff.pause()

    def _wait_out(self, error: ClientError) -> None:
        """Go on after an answer that should stay the same, unless this run must end."""
        if self._once:
            raise error
        self._source.waits(str(error))

    def _connected(self) -> Iterator[Batch]:
        """What one connection brings. Ends where all is read, if this runs `once`."""
        self._check_log()
        newest = None
        if self._once:
            newest = self._newest_seq()
            if self.place.seq >= newest:
                return
        target = f"/events?follow=1&after={self.place.seq}{self._topic}"
        for lines in self._source.lines(target):
            self._read_s = time.monotonic()
            self._backoff = _Backoff(self._source.limits)
            if lines:
                yield self._batch(lines)
            # With a topic the newest may be none of ours: then silence is the end.
            if newest is not None and (not lines or self.place.seq >= newest):
                return

    def _batch(self, lines: List[bytes]) -> Batch:
        """Events as they came. Raises ValueError, KeyError, TypeError for others."""
        seqs = [int(json.loads(line)["seq"]) for line in lines]
        last = json.loads(lines[-1])
        self.place = RelayPlace(
            seqs[-1], last["topic"], last["event_id"], last.get("processed_at", "")
        )
        return Batch(lines, seqs, self.place._asdict())

    def _newest_seq(self) -> int:
        """The seq that the log ends with. Raises Reply, KeyError."""
        answer = self._source.ask("GET", "/stats")
        if answer.status != 200:
            raise answer
        return int(answer.value["unique_processed"])

    def _check_log(self) -> None:
        """Look whether the log still holds the last event at its seq; else start over.

        A seq means something in one log only. A service that was restored from a
        backup, or begun anew, counts other events with the same seqs.
        """
        from urllib.parse import quote

        place = self.place
        if not place.event_id:
            return
        topic = quote(place.topic, safe="/")
        answer = self._source.ask("GET", f"/events/{topic}/{quote(place.event_id, safe='')}")
        if answer.status == 200:
            found = answer.value
            if found.get("seq") == place.seq and found.get("processed_at") == place.processed_at:
                return
        elif answer.status == 410:  # removed by retention: it was there
            return
        elif not answer.is_problem("no-such-event"):
            raise answer
        self._start_over(f"does not hold the event that was seq {place.seq}")

    def _start_over(self, reason: str) -> None:
        """Say so, and read the log from its beginning."""
        _tell(
            f"{self._url}: {reason}: this is another log, restored or new."
            " Starting over from its beginning; repeats are harmless"
        )
        self.place = RelayPlace()

    def _gone(self, answer: Reply) -> bool:
        """Whether the answer is: the log lacks your place, go on elsewhere."""
        seq = self.place.seq
        if answer.status == 400 and seq > 0:
            self._start_over(f"has no seq {seq} yet")
            return True
        oldest = answer.value.get("oldest_seq")
        if answer.status != 410 or not isinstance(oldest, int) or oldest <= seq + 1:
            return False
        count = oldest - 1 - seq
        text = f"GONE: {count:,} seqs, {seq + 1} to {oldest - 1}, removed before they were relayed"
        if self._topic:
            text += "; how many of them were of the topic is not known"
        _tell(text)
        self.place = RelayPlace(oldest - 1)
        return True


# ============================================================================
# §13  Drill, health: does the service keep its promises, and can it store right now?
#
# A drill publishes events out of order and with repeats, kills the service under this
# load, and then reads everything back. What was acknowledged must be stored, once, and
# unchanged. Health asks one question and makes an exit status of the answer.
#
# Knows §1 and §12, and of the service its HTTP face.
#
#   * An event of a drill can be made again from its number alone. So what comes back is
#     compared with what was sent, and nothing but one byte for each event is kept.
#   * An event counts as acknowledged only once the service has said 202.
#   * While kills are to come there is something to send: no kill hits an idle service.
#
# What a kill can do to a request, and what the drill expects:
#
#      before the commit     no answer; the sender repeats; the event is new, once
#      after the commit,     no answer; the sender repeats; the repeat is a duplicate
#        before the answer
#      after the answer      the event is stored, whatever happens later
#
# The senders are the same code as `aggregator.py publish` (§12): `deliver` repeats a
# batch until it is answered. So the drill also tests the publisher's half.
#
# Simpler than a production system: a kill ends the process, not the machine. What a
# power cut takes with it, a drill does not see.
# ============================================================================

# Topics that the events of a drill are spread over. A prime, so that batches of a round
# number hold all of them.
DRILL_TOPICS = 7
# An event is sent at most about so many places earlier or later than its number says.
DRILL_DISORDER = 1000
# Seconds that a node behind a balancer may lag (§14).
DRILL_LAG_S = 2.0
# Seconds without an answer after which a drill gives up. A start after a kill takes
# about one.
DRILL_PATIENCE_S = 60.0
# Longest pause in seconds between two looks at a running drill. A random part of it
# passes, so that kills hit the service at all moments of its work.
DRILL_PAUSE_S = 0.05
# Seconds that `health` waits for an answer. The image's HEALTHCHECK waits 8.
HEALTH_TIMEOUT_S = 5.0
# Seconds after which a place is too old. Who follows a file writes it every STATUS_S.
PLACE_FRESH_S = 60
# Characters of the longest bar in the histogram of latencies.
HISTOGRAM_WIDTH = 48


class DrillSettings(NamedTuple):
    """What `aggregator.py drill` is asked for."""

    events: int
    # The share of repeats in all that is sent, from 0 to below 1.
    duplicates: float
    batch: int  # events of one request
    connections: int  # senders, each a thread
    kill9: int  # how often the service is killed
    # A service that runs (urllib.parse.SplitResult). None: the drill starts its own.
    url: Any = None
    token: str = ""


class HealthSettings(NamedTuple):
    """What `aggregator.py health` is asked for."""

    # The service (urllib.parse.SplitResult).
    url: Any
    # The place of a publisher or a relay, to be looked at instead.
    state: str = ""


class DrillEvents(NamedTuple):
    """The events of one drill. Each can be made from its number, 0 to `total` - 1.

    >>> events = DrillEvents("drill/x", start_us=0, total=10)
    >>> event = events.event(8)
    >>> event["topic"], event["event_id"]
    ('drill/x/1', 'f1bbcd88-8')
    >>> [events.is_as_sent({**event, **more}) for more in ({"seq": 3}, {"source": ""})]
    [True, False]
    """

    # The beginning of its topics. It is random, so drills on one service do not meet.
    name: str
    # The timestamp of the first, in microseconds since 1970 UTC.
    start_us: int
    total: int

    def event(self, number: int) -> Dict[str, Any]:
        """An event as it is sent, and as it must be read."""
        # Knuth's multiplicative hash: ids in no order, as a publisher's usually are.
        scattered = number * 2654435761 % 2**32
        return {
            "topic": f"{self.name}/{number % DRILL_TOPICS}",
            "event_id": f"{scattered:08x}-{number}",
            "source": "drill",
            "timestamp": format_timestamp(self.start_us + number * 1000),
            "payload": {"n": number, "text": "drill " * (number % 9)},
        }

    def is_as_sent(self, row: Dict[str, Any]) -> bool:
        """Whether an event that was read back is one of this drill, and unchanged.

        The service adds fields (seq, processed_at). Those that were sent must be there
        as they were sent.
        """
        number = row["payload"].get("n")
        if type(number) is not int or not 0 <= number < self.total:
            return False
        return self.event(number).items() <= row.items()


def drill_order(events: int, repeats: float) -> List[int]:
    """Numbers of events in the order they are sent: somewhat shuffled, some repeated.

    `repeats` is the share of repeats in all that is sent, so there are
    events · repeats / (1 - repeats) of them.
    """
    import random

    numbers = list(range(events))
    # If s is the share of repeats, then r repeats are r / (events + r) = s of all.
    numbers += random.choices(range(events), k=int(events * repeats / (1 - repeats)))
    # Each number moves back by a random distance. So repeats come near the first, and
    # mostly not right after it.
    numbers.sort(key=lambda number: number + random.uniform(0, DRILL_DISORDER))
    return numbers


class DrillLoad:
    """What the senders of a drill share: what is to be sent, and what became of it.

    Each sender is a thread with a connection of its own. The lock guards all fields. A
    sender holds it while it takes a batch and while it settles one. It never holds it
    while it waits for an answer.
    """

    def __init__(self, events: DrillEvents, order: Sequence[int], kills: int) -> None:
        import threading

        self.events = events
        self.report = Report("event")
        # By the number of an event: 1 once the service has said 202.
        self.acknowledged = bytearray(events.total)
        # How long each request took until it was answered.
        self.seconds: List[float] = []
        # `send_and_kill` counts it down. Until it is 0, the senders go on.
        self.kills_to_come = kills
        # The first error that a sender cannot go on with; it stops the others, too.
        self.failure: Optional[Exception] = None
        # Numbers still to be sent. Senders take them from the front.
        self._order = deque(order)
        self._lock = threading.Lock()

    def send_all(self, remote: Remote, batch: int) -> None:
        """The work of one sender, until nothing is left or something is wrong."""
        try:
            while self.failure is None:
                numbers = self._take_numbers(batch)
                if not numbers:
                    return
                self._send_batch(remote, numbers)
        except Exception as error:
            # `send_and_kill`, which waits for the senders, raises it.
            self.failure = error

    def _take_numbers(self, most: int) -> List[int]:
        """Numbers of the next batch; none once all was sent and no kill is to come.

        When everything has been sent and kills are still to come, random events are
        sent once more: all of them are repeats.
        """
        import random

        with self._lock:
            numbers: List[int] = []
            while self._order and len(numbers) < most:
                numbers.append(self._order.popleft())
            while self.kills_to_come and len(numbers) < most:
                numbers.append(random.randrange(self.events.total))
            return numbers

    def _send_batch(self, remote: Remote, numbers: Sequence[int]) -> None:
        """Send a batch until it is answered; note which events were acknowledged."""
        events = []
        for number in numbers:
            events.append(json.dumps(self.events.event(number)).encode())
        began_s = time.monotonic()
        outcome = deliver(remote, events)
        took_s = time.monotonic() - began_s
        with self._lock:
            self.seconds.append(took_s)
            self.report.settle(Batch(events, list(numbers)), outcome)
            for index, number in enumerate(numbers):
                if index not in outcome.refused:
                    self.acknowledged[number] = 1


class DrillFindings(NamedTuple):
    """What a drill found when it read everything back; counts of events."""

    acknowledged: int
    stored: int
    # Acknowledged and not there: the worst that can happen.
    lost: int
    stored_twice: int
    # There, but not as it was sent.
    stored_otherwise: int

    @property
    def are_good(self) -> bool:
        """Whether every promise was kept."""
        return self.lost == self.stored_twice == self.stored_otherwise == 0


def read_back(remote: Remote, load: DrillLoad) -> DrillFindings:
    """Read every event of the drill; compare with what was sent and acknowledged.

    An event that was never acknowledged may be there or not: nobody promised anything.
    Times are counted up to 2, because twice is already once too often.
    """
    events = load.events
    times_found = bytearray(events.total)
    otherwise = 0
    for part in range(DRILL_TOPICS):
        for lines in remote.lines(f"/events?topic={events.name}/{part}"):
            for line in lines:
                row = json.loads(line)
                if not events.is_as_sent(row):
                    otherwise += 1
                elif times_found[row["payload"]["n"]] < 2:
                    times_found[row["payload"]["n"]] += 1
    lost = 0
    for acknowledged, times in zip(load.acknowledged, times_found):
        if acknowledged and not times:
            lost += 1
    return DrillFindings(
        acknowledged=sum(load.acknowledged),
        stored=events.total - times_found.count(0),
        lost=lost,
        stored_twice=times_found.count(2),
        stored_otherwise=otherwise,
    )


def print_findings(findings: DrillFindings) -> None:
    """One line for each count, as a table."""
    for name, count in findings._asdict().items():
        print(f"{name.replace('_', ' '):<17}{count:>11,}")


def print_latencies(seconds: Sequence[float]) -> None:
    """Percentiles of the time that requests took, and a histogram of it.

    The median says how it usually is, the 99th percentile how it is when a commit does
    its housekeeping. The longest is mostly a kill and the start after it.
    """
    took_ms = sorted(each * 1000 for each in seconds)
    percentiles = []
    for share in (50, 90, 99, 100):
        value_ms = took_ms[(len(took_ms) - 1) * share // 100]
        percentiles.append(f"{value_ms:,.1f} ms ({share} %)")
    print("latency          " + ", ".join(percentiles))
    # Bucket k holds what took less than 2^k ms, and not less than 2^(k-1) ms.
    buckets = Counter(int(each).bit_length() for each in took_ms)
    fullest = max(buckets.values())
    for power in range(min(buckets), max(buckets) + 1):
        count = buckets[power]
        # Rounded up: whatever is there can be seen.
        bar = "#" * -(-HISTOGRAM_WIDTH * count // fullest)
        print(f"  < {2**power:>6,} ms{count:>15,} {bar}")


class DrilledService:
    """The service that a drill starts for itself, and kills.

    It is a process of its own, of the same program, with a store in a folder that the
    drill removes in the end.
    """

    def __init__(self, folder: str, environment: Dict[str, str]) -> None:
        import socket

        self._folder = folder
        self._environment = environment
        self._process: Any = None
        self._bytes_written = 0
        # The system gives a port that is free now. It is the same for all starts, so
        # the senders find the service again.
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self._port = str(probe.getsockname()[1])
        self.address = parse_address("127.0.0.1:" + self._port)

    def start(self) -> None:
        """Start it. Nobody waits until it listens: who asks it tries again anyway."""
        import subprocess

        store = os.path.join(self._folder, "drill.db")
        command = [sys.executable, program_path(), "serve"]
        command += ["--host", "127.0.0.1", "--port", self._port]
        command += ["--db", store, "--log-level", "ERROR"]
        self._process = subprocess.Popen(command, env=self._environment)

    def kill(self) -> None:
        """SIGKILL, which no process can hear or delay; on Windows TerminateProcess."""
        if self._process is not None:
            self._bytes_written += self._written_by_process()
            self._process.kill()
            self._process.wait()
            self._process = None

    def _written_by_process(self) -> int:
        """Bytes that the process sent to the disk (proc(5)); 0 if nobody counts."""
        try:
            with open(f"/proc/{self._process.pid}/io", encoding="ascii") as file:
                counters = file.read()
        except OSError:
            return 0
        found = re.search("^write_bytes: ([0-9]+)$", counters, re.M)
        return int(found.group(1)) if found else 0

    def bytes_written(self) -> int:
        """Bytes that all killed processes sent to the disk; 0 if nobody knows.

        It tells what the design of §2 is about: how much is written for each event.
        """
        return self._bytes_written


def send_and_kill(
    load: DrillLoad, remotes: Sequence[Remote], batch: int, service: Optional[DrilledService]
) -> float:
    """Let the senders send everything, and kill `service` on the way.

    Returns the seconds that it took. Raises what a sender cannot go on with:
    ClientError or OSError.
    """
    import random
    import threading

    threads = []
    for remote in remotes:
        threads.append(threading.Thread(target=load.send_all, args=(remote, batch), daemon=True))
    began_s = time.monotonic()
    for thread in threads:
        thread.start()
    # Events between two kills, at most. The next kill comes after a random number of
    # them, on the average half as many. So all kills fit the load on the average.
    apart = 2 * load.events.total // (load.kills_to_come + 1) + 1
    next_kill = random.randrange(1, apart)
    while any(thread.is_alive() for thread in threads):
        time.sleep(random.uniform(0, DRILL_PAUSE_S))
        load.report.show()
        sent = load.report.counts["sent"]
        if service is not None and load.kills_to_come and sent >= next_kill:
            service.kill()
            service.start()
            load.kills_to_come -= 1
            next_kill = sent + random.randrange(1, apart)
    took_s = time.monotonic() - began_s
    load.report.show(end=True)
    if load.failure is not None:
        raise load.failure
    return took_s


def drill(settings: DrillSettings, environment: Dict[str, str]) -> int:
    """`aggregator.py drill`: publish under load, kill, and read everything back.

    The exit status is 0 if every promise was kept, else 1. `environment` is that of the
    drill's own service. Raises ClientError and OSError where the drill cannot go on.

    In order: plan the events, start a service (unless there is one), send and kill,
    read back, compare, print. The service is killed in the end, too, however that is
    reached.
    """
    import tempfile

    if settings.url and settings.kill9:
        raise ClientError("--kill9 is for the drill's own service: leave out --url")
    events = DrillEvents("drill/" + os.urandom(4).hex(), time.time_ns() // 1000, settings.events)
    order = drill_order(settings.events, settings.duplicates)
    load = DrillLoad(events, order, settings.kill9)
    written = 0
    with contextlib.ExitStack() as cleanup:
        service: Optional[DrilledService] = None
        address = settings.url
        if not address:
            folder = cleanup.enter_context(tempfile.TemporaryDirectory())
            service = DrilledService(folder, environment)
            cleanup.callback(service.kill)
            service.start()
            address = service.address
        remotes = []
        for _ in range(settings.connections):
            remotes.append(Remote(address, settings.token, patience_s=DRILL_PATIENCE_S))
        checker = remotes[0]
        # Asked again until the service listens.
        checker.ask("GET", "/health")
        took_s = send_and_kill(load, remotes, settings.batch, service)
        findings = read_back(checker, load)
        if settings.url and findings.lost:
            # Several nodes may stand behind the URL, and one may lag for a moment.
            time.sleep(DRILL_LAG_S)
            findings = read_back(checker, load)
        if service is not None:
            service.kill()
            written = service.bytes_written()
    print_findings(findings)
    print_latencies(load.seconds)
    print(f"throughput       {load.report.counts['sent'] / took_s:>11,.0f} events/s")
    if written:
        print(f"written          {written / events.total:>11,.0f} bytes per event")
    else:
        print("written                    ? (not our process, no /proc, or no disk)")
    if load.report.counts["refused"] or not findings.are_good:
        print("BROKEN")
        return 1
    print("kept: everything acknowledged is stored, and once")
    return 0


class Health(NamedTuple):
    """Whether all is well, and a sentence about it."""

    is_good: bool
    sentence: str


def health_of_service(address: Any, timeout_s: float = HEALTH_TIMEOUT_S) -> Health:
    """Ask a service whether the next publish would be stored.

    It asks once and waits `timeout_s` at most: whoever watches will ask again.
    """
    remote = Remote(address, patience_s=0, timeout_s=timeout_s)
    try:
        answer = remote.ask("GET", "/health")
    except ClientError as error:
        return Health(False, str(error))
    if answer.value.get("status") != "ok":
        return Health(False, str(answer))
    warning = answer.value.get("warning")
    if warning:
        return Health(True, f"ok, but {warning}")
    return Health(True, "ok")


def health_of_shipper(path: str, now_us: int) -> Health:
    """Look at the place that `publish` or `relay` keeps: is it fresh, and no trouble?

    A shipper has no port to ask. But it writes its place to a file every 20 s while it
    follows something, with its lag and its last error. An old place means that it does
    not run, or hangs.

    Raises OSError if there is no such file.
    """
    with open(path, encoding="utf-8", errors="replace") as file:
        text = file.read()
    try:
        place = json.loads(text)
        written_us = parse_timestamp(place["at"])
        lag = f"{place['lag']:,} {place['unit']}"
        follows = place["follows"]
        error = place["error"]
    except (KeyError, TypeError, ValueError):
        return Health(False, f"{path}: holds no place of this version yet")
    if error:
        return Health(False, error)
    age_s = (now_us - written_us) // 1_000_000
    # How long ago a run ended that was to end tells nothing.
    if follows and age_s > PLACE_FRESH_S:
        return Health(False, f"last heard of {age_s} s ago: it does not run, or hangs")
    return Health(True, f"ok, {lag} behind")


def health(settings: HealthSettings) -> int:
    """`aggregator.py health`: 0 if all is well, else 1; and a sentence about it."""
    try:
        if settings.state:
            found = health_of_shipper(settings.state, time.time_ns() // 1000)
        else:
            found = health_of_service(settings.url)
    except OSError as error:
        found = Health(False, f"{settings.state}: {error.strerror or error}")
    print(found.sentence)
    return 0 if found.is_good else 1


# ============================================================================
# §14  More than one machine: the replicated log
#
# One store is one machine. With `--log`, several aggregators share one log, and the
# store of each stays what it is. A group of events is not committed at once. It is
# appended to the log first, as one entry. Every node reads all entries in the same
# order and applies each to its own store.
#
#      A ──append──▶  1 2 3 4 5 …  the log, in PostgreSQL, on several disks
#      B ──append──▶  │
#                     └──▶ A, B and C each apply 1, 2, 3 … to their own store
#
# Why the stores become equal: what `Store.apply` decides follows from what the store
# holds and from the entry, and from nothing else. So nodes that begin equal and apply
# the same entries in the same order stay equal. The name of this is state-machine
# replication. A total order is needed exactly here, where the nodes must agree on who
# was first. The log gives the order and knows nothing of duplicates.
#
# An acknowledged event is on two machines before its publisher hears of it: PostgreSQL
# answers a commit when a quorum of its standbys has it ("quorum commit").
#
# The trap. While no standby answers, a commit waits and nobody can see its row. If its
# server process is ended then, the row becomes visible, though it is on one disk only.
# A node that applied it would differ from the others after the next failover. So a row
# is applied only when it is proved. There are two proofs. A barrier is a commit of our
# own that began after the row was read; commits reach a standby in order. And our own
# entry, once acknowledged, proves all rows that its chain was made from.
#
# The chain of an entry is a digest of its body and of the chain before it. Each node
# computes it, too. If they differ, the log was rewound: an old backup was restored, or
# a standby that lacked entries became the primary. Then a node takes nothing more.
#
# Knows §1 to §5. Must not know HTTP.
#
#   * An entry is applied once and in its turn: the position changes in the transaction
#     that applies it. One that comes behind a later one of its writer is skipped.
#   * A publisher is answered when its entry is on the quorum and applied here.
#   * Nothing is applied, and no log is called rewound, but after a proof.
#   * A node has at most one append under way, and repeats it under the same number
#     until it knows the outcome or gives up. UNIQUE(writer, n) keeps it from being
#     stored twice.
#   * A password never stands in a message.
#
# Simpler than a production system: nodes ask for news ten times a second instead of
# being told. Passwords outside ASCII are sent as they are typed, without SASLprep (RFC
# 4013), and there is no channel binding. Failover is the business of the PostgreSQL
# side (Patroni, a managed service, or a person).
# ============================================================================

# What an entry may contain. Whatever would change a verdict gets a new version here.
ENTRY_VERSION = 1
# The types of its parts: of its head, of an event, of an order to erase.
NONE_TYPE = type(None)
ENTRY_TYPES = frozenset({(str, int, int)})
EVENT_TYPES = frozenset(
    (str, str, int, str, str, sequence_type) for sequence_type in (int, NONE_TYPE)
)
ERASURE_TYPES = frozenset(
    (str, int, id_type, bool, until_type)
    for id_type in (str, NONE_TYPE)
    for until_type in (int, NONE_TYPE)
)
# Groups that are appended and not yet applied, of one node.
LOG_GROUPS_AHEAD = 4
# Entries that one read fetches. All of them are applied in one transaction.
LOG_READ_ENTRIES = 32
# Bytes of the bodies that one read fetches, or one body, whatever it has: a slow line
# must bring them within `answer_s`.
LOG_READ_BYTES = 4 * 1024 * 1024
# How long the log keeps its entries, in seconds. A node that was away for longer needs
# a copy of another node's store.
LOG_KEEP_S = 7 * 86_400.0
# The advisory locks under which the tables are made, and old entries removed. Any
# numbers do, if all nodes have the same. They are two, because a node that connects
# must not wait for one that removes entries.
LOG_LOCK = 4711
LOG_TRIM_LOCK = 4712
# Old entries that one statement removes. It must be done well within `answer_s`.
LOG_TRIM_ENTRIES = 1000
POSTGRES_PORT = 5432
# Bytes of the longest message that we read. A body is at most a few MB.
POSTGRES_MESSAGE_MAX_BYTES = 256 * 1024 * 1024
# Rounds of SCRAM that a server may ask for. PostgreSQL asks for 4,096.
SCRAM_MAX_ROUNDS = 1_000_000
# The code of a key that exists already (PostgreSQL, appendix A).
UNIQUE_VIOLATION = "23505"
# Classes of codes that no second try changes: a wrong password, no such database, no
# right to do that. A node does not start with them. While it runs it tries again,
# because one server of several may be set up wrongly.
CONFIGURATION_CLASSES = ("28", "3D", "42")
# "Invalid authorization specification". We use it for our own refusals of a login, too.
LOGIN_REFUSED = "28000"
REWOUND = (
    "the log differs from what this node has read, from entry {position} on: it was rewound, by an"
    " old backup or by a standby that lacked entries. Nothing more is taken. Compare the nodes,"
    " choose the store to go on with, and see 'More than one machine' in the README"
)
BREAKS_SCRAM = "the server breaks the rules of SCRAM-SHA-256"
LOG_HANGS = "the log hangs, or no standby confirms: no answer"
MAY_BE_STORED = "What was sent may still be stored: send it again, with the same ids"
OTHER_BASE = (
    "the log says that it began from {now!r}, and when this node joined it said {then!r}: it was"
    " rewound, or it is another log. Nothing more is taken. Compare the nodes, choose the store to"
    " go on with, and see 'More than one machine' in the README"
)
LOG_URL_EXAMPLE = "postgres://user:password@host1,host2:5433/database?sslmode=verify-full"
SSL_MODES = ("disable", "prefer", "require", "verify-ca", "verify-full")


class LogLimits(NamedTuple):
    """The times of a node that uses a log, in seconds."""

    # A start waits so long for the log; then the service answers reads without it.
    start_s: float = 2.0
    connect_s: float = 3.0  # for one server, with TLS and password
    # For one statement; then it is tried elsewhere.
    answer_s: float = 5.0
    # For one group; then its publishers get a 503.
    give_up_s: float = 25.0
    # For each further group, while the log stays away for longer than that.
    last_try_s: float = 1.0
    retry_s: float = 0.25  # between two tries
    # Between two looks for entries of others.
    poll_s: float = 0.1
    # At least so often a barrier shows that the log lives.
    proof_s: float = 2.0
    # A reader waits for the newest entries at most so long.
    catch_up_s: float = 2.0
    trim_s: float = 60.0  # between two removals of old entries
    keep_s: float = LOG_KEEP_S


class LogUnavailable(StoreFailed):
    """The log does not answer now. Trying later may help.

    `sqlstate` is PostgreSQL's code of the refusal, or "".
    """

    outcome = "they may still be stored, and are duplicates if they are sent again"

    def __init__(self, message: str, sqlstate: str = "") -> None:
        super().__init__(message)
        self.sqlstate = sqlstate


class LogRefused(StoreError):
    """This store and this log do not go together. The message says what to do."""


# ---- Where the log is ----


# Everybody knows such URLs from libpq (PostgreSQL, "Connection URIs"), so a typo in one
# should get a sentence. But a password that is not encoded well can move any border
# between the parts. Therefore a message shows a part only when the borders are sure.


class LogServer(NamedTuple):
    """One of the servers that may hold the log."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


class LogAddress(NamedTuple):
    """What a URL says. As text it shows no password."""

    servers: Sequence[LogServer]
    user: str
    password: str
    database: str
    sslmode: str
    # A file of certificates; "" means the system's.
    root_certificate: str

    def __str__(self) -> str:
        places = ",".join(str(server) for server in self.servers)
        return f"postgres://{self.user}@{places}/{self.database}"

    def __repr__(self) -> str:
        return str(self)


def parse_log_url(url: str) -> LogAddress:
    """Where the log is, and how to get in.

    Raises ValueError with what the URL must be. The message shows no password.

    >>> address = parse_log_url("postgres://me:s%40fe@db1,db2:5433/events")
    >>> print(address, address.password, address.sslmode)
    postgres://me@db1:5432,db2:5433/events s@fe prefer
    """
    if _SURROGATE.search(url):
        raise ValueError("must be UTF-8; write any other byte as %xx")
    match = re.fullmatch(r"postgres(?:ql)?://([^/?#]*)/([^?#]*)(?:\?([^#]*))?", url)
    # The part before the last @ may hold a password, and so may everything if there is
    # no @, or if one comes late. Then no message may show a piece of it.
    if match is None or "@" not in match.group(1) or url.count("@") > 1:
        raise ValueError(
            f"must look like {LOG_URL_EXAMPLE}; in a user or password, write @ as %40, / as %2F,"
            " : as %3A, ? as %3F, # as %23 and % as %25"
        )
    authority, database, options = match.groups(default="")
    login, _, places = authority.partition("@")
    user, _, password = login.partition(":")
    if not user or not database:
        raise ValueError(f"must name a user and a database: {LOG_URL_EXAMPLE}")
    settings = {"sslmode": "prefer", "sslrootcert": ""}
    for option in filter(None, options.split("&")):
        name, _, value = option.partition("=")
        if name not in settings:
            known = " and ".join(settings)
            raise ValueError(f"has the option {name}, and there are only {known}")
        settings[name] = unquote_url(value)
    if settings["sslmode"] not in SSL_MODES:
        raise ValueError("must have an sslmode of " + ", ".join(SSL_MODES))
    return LogAddress(
        [parse_log_server(place) for place in places.split(",")],
        unquote_url(user),
        unquote_url(password),
        unquote_url(database),
        settings["sslmode"],
        settings["sslrootcert"],
    )


def parse_log_server(place: str) -> LogServer:
    """Host and port. An IPv6 address stands in brackets. Raises ValueError.

    >>> parse_log_server("[::1]:5433")
    LogServer(host='::1', port=5433)
    """
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([^\[\]:]+))(?::([0-9]{1,5}))?", place)
    if match is None:
        raise ValueError(f"has {place!r} where a host or host:port must stand")
    address, name, port = match.groups()
    server = LogServer(address or unquote_url(name), int(port or POSTGRES_PORT))
    if not 0 < server.port < 65_536:
        raise ValueError(f"has the port {port}, and ports go from 1 to 65535")
    return server


def unquote_url(text: str) -> str:
    """Undo the percent-encoding of a part of a URL (RFC 3986 §2.1)."""
    encoded = text.encode("utf-8")
    plain = re.sub(rb"%([0-9A-Fa-f]{2})", lambda pair: bytes([int(pair[1], 16)]), encoded)
    return plain.decode("utf-8", "replace")


# ---- The password: SCRAM-SHA-256 (RFC 5802, RFC 7677) ----


class Scram:
    """The client's half: it proves that it knows the password, and does not send it.

    PostgreSQL takes the user's name from the start of the connection and ignores this
    one. The example is the one of RFC 7677 §3.

    >>> scram = Scram("pencil", "rOprNGfwEbeRWgbNEkqO", user="user")
    >>> scram.first()
    b'n,,n=user,r=rOprNGfwEbeRWgbNEkqO'
    >>> nonce = b"rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0"
    >>> answer = scram.answer(b"r=" + nonce + b",s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096")
    >>> answer.partition(b",p=")[2]
    b'dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ='
    >>> scram.verify(b"v=6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4=")
    """

    def __init__(self, password: str, nonce: str, user: str = "") -> None:
        self._password = password.encode("utf-8")
        self._nonce = nonce
        self._first = f"n={user},r={nonce}"
        self._server_signature = b""

    def first(self) -> bytes:
        """The first message. `n,,` says: no channel binding."""
        return b"n,," + self._first.encode("ascii")

    def answer(self, challenge: bytes) -> bytes:
        """The answer to the server's first message. Raises LogUnavailable."""
        import hmac
        from binascii import a2b_base64

        text = challenge.decode("ascii", "replace")
        # A nonce is of printable ASCII without the comma (RFC 5802 §7).
        match = re.fullmatch(r"r=([!-+\--~]+),s=([A-Za-z0-9+/]+={0,2}),i=([0-9]{1,7})", text)
        if match is None or not match.group(1).startswith(self._nonce):
            raise LogUnavailable(BREAKS_SCRAM, LOGIN_REFUSED)
        nonce, salt_text, rounds = match.groups()
        try:
            salt = a2b_base64(salt_text)
        except ValueError:
            raise LogUnavailable(BREAKS_SCRAM, LOGIN_REFUSED)
        if not 0 < int(rounds) <= SCRAM_MAX_ROUNDS:
            raise LogUnavailable(f"the server asks for {rounds} rounds of SCRAM", LOGIN_REFUSED)
        salted = salt_password(self._password, salt, int(rounds))
        client_key = hmac.new(salted, b"Client Key", sha256).digest()
        server_key = hmac.new(salted, b"Server Key", sha256).digest()
        # "biws" is base64 of "n,,".
        without_proof = f"c=biws,r={nonce}"
        signed = f"{self._first},{text},{without_proof}".encode("ascii")
        stored_key = sha256(client_key).digest()
        signature = hmac.new(stored_key, signed, sha256).digest()
        self._server_signature = hmac.new(server_key, signed, sha256).digest()
        proof = bytes(key ^ sign for key, sign in zip(client_key, signature))
        return without_proof.encode("ascii") + b",p=" + b2a_base64(proof, newline=False)

    def verify(self, final: bytes) -> None:
        """Check that the server knows the password, too. Raises LogUnavailable."""
        if final != b"v=" + b2a_base64(self._server_signature, newline=False):
            raise LogUnavailable("the server does not know the password", LOGIN_REFUSED)


def salt_password(password: bytes, salt: bytes, rounds: int) -> bytes:
    """PBKDF2 with HMAC-SHA-256, 32 bytes (RFC 8018 §5.2)."""
    import hashlib

    derive = getattr(hashlib, "pbkdf2_hmac", None)
    if derive is None:
        # Python without OpenSSL has no such function from 3.12 on.
        return salt_password_by_hand(password, salt, rounds)
    key: bytes = derive("sha256", password, salt, rounds)
    return key


def salt_password_by_hand(password: bytes, salt: bytes, rounds: int) -> bytes:
    """The same in Python. 4,096 rounds take 8 to 19 ms."""
    import hmac

    keyed = hmac.new(password, digestmod=sha256)
    block = salt + b"\0\0\0\1"
    key = 0
    for _ in range(rounds):
        round_hash = keyed.copy()
        round_hash.update(block)
        block = round_hash.digest()
        key ^= int.from_bytes(block, "big")
    return key.to_bytes(32, "big")


# ---- One connection (PostgreSQL, "Frontend/Backend Protocol", version 3) ----
#
# A message is one byte for its kind, four bytes for the length of the rest, and the
# rest. The first message of a client has no kind. A statement goes as Parse (P: its
# text, under a name), Bind (B: its values), Execute (E) and Sync (S), all at once.
# Parse is left out when this connection has parsed it before. The server answers with
# rows (D) or an error (E), and with "ready" (Z) when the transaction has ended. So one
# statement is one round trip and one transaction.

# A cell of a result in binary form; None is NULL.
Cell = Optional[bytes]
# What a statement can be given. Text and numbers go as text, bytes in binary.
Value = Union[int, str, bytes]

PROTOCOL_3 = (3 << 16).to_bytes(4, "big")
SSL_REQUEST = b"\0\0\0\x08" + (80_877_103).to_bytes(4, "big")
# Execute of all rows, then Sync: the end of one statement.
EXECUTE_AND_SYNC = b"E\0\0\0\x09\0\0\0\0\0S\0\0\0\x04"


class PostgresError(Exception):
    """The server refused a statement, or a login."""

    def __init__(self, sentence: str, sqlstate: str) -> None:
        super().__init__(f"{sentence} (SQLSTATE {sqlstate})")
        self.sqlstate = sqlstate


def postgres_message(kind: bytes, *parts: bytes) -> bytes:
    """A message: its kind, its length, its parts."""
    body = b"".join(parts)
    return kind + (len(body) + 4).to_bytes(4, "big") + body


def bind_message(name: bytes, values: Sequence[Value]) -> bytes:
    """Bind of a prepared statement: its values, and results in binary form."""
    formats = [len(values).to_bytes(2, "big")]
    cells = [len(values).to_bytes(2, "big")]
    for value in values:
        is_binary = isinstance(value, bytes)
        cell = value if isinstance(value, bytes) else str(value).encode("utf-8")
        formats.append(b"\0\1" if is_binary else b"\0\0")
        cells += [len(cell).to_bytes(4, "big"), cell]
    return postgres_message(b"B", b"\0", name, b"\0", *formats, *cells, b"\0\1\0\1")


def read_cells(row: bytes) -> List[Cell]:
    """The cells of a DataRow.

    >>> read_cells(bytes.fromhex("0002 00000001 41 ffffffff"))
    [b'A', None]
    """
    cells: List[Cell] = []
    place = 2
    for _ in range(int.from_bytes(row[:2], "big")):
        size = int.from_bytes(row[place : place + 4], "big", signed=True)
        place += 4
        if size < 0:
            cells.append(None)
        else:
            cells.append(row[place : place + size])
            place += size
    return cells


def read_notice(body: bytes) -> Dict[str, str]:
    """The fields of an ErrorResponse or NoticeResponse, by their letters.

    >>> read_notice(b"VERROR\\0C23505\\0Mno\\0\\0")
    {'V': 'ERROR', 'C': '23505', 'M': 'no'}
    """
    fields = {}
    for field in body.split(b"\0"):
        text = field.decode("utf-8", "replace")
        if text:
            fields[text[:1]] = text[1:]
    return fields


def notice_error(fields: Dict[str, str]) -> PostgresError:
    """What the server says, as an error: its sentence, the detail and the hint."""
    sentence = ": ".join(fields[letter] for letter in "MDH" if letter in fields)
    return PostgresError(sentence, fields.get("C", ""))


def int_cell(cell: Cell) -> int:
    """An integer column."""
    assert cell is not None
    return int.from_bytes(cell, "big", signed=True)


def bytes_cell(cell: Cell) -> bytes:
    """A bytea column."""
    assert cell is not None
    return cell


async def within(timeout_s: float, work: Awaitable[_Result], complaint: str) -> _Result:
    """The result of something that must not last for long.

    When time is up, it is cancelled, and LogUnavailable is raised with the complaint.
    In any case it has ended when this returns. Not `asyncio.wait_for`, which before
    Python 3.12 can swallow a cancellation that comes together with the result.
    """
    task = asyncio.ensure_future(work)
    try:
        done, _ = await asyncio.wait([task], timeout=timeout_s)
    finally:
        # Time is up, or the caller was cancelled.
        task.cancel()
    if not done:
        await asyncio.wait([task])
    if task.cancelled():
        raise LogUnavailable(f"{complaint} within {timeout_s:.3g} s")
    return task.result()


class PostgresConnection:
    """A connection to one server. One statement at a time.

    It lives in the event loop. After LogUnavailable it is closed; after PostgresError
    it can be used on.
    """

    def __init__(self, server: LogServer, answer_s: float) -> None:
        self.server = server
        self.parameters: Dict[str, str] = {}  # what the server reports of itself
        self._loop = asyncio.get_running_loop()
        self._answer_s = answer_s
        self._reader = asyncio.StreamReader()
        self._transport: Optional[asyncio.Transport] = None
        self._prepared: Dict[str, bytes] = {}  # names by statement
        self._named = 0
        self._warning: Optional[PostgresError] = None
        self._timed_out = False

    @classmethod
    async def open(
        cls, server: LogServer, address: LogAddress, application: str, limits: LogLimits
    ) -> "PostgresConnection":
        """Connect and log in. Raises LogUnavailable and PostgresError."""
        connection = cls(server, limits.answer_s)
        opening = connection._begin_session(address, application)
        await within(limits.connect_s, opening, f"{server} did not answer")
        return connection

    async def _begin_session(self, address: LogAddress, application: str) -> None:
        """What `open` does within its time: TCP, TLS, login."""
        try:
            await self._connect()
            if address.sslmode != "disable":
                await self._secure(address)
            await self._log_in(address, application)
        except (OSError, EOFError, ValueError) as error:
            # ValueError: a name that can be no host, or what no PostgreSQL sends.
            self.close()
            raise LogUnavailable(f"{self.server}: {error}")
        except BaseException:
            self.close()
            raise

    async def _connect(self) -> None:
        # Not asyncio.open_connection: TLS begins in the middle, and streams cannot do
        # that before Python 3.11.
        self._transport, _ = await self._loop.create_connection(
            lambda: asyncio.StreamReaderProtocol(self._reader), self.server.host, self.server.port
        )

    async def _secure(self, address: LogAddress) -> None:
        """Ask for TLS. The server answers with one byte: S for yes, N for no."""
        must = address.sslmode != "prefer"
        try:
            import ssl
        except ImportError:
            if must:
                raise LogUnavailable("this Python has no ssl: use sslmode=disable", LOGIN_REFUSED)
            return
        assert self._transport is not None
        self._transport.write(SSL_REQUEST)
        answer = await self._reader.readexactly(1)
        if answer != b"S":
            if answer != b"N" or must:
                raise LogUnavailable(
                    f"{self.server} offers no TLS, and sslmode={address.sslmode}", LOGIN_REFUSED
                )
            return
        try:
            context = ssl.create_default_context(cafile=address.root_certificate or None)
        except OSError as error:
            raise LogUnavailable(
                f"sslrootcert {address.root_certificate}: {error.strerror or error}", LOGIN_REFUSED
            )
        context.check_hostname = address.sslmode == "verify-full"
        if not address.sslmode.startswith("verify"):
            context.verify_mode = ssl.CERT_NONE
        # A new reader, so bytes that came before the encryption are never looked at.
        self._reader = asyncio.StreamReader()
        protocol = asyncio.StreamReaderProtocol(self._reader)
        secured = await self._loop.start_tls(
            self._transport, protocol, context, server_hostname=self.server.host
        )
        if secured is None:
            raise ConnectionError("the connection ended while TLS began")
        protocol.connection_made(secured)
        self._transport = secured

    async def _log_in(self, address: LogAddress, application: str) -> None:
        """Say who we are, prove it, and wait until the server is ready."""
        wishes = {
            "user": address.user,
            "database": address.database,
            "application_name": application,
            "client_encoding": "UTF8",
            # Whatever the settings of the user or the database are. The first is the
            # promise itself; the second keeps appends from failing for nothing; the
            # third ends an append that waits behind one that hangs.
            "synchronous_commit": "on",
            "default_transaction_isolation": "read committed",
            "lock_timeout": str(int(self._answer_s * 800)),
        }
        fields = [f"{name}\0{value}\0".encode("utf-8") for name, value in wishes.items()]
        self._send(postgres_message(b"", PROTOCOL_3, *fields, b"\0"))
        scram = Scram(address.password, os.urandom(18).hex())
        while True:
            kind, body = await self._receive()
            if kind == b"E":
                raise notice_error(read_notice(body))
            if kind == b"R":
                self._authenticate(scram, body)
            elif kind == b"Z":
                return

    def _authenticate(self, scram: Scram, body: bytes) -> None:
        """Answer one message of the login. Raises LogUnavailable."""
        code = int.from_bytes(body[:4], "big")
        text = body[4:]
        if code == 0:  # welcome
            return
        if code == 10 and b"SCRAM-SHA-256" in text.split(b"\0"):
            first = scram.first()
            size = len(first).to_bytes(4, "big")
            self._send(postgres_message(b"p", b"SCRAM-SHA-256\0", size, first))
        elif code == 11:
            self._send(postgres_message(b"p", scram.answer(text)))
        elif code == 12:
            scram.verify(text)
        else:
            ways = {3: "a password in clear text", 5: "an MD5 password"}
            raise LogUnavailable(
                f"{self.server} asks for {ways.get(code, f'way {code} to log in')}: set"
                " password_encryption=scram-sha-256, set the password anew, and have"
                " scram-sha-256 in pg_hba.conf",
                LOGIN_REFUSED,
            )

    async def query(self, statement: str, *values: Value) -> List[List[Cell]]:
        """Run one statement in one round trip: its rows.

        Success is known when the server says that it is ready again. The answer to the
        statement itself comes before its commit. Raises PostgresError and
        LogUnavailable.
        """
        name = self._prepared.get(statement)
        parts = []
        if name is None:
            # A new name each time: the one of a statement that failed is taken.
            self._named += 1
            name = b"s%d" % self._named
            parts.append(postgres_message(b"P", name, b"\0", statement.encode("utf-8"), b"\0\0\0"))
        parts += [bind_message(name, values), EXECUTE_AND_SYNC]
        self._timed_out = False
        timer = self._loop.call_later(self._answer_s, self._time_out)
        try:
            self._send(*parts)
            rows = await self._collect_rows()
        except (OSError, EOFError, ValueError) as error:
            self.close()
            raise LogUnavailable(self._why_it_broke(error))
        except PostgresError:
            raise
        except BaseException:
            # Somebody has to read the rest of the answer, and nobody will.
            self.close()
            raise
        finally:
            timer.cancel()
        self._prepared[statement] = name
        return rows

    async def _collect_rows(self) -> List[List[Cell]]:
        """Read messages until the server is ready for the next statement.

        The kinds: D is a row, E an error, Z "ready". Those that say that a step went
        well (1, 2, C) tell nothing new.
        """
        rows: List[List[Cell]] = []
        failure: Optional[PostgresError] = None
        self._warning = None
        while True:
            try:
                kind, body = await self._receive()
            except EOFError:
                if failure is not None:
                    # A server that is shutting down says so and closes.
                    raise ConnectionError(str(failure))
                raise
            if kind == b"D":
                rows.append(read_cells(body))
            elif kind == b"E":
                failure = notice_error(read_notice(body))
            elif kind == b"Z":
                break
        # A commit that was told to wait no longer for its standbys "succeeds" with a
        # warning.
        failure = failure or self._warning
        if failure is not None:
            raise failure
        return rows

    async def _receive(self) -> Tuple[bytes, bytes]:
        """The next message. Those that may come at any time are dealt with here."""
        head = await self._reader.readexactly(5)
        size = int.from_bytes(head[1:], "big") - 4
        if not 0 <= size <= POSTGRES_MESSAGE_MAX_BYTES:
            raise ConnectionError("what answers there is no PostgreSQL")
        body = await self._reader.readexactly(size)
        kind = head[:1]
        if kind == b"S":
            name, _, value = body.decode("utf-8", "replace").partition("\0")
            self.parameters[name] = value.rstrip("\0")
        elif kind == b"N":
            fields = read_notice(body)
            if fields.get("V") == "WARNING":
                self._warning = notice_error(fields)
        return kind, body

    def _send(self, *parts: bytes) -> None:
        assert self._transport is not None
        self._transport.write(b"".join(parts))

    def _time_out(self) -> None:
        """Called by a timer. Whoever reads gets the end of the connection."""
        self._timed_out = True
        self.close()

    def _why_it_broke(self, error: Exception) -> str:
        if self._timed_out:
            return (
                f"{self.server} did not answer within {self._answer_s:g} s: it hangs, or no"
                " standby confirms"
            )
        return f"{self.server}: {error}"

    def close(self) -> None:
        """Close at once. Whoever waits for an answer gets an error."""
        if self._transport is not None:
            self._transport.abort()


class PostgresSession:
    """A connection to whichever server is the primary, opened when it is needed."""

    def __init__(self, address: LogAddress, application: str, limits: LogLimits) -> None:
        self._address = address
        self._application = application
        self._limits = limits
        self._connection: Optional[PostgresConnection] = None
        self._next_server = 0
        self.primary = ""

    async def query(self, statement: str, *values: Value) -> List[List[Cell]]:
        """Run a statement on the primary. Raises LogUnavailable.

        A key that exists already is the one error that a caller can act on: it is
        raised as PostgresError.
        """
        if self._connection is None:
            self._connection = await self._connect_to_primary()
        try:
            return await self._connection.query(statement, *values)
        except PostgresError as error:
            if error.sqlstate == UNIQUE_VIOLATION:
                raise
            server = self._connection.server
            self.drop()
            raise LogUnavailable(f"{server}: {error}", error.sqlstate)
        except BaseException:
            self.drop()
            raise

    def drop(self) -> None:
        """Close the connection. The next one is tried with the next server first."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
            self._next_server = (self._next_server + 1) % len(self._address.servers)

    async def _connect_to_primary(self) -> PostgresConnection:
        """The first server, in order, that is no standby."""
        reasons: List[str] = []
        sqlstate = ""
        for _ in self._address.servers:
            place = self._next_server
            server = self._address.servers[place]
            # However the try ends, also if it is cancelled: the next one is elsewhere.
            self._next_server = (place + 1) % len(self._address.servers)
            try:
                connection = await self._open_connection(server)
                self._next_server = place
                self.primary = str(server)
                return connection
            except PostgresError as error:
                sqlstate = error.sqlstate
                reasons.append(f"{server}: {error}")
            except LogUnavailable as error:
                sqlstate = sqlstate or error.sqlstate
                reasons.append(str(error))
        self.primary = ""
        raise LogUnavailable("no server takes entries: " + "; ".join(reasons), sqlstate)

    async def _open_connection(self, server: LogServer) -> PostgresConnection:
        """A connection to a server that is no standby, with the tables there."""
        connection = await PostgresConnection.open(
            server, self._address, self._application, self._limits
        )
        try:
            await self._refuse_standby(connection)
            await self._create_log_tables(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    async def _refuse_standby(self, connection: PostgresConnection) -> None:
        """A standby would refuse each append, and what it shows may be old."""
        standby = connection.parameters.get("in_hot_standby")
        if standby is None:
            # A server before 14 does not report it.
            answer = await connection.query("SELECT pg_is_in_recovery()")
            standby = "off" if answer == [[b"\0"]] else "on"
        if standby == "on":
            raise LogUnavailable(f"{connection.server} is a standby")

    async def _create_log_tables(self, connection: PostgresConnection) -> None:
        """Make the tables if there are none. One node at a time, hence the lock.

        They nearly always exist. So it looks first without the lock. Not by
        `to_regclass`: a server process remembers that a table was missing, and would
        not see that another has made it meanwhile. A SELECT does.
        """
        is_missing = """
            NOT EXISTS (
                SELECT
                FROM pg_tables
                WHERE tablename = 'agg_head' AND schemaname = ANY (current_schemas(false))
            )
        """
        await connection.query(
            f"""
            DO $$ BEGIN
                IF {is_missing} THEN
                    PERFORM pg_advisory_xact_lock({LOG_LOCK});
                END IF;
                IF {is_missing} THEN
                    CREATE TABLE agg_log(
                        pos bigint PRIMARY KEY,
                        writer text NOT NULL,
                        n bigint NOT NULL,
                        chain bytea NOT NULL,
                        at timestamptz NOT NULL DEFAULT now(),
                        body bytea NOT NULL,
                        UNIQUE(writer, n)
                    );
                    -- The bodies are deflated already.
                    ALTER TABLE agg_log ALTER COLUMN body SET STORAGE EXTERNAL;
                    -- One row that changes all the time, with room beside it.
                    CREATE TABLE agg_head(
                        one int PRIMARY KEY,
                        pos bigint NOT NULL,
                        chain bytea NOT NULL,
                        base text
                    ) WITH (fillfactor = 10);
                    INSERT INTO agg_head(one, pos, chain) VALUES (1, 0, '');
                END IF;
            END $$
            """
        )


# ---- The log ----
#
# Two tables. agg_log has the entries. agg_head has one row: the position and the chain
# of the newest entry, and the base. Every append changes that row, and PostgreSQL locks
# it until the commit. That is the total order: whoever has the lock is next.


class Appended(NamedTuple):
    """Where an entry stands."""

    position: int
    chain: bytes


class LogRow(NamedTuple):
    """An entry as the log has it."""

    position: int
    chain: bytes
    body: bytes


class LogStretch(NamedTuple):
    """What one read returns: the entries behind a position, and the head of the log."""

    head: int  # the position of the newest entry
    head_chain: bytes
    # The store that the log began from; "" if nobody has said so.
    base: str
    rows: List[LogRow]


class PostgresLog:
    """The log in PostgreSQL. Each method raises LogUnavailable and LogRefused.

    Appends and reads have a connection each, so a read never waits for an append that
    waits for its quorum.
    """

    def __init__(self, address: LogAddress, node: str, limits: LogLimits = LogLimits()) -> None:
        self._limits = limits
        self._appending = PostgresSession(address, f"aggregator {node}", limits)
        self._reading = PostgresSession(address, f"aggregator {node} reads", limits)
        # A number of this process for advisory locks: positive, with 31 bits.
        self._lock_number = int.from_bytes(os.urandom(4), "big") >> 1

    @property
    def primary(self) -> str:
        """The server that takes entries, as far as it is known; or ""."""
        return self._appending.primary or self._reading.primary

    async def append(self, writer: str, number: int, body: bytes) -> Appended:
        """Add an entry. Under the same number it is added once, however often asked.

        The row of agg_head is locked until the commit. So commits happen in the order
        of positions, and a rollback leaves no gap.
        """
        try:
            ((position, chain),) = await self._appending.query(
                """
                WITH head AS (
                    UPDATE agg_head
                    SET pos = pos + 1, chain = sha256(chain || $3::bytea)
                    RETURNING pos, chain
                )
                INSERT INTO agg_log(pos, writer, n, chain, body)
                SELECT pos, $1::text, $2::bigint, chain, $3::bytea
                FROM head
                RETURNING pos, chain
                """,
                writer,
                number,
                body,
            )
        except PostgresError:
            # An earlier try got through. It may be on one disk only.
            ((position, chain),) = await self._appending.query(
                "SELECT pos, chain FROM agg_log WHERE writer = $1::text AND n = $2::bigint",
                writer,
                number,
            )
            await self._raise_barrier(self._appending)
        return Appended(int_cell(position), bytes_cell(chain))

    async def read(self, after: int) -> LogStretch:
        """The entries behind a position, up to a bound. Not all may be proved."""
        found = await self._reading.query(
            """
            SELECT head.pos, head.chain, head.base, entry.pos, entry.chain, entry.body
            FROM agg_head AS head
            LEFT JOIN (
                SELECT
                    pos,
                    chain,
                    body,
                    sum(octet_length(body)) OVER (ORDER BY pos) - octet_length(body) AS bytes_before
                FROM (
                    SELECT pos, chain, body
                    FROM agg_log
                    WHERE pos > $1::bigint
                    ORDER BY pos
                    LIMIT $2::bigint
                ) AS next
            ) AS entry ON bytes_before <= $3::bigint
            ORDER BY entry.pos
            """,
            after,
            LOG_READ_ENTRIES,
            LOG_READ_BYTES,
        )
        rows = []
        for _, _, _, position, chain, body in found:
            if position is not None:
                rows.append(LogRow(int_cell(position), bytes_cell(chain), bytes_cell(body)))
        if not found:
            raise LogRefused("the table agg_head of the log is empty: the log is damaged")
        # The head stands in every row, also if there is no entry.
        head, head_chain, base, _, _, _ = found[0]
        text = (base or b"").decode("utf-8")
        return LogStretch(int_cell(head), bytes_cell(head_chain), text, rows)

    async def barrier(self) -> None:
        """Return when all that the last read saw is on the quorum."""
        await self._raise_barrier(self._reading)

    async def _raise_barrier(self, session: PostgresSession) -> None:
        """Commit a message to nobody, which waits for the quorum as any commit does.

        The lock keeps barriers that hang from filling the server with connections: a
        second one of this node ends by its lock_timeout.
        """
        await session.query(
            f"""
            SELECT pg_logical_emit_message(true, 'agg', '')
            FROM pg_advisory_xact_lock({LOG_LOCK}, $1::int)
            """,
            self._lock_number,
        )

    async def claim_base(self, base: str) -> None:
        """Write which store an empty log begins from, unless another node was first."""
        await self._reading.query(
            """
            UPDATE agg_head
            SET base = $1::text
            WHERE base IS NULL AND pos = 0
            """,
            base,
        )

    async def trim(self) -> bool:
        """Remove some old entries, the oldest first; whether there may be more.

        It does nothing while another node is doing it. The newest entry of those looked
        at stays, so the log never becomes empty. What goes is always all up to a
        position: a row that is older than one before it must not leave a gap.
        """
        ((removed,),) = await self._reading.query(
            f"""
            WITH oldest AS (
                SELECT pos, at > now() - $1::bigint * interval '1 second' AS is_young
                FROM agg_log
                ORDER BY pos
                LIMIT $2::bigint
            ),
            removed AS (
                DELETE FROM agg_log
                WHERE pos < (
                    SELECT coalesce(min(pos) FILTER (WHERE is_young), max(pos))
                    FROM oldest
                )
                AND pg_try_advisory_xact_lock({LOG_TRIM_LOCK})
                RETURNING pos
            )
            SELECT count(*) FROM removed
            """,
            int(self._limits.keep_s),
            LOG_TRIM_ENTRIES,
        )
        return int_cell(removed) >= LOG_TRIM_ENTRIES - 1

    def close(self) -> None:
        """Close both connections."""
        self._appending.drop()
        self._reading.drop()


# ---- Entries ----
#
# A body is deflated JSON:
#
#     [version, writer, number, arrival, [[topic, event_id, timestamp, source, payload,
#      sequence], …]]
#
# and, for an order to erase, the order behind that. Whatever a verdict depends on
# stands in it, above all the arrival: the clocks of two nodes differ.


class EraseOrder(NamedTuple):
    """A request to erase: one event, or what a topic held before an instant.

    `through_seq` is the newest seq when it was made: the order may come into the log
    long after it was answered with a 503, and must not erase what was stored since.
    """

    topic: str
    through_seq: int
    event_id: Optional[str] = None  # None: all events that match the rest
    prefix: bool = False  # all topics that begin so
    until_us: Optional[int] = None


class Entry(NamedTuple):
    """What an entry of the log says."""

    writer: str  # random for each start of a node
    number: int  # the writer's own count, from 1
    # The arrival of all its records, by the writer's clock.
    arrived_us: int
    records: List[Record]
    erasure: Optional[EraseOrder] = None


def next_chain(chain: bytes, body: bytes) -> bytes:
    """The chain of an entry, from the chain before it and its body."""
    return sha256(chain + body).digest()


def encode_entry(entry: Entry) -> bytes:
    """The body of an entry: deflated JSON. Keys and fingerprints are made anew."""
    events = []
    for record in entry.records:
        events.append(
            [
                record.topic,
                record.event_id,
                record.timestamp,
                record.source,
                record.payload,
                record.sequence,
            ]
        )
    value: List[Any] = [ENTRY_VERSION, entry.writer, entry.number, entry.arrived_us, events]
    if entry.erasure is not None:
        value.append(entry.erasure._asdict())
    return zlib.compress(json.dumps(value, separators=(",", ":")).encode("ascii"), 1)


def decode_entry(body: bytes) -> Entry:
    """The entry of a body. Raises LogRefused if this program cannot read it."""
    try:
        version, *rest = json.loads(zlib.decompress(body))
        if version != ENTRY_VERSION:
            raise LogRefused(
                f"the log has an entry of version {version}, and aggregator {__version__} knows"
                f" {ENTRY_VERSION}: update this node first"
            )
        writer, number, arrived_us, events, *erasures = rest
        check_types((writer, number, arrived_us), ENTRY_TYPES)
        records = []
        for fields in events:
            check_types(fields, EVENT_TYPES)
            records.append(record_of(Event(*fields)))
        erasure = None
        if erasures:
            erasure = EraseOrder(**erasures[0])
            check_types(erasure, ERASURE_TYPES)
        return Entry(writer, number, arrived_us, records, erasure)
    except (ValueError, TypeError, RecursionError, zlib.error) as error:
        raise LogRefused(f"the log has an entry that nobody can read ({error}): it is damaged")


def check_types(values: Sequence[Any], known: FrozenSet[Tuple[type, ...]]) -> None:
    """Raise ValueError if values have other types than any of those that are known.

    A wrong one would fail only where it is stored, and that would be tried for ever.
    """
    if tuple(map(type, values)) not in known:
        raise ValueError("something in it has a wrong type")


def decode_entries(bodies: Sequence[bytes]) -> List[Entry]:
    """The entries of several bodies, in order."""
    return [decode_entry(body) for body in bodies]


# ---- A node ----
#
# The life of a group here. The consumer (§5) hands it to `_commit_group`. It becomes an
# entry, is noted in `_waiting_for`, and is appended. The acknowledgement puts it into
# `_own` and wakes the follower. The follower takes all entries that come next, has the
# writer's thread apply them in one transaction, and answers the publishers of those
# that are ours. If the acknowledgement is lost, the follower finds the entry by
# reading, and answers all the same.


class _Waiting(NamedTuple):
    """An entry of this node whose publishers, or whose eraser, wait for an answer."""

    entry: Entry
    group: List[_Batch]
    erased: "Optional[asyncio.Future[Optional[int]]]"
    began_s: float


class _OwnEntry(NamedTuple):
    """An entry of this node that is in the log and not yet applied."""

    number: int
    chain: bytes
    body: bytes


class _Step(NamedTuple):
    """An entry to be applied, and who waits for it here, if anybody."""

    row: LogRow
    entry: Entry
    waiting: Optional[_Waiting]


class _Proof(NamedTuple):
    """What is known of a stretch without a barrier."""

    # So many rows of the stretch are proved by entries of our own.
    rows: int
    doubt: str  # why the stretch cannot be right, or ""


class ReplicatedPipeline(Pipeline):
    """A pipeline whose groups go through the log.

    The consumer appends: queue → `_put_into_log` → log. The follower, a task, applies
    what comes out of the log, whoever put it in, and answers those who wait for it.
    While a group is appended, the one before is applied and the next one gathers.

    Reads are local. Before one says "there is no such thing", it catches up with the
    head of the log.
    """

    def __init__(
        self,
        open_store: Callable[[], Store],
        clock_us: Callable[[], int],
        replicated_log: PostgresLog,
        node: str,
        limits: PipelineLimits = PipelineLimits(),
        read_limits: ReadLimits = ReadLimits(),
        log_limits: LogLimits = LogLimits(),
    ) -> None:
        super().__init__(open_store, clock_us, limits, read_limits)
        self.node = node
        self._log = replicated_log
        self._log_limits = log_limits
        self._writer_name = os.urandom(8).hex()
        self._number = 0  # of the last entry of this writer
        self._mark = LogMark(0, b"", 0, {})
        self._head = 0
        self._joined = False  # base and store were compared
        self._base = ""  # what the log said then
        # By number: entries that are being appended or wait to be applied. Whoever
        # takes one out answers those who wait for it.
        self._waiting_for: Dict[int, _Waiting] = {}
        # By position: what was appended and is not yet applied.
        self._own: Dict[int, _OwnEntry] = {}
        # A permit for each entry in `_waiting_for` or being applied.
        self._ahead = asyncio.Semaphore(LOG_GROUPS_AHEAD)
        # Held by the one append that is under way.
        self._append_lock = asyncio.Lock()
        # Set by an append, and by who wants to catch up; the follower waits for it.
        self._news_from_log = asyncio.Event()
        self._catching_up: List[asyncio.Future[bool]] = []
        # Why something fails, by "append", "read" and "apply".
        self._log_troubles: Dict[str, Trouble] = {}
        # Why this node takes nothing more at all.
        self._refusal = ""
        # By the loop's clock: the last proof that the log lives; when this node last
        # had all there was; the last trim.
        self._log_proven_s = 0.0
        self._level_s: Optional[float] = None
        self._trimmed_s = 0.0

    async def start(self) -> None:
        """Open the store, look at the log, and start. Raises StoreError.

        If the log is out of reach, the node starts all the same: it answers reads, and
        publishers get a 503 until the log is back.
        """
        await super().start()
        began_s = self._loop.time()
        try:
            self._mark = await self._ask_writer(self._store.log_mark)
            await within(self._log_limits.start_s, self._join_log(), "the log did not answer")
        except LogUnavailable as error:
            if error.sqlstate[:2] in CONFIGURATION_CLASSES:
                await self.stop(0.0)
                raise LogRefused(f"the log cannot be used: {error}")
            self._note_log_trouble("read", error, began_s)
        except BaseException:
            await self.stop(0.0)
            raise
        self._log_proven_s = self._trimmed_s = self._loop.time()
        self._tasks.append(self._loop.create_task(self._follow_log()))
        self._tasks.append(self._loop.create_task(self._watch_log()))

    async def stop(self, timeout_s: float) -> bool:
        """See Pipeline.stop. Before, catch up with the log, if it answers.

        So of the nodes that are stopped one after the other, the last has everything.
        That takes half of the time at most. The consumer goes on meanwhile.
        """
        began_s = self._loop.time()
        with contextlib.suppress(LogUnavailable):
            await within(timeout_s / 2, self.catch_up(), "the log did not answer")
        left_s = max(0.0, timeout_s - (self._loop.time() - began_s))
        clean = await super().stop(left_s)
        self._log.close()
        if self._joined:
            log.info("LOG - this node stands at entry %d of %d", self._mark.position, self._head)
        return clean

    # ---- Do this store and this log go together? ----

    async def _join_log(self) -> None:
        """Compare the store with the base of the log. Raises LogRefused.

        The base says which store the log began from, and how many events that store had
        decided: "ID:COUNT". The first node writes it. A node that has read nothing yet
        must be the same store in the same state, or both must be empty.

        The base, too, may be visible and on one disk only. So it is believed only after
        a barrier that began after it was read.
        """
        stretch = await self._log.read(self._mark.position)
        received = await self._ask_writer(self._store.received)
        if not stretch.base and stretch.head == self._mark.position == 0:
            # It does not go back to a log. It begins one.
            await self._become_part()
            await self._log.claim_base(f"{self._store.store_id}:{received}")
            stretch = await self._log.read(self._mark.position)
        await self._log.barrier()
        base_id, base_received = self._read_base(stretch)
        if self._mark.position == 0:
            both_empty = base_received == received == 0
            if both_empty and base_id != self._store.store_id:
                await self._ask_writer(self._store.adopt_id, base_id)
        expected = self._mark.received if self._mark.position else base_received
        if base_id != self._store.store_id:
            raise LogRefused(
                f"the log began from store {base_id}, and this is store {self._store.store_id}:"
                " start with a copy of another node's store, or with an empty one if all did"
            )
        if self._mark.was_alone:
            raise LogRefused(
                "this store has left the log: it was used without the log since. Start with a"
                " copy of another node's store"
            )
        if received != expected:
            raise LogRefused(
                f"this store has decided {received} events, and {expected} at the place in the"
                " log where it stands: it was used without the log, or the copy is too old."
                " Start with a copy of another node's store"
            )
        await self._become_part()
        self._base = stretch.base
        self._joined = True

    async def _become_part(self) -> None:
        """Note in the store that it belongs to the log."""
        await self._ask_writer(self._store.join_log)
        self._mark = self._mark._replace(was_alone=False)

    def _read_base(self, stretch: LogStretch) -> Tuple[str, int]:
        """Id and events of the store that a log began from. Raises LogRefused."""
        if not stretch.base and not stretch.head:
            raise LogRefused(
                f"the log is empty, and this store has read {self._mark.position} entries:"
                " it is another log, or it lost everything. To begin a new log with this"
                " store, see 'More than one machine' in the README"
            )
        match = re.fullmatch(r"([^:]+):([0-9]{1,18})", stretch.base)
        if match is None:
            raise LogRefused(
                f"the log has {stretch.head} entries, and its table agg_head does not say which"
                f" store they began from (base: {stretch.base!r}): the log is damaged. Restore"
                " the database, or choose the store to go on with and begin a new log with it,"
                " see 'More than one machine' in the README"
            )
        store_id, received = match.groups()
        return store_id, int(received)

    # ---- Appending ----

    async def _commit_group(self, group: List[_Batch]) -> None:
        """Put a group into the log. The follower answers its publishers."""
        records = list(itertools.chain.from_iterable(batch.records for batch in group))
        await self._put_into_log(records, None, group, None)

    async def _put_into_log(
        self,
        records: List[Record],
        erasure: Optional[EraseOrder],
        group: List[_Batch],
        erased: "Optional[asyncio.Future[Optional[int]]]",
    ) -> None:
        """Append an entry. Whoever waits for it is answered by now, or later.

        It is in `_waiting_for` before it is appended, because the follower may see it
        in the log before the append returns.
        """
        await self._ahead.acquire()
        async with self._append_lock:
            self._number += 1
            number = self._number
            began_s = self._loop.time()
            entry = Entry(self._writer_name, number, self._clock_us(), records, erasure)
            self._waiting_for[number] = _Waiting(entry, group, erased, began_s)
            body = encode_entry(entry)
            last_try_s = self._log_limits.last_try_s
            if not group and erased is None:
                # Nobody waits for a probe, so a slow log gets the time that it needs.
                last_try_s = self._log_limits.answer_s
            try:
                self._refuse_to_wait_longer(group)
                ends_s = max(
                    self._away_since_s() + self._log_limits.give_up_s, began_s + last_try_s
                )
                appended = await self._append_patiently(number, body, ends_s)
            except Exception as error:
                self._refuse(self._waiting_for.pop(number, None), error)
                return
            if appended is not None and appended.position > self._mark.position:
                self._own[appended.position] = _OwnEntry(number, appended.chain, body)
                self._news_from_log.set()

    def _refuse_to_wait_longer(self, group: List[_Batch]) -> None:
        """Raise LogUnavailable for a group that waited its time behind others.

        While the log takes no entries, each group ahead of it has had its own time.
        """
        trouble = self._log_troubles.get("append")
        if trouble is None or not group:
            return
        waited_s = self._loop.time() - min(batch.queued_s for batch in group)
        if waited_s >= self._log_limits.give_up_s:
            raise LogUnavailable(f"the log takes no entries: {trouble.reason}. Send it again")

    def _away_since_s(self) -> float:
        """Since when the log does not do all that it should; now, if it does."""
        troubles = self._log_troubles.values()
        return min((trouble.since_s for trouble in troubles), default=self._loop.time())

    async def _append_patiently(
        self, number: int, body: bytes, ends_s: float
    ) -> Optional[Appended]:
        """Append until it is known to be in the log, or time is up.

        None if the follower found it there meanwhile. Each try gets what is left of the
        time, so servers that hang do not add theirs.
        """
        if self._refusal:
            raise LogUnavailable(self._refusal)
        if "apply" in self._log_troubles:
            # The log would fill with repeats of what this node cannot store.
            raise StoreFailed(self._log_troubles["apply"].reason)
        while True:
            began_s = self._loop.time()
            try:
                self._check_reading(began_s)
                appending = self._log.append(self._writer_name, number, body)
                appended = await within(ends_s - began_s, appending, LOG_HANGS)
                self._log_troubles.pop("append", None)
                self._log_proven_s = self._loop.time()
                return appended
            except LogUnavailable as error:
                self._note_log_trouble("append", error, began_s)
                reason = str(error)
            await asyncio.sleep(self._log_limits.retry_s)
            if number not in self._waiting_for:
                return None
            if self._loop.time() >= ends_s:
                raise LogUnavailable(f"the log takes no entries: {reason}. {MAY_BE_STORED}")

    def _check_reading(self, now_s: float) -> None:
        """Raise LogUnavailable if this node could not apply what it appends.

        Otherwise the log would fill with entries whose publishers get a 503.
        """
        if not self._joined:
            raise LogUnavailable("this node has not compared its store with the log yet")
        trouble = self._log_troubles.get("read")
        if trouble is not None and now_s - trouble.since_s >= self._log_limits.give_up_s:
            raise LogUnavailable(f"the log cannot be read: {trouble.reason}")

    async def _watch_log(self) -> None:
        """Give up in time, and find out whether a log that was away takes entries.

        The probe is an entry without events. Nothing less would show it: the log may
        answer reads and barriers while it takes no entries. And a node that gets no
        publishers because it is not healthy would never be healthy again. On other
        nodes, such an entry changes nothing.
        """
        while True:
            await asyncio.sleep(self._log_limits.retry_s)
            self._refuse_late()
            # While one is waited for, that one shows it.
            if "append" in self._log_troubles and not self._waiting_for and not self._refusal:
                await self._put_into_log([], None, [], None)

    def _refuse_late(self) -> None:
        """Refuse those whose entries are in the log and do not come out in time."""
        now_s = self._loop.time()
        for own in self._own.values():
            waiting = self._waiting_for.get(own.number)
            if waiting is None or now_s - waiting.began_s < self._log_limits.give_up_s:
                continue
            reason = "what was put into the log does not come out of it"
            if "read" in self._log_troubles:
                reason += f": {self._log_troubles['read'].reason}"
            del self._waiting_for[own.number]
            self._refuse(waiting, LogUnavailable(f"{reason}. {MAY_BE_STORED}"))

    def _refuse(self, waiting: Optional[_Waiting], error: Exception) -> None:
        """Tell those who wait for an entry that it was not applied."""
        if waiting is None:
            return
        self._ahead.release()
        if waiting.group:
            self._refuse_group(waiting.group, len(waiting.entry.records), error)
        if waiting.erased is not None and not waiting.erased.done():
            waiting.erased.set_exception(StoreFailed(str(error)))

    # ---- Following ----

    async def _follow_log(self) -> None:
        """Apply what is in the log, until this task is cancelled."""
        while True:
            waiting = self._catching_up
            self._catching_up = []
            began_s = self._loop.time()
            try:
                there_is_more = await self._follow_once(bool(waiting))
                self._log_troubles.pop("apply", None)
                if there_is_more:
                    # Who waits to catch up goes on waiting.
                    self._catching_up += waiting
                    continue
                await self._trim_now_and_then()
                self._log_troubles.pop("read", None)
                self._let_go(waiting, is_level=True)
                await self._wait_for_log()
            except LogRefused as error:
                self._let_go(waiting, is_level=False)
                self._take_nothing_more(str(error))
                # Ending would look like a bug. This task waits to be cancelled.
                await self._loop.create_future()
            except Exception as error:
                # Whatever it is, the next try may go through.
                part = "read" if isinstance(error, LogUnavailable) else "apply"
                self._note_log_trouble(part, error, began_s)
                self._let_go(waiting, is_level=False)
                await asyncio.sleep(self._log_limits.retry_s)

    async def _follow_once(self, must_read: bool) -> bool:
        """Find entries, prove them, apply them. True if there may be more.

        In three cases, from cheap to dear. Our own entries come next: nothing is read.
        Entries of others come, and one of ours stands behind them: it proves them.
        Entries of others come alone: a barrier proves them.

        A barrier is also raised for whoever waits to catch up, because an old primary
        would show an old head, and now and then, to see that the log lives.
        """
        if not self._joined:
            await self._join_log()
        if not must_read:
            rows = self._own_rows()
            if rows:
                await self._apply_rows(rows)
                return True
        began_s = self._loop.time()
        # Before the read: what is appended meanwhile need not be seen by it.
        newest_own = max(self._own, default=0)
        stretch = await self._log.read(self._mark.position)
        proof = self._examine(stretch, newest_own)
        if not proof.doubt:
            self._head = stretch.head
        rows = stretch.rows[: proof.rows]
        if not rows or proof.doubt or must_read:
            is_stale = began_s - self._log_proven_s >= self._log_limits.proof_s
            if not (stretch.rows or proof.doubt or must_read or is_stale):
                return False
            await self._log.barrier()
            if proof.doubt:
                raise LogRefused(proof.doubt)
            self._log_proven_s = self._loop.time()
            rows = stretch.rows
        if rows:
            await self._apply_rows(rows)
        if self._mark.position < stretch.head:
            return True
        self._level_s = began_s
        return False

    def _own_rows(self) -> List[LogRow]:
        """Our own entries that come next. Their acknowledgement proves them."""
        rows: List[LogRow] = []
        position = self._mark.position + 1
        chain = self._mark.chain
        while position in self._own:
            own = self._own[position]
            chain = next_chain(chain, own.body)
            if chain != own.chain:
                # What we have is not what it was appended to. Reading will show why.
                break
            rows.append(LogRow(position, chain, own.body))
            position += 1
        return rows

    def _examine(self, stretch: LogStretch, newest_own: int) -> _Proof:
        """Which rows our own entries prove, and what is wrong with the stretch.

        A doubt is not a verdict yet: an old primary that has woken up shows an old log.
        A barrier decides, because that server cannot raise one.
        """
        if stretch.base != self._base:
            return _Proof(0, OTHER_BASE.format(now=stretch.base, then=self._base))
        position = self._mark.position
        chain = self._mark.chain
        proved = 0
        for count, row in enumerate(stretch.rows, 1):
            position += 1
            chain = next_chain(chain, row.body)
            if row.position != position:
                return _Proof(proved, self._too_late(row.position))
            own = self._own.get(position)
            if chain != row.chain or (own is not None and own.chain != chain):
                return _Proof(proved, REWOUND.format(position=position))
            if own is not None:
                proved = count
        if stretch.head < max(self._mark.position, newest_own):
            return _Proof(proved, REWOUND.format(position=stretch.head + 1))
        if stretch.head == position and stretch.head_chain != chain:
            return _Proof(proved, REWOUND.format(position=position))
        if stretch.head > position and not stretch.rows:
            return _Proof(proved, self._too_late(stretch.head + 1))
        return _Proof(proved, "")

    def _too_late(self, oldest: int) -> str:
        """The log does not reach back to where this store stands."""
        return (
            f"this store has read the log up to entry {self._mark.position}, and the log begins"
            f" at {oldest}: the node was away for too long. Start with a copy of another node's"
            " store"
        )

    async def _apply_rows(self, rows: List[LogRow]) -> None:
        """Apply proved rows in their order: groups together, each erasure alone."""
        # Those whom nobody but us can answer now. If it fails, they are told at once.
        # The entries stay in the log, and the next try applies them for nobody.
        taken: List[_Waiting] = []
        try:
            run: List[_Step] = []
            for step in await self._steps_of(rows, taken):
                if step.entry.erasure is None:
                    run.append(step)
                    continue
                # What is ahead of it has to be applied before anybody can tell whether
                # it is late.
                await self._apply_groups(run, taken)
                run = []
                if self._is_late(step.entry, {}):
                    run.append(step)
                else:
                    await self._apply_erasure(step, step.entry.erasure, taken)
            await self._apply_groups(run, taken)
        except Exception as error:
            for waiting in taken:
                self._refuse(waiting, error)
            raise

    async def _steps_of(self, rows: List[LogRow], taken: List[_Waiting]) -> List[_Step]:
        """Decode what is not ours. What is ours is taken from those that wait."""
        foreign: List[bytes] = []
        for row in rows:
            own = self._own.get(row.position)
            waiting = self._waiting_for.pop(own.number, None) if own is not None else None
            if waiting is None:
                foreign.append(row.body)
            else:
                taken.append(waiting)
        ours = {waiting.entry.number: waiting for waiting in taken}
        decoded: Deque[Entry] = deque()
        if foreign:
            decoded.extend(await self._ask_writer(decode_entries, foreign))
        # While it was decoded, an append may have returned: then it is in `_own` and
        # was decoded all the same.
        steps = []
        for row in rows:
            own = self._own.get(row.position)
            waiting = ours.get(own.number) if own is not None else None
            if waiting is not None:
                steps.append(_Step(row, waiting.entry, waiting))
                continue
            entry = decoded.popleft()
            if entry.writer == self._writer_name:
                # The append has not returned yet, or never will.
                waiting = self._waiting_for.pop(entry.number, None)
                if waiting is not None:
                    taken.append(waiting)
            steps.append(_Step(row, entry, waiting))
        return steps

    async def _apply_groups(self, steps: List[_Step], taken: List[_Waiting]) -> None:
        """Apply entries in one transaction, and answer those who wait for them here."""
        if not steps:
            return
        fresh: List[_Step] = []
        late: List[_Step] = []
        writers: Dict[str, int] = {}
        for step in steps:
            if self._is_late(step.entry, writers):
                late.append(step)
            else:
                writers[step.entry.writer] = step.entry.number
                fresh.append(step)
        # Those of others come onto the books before the store counts them, so the queue
        # never seems shorter than it is.
        others = sum(len(step.entry.records) for step in fresh if step.waiting is None)
        self._taken += others
        try:
            decisions = await self._apply(fresh, steps, writers)
        except BaseException:
            self._taken -= others
            raise
        for step, decision in zip(fresh, decisions):
            self._answer_waiting(step, decision, taken)
        for step in late:
            if step.waiting is not None:
                taken.remove(step.waiting)
                self._refuse(step.waiting, LogUnavailable("it came into the log too late"))
        for listener in self.commit_listeners:
            listener()

    def _is_late(self, entry: Entry, writers: Dict[str, int]) -> bool:
        """Whether it is a late try, which its writer had given up, of whatever kind.

        Its writer has put something into the log since. `writers` has the numbers that
        are about to be applied. What was answered with a 503 must not take effect
        behind what was acknowledged later: an order to erase would erase that, too.
        """
        known = writers.get(entry.writer, self._mark.writers.get(entry.writer, 0))
        return entry.number <= known

    async def _apply(
        self, fresh: List[_Step], steps: List[_Step], writers: Dict[str, int]
    ) -> List[Decision]:
        """Have the writer apply the fresh steps, and move the mark behind the last."""
        groups = [LogGroup(step.entry.records, step.entry.arrived_us) for step in fresh]
        newest = steps[-1].row
        mark = LogMark(newest.position, newest.chain, 0, writers)
        self._commit_began_s = self._loop.time()
        try:
            decisions = await self._ask_writer(self._store.apply, groups, mark, self._clock_us())
        finally:
            self._commit_began_s = None
        self._mark.writers.update(writers)
        self._mark = mark._replace(writers=self._mark.writers)
        self._head = max(self._head, mark.position)
        for position in list(self._own):
            if position <= mark.position:
                del self._own[position]
        return decisions

    def _answer_waiting(self, step: _Step, decision: Decision, taken: List[_Waiting]) -> None:
        """Tell the publishers of an entry that it is applied."""
        waiting = step.waiting
        if waiting is None:
            self.newest_seq = decision.first_seq + len(decision.fresh) - 1
            return
        taken.remove(waiting)
        self._ahead.release()
        if waiting.group:
            self._note_commit(waiting.group, step.entry.records, decision, waiting.began_s)
        if self._level_s is None or waiting.began_s > self._level_s:
            self._level_s = waiting.began_s

    async def _apply_erasure(self, step: _Step, order: EraseOrder, taken: List[_Waiting]) -> None:
        """Erase, then move the mark. A crash in between erases once more, in vain."""
        erased: Optional[int]
        if order.event_id is not None:
            erased = await super().erase_event(order.topic, order.event_id, order.through_seq)
        else:
            erased = await super().erase_matching(
                order.topic, order.prefix, order.until_us, order.through_seq
            )
        await self._apply([], [step], {step.entry.writer: step.entry.number})
        if step.waiting is not None:
            taken.remove(step.waiting)
            self._ahead.release()
            assert step.waiting.erased is not None
            if not step.waiting.erased.done():
                step.waiting.erased.set_result(erased)

    async def _wait_for_log(self) -> None:
        """Return when there is news, or when it is time to look for some.

        A timer and not `asyncio.wait_for`, which before Python 3.12 can swallow a
        cancellation that comes together with its result.
        """
        timer = self._loop.call_later(self._log_limits.poll_s, self._news_from_log.set)
        await self._news_from_log.wait()
        self._news_from_log.clear()
        timer.cancel()

    async def _trim_now_and_then(self) -> None:
        """Every node tries, and one of them gets the lock.

        If there is more to remove, it goes on at the next turn of the follower.
        """
        now_s = self._loop.time()
        if now_s - self._trimmed_s <= self._log_limits.trim_s:
            return
        self._trimmed_s = now_s
        if await self._log.trim():
            self._trimmed_s -= self._log_limits.trim_s

    def _take_nothing_more(self, reason: str) -> None:
        """The log and this store have parted. An operator decides."""
        log.error("LOG REFUSED - this node takes nothing more: %s", reason)
        self._refusal = reason
        self._log_troubles["read"] = Trouble(reason, self._loop.time())
        for number in list(self._waiting_for):
            self._refuse(self._waiting_for.pop(number), LogUnavailable(reason))

    # ---- Reading ----

    async def catch_up(self) -> bool:
        """Return when this node has applied what the log held at the call.

        If the log is out of reach, return False at once or after a moment: the answer
        is then as old as `stats` says.
        """
        if self._log_troubles:
            return False
        caught_up: asyncio.Future[bool] = self._loop.create_future()
        self._catching_up.append(caught_up)
        self._news_from_log.set()
        done, _ = await asyncio.wait([caught_up], timeout=self._log_limits.catch_up_s)
        return bool(done) and caught_up.result()

    def _let_go(self, waiting: "List[asyncio.Future[bool]]", is_level: bool) -> None:
        """Tell those who wait to catch up that they need not wait longer."""
        for caught_up in waiting:
            if not caught_up.done():
                caught_up.set_result(is_level)

    async def event(self, topic: str, event_id: str) -> Tuple[Optional[int], Optional[str]]:
        """See Pipeline.event. An event that another node has just taken is found."""
        seq, text = await super().event(topic, event_id)
        if seq is None:
            await self.catch_up()
            seq, text = await super().event(topic, event_id)
        return seq, text

    async def tail(self, query: EventQuery, after: int) -> Tail:
        """See Pipeline.tail. A cursor that another node gave out is not ahead."""
        tail = await super().tail(query, after)
        if tail.newest < after:
            await self.catch_up()
            tail = await super().tail(query, after)
        return tail

    async def stats(
        self, topics: int = STATS_MAX_NAMES, sources: int = STATS_MAX_NAMES
    ) -> Dict[str, Any]:
        """The books, and how far this node is behind the log.

        `lag_seconds` is the age of the last moment when this node is known to have had
        everything. It is null until then.
        """
        lag_s = None
        if self._level_s is not None:
            lag_s = round(self._loop.time() - self._level_s, 3)
        replication = {
            "node": self.node,
            "primary": self._log.primary,
            "position": self._mark.position,
            "head": self._head,
            "lag_entries": max(0, self._head - self._mark.position),
            "lag_seconds": lag_s,
        }
        return {**await super().stats(topics, sources), "log": replication}

    # ---- Erasing ----

    async def erase_event(
        self, topic: str, event_id: str, through_seq: Optional[int] = None
    ) -> Optional[int]:
        """Erase one event on every node; see Pipeline.erase_event."""
        if through_seq is None:
            through_seq = await self._newest_seq_of_all()
        return await self._erase_everywhere(EraseOrder(topic, through_seq, event_id))

    async def erase_matching(
        self,
        topic: str,
        prefix: bool,
        until_us: Optional[int],
        through_seq: Optional[int] = None,
    ) -> int:
        """Erase events on every node; see Pipeline.erase_matching."""
        if through_seq is None:
            through_seq = await self._newest_seq_of_all()
        order = EraseOrder(topic, through_seq, None, prefix, until_us)
        return await self._erase_everywhere(order) or 0

    async def _newest_seq_of_all(self) -> int:
        """The newest seq in the log. Raises LogUnavailable if that cannot be known.

        What any node has acknowledged by now is to be erased, and nothing later.
        """
        if not await self.catch_up():
            raise LogUnavailable("this node is behind the log, and cannot say what to erase")
        return self.newest_seq

    async def _erase_everywhere(self, order: EraseOrder) -> Optional[int]:
        """Put an order into the log; what it erased here, once it is applied here."""
        erased: asyncio.Future[Optional[int]] = self._loop.create_future()
        # A task of its own: a client that goes away must not cancel an append.
        putting = self._loop.create_task(self._put_into_log([], order, [], erased))
        try:
            await asyncio.shield(putting)
            return await erased
        finally:
            # If the client has gone, nobody is told.
            erased.cancel()

    # ---- Health ----

    def trouble(self) -> Optional[Trouble]:
        """See Pipeline.trouble. A log that does not answer is a trouble, too.

        That the log takes no entries is cleared by an entry that it takes; that it
        cannot be read, by reading; that an entry cannot be applied, by applying it.
        """
        trouble = super().trouble() or next(iter(self._log_troubles.values()), None)
        return trouble or self._trouble_of_waiting()

    def _trouble_of_waiting(self) -> Optional[Trouble]:
        """The trouble if an entry has been under way for too long, like a commit."""
        # They stand in the order of their numbers: the first has waited for the
        # longest.
        oldest = next(iter(self._waiting_for.values()), None)
        if oldest is None:
            return None
        lasts_s = self._loop.time() - oldest.began_s
        if lasts_s <= self.limits.commit_hangs_s:
            return None
        reason = f"an entry has been under way to the log and back for {lasts_s:.0f} s"
        return Trouble(f"{reason}: the log hangs", oldest.began_s)

    def _note_log_trouble(self, part: str, error: Exception, since_s: float) -> None:
        """Remember why a part fails, and since when; say it once.

        `since_s` is when the try began that failed: a server that hangs has been away
        from then on.
        """
        reason = str(error) or repr(error)
        if part in self._log_troubles:
            since_s = self._log_troubles[part].since_s
        else:
            log.warning("LOG TROUBLE - %s, will try again: %s", part, reason)
        self._log_troubles[part] = Trouble(reason, since_s)


# ============================================================================
# §15  The program: settings, check, start and stop
#
# A command is a row of one table: what it is for, its settings, the record that holds
# them, and the function that runs it. The command line, the environment and --help
# derive from it. Then everything is put together, started in order, and stopped in
# order.
#
# Knows all sections.
#
#   * A mistake is one sentence on standard error and an exit status: 2 for a setting,
#     1 for anything else. Nothing that was refused is changed.
#   * No message shows the value of a secret.
#   * The log never holds the service up: who logs does not wait for who reads the log.
#   * The first signal stops in order, within 10 s whatever hangs. A second one ends the
#     process at once. What was acknowledged is on disk in both cases.
#
# Simpler than a production system: there is no file of settings, and no setting can be
# changed while the service runs. Restart it: that takes a second and loses nothing.
# ============================================================================

# Bytes of log lines that may wait for whoever reads standard error: some 10,000 lines.
# Further lines are dropped and counted.
LOG_QUEUE_BYTES = 1024 * 1024
# Seconds that the log's thread lets lines gather after each writing. So a busy service
# pays one system call and few changes of threads for many lines.
LOG_GATHER_S = 0.1
# Seconds until the next attempt where standard error takes nothing: it does not block
# and is full, or it is a file on a full disk.
LOG_RETRY_S = 0.2
# Seconds that an ending process waits for its last lines to be written.
LOG_FLUSH_S = 0.5
# Lines of one kind, WARNING or above, that are logged in each LOG_PERIOD_S seconds: no
# stranger fills the disk with what he can cause.
LOG_LINES = 20
LOG_PERIOD_S = 10.0
# Characters of a line that stand for the others of its kind.
LOG_SAMPLE_CHARACTERS = 200

# Files and sockets that a start needs, with some to spare for the first clients: the
# store with its WAL for three connections, the lock, the socket, and what asyncio has.
DESCRIPTORS_LEAST = 32
# A thread that needs the GIL waits for it for up to one switch interval. The writer
# needs it again after each SQL statement; Python's 5 ms would be all of its time.
SWITCH_INTERVAL_S = 0.00005
# Objects that are allocated before the garbage collector looks for cycles. Little of
# what a request makes is part of a cycle. Looking often (Python: after 700) is waste.
GC_ALLOCATIONS = 50_000

# Exit statuses, as in a shell: 128 + 2 is what Ctrl-C means there.
EXIT_BAD_SETTING = 2
EXIT_AT_ONCE = 130
# Signals that ask a process to end. Not every system has all of them.
STOP_SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGBREAK")


class StopLimits(NamedTuple):
    """Seconds for the steps of a stop. `docker stop` kills after 10 s."""

    # For requests that are under way.
    requests_s: float = 4.0
    # For the queue, after that.
    drain_s: float = 4.0
    # For everything; then the process ends, whatever still hangs.
    total_s: float = 9.0


DEFAULT_STOP_LIMITS = StopLimits()


class StartError(Exception):
    """What keeps the service from starting; the message is a sentence."""


# ---------------------------------------------------------------------------
# Readers: the text of a setting in, its value out. Each raises ValueError with what the
# value must be; whoever catches it knows the name of the setting.


def number_reader(least: int, most: int) -> Callable[[str], int]:
    """A reader of whole numbers from `least` to `most`, in ASCII digits.

    >>> number_reader(0, 65_535)("8000")
    8000
    """

    def read(text: str) -> int:
        if re.fullmatch("[0-9]{1,18}", text) is None or not least <= int(text) <= most:
            raise ValueError(f"must be a number from {least} to {most}")
        return int(text)

    return read


def choice_reader(*choices: str) -> Callable[[str], str]:
    """A reader of one of some words, in capitals or not."""

    def read(text: str) -> str:
        if text.lower() not in choices:
            raise ValueError("must be one of " + ", ".join(choices))
        return text.lower()

    return read


def read_text(text: str) -> str:
    """Any text but the empty one."""
    if not text:
        raise ValueError("must not be empty")
    return text


def read_token(text: str) -> str:
    """A bearer token (RFC 6750 §2.1): characters that can stand in a header field."""
    if re.fullmatch("[A-Za-z0-9._~+/=-]{1,512}", text) is None:
        raise ValueError("must be 1 to 512 letters, digits or -._~+/=")
    return text


def read_tokens(text: str) -> Tuple[str, ...]:
    """Bearer tokens, separated by blanks or commas. With two, one can be replaced.

    >>> read_tokens("old-one, new-one")
    ('old-one', 'new-one')
    """
    tokens = []
    for token in re.split("[ ,]+", text.strip(" ,")):
        tokens.append(read_token(token))
    return tuple(tokens)


def read_token_file(path: str) -> Tuple[str, ...]:
    """The bearer tokens in a file, one a line or as `read_tokens` takes them."""
    if not path:
        raise ValueError("must name a file")
    try:
        with open(path, encoding="ascii") as file:
            return read_tokens(" ".join(file.read().split()))
    except UnicodeDecodeError:
        raise ValueError(f"names {path}, which holds more than ASCII characters")
    except OSError as error:
        raise ValueError(f"names {path}, which cannot be read: {error.strerror}")
    except ValueError as error:
        raise ValueError(f"names {path}: each token in it {error}")


def read_client_token_file(path: str) -> str:
    """The name of a file whose first word is a client's bearer token."""
    try:
        read_token(token_in_file(path))
    except OSError as error:
        raise ValueError(f"names {path}, which cannot be read: {error.strerror}")
    except ValueError as error:
        raise ValueError(f"names {path}: the token in it {error}")
    return path


def read_webhook_secrets(text: str) -> Dict[str, Tuple[str, ...]]:
    """`topic=secret`, several separated by blanks; a topic may have several secrets.

    >>> read_webhook_secrets("github=one github=two")
    {'github': ('one', 'two')}
    """
    secrets: Dict[str, Tuple[str, ...]] = {}
    for pair in text.split():
        topic, _, secret = pair.partition("=")
        if not secret or not secret.isascii():
            raise ValueError("must be topic=secret, several separated by blanks")
        try:
            read_name(topic)
        except ValueError as error:
            raise ValueError(f"names a topic that {error}")
        if secret.startswith("whpk_"):
            raise ValueError("has a whpk_ key, which is public: the secret begins with whsec_")
        if not standard_keys(secret):
            raise ValueError("has a secret that begins with whsec_ and is no base64 behind it")
        secrets[topic] = (*secrets.get(topic, ()), secret)
    if not secrets:
        raise ValueError("must not be empty")
    return secrets


def read_share(text: str) -> float:
    """A share of a whole, 0 to 0.95."""
    if re.fullmatch(r"0?\.[0-9]{1,3}|0", text) is None or float(text) > 0.95:
        raise ValueError("must be a number from 0 to 0.95")
    return float(text)


def read_names(text: str) -> FrozenSet[str]:
    """Names without regard to capitals, separated by blanks or commas."""
    return frozenset(re.split("[ ,]+", text.lower().strip(" ,")))


def read_origins(text: str) -> FrozenSet[str]:
    """Origins of web pages (RFC 6454 §6.2), or * for all."""
    origins = read_names(text)
    for origin in origins:
        if origin != "*" and re.fullmatch("[a-z][a-z0-9+.-]*://[^/]+", origin) is None:
            raise ValueError("must hold origins such as https://example.org, without a path")
    return origins


# ---------------------------------------------------------------------------
# Settings and commands: the tables.


class Setting(NamedTuple):
    """One setting of a command: how it is given, what it means, where it goes.

    What `flag` says on the command line counts; else what `variable` says in the
    environment, unless it is empty; else `default`, if there is one; else the default
    of the field in the command's record. In a default, $PORT is the PORT of the
    environment, or 8000.

    A setting that is read by `bool` is a switch. A `flag` without dashes stands for the
    arguments that are no flags. A setting that `needs` another is refused without it.
    """

    flag: str
    read: Callable[[str], Any]
    meaning: str
    variable: str = ""
    default: str = ""
    # Where the value goes, if that is not the name of the flag.
    goes_to: str = ""
    # Flags, separated by blanks, one of which must be given with it.
    needs: str = ""
    # The systemd credential that says it, if neither flag nor variable does.
    credential: str = ""
    # Its value is in no message. If it is set, it is not empty: a service must not be
    # open to everyone because a variable was empty by mistake.
    secret: bool = False

    @property
    def field(self) -> str:
        """The field of the command's record: --max-body goes to max_body."""
        return self.goes_to or self.flag.lstrip("-").replace("-", "_")

    @property
    def help(self) -> str:
        """The line that --help shows."""
        origins = []
        if self.variable:
            origins.append(f"environment: {self.variable}")
        if self.default:
            origins.append(f"default: {self.default}")
        if not origins:
            return self.meaning
        return f"{self.meaning} ({'; '.join(origins)})"


class Settings(NamedTuple):
    """What `aggregator.py serve` is asked for. Durations are in microseconds."""

    host: str
    port: int
    db: str
    queue_max_size: int
    max_events_per_topic: int
    retention: int
    dedup_retention: int
    max_body: int
    sync: str
    log_level: str
    tokens: Tuple[str, ...] = ()
    read_tokens: Tuple[str, ...] = ()
    file_tokens: Tuple[str, ...] = ()
    file_read_tokens: Tuple[str, ...] = ()
    webhook_secret: Mapping[str, Tuple[str, ...]] = {}
    webhook_tolerance: int = WEBHOOK_TOLERANCE_US
    allow_origin: FrozenSet[str] = frozenset()
    allow_host: FrozenSet[str] = frozenset()
    tls_cert: str = ""
    tls_key: str = ""
    log: Optional[LogAddress] = None
    node: str = ""


class CheckSettings(NamedTuple):
    """What `aggregator.py check` is asked for."""

    db: str


class BackupSettings(NamedTuple):
    """What `aggregator.py backup` is asked for."""

    db: str
    to: str = ""


DB_SETTING = Setting(
    "--db", read_text, "file of the store", variable="DB_PATH", default="dedup_store.db"
)

SETTINGS = (
    Setting(
        "--host",
        read_text,
        "address to listen on; 0.0.0.0 for all",
        variable="HOST",
        default="127.0.0.1",
    ),
    Setting(
        "--port",
        number_reader(0, 65535),
        "port to listen on; 0 for any free one",
        variable="PORT",
        default="8000",
    ),
    DB_SETTING,
    Setting(
        "--queue-max-size",
        number_reader(1, 10_000_000),
        "events that may wait to be committed",
        variable="QUEUE_MAX_SIZE",
        default=str(QUEUE_MAX_EVENTS),
    ),
    Setting(
        "--max-events-per-topic",
        number_reader(0, 10**15),
        "keep so many events of each topic, the newest by their timestamp; 0 keeps all",
        variable="MAX_EVENTS_PER_TOPIC",
        default="0",
    ),
    Setting(
        "--retention",
        parse_duration,
        "keep events for so long (30m, 12h, 7d); 0 for ever",
        variable="RETENTION",
        default="0",
    ),
    Setting(
        "--dedup-retention",
        parse_duration,
        "know the ids of removed events for so long at least; 0 for ever",
        variable="DEDUP_RETENTION",
        default="0",
    ),
    Setting(
        "--max-body",
        number_reader(1, 2**30),
        "bytes of one body, also inflated",
        variable="MAX_BODY",
        default=str(MAX_BODY_BYTES),
    ),
    Setting(
        "--sync",
        choice_reader("full", "normal"),
        "full: 202 survives a power cut; normal: only a crash of the process",
        variable="SYNC",
        default="full",
    ),
    Setting(
        "--token",
        read_tokens,
        "only who sends this bearer token, or one of several, may publish and read",
        variable="AUTH_TOKEN",
        goes_to="tokens",
        secret=True,
    ),
    Setting(
        "--read-token",
        read_tokens,
        "who sends this bearer token, or one of several, may read",
        variable="READ_TOKEN",
        goes_to="read_tokens",
        needs="--token --token-file",
        secret=True,
    ),
    Setting(
        "--token-file",
        read_token_file,
        "file with tokens as of --token, one a line, read at the start; else the systemd"
        " credential aggregator-token",
        variable="AUTH_TOKEN_FILE",
        goes_to="file_tokens",
        credential="aggregator-token",
        secret=True,
    ),
    Setting(
        "--read-token-file",
        read_token_file,
        "the same for --read-token; else the systemd credential aggregator-read-token",
        variable="READ_TOKEN_FILE",
        goes_to="file_read_tokens",
        needs="--token --token-file",
        credential="aggregator-read-token",
        secret=True,
    ),
    Setting(
        "--webhook-secret",
        read_webhook_secrets,
        "topic=secret, several separated by blanks: who signs with it may POST /events/{topic}",
        variable="WEBHOOK_SECRET",
        secret=True,
    ),
    Setting(
        "--webhook-tolerance",
        parse_duration,
        "how far the time of a signed webhook may be from now; 0 for any",
        variable="WEBHOOK_TOLERANCE",
        default="5m",
    ),
    Setting(
        "--allow-origin",
        read_origins,
        "web origins whose pages may write and read; * for all",
        variable="ALLOW_ORIGIN",
    ),
    Setting(
        "--allow-host",
        read_names,
        "further host names to answer to when bound to loopback; * for all",
        variable="ALLOW_HOST",
    ),
    Setting(
        "--tls-cert", str, "PEM file with certificate chain, to speak HTTPS", variable="TLS_CERT"
    ),
    Setting(
        "--tls-key",
        str,
        "PEM file with its private key, if not in the same file",
        variable="TLS_KEY",
        needs="--tls-cert",
    ),
    Setting(
        "--log",
        parse_log_url,
        "PostgreSQL with the log that several aggregators share; a flag shows in `ps`",
        variable="LOG_URL",
        secret=True,
    ),
    Setting(
        "--node",
        read_name,
        "name of this node in /stats; else the host's name",
        variable="NODE_NAME",
        needs="--log",
    ),
    Setting(
        "--log-level",
        choice_reader("debug", "info", "warning", "error"),
        "debug, info, warning or error",
        variable="LOG_LEVEL",
        default="INFO",
    ),
)

URL_SETTING = Setting(
    "--url",
    parse_address,
    "the service",
    variable="AGGREGATOR_URL",
    default="http://127.0.0.1:$PORT",
)
TOKEN_SETTING = Setting(
    "--token", read_token, "what the service asks for", variable="AUTH_TOKEN", secret=True
)
STATE_SETTING = Setting(
    "--state", str, "file that keeps the place, so that the next start goes on there"
)

BACKUP_SETTINGS = (
    DB_SETTING,
    Setting("--to", read_text, "the copy: a file that is not there yet"),
)

PUBLISH_SETTINGS = (
    Setting("FILE", str, "what to read; - or nothing for standard input", goes_to="files"),
    URL_SETTING,
    TOKEN_SETTING,
    Setting(
        "--token-file",
        read_client_token_file,
        "a file that holds the token instead; it is read for each request",
        variable="AUTH_TOKEN_FILE",
    ),
    STATE_SETTING,
    Setting("--topic", read_name, "lines are text; the topic of the events made of them"),
    Setting(
        "--source", read_name, "the source of the events made of them; else the name of this host"
    ),
    Setting(
        "--ids",
        choice_reader("given", "random", "offset"),
        "given: events have one (without --topic); offset: made of the line and where it stands,"
        " so that lines may be sent again (with FILE); random (from a pipe)",
    ),
    Setting(
        "--time",
        choice_reader("line", "arrival"),
        "line: an ISO 8601 or syslog time at the start of a line is the event's; arrival: the"
        " time of reading",
        default="line",
    ),
    Setting(
        "--follow", bool, "go on with what is appended to FILE, through rotation and truncation"
    ),
    Setting(
        "--timeout",
        parse_duration,
        "give up when the service cannot be reached for so long (30s, 10m), with exit status 1;"
        " 0 never",
        default="0",
        goes_to="timeout_us",
    ),
)

RELAY_SETTINGS = (
    Setting("--from", parse_address, "the service to read", goes_to="from_url"),
    Setting("--to", parse_address, "the service to write to", goes_to="to_url"),
    Setting("--token-from", read_token, "the token for --from", variable="TOKEN_FROM", secret=True),
    Setting("--token-to", read_token, "the token for --to", variable="TOKEN_TO", secret=True),
    Setting(
        "--token-from-file",
        read_client_token_file,
        "a file that holds the token for --from; it is read for each request",
        variable="TOKEN_FROM_FILE",
    ),
    Setting(
        "--token-to-file",
        read_client_token_file,
        "a file that holds the token for --to; it is read for each request",
        variable="TOKEN_TO_FILE",
    ),
    Setting("--topic", read_name, "only this topic, or all that begin so: logs/*"),
    STATE_SETTING,
    Setting("--once", bool, "end when all is passed on that is there at the start"),
    Setting(
        "--timeout",
        parse_duration,
        "with --once: give up when a service cannot be reached for so long; 0 never",
        default="0",
        goes_to="timeout_us",
    ),
)

DRILL_SETTINGS = (
    Setting("--events", number_reader(1, 10_000_000), "different events", default="100000"),
    Setting("--duplicates", read_share, "share of repeats in all that is sent", default="0.3"),
    Setting("--batch", number_reader(1, QUEUE_MAX_EVENTS), "events of one request", default="100"),
    Setting(
        "--connections", number_reader(1, MAX_CONNECTIONS), "publishers at a time", default="4"
    ),
    Setting("--kill9", number_reader(0, 10_000), "kills of the service under load", default="0"),
    Setting("--url", parse_address, "a service that runs already, instead"),
    TOKEN_SETTING,
)


HEALTH_SETTINGS = (
    URL_SETTING,
    Setting(
        "--state",
        str,
        "watch a shipper instead: the file in which publish or relay keeps its place",
    ),
)


class Command(NamedTuple):
    """One command: what --help says, the record of its settings, and what runs it.

    `record` is a NamedTuple; `run` takes one and returns the exit status. A function
    that stands further down in the file is wrapped in a lambda, which looks it up when
    the command runs.
    """

    summary: str
    settings: Tuple[Setting, ...]
    record: Callable[..., Any]
    run: Callable[[Any], int]


COMMANDS = {
    "serve": Command(
        "Take in events over HTTP, store each exactly once. The default; the other commands are"
        " check, backup, publish, relay, drill and health, each with its own --help.",
        SETTINGS,
        Settings,
        lambda settings: run_service(settings),
    ),
    "check": Command(
        "Verify the store of a stopped service: exit status 0 if all is well, 1 if not.",
        (DB_SETTING,),
        CheckSettings,
        lambda settings: check(settings),
    ),
    "backup": Command(
        "Copy a store to a new file, also while a service runs on it. The copy is compact and"
        " checked. Exit status 0 if it is whole, 1 if there is none.",
        BACKUP_SETTINGS,
        BackupSettings,
        lambda settings: backup(settings),
    ),
    "publish": Command(
        "Publish FILEs: events as JSON, one a line, or, with --topic, lines of text. What is"
        " refused goes to STATE.refused or stdout. Exit status 0 if all was acknowledged,"
        " 1 if not.",
        PUBLISH_SETTINGS,
        PublishSettings,
        publish,
    ),
    "relay": Command(
        "Pass on what one aggregator has and gets to another, in order. Ends by a signal.",
        RELAY_SETTINGS,
        RelaySettings,
        relay,
    ),
    "drill": Command(
        "Publish disorder and repeats to a service of its own, kill it, and count what was lost"
        " or doubled: exit status 0 if nothing, 1 if anything.",
        DRILL_SETTINGS,
        DrillSettings,
        lambda settings: drill(settings, drill_environment(dict(os.environ))),
    ),
    "health": Command(
        "Ask whether events can be stored right now, or, with --state, whether a publisher or a"
        " relay is up to date: exit status 0 if so, 1 with the reason if not.",
        HEALTH_SETTINGS,
        HealthSettings,
        health,
    ),
}


def drill_environment(environment: Dict[str, str]) -> Dict[str, str]:
    """The environment of a drill's own service: no setting comes from there.

    Otherwise a token or a limit that is set in the shell would change the drill.
    """
    variables = {"CREDENTIALS_DIRECTORY"}
    for setting in SETTINGS:
        variables.add(setting.variable)
    return {name: value for name, value in environment.items() if name not in variables}


# ---------------------------------------------------------------------------
# From the command line and the environment to a record.


def complain(message: str) -> None:
    """Say on standard error what went wrong, if anybody can hear it."""
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(f"aggregator.py: {message}\n")
        sys.stderr.flush()


class CommandLine(argparse.ArgumentParser):
    """argparse, but a mistake is one line instead of a page."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and exit with status 2."""
        complain(f"{message} (--help lists what there is)")
        sys.exit(EXIT_BAD_SETTING)


def command_line(name: str) -> CommandLine:
    """The parser of a command's arguments. It leaves all texts as they are.

    argparse only sorts flags from values. What a value means is decided in one place
    for flags, variables and defaults alike: `read_given`. A flag that is not given is
    None, so a variable can take its place.
    """
    command = COMMANDS[name]
    program = "aggregator.py" if name == "serve" else f"aggregator.py {name}"
    parser = CommandLine(prog=program, description=command.summary, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=versions())
    for setting in command.settings:
        # argparse takes a % for the start of a format.
        text = setting.help.replace("%", "%%")
        if setting.read is bool:
            parser.add_argument(setting.flag, dest=setting.field, action="store_true", help=text)
        elif setting.flag.startswith("-"):
            shown_as = setting.variable or setting.flag.lstrip("-").upper()
            parser.add_argument(setting.flag, dest=setting.field, metavar=shown_as, help=text)
        else:
            parser.add_argument(setting.field, metavar=setting.flag, nargs="*", help=text)
    return parser


class Given(NamedTuple):
    """The text of a setting, and where it was given, as a message names it."""

    text: str
    origin: str


def given_text(
    setting: Setting, flag: Optional[str], environment: Dict[str, str]
) -> Optional[Given]:
    """The text of a setting, and where it comes from; None if nothing says it.

    In this order: flag, variable, credential, default. The nearest to the person who
    starts the program counts.

    >>> setting = Setting("--port", read_text, "where to listen", variable="PORT")
    >>> given_text(setting, None, {"PORT": "80"})
    Given(text='80', origin='environment variable PORT')
    """
    if flag is not None:
        return Given(flag, setting.flag)
    text = environment.get(setting.variable)
    # `docker compose` makes an empty variable of one that is not set. So empty means
    # unset, but not for a secret.
    if text or (text is not None and setting.secret):
        return Given(text, f"environment variable {setting.variable}")
    credentials = environment.get("CREDENTIALS_DIRECTORY")
    if setting.credential and credentials:
        # systemd.exec(5), "LoadCredential=": a folder that only the service can read.
        path = os.path.join(credentials, setting.credential)
        if os.path.exists(path):
            return Given(path, f"credential {setting.credential}")
    if setting.default:
        port = environment.get("PORT") or "8000"
        return Given(setting.default.replace("$PORT", port), setting.flag)
    return None


def read_given(setting: Setting, given: Given) -> Any:
    """The value of a setting. Exits with a message that names where it was given."""
    try:
        return setting.read(given.text)
    except ValueError as error:
        # Whoever may read the log or the screen need not know the secret.
        value = "" if setting.secret else f": {shown(given.text)}"
        complain(f"{given.origin} {error}{value}")
        sys.exit(EXIT_BAD_SETTING)


def read_settings(name: str, arguments: Sequence[str], environment: Dict[str, str]) -> Any:
    """The record of a command's settings. Exits with a message on a bad one.

    Fields that nothing was said about are left to the defaults of the record. The first
    mistake ends it, with status 2: nothing has been opened or changed by then.
    """
    command = COMMANDS[name]
    parser = command_line(name)
    flags = vars(parser.parse_args(arguments))
    values: Dict[str, Any] = {}
    origins: Dict[str, str] = {}
    for setting in command.settings:
        flag = flags[setting.field]
        if isinstance(flag, bool):
            values[setting.field] = flag
        elif isinstance(flag, list):
            values[setting.field] = tuple(flag)
        else:
            given = given_text(setting, flag, environment)
            if given is not None:
                values[setting.field] = read_given(setting, given)
                origins[setting.flag] = given.origin
    values_by_flag = {each.flag: values.get(each.field) for each in command.settings}
    for setting in command.settings:
        needed = setting.needs.split()
        if needed and values_by_flag[setting.flag]:
            if not any(values_by_flag[flag] for flag in needed):
                origin = origins.get(setting.flag, setting.flag)
                parser.error(f"{origin} needs {' or '.join(needed)}")
    return command.record(**values)


# ---------------------------------------------------------------------------
# The log.


class LogLimit:
    """A filter of a log handler: some lines of each kind pass, the rest is counted.

    Lines of one kind come from one place in the code, and have one format. Only WARNING
    and above is limited, because strangers can cause these. `clock` is in seconds.

    An example: a client sends 1,000 wrong requests in a second. 20 lines are written.
    When the period of 10 s is over, the next line of any kind brings one more, which
    says that there were 980 like it and shows the last of them.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._since = clock()
        # By kind: how many lines there were, and the last one held back.
        self._lines: Counter[Tuple[str, int, str]] = Counter()
        self._held_back: Dict[Tuple[str, int, str], str] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether this line is written. `logging` asks it, in the thread that logs."""
        if self._clock() - self._since >= LOG_PERIOD_S:
            self._start_period()
        if record.levelno < logging.WARNING:
            return True
        # Without arguments, the text is no format, and may be another one each time.
        text = str(record.msg) if record.args else ""
        kind = (record.pathname, record.lineno, text)
        self._lines[kind] += 1
        if self._lines[kind] <= LOG_LINES:
            return True
        self._held_back[kind] = record.getMessage()[:LOG_SAMPLE_CHARACTERS]
        return False

    def _start_period(self) -> None:
        """Say what was held back, and count anew."""
        lines = self._lines
        held_back = self._held_back
        # First, because the lines below come here as well.
        self._since = self._clock()
        self._lines = Counter()
        self._held_back = {}
        for kind, sample in held_back.items():
            log.warning("… and %s more like it: %s", f"{lines[kind] - LOG_LINES:,}", sample)


class LogWriter(logging.Handler):
    """Writes the log from a thread of its own, so nobody else waits for who reads it.

    Whoever reads standard error may stop reading: a terminal after Ctrl-S, a log driver
    that blocks. Then lines wait here, up to `most_bytes` of them. Further ones are
    dropped, and once there is room a line says how many.

    `logging` itself calls `flush` when the program ends, so its last lines get out.
    """

    def __init__(self, descriptor: int, most_bytes: int = LOG_QUEUE_BYTES) -> None:
        import threading

        super().__init__()
        self._descriptor = descriptor
        self._most_bytes = most_bytes
        # Guards the fields below. Whoever logs appends, and wakes the thread if nothing
        # was waiting. The thread takes all lines, writes them without the lock, and
        # then wakes whoever waits in `flush`.
        self._changed = threading.Condition()
        self._lines: Deque[bytes] = deque()
        # Of the lines above and of those that are just being written.
        self._bytes = 0
        # Lines that are missing in the log and not yet said to be.
        self.dropped = 0
        # Somebody waits in `flush`, so the thread does not let lines gather.
        self._in_haste = False
        self._is_writing = False
        # Daemon: a thread that hangs in a write does not keep the process from ending.
        self._thread = threading.Thread(target=self._write_all, name="log", daemon=True)

    def start(self) -> None:
        """Begin to write. Raises RuntimeError if there can be no further thread."""
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Take a line to be written. Never waits for the writing."""
        self.write_line(self.format(record))

    def write_line(self, text: str) -> None:
        """The same for a line that has its form already."""
        # A path may be no UTF-8; what cannot be written is written as \\xNN.
        line = (text + "\n").encode("utf-8", "backslashreplace")
        with self._changed:
            if self._bytes and self._bytes + len(line) > self._most_bytes:
                self.dropped += 1
                return
            self._lines.append(line)
            self._bytes += len(line)
            # Else the thread is at work, and looks again when it is done.
            if len(self._lines) == 1:
                self._changed.notify_all()

    def flush(self, timeout_s: float = LOG_FLUSH_S) -> None:
        """Wait until everything is written, but not for long."""
        with self._changed:
            self._in_haste = True
            self._changed.notify_all()
            self._changed.wait_for(self._has_written_all, timeout_s)
            self._in_haste = False

    def _has_written_all(self) -> bool:
        """Whether nothing waits and nothing is being written, be it a notice alone."""
        return not (self._bytes or self.dropped or self._is_writing)

    def _write_all(self) -> None:
        """Write what waits, for ever: the whole work of the thread.

        It takes all lines at once and writes them without the lock, so whoever logs
        waits for a copy of a list at most. If they cannot be written, they count as
        dropped, and it waits a moment before the next attempt.
        """
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._lines or self.dropped)
                lines = list(self._lines)
                self._lines.clear()
                dropped = self.dropped
                self.dropped = 0
                self._is_writing = True
            text = b"".join(lines)
            if dropped:
                text += self._notice(dropped)
            written = self._write(text)
            with self._changed:
                self._is_writing = False
                self._bytes -= sum(map(len, lines))
                if not written:
                    self.dropped += dropped + len(lines)
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._in_haste, LOG_GATHER_S)
            if not written:
                time.sleep(LOG_RETRY_S)

    def _notice(self, dropped: int) -> bytes:
        """The line that says how many others are missing."""
        message = f"LOG LINES DROPPED - {dropped:,}: standard error was not read in time"
        record = logging.makeLogRecord(
            {"name": log.name, "levelno": logging.WARNING, "levelname": "WARNING", "msg": message}
        )
        return (self.format(record) + "\n").encode("utf-8", "backslashreplace")

    def _write(self, text: bytes) -> bool:
        """Write all of it; False if that cannot be: the disk is full, nobody reads.

        One call may write a part, for example what fits into a pipe. A descriptor that
        does not block says that it is full: then it is tried again.
        """
        while text:
            try:
                written = os.write(self._descriptor, text)
            except BlockingIOError:
                time.sleep(LOG_RETRY_S)
            except OSError:
                return False
            else:
                text = text[written:]
        return True


def log_format() -> str:
    """How a log line looks: with its time, unless journald keeps that itself.

    JOURNAL_STREAM names the stream that leads to journald (systemd.exec(5)).
    """
    with contextlib.suppress(OSError):
        stderr = os.fstat(2)
        if os.environ.get("JOURNAL_STREAM") == f"{stderr.st_dev}:{stderr.st_ino}":
            return "%(levelname)s %(message)s"
    return "%(asctime)s %(levelname)s %(message)s"


def start_log(level: str) -> LogWriter:
    """Send all logging to standard error. Raises StartError without a thread for it.

    A line goes through the limit, then to the queue of the writer, then out.
    """
    writer = LogWriter(2)
    writer.addFilter(LogLimit(time.monotonic))
    try:
        writer.start()
    except RuntimeError as error:
        raise StartError(sentence_about(error))
    logging.basicConfig(level=level.upper(), handlers=[writer], format=log_format())
    return writer


# ---------------------------------------------------------------------------
# The process: what the system gives us and asks of us.


def versions() -> str:
    """What is running: our version, Python's, SQLite's."""
    python = sys.version.split()[0]
    return f"aggregator {__version__} (Python {python}, SQLite {SQLITE_VERSION})"


def clock_us() -> int:
    """Microseconds since 1970 in UTC."""
    return time.time_ns() // 1000


def random_uuid() -> str:
    """A random UUID (RFC 9562, version 4). Small systems lack the uuid module."""
    data = bytearray(os.urandom(16))
    data[6] = data[6] & 0x0F | 0x40  # the version
    data[8] = data[8] & 0x3F | 0x80  # the variant
    text = data.hex()
    return "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))


def open_closed_streams() -> None:
    """Put the null device where a standard stream is closed.

    Otherwise the next file or socket would get its number, and our log lines would go
    into it.
    """
    for descriptor, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(descriptor)
        except OSError:
            # It gets the lowest number that is free, which is this one.
            os.open(os.devnull, os.O_RDWR)
        if getattr(sys, name) is None:
            setattr(sys, name, open(descriptor, mode, encoding="utf-8", closefd=False))


def write_any_text() -> None:
    """Have standard output and error show what they cannot encode as `\\xe9`.

    A name may hold letters that a terminal does not have, or bytes that are no letters.
    That must not end a command in an error when its work is done.
    """
    for stream in (sys.stdout, sys.stderr):
        # A program that calls `main` may have put something else in their place.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def hear_stop_signals(handler: Callable[[int, Any], Any]) -> None:
    """Have `handler` called for each signal that asks the process to end.

    Not `loop.add_signal_handler`: Windows has none, and a loop that is busy would not
    hear the second signal. A handler of `signal.signal` runs in the main thread between
    any two instructions of Python. A loop that waits wakes up four times a second.
    """
    for name in STOP_SIGNALS:
        number = getattr(signal, name, None)
        if number is None:
            continue
        # nohup has it ignored, and means it.
        if name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN:
            continue
        signal.signal(number, handler)


class StopRequest:
    """Waits for the signal to stop, and keeps the promise how long that takes.

    The first signal asks for an orderly stop and starts a timer. If the stop is not
    done when the timer ends, the process ends all the same: after 10 s a container
    would be killed anyway, and then without a line in the log. A second signal means
    that somebody does not want to wait.
    """

    def __init__(self, writer: LogWriter, limits: StopLimits) -> None:
        self._loop = asyncio.get_running_loop()
        self._writer = writer
        self._limits = limits
        self._heard = False
        # Set in the loop; `serve` waits for it.
        self.asked = asyncio.Event()
        hear_stop_signals(self._on_signal)

    def _on_signal(self, number: int, frame: Any) -> None:
        """Called by Python in the main thread, between any two instructions.

        So it does next to nothing: the loop does the rest when it gets to it.
        """
        if self._heard:
            os._exit(EXIT_AT_ONCE)
        self._heard = True
        self._loop.call_soon_threadsafe(self._begin)

    def _begin(self) -> None:
        """Start the timer, and let `serve` go on. It runs in the loop."""
        import threading

        # A thread, because what hangs may be the loop itself.
        timer = threading.Timer(self._limits.total_s, self._give_up_waiting)
        timer.daemon = True
        with contextlib.suppress(RuntimeError):  # no thread to be had
            timer.start()
        self.asked.set()

    def _give_up_waiting(self) -> None:
        """Say what happened, and end the process. It runs in the timer's thread.

        `os._exit` and not `sys.exit`: the latter would wait for the thread that hangs.
        """
        log.error(
            "NOT STOPPED IN ORDER - something hung for %.0f s, probably the disk: what was left"
            " in the queue may not be stored",
            self._limits.total_s,
        )
        self._writer.flush()
        os._exit(1)

    def close(self) -> None:
        """From now on every signal ends the process at once: the loop is going."""
        self._heard = True


def notify(state: str) -> None:
    """Tell the service manager, if one wants to know (sd_notify(3)).

    A state is a datagram to the socket that NOTIFY_SOCKET names: READY=1 once the
    service listens, WATCHDOG=1 while it lives, STOPPING=1 at the end. Nobody else
    notices: without the variable, nothing is sent.
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    import socket

    if address.startswith("@"):
        # A name that is not in the file system (unix(7), "abstract").
        address = "\0" + address[1:]
    # Windows has no AF_UNIX.
    with contextlib.suppress(OSError, AttributeError):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.sendto(state.encode("ascii"), address)


async def feed_watchdog() -> None:
    """Show that the loop turns, twice as often as asked (sd_watchdog_enabled(3)).

    It is a task of the loop. If the loop hangs, nothing is sent, and systemd restarts
    the service. Where no watchdog is set, it returns at once.
    """
    period_us = os.environ.get("WATCHDOG_USEC", "")
    process = os.environ.get("WATCHDOG_PID", "")
    if process not in ("", str(os.getpid())) or not re.fullmatch("[1-9][0-9]{3,15}", period_us):
        return
    while True:
        notify("WATCHDOG=1")
        await asyncio.sleep(int(period_us) / 2_000_000)


def raise_descriptor_limit() -> None:
    """Allow a descriptor for each connection, as far as we may.

    A process may raise its soft limit up to the hard one. Twice the connections leave
    room for files. If it cannot be raised, fewer clients are served; that is no error.
    """
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    with contextlib.suppress(OSError, ValueError):
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = 2 * MAX_CONNECTIONS
        if hard != resource.RLIM_INFINITY:
            wanted = min(wanted, hard)
        if soft != resource.RLIM_INFINITY and soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def check_descriptors(least: int) -> None:
    """See that so many files can be opened. Raises StartError.

    Tried out, because the limit does not say how many are open already.
    """
    opened = []
    try:
        for _ in range(least):
            opened.append(os.open(os.devnull, os.O_RDONLY))
    except OSError as error:
        raise StartError(
            f"only {len(opened)} files can be opened, and the service needs {least}:"
            f" {error.strerror}; raise the limit (ulimit -n)"
        )
    finally:
        for descriptor in opened:
            os.close(descriptor)


def weaker_promises(settings: Settings) -> Iterator[str]:
    """What this system, or a setting, keeps us from promising, as sentences."""
    if settings.sync != "full":
        yield "with --sync normal, a power cut may undo the last commits, though they were answered"
    if not hasattr(os, "O_DIRECTORY"):
        yield "a folder cannot be forced to the disk here, so a power cut may undo the first start"
    if not hasattr(signal, "SIGHUP"):
        yield "a process can be ended here without being asked; only Ctrl-C stops in order"
    if sys.platform == "darwin":
        yield "macOS keeps writes in the drive's cache, so 202 survives a crash, not a power cut"


# ---------------------------------------------------------------------------
# serve: start in order, stop in order.


# What a client gets that speaks plain HTTP where TLS is expected.
_ANSWER_TO_PLAIN_HTTP = (
    b"HTTP/1.1 400 Bad Request\r\nContent-Type: application/problem+json\r\n"
    b"Cache-Control: no-store\r\nContent-Length: 118\r\nConnection: close\r\n\r\n"
    b'{"type":"docs#bad-request","title":"This port speaks HTTPS","status":400,'
    b'"detail":"use https:// in place of http://"}\n'
)
# So many bytes tell which protocol begins. The PROXY protocol has two versions.
_FIRST_BYTES = 16
_PROXY_BEGINNINGS = (b"PROXY ", b"\r\n\r\n\0")


def is_http(first_bytes: bytes) -> bool:
    """Whether a request begins so: a method, a blank, and a target.

    >>> is_http(b"DELETE /events/t/"), is_http(b"PROXY TCP4 192.0.")
    (True, False)
    """
    return re.match(rb"[A-Z]+ (?:/|\*|http)", first_bytes) is not None


# TLS 1.2 with forward secrecy and authenticated encryption only (RFC 9325 §4.2), so
# without CBC. The suites of TLS 1.3 are all so, and not set here.
_TLS_1_2_SUITES = "ECDHE+AESGCM:ECDHE+CHACHA20:DHE+AESGCM"


def make_tls_context(ssl: Any) -> Any:
    """A context for the service's side of TLS that also answers plain HTTP.

    `ssl` is the module. asyncio puts what came into a buffer, for an SSLObject, which
    writes what is to be sent into another. When the handshake fails and HTTP has come,
    the answer is put into that one. The handshake then seems to wait for more, so that
    asyncio sends it.

    It is for people who type http:// for https://: without it, their browser or curl
    shows an empty answer and no reason. A proxy that puts a PROXY header before the
    TLS of its clients cannot be answered; the log says it.
    """

    class AnsweringObject(ssl.SSLObject):  # type: ignore[misc]
        incoming: Any = None
        outgoing: Any = None
        first_bytes = b""

        def do_handshake(self) -> None:
            if len(self.first_bytes) < _FIRST_BYTES and self.incoming.pending:
                # A buffer can only be read, so what is read is put back.
                came = self.incoming.read()
                self.incoming.write(came)
                self.first_bytes += came[:_FIRST_BYTES]
            try:
                super().do_handshake()
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                raise
            except ssl.SSLError:
                if not self.answer_other_protocol():
                    raise
                raise ssl.SSLWantReadError(ssl.SSL_ERROR_WANT_READ, "answered plain HTTP")

        def answer_other_protocol(self) -> bool:
            """Log what else came in place of TLS; whether it was answered."""
            if is_http(self.first_bytes) and self.outgoing is not None:
                log.warning("PLAIN HTTP - a client spoke it where TLS is expected: use https://")
                self.outgoing.write(_ANSWER_TO_PLAIN_HTTP)
                self.outgoing = None
                return True
            if self.first_bytes.startswith(_PROXY_BEGINNINGS):
                log.warning("PROXY HEADER - a proxy sends one before TLS: switch it off there")
            return False

    class AnsweringContext(ssl.SSLContext):  # type: ignore[misc]
        sslobject_class = AnsweringObject

        def wrap_bio(self, incoming: Any, outgoing: Any, *rest: Any, **named: Any) -> Any:
            made = super().wrap_bio(incoming, outgoing, *rest, **named)
            made.incoming = incoming
            made.outgoing = outgoing
            return made

    context = AnsweringContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2  # RFC 8996
    context.set_ciphers(_TLS_1_2_SUITES)
    return context


def tls_context(settings: Settings) -> Any:
    """The TLS side of the socket (ssl.SSLContext), or None. Raises StartError.

    None without --tls-cert: then the service speaks plain HTTP. The key may stand in
    the file of the certificate, so --tls-key may be missing.
    """
    if not settings.tls_cert:
        return None
    # Only here: it costs memory, and small systems have it in a package of its own.
    import ssl

    context = make_tls_context(ssl)
    try:
        context.load_cert_chain(settings.tls_cert, settings.tls_key or None)
    except (OSError, ValueError) as error:
        raise StartError(f"cannot load --tls-cert {settings.tls_cert} and its key: {error}")
    return context


async def bind(server: Server, settings: Settings) -> List[str]:
    """Bind the server's socket; its addresses. Raises StartError.

    Nobody can connect yet: the server listens only after the store is open.
    """
    place = f"{settings.host}:{settings.port}"
    try:
        return await server.bind(settings.host, settings.port, tls_context(settings))
    except OSError as error:
        # asyncio wraps the reason into a sentence of its own. A resolver's number is
        # negative, and its text is the reason.
        code = error.errno or 0
        reason = os.strerror(code) if code > 0 else str(error.strerror or error)
        if code == errno.EADDRINUSE:
            reason += "; stop what listens there, or choose another --port"
        raise StartError(f"{place}: {reason}")
    except (OverflowError, ValueError) as error:
        raise StartError(f"{place}: this is no address and no name of a host: {error}")


def access_for(settings: Settings, addresses: Sequence[str]) -> Access:
    """Who may do what, given where we listen; and a warning if that is everyone.

    On loopback only, the name in the Host field must be one of ours: it is what keeps
    pages in a browser of this machine away (`Access.check`). From outside a service may
    have any name, so there a token has to do it.
    """
    tokens = settings.tokens + settings.file_tokens
    hosts: FrozenSet[str] = frozenset()
    if all(address.startswith(("127.", "[::1]")) for address in addresses):
        names = {"localhost", "127.0.0.1", "[::1]", settings.host.lower()}
        hosts = frozenset(names) | settings.allow_host
    elif not tokens:
        log.warning(
            "OPEN - %s can be reached from other machines and there is no --token: whoever"
            " reaches it may publish and read",
            ", ".join(addresses),
        )
    return Access(
        tokens=tokens,
        read_tokens=settings.read_tokens + settings.file_read_tokens,
        hosts=hosts,
        origins=settings.allow_origin,
        webhooks=settings.webhook_secret,
        webhook_tolerance_us=settings.webhook_tolerance,
    )


def open_store(settings: Settings) -> Store:
    """The store that the settings ask for. Raises StoreError."""
    store_settings = StoreSettings(
        # With a log, what a power cut takes is read again from the log.
        full_sync=settings.sync == "full" and settings.log is None,
        max_per_topic=settings.max_events_per_topic,
        retention_us=settings.retention,
        dedup_retention_us=settings.dedup_retention,
    )
    store = Store(settings.db, store_settings)
    if settings.log is None:
        store.leave_log()
    return store


def make_pipeline(settings: Settings) -> Pipeline:
    """The pipeline that the settings ask for. Raises StartError."""
    limits = PipelineLimits(queue_events=settings.queue_max_size)
    if settings.log is None:
        return Pipeline(lambda: open_store(settings), clock_us, limits)
    if settings.dedup_retention:
        raise StartError(
            "--dedup-retention does not go together with --log: each node would forget other ids"
            " at other times, and their verdicts would differ"
        )
    node = settings.node or node_name()
    replicated_log = PostgresLog(settings.log, node)
    log.info("LOG - this is node %s on %s", node, settings.log)
    return ReplicatedPipeline(lambda: open_store(settings), clock_us, replicated_log, node, limits)


def node_name() -> str:
    """The name of this host."""
    import socket

    name = socket.gethostname().encode("utf-8", "replace").decode("utf-8")
    return name or "unnamed"


def limits_shown(settings: Settings) -> Dict[str, Any]:
    """The limits that GET /stats shows."""
    return {
        "queue_max_size": settings.queue_max_size,
        "max_events_per_topic": settings.max_events_per_topic,
        "retention_seconds": settings.retention / 1_000_000,
        "max_body": settings.max_body,
        "dedup_retention_seconds": settings.dedup_retention / 1_000_000,
    }


async def serve(settings: Settings, stop: StopRequest, limits: StopLimits) -> int:
    """Run until a signal asks to stop; the exit status.

    Raises StartError, StoreError and StoreFailed. Everything is put together here, from
    the inside out: store, pipeline, live tail, API, server. Each gets what it needs as
    an argument: clocks and random ids, too, so that tests can give others.
    """
    pipeline = make_pipeline(settings)
    live_tail = LiveTail(pipeline)
    api = API(pipeline, live_tail, clock_us, random_uuid, limits_shown(settings))
    server = Server(api, time.time, ServerLimits(max_body=settings.max_body))

    # Bind before the store is opened: a port that is taken leaves the file alone.
    addresses = await bind(server, settings)
    api.access = access_for(settings, addresses)
    await pipeline.start()
    await server.listen()
    api.scheme = "https" if settings.tls_cert else "http"
    urls = ", ".join(f"{api.scheme}://{address}" for address in addresses)
    log.info("LISTENING - %s, store %s, %s", urls, os.path.realpath(settings.db), versions())
    for sentence in weaker_promises(settings):
        log.warning("NOT PROMISED HERE - %s", sentence)
    if settings.retention:
        kept_s = settings.retention / 1_000_000
        log.info(
            "RETENTION - an event goes %.0f s (%.1f days) after its arrival", kept_s, kept_s / DAY_S
        )
    notify("READY=1")
    watchdog = asyncio.get_running_loop().create_task(feed_watchdog())

    await stop.asked.wait()
    notify("STOPPING=1")
    status = await stop_in_order(server, live_tail, pipeline, limits)
    watchdog.cancel()
    return status


async def stop_in_order(
    server: Server, live_tail: LiveTail, pipeline: Pipeline, limits: StopLimits
) -> int:
    """Finish what was begun; the exit status: 1 if something taken is not stored.

    From the outside in: first no new work, then the work under way, then the queue,
    then the file. Live tails would never end by themselves, so they are ended first.
    """
    log.info(
        "STOPPING - 1. no more connections, 2. finish requests, 3. drain the queue, 4. commit,"
        " 5. close"
    )
    began_s = time.monotonic()
    live_tail.end()
    await server.stop(limits.requests_s)
    drained = await pipeline.stop(limits.drain_s)
    took_s = time.monotonic() - began_s
    if not drained:
        log.error(
            "STOPPED - after %.2f s; the store did not answer in time: what was left in the queue"
            " may not be stored",
            took_s,
        )
        return 1
    log.info("STOPPED - after %.2f s", took_s)
    return 0


def prepare_to_serve() -> None:
    """Set the process up for many connections and little memory. Raises StartError."""
    raise_descriptor_limit()
    check_descriptors(DESCRIPTORS_LEAST)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    # What is loaded by now stays for ever, so no collection needs to look at it.
    gc.freeze()
    gc.set_threshold(GC_ALLOCATIONS, 20, 10)


def run_service(settings: Settings, limits: StopLimits = DEFAULT_STOP_LIMITS) -> int:
    """`aggregator.py serve`: make the process ready, and serve; the exit status.

    Errors that have a sentence for a person end here as this sentence. Anything else is
    a bug and is logged with its traceback.
    """
    try:
        writer = start_log(settings.log_level)
    except StartError as error:
        complain(str(error))
        return 1

    async def serve_until_asked() -> int:
        """All that happens in the event loop."""
        stop = StopRequest(writer, limits)
        try:
            return await serve(settings, stop, limits)
        finally:
            stop.close()

    try:
        prepare_to_serve()
        status = asyncio.run(serve_until_asked())
        if status != 0:
            # Python would wait for the thread that hangs in the disk.
            writer.flush()
            os._exit(status)
        return status
    except (StartError, StoreError, StoreFailed, OSError, MemoryError) as error:
        writer.write_line(f"aggregator.py: {sentence_about(error)}")
    except Exception as error:
        if is_lack_of_threads(error):
            writer.write_line(f"aggregator.py: {sentence_about(error)}")
        else:
            log.critical("CRASHED - this is a bug, please report it", exc_info=True)
    return 1


# ---------------------------------------------------------------------------
# check, backup, and the program.


def check(settings: CheckSettings) -> int:
    """`aggregator.py check`: what holds and what does not, in plain words.

    The exit status is 1 if anything does not hold. It goes on after a bad line: all of
    them together say what happened to the file.
    """
    status = 0
    try:
        for holds, sentence in check_store(settings.db):
            if holds:
                print(f"ok   {sentence}", flush=True)
            else:
                print(f"BAD  {sentence}", flush=True)
                status = 1
    except StoreError as error:
        complain(str(error))
        return 1
    return status


def backup(settings: BackupSettings) -> int:
    """`aggregator.py backup`: copy a store, also one in use; the exit status."""
    if not settings.to:
        complain("say where the copy goes, with --to FILE (--help lists what there is)")
        return EXIT_BAD_SETTING
    try:
        copy = copy_store(settings.db, settings.to)
    except StoreError as error:
        complain(str(error))
        return 1
    print(
        f"{settings.to}: {copy.size:,} bytes, {copy.events:,} events, newest seq"
        f" {copy.newest_seq}; checked"
    )
    return 0


def is_lack_of_threads(error: Exception) -> bool:
    """Whether an error says that no further thread can be started.

    Python has no class of its own for that, so its text is looked at.
    """
    return isinstance(error, RuntimeError) and "start new thread" in str(error)


def sentence_about(error: Exception) -> str:
    """What went wrong, without the name of a class."""
    if is_lack_of_threads(error):
        return "no further thread can be started; raise the limit of processes (ulimit -u)"
    if isinstance(error, MemoryError):
        return "there is not enough memory"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)


def abandon_output() -> None:
    """Throw away what standard output did not take.

    Python tries to write it once more at the end, and would complain in its own words.
    """
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """The program; its exit status.

    The first word is the command, and `serve` if there is none. `arguments` are those
    of the command line without the program's name.
    """
    if sys.version_info < (3, 8):
        complain(f"this is Python {sys.version.split()[0]}; 3.8 or newer is needed")
        return EXIT_BAD_SETTING
    open_closed_streams()
    write_any_text()
    words = list(sys.argv[1:] if arguments is None else arguments)
    name = "serve"
    if words and not words[0].startswith("-"):
        name = words.pop(0)
    if name not in COMMANDS:
        complain(f"there is no command {shown(name)}; there are: {', '.join(COMMANDS)}")
        return EXIT_BAD_SETTING
    settings = read_settings(name, words, dict(os.environ))

    def end(number: int, frame: Any) -> NoReturn:
        """End at once: until `serve` takes over, there is nothing to finish."""
        sys.exit(0 if name == "serve" else 128 + number)

    # Also because process 1 of a container would ignore signals without a handler.
    hear_stop_signals(end)
    try:
        status = COMMANDS[name].run(settings)
        sys.stdout.flush()
        return status
    except (ClientError, OSError, MemoryError) as error:
        complain(sentence_about(error))
    except RuntimeError as error:
        if not is_lack_of_threads(error):
            raise
        complain(sentence_about(error))
    abandon_output()
    return 1


if __name__ == "__main__":
    sys.exit(main())
