"""tp-launch whose watch is late: late_watch.py PYTHON -m MODULE WORD ..., as a wrapper is called.

Half a second passes before the watch looks at a rank that ended; its agent asks several times meanwhile.
"""

import runpy
import sys
import time

from tp_runtime.launch.watch import Watch

look_for_end = Watch._look_for_end


def late(*arguments):
    time.sleep(0.5)
    look_for_end(*arguments)


Watch._look_for_end = late
module = sys.argv[3]
sys.argv = sys.argv[3:]
runpy.run_module(module, run_name="__main__", alter_sys=True)
