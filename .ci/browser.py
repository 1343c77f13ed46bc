"""The page in a real browser: headless Chromium, driven over the DevTools protocol. Prints what it checks; exit status 1 if
anything does not hold, 0 and one line where there is no Chromium. Standard library only."""
import json
import os
import re
import select
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request

PROGRAM = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "aggregator.py")
MARKUP, TOKEN = "<img src=x onerror=window.hit=1>&amp;\"'{}", "open-sesame-0123456789"


class Browser:
    """One Chromium with one page. It is spoken to through two pipes: JSON, each message ended by NUL."""

    def __init__(self, program, profile):
        self.asked, self.said, self.session, self.unread = 0, [], {}, b""
        (its_in, self.out), (self.back, its_out) = os.pipe(), os.pipe()
        self.process = subprocess.Popen(  # --remote-debugging-pipe reads from descriptor 3 and writes to 4
            ["bash", "-c", 'exec "$@" 3<&{} 4>&{}'.format(its_in, its_out), "bash", program, "--headless=new", "--no-sandbox",
             "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-background-networking",
             "--user-data-dir=" + profile, "--remote-debugging-pipe", "about:blank"],
            pass_fds=(its_in, its_out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(domain + ".enable")

    def send(self, method, **parameters):
        """Ask and wait for the answer; what happens meanwhile is kept in `said`."""
        self.asked += 1
        message = {"id": self.asked, "method": method, "params": parameters, **self.session}
        os.write(self.out, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.unread:
                assert select.select([self.back], [], [], 30)[0], "the browser does not answer"
                self.unread += os.read(self.back, 1 << 20)
            text, self.unread = self.unread.split(b"\0", 1)
            answer = json.loads(text.decode("utf-8"))
            if answer.get("id") == self.asked:
                assert "error" not in answer, answer
                return answer["result"]
            self.said.append(answer)

    def run(self, script):
        """The value of a JavaScript expression."""
        found = self.send("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in found, (script, found["exceptionDetails"])
        return found["result"].get("value")

    def until(self, script, seconds=20):
        """Wait for the expression to be true, and return its value."""
        end, value = time.monotonic() + seconds, None
        while not value:
            assert time.monotonic() < end, (script, self.run("document.body.innerText"))
            value = self.run(script) or time.sleep(0.03)
        return value

    def open(self, url):
        self.send("Page.navigate", url=url)
        self.until("document.readyState === 'complete' && location.href.startsWith({!r})".format(url))


class Service:
    """`aggregator.py` on a port that it keeps across restarts."""

    def __init__(self, folder, *flags):
        self.port, self.flags = "0", ["--log-level", "INFO", "--db", os.path.join(folder, "%d.db" % len(flags)), *flags]
        self.start()

    def start(self):
        self.process = subprocess.Popen([sys.executable, PROGRAM, "--port", self.port, *self.flags], stderr=subprocess.PIPE)
        line = next(line for line in iter(self.process.stderr.readline, b"") if b"LISTENING" in line).decode()
        self.url, self.port = re.search("(http://127.0.0.1:([0-9]+))", line).groups()

    def publish(self, *events):
        body = [{"topic": "t", "source": "s", "timestamp": "2026-01-01T00:00:00Z", "payload": {}, **event} for event in events]
        urllib.request.urlopen(self.url + "/publish", json.dumps(body).encode(), 10).close()


def text(query):
    return "(document.querySelector({!r}) || document.head).textContent".format(query)


def check_numbers_without_javascript(browser, service):
    service.publish(*[{"topic": MARKUP, "source": MARKUP, "event_id": str(n), "payload": {MARKUP: MARKUP}} for n in (1, 2, 2)])
    browser.send("Emulation.setScriptExecutionDisabled", value=True)
    browser.open(service.url)
    assert browser.run(text("[data-n=received]")) == "3" and browser.run(text("[data-n=duplicate_dropped]")) == "1"
    assert browser.run(text("#topics th")) == MARKUP and browser.run(text("#topics tr")).endswith("2133.3 %")
    assert browser.run("getComputedStyle(document.getElementById('publish')).display") == "none"
    browser.send("Emulation.setScriptExecutionDisabled", value=False)


def check_first_paint_within_200_ms(browser, service):
    times = []
    for _ in range(5):  # the best of five: what else the machine does is not the page's doing
        browser.open(service.url)
        times.append(round(browser.until("(performance.getEntriesByName('first-paint')[0] || {}).startTime")))
    print("     after {} ms".format(times))
    assert min(times) < 200


def check_published_twice_through_the_form_it_is_a_duplicate_and_says_why(browser, service):
    press, verdict = "document.querySelector('#event .main').click()", text("#verdicts li:first-child")
    browser.until(text("#state") + " === 'Live'")
    browser.run(press)
    assert "neither among" in browser.until("{0}.startsWith('new') && {0}".format(verdict))
    browser.run(press)
    said = browser.until("{0}.startsWith('duplicate') && {0}".format(verdict))
    assert re.search("the key was among .*key [0-9a-f]{32}, first seen [0-9.]+ s before; group of 1 committed in", said), said
    for payload, kind, reason in (('{"door": "$& shut"}', "conflict", "the first one"), ('{"door": ', "refused", "not JSON")):
        browser.run("$('event').elements.payload.value = {!r}; {}".format(payload, press))
        assert reason in browser.until("{0}.startsWith({1!r}) && {0}".format(verdict, kind))
    browser.until("{} === '6' && {} === '1'".format(text("[data-n=received]"), text("[data-n=conflicts]")))


def check_nothing_from_a_publisher_becomes_markup(browser, service):
    browser.run("$('event').elements.topic.value = {0}; $('event').elements.payload.value = JSON.stringify({{x: {0}}});"
                " document.querySelector('#event .main').click()".format(json.dumps(MARKUP)))
    service.publish(*[{"event_id": "g%d" % n, "source": MARKUP, "sequence": n} for n in (1, 4)])
    browser.until("{} === {}".format(text("#gaps"), json.dumps(MARKUP + "22–3")))
    browser.until("[...all('#lines span:nth-child(2)')].filter(e => e.textContent === %s).length === 3" % json.dumps(MARKUP))
    assert browser.run("document.querySelectorAll('img').length || window.hit || 'none'") == "none"


def check_the_tail_is_bounded_exact_can_be_held_and_filtered(browser, service):
    pause, first = "$('pause').click()", text("#lines li:first-child")
    service.publish(*[{"event_id": "n%d" % n, "payload": {"n": 9007199254740993}} for n in range(500)])
    assert '"n": 9007199254740993' in browser.until("{0}.includes('n499') && {0}".format(text("#lines pre")))
    assert browser.run("$('lines').children.length") == 200
    browser.run(pause)
    service.publish({"topic": "later", "event_id": "1"})
    browser.until(text("#note") + " === 'Held; 1 waiting' && !{}.includes('later')".format(first))
    browser.run(pause)
    browser.until(first + ".includes('later')")
    browser.run("$('filter').elements.topic.value = 'lat*'; $('filter').dispatchEvent(new Event('change'))")
    browser.until("$('lines').children.length === 1 && {}.includes('later')".format(first))


def check_inputs_have_labels_a_phone_is_wide_enough_and_all_requests_stay_here(browser, service):
    assert browser.run("[...document.querySelectorAll('input, textarea')].every(e => e.labels.length === 1)")
    browser.send("Emulation.setDeviceMetricsOverride", width=360, height=800, deviceScaleFactor=1, mobile=True)
    assert browser.run("document.documentElement.scrollWidth") <= 360
    asked = [each["params"]["request"]["url"] for each in browser.said if each["method"] == "Network.requestWillBeSent"]
    assert len(asked) > 20 and all(url.startswith((service.url, "data:,")) for url in asked), asked
    noise = [str(each) for each in browser.said if re.match("Runtime.exc|Runtime.console|Log", each["method"])]
    assert len(noise) == 1 and "/publish?explain=1" in noise[0], noise  # the browser's own line on what was to be refused


def check_page_and_eventsource_come_back_after_a_restart_without_a_gap(browser, service):
    browser.run("window.seqs = []; window.source = new EventSource('/events?follow=1&after=0');"
                " source.onmessage = event => seqs.push(JSON.parse(event.data).seq); 0")
    newest = browser.until("seqs.length > 500 && Math.max(...seqs)")
    service.process.terminate()
    assert service.process.wait(20) == 0
    browser.until(text("#state") + ".startsWith('No answer')")
    service.start()
    service.publish(*[{"topic": "late", "event_id": "after %d" % n} for n in range(3)])
    browser.until("Math.max(...seqs) === {}".format(newest + 3), 30)
    assert browser.run("seqs") == list(range(1, newest + 4))
    browser.until("$('lines').children.length === 4 && {} === 'Live'".format(text("#state")), 30)
    assert not [each for each in browser.said if each["method"] == "Runtime.exceptionThrown"]


def check_without_the_token_nothing_is_shown(browser, service):
    browser.open(service.url)
    browser.until("!$('key').hidden && {} === 'The service asks for a token'".format(text("#state")))
    assert browser.run(text("[data-n=received]")) == "–"
    for given, said in (("wrong", "This is not the token"), (TOKEN, "Live")):
        browser.run("$('key').elements.token.value = {!r}; document.querySelector('#key button').click()".format(given))
        browser.until("{} === {!r}".format(text("#state"), said))
    browser.until("{} === 'Following' && {} === '0'".format(text("#note"), text("[data-n=received]")))


def main():
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        return print("skipped: there is no chromium")
    with tempfile.TemporaryDirectory() as folder:
        services = [Service(folder), Service(folder, "--token", TOKEN)]
        browser = Browser(program, os.path.join(folder, "profile"))
        try:
            for name, check in list(globals().items()):
                if name.startswith("check_"):
                    print("  ", name[6:].replace("_", " "), flush=True)
                    check(browser, services["token" in name])
        finally:
            for each in [browser, *services]:
                each.process.terminate()
                each.process.wait(20)


if __name__ == "__main__":
    sys.exit(main())
