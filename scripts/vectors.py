"""Test vectors of the wire format, computed from the description in docs/wire.md and from nothing of sfumato.

``python scripts/vectors.py`` writes tests/data/vectors.json and the tables of docs/wire.md. A second implementation can
be held to the same file; tests/conformance/test_vectors.py holds this one to it. Needs the standard library and
`cryptography` (for AES).
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import struct
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

ROOT = Path(__file__).resolve().parents[1]
JSON = ROOT / "tests" / "data" / "vectors.json"
PAGE = ROOT / "docs" / "wire.md"

M64 = (1 << 64) - 1
KEY = bytes(range(32))
RUN = bytes(range(0xA0, 0xB0))


# ---- the description, in code --------------------------------------------------------------------------------------


def canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def tag(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


def frame(kind: int, dtype: int, name: bytes, clock: int, payload: bytes) -> bytes:
    return struct.pack("<2sBBB8sII", b"sf", 1, kind, dtype, name, clock, len(payload)) + payload


def stream(key: bytes, label: str, size: int) -> bytes:
    derived = hashlib.blake2b(label.encode(), key=key, digest_size=16, person=b"sfumato-prg1").digest()
    return Cipher(algorithms.AES(derived), modes.CTR(bytes(16))).encryptor().update(bytes(size))


def signed(word: int, bits: int = 64) -> int:
    word &= (1 << bits) - 1
    return word - (1 << bits) if word >> (bits - 1) else word


def words(data: bytes, bits: int = 64) -> list[int]:
    size = bits // 8
    return [int.from_bytes(data[i : i + size], "little", signed=bits > 8) for i in range(0, len(data), size)]


def drawn(key: bytes, label: str, count: int, bits: int = 64) -> list[int]:
    return words(stream(key, label, count * bits // 8), bits)


def packed(values: list[int], bits: int) -> bytes:
    out, offset = b"", 0
    for width in (64, 32, 16, 8, 4, 2, 1):
        while bits - offset >= width:
            field = sum((v >> offset & (1 << width) - 1) << i * width for i, v in enumerate(values))
            out += field.to_bytes(-(-len(values) * width // 8), "little")
            offset += width
    return out


def hkdf(secret: bytes, salt: bytes, info: bytes) -> bytes:
    extracted = hmac.digest(salt, secret, "sha256")
    return hmac.digest(extracted, info + b"\x01", "sha256")


def digest(header: dict[str, Any], tensors: list[tuple[str, list[int], bytes]]) -> bytes:
    state = hashlib.blake2b(canonical(header), digest_size=16, person=b"sfumato-command")
    for dtype, shape, data in tensors:
        state.update(canonical([f"torch.{dtype}", shape]) + data)
    return state.digest()


def simulated(seed: bytes, low: int, high: int) -> bytes:
    return hashlib.blake2b(f"simulated pair {low}{high}".encode(), key=seed, digest_size=32).digest()


def hashed(block: bytes, name: str) -> bytes:
    """AES of a block under a fixed key, xored with the block."""
    fixed = hashlib.blake2b(name.encode(), digest_size=16, person=b"sfumato-dpf1").digest()
    return xor(Cipher(algorithms.AES(fixed), modes.ECB()).encryptor().update(block), block)


def xor(a: bytes, b: bytes) -> bytes:
    return bytes(x ^ y for x, y in zip(a, b, strict=True))


def child(seed: bytes, side: int) -> tuple[bytes, int]:
    """A child's seed and control bit."""
    block = hashed(seed, ("left", "right")[side])
    return bytes([block[0] & 0xFE]) + block[1:], block[0] & 1


