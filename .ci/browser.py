"""The page in a real browser: headless Chromium, driven over the DevTools protocol.

Prints what it checks. Exit status 1 if anything does not hold; 0 and one line where
there is no Chromium. Standard library only; nginx and axe-core (from npm) are used if
they are there. What the service cannot do yet is skipped with a line. Words behind the
command choose checks by their names.

Environment: AGGREGATOR names another program than the one of this repository, AXE a
file with axe-core, SHOTS a folder for pictures of the page.
"""

import base64
import collections
import contextlib
import glob
import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PROGRAM = os.environ.get("AGGREGATOR", os.path.join(ROOT, "aggregator.py"))
LOGS = sorted(glob.glob(os.path.join(ROOT, "..", "shared", "data", "*.ndjson")))
SHOTS = os.environ.get("SHOTS", "")
MARKUP = "<img src=x onerror=window.hit=1>&amp;\"'{}"
TOKEN = "open-sesame-0123456789"
OTHER_TOKEN = "closed-sesame-9876543210"
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-pipe",
)

# ---- Helpers ----


class Browser:
    """One Chromium with one page, spoken to through two pipes: JSON, ended by NUL."""

    def __init__(self, program, profile):
        self.asked = 0
        self.said = []
        self.session = {}
        self.unread = b""
        its_in, self.out = os.pipe()
        self.back, its_out = os.pipe()
        # --remote-debugging-pipe reads from descriptor 3 and writes to 4.
        shell = f'exec "$@" 3<&{its_in} 4>&{its_out}'
        self.process = subprocess.Popen(
            ["bash", "-c", shell, "bash", program, *FLAGS, "--user-data-dir=" + profile],
            pass_fds=(its_in, its_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)
        for domain in ("Page", "Runtime", "Log", "Network", "Performance"):
            self.send(domain + ".enable")

    def send(self, method, **parameters):
        """Ask and wait for the answer; what happens meanwhile is kept in `said`."""
        self.asked += 1
        message = {"id": self.asked, "method": method, "params": parameters, **self.session}
        os.write(self.out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.next_message(30)
            assert answer is not None, "the browser does not answer"
            if answer.get("id") == self.asked:
                assert "error" not in answer, answer
                return answer["result"]
            self.said.append(answer)

    def next_message(self, seconds):
        while b"\0" not in self.unread:
            if not select.select([self.back], [], [], seconds)[0]:
                return None
            self.unread += os.read(self.back, 1 << 20)
        text, self.unread = self.unread.split(b"\0", 1)
        return json.loads(text.decode("utf-8"))

    def run(self, script):
        """The value of a JavaScript expression."""
        found = self.send("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in found, (script, found["exceptionDetails"])
        return found["result"].get("value")

    def wait(self, script):
        """The value of a promise."""
        found = self.send(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in found, (script, found["exceptionDetails"])
        return found["result"].get("value")

    def until(self, script, seconds=20):
        """Wait for the expression to be true. Its value, and how long that took."""
        start = time.monotonic()
        while True:
            value = self.run(script)
            if value:
                return value
            waited = time.monotonic() - start
            assert waited < seconds, (script, self.run("document.body.innerText.slice(0, 2000)"))
            time.sleep(0.03)

    def open(self, url):
        self.send("Page.navigate", url="about:blank")
        self.send("Page.navigate", url=url)
        ready = "document.readyState === 'complete' && location.href.startsWith({})"
        self.until(ready.format(json.dumps(url.split("#")[0])))

    def size(self, width, height=900):
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 500,
        )

    def scheme(self, name):
        features = [{"name": "prefers-color-scheme", "value": name}]
        self.send("Emulation.setEmulatedMedia", features=features)

    def picture(self, name):
        """A picture of the whole page, if SHOTS names a folder for them."""
        if SHOTS:
            height = self.run("document.documentElement.scrollHeight")
            width = self.run("innerWidth")
            self.size(width, min(height, 4000))
            data = self.send("Page.captureScreenshot", format="png")["data"]
            with open(os.path.join(SHOTS, name + ".png"), "wb") as file:
                file.write(base64.b64decode(data))
            self.size(width)

    def move(self, x, y):
        self.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def problems(self):
        """What went wrong in the page: exceptions that nobody caught."""
        return [each for each in self.said if each["method"] == "Runtime.exceptionThrown"]


class Service:
    """The program on a port that it keeps across restarts."""

    def __init__(self, folder, name, *flags):
        self.port = "0"
        self.path = os.path.join(folder, name + ".db")
        self.flags = ["--log-level", "INFO", "--db", self.path, *flags]
        self.start()

    def start(self):
        words = [sys.executable, PROGRAM, "--port", self.port, *self.flags]
        self.process = subprocess.Popen(words, stderr=subprocess.PIPE)
        for line in self.process.stderr:
            if b"LISTENING" in line:
                break
        self.url, self.port = re.search("(http://127.0.0.1:([0-9]+))", line.decode()).groups()
        # The log has to go somewhere.
        subprocess.Popen(["cat"], stdin=self.process.stderr, stdout=subprocess.DEVNULL)

    def stop(self):
        self.process.terminate()
        assert self.process.wait(20) == 0

    def send(self, path, body=None):
        with urllib.request.urlopen(self.url + path, body, 30) as answer:
            return answer.read()

    def publish(self, *events):
        fields = {"topic": "t", "source": "s", "timestamp": "2026-01-01T00:00:00Z", "payload": {}}
        self.send("/publish", json.dumps([{**fields, **event} for event in events]).encode())

    def publish_logs(self):
        """Real logs where they are at hand, else made ones."""
        for path in LOGS:
            with open(path, "rb") as file:
                self.send("/publish", file.read())
        if not LOGS:
            self.publish(*[made_line(number % 2000) for number in range(2500)])

    def has(self, path):
        """Whether the service has this route."""
        try:
            self.send(path)
        except urllib.error.HTTPError as error:
            error.close()
            return error.code not in (400, 404)
        return True


def made_line(number):
    return {
        "topic": "logs/apache/" + ("error" if number % 3 else "notice"),
        "event_id": str(number),
        "source": "httpd",
        "timestamp": f"2005-12-0{4 + number // 1000}T{number // 50 % 24:02}:00:00Z",
        "payload": {"message": f"mod_jk child {number}"},
    }


def text(query):
    """The text of the first element that a selector finds, or that of <head>."""
    return f"(document.querySelector({json.dumps(query)}) || document.head).textContent"


def number_of(query):
    return f"document.querySelectorAll({json.dumps(query)}).length"


def press(query):
    return f"document.querySelector({json.dumps(query)}).click()"


def skip(why):
    print("     skipped:", why)


STATE = text("#state")
NOTE = text("#note")
FINE = "document.getElementById('state').className === 'fine'"


def search_for(browser, **filter):
    """Open the page's address with this filter, and wait for what is stored."""
    fragment = urllib.parse.urlencode(filter)
    browser.run(f"location.hash = {json.dumps('#' + fragment)}")
    browser.until(
        "JSON.stringify(search.filter) === JSON.stringify(readFragment()) && search.found"
    )
    browser.until(f"{NOTE} !== 'Looking'")


def intercept(browser, script):
    """Run this before each request of the page; what it returns is the answer.

    It has `path` and `options`, and `send` sends them. Opening the page ends it.
    """
    browser.run(
        "window.trueFetch = window.trueFetch || fetch;"
        "window.fetch = async (path, options = {}) => {"
        "  const send = () => trueFetch(path, options);"
        f"  {script};"
        "  return send();"
        "}; 0"
    )


# ---- What must hold ----


def check_numbers_without_javascript(browser, service):
    twice = [{"topic": MARKUP, "source": MARKUP, "event_id": str(n)} for n in (1, 2, 2)]
    service.publish(*twice)
    browser.send("Emulation.setScriptExecutionDisabled", value=True)
    browser.open(service.url)
    assert browser.run(text("[data-n=received]")) == "3"
    assert browser.run(text("[data-n=duplicate_dropped]")) == "1"
    assert browser.run(text("#topics th")) == MARKUP
    browser.until("document.querySelector('main').innerText.startsWith('Without JavaScript')", 5)
    hidden = "getComputedStyle(document.getElementById('publish')).display"
    assert browser.run(hidden) == "none"
    browser.send("Emulation.setScriptExecutionDisabled", value=False)
    browser.open(service.url)


def check_the_first_paint_comes_within_200_ms(browser, service):
    times = []
    paint = "(performance.getEntriesByName('first-paint')[0] || {}).startTime"
    # The best of eight: what else the machine does is not the page's doing.
    for _ in range(8):
        browser.open(service.url)
        times.append(round(browser.until(paint)))
    print(f"     after {times} ms")
    assert min(times) < 200


def publish_form(browser, payload=None):
    """Send the form; the verdict that comes, as text."""
    verdicts = browser.run("window.verdicts_seen = (window.verdicts_seen || 0) + 1")
    if payload is not None:
        browser.run(f"byId('event').elements.payload.value = {json.dumps(payload)}")
    browser.run(f"byId('verdicts').firstChild?.setAttribute('data-old', {verdicts})")
    browser.run(press("#event .main"))
    return browser.until(
        "byId('verdicts').firstChild && !byId('verdicts').firstChild.dataset.old"
        " && byId('verdicts').firstChild.innerText"
    )


def check_what_is_published_twice_is_a_duplicate_and_the_page_says_why(browser, service):
    browser.until(FINE)
    new = publish_form(browser)
    assert new.startswith("new"), new
    assert re.search("Looked up the key [0-9a-f]{32}: neither among", new), new
    duplicate = publish_form(browser)
    assert duplicate.startswith("duplicate"), duplicate
    assert "same source and payload came" in duplicate, duplicate
    assert re.search("Committed with 0 others in [0-9.]+ ms", duplicate), duplicate
    conflict = publish_form(browser, '{"door": "$& shut"}')
    assert conflict.startswith("conflict"), conflict
    assert "came" in conflict and "and stays" in conflict, conflict
    refused = publish_form(browser, '{"door": ')
    assert refused.startswith("refused"), refused
    assert "JSON" in refused, refused
    browser.until(f"{text('[data-n=received]')} === '6' && {text('[data-n=conflicts]')} === '1'")


def check_a_lost_answer_is_no_refusal(browser, service):
    browser.run("drawId()")
    intercept(
        browser,
        "if (options.method === 'POST') { await send(); throw new TypeError('lost') }",
    )
    unknown = publish_form(browser, '{"door": "open"}')
    assert unknown.startswith("unknown"), unknown
    assert "may be stored" in unknown and "asking" not in unknown, unknown
    intercept(
        browser, "if (options.method === 'POST') return new Response('slow', { status: 504 })"
    )
    unknown = publish_form(browser)
    assert unknown.startswith("unknown") and "proxy answered with 504" in unknown, unknown
    intercept(browser, "if (path.startsWith('events')) throw new TypeError('lost')")
    browser.run(press("#download"))
    browser.until(f"{text('#download')} === 'Download failed: No answer from the service'")
    intercept(browser, "")
    assert publish_form(browser).startswith("duplicate")
    browser.open(service.url)


def check_nothing_from_a_publisher_becomes_markup(browser, service):
    browser.run(f"byId('event').elements.topic.value = {json.dumps(MARKUP)}")
    publish_form(browser, json.dumps({"x": MARKUP}))
    turned = "a\u202eb\u0085c\u00add\U000e0041"
    gaps = [{"event_id": f"g{n}", "source": MARKUP, "sequence": n} for n in (1, 4)]
    service.publish(*gaps, {"topic": "turn\u202e", "event_id": "1", "payload": {"text": turned}})
    browser.until(f"{text('#gaps')} === {json.dumps(MARKUP + ': 2 missing: 2–3')}")
    cells = "[...document.querySelectorAll('#tail summary span')]"
    browser.until(f"{cells}.filter(e => e.textContent === {json.dumps(MARKUP)}).length > 5")
    browser.until(f"{text('#tail')}.includes('turn⟨U+202E⟩')")
    shown = "a⟨U+202E⟩b⟨U+0085⟩c⟨U+00AD⟩d⟨U+E0041⟩"
    assert browser.run(f"{text('#tail')}.includes('{shown}')")
    for part in ("#tail details", "#repeats-list details"):
        browser.run(f"document.querySelectorAll({json.dumps(part)}).forEach(e => e.open = true)")
    browser.until(number_of("#tail pre") + " > 5")
    assert browser.run("document.querySelectorAll('img').length || window.hit || 'none'") == "none"
    browser.run("document.querySelectorAll('[open]').forEach(e => e.open = false)")


def check_stored_events_are_found_and_the_address_keeps_the_filter(browser, service):
    service.publish_logs()
    search_for(browser, topic="logs/apache/error", source="httpd")
    rows = "[...document.querySelectorAll('#stored summary')]"
    topics = f"[...new Set({rows}.map(e => e.children[1].textContent))].join()"
    assert browser.run(topics) == "logs/apache/error"
    times = browser.run(f"{rows}.map(e => e.firstChild.textContent)")
    assert len(times) >= 30
    assert times == sorted(times, reverse=True)
    # All pages, to the first event: as many as the service counted.
    for _ in range(200):
        if browser.run("byId('older').hidden"):
            break
        before = browser.run(number_of("#stored li"))
        browser.run(press("#older"))
        browser.until(f"{number_of('#stored li')} > {before}")
    stored = json.loads(service.send("/stats"))["topics"]["logs/apache/error"]["unique"]
    assert browser.run(number_of("#stored li")) == stored
    # Reload and back keep the filter; a link makes a new one.
    address = browser.run("location.href")
    browser.open(address)
    browser.until(f"{topics} === 'logs/apache/error'")
    assert browser.run("byId('filter').elements.source.value") == "httpd"
    browser.run(
        "[...document.querySelectorAll('#topics a')].find(e => e.text.includes('not')).click()"
    )
    browser.until(f"{topics} === 'logs/apache/notice'")
    browser.run("history.back()")
    browser.until(f"{topics} === 'logs/apache/error'")
    search_for(browser, since="2005-12-04T10:00:00Z", until="2005-12-04T20:00:00Z")
    times = browser.run(f"{rows}.map(e => e.firstChild.textContent)")
    assert times and all("2005-12-04 10" <= each < "2005-12-04 20" for each in times)
    # What stood there before may stay for a moment.
    browser.until(f"({NOTE}).includes('not followed')")
    search_for(browser, topic="there is none")
    assert browser.run(text("#joint")) == "No stored event matches"
    assert "times are UTC" in browser.run("byId('events').innerText")


def check_odd_names_lead_to_their_events(browser, service):
    odd = (" lead", "star*", "star fish")
    service.publish(*[{"topic": topic, "event_id": "1"} for topic in odd])
    search_for(browser, topic="star*")
    browser.until(f"{number_of('#stored li')} === 2")
    browser.run("document.querySelectorAll('#stored details').forEach(e => e.open = true)")
    links = "[...document.querySelectorAll('#stored .soft a')].map(e => e.textContent)"
    # A topic that ends in * cannot be asked for alone.
    assert sorted(browser.run(links)) == ["s", "s", "star fish"]
    search_for(browser, topic=" lead")
    browser.until(f"{number_of('#stored li')} === 1")
    # Find asks for the same.
    browser.run("search.found = false")
    browser.run(press("#filter .main"))
    browser.until(f"search.found && {number_of('#stored li')} === 1")
    browser.run("byId('filter').elements.topic.value = ' star fish '")
    browser.run(press("#filter .main"))
    browser.until("location.hash === '#topic=star+fish'")


def check_a_wrong_filter_is_explained(browser, service):
    search = json.dumps("#" + urllib.parse.urlencode({"since": "yester-year"}))
    browser.run(f"location.hash = {search}")
    browser.until(f"{NOTE}.includes('since')")
    assert browser.run(FINE)
    browser.run(press("#download"))
    browser.until(f"{text('#download')}.startsWith('Download failed: since')")
    browser.run("location.hash = ''")
    browser.until(f"{text('#download')} === 'Download as NDJSON'")


def check_the_last_gaps_of_a_source_are_said_to_be_the_last(browser, service):
    gaps = [{"source": "many gaps", "sequence": 2 * n, "event_id": f"m{n}"} for n in range(40)]
    service.publish(*gaps)
    said = f"{text('#gaps')}.includes('many gaps: 39 missing, the last 10 gaps: 59, 61')"
    browser.until(said)


def check_text_is_found(browser, service):
    if not service.has("/events?contains=x&limit=1"):
        return skip("this service has no contains")
    search_for(browser, topic="logs/apache*", contains="mod_jk")
    payloads = "[...document.querySelectorAll('#stored .payload')].map(e => e.textContent)"
    assert browser.run(payloads + ".length") > 10
    assert browser.run(payloads + ".every(each => each.includes('mod_jk'))")
    service.publish(
        {"topic": "logs/apache/x", "event_id": "t1", "payload": {"n": "mod_jk arrives"}},
        {"topic": "logs/apache/x", "event_id": "t2", "payload": {"n": "another"}},
    )
    browser.until(f"{number_of('#arrived li')} === 1")


def check_what_the_filter_finds_can_be_downloaded(browser, service):
    # Instead of saving, keep the bytes that the link would save.
    browser.run(
        "window.saved = null; window.makeAddress = URL.createObjectURL;"
        "URL.createObjectURL = blob => { blob.text().then(text => { saved = text }); "
        " return 'blob:' };"
        "HTMLAnchorElement.prototype.click = () => 0; 0"
    )
    search_for(browser, topic="logs/apache*", until="2006-01-01")
    browser.run("byId('download').dispatchEvent(new MouseEvent('click', {cancelable: true}))")
    lines = browser.until("saved").splitlines()
    topics = {json.loads(line)["topic"] for line in lines}
    assert topics == {"logs/apache/error", "logs/apache/notice"}
    assert len(lines) == 2000
    assert "topic=logs%2Fapache" in browser.run(text("#curl"))
    browser.open(browser.run("location.href"))


def check_a_bar_narrows_the_range(browser, service):
    if not service.has("/counts?per=day"):
        return skip("this service has no /counts")
    search_for(browser, topic="logs/apache*", until="2006-01-01")
    browser.until(f"{text('#bars-say')}.startsWith('2,000 events')")
    browser.run("document.querySelector('#bars .zone').dispatchEvent(new MouseEvent('click'))")
    browser.until("location.hash.includes('since=') && location.hash.includes('until=')")
    browser.until(f"search.found && {text('#bars-say')}.includes('in a minute')")
    assert browser.run(number_of("#stored li")) > 0


def bars_of(browser, **filter):
    """What the histogram of this filter says, and what it leaves out."""
    browser.run("counted.counts = null; byId('counts').hidden = true; 0")
    search_for(browser, **filter)
    browser.until("counted.counts && !byId('counts').hidden")
    return browser.run(text("#bars-say")), browser.run(text("#bars-left"))


# Clocks that are wrong: what is said to be left out, if anything, and the filter of it.
WRONG_CLOCKS = {
    "1970-01-01T00:00:00Z": "Left out: 1 before 19",
    "2099-01-01T00:00:00Z": "Left out: 1 after 20",
    "9999-12-31T23:59:59.999Z": "Left out: 1 after 20",
}


def check_a_wrong_clock_does_not_hide_the_other_events(browser, service):
    for number, (timestamp, said) in enumerate(WRONG_CLOCKS.items()):
        topic = f"clock {number}"
        for minute in range(5):
            right = {"topic": topic, "timestamp": f"2024-01-01T00:0{minute}:00Z"}
            service.publish(*[{**right, "event_id": f"{minute} {n}"} for n in range(100)])
        service.publish({"topic": topic, "event_id": "wrong", "timestamp": timestamp})
        bars, left_out = bars_of(browser, topic=topic)
        assert bars.startswith("500 events, at most 100 in a minute"), bars
        assert left_out.startswith(said), left_out
        browser.run(press("#bars-left a"))
        browser.until(f"search.found && {text('#stored')}.includes('{timestamp[:10]}')")
        assert browser.run(number_of("#stored li")) == 1
    # Alone, it has a bar, also at the end of time.
    service.publish({"topic": "far", "event_id": "1", "timestamp": "9999-12-31T23:59:59.5Z"})
    bars, left_out = bars_of(browser, topic="far")
    assert bars.startswith("1 events"), bars
    assert left_out == ""
    browser.run("document.querySelector('#bars .zone').dispatchEvent(new MouseEvent('click'))")
    browser.until(f"location.hash.includes('until') && search.found && {NOTE}.includes('range')")
    assert browser.run(number_of("#stored li")) == 1


def check_events_that_are_neither_oldest_nor_newest_have_bars(browser, service):
    # A page of the service looks at 50,000 events; these are hidden behind them.
    for batch in range(26):
        many = {"topic": "many", "source": "many", "timestamp": "2024-06-01T00:00:00Z"}
        service.publish(*[{**many, "event_id": f"{batch} {n}"} for n in range(2000)])
    few = {"topic": "many", "source": "few", "timestamp": "2024-05-01T00:00:00Z"}
    service.publish(*[{**few, "event_id": f"few {number}"} for number in range(30)])
    for filter in ({"source": "few"}, {"source": "few", "topic": "man*"}):
        bars, left_out = bars_of(browser, **filter)
        assert bars.startswith("30 events"), bars
        assert left_out == ""


def check_a_click_on_a_bar_never_widens_the_range(browser, service):
    event = {"topic": "months", "timestamp": "2020-01-01T00:30:00Z"}
    days = [{**event, "event_id": "1"}]
    for month in range(1, 13):
        for year in range(2020, 2024):
            timestamp = f"{year}-{month:02}-02T12:30:00Z"
            days.append({**event, "event_id": timestamp, "timestamp": timestamp})
    service.publish(*days)
    bars_of(browser, topic="months", since="2020-03-02T12:30:00Z")
    browser.run("document.querySelector('#bars .zone').dispatchEvent(new MouseEvent('click'))")
    browser.until("location.hash.includes('until=')")
    assert "since=2020-03-02T12%3A30" in browser.run("location.hash")


def check_a_conflict_opens_with_both_contents(browser, service):
    for payload in ({"open": True, "same": 1}, {"open": False, "same": 1}):
        service.publish({"topic": "door", "event_id": "twice", "payload": payload})
    row = "#repeats-list > .conflict details"
    browser.until(f"{text(row)}.includes('door')")
    browser.run(press("#conflicts"))
    assert browser.run("byId('only-conflicts').checked")
    browser.until(f"{number_of('#repeats-list > .duplicate')} === 0")
    browser.until(f"{text(row)}.includes('door')")
    browser.run(f"document.querySelector({json.dumps(row)}).open = true")
    opened = browser.until(
        f"{number_of(row + ' pre')} && document.querySelector('{row}').innerText"
    )
    assert '"same": 1' in opened, opened
    if "kept no copy" in opened:
        skip("this service keeps nothing of a conflict")
    else:
        marked = browser.run(f"[...document.querySelectorAll('{row} mark')].map(e => e.innerText)")
        assert [each.strip().rstrip(",") for each in marked] == ['"open": true', '"open": false']
    browser.picture("conflict")
    browser.run(f"document.querySelector({json.dumps(row)}).open = false")
    browser.run(press("#only-conflicts"))
    browser.until("repeats.length > 0 && !byId('only-conflicts').checked")


def check_the_red_number_leads_to_conflicts_behind_many_duplicates(browser, service):
    fields = {"topic": "door", "event_id": "behind"}
    service.publish(*[{**fields, "payload": {"n": number}} for number in range(4)])
    service.publish(*[{**fields, "payload": {"n": 0}} for _ in range(120)])
    browser.open(service.url)
    note = text("#repeats-note")
    browser.until(f"{number_of('#repeats-list > .duplicate')} === 100")
    browser.run(press("#conflicts"))
    browser.until(f"{note}.startsWith('Conflicts among the last')")
    assert browser.run(number_of("#repeats-list > .conflict")) >= 3
    assert browser.run(number_of("#repeats-list > .duplicate")) == 0
    service.publish(*[{**fields, "payload": {"n": 0}} for _ in range(500)])
    browser.until(f"{note}.startsWith('No conflict among the last 500 of')")
    assert browser.run(number_of("#repeats-list > li")) == 0
    browser.run(press("#only-conflicts"))
    browser.until(f"{note}.startsWith('The last 100 of')")


# The original, what came instead, and the lines that are marked in both.
MARKS = {
    "values changed places": (
        {"a": {"x": 1}, "b": {"x": 2}},
        {"a": {"x": 2}, "b": {"x": 1}},
        [['"x": 1', '"x": 2'], ['"x": 2', '"x": 1']],
    ),
    "one less of the same": ({"l": [1, 1]}, {"l": [1]}, [["1"], []]),
    "a number as text": ({"n": 5}, {"n": "5"}, [['"n": 5'], ['"n": "5"']]),
    "a name more": ({"a": 1, "c": 3}, {"a": 1, "b": 2, "c": 3}, [[], ['"b": 2']]),
    "cut, first differs": (
        {f"k{n:03}": "same" if n else "one" for n in range(200)},
        {f"k{n:03}": "same" if n else "two" for n in range(200)},
        [['"k000": "one"'], ['"k000": "two"']],
    ),
    "cut, much more at first": (
        {f"k{n:03}": "same" for n in range(200)},
        {"a": "x" * 1000, **{f"k{n:03}": "same" for n in range(200)}},
        [[], ['"a": "' + "x" * 1000 + '"']],
    ),
    "cut within a string": (
        {"a": 1, "z": "y " * 3000},
        {"a": 2, "z": "y " * 3000},
        [['"a": 1'], ['"a": 2']],
    ),
    "cut where an object ends": (
        {"a": {"s": "x" * 2036}, "b": 1},
        {"a": {"s": "x" * 2036}, "b": 2},
        [[], []],
    ),
    "long": ({"l": list(range(120_000))}, {"l": [1]}, [[], []]),
}


def check_lines_that_differ_are_marked(browser, service):
    for way, (first, second, wanted) in MARKS.items():
        for payload in (first, second):
            service.publish({"topic": "marks", "event_id": way, "payload": payload})
        browser.until(f"repeats[0]?.event_id === {json.dumps(way)}")
        row = "document.querySelector('#repeats-list details')"
        start = time.monotonic()
        browser.run(f"{row}.open = true")
        browser.until(f"{row}.querySelectorAll('pre').length === 2")
        took = time.monotonic() - start
        assert took < 3, (way, took)
        marks = f"[...{row}.querySelectorAll('pre')]"
        marks += ".map(pre => [...pre.querySelectorAll('mark')].map(e => e.textContent))"
        found = [[line.rstrip(",") for line in lines] for lines in browser.run(marks)]
        assert found == wanted, (way, found)
        said = browser.run(f"{row}.innerText")
        assert ("its beginning" in said) == way.startswith("cut"), (way, said[-300:])
        assert ("too long" in said) == (way == "long"), (way, said[-300:])
        if "string" in way:
            # The blanks of a string that was cut are there.
            assert re.search('"z": "(y ){1000,}y?$', said.rstrip()), said[-300:]
        browser.run(f"{row}.open = false")


# Names whose address leads to another event: a browser resolves the dots.
MISLEADING = {
    "dots in a topic": ("a/../b", "1"),
    "a dot": ("a dot", "."),
    "two dots": ("two dots", ".."),
}


def open_row(browser, list_id, topic, last_words):
    """Open the first row of this topic in a list; its text once it ends with these."""
    rows = f"[...document.querySelectorAll('#{list_id} details')]"
    row = f"{rows}.find(e => e.querySelector('summary').innerText.includes({json.dumps(topic)}))"
    browser.until(f"Boolean({row})")
    browser.run(f"{row}.open = true")
    opened = browser.until(
        f"[...({row}?.querySelectorAll('pre') || [])].map(e => e.textContent).join()"
    )
    assert last_words in opened, (last_words, opened[:300])
    browser.run(f"{row}.open = false")


def check_an_event_is_read_by_its_seq_whatever_its_name_is(browser, service):
    service.publish({"topic": "b", "event_id": "1", "payload": {"i": "am of another topic"}})
    for way, (topic, event_id) in MISLEADING.items():
        event = {"topic": topic, "event_id": event_id}
        service.publish({**event, "payload": {"i": "am the original", "z": "z" * 5000, "w": way}})
        search_for(browser, topic=topic)
        open_row(browser, "stored", topic, f'"w": "{way}"')
        service.publish({**event, "payload": {"i": "came instead"}})
        browser.until(f"repeats[0]?.topic === {json.dumps(topic)}")
        open_row(browser, "repeats-list", topic, f'"w": "{way}"')


def erase(service, topic, event_id):
    names = [*topic.split("/"), event_id]
    path = "/".join(urllib.parse.quote(name, "").replace(".", "%2E") for name in names)
    request = urllib.request.Request(f"{service.url}/events/{path}", method="DELETE")
    urllib.request.urlopen(request, timeout=30).close()


def check_the_page_says_that_an_event_is_not_stored_any_more(browser, service):
    for event_id in ("gone", "gone too"):
        event = {"topic": "removed", "event_id": event_id, "payload": {"z": "z" * 5000}}
        service.publish(event, {"topic": "removed too", "event_id": event_id})
    search_for(browser, topic="removed")
    # Others came behind the one, and nothing behind the other.
    erase(service, "removed too", "gone too")
    for event_id in ("gone", "gone too"):
        erase(service, "removed", event_id)
    for row in (0, 1):
        details = f"document.querySelectorAll('#stored details')[{row}]"
        browser.run(f"{details}.open = true")
        browser.until(f"{details}.querySelector('pre')?.textContent.includes('not stored any')")
        browser.run(f"{details}.open = false")


def check_the_tail_is_exact_bounded_and_says_what_it_left_out(browser, service):
    search_for(browser, topic="fast*")
    browser.until(f"{NOTE}.startsWith('Following')")
    for batch in range(10):
        ids = range(1000 * batch, 1000 * batch + 1000)
        service.publish(
            *[
                {"topic": "fast", "event_id": f"n{n}", "payload": {"n": 9007199254740993, "id": n}}
                for n in ids
            ]
        )
    newest = text("#arrived > li:not(.mark)")
    browser.until(f"{newest}.includes('9999')")
    assert '{"id":9999,"n":9007199254740993}' in browser.run(newest)
    assert browser.run(number_of("#arrived > li")) == 200
    shown = browser.until(f"{number_of('#arrived .mark')} && {text('#arrived .mark')}")
    assert re.fullmatch("[0-9,]+ came too fast to be shown", shown), shown
    browser.run("document.querySelector('#arrived details').open = true")
    assert '"n": 9007199254740993' in browser.until(
        f"{number_of('#arrived pre')} && {text('#arrived pre')}"
    )


HOLDS = {
    "by the button": (press("#hold"), press("#hold")),
    "by the focus": (
        "document.querySelector('#arrived summary').focus()",
        "document.activeElement.blur()",
    ),
    "by a selection": (
        "getSelection().selectAllChildren(document.querySelector('#arrived .payload'))",
        "getSelection().removeAllRanges()",
    ),
    "by scrolling": ("byId('tail').scrollTop = 50", "byId('tail').scrollTop = 0"),
    "by an open event": (
        "document.querySelector('#arrived details').open = true",
        "document.querySelectorAll('#tail [open]').forEach(e => e.open = false)",
    ),
}


def check_the_tail_holds_while_somebody_reads(browser, service):
    browser.run("document.querySelectorAll('[open]').forEach(e => e.open = false)")
    first = text("#arrived > li")
    for number, (way, (hold, release)) in enumerate(HOLDS.items()):
        browser.run(hold)
        service.publish({"topic": "fast", "event_id": f"held {number}", "payload": {"way": way}})
        browser.until(f"{NOTE}.startsWith('Held') && {NOTE}.includes('; 1 waiting')")
        assert way not in browser.run(first), way
        browser.run(release)
        browser.until(f"{first}.includes({json.dumps(way)})")
    x, y = browser.run(
        "byId('tail').scrollIntoView(),"
        " (box => [box.x + 300, box.y + 60])(byId('tail').getBoundingClientRect())"
    )
    browser.move(x, y)
    service.publish({"topic": "fast", "event_id": "hovered", "payload": {"way": "hover"}})
    browser.until(f"{NOTE}.startsWith('Held while you point') && {NOTE}.includes('; 1 waiting')")
    browser.move(1, 1)
    browser.until(f"{first}.includes('hover')")


def check_names_that_were_held_are_shown_later(browser, service):
    def publish_500(topic):
        service.publish(*[{"topic": topic, "event_id": str(number)} for number in range(500)])

    publish_500("shown name")
    browser.until(f"{FINE} && {text('#topics')}.includes('shown name')")
    box = "(box => [box.x + 5, box.y + 5])(byId('topics').getBoundingClientRect())"
    x, y = browser.run(f"byId('topics').scrollIntoView(), {box}")
    browser.move(x, y)
    publish_500("held name")
    stored = json.loads(service.send("/stats"))["unique_processed"]
    browser.until(f"stats.unique_processed === {stored}")
    # Nothing new comes any more.
    time.sleep(2.5)
    assert not browser.run(f"{text('#topics')}.includes('held name')")
    browser.move(1, 1)
    browser.until(f"{text('#topics')}.includes('held name')", 5)
    browser.until("!wantsNames", 5)


def renderer_megabytes():
    """Memory of all renderers of this browser, in MB; None where there is no /proc."""
    sizes = []
    for path in glob.glob("/proc/[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            with open(path, "rb") as file:
                words = file.read()
            if b"--type=renderer" in words and b"chrom" in words:
                with open(path.replace("cmdline", "status")) as file:
                    status = file.read()
                sizes += [int(size) / 1024 for size in re.findall("VmRSS:\\s+([0-9]+)", status)]
    return max(sizes) if sizes else None


def check_large_events_are_light(browser, service):
    search_for(browser, topic="large")
    browser.until(f"{NOTE}.startsWith('Following')")
    for number in range(100):
        service.publish(
            {"topic": "large", "event_id": str(number), "payload": {"x": "y" * 1_000_000}}
        )
    browser.until(f"{number_of('#arrived > li:not(.mark)')} === 100", 60)
    assert (
        browser.run(
            "Math.max(...[...document.querySelectorAll('#arrived li')]"
            ".map(e => e.textContent.length))"
        )
        < 1000
    )
    size = renderer_megabytes()
    print(f"     {size:.0f} MB" if size else "     no /proc")
    assert size is None or size < 500
    browser.run("document.querySelector('#arrived details').open = true")
    browser.until(f"{text('#arrived pre')}.length > 1000000")
    assert browser.run("document.querySelector('#arrived pre').offsetHeight") < 500
    browser.run("document.querySelector('#arrived details').open = false")
    browser.run("startSearch()")
    assert browser.until(number_of("#stored li")) > 5


def check_an_idle_page_asks_for_little(browser, service):
    names = [
        {"topic": f"topic/{n}", "source": f"source {n}", "event_id": "1"} for n in range(10_000)
    ]
    for at in range(0, len(names), 2000):
        service.publish(*names[at : at + 2000])
    if len(json.loads(service.send("/stats?topics=1&sources=1"))["topics"]) > 1:
        return skip("this service lists all topics")
    browser.open(service.url)
    browser.until(FINE)
    assert browser.run(number_of("#topics tr")) == 12
    browser.until("!wantsNames")
    time.sleep(3)
    browser.run("0")
    browser.said.clear()
    start = time.monotonic()
    while time.monotonic() - start < 12:
        time.sleep(1)
        browser.run("0")
    sizes = collections.Counter()
    for each in browser.said:
        parameters = each["params"]
        if each["method"] == "Network.requestWillBeSentExtraInfo":
            for name, value in parameters["headers"].items():
                sizes["sent"] += len(f"{name}: {value}\r\n")
        if each["method"] == "Network.dataReceived":
            # Of an answer that has no end yet.
            sizes[parameters["requestId"]] += parameters["encodedDataLength"]
        if each["method"] == "Network.loadingFinished":
            sizes[parameters["requestId"]] = parameters["encodedDataLength"]
    size = sum(sizes.values())
    rate = size / (time.monotonic() - start)
    print(f"     {rate:.0f} bytes a second, both ways")
    assert rate < 2000


def hide(browser, hidden):
    browser.run(
        f"Object.defineProperty(document, 'hidden', {{configurable: true, value: {hidden}}});"
        "document.dispatchEvent(new Event('visibilitychange'))"
    )


def check_a_tab_that_was_hidden_marks_what_it_skipped(browser, service):
    search_for(browser, topic="hidden")
    browser.until(f"{NOTE}.startsWith('Following')")
    service.publish({"topic": "hidden", "event_id": "before"})
    browser.until(f"{text('#arrived')}.includes('hidden')")
    hide(browser, "true")
    time.sleep(0.5)
    for batch in range(3):
        service.publish(*[{"topic": "hidden", "event_id": f"{batch} {n}"} for n in range(2000)])
    hide(browser, "false")
    mark = browser.until(f"{number_of('#arrived .mark')} && {text('#arrived .mark')}")
    assert mark.startswith("Skipped here: 6,000 events were stored while this tab was hidden"), mark
    stays_fine(browser, 5)


def check_a_search_that_was_hidden_shows_what_came_meanwhile(browser, service):
    search_for(browser, topic="nothing yet")
    browser.until(f"{NOTE}.startsWith('Following')")
    # The first page finds nothing back to 2020, and the next one takes a while.
    intercept(
        browser,
        "if (path.includes('limit=30') && !window.looked) {"
        "  window.looked = true;"
        '  return new Response(\'{"events":[],"next":"d1577836800000000.1"}\');'
        "}"
        "await sleep(path.includes('cursor=') ? 1000 : 0)",
    )
    browser.run("location.hash = '#topic=looked for'")
    browser.until("search.filter.topic === 'looked for' && search.next")
    hide(browser, "true")
    time.sleep(0.5)
    service.publish(*[{"topic": "looked for", "event_id": str(number)} for number in range(5)])
    time.sleep(1)
    hide(browser, "false")
    browser.until(f"search.found && {NOTE}.startsWith('Following')")
    assert browser.run(number_of("#stored li, #arrived li")) == 5
    browser.open(service.url)


def check_one_wrong_answer_of_a_proxy_does_not_end_the_tail(browser, service):
    search_for(browser, topic="nothing yet")
    browser.until(f"{NOTE}.startsWith('Following')")
    for status in (404, 429, 502):
        intercept(
            browser,
            "if (path.includes('follow=1') && !window.refused) {"
            f"  window.refused = true; return new Response('no', {{ status: {status} }})"
            "}",
        )
        browser.run("window.refused = false; window.notes = []; 0")
        browser.run("setInterval(() => notes.push(search.fault), 20); 0")
        search_for(browser, topic=f"proxied {status}")
        browser.until(f"{NOTE}.startsWith('Following')")
        said = f"A proxy answered with {status}; asking again"
        browser.until(f"notes.includes({json.dumps(said)})", 5)
        service.publish({"topic": f"proxied {status}", "event_id": "1"})
        browser.until(f"{number_of('#arrived li')} === 1")
    browser.open(service.url)


def check_what_arrives_before_since_is_announced(browser, service):
    search_for(browser, topic="old", since="1h")
    browser.until(f"{NOTE}.startsWith('Following')")
    service.publish({"topic": "old", "event_id": "1", "timestamp": "2005-01-01T00:00:00Z"})
    browser.until(f"{number_of('#arrived li')} === 1")
    assert "whatever its time" in browser.run(NOTE)
    browser.open(service.url)


def check_the_page_says_within_two_seconds_that_nothing_answers(browser, service):
    browser.until(FINE)
    service.process.send_signal(signal.SIGSTOP)
    start = time.monotonic()
    browser.until(f"{STATE}.startsWith('No answer') && document.title.startsWith('No answer')")
    waited = time.monotonic() - start
    service.process.send_signal(signal.SIGCONT)
    print(f"     after {waited:.1f} s")
    assert waited < 2.5
    browser.until(FINE + " && document.title === 'aggregator'")


def check_a_slow_link_is_no_silence(browser, service):
    browser.until(FINE)
    for milliseconds in (700, 1000):
        intercept(browser, f"await sleep(path.startsWith('stats') ? {milliseconds} : 0)")
        # The first slow answer may be taken for silence.
        time.sleep(3)
        stays_fine(browser, 5)
    browser.open(service.url)


def check_the_page_says_that_nothing_can_be_stored(browser, service):
    if "health" not in json.loads(service.send("/stats")):
        return skip("this service has no health in /stats")
    os.rename(service.path, service.path + ".away")
    verdict = publish_form(browser, "{}")
    assert verdict.startswith("refused"), verdict
    browser.until(f"{STATE}.startsWith('Cannot store: ') && document.title.startsWith('Cannot')", 3)
    os.rename(service.path + ".away", service.path)
    # Only a commit proves that it can store again.
    assert publish_form(browser, "{}").startswith("new")
    browser.until(FINE)


def check_page_and_eventsource_come_back_after_a_restart_without_a_gap(browser, service):
    search_for(browser, topic="late")
    browser.run(
        "window.seqs = [];"
        "window.source = new EventSource('events?follow=1&topic=late&after=0');"
        "source.onmessage = event => seqs.push(JSON.parse(event.data).seq); 0"
    )
    shown = 0
    for restart in range(3):
        service.process.kill() if restart else service.process.terminate()
        service.process.wait(20)
        browser.until(f"{STATE}.startsWith('No answer')")
        service.start()
        service.publish(*[{"topic": "late", "event_id": f"{restart} {n}"} for n in range(20)])
        shown += 20
        browser.until(f"{number_of('#arrived > li')} === {shown}", 30)
        browser.until(f"seqs.length === {shown}", 30)
    seqs = browser.run("seqs")
    assert seqs == sorted(set(seqs))
    browser.run("source.close()")
    browser.until(FINE)


def check_the_page_says_that_the_store_was_replaced(browser, service):
    service.stop()
    for path in glob.glob(service.path + "*"):
        os.remove(path)
    service.start()
    service.publish({"topic": "fresh", "event_id": "1"})
    browser.until(f"{STATE}.startsWith('Another store since')", 30)
    browser.run("location.hash = ''")
    browser.until(f"{text('#tail')}.includes('fresh')")
    service.publish({"topic": "fresh", "event_id": "2"})
    browser.until(f"{number_of('#arrived > li')} === 1")


def check_nodes_of_one_log_are_one_store(browser, service):
    ahead = {"store_id": "a", "unique_processed": 50}
    behind = {"store_id": "a", "unique_processed": 49}
    other = {"store_id": "b", "unique_processed": 51}
    log = {"log": {"node": "n"}}

    def is_other(before, now):
        return browser.run(f"isOtherStore({json.dumps(before)}, {json.dumps(now)})")

    assert is_other(ahead, behind)
    assert not is_other({**ahead, **log}, {**behind, **log})
    assert is_other({**ahead, **log}, {**other, **log})


def run_axe(browser, name):
    """No finding of axe-core, if it is at hand."""
    if not AXE:
        return
    with open(AXE) as file:
        source = file.read()
    browser.run(source + "; 0")
    found = browser.wait(
        "axe.run().then(found => found.violations.map(each => each.id + ': ' +"
        " each.nodes.map(node => node.html.slice(0, 200)).join(' | ')))"
    )
    assert found == [], (name, [each[:1000] for each in found])


def check_the_page_fits_phone_and_desk_by_day_and_by_night(browser, service):
    service.publish_logs()
    service.publish({"topic": "door", "event_id": "1", "payload": {"open": True}})
    service.publish({"topic": "door", "event_id": "1", "payload": {"open": False}})
    browser.open(service.url)
    browser.until(FINE)
    publish_form(browser)
    service.publish(*[{"topic": "door", "event_id": "1", "payload": {}} for _ in range(2)])
    browser.until("repeats.length > 1 && repeats[1].delay_seconds >= 0")
    for part in ("#stored", "#repeats-list"):
        opening = f"[...document.querySelectorAll('{part} details')].slice(0, 2)"
        browser.run(f"{opening}.forEach(e => e.open = true)")
        browser.until(f"{number_of(part + ' [open] pre')} > 1")
    for width in (1440, 360):
        for scheme in ("light", "dark"):
            browser.size(width)
            browser.scheme(scheme)
            time.sleep(1.5)
            assert browser.run("document.documentElement.scrollWidth") <= width
            smallest = "Math.min(...[...document.querySelectorAll('input, textarea, button')]"
            assert (
                browser.run(smallest + ".map(e => parseFloat(getComputedStyle(e).fontSize)))") >= 16
            )
            browser.picture(f"page-{width}-{scheme}")
            run_axe(browser, f"{width} {scheme}")
    browser.size(1440)
    browser.scheme("light")
    labels = "[...document.querySelectorAll('input, textarea')].every(e => e.labels.length === 1)"
    assert browser.run(labels)


def check_the_reference_fits_too(browser, service):
    browser.open(service.url + "/docs")
    if not browser.run(number_of("main")):
        return skip("the reference has no <main>")
    run_axe(browser, "docs")


def check_all_requests_stay_here(browser, service):
    requests = [each for each in browser.said if each["method"] == "Network.requestWillBeSent"]
    addresses = [each["params"]["request"]["url"] for each in requests]
    assert len(addresses) > 10
    for address in addresses:
        assert address.startswith((service.url, "data:", "about:", "blob:")), address


def give_token(browser, token):
    browser.run(f"byId('key').elements.token.value = {json.dumps(token)}")
    browser.run(press("#key button"))


def stays_fine(browser, seconds):
    """The state does not change for so long."""
    start = time.monotonic()
    while time.monotonic() - start < seconds:
        assert browser.run(FINE), browser.run(STATE)
        time.sleep(0.1)


def check_without_the_token_nothing_is_shown(browser, service):
    browser.open(service.url)
    browser.until(f"!byId('key').hidden && {STATE} === 'Waiting for a token'")
    assert browser.run("getComputedStyle(document.querySelector('.books')).display") == "none"
    browser.picture("locked")
    run_axe(browser, "locked")
    for wrong in ("wrong", "ключ"):
        give_token(browser, wrong)
        browser.until(f"{text('#key-note')} !== '' && {STATE} === 'Waiting for a token'")
    give_token(browser, f"  {TOKEN}\t")
    browser.until(f"{FINE} && {NOTE}.startsWith('Following')")
    stays_fine(browser, 5)
    assert browser.run(text("[data-n=received]")) == "0"


def check_a_token_that_was_replaced_can_be_given_again(browser, service):
    service.stop()
    service.flags[-1] = OTHER_TOKEN
    service.start()
    browser.until(f"!byId('key').hidden && {STATE} === 'Waiting for a token'", 30)
    give_token(browser, OTHER_TOKEN)
    browser.until(f"{FINE} && {NOTE}.startsWith('Following')")
    assert publish_form(browser).startswith("new")
    browser.until(f"{number_of('#arrived > li')} === 1")


def check_without_a_token_again_the_page_opens_by_itself(browser, service):
    with_token = service.flags
    # The page has no token to send.
    browser.run("sessionStorage.clear()")
    browser.open(service.url)
    browser.until(f"!byId('key').hidden && {STATE} === 'Waiting for a token'")
    service.stop()
    service.flags = with_token[:-2]
    service.start()
    browser.until(f"{FINE} && byId('key').hidden && {NOTE}.startsWith('Following')")
    service.stop()
    service.flags = with_token
    service.start()


def check_no_address_has_held_the_token(browser, service):
    requests = [each for each in browser.said if each["method"] == "Network.requestWillBeSent"]
    for each in requests:
        assert "sesame" not in each["params"]["request"]["url"]
    assert "sesame" not in browser.run("location.href + document.body.innerText")


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


NGINX = """
daemon off; pid {folder}/nginx.pid; error_log {folder}/nginx.log; worker_processes 1;
events {{}}
http {{
  access_log off;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
  server {{
    listen 127.0.0.1:{port};
    location /prefix/ {{
      proxy_pass {url}/;
      proxy_http_version 1.1;
      proxy_set_header Host $http_host;
    }}
  }}
}}
"""


def check_the_page_works_under_a_prefix_of_a_proxy(browser, service):
    program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if program is None:
        return skip("there is no nginx")
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        path = os.path.join(folder, "nginx.conf")
        with open(path, "w") as file:
            file.write(NGINX.format(folder=folder, port=port, url=service.url))
        nginx = subprocess.Popen([program, "-c", path, "-p", folder])
        time.sleep(1)
        try:
            browser.open(f"http://127.0.0.1:{port}/prefix/#topic=demo")
            browser.until(f"{FINE} && {NOTE}.startsWith('Following')")
            assert publish_form(browser).startswith("new")
            browser.until(f"{number_of('#arrived > li')} === 1", 5)
            browser.run("document.querySelector('#arrived details').open = true")
            assert "this page" in browser.until(
                f"{number_of('#arrived pre')} && {text('#arrived pre')}"
            )
            assert "/prefix/events?topic=demo" in browser.run(text("#curl"))
            # nginx decodes %2F, so both have the same address behind it.
            large = {"i": "am t", "z": "z" * 5000}
            service.publish(
                {"topic": "t/a", "event_id": "b", "payload": {"i": "am another"}},
                {"topic": "t", "event_id": "a/b", "payload": large},
                {"topic": "t", "event_id": "a/b", "payload": {"i": "came instead"}},
            )
            browser.run("document.querySelector('#arrived details').open = false")
            browser.until("repeats[0]?.event_id === 'a/b'")
            open_row(browser, "repeats-list", "t", '"i": "am t"')
            search_for(browser, topic="t", source="s", contains="am t")
            open_row(browser, "stored", "t", '"i": "am t"')
            docs = browser.run("[...document.links].find(e => e.text === 'Reference').href")
            assert docs.endswith("/prefix/docs")
        finally:
            browser.send("Page.navigate", url="about:blank")
            nginx.terminate()
            nginx.wait(10)


# ---- All of it ----


def find_axe(folder):
    """The path of axe-core's script; "" and a line if it cannot be had."""
    if os.environ.get("AXE"):
        return os.environ["AXE"]
    words = [shutil.which("npm") or "npm", "pack", "--silent", "axe-core@4"]
    try:
        done = subprocess.run(
            words, cwd=folder, stdout=subprocess.PIPE, text=True, check=True, timeout=60
        )
    except (OSError, subprocess.SubprocessError):
        skip("axe-core cannot be had from npm")
        return ""
    archive = os.path.join(folder, done.stdout.strip())
    subprocess.run(["tar", "xzf", archive, "package/axe.min.js"], cwd=folder, check=True)
    return os.path.join(folder, "package", "axe.min.js")


AXE = ""


def main():
    global AXE
    program = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if program is None:
        return print("skipped: there is no chromium")
    # Words of the names of checks: those that run, or with a "-" before, those that do not.
    only = [word for word in sys.argv[1:] if not word.startswith("-")]
    without = [word[1:] for word in sys.argv[1:] if word.startswith("-")]
    with tempfile.TemporaryDirectory() as folder:
        AXE = find_axe(folder)
        services = [Service(folder, "open"), Service(folder, "locked", "--token", TOKEN)]
        browser = Browser(program, os.path.join(folder, "profile"))
        browser.size(1440)
        browser.open(services[0].url)
        try:
            for name, check in list(globals().items()):
                is_meant = not only or any(word in name for word in only)
                if any(word in name for word in without):
                    is_meant = False
                if name.startswith("check_") and is_meant:
                    start = time.monotonic()
                    print("  ", name[6:].replace("_", " "), flush=True)
                    check(browser, services["token" in name])
                    assert browser.problems() == [], browser.problems()
                    print(f"     {time.monotonic() - start:.1f} s", flush=True)
        finally:
            for each in [browser, *services]:
                each.process.terminate()
                each.process.wait(20)


if __name__ == "__main__":
    sys.exit(main())
