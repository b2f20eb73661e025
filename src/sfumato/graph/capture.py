"""From a torch module to a `Program`, by ``torch.export`` without decomposition. The only file that knows
``torch.export``."""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import operator
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram, export
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx import Node as FxNode

from sfumato.errors import CaptureError
from sfumato.graph.normalize import normalize
from sfumato.graph.program import Input, Node, Program, Ref
from sfumato.graph.structure import Tree, describe

__all__ = ["capture"]

log = logging.getLogger(__name__)

_KINDS = {
    InputKind.PARAMETER: "parameter",
    InputKind.BUFFER: "buffer",
    InputKind.CONSTANT_TENSOR: "constant",
    InputKind.USER_INPUT: "user",
}
_RANDOM = re.compile(
    r"aten\.(rand|randn|randint|randperm|normal|bernoulli|multinomial|uniform|exponential)(_like)?_?\."
)
_DROPPED_KWARGS = frozenset(("device", "layout", "pin_memory", "memory_format", "non_blocking", "copy"))


def capture(module: nn.Module, args: Any, kwargs: Mapping[str, Any] | None = None) -> Program:
    """The program of ``module(*args, **kwargs)`` in eval mode, for the shapes of these arguments.

    Weights are not copied; half-precision modules are captured as they are and computed as float32. Integers
    and floats among the arguments become 0-d inputs where the module allows it (a timestep), and constants
    elsewhere.

    Raises:
        CaptureError: the module cannot be exported (one sentence with the cause), or holds calls that can
        never run
            under MPC (all of them, each with its module path).
    """
    args = tuple(args) if isinstance(args, tuple | list) else (args,)
    positional, named = _bind_names(module, args, kwargs or {})
    was_training = module.training
    module.eval()
    try:
        exported, args, named = _export(module, args, named)
    finally:
        module.train(was_training)
    return _translate(module, exported, args, named, positional)


def _bind_names(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[str, ...], dict[str, Any]]:
    parameters = inspect.signature(module.forward).parameters.values()
    names = tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        names += tuple(f"arg{i}" for i in range(len(names), len(args)))
    if len(args) > len(names):
        raise CaptureError(
            f"{type(module).__name__}.forward takes {len(names)} positional arguments; {len(args)} were given"
        )
    taken = set(names[: len(args)]) & set(kwargs)
    if taken:
        raise CaptureError(f"the argument {sorted(taken)[0]} was given twice")
    return names, dict(kwargs)


