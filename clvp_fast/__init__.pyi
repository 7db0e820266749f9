"""What `import clvp_fast` offers, for type checkers: `__init__.py` loads these names when they are first used."""

from clvp_fast.engine.engine import CandidateEngine as CandidateEngine
from clvp_fast.engine.ranking import Ranker as Ranker
from clvp_fast.engine.requests import CandidateRequest as CandidateRequest, CandidateResult as CandidateResult
from clvp_fast.engine.sampling_params import SamplingParams as SamplingParams
from clvp_fast.engine.scoring import Ranking as Ranking, Scorer as Scorer
from clvp_fast.engine.voices import Voice as Voice
from clvp_fast.integrations.live import accelerate as accelerate
from clvp_fast.integrations.tortoise import restore as restore
from clvp_fast.models.clap.configuration import (
    ClapAudioConfig as ClapAudioConfig,
    ClapConfig as ClapConfig,
    ClapTextConfig as ClapTextConfig,
)
from clvp_fast.models.clap.feature_extraction import ClapFeatureExtractor as ClapFeatureExtractor
from clvp_fast.models.clap.modeling import (
    ClapAudioModel as ClapAudioModel,
    ClapAudioModelWithProjection as ClapAudioModelWithProjection,
    ClapModel as ClapModel,
    ClapPreTrainedModel as ClapPreTrainedModel,
    ClapTextModel as ClapTextModel,
    ClapTextModelWithProjection as ClapTextModelWithProjection,
)
from clvp_fast.models.clap.processing import ClapProcessor as ClapProcessor
from clvp_fast.models.clvp.configuration import (
    ClvpConfig as ClvpConfig,
    ClvpDecoderConfig as ClvpDecoderConfig,
    ClvpEncoderConfig as ClvpEncoderConfig,
)
from clvp_fast.models.clvp.convert_tortoise import convert_tortoise_checkpoint as convert_tortoise_checkpoint
from clvp_fast.models.clvp.feature_extraction import ClvpFeatureExtractor as ClvpFeatureExtractor
from clvp_fast.models.clvp.kept import release as release
from clvp_fast.models.clvp.modeling import (
    ClvpConditioningEncoder as ClvpConditioningEncoder,
    ClvpDecoder as ClvpDecoder,
    ClvpEncoder as ClvpEncoder,
    ClvpEncoderOutput as ClvpEncoderOutput,
    ClvpForCausalLM as ClvpForCausalLM,
    ClvpModel as ClvpModel,
    ClvpModelForConditionalGeneration as ClvpModelForConditionalGeneration,
    ClvpOutput as ClvpOutput,
    ClvpPreTrainedModel as ClvpPreTrainedModel,
)
from clvp_fast.models.clvp.processing import ClvpProcessor as ClvpProcessor
from clvp_fast.models.clvp.tokenization import ClvpTokenizer as ClvpTokenizer
from clvp_fast.models.clvp_scorer.configuration import (
    CLVPConfig as CLVPConfig,
    CLVPSpeechConfig as CLVPSpeechConfig,
    CLVPTextConfig as CLVPTextConfig,
)
from clvp_fast.models.clvp_scorer.convert_tortoise import convert_tortoise_scorer as convert_tortoise_scorer
from clvp_fast.models.clvp_scorer.modeling import (
    CLVPModel as CLVPModel,
    CLVPOutput as CLVPOutput,
    CLVPPreTrainedModel as CLVPPreTrainedModel,
    CLVPSpeechModel as CLVPSpeechModel,
    CLVPSpeechModelOutput as CLVPSpeechModelOutput,
    CLVPSpeechModelWithProjection as CLVPSpeechModelWithProjection,
    CLVPTextModel as CLVPTextModel,
    CLVPTextModelOutput as CLVPTextModelOutput,
    CLVPTextModelWithProjection as CLVPTextModelWithProjection,
)
from clvp_fast.ops.dispatch import backend as backend, explain as explain

__version__: str
__all__: list[str]
