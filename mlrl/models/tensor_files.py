"""Safetensors files: named arrays behind a header of JSON, in one file or in shards with an index; never pickle.

A file is 8 bytes (the header's length, little-endian), the header {name: {dtype, shape, data_offsets}}, and the arrays.
It is read here, and not by the safetensors package, so that a damaged file is refused by the name of its tensor.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from mlrl.types import Refused

ONE_FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16),
          "BF16": np.dtype(jnp.bfloat16)}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LONGEST_HEADER = 100_000_000  # bytes; the format's own limit


@dataclasses.dataclass(frozen=True)
class Stored:
    """Where an array lies: it is read only when asked for."""

    file: pathlib.Path
    dtype: str
    shape: tuple[int, ...]
    start: int  # bytes from the file's start

    def read(self) -> np.ndarray:
        """The array, mapped from the file: pages are read as they are used and may be dropped again."""
        if not math.prod(self.shape):
            return np.zeros(self.shape, DTYPES[self.dtype])
        return np.memmap(self.file, DTYPES[self.dtype], "r", self.start, self.shape)


def stored(folder: str | pathlib.Path) -> dict[str, Stored]:
    """Every tensor of a folder's model.safetensors, or of the shards that its index names; reads only the headers.

    Raises: Refused, naming the file and the tensor that is truncated, missing from its shard, or no floating-point
      numbers.
    """
    folder = pathlib.Path(folder)
    if (folder / ONE_FILE).is_file():
        return _headed(folder / ONE_FILE)
    if not (folder / INDEX).is_file():
        other = [path.name for path in sorted(folder.glob("*")) if path.suffix in (".bin", ".pt", ".pth", ".ckpt")]
        hint = f": {other[0]} is not read, since unpickling runs code; convert it to safetensors" if other else ""
        raise Refused(f"{folder} holds neither {ONE_FILE} nor {INDEX}{hint}")
    index = _json(folder / INDEX)
    where = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(where, dict) or not all(isinstance(name, str) for name in where.values()):
        raise Refused(f"{folder / INDEX} has no weight_map of tensors to files")
    shards, found = {}, {}
    for name, shard in where.items():
        if pathlib.PurePath(shard).name != shard or not (folder / shard).is_file():
            raise Refused(f"{folder / INDEX} says that {name} is in {shard}, and there is no such file in {folder}")
        if shard not in shards:
            shards[shard] = _headed(folder / shard)
        if name not in shards[shard]:
            raise Refused(f"the tensor {name} is not in {folder / shard}, where {INDEX} says it is")
        found[name] = shards[shard][name]
    for shard, tensors in shards.items():
        for name in tensors:
            if where.get(name) != shard:
                raise Refused(f"{folder / shard} holds the tensor {name}, of which {INDEX} says nothing")
    return found


def _headed(path: pathlib.Path) -> dict[str, Stored]:
    """The tensors that a file's header names, each within the file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _LONGEST_HEADER):
            raise Refused(f"{path} is no safetensors file, or its header is truncated: copy it again")
        try:
            header = json.loads(file.read(length))
            json.dumps(header, ensure_ascii=False).encode()  # half a character is no text
            entries = {name: _entry(entry) for name, entry in header.items() if name != "__metadata__"}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Refused(f"the header of {path} is not that of a safetensors file: copy it again") from error
    tensors = {}
    for name, (dtype, shape, start, end) in entries.items():
        if dtype not in DTYPES:
            raise Refused(f"the tensor {name} in {path} is of {dtype}: only {', '.join(DTYPES)} are read, so convert a "
                          "quantized model first")  # fmt: skip
        bytes_ = math.prod(shape) * DTYPES[dtype].itemsize
        if min((start, *shape), default=0) < 0 or end - start != bytes_:
            raise Refused(f"the tensor {name} in {path} has {end - start} bytes, but {list(shape)} of {dtype} are "
                          f"{bytes_}: copy the file again")  # fmt: skip
        if 8 + length + end > size:
            raise Refused(f"the tensor {name} in {path} is truncated: it ends at byte {8 + length + end}, the file at "
                          f"{size}; copy it again")  # fmt: skip
        tensors[name] = Stored(path, dtype, shape, 8 + length + start)
    spans = sorted((start, end, name) for name, (_, _, start, end) in entries.items())
    _require_no_gaps(path, spans, size - 8 - length)
    return tensors


def _entry(entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    """(dtype, shape, start, end) of a tensor in a header."""
    start, end = map(_whole, entry["data_offsets"])
    return str(entry["dtype"]), tuple(map(_whole, entry["shape"])), start, end


def _whole(number: Any) -> int:
    if type(number) is not int:
        raise ValueError
    return number


def _require_no_gaps(path: pathlib.Path, spans: Sequence[tuple[int, int, str]], size: int) -> None:
    """Tensors lie one behind the other and fill the file: bytes of none, or of two, are those of a damaged header."""
    place = 0
    for start, end, name in spans:
        if start != place:
            raise Refused(f"the tensor {name} in {path} begins at byte {start} of the data, and the one before it "
                          f"ends at {place}: copy the file again")  # fmt: skip
        place = end
    if place != size:
        raise Refused(f"{path} holds {size} bytes of data, but its header tells of {place}: copy it again")


def write(folder: pathlib.Path, shapes: Mapping[str, tuple[int, ...]], dtype: np.dtype,
          array: Callable[[str], np.ndarray], *, shard_bytes: int) -> list[str]:  # fmt: skip
    """Writes tensors of one dtype, one at a time, into model.safetensors, or into shards with an index.

    Args:
      folder: an existing folder.
      shapes: name -> shape, in the order of writing.
      array: name -> the array, asked for once, in that order.
      shard_bytes: a shard ends before it exceeds so many bytes; what fits in one goes into one file.
    Returns: the names of the files.
    """
    dtype = np.dtype(dtype)
    shards, sizes = [[]], [0]
    for name, shape in shapes.items():
        size = math.prod(shape) * dtype.itemsize
        if shards[-1] and sizes[-1] + size > shard_bytes:
            shards.append([])
            sizes.append(0)
        shards[-1].append(name)
        sizes[-1] += size
    count = len(shards)
    files = [ONE_FILE] if count == 1 else [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    for file, names in zip(files, shards):
        _write_file(folder / file, {name: shapes[name] for name in names}, dtype, array)
    if count > 1:
        where = {name: file for file, names in zip(files, shards) for name in names}
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index, indent=1))
        files.append(INDEX)
    return files


def _write_file(path: pathlib.Path, shapes: Mapping[str, Sequence[int]], dtype: np.dtype,
                array: Callable[[str], np.ndarray]) -> None:  # fmt: skip
    header, end = {"__metadata__": {"format": "pt"}}, 0  # the layout is that of PyTorch's modules
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in shapes:
            file.write(np.ascontiguousarray(array(name), dtype).reshape(-1).view(np.uint8))


def _json(path: pathlib.Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise Refused(f"{path} is not JSON: {error}") from error
