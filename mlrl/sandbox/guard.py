"""What the program's Python is refused before the kernel is asked: modules, and where no wall stands, much more.

Behind a seccomp filter or in namespaces the guard is a courtesy: `import os` fails at once and with a clear message,
and whoever gets at `os` another way finds that the kernel refuses its calls. Where neither stands ("language" mode,
which a caller must ask for), the guard is all there is, so it also reads the program's syntax tree and takes away
what reflection needs. A guard in the language has been got around before; do not run hostile programs on it alone.
"""

import ast
import builtins
import importlib
import types

# The server imports these once; a program's import of them reads no file. Nothing else can be imported.
MODULES = (
    "abc", "array", "base64", "binascii", "bisect", "calendar", "cmath", "collections", "collections.abc", "colorsys",
    "contextlib", "copy", "dataclasses", "datetime", "decimal", "difflib", "enum", "fractions", "functools", "hashlib",
    "heapq", "html", "io", "itertools", "json", "keyword", "math", "numbers", "operator", "pprint", "queue", "random",
    "re", "reprlib", "statistics", "string", "struct", "sys", "textwrap", "time", "timeit", "types", "typing",
    "unicodedata", "uuid", "weakref", "zlib", "zoneinfo", "__future__",
)  # fmt: skip
# What those import when used. The interpreter does that through the program's own __import__ now and then.
LAZY = ("_strptime", "encodings.ascii", "encodings.latin_1", "encodings.idna", "encodings.utf_16", "encodings.utf_32",
        "copyreg", "linecache", "locale", "stringprep", "traceback", "warnings")  # fmt: skip

# In language mode: these names of these modules.
_LANGUAGE = {
    "math": (), "cmath": (), "itertools": (), "heapq": (), "bisect": (), "statistics": (), "fractions": (),
    "collections": ("Counter", "OrderedDict", "defaultdict", "deque", "ChainMap"),
    "functools": ("reduce", "lru_cache", "cache", "partial", "cmp_to_key"),
    "json": ("dumps", "loads"),
    "random": ("random", "randint", "randrange", "choice", "choices", "shuffle", "sample", "seed", "uniform"),
    "re": ("compile", "search", "match", "fullmatch", "split", "findall", "finditer", "sub", "subn", "escape",
           "I", "M", "S", "X", "IGNORECASE", "MULTILINE", "DOTALL", "VERBOSE"),
    "string": ("ascii_letters", "ascii_lowercase", "ascii_uppercase", "digits", "hexdigits", "octdigits",
               "punctuation", "printable", "whitespace", "capwords"),
    "typing": ("Any", "Callable", "Dict", "Iterable", "Iterator", "List", "Optional", "Sequence", "Set", "Tuple",
               "Union"),
}  # fmt: skip
_REFUSED_BUILTINS = ("__loader__", "__spec__", "breakpoint", "compile", "delattr", "dir", "eval", "exec", "exit",
                     "getattr", "globals", "hasattr", "help", "input", "license", "credits", "copyright", "locals",
                     "memoryview", "open", "quit", "setattr", "super", "type", "vars", "__debug__")  # fmt: skip
_FRAMES = ("_", "gi_", "cr_", "ag_", "f_", "tb_", "co_")
_METHODS = {f"__{name}__" for name in (
    "init new repr str eq ne lt le gt ge hash len iter next getitem setitem delitem contains call add sub mul truediv "
    "floordiv mod pow neg abs and or xor invert bool int float index enter exit radd rsub rmul iadd isub imul reversed "
    "post_init").split()}  # fmt: skip


class Refusal(Exception):
    """The program holds what language mode does not allow."""


def preload():
    """Imports everything that a program may import, and what that imports when used."""
    for name in (*MODULES, *LAZY):
        importlib.import_module(name)


def builtins_for(*, language_only):
    """A program's own builtins: a copy, with a guarded import; in language mode without reflection and files."""
    own = dict(vars(builtins))
    load = builtins.__import__
    own["__import__"] = _language_import(load) if language_only else _import(load, frozenset(MODULES + LAZY))
    if language_only:
        for name in _REFUSED_BUILTINS:
            own.pop(name, None)
    return own


def check(source):
    """Raises Refusal where the syntax tree of the source holds what language mode does not allow."""
    for node in ast.walk(ast.parse(source)):
        names = [getattr(node, field, None) for field in ("attr", "name", "id", "arg", "asname", "rest")]
        names += getattr(node, "kwd_attrs", [])
        if isinstance(node, (ast.Global, ast.Nonlocal)):
            names += node.names
        for name in names:
            if not isinstance(name, str) or (isinstance(node, ast.alias) and name == "__future__"):
                continue
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and name in _METHODS:
                continue
            attribute = isinstance(node, ast.Attribute) and not name == "__init__" and name.startswith(_FRAMES)
            dunder = name.startswith("__") and name not in ("__name__", "__init__")
            if attribute or dunder or (isinstance(node, ast.MatchClass) and name.startswith(_FRAMES)):
                raise Refusal(f"{name!r} is not allowed without the kernel's walls")


def _import(load, allowed):
    def guarded(name, globals=None, locals=None, fromlist=(), level=0):
        if level or name not in allowed:
            raise ImportError(f"the sandbox has no module {name!r}", name=name)
        return load(name, None, None, fromlist, 0)

    return guarded


def _language_import(load):
    def guarded(name, globals=None, locals=None, fromlist=(), level=0):
        if level or name not in _LANGUAGE:
            raise ImportError(f"the sandbox has no module {name!r} without the kernel's walls", name=name)
        real, part = load(name, None, None, ("*",), 0), types.ModuleType(name)
        public = _LANGUAGE[name] or [key for key in vars(real) if not key.startswith("_")]
        public = [key for key in public if not isinstance(getattr(real, key), types.ModuleType)]
        vars(part).update({key: getattr(real, key) for key in public})
        return part

    return guarded
