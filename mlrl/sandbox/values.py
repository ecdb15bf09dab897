"""Values of Python's literal types as JSON, so that reading what a hostile program wrote runs none of its code."""

import ast
import json

MAX_DEPTH = 50
_SEQUENCES = {"tuple": tuple, "set": set, "frozenset": frozenset}


class NotAValue(ValueError):
    """The value is not made of numbers, text, bytes, None, lists, tuples, sets and dicts, or it is too deep."""


def encode(value):
    """The JSON text of a value of the literal types, their subclasses included.

    Raises:
      NotAValue: it holds something else, is nested deeper than MAX_DEPTH, or has an integer of more than
        sys.get_int_max_str_digits() digits.
    """
    try:
        return json.dumps(_tagged(value, 0))
    except ValueError as error:  # an integer with too many digits
        raise NotAValue(str(error)) from None


def decode(text):
    """The value of a text by `encode`; equal to the value that was encoded, with plain builtin types.

    Raises:
      NotAValue: the text was not written by `encode`.
    """
    try:
        return _plain(json.loads(text), 0)
    except NotAValue:
        raise
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise NotAValue(f"not an encoded value: {type(error).__name__}") from None


def _tagged(value, depth):
    if depth > MAX_DEPTH:
        raise NotAValue(f"nested deeper than {MAX_DEPTH}")
    inner = lambda items: [_tagged(item, depth + 1) for item in items]  # noqa: E731
    if value is None or value is True or value is False:
        return value
    if isinstance(value, int):
        if abs(value) >= 10 ** 15:  # as text, so that no reader makes a float of it
            return {"int": int.__repr__(value)}
        return int(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, list):
        return inner(list.__iter__(value))
    for name, kind in _SEQUENCES.items():
        if isinstance(value, kind):
            return {name: inner(kind.__iter__(value))}
    if isinstance(value, dict):
        return {"dict": [inner(pair) for pair in dict.items(value)]}
    if isinstance(value, (bytes, bytearray)):
        return {"bytes": bytes(value).decode("latin-1")}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    raise NotAValue(f"{type(value).__name__} is not a value of literals")


def _plain(tree, depth):
    if depth > 2 * MAX_DEPTH:  # a tag is a level of its own
        raise NotAValue("nested too deep")
    if isinstance(tree, list):
        return [_plain(item, depth + 1) for item in tree]
    if not isinstance(tree, dict):
        return tree
    ((tag, content),) = tree.items()
    if tag == "int":
        return int(content)
    if tag == "bytes":
        return content.encode("latin-1")
    if tag == "complex":
        return complex(*content)
    items = [_plain(item, depth + 1) for item in content]
    return dict(items) if tag == "dict" else _SEQUENCES[tag](items)


def is_literal(text):
    """Whether a text of Python is made of literals, signs and displays alone, without names, calls and operations, and
    `ast.literal_eval` reads it: not so -[1] and {[1]}, which have no value, nor --1, which no value is shown as.
    """
    allowed = (ast.Expression, ast.Constant, ast.List, ast.Tuple, ast.Set, ast.Dict, ast.UnaryOp, ast.USub, ast.UAdd,
               ast.Load)  # fmt: skip
    if len(text) > 10_000:  # the parser's memory grows with its nesting
        return False
    try:
        tree = ast.parse(text, mode="eval")
        if not all(isinstance(node, allowed) for node in ast.walk(tree)):
            return False
        ast.literal_eval(tree)
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        return False
    return True
