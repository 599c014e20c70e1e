"""The R4 definitions and a walk that tells, for every element of a document, its type and its place."""

import json
from pathlib import Path
from typing import Any, NamedTuple, Optional

DEFINITIONS = Path(__file__).with_name("definitions.json")


class Fault(NamedTuple):
    tool: str
    path: str
    message: str


class Node(NamedTuple):
    """One element. `resource` and `root` are FHIRPath's %resource and %rootResource."""

    data: Any  # None for a primitive that has only extensions
    type: str  # e.g. "Quantity", "Observation.component", "code"
    path: str  # where it is, for people: "DiagnosticReport.contained[3].status"
    owner: Optional[str]  # type of the parent element
    field: str  # name in the parent element
    resource: dict
    root: dict
    sibling: Any = None  # `_field` beside a primitive

    @property
    def is_resource(self):
        return self.data is self.resource


class Definitions:
    def __init__(self):
        content = json.loads(DEFINITIONS.read_text("utf-8"))
        self.roots = frozenset(content["roots"])
        self.types = content["types"]
        self.schema = content["schema"]

    def ancestors(self, name):
        while name:
            yield name
            name = self.types[name]["base"]

    def is_primitive(self, name):
        return self.types[name]["kind"] == "primitive-type"

    def is_nested_resource(self, name):
        return name == "Resource"

    def covers(self, data):
        kind = data.get("resourceType") if isinstance(data, dict) else None
        return isinstance(kind, str) and kind in self.roots

    def allowed_targets(self, node):
        """Resource types a Reference may point at; None when any will do."""
        targets = self.types[node.owner].get("targets", {}).get(node.field) if node.owner else None
        return None if targets is None or "Resource" in targets else targets


def walk(definitions, document):
    """Every element, parents first. What the definitions do not know is left out: the schema check names it."""
    yield from _walk_resource(definitions, document, document["resourceType"], None)


def _walk_resource(definitions, data, path, root):
    node = Node(data, data["resourceType"], path, None, "", data, data if root is None else root)
    yield node
    yield from _walk_fields(definitions, node)


def _walk_fields(definitions, parent):
    fields = definitions.types[parent.type]["fields"]
    for name in dict.fromkeys(key[1:] if key.startswith("_") else key for key in parent.data):
        if name not in fields:
            continue
        if definitions.is_primitive(fields[name]):
            yield from _walk_primitives(definitions, parent, name, fields[name])
        else:
            for path, value in _items(f"{parent.path}.{name}", parent.data.get(name)):
                yield from _walk_value(definitions, parent, name, path, value)


def _walk_value(definitions, parent, name, path, value):
    field_type = definitions.types[parent.type]["fields"][name]
    if definitions.is_nested_resource(field_type):
        if definitions.covers(value):
            # Only `contained` shares the root: a Bundle's entries stand on their own.
            yield from _walk_resource(definitions, value, path, parent.root if name == "contained" else None)
    elif isinstance(value, dict):
        node = Node(value, field_type, path, parent.type, name, parent.resource, parent.root)
        yield node
        yield from _walk_fields(definitions, node)


def _walk_primitives(definitions, parent, name, field_type):
    values = list(_items(f"{parent.path}.{name}", parent.data.get(name)))
    siblings = [value for _, value in _items("", parent.data.get("_" + name))]
    for i in range(max(len(values), len(siblings))):
        path, value = values[i] if i < len(values) else (f"{parent.path}._{name}", None)
        sibling = siblings[i] if i < len(siblings) else None
        yield Node(value, field_type, path, parent.type, name, parent.resource, parent.root, sibling)
        if isinstance(sibling, dict):
            element = Node(sibling, "Element", path, parent.type, name, parent.resource, parent.root)
            yield from _walk_fields(definitions, element)


def _items(path, value):
    if isinstance(value, list):
        yield from ((f"{path}[{i}]", item) for i, item in enumerate(value))
    elif value is not None:
        yield path, value
