"""CLVP, the candidate generator and judge of Tortoise TTS, and CLAP, the judge of sound, on hand-written kernels.

Importing this package imports nothing heavy: transformers, triton and matplotlib are loaded when a name that needs them
is first used.
"""

from importlib import import_module
from pathlib import Path

__version__ = "0.1.0"

# A bare checkout (PYTHONPATH=.) finds `clvp_fast.kernels` in the repository's top-level `kernels/`; an installed
# package has it inside.
_root = Path(__file__).resolve().parent.parent
if (_root / "kernels").is_dir() and (_root / "setup.py").is_file() and not (_root / "clvp_fast" / "kernels").exists():
    __path__.append(str(_root))

_EXPORTS = {
    "clvp_fast.models.clap.configuration": ["ClapAudioConfig", "ClapConfig", "ClapTextConfig"],
    "clvp_fast.models.clap.feature_extraction": ["ClapFeatureExtractor"],
    "clvp_fast.models.clap.processing": ["ClapProcessor"],
    "clvp_fast.models.clap.modeling": [
        "ClapAudioModel",
        "ClapAudioModelWithProjection",
        "ClapModel",
        "ClapPreTrainedModel",
        "ClapTextModel",
        "ClapTextModelWithProjection",
    ],
    "clvp_fast.models.clvp.configuration": ["ClvpConfig", "ClvpDecoderConfig", "ClvpEncoderConfig"],
    "clvp_fast.models.clvp.tokenization": ["ClvpTokenizer"],
    "clvp_fast.models.clvp.feature_extraction": ["ClvpFeatureExtractor"],
    "clvp_fast.models.clvp.processing": ["ClvpProcessor"],
    "clvp_fast.models.clvp.kept": ["release"],
    "clvp_fast.models.clvp.modeling": [
        "ClvpConditioningEncoder",
        "ClvpDecoder",
        "ClvpEncoder",
        "ClvpEncoderOutput",
        "ClvpForCausalLM",
        "ClvpModel",
        "ClvpModelForConditionalGeneration",
        "ClvpOutput",
        "ClvpPreTrainedModel",
    ],
    "clvp_fast.models.clvp.convert_tortoise": ["convert_tortoise_checkpoint"],
    "clvp_fast.models.clvp_scorer.configuration": ["CLVPConfig", "CLVPSpeechConfig", "CLVPTextConfig"],
    "clvp_fast.models.clvp_scorer.convert_tortoise": ["convert_tortoise_scorer"],
    "clvp_fast.models.clvp_scorer.modeling": [
        "CLVPModel",
        "CLVPOutput",
        "CLVPPreTrainedModel",
        "CLVPSpeechModel",
        "CLVPSpeechModelOutput",
        "CLVPSpeechModelWithProjection",
        "CLVPTextModel",
        "CLVPTextModelOutput",
        "CLVPTextModelWithProjection",
    ],
    "clvp_fast.engine.engine": ["CandidateEngine"],
    "clvp_fast.engine.ranking": ["Ranker"],
    "clvp_fast.engine.requests": ["CandidateRequest", "CandidateResult"],
    "clvp_fast.engine.sampling_params": ["SamplingParams"],
    "clvp_fast.engine.scoring": ["Ranking", "Scorer"],
    "clvp_fast.engine.voices": ["Voice"],
    "clvp_fast.integrations.live": ["accelerate"],
    "clvp_fast.integrations.tortoise": ["restore"],
    "clvp_fast.ops.dispatch": ["backend", "explain"],
}
_MODULE_OF = {name: module for module, names in _EXPORTS.items() for name in names}

__all__ = ["__version__", *sorted(_MODULE_OF)]  # pyright: ignore[reportUnsupportedDunderAll] - __init__.pyi lists them


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'clvp_fast' has no attribute {name!r}")
    return getattr(import_module(_MODULE_OF[name]), name)


def __dir__():
    return sorted(set(globals()) | set(__all__))
