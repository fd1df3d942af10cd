"""A tree of files that is still to be written: what replaces what, where links lead, and what is refused."""

from __future__ import annotations

import stat

import pytest

from netstack.errors import ConfigError
from vm.build.tree import Entry, Tree


def listed(tree: Tree) -> list[str]:
    return [path for path, _ in tree.walk()]


def test_directories_on_the_way_are_made_and_come_first() -> None:
    tree = Tree()
    tree.file("b/c/d", "x")
    tree.file("/a-b", "y")
    tree.file("./a/z", "z")
    assert listed(tree) == ["a", "a/z", "a-b", "b", "b/c", "b/c/d"]
    made = tree.get("b/c")
    assert made is not None and (made.mode, made.uid) == (stat.S_IFDIR | 0o755, 0)
    assert len(tree) == 6


def test_what_comes_later_replaces() -> None:
    tree = Tree()
    tree.file("etc/x", "old", 0o600)
    tree.file("etc/x", "new", 0o644, uid=7)
    tree.directory("etc", 0o700)
    tree.symlink("etc/y", "x")
    tree.file("etc/y", "no link any more")
    entry = tree.get("etc/x")
    assert entry is not None and (entry.read(), entry.mode & 0o777, entry.uid) == (b"new", 0o644, 7)
    assert [oct(found.mode) for path, found in tree.walk() if path == "etc"] == ["0o40700"]
    final = tree.get("etc/y", follow=False)
    assert final is not None and final.is_file()
    assert len(tree) == 3


@pytest.mark.parametrize("order", [("dir", "file"), ("file", "dir")])
def test_a_directory_and_a_file_of_one_name_is_an_error(order: tuple[str, str]) -> None:
    tree = Tree()
    make = {"dir": lambda: tree.directory("etc/x"), "file": lambda: tree.file("etc/x", "")}
    make[order[0]]()
    with pytest.raises(ConfigError, match=r"/etc/x is a \w+ already and cannot become a \w+"):
        make[order[1]]()


def test_a_file_where_a_directory_would_have_to_be_is_an_error() -> None:
    tree = Tree()
    tree.file("etc", "")
    with pytest.raises(ConfigError, match="'etc/x': /etc is a file already, and would have to be a directory"):
        tree.file("etc/x", "")


def test_links_on_the_way_are_followed_within_the_tree() -> None:
    tree = Tree()
    tree.directory("usr/lib")
    tree.symlink("lib", "usr/lib")
    tree.symlink("usr/absolute", "/usr/lib")
    tree.symlink("out", "../../../../usr/./lib")
    for number, path in enumerate(("lib/a", "usr/absolute/b", "out/c")):
        tree.file(path, str(number))
    assert [path for path in listed(tree) if path.startswith("usr/lib/")] == ["usr/lib/a", "usr/lib/b", "usr/lib/c"]


def test_a_directory_does_not_replace_a_link_to_one() -> None:
    """As dpkg keeps a merged /usr."""
    tree = Tree()
    tree.directory("usr/lib")
    tree.symlink("lib", "usr/lib")
    tree.directory("lib", 0o700)
    entry = tree.get("lib", follow=False)
    assert entry is not None and entry.is_link()
    tree.add("lib", Entry(mode=stat.S_IFDIR | 0o700), layer=True)
    entry = tree.get("lib", follow=False)
    assert entry is not None and entry.is_dir(), "but in a layer of OCI it does"


def test_links_to_each_other_end() -> None:
    tree = Tree()
    tree.symlink("a", "b")
    tree.symlink("b", "a")
    with pytest.raises(ConfigError, match="links that lead to each other"):
        tree.file("a/x", "")
    assert tree.get("a", follow=False) is not None


def test_links_that_double_end() -> None:
    tree = Tree()
    for number in range(60):
        tree.symlink(f"l{number}", f"l{number + 1}/l{number + 1}")
    with pytest.raises(ConfigError, match="links that lead to each other"):
        tree.get("l0/x")


@pytest.mark.parametrize("path", ["../x", "a/../../x", "a/..", "nul\0", "n" * 256, "d/" * 3000])
def test_paths_that_cannot_be_are_refused(path: str) -> None:
    tree = Tree()
    with pytest.raises(ConfigError, match="path"):
        tree.file(path, "")
    assert len(tree) == 0


def test_hard_links_are_one_entry() -> None:
    tree = Tree()
    tree.file("a", "x")
    tree.link("b", "a")
    assert tree.get("a") is tree.get("b")
    tree.file("a", "y")
    entry = tree.get("b")
    assert entry is not None and entry.read() == b"x"
    for bad in ("nothing", "d"):
        tree.directory("d")
        with pytest.raises(ConfigError, match="there is no such file"):
            tree.link("c", bad)


def test_a_tree_in_two_places_is_two() -> None:
    image = Tree()
    image.file("a", "x")
    image.link("b", "a")
    whole = Tree()
    whole.merge(image, "one")
    whole.merge(image, "two")
    assert listed(whole) == ["one", "one/a", "one/b", "two", "two/a", "two/b"]
    assert whole.get("one/a") is whole.get("one/b")
    assert whole.get("one/a") is not whole.get("two/a")


def test_removing_takes_what_is_below_along_and_is_counted() -> None:
    tree = Tree(limit=4)
    tree.file("a/b/c", "")
    tree.remove("a/b")
    assert listed(tree) == ["a"] and len(tree) == 1
    tree.remove("nothing/there")
    for name in "xyz":
        tree.file(f"a/{name}", "")
    with pytest.raises(ConfigError, match="more than 4 files"):
        tree.file("a/w", "")
    tree.empty("a")
    assert listed(tree) == ["a"] and len(tree) == 1
    tree.file("b", "")
    tree.empty("")
    assert len(tree) == 0
