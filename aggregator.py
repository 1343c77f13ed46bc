#!/usr/bin/env python3
# /// script
# requires-python = ">=3.8"
# dependencies = []
# ///
"""aggregator.py: take in events over HTTP, store each exactly once. One file, standard library only.

    python3 aggregator.py &
    curl -s localhost:8000/publish -d '{"topic": "door", "event_id": "1", "timestamp": "2026-01-01T12:00:00Z",
                                        "source": "hall", "payload": {"open": true}}'
    curl -s localhost:8000/events

Publish the same event again, after a time-out, a crash, a power cut: the answer says `"duplicates":1`, and the list
still holds it once.

     curl ──POST /publish──▶ HTTP parser ─▶ validate ─▶ asyncio.Queue ─▶ consumer ─▶ store (SQLite, one thread)
            §9 sockets        §5             §2          §4               §4          §3
          ◀─ 202 ──────────────────────── after the commit ◀── verdicts ◀── group commit
     curl ──GET /events ────▶ §8 routes ─▶ read connection (WAL: readers never block the writer)

The life of one event: the server (§9) feeds what a socket brings to the parser (§5), which hands over a whole request or
refuses it. The handler that the routes (§6, §8) find has the body turned into `Event`s (§2), all of them or none. The
pipeline (§4) queues them; its consumer passes all that waits to the store (§3), which decides for each event whether it is
new, stores what is, counts, and commits: one transaction, one fsync for the group. Only then is the publisher answered.

Promises: 202 means on disk; an identity (topic, event_id) is stored once; a request is taken whole or not at all; the
books balance (received = unique + duplicates + queued). Not promised: order between publishers, a second machine, or
that a publisher which never retries gets everything through.

A section knows only the sections its banner names. Deduplication is §3; who came for it may skip §5 to §11.
"""

import os
import sys

# OpenSSL would come in with asyncio and hashlib and take 4 MB. Whoever wants HTTPS says so, and then it may.
if __name__ == "__main__" and not any(
    "--tls-" in word or "https:" in word.lower()
    for word in (
        *sys.argv,
        os.environ.get("AGGREGATOR_URL", ""),
        "--tls-" * ("TLS_CERT" in os.environ),
    )
):
    sys.modules["ssl"] = None  # type: ignore[assignment]
    try:
        import _md5  # type: ignore[import-not-found]  # noqa: F401

        sys.modules["_hashlib"] = None  # type: ignore[assignment]
    except ImportError:  # Pythons built for FIPS have OpenSSL's hashes only
        pass

import argparse
import asyncio
import bisect
import concurrent.futures
import contextlib
import datetime
import errno
import functools
import gc
import itertools
import json
import logging
import re
import signal
import sqlite3
import time
import zlib
from binascii import b2a_base64
from collections import Counter, deque
from hashlib import blake2b, sha256
from typing import (
    Any,
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Dict,
    FrozenSet,
    Generator,
    Iterator,
    List,
    NamedTuple,
    NoReturn,
    Optional,
    Sequence,
    Set,
    Tuple,
    TypeVar,
    Union,
)

__version__ = "1.0.0"

log = logging.getLogger("aggregator")


# ======================================================================================================================
# §1  Constants and limits
#
# Every bound the service keeps, with its unit, its reason and, where there is one, its precedent. Whatever is not bounded
# here is bounded by the disk.
# ======================================================================================================================

MAX_NAME_BYTES = 255  # topic, event_id, source, in UTF-8: what a file name may have, so any of them can become one
MAX_SEQUENCE = 2**63 - 1  # SQLite's largest INTEGER
MAX_NESTING = 100  # levels of a payload; far below what JSON readers stop at (SQLite 1,000, Python about 1,000)
MAX_INT_DIGITS = 308  # a longer integer is infinite to every reader that keeps numbers as IEEE doubles (RFC 8259 §6)
MAX_DURATION_US = (
    1000 * 366 * 86_400_000_000
)  # of a retention or a "since": what is longer is a slip
MAX_FAULTS = 1000  # faults looked for and listed in one answer

MAX_BODY_BYTES = (
    4 * 1024 * 1024
)  # default of --max-body, before and after inflating; a full queue of common events
MAX_REQUEST_LINE_BYTES = (
    8000  # RFC 9112 §3: "RECOMMENDED … at a minimum, request-line lengths of 8000 octets"
)
MAX_HEAD_BYTES = 32 * 1024  # request line and fields
MAX_FIELDS = 100  # header fields of one request, and trailer fields
MAX_CHUNK_LINE_BYTES = 1024  # a chunk's size with its extensions
MAX_TRAILER_BYTES = 8 * 1024
MAX_GZIP_MEMBERS = 100  # of one body; `cat a.gz b.gz` makes two
HEADS_KEPT = 128  # parsed heads remembered by their bytes, at most 4 MB of them

QUEUE_MAX_EVENTS = 10_000  # default of --queue-max-size
QUEUE_MAX_BYTES = (
    32 * 1024 * 1024
)  # of the bodies behind the queued events, so that few large events are bounded too
GROUP_MAX_EVENTS = (
    2000  # one commit takes all that waits up to here: past it a longer transaction gains nothing
)
GATHER_EVENTS = 100  # below it, a group that had company last time waits for GATHER_PASSES turns of the loop (not for a
GATHER_PASSES = 12  # timer): handing work to a thread costs as much as storing ten events
RETRY_AFTER_S = 1  # a full queue is drained in well under a second
QUIET_GROUP_EVENTS = (
    5  # up to here the consumer logs each event at INFO, above it one line for the group
)

PAGE_DEFAULT = 100  # events of one GET /events
PAGE_MAX = 1000
PAGE_MAX_BYTES = (
    8 * 1024 * 1024
)  # payload bytes of one page; a page that reaches it ends early, with a cursor
PAGE_MAX_SCAN = 50_000  # rows that a filter without an index looks at for one page, about 50 ms
FOLLOW_KEEP_ALIVE_S = (
    15.0  # a silent live tail says that it lives (WHATWG HTML §9.2.7: "every 15 seconds or so")
)
FOLLOW_GATHER_S = 0.05  # commits closer together than this wake the followers once
FOLLOW_SPREAD_S = 0.0001  # each follower answers so much later than the one before: 200 at once would hold up publishers
FOLLOW_RETRY_MS = 2000  # after which a browser connects again
TOPICS_SHOWN = 12  # on the page
STATS_MAX_NAMES = 1000  # topics, and sources, listed by name in GET /stats
METRICS_MAX_TOPICS = (
    100  # topics with series of their own in GET /metrics: whoever scrapes keeps each for weeks
)

RECENT_IDS = 384 * 1024  # keys kept in memory before a slice of them is merged; about 70 bytes each
LIST_ROWS = 4096  # events that gather before the listing is fed with them, sorted
CACHE_KB = 16 * 1024  # SQLite's page cache of the writer
LONG_PAYLOAD = 1024  # characters; longer ones are stored one by one, as prepared statements keep all that was last bound
STATEMENTS_KEPT = (
    300  # prepared statements, so that no group size has to be prepared twice; about 20 KB each
)
CHECKPOINT_PAGES = 2000  # WAL pages of 4 KB after which a commit also writes them back to the file
DELAY_BOUNDS_S = (
    1,
    10,
    60,
    120,
    300,
    600,
    3600,
    21_600,
    86_400,
    604_800,
    2_592_000,
)  # of the duplicate-delay histogram
COMMIT_BOUNDS_S = (
    0.0005,
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1,
    2.5,
)  # of commits, by duration
COMMIT_BOUNDS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000)  # of commits, by events
DEDUP_WINDOWS = (
    (120, "NATS JetStream, default"),
    (300, "Amazon SQS FIFO"),
    (600, "Azure Service Bus, default"),
)
DUPLICATES_KEPT = 500  # the last duplicates, in memory, for GET /duplicates
GAPS_KEPT = 500  # missing ranges of sequence numbers remembered for each source; beyond it the lowest is given up

TRIM_ROWS = 500  # rows that one step of retention removes, about 10 ms
TIDY_INTERVAL_S = 1.0  # how often retention looks for work when nothing is published

MAX_CONNECTIONS, REFUSALS_AT_ONCE = (
    1000,
    64,
)  # each costs about 6 KB idle; so many more are told so, the rest just closed
READ_BYTES = 64 * 1024  # one read from a socket
HEAD_TIMEOUT_S = 10.0  # from the first byte of a request to the end of its head, in total
BODY_STALL_TIMEOUT_S = 20.0  # without a single byte of the body
BODY_GRACE_S = 30.0  # after which a body must have come at BODY_MIN_BYTES_PER_S on the average
BODY_MIN_BYTES_PER_S = 1024
IDLE_TIMEOUT_S = 30.0  # a kept connection without a request
WRITE_TIMEOUT_S = 30.0  # a client that does not read its answer
LINGER_TIMEOUT_S = (
    2.0  # how long what a refused client still sends is read and thrown away (RFC 9112 §9.6)
)
SWEEP_INTERVAL_S = 0.25  # how exactly deadlines are kept
STOP_REQUESTS_S = 4.0  # for requests under way at SIGTERM
STOP_DRAIN_S = (
    4.0  # for the queue after that; together well under the 10 s that `docker stop` grants
)
HEALTH_PROBE_S = (
    60.0  # a health check writes if no commit has proved for so long that the store can be written
)
BUFFERS_MAX_BYTES = (
    64 * 1024 * 1024
)  # bodies arriving and answers leaving, of all connections; what fits READ_BYTES is free
WAL_WARN_BYTES = (
    256 * 1024 * 1024
)  # past it, something keeps the WAL from being folded into the file
LOG_LINES, LOG_PERIOD_S = (
    20,
    10.0,
)  # lines of a kind, WARNING or above, in so long: no stranger fills the disk with them

MAX_LINE_BYTES = (
    256 * 1024
)  # of text that the client publishes; the rest of a longer one is another event
READ_AHEAD_BYTES = 1024 * 1024  # of events read by the client while it waits for an answer
PUBLISH_EVENTS = 2000  # of one request of the client: what one commit takes
RELAY_EVENTS = 500
BACKOFF_S = 0.1  # the client's first pause between attempts is random below it; the bound doubles with each, up to
BACKOFF_MAX_S = 10.0
ANSWER_TIMEOUT_S = 30.0  # that the client waits for a byte of an answer
TAIL_TIMEOUT_S = 3 * FOLLOW_KEEP_ALIVE_S  # the same of a live tail
HEALTH_TIMEOUT_S = 5.0
FILE_POLL_S = 0.2  # how often the end of a followed file is looked at
ROTATED_QUIET_S = (
    1.0  # a rotated file is left when nothing came for so long: its writer goes on until it is told
)
TICK_S = 0.2  # how often progress is shown on a terminal
PROGRESS_S = 10.0  # and elsewhere
DRILL_TOPICS = 7
DRILL_PATIENCE_S = 60.0  # without an answer

# One row for each way of saying no: its name (the fragment of the problem type), its status, its title (RFC 9457), and when
# it is said and what to do.
PROBLEMS: Dict[str, Tuple[int, str, str]] = {
    "bad-request": (
        400,
        "The request is not valid HTTP/1.1",
        "not HTTP/1.1 as RFC 9112 has it; the detail says where",
    ),
    "bad-parameter": (
        400,
        "A query parameter is not valid",
        "a query parameter is unknown, given twice, or has no such value",
    ),
    "not-json": (
        400,
        "The body is not JSON",
        "the body is no JSON in UTF-8; the detail gives line and column",
    ),
    "unauthorized": (
        401,
        "A token is needed",
        "`--token` is set: send `Authorization: Bearer TOKEN`",
    ),
    "forbidden": (
        403,
        "This is not allowed from here, or with this token",
        "the token only reads, or a page of another site wants to write: `--allow-origin`",
    ),
    "not-found": (404, "There is nothing here", "no such route; `GET /` lists them"),
    "no-such-event": (404, "No such event", "this identity was never stored"),
    "method-not-allowed": (405, "The method is not allowed here", "`Allow` lists what is"),
    "timeout": (408, "The request took too long to arrive", "the request came too slowly"),
    "conflict": (
        409,
        "This identity is taken by another event",
        "it holds another content: choose another `event_id`",
    ),
    "gone": (
        410,
        "The event is no longer stored",
        "retention removed it, and its id is still known; follow from `oldest_seq`",
    ),
    "too-large": (
        413,
        "The body is too large",
        "it exceeds `--max-body`, as sent or inflated: send less at a time",
    ),
    "batch-too-large": (
        413,
        "The batch is larger than the queue",
        "more than `--queue-max-size`: send fewer at a time",
    ),
    "target-too-long": (
        414,
        "The request target is too long",
        "the request line exceeds 8,000 bytes",
    ),
    "unsupported-encoding": (415, "The Content-Encoding is not supported", "only gzip is taken"),
    "expectation-failed": (417, "The expectation cannot be met", "only `100-continue` is met"),
    "misdirected": (
        421,
        "This host name is not ours",
        "on loopback and not a name of it: `--allow-host`",
    ),
    "invalid-event": (
        422,
        "An event is not valid",
        "`errors` lists index, field and fault of all of them; nothing was taken",
    ),
    "headers-too-large": (431, "The header fields are too large", "more than 32 KB or 100 fields"),
    "internal-error": (500, "The service has a bug", "please report the log"),
    "not-implemented": (501, "This is not implemented", "unknown method or transfer coding"),
    "queue-full": (
        503,
        "The queue is full",
        "retry after `Retry-After` seconds; nothing was taken",
    ),
    "store-unavailable": (
        503,
        "The store cannot be written or read",
        "disk full, locked or broken; nothing was stored: retry",
    ),
    "stopping": (503, "The service is stopping", "retry"),
    "too-many-connections": (503, "Too many connections", "1,000 are open: retry"),
    "overloaded": (
        503,
        "Too much is on its way at once",
        "more than 64 MB arrive and leave, and this took longest: retry",
    ),
    "version-not-supported": (
        505,
        "The HTTP version is not supported",
        "neither HTTP/1.1 nor HTTP/1.0",
    ),
}


# ======================================================================================================================
# §2  Events: one JSON value in, an `Event` or a list of faults out
#
# Knows §1. Knows no clock, no SQL and no HTTP: what "now" is and where bytes come from is the caller's business.
#
#   * An `Event` can always be written and read back: no lone surrogate, no NaN, no nesting that a reader chokes on.
#   * Instants are integers, microseconds since 1970 in UTC. They are compared as integers, never as text.
#   * The payload is kept as canonical JSON (sorted keys, no blanks), so equal content is equal text.
#   * All faults of all events are reported at once; a publisher mends its batch in one go.
#
# Simpler than it might be: names are compared byte for byte, without Unicode normalisation, and numbers are what
# Python makes of them (integers exact to 308 digits, everything else an IEEE double).
# ======================================================================================================================


class Event(NamedTuple):
    """One valid event. `timestamp` is in microseconds since 1970 UTC, `payload` is canonical JSON text."""

    topic: str
    event_id: str
    timestamp: int
    source: str
    payload: str
    sequence: Optional[int] = None


class Fault(NamedTuple):
    """What is wrong with one field of the event at `index` of its batch (counted from 0)."""

    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody asks of a fault
    field: str
    message: str


class NotJSON(ValueError):
    """The bytes are not JSON text (RFC 8259) in UTF-8; the message says where and why."""


class InvalidEvents(ValueError):
    """The JSON is well-formed and at least one event in it is not valid; `faults` lists what is wrong, up to MAX_FAULTS."""

    def __init__(self, faults: List[Fault]) -> None:
        more, plural = (
            " or more" if len(faults) == MAX_FAULTS else "",
            "" if len(faults) == 1 else "s",
        )
        super().__init__(f"{len(faults)}{more} fault{plural}")
        self.faults = faults


class BatchTooLarge(ValueError):
    """The batch is larger than the whole queue and could never be taken."""

    def __init__(self, count: int, most: int) -> None:
        super().__init__(
            f"{count} events in one request, and the queue holds {most}: send at most {most} at a time"
        )


_NAME = re.compile("[^\x00-\x1f\x7f-\x9f\ud800-\udfff]+")
_SURROGATE = re.compile("[\ud800-\udfff]")
_TIMESTAMP = re.compile(
    r"([0-9]{4}-[0-9]{2}-[0-9]{2})(?:[T ]([0-9]{2}:[0-9]{2}(?::[0-9]{2})?)"
    r"(?:(?<=:[0-9]{2}:[0-9]{2})[.,]([0-9]{1,30}))?(Z|[+-](?:[01][0-9]|2[0-3])(?::?[0-5][0-9])?)?)?"
)
_EPOCH = datetime.datetime(1970, 1, 1)
_TOO_DEEP = f"is nested deeper than {MAX_NESTING} levels"


def parse_timestamp(text: str) -> int:
    """ISO 8601 date and time to microseconds since 1970 UTC. No offset means UTC, a date alone is midnight. Raises
    ValueError. (`datetime.fromisoformat` refuses `Z` before Python 3.11 and takes week dates after it.)

    >>> parse_timestamp("1970-01-01T01:00:00.25+01:00")
    250000
    >>> parse_timestamp("1970-01-02")
    86400000000
    """
    match = _TIMESTAMP.fullmatch(text)
    if match is None:
        raise ValueError(
            "is not an ISO 8601 date and time such as 2026-01-31T12:00:00.5Z or 2026-01-31 14:00+02:00"
        )
    day, clock, fraction, offset = match.groups()
    return _second(day, clock, offset) + (int((fraction + "00000")[:6]) if fraction else 0)


@functools.lru_cache(1024)  # events come in bursts: most share their second with the one before
def _second(day: str, clock: Optional[str], offset: Optional[str]) -> int:
    """The instant of a whole second, in microseconds. Raises ValueError for what the calendar or the clock lacks."""
    hour, minute, second = [int(part) for part in ((clock or "00:00") + ":00").split(":")[:3]]
    try:
        instant = datetime.datetime(int(day[:4]), int(day[5:7]), int(day[8:]), hour, minute, second)
        if offset and offset != "Z":
            ahead = datetime.timedelta(
                hours=int(offset[1:3]), minutes=int(offset[3:].lstrip(":") or 0)
            )
            instant += ahead if offset[0] == "-" else -ahead
    except (
        ValueError,
        OverflowError,
    ) as error:  # a leap second too: it has to be sent as second 59
        raise ValueError(f"is not an instant of the years 0001 to 9999 in UTC ({error})")
    since = instant - _EPOCH
    return (since.days * 86_400 + since.seconds) * 1_000_000


def format_timestamp(instant_us: int) -> str:
    """Microseconds since 1970 UTC to `YYYY-MM-DDTHH:MM:SS.ffffffZ`.

    >>> format_timestamp(-1)
    '1969-12-31T23:59:59.999999Z'
    """
    return (_EPOCH + datetime.timedelta(microseconds=instant_us)).isoformat(
        timespec="microseconds"
    ) + "Z"


def _integer(digits: str) -> Union[int, float]:
    """An integer that no double can hold becomes infinity, as 1e999 does, and is refused with it further down. It also
    keeps `int` from the quadratic time that 100,000 digits cost on Pythons before 3.8.14."""
    return (
        int(digits)
        if len(digits) <= MAX_INT_DIGITS or len(digits.lstrip("-")) <= MAX_INT_DIGITS
        else float("inf")
    )


_DECODER = json.JSONDecoder(parse_int=_integer)
_ENCODER = json.JSONEncoder(
    sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
)
# JSONEncoder.encode makes this object anew at each call, which costs as much as the encoding itself.
_make_encoder: Any = getattr(json.encoder, "c_make_encoder", None)
_c_encode = _make_encoder and _make_encoder(
    None, None, json.encoder.encode_basestring, None, ":", ",", True, False, False
)


def canonical_json(value: Any) -> str:
    """JSON text that is equal for equal content. Raises ValueError for NaN and Infinity, RecursionError for depth."""
    return _ENCODER.encode(value) if _c_encode is None else "".join(_c_encode(value, 0))


def decode_text(body: bytes) -> str:
    """UTF-8 to text. Raises NotJSON that names the first offending byte. A byte order mark is refused too: RFC 8259
    §8.1 forbids it, and what is behind one is often not UTF-8."""
    if body[:3] == b"\xef\xbb\xbf":
        raise NotJSON("the body starts with a byte order mark (EF BB BF): send UTF-8 without one")
    try:
        return body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise NotJSON(
            f"byte 0x{body[error.start]:02x} at offset {error.start} is not UTF-8: send UTF-8"
        )


def json_values(text: str) -> List[Any]:
    """All JSON values in `text`, with blanks, newlines or nothing between them. Raises NotJSON, or InvalidEvents for
    nesting that the decoder gives up on.

    >>> json_values('{"a":1}{"b":2}  [3]')
    [{'a': 1}, {'b': 2}, [3]]
    """
    values: List[Any] = []
    text = text.strip(" \t\r\n")  # JSON's white space, no more (RFC 8259 §2)
    at, end = 0, len(text)
    while at < end:
        try:
            value, at = _DECODER.raw_decode(text, at)
        except RecursionError:
            index = sum(len(before) if isinstance(before, list) else 1 for before in values)
            raise InvalidEvents([Fault(index, "", _TOO_DEEP)])
        except json.JSONDecodeError as error:
            raise NotJSON(
                f"at line {error.lineno}, column {error.colno}: {error.msg[:1].lower() + error.msg[1:]};"
                f" what stands there is {_shown(text[error.pos : error.pos + 20])}"
            )
        values.append(value)
        while at < end and text[at] in " \t\r\n":
            at += 1
    return values


def parse_events(body: bytes, most: int = QUEUE_MAX_EVENTS) -> List[Event]:
    """A body (one or more of: an event, a list of events, {"events": [...]}) to its events, in order, from one to `most`.
    Raises NotJSON, BatchTooLarge or InvalidEvents.

    >>> [e.event_id for e in parse_events(b'{"topic":"t","event_id":"1","timestamp":"2026-01-01","source":"s",'
    ...                                   b'"payload":{}}')]
    ['1']
    """
    values = json_values(decode_text(body))
    if not values:
        raise NotJSON("the body is empty: send an event, a list of events, or one event a line")
    candidates: List[Any] = []
    for value in values:
        if isinstance(value, dict) and "events" in value and "topic" not in value:
            value = value["events"]
            if not isinstance(value, list):
                raise InvalidEvents(
                    [
                        Fault(
                            len(candidates),
                            "events",
                            "must be a list of events, not " + _shown(value),
                        )
                    ]
                )
        candidates += value if isinstance(value, list) else [value]
    if not candidates:
        raise InvalidEvents([Fault(0, "", "is missing: the list holds no event")])
    if len(candidates) > most:
        raise BatchTooLarge(len(candidates), most)
    return read_events(candidates)


def read_events(values: Sequence[Any]) -> List[Event]:
    """Decoded JSON values to events, all or none. Raises InvalidEvents."""
    try:
        return [
            Event(
                _read_repeated_name(value["topic"]),
                _read_name(value["event_id"]),
                parse_timestamp(value["timestamp"]),
                _read_repeated_name(value["source"]),
                _read_payload(value["payload"]),
                _read_sequence(value["sequence"]) if "sequence" in value else None,
            )
            for value in values
        ]
    except (
        KeyError,
        TypeError,
        ValueError,
    ):  # something is wrong somewhere: look again, slowly, and say what and where
        faults = (fault for index, value in enumerate(values) for fault in _faults(value, index))
        raise InvalidEvents(list(itertools.islice(faults, MAX_FAULTS)))


def _faults(value: Any, index: int) -> Iterator[Fault]:
    """Everything that is wrong with one decoded value."""
    if not isinstance(value, dict):
        yield Fault(
            index,
            "",
            "must be an object with topic, event_id, timestamp, source and payload, not "
            + _shown(value),
        )
        return
    for field, reader in _READERS.items():
        if field in value:
            try:
                reader(value[field])
            except ValueError as error:
                yield Fault(index, field, f"{error}: {_shown(value[field])}")
        elif field != "sequence":
            yield Fault(index, field, "is missing")


def _read_name(value: Any) -> str:
    """A topic, event id or source. Raises ValueError. Where the cheap test on the left holds, the exact one is not run."""
    if not isinstance(value, str):
        raise ValueError("must be a string")
    if not value or value.isspace():
        raise ValueError("must not be blank")
    if not value.isprintable() and _NAME.fullmatch(value) is None:
        raise ValueError("must not hold control characters or lone surrogates")
    if len(value) * 4 > MAX_NAME_BYTES and len(value.encode("utf-8")) > MAX_NAME_BYTES:
        raise ValueError(f"must have at most {MAX_NAME_BYTES} bytes in UTF-8")
    return value


_read_repeated_name = functools.lru_cache(1024)(
    _read_name
)  # for topics and sources, which come again and again


def _read_sequence(value: Any) -> Optional[int]:
    if value is not None and (type(value) is not int or not 0 <= value <= MAX_SEQUENCE):
        raise ValueError(f"must be an integer from 0 to {MAX_SEQUENCE}")
    return value


def _read_payload(value: Any) -> str:
    """A JSON object to its canonical text. Raises ValueError."""
    if not isinstance(value, dict):
        raise ValueError("must be an object")
    try:
        text = canonical_json(value)
        if (
            len(text) > 2 * MAX_NESTING
            and text.count("{") + text.count("[") > MAX_NESTING
            and _depth(value) > MAX_NESTING
        ):
            raise RecursionError
    except RecursionError:
        raise ValueError(_TOO_DEEP)
    except ValueError:
        raise ValueError("must not hold NaN, Infinity or a number beyond 1e308")
    if not text.isascii() and _SURROGATE.search(text):
        raise ValueError("must not hold lone surrogates")
    return text


_READERS: Dict[str, Callable[[Any], Any]] = {
    "topic": _read_name,
    "event_id": _read_name,
    "timestamp": lambda value: parse_timestamp(value if type(value) is str else ""),
    "source": _read_name,
    "payload": _read_payload,
    "sequence": _read_sequence,
}


def _depth(value: Any) -> int:
    """Levels of nesting, counted without recursion, given up on once past the limit.

    >>> _depth({"a": [1]})
    2
    """
    depth, level = 0, [value]
    while level and depth <= MAX_NESTING:
        depth += 1
        level = [
            child
            for parent in level
            for child in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(child, (dict, list))
        ]
    return depth


def _shown(value: Any) -> str:
    """A value as it may stand in a message: ASCII, at most 60 characters, never raising."""
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else "a list"
    text = json.dumps(value).replace(
        "\x7f", "\\u007f"
    )  # the one control character that JSON leaves as it is
    return text if len(text) <= 60 else text[:57] + "..."


def events_from_lines(
    text: str,
    topic: str,
    source: str,
    instant_us: int,
    new_id: Callable[[int], str],
    most: int = QUEUE_MAX_EVENTS,
) -> List[Event]:
    """Plain text of up to `most` lines to one event a line with payload {"message": line}; blank lines are none. `new_id`
    names the event of a line by its number, from 1. Raises BatchTooLarge, and InvalidEvents, also when there is no line."""
    if text.count("\n") > most:
        raise BatchTooLarge(text.count("\n"), most)
    stamp = format_timestamp(instant_us)
    values = [
        {
            "topic": topic,
            "event_id": new_id(number),
            "timestamp": stamp,
            "source": source,
            "payload": {"message": line.rstrip("\r")},
        }
        for number, line in enumerate(text.split("\n"), 1)
        if line and not line.isspace()
    ]
    if not values:
        raise InvalidEvents([Fault(0, "", "is missing: the text holds no line")])
    return read_events(values)


class EventQuery(NamedTuple):
    """Which events to list. `topic` is exact unless `prefix`; instants in microseconds, `since` inclusive, `until`
    exclusive; `after` is the (timestamp, seq) of the last event already seen."""

    topic: Optional[str] = None
    prefix: bool = False
    source: Optional[str] = None
    since: Optional[int] = None
    until: Optional[int] = None
    limit: int = PAGE_DEFAULT
    after: Optional[Tuple[int, int]] = None
    descending: bool = False


class Page(NamedTuple):
    """A page of events: their JSON texts joined by the separator asked for, how many (`size`), and where the next one starts
    (None at the end). A page may be short, even empty, and still have a next one."""

    text: str
    size: int
    next: Optional[Tuple[int, int]]


class Tail(NamedTuple):
    """What the log holds behind a cursor: the `seqs` that match, in order, their events as JSON `lines` joined by newlines,
    the seq `through` which it was read, the newest seq there is, and the oldest still there (newest + 1 if none is)."""

    seqs: List[int]
    lines: str
    through: int
    newest: int
    oldest: int


