"""Makes the description on an index's page of README.md; all else is in setup.cfg.

An index has no files beside the text: a picture becomes its caption, and a sentence that links to
a file is left out, with its heading if nothing else is under it.
"""

import re
from pathlib import Path

from setuptools import setup


def describe(readme: str) -> str:
    """Return a README without what stands in other files; code in fences stays as it is."""
    parts = re.split(r"(^```.*?^```$)", readme, flags=re.DOTALL | re.MULTILINE)
    for i in range(0, len(parts), 2):
        text = re.sub(r'<img\b[^>]*?alt="([^"]*)"[^>]*>', r"*\1*", parts[i])
        text = re.sub(r"!\[([^]]*)\]\((?!https?:)[^)]*\)", r"*\1*", text)
        text = re.sub(r"</?(picture|source|p|div|a)\b[^>]*>\n?", "", text)
        text = re.sub(r"\[[^][]*\]\((?!https?:)[^)]*\)", "\0", text)
        sentence = r"(?:(?!\.\s|\n\n)[\s\S])*"
        start = r"(?:\A|(?<=\n\n)|(?<=\.\s))"
        text = re.sub(rf"{start}(?={sentence}\0){sentence}\.?", "", text)
        parts[i] = re.sub(r"\n{3,}", "\n\n", text)
    return re.sub(r"^#+ [^\n]*\n+(?=#|\Z)", "", "".join(parts), flags=re.MULTILINE)


if __name__ == "__main__":
    setup(long_description=describe(Path(__file__).with_name("README.md").read_text("utf-8")))
