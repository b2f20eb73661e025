"""Pre-training on public images: what is drawn how often, what is said of it, and the folder that comes out."""

from __future__ import annotations

import shutil
import sys
from functools import partial
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from sfumato.dp import pretrain as module
from sfumato.dp.glyphs import Glyphs
from sfumato.dp.parts import load_parts
from sfumato.dp.pretrain import Public, pretrain_folder
from sfumato.dp.public import Characters, Mixture, Stills, caption_of_character
from sfumato.dp.sources import DECLARED, fingerprint, read_sources, refuse_overlap
from sfumato.errors import JobError
from sfumato.zoo.train import loop

sys.path.insert(0, str(Path(__file__).parent))
from tuning import Stopped, images_of


@pytest.fixture(scope="module")
def fonts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fonts")
    held = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    for name in ("cmr10.ttf", "DejaVuSans.ttf"):
        shutil.copy(held / name, folder)
    return folder


@pytest.fixture(scope="module")
def drawings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four drawn characters, packed as Omniglot's are."""
    masks = np.zeros((4, 105, 105), bool)
    for k, mask in enumerate(masks):
        mask[10 + 5 * k : 20 + 5 * k, 30:80] = mask[10:90, 40 + 10 * k : 46 + 10 * k] = True
    path = tmp_path_factory.mktemp("drawings") / "omniglot.npz"
    np.savez(path, bits105=np.packbits(masks.reshape(4, -1), axis=1), labels=np.array([0, 0, 1, 1]))
    return path


@pytest.fixture(scope="module")
def clothes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clothes") / "clothes.npz"
    np.savez(path, images=images_of(20, 5)[:, 0].numpy(), labels=np.arange(20) % 2,
             captions=np.array(["a photo of a shirt", "a photo of a shoe"]))  # fmt: skip
    return path


def test_captions() -> None:
    assert caption_of_character("7") == "a handwritten seven"
    assert caption_of_character("Q") == "a handwritten capital q"
    assert caption_of_character("q") == "a handwritten small q"


def test_a_mixture_draws_by_weight() -> None:
    one = Stills("one", images_of(3, 1), torch.tensor([0, 1, 0]), ("a", "b"))
    two = Stills("two", images_of(3, 2), torch.tensor([0, 0, 0]), ("c",))
    never = Stills("never", images_of(3, 3), torch.tensor([0, 0, 0]), ("d",))
    mixture = Mixture((one, never, two), (3.0, 0.0, 1.0))
    assert mixture.captions == ("a", "b", "d", "c")
    images, captions = mixture.draw(100, torch.Generator().manual_seed(0))
    assert images.shape == (100, 1, 32, 32)
    assert 0 <= float(images.min()) <= float(images.max()) <= 1
    counts = torch.bincount(captions, minlength=4).tolist()
    assert counts[2:] == [0, 25]
    assert min(counts[:2]) > 0
    # A caption goes with its image.
    known = {fingerprint(image[None]).item(): text for image, text in zip(one.images, "aba", strict=True)}
    drawn = (images * 255).round().to(torch.uint8)
    for image, caption in zip(drawn[:75], captions[:75], strict=True):
        assert known[fingerprint(image[None]).item()] == mixture.captions[caption]


def test_half_are_mirrored() -> None:
    image = torch.zeros(1, 1, 32, 32, dtype=torch.uint8)
    image[..., :8] = 255
    drawn, _ = Stills("x", image, torch.tensor([0]), ("x",), mirror=True).draw(
        200, torch.Generator().manual_seed(0)
    )
    left = int((drawn[..., 0] == 1).all((1, 2)).sum())
    assert 60 < left < 140
    assert int((drawn[..., -1] == 1).all((1, 2)).sum()) == 200 - left


def test_photos_without_labels_keep_their_size(tmp_path: Path) -> None:
    """Squares of many sizes are cut out of them, so that a few photos are more than a few images of 32 pixels."""
    photos = np.zeros((2, 64, 96, 3), np.uint8)
    photos[:, ::2, :, 0] = 255
    np.savez(tmp_path / "photos.npz", images=photos)
    mixture, _, sources = Public(fonts=None, images=(tmp_path / "photos.npz",), channels=3).mixtures()
    assert mixture.captions == ("a photo",)
    assert list(sources.digests()) == ["photos"]
    images, _ = mixture.draw(40, torch.Generator().manual_seed(0))
    assert images.shape == (40, 3, 32, 32)
    # One pixel to one shows the stripes, all of the photo in 32 pixels does not.
    contrast = images[:, 0].diff(dim=1).abs().mean((1, 2))
    assert float(contrast.max()) > 0.5 > 0.1 > float(contrast.min())
    assert float(images[:, 1:].max()) == 0.0


def test_what_it_learns_from_is_written_down(fonts: Path, drawings: Path, clothes: Path) -> None:
    first, second, sources = Public(fonts=(fonts,), drawings=drawings, images=(clothes,)).mixtures()
    digests = sources.digests()
    assert list(digests) == ["rendered fonts", "omniglot", "clothes"]
    assert digests["rendered fonts"] == DECLARED
    assert digests["clothes"] != DECLARED
    with pytest.raises(JobError, match="has seen 2 of the 2 private images"):
        refuse_overlap(sources, fingerprint(torch.nn.functional.pad(images_of(20, 5)[:2], (2, 2, 2, 2))))
    generator = torch.Generator().manual_seed(0)
    for mixture in (first, second):
        images, captions = mixture.draw(400, generator)
        assert images.shape == (400, 1, 32, 32)
        names = [mixture.captions[k] for k in captions.unique()]
        assert {"a handwritten glyph", "a photo of a shirt", "a handwritten seven"} <= set(names)
    digits = [caption_of_character(k) for k in "0123456789"]
    share = sum(second.captions[k] in digits for k in second.draw(1000, generator)[1].tolist()) / 1000
    assert 0.4 < share < 0.6  # of about 16 % among all characters


