"""The layers of docs/design/001-architecture.md, held by reading every import of the package with `ast`.

All violations are reported at once. Imports inside functions and under TYPE_CHECKING count like any other.
"""

from __future__ import annotations

import ast
import fnmatch
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "src" / "sfumato"

# layer -> what it may import of ours, besides itself. `__init__` is the public face and may import all.
BASE = {"types", "errors"}
MACHINERY = BASE | {"ring", "link", "session", "protocol", "ops", "catalogue", "graph"}
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "types": {"errors"},
    "ring": BASE,
    "link": BASE,
    "session": BASE | {"ring", "link"},
    "protocol": BASE | {"ring", "link", "session"},
    "ops": BASE | {"ring", "link", "session", "protocol"},
    "graph": BASE | {"ring", "link", "session", "protocol", "ops", "catalogue"},
    "runtime": MACHINERY,
    "api": MACHINERY | {"runtime"},
    "bench": MACHINERY | {"runtime"},
    "zoo": BASE,
    "quality": BASE,
    "dp": BASE | {"zoo", "quality"},
    "diffusion": MACHINERY | {"runtime", "zoo"},
    "inference": MACHINERY | {"runtime", "zoo"},
    "catalogue": BASE | {"ring", "link", "session", "protocol", "ops", "zoo"},
    "study": MACHINERY | {"runtime", "api", "bench", "zoo", "quality", "diffusion"},
    "ui": MACHINERY | {"runtime", "zoo", "diffusion"},
    "shell": MACHINERY
    | {
        "runtime",
        "api",
        "bench",
        "zoo",
        "dp",
        "diffusion",
        "inference",
        "catalogue",
        "ui",
        "study",
        "quality",
    },
}


@dataclass(frozen=True)
class Rule:
    """A name that may be used only in some files. Patterns are of the path inside the package."""

    names: tuple[str, ...]  # dotted; a name also covers what is below it; a trailing * matches any ending
    why: str
    only: tuple[str, ...] = ()  # files that may
    never: tuple[str, ...] = ("*",)  # files that may not, unless in `only`

    def forbids(self, path: str, name: str) -> bool:
        if any(fnmatch.fnmatch(path, pattern) for pattern in self.only):
            return False
        if not any(fnmatch.fnmatch(path, pattern) for pattern in self.never):
            return False
        return any(fnmatch.fnmatchcase(name, known) or name.startswith(known + ".") for known in self.names)


RULES = (
    Rule(("torch.export",), "only graph/capture.py captures", only=("graph/capture.py",)),
    Rule(
        ("diffusers", "transformers"),
        "only diffusion/, inference/, dp/ and zoo/ know the model libraries, and the catalogue's recorder of models",
        only=("diffusion/*", "inference/*", "dp/*", "zoo/*", "catalogue/record.py"),
    ),
    Rule(("typer", "rich", "click"), "only shell/ talks to a terminal", only=("shell/*",)),
    Rule(("gradio", "fastapi", "uvicorn"), "only ui/ makes pages", only=("ui/*",)),
    Rule(
        ("pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve"),
        "bytes of others are never unpickled",
    ),
    Rule(
        ("torch.load",),
        "torch.load can unpickle; use safetensors",
        only=("zoo/train/*", "zoo/train.py", "dp/*"),
    ),
    Rule(
        (
            "torch.rand*",
            "torch.normal",
            "torch.bernoulli",
            "torch.multinomial",
            "torch.manual_seed",
            "numpy.random",
            "random",
        ),
        "secrets never meet these generators; use the session's keyed streams",
        only=("graph/calibrate.py",),
        never=tuple(
            f"{layer}/*" for layer in ["ring", "link", "session", "protocol", "ops", "graph", "runtime"]
        ),
    ),
)

# tensor.random_() and its kin, for the same files as the generators.
IN_PLACE_GENERATORS = {"random_", "normal_", "uniform_", "bernoulli_", "exponential_"}
# Shared.parts belongs to the protocol; types.py defines it.
PARTS_ONLY = ("protocol/*", "types.py")


@dataclass
class Uses(ast.NodeVisitor):
    """Everything one file imports or names, with line numbers; aliases resolved to full dotted names."""

    package: str  # dotted package of the file, for relative imports
    aliases: dict[str, str] = field(default_factory=dict)
    imports: list[tuple[int, str]] = field(default_factory=list)
    names: list[tuple[int, str]] = field(default_factory=list)
    attributes: list[tuple[int, str]] = field(default_factory=list)

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self.imports.append((node.lineno, alias.name))
            local = alias.asname or alias.name.split(".")[0]
            self.aliases[local] = alias.name if alias.asname else local

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        module = node.module or ""
        if node.level:
            above = self.package.split(".")[: len(self.package.split(".")) - node.level + 1]
            module = ".".join([*above, *([module] if module else [])])
        for alias in node.names:
            full = f"{module}.{alias.name}"
            self.imports.append((node.lineno, full))
            self.aliases[alias.asname or alias.name] = full

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.attributes.append((node.lineno, node.attr))
        dotted = self.dotted(node)
        if dotted:
            self.names.append((node.lineno, dotted))
        else:
            self.visit(node.value)

    def dotted(self, node: ast.expr) -> str | None:
        chain: list[str] = []
        while isinstance(node, ast.Attribute):
            chain.append(node.attr)
            node = node.value
        if not isinstance(node, ast.Name) or node.id not in self.aliases:
            return None
        return ".".join([self.aliases[node.id], *reversed(chain)])


def layer_of(path: str) -> str:
    """`graph/capture.py` -> graph, `types.py` -> types, `__init__.py` -> ''."""
    first = path.split("/")[0].removesuffix(".py")
    return "" if first.startswith("__") else first


