"""Weight files made wrong below their dictionaries: bytes, pickle opcodes, zip entries, safetensors headers."""

import io
import json
import pickletools
import random
import struct
import zipfile

EXTREMES = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 2**40, 2**62, 2**63 - 1, 2**64 - 1)
GLOBALS = (
    "builtins bytearray",
    "builtins set",
    "builtins complex",
    "builtins eval",
    "os system",
    "collections Counter",
    "collections OrderedDict",
    "torch Size",
    "torch Tensor",
    "torch FloatTensor",
    "torch FloatStorage",
    "torch ComplexFloatStorage",
    "torch QInt8Storage",
    "torch.storage UntypedStorage",
    "torch._utils _rebuild_tensor",
    "torch._utils _rebuild_parameter",
    "torch._utils _rebuild_sparse_tensor",
    "torch._utils _rebuild_qtensor",
    "torch._utils _rebuild_meta_tensor_no_storage",
    "torch._utils _rebuild_wrapper_subclass",
    "torch._tensor _rebuild_from_type_v2",
    "torch.nn.parameter Parameter",
    "_codecs encode",
    "no.such module",
)
DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "F6_E2M3", "C64", "U16", "Q4", "", 5, None)


def wrong_bytes(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """A few bytes flipped, cut, doubled, overwritten or taken from another file. Half of the places are near the ends, where the structure is."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8, 64])):
        if not data:
            break
        near = min(len(data), 4096)
        at = rng.choice([rng.randrange(len(data)), rng.randrange(near), len(data) - 1 - rng.randrange(near)])
        length = rng.choice([1, 2, 8, 100, 5000])
        deed = rng.randrange(8)
        if deed <= 2:
            data[at] = rng.choice([0, 0xFF, 0x7F, data[at] ^ (1 << rng.randrange(8)), rng.randrange(256)])
        elif deed == 3:
            del data[at : at + length]
        elif deed == 4:
            data[at:at] = rng.choice([rng.randbytes(length), data[at : at + length], b"\0" * length])
        elif deed == 5:
            number = struct.pack("<Q", rng.choice(EXTREMES))[: rng.choice([2, 4, 8])]
            data[at : at + len(number)] = number
        elif deed == 6:
            data[at : at + length] = other[at : at + length]
        else:
            del data[rng.choice([at, 0, 1, 16, len(data) - 1]) :]
    return bytes(data)


def wrong_pickle(rng: random.Random, data: bytes) -> bytes:
    """Opcodes left out, doubled, exchanged or with other arguments, in a pickle that stays one for most of its length."""
    starts = [position for _, _, position in pickletools.genops(data)]
    parts = [bytearray(data[a:b]) for a, b in zip(starts, [*starts[1:], len(data)], strict=True)]
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        at = rng.randrange(1, len(parts))
        part, deed = parts[at], rng.randrange(9)
        if deed == 0:
            parts[at] = bytearray()
        elif deed == 1:
            parts[at : at + 1] = [part, bytearray(part)]
        elif deed == 2:
            other = rng.randrange(1, len(parts))
            parts[at], parts[other] = parts[other], parts[at]
        elif deed == 3 and part:
            part[0] = rng.choice(b"NQRbo}])(0aestu.h j\x81\x85\x86\x87\x88\x89\x8a\x8b\x8c\x8e\x92\x93\x94\x95\x97")
        elif deed == 4:
            candidates = [i for i, p in enumerate(parts) if p[:1] in (b"J", b"K", b"M", b"q", b"r", b"h", b"j", b"X", b"\x8a")]
            if candidates:
                chosen = parts[rng.choice(candidates)]
                size = min(4, len(chosen) - 1)
                chosen[1 : 1 + size] = struct.pack("<Q", rng.choice(EXTREMES))[:size]
        elif deed == 5:
            candidates = [i for i, p in enumerate(parts) if p[:1] == b"c"]
            if candidates:
                module, name = rng.choice(GLOBALS).split()
                parts[rng.choice(candidates)] = bytearray(f"c{module}\n{name}\n".encode())
        elif deed == 6:
            module, name = rng.choice(GLOBALS).split()
            number = rng.choice([b"J" + struct.pack("<i", 2**31 - 1), b"\x8a\x05" + struct.pack("<Q", 40 * 10**9)[:5], b"K\x05", b"]", b")"])
            parts.insert(at, bytearray(f"c{module}\n{name}\n".encode() + number + b"\x85R0"))
        elif deed == 7:
            parts.insert(at, bytearray(rng.choice([b"]" * 20000 + b"a" * 19999 + b"0", b"(" * 5000, b"r\xff\xff\xff\xff", b"\x85" * 5000])))
        else:
            del parts[at:]
            parts.append(bytearray(rng.choice([b".", b"", b"R.", b"}."])))
    return b"".join(parts)


def wrong_zip(rng: random.Random, data: bytes) -> bytes:
    """The entries of a file of ``torch.save`` renamed, left out, doubled, compressed or of another size; checksums are right."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = [(info.filename, archive.read(info)) for info in archive.infolist()]
    compression, comment = zipfile.ZIP_STORED, b""
    pickle_at = next(i for i, (name, _) in enumerate(entries) if name.endswith("data.pkl"))
    deed = rng.choice([*range(11), *range(14)])
    at = rng.randrange(len(entries))
    name, content = entries[at]
    folder = name.partition("/")[0]
    if deed <= 4:
        entries[pickle_at] = (entries[pickle_at][0], wrong_pickle(rng, entries[pickle_at][1]))
    elif deed == 5:
        del entries[at]
    elif deed == 6:
        entries[at] = (rng.choice([name.upper(), f"x/{name}", name.rpartition("/")[2], f"{folder}/data/99", f"../{name}", ""]), content)
    elif deed == 7:
        entries.insert(rng.randrange(len(entries)), (rng.choice([name, name.upper()]), rng.choice([content, b"", b"\x80\x02N."])))
    elif deed == 8:
        length = rng.randrange(len(content) + 1)
        entries[at] = (name, rng.choice([content[:length], content + bytes(rng.randrange(1, 9999)), b""]))
    elif deed == 9:
        extra = ("byteorder", "version", ".format_version", ".storage_alignment", ".data/serialization_id", "constants.pkl", "code/a.py")
        entries = [e for e in entries if not e[0].endswith("byteorder")] if rng.random() < 0.5 else entries
        entries.append((f"{folder}/{rng.choice(extra)}", rng.choice([b"big", b"", b"\xff" * 9, b"little", b"9" * 5000, b"0", b"-1"])))
    elif deed == 10:
        compression = rng.choice([zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
    elif deed == 11:
        compression = zipfile.ZIP_DEFLATED
        entries[at] = (name, content + bytes(300 << 20))
    elif deed == 12:
        comment = rng.choice([rng.randbytes(50), b"PK\x05\x06" * 20])
    else:
        entries += [(f"{folder}/data/{i}", b"") for i in range(1000, 3000)]
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w", compression, compresslevel=1) as archive:
        archive.comment = comment
        for name, content in entries:
            archive.writestr(zipfile.ZipInfo(name), content, compression)  # without the time of day
    return written.getvalue()


def wrong_legacy(rng: random.Random, data: bytes) -> bytes:
    """One of the five pickles of an older file made wrong."""
    pickles, stream = [], io.BytesIO(data)
    for _ in range(5):
        start = stream.tell()
        for _ in pickletools.genops(stream):
            pass
        pickles.append(data[start : stream.tell()])
    rest = data[stream.tell() :]
    at = rng.choice([0, 1, 2, 3, 3, 3, 3, 4])
    pickles[at] = rng.choice([wrong_pickle(rng, pickles[at])] * 4 + [b"", b"\x80\x02].", b"\x80\x02}."])
    return b"".join(pickles) + rest


def wrong_safetensors(rng: random.Random, data: bytes) -> bytes:
    """The header of a safetensors file with other types, shapes, offsets, names or text in it."""
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    raw, keys = None, [k for k in header if k != "__metadata__"]
    for key in rng.sample(keys, rng.choice([1, 1, 2])):
        entry, deed = header[key], rng.randrange(13)
        start, end = entry["data_offsets"]
        if deed == 0:
            entry["dtype"] = rng.choice(DTYPES)
        elif deed == 1:
            entry["shape"] = rng.choice([[2**40, 2**40], [-1], [1.5], [0, 2**62], [], None, [[1]], "x", [2**64], [end - start], [1] * 100])
        elif deed == 2:
            entry["data_offsets"] = rng.choice([[end, start], [start, end + 4], [0, end], [start - 1, end], [2**63, 2**64 - 1], [-4, 0], [], [start]])
        elif deed == 3:
            header[rng.choice(["\ud800", "", "k" * 100_000, "\x1b[31m", "__metadata__", f"module.{key}"])] = header.pop(key)
        elif deed == 4:
            header[f"{key}.again"] = dict(entry)
        elif deed == 5:
            header["empty"] = {"dtype": "F32", "shape": rng.choice([[0], [0, 2**40], [5, 0]]), "data_offsets": [len(body)] * 2}
        elif deed == 6:
            text = rng.choice(
                ["5", "[" * 100_000, '["a"]', "null", "[1, 2]", json.dumps(["x"] * 10), '[NaN, 1e999, "a"]', "\ud800", "{}", "9" * 5000]
            )
            metadata = header["__metadata__"] if isinstance(header.get("__metadata__"), dict) else header.setdefault("metadata", {})
            metadata[rng.choice(["tagger_tags", "tagger_thresholds", "timestep", "lora_alpha", "rank_unet", "format", "tagger_dape"])] = text
        elif deed == 7:
            header["__metadata__"] = rng.choice([5, [], {"format": 5}, {"format": None}, {"a": {"b": "c"}}, {}, None, {"k" * 5000: "\x1b[31m"}])
        elif deed == 8:
            raw = json.dumps(header)[:-1] + "," + json.dumps({key: entry})[1:]
        elif deed == 9:
            raw = json.dumps(header).replace("{", rng.choice(["{ ", "[", "{{"]), 2)
        elif deed == 10:
            body = rng.choice([body[:-1], body + b"\0", b"", body[: len(body) // 2]])
        elif deed == 11:
            entry[rng.choice(["dtype", "extra", "shape", "data_offsets"])] = rng.choice([None, 5, "F32", []])
        else:
            header |= {f"e{i}": {"dtype": "F32", "shape": [0], "data_offsets": [len(body)] * 2} for i in range(2000)}
    written = (raw or json.dumps(header)).encode("utf-8", "surrogatepass")
    stated = rng.choice([len(written)] * 12 + list(EXTREMES[-6:]) + [len(written) - 1, len(written) + 1])
    return struct.pack("<Q", stated) + written + body
