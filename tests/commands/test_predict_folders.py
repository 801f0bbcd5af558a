"""Calls of `python -m semimoe_fast.predict` that are interrupted, fail or meet each other in a folder."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
from predictions import call, failing, save_image, save_model
from refusals import refused

from semimoe_fast import predict
from semimoe_fast.data.folders import read_mask
from semimoe_fast.errors import explain
from semimoe_fast.inference import open_for
from semimoe_fast.inference.finished import Finished, state_of

pytest.importorskip("tyro", reason="commands read their options with tyro")


def test_one_call_at_a_time_predicts_into_a_folder(tmp_path: Path) -> None:
    model, image = save_model(tmp_path / "model"), save_image(tmp_path / "images" / "a.tif", 40, 50)
    with Finished(tmp_path, {}) as other:
        other.begin()
        for given in (image, image.parent):
            assert refused(call, model, given, tmp_path) == (
                f"{tmp_path}: another process is predicting into this folder; wait until it ends, stop it, or give "
                "another --out"
            )
        other.add(state_of(image))
    assert refused(call, model, image, tmp_path, overwrite=False) == (
        f"{tmp_path / '.predict.jsonl'} counts images of an interrupted call with other options or images (1): repeat "
        "that call, give another --out, or --overwrite to forget it"
    )
    call(model, image, tmp_path)
    assert not (tmp_path / ".predict.jsonl").exists()


def test_an_interrupted_call_on_a_single_image_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, image, out = save_model(tmp_path / "model"), save_image(tmp_path / "a.tif", 40, 50), tmp_path / "out"

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(predict, "write_png", interrupt)
        with pytest.raises(KeyboardInterrupt):
            call(model, image, out, "--probability", overwrite=False)
    assert sorted(path.name for path in out.rglob("*.*")) == [".predict.jsonl", "a.ome.tif"]
    assert refused(call, model, image, out, "--probability", "--tta", overwrite=False).startswith(
        f"{out}/probability/a.ome"
    )
    call(model, image, out, "--probability", overwrite=False)
    assert sorted(path.name for path in out.rglob("*.*")) == ["a.ome.tif", "a.png"]


def test_files_that_are_no_images_are_said(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model, images = save_model(tmp_path / "model"), tmp_path / "images"
    save_image(images / "a.tif", 40, 50)
    for name in ("Thumbs.db", ".DS_Store"):
        (images / name).touch()
    call(model, images, tmp_path / "one")
    assert "left out" not in capsys.readouterr().err
    for name in ("scan.heic", "report.pdf"):
        (images / name).touch()
    call(model, images, tmp_path / "two")
    said = f"warning: {images}: left out, as their names do not end as those of images (2): report.pdf, scan.heic\n"
    assert said in capsys.readouterr().err
    (images / "a.tif").unlink()
    assert refused(call, model, images, tmp_path / "three") == (
        f"{images} holds no image (it has report.pdf, scan.heic): put PNG, TIFF, BMP or JPEG files there or correct "
        "the path"
    )


def test_a_resumed_call_replaces_only_what_it_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, out = save_model(tmp_path / "model"), tmp_path / "out"
    image = save_image(tmp_path / "images" / "a.tif", 40, 50)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(predict, "write_png", interrupt)
        with pytest.raises(KeyboardInterrupt, match="the same command goes on"):
            call(model, image.parent, out, overwrite=False)
    save_image(tmp_path / "images" / "b.tif", 40, 50)
    (out / "b.png").write_text("of the user")
    (out / "a.png").write_text("of the interrupted call")
    assert refused(call, model, image.parent, out, overwrite=False).startswith(
        f"{out / 'b.png'} exists: give another --out"
    )
    (out / "b.png").unlink()
    call(model, image.parent, out, overwrite=False)
    assert sorted(path.name for path in out.iterdir()) == ["a.png", "b.png"]
    assert (out / "a.png").read_bytes().startswith(b"\x89PNG")


def test_damaged_images_fail_alone_and_the_same_call_goes_on_with_them(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images that are done count only for the same checkpoint, options and files."""
    model, images, out = save_model(tmp_path / "model"), tmp_path / "images", tmp_path / "out"
    for name in ("a.tif", "b.tif", "c.tif"):
        save_image(images / name, 70, 90)
    whole = (images / "b.tif").read_bytes()
    (images / "b.tif").write_bytes(whole[:-4000])
    opened: list[str] = []
    open_one = predict.open_for
    monkeypatch.setattr(predict, "open_for", lambda path, *rest: opened.append(path.name) or open_one(path, *rest))

    def names() -> list[str]:
        found, opened[:] = list(opened), []
        return found

    error = failing(capsys, model, images, out, "--probability")
    assert f"warning: {images / 'b.tif'} is " in error
    assert error.splitlines()[-1] == "error: 1 of 3 images failed: b.tif"
    assert names() == ["a.tif", "b.tif", "c.tif"]
    assert sorted(path.name for path in out.iterdir()) == [".predict.jsonl", "a.png", "c.png", "probability"]
    assert {path.name for path in (out / "probability").iterdir()} == {"a.ome.tif", "c.ome.tif"}
    (images / "b.tif").write_bytes(whole)
    (images / "c.tif").rename(tmp_path / "c.tif")  # vanishes after the list was made
    plan = predict.plan
    monkeypatch.setattr(predict, "plan", lambda config: plan(config) | {images / "c.tif": {"mask": out / "c.png"}})
    error = failing(capsys, model, images, out, "--probability")
    assert f"warning: {images / 'c.tif'}: no such image file; give a regular file; going on with" in error
    assert names() == ["b.tif", "c.tif"]
    (tmp_path / "c.tif").rename(images / "c.tif")
    (images / "c.tif").touch()
    monkeypatch.setattr(predict, "plan", plan)
    call(model, images, out, "--probability")
    assert names() == ["c.tif"]
    assert "predicted: 2; going on with the others\nimages predicted to" in capsys.readouterr().out
    assert not (out / ".predict.jsonl").exists()
    call(model, images, out, "--probability")
    assert names() == ["a.tif", "b.tif", "c.tif"]  # existing files are replaced

    (images / "c.tif").write_bytes(whole[:-4000])
    failing(capsys, model, images, out)
    names()
    failing(capsys, model, images, out, "--threshold", "0.4")
    assert names() == ["a.tif", "b.tif", "c.tif"]
    save_image(images / "a.tif", 80, 90)
    failing(capsys, model, images, out, "--threshold", "0.4")
    assert names() == ["a.tif", "c.tif"]


