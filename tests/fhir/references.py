"""References: local ones resolve, and all whose target type can be known point at an allowed one (and ref-1)."""

import re

from r4 import Fault

# A relative or absolute RESTful reference, with or without a version (R4 references.html#literal).
RESTFUL = re.compile(r"(?:^|/)([A-Z][A-Za-z]+)/[A-Za-z0-9\-.]{1,64}(?:/_history/[A-Za-z0-9\-.]{1,64})?(?:#.*)?$")


def check(definitions, nodes, resource_types):
    bundled = _bundled_types(nodes)
    for node in nodes:
        if node.type == "Reference":
            yield from _reference_faults(definitions, node, bundled, resource_types)
        if node.data is node.root and "contained" in node.data:
            yield from _contained_id_faults(node)


def _reference_faults(definitions, node, bundled, resource_types):
    reference, declared = node.data.get("reference"), node.data.get("type")
    target = declared
    if isinstance(reference, str):
        if reference.startswith("#"):
            target = _contained_type(node, reference)
            if target is None:
                yield Fault("invariant", node.path, f"ref-1: nothing is contained as {reference}")
                return
        elif reference in bundled:
            target = bundled[reference]
        elif reference.startswith("urn:uuid:") and bundled:
            # Nothing outside the Bundle can resolve such a name.
            yield Fault("reference", node.path, f"no entry has the fullUrl {reference}")
            return
        else:
            match = RESTFUL.search(reference)
            target = match.group(1) if match and match.group(1) in resource_types else declared
    if declared is not None and target != declared:
        yield Fault("reference", node.path, f"type says {declared} but the target is {target}")
    allowed = definitions.allowed_targets(node)
    if target is not None and allowed is not None and target not in allowed:
        yield Fault("reference", node.path, f"points at {target}, allowed: {', '.join(allowed)}")


def _contained_type(node, reference):
    if reference == "#":  # from a contained resource to its container
        return node.root["resourceType"] if node.resource is not node.root else None
    for resource in _contained(node.root):
        if resource.get("id") == reference[1:]:
            return resource.get("resourceType")
    return None


def _contained(root):
    contained = root.get("contained")
    return [item for item in contained if isinstance(item, dict)] if isinstance(contained, list) else []


def _contained_id_faults(node):
    seen = set()
    for i, resource in enumerate(_contained(node.data)):
        name = resource.get("id")
        if name is None:
            yield Fault("reference", f"{node.path}.contained[{i}]", "has no id, so nothing can refer to it")
        elif str(name) in seen:
            yield Fault("reference", f"{node.path}.contained[{i}]", f"repeats the id {name}")
        seen.add(str(name))


def _bundled_types(nodes):
    return {
        node.data["fullUrl"]: node.data["resource"].get("resourceType")
        for node in nodes
        if node.type == "Bundle.entry"
        and isinstance(node.data.get("fullUrl"), str)
        and isinstance(node.data.get("resource"), dict)
    }
