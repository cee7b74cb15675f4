"""YAML as its version 1.2 reads it, in the plain part that configs need."""

from __future__ import annotations

import re
from typing import Any

import yaml

BOOL, INT, FLOAT, DATE = (f"tag:yaml.org,2002:{name}" for name in ("bool", "int", "float", "timestamp"))
INTS = re.compile(r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$")
FLOATS = re.compile(
    r"^(?:[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)


class Yaml12Dumper(yaml.SafeDumper):
    """Writes strings that versions 1.1 or 1.2 would read as something else in quotes."""


class Yaml12Loader(yaml.SafeLoader):
    """YAML in which, as in version 1.2, ``no`` and ``1:30`` are strings, ``1e-4`` is a number and ``010`` is ten."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (PyYAML's own way to say it)
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in (BOOL, INT, FLOAT, DATE)]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Refuse aliases: a few lines of them can stand for more values than a memory holds."""
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not taken; write the value out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuse a key that is there twice: of two values, one would be dropped without a word."""
        keys: list[Any] = []  # a list, as keys can be of types that no set takes
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in keys:
                line = key_node.start_mark.line + 1
                raise yaml.YAMLError(f"{key} is there twice, again in line {line}; leave one of them")
            keys.append(key)
        return super().construct_mapping(node, deep=deep)


def load_yaml(text: str) -> Any:
    """Read YAML, with one kind of error for everything that is wrong with it."""
    try:
        return yaml.load(text, Loader=Yaml12Loader)
    except yaml.YAMLError:
        raise
    except Exception as error:  # no such date, too many digits, too deep: what a value's constructor makes of it
        raise yaml.YAMLError(str(error)) from error


def dump_yaml(values: Any) -> str:
    """Write values as :func:`load_yaml` reads them, in their order."""
    return yaml.dump(values, Dumper=Yaml12Dumper, sort_keys=False)


Yaml12Loader.add_implicit_resolver(BOOL, re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
Yaml12Loader.add_constructor(INT, lambda _, node: int(node.value, {"0o": 8, "0x": 16}.get(node.value[:2], 10)))
for _kind in (Yaml12Loader, Yaml12Dumper):
    _kind.add_implicit_resolver(INT, INTS, list("-+0123456789"))
    _kind.add_implicit_resolver(FLOAT, FLOATS, list("-+.0123456789"))
