"""Layout and events of the page. What happens behind them is in `jobs`, what they show in `view`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from sfumato.errors import SfumatoError
from sfumato.ui import view
from sfumato.ui.jobs import Run, Session, Studio
from sfumato.ui.settings import EXAMPLES, FIELDS, Problem, Settings, problem_of

__all__ = ["COOKIE", "build", "dress"]

COOKIE = "sfumato-session"
_SETTLE_S, _TICK_S = 0.6, 0.2
_HERE = Path(__file__).parent

_WEIGHTS = [
    ("Public: parties see the model, nothing of yours", "public"),
    ("Secret: parties do not see the model either", "secret"),
]
_MODELS = [("Built in: digits and clothes, small and quick", "embedded")]

#: A press on a picture of the history names it; native buttons, so the keyboard works as well.
_PICK = """element.addEventListener('click', (event) => {
  const button = event.target.closest('button[data-index]');
  if (button) trigger('click', {index: Number(button.dataset.index)});
});"""


def dress() -> dict[str, Any]:
    """Theme, styles and script of the page, as `mount_gradio_app` takes them."""
    plain = ["system-ui", "Segoe UI", "Roboto", "Helvetica", "Arial", "sans-serif"]
    theme = gr.themes.Base(
        neutral_hue=gr.themes.colors.stone, font=plain, font_mono=["ui-monospace", "monospace"]
    )
    return {
        "theme": theme,
        "css": (_HERE / "style.css").read_text(encoding="utf-8"),
        "js": (_HERE / "page.js").read_text(encoding="utf-8"),
        "head": '<meta name="color-scheme" content="light dark">',
    }


def _slider(low: float, high: float, **options: Any) -> Any:
    """A slider whose number may be anything: `Settings` says what is wrong with it, in our words and our place."""
    made: Any = gr.Slider(low, high, buttons=[], min_width=130, **options)
    made.preprocess = lambda payload: payload
    return made


class _Page:
    """The components by name, and what their events do."""

    def __init__(self, studio: Studio) -> None:
        self._studio = studio
        self._tickets: dict[str, int] = {}
        start = studio.start_with
        gr.HTML(view.HEADER, elem_id="sf-head")
        with gr.Row(elem_id="sf-main", equal_height=False):
            with gr.Column(elem_id="sf-form", elem_classes="sf-card", scale=5, min_width=300):
                self._form(start)
            with gr.Column(elem_id="sf-side", scale=7, min_width=300):
                self.stage = gr.HTML(view.idle(), elem_id="sf-stage")
                self.history = gr.HTML("", js_on_load=_PICK, elem_id="sf-past")
        self.spoken = gr.HTML("", elem_id="sf-spoken")
        self.fields: list[Any] = [
            self.prompt, self.model, self.steps, self.guidance, self.weights, self.seed, self.size, self.cluster,
        ]  # fmt: skip

    def _form(self, start: Settings) -> None:
        self.prompt = gr.Textbox(
            label="What to draw", placeholder="a handwritten seven", lines=1, max_lines=4, autofocus=True,
            elem_id="sf-prompt",
        )  # fmt: skip
        self.errors = {"prompt": gr.HTML("", elem_classes="sf-slot")}
        with gr.Row(elem_id="sf-examples"):
            self.examples = [
                gr.Button(text, size="sm", min_width=0, elem_classes="sf-chip") for text in EXAMPLES
            ]
        known = any(value == start.model for _, value in _MODELS)
        self.model = gr.Dropdown(
            [*_MODELS, *([] if known else [(start.model, start.model)])], value=start.model, label="Model",
            info="Or type a folder, a hub id, or cluster:NAME.", allow_custom_value=True, elem_id="sf-model",
        )  # fmt: skip
        self.errors["model"] = gr.HTML("", elem_classes="sf-slot")
        with gr.Row(elem_classes="sf-pair"):
            self.steps = _slider(
                1, 50, value=start.steps, step=1, label="Steps",
                elem_id="sf-steps",
            )  # fmt: skip
            self.guidance = _slider(
                0, 15, value=start.guidance, step=0.5, label="Guidance",
                elem_id="sf-guidance",
            )  # fmt: skip
        secrecy = "secret" if start.secret_weights else "public"
        self.weights = gr.Radio(_WEIGHTS, value=secrecy, label="Weights of the model", elem_id="sf-weights")
        with gr.Accordion("More", open=bool(start.cluster), elem_id="sf-more") as self.more:
            with gr.Row(elem_classes="sf-pair"):
                self.seed = gr.Number(
                    start.seed, label="Seed", info="Same seed, same picture.", precision=0, min_width=130
                )
                self.size = gr.Number(
                    start.size, label="Pixels", info="Empty: the model's own.", precision=0, min_width=130
                )
            self.cluster = gr.Textbox(
                start.cluster, label="Cluster file", info="Empty: three parties on this machine.", max_lines=1,
                elem_id="sf-cluster",
            )  # fmt: skip
        self.errors["parties"] = gr.HTML("", elem_classes="sf-slot")
        self.estimate = gr.HTML(view.counting(False), elem_id="sf-estimate")
        self.errors["run"] = gr.HTML("", elem_classes="sf-slot")
        with gr.Row(elem_id="sf-buttons"):
            self.generate = gr.Button(
                "Generate", variant="primary", elem_id="sf-generate", scale=3, min_width=120
            )
            self.cancel = gr.Button("Cancel", interactive=False, elem_id="sf-cancel", scale=1, min_width=90)

    # ---- events --------------------------------------------------------------------------------------------

    def listen(self, page: gr.Blocks) -> None:
        """Connect what a person does with what happens."""
        quiet: dict[str, Any] = {
            "show_progress": "hidden",
            "api_visibility": "private",
            "concurrency_limit": None,
        }
        moving = [
            self.stage,
            self.history,
            self.spoken,
            self.generate,
            self.cancel,
            self.more,
            *self.errors.values(),
        ]
        page.load(self.on_load, None, moving, **quiet)
        counted = [self.estimate, self.model, self.more, *self.errors.values()]
        page.load(self.on_change, self.fields, counted, **quiet)
        gr.on(
            [field.change for field in self.fields[1:]],
            self.on_change,
            self.fields,
            counted,
            trigger_mode="multiple",
            **quiet,
        )
        # "multiple": a press right after a run must not be lost while the page still settles that run's last event;
        # `Studio.start` refuses a second run by itself.
        gr.on(
            [self.generate.click, self.prompt.submit],
            self.on_generate,
            self.fields,
            moving,
            trigger_mode="multiple",
            **quiet,
        ).then(self.on_drawn, self.fields, [self.estimate], **quiet)
        self.prompt.input(None, None, self.errors["prompt"], js="() => ''", **quiet)
        self.cancel.click(self.on_cancel, None, [self.cancel], queue=False, **quiet)
        self.history.click(self.on_pick, None, [self.stage, self.history, *self.fields], **quiet)
        for button, text in zip(self.examples, EXAMPLES, strict=True):
            button.click(
                None,
                None,
                self.prompt,
                js=f"() => {text!r}",
                show_progress="hidden",
                api_visibility="private",
            )

    def _session(self, request: gr.Request) -> Session:
        return self._studio.session(request.cookies.get(COOKIE) or request.session_hash or "")

    def on_load(self, request: gr.Request) -> Iterator[dict[Any, Any]]:
        """A page that was opened or reloaded: what this browser drew, and what it is drawing."""
        session = self._session(request)
        shown = view.stage(session.shown) if session.shown else view.idle()
        yield {self.stage: shown, self.history: view.history(session.history, session.shown)}
        if session.run is not None and session.run.active:
            yield from self._watch(session.run, session)

    def on_change(self, request: gr.Request, *values: Any) -> Iterator[dict[Any, Any]]:
        """Settings changed: once they have settled, count what they cost."""
        name = request.session_hash or ""
        ticket = self._tickets[name] = self._tickets.get(name, 0) + 1
        time.sleep(_SETTLE_S)
        if self._tickets[name] != ticket:
            return
        yield {self.estimate: view.counting(self._studio.drawing)}
        try:
            settings = Settings.of(*values)
            held = self._studio.models(settings)
            if held:
                yield {
                    self.model: gr.update(choices=[*_MODELS, *((name, f"cluster:{name}") for name in held)])
                }
            shown, problem = view.estimate(self._studio.estimate(settings)), None
        except Exception as error:
            shown, problem = view.unknown(), problem_of(error, "model")
        if self._tickets[name] == ticket:
            yield {self.estimate: shown, **self._told(problem)}

    def on_drawn(self, *values: Any) -> dict[Any, Any]:
        """A run is over: what the next one will cost, with a time that is now known."""
        try:
            shown = view.estimate(self._studio.estimate(Settings.of(*values)))
        except Exception:  # what is wrong is on the page already
            shown = view.unknown()
        return {self.estimate: shown}

    def on_generate(self, request: gr.Request, *values: Any) -> Iterator[dict[Any, Any]]:
        """Draw, and show how far it is."""
        session = self._session(request)
        if session.run is not None and session.run.active:  # from another tab of this browser
            yield from self._watch(session.run, session)
            return
        try:
            run = self._studio.start(Settings.of(*values), session)
        except SfumatoError as error:
            yield self._failed(problem_of(error), session)
            return
        yield self._told(None)
        yield from self._watch(run, session)

    def on_cancel(self, request: gr.Request) -> Any:
        """End the run after its step."""
        run = self._session(request).run
        if run is not None:
            run.cancel()
        return gr.update(interactive=False)

    def on_pick(self, request: gr.Request, event: gr.EventData) -> dict[Any, Any]:
        """Show an image of the history again, with its settings."""
        session = self._session(request)
        index = event._data.get("index") if event._data else None
        if not isinstance(index, int) or not 0 <= index < len(session.history):
            return {}
        session.shown = drawn = session.history[index]
        used = drawn.settings
        weights = "secret" if used.secret_weights else "public"
        restored = (
            used.prompt, used.model, used.steps, used.guidance, weights, used.seed, used.size, used.cluster,
        )  # fmt: skip
        return {
            self.stage: view.stage(drawn),
            self.history: view.history(session.history, drawn),
            **dict(zip(self.fields, restored, strict=True)),
        }

    # ---- inside --------------------------------------------------------------------------------------------

    def _watch(self, run: Run, session: Session) -> Iterator[dict[Any, Any]]:
        shown, heard = "", ""
        yield {self.generate: gr.update(interactive=False), self.cancel: gr.update(interactive=True)}
        while True:
            over = run.wait(_TICK_S if shown else 0.0)
            if over:
                break
            progress = run.progress()
            now, said = view.running(progress), view.spoken(progress)
            update: dict[Any, Any] = {self.stage: now} if now != shown else {}
            if said != heard:
                update[self.spoken] = said
            shown, heard = now, said
            if update:
                yield update
        idle = {self.generate: gr.update(interactive=True), self.cancel: gr.update(interactive=False)}
        if run.drawn is not None:
            yield {
                self.stage: view.stage(run.drawn),
                self.history: view.history(session.history, session.shown),
                self.spoken: "Done: the picture is ready",
                **idle,
            }
        elif run.problem is not None:
            yield {**self._failed(run.problem, session), **idle}
        else:
            yield {self.stage: view.idle(cancelled=True), self.spoken: "Cancelled", **idle}

    def _failed(self, problem: Problem, session: Session) -> dict[Any, Any]:
        shown = view.stage(session.shown) if session.shown else view.idle()
        return {self.stage: shown, self.spoken: "", **self._told(problem)}

    def _told(self, problem: Problem | None) -> dict[Any, Any]:
        told = {
            self.errors[name]: view.error(problem.text if problem and problem.field == name else None)
            for name in FIELDS
        }
        if problem is not None and problem.field == "parties":
            return {**told, self.more: gr.update(open=True)}
        return told


def build(studio: Studio) -> gr.Blocks:
    """The page of one studio."""
    with gr.Blocks(title="sfumato", analytics_enabled=False, fill_width=True) as blocks:
        _Page(studio).listen(blocks)
    blocks.queue(default_concurrency_limit=None, api_open=False)
    return blocks