def test_colours(fonts: Path, drawings: Path, clothes: Path) -> None:
    """Grey characters beside coloured images have as many channels."""
    public = Public(fonts=(fonts,), drawings=drawings, images=(clothes,), channels=3)
    for mixture in public.mixtures()[:2]:
        assert mixture.draw(50, torch.Generator().manual_seed(0))[0].shape == (50, 3, 32, 32)


def test_nothing_to_learn_from(tmp_path: Path, clothes: Path) -> None:
    for public, sentence in (
        (Public(fonts=None), "needs something to learn from; give fonts, drawings or images"),
        (Public(fonts=(tmp_path,)), "no font with digits and Latin letters was found"),
        (Public(fonts=None, drawings=clothes), r"is no \.npz with bits105 and labels"),
        (Public(fonts=None, drawings=tmp_path / "none.npz"), r"is no \.npz with bits105 and labels"),
        (
            Public(fonts=None, images=(clothes, clothes)),
            "needs names that differ, not clothes, clothes; rename",
        ),
        (Public(fonts=None, images=(clothes,), channels=2), "channels is 2; images are grey"),
    ):
        with pytest.raises(JobError, match=sentence):
            pretrain_folder(public, tmp_path / "out", 1.0)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock by which each step of training takes a second, and small batches."""
    ticks = count()
    monkeypatch.setattr(loop, "time", SimpleNamespace(thread_time=lambda: float(next(ticks))))
    monkeypatch.setattr(module, "train_autoencoder", partial(module.train_autoencoder, batch=4))
    monkeypatch.setattr(module, "train_denoiser", partial(module.train_denoiser, batch=8, pool=40))


def test_a_killed_training_goes_on_and_says_what_it_has_seen(
    tmp_path: Path, clothes: Path, short: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Networks that were trained on some images must not be saved as trained on others."""
    public, out, work = Public(fonts=None, images=(clothes,)), tmp_path / "public", tmp_path / "public.work"
    before: dict[str, torch.Tensor] = {}

    def killed(pipeline: Any, folder: Path) -> None:
        before.update({name: value.clone() for name, value in pipeline.unet.state_dict().items()})
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(module, "save_pipeline", killed)
        with pytest.raises(Stopped):
            pretrain_folder(public, out, 0.1)
    other = tmp_path / "clothes.npz"
    np.savez(other, images=images_of(20, 6)[:, 0].numpy(), labels=np.arange(20) % 2,
             captions=np.array(["a photo of a shirt", "a photo of a shoe"]))  # fmt: skip
    with pytest.raises(JobError, match=r"public.work holds networks that were trained on other images"):
        pretrain_folder(Public(fonts=None, images=(other,)), out, 0.1)
    assert not out.exists()
    assert read_sources(work).digests() == public.mixtures()[2].digests()
    # Its checkpoints have had their time, so nothing is trained anew.
    pretrain_folder(public, out, 0.1)
    after = load_parts(out).unet.state_dict()
    assert before
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert not work.exists()


def test_a_folder(tmp_path: Path, clothes: Path, short: None) -> None:
    public = Public(fonts=None, images=(clothes,), words=("a photo of a hat",))
    out = tmp_path / "public"
    pretrain_folder(public, out, 0.1)
    parts = load_parts(out)
    assert (parts.side, parts.channels, parts.latent_shape) == (32, 1, (4, 4, 4))
    assert parts.scheduler.config.prediction_type == "v_prediction"
    ids = parts.ids(["a photo of a shirt", "a photo of a shoe", "a photo of a hat", ""])
    assert ids is not None
    assert len(ids.unique(dim=0)) == 4
    assert list(read_sources(out).digests()) == ["clothes"]
    # Scaled by public latents alone, to about one.
    pixels = torch.nn.functional.pad(images_of(20, 5), (2, 2, 2, 2)).float() / 127.5 - 1
    with torch.no_grad():
        latents = parts.vae.encode(pixels).latent_dist.sample() * parts.scale
    assert 0.7 < float(latents.std()) < 1.4
    pipeline = StableDiffusionPipeline.from_pretrained(out, local_files_only=True)
    assert sum(p.numel() for p in pipeline.unet.parameters()) < 1.1e6
    with pytest.raises(JobError, match="holds a model already; name a new folder"):
        pretrain_folder(public, out, 0.1)
    assert not (tmp_path / "public.work").exists()


def test_characters_of_drawings_have_one_caption() -> None:
    glyphs = Glyphs(
        torch.full((2, 64, 64), 30.0).half(), torch.tensor([0, 0]), torch.tensor([0, 1]), ("glyph",)
    )
    assert Characters("drawings", glyphs).captions == ("a handwritten glyph",)
    assert Characters("drawings", glyphs).stills() is None
