"""A plugin that pytest loads before all else (`-p tests.integrations.overlay`): tortoise-tts beside its dependencies.

Where torchaudio was built for CUDA and torch was not, transformers cannot even be imported before this.
"""

from clvp_fast.integrations import make_tortoise_importable

make_tortoise_importable()
