"""What SecurePipeline is made from: folders, hub ids, pipelines in memory; in any precision, with adapters, with a
safety checker; and one sentence for what it is not made from."""

from __future__ import annotations

import json
import math
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    EulerDiscreteScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from torch import nn
from transformers import CLIPConfig, CLIPImageProcessor

from sfumato.diffusion.pipeline import SecurePipeline
from sfumato.diffusion.request import Request
from sfumato.errors import JobError
from sfumato.zoo.train.build import save_pipeline

# numpy's, about conversions inside diffusers' own set_timesteps.
pytestmark = [
    pytest.mark.usefixtures("own_cache"),
    pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning"),
]

#: dB, against diffusers in float32; and by how much nearer the image is than to another model's.
CLOSE, NEARER = 40.0, 10.0
PARTS = ("unet", "text_encoder", "vae")


@pytest.fixture(scope="module")
def folder(tiny_pipeline: StableDiffusionPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("tiny")
    save_pipeline(tiny_pipeline, where)
    return where


def diffusers_pipe(folder: Path, **options: Any) -> StableDiffusionPipeline:
    made = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True, **options)
    made.set_progress_bar_config(disable=True)
    return made


def opened(source: Any, **options: Any) -> SecurePipeline:
    made = SecurePipeline.from_pretrained(source, **{"backend": "plain", **options})
    made.set_progress_bar_config(disable=True)
    return made


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def arguments(**more: Any) -> dict[str, Any]:
    given = {"prompt": "a handwritten seven", "num_inference_steps": 1, "guidance_scale": 3.0}
    return {**given, "output_type": "latent", "generator": seeded(), **more}


def psnr(found: Any, expected: Any) -> float:
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    peak = max(1.0, float(expected.max() - expected.min()))
    return -10 * math.log10(max(float(((found - expected) ** 2).mean()) / peak**2, 1e-12))


def dtypes(pipe: Any, part: str) -> set[torch.dtype]:
    return {p.dtype for p in getattr(pipe, part).parameters() if p.is_floating_point()}


# ---- hub ids -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hub(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of the hub's client that holds acme/tiny: two revisions, the first with a variant of other weights."""
    cache = tmp_path_factory.mktemp("hub")
    place = cache / "models--acme--tiny"
    for number, revision in enumerate(("a" * 40, "b" * 40)):
        pipe = diffusers_pipe(folder)
        _scale(pipe, 1.0 + number)
        pipe.save_pretrained(place / "snapshots" / revision)
    other = diffusers_pipe(folder)
    _scale(other, 0.25)
    for part in PARTS:
        getattr(other, part).half()
    other.save_pretrained(place / "snapshots" / ("a" * 40), variant="fp16")
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("a" * 40)
    (place / "refs" / "v2").write_text("b" * 40)
    foreign = cache / "models--acme--xl"
    (foreign / "snapshots" / ("c" * 40)).mkdir(parents=True)
    (foreign / "snapshots" / ("c" * 40) / "model_index.json").write_text(
        json.dumps({"_class_name": "StableDiffusionXLPipeline", "_diffusers_version": "0.42.1"})
    )
    (foreign / "refs").mkdir()
    (foreign / "refs" / "main").write_text("c" * 40)
    return cache


def _scale(pipe: Any, factor: float) -> None:
    with torch.no_grad():
        pipe.unet.conv_out.weight.mul_(factor)


@pytest.mark.parametrize(
    ("options", "factor"),
    [
        ({}, 1.0),
        ({"revision": "v2"}, 2.0),
        ({"revision": "b" * 40, "local_files_only": True, "token": None}, 2.0),
        ({"variant": "fp16", "use_safetensors": True}, 0.25),
        ({"torch_dtype": torch.float16}, 1.0),
        ({"dtype": torch.float16}, 1.0),
    ],
    ids=["main", "ref", "commit", "variant", "torch_dtype", "dtype"],
)
@pytest.mark.filterwarnings("ignore:`torch_dtype` is deprecated:FutureWarning")
def test_hub_ids(hub: Path, folder: Path, options: dict[str, Any], factor: float) -> None:
    pipe = opened("acme/tiny", cache_dir=hub, **options)
    expected = diffusers_pipe(folder).unet.conv_out.weight * factor
    torch.testing.assert_close(pipe.unet.conv_out.weight, expected, rtol=2e-3, atol=1e-4)
    assert all(dtypes(pipe, part) == {torch.float32} for part in PARTS)


