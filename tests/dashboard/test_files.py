"""The files of a sandbox: what goes in and out, is edited, and is never more than text here."""

from __future__ import annotations

import base64
import hashlib
import shlex
from pathlib import Path
from urllib.parse import quote

import pytest
from playwright.sync_api import Error, FileChooser, FilePayload, Locator, Page, Route, expect

from tests.dashboard.conftest import Person, check_everywhere

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="
)
SCRIPT = "<!doctype html><title>not run</title><script>document.title = 'run'</script>"


@pytest.fixture
def place(request: pytest.FixtureRequest, ada: Person, sandbox_id: str) -> str:
    """A new directory in the sandbox."""
    path = f"/srv/{request.node.name}"
    ada.sh(sandbox_id, f"mkdir {path}")
    return path


def opened(ada: Person, sandbox_id: str, path: str) -> Page:
    page = ada.open(f"/sandboxes/{sandbox_id}/files?path={quote(path)}")
    expect(page.get_by_role("navigation", name="Path")).to_be_visible()
    return page


def row(page: Page, name: str) -> Locator:
    return page.get_by_role("row").filter(has=page.get_by_role("link", name=name, exact=True))


def editor(page: Page) -> Locator:
    return page.get_by_role("textbox", name="Content of")


def drop(zone: Locator, *paths: Path) -> None:
    """Files and directories of this machine, as a mouse drops them."""
    zone.scroll_into_view_if_needed()
    box = zone.bounding_box()
    assert box is not None
    event = {
        "x": box["x"] + box["width"] / 2,
        "y": box["y"] + box["height"] / 2,
        "data": {"items": [], "files": [str(path) for path in paths], "dragOperationsMask": 1},
    }
    session = zone.page.context.new_cdp_session(zone.page)
    for kind in ("dragEnter", "dragOver", "drop"):
        session.send("Input.dispatchDragEvent", {"type": kind, **event})
    session.detach()


def type_over(page: Page, text: str) -> None:
    editor(page).click()
    page.keyboard.press("Control+a")
    page.keyboard.insert_text(text)


def test_files_go_up_and_come_down(
    ada: Person, sandbox_id: str, place: str, tmp_path: Path
) -> None:
    page = opened(ada, sandbox_id, place)
    expect(page.get_by_role("heading", name="Nothing in here")).to_be_visible()
    check_everywhere(page)
    content = bytes(range(256)) * 4096
    (tmp_path / "a b.bin").write_bytes(content)
    (tmp_path / "empty").touch()
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Upload", exact=True).click()
    files: FileChooser = chooser.value
    files.set_files([tmp_path / "a b.bin", tmp_path / "empty"])
    expect(row(page, "a b.bin")).to_contain_text("1 MiB")
    expect(page.get_by_text("2 files uploaded")).to_be_visible()
    inside = ada.sh(sandbox_id, f"cd {place}; sha256sum <'a b.bin'; ls")
    assert inside == f"{hashlib.sha256(content).hexdigest()}  -\na b.bin\nempty\n"

    (tmp_path / "folder/hollow").mkdir(parents=True)
    (tmp_path / "folder/deep").write_text("one")
    (tmp_path / "empty").write_text("two")
    drop(page.get_by_role("region", name="Files"), tmp_path / "folder", tmp_path / "empty")
    asked = page.get_by_role("dialog", name="Upload and replace?")
    expect(asked).to_contain_text("empty")
    asked.get_by_role("button", name="Upload and replace").click()
    expect(row(page, "empty")).to_contain_text("3 B")
    expect(row(page, "folder")).to_be_visible()
    inside = ada.sh(sandbox_id, f"cd {place}; cat folder/deep empty; ls folder")
    assert inside == "onetwodeep\nhollow\n"

    with page.expect_download() as download:
        page.get_by_role("link", name="Download a b.bin").click()
    assert download.value.suggested_filename == "a b.bin"
    assert Path(download.value.path()).read_bytes() == content
    with page.expect_download() as download:
        page.get_by_title("All of it, as a tar").click()
    assert download.value.suggested_filename == f"{Path(place).name}.tar"
    assert b"folder/deep" in Path(download.value.path()).read_bytes()


def test_an_upload_is_called_off(ada: Person, sandbox_id: str, place: str) -> None:
    page = opened(ada, sandbox_id, place)
    page.route(
        "**/files?path=*",
        lambda route: None if route.request.method == "PUT" else route.continue_(),
    )
    page.get_by_label("Files to upload").set_input_files(
        FilePayload(name="slow", mimeType="text/plain", buffer=b"x")
    )
    uploads = page.get_by_role("region", name="Uploads")
    expect(uploads).to_contain_text(f"{place}/slow")
    check_everywhere(page)
    uploads.get_by_role("button", name=f"Cancel {place}/slow").click()
    expect(uploads).to_contain_text("Uploads cancelled")
    uploads.get_by_role("button", name="Close").click()
    expect(uploads).to_have_count(0)
    page.unroute_all()


