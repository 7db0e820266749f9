"""`ClvpTokenizer` against transformers' tokenizer, and with Tortoise's cleaning against Tortoise's tokenizer.json."""

import inspect
import json
import random

import pytest
from tokenizers import Tokenizer
from transformers.models.clvp.tokenization_clvp import ClvpTokenizer as StockTokenizer

from clvp_fast import ClvpTokenizer
from clvp_fast.models.clvp.text_cleaning import clean_like_tortoise
from tests.data import data_path
from tests.models.clvp.test_text_cleaning import random_texts

SPECIALS = ["[STOP]", "[UNK]", "[SPACE]", "<|endoftext|>", "[stop]", "'s", "'the", "'ll go", "__", " _a"]


def small_vocabulary(folder):
    """Give a vocabulary of a few merges without [SPACE], so that both ways of writing a space occur."""
    merges = ["t h", "th e", "l l", "h e", "Ġ t", "Ġt h", "o n", "on e", "e e", "n ine"]
    symbols = [*map(chr, range(ord("!"), ord("~") + 1)), "Ġ", *("".join(merge.split()) for merge in merges)]
    vocab = {token: index for index, token in enumerate(["[STOP]", "[UNK]", *dict.fromkeys(symbols)])}
    del vocab["?"]
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    return folder / "vocab.json", folder / "merges.txt"


@pytest.fixture(params=["small", "real"])
def files(request, tmp_path):
    if request.param == "small":
        return small_vocabulary(tmp_path)
    return data_path("clvp_tokenizer/vocab.json"), data_path("clvp_tokenizer/merges.txt")


@pytest.fixture
def real_files():
    return data_path("clvp_tokenizer/vocab.json"), data_path("clvp_tokenizer/merges.txt")


def texts(count, seed):
    draw = random.Random(seed)
    for text in random_texts(count, seed):
        if "$," not in text:
            yield text if draw.random() < 0.5 else text + draw.choice(SPECIALS) + draw.choice(["", "end", " 1 "])


def test_ids_and_decoded_text_equal_transformers(files):
    stock, ours = StockTokenizer(*files), ClvpTokenizer(*files)
    assert ours.get_vocab() == stock.get_vocab() and len(ours) == len(stock) and ours.vocab_size == stock.vocab_size
    count = 0
    for text in texts(1500, seed=3):
        try:
            expected = stock(text)
        except ValueError:
            continue
        assert dict(ours(text)) == dict(expected), repr(text)
        assert ours.tokenize(text) == stock.tokenize(text), repr(text)
        for options in ({}, {"clean_up_tokenization_spaces": True}, {"skip_special_tokens": True}):
            decoded = ours.decode(expected["input_ids"], **options)
            assert decoded == stock.decode(expected["input_ids"], **options), repr(text)
        count += 1
    assert count > 1400


def test_batches_padding_truncation_and_pairs_equal_transformers(files):
    stock, ours = StockTokenizer(*files), ClvpTokenizer(*files)
    batch = ["Hello world", "", "the 3 bells", "[STOP] you"]
    for options in (
        {"padding": True, "return_tensors": "np"},
        {"padding": "max_length", "max_length": 9, "truncation": True},
        {"padding": True, "padding_side": "left", "return_special_tokens_mask": True},
        {"text_pair": ["a", "b", "", "[STOP]"], "return_token_type_ids": True},
        {"split_special_tokens": True},
    ):
        expected, got = stock(batch, **options), ours(batch, **options)
        assert got.keys() == expected.keys()
        for name in expected:
            assert list(map(list, got[name])) == list(map(list, expected[name])), (options, name)
    assert ours.batch_decode([[3, 4], [5]]) == stock.batch_decode([[3, 4], [5]])


def test_documented_ids(real_files):
    tokenizer = ClvpTokenizer(*real_files)
    assert tokenizer("Hello world")["input_ids"] == [62, 84, 28, 2, 179, 79]
    assert tokenizer(" Hello world")["input_ids"] == [2, 62, 84, 28, 2, 179, 79]
    example = [147, 2, 54, 2, 43, 2, 169, 122, 29, 64, 2, 136, 37, 33, 9]
    assert tokenizer("This is an example text.")["input_ids"] == example
    assert tokenizer("[SPACE] [STOP]")["input_ids"] == [1, 248, 238, 1, 2, 0]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (255, 0, 0)
    assert tokenizer("你好")["input_ids"] == []


