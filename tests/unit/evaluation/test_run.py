"""Evaluation from checkpoints to files on a tiny backbone."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

from dihal.backbone import load_backbone
from dihal.checkpoint import load_checkpoint, save_checkpoint
from dihal.config import BackboneConfig, DataConfig, EvalConfig, LeaderboardConfig
from dihal.data.module import TextDataModule
from dihal.data.text import document_key
from dihal.errors import UsageError
from dihal.evaluation.bootstrap import document_weights
from dihal.evaluation.generation import Scorer, pick_prompts
from dihal.evaluation.inputs import open_backbone, open_text
from dihal.evaluation.leaderboard import leaderboard
from dihal.evaluation.measure import _Batches
from dihal.evaluation.ngram import NgramModel
from dihal.evaluation.result import read_result
from dihal.evaluation.rows import other_documents
from dihal.evaluation.run import evaluate
from dihal.restore import restore_method
from tests.unit.evaluation.kit import LENGTH, backbone_folder, make_run, text_file, train_config


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIHAL_CACHE", str(folder / "cache"))
        make_run(folder, "bridge", steps=60)
        make_run(folder, "regression", steps=30, split=1, method="regression")
        yield folder


@pytest.fixture(scope="module")
def config(root):
    return EvalConfig(
        windows_per_document=None,
        checkpoints=(str(root / "bridge"), str(root / "regression")),
        tokens=700,
        batch_size=4,
        steps=(1, 3),
        samples=3,
        prompt_tokens=8,
        new_tokens=10,
        bootstrap=200,
        out=str(root / "out"),
    )


@pytest.fixture(scope="module")
def results(config):
    return {result.name: result for result in map(read_result, evaluate(config))}


def value(result, metric: str, steps: int = 0):
    return result.metrics[str(steps)][metric].value


def test_every_row_is_there(results):
    names = ("identity", "embedding", "mean-state", "untrained", "oracle", "shuffled", "random-suffix")
    controls = {f"{name}@{split}" for name in names for split in (1, 2)}
    counted = {"unigram", "bigram", "trigram"}
    assert set(results) == controls | counted | {"backbone", "real-text", "bridge", "regression"}
    assert set(results["bridge"].metrics) == {"1", "3"}
    assert set(results["regression"].metrics) == {"1"}, "a regression has one step"


def test_identity_equals_the_backbone_exactly(results):
    for split in (1, 2):
        found = results[f"identity@{split}"]
        assert value(found, "kl") == 0
        assert value(found, "agreement") == 1
        assert value(found, "explained_variance") == 1
        assert value(found, "cosine") == 1
        assert value(found, "sink_error") == 0
        assert value(found, "nll") == value(results["backbone"], "nll")
    assert results["backbone"].details["own_forward_max_logit_difference"] == 0


def test_training_helped(results):
    assert value(results["bridge"], "kl", 1) < value(results["mean-state@2"], "kl")
    assert (
        value(results["bridge"], "explained_variance", 1)
        > value(results["untrained@2"], "explained_variance", 1) + 0.05
    )
    assert value(results["regression"], "kl", 1) < value(results["mean-state@1"], "kl")


def test_the_oracle_has_the_checkpoints_error(results):
    for name, split in (("bridge", 2), ("regression", 1)):
        oracle, trained = results[f"oracle@{split}"], results[name]
        assert set(oracle.metrics) == {"1"}
        for metric in ("state_error", "sink_error"):
            assert value(oracle, metric, 1) == pytest.approx(value(trained, metric, 1), rel=0.01)
        assert oracle.per_document["1"]["state_squared_error"] == pytest.approx(
            trained.per_document["1"]["state_squared_error"], rel=0.01
        ), "document by document"
        assert value(oracle, "kl", 1) > 0
        assert value(oracle, "kl", 1) != pytest.approx(value(trained, "kl", 1), rel=1e-3)


def test_another_documents_condition_is_worse_than_the_own(results):
    for name, split in (("bridge", 2), ("regression", 1)):
        shuffled = results[f"shuffled@{split}"]
        assert value(shuffled, "kl", 1) > 1.1 * value(results[name], "kl", 1)
        assert value(shuffled, "state_error", 1) > max(1.0, value(results[name], "state_error", 1))


def test_a_random_suffix_loses_the_tokens_although_the_states_are_true(results):
    for split in (1, 2):
        found = results[f"random-suffix@{split}"]
        assert value(found, "explained_variance") == 1
        assert value(found, "sink_error") == 0
        assert value(found, "kl") > value(results["bridge"], "kl", 1)
        assert value(results[f"identity@{split}"], "kl") == 0, "the weights were put back"


def test_ngrams_are_measured_and_write_text(root, results):
    config = train_config(root)
    backbone = load_backbone(config.backbone.id, device="cpu")
    data = TextDataModule(
        config.data,
        tokenizer=backbone.tokenizer,
        tokenizer_fingerprint=backbone.tokenizer_fingerprint,
        start_token_id=backbone.start_token_id,
        end_token_id=backbone.end_token_id,
    )
    windows = data.evaluation_windows(tokens=700, seed=0)
    for name, order in (("bigram", 2), ("trigram", 3)):
        text = data.train_tokens
        model = NgramModel.fit(text.tokens, order=order, vocab=backbone.vocab_size, ends=text.ends)
        nll = count = 0.0
        for row in range(len(windows)):
            ids = windows.input_ids[row, : int(windows.attention_mask[row].sum())].tolist()
            for at in range(1, len(ids)):
                context = [-1] * order + ids[:at]
                nll -= float(model.log_probabilities(torch.tensor([context[1 - order :]]))[0, ids[at]])
                count += 1
        assert value(results[name], "nll") == pytest.approx(nll / count, rel=1e-5)
        assert value(results[name], "explained_variance") is None
        assert results[name].kind == "control"
        written = results[name].text["0"]
        assert (written.samples, written.new_tokens) == (3, 10)
    order = [value(results[name], "nll") for name in ("trigram", "bigram", "unigram")]
    assert order == sorted(order), "the more context, the better"


def test_ngrams_are_counted_again_when_the_training_text_changes(root, tmp_path):
    backbone = BackboneConfig(id=str(root / "backbone"), device="cpu")
    lines = (root / "text.jsonl").read_text().splitlines()
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    data = DataConfig(source=str(tmp_path / "text.jsonl"), sequence_length=LENGTH, validation_fraction=0.4)
    options = fast(root, checkpoints=(), data=data, backbone=backbone, out=str(tmp_path / "out"), tokens=100_000)
    before = {path.stem: read_result(path) for path in evaluate(options)}
    held = before["backbone"].documents
    lines = [line for line in lines if _key(line) in held] + [line for line in lines if _key(line) not in held][:-8]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    after = {path.stem: read_result(path) for path in evaluate(options)}
    assert after["backbone"] == before["backbone"], "kept: its text is the same"
    for name in ("unigram", "bigram", "trigram"):
        assert value(after[name], "nll") != value(before[name], "nll")


def _key(line: str) -> str:
    return document_key(json.loads(line)["text"])


def test_controls_that_are_not_asked_for_are_left_out(root, results):
    files = evaluate(fast(root, controls=("oracle", "bigram"), out=str(root / "few")))
    assert {path.stem for path in files} == {"backbone", "identity@2", "oracle@2", "bigram", "bridge"}
    again = fast(root, controls=("bigram",), out=str(root / "few"))
    before = (root / "few" / "bridge.json").stat().st_mtime_ns
    evaluate(again)
    assert (root / "few" / "bridge.json").stat().st_mtime_ns == before, "other rows decide no numbers"


def test_two_checkpoints_of_one_split_have_an_oracle_each(root):
    make_run(root, "second", steps=5)
    both = (str(root / "bridge"), str(root / "second"))
    controls = ("untrained", "oracle", "shuffled")
    files = evaluate(fast(root, checkpoints=both, controls=controls, out=str(root / "both")))
    found = {result.name: result for result in map(read_result, files)}
    assert set(found) == {
        "backbone", "identity@2", "bridge", "second", "untrained@2",
        "oracle@2", "oracle@2 (second)", "shuffled@2", "shuffled@2 (second)",
    }  # fmt: skip
    for name, trained in (("oracle@2", "bridge"), ("oracle@2 (second)", "second")):
        assert value(found[name], "state_error", 1) == pytest.approx(value(found[trained], "state_error", 1), rel=0.01)
        assert trained in found[name].details["notes"][0]


def test_other_documents_are_other_documents_at_the_same_positions(root, config):
    checkpoint = load_checkpoint(root / "bridge")
    backbone = load_backbone(checkpoint.config.backbone.id, device="cpu")
    data = TextDataModule(
        checkpoint.config.data,
        tokenizer=backbone.tokenizer,
        tokenizer_fingerprint=backbone.tokenizer_fingerprint,
        start_token_id=backbone.start_token_id,
        end_token_id=backbone.end_token_id,
    )
    windows = data.evaluation_windows(tokens=700)
    other = other_documents(windows)
    lengths = windows.attention_mask.sum(-1)
    assert other.shape == windows.input_ids.shape
    used = set()
    for row in range(len(windows)):
        length = int(lengths[row])
        givers = [
            place
            for place in range(len(windows))
            if lengths[place] >= length and torch.equal(windows.input_ids[place, :length], other[row, :length])
        ]
        # A window of a few bytes may begin several documents.
        others = [place for place in givers if windows.document_ids[place, 0] != windows.document_ids[row, 0]]
        assert others, "a window of another document, long enough"
        used.update(others)
    assert len(used) > len(windows) / 2, "not all of one document"
    one = dataclasses.replace(windows, document_ids=torch.zeros_like(windows.document_ids))
    assert other_documents(one) is None
    # The longest window of all has nobody as long: the longest other text is repeated after its first token.
    short = dataclasses.replace(
        windows,
        input_ids=torch.tensor([[0, 11, 12, 13, 14, 15], [0, 21, 22, 1, 1, 1]]),
        attention_mask=torch.tensor([[True] * 6, [True] * 3 + [False] * 3]),
        document_ids=torch.tensor([[0] * 6, [1] * 3 + [-1] * 3]),
        loss_mask=torch.zeros(2, 6, dtype=torch.bool),
        predicted_bytes=torch.zeros(2, 6, dtype=torch.int64),
    )
    assert other_documents(short).tolist() == [[0, 21, 22, 21, 22, 21], [0, 11, 12, 1, 1, 1]]


def test_numbers_equal_a_direct_computation(root, config, results):
    """The whole pass, once more in fp64 from full logits, window by window."""
    checkpoint = load_checkpoint(root / "bridge")
    backbone = load_backbone(checkpoint.config.backbone.id, device="cpu")
    method, held = restore_method(checkpoint, backbone)
    assert held == "ema"
    data = TextDataModule(
        checkpoint.config.data,
        tokenizer=backbone.tokenizer,
        tokenizer_fingerprint=backbone.tokenizer_fingerprint,
        start_token_id=backbone.start_token_id,
        end_token_id=backbone.end_token_id,
    )
    windows = data.evaluation_windows(tokens=config.tokens, seed=config.seed)
    kl = nll = agree = count = 0.0
    truths, guesses = [], []
    for row in range(len(windows)):
        length = int(windows.attention_mask[row].sum())
        ids = windows.input_ids[row : row + 1, :length]
        log_p = backbone.forward(ids).detach().double().log_softmax(-1)[0, :-1]
        state = method.states(backbone, ids, steps=1, seed=config.seed, sample_ids=torch.tensor([row]))
        log_q = backbone.suffix(state, 2).detach().double().log_softmax(-1)[0, :-1]
        kl += float((log_p.exp() * (log_p - log_q)).sum())
        nll -= float(log_q.gather(-1, ids[0, 1:, None]).sum())
        agree += float((log_p.argmax(-1) == log_q.argmax(-1)).sum())
        count += length - 1
        truths.append(backbone.prefix(ids, 2).detach().double()[0, 1:])
        guesses.append(state.double()[0, 1:])
    truth, guess = torch.cat(truths), torch.cat(guesses)
    keep = truth.norm(dim=-1) <= 10 * truth.norm(dim=-1).median()
    truth, guess = truth[keep], guess[keep]
    bridge = results["bridge"]
    assert sum(bridge.per_document["1"]["tokens"]) == count
    assert value(bridge, "kl", 1) == pytest.approx(kl / count, rel=1e-4)
    assert value(bridge, "nll", 1) == pytest.approx(nll / count, rel=1e-5)
    assert value(bridge, "agreement", 1) == pytest.approx(agree / count, abs=1.5 / count)
    spread = (truth - truth.mean(0)).square().sum()
    explained = 1 - float((guess - truth).square().sum() / spread)
    assert value(bridge, "explained_variance", 1) == pytest.approx(explained, rel=1e-5)
    texts = {document.key: document.text for document in data.validation_documents}
    size = sum(len(texts[key].encode()) for key in bridge.documents)
    assert value(bridge, "bits_per_byte", 1) == pytest.approx(nll / np.log(2) / size, rel=1e-5)


def test_unigram_is_the_training_frequencies_plus_one(root, results):
    config = train_config(root)
    backbone = load_backbone(config.backbone.id, device="cpu")
    data = TextDataModule(
        config.data,
        tokenizer=backbone.tokenizer,
        tokenizer_fingerprint=backbone.tokenizer_fingerprint,
        start_token_id=backbone.start_token_id,
        end_token_id=backbone.end_token_id,
    )
    counts = np.bincount(data.train_tokens.tokens, minlength=backbone.vocab_size) + 1.0
    windows = data.evaluation_windows(tokens=700, seed=0)
    targets = windows.input_ids[:, 1:][windows.loss_mask[:, :-1]].numpy()
    assert value(results["unigram"], "nll") == pytest.approx(-np.log(counts / counts.sum())[targets].mean(), rel=1e-5)
    assert value(results["unigram"], "explained_variance") is None


def test_differences_are_paired_against_the_reference(results):
    bridge, backbone = results["bridge"], results["backbone"]
    found = bridge.metrics["1"]["nll"]
    assert found.difference == pytest.approx(found.value - value(backbone, "nll"))
    weights = document_weights(len(bridge.documents), bridge.bootstrap, bridge.bootstrap_seed)
    tables = [
        {k: np.array(v) for k, v in block.items()} for block in (bridge.per_document["1"], backbone.per_document["0"])
    ]
    own, other = (weights @ table["nll"] / (weights @ table["tokens"]) for table in tables)
    assert found.difference_low == pytest.approx(np.quantile(own - other, 0.025))
    assert found.high == pytest.approx(np.quantile(own, 0.975))
    assert backbone.metrics["0"]["nll"].difference == 0
    assert bridge.documents == backbone.documents


def test_generation_has_fixed_length_and_is_self_graded(results):
    for name, steps in (("backbone", {"0"}), ("bridge", {"1", "3"}), ("unigram", {"0"}), ("real-text", {"0"})):
        assert set(results[name].text) == steps
        for found in results[name].text.values():
            assert (found.samples, found.new_tokens, found.scored_tokens) == (3, 10, 30)
            assert found.self_graded
            assert len(found.texts) == 3
            assert found.generative_perplexity == pytest.approx(np.exp(found.generative_nll))
    assert results["real-text"].text["0"].tokens_per_second is None
    for name in ("identity@2", "oracle@2", "shuffled@2", "random-suffix@2"):
        assert results[name].text == {}
    assert results["backbone"].text["0"].generative_nll < results["unigram"].text["0"].generative_nll


def test_costs_and_origin(results):
    bridge = results["bridge"]
    assert bridge.cost.diffused_tokens == load_checkpoint(bridge.checkpoint["path"]).state["tokens"]
    assert bridge.cost.nfe == {"1": 1, "3": 3}
    assert bridge.cost.trainable_parameters > 0
    assert bridge.cost.frozen_parameters < results["backbone"].cost.frozen_parameters
    assert bridge.comparable.budget is not None
    assert results["backbone"].comparable.budget is None
    assert bridge.comparable.sequence_length == LENGTH
    assert set(bridge.provenance) >= {"commit", "dirty", "versions", "hardware", "command", "time"}
    assert bridge.config["data"]["source"].endswith("text.jsonl"), "the resolved data, not null"


def test_the_leaderboard_of_it(config, results):
    table = leaderboard(LeaderboardConfig(results=(config.out,), out=config.out))
    assert table.row_count == len(results)


def test_batches_do_not_change_results(root, config, results):
    again = dataclasses.replace(
        config, batch_size=1, samples=0, out=str(root / "one"), checkpoints=config.checkpoints[:1]
    )
    found = {result.name: result for result in map(read_result, evaluate(again))}
    for steps in (1, 3):
        for metric in ("kl", "nll", "explained_variance"):
            assert value(found["bridge"], metric, steps) == pytest.approx(
                value(results["bridge"], metric, steps), rel=1e-4
            )
    for name in ("oracle@2", "shuffled@2"):
        assert value(found[name], "kl", 1) == pytest.approx(value(results[name], "kl", 1), rel=1e-3), name


def test_a_batch_knows_the_documents_begun_before_it(root):
    """Their positions are added one by one, so that sums do not depend on where batches are cut."""
    checkpoint = load_checkpoint(root / "bridge")
    backbone = load_backbone(checkpoint.config.backbone.id, device="cpu")
    windows = open_text(checkpoint.config.data, backbone, progress=False).evaluation_windows(tokens=700)
    batches, seen, split = _Batches(backbone, windows, 3), set(), 0
    for number in range(len(batches)):
        batch = batches[number]
        assert batch.begun == len(seen)
        found = set(batch.real_documents.tolist())
        split += bool(found & seen)
        seen |= found
    assert seen == set(range(len(windows.documents)))
    assert split > 1, "documents that go on from batch to batch"


def test_finished_rows_are_kept_and_missing_ones_made_again(root, config, results, monkeypatch):
    from pathlib import Path

    folder = Path(config.out)
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.json")}
    (folder / "mean-state@2.json").unlink()
    (folder / "unigram.json").write_text("{")  # a damaged file is measured again, not trusted
    evaluate(config)
    after = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.json")}
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed == {"mean-state@2.json", "unigram.json"}
    again = read_result(folder / "mean-state@2.json")
    assert again.metrics == results["mean-state@2"].metrics
    # Another option that decides numbers: everything is measured again.
    evaluate(dataclasses.replace(config, seed=1, samples=0))
    assert all(path.stat().st_mtime_ns != after[path.name] for path in folder.glob("bridge.json"))


def fast(root, **changes) -> EvalConfig:
    base = EvalConfig(
        checkpoints=(str(root / "bridge"),), tokens=200, steps=(1,), samples=0, bootstrap=20, out=str(root / "fast")
    )
    return dataclasses.replace(base, **changes)


def test_no_checkpoint_measures_the_bounds(root):
    data = DataConfig(source=str(root / "text.jsonl"), sequence_length=LENGTH, validation_fraction=0.4)
    backbone = BackboneConfig(id=str(root / "backbone"), device="cpu")
    files = evaluate(fast(root, checkpoints=(), data=data, backbone=backbone, out=str(root / "bounds")))
    assert [path.stem for path in files] == ["backbone", "unigram", "bigram", "trigram"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": ()}, "steps must name"),
        ({"steps": (0,)}, "steps must name"),
        ({"tokens": 0}, "tokens must be at least 1"),
        ({"confidence": 1.0}, "confidence must lie"),
        ({"temperature": -0.5}, "must not be negative"),
        ({"scorer": "gpt2"}, "samples is 0"),
        ({"reference": "backbon"}, "Did you mean 'backbone'"),
        ({"samples": 50, "prompt_tokens": 20, "new_tokens": 20}, "evaluation windows have 20 \\+ 20 tokens"),
    ],
)
def test_options_out_of_range(root, changes, message):
    folder = root / "refused" / "evaluation"
    with pytest.raises(UsageError, match=message):
        evaluate(fast(root, **changes, out=str(folder)))
    assert not folder.parent.exists(), "nothing is left behind"


def test_a_failed_evaluation_keeps_what_was_there(root, tmp_path):
    (tmp_path / "mine").mkdir()
    with pytest.raises(UsageError, match="Did you mean 'backbone'"):
        evaluate(fast(root, reference="backbon", out=str(tmp_path / "mine" / "out")))
    assert [path.name for path in tmp_path.rglob("*")] == ["mine"]


def test_the_same_checkpoint_twice(root):
    with pytest.raises(UsageError, match="named twice"):
        evaluate(fast(root, checkpoints=(str(root / "bridge"), str(root / "bridge"))))


def test_another_backbone_is_refused_by_field(root):
    other = backbone_folder(root / "other-backbone", seed=5)
    with pytest.raises(UsageError, match="fingerprint"):
        evaluate(fast(root, backbone=BackboneConfig(id=str(other), device="cpu")))
    family = backbone_folder(root / "gpt2-backbone", family="gpt2")
    with pytest.raises(UsageError, match="family 'llama'"):
        evaluate(fast(root, backbone=BackboneConfig(id=str(family), device="cpu")))


def test_one_gpu_is_not_for_several_processes():
    with pytest.raises(UsageError, match=r"device=cuda:1 names one GPU.*Set backbone\.device=auto"):
        open_backbone(BackboneConfig(device="cuda:1"), [], device="cuda:0")


def test_another_tokenizer_is_refused(root, tmp_path):
    import shutil

    copy = tmp_path / "backbone"
    shutil.copytree(root / "backbone", copy)
    rules = json.loads((copy / "tokenizer.json").read_text())
    vocab = rules["model"]["vocab"]
    first, second = sorted(vocab, key=vocab.get)[40:42]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (copy / "tokenizer.json").write_text(json.dumps(rules))
    with pytest.raises(UsageError, match="tokenizer_fingerprint"):
        evaluate(fast(root, backbone=BackboneConfig(id=str(copy), device="cpu")))


def edited_checkpoint(root, name: str, **manifest):
    """A copy of the bridge's checkpoint whose manifest says something else (validly sealed)."""
    checkpoint = load_checkpoint(root / "bridge")
    extra = {k: v for k, v in checkpoint.manifest.items() if k not in ("format", "files", "aliases", "sha256")}
    save_checkpoint(
        root / name,
        tensors={"model": checkpoint.tensors("model")},
        state=checkpoint.state,
        config=checkpoint.raw_config,
        manifest_extra={**extra, **manifest},
    )
    return root / name


