"""Per-record gradients: Opacus' hooks with samplers that hold for any memory layout and for several draws per record.

`Gradients` wraps a module. A batch has `records * draws` rows, the draws of one record standing together, and
`backward` leaves in every trainable parameter `grad_sample` of shape (records, \\*parameter): the gradient of each
record's loss, averaged over its draws *before* anything is clipped. One record is then one vector, so that its
influence is one clipping norm however many draws it had. Source: [Opacus]; [DPDM] for the draws.

Three differences from stock Opacus, each of them tested against it:

- its convolution sampler reads memory by strides and is silently wrong for channels-last and permuted inputs;
  the ones here (`sfumato.dp.samplers`) do not;
- a module's weights are frozen while it runs, so that autograd does not also compute the gradient of the whole batch,
  which nobody reads (a third of the work of a linear layer's backward pass);
- gradients are taken where the module's output is, so that a module whose output is unused, or that runs twice,
  counts exactly as autograd counts it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from opacus.grad_sample import GradSampleModule
from opacus.grad_sample.functorch import prepare_layer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import ParametrizationList

from sfumato.dp.samplers import SAMPLERS, by_rows
from sfumato.errors import JobError

__all__ = ["Gradients", "problems", "validate"]

# Name -> parameter; Any, because Opacus puts `grad_sample` on it, which torch does not declare.
Parameters = dict[str, Any]

# Modules whose parameters act in ways that one input and one output of the module do not show.
UNSUPPORTED = (
    nn.MultiheadAttention,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.Bilinear,
    nn.EmbeddingBag,
    ParametrizationList,
)


def problems(module: nn.Module) -> list[str]:
    """Everything in `module` that stands against per-record gradients, one sentence each; empty if nothing does."""
    found: list[str] = []
    checkpointed: list[str] = []
    for name, part in module.named_modules():
        label = f"{name or 'the model'} ({type(part).__name__})"
        if getattr(part, "gradient_checkpointing", False) is True:
            checkpointed.append(name or "the model")
        if isinstance(part, _BatchNorm):
            found.append(
                f"{label} normalises over the batch and so mixes records: use GroupNorm or LayerNorm"
            )
        elif getattr(part, "track_running_stats", False):
            found.append(f"{label} keeps statistics of private data: set track_running_stats=False")
        else:
            found += [f"{label} {why}" for why in _unsupported(part)]
    if checkpointed:
        found.append(
            f"gradient checkpointing is on in {len(checkpointed)} modules ({checkpointed[0]} first) "
            "and runs them where no gradient of a record is seen: call disable_gradient_checkpointing()"
        )
    if not any(p.requires_grad for p in module.parameters()):
        found.append("no parameter requires a gradient: choose what is trained first")
    return found


def _unsupported(part: nn.Module) -> Iterator[str]:
    """Why the trainable parameters that `part` itself owns cannot have per-record gradients."""
    own = {name for name, p in part.named_parameters(recurse=False) if p.requires_grad}
    if isinstance(part, nn.MultiheadAttention) and any(p.requires_grad for p in part.parameters()):
        # Its output projection is used without being called, so its children count too.
        own.add("out_proj")
    if not own:
        return
    if isinstance(part, UNSUPPORTED):
        yield "has trainable parameters that cannot be followed per record: freeze or replace it"
        return
    if isinstance(part, nn.Embedding) and (part.sparse or part.max_norm or part.scale_grad_by_freq):
        yield "uses sparse, max_norm or scale_grad_by_freq, which mix records: switch them off"
    if type(part) in SAMPLERS:
        if strange := own - {"weight", "bias"}:
            yield f"has trainable parameters beside weight and bias ({', '.join(sorted(strange))}): freeze them"
        return
    if any(True for _ in part.buffers()):
        yield "has trainable parameters beside buffers: freeze it or move the buffers out of it"
    needed = [
        p
        for p in inspect.signature(part.forward).parameters.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    if len(needed) != 1:
        yield f"has trainable parameters of its own and takes {len(needed)} inputs, not one: freeze or split it"


def validate(module: nn.Module) -> None:
    """JobError with all `problems` of `module` in one sentence, if there are any."""
    if found := problems(module):
        raise JobError("the model cannot be trained with per-record gradients: " + "; ".join(found))


class Gradients(GradSampleModule):
    """`module` with per-record gradients, `draws` rows per record.

    Call it, or any module inside it, as usual; then `backward(losses)` with one loss per row, then `records()`.
    A module may also see each record once (a text encoder before its output is repeated for the draws): then it sees
    `records` rows. Any other first axis raises JobError that names the module. Nothing is recorded under `no_grad`.
    """

    GRAD_SAMPLERS = SAMPLERS  # read by Opacus' walk over the modules; its own table stays as it is

    def __init__(self, module: nn.Module, draws: int = 1) -> None:
        if draws < 1:
            raise JobError(f"draws must be at least 1, not {draws}")
        validate(module)
        if hasattr(module, "autograd_grad_sample_hooks"):
            raise JobError(
                "the model already has per-record hooks: remove them with to_standard_module() first"
            )
        super().__init__(module, loss_reduction="sum", strict=False)
        self.draws = draws
        self._rows = 0  # of the batch that backward works on
        self._whole = False  # whether autograd also computes the gradient of the whole batch (verify)
        self._wrong: dict[int, str] = {}  # module id -> what is wrong with its inputs or output
        self._names = {id(part): name for name, part in module.named_modules()}
        self._buffers_seen = self._buffer_versions()

    @property
    def module(self) -> nn.Module:
        """The wrapped module, hooks included."""
        return self._module

    def iterate_submodules(self, module: nn.Module) -> Iterator[nn.Module]:
        """Every module that owns trainable parameters, once, even if it hangs in several places of the tree."""
        yield from dict.fromkeys(super().iterate_submodules(module))

    def add_hooks(self, **_: Any) -> None:
        """A hook before and after every module that owns trainable parameters."""
        handles: list[Any] = []
        # Where Opacus' remove_hooks looks for them.
        inner: Any = self._module
        inner.autograd_grad_sample_hooks = self.autograd_grad_sample_hooks = handles
        for part in self.iterate_submodules(self._module):
            if type(part) not in SAMPLERS:
                prepare_layer(part)
            recurse = type(part) not in SAMPLERS
            wanted = {n: p for n, p in part.named_parameters(recurse=recurse) if p.requires_grad}
            handles.append(part.register_forward_pre_hook(partial(self._before, wanted)))
            # Also when the forward pass fails: the weights must not stay frozen.
            handles.append(part.register_forward_hook(partial(self._after, wanted), always_call=True))
        self.enable_hooks()

    def _recording(self) -> bool:
        return self.hooks_enabled and torch.is_grad_enabled()

    def _before(self, wanted: Parameters, part: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not self._recording():
            return None
        if not self._whole:
            for p in wanted.values():
                p.requires_grad_(False)
        elif inputs and isinstance(inputs[0], Tensor) and inputs[0].is_floating_point():
            # torch 2.13 crashes in a channels-last group norm whose weights need a gradient and whose input does not.
            first = inputs[0] if inputs[0].requires_grad else inputs[0].detach().requires_grad_()
            return (first, *inputs[1:])
        return None

    def _after(self, wanted: Parameters, part: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if not self._recording():
            return
        for p in wanted.values():
            p.requires_grad_(True)
        if output is None:  # the forward pass failed; its own error says why
            return
        if not isinstance(output, Tensor) or not inputs or not isinstance(inputs[0], Tensor):
            self._wrong[id(part)] = "does not map one positional tensor to one tensor"
            return
        if not output.requires_grad:  # nothing below it is trained, and its own weights were frozen
            output.requires_grad_()
        output.register_hook(partial(self._sample, wanted, part, inputs[0].detach()))

    def _sample(self, wanted: Parameters, part: nn.Module, inputs: Tensor, upstream: Tensor) -> None:
        """Add the gradients of one run of `part`; `inputs` and `upstream` have rows first."""
        records = self._rows // self.draws
        rows = len(upstream) if upstream.dim() else 0
        if not inputs.dim() or len(inputs) != rows or rows not in (self._rows, records):
            seen = f"{tuple(inputs.shape)} -> {tuple(upstream.shape)}"
            self._wrong[id(part)] = f"ran on {seen}, whose first axis is not that of the {self._rows} rows"
            return
        upstream = upstream.detach()
        if inputs.is_floating_point():
            inputs = inputs.to(upstream.dtype)
        # Rows per record here: the draws, or one where the module ran once per record. The loss is divided by the
        # draws, so a sum over a record's rows is the mean over its draws.
        sampler = SAMPLERS.get(type(part), by_rows)
        with torch.no_grad():
            for name, rows_gradient in sampler(part, inputs, upstream, records, set(wanted)).items():
                p = wanted[name]
                gradient = rows_gradient.to(p.dtype)
                if p.grad_sample is None:
                    p.grad_sample = gradient
                else:
                    p.grad_sample = p.grad_sample + gradient

    def backward(self, losses: Tensor) -> None:
        """Per-record gradients of `losses` (rows,), one loss per row, into `grad_sample` of every trained parameter.

        JobError if a parameter got none, or a module's first axis is not the rows. An empty batch needs no graph.
        """
        self._start(losses)
        if losses.numel() == 0:
            for _, p in self._trained():
                p.grad_sample = torch.zeros((0, *p.shape), dtype=p.dtype, device=p.device)
            return
        (losses.sum() / self.draws).backward()
        self._finish()

    def _start(self, losses: Tensor) -> None:
        if losses.dim() != 1:
            raise JobError(f"backward takes one loss per row, not a tensor of shape {tuple(losses.shape)}")
        if len(losses) % self.draws:
            raise JobError(f"{len(losses)} rows are not a whole number of records of {self.draws} draws")
        if any(getattr(p, "grad_sample", None) is not None for _, p in self._trained()):
            raise JobError("gradients of the last batch are still there: call accumulate() or clear() first")
        self._rows = len(losses)

    def _finish(self) -> None:
        if self._wrong:
            parts = [f"{self._names.get(part, 'a module')} {why}" for part, why in self._wrong.items()]
            self.clear()
            raise JobError(
                "no per-record gradients: "
                + "; ".join(parts)
                + ": give it the batch's rows (CLIP: pass position_ids of shape (rows, tokens)) or freeze it"
            )
        if missing := [name for name, p in self._trained() if getattr(p, "grad_sample", None) is None]:
            self.clear()
            shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
            raise JobError(
                f"no per-record gradient reached {shown}: wrap the model after its adapters are in place, "
                "or freeze what the loss does not use"
            )
        if self._buffer_versions() != self._buffers_seen:
            self.clear()
            raise JobError(
                "a buffer of the model was updated from private data: freeze or replace its module"
            )

    def records(self) -> list[tuple[str, nn.Parameter, Tensor]]:
        """Name, parameter, per-record gradient (records, \\*parameter) of everything trained, after `backward`."""
        return [(name, p, p.grad_sample) for name, p in self._trained()]

    def clear(self) -> None:
        """Forget gradients, also after an error."""
        self._wrong.clear()
        self.set_grad_sample_to_none()

    def verify(self, losses: Callable[[], Tensor], tolerance: float = 1e-4) -> None:
        """Hold the per-record gradients of this very model to autograd, on a batch of *public* or random data.

        `losses()` runs the model and returns one loss per row. For the first and the last record: its own row must be
        autograd's gradient of its loss alone, and every other record's row zero. JobError names what differs
        (a parameter used outside its module, records that mix). `tolerance` is relative to a
        parameter's largest gradient.
        """
        self._whole = True
        try:
            wrong: set[str] = set()
            for last in (False, True):
                self.clear()
                self.zero_grad(set_to_none=True)
                values = losses()
                self._start(values)
                own = slice(-self.draws, None) if last else slice(0, self.draws)
                (values[own].sum() / self.draws).backward()
                self._finish()
                record = -1 if last else 0
                # Some gradients are zero but for rounding (the bias of attention's keys): hence the common floor.
                floor = 1e-3 * max(float(p.grad.abs().max()) for _, p in self._trained())
                for name, p in self._trained():
                    gradient = p.grad_sample
                    error = (gradient[record] - p.grad).abs().max()
                    strangers = (gradient.abs().sum(0) - gradient[record].abs()).max()
                    scale = max(float(p.grad.abs().max()), floor)
                    if not float(torch.maximum(error, strangers)) <= tolerance * scale:
                        wrong.add(name)
        finally:
            self._whole = False
            self.clear()
            self.zero_grad(set_to_none=True)
        if wrong:
            raise JobError(
                f"per-record gradients of {', '.join(sorted(wrong)[:5])} are not autograd's: the model mixes records, "
                "or uses a parameter outside the module that owns it: freeze it or call its module"
            )

    def _trained(self) -> list[tuple[str, Any]]:
        # Read anew each time: an adapter put in place after the wrapping shows up here, without a gradient.
        return [(name, p) for name, p in self._module.named_parameters() if p.requires_grad]

    def _buffer_versions(self) -> list[tuple[str, int, int]]:
        return [(name, id(b), b._version) for name, b in self._module.named_buffers()]
