"""Reads our shard files without our code and without torch: the safetensors library, JSON and arithmetic.

Owns: putting a whole tensor together from its chunks, and our tensor digest, both written from docs/FORMAT.md alone.
"""

import json
import pathlib
import struct
import subprocess


class Tensor:
    """A whole tensor: safetensors' name of its type, its shape, its bytes."""

    def __init__(self, dtype, shape, data):
        self.dtype, self.shape, self.data = dtype, tuple(shape), bytes(data)


def read_file(path):
    """Every tensor of one safetensors file, and its `__metadata__`."""
    from safetensors import deserialize  # Here, so that what needs only digests runs without it.

    raw = pathlib.Path(path).read_bytes()
    (length,) = struct.unpack_from("<Q", raw)
    metadata = json.loads(raw[8 : 8 + length]).get("__metadata__", {})
    return {n: Tensor(t["dtype"], t["shape"], t["data"]) for n, t in deserialize(raw)}, metadata


def read_model(directory):
    """Every tensor of a model directory's safetensors files."""
    tensors = {}
    for path in sorted(pathlib.Path(directory).glob("*.safetensors")):
        tensors.update(read_file(path)[0])
    return tensors


def assemble(directory):
    """The whole tensors of a checkpoint, from the chunks and `DCP_SHARDING_INFO` of its shard files."""
    chunks = {}
    for path in sorted(pathlib.Path(directory).glob("*.safetensors")):
        tensors, metadata = read_file(path)
        info = json.loads(metadata["DCP_SHARDING_INFO"])
        if metadata["DCP_VERSION"] != "1.0" or set(info) != set(tensors):
            raise ValueError(f"{path}: DCP_SHARDING_INFO does not name exactly the tensors of the file")
        for name, tensor in tensors.items():
            at = info[name]["saved_offsets"]
            if len(at) != len(tensor.shape) or any(at[1:]):
                raise ValueError(f"{path}: {name} is at {at}, not a range of dim 0")
            chunks.setdefault(name, []).append((at[0] if at else 0, tensor))
    return {name: join(name, parts) for name, parts in chunks.items()}


def join(name, parts):
    """One tensor from (first row, chunk) pairs that must leave no hole and no overlap."""
    parts.sort(key=lambda part: part[0])
    first, rows = parts[0][1], 0
    for at, part in parts:
        if at != rows or part.dtype != first.dtype or part.shape[1:] != first.shape[1:]:
            raise ValueError(f"{name}: a chunk at row {at}, {part.dtype} {part.shape}, after {rows} rows")
        rows += part.shape[0] if part.shape else 1
    return Tensor(first.dtype, (rows, *first.shape[1:]) if first.shape else (), b"".join(p.data for _, p in parts))


def digest(data):
    """`crc64nvme:<16 hex digits>:<bytes>`: reflected polynomial 0x9a6c9329ac4bc9b5, ones in, complemented out."""
    crc, table = 0xFFFFFFFFFFFFFFFF, CRC_TABLE
    for byte in data:
        crc = table[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return f"crc64nvme:{crc ^ 0xFFFFFFFFFFFFFFFF:016x}:{len(data)}"


def crc_table():
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = (byte >> 1) ^ (0x9A6C9329AC4BC9B5 if byte & 1 else 0)
        table.append(byte)
    return table


CRC_TABLE = crc_table()


def logical_digests(tensors):
    """The digest of every logical tensor, as section 5 says it: its parts' bytes in order, then the nested offset's."""
    found, parts = {}, (".absmax", ".nested_absmax", ".quant_map", ".nested_quant_map", ".SCB", "_format")
    for name, tensor in tensors.items():
        if name.endswith(parts) or ".quant_state." in name:
            continue
        data = tensor.data
        for part in (".absmax", ".nested_absmax"):
            data += tensors[name + part].data if name + part in tensors else b""
        scale = name.removesuffix("weight") + "SCB"
        data += tensors[scale].data if scale in tensors else b""
        state = [t for n, t in tensors.items() if n.startswith(name + ".quant_state.")]
        if state and "nested_offset" in (text := json.loads(state[0].data)):
            data += struct.pack("<f", text["nested_offset"])
        found[name] = digest(data)
    return found


def launch(binary, arguments, seconds=120):
    """Runs the main job; its JSON result."""
    command = [binary, "launch", "--json", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: exit {done.returncode}: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout)


def newest_step(root):
    """The directory of the newest committed checkpoint."""
    return max(pathlib.Path(root).glob("step-*"))
