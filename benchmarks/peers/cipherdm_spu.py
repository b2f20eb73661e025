"""CipherDM's MNIST U-Net on SecretFlow SPU, with and without its approximations. Imports nothing of sfumato.

Needs ``spu==0.9.5`` (JAX and NumPy come with it) and the weights ``mnist01.safetensors``. Three processes on loopback
TCP, ABY3, FM64, 18 fraction bits. Weights and class secret; the time, the schedule and the first noise public.
Source: CipherDM (arXiv 2409.05414) and its authors' code, for the approximations and SPU's settings.
"""

import argparse
import json
import os
import pickle
import re
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np
from cipherdm_net import GROUPS, TIMES, Ops, Recorder, ddim, images, read_weights, schedule, sinusoids, unet
from spu import Io, Runtime, libspu
from spu.utils import frontend

SECRET, PUBLIC = libspu.Visibility.VIS_SECRET, libspu.Visibility.VIS_PUBLIC
#: Which functions are replaced, and whether SPU runs as CipherDM configures it (Pade exp; x / broadcast(y) computed as
#: x * broadcast(1 / y)) or at its own defaults. "silu" is what CipherDM's published script runs: it leaves softmax off.
SETTINGS = {
    "spu-default": ((), False),
    "spu": ((), True),
    "softmax": (("softmax",), True),
    "silu": (("silu",), True),
    "both": (("softmax", "silu"), True),
}


