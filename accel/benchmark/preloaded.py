"""Imports of the process that worker processes are forked from: see `process.share_imports`.

Nothing imported here may start a thread or open a device, which a forked process doesn't inherit.
"""

import gc

import accel.benchmark.worker
import accel.data.pretrained  # noqa: F401

gc.freeze()  # the workers' garbage collector then leaves the pages of these objects shared
