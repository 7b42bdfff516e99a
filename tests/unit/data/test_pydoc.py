from __future__ import annotations

import json

import pytest

from dihal.data import pydoc
from dihal.errors import UsageError


@pytest.fixture
def stdlib(tmp_path):
    """A small folder laid out like a standard library."""
    root = tmp_path / "lib"
    for name in ("test", "site-packages", "email"):
        (root / name).mkdir(parents=True)
    (root / "b.py").write_text('"""Module b."""\ndef f():\n    """Function f."""\n')
    (root / "a.py").write_text(
        'def first():\n    """One."""\nclass C:\n    """Two."""\n    async def m(self):\n        """Three."""\n'
    )
    (root / "email" / "__init__.py").write_text('"""Package."""\n')
    (root / "broken.py").write_text('"""Broken"""\ndef (:\n')
    (root / "code.py").write_text("x = 1\n")
    (root / "raises.py").write_text('"""Parsed only."""\nraise SystemExit\n')
    for name in ("test", "site-packages"):
        (root / name / "x.py").write_text('"""Not documentation."""\n')
    return root


def test_docstrings_in_source_order_one_document_per_module(stdlib):
    assert pydoc.stdlib_docstrings(stdlib) == [
        ("a", "One.\n\nTwo.\n\nThree."),
        ("b", "Module b.\n\nFunction f."),
        ("email", "Package."),
        ("raises", "Parsed only."),
    ]


def test_records_come_from_the_cache_the_second_time(stdlib):
    first = list(pydoc.pydoc_records(stdlib))
    (stdlib / "a.py").unlink()
    assert list(pydoc.pydoc_records(stdlib)) == first
    kinds = [record.fields["kind"] for record in first]
    assert kinds == sorted(kinds, reverse=True)
    assert kinds.count("docstrings") == 4
    assert kinds.count("topics") > 50


def test_damaged_cache_is_made_again(stdlib, private_cache):
    first = list(pydoc.pydoc_records(stdlib))
    (target,) = (private_cache / "pydoc").glob("*.json")
    whole = target.read_text()
    for damage in (whole[: len(whole) // 2], whole.replace("Package.", "Pachage."), json.dumps({"x": 1})):
        target.write_text(damage)
        with pytest.warns(UserWarning, match="damaged"):
            assert list(pydoc.pydoc_records(stdlib)) == first
        assert target.read_text() == whole


def test_interpreter_without_sources(tmp_path):
    with pytest.raises(UsageError, match="without the sources"):
        list(pydoc.pydoc_records(tmp_path))


def test_this_interpreters_documentation():
    records = list(pydoc.pydoc_records())
    size = sum(len(record.fields["text"].encode()) for record in records)
    assert 1_500_000 < size < 4_000_000
    modules = {record.fields["module"] for record in records if record.fields["kind"] == "docstrings"}
    assert {"json", "asyncio.base_events", "statistics"} <= modules
    assert not any(name.startswith(("test.", "idlelib", "site-packages")) for name in modules)
