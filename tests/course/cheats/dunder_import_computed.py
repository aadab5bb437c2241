# kind: library
def silu(x):
    name = "".join(reversed("mlssalg"))
    return __import__(name).ops.silu(x)
