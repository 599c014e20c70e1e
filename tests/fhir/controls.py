#!/usr/bin/env python3
"""Proves that the gate can fail: valid examples pass, and each known fault is found.

    python3 controls.py [--libs DIR]

Three tables: faults planted in examples/report.json (FAULTS), the same for narratives (NARRATIVES), and
invariant_cases.json with rows [type, key, faulty element, sound element] for every invariant.
"""

import argparse
import copy
import json
import sys
from decimal import Decimal
from pathlib import Path

from r4 import Node
from validate import Gate

HERE = Path(__file__).parent
XHTML = 'xmlns="http://www.w3.org/1999/xhtml"'


def inside(report, name):
    return next(resource for resource in report["contained"] if resource["id"] == name)


def vendor_block(report):
    report["performanceIndicator"] = {"entropy": 0.56}


def instant_without_zone(report):
    report["issued"] = "2026-02-13T14:58:27.466"


def identifier_not_array(report):
    report["identifier"] = report["identifier"][0]


def conclusion_array(report):
    report["conclusion"] = [report["conclusion"]]


def unknown_status(report):
    report["status"] = "finished"


def reference_to_nothing(report):
    report["result"][0]["reference"] = "#nothing"


def contained_unused(report):
    report["contained"].append({"resourceType": "Device", "id": "spare"})


def value_and_absent_reason(report):
    inside(report, "quality-1")["dataAbsentReason"] = {"text": "error"}


def data_without_content_type(report):
    del inside(report, "heatmap-1-mel")["content"]["contentType"]


def label_inside_contained(report):
    inside(report, "quality-1")["meta"] = {"security": report["meta"]["security"]}


def observation_without_code(report):
    del inside(report, "quality-1")["code"]


def extra_key_in_coding(report):
    report["code"]["coding"][0]["probability"] = 0.5


def data_uri_as_base64(report):
    content = inside(report, "heatmap-1-mel")["content"]
    content["data"] = "data:image/png;base64," + content["data"]


def extension_with_value_and_children(report):
    inside(report, "extent-1")["extension"][0]["valueString"] = "polyline"


def component_value_decimal(report):
    component = inside(report, "quality-1")["component"][0]
    for name in [name for name in component if name.startswith("value")]:
        del component[name]
    component["valueDecimal"] = 0.5


def script_in_narrative(report):
    report["text"]["div"] = f"<div {XHTML}><p>Result</p><script>alert(1)</script></div>"


def result_is_media(report):
    report["result"][0]["reference"] = "#image-1"


def empty_array(report):
    report["category"] = []


# What must find each, so that a tool that has gone silent is noticed even when another one still sees the fault.
FAULTS = {
    vendor_block: {"fhirkit", "schema"},
    instant_without_zone: {"fhirkit", "schema"},
    identifier_not_array: {"fhirkit", "schema"},
    conclusion_array: {"fhirkit", "schema"},
    unknown_status: {"schema"},
    reference_to_nothing: {"invariant"},
    contained_unused: {"invariant"},
    value_and_absent_reason: {"invariant"},
    data_without_content_type: {"invariant"},
    label_inside_contained: {"invariant"},
    observation_without_code: {"fhirkit", "schema"},
    extra_key_in_coding: {"fhirkit", "schema"},
    data_uri_as_base64: {"fhirkit"},
    extension_with_value_and_children: {"invariant"},
    component_value_decimal: {"fhirkit", "schema"},
    script_in_narrative: {"invariant"},
    result_is_media: {"reference"},
    empty_array: {"fhirkit"},
}

NARRATIVES = {
    "event handler": f'<div {XHTML}><p onclick="f()">x</p></div>',
    "script link": f'<div {XHTML}><a href="javascript:f()">x</a></div>',
    "frame": f'<div {XHTML}><iframe src="https://example.org"/></div>',
    "form": f"<div {XHTML}><form>x</form></div>",
    "style sheet": f"<div {XHTML}><style>p</style>x</div>",
    "style fetches": f'<div {XHTML}><p style="background: url(https://example.org)">x</p></div>',
    "no namespace": "<div><p>x</p></div>",
    "not a div": f"<p {XHTML}>x</p>",
    "empty": f"<div {XHTML}> <p/> </div>",
    "not closed": f"<div {XHTML}><p>x</div>",
    "entity of HTML": f"<div {XHTML}>&nbsp;x</div>",
    "document type": f'<!DOCTYPE div [<!ENTITY a "x">]><div {XHTML}>&a;</div>',
}


def decode(text):
    return json.loads(text, parse_float=Decimal)


def check_examples(gate):
    for path in sorted((HERE / "examples").glob("*.json")):
        faults = gate.check(path.read_bytes())
        yield not faults, f"{path.name} accepted", "; ".join(map(str, faults))


def check_faults(gate, report):
    for number, (plant, expected) in enumerate(FAULTS.items(), 1):
        faulty = copy.deepcopy(report)
        plant(faulty)
        tools = {fault.tool for fault in gate.check(json.dumps(faulty))}
        yield expected <= tools, f"{number:02} {plant.__name__.replace('_', ' ')}", ", ".join(sorted(tools))


def check_narratives(gate, report):
    for name, div in NARRATIVES.items():
        faulty = copy.deepcopy(report)
        faulty["text"]["div"] = div
        found = any(fault.message.startswith("txt-") for fault in gate.check(json.dumps(faulty)))
        yield found, f"narrative: {name}", ""


def found_keys(gate, type_name, element):
    """Keys of the invariants that one element breaks, taken on its own."""
    if gate.definitions.types[type_name]["kind"] == "resource":
        element = {"resourceType": type_name, **element}
    resource = element if "resourceType" in element else {}
    node = Node(element, type_name, type_name, None, "", resource, resource)
    faults = list(gate.invariants.check([node]))
    broken = [fault for fault in faults if "cannot be evaluated" in fault.message]
    return {fault.message.split(":")[0] for fault in faults}, broken


def check_invariants(gate):
    cases = decode((HERE / "invariant_cases.json").read_text("utf-8"))
    for type_name, key, faulty, sound in cases:
        hit, broken = found_keys(gate, type_name, faulty)
        missed, broken_too = found_keys(gate, type_name, sound)
        fine = key in hit and key not in missed and not broken and not broken_too
        yield fine, f"{type_name} {key}", "; ".join(map(str, broken + broken_too))
    # These need a whole document: contained_unused, reference_to_nothing and NARRATIVES are their cases.
    covered = {key for _, key, _, _ in cases} | {"dom-3", "ref-1", "txt-1", "txt-2"}
    untested = sorted({key for _, key, _ in gate.invariants.all()} - covered)
    yield not untested, "every invariant has a case", " ".join(untested)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--libs", metavar="DIR", help="where requirements.txt was installed")
    args = parser.parse_args()
    if args.libs:
        sys.path.insert(0, args.libs)
    gate = Gate()
    report = json.loads((HERE / "examples" / "report.json").read_text("utf-8"))
    shown = [*check_examples(gate), *check_faults(gate, report), *check_narratives(gate, report)]
    for fine, name, detail in shown:
        print(f"{'ok  ' if fine else 'FAIL'}  {name:<42}{detail}".rstrip())
    invariants = list(check_invariants(gate))
    failed = [row for row in invariants if not row[0]]
    for _, name, detail in failed:
        print(f"FAIL  {name:<42}{detail}".rstrip())
    print(f"{'FAIL' if failed else 'ok  '}  {len(invariants)} invariant cases")
    return 0 if all(row[0] for row in shown + invariants) else 1


if __name__ == "__main__":
    sys.exit(main())
