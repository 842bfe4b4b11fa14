"""Tensors to Parquet cells and back, the gate, the archive, and what the gate must stop."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
import threading
import time
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PhiConfig, PhiForCausalLM

from damage import damaged, flip_byte, set_values
from small_things import make_store, texts
from stillroom.config import ModelRef, Signals
from stillroom.data.encoding import encode
from stillroom.errors import UserError
from stillroom.files import read_json, write_json
from stillroom.folders import snapshots_of
from stillroom.models.hub import load_model, load_tokenizer
from stillroom.models.output_head import load_output_head
from stillroom.offline_teacher_data import (
    _to_numpy_array,
    _to_py,
    archive,
    capture,
    made_from,
    require_matching,
    require_verified,
    verify_saved_data,
)
from stillroom.offline_teacher_data.capturing import _Writers
from stillroom.offline_teacher_data.cells import cell_bytes, parquet_cell
from stillroom.offline_teacher_data.recomputation import check_with_head, recompute, sample_ids
from stillroom.offline_teacher_data.shards import token_batches
from stillroom.offline_teacher_data.store import SignalStore, columns_of, shard_entry, write_shard
from stillroom.signals import Layout, compute_signals
from stillroom.signals.next_token import distribution_error

LAYOUT = Layout(top_k=4, width=6, heads=2, dtype="float16", id_dtype="uint16")
DTYPES = {
    "float32": (torch.float32, "float32"),
    "float16": (torch.float16, "float16"),
    "bfloat16": (torch.bfloat16, "float32"),
    "int32": (torch.int32, "int32"),
    "uint16": (torch.int32, "uint16"),
    "bool": (torch.bool, "bool"),
}


@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("column", ["ids", "ends", "special", "topk_ids", "topk_logprobs", "hidden", "attention"])
def test_every_signal_survives_the_round_trip(column, tokens):
    """A cell gives back the tensor that went in: values, shape and dtype, for every column of the store."""
    kept = columns_of(LAYOUT)[column]
    dtype, shape = kept.dtype, kept.shape(tokens)
    torch.manual_seed(0)
    tensor = torch.randint(0, 2, shape) if dtype == "bool" else torch.randn(shape) * 100
    tensor = tensor.abs() if dtype == "uint16" else tensor
    expected = tensor.numpy().astype(dtype)
    array = _to_numpy_array(pa.scalar(_to_py(tensor, dtype), pa.large_binary()), dtype, shape)
    assert array.dtype == expected.dtype
    assert array.shape == shape
    assert (array == expected).all()


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_survives_the_round_trip(name):
    """Torch dtypes, bfloat16 among them, to numpy cells and back without loss."""
    torch_dtype, dtype = DTYPES[name]
    tensor = (torch.arange(12).reshape(3, 4) - (0 if name in ("uint16", "bool") else 5)).to(torch_dtype)
    array = _to_numpy_array(_to_py(tensor, dtype), dtype, (3, 4))
    assert (array == tensor.to(torch.float64).numpy().astype(dtype)).all()


def test_numpy_and_non_contiguous_tensors_are_taken_too():
    """Slices and transposes are written in C order."""
    tensor = torch.arange(12.0).reshape(3, 4).T
    assert (_to_numpy_array(_to_py(tensor, "float32"), "float32", (4, 3)) == tensor.numpy()).all()
    assert (_to_numpy_array(_to_py(tensor.numpy()[::2], "float16"), "float16", (2, 3)) == tensor.numpy()[::2]).all()


def test_cells_are_little_endian():
    """A store written on any machine reads the same on any other."""
    assert _to_py(torch.tensor([1], dtype=torch.int32), "int32") == b"\x01\x00\x00\x00"


def test_a_cell_of_the_wrong_size_is_an_error():
    """A ragged cell cannot be taken for a smaller tensor."""
    with pytest.raises(ValueError, match="holds 5 values"):
        _to_numpy_array(_to_py(torch.zeros(5), "float32"), "float32", (2, 3))


def test_a_parquet_cell_holds_the_bytes_of_its_values():
    """Written without a copy, the cell is the one `_to_py` gives, of slices, transposes and half floats too."""
    for value, dtype in (
        (torch.arange(12.0).reshape(3, 4).T, "float16"),
        (torch.arange(12.0).reshape(3, 4)[1:].half(), "float16"),
        (torch.arange(4).bfloat16(), "float32"),
    ):
        cell = parquet_cell(value, dtype)
        assert cell.type == pa.large_binary()
        assert cell.to_pylist() == [_to_py(value, dtype)]
        assert bytes(cell_bytes(cell)) == _to_py(value, dtype)
    cells = pa.array([b"one", None, b"three"], pa.large_binary())
    assert [bytes(cell_bytes(cells[n : n + 1])) for n in range(3)] == [b"one", b"", b"three"]


def test_attention_in_eight_bits_is_within_its_rounding(tmp_path, teacher_ref, examples, store):
    """√p is off by half a step of 1/255 at most, the cell is a byte a value, and gate and recomputation accept it."""
    small = make_store(tmp_path, teacher_ref, examples, attention_dtype="uint8_sqrt")
    assert small.manifest["layout"]["attention_dtype"] == "uint8_sqrt"
    assert small.manifest["fingerprint"] != store.manifest["fingerprint"]
    for example in examples.all[::9]:
        found, whole = (s.read(example.example_id) for s in (small, store))
        assert found["attention"].dtype == np.float32
        assert found["attention"].shape == whole["attention"].shape
        assert np.abs(np.sqrt(found["attention"]) - np.sqrt(whole["attention"])).max() <= 0.5 / 255 + 1e-6
        assert small.columns["attention"].bytes(len(found.encoding)) == whole["attention"].size
        assert (found["hidden"] == whole["hidden"]).all()
    recompute(small, load_model(teacher_ref), sample_ids(small, 3))


def test_the_store_holds_what_the_teacher_said(teacher_ref, examples, store):
    """Every example is there, read from disk as it was computed alone."""
    model, tokenizer = load_model(teacher_ref), load_tokenizer(teacher_ref)
    from stillroom.data.encoding import encode

    assert len(store) == len(examples.all)
    for example in examples.all[::7]:
        stored = store.read(example.example_id)
        alone = compute_signals(model, [encode(tokenizer, example.text)], store.layout, torch.float32)[0]
        assert stored.task == example.task
        assert (stored.encoding.ids == encode(tokenizer, example.text).ids).all()
        for name in ("topk_logprobs", "hidden", "attention"):
            assert np.allclose(stored[name], alone[name].numpy(), atol=2e-5), name


@pytest.fixture
def copy(tmp_path, store):
    """A copy of the store that a test may damage."""
    return shutil.copytree(store.path, tmp_path / "data")


def test_verify_passes_and_is_asked_for(copy):
    """A store is trained on only after it passed the gate, and only as it was then."""
    record = verify_saved_data(copy, num_samples=20)
    assert record["sampled"] == 20
    require_verified(SignalStore.open(copy))
    (copy / "verified.json").unlink()
    with pytest.raises(UserError, match="not been verified"):
        require_verified(SignalStore.open(copy))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_values("hidden", "float32", lambda a: a.__setitem__(3, np.nan)), "hidden has NaN"),
        (set_values("attention", "float32", lambda a: a.__setitem__(0, 0.5)), "attention rows sum to"),
        (set_values("topk_logprobs", "float32", lambda a: a.__setitem__(0, -50)), "not sorted"),
        (set_values("topk_logprobs", "float32", lambda a: a.__iadd__(3)), "top-k and tail sum to"),
        (set_values("topk_ids", "uint16", lambda a: a.__setitem__(1, a[0])), "ids repeat"),
        (set_values("ends", "int32", lambda a: a.__setitem__(-1, 0)), "ends decrease"),
        (lambda c: c.update(hidden=[cell[:-8] for cell in c["hidden"]]), "hidden: holds"),
        (lambda c: c.update(tokens=[n + 1 for n in c["tokens"]]), "needs"),
    ],
)
def test_wrong_values_are_found_and_named(copy, change, message):
    """A store whose checksums agree but whose values cannot be a teacher's is refused at the file and example."""
    damaged(copy, change)
    with pytest.raises(UserError, match=rf"part-00000.parquet: example [0-9a-f]{{16}}: .*{message}"):
        verify_saved_data(copy, num_samples=1000)
    assert not (copy / "verified.json").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip_byte, "SHA-256 differs"),
        (lambda p: p.write_bytes(p.read_bytes()[:-100]), "truncated"),
        (lambda p: p.unlink(), "missing"),
    ],
)
def test_damaged_shards_are_found_and_named(copy, damage, message):
    """A flipped byte, a truncated and a missing shard."""
    damage(copy / "part-00002.parquet")
    with pytest.raises(UserError, match=rf"part-00002.parquet.*{message}"):
        verify_saved_data(copy)


