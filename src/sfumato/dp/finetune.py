"""DP fine-tuning of a latent-diffusion folder on private images: plan, account, train, checkpoint, publish.

A run lives in a folder of its own, which the data holder keeps: the ledger, the key of the commitment, the last
checkpoint. Published is only its ``model`` folder, an ordinary pipeline with the ledger beside it.

*Crash safety.* Steps are reserved in the ledger, on the disk, before they run (`ledger`), an interval at a time. A run
that was killed goes on from its last checkpoint with what the plan has left: an interval's steps may be lost, their
privacy is charged all the same. A new process draws coins and noise under fresh keys, so no noise is used twice.

*What is seen while it runs.* Step counts and ε, nothing that depends on a record: the loss of private images is
nowhere printed, logged or kept.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from sfumato.dp.data import Records, fit
from sfumato.dp.gradients import validate
from sfumato.dp.ledger import Ledger, Register, sync
from sfumato.dp.parts import PREDICTIONS, Parts, check_device, encode, folder_of, load_parts
from sfumato.dp.randomness import SecretStream
from sfumato.dp.recipe import Recipe
from sfumato.dp.sources import (
    PRIVATE_RUN,
    Seen,
    Sources,
    commitment,
    fingerprint,
    private_key,
    read_sources,
    refuse_overlap,
)
from sfumato.dp.trainable import Choice, choose, merge
from sfumato.dp.trainer import Trainer, poisson_batch
from sfumato.errors import JobError
from sfumato.zoo.train.build import save_pipeline
from sfumato.zoo.train.loop import rank

__all__ = ["MODEL", "Run", "finetune"]

MODEL, LEDGER, KEY, STATE, LOCK = "model", "ledger.json", "private.key", "checkpoint.pt", "lock"
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Run:
    """A finished fine-tuning: its ledger, and the folder that may be published."""

    ledger: Ledger
    model: Path


def finetune(
    public: Path,
    records: Records,
    recipe: Recipe,
    out: Path,
    *,
    declared: Sequence[str] = (),
    register: Path | None = None,
    limit_epsilon: float | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Run:
    """Fine-tune the pipeline in ``public`` on ``records`` with the guarantee of ``recipe``, into the folder ``out``.

    An unfinished run in ``out`` goes on; it must be of the same recipe, public start and records. Under ``torchrun``
    every process calls this alike; rank 0 accounts, adds noise and writes.

    Args:
        public: a pipeline's folder, or ``"glyphs"``, the public start that comes with sfumato.
        declared: what the public model has seen, where its folder does not say (then nothing can be checked).
        register, limit_epsilon: the data holder's list of runs on this data, and the most that all may cost together.

    Raises:
        JobError: before any training, in one sentence: data or model that do not fit, layers that mix records, public
            sources that hold private images, a budget that no noise reaches, accountants that disagree.
        BudgetExceeded: the budget, or the limit of all runs, would be passed.
    """
    told: Progress = progress or (lambda what, done, of: None)
    public = folder_of(public)
    if limit_epsilon is not None and register is None:
        raise JobError(
            "a limit for all runs (--limit-epsilon) needs the list of them; name a register (--register)"
        )
    if register is not None and register.suffix == ".key":
        raise JobError(
            f"{register} is named as the key beside a register is; call the register .jsonl (--register)"
        )
    parts = load_parts(public)
    _check(parts, records, recipe, out)
    check_device(device)
    sources = read_sources(public, declared)
    if (public / LEDGER).is_file() or any(seen.name.startswith(PRIVATE_RUN) for seen in sources.seen):
        raise JobError(
            f"{public} was itself fine-tuned on private images, whose cost would have to be added to this run's; start "
            "from the public model that it started from"
        )
    prints = fingerprint(records.images)
    refuse_overlap(sources, prints)
    weights = _digest(parts)  # before adapters
    choice = choose(parts.unet, parts.text_encoder, what=recipe.what, first=recipe.first, rank=recipe.rank)
    validate(parts.denoiser())
    event = recipe.event(len(records))
    if not rank():
        out.mkdir(parents=True, exist_ok=True)
    with _alone(out):
        key = _key(out / KEY if register is None else register.with_suffix(".key"))
        planned = Ledger(
            epsilon=recipe.epsilon,
            delta=recipe.delta,
            event=event,
            clip=recipe.clip,
            records=len(records),
            expected_batch=float(recipe.batch),
            trained=choice.describe(),
            public=sources.digests(),
            private=commitment(prints, key),
            recipe={**recipe.to_json(), **({"captions": list(records.captions)} if records.classes else {})},
        )
        held = _resumed(planned, out / LEDGER)
        held.verify()
        begun_with = _identity(records, weights, key)
        state = _checkpoint(out / STATE, held, begun_with, device)
        told("encode", 0, len(records))
        latents = encode(parts, fit(records.images, parts.channels, parts.side))
        stream = SecretStream()
        trainer = Trainer(
            parts, choice, latents, records.labels, parts.ids([*records.captions, ""]), recipe,
            noise_multiplier=held.event.noise_multiplier, steps=held.event.steps, stream=stream, device=device,
        )  # fmt: skip
        trainer.verify()
        # Nothing is charged before all that can be refused has been.
        ledger = _begun(held, out / LEDGER, register, limit_epsilon)
        ledger = _train(trainer, ledger, state, begun_with, stream.child("coins"), out, told)
        if not ledger.done:
            raise JobError(
                f"every step of the run in {out} was lost before a checkpoint, and its budget is spent; start a new run"
            )
        if not rank():
            _publish(parts, choice, sources, ledger, out / MODEL)
    return Run(ledger, out / MODEL)


def _train(
    trainer: Trainer,
    ledger: Ledger,
    state: dict[str, Any] | None,
    begun_with: str,
    coins: SecretStream,
    out: Path,
    told: Progress,
) -> Ledger:
    """All steps that the plan has left, from the checkpoint ``state`` on; the ledger at their end."""
    if state is not None:
        # Its steps may have been written down as done just before a crash, or not yet.
        ledger = ledger.complete(int(state["done"]) - ledger.done)
        trainer.restore(state)
    # What a crash lost counts as run, for the rate's decay too.
    trainer.step_number = ledger.reserved
    # A short run has checkpoints too.
    interval = min(trainer.recipe.interval, -(-ledger.event.steps // 4))
    while ledger.left:
        block = min(interval, ledger.left)
        ledger = ledger.reserve(block)
        _keep(ledger, out / LEDGER)
        for _ in range(block):
            trainer.step(poisson_batch(coins, ledger.records, ledger.event.sample_rate))
            told("steps", trainer.step_number, ledger.event.steps)
        ledger = ledger.complete(block)
        if not rank():
            marks = {"run": ledger.run, "done": ledger.done, "begun_with": begun_with}
            _save({**trainer.state(), **marks}, out / STATE)
        _keep(ledger, out / LEDGER)
    trainer.use_average()
    ledger = ledger if ledger.ended else ledger.finish()
    _keep(ledger, out / LEDGER)
    return ledger


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """One run at a time in a folder: rank 0 holds its lock until it ends, however it ends.

    Raises:
        JobError: another process trains there.
    """
    if rank():
        yield
        return
    with open(out / LOCK, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise JobError(f"another process trains in {out}; wait for it, or name another folder") from None
        yield


def _check(parts: Parts, records: Records, recipe: Recipe, out: Path) -> None:
    if recipe.delta >= 1 / len(records):
        raise JobError(
            f"delta is {recipe.delta:g}, which is not below 1 / {len(records)} records; a guarantee that may fail for "
            "one image means nothing (take, say, a tenth of that)"
        )
    if parts.tokenizer is None and len(records.captions) > 1:
        raise JobError(
            "this pipeline takes no prompts, but the images have captions; name a text-to-image pipeline, or train "
            "without captions (--unconditional)"
        )
    if parts.tokenizer is not None and records.classes and records.captions != ("",):
        ids = parts.ids(records.captions)
        assert ids is not None
        if len(ids.unique(dim=0)) < len(records.captions):
            raise JobError(
                "two captions are the same to the model's tokenizer (too long, or odd words); shorten or reword them"
            )
    kind = parts.scheduler.config.get("prediction_type")
    if kind not in PREDICTIONS or not hasattr(parts.scheduler, "alphas_cumprod"):
        raise JobError(
            f"the pipeline's {type(parts.scheduler).__name__} predicts {kind!r}; fine-tuning knows diffusion that "
            f"predicts {', '.join(PREDICTIONS)}"
        )
    if parts.unet.config.out_channels != parts.unet.config.in_channels:
        raise JobError(
            "the U-Net predicts more than its input has (a learnt variance); take one that predicts as many channels"
        )
    if out.exists() and not out.is_dir():
        raise JobError(f"{out} is a file; name a folder for this run")


def _key(path: Path) -> bytes:
    """The data holder's key; rank 0 makes it where there is none. With a register it belongs to that: only under one
    key can a data set's runs be added up."""
    if not rank():
        path.parent.mkdir(parents=True, exist_ok=True)
        private_key(path)
    _wait()
    return private_key(path)


