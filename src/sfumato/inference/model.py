"""A transformers model that runs on shares: texts or images in, labels or text out, and nobody else sees either."""

from __future__ import annotations

import secrets
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from tqdm import tqdm

from sfumato.errors import JobError
from sfumato.graph.places import SECRETS
from sfumato.graph.plan import Plan
from sfumato.graph.planning import PROFILES
from sfumato.inference.generation import GenerateOutput, Generation, Wishes
from sfumato.inference.layout import Layout
from sfumato.inference.loading import TASKS, Loaded, check_model, load_model
from sfumato.inference.parties import Parties, Run
from sfumato.inference.plans import Planner
from sfumato.inference.reading import Reader
from sfumato.runtime.backend import Backend
from sfumato.runtime.names import shared_name
from sfumato.runtime.remote import open_backend
from sfumato.runtime.report import CostReport

__all__ = ["ModelOutput", "SecureModel"]

_BACKENDS = ("local", "simulate", "plain")
#: Tokens of a text at most, unless the caller says otherwise.
_MAX_LENGTH = 512


@dataclass(frozen=True)
class ModelOutput:
    """What a call returns. ``outputs``: all tensors of the model by name, in float32; ``logits`` among them, or None;
    ``labels``: the likeliest class of each input, or the likeliest token at each mask or after each text; ``report``:
    what it cost."""

    outputs: Mapping[str, Tensor]
    labels: list[Any] | None
    report: CostReport

    @property
    def logits(self) -> Tensor | None:
        return self.outputs.get("logits")


