"""Say whether an answer leaves its work to a library that the task forbids; for chapter 1."""

import dis
import functools
import types
from collections.abc import Callable, Iterable, Iterator

_BACK_DOORS = ("__import__", "eval", "exec", "memoryview", "importlib")


def library_in(function: Callable, forbidden: Iterable[str]) -> str | None:
    """Name the first forbidden module that a function, or one that it calls, makes use of.

    Args:
        function: the answer; of a class with `__call__` or a `partial`, what it calls.
        forbidden: names of modules, e.g. `"numpy"`, which stands for all inside it, too.
    """
    forbidden, todo, seen = {*forbidden, *_BACK_DOORS}, [function], set()
    doors = {name.split(".")[-1] for name in forbidden if "." in name} | {*_BACK_DOORS}
    while todo:
        value = todo.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        names = {n for code in _code_objects(value) for n in code.co_names} & doors
        modules = [*sorted(names), *_modules_of(value)]
        if found := next(filter(None, (_within(m, forbidden, doors) for m in modules)), None):
            return found
        todo += _used_by(value)
    return None


def _modules_of(value) -> Iterator[str]:
    # Modules that a value is, comes from, or imports as it runs.
    if isinstance(value, types.ModuleType):
        yield value.__name__
    home = getattr(value, "__module__", None)
    yield str(home or getattr(type(value), "__module__", ""))
    for code in _code_objects(value):
        steps = dis.get_instructions(code)
        yield from (step.argval for step in steps if step.opname == "IMPORT_NAME")


def _within(module: str, forbidden: set[str], doors: set[str]) -> str | None:
    if module in doors:
        return module
    parts = module.lstrip("_").split(".")
    prefixes = {".".join(parts[: i + 1]) for i in range(len(parts))}
    ours = module.startswith("labkit.exercises")  # the known answers
    return None if ours else next(iter(sorted(prefixes & forbidden)), None)


def _code_objects(value) -> list[types.CodeType]:
    found = [code] if (code := getattr(value, "__code__", None)) else []
    for part in found:
        found += [c for c in part.co_consts if isinstance(c, types.CodeType)]
    return found


def _used_by(value) -> list:
    if isinstance(value, functools.partial):
        return [value.func]
    if isinstance(value, types.MethodType):
        return [value.__func__]
    if not isinstance(value, types.FunctionType):
        inner = vars(type(value)).get("__call__")
        return [inner] if isinstance(inner, types.FunctionType) else []
    cells = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
    known = value.__globals__ | {name: cell.cell_contents for name, cell in cells}
    names = {n for code in _code_objects(value) for n in (*code.co_names, *code.co_freevars)}
    return [known[name] for name in sorted(names) if name in known]
