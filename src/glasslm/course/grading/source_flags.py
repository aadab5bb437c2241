"""Evidence in the text of a submission, from its syntax tree: comments and texts do not count."""

from __future__ import annotations

import ast

from glasslm.course.isolation.evidence import Flag, FlagKind, module_kind

# Attributes that no exercise needs, whatever they belong to.
ATTRIBUTE_KINDS: dict[str, FlagKind] = {
    **dict.fromkeys(
        ("_getframe", "f_back", "f_globals", "f_locals", "f_code", "tb_frame", "gi_frame",
         "__globals__", "__closure__", "__code__", "__subclasses__", "__builtins__", "__loader__",
         "__spec__", "get_objects", "get_referrers", "get_referents", "_current_frames",
         "settrace", "setprofile", "gettrace", "getprofile", "currentframe", "getsource",
         "meta_path"), "checker"),
    **dict.fromkeys(("environ", "environb", "getenv", "putenv"), "environment"),
    **dict.fromkeys(("tofile", "fromfile", "memmap", "savez", "loadtxt", "genfromtxt",
                     "read_text", "write_text", "read_bytes", "write_bytes", "unlink"), "file"),
    **dict.fromkeys(("popen", "execv", "execve", "spawnl", "posix_spawn", "fork"), "program"),
    **dict.fromkeys(("tobytes", "data_as"), "remembered"),
}  # fmt: skip
# Attributes of one module: "sys.modules" and the like.
DOTTED_KINDS: dict[str, FlagKind] = {
    "sys.modules": "checker",
    "os.system": "program",
    "os.remove": "file",
    "os.listdir": "file",
    "os._exit": "program",
    **dict.fromkeys(
        ("os.write", "os.read", "os.close", "os.dup2", "os.fdopen", "os.sendfile"), "checker"
    ),
    **dict.fromkeys(("traceback.walk_stack", "traceback.extract_stack"), "checker"),
    "numpy.random.seed": "random",
    "numpy.random.set_state": "random",
    "random.seed": "random",
    "numpy.load": "file",
    "numpy.save": "file",
    "scipy.special.softmax": "library",
    "scipy.special.log_softmax": "library",
    "scipy.optimize.approx_fprime": "library",
}
CALL_KINDS: dict[str, FlagKind] = {
    "exec": "text_as_code",
    "eval": "text_as_code",
    "compile": "text_as_code",
    "open": "file",
    "globals": "checker",
}
MAX_TABLE_NUMBERS = 24  # with four digits or more, in one list or dict
MAX_TEXT_CHARS = 300  # of a text that is no docstring
MIN_TABLE_DIGITS = 4


def find_source_flags(source: str) -> list[Flag]:
    """Evidence in a submission's text. Empty where it is no Python."""
    try:
        return _read_source(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []


def _read_source(source: str) -> list[Flag]:
    tree = ast.parse(source)
    reader = _Reader(source.splitlines())
    reader.docstrings = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):  # the names of modules first, wherever they are imported
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            reader.read_import(node)
    for node in ast.walk(tree):
        reader.read(node)
    return sorted(set(reader.flags))


def fold_text(node: ast.AST) -> str | None:
    """The text that an expression of constants gives; None where it is not constant.

    >>> fold_text(ast.parse("'tor' + 'ch'", mode="eval").body)
    'torch'
    """
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.Constant(value=bytes(data)):
            return data.decode("latin-1")
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _join("", [left, right])
        case ast.JoinedStr(values=values):
            return _join("", values)
        case ast.FormattedValue(value=value):
            return fold_text(value)
        case ast.Subscript(value=value, slice=ast.Slice(lower=None, upper=None)):
            folded = fold_text(value)  # "hcrot"[::-1]
            return folded and folded[::-1]
        case ast.Call(func=ast.Name(id="chr"), args=[ast.Constant(value=int(code))]):
            return chr(code) if 0 < code < 0x110000 else None
        case ast.Call(func=ast.Attribute(value=value, attr=method), args=arguments):
            return _fold_method(value, method, arguments)
        case _:
            return None


def _fold_method(value: ast.expr, method: str, arguments: list[ast.expr]) -> str | None:
    """The text of "".join([...]), and of methods that give nearly the same text."""
    text = fold_text(value)
    if text is None:
        return None
    if method == "join" and arguments and isinstance(arguments[0], (ast.List, ast.Tuple)):
        return _join(text, arguments[0].elts)
    return text.lower() if method in ("decode", "lower", "strip", "encode") else None


def _join(separator: str, nodes: list[ast.expr]) -> str | None:
    pieces = [fold_text(node) for node in nodes]
    known = [piece for piece in pieces if piece is not None]
    return separator.join(known) if len(known) == len(pieces) else None