def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path) -> None:
    """Here a limit on the size of files; a full disk is the same error of the same call."""
    model, image = save_model(tmp_path / "model"), save_image(tmp_path / "a.tif", 200, 200)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            call(model, image, tmp_path / "out", "--probability")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert explain(caught.value).endswith("out/probability/.a.ome.tif.part: File too large; free space on its disk")
    assert {path.name for path in (tmp_path / "out").rglob("*")} == {"probability", ".predict.jsonl"}


def test_a_name_that_is_too_long_for_the_file_system_fails_alone(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The image has the longest name there is, and no room for the ending of an unfinished file."""
    model, images, out = save_model(tmp_path / "model"), tmp_path / "images", tmp_path / "out"
    long = save_image(images / f"{'a' * 251}.tif", 40, 50)
    save_image(images / "b.tif", 40, 50)
    error = failing(capsys, model, images, out)
    assert "File name too long; give another path; going on with the other images" in error
    assert error.splitlines()[-1] == f"error: 1 of 2 images failed: {long.name}"
    assert (out / "b.png").exists()


def test_an_image_that_changes_after_it_was_opened_is_predicted_again(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, images, out = save_model(tmp_path / "model"), tmp_path / "images", tmp_path / "out"
    save_image(images / "a.tif", 40, 50)
    (images / "b.tif").write_bytes(b"damaged")  # so that the record of the call stays
    opened: list[str] = []

    def open_and_change(path: Path, *rest: object) -> object:
        reader = open_for(path, *rest)
        opened.append(path.name)
        save_image(images / "new.tif", 48, 64).replace(path)
        return reader

    with monkeypatch.context() as patched:
        patched.setattr(predict, "open_for", open_and_change)
        failing(capsys, model, images, out)
    assert opened == ["a.tif"]
    failing(capsys, model, images, out, overwrite=False)
    assert read_mask(out / "a.png").shape == (48, 64)


def test_one_squashed_image_is_said_once(tmp_path, capsys):
    model = save_model(tmp_path / "model", sampling="resize")
    save_image(tmp_path / "images" / "a.tif", 40, 400)
    call(model, tmp_path / "images", tmp_path / "out", tiles=False)
    told = capsys.readouterr().err
    assert "a.tif is 400 x 40 pixels and resized" in told
    assert "more" not in told.replace("shows more", "")


def test_a_single_image_that_fails_leaves_no_list(tmp_path):
    model, image = save_model(tmp_path / "model"), save_image(tmp_path / "a.tif", 70, 90)
    image.write_bytes(image.read_bytes()[:-4000])
    assert "a.tif is truncated" in refused(call, model, image, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
