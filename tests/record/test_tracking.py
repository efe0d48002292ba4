"""Lineage and Weights & Biases: the chain from source files to a model, offline, through outages, and digests."""

import hashlib
import json
import os
import re
import socket
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import SMALL, recipe

from nemotron_sft import paths
from nemotron_sft.config import Tracking
from nemotron_sft.errors import UserError
from nemotron_sft.record import digests, lineage, names
from nemotron_sft.record.wandb import Tracker

DATA, PRETRAIN, MODEL = lineage.DATA, lineage.PRETRAIN, lineage.MODEL
SHORT = [*SMALL, "train.train_iters=4", "validation.eval_interval=2", "checkpoint.save_interval=2"]


def without_account(home):
    """An environment in which no W&B account can be found."""
    return {"HOME": home, "WANDB_API_KEY": "", "NETRC": home / "netrc"}


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """Prepare, train, and train on from the best checkpoint, all inputs named as artifacts; no account, no network."""
    root = tmp_path_factory.mktemp("chain")
    home = tmp_path_factory.mktemp("home")
    split = "split={training: 0.9, validation: 0.05, test: 0.05}"
    commands = [
        ("prep", "blend=tiny", "sample=600", f"output_dir={root}/data/tiny", split, "tracking.group=g"),
        ("train", f"output_dir={root}", f"run_dir={root}/train/first", f"data=wandb:{DATA}:latest", *SHORT),
        ("train", f"output_dir={root}", f"run_dir={root}/train/second", f"init_from=wandb:{MODEL}:best", *SHORT),
    ]
    for command in commands:
        started = time.monotonic()
        done = recipe(*command, **without_account(home))
        (root / "seconds").write_text(str(time.monotonic() - started))
        assert done.returncode == 0, done.stdout + done.stderr
        assert not re.search(r"log ?in|api key|wandb:", done.stdout + done.stderr, re.IGNORECASE)
    return root


def records_of(file):
    """What W&B's own reader finds in a file of an offline run: records and their kinds."""
    from wandb.proto import wandb_internal_pb2
    from wandb.sdk.internal.datastore import DataStore

    store, records = DataStore(), []
    store.open_for_scan(str(file))
    while (data := store.scan_data()) is not None:
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        records.append(record)
    return records, [record.WhichOneof("record_type") for record in records]


def offline_run(directory):
    """The one offline run of a directory: the run, its config, its artifacts, and how many rows its history has."""
    (file,) = Path(directory).glob("wandb/offline-run-*/run-*.wandb")
    last = time.monotonic() + 60
    records, kinds = records_of(file)
    while "exit" not in kinds and time.monotonic() < last:  # W&B's own process writes on after the run has ended
        time.sleep(0.1)
        records, kinds = records_of(file)
    run = next(record.run for record, kind in zip(records, kinds, strict=True) if kind == "run")
    config = {u.key: json.loads(u.value_json) for u in run.config.update}
    for record, kind in zip(records, kinds, strict=True):
        if kind == "config":
            config |= {u.key: json.loads(u.value_json) for u in record.config.update if u.key}
    artifacts = [record.artifact for record, kind in zip(records, kinds, strict=True) if kind == "artifact"]
    history = sum(kind == "history" for kind in kinds)
    return run, config, artifacts, history


@pytest.mark.slow
def test_an_offline_prep_run_holds_the_data_artifact(chain):
    run, config, artifacts, _ = offline_run(chain / "data/tiny")
    assert (run.project, run.run_group, run.job_type) == ("nemotron-sft", "g", "prep")
    assert set(run.tags) == {"sft", "prep", "sample-600"}
    assert [entry["artifact"] for entry in config["inputs"]] == ["Dataset-tiny"]
    (artifact,) = artifacts
    assert (artifact.name, artifact.type, list(artifact.aliases)) == (DATA, "dataset", ["latest"])
    about, metadata = json.loads(artifact.metadata), json.loads((chain / "data/tiny/metadata.json").read_text())
    assert about["splits"] == metadata["splits"] and about["blend"] == metadata["blend"]
    paths = {content.path for content in artifact.manifest.contents}
    assert {"training.npy", "validation.npy", "test.npy", "metadata.json", "artifact.json"} <= paths


