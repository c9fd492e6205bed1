"""Downloads from servers that break off, lie, and hand out archives that nobody should unpack.

All servers are local. Whatever goes wrong is one error; no half dataset and no wrong file is ever left."""
import errno, hashlib, io, json, os, re, shutil, stat, tarfile, threading, zipfile
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
import pytest
from filelock import FileLock
from mdd_bench.data import download as module
from mdd_bench.data.download import (
    CC_BY, NOTE, SOURCES, DownloadError, Resume, Source, download, list_sources)
from mdd_bench.errors import DiskError, FullDiskError

FILES = {f"{cls}/train/good/{i:03d}.png": os.urandom(40_000) for cls in "ab" for i in range(3)}

# --- archives

def tar_of(files, mode="w", top=""):
    "The bytes of a tar: {name: content, or a TarInfo without content}."
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as tar:
        for name, content in files.items():
            info = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(top + name)
            data = b"" if info is content else content
            if info is not content: info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()

def zip_of(files):
    "The bytes of a zip: {name: content}, or {ZipInfo: content}."
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        for name, content in files.items(): file.writestr(name, content)
    return out.getvalue()

def tar_entry(name, kind, target=""):
    "An entry of a tar that is no plain file."
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info

def zip_link(name):
    "An entry of a zip that is a symbolic link."
    info = zipfile.ZipInfo(name)
    info.create_system, info.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    return info

GOOD = tar_of(FILES, "w:gz")

# --- a server that does as it is told

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        site, wanted = self.server.site, self.headers.get("Range")
        site.asked.append((wanted, self.headers.get("If-Range")))
        if site.codes: return self.refuse(site.codes.pop(0))
        start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) if wanted and site.ranges else 0
        if self.headers.get("If-Range", site.etag) != site.etag: start = 0
        if start >= len(site.content) > 0: return self.refuse(416, f"bytes */{len(site.content)}")
        self.answer(start)

    def answer(self, start):
        site, end = self.server.site, len(self.server.site.content)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(end - start + site.lie))
        self.send_header("Content-Type", site.kind)
        if site.etag: self.send_header("ETag", site.etag)
        if start: self.send_header("Content-Range", f"bytes {start + site.shift}-{end - 1}/{end}")
        self.end_headers()
        sent = site.content[start:][:site.cuts.pop(0) if site.cuts else None]
        site.sent += len(sent)
        self.wfile.write(sent)

    def refuse(self, code, content_range=None):
        self.send_response(code)
        self.send_header("Content-Length", "0")
        if content_range: self.send_header("Content-Range", content_range)
        self.end_headers()

    def log_message(self, *args): pass