def test_tortoise_cleaning_gives_the_ids_of_its_tokenizer_file(real_files):
    oracle = Tokenizer.from_file(str(data_path("clvp_tokenizer/tokenizer.json")))
    tokenizer = ClvpTokenizer(*real_files, text_cleaning="tortoise")
    count = 0
    for text in texts(3000, seed=4):
        try:
            cleaned = clean_like_tortoise(text)
        except ValueError:  # a number too long to name
            continue
        assert tokenizer(text)["input_ids"] == oracle.encode(cleaned.replace(" ", "[SPACE]")).ids, repr(text)
        count += 1
    assert count > 2800
    assert tokenizer("1st")["input_ids"] != ClvpTokenizer(*real_files)("1st")["input_ids"]


def test_tortoise_cleaning_reads_special_tokens_as_text(files):
    tokenizer = ClvpTokenizer(*files, text_cleaning="tortoise")
    assert 0 not in tokenizer("a [STOP]")["input_ids"]
    assert tokenizer("a [STOP]", split_special_tokens=False)["input_ids"][-1] == 0


def test_unknown_text_cleaning(files):
    with pytest.raises(ValueError, match=r"text_cleaning must be one of \['tortoise', 'transformers'\], not 'french'"):
        ClvpTokenizer(*files, text_cleaning="french")


def test_add_prefix_space_at_instantiation_and_call(real_files):
    plain, prefixed = ClvpTokenizer(*real_files), ClvpTokenizer(*real_files, add_prefix_space=True)
    for text in ("Hello", "1st [STOP] x", " y"):
        expected = plain(" " + text)["input_ids"]
        assert plain(text, add_prefix_space=True)["input_ids"] == expected
        assert plain.encode(text, add_prefix_space=True) == expected
        assert prefixed(text)["input_ids"] == prefixed([text])["input_ids"][0] == expected
        assert prefixed(text, add_prefix_space=False)["input_ids"] == plain(text)["input_ids"]
    assert plain("Hello")["input_ids"] == StockTokenizer(*real_files, add_prefix_space=True)("Hello")["input_ids"]
    assert prefixed("")["input_ids"] == []


def test_words_given_one_by_one_get_a_space_each(real_files):
    tokenizer = ClvpTokenizer(*real_files)
    expected = tokenizer(" Hello world")["input_ids"]
    assert tokenizer(["Hello", "world"], is_split_into_words=True)["input_ids"] == expected
    batch = tokenizer([["Hello", "world"], ["Hello"]], is_split_into_words=True)["input_ids"]
    assert batch == [expected, tokenizer(" Hello")["input_ids"]]
    stock = StockTokenizer(*real_files)(["Hello", "world"], is_split_into_words=True)["input_ids"]
    assert stock == tokenizer("Hello")["input_ids"] + tokenizer("world")["input_ids"]


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("eos", [False, True])
def test_bos_and_eos_tokens(files, tmp_path, bos, eos):
    plain = ClvpTokenizer(*files)
    tokenizer = ClvpTokenizer(*files, add_bos_token=bos, add_eos_token=eos)
    before, after = [tokenizer.bos_token_id] * bos, [tokenizer.eos_token_id] * eos
    first, second = plain("the bell")["input_ids"], plain("tone")["input_ids"]
    got = tokenizer("the bell", return_special_tokens_mask=True)
    assert got["input_ids"] == before + first + after
    assert got["special_tokens_mask"] == [1] * bos + [0] * len(first) + [1] * eos
    pair = tokenizer("the bell", "tone", return_special_tokens_mask=True)
    assert pair["input_ids"] == before + first + after + before + second + after
    assert sum(pair["special_tokens_mask"]) == 2 * (bos + eos)
    assert tokenizer("the bell", add_special_tokens=False)["input_ids"] == first
    assert tokenizer.num_special_tokens_to_add() == bos + eos
    cut = tokenizer("the bell", truncation=True, max_length=4)["input_ids"]
    assert cut == before + first[: 4 - bos - eos] + after
    tokenizer.save_pretrained(tmp_path / "saved")
    assert ClvpTokenizer.from_pretrained(tmp_path / "saved")("the bell")["input_ids"] == got["input_ids"]


def test_saved_by_us_loads_in_both(files, tmp_path):
    tokenizer = ClvpTokenizer(*files)
    tokenizer.add_tokens(["<laugh out>"])
    tokenizer.save_pretrained(tmp_path / "ours")
    texts_ = ["the bells, $5!", "<laugh out> none [STOP]"]
    expected = tokenizer(texts_)["input_ids"]
    for cls in (ClvpTokenizer, StockTokenizer):
        loaded = cls.from_pretrained(tmp_path / "ours")
        assert type(loaded) is cls and loaded(texts_)["input_ids"] == expected
        assert loaded.bpe_ranks == tokenizer.bpe_ranks and loaded.get_vocab() == tokenizer.get_vocab()
    assert tokenizer.decode(expected[1], clean_up_tokenization_spaces=True).startswith("<laugh out>")


