"""The annotation web app: server-rendered pages, one small script, no content from elsewhere."""

from synpref_ray.human.web.app import create_app
from synpref_ray.human.web.site import Site

__all__ = ["Site", "create_app"]
