"""The build fails if a public name has no docstring or is missing in docs/api/, and if a docstring
explains an argument that does not exist."""

import re
from collections.abc import Iterator
from pathlib import Path

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError

ROOT = Path(__file__).parents[2]
MODULES = ("anchors", "diagnostics", "measure", "ops", "plots")  # public, but not in __all__
SHOWN = re.compile(r"^::: anchorops\.(\S+)(?:\n +options:\n +members: \[(.*)\])?", re.M)


def public_names(package: griffe.Object) -> Iterator[str]:
    yield from map(str, package.exports or ())
    for module in MODULES:
        yield from (f"{module}.{name}" for name in map(str, package[module].exports or ()))
        for name, member in package[module].members.items():
            if not (name.startswith("_") or member.is_alias or member.is_attribute):
                yield f"{module}.{name}"


def shown_names() -> Iterator[str]:
    for page in sorted((ROOT / "docs/api").glob("*.md")):
        for name, members in SHOWN.findall(page.read_text()):
            yield name
            yield from (f"{name}.{member.strip()}" for member in members.split(",") if member)


def unknown_arguments(shown: griffe.Object) -> Iterator[str]:
    if not shown.docstring or not (shown.is_function or shown.is_class):
        return
    known = {parameter.name.lstrip("*") for parameter in shown.parameters}  # type: ignore[attr-defined]
    options = {"warn_missing_types": False, "warn_unknown_params": False}
    for section in shown.docstring.parse("google", **options):  # type: ignore[arg-type]
        if section.kind is griffe.DocstringSectionKind.parameters:
            names = [name for entry in section.value for name in entry.name.split(", ")]
            yield from (name for name in names if name not in known)


def on_pre_build(config: MkDocsConfig) -> None:
    package = griffe.load("anchorops", search_paths=[ROOT], resolve_aliases=True)
    assert isinstance(package, griffe.Object)
    shown = list(shown_names())
    wrong = [f"{name}: not in docs/api/" for name in public_names(package) if name not in shown]
    for name in shown:
        if not package[name].docstring:
            wrong.append(f"{name}: no docstring")
        arguments = unknown_arguments(package[name])
        wrong += [
            f"{name}: its docstring explains {argument}, which is not an argument"
            for argument in arguments
        ]
    if wrong:
        raise PluginError("API reference:\n" + "\n".join(wrong))