def test_an_edited_manifest_is_found(copy):
    """What was verified is what is trained on."""
    manifest = read_json(copy / "manifest.json")
    manifest["layout"]["top_k"] = 5
    write_json(copy / "manifest.json", manifest)
    for use in (verify_saved_data, archive, SignalStore.open):
        with pytest.raises(UserError, match=r"manifest.json is not as it was written"):
            use(copy)


def test_a_store_made_anew_is_verified_anew(copy):
    """The record of one store does not stand for another in its place."""
    from stillroom.offline_teacher_data.store import write_manifest

    manifest = read_json(copy / "manifest.json")
    del manifest["digest"]
    write_manifest(copy, {**manifest, "created": "2020-01-01T00:00:00Z"})
    with pytest.raises(UserError, match="changed after verification"):
        require_verified(SignalStore.open(copy))


def rows_of(store, count):
    """Batches of one row each, as the teacher gives them."""
    for example in list(store)[:count]:
        arrays = {name: torch.tensor(array) for name, array in example.arrays.items()}
        yield [(example.example_id, example.task, example.encoding, arrays)]


def write_beside(batches, path, store):
    """One shard, by a thread of its own."""
    write_both({path: batches}, store)


def write_both(shards, store):
    """Shards one after the other, by threads of their own; what the manifest says of them."""
    with _Writers() as writers:
        for path, batches in shards.items():
            writers.write(batches, path, "x", store.layout, None)
    return writers.entries


