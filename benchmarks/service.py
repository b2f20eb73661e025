"""Fifty jobs from four clients against one deployment: results, memory, throughput, latency.

    python benchmarks/service.py --jobs 50 --clients 4

Three parties as their operators start them, one model that its owner shared with secret weights (the embedded pipeline,
ten steps with guidance), and as many client processes as asked, each with a certificate of its own and its part of the
jobs. Every image is compared with the float one of the same seed. Memory of a party is that of its supervisor and
everything that it forked, as the system counts it (proportional set size), read at the end of each job. Pages:
results/service.json and results/service.md.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import common
from kills import Parties
from tqdm import tqdm

RECORD, PAGE = common.RESULTS / "service.json", common.RESULTS / "service.md"
PROMPTS = ("a handwritten seven", "a sneaker", "the digit three", "a small dress", "a picture of a handbag")

#: What a client process runs: its jobs one after another, a line of JSON for each.
JOBS = """
import json, sys, time
import numpy as np
import torch
import sfumato as sf
torch.set_num_threads(1)
cluster, first, count, prompts = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4])
exact = sf.SecurePipeline.from_pretrained("embedded", backend="plain")
exact.set_progress_bar_config(disable=True)
pipe = sf.SecurePipeline.from_pretrained("cluster:sketches", cluster=cluster)
pipe.set_progress_bar_config(disable=True)
for job in range(first, first + count):
    prompt = prompts[job % len(prompts)]
    given = {"num_inference_steps": 10, "guidance_scale": 4.0, "output_type": "np"}
    begun = time.time()
    try:
        out = pipe(prompt, generator=torch.Generator().manual_seed(job), **given)
    except sf.SfumatoError as error:
        print(json.dumps({"job": job, "error": str(error)}), flush=True)
        continue
    ended = time.time()
    wanted = exact.plain(prompt, generator=torch.Generator().manual_seed(job), **given).images[0]
    error = float(np.mean((np.float64(wanted) - np.float64(out.images[0])) ** 2))
    line = {"job": job, "begun": begun, "ended": ended, "run_s": out.report.seconds, "bytes": out.report.total_bytes}
    line["psnr_db"] = min(100.0, -10 * np.log10(max(error, 1e-10)))
    print(json.dumps(line), flush=True)
"""


def memory_of(parties: Parties, index: int) -> int:
    """Bytes of a party's processes, pages that several share counted once."""
    total = 0
    for process in parties.family(index):
        try:
            for line in Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) * 1024
        except OSError:
            continue
    return total


def measure(jobs: int, clients: int) -> dict[str, Any]:
    """The record of one run."""
    names = [f"client{i}" for i in range(clients)]
    with tempfile.TemporaryDirectory(prefix="service-") as folder:
        parties = Parties(Path(folder), clients=names)
        try:
            share = [
                sys.executable,
                "-m",
                "sfumato.shell.cli",
                "model",
                "share",
                "embedded",
                "--name",
                "sketches",
            ]
            share += ["--secret", "inputs+weights", "--steps", "10", "--yes"]
            subprocess.run([*share, "--cluster", f"{folder}/ours/owner/cluster.toml"], check=True)
            return _run(parties, names, jobs)
        finally:
            parties.close()


def _run(parties: Parties, names: list[str], jobs: int) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    failed: list[dict[str, Any]] = []
    lock, shares = threading.Lock(), [jobs // len(names) + (i < jobs % len(names)) for i in range(len(names))]

    def one(number: int, bar: tqdm[Any]) -> None:
        cluster = parties.folder / "ours" / names[number] / "cluster.toml"
        arguments = [str(cluster), str(sum(shares[:number])), str(shares[number]), json.dumps(PROMPTS)]
        with subprocess.Popen(
            [sys.executable, "-c", JOBS, *arguments], stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                row = {"client": names[number], **json.loads(line)}
                if "error" in row:
                    with lock:
                        failed.append(row)
                    continue
                row["memory"] = [memory_of(parties, i) for i in range(3)]
                with lock:
                    rows.append(row)
                    bar.update()

    with tqdm(total=jobs) as bar:
        threads = [threading.Thread(target=one, args=(i, bar)) for i in range(len(names))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    deadline = time.monotonic() + 10
    while any(row.get("running") for row in parties.status()) and time.monotonic() < deadline:
        time.sleep(0.1)
    idle = [memory_of(parties, i) for i in range(3)]
    return {
        "machine": common.machine(),
        "jobs": jobs,
        "clients": len(names),
        "rows": rows,
        "failed": failed,
        "idle_memory": idle,
    }


def page(record: dict[str, Any]) -> str:
    """The page of a record."""
    rows = sorted(record["rows"], key=lambda r: r["ended"])
    waits = [r["ended"] - r["begun"] for r in rows]
    span = rows[-1]["ended"] - min(r["begun"] for r in rows)
    peaks = [max(r["memory"]) for r in rows]
    by_client = {
        name: [r["ended"] - r["begun"] for r in rows if r["client"] == name]
        for name in {r["client"] for r in rows}
    }
    means = [statistics.fmean(found) for found in by_client.values()]
    quality, right = [r["psnr_db"] for r in rows], sum(r["psnr_db"] >= 40 for r in rows)
    # What the others' sessions hold at that moment is in it, so medians tell whether it grows.
    fifths = [peaks[i * len(peaks) // 5 : (i + 1) * len(peaks) // 5] for i in range(5)]
    trend = ", ".join(f"{statistics.median(part) / 1e6:.0f}" for part in fifths)
    idle = ", ".join(f"{m / 1e6:.0f}" for m in record["idle_memory"])
    table = [
        ["jobs that gave the right image (PSNR >= 40 dB)", f"{right} of {record['jobs']}"],
        ["jobs that ended in an error", str(len(record["failed"]))],
        ["PSNR, lowest and median", f"{min(quality):.1f}, {statistics.median(quality):.1f} dB"],
        ["throughput", f"{60 * len(rows) / span:.1f} images a minute"],
        [
            "latency with the wait for a turn: median, longest",
            f"{statistics.median(waits):.1f} s, {max(waits):.1f} s",
        ],
        ["a run by itself, median", f"{statistics.median(r['run_s'] for r in rows):.1f} s"],
        ["mean latency by client: shortest, longest", f"{min(means):.1f} s, {max(means):.1f} s"],
        ["memory of the largest party at the end of a job, median of each fifth of the jobs", f"{trend} MB"],
        ["the same, largest", f"{max(peaks) / 1e6:.0f} MB"],
        ["the same with no session left, by party", f"{idle} MB"],
    ]
    head = ["measured", f"{record['jobs']} jobs, {record['clients']} clients"]
    return "\n".join([
        "# Many clients, one deployment", "", common.machine_line(record["machine"]), "",
        *(__doc__ or "").split("Pages:")[0].split("\n\n", 2)[2].splitlines(), "",
        common.markdown_table(head, table), "",
    ])  # fmt: skip


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--jobs", type=int, default=50)
    parser.add_argument("--clients", type=int, default=4)
    options = parser.parse_args()
    record = measure(options.jobs, options.clients)
    common.write_json(RECORD, record)
    PAGE.write_text(page(record), encoding="utf-8")
    print(page(record))
    if any(r["psnr_db"] < 40 for r in record["rows"]) or len(record["rows"]) < options.jobs:
        raise SystemExit("a job failed or gave a wrong image")


if __name__ == "__main__":
    main()
