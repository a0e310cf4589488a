"""The light side in a process of its own, in which only NumPy and the standard library can be imported."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import queries_near

from rb_gpu import router_file
from rb_gpu.bank import ReasoningBank
from rb_gpu.bank_data import BankData
from rb_gpu.publish import write_artifact
from rb_gpu.trajectory_file import read_batches

DENIED = (
    "torch", "safetensors", "scipy", "faiss", "hydra", "omegaconf", "pyarrow", "sklearn", "pandas", "cupy", "yaml",
)  # fmt: skip

DENY = """
import sys

KNOWN = sys.stdlib_module_names | {"numpy", "rb_gpu"}
before = set(sys.modules)


class Deny:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] not in KNOWN:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Deny())
"""

SERVE = """
from pathlib import Path
import numpy as np
import rb_gpu
from rb_gpu import FastGRNNRouter, QueryTrajectory, ReasoningBank, SearchParams, UserFeedback

folder, artifact = Path(sys.argv[1]), Path(sys.argv[2])
queries = np.load(folder / "queries.npy")
bank = ReasoningBank.load(artifact, log=folder / "log.sqlite")
answer = bank.optimized_params(queries[0])
assert isinstance(answer.params, SearchParams)
batch = bank.optimized_params_batch(queries)
assert batch["config_id"][0] == answer.config_id
assert bank.optimized_params(queries[0], tradeoff=0.3) and bank.optimized_params(queries[0], mode="interpolate")
assert bank.find_similar_patterns(queries[0], k=3)[0].pattern.id in bank.patterns
assert len(bank.verdicts) == bank.data.leaves and not bank.reload_if_changed()
bank.export(folder / "patterns.json")
again = ReasoningBank.from_export(folder / "patterns.json").optimized_params_batch(queries)
assert all((again[name] == batch[name]).all() for name in batch)
for i in range(3):
    bank.record_trajectory(QueryTrajectory(i, queries[i], answer.params, 0.5, 0.5, 1000, 1_700_000_000 + i))
assert bank.record_feedback(1, UserFeedback(rating=5)) and not bank.record_feedback(1, UserFeedback(rating=1))
assert bank.stats().total_feedback == 1
from rb_gpu.prometheus import bank_metrics
assert f"rb_gpu_lookups_total {bank.stats().total_lookups}" in bank_metrics(bank).splitlines()
router = FastGRNNRouter.load(folder / "router.safetensors")
decision = router.forward_with_reasoning(queries[0], bank, query_embedding=queries[0])
assert 0.0 <= decision.router_confidence <= 1.0 and list(router.configs) == list(bank.configs)
bank.close()
np.save(folder / "config_id.npy", batch["config_id"])

try:
    import rb_gpu.learn
except ImportError as error:
    assert "pip install 'rb_gpu[cpu]'" in str(error) and "rb_gpu[gpu]" in str(error), error
else:
    raise AssertionError("rb_gpu.learn was imported")
try:
    ReasoningBank.load(artifact, search="index")
except rb_gpu.ArtifactError as error:
    assert "pip install 'rb_gpu[index]'" in str(error) or "has no index.faiss" in str(error), error
else:
    raise AssertionError("an index was opened without Faiss")
loaded = {name.split(".")[0] for name in set(sys.modules) - before}
assert loaded <= KNOWN, loaded - KNOWN
"""


def router_content(data: BankData) -> bytes:
    """A router with random weights over the bank's configs."""
    configs, rng = data.configs, np.random.default_rng(0)
    tried = {"X": configs.context_tokens, "E": configs.ef_search, "N": configs.n_probes}
    sizes = {axis: len(np.unique(values)) for axis, values in tried.items()}
    sizes |= {"I": data.dim, "F": 0, "R": 2, "S": 2, "H": 3, "V": len(data.tiers), "C": len(configs), "1": 1}
    arrays = {name: rng.normal(size=[sizes[axis] for axis in axes]) for name, axes in router_file.ARRAYS.items()}
    return router_file.write_router({name: array.astype(np.float32) for name, array in arrays.items()}, configs, False)


def run(code: str, *args: Path | str) -> None:
    command = [sys.executable, "-c", code, *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("which", ["made", "learned"])
def test_a_service_needs_numpy_only(data: BankData, which: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    files = {}
    if which == "learned":
        learned = request.getfixturevalue("learned").bank
        data, files = learned.data, {"index.faiss": learned.index}
    write_artifact(tmp_path / "v", data, files)
    queries = queries_near(data, 50)
    np.save(tmp_path / "queries.npy", queries)
    (tmp_path / "router.safetensors").write_bytes(router_content(data))
    run(DENY + SERVE, tmp_path, tmp_path / "v")
    expected = ReasoningBank(data).optimized_params_batch(queries)["config_id"]
    np.testing.assert_array_equal(np.load(tmp_path / "config_id.npy"), expected)
    (batch,) = read_batches(tmp_path / "log.sqlite")
    assert batch["id"].tolist() == [0, 1, 2] and batch["rating"].tolist() == [0, 5, 0]


def test_the_denial_denies() -> None:
    names = [name for name in DENIED if importlib.util.find_spec(name)]
    run(f"""{DENY}
for name in {names!r}:
    try:
        __import__(name)
    except ImportError:
        continue
    sys.exit(f"{{name}} was imported")
""")


def test_importing_rb_gpu_loads_nothing_that_a_lookup_does_not_need() -> None:
    # modules that take longer to load than the bank itself
    run("""
import sys, numpy
before = set(sys.modules)
import rb_gpu
later = {"logging", "sqlite3", "hashlib", "rb_gpu.posterior", "rb_gpu.watcher", "rb_gpu.trajectory_log"}
assert not later & (set(sys.modules) - before), sys.modules.keys() - before
""")


def test_importing_rb_gpu_loads_no_batch_package_even_where_it_is_installed() -> None:
    run(f"import sys, rb_gpu\nassert not set({DENIED!r}) & set(sys.modules), sys.modules.keys()")