@pytest.mark.parametrize(
    ("field", "manifest"),
    [
        ("tokenizer_fingerprint", {"tokenizer_fingerprint": "other"}),
        ("data_fingerprint.validation", {"data_fingerprint": {"train": "a", "validation": "b"}}),
    ],
)
def test_checkpoints_that_cannot_share_a_table(root, field, manifest):
    other = edited_checkpoint(root, f"edited-{field}", **manifest)
    with pytest.raises(UsageError, match=f"differ in {field}"):
        evaluate(fast(root, checkpoints=(str(root / "bridge"), str(other))))


def test_text_that_changed_since_training_is_refused(root):
    other = edited_checkpoint(root, "changed", data_fingerprint={"train": "a", "validation": "b"})
    with pytest.raises(UsageError, match="the text changed since"):
        evaluate(fast(root, checkpoints=(str(other),)))


def test_validation_text_that_was_trained_on_is_refused(root):
    data = DataConfig(source=str(root / "text.jsonl"), sequence_length=LENGTH, validation_fraction=0.9)
    with pytest.raises(UsageError, match="were training documents"):
        evaluate(fast(root, data=data))


def test_other_unseen_text_is_measured(root):
    text_file(root / "other.jsonl", seed=9)
    data = DataConfig(source=str(root / "other.jsonl"), sequence_length=LENGTH, validation_fraction=0.5)
    files = evaluate(fast(root, data=data, out=str(root / "unseen")))
    assert value(read_result(files[1]), "kl") == 0


