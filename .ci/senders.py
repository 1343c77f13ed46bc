#!/usr/bin/env python3
"""Other people's programs in front of the service and as its senders.

* Senders: the official packages of Standard Webhooks and CloudEvents (PyPI and npm),
  `fetch` of node, log daemons, Alertmanager, curl.
* Proxies with the configuration that people start with: nginx, haproxy, apache, caddy;
  and varnish, a cache.

Each check installs nothing: Debian packages are unpacked into a temporary folder, and
PyPI and npm packages are put there. What cannot be had is skipped, with the reason. The
exit status is 1 if a check failed. A check may be named: senders.py nginx fetch.
"""

import concurrent.futures
import contextlib
import glob
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request

HERE = os.path.dirname(os.path.abspath(__file__))
PROGRAM = os.path.abspath(os.environ.get("AGGREGATOR", os.path.join(HERE, "..", "aggregator.py")))
# Seconds that anything may take to start, to answer, or to deliver.
PATIENCE_S = 10

WORK = tempfile.mkdtemp(prefix="senders-")
CHECKS = {}


class Skip(Exception):
    """A check cannot be made; the message says why."""


def check(*needs):
    """Declare a check. It runs when all it `needs` are prepared: see PREPARATIONS."""

    def declare(function):
        CHECKS[function.__name__.replace("_", "-")] = (function, needs)
        return function

    return declare


# ---- Things to prepare -----------------------------------------------------------

# Some cannot be installed beside each other. Unpacked, they do not mind.
DEBIAN_GROUPS = [
    "nginx-light haproxy apache2-bin varnish caddy prometheus prometheus-alertmanager"
    " syslog-ng-core syslog-ng-mod-http",
    "rsyslog",
    "systemd-journal-remote systemd",
]
DEB = os.path.join(WORK, "deb")


def prepare_debian():
    """Unpack the Debian packages, with what they depend on."""
    for number, group in enumerate(DEBIAN_GROUPS):
        archives = os.path.join(WORK, f"archives{number}")
        os.makedirs(archives + "/partial")
        command = ["apt-get", "install", "-y", "-q", "--no-install-recommends", "--reinstall"]
        command += ["--download-only", "-o", f"Dir::Cache::archives={archives}"]
        command += ["-o", "Debug::NoLocking=1", "-o", "APT::Sandbox::User=root", *group.split()]
        try:
            run(*command)
        except Skip:
            # In a fresh container there are no lists of packages yet.
            run("apt-get", "update", "-q")
            run(*command)
        for package in glob.glob(archives + "/*.deb"):
            run("dpkg-deb", "-x", package, DEB)


VENV = os.path.join(WORK, "venv")


def prepare_pypi():
    """The official packages of PyPI."""
    run(sys.executable, "-m", "venv", VENV)
    run(VENV + "/bin/pip", "install", "-q", "standardwebhooks", "cloudevents")


NODE = os.path.join(WORK, "node")


def prepare_npm():
    """The official packages of npm."""
    if shutil.which("npm") is None:
        raise Skip("there is no npm")
    os.makedirs(NODE)
    with open(NODE + "/package.json", "w") as file:
        file.write('{"type": "module"}')
    run("npm", "install", "--no-audit", "--no-fund", "standardwebhooks", "cloudevents", cwd=NODE)


PREPARATIONS = {"debian": prepare_debian, "pypi": prepare_pypi, "npm": prepare_npm}


def run(*command, **options):
    """What a command said. Raises Skip if it failed."""
    options.setdefault("timeout", 150)
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False, **options
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Skip(f"{command[0]}: {error}") from None
    said = done.stdout.decode("utf-8", "replace").strip()
    if done.returncode:
        raise Skip(f"{os.path.basename(command[0])}: {said[-300:]}")
    return said


def unpacked(name):
    """The path of a program of a Debian package. Raises Skip."""
    for folder in ("usr/sbin", "usr/bin", "sbin", "bin"):
        path = os.path.join(DEB, folder, name)
        if os.path.exists(path):
            return path
    if shutil.which(name):
        return shutil.which(name)
    raise Skip(f"there is no {name}")


def environment_of_debian():
    """Where unpacked programs find their libraries and each other."""
    folders = glob.glob(DEB + "/usr/lib/*-linux-gnu") + glob.glob(DEB + "/lib/*-linux-gnu")
    for name in ("varnish", "systemd", "syslog-ng"):
        for place in ("usr/lib/*-linux-gnu", "usr/lib", "lib/*-linux-gnu", "lib"):
            folders += glob.glob(f"{DEB}/{place}/{name}")
    paths = [DEB + "/usr/sbin", DEB + "/usr/bin", os.environ["PATH"]]
    return {**os.environ, "LD_LIBRARY_PATH": ":".join(folders), "PATH": ":".join(paths)}


