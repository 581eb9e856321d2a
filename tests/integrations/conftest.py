"""With mmcv-lite, MMDetection gets a stand-in for mmcv's compiled part, before anything imports it."""

from importlib.util import find_spec

if find_spec("mmcv") is not None and find_spec("torchvision") is not None:
    import mmcv_standin

    mmcv_standin.install()
