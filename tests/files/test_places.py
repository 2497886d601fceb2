"""Outputs that cannot work or would destroy something, symbolic links, and what killed processes leave behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from diffmorpher.errors import OutputError, WriteError
from diffmorpher.files import folders
from diffmorpher.files.atomic import cannot_write, replacing, temporary
from diffmorpher.files.clashes import check_apart, first_over, writes_over
from diffmorpher.files.films import check_output, read_settings, save_film
from diffmorpher.files.places import check_place, expanded, landing, same_place


def frames(count: int = 3, colour: str = "red") -> list[Image.Image]:
    return [Image.new("RGB", (32, 32), colour) for _ in range(count)]


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_the_first_output_over_an_input(tmp_path: Path) -> None:
    """As one by one, in a moment for thousands."""
    (tmp_path / "fr").mkdir()
    files = [tmp_path / "a.png", tmp_path / "fr" / "frame_0003.png", tmp_path / "gone.png"]
    for file in files[:2]:
        file.write_text("")
    os.link(files[0], tmp_path / "hard.png")
    (tmp_path / "soft.png").symlink_to("a.png")
    (tmp_path / "other").symlink_to("fr")
    cases = ["a.png", "hard.png", "soft.png", "gone.png", "fr", "other", "b.png", "fr.mp4", "fr/frame_0004.png", "new"]
    for name in cases:
        out = tmp_path / name
        assert (first_over([tmp_path / "x.mp4", out], files) == out) == any(writes_over(out, file) for file in files)
    began = time.perf_counter()
    many = [tmp_path / f"{i}.mp4" for i in range(2000)]
    assert first_over(many, [tmp_path / f"{i}.png" for i in range(4000)]) is None
    check_apart([(out, False) for out in many])
    assert time.perf_counter() - began < 5


# ---- places that cannot work


@pytest.mark.parametrize("where", ["/proc", "/sys", "/proc/self"])
def test_places_that_take_no_files_are_refused_with_the_reason(where: str) -> None:
    if not os.path.isdir(where):
        pytest.skip(f"there is no {where}")
    for action in (check_output, check_place, lambda out: save_film(frames(), out)):
        for name in ("a.mp4", "new/a.gif"):
            with pytest.raises(OutputError, match=f"'{where}' (takes no files|is read-only)") as caught:
                action(Path(where) / name)
            assert "free some space" not in str(caught.value)


@pytest.mark.parametrize("out", ["http://host/a.mp4", "https://host/a.mp4", "file:///tmp/a.mp4", "S3://bucket/frames"])
def test_addresses_are_refused(out: str) -> None:
    for place in (out, Path(out)):
        with pytest.raises(OutputError, match="is an address"):
            check_output(place)


def test_a_dash_is_no_place() -> None:
    with pytest.raises(OutputError, match="standard output"):
        check_output("-")


def test_a_pipe_or_device_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.mp4")
    (tmp_path / "b.mp4").symlink_to("/dev/null")
    for name in ("a.mp4", "b.mp4"):
        with pytest.raises(OutputError, match="no plain file"):
            check_output(tmp_path / name)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="no umask")
def test_files_that_nobody_can_write_to_are_said_before_and_leave_nothing(tmp_path: Path) -> None:
    """With umask 777, to whoever is not root; a child process, as root may give up being it."""
    script = (
        "import os, sys\n"
        "from diffmorpher.errors import OutputError\n"
        "from diffmorpher.files.atomic import temporary\n"
        "from diffmorpher.files.places import check_place\n"
        "from pathlib import Path\n"
        "if os.geteuid() == 0: os.setgid(65534), os.setuid(65534)\n"
        "os.umask(0o777)\n"
        "try: check_place('a.mp4')\n"
        "except OutputError as error: print(error)\n"
        "for is_folder in (False, True):\n"
        "    try:\n"
        "        with temporary(Path('.'), is_folder=is_folder): pass\n"
        "    except PermissionError: print('no right')\n"
    )
    tmp_path.chmod(0o777)
    for folder in tmp_path.parents:  # pytest's own, which others may not enter
        if folder != Path(folder.anchor) and folder.owner() == tmp_path.owner() and folder.name.startswith("pytest"):
            folder.chmod(0o755)
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    if "ModuleNotFoundError" in done.stderr or "Permission denied: '/" in done.stderr:
        pytest.skip("another user may not read this Python")
    assert "no right to be written; set another umask" in done.stdout, done.stderr
    assert done.stdout.count("no right\n") == 2 and names(tmp_path) == []


def test_a_colon_in_a_path_is_no_protocol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for out in ("10:30/film.mp4", "pipe:1/film.mp4", "a:b.mp4", "a:b.webm", "a:b.mov", "a:b.mkv"):
        save_film(frames(), out, metadata={"fps": 8})
        assert read_settings(out) == {"fps": 8}
        assert os.path.getsize(tmp_path / out) > 500


def test_a_tilde_is_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    assert expanded("~/film.mp4") == Path("/home/ann/film.mp4")
    assert expanded("a~/film.mp4") == Path("a~/film.mp4")


# ---- symbolic links


def test_the_film_lands_where_a_link_points(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for name in ("a.mp4", "frames"):
        link, target = tmp_path / name, tmp_path / "there" / name
        link.symlink_to(Path("there") / name)  # to nothing as yet, and then to a film
        for fps in (4, 8):
            assert save_film(frames(), link, metadata={"fps": fps}) == link
            assert link.is_symlink() and not target.is_symlink()
            assert read_settings(target) == read_settings(link) == {"fps": fps}
    assert names(tmp_path) == ["a.mp4", "frames", "there"] and names(tmp_path / "there") == ["a.mp4", "frames"]


def test_a_link_that_leads_to_itself_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").symlink_to("a.mp4")
    (tmp_path / "one").symlink_to("two")
    (tmp_path / "two").symlink_to("one")
    for name in ("a.mp4", "one"):
        with pytest.raises(OutputError, match=f"{name}' cannot be written .*symbolic links"):
            check_output(tmp_path / name)
        with pytest.raises(OSError, match="symbolic links"):
            landing(tmp_path / name)
        assert same_place(tmp_path / name, tmp_path / name)


# ---- frames of others


def test_frames_of_others_are_never_touched(tmp_path: Path) -> None:
    for i in range(1, 9):  # as ffmpeg names them
        Image.new("RGB", (32, 32), (i, 0, 0)).save(tmp_path / f"frame_{i:04d}.png")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    for action in (check_output, lambda out: save_film(frames(), out)):
        with pytest.raises(OutputError, match="holds frame_0001.png, which is no frame of this program"):
            action(tmp_path)
    assert before == {file.name: file.read_bytes() for file in tmp_path.iterdir()}


def test_one_frame_of_others_among_ours_is_enough(tmp_path: Path) -> None:
    save_film(frames(), tmp_path / "f", metadata={"fps": 8})
    check_output(tmp_path / "f")
    (tmp_path / "f" / "frame_0007.png").write_bytes(b"no picture")
    with pytest.raises(OutputError, match="holds frame_0007.png"):
        check_output(tmp_path / "f")


def test_frames_of_others_that_appear_during_the_work_stay(tmp_path: Path) -> None:
    save_film(frames(), tmp_path / "f")

    def coming():
        yield from frames(2, "blue")
        Image.new("RGB", (8, 8)).save(tmp_path / "f" / "frame_0009.png")

    with pytest.raises(OutputError, match=r"holds frame_0009\.png"):
        save_film(coming(), tmp_path / "f")
    assert names(tmp_path) == ["f"] and "frame_0009.png" in names(tmp_path / "f")
    with Image.open(tmp_path / "f" / "frame_0000.png") as image:
        assert image.getpixel((0, 0)) == (255, 0, 0)


def test_two_runs_into_one_new_folder_both_write(tmp_path: Path) -> None:
    def coming():
        yield from frames(2, "blue")
        save_film(frames(5), tmp_path / "f")  # another run is done before

    save_film(coming(), tmp_path / "f")
    assert names(tmp_path / "f") == ["frame_0000.png", "frame_0001.png"] and names(tmp_path) == ["f"]
    with Image.open(tmp_path / "f" / "frame_0000.png") as image:
        assert image.getpixel((0, 0)) == (0, 0, 255)


def test_a_folder_of_frames_alone_is_exchanged_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the moves of single frames a kill would leave old and new ones side by side."""
    save_film(frames(5), tmp_path / "f")
    (tmp_path / "f").chmod(0o750)
    monkeypatch.setattr(folders, "_replace_frames", lambda *_: pytest.fail("frames were moved one by one"))
    save_film(frames(2, "blue"), tmp_path / "f")
    assert names(tmp_path / "f") == ["frame_0000.png", "frame_0001.png"] and names(tmp_path) == ["f"]
    assert (tmp_path / "f").stat().st_mode & 0o777 == 0o750


