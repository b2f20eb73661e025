"""The page of ``cipherdm.py``: SPU's records and ours in the same tables, and what holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import common

Record = Mapping[str, Any]

#: CipherDM's ratios over plain SPU, least and largest (abstract of arXiv 2409.05414).
PUBLISHED = {"time": (1.084, 2.328), "traffic": (1.212, 1.791)}
#: How many times fewer bytes than plain SPU are asked of ours.
ASKED = 10
#: SPU's settings as rows.
SETTINGS = {
    "spu-default": "SPU, its own defaults", "spu": "SPU as CipherDM configures it",
    "softmax": "+ CipherDM's softmax", "silu": "+ CipherDM's SiLU", "both": "CipherDM: both",
}  # fmt: skip
OURS = {"fast": "ours, `fast`", "precise": "ours, `precise`"}
GROUPS = {"softmax": "softmax", "silu": "SiLU", "norm": "group normalisation", "linear": "products"}
_FEW = "fast, DPM-Solver++ 10"

_TOP = """# CipherDM's MNIST U-Net: SPU, CipherDM and ours

The network of CipherDM (15,881 parameters, digits 0 and 1) with the weights that come with sfumato, under three parties
with an honest majority, each a process of one machine. Weights and class are secret, the time and the schedule public.
SPU is 0.9.5, ABY3, FM64, 18 fraction bits, over plain TCP (`benchmarks/peers/README.md`); ours is rep3 over mutual TLS
(`benchmarks/cipherdm.py`). Same weights, class and first noise, which is public for SPU, as in CipherDM, and secret for
ours.

- **MB**: what the kernel counts on the sockets of the party that sends most, framing and TLS included.
- **CPU s**: user and system seconds of the busiest party. Other work ran on the machine, so wall seconds say nothing.
- **sends**: SPU's own count at its first party; ours: rounds in which the busiest party sends, summed over its peers.
- **error**: relative in L2 norm, against the exact network in float32 with the same sampler.
- **SPU over it**: the baseline "SPU as CipherDM configures it" over this row, above 1 where this row takes less.
- Sharing, compiling or planning, and loading are outside all figures. The range certificates of ours are inside an
  image's figures and outside a prediction's.
"""
_IMAGES = """## An image

*Measured*: one image drawn. *Computed*: SPU's step times the number of steps, or ours from the image of 50 steps: the
loop repeats the same computation. The step of SPU that is repeated is from the middle of a run.
"""
_PREDICTION = """## One prediction

From the middle of a run. SPU: medians of two runs after a warm-up; ours of three.
"""
_OPERATORS = """## By operator

The calls of one prediction, those of an operator alone and side by side. Their sum is not the whole: ours joins
neighbouring operations, and calls of ours that do not depend on each other share rounds. MB, CPU s:
"""
_PLANNED = """Payload of a prediction by operator where it stands, in MB of the party that sends most, exact from the
plan. The plans `spu` and `cipherdm` run those systems' functions on *our* protocol: their columns differ by the
functions alone. Attention is scores, softmax and weighted sum; the rest is elementwise products. The exponential of
`spu` is that of its defaults, eight squarings.
"""
_RATIOS = """## CipherDM's ratios

How many times less than plain SPU. Published: the least and the largest, of wall seconds and bytes; which configuration
gave which cannot be read. The other rows are measured here: CPU seconds and MB.
"""
_SD15 = """## A Stable Diffusion 1.5 U-Net, planned

The second network that CipherDM reports. One evaluation at batch 1, the full configuration with random weights,
weights public. Payload in GB of the party that sends most, by operator, exact from the plan; nothing was run. Ranges
are from one other input. "SPU's prices": the same operations at what SPU 0.9.5 sends for each
(`sfumato.graph.prices`), a third of all parties' bytes.
"""


def page(record: Record, peer: Sequence[Record]) -> str:
    """The markdown page of our record and of SPU's lines."""
    spu = {(r["setting"], r["case"]): r for r in reversed(peer) if r["config"].startswith("ABY3")}
    parts = [_TOP, common.machine_line(record["machine"]), "", *_findings(record, spu, peer)]
    parts += ["", _IMAGES, _images(record, spu), "", _PREDICTION, _predictions(record, spu)]
    parts += ["", _OPERATORS, _operators(record, spu), "", _PLANNED, _planned(record["planned"], 1e6)]
    parts += ["", _RATIOS, _ratios(spu)]
    return "\n".join([*parts, *_stable_diffusion(record["sd15"]), ""])


# ---- figures -----------------------------------------------------------------------------------------------


def _figures(found: Record, times: float = 1.0) -> dict[str, Any]:
    """MB, CPU, sends and rounds of the largest party, so many times; the error where it is of the thing itself."""
    own = "sends_per_party" in found
    return {
        "mb": max(found["tcp_sent_per_party"]) / 1e6 * times,
        "cpu": max(found["cpu_s_per_party"]) * times,
        "sends": round((max(found["sends_per_party"]) if own else found["spu_sends"]) * times),
        "rounds": round(found["rounds"] * times) if own else None,
        "error": found["rel_l2_err"] if times == 1 else None,
    }


