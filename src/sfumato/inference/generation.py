"""Writing a text on, token by token: keys and values stay with the parties, and a policy says what is opened when."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sfumato.errors import JobError
from sfumato.graph.plan import Plan
from sfumato.inference.handed import check_steps
from sfumato.inference.layout import Layout
from sfumato.inference.parties import Run
from sfumato.inference.plans import Planner, gumbel
from sfumato.inference.texts import bucket_of
from sfumato.runtime.report import CostReport

__all__ = ["RELEASES", "GenerateOutput", "Generation", "Wishes"]

#: What is opened to the client: every step's logits, the chosen tokens one by one, or all tokens at the end.
RELEASES = ("logits", "tokens", "end")


@dataclass(frozen=True)
class GenerateOutput:
    """``tokens`` after the prompt, and their ``text``; ``logits`` (tokens, vocabulary) where these were opened;
    ``report``: what it cost."""

    text: str
    tokens: list[int]
    report: CostReport
    logits: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What a call of ``generate`` asks for. All of it is public but the ``generator``'s noise."""

    max_new_tokens: int = 20
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    release: str = "tokens"
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise JobError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}")
        if self.release not in RELEASES:
            raise JobError(f"there is no release {self.release!r}; use one of {', '.join(RELEASES)}")
        if not self.temperature > 0.0:
            raise JobError("temperature must be positive; do_sample=False takes the likeliest token")
        if self.top_k is not None and not self.do_sample:
            raise JobError("top_k chooses among draws; add do_sample=True, or leave it out")
        if self.top_k is not None and self.top_k < 1:
            raise JobError(f"top_k must be at least 1, not {self.top_k}")
        if self.top_k is not None and self.release != "logits":
            raise JobError(
                f"top_k is taken at the client, from logits that release={self.release!r} keeps closed; use "
                "release='logits', or leave top_k out"
            )


@dataclass
class Generation:
    """One prompt of ``ids`` as it is written on in one run of the parties."""

    run: Run
    planner: Planner
    ids: Sequence[int]
    layout: Layout
    wishes: Wishes
    seconds: list[float] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)

    @staticmethod
    def layout_of(
        count: int, wishes: Wishes, *, limit: int, positions: int, pad: int, learnt: bool, exact: bool
    ) -> Layout:
        """Places for a prompt of ``count`` tokens and what follows; at most ``limit`` for the prompt.

        Raises:
            JobError: the prompt is empty or too long, or the model has no positions for what follows.
        """
        if count == 0:
            raise JobError("an empty prompt has no token to go on from; give some text")
        prompt = bucket_of(count, limit, exact=exact)
        asked = prompt + wishes.max_new_tokens - 1
        if asked > positions:
            raise JobError(
                f"a prompt padded to {prompt} and {wishes.max_new_tokens} new tokens need more than the {positions} "
                "positions that are served of this model; ask for fewer tokens"
            )
        return Layout(count, prompt, bucket_of(asked, positions, exact=exact), pad, learnt)

    def tokens(self) -> Iterator[int]:
        """The chosen tokens, each as soon as it is known; whoever has enough of them stops asking."""
        wishes, run, layout = self.wishes, self.run, self.layout
        hot, more = wishes.release == "end", wishes.max_new_tokens > 1
        noise = wishes.temperature if wishes.do_sample else None
        nothing: tuple[str, Plan | None] = ("", None)
        first, prompted = self.planner.prefill(layout)
        following, written = self.planner.decode(layout, hot=hot) if more else nothing
        choose, chosen = (
            self.planner.choose(layout, hot=hot, temperature=noise) if wishes.release != "logits" else nothing
        )
        check_steps(prompted, written, chosen, hot=hot)
        for name, plan in ((first, prompted), (following, written), (choose, chosen)):
            if plan is not None:
                run.load(name, plan)
        run.start_clock()
        started, closed = time.monotonic(), list[Any]()
        logits, kept = run.call(first, **layout.first(self.ids))
        for k in range(wishes.max_new_tokens):
            token: dict[str, Any] = {}
            if wishes.release == "logits":
                number = self._chosen(run.open(logits).to(torch.float32))
                token["ids"] = torch.tensor([[number]])
            else:
                size = logits.shape[-1]
                noisy = {} if noise is None else {"noise": gumbel(size, noise, wishes.generator)}
                index, *row = run.call(choose, logits=logits, **noisy)
                run.drop(logits)
                if hot:
                    closed.append(index)
                    token["hot"] = row[0]
                else:
                    number = round(float(run.open(index)))
                    token["ids"] = torch.tensor([[number]])
            self.seconds.append(time.monotonic() - started)
            if not hot:
                yield number
            if k + 1 < wishes.max_new_tokens:
                started = time.monotonic()
                logits, after = run.call(following, kept=kept, **layout.next(k), **token)
                run.drop(kept)
                kept = after
            run.drop(*token.values())
        # The last one descends from every call: opened first, one certificate covers them all. And all are opened,
        # whatever they are, so that nobody learns where the text ends.
        yield from reversed([round(float(run.open(index))) for index in reversed(closed)])

    def _chosen(self, logits: Tensor) -> int:
        """At the client: the largest of the logits, or of logits and noise among the ``top_k`` largest."""
        wishes = self.wishes
        self.logits.append(logits[0])
        if wishes.do_sample:
            noise = gumbel(logits.shape[-1], wishes.temperature, wishes.generator)
            if wishes.top_k is not None and wishes.top_k < logits.shape[-1]:
                least = logits.topk(wishes.top_k).values[..., -1:]
                logits = logits.masked_fill(logits < least, -torch.inf)
            logits = logits + noise
        return int(logits.argmax(-1))
