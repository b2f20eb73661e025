"""Layout and events of the page. What happens behind them is in `jobs`, what they show in `view`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr

from sfumato.ui import view
from sfumato.ui.jobs import Drawn, Run, Studio
from sfumato.ui.settings import EXAMPLES, FIELDS, Problem, Settings
from sfumato.ui.tabs import Tab, Tabs

__all__ = ["COOKIE", "build", "dress"]

COOKIE = "sfumato-session"
#: Seconds between two ticks, while something is under way and while nothing is.
_TICK_S, _IDLE_S = 0.25, 1.0
_HERE = Path(__file__).parent

_WEIGHTS = [
    ("Public: parties see the model, nothing of yours", "public"),
    ("Secret: parties do not see the model either", "secret"),
]
_MODELS = [("Built in: digits and clothes, small and quick", "embedded")]

#: A press on a picture of the history names it; native buttons, so the keyboard works as well.
_PICK = """element.addEventListener('click', (event) => {
  const button = event.target.closest('button[data-name]');
  if (button) trigger('click', {name: button.dataset.name});
});"""
#: New settings are told with the next tick; it shall come soon.
_HURRY = f"() => ({{__type__: 'update', value: {_TICK_S}}})"


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
        self._studio, self._tabs = studio, Tabs(studio)
        start = studio.start_with
        gr.HTML(view.HEADER, elem_id="sf-head")
        with gr.Row(elem_id="sf-main", equal_height=False):
            with gr.Column(elem_id="sf-form", elem_classes="sf-card", scale=5, min_width=300):
                self._form(start)
            with gr.Column(elem_id="sf-side", scale=7, min_width=300):
                self.stage = gr.HTML(view.idle(), elem_id="sf-stage")
                self.history = gr.HTML("", js_on_load=_PICK, elem_id="sf-past")
        self.spoken = gr.HTML("", elem_id="sf-spoken")
        self.shown = gr.Textbox("", visible=False)
        self.timer = gr.Timer(_IDLE_S)
        self.fields: list[Any] = [
            self.prompt, self.model, self.steps, self.guidance, self.weights, self.seed, self.size, self.cluster,
        ]  # fmt: skip
        # Errors come last: what stands beside them is there already when they show.
        self._parts: list[Any] = [
            self.stage, self.history, self.spoken, self.estimate, *self.fields, self.generate, self.cancel, self.more,
            *self.errors.values(),
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
        self._models = [*_MODELS, *([] if known else [(start.model, start.model)])]
        self.model = gr.Dropdown(
            self._models, value=start.model, label="Model",
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
                self.size = gr.Textbox(  # a number field would show 0 where there is none
                    str(start.size or ""),
                    label="Pixels",
                    info="Empty: the model's own.",
                    max_lines=1,
                    min_width=130,
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
        """Connect what a person does with what happens.

        Every event is a plain request with its answer: Gradio's queue tells its answers on a stream that it closes when
        nothing is pending, and an event that begins at that moment is never heard of. What a person does changes the
        state behind the page; what the page shows comes with the ticks alone, one after the other.
        """
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "queue": False}
        # A press must not be lost while an earlier one is under way; `Studio.start` refuses a second run by itself.
        press = {**quiet, "trigger_mode": "multiple"}
        gr.on(
            [page.load, self.timer.tick],
            self.on_tick,
            [self.shown, self.timer, *self.fields],
            [self.timer, *self._parts, self.shown],
            trigger_mode="once",
            **quiet,
        )
        gr.on([field.change for field in self.fields[1:]], None, None, self.timer, js=_HURRY, **quiet)
        gr.on([self.generate.click, self.prompt.submit], self.on_generate, self.fields, self.timer, **press)
        self.cancel.click(self.on_cancel, None, self.timer, **press)
        self.history.click(self.on_pick, None, self.timer, **press)
        self.prompt.input(None, None, self.errors["prompt"], js="() => ''", **quiet)
        for button, text in zip(self.examples, EXAMPLES, strict=True):
            button.click(None, None, self.prompt, js=f"() => {text!r}", **quiet)

    def _tab(self, request: gr.Request) -> Tab:
        name = request.session_hash or ""
        return self._tabs.tab(name, request.cookies.get(COOKIE) or name)

    def on_generate(self, request: gr.Request, *values: Any) -> Any:
        """Draw."""
        self._tab(request).generate(*values)
        return gr.update(value=_TICK_S)

    def on_cancel(self, request: gr.Request) -> Any:
        """End the run after its step."""
        run = self._tab(request).session.run
        if run is not None:
            run.cancel()
        return gr.update(value=_TICK_S)

    def on_pick(self, request: gr.Request, event: gr.EventData) -> Any:
        """Show an image of the history again, with its settings."""
        self._tab(request).pick((event._data or {}).get("name"))
        return gr.update(value=_TICK_S)

    def on_tick(self, request: gr.Request, shown: Any, pace: Any, *values: Any) -> dict[Any, Any]:
        """What has changed since the tab heard last. ``shown``: the marks of what it shows, as the last answer that it
        got left them, so that a lost answer is told again; ``pace``: seconds between its ticks."""
        tab = self._tab(request)
        run = tab.follow(values)
        told = self._told(tab, run)
        marks = {name: mark for name, (mark, _) in told.items()}
        known = _marks(shown)
        answer: dict[Any, Any] = {}
        for name, (mark, made) in told.items():
            if known.get(name) != mark:
                answer.update(made())
        wanted = _IDLE_S if run is None and tab.counted is not None else _TICK_S
        if pace != wanted:
            answer[self.timer] = gr.update(value=wanted)
        if known != marks:
            answer[self.shown] = json.dumps(marks)
        return answer or {self.timer: gr.skip()}

    def _told(self, tab: Tab, run: Run | None) -> dict[str, tuple[str, Callable[[], dict[Any, Any]]]]:
        """Everything that a tab shall show: a mark that changes with it, and how to make it."""
        session = tab.session
        drawn = None if run is not None or session.cancelled else session.shown
        spoken, phase = tab.spoken, "over"
        if run is not None:
            progress = run.progress()
            frame, spoken, phase = view.running(progress), view.spoken(progress), "runs"
            if progress.phase in ("cancelling", "opening"):  # it ends by itself now
                phase = "ends"
        else:
            frame = view.idle(session.cancelled)
        images, looked = list(session.history), session.shown
        past = " ".join([looked.name if looked else "", *(drawn.name for drawn in images)])
        cost = self._cost(tab)
        parts: dict[str, tuple[str, Callable[[], dict[Any, Any]]]] = {
            "stage": (
                _mark(drawn.name if drawn else frame),
                lambda: {self.stage: view.stage(drawn) if drawn else frame},
            ),
            "past": (_mark(past), lambda: {self.history: view.history(images, looked)}),
            "spoken": (_mark(spoken), lambda: {self.spoken: spoken}),
            "estimate": (_mark(cost), lambda: {self.estimate: cost}),
            "models": (_mark(*tab.models), lambda: self._choices(tab.models)),
            "buttons": (
                phase,
                lambda: {
                    self.generate: gr.update(interactive=phase == "over"),
                    self.cancel: gr.update(interactive=phase == "runs"),
                },
            ),
            "fields": (str(tab.restored.number), lambda: self._restored(tab.restored.what)),
            "problem": (str(tab.told.number), lambda: self._problem(tab.told.what)),
        }
        return parts

    def _cost(self, tab: Tab) -> str:
        counted = tab.counted
        if counted is None:
            return view.counting(self._studio.drawing)
        return view.unknown() if counted.cost is None else view.estimate(counted.cost)

    def _choices(self, models: list[str]) -> dict[Any, Any]:
        return {
            self.model: gr.update(choices=[*self._models, *((name, f"cluster:{name}") for name in models)])
        }

    def _restored(self, drawn: Drawn | None) -> dict[Any, Any]:
        if drawn is None:
            return {}
        used = drawn.settings
        weights = "secret" if used.secret_weights else "public"
        values = (
            used.prompt, used.model, used.steps, used.guidance, weights, used.seed, used.size, used.cluster,
        )  # fmt: skip
        return dict(zip(self.fields, values, strict=True))

    def _problem(self, problem: Problem | None) -> dict[Any, Any]:
        told = {
            self.errors[name]: view.error(problem.text if problem and problem.field == name else None)
            for name in FIELDS
        }
        if problem is not None and problem.field == "parties":
            return {**told, self.more: gr.update(open=True)}
        return told


def _mark(*texts: str) -> str:
    """Changes when the texts do."""
    return hashlib.blake2s("\0".join(texts).encode(), digest_size=8).hexdigest()


def _marks(shown: Any) -> dict[str, str]:
    """What a tab says it shows; nothing, where it does not say."""
    try:
        found = json.loads(shown)
    except (TypeError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def build(studio: Studio) -> gr.Blocks:
    """The page of one studio."""
    with gr.Blocks(title="sfumato", analytics_enabled=False, fill_width=True) as blocks:
        _Page(studio).listen(blocks)
    blocks.queue(api_open=False)
    return blocks