# ---- Processes -------------------------------------------------------------------


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def wait_until(holds, what):
    """Wait for a condition. Raises AssertionError after PATIENCE_S."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        with contextlib.suppress(OSError, ValueError):
            if holds():
                return
        assert time.monotonic() < deadline, f"{what}: not within {PATIENCE_S} s"
        time.sleep(0.05)


def answers(port):
    """Whether something listens on a port."""
    with socket.create_connection(("127.0.0.1", port), 1):
        return True


@contextlib.contextmanager
def running(name, *command, port=None, **options):
    """A process in a group of its own; its output goes into a file."""
    path = os.path.join(WORK, f"{name}-{time.monotonic_ns()}.log")
    with open(path, "wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, **options
        )
    try:
        if port is not None:
            try:
                wait_until(lambda: process.poll() is None and answers(port), f"{name} starts")
            except AssertionError as error:
                with open(path, errors="replace") as log:
                    raise AssertionError(f"{error}: {log.read()[-600:]}") from None
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(3)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(5)


class Service:
    """The service on a port of its own, with an empty store."""

    def __init__(self, port, folder):
        self.port = port
        self.folder = folder
        self.url = f"http://127.0.0.1:{port}"

    def events(self, topic):
        """The events of a topic, by time."""
        answer = ask(f"{self.url}/events?limit=1000&topic=" + urllib.parse.quote(topic))
        return answer.json()["events"]

    def wait_for(self, topic, count):
        """The events of a topic, once there are so many."""
        wait_until(lambda: len(self.events(topic)) >= count, f"{count} events of {topic}")
        return self.events(topic)


@contextlib.contextmanager
def service(*flags):
    """Run the service."""
    port = free_port()
    folder = tempfile.mkdtemp(dir=WORK)
    command = [sys.executable, PROGRAM, "--port", str(port), "--db", folder + "/store.db"]
    with running("service", *command, *flags, port=port):
        yield Service(port, folder)


class Answer:
    """What came back."""

    def __init__(self, status, headers, body):
        self.status = status
        self.headers = headers
        self.body = body

    def json(self):
        return json.loads(self.body.decode("utf-8"))


def ask(url, body=None, method=None, **headers):
    """Send a request; header names are written with _ for -."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(url, body, named, method=method)
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as response:
            return Answer(response.status, response.headers, response.read())
    except urllib.error.HTTPError as error:
        return Answer(error.code, error.headers, error.read())


def event(event_id, topic="door"):
    """A small event as JSON."""
    fields = {"topic": topic, "event_id": event_id, "timestamp": "2026-01-01T12:00:00Z"}
    return json.dumps({**fields, "source": "ci", "payload": {"n": 1}}).encode()


def expect(condition, what):
    """An assertion that names what is wrong."""
    assert condition, what


with open(os.path.join(HERE, "..", "README.md"), encoding="utf-8") as readme:
    README = readme.read()


def recipe(name, url):
    """The block that follows (`name`) in the README, for the service at `url`."""
    _, behind = README.split(f"(`{name}`)", 1)
    _, block, _ = behind.split("```", 2)
    _, code = block.split("\n", 1)
    return code.replace("http://localhost:8000", url).replace("localhost:8000", url)


def in_readme(text):
    """The text, which the README must show."""
    expect(text in README, f"the README has no {text}")
    return text


# ---- Senders ---------------------------------------------------------------------


def run_node(name, program, cwd=None):
    """Run a program of ours with node. Raises AssertionError if it fails."""
    if shutil.which("node") is None:
        raise Skip("there is no node")
    path = os.path.join(cwd or WORK, name + ".mjs")
    with open(path, "w") as file:
        file.write(program)
    try:
        said = run("node", path, timeout=30)
    except Skip as error:
        raise AssertionError(str(error)) from None
    assert not said, said


@check()
def fetch():
    """JSON as `fetch` sends it: as text/plain."""
    with service() as target:
        for _ in range(2):
            run_node("fetch", recipe("fetch", target.url))
        expect(len(target.events("door")) == 1, "not stored once")


@check()
def curl_and_cron():
    """The output of a job, as one event, however often it is sent."""
    with service() as target:
        job = "backup() { echo copied 312 files; }\n"
        for _ in range(2):
            run("sh", "-c", job + recipe("curl-and-cron", target.url))
        [stored] = target.events("backup")
        expect(stored["payload"] == {"message": "copied 312 files\n"}, stored)


