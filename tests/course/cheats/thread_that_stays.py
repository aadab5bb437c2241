# kind: survives
import time
from _thread import start_new_thread as go


def watch():
    while True:
        time.sleep(0.1)


go(watch, ())


def silu(x):
    return x, lambda dy: dy
