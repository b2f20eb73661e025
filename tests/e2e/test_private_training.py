"""Private data, private prompt, private image: a model fine-tuned under differential privacy, drawn from by three
simulated parties."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from sfumato.diffusion.pipeline import SecurePipeline
from sfumato.dp.data import Records
from sfumato.dp.finetune import finetune
from sfumato.dp.glyphs import draw_glyphs, glyphs_of_fonts, system_fonts
from sfumato.dp.ledger import Ledger
from sfumato.dp.public import caption_of_character
from sfumato.dp.recipe import Recipe
from sfumato.dp.sources import refuse_overlap
from sfumato.zoo import glyphs_path

pytestmark = [
    pytest.mark.usefixtures("own_cache"),
    pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning"),
]


@pytest.fixture(scope="module")
def digits() -> Records:
    """Forty digits, drawn from matplotlib's own fonts."""
    import matplotlib

    fonts = system_fonts([Path(matplotlib.get_data_path()) / "fonts" / "ttf"])[:4]
    glyphs = glyphs_of_fonts(fonts, "0123456789")
    rows = glyphs.choose(40, torch.Generator().manual_seed(0))
    images = draw_glyphs(glyphs.fields[rows], torch.Generator().manual_seed(1))
    captions = tuple(caption_of_character(digit) for digit in "0123456789")
    return Records((images * 255).round().to(torch.uint8), glyphs.labels[rows], captions)


@pytest.fixture(scope="module")
def model(digits: Records, tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = Recipe(epsilon=8.0, delta=1e-3, epochs=2, batch=20, draws=2, interval=2)
    return finetune(Path("glyphs"), digits, recipe, tmp_path_factory.mktemp("run")).model


def test_the_folder_tells_its_guarantee_and_where_it_comes_from(model: Path) -> None:
    ledger = Ledger.read(model / "ledger.json")
    assert 0 < ledger.spent().epsilon <= 8.0
    assert ledger.done == ledger.event.steps == 4
    assert {"rendered fonts", "Omniglot", "Fashion-MNIST"} <= set(ledger.public)
    assert ledger.captions[7] == "a handwritten seven"
    seen = json.loads((model / "sources.json").read_text("utf-8"))
    assert any("private images of run" in json.dumps(entry) for entry in seen["sources"])


def test_three_parties_draw_from_it(model: Path) -> None:
    pipe = SecurePipeline.from_pretrained(model, backend="simulate")
    pipe.set_progress_bar_config(disable=True)
    given = {
        "prompt": "a handwritten seven",
        "num_inference_steps": 2,
        "guidance_scale": 1.5,
        "output_type": "np",
    }
    output = pipe(**given, generator=torch.Generator().manual_seed(0))
    expected = pipe.plain(**given, generator=torch.Generator().manual_seed(0)).images
    assert output.images.shape == expected.shape == (1, 32, 32, 1)
    assert expected.std() > 0.05, "an image, not a plain"
    error = float(((output.images - expected) ** 2).mean())
    assert -10 * math.log10(max(error, 1e-12)) > 50
    assert min(output.report.bytes_sent) > 0


def test_the_public_start_has_not_seen_the_digits_that_fine_tuning_is_shown_with(data_dir: Path) -> None:
    from sfumato.dp.data import read_records
    from sfumato.dp.sources import fingerprint, read_sources
    from sfumato.errors import JobError

    captions = tuple(caption_of_character(digit) for digit in "0123456789")
    mnist = read_records(data_dir / "images" / "mnist", captions=captions, split="test")
    refuse_overlap(read_sources(glyphs_path()), fingerprint(mnist.images))
    clothes = read_records(data_dir / "images" / "fashion_mnist", captions=captions)
    with pytest.raises(JobError, match="Fashion-MNIST"):
        refuse_overlap(read_sources(glyphs_path()), fingerprint(clothes.images))
