"""What sources take of a folder and what they leave out: one rule, judged by torchvision, GNU tar and the OS."""

import glob
import os

import numpy as np
import pytest
import torchvision

from archives import jpeg, pack, refused
from fastdeit.pipelines.conversion.convert import convert
from fastdeit.pipelines.sources import open_source
from fastdeit.pipelines.sources.files import is_left_out
from system import run, run_python

JUNK = [
    *(".DS_Store", "._0.jpg", ".hidden.jpg", ".nfs000000001.jpg", ".ipynb_checkpoints", ".Trash-1000", ".snapshot"),
    *("0.jpg~", "~$0.jpg", "Thumbs.db", "thumbs.db", "desktop.ini", "@eaDir", "__MACOSX", "lost+found"),
    *("$RECYCLE.BIN", "@Recycle", "#recycle"),
]
SPACED = ["System Volume Information", "Network Trash Folder", "Icon\r"]
KEPT = ["~home.jpg", "a.b.jpg", "DS_Store.jpg", "nfs.jpg", "@.jpg", "#1.jpg", "MACOSX", "eaDir", "recycle"]


def write(root, *names):
    for i, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(i))
    return root


def names(source, root):
    return [os.path.relpath(source.name(i), root) for i in range(len(source))]


@pytest.fixture
def tree(tmp_path):
    return write(tmp_path / "tree", "a/0.jpg", "a/sub/1.jpg", "b/0.jpg", "b/1.jpg")


def test_the_rule_on_names():
    assert all(map(is_left_out, [*JUNK, *SPACED]))
    assert not any(map(is_left_out, [*KEPT, "a", "n01440764", "val", "~", "x~y"][:-2]))


def test_folders_and_archives_keep_one_rule(tree, tmp_path):
    """The archive is GNU tar's of the same folder; what neither takes is counted by both."""
    whole = names(open_source(tree), tree)
    for name in JUNK + SPACED:
        # As a file, and as a folder of a class and of the root.
        write(tree, f"a/{name}")
        write(tree, f"b/in/{name}/0.jpg")
        write(tree, f"{name}/0.jpg")
    kept = [f"a/{name}" if name.endswith(".jpg") else f"a/{name}/0.jpg" for name in KEPT]
    write(tree, *kept)
    source = open_source(tree)
    assert source.class_names == ["a", "b"]
    assert names(source, tree) == sorted(whole + kept, key=lambda name: (os.path.dirname(name), os.path.basename(name)))
    assert source.describe()["hidden_files"] == 3 * len(JUNK + SPACED)
    numbered = tmp_path / "v2"
    os.rename(tree, numbered)
    (numbered / "a").rename(numbered / "0")
    (numbered / "b").rename(numbered / "1")
    for name in JUNK + SPACED:
        os.rename(numbered / name, numbered / "1" / f"{name}x")  # of hidden classes there are none in an archive
        os.rename(numbered / "1" / f"{name}x", numbered / "1" / "in" / name / "again")
    for name in KEPT:
        if not name.endswith(".jpg"):
            os.rename(numbered / "0" / name / "0.jpg", numbered / "0" / f"{name}.jpg")
    for path in (numbered / "0" / "sub").iterdir():
        os.rename(path, numbered / "0" / path.name)
    run("tar", "-C", numbered, "-cf", tmp_path / "x.tar", "0", "1", check=True)
    archive, folder = open_source(f"imagenetv2:{tmp_path / 'x.tar'}"), open_source(numbered)
    ours = sorted(name.partition("x.tar:")[2] for name in map(archive.name, range(len(archive))))
    assert ours == sorted(names(folder, numbered))
    assert archive.describe()["hidden_files"] == 3 * len(JUNK + SPACED)


def test_archives_in_a_folder_keep_it_too(tmp_path):
    pytest.importorskip("pyarrow")
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"image": [jpeg()], "label": [0]})
    for name in ("a.parquet", "._a.parquet", ".b.parquet", "~$a.parquet"):
        pyarrow.parquet.write_table(table, tmp_path / name)
    for pattern in (tmp_path, f"parquet:{tmp_path}/*.parquet"):
        source = open_source(pattern)
        assert len(source) == 1
        assert source.describe()["hidden_files"] == 3


def test_links_back_multiply_nothing(tree, tmp_path):
    judge = torchvision.datasets.ImageFolder(str(tree))
    outside = write(tmp_path / "outside", "2.jpg")
    (outside / "again").symlink_to(".")
    (outside / "home").symlink_to(tree)
    links = {"root": "..", "self": ".", "other": "../b", "inner": "sub", "sub/up": "..", "above": "../..", "all": "/"}
    for name, target in {**links, "../b/out": outside, "../b/out2": outside, "file.jpg": "0.jpg"}.items():
        (tree / "a" / name).symlink_to(target)
    source = open_source(tree)
    taken = [(source.name(i), source.read(i)[1]) for i in range(len(source))]
    expected = [*judge.samples, (str(tree / "a/file.jpg"), 0), (str(tree / "b/out/2.jpg"), 1)]
    assert sorted(taken) == sorted(expected)
    assert source.describe()["links_not_followed"] == 7 + 2 + 1
    assert "links not followed 10" in str(convert(tree, tmp_path / "x", progress=False))


def test_a_class_that_is_a_link(tree, tmp_path):
    outside = write(tmp_path / "outside", "2.jpg", "in/3.jpg")
    (tree / "c").symlink_to(outside)
    judge = torchvision.datasets.ImageFolder(str(tree))
    source = open_source(tree)
    assert [(source.name(i), source.read(i)[1]) for i in range(len(source))] == judge.samples
    (tree / "b" / "mine").symlink_to(outside / "in")
    refused(r"c/in: links put this folder into the classes 'b' and 'c'", tree)
    (tree / "b" / "mine").unlink()
    for target in (".", "a", "..", "a/sub"):
        (tree / "d").symlink_to(target)
        refused(r"tree/d: is a link back into .*tree, not a class of its own. Remove it", tree)
        (tree / "d").unlink()


