"""From a loaded model to tokens: the step, the cache, sampling, and the ranks that run them.

Importing this room loads no torch: source.py, preflight.py and the bookkeeping must stay light. One thing
is settled here, because torch reads it while it is imported: where compiled graphs are kept. inductor's
default is a folder in /tmp, which a restart empties, and a warm start would be cold again.
"""

from .. import env

_folder = env.get_path("TP_CACHE_DIR")
assert _folder is not None, "TP_CACHE_DIR has a default"
env.set_default("TORCHINDUCTOR_CACHE_DIR", str(_folder / "inductor"))