def test_a_shard_is_written_while_the_next_batch_is_made(store, tmp_path):
    """The file is the one that is written row after row; a batch and its neighbours are in memory, no more."""
    batches = list(rows_of(store, 6))
    write_shard(tmp_path / "plain.parquet", "x", store.layout, (row for batch in batches for row in batch))
    write_beside(batches, tmp_path / "beside.parquet", store)
    plain, beside = (pq.read_table(tmp_path / f"{name}.parquet") for name in ("plain", "beside"))
    assert plain.equals(beside)


@pytest.mark.parametrize("failure", [KeyboardInterrupt, UserError])
def test_a_teacher_that_stops_in_a_shard_leaves_none_and_no_thread(store, tmp_path, failure):
    """Ctrl-C, or a value that is not finite, in the third batch."""
    threads = threading.active_count()

    def broken():
        yield from rows_of(store, 2)
        raise failure("in the third batch")

    with pytest.raises(failure, match="third batch"):
        write_beside(broken(), tmp_path / "part.parquet", store)
    assert not list(tmp_path.iterdir())
    assert threading.active_count() == threads


def test_a_shard_that_cannot_be_written_stops_the_teacher(store, tmp_path, monkeypatch):
    """A full disk is told at once, not when the teacher has read the rest."""
    made = []

    def full(path, fingerprint, layout, rows, answers=None):
        next(iter(rows))
        raise UserError("no space left")

    def batches():
        for batch in itertools.cycle(rows_of(store, 1)):
            made.append(batch)
            yield batch

    monkeypatch.setattr("stillroom.offline_teacher_data.capturing.write_shard", full)
    with pytest.raises(UserError, match="no space left"):
        write_beside(batches(), tmp_path / "part.parquet", store)
    assert len(made) < 10


def slow_disk(monkeypatch, flushed, error=None):
    """The first shard has all its rows, and is flushed when the event is set: well, or to an error."""

    def write(path, fingerprint, layout, rows, answers=None):
        if path.name != "first":
            return write_shard(path, fingerprint, layout, rows, answers)
        rows = list(rows)
        assert flushed.wait(timeout=600)
        if error:
            raise error
        return write_shard(path, fingerprint, layout, rows, answers)

    monkeypatch.setattr("stillroom.offline_teacher_data.capturing.write_shard", write)


