"""The committed stubs are those of protos/, in the version that protobuf 6 and 7 both import."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from serving.generated import inference_pb2 as pb

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "protos").rglob("*.proto"))


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_stubs_are_up_to_date(source: Path) -> None:
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    for suffix in ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py"):
        first = (ROOT / "serving" / "generated" / (source.stem + suffix)).read_text().splitlines()[0]
        assert first.endswith(digest), f"{first}: run scripts/generate_protos.py"


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_stubs_serve_protobuf_6_and_7(source: Path) -> None:
    text = (ROOT / "serving" / "generated" / f"{source.stem}_pb2.py").read_text()
    assert "# Protobuf Python Version: 6.33." in text


def test_the_foreign_protocol_leaves_its_names_to_its_clients() -> None:
    """Triton's client registers the same names; both must fit into one process, whichever comes first."""
    from google.protobuf import descriptor_pool

    from serving.generated import open_inference_pb2

    assert open_inference_pb2.DESCRIPTOR.pool is not descriptor_pool.Default()
    assert pb.DESCRIPTOR.pool is descriptor_pool.Default()


def test_requests_tell_unset_from_zero() -> None:
    for message in (pb.GenerateRequest, pb.Sampling, pb.Stopping, pb.OutputOptions, pb.Chat, pb.ChatMessage):
        for field in message.DESCRIPTOR.fields:
            assert field.is_repeated or field.has_presence, f"{message.DESCRIPTOR.name}.{field.name}"


def test_numbers_are_kept_for_media_adapters_and_constraints() -> None:
    used = {field.number for field in pb.GenerateRequest.DESCRIPTOR.fields}
    assert used.isdisjoint(range(20, 45))
    with pytest.raises(ValueError, match="images"):
        pb.GenerateRequest(images=1)  # pyright: ignore[reportCallIssue]
