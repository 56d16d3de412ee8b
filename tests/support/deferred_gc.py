"""Pauses the garbage collector, for conftest.py to import first.

Modules that are imported and tests that are collected all stay. To search them for garbage again and again
took a quarter of the time until the first test.
"""

import gc

gc.disable()
