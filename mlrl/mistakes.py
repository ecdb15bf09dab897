"""Mistakes of the command line's users, in one line each: what gin says of its files, and what it does not say.

Gin's own modules are handed in: only the door imports it.
"""

from __future__ import annotations

import difflib
import errno
import inspect
import os
import pathlib
import pkgutil
import re
import sys
from collections.abc import Iterator
from typing import Any

from mlrl.types import Refused

PACKAGE = pathlib.Path(__file__).resolve().parent


def one_line(error: Exception) -> str:
    """The error in one line: gin's notes on where it happened are kept, its advice to developers is not."""
    text = re.sub(r"(In call to configurable '.+?') \(<.+>\)", r"\1", str(error))  # no reprs of functions
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    text = "; ".join(line for line in lines if not line.startswith(("No values supplied", "Gin had values bound")))
    called_back = re.search(r"^(?:mlrl\.types\.)?Refused: (.+)$", str(error), re.M)  # from inside of a compiled program
    if called_back:
        return called_back[1]
    if isinstance(error, Refused) or type(error).__name__ in ("Stopped", "Preempted", "UnknownConfigurable"):
        return text
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS):
        where = error.filename or "in the run's folder"
        return f"cannot write {where} ({error.strerror}): make room or mend the folder, and run the same command again"
    return f"{type(error).__name__}: {text or 'no message'} (--debug shows the trace)"


def of_gin(config: Any, path: str, error: Exception) -> str:
    """Where in the gin files a mistake is and what to change, in one line."""
    if isinstance(error, SyntaxError):
        return f"{error.filename or path}:{error.lineno}: {error.msg} found {(error.text or '').strip()!r}"
    if isinstance(error, RecursionError):
        return f"{path}: a macro, or an include, leads back to itself: give it a value"
    if isinstance(error, UnicodeDecodeError):
        return f"{path}: a gin file is text in UTF-8, but byte {error.start} of it is none: save it as UTF-8"
    text = str(error)
    place = re.search(r'In file "(.+?)", line (\d+)|In bindings string line \d+\n\s*(.+)', text)
    where = f"{path}: "
    if place:
        where = f"override {place[3].strip()}: " if place[3] else f"{place[1]}:{place[2]}: "
    for pattern, words, names in _GIN_SAYS:
        found = re.search(pattern, text)
        if found:
            known = names(config, *found.groups())
            close = difflib.get_close_matches(found[found.lastindex or 0], [k for k in known if k != found[1]], n=1)
            return where + words.format(*found.groups()) + (f": did you mean {close[0]!r}?" if close else "")
    return where + one_line(error)


def _nothing(*_: Any) -> list[str]:
    return []


def _parameters(config: Any, configurable: str, _: str) -> list[str]:
    wrapped = [c.wrapped for name, c in config._REGISTRY.items() if f".{name}".endswith(f".{configurable}")]
    return [name for one in wrapped for name in inspect.signature(one).parameters]


def _attributes(config: Any, module: str, _: str) -> list[str]:
    return list(vars(sys.modules.get(module, config)))


def _modules(config: Any, name: str) -> list[str]:
    parent, dot, _ = name.rpartition(".")
    folders = getattr(sys.modules.get(parent), "__path__", [os.getcwd()])
    return [parent + dot + module.name for module in pkgutil.iter_modules(folders)]


def _selectors(config: Any, _: str) -> list[str]:
    selectors = [name.split(".") for name, _ in config._REGISTRY.items()]
    return [".".join(parts[-n:]) for parts in selectors for n in (1, 2)]


def _macros(config: Any, _: str) -> list[str]:
    return [scope for scope, selector in config._CONFIG if selector == "gin.macro"]


