"""A model's files: whole ones pass, and each kind of damage fails with its message."""

import shutil

import pytest

from helpers.convert import make_source
from helpers.paths import TINY_K2
from helpers.runtime import make_checkpoint
from moebox.instruments.doctor.checks import checkpoint as checks
from moebox.offload.checkpoint.safetensors import Checkpoint
from moebox.quantize.convert import quantize


def silent(_text):
    pass


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_source(folder / "source")
    quantize(folder / "source", folder / "model")
    return folder / "model"


@pytest.fixture
def model(original, tmp_path):
    shutil.copytree(original, tmp_path / "model")
    return tmp_path / "model"


def shard(folder):
    return sorted(folder.glob("*.safetensors"))[0]


def test_a_whole_model_passes(model):
    check, checkpoint = checks.files(model)
    assert check.status == "pass"
    experts = checks.experts(checkpoint)
    assert experts.status == "pass"
    assert experts.figures["in_one_read"] == experts.figures["experts"] > 0
    deep = checks.checksums(checkpoint, True, silent)
    assert deep.status == "pass"


def test_checksums_are_compared_on_request_only(model):
    path = shard(model)
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    check, checkpoint = checks.files(model)
    assert check.status == "pass"
    quick = checks.checksums(checkpoint, False, silent)
    assert (quick.status, "--deep" in quick.fix) == ("skip", True)
    told = []
    deep = checks.checksums(checkpoint, True, told.append)
    assert deep.status == "fail"
    assert path.name in deep.seen
    assert told


def test_a_truncated_shard_fails(model):
    path = shard(model)
    path.write_bytes(path.read_bytes()[:-1])
    check, checkpoint = checks.files(model)
    assert (check.status, checkpoint) == ("fail", None)
    assert str(path) in check.seen
    assert check.fix


def test_a_missing_shard_fails(model):
    shard(model).unlink()
    check, _ = checks.files(model)
    assert check.status == "fail"


def test_a_shard_of_another_conversion_fails(model):
    manifest = model / "moebox.json"
    size = shard(model).stat().st_size
    manifest.write_text(manifest.read_text().replace(f'"size": {size}', f'"size": {size + 1}', 1))
    check, _ = checks.files(model)
    assert check.status == "fail"
    assert str(size) in check.seen


def test_a_missing_folder_fails(tmp_path):
    check, _ = checks.files(tmp_path / "nowhere")
    assert check.status == "fail"
    assert "nowhere" in check.seen


def test_an_unfinished_conversion_fails_with_the_command_that_resumes_it(model):
    (model / "moebox.json").unlink()
    (model / ".moebox").mkdir()
    (model / ".moebox/journal.jsonl").touch()
    check, _ = checks.files(model)
    assert check.status == "fail"
    assert "unfinished" in check.seen
    assert "moebox quantize" in check.fix


def test_shards_may_lie_in_a_store(model, tmp_path):
    store = tmp_path / "store"
    store.mkdir()
    shutil.move(shard(model), store)
    assert checks.files(model)[0].status == "fail"
    check, checkpoint = checks.files(model, [store])
    assert check.status == "pass"
    assert checks.experts(checkpoint).status == "pass"


def test_an_unquantized_model_fails_with_the_command_that_quantizes_it(tmp_path):
    source = make_source(tmp_path / "source")
    check, checkpoint = checks.files(source)
    assert check.status == "pass"
    experts = checks.experts(checkpoint)
    assert experts.status == "fail"
    assert "moebox quantize" in experts.fix
    assert checks.checksums(checkpoint, True, silent).status == "skip"


def test_a_layout_with_six_reads_an_expert_is_a_warning(tmp_path):
    experts = checks.experts(Checkpoint.open(make_checkpoint(tmp_path / "native")))
    assert experts.status == "warn"
    assert "moebox quantize" in experts.fix


def test_tokenizer_and_template(model):
    assert checks.tokenizer(Checkpoint.open(TINY_K2)).status == "pass"
    broken = checks.tokenizer(Checkpoint.open(model))  # its tokenizer file is a stub
    assert broken.status == "fail"
    assert broken.seen
    (model / "tiktoken.model").unlink()
    assert checks.tokenizer(Checkpoint.open(model)).status == "warn"
