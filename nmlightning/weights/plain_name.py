"""The name of a parameter, whatever wraps the module that holds it."""

import re


def plain_name(name: str) -> str:
    """Return a parameter's name without what `torch.compile` or a parametrization add to it.

    >>> plain_name("_orig_mod.conv.parametrizations.weight.original1")
    'conv.weight'
    """
    name = re.sub(r"(^|\.)parametrizations\.(\w+)\.original\d*$", r"\1\2", name)
    return ".".join(part for part in name.split(".") if part != "_orig_mod")