# What gin says of a mistake; what there is to change, around the quoted groups; names that may have been meant.
_GIN_SAYS = (
    (r"Configurable '([^']+)' doesn't have a parameter named '([^']+)'", "{0} has no parameter {1!r}", _parameters),
    (r"<module '([^']+)' from '[^']+'> has no attribute (\w+)", "there is no {1!r} in {0}", _attributes),
    (r"'([^']+)' was not provided by an import", "import {0} in this file before it is named", _nothing),
    (r"No configurable matching (?:reference )?'@?([^']+)'", "no gin file of the experiment names {0!r}",
     _selectors),
    (r"No module named '([^']+)'", "there is no module {0!r} on the path or in this folder", _modules),
    (r"No bindings specified for '([^']+)/gin.macro'", "the macro {0} has no value: write {0} = VALUE, or give "
     "--gin.{0}=VALUE", _macros),
    (r"(\w+)/macro\.value set to `%gin.REQUIRED`", "the macro {0} needs a value: give --gin.{0}=VALUE", _nothing),
    (r"(\S+) set to `%gin.REQUIRED`", "{0} needs a value: bind it, or give --gin.{0}=VALUE", _nothing),
    (r"(?s)for arguments: \[(.+?)\].*In call to configurable '(\w+)'", "{1} needs {0}: bind them, or "
     "write @{1} without () to name the function", _nothing),
    (r"(not enough values) to unpack \(expected at least 2", "a name behind @ needs a module and what is in it, as "
     "@graph.arithmetic", _nothing),
    (r"Unable to open file: (.+?)\. Searched", "there is no gin file {0} in this folder or in mlrl's gin library",
     _nothing),
)  # fmt: skip


def refuse_unused(config: Any) -> None:
    """Compares what the gin files bind with what was used; a binding that does nothing is a mistake.

    Preparing an experiment traces everything that it will run, so that what is not used by then is never used.
    """
    bound, used = config._CONFIG, set()
    for (scope, selector), values in config._OPERATIVE_CONFIG.items():
        inner = scope.split("/") if scope else []
        outward = ["/".join(inner[:i]) for i in range(len(inner), -1, -1)]  # a scope inherits from those around it
        for name in values:
            found = (s for s in outward if name in bound.get((s, selector), {}))
            used.add((next(found, scope), selector, name))
    for (scope, selector), values in bound.items():
        for name in values:
            if (scope, selector, name) in used:
                continue
            if selector == "gin.macro":
                close = difflib.get_close_matches(scope, [s for s, kind, _ in used if kind == "gin.macro"], n=1)
                hint = f"; did you mean {close[0]}?" if close else ""
                takers = sorted(kind.rpartition(".")[2] for _, kind, knob in used if knob == scope)
                hint = f"; did you mean {takers[0]}.{scope}?" if takers else hint
                raise Refused(f"nothing uses the macro {scope}: remove it, or refer to it as %{scope}{hint}")
            shown = f"{scope}/{selector}.{name}" if scope else f"{selector}.{name}"
            raise Refused(f"nothing uses the binding {shown}: remove it, or name @{selector.split('.', 1)[1]} "
                          "where the experiment takes it, in the scope of the binding")  # fmt: skip


def refuse_lost(parser: Any, path: str) -> None:
    """Refuses a binding above an include that binds the same: gin would take the included one and say nothing."""
    own = list(_statements(parser, path))
    for i, (line, key, value, _) in enumerate(own):
        after = own[i + 1 :]
        if key and all(other != key for _, other, _, _ in after):
            for name in (included for _, _, _, included in after if included):
                if _bound_by(parser, name).get(key, value) != value:
                    raise Refused(f"{path}:{line}: {name}, which is included below, binds {key} again: move this line "
                                  "below the include")  # fmt: skip


def _bound_by(parser: Any, path: str) -> dict[str, Any]:
    """What a gin file and those that it includes bind."""
    found: dict[str, Any] = {}
    for _, key, value, included in _statements(parser, path):
        found |= _bound_by(parser, included) if included else {key: value}
    return found


def _statements(parser: Any, path: str) -> Iterator[tuple[int, str, Any, str]]:
    """(line, what is bound, its value, "") or (line, "", None, file) of each binding and include of a gin file."""
    class AsText(parser.ParserDelegate):
        def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> str:
            return f"@{scoped_configurable_name}{'()' if evaluate else ''}"

        def macro(self, macro_name: str) -> str:
            return f"%{macro_name}"

    where = (pathlib.Path(folder, path) for folder in ("", PACKAGE.parent, PACKAGE))
    text = next((file.read_text() for file in where if file.is_file()), "")
    for one in parser.ConfigParser(text, AsText()):
        line = one.location.line_num
        if isinstance(one, parser.IncludeStatement):
            yield line, "", None, one.filename
        elif isinstance(one, parser.BindingStatement):
            named = ".".join([*one.selector.split(".")[-2:], *([one.arg_name] if one.arg_name else [])])
            yield line, f"{one.scope}/{named}".lstrip("/"), one.value, ""
