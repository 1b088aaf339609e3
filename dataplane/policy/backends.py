"""Addresses behind services, for rules that name services.

Rule: every endpoint of a service counts, ready or not: whether a client may talk to it is a matter
of policy, whether it gets traffic is a matter of the service.

Theory. Policy is asked after a service's address was replaced by that of an endpoint, so a rule
about a service is a rule about the addresses of its endpoints. Nothing is indexed while no rule
names a service.
"""

from dataplane.objects.collect import Key, Objects
from dataplane.objects.policies import ServiceRef
from dataplane.policy.directory import Address
from dataplane.policy.match import holds
from dataplane.policy.prefixes import number_of


class Backends:
    """Services and their endpoints, as rules ask for them."""

    def __init__(self) -> None:
        """No objects yet."""
        self._objects = Objects()
        self._slices: dict[Key, set[Key]] | None = None  # service -> slices

    def update(self, objects: Objects, asked: bool) -> bool:
        """Take the objects; return whether a service or slice changed. asked: someone asks."""
        old, self._objects = self._objects, objects
        if not asked:
            self._slices = None
            return False
        changed = objects.changed(old, "slices")
        if self._slices is not None:
            for key in changed:
                for one in (old.slices.get(key), objects.slices.get(key)):
                    if one is not None:
                        keys = self._slices.setdefault((one.namespace, one.service), set())
                        (keys.add if key in objects.slices else keys.discard)(key)
        return bool(changed or objects.changed(old, "services"))

    def addresses(self, ref: ServiceRef) -> set[Address]:
        """Return the addresses (family, value) of the endpoints of services."""
        if ref.labels is None:
            return self._of((ref.namespace, ref.name))
        found: set[Address] = set()
        for key, service in self._objects.services.items():
            labels = {f"k8s:{name}": one for name, one in service.labels.items()}
            if ref.namespace in ("", key[0]) and holds(ref.labels, labels):
                found |= self._of(key)
        return found

    def _of(self, service: Key) -> set[Address]:
        if self._slices is None:
            self._slices = {}
            for key, one in self._objects.slices.items():
                self._slices.setdefault((one.namespace, one.service), set()).add(key)
        found: set[Address] = set()
        for key in self._slices.get(service, ()):
            part = self._objects.slices.get(key)
            if part is not None and (part.namespace, part.service) == service:
                found |= {number_of(endpoint.address) for endpoint in part.endpoints}
        return found