def test_a_checkpoint_without_an_average_is_measured_raw(root):
    other = edited_checkpoint(root, "raw")
    files = {path.stem: path for path in evaluate(fast(root, checkpoints=(str(other),), out=str(root / "raw-out")))}
    assert read_result(files["raw"]).checkpoint["weights"] == "raw"


def test_adapters_act_in_their_own_row_only(root, results):
    make_run(root, "adapted", steps=10, lora=2)
    options = fast(root, checkpoints=(str(root / "adapted"),), samples=1, prompt_tokens=8, new_tokens=4)
    files = evaluate(dataclasses.replace(options, out=str(root / "adapted-out")))
    found = {result.name: result for result in map(read_result, files)}
    assert value(found["identity@2"], "kl") == 0
    error = value(found["adapted"], "state_error", 1)
    assert value(found["oracle@2"], "state_error", 1) == pytest.approx(error, rel=0.01)
    assert value(found["mean-state@2"], "kl") == value(found["untrained@2"], "kl", 1), "its adapters are off, or zero"
    assert found["backbone"].comparable.backbone_fingerprint == results["backbone"].comparable.backbone_fingerprint
    checkpoint = load_checkpoint(root / "adapted")
    backbone = load_backbone(checkpoint.config.backbone.id, device="cpu")
    method, _ = restore_method(checkpoint, backbone)
    ids = torch.arange(5, 25).unsqueeze(0)
    state = method.states(backbone, ids)
    with method.reading():
        adapted = backbone.suffix(state, 2)
    assert not torch.equal(adapted, backbone.suffix(state, 2)), "the adapters learned something"


