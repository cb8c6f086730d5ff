"""One adapter an architecture family, and the registry that finds them."""

from fastattn.models.family import Family, Site, families_in, known_families

__all__ = ["Family", "Site", "families_in", "known_families"]