def test_the_teacher_reads_on_while_a_shard_is_flushed(store, tmp_path, monkeypatch):
    """A disk that takes its time costs a GPU nothing; at the end both shards are whole, and read for the manifest."""
    flushed = threading.Event()
    slow_disk(monkeypatch, flushed)

    def second():
        yield from rows_of(store, 2)
        flushed.set()  # not reached before the first shard is whole, were it waited for

    entries = write_both({tmp_path / "first": rows_of(store, 3), tmp_path / "second": second()}, store)
    assert entries == {name: shard_entry(tmp_path / name) for name in ("first", "second")}
    assert [len(pq.read_table(tmp_path / name)) for name in ("first", "second")] == [3, 2]


def test_an_interruption_leaves_the_shard_before_it_whole(store, tmp_path, monkeypatch):
    """Its rows were all computed; only the shard that lacks some is lost."""
    flushed = threading.Event()
    slow_disk(monkeypatch, flushed)

    def second():
        yield from rows_of(store, 1)
        flushed.set()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_both({tmp_path / "first": rows_of(store, 3), tmp_path / "second": second()}, store)
    assert [path.name for path in tmp_path.iterdir()] == ["first"]
    assert len(pq.read_table(tmp_path / "first")) == 3


def test_a_shard_that_cannot_be_flushed_stops_the_next_one(store, tmp_path, monkeypatch):
    """The teacher is in the next shard by then; it does not read to its end."""
    flushed, made = threading.Event(), []
    slow_disk(monkeypatch, flushed, UserError("no space left"))

    def second():
        for batch in itertools.cycle(rows_of(store, 1)):
            made.append(batch)
            yield batch
            flushed.set()
            time.sleep(0.01)

    with pytest.raises(UserError, match="no space left"):
        write_both({tmp_path / "first": rows_of(store, 3), tmp_path / "second": second()}, store)
    assert len(made) < 1000
    assert not list(tmp_path.iterdir())


def test_a_store_of_something_else_is_refused_with_both_sides(store, examples):
    """The differing fields are shown side by side."""
    origin = {**store.manifest["made_from"], "top_k": 7, "teacher": "another"}
    with pytest.raises(UserError) as error:
        require_matching(store, origin)
    assert "top_k: store has 32, study asks for 7" in str(error.value)
    assert "teacher: store has" in str(error.value)
    assert "corpus:" not in str(error.value)


def test_the_archive_is_whole_read_only_and_made_once(copy):
    """The snapshot keeps its values when the store goes; archiving again gives the same one."""
    verify_saved_data(copy)
    snapshot = archive(copy)
    assert snapshot.name.startswith("data_20")
    assert archive(copy) == snapshot
    assert all(p.stat().st_mode & 0o222 == 0 for p in [snapshot, *snapshot.rglob("*")])
    shutil.rmtree(copy)
    assert verify_saved_data(snapshot)["sampled"] == 20
    require_verified(SignalStore.open(snapshot))


def test_an_unverified_store_is_not_archived(copy):
    """The gate stands before the archive."""
    (copy / "verified.json").unlink()
    with pytest.raises(UserError, match="verify"):
        archive(copy)