def levels_of(rows: int, bits: int) -> tuple[int, int]:
    """Words in a leaf, and levels above the leaves."""
    each = 128 // bits
    return each, (-(-rows // each) - 1).bit_length()


def point_keys(position: int, rows: int, bits: int, roots: list[bytes]) -> list[bytes]:
    """The two keys of the function that is 1 at ``position``."""
    each, levels = levels_of(rows, bits)
    seeds, told, tail = list(roots), [0, 1], b""
    for level in range(levels):
        turn = position // each >> levels - 1 - level & 1
        grown = [[child(seed, side) for side in (0, 1)] for seed in seeds]
        correction = xor(grown[0][1 - turn][0], grown[1][1 - turn][0])
        sides = [grown[0][side][1] ^ grown[1][side][1] ^ (side == turn) for side in (0, 1)]
        tail += correction + bytes([sides[0] | sides[1] << 1])
        for b in (0, 1):
            seed, bit = grown[b][turn]
            seeds[b] = xor(seed, correction) if told[b] else seed
            told[b] = bit ^ (told[b] & sides[turn])
    a, b = (words(hashed(seed, "leaf"), bits) for seed in seeds)
    one = [int(i == position % each) for i in range(each)]
    last = [signed((-1 if told[1] else 1) * (w + y - x), bits) for w, x, y in zip(one, a, b, strict=True)]
    return [
        root + tail + b"".join(w.to_bytes(bits // 8, "little", signed=True) for w in last) for root in roots
    ]


def point_words(key: bytes, holder: int, rows: int, bits: int) -> list[int]:
    """What a holder expands its key to."""
    each, levels = levels_of(rows, bits)
    last, out = words(key[-16:], bits), list[int]()
    for leaf in range(-(-rows // each)):
        seed, told = key[:16], holder
        for level in range(levels):
            side = leaf >> levels - 1 - level & 1
            step = key[16 + 17 * level :][:17]
            grown, bit = child(seed, side)
            seed = xor(grown, step[:16]) if told else grown
            told = bit ^ (told & step[16] >> side & 1)
        for word, more in zip(words(hashed(seed, "leaf"), bits), last, strict=True):
            out.append(signed((-1) ** holder * (word + told * more), bits))
    return out[:rows]


class Parties:
    """Streams of the three pairs; parties play the roles of their own numbers."""

    def __init__(self, seed: bytes) -> None:
        self.keys = {(i, j): simulated(seed, i, j) for i, j in ((0, 1), (0, 2), (1, 2))}

    def draw(self, i: int, j: int, label: str, count: int, bits: int = 64) -> list[int]:
        return drawn(self.keys[min(i, j), max(i, j)], label, count, bits)


def product(p: Parties, path: str, x: list[list[int]], y: list[list[int]]) -> list[list[int]]:
    """z_i of every party, by elements, as sent to the party before it."""
    count, sent = len(x[0]), []
    for i in range(3):
        a, b = (i + 1) % 3, (i + 2) % 3
        ahead, behind = p.draw(i, a, f"{path}|zero", count), p.draw(i, b, f"{path}|zero", count)
        sent.append(
            [
                signed(x[i][e] * (y[i][e] + y[a][e]) + x[a][e] * y[i][e] + ahead[e] - behind[e])
                for e in range(count)
            ]
        )
    return sent


def truncated(p: Parties, path: str, x: list[list[int]], f: int) -> dict[str, list[int]]:
    """Every message of a truncation by f bits in Z64, and the components of the result."""
    count, quarter = len(x[0]), 1 << 62
    z = p.draw(0, 1, f"{path}|split", count)
    ra = [r & 1 for r in p.draw(0, 2, f"{path}|ra", count, 8)]
    rb = [r & 1 for r in p.draw(1, 2, f"{path}|rb", count, 8)]
    ab0 = p.draw(0, 2, f"{path}|ab", count)
    c0, c2 = p.draw(0, 2, f"{path}|c0", count), p.draw(1, 2, f"{path}|c2", count)
    out: dict[str, list[int]] = {name: [] for name in ("a", "b", "ab", "y0", "y1", "c0", "c1", "c2")}
    for e in range(count):
        u0, u1 = signed(x[0][e] + x[1][e] + z[e]), signed(x[2][e] - z[e])
        below = signed(u0 - 1)  # role 0 rounds up: floor((u0 - 1) / 2^f) + 1
        high = int(below >= quarter)
        a, b = int(high or below < -quarter), int(u1 < 0)
        told_a, told_b, ab1 = a ^ ra[e], b ^ rb[e], (ra[e] & rb[e]) - ab0[e] & (1 << f) - 1
        sign = 1 - 2 * (told_a ^ told_b)
        w0 = high - (a & told_b) - sign * ab0[e]
        w1 = sign * ab1 + (told_a & rb[e]) * (1 - 2 * told_b)
        y0 = (below >> f) + 1 - (w0 << 64 - f)
        y1 = (u1 >> f) + (w1 << 64 - f)
        sent0, sent1 = signed(y0 - c0[e]), signed(y1 - c2[e])
        row = (told_a, told_b, ab1, sent0, sent1, c0[e], signed(sent0 + sent1), c2[e])
        for name, value in zip(out, row, strict=True):
            out[name].append(value)
    return out


# ---- the vectors ---------------------------------------------------------------------------------------------------


def text(values: list[int]) -> list[str]:
    """Numbers as text: not every JSON reader has 64 bits."""
    return [str(value) for value in values]


def handshake() -> dict[str, Any]:
    run, terms = RUN.hex(), {"protocol version": "2", "random streams": "aes128ctr-blake2b-v1"}
    nonces = [bytes([0x11]) * 32, bytes([0x22]) * 32]
    hellos = [canonical({"terms": terms, "nonce": nonce.hex()}) for nonce in nonces]
    transcript = hashlib.sha256(len(hellos[0]).to_bytes(8, "little") + hellos[0] + hellos[1]).digest()
    info = canonical(["sfumato/pair-key/v1", run, 0, 1])
    return {
        "run": run, "terms": terms, "nonce0": nonces[0].hex(), "nonce1": nonces[1].hex(),
        "tag": tag("control/handshake\x000").hex(), "hello0": hellos[0].decode(), "transcript": transcript.hex(),
        "info": info.decode(), "key": hkdf(nonces[0] + nonces[1], transcript, info).hex(),
    }  # fmt: skip


def commands() -> list[dict[str, Any]]:
    half = struct.pack("<2f", 0.5, -2.0)
    made: list[tuple[dict[str, Any], list[tuple[str, list[int], bytes]]]] = [
        ({"command": "Put", "handle": "x", "ring": "Z64", "frac": 18, "shape": [2, 3]}, []),
        (
            {"command": "Call", "name": "unet", "path": "step0", "inputs": {"sample": "x"}, "publics": ["t"],
             "outputs": ["y"], "samples": []},
            [("float32", [2], half)],
        ),
        (
            {"command": "Affine", "handle": "z", "terms": [["x", 3, None, None], ["y", -1, 0, 2]], "frac_bits": 24,
             "path": "mix", "constant": False},
            [],
        ),
        ({"command": "PutIndex", "handle": "ids", "ring": "Z64", "rows": 30522, "shape": [1, 128],
          "form": "dpf-aes128-v1"}, []),
        ({"command": "Describe", "model": "digits"}, []),
        (
            {"command": "Load", "name": "unet", "plan": {"model": "digits", "share": RUN.hex(), "plan": "00ff"},
             "weights": {"form": "model", "items": []}},
            [],
        ),
        ({"command": "Reveal", "handle": "y"}, []),
        ({"command": "Close"}, []),
    ]  # fmt: skip
    return [
        {
            "header": canonical(header).decode(),
            "tensors": [[dtype, shape, data.hex()] for dtype, shape, data in tensors],
            "digest": digest(header, tensors).hex(),
        }
        for header, tensors in made
    ]


def message() -> dict[str, Any]:
    header = {"command": "Put", "handle": "x", "ring": "Z64", "frac": 18, "shape": [2], "common": 0}
    data = struct.pack("<2q", 1, -1)
    envelope = canonical({"header": header, "tensors": [{"dtype": "int64", "shape": [2]}]})
    parts = [(0, len(envelope).to_bytes(8, "little")), (0, envelope), (4, data)]
    name = (7).to_bytes(8, "little")
    return {
        "number": 7, "header": header, "words": text([1, -1]), "envelope": envelope.decode(),
        "frames": [frame(1, code, name, 0, payload).hex() for code, payload in parts],
    }  # fmt: skip


def shared() -> dict[str, Any]:
    reals, seeds = [1.5, -0.25, 3.0], [bytes([0x33]) * 32, bytes([0x44]) * 32]
    encoded = [round(x * 2**18) for x in reals]
    masks = [drawn(seed, "put", 3) for seed in seeds]
    rest = [signed(w - a - b) for w, a, b in zip(encoded, *masks, strict=True)]
    return {
        "reals": reals, "frac": 18, "words": text(encoded), "seed0": seeds[0].hex(), "seed1": seeds[1].hex(),
        "component0": text(masks[0]), "component1": text(masks[1]), "component2": text(rest),
    }  # fmt: skip


def point() -> list[dict[str, Any]]:
    """Keys of one number in either ring, and what they expand to."""
    made, roots = [], [bytes([0x55]) * 16, bytes([0x66]) * 16]
    for ring, bits, rows, position in (("Z64", 64, 5, 3), ("Z32", 32, 9, 6)):
        keys = point_keys(position, rows, bits, roots)
        expanded = [point_words(key, holder, rows, bits) for holder, key in enumerate(keys)]
        total = [signed(x + y, bits) for x, y in zip(*expanded, strict=True)]
        assert total == [int(i == position) for i in range(rows)]
        made.append(
            {"ring": ring, "rows": rows, "number": position, "root0": roots[0].hex(), "root1": roots[1].hex(),
             "key0": keys[0].hex(), "key1": keys[1].hex(), "words0": text(expanded[0]), "words1": text(expanded[1])}
        )  # fmt: skip
    return made


def moves() -> dict[str, Any]:
    """A product, a truncation and a reveal to the client on fixed shares, under simulation keys."""
    seed, p = b"vectors", Parties(b"vectors")
    x = [
        [5 << 40, 11, -(1 << 63), 0],
        [-(3 << 39), 1 << 62, 12345, 0],
        [7, -(1 << 62), (1 << 63) - 4242, 1 << 30],
    ]
    y = [[3, -1, 2, 9], [1, 1 << 20, 0, -4], [0, 5, -7, 1]]
    shut = truncated(p, "/truncate", x, 18)
    zero = [[a - b for a, b in zip(p.draw(i, (i + 1) % 3, "/reveal|zero", 4), p.draw(i, (i + 2) % 3, "/reveal|zero", 4),
                                   strict=True)] for i in range(3)]  # fmt: skip
    summands = [[signed(x[i][e] + zero[i][e]) for e in range(4)] for i in range(3)]
    return {
        "seed": seed.decode(), "keys": {f"{i}{j}": key.hex() for (i, j), key in p.keys.items()},
        "x": [text(part) for part in x], "y": [text(part) for part in y],
        "value_x": text([signed(sum(part[e] for part in x)) for e in range(4)]),
        "product": [text(z) for z in product(p, "/product", x, y)],
        "bits": 18, "truncate": {name: text(values) for name, values in shut.items()},
        "value_truncated": text([signed(shut["c0"][e] + shut["c1"][e] + shut["c2"][e]) for e in range(4)]),
        "reveal": [text(part) for part in summands],
    }  # fmt: skip


def make() -> dict[str, Any]:
    """All vectors."""
    name = tag("/unet/step0:z2")
    fields = [1, 2, 4096, -1, 77]
    return {
        "preamble": {
            "control": (b"sfumato\x02" + bytes(16)).hex(), "run": RUN.hex(), "session": (b"sfumato\x02" + RUN).hex(),
        },
        "tag": {"/unet/step0:z2": name.hex(), "control/digest\x005": tag("control/digest\x005").hex()},
        "frame": [
            {"kind": 1, "dtype": 64 + 18, "tag": name.hex(), "clock": 3, "payload": "0102030405060708ff",
             "bytes": frame(1, 64 + 18, name, 3, bytes.fromhex("0102030405060708ff")).hex()},
            {"kind": 4, "dtype": 0, "tag": bytes(8).hex(), "clock": 0, "payload": "",
             "bytes": frame(4, 0, bytes(8), 0, b"").hex()},
        ],
        "pack": [
            {"bits": bits, "words": text(fields), "bytes": packed(fields, bits).hex()}
            for bits in (1, 3, 12, 18, 33, 64)
        ],
        "prg": [
            {"key": KEY.hex(), "label": "/a/b|mask", "ring": ring, "words": text(drawn(KEY, "/a/b|mask", 4, bits))}
            for ring, bits in (("Z64", 64), ("Z32", 32), ("B8", 8))
        ],
        "handshake": handshake(), "command": commands(), "message": message(), "share": shared(), "point": point(),
        "moves": moves(),
    }  # fmt: skip


# ---- the page ------------------------------------------------------------------------------------------------------


def _table(head: str, rows: list[list[str]]) -> str:
    cells = head.split(" | ")
    lines = ["| " + " | ".join(line) + " |" for line in [cells, ["---"] * len(cells), *rows]]
    return "\n".join(lines)


def _code(value: str) -> str:
    return f"`{value}`" if value else "(none)"


def _spaced(values: list[str]) -> str:
    return _code(", ".join(values))


def tables(made: dict[str, Any]) -> dict[str, str]:
    """The Markdown of each block of the page."""
    m, hands = made["moves"], made["handshake"]
    rows = [
        ["x0, x1, x2", *[_spaced(part) for part in m["x"]]],
        ["y0, y1, y2", *[_spaced(part) for part in m["y"]]],
        ["product: z of P0, P1, P2", *[_spaced(part) for part in m["product"]]],
        ["reveal: summand of P0, P1, P2", *[_spaced(part) for part in m["reveal"]]],
    ]
    shut = m["truncate"]
    said = {
        "a": "P0 to P1, 1 bit each", "b": "P1 to P0, 1 bit each", "ab": f"P2 to P1, {m['bits']} bits each",
        "y0": "P0 to P1", "y1": "P1 to P0", "c0": "component 0", "c1": "component 1", "c2": "component 2",
    }  # fmt: skip
    return {
        "preamble": _table(
            "connection | bytes",
            [["control", _code(made["preamble"]["control"])],
             [f"data of run {_code(made['preamble']['run'])}", _code(made["preamble"]["session"])]],
        ),
        "tag": _table("name | tag", [[_code(k.replace("\0", "[0]")), _code(v)] for k, v in made["tag"].items()]),
        "frame": _table(
            "kind, dtype, clock | tag | payload | bytes",
            [[f"{f['kind']}, {f['dtype']}, {f['clock']}", _code(f["tag"]), _code(f["payload"]), _code(f["bytes"])]
             for f in made["frame"]],
        ),
        "pack": f"Words {_spaced(made['pack'][0]['words'])}:\n\n"
        + _table("bits a field | bytes", [[str(f["bits"]), _code(f["bytes"])] for f in made["pack"]]),
        "prg": f"Key {_code(made['prg'][0]['key'])}, label {_code(made['prg'][0]['label'])}:\n\n"
        + _table("ring | first words", [[f["ring"], _spaced(f["words"])] for f in made["prg"]]),
        "handshake": _table(
            "what | value",
            [["frame tag", _code(hands["tag"])],
             ["nonces of P0, P1", f"32 bytes {_code('11')}, 32 bytes {_code('22')}"],
             ["hello of P0", _code(hands["hello0"])], ["transcript", _code(hands["transcript"])],
             ["info", _code(hands["info"])], ["pair key", _code(hands["key"])]],
        ),
        "message": f"Message number {made['message']['number']}, three frames:\n\n"
        + _table("frame | bytes", [[what, _code(data)] for what, data in
                                  zip(("length", "envelope", "tensor"), made["message"]["frames"], strict=True)]),
        "command": _table(
            "header, then public tensors | digest",
            [[" ".join([_code(c["header"]), *[f"{d}{s} {_code(h)}" for d, s, h in c["tensors"]]]), _code(c["digest"])]
             for c in made["command"]],
        ),
        "share": _table(
            "what | value",
            [["reals", _spaced([str(x) for x in made["share"]["reals"]])], ["words", _spaced(made["share"]["words"])],
             ["seed 0, seed 1", f"32 bytes {_code('33')}, 32 bytes {_code('44')}"],
             *[[f"component {i}", _spaced(made["share"][f"component{i}"])] for i in range(3)]],
        ),
        "point": _table(
            "what | " + " | ".join(f"{c['ring']}, {c['rows']} rows, number {c['number']}" for c in made["point"]),
            [["roots of the first and the second holder", *[f"16 bytes {_code('55')}, 16 bytes {_code('66')}"] * 2],
             *[[name, *[_code(c[name]) for c in made["point"]]] for name in ("key0", "key1")],
             *[[name, *[_spaced(c[name]) for c in made["point"]]] for name in ("words0", "words1")]],
        ),
        "moves": _table("four elements | 0 | 1 | 2", rows) + "\n\n"
        + f"x is {_spaced(m['value_x'])}. The truncation by {m['bits']} bits, path `/truncate`:\n\n"
        + _table("message or result | what | value", [[name, said[name], _spaced(shut[name])] for name in shut])
        + f"\n\nThe result is {_spaced(m['value_truncated'])}.",
    }  # fmt: skip


def filled(page: str, made: dict[str, Any]) -> str:
    """The page with the tables of these vectors between its marks."""
    for name, table in tables(made).items():
        page = re.sub(
            rf"(<!-- vectors: {name} -->\n).*?(<!-- end -->)",
            lambda m, table=table: f"{m[1]}\n{table}\n\n{m[2]}",  # type: ignore[misc]
            page,
            flags=re.S,
        )
    return page


def main() -> None:
    made = make()
    JSON.write_text(json.dumps(made, indent=1, ensure_ascii=True) + "\n", encoding="utf-8")
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), made), encoding="utf-8")


if __name__ == "__main__":
    main()