def _begun(held: Ledger, path: Path, register: Path | None, limit: float | None) -> Ledger:
    """The ledger that this run goes by, charged to the register, on the disk, and the same for every process."""
    if rank():
        _wait()
        return Ledger.read(path)
    if register is not None:
        Register(register).charge(held, limit)
    held.write(path)
    _wait()
    return held


def _digest(parts: Parts) -> bytes:
    """SHA-256 over all weights of a pipeline."""
    total = hashlib.sha256()
    for model in (parts.vae, parts.unet, parts.text_encoder):
        for name, value in (model.state_dict() if model is not None else {}).items():
            total.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
    return total.digest()


def _identity(records: Records, weights: bytes, key: bytes) -> str:
    """HMAC of what a run goes on with: every image with its caption, in order, and the public weights. The ledger's
    commitment is of the images alone, so that runs with other captions still add up."""
    total = hmac.new(key, b"sfumato-dp-begun-with:" + weights, hashlib.sha256)
    total.update(json.dumps([list(records.images.shape), list(records.captions)]).encode())
    total.update(records.labels.numpy().astype("<i8").tobytes())
    for part in records.images.split(4096):
        total.update(part.contiguous().numpy().tobytes())
    return total.hexdigest()


def _checkpoint(path: Path, ledger: Ledger, begun_with: str, device: str) -> dict[str, Any] | None:
    """The last checkpoint, None before the first.

    Raises:
        JobError: it is missing or damaged, of other records, captions or public weights, or it and the ledger are not
            of the same moment: going on would claim steps that the weights have not seen, or leave out steps that they
            have.
    """
    where = f"{path.parent} has a {path.name}"
    if not path.is_file():
        if ledger.done:
            raise JobError(
                f"{path} is missing, but its ledger says that {ledger.done} steps are in it; restore it, or start a "
                "new run in a new folder"
            )
        return None
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True, map_location=device)
    except Exception:  # a damaged file raises one of zip's, torch's and the unpickler's own
        raise JobError(
            f"{path} is damaged; restore it and its ledger, or start a new run in a new folder"
        ) from None
    if state["run"] != ledger.run:
        raise JobError(
            f"{where} of another run than its ledger's; restore that run's ledger, or name a new folder"
        )
    if state.get("begun_with") != begun_with:
        raise JobError(
            f"{where} that was begun with other images, captions or public weights; go on with the same, or name a new "
            "folder"
        )
    if not ledger.done <= state["done"] <= state["step"] <= ledger.reserved:
        older = "older" if state["done"] < ledger.done else "newer"
        raise JobError(
            f"{where} that is {older} than its ledger; restore both of one moment, or name a new folder"
        )
    return state


