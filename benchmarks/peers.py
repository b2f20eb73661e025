"""sfumato on the cases that SPU and CrypTen were measured on: three processes over mutual TLS.

    python benchmarks/peers.py --cases '^(unet_mnist_28|bert_layer_128)$'

Sharing the inputs, loading the weights and revealing are outside the timing, as for the peers. CPU
seconds are each party's own, as differences of the report around a call. Results: results/peers.json,
results/peers.md.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import cases
import common

import sfumato as sf
from sfumato.graph.plan import client_side
from sfumato.runtime.backend import Backend, open_backend
from sfumato.runtime.report import CostReport

DEFAULT_CASES = "^(unet_mnist_28|bert_layer_128)$"
MEASURED = common.RESULTS / "peers" / "here.jsonl"
EARLIER = common.RESULTS / "peers" / "earlier.jsonl"
RECORD = common.RESULTS / "peers.json"
PAGE = common.RESULTS / "peers.md"
_COUNTED = ("bytes_per_party", "sends_per_party", "kernel_bytes_per_party", "rounds", "by_op")
TARGET_CPU, TARGET_BYTES, TARGET_ERROR = 3.0, 5.0, 2e-3


def measure(case: cases.Case, weights: str, repeat: int, profile: str, backend: str) -> dict[str, Any]:
    """One case: its record."""
    module, inputs = case.built()
    exact = cases.reference(module, inputs)
    started = time.perf_counter()
    plan = sf.make_plan(
        sf.capture(module, inputs),
        secret="inputs+weights" if weights == "secret" and case.has_weights else "inputs",
        profile=profile,
        calibration=[(inputs, {})],
    )
    plan_s = time.perf_counter() - started
    values = client_side(plan, inputs)
    with open_backend(backend) as session:
        session.load("case", plan)
        for name, tensor in values.secrets.items():
            session.put(name, tensor, plan.secret_type(name).frac)
        runs = []
        for i in range(repeat + 1):  # the first is the warm-up
            runs.append(_timed_call(session, i, list(values.secrets), values.publics))
            if i < repeat:
                session.drop(f"out{i}")
        found = session.reveal(f"out{repeat}")
    del runs[0]
    return {
        "case": case.name,
        "weights": weights if case.has_weights else "none",
        "profile": profile,
        **_summary(runs),
        **common.error_against(exact, found),
        "plan_s": round(plan_s, 3),
        "runs": len(runs),
    }


def _timed_call(session: Backend, i: int, names: list[str], publics: Mapping[str, Any]) -> dict[str, Any]:
    before = session.report()
    with common.Foreign() as foreign:
        session.call("case", f"call{i}", {n: n for n in names}, publics, [f"out{i}"])
    after = session.report()
    cpu = _difference(after.cpu_seconds, before.cpu_seconds)
    return {
        "wall_s": foreign.wall,
        "cpu_s_per_party": cpu,
        "foreign_cpu": foreign.share(sum(cpu)),
        "bytes_per_party": _difference(after.bytes_sent, before.bytes_sent),
        "sends_per_party": _difference(after.sends, before.sends),
        "kernel_bytes_per_party": _difference(after.kernel_bytes, before.kernel_bytes),
        "rounds": after.rounds - before.rounds,
        "peak_memory": list(after.peak_memory),
        "by_op": _by_op(before, after),
    }


def _difference(after: Iterable[float], before: Iterable[float]) -> list[Any]:
    return [a - b for a, b in zip(after, before, strict=False)]


def _by_op(before: CostReport, after: CostReport) -> dict[str, int]:
    """Bytes of all parties by ATen name."""
    sums: dict[str, int] = {}
    for path, cost in after.by_path.items():
        old = before.by_path.get(path)
        sent = sum(cost.bytes_sent) - (sum(old.bytes_sent) if old else 0)
        if sent:
            op = path.rsplit("/", 1)[-1].rstrip("0123456789").rstrip("_")
            sums[op] = sums.get(op, 0) + sent
    return dict(sorted(sums.items(), key=lambda item: -item[1]))


def _summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians; counted cost is the same in every run."""
    cpu = [round(statistics.median(c), 4) for c in zip(*(r["cpu_s_per_party"] for r in runs), strict=True)]
    return {
        "wall_s": round(statistics.median([r["wall_s"] for r in runs]), 4),
        "wall_min_s": round(min(r["wall_s"] for r in runs), 4),
        "cpu_s_per_party": cpu,
        "foreign_cpu": round(max(r["foreign_cpu"] for r in runs), 3),
        **{key: runs[0][key] for key in _COUNTED},
        "peak_memory": runs[-1]["peak_memory"],
    }


# ---- the peers' figures, and the page ----------------------------------------------------------------------


def peer_records() -> dict[tuple[str, str, str], dict[str, Any]]:
    """By (peer, case, weights); those measured on this machine beside ours replace earlier ones."""
    found = {}
    for path, where in ((EARLIER, "earlier"), (MEASURED, "here")):
        lines = path.read_text().splitlines() if path.exists() else []
        for line in lines:
            record = json.loads(line)
            has_weights = any(c.has_weights for c in cases.all_cases() if c.name == record["case"])
            weights = record["weights"] if has_weights else "none"
            found[record["peer"], record["case"], weights] = {**record, "measured": where}
    return found


def page(record: Mapping[str, Any]) -> str:
    """The markdown page of a record."""
    peers = peer_records()
    header = [
        "case", "weights", "CPU s, all parties", "CPU bound s", "wall s", "MB sent", "rounds",
        "max / rel error", "SPU: CPU, bytes", "SPU rel error", "CrypTen: CPU, bytes", "CrypTen rel error",
    ]  # fmt: skip
    rows = [_row(own, peers) for own in record["cases"]]
    table = common.markdown_table(header, rows)
    parts = [_TOP, common.machine_line(record["machine"]), "", table, "", _verdict(record, peers), ""]
    return "\n".join([*parts, _ops(record), ""])


