"""Where ranks run: the host read, ranks placed, started and watched. No torch (spawn.py aside)."""

if __name__ != "tp_runtime.launch":
    raise ImportError("import tp_runtime.launch: the folder launch/ is part of that package")
