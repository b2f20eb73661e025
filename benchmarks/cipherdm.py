"""CipherDM's MNIST U-Net: ours beside what SPU takes for it, and where a Stable Diffusion 1.5 U-Net's bytes go.

    python benchmarks/cipherdm.py           # a prediction, its operators alone, and images, over three parties
    python benchmarks/cipherdm.py --sd15    # bytes by operator of the full U-Net, from the plan alone

Weights and class secret, as there; the first noise is SPU's own. SPU's records are
results/peers/cipherdm-spu.jsonl (peers/README.md). What the record has already is skipped.
Results: results/cipherdm-spu.json and .md.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import common
import numpy as np
import sd15
import torch
from cipherdm_page import page
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

import sfumato as sf
from sfumato.bench.cases import Case
from sfumato.bench.floor import measure_rates
from sfumato.bench.measure import Settings, measure
from sfumato.bench.peers import read_lines
from sfumato.diffusion.denoiser import Denoiser
from sfumato.diffusion.loop import Denoising, call_kwargs
from sfumato.diffusion.picture import Clamp
from sfumato.diffusion.sampling import sample
from sfumato.errors import RangeError
from sfumato.graph.plan import Plan, client_side
from sfumato.graph.prices import priced
from sfumato.runtime.remote import open_backend
from sfumato.runtime.report import CostReport
from sfumato.study.plans import CALIBRATION_SEED, Course, course
from sfumato.study.setting import Setting
from sfumato.study.subject import Subject, subject

RECORD, PAGE = common.RESULTS / "cipherdm-spu.json", common.RESULTS / "cipherdm-spu.md"
PEER = common.RESULTS / "peers" / "cipherdm-spu.jsonl"
PROFILES = ("fast", "precise")
IMAGES = (
    *(Setting(name=f"{profile}, DDIM 50", steps=50, profile=profile) for profile in PROFILES),
    Setting(name="fast, DPM-Solver++ 10", steps=10, solver="dpm++", spacing="trailing", profile="fast"),
)
#: Profiles that plans are made for without a run, and sizes of Stable Diffusion's images.
PLANNED, SD15_PIXELS = ("spu", "cipherdm", "fast", "precise"), (256, 512)
#: Exact runs that ranges are measured on, and steps of each that are looked at; then twice and four times as many runs.
RUNS, CALLS, ATTEMPTS = 40, 8, 3
#: Call of the network to the operator that it is counted under.
OPERATORS = {
    "scaled_dot_product_attention": "attention", "silu": "SiLU", "group_norm": "normalisation",
    "layer_norm": "normalisation", "gelu": "GELU", "conv2d": "products", "linear": "products", "matmul": "products",
}  # fmt: skip


def first_noise() -> Tensor:
    """(1, 1, 28, 28): what ``peers/cipherdm_spu.py`` draws for its first image."""
    noise = np.random.default_rng(0).standard_normal((1, 28, 28, 1)).astype(np.float32)
    return torch.from_numpy(noise).permute(0, 3, 1, 2).contiguous()


def middle(model: Subject) -> tuple[Tensor, Tensor]:
    """The sample in the middle of an exact run of 50 steps, and its time: SPU's prediction is there."""
    going, seen = course(model, IMAGES[0]), list[Tensor]()
    text = model.text([0], guided=False)
    sample(model, going.schedule, first_noise(), text, None, watch=lambda z, _: seen.append(z.float()))
    half = len(seen) // 2
    return seen[half], going.schedule.timesteps[half]


# ---- a prediction and its operators ------------------------------------------------------------------------


class Prediction(nn.Module):
    """The network at one time, which is public. Its reference is in float32, as its sinusoids are and SPU's is."""

    def __init__(self, network: nn.Module, time: Tensor) -> None:
        super().__init__()
        self.network, self.time = network, time

    def forward(self, sample: Tensor, label: Tensor) -> Tensor:
        found: Tensor = self.network(sample.float(), self.time, label.float())
        return found

    def double(self) -> Prediction:
        return self


