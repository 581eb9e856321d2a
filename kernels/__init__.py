"""Device code and launchers. They take and return plain tensors, without autograd. Installed as
``alrp_triton.kernels``; relative imports alone, so that the package may have another name."""

if "." not in __name__:
    raise ImportError(f"this folder is the package alrp_triton.kernels and cannot be imported as {__name__!r}")