_TOP = """# The peers' cases

`peers.py` runs the cases on which SPU 0.9.5 (three parties, ABY3, 64 bit) and CrypTen 0.4.1 (two
parties, trusted first party) were measured: the same weights, the same inputs, three processes over
mutual TLS on one machine, profile `precise`. CPU seconds are the parties' own, median over the calls
after a warm-up. CPU bound is max(largest party, sum / cores): the wall time of a quiet machine of two
cores when the network costs nothing. Other jobs shared the machine, so compare CPU and bytes, not wall
time. MB are the payload of all three parties together. Under each peer: how many times *its* CPU
seconds and its bytes on the wire (each summed over its parties) are ours; above 1 it takes more. `*`:
measured on this machine two hours before, while other jobs took most of it, ours on a quiet machine:
against SPU's quieter figures on a machine of the same kind (18.2 and 24.8 CPU s) the two `*` rows are 9.1x
and 18x. Otherwise: earlier, on a machine of the same kind; rows other than unet and bert ours, too,
under load. CrypTen's figures leave out the making of its triples.
"""


def _row(own: Mapping[str, Any], peers: Mapping[tuple[str, str, str], Mapping[str, Any]]) -> list[str]:
    cpu, sent = own["cpu_s_per_party"], sum(own["bytes_per_party"])
    cells = [
        own["case"], own["weights"], common.number(sum(cpu)), common.number(max(max(cpu), sum(cpu) / 2)),
        common.number(own["wall_s"]), common.number(sent / 1e6), f"{own['rounds']:,}",
        f"{common.number(own['max_abs_err'], 2)} / {common.number(own['rel_l2_err'], 2)}",
    ]  # fmt: skip
    for peer in ("spu", "crypten"):
        theirs = peers.get((peer, own["case"], own["weights"]))
        if theirs is None:
            cells += ["", ""]
            continue
        mark = "*" if theirs["measured"] == "here" else ""
        cpu_ratio, byte_ratio = ratios(own, theirs)
        cells += [f"{cpu_ratio:.1f}x, {byte_ratio:.1f}x{mark}", common.number(theirs["rel_l2_err"], 2)]
    return cells


def ratios(own: Mapping[str, Any], theirs: Mapping[str, Any]) -> tuple[float, float]:
    """(CPU, bytes that the kernel sent) of the peer over ours, summed over parties."""
    cpu = sum(theirs["cpu_s_per_party"]) / sum(own["cpu_s_per_party"])
    return cpu, sum(theirs["tcp_sent_per_party"]) / sum(
        own["kernel_bytes_per_party"] or own["bytes_per_party"]
    )


def _verdict(record: Mapping[str, Any], peers: Mapping[tuple[str, str, str], Mapping[str, Any]]) -> str:
    lines = ["## Targets: secret weights, against SPU", ""]
    for own in record["cases"]:
        if own["case"] not in ("unet_mnist_28", "bert_layer_128") or own["weights"] != "secret":
            continue
        theirs = peers["spu", own["case"], "secret"]
        cpu, sent = ratios(own, theirs)
        right = own["rel_l2_err"] <= max(TARGET_ERROR, theirs["rel_l2_err"])
        met = cpu >= TARGET_CPU and sent >= TARGET_BYTES and right
        lines.append(
            f"- {own['case']}: {cpu:.1f} times less CPU (target {TARGET_CPU:g}), {sent:.1f} times fewer "
            f"bytes (target {TARGET_BYTES:g}), relative error {common.number(own['rel_l2_err'], 2)} against "
            f"{common.number(theirs['rel_l2_err'], 2)}: {'met' if met else 'missed'}."
        )
    return "\n".join(lines)


def _ops(record: Mapping[str, Any]) -> str:
    lines = ["## Where the bytes go", ""]
    for own in record["cases"]:
        if len(own["by_op"]) < 3:
            continue
        total = sum(own["by_op"].values())
        parts = [f"{op} {sent / total:.0%}" for op, sent in list(own["by_op"].items())[:6]]
        lines.append(f"- {own['case']} ({own['weights']}): {', '.join(parts)}.")
    return "\n".join(lines)


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--cases", default=DEFAULT_CASES, help="regular expression on names")
    parser.add_argument("--weights", choices=("secret", "public", "both"), default="secret")
    parser.add_argument("--profile", default="precise")
    parser.add_argument("--repeat", type=int, default=3, help="calls measured after the warm-up")
    parser.add_argument("--backend", choices=("local", "simulate"), default="local")
    parser.add_argument("--out", type=Path, default=RECORD, help="JSON; cases measured before are kept")
    args = parser.parse_args()
    record = json.loads(args.out.read_text()) if args.out.exists() else {"cases": []}
    for case in cases.select(args.cases):
        kinds = ("secret", "public") if args.weights == "both" and case.has_weights else (args.weights,)
        for weights in kinds:
            own = measure(case, weights, args.repeat, args.profile, args.backend)
            print(json.dumps({k: v for k, v in own.items() if k != "by_op"}), flush=True)
            same = (own["case"], own["weights"], own["profile"])
            record["cases"] = [c for c in record["cases"] if (c["case"], c["weights"], c["profile"]) != same]
            record["cases"].append(own)
            record["machine"] = common.machine()
            common.write_json(args.out, record)
    if args.out == RECORD:
        PAGE.write_text(page(record))


if __name__ == "__main__":
    main()
