"""Every command, target and file that the README names exists."""

from __future__ import annotations

import contextlib
import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from dihal.cli import COMMANDS
from dihal.config.cli import parse
from dihal.errors import UsageError

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
SHELL = {"bash", "sh", "shell", "console"}
LAUNCHERS = {"train.py": "train", "evaluate.py": "evaluate"}


def readme() -> str:
    return README.read_text(encoding="utf-8") if README.exists() else ""


def blocks(text: str) -> Iterator[tuple[str, str]]:
    """(language, content) of fenced blocks."""
    for match in re.finditer(r"^ {0,3}```([^\n`]*)\n(.*?)^ {0,3}```", text, re.DOTALL | re.MULTILINE):
        yield match[1].strip().split(" ")[0], match[2]


def shell_commands(text: str) -> Iterator[list[str]]:
    """Words of every simple command in shell blocks; continued lines joined, comments and variables in front dropped."""
    for language, content in blocks(text):
        if language not in SHELL:
            continue
        for line in content.replace("\\\n", " ").splitlines():
            lexer = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars=True)
            lexer.whitespace_split = True
            command: list[str] = []
            for word in [*lexer, ";"]:
                if set(word) <= set("();<>|&"):
                    if command:
                        yield command
                    command = []
                elif command or not re.match(r"[A-Za-z_]\w*=", word):
                    command.append(word)


def dihal_command(words: list[str]) -> tuple[str, list[str]] | None:
    """(command, options) of `dihal COMMAND`, `python train.py` and `torchrun ... train.py`; None: another program."""
    program = words[0].rpartition("/")[2]
    if program == "dihal":
        return words[1] if len(words) > 1 else "", words[2:]
    if program in ("torchrun", "srun") or program.startswith("python"):
        for number, word in enumerate(words[1:], start=1):
            if word in LAUNCHERS:
                return LAUNCHERS[word], words[number + 1 :]
            if word == "dihal":
                return words[number + 1], words[number + 2 :]
    return None


def check(command: str, options: list[str]) -> None:
    if command in ("--help", "--version"):
        return
    if command not in COMMANDS and options:  # a command of a group, such as `circuits run`
        command, options = f"{command} {options[0]}", options[1:]
    assert command in COMMANDS, f"no command {command!r}"
    # --help and --print_config leave
    with contextlib.suppress(SystemExit):
        parse(COMMANDS[command].config, options, prog=f"dihal {command}")


COMMAND_LINES = [words for words in shell_commands(readme()) if dihal_command(words)]


def test_there_is_a_readme_with_commands() -> None:
    assert README.exists()
    assert {dihal_command(words)[0] for words in COMMAND_LINES} >= {"score", "train", "evaluate", "leaderboard"}


@pytest.mark.parametrize("words", COMMAND_LINES, ids=" ".join)
def test_command_parses(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    check(*dihal_command(words))


def make_targets(text: str) -> set[str]:
    named = {word for words in shell_commands(text) if words[0] == "make" for word in words[1:] if "=" not in word}
    return {word for word in named if not word.startswith("-")} | set(re.findall(r"`make ([\w-]+)", text))


def test_make_targets_exist() -> None:
    known = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert make_targets(readme()) <= known
    assert make_targets(readme()) >= {"demo", "test"}


# -- the annotated tree ------------------------------------------------------------------------------------------------

_LINE = re.compile(r"^(?P<lead>[\s│├└─|`]*)(?P<names>\S+(?:,? \S+)*?)(?:\s{2,}|\s*#|$)")


def tree(content: str) -> Iterator[str]:
    """Paths of an annotated tree: a name, two spaces or `#`, a remark; children are indented, by blanks or box lines.

    Several names on a line are separated by commas or blanks; `{a,b}` stands for both.
    """
    above: list[tuple[int, str]] = []
    for line in content.splitlines():
        match = _LINE.match(line)
        if not match or set(match["names"]) <= {".", "…"}:
            continue
        depth = len(match["lead"])
        while above and above[-1][0] >= depth:
            above.pop()
        parent = above[-1][1] if above else ""
        if parent and (not parent.endswith("/") or depth > above[-1][0] + 8):
            continue  # the remark goes on
        for name in _expanded(match["names"]):
            yield parent + name
        above.append((depth, parent + _expanded(match["names"])[0]))


def _expanded(names: str) -> list[str]:
    found = []
    for name in re.findall(r"(?:[^\s,{]|\{[^}]*\})+", names):
        braces = re.fullmatch(r"(.*)\{([^}]*)\}(.*)", name)
        parts = [braces[1] + part.strip() + braces[3] for part in braces[2].split(",")] if braces else [name]
        found += parts
    return found


def trees(text: str) -> list[str]:
    return [
        body for language, body in blocks(text) if language in ("", "text") and re.search(r"^\W*dihal/", body, re.M)
    ]


def missing(paths: Iterator[str], repository: Path) -> list[str]:
    return [path for path in paths if not list(repository.glob(path.removeprefix("dihal.git/").rstrip("/")))]


def test_the_annotated_tree_names_files_that_exist() -> None:
    assert len(trees(readme())) == 1
    paths = list(tree(trees(readme())[0]))
    assert len(paths) > 20
    assert not missing(iter(paths), ROOT)


def test_local_links_exist() -> None:
    links = re.findall(r"\]\(([^)#\s]+)", readme()) + re.findall(r"""(?:src|href)="([^"#]+)""", readme())
    assert not [link for link in links if not re.match(r"\w+:", link) and not (ROOT / link).exists()]


# -- the checks find what they are for ---------------------------------------------------------------------------------

FENCE = "`" * 3


def test_an_unknown_option_is_found() -> None:
    text = f"{FENCE}bash\nCUDA_VISIBLE_DEVICES=0 dihal train --method.split 3 \\\n  --optim.lrr 1 && make demo  # why\n{FENCE}\n"
    (first, second) = shell_commands(text)
    assert first == ["dihal", "train", "--method.split", "3", "--optim.lrr", "1"]
    assert second == ["make", "demo"]
    with pytest.raises(UsageError, match=r"optim\.lrr"):
        check(*dihal_command(first))


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("torchrun --nproc-per-node 8 train.py --config a.yaml", ("train", ["--config", "a.yaml"])),
        ("python evaluate.py seed=1", ("evaluate", ["seed=1"])),
        (".venv/bin/dihal score --out x", ("score", ["--out", "x"])),
        ("pip install -e .", None),
    ],
)
def test_commands_are_recognised(line: str, found: object) -> None:
    assert dihal_command(line.split()) == found


def test_a_missing_file_is_found() -> None:
    text = (
        "train.py          launcher\ndihal/            the package\n  methods.py      parts meet\n"
        "                  and more about it\n  nn/             network\n    block.py, layers.py   parts\n"
        "  nosuch.py       gone\nconfigs/{run,nosuch}/   deltas\n"
    )
    assert missing(tree(text), ROOT) == ["dihal/nosuch.py", "configs/nosuch/"]
    boxes = "├── dihal/        # the package\n│   ├── types.py   # notation\n│   └── nosuch.py\n└── LICENSE\n"
    assert missing(tree(boxes), ROOT) == ["dihal/nosuch.py"]


def test_result_tables_are_what_the_result_files_say() -> None:
    spec = importlib.util.spec_from_file_location("readme_tables", ROOT / "benchmarks" / "readme.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert module.filled(text) == text
    assert "| 0.029 [0.027, 0.032] |" in text  # the pattern still finds its tables