class Recorder(TorchFunctionMode):
    """Keeps by operator what the network calls: (function of tensors, tensors). The groups of the peer's script."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, list[tuple[Callable[..., Tensor], list[Tensor]]]] = {
            name: [] for name in ("softmax", "silu", "norm", "linear")
        }

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        if name == "silu":
            self._keep("silu", functional.silu, args[0])
        elif name == "group_norm":
            groups, eps = args[1], kwargs["eps"]
            affine = kwargs["weight"], kwargs["bias"]
            self._keep("norm", lambda x, g, b: functional.group_norm(x, groups, g, b, eps), args[0], *affine)
        elif name == "conv2d":
            rest = args[3:]
            self._keep("linear", lambda x, w, b: functional.conv2d(x, w, b, *rest), *args[:3])
        elif name == "linear":
            self._keep("linear", functional.linear, *args[:3])
        elif name == "scaled_dot_product_attention":
            q, k, v = args[:3]
            scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
            self._keep("linear", torch.matmul, q, k.transpose(-1, -2).contiguous())
            self._keep("softmax", lambda x: torch.softmax(x, -1), scores)
            self._keep("linear", torch.matmul, torch.softmax(scores, -1), v)
        return function(*args, **(kwargs or {}))

    def _keep(self, group: str, function: Callable[..., Tensor], *tensors: Tensor) -> None:
        self.calls[group].append((function, [t.detach().clone() for t in tensors]))


class Alone(nn.Module):
    """Calls that do not depend on each other, side by side; their results in one flat tensor."""

    def __init__(self, calls: Sequence[tuple[Callable[..., Tensor], list[Tensor]]]) -> None:
        super().__init__()
        self._calls = [(function, len(tensors)) for function, tensors in calls]

    def forward(self, *tensors: Tensor) -> Tensor:
        found, at = list[Tensor](), 0
        for function, count in self._calls:
            found.append(function(*tensors[at : at + count]).flatten())
            at += count
        return torch.cat(found)


def predictions(model: Subject, record: dict[str, Any], save: Callable[[], None]) -> None:
    """One prediction over three parties as `sfumato bench` measures it, and its operators alone."""
    x, time = middle(model)
    module, label = Prediction(model.single, time), model.text([0], guided=False)
    with torch.no_grad(), Recorder() as recorder:
        module(x, label)
    cases = [Case("unet", lambda: (module, (x, label)), has_weights=True)]
    for group, calls in recorder.calls.items():
        inputs = tuple(t for _, tensors in calls for t in tensors)
        cases.append(Case(group, lambda calls=calls, inputs=inputs: (Alone(calls), inputs)))
    rates = None
    for profile in PROFILES:
        for case in cases:
            key = f"{profile}/{case.name}"
            if key in record["predictions"]:
                continue
            rates = rates or measure_rates()
            found = measure(case, Settings(profile=profile, repeat=3), rates)
            found["calls"] = len(recorder.calls.get(case.name, ()))
            record["predictions"][key] = found
            say(f"{key}: {found.get('error') or _brief(found)}")
            save()


def planned(model: Subject, record: dict[str, Any], save: Callable[[], None]) -> None:
    """Exact bytes by operator of one prediction, from plans."""
    x, time = middle(model)
    inputs = x, model.text([0], guided=False)
    program = sf.capture(Prediction(model.single, time).eval(), inputs)
    for profile in PLANNED:
        if profile not in record["planned"]:
            plan = sf.make_plan(program, secret="inputs+weights", profile=profile, calibration=[(inputs, {})])
            record["planned"][profile] = _estimated(plan, inputs, {})
            save()


def _brief(found: Mapping[str, Any]) -> str:
    sent, cpu = max(found["tcp_sent_per_party"]), max(found["cpu_s_per_party"])
    return f"{common.size(sent)}, {cpu:.2f} CPU s, relative error {found['rel_l2_err']:.2g}"


# ---- images ------------------------------------------------------------------------------------------------


def image(model: Subject, setting: Setting) -> dict[str, Any]:
    """One image over three parties, ranges measured on other images of the exact network."""
    for attempt in range(ATTEMPTS):
        try:
            return _image(model, setting, RUNS << attempt)
        except RangeError as error:
            say(f"{setting.name}: {error}")
            if attempt + 1 == ATTEMPTS:
                raise
    raise AssertionError


def _image(model: Subject, setting: Setting, runs: int) -> dict[str, Any]:
    going, text = course(model, setting), model.text([0], guided=False)
    first = first_noise() * going.schedule.init_sigma
    made = plans(model, setting, going, runs)
    with open_backend("local") as backend:
        for name, plan in made.items():
            backend.load(name, plan)
        before = backend.report()
        with common.Foreign() as foreign:
            found = Denoising(backend, made, going.schedule, text, None, None).run(first)
        after = backend.report()
    exact = sample(model, going.schedule, first, text, None)

    def spent(name: str) -> list[Any]:
        return [b - a for a, b in zip(getattr(before, name), getattr(after, name), strict=True)]

    cpu = spent("cpu_seconds")
    return {
        "steps": setting.steps,
        "runs_for_ranges": runs,
        "wall_s": round(foreign.wall, 2),
        "cpu_s_per_party": [round(c, 3) for c in cpu],
        "foreign_cpu": round(foreign.share(sum(cpu)), 3),
        "tcp_sent_per_party": spent("kernel_bytes"),
        "bytes_sent_per_party": spent("bytes_sent"),
        "rounds": after.rounds - before.rounds,
        "sends_per_party": spent("sends"),
        "client_bytes": after.client_bytes - before.client_bytes,
        "operators": by_operator(made["unet"], after),
        **common.error_against(exact, found),
    }


def plans(model: Subject, setting: Setting, going: Course, runs: int) -> dict[str, Plan]:
    """Plans with secret weights: of the network and of the scheduler's clamp."""
    calls: dict[str, list[Any]] = {"unet": [], "clip": []}
    for run in range(runs):
        text, seen, clips = model.text([run % len(model.texts)], guided=False), list[Any](), list[Tensor]()

        def network(z: Tensor, t: Tensor, text: Tensor, seen: list[Any] = seen) -> Tensor:
            seen.append(((z,), call_kwargs(t, text, None)))
            return model(z, t, text)

        noise = model.noise([CALIBRATION_SEED + run]) * going.schedule.init_sigma
        sample(network, going.schedule, noise, text, None, clips=clips)
        at = sorted({round(i * (len(seen) - 1) / (CALLS - 1)) for i in range(CALLS)})
        calls["unet"].append([seen[i] for i in at])
        calls["clip"].append([((clips[i].float(),), {}) for i in at if i < len(clips)])
    args, kwargs = calls["unet"][0][0]
    given: dict[str, Any] = {"profile": setting.profile, "methods": dict(setting.methods)}
    made = {
        "unet": sf.make_plan(
            sf.capture(model.single, args, kwargs),
            secret="inputs+weights",
            calibration=calls["unet"],
            **given,
        )
    }
    if going.schedule.clip is not None:
        clamp = sf.capture(Clamp(*going.schedule.clip).eval(), args)
        made["clip"] = sf.make_plan(clamp, calibration=calls["clip"], **given)
    return made