@pytest.mark.parametrize("failing", range(6))
def test_a_move_that_fails_leaves_the_old_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
    folder = tmp_path / "f"
    save_film(frames(4), folder)
    (folder / "notes.txt").write_text("mine")  # so that the folder itself must stay
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    real, moved = os.replace, []

    def replace(source: Path, target: Path) -> None:
        if source.name.startswith("frame_"):
            moved.append(target)
            if len(moved) == failing + 1:  # of the four old frames and the two new ones
                raise OSError(5, "Input/output error")
        real(source, target)

    monkeypatch.setattr(folders.os, "replace", replace)
    with pytest.raises(WriteError, match="Input/output error"):
        save_film(frames(2, "blue"), folder)
    monkeypatch.undo()
    assert before == {file.name: file.read_bytes() for file in folder.iterdir()}


# ---- killed processes


_SLOW = """
import sys, time
from PIL import Image
from diffmorpher.files.films import save_film
def frames():
    yield Image.new("RGB", (32, 32))
    print("writing", flush=True)
    time.sleep(60)
save_film(frames(), sys.argv[1])
"""


@pytest.mark.parametrize("name", ["a.mp4", "frames"])
def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path: Path, name: str) -> None:
    process = subprocess.Popen([sys.executable, "-c", _SLOW, str(tmp_path / name)], stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "writing\n"
    (left,) = names(tmp_path)
    assert left.startswith(".diffmorpher-") and left.endswith(".part")
    save_film(frames(), tmp_path / "other.gif")
    assert left in names(tmp_path), "a process that lives keeps what it is at work on"
    process.kill()
    process.wait()
    assert left in names(tmp_path)
    save_film(frames(), tmp_path / name)
    assert names(tmp_path) == sorted([name, "other.gif"])


def test_files_of_others_that_look_alike_stay(tmp_path: Path) -> None:
    alike = [".diffmorpher-notes.part", ".diffmorpher-0123456789.part", "diffmorpher-01234567.part"]
    for name in alike:
        (tmp_path / name).write_text("mine")
    with replacing(tmp_path / "a"):
        pass
    assert names(tmp_path) == sorted([*alike, "a"])


def test_temporaries_of_one_process_do_not_meet(tmp_path: Path) -> None:
    with temporary(tmp_path) as one, temporary(tmp_path) as other, temporary(tmp_path, is_folder=True) as folder:
        assert one.is_file() and other.is_file() and folder.is_dir()
    assert names(tmp_path) == []


def test_the_true_reason_is_said() -> None:
    assert "free some space" in str(cannot_write("The film", OSError(28, "No space left on device")))
    assert "free some space" in str(cannot_write("The film", Exception("I/O error: File too large (os error 27)")))
    assert "free some space" not in str(cannot_write("The film", OSError(13, "Permission denied")))