@check()
def python_logging():
    """The handler of the README, with a service that comes late."""
    port = free_port()
    program = recipe("python-logging", f"http://127.0.0.1:{port}")
    program += 'logging.warning("disk %s is full", "sda")\n'
    folder = tempfile.mkdtemp(dir=WORK)
    with running("logging", sys.executable, "-c", program) as sender:
        time.sleep(0.5)
        command = [sys.executable, PROGRAM, "--port", str(port), "--db", folder + "/store.db"]
        with running("service", *command, port=port):
            expect(sender.wait(PATIENCE_S) == 0, "the handler failed")
            target = Service(port, folder)
            [stored] = target.events("logs/app")
            expect(stored["payload"]["message"] == "disk sda is full", stored)


SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
HOOK_FLAGS = ("--token", "t0ken", "--webhook-secret", "hooks/shop=" + SECRET)

STANDARD_WEBHOOKS_PYTHON = """
import datetime, urllib.error, urllib.request
from standardwebhooks import Webhook

body = '{"type": "order.paid", "n": 1}'
for secret, expected in ((SECRET, 202), (SECRET, 202), ("whsec_" + "A" * 32, 401)):
    now = datetime.datetime.now(datetime.timezone.utc)
    headers = {"webhook-id": "msg_1", "webhook-timestamp": str(int(now.timestamp())),
               "webhook-signature": Webhook(secret).sign("msg_1", now, body)}
    try:
        request = urllib.request.Request(URL, body.encode(), headers)
        status = urllib.request.urlopen(request).status
    except urllib.error.HTTPError as error:
        status = error.code
    assert status == expected, (secret, status)
"""

STANDARD_WEBHOOKS_NODE = """
import { Webhook } from "standardwebhooks";
const body = '{"type": "order.paid", "n": 1}';
for (const [secret, expected] of [[SECRET, 202], [SECRET, 202], ["whsec_" + "A".repeat(32), 401]]) {
  const now = new Date();
  const headers = {"webhook-id": "msg_1", "webhook-timestamp": `${Math.floor(now / 1000)}`,
                   "webhook-signature": new Webhook(secret).sign("msg_1", now, body)};
  const answer = await fetch(URL, {method: "POST", body, headers});
  if (answer.status !== expected) throw new Error(`${answer.status}: ${await answer.text()}`);
}
"""


def with_quoted(program, **values):
    """The program with names in it replaced by texts in quotes."""
    for name, value in values.items():
        program = re.sub(rf"\b{name}\b", json.dumps(value), program)
    return program


def expect_one_delivery(target):
    """The webhook was stored once."""
    answer = ask(target.url + "/events?topic=hooks/shop", Authorization="Bearer t0ken")
    [stored] = answer.json()["events"]
    expect(stored["event_id"] == "msg_1", stored)
    expect(stored["payload"] == {"type": "order.paid", "n": 1}, stored)


@check("pypi")
def standardwebhooks_pypi():
    """Signed by the official package of Python."""
    with service(*HOOK_FLAGS) as target:
        hook = target.url + "/events/hooks/shop"
        program = with_quoted(STANDARD_WEBHOOKS_PYTHON, SECRET=SECRET, URL=hook)
        run_or_fail(VENV + "/bin/python", "-c", program)
        expect_one_delivery(target)


@check("npm")
def standardwebhooks_npm():
    """Signed by the official package of JavaScript."""
    with service(*HOOK_FLAGS) as target:
        hook = target.url + "/events/hooks/shop"
        program = with_quoted(STANDARD_WEBHOOKS_NODE, SECRET=SECRET, URL=hook)
        run_node("standardwebhooks", program, NODE)
        expect_one_delivery(target)


def run_or_fail(*command, **options):
    """Run a program of ours. Raises AssertionError if it fails."""
    try:
        return run(*command, **options)
    except Skip as error:
        raise AssertionError(str(error)) from None


GITHUB = """\
body='{"action":"opened","number":7}'
signature=$(printf %s "$body" | openssl dgst -sha256 -hmac "$SECRET" | sed 's/.*= /sha256=/')
curl -sf "URL/events/github" -H 'Content-Type: application/json' -d "$body" \\
    -H 'X-GitHub-Delivery: 72d3162e-cc78-11e3-81ab-4c9367dc0958' \\
    -H "X-Hub-Signature-256: $signature"
"""


