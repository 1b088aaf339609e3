"""The story that `make run` tells, and what becomes of one that goes wrong."""

from io import StringIO

import pytest
from rich.console import Console

from bench import checks, story
from bench.lab import Lab
from bench.penstock import Cluster

pytestmark = [pytest.mark.root, pytest.mark.net]


def printed(told) -> str:
    text = StringIO()
    Console(width=120, file=text).print(told.show())
    return text.getvalue()


def test_the_story_goes_as_it_should():
    with Lab() as lab:
        cluster = Cluster(lab).start()
        for node in cluster.nodes:
            for letter in "ab":
                checks.serve(node.pod(f"pod{node.number}{letter}").namespace)
        told = story.Story(cluster)
        assert len(list(told.tell())) == told.length
        assert not told.errors()
        assert "NetworkPolicy default/web-for-clients" in printed(told)
        assert not list(cluster.manifests.glob("web-for-clients*"))


def test_a_step_that_went_wrong_is_told():
    told = story.Story.__new__(story.Story)
    told.steps = [
        story.Step("a", "curl x", "answered", "no answer"),
        story.Step("b", "c", "d", "d"),
    ]
    told.explained = told.refused = told.observed = ""
    assert told.errors() == ["curl x: wanted answered, seen no answer"]
    assert "failed" in printed(told)
