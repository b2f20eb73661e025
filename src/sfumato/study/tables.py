"""The rows of each paper's tables, with the controls that no paper ran (private-diffusion.md 1.5, 2.4, 3.4 and 7)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from sfumato.diffusion.correction import Pull
from sfumato.diffusion.samplers import AUTO
from sfumato.errors import JobError
from sfumato.study.setting import Offline, Setting
from sfumato.zoo import DISTILLED
from sfumato.zoo.classes import FEW

__all__ = ["CONTROL_4", "ORIGINAL", "OURS", "STUDIES", "TUNED", "Study", "Table", "study"]

FINE = 50
#: The base of every comparison: the exact network in float.
ORIGINAL = Setting(name="original, 50 steps", steps=FINE)


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under a heading, with what they are there to show. ``share``: of the study's number of images."""

    title: str
    shows: str
    rows: tuple[Setting, ...]
    share: float = 1.0


@dataclass(frozen=True, slots=True)
class Study:
    """What ``sfumato reproduce`` draws: ``main`` rows also run under the protocol itself."""

    name: str
    title: str
    main: tuple[Setting, ...]
    tables: tuple[Table, ...]


def _few(steps: int, name: str = "ours", **more: Any) -> Setting:
    """DPM-Solver++ on trailing timesteps under the profile ``fast``."""
    named = f"{name}, {steps} steps"
    return Setting(name=named, steps=steps, solver="dpm++", spacing="trailing", profile="fast", **more)


_AUTO, _DISTILLED = AUTO["embedded"], AUTO[DISTILLED]
#: Our few-step settings by model: chosen on images of the exact network that no study draws (benchmarks/few_steps.py),
#: and judged on others (docs/corrections.md). The second is of the network that has guidance in it, or of a student,
#: whose row is drawn where its weights are.
OURS = {
    "embedded": (
        _few(_AUTO.steps, guidance=_AUTO.guidance, unguided=_AUTO.arguments["unguided_steps"]),
        _few(_DISTILLED.steps, "ours, distilled guidance", network="distilled"),
    ),
    "dit": (_few(10, guidance=2.75),),
    "cifar10": (
        _few(10, guidance=3.0),
        Setting(name="ours, few-step student, 10 steps", steps=10, profile="fast", network=FEW),
    ),
}
_OURS = (_few(5),)


#: Networks that were tuned to the functions of the paper under which they are studied, by model.
TUNED = {"sdu": {"mnist10": "tuned-sdu"}, "cipherdm": {"mnist01": "tuned-cipherdm"}}
#: The beginning of the names of such rows.
CONTROL_4 = "control 4, network tuned on the functions"


def _tuned(paper: str, model: str) -> tuple[str, ...]:
    """The tuned network of a model, or none."""
    found = TUNED[paper].get(model)
    return () if found is None else (found,)


def _sdu(steps: int = 10, profile: str | None = "sdu", **offline: object) -> Setting:
    given = {"reading": "B", "fine": FINE, **offline}
    made = Offline(**given)  # type: ignore[arg-type]
    aligned = made.fine % steps == 0 and made.fine > steps
    return Setting(name=f"SDU, {steps} steps", steps=steps, aligned=aligned, profile=profile, offline=made)


def _approximated(steps: int, profile: str = "sdu") -> Setting:
    return Setting(name=f"approximated, {steps} steps", steps=steps, profile=profile)


def _exact(steps: int, **more: object) -> Setting:
    return Setting(name=f"exact, {steps} steps", steps=steps, **more)  # type: ignore[arg-type]


def _named(setting: Setting, name: str) -> Setting:
    return replace(setting, name=name)