@pytest.fixture
def site(monkeypatch):
    """What the server does: `content`, and how it fails.

    `cuts`: bytes after which the next answers break off; `codes`: of the next answers; `lie`: added to the
    announced length; `shift`: added to where a rest is said to begin."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.site = SimpleNamespace(
        content=GOOD, ranges=True, cuts=[], codes=[], lie=0, shift=0, etag='"v1"', kind="application/x-tar",
        asked=[], sent=0, url=f"http://127.0.0.1:{server.server_port}/data.tar.gz")
    threading.Thread(target=server.serve_forever, args=(.01,), daemon=True).start()
    yield server.site
    server.shutdown()
    server.server_close()

def source_of(site, **fields):
    "The row of what the server hands out, with the right checksum."
    checksum = hashlib.sha256(site.content).hexdigest()
    page = "https://example.org/drawn"
    row = Source("drawn", "Drawn", 1, page, CC_BY, "nobody", site.url, "drawn.tar", checksum)
    return replace(row, **fields)

def get(site, out, tries=3, **fields):
    "The folder of the server's dataset; nothing is waited for."
    return download(source_of(site, **fields), out, accept_licence=True, tries=tries, pause=0)

def failure(site, out, **fields):
    "The error of a download that fails."
    with pytest.raises(DownloadError) as e: get(site, out, **fields)
    assert "\n" not in str(e.value)
    return str(e.value)

def content_of(folder):
    "{name: bytes} of the files of a dataset, without the note."
    files = [p for p in folder.rglob("*") if p.is_file() and p.name != NOTE]
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}

def left(out):
    "What there is besides locks; what is on its way by its path."
    on_its_way = [f"drawn.download/{p.name}" for p in out.glob("drawn.download/*")]
    names = [p.name for p in out.iterdir() if not p.name.endswith(".lock")]
    if on_its_way: names.remove("drawn.download")
    return sorted(names + on_its_way)

def put(out, name, content):
    "Something that an earlier download left."
    (out/"drawn.download").mkdir(exist_ok=True)
    (out/"drawn.download"/name).write_bytes(content)

KEPT = ["drawn.download/drawn.tar"]      # left, where an archive has the right checksum and is not unpacked

# --- all is well

def test_a_dataset_is_fetched_once(site, tmp_path):
    folder = get(site, tmp_path)
    assert folder == tmp_path/"drawn" and content_of(folder) == FILES and left(tmp_path) == ["drawn"]
    note = json.loads((folder/NOTE).read_text())
    assert note["checksum"] == source_of(site).checksum and note["licence"] == "CC BY 4.0"
    assert get(site, tmp_path) == folder and len(site.asked) == 1

@pytest.mark.parametrize("archive", [
    tar_of(FILES), tar_of(FILES, "w:xz"), tar_of(FILES, top="Data_1.0/"), tar_of(FILES, top="./"),
    zip_of(FILES),
], ids=["tar", "xz", "top folder", "dots", "zip"])
def test_kinds_of_archives(site, tmp_path, archive):
    site.content = archive
    assert content_of(get(site, tmp_path)) == FILES

def test_md5_where_nothing_better_is_published(site, tmp_path):
    checksum = "md5:" + hashlib.md5(site.content).hexdigest()
    assert content_of(get(site, tmp_path, checksum=checksum))
    assert "MD5 hash" in failure(site, tmp_path, name="other", checksum="md5:" + 32*"0")

def test_what_is_unpacked_may_be_changed(site, tmp_path):
    "MVTec's archives have folders that nobody may write to."
    folder = tar_entry("a", tarfile.DIRTYPE)
    folder.mode = 0o555
    site.content = tar_of({"a": folder} | FILES)
    modes = [p.stat().st_mode for p in get(site, tmp_path).rglob("*")]
    assert all(mode & stat.S_IWUSR for mode in modes)

# --- bad lines

def test_it_goes_on_after_each_break(site, tmp_path):
    "No byte is asked for twice, and a break that brought something does not count as a failure."
    site.cuts = 8*[20_000]
    assert content_of(get(site, tmp_path, tries=2)) == FILES
    assert site.sent == len(site.content)
    assert [wanted for wanted, _ in site.asked] == [None, *(f"bytes={20_000*i}-" for i in range(1, 9))]
    assert {version for _, version in site.asked[1:]} == {'"v1"'}

def test_the_next_start_goes_on(site, tmp_path):
    site.cuts = [70_000, 0, 0]
    message = failure(site, tmp_path)
    assert f"broke off after 70000 of {len(site.content)} bytes" in message and "70 kB are kept" in message
    assert left(tmp_path) == ["drawn.download/drawn.tar.part", "drawn.download/drawn.tar.part.version"]
    assert content_of(get(site, tmp_path)) == FILES
    assert site.sent == len(site.content) and site.asked[-1] == ("bytes=70000-", '"v1"')
    assert left(tmp_path) == ["drawn"]

def test_a_server_without_ranges_sends_all_again(site, tmp_path):
    site.ranges, site.cuts = False, [70_000]
    assert content_of(get(site, tmp_path)) == FILES
    assert site.sent == 70_000 + len(site.content)

def test_a_file_that_changed_is_fetched_from_its_start(site, tmp_path):
    site.cuts = [70_000, 0, 0]
    failure(site, tmp_path)
    site.content, site.etag = tar_of({"a/new.png": b"new", "b/new.png": b"new"}), '"v2"'
    assert content_of(get(site, tmp_path)) == {"a/new.png": b"new", "b/new.png": b"new"}
    assert site.asked[-1] == ("bytes=70000-", '"v1"')

@pytest.mark.parametrize("etag, modified, version", [
    ('"v1"', "Monday", '"v1"'), ('W/"v1"', "Monday", "Monday"), ("", "Monday", "Monday"), ("", "", ""),
])
def test_weak_versions_are_not_relied_on(etag, modified, version):
    assert module.version_of({"ETag": etag, "Last-Modified": modified}) == version

def test_a_rest_that_begins_elsewhere_is_not_taken(site, tmp_path):
    site.cuts, site.shift = [70_000], 1000
    assert content_of(get(site, tmp_path)) == FILES
    assert [wanted for wanted, _ in site.asked] == [None, "bytes=70000-", None]

def test_a_part_that_is_longer_than_the_file_is_given_up(site, tmp_path):
    put(tmp_path, "drawn.tar.part", bytes(len(site.content) + 5))
    assert content_of(get(site, tmp_path)) == FILES

def test_a_part_that_is_whole_needs_no_byte(site, tmp_path):
    put(tmp_path, "drawn.tar.part", site.content)
    assert content_of(get(site, tmp_path)) == FILES and site.sent == 0

def test_a_busy_server_is_asked_again(site, tmp_path):
    site.codes = [503, 429]
    assert content_of(get(site, tmp_path)) == FILES and len(site.asked) == 3

# --- servers that lie, or have no such file

def test_too_large_a_length(site, tmp_path):
    "What was announced never comes; an honest answer about the rest ends the matter."
    site.lie = 100
    assert content_of(get(site, tmp_path)) == FILES and site.sent == len(site.content)

def test_too_large_a_length_without_ranges(site, tmp_path):
    site.lie, site.ranges = 100, False
    size = len(site.content)
    assert f"broke off after {size} of {size + 100} bytes" in failure(site, tmp_path)
    assert len(site.asked) == 3 and "drawn" not in left(tmp_path)

@pytest.mark.parametrize("length, content", [(-100, GOOD), (0, GOOD[:5000] + b"x" + GOOD[5001:]), (0, b"")],
                         ids=["too short", "one byte changed", "empty"])
def test_wrong_content_is_removed(site, tmp_path, length, content):
    expected, site.lie, site.content = source_of(site).checksum, length, content
    found = hashlib.sha256(content[:len(content) + length]).hexdigest()
    message = failure(site, tmp_path, checksum=expected)
    assert "drawn.tar" in message and expected in message and found in message and "example.org" in message
    assert left(tmp_path) == []

def test_an_archive_that_was_put_there_is_checked_too(site, tmp_path):
    put(tmp_path, "drawn.tar", site.content)
    assert content_of(get(site, tmp_path)) == FILES and not site.asked
    shutil.rmtree(tmp_path/"drawn")
    put(tmp_path, "drawn.tar", b"wrong")
    assert content_of(get(site, tmp_path)) == FILES and len(site.asked) == 1

@pytest.mark.parametrize("code", [403, 404, 410])
def test_no_such_file(site, tmp_path, code):
    site.codes = [code]
    message = failure(site, tmp_path)
    assert f"{site.url}: {code} " in message and "see https://example.org/drawn" in message
    assert len(site.asked) == 1 and left(tmp_path) == []

def test_a_web_page_is_no_archive(site, tmp_path):
    "Servers that moved a file tend to send a page that says so, as if all were well."
    site.kind = "text/html; charset=utf-8"
    assert "a web page came" in failure(site, tmp_path) and left(tmp_path) == []

def test_no_server(site, tmp_path):
    nobody = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    nobody.server_close()
    url = f"http://127.0.0.1:{nobody.server_port}/x"
    message = failure(site, tmp_path, url=url)
    assert message.startswith(f"{url}: ") and "Connection refused" in message
    assert "object at" not in message and "urllib3" not in message

def test_a_server_that_says_nothing(site, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "WAIT", (.2, .2))
    silent = threading.Event()
    monkeypatch.setattr(Handler, "do_GET", lambda self: silent.wait(5))
    assert "does not answer" in failure(site, tmp_path, tries=1)
    silent.set()

@pytest.mark.parametrize("cause, expected", [
    ('SomeError("Connection(host=a.b): Failed to resolve a.b ([Errno -2] No)")',
     "Failed to resolve a.b ([Errno -2] No)"),
    ("SomeError('<urllib3.Connection object at 0x7f>: No connection: [Errno 111] No')",
     "No connection: [Errno 111] No"),
])
def test_reasons_are_readable(cause, expected):
    text = f"HTTPSConnectionPool(host='a.b', port=443): Max retries exceeded with url: /x (Caused by {cause})"
    assert module.reason(module.requests.ConnectionError(Exception(text))) == expected

# --- archives that nobody should unpack

EVIL = {
    "up": tar_of(FILES | {"../evil": b"x"}),
    "up inside": tar_of(FILES | {"a/b/../../../evil": b"x"}),
    "absolute": tar_of(FILES | {"/tmp/evil": b"x"}),
    "drive": tar_of(FILES | {"C:\\evil": b"x"}),
    "other drive": tar_of(FILES | {"C:evil": b"x"}),
    "server": tar_of(FILES | {"\\\\server\\share\\evil": b"x"}),
    "backslash": tar_of(FILES | {"..\\evil": b"x"}),
    "stream": tar_of(FILES | {"a/x.png:evil": b"x"}),
    "symlink": tar_of(FILES | {"evil": tar_entry("evil", tarfile.SYMTYPE, "/etc")}),
    "symlink inside": tar_of(FILES | {"evil": tar_entry("evil", tarfile.SYMTYPE, "a")}),
    "hard link": tar_of(FILES | {"evil": tar_entry("evil", tarfile.LNKTYPE, "../evil")}),
    "device": tar_of(FILES | {"evil": tar_entry("evil", tarfile.CHRTYPE)}),
    "pipe": tar_of(FILES | {"evil": tar_entry("evil", tarfile.FIFOTYPE)}),
    "zip up": zip_of(FILES | {"../evil": b"x"}),
    "zip absolute": zip_of(FILES | {"/tmp/evil": b"x"}),
    "zip backslash": zip_of(FILES | {"..\\evil": b"x"}),
    "zip symlink": zip_of(FILES | {zip_link("evil"): b"/etc"}),
}

@pytest.mark.parametrize("name", EVIL)
def test_evil_members_are_refused_by_name(site, tmp_path, name):
    out, site.content = tmp_path/"out", EVIL[name]
    message = failure(site, out)
    assert "evil" in message and re.search("leads out of its folder|is a (link|device)", message)
    assert left(out) == KEPT and left(tmp_path) == ["out"]

def test_python_s_own_filter_looks_at_members_too(site, tmp_path, monkeypatch):
    "A member that ours lets through and Python's does not; FilterError is a TarError that came with 3.11.4."
    error = getattr(tarfile, "FilterError", tarfile.TarError)
    def refuse(info, folder): raise error("refused by the filter")
    monkeypatch.setattr(tarfile, "data_filter", refuse, raising=False)
    assert "refused by the filter" in failure(site, tmp_path) and left(tmp_path) == KEPT

@pytest.mark.parametrize("archive", [GOOD, tar_of(FILES), tar_of(FILES, "w:xz"), zip_of(FILES)],
                         ids=["gz", "tar", "xz", "zip"])
@pytest.mark.parametrize("share", [.4, .9])
def test_a_truncated_archive_with_the_right_checksum(site, tmp_path, archive, share):
    site.content = archive[:int(share*len(archive))]
    assert "drawn.tar cannot be unpacked" in failure(site, tmp_path)
    assert left(tmp_path) == KEPT

@pytest.mark.parametrize("content", [b"", b"no archive at all", zip_of(FILES)[:-30] + 30*b"x"])
def test_what_is_no_archive(site, tmp_path, content):
    site.content = content
    assert "drawn.tar cannot be unpacked" in failure(site, tmp_path) and left(tmp_path) == KEPT

def test_a_damaged_member_of_a_zip(site, tmp_path):
    content = bytearray(zip_of(FILES))
    content[5000] ^= 255
    site.content = bytes(content)
    assert "Bad CRC-32" in failure(site, tmp_path) and left(tmp_path) == KEPT

def test_a_zip_that_claims_more_than_it_has(site, tmp_path):
    "Python's error says nothing, so ours must say something."
    content, claimed = bytearray(zip_of({"a/0.png": bytes(100)})), (10**6).to_bytes(4, "little")
    head = content.index(b"PK\x01\x02")
    content[18:22] = content[22:26] = claimed                           # compressed and whole size
    content[head + 20:head + 24] = content[head + 24:head + 28] = claimed
    site.content = bytes(content)
    assert "cannot be unpacked: it is damaged. remove it" in failure(site, tmp_path)
    assert left(tmp_path) == KEPT

def test_endless_content(site, tmp_path, monkeypatch):
    site.content = tar_of({"a/zeros.png": bytes(10**6), "b/zeros.png": bytes(10**6)}, "w:gz")
    monkeypatch.setattr(module, "LEAST_LIMIT", 1_500_000)
    assert "more than 1.5 MB" in failure(site, tmp_path) and left(tmp_path) == KEPT
    monkeypatch.setattr(module, "LEAST_LIMIT", 2_000_000)
    assert len(content_of(get(site, tmp_path))) == 2

def test_endless_members(site, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MOST_MEMBERS", 5)
    assert "5 members" in failure(site, tmp_path) and left(tmp_path) == KEPT

# --- interruptions

@pytest.fixture
def third_file(monkeypatch):
    "A function: let the unpacking of the third file raise an error."
    copy, copied = shutil.copyfileobj, []
    def fail_with(error):
        def stop(*args):
            copied.append(args)
            if len(copied) == 3: raise error
            copy(*args)
        monkeypatch.setattr(module.shutil, "copyfileobj", stop)
    return fail_with

def test_an_interrupted_unpacking_leaves_no_half_dataset(site, tmp_path, third_file):
    third_file(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt): get(site, tmp_path)
    assert left(tmp_path) == KEPT
    assert content_of(get(site, tmp_path)) == FILES and len(site.asked) == 1

def test_what_a_killed_process_left_is_not_taken(site, tmp_path):
    (tmp_path/"drawn.part"/"a").mkdir(parents=True)
    (tmp_path/"drawn.part"/"a"/"half.png").write_bytes(b"x")
    put(tmp_path, "tmpabc", b"x")
    assert content_of(get(site, tmp_path)) == FILES and left(tmp_path) == ["drawn"]

def test_a_disk_that_fills_up(site, tmp_path, third_file):
    third_file(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    with pytest.raises(FullDiskError, match=str(tmp_path)): get(site, tmp_path)
    assert left(tmp_path) == KEPT

def test_room_is_looked_for_before_anything_is_fetched(site, tmp_path, monkeypatch):
    "For the archive and for as much content."
    free = 2*len(site.content) - 1
    monkeypatch.setattr(module.shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))
    with pytest.raises(FullDiskError, match="needed for the archive and its content"): get(site, tmp_path)
    assert left(tmp_path) == []
    free += 1
    assert content_of(get(site, tmp_path)) == FILES

def test_another_process_is_downloading(site, tmp_path):
    with FileLock(tmp_path/".drawn.lock"):
        assert "another process" in failure(site, tmp_path)
    assert not site.asked

def test_a_folder_that_was_there_is_left_alone(site, tmp_path):
    (tmp_path/"drawn").mkdir()
    (tmp_path/"drawn"/NOTE).write_text("[1")
    assert "not from this download" in failure(site, tmp_path) and not site.asked

def test_a_file_where_the_folder_should_be(site, tmp_path):
    (tmp_path/"out").write_text("")
    with pytest.raises(DiskError, match="out"): get(site, tmp_path/"out")

# --- the command

@pytest.fixture
def command(cli, site, monkeypatch):
    "`mdd_bench download ...`, which knows the server's dataset too."
    monkeypatch.setitem(SOURCES, "drawn", source_of(site))
    monkeypatch.setattr(module, "Resume", lambda part, page: Resume(part, page, tries=2, pause=0))
    return lambda *args: cli("download", *args)

def test_the_command(command, site, tmp_path):
    code, out, err = command("drawn")
    assert code == 2 and err.count("\n") == 1 and "--accept-licence" in err
    for text in ("CC BY 4.0", CC_BY.url, CC_BY.terms, "nobody", "example.org"): assert text in out
    assert not site.asked and left(tmp_path) == []
    code, out, err = command("drawn", "--accept-licence")
    assert code == 0 and "next: mdd_bench datasets data/drawn" in out
    assert content_of(tmp_path/"data"/"drawn") == FILES
    code, out, err = command("drawn")
    assert code == 0 and "is complete in data/drawn" in out and len(site.asked) == 1

def test_the_command_ends_with_one_line(command, site):
    site.codes = [404]
    code, _, err = command("drawn", "--accept-licence", "--out", "elsewhere")
    assert code == 2 and err == f"error: {site.url}: 404 Not Found. see https://example.org/drawn\n"

@pytest.mark.parametrize("name", [name for name, source in SOURCES.items() if not source.url])
def test_what_is_handed_out_by_hand_says_where(command, name):
    code, out, err = command(name, "--accept-licence")
    assert code == 2 and out == "" and err.count("\n") == 1 and SOURCES[name].page in err

def test_the_list(command):
    code, out, _ = command()
    assert code == 0 and [line.split()[0] for line in out.splitlines()[1:]] == list(SOURCES)
    assert {"name", "classes", "size", "licence", "source"} == set(list_sources().columns)

def test_an_unknown_name(command): assert "Did you mean 'visa'" in command("vise")[2]
