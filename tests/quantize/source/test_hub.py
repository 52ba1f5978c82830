"""A source on the hub: the real client against a local server that cuts connections."""

import time

import huggingface_hub.constants
import pytest

from helpers.convert import SHARD_BYTES, Hub, contents, kill_when, make_source, start
from moebox.errors import CheckpointError
from moebox.offload.checkpoint.layout import load_manifest
from moebox.quantize.convert import quantize
from moebox.quantize.dryrun import plan
from moebox.quantize.source.hub import parse_hub_id

REPO = "org/tiny"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_source(tmp_path_factory.mktemp("served") / "fp8")


@pytest.fixture(scope="module")
def expected(source, tmp_path_factory):
    """The output of the same model from a folder, without the manifest, which names its source."""
    dst = tmp_path_factory.mktemp("reference") / "out"
    quantize(source, dst, shard_bytes=SHARD_BYTES)
    return output_of(dst)


def output_of(dst):
    return {
        name: sha
        for name, sha in contents(dst).items()
        if name != "moebox.json" and not name.startswith("source/")
    }


@pytest.fixture
def hub(source, monkeypatch, tmp_path):
    server = Hub(source, REPO)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(
        huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 8192
    )  # default 10 MB; a cut connection loses one
    yield server
    server.close()


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("moonshotai/Kimi-K2-Instruct", ("moonshotai/Kimi-K2-Instruct", None)),
        ("hf://moonshotai/Kimi-K2.5@abc", ("moonshotai/Kimi-K2.5", "abc")),
        ("./org/model", None),
        ("/data/model", None),
        ("model", None),
        ("a/b/c", None),
    ],
)
def test_hub_ids_are_told_from_paths(text, parsed):
    assert parse_hub_id(text) == parsed


def test_malformed_hub_id():
    with pytest.raises(CheckpointError, match="hf://nobody: not a hub id"):
        parse_hub_id("hf://nobody")


@pytest.mark.slow
def test_source_stays_and_cut_connections_are_resumed(hub, source, expected, tmp_path):
    shards = sorted(path.name for path in source.glob("*.safetensors"))
    hub.drop_after = {name: [40_000, 90_000] for name in shards[:2]}
    dst = tmp_path / "out"
    quantize(REPO, dst, shard_bytes=SHARD_BYTES)
    assert output_of(dst) == expected
    manifest = load_manifest(dst)
    assert manifest.source["name"] == REPO
    assert manifest.source["revision"] == hub.sha
    assert set(manifest.source["files"]) == set(shards)
    resumed = [int(r.split("=")[1].split("-")[0]) for _, path, r in hub.requests if shards[0] in path and r]
    assert any(begin >= 16_384 for begin in resumed)
    kept = {path.name for path in (dst / "source").glob("*.safetensors")}
    assert kept == set(shards)
    assert not list((dst / "source").glob("*.part"))
    assert not any("README" in path or path.endswith(".py") for _, path, _ in hub.requests)


@pytest.mark.slow
def test_delete_source_never_holds_the_whole_source(hub, source, expected, tmp_path):
    dst, held = tmp_path / "out", []

    def progress(report) -> None:
        held.append(len(list((dst / "source").glob("*.safetensors*"))))

    quantize(f"hf://{REPO}", dst, shard_bytes=SHARD_BYTES, delete_source=True, progress=progress)
    assert output_of(dst) == expected
    assert not (dst / "source").exists()
    assert 0 < max(held) < len(list(source.glob("*.safetensors")))


