"""No sentence of documents, docstrings and comments is hard to decode, and the script that looks for them sees them."""

import pytest

from handbook import prose
from tests.kit.documents import ROOT


def faults(text: str) -> list[str]:
    """Return what is wrong with the sentences of a text."""
    return [fault for _, sentence in prose.sentences(text) if (fault := prose.fault_of(sentence))]


@pytest.mark.parametrize(
    "text",
    [
        "What it costs is told below.",
        "It runs. Who is cancelled waits for the end of\nthat step.",
        "- item one\n- Whatever is left stays.",
        "| a | b |\n|---|---|\n| it runs | What is left stays |",
        "**What lost.** Nothing.",
        "Of which two are kept.",
        "Whether it fits is looked at later.",
        "How many rows a shard has.",
        "Returns:\n    What the call gave.",
    ],
)
def test_a_clause_as_the_subject_is_found(text):
    assert faults(text) == ["a clause is the subject"]


@pytest.mark.parametrize(
    "text",
    [
        "Nothing is raised without a wait.",
        "It cannot run without a library.",
        "No page is not free.",
        "They never wait for nothing.",
        "This is not unusual.",
    ],
)
def test_a_double_negation_is_found(text):
    assert faults(text) == ["a double negation"]


@pytest.mark.parametrize(
    "text",
    [
        "What does it cost?",
        "It tells what it costs.",
        "Whole words. Whatnot shops close.",
        "No encoding can hold names that are not UTF-8.",
        "It does not wait, and no page is lost.",
        "None where there is no residual.",
        "It is not under way.",
    ],
)
def test_other_sentences_are_left_alone(text):
    assert not faults(text)


def test_lines_are_those_of_the_file():
    document = prose.without_code("# What it is\n\n```sh\nWhat runs.\n```\n\nGood.\nWhat is\nbad.\n")
    assert [(line, text) for line, text in prose.sentences(document) if prose.fault_of(text)] == [(7, "What is bad.")]


def test_docstrings_and_comments_of_python_are_read():
    source = '"""Module."""\n\nx = 1  # behind\n\n\nclass Public:\n    def _hidden(self):\n        """What."""\n'
    source += "        # one\n        # block\n        #: and another\n        return '# text'\n"
    found = sorted(prose.prose_of_python(source))
    assert found == [(1, "Module."), (3, "behind"), (8, "What."), (9, "one\nblock\nand another")]


def test_comments_of_cplusplus_are_read():
    source = "/* What it\n * is. */\nint x; // one\n// more\n// lines\n"
    assert list(prose.comments_of_cplusplus(source)) == [(1, " What it\nis. "), (3, "one"), (4, "more\nlines")]


def test_docstrings_of_functions_that_begin_with_no_verb_are_found():
    good = ("Return it.", "mul.hi: the upper half.")
    bad = ("Of a layer.", "`x` as rows.", "From now on, run.")
    source = "\n".join(f'def f{place}():\n    """{text}"""' for place, text in enumerate(good + bad))
    assert [text for _, text in prose.without_verb(source)] == list(bad)
    assert not list(prose.without_verb('@property\ndef f():\n    """Of a layer."""'))


def test_names_of_tests_that_are_clauses_are_found(tmp_path):
    bad = ("test_what_is_left_stays", "test_who_waits_is_served", "test_of_which_two_are_kept", "test_whether_it_fits")
    good = ("test_it_tells_what_it_costs", "test_whole_words", "what_is_left")
    source = (
        "".join(f"def {name}(): ...\n" for name in bad + good) + "class TestIt:\n    async def test_how_it(): ...\n"
    )
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_it.py").write_text(source)
    found = prose.findings(tmp_path)
    assert sorted(one.sentence for one in found) == sorted((*bad, "test_how_it"))
    assert {one.fault for one in found} == {"a clause is the name"} and found[0].line == 1


def test_the_list_is_empty():
    assert not [str(found) for found in prose.findings(ROOT)]
