"""Allowed and default values of an engine's settings, for all its users; those of sampling are in `SamplingParams`.

Nothing heavy is imported here, because the command line's `--help` reads it.
"""

#: Modes of scoring, as [`Ranker`] explains them; the first is the default.
SCORING_MODES = ("padded", "trimmed")
#: Dtypes of the weights, by torch's names; the first is the default.
DTYPES = ("float32", "bfloat16", "float16")
#: Narrow dtypes of what products multiply; by default it keeps its own.
ACTIVATION_DTYPES = ("int8",)
#: Ways of cleaning texts, as [`ClvpTokenizer`] explains them; the first is the default.
TEXT_CLEANINGS = ("tortoise", "transformers")
#: The share of free memory that the engine may use beside the weights.
MEMORY_FRACTION = 0.9
#: Tokens a page of keys and values.
PAGE_SIZE = 16
