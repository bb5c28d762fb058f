"""Who made a corpus, its licence and how to cite it: what manifests record and model cards repeat."""

from typing import Any

FINEWEB_LICENCE = (
    "ODC-By 1.0 (https://opendatacommons.org/licenses/by/1-0/); its use is also subject to Common Crawl's terms "
    "(https://commoncrawl.org/terms-of-use)"
)
FINEWEB_CITATION = (
    "Penedo et al., The FineWeb Datasets: Decanting the Web for the Finest Text Data at Scale, 2024, arXiv:2406.17557"
)
OPENWEBTEXT = {
    "dataset": "Skylion007/openwebtext",
    "language": "en",
    "licence": "its authors own none of the text; they license the packaging under CC0 1.0 "
    "(https://creativecommons.org/publicdomain/zero/1.0/)",
    "citation": "Gokaslan, Cohen, Pavlick and Tellex, OpenWebText Corpus, 2019, "
    "http://Skylion007.github.io/OpenWebTextCorpus",
}
FINEWEB = {
    "dataset": "HuggingFaceFW/fineweb",
    "language": "en",
    "licence": FINEWEB_LICENCE,
    "citation": FINEWEB_CITATION,
}
FINEWEB_EDU = FINEWEB | {"dataset": "HuggingFaceFW/fineweb-edu"}
PYDOCS = {
    "language": "en",
    "licence": "those of the packages: Python (PSF-2.0), numpy (BSD-3-Clause), torch (BSD-3-Clause)",
}
OF_REPOSITORY = {  # on the hub; some hold the tokens of a corpus that others made
    "Skylion007/openwebtext": OPENWEBTEXT,
    "HuggingFaceFW/fineweb": FINEWEB,
    "HuggingFaceFW/fineweb-edu": FINEWEB_EDU,
    "kjj0/fineweb10B-gpt2": FINEWEB,
    "kjj0/fineweb100B-gpt2": FINEWEB,
    "kjj0/finewebedu10B-gpt2": FINEWEB_EDU,
    "karpathy/fineweb-edu-100B-gpt2-token-shards": FINEWEB_EDU,
}
NO_LICENCE = "none recorded"


def terms_of(source: dict[str, Any]) -> dict[str, str]:
    """The terms of a manifest's source: dataset (a name on the hub), language, licence, citation, as far as known.

    Only the repository decides, or the name of the embedded corpus. The user's own files have no known licence.
    """
    if source.get("name") == "pydocs":
        return PYDOCS
    return OF_REPOSITORY.get(source.get("repo", ""), {"licence": NO_LICENCE})


def recorded_terms(manifest: dict[str, Any]) -> dict[str, str]:
    """The terms in a manifest. One that was written before they were recorded has those that follow from its source."""
    return manifest.get("terms") or terms_of(manifest.get("source", {}))