def test_folders_and_names(ada: Person, sandbox_id: str, place: str) -> None:
    page = opened(ada, sandbox_id, place)
    page.get_by_role("button", name="New folder").click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_label("Name").fill("../up")
    dialog.get_by_role("button", name="Create").click()
    expect(dialog).to_contain_text("It has a part that is . or ..")
    dialog.get_by_label("Name").fill("one/two")
    dialog.get_by_role("button", name="Create").click()
    page.get_by_role("link", name="one", exact=True).click()
    page.get_by_role("button", name="Rename or move two").click()
    dialog.get_by_label("Name").fill("three")
    dialog.get_by_role("button", name="Move").click()
    expect(row(page, "three")).to_be_visible()
    ada.sh(sandbox_id, f"echo deep >{place}/one/three/.hidden")
    page.get_by_role("link", name="three", exact=True).click()
    expect(page.get_by_role("heading", name="Only hidden files")).to_be_visible()
    page.get_by_role("checkbox", name="Hidden files").check()
    expect(row(page, ".hidden")).to_contain_text("root:root")
    page.go_back()
    expect(row(page, "three")).to_contain_text("drwxr-xr-x")
    page.get_by_role("navigation", name="Path").get_by_role("link", name=Path(place).name).click()
    page.get_by_role("button", name="Delete one").click()
    expect(dialog).to_contain_text(f"{place}/one")
    expect(dialog).to_contain_text("All that is in it is deleted")
    dialog.get_by_role("button", name="Delete folder").click()
    expect(page.get_by_role("heading", name="Nothing in here")).to_be_visible()
    assert ada.sh(sandbox_id, f"ls -A {place}") == ""


def test_a_text_is_edited_and_nobody_elses_work_is_lost(
    ada: Person, sandbox_id: str, place: str
) -> None:
    path = f"{place}/main.py"
    ada.sh(sandbox_id, rf"printf 'one\r\ntwo\r\n' >{path}; chmod 750 {path}")
    page = opened(ada, sandbox_id, path)
    expect(editor(page)).to_contain_text("two")
    check_everywhere(page)
    editor(page).click()
    page.keyboard.press("Control+End")
    page.keyboard.type("three")
    expect(page.get_by_text("Not saved yet")).to_be_visible()
    page.keyboard.press("Control+s")
    expect(page.get_by_text("Not saved yet")).to_have_count(0)
    said = ada.sh(sandbox_id, f"base64 {path}; stat -c %a {path}").split()
    assert (base64.b64decode(said[0]), said[1]) == (b"one\r\ntwo\r\nthree", "750")

    type_over(page, "mine")
    page.get_by_role("link", name="Processes").click()
    asked = page.get_by_role("dialog", name="Leave without saving?")
    expect(asked).to_contain_text(path)
    asked.get_by_role("button", name="Cancel").click()
    expect(editor(page)).to_contain_text("mine")
    ada.sh(sandbox_id, f"echo theirs, which is longer >{path}")
    page.get_by_role("button", name="Save").click()
    asked = page.get_by_role("dialog", name="Overwrite file?")
    expect(asked).to_contain_text("changed in the sandbox since")
    asked.get_by_role("button", name="Cancel").click()
    assert ada.sh(sandbox_id, f"cat {path}") == "theirs, which is longer\n"
    page.get_by_role("button", name="Save").click()
    asked.get_by_role("button", name="Overwrite file").click()
    expect(page.get_by_text("Not saved yet")).to_have_count(0)
    assert ada.sh(sandbox_id, f"cat {path}") == "mine"

    type_over(page, "lost")
    with page.expect_event("dialog") as warning:
        page.evaluate("void setTimeout(() => location.reload())")
    assert warning.value.type == "beforeunload"
    warning.value.dismiss()
    page.get_by_role("link", name=Path(place).name).click()
    page.get_by_role("dialog").get_by_role("button", name="Leave without saving").click()
    expect(row(page, "main.py")).to_be_visible()
    assert ada.sh(sandbox_id, f"cat {path}") == "mine"
    # A link's file is saved where it is.
    ada.sh(sandbox_id, f"ln -s main.py {place}/link")
    page.get_by_role("button", name="Reload").click()
    row(page, "link").get_by_role("link").first.click()
    type_over(page, "linked")
    page.keyboard.press("Control+s")
    expect(page.get_by_text("Not saved yet")).to_have_count(0)
    assert ada.sh(sandbox_id, f"readlink {place}/link; cat {path}") == "main.py\nlinked"
    # The keyboard leaves the editor as it came.
    editor(page).focus()
    page.keyboard.press("Tab")
    expect(editor(page)).not_to_be_focused()