@pytest.mark.slow
def test_killed_while_fetching_resumes_the_partial_file_at_the_pinned_commit(source, expected, tmp_path):
    hub = Hub(source, REPO)
    hub.bytes_per_s = 800_000
    dst = tmp_path / "out"
    setup = "import huggingface_hub.constants as c"
    setup += f"; c.ENDPOINT = {hub.url!r}; c.HF_HUB_CACHE = {str(tmp_path / 'cache')!r}"
    setup += (
        f"; c.HUGGINGFACE_CO_URL_TEMPLATE = {hub.url!r} + '/{{repo_id}}/resolve/{{revision}}/{{filename}}'"
    )
    setup += "; c.DOWNLOAD_CHUNK_SIZE = 8192"

    def far_enough() -> bool:
        parts = list((dst / "source").glob("*.part"))
        done = list((dst / "source").glob("*.safetensors"))
        return bool(done) and any(part.stat().st_size > 60_000 for part in parts)

    assert kill_when(start(REPO, dst, setup=setup), far_enough)
    parts = {p.name.removesuffix(".part"): p.stat().st_size for p in (dst / "source").glob("*.part")}
    complete = {path.name for path in (dst / "source").glob("*.safetensors")}
    hub.requests.clear()
    hub.bytes_per_s = None
    hub.info = None  # a request for the branch's commit would fail
    child = start(REPO, dst, setup=setup)
    errors = child.wait()
    assert child.returncode == 0, errors
    assert output_of(dst) == expected
    bodies = [(path.rpartition("/")[2], r) for method, path, r in hub.requests if method == "GET"]
    for name, size in parts.items():
        assert (name, f"bytes={size}-") in bodies
    assert not [name for name, _ in bodies if name in complete]
    hub.close()


@pytest.mark.slow
def test_a_partial_file_of_other_content_is_noticed(hub, source, tmp_path):
    dst = tmp_path / "out"
    (dst / ".moebox").mkdir(parents=True)
    (dst / "source").mkdir()
    first = sorted(source.glob("*.safetensors"))[0]
    (dst / "source" / f"{first.name}.part").write_bytes(b"x" * 1000)
    with pytest.raises(CheckpointError, match="SHA-256"):
        quantize(REPO, dst, shard_bytes=SHARD_BYTES)
    assert quantize(REPO, dst, shard_bytes=SHARD_BYTES).shards > 1


@pytest.mark.slow
def test_token_is_sent(hub, expected, tmp_path, monkeypatch):
    hub.token = "hf_secret"
    with pytest.raises(CheckpointError, match="no such model on the hub"):
        quantize(REPO, tmp_path / "out", shard_bytes=SHARD_BYTES)
    assert not (tmp_path / "out").exists()
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    quantize(REPO, tmp_path / "out", shard_bytes=SHARD_BYTES, delete_source=True)
    assert output_of(tmp_path / "out") == expected


def test_offline(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(CheckpointError, match="the hub cannot be reached"):
        quantize(REPO, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_unknown_model_and_revision(hub, tmp_path):
    with pytest.raises(CheckpointError, match="no such model on the hub, and no such folder"):
        quantize("org/other", tmp_path / "out")


def test_shard_missing_on_the_hub(source, tmp_path, monkeypatch, request):
    served = make_source(tmp_path / "served")
    missing = sorted(served.glob("*.safetensors"))[1]
    missing.unlink()
    hub = Hub(served, REPO)
    request.addfinalizer(hub.close)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    with pytest.raises(CheckpointError, match=f"{missing.name}: named in the index, missing on the hub"):
        quantize(REPO, tmp_path / "out")


@pytest.mark.slow
def test_plan_fetches_headers_only(hub, source, tmp_path):
    report = plan(REPO, tmp_path / "out", shard_bytes=SHARD_BYTES)
    assert report.source_bytes == sum(path.stat().st_size for path in source.glob("*.safetensors"))
    assert any("network: not measured" in line for line in report.arithmetic)
    assert not (tmp_path / "out").exists()
    shard_requests = [r for _, path, r in hub.requests if path.endswith(".safetensors")]
    assert shard_requests and all(shard_requests)


@pytest.mark.slow
def test_interrupted_fetch_ends_soon(source, tmp_path, hub):
    hub.bytes_per_s = 100_000
    begin = time.monotonic()

    def progress(report) -> None:
        if report.fetched_bytes or report.stage == "fetch":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(REPO, tmp_path / "out", shard_bytes=SHARD_BYTES, progress=progress)
    assert time.monotonic() - begin < 10
    assert not list((tmp_path / "out").glob("*.safetensors"))
