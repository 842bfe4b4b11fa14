"""A study's text as plain values: YAML of bounded size and depth, without tags, dates or code."""

from __future__ import annotations

from typing import Any

import yaml

LONGEST_TEXT = 100_000
"""Characters of a study file: the reader takes a second for some ten times as many."""
_MOST_VALUES = 10_000
"""Values of a study, each alias counted as what it stands for."""
_DEEPEST = 32
_LONGEST_NUMBER = 40
"""Characters of a number: more digits than any field has, and few enough for every integer to have a decimal form."""
_LARGEST = 2**63
"""No field holds an integer beyond 64 bits, and some of what reads them cannot."""
_PREFIX = "tag:yaml.org,2002:"


class UnreadableError(ValueError):
    """A text that is no study: what is wrong and, where that is known, on which line."""


def read_plain(text: str) -> Any:
    """Text to dicts with text keys, lists, texts, numbers, truth values and None; `UnreadableError` says what is wrong.

    What an alias refers to is copied, so that a change in one place does not reach another.
    """
    if len(text) > LONGEST_TEXT:
        raise UnreadableError(f"longer than the {LONGEST_TEXT:,} characters that a study may have")
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return None if node is None else loader.plain(node)
    except yaml.YAMLError as error:
        raise UnreadableError(str(error)) from None
    except (ValueError, OverflowError):  # of PyYAML's own scanner: a character or a version that there is not
        raise UnreadableError("an escape or a directive in it has a number that is too large") from None


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, which would let a key that stands twice quietly replace the first.

    It is also without bounds: few lines can stand for billions of values, or for a value inside itself.
    """

    # a date, and a lone `=`, are the texts they are
    yaml_implicit_resolvers = {  # noqa: RUF012 - PyYAML's own attribute
        first: [(tag, form) for tag, form in forms if tag not in (f"{_PREFIX}timestamp", f"{_PREFIX}value")]
        for first, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._level, self._count = 0, 0
        self._measured: dict[yaml.Node, tuple[int, int]] = {}
        """Size and depth of each node that is complete, aliases counted as what they stand for."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        """The next node, refused where it has a tag or exceeds a bound."""
        event = self.peek_event()
        is_alias = self.check_event(yaml.AliasEvent)
        if getattr(event, "tag", None) is not None:
            raise _fault(f"the tag {event.tag!r} is not read; write the plain value", event)
        self._level, self._count = self._level + 1, self._count + 1
        self._require(self._count, self._level, event)
        node = super().compose_node(parent, index)
        assert node is not None
        self._level -= 1
        if is_alias and node not in self._measured:
            raise _fault("an alias is inside the value that it refers to", event)
        if not is_alias:
            self._measured[node] = self._measure(node, event)
        return node

    def _measure(self, node: yaml.Node, event: yaml.Event) -> tuple[int, int]:
        children = node.value if isinstance(node, yaml.CollectionNode) else []
        if isinstance(node, yaml.MappingNode):
            _require_keys(node)
            children = [part for pair in children for part in pair]
        size = 1 + sum(self._measured[child][0] for child in children)
        depth = 1 + max((self._measured[child][1] for child in children), default=0)
        self._require(size, depth, event)
        return size, depth

    def _require(self, size: int, depth: int, event: yaml.Event) -> None:
        if size > _MOST_VALUES:
            raise _fault(f"more than the {_MOST_VALUES:,} values that a study may have", event)
        if depth > _DEEPEST:
            raise _fault(f"nested more deeply than {_DEEPEST} levels", event)

    def plain(self, node: yaml.Node) -> Any:
        """The node's value."""
        if isinstance(node, yaml.MappingNode):
            self.flatten_mapping(node)
            return {key.value: self.plain(value) for key, value in node.value}
        if isinstance(node, yaml.SequenceNode):
            return [self.plain(value) for value in node.value]
        if node.tag in (f"{_PREFIX}int", f"{_PREFIX}float"):
            return self._number(node)
        return self.construct_object(node)

    def _number(self, node: yaml.Node) -> int | float:
        shown = f"{node.value[:_LONGEST_NUMBER]}{'…' if len(node.value) > _LONGEST_NUMBER else ''}"
        if len(node.value) <= _LONGEST_NUMBER:
            try:
                number: int | float = self.construct_object(node)
            except (ValueError, OverflowError):  # as `0b_`, which YAML's form allows
                raise _fault(f"{shown} is not a number; quote it if it is text", node) from None
            if isinstance(number, float) or abs(number) < _LARGEST:
                return number
        raise _fault(f"the number {shown} is larger than any field holds; quote it if it is text", node)


def _require_keys(node: yaml.MappingNode) -> None:
    seen = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise _fault("a key must be text", key)
        if key.tag != f"{_PREFIX}merge":
            if key.value in seen:
                raise _fault(f"{key.value[:80]} twice", key)
            seen.add(key.value)


def _fault(message: str, place: Any) -> yaml.constructor.ConstructorError:
    """The error at a node or event."""
    return yaml.constructor.ConstructorError(None, None, message, place.start_mark)
