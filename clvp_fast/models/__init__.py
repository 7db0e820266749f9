"""Model families, each in its own folder, on transformers' public base classes."""

from clvp_fast.models.transformers_versions import check_release

check_release()
