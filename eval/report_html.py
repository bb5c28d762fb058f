"""The report of scripts/report.py as one HTML page without other files: curves, tables, configs and samples."""

import base64
import html
import json
from pathlib import Path

import torch

from eval.sample import generate
from training.folder import CONFIG
from weights import open_trained

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
img { max-width: 100% }
table { border-collapse: collapse; display: block; overflow-x: auto; margin: 1rem 0 }
th, td { border: 1px solid #ccc; padding: .3rem .7rem; text-align: right; font-variant-numeric: tabular-nums }
th:first-child, td:first-child { text-align: left }
th { background: #f3f3f3 }
pre { background: #f7f7f7; padding: 1rem; overflow-x: auto; white-space: pre-wrap }
"""


def sample(folder: Path, tokens: int = 200) -> str:
    """Text from the newest checkpoint of a run, with fixed settings; the reason in brackets if there can be none."""
    try:
        trained = open_trained(folder, torch.device("cpu"))
    except (ValueError, OSError) as error:
        return f"[no sample: {error}]"
    assert trained.tokenizer is not None
    ids = generate(trained.model, [trained.tokenizer.eot], tokens, temperature=0.8, top_p=0.95, seed=1)
    return trained.tokenizer.decode(list(ids))


def details(title: str, text: str) -> str:
    """A part that the reader unfolds."""
    return f"<details><summary>{html.escape(title)}</summary><pre>{html.escape(text)}</pre></details>"


def html_page(markdown: str, image: Path, folders: list[Path]) -> str:
    """The page in HTML. markdown: the report, which shows the image. folders: run folders."""
    from markdown_it import MarkdownIt

    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(markdown)
    picture = base64.b64encode(image.read_bytes()).decode()
    body = body.replace(f'src="{image.name}"', f'src="data:image/png;base64,{picture}"')
    parts = ["<h2>Samples</h2>"]
    parts += [f"<h3>{html.escape(f.name)}</h3><pre>{html.escape(sample(f))}</pre>" for f in folders]
    parts += ["<h2>Configs</h2>"]
    for folder in folders:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        parts.append(details(folder.name, json.dumps(config, indent=1)))
    head = f'<meta charset="utf-8"><title>Report</title><style>{STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n{"".join(parts)}\n</body></html>\n'