def _export(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[ExportedProgram, tuple[Any, ...], dict[str, Any]]:
    """Export, with numbers as 0-d tensors if the module takes them, and without a cache object if it returns
    one."""
    lifted = tuple(_lift(a) for a in args), {k: _lift(v) for k, v in kwargs.items()}
    plans = [lifted, (args, kwargs)] if _numbers(args, kwargs) else [lifted]
    takes_cache = "use_cache" in inspect.signature(module.forward).parameters and "use_cache" not in kwargs
    if takes_cache:
        plans += [(a, {**k, "use_cache": False}) for a, k in plans]
    first: Exception | None = None
    for planned_args, planned_kwargs in plans:
        try:
            exported = _export_once(module, planned_args, planned_kwargs)
        except Exception as error:
            log.debug("export failed: %s", error)
            first = first or error
        else:
            return exported, planned_args, planned_kwargs
    assert first is not None
    raise CaptureError(_cause(module, first)) from first


def _numbers(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    return any(type(v) in (int, float) for v in (*args, *kwargs.values()))


def _lift(value: Any) -> Any:
    return torch.tensor(value) if type(value) in (int, float) else value


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch's own account of a failed export, pages of graph, out of the log and off the screen."""
    logger = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    disabled, logger.disabled = logger.disabled, True
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            yield
    finally:
        logger.disabled = disabled


def _export_once(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ExportedProgram:
    with warnings.catch_warnings(), torch.no_grad(), _quiet():
        warnings.simplefilter("ignore")
        exported = export(module, args, kwargs, strict=False)
        if any(_needs_functional(node) for node in exported.graph.nodes):
            # An empty table decomposes nothing: it removes in-place writes and inlines sub-graphs.
            exported = exported.run_decompositions({})
    for node in exported.graph.nodes:
        for value in _flat(node.meta.get("val")):
            if isinstance(value, Tensor) and not all(isinstance(d, int) for d in value.shape):
                raise RuntimeError(f"data-dependent shape of {node.name}")
    return exported


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, tuple | list):
        for item in value:
            yield from _flat(item)
    else:
        yield value


def _needs_functional(node: FxNode) -> bool:
    if node.op == "get_attr":
        return True
    name = str(node.target)
    return node.op == "call_function" and name.split(".")[1:2] != [] and bool(re.search(r"[a-z0-9]_\.", name))


def _cause(module: nn.Module, error: Exception) -> str:
    text = str(error)
    title = type(module).__name__
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    line = next(
        (li for li in lines if "data-dependent" in li.lower() or "GuardOnDataDependent" in li),
        lines[0] if lines else "",
    )
    if "data-dependent" in text.lower() or type(error).__name__.startswith("GuardOnDataDependent"):
        return (
            f"{title} branches on the values of its inputs (data-dependent control flow), "
            f"which secret values cannot decide; torch.export says: {line[:300]}"
        )
    if "known type" in text:
        return (
            f"{title} returns an object without plain tensors (switch it off, use_cache=False): {line[:200]}"
        )
    return f"{title} cannot be exported by torch.export ({type(error).__name__}): {line[:400]}"


# ---- the exported graph as our nodes -----------------------------------------------------------------------


def _translate(
    module: nn.Module,
    exported: ExportedProgram,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    positional: tuple[str, ...],
) -> Program:
    signature = exported.graph_signature
    names, inputs, weights = _inputs(exported)
    problems: list[str] = []
    nodes: list[Node] = []
    raw_outputs: tuple[Any, ...] = ()
    for fx in exported.graph.nodes:
        if fx.op == "output":
            raw_outputs = tuple(fx.args[0])
        elif fx.op == "call_function":
            names[fx.name] = fx.name
            node = _node(fx, names, problems)
            if node is not None:
                nodes.append(node)
        elif fx.op != "placeholder":
            problems.append(
                f"{fx.op} {fx.target} at {_module_path(fx) or 'the root'}: a sub-graph that was not inlined"
            )
    results = []
    for spec, out in zip(signature.output_specs, raw_outputs, strict=True):
        if spec.kind is OutputKind.USER_OUTPUT:
            results.append(_argument(out, names))
        elif spec.kind is OutputKind.BUFFER_MUTATION:
            problems.append(
                f"the buffer {spec.target} is written during the call; a captured program keeps no state"
            )
    title = type(module).__name__
    if problems:
        raise CaptureError(f"{title} has calls that cannot run under MPC:", problems)
    users = [i.name for i in inputs if i.kind == "user"]
    arguments, examples = _arguments(exported, args, kwargs, positional)
    count = iter(range(len(results)))
    result = _result_tree(exported, count)
    program = Program(
        title=title,
        inputs=tuple(i for i in inputs if i.kind != "user" or i.name in examples),
        nodes=tuple(nodes),
        outputs=tuple(results),
        result=result,
        positional=positional,
        arguments=arguments,
        weights=weights,
        examples=examples,
    )
    assert set(examples) <= set(users)
    program = normalize(program)
    program.verify()
    return program


def _inputs(exported: ExportedProgram) -> tuple[dict[str, str], list[Input], dict[str, Tensor]]:
    """Names by graph name, the inputs, and the weights by input name. Weights are called by their attribute
    path."""
    placeholders = [n for n in exported.graph.nodes if n.op == "placeholder"]
    taken = {n.name for n in exported.graph.nodes}
    names: dict[str, str] = {}
    inputs: list[Input] = []
    weights: dict[str, Tensor] = {}
    for spec, fx in zip(exported.graph_signature.input_specs, placeholders, strict=True):
        kind = _KINDS.get(spec.kind)
        value = fx.meta.get("val")
        if kind is None or not isinstance(value, Tensor):
            continue
        name, source = fx.name, spec.target or fx.name
        persistent = spec.persistent is not False
        if kind != "user":
            name = source if source not in taken else f"{source}.weight"
            weights[name] = _weight(exported, source)
        names[fx.name] = name
        inputs.append(Input(name, kind, source, tuple(value.shape), _dtype(value.dtype), persistent))  # type: ignore[arg-type]
    return names, inputs, weights


def _weight(exported: ExportedProgram, source: str) -> Tensor:
    found = exported.state_dict.get(source)
    value = exported.constants[source] if found is None else found
    assert isinstance(value, Tensor)
    return value.detach()


def _arguments(
    exported: ExportedProgram, args: tuple[Any, ...], kwargs: dict[str, Any], positional: tuple[str, ...]
) -> tuple[dict[str, Tree], dict[str, Tensor]]:
    """The structure of the call's arguments, and the tensors of the capture by input name."""
    specs = iter([s for s in exported.graph_signature.input_specs if s.kind is InputKind.USER_INPUT])
    examples: dict[str, Tensor] = {}

    def leaf(value: Any) -> Tree:
        spec = next(specs)
        if isinstance(value, Tensor):
            examples[spec.arg.name] = value.detach()
            return {"leaf": spec.arg.name}
        if not isinstance(value, bool | int | float | str | type(None)):
            raise CaptureError(f"an argument of type {type(value).__name__} cannot be captured; pass tensors")
        return {"const": value}

    given = [*zip(positional, args, strict=False), *kwargs.items()]
    return {name: describe(value, leaf) for name, value in given}, examples


def _result_tree(exported: ExportedProgram, count: Iterator[int]) -> Tree:
    spec = exported.call_spec.out_spec
    assert spec is not None
    skeleton = torch.utils._pytree.tree_unflatten([torch.empty(0)] * spec.num_leaves, spec)
    return describe(skeleton, lambda _: {"leaf": f"o{next(count)}"})


def _node(fx: FxNode, names: Mapping[str, str], problems: list[str]) -> Node | None:
    path = _module_path(fx)
    value = fx.meta.get("val")
    if fx.target is operator.getitem:
        target = "aten.getitem.int"
    else:
        target = str(fx.target)
    if not isinstance(fx.target, torch._ops.OpOverload) and fx.target is not operator.getitem:
        problems.append(
            f"{getattr(fx.target, '__name__', target)} at {path or 'the root'}: needs a value or a sub-graph"
        )
        return None
    if not target.startswith("aten."):
        problems.append(f"{target} at {path or 'the root'}: only torch's own operations can run")
        return None
    if _RANDOM.match(target):
        problems.append(
            f"{target} at {path or 'the root'}: draws random numbers; pass them as an argument instead"
        )
        return None
    if value is None:
        return None  # an assertion
    args, kwargs = _positional_arguments(fx)
    first = value[0] if isinstance(value, tuple | list) else value
    if not isinstance(first, Tensor):
        problems.append(f"{target} at {path or 'the root'}: turns a tensor into a Python number")
        return None
    try:
        return Node(
            fx.name, target, tuple(_argument(a, names) for a in args),
            {k: _argument(v, names) for k, v in kwargs.items() if k not in _DROPPED_KWARGS},
            path, tuple(first.shape), _dtype(first.dtype),
        )  # fmt: skip
    except TypeError as error:
        problems.append(f"{target} at {path or 'the root'}: {error}")
        return None


def _positional_arguments(fx: FxNode) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments with everything that may be positional in its place, so that a handler reads one form
    only."""
    args, kwargs = list(fx.args), dict(fx.kwargs)
    if isinstance(fx.target, torch._ops.OpOverload):
        for position, formal in enumerate(fx.target._schema.arguments):
            if formal.kwarg_only or not kwargs:
                break
            if position >= len(args):
                args.append(kwargs.pop(formal.name) if formal.name in kwargs else formal.default_value)
    return tuple(args), kwargs


def _argument(value: Any, names: Mapping[str, str]) -> Any:
    if isinstance(value, FxNode):
        return Ref(names[value.name])
    if isinstance(value, tuple | list):
        return tuple(_argument(v, names) for v in value)
    if isinstance(value, torch.dtype):
        return _dtype(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, torch.device | torch.layout | torch.memory_format):
        return None
    raise TypeError(f"an argument of type {type(value).__name__}")


def _dtype(dtype: torch.dtype) -> torch.dtype:
    """Every float type is computed as float32."""
    return torch.float32 if dtype.is_floating_point else dtype


def _module_path(fx: FxNode) -> str:
    stack = fx.meta.get("nn_module_stack") or {}
    last = list(stack.values())[-1] if stack else ("", "")
    return re.sub(r"^L\['self'\]\.?", "", str(last[0]))
