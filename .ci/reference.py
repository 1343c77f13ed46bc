#!/usr/bin/env python3
"""Hold a running service against its own reference, with other people's tools.

* promtool reads GET /metrics.
* openapi-spec-validator reads GET /openapi.json.
* schemathesis sends what the document allows and what it forbids.
* openapi-python-client and openapi-typescript make clients of the document. Each client
  publishes an event and lists it.

What cannot be had is skipped, with the reason. The exit status is 1 if anything was
found. Nothing stays on the machine. REFERENCE_EXAMPLES: requests for each operation.
"""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request

HERE = os.path.dirname(os.path.abspath(__file__))
PROGRAM = os.environ.get("AGGREGATOR", os.path.join(HERE, "..", "aggregator.py"))
# With a token, schemathesis also looks at the answers to those who have none.
TOKEN = "only-for-this-check"
EXAMPLES = os.environ.get("REFERENCE_EXAMPLES", "40")

# What schemathesis may get for a request that the document allows: also that an event
# was erased before.
SCHEMATHESIS_SETTINGS = """
[checks.positive_data_acceptance]
expected-statuses = ["2xx", "401", "403", "404", "409", "410", "5xx"]
"""
# A topic has slashes, so what OpenAPI takes for two paths is one: POST /events/{topic}
# also answers where the document has GET /events/{topic}/{event_id}.
CHECKS_LEFT_OUT = "unsupported_method,allow_header_conformance"

FINDINGS = []


def report(what, is_fine, said):
    """Print one line about a check, and what was said if it found something."""
    if is_fine:
        summary = re.search(".* generated, .*", said)
        print(f"{what}: {summary[0].strip() if summary else 'nothing found'}", flush=True)
    else:
        print(f"{what}: {said}", flush=True)
        FINDINGS.append(what)


def skip(what, reason):
    """Print why a check is not made."""
    print(f"skipped: {what}: {reason[-200:]}", flush=True)


def run(*command, **options):
    """Whether a command succeeded, and what it said."""
    options.setdefault("timeout", 900)
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False, **options
    )
    return done.returncode == 0, done.stdout.decode("utf-8", "replace").strip()


def get(url):
    """What GET answers."""
    request = urllib.request.Request(url, headers={"Authorization": "Bearer " + TOKEN})
    with urllib.request.urlopen(request, timeout=10) as response:
        return response.read()


# ---- schemathesis -----------------------------------------------------------------
#
# OpenAPI has no words for a rule that joins two parameters. What is made up at random
# would break such a rule. So there are two copies of the document, each with one side
# of every rule. In neither are streams, which never end, and NDJSON, which OpenAPI
# takes for any text.

STREAMS = {"follow", "after", "Last-Event-ID", "access_token"}


def one_side(document, side):
    """The copy of the document that has this side, 0 or 1, of every rule."""
    narrowed = copy.deepcopy(document)
    # Optional in general, and not here.
    narrowed["security"] = [{"bearer": []}]
    paths = narrowed["paths"]
    publish = paths["/publish"]["post"]
    content = publish["requestBody"]["content"]
    if side == 0:
        # A JSON event names its own topic and source.
        leave_out(publish, {"topic", "source", "Idempotency-Key"})
        publish["requestBody"]["content"] = {"application/json": content["application/json"]}
        # A cursor belongs to an order.
        leave_out(paths["/events"]["get"], STREAMS | {"cursor"})
    else:
        require(publish, {"topic", "source"})
        publish["requestBody"]["content"] = {"text/plain": content["text/plain"]}
        leave_out(paths["/events"]["get"], STREAMS | {"order"})
        # Without `order`, a cursor is one of the order by time.
        cursor = parameter(paths["/events"]["get"], "cursor")
        cursor["schema"]["pattern"] = cursor["schema"]["pattern"].replace("[ad]", "a")
    # The place of an id must be in the request, and nothing joins the two.
    inbox = paths["/events/{topic}"]["post"]
    leave_out(inbox, {"time"})
    require(inbox, {"id"})
    parameter(inbox, "id")["schema"] = {"enum": ["content", "random"]}
    if "delete" in paths["/events"]:
        require(paths["/events"]["delete"], {"topic"})
    if "/counts" in paths:
        # A short step over a long time would be too many counts.
        leave_out(paths["/counts"]["get"], {"per", "since", "until"})
    return narrowed


