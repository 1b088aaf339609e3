"""What a new agent knows of files that were broken while the old one was away."""

import shutil
import sqlite3

import pytest

from dataplane.control.folder import FolderSource

POLICY = """
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: NAME, namespace: shop}
spec: {podSelector: {}}
"""
KEY = ("NetworkPolicy", "shop", "deny")
DENY = POLICY.replace("NAME", "deny")
BROKEN = DENY.replace("podSelector: {}", "podSelector: [")


@pytest.fixture
def place(tmp_path):
    folder = tmp_path / "manifests"
    folder.mkdir()

    def start() -> FolderSource:
        return FolderSource(folder, tmp_path / "state.db")

    start.folder, start.kept = folder, tmp_path / "state.db"
    return start


@pytest.mark.parametrize("text", [BROKEN, DENY.replace("{}", "7"), "", b"\xff\xfe"])
def test_a_policy_that_is_broken_at_the_start_is_still_in_force(place, text):
    path = place.folder / "a.yaml"
    path.write_text(DENY)
    assert KEY in place().read().policies
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    for _ in range(3):  # and over further restarts
        source = place()
        if text:
            assert KEY in source.read().policies
            assert str(path) in next(iter(source.errors))
        else:  # a file without objects is no broken one
            assert not source.read().policies
    path.write_text(POLICY.replace("NAME", "other"))
    assert set(source.read().policies) == {("NetworkPolicy", "shop", "other")}
    assert not source.errors
    path.write_text(BROKEN)
    assert set(place().read().policies) == {("NetworkPolicy", "shop", "other")}


def test_what_was_deleted_meanwhile_is_gone(place):
    path = place.folder / "a.yaml"
    path.write_text(DENY)
    place().read()
    path.unlink()
    assert not place().read().policies
    path.write_text(BROKEN)
    assert not place().read().policies, "a file of that name comes anew"


def test_a_file_that_goes_is_forgotten_and_a_folder_that_goes_is_not(place):
    (place.folder / "a.yaml").write_text(DENY)
    source = place()
    source.read()
    shutil.rmtree(place.folder)
    place().read()
    place.folder.mkdir()
    (place.folder / "a.yaml").write_text(BROKEN)
    source = place()
    assert KEY in source.read().policies
    (place.folder / "a.yaml").unlink()
    source.read()
    (place.folder / "a.yaml").write_text(BROKEN)
    assert not place().read().policies


def test_a_file_that_was_never_good_gives_what_is_good_of_it(place):
    (place.folder / "a.yaml").write_text(DENY + "---\n" + BROKEN.replace("[", "7"))
    for _ in range(2):
        source = place()
        assert KEY in source.read().policies
        assert source.errors


@pytest.mark.parametrize("damage", [b"", b"no database at all" * 100, "cut"])
def test_a_damaged_store_is_made_anew(place, damage):
    (place.folder / "a.yaml").write_text(DENY)
    place().read()
    shutil.copy(place.kept, place.kept.with_name("copy"))
    for suffix in ("-wal", "-shm"):
        place.kept.with_name(place.kept.name + suffix).unlink(missing_ok=True)
    whole = place.kept.read_bytes()
    place.kept.write_bytes(whole[: len(whole) // 2] if damage == "cut" else damage)
    assert KEY in place().read().policies
    (place.folder / "a.yaml").write_text(BROKEN)
    assert KEY in place().read().policies


def test_a_store_that_cannot_be_written_is_told_and_stops_nothing(place):
    path = place.folder / "a.yaml"
    path.write_text(DENY)
    source = place()
    source.read()
    with sqlite3.connect(place.kept) as other:
        other.execute("drop table files")
    path.write_text(POLICY.replace("NAME", "other"))
    assert set(source.read().policies) == {("NetworkPolicy", "shop", "other")}
    assert "cannot be kept" in next(iter(source.errors.values()))
