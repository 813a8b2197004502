"""YAML text as values and back: `2e-3` is a number, as in YAML 1.2, and no key is twice in a mapping."""

from __future__ import annotations

import re
from typing import Any

import yaml

from .errors import ConfigError


def read_yaml(text: str, where: str) -> Any:
    """What YAML text says; `2e-3` is a number, as YAML 1.2 has it, and no key is twice in one mapping.

    Raises:
        ConfigError: it is not YAML.
    """
    try:
        return yaml.load(text, Loader=_Yaml12Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not YAML: {error}") from error


class _Yaml12Loader(yaml.SafeLoader):
    """PyYAML reads `2e-3` as a string (YAML 1.1 wants `2.0e-3`); a learning rate written that way must be a
    number.

    It also takes the last of equal keys without a word; here they are an error.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        twice = {str(key) for key in keys if keys.count(key) > 1}
        if twice:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {min(twice)!r} is there twice", node.start_mark
            )
        return super().construct_mapping(node, deep)


class Yaml12Dumper(yaml.SafeDumper):
    """Puts quotes around what the loader would take for a number: a stage called `2e-3` stays a name."""


for _side in (_Yaml12Loader, Yaml12Dumper):
    _side.yaml_implicit_resolvers = {
        first: [entry for entry in entries if entry[0] != "tag:yaml.org,2002:float"]
        for first, entries in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(
            r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"
        ),
        list("-+0123456789."),
    )
