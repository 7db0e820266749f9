"""`ClvpProcessor`: the tokenizer and the feature extractor of CLVP as one."""

import inspect

from transformers import BatchFeature, ProcessorMixin

from clvp_fast.models.clvp.feature_extraction import ClvpFeatureExtractor
from clvp_fast.models.clvp.tokenization import ClvpTokenizer
from clvp_fast.models.common import clips

# Options that a tokenizer ignores.
_AUDIO_OPTIONS = {"sampling_rate", "padding_value", "device"}


class ClvpProcessor(ProcessorMixin):
    """Text to token ids and speech to log-mel features, in one call.

    Args:
        feature_extractor: a `ClvpFeatureExtractor`.
        tokenizer: a `ClvpTokenizer`.

    `decode` and `batch_decode` are the tokenizer's. A directory saved by this class or by transformers' loads in both.
    """

    def __init__(self, feature_extractor, tokenizer):
        super().__init__(feature_extractor, tokenizer)

    def __call__(self, *inputs, text=None, audio=None, raw_speech=None, **kwargs) -> BatchFeature:
        """Prepare text, audio, or both for the model.

        Args:
            *inputs: text and audio by position: strings are text, anything else is audio.
            text: a string or a list of strings (of words, with `is_split_into_words=True`).
            audio: what `ClvpFeatureExtractor` takes, or the path or URL of an audio file, or a list of them.
            raw_speech: another name of `audio`.
            sampling_rate: of the audio in Hz.
            device: the device on which features are computed (`ClvpFeatureExtractor`); tokens are made on the CPU.
            return_tensors: "pt", "np" or None (lists).
            **kwargs: options of the tokenizer if text is given, else of the feature extractor. So `padding=True` pads
            the texts and leaves the clips at their default length. The dictionaries `text_kwargs` and `audio_kwargs` go
            to one of the two, `common_kwargs` to both.

        Returns:
            `input_ids` and `attention_mask` (of the text), and `input_features`; without text, `input_features` and
            `attention_mask` (of the samples).

        Raises:
            ValueError: neither text nor audio, one of them twice, or inputs of other names; or an input that the
                tokenizer or the extractor refuses.
            TypeError: text that is not a string.
        """
        clips.refuse_other_inputs(type(self).__name__, kwargs)
        text, audio = _sort_inputs(inputs, text, audio, raw_speech)
        text_kwargs, audio_kwargs = _sort_options(kwargs, has_text=text is not None)
        outputs = {}
        if text is not None:
            _check_text(text, text_kwargs.get("is_split_into_words", False))
            outputs.update(self.tokenizer(text, **text_kwargs))
        if audio is not None:
            if _is_path(audio) or (isinstance(audio, (list, tuple)) and audio and all(map(_is_path, audio))):
                audio = self.feature_extractor.fetch_audio(audio, sampling_rate=self.feature_extractor.sampling_rate)
                audio_kwargs["sampling_rate"] = self.feature_extractor.sampling_rate
            if text is not None:
                # The model takes the text's attention mask.
                audio_kwargs["return_attention_mask"] = False
            outputs.update(self.feature_extractor(audio, **audio_kwargs))
        return BatchFeature(outputs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """Load a processor from a directory or the hub.

        Args:
            pretrained_model_name_or_path: the directory or the hub's id.
            **kwargs: `revision`, `token`, `cache_dir` and the other options of the base class; options of
                `ClvpTokenizer` (such as `text_cleaning`) and `ClvpFeatureExtractor` replace the saved ones.
        """
        of_tokenizer = _parameters(ClvpTokenizer)
        of_extractor = _parameters(ClvpFeatureExtractor)
        path = pretrained_model_name_or_path
        feature_extractor = ClvpFeatureExtractor.from_pretrained(
            path, **{name: value for name, value in kwargs.items() if name not in of_tokenizer}
        )
        tokenizer = ClvpTokenizer.from_pretrained(
            path, **{name: value for name, value in kwargs.items() if name not in of_extractor}
        )
        return cls(feature_extractor, tokenizer)


def _parameters(cls) -> set[str]:
    parameters = inspect.signature(cls.__init__).parameters.values()
    return {parameter.name for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD} - {"self"}


def _is_text(value) -> bool:
    """Tell whether `value` is a string, or (lists of) lists of strings."""
    return isinstance(value, str) or (isinstance(value, (list, tuple)) and len(value) > 0 and all(map(_is_text, value)))


def _is_path(value) -> bool:
    return isinstance(value, str)


def _sort_inputs(inputs, text, audio, raw_speech):
    """Return text and audio from the arguments given by position and by name."""
    texts = [value for value in inputs if value is not None and _is_text(value)]
    clips = [value for value in inputs if value is not None and not _is_text(value)]
    texts += [text] if text is not None else []
    clips += [value for value in (audio, raw_speech) if value is not None]
    if not texts and not clips:
        raise ValueError("neither text nor audio was given: pass at least one of them.")
    if len(texts) > 1:
        raise ValueError("text was given more than once: pass several texts as one list.")
    if len(clips) > 1:
        raise ValueError("audio was given more than once (`raw_speech` is another name of it): pass clips as one list.")
    return texts[0] if texts else None, clips[0] if clips else None


def _sort_options(options: dict, has_text: bool) -> tuple[dict, dict]:
    """Return the options of the tokenizer and those of the feature extractor."""
    options = dict(options)
    common = {**options.pop("common_kwargs", {})}
    if "return_tensors" in options:
        common["return_tensors"] = options.pop("return_tensors")
    to_text = {**common, **options.pop("text_kwargs", {})}
    to_audio = {**common, **options.pop("audio_kwargs", {})}
    for name, value in options.items():
        target = to_audio if name in _AUDIO_OPTIONS or not has_text else to_text
        if name in target:
            raise ValueError(f"{name} was given twice: by itself and in a dictionary of options.")
        target[name] = value
    return to_text, to_audio


def _check_text(text, is_split_into_words: bool):
    if not _is_text(text):
        raise TypeError(f"text must be a string or a list of strings, not {type(text).__name__} {str(text)[:40]!r}.")
    nested = not isinstance(text, str) and not all(isinstance(part, str) for part in text)
    if nested and not is_split_into_words:
        raise TypeError("text must be a string or a list of strings; lists of words need is_split_into_words=True.")