def test_capture_goes_on_where_it_stopped(tmp_path, teacher_ref, examples, store, monkeypatch):
    """Finished shards are kept, the rest is computed, and the store equals an uninterrupted one, value for value."""
    import stillroom.offline_teacher_data.capturing as otd

    tokenizer, model = load_tokenizer(teacher_ref), load_model(teacher_ref)
    signals = Signals(top_k=32, dtype="float32", shard_examples=16, batch_tokens=512)
    origin = made_from(teacher_ref.model, "float32", tokenizer, signals, examples.all)
    calls, real = [], otd.begin_signals

    def failing(*args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(otd, "begin_signals", failing)
    with pytest.raises(KeyboardInterrupt):
        capture(model, tokenizer, examples.all, signals, tmp_path / "s", origin)
    kept = sorted(p.name for p in (tmp_path / "s").glob("*.parquet"))
    assert kept
    assert not (tmp_path / "s" / "manifest.json").exists()
    assert not list((tmp_path / "s").glob("*.tmp"))
    before, calls[:] = len(calls), [1] * 100
    capture(model, tokenizer, examples.all, signals, tmp_path / "s", origin)
    assert before + len(calls) - 100 < 2 * len(examples.all)
    resumed = SignalStore.open(tmp_path / "s")
    for entry, other in zip(resumed.manifest["shards"], store.manifest["shards"], strict=True):
        assert entry["sha256"] == other["sha256"]


def test_another_capture_in_the_same_folder_is_refused(tmp_path, teacher_ref, examples):
    """Half of one store and half of another never mix."""
    tokenizer, model = load_tokenizer(teacher_ref), load_model(teacher_ref)
    signals = Signals(top_k=8, dtype="float32")
    origin = made_from(teacher_ref.model, "float32", tokenizer, signals, examples.all)
    write_json(tmp_path / "capture.json", {**origin, "top_k": 16})
    with pytest.raises(UserError, match="top_k: store has 16, study asks for 8"):
        capture(model, tokenizer, examples.all, signals, tmp_path, origin)


def test_k_beyond_the_vocabulary_is_refused(tmp_path, teacher_ref, examples):
    """More entries than there are ids is a mistake, said before work starts."""
    with pytest.raises(UserError, match=r"signals.top_k: 100000 exceeds"):
        make_store(tmp_path / "s", teacher_ref, examples, top_k=100_000)


def test_too_small_a_disk_is_said_before_work_starts(tmp_path, teacher_ref, examples, monkeypatch):
    """Free space is compared with the plan."""
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(UserError, match=r"[GM]B are free.*OFFLINE_DATA_PATH"):
        make_store(tmp_path / "s", teacher_ref, examples)


def test_float16_halves_the_store_and_passes_the_gate(tmp_path, teacher_ref, examples, store):
    """The default storage dtype, through the whole gate."""
    half = make_store(tmp_path / "s", teacher_ref, examples, dtype="float16")
    sizes = [sum(s["bytes"] for s in one.manifest["shards"]) for one in (half, store)]
    assert sizes[0] < 0.65 * sizes[1]


def test_the_default_path_follows_variable_drive_and_folder(monkeypatch):
    """OFFLINE_DATA_PATH, else D: on a Windows machine that has it, else the working folder."""
    from pathlib import Path

    from stillroom.config import default_store_path

    assert default_store_path({"OFFLINE_DATA_PATH": "/somewhere"}) == Path("/somewhere")
    assert default_store_path({}, "posix") == Path("offline_teacher_data")
    monkeypatch.setattr(Path, "exists", lambda self: str(self).startswith("D:"))
    assert str(default_store_path({}, "nt")) == "D:\\offline_teacher_data"


@pytest.mark.parametrize("name", ["[a]*?", "it's", "a b#%é"])
def test_a_store_may_have_any_name(tmp_path, store, name):
    """A pattern in it made a new snapshot each time, and training then found none."""
    path = shutil.copytree(store.path, tmp_path / name)
    verify_saved_data(path)
    snapshot = archive(path)
    assert archive(path) == snapshot
    assert snapshots_of(path) == [snapshot]
    for other in (f"{name}_b", f"{name}_results", f"{name}_2026"):  # names that people give
        (tmp_path / other).mkdir()
    assert snapshots_of(path) == [snapshot]
    (tmp_path / "a*").mkdir()
    assert snapshots_of(tmp_path / "a*") == []


def test_a_snapshot_that_has_lost_its_record_gets_it_back(copy):
    """Training said verify, verify said that all was verified, and archiving sent back to the first."""
    verify_saved_data(copy)
    snapshot = archive(copy)
    snapshot.chmod(0o755)
    (snapshot / "verified.json").unlink()
    snapshot.chmod(0o555)
    with pytest.raises(UserError, match="stillroom verify"):
        require_verified(SignalStore.open(snapshot))
    assert archive(copy) == snapshot
    require_verified(SignalStore.open(snapshot))
    assert all(p.stat().st_mode & 0o222 == 0 for p in [snapshot, *snapshot.rglob("*")])


def test_a_snapshot_of_another_user_is_read_as_it_is(copy, monkeypatch):
    """Its files cannot be made read-only by who may only read them: a traceback after the gate had passed."""
    verify_saved_data(copy)
    snapshot = archive(copy)

    def refuse(*_, **__):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("pathlib.Path.chmod", refuse)
    assert archive(copy) == snapshot
    (copy.parent / "moved").symlink_to(snapshot)
    monkeypatch.undo()
    snapshot.chmod(0o755)
    (snapshot / "verified.json").unlink()
    snapshot.chmod(0o555)
    monkeypatch.setattr("pathlib.Path.chmod", refuse)
    with pytest.raises(UserError, match="let its owner run `stillroom verify`"):
        archive(copy)


def test_the_gate_takes_a_biased_head_and_a_tie_at_the_edge_of_the_top_k(tmp_path, byte_level, examples):
    """A Phi-like head's bias was left out, and a swap of two nearly equal ids was another teacher's store."""
    size = {"vocab_size": len(byte_level), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    biased = PhiForCausalLM(PhiConfig(intermediate_size=64, max_position_embeddings=512, **size)).eval()
    torch.nn.init.normal_(biased.lm_head.bias, std=0.5)
    tied = LlamaForCausalLM(LlamaConfig(intermediate_size=48, tie_word_embeddings=False, **size)).eval()
    with torch.no_grad():
        tied.lm_head.weight.mul_(0)
        tied.lm_head.weight[:40] += torch.randn(1, 32) + 1e-4 * torch.randn(40, 32)
    for name, model in {"biased": biased, "tied": tied}.items():
        model.save_pretrained(tmp_path / name)
        byte_level.save_pretrained(tmp_path / name)
        ref = ModelRef(model=str(tmp_path / name))
        store = make_store(tmp_path / f"{name} store", ref, examples, top_k=8, dtype="float16")
        ids = list(store.index)[:12]
        assert check_with_head(store, load_output_head(ref), ids, torch.float32)["topk"] < 2e-3
        assert recompute(store, load_model(ref), ids)["topk"] < 2e-3
    other = dataclasses.replace(load_output_head(ref), weight=torch.randn(len(byte_level), 32))
    with pytest.raises(UserError, match="not this teacher's"):
        check_with_head(store, other, ids, torch.float32)


def test_ids_that_are_not_the_most_probable_are_found(store, teacher_ref):
    """Their own probabilities may be right: one left out must not be more probable than one that is kept."""
    example_id = next(iter(store.index))
    stored, head = store.read(example_id), load_output_head(teacher_ref)
    logits = head.logits(torch.tensor(stored["hidden"]))
    logprobs = logits.double().log_softmax(-1)
    worst = (-logits).topk(32, dim=-1).indices
    tail = logprobs.scatter(1, worst, -torch.inf).logsumexp(-1)
    wrong = {
        "topk_ids": worst.numpy(),
        "topk_logprobs": logprobs.gather(1, worst).numpy(),
        "tail_logprobs": tail.numpy(),
    }
    assert distribution_error(stored.arrays, logits) < 1e-4
    assert distribution_error(wrong, logits) > 0.1


def test_recomputation_finds_a_store_of_another_teacher(tmp_path, teacher_ref, student_ref, store, examples):
    """The teacher run again gives the stored values; another model, or another head, does not."""
    from stillroom.models.output_head import load_output_head
    from stillroom.offline_teacher_data.recomputation import check_with_head, recompute, sample_ids

    ids = sample_ids(store, 5)
    assert max(recompute(store, load_model(teacher_ref), ids).values()) < 1e-4
    head = load_output_head(teacher_ref)
    assert check_with_head(store, head, ids, torch.float32)["topk"] < 1e-4
    noisy = replace(head, weight=head.weight + 0.2 * torch.randn_like(head.weight))
    with pytest.raises(UserError, match="not this teacher's"):
        check_with_head(store, noisy, ids, torch.float32)
    other = load_model(teacher_ref)
    with torch.no_grad():
        other.model.layers[0].mlp.down_proj.weight.mul_(1.5)
    with pytest.raises(UserError, match=r"part-\d+.parquet: example [0-9a-f]{16}: stored (topk|hidden) differs"):
        recompute(store, other, ids)


def test_a_teachers_batch_stays_within_its_budget(byte_level):
    """Padding included; a single example that exceeds it runs alone."""
    encodings = sorted((encode(byte_level, text) for text in texts(20)), key=len, reverse=True)
    rows, budget = range(len(encodings)), 3 * len(encodings[len(encodings) // 2])
    batches = list(token_batches(rows, encodings, budget))
    assert [i for batch in batches for i in batch] == list(rows)
    assert all(len(batch) * len(encodings[batch[0]]) <= budget for batch in batches if len(batch) > 1)
    assert max(map(len, batches)) > 1


def test_the_teachers_mean_square_leaves_its_bos_out(tmp_path, student_ref, examples):
    """BOS has a hidden state of another size, and none is compared there; this teacher has one."""
    store = make_store(tmp_path / "s", student_ref, examples)
    assert all(example.encoding.special.any() for example in store)
    stored = np.concatenate([e["hidden"][~e.encoding.special].ravel() for e in store]).astype(np.float64)
    assert store.hidden_mean_square == pytest.approx(np.mean(stored**2), rel=1e-6)


def test_a_shard_truncated_after_the_gate_is_missed_before_training(copy):
    """Sizes are looked at again where the record of the gate is: that costs nothing."""
    shard = copy / "part-00002.parquet"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"part-00002.parquet is missing or truncated"):
        require_verified(SignalStore.open(copy))


def test_a_field_that_one_side_has_not_is_a_difference(store):
    """A store made before a setting existed was not made with it; nor one that has a setting nobody asks for."""
    origin = store.manifest["made_from"]
    with pytest.raises(UserError, match="shift: store has None, study asks for 1"):
        require_matching(store, {**origin, "shift": 1})
    with pytest.raises(UserError, match="top_k: store has 32, study asks for None"):
        require_matching(store, {k: v for k, v in origin.items() if k != "top_k"})


@pytest.mark.parametrize(
    ("column", "signal", "change"),
    [
        ("hidden", "hidden", lambda a: a.__imul__(1.1)),
        ("attention", "attention", lambda a: a.__imul__(0.9)),
        ("topk_logprobs", "topk", lambda a: a[:32].__isub__(2.0)),  # the first token alone
    ],
)
def test_recomputation_looks_at_every_signal_and_every_token(copy, teacher_ref, column, signal, change):
    """One token's wrong distribution is not averaged away, and no signal stands for the others."""
    damaged(copy, set_values(column, "float32", change))
    store = SignalStore.open(copy)
    with pytest.raises(UserError, match=rf"part-00000.parquet: .* stored {signal} differs"):
        recompute(store, load_model(teacher_ref), store.manifest["shards"][0]["examples"][:3])


def test_a_shard_whose_column_has_another_name_is_one_message(store, tmp_path):
    """A store that was changed after it was verified: the shard and the column are named."""
    copy = shutil.copytree(store.path, tmp_path / "copy")
    changed = SignalStore.open(copy)
    first, (name, _) = next(iter(changed.index.items()))
    table = pq.read_table(copy / name)
    renamed = table.rename_columns(["other" if c == "hidden" else c for c in table.column_names])
    pq.write_table(renamed, copy / name, row_group_size=1)
    with pytest.raises(UserError, match=rf"{name}: example {first}: .*hidden.* capture again"):
        changed.read(first)


def test_a_store_without_its_tokenizer_is_not_verified(tmp_path, store, teacher_ref, examples):
    """It would be archived, and no trial could read it; another capture writes what is gone."""
    path = shutil.copytree(store.path, tmp_path / "s")
    (path / "tokenizer" / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="tokenizer"):
        verify_saved_data(path)
    assert not (path / "verified.json").exists()
    shutil.rmtree(path / "tokenizer")
    with pytest.raises(UserError, match="tokenizer"):
        verify_saved_data(path)
    make_store(path, teacher_ref, examples)
    verify_saved_data(path)