@check()
def github():
    """What GitHub sends, signed by openssl."""
    if shutil.which("openssl") is None:
        raise Skip("there is no openssl")
    with service("--token", "t0ken", "--webhook-secret", "github=a-text") as target:
        for secret, works in (("a-text", True), ("a-text", True), ("other", False)):
            done = subprocess.run(
                ["sh", "-c", GITHUB.replace("URL", target.url)],
                env={**os.environ, "SECRET": secret},
                stdout=subprocess.PIPE,
                check=False,
            )
            expect((done.returncode == 0) == works, f"{secret}: {done}")
        answer = ask(target.url + "/events?topic=github", Authorization="Bearer t0ken")
        [stored] = answer.json()["events"]
        expect(stored["payload"]["number"] == 7, stored)


@check()
def stripe_like():
    """A webhook whose id and time stand in its body."""
    body = b'{"id": "evt_1", "created": 1767268800, "type": "invoice.paid", "data": {}}'
    with service() as target:
        hook = target.url + in_readme("/events/stripe?id=body:/id&time=body:/created&source=stripe")
        for _ in range(2):
            expect(ask(hook, body).status == 202, "refused")
        [stored] = target.events("stripe")
        expect(stored["event_id"] == "evt_1", stored)
        expect(stored["timestamp"] == "2026-01-01T12:00:00.000000Z", stored)


CLOUD_EVENTS_PYTHON = """
import datetime, json, urllib.request
from cloudevents.core.bindings.http import to_binary_event, to_structured_event
from cloudevents.core.formats.json import JSONFormat
from cloudevents.core.v1.event import CloudEvent
from cloudevents.v1.conversion import to_json
from cloudevents.v1.http import CloudEvent as OldCloudEvent, to_binary, to_structured

attributes = {"type": "opened", "source": "https://example.org/door", "subject": "caf\\u00e9 1",
              "ext": "x%y", "datacontenttype": "application/json", "specversion": "1.0",
              "time": datetime.datetime.now(datetime.timezone.utc)}
old_attributes = {**attributes, "time": attributes["time"].isoformat(), "ext": "xy"}
data = {"n": [1, None, "\\u20ac"]}
sent = []


def send(headers, body):
    for _ in range(2):
        urllib.request.urlopen(urllib.request.Request(URL + "/publish", body, headers))


for convert in (to_structured_event, to_binary_event):
    event = CloudEvent({**attributes, "id": "new " + convert.__name__}, data)
    message = convert(event)
    send(message.headers, message.body)
    sent.append(json.loads(JSONFormat().write(event)))
for convert in (to_structured, to_binary):
    event = OldCloudEvent({**old_attributes, "id": "old " + convert.__name__}, data)
    send(*convert(event))
    sent.append(json.loads(to_json(event)))
batch = []
for name in ("batch-1", "batch-2"):
    batch.append(json.loads(JSONFormat().write(CloudEvent({**attributes, "id": name}, {"n": 1}))))
request = urllib.request.Request(URL + "/publish", json.dumps(batch).encode(),
                                 {"Content-Type": "application/cloudevents-batch+json"})
urllib.request.urlopen(request)
print(json.dumps(sent + batch))
"""

CLOUD_EVENTS_NODE = """
import { CloudEvent, HTTP } from "cloudevents";
const sent = [];
for (const mode of ["structured", "binary"]) {
  const event = new CloudEvent({id: mode, type: "opened", source: "https://example.org/door",
                                subject: "front", ext: "x", data: {n: [1, null, "\\u20ac"]}});
  const { headers, body } = HTTP[mode](event);
  for (const _ of [1, 2]) {
    const answer = await fetch(URL + "/publish", {method: "POST", headers, body});
    if (answer.status !== 202) throw new Error(`${mode} ${answer.status} ${await answer.text()}`);
  }
  sent.push(event.toJSON());
}
import { writeFileSync } from "node:fs";
writeFileSync(OUT, JSON.stringify(sent));
"""


def expect_cloud_events(target, sent):
    """Each CloudEvent is stored once, and nothing of it is lost."""
    stored = {each["event_id"]: each for each in target.events("opened")}
    expect(len(stored) == len(sent), f"{len(stored)} of {len(sent)} are stored")
    for cloud_event in sent:
        found = stored[f"{cloud_event['source']} {cloud_event['id']}"]
        back = {"id": cloud_event["id"], "source": found["source"], "type": found["topic"]}
        back["time"] = found["timestamp"]
        back.update(found["payload"])
        # The same instant may be spelt in another way; and the SDKs say that data is
        # JSON in one mode and leave it unsaid in the other.
        for each in (back, cloud_event):
            each["time"] = re.sub(r"\.?0*(?:Z|\+00:00)$", "", each["time"])
            each.pop("datacontenttype", None)
        expect(back == cloud_event, f"{back} is not {cloud_event}")


