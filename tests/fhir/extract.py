#!/usr/bin/env python3
"""Makes definitions.json from HL7's FHIR R4 (4.0.1) definitions.

    python3 extract.py --profiles DIR --schema FILE > definitions.json

DIR holds `profiles-resources.json` and `profiles-types.json`, FILE is `fhir.schema.json`; README.md says where
they come from. The output keeps only what is reachable from ROOTS and no prose but the text of the invariants.
"""

import argparse
import json
import sys
from pathlib import Path

# What Dermflow emits or accepts. A document with any other resource type is refused, so extend this first.
ROOTS = """DiagnosticReport Observation Media Device OperationOutcome Parameters Bundle CapabilityStatement
    OperationDefinition Task AuditEvent Provenance Subscription CodeSystem ValueSet ConceptMap Binary""".split()

NESTED_RESOURCE = {"type": "object", "required": ["resourceType"], "properties": {"resourceType": {"enum": ROOTS}}}


def load_structures(folder):
    structures = {}
    for name in ("profiles-resources.json", "profiles-types.json"):
        for entry in json.loads((folder / name).read_text("utf-8"))["entry"]:
            resource = entry["resource"]
            if resource["resourceType"] == "StructureDefinition":
                structures[resource["id"]] = resource
    return structures


def last_segment(url):
    return url.rsplit("/", 1)[-1]


def type_name(type_ref, structures):
    """The type of an element; a profile such as SimpleQuantity counts as a type because it adds invariants."""
    profile = last_segment(type_ref["profile"][0]) if type_ref.get("profile") else None
    if profile in structures:
        return profile
    # `id`, `Extension.url` and the value of a primitive have a FHIRPath system type: plain JSON, never an object.
    return "string" if type_ref["code"].startswith("http://hl7.org/fhirpath/") else type_ref["code"]


def field_names(element):
    """(JSON name, type reference) for each type of an element: `value[x]` becomes valueString, valueQuantity …"""
    name = element["path"].rsplit(".", 1)[1]
    for type_ref in element.get("type", []):
        code = type_ref["code"]
        yield (name.replace("[x]", code[0].upper() + code[1:]), type_ref)


def is_backbone(element):
    return element.get("type", [{}])[0].get("code") in ("BackboneElement", "Element")


def invariants_of(element):
    return [
        [constraint["key"], constraint["expression"], constraint["human"]]
        for constraint in element.get("constraint", [])
        if constraint["severity"] == "error"
    ]


def add_field(types, owner, element, structures):
    if "contentReference" in element:
        name = element["path"].rsplit(".", 1)[1]
        types[owner]["fields"][name] = element["contentReference"].lstrip("#")
        return
    for name, type_ref in field_names(element):
        types[owner]["fields"][name] = element["path"] if is_backbone(element) else type_name(type_ref, structures)
        targets = sorted(last_segment(url) for url in type_ref.get("targetProfile", []))
        if type_ref["code"] == "Reference" and targets and targets != ["Resource"]:
            types[owner].setdefault("targets", {})[name] = targets
    if not is_backbone(element):
        types[owner].setdefault("field_invariants", {})[element["path"].rsplit(".", 1)[1]] = invariants_of(element)


def read_structure(structure, types, structures):
    root, *elements = structure["snapshot"]["element"]
    name, path = structure["id"], root["path"]
    base = last_segment(structure.get("baseDefinition", "")) or None
    types[name] = {"kind": structure["kind"], "base": base, "fields": {}, "invariants": invariants_of(root)}
    for element in elements:
        here = name + element["path"][len(path):]
        element = {**element, "path": here}
        add_field(types, here.rsplit(".", 1)[0], element, structures)
        if is_backbone(element):
            base = element["type"][0]["code"]
            types[here] = {"kind": "backbone", "base": base, "fields": {}, "invariants": invariants_of(element)}


def reachable_types(structures):
    types, todo = {}, [*ROOTS, "DomainResource", "Element", "BackboneElement"]
    while todo:
        name = todo.pop()
        if name in types or name not in structures:
            continue
        read_structure(structures[name], types, structures)
        owned = [entry for path, entry in types.items() if path == name or path.startswith(name + ".")]
        todo += [field_type for entry in owned for field_type in entry["fields"].values()]
        todo += [entry["base"] for entry in owned if entry["base"]]
    return types


def ancestors(name, types):
    while name:
        yield name
        name = types[name]["base"]


def drop_inherited(types):
    """Snapshots repeat every inherited invariant; keep each only where it is introduced."""
    own = {name: list(entry["invariants"]) for name, entry in types.items()}

    def known(name):
        return [invariant[:2] for ancestor in ancestors(name, types) for invariant in own[ancestor]]

    for name, entry in types.items():
        inherited = known(entry["base"]) if entry["base"] else []
        entry["invariants"] = [i for i in own[name] if i[:2] not in inherited]
        fields = entry.pop("field_invariants", {})
        for field, invariants in fields.items():
            covered = [i for t in field_types(entry, field) for i in known(t)]
            extra = [i for i in invariants if i[:2] not in covered]
            if extra:
                entry.setdefault("field_invariants", {})[field] = extra


def field_types(entry, field):
    stem = field.replace("[x]", "")
    return {t for name, t in entry["fields"].items() if name == field or (stem != field and name.startswith(stem))}


def references(node):
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "$ref":
                yield last_segment(value)
            else:
                yield from references(value)
    elif isinstance(node, list):
        for value in node:
            yield from references(value)


def without_prose(node):
    if isinstance(node, dict):
        return {k: without_prose(v) for k, v in node.items() if not (k == "description" and isinstance(v, str))}
    return [without_prose(value) for value in node] if isinstance(node, list) else node


def schema_part(schema):
    definitions, todo = {"ResourceList": NESTED_RESOURCE}, list(ROOTS)
    while todo:
        name = todo.pop()
        if name not in definitions:
            definitions[name] = without_prose(schema["definitions"][name])
            todo += references(definitions[name])
    # The schema published with 4.0.1 forgot its own version.
    versions = definitions["CapabilityStatement"]["properties"]["fhirVersion"]["enum"]
    if "4.0.1" not in versions:
        versions.append("4.0.1")
    return definitions


def one_line_each(table):
    rows = (f"{json.dumps(key)}: {json.dumps(table[key], ensure_ascii=False, sort_keys=True)}" for key in sorted(table))
    return "{\n" + ",\n".join(rows) + "\n}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profiles", type=Path, required=True)
    parser.add_argument("--schema", type=Path, required=True)
    args = parser.parse_args()
    types = reachable_types(load_structures(args.profiles))
    drop_inherited(types)
    schema = schema_part(json.loads(args.schema.read_text("utf-8")))
    sys.stdout.reconfigure(encoding="utf-8")
    print(f'{{"fhirVersion": "4.0.1",\n"roots": {json.dumps(ROOTS)},\n"types": {one_line_each(types)},')
    print(f'"schema": {one_line_each(schema)}}}')


if __name__ == "__main__":
    main()