def test_names_and_contents_are_no_markup(ada: Person, sandbox_id: str, place: str) -> None:
    names = ["a\u202etxt.exe", "<img src=x onerror=alert(1)>", "two\nlines", "n" * 250, "%2e#?&"]
    made = " ".join(shlex.quote(name) for name in names)
    ada.sh(
        sandbox_id,
        f"cd {place}; touch {made}; printf 'x\\377' | xargs touch; printf 'x\\376' | xargs touch;"
        f"echo {shlex.quote(SCRIPT)} >page.html; cp page.html picture.png; ln -s /nowhere broken;"
        f"printf '\\211PNG\\r\\n\\032\\n<script>' >broken.png; mkfifo pipe; seq 300000 >long",
    )
    at = f"/sandboxes/{sandbox_id}/files"
    ada.context.request.put(
        f"{ada.server.url}/v1{at}?path={place}/good",
        data=PNG,
        headers={"X-CSRF-Token": ada.csrf_token},
    )
    page = opened(ada, sandbox_id, place)
    expect(row(page, "a⟨U+202E⟩txt.exe")).to_be_visible()
    expect(row(page, "two⟨U+000A⟩lines")).to_be_visible()
    expect(row(page, "x\ufffd")).to_have_count(2)
    expect(row(page, "broken")).to_contain_text("→ /nowhere")
    check_everywhere(page)
    for name in names[1], names[4]:
        page.get_by_role("link", name=name, exact=True).click()
        expect(page.get_by_role("navigation", name="Path")).to_contain_text(name)
        expect(editor(page)).to_have_text("")
        page.go_back()
    page.get_by_role("button", name="Delete two⟨U+000A⟩lines").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete file").click()
    expect(row(page, "two⟨U+000A⟩lines")).to_have_count(0)

    def look(name: str) -> None:
        page.goto(ada.server.page_url(f"{at}?path={place}/{name}"))

    for name in "page.html", "picture.png":
        look(name)
        expect(editor(page)).to_contain_text("<script>document.title = 'run'</script>")
        expect(page.get_by_role("img")).to_have_count(0)
    look("broken.png")
    expect(page.get_by_role("region", name="Bytes")).to_contain_text("<script>")
    check_everywhere(page)
    look("good")
    expect(page.get_by_role("img", name="good")).to_have_js_property("naturalWidth", 1)
    look("pipe")
    expect(page.get_by_text("This is no ordinary file")).to_be_visible()
    look("long")
    expect(page.get_by_text("The first 1 MiB is shown")).to_be_visible()
    expect(page.get_by_role("button", name="Save")).to_have_count(0)
    look("not/there")
    expect(page.get_by_role("heading", name="There is no such file")).to_be_visible()


def shown(route: Route) -> None:
    """Answers as the server does, but not to be kept, and as a page."""
    answer = route.fetch()
    headers = {**answer.headers, "content-type": "text/html"}
    del headers["content-disposition"]
    route.fulfill(response=answer, headers=headers)


def test_content_that_is_led_to_runs_nothing(ada: Person, sandbox_id: str, place: str) -> None:
    ada.sh(sandbox_id, f"echo {shlex.quote(SCRIPT)} >{place}/page.html")
    page = ada.context.new_page()
    url = f"{ada.server.url}/v1/sandboxes/{sandbox_id}/files?path={place}/page.html"
    with page.expect_download() as download, pytest.raises(Error, match="Download is starting"):
        page.goto(url)
    assert download.value.suggested_filename == "page.html"
    assert page.title() != "run"
    # Even if a browser did show it.
    page.route(url, shown)
    page.goto(url)
    assert page.title() == "not run"


def test_a_sandbox_that_sleeps_shows_no_files(ada: Person, sandbox_id: str) -> None:
    page = opened(ada, sandbox_id, "/etc")
    page.get_by_role("button", name="Pause").click()
    expect(page.get_by_role("heading", name="Its files cannot be seen now")).to_be_visible()
    expect(page.get_by_role("button", name="Resume")).to_be_enabled()
    check_everywhere(page)
    page.get_by_role("button", name="Resume").click()
    expect(row(page, "passwd")).to_be_visible()