@pytest.mark.slow
def test_an_offline_training_run_names_its_inputs_and_holds_every_checkpoint(chain):
    run, config, artifacts, history = offline_run(chain / "train/first")
    assert {"sft", "train", "sample-600"} == set(run.tags) and history >= 4
    assert [entry["artifact"] for entry in config["inputs"]] == [PRETRAIN, DATA]
    metadata = json.loads((chain / "data/tiny/metadata.json").read_text())
    assert config["inputs"][1]["digest"] == digests.content_digest(lineage.data_files(metadata))
    assert {artifact.name for artifact in artifacts} == {MODEL}
    aliases = [set(artifact.aliases) for artifact in artifacts]
    assert {"iter-2", "latest"} <= aliases[0] and {"iter-4", "latest"} <= aliases[-1]
    assert any("best" in names for names in aliases)
    for artifact in artifacts:
        assert json.loads(artifact.metadata)["inputs"] == {entry["artifact"]: entry["digest"] for entry in
                                                           config["inputs"]}  # fmt: skip


@pytest.mark.slow
def test_the_record_reaches_from_the_model_to_the_source_files(chain):
    second = lineage.read(chain / "train/second")
    assert {entry["artifact"] for entry in second["inputs"]} == {MODEL, DATA}
    start = next(entry for entry in second["inputs"] if entry["artifact"] == MODEL)
    first = lineage.read(chain / "train/first")
    best = next(output for output in first["outputs"] if "best" in output["aliases"])
    assert start["digest"] == best["digest"] and start["lineage"]["stage"] == "train"
    (data,) = (entry for entry in start["lineage"]["inputs"] if entry["artifact"] == DATA)
    (source,) = data["lineage"]["inputs"]
    (file,) = source["files"]
    assert file["sha256"] == hashlib.sha256(Path(paths.ROOT, "data/tiny/train.jsonl").read_bytes()).hexdigest()
    assert all(len(record["config"]["digest"]) == 64 and record["packages"]["megatron-bridge"]
               for record in (first, second, data["lineage"]))  # fmt: skip
    for output in second["outputs"]:  # digests are of the bytes that are there
        digests.verify(Path(output["path"]), output["files"])


@pytest.mark.slow
def test_the_chain_is_printed_as_a_tree(chain):
    done = recipe("show", f"{chain}/train/second")
    assert done.returncode == 0, done.stderr
    for name in (f"{MODEL} (", f"{DATA}  ", f"{PRETRAIN}  random", "Dataset-tiny", "data/tiny/train.jsonl"):
        assert name in done.stdout
    assert re.search(r"validation loss +│ \d\.\d{4} -> \d\.\d{4}", done.stdout) and "2, the newest" in done.stdout
    of_checkpoint = recipe("show", f"{chain}/train/first/checkpoints/iter_0000002")
    assert "iter-2" in of_checkpoint.stdout and "iter-4" not in of_checkpoint.stdout
    nothing = recipe("show", f"{chain}/nowhere")
    assert nothing.returncode == 2 and len(nothing.stderr.splitlines()) == 1


@pytest.mark.slow
def test_names_resolve_to_what_was_recorded_or_are_refused(chain):
    here = {"cfg": settings("offline"), "output_dir": str(chain)}
    assert names.resolve(f"wandb:{DATA}", **here) == str(chain / "data/tiny")
    assert names.resolve(f"wandb:{MODEL}:iter-2", **here).endswith("checkpoints/iter_0000002")
    assert names.resolve("meta-llama/Llama-3.2-1B", **here) == "meta-llama/Llama-3.2-1B"
    with pytest.raises(UserError, match=r"versions .* need tracking=wandb"):
        names.resolve(f"wandb:{PRETRAIN}:v3", **here)


