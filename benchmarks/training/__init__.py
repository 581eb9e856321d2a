"""Compare losses on photographs: the same detector with each loss, on any data in COCO's format.

    alrp-triton compare --train a.json --val b.json --images DIR
    python -m benchmarks.training --data DIR    # the same, for DIR/images and DIR/annotations/{train,val,test}.json

:mod:`.data` reads a dataset, :mod:`.inputs` keeps what the frozen part of the backbone makes of it, :mod:`.detector` is
the network, :mod:`.contenders` lists the losses, :mod:`.run` trains and evaluates one detector, :mod:`.plan` decides
which runs are missing, :mod:`.workers` runs them beside one another, :mod:`.report` writes tables and figures.
"""
