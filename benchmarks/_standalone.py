"""Lets `synpref_ray.reward.packing` and `.model` be imported where only torch, numpy and transformers are installed.

Those two modules need nothing else, but importing them runs `synpref_ray.reward`'s own `__init__`, which brings in the scorer and with it
pyarrow, pydantic and more. Where one of these is absent, empty packages with the right folders stand in for the two `__init__` files;
elsewhere nothing happens. Import this module before anything of `synpref_ray`.
"""

import importlib.util
import sys
import types
from pathlib import Path

NEEDED_BY_INIT = ("filelock", "jinja2", "platformdirs", "pyarrow", "pydantic", "yaml")
ROOT = Path(__file__).parents[1]

COMPLETE = all(importlib.util.find_spec(name) is not None for name in NEEDED_BY_INIT)
"""Whether the whole package can be imported."""

if not COMPLETE:
    for _name in ("synpref_ray", "synpref_ray.reward"):
        if _name not in sys.modules:
            _package = types.ModuleType(_name)
            _package.__path__ = [str(ROOT.joinpath(*_name.split(".")))]
            sys.modules[_name] = _package
