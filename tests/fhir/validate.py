#!/usr/bin/env python3
"""Validates FHIR R4 (4.0.1) JSON documents.

    python3 validate.py [--libs DIR] FILE...        `-` is standard input
    python3 validate.py [--libs DIR] --ndjson       one document a line on standard input

Prints `file: tool: path: message` for each fault. Exit code: 0 no fault, 1 faults, 2 wrong usage.
"""

import argparse
import json
import sys
from decimal import Decimal

from r4 import Definitions, Fault, walk


class Gate:
    """Schema, fhirkit, invariants and references; made once, used for many documents."""

    def __init__(self):
        # Imported late because --libs says where they are.
        import fastjsonschema
        import fhirkit
        from invariants import Invariants

        self.definitions = Definitions()
        self.invariants = Invariants(self.definitions)
        self._fhirkit = fhirkit
        self._schema_error = fastjsonschema.JsonSchemaValueException
        self._check_schema = fastjsonschema.compile(self._schema(), use_default=False)

    def _schema(self):
        """One schema for {type: resource}, so that the shared data types are compiled once."""
        return {
            "$schema": "http://json-schema.org/draft-06/schema#",
            "properties": {name: {"$ref": f"#/definitions/{name}"} for name in sorted(self.definitions.roots)},
            "definitions": self.definitions.schema,
        }

    def check(self, text):
        """All faults of one document, given as text or UTF-8 bytes."""
        try:
            document = _load(text)
        except ValueError as error:
            return [Fault("json", "", str(error))]
        except RecursionError:
            return [Fault("json", "", "is nested too deeply")]
        try:
            return self._check(text, document)
        except RecursionError:
            return [Fault("json", "", "is nested too deeply")]

    def _check(self, text, document):
        if not self.definitions.covers(document):
            kind = document.get("resourceType") if isinstance(document, dict) else type(document).__name__
            return [Fault("definitions", "", f"no definitions for {kind}")]
        nodes = list(walk(self.definitions, document))
        return [
            *self._schema_faults(nodes),
            *self._fhirkit_faults(text),
            *self.invariants.check(nodes),
            *self._reference_faults(nodes),
        ]

    def _schema_faults(self, nodes):
        # Resource by resource: nested ones would only be reported as "fits none of the alternatives".
        for node in nodes:
            if node.is_resource:
                try:
                    self._check_schema({node.type: node.data})
                except self._schema_error as error:
                    place = "".join(f"[{p}]" if p.isdigit() else f".{p}" for p in map(str, error.path[2:]))
                    yield Fault("schema", node.path + place, error.message[len(error.name):].strip())

    def _fhirkit_faults(self, text):
        try:
            issues = self._fhirkit.validate(text)
        except ValueError as error:
            return [Fault("fhirkit", "", str(error))]
        return [Fault("fhirkit", issue.path, issue.message) for issue in issues if issue.severity == "error"]

    def _reference_faults(self, nodes):
        import references

        return references.check(self.definitions, nodes, frozenset(self._fhirkit.RESOURCE_TYPES))


def _load(text):
    # Decimal keeps 72.50 apart from 72.5 and never turns a large number into infinity.
    return json.loads(text, parse_float=Decimal, parse_constant=_no_constant, object_pairs_hook=_no_duplicates)


def _no_constant(name):
    raise ValueError(f"{name} is not JSON")


def _no_duplicates(pairs):
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"repeated key {next(key for key in keys if keys.count(key) > 1)}")
    return result


def _documents(args):
    """(label, text) of each document."""
    if args.ndjson:
        for number, line in enumerate(sys.stdin.buffer, 1):
            if line.strip():
                yield f"stdin:{number}", line
    for name in args.files:
        if name == "-":
            yield "stdin", sys.stdin.buffer.read()
        else:
            with open(name, "rb") as file:
                yield name, file.read()


def _arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", metavar="FILE")
    parser.add_argument("--ndjson", action="store_true", help="read one document a line from standard input")
    parser.add_argument("--libs", metavar="DIR", help="where requirements.txt was installed")
    args = parser.parse_args()
    if bool(args.files) == args.ndjson:
        parser.error("give files, or --ndjson")
    return args


def main():
    args = _arguments()
    if args.libs:
        sys.path.insert(0, args.libs)
    gate = Gate()
    faulty = False
    try:
        for label, text in _documents(args):
            for fault in gate.check(text):
                faulty = True
                print(f"{label}: {fault.tool}: {fault.path}: {fault.message}")
    except OSError as error:
        print(f"validate.py: {error}", file=sys.stderr)
        return 2
    return 1 if faulty else 0


if __name__ == "__main__":
    sys.exit(main())
