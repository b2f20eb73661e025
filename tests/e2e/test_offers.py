"""What an owner offers of a pipeline, and the pipeline that a client makes of it; no parties in between."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from transformers import CLIPConfig, CLIPImageProcessor

from sfumato.diffusion.offers import Terms, lessons, offered
from sfumato.diffusion.pipeline import SecurePipeline
from sfumato.diffusion.settings import Settings, in_words
from sfumato.diffusion.shared import SharedPipeline, pipeline_of
from sfumato.errors import JobError
from sfumato.graph.plan import Plan
from sfumato.runtime.shared_model import Description, client_constants
from sfumato.runtime.sharing import ModelToShare

pytestmark = [
    pytest.mark.usefixtures("own_cache"),
    pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning"),
]

PROMPT = "a handwritten seven"


@pytest.fixture(scope="module")
def owner(tiny_pipeline: StableDiffusionPipeline) -> SecurePipeline:
    made = SecurePipeline.from_pipe(tiny_pipeline, secret="inputs+weights")
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def model(owner: SecurePipeline) -> ModelToShare:
    return offered(owner, "tiny", Terms(steps=(2, 1), guidance=(3.0,), clients=("client",)))


def described(model: ModelToShare) -> Description:
    """What a client would get, without parties in between."""
    plans = {
        digest: Plan.from_json(json.loads(json.dumps(plan.for_parties())), client_constants(plan))
        for digest, plan in model.plans.items()
    }
    offers = tuple(json.loads(json.dumps(list(model.offers), sort_keys=True)))
    return Description(model.name, "0" * 32, offers, dict(model.files), plans)


def opened(model: ModelToShare) -> SharedPipeline:
    made = SharedPipeline(described(model), cluster="nowhere")
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def client(model: ModelToShare) -> SharedPipeline:
    return opened(model)


# ---- what is shared ----------------------------------------------------------------------------------------


def test_an_offer_holds_plans_and_no_weights(
    model: ModelToShare, tiny_pipeline: StableDiffusionPipeline
) -> None:
    assert [offer["settings"]["steps"] for offer in model.offers] == [2, 1]
    for offer in model.offers:
        assert set(offer["parts"]) == {"text", "unet", "vae"}
        assert offer["reveal"] == ["vae"]
    assert len({offer["parts"]["text"] for offer in model.offers}) == 1, "the text's plan serves both"
    assert set(model.plans) == {digest for offer in model.offers for digest in offer["parts"].values()}
    assert not [name for name in model.files if name.endswith((".safetensors", ".bin"))]
    assert {"model_index.json", "unet/config.json", "vae/config.json", "text_encoder/config.json"} <= set(
        model.files
    )
    for plan in described(model).plans.values():
        known = sum(t.numel() for t in plan.program.weights.values() if t.is_floating_point())
        assert known <= 64, "constants of the client's own calls alone"


def test_files_do_not_say_where_the_owner_keeps_the_model(
    tiny_pipeline: StableDiffusionPipeline, tmp_path: Path
) -> None:
    home = tmp_path / "private-place"
    tiny_pipeline.save_pretrained(home)
    pipe = SecurePipeline.from_pretrained(home, secret="inputs+weights")
    pipe.set_progress_bar_config(disable=True)
    files = offered(pipe, "tiny", Terms(steps=(1,), guidance=(3.0,))).files
    assert not [name for name, data in files.items() if b"private-place" in data]


def test_terms_that_cannot_be(owner: SecurePipeline, tiny_pipeline: StableDiffusionPipeline) -> None:
    for wrong, said in (
        ({"schedulers": ("eulr",)}, "no scheduler 'eulr'; use one of ddim"),
        ({"opens": "all"}, "one of image, latents"),
        ({"steps": ()}, "at least one number of steps"),
        ({"height": 8}, "height and width go together"),
    ):
        with pytest.raises(JobError, match=said):
            Terms(**wrong)
    public = SecurePipeline.from_pipe(tiny_pipeline, secret="inputs+weights", public_components=("vae",))
    public.set_progress_bar_config(disable=True)
    with pytest.raises(JobError, match="image decoder runs at the client"):
        offered(public, "tiny", Terms(steps=(1,), guidance=(3.0,), opens="image"))
    model = offered(public, "tiny", Terms(steps=(1,), guidance=(3.0,)))
    assert model.offers[0]["reveal"] == ["unet"]
    assert [name for name in model.files if name.endswith(".safetensors")] == [
        "vae/diffusion_pytorch_model.safetensors"
    ]
    assert "latents of every step" in dict(lessons(model))["opened to the client"]
    assert "all of vae" in dict(lessons(model))["clients, of the weights"]


def test_every_combination_is_one_offer(owner: SecurePipeline) -> None:
    kept = owner.scheduler
    model = offered(
        owner, "tiny", Terms(steps=(1,), guidance=(1.0, 3.0), schedulers=("ddim", "euler"), opens="latents")
    )
    assert owner.scheduler is kept
    settings = [Settings.from_json(offer["settings"]) for offer in model.offers]
    assert len(set(settings)) == 4
    assert all(offer["reveal"] == ["unet", "vae"] for offer in model.offers)
    assert in_words(settings) == "1 step at guidance 1 or 3 with DDIM or EulerDiscrete, 8x8 pixels, 1 image"
    client = opened(model)
    assert client.plans()["unet"].digest() == model.offers[0]["parts"]["unet"]
    client.scheduler = EulerDiscreteScheduler.from_config(client.scheduler.config)
    euler = client.plans(guidance_scale=3.0)["unet"].digest()
    assert next(o["settings"] for o in model.offers if o["parts"]["unet"] == euler)["scheduler"].startswith(
        "Euler"
    )
    assert set(client.plans(output_type="latent")) == {"text", "unet"}


# ---- the client's side, without parties --------------------------------------------------------------------


def test_a_client_has_everything_but_weights(
    client: SharedPipeline, tiny_pipeline: StableDiffusionPipeline
) -> None:
    assert client.tokenizer(PROMPT).input_ids == tiny_pipeline.tokenizer(PROMPT).input_ids
    assert type(client.scheduler) is type(tiny_pipeline.scheduler)
    assert client.unet.config.cross_attention_dim == tiny_pipeline.unet.config.cross_attention_dim
    for part in (client.unet, client.vae, client.text_encoder):
        assert all(p.is_meta for p in part.parameters())
    with pytest.raises(JobError, match="cluster:tiny are at the parties alone"):
        client.plain(PROMPT)
    assert client.offers[0]["num_inference_steps"] == 2


def test_the_estimate_is_that_of_the_owner(client: SharedPipeline, owner: SecurePipeline) -> None:
    for steps in (2, 1):
        ours = client.estimate(num_inference_steps=steps)
        theirs = owner.estimate(num_inference_steps=steps, guidance_scale=3.0)
        assert ours.same_cost(theirs)
        assert ours.setup_bytes == 0 < theirs.setup_bytes
    assert client.estimate().same_cost(client.estimate(num_inference_steps=2)), "as first offered"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"num_inference_steps": 3}, "offers 2 or 1 steps at guidance 3 with DDIM, 8x8 pixels, 1 image; ask"),
        ({"guidance_scale": 7.5}, "offers 2 or 1 steps"),
        ({"height": 16, "width": 16}, "8x8 pixels"),
        ({"num_images_per_prompt": 2}, "1 image"),
        ({"eta": 0.5}, "not offered with another eta"),
        ({"clip_skip": 1}, "not offered with another clip_skip"),
        ({"guidance_rescale": 0.5}, "not offered with another guidance_rescale"),
        ({"prompt": ["a", "b"]}, "one prompt a call"),
        ({"prompt": None, "prompt_embeds": torch.zeros(1, 16, 64), "negative_prompt_embeds": torch.zeros(1, 16, 64)},
         "give a prompt, not embeddings"),
        ({"output_type": "latent"}, "does not let latents be opened"),
        ({"callback_on_step_end": print, "callback_on_step_end_tensor_inputs": ["latents"]},
         "does not let latents be opened"),
    ],
)  # fmt: skip
def test_what_is_not_offered_is_one_sentence(
    client: SharedPipeline, given: dict[str, Any], said: str
) -> None:
    with pytest.raises(JobError, match=said):  # before any connection: there is no such cluster
        client(**{"prompt": PROMPT, **given})


@pytest.mark.parametrize(
    ("configured", "said"),
    [
        ({"timestep_spacing": "trailing"}, "timestep_spacing='leading' in place of 'trailing'; configure"),
        (
            {"clip_sample": True, "prediction_type": "sample"},
            "clip_sample=False in place of True, prediction",
        ),
    ],
)
def test_a_scheduler_configured_otherwise_is_not_offered(
    model: ModelToShare, configured: dict[str, Any], said: str
) -> None:
    client = opened(model)
    client.scheduler = type(client.scheduler).from_config(client.scheduler.config, **configured)
    with pytest.raises(JobError, match=said):
        client(PROMPT)
    client.scheduler = pipeline_of(described(model)).scheduler
    assert client.plans()["unet"].digest() == model.offers[0]["parts"]["unet"]


def test_an_offer_without_a_configuration_is_not_guessed_at(model: ModelToShare) -> None:
    offers = [{**offer, "settings": {**offer["settings"]}} for offer in model.offers]
    for offer in offers:
        del offer["settings"]["configured"]  # as an earlier release wrote it
    with pytest.raises(JobError, match="without its scheduler's configuration"):
        opened(replace(model, offers=offers)).plans()


def test_what_the_owner_decides(tmp_path: Path) -> None:
    for given, said in (
        ({"secret": "inputs+weights"}, "decides on secret"),
        ({"profile": "fast"}, "decides on profile"),
        ({"variant": "fp16"}, "decides on variant"),
        ({}, "give its file"),
    ):
        with pytest.raises(JobError, match=said):
            SecurePipeline.from_pretrained("cluster:tiny", **given)
    with pytest.raises(JobError, match="name"):
        SecurePipeline.from_pretrained("cluster:../tiny", cluster=tmp_path)


def test_files_of_an_owner_cannot_run_code(model: ModelToShare) -> None:
    given = described(model)

    def index(**components: Any) -> dict[str, bytes]:
        known = json.loads(given.files["model_index.json"])
        return {**given.files, "model_index.json": json.dumps({**known, **components}).encode()}

    for files, said in (
        ({**given.files, "unet/diffusers.py": b"raise SystemExit"}, "a file of a kind that is not taken"),
        ({**given.files, "vae/model.bin": b"pickle"}, "a file of a kind that is not taken"),
        ({**given.files, "../out.json": b"{}"}, "a file of a kind that is not taken"),
        (index(scheduler=["os", "system"]), "a component scheduler of a kind"),
        (index(tokenizer=["transformers", "Trainer"]), "a component tokenizer of a kind"),
        (index(extra=["diffusers", "UNet2DModel"]), "a component extra of a kind"),
        (index(_class_name="FluxPipeline"), "FluxPipeline"),
        ({**given.files, "model_index.json": b"[]"}, "no pipeline"),
    ):
        with pytest.raises(JobError, match=said):
            pipeline_of(replace(given, files=files))


def test_a_safety_checker_works_at_the_client(
    owner: SecurePipeline, tiny_pipeline: StableDiffusionPipeline
) -> None:
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        vision_config={**size, "image_size": 8, "patch_size": 4, "projection_dim": 8},
        text_config={**size, "vocab_size": 8, "max_position_embeddings": 8},
        projection_dim=8,
    )
    checker = StableDiffusionSafetyChecker(config)
    extractor = CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    parts = {**tiny_pipeline.components, "safety_checker": checker, "feature_extractor": extractor}
    safe = SecurePipeline.from_pipe(StableDiffusionPipeline(**parts), secret="inputs+weights")
    safe.set_progress_bar_config(disable=True)
    safe._planner = owner._planner  # which has these plans
    client = opened(offered(safe, "tiny", Terms(steps=(1,), guidance=(3.0,))))
    torch.testing.assert_close(client.safety_checker.state_dict(), checker.state_dict())
    assert client.feature_extractor.crop_size == extractor.crop_size


def test_public_weights_reach_the_client_as_files(tiny_pipeline: StableDiffusionPipeline) -> None:
    pipe = SecurePipeline.from_pipe(tiny_pipeline)
    pipe.set_progress_bar_config(disable=True)
    model = offered(pipe, "tiny", Terms(steps=(1,), guidance=(3.0,)))
    assert model.offers[0]["parts"].keys() == {"unet"}
    client = opened(model)
    torch.testing.assert_close(client.vae.state_dict(), tiny_pipeline.vae.state_dict())
    assert all(p.is_meta for p in client.unet.parameters())
    assert client.estimate().same_cost(pipe.estimate(num_inference_steps=1, guidance_scale=3.0))
    known = described(model).plans[model.offers[0]["parts"]["unet"]].program.weights
    assert (
        sum(t.numel() for t in known.values()) < sum(p.numel() for p in tiny_pipeline.unet.parameters()) / 2
    )