# ======================================================================================================================
# §3  Store: what "seen before" means
#
# The obvious design is UNIQUE(topic, event_id) on the table of events. It is exact, and it does not scale: random ids land
# on random pages, so once the index outgrows the cache each event dirties a page of 4 KB, written to the WAL and again to
# the file: 16 KB for an event of 200 bytes, and half the speed after 6 million events (40,000/s down to 20,000/s on a
# 2-core machine). And when retention deletes a row, its id is forgotten with it.
#
# So ids are kept as 16-byte keys in a small log-structured merge of three parts:
#
#        new events ──▶ processed_events   the log: append-only, in order of arrival, the truth
#        their keys ──▶ recent.ids         keys not merged yet: in memory, rebuilt from the log at start
#                            │ one slice of the key space with each commit, sorted, so that neighbours share a page
#                            ▼
#                          seen            the tombstones: every older key; what outlives the event
#
#     seen before?  look in recent.ids, then in seen. In neither: new.
#
# The key space has 256 slices, by first byte. `progress` holds, for each slice, the seq up to which its keys are in
# `seen`; the least of them is the watermark, below which the log is no longer needed to know an id.
#
# Reading needs an order by topic and time, which is random too, and the same trick feeds it: new events gather in the log,
# and every few thousand of them are entered at once, sorted, into `listing` (by topic) and `by_time`; a reader looks there
# and at the end of the log.
#
# Knows §1 and §2. Knows no asyncio, no queue, no HTTP. Synchronous; each object is used by one thread at a time.
#
#   * Deciding, storing, counting and merging are one transaction, of which recent.ids is a part (it is a table of an
#     attached in-memory database): what did not commit was never learned, and what committed is known.
#   * A row leaves the log only when its key is in `seen`. Moving a key twice is harmless.
#   * One process owns the file. The proof is an exclusive lock on FILE-owner, which the kernel drops with the process.
#   * A file that is not ours is refused before SQLite may touch it.
#
# Why digests are exact enough: two of ten million identities share a 128-bit key with probability 10^14 / 2^129, less
# than 10^-24; no disk is that reliable. BLAKE2b, because ids come from strangers: nobody can make two that collide. The
# topic's length goes in first, or ("a", "b:c") and ("a:b", "c") could be one identity.
#
# Beside a busy event loop a thread gets the GIL back once per statement, not once per row, whatever the statement does.
# So a group is written with many rows to the statement, and the index lives in SQL, where its work needs no GIL at all.
#
# Simpler than it might be: no Bloom filter in front of `seen`, so a new id costs a look into it, which is a disk read
# where `seen` (50 bytes an id) has outgrown the machine's memory.
# ======================================================================================================================


class StoreError(Exception):
    """The file cannot be opened as a store; the message says why and what to do."""


class StoreFailed(Exception):
    """A read or write failed and left the store as it was; trying again later may help."""


class Record(NamedTuple):
    """An event with its key (of its identity) and its fingerprint (of its content): what the store is given."""

    key: bytes
    fingerprint: int
    topic: str
    event_id: str
    timestamp: int
    source: str
    payload: str
    sequence: Optional[int]


class Verdict(NamedTuple):
    """What became of one event: `new`, `duplicate`, or `conflict` (the identity is known with another source or
    payload); the `seq` and arrival (`first_seen`, microseconds) of the event stored under its identity; and where its key
    was `found`: nowhere, recent, seen, or batch (earlier in the same group)."""

    kind: str
    seq: int
    first_seen: int
    found: str


class Decision(NamedTuple):
    """What a commit did: the repeats by index, in order; everything else is new, with consecutive seqs from `first_seq`."""

    first_seq: int
    now_us: int
    repeats: List[Tuple[int, Verdict]]


SQLITE_VERSION = sqlite3.sqlite_version
APPLICATION_ID = 0x41474752  # "AGGR" in the file header (SQLite file format §1.3.16)
SCHEMA_VERSION = 2
_SQLITE_HEADER = re.compile(
    rb"SQLite format 3\x00.{44}(.{4}).{4}(.{4})", re.DOTALL
)  # user_version, application_id

_KEYS = "(key BLOB PRIMARY KEY, seq INTEGER NOT NULL, fingerprint INTEGER NOT NULL, first_seen INTEGER NOT NULL) WITHOUT ROWID"
_SCHEMA = f"""
CREATE TABLE processed_events(
    seq INTEGER PRIMARY KEY AUTOINCREMENT, key BLOB NOT NULL, fingerprint INTEGER NOT NULL, processed_at INTEGER NOT NULL,
    topic TEXT NOT NULL, event_id TEXT NOT NULL, timestamp INTEGER NOT NULL, source TEXT NOT NULL, payload TEXT NOT NULL,
    sequence INTEGER);
CREATE TABLE seen{_KEYS};
CREATE TABLE listing(
    topic TEXT NOT NULL, timestamp INTEGER NOT NULL, seq INTEGER NOT NULL, PRIMARY KEY(topic, timestamp, seq)) WITHOUT ROWID;
CREATE TABLE by_time(timestamp INTEGER NOT NULL, seq INTEGER NOT NULL, PRIMARY KEY(timestamp, seq)) WITHOUT ROWID;
CREATE TABLE progress(part TEXT PRIMARY KEY, through INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE stats(
    kind TEXT NOT NULL, name TEXT NOT NULL, uniques INTEGER NOT NULL, duplicates INTEGER NOT NULL,
    conflicts INTEGER NOT NULL, removed INTEGER NOT NULL, PRIMARY KEY(kind, name)) WITHOUT ROWID;
CREATE TABLE sequences(
    source TEXT PRIMARY KEY, newest INTEGER NOT NULL, missing INTEGER NOT NULL, given_up INTEGER NOT NULL,
    ranges TEXT NOT NULL) WITHOUT ROWID;
INSERT INTO stats VALUES('total', '', 0, 0, 0, 0)
"""

_MAX_VARIABLES = 32_766 if sqlite3.sqlite_version_info >= (3, 32) else 999
_LOOK_UP = (
    "WITH wanted(k) AS (VALUES {rows}) SELECT json_group_array(json_array(hex(k), seq, fingerprint, first_seen,"
    " found)) FROM (SELECT k, seq, fingerprint, first_seen, 'recent' AS found FROM wanted CROSS JOIN recent.ids AS r"
    " ON r.key = k UNION ALL SELECT k, seq, fingerprint, first_seen, 'seen' FROM wanted CROSS JOIN seen AS s"
    " ON s.key = k)"
)
_APPEND = (
    "INSERT INTO processed_events(seq, processed_at, key, fingerprint, topic, event_id, timestamp, source, payload,"
    " sequence) VALUES {rows}"
)
_LEARN = "INSERT INTO recent.ids SELECT key, seq, fingerprint, processed_at FROM processed_events WHERE seq > ? ORDER BY key"
_RECOVER = _LEARN.replace(
    "ORDER", "AND seq > (SELECT through FROM progress WHERE part = hex(substr(key, 1, 1))) ORDER"
)
_LIST = """
INSERT INTO listing SELECT topic, timestamp, seq FROM processed_events WHERE seq > ? ORDER BY topic, timestamp, seq;
INSERT INTO by_time SELECT timestamp, seq FROM processed_events WHERE seq > ? ORDER BY timestamp, seq
""".strip().split(";\n")
# What removes the events of a JSON list of seqs. Their keys go to `seen` first, for the few that no merge has moved yet.
_REMOVE = (
    """
INSERT INTO seen SELECT key, seq, fingerprint, processed_at FROM processed_events WHERE seq IN GONE ORDER BY key
    ON CONFLICT(key) DO NOTHING;
INSERT INTO stats SELECT 'topic', topic, 0, 0, 0, count(*) FROM processed_events WHERE seq IN GONE GROUP BY topic
    ON CONFLICT(kind, name) DO UPDATE SET removed = removed + excluded.removed;
UPDATE stats SET removed = removed + json_array_length(?) WHERE kind = 'total';
DELETE FROM listing WHERE (topic, timestamp, seq) IN (SELECT topic, timestamp, seq FROM processed_events WHERE seq IN GONE);
DELETE FROM by_time WHERE (timestamp, seq) IN (SELECT timestamp, seq FROM processed_events WHERE seq IN GONE);
DELETE FROM processed_events WHERE seq IN GONE
""".strip()
    .replace("GONE", "(SELECT value FROM json_each(?))")
    .split(";\n")
)
_SEQUENCES = """
WITH wanted(k) AS (VALUES {rows}) SELECT json_group_object(k, json_array(newest, given_up, json(ranges)))
    FROM wanted CROSS JOIN sequences ON source = k"""
_TRACK = """
INSERT OR REPLACE INTO sequences(source, newest, missing, given_up, ranges) SELECT json_extract(value, '$[0]'),
    json_extract(value, '$[1]'), json_extract(value, '$[2]'), json_extract(value, '$[3]'), json_extract(value, '$[4]')
    FROM json_each(?)"""
_PROGRESS = "UPDATE progress SET through = ? WHERE part = ?"
_COUNT = """
INSERT INTO stats(kind, name, uniques, duplicates, conflicts, removed) VALUES {rows} ON CONFLICT(kind, name) DO UPDATE SET
    uniques = uniques + excluded.uniques, duplicates = duplicates + excluded.duplicates,
    conflicts = conflicts + excluded.conflicts, removed = removed + excluded.removed""".strip()
_MERGE = """
INSERT INTO seen SELECT key, seq, fingerprint, first_seen FROM recent.ids WHERE key >= :low AND key < :high
    ON CONFLICT(key) DO NOTHING;
DELETE FROM recent.ids WHERE key >= :low AND key < :high
""".strip().split(";\n")
_EXPIRE = """
DELETE FROM seen WHERE key >= :low AND key < :high AND first_seen < :before AND (seq < (SELECT min(seq) FROM processed_events)
    OR NOT EXISTS (SELECT 1 FROM processed_events AS e WHERE e.seq = seen.seq))"""
_STATS = """
SELECT json_object(
    'unique_processed', uniques, 'duplicate_dropped', duplicates, 'conflicts', conflicts, 'stored', uniques - removed,
    'removed_by_retention', removed,
    'topics', (SELECT json_group_object(name, json_object('unique', uniques, 'duplicates', duplicates, 'stored',
        uniques - removed)) FROM (SELECT * FROM stats WHERE kind = 'topic' ORDER BY uniques DESC, name LIMIT ?1)),
    'topics_total', (SELECT count(*) FROM stats WHERE kind = 'topic'),
    'sources', (SELECT json_group_object(name, json_object('unique', uniques, 'duplicates', duplicates)) FROM
        (SELECT * FROM stats WHERE kind = 'source' ORDER BY duplicates DESC, name LIMIT ?1)),
    'sources_total', (SELECT count(*) FROM stats WHERE kind = 'source'),
    'gaps', (SELECT total(missing) FROM sequences),  -- sum() would overflow
    'delays', (SELECT json_group_object(name, duplicates) FROM stats WHERE kind = 'delay')) FROM stats WHERE kind = 'total'"""
_PROBES = (
    ("processed_events", "0, x'', 0, 0, '', '', 0, '', '', 0", "seq = 0"),
    ("seen", "x'', 0, 0, 0", "key = x''"),
    ("listing", "'', 0, 0", "topic = ''"),
    ("by_time", "0, 0", "seq = 0"),
    ("progress", "'', 0", "part = ''"),
    ("stats", "'', '', 0, 0, 0, 0", "kind = ''"),
)
# Instants as the contract spells them, counted from the year 1, because SQL's / and % round towards zero.
_INSTANT = (
    "strftime('%Y-%m-%dT%H:%M:%S', ({0} + 62135596800000000) / 1000000 - 62135596800, 'unixepoch')"
    " || printf('.%06dZ', ({0} + 62135596800000000) % 1000000)"
)
# One event as JSON text. The payload is JSON already and goes in as it is.
_LINE = f"""
printf('{{"seq":%d,"topic":%s,"event_id":%s,"timestamp":"%s","source":%s,"payload":%s%s,"processed_at":"%s"}}', e.seq,
    json_quote(e.topic), json_quote(e.event_id), {_INSTANT.format("e.timestamp")}, json_quote(e.source), e.payload,
    ifnull(',"sequence":' || e.sequence, ''), {_INSTANT.format("e.processed_at")})"""


def identity(topic: str, event_id: str) -> bytes:
    """The 16-byte key of (topic, event_id).

    >>> identity("a", "b:c") != identity("a:b", "c")
    True
    """
    first = topic.encode("utf-8")
    return blake2b(
        b"%d:%b%b" % (len(first), first, event_id.encode("utf-8")), digest_size=16
    ).digest()


def fingerprint(source: str, payload: str) -> int:
    """What `conflict` compares: 64 bits of source and canonical payload, as SQLite's signed integer."""
    first = source.encode("utf-8")
    return int.from_bytes(
        blake2b(b"%d:%b%b" % (len(first), first, payload.encode("utf-8")), digest_size=8).digest(),
        "big",
        signed=True,
    )


def record(event: Event) -> Record:
    """An event with what identifies it. Done by the publisher's side: what Python the writer's thread runs, it has to
    fight the event loop for."""
    return Record(identity(event[0], event[1]), fingerprint(event[3], event[4]), *event)


def _connect(path: str, timeout: float = 5.0) -> sqlite3.Connection:
    return sqlite3.connect(
        path,
        timeout=timeout,
        isolation_level=None,
        check_same_thread=False,
        cached_statements=STATEMENTS_KEPT,
    )


def _value(db: sqlite3.Connection, statement: str, values: Any = ()) -> Any:
    """What a statement gives whose result is one row of one column."""
    return db.execute(statement, values).fetchone()[0]


