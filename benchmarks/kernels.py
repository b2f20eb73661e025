"""The native kernels beside their twins in torch and numpy: one thread, CPU time, the best of several.

python benchmarks/kernels.py    writes results/kernels.json and results/kernels.md
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import common
import torch
from torch import Tensor

from sfumato.ring import closing, fixed, kernels, native, pack, planes, trig
from sfumato.types import Z32, Z64

PRODUCTS = [
    ("512 x 512 x 512", (512, 512), (512, 512), False),
    ("1024 x 1024 x 1024", (1024, 1024), (1024, 1024), False),
    ("128 x 768 x 3072", (128, 768), (768, 3072), False),
    ("128 x 768 x 3072, right operand turned", (128, 768), (768, 3072), True),
    ("128 x 768 x 768", (128, 768), (768, 768), False),
    ("12 of 128 x 64 x 128", (12, 128, 64), (12, 64, 128), False),
    ("32 x 768 x 768, right operand turned", (32, 768), (768, 768), True),
]
CONVS = [
    # images, channels, outputs, side, kernel, stride
    (1, 64, 64, 32, 3, 1), (1, 320, 320, 32, 3, 1), (2, 32, 32, 28, 3, 1), (2, 64, 64, 14, 3, 1),
    (1, 1280, 1280, 8, 3, 1), (1, 64, 64, 32, 3, 2), (1, 320, 320, 32, 1, 1),
]  # fmt: skip
COUNT = 1 << 16


def seconds(run: Callable[[], Any], repeats: int) -> float:
    """Least CPU seconds of one call."""
    run()
    times = []
    for _ in range(repeats):
        began = time.thread_time()
        run()
        times.append(time.thread_time() - began)
    return min(times)


def words(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randint(torch.iinfo(dtype).min, torch.iinfo(dtype).max, shape, dtype=dtype)


def cases(dtype: torch.dtype) -> Iterator[tuple[str, int, Callable[[], Any], Callable[[], Any]]]:
    """Name, products per call (0: not a product), native, twin."""
    for name, left, right, turned in PRODUCTS:
        a, b = words(left, dtype), words(right, dtype)
        b = b.mT.contiguous().mT if turned else b
        yield (
            name,
            a.numel() * right[-1],
            lambda a=a, b=b: native.matmul(a, b),
            lambda a=a, b=b: kernels._multiply(a, b),
        )
    for n, c, o, side, k, stride in CONVS:
        x, w, pad = words((n, c, side, side), dtype), words((o, c, k, k), dtype), k // 2
        options = ((stride, stride), (pad, pad), (1, 1), 1)
        name = f"conv {k}x{k} / {stride}, {n} x {c} x {side} x {side} to {o}"
        yield (
            name, n * o * (-(-side // stride)) ** 2 * c * k * k,
            lambda x=x, w=w, options=options: native.conv(x, w, *options),
            lambda x=x, w=w, options=options: kernels._convolve(x, w, *options),
        )  # fmt: skip
    flat, top = words((COUNT,), dtype), dtype.itemsize * 8
    size = pack.packed_bytes(COUNT, 27)
    packed = pack._pack(flat, 27)
    yield "pack 27 bits", 0, lambda: native.pack(flat, 27, size), lambda: pack._pack(flat, 27)
    yield (
        "unpack 27 bits", 0,
        lambda: native.unpack(packed, 27, (COUNT,), dtype), lambda: pack._unpack(packed, 27, (COUNT,), dtype),
    )  # fmt: skip
    x = torch.randn(COUNT)
    ring = Z64 if dtype == torch.int64 else Z32
    yield (
        "encode float32", 0,
        lambda: native.encode(x, dtype, 2.0**18, 2.0 ** (top - 2)), lambda: fixed._encode(x, ring, 18),
    )  # fmt: skip
    yield "16 bit planes", 0, lambda: native.planes(flat, 16, 0), lambda: planes._to_planes(flat, 16, 0)
    yield "close: judge", 0, lambda: native.judge(flat, top, 18), lambda: closing._judge(flat, top, 18)
    bits = (flat & 1).to(torch.uint8)
    up = (flat, top, 18, dtype, bits, bits, bits, flat)
    yield "close: round up", 0, lambda: native.rounded_up(*up), lambda: closing._rounded_up(*up)
    yield "close: round down", 0, lambda: native.rounded_down(*up), lambda: closing._rounded_down(*up)
    mask, phase, table, weights = flat.to(torch.int64), trig._phase(31), trig._table(), [1 << 27] * 20
    dealt = trig._dealt(mask, 31, 20, 18, dtype)
    yield (
        "20 harmonics dealt", 0,
        lambda: native.dealt(mask, phase, *table, 20, 12, dtype), lambda: trig._dealt(mask, 31, 20, 18, dtype),
    )  # fmt: skip
    yield (
        "20 harmonics weighted", 0,
        lambda: native.weighted(mask, phase, *table, dealt, weights, weights, 40),
        lambda: trig._weighted(mask, 31, dealt, weights, weights, 40),
    )  # fmt: skip


def page(record: dict[str, Any]) -> str:
    rows = []
    for row in record["rows"]:
        ours, theirs, products = row["native_s"], row["twin_s"], row["products"]
        rates = [f"{products / s / 1e9:.1f}" if products else "" for s in (ours, theirs)]
        times = [common.number(s * 1e6) for s in (ours, theirs)]
        rows.append(
            [row["case"], row["dtype"].removeprefix("torch."), *times, *rates, f"{theirs / ours:.1f}"]
        )
    header = ["case", "words", "native, us", "twin, us", "native, GMAC/s", "twin, GMAC/s", "times"]
    return "\n".join(
        [
            f"# Native kernels and their twins\n\n{common.machine_line(record['machine'])} {record['kernels']}.",
            f"One thread, CPU time, the best of {record['repeats']}. Elementwise cases: {record['count']} words. A",
            "convolution's rate counts the products of its definition, of which 3x3 at stride 1 does 4 in 9.",
            "",
            common.markdown_table(header, rows),
            "",
        ]
    )


def main() -> None:
    command = common.parser(__doc__)
    command.add_argument("--repeats", type=int, default=7)
    command.add_argument("--out", type=Path, default=common.RESULTS / "kernels.json")
    args = command.parse_args()
    torch.set_num_threads(1)
    if not native.available():
        raise SystemExit(native.describe())
    rows = []
    for dtype in (torch.int64, torch.int32):
        for name, products, run, twin in cases(dtype):
            ours, theirs = seconds(run, args.repeats), seconds(twin, args.repeats)
            rows.append(
                {"case": name, "dtype": str(dtype), "products": products, "native_s": ours, "twin_s": theirs}
            )
            print(f"{dtype} {name}: {ours * 1e6:.0f} us, twin {theirs * 1e6:.0f} us", flush=True)
    record = {
        "machine": common.machine(), "kernels": native.describe(), "repeats": args.repeats, "count": COUNT, "rows": rows
    }  # fmt: skip
    common.write_json(args.out, record)
    args.out.with_suffix(".md").write_text(page(record))


if __name__ == "__main__":
    main()
