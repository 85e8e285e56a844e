"""Fills a template in: `python render.py FILE NAME=VALUE … -- COMMAND ARGUMENT …` → stdout.

`$NAME` in the file becomes the value, `$COMMAND` the words after `--` as a JSON list, which is a
YAML list too, with every `$` doubled as Kubernetes wants it. A name without a value, and a value
without a name, are errors. Needs Python 3.11.
"""

import json
import pathlib
import string
import sys


def render(text: str, values: dict[str, str], command: list[str]) -> str:
    template = string.Template(text)
    # Whatever is in a value stays one YAML string; a number stays a number.
    quoted = {k: v if v.isdecimal() else json.dumps(v) for k, v in values.items()}
    quoted["COMMAND"] = json.dumps(command, ensure_ascii=False).replace("$", "$$")
    unknown = quoted.keys() ^ set(template.get_identifiers())
    if unknown:
        raise SystemExit(f"render.py: only in the template or only given: {sorted(unknown)}")
    return template.substitute(quoted)


if __name__ == "__main__":
    _, file, *rest = sys.argv
    split = rest.index("--")
    given = dict(pair.split("=", 1) for pair in rest[:split])
    sys.stdout.write(render(pathlib.Path(file).read_text(), given, rest[split + 1 :]))