@check("pypi")
def cloudevents_pypi():
    """The official SDK of Python: structured, binary and batched."""
    with service() as target:
        program = with_quoted(CLOUD_EVENTS_PYTHON, URL=target.url)
        said = run_or_fail(VENV + "/bin/python", "-W", "ignore", "-c", program)
        expect_cloud_events(target, json.loads(said))


@check("npm")
def cloudevents_npm():
    """The official SDK of JavaScript: structured and binary."""
    with service() as target:
        out = os.path.join(target.folder, "sent.json")
        run_node("cloudevents", with_quoted(CLOUD_EVENTS_NODE, URL=target.url, OUT=out), NODE)
        with open(out) as file:
            expect_cloud_events(target, json.load(file))


# ---- Log daemons and monitoring --------------------------------------------------

SYSLOG_NG = """\
@version: 3.38
source s_src { file("INPUT" flags(no-parse) follow-freq(0.2)); };
"""


@check("debian")
def syslog_ng():
    """Its destination http(), with a line in another encoding."""
    program = unpacked("syslog-ng")
    modules = glob.glob(DEB + "/usr/lib/syslog-ng/*") or [DEB + "/usr/lib/syslog-ng"]
    with service() as target:
        path = target.folder + "/input.log"
        with open(path, "wb") as file:
            file.write(b"first\ncaf\xe9\nlast\n")
        settings = SYSLOG_NG.replace("INPUT", path) + recipe("syslog-ng", target.url)
        settings_path = target.folder + "/syslog-ng.conf"
        with open(settings_path, "w") as file:
            file.write(settings)
        command = [program, "-F", "-f", settings_path, "-R", target.folder + "/persist"]
        command += ["-c", target.folder + "/ctl", "-p", target.folder + "/pid"]
        command += ["--module-path", ":".join(modules), "--no-caps"]
        with running("syslog-ng", *command, env=environment_of_debian()):
            stored = target.wait_for("logs/syslog", 3)
        messages = sorted(each["payload"]["message"] for each in stored)
        expect(messages == ["caf\\xe9", "first", "last"], messages)


RSYSLOG = """\
module(load="imfile" pollingInterval="1")
input(type="imfile" File="INPUT" Tag="app")
"""


@check("debian")
def rsyslog():
    """Its module omprog, and `aggregator.py publish`."""
    program = unpacked("rsyslogd")
    modules = glob.glob(DEB + "/usr/lib/*/rsyslog")
    with service() as target:
        path = target.folder + "/input.log"
        with open(path, "w") as file:
            file.write("first\nlast\n")
        action = recipe("rsyslog", target.url).replace("/usr/bin/python3", sys.executable)
        action = action.replace("/opt/aggregator/aggregator.py", PROGRAM)
        action = action.replace(" publish ", f" publish --url {target.url} ")
        settings = RSYSLOG.replace("INPUT", path) + action
        settings_path = target.folder + "/rsyslog.conf"
        with open(settings_path, "w") as file:
            file.write(f'global(workDirectory="{target.folder}")\n' + settings)
        command = [program, "-n", "-f", settings_path, "-i", target.folder + "/pid"]
        command += ["-M", ":".join(modules)]
        with running("rsyslog", *command, env=environment_of_debian()):
            stored = target.wait_for("logs/rsyslog", 2)
        messages = sorted(each["payload"]["message"] for each in stored)
        expect(messages[0].endswith("first") and messages[1].endswith("last"), messages)


JOURNAL_EXPORT = """\
__REALTIME_TIMESTAMP=1767268800000000
__MONOTONIC_TIMESTAMP=1000000
_BOOT_ID=0123456789abcdef0123456789abcdef
_MACHINE_ID=0123456789abcdef0123456789abcdef
_HOSTNAME=nas
SYSLOG_IDENTIFIER=app
MESSAGE=disk is full

"""
JOURNALD = "journalctl FLAGS -o short-iso | PYTHON PROGRAM publish --url URL --topic logs/journal"


