"""The values of an engine's settings, allowed and by default, at every door; those of sampling are `SamplingParams`.

Nothing heavy is imported here, as the command line's `--help` reads it.
"""

#: How candidates are scored: as [`Ranker`] explains; the first is the default.
SCORING_MODES = ("padded", "trimmed")
#: Of the weights, as torch names them; the first is the default.
DTYPES = ("float32", "bfloat16", "float16")
#: How texts are cleaned: as [`ClvpTokenizer`] explains; the first is the default.
TEXT_CLEANINGS = ("tortoise", "transformers")
#: Of the memory that is free, how much may be used beside the weights.
MEMORY_FRACTION = 0.9
#: Tokens a page of keys and values.
PAGE_SIZE = 16
