import json
import shutil
import socket
from pathlib import Path

import pytest
from huggingface_hub import constants

from tests.checkpoints import GgufOptions, tiny_config, write_gguf_model
from tests.unit.store.conftest import point_to
from tests.unit.store.fake_hub import WRONGLY_KNOWN, FakeHub, Repo, serve
from thinslice.checkpoint.open import open_checkpoint
from thinslice.errors import CheckpointError, ConfigError, StoreError
from thinslice.plan.shape_from_config import shape_from_config
from thinslice.store import download
from thinslice.store.store import Store

SHARD = "model-00001-of-00002.safetensors"
GGUF = "tiny-Q8_0.gguf"
WANTED = {
    *("config.json", "generation_config.json", "model.safetensors.index.json", SHARD),
    *("model-00002-of-00002.safetensors", "tokenizer.json", "README.md", "LICENSE"),
}


@pytest.fixture
def no_retry(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first connection that breaks ends the pull."""
    monkeypatch.setattr(download, "_WAITS_S", ())


def files_in(store: Store, folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (store.root / folder).iterdir()}


def test_a_model_is_fetched_whole_and_nothing_else_of_its_repository(
    store: Store, hub: FakeHub
) -> None:
    model = store.pull("org/tiny")
    stored = files_in(store, "org--tiny")
    del stored["manifest.json"]
    repo = hub.repos["org/tiny"]
    assert stored == {name: repo.files[name] for name in WANTED}
    fetched = [request.path.rpartition("/")[2] for request in hub.requests[1:]]
    assert sorted(fetched) == sorted(WANTED), "each file is asked for once"
    assert open_checkpoint(model.path).kind == "safetensors"
    assert model.source == f"{hub.url}/org/tiny"
    assert (model.revision, model.licence) == (repo.commit, "mit")
    assert (model.architecture, model.context_length) == ("LlamaForCausalLM", 512)
    assert store.pull("org/tiny", offline=True) == model
    assert len(hub.requests) == 1 + len(WANTED)


def test_one_gguf_is_fetched_by_its_tag(store: Store, hub: FakeHub) -> None:
    model = store.pull("org/tiny@v1:q8_0")
    assert model.name == "org/tiny@v1:Q8_0"
    stored = set(files_in(store, "org--tiny@v1+Q8_0"))
    assert stored == {GGUF, "README.md", "LICENSE", "manifest.json"}
    assert model.path == store.root / "org--tiny@v1+Q8_0" / GGUF
    assert open_checkpoint(model.path).kind == "gguf"
    assert [stored.name for stored in store.list()] == ["org/tiny@v1:Q8_0"]
    with pytest.raises(ConfigError, match="there is org/tiny:Q4_K_M, org/tiny:Q8_0"):
        store.pull("org/tiny:Q2_K")
    assert not (store.root / "org--tiny+Q2_K").exists()


def test_steps_count_up_to_their_end(store: Store, hub: FakeHub) -> None:
    steps: dict[str, list[tuple[int, int]]] = {}
    store.pull(
        "org/tiny:Q8_0",
        lambda step, done, total: steps.setdefault(step, []).append((done, total)),
    )
    size = len(hub.repos["org/tiny"].files[GGUF])
    assert {f"downloading {GGUF}", f"checking {GGUF}"} <= set(steps)
    for step in steps.values():
        assert step == sorted(step)
        assert step[-1][0] == step[-1][1]
    assert steps[f"downloading {GGUF}"][-1] == (size, size)


def test_a_dropped_connection_is_taken_up_where_it_broke(store: Store, hub: FakeHub) -> None:
    content = hub.repos["org/tiny"].files[GGUF]
    hub.cuts[GGUF] = [1000, 5000]
    store.pull("org/tiny:Q8_0")
    requests = hub.requests_of(GGUF)
    assert [request.headers.get("range") for request in requests] == [
        *(None, "bytes=1000-", "bytes=6000-")
    ]
    assert sum(request.sent for request in requests) == len(content)
    assert files_in(store, "org--tiny+Q8_0")[GGUF] == content


def test_a_connection_that_brings_something_each_time_is_not_given_up(
    store: Store, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "_WAITS_S", (0.0,))
    hub.cuts[GGUF] = [100] * 5
    store.pull("org/tiny:Q8_0")
    assert len(hub.requests_of(GGUF)) == 6


@pytest.mark.usefixtures("no_retry")
def test_a_broken_off_pull_is_taken_up_by_the_next(store: Store, hub: FakeHub) -> None:
    content = hub.repos["org/tiny"].files[SHARD]
    hub.cuts[SHARD] = [1234]
    with pytest.raises(StoreError, match="a pull goes on where it stopped"):
        store.pull("org/tiny")
    assert [pull.name for pull in store.unfinished()] == ["org/tiny"]
    before = len(hub.requests)
    store.pull("org/tiny")
    asked = [request.path.rpartition("/")[2] for request in hub.requests[before:]]
    assert sorted(asked[1:]) == sorted([SHARD, "model-00002-of-00002.safetensors"])
    assert sum(request.sent for request in hub.requests_of(SHARD)) == len(content)
    assert set(files_in(store, "org--tiny")) == {*WANTED, "manifest.json"}


@pytest.mark.usefixtures("no_retry")
def test_a_server_without_ranges_sends_the_file_again(store: Store, hub: FakeHub) -> None:
    hub.has_ranges = False
    hub.cuts[GGUF] = [1234]
    with pytest.raises(StoreError):
        store.pull("org/tiny:Q8_0")
    store.pull("org/tiny:Q8_0")
    assert files_in(store, "org--tiny+Q8_0")[GGUF] == hub.repos["org/tiny"].files[GGUF]


@pytest.mark.usefixtures("no_retry")
def test_a_damaged_half_is_fetched_again(store: Store, hub: FakeHub) -> None:
    hub.cuts[GGUF] = [1234]
    with pytest.raises(StoreError):
        store.pull("org/tiny:Q8_0")
    (part,) = (store.root / "org--tiny+Q8_0").glob("*.part")
    part.write_bytes(b"x" * 1234)
    store.pull("org/tiny:Q8_0")
    assert files_in(store, "org--tiny+Q8_0")[GGUF] == hub.repos["org/tiny"].files[GGUF]


@pytest.mark.usefixtures("no_retry")
def test_a_new_commit_between_two_tries_is_fetched_whole(
    store: Store, hub: FakeHub, gguf_bytes: bytes
) -> None:
    hub.cuts[GGUF] = [1234]
    with pytest.raises(StoreError):
        store.pull("org/tiny:Q8_0")
    repo = hub.repos["org/tiny"]
    newer = repo.files[GGUF][:-4] + b"\0\0\0\0"
    changed = {GGUF: newer, "README.md": b"# tiny, again"}
    hub.repos["org/tiny"] = Repo(repo.files | changed, commit="b" * 40)
    model = store.pull("org/tiny:Q8_0")
    stored = files_in(store, "org--tiny+Q8_0")
    assert model.revision == "b" * 40
    assert [request.headers.get("range") for request in hub.requests_of(GGUF)] == [None, None]
    assert (stored[GGUF], stored["README.md"]) == (newer, b"# tiny, again")
    assert set(stored) == {GGUF, "README.md", "LICENSE", "manifest.json"}


@pytest.mark.parametrize("name", [GGUF, "README.md"])
def test_a_file_that_is_another_is_not_stored(store: Store, hub: FakeHub, name: str) -> None:
    content = hub.repos["org/tiny"].files[name]
    hub.altered[name] = bytes([content[0] ^ 1]) + content[1:]
    with pytest.raises(StoreError, match="another checksum than announced"):
        store.pull("org/tiny:Q8_0")
    assert store.list() == ()
    assert not (store.root / "org--tiny+Q8_0" / name).exists()
    hub.altered.clear()
    assert store.pull("org/tiny:Q8_0") == store.show("org/tiny:Q8_0")


@pytest.mark.usefixtures("no_retry")
@pytest.mark.parametrize(("change", "error"), [(b"more", "more than its"), (None, "ended after")])
def test_a_file_of_another_length_is_refused(
    store: Store, hub: FakeHub, change: bytes | None, error: str
) -> None:
    content = hub.repos["org/tiny"].files[GGUF]
    hub.altered[GGUF] = content[:-1] if change is None else content + change
    with pytest.raises(StoreError, match=error):
        store.pull("org/tiny:Q8_0")
    assert store.list() == ()


def test_the_token_goes_to_the_hub_and_not_where_it_redirects(
    store: Store, hub: FakeHub, repo_files: dict[str, bytes]
) -> None:
    with serve(FakeHub({"org/tiny": Repo(dict(repo_files))})) as cdn:
        hub.cdn = cdn.url
        store.pull("org/tiny")
    assert {request.headers["authorization"] for request in hub.requests} == {"Bearer hf_secret"}
    assert {request.path.rpartition(".")[2] for request in cdn.requests} == {"safetensors"}
    for request in cdn.requests:
        assert "hf_secret" not in json.dumps(request.headers)


def test_an_unsupported_model_is_refused_before_its_weights_and_not_kept(
    store: Store, hub: FakeHub
) -> None:
    files = hub.repos["org/tiny"].files
    files["config.json"] = json.dumps({"architectures": ["MambaForCausalLM"]}).encode()
    with pytest.raises(CheckpointError, match=r"MambaForCausalLM.? is not supported"):
        store.pull("org/tiny")
    assert hub.requests_of(".safetensors") == []
    assert not (store.root / "org--tiny").exists()


def test_a_gguf_that_does_not_open_is_not_listed(store: Store, hub: FakeHub) -> None:
    hub.repos["org/tiny"].files[GGUF] = b"no gguf at all" * 100
    with pytest.raises(CheckpointError, match="thinslice rm org/tiny:Q8_0"):
        store.pull("org/tiny:Q8_0")
    assert store.list() == ()
    assert [pull.name for pull in store.unfinished()] == ["org/tiny:Q8_0"]


def test_nothing_is_written_outside_the_models_folder(store: Store, hub: FakeHub) -> None:
    files = hub.repos["org/tiny"].files
    up = "../../../up-Q5_0.gguf"
    hub.repos["org/tiny"].files = files | {up: files[GGUF], "/tmp/x.gguf": b"x", "a\\b.gguf": b"x"}
    around = set(store.root.parent.rglob("*"))
    with pytest.raises(StoreError):
        store.pull("org/tiny:Q5_0")
    new = set(store.root.parent.rglob("*")) - around - {store.root}
    assert all(path.is_relative_to(store.root) for path in new)


def test_what_the_hub_refuses_says_what_would_work(store: Store, hub: FakeHub) -> None:
    with pytest.raises(StoreError, match="org/other is no folder here and no public model"):
        store.pull("org/other")
    with pytest.raises(StoreError, match="org/tiny has no revision 'v2'"):
        store.pull("org/tiny@v2")
    hub.repos["org/tiny"].is_gated = True
    with pytest.raises(StoreError, match="org/tiny is gated: accept its terms"):
        store.pull("org/tiny")
    hub.repos["org/tiny"].commit = "not a commit"
    with pytest.raises(StoreError, match="answered for another commit"):
        store.pull("org/tiny")
    hub.answer = b"<html>Log in to this network</html>"
    with pytest.raises(StoreError, match="does not answer as a Hub does"):
        store.pull("org/tiny")
    assert store.unfinished() == store.list() == ()


def test_a_pinned_commit_is_the_one_that_is_fetched(store: Store, hub: FakeHub) -> None:
    commit = hub.repos["org/tiny"].commit
    assert store.pull(f"org/tiny@{commit}:Q8_0").revision == commit
    with pytest.raises(StoreError, match="answered for another commit"):
        store.pull(f"org/tiny@{WRONGLY_KNOWN}:Q8_0")


def test_no_network_is_one_line(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))
        point_to(f"http://127.0.0.1:{unheard.getsockname()[1]}", monkeypatch)
        with pytest.raises(StoreError, match=r"cannot reach http://127.0.0.1:\d+ for org/tiny"):
            store.pull("org/tiny")
    assert store.unfinished() == ()


def test_offline_uses_no_network(
    store: Store, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StoreError, match="but not offline"):
        store.ensure("org/tiny", offline=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(StoreError, match="HF_HUB_OFFLINE is set"):
        store.pull("org/tiny")
    assert hub.requests == []


def test_a_disk_that_is_too_small_is_refused_before_the_weights(
    store: Store, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage("/")._replace(free=20_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(StoreError, match=r"needs .* KiB more, 19.53 KiB free"):
        store.pull("org/tiny")
    assert hub.requests_of(".safetensors") == []


def test_a_licence_of_its_own_is_called_by_its_name(store: Store, hub: FakeHub) -> None:
    hub.repos["org/tiny"].card = {"license": "other", "license_name": "tiny-licence"}
    assert store.pull("org/tiny:Q8_0").licence == "tiny-licence"
    hub.repos["org/tiny"].card = {"license": "\x1b[31mred"}
    assert store.pull("org/tiny:Q4_K_M").licence is None


def test_a_split_gguf_is_fetched_and_opened(store: Store, hub: FakeHub, tmp_path: Path) -> None:
    shape = shape_from_config(tiny_config())
    write_gguf_model(tmp_path / "m-F32.gguf", shape, options=GgufOptions(max_tensors=8))
    for part in tmp_path.glob("*.gguf"):
        hub.repos["org/tiny"].files[f"F32/{part.name}"] = part.read_bytes()
    model = store.pull("org/tiny:F32")
    assert model.path.name.startswith("m-F32-00001-of-")
    assert len(open_checkpoint(model.path).files) > 1


def test_a_plan_fetches_the_settings_alone_and_keeps_nothing(store: Store, hub: FakeHub) -> None:
    shape = store.locate("org/tiny")
    config = json.loads(hub.repos["org/tiny"].files["config.json"])
    generation = json.loads(hub.repos["org/tiny"].files["generation_config.json"])
    assert shape == shape_from_config(config, generation)
    fetched = [request.path.rpartition("/")[2] for request in hub.requests[1:]]
    assert sorted(fetched) == ["config.json", "generation_config.json"]
    assert sum(request.sent for request in hub.requests) < 8192
    assert not store.root.exists() or not any(store.root.iterdir())


@pytest.mark.usefixtures("no_retry")
def test_what_a_plan_fetches_is_not_resumed_and_offline_it_fetches_nothing(
    store: Store, hub: FakeHub
) -> None:
    hub.cuts["config.json"] = [10]
    with pytest.raises(StoreError, match=r"then try again$"):
        store.locate("org/tiny")
    before = len(hub.requests)
    with pytest.raises(StoreError, match=r"is not stored; .* but not offline"):
        store.locate("org/tiny", offline=True)
    assert len(hub.requests) == before
    store.pull("org/tiny")
    assert store.locate("org/tiny", offline=True) == store.resolve("org/tiny")


def test_a_plan_of_a_gguf_or_of_no_model_of_the_hub_is_refused(store: Store, hub: FakeHub) -> None:
    with pytest.raises(StoreError, match="org/tiny:Q8_0"):
        store.locate("org/tiny:Q8_0")
    with pytest.raises(StoreError, match="org/none"):
        store.locate("org/none")
    hub.repos["org/tiny"].files["config.json"] = b"[]"
    with pytest.raises(CheckpointError, match=r"config\.json"):
        store.locate("org/tiny")