class _Reader:
    """Collects the flags of the nodes of one file."""

    def __init__(self, lines: list[str]) -> None:
        self.lines = lines
        self.flags: list[Flag] = []
        self.docstrings: set[int] = set()
        self.modules: dict[str, str] = {}  # name in the file -> dotted name of the module or object

    def read_import(self, node: ast.Import | ast.ImportFrom) -> None:
        """Keep the names that an import gives, and flag the import of an odd module."""
        if isinstance(node, ast.Import):
            for alias in node.names:
                self.modules[alias.asname or alias.name.partition(".")[0]] = (
                    alias.name if alias.asname else alias.name.partition(".")[0]
                )
                self._flag_module(node, alias.name, f"import {alias.name}")
            return
        module = node.module or ""
        self._flag_module(node, module, f"from {module} import ...")
        for alias in node.names:
            dotted = f"{module}.{alias.name}"
            self.modules[alias.asname or alias.name] = dotted
            if kind := DOTTED_KINDS.get(dotted) or ATTRIBUTE_KINDS.get(alias.name):
                self._flag(kind, node, f"from {module} import {alias.name}")

    def read(self, node: ast.AST) -> None:
        """Flag one node."""
        if isinstance(node, ast.Call):
            self._read_call(node)
        elif isinstance(node, ast.Attribute):
            self._read_attribute(node)
        elif isinstance(node, ast.Name) and node.id in ("__builtins__", "__loader__", "__spec__"):
            self._flag("checker", node, node.id)
        elif isinstance(node, (ast.Assign, ast.AugAssign, ast.AnnAssign, ast.Delete)):
            targets = node.targets if isinstance(node, (ast.Assign, ast.Delete)) else [node.target]
            for target in targets:
                self._read_target(target)
        elif isinstance(node, (ast.List, ast.Tuple, ast.Dict, ast.Set)):
            self._read_table(node)
        elif isinstance(node, ast.Compare):
            self._read_comparison(node)
        elif isinstance(node, ast.Constant):
            self._read_text(node)

    def _read_call(self, node: ast.Call) -> None:
        function = node.func
        name = function.id if isinstance(function, ast.Name) else ""
        dotted = self._dotted(function) or ""
        if name in CALL_KINDS and name not in self.modules:
            self._flag(CALL_KINDS[name], node, f"{name}(...)")
        if name == "__import__" or dotted.endswith("import_module"):
            module = fold_text(node.args[0]) if node.args else None
            if module is None:
                self._flag("library", node, f"{name or dotted}(...) of a name that is computed")
            else:
                self._flag_module(node, module, f"{name or dotted}({module!r})")
        if name in ("getattr", "setattr", "delattr") and len(node.args) > 1:
            self._read_computed_attribute(name, node)
        if dotted in ("numpy.array_equal", "numpy.allclose", "numpy.isclose") and any(
            isinstance(argument, (ast.List, ast.Tuple)) and argument.elts for argument in node.args
        ):
            self._flag("remembered", node, f"{dotted}(...) of an input and a table")

    def _read_computed_attribute(self, name: str, node: ast.Call) -> None:
        owner, attribute = self._dotted(node.args[0]), fold_text(node.args[1])
        if name != "getattr" and owner:
            self._flag("patch", node, f"{name}({owner}, ...)")
        if attribute is not None:
            kind = ATTRIBUTE_KINDS.get(attribute) or DOTTED_KINDS.get(f"{owner}.{attribute}")
            if kind or attribute in CALL_KINDS:
                self._flag(kind or CALL_KINDS[attribute], node, f"{name}(..., {attribute!r})")

    def _read_attribute(self, node: ast.Attribute) -> None:
        dotted = self._dotted(node)
        kind = DOTTED_KINDS.get(dotted or "") or ATTRIBUTE_KINDS.get(node.attr)
        if kind:
            self._flag(kind, node, dotted or f".{node.attr}")

    def _read_target(self, target: ast.expr) -> None:
        """An assignment to an attribute of a module, or to its names."""
        owner = target.value if isinstance(target, (ast.Attribute, ast.Subscript)) else None
        if isinstance(owner, ast.Attribute) and owner.attr == "__dict__":
            owner = owner.value
        if isinstance(owner, ast.Call) and ast.unparse(owner.func) == "vars" and owner.args:
            owner = owner.args[0]
        if owner is not None and (dotted := self._dotted(owner)):
            self._flag("patch", target, f"{ast.unparse(target)} = ... changes {dotted}")

    def _read_table(self, node: ast.List | ast.Tuple | ast.Dict | ast.Set) -> None:
        numbers = [
            item
            for item in ast.walk(node)
            if isinstance(item, ast.Constant)
            and type(item.value) in (int, float, complex)
            and len(str(item.value).replace("-", "").replace(".", "").lstrip("0"))
            >= MIN_TABLE_DIGITS
        ]
        if len(numbers) > MAX_TABLE_NUMBERS:
            self._flag("remembered", node, f"a table of {len(numbers)} numbers")

    def _read_text(self, node: ast.Constant) -> None:
        """A long text that is no docstring may hold numbers, or code."""
        is_text = isinstance(node.value, (str, bytes)) and id(node) not in self.docstrings
        if is_text and len(node.value) > MAX_TEXT_CHARS:  # type: ignore[arg-type]
            self._flag("remembered", node, f"a text of {len(node.value):,} characters")  # type: ignore[arg-type]

    def _read_comparison(self, node: ast.Compare) -> None:
        """A comparison of a whole shape with constants."""
        sides = [node.left, *node.comparators]
        has_shape = any(isinstance(side, ast.Attribute) and side.attr == "shape" for side in sides)
        for side in sides:
            sizes = side.elts if isinstance(side, ast.Tuple) else []
            if has_shape and sizes and all(isinstance(size, ast.Constant) for size in sizes):
                self._flag("remembered", node, f"a case for the shape {ast.unparse(side)}")

    def _dotted(self, node: ast.AST) -> str | None:
        """ "numpy.random.seed" for an attribute of an imported module; None for anything else."""
        if isinstance(node, ast.Name):
            return self.modules.get(node.id)
        if isinstance(node, ast.Attribute) and (owner := self._dotted(node.value)):
            return f"{owner}.{node.attr}"
        return None

    def _flag_module(self, node: ast.AST, module: str, detail: str) -> None:
        if kind := module_kind(module):
            self._flag(kind, node, detail)

    def _flag(self, kind: FlagKind, node: ast.AST, detail: str) -> None:
        line = getattr(node, "lineno", 0)
        text = self.lines[line - 1].strip() if 0 < line <= len(self.lines) else ""
        self.flags.append(Flag(kind, line, detail[:200], text[:200]))
