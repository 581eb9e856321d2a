"""Device code and launchers. They take and return plain tensors, without autograd. Installed as
``alrp_triton.kernels``."""

if __name__ != "alrp_triton.kernels":
    raise ImportError(f"this folder is the package alrp_triton.kernels and cannot be imported as {__name__!r}")
