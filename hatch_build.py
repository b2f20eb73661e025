"""Build hook: compiles the native kernels into the package, or goes on without them where there is no compiler."""

from __future__ import annotations

import importlib.util
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class NativeKernels(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Wheels, editable ones too, get the library and a platform tag if it was built, and are pure if it was not."""
        path = Path(self.root) / "src" / "sfumato" / "ring" / "build.py"
        spec = importlib.util.spec_from_file_location("sfumato_ring_build", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        problem = module.build()
        if problem:
            self.app.display_warning(f"sfumato installs without native kernels: {problem}")
            return
        build_data["artifacts"].append(f"src/sfumato/ring/{module.LIBRARY.name}")
        build_data["pure_python"] = False
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py3-none-{platform}"