def layer_named(dotted: str, package: Path) -> str | None:
    """The layer that an import reaches: '' for a name of the package's own face, None when it is not ours."""
    head, _, rest = dotted.partition(".")
    if head != "sfumato":
        return None
    first = rest.split(".")[0]
    return first if (package / first).is_dir() or (package / f"{first}.py").is_file() else ""


def violations(package: Path) -> Iterator[str]:
    for file in sorted(package.rglob("*.py")):
        path = file.relative_to(package).as_posix()
        layer = layer_of(path)
        uses = Uses(".".join(["sfumato", *path.split("/")[:-1]]))
        tree = ast.parse(file.read_text("utf-8"), path)
        # Imports first: a name may be used above the line that binds it (inside a function).
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                uses.visit(node)
        uses.imports = list(dict.fromkeys(uses.imports))
        imported = list(uses.imports)
        uses.visit(tree)

        if layer and layer not in ALLOWED:
            yield f"{path}: the layer '{layer}' is unknown; place it in ALLOWED and in the architecture note"
            continue
        for line, name in imported:
            target = layer_named(name, package)
            if target is None or not layer or target == layer:
                continue
            if target == "":
                yield f"{path}:{line}: imports {name}: a layer never imports the package's public face"
            elif target not in ALLOWED[layer]:
                yield f"{path}:{line}: imports {name}: {layer} may not import {target}"
        for rule in RULES:
            for line, name in dict.fromkeys([*imported, *uses.names]):
                if rule.forbids(path, name):
                    yield f"{path}:{line}: uses {name}: {rule.why}"
        generators = RULES[-1]
        for line, attribute in dict.fromkeys(uses.attributes):
            if attribute == "parts" and not any(fnmatch.fnmatch(path, known) for known in PARTS_ONLY):
                yield f"{path}:{line}: uses .parts: only protocol/ looks inside a share"
            if attribute in IN_PLACE_GENERATORS and generators.forbids(path, "random"):
                yield f"{path}:{line}: uses .{attribute}: {generators.why}"


def test_the_package_keeps_its_layers() -> None:
    found = list(violations(PACKAGE))
    assert not found, "\n" + "\n".join(found)


def test_the_table_has_no_cycle() -> None:
    done: set[str] = set()
    while len(done) < len(ALLOWED):
        free = {layer for layer, below in ALLOWED.items() if layer not in done and below <= done}
        assert free, f"these layers import each other: {sorted(set(ALLOWED) - done)}"
        done |= free


@pytest.mark.parametrize(
    ("path", "source", "complaint"),
    [
        ("ring/a.py", "from sfumato.protocol import rep3", "ring may not import protocol"),
        ("ring/a.py", "from ..protocol.rep3 import Rep3", "ring may not import protocol"),
        ("ring/a.py", "def f():\n    import sfumato.session", "ring may not import session"),
        ("ops/a.py", "from sfumato import capture", "public face"),
        ("zoo/train.py", "from sfumato.ring import fixed", "zoo may not import ring"),
        ("ops/a.py", "def f(x):\n    return x.parts[0]", "only protocol/"),
        ("ops/a.py", "def f(x):\n    return g(x)(0).parts", "only protocol/"),
        ("graph/a.py", "import torch\ntorch.export.export", "only graph/capture.py"),
        ("graph/a.py", "from torch.export import export", "only graph/capture.py"),
        ("runtime/a.py", "import diffusers.models", "model libraries"),
        ("shell/a.py", "from transformers import AutoModel", "model libraries"),
        ("graph/a.py", "from rich.table import Table", "terminal"),
        ("shell/a.py", "import gradio as gr", "makes pages"),
        ("ui/a.py", "from sfumato.shell import cli", "ui may not import shell"),
        ("shell/a.py", "import pickle", "never unpickled"),
        ("link/a.py", "import torch as t\nt.load('x')", "torch.load"),
        ("ring/a.py", "import torch\ntorch.randn(3)", "keyed streams"),
        ("ring/a.py", "from torch import randint", "keyed streams"),
        ("ops/a.py", "import numpy as np\nnp.random.default_rng()", "keyed streams"),
        ("session/a.py", "import random", "keyed streams"),
        ("session/a.py", "def f(x):\n    x.random_()", "keyed streams"),
        ("colour/a.py", "", "unknown"),
    ],
)
def test_a_violation_is_found(tmp_path: Path, path: str, source: str, complaint: str) -> None:
    for layer in ALLOWED:
        (tmp_path / layer).mkdir()
    (tmp_path / path).parent.mkdir(exist_ok=True)
    (tmp_path / path).write_text(source)
    found = list(violations(tmp_path))
    assert len(found) >= 1
    assert complaint in found[0]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("__init__.py", "from sfumato.graph import capture"),
        ("protocol/rep3.py", "from sfumato.types import Shared\ndef f(x):\n    return x.parts"),
        ("graph/capture.py", "import torch\ntorch.export.export"),
        ("graph/calibrate.py", "import torch\ntorch.randn(3)"),
        ("zoo/train/vae.py", "import torch\ntorch.randn(3)\ntorch.load('x')"),
        (
            "diffusion/pipeline.py",
            "import torch\nimport diffusers\nfrom sfumato.zoo import path\ntorch.randn(3)",
        ),
        ("shell/cli.py", "import typer\nfrom sfumato.runtime import cluster"),
        ("ring/prg.py", "from .fixed import encode\nfrom sfumato.types import Ring"),
    ],
)
def test_what_is_allowed_passes(tmp_path: Path, path: str, source: str) -> None:
    for layer in ALLOWED:
        (tmp_path / layer).mkdir()
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / path).write_text(source)
    assert list(violations(tmp_path)) == []
