"""Hides the packages that a GPU machine lacks, from every process whose PYTHONPATH begins with this folder."""

from importlib.machinery import PathFinder

HIDDEN = ("soundfile", "soxr", "inflect", "unidecode", "pyarrow", "matplotlib", "rich", "hypothesis", "xdist")

_find = PathFinder.find_spec


@classmethod
def _find_all_others(cls, name, path=None, target=None):
    return None if name.partition(".")[0] in HIDDEN else _find(name, path, target)


if __name__ == "sitecustomize":  # at the start of a process, and not where a test asks for the names
    PathFinder.find_spec = _find_all_others
