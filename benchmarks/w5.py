"""W5: peak bytes at 1, 8, 32 and 64 adapters, and what one more costs beside what its tensors take.

python -m benchmarks.w5 [the options of benchmarks.gpu]
"""

from benchmarks.gpu import main

if __name__ == "__main__":
    main(["w5"], description=__doc__)