class Meter:
    """Wall seconds, own CPU seconds, bytes sent by the kernel on own TCP sockets, the machine's busy seconds, sends."""

    @staticmethod
    def sent():
        total = 0
        for name in os.listdir("/proc/self/fd"):
            try:
                if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                    continue
                with socket.socket(fileno=os.dup(int(name))) as s:
                    info = s.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 232)
            except OSError:
                continue  # closed meanwhile, or not TCP
            total += struct.unpack_from("<Q", info, 200)[0] if len(info) >= 208 else 0  # tcpi_bytes_sent
        return total

    def now(self):
        with open("/proc/stat") as file:
            user, nice, system, _, _, *rest = map(int, file.readline().split()[1:9])
        busy = (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK")
        return [time.perf_counter(), time.process_time(), self.sent(), busy]

    def __enter__(self):
        # SPU's profile goes to the C++ standard output only: taken from the file descriptor
        self.file, self.saved = tempfile.TemporaryFile("w+"), os.dup(1)
        os.dup2(self.file.fileno(), 1)
        self.start = self.now()
        return self

    def __exit__(self, *_):
        self.values = [b - a for a, b in zip(self.start, self.now(), strict=True)]
        os.dup2(self.saved, 1)
        os.close(self.saved)
        self.file.seek(0)
        self.values.append(sum(map(int, re.findall(r"total send .*send actions (\d+)", self.file.read()))))


class Party:
    """One of the processes: compiles at rank 0, shares, runs, measures."""

    def __init__(self, args, setting):
        self.args, self.link = args, args.link
        self.replaced, tuned = SETTINGS[setting]
        self.config = libspu.RuntimeConfig(
            protocol=getattr(libspu.ProtocolKind, args.protocol),
            field=libspu.FieldType.FM64, fxp_fraction_bits=18,
        )  # fmt: skip
        self.config.enable_pphlo_profile = args.rank == 0
        self.copts = libspu.CompilerOptions()
        self.copts.enable_optimize_denominator_with_broadcast = tuned
        if tuned:
            self.config.fxp_exp_mode = libspu.RuntimeConfig.EXP_PADE
        self.io = Io(args.parties, self.config)
        self.runtime = Runtime(self.link, self.config)
        self.base = {
            "peer": "spu",
            "config": f"{args.protocol} FM64 f18" + (" exp=pade fast-softmax" if tuned else "")
            + "".join(f" cipherdm-{name}" for name in self.replaced),
            "weights": "secret", "setting": setting,
        }  # fmt: skip

    def share(self, name, value, visibility=SECRET):
        value = np.asarray(value)
        if visibility == PUBLIC:
            self.runtime.set_var(name, self.io.make_shares(value, PUBLIC)[self.args.rank])
            return
        shares = [""] * self.args.parties
        if self.args.rank == 0:
            shares = [pickle.dumps(s).hex() for s in self.io.make_shares(value, SECRET)]
        self.runtime.set_var(name, pickle.loads(bytes.fromhex(self.link.scatter(shares, 0))))

    def compile(self, function, values, visibility, output):
        """An executable of ``function(dict of arrays)``, whose first result is named ``output``."""
        names, text = list(values), ""
        if self.args.rank == 0:
            found, _ = frontend.compile(
                frontend.Kind.JAX, lambda *arrays: function(dict(zip(names, arrays, strict=True))),
                list(values.values()), {}, names, [visibility.get(n, SECRET) for n in names],
                lambda flat: [output if i == 0 else f"{output}{i}" for i in range(len(flat))], copts=self.copts,
            )  # fmt: skip
            text = found.SerializeToString().hex()
        code = libspu.Executable()
        code.ParseFromString(bytes.fromhex(self.link.broadcast(text, 0)))
        return code

    def reveal(self, name):
        parts = self.link.gather(pickle.dumps(self.runtime.get_var(name)).hex(), 0)
        if self.args.rank:
            return None
        return np.asarray(self.io.reconstruct([pickle.loads(bytes.fromhex(part)) for part in parts]))

    def measure(self, run, repeat, warm=True):
        """Medians over ``repeat`` calls of ``run`` (after one more), each ended when the slowest party is done."""
        if warm:
            with Meter():
                run()
        rows = []
        for _ in range(repeat):
            self.link.barrier()
            with Meter() as meter:
                run()
                self.link.barrier()
            rows.append(
                json.loads(
                    json.dumps([json.loads(m) for m in self.link.all_gather(json.dumps(meter.values))])
                )
            )
        wall = [row[0][0] for row in rows]
        ours = [sum(party[1] for party in row) for row in rows]
        busy = [
            max(0.0, r[0][3] - o) / (w * os.cpu_count()) for r, o, w in zip(rows, ours, wall, strict=True)
        ]
        cpu = [statistics.median(row[i][1] for row in rows) for i in range(self.args.parties)]
        return {
            "wall_s": round(statistics.median(wall), 3), "runs": repeat, "cpu_s_per_party": [round(c, 3) for c in cpu],
            "foreign_cpu": round(statistics.median(busy), 3), "tcp_sent_per_party": [p[2] for p in rows[-1]],
            "spu_sends": rows[-1][0][4],
        }  # fmt: skip

    def emit(self, case, measured, result=None, exact=None, same=None, **more):
        """One line: errors against the exact network, and against the same functions in float (``same``)."""
        if self.args.rank:
            return
        record = {**self.base, "case": case, **measured, **more}
        if result is not None:
            for suffix, reference in (("", exact), ("_same_functions", same)):
                gap = np.asarray(result, np.float64) - np.asarray(reference, np.float64)
                record[f"max_abs_err{suffix}"] = float(f"{np.abs(gap).max():.4g}")
                record[f"rel_l2_err{suffix}"] = float(
                    f"{np.linalg.norm(gap) / np.linalg.norm(reference):.4g}"
                )
        line = json.dumps(record)
        print(line, flush=True)
        if self.args.out:
            with open(self.args.out, "a") as file:
                file.write(line + "\n")


def party(args):
    weights, embeddings = read_weights(args.weights)
    rng = np.random.default_rng(args.seed)
    noise = rng.standard_normal((args.batch, 28, 28, 1)).astype(np.float32)
    label = embeddings[np.arange(args.batch) % len(embeddings)]
    # one prediction and one step from the middle of a run: there x is secret
    middle = int(TIMES[len(TIMES) // 2])
    x = noise
    for t in TIMES[: len(TIMES) // 2]:
        x = ddim(Ops(), weights, x, sinusoids(t), label, schedule(t))
    x = np.asarray(x)
    values = {**weights, "x": x, "label": label, "wave": sinusoids(middle), "s": schedule(middle)}
    public = {"wave": PUBLIC, "s": PUBLIC}
    desc = libspu.link.Desc()
    desc.recv_timeout_ms = desc.http_timeout_ms = 3_600_000
    for rank, port in enumerate(args.ports.split(",")):
        desc.add_party(f"P{rank}", f"127.0.0.1:{port}")
    args.link = libspu.link.create_brpc(desc, args.rank)
    for setting in args.settings:
        here, ops = Party(args, setting), Ops(SETTINGS[setting][0])

        def predict(v, ops=ops):
            return unet(ops, {n: v[n] for n in weights}, v["x"], v["wave"], v["label"])

        def step(v, ops=ops):
            return ddim(ops, {n: v[n] for n in weights}, v["x"], v["wave"], v["label"], v["s"])

        for name, value in values.items():
            here.share(name, value, public.get(name, SECRET))
        for case, function in (("unet", predict), ("step", step)):
            if case in args.cases:
                names = [n for n in values if case == "step" or n != "s"]
                code = here.compile(function, {n: values[n] for n in names}, public, "out")
                measured = here.measure(lambda h=here, c=code: h.runtime.run(c), args.repeat)
                plain = step if case == "step" else predict
                exact, same = plain(values, ops=Ops()), plain(values, ops=ops)
                here.emit(f"cipherdm_{case}", measured, here.reveal("out"), exact, same)
        if "groups" in args.cases:
            recorder = Recorder(SETTINGS[setting][0])
            predict(values, ops=recorder)
            for group, members in GROUPS.items():
                calls = [c for c in recorder.calls if c[0] in members]
                inputs = {f"{group}{i}_{j}": a for i, c in enumerate(calls) for j, a in enumerate(c[1])}

                def alone(v, calls=calls, group=group, ops=ops):
                    found = []
                    for i, (name, given, more) in enumerate(calls):
                        args_ = [v[f"{group}{i}_{j}"] for j in range(len(given))]
                        found.append(getattr(ops, name)(*args_, **more))
                    return found

                for name, value in inputs.items():
                    here.share(name, value)
                code = here.compile(alone, inputs, {}, f"{group}-out")
                here.emit(
                    f"cipherdm_unet/{group}", here.measure(lambda h=here, c=code: h.runtime.run(c), args.repeat),
                    calls=len(calls),
                )  # fmt: skip
        if "ddim50" in args.cases:
            first = here.compile(step, values, {**public, "x": PUBLIC}, "x")
            later = here.compile(step, values, public, "x")

            def whole(here=here, first=first, later=later):
                here.share("x", noise, PUBLIC)
                for t in TIMES:
                    here.share("wave", sinusoids(t), PUBLIC)
                    here.share("s", schedule(t), PUBLIC)
                    here.runtime.run(first if t == TIMES[0] else later)

            measured = here.measure(whole, 1, warm=False)
            image = here.reveal("x")

            exact, same = (images(o, weights, noise, label) for o in (Ops(), ops))
            here.emit("cipherdm_ddim50", measured, image, exact, same, batch=args.batch)
            if args.images and args.rank == 0:
                np.savez(f"{args.images}/{args.protocol}-{setting}.npz", image=image, exact=exact, same=same)
        del here.runtime
        args.link.barrier()
    args.link.stop_link()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("weights", help="mnist01.safetensors")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument(
        "--cases", nargs="+", choices=("unet", "step", "groups", "ddim50"), default=["unet", "step"]
    )
    parser.add_argument(
        "--repeat", type=int, default=3, help="runs of a case after a warm-up; one of a whole image"
    )
    parser.add_argument("--batch", type=int, default=1, help="images, of digit 0, 1, 0, ...")
    parser.add_argument("--seed", type=int, default=0, help="of the first noise")
    parser.add_argument("--out", default="", help="append JSON lines to this file")
    parser.add_argument("--images", default="", help="folder for the images of ddim50, as .npz")
    parser.add_argument(
        "--protocol", choices=("ABY3", "REF2K"), default="ABY3",
        help="REF2K: SPU's reference of the same ring in one process, without any security: for images, not for costs",
    )  # fmt: skip
    parser.add_argument("--rank", type=int, default=-1, help=argparse.SUPPRESS)
    parser.add_argument("--ports", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.parties = 3 if args.protocol == "ABY3" else 1
    if args.rank >= 0:
        return party(args)
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(args.parties)]
    ports = ",".join(str(s.getsockname()[1]) for s in sockets)
    for s in sockets:
        s.close()
    command = [sys.executable, __file__, *sys.argv[1:], "--ports", ports, "--rank"]
    running = [subprocess.Popen([*command, str(rank)]) for rank in range(args.parties)]
    while any(p.poll() is None for p in running) and not any(p.poll() for p in running):
        time.sleep(0.2)
    for p in running:  # only after a failure is anybody still at work
        p.kill()
    return max(abs(p.wait()) for p in running)


if __name__ == "__main__":
    sys.exit(main())