def _of_image(setting: str, steps: int, spu: Record) -> tuple[dict[str, Any], str] | None:
    drawn, step = spu.get((setting, "cipherdm_ddim50")), spu.get((setting, "cipherdm_step"))
    if steps == 50 and drawn:
        return _figures(drawn), "measured"
    return (_figures(step, steps), "computed") if step else None


_HEADER = ["MB", "CPU s", "sends", "rounds", "error", "SPU over it: MB", "CPU", "sends"]


def _cells(found: Record, base: Record | None) -> list[str]:
    cells = [*map(_large, (found["mb"], found["cpu"])), f"{found['sends']:,}"]
    cells.append("-" if found["rounds"] is None else f"{found['rounds']:,}")
    cells.append(common.number(found["error"], 2))
    return cells + [
        "-" if base is None else common.number(base[k] / found[k]) for k in ("mb", "cpu", "sends")
    ]


def _large(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else common.number(value)


# ---- tables ------------------------------------------------------------------------------------------------


def _images(record: Record, spu: Record) -> str:
    rows = []
    for name, steps in (("DDIM, 50 steps", 50), ("DDPM, 1000 steps", 1000)):
        base = _of_image("spu", steps, spu)
        found = {label: _of_image(setting, steps, spu) for setting, label in SETTINGS.items()}
        for profile, label in OURS.items():
            drawn = record["images"].get(f"{profile}, DDIM 50")
            if drawn:
                found[label] = _figures(drawn, steps / 50), "measured" if steps == 50 else "computed"
        for label, pair in found.items():
            if pair:
                rows.append([name, label, *_cells(pair[0], base[0] if base else None), pair[1]])
    few = record["images"].get(_FEW)
    if few:
        base = _of_image("spu", 50, spu)
        rows.append(
            ["DPM-Solver++, 10 steps", OURS["fast"], *_cells(_figures(few), base and base[0]), "measured"]
        )
    note = "The image of CipherDM's two functions was drawn twice; the row is the first run, both errors are above. "
    note += "The last row's ratios are over SPU's 50 steps; its error is against its own sampler in float."
    return common.markdown_table(["image", "functions", *_HEADER, ""], rows) + "\n\n" + note


def _predictions(record: Record, spu: Record) -> str:
    base = _figures(spu["spu", "cipherdm_unet"])
    found = {label: spu.get((setting, "cipherdm_unet")) for setting, label in SETTINGS.items()}
    found |= {label: record["predictions"].get(f"{profile}/unet") for profile, label in OURS.items()}
    rows = [[label, *_cells(_figures(r), base)] for label, r in found.items() if r and "error" not in r]
    return common.markdown_table(["functions", *_HEADER], rows)


def _operators(record: Record, spu: Record) -> str:
    rows = []
    for group, name in GROUPS.items():
        known = [spu.get((setting, f"cipherdm_unet/{group}")) for setting in ("spu", "both")]
        known += [record["predictions"].get(f"{profile}/{group}") for profile in OURS]
        found = [None if r is None or "error" in r else _figures(r | {"rel_l2_err": None}) for r in known]
        cells = ["-" if f is None else f"{common.number(f['mb'])}, {common.number(f['cpu'])}" for f in found]
        base, fast = found[0], found[2]
        ratio = "-"
        if base and fast:
            ratio = f"{common.number(base['mb'] / fast['mb'])}, {common.number(base['cpu'] / fast['cpu'])}"
        rows.append([name, str(known[0]["calls"]) if known[0] else "-", *cells, ratio])
    header = ["operator", "calls", "SPU", "CipherDM", *OURS.values(), "SPU over `fast`: MB, CPU"]
    return common.markdown_table(header, rows)


def _planned(found: Record, unit: float) -> str:
    """Payload by operator of several profiles."""
    names = list(
        dict.fromkeys(name for plan in found.values() for name in plan["operators"] if name != "rest")
    )
    rows = [
        [name, *(common.number(plan["operators"].get(name, 0) / unit) for plan in found.values())]
        for name in [*names, "rest"]
    ]
    rows.append(["all", *(common.number(max(p["bytes_sent_per_party"]) / unit) for p in found.values())])
    rows.append(["rounds", *(f"{plan['rounds']:,}" for plan in found.values())])
    return common.markdown_table(["operator", *(f"`{name}`" for name in found)], rows)


def _ratios(spu: Record) -> str:
    rows = [["CipherDM, published", "their runs", *(f"{low} to {high}" for low, high in PUBLISHED.values())]]
    for setting in ("softmax", "silu", "both"):
        for case, what in (("step", "step"), ("unet", "prediction"), ("ddim50", "image of 50 steps")):
            base, found = (spu.get((s, f"cipherdm_{case}")) for s in ("spu", setting))
            if base and found:
                a, b = _figures(base), _figures(found)
                rows.append([SETTINGS[setting], what, *(common.number(a[k] / b[k]) for k in ("cpu", "mb"))])
    return common.markdown_table(["functions", "of", "time", "traffic"], rows)


def _stable_diffusion(found: Record) -> list[str]:
    parts: list[str] = []
    for size in dict.fromkeys(key.rpartition("/")[0] for key in found):
        name, _, pixels = size.partition("/")
        if name != "sd15":
            continue
        plans = {key.rpartition("/")[2]: value for key, value in found.items() if key.startswith(f"{size}/")}
        prices = common.number(next(iter(plans.values()))["spu_bytes"] / 1e9)
        parts += [f"{pixels}x{pixels} pixels, latents an eighth of it. SPU's prices: {prices} GB.", ""]
        parts += [_planned(plans, 1e9), ""]
    return ["", _SD15, *parts[:-1]] if parts else []


# ---- what holds --------------------------------------------------------------------------------------------


def _findings(record: Record, spu: Record, peer: Sequence[Record]) -> list[str]:
    """Plain sentences, each from the figures."""
    kinds = ("spu", "spu-default", "both")
    known = [_of_image(setting, 50, spu) for setting in kinds]
    fast, few = (record["images"].get(name) for name in ("fast, DDIM 50", _FEW))
    if not (all(known) and fast and few):
        return []
    plain, default, theirs = (pair[0] for pair in known if pair)
    ours, short = _figures(fast), _figures(few)
    fewer, less = (plain[k] / ours[k] for k in ("mb", "cpu"))
    cut = _figures(spu["spu", "cipherdm_step"])["mb"] / _figures(spu["both", "cipherdm_step"])["mb"]
    cases = ("cipherdm_unet/softmax", "cipherdm_unet")
    softmax, whole = (max(spu["spu", case]["tcp_sent_per_party"]) for case in cases)
    low, high = PUBLISHED["traffic"]
    return [
        f"- Asked: at least {ASKED} times fewer bytes than plain SPU on this model. "
        f"**{'Reached' if fewer >= ASKED else 'Not reached'}**: for an image of 50 steps `fast` sends "
        f"{ours['mb']:,.0f} MB instead of {plain['mb']:,.0f}, {fewer:.1f} times fewer (of SPU at its own defaults "
        f"{default['mb'] / ours['mb']:.1f}), in {less:.1f} times fewer CPU seconds, with a relative error of "
        f"{common.number(ours['error'], 2)} instead of {common.number(plain['error'], 2)}.",
        f"- CipherDM's own functions on SPU send {theirs['mb']:,.0f} MB, {theirs['mb'] / ours['mb']:.1f} times ours. "
        f"They cut a step's bytes by {cut:.2f}; published: {low} to {high}.",
        *_lost(peer),
        f"- DPM-Solver++ at 10 steps takes {short['mb']:,.0f} MB, {plain['mb'] / short['mb']:.0f} times fewer than "
        f"SPU's 50 steps; a factor of 5 of that is the number of steps, which SPU could take as well.",
        f"- On plain SPU the softmax is {softmax / whole:.0%} of a prediction's bytes.",
        *_planned_findings(record["sd15"]),
    ]


def _planned_findings(found: Record) -> list[str]:
    sent = {key: max(plan["bytes_sent_per_party"]) / 1e9 for key, plan in found.items()}
    if "sd15/512/fast" not in sent:
        return []
    spu, theirs, ours = (sent[f"sd15/512/{profile}"] for profile in ("spu", "cipherdm", "fast"))
    attention = found["sd15/512/fast"]["operators"]["attention"] / 1e9 / ours
    return [
        f"- Stable Diffusion 1.5's U-Net at 512 pixels, planned: `fast` would send {ours:.1f} GB a party, with "
        f"CipherDM's functions on the same protocol {theirs:.0f}, with SPU's {spu:.0f}. Attention is "
        f"{attention:.0%} of `fast`."
    ]


def _lost(peer: Sequence[Record]) -> list[str]:
    """What CipherDM's functions do to the image: every run of SPU, SPU's reference of the same ring, and float."""
    drawn = [r for r in peer if r["setting"] == "both" and r["case"] == "cipherdm_ddim50"]
    secure, reference, clear = (
        [r for r in drawn if r["config"].startswith(kind)] for kind in ("ABY3", "REF2K", "float")
    )
    if not (secure and reference and clear):
        return []
    errors = " and ".join(common.number(r["rel_l2_err"], 2) for r in secure)
    exact = clear[0]
    return [
        f"- CipherDM's functions do not give that image. Relative error: {errors} on SPU (runs of the same image), "
        f"{common.number(reference[0]['rel_l2_err'], 2)} in SPU's reference of the same ring without security "
        f"({reference[0]['batch']} images), {common.number(exact['rel_l2_err'], 2)} in float, where "
        f"{exact['negative']:,} of {exact['denominators']:,} softmax denominators are negative (least "
        f"{common.number(exact['least'], 2)}, nearest to 0 "
        f"{common.number(exact['nearest_to_0'], 2)}): their exponential is negative in places."
    ]
