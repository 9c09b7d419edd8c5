"""Plain single-device models. Imports torch and nothing of ours; config and registry not even torch."""

if __name__ != "tp_runtime.models":
    raise ImportError("import tp_runtime.models: the folder models/ is part of that package")
