"""Every R4 invariant of severity error: by FHIRPath, or by hand where BY_HAND gives the reason."""

from datetime import date, datetime, timedelta, timezone
from functools import lru_cache

from fhirpathpy import compile as compile_expression
from fhirpathpy.engine.nodes import ResourceNode
from fhirpathpy.models import models

import narrative
from r4 import Fault

# (type, key): why the FHIRPath library does not evaluate it. None is skipped: each is checked below or where told.
BY_HAND = {
    ("Element", "ele-1"): "holds for every element; by FHIRPath it would take most of the run time",
    ("DomainResource", "dom-3"): "as() is applied to a collection, an error by the FHIRPath specification",
    ("Reference", "ref-1"): "gives no result for a Reference that has only an identifier; see references.py",
    ("Narrative", "txt-1"): "htmlChecks() is not FHIRPath; see narrative.py",
    ("Narrative", "txt-2"): "htmlChecks() is not FHIRPath; see narrative.py",
    ("Period", "per-1"): "the library compares dates as text, which is wrong across time zones",
    ("Task", "inv-1"): "the library compares dates as text, which is wrong across time zones",
    ("Range", "rng-2"): "the library cannot compare quantities",
}
URI_TYPES = frozenset(("uri", "url", "canonical"))


class Invariants:
    def __init__(self, definitions):
        self._definitions = definitions
        self._per_type = {}
        known = {(name, key) for name, key, _ in self.all()}
        if not BY_HAND.keys() <= known:
            raise ValueError(f"no such invariants: {sorted(BY_HAND.keys() - known)}")

    def all(self):
        """(type, key, expression) of every invariant in the definitions."""
        for name, entry in self._definitions.types.items():
            for key, expression, _ in entry["invariants"]:
                yield name, key, expression
            for invariants in entry.get("field_invariants", {}).values():
                yield from ((name, key, expression) for key, expression, _ in invariants)

    def check(self, nodes):
        for node in nodes:
            yield from self._element_faults(node)
            yield from self._expression_faults(node)
        yield from _unused_contained(nodes)

    def _element_faults(self, node):
        if not node.is_resource and not _has_value_or_children(node):
            yield _fault(node, "ele-1", "must have a value or children")
        if node.type == "xhtml":
            yield from (_fault(node, key, reason) for key, reason in narrative.faults(node.data))
        if node.type == "Period" and not _in_order(node.data.get("start"), node.data.get("end")):
            yield _fault(node, "per-1", "start is after end")
        if node.type == "Task" and not _in_order(node.data.get("authoredOn"), node.data.get("lastModified")):
            yield _fault(node, "inv-1", "authoredOn is after lastModified")
        if node.type == "Range" and not _range_in_order(node.data):
            yield _fault(node, "rng-2", "low is above high")

    def _expression_faults(self, node):
        if not isinstance(node.data, dict):
            return
        variables = {"resource": node.resource, "rootResource": node.root}
        for key, expression, text in self._for_type(node.type):
            try:
                # Not `evaluate`: it has no way to combine a compiled expression with the type of its context.
                context = ResourceNode.create_node(node.data, _model_path(node.type))
                result = evaluator(expression)(context, variables)
            except Exception as error:  # the library raises bare Exceptions; what cannot be judged is not passed
                yield _fault(node, key, f"cannot be evaluated: {error}")
                continue
            # "SHALL evaluate to true": an empty result is not true.
            if [getattr(item, "data", item) for item in result] != [True]:
                yield _fault(node, key, text)

    def _for_type(self, name):
        if name not in self._per_type:
            self._per_type[name] = [
                invariant
                for ancestor in self._definitions.ancestors(name)
                for invariant in self._definitions.types[ancestor]["invariants"]
                if (ancestor, invariant[0]) not in BY_HAND
            ]
        return self._per_type[name]


def _model_path(name):
    """SimpleQuantity is a profile: the library's model knows only types."""
    return "Quantity" if name == "SimpleQuantity" else name


