"""Manifests from a folder: a broken file changes nothing and says where it is broken."""

import asyncio

import pytest

from dataplane.control.folder import FolderSource

NODE = """
apiVersion: v1
kind: Node
metadata: {name: NAME, annotations: {a: b}}
spec: {podCIDRs: [10.244.1.0/24, "fd00::/64"]}
status: {addresses: [{type: InternalIP, address: 192.0.2.1}, {type: Hostname, address: NAME}]}
"""


def test_objects_of_all_documents_and_lists(tmp_path):
    (tmp_path / "a.yaml").write_text(
        NODE.replace("NAME", "one") + "---\n" + NODE.replace("NAME", "two")
    )
    (tmp_path / "b.json").write_text(
        '{"kind": "List", "items": [{"kind": "Namespace", "metadata": {"name": "shop"}},'
        '{"kind": "Pod", "metadata": {"name": "p", "namespace": "shop", "labels": {"app": "x"}}},'
        '{"kind": "Service", "metadata": {"name": "s"}}]}'
    )
    (tmp_path / "ignored.txt").write_text("{")
    source = FolderSource(tmp_path)
    objects = source.read()
    assert source.errors == {}
    assert set(objects.nodes) == {"one", "two"}
    assert str(objects.nodes["one"].internal_ip(4)) == "192.0.2.1"
    assert str(objects.nodes["one"].pod_cidr(6)) == "fd00::/64"
    assert objects.namespaces["shop"].labels["kubernetes.io/metadata.name"] == "shop"
    assert objects.pods["shop", "p"].labels == {"app": "x"}
    assert [other["kind"] for other in objects.others] == ["Service"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("kind: Node\nmetadata: {name: [", ["bad.yaml:2", "YAML"]),
        ("kind: Node\nmetadata: {}", ["metadata.name"]),
        ("metadata: {name: x}", ["no kind"]),
        (NODE.replace("192.0.2.1", "300.1.1.1"), ["status.addresses", "300.1.1.1"]),
        (NODE.replace("10.244.1.0/24", "10.244.1.1/24"), ["podCIDRs", "host bits"]),
        ("kind: Node\nmetadata: {name: x}\nstatus: {addresses: 7}", ["status.addresses"]),
        ("\x00", ["bad.yaml"]),
    ],
)
def test_a_broken_file_keeps_its_last_good_state(tmp_path, text, words):
    path = tmp_path / "bad.yaml"
    path.write_text(NODE.replace("NAME", "one"))
    source = FolderSource(tmp_path)
    assert set(source.read().nodes) == {"one"}
    path.write_text(text)
    assert set(source.read().nodes) == {"one"}
    said = " ".join(f"{where} {error}" for where, error in source.errors.items())
    for word in words:
        assert word in said
    path.write_text(NODE.replace("NAME", "two"))
    assert set(source.read().nodes) == {"two"}
    assert not source.errors
    path.unlink()
    assert not source.read().nodes


def test_changes_are_followed_also_of_a_folder_that_comes_later(tmp_path):
    folder = tmp_path / "later"

    async def follow():
        source = FolderSource(folder)
        changes = source.changes()
        assert not (await anext(changes)).nodes
        assert source.errors
        folder.mkdir()
        (folder / "n.yaml").write_text(NODE.replace("NAME", "one"))
        async with asyncio.timeout(30):
            async for objects in changes:
                if objects.nodes:
                    break
        (folder / "m.yaml").write_text(NODE.replace("NAME", "two"))
        async with asyncio.timeout(30):
            async for objects in changes:
                if len(objects.nodes) == 2:
                    break
        await changes.aclose()

    asyncio.run(follow())
