"""Short programs, one for each entry point of the package; every one runs on a CPU within seconds.

    python -m hmar.examples.attention                      the attention operator, forward and backward
    python -m hmar.examples.custom_mask                    a mask of one's own
    python -m hmar.examples.train runs/example             all stages of HMAR, a few steps each
    python -m hmar.examples.codes runs/example             codes of all images made once, and training on them
    python -m hmar.examples.sample runs/example            images from the weights that train wrote
    python -m hmar.examples.serve runs/example             requests in batches, previews, a full queue
    python -m hmar.examples.edit runs/example              in-painting, out-painting, editing by class
    python -m hmar.examples.weights runs/example           weights into published names and back
    python -m hmar.examples.evaluate runs/example          metrics with a feature extractor of one's own
    python -m hmar.examples.parity FOLDER                  outputs against those of the published code

They are to be read and copied; nothing imports them.
"""
