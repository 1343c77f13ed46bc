#!/usr/bin/env python3
"""Hold a running service against its own reference, with other people's tools: promtool reads /metrics, openapi-spec-validator
reads /openapi.json, and schemathesis asks what the document allows and what it forbids. Whatever cannot be had is skipped
with a reason; the exit status is 1 if anything was found. Nothing stays on the machine.
"""
import glob
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.request

HERE = os.path.dirname(os.path.abspath(__file__))
EXAMPLES = os.environ.get("REFERENCE_EXAMPLES", "40")  # for each operation and phase


def skip(what, reason):
    print("skipped: {}: {}".format(what, (reason.strip() or "no reason given").splitlines()[-1]), flush=True)
    return True


def quiet(*command, **options):
    """Run it; (whether it succeeded, what it said)."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=900, check=False, **options)
        return done.returncode == 0, done.stdout.decode("utf-8", "replace")
    except (OSError, subprocess.TimeoutExpired) as error:
        return False, str(error)


def get(url, path):
    with urllib.request.urlopen(url + path, timeout=10) as response:
        return response.read().decode()


def promtool(work):
    """The program: installed, or out of the Debian package, which is not installed; with the reason if there is none."""
    if shutil.which("promtool"):
        return shutil.which("promtool"), ""
    fetched, said = quiet("apt-get", "download", "prometheus", cwd=work)
    if not fetched and os.geteuid() == 0:
        quiet("apt-get", "update", "-q")
        fetched, said = quiet("apt-get", "download", "prometheus", cwd=work)
    if fetched:
        fetched, said = quiet("dpkg-deb", "-x", glob.glob(work + "/*.deb")[0], work + "/deb")
    return work + "/deb/usr/bin/promtool" if fetched else None, said


def check_metrics(url, work):
    program, reason = promtool(work)
    if program is None:
        return skip("promtool", reason)
    fine, said = quiet(program, "check", "metrics", input=get(url, "/metrics").encode())
    print("promtool check metrics: {}".format(said.strip() or ("nothing found" if fine else "failed")), flush=True)
    return fine and not said.strip()


def possible(schema):
    """What JSON Schema has no words for, left out: a pattern knows no calendar and no longest age, and 1.0 is an integer. A
    cursor belongs to an order, here the default."""
    text = json.dumps(schema).replace("(?:0[1-9]|[12][0-9]|3[01])", "(?:0[1-9]|1[0-9]|2[0-8])").replace("^[ad]-", "^a-")
    text = text.replace("[0-9]{4}-", "[12][0-9]{3}-").replace("[0-9]{1,9}(?:us", "[0-9]{1,4}(?:us")
    return json.loads(text.replace('"type": ["integer", "null"]', '"enum": [null, 0, 7, 9223372036854775807]'))


# Where a rule joins two parameters, OpenAPI has no words for it, and what is made up at random would break it: so there are
# two copies of the document, with one side of each such rule. Streams without end are in neither, and NDJSON neither, for
# OpenAPI takes it for any text.
STREAM = {"follow", "after", "Last-Event-ID"}
COPIES = (({"/publish": {"topic", "source"}, "/events": STREAM | {"cursor"}}, "application/json"),
          ({"/events": STREAM | {"order"}}, "text/plain"))


def narrowed(document, left_out, body):
    copied = json.loads(json.dumps(document))
    fields, schemas = copied["components"]["schemas"]["event"]["properties"], copied["components"]["schemas"]
    fields["timestamp"], fields["sequence"] = possible(schemas["timestamp"]), possible(schemas["sequence"])
    for path, operations in copied["paths"].items():
        for operation in operations.values():
            operation["parameters"] = [possible(each) for each in operation["parameters"]
                                       if each["name"] not in left_out.get(path, ())]
    publish = copied["paths"]["/publish"]["post"]
    publish["requestBody"]["content"] = {body: publish["requestBody"]["content"][body]}
    for each in publish["parameters"]:
        each["required"] = each["name"] in ("topic", "source")
    return copied


def check_document(url, work):
    document = json.loads(get(url, "/openapi.json"))
    made, said = quiet(sys.executable, "-m", "venv", work + "/venv")
    tools = work + "/venv/bin/"
    if made:
        made, said = quiet(tools + "pip", "install", "-q", "openapi-spec-validator", "schemathesis")
    if not made:
        return skip("openapi-spec-validator and schemathesis", said)
    fine = True
    for number, each in enumerate([document] + [narrowed(document, *each) for each in COPIES]):
        path = "{}/openapi{}.json".format(work, number)
        with open(path, "w") as file:
            json.dump(each, file)
        command = [tools + "openapi-spec-validator", path] if number == 0 else [
            tools + "schemathesis", "run", path, "--url", url, "-n", EXAMPLES, "--seed", "1", "--no-color",
            "--generation-database", "none", "--generation-codec", "ascii"]
        good, said = quiet(*command, cwd=work)
        print(said if number or not good else "openapi-spec-validator: nothing found", flush=True)
        fine = fine and good
    return fine


def main():
    work = tempfile.mkdtemp()
    log = open(work + "/log", "w+")
    service = subprocess.Popen([sys.executable, os.path.join(os.path.dirname(HERE), "aggregator.py"), "--port", "0", "--db",
                                work + "/store.db"], stderr=log)
    try:
        port = None
        while port is None and service.poll() is None:
            port = re.search("LISTENING - http://127.0.0.1:([0-9]+)", open(work + "/log").read())
        url = "http://127.0.0.1:" + port[1]
        fine = check_metrics(url, work)
        fine = check_document(url, work) and fine
        fine = check_metrics(url, work) and fine  # with all the topics that schemathesis has thought of
        bugs = [line for line in open(work + "/log") if "a bug while" in line or "Traceback" in line]
        print("log of the service: {}".format("".join(bugs) or "no bug"))
        return 0 if fine and not bugs else 1
    finally:
        service.terminate()
        service.wait(20)
        log.close()
        shutil.rmtree(work)


if __name__ == "__main__":
    sys.exit(main())