@lru_cache(maxsize=None)
def evaluator(expression):
    functions = {"isDistinct": {"fn": _is_distinct}, "hasValue": {"fn": _has_value}}
    options = {"returnRawData": True, "traceFn": lambda *_: None, "userInvocationTable": functions}
    return compile_expression(expression, model=models["r4"], options=options)


def _is_distinct(items):
    """The library's own takes equal values for different ones when they come from different places."""
    return [all(item not in items[:i] for i, item in enumerate(items))]


def _has_value(items):
    """Missing from the library. A primitive may come with its extensions as a second, complex item."""
    return [sum(not isinstance(item, (dict, list)) for item in items) == 1]


def _fault(node, key, message):
    return Fault("invariant", node.path, f"{key}: {message}")


def _has_value_or_children(node):
    if isinstance(node.data, dict):
        return bool(node.data.keys() - {"id"})
    return node.data is not None or (isinstance(node.sibling, dict) and bool(node.sibling.keys() - {"id"}))


def _unused_contained(nodes):
    """dom-3: each contained resource is referred to, or refers to its container."""
    for node in nodes:
        if node.data is not node.root or not isinstance(node.data.get("contained"), list):
            continue
        inside = [n for n in nodes if n.root is node.root]
        used = {_target(n) for n in inside}
        back = {id(n.resource) for n in inside if _target(n) == "#"}
        for i, resource in enumerate(node.data["contained"]):
            if isinstance(resource, dict) and f"#{resource.get('id')}" not in used and id(resource) not in back:
                yield Fault("invariant", f"{node.path}.contained[{i}]", "dom-3: nothing refers to it")


def _target(node):
    if node.type == "Reference":
        return str(node.data.get("reference"))
    return str(node.data) if node.type in URI_TYPES else None


def _in_order(start, end):
    """False only when every reading of `start` is after every reading of `end` (2026 is not after 2026-05)."""
    if not isinstance(start, str) or not isinstance(end, str):
        return True
    # A date has no zone. Beside a time with zone, it may have begun 14 hours before the same date in UTC, or ended
    # 12 hours after it; two dates are taken to be of one place.
    doubt = ("T" in start) != ("T" in end)
    try:
        return _moments(start, doubt)[0] < _moments(end, doubt)[1]
    except (ValueError, OverflowError):
        return True  # not dates: the schema check names them


def _moments(text, doubt):
    """The first moment a date or dateTime may mean, and the moment after the last."""
    if "T" in text:
        moment = datetime.fromisoformat(_for_old_python(text))
        return moment, moment + timedelta(microseconds=1)
    first, after = _days(text)
    before, behind = (timedelta(hours=14), timedelta(hours=12)) if doubt else (timedelta(), timedelta())
    return _midnight(first) - before, _midnight(after) + behind


def _for_old_python(text):
    """Python before 3.11 reads neither `Z` nor a fraction that has not three or six digits."""
    clock, mark, zone = text.replace("Z", "+00:00").partition("+") if "-" not in text[10:] else text.rpartition("-")
    whole, _, fraction = clock.partition(".")
    return f"{whole}.{fraction[:6]:0<6}{mark}{zone}"


def _days(text):
    parts = [int(part) for part in text.split("-")]
    if len(parts) == 1:
        return date(parts[0], 1, 1), date(parts[0] + 1, 1, 1)
    if len(parts) == 2:
        return date(*parts, 1), date(parts[0] + parts[1] // 12, parts[1] % 12 + 1, 1)
    return date(*parts), date(*parts) + timedelta(days=1)


def _midnight(day):
    return datetime(day.year, day.month, day.day, tzinfo=timezone.utc)


def _range_in_order(data):
    low, high = data.get("low"), data.get("high")
    if not isinstance(low, dict) or not isinstance(high, dict):
        return True
    if [low.get(k) for k in ("system", "code", "unit")] != [high.get(k) for k in ("system", "code", "unit")]:
        return True  # different units: not comparable without a table of units
    try:
        return low["value"] <= high["value"]
    except (KeyError, TypeError):
        return True