def _sdu_study(model: str) -> Study:
    ours = OURS.get(model, _OURS)
    pull, corrected = Pull(), _sdu()
    main = (_approximated(50), _approximated(10), corrected, *ours)
    ablation = tuple(_sdu(steps) for steps in (25, 20, 10, 5))
    m_rows = tuple(
        _named(_sdu(fine=fine), f"m = {fine // 10} ({fine} fine steps)") for fine in (10, 20, 50, 100)
    )
    switches = (
        _named(_sdu(profile=None), "exact + SDU (control 2)"),
        _named(_sdu(profile=None, reading="A"), "exact + SDU, reading A"),
        _named(replace(_sdu(profile=None), aligned=False), "exact + SDU, own grid"),
        _named(_sdu(profile=None, pull=Pull(eta=0.3)), "exact + SDU, eta 0.3"),
        _named(_sdu(profile=None, pull=Pull(weight="sigma/abar", cap=1.0)), "exact + SDU, sigma/abar, cap 1"),
        _named(_sdu(profile=None, independent=True), "exact + SDU, independent noise"),
        _named(_exact(10), "exact, 10 steps"),
        _named(_exact(10, aligned=True), "exact, 10 steps, aligned grid"),
    )
    controls = (
        _named(
            Setting(name="", steps=10, aligned=True, profile="sdu", lowered=pull),
            "control 1: guidance w - g_t, no record",
        ),
        _named(_sdu(profile=None), "control 2: the correction on the exact network"),
        _named(
            Setting(name="", steps=10, solver="dpm++", spacing="trailing", profile="sdu"),
            "control 3: better solver, same bytes",
        ),
        _named(
            Setting(name="", steps=30, profile="fast"), "control 3: tighter and cheaper functions, more steps"
        ),
        _named(_exact(5, solver="dpm++", spacing="trailing"), "exact, DPM-Solver++ 5 steps"),
        *(
            replace(_approximated(10), name=f"{CONTROL_4}: approximated, 10 steps", network=network)
            for network in _tuned("sdu", model)
        ),
    )
    beyond = (
        _named(_sdu(kind="measured"), "measured error (control variate)"),
        _named(_sdu(kind="blend"), "blend, weights fitted per step"),
        _named(_sdu(profile="sdu-doubted"), "SDU at the settings that were doubted"),
        _named(_approximated(10, "sdu-doubted"), "approximated at the settings that were doubted"),
        Setting(
            name="HE-Diffusion's sampler (insecure: its server sees every step)", steps=FINE, solver="pndm"
        ),
    )
    return Study(
        "sdu", "SDU: few secure steps, corrected by scores computed in the clear", main,
        (
            Table("SDU's Table 1", "the original, the approximated network, and the correction", (ORIGINAL, *main)),
            Table("Steps of the secret run", "SDU's Figure 5", (*ablation, _approximated(5), *ours), 0.5),
            Table("Fine steps for each coarse one", "fine steps of the record, m of Algorithm 1", m_rows, 0.5),
            Table("Switches", "what the text leaves open, on the exact network", switches, 0.5),
            Table("Controls", "what explains the gain", controls),
            Table("Beyond", "other corrections, doubted settings, and the insecure reference", beyond, 0.5),
        ),
    )  # fmt: skip


def _usg_study(model: str) -> Study:
    ours = OURS.get(model, _OURS)

    def usg(profile: str | None, eta: float = 0.1, **more: object) -> Setting:
        made = _sdu(FINE, profile, reading="A", pull=Pull(eta=eta), **more)
        return replace(made, name=f"{profile or 'vanilla'} + USG, eta {eta:g}")

    def rows(profile: str) -> tuple[Setting, Setting]:
        return Setting(name=profile, steps=FINE, profile=profile), usg(profile)

    precise, loose = rows("usg-precise"), rows("usg-loose")
    lowered = Setting(
        name="usg-loose, guidance w - g_t (control 1)", steps=FINE, profile="usg-loose", lowered=Pull()
    )
    return Study(
        "usg", "USG: loose approximations, corrected by unconditional scores",
        (*precise, *loose, *ours),
        (
            Table("USG's Tables 1 and 2", "precise and loose, with and without the correction",
                  (ORIGINAL, *precise, *loose, usg(None), *ours)),
            Table("The weight", "eta of the correction, on the loose profile",
                  tuple(usg("usg-loose", eta) for eta in (0.05, 0.1, 0.2)), 0.5),
            Table("Controls", "what explains the gain", (
                lowered,
                replace(_sdu(FINE, "usg-loose", kind="measured", reading="A"), name="usg-loose + measured error"),
                replace(_sdu(FINE, "usg-loose", kind="blend", reading="A"), name="usg-loose + blend"),
            ), 0.5),
            Table("Few steps", "the correction where steps are few",
                  tuple(replace(_sdu(n, "usg-loose", reading="A"), name=f"usg-loose + USG, {n} steps")
                        for n in (10, 5)), 0.5),
        ),
    )  # fmt: skip