def test_hub_ids_that_cannot_be_loaded(hub: Path) -> None:
    with pytest.raises(
        JobError, match="acme/xl holds a StableDiffusionXLPipeline, which needs two text encoders"
    ):
        opened("acme/xl", cache_dir=hub)
    with pytest.raises(JobError, match="cannot load the pipeline acme/none") as caught:
        opened("acme/none", cache_dir=hub)
    assert "\n" not in str(caught.value)
    with pytest.raises(JobError, match="cannot load the pipeline acme/tiny"):
        opened("acme/tiny", cache_dir=hub, revision="v3")


# ---- folders and their precision ---------------------------------------------------------------------------


def _narrowed(folder: Path, where: Path, parts: tuple[str, ...], dtype: torch.dtype) -> Path:
    pipe = diffusers_pipe(folder)
    for part in parts:
        getattr(pipe, part).to(dtype)
    pipe.save_pretrained(where)
    return where


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("parts", [PARTS, ("text_encoder",), ("unet",)], ids=["all", "text encoder", "U-Net"])
def test_folders_of_half_and_mixed_precision(
    folder: Path, tmp_path: Path, parts: tuple[str, ...], dtype: torch.dtype
) -> None:
    where = _narrowed(folder, tmp_path / "half", parts, dtype)
    pipe = opened(where)
    assert all(dtypes(pipe, part) == {torch.float32} for part in PARTS)
    reference = diffusers_pipe(folder)
    for part in PARTS:
        getattr(reference, part).to(dtype if part in parts else torch.float32).to(torch.float32)
    assert psnr(pipe(**arguments()).images, reference(**arguments()).images) >= CLOSE


def test_the_text_encoder_in_half_precision_stops_diffusers_itself(folder: Path, tmp_path: Path) -> None:
    """If this fails, transformers no longer keeps the precision of a checkpoint: then this module may shrink."""
    theirs = diffusers_pipe(_narrowed(folder, tmp_path / "half", ("text_encoder",), torch.float16))
    assert dtypes(theirs, "text_encoder") == {torch.float16}
    assert dtypes(theirs, "unet") == {torch.float32}
    with pytest.raises(RuntimeError, match="same dtype"):
        theirs(**arguments())


def test_components_and_options_are_passed_on(folder: Path) -> None:
    scheduler = EulerDiscreteScheduler(steps_offset=1)
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", low_cpu_mem_usage=False).half()
    pipe = opened(folder, scheduler=scheduler, unet=unet, safety_checker=None, dtype=torch.float16)
    assert isinstance(pipe.scheduler, EulerDiscreteScheduler)
    assert {p.dtype for p in unet.parameters()} == {torch.float16}, "the caller's stays as it is"
    assert dtypes(pipe, "unet") == {torch.float32}
    assert dtypes(pipe, "vae") == {torch.float32}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"subfolder": "unet"}, "takes no subfolder"),
        ({"custom_pipeline": "lpw_stable_diffusion"}, "takes no custom_pipeline"),
        ({"device_map": "balanced"}, "takes no device_map"),
        ({"variant": "none"}, "cannot load the pipeline"),
    ],
)
def test_options_that_are_not_served(folder: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(JobError, match=words):
        opened(folder, **options)


@pytest.mark.parametrize(
    ("named", "words"),
    [
        ("StableDiffusionXLPipeline", "needs two text encoders"),
        ("StableDiffusion3Pipeline", "needs a transformer in place of the U-Net"),
        ("FluxPipeline", "needs a transformer in place of the U-Net"),
        ("PixArtAlphaPipeline", "needs a transformer in place of the U-Net"),
        ("KandinskyV22Pipeline", "needs image embeddings of a prior"),
        ("AudioLDM2Pipeline", "needs a decoder to sound"),
        ("StableDiffusionControlNetPipeline", "needs a control image"),
        ("StableDiffusionImg2ImgPipeline", "SecureImg2ImgPipeline"),
        ("StableDiffusionInpaintPipeline", "SecureInpaintPipeline"),
        ("StableVideoDiffusionPipeline", "needs a network over many frames"),
        ("DiTPipeline", "holds a DiTPipeline; SecurePipeline serves StableDiffusionPipeline"),
        (["pipeline", "MyPipeline"], "holds a MyPipeline, a pipeline that diffusers does not have"),
        ("OurPipeline", "holds a OurPipeline, a pipeline that diffusers does not have"),
        (None, "serves StableDiffusionPipeline"),
    ],
    ids=str,
)
def test_other_families_get_one_sentence(tmp_path: Path, named: Any, words: str) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": named}))
    with pytest.raises(JobError, match=words) as caught:
        opened(tmp_path)
    assert "\n" not in str(caught.value)


def test_places_without_a_pipeline(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "one.safetensors").write_bytes(b"")
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "model_index.json").write_text("[")
    for name, words in (
        ("empty", "has no model_index.json"),
        ("none", "there is no pipeline folder"),
        ("one.safetensors", "from_single_file and use from_pipe"),
        ("torn", "cannot be read as JSON"),
    ):
        with pytest.raises(JobError, match=words):
            opened(tmp_path / name)


