"""Job files: YAML as plain data, with the line of every key for messages.

No tags, no anchors or aliases, no dates, no duplicate keys, nothing expanded: it is read as written.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from dfdask.errors import SpecError

MAX_BYTES = 2_000_000

Lines = dict[tuple[str | int, ...], int]
"""Line numbers, from 1, by the path of keys and list positions that leads to a value."""


def load_yaml(path: Path) -> tuple[dict[str, Any], Lines]:
    """The mapping in ``path`` and its lines. Raises SpecError naming the file and the line."""
    import yaml

    text = _text(path)
    loader = None
    try:
        loader = _loader_class()(text)
        node = loader.get_single_node()
        if not isinstance(node, yaml.MappingNode):
            found = "nothing" if node is None else f"a {node.id}"
            raise SpecError(f"{path}: a job is a mapping of keys to values, got {found}; start with `model: bundled`")
        lines: Lines = {}
        _collect(node, (), lines, path)
        return loader.construct_document(node), lines
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f" line {mark.line + 1}:" if mark else ""
        raise SpecError(f"{path}:{where} not valid YAML: {error.problem or error.context}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise SpecError(
            f"{path}: line {line}: not valid YAML: the character #x{error.character:02x}; remove it"
        ) from None
    except yaml.YAMLError as error:
        raise SpecError(f"{path}: not valid YAML: {str(error).splitlines()[0]}") from None
    except RecursionError:
        raise SpecError(f"{path}: nested too deeply to be a job; flatten it") from None
    except ValueError as error:
        raise SpecError(f"{path}: a value cannot be read: {error}; put it in quotes if it is text") from None
    finally:
        if loader is not None:
            loader.dispose()


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise SpecError(f"{path}: no such job file; check the path (the current directory is {Path.cwd()})") from None
    except IsADirectoryError:
        raise SpecError(f"{path}: is a directory, not a job file; name the YAML file in it") from None
    except OSError as error:
        raise SpecError(f"{path}: cannot be read: {error.strerror}") from None
    if len(data) > MAX_BYTES:
        raise SpecError(
            f"{path}: larger than {MAX_BYTES:,} bytes; put the prompts in a file of their own (`prompts: my.txt`)"
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise SpecError(f"{path}: line {line}: not UTF-8 (byte 0x{data[error.start]:02x}); save it as UTF-8") from None


def _loader_class() -> Any:
    """PyYAML's safe loader without aliases, tags and dates, and with YAML 1.2 floats such as 1e-3."""
    import yaml

    class JobLoader(yaml.SafeLoader):
        def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
            event: Any = self.peek_event()  # type: ignore[no-untyped-call]
            for attribute, what in (("anchor", "anchors and aliases"), ("tag", "tags")):
                if getattr(event, attribute, None) not in (None, "!"):
                    raise yaml.MarkedYAMLError(
                        problem=f"{what} are not allowed in a job; write the value out",
                        problem_mark=event.start_mark,
                    )
            return super().compose_node(parent, index)

    date, float_tag = "tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:float"
    JobLoader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != date]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    JobLoader.add_implicit_resolver(
        float_tag, re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
    )
    return JobLoader


def _collect(node: Any, where: tuple[str | int, ...], lines: Lines, path: Path) -> None:
    """Note the line of everything below ``node``; refuse duplicate keys, which YAML loaders let through."""
    import yaml

    if isinstance(node, yaml.SequenceNode):
        for place, entry in enumerate(node.value):
            lines[(*where, place)] = entry.start_mark.line + 1
            _collect(entry, (*where, place), lines, path)
    elif isinstance(node, yaml.MappingNode):
        for key, entry in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise SpecError(f"{path}: line {line}: a key must be plain text")
            at = (*where, key.value)
            if at in lines:
                raise SpecError(
                    f"{path}: line {line}: the key {key.value!r} is there twice, first in line {lines[at]}; remove one"
                )
            lines[at] = line
            _collect(entry, at, lines, path)