def _cipherdm_study(model: str) -> Study:
    def row(name: str, profile: str | None, **more: object) -> Setting:
        return Setting(name=name, steps=FINE, profile=profile, **more)  # type: ignore[arg-type]

    soft = (("softmax", "cipherdm.softmax"),)
    silu = (("silu", "cipherdm.silu"), ("mish", "cipherdm.mish"))
    clamped = (("softmax", "cipherdm.softmax-clamped"),)
    main = (
        row("SPU's functions", "spu"),
        row("CipherDM (softmax and SiLU)", "cipherdm"),
        row("ours, 50 steps", "fast"),
    )
    corrected = replace(_sdu(FINE, "cipherdm", reading="A"), name="CipherDM + USG", aligned=False)
    return Study(
        "cipherdm", "CipherDM: its MNIST model, its approximations, and their repair", main,
        (
            Table("Quality", "CipherDM's approximations on a network that draws digits", (
                ORIGINAL, *main, row("+ softmax", "spu", methods=soft), row("+ SiLU", "spu", methods=silu), corrected,
            )),
            Table("The cause and the repair", "negative exponentials, and forms that have none", (
                row("softmax clamped at 0, SiLU exact", "precise", methods=clamped),
                row("softmax as published, SiLU exact", "precise", methods=soft),
                row("CipherDM mended (even power, refitted SiLU)", "cipherdm-mended"),
                *(row(f"{CONTROL_4}: CipherDM", "cipherdm", network=network) for network in _tuned("cipherdm", model)),
            )),
            Table("Fewer steps", "what we would run", (
                _few(10),
                _exact(10, solver="dpm++", spacing="trailing"),
            )),
        ),
    )  # fmt: skip


STUDIES: dict[str, tuple[Callable[[str], Study], tuple[str, ...]]] = {
    "sdu": (_sdu_study, ("embedded", "cifar10", "dit", "mnist10")),
    "usg": (_usg_study, ("embedded", "cifar10", "dit", "mnist01")),
    "cipherdm": (_cipherdm_study, ("mnist01", "mnist10", "mnist01-mish")),
}


def study(paper: str, model: str, *, listed: bool = True) -> Study:
    """The rows of a paper on a model; ``listed``: one that comes with sfumato, else any pipeline.

    Raises:
        JobError: there is no such paper, or it is not studied on this model.
    """
    if paper not in STUDIES:
        raise JobError(f"there is no study of {paper!r}; use one of {', '.join(STUDIES)}")
    make, models = STUDIES[paper]
    if listed and model not in models:
        raise JobError(f"{paper} is studied on {', '.join(models)}, not on {model!r}")
    made = make(model)
    return _same_time(made) if model.startswith("mnist") else made


def _same_time(made: Study) -> Study:
    """The study of a network that predicts v: an effective score (reading B) is one of noise."""

    def moved(row: Setting) -> Setting:
        return row if row.offline is None else replace(row, offline=replace(row.offline, reading="A"))

    tables = tuple(replace(table, rows=tuple(map(moved, table.rows))) for table in made.tables)
    return replace(made, main=tuple(map(moved, made.main)), tables=tables)