@check("debian")
def journald():
    """journalctl and `aggregator.py publish`, with a journal made for it."""
    unpacked("journalctl")
    remote = glob.glob(DEB + "/*/systemd/systemd-journal-remote")
    remote += glob.glob(DEB + "/usr/lib/systemd/systemd-journal-remote")
    if not remote:
        raise Skip("there is no systemd-journal-remote, which makes a journal")
    with service() as target:
        journal = target.folder + "/one.journal"
        options = {"env": environment_of_debian(), "timeout": 20}
        run(remote[0], "-o", journal, "-", input=JOURNAL_EXPORT.encode(), **options)
        command = JOURNALD.replace("FLAGS", "--file=" + journal).replace("URL", target.url)
        command = command.replace("PYTHON", sys.executable).replace("PROGRAM", PROGRAM)
        run_or_fail("sh", "-c", command, **options)
        messages = [each["payload"]["message"] for each in target.events("logs/journal")]
        expect(any(each.endswith("disk is full") for each in messages), messages)


ALERTMANAGER = """\
route:
  receiver: aggregator
  group_wait: 0s
receivers:
  - name: aggregator
    webhook_configs:
      - url: "URL"
"""


def alertmanager_with_templates():
    """A copy of it that finds its templates where they are unpacked."""
    built_in = b"/usr/share/prometheus/alertmanager"
    templates = os.path.join(WORK, "am")
    if not os.path.exists(templates):
        os.symlink(DEB + built_in.decode(), templates)
    # Of the same length: slashes more do not matter.
    path = templates.encode().ljust(len(built_in), b"/")
    if len(path) != len(built_in):
        raise Skip("the path of the temporary folder is too long")
    with open(unpacked("prometheus-alertmanager"), "rb") as file:
        code = file.read().replace(built_in, path)
    program = os.path.join(WORK, "alertmanager")
    with open(program, "wb") as file:
        file.write(code)
    os.chmod(program, 0o755)
    return program


@check("debian")
def alertmanager():
    """Its webhook: the same notification is stored once."""
    program = alertmanager_with_templates()
    port = free_port()
    with service() as target:
        settings = target.folder + "/alertmanager.yml"
        with open(settings, "w") as file:
            path = in_readme("/events/alerts?id=content&source=alertmanager")
            file.write(ALERTMANAGER.replace("URL", target.url + path))
        command = [program, "--config.file", settings, "--storage.path", target.folder + "/am"]
        command += ["--web.listen-address", f"127.0.0.1:{port}", "--cluster.listen-address="]
        with running("alertmanager", *command, port=port):
            alert = b'[{"labels": {"alertname": "DiskFull", "host": "nas"}}]'
            url = f"http://127.0.0.1:{port}/api/v2/alerts"
            wait_until(
                lambda: ask(url, alert, Content_Type="application/json").status == 200,
                "alertmanager takes an alert",
            )
            [stored] = target.wait_for("alerts", 1)
        expect(stored["payload"]["alerts"][0]["labels"]["alertname"] == "DiskFull", stored)


PROMETHEUS = """\
scrape_configs:
  - job_name: aggregator
    scrape_interval: 1s
    static_configs:
      - targets: ["TARGET"]
"""


@check("debian")
def prometheus():
    """It scrapes /metrics."""
    program = unpacked("prometheus")
    port = free_port()
    with service() as target:
        expect(ask(target.url + "/publish", event("1")).status == 202, "not published")
        settings = target.folder + "/prometheus.yml"
        with open(settings, "w") as file:
            file.write(PROMETHEUS.replace("TARGET", f"127.0.0.1:{target.port}"))
        command = [program, "--config.file", settings, "--storage.tsdb.path"]
        command += [target.folder + "/tsdb", "--web.listen-address", f"127.0.0.1:{port}"]
        with running("prometheus", *command, port=port):
            query = f"http://127.0.0.1:{port}/api/v1/query?query=aggregator_events_unique_total"

            def has_sample():
                [sample] = ask(query).json()["data"]["result"]
                return sample["value"][1] == "1"

            wait_until(has_sample, "prometheus has scraped")


# ---- Proxies ---------------------------------------------------------------------

# Each with what people start with: the way to the service, and nothing else. The
# service is reached at / and again at /agg/.

NGINX = """\
daemon off; master_process off; pid FOLDER/pid; error_log FOLDER/error.log; events {}
http {
  access_log off;
  client_body_temp_path FOLDER/a; proxy_temp_path FOLDER/b; fastcgi_temp_path FOLDER/c;
  uwsgi_temp_path FOLDER/d; scgi_temp_path FOLDER/e;
  server {
    listen 127.0.0.1:PORT;
    location / { proxy_pass http://127.0.0.1:TARGET; }
    location /agg/ { proxy_pass http://127.0.0.1:TARGET/; }
  }
}
"""

