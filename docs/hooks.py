"""What the build of the documentation needs beside mkdocs.yml: a hook of mkdocs, an extension of mkdocstrings."""

import re
from typing import Any

import griffe


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """Links from the notebook to other pages; those of Markdown pages mkdocs has already checked and converted."""
    return re.sub(r'href="([\w/]+)\.md(#[^"]*)?"', r'href="\1.html\2"', html)


class ArgumentLists(griffe.Extension):
    """Docstrings whose lines begin with `parameter:` get the heading that the parser looks for."""

    def on_function_instance(self, *, func: griffe.Function, **_: Any) -> None:
        if func.docstring:
            names = [re.escape(parameter.name) for parameter in func.parameters]
            start = re.compile(rf"({'|'.join(names) or '(?!)'}): ")
            func.docstring.value = "\n\n".join(
                "Args:\n" + re.sub("^", "    ", part, flags=re.M) if start.match(part) else part
                for part in func.docstring.value.split("\n\n")
            )
