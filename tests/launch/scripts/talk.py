"""Writes to both streams as programs do: bytes, unfinished lines, one token at a time."""

import os
import sys
import time

rank = os.environ["RANK"]
sys.stdout.buffer.write(b"raw \xff\x00 bytes\n")
for word in ("The", " capital", " of", " France"):
    print(word, end="")
    time.sleep(0.2)
print(f"\nlast line of {rank}")
sys.stderr.write(f"a word of {rank}\nunfinished")
time.sleep(0.3)
sys.stderr.write(" line\n")
