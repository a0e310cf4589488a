"""What was published, what is served, and how to change it.

python -m jobs.registry action=list
python -m jobs.registry action=promote version=20261128T030000-4c69fd
"""

from __future__ import annotations

import json
from dataclasses import asdict

from rb_gpu.artifact import read_manifest, verify_artifact
from rb_gpu.learn.job_config import RegistryJobConfig
from rb_gpu.registry import CHAMPION, Registry

from .common import job
from .tables import number, render


def run(config: RegistryJobConfig) -> int:
    """Does the action and prints what it did."""
    registry = Registry.open(**asdict(config.registry))
    version = config.version or CHAMPION
    if config.action == "list":
        print(_listing(registry))
    elif config.action == "inspect":
        manifest = read_manifest(registry.folder(version), registry.hmac_key)
        print(json.dumps({key: value for key, value in manifest.items() if key != "config"}, indent=1))
    elif config.action == "verify":
        folder = registry.folder(version)
        print(f"{folder.name}: {len(verify_artifact(folder, registry.hmac_key)['files'])} files are whole")
    else:
        with registry.locked():
            if config.action == "promote":
                registry.promote(version, "promoted by hand")
            else:
                registry.rollback()
        print(f"serving {registry.champion()}")
    return 0


def _listing(registry: Registry) -> str:
    champion = registry.champion()
    rows = []
    for version, manifest in registry.manifests():
        mark = "serving" if version == champion else ""
        if manifest is None:
            rows.append((version, mark, "damaged", "", "", ""))
            continue
        gain = (manifest.get("evaluation") or {}).get("bank_gains", {}).get("default") or {}
        counts = manifest.get("counts", {})
        rows.append(
            (
                version,
                mark,
                f"{counts.get('trajectories', 0):,}",
                str(counts.get("patterns", "")),
                str(counts.get("verdicts", "")),
                number(float("nan") if gain.get("gain") is None else gain["gain"], "+.4f"),
            )
        )
    if not rows:
        return f"{registry.path} holds no version; run jobs.train"
    return render(("version", "", "trajectories", "patterns", "verdicts", "gain over default"), rows)


main = job("registry", __doc__, run)

if __name__ == "__main__":
    main()
