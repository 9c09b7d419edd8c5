"""Weight-only quantisation: formats, rounding, packing, and the slow obvious reference."""

if __name__ != "tp_runtime.quant":
    raise ImportError("import tp_runtime.quant: the folder quant/ is part of that package")
