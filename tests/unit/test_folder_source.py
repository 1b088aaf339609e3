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
        '{"kind": "Service", "metadata": {"name": "s"}},'
        '{"kind": "Secret", "metadata": {"name": "t"}}]}'
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
    assert objects.services["default", "s"].type == "ClusterIP"
    assert [other["kind"] for other in objects.others] == ["Secret"]


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


BAD_POLICY = """
# a comment
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: p, namespace: shop}
spec:
  podSelector: {}
  ingress:
  - from:
    - podSelector: {}
    ports:
    - {port: 80, endPort: 79}
"""


def test_an_error_names_file_line_object_field_and_reason(tmp_path):
    path = tmp_path / "policies.yaml"
    path.write_text(NODE.replace("NAME", "one") + "---\n" + BAD_POLICY)
    source = FolderSource(tmp_path)
    assert set(source.read().nodes) == {"one"}, "what is good of a new file is taken"
    ((where, why),) = source.errors.items()
    assert where == f"{path}:{NODE.count(chr(10)) + 13}"
    assert why == ("NetworkPolicy p: spec.ingress[0].ports[0].endPort: 79 is less than port 80")


def test_lines_in_lists_missing_fields_and_json(tmp_path):
    (tmp_path / "a.yaml").write_text(
        "kind: List\nitems:\n- {kind: Namespace, metadata: {name: x}}\n- kind: Node\n  metadata:\n"
        "    labels: {}\n"
    )
    (tmp_path / "b.json").write_text('{\n"kind": "Pod",\n"metadata": {"name": 7}\n}')
    (tmp_path / "c.json").write_text('{\n"kind": \n}')
    (tmp_path / "d.yaml").write_text("kind: Pod\nmetadata: {name: x}\nspec:\n  hostNetwork: 7\n")
    source = FolderSource(tmp_path)
    source.read()
    places = sorted(where.removeprefix(f"{tmp_path}/") for where in source.errors)
    assert places == ["a.yaml:5", "b.json:3", "c.json:3", "d.yaml:4"]


@pytest.mark.parametrize(
    "text",
    ["[" * 300_000, "{a: " * 100_000, "- " * 100_000 + "x", "? " * 100_000, " " * 9000 + "x"],
)
def test_deep_nesting_is_refused_before_the_parser_sees_it(tmp_path, text):
    (tmp_path / "deep.yaml").write_text(text)
    source = FolderSource(tmp_path)
    source.read()
    assert "nested deeper" in " ".join(source.errors.values()) or "no kind" in str(source.errors)


def test_only_what_changed_is_read_again_and_told(tmp_path):
    for name in ("one", "two", "three"):
        (tmp_path / f"{name}.yaml").write_text(NODE.replace("NAME", name))
    source = FolderSource(tmp_path)
    before = source.read()
    assert source.read() is before
    (tmp_path / "two.yaml").write_text(
        NODE.replace("NAME", "two").replace("192.0.2.1", "192.0.2.9")
    )
    after = source.read()
    assert after.nodes["one"] is before.nodes["one"]
    assert after.pods is before.pods
    assert after.since is not None
    assert after.since.changed == {"nodes": frozenset({"two"})}
    assert after.changed(before, "nodes") == {"two"}
    assert after.changed(Objects(), "nodes") == {"one", "two", "three"}
    (tmp_path / "three.yaml").unlink()
    last = source.read()
    assert last.changed(after, "nodes") == {"three"}
    assert last.changed(before, "nodes") == {"two", "three"}, "older snapshots are compared"


def test_the_last_file_has_an_object_and_leaves_it_to_the_one_before(tmp_path):
    for name, address in (("a", "192.0.2.1"), ("b", "192.0.2.2")):
        text = NODE.replace("NAME", "one").replace("192.0.2.1", address)
        (tmp_path / f"{name}.yaml").write_text(text)
    source = FolderSource(tmp_path)
    assert str(source.read().nodes["one"].internal_ip(4)) == "192.0.2.2"
    (tmp_path / "b.yaml").unlink()
    assert str(source.read().nodes["one"].internal_ip(4)) == "192.0.2.1"
    (tmp_path / "a.yaml").unlink()
    assert not source.read().nodes


def test_a_file_that_is_being_written_lifts_nothing(tmp_path):
    path = tmp_path / "nodes.yaml"
    whole = NODE.replace("NAME", "one") + "---\n" + NODE.replace("NAME", "two")
    path.write_text(whole)

    async def follow():
        changes = FolderSource(tmp_path).changes()
        assert set((await anext(changes)).nodes) == {"one", "two"}
        path.write_text("")  # an editor truncates ...
        waiting = asyncio.ensure_future(anext(changes))
        await asyncio.sleep(0.03)
        assert not waiting.done()
        path.write_text(whole + "---\n" + NODE.replace("NAME", "three"))  # ... and writes
        objects = await asyncio.wait_for(waiting, 10)
        assert set(objects.nodes) == {"one", "two", "three"}
        path.write_text(NODE.replace("NAME", "two"))  # this is meant
        objects = await asyncio.wait_for(anext(changes), 10)
        assert set(objects.nodes) == {"two"}
        await changes.aclose()

    asyncio.run(follow())
