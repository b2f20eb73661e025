"""The public names: sorted, importable, and those that docs and benchmarks rely on are all there."""

from __future__ import annotations

import sfumato

PROMISED = {
    "SecureModel",
    "SecurePipeline",
    "capture",
    "deploy",
    "embedded_path",
    "estimate",
    "make_plan",
    "run",
}


def test_all_is_sorted_and_has_no_doubles() -> None:
    assert list(sfumato.__all__) == sorted(set(sfumato.__all__))


def test_every_exported_name_is_there() -> None:
    missing = [name for name in sfumato.__all__ if not hasattr(sfumato, name)]
    assert missing == []


def test_what_was_promised_is_exported() -> None:
    assert set(sfumato.__all__) >= PROMISED


def test_dir_lists_the_public_names() -> None:
    assert set(sfumato.__all__) <= set(dir(sfumato))
