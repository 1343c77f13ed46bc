#!/usr/bin/env python3
"""Hold a running service against its own reference, with other people's tools: promtool reads /metrics, openapi-spec-validator
reads /openapi.json, and schemathesis asks for all that the document allows and forbids. What cannot be had is skipped with a
reason. Exit status 1 if anything was found. Nothing stays on the machine. REFERENCE_EXAMPLES: how many for each operation.
"""
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.request

PROGRAM = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "aggregator.py")
TOKEN = "only-for-this-check"  # with one, schemathesis also looks for answers to those who have none
HEADER = {"Authorization": "Bearer " + TOKEN}


def run(*command, **options):
    """Whether it succeeded, and what it said."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=900, check=False, **options)
    return done.returncode == 0, done.stdout.decode("utf-8", "replace").strip()


def report(what, fine, said):
    brief = re.search(".* generated, .*", said)
    print("{}: {}".format(what, said if not fine else brief[0].strip() if brief else "nothing found"), flush=True)
    return fine


def get(url):
    with urllib.request.urlopen(urllib.request.Request(url, headers=HEADER), timeout=10) as response:
        return response.read()


def promtool(work):
    """Where it is, if not installed then taken out of the Debian package; or (None, why not)."""
    if shutil.which("promtool"):
        return shutil.which("promtool"), ""
    script = "apt-get download -q prometheus || (apt-get update -q && apt-get download -q prometheus)"
    fetched, said = run("sh", "-c", script + " && dpkg-deb -x prometheus*.deb deb", cwd=work)
    return (work + "/deb/usr/bin/promtool" if fetched else None), said


# Where a rule joins two parameters, OpenAPI has no words for it, and what is made up at random would break it: so there are
# two copies of the document, each with one side of such a rule. In neither are streams, which never end, and NDJSON, which
# OpenAPI takes for any text.
STREAM = {"follow", "after", "Last-Event-ID"}
COPIES = (({"/publish": {"topic", "source", "Idempotency-Key"}, "/events": STREAM | {"cursor"}}, "application/json"),
          ({"/events": STREAM | {"order"}}, "text/plain"))


def possible(schema):
    """Without what JSON Schema cannot forbid: days that the calendar lacks, the longest age, 1.0 as an integer, a cursor of
    the other order."""
    text = json.dumps(schema).replace("(?:0[1-9]|[12][0-9]|3[01])", "(?:0[1-9]|1[0-9]|2[0-8])").replace("^[ad]-", "^a-")
    text = text.replace("[0-9]{4}-", "[12][0-9]{3}-").replace("[0-9]{1,9}(?:us", "[0-9]{1,4}(?:us")
    return json.loads(text.replace('"type": ["integer", "null"]', '"enum": [null, 0, 7, 9223372036854775807]'))


def narrowed(document, left_out, body):
    copied = json.loads(json.dumps(document))
    schemas = copied["components"]["schemas"]
    schemas["event"]["properties"].update({name: possible(schemas[name]) for name in ("timestamp", "sequence")})
    for path, operations in copied["paths"].items():
        for operation in operations.values():
            operation["parameters"] = [possible(each) for each in operation["parameters"]
                                       if each["name"] not in left_out.get(path, ())]
    publish = copied["paths"]["/publish"]["post"]
    publish["requestBody"]["content"] = {body: publish["requestBody"]["content"][body]}
    for each in publish["parameters"]:
        each["required"] = each["name"] in ("topic", "source")
    copied["security"] = [{"bearer": []}]  # optional in general, and not here
    return copied


def check(url, work):
    program, reason = promtool(work)
    if program is None:
        print("skipped: promtool: " + reason[-200:])
    tools, document = work + "/venv/bin/", json.loads(get(url + "/openapi.json").decode())
    made, reason = run("sh", "-c", '"$0" -m venv venv && venv/bin/pip install -q openapi-spec-validator schemathesis',
                       sys.executable, cwd=work)
    if not made:
        print("skipped: openapi-spec-validator and schemathesis: " + reason[-200:])
    fine = True
    for number, each in enumerate([document] + [narrowed(document, *each) for each in COPIES] if made else []):
        path = f"{work}/openapi{number}.json"
        with open(path, "w") as file:
            json.dump(each, file)
        fine = (report("schemathesis", *run(
            tools + "schemathesis", "run", path, "--url", url, "-H", "Authorization: " + HEADER["Authorization"], "-n",
            os.environ.get("REFERENCE_EXAMPLES", "40"), "--seed", "1", "--no-color", "--generation-database", "none", cwd=work))
            if number else report("openapi-spec-validator", *run(tools + "openapi-spec-validator", path))) and fine
    if program is not None:  # last, with all the topics that schemathesis has thought of
        fine = report("promtool", *run(program, "check", "metrics", input=get(url + "/metrics"))) and fine
    return fine


def main():
    work = tempfile.mkdtemp()
    with open(work + "/log", "wb") as log:
        service = subprocess.Popen([sys.executable, PROGRAM, "--port=0", f"--db={work}/store.db", "--token=" + TOKEN], stderr=log)
    try:
        port = None
        while port is None and service.poll() is None:
            port = re.search(rb"LISTENING - http://[^:]+:([0-9]+)", open(work + "/log", "rb").read())
        fine = check("http://127.0.0.1:" + port[1].decode(), work)
        bugs = re.findall("^.*(?:a bug while|Traceback).*$", open(work + "/log", encoding="utf-8").read(), re.M)
        return 0 if report("log of the service", not bugs, "\n".join(bugs)) and fine else 1
    finally:
        service.terminate()
        service.wait(20)
        shutil.rmtree(work)


if __name__ == "__main__":
    sys.exit(main())