def by_operator(plan: Plan, report: CostReport) -> dict[str, int]:
    """Payload of the party that sends most, by operator; "rest" is elementwise products and the like."""
    busiest = max(range(len(report.bytes_sent)), key=report.bytes_sent.__getitem__)
    targets = {node.name: node.target for node in plan.program.nodes}
    found: dict[str, int] = {}
    for name, cost in report.grouped(1).items():
        _, _, function = targets.get(name, "").partition(".")
        operator = OPERATORS.get(function.partition(".")[0], "rest")
        found[operator] = found.get(operator, 0) + cost.bytes_sent[busiest]
    return dict(sorted(found.items(), key=lambda item: -item[1]))


# ---- Stable Diffusion 1.5 ----------------------------------------------------------------------------------


def stable_diffusion(size: str, record: dict[str, Any], save: Callable[[], None]) -> None:
    """Exact bytes by operator of one evaluation, from plans; ranges are measured once for each size."""
    unet = sd15.build(size, rescaled=False)
    for pixels in SD15_PIXELS:
        missing = [p for p in PLANNED if f"{size}/{pixels}/{p}" not in record["sd15"]]
        if not missing:
            continue
        args, kwargs = sd15.arguments(unet, 1, pixels)
        say(f"{size}, {pixels} pixels: capturing and measuring ranges")
        program = sf.capture(Denoiser(unet, guided=False).eval(), args, kwargs)
        ranges: Any = [sd15.arguments(unet, 2, pixels)]
        for profile in missing:
            plan = sf.make_plan(
                program, client_known=("encoder_hidden_states",), profile=profile, calibration=ranges
            )
            ranges = plan.calibration
            record["sd15"][f"{size}/{pixels}/{profile}"] = found = _estimated(plan, args, kwargs)
            say(f"{profile}: {common.size(max(found['bytes_sent_per_party']))} a party")
            save()


def _estimated(plan: Plan, args: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    values = client_side(plan, args, kwargs)
    with open_backend("meta") as backend:
        backend.load("unet", plan)
        for name, tensor in values.secrets.items():
            backend.put(name, tensor, plan.secret_type(name).frac)
        backend.call("unet", "call", {name: name for name in values.secrets}, values.publics, ["out"])
        report = backend.report()
    return {
        "bytes_sent_per_party": list(report.bytes_sent),
        "rounds": report.rounds,
        "operators": by_operator(plan, report),
        "spu_bytes": priced(plan).spu_bytes / len(report.bytes_sent),
    }


def say(text: str) -> None:
    """A line of progress."""
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def arguments() -> argparse.Namespace:
    """The command line's."""
    parser = common.parser(__doc__)
    parser.add_argument("--sd15", action="store_true", help="the second part alone")
    parser.add_argument(
        "--size", choices=tuple(sd15.SIZES), default="sd15", help="of the second part's U-Net"
    )
    parser.add_argument(
        "--page", action="store_true", help="write the page anew from the record, measure nothing"
    )
    parser.add_argument("--out", type=Path, default=RECORD)
    found: argparse.Namespace = parser.parse_args()
    return found


def main() -> None:
    args = arguments()
    record: dict[str, Any] = {"predictions": {}, "planned": {}, "images": {}, "sd15": {}}
    if args.out.exists():
        record |= json.loads(args.out.read_text())

    def save() -> None:
        record["machine"] = common.machine()
        common.write_json(args.out, record)

    if args.sd15:
        stable_diffusion(args.size, record, save)
    elif not args.page:
        model = subject("mnist01")
        predictions(model, record, save)
        planned(model, record, save)
        for setting in IMAGES:
            if setting.name not in record["images"]:
                record["images"][setting.name] = found = image(model, setting)
                say(f"{setting.name}: {_brief(found)}")
                save()
    if args.out == RECORD:
        PAGE.write_text(page(record, read_lines(PEER)))


if __name__ == "__main__":
    main()
