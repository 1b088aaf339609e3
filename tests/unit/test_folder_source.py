"""Manifests from a folder: a broken file changes nothing and says where it is broken."""

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataplane.control.folder import FolderSource
from dataplane.objects.collect import Objects, collect
from dataplane.objects.manifest import ManifestError

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
        ("kind: Node\nmetadata: {name: x}\nspec: {podCIDRs: [5]}", ["spec.podCIDRs", "5"]),
        ("kind: Node\nmetadata: {name: x}\nspec: {podCIDR: 5}", ["spec.podCIDRs", "5"]),
        ("kind: Pod\nmetadata: {name: x, labels: {a: 1}}", ["metadata.labels", "quote"]),
        ("kind: Pod\nmetadata: {name: x, namespace: 7}", ["metadata.namespace", "7"]),
        ("kind: Pod\nmetadata: {name: x}\nstatus: {podIPs: [7]}", ["status.podIPs"]),
        ("kind: List\nitems: 7", ["items"]),
        ("kind: [Node]\nmetadata: {name: x}", ["no kind"]),
        ("date: 2026-13-45", ["YAML"]),
        ("[" * 5000, ["YAML"]),
        ("a: &a [*a]", ["no kind"]),
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


leaves = st.none() | st.booleans() | st.integers() | st.text(max_size=5)
anything = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(leaves, inner, max_size=3),
    max_leaves=8,
)


@st.composite
def manifests(draw):
    """An object of a kind we know, with nonsense in one of the places that we read."""
    kind = draw(st.sampled_from(["Node", "Namespace", "Pod", "Other"]))
    manifest = {
        "kind": kind,
        "metadata": {"name": "n", "labels": {"a": "b"}, "annotations": {}, "namespace": "x"},
        "spec": {"podCIDRs": ["10.0.0.0/24"], "nodeName": "n"},
        "status": {
            "addresses": [{"type": "InternalIP", "address": "192.0.2.1"}],
            "podIPs": [{"ip": "10.0.0.1"}],
        },
    }
    place = manifest
    for _ in range(draw(st.integers(0, 3))):
        key = draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        if not isinstance(place[key], dict | list) or not place[key]:
            break
        place = place[key]
    key = draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
    place[key] = draw(anything)
    return manifest


@settings(max_examples=300, deadline=None)
@given(manifests() | anything)
def test_nonsense_is_refused_or_read_but_never_crashes(manifest):
    try:
        objects = collect([manifest])
    except ManifestError as error:
        assert len(str(error)) < 500
    else:
        assert isinstance(objects, Objects)
        hash(tuple(objects.nodes))
        for node in objects.nodes.values():
            assert all(isinstance(value, str) for value in node.annotations.values())


def test_a_document_that_unfolds_without_end_is_refused_at_once(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    for number in range(1, 12):  # 9 to the 12th strings, were they written out
        lines.append(f"a{number}: &a{number} [{', '.join([f'*a{number - 1}'] * 9)}]")
    (tmp_path / "bomb.yaml").write_text("\n".join(lines) + "\nmetadata: {name: x}\n")
    source = FolderSource(tmp_path)
    assert not source.read().nodes
    assert "no kind" in next(iter(source.errors.values()))


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