@pytest.mark.parametrize("place", ["0", "a/0", "a/sub/0", "a/sub/deep/er/0"])
@pytest.mark.parametrize("target", ["nowhere", "0"])
def test_a_link_that_leads_nowhere_is_named(tree, place, target):
    (tree / place).parent.mkdir(parents=True, exist_ok=True)
    (tree / place).symlink_to(target)
    reason = "leads nowhere" if target == "nowhere" else "cannot be looked into"
    refused(rf"{place}: .*{reason}.*[Rr]emove it", tree)


NOBODY = """
import os, sys
from fastdeit.pipelines.sources import SourceError, open_source
open_source(sys.argv[1])
os.setgid(65534)
os.setuid(65534)
for text in sys.argv[2:]:
    try:
        print(len(open_source(text, "train" if "idx" in text else None)))
    except SourceError as error:
        print(error)
"""


def test_what_cannot_be_listed_is_named(tmp_path):
    """In a process without root's rights, which may read everything."""
    for kind, names in {
        "folder": ["a/0.jpg", "b/0.jpg"],
        "nested": ["a/0.jpg", "a/sub/deep/1.jpg"],
        "shards": ["x/0.tar", "y/0.tar"],
        "parquet": ["data/0.parquet"],
        "idx": ["train-images-idx3-ubyte"],
        "imagenet": ["ILSVRC2012_img_train.tar"],
        "good": ["a/0.jpg"],
    }.items():
        write(tmp_path / kind, *names)
    locked = {
        "folder": "folder/b",
        "nested": "nested/a/sub/deep",
        "webdataset:shards/*/*.tar": "shards/y",
        "parquet": "parquet/data",
        "parquet:shards/**/*.parquet": "shards/y",
        "idx": "idx",
        "imagenet": "imagenet",
    }
    for place in set(locked.values()):
        (tmp_path / place).chmod(0)
    tmp_path.chmod(0o755)
    script = NOBODY if os.getuid() == 0 else NOBODY.replace("os.set", "0 and os.set")
    # Relative names, since nobody may look into the folders above.
    done = run_python("-c", script, "good", *locked, cwd=tmp_path)
    for place in set(locked.values()):
        (tmp_path / place).chmod(0o755)
    assert done.returncode == 0, done.stderr
    for (kind, place), line in zip(locked.items(), done.stdout.splitlines(), strict=True):
        assert line.startswith(place), kind
        assert "Permission denied" in line, kind


def test_torchvisions_own_listing_is_held_to_the_rule(tmp_path, monkeypatch):
    root = write(tmp_path / "eurosat" / "2750", "a/0.jpg", "a/sub/1.jpg", "b/0.jpg")
    assert len(open_source(f"torchvision:EuroSAT:{tmp_path}")) == 3
    scandir = os.scandir

    def locked(path):
        if str(path).endswith("sub"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", locked)
        assert len(torchvision.datasets.EuroSAT(str(tmp_path))) == 2
        refused(r"a/sub: cannot be listed \(Permission denied\)", f"torchvision:EuroSAT:{tmp_path}")
    (root / "a" / "up").symlink_to("..")
    assert len(torchvision.datasets.EuroSAT(str(tmp_path))) > 40
    refused(r"a/up/.*: torchvision takes this for an image, but .* link back into", f"torchvision:EuroSAT:{tmp_path}")
    (root / "a" / "up").unlink()
    write(root, "a/._0.jpg")
    refused(r"a/\._0\.jpg: torchvision takes this for an image", f"torchvision:EuroSAT:{tmp_path}")
    (root / "a" / "._0.jpg").unlink()
    write(root, ".ipynb_checkpoints/0.jpg")
    refused(r"torchvision takes '\.ipynb_checkpoints' for a class. Move it out", f"torchvision:EuroSAT:{tmp_path}")


def test_images_beside_the_class_folders_are_counted(tree):
    write(tree, "stray.jpg")
    (tree / "README").write_text("x")
    described = open_source(tree).describe()
    assert (described["images_outside_of_class_folders"], described["files_that_are_no_images"]) == (1, 1)


def test_a_glob_finds_what_glob_does(tmp_path, monkeypatch):
    archives = "a-0.tar a-1.tar x/a-2.tar x/y/a-3.tar x/y/b.tar z/a-4.tar a[1].tar .h-5.tar .h/y/b.tar"
    for name in archives.split():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        pack(tmp_path / name, {"0.jpg": jpeg(), "0.cls": b"0"})
    (tmp_path / "x" / "loop").symlink_to("..")
    monkeypatch.chdir(tmp_path)
    patterns = "a-*.tar a-?.tar */a-*.tar x/*/a-3.tar [xz]/*.tar x/[!q]/a*.tar ./a-*.tar .h-*.tar .h*/y/*.tar */y/b.tar"
    for pattern in patterns.split():
        for form in (pattern, str(tmp_path / pattern)):
            source = open_source(f"webdataset:{form}")
            found = [source.name(i).rpartition(":")[0] for i in range(len(source))]
            judge = {os.path.realpath(path) for path in glob.glob(form) if "loop" not in path}
            assert len(found) == len(set(found))
            assert {os.path.realpath(path) for path in found} >= judge
    source = open_source("webdataset:**/a-*.tar")
    assert len(source) == 5
    np.testing.assert_array_equal([source.read(i)[1] for i in range(5)], 0)