class SecureModel:
    """A transformers model under MPC. Make one with `from_pretrained`, call it with texts or tensors.

    The client tokenizes; the three parties run the model on shares. They learn the model's graph and plan, shapes (how
    many texts, and the length that they are padded to) and calibrated ranges. With ``padding`` the lengths themselves
    stay secret: what is padding is a secret mask. With ``secret="inputs"`` the weights are public and token ids become
    embeddings at the client; with ``"inputs+weights"`` the parties hold the weights as shares, and a text reaches them
    as shares of which tokens it holds.

    One session with the parties stays open from call to call, and weights are shared once in it; `close`, a ``with``
    block or the end of this object ends it. `generate` writes a text on.
    """

    def __init__(
        self,
        loaded: Loaded,
        *,
        secret: str = "inputs",
        profile: str = "precise",
        cluster: str | Path | None = None,
        keys: str | Path | None = None,
        backend: str = "local",
        max_length: int | None = None,
        padding: bool = True,
        calibration: Sequence[Any] | None = None,
        options: Mapping[str, Any] | None = None,
        public_weights: str | Sequence[str] = (),
    ) -> None:
        for name, value, known in (
            ("secret", secret, SECRETS), ("profile", profile, PROFILES), ("backend", backend, _BACKENDS)
        ):  # fmt: skip
            if value not in known:
                raise JobError(f"there is no {name} {value!r}; use one of {', '.join(known)}")
        if max_length is not None and not 1 <= max_length <= loaded.longest:
            raise JobError(
                f"max_length must lie between 1 and the model's {loaded.longest}, not {max_length}"
            )
        planner = Planner(
            loaded, secret=secret, profile=profile, calibration=calibration, exact=not padding,
            public_weights=(public_weights,) if isinstance(public_weights, str) else public_weights,
        )  # fmt: skip
        longest = max_length or min(_MAX_LENGTH, loaded.longest)
        opened = partial(open_backend, backend, cluster=cluster, keys=keys, options={**(options or {})})
        self._start(planner, Reader(loaded, planner.extra, longest, padding=padding), opened, options or {})
        self.backend = backend

    def _start(
        self, planner: Planner, reader: Reader, opened: Callable[[], Backend], options: Mapping[str, Any]
    ) -> None:
        """With who makes plans, who reads texts, and how parties are reached."""
        self._planner, self._reader, self._options = planner, reader, dict(options)
        self.loaded, self.secret, self.profile = reader.loaded, planner.secret, planner.profile
        self.max_length, self.padding = reader.max_length, reader.padding
        self._parties = Parties(opened, planner.load)
        weakref.finalize(self, self._parties.close)
        self._progress: dict[str, Any] = {}
        #: The report of the latest call.
        self.last_report: CostReport | None = None

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | Path,
        *,
        task: str | None = None,
        secret: str = "inputs",
        profile: str = "precise",
        cluster: str | Path | None = None,
        keys: str | Path | None = None,
        backend: str = "local",
        max_length: int | None = None,
        padding: bool = True,
        calibration: Sequence[Any] | None = None,
        options: Mapping[str, Any] | None = None,
        public_weights: str | Sequence[str] = (),
        **loading: Any,
    ) -> Self:
        """The model behind a folder in the hub's format, a hub id, or ``"cluster:NAME"``, a model that its owner has
        shared with a cluster: weights, plans and what may be opened are then the owner's.

        Args:
            path_or_id: what to load. ``loading`` goes to transformers as it is: ``revision``, ``token``, ``cache_dir``,
                ``local_files_only``, ... Weights in half precision are widened to float32.
            task: ``"sequence-classification"``, ``"masked-lm"``, ``"causal-lm"``, ``"image-classification"``,
                ``"encoder"``, and for CLIP ``"text-encoder"`` or ``"image-encoder"``; by default what the architecture
                in the model's configuration is for.
            secret: ``"inputs"``, or ``"inputs+weights"`` for the weights as well.
            profile: the errors that non-linear functions may have, ``"precise"`` or ``"fast"``, or a paper's.
            cluster: a cluster file of three real parties; ``keys`` the folder of the client's certificate.
            backend: ``"local"`` (three processes over mutual TLS), ``"simulate"`` (one thread), ``"plain"``.
            max_length: tokens of a text at most. Public.
            padding: texts are padded to one of a few public lengths, and what is padding is secret. False: exact
                lengths are public, and nothing is computed for padding.
            calibration: texts to measure ranges on, or tensors of pixels (channels, height, width), instead of the
                built-in ones. They are not secret.
            options: of the protocol, passed to the parties.
            public_weights: with secret weights, patterns of parameters that everyone may see, such as those of a
                pre-trained prefix (``"bert.embeddings.*"``): what they make of the text runs at the client.

        Raises:
            JobError: one sentence on what cannot be loaded or is not served.
        """
        name = shared_name(path_or_id)
        if name is not None:
            given = {
                "secret": secret != "inputs", "profile": profile != "precise", "backend": backend != "local",
                "max_length": max_length is not None, "padding": not padding, "calibration": calibration is not None,
                "public_weights": bool(public_weights), **dict.fromkeys(loading, True),
            }  # fmt: skip
            return _shared(name, task, cluster, keys, options, [n for n in given if given[n]])
        return cls(
            load_model(path_or_id, task, **loading), secret=secret, profile=profile, cluster=cluster, keys=keys,
            backend=backend, max_length=max_length, padding=padding, calibration=calibration, options=options,
            public_weights=public_weights,
        )  # fmt: skip

    @classmethod
    def from_model(
        cls, model: Any, tokenizer: Any = None, *, task: str, processor: Any = None, **options: Any
    ) -> Self:
        """The same from a transformers model in memory, in float32, with its tokenizer or image processor.

        Raises:
            JobError: an unknown task, or weights that are not floats.
        """
        if task not in TASKS:
            raise JobError(f"there is no task {task!r}; use one of {', '.join(TASKS)}")
        check_model(model)
        return cls(Loaded(model.float().eval(), task, tokenizer, processor, type(model).__name__), **options)

    # ---- one call -------------------------------------------------------------------------------------------

    def __call__(self, texts: Any = None, **inputs: Any) -> ModelOutput:
        """The model's outputs for texts (one, a list, or a list of pairs) or images, or for tensors by name.

        Args:
            texts: a text, a pair of texts as a tuple, a list of either; for image models an image or a list of images.
                Secret; how many there are, and the length that all are padded to, is public.
            inputs: ``input_ids`` with ``attention_mask`` (padding at the end) and what else the model takes, or
                ``pixel_values``. Secret; shapes are public.

        Raises:
            JobError: what is given does not fit the model; one sentence, before any work.
            CaptureError: the model holds what cannot run under the protocol; lists all of it.
            RangeError: values left the calibrated ranges; nothing is opened.
            LinkError: a party is gone or silent.
        """
        given, lengths = self._reader.inputs(texts, inputs)
        with self._run() as run:
            outputs = self._called(run, given)
            report = self.last_report = run.report()
        if lengths is not None:
            longest, wide = int(lengths.max()), given["input_ids"].shape[1]
            outputs = {
                n: t[:, :longest] if t.dim() > 2 and t.shape[1] == wide else t for n, t in outputs.items()
            }
        return ModelOutput(outputs, self._reader.labels(outputs, given, lengths), report)

    def estimate(self, texts: Any = None, **inputs: Any) -> CostReport:
        """What a call with these arguments will cost as a session's first one, exactly: the same commands on shapes,
        without data."""
        given, _ = self._reader.inputs(texts, inputs)
        with self._on_shapes() as run:
            self._called(run, given)
            return run.report()

    def plan(self, texts: Any = None, **inputs: Any) -> Plan:
        """The plan of a call with these arguments; ``print`` it to see what runs where."""
        return self._planner.one_call(self._reader.inputs(texts, inputs)[0])[1]

    # ---- token by token -------------------------------------------------------------------------------------

    def generate(
        self,
        prompt: Any,
        *,
        max_new_tokens: int = 20,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = None,
        stop: str | int | Sequence[str | int] | None = None,
        release: str = "tokens",
        seed: int | None = None,
        generator: torch.Generator | None = None,
        callback: Callable[[int, str], Any] | None = None,
    ) -> GenerateOutput:
        """Write a text on. Keys and values of all tokens stay with the parties as shares from step to step.

        Args:
            prompt: a text, or its token ids (1, tokens) or a list of them. Secret; public is the length that it is
                padded to.
            max_new_tokens: at most so many. Public.
            do_sample: draw from the softmax of the logits over ``temperature`` instead of taking the likeliest token;
                the client supplies the noise as a secret input. Public, and the temperature, too.
            top_k: draw among so many of the likeliest; with ``release="logits"`` alone.
            stop: texts or token ids to stop after; by default the model's end of sequence. When it stops is public,
                except with ``release="end"``: there all steps are done, and the client cuts.
            release: what is opened to the client, and so ever leaves the parties: ``"logits"`` of every step,
                the chosen ``"tokens"`` one by one, or all tokens at the ``"end"``. With the latter two the choice is
                made under the protocol. The parties see no token with any of them.
            seed, generator: of the noise. Secret in so far as the noise is.
            callback: ``callback(token, text so far)`` after each token.

        Raises:
            JobError, CaptureError, RangeError, LinkError: as for a call.
        """
        wishes = self._wishes({
            "max_new_tokens": max_new_tokens, "do_sample": do_sample, "temperature": temperature, "top_k": top_k,
            "release": release, "seed": seed, "generator": generator,
        })  # fmt: skip
        ids = self._reader.prompt(prompt)
        layout, stops = self._layout(ids, wishes), self._reader.stops(stop)
        with self._run() as run:
            generation = Generation(run, self._planner, ids, layout, wishes)
            tokens, text = list[int](), ""
            for tokens, text in self._written(generation, stops):
                if callback is not None:
                    callback(tokens[-1], text)
            report = self.last_report = run.report(steps=tuple(generation.seconds))
        logits = torch.stack(generation.logits) if generation.logits else None
        return GenerateOutput(text, tokens, report, logits)

    def stream(self, prompt: Any, *, stop: Any = None, **options: Any) -> Iterator[str]:
        """What `generate` adds to the text, piece by piece as tokens are opened; with its arguments."""
        wishes, ids, given = self._wishes(options), self._reader.prompt(prompt), ""
        layout, stops = self._layout(ids, wishes), self._reader.stops(stop)
        with self._run() as run:
            generation = Generation(run, self._planner, ids, layout, wishes)
            for _, text in self._written(generation, stops):
                yield text[len(given) :]
                given = text
            self.last_report = run.report(steps=tuple(generation.seconds))

    def estimate_generate(self, prompt: Any, *, stop: Any = None, **options: Any) -> CostReport:
        """What `generate` with these arguments will cost as a session's first call, exactly, if nothing stops it."""
        del stop
        wishes, ids = self._wishes(options), self._reader.prompt(prompt)
        layout = self._layout(ids, wishes)
        with self._on_shapes() as run:
            for _ in Generation(run, self._planner, ids, layout, wishes).tokens():
                pass
            return run.report()

    def set_progress_bar_config(self, **config: Any) -> None:
        """Options of the progress bar of `generate` (tqdm's): ``disable=True`` silences it."""
        self._progress = config

    def close(self) -> None:
        """End the session, and local parties with it; a later call starts others."""
        self._parties.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- how ------------------------------------------------------------------------------------------------

    @contextmanager
    def _run(self) -> Iterator[Run]:
        """A run on the open session, which ends with the first one that fails."""
        run = self._parties.run()
        try:
            yield run
            run.close()
        except GeneratorExit:
            run.close()
            raise
        except BaseException:
            self._parties.close()
            raise

    @contextmanager
    def _on_shapes(self) -> Iterator[Run]:
        def opened() -> Backend:
            return open_backend("meta", options=self._options)

        parties = Parties(opened, self._planner.load)
        try:
            yield parties.run()
        finally:
            parties.close()

    def _called(self, run: Run, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        name, plan = self._planner.one_call(given)
        run.load(name, plan)
        run.start_clock()
        found = run.call(name, inputs=dict(given))
        return {n: run.open(value).to(torch.float32) for n, value in found.items()}

    # ---- how texts are written on ---------------------------------------------------------------------------

    def _layout(self, prompt: Sequence[int], wishes: Wishes) -> Layout:
        # Within a layer's window, looking back to the beginning is the same as looking back so far.
        positions = min(self.loaded.longest, self.loaded.window or self.loaded.longest)
        return Generation.layout_of(
            len(prompt), wishes, limit=min(self.max_length, positions), positions=positions, pad=self.loaded.pad,
            learnt=self._planner.learnt, exact=not self.padding,
        )  # fmt: skip

    def _wishes(self, options: Mapping[str, Any]) -> Wishes:
        if self.loaded.task != "causal-lm":
            raise JobError(
                f"a model for {self.loaded.task} does not write texts; load one with task='causal-lm'"
            )
        given = dict(options)
        if unknown := sorted(set(given) - {*(f.name for f in fields(Wishes)), "seed"}):
            raise JobError(f"generate takes no {unknown[0]}; see its documentation for what it takes")
        seed = given.pop("seed", None)
        if seed is not None and given.get("generator") is not None:
            raise JobError("seed and generator say the same; give one of them")
        if given.get("generator") is None:
            # The noise is a secret input: torch's own generator starts from one number in every process.
            given["generator"] = torch.Generator().manual_seed(secrets.randbits(63) if seed is None else seed)
        return Wishes(**given)

    def _written(
        self, generation: Generation, stop: tuple[frozenset[int], tuple[str, ...]]
    ) -> Iterator[tuple[list[int], str]]:
        """(tokens, text) after each token, until one of the stops."""
        numbers, ends = stop
        tokens: list[int] = []
        total = generation.wishes.max_new_tokens
        with tqdm(total=total, unit="token", **{"delay": 2.0, **self._progress}) as bar:
            for token in generation.tokens():
                bar.update()
                tokens.append(token)
                text = self._reader.decoded(tokens)
                found = [text.index(end) for end in ends if end in text]
                yield tokens, text[: min(found)] if found else text
                if token in numbers or found:
                    return


def _shared(
    name: str, task: str | None, cluster: Any, keys: Any, options: Any, decided: Sequence[str]
) -> Any:
    """A shared model, whose class builds on this file's."""
    from sfumato.inference.shared import open_shared

    return open_shared(name, task=task, cluster=cluster, keys=keys, options=options, decided=decided)
