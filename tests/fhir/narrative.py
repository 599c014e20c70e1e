"""R4's htmlChecks(): what a narrative may hold (invariants txt-1 and txt-2)."""

import re
from xml.etree import ElementTree

XHTML = "{http://www.w3.org/1999/xhtml}"

# HTML 4.0 chapters 7-11 (without section 9.4, insertions and deletions) and 15, plus <a> and <img>.
TAGS = frozenset(
    """div p br h1 h2 h3 h4 h5 h6 address bdo span em strong dfn code samp kbd var cite abbr acronym blockquote q
    sub sup pre ul ol li dl dt dd table caption thead tfoot tbody colgroup col tr th td a img map area
    tt i b big small hr""".split()
)
ATTRIBUTES = frozenset(
    """id class title style lang dir {http://www.w3.org/XML/1998/namespace}lang href name src alt border cite datetime
    span width height align valign char charoff abbr axis headers scope rowspan colspan summary frame rules
    cellspacing cellpadding start type value compact shape coords usemap nohref accesskey tabindex""".split()
)
SAFE_LINK = re.compile(r"(https?|mailto|tel|urn):|data:image/|[^:]*$", re.IGNORECASE)
UNSAFE_STYLE = re.compile(r"url\s*\(|expression\s*\(|@import|javascript:", re.IGNORECASE)


def faults(div):
    """Yields (invariant key, reason)."""
    if not isinstance(div, str) or "<!" in div.replace("<!--", "") or "<?" in div:
        yield "txt-1", "must be a string without document type or processing instruction"
        return
    try:
        root = ElementTree.fromstring(div)
    except ElementTree.ParseError as error:
        yield "txt-1", f"is not well-formed XML: {error}"
        return
    if root.tag != XHTML + "div":
        yield "txt-1", "root must be <div> in the XHTML namespace"
    for element in root.iter():
        yield from _element_faults(element)
    if not "".join(root.itertext()).strip() and root.find(f".//{XHTML}img") is None:
        yield "txt-2", "has no visible content"


def _element_faults(element):
    tag = element.tag[len(XHTML):] if element.tag.startswith(XHTML) else None
    if tag not in TAGS:
        yield "txt-1", f"tag {element.tag} is not allowed"
    for name, value in element.attrib.items():
        if name not in ATTRIBUTES:
            yield "txt-1", f"attribute {name} is not allowed"
        elif name in ("href", "src", "cite", "usemap") and not SAFE_LINK.match(value.strip()):
            yield "txt-1", f"{name} has a scheme that is not allowed"
        elif name == "style" and UNSAFE_STYLE.search(value):
            yield "txt-1", "style refers outside the narrative"
