"""Models that an owner shares with real parties, and what a client can and cannot do with them."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import nn
from typer.testing import CliRunner

import sfumato as sf
from sfumato.diffusion.offers import Terms, offered
from sfumato.diffusion.pipeline import SecurePipeline
from sfumato.errors import JobError
from sfumato.runtime.backend import Backend, Term
from sfumato.runtime.cluster import Cluster
from sfumato.runtime.local import LocalCluster
from sfumato.runtime.remote import open_backend
from sfumato.runtime.sharing import share_model
from sfumato.shell.cli import app
from sfumato.zoo import RECOMMENDED_GUIDANCE, embedded_path

pytestmark = [
    pytest.mark.processes,
    pytest.mark.usefixtures("own_cache"),
    pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning"),
]

#: dB over the image's range, against float32.
CLOSE = 40.0
PROMPT = "a handwritten seven"
OFFER = {"num_inference_steps": 1, "guidance_scale": 3.0}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def psnr(found: Any, expected: Any) -> float:
    return -10 * math.log10(max(float(((found - expected) ** 2).mean()), 1e-12))


def said(*arguments: Any, code: int = 0) -> str:
    """What the command prints, to both streams."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "80"})
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture(scope="module")
def files() -> Iterator[dict[str, Path]]:
    """Three real parties; the cluster file in the folder of an owner and of two clients."""
    who = ("owner", "client", "stranger")
    with LocalCluster(threads=1, clients=who[1:]) as cluster:
        text = cluster.ready().to_toml()
        found = {name: cluster.folder / "cluster" / name / "cluster.toml" for name in who}
        for file in found.values():
            file.write_text(text, encoding="utf-8")
        yield found


@pytest.fixture(scope="module")
def shared(
    files: dict[str, Path], tiny_pipeline: StableDiffusionPipeline, tmp_path_factory: pytest.TempPathFactory
) -> str:
    """The tiny pipeline with all weights secret, for one of the clients; what the owner was told."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_pipeline.save_pretrained(folder)
    return said("model", "share", folder, "--name", "tiny", "--cluster", files["owner"], "--client", "client",
                "--steps", 1, "--guidance", 3, "--yes")  # fmt: skip


def opened(file: Path, name: str = "tiny") -> Any:
    made = SecurePipeline.from_pretrained(f"cluster:{name}", cluster=file)
    made.set_progress_bar_config(disable=True)
    return made


def listed(file: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(said("model", "list", "--cluster", file, "--json"))["models"]
    return found


def test_the_owner_sees_what_it_offers(files: dict[str, Path], shared: str) -> None:
    for words in ("cluster:tiny will offer", "who learns what", "image alone", "shared as cluster:tiny"):
        assert words in shared
    (entry,) = listed(files["owner"])
    assert entry["complete"]
    assert entry["secret"]
    assert entry["clients"] == ["sfumato://client/client"]
    assert entry["parties"] == [0, 1, 2]
    assert "1 step" in said("model", "list", "--cluster", files["owner"])


def test_a_client_draws_with_a_model_that_it_never_has(
    files: dict[str, Path], shared: str, tiny_pipeline: StableDiffusionPipeline, tmp_path: Path
) -> None:
    pipe = opened(files["client"])
    output = pipe(PROMPT, negative_prompt="a bag", output_type="np", generator=seeded())
    expected = tiny_pipeline(
        PROMPT, negative_prompt="a bag", **OFFER, output_type="np", generator=seeded()
    ).images
    assert psnr(output.images, expected) > CLOSE
    other = tiny_pipeline("a sneaker", **OFFER, output_type="np", generator=seeded()).images
    assert psnr(output.images, other) < psnr(output.images, expected) - 6, "the text matters"
    assert pipe.estimate().same_cost(output.report)
    assert output.report.setup_bytes < 1000, "no weight leaves or reaches the client"
    assert any(path.startswith("/text") for path in output.report.by_path), "the parties encode the text"

    assert "rounds" in said("estimate", "cluster:tiny", "--cluster", files["client"])
    out = tmp_path / "seven.png"
    said("generate", PROMPT, "--model", "cluster:tiny", "--cluster", files["client"], "--out", out)
    assert out.stat().st_size > 0
    refused = said("generate", PROMPT, "--model", "cluster:tiny", "--cluster", files["client"], "--steps", 9,
                   "--out", out, code=2)  # fmt: skip
    assert "cluster:tiny offers 1 step at guidance 3" in refused


def test_parties_open_no_latents(files: dict[str, Path], shared: str) -> None:
    """The client's own checks are left out here: they are for its convenience alone."""
    pipe = opened(files["client"])
    settings, offer = pipe._offered._offers[0]
    pipe._offered._offers[0] = (settings, {**offer, "reveal": ["unet", "vae"]})
    eager = {"callback_on_step_end": lambda *_: {}, "callback_on_step_end_tensor_inputs": ["latents"]}
    for given in ({"output_type": "latent"}, eager):
        with pytest.raises(JobError, match=r"the owner of tiny does not let .* be opened"):
            pipe(PROMPT, generator=seeded(), **given)


