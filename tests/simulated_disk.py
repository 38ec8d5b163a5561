"""A disk that loses what was not synced when the power goes, fed with the operations that the product makes.

POSIX promises no more than this: the content of a file is there once the file was synced, a name once its folder was.
Of what was not, anything may be there: nothing, all, a part, zeros, and any of several names without the others.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from longtake import disk
from longtake.disk import Operation

Tree: TypeAlias = dict[str, bytes | None]
"""Content by path, None for folders."""


@dataclass(eq=False)
class File:
    """`synced` is what the disk has for certain."""

    content: bytes
    synced: bytes = b""


@dataclass(eq=False)
class Folder:
    """`pending` are changes of names since the last sync, each of which comes about whole or not at all."""

    synced: "dict[str, File | Folder]" = field(default_factory=dict)
    pending: "list[dict[str, File | Folder | None]]" = field(default_factory=list)

    def names(self, keep: "Callable[[dict[str, File | Folder | None]], bool]") -> "dict[str, File | Folder]":
        """What has a name here when those pending changes come about that `keep` picks."""
        found: dict[str, File | Folder | None] = {**self.synced}
        for change in filter(keep, self.pending):
            found |= change
        return {name: node for name, node in found.items() if node is not None}


UNSYNCED: dict[str, Callable[[File], bytes]] = {
    "lost": lambda file: file.synced,
    "half": lambda file: file.content[: len(file.content) // 2],
    "zeros": lambda file: bytes(len(file.content)),
    "kept": lambda file: file.content,
}


class SimulatedDisk:
    """What lies below `root`; it begins with what is there, which is taken to be on the disk."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.top = self._read(root)
        self.operations: list[Operation] = []

    @contextmanager
    def connected(self, lost: Callable[[Tree], None]) -> Iterator[None]:
        """Follows the operations in the context; `lost` gets every tree that a loss of power could leave after each.

        What the disk is said to hold and what is in the folder are the same after each, so that none is overlooked.
        """

        def follow(operation: Operation, done: bool) -> None:
            if done and operation.path.is_relative_to(self.root):
                self.operations.append(operation)
                self._apply(operation)
                assert self._tree(lambda _change: True, UNSYNCED["kept"]) == tree_of(self.root), operation
                for tree in self.trees():
                    lost(tree)

        with disk.watched(follow):
            yield

    def trees(self) -> Iterator[Tree]:
        """What a loss of power now could leave, each tree once."""
        changes = [id(change) for folder in self._folders(self.top) for change in folder.pending]
        kept = [{*changes}, set(), *({change} for change in changes), *({*changes} - {change} for change in changes)]
        seen = []
        for chosen in kept:
            for content in UNSYNCED.values():
                tree = self._tree(lambda change, chosen=chosen: id(change) in chosen, content)  # type: ignore[misc]
                if tree not in seen:
                    seen.append(tree)
                    yield tree

    def _tree(self, keep: Callable[[dict[str, File | Folder | None]], bool], content: Callable[[File], bytes]) -> Tree:
        def add(folder: Folder, prefix: str) -> None:
            for name, node in folder.names(keep).items():
                if isinstance(node, File):
                    found[prefix + name] = node.content if node.synced == node.content else content(node)
                else:
                    found[prefix + name] = None
                    add(node, f"{prefix}{name}/")

        found: Tree = {}
        add(self.top, "")
        return found

    def _apply(self, operation: Operation) -> None:
        if operation.path == self.root:
            _sync(self.top)
            return
        parent, name = self._folder(operation.path.parent), operation.path.name
        node = _now(parent).get(name)
        if operation.kind == "make":
            parent.pending.append({name: Folder()})
        elif operation.kind == "write":
            self._write(operation.path)
        elif operation.kind == "sync":
            _sync(node)
        elif operation.kind == "remove":
            _remove(parent, name)
        else:
            assert operation.target is not None
            assert operation.target.parent == operation.path.parent
            parent.pending.append({name: None, operation.target.name: node})

    def _write(self, path: Path) -> None:
        """A file, or all files in a folder."""
        for file in [path] if path.is_file() else sorted(path.iterdir()):
            folder = self._folder(file.parent)
            node = _now(folder).get(file.name)
            if isinstance(node, File):
                node.content = file.read_bytes()
            else:
                folder.pending.append({file.name: File(file.read_bytes())})

    def _folder(self, path: Path) -> Folder:
        found = self.top
        for name in path.relative_to(self.root).parts:
            node = _now(found)[name]
            assert isinstance(node, Folder)
            found = node
        return found

    def _folders(self, top: Folder) -> Iterator[Folder]:
        yield top
        known = {id(node): node for names in (top.synced, *top.pending) for node in names.values()}
        for node in known.values():
            if isinstance(node, Folder):
                yield from self._folders(node)

    def _read(self, path: Path) -> Folder:
        return Folder(
            {
                each.name: self._read(each) if each.is_dir() else File(each.read_bytes(), each.read_bytes())
                for each in path.iterdir()
            }
        )


def _now(folder: Folder) -> dict[str, File | Folder]:
    return folder.names(lambda _change: True)


def _sync(node: File | Folder | None) -> None:
    assert node is not None
    if isinstance(node, File):
        node.synced = node.content
    else:
        node.synced, node.pending = _now(node), []


def _remove(parent: Folder, name: str) -> None:
    node = _now(parent).get(name)
    if isinstance(node, Folder):
        for child in _now(node):
            _remove(node, child)
    if node is not None:
        parent.pending.append({name: None})


def tree_of(root: Path) -> Tree:
    """What is in a folder."""
    found: Tree = {}
    for place, folders, files in os.walk(root):
        found |= {(Path(place) / name).relative_to(root).as_posix(): None for name in folders}
        found |= {
            (Path(place) / name).relative_to(root).as_posix(): (Path(place) / name).read_bytes() for name in files
        }
    return found


def lay_out(tree: Tree, root: Path) -> Path:
    """Makes a folder of `tree`."""
    root.mkdir(parents=True)
    for name, content in sorted(tree.items()):
        if content is None:
            (root / name).mkdir()
        else:
            (root / name).write_bytes(content)
    return root
