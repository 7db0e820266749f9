"""Model families: each in a folder of its own, written on transformers' public base classes."""

from clvp_fast.models.transformers_versions import check_release

check_release()