def parameter(operation, name):
    """A parameter of an operation."""
    (found,) = [each for each in operation["parameters"] if each["name"] == name]
    return found


def leave_out(operation, names):
    """Take parameters out of an operation."""
    kept = [each for each in operation["parameters"] if each["name"] not in names]
    operation["parameters"] = kept


def require(operation, names):
    """Have parameters in every request."""
    for name in names:
        parameter(operation, name)["required"] = True


def check_with_schemathesis(tools, document, url, work):
    """Send what each copy of the document allows and forbids."""
    with open(os.path.join(work, "schemathesis.toml"), "w") as file:
        file.write(SCHEMATHESIS_SETTINGS)
    for side in (0, 1):
        path = os.path.join(work, f"side{side}.json")
        with open(path, "w") as file:
            json.dump(one_side(document, side), file)
        command = [tools + "schemathesis", "run", path, "--url", url]
        command += ["-H", "Authorization: Bearer " + TOKEN, "-n", EXAMPLES, "--seed", "1"]
        command += ["--exclude-checks", CHECKS_LEFT_OUT, "--no-color"]
        # The phase left out takes the id of any answer for the `id` of any parameter.
        command += ["--phases", "examples,coverage,fuzzing"]
        command += ["--generation-database", "none"]
        report("schemathesis", *run(*command, cwd=work))


# ---- Generated clients ------------------------------------------------------------

PYTHON_CLIENT = """
import sys
sys.path.insert(0, "client")
from aggregator_client import AuthenticatedClient
from aggregator_client.api.default import list_events, publish_events
from aggregator_client.models import Event

client = AuthenticatedClient(base_url=sys.argv[1], token=sys.argv[2])
event = Event.from_dict({"topic": "client", "event_id": "python", "source": "ci",
                         "timestamp": "2026-01-01T12:00:00Z", "payload": {"open": True}})
answer = publish_events.sync_detailed(client=client, body=event)
assert answer.status_code == 202, answer
page = list_events.sync_detailed(client=client, topic="client", limit=10)
assert page.status_code == 200, page
[listed] = [each for each in page.parsed.events if each.event_id == "python"]
assert listed.payload["open"] is True, listed
print("published and listed")
"""

# Checked by the compiler of TypeScript, and then run by node without types.
TYPESCRIPT_CLIENT = """
import createClient from "openapi-fetch";
import type { paths } from "./reference.js";

const [url, token] = process.argv.slice(2);
const client = createClient<paths>({ baseUrl: url, headers: { Authorization: `Bearer ${token}` } });
const published = await client.POST("/publish", {
  body: { topic: "client", event_id: "typescript", source: "ci",
          timestamp: "2026-01-01T12:00:00Z", payload: { open: true } },
});
if (published.response.status !== 202) throw new Error(JSON.stringify(published.error));
const query = { topic: "client", limit: 10 };
const listed = await client.GET("/events", { params: { query } });
const page = listed.data as { events: { event_id: string; payload: { [name: string]: unknown } }[] };
const found = page.events.find((event) => event.event_id === "typescript");
if (found === undefined || found.payload["open"] !== true) throw new Error("not listed");
console.log("published and listed");
"""
TYPESCRIPT_SETTINGS = """
{"compilerOptions": {"strict": true, "noEmit": false, "module": "nodenext", "target": "es2022",
 "moduleResolution": "nodenext", "skipLibCheck": true, "types": ["node"]}, "files": ["use.ts"]}
"""


def check_python_client(tools, path, url, work):
    """Make a client with openapi-python-client, and use it."""
    settings = os.path.join(work, "client.yml")
    with open(settings, "w") as file:
        file.write("project_name_override: client\npackage_name_override: aggregator_client\n")
        file.write("post_hooks: []\n")
    command = [tools + "openapi-python-client", "generate", "--path", path]
    command += ["--config", settings, "--output-path", os.path.join(work, "client")]
    is_fine, said = run(*command, cwd=work)
    # It takes JSON and forms only, and warns of each other form of a body.
    warnings = said.count("WARNING") - said.count("Unsupported content type")
    if is_fine and warnings == 0:
        program = os.path.join(work, "use.py")
        with open(program, "w") as file:
            file.write(PYTHON_CLIENT)
        is_fine, said = run(tools + "python", program, url, TOKEN, cwd=work)
    else:
        is_fine = False
    report("openapi-python-client", is_fine, said)