HAPROXY = """\
defaults
  mode http
  timeout connect 5s
  timeout client 50s
  timeout server 50s
frontend web
  bind 127.0.0.1:PORT
  use_backend prefixed if { path_beg /agg/ }
  default_backend aggregator
backend aggregator
  server one 127.0.0.1:TARGET
backend prefixed
  http-request replace-path /agg/(.*) /\\1
  server one 127.0.0.1:TARGET
"""

APACHE = """\
ServerRoot FOLDER
ServerName localhost
PidFile FOLDER/pid
ErrorLog FOLDER/error.log
Listen 127.0.0.1:PORT
LoadModule mpm_event_module MODULES/mod_mpm_event.so
LoadModule authz_core_module MODULES/mod_authz_core.so
LoadModule proxy_module MODULES/mod_proxy.so
LoadModule proxy_http_module MODULES/mod_proxy_http.so
ProxyPass /agg/ http://127.0.0.1:TARGET/
ProxyPass / http://127.0.0.1:TARGET/
"""

CADDY = """\
{
  admin off
  auto_https off
}
http://:PORT {
  handle_path /agg/* {
    reverse_proxy 127.0.0.1:TARGET
  }
  reverse_proxy 127.0.0.1:TARGET
}
"""


@contextlib.contextmanager
def proxy(name, settings, command):
    """The service, and a proxy in front of it; gives both and the proxy's address.

    `command` makes the command of the proxy from the path of its settings.
    """
    port = free_port()
    with service("--allow-host", "your.host") as target:
        modules = "".join(glob.glob(DEB + "/usr/lib/apache2/modules"))
        path = os.path.join(target.folder, name + ".conf")
        values = {"FOLDER": target.folder, "PORT": port, "TARGET": target.port, "MODULES": modules}
        for word, value in values.items():
            settings = re.sub(rf"\b{word}\b", str(value), settings)
        with open(path, "w") as file:
            file.write(settings)
        words = command(path)
        environment = {**environment_of_debian(), "HOME": target.folder}
        with running(name, *words, port=port, env=environment, cwd=target.folder):
            yield target, f"http://127.0.0.1:{port}"


class Tail:
    """A live tail through a proxy: what has come so far."""

    def __init__(self, url, accept):
        request = urllib.request.Request(url, headers={"Accept": accept})
        self.response = urllib.request.urlopen(request, timeout=PATIENCE_S)
        self.lines = []
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            for line in self.response:
                self.lines.append(line)

    def count(self):
        """How many events have come."""
        return sum(1 for line in self.lines if b'"event_id"' in line)


def exercise(target, url):
    """Whatever works at the service itself works at `url`, through a proxy."""
    answer = ask(url + "/publish", event("1"))
    expect(answer.status == 202, f"publish: {answer.status} {answer.body[:200]}")
    expect(ask(url + "/publish", event("1")).json()["duplicates"] == 1, "a repeat")
    # An id with a slash: several proxies change %2F in a path; a body they leave alone.
    expect(ask(url + "/publish", event("a/b%2Fc", "nested/topic")).status == 202, "a nested id")
    [nested] = target.events("nested/topic")
    expect(nested["event_id"] == "a/b%2Fc", nested)
    large = b"[" + b",".join(event(f"large-{number}") for number in range(5000)) + b"]"
    expect(ask(url + "/publish", large).json()["unique"] == 5000, "a batch of 700 KB")
    exercise_page(url)
    exercise_tails(url)
    lines = ask(url + "/events", Accept="application/x-ndjson").body.count(b"\n")
    expect(lines == 5002 + 6, f"a list of {lines} lines")


def exercise_page(url):
    """The page and the documents, and the links in them."""
    answer = ask(url + "/health", Host="your.host")
    expect(answer.json() == {"status": "ok"}, f"as your.host: {answer.body[:200]}")
    page = ask(url + "/", Accept="text/html")
    expect(page.status == 200 and b"<html" in page.body, "the page")
    absolute = re.findall(rb'(?:href|src|action)="/[^"]*|fetch\(["\'`]/[^"\'`]*', page.body)
    expect(not absolute, f"links that no prefix goes before: {absolute[:3]}")
    refusal = ask(url + "/events/no/such/event")
    link = urllib.parse.urljoin(url + "/events/no/such/event", refusal.json()["type"])
    address, _, anchor = link.partition("#")
    expect(f'id="{anchor}"'.encode() in ask(address).body, f"{link} leads nowhere")
    document = ask(url + "/openapi.json").json()
    base = urllib.parse.urljoin(url + "/openapi.json", document["servers"][0]["url"])
    expect(base.rstrip("/") == url, f"the document says that the service is at {base}")