def _resumed(planned: Ledger, path: Path) -> Ledger:
    """The ledger on the disk if it is of the same plan, else the new one.

    Raises:
        JobError: the folder holds a run of something else.
    """
    if not path.is_file():
        return planned
    held = Ledger.read(path)
    # The noise found again may differ in its last digit between versions of the accountants; the plan that holds is
    # the one that was begun with.
    pairs = {
        name: (getattr(held, name), getattr(planned, name))
        for name in ("epsilon", "delta", "clip", "records", "trained")
    }
    pairs["private images or key"] = held.private, planned.private
    pairs["public start"] = dict(held.public), dict(planned.public)
    pairs["recipe"] = _lasting(held.recipe), _lasting(planned.recipe)
    differs = [name for name, (one, other) in pairs.items() if one != other]
    if differs:
        raise JobError(
            f"{path.parent} holds a run with another {', '.join(differs)}; go on with the same (--register too, "
            "whose key it is) or in a new folder"
        )
    return held


def _lasting(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Without what may be lowered after a run ran out of memory: it does not change the result."""
    return {name: value for name, value in recipe.items() if name != "physical"}


def _keep(ledger: Ledger, path: Path) -> None:
    if not rank():
        ledger.write(path)
    _wait()  # no process runs a step before it is on the disk


def _wait() -> None:
    """For all processes that train together."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.barrier()


def _save(state: dict[str, Any], path: Path) -> None:
    draft = path.with_suffix(".part")
    with open(draft, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)
    sync(path.parent)  # before the ledger that counts on it


def _publish(parts: Parts, choice: Choice, sources: Sources, ledger: Ledger, folder: Path) -> None:
    """The pipeline as diffusers saves it, adapters merged, with ledger and sources beside it."""
    parts.unet.to("cpu")
    # Under its own name once it is whole: weights without their ledger would pass for public ones.
    draft = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(draft, ignore_errors=True)
    if choice.rank is not None:
        merge(parts.unet)
    if parts.tokenizer is not None:
        save_pipeline(parts.pipeline, draft)
    else:
        parts.pipeline.save_pretrained(draft, safe_serialization=True)
    note = f"epsilon {ledger.epsilon:g}, delta {ledger.delta:g}: see ledger.json"
    Sources((*sources.seen, Seen.declared(f"{PRIVATE_RUN} {ledger.run}", note))).write(draft)
    ledger.write(draft / LEDGER)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(draft, folder)
    sync(folder.parent)