def _mixed(backend: Backend, digest: str) -> str:
    backend.affine("mixed", [Term("noise", 0.5, 0, 1)], "mixed")
    return "mixed"


def _through_its_own_plan(backend: Backend, digest: str) -> str:
    module, shape = nn.ReLU(), (2, 4, 4, 4)
    backend.load("own", sf.make_plan(sf.capture(module, (torch.ones(shape),))))
    backend.call("own", "own", {"input": "noise"}, {}, ["positive"])
    return "positive"


@pytest.mark.parametrize("way", [lambda *_: "noise", _mixed, _through_its_own_plan])
def test_no_way_leads_around_the_policy(
    files: dict[str, Path], shared: str, way: Callable[[Backend, str], str]
) -> None:
    with open_backend(cluster=files["client"], options={"certificate": False}) as backend:
        description = backend.describe("tiny")
        digest = description.offers[0]["parts"]["unet"]
        plan = description.plans[digest]
        backend.load_shared("unet", description, digest)
        for name in plan.client_inputs:
            kind = plan.secret_type(name)
            backend.put(name, torch.zeros(kind.shape), kind.frac, kind.ring)
        publics = {n: torch.zeros(plan.program.types[n][0]) for n in plan.public_inputs}
        backend.call("unet", "step", {n: n for n in plan.client_inputs}, publics, ["noise"])
        with pytest.raises(JobError, match=r"the owner of tiny does not let .* be opened"):
            backend.reveal(way(backend, digest))


def test_nothing_else_runs_with_the_model(files: dict[str, Path], shared: str) -> None:
    own = sf.make_plan(sf.capture(nn.ReLU(), (torch.ones(1, 2),)))
    with open_backend(cluster=files["client"]) as backend:
        description = replace(backend.describe("tiny"), plans={own.digest(): own})
        with pytest.raises(JobError, match="not approved this plan"):
            backend.load_shared("unet", description, own.digest())
    with open_backend(cluster=files["client"]) as backend:
        description = backend.describe("tiny")
        digest = description.offers[0]["parts"]["vae"]
        backend.load_shared("vae", description, digest)
        with pytest.raises(JobError):
            backend.reveal(f"vae:{description.plans[digest].secret_weights[0]}")


def test_others_may_not(files: dict[str, Path], shared: str, tiny_pipeline: StableDiffusionPipeline) -> None:
    for who in ("stranger", "owner"):
        with pytest.raises(JobError):
            opened(files[who])
    assert listed(files["stranger"]) == []
    assert "no models" in said("model", "list", "--cluster", files["stranger"])
    assert said("model", "remove", "tiny", "--cluster", files["client"], "--yes", code=2).count("\n") == 1
    assert listed(files["client"])[0]["complete"]


# ---- the embedded model, and adapters ----------------------------------------------------------------------