def exercise_tails(url):
    """Each event of a live tail comes within a second, as lines and for browsers."""
    for accept in ("application/x-ndjson", "text/event-stream"):
        tail = Tail(url + "/events?follow=1&topic=tail", accept)
        kind = accept.partition("/")[2]
        for number in range(3):
            ask(url + "/publish", event(f"{kind}-{number}", "tail"))
            came = time.monotonic() + 1
            while tail.count() <= number and time.monotonic() < came:
                time.sleep(0.02)
            expect(tail.count() == number + 1, f"{kind}: {tail.count()} of {number + 1} came")


def check_proxy(name, settings, command):
    """The service behind a proxy: at the root, then behind a prefix."""
    for prefix in ("", "/agg"):
        with proxy(name, settings, command) as (target, url):
            exercise(target, url + prefix)


@check("debian")
def nginx():
    """nginx with nothing but proxy_pass."""
    program = unpacked("nginx")
    check_proxy("nginx", NGINX, lambda path: [program, "-c", path, "-e", path + ".log"])


@check("debian")
def haproxy():
    """haproxy in mode http."""
    program = unpacked("haproxy")
    check_proxy("haproxy", HAPROXY, lambda path: [program, "-db", "-f", path])


@check("debian")
def apache():
    """Apache with mod_proxy_http."""
    program = unpacked("apache2")
    check_proxy("apache", APACHE, lambda path: [program, "-DFOREGROUND", "-f", path])


@check("debian")
def caddy():
    """caddy with reverse_proxy."""
    program = unpacked("caddy")
    check_proxy(
        "caddy",
        CADDY,
        lambda path: [program, "run", "--config", path, "--adapter", "caddyfile"],
    )


@check("debian")
def varnish():
    """Varnish with its default VCL never serves a stored answer."""
    program = unpacked("varnishd")
    port = free_port()
    with service("--token", "t0ken") as target:
        command = [program, "-F", "-j", "none", "-a", f"127.0.0.1:{port}"]
        command += ["-b", f"127.0.0.1:{target.port}", "-n", target.folder + "/varnish"]
        with running("varnish", *command, port=port, env=environment_of_debian()):
            url = f"http://127.0.0.1:{port}"
            token = {"Authorization": "Bearer t0ken"}
            wait_until(lambda: ask(url + "/health").status == 200, "varnish answers")
            for number in range(3):
                answer = ask(url + "/publish", event(str(number)), **token)
                expect(answer.status == 202, f"publish: {answer.status}")
                listed = ask(url + "/events", **token)
                expect(listed.json()["count"] == number + 1, "an old list")
                for path in ("/events", "/stats", "/events/door/0"):
                    expect(ask(url + path).status == 401, f"{path} without a token")
                for path in ("/health", "/docs", "/", "/openapi.json", "/nowhere"):
                    answer = ask(url + path)
                    # Two numbers in X-Varnish: an earlier request stored the answer.
                    hit = len(answer.headers.get("X-Varnish", "").split()) == 2
                    expect(not hit, f"{path} comes out of the cache")


# ---- Everything together ---------------------------------------------------------


def prepare(names):
    """What each preparation came to: "" or why it cannot be had."""

    def attempt(name):
        try:
            PREPARATIONS[name]()
            return ""
        except Skip as error:
            return str(error)

    with concurrent.futures.ThreadPoolExecutor() as pool:
        return dict(zip(names, pool.map(attempt, names)))


def main():
    chosen = sys.argv[1:] or list(CHECKS)
    needed = set()
    for name in chosen:
        needed |= set(CHECKS[name][1])
    reasons = prepare(sorted(needed))
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    for name in chosen:
        function, needs = CHECKS[name]
        began = time.monotonic()
        outcome, said = "passed", ""
        try:
            for need in needs:
                if reasons[need]:
                    raise Skip(reasons[need])
            function()
        except Skip as error:
            outcome, said = "skipped", str(error)
        except Exception as error:
            outcome, said = "failed", f"{type(error).__name__}: {error}"
        counts[outcome] += 1
        print(f"{outcome:8}{name} ({time.monotonic() - began:.1f} s) {said}", flush=True)
    print(", ".join(f"{count} {outcome}" for outcome, count in counts.items()))
    return 1 if counts["failed"] else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    finally:
        shutil.rmtree(WORK, ignore_errors=True)
