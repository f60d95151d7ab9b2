"""Our own `LLM` on Ray Serve: replicas behind one endpoint of OpenAI's API.

Knows where the application is put together; imports Ray where it is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ...errors import MissingDependencyError

if TYPE_CHECKING:
    from ray.serve import Application


def build_app(arguments: Mapping[str, Any]) -> Application:
    """A Ray Serve application, for `serve run paged_kv.integrations.ray_serve:build_app` and YAML.

    `arguments` are the fields of `FleetOptions` and the keywords of `LLM`; text that is JSON, as
    numbers on a command line are, is read as such. Raises `ConfigError` for what cannot be.
    """
    try:
        from .application import application_of
        from .options import read_options
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"Ray Serve needs {error.name}: pip install 'paged-kv[ray]'"
        ) from error
    return application_of(read_options(arguments))
