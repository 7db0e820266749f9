"""`ClapProcessor`: RoBERTa's tokenizer and the feature extractor of CLAP as one."""

import inspect

from transformers import BatchFeature, ProcessorMixin, RobertaTokenizerFast

from clvp_fast.models.clap.feature_extraction import PADDINGS, TRUNCATIONS, ClapFeatureExtractor
from clvp_fast.models.common import clips

# Options that a tokenizer ignores.
_AUDIO_OPTIONS = {"sampling_rate", "seed", "device"}
_AUDIO_MODES = {"truncation": TRUNCATIONS, "padding": PADDINGS}


class ClapProcessor(ProcessorMixin):
    """Text to token ids and recordings to log-mel features, in one call.

    Args:
        feature_extractor: a `ClapFeatureExtractor`.
        tokenizer: a RoBERTa tokenizer of transformers.

    `decode` and `batch_decode` are the tokenizer's. A directory saved by this class or by transformers' loads in both.
    """

    def __init__(self, feature_extractor, tokenizer):
        super().__init__(feature_extractor, tokenizer)

    def __call__(self, text=None, audio=None, **kwargs) -> BatchFeature:
        """Prepare text, audio, or both for the model.

        Args:
            text: a string or a list of strings (of words, with `is_split_into_words=True`).
            audio: what `ClapFeatureExtractor` takes, or the path or URL of an audio file, or a list of them.
            sampling_rate: of the audio in Hz.
            seed, device: as for the feature extractor.
            truncation, padding: names of the feature extractor's options ("rand_trunc", "repeat", …) go to it.
            return_tensors: "pt", "np" or None (lists).
            **kwargs: options of the tokenizer if text is given, else of the feature extractor. So `padding=True` pads
            the texts. The dictionaries `text_kwargs` and `audio_kwargs` go to one of the two, `common_kwargs` to both.

        Returns:
            `input_ids` and `attention_mask` of the text; `input_features` and `is_longer` of the audio.

        Raises:
            ValueError: neither text nor audio, or inputs of other names; an option given twice; an input that the
                tokenizer or the extractor refuses.
            TypeError: text that is not a string.
        """
        clips.refuse_other_inputs(type(self).__name__, kwargs)
        if text is None and audio is None:
            raise ValueError("neither text nor audio was given: pass at least one of them.")
        text_kwargs, audio_kwargs = _sort_options(kwargs, has_text=text is not None)
        outputs = {}
        if text is not None:
            if not isinstance(text, (str, list, tuple)) or (not isinstance(text, str) and not text):
                raise TypeError(
                    f"text must be a string or a list of strings, not {type(text).__name__} {str(text)[:40]!r}."
                )
            outputs.update(self.tokenizer(text, **text_kwargs))
        if audio is not None:
            if _is_path(audio) or (isinstance(audio, (list, tuple)) and audio and all(map(_is_path, audio))):
                rate = self.feature_extractor.sampling_rate
                audio, audio_kwargs["sampling_rate"] = (
                    self.feature_extractor.fetch_audio(audio, sampling_rate=rate),
                    rate,
                )
            outputs.update(self.feature_extractor(audio, **audio_kwargs))
        return BatchFeature(outputs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """Load a processor from a directory or the hub.

        Args:
            pretrained_model_name_or_path: the directory or the hub's id.
            **kwargs: `revision`, `token`, `cache_dir` and the other options of the base class; options of
                `ClapFeatureExtractor` (such as `truncation`) replace the saved ones.
        """
        path, of_extractor = pretrained_model_name_or_path, set(inspect.signature(ClapFeatureExtractor).parameters)
        feature_extractor = ClapFeatureExtractor.from_pretrained(path, **kwargs)
        others = {name: value for name, value in kwargs.items() if name not in of_extractor}
        return cls(feature_extractor, RobertaTokenizerFast.from_pretrained(path, **others))


def _is_path(value) -> bool:
    return isinstance(value, str)


def _sort_options(options: dict, has_text: bool) -> tuple[dict, dict]:
    """Return the options of the tokenizer and those of the feature extractor."""
    options = dict(options)
    common = {**options.pop("common_kwargs", {})}
    if "return_tensors" in options:
        common["return_tensors"] = options.pop("return_tensors")
    to_text = {**common, **options.pop("text_kwargs", {})}
    to_audio = {**common, **options.pop("audio_kwargs", {})}
    for name, value in options.items():
        of_audio = not has_text or name in _AUDIO_OPTIONS or value in _AUDIO_MODES.get(name, ())
        target = to_audio if of_audio else to_text
        if name in target:
            raise ValueError(f"{name} was given twice: by itself and in a dictionary of options.")
        target[name] = value
    return to_text, to_audio
