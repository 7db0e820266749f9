"""The model card of an exported checkpoint: data, licences, domain, limits, and figures."""

import re
import shutil
from pathlib import Path

from clvp_fast.io.files import write_json
from examples.train import evaluate, model, texts

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
    rows = ""
    for found in figures(folder):
        for count in (4, 16, 64, 256):
            if best := found.get(f"best_of_{count}"):
                rows += (
                    f"| {found['kind']} | {found['sentences']} | {count} | {best['mean']:.3f} | {best['picked']:.3f} ± "
                    f"{best['picked_error']:.3f} | {best['least']:.3f} | {best['p']:.2g} |\n"
                )
    gains = any(best["p"] < 0.01 for found in figures(folder) for name, best in found.items() if "best_of" in name)
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
