"""Makes the description on an index's page of README.md; all else is in setup.cfg.

An index has no files beside the text: a picture becomes its caption, a relative link its words.
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
        parts[i] = re.sub(r"\[([^][]*)\]\((?!https?:)[^)]*\)", r"\1", text)
    return "".join(parts)


if __name__ == "__main__":
    setup(long_description=describe(Path(__file__).with_name("README.md").read_text("utf-8")))