def _run(db: sqlite3.Connection, statement: str, rows: Sequence[Sequence[Any]]) -> List[Any]:
    """Run `statement` over all rows, as many to a call as SQLite has variables for: a multiple of 64, then the rest, so
    that a group takes one or two calls and the texts are few enough to stay prepared. Returns the results, which are rows
    of one column, or none."""
    found, width, at = [], len(rows[0]) if rows else 1, 0
    most = min(2048, _MAX_VARIABLES // width // 64 * 64)
    while at < len(rows):
        left = len(rows) - at
        n = min(most, left // 256 * 256 or left // 64 * 64 or left)
        found += db.execute(
            _with_rows(statement, n, width), list(itertools.chain.from_iterable(rows[at : at + n]))
        ).fetchall()
        at += n
    return found


@functools.lru_cache(STATEMENTS_KEPT)
def _with_rows(statement: str, n: int, width: int) -> str:
    return statement.format(rows=",".join(["(" + ",".join("?" * width) + ")"] * n))


@contextlib.contextmanager
def _transaction(db: sqlite3.Connection, mode: str = "IMMEDIATE") -> Iterator[None]:
    """All or nothing: commits at the end of the block, rolls back on any exception; SQLite's become StoreFailed."""
    try:
        db.execute("BEGIN " + mode)
        yield
        db.execute("COMMIT")
    except BaseException as error:
        with contextlib.suppress(sqlite3.Error):
            if db.in_transaction:  # a full disk or an I/O error has rolled back already
                db.execute("ROLLBACK")
        if isinstance(error, sqlite3.Error):
            raise StoreFailed(str(error)) from error
        if mode == "DEFERRED" and isinstance(error, (LookupError, TypeError, ValueError)):
            raise StoreFailed(
                f"the store is damaged ({error}): stop the service and run `aggregator.py check`"
            ) from error
        raise


def _require(holds: object, otherwise: str) -> None:
    if not holds:
        raise StoreError(otherwise)


def _own(path: str) -> sqlite3.Connection:
    """Lock the store for this process, by SQLite's own locking, until the connection closes or the process dies."""
    owner = _connect(path + "-owner", timeout=0.5)
    try:
        owner.execute("PRAGMA journal_mode=MEMORY")
        owner.execute("BEGIN EXCLUSIVE")
    except sqlite3.Error as error:
        owner.close()
        raise StoreError(
            f"{path} belongs to another running aggregator: stop that one, or choose another --db"
            if "locked" in str(error)
            else f"cannot lock {path}-owner ({error}): the folder must be writable"
        )
    return owner


def _check_header(path: str) -> bool:
    """Refuse, by its first 100 bytes and without touching it, a file that is not a store of this version. Returns whether
    there is one. Raises StoreError."""
    try:
        with open(path, "rb") as file:
            head = file.read(100)
    except FileNotFoundError:
        head = b""
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error.strerror}")
    match = _SQLITE_HEADER.match(head)
    _require(match or not head, f"{path} is not an SQLite database: choose another --db")
    if match:
        version, application = (int.from_bytes(field, "big") for field in match.groups())
        _require(
            application == APPLICATION_ID,
            f"{path} is an SQLite database, but not an aggregator's: choose another --db",
        )
        _require(
            version == SCHEMA_VERSION,
            f"{path} has schema version {version}, and aggregator {__version__} reads version"
            f" {SCHEMA_VERSION}: start the aggregator that wrote it, or choose another --db",
        )
    return match is not None


class _State(NamedTuple):
    """What the writer remembers of the file; replaced after a commit, never before."""

    last_seq: int
    recent: int  # keys in recent.ids
    next_slice: int  # the slice to merge next
    listed: int  # the seq up to which `listing` is complete


class Store:
    """The writer, and the owner of the file. The constructor raises StoreError if the file cannot be used; everything
    else raises StoreFailed and leaves the store as it was.

    `max_per_topic` events and `retention_us` microseconds since arrival are kept, 0 meaning all; tombstones of removed
    events for `dedup_retention_us`, 0 meaning for ever."""

    def __init__(
        self,
        path: str,
        full_sync: bool = True,
        max_per_topic: int = 0,
        retention_us: int = 0,
        dedup_retention_us: int = 0,
    ) -> None:
        self.path = path = os.path.realpath(path)
        self._max_per_topic, self._retention_us, self._dedup_retention_us = (
            max_per_topic,
            retention_us,
            dedup_retention_us,
        )
        folder = os.path.dirname(path)
        _require(
            os.path.isdir(folder),
            f"the folder {folder} does not exist: create it, or choose another --db",
        )
        _require(not os.path.isdir(path), f"{path} is a folder: --db names a file")
        _require(
            os.access(folder, os.W_OK) and (os.access(path, os.W_OK) or not os.path.exists(path)),
            f"{path} or its folder is read-only: the user that runs the aggregator must own both",
        )
        _check_header(path)
        self._owner = self._db = _own(path)
        try:
            self._db = _connect(path)
            self._open(full_sync)
        except (
            sqlite3.Error,
            StoreError,
            LookupError,
            OSError,
            TypeError,
            ValueError,
        ) as error:  # the last three: damage
            self.close()
            _require(not isinstance(error, StoreError), str(error))
            raise StoreError(
                f"cannot use {path}: {error}; SQLite needs its JSON functions, and a damaged file has to be moved"
                " away or restored from a copy"
            )

    def _open(self, full_sync: bool) -> None:
        db = self._db
        db.execute("SELECT json_quote('')")
        _require(
            sqlite3.sqlite_version_info >= (3, 24),
            f"this SQLite is {SQLITE_VERSION}: 3.24 or newer is needed",
        )
        db.execute("BEGIN EXCLUSIVE")
        if _value(db, "PRAGMA user_version") == 0:
            for statement in _SCHEMA.split(";"):
                db.execute(statement)
            _run(
                db,
                "INSERT INTO progress VALUES {rows}",
                [(f"{i:02X}", 0) for i in range(256)] + [("listing", 0)],
            )
            db.execute(f"PRAGMA application_id={APPLICATION_ID}")
            db.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
        db.execute("COMMIT")
        _require(
            _value(db, "PRAGMA journal_mode=WAL") == "wal",
            f"{self.path} is on a file system without shared memory, which"
            " SQLite's WAL mode needs: choose a local disk",
        )
        for statement in (
            "PRAGMA synchronous=" + ("FULL" if full_sync else "NORMAL"),
            f"PRAGMA cache_size=-{CACHE_KB}",
            f"PRAGMA wal_autocheckpoint={CHECKPOINT_PAGES}",
            "PRAGMA journal_size_limit=67108864",
            "ATTACH ':memory:' AS recent",
            "CREATE TABLE recent.ids" + _KEYS,
        ):
            db.execute(statement)
        through = json.loads(_value(db, "SELECT json_group_object(part, through) FROM progress"))
        listed = through.pop("listing")
        oldest = min(sorted(through), key=through.get)
        recent = db.execute(_RECOVER, (through[oldest],)).rowcount
        last_seq = _value(
            db, "SELECT ifnull(max(seq), 0) FROM sqlite_sequence WHERE name = 'processed_events'"
        )
        self._state = _State(last_seq, recent, int(oldest, 16), listed)
        self._places = {
            self.path + end: os.stat(self.path + end)[1:3] for end in ("", "-owner", "-shm", "-wal")
        }  # inode, device
        self._wal_to_warn_of = WAL_WARN_BYTES
        self._over: Set[str] = set()  # topics that may hold more than max_per_topic
        if self._max_per_topic:
            self._over.update(
                json.loads(
                    _value(
                        db,
                        "SELECT json_group_array(name) FROM stats WHERE kind = 'topic' AND"
                        " uniques - removed > ?",
                        (self._max_per_topic,),
                    )
                )
            )

    @property
    def newest(self) -> int:
        """The newest seq given out, 0 before the first."""
        return self._state.last_seq

    def received(self) -> int:
        """Events decided since the store was made."""
        return int(_value(self._db, "SELECT uniques + duplicates FROM stats WHERE kind = 'total'"))

    def commit(self, records: Sequence[Record], now_us: int) -> Decision:
        """Decide, store and count a batch in one transaction."""
        with _transaction(self._db):
            repeats = self._decide(records, now_us)
            skip = {index for index, _ in repeats}
            fresh = (
                records
                if not skip
                else [each for index, each in enumerate(records) if index not in skip]
            )
            first_seq = self._state.last_seq + 1
            state = self._state._replace(
                last_seq=self._state.last_seq + len(fresh), recent=self._state.recent + len(fresh)
            )
            if fresh:
                rows = [(seq, now_us) + each for seq, each in enumerate(fresh, first_seq)]
                long = [row for row in rows if len(row[8]) > LONG_PAYLOAD]
                for row in long:
                    _run(self._db, _APPEND, [row])
                _run(
                    self._db,
                    _APPEND,
                    [row for row in rows if len(row[8]) <= LONG_PAYLOAD] if long else rows,
                )
                self._db.execute(_LEARN, (self._state.last_seq,))
                self._track([each for each in fresh if each.sequence is not None])
            self._count(records, repeats, now_us)
            state = self._list(self._merge(state, len(fresh), now_us), LIST_ROWS)
            state = self._trim(state, now_us, 2 * len(fresh))
            self._check_place()
        self._state = state
        return Decision(first_seq, now_us, repeats)

    def _decide(self, records: Sequence[Record], now_us: int) -> List[Tuple[int, Verdict]]:
        """The records that are known already, with their verdicts. The second of two equals in one batch is a duplicate.
        Changes nothing."""
        keys = [each[0] for each in records]
        distinct = set(keys)
        known: Dict[bytes, Tuple[int, int, int, str]] = {}  # seq, fingerprint, first_seen, found
        for (found,) in _run(self._db, _LOOK_UP, list(zip(sorted(distinct)))):
            for key, *rest in json.loads(found):
                known[bytes.fromhex(key)] = tuple(rest)
        if not known and len(distinct) == len(keys):
            return []
        repeats, seq = [], self._state.last_seq
        for index, each in enumerate(records):
            first = known.get(each.key)
            if first is None:
                seq += 1
                known[each.key] = (seq, each.fingerprint, now_us, "batch")
            else:
                kind = "duplicate" if first[1] == each.fingerprint else "conflict"
                repeats.append((index, Verdict(kind, first[0], first[2], first[3])))
        return repeats

    def _count(
        self, records: Sequence[Record], repeats: Sequence[Tuple[int, Verdict]], now_us: int
    ) -> None:
        """Totals, topics, sources and the delays of duplicates, in one statement."""
        conflicts = sum([verdict.kind == "conflict" for _, verdict in repeats])
        delays = Counter([_delay_bucket(now_us - verdict.first_seen) for _, verdict in repeats])
        rows: List[Tuple[Any, ...]] = [
            ("total", "", len(records) - len(repeats), len(repeats), conflicts, 0)
        ]
        rows += [("delay", name, 0, n, 0, 0) for name, n in delays.items()]
        for kind, field in (("topic", 2), ("source", 5)):
            names = Counter([each[field] for each in records])
            again = Counter([records[index][field] for index, _ in repeats])
            rows += [(kind, name, n - again[name], again[name], 0, 0) for name, n in names.items()]
        _run(self._db, _COUNT, rows)
        if self._max_per_topic:
            self._over.update([each.topic for each in records])

    def _track(self, numbered: Sequence[Record]) -> None:
        """Keep account of which sequence numbers each source has left out."""
        numbers: Dict[str, Set[int]] = {}
        for each in numbered:
            numbers.setdefault(each.source, set()).add(each.sequence or 0)
        if not numbers:
            return
        rows, known = [], {}  # type: Tuple[List[Tuple[Any, ...]], Dict[str, Any]]
        for (found,) in _run(self._db, _SEQUENCES, [(source,) for source in numbers]):
            known.update(json.loads(found))
        for source, arrived in numbers.items():
            newest, given_up, ranges = known.get(source, (min(arrived) - 1, 0, []))
            newest, ranges = close_gaps(newest, ranges, sorted(arrived))
            given_up += sum([last - first + 1 for first, last in ranges[:-GAPS_KEPT]])
            ranges = ranges[-GAPS_KEPT:]
            rows.append(
                (
                    source,
                    newest,
                    sum([last - first + 1 for first, last in ranges]),
                    given_up,
                    ranges,
                )
            )
        self._db.execute(_TRACK, (json.dumps(rows),))

    def _merge(self, state: "_State", incoming: int, now_us: int) -> "_State":
        """Move the slice that has waited longest from `recent.ids` to `seen`, if there are more than RECENT_IDS keys; more
        slices if it takes more to keep step with `incoming` keys."""
        recent, slice_ = state.recent, state.next_slice
        for _ in range(1 + incoming * 256 // RECENT_IDS):
            if recent <= RECENT_IDS:
                break
            span = {
                "low": bytes((slice_,)),
                "high": bytes((slice_ + 1,)) if slice_ < 255 else b"\xff" * 17,
                "before": now_us - self._dedup_retention_us,
            }
            if self._dedup_retention_us:
                self._db.execute(_EXPIRE, span)
            self._db.execute(_MERGE[0], span)
            recent -= self._db.execute(_MERGE[1], span).rowcount
            self._db.execute(_PROGRESS, (state.last_seq, f"{slice_:02X}"))
            slice_ = (slice_ + 1) % 256
        return state._replace(recent=recent, next_slice=slice_)

    def _list(self, state: "_State", least: int) -> "_State":
        """Enter into the listing what it lacks, if that is `least` events or more."""
        if state.last_seq - state.listed < least:
            return state
        for statement in _LIST:
            self._db.execute(statement, (state.listed,))
        self._db.execute(_PROGRESS, (state.last_seq, "listing"))
        return state._replace(listed=state.last_seq)

    def locate(self, topic: str, event_id: str) -> Optional[int]:
        """The seq of an identity, whether or not its event is still in the log; None if it was never seen."""
        with _transaction(self._db, "DEFERRED"):
            found = json.loads(
                _value(self._db, _with_rows(_LOOK_UP, 1, 1), (identity(topic, event_id),))
            )
        return int(found[0][1]) if found else None

    # Retention. Removed is what is oldest: by arrival for --retention, by timestamp for --max-events-per-topic, whichever
    # bites first. Each commit removes up to twice what it adds, so a flood never outruns it, and `tidy` does the rest.

    def tidy(self, now_us: int) -> bool:
        """One small step of retention in a transaction of its own. True if there may be more to do."""
        with _transaction(self._db, "DEFERRED"):
            if not self._over and not self._expired(now_us, TRIM_ROWS):
                return False
        with _transaction(self._db):
            state = self._trim(self._state, now_us, TRIM_ROWS)
        self._state = state
        return True

    def _expired(self, now_us: int, rows: int) -> List[int]:
        """The seqs of the oldest events that --retention has done with, and of what came before them by another clock: what
        is of the future proves nothing, and must not keep the events behind it."""
        if not self._retention_us:
            return []
        return list(
            json.loads(
                _value(
                    self._db,
                    """
            WITH o AS (SELECT seq, processed_at FROM processed_events WHERE processed_at <= :now ORDER BY seq LIMIT :rows)
            SELECT json_group_array(seq) FROM (SELECT seq FROM processed_events WHERE seq <= (
                SELECT max(seq) FROM o WHERE processed_at < :now - :kept) ORDER BY seq LIMIT :rows)""",
                    {"now": now_us, "kept": self._retention_us, "rows": rows},
                )
            )
        )

    def _trim(self, state: "_State", now_us: int, rows: int) -> "_State":
        """Remove up to `rows` events that retention has done with."""
        if rows <= 0:
            return state
        left = rows - self._remove(
            self._expired(now_us, rows)
        )  # first: of what is left, a topic may keep as many
        gone: List[int] = []
        if self._over:
            state = self._list(state, 1)  # the listing knows what is oldest
        for topic in sorted(self._over):
            if len(gone) >= left:
                break
            stored = _value(
                self._db,
                "SELECT uniques - removed FROM stats WHERE kind = 'topic' AND name = ?",
                (topic,),
            )
            if stored <= self._max_per_topic:  # so only once what was removed before is committed
                self._over.discard(topic)
            else:
                gone += json.loads(
                    _value(
                        self._db,
                        "SELECT json_group_array(seq) FROM (SELECT seq FROM listing WHERE topic = ? ORDER BY timestamp, seq"
                        " LIMIT ?)",
                        (topic, min(stored - self._max_per_topic, left - len(gone))),
                    )
                )
        self._remove(gone)
        return state

    def _remove(self, seqs: List[int]) -> int:
        """Take these events out of the log; how many they are."""
        for statement in _REMOVE if seqs else ():
            self._db.execute(statement, (json.dumps(sorted(seqs)),))
        return len(seqs)

    def probe(self) -> None:
        """Prove that the store can be written, by writing as many pages as a small commit; no change would be no write."""
        with _transaction(self._db):
            for table, row, which in _PROBES:
                self._db.execute(f"INSERT INTO {table} VALUES({row})")
                self._db.execute(f"DELETE FROM {table} WHERE {which}")
            self._db.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
            self._check_place()

    def _check_place(self) -> None:
        """Raise StoreFailed if a file of the store has been deleted, moved or replaced. SQLite would go on writing to what
        has no name any more, and each 202 would be a lie; or a second process could own what is there now."""
        for name, place in self._places.items():
            with contextlib.suppress(OSError):
                found = os.stat(name)
                if found[1:3] == place:
                    continue
            raise StoreFailed(
                f"{name} was deleted, moved or replaced while in use: put the same file back, or restart"
            )
        if found.st_size > self._wal_to_warn_of:  # the last was the WAL
            log.warning(
                "WAL GROWS - %s has %d MB: end the program that is reading the store",
                name,
                found.st_size >> 20,
            )
            self._wal_to_warn_of = 2 * found.st_size

    def close(self) -> None:
        """Fold the WAL into the file and give up ownership. The store stays whole if this never runs."""
        with contextlib.closing(self._owner):
            self._db.close()


def close_gaps(
    newest: int, ranges: Sequence[Sequence[int]], arrived: Sequence[int]
) -> Tuple[int, List[List[int]]]:
    """The highest number and the missing ranges (first and last, ascending) once the `arrived` numbers, ascending, have come.

    >>> close_gaps(5, [], [6, 9])
    (9, [[7, 8]])
    >>> close_gaps(9, [[2, 2], [4, 8]], [2, 6])
    (9, [[4, 5], [7, 8]])
    """
    missing = [list(each) for each in ranges]
    for number in arrived:
        if number > newest:
            if number > newest + 1:
                missing.append([newest + 1, number - 1])
            newest = number
        else:
            at = (
                bisect.bisect_right(missing, [number, MAX_SEQUENCE]) - 1
            )  # the last range that begins at or before it
            if at >= 0 and number <= missing[at][1]:
                first, last = missing[at]
                missing[at : at + 1] = [
                    part for part in ([first, number - 1], [number + 1, last]) if part[0] <= part[1]
                ]
    return newest, missing


def _delay_bucket(delay_us: int) -> str:
    """The histogram bucket of a duplicate's delay: the least bound in seconds that is not below it, or "inf"."""
    at = bisect.bisect_left(DELAY_BOUNDS_S, delay_us / 1e6)
    return str(DELAY_BOUNDS_S[at]) if at < len(DELAY_BOUNDS_S) else "inf"


# What must hold in a store at rest: a sentence, and a query that counts what contradicts it.
_CHECKS = (
    (
        "every event can be read back, and carries the key and the fingerprint of its content",
        "SELECT count(*) FROM processed_events WHERE key <> identity(topic, event_id) OR fingerprint <> fingerprint(source, payload)"
        " OR NOT json_valid(payload)",
    ),
    (
        "no identity is in the log twice",
        "SELECT count(*) - count(DISTINCT key) FROM processed_events",
    ),
    ("no two tombstones share a seq", "SELECT count(*) - count(DISTINCT seq) FROM seen"),
    (
        "every event below its slice's mark has its tombstone, and none contradicts the log",
        "SELECT count(*) FROM processed_events AS e LEFT JOIN seen AS s ON s.key = e.key WHERE ifnull(s.seq <> e.seq,"
        " e.seq <= (SELECT through FROM progress WHERE part = hex(substr(e.key, 1, 1))))",
    ),
    (
        "all marks are there and none is ahead of the log",
        "SELECT abs(257 - count(*)) + total(through NOT BETWEEN 0 AND (SELECT ifnull(max(seq), 0) FROM sqlite_sequence))"
        " FROM progress",
    ),
    (
        "the listings by topic and by time have every event below their mark, and no other",
        "WITH below AS (SELECT * FROM processed_events WHERE seq <= (SELECT through FROM progress WHERE part = 'listing')),"
        " whole AS (SELECT count(*) AS n FROM below NATURAL JOIN listing NATURAL JOIN by_time) SELECT abs(n - (SELECT count(*) FROM"
        " below)) + abs(n - (SELECT count(*) FROM listing)) + abs(n - (SELECT count(*) FROM by_time)) FROM whole",
    ),
    (
        "the books balance: there are as many unique events as seqs given out, and less those removed as many as in the log",
        "SELECT ifnull(sum(abs(uniques - (SELECT ifnull(max(seq), 0) FROM sqlite_sequence)) + abs(uniques - removed - (SELECT"
        " count(*) FROM processed_events))), 1) FROM stats WHERE kind = 'total'",
    ),
    (
        "the books balance: topics, sources and delays add up to the totals",
        "SELECT "
        + " + ".join(
            f"abs(total({column} * ((kind = 'total') - (kind = '{kind}'))))"
            for column, kind in (
                ("uniques", "topic"),
                ("duplicates", "topic"),
                ("removed", "topic"),
                ("uniques", "source"),
                ("duplicates", "source"),
                ("duplicates", "delay"),
            )
        )
        + " FROM stats",
    ),
    (
        "the books balance: every topic counts what it holds",
        "SELECT count(*) FROM stats AS t LEFT JOIN (SELECT topic, count(*) AS n FROM processed_events GROUP BY topic) AS e ON"
        " e.topic = t.name WHERE kind = 'topic' AND uniques - removed <> ifnull(n, 0)",
    ),
    (
        "every source's missing sequence numbers are counted",
        "SELECT count(*) FROM sequences WHERE missing <> (SELECT ifnull(sum(json_extract(value, '$[1]') + 1"
        " - json_extract(value, '$[0]')), 0) FROM json_each(ranges))",
    ),
)


def check_store(path: str) -> Iterator[Tuple[bool, str]]:
    """Verify the store of a stopped service: one (holds, sentence) after the other. Raises StoreError if it cannot be
    opened, or a service is running on it."""
    path = os.path.realpath(path)
    _require(_check_header(path), f"there is no store at {path}")
    with contextlib.closing(_own(path)), contextlib.closing(_connect(path)) as db:
        try:
            db.execute("PRAGMA query_only=1")
            db.execute("PRAGMA mmap_size=1073741824")
            found = "; ".join(row[0] for row in db.execute("PRAGMA integrity_check(5)"))
            yield (
                found == "ok",
                "SQLite finds the file intact" + ("" if found == "ok" else ": NOT: " + found),
            )
            db.create_function("identity", 2, identity)
            db.create_function("fingerprint", 2, fingerprint)
            for sentence, query in _CHECKS:
                count = _value(db, query)
                yield count == 0, sentence + (f": NOT: {count:,.0f} contradict it" if count else "")
            events, topics, tombstones = db.execute(
                "SELECT (SELECT count(*) FROM processed_events), (SELECT count(*) FROM stats"
                " WHERE kind = 'topic'), (SELECT count(*) FROM seen)"
            ).fetchone()
            yield True, f"{events:,} events of {topics:,} topics, {tombstones:,} tombstones"
        except sqlite3.Error as error:
            yield False, f"SQLite can read the file: NOT: {error}"


class Reader:
    """The read side: a connection of its own, so that reading never waits for writing. May raise StoreFailed."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._db = _connect(path)
        self._db.execute("PRAGMA query_only=1")
        self._db.execute(
            "SELECT 1 FROM stats"
        )  # opens all files now, whatever becomes of their names

    def close(self) -> None:
        """Release the connection."""
        self._db.close()

    def page(self, query: EventQuery, separator: str = ",") -> Page:
        """The events that `query` asks for, ordered by (timestamp, seq), as JSON texts with `separator` between."""
        exact = query.topic is not None and not query.prefix
        beyond, order = ("<", "DESC") if query.descending else (">", "ASC")
        where = _all(
            (exact, "topic = :topic"),
            (query.since is not None, "timestamp >= :since"),
            (query.until is not None, "timestamp < :until"),
            (query.after, f"(timestamp, seq) {beyond} (:at, :seq)"),
        )
        filtered = query.source is not None or query.prefix and query.topic
        values = dict(
            query._asdict(),
            scan=PAGE_MAX_SCAN if filtered else query.limit + 1,
            most=query.limit + 1,
        )
        values["at"], values["seq"] = query.after or (None, None)
        # The listing, and the end of the log that it does not have yet.
        rows = f"""
            SELECT timestamp, seq FROM {"listing" if exact else "by_time"} WHERE {where}
            UNION ALL SELECT timestamp, seq FROM processed_events WHERE {where} AND seq > (
                SELECT through FROM progress WHERE part = 'listing') ORDER BY timestamp {order}, seq {order}"""
        with _transaction(self._db, "DEFERRED"):
            keys = json.loads(
                _value(
                    self._db,
                    f"""
                SELECT json_group_array(json_array(at, seq, size)) FROM (
                    SELECT f.timestamp AS at, f.seq AS seq, length(CAST(payload AS BLOB)) AS size FROM ({rows} LIMIT :scan) AS f
                    CROSS JOIN processed_events AS e ON e.seq = f.seq WHERE {_topic_and_source(query)} LIMIT :most)""",
                    values,
                )
            )
            taken = _how_many([size for _, _, size in keys[: query.limit]])
            following: Optional[Tuple[int, int]] = None
            if taken < len(keys):
                following = (keys[taken - 1][0], keys[taken - 1][1])
            elif (
                filtered
            ):  # nothing more among the rows looked at: go on behind them, if there are any
                following = self._db.execute(
                    f"SELECT * FROM ({rows} LIMIT 1 OFFSET :scan - 1)", values
                ).fetchone()
            return Page(
                self._lines([seq for _, seq, _ in keys[:taken]], separator), taken, following
            )

    def tail(self, query: EventQuery, after: int) -> Tail:
        """The events after seq `after`, in order of seq, that match the topic and source of `query`: up to PAGE_MAX of them,
        found among the next PAGE_MAX_SCAN."""
        last = after + PAGE_MAX_SCAN
        with _transaction(self._db, "DEFERRED"):
            newest, oldest = self._db.execute(
                "SELECT ifnull((SELECT seq FROM sqlite_sequence), 0), (SELECT min(seq) FROM"
                " processed_events)"
            ).fetchone()
            keys = json.loads(
                _value(
                    self._db,
                    f"""
                SELECT json_group_array(json_array(seq, length(CAST(payload AS BLOB)))) FROM (
                    SELECT seq, payload FROM processed_events WHERE seq > :after AND seq <= :last AND {_topic_and_source(query)}
                    ORDER BY seq LIMIT {PAGE_MAX})""",
                    dict(query._asdict(), after=after, last=last),
                )
            )
            seqs = [seq for seq, _ in keys[: _how_many([size for _, size in keys])]]
            through = min(newest, last) if len(seqs) == len(keys) < PAGE_MAX else seqs[-1]
            return Tail(
                seqs,
                self._lines(seqs, "\n"),
                through,
                newest,
                newest + 1 if oldest is None else oldest,
            )

    def _lines(self, seqs: List[int], separator: str) -> str:
        """These events as JSON texts, in one step for all."""
        return str(
            _value(
                self._db,
                f"""
            SELECT ifnull(group_concat(line, ?), '') FROM (SELECT {_LINE} AS line FROM json_each(?) AS j
            CROSS JOIN processed_events AS e ON e.seq = j.value)""",
                (separator, json.dumps(seqs)),
            )
        )

    def event(self, seq: int) -> Optional[str]:
        """One event as JSON text, or None if it is not in the log."""
        with _transaction(self._db, "DEFERRED"):
            return self._lines([seq], "") or None

    def gaps(self, source: Optional[str], limit: int) -> List[Dict[str, Any]]:
        """The sources that left out sequence numbers, most missing first: what is missing as [first, last], the last
        PAGE_DEFAULT ranges of each."""
        with _transaction(self._db, "DEFERRED"):
            found = json.loads(
                _value(
                    self._db,
                    """
                SELECT json_group_array(json_array(source, newest, missing, given_up, json(ranges))) FROM (SELECT * FROM sequences
                WHERE missing + given_up > 0 AND source = ifnull(?, source) ORDER BY missing DESC, source LIMIT ?)""",
                    (source, limit),
                )
            )
        return [
            {
                "source": name,
                "newest": newest,
                "missing_count": missing,
                "given_up": given_up,
                "missing": ranges[-PAGE_DEFAULT:],
            }
            for name, newest, missing, given_up, ranges in found
        ]

    def stats(self) -> Dict[str, Any]:
        """The totals, the topics with most events, the sources with most duplicates, the duplicates by delay, and the size
        of the store in bytes, all from one snapshot."""
        with _transaction(self._db, "DEFERRED"):
            found = json.loads(_value(self._db, _STATS, (STATS_MAX_NAMES,)))
        delays = found.pop("delays")
        counts = [(bound, delays.get(str(bound), 0)) for bound in DELAY_BOUNDS_S + (float("inf"),)]
        return {
            **found,
            "gaps": int(found["gaps"]),
            "duplicate_delay_seconds": {str(bound): n for bound, n in counts},
            "windows": [
                {
                    "window_seconds": window,
                    "like": like,
                    "would_have_stored_twice": sum(n for bound, n in counts if bound > window),
                }
                for window, like in DEDUP_WINDOWS
            ],
            "store_bytes": sum(
                os.path.getsize(path)
                for path in (self._path, self._path + "-wal")
                if os.path.exists(path)
            ),
        }


def _all(*conditions: Tuple[Any, str]) -> str:
    """The SQL of those conditions that are asked for."""
    return " AND ".join(["1"] + [condition for asked, condition in conditions if asked])


def _topic_and_source(query: EventQuery) -> str:
    """What of `query` has to be looked up in the event itself."""
    return _all(
        (query.topic and query.prefix, "substr(topic, 1, length(:topic)) = :topic"),
        (query.topic and not query.prefix, "topic = :topic"),
        (query.source is not None, "source = :source"),
    )


def _how_many(sizes: Sequence[int]) -> int:
    """How many of the texts of these sizes make one page: at least one, or PAGE_MAX_BYTES of them."""
    return (
        max(1, sum([total <= PAGE_MAX_BYTES for total in itertools.accumulate(sizes)]))
        if sizes
        else 0
    )


# ======================================================================================================================
# §4  Pipeline: a bounded queue, one consumer, group commit
#
# Publishers put batches into an asyncio queue; the consumer has everything that waits committed as one group, while the
# next one gathers. No timer: an idle service commits a lone event at once, a busy one hundreds for the price of one fsync.
#
# Knows §1 to §3. Knows no HTTP.
#
#   * The bound is in events (and bytes), counted from being taken until being committed or refused.
#   * A batch is taken whole or not at all. A batch that can never fit is told so, or it would be retried for ever.
#   * Nothing ends the consumer but `stop`: if a commit fails, the publishers of that group are told, and it goes on.
#   * `taken` and the store's totals give the books: received = unique + duplicates + queued, at every moment.
#
# Threads: "writer" owns the Store, "reader" owns the Reader; each runs one call at a time, in order of asking.
# ======================================================================================================================


class QueueFull(Exception):
    """There is no room for the batch now; nothing of it was taken."""


class Stopping(Exception):
    """The service is shutting down and takes nothing more."""


_T = TypeVar("_T")
Unavailable = (
    StoreFailed  # by this name the sections that do not know the store know it: send again later
)


class CursorExpired(Exception):
    """Events after the cursor have left the log; `oldest_seq` is the first that is still there."""

    def __init__(self, after: int, oldest_seq: int) -> None:
        super().__init__(
            f"events after seq {after} have been removed by retention; the oldest there is has seq {oldest_seq}: to"
            f" go on without the lost ones, follow with after={oldest_seq - 1}"
        )
        self.oldest_seq = oldest_seq


class CursorAhead(Exception):
    """The cursor names a seq that the log has not reached: it comes from another store."""


class Receipt(NamedTuple):
    """What became of a batch: repeats by index, everything else new from `first_seq` on; and of the group it was committed
    with: its size in events, and how long the commit took, in microseconds."""

    records: List[Record]
    first_seq: int
    repeats: List[Tuple[int, Verdict]]
    now_us: int
    group: int
    commit_us: int

    def verdicts(self) -> Iterator[Verdict]:
        """A verdict for each event, in order."""
        repeats, seqs = dict(self.repeats), itertools.count(self.first_seq)
        for index in range(len(self.records)):
            yield (
                repeats[index]
                if index in repeats
                else Verdict("new", next(seqs), self.now_us, "nowhere")
            )


class Histogram:
    """Observations counted by their bounds (inclusive, ascending; the last count is of what exceeds them all), and their sum."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds, self.counts, self.sum = bounds, [0] * (len(bounds) + 1), 0.0

    def add(self, value: float) -> None:
        """Count one observation."""
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.sum += value


class _Batch(NamedTuple):
    records: List[Record]
    size: int  # bytes of the body
    done: "Optional[asyncio.Future[Receipt]]"  # None: the publisher does not wait


class Pipeline:
    """Queue, consumer and read side over one store file. Construct and use inside one running event loop.

    `clock` gives microseconds since 1970 UTC. `start` raises StoreError."""

    def __init__(
        self,
        open_store: Callable[[], Store],
        clock: Callable[[], int],
        max_events: int = QUEUE_MAX_EVENTS,
    ) -> None:
        self.max_events = max_events
        self._open_store = open_store
        self._clock = clock
        # Owner: this loop. Publishers put without waiting (the bound is checked first), the consumer waits in get().
        self._queue: asyncio.Queue[_Batch] = asyncio.Queue(max_events)
        self._in_flight = self._in_flight_bytes = (
            0  # events taken and neither committed nor refused
        )
        self._taken = 0  # events ever taken and not refused since
        self.duplicates: deque[Tuple[Record, Verdict, int]] = deque(
            maxlen=DUPLICATES_KEPT
        )  # the last (no payload), and when
        self.last_commit = (0, 0)  # its events, and the microseconds it took
        self.commit_events, self.commit_seconds = (
            Histogram(COMMIT_BOUNDS),
            Histogram(COMMIT_BOUNDS_S),
        )
        self._stopping = False
        self._failure = ""  # why the last commit failed, empty once one succeeds
        self._proven = 0.0  # when the store was last written, by the loop's clock
        # Followers wait for `_news`, which the next commit, the keep-alive timer or the end resolves for all of them; those
        # who then ask for the same find the question under way in `_asked`.
        self.followers = 0
        self._ended = False
        self._news: Optional[asyncio.Future[None]] = None
        self._newest = 0  # the newest seq committed
        self._woken = 0.0  # when the followers were last woken, by the loop's clock
        self._asked: Dict[Tuple[EventQuery, int], asyncio.Future[Tail]] = {}
        self._writer = concurrent.futures.ThreadPoolExecutor(1, "writer")
        self._reading = concurrent.futures.ThreadPoolExecutor(1, "reader")
        self._tasks: List[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Open the store and start the consumer. Raises StoreError."""
        self._loop = asyncio.get_running_loop()
        self._store = await self._ask(self._writer, self._open_store)
        self._reader = await self._ask(self._reading, Reader, self._store.path)
        self._taken = await self._ask(self._writer, self._store.received)
        self._newest = self._store.newest
        self._proven = self._loop.time()
        self._tasks = [
            self._loop.create_task(self._consume()),
            self._loop.create_task(self._tidy()),
        ]

    async def publish(self, events: List[Event], size: int, wait: bool = True) -> Optional[Receipt]:
        """Take a batch (`size` is the bytes it came in). With `wait`, return its receipt once it is on disk; without,
        return None once it is queued. Raises BatchTooLarge, QueueFull, Stopping, and Unavailable."""
        n = len(events)
        if n > self.max_events:
            raise BatchTooLarge(n, self.max_events)
        if (
            self._stopping or self._tasks[0].done()
        ):  # the consumer; that would be a bug, and health says so
            raise Stopping("the service is stopping: send again in a moment")
        if self._in_flight + n > self.max_events or (
            self._in_flight and self._in_flight_bytes + size > QUEUE_MAX_BYTES
        ):
            raise QueueFull(
                f"{self._in_flight} of {self.max_events} events are queued and {n} more do not fit: send again"
                " after Retry-After"
            )
        # No await between the check and the put: no other publisher can come between.
        done = self._loop.create_future() if wait else None
        self._queue.put_nowait(_Batch([record(event) for event in events], size, done))
        self._in_flight += n
        self._in_flight_bytes += size
        self._taken += n
        try:
            return await done if done is not None else None
        finally:
            del done  # an error would keep this frame, and it the future, and that the error, until the garbage collector came

    async def _consume(self) -> None:
        group: List[_Batch] = []
        while True:
            several = len(group) > 1
            group = [await self._queue.get()]
            if several:  # the publishers just answered are about to send again: one larger group is cheaper than two
                for _ in range(GATHER_PASSES):
                    if self._in_flight >= GATHER_EVENTS:
                        break
                    await asyncio.sleep(0)
            count = len(group[0].records)
            while count < GROUP_MAX_EVENTS and not self._queue.empty():
                group.append(self._queue.get_nowait())
                count += len(group[-1].records)
            started = self._loop.time()
            outcome: Union[Decision, Unavailable]
            try:
                records = (
                    group[0].records
                    if len(group) == 1
                    else [each for batch in group for each in batch.records]
                )
                outcome = await self._loop.run_in_executor(
                    self._writer, self._store.commit, records, self._clock()
                )
                self._failure, self._proven = "", self._loop.time()
            except Exception as error:  # whatever it is, the next group may go through
                self._failure = (
                    str(error) if isinstance(error, StoreFailed) else f"a commit failed: {error!r}"
                )
                outcome = Unavailable(self._failure)
                log.error(
                    "COMMIT FAILED - %d events of %d requests refused, nothing of them stored: %s",
                    count,
                    len(group),
                    str(outcome),
                    exc_info=not isinstance(error, StoreFailed),
                )
            commit_us = int((self._loop.time() - started) * 1e6)
            self._settle(group, count, outcome, commit_us)
            if isinstance(outcome, Decision):
                self.last_commit = (count, commit_us)
                self.commit_events.add(count)
                self.commit_seconds.add(commit_us / 1e6)
                self._newest = outcome.first_seq + count - len(outcome.repeats) - 1
                if self._news is not None:
                    self._wake_soon(self._news)
                _log_group(records, outcome)

    def _settle(
        self, group: List[_Batch], count: int, outcome: Union[Decision, Unavailable], commit_us: int
    ) -> None:
        """Take a finished group off the books and answer its publishers. Not interruptible: it does not await."""
        at = taken = 0
        for batch in group:
            n = len(batch.records)
            self._in_flight -= n
            self._in_flight_bytes -= batch.size
            waits = batch.done is not None and not batch.done.done()
            if isinstance(outcome, Unavailable):
                self._taken -= n
                if batch.done is None:
                    log.error("LOST - %d events taken with wait=0 could not be stored", n)
                elif waits:
                    batch.done.set_exception(outcome)
            else:
                repeats = []
                while taken < len(outcome.repeats) and outcome.repeats[taken][0] < at + n:
                    index, verdict = outcome.repeats[taken]
                    repeats.append((index - at, verdict))
                    self.duplicates.append(
                        (batch.records[index - at]._replace(payload=""), verdict, outcome.now_us)
                    )
                    taken += 1
                if waits and batch.done is not None:
                    first = outcome.first_seq + at - taken + len(repeats)
                    batch.done.set_result(
                        Receipt(batch.records, first, repeats, outcome.now_us, count, commit_us)
                    )
            at += n
            self._queue.task_done()

    async def _tidy(self) -> None:
        """Retention when nothing else drives it: step by step, so that a commit waits for one step at most."""
        while True:
            await asyncio.sleep(TIDY_INTERVAL_S)
            try:
                while await self._ask(self._writer, self._store.tidy, self._clock()):
                    pass
            except Exception as error:
                log.error("RETENTION FAILED - will try again: %s", error)

    async def page(self, query: EventQuery, separator: str = ",") -> Page:
        """Events, see Reader.page. Raises Unavailable."""
        return await self._ask(self._reading, self._reader.page, query, separator)

    async def tail(self, query: EventQuery, after: Optional[int]) -> Tail:
        """What the log holds behind `after` (None: nothing yet, from now on), see Reader.tail. Raises CursorExpired,
        CursorAhead, Unavailable."""
        key = (query, self._newest if after is None else after)
        if key not in self._asked:
            self._asked[key] = self._ask(self._reading, self._reader.tail, *key)
            self._asked[key].add_done_callback(lambda _: self._asked.pop(key))
        tail = await asyncio.shield(self._asked[key])
        if tail.newest < key[1]:
            raise CursorAhead(
                f"there is no seq {key[1]} yet, the newest is {tail.newest}: this cursor is of another store"
            )
        if tail.oldest > key[1] + 1:
            raise CursorExpired(key[1], tail.oldest)
        return tail

    async def follow(self, query: EventQuery, tail: Tail) -> AsyncIterator[Tail]:
        """`tail` and all that comes behind it, for as long as the caller likes; what it yields without seqs is a sign of
        life. A slow reader keeps nothing in memory but its cursor. Ends when the service stops, and when retention
        has overtaken the cursor. Raises Unavailable."""
        place, self.followers = self.followers, self.followers + 1
        try:
            spoken = self._loop.time()
            while True:
                if tail.seqs or self._loop.time() - spoken >= FOLLOW_KEEP_ALIVE_S:
                    yield tail
                    spoken = self._loop.time()
                if self._ended:
                    return
                caught_up = tail.through >= tail.newest
                if caught_up:
                    if self._news is None:
                        self._news = self._loop.create_future()
                        self._loop.call_later(FOLLOW_KEEP_ALIVE_S, self._wake, self._news)
                    if (
                        self._newest > tail.through
                    ):  # committed since: do not run ahead of the others, who share one look
                        self._wake_soon(self._news)
                    await asyncio.shield(self._news)
                try:
                    tail = await self.tail(query, tail.through)
                except CursorExpired:
                    return  # it will ask again and be told
                if caught_up:
                    await asyncio.sleep(place * FOLLOW_SPREAD_S)
        finally:
            self.followers -= 1

    def _wake_soon(self, news: "asyncio.Future[None]") -> None:
        """Wake the followers at once if that was not done lately, and otherwise when FOLLOW_GATHER_S has passed."""
        self._loop.call_at(self._woken + FOLLOW_GATHER_S, self._wake, news)

    def _wake(self, news: "asyncio.Future[None]") -> None:
        if self._news is news:
            self._news, self._woken = None, self._loop.time()
            news.set_result(None)

    def end_followers(self) -> None:
        """End all live tails."""
        self._ended = True
        if self._news is not None:
            self._wake(self._news)

    async def event(self, topic: str, event_id: str) -> Tuple[Optional[int], Optional[str]]:
        """The seq of an identity, None if it was never seen; and its event as JSON text, None if retention has removed
        it. Raises Unavailable."""
        seq = await self._ask(self._writer, self._store.locate, topic, event_id)
        text = None if seq is None else await self._ask(self._reading, self._reader.event, seq)
        return seq, text

    async def gaps(self, source: Optional[str], limit: int) -> List[Dict[str, Any]]:
        """What sources left out, see Reader.gaps. Raises Unavailable."""
        found: List[Dict[str, Any]] = await self._ask(
            self._reading, self._reader.gaps, source, limit
        )
        return found

    async def stats(self) -> Dict[str, Any]:
        """The books, balanced: what the store has counted, and what is taken and not yet counted. Raises Unavailable."""
        found = await self._ask(self._reading, self._reader.stats)
        counted = found["unique_processed"] + found["duplicate_dropped"]
        # `_taken` is read after the snapshot and never runs behind it, so what is left is what was still in flight.
        return {
            "received": self._taken,
            **found,
            "current_queue_size": self._taken - counted,
            "subscribers": self.followers,
            "last_commit": {
                "events": self.last_commit[0],
                "milliseconds": self.last_commit[1] / 1000,
            },
        }

    def _ask(
        self, thread: concurrent.futures.Executor, call: Callable[..., _T], *arguments: Any
    ) -> "asyncio.Future[_T]":
        return self._loop.run_in_executor(thread, call, *arguments)

    async def health(self) -> str:
        """Why events cannot be stored right now, or "" if they can. Where no recent commit shows it, it finds out by
        writing."""
        if self._stopping:
            return "the service is stopping"
        if any(task.done() for task in self._tasks):
            return "the consumer has ended"
        if self._failure or self._loop.time() - self._proven > HEALTH_PROBE_S:
            try:
                await self._ask(self._writer, self._store.probe)
                self._failure, self._proven = "", self._loop.time()
            except Exception as error:
                self._failure = str(error) or repr(error)
        return self._failure

    async def stop(self, timeout_s: float) -> bool:
        """Take nothing more, commit what is queued, close the store. False if time ran out before the queue did."""
        self._stopping = True
        drained = True
        if self._tasks:
            waiter = self._loop.create_task(self._queue.join())
            done, _ = await asyncio.wait([waiter], timeout=timeout_s)
            drained = bool(done)
            for task in self._tasks + [waiter]:
                task.cancel()
            await asyncio.gather(*self._tasks, waiter, return_exceptions=True)
            await self._ask(self._reading, self._reader.close)
            await self._ask(self._writer, self._store.close)
        self._writer.shutdown()
        self._reading.shutdown()
        return drained


def _log_group(records: Sequence[Record], decision: Decision) -> None:
    """The consumer's log lines: one for each event of a small group, one for a large group as a whole."""
    repeats = dict(decision.repeats)
    for index, verdict in decision.repeats:
        if verdict.kind == "conflict":
            log.warning(
                "CONFLICT - topic: %s, event_id: %s, source: %s: the identity is taken by seq %d with other content,"
                " which stays",
                records[index].topic,
                records[index].event_id,
                records[index].source,
                verdict.seq,
            )
    level = logging.INFO if len(records) <= QUIET_GROUP_EVENTS else logging.DEBUG
    if level == logging.DEBUG:
        log.info(
            "GROUP COMMITTED - events: %d, processed: %d, duplicates dropped: %d",
            len(records),
            len(records) - len(repeats),
            len(repeats),
        )
    if log.isEnabledFor(level):
        for index, event in enumerate(records):
            log.log(
                level,
                "%s - topic: %s, event_id: %s, source: %s",
                "DUPLICATE DROPPED" if index in repeats else "EVENT PROCESSED",
                event.topic,
                event.event_id,
                event.source,
            )


# ======================================================================================================================
# §5  HTTP/1.1: bytes in, `Request` out; `Response` in, bytes out. No I/O
#
# The parser is fed whatever the network brings, in whatever pieces, and answers one of three things: a whole request,
# "need more" (None), or HTTPError. It is a generator that reads like blocking code; at each `yield None` it waits to be fed.
#
# Knows §1 only. Every rule of syntax is a regular expression on bytes, matched in full, and stands beside the sentence
# of RFC 9112 (message syntax) or RFC 9110 (semantics) that asks for it.
#
#   * Where a message ends is never guessed: two opinions about its length refuse it.
#   * After HTTPError the connection is finished; what follows cannot be told from a smuggled request.
#   * Work is linear in the bytes fed, memory is bounded by the limits of §1.
#
# Simpler than a general server: no upgrade, no trailers handed on, no transfer coding but chunked, no content coding but
# gzip.
# ======================================================================================================================


class HTTPError(Exception):
    """A request that is refused. `problem` is a key of PROBLEMS; the message says what is wrong and what to do; `members`
    are what else the problem details have to say (RFC 9457 §3.2)."""

    def __init__(
        self, problem: str, detail: str, headers: Tuple[Tuple[str, str], ...] = (), **members: Any
    ) -> None:
        super().__init__(detail)
        self.problem, self.detail, self.headers, self.members = problem, detail, headers, members


class Head(NamedTuple):
    """What stands before the body. `path` is the raw path split at "/" and percent-decoded, without the empty first
    part; `query` is decoded; header names are lower case, values of repeated fields are joined by ", " (RFC 9110 §5.3);
    `content_type` is without parameters, in lower case; `length` is the body's in bytes, None for chunked. Heads are
    shared between requests: never change one."""

    method: str
    path: Tuple[str, ...]
    query: Dict[str, str]
    headers: Dict[str, str]
    content_type: str
    length: Optional[int]
    gzip: bool
    expects_continue: bool
    keep_alive: bool
    http_1_0: bool


class Request(NamedTuple):
    """One whole request."""

    head: Head
    body: bytes = b""


_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"  # RFC 9110 §5.6.2
_REQUEST_LINE = re.compile(
    rb"(" + _TOKEN + rb") ([^\x00-\x20\x7f#]+) HTTP/([0-9])\.([0-9])"
)  # RFC 9112 §3
_FIELD = re.compile(
    rb"(" + _TOKEN + rb"):([^\x00-\x08\x0a-\x1f\x7f]*)"
)  # RFC 9112 §5: no blank before the colon
_HOST = re.compile(
    r"(?:(?:[A-Za-z0-9\-._~!$&'()*+,;=]|%[0-9A-Fa-f]{2})*|\[[0-9A-Fa-f:.]+\])(?::[0-9]{0,5})?"
)  # RFC 9110 §7.2
_ABSOLUTE = re.compile(rb"[Hh][Tt][Tt][Pp][Ss]?://([^/?]+)/?(.*)")
_DIGITS = re.compile("[0-9]+")
_CHUNK_LINE = re.compile(
    rb"([0-9A-Fa-f]{1,16})(?:[ \t]*;[^\x00-\x08\x0a-\x1f\x7f]*)?"
)  # RFC 9112 §7.1
_OTHER_CODINGS = re.compile(
    r"(?:(?:(?:x-)?(?:gzip|compress)|deflate|identity)[ \t]*,[ \t]*)+chunked"
)  # RFC 9112 §7.2
_BARE_EOL = re.compile(rb"(?:^|[^\r])\n|\r[^\n]")
_ESCAPE = re.compile(rb"%([0-9A-Fa-f]{2})")
_BAD_ESCAPE = re.compile(rb"%(?![0-9A-Fa-f]{2})")
_COMPRESSED = {
    "": False,
    "identity": False,
    "gzip": True,
    "x-gzip": True,
}  # by Content-Encoding (RFC 9110 §8.4)
METHODS = (
    "GET",
    "HEAD",
    "POST",
    "PUT",
    "OPTIONS",
    "DELETE",
    "PATCH",
    "TRACE",
    "QUERY",
)  # known; any other is answered 501


def _refuse(detail: str, problem: str = "bad-request") -> NoReturn:
    raise HTTPError(problem, detail)


def percent_decode(raw: bytes, plus_is_blank: bool = False) -> str:
    """Percent-decoding (RFC 3986 §2.1) to text. Raises HTTPError for a lone % and for what is not UTF-8 then.

    >>> percent_decode(b"caf%C3%A9+1", plus_is_blank=True)
    'café 1'
    """
    if plus_is_blank:
        raw = raw.replace(b"+", b" ")
    if b"%" in raw:
        if _BAD_ESCAPE.search(raw):
            _refuse("the target has a % without two hexadecimal digits: write a literal % as %25")
        raw = _ESCAPE.sub(lambda match: bytes((int(match[1], 16),)), raw)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        _refuse("the target is not UTF-8 when percent-decoded")


def _parse_query(raw: bytes) -> Dict[str, str]:
    query: Dict[str, str] = {}
    for pair in filter(None, raw.split(b"&")):
        name, _, value = [percent_decode(part, True) for part in pair.partition(b"=")]
        if name in query:
            _refuse(f"the query parameter {name!a} is given twice", "bad-parameter")
        query[name] = value
    return query


class RequestParser:
    """`feed` it bytes, ask it for `next_request` until that is None. `phase` is "idle", "head" or "body";
    `wants_continue` is true while a client waits for "100 Continue" before it sends its body (RFC 9110 §10.1.1)."""

    def __init__(self, max_body_bytes: int = MAX_BODY_BYTES) -> None:
        self._max_body = max_body_bytes
        self._buffer = bytearray()
        self._scanned = 0  # bytes of the buffer already searched for what is awaited
        self._messages = self._parse()
        self._broken = False
        self.phase = "idle"
        self.wants_continue = False

    def feed(self, data: bytes) -> None:
        """Take bytes from the network."""
        self._buffer += data

    def next_request(self) -> Optional[Request]:
        """The next whole request, or None if more bytes are needed. Raises HTTPError; after that, it must not be asked
        again, because where the next request would start is not known."""
        assert not self._broken, "asked again after HTTPError"
        try:
            return next(self._messages)
        except HTTPError:
            self._broken = True
            self.wants_continue = False
            raise

    def close(self) -> None:
        """Let go of what was fed. Parser and generator refer to each other, so it would wait for the garbage collector."""
        self._messages.close()
        self._buffer.clear()

    def _parse(self) -> Generator[Optional[Request], None, None]:
        buffer = self._buffer
        while True:
            # RFC 9112 §2.2: a server SHOULD ignore at least one empty line before the request line.
            while not buffer or (
                buffer[0] == 13 and (len(buffer) < 2 or buffer[1] == 10) and self._scanned == 0
            ):
                if buffer[:2] == b"\r\n":
                    del buffer[:2]
                    self._scanned = 1  # one is enough
                else:
                    yield None
            self._scanned = 0
            self.phase = "head"
            text = yield from self._until(
                b"\r\n\r\n", MAX_HEAD_BYTES, "headers-too-large", "the request head", True
            )
            head = _parse_head(text)
            if head.length is not None and head.length > self._max_body:
                _refuse_body(self._max_body)
            self.phase = "body"
            self.wants_continue = head.expects_continue
            if head.length is None:
                body = yield from self._chunked()
            else:
                while len(buffer) < head.length:
                    yield None
                body = bytes(buffer[: head.length])
                del buffer[: head.length]
            self.wants_continue = False
            if head.gzip:
                body = _inflate(body, self._max_body)
            self.phase = "idle"
            yield Request(head, body)

    def _until(
        self, end: bytes, limit: int, problem: str, what: str, head: bool = False
    ) -> Generator[None, None, bytes]:
        """The bytes up to `end`, which are taken off the buffer with it. Every byte is searched once."""
        buffer = self._buffer
        while True:
            at = buffer.find(end, max(0, self._scanned - len(end) + 1))
            if (
                head
                and len(buffer) > MAX_REQUEST_LINE_BYTES + 1
                and buffer.find(b"\r\n", 0, MAX_REQUEST_LINE_BYTES + 2) < 0
            ):
                _refuse(
                    f"the request line is longer than {MAX_REQUEST_LINE_BYTES} bytes",
                    "target-too-long",
                )
            if (at if at >= 0 else len(buffer) - len(end) + 1) > limit:
                _refuse(f"{what} is longer than {limit} bytes", problem)
            if at >= 0:
                taken = bytes(buffer[:at])
                del buffer[: at + len(end)]
                self._scanned = 0
                return taken
            # RFC 9112 §2.2 lets a recipient take a bare LF for a line end; we do not, and say so before a time-out does.
            if _BARE_EOL.search(buffer, max(0, self._scanned - 1)):
                _refuse(f"{what} has a line that does not end with CR LF")
            self._scanned = len(buffer)
            yield None

    def _chunked(self) -> Generator[None, None, bytes]:
        """A chunked body (RFC 9112 §7.1); extensions are skipped, trailers checked and dropped."""
        buffer, body = self._buffer, bytearray()
        while True:
            line = yield from self._until(
                b"\r\n", MAX_CHUNK_LINE_BYTES, "bad-request", "a chunk size line"
            )
            match = _CHUNK_LINE.fullmatch(line)
            if match is None:
                _refuse("a chunk does not start with its size in hexadecimal")
            size = int(match[1], 16)
            if size == 0:
                break
            if len(body) + size > self._max_body:
                _refuse_body(self._max_body)
            while len(buffer) < size + 2 and b"\r\n".startswith(buffer[size:]):
                yield None
            if buffer[size : size + 2] != b"\r\n":
                _refuse("a chunk is not followed by CR LF where its size says it ends")
            body += buffer[:size]
            del buffer[: size + 2]
        left = MAX_TRAILER_BYTES
        for _ in range(MAX_FIELDS + 1):
            line = yield from self._until(b"\r\n", left, "headers-too-large", "the trailer section")
            if not line:
                return bytes(body)
            _parse_fields([line])
            left -= len(line)
        _refuse(f"there are more than {MAX_FIELDS} trailer fields", "headers-too-large")


def _refuse_body(limit: int, inflated: str = "") -> NoReturn:
    _refuse(f"the body has more than {limit} bytes{inflated}: send less at a time", "too-large")


@functools.lru_cache(
    HEADS_KEPT
)  # a client sends nearly the same head each time, and a third of all work is reading it
def _parse_head(text: bytes) -> Head:
    """Request line and fields, without the empty line after them. A pure function of its bytes. Raises HTTPError."""
    lines = text.split(b"\r\n")
    method, target, http_1_0 = _parse_request_line(lines[0])
    headers = _parse_fields(lines[1:])
    path, query, headers["host"] = _parse_target(method, target, headers, http_1_0)
    length = _body_length(headers, http_1_0)
    expect = headers.get("expect", "").lower()
    if expect not in ("", "100-continue"):
        _refuse("only Expect: 100-continue can be met", "expectation-failed")
    coding = headers.get("content-encoding", "").lower()
    if coding not in _COMPRESSED:
        raise HTTPError(
            "unsupported-encoding",
            "the Content-Encoding must be gzip or absent",
            (("Accept-Encoding", "gzip"),),
        )
    connection = {token.strip(" \t").lower() for token in headers.get("connection", "").split(",")}
    content_type = headers.get("content-type", "").partition(";")[0].strip(" \t").lower()
    return Head(
        method,
        path,
        query,
        headers,
        content_type,
        length,
        _COMPRESSED[coding],
        expect != "" and not http_1_0 and length != 0,
        "close" not in connection and (not http_1_0 or "keep-alive" in connection),
        http_1_0,
    )


def _parse_request_line(line: bytes) -> Tuple[str, bytes, bool]:
    """Method, target, and whether this is HTTP/1.0 (RFC 9112 §3)."""
    match = _REQUEST_LINE.fullmatch(line)
    if match is None:
        _refuse("the request line is not METHOD SP TARGET SP HTTP/1.1")
    method, target, major, minor = match[1].decode("ascii"), match[2], match[3], match[4]
    if major != b"1":
        _refuse("only HTTP/1.1 and HTTP/1.0 are spoken here", "version-not-supported")
    if method not in METHODS:
        _refuse(f"the method {method[:40]} is not known here", "not-implemented")
    return method, target, minor == b"0"


def _parse_fields(lines: List[bytes]) -> Dict[str, str]:
    """Header fields by lower-case name; repeated ones joined, so that what must stand alone no longer matches its form."""
    if len(lines) > MAX_FIELDS:
        _refuse(f"there are more than {MAX_FIELDS} header fields", "headers-too-large")
    headers: Dict[str, str] = {}
    for line in lines:
        match = _FIELD.fullmatch(line)
        if (
            match is None
        ):  # obs-fold (RFC 9112 §5.2), a blank before the colon, a control character, no colon
            _refuse("a field is not NAME: VALUE on one line")
        name, value = match[1].decode("ascii").lower(), match[2].strip(b" \t").decode("latin-1")
        if name in ("content_length", "transfer_encoding"):
            _refuse(f"the field {name} may be taken for another by a gateway")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return headers


def _parse_target(
    method: str, target: bytes, headers: Dict[str, str], http_1_0: bool
) -> Tuple[Tuple[str, ...], Dict[str, str], str]:
    """Path, query and host of any of the target forms that have one (RFC 9112 §3.2)."""
    host = headers.get("host", "" if http_1_0 else None)
    if host is None or _HOST.fullmatch(host) is None:
        _refuse("the Host field must be there once and name a host")
    absolute = _ABSOLUTE.fullmatch(target)
    if absolute is not None:  # RFC 9112 §3.2.2: its authority counts, not the Host field
        host, target = absolute[1].decode("latin-1"), b"/" + absolute[2]
        if _HOST.fullmatch(host) is None:
            _refuse("the target names no valid host")
    if target == b"*" and method == "OPTIONS":
        return ("*",), {}, host
    if not target.startswith(b"/"):
        _refuse("the target must start with a slash")
    raw_path, _, raw_query = target[1:].partition(b"?")
    return (
        tuple([percent_decode(part) for part in raw_path.split(b"/")]),
        _parse_query(raw_query),
        host,
    )


def _body_length(headers: Dict[str, str], http_1_0: bool) -> Optional[int]:
    """Bytes of the body, 0 without one, None for chunked (RFC 9112 §6.3)."""
    length, coding = headers.get("content-length", "0"), headers.get("transfer-encoding")
    if coding is None:
        if (
            _DIGITS.fullmatch(length) is None
        ):  # signs, blanks, lists, repeated fields, other digits than 0 to 9
            _refuse("Content-Length must be there once and hold decimal digits only")
        if len(length) > 18:
            _refuse("Content-Length has more than 18 digits", "too-large")
        return int(length)
    if "content-length" in headers or http_1_0:
        _refuse(
            "Transfer-Encoding goes neither with Content-Length, which it contradicts, nor with HTTP/1.0"
        )
    if _OTHER_CODINGS.fullmatch(coding.lower()):
        _refuse(
            "Transfer-Encoding can only be chunked: compress with Content-Encoding: gzip",
            "not-implemented",
        )
    if coding.lower() != "chunked":
        _refuse("Transfer-Encoding must be there once and be chunked")
    return None


def _inflate(body: bytes, limit: int) -> bytes:
    """gzip to plain bytes, with a bound on what comes out: a bomb of 4 MB would be 4 GB."""
    parts: List[bytes] = []
    size = 0
    while body:
        if len(parts) == MAX_GZIP_MEMBERS:
            _refuse(f"the gzip body has more than {MAX_GZIP_MEMBERS} members")
        member = zlib.decompressobj(
            31
        )  # 31: gzip, with its checksum checked; a file may have several members
        try:
            parts.append(member.decompress(body, limit + 1 - size))
        except zlib.error:
            _refuse("the body is not gzip, though its Content-Encoding says so")
        size += len(parts[-1])
        if size > limit:
            _refuse_body(limit, " when inflated")
        if not member.eof:
            _refuse("the gzip body is cut off")
        body = member.unused_data
    return b"".join(parts)


class Response(NamedTuple):
    """What to answer: all at once (bytes), or a stream of pieces whose length is not known beforehand."""

    status: int
    body: Union[bytes, AsyncGenerator[bytes, None]] = b""
    content_type: str = "application/json"
    headers: Tuple[Tuple[str, str], ...] = ()


REASONS = {
    100: "Continue",
    200: "OK",
    201: "Created",
    202: "Accepted",
    204: "No Content",
    410: "Gone",
    400: "Bad Request",
    401: "Unauthorized",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    408: "Request Timeout",
    409: "Conflict",
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


def http_date(instant_s: float) -> str:
    """Seconds since 1970 to the one date format of HTTP (RFC 9110 §5.6.7). Python leaves LC_TIME at "C" whatever the
    environment says, so the names are the English ones.

    >>> http_date(0)
    'Thu, 01 Jan 1970 00:00:00 GMT'
    """
    return time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(instant_s))


def encode_response(
    response: Response, date: str, keep_alive: bool, head_only: bool = False, http_1_0: bool = False
) -> bytes:
    """The head, and the body if it is all there. RFC 9110 §8.6: 204 has no Content-Length; §9.3.2: HEAD gets the head
    that GET would; a stream is chunked, or ends with the connection for HTTP/1.0."""
    body = response.body
    length = len(body) if isinstance(body, bytes) else None
    head = _encode_head(
        response.status, response.content_type, response.headers, length, date, keep_alive, http_1_0
    )
    return head + body if isinstance(body, bytes) and not head_only else head


@functools.lru_cache(HEADS_KEPT)  # most answers of one second have the same head
def _encode_head(
    status: int,
    content_type: str,
    headers: Tuple[Tuple[str, str], ...],
    length: Optional[int],
    date: str,
    keep_alive: bool,
    http_1_0: bool,
) -> bytes:
    lines = [
        f"HTTP/1.1 {status} {REASONS[status]}",
        "Date: " + date,
        "Server: aggregator/" + __version__,
        "X-Content-Type-Options: nosniff",
    ]  # what a publisher sent is never to be taken for a page
    if status != 204:
        lines.append("Content-Type: " + content_type)
        if length is not None:
            lines.append(f"Content-Length: {length}")
        elif not http_1_0:
            lines.append("Transfer-Encoding: chunked")
    lines += [f"{name}: {value}" for name, value in headers]
    if (
        not keep_alive or http_1_0
    ):  # RFC 9112 §9.3: for HTTP/1.0, keeping the connection is what has to be said
        lines.append("Connection: " + ("keep-alive" if keep_alive else "close"))
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


# ======================================================================================================================
# §6  Reference: the table of routes, and what is made from it
#
# A route is a row: what it takes, what it answers, what can go wrong. Dispatch, 404, 405, OPTIONS and HEAD come from the
# table, and so do GET /openapi.json and GET /docs: the service and what it says of itself cannot drift apart. The schema of
# an answer is read off its example, and a test sends every example and compares.
#
# Knows §1 and §5. Knows no pipeline and no sockets. Pure; the documents are made when first asked for, and kept.
# ======================================================================================================================


class Answer(NamedTuple):
    """A success: its status, when it is given, an example (JSON, or text as it is), and the query that asks for it."""

    status: int
    meaning: str
    example: Any
    content_type: str = "application/json"
    query: str = ""


class Route(NamedTuple):
    """One row of the table. A path part in braces takes one segment; {topic} takes all that are left over. `parameters`, of
    the query, and `headers` are in TERMS; `problems` come on top of ANYWHERE; `bodies` are schemas by media type."""

    method: str
    path: str
    handler: str
    parameters: Tuple[str, ...]
    summary: str
    answers: Tuple[Answer, ...]
    problems: Tuple[str, ...] = ()
    bodies: Dict[str, Dict[str, Any]] = {}
    headers: Tuple[str, ...] = ()


def _term(meaning: str, example: Any, **schema: Any) -> Dict[str, Any]:
    return {**schema, "description": meaning, "examples": [example]}


def _wire(example: Any) -> str:
    return example if isinstance(example, str) else json.dumps(example, separators=(",", ":"))


_NAME_RULE = {
    "type": "string",
    "minLength": 1,
    "maxLength": MAX_NAME_BYTES,
    "pattern": r"^[^\u0000-\u001f\u007f-\u009f]*[^\s\u0000-\u001f\u007f-\u009f][^\u0000-\u001f\u007f-\u009f]*$",
}
_ISO_8601 = (
    r"[0-9]{4}-(?:0[1-9]|1[0-2])-(?:0[1-9]|[12][0-9]|3[01])(?:[T ](?:[01][0-9]|2[0-3]):[0-5][0-9]"
    r"(?::[0-5][0-9](?:[.,][0-9]{1,30})?)?(?:Z|[+-](?:[01][0-9]|2[0-3])(?::?[0-5][0-9])?)?)?"
)
_INSTANT_RULE = {"type": "string", "pattern": f"^{_ISO_8601}$"}
_SINCE_RULE = {"type": "string", "pattern": f"^(?:{_ISO_8601}|[0-9]{{1,9}}(?:us|ms|s|m|h|d|w))$"}
_FLAG_RULE = {"type": "string", "enum": ["0", "1", "false", "true"]}

# What a name means: JSON Schemas (2020-12) with words and an example. First parameters; where GET means something else by
# one, it has a row of its own. Then what else an event or an answer has.
TERMS: Dict[str, Dict[str, Any]] = {
    "topic": _term(
        "1 to 255 bytes in UTF-8, not blank, no control characters; `/` makes it hierarchical",
        "door",
        **_NAME_RULE,
    ),
    "event_id": _term(
        "the same; its producer never uses it again for another event", "42", **_NAME_RULE
    ),
    "source": _term(
        "who says so, by the same rules; PUT takes the peer's address without it",
        "hall",
        **_NAME_RULE,
    ),
    "timestamp": _term(
        "ISO 8601; no offset is UTC, no time is midnight; PUT takes the present without it",
        "2026-01-01T13:00:00+01:00",
        **_INSTANT_RULE,
    ),
    "wait": _term("0 answers before the commit", "0", default="1", **_FLAG_RULE),
    "verdicts": _term("1 lists a verdict for each event", "1", default="0", **_FLAG_RULE),
    "explain": _term("1 also says how each verdict came about", "1", default="0", **_FLAG_RULE),
    "GET topic": _term(
        "only this topic, or those that begin with what stands before a final `*`",
        "door*",
        type="string",
    ),
    "GET source": _term("only this source", "hall", type="string"),
    "since": _term("from this instant on, or so long ago: `10m`, `2h`, `7d`", "7d", **_SINCE_RULE),
    "until": _term("before this instant, or so long ago", "2026-01-02", **_SINCE_RULE),
    "limit": _term(
        "at most so many", 10, type="integer", minimum=1, maximum=PAGE_MAX, default=PAGE_DEFAULT
    ),
    "cursor": _term(
        "`next` of an answer in this order",
        "a17.1",
        type="string",
        pattern=r"^[ad]-?[0-9]{1,18}\.[0-9]{1,18}$",
    ),
    "order": _term(
        "by time, then by seq", "desc", type="string", enum=["asc", "desc"], default="asc"
    ),
    "follow": _term(
        "1 never ends: what is stored after `after`, in order of seq, then whatever comes",
        "1",
        **_FLAG_RULE,
    ),
    "after": _term(
        "with `follow`: the seq to begin behind; without it, now",
        "0",
        type="string",
        pattern="^[0-9]{1,18}$",
    ),
    "Last-Event-ID": _term(
        "with `follow`: outranks `after`; browsers send it by themselves",
        "1",
        pattern="^[0-9]{1,18}$",
    ),
    "Idempotency-Key": _term(
        "with `text/plain`: names each event, with its line number; without it names are random",
        "log-1",
        type="string",
        maxLength=MAX_NAME_BYTES - 2,
        pattern=r"^[^\u0000-\u001f\u007f-\u009f]*$",
    ),
    "payload": _term(
        "what happened, at most 100 levels deep, with numbers that a double can hold",
        {"n": 1},
        type="object",
    ),
    "sequence": _term(
        "optional: the producer's own counter",
        7,
        type=["integer", "null"],
        minimum=0,
        maximum=MAX_SEQUENCE,
    ),
    "seq": _term(
        "the place in the order of arrival, never given twice", 1, type="integer", minimum=1
    ),
    "processed_at": _term("when it was stored", "2026-01-01T12:00:00.250000Z", **_INSTANT_RULE),
    "verdict": _term(
        "a `conflict` has the identity of another event, which stays",
        "new",
        enum=["new", "duplicate", "conflict"],
    ),
    "next": _term("goes into `cursor`; null at the end", None, type=["string", "null"]),
}
_EVENT = {
    name: TERMS[name]["examples"][0]
    for name in ("topic", "event_id", "timestamp", "source", "payload", "sequence")
}
_STORED = {
    "seq": 1,
    **_EVENT,
    "timestamp": "2026-01-01T12:00:00.000000Z",
    "processed_at": "2026-01-01T12:00:00.250000Z",
}
_VERDICT = {"topic": "door", "event_id": "42", "verdict": "duplicate", "seq": 1}
_COUNTS = {
    "status": "accepted",
    "accepted": 1,
    "unique": 0,
    "duplicates": 1,
    "conflicts": 0,
    "stored": True,
}
_PROBLEM = {
    "type": "/docs#invalid-event",
    "title": "An event is not valid",
    "status": 422,
    "detail": "1 fault found in the events; nothing was taken",
    "errors": [{"index": 0, "field": "topic", "message": "is missing"}],
    "oldest_seq": 1,
}
_EVENTS = {"type": "array", "minItems": 1, "items": {"$ref": "#/components/schemas/event"}}

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# What can be wrong with any request; with one that finds no route; and with one that writes.
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
_READING = ("unauthorized", "store-unavailable")
_WRITING = ("not-json", "forbidden", "invalid-event", "queue-full", "stopping", *_READING)

ROUTES = (
    Route(
        "GET",
        "/",
        "index",
        (),
        "What this is and where to go",
        (
            Answer(
                200,
                "the routes",
                {
                    "service": "aggregator",
                    "version": __version__,
                    "routes": [{"method": "GET", "path": "/", "summary": "This"}],
                },
            ),
            Answer(200, "a page, for browsers", "…", "text/html; charset=utf-8"),
        ),
    ),
    Route(
        "POST",
        "/publish",
        "publish",
        ("wait", "verdicts", "explain", "topic", "source"),
        "Publish one event or many",
        (
            Answer(202, "on disk", {**_COUNTS, "unique": 1, "duplicates": 0}),
            Answer(
                202,
                "queued",
                {"status": "accepted", "accepted": 1, "stored": False},
                query="?wait=0",
            ),
            Answer(
                202,
                "on disk, and why",
                {
                    **_COUNTS,
                    "events": [
                        {
                            **_VERDICT,
                            "explanation": {
                                "key": "6b5f0a3c",
                                "found": "recent",
                                "first_seen": "2026-01-01T12:00:00.250000Z",
                                "seconds_since_first_seen": 1.5,
                                "why": "the key was among the recent ones",
                            },
                        }
                    ],
                    "group": {"events": 1, "milliseconds": 0.8},
                },
                query="?explain=1",
            ),
        ),
        ("batch-too-large", *_WRITING),
        {
            "application/json": _term(
                'an event, a list, or `{"events": []}`, or several of them; so is any other type read',
                _EVENT,
                anyOf=[
                    {"$ref": "#/components/schemas/event"},
                    _EVENTS,
                    {"type": "object", "required": ["events"], "properties": {"events": _EVENTS}},
                ],
            ),
            "application/x-ndjson": _term("an event a line", _wire(_EVENT), type="string"),
            "text/plain": _term(
                "each line is the `message` of an event of `?topic=` and `?source=`, which go with it only",
                "first line\nsecond line\n",
                type="string",
                pattern=r"\S",
            ),
        },
        ("Idempotency-Key",),
    ),
    Route(
        "PUT",
        "/events/{topic}/{event_id}",
        "put_event",
        ("timestamp", "source"),
        "Publish one event under its identity",
        (Answer(201, "new", {**_VERDICT, "verdict": "new"}), Answer(200, "a duplicate", _VERDICT)),
        ("conflict", *_WRITING),
        {
            "text/plain": _term(
                'a text, for the payload `{"message": text}`', "finished in 312 s", type="string"
            ),
            "application/json": _term(
                "an object is the payload, and anything else a text", {"n": 1}
            ),
        },
    ),
    Route(
        "GET",
        "/events",
        "list_events",
        ("topic", "source", "since", "until", "limit", "cursor", "order", "follow", "after"),
        "List events by time, or follow them as they come",
        (
            Answer(
                200,
                "a page",
                {"count": 1, "events": [_STORED], "next": None},
                query="?topic=door*&limit=10",
            ),
            Answer(
                200, "all pages, an event a line", _wire(_STORED) + "\n", "application/x-ndjson"
            ),
            Answer(
                200,
                "a live tail",
                _wire(_STORED) + "\n",
                "application/x-ndjson",
                "?follow=1&after=0",
            ),
            Answer(
                200,
                "a live tail for browsers",
                "retry: 2000\n\nid: 1\ndata: " + _wire(_STORED) + "\n\n",
                "text/event-stream",
                "?follow=1&after=0",
            ),
        ),
        ("gone", *_READING),
        {},
        ("Last-Event-ID",),
    ),
    Route(
        "GET",
        "/events/{topic}/{event_id}",
        "get_event",
        (),
        "Read one event",
        (Answer(200, "the event", _STORED),),
        ("no-such-event", "gone", *_READING),
    ),
    Route(
        "GET",
        "/duplicates",
        "list_duplicates",
        ("limit",),
        "The last duplicates, the latest first",
        (
            Answer(
                200,
                "500 at most",
                {
                    "count": 1,
                    "duplicates": [
                        {
                            **_VERDICT,
                            "source": "hall",
                            "first_seen": "2026-01-01T12:00:00.250000Z",
                            "repeated": "2026-01-01T12:00:01.750000Z",
                            "delay_seconds": 1.5,
                        }
                    ],
                },
                query="?limit=1",
            ),
        ),
        ("unauthorized",),
    ),
    Route(
        "GET",
        "/gaps",
        "gaps",
        ("source", "limit"),
        "Sequence numbers that sources have left out",
        (
            Answer(
                200,
                "first and last of each gap",
                {
                    "count": 1,
                    "sources": [
                        {
                            "source": "hall",
                            "newest": 9,
                            "missing_count": 1,
                            "given_up": 0,
                            "missing": [[8, 8]],
                        }
                    ],
                },
                query="?source=hall",
            ),
        ),
        _READING,
    ),
    Route(
        "GET",
        "/stats",
        "stats",
        (),
        "The books, the topics, and what the duplicates look like",
        (
            Answer(
                200,
                "all of it",
                {
                    "received": 2,
                    "unique_processed": 1,
                    "duplicate_dropped": 1,
                    "conflicts": 0,
                    "stored": 1,
                    "removed_by_retention": 0,
                    "topics": {"door/front": {"unique": 1, "duplicates": 1, "stored": 1}},
                    "topics_total": 1,
                    "sources": {"192.0.2.7": {"unique": 1, "duplicates": 1}},
                    "sources_total": 1,
                    "gaps": 0,
                    "duplicate_delay_seconds": {"1": 0, "10": 1},
                    "windows": [
                        {
                            "window_seconds": 120,
                            "like": "NATS JetStream, default",
                            "would_have_stored_twice": 0,
                        }
                    ],
                    "store_bytes": 86016,
                    "current_queue_size": 0,
                    "subscribers": 0,
                    "last_commit": {"events": 1, "milliseconds": 0.8},
                    "uptime_seconds": 12.5,
                    "version": __version__,
                    "limits": {
                        "queue_max_size": QUEUE_MAX_EVENTS,
                        "max_events_per_topic": 0,
                        "retention_seconds": 0.0,
                        "max_body": MAX_BODY_BYTES,
                        "dedup_retention_seconds": 0.0,
                    },
                },
            ),
        ),
        _READING,
    ),
    Route(
        "GET",
        "/metrics",
        "metrics",
        (),
        "The same for Prometheus",
        (
            Answer(
                200,
                "text format 0.0.4",
                "# HELP aggregator_events_unique_total Events stored.\n# TYPE aggregator_events_unique_total"
                " counter\naggregator_events_unique_total 1\n",
                METRICS_TYPE,
            ),
        ),
        _READING,
    ),
    Route(
        "GET",
        "/health",
        "health",
        (),
        "Whether events can be stored right now",
        (Answer(200, "they can", {"status": "ok"}),),
        ("store-unavailable",),
    ),
    Route(
        "GET",
        "/docs",
        "docs",
        (),
        "This reference, to read",
        (Answer(200, "a page", "…", "text/html; charset=utf-8"),),
    ),
    Route(
        "GET",
        "/openapi.json",
        "openapi",
        (),
        "This reference, for tools",
        (Answer(200, "OpenAPI", {"openapi": "3.1.0"}),),
    ),
)


def _schema(example: Any, name: str = "") -> Dict[str, Any]:
    """The JSON Schema of an answer, read off an example: a name of TERMS means here what it means there; the keys of an
    object are its fields, unless they are no identifiers: then they are data.

    >>> _schema({"a/b": [1]})
    {'type': 'object', 'additionalProperties': {'type': 'array', 'items': {'type': 'integer'}}}
    """
    if name in TERMS:
        return {"$ref": "#/components/schemas/" + name}
    if isinstance(example, list):
        return {"type": "array", "items": _schema(example[0])}
    if not isinstance(example, dict):
        return {
            "type": {bool: "boolean", int: "integer", float: "number", str: "string"}[type(example)]
        }
    if not all(map(str.isidentifier, example)):
        return {"type": "object", "additionalProperties": _schema(next(iter(example.values())))}
    return {
        "type": "object",
        "required": [key for key in example if key not in ("sequence", "errors", "oldest_seq")],
        "properties": {key: _schema(value, key) for key, value in example.items()},
    }


def _meanings(route: Route) -> List[Tuple[str, str, Dict[str, Any]]]:
    """The parameters of a route: name, place, and what it means there."""
    places = (
        ("path", re.findall(r"{(\w+)}", route.path)),
        ("query", route.parameters),
        ("header", route.headers),
    )
    return [
        (name, place, TERMS.get((route.method + " ") * (place == "query") + name, TERMS[name]))
        for place, names in places
        for name in names
    ]


def sample_request(route: Route, answer: Answer) -> Tuple[str, Dict[str, str], str]:
    """The target, header fields and body that ask for this answer, made of the examples."""
    target = (
        re.sub(r"{(\w+)}", lambda match: str(TERMS[match[1]]["examples"][0]), route.path)
        + answer.query
    )
    fields = (
        {"Accept": answer.content_type}
        if answer.content_type != route.answers[0].content_type
        else {}
    )
    return (
        target,
        fields,
        _wire(next(iter(route.bodies.values()))["examples"][0]) if route.bodies else "",
    )


@functools.lru_cache(1)
def openapi_json() -> bytes:
    """The table as OpenAPI 3.1. A path parameter of OpenAPI has no slashes: a topic's are sent as %2F then, which is the same."""
    paths: Dict[str, Dict[str, Any]] = {}
    for route in ROUTES:
        responses: Dict[str, Any] = {}
        for answer in route.answers:
            content = responses.setdefault(
                str(answer.status), {"description": answer.meaning, "content": {}}
            )["content"]
            media = content.setdefault(
                answer.content_type.partition(";")[0], {"schema": {"anyOf": []}, "examples": {}}
            )
            media["schema"]["anyOf"].append(_schema(answer.example))
            media["examples"][answer.meaning] = {"value": answer.example}
        for name in ANYWHERE + route.problems:
            status, title, advice = PROBLEMS[name]
            responses.setdefault(
                str(status),
                {
                    "description": "",
                    "content": {
                        "application/problem+json": {
                            "schema": {"$ref": "#/components/schemas/problem"}
                        }
                    },
                },
            )["description"] += f"`{name}`: {title}: {advice}.\n"
        operation = paths.setdefault(route.path, {})[route.method.lower()] = {
            "operationId": route.handler,
            "summary": route.summary,
            "responses": responses,
            "parameters": [
                {
                    "name": name,
                    "in": place,
                    "required": place == "path",
                    "description": term["description"],
                    "schema": term,
                }
                for name, place, term in _meanings(route)
            ],
        }
        if route.bodies:
            operation["requestBody"] = {
                "required": route.method == "POST",
                "content": {
                    media_type: {"schema": schema} for media_type, schema in route.bodies.items()
                },
            }
        if "unauthorized" not in route.problems:
            operation["security"] = []
    schemas = {name: term for name, term in TERMS.items() if " " not in name}
    return _wire(
        {
            "openapi": "3.1.0",
            "info": {"title": "aggregator", "version": __version__},
            "servers": [{"url": "/"}],
            "paths": paths,
            "security": [{"bearer": []}, {}],
            "components": {
                "schemas": {**schemas, "event": _schema(_EVENT), "problem": _schema(_PROBLEM)},
                "securitySchemes": {
                    "bearer": {
                        "type": "http",
                        "scheme": "bearer",
                        "description": "needed if the service has a --token",
                    }
                },
            },
        }
    ).encode()


@functools.lru_cache(1)
def docs_html() -> str:
    """The table as the body of an HTML page. The `type` of a problem is a link into it."""

    def _marked(text: str) -> str:
        return re.sub(
            "`([^`]+)`", r"<code>\1</code>", text.replace("&", "&amp;").replace("<", "&lt;")
        )

    def _table(rows: Sequence[Tuple[str, str]]) -> str:
        return (
            "<table>"
            + "".join(
                [f"<tr><th>{_marked(name)}<td>{_marked(meaning)}\n" for name, meaning in rows]
            )
            + "</table>\n"
        )

    def _links(names: Sequence[str]) -> str:
        return ", ".join([f'<a href="#{name}">{name}</a>' for name in names])

    spelling = {"path": "`{{{0}}}`", "query": "`?{0}={1}`", "header": "`{0}: {1}`"}
    parts = [
        "<h1>aggregator</h1>\n<p>",
        _links([route.handler for route in ROUTES]),
        ', <a href="#problems">problems</a>',
    ]
    for route in ROUTES:
        parts.append(
            f'<section><h2 id="{route.handler}"><code>{route.method} {route.path}</code></h2>\n<p>{route.summary}.\n'
        )
        parts.append(
            _table(
                [
                    (spelling[place].format(name, term["examples"][0]), term["description"])
                    for name, place, term in _meanings(route)
                ]
                + [
                    (f"`{media_type}`", schema["description"])
                    for media_type, schema in route.bodies.items()
                ]
            )
        )
        for answer in route.answers:
            target, fields, body = sample_request(route, answer)
            words = [
                "curl -sN" if "follow" in answer.query else "curl -s",
                f"'localhost:8000{target}'",
            ]
            words += ["-X PUT"] * (route.method == "PUT") + [f"-d '{body}'"] * bool(body)
            curl, received = (
                " ".join(words + [f"-H '{name}: {value}'" for name, value in fields.items()]),
                _wire(answer.example),
            )
            parts.append(
                f"<p>{answer.status}, {answer.meaning}:<pre>{_marked(curl)}\n{_marked(received)}</pre>\n"
            )
            if route.bodies and answer is route.answers[0]:
                raw = encode_response(
                    Response(answer.status, received.encode()), http_date(1_767_268_800), True
                ).decode()
                parts.append(
                    f"<p>The same on the wire:<pre>{route.method} {target} HTTP/1.1\nHost: localhost:8000\n"
                    f"Content-Length: {len(body)}\n\n{_marked(body)}\n\n{_marked(raw)}</pre>\n"
                )
        parts.append(
            ("<p>Problems: " + _links(route.problems) if route.problems else "") + "</section>\n"
        )
    parts.append(
        "<section><h2>An event</h2>\n"
        + _table([(f"`{name}`", TERMS[name]["description"]) for name in _EVENT])
    )
    parts.append(
        '</section>\n<section><h2 id="problems">Problems</h2>\n<p>Any request may meet: '
        + _links(ANYWHERE + NOWHERE)
    )
    parts += [
        f'<dl id="{name}"><dt><code>{name}</code> {status}: {title}<dd>{_marked(advice)}</dl>\n'
        for name, (status, title, advice) in PROBLEMS.items()
    ]
    return "".join(parts) + "</section>\n"


def metrics_text(rows: Sequence[Tuple[str, str, str, Any]]) -> str:
    """Prometheus text format 0.0.4 of (name, type, help, value). A value is a number; or a label with numbers by its value;
    or a histogram's bounds, counts (one more than bounds) and sum, None if it is not known.

    >>> metrics_text([("topics", "gauge", "Topics.", ("name", {'a"b': 1}))]).splitlines()[2]
    'aggregator_topics{name="a\\\\"b"} 1'
    """
    lines = []
    for name, kind, meaning, value in rows:
        lines += [f"# HELP aggregator_{name} {meaning}", f"# TYPE aggregator_{name} {kind}"]
        samples = {"": value}
        if kind == "histogram":
            so_far = list(itertools.accumulate(value[1]))
            samples = {
                f'_bucket{{le="{bound}"}}': count
                for bound, count in zip([*value[0], "+Inf"], so_far)
            }
            samples.update(
                {"_count": so_far[-1], **({} if value[2] is None else {"_sum": value[2]})}
            )
        elif isinstance(value, tuple):
            # JSON escapes a quote, a backslash and a newline as this format does, and nothing else that a name can hold.
            samples = {
                f"{{{value[0]}={json.dumps(text, ensure_ascii=False)}}}": n
                for text, n in value[1].items()
            }
        lines += [f"aggregator_{name}{suffix} {number}" for suffix, number in samples.items()]
    return "\n".join(lines) + "\n"


# ======================================================================================================================
# §7  Page: what a browser is shown
#
# One document that asks nobody else for anything: its policy obeys only the style and the script whose hashes it names.
# The numbers are in it, so it reads without JavaScript; the script keeps them moving. Ink is what was stored, carbon blue
# what came again, red what contradicts. What publishers send is text: escaped here, assigned as text by the script.
#
# Knows §1. Pure: numbers in, HTML out.
# ======================================================================================================================

PAGE_STYLE = """
:root { color-scheme: light dark; --paper: #f6f7f9; --field: #fff; --ink: #15171e; --soft: #5a6070; --line: #d3d7e1;
  --red: #b3202c; --carbon: #3846c4; --ghost: #3846c44d; --type: ui-monospace, "SF Mono", "Cascadia Mono", Menlo, monospace }
@media (prefers-color-scheme: dark) { :root { --paper: #0f111a; --field: #171a27; --ink: #e8eaf3; --soft: #9ba2b8;
  --line: #2d3246; --red: #ff867f; --carbon: #93a0ff; --ghost: #93a0ff4d } }
* { box-sizing: border-box; margin: 0 } [hidden], :root:not(.js) .live { display: none !important }
body { margin: auto; padding: 1.5rem clamp(1rem, 4vw, 3rem) 3rem; max-width: 76rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere } a { color: inherit; text-decoration-color: var(--carbon) }
:focus-visible { outline: 2px solid var(--carbon); outline-offset: 2px } h2 { font-size: 1rem; margin-bottom: .4rem }
header, .row, .books { display: flex; flex-wrap: wrap; gap: 0 1.25rem; align-items: baseline } nav, .last { margin-left: auto }
nav a { margin-right: .75rem } dt, label, thead, .soft { color: var(--soft); font-size: .875rem } dd { margin: 0 }
.d, .duplicate { color: var(--carbon); fill: var(--carbon) } .x, .conflict, .refused, #state.off { color: var(--red) }
.axis { stroke: var(--line) } svg { width: 100%; height: 12rem; fill: currentColor } text { fill: var(--soft); font-size: .8rem }
h1, .books dd, .stamp, .books div::before { font: 500 1.5rem var(--type); letter-spacing: -.05em }
h1, dd.d, .stamp.duplicate { text-shadow: .1em .07em var(--ghost) } .books { gap: 0 1.5rem; margin: 2rem 0 .75rem }
.books dd { font-size: clamp(1.75rem, 4.4vw, 3.4rem) } .books div { display: grid; align-items: center; gap: 0 1.5rem }
.books div + div::before { content: "+"; color: var(--soft); grid-row: 2 } .books div:nth-child(2)::before { content: "=" }
.books div + div dt { grid-column: 2 } #state::before { content: "● " } #state.on::before { color: var(--carbon) }
progress { appearance: none; display: block; width: 100%; height: .5rem; border: 0; background: var(--line); margin-top: .5rem }
::-webkit-progress-bar { background: var(--line) } ::-webkit-progress-value { background: var(--carbon) }
::-moz-progress-bar { background: var(--carbon) } th progress, .books + progress { height: .2rem; margin: 0 0 .5rem }
section { border-top: 1px solid var(--line); padding-top: .75rem; margin-top: 2rem } th code { overflow-wrap: normal }
.two { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr)); gap: 1.25rem 3rem }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .5rem } .wide { width: 100% }
td, th { text-align: left; font-weight: 400; padding: .15rem .75rem .15rem 0; vertical-align: top }
.sum td, .sum th + th { text-align: right; white-space: nowrap; padding: .15rem 0 .15rem 1ch; font-variant-numeric: tabular-nums }
.late th { white-space: nowrap } .late .edge td { border-top: 1px dashed var(--carbon); text-align: left; white-space: normal;
  padding: 0 0 .4rem } button { cursor: pointer } .main { background: var(--ink); color: var(--paper) }
input, textarea, button { font: inherit; color: inherit; background: var(--field); border: 1px solid var(--soft); width: 100%;
  border-radius: 3px; padding: .4rem .6rem; min-height: 2.75rem } input, textarea, pre, summary { font: .875rem/1.5 var(--type) }
form { display: grid; gap: .75rem; grid-template-columns: 1fr 1fr; align-items: end; margin-bottom: .75rem }
.all { grid-column: 1 / 3 } ol { list-style: none; padding: 0 } table { border-spacing: 0; width: 100% }
pre { white-space: pre-wrap; border-left: 2px solid var(--line); padding-left: .75rem; margin: .25rem 0 .75rem }
.stamp { display: inline-block; border: 2px solid; border-radius: 4px; padding: 0 .4em; margin: .75rem .75rem .25rem 0;
  rotate: -2deg; font-size: 1.1rem } #lines li { border-top: 1px solid var(--line) }
summary { display: grid; cursor: pointer; grid-template-columns: 19ch 14rem 9rem 1fr; gap: 0 1.25rem; padding: .35rem 0 }
summary span { overflow: hidden; text-overflow: ellipsis; white-space: nowrap }
@media (max-width: 44rem) { .books { display: grid } .books div:nth-child(n) { grid-template-columns: 1.5rem 1fr auto; gap: 0 }
  .books dt:nth-child(n) { grid-column: 2 } .books div + div::before { grid-row: 1 } .books div:first-child { order: 1;
  border-top: 3px double } .books div:nth-child(2)::before { content: "" } summary { grid-template-columns: 19ch 1fr }
  summary span:last-child { grid-column: 1 / 3 } nav { margin: 0 } }
"""

_PAGE_BODY = """
<header><h1>aggregator</h1><p id="state" role="status">{state}</p><nav aria-label="Where to go"><a class="live" href="#publish">
Publish</a> <a class="live" href="#tail">Live tail</a> <a href="/docs">Reference</a></nav></header><main>
<form id="key" class="live" hidden><label>Token<input name="token" type="password" autocomplete="off" required pattern="[!-~]+">
</label><button class="main">Use this token</button></form>
<dl class="books"><div><dt>received<dd data-n="received"></div><div><dt>unique<dd data-n="unique_processed"></div>
<div><dt>duplicates<dd class="d" data-n="duplicate_dropped"></div><div><dt>in the queue<dd data-n="current_queue_size"></div></dl>
{share}<p>The books balance: what is received is stored once, dropped as a duplicate, or still in the queue.
<b class="x" data-n="conflicts"></b> of the duplicates are conflicts: a known id with other content.</p>
<section class="live"><div class="row"><h2>Events per second</h2><p><b id="now0"></b> unique</p><p class="d"><b id="now1"></b>
duplicates</p></div><svg id="plot" role="img" aria-label="Unique events and duplicates of each second"><path/><path
class="d"/><path class="axis"/><text/></svg><p class="row soft">2 minutes ago<span class="last">now</span></p></section>
<section><dl class="facts"><div><dt>Queue<dd><b data-n="current_queue_size"></b> of <b data-n="limits.queue_max_size"></b></div>
<div><dt>Last commit<dd><b data-n="last_commit.events"></b> in <b data-n="last_commit.milliseconds" data-per="1"></b> ms</div>
<div><dt>Stored<dd><b data-n="stored"></b> in <b data-n="store_bytes" data-per="1000000"></b> MB</div>
<div><dt>Gaps<dd><b data-n="gaps"></b></div><div><dt>Up<dd><b data-n="uptime_seconds" data-per="3600"></b> h</div></dl></section>
<div class="two"><section><h2>Topics</h2><table class="sum"><thead><tr><th class="wide">largest of
<b data-n="topics_total"></b><th>unique<th>duplicates<th>share</thead><tbody id="topics">{topics}</tbody></table></section>
<section><h2>How late duplicates come</h2><table class="sum late">{delays}</table></section></div>
<section class="live" hidden><h2>Gaps in the sequence of a source</h2><table><tbody id="gaps"></tbody></table></section>
<section id="publish" class="live"><div class="two"><div><h2>Publish, and publish again</h2><form id="event"><label>Topic<input
name="topic" value="demo"></label><label>Source<input name="source" value="this page"></label><label class="all">Event id<input
name="event_id"></label><label class="all">Payload<textarea name="payload" rows="3">{{"door": "open"}}</textarea></label>
<button class="main">Publish</button><button type="button" id="fresh">New event id</button></form></div><div><h2>Verdicts</h2>
<p class="soft">The same id again is a duplicate; the same id with another payload, a conflict.</p><ol id="verdicts"
aria-live="polite"></ol></div></div></section><section id="tail" class="live"><h2>Live tail</h2><form id="filter"><label>Topic,
or its start and *<input name="topic" type="search"></label><label>Source<input name="source" type="search"></label><button
id="pause" type="button" aria-pressed="false">Pause</button><p id="note" class="soft"></p></form><ol id="lines"></ol></section>
</main>
"""

PAGE_SCRIPT = r"""
"use strict";
const KEEP = 200, SPAN = 120, TOPICS = 12, SILENCE_MS = 40000;  // events, seconds, topics shown; a live tail speaks every 15 s
const $ = id => document.getElementById(id), all = query => document.querySelectorAll(query), count = n => n.toLocaleString("en");
const sleep = ms => new Promise(done => setTimeout(done, ms)), form = id => Object.fromEntries(new FormData($(id)));
const put = (e, text) => { if (e.textContent !== text) e.textContent = text; };
const make = (tag, kind, ...parts) => { const e = document.createElement(tag); e.append(...parts), e.className = kind; return e };
const gauge = (value, max, e = make("progress", "")) => Object.assign(e, {max: max || 1, value, ariaHidden: "true"});
const rows = (id, table) => $(id).replaceChildren(...table.map(([head, ...cells]) => make("tr", "", make("th", "", ...head),
  ...cells.map(text => make("td", "", text)))));
const trouble = error => error.constructor === Error ? error.message : "No answer from the service; asking again";
let token = "", locked = false, stats, gaps, last = 0, wire = new AbortController(), fault = "", waiting = [], rates = [];
try { token = sessionStorage.token || ""; } catch {}  // where storage is forbidden, its mention throws
async function ask(path, options = {}) {
  const headers = {"Content-Type": "application/json", ...(token && {Authorization: "Bearer " + token})};
  const answer = await fetch(path, {cache: "no-store", headers, ...options});
  if (answer.status !== 401) return answer;
  locked = true, $("key").hidden = false;
  throw new Error(token ? "This is not the token" : "The service asks for a token");
}
function show(now) {
  for (const e of all("[data-n]")) {
    const n = e.dataset.n.split(".").reduce((inside, name) => inside && inside[name], now), per = e.dataset.per;
    if (typeof n === "number") put(e, per ? (n / per).toFixed(1) : count(n));
  }
  const delays = now.duplicate_delay_seconds, most = Math.max(...Object.values(delays));
  for (const e of all("[data-bound]")) gauge(delays[e.dataset.bound], most, e);
  gauge(now.duplicate_dropped, now.received, $("share"));
  rows("topics", Object.entries(now.topics).slice(0, TOPICS).map(([name, {unique: u, duplicates: d}]) =>
    [[name, gauge(d, u + d)], count(u), count(d), (100 * d / (u + d)).toFixed(1) + " %"]));
}
function plot(now) {  // one scale for both: unique above the axis, duplicates below it, like a sheet and its carbon copy
  const passed = (now.at - stats.at) / 1000, rate = name => Math.max(0, now[name] - stats[name]) / passed;
  const second = [rate("unique_processed"), rate("duplicate_dropped")], {clientWidth: width, clientHeight: height} = $("plot");
  rates = rates.concat(Array(Math.min(SPAN, Math.round(passed))).fill(second)).slice(-SPAN);
  const [top, low] = [0, 1].map(side => Math.max(1, ...rates.map(each => each[side]))), power = 10 ** Math.floor(Math.log10(top));
  const step = width / SPAN, zero = height * .66, scale = Math.min(zero / top, (height - zero) / low);
  const bars = (side, way) => rates.map((each, i) =>
    `M${(SPAN - rates.length + i) * step} ${zero}v${way * each[side] * scale}h${step * .7}V${zero}`).join("");
  const round = power * [5, 2, 1].find(n => n * power <= top), line = zero - round * scale, label = $("plot").lastChild;
  [bars(0, -1), bars(1, 1), `M0 ${zero}h${width}M0 ${line}h${width}`].forEach((d, i) => all("path")[i].setAttribute("d", d));
  put(label, count(round) + "/s"), label.setAttribute("y", line - 4);
  second.forEach((n, i) => put($("now" + i), count(Math.round(n))));
}
async function showGaps(n) {
  const {sources} = await (await ask("/gaps?limit=20")).json(), range = ([from, to]) => from + (to > from ? "–" + to : "");
  rows("gaps", sources.map(each => [[each.source], count(each.missing_count), each.missing.slice(-20).map(range).join(", ")]));
  $("gaps").closest("section").hidden = !n, gaps = n;
}
async function poll() {
  for (;; await sleep(1000)) try {
    if (document.hidden || locked) { wire.abort(); continue; }
    const answer = await ask("/stats"), now = {...await answer.json(), at: performance.now()};
    if (!answer.ok) throw new Error(now.detail);
    if (now.gaps !== gaps) await showGaps(now.gaps);
    if (stats) plot(now);
    show(stats = now), put($("state"), "Live"), $("state").className = "on";
  } catch (error) { put($("state"), trouble(error)), $("state").className = "off"; }
}
async function follow() {
  for (let wait = 250;; await sleep(wait), wait = Math.min(2 * wait, 5000)) try {
    if (document.hidden || locked || !stats) { wait = 250; continue; }
    const filter = Object.entries(form("filter")).filter(([, text]) => text), back = filter.length ? 20 * KEEP : KEEP;
    const after = Math.max(last, stats.unique_processed - back, 0);  // seq counts the unique ones: it begins `back` events ago
    const query = new URLSearchParams([...filter, ["follow", 1], ["after", after]]), mine = wire = new AbortController();
    const answer = await ask("/events?" + query, {signal: mine.signal}), problem = answer.ok ? {} : await answer.json();
    fault = problem.detail || "", last = answer.ok ? last : (problem.oldest_seq || 1) - 1;
    for (let reader = answer.ok && answer.body.getReader(), text = "", decoder = new TextDecoder(); reader; wait = 250) {
      const silence = setTimeout(() => mine.abort(), SILENCE_MS), {value, done} = await reader.read();
      clearTimeout(silence);
      if (done) break;
      const lines = (text + decoder.decode(value, {stream: true})).split("\n");
      text = lines.pop(), waiting = waiting.concat(lines.filter(line => line)).slice(-KEEP);
      if (waiting.length) last = JSON.parse(waiting[waiting.length - 1]).seq;
    }
  } catch (error) { fault = trouble(error); }
}
// Numbers stay as they came, 1.0 and 2^53 + 1 too. A browser that cannot do that shows such an event as the bare line.
const exact = (key, value, raw) => typeof value === "number" && raw && JSON.rawJSON ? JSON.rawJSON(raw.source) : value;
function row(line) {
  const event = JSON.parse(line, exact), cells = [event.timestamp.slice(0, 19).replace("T", " "), event.topic, event.source,
    JSON.stringify(event.payload)].map((text, i) => make("span", i === 1 ? "" : "soft", text));
  const whole = JSON.stringify(event) === line ? JSON.stringify(event, null, 2) : line;
  return make("li", "", make("details", "", make("summary", "", ...cells), make("pre", "", whole)));
}
function draw() {
  const lines = $("lines"), held = $("pause").ariaPressed === "true" || lines.querySelector("[open]");
  put($("note"), fault || (held ? `Held; ${waiting.length} waiting` : "Following"));
  if (!held) lines.prepend(...waiting.splice(0).map(row).reverse());  // an open event stays where it is
  while (lines.children.length > KEEP) lines.lastChild.remove();
}
async function publish() {
  const {payload, ...fields} = form("event");  // the payload goes as typed: the service explains what is wrong with it
  const body = JSON.stringify({...fields, timestamp: new Date()}).slice(0, -1) + `,"payload":${payload}}`;
  let kind = "refused", title = "", why, more = "";
  try {
    const answer = await ask("/publish?explain=1", {method: "POST", body}), found = await answer.json();
    const faults = (found.errors || []).map(each => `; ${each.field} ${each.message}`).join("");
    if (!answer.ok) throw new Error(`${found.title}: ${found.detail}${faults}`);
    const [{verdict, seq, explanation: e}] = found.events, {events, milliseconds} = found.group;
    kind = verdict, title = "seq " + seq, why = e.why, more = `key ${e.key}, first seen ` +
      `${e.seconds_since_first_seen.toFixed(1)} s before; group of ${count(events)} committed in ${milliseconds.toFixed(1)} ms`;
  } catch (error) { why = trouble(error); }
  $("verdicts").prepend(make("li", "", make("b", "stamp " + kind, kind), title, make("p", "", why), make("p", "soft", more)));
  while ($("verdicts").children.length > 5) $("verdicts").lastChild.remove();
}
const fresh = () => { $("event").elements.event_id.value = Date.now().toString(36) + Math.random().toString(36).slice(2, 8); };
const on = (id, kind, act) => $(id).addEventListener(kind, event => { if (kind === "submit") event.preventDefault(); act(); });
on("event", "submit", publish), on("fresh", "click", fresh), on("filter", "submit", () => {});
on("filter", "change", () => { last = 0, waiting = [], $("lines").replaceChildren(), wire.abort(); });
on("pause", "click", () => { $("pause").ariaPressed = $("pause").ariaPressed === "false"; });
on("key", "submit", () => {
  token = form("key").token, locked = false, $("key").hidden = true;
  try { sessionStorage.token = token; } catch {}
});
document.documentElement.className = "js", fresh(), poll(), follow(), setInterval(draw, 250);
"""

_GAUGE = '<progress {} value="{}" max="{}" aria-hidden="true"></progress>'
_ESCAPES = {ord("&"): "&amp;", ord("<"): "&lt;", ord('"'): "&quot;"}


@functools.lru_cache(None)
def page_policy() -> str:
    """The Content-Security-Policy of every `html_document`: nothing from elsewhere, nothing inline but our style and script."""
    style, script = [
        b2a_base64(sha256(text.encode()).digest(), newline=False).decode()
        for text in (PAGE_STYLE, PAGE_SCRIPT)
    ]
    return (
        f"default-src 'none'; script-src 'sha256-{script}'; style-src 'sha256-{style}'; connect-src 'self'; img-src data:;"
        " form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
    )


def html_document(title: str, body: str) -> str:
    """A document in our style; both are HTML, and may hold PAGE_SCRIPT as a script, but no other."""
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>'
        f'{title}</title><link rel="icon" href="data:,"><style>{PAGE_STYLE}</style><body>{body}</html>\n'
    )


def _delay_rows(delays: Dict[str, int]) -> Iterator[str]:
    """The histogram, and a line across it where a well-known dedup window ends."""
    edges = {
        window: f'<tr class="edge soft"><td colspan="3">{like}: forgets here, and <b data-n="windows.{at}'
        '.would_have_stored_twice"></b> would be stored twice'
        for at, (window, like) in enumerate(DEDUP_WINDOWS)
    }
    for bound in DELAY_BOUNDS_S + (0,):
        size, unit = next(
            each
            for each in ((86_400, "d"), (3600, "h"), (60, "min"), (1, "s"))
            if bound % each[0] == 0
        )
        label, name = (f"to {bound // size} {unit}", str(bound)) if bound else ("later", "inf")
        gauge = _GAUGE.format(
            f'data-bound="{name}"', delays.get(name, 0), max(delays.values(), default=0) or 1
        )
        yield (
            f'<tr><th>{label}<td class="wide">{gauge}<td data-n="duplicate_delay_seconds.{name}">'
            + edges.get(bound, "")
        )


def render_page(stats: Optional[Dict[str, Any]]) -> str:
    """The page, with the numbers of GET /stats in it; without, if they need a token: the script then asks for it."""
    found: Dict[str, Any] = stats or {"topics": {}, "duplicate_delay_seconds": {}}

    def number(match: "re.Match[str]") -> str:
        """The tag that asks for a number, and the number behind it."""
        value: Any = found
        for name in match[1].split("."):
            value = (
                value[int(name)]
                if isinstance(value, list)
                else value.get(name)
                if isinstance(value, dict)
                else None
            )
        return match[0] + (
            "–" if value is None else f"{value / int(match[2]):.1f}" if match[2] else f"{value:,}"
        )

    topics = []
    for name, unique, duplicates in [
        (name, n["unique"], n["duplicates"]) for name, n in found["topics"].items()
    ][:TOPICS_SHOWN]:
        gauge = _GAUGE.format("", duplicates, unique + duplicates)
        topics.append(
            "<tr><th>{}{}<td>{:,}<td>{:,}<td>{:.1f} %".format(
                name.translate(_ESCAPES),
                gauge,
                unique,
                duplicates,
                100 * duplicates / (unique + duplicates),
            )
        )
    body = _PAGE_BODY.format(
        state="The numbers of this moment" if stats else "",
        topics="".join(topics),
        delays="".join(_delay_rows(found["duplicate_delay_seconds"])),
        share=_GAUGE.format(
            'id="share"', found.get("duplicate_dropped", 0), found.get("received") or 1
        ),
    )
    body = re.sub(r'data-n="([a-z0-9_.]+)"(?: data-per="([0-9]+)")?>', number, body)
    return html_document("aggregator", f"{body}<script>{PAGE_SCRIPT}</script>")


# ======================================================================================================================
# §8  API: from a request to its answer
#
# Handlers turn requests into calls of the pipeline and results into answers; what goes wrong on the way is an exception
# of the section where it went wrong, and `_refusal` is the one place that knows its status.
#
# Knows §1, §2, §4 to §7. Knows no sockets and no SQL.
#
#   * Every answer that is not a success is application/problem+json (RFC 9457).
#   * A query parameter that the route does not know is refused: a misspelt filter must not list everything.
# ======================================================================================================================

_ERROR_PROBLEMS: Tuple[Tuple[type, str], ...] = (
    (NotJSON, "not-json"),
    (InvalidEvents, "invalid-event"),
    (BatchTooLarge, "batch-too-large"),
    (QueueFull, "queue-full"),
    (Stopping, "stopping"),
    (Unavailable, "store-unavailable"),
    (CursorAhead, "bad-parameter"),
)
_DURATION = re.compile(r"([0-9]{1,9})(us|ms|s|m|h|d|w|)")
_DURATION_US = {
    "us": 1,
    "ms": 1000,
    "s": 1_000_000,
    "": 1_000_000,
    "m": 60_000_000,
    "h": 3_600_000_000,
    "d": 86_400_000_000,
    "w": 604_800_000_000,
}
OPEN_PATHS = (
    ("",),
    ("health",),
    ("docs",),
    ("openapi.json",),
)  # what needs no token: it shows no data without one
_SEQ = re.compile("[0-9]{1,18}")
_PORT = re.compile(r":[0-9]*\Z")
_CURSOR = re.compile(r"([ad])(-?[0-9]{1,18})\.([0-9]{1,18})")


def parse_duration(text: str) -> int:
    """`90s`, `10m`, `2h`, `7d`, `1w` or plain seconds, to microseconds. Raises ValueError.

    >>> parse_duration("10m")
    600000000
    """
    match = _DURATION.fullmatch(text)
    if match is None:
        raise ValueError("is not a duration such as 30s, 10m, 2h or 7d")
    duration_us = int(match[1]) * _DURATION_US[match[2]]
    if duration_us > MAX_DURATION_US:
        raise ValueError("is longer than a thousand years")
    return duration_us


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8") + b"\n"


def html_response(html: str) -> Response:
    """A page for a browser, which may obey no other style and script than ours."""
    return Response(
        200,
        html.encode("utf-8"),
        "text/html; charset=utf-8",
        (
            ("Content-Security-Policy", page_policy()),
            ("Referrer-Policy", "no-referrer"),
            ("Cache-Control", "no-store"),
            ("Vary", "Accept"),
        ),
    )


def problem_details(error: HTTPError) -> Response:
    """Problem details (RFC 9457) for a refusal. `type` is where the reference explains it."""
    status, title, _ = PROBLEMS[error.problem]
    headers = error.headers + ((("Retry-After", str(RETRY_AFTER_S)),) if status == 503 else ())
    return Response(
        status,
        _json(
            {
                "type": "/docs#" + error.problem,
                "title": title,
                "status": status,
                "detail": error.detail,
                **error.members,
            }
        ),
        "application/problem+json",
        headers,
    )


def _refusal(error: Exception) -> HTTPError:
    """Any exception of a handler to what it is called: the one table from errors to problems."""
    if isinstance(error, HTTPError):
        return error
    for kind, name in _ERROR_PROBLEMS:
        if isinstance(error, kind):
            if isinstance(error, InvalidEvents):
                return HTTPError(
                    name,
                    f"{error} found in the events; nothing was taken",
                    errors=[fault._asdict() for fault in error.faults],
                )
            return HTTPError(name, str(error))
    if isinstance(error, CursorExpired):
        return HTTPError("gone", str(error), oldest_seq=error.oldest_seq)
    log.error("a bug while answering a request", exc_info=error)
    return HTTPError("internal-error", "this is our fault; the log says more")


class Access(NamedTuple):
    """Who may do what. `token` allows everything, `read_token` what changes nothing; both empty: everyone may. `hosts`
    are the names a request may be addressed to, empty for any; `origins` the foreign pages that may write and read; both
    may hold "*" for all."""

    token: str = ""
    read_token: str = ""
    hosts: FrozenSet[str] = frozenset()
    origins: FrozenSet[str] = frozenset()

    def check(self, head: Head) -> None:
        """Refuse what is not addressed to us, what a page of another site sends, and what has not the right token. Raises
        HTTPError. A page in a browser on this machine can send to localhost, and, by a name that resolves to 127.0.0.1
        (DNS rebinding), read what comes back; the Host and Origin fields are what tells it apart."""
        host, origin, writes = (
            head.headers["host"].lower(),
            head.headers.get("origin"),
            head.method in ("POST", "PUT"),
        )
        if host and self.hosts and "*" not in self.hosts and _PORT.sub("", host) not in self.hosts:
            raise HTTPError(
                "misdirected", f"nobody here is called {_shown(host)}: --allow-host adds a name"
            )
        if (
            origin is not None
            and writes
            and not self._ours(origin, host)
            and not self.allows(origin)
        ):
            raise HTTPError(
                "forbidden",
                f"a page of {_shown(origin)} may not write here: --allow-origin adds an origin",
            )
        if (
            not self.token
            or head.method == "OPTIONS"
            or head.path in OPEN_PATHS
            or self.knows(head, self.token)
        ):
            return
        if not self.read_token or not self.knows(head, self.read_token):
            raise HTTPError(
                "unauthorized",
                "send Authorization: Bearer and the token",
                (("WWW-Authenticate", "Bearer"),),
            )
        if writes:
            raise HTTPError(
                "forbidden",
                "this token is for reading only",
                (("WWW-Authenticate", 'Bearer error="insufficient_scope"'),),
            )

    @staticmethod
    def _ours(origin: str, host: str) -> bool:
        """Whether a page of `origin` came from here (RFC 6454 §7); TLS may end before us, so the scheme tells nothing."""
        return origin.lower().partition("://")[2] == host

    def allows(self, origin: str) -> bool:
        """Whether a foreign page may write and read."""
        return origin.lower() in self.origins or "*" in self.origins

    def knows(self, head: Head, token: str) -> bool:
        """Whether the request carries this token (RFC 6750 §2.1), compared in a time that does not depend on where they
        differ."""
        import hmac  # only here: small systems have it in a package of its own

        scheme, _, given = head.headers.get("authorization", "").partition(" ")
        return scheme.lower() == "bearer" and hmac.compare_digest(
            given.strip(" ").encode("latin-1"), token.encode("ascii")
        )


class API:
    """Answers requests. `clock` gives microseconds since 1970 UTC, `random_id` a fresh event id; `limits` is shown;
    `access` may be replaced before the first request."""

    def __init__(
        self,
        pipeline: Pipeline,
        clock: Callable[[], int],
        random_id: Callable[[], str],
        limits: Dict[str, Any],
    ) -> None:
        self.access = Access()
        self._pipeline = pipeline
        self._limits = limits
        self._clock = clock
        self._random_id = random_id
        self._started = clock()
        self._refused = dict.fromkeys(PROBLEMS, 0)
        self.connections: Callable[[], int] = lambda: 0  # how many are open, if the server says so
        self._handlers: Dict[str, Callable[[Request, str], Awaitable[Response]]] = {
            route.handler: getattr(self, "_" + route.handler) for route in ROUTES
        }
        self._exact: Dict[Tuple[str, ...], Dict[str, Route]] = {}
        self._under_events: Dict[str, Route] = {}
        for route in ROUTES:
            target = (
                self._under_events
                if "{" in route.path
                else self._exact.setdefault(tuple(route.path[1:].split("/")), {})
            )
            target[route.method] = route

    async def answer(self, request: Request, peer: str) -> Response:
        """The response to a request from the address `peer`. Never raises (but for cancellation)."""
        response = await self._dispatch(request, peer)
        origin = request.head.headers.get("origin")
        if origin is not None and self.access.allows(origin):  # CORS, of the Fetch standard
            response = response._replace(
                headers=response.headers
                + (
                    ("Access-Control-Allow-Origin", origin),
                    ("Access-Control-Expose-Headers", "Retry-After"),
                    ("Vary", "Origin"),
                )
            )
        return response

    async def _dispatch(self, request: Request, peer: str) -> Response:
        try:
            self.access.check(request.head)
            routes = self._exact.get(request.head.path)
            if routes is None and request.head.path[0] == "events" and len(request.head.path) >= 3:
                routes = self._under_events
            if request.head.method == "OPTIONS":
                return self._options(request, routes)
            if routes is None:
                raise HTTPError(
                    "not-found",
                    "there is no {}; GET / lists what there is".format(
                        _shown("/" + "/".join(request.head.path))
                    ),
                )
            route = routes.get("GET" if request.head.method == "HEAD" else request.head.method)
            if route is None:
                raise HTTPError(
                    "method-not-allowed", f"use {_allow(routes)}", (("Allow", _allow(routes)),)
                )
            for name in request.head.query:
                if name not in route.parameters:
                    raise HTTPError(
                        "bad-parameter",
                        "{} has no parameter {}; it has: {}".format(
                            route.path, _shown(name), ", ".join(route.parameters) or "none"
                        ),
                    )
            return await self._handlers[route.handler](request, peer)
        except Exception as error:
            method, path = request.head.method, _shown("/" + "/".join(request.head.path))
            return self.refuse(
                _refusal(error),
                f"{peer}, {method} {path}",
                method not in ("GET", "HEAD", "OPTIONS"),
            )

    def refuse(self, error: HTTPError, who: str, warn: bool = True) -> Response:
        """The answer to a request that is refused, counted and logged."""
        log.log(
            logging.WARNING if warn else logging.DEBUG,
            f"REFUSED {PROBLEMS[error.problem][0]} - %s: %s",
            who,
            error.detail,
        )
        self._refused[error.problem] += 1
        return problem_details(error)

    def _options(self, request: Request, routes: Optional[Dict[str, Route]]) -> Response:
        if request.head.path == ("*",):
            routes = {route.method: route for route in ROUTES}
        if routes is None:
            raise HTTPError(
                "not-found", "there is nothing here to ask about; GET / lists what there is"
            )
        headers: Tuple[Tuple[str, str], ...] = (("Allow", _allow(routes)),)
        if (
            "access-control-request-method" in request.head.headers
        ):  # a browser asks before it sends (CORS preflight)
            headers += (
                ("Access-Control-Allow-Methods", _allow(routes)),
                ("Access-Control-Max-Age", "600"),
                (
                    "Access-Control-Allow-Headers",
                    "Authorization, Content-Type, Idempotency-Key, Last-Event-ID",
                ),
            )
        return Response(204, headers=headers)

    async def _index(self, request: Request, peer: str) -> Response:
        if _accepts(request, "text/html"):
            numbers = None
            with contextlib.suppress(Unavailable):  # the page comes anyway, says so, and asks again
                numbers = None if self.access.token else await self._numbers()
            return html_response(render_page(numbers))
        return Response(
            200,
            _json(
                {
                    "service": "aggregator",
                    "version": __version__,
                    "routes": [
                        {"method": route.method, "path": route.path, "summary": route.summary}
                        for route in ROUTES
                    ],
                }
            ),
        )

    async def _publish(self, request: Request, peer: str) -> Response:
        wait, explain = _flag(request, "wait", True), _flag(request, "explain", False)
        listed = _flag(request, "verdicts", False) or explain
        if request.head.content_type == "text/plain":
            events = self._text_events(request)
        else:
            if "topic" in request.head.query or "source" in request.head.query:
                raise HTTPError(
                    "bad-parameter",
                    "topic and source go with Content-Type: text/plain; a JSON event names its own",
                )
            events = parse_events(request.body, self._pipeline.max_events)
        receipt = await self._pipeline.publish(events, len(request.body), wait)
        if receipt is None:
            return Response(
                202, b'{"status":"accepted","accepted":%d,"stored":false}\n' % len(events)
            )
        repeats = len(receipt.repeats)
        conflicts = (
            sum([verdict.kind == "conflict" for _, verdict in receipt.repeats]) if repeats else 0
        )
        return Response(
            202,
            b'{"status":"accepted","accepted":%d,"unique":%d,"duplicates":%d,"conflicts":%d,"stored":true%b}\n'
            % (
                len(events),
                len(events) - repeats,
                repeats,
                conflicts,
                _listed_verdicts(receipt, explain) if listed else b"",
            ),
        )

    def _text_events(self, request: Request) -> List[Event]:
        for name in ("topic", "source"):
            if name not in request.head.query:
                raise HTTPError(
                    "bad-parameter", f"text/plain needs ?topic= and ?source=: {name} is missing"
                )
        key = request.head.headers.get("idempotency-key")
        new_id = (
            (lambda number: self._random_id())
            if key is None
            else (lambda number: f"{key}:{number}")
        )
        return events_from_lines(
            decode_text(request.body),
            request.head.query["topic"],
            request.head.query["source"],
            self._clock(),
            new_id,
            self._pipeline.max_events,
        )

    async def _put_event(self, request: Request, peer: str) -> Response:
        text = decode_text(request.body)
        try:
            values = json_values(text)
        except NotJSON:
            values = []
        payload = (
            values[0] if len(values) == 1 and isinstance(values[0], dict) else {"message": text}
        )
        events = read_events(
            [
                {
                    "topic": "/".join(request.head.path[1:-1]),
                    "event_id": request.head.path[-1],
                    "payload": payload,
                    "timestamp": _mend_offset(request.head.query["timestamp"])
                    if "timestamp" in request.head.query
                    else format_timestamp(self._clock()),
                    "source": request.head.query.get("source", peer),
                }
            ]
        )
        receipt = await self._pipeline.publish(events, len(request.body))
        assert receipt is not None
        verdict = next(receipt.verdicts())
        if verdict.kind == "conflict":
            raise HTTPError(
                "conflict",
                f"event_id {_shown(events[0].event_id)} of topic {_shown(events[0].topic)} is stored"
                f" as seq {verdict.seq} with another source or payload, which stays: choose another event_id",
            )
        return Response(
            201 if verdict.kind == "new" else 200,
            _json(
                {
                    "topic": events[0].topic,
                    "event_id": events[0].event_id,
                    "verdict": verdict.kind,
                    "seq": verdict.seq,
                }
            ),
        )

    async def _list_events(self, request: Request, peer: str) -> Response:
        if _flag(request, "follow", False):
            return await self._follow(request)
        if "after" in request.head.query:
            raise HTTPError(
                "bad-parameter", "after goes with follow=1; pages are turned with cursor"
            )
        query = self._event_query(request)
        if _accepts(request, "application/x-ndjson"):
            if "limit" not in request.head.query:
                query = query._replace(limit=PAGE_MAX)
            first = await self._pipeline.page(
                query, "\n"
            )  # here, so that a failure is still a 503 and not half a list
            return Response(
                200,
                self._lines(query, first, "limit" in request.head.query),
                "application/x-ndjson",
            )
        page = await self._pipeline.page(query)
        following = (
            "null"
            if page.next is None
            else '"{}{}.{}"'.format("d" if query.descending else "a", *page.next)
        )
        return Response(
            200, f'{{"count":{page.size},"events":[{page.text}],"next":{following}}}\n'.encode()
        )

    async def _lines(
        self, query: EventQuery, page: Page, limited: bool
    ) -> AsyncGenerator[bytes, None]:
        """All pages, one in memory at a time; up to `query.limit` events if `limited`, else to the end."""
        left = query.limit
        while True:
            piece, page = (
                page.text.encode("utf-8") + b"\n",
                page._replace(text=""),
            )  # so that it is not kept twice
            if page.size:
                yield piece
            left -= page.size
            if page.next is None or (limited and left <= 0):
                return
            query = query._replace(after=page.next, limit=left if limited else PAGE_MAX)
            page = await self._pipeline.page(query, "\n")

    async def _follow(self, request: Request) -> Response:
        """A live tail: a line of JSON for each event, or Server-Sent Events (WHATWG HTML §9.2)."""
        for name in ("since", "until", "limit", "cursor", "order"):
            if name in request.head.query:
                raise HTTPError(
                    "bad-parameter",
                    f"{name} does not go with follow=1: it starts with after=SEQ and has no end",
                )
        # A browser that connects again names the last event it has; that is nearer than the `after` of its first address.
        text = request.head.headers.get("last-event-id") or request.head.query.get("after")
        if text is not None and _SEQ.fullmatch(text) is None:
            raise HTTPError(
                "bad-parameter", f"after, or Last-Event-ID, must be a seq, not {_shown(text)}"
            )
        query = self._event_query(request)
        first = await self._pipeline.tail(query, None if text is None else int(text))
        tails = self._pipeline.follow(query, first)
        if _accepts(request, "text/event-stream"):
            return Response(
                200,
                _server_sent_events(tails),
                "text/event-stream",
                (("Cache-Control", "no-store"),),
            )
        return Response(
            200, _json_lines(tails), "application/x-ndjson", (("Cache-Control", "no-store"),)
        )

    def _event_query(self, request: Request) -> EventQuery:
        get = request.head.query.get
        topic, order = get("topic"), get("order", "asc")
        if order not in ("asc", "desc"):
            raise HTTPError("bad-parameter", f"order must be asc or desc, not {_shown(order)}")
        after = None
        if "cursor" in request.head.query:
            match = _CURSOR.fullmatch(request.head.query["cursor"])
            if match is None or (match[1] == "d") != (order == "desc"):
                raise HTTPError(
                    "bad-parameter",
                    "cursor must be the `next` of an answer in the same order, not {}".format(
                        _shown(request.head.query["cursor"])
                    ),
                )
            after = (int(match[2]), int(match[3]))
        prefix = topic is not None and topic.endswith("*")
        return EventQuery(
            topic[:-1] if topic is not None and prefix else topic,
            prefix,
            get("source"),
            self._instant(request, "since"),
            self._instant(request, "until"),
            _limit(request),
            after,
            order == "desc",
        )

    def _instant(self, request: Request, name: str) -> Optional[int]:
        """`since` or `until`: an instant, or how long ago. Raises HTTPError."""
        text = request.head.query.get(name)
        if text is None:
            return None
        try:
            if _DURATION.fullmatch(text) and not text.isdigit():
                return self._clock() - parse_duration(text)
            return parse_timestamp(_mend_offset(text))
        except ValueError as error:
            raise HTTPError(
                "bad-parameter",
                f"{name} {error}, nor a duration such as 10m, 2h or 7d: {_shown(text)}",
            )

    async def _get_event(self, request: Request, peer: str) -> Response:
        topic, event_id = "/".join(request.head.path[1:-1]), request.head.path[-1]
        seq, text = await self._pipeline.event(topic, event_id)
        if seq is None:
            raise HTTPError(
                "no-such-event",
                f"no event {_shown(event_id)} was ever stored under topic {_shown(topic)}",
            )
        if text is None:
            raise HTTPError(
                "gone",
                f"the event was stored as seq {seq} and retention has removed it since; its identity is still"
                " known, so a repeat of it is a duplicate",
            )
        return Response(200, text.encode("utf-8") + b"\n")

    async def _list_duplicates(self, request: Request, peer: str) -> Response:
        kept = list(self._pipeline.duplicates)[-_limit(request) :]
        return Response(
            200,
            _json(
                {
                    "count": len(kept),
                    "duplicates": [
                        {
                            "topic": event.topic,
                            "event_id": event.event_id,
                            "source": event.source,
                            "verdict": verdict.kind,
                            "seq": verdict.seq,
                            "first_seen": format_timestamp(verdict.first_seen),
                            "repeated": format_timestamp(now_us),
                            "delay_seconds": (now_us - verdict.first_seen) / 1e6,
                        }
                        for event, verdict, now_us in reversed(kept)
                    ],
                }
            ),
        )

    async def _gaps(self, request: Request, peer: str) -> Response:
        found = await self._pipeline.gaps(request.head.query.get("source"), _limit(request))
        return Response(200, _json({"count": len(found), "sources": found}))

    async def _stats(self, request: Request, peer: str) -> Response:
        return Response(200, _json(await self._numbers()))

    async def _numbers(self) -> Dict[str, Any]:
        return {
            **await self._pipeline.stats(),
            "uptime_seconds": round((self._clock() - self._started) / 1e6, 3),
            "version": __version__,
            "limits": self._limits,
        }

    async def _metrics(self, request: Request, peer: str) -> Response:
        found, sizes, times = (
            await self._pipeline.stats(),
            self._pipeline.commit_events,
            self._pipeline.commit_seconds,
        )
        topics, delays = (
            list(found["topics"].items())[:METRICS_MAX_TOPICS],
            found["duplicate_delay_seconds"].values(),
        )
        return Response(
            200,
            metrics_text(
                (
                    # What waits is not received yet: it may be lost, and a counter must never fall.
                    (
                        "events_received_total",
                        "counter",
                        "Events decided.",
                        found["unique_processed"] + found["duplicate_dropped"],
                    ),
                    ("events_unique_total", "counter", "Events stored.", found["unique_processed"]),
                    (
                        "events_duplicates_total",
                        "counter",
                        "Events known before, conflicts among them.",
                        found["duplicate_dropped"],
                    ),
                    (
                        "events_conflicts_total",
                        "counter",
                        "Events whose identity another one has.",
                        found["conflicts"],
                    ),
                    (
                        "topic_unique_total",
                        "counter",
                        "Events stored.",
                        ("topic", {name: each["unique"] for name, each in topics}),
                    ),
                    (
                        "topic_duplicates_total",
                        "counter",
                        "Repeats.",
                        ("topic", {name: each["duplicates"] for name, each in topics}),
                    ),
                    (
                        "rejected_total",
                        "counter",
                        "Requests refused, by problem.",
                        ("reason", self._refused),
                    ),
                    (
                        "queue_events",
                        "gauge",
                        "Events taken and not yet committed.",
                        found["current_queue_size"],
                    ),
                    (
                        "queue_limit_events",
                        "gauge",
                        "Events that may wait.",
                        self._pipeline.max_events,
                    ),
                    (
                        "commit_events",
                        "histogram",
                        "Events of a commit.",
                        (sizes.bounds, sizes.counts, sizes.sum),
                    ),
                    (
                        "commit_duration_seconds",
                        "histogram",
                        "Time of a commit.",
                        (times.bounds, times.counts, times.sum),
                    ),
                    (
                        "duplicate_delay_seconds",
                        "histogram",
                        "Ages of events at repeats.",
                        (DELAY_BOUNDS_S, delays, None),
                    ),
                    (
                        "sequence_gaps",
                        "gauge",
                        "Sequence numbers that sources have left out.",
                        found["gaps"],
                    ),
                    ("subscribers", "gauge", "Live tails.", found["subscribers"]),
                    ("connections", "gauge", "Open connections.", self.connections()),
                    (
                        "store_bytes",
                        "gauge",
                        "Size of the store with its write-ahead log.",
                        found["store_bytes"],
                    ),
                    (
                        "start_time_seconds",
                        "gauge",
                        "When the service started, since 1970.",
                        self._started / 1e6,
                    ),
                    ("build_info", "gauge", "What is running.", ("version", {__version__: 1})),
                )
            ).encode("utf-8"),
            METRICS_TYPE,
        )

    async def _docs(self, request: Request, peer: str) -> Response:
        return html_response(html_document("aggregator: reference", docs_html()))

    async def _openapi(self, request: Request, peer: str) -> Response:
        return Response(200, openapi_json())

    async def _health(self, request: Request, peer: str) -> Response:
        reason = await self._pipeline.health()
        if reason:
            raise HTTPError("store-unavailable", reason)
        return Response(200, b'{"status":"ok"}\n')


async def _json_lines(tails: AsyncIterator[Tail]) -> AsyncGenerator[bytes, None]:
    async for tail in tails:
        yield tail.lines.encode("utf-8") + b"\n"


async def _server_sent_events(tails: AsyncIterator[Tail]) -> AsyncGenerator[bytes, None]:
    """`id` is the seq. One without data moves a browser's cursor and shows nothing (WHATWG HTML §9.2.6)."""
    yield b"retry: %d\n\n" % FOLLOW_RETRY_MS
    async for tail in tails:
        if tail.seqs:
            events = zip(tail.seqs, tail.lines.split("\n"))
            yield "".join([f"id: {seq}\ndata: {line}\n\n" for seq, line in events]).encode("utf-8")
        else:
            yield b": keep-alive\nid: %d\n\n" % tail.through


def _accepts(request: Request, media_type: str) -> bool:
    """Whether the client names this media type; what it merely would not mind is served as JSON."""
    accept = request.head.headers.get("accept", "")
    return any(
        part.partition(";")[0].strip(" \t").lower() == media_type for part in accept.split(",")
    )


def _listed_verdicts(receipt: Receipt, explain: bool) -> bytes:
    """The verdicts of a publish, and with `explain` how each came about."""
    listed: List[Dict[str, Any]] = []
    for event, verdict in zip(receipt.records, receipt.verdicts()):
        listed.append(
            {
                "topic": event.topic,
                "event_id": event.event_id,
                "verdict": verdict.kind,
                "seq": verdict.seq,
            }
        )
        if explain:
            listed[-1]["explanation"] = {
                "key": event.key.hex(),
                "found": verdict.found,
                "first_seen": format_timestamp(verdict.first_seen),
                "seconds_since_first_seen": (receipt.now_us - verdict.first_seen) / 1e6,
                "why": _WHY[verdict.found]
                + (
                    ", with another source or payload: the first one stays"
                    if verdict.kind == "conflict"
                    else ""
                ),
            }
    commit = (
        {"events": receipt.group, "milliseconds": receipt.commit_us / 1000} if explain else None
    )
    return (
        b',"events":' + _json(listed)[:-1] + (b',"group":' + _json(commit)[:-1] if explain else b"")
    )


_WHY = {
    "nowhere": "the key was neither among the recent ones nor among the tombstones",
    "recent": "the key was among the recent ones, in memory, not yet merged",
    "seen": "the key was among the tombstones",
    "batch": "the key came earlier in the same group",
}


def _allow(routes: Dict[str, Route]) -> str:
    return ", ".join(sorted(set(routes) | {"OPTIONS"} | ({"HEAD"} if "GET" in routes else set())))


def _flag(request: Request, name: str, default: bool) -> bool:
    if not request.head.query:
        return default
    text = request.head.query.get(name, "1" if default else "0").lower()
    if text not in ("0", "1", "true", "false"):
        raise HTTPError("bad-parameter", f"{name} must be 0 or 1, not {_shown(text)}")
    return text in ("1", "true")


def _limit(request: Request) -> int:
    text = request.head.query.get("limit", str(PAGE_DEFAULT))
    if re.fullmatch("[0-9]{1,9}", text) is None or not 1 <= int(text) <= PAGE_MAX:
        raise HTTPError(
            "bad-parameter", f"limit must be a number from 1 to {PAGE_MAX}, not {_shown(text)}"
        )
    return int(text)


def _mend_offset(text: str) -> str:
    """An offset's + that a query string has turned into a blank, back to a +.

    >>> _mend_offset("2026-01-01T10:00:00 02:00")
    '2026-01-01T10:00:00+02:00'
    """
    return (
        re.sub(r"(?<=[0-9]) ([0-9]{2}:?(?:[0-9]{2})?)\Z", r"+\1", text) if len(text) > 16 else text
    )


# ======================================================================================================================
# §9  Server: sockets, deadlines, shutdown
#
# One coroutine for each connection: read, feed the parser, have the request answered, write, again. Deadlines are kept
# by one sweeper for all connections instead of a timer for each read, so they cost nothing per request and a client
# that sends a byte a second cannot renew them.
#
# Knows §1, §4 (to start and stop it), §5 and §8. Knows no routes and no JSON.
#
#   * Requests of a connection are answered in order, one at a time; a flood of them only fills the client's own socket.
#   * After an error or a "close" nothing more of that connection is read as a request.
#   * A client that is refused while still sending gets its answer before the reset (RFC 9112 §9.6): half-close, drain.
#   * What all connections together keep in memory is bounded: beyond, whichever has been sending or reading longest goes.
# ======================================================================================================================


class _Connection:
    """What the sweeper needs to know of one connection. Instants are the loop's, in seconds."""

    __slots__ = (
        "expired",
        "held",
        "peer",
        "phase",
        "progress",
        "received",
        "since",
        "task",
        "writer",
    )

    def __init__(self, task: "asyncio.Task[Any]", writer: asyncio.StreamWriter, now: float) -> None:
        self.task, self.writer = task, writer
        self.peer = str((writer.get_extra_info("peername") or ("unknown",))[0])
        self.phase = "idle"  # idle, head, body, work, write
        self.since = self.progress = now  # when the phase began, and when bytes came last
        self.received = self.held = (
            0  # bytes of this body, and those that count against BUFFERS_MAX_BYTES
        )
        self.expired: Optional[HTTPError] = None  # why it was cut off

    def enter(self, phase: str, now: float) -> None:
        if phase != self.phase:
            self.phase = phase
            self.since = self.progress = now
            self.received = self.held = 0

    def overdue(self, now: float) -> str:
        """Why this connection has waited long enough, or ""."""
        age = now - self.since
        if self.phase == "body":
            if now - self.progress > BODY_STALL_TIMEOUT_S:
                return f"no byte of the body came for {BODY_STALL_TIMEOUT_S:.0f} s"
            slow = age > BODY_GRACE_S and self.received < age * BODY_MIN_BYTES_PER_S
            return f"the body came slower than {BODY_MIN_BYTES_PER_S} bytes/s" if slow else ""
        limit_s = {"idle": IDLE_TIMEOUT_S, "head": HEAD_TIMEOUT_S, "write": WRITE_TIMEOUT_S}.get(
            self.phase, age
        )
        return f"the request {self.phase} took longer than {limit_s:.0f} s" if age > limit_s else ""


class Server:
    """Serves `api` on a socket. `clock_s` gives seconds since 1970."""

    def __init__(
        self,
        api: API,
        clock_s: Callable[[], float],
        max_body_bytes: int = MAX_BODY_BYTES,
        max_connections: int = MAX_CONNECTIONS,
    ) -> None:
        self._api = api
        self._clock_s = clock_s
        self._max_body = max_body_bytes
        self._max_connections = max_connections
        self._connections: Set[_Connection] = set()
        api.connections = self._connections.__len__
        self._stopping = False
        self._starved = -60.0  # when a connection could not be taken last, by the loop's clock
        self._date = (0, "")

    async def bind(self, host: str, port: int, tls: Any = None) -> List[str]:
        """Bind without listening yet, `tls` being an ssl.SSLContext or None; returns the addresses. Raises OSError."""
        self._server = await asyncio.start_server(
            self._serve,
            host,
            port,
            limit=READ_BYTES // 2,
            backlog=1,
            start_serving=False,
            ssl=tls,
            ssl_handshake_timeout=HEAD_TIMEOUT_S if tls else None,
        )
        return [
            ("[{}]:{}" if ":" in name[0] else "{}:{}").format(*name[:2])
            for name in (sock.getsockname() for sock in self._server.sockets or [])
        ]

    async def listen(self) -> None:
        """Start taking connections. Raises OSError."""
        await self._server.start_serving()
        for sock in self._server.sockets or []:
            with contextlib.closing(
                sock.dup()
            ) as same:  # 1024 for the kernel, and 1 for asyncio: it takes its backlog in one
                same.listen(
                    1024
                )  # turn, and for each of them that it cannot take it sets a timer to try them all again
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(self._on_trouble)
        self._sweeper = loop.create_task(self._sweep())

    def _on_trouble(self, loop: asyncio.AbstractEventLoop, context: Dict[str, Any]) -> None:
        """What asyncio has nobody to tell. It tries once a second to accept while descriptors lack; we say so once."""
        if "accept" not in str(context.get("message")):
            loop.default_exception_handler(context)
        else:
            if loop.time() - self._starved > 10.0:
                log.error(
                    "NO CONNECTION TAKEN - %s: raise the limit (ulimit -n)",
                    context.get("exception"),
                )
            self._starved = loop.time()

    async def stop(self, timeout_s: float) -> None:
        """Take no more connections, close idle ones, let requests under way finish for `timeout_s`, then cut them off."""
        self._stopping = True
        self._server.close()
        for connection in self._connections:
            if connection.phase == "idle":
                connection.task.cancel()
        late = {connection.task for connection in self._connections}
        for wait_s in (timeout_s, 1.0):
            late = (await asyncio.wait(late, timeout=wait_s))[1] if late else late
            for task in late:
                task.cancel()
        self._sweeper.cancel()

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_INTERVAL_S)
            for connection in list(self._connections):
                reason = connection.overdue(asyncio.get_running_loop().time())
                if reason and not connection.expired:
                    self._cut_off(connection, HTTPError("timeout", reason + ": send it faster"))

    def _cut_off(self, connection: _Connection, why: HTTPError) -> None:
        connection.expired, connection.held = why, 0
        if connection.phase == "write":
            log.warning("CUT OFF - %s does not read its answer", connection.peer)
            connection.writer.transport.abort()
        else:
            connection.task.cancel()  # it waits in a read; `_serve` turns this into an answer

    def _hold(self, connection: _Connection, size: int) -> None:
        """Have `size` bytes count as kept in memory for `connection`, and make room if all together keep too much."""
        if size <= READ_BYTES:
            return  # too little to look at all others for
        connection.held = size
        for oldest in sorted(
            [each for each in self._connections if each.held], key=lambda each: each.since
        ):
            if sum([each.held for each in self._connections]) <= max(
                BUFFERS_MAX_BYTES, 2 * self._max_body
            ):
                break
            if (
                oldest.phase in ("body", "write") and oldest is not connection
            ):  # others are being answered, and this one moves
                self._cut_off(
                    oldest,
                    HTTPError(
                        "overloaded",
                        "too much is on its way, and this has taken longest: try again",
                    ),
                )

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        # So that a drained answer is in the kernel's hands, all of it. With 0, TLS of CPython 3.11 and newer would pause at every
        # other write, however little waits, and nothing would ever end the pause.
        writer.transport.set_write_buffer_limits(1 if writer.get_extra_info("sslcontext") else 0)
        connection = _Connection(task, writer, asyncio.get_running_loop().time())
        self._connections.add(connection)
        over = len(self._connections) - self._max_connections
        why = (
            HTTPError(
                "too-many-connections", f"{self._max_connections} connections are open: try again"
            )
            if over > 0
            else None
        )
        try:
            if over <= 0:
                try:
                    with contextlib.closing(RequestParser(self._max_body)) as parser:
                        await self._converse(connection, reader, parser)
                except HTTPError as error:
                    why = error
                except asyncio.CancelledError:  # by the sweeper or by `stop`
                    why = connection.expired if connection.phase in ("head", "body") else None
            if why is not None and over <= REFUSALS_AT_ONCE:
                why.__traceback__ = why.__context__ = (
                    None  # their frames would keep the request in memory
                )
                await self._farewell(connection, reader, why)
        except (
            OSError,
            asyncio.CancelledError,
        ) as error:  # the client is gone, or `stop` waits no longer
            error.with_traceback(
                None
            )  # the reader keeps the error, which keeps the frames, which keep request and answer
        finally:
            self._connections.discard(connection)
            if (
                writer.transport.get_write_buffer_size()
            ):  # it does not read, and a close would wait until it does
                writer.transport.abort()
            writer.close()

    async def _converse(
        self, connection: _Connection, reader: asyncio.StreamReader, parser: RequestParser
    ) -> None:
        """Requests and answers until either side has had enough. Raises HTTPError for what cannot be read on."""
        loop, writer, in_a_row = asyncio.get_running_loop(), connection.writer, 0
        while True:
            request = parser.next_request()
            if request is None:
                if parser.wants_continue:
                    writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                    parser.wants_continue = False
                connection.enter(parser.phase, loop.time())
                if self._stopping and parser.phase == "idle":
                    return
                data = await reader.read(READ_BYTES)
                if not data:
                    if parser.phase != "idle":
                        _refuse("the connection was closed in the middle of a request")
                    return
                parser.feed(data)
                if connection.phase == "idle":
                    connection.enter("head", loop.time())
                connection.progress = loop.time()
                connection.received += len(data)
                if connection.phase == "body":
                    self._hold(connection, connection.received)
                in_a_row = 0
                continue
            connection.phase = "work"
            response = await self._api.answer(request, connection.peer)
            keep_alive = request.head.keep_alive and not self._stopping
            connection.enter("write", loop.time())
            keep_alive = (
                await self._write(connection, request, response, keep_alive)
                and connection.expired is None
            )
            if not keep_alive:
                await self._linger(connection, reader)
                return
            in_a_row += 1
            if (
                in_a_row % 16 == 0
            ):  # neither read nor write need have waited: let the others have a turn
                await asyncio.sleep(0)

    async def _write(
        self, connection: _Connection, request: Request, response: Response, keep_alive: bool
    ) -> bool:
        """Send an answer; whether the connection may be kept after it."""
        writer, body = connection.writer, response.body
        head_only, http_1_0 = request.head.method == "HEAD", request.head.http_1_0
        keep_alive = keep_alive and (isinstance(body, bytes) or not http_1_0)
        if isinstance(body, bytes):
            self._hold(connection, 2 * len(body))  # once here, once in the transport
        writer.write(encode_response(response, self._now(), keep_alive, head_only, http_1_0))
        if not isinstance(body, bytes) and not head_only:
            try:
                async for piece in body:
                    writer.write(piece if http_1_0 else b"%x\r\n%s\r\n" % (len(piece), piece))
                    connection.phase, connection.since = "write", asyncio.get_running_loop().time()
                    self._hold(connection, 2 * len(piece))
                    await writer.drain()
                    connection.phase, connection.held = "work", 0
            except Unavailable as error:  # the status is long gone: an unfinished body is the only honest signal left
                log.error("a list was cut off: %s", error)
                writer.transport.abort()
                return False
            finally:  # at once: left to the collector of cycles, a live tail would be counted long after its client is gone
                await body.aclose()
            if not http_1_0:
                writer.write(b"0\r\n\r\n")
        if writer.transport.get_write_buffer_size():
            await writer.drain()
        return keep_alive

    async def _farewell(
        self, connection: _Connection, reader: asyncio.StreamReader, error: HTTPError
    ) -> None:
        """Answer once and close."""
        connection.writer.write(
            encode_response(self._api.refuse(error, connection.peer), self._now(), False)
        )
        await self._linger(connection, reader)

    async def _linger(self, connection: _Connection, reader: asyncio.StreamReader) -> None:
        """Close without losing the answer: a reset would take it from the client's buffer (RFC 9112 §9.6)."""
        writer, loop = connection.writer, asyncio.get_running_loop()
        connection.enter("linger", loop.time())
        with contextlib.suppress(OSError, asyncio.TimeoutError):
            await asyncio.wait_for(writer.drain(), LINGER_TIMEOUT_S)
            if writer.can_write_eof():
                writer.write_eof()
            end = loop.time() + LINGER_TIMEOUT_S
            while await asyncio.wait_for(reader.read(READ_BYTES), max(0.0, end - loop.time())):
                pass

    def _now(self) -> str:
        """The Date field, made anew once a second."""
        now = self._clock_s()
        if int(now) != self._date[0]:
            self._date = (int(now), http_date(now))
        return self._date[1]


# ======================================================================================================================
# §10  Client: publish, relay, drill, health
#
# A thread reads events ahead (from files as they grow, from another service's live tail), the caller's sends them. Delivery
# is at least once: what fails is sent again until it is answered, and the identity makes the repeats harmless.
#
# Knows §1 and §2, and of the service its HTTP face. http.client and its kin are imported where they are used: serving must
# not pay for them.
#
#   * The place, which says where a restart goes on, moves only behind what is acknowledged, or refused for good and set aside.
#   * One request is under way at a time: order is kept. Memory is bounded by READ_AHEAD_BYTES and the longest line.
#
# Simpler than it might be: of the files that came and went while nobody followed, only the one read last is looked for.
# ======================================================================================================================

Item = Tuple[
    bytes, int, Sequence[int]
]  # an event as JSON, its number (of the line; its seq), and the place behind it


class ClientError(Exception):
    """What keeps a command from going on; the message says why."""


class Reply(ClientError):
    """A status and the JSON object of the body, {} if it is none. Raised where neither time nor another event will change it."""

    def __init__(self, address: Any, response: Any) -> None:
        self.status: int = response.status
        self.value: Dict[str, Any] = {}
        self.faults: List[
            Tuple[Any, str]
        ] = []  # of events: index, and what is wrong; a stranger's look otherwise
        with contextlib.suppress(KeyError, RecursionError, TypeError, ValueError):
            self.value = dict(json.loads(response.read()))
            self.faults = [
                (each["index"], f"{each['field']} {each['message']}")
                for each in self.value.get("errors", ())
            ]
        details = "; ".join(
            [str(self.value.get("detail") or response.reason)]
            + [text for _, text in self.faults[:9]]
        )
        super().__init__(f"{address.geturl()}: {self.status} {details}")


def parse_address(text: str) -> Any:
    """A URL to its parts (urllib.parse.SplitResult); without a scheme it is http, as for curl. Raises ValueError."""
    from urllib.parse import urlsplit

    with contextlib.suppress(ValueError):
        parts = urlsplit(text if "://" in text else "http://" + text)
        if (
            parts.scheme in ("http", "https")
            and re.fullmatch('[!"$->A-~]+', text)
            and (parts.hostname or "").encode("idna")
            and parts.port != 0
        ):
            return parts
    raise ValueError("must be an address such as http://127.0.0.1:8000 or https://example.org/logs")


class Remote:
    """A service seen over one connection, which is made anew whenever it breaks. For one thread at a time. `waits` is told
    what it waits for, and "" once that is over; after `patience_s` seconds without success it raises ClientError."""

    def __init__(
        self,
        address: Any,
        token: str = "",
        waits: Callable[[str], None] = lambda trouble: None,
        patience_s: float = float("inf"),
        timeout_s: float = ANSWER_TIMEOUT_S,
    ) -> None:
        import http.client

        kind = (
            http.client.HTTPSConnection if address.scheme == "https" else http.client.HTTPConnection
        )
        self._connection = kind(address.hostname, address.port, timeout=timeout_s)
        self._address, self._waits, self._patience_s = address, waits, patience_s
        self._fields = {"Authorization": "Bearer " + token} if token else {}

    def ask(
        self,
        method: str,
        target: str,
        body: Optional[bytes] = None,
        stream: bool = False,
        **fields: str,
    ) -> Any:
        """The Reply; for a `stream`, if it is 200, the response, to be read. A break, 408, 429 and 5xx are tried again, after a
        random time below a bound that doubles (full jitter), and never before `Retry-After`."""
        import http.client
        import random

        began, attempt = time.monotonic(), 0
        named = {
            **self._fields,
            **{name.replace("_", "-"): value for name, value in fields.items()},
        }
        while True:
            kept, least_s = self._connection.sock is not None, 0.0
            try:
                self._connection.request(
                    method, self._address.path.rstrip("/") + target, body, named
                )
                response = self._connection.getresponse()
                answer = (
                    response
                    if stream and response.status == 200
                    else Reply(self._address, response)
                )
                if answer.status not in (408, 429) and (
                    answer.status < 500 or answer.status in (501, 505)
                ):
                    self._waits("")  # also of what a caller had to report
                    return answer
                after = response.getheader("Retry-After") or ""
                trouble, least_s = (
                    str(answer),
                    float(after) if re.fullmatch("[0-9]{1,4}", after) else 0.0,
                )
            except (OSError, http.client.HTTPException) as error:
                self._connection.close()
                if kept:  # the other side may have closed it while it was idle: that proves nothing
                    continue
                trouble = f"{self._address.geturl()}: {getattr(error, 'strerror', None) or error or repr(error)}"
            if time.monotonic() - began >= self._patience_s:
                raise ClientError(trouble)
            self._waits(trouble)
            time.sleep(
                max(
                    least_s,
                    random.uniform(0, min(BACKOFF_MAX_S, BACKOFF_S * 2 ** min(attempt, 20))),
                )
            )
            attempt += 1

    def lines(self, target: str) -> Iterator[List[bytes]]:
        """The lines of an answer in NDJSON, as they arrive. Raises Reply, and OSError where it breaks off."""
        import http.client

        response, rest = self.ask("GET", target, stream=True, Accept="application/x-ndjson"), b""
        if isinstance(response, Reply):
            raise response
        try:
            for data in iter(lambda: response.read1(READ_BYTES), b""):
                *whole, rest = (rest + data).split(b"\n")
                yield [
                    line for line in whole if line
                ]  # an empty one only says that the service is alive
                if len(rest) > 16 * MAX_BODY_BYTES:
                    raise ClientError(f"{self._address.geturl()}: sends a line that does not end")
        except http.client.HTTPException as error:
            raise OSError(f"{self._address.geturl()}: {error!r}")
        finally:
            self._connection.close()


class Outcome(NamedTuple):
    """What became of events: how many were new, duplicates, conflicts; which were refused, by index, and why."""

    new: int
    duplicate: int
    conflict: int
    refused: Dict[int, str]


def deliver(remote: Remote, events: Sequence[bytes]) -> Outcome:
    """Publish all of `events`. A request is taken whole or not at all; so one that is refused is split. Raises ClientError."""
    counts, refused, parts = [0, 0, 0], {}, [list(range(len(events)))]
    while parts:
        part = parts.pop()
        squeeze = zlib.compressobj(1, zlib.DEFLATED, 31)
        body = squeeze.compress(b"\n".join([events[index] for index in part])) + squeeze.flush()
        answer = remote.ask(
            "POST", "/publish", body, Content_Type="application/x-ndjson", Content_Encoding="gzip"
        )
        if answer.status == 202 and "unique" in answer.value:
            counts = [
                count + answer.value.get(name, 0)
                for count, name in zip(counts, ("unique", "duplicates", "conflicts"))
            ]
        elif answer.status not in (413, 422) and not str(answer.value.get("type")).endswith(
            "#not-json"
        ):
            raise answer  # no event's fault
        elif len(part) == 1:
            refused[part[0]] = str(answer)
        else:  # those with a fault by themselves, then the rest; or, where none is named, one half and then the other
            faults = [index for index, _ in answer.faults]
            named = [index for at, index in enumerate(part) if at in faults]
            rest, half = (
                [index for at, index in enumerate(part) if at not in faults],
                len(part) // 2,
            )
            parts += (
                [[index] for index in named] + [rest] * bool(rest)
                if named
                else [part[half:], part[:half]]
            )
    return Outcome(counts[0], counts[1], counts[2], refused)


def _tell(text: str, moves: bool = False) -> None:
    """A line to stderr; on a terminal it takes the place of one that `moves`."""
    sys.stderr.write(
        ("\r\x1b[K" if sys.stderr.isatty() else "")
        + "aggregator.py: "
        + text
        + ("" if moves else "\n")
    )
    sys.stderr.flush()


class Report:
    """Counts and shows what is settled: on a terminal in a line that moves, else every PROGRESS_S seconds and when trouble
    comes or goes. Sets the refused aside, in STATE.refused or on stdout, and then saves the place in the file `state`."""

    def __init__(self, what: str, state: str = "", of: str = "") -> None:
        self.counts: Counter[str] = Counter()
        self._what, self._state, self._of = what, state, of
        self._began, self._shown_s, self._trouble = time.monotonic(), 0.0, ""

    def place(self) -> List[int]:
        """The place saved last, [] if there is none. Raises ClientError."""
        if not os.path.exists(self._state):
            return []
        with contextlib.suppress(ValueError, KeyError, TypeError), open(
            self._state, encoding="utf-8"
        ) as file:
            saved = json.load(file)
            if saved["of"] == self._of:
                return list(saved["place"])
        raise ClientError(
            f"{self._state} holds no place of {self._of}: choose another --state, or remove it to start anew"
        )

    def settle(self, items: Sequence[Item], outcome: Outcome) -> None:
        """Count what was delivered. What was refused is aside before the place moves behind it. Raises OSError."""
        self.counts.update(
            sent=len(items),
            new=outcome.new,
            duplicate=outcome.duplicate,
            conflict=outcome.conflict,
            refused=len(outcome.refused),
        )
        for index, reason in sorted(outcome.refused.items()):
            _tell(f"{self._what} {items[index][1]} refused: {reason}")
            if self._state:
                _write(self._state + ".refused", items[index][0] + b"\n", "ab")
            else:
                sys.stdout.buffer.write(items[index][0] + b"\n")
                sys.stdout.buffer.flush()
        if self._state:
            _write(
                self._state + ".new",
                json.dumps({"of": self._of, "place": items[-1][2]}).encode(),
                "wb",
            )
            os.replace(self._state + ".new", self._state)
            folder = os.open(os.path.dirname(os.path.abspath(self._state)), os.O_RDONLY)
            os.fsync(folder)  # or a power cut undoes the renaming
            os.close(folder)
        self.show()

    def waits(self, trouble: str) -> None:
        """Show what is waited for, "" when it is over."""
        changed, self._trouble = trouble != self._trouble, trouble
        self.show(changed)

    def show(self, now: bool = False, end: bool = False) -> int:
        """Show how it goes, if it is time to; the exit status: 1 once an event was refused or its id taken by another."""
        elapsed_s, moves = time.monotonic() - self._began, sys.stderr.isatty()
        if now or end or elapsed_s - self._shown_s >= (TICK_S if moves else PROGRESS_S):
            self._shown_s = elapsed_s
            counts = [
                f"{self.counts[name]:,} {name}"
                for name in ("sent", "new", "duplicate", "conflict", "refused")
            ]
            trouble = "; waiting: " + self._trouble if self._trouble else ""
            _tell(
                f"{', '.join(counts)}; {self.counts['sent'] / max(elapsed_s, 0.001):,.0f}/s{trouble}",
                moves and not end,
            )
        return 1 if self.counts["refused"] or self.counts["conflict"] else 0


def _write(path: str, data: bytes, mode: str) -> None:
    """Write to a file, and to the disk."""
    with open(path, mode) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _carry(source: Iterator[List[Item]], remote: Remote, report: Report, most: int) -> int:
    """Deliver what a thread of its own reads from `source`, up to `most` at a time; the exit status. What comes while a request
    is under way goes together with the next, so nothing waits for a timer."""
    import threading

    changed = (
        threading.Condition()
    )  # guards the two below: the thread waits for room, the caller for items; each wakes the other
    ready: deque[Item] = deque()
    ended: List[Optional[Exception]] = []

    def read() -> None:
        error = None
        try:
            for items in source:
                with changed:
                    ready.extend(items)
                    changed.notify_all()
                    changed.wait_for(
                        lambda: sum([len(item[0]) for item in ready]) < READ_AHEAD_BYTES
                    )
        except Exception as caught:  # it is the caller's, and raised where it waits
            error = caught
        with changed:
            ended.append(error)
            changed.notify_all()

    threading.Thread(target=read, daemon=True).start()
    try:
        while True:
            with changed:
                while not changed.wait_for(lambda: ready or ended, TICK_S):
                    report.show()
                items = [ready.popleft() for _ in range(min(most, len(ready)))]
                changed.notify_all()
            if items:
                report.settle(items, deliver(remote, [item[0] for item in items]))
            elif ended[0] is not None:
                raise ended[0]
            else:
                return report.show()
    finally:
        report.show(end=True)


class Place(NamedTuple):
    """How far a file is read: its inode, the bytes and lines behind us, size and checksum of the last line (by which it shows
    that the file is another now), and how many files were read under its name before."""

    inode: int = 0
    offset: int = 0
    line: int = 0
    size: int = 0
    crc: int = 0
    generation: int = 0


def _holds(file: Any, place: Place) -> bool:
    """Whether an open file is the one that was read up to `place`, and not truncated since."""
    at, status = file.tell(), os.fstat(file.fileno())
    file.seek(place.offset - place.size)
    same = zlib.crc32(file.read(place.size)) == place.crc
    file.seek(at)
    return same and status.st_ino == place.inode and status.st_size >= at


def _open(path: Any, place: Place, follow: bool, step: int) -> Tuple[Any, Place]:
    """The file that `place` is in, whatever a rotation calls it now; else the present one, from its start."""
    folder = os.scandir(os.path.dirname(os.path.realpath(path))) if place.inode else ()
    for name in [path] * bool(place.inode) + [
        entry.path for entry in folder if entry.inode() == place.inode
    ]:
        with contextlib.suppress(OSError):
            file = open(name, "rb", buffering=0)
            if _holds(file, place):
                file.seek(place.offset)
                return file, place
            file.close()
    if place.inode:
        _tell(
            f"{path} as it was read up to byte {place.offset} is gone or truncated: going on with what is there now"
        )
    while follow and not os.path.exists(path):
        time.sleep(FILE_POLL_S)
    file = open(path, "rb", buffering=0)
    return file, Place(os.fstat(file.fileno()).st_ino, generation=place.generation + step)


def _lines_of(
    path: Any, place: Place, follow: bool, step: int, longest: int
) -> Iterator[List[Tuple[Place, bytes]]]:
    """The lines of a file (by name or descriptor) from `place` on, cut at `longest` bytes, those of one read at a time, each
    with the place behind it; with `follow` also those to come, through rotation and truncation. `step` is added to the
    generation with each file."""
    import io

    (file, place), rest, idle = _open(path, place, follow, step), b"", 0
    while True:
        holds = not follow or _holds(
            file, place
        )  # each time: a truncated file may have grown past our place again
        data = file.read(READ_BYTES) if holds else b""
        idle, present = (
            0 if data else idle + 1,
            True,
        )  # also while it is moved away and its successor is not there yet
        with contextlib.suppress(OSError):
            present = os.path.samestat(os.stat(path), os.fstat(file.fileno()))
        over = not data and (
            not follow or not holds or (not present and idle * FILE_POLL_S >= ROTATED_QUIET_S)
        )
        rest, found = rest + data, []
        end = len(rest) if over else rest.rfind(b"\n") + 1 or len(rest) // longest * longest
        for line in io.BytesIO(rest[:end]):
            for at in range(0, len(line), longest):
                piece = line[at : at + longest]
                place = Place(
                    place.inode,
                    place.offset + len(piece),
                    place.line + (not at),
                    len(piece),
                    zlib.crc32(piece),
                    place.generation,
                )
                found.append((place, piece))
        rest = rest[end:]
        yield found
        if over and present and not follow:
            return
        if over:
            file.close()
            file, place = _open(path, Place(generation=place.generation), follow, step)
        elif not data:
            time.sleep(FILE_POLL_S)


def _as_items(
    found: Sequence[Tuple[Place, bytes]], ids: str, topic: str, source: str, path: Any
) -> List[Item]:
    """Lines to items. An id by offset also holds the line's checksum, because inodes and offsets come again."""
    origin, items = os.urandom(16).hex(), []  # type: str, List[Item]
    if ids == "offset" and found:
        file = json.dumps(
            [source, os.path.abspath(path), found[0][0].inode, found[0][0].generation]
        )
        origin = blake2b(file.encode(), digest_size=8).hexdigest()
    stamp = format_timestamp(time.time_ns() // 1000)
    head = json.dumps({"topic": topic, "source": source, "timestamp": stamp, "event_id": origin})[
        :-2
    ].encode()
    for place, piece in found:
        line = piece.strip(
            b"\0\r\n"
        )  # NUL: the hole that a truncation leaves where the writer does not append
        if line and not line.isspace():
            if ids != "given":
                text = json.encoder.encode_basestring(
                    line.decode("utf-8", "backslashreplace")
                ).encode("utf-8")
                line = b'%b-%x-%08x","payload":{"message":%b}}' % (
                    head,
                    place.offset - place.size,
                    zlib.crc32(line),
                    text,
                )
            items.append((line, place.line, place))
    return items


def publish(settings: Dict[str, Any]) -> int:
    """`aggregator.py publish`: events as JSON, one a line, or (with a topic) lines of text, to a service."""
    import socket

    names, state, follow, topic = (
        settings["FILE"] or ["-"],
        settings["state"],
        bool(settings["follow"]),
        settings["topic"],
    )
    paths: List[Any] = [0 if name == "-" else name for name in names]
    ids = settings["ids"] or ("given" if not topic else "random" if 0 in paths else "offset")
    if (ids == "given") == bool(topic):
        raise ClientError(
            "--topic is for lines of text, with ids random or by offset; events as JSON have their own of both"
        )
    if (0 in paths and (state or follow or ids == "offset")) or (
        len(paths) > 1 and (state or follow)
    ):
        raise ClientError(
            "--state and --follow take one FILE, and neither they nor offset ids a pipe"
        )
    report = Report("line", state, os.path.abspath(names[0]))
    first, longest = Place(*report.place()), MAX_LINE_BYTES if topic else MAX_BODY_BYTES
    items = (
        _as_items(found, ids, topic, settings["source"] or socket.gethostname(), path)
        for path in paths
        for found in _lines_of(path, first, follow, bool(state), longest)
    )
    return _carry(
        items, Remote(settings["url"], settings["token"], report.waits), report, PUBLISH_EVENTS
    )


def relay(settings: Dict[str, Any]) -> int:
    """`aggregator.py relay`: all that one service has and gets, in order, to another. Ends by a signal or ClientError."""
    from urllib.parse import quote

    if not settings["from"] or not settings["to"]:
        raise ClientError("a relay needs --from URL and --to URL")
    topic = "&topic=" + quote(settings["topic"]) if settings["topic"] else ""
    report = Report("seq", settings["state"], settings["from"].geturl() + topic)
    first = ([0] + report.place())[-1]

    def read(after: int) -> Iterator[List[Item]]:
        source = Remote(
            settings["from"], settings["token_from"], report.waits, timeout_s=TAIL_TIMEOUT_S
        )
        while True:
            try:
                for lines in source.lines(f"/events?follow=1&after={after}{topic}"):
                    seqs = [json.loads(line)["seq"] for line in lines]
                    after = seqs[-1] if seqs else after
                    yield [(line, seq, [seq]) for line, seq in zip(lines, seqs)]
            except Reply as answer:
                oldest = answer.value.get("oldest_seq")
                if answer.status != 410 or not isinstance(oldest, int) or oldest <= after + 1:
                    raise
                _tell(
                    f"GONE: {oldest - 1 - after:,} seqs, {after + 1} to {oldest - 1}, removed before they were relayed"
                )
                after = oldest - 1
            except OSError as error:
                report.waits(str(error))
            except (ValueError, KeyError, TypeError):
                raise ClientError("{}: sends no events in NDJSON".format(settings["from"].geturl()))
            time.sleep(
                BACKOFF_S
            )  # `ask` backs off by itself; this is for a service that answers and then breaks off

    return _carry(
        read(first),
        Remote(settings["to"], settings["token_to"], report.waits),
        report,
        RELAY_EVENTS,
    )


def health(settings: Dict[str, Any]) -> int:
    """`aggregator.py health`: 0 if events can be stored right now, else 1 and the reason."""
    try:
        answer = Remote(settings["url"], patience_s=0, timeout_s=HEALTH_TIMEOUT_S).ask(
            "GET", "/health"
        )
        reason = "" if answer.value.get("status") == "ok" else str(answer)
    except ClientError as error:
        reason = str(error)
    print(reason or "ok")
    return 1 if reason else 0


class _Load(Report):
    """What a drill sends: `count` different events, out of order, a share of `repeats` in all being repeats, and repeats as long
    as there are `kills` to come; and what became of them."""

    def __init__(self, count: int, repeats: float, kills: int) -> None:
        import random
        import threading

        super().__init__("event")
        self.name, self.count, self.kills = "drill/" + os.urandom(4).hex(), count, kills
        self.acknowledged, self._now_us = bytearray(count), time.time_ns() // 1000
        self.seconds: List[float] = []  # that each request took, until it was answered
        self.failure: Optional[Exception] = None
        order = [
            *range(count),
            *random.choices(range(count), k=int(count * repeats / (1 - repeats))),
        ]
        order.sort(key=lambda n: n + random.uniform(0, 1000))
        self._numbers = itertools.chain(
            order, (random.randrange(count) for _ in iter(lambda: self.kills, 0))
        )
        self._lock = (
            threading.Lock()
        )  # guards all of the above: a sender holds it before and after each request

    def event(self, n: int) -> Dict[str, Any]:
        """Event `n` as it is sent, and as it must be read."""
        return {
            "topic": f"{self.name}/{n % DRILL_TOPICS}",
            "event_id": f"{n * 2654435761 % 2**32:08x}-{n}",
            "source": "drill",
            "timestamp": format_timestamp(self._now_us + n * 1000),
            "payload": {"n": n, "text": "drill " * (n % 9)},
        }

    def send(self, remote: Remote, batch: int) -> None:
        """One sender, until there is nothing left or something is wrong."""
        try:
            while not self.failure:
                with self._lock:
                    items = [
                        (json.dumps(self.event(n)).encode(), n, ())
                        for n in itertools.islice(self._numbers, batch)
                    ]
                if not items:
                    return
                began, outcome = time.monotonic(), deliver(remote, [item[0] for item in items])
                with self._lock:
                    self.seconds.append(time.monotonic() - began)
                    self.settle(items, outcome)
                    for index, item in enumerate(items):
                        self.acknowledged[item[1]] |= index not in outcome.refused
        except Exception as error:
            self.failure = error

    def verdict(self, remote: Remote) -> int:
        """Read everything back and print what was found; how many promises are broken."""
        found, strange = bytearray(self.count), 0
        for part in range(DRILL_TOPICS):
            for row in map(
                json.loads,
                itertools.chain.from_iterable(remote.lines(f"/events?topic={self.name}/{part}")),
            ):
                n = row["payload"].get("n")
                if type(n) is int and 0 <= n < self.count and self.event(n).items() <= row.items():
                    found[n] = min(found[n] + 1, 2)
                else:
                    strange += 1
        lost = sum([sent > stored for sent, stored in zip(self.acknowledged, found)])
        for name, value in (
            ("acknowledged", sum(self.acknowledged)),
            ("stored", self.count - found.count(0)),
            ("lost", lost),
            ("stored twice", found.count(2)),
            ("stored otherwise", strange),
        ):
            print(f"{name:<17}{value:>11,}")
        took_ms = sorted(each * 1000 for each in self.seconds)
        print(
            "latency          "
            + ", ".join(
                f"{took_ms[(len(took_ms) - 1) * share // 100]:,.1f} ms ({share} %)"
                for share in (50, 90, 99, 100)
            )
        )
        buckets = Counter(int(each).bit_length() for each in took_ms)  # bucket k: less than 2^k ms
        for k in range(min(buckets), max(buckets) + 1):
            print(
                f"  < {2**k:>6,} ms{buckets[k]:>15,} "
                + "#" * -(-48 * buckets[k] // max(buckets.values()))
            )
        return lost + found.count(2) + strange + self.counts["refused"]


def drill(settings: Dict[str, Any], environment: Dict[str, str]) -> int:
    """`aggregator.py drill`: publish under load, kill the service, read everything back; 1 if a promise was broken."""
    import random
    import socket
    import subprocess
    import tempfile
    import threading

    if settings["url"] and settings["kill9"]:
        raise ClientError("--kill9 is for the drill's own service: leave out --url")
    load, written = _Load(settings["events"], settings["duplicates"], settings["kill9"]), 0
    process: Any = None
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = settings["url"] or parse_address("127.0.0.1:{}".format(probe.getsockname()[1]))

    def restart(last: bool = False) -> None:
        """SIGKILL, and if it was not the last one, a new start."""
        nonlocal process, written
        if process is not None:
            with contextlib.suppress(OSError), open(
                f"/proc/{process.pid}/io", encoding="ascii"
            ) as file:
                written += int(file.read().split("\nwrite_bytes: ")[1].split()[0])
            process.kill()
            process.wait()
        process = (
            None
            if last
            else subprocess.Popen(
                [
                    sys.executable,
                    os.path.abspath(__file__),
                    "--port",
                    str(address.port),
                    "--host",
                    address.hostname,
                    "--db",
                    os.path.join(folder, "drill.db"),
                    "--log-level",
                    "ERROR",
                ],
                env=environment,
            )
        )

    with tempfile.TemporaryDirectory() as folder:
        restart(last=bool(settings["url"]))
        try:
            remotes = [
                Remote(address, settings["token"], patience_s=DRILL_PATIENCE_S)
                for _ in range(settings["connections"])
            ]
            remotes[0].ask("GET", "/health")
            threads = [
                threading.Thread(target=load.send, args=(each, settings["batch"]), daemon=True)
                for each in remotes
            ]
            began, due, apart = time.monotonic(), 0, 2 * load.count // (load.kills + 1) + 1
            for thread in threads:
                thread.start()
            while any(thread.is_alive() for thread in threads):
                time.sleep(random.uniform(0, TICK_S / 4))
                load.show()
                due = due or load.counts["sent"] + random.randrange(1, apart)
                if load.kills and load.counts["sent"] >= due:
                    restart()
                    load.kills, due = load.kills - 1, 0
            elapsed_s = time.monotonic() - began
            load.show(end=True)
            if load.failure:
                raise load.failure
            broken = load.verdict(remotes[0])
        finally:
            restart(last=True)
    print(f"throughput       {load.counts['sent'] / elapsed_s:>11,.0f} events/s")
    print(
        "written          "
        + (
            f"{written / load.count:>11,.0f} bytes per event"
            if written
            else "          ? (not our process, no /proc, or no disk)"
        )
    )
    print("BROKEN" if broken else "kept: everything acknowledged is stored, and once")
    return 1 if broken else 0


# ======================================================================================================================
# §11  Command line
#
# Settings are one table, commands another. Everything starts and stops here, in order. Knows all sections.
# ======================================================================================================================


class Setting(NamedTuple):
    """One setting: `--flag` on the command line, else `variable` from the environment, else `default`. A switch if `read` is
    bool, the arguments that are no flags if its name has no dashes; $PORT in a default is that of the environment, or 8000."""

    flag: str
    variable: str
    default: str
    read: Callable[[str], Any]
    meaning: str


def _read_number(least: int, most: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if re.fullmatch("[0-9]{1,18}", text) is None or not least <= int(text) <= most:
            raise ValueError(f"must be a number from {least} to {most}")
        return int(text)

    return read


def _read_choice(*choices: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text.lower() not in choices:
            raise ValueError("must be one of {}".format(", ".join(choices)))
        return text.lower()

    return read


def _read_text(text: str) -> str:
    if not text:
        raise ValueError("must not be empty")
    return text


def _read_secret(text: str) -> str:
    if re.fullmatch("[A-Za-z0-9._~+/=-]{1,512}", text) is None:  # RFC 6750 §2.1
        raise ValueError("must be 1 to 512 letters, digits or -._~+/=")
    return text


def _read_share(text: str) -> float:
    if re.fullmatch(r"0?\.[0-9]{1,3}|0", text) is None or float(text) > 0.95:
        raise ValueError("must be a number from 0 to 0.95")
    return float(text)


def _read_names(text: str) -> FrozenSet[str]:
    return frozenset(name.lower() for name in re.split("[ ,]+", text) if name)


def _read_origins(text: str) -> FrozenSet[str]:
    origins = _read_names(text)
    for origin in origins:
        if origin != "*" and re.fullmatch("[a-z][a-z0-9+.-]*://[^/]+", origin) is None:
            raise ValueError("must hold origins such as https://example.org, without a path")
    return origins


SETTINGS = (
    Setting("--host", "HOST", "127.0.0.1", _read_text, "address to listen on; 0.0.0.0 for all"),
    Setting(
        "--port", "PORT", "8000", _read_number(0, 65535), "port to listen on; 0 for any free one"
    ),
    Setting("--db", "DB_PATH", "dedup_store.db", _read_text, "file of the store"),
    Setting(
        "--queue-max-size",
        "QUEUE_MAX_SIZE",
        str(QUEUE_MAX_EVENTS),
        _read_number(1, 10_000_000),
        "events that may wait to be committed",
    ),
    Setting(
        "--max-events-per-topic",
        "MAX_EVENTS_PER_TOPIC",
        "0",
        _read_number(0, 10**15),
        "keep the newest so many events of each topic; 0 keeps all",
    ),
    Setting(
        "--retention",
        "RETENTION",
        "0",
        parse_duration,
        "keep events for so long (30m, 12h, 7d); 0 for ever",
    ),
    Setting(
        "--dedup-retention",
        "DEDUP_RETENTION",
        "0",
        parse_duration,
        "know the ids of removed events for so long at least; 0 for ever",
    ),
    Setting(
        "--max-body",
        "MAX_BODY",
        str(MAX_BODY_BYTES),
        _read_number(1, 2**30),
        "bytes of one body, also inflated",
    ),
    Setting(
        "--sync",
        "SYNC",
        "full",
        _read_choice("full", "normal"),
        "full: 202 survives a power cut; normal: only a crash of the process",
    ),
    Setting(
        "--token",
        "AUTH_TOKEN",
        "",
        _read_secret,
        "only who sends this bearer token may publish and read",
    ),
    Setting("--read-token", "READ_TOKEN", "", _read_secret, "who sends this bearer token may read"),
    Setting(
        "--allow-origin",
        "ALLOW_ORIGIN",
        "",
        _read_origins,
        "web origins whose pages may write and read; * for all",
    ),
    Setting(
        "--allow-host",
        "ALLOW_HOST",
        "",
        _read_names,
        "further host names to answer to when bound to loopback; * for all",
    ),
    Setting("--tls-cert", "TLS_CERT", "", str, "PEM file with certificate chain, to speak HTTPS"),
    Setting(
        "--tls-key", "TLS_KEY", "", str, "PEM file with its private key, if not in the same file"
    ),
    Setting(
        "--log-level",
        "LOG_LEVEL",
        "INFO",
        lambda text: _read_choice("debug", "info", "warning", "error")(text).upper(),
        "debug, info, warning or error",
    ),
)


_AT = (
    Setting("--url", "AGGREGATOR_URL", "http://127.0.0.1:$PORT", parse_address, "the service"),
    Setting("--token", "AUTH_TOKEN", "", _read_secret, "what the service asks for"),
)
_STATE = Setting(
    "--state", "", "", str, "file that keeps the place, so that the next start goes on there"
)


class Command(NamedTuple):
    """One command: what --help says, its settings, and what runs it and returns the exit status."""

    summary: str
    settings: Tuple[Setting, ...]
    run: Callable[[Dict[str, Any]], int]


COMMANDS = {
    "serve": Command(
        "Take in events over HTTP, store each exactly once. The default; the other commands are check, publish,"
        " relay, drill and health, each with its own --help.",
        SETTINGS,
        lambda settings: run_service(settings),
    ),
    "check": Command(
        "Verify the store of a stopped service: exit status 0 if all is well, 1 if not.",
        SETTINGS[2:3],
        lambda settings: check(settings["db"]),
    ),
    "publish": Command(
        "Publish FILEs: events as JSON, one a line, or, with --topic, lines of text. What is refused goes to"
        " STATE.refused or stdout. Exit status 0 if all was acknowledged, 1 if not.",
        (
            Setting("FILE", "", "", str, "what to read; - or nothing for standard input"),
            *_AT,
            _STATE,
            Setting(
                "--topic",
                "",
                "",
                _read_name,
                "lines are text; the topic of the events made of them",
            ),
            Setting(
                "--source",
                "",
                "",
                _read_name,
                "the source of the events made of them; else the name of this host",
            ),
            Setting(
                "--ids",
                "",
                "",
                _read_choice("given", "random", "offset"),
                "given: events have one (without --topic); offset:"
                " made of file and offset, so that lines may be sent again (with FILE); random (from standard input)",
            ),
            Setting(
                "--follow",
                "",
                "",
                bool,
                "go on with what is appended to FILE, through rotation and truncation",
            ),
        ),
        publish,
    ),
    "relay": Command(
        "Pass on what one aggregator has and gets to another, in order. Ends by a signal.",
        (
            Setting("--from", "", "", parse_address, "the service to read"),
            Setting("--to", "", "", parse_address, "the other"),
            Setting("--token-from", "TOKEN_FROM", "", _read_secret, "what the one asks for"),
            Setting("--token-to", "TOKEN_TO", "", _read_secret, "what the other asks for"),
            Setting("--topic", "", "", _read_name, "only this topic, or all that begin so: logs/*"),
            _STATE,
        ),
        relay,
    ),
    "drill": Command(
        "Publish disorder and repeats to a service of its own, kill it, and count what was lost or doubled: exit"
        " status 0 if nothing, 1 if anything.",
        (
            Setting("--events", "", "100000", _read_number(1, 10_000_000), "different events"),
            Setting("--duplicates", "", "0.3", _read_share, "share of repeats in all that is sent"),
            Setting(
                "--batch", "", "100", _read_number(1, QUEUE_MAX_EVENTS), "events of one request"
            ),
            Setting(
                "--connections", "", "4", _read_number(1, MAX_CONNECTIONS), "publishers at a time"
            ),
            Setting("--kill9", "", "0", _read_number(0, 10_000), "kills of the service under load"),
            Setting("--url", "", "", parse_address, "a service that runs already, instead"),
            _AT[1],
        ),
        lambda settings: drill(
            settings, {**os.environ, **{each.variable: "" for each in SETTINGS}}
        ),
    ),
    "health": Command(
        "Ask whether events can be stored right now: exit status 0 if so, 1 with the reason if not.",
        _AT[:1],
        health,
    ),
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line instead of argparse's page."""
        self.exit(2, f"aggregator.py: {message} (--help lists what there is)\n")


def read_settings(
    command: str, arguments: Sequence[str], environment: Dict[str, str]
) -> Dict[str, Any]:
    """Flags over environment over defaults, by flag name without dashes. Exits with a message on a bad one."""
    parser = _Parser(
        prog="aggregator.py" + (" " + command if command != "serve" else ""),
        description=COMMANDS[command].summary,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=versions())
    for setting in COMMANDS[command].settings:
        origins = [
            f"{kind}: {each}"
            for kind, each in (("environment", setting.variable), ("default", setting.default))
            if each
        ]
        options = (
            {"action": "store_true"}
            if setting.read is bool
            else {"metavar": setting.variable or setting.flag[2:].upper()}
        )
        if not setting.flag.startswith("-"):
            options = {"metavar": setting.flag, "nargs": "*"}
        text = setting.meaning + (" ({})".format("; ".join(origins)) if origins else "")
        parser.add_argument(setting.flag, help=text.replace("%", "%%"), **options)  # type: ignore[arg-type]
    given = vars(parser.parse_args(arguments))
    settings = {}
    for setting in COMMANDS[command].settings:
        name = setting.flag.lstrip("-").replace("-", "_")
        text, origin = given[name], setting.flag
        if text is None and environment.get(setting.variable, "") != "":
            text, origin = environment[setting.variable], "environment variable " + setting.variable
        text = (
            setting.default.replace("$PORT", environment.get("PORT") or "8000") or None
            if text is None
            else text
        )
        try:  # without a default: unset
            settings[name] = (
                "" if text is None else setting.read(text) if isinstance(text, str) else text
            )
        except ValueError as error:
            parser.exit(
                2,
                "aggregator.py: {} {}{}\n".format(
                    origin, error, "" if setting.read is _read_secret else ": " + _shown(text)
                ),
            )
    for flag, needed in (("read_token", "token"), ("tls_key", "tls_cert")):
        if settings.get(flag) and not settings[needed]:
            parser.error("--{} needs --{}".format(flag, needed).replace("_", "-"))
    return settings


def log_limit(clock: Callable[[], float]) -> Callable[[logging.LogRecord], bool]:
    """A filter for a log handler: of what strangers can cause (WARNING and above), LOG_LINES lines of a kind (what the format
    begins with) get through in LOG_PERIOD_S, and the others are counted. `clock` is in seconds."""
    since, lines = clock(), Counter()  # type: Tuple[float, Counter[str]]

    def _passes(record: logging.LogRecord) -> bool:
        nonlocal since, lines
        if clock() - since >= LOG_PERIOD_S:
            before, since, lines = lines, clock(), Counter()
            for kind in before:
                if before[kind] > LOG_LINES:
                    log.warning("… and %s more like it: %s", f"{before[kind] - LOG_LINES:,}", kind)
        kind = str(record.msg).partition(" - ")[0][:40]
        lines[kind] += record.levelno >= logging.WARNING
        return lines[kind] <= LOG_LINES

    return _passes


def versions() -> str:
    """What is running: our version, Python's, SQLite's."""
    return f"aggregator {__version__} (Python {sys.version.split()[0]}, SQLite {SQLITE_VERSION})"


def _clock_us() -> int:
    return time.time_ns() // 1000


def _random_id() -> str:
    """A random UUID (RFC 9562 version 4) without the uuid module, which small systems do not have."""
    value = int.from_bytes(os.urandom(16), "big") & ~(0xF << 76 | 3 << 62) | 4 << 76 | 2 << 62
    text = f"{value:032x}"
    return "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))


def _tls(settings: Dict[str, Any]) -> Any:
    """The TLS side of the socket, from the standard library, or None. Raises ValueError."""
    if not settings["tls_cert"]:
        return None
    import ssl  # only here: it costs memory, and small systems have it in a package of its own

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2  # RFC 8996
    try:
        context.load_cert_chain(settings["tls_cert"], settings["tls_key"] or None)
    except OSError as error:
        raise ValueError(
            "cannot load --tls-cert {} and its key: {}".format(settings["tls_cert"], error)
        )
    return context


def _access(settings: Dict[str, Any], addresses: Sequence[str]) -> Access:
    """Who may do what, given where we listen; and a warning if that is everyone from everywhere."""
    local = all(address.startswith(("127.", "[::1]")) for address in addresses)
    if not local and not settings["token"]:
        log.warning(
            "OPEN - %s can be reached from other machines and there is no --token: whoever reaches it may publish and"
            " read",
            ", ".join(addresses),
        )
    names = (
        {"localhost", "127.0.0.1", "[::1]", settings["host"].lower()} | set(settings["allow_host"])
        if local
        else ()
    )
    return Access(
        settings["token"],
        settings["read_token"],
        frozenset(names),
        frozenset(settings["allow_origin"]),
    )


def _notify(state: str) -> None:
    """Tell the service manager, if one wants to know (sd_notify(3)): a datagram to the socket that it names."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address[:1] in ("/", "@"):
        import socket

        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.sendto(state.encode("ascii"), "\0" + address[1:] if address[0] == "@" else address)


async def _watchdog() -> None:
    """Show that the loop turns, twice as often as the service manager asks for (sd_watchdog_enabled(3))."""
    period = os.environ.get("WATCHDOG_USEC", "")
    mine = os.environ.get("WATCHDOG_PID", "") in ("", str(os.getpid()))
    while mine and re.fullmatch("[1-9][0-9]{3,15}", period):
        _notify("WATCHDOG=1")
        await asyncio.sleep(int(period) / 2e6)


def _log_format() -> str:
    """journald keeps the time of each line itself; it says which stream is its own (systemd.exec(5), JOURNAL_STREAM)."""
    with contextlib.suppress(OSError):
        stderr = os.fstat(2)
        if os.environ.get("JOURNAL_STREAM") == f"{stderr.st_dev}:{stderr.st_ino}":
            return "%(levelname)s %(message)s"
    return "%(asctime)s %(levelname)s %(message)s"


async def serve(settings: Dict[str, Any]) -> int:
    """Run until SIGTERM or SIGINT; the exit status. Raises OSError and StoreError for what keeps it from starting."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()

    def on_signal() -> None:
        if stop.is_set():
            os._exit(130)  # asked twice: now. What is acknowledged is on disk
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    pipeline = Pipeline(
        lambda: Store(
            settings["db"],
            settings["sync"] == "full",
            settings["max_events_per_topic"],
            settings["retention"],
            settings["dedup_retention"],
        ),
        _clock_us,
        settings["queue_max_size"],
    )
    limits = {
        "queue_max_size": settings["queue_max_size"],
        "max_events_per_topic": settings["max_events_per_topic"],
        "retention_seconds": settings["retention"] / 1e6,
        "max_body": settings["max_body"],
        "dedup_retention_seconds": settings["dedup_retention"] / 1e6,
    }
    api = API(pipeline, _clock_us, _random_id, limits)
    server = Server(api, time.time, settings["max_body"])
    # Before the store is opened, so that a taken port leaves the file alone.
    addresses = await server.bind(settings["host"], settings["port"], _tls(settings))
    api.access = _access(settings, addresses)
    await pipeline.start()
    await server.listen()
    scheme = "https://" if settings["tls_cert"] else "http://"
    log.info(
        "LISTENING - %s, store %s, %s",
        ", ".join(scheme + address for address in addresses),
        os.path.realpath(settings["db"]),
        versions(),
    )
    _notify("READY=1")
    watchdog = loop.create_task(_watchdog())
    await stop.wait()
    _notify("STOPPING=1")
    log.info(
        "STOPPING - 1. no more connections, 2. finish requests, 3. drain the queue, 4. commit, 5. close"
    )
    started = loop.time()
    pipeline.end_followers()
    await server.stop(STOP_REQUESTS_S)
    drained = await pipeline.stop(STOP_DRAIN_S)
    watchdog.cancel()
    log.info(
        "STOPPED - after %.2f s%s",
        loop.time() - started,
        "" if drained else "; the queue was not empty",
    )
    return 0 if drained else 1


def check(path: str) -> int:
    """`aggregator.py check`: what holds and what does not, in plain words."""
    sound = True
    try:
        for holds, sentence in check_store(path):
            sound = sound and holds
            print("{}  {}".format("ok " if holds else "BAD", sentence), flush=True)
    except StoreError as error:
        sys.stderr.write(f"aggregator.py: {error}\n")
        return 1
    return 0 if sound else 1


def run_service(settings: Dict[str, Any]) -> int:
    """`aggregator.py serve`: make the process ready to serve, and serve; the exit status."""
    logging.basicConfig(level=settings["log_level"], stream=sys.stderr, format=_log_format())
    logging.getLogger().handlers[0].addFilter(log_limit(time.monotonic))
    with contextlib.suppress(
        ImportError, OSError, ValueError
    ):  # a descriptor for each connection, where that is allowed
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (max(soft, min(2 * MAX_CONNECTIONS, hard)), hard)
        )
    # At each statement the writer waits for the GIL, up to one switch interval; 5 ms, the default, would be all its time.
    sys.setswitchinterval(0.00005)
    gc.freeze()  # what is loaded stays; and little of what comes makes cycles, so looking for them often is a waste
    gc.set_threshold(50_000, 20, 10)
    try:
        return asyncio.run(serve(settings))
    except (StoreError, OSError, OverflowError, ValueError) as error:
        text, code = str(error), getattr(error, "errno", None) or 0
        if isinstance(
            error, OSError
        ):  # asyncio wraps the reason into a sentence of its own; a resolver's number is negative
            reason = os.strerror(code) if code > 0 else error.strerror or error
            text = "{}:{}: {}".format(settings["host"], settings["port"], reason)
        if code == errno.EADDRINUSE:
            text += "; stop what listens there, or choose another --port"
        sys.stderr.write(f"aggregator.py: {text}\n")
        return 1


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """The program; its exit status."""
    if sys.version_info < (3, 8):
        sys.stderr.write(
            f"aggregator.py: this is Python {sys.version.split()[0]}; 3.8 or newer is needed\n"
        )
        return 2
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    command = arguments.pop(0) if arguments and not arguments[0].startswith("-") else "serve"
    if command not in COMMANDS:
        sys.stderr.write(
            "aggregator.py: there is no command {}; there are: {}\n".format(
                _shown(command), ", ".join(COMMANDS)
            )
        )
        return 2
    settings = read_settings(command, arguments, dict(os.environ))
    for number in (
        signal.SIGTERM,
        signal.SIGINT,
    ):  # until `serve` takes over; process 1 would ignore the first
        signal.signal(number, lambda number, _: sys.exit(0 if command == "serve" else 128 + number))
    try:
        return COMMANDS[command].run(settings)
    except (ClientError, OSError) as error:
        named = f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
        sys.stderr.write(
            "aggregator.py: {}{}\n".format(named, getattr(error, "strerror", None) or error)
        )
        return 1


if __name__ == "__main__":
    sys.exit(main())
