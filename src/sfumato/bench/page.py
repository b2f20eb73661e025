"""Records as tables: cells for the terminal and a markdown page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sfumato.bench.machine import machine_line
from sfumato.bench.measure import bound
from sfumato.bench.peers import GOALS, PEERS, Factors, Key, compare, steps_of

__all__ = [
    "NAMES",
    "comparison_header",
    "comparison_row",
    "markdown_table",
    "number",
    "own_header",
    "own_row",
    "page",
]

#: How the peers are called in print.
NAMES = {"spu": "SPU", "crypten": "CrypTen"}

_TOP = """# Beside SPU and CrypTen

`sfumato bench` on the cases that SPU (three parties, ABY3, 64 bit) and CrypTen (two parties, trusted first party) are
measured on: the same weights and inputs, three processes over mutual TLS on one machine. Sharing the inputs, planning
and revealing are outside the timing, as for the peers; the range certificate that a reveal asks for has its own
columns. Medians of the runs that other processes disturbed least, after a warm-up.

- **wall**: until the slowest party is done; in brackets the share of the machine that others used meanwhile.
- **CPU bound**: max(largest party, sum / cores) of the parties' own CPU seconds: the wall time of a quiet machine when
  the network costs nothing. Compare by this one.
- **floor**: max(GEMM work / GEMM rate, bytes / link rate, rounds x round time) with rates measured on this machine,
  what it comes from, and how many times the wall time is above it.
- **MB**: of the party that sends most, as the kernel counts on its sockets (TLS and framing included).
- **steps**: the larger of rounds (the longest chain of messages) and sends of the busiest party (rounds in which it
  sends something, summed over its peers). SPU's: sends of its first party; CrypTen's: rounds.
- **errors**: largest absolute / relative in L2 norm, against float64.
"""


def number(value: float | None, digits: int = 3) -> str:
    """A few significant digits, no exponent for ordinary sizes; "-" for None."""
    if value is None:
        return "-"
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        text = f"{value:.{digits}g}"
        return f"{value:,.0f}" if "e" in text else text
    return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e")


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table, cells as text."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)


def own_header() -> list[str]:
    """Columns of :func:`own_row`."""
    return [
        "case", "weights", "wall s", "CPU bound s", "floor s", "wall / floor", "MB", "rounds", "sends", "certificate",
        "max / rel error",
    ]  # fmt: skip


def own_row(own: Mapping[str, Any]) -> list[str]:
    """What one case takes."""
    head = [str(own["case"]), str(own["weights"])]
    if "error" in own:
        return [*head, f"fails: {own['error']}", *["-"] * (len(own_header()) - 3)]
    certificate = max(own["certificate_bytes_sent_per_party"])
    return [
        *head,
        _wall(own),
        number(own["cpu_bound_s"]),
        f"{number(own['floor_s'])} ({own['floor_from']})",
        f"{own['wall_s'] / own['floor_s']:.1f}" if own["floor_s"] else "-",
        number(max(own["tcp_sent_per_party"]) / 1e6),
        f"{own['rounds']:,}",
        f"{max(own['sends_per_party']):,}",
        f"{own['certificate_rounds']} rounds, {certificate / 1e3:.3g} kB" if certificate else "-",
        _errors(own),
    ]


def comparison_header(peers: Sequence[str] = tuple(PEERS)) -> list[str]:
    """Columns of :func:`comparison_row`."""
    header = ["case", "weights", "CPU bound s", "MB", "steps", "rel error"]
    for peer in peers:
        name = NAMES[peer]
        header += [f"{name}: CPU s, MB, steps", f"{name} / ours", f"{name} rel error", f"against {name}"]
    return header


def comparison_row(
    own: Mapping[str, Any], peers: Mapping[Key, Mapping[str, Any]], names: Sequence[str] = tuple(PEERS)
) -> list[str]:
    """One case beside the peers."""
    cells = [str(own["case"]), str(own["weights"])]
    cells += ["fails", "-", "-", "-"] if "error" in own else [*_figures(own), number(own["rel_l2_err"], 2)]
    for peer in names:
        theirs = peers.get((peer, str(own["case"]), str(own["weights"])))
        found = compare(own, theirs)
        if theirs is None or "error" in theirs:
            cells += ["fails" if theirs else "-", "-", "-", "-"]
            continue
        cells += [", ".join(_figures(theirs))]
        cells += [
            "-" if found is None else ", ".join(_ratio(r) for r in (found.cpu, found.bytes, found.steps)),
            number(theirs["rel_l2_err"], 2),
            "-" if found is None else found.verdict,
        ]
    return cells


def _figures(record: Mapping[str, Any]) -> list[str]:
    steps = steps_of(record)
    return [
        number(bound(record["cpu_s_per_party"])),
        number(max(record["tcp_sent_per_party"]) / 1e6),
        "-" if steps is None else f"{steps:,}",
    ]


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}x"


def _wall(own: Mapping[str, Any]) -> str:
    busy = f" ({own['foreign_cpu']:.0%})" if own["foreign_cpu"] >= 0.1 else ""
    return number(own["wall_s"]) + busy


def _errors(own: Mapping[str, Any]) -> str:
    return f"{number(own['max_abs_err'], 2)} / {number(own['rel_l2_err'], 2)}"


def page(
    records: Sequence[Mapping[str, Any]],
    machine: Mapping[str, Any],
    rates: Mapping[str, float],
    peers: Mapping[Key, Mapping[str, Any]],
) -> str:
    """The markdown page of our records, beside the peers' if there are any."""
    configs = sorted({str(record["config"]) for record in records})
    parts = [_TOP, f"{machine_line(machine)} Configuration: {', '.join(configs)}.", ""]
    parts += [
        f"Rates: {number(rates['gemm_macs_s'] / 1e9)} G multiply-adds of 64 bit a second on a core, "
        f"{number(rates['link_bytes_s'] / 1e6)} MB a second sent by each party, "
        f"{number(rates['round_s'] * 1e6)} µs a round.",
        "",
        markdown_table(own_header(), [own_row(own) for own in records]),
        "",
    ]
    if peers:
        parts += ["## Side by side", "", _legend(), ""]
        parts += [markdown_table(comparison_header(), [comparison_row(own, peers) for own in records]), ""]
        parts += ["## Goals", "", "How many times less than a peer: CPU bound / MB / steps.", ""]
        parts += [markdown_table(["cases", "weights", "SPU", "CrypTen"], _goal_rows()), ""]
    return "\n".join(parts)


def _legend() -> str:
    configs = ", ".join(f"{NAMES[peer]} {config}" for peer, config in PEERS.items())
    return (
        f"Peers' defaults: {configs}. Ratios are theirs over ours (CPU bound, MB of the largest party, steps): above 1 "
        "ours takes less. Verdicts are against the goals below; an error counts as missed when it is larger than the "
        "peer's and above 2e-3. CrypTen's figures leave out the making of its triples."
    )


def _goal_rows() -> list[list[str]]:
    def text(factors: Factors) -> str:
        return " / ".join("-" if factor is None else f"{factor:g}x" for factor in factors)

    return [[", ".join(f"`{c}`" for c in g.cases), g.weights, text(g.spu), text(g.crypten)] for g in GOALS]
