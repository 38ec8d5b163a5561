"""Loads the package's tensor modules so that every call checks its annotations, tensor shapes included."""

import ast
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import CodeType, ModuleType

CHECKED = tuple(
    f"longtake.{name}" for name in ("models", "data", "memory", "distributed", "lora", "sampling", "training")
)


class CheckedLoader(SourceFileLoader):
    """Compiles a module so that every call checks its annotations, tensor shapes included.

    jaxtyping's own import hook cannot resolve names imported under `if TYPE_CHECKING:`; here those blocks run.
    """

    def get_code(self, fullname: str) -> CodeType:
        """The checked code, never from or into the bytecode cache that the package has outside tests."""
        tree = _Checked().visit(ast.parse(self.get_data(self.path), self.path))
        return compile(ast.fix_missing_locations(tree), self.path, "exec", dont_inherit=True)


class _Checked(ast.NodeTransformer):
    _DECORATOR = "__import__('jaxtyping').jaxtyped(typechecker=__import__('beartype').beartype)"

    def visit_If(self, node: ast.If) -> ast.AST:
        if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.test = ast.copy_location(ast.Constant(True), node.test)
        return self.generic_visit(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        node.decorator_list.insert(0, self._decorator(node))  # outermost: after @dataclass has made __init__
        return self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.decorator_list.append(self._decorator(node))  # innermost: before a decorator drops the annotations
        return self.generic_visit(node)

    def _decorator(self, node: ast.ClassDef | ast.FunctionDef) -> ast.expr:
        return ast.copy_location(ast.parse(self._DECORATOR, mode="eval").body, node)


class CheckedFinder(MetaPathFinder):
    """Hands the modules of CHECKED to CheckedLoader."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not any(fullname == name or fullname.startswith(f"{name}.") for name in CHECKED):
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = CheckedLoader(fullname, spec.loader.path)
        return spec