@pytest.mark.slow
def test_one_changed_byte_is_found_by_a_full_look_and_truncation_by_any(chain, tmp_path):
    for file in (chain / "data/tiny").iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    data = bytearray((tmp_path / "training.npy").read_bytes())
    data[-100] ^= 1
    (tmp_path / "training.npy").write_bytes(data)
    done = recipe("train", f"data={tmp_path}", "data.verify=full", f"run_dir={tmp_path}/run", *SHORT)
    assert done.returncode == 2 and not (tmp_path / "run").exists()
    assert "training.npy is not what was recorded" in done.stderr and len(done.stderr.splitlines()) == 1
    (tmp_path / "training.npy").write_bytes(data[:-1])
    done = recipe("train", f"data={tmp_path}", f"run_dir={tmp_path}/run", *SHORT)
    assert done.returncode == 2 and "training.npy is truncated" in done.stderr


# --- W&B that does not answer ------------------------------------------------------------------------------


def settings(mode, **changes):
    values = dict(mode=mode, project="p", entity=None, group=None, name=None, tags=[], base_url=None, timeout=15.0,
                  upload_mb=10.0, digests=True)  # fmt: skip
    return Tracking(**values | changes)


@pytest.fixture(params=["refuses", "hangs", "answers 500"])
def broken_server(request):
    """The address of a server on loopback that does as it is named."""
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    kept = []

    def serve():
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            kept.append(connection)
            if request.param == "answers 500":
                connection.recv(1 << 16)
                connection.sendall(b"HTTP/1.1 500 no\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                connection.close()

    if request.param == "refuses":
        listener.close()
    else:
        threading.Thread(target=serve, daemon=True).start()
    yield f"http://127.0.0.1:{port}"
    listener.close()
    for connection in kept:
        connection.close()


@pytest.mark.slow
def test_an_outage_delays_training_by_seconds_and_loses_nothing(broken_server, chain, tiny_data, tmp_path):
    started = time.monotonic()
    done = recipe(
        "train", f"data={tiny_data}", f"run_dir={tmp_path}/run", *SHORT, "tracking=wandb",
        f"tracking.base_url={broken_server}", "tracking.timeout=5", WANDB_API_KEY="0" * 40, HOME=tmp_path,
    )  # fmt: skip
    assert time.monotonic() - started < 3 * float((chain / "seconds").read_text())  # which imports take most of
    assert done.returncode == 0, done.stdout + done.stderr
    told = [line for line in (done.stdout + done.stderr).splitlines() if "W&B" in line or "wandb" in line]
    assert len(told) == 1 and "nothing is lost, upload it later with: wandb sync" in told[0], told
    _, config, artifacts, history = offline_run(tmp_path / "run")
    assert [set(artifact.aliases) & {"iter-2", "iter-4"} for artifact in artifacts][:2] == [{"iter-2"}, {"iter-4"}]
    assert history >= 4 and [entry["artifact"] for entry in config["inputs"]] == [PRETRAIN, DATA]
    assert [output["metadata"]["step"] for output in lineage.read(tmp_path / "run")["outputs"]] == [2, 4]


def test_wandb_without_an_account_is_refused_in_one_line(tmp_path):
    done = recipe("prep", "blend=tiny", f"output_dir={tmp_path}/out", "tracking=wandb", **without_account(tmp_path))
    assert done.returncode == 2 and not (tmp_path / "out").exists()
    assert re.fullmatch(r"error: tracking=wandb needs an API key: .*tracking=offline needs none\n", done.stderr)


@pytest.mark.slow
def test_a_real_server_has_the_whole_chain(request, tmp_path):
    """Opt-in: pytest --wandb-project ENTITY/PROJECT, logged in to the server that the wandb command is set up for."""
    if not (project := request.config.getoption("--wandb-project")):
        pytest.skip("needs --wandb-project ENTITY/PROJECT and an account")
    entity, name = project.split("/")
    online = ["tracking=wandb", f"tracking.entity={entity}", f"tracking.project={name}"]
    prepared = recipe("prep", "blend=tiny", "sample=600", f"output_dir={tmp_path}/data/tiny", *online)
    assert prepared.returncode == 0, prepared.stderr
    names = [f"data=wandb:{DATA}:latest", f"output_dir={tmp_path}", f"run_dir={tmp_path}/train/first"]
    trained = recipe("train", *names, *SHORT, *online)
    assert trained.returncode == 0, trained.stderr
    import wandb

    model = wandb.Api().artifact(f"{project}/{MODEL}:latest")
    assert "iter-4" in model.aliases
    used = {artifact.name.split(":")[0] for artifact in model.logged_by().used_artifacts()}
    assert used == {PRETRAIN, DATA}


def test_wandb_is_not_imported_beside_bridge_setting_up(tmp_path):
    """Bridge walks through the dictionary of loggers; a thread that imports wandb meanwhile would add to it."""
    settings = Tracking("offline", "p", None, None, None, [], None, 300, 1, True)
    record = {"stage": "train", "inputs": [], "tracking": None, "config": {"values": {}, "digest": "d"}}
    tracker = Tracker(settings, record, tmp_path, [], print)
    others = set(threading.enumerate())  # one of an earlier test may still be at its end

    def started() -> bool:
        return any(thread.name == "tracking" for thread in set(threading.enumerate()) - others)

    tracker.log({"loss": 1.0}, 1)  # kept until the run is open
    assert not started()
    tracker.start()
    assert started()
    tracker.close(0)
    assert offline_run(tmp_path)[3] == 1


class Cancelled(BaseException):
    """As asyncio's: no Exception."""


def failing(*_, **__):
    raise Cancelled("no space left")


@pytest.mark.parametrize("broken", ["open", "online", "log", "finish", "terminal"])
def test_whatever_a_tracking_thread_throws_is_one_line(broken, tmp_path, monkeypatch):
    """Never a traceback, not even when the terminal is closed before the thread has ended."""
    escaped, told = [], []
    monkeypatch.setattr(threading, "excepthook", lambda args: escaped.append(args.exc_value))
    parts = {name: failing if name == broken else lambda *_, **__: None for name in ("log", "save", "finish")}
    run = SimpleNamespace(dir=str(tmp_path), offline=False, use_artifact=failing, **parts)
    terminal = (tmp_path / "terminal").open("w")
    terminal.close()
    say = terminal.write if broken == "terminal" else told.append
    tracker = Tracker(settings("wandb" if broken == "online" else "offline"),
                      {"inputs": [{"path": "x"}], "tracking": None}, tmp_path, [], say)  # fmt: skip
    if broken == "online":
        monkeypatch.setattr(tracker, "_init", lambda mode: run if mode == "offline" else failing())
    else:
        monkeypatch.setattr(tracker, "_open", failing if broken == "open" else lambda: run)
    tracker.log({"loss": 1.0}, 1)
    tracker.log({"loss": 2.0}, 2)
    if broken not in ("log", "finish"):
        monkeypatch.setattr(tracker, "_artifact", lambda entry: None)
        tracker._do(tracker._use_inputs)  # in a thread of its own
    tracker.close(0)
    for thread in threading.enumerate():
        if thread.name.startswith("tracking"):
            thread.join(10)
    assert not escaped and len(told) == (broken != "terminal")
    assert all("no space left; nothing is lost" in line for line in told)


def test_a_run_that_is_not_tracked_keeps_nothing(tmp_path):
    settings = Tracking("disabled", "p", None, None, None, [], None, 20, 1, True)
    tracker = Tracker(settings, {"inputs": []}, tmp_path, [], print)
    tracker.log({"loss": 1.0}, 1)
    tracker.inputs()
    tracker.close(0)
    assert tracker._tasks.empty() and not list(tmp_path.iterdir())


def test_an_artifact_is_the_same_wherever_its_files_are(tmp_path):
    for place in ("a", "b/c"):
        (tmp_path / place).mkdir(parents=True)
        for name in ("x", "y"):
            (tmp_path / place / name).write_text(name)
    found = {
        digests.content_digest(digests.describe(root, lineage.inside(root)))
        for root in (tmp_path / "a", tmp_path / "b/c")
    }
    assert len(found) == 1
    os.truncate(tmp_path / "a/x", 0)
    assert digests.content_digest(digests.describe(tmp_path / "a", lineage.inside(tmp_path / "a"))) not in found
