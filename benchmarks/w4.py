"""W4: 8 adapters of rank 4 to 64, sequences of 128 to 2,048 tokens, about 8,192 real tokens a step.

python -m benchmarks.w4 [the options of benchmarks.gpu]
"""

from benchmarks.gpu import main

if __name__ == "__main__":
    main(["w4"], description=__doc__)
