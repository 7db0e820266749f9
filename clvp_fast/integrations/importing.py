"""`make_tortoise_importable`: imports tortoise-tts 3.0.0 beside releases of transformers newer than its pin of 4.31."""

import importlib
import importlib.util
import sys
from types import ModuleType
from typing import Any

# Names of transformers 4.31 for beam search, which `tortoise.api_fast` imports but does not use.
_BEAMS = ("BeamSearchScorer", "ConstrainedBeamSearchScorer", "DisjunctiveConstraint", "PhrasalConstraint")
_OUTPUTS = ("GenerateOutput", "SampleOutput")


def make_tortoise_importable() -> list[str]:
    """Make `import tortoise.api` and `import tortoise.api_fast` work beside the transformers that is installed.

    tortoise-tts 3.0.0 asks for transformers 4.31 and imports names that were removed since. This adds the missing
    names, and changes no existing one. Call it before tortoise is imported; if torchaudio was built for CUDA and torch
    was not, call it before transformers is imported too. Tortoise then works, except for its own generation, which
    `accelerate` replaces by the engine.

    Returns:
        One sentence for each change that was made.

    Raises:
        ImportError: tortoise-tts or torchaudio is not installed.
    """
    if importlib.util.find_spec("tortoise") is None:
        raise ImportError("tortoise-tts is not installed: pip install --no-deps tortoise-tts==3.0.0, and what it needs")
    done = _torchaudio()
    # Importing this module puts another `transformers` into `sys.modules`, so that earlier additions are lost.
    importlib.import_module("transformers.processing_utils")
    transformers: Any = importlib.import_module("transformers")
    outputs = importlib.import_module("transformers.generation.utils")
    if not hasattr(transformers, "LogitsWarper"):
        transformers.LogitsWarper = transformers.LogitsProcessor
        done.append("transformers.LogitsWarper is LogitsProcessor")
    parallel = "transformers.utils.model_parallel_utils"
    if parallel not in sys.modules and importlib.util.find_spec(parallel) is None:
        module: Any = ModuleType(parallel)
        module.get_device_map = _gone("get_device_map")
        module.assert_device_map = _gone("assert_device_map")
        sys.modules[parallel] = module
        done.append(f"{parallel} has two functions that raise")
    for owner, names in ((transformers, _BEAMS), (outputs, _OUTPUTS)):
        missing = [name for name in names if not hasattr(owner, name)]
        for name in missing:
            setattr(owner, name, type(name, (), {"__init__": _gone(name)}))
        if missing:
            done.append(f"{owner.__name__} has classes that raise when they are made: {', '.join(missing)}")
    return done


def _torchaudio() -> list[str]:
    """Import torchaudio, without its compiled part if that cannot be loaded with this torch."""
    try:
        importlib.import_module("torchaudio")
        return []
    except ModuleNotFoundError:
        raise
    except (ImportError, OSError, RuntimeError):  # a CUDA library that this torch lacks, or another version
        for name in [name for name in sys.modules if name.split(".")[0] == "torchaudio"]:
            del sys.modules[name]
    stub: Any = ModuleType("torchaudio._extension")
    stub._IS_TORCHAUDIO_EXT_AVAILABLE = stub._IS_ALIGN_AVAILABLE = False
    stub.fail_if_no_align = lambda function: function
    sys.modules[stub.__name__] = stub
    importlib.import_module("torchaudio")
    return ["torchaudio is without its compiled part, which this torch cannot load, and which spectra do not need"]


def _gone(name: str):
    def gone(*args, **kwargs):
        raise NotImplementedError(f"transformers has no {name} any more, and tortoise-tts asked for it")

    return gone