def test_a_unet_with_class_embeddings(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "classes")
    config = UNet2DConditionModel.load_config(folder / "unet")
    UNet2DConditionModel.from_config(config, num_class_embeds=10).save_pretrained(
        tmp_path / "classes" / "unet"
    )
    with pytest.raises(JobError, match="takes class labels"):
        opened(tmp_path / "classes")


def test_a_distilled_pipeline_runs_as_its_own_class_does(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(3)
    base = diffusers_pipe(folder)
    unet = UNet2DConditionModel.from_config(base.unet.config, time_cond_proj_dim=32)
    parts = {**base.components, "unet": unet, "scheduler": LCMScheduler.from_config(base.scheduler.config)}
    theirs = LatentConsistencyModelPipeline(**parts, requires_safety_checker=False)
    theirs.set_progress_bar_config(disable=True)
    theirs.save_pretrained(tmp_path / "lcm")
    given = {"num_inference_steps": 3, "guidance_scale": 8.5}
    expected = theirs(**arguments(**given)).images
    pipe = opened(tmp_path / "lcm")
    assert psnr(pipe(**arguments(**given)).images, expected) >= CLOSE
    memory = SecurePipeline.from_pipe(theirs, backend="plain")
    assert memory.plan(**arguments(**given)).digest() == pipe.plan(**arguments(**given)).digest()


# ---- pipelines in memory -----------------------------------------------------------------------------------


def _everything(pipe: Any) -> dict[str, Any]:
    """All that could be changed in somebody's pipeline."""
    found: dict[str, Any] = {
        "scheduler": pipe.scheduler,
        "config": dict(pipe.config),
        "names": sorted(pipe.__dict__),
    }
    for part in PARTS:
        module = getattr(pipe, part)
        found[part] = module, [m.training for m in module.modules()], sorted(module.__dict__)
        for name, p in module.named_parameters():
            found[f"{part}.{name}"] = id(p), p.dtype, p.requires_grad, p.data_ptr(), p.detach().clone()
    return found


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool(a is b or a == b)


def unchanged(before: dict[str, Any], pipe: Any) -> bool:
    after = _everything(pipe)
    return before.keys() == after.keys() and all(_same(before[key], after[key]) for key in before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_somebodys_pipeline_is_not_changed(folder: Path, dtype: torch.dtype) -> None:
    theirs = diffusers_pipe(folder)
    for part in PARTS:
        getattr(theirs, part).to(dtype).train().requires_grad_(True)
    before = _everything(theirs)
    pipe = SecurePipeline.from_pipe(theirs, backend="plain")
    found = pipe(**arguments(output_type="np")).images
    assert unchanged(before, theirs)
    for part in PARTS:
        assert dtypes(pipe, part) == {torch.float32}
        assert not any(p.requires_grad for p in getattr(pipe, part).parameters())
        pairs = zip(getattr(pipe, part).parameters(), getattr(theirs, part).parameters(), strict=True)
        shared = [ours.data_ptr() == other.data_ptr() for ours, other in pairs]
        assert all(shared) if dtype is torch.float32 else not any(shared)
    for part in PARTS:
        getattr(theirs, part).float().eval()
    assert psnr(found, theirs(**arguments(output_type="np")).images) >= CLOSE


def test_attributes_that_are_set_do_not_reach_somebodys_pipeline(folder: Path) -> None:
    theirs = diffusers_pipe(folder)
    before = _everything(theirs)
    pipe = SecurePipeline.from_pipe(theirs, backend="plain")
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    unet = UNet2DConditionModel.from_config(theirs.unet.config).half().train()
    pipe.unet = unet
    assert dtypes(pipe, "unet") == {torch.float32}
    assert unet.training
    assert next(unet.parameters()).dtype is torch.float16
    assert unchanged(before, theirs)
    with pytest.raises(JobError, match="takes class labels"):
        pipe.unet = UNet2DConditionModel.from_config(theirs.unet.config, num_class_embeds=3)


def test_new_weights_make_a_new_plan(folder: Path) -> None:
    pipe = SecurePipeline.from_pipe(diffusers_pipe(folder), backend="plain")
    first = pipe(**arguments()).images
    _scale(pipe, 3.0)
    second = pipe(**arguments()).images
    assert psnr(second, pipe.plain(**arguments()).images) >= max(CLOSE, psnr(first, second) + NEARER)
    known = pipe.plan(**arguments()).digest()
    pipe.unet.conv_out.weight.data.mul_(3.0)  # as diffusers fuses an adapter: no version tells it
    assert pipe.plan(**arguments()).digest() != known


def test_things_that_are_no_pipeline(folder: Path) -> None:
    theirs = diffusers_pipe(folder)
    with pytest.raises(JobError, match="a Linear is no diffusers pipeline"):
        SecurePipeline.from_pipe(nn.Linear(2, 2))
    theirs.unet.to("meta")
    with pytest.raises(JobError, match="the weights of unet are offloaded"):
        SecurePipeline.from_pipe(theirs)
    theirs.unet = None
    with pytest.raises(JobError, match="has no unet"):
        SecurePipeline.from_pipe(theirs)


# ---- adapters ----------------------------------------------------------------------------------------------


@pytest.fixture
def adapted(folder: Path) -> StableDiffusionPipeline:
    """Two LoRAs on attention of the U-Net and of the text encoder, strong enough to be seen."""
    pytest.importorskip("peft", reason="no peft")
    pipe = diffusers_pipe(folder)
    torch.manual_seed(5)
    for name in ("one", "two"):
        _adapt(pipe, name)
    return pipe


_TARGETS = {"unet": ["to_q", "to_k", "to_v", "to_out.0"], "text_encoder": ["q_proj", "v_proj", "fc1"]}


def _adapt(pipe: Any, name: str, parts: Sequence[str] = tuple(_TARGETS)) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    for part in parts:
        module, targets = getattr(pipe, part), _TARGETS[part]
        config = LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, target_modules=targets)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there is one already
            inject_adapter_in_model(config, module, adapter_name=name)
    pipe.unet._hf_peft_config_loaded = True


def _one(pipe: Any) -> dict[str, Any]:
    pipe.unet.set_adapters(["one"])
    return {}


def _half(pipe: Any) -> dict[str, Any]:
    pipe.unet.set_adapters(["one"])
    return {"cross_attention_kwargs": {"scale": 0.5}}


def _several(pipe: Any) -> dict[str, Any]:
    pipe.unet.set_adapters(["one", "two"], [0.7, 0.4])
    return {}


def _fused(pipe: Any) -> dict[str, Any]:
    pipe.unet.fuse_lora(lora_scale=0.8)
    return {}


def _none(pipe: Any) -> dict[str, Any]:
    return {"cross_attention_kwargs": {"scale": 0.0}}


@pytest.mark.parametrize("set_up", [_one, _half, _several, _fused, _none], ids=lambda f: f.__name__)
@pytest.mark.parametrize("secret", ["inputs", "inputs+weights"])
def test_adapters(adapted: StableDiffusionPipeline, folder: Path, set_up: Any, secret: str) -> None:
    more = set_up(adapted)
    before = _everything(adapted)
    pipe = SecurePipeline.from_pipe(adapted, backend="plain", secret=secret)
    output = pipe(**arguments(**more))
    assert unchanged(before, adapted)
    plain = diffusers_pipe(folder)
    expected, base = adapted(**arguments(**more)).images, plain(**arguments()).images
    assert psnr(output.images, expected) >= CLOSE
    if set_up is _none:
        assert psnr(expected, base) > 80
    else:
        assert psnr(output.images, expected) > psnr(base, expected) + NEARER
    without = SecurePipeline.from_pipe(plain, backend="plain", secret=secret)
    assert pipe.plan(**arguments(**more)).program.nodes == without.plan(**arguments()).program.nodes, (
        "no layer more"
    )


def test_adapters_that_change_between_calls(adapted: StableDiffusionPipeline) -> None:
    pipe = SecurePipeline.from_pipe(adapted, backend="plain")
    seen, exact = [], []
    for names in (["one"], ["two"], ["one"]):
        pipe.unet.set_adapters(names)
        seen.append(pipe(**arguments()).images)
        exact.append(pipe.plain(**arguments()).images)
    for own, other in ((0, 1), (1, 0)):  # adapters change little in a small random network
        assert psnr(seen[own], exact[own]) >= max(CLOSE, psnr(seen[own], exact[other]) + NEARER)
    assert torch.equal(seen[0], seen[2]), "and the same plan again"


def _fuse(pipe: Any) -> None:
    pipe.unet.fuse_lora(lora_scale=6.0)


def _reweigh(pipe: Any) -> None:
    """The layers say the same before and after; what is in their weights is not."""
    layers = [module for module in pipe.unet.modules() if hasattr(module, "scaling")]
    pipe.unet.unfuse_lora()
    for factor in (1 / 6, 6.0):
        for layer in layers:
            layer.scaling = {name: scale * factor for name, scale in layer.scaling.items()}
        if factor < 1:
            pipe.unet.fuse_lora()


def _reload(pipe: Any) -> None:
    """Another LoRA under the name of the first."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it was active
        for layer in [module for module in pipe.unet.modules() if hasattr(module, "lora_A")]:
            layer.delete_adapter("one")
    _adapt(pipe, "one", ["unet"])
    pipe.unet.set_adapters(["one"])


def _reschedule(pipe: Any) -> None:
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)


def _invert(pipe: Any) -> None:
    width = pipe.text_encoder.config.hidden_size
    pipe.load_textual_inversion(torch.randn(width, generator=seeded(9)), token="<horse>")


def _replace_unet(pipe: Any) -> None:
    pipe.unet = UNet2DConditionModel.from_config(pipe.unet.config)


def _runs(pipe: Any) -> torch.Tensor:
    """What the components give on one input, which must be what a call would take."""
    text = torch.cat(pipe.encode_prompt("a photo of <horse>", torch.device("cpu"), 1, True))
    sample = torch.randn(2, 4, 4, 4, generator=seeded(1))
    with torch.no_grad():
        output: torch.Tensor = pipe.unet(sample, 500, text).sample
    return output


def test_what_else_changes_beside_adapters(adapted: StableDiffusionPipeline) -> None:
    """Only merged weights are kept from one call to the next, and only while nothing that they were made of changes."""
    adapted.unet.set_adapters(["one"])
    pipe = SecurePipeline.from_pipe(adapted, backend="plain")
    taken = pipe._prepared(Request.of(arguments())).pipe
    found, digest = _runs(taken), pipe._planner._weights(taken)
    for change in (_reload, _invert, _fuse, _reweigh, _replace_unet, _replace_unet):
        change(pipe)
        _reschedule(pipe)
        taken, before = pipe._prepared(Request.of(arguments())).pipe, (found, digest)
        assert taken.scheduler is pipe.scheduler
        found, exact, digest = _runs(taken), _runs(pipe), pipe._planner._weights(taken)
        torch.testing.assert_close(found, exact, rtol=1e-3, atol=1e-4)
        assert not torch.allclose(found, before[0], rtol=1e-2, atol=1e-3), change.__name__
        assert digest != before[1], f"the plan from before {change.__name__}"


# ---- the safety checker ------------------------------------------------------------------------------------


def _checker(flags: bool) -> StableDiffusionSafetyChecker:
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        vision_config={**size, "image_size": 8, "patch_size": 4, "projection_dim": 8},
        text_config={**size, "vocab_size": 8, "max_position_embeddings": 8},
        projection_dim=8,
    )
    checker = StableDiffusionSafetyChecker(config)
    with torch.no_grad():  # a cosine is above -2 and below 2
        checker.concept_embeds_weights.fill_(-2.0 if flags else 2.0)
        checker.special_care_embeds_weights.fill_(2.0)
    return checker


@pytest.mark.parametrize("flags", [True, False])
def test_the_safety_checker_runs_at_the_client(folder: Path, tmp_path: Path, flags: bool) -> None:
    extractor = CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    parts = {
        **diffusers_pipe(folder).components,
        "safety_checker": _checker(flags),
        "feature_extractor": extractor,
    }
    StableDiffusionPipeline(**parts).save_pretrained(tmp_path / "safe")
    theirs = diffusers_pipe(tmp_path / "safe")
    pipe = opened(tmp_path / "safe")
    given = {"output_type": "np", "num_images_per_prompt": 2}
    output, expected = pipe(**arguments(**given)), theirs(**arguments(**given))
    assert output.nsfw_content_detected == expected.nsfw_content_detected == [flags, flags]
    assert psnr(output.images, expected.images) >= CLOSE
    assert bool((output.images == 0).all()) == flags
    images, flagged = pipe(**arguments(**given), return_dict=False)
    assert flagged == [flags, flags]
    assert (images == output.images).all()
    assert not any("safety" in path for path in output.report.by_path)

    off = opened(tmp_path / "safe", safety_checker=None)
    assert off(**arguments(**given)).nsfw_content_detected is None
    assert (off(**arguments(**given)).images != 0).any()
    pipe.safety_checker = None
    assert pipe(**arguments(**given)).nsfw_content_detected is None
    assert pipe(**arguments()).nsfw_content_detected is None, "latents are not looked at"
