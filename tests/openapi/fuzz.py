#!/usr/bin/env python3
"""Sends what /openapi.json describes, and what it does not, to a running service: schemathesis with what it has to know.

    python3 fuzz.py --libs DIR URL CA [OPTION...] < known.json

Standard input is {"client": token, "auditor": token, "ids": {path: [id...]}}: who calls, and what there is. Options go to
`schemathesis run`. The last line of standard output is {"GET /path": number...}: how often each operation was called. Exit
code: 0 when no check failed.
"""

import argparse
import ast
import contextlib
import json
import random
import sys
import threading
from collections import Counter

CHECKS = [
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "missing_required_header",
    "unsupported_method",
    "allow_header_conformance",
    "ignored_auth",
    "use_after_free",
]


PARSE, ALONE = ast.parse, threading.RLock()


def parse_again(*arguments, **named):
    """ast.parse, by one thread at a time and again, as CPython 3.11 counts the depth of all together (python/cpython#106905)."""
    with ALONE:
        for _ in range(9):
            with contextlib.suppress(SystemError):
                return PARSE(*arguments, **named)
        return PARSE(*arguments, **named)


ast.parse = parse_again


def prepare(schemathesis, known, called):
    """What the description does not say: how lines are written, who calls what, and what there is to find."""

    @schemathesis.serializer("application/x-ndjson", "application/fhir+ndjson")
    def lines(_context, value):
        return value.encode() if isinstance(value, str) else json.dumps(value).encode()

    def caller(case):
        return "auditor" if "/AuditEvent" in case.operation.path else "client"

    @schemathesis.auth(cache_by_key=lambda case, _context: caller(case))
    class Token:
        def get(self, case, _context):
            return known[caller(case)]

        def set(self, case, token, _context):
            case.headers["Authorization"] = f"Bearer {token}"

    @schemathesis.hook
    def before_call(_context, case, _kwargs):
        called[case.operation.label] += 1

    # As reproducible as the rest of the run, which has a seed of its own.
    choice = random.Random(1)

    @schemathesis.hook
    def map_path_parameters(context, values):
        ids = known["ids"].get(context.operation.path)
        if ids and values and choice.random() < 0.5:
            return {name: choice.choice(ids) for name in values}
        return values

    @schemathesis.hook
    def map_body(context, body):
        # Chance makes no images: every other request has the one of the description.
        schemas = context.operation.schema.raw_schema["components"]["schemas"]
        name = body.get("resourceType") if isinstance(body, dict) else None
        examples = schemas.get(name, {}).get("examples") if isinstance(name, str) else None
        return examples[0] if examples and choice.random() < 0.5 else body


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--libs", required=True)
    parser.add_argument("url")
    parser.add_argument("ca")
    args, options = parser.parse_known_args()
    sys.path.insert(0, args.libs)
    import schemathesis
    from schemathesis.cli import schemathesis as run

    called = Counter()
    prepare(schemathesis, json.load(sys.stdin), called)
    try:
        run(
            ["run", f"{args.url}/openapi.json", "--tls-verify", args.ca, "--checks", ",".join(CHECKS)]
            + ["--generation-database", "none", "--continue-on-failure", "--no-color", *options]
        )
    finally:
        print(json.dumps(called))


if __name__ == "__main__":
    main()