def test_saved_by_stock_loads_here_with_every_merge(files, tmp_path):
    stock = StockTokenizer(*files)
    stock.save_pretrained(tmp_path / "stock")
    loaded = ClvpTokenizer.from_pretrained(tmp_path / "stock")
    assert loaded.bpe_ranks == stock.bpe_ranks and loaded.get_vocab() == stock.get_vocab()
    assert loaded("the bells")["input_ids"] == stock("the bells")["input_ids"]
    # Stock writes no version line, and takes the first merge ("t h") for one when it reads the file.
    assert len(StockTokenizer.from_pretrained(tmp_path / "stock").bpe_ranks) == len(stock.bpe_ranks) - 1


def test_saved_configuration_equals_stocks(files, tmp_path):
    configs = []
    for cls in (ClvpTokenizer, StockTokenizer):
        cls(*files).save_pretrained(tmp_path / cls.__module__)
        configs.append(json.loads((tmp_path / cls.__module__ / "tokenizer_config.json").read_text()))
    assert configs[0] == configs[1]


def test_text_cleaning_is_saved_only_when_set(files, tmp_path):
    for style in ("transformers", "tortoise"):
        tokenizer = ClvpTokenizer(*files, text_cleaning=style)
        tokenizer.save_pretrained(tmp_path / style)
        config = json.loads((tmp_path / style / "tokenizer_config.json").read_text())
        assert config.get("text_cleaning") == (None if style == "transformers" else style)
        loaded = ClvpTokenizer.from_pretrained(tmp_path / style)
        assert loaded.text_cleaning == style
        assert loaded("1st [STOP]")["input_ids"] == tokenizer("1st [STOP]")["input_ids"]
    StockTokenizer.from_pretrained(tmp_path / "tortoise")  # the option does not stand in stock's way
    switched = ClvpTokenizer.from_pretrained(tmp_path / "transformers", text_cleaning="tortoise")
    assert switched("1st")["input_ids"] == tokenizer("1st")["input_ids"]


def test_save_vocabulary(files, tmp_path):
    tokenizer = ClvpTokenizer(*files)
    paths = tokenizer.save_vocabulary(str(tmp_path), "pre")
    assert [path.rsplit("/", 1)[1] for path in paths] == ["pre-vocab.json", "pre-merges.txt"]
    again = ClvpTokenizer(*paths)
    assert again.encoder == tokenizer.encoder and again.bpe_ranks == tokenizer.bpe_ranks
    with pytest.raises(NotADirectoryError, match="saved into a directory"):
        tokenizer.save_vocabulary(str(tmp_path / "absent"))


def test_bad_files(files, tmp_path):
    vocab, merges = files
    for content, message in (("{", "is not valid JSON"), ('["a"]', "token -> id"), ('{"a": "b"}', "token -> id")):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            ClvpTokenizer(tmp_path / "bad.json", merges)
    (tmp_path / "bad.txt").write_text("#version: 0.2\nt h e\n")
    with pytest.raises(ValueError, match="holds two tokens, but one is 't h e'"):
        ClvpTokenizer(vocab, tmp_path / "bad.txt")
    with pytest.raises(FileNotFoundError):
        ClvpTokenizer(tmp_path / "absent.json", merges)


def test_ids_outside_the_vocabulary_do_not_decode(files):
    tokenizer = ClvpTokenizer(*files)
    with pytest.raises(ValueError, match="outside the vocabulary"):
        tokenizer.decode([3, 8193])


def test_kept_words_are_bounded(files, monkeypatch):
    monkeypatch.setattr("clvp_fast.models.clvp.tokenization._MAX_KEPT_WORDS", 5)
    tokenizer = ClvpTokenizer(*files)
    for word in range(40):
        tokenizer("a" * (word + 1))
        assert len(tokenizer.cache) <= 5


@pytest.mark.parametrize(
    "options",
    [{}, dict(add_bos_token=True), dict(add_eos_token=True, text_cleaning="tortoise", errors="strict")],
    ids=["defaults", "one", "several"],
)
def test_every_parameter_is_in_init_kwargs(tmp_path, options):
    """Do as transformers' own tests of tokenizers: make one again and load it again."""
    files = small_vocabulary(tmp_path)
    made = ClvpTokenizer(*files, **options)
    made.save_pretrained(tmp_path / "saved")
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(ClvpTokenizer.__init__).parameters.items()
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD and name != "self"
    }
    for tokenizer in (made, ClvpTokenizer.from_pretrained(tmp_path / "saved")):
        assert defaults.keys() <= tokenizer.init_kwargs.keys()
        for name, value in (defaults | options).items():
            if not name.endswith("_file"):
                assert str(tokenizer.init_kwargs[name]) == str(value), name
    assert made.init_kwargs["vocab_file"] == files[0] and made.init_kwargs["merges_file"] == files[1]