def test_the_embedded_model_is_shared_and_drawn_with(files: dict[str, Path]) -> None:
    said(
        "model", "share", "embedded", "--name", "sketches", "--cluster", files["owner"], "--steps", 2, "--yes"
    )
    pipe = opened(files["stranger"], "sketches")
    output = pipe(PROMPT, output_type="np", generator=seeded())
    exact = StableDiffusionPipeline.from_pretrained(embedded_path(), local_files_only=True)
    exact.set_progress_bar_config(disable=True)
    given = {"num_inference_steps": 2, "guidance_scale": RECOMMENDED_GUIDANCE, "output_type": "np"}
    assert psnr(output.images, exact(PROMPT, **given, generator=seeded()).images) >= CLOSE
    assert psnr(output.images, exact("a sneaker", **given, generator=seeded()).images) < 30, (
        "the text matters"
    )
    assert pipe.estimate().same_cost(output.report)
    said("model", "remove", "sketches", "--cluster", files["owner"], "--yes")


def test_adapters_are_shared_within_the_weights(
    files: dict[str, Path], tiny_pipeline: StableDiffusionPipeline
) -> None:
    """The text encoder is public and runs at the client, which gets it with its adapter merged."""
    peft = pytest.importorskip("peft", reason="no peft")
    adapted = copy.deepcopy(tiny_pipeline)
    torch.manual_seed(5)
    for module, targets in (
        (adapted.unet, ["to_q", "to_v"]),
        (adapted.text_encoder, ["q_proj", "v_proj", "fc1"]),
    ):
        config = peft.LoraConfig(r=4, lora_alpha=32, init_lora_weights=False, target_modules=targets)
        peft.inject_adapter_in_model(config, module)
        module._hf_peft_config_loaded = True
    with SecurePipeline.from_pipe(adapted) as owner:
        owner.set_progress_bar_config(disable=True)
        model = offered(owner, "styled", Terms(steps=(1,), guidance=(3.0,)))
    share_model(Cluster.load(files["owner"]), files["owner"].parent, model)
    pipe = opened(files["client"], "styled")
    ids = torch.tensor([tiny_pipeline.tokenizer(PROMPT, padding="max_length").input_ids])
    with torch.no_grad():
        found, expected, base = (p.text_encoder(ids)[0] for p in (pipe, adapted, tiny_pipeline))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert off(base, expected) > 0.1
    output = pipe(PROMPT, output_type="np", generator=seeded())
    assert psnr(output.images, adapted(PROMPT, **OFFER, output_type="np", generator=seeded()).images) > CLOSE
    said("model", "remove", "styled", "--cluster", files["owner"], "--yes")


# ---- plain modules -----------------------------------------------------------------------------------------


def layer() -> tuple[nn.Module, sf.Plan, torch.Tensor]:
    torch.manual_seed(0)
    module, x = nn.Sequential(nn.Linear(8, 8), nn.Tanh()).eval(), torch.randn(4, 8)
    return module, sf.make_plan(sf.capture(module, (x,)), secret="inputs+weights"), x


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).detach().abs().max())


def test_a_module_is_shared_used_and_removed(files: dict[str, Path], shared: str) -> None:
    module, plan, x = layer()
    seen: list[Sequence[int]] = []
    share_id = sf.share(plan, "layer", files["owner"], progress=lambda *sizes: seen.append(sizes))
    assert seen[-1][0] == seen[-1][1] > 0
    with pytest.raises(JobError, match="layer"):
        sf.share(plan, "layer", files["owner"])
    again = sf.share(plan, "layer", files["owner"], replace=True)
    assert again != share_id
    for who in ("client", "stranger"):
        with sf.deploy("cluster:layer", files[who]) as deployment:
            assert off(deployment(x), module(x)) < 1e-3
            held = deployment(x, reveal=False)
            assert off(deployment(held), module(module(x))) < 1e-3
    with pytest.raises(JobError, match="is no pipeline"):
        SecurePipeline.from_pretrained("cluster:layer", cluster=files["client"])
    with pytest.raises(JobError, match="has several parts; use SecurePipeline"):
        sf.deploy("cluster:tiny", files["client"])
    for wrong in ("layer", "cluster:../layer"):
        with pytest.raises(JobError):
            sf.deploy(wrong, files["client"])
    assert "removed at all parties" in said("model", "remove", "layer", "--cluster", files["owner"], "--yes")
    with pytest.raises(JobError, match="layer"):
        sf.deploy("cluster:layer", files["client"])
    assert [entry["name"] for entry in listed(files["owner"])] == ["tiny"]