def test_unwritable_output(root, tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(UsageError, match="cannot write to the output folder"):
        evaluate(fast(root, out=str(tmp_path / "taken")))


def test_a_scorer_with_other_tokens_scores_the_same_text(root):
    """Retokenised, each new token is scored once; a scorer of another family is not self-graded."""
    from tests.kit import tiny_backbone

    writer, scorer = tiny_backbone(vocab=270), tiny_backbone("gpt2", vocab=120, seed=3)
    judge = Scorer(scorer, writer)
    assert not judge.self_graded
    assert Scorer(writer, writer).self_graded
    prompt = torch.tensor([[0, *writer.tokenizer("abc def", add_special_tokens=False).input_ids]])
    new = torch.tensor([writer.tokenizer(" ghi.", add_special_tokens=False).input_ids])
    total, count = judge.nll(prompt, new)
    assert count == 5, "one byte a token in both"
    ids = torch.tensor([[0, *scorer.tokenizer("abc def ghi.", add_special_tokens=False).input_ids]])
    log_q = scorer.forward(ids).detach().double().log_softmax(-1)[0, :-1]
    wanted = -log_q.gather(-1, ids[0, 1:, None])[-5:].sum()
    assert total == pytest.approx(float(wanted), rel=1e-5)


def test_prompts_take_one_window_per_document_first(root, config):
    checkpoint = load_checkpoint(root / "bridge")
    backbone = load_backbone(checkpoint.config.backbone.id, device="cpu")
    data = TextDataModule(
        checkpoint.config.data,
        tokenizer=backbone.tokenizer,
        tokenizer_fingerprint=backbone.tokenizer_fingerprint,
        start_token_id=backbone.start_token_id,
        end_token_id=backbone.end_token_id,
    )
    windows = data.evaluation_windows(tokens=700)
    prompts = pick_prompts(windows, samples=3, prompt_tokens=8, new_tokens=10)
    assert prompts.prompts.shape == (3, 8)
    assert prompts.real.shape == (3, 10)
    assert (prompts.prompts[:, 0] == backbone.start_token_id).all()
    whole = torch.cat([prompts.prompts, prompts.real], dim=1).tolist()
    texts = {document.key: backbone.tokenizer(document.text).input_ids for document in data.validation_documents}
    starts = [texts[document.key][:17] for document in windows.documents]
    assert sum(row[1:] in starts for row in whole) == 3, "the beginnings of three documents"
    assert len(set(map(tuple, whole))) == 3