def check_typescript_client(path, url, work):
    """Make types with openapi-typescript, have the compiler check a use, and run it."""
    if shutil.which("npm") is None:
        skip("openapi-typescript", "there is no npm")
        return
    folder = os.path.join(work, "typescript")
    os.mkdir(folder)
    files = {
        "package.json": '{"type": "module"}',
        "tsconfig.json": TYPESCRIPT_SETTINGS,
        "use.ts": TYPESCRIPT_CLIENT,
    }
    for name, text in files.items():
        with open(os.path.join(folder, name), "w") as file:
            file.write(text)
    packages = ["openapi-typescript@7", "openapi-fetch", "typescript@5", "@types/node@20"]
    made, said = run("npm", "install", "--no-audit", "--no-fund", *packages, cwd=folder)
    if not made:
        skip("openapi-typescript", said)
        return
    steps = [
        ["npx", "openapi-typescript", path, "-o", "reference.d.ts"],
        ["npx", "tsc", "-p", "."],
        ["node", "use.js", url, TOKEN],
    ]
    for step in steps:
        is_fine, said = run(*step, cwd=folder)
        if not is_fine:
            break
    report("openapi-typescript", is_fine, said)


# ---- promtool, and everything together ----------------------------------------------


def find_promtool(work):
    """Where it is, or None and why not. It is taken out of the Debian package."""
    if shutil.which("promtool"):
        return shutil.which("promtool"), ""
    script = (
        "apt-get download -q prometheus || (apt-get update -q && apt-get download -q prometheus)"
    )
    fetched, said = run("sh", "-c", script + " && dpkg-deb -x prometheus*.deb deb", cwd=work)
    return (work + "/deb/usr/bin/promtool" if fetched else None), said


def check(url, work):
    """All checks, in an order in which none spoils another."""
    document = json.loads(get(url + "/openapi.json").decode())
    path = os.path.join(work, "openapi.json")
    with open(path, "w") as file:
        json.dump(document, file)
    packages = "openapi-spec-validator schemathesis openapi-python-client"
    script = f'"$0" -m venv venv && venv/bin/pip install -q {packages}'
    made, reason = run("sh", "-c", script, sys.executable, cwd=work)
    tools = work + "/venv/bin/"
    if made:
        report("openapi-spec-validator", *run(tools + "openapi-spec-validator", path))
        check_python_client(tools, path, url, work)
    else:
        skip(packages, reason)
    check_typescript_client(path, url, work)
    if made:
        check_with_schemathesis(tools, document, url, work)
    promtool, reason = find_promtool(work)
    if promtool is None:
        skip("promtool", reason)
    else:
        # Last, with all the topics that schemathesis has thought of.
        report("promtool", *run(promtool, "check", "metrics", input=get(url + "/metrics")))


def read_log(work):
    with open(work + "/log", encoding="utf-8") as file:
        return file.read()


def main():
    work = tempfile.mkdtemp()
    flags = ["--port=0", f"--db={work}/store.db", "--token=" + TOKEN]
    with open(work + "/log", "wb") as log:
        service = subprocess.Popen([sys.executable, PROGRAM, *flags], stderr=log)
    try:
        port = None
        while port is None and service.poll() is None:
            time.sleep(0.05)
            port = re.search("LISTENING - http://[^:]+:([0-9]+)", read_log(work))
        check("http://127.0.0.1:" + port[1], work)
        bugs = re.findall("^.*(?:a bug while|Traceback).*$", read_log(work), re.M)
        report("log of the service", not bugs, "\n".join(bugs))
        return 1 if FINDINGS else 0
    finally:
        service.terminate()
        service.wait(20)
        shutil.rmtree(work)


if __name__ == "__main__":
    sys.exit(main())
