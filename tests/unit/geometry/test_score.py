"""score_layers end to end on a tiny backbone; reports, files, errors."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch

from dihal import ScoreReport, score_layers
from dihal.config import ScoreConfig
from dihal.errors import UsageError
from dihal.geometry import read_split
from tests.kit import tiny_backbone
from tests.unit.geometry.test_windows import documents

CONFIG = ScoreConfig(
    tokens=3000, sequence_length=48, batch_tokens=512, pool=1500, anchors=200, neighbours=16, bootstrap=200
)


def small(**changes) -> ScoreConfig:
    return dataclasses.replace(CONFIG, **changes)


@pytest.fixture(scope="module")
def report() -> ScoreReport:
    return score_layers(tiny_backbone(), documents(80), CONFIG)


def test_report_is_complete_and_consistent(report: ScoreReport) -> None:
    assert set(report.scores) == {"raw", "rms", "standardized"}
    assert report.candidates == (1, 2, 3)
    assert report.selected_split == report.coordinates["rms"].argmax
    for item in report.coordinates.values():
        assert [split.split for split in item.splits] == [0, 1, 2, 3]
        candidates = item.splits[1:]
        assert item.argmax == max(candidates, key=lambda split: split.score).split
        assert sum(split.argmax_probability for split in candidates) == pytest.approx(1)
        assert item.splits[0].argmax_probability is None
        assert item.resamples_used == CONFIG.bootstrap
        for split in item.splits:
            assert split.score == pytest.approx(split.z_curvature + split.z_stiffness - split.z_rank)
            for name in ("curvature", "stiffness", "rank", "score"):
                low, high = getattr(split, f"{name}_interval")
                assert low < high
                # the interval is about the value, not somewhere else
                assert low - (high - low) < getattr(split, name) < high + (high - low)
        for name in ("z_curvature", "z_stiffness", "z_rank"):
            values = torch.tensor([getattr(split, name) for split in candidates], dtype=torch.float64)
            assert float(values.mean()) == pytest.approx(0, abs=1e-9)
        assert set(item.rivals) == {"depth", "median_norm", "mean_cosine", "log_trace"}
    assert report.data["tokens"] == sum((report.layers[0].kept, report.layers[0].dropped_first))
    assert report.coordinates["standardized"].splits[2].mean_eigenvalue == pytest.approx(1)
    json.dumps(report.to_dict(), allow_nan=False)


def test_rms_and_standardized_ignore_scale_and_raw_shifts_by_two_log_a() -> None:
    # Split 0 is the embedding itself: a power of two scales its states exactly.
    plain, scaled = (tiny_backbone("llama", seed=2) for _ in range(2))
    with torch.no_grad():
        scaled.input_embedding.weight.mul_(4)
    one, two = (score_layers(backbone, documents(80), small(bootstrap=0)).coordinates for backbone in (plain, scaled))
    for name, shift in (("raw", -2 * math.log(4)), ("rms", 0.0), ("standardized", 0.0)):
        a, b = one[name].splits[0], two[name].splits[0]
        assert b.curvature - a.curvature == pytest.approx(shift, abs=1e-6)
        assert b.stiffness - a.stiffness == pytest.approx(shift, abs=1e-6)
        assert b.rank - a.rank == pytest.approx(0, abs=1e-6)


def test_chunk_size_and_document_order_leave_the_report(report: ScoreReport) -> None:
    for batch_tokens, order in ((48, 1), (4096, -1)):
        other = score_layers(tiny_backbone(), documents(80)[::order], small(batch_tokens=batch_tokens))
        assert other.selected_split == report.selected_split
        assert other.data == report.data
        for name, values in report.scores.items():
            assert other.scores[name] == pytest.approx(values, abs=1e-3)
            mine, theirs = (sorted(range(1, 4), key=lambda i: v[i]) for v in (values, other.scores[name]))
            assert mine == theirs


def test_same_seed_same_report_other_seed_other_intervals(report: ScoreReport) -> None:
    again = score_layers(tiny_backbone(), documents(80), CONFIG)
    assert {**again.to_dict(), "provenance": None} == {**report.to_dict(), "provenance": None}
    other = score_layers(tiny_backbone(), documents(80), small(seed=1))
    assert other.scores != report.scores


def test_options_change_what_they_name(report: ScoreReport) -> None:
    other = score_layers(
        tiny_backbone(),
        documents(80),
        small(stiffness="log_det", rank="participation", bootstrap=0, coordinates=("rms",)),
    )
    assert list(other.coordinates) == ["rms"]
    a, b = report.coordinates["rms"].splits[2], other.coordinates["rms"].splits[2]
    assert a.curvature == pytest.approx(b.curvature, abs=1e-6)
    assert b.stiffness > a.stiffness
    assert b.rank < a.rank
    assert b.score_interval is None
    assert other.coordinates["rms"].argmax_interval is None
    assert "log det" in other.definitions["stiffness"]


def test_save_load_and_read_split(report: ScoreReport, tmp_path) -> None:
    folder = report.save(tmp_path / "scores")
    assert sorted(path.name for path in folder.iterdir()) == ["scores.json", "scores.png", "scores.svg"]
    assert ScoreReport.load(folder) == report
    assert ScoreReport.load(folder / "scores.json") == report
    assert read_split(folder) == read_split(folder / "scores.json") == report.selected_split
    assert (folder / "scores.png").read_bytes().startswith(b"\x89PNG")
    svg = (folder / "scores.svg").read_text()
    assert "</svg>" in svg
    assert "effective rank" in svg
    assert report.backbone["id"] in svg


def test_table_marks_the_selected_split_and_states_sinks_and_rivals(report: ScoreReport) -> None:
    from rich.console import Console

    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(report.table())
    text = console.export_text()
    assert f"> {report.selected_split} " in text
    assert "control" in text
    assert "sinks:" in text
    assert text.count("Spearman") == 3


def test_figure_without_intervals_and_in_one_kind_of_coordinates(tmp_path) -> None:
    report = score_layers(tiny_backbone(), documents(80), small(bootstrap=0, coordinates=("raw",), select_by="raw"))
    assert (report.save(tmp_path) / "scores.svg").stat().st_size > 5_000
    assert ScoreReport.load(tmp_path) == report


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no file"),
        ("{", "not valid JSON"),
        ("[]", "not a score record"),
        ('{"schema": "other"}', "not a score record"),
        ('{"schema": "dihal.scores/1"}', "no selected split|damaged"),
        ('{"schema": "dihal.scores/1", "selected_split": "3"}', "no selected split|damaged"),
    ],
)
def test_damaged_records_are_refused(tmp_path, content: str | None, message: str) -> None:
    path = tmp_path / "scores.json"
    if content is not None:
        path.write_text(content)
    for read in (read_split, ScoreReport.load):
        with pytest.raises(UsageError, match=message):
            read(path)


def test_a_folder_that_cannot_be_written_is_an_error(report: ScoreReport, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot write"):
        report.save(tmp_path / "file" / "scores")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"coordinates": ("raw", "rsm")}, "Did you mean 'rms'"),
        ({"coordinates": ("raw",)}, "not among"),
        ({"coordinates": ("rms", "rms")}, "twice"),
        ({"select_by": "angle"}, "unknown coordinates 'angle'"),
        ({"stiffness": "logdet"}, "Did you mean 'log_det'"),
        ({"rank": "entropie"}, "Did you mean 'entropy'"),
        ({"neighbours": 1500}, "fewer than pool"),
        ({"neighbours": 1}, "at least 2"),
        ({"pool": 5000, "neighbours": 4000}, "neighbours need at least 4001"),
        ({"tokens": 1}, "at least 2 tokens"),
        ({"sequence_length": 1}, "needs 2 tokens"),
        ({"batch_tokens": 0}, "positive"),
        ({"anchors": 0}, "positive"),
        ({"rho": -1.0}, "rho"),
        ({"norm_factor": 0.5}, "must exceed 1"),
        ({"bootstrap": -1}, "bootstrap"),
        ({"confidence": 95.0}, "between 0 and 1"),
    ],
)
def test_bad_options_say_what_to_do(changes: dict, message: str) -> None:
    config = small()
    for name, value in changes.items():  # past the run-time type check of the tests, as from untyped code
        object.__setattr__(config, name, value)
    with pytest.raises(UsageError, match=message):
        score_layers(tiny_backbone(), documents(80), config)


def test_windows_longer_than_learned_positions_are_refused() -> None:
    with pytest.raises(UsageError, match="exceeds the backbone's 1024 positions"):
        score_layers(tiny_backbone("gpt2"), documents(80), small(sequence_length=5000))


def test_one_document_has_no_interval() -> None:
    with pytest.raises(UsageError, match="bootstrap=0"):
        score_layers(tiny_backbone(), [list(range(3, 90)) * 3], CONFIG)
    assert score_layers(tiny_backbone(), [list(range(3, 90)) * 3], small(bootstrap=0)).data["documents"] == 1


def test_too_few_blocks_and_constant_states_are_refused() -> None:
    with pytest.raises(UsageError, match="at least 2 candidate splits"):
        score_layers(tiny_backbone(num_blocks=2), documents(80), CONFIG)
    with pytest.raises(UsageError, match="split 0 do not vary"):
        score_layers(tiny_backbone(), [[5] * 400, [5] * 300], CONFIG)


def test_everything_as_on_a_gpu_comes_to_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """The branches of a GPU, run here: half precision, block by block, rounded products, nothing solved for."""
    from dihal.geometry import layer, moments, neighbours, statistics, streaming, subspace, views

    config = ScoreConfig(
        tokens=9000, sequence_length=48, batch_tokens=1024, pool=1200, anchors=150, neighbours=16, bootstrap=0,
        rank="participation",
    )  # fmt: skip
    backbone = tiny_backbone(seed=3, hidden_size=96, dtype="bfloat16")
    plain = score_layers(backbone, documents(150), config)
    for module in (moments, statistics):
        monkeypatch.setattr(module, "native_half", lambda dtype, device: dtype == torch.bfloat16)
    for module in (moments, neighbours):
        monkeypatch.setattr(module, "half_product", lambda a, b: a.float() @ b.float())
    monkeypatch.setattr(streaming, "_block_by_block", lambda backbone: True)
    monkeypatch.setattr(neighbours, "_splits", lambda points: True)
    monkeypatch.setattr(neighbours, "_measured_on_cpu", neighbours._measured_on_gpu)
    monkeypatch.setattr(subspace, "_rounds", lambda device: True)
    monkeypatch.setattr(subspace, "_rough_product", lambda m, block: m.float() @ block.to(m.dtype).float())
    for module in (views, layer):
        monkeypatch.setattr(module, "WIDE", 64)
    found = score_layers(backbone, documents(150), config)
    for name, expected in plain.coordinates.items():
        for one, two in zip(expected.splits, found.coordinates[name].splits):
            # rms states are rounded to half precision before they are multiplied.
            assert two.curvature == pytest.approx(one.curvature, abs=1e-3)
            assert two.stiffness == pytest.approx(one.stiffness, abs=2e-3)
            assert two.rank == pytest.approx(one.rank, abs=2e-3)
    for one, two in zip(plain.layers, found.layers):
        assert (one.kept, one.dropped_first, one.dropped_norm) == (two.kept, two.dropped_first, two.dropped_norm)
        assert one.norm_threshold == two.norm_threshold
