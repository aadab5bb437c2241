# kind: program
import subprocess
import sys


def silu(x):
    text = subprocess.run([sys.executable, "-c", "print(1)"], capture_output=True).stdout
    return x * float(text), lambda dy: dy
