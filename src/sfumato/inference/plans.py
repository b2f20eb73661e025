"""The plans of a model: captured, calibrated in the clear, and kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.errors import JobError
from sfumato.graph.capture import capture
from sfumato.graph.edges import NO_EDGES, Edges
from sfumato.graph.kept import load_cached, place, release, save_cached, weights_digest
from sfumato.graph.plan import Plan
from sfumato.graph.planning import make_plan
from sfumato.graph.quantize import SCHEMES
from sfumato.inference.handed import Handed, agree_on_values, agree_on_weights
from sfumato.inference.layout import Layout
from sfumato.inference.loading import Loaded
from sfumato.inference.modules import Choose, Decode, OneCall, Prefill, has_rotary, takes
from sfumato.inference.texts import TEXTS, padded, rows_of, streams
from sfumato.runtime.backend import Backend

__all__ = ["Planner", "gumbel"]

_FORMAT = 1
#: Tokens after a prompt on which ranges are measured.
_STEPS = 4
_SEED = 13


def gumbel(size: int, temperature: float, generator: torch.Generator | None) -> Tensor:
    """Noise (1, size): the largest of logits plus it is a draw from the softmax of logits / temperature."""
    uniform = torch.rand(1, size, generator=generator, dtype=torch.float64).clamp(1e-12, 1 - 1e-12)
    return (-(-uniform.log()).log() * temperature).to(torch.float32)


class Planner:
    """Makes each plan once. ``calibration``: what ranges are measured on, texts (or tensors of pixels), instead of the
    built-in ones; it is not secret."""

    def __init__(
        self,
        loaded: Loaded,
        *,
        secret: str,
        profile: str,
        calibration: Sequence[Any] | None,
        exact: bool,
        public_weights: Sequence[str] = (),
    ) -> None:
        if isinstance(calibration, str | Mapping) or (calibration is not None and not len(calibration)):
            raise JobError("calibration must be a list of texts or of pixel tensors, at least one of them")
        self._loaded, self.secret, self.profile, self._exact = loaded, secret, profile, exact
        self._public = tuple(f"model.{pattern}" for pattern in public_weights)
        self._given = calibration
        self._plans: dict[str, Plan] = {}
        self._handed: dict[tuple[int, int], Handed] = {}
        self._mixed = profile == "fast" or (profile in SCHEMES and SCHEMES[profile].fixed)
        self._digest = ""
        self.learnt = not has_rotary(loaded.model) and takes(loaded.model, "position_ids")

    def load(self, backend: Backend, name: str, plan: Plan) -> None:
        """Give the parties a plan and its weights."""
        backend.load(name, plan)

    # ---- one call -------------------------------------------------------------------------------------------

    @property
    def extra(self) -> tuple[str, ...]:
        """What a tokenizer may give beside token ids, of what the model takes."""
        return ("token_type_ids",) if takes(self._loaded.model, "token_type_ids") else ()

    def one_call(self, inputs: Mapping[str, Tensor]) -> tuple[str, Plan]:
        """Name and plan of a call with inputs like these."""
        shapes = {name: list(value.shape) for name, value in inputs.items()}
        name = "call-" + "-".join("x".join(map(str, shape)) for shape in shapes.values())
        module = OneCall(self._loaded.model, self._loaded.padding).eval()
        blank = {n: torch.zeros_like(value) for n, value in inputs.items()}
        if "attention_mask" in blank:
            blank["attention_mask"] += 1
        texts = "input_ids" in inputs
        samples = self._batches if texts else self._pictures
        if name not in self._plans:
            make = self._maker(name, {"inputs": shapes}, module, {"inputs": blank}, lambda: samples(inputs))
            self._keep({name: make}, {name: NO_EDGES})
        return name, self._plans[name]

    def _batches(self, inputs: Mapping[str, Tensor]) -> Iterator[Any]:
        """Batches like ``inputs`` of the calibration's texts."""
        count, length = inputs["input_ids"].shape
        rows = rows_of(self._tokenizer("measure ranges"), self._texts, length, self.extra, self._table)
        for start in range(0, len(rows), count):
            batch = [rows[(start + i) % len(rows)] for i in range(count)]
            if self._exact:
                batch = [_filled(row, length) for row in batch]
            made = padded(batch, length, self._loaded.pad)
            yield (), {"inputs": {name: made.get(name, torch.zeros_like(inputs[name])) for name in inputs}}

    def _pictures(self, inputs: Mapping[str, Tensor]) -> Iterator[Any]:
        """Batches of the calibration's pixels; by default of coarse and fine noise, as large as normalised pixels."""
        wanted = inputs["pixel_values"]
        given = self._given
        if given is None:
            source = torch.Generator().manual_seed(_SEED)
            given = []
            for i in range(16):
                side = max(1, wanted.shape[-1] >> (i % 5))
                coarse = torch.randn(wanted.shape[1], side, side, generator=source)
                given.append(F.interpolate(coarse[None], wanted.shape[-2:])[0])
        if not all(isinstance(t, Tensor) and t.shape == wanted.shape[1:] for t in given):
            raise JobError(
                f"calibration of this model must be pixel tensors of shape {list(wanted.shape[1:])}"
            )
        for start in range(0, len(given), len(wanted)):
            yield (), {"inputs": {"pixel_values": torch.stack([
                torch.as_tensor(given[(start + i) % len(given)], dtype=torch.float32) for i in range(len(wanted))
            ])}}  # fmt: skip

    # ---- token by token -------------------------------------------------------------------------------------

    def prefill(self, layout: Layout) -> tuple[str, Plan]:
        """Of a prompt of this layout."""
        name = _named("prefill", layout)
        if name not in self._plans:
            self._steps(layout)
        return name, self._plans[name]

    def decode(self, layout: Layout, *, hot: bool) -> tuple[str, Plan]:
        """Of one further token; ``hot``: which the parties hold as a row with a 1 at it."""
        name = _named("decode", layout) + "-hot" * hot
        if name not in self._plans:
            handed = self._steps(layout)
            if hot:
                self._keep({name: self._decoder(name, layout, hot=True)}, {name: handed.decode(hot=True)})
        return name, self._plans[name]

    def choose(self, layout: Layout, *, hot: bool, temperature: float | None) -> tuple[str, Plan]:
        """Of the largest logit; with a ``temperature``, of a draw."""
        noisy = temperature is not None
        longer = replace(layout, length=max(layout.length, layout.prompt + _STEPS))
        name = _named("choose", longer) + "-hot" * hot + (f"-{temperature:g}" if noisy else "")
        size = int(self._loaded.model.config.vocab_size)
        source = torch.Generator().manual_seed(_SEED)

        def given(logits: Tensor) -> dict[str, Tensor]:
            noise = {"noise": gumbel(size, temperature, source)} if temperature is not None else {}
            return {"logits": logits, **noise}

        if name not in self._plans:
            make = self._maker(
                name, {"hot": hot, "temperature": temperature}, Choose(hot=hot), given(torch.zeros(1, size)),
                lambda: ([((), given(row)) for row in logits] for _, _, logits in self._runs(longer, steps=_STEPS)),
            )  # fmt: skip
            self._keep({name: make}, {name: self._steps(layout).choose()})
        return name, self._plans[name]

    def _steps(self, layout: Layout) -> Handed:
        """What the plans of a prompt and of a further token hand on, in formats that suit both; makes these plans."""
        key = (layout.prompt, layout.length)
        if key in self._handed:
            return self._handed[key]
        first, after = _named("prefill", layout), _named("decode", layout)
        facts, module = (
            {"prompt": layout.prompt, "length": layout.length},
            Prefill(self._loaded.model, layout.length),
        )
        makers = {first: self._maker(
            first, facts, module.eval(), layout.first([0] * layout.count),
            lambda: ([((), given)] for given, _, _ in self._runs(layout, steps=0)),
            public=("mask", "places"),
        )}  # fmt: skip
        if layout.length > layout.prompt:
            makers[after] = self._decoder(after, layout, hot=False)
        handed = agree_on_values(makers[first], makers.get(after)) if self._mixed else Handed()
        self._keep(makers, {first: handed.prefill(), after: handed.decode(hot=False)})
        self._handed[key] = handed
        return handed

    def _decoder(self, name: str, layout: Layout, *, hot: bool) -> Callable[[Edges], Plan]:
        module = Decode(self._loaded.model).eval()
        given = {**layout.next(0), "kept": self._kept(layout), **self._token(0, hot=hot)}
        facts = {"prompt": layout.prompt, "length": layout.length, "hot": hot}
        return self._maker(
            name, facts, module, given,
            lambda: (
                [((), {**step, **self._token(token, hot=hot)}) for step, token in steps]
                for _, steps, _ in self._runs(layout, steps=_STEPS)
            ),
            public=("mask", "places"),
        )  # fmt: skip

    def _token(self, token: int, *, hot: bool) -> dict[str, Tensor]:
        ids = torch.tensor([[token]])
        size = int(self._loaded.model.config.vocab_size)
        return {"hot": F.one_hot(ids[0], size).to(torch.float32)} if hot else {"ids": ids}

    def _kept(self, layout: Layout) -> Tensor:
        """Zeros like the keys and values of this layout."""
        with torch.no_grad():
            return torch.zeros_like(
                Prefill(self._loaded.model, layout.length)(**layout.first([0] * layout.count))[1]
            )

    def _runs(self, layout: Layout, steps: int) -> Iterator[tuple[Any, list[tuple[Any, int]], list[Tensor]]]:
        """(arguments of the first call, arguments and token of each step, all logits) of texts that are written on as
        they go on, with prompts of various lengths."""
        prefill, decode = Prefill(self._loaded.model, layout.length).eval(), Decode(self._loaded.model).eval()
        steps = min(steps, layout.length - layout.prompt)
        rows = streams(self._tokenizer("measure ranges"), self._texts, layout.prompt + steps, self._table)
        for i, row in enumerate(rows):
            count = layout.prompt if self._exact or i % 2 == 0 else 1 + (i * 7) % layout.prompt
            at = Layout(count, layout.prompt, layout.length, layout.pad, layout.learnt)
            first, calls, every = at.first(row[:count]), [], []
            if steps == 0:
                yield first, [], []
                continue
            with torch.no_grad():
                logits, kept = prefill(**first)
                every.append(logits)
                for k in range(steps):
                    step = {**at.next(k), "kept": kept}
                    calls.append((step, row[count + k]))
                    logits, kept = decode(**step, ids=torch.tensor([[row[count + k]]]))
                    every.append(logits)
            yield first, calls, every

    # ---- what is common -------------------------------------------------------------------------------------

    @property
    def _texts(self) -> Sequence[Any]:
        return TEXTS if self._given is None else self._given

    @property
    def _table(self) -> Tensor:
        return self._loaded.model.get_input_embeddings().weight.detach()

    def _tokenizer(self, purpose: str) -> Any:
        if self._loaded.tokenizer is None:
            raise JobError(
                f"{self._loaded.name or 'this model'} has no tokenizer to {purpose} with; put its tokenizer's files "
                "into the model's folder, or give tokenizer="
            )
        return self._loaded.tokenizer

    def _keep(self, makers: Mapping[str, Callable[[Edges], Plan]], edges: Mapping[str, Edges]) -> None:
        """Make these plans, with secret weights as in those that are here already wherever both can do with it."""
        self._plans |= agree_on_weights(makers, edges, self._plans if self._mixed else {})

    def _maker(
        self,
        name: str,
        facts: Mapping[str, Any],
        module: nn.Module,
        given: Mapping[str, Any],
        samples: Callable[[], Iterable[Any]],
        public: Sequence[str] = (),
    ) -> Callable[[Edges], Plan]:
        """Makes the plan of this name for formats at its edges; ranges from the disk or from ``samples``."""
        program = capture(module, (), given)
        ranges = load_cached(file := self._file(name, facts))

        def make(edges: Edges) -> Plan:
            nonlocal ranges
            plan = make_plan(
                program,
                secret=self.secret,
                profile=self.profile,
                public=[n for n in public if n in given] if self._exact else (),
                calibration=ranges if ranges is not None else cast(Sequence[Any], samples()),
                relocate=self.secret != "inputs",
                ring="mixed" if self._mixed else "Z64",
                public_weights=() if isinstance(module, Choose) else self._public,
                edges=edges,
            )
            if ranges is None:
                save_cached(file, ranges := plan.calibration)
            return plan

        return make

    def _file(self, name: str, facts: Mapping[str, Any]) -> Any:
        """Where ranges are kept, by all that they depend on."""
        model = self._loaded.model
        self._digest = self._digest or weights_digest(model)
        calibration = None
        if self._given is not None:
            tensors = [t for t in self._given if isinstance(t, Tensor)]
            calibration = [str(t) for t in self._given if not isinstance(t, Tensor)]
            calibration += [weights_digest(_Weights(tensors))] if tensors else []
        settings = {
            "format": _FORMAT, "release": release(), "weights": self._digest, "class": type(model).__name__,
            "secret": self.secret, "profile": self.profile, "exact": self._exact, "name": name,
            "calibration": calibration, "public_weights": list(self._public), **facts,
        }  # fmt: skip
        return place("calibration", settings, ".json")


class _Weights(nn.Module):
    """Tensors, as `weights_digest` takes them."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__()
        for i, tensor in enumerate(tensors):
            self.register_buffer(f"t{i}", tensor)


def _named(what: str, layout: Layout) -> str:
    return f"{what}-{layout.prompt}-{layout.length}"


def _filled(row: dict[str, list[int]], length: int) -> dict[str, list[int]]:
    """A row repeated up to a length."""
    return {name: (ids * length)[:length] for name, ids in row.items()}
