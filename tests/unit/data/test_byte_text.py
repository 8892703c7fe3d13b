"""`byte_text`: windows equal slices of the files, and no byte is in both splits."""

from __future__ import annotations

import os
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from disttrain.data import ByteText
from disttrain.errors import DataError

UNREADABLE = Path("/proc/self/mem")  # opens, also for root, and fails to read at its first byte


def contents(source: Path | str, split: str, **options: float) -> bytes:
    """All bytes of a split, joined from windows of one byte."""
    text = ByteText(str(source), 1, split, **options)
    first = text[0][0].tolist() if len(text) else []
    return bytes(first + [int(text[index][1]) for index in range(len(text))])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data(), st.binary(min_size=2, max_size=300))
def test_a_window_is_a_slice_and_its_targets_are_shifted_by_one(
    tmp_path: Path, data: st.DataObject, raw: bytes
) -> None:
    (tmp_path / "one").write_bytes(raw)
    context = data.draw(st.integers(1, len(raw) - 1))
    text = ByteText(str(tmp_path / "one"), context, "all")
    assert len(text) == (len(raw) - 1) // context
    assert text.tokens_per_sample == context
    for index in range(len(text)):
        inputs, targets = text[index]
        assert inputs.dtype == targets.dtype == torch.int64
        assert bytes(inputs.tolist()) == raw[index * context : (index + 1) * context]
        assert bytes(targets.tolist()) == raw[index * context + 1 : (index + 1) * context + 1]
    indices = data.draw(st.lists(st.integers(0, len(text) - 1), min_size=1, max_size=5))
    inputs, targets = text.gather_batch(indices)
    assert inputs.tolist() == [text[i][0].tolist() for i in indices]
    assert targets.tolist() == [text[i][1].tolist() for i in indices]
    with pytest.raises(IndexError):
        text[len(text)]


@pytest.mark.parametrize("share", [0.05, 0.5, 0.3])
def test_a_single_file_is_split_by_position(tmp_path: Path, share: float) -> None:
    raw = bytes(range(1, 201))
    named, alone = tmp_path / "named.txt", tmp_path / "folder" / "alone.txt"
    alone.parent.mkdir()
    for path, source in ((named, named), (alone, alone.parent)):
        path.write_bytes(raw)
        train, held_out = contents(source, "train", eval_share=share), contents(source, "eval", eval_share=share)
        assert train + held_out == contents(source, "all") == raw
        assert len(held_out) == round(200 * share)


def test_a_folder_is_split_by_file_according_to_the_hash_of_its_path(tmp_path: Path) -> None:
    files = {f"{folder}/{name}.txt": f"<{folder} {name}>" for folder in ("a", "b/c") for name in range(40)}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    ordered = sorted(files, key=lambda name: Path(name).parts)
    chosen = {name for name in files if zlib.crc32(name.encode()) / 2**32 < 0.25}
    assert 8 < len(chosen) < 32
    expected = {
        "eval": "".join(files[name] for name in ordered if name in chosen),
        "train": "".join(files[name] for name in ordered if name not in chosen),
        "all": "".join(files[name] for name in ordered),
    }
    for split, text in expected.items():
        assert contents(tmp_path, split, eval_share=0.25).decode() == text


def test_a_folder_is_the_same_at_any_location(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for root in (tmp_path / "plain", tmp_path / ".hidden" / "texts"):
        root.mkdir(parents=True)
        for name in "abc":
            (root / name).write_text(name * 5)
        assert contents(root, "all") == b"aaaaabbbbbccccc"
    monkeypatch.chdir(tmp_path / "plain")
    assert contents(".", "all") == contents("../plain", "all") == contents("../.hidden/texts", "all")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert contents("~/plain", "all") == b"aaaaabbbbbccccc"


def test_hidden_and_binary_files_of_a_folder_are_excluded_with_a_message(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "text.txt").write_bytes("Grüße, 世界".encode())
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "empty.txt").touch()
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "HEAD").write_text("ref")
    assert contents(tmp_path, "all") == b"caf\xe9" + "Grüße, 世界".encode()
    assert not caplog.records
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR")
    (tmp_path / "broken-link").symlink_to(tmp_path / "nowhere")
    assert contents(tmp_path, "all") == b"caf\xe9" + "Grüße, 世界".encode()
    assert "leaves out 1 binary file(s)" in caplog.text
    assert "picture.png" in caplog.text


def test_a_binary_file_that_is_named_is_used_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(bytes(50))
    assert contents(tmp_path / "raw", "all") == bytes(50)


def test_a_file_name_that_is_not_text_is_accepted(tmp_path: Path) -> None:
    for name in (b"caf\xe9", b"other"):
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).write_bytes(name)
    assert contents(tmp_path, "train", eval_share=1e-6) == b"caf\xe9other"


def test_the_standard_library_has_text_for_both_splits() -> None:
    train, held_out = (ByteText("python-stdlib", 128, split) for split in ("train", "eval"))
    assert len(train) > 20_000, "about five million bytes and more"
    assert 0.01 < len(held_out) / len(train) < 0.15
    everything = bytes(ByteText("python-stdlib", 128, "all")._bytes.numpy())
    assert b"def read_text(self, " in everything, "pathlib"
    assert b"class TestCase" in everything, "unittest, but not the tests of the library"
    assert everything.count(b"unittest.main()") < 20
    assert len(everything) == len(train._bytes) + len(held_out._bytes)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            {"source": "nowhere/at/all"},
            "byte_text cannot read 'nowhere/at/all'.\n  problem: there is no file or folder of this name",
        ),
        (
            {"source": "short.txt", "context": 10},
            "window of 10 bytes.\n  problem: 10 bytes in the split 'all' of short",
        ),
        ({"source": "short.txt", "split": "test"}, "split='test'"),
        ({"source": "short.txt", "context": 0}, "context=0"),
        ({"source": "short.txt", "eval_share": 1.0}, "eval_share=1.0"),
        ({"source": "empty"}, "0 bytes in the split 'all' of empty, which has 0 text file(s)"),
        (
            {"source": "two", "split": "eval", "eval_share": 1e-6},
            "which has 2 text file(s)\n  fix: provide more text, a smaller context, or another eval_share",
        ),
        ({"source": str(UNREADABLE)}, f"byte_text cannot read {UNREADABLE}.\n  problem: Input/output error"),
        (
            {"source": "linked"},
            "linked/mem.\n  problem: Input/output error\n  fix: make it readable, or use a source without it",
        ),
    ],
)
def test_text_that_cannot_be_read_or_split_is_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, str | float], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("short.txt").write_bytes(b"0123456789")
    for folder in ("empty", "two", "linked"):
        Path(folder).mkdir()
    for name in "ab":
        Path("two", name).write_text("text")
    Path("linked", "mem").symlink_to(UNREADABLE)
    if not UNREADABLE.exists() and "mem" in said:
        pytest.skip("needs Linux's /proc for a file that root cannot read")
    with pytest.raises(DataError) as refused:
        ByteText(**{"context": 4, "split": "all"} | arguments)  # type: ignore[arg-type]
    assert said in str(refused.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_without_permission_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("0123456789")
    (tmp_path / "secret").chmod(0)
    for source in (tmp_path, tmp_path / "secret"):
        with pytest.raises(DataError, match="Permission denied"):
            ByteText(str(source), 4, "all")
