"""Hooks of MkDocs (mkdocs.yml): the footer names version and commits, and prose that is hard to read is a warning."""

import re
import subprocess
import sys
from pathlib import Path

from mkdocs.plugins import get_plugin_logger

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from handbook import prose  # noqa: E402 - MkDocs loads hooks by their path

log = get_plugin_logger("handbook")


def on_config(config):
    """Write the version, the commit of the pages and the commits of the figures into the footer."""
    version = re.search(r'^__version__ = "(.+)"', _text("clvp_fast/__init__.py"), re.MULTILINE)[1]
    config.copyright = f"clvp_fast {version}, pages at commit {_commit()}, figures at commits {', '.join(measured())}"
    return config


def measured() -> list[str]:
    """Return the commits at which the figures of docs/figures.md were measured, the first first."""
    return list(dict.fromkeys(re.findall(r"at commit (\w+)", _text("docs/figures.md"))))


def on_pre_build(config):
    """Warn, which `strict` makes an error, of each sentence that prose.py finds."""
    for found in prose.findings(ROOT):
        log.warning(str(found))


def on_page_content(html, **kwargs):
    """Link `[`Name`]` of docstrings to the name's place in the reference."""

    def link(match: re.Match) -> str:
        name = match[1] if match[1].startswith("clvp_fast.") else f"clvp_fast.{match[1]}"
        return f'<autoref identifier="{name}" optional><code>{match[1]}</code></autoref>'

    return re.sub(r"\[<code>([\w.]+)</code>\]", link, html)


def _text(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"
