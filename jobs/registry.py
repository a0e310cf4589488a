"""Lists and inspects published versions, and changes which one is served.

python -m jobs.registry action=list
python -m jobs.registry action=promote version=20261128T030000-4c69fd
"""

from __future__ import annotations

import json
from dataclasses import asdict

from rb_gpu.artifact import load_artifact, read_manifest, verify_artifact
from rb_gpu.errors import RegistryError
from rb_gpu.learn.job_config import RegistryJobConfig
from rb_gpu.registry import CHAMPION, Registry

from .common import job, log
from .versions import difference, listing, statistics, tree


def run(config: RegistryJobConfig) -> int:
    """Performs the action and prints its result."""
    registry = Registry.open(**asdict(config.registry))
    version = config.version or CHAMPION
    if config.action == "list":
        print(listing(registry))
    elif config.action == "inspect":
        manifest = read_manifest(registry.folder(version), registry.hmac_key)
        shown = {key: value for key, value in manifest.items() if key != "config"}
        print(json.dumps({"statistics": statistics(manifest)} | shown, indent=1))
    elif config.action == "tree":
        print(tree(load_artifact(registry.folder(version), registry.hmac_key)[0]))
    elif config.action == "diff":
        print(_difference(registry, version, config.other))
    elif config.action == "verify":
        folder = registry.folder(version)
        print(f"{folder.name}: {len(verify_artifact(folder, registry.hmac_key)['files'])} files are intact")
    else:
        if not registry.path.is_dir():  # taking the lock would create it
            raise RegistryError(f"registry.path={registry.path} is not a folder; give the one that jobs.train made")
        with registry.locked():
            if config.action == "promote":
                for change in _changes(registry, version):
                    log.warning("its %s as in the served version: services must send such queries from now on", change)
                registry.promote(version, "promoted by hand")
            else:
                registry.rollback()
        print(f"serving {registry.champion()}")
    return 0


def _changes(registry: Registry, version: str) -> list[str]:
    """How a version's metric, dimension and embedder differ from the champion's. A service would not notice such a
    change by itself.
    """
    known = dict(registry.manifests())
    served, new = (known.get(one or "") for one in (registry.champion(), version))
    if served is None or new is None:
        return []
    return [
        f"{name} is {new.get(name)}, not {served.get(name)}"
        for name in ("metric", "dim", "embedder")
        if new.get(name) != served.get(name)
    ]


def _difference(registry: Registry, version: str, other: str | None) -> str:
    """The comparison of a version with `other`, by default its parent. Raises RegistryError if it has none."""
    after, manifest = load_artifact(registry.folder(version), registry.hmac_key)
    named = other or manifest.get("parent")
    if named is None:
        raise RegistryError(f"version={version} has no parent to compare with; add other=VERSION")
    return difference(load_artifact(registry.folder(named), registry.hmac_key)[0], after)


main = job("registry", __doc__, run)

if __name__ == "__main__":
    main()
