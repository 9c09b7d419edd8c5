"""Shipped configurations: models/*.toml (shapes)."""

if __name__ != "tp_runtime.configs":
    raise ImportError("import tp_runtime.configs: the folder configs/ is part of that package")
