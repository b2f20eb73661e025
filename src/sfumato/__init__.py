"""Private generative AI: diffusion models and transformers under secure multi-party computation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sfumato.errors import (
    BudgetExceeded,
    CaptureError,
    InsecureError,
    JobError,
    LinkError,
    ProtocolError,
    RangeError,
    SfumatoError,
    TypeMismatch,
)

if TYPE_CHECKING:
    from sfumato.api import Deployment, Handle, Result, deploy, estimate, run, share
    from sfumato.diffusion.image import SecureImg2ImgPipeline, SecureInpaintPipeline
    from sfumato.diffusion.pipeline import SecurePipeline
    from sfumato.graph.capture import capture
    from sfumato.graph.plan import Plan
    from sfumato.graph.planning import make_plan
    from sfumato.inference.model import SecureModel
    from sfumato.runtime.report import CostReport
    from sfumato.zoo import embedded_path

__version__ = "0.1.0"

# Loaded on first use: torch takes two seconds, and a command line that only prints help should not wait for it.
_LAZY = {
    "CostReport": "sfumato.runtime.report",
    "Deployment": "sfumato.api",
    "Handle": "sfumato.api",
    "Plan": "sfumato.graph.plan",
    "Result": "sfumato.api",
    "SecureImg2ImgPipeline": "sfumato.diffusion.image",
    "SecureInpaintPipeline": "sfumato.diffusion.image",
    "SecureModel": "sfumato.inference.model",
    "SecurePipeline": "sfumato.diffusion.pipeline",
    "capture": "sfumato.graph.capture",
    "deploy": "sfumato.api",
    "embedded_path": "sfumato.zoo",
    "estimate": "sfumato.api",
    "make_plan": "sfumato.graph.planning",
    "run": "sfumato.api",
    "share": "sfumato.api",
}

__all__ = [
    "BudgetExceeded",
    "CaptureError",
    "CostReport",
    "Deployment",
    "Handle",
    "InsecureError",
    "JobError",
    "LinkError",
    "Plan",
    "ProtocolError",
    "RangeError",
    "Result",
    "SecureImg2ImgPipeline",
    "SecureInpaintPipeline",
    "SecureModel",
    "SecurePipeline",
    "SfumatoError",
    "TypeMismatch",
    "capture",
    "deploy",
    "embedded_path",
    "estimate",
    "make_plan",
    "run",
    "share",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'sfumato' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
