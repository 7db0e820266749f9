"""No sentence of the documents has a clause as its subject, and the script that looks for them sees them."""

import pytest

from handbook import prose
from tests.kit.documents import ROOT


@pytest.mark.parametrize(
    "text",
    [
        "What it costs is told below.",
        "It runs. Who is cancelled waits for the end of\nthat step.",
        "- item one\n- Whatever is left stays.",
        "| a | b |\n|---|---|\n| it runs | What is left stays |",
        "**What lost.** Nothing.",
        "Of which two are kept.",
        "Returns:\n    What the call gave.",
    ],
)
def test_a_clause_as_the_subject_is_found(text):
    assert [sentence for _, sentence in prose.sentences(text) if prose.is_clause(sentence)]


@pytest.mark.parametrize("text", ["What does it cost?", "It tells what it costs.", "Whole words. Whatnot shops close."])
def test_other_sentences_are_left_alone(text):
    assert not [sentence for _, sentence in prose.sentences(text) if prose.is_clause(sentence)]


def test_lines_are_those_of_the_file():
    document = prose.without_code("# What it is\n\n```sh\nWhat runs.\n```\n\nGood.\nWhat is\nbad.\n")
    assert [(line, text) for line, text in prose.sentences(document) if prose.is_clause(text)] == [(7, "What is bad.")]
    source = '"""Module."""\n\n\nclass Public:\n    """What it is."""\n\n    def _hidden(self):\n        """What."""\n'
    assert list(prose.docstrings(source)) == [(1, "Module."), (5, "What it is.")]


def test_the_list_is_empty():
    assert not [str(found) for found in prose.findings(ROOT)]
