"""The model card of an exported checkpoint: data, licences, domain, limits, and figures."""

import json
import re
import shutil
from pathlib import Path

from clvp_fast.io.files import write_json
from examples.train import evaluate, model, texts
from examples.train.state import Refused

_TABLE = """Word error rates by pocketsphinx, of sentences that nothing was trained on. Its language model is open (its
own trigrams) or closed (the domain's words). Behind ± stands the standard error over sentences; `p`, by Wilcoxon over
sentences, is of the gain over the mean. `make demo-quality` measures them again.

| language model | sentences | candidates | mean | picked by score | least | p |
|---|---|---|---|---|---|---|
"""
# The figures of a card, in its checkpoint folder.
FIGURES = "figures.json"
NAME = re.compile(r"evaluation-(\d+)-(\d+)-(open|closed)\.jsonl")


def figures(folder: Path) -> list[dict]:
    """Return the evaluations' summaries of the current decoder and scorer; others belong to other checkpoints."""
    steps = {part: step for part, (step, _) in model.steps_of(folder).items()}
    found = []
    for path in sorted(folder.glob("evaluation-*.jsonl")):
        of_step, count, kind = NAME.fullmatch(path.name).groups()
        rows = [row for row in evaluate.read_rows(path) if row.get("scorer") == steps.get("scorer")]
        if int(of_step) == steps.get("decoder") and rows:
            found.append({"candidates": int(count), "kind": kind, **evaluate.summary(rows)})
    return found


def rankings(found: list[dict]) -> list[tuple[str, int, dict]]:
    """Return language model, number of candidates and evaluation of each ranking that was measured, in this order.

    A number that several evaluations have is told of the one with most sentences, and then with most candidates.
    """
    best: dict[tuple[str, int], dict] = {}
    for figure in sorted(found, key=lambda figure: (figure["sentences"], figure["candidates"])):
        best |= {(figure["kind"], count): figure for count in evaluate.GROUPS if f"best_of_{count}" in figure}
    return [(kind, count, best[kind, count]) for kind, count in sorted(best)]


def read_figures(checkpoint: Path) -> list[dict]:
    """Return the figures of a checkpoint's card.

    Raises:
        Refused: it has none.
    """
    if not (checkpoint / FIGURES).is_file():
        raise Refused(f"{checkpoint} has no {FIGURES}: export a trained checkpoint there first")
    found = json.loads((checkpoint / FIGURES).read_text(encoding="utf-8"))
    if not found:
        raise Refused(f"the card of {checkpoint} has no figures: evaluate it first, and export it again")
    return found


def write(folder: Path, target: Path) -> None:
    """Write the card, its figures as JSON, the notices and the uses of the evaluation into the checkpoint `target`."""
    (target / "README.md").write_text(card(folder), encoding="utf-8")
    write_json(target / FIGURES, figures(folder))
    shutil.copy(Path(__file__).with_name("NOTICE.md"), target)
    if (folder / model.USES).is_file():
        shutil.copy(folder / model.USES, target)


def card(folder: Path) -> str:
    """Return the card as Markdown."""
    trained = model.steps_of(folder)
    steps = "".join(f"| {part} | {step} | {spent / 60:.0f} |\n" for part, (step, spent) in trained.items())
    rows, gains = "", False
    for kind, count, found in rankings(figures(folder)):
        best = found[f"best_of_{count}"]
        gains = gains or best["p"] < 0.01
        rows += (
            f"| {kind} | {found['sentences']} | {count} | {best['mean']:.3f} | {best['picked']:.3f} ± "
            f"{best['picked_error']:.3f} | {best['least']:.3f} | {best['p']:.2g} |\n"
        )
    verdict = "" if gains else "\nRanking gains nothing here that these sentences could show.\n"
    measured = f"{_TABLE}{rows}{verdict}" if rows else "Nothing was measured of this checkpoint.\n"
    return f"""# A small CLVP that was trained on synthetic speech

Made by `examples/train` of clvp_fast, and by nothing else.

- **Data**: sentences of a grammar of {len(texts.WORDS)} English words, spoken by two synthesisers: flite's voice `rms`
  and hibari-tts' voice `heart`. No recording of a person was used by this recipe.
- **Domain**: these words alone; `tokenizer_config.json` lists them as `domain_words`. Other words may be said wrongly.
- **Voices**: these two. A recording of a person does not clone that person.
- **Codes**: 1000 at 21.5 Hz, of the codec in `vocoder.safetensors`; they are not Tortoise's.
- **Licence**: that of clvp_fast, Apache-2.0; notices of the synthesisers are in `NOTICE.md`.

| trained | steps | CPU minutes |
|---|---|---|
{steps}
## Figures

{measured}"""
