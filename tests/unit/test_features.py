"""The target's features: online as cached, compressed, resumed, checked and refused."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import get_args

import pytest
import torch

from deepspec.errors import DeepSpecError
from deepspec.features.codec import CODECS, codec
from deepspec.features.local import CachedFeatures, OnlineFeatures, Share
from deepspec.features.params import Form
from deepspec.features.sequences import Sequence
from deepspec.target.ends import H_LAST
from deepspec.target.model import load_target
from tests.tiny import cached_target

LAYERS = (0, 1)


@pytest.fixture(scope="module")
def target():
    return load_target(cached_target("llama"), dtype="bfloat16")


@pytest.fixture(scope="module")
def sequences():
    rng = torch.Generator().manual_seed(0)
    rows = [torch.randint(2, 500, (n,), generator=rng).tolist() for n in (31, 12, 25, 40, 18, 22)]
    return [Sequence(row, [1] * len(row), [1] * len(row)) for row in rows]


@pytest.fixture
def make(target, sequences, tmp_path, monkeypatch):
    """A cache of several shards."""
    monkeypatch.setattr("deepspec.features.local.BATCH_TOKENS", 40)
    monkeypatch.setattr("deepspec.features.local.SHARD_TOKENS", 30)

    def cached(form="bf16", layers=LAYERS, data="data", name="cache"):
        features = CachedFeatures(tmp_path / name, target, sequences, layers, data, form)
        features.build()
        return features

    return cached


def test_cached_features_are_those_computed_online(make, target, sequences):
    online, cached = OnlineFeatures(target, sequences, LAYERS), make()
    assert len(cached.manifest["shards"]) > 2
    for ours, theirs in zip(cached.batch([4, 0]), online.batch([4, 0]), strict=True):
        assert ours.shape == theirs.shape
        assert torch.allclose(ours.float(), theirs.float(), rtol=0.02, atol=0.02)


def test_h_last_is_a_feature_and_no_layers_are_none(make):
    features, hidden, log_norm = make(layers=(H_LAST,)).batch([1, 2])
    assert torch.equal(features, hidden) and log_norm.shape == hidden.shape[:2]
    assert make(layers=(), name="none").batch([1, 2])[0].shape == (2, 25, 0)


@pytest.mark.parametrize(
    ("form", "most", "error"), [("fp8", 0.53, 0.04), ("int8", 0.53, 0.02), ("int4", 0.30, 0.12)]
)
def test_compressed_features_are_close_and_small(make, target, sequences, form, most, error):
    whole, small = make(name="whole"), make(form, name="small")
    features, _, _ = whole.batch([3])
    found, last, log_norm = small.batch([3])
    assert float((found - features).norm() / features.norm()) < error
    assert codec(form).encode(torch.zeros(1, 64))["codes"].element_size() == 1
    d = target.hidden_size
    kept = sum(x.numel() * x.element_size() for x in codec(form).encode(torch.randn(8, 4096)).values())
    assert kept / (8 * 4096 * 2) <= most
    expected = (
        target.logits(last[0]).float().logsumexp(-1)
    )  # of the state that will be read, not of the true one
    assert torch.allclose(log_norm[0], expected, atol=0.02) and last.shape == (1, 40, d)


def test_the_parameters_name_every_codec():
    assert get_args(Form) == tuple(CODECS)


@pytest.mark.parametrize("form", CODECS)
def test_a_codec_keeps_zeros_signs_and_the_largest_value(form):
    x = torch.zeros(2, 64)
    x[0, 3], x[0, 40], x[1, 7] = 5.0, -5.0, -0.25
    back = codec(form).decode(codec(form).encode(x)).float()
    assert torch.allclose(back, x, rtol=0.01)


def test_an_interrupted_build_goes_on_at_the_shard_where_it_stopped(make, target, sequences, tmp_path):
    whole = make(name="whole")
    broken = CachedFeatures(tmp_path / "broken", target, sequences, LAYERS, "data")
    original, written = broken._write, []

    def write(number, batches):
        if number == 2:
            raise KeyboardInterrupt
        written.append(number)
        return original(number, batches)

    broken._write = write
    with pytest.raises(KeyboardInterrupt):
        broken.build()
    again = CachedFeatures(tmp_path / "broken", target, sequences, LAYERS, "data")
    original = again._write
    again._write = lambda number, batches: (written.append(number), original(number, batches))[1]
    again.build()
    assert written == list(range(len(whole.manifest["shards"])))
    assert again.manifest == whole.manifest  # checksums too


def test_processes_share_a_build_and_write_the_bytes_of_one(make, sequences, tmp_path):
    whole = make(name="whole")
    together, written = threading.Barrier(3), {}
    targets = [load_target(cached_target("llama"), dtype="bfloat16") for _ in range(3)]

    def build(rank):
        features = CachedFeatures(tmp_path / "shared", targets[rank], sequences, LAYERS, "data")
        original = features._write
        features._write = lambda number, batches: (
            written.setdefault(rank, []).append(number),
            original(number, batches),
        )[1]
        features.build(share=Share(rank, 3, together.wait))
        return features

    with ThreadPoolExecutor(3) as pool:
        shared = list(pool.map(build, range(3)))
    assert sorted(number for numbers in written.values() for number in numbers) == list(
        range(len(whole.manifest["shards"]))
    )
    counts = [len(written.get(rank, [])) for rank in range(3)]
    assert max(counts) - min(counts) <= 1
    assert all(features.manifest == whole.manifest for features in shared)  # checksums too
    assert sorted(path.name for path in (tmp_path / "shared").iterdir()) == sorted(
        path.name for path in whole.directory.iterdir()
    )
    for ours, theirs in zip(shared[2].batch([4, 0]), whole.batch([4, 0]), strict=True):
        assert torch.equal(ours, theirs)


def test_a_build_goes_on_in_another_number_of_processes(make, target, sequences, tmp_path):
    whole = make(name="whole")
    broken = CachedFeatures(tmp_path / "broken", target, sequences, LAYERS, "data")
    alone = threading.Barrier(1)
    with pytest.raises(DeepSpecError, match=r"2 of \d+ shards are not there, though every process"):
        broken.build(share=Share(0, 2, alone.wait))
    again = CachedFeatures(tmp_path / "broken", target, sequences, LAYERS, "data")
    again.build()
    assert again.manifest == whole.manifest


def test_a_finished_cache_never_asks_for_the_target(make, target, sequences):
    whole = make()
    again = CachedFeatures(whole.directory, target, sequences, LAYERS, "data")
    again.build(source=lambda: pytest.fail("the target was loaded"))
    assert torch.equal(again.batch([3])[0], whole.batch([3])[0])


@pytest.mark.parametrize(
    ("other", "what"), [({"form": "int8"}, "form"), ({"layers": (0,)}, "layers"), ({"data": "d2"}, "data")]
)
def test_features_of_something_else_are_refused(make, other, what):
    make()
    with pytest.raises(DeepSpecError, match=f"features of another {what}"):
        make(**other)


def test_a_finished_cache_with_more_layers_serves_another_drafter(target, sequences, tmp_path, monkeypatch):
    def below(layers, data="data"):
        features = CachedFeatures.below(tmp_path, target, sequences, layers, data, "bf16")
        features.build()
        return features

    large = below((0, 1, 2))
    small = below((2, 0))
    assert small.directory == large.directory
    expected = torch.cat(large.batch([3])[0].chunk(3, -1)[::-2], -1)
    assert torch.equal(small.batch([3])[0], expected)
    assert below((H_LAST,)).directory == large.directory
    for other in (below((1, -1)), below((0, 1), "other data")):
        assert other.directory != large.directory


def test_a_damaged_shard_is_named(make):
    cached = make()
    path = cached._path(1)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(DeepSpecError, match=r"features-00001\.safetensors: missing or damaged"):
        cached.batch(list(range(len(cached.sequences))))


def test_an_unknown_form_is_refused():
    with pytest.raises(DeepSpecError, match="unknown feature format 'int9'; did you mean 'int8'"):
        codec("int9")
